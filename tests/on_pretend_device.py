"""Nothing is left on the CPU that works on an accelerator: shown on one that only pretends to be.

What it computes is the CPU's, so that the result has to be the same.
"""

import pytest
import torch
from pretend_device import PretendTensor, pretend_device
from test_architectures import narrower
from tiny_models import ARCHITECTURE_CASES, batches, logits, relative_error, tiny_architecture

import grail_hf
from grail_hf.gram import Symmetric
from grail_hf.reduction import Reduction
from grail_hf.selectors import Folding


@pytest.fixture
def device():
    with pretend_device() as name:
        yield name


def test_a_tensor_on_the_wrong_device_is_found(device):
    here, there = torch.ones(3), torch.ones(3, device=device)
    assert isinstance(there, PretendTensor) and there.device.type == device
    assert (there + there).cpu().tolist() == [2, 2, 2]
    assert torch.equal(there[torch.tensor([0, 1])].cpu(), here[:2])
    for wrong in (lambda: here + there, lambda: there.add_(here), lambda: there @ here):
        with pytest.raises(RuntimeError, match="got tensors on"):
            wrong()


def scored_on_the_host(group, stats):
    return stats.energy.cpu().reshape(-1, group.columns).sum(dim=1)


def folded_on_the_host(group, stats, width):
    """Runs of neighbours, as many in each partition."""
    labels = torch.arange(len(stats.energy) // group.columns)
    return Reduction.fold(labels * width // len(labels), torch.ones(len(labels)))


QUICK = [
    {"hidden_states": "host"},
    {"hidden_states": "host", "selector": "fold", "target": "self"},
    {"selector": scored_on_the_host, "allocation": "search"},
]
THOROUGH = [
    {"refit": 0},
    {"hidden_states": "host", "target": "self"},
    {"hidden_states": "disk", "selector": "wanda", "bias": "auto"},
    {"selector": "wanda++", "allocation": "error"},
    {"selector": "slimgpt", "allocation": "search", "refit": 3},
    {"selector": "flap", "allocation": "flap"},
    {"selector": "random", "allocation": "error"},
    {"selector": Folding(folded_on_the_host)},
]


def quick_and_thorough(quick, thorough):
    return [*quick, *(pytest.param(one, marks=pytest.mark.slow) for one in thorough)]


@pytest.mark.parametrize("settings", quick_and_thorough(QUICK, THOROUGH))
def test_every_step_works_where_the_layers_do(settings, device):
    compressed_alike("qwen3", device, settings)


@pytest.mark.parametrize(
    "case",
    quick_and_thorough(["mixtral"], [case for case in ARCHITECTURE_CASES if case != "mixtral"]),
)
def test_every_architecture_works_there(case, device):
    compressed_alike(case, device, {"hidden_states": "host"})


def compressed_alike(case, device, settings):
    """A tiny model is compressed on the device as it is on the CPU, and its weights come back."""
    models = []
    for place in ("cpu", device):
        model = tiny_architecture(case)
        narrower(model, device=place, **{"hidden_states": "accelerator"} | settings)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not any(isinstance(parameter, PretendTensor) for parameter in model.parameters())
        models.append(model)
    here, there = (logits(model, batches()) for model in models)
    assert relative_error(there, here) < 1e-2


def test_from_disk_to_disk_too(device, tmp_path):
    tiny_architecture("qwen3").save_pretrained(tmp_path / "dense")
    for place in ("cpu", device):
        grail_hf.compress_checkpoint(
            *(tmp_path / "dense", tmp_path / place),
            calibration=batches(),
            sparsity=0.3,
            multiple_of=1,
            device=place,
            hidden_states="disk",
            progress=False,
        )
    here, there = (
        logits(type(tiny_architecture("qwen3")).from_pretrained(tmp_path / place), batches())
        for place in ("cpu", device)
    )
    assert relative_error(there, here) < 1e-2


def test_moments_elsewhere_are_brought_block_by_block(device):
    x, weight = torch.randn(700, 600).double(), torch.randn(5, 600).double()
    held = Symmetric.of(x.T @ x)
    index = torch.arange(0, 600, 7)
    there = held.restricted(index.to(device))
    assert there.flat.device.type == device
    assert torch.equal(there.dense().cpu(), held.restricted(index).dense())
    torch.testing.assert_close(held.times(weight.to(device)).cpu(), held.times(weight))

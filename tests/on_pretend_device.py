"""Nothing is left on the CPU that works on an accelerator: shown on one that only pretends to be.

What it computes is the CPU's, so that the result has to be the same.
"""

from functools import partial

import pretend_device as pretend_device_module
import pytest
import torch
from pretend_device import INDEXED, PretendTensor, aten, pretend_device
from test_architectures import narrower
from tiny_models import (
    ARCHITECTURE_CASES,
    at_tokens,
    batches,
    layers_of,
    logits,
    relative_error,
    tiny_architecture,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grail_hf
from grail_hf.config import widest_float
from grail_hf.methods.elimination import elimination_order_
from grail_hf.methods.linalg import Symmetric
from grail_hf.methods.reduction import Reduction
from grail_hf.methods.selectors import Selector
from grail_hf.runtime import devices, dispatched


def two_layers():
    """The second is reached through a layer that is compressed already, as a third would be."""
    return tiny_architecture("qwen3", num_hidden_layers=2)


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


QUICK = [{"hidden_states": "host"}, {"selector": scored_on_the_host, "allocation": "search"}]
THOROUGH = [
    {"hidden_states": "host", "selector": "fold", "target": "self"},
    {"refit": 0},
    {"hidden_states": "host", "target": "self"},
    {"hidden_states": "disk", "selector": "wanda", "bias": "auto"},
    {"selector": "wanda++", "allocation": "error"},
    {"selector": "slimgpt", "allocation": "search", "refit": 3},
    {"selector": "flap", "allocation": "flap"},
    {"selector": "random", "allocation": "error"},
    {"selector": Selector(folded_on_the_host, folds=True)},
]


def quick_and_thorough(quick, thorough):
    return [*quick, *(pytest.param(one, marks=pytest.mark.slow) for one in thorough)]


@pytest.mark.parametrize("settings", quick_and_thorough(QUICK, THOROUGH))
def test_every_step_works_where_the_layers_do(settings, device):
    compressed_alike(two_layers, device, settings)


@pytest.mark.parametrize("settings", [{}, {"refit": 0, "target": "self"}], ids=str)
def test_hidden_states_travel_once_a_layer(settings, device, monkeypatch):
    """Of each micro-batch the compressed model's and the dense one's, to the layer and back."""
    model, inputs = two_layers(), batches()
    monkeypatch.setattr(pretend_device_module, "crossings", [])
    options = {"device": device, "hidden_states": "host", "allocation": "uniform"}
    narrower(model, **options | settings)
    shapes = {(*batch["input_ids"].shape, model.config.hidden_size) for batch in inputs}
    travelled = [shape for shape in pretend_device_module.crossings if tuple(shape) in shapes]
    each = len(travelled) / (len(layers_of(model)) * len(inputs))
    assert 0 < each <= (2 if settings else 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ARCHITECTURE_CASES)
def test_every_architecture_works_there(case, device):
    compressed_alike(partial(tiny_architecture, case), device, {"hidden_states": "host"})


def compressed_alike(make, device, settings):
    """A tiny model is compressed on the device as it is on the CPU, and its weights come back."""
    models = []
    for place in ("cpu", device):
        model = make()
        narrower(model, device=place, **{"hidden_states": "accelerator"} | settings)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not any(isinstance(parameter, PretendTensor) for parameter in model.parameters())
        models.append(model)
    here, there = (logits(model, batches()) for model in models)
    assert relative_error(there, here) < 1e-2


@pytest.fixture
def without_float64():
    widest_float.cache_clear()
    with pretend_device(lacking=torch.float64) as name:
        yield name
    widest_float.cache_clear()


# Between them they come to every place that sums or solves in fp64 where it can.
@pytest.mark.parametrize("settings", [{"selector": "fold"}, {"allocation": "error"}], ids=str)
def test_a_device_without_float64_computes_in_float32(settings, without_float64):
    """`solve_dtype="auto"`; no tensor of float64 comes to the device, which would refuse it."""
    with pytest.raises(TypeError, match="does not have"):
        torch.zeros(1, dtype=torch.float64, device=without_float64)
    computed = []
    for place, dtype in (("cpu", "float64"), (without_float64, "float32")):
        model = two_layers()
        report = narrower(model, device=place, hidden_states="accelerator", **settings)
        assert report.config.solve_dtype == dtype
        computed.append(logits(model, batches()))
    here, there = computed
    assert relative_error(there, here) < 1e-2


def mask(index):
    return isinstance(index, PretendTensor) and index.dtype == torch.bool


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits: their result, or its size, is a value."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)]
        brought = not any(isinstance(leaf, PretendTensor) for leaf in tree_leaves(result))
        masked = operator in INDEXED and any(mask(leaf) for leaf in args[1])
        sized = operator in (
            aten.nonzero.default,
            aten._unique2.default,
            aten.repeat_interleave.Tensor,
        )
        self.count += bool(given) and (brought or masked or sized)
        return result


@pytest.mark.parametrize(("columns", "partitions"), [(1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("panels", [1, 4])
def test_elimination_waits_for_the_device_once_a_panel(columns, partitions, panels, device):
    """Of channels that know nothing of each other no cost changes, so that all panels are full."""
    generator = torch.Generator().manual_seed(0)
    channels = 60 * columns
    weight = torch.randn(4, channels, generator=generator).double()
    inverse = torch.rand(channels, generator=generator).double().diag()
    here = elimination_order_(weight.clone(), inverse.clone(), columns, partitions)
    with Waits() as waits:
        there = elimination_order_(
            weight.to(device), inverse.to(device), columns, partitions, channels // panels
        )
    assert waits.count == panels + 1  # and once to see that none is left
    assert torch.equal(there.cpu(), here)


def test_from_disk_to_disk_too(device, tmp_path):
    two_layers().save_pretrained(tmp_path / "dense")
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
        logits(type(two_layers()).from_pretrained(tmp_path / place), batches())
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


@torch.no_grad()
@pytest.mark.parametrize(("lacking", "staying"), [(None, 0), (0, 0), (1, 2), (10**9, 3)])
def test_of_a_model_that_does_not_fit_layers_come_for_their_part(
    device, lacking, staying, monkeypatch
):
    """Two at least have to stay for any room to be won. Nothing is changed, even by a failure."""
    model = tiny_architecture("qwen3")
    layers = layers_of(model)
    inputs = [{"input_ids": batch["input_ids"]} for batch in batches()]
    there = [{"input_ids": batch["input_ids"].to(device)} for batch in inputs]
    expected = logits(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = 10**12 if lacking is None else (size - lacking) / dispatched.WEIGHTS_SHARE
    monkeypatch.setattr(devices, "free_bytes", lambda device: free)

    def places():
        return [next(layer.parameters()).device.type for layer in layers]

    seen = []
    hook = layers[2].mlp.register_forward_pre_hook(lambda *_: seen.append(places()))
    with dispatched.whole_on_device(model, layers, torch.device(device)):
        assert model.get_input_embeddings().weight.device.type == device
        assert places() == [device] * (3 - staying) + ["cpu"] * staying
        found = [model(**batch, use_cache=False).logits.cpu() for batch in there]
        assert relative_error(at_tokens(found, inputs), expected) < 1e-5
        assert places() == [device] * (3 - staying) + ["cpu"] * staying
    assert seen[0][2] == device and seen[0].count("cpu") == max(staying - 1, 0)
    hook.remove()
    failing = layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with dispatched.whole_on_device(model, layers, torch.device(device)):
            model(**there[0], use_cache=False)
    failing.remove()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

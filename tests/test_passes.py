"""What a layer's passes remember: it changes no result, and nothing large is held unread."""

import pytest
import torch
from test_architectures import narrower
from tiny_models import (
    ARCHITECTURE_CASES,
    all_specs_of,
    batches,
    layers_of,
    logits,
    placement_of,
    relative_error,
    tiny_architecture,
    tiny_model,
)

from grail_hf.calibration.stream import Stream

FEW = ["qwen3", "phi3", "gpt_neox", "opt", "granite", "gemma2", "mixtral", "gpt2"]


def few_and_all(few):
    rest = [pytest.param(case, marks=pytest.mark.slow) for case in ARCHITECTURE_CASES]
    return [*few, *(case for case in rest if case.values[0] not in few)]


@pytest.mark.parametrize("case", few_and_all(FEW))
def test_without_room_to_remember_the_result_is_the_same(case, monkeypatch):
    models = []
    for room in (True, False):
        if not room:
            monkeypatch.setattr("grail_hf.calibration.stream.choose_near", lambda *_: None)
        models.append(tiny_architecture(case))
        narrower(models[-1])
    # A narrowed product may be rounded otherwise than the same columns of the whole one.
    assert relative_error(*(logits(model, batches()) for model in models)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("remembers", [True, False])
def test_attention_s_probabilities_are_not_kept(remembers, monkeypatch):
    """Eager attention returns them beside its output, larger than all else of a layer."""
    if not remembers:
        monkeypatch.setattr("grail_hf.calibration.stream.choose_near", lambda *_: None)
    model, inputs = tiny_model("qwen3", "eager"), batches()
    specs = all_specs_of(model)
    for block in Stream(model, placement_of(model), specs, inputs, progress=False).blocks():
        attention, mlp = block.groups
        block.collect(attention, remember=())
        block.collect(mlp)
        for batch in block.batches:
            ((output, probabilities),) = batch.memory.returned
            expected = layers_of(model)[block.index].self_attn.o_proj.out_features
            assert output.shape == (*batch.hidden.shape[:2], expected)
            assert probabilities is None

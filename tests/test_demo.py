"""The direction that `make demo` shows, on less of the same text."""

import math

import pytest

import grail_hf
from grail_hf.calibration import token_windows


@pytest.fixture(scope="module")
def excess_losses(tiny_llama_dir, tokenizer, jargon_train, jargon_test):
    """Excess loss at sparsity 0.5 on the whole of jargon-test, as in the README's table."""
    import torch
    from transformers import AutoModelForCausalLM

    windows = token_windows(jargon_test, tokenizer, seq_length=256)

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)

    def loss(model) -> float:
        return math.log(grail_hf.perplexity(model, None, windows, batch_size=16))

    dense = loss(load())
    losses = {}
    for name, settings in {
        "pruned": {"selector": "wanda", "compensate": False},
        "wanda": {"selector": "wanda"},
        "gram": {"selector": "gram"},
    }.items():
        model = load()
        grail_hf.compress(
            model,
            tokenizer,
            jargon_train,
            sparsity=0.5,
            num_samples=128,
            seq_length=256,
            batch_size=16,
            **settings,
        )
        losses[name] = loss(model) - dense
    return losses


def test_repair_wins_back_half_of_what_pruning_loses(excess_losses):
    assert 0 < excess_losses["wanda"] <= 0.5 * excess_losses["pruned"]


def test_greedy_elimination_beats_wanda(excess_losses):
    assert 0 < excess_losses["gram"] <= 0.95 * excess_losses["wanda"]

"""The direction that `make demo` shows, on less of the same text."""

import functools
import math

import pytest

import grail_hf
from grail_hf.calibration.windows import token_windows


@pytest.fixture(scope="module")
def excess_losses(tiny_llama_dir, tokenizer, jargon_train, jargon_test):
    """Excess loss at sparsity 0.5 on windows from all of jargon-test, repaired by one solve.

    With 16 tokens for each channel: with fewer, it matters less how units are chosen.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def spread(text, count):
        windows = token_windows(text, tokenizer, seq_length=128)
        return windows[:: len(windows) // count][:count]

    calibration, windows = spread(jargon_train, 128), spread(jargon_test, 48)

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)

    def loss(model) -> float:
        return math.log(grail_hf.perplexity(model, None, windows, batch_size=16))

    dense = loss(load())
    losses = {}
    for name, settings in {
        "pruned": {"selector": "wanda", "compensate": False},
        "wanda": {"selector": "wanda", "refit": 0},
        "obs": {"selector": "obs", "refit": 0},
    }.items():
        model = load()
        grail_hf.compress(
            model,
            None,
            calibration,
            sparsity=0.5,
            allocation="uniform",
            ridge=1e-2,
            solve_dtype="float32",
            batch_size=16,
            **settings,
        )
        losses[name] = loss(model) - dense
    return losses


def test_repair_wins_back_half_of_what_pruning_loses(excess_losses):
    assert 0 < excess_losses["wanda"] <= 0.5 * excess_losses["pruned"]


@pytest.fixture(scope="module")
def small_loss(tiny_llama_dir, tokenizer, jargon_train, jargon_test):
    """The loss on a little of jargon-test, of the dense model or after compressing on 1024 tokens.

    As few tokens as there are channels need more damping than the default.
    """
    import torch
    from transformers import AutoModelForCausalLM

    windows = token_windows(jargon_test, tokenizer, seq_length=128, max_windows=16)
    fixed = {"num_samples": 8, "seq_length": 128, "batch_size": 8, "ridge": 0.1, "progress": False}

    @functools.cache
    def loss(selector=None, compensate=True) -> float:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
        if selector:
            settings = {"sparsity": 0.5, "selector": selector, "compensate": compensate}
            settings |= {"solve_dtype": "float32"} | fixed
            grail_hf.compress(model, tokenizer, jargon_train, **settings)
        return math.log(grail_hf.perplexity(model, None, windows, batch_size=16))

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("selector", grail_hf.SELECTORS)
def test_repair_helps_every_selector(selector, small_loss):
    """On text that calibration has not seen."""
    repaired, pruned = (small_loss(selector, compensate) for compensate in (True, False))
    assert 0 < repaired - small_loss() < 0.95 * (pruned - small_loss())


def test_greedy_elimination_beats_wanda(excess_losses):
    assert 0 < excess_losses["obs"] <= 0.95 * excess_losses["wanda"]

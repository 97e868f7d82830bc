"""The arithmetic of a compression, counted operator by operator: the limits, and the estimate."""

import functools

import pytest
import torch
from test_benchmarks import benchmark
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import grail_hf

RECIPE = {"selector": "wanda", "refit": 0, "target": "self"}


def random_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 512, (32, 128), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def counted(tokens):
    """The operations of a compression: those that torch's own counter knows, all, and estimated.

    torch's leaves out products in place, solves and the CPU's attention.
    """

    @functools.cache
    def operations(**settings):
        settings = {"sparsity": 0.5, "progress": False} | settings
        model, more = random_llama(), benchmark("measuring").counted_operations()
        with FlopCounterMode(display=False) as known, more as counts:
            report = grail_hf.compress(model, calibration=tokens, **settings)
        estimated = sum(phase["operations"] for phase in report.estimate.values())
        return known.get_total_flops(), sum(counts.values()), estimated

    return operations


@pytest.mark.parametrize(
    "settings, limit",
    [
        ({"allocation": "uniform"}, 4.2),
        ({}, 4.8),
        (RECIPE | {"allocation": "uniform"}, 1.6),
    ],
    ids=str,
)
def test_a_compression_takes_few_dense_passes(settings, limit, tokens, counted):
    with torch.no_grad(), FlopCounterMode(display=False) as dense:
        random_llama()(tokens)
    known, _, _ = counted(**settings)
    assert 0 < known <= limit * dense.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "uniform"},
        # With a damping of its own, no group is pruned plainly, and left out of the refit.
        {"allocation": "uniform", "sparsity": 0.3, "ridge": 1e-3},
        {"allocation": "uniform", "refit": 4, "ridge": 1e-3},
        {"allocation": "uniform", "refit": 0},
        RECIPE | {"allocation": "uniform"},
        RECIPE | {"allocation": "uniform", "ridge": 1e-3},
    ],
    ids=str,
)
def test_the_estimate_is_what_is_counted(settings, counted):
    _, whole, estimated = counted(**settings)
    assert estimated == pytest.approx(whole, rel=0.05)

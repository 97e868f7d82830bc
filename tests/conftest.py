"""Fixtures: the bundled trained model and its text."""

import os
from pathlib import Path

# Before any library reads them. Nothing here may ask a hub, and offline it fails at once; the
# models are so small that threads cost more than they give, above all beside other test processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def progress_bars_stay_on():
    """The benchmarks switch transformers' bars off, and with them this library's."""
    yield
    from transformers.utils.logging import enable_progress_bar

    enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    return EXAMPLES / "tiny-llama"


@pytest.fixture(scope="session")
def jargon_train() -> Path:
    return EXAMPLES / "text" / "jargon-train.txt"


@pytest.fixture(scope="session")
def less_text(jargon_train, tmp_path_factory) -> Path:
    """The beginning of jargon-train: to tokenise all of it takes longer than most tests."""
    path = tmp_path_factory.mktemp("text") / "less.txt"
    path.write_text(jargon_train.read_text("utf-8")[:40_000], "utf-8")
    return path


@pytest.fixture(scope="session")
def jargon_test() -> Path:
    return EXAMPLES / "text" / "jargon-test.txt"


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def bos_tokenizer(tiny_llama_dir):
    """The bundled tokenizer, made to put BOS (0) in front of a text by itself, as Gemma's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.fixture
def tiny_llama(tiny_llama_dir):
    """A fresh copy of the trained model, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)

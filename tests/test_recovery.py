"""Recovery: the divergence against an oracle, never worse, resumable, and nothing left behind."""

import copy
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, logits, tiny_architecture
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import grail_hf
from grail_hf import CompressionReport, RecoveryConfig, RecoveryReport, compress, recover
from grail_hf.cli import app
from grail_hf.methods.divergence import divergence, likeliest
from grail_hf.planning.plan import plan_compression
from grail_hf.recovery.costs import recovery_costs
from grail_hf.recovery.training import line_search

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
FAST = {"num_samples": 16, "seq_length": 32, "batch_size": 4, "self_samples": 0, "progress": False}


@pytest.fixture(scope="module")
def narrow(tiny_llama_dir, tokenizer, less_text, tmp_path_factory):
    """A folder of the bundled model with half of its channels, pruned without repair."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    model = load(tiny_llama_dir)
    settings = {"sparsity": 0.5, "selector": "magnitude", "compensate": False}
    report = compress(model, tokenizer, less_text, **settings, **FAST, allocation="uniform")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report.save(folder)
    return folder


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, weights):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@settings(deadline=None)
@given(
    vocabulary=st.integers(2, 12),
    kept=st.integers(1, 12),
    scale=st.floats(0.1, 2),  # beyond, what is left rounds to nothing in fp32
    seed=st.integers(0, 99),
)
def test_divergence_is_that_of_the_kept_tokens_and_the_rest(vocabulary, kept, scale, seed):
    torch.manual_seed(seed)
    dense, small = scale * torch.randn(2, 3, vocabulary)
    kept = min(kept, vocabulary)
    ids, log_probs = likeliest(dense, kept)
    p, q = dense.double().softmax(-1), small.double().softmax(-1)
    order = p.argsort(dim=-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    lumped = [
        torch.cat([x[:, :kept], x[:, kept:].sum(-1, keepdim=True)], -1)[
            :, : min(kept + 1, vocabulary)
        ]
        for x in (p, q)
    ]
    expected = F.kl_div(
        lumped[1].clamp_min(1e-9).log(), lumped[0].clamp_min(1e-9), reduction="none"
    ).sum(-1)
    found = divergence(small, ids, log_probs)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_divergence_has_the_gradient_of_the_difference_of_probabilities():
    """d KL / d logits is q - p, where all tokens are kept."""
    torch.manual_seed(0)
    dense, small = torch.randn(2, 5, 9)
    small.requires_grad_(True)
    divergence(small, *likeliest(dense, 9)).sum().backward()
    assert torch.allclose(small.grad, small.softmax(-1) - dense.softmax(-1), atol=1e-6)
    assert divergence(dense, *likeliest(dense, 4)).abs().max() < 1e-6


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_closer_to_the_dense_model(
    rank, dtype, narrow, tiny_llama_dir, tokenizer, less_text
):
    model = load(narrow, dtype)
    before = weights_of(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    report = recover(
        model, tiny_llama_dir, tokenizer, less_text, rank=rank, learning_rate=3e-3, **FAST
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert report.kept and report.after["calibration"] < 0.97 * report.before["calibration"]
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.dtype == dtype and not model.training
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed and all(".layers." in name and "norm" not in name for name in changed)
    assert RecoveryReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_second_text_is_measured_but_not_learned_from(narrow, tokenizer, tiny_llama_dir):
    rows = torch.randint(0, 4096, (16, 32), generator=torch.Generator().manual_seed(0))
    text = {"calibration": rows, "watch": rows[:8]}
    report = recover(load(narrow), tiny_llama_dir, rank=4, learning_rate=1e-3, **text, **FAST)
    assert set(report.before) == {"calibration", "watched"} == set(report.after)
    assert report.tokens == 14 * 32
    assert all({"step", "calibration", "watched"} == set(entry) for entry in report.divergences)


@pytest.mark.parametrize("seed", range(10))
def test_an_absurd_learning_rate_leaves_the_model_as_it_was(seed, narrow, tiny_llama_dir, caplog):
    rows = torch.randint(0, 4096, (8, 16), generator=torch.Generator().manual_seed(seed))
    model = load(narrow)
    before = weights_of(model)
    rate = (10.0, 1e30)[seed % 2]
    settings = FAST | {"rank": 4, "learning_rate": rate, "epochs": 2, "accumulation": 1}
    report = recover(model, tiny_llama_dir, calibration=rows, seed=seed, **settings)
    assert not report.kept
    assert_same(model, before)
    assert "was dropped" in caplog.text and "dropped" in report.summary()


def test_the_learning_rate_is_the_best_of_those_tried(narrow, tokenizer, tiny_llama_dir, less_text):
    report = recover(load(narrow), tiny_llama_dir, tokenizer, less_text, rank=4, **FAST)
    assert len(report.trials) >= 3
    assert report.learning_rate == min(report.trials, key=report.trials.get)


@given(st.floats(-12, 2), st.floats(0.5, 3))
def test_the_search_finds_a_minimum_within_its_reach(lowest, width):
    """Of a figure with one minimum in the logarithm of the rate, beyond which training diverges."""
    tried = []

    def worst_after(rate):
        tried.append(rate)
        distance = math.log(rate) - lowest
        return math.inf if distance > 2 * width else distance**2

    found = line_search(worst_after, 1e-3)
    assert 3 <= len(found) == len(tried) <= 6
    near = math.log(min(found, key=found.get))
    reachable = math.log(1e-3) - 4 * math.log(3) < lowest < math.log(1e-3) + 5 * math.log(3)
    if reachable and width > math.log(3):
        assert abs(near - lowest) <= math.log(3)


def interrupted_after(steps, monkeypatch):
    """Have the trainer stop as by Ctrl-C after some steps of the main run."""
    from grail_hf.recovery import training

    class Stop(training.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == steps:
                raise KeyboardInterrupt

    original = training.Distillation.__init__

    def stopping(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Stop())

    monkeypatch.setattr(training.Distillation, "__init__", stopping)


@pytest.mark.parametrize("rank", [4, "full"])
def test_a_run_that_is_stopped_goes_on_and_ends_the_same(
    rank, narrow, tiny_llama_dir, tmp_path, monkeypatch
):
    rows = torch.randint(0, 4096, (16, 16), generator=torch.Generator().manual_seed(0))
    settings = FAST | {"rank": rank, "learning_rate": 1e-3, "epochs": 2, "accumulation": 1}
    whole = load(narrow)
    expected = recover(whole, tiny_llama_dir, calibration=rows, **settings)

    model = load(narrow)
    before = weights_of(model)
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            recover(model, tiny_llama_dir, calibration=rows, folder=tmp_path, **settings)
    assert_same(model, before)
    with pytest.raises(ValueError, match="was stopped: resume it"):
        recover(model, tiny_llama_dir, calibration=rows, folder=tmp_path, **settings)
    other = settings | {"epochs": 3}
    with pytest.raises(ValueError, match="other settings"):
        recover(model, tiny_llama_dir, calibration=rows, folder=tmp_path, resume=True, **other)
    report = recover(
        model, tiny_llama_dir, calibration=rows, folder=tmp_path, resume=True, **settings
    )
    assert report.divergences == expected.divergences
    assert_same(model, weights_of(whole))


def test_a_stopped_run_on_disk_leaves_the_folder_and_goes_on(
    narrow, tiny_llama_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(narrow, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = torch.randint(0, 4096, (16, 16), generator=torch.Generator().manual_seed(0))
    settings = FAST | {"rank": 4, "learning_rate": 1e-3, "epochs": 2, "accumulation": 1}
    recovered = partial(grail_hf.recover_checkpoint, folder, str(tiny_llama_dir), rows, **settings)
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            recovered()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    with pytest.raises(ValueError, match="--resume"):
        recovered()
    assert recovered(resume=True).kept
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "model.safetensors").read_bytes() != files["model.safetensors"]


def test_a_failure_leaves_the_model_as_it_was(narrow, tiny_llama_dir, monkeypatch):
    from grail_hf.recovery import training

    def fail(self, *_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training.Distillation, "training_step", fail)
    rows = torch.randint(0, 4096, (8, 16))
    model = load(narrow)
    before = weights_of(model)
    with pytest.raises(torch.OutOfMemoryError):
        recover(model, tiny_llama_dir, calibration=rows, rank=4, learning_rate=1e-3, **FAST)
    assert_same(model, before)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_compress_recovers_where_it_is_asked_to(tiny_llama_dir, tokenizer, less_text):
    settings = {"sparsity": 0.5, "allocation": "uniform", "refit": 0} | FAST
    plain, recovered = load(tiny_llama_dir), load(tiny_llama_dir)
    compress(plain, tokenizer, less_text, **settings)
    report = compress(recovered, tokenizer, less_text, recover=True, **settings)
    outcome = report.recovered
    assert outcome is not None and outcome.calibration == report.calibration
    assert report.to_dict()["recovery"]["kept"] is outcome.kept
    assert (
        CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))).recovered == outcome
    )
    same = all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), recovered.parameters(), strict=True)
    )
    assert same is not outcome.kept
    assert ("Recovery without labels" in report.card()) and (
        "No training." in report.card()
    ) is not outcome.kept
    assert any("of recovery" in row[0] for row in report._rows())


def test_a_recovery_that_fails_costs_no_compression(
    tiny_llama_dir, tokenizer, less_text, monkeypatch, caplog
):
    from grail_hf.recovery import training

    def fail(self, *_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training.Distillation, "training_step", fail)
    model = load(tiny_llama_dir)
    settings = {"sparsity": 0.5, "allocation": "uniform", "refit": 0, "recover": True} | FAST
    report = compress(model, tokenizer, less_text, **settings)
    assert report.recovery == {"failed": "OutOfMemoryError: no memory"}
    assert report.groups and "the model is compressed, without it" in caplog.text
    assert report.recovered is None and "no memory" in str(report)


def test_the_command_replaces_the_folder_by_a_better_model(
    narrow, tiny_llama_dir, less_text, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(narrow, folder)
    (folder / "extra.txt").write_text("mine")
    flags = ["--num-samples", "16", "--seq-length", "32", "--rank", "4", "--learning-rate", "1e-3"]
    flags += ["--self-samples", "0", "--calibration", str(less_text)]
    arguments = ["recover", str(folder), "--teacher", str(tiny_llama_dir), *flags]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "course.png"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept"]
    assert (tmp_path / "course.png").stat().st_size > 5000
    report = CompressionReport.load(folder)
    assert (
        report.recovered is not None
        and "Recovery without labels" in (folder / "README.md").read_text()
    )
    assert (folder / "extra.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["course.png", "model"]
    old, new = load(narrow), load(folder)
    assert any(
        not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)
    )


def test_what_cannot_be_recovered_is_refused_first(narrow, tiny_llama_dir, tmp_path, monkeypatch):
    rows = torch.zeros(8, 16, dtype=torch.int64)
    dense = load(tiny_llama_dir)
    with pytest.raises(ValueError, match="same object"):
        recover(dense, dense, calibration=rows)
    with pytest.raises(ValueError, match="give folder="):
        recover(load(narrow), dense, calibration=rows, resume=True)
    with pytest.raises(ValueError, match="one window is too few"):
        recover(load(narrow), dense, calibration=rows[:1], rank=4)
    with pytest.raises(FileNotFoundError, match="that grail_hf compressed"):
        grail_hf.recover_checkpoint(tiny_llama_dir, str(tiny_llama_dir))
    with monkeypatch.context() as patch:  # texts are read before weights are
        patch.setattr("grail_hf.recovery.recover.load_model", lambda _: 1 / 0)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            recover(load(narrow), tiny_llama_dir, calibration="no such text", rank=4)
    other = copy.deepcopy(dense)
    other.resize_token_embeddings(4097)
    with pytest.raises(ValueError, match="4096 tokens and the dense one 4097"):
        recover(load(narrow), other, calibration=rows, rank=4)
    with pytest.raises(ValueError, match="from disk to disk: compress without it"):
        grail_hf.compress_checkpoint(
            tiny_llama_dir, tmp_path / "out", rows, sparsity=0.5, recover=True
        )


def test_adapters_without_peft_name_the_extra(narrow, tiny_llama_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "grail-hf\[recover\]"'):
        recover(load(narrow), tiny_llama_dir, calibration=torch.zeros(8, 16).long(), rank=4)


def test_padded_windows_count_their_own_tokens_alone(narrow, tiny_llama_dir):
    rows = torch.randint(0, 4096, (8, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[::2, 10:] = 0
    batches = [{"input_ids": rows, "attention_mask": mask}]
    settings = FAST | {"rank": 4, "learning_rate": 1e-3}
    report = recover(load(narrow), tiny_llama_dir, calibration=batches, **settings)
    garbled = [{"input_ids": rows.masked_fill(mask == 0, 7), "attention_mask": mask}]
    again = recover(load(narrow), tiny_llama_dir, calibration=garbled, **settings)
    assert report.after == again.after and report.tokens < 7 * 16


@pytest.mark.parametrize("rank", [2, "full"])
@pytest.mark.parametrize("case", ["gpt2", "phi3", "gemma2", "mixtral", "qwen3_5", "mistral3"])
def test_other_architectures(case, rank, tmp_path):
    dense, model = tiny_architecture(case), tiny_architecture(case)
    rows = batches(padded=True)
    halves = {"mlp_sparsity": 0.5, "attention_sparsity": 0.0, "random_tokens": 0}
    compress(model, None, rows, **halves, compensate=False, selector="magnitude", progress=False)
    modules = {name: type(module) for name, module in model.named_modules()}
    settings = {"rank": rank, "learning_rate": 3e-3, "accumulation": 1, "progress": False}
    same = rows[1]["input_ids"][:1].expand(16, -1)  # what is learned holds where it is judged
    report = recover(model, dense, calibration=same, **settings)
    assert report.kept, report
    assert {name: type(module) for name, module in model.named_modules()} == modules
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(model, rows), logits(again, rows))


def test_layers_that_differ_in_width(tiny_llama_dir, less_text, tokenizer, tmp_path):
    """Such a checkpoint is recovered on disk, and loads as before."""
    model = load(tiny_llama_dir)
    settings = {"sparsity": 0.3, "allocation": "error", "refit": 0}
    report = compress(model, tokenizer, less_text, **settings, **FAST)
    assert not report.uniform
    model.save_pretrained(tmp_path / "model")
    report.save(tmp_path / "model")
    rows = torch.randint(0, 4096, (16, 16), generator=torch.Generator().manual_seed(0))
    settings = FAST | {"rank": "full", "learning_rate": 1e-4}
    outcome = grail_hf.recover_checkpoint(tmp_path / "model", str(tiny_llama_dir), rows, **settings)
    assert outcome.kept
    again = load(tmp_path / "model")
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert (tmp_path / "model" / "modeling_grail.py").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rank", [4, "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_trains_on_cuda(rank, dtype, narrow, tiny_llama_dir, less_text, tokenizer):
    model = load(narrow, dtype)
    settings = FAST | {"rank": rank, "learning_rate": 3e-3, "device": "cuda"}
    report = recover(model, tiny_llama_dir, tokenizer, less_text, **settings)
    assert report.kept and report.after["calibration"] < 0.97 * report.before["calibration"]
    assert model.device.type == "cpu" and model.dtype == dtype


IN_PROCESSES = """
import sys, torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM
import grail_hf
PartialState(cpu=True)
narrow, dense, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32)
rows = torch.randint(0, 4096, (16, 16), generator=torch.Generator().manual_seed(0))
report = grail_hf.recover(
    model, dense, calibration=rows, rank=4, learning_rate=1e-3, batch_size=2, accumulation=1,
    device="cpu", progress=False,
)
rank = grail_hf.runtime.processes.index()
torch.save((report.to_dict(), model.state_dict()), f"{out}/{rank}.pt")
"""


def test_processes_share_the_windows(narrow, tiny_llama_dir, tmp_path):
    (tmp_path / "script.py").write_text(IN_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(tmp_path / "script.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [str(narrow), str(tiny_llama_dir), str(tmp_path)]
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=180)
    (report, weights), (other, others) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert report["kept"] and report["steps"] == 7
    assert {**report, "seconds": 0} == {**other, "seconds": 0}
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_7b_with_rank_16_trains_in_24_gb():
    """Llama-2-7B with 30% removed, windows of 2048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(shapes, dtype=torch.bfloat16)
    plan = plan_compression(model, grail_hf.GrailConfig(sparsity=0.3))
    accelerator = torch.device("cuda")
    config = RecoveryConfig(rank=16, batch_size=2)
    costs = recovery_costs(model, plan, config, accelerator)
    assert 10 * 2**30 < costs.accelerator_bytes < 24e9
    full = recovery_costs(model, plan, RecoveryConfig(rank="full", batch_size=2), accelerator)
    assert full.accelerator_bytes > 70e9
    assert 128 * 2048 * 64 * 8 < costs.disk_bytes < 2e9


def test_inspect_states_what_a_recovery_takes(tiny_llama_dir):
    arguments = ["inspect", str(tiny_llama_dir), "--sparsity", "0.5", "--recover", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recovery"]["operations"] > 0
    assert "recovery: memory where it trains" in result.stderr


def test_the_benchmark_measures_before_and_after(less_text, jargon_test, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    flags = ["--sparsities", "0.5", "--allocation", "uniform", "--num-samples", "8"]
    flags += ["--learned", "8", "--seq-length", "32", "--max-windows", "2", "--ranks", "2"]
    flags += ["--learning-rate", "1e-3", "--epochs", "1", "--output", str(tmp_path)]
    flags += ["--calibration", str(less_text), "--text", str(jargon_test)]
    script = BENCHMARKS / "recovery.py"
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    runpy.run_path(str(script), run_name="__main__")
    rows = json.loads((tmp_path / "recovery.json").read_text())["rows"]
    assert [row["source"] for row in rows] == ["none", "texts", "self"]
    assert {str(path.name) for path in tmp_path.glob("*.png")} == {
        "0.5-texts-2.png",
        "0.5-self-2.png",
    }

"""The benchmarks run: small, so that what they print is no measurement."""

import copy
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import grail_hf

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    """As they do when they are run, by the folder that they are in."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_selection_finds_one_order_both_ways(monkeypatch, capsys):
    """Its panels of one step are a reference for the blocked elimination."""
    selection = benchmark("selection")
    weight, inverse = selection.problem(300, 40, "cpu")
    orders = [selection.timed(weight, inverse, panel)[1] for panel in (1, 128)]
    assert torch.equal(*orders) and sorted(orders[0].tolist()) == list(range(300))
    monkeypatch.setattr(sys, "argv", ["selection.py", "--channels", "40"])
    selection.main()
    assert "True" in capsys.readouterr().out


def test_memory_measures_a_model_some_layers_of_which_stand_for_the_rest(tmp_path):
    memory = benchmark("memory")
    case = memory.Case("small", 5, 64, 192, 4, 2, 96, 4, 32, written=2)
    memory.write_model(case, tmp_path / "source")
    assert len(list((tmp_path / "source").glob("layer-*"))) == 2
    task = {
        "case": vars(case),
        "source": str(tmp_path / "source"),
        "output": str(tmp_path / "out"),
        "settings": {
            **{"sparsity": 0.3125, "batch_size": 1, "device": "cpu", "solve_dtype": "float32"},
            **{"allocation": "uniform"},
        },
    }
    run = [sys.executable, BENCHMARKS / "memory.py", "--task", json.dumps(task)]
    found = json.loads(subprocess.check_output(run, text=True).splitlines()[-1])
    assert len(found["errors"]) == 2 * 5
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5 + 1
    assert found["measured"].keys() <= found["estimate"].keys()
    assert torch.tensor(found["errors"]).isfinite().all()


@pytest.fixture
def measuring():
    return benchmark("measuring")


def small(measuring, **changes):
    shapes = {"layers": 2, "hidden": 32, "inner": 96, "heads": 4, "kv_heads": 2}
    sizes = {"vocabulary": 64, "samples": 6, "length": 16}
    return measuring.Case("small", **shapes | sizes | changes)


def test_operations_are_counted_by_dtype(measuring):
    """Products in place and solves too, which torch's own table lacks."""
    a, b = torch.randn(6, 8), torch.randn(8, 4)
    square = torch.eye(12, dtype=torch.float64)
    with measuring.counted_operations() as counts:
        total = a @ b
        total.addmm_(a, b)
    assert counts == {(None, torch.float32): 2 * (2 * 6 * 8 * 4)}
    for run, operations in (
        (lambda: torch.linalg.cholesky_ex(square), 12**3 / 3),
        (lambda: torch.cholesky_inverse(square), 2 * 12**3 / 3),
        (lambda: torch.linalg.solve_triangular(square, square[:, :5], upper=False), 12**2 * 5),
        (lambda: torch.linalg.solve_ex(square, square[:, :5]), 2 * 12**3 / 3 + 2 * 12**2 * 5),
    ):
        with measuring.counted_operations() as counts:
            run()
        assert counts == {(None, torch.float64): operations}


def test_time_and_operations_belong_to_grail_hfs_phases(measuring):
    case = small(measuring)
    model = measuring.random_llama(case, 2, torch.float32, CPU)
    with measuring.counted_operations() as counts:
        report, seconds, phases = measuring.timed(
            lambda: grail_hf.compress(
                model, calibration=case.tokens(), sparsity=0.5, multiple_of=1, progress=False
            ),
            CPU,
        )
    assert phases.keys() == report.measured.keys() >= {"forward", "gram", "solve", "refit"}
    assert sum(phases.values()) <= seconds
    for phase, cost in report.measured.items():
        assert phases[phase] == pytest.approx(cost["seconds"], rel=0.1, abs=0.05)
    assert {phase for phase, _ in counts if phase} <= phases.keys()
    assert counts["gram", torch.float32] > 0 and counts["solve", torch.float64] > 0
    with measuring.counted_operations() as outside:
        model(case.tokens())
    assert outside.keys() == {(None, torch.float32)}


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_the_papers_loop_is_what_grail_hf_does_with_its_choices(kind, measuring, monkeypatch):
    """Undamped, since only the paper's damping pulls towards an output of zero.

    Where one kind alone is narrowed, both Grams of a layer are of the same inputs.
    """
    speed = benchmark("speed")
    monkeypatch.setattr(speed, "DAMPING", 0)
    case = small(measuring, samples=64)
    plain = measuring.random_llama(case, 2, torch.float32, CPU)
    ours = copy.deepcopy(plain)
    sparsities = {f"{part}_sparsity": 0.5 * (part == kind) for part in ("mlp", "attention")}
    report = grail_hf.compress(
        ours,
        calibration=case.tokens(),
        **{"ridge": 0, "multiple_of": 1, "attention_unit": "kv_group", "progress": False},
        **speed.QUICK | sparsities,
    )
    assert report.widths[kind] == {"mlp": (48, 48), "attention": (1, 1)}[kind]
    speed.paper_loop(plain, case.tokens(), report.widths, 4, CPU)
    weights = dict(ours.named_parameters())
    for name, weight in plain.named_parameters():
        assert (weight - weights[name]).norm() <= 1e-3 * weight.norm(), name


def test_the_papers_repair_is_a_damped_least_squares_fit(monkeypatch):
    """Of all channels on those that are left, with rows of sqrt(d) I for the damping d."""
    speed = benchmark("speed")
    monkeypatch.setattr(speed, "DAMPING", 0.5)
    linear = torch.nn.Linear(12, 5, bias=False)
    weight, x, kept = linear.weight.detach().double(), torch.randn(200, 12), torch.arange(0, 12, 2)
    gram, hook = speed.gram_hook(linear)
    linear(x)
    hook.remove()
    speed.repair_(linear, gram, kept)
    x = x.double()
    damping = 0.5 * (x[:, kept].square().sum(0).mean() + 1e-3)
    rows = torch.cat((x[:, kept], damping.sqrt() * torch.eye(6)))
    fit = torch.linalg.lstsq(rows, torch.cat((x, torch.zeros(6, 12)))).solution
    torch.testing.assert_close(linear.weight.double(), weight @ fit.T, rtol=1e-3, atol=1e-4)


def test_a_slope_is_the_exponent_of_a_power():
    speed = benchmark("speed")
    assert speed.slope((1, 2, 4), [3 * size**1.7 for size in (1, 2, 4)]) == pytest.approx(1.7)


@pytest.mark.parametrize("real", [False, True], ids=["random", "bundled"])
def test_speed_compares_three_ways_in_one_run(real, monkeypatch, tmp_path, tiny_llama_dir, capsys):
    speed = benchmark("speed")
    flags = ["--samples", 4, "--length", 32, "--repeats", 1, "--rate-size", 64]
    flags += ["--output", tmp_path / "speed.json"]
    if real:
        text = tmp_path / "text.txt"
        text.write_text("a little text, " * 300)
        flags += ["--model", tiny_llama_dir, "--text", text, "--growth", 0]
        monkeypatch.setattr(speed, "WAYS", {way: speed.QUICK for way in speed.WAYS})
    else:
        flags += ["--layers", 4, "--hidden", 64, "--inner", 128]
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, flags)])
    speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["ways"].keys() == speed.WAYS.keys()
    for way, one in found["ways"].items():
        (seconds,), (paper,) = one["seconds"], found["ways"]["paper"]["seconds"]
        assert one["ratio"] == pytest.approx(seconds / paper)
        assert one["of_limit"] == pytest.approx(one["limit_seconds"] / seconds)
        assert one["operations"] == one["forward_passes"] * found["dense_operations"] > 0
        assert one["divergence"] > 0
        highest = max(max(rates.values()) for rates in found["rates"])
        assert one["limit_seconds"] >= one["operations"] / highest > 0
        if way != "paper":
            counted = sum(phase["operations"] for phase in one["phases"].values())
            assert 0.95 * one["operations"] <= counted <= one["operations"]
            assert 0.5 < sum(phase["share"] for phase in one["phases"].values()) <= 1
    assert found["growth"].keys() == (set() if real else {"tokens", "width", "layers"})
    for ways in found["growth"].values():
        assert all(math.isfinite(one["exponent"]) for one in ways.values())
    assert "limit / time" in capsys.readouterr().out


def gpu_run(gpu, monkeypatch, folder, *flags):
    """Its exit code and the JSON that it leaves."""
    output = folder / "gpu.json"
    command = ["gpu.py", "--dry-run", "--output", str(output), *map(str, flags)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return end.value.code, json.loads(output.read_text())["sections"]


def test_gpu_runs_without_one_on_small_shapes(monkeypatch, tmp_path):
    gpu = benchmark("gpu")
    chosen = ["machine", "7B, refit=0", "7B, generation", "70B, 2 layers, default", "1B, float16"]
    code, found = gpu_run(gpu, monkeypatch, tmp_path, "--sections", *chosen)
    assert code == 0 and list(found) == chosen
    assert {one["status"] for one in found.values()} == {"done"}
    part = found["70B, 2 layers, default"]
    assert part["seconds_scaled"] == pytest.approx(part["seconds"] * 3 / 2)
    assert found["7B, refit=0"]["phases"].keys() == found["7B, refit=0"]["measured"].keys()
    assert found["1B, float16"]["dtype"] == "float16"
    rates = found["7B, generation"]["tokens_a_second"]
    assert {len(times) for kinds in rates.values() for times in kinds.values()} == {3}


def test_gpu_goes_on_after_a_section_that_fails_or_takes_too_long(monkeypatch, tmp_path):
    gpu = benchmark("gpu")
    output = tmp_path / "gpu.json"
    seen = []

    def last(bench):
        seen.append(list(json.loads(output.read_text())["sections"]))
        return {"summary": "fine"}

    monkeypatch.setattr(gpu, "PATIENCE", 1)
    named = {
        "wrong": (1, lambda bench: {"summary": "", "checks": {"one is two": False}}),
        "failing": (1, lambda bench: 1 / 0),
        "slow": (0.1, lambda bench: time.sleep(60)),
        "long": (9 * 60, lambda bench: None),
        "last": (1, last),
    }
    monkeypatch.setattr(
        gpu, "sections", lambda: [gpu.Section(name, *rest) for name, rest in named.items()]
    )
    code, found = gpu_run(gpu, monkeypatch, tmp_path)
    assert code == 1
    statuses = {name: one["status"] for name, one in found.items()}
    assert statuses == dict(zip(named, "failed failed stopped skipped done".split(), strict=True))
    assert "one is two" in found["wrong"]["summary"]
    assert "1 / 0" in found["failing"]["error"] and "ZeroDivisionError" in found["failing"]["error"]
    assert "would take about 540 s" in found["long"]["summary"]
    assert seen == [["wrong", "failing", "slow", "long"]]  # what a kill would have left

    code, found = gpu_run(gpu, monkeypatch, tmp_path, "--sections", "last", "--minutes", 0)
    assert code == 0 and found["last"]["status"] == "skipped"


def test_gpu_sees_that_results_differ(measuring):
    gpu = benchmark("gpu")
    case = small(measuring)
    dense = measuring.random_llama(case, 2, torch.float32, CPU)
    results = []
    for selector in ("wanda", "wanda", "random"):
        model = copy.deepcopy(dense)
        grail_hf.compress(
            model, calibration=case.tokens(), sparsity=0.5, multiple_of=1, selector=selector
        )
        results.append(model)
    first, again, other = results
    assert gpu.differences(dense, first, again) == {"other_rows": 0, "weights": 0}
    found = gpu.differences(dense, first, other)
    assert found["other_rows"] > 0 and found["weights"] > gpu.TOLERANCE
    with torch.no_grad():
        again.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert gpu.differences(dense, first, again) == {
        "other_rows": 0,
        "weights": pytest.approx(0.01, rel=1e-3),
    }


def test_gpu_finds_the_tests_that_need_cuda():
    found = benchmark("gpu").cuda_tests(None)
    assert found["tests"] >= 15 and found["checks"] == {"all pass": True}
    assert found["passed"] == (found["tests"] if torch.cuda.is_available() else 0)

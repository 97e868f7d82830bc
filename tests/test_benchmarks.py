"""The benchmarks run: small, so that what they print is no measurement."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


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

"""Several real processes against one: the same weights, the same report, and an end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes_worker
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import batches, tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

import grail_hf
from grail_hf.cli import app
from grail_hf.runtime import processes

TESTS = Path(__file__).parent
LIMIT = 1e-5
SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the results of two processes, the second of which is killed in the end, and of three."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, TESTS / "processes_worker.py", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=SECONDS)
    return folder


def results(folder, name, number):
    paths = [folder / str(number) / f"{name}.{rank}.pt" for rank in range(number)]
    assert all(path.exists() for path in paths), printed(folder, number, 0)
    return [torch.load(path, weights_only=False) for path in paths]


def printed(folder, number, rank):
    (path,) = (folder / str(number)).glob(f"*.{rank}.out")
    return path.read_text("utf-8")


def assert_same(alone, shared):
    """Weights within LIMIT, widths equal, and all processes alike."""
    for other in shared[1:]:
        torch.testing.assert_close(other["weights"], shared[0]["weights"], rtol=0, atol=0)
        assert other["report"] == shared[0]["report"]
    weights = shared[0]["weights"]
    assert weights.keys() == alone["weights"].keys()
    for name, expected in alone["weights"].items():
        assert (weights[name] - expected).norm() <= LIMIT * expected.norm(), name
    report, expected = shared[0]["report"], alone["report"]
    assert report["widths"] == expected["widths"]
    assert (report["processes"], expected["processes"]) == (len(shared), 1)
    assert report["calibration"] == expected["calibration"]
    for group, like in zip(report["groups"], expected["groups"], strict=True):
        assert group.keys() == like.keys()
        for key, value in like.items():
            assert group[key] == (
                pytest.approx(value, rel=LIMIT) if isinstance(value, float) else value
            )


@pytest.mark.parametrize("name", processes_worker.RUNS)
def test_two_processes_give_what_one_does(folder, name):
    shared = results(folder, name, 2)
    alone = processes_worker.compressed(name)
    assert_same(alone, shared)
    assert [process["solves"] for process in shared] == [alone["solves"], 0]


def test_three_processes_give_what_one_does(folder):
    assert_same(processes_worker.compressed("padded"), results(folder, "padded", 3))


def test_more_processes_than_batches_are_refused(folder):
    for message in results(folder, "too few", 3):
        assert "2 calibration batches are too few for 3 processes" in message
        assert "batch_size" in message and "num_samples" in message


def test_what_is_exchanged(folder):
    for found in results(folder, "exchanged", 2):
        assert found["sum"][0].tolist() == [[3.0] * 3] * 2
        assert found["sum"][1].tolist() == [1, 10]
        assert found["total"] == [3, 1.0] and isinstance(found["total"][0], int)
        assert found["gather"] == [0, 1, 1]
        rank, reduction, (empty, mask, matrix, nothing) = found["once"]
        assert rank == 0 and nothing is None and empty.numel() == 0
        assert reduction.labels.tolist() == [0, 1, 0, 1]
        assert reduction.shares.dtype == torch.float64
        assert mask.tolist() == [False, True, False, True]
        assert matrix.tolist() == [[0, 3], [1, 4], [2, 5]]
    own = results(folder, "exchanged", 2)
    assert own[0]["share"] + own[1]["share"] == list(range(5))


def test_what_the_first_raises_all_raise(folder):
    first, second = (found["errors"] for found in results(folder, "exchanged", 2))
    assert first == [("FloatingPointError", "NaN in layer 3"), ("Unlike", "1 is not 2")]
    assert second == [first[0], ("RuntimeError", "Unlike: 1 is not 2")]


def test_the_first_alone_shows_bars(folder):
    assert "Calibrating" in printed(folder, 2, 0)
    assert "Calibrating" not in printed(folder, 2, 1)


def test_when_one_is_killed_the_other_says_so_and_ends(folder):
    ends = json.loads((folder / "ends.json").read_text())["2"]
    (code, ended), (killed, died) = ends["0"], ends["1"]
    assert (code, killed) == (1, -9), printed(folder, 2, 0)
    assert ended - died < 20
    last = printed(folder, 2, 0).strip().splitlines()[-1]
    assert last.startswith("error in process 0 of 2: another process of 2 ended at model.layers.0")
    assert "load it again" in last
    left = {path.name for path in (folder / "2").iterdir() if path.suffix not in (".pt", ".out")}
    assert not left, "nothing half-written"


def test_what_was_done_when_one_is_killed_is_gone_on_with(folder):
    """By another number of processes, to the bytes of a run that nothing stopped."""
    ends = json.loads((folder / "ends.json").read_text())["3"]
    assert [ends[rank][0] for rank in "012"] == [70, -9, 70], printed(folder, 3, 0)
    for rank in (0, 2):
        last = printed(folder, 3, rank).strip().splitlines()[-1]
        assert "StoppedError: another process of 3 ended at model.layers.1.mlp" in last
        assert "1 of the layers done" in last
    processes_worker.from_disk_to_disk(folder / "3", "out", resume=True)
    processes_worker.from_disk_to_disk(folder / "3", "at once")
    outputs = [sorted((folder / "3" / name).iterdir()) for name in ("out", "at once")]
    for one, other in zip(*outputs, strict=True):
        assert one.name == other.name
        assert one.suffix in (".json", ".md") or one.read_bytes() == other.read_bytes()


def test_one_process_joins_nothing():
    marker = object()
    processes.join()
    assert not torch.distributed.is_initialized()
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.once(lambda: marker, "here") is marker
    assert processes.gather([marker], "here") == [marker]
    assert processes.share(3) == range(3)


class Joined(ValueError):
    pass


@pytest.fixture
def launched(monkeypatch):
    """As a launcher has it for the first of two processes; who joins the other is found out."""

    def join(**settings):
        raise Joined("joined")

    monkeypatch.setattr("accelerate.PartialState", join)
    own = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))


def test_a_call_in_a_launched_script_joins_nothing(launched, tmp_path):
    """One process may well be alone in making it, and would wait for ever."""
    settings = {"mlp_sparsity": 0.5, "attention_sparsity": 0.0, "device": "cpu", "refit": 0}
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    report = grail_hf.compress(model, None, batches(), multiple_of=1, **settings)
    assert report.processes == 1
    grail_hf.compress_checkpoint(
        tmp_path / "dense", tmp_path / "out", batches(), multiple_of=1, **settings
    )
    assert not torch.distributed.is_initialized()


def test_the_command_joins_what_a_launcher_started(launched, tiny_llama_dir, tmp_path):
    command = ["compress", str(tiny_llama_dir), str(tmp_path / "out"), "--sparsity", "0.5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and result.stderr.strip() == "error: joined"


@pytest.mark.parametrize(("number", "count"), [(5, 2), (7, 3), (16, 4), (4, 4)])
def test_shares_are_even_and_consecutive(number, count):
    shares = []
    for rank in range(count):
        store = FakeStore()
        torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=count)
        try:
            shares.append(processes.share(number))
        finally:
            torch.distributed.destroy_process_group()
    assert [item for share in shares for item in share] == list(range(number))
    assert {len(share) for share in shares} <= {number // count, -(-number // count)}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["--in-memory", "--disk-to-disk"])
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "2"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_command_gives_what_one_process_does(
    launcher, where, tiny_llama_dir, jargon_train, tmp_path
):
    for output, started_by in (("one", ()), ("two", launcher)):
        command = [
            *(sys.executable, "-m", *started_by, *(("-m",) if started_by else ())),
            *("grail_hf", "compress", tiny_llama_dir, tmp_path / output, "--sparsity", "0.5"),
            *("--calibration", jargon_train, "--num-samples", "8", "--seq-length", "128"),
            *("--batch-size", "2", "--device", "cpu", where, "--json"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["processes"] == 2, "one object, of the first process"
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "two")]
    for one, two in zip(*files, strict=True):
        found = load_file(two)
        for name, expected in load_file(one).items():
            error = (found[name].double() - expected.double()).norm()
            assert error <= LIMIT * expected.double().norm(), name

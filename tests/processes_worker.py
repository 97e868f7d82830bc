"""What several processes do in `test_processes.py`; the test does the same alone.

    python processes_worker.py FOLDER

starts two processes, and then three, as a launcher does: the environment tells which one each is.
Results are saved in FOLDER, as `NAME.RANK.pt`, and `ends.json` has the exit codes. The processes
are forks, because to import everything takes as long as all that they do.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import PartialState
from tiny_models import CASES, SIZES, tiny_architecture, tiny_model

import grail_hf
from grail_hf.calibration.block import Block
from grail_hf.cli import app
from grail_hf.methods import ridge
from grail_hf.methods.reduction import Reduction
from grail_hf.runtime import processes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HALVES = {"mlp_sparsity": 0.5, "attention_sparsity": 0.5}
MLP = {"mlp_sparsity": 0.5, "attention_sparsity": 0.0}

# name -> (model, padded, settings)
RUNS = {
    "default": ("llama", False, HALVES),
    "padded": ("llama", True, HALVES),
    "wanda": ("llama", True, HALVES | {"selector": "wanda", "target": "self", "refit": 0}),
    "wanda++": ("llama", True, HALVES | {"selector": "wanda++"}),
    "mixture": ("mixtral", True, HALVES),
    "fold": ("qwen3", True, HALVES | {"selector": "fold"}),
    "search": ("llama", True, {"sparsity": 0.5, "allocation": "search"}),
    "bias": ("opt", True, MLP | {"bias": "auto"}),
    "transposed": ("gpt2", True, MLP | {"selector": "wanda++"}),
}


class Unlike(Exception):
    """Cannot be made again from its message."""

    def __init__(self, one, other):
        super().__init__(f"{one} is not {other}")


def batches(padded, sizes=((8, 24), (7, 21), (3, 30), (6, 17), (2, 33))):
    """Batches of uneven sizes, the longest of them twice: the last but one, and a later one."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for rows, length in sizes:
        ids = torch.randint(SIZES["vocab_size"], (rows, length), generator=generator)
        made.append({"input_ids": ids})
        if padded:
            padding = torch.randint(length // 2, (rows, 1), generator=generator)
            made[-1]["attention_mask"] = (torch.arange(length) >= padding).long()
    return made


def compressed(name):
    """The weights and the report of a run, and how often its solves were called here."""
    case, padded, settings = RUNS[name]
    model = tiny_model(case) if case in CASES else tiny_architecture(case)
    solve, solves = ridge.ridge, 0

    def counted(*args, **kwargs):
        nonlocal solves
        solves += 1
        return solve(*args, **kwargs)

    ridge.ridge = counted
    try:
        report = grail_hf.compress(
            model, None, batches(padded), device="cpu", rehome=True, multiple_of=1, **settings
        )
    finally:
        ridge.ridge = solve
    report.seconds = 0.0
    return {"weights": model.state_dict(), "report": report.to_dict(), "solves": solves}


def exchanged():
    """What the functions of `processes` give here."""
    rank = processes.index()

    def raised(error):
        def fail():
            raise error

        try:
            processes.once(fail, "here")
        except Exception as found:
            return type(found).__name__, str(found)

    summed = [torch.full((2, 3), rank + 1.0, dtype=torch.float64), torch.tensor([rank, 5])]
    processes.sum_(summed, "here")
    labels, matrix = torch.tensor([0, 1, 0, 1]), torch.arange(6).reshape(2, 3)
    return {
        "sum": summed,
        "total": processes.total([rank + 1, 0.5], "here"),
        "gather": processes.gather([rank] * (rank + 1), "here"),
        "once": processes.once(
            lambda: (rank, Reduction.fold(labels), [torch.zeros(0), labels > 0, matrix.T, None]),
            "here",
        ),
        "errors": [raised(FloatingPointError("NaN in layer 3")), raised(Unlike(1, 2))],
        "share": list(processes.share(5)),
    }


def too_few():
    """The error where there are fewer batches than processes."""
    model = tiny_model("llama")
    try:
        grail_hf.compress(
            model, None, batches(False, ((2, 9), (2, 9))), sparsity=0.5, multiple_of=1, device="cpu"
        )
    except ValueError as error:
        return str(error)


def from_disk_to_disk(folder, output, **settings):
    return grail_hf.compress_checkpoint(
        folder.parent / "dense",
        folder / output,
        batches(True),
        multiple_of=1,
        device="cpu",
        rehome=True,
        **HALVES,
        **settings,
    )


def die_at(group):
    """The second process will be killed where this group's turn comes."""
    collect = Block.collect_parts

    def dying(self, of, *args, **kwargs):
        if of.name == group and processes.index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self, of, *args, **kwargs)

    Block.collect_parts = dying


def save(folder, name, result):
    torch.save(result, folder / f"{name}.{processes.index()}.pt")


def work_of_two(folder):
    PartialState(cpu=True)
    for name in RUNS:
        save(folder, name, compressed(name))
    save(folder, "exchanged", exchanged())
    die_at("model.layers.0.mlp")
    text = EXAMPLES / "text" / "jargon-test.txt"  # a fifth of the other one, to be tokenised sooner
    command = [
        *("compress", EXAMPLES / "tiny-llama", folder / "out", "--in-memory"),
        *("--calibration", text, "--sparsity", 0.5, "--allocation", "uniform"),
        *("--num-samples", 4, "--seq-length", 64, "--batch-size", 2, "--device", "cpu"),
        *("--selector", "magnitude", "--refit", 0, "--ridge", 0.01),
    ]
    app([str(argument) for argument in command])


def work_of_three(folder):
    torch.distributed.init_process_group("gloo")  # the program's own, which serves as well
    save(folder, "padded", compressed("padded"))
    save(folder, "too few", too_few())
    die_at("model.layers.1.mlp")
    from_disk_to_disk(folder, "out")


def start(rank, number, port, work, folder):
    """A process that does `work` and prints to `WORK.RANK.out`: its id."""
    child = os.fork()
    if child:
        return child
    with (folder / f"{work.__name__}.{rank}.out").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
    code = 0
    try:
        work(folder)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)


def main(folder):
    ends = {}
    tiny_model("llama").save_pretrained(folder / "dense")
    for work, number in ((work_of_two, 2), (work_of_three, 3)):
        where = folder / str(number)
        where.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {start(rank, number, port, work, where): rank for rank in range(number)}
        ends[number] = {}
        while ranks:
            child, status = os.wait()
            ends[number][ranks.pop(child)] = os.waitstatus_to_exitcode(status), time.monotonic()
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

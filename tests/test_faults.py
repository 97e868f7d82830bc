"""Faults of a run: an error that names the cause, or a run that continues.

What each fault leads to, and the tests that show it, here unless a file is named:

killed (SIGKILL) in any phase: `--resume` continues to identical bytes, from the hidden states that
    were written last. Without it the next run is refused, and nothing is lost.
    test_a_run_killed_anywhere_goes_on_and_ends_alike
    test_a_run_killed_between_hidden_states_goes_back_to_them
    test_measured_widths_are_not_measured_again
    test_a_run_killed_while_it_keeps_something_on_disk_leaves_no_file
    test_a_stopped_run_is_neither_lost_nor_taken_for_another
killed between the two renames at the end: the old output is restored, or the new one takes its
    place.
    test_an_old_output_stays_until_the_new_one_is_whole
interrupted (SIGINT): no partial output; a message tells how to resume.
    test_cli.py: test_an_interrupted_command_goes_on
    test_an_interrupt_after_the_last_rename_is_an_interrupt
resumed with other settings, texts, weights or versions: refused; the message names what differs.
    Where hidden states are kept, and how often they are written, may change.
    test_a_stopped_run_is_neither_lost_nor_taken_for_another
    test_a_source_that_changed_is_not_gone_on_with
    test_a_run_killed_between_hidden_states_goes_back_to_them
files of a stopped run changed: refused; the message names the file.
    test_what_a_stopped_run_wrote_is_checked
    test_a_journal_that_is_none_is_named
disk full while a layer is written: an error names the file; `--resume` continues when there is
    room.
    test_a_disk_that_fills_up_costs_nothing_that_was_done
disk full while a result in memory is saved: it is saved in the folder for temporary files, or in
    the home folder, and a message tells where.
    test_cli.py: test_what_cannot_be_saved_is_saved_elsewhere
    test_cli.py: test_where_nothing_can_be_saved_that_is_said
    test_cli.py: test_a_whole_folder_that_cannot_take_its_place_is_kept
too little disk space from the start: refused, with what is needed and what is free. Where there was
    room to start, there is room to resume.
    test_a_disk_that_is_too_small_is_seen_before_anything_is_done
    test_where_a_run_has_room_it_has_room_to_go_on
    test_cli.py: test_a_disk_that_is_too_small_is_seen_before_any_work
source file truncated, damaged, missing or of other shapes: refused before any work; the message
    names the file or tensor.
    test_checkpoint.py: test_a_source_that_is_not_whole_is_refused_by_name
    test_checkpoint.py: test_a_missing_shard_is_named
bit flipped in a file of the Hub's cache: refused, because these files are named by their sha256. In
    any other folder without checksums a flipped bit looks like a weight, unless it makes a NaN; but
    a resumed run notices that its source has changed.
    test_checkpoint.py: test_a_flipped_bit_in_the_hub_s_cache_is_seen
NaN or Inf in the weights: refused before any work; the message names the tensor.
    test_checkpoint.py: test_a_source_that_is_not_whole_is_refused_by_name
activations overflow float16: an error names the layer; those before it are kept, as above.
    test_an_overflow_names_the_layer_and_keeps_the_layers_before_it
a repaired weight overflows float16: the damping grows, at most to plain pruning, with a warning
    that names the group.
    test_errors.py: test_a_repair_that_overflows_the_models_dtype_takes_more_damping
a refit overflows or leaves a larger error: the group stays as it was repaired, with a warning that
    names it.
    test_refit.py: test_a_refit_that_fails_leaves_the_repaired_group
fewer tokens than channels (singular Gram): more damping, with a warning that names the group.
    test_fewer_tokens_than_channels_are_repaired_with_more_damping
dead channel: it is removed first and does no harm.
    test_dead_channels_go_first_and_harm_nothing
two runs into one output: the second is refused at once.
    test_two_runs_do_not_write_one_output
output that cannot be written: refused before any work.
    test_an_output_that_cannot_be_written_is_refused_before_any_layer
output that is a mount point or holds the current folder: refused before any work, since neither can
    be replaced; name a folder inside it. A link is followed.
    test_an_output_that_cannot_be_replaced_is_refused_at_once
    test_an_output_that_is_a_link_stays_one
one of several processes dies: the others end with a message that tells where. `--resume` continues
    on any number of processes.
    test_processes.py: test_when_one_is_killed_the_other_says_so_and_ends
    test_processes.py: test_what_was_done_when_one_is_killed_is_gone_on_with
"""

import contextlib
import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batches, tiny_model

import grail_hf
from grail_hf import SELECTORS, GrailConfig, disk_to_disk
from grail_hf.calibration import block, stream
from grail_hf.checkpoints import folders, journal, layers, reader
from grail_hf.checkpoints.folders import claimed
from grail_hf.checkpoints.journal import WEIGHTS, Journal
from grail_hf.checkpoints.sources import meta_model
from grail_hf.planning.costs import estimate
from grail_hf.planning.plan import plan_compression
from grail_hf.runtime.placement import Place

SETTINGS = {"sparsity": 0.3, "multiple_of": 1, "allocation": "uniform", "checkpoint_every": 1}
LAYERS, MORE_LAYERS = 3, 5
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "source"
    tiny_model("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    """A source of more layers."""
    folder = tmp_path_factory.mktemp("deeper") / "source"
    tiny_model("qwen3", num_hidden_layers=MORE_LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    compress(source, output)
    return files_of(output)


def compress(source, output, **settings):
    settings = {"progress": False} | SETTINGS | settings
    inputs = settings.pop("calibration", None) or batches()
    return grail_hf.compress_checkpoint(source, output, inputs, **settings)


class Untouchable:
    """Calibration that must not be asked for."""

    def __iter__(self):
        raise AssertionError("the calibration was touched")


def files_of(folder):
    """Every file's bytes; of the report, what does not differ between any two runs."""
    found = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("grail.json"))
    del report["seconds"], report["measured"]
    return found | {"grail.json": report}


def in_child(function):
    """Run a function in a forked process: its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def signalled_at(owner, name, call, number, after):
    """Patch a function of the child so that its n-th call, or the end of it, sends a signal."""
    original, calls = getattr(owner, name), Counter()

    def patched(*args, **kwargs):
        calls[name] += 1
        if calls[name] == call and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if calls[name] == call and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, patched)


# Where a run is killed: the n-th call of a function, at its beginning or its end.
PHASES = {
    "before the source is checked": (reader.Checkpoint, "verify", 1, False),
    "after the embeddings' file": (journal.Journal, "add_shard", 1, True),
    "after the first journal": (journal.Journal, "write", 1, True),
    "in the first embedding pass": (stream, "record_calls", 1, False),
    "in a dense pass": (stream, "_dense_pass", 2, False),
    "in the first layer's Gram": (block.Block, "collect_parts", 1, False),
    "in the second layer's Gram": (block.Block, "collect_parts", 5, True),
    "in a refit": (block.Block, "runs", 3, False),
    "before a layer's file": (journal.Journal, "add_shard", 3, False),
    "in a layer's file": (journal.Path, "replace", 7, False),
    "after a layer's file": (journal.Journal, "add_shard", 3, True),
    "before a layer's file is flushed": (journal, "flushed", 7, False),
    "in the hidden states": (journal, "save_tensors", 4, True),
    "after the hidden states": (journal.Journal, "add_hidden_states", 2, True),
    "after a layer's journal": (journal.Journal, "write", 3, True),
    "after the sweep": (journal.Journal, "sweep", 2, True),
    "after the last layer": (journal.Journal, "write", LAYERS + 1, True),
    "in the index": (journal.Journal, "write_index", 1, True),
    "after the report": (grail_hf.CompressionReport, "save", 1, True),
    "before the last rename": (disk_to_disk, "put_in_place", 1, False),
    "after the last rename": (Path, "rename", 1, True),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_anywhere_goes_on_and_ends_alike(phase, source, whole, tmp_path):
    owner, name, call, after = PHASES[phase]
    output = tmp_path / "out"

    def killed():
        signalled_at(owner, name, call, signal.SIGKILL, after)
        compress(source, output)

    assert in_child(killed) == KILLED
    if output.exists():
        (output / ".grail").rename(tmp_path / "aside")  # the new one is whole but for this
        assert files_of(output) == whole
        (tmp_path / "aside").rename(output / ".grail")
    compress(source, output, resume=True)
    assert files_of(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("disk_to_disk", [True, False])
def test_an_interrupt_after_the_last_rename_is_an_interrupt(
    disk_to_disk, source, tmp_path, monkeypatch
):
    """The new output is whole, and what is left of the old one goes next time."""
    output = tmp_path / "out"

    def write(overwrite):
        if disk_to_disk:
            compress(source, output, overwrite=overwrite)
        else:
            with folders.replaced_when_whole(output) as folder:
                (folder / "model").write_text(str(overwrite))

    write(overwrite=False)
    rmtree = shutil.rmtree

    def interrupted(path, *args, **kwargs):
        if Path(path).name == ".out.old" and output.exists() and not beside("partial").exists():
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    def beside(what):
        return tmp_path / f".out.{what}"

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(overwrite=True)
    assert beside("old").exists() and not beside("partial").exists()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    done = files_of(output) if disk_to_disk else {}
    write(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not disk_to_disk or files_of(output) == done


def test_a_run_killed_while_it_keeps_something_on_disk_leaves_no_file(
    source, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(Place, "least_mapped", 1)
    settings = {"hidden_states": "disk"}

    def killed():
        signalled_at(torch, "from_file", 60, signal.SIGKILL, False)
        compress(source, tmp_path / "out", **settings)

    assert in_child(killed) == KILLED
    own = tmp_path / ".out.partial" / ".grail"
    assert Journal.read(own.parent).layers > 0
    files = {path.name for path in own.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".safetensors")} == {"journal.json", "lock"}
    compress(source, tmp_path / "out", resume=True, **settings)
    assert weights_of(files_of(tmp_path / "out")) == weights_of(whole)


def weights_of(files):
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_a_run_killed_while_it_measures_begins_again(source, tmp_path):
    settings = {"allocation": "search"}
    compress(source, tmp_path / "whole", **settings)

    def killed():
        signalled_at(block.Block, "collect_all", 2, signal.SIGKILL, False)
        compress(source, tmp_path / "out", **settings)

    assert in_child(killed) == KILLED
    compress(source, tmp_path / "out", resume=True, **settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("layer", [0, 2])
def test_measured_widths_are_not_measured_again(layer, source, tmp_path, capsys):
    """Not even by a run that was killed before its first hidden states were written."""
    settings = {"allocation": "error"}
    compress(source, tmp_path / "whole", progress=True, **settings)
    assert "Profiling" in capsys.readouterr().err
    stop(source, tmp_path / "out", layer, **settings)
    compress(source, tmp_path / "out", resume=True, progress=True, **settings)
    shown = capsys.readouterr().err
    assert "Calibrating" in shown and "Profiling" not in shown
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def stop(source, output, layer=2, **settings):
    """Leave a run that was killed after a layer."""

    def killed():
        signalled_at(journal.Journal, "write", layer + 1, signal.SIGKILL, True)
        compress(source, output, **settings)

    assert in_child(killed) == KILLED
    return output.with_name(f".{output.name}.partial")


def test_layers_that_are_done_are_not_done_again(source, whole, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", layer=2)
    seen = layers_read(monkeypatch)
    compress(source, tmp_path / "out", resume=True)
    assert seen == [2]
    assert files_of(tmp_path / "out") == whole


def layers_read(monkeypatch):
    """A list that fills with the indices of the layers that are read from the source."""
    seen, on_device = [], layers.CheckpointPlacement.on_device
    monkeypatch.setattr(
        layers.CheckpointPlacement,
        "on_device",
        lambda self, index: seen.append(index) or on_device(self, index),
    )
    return seen


@pytest.mark.parametrize("target", ["residual", "self"])
@pytest.mark.parametrize("then", [2, 3, "auto"])
def test_a_run_killed_between_hidden_states_goes_back_to_them(
    target, then, deeper, tmp_path, monkeypatch
):
    """With two generations of them, and one. It may write them at another pace from there on."""
    output, settings = tmp_path / "out", {"target": target}
    compress(deeper, tmp_path / "whole", checkpoint_every=then, **settings)

    def killed():
        signalled_at(journal.Journal, "add_shard", 5, signal.SIGKILL, True)
        compress(deeper, output, checkpoint_every=2, **settings)

    assert in_child(killed) == KILLED
    work = tmp_path / ".out.partial"
    assert Journal.read(work).layers == 2
    (states,) = {path.parent for path in work.rglob("0*.safetensors")}
    tensors = load_file(states / "00000.safetensors")
    assert tensors.keys() == ({"hidden", "dense"} if target == "residual" else {"hidden"})
    assert len(list(work.glob("model-*"))) == 5  # the embeddings' and those of four layers
    seen = layers_read(monkeypatch)
    compress(deeper, output, resume=True, checkpoint_every=then, **settings)
    assert seen == [2, 3, 4]
    assert files_of(output) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(("every", "after"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (4, [4]), (5, [])])
def test_nothing_is_flushed_but_with_hidden_states(every, after, deeper, tmp_path, monkeypatch):
    """Before the first layer and after the last, the shards and the journal are."""
    events, fsync, adding = [], os.fsync, Journal.add_shard

    def flushing(number):
        events.append("flush")
        fsync(number)

    def add(self, name, tensors):
        events.append(name)
        adding(self, name, tensors)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Journal, "add_shard", add)
    compress(deeper, tmp_path / "out", checkpoint_every=every)
    runs = [list(run) for same, run in itertools.groupby(events, "flush".__eq__) if not same]
    counts = [len(run) for run in runs]
    assert counts == [1, *(b - a for a, b in itertools.pairwise([0, *after, MORE_LAYERS]))]


def test_a_run_that_ended_is_not_run_again(source, tmp_path):
    report = compress(source, tmp_path / "out")
    files = written_in(tmp_path / "out")
    assert compress(source, tmp_path / "out", resume=True) == report
    assert written_in(tmp_path / "out") == files
    with pytest.raises(FileExistsError, match="overwrite"):
        compress(source, tmp_path / "out", resume=True, seed=1)


def written_in(folder):
    """When each file was written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_stopped_run_is_neither_lost_nor_taken_for_another(source, whole, tmp_path):
    work = stop(source, tmp_path / "out")
    before = files_below(work)
    with pytest.raises(FileExistsError, match=r"stopped after 2 layers: resume it"):
        compress(source, tmp_path / "out")
    for changes, message in (
        ({"sparsity": 0.4}, r"had sparsity=0\.3, and now it is 0\.4"),
        ({"seed": 1}, "had seed=0, and now it is 1"),
        ({"calibration": batches(padded=False)}, "had calibration="),
    ):
        with pytest.raises(ValueError, match=message):
            compress(source, tmp_path / "out", resume=True, **changes)
    with (
        pytest.raises(FileExistsError, match="resume"),
        folders.replaced_when_whole(tmp_path / "out"),
    ):
        pass
    assert files_below(work) == before
    compress(source, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == whole


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_source_that_changed_is_not_gone_on_with(source, tmp_path):
    other = shutil.copytree(source, tmp_path / "source")
    stop(other, tmp_path / "out")
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, other / WEIGHTS)
    with pytest.raises(ValueError, match=f"had sha256 of {WEIGHTS}="):
        compress(other, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("pattern", "spoil"),
    [
        ("model-00002*", "flip"),
        ("model-00002*", "delete"),
        (".grail/hidden*/*", "flip"),
        (".grail/hidden*/*", "cut"),
    ],
)
def test_what_a_stopped_run_wrote_is_checked(pattern, spoil, source, tmp_path):
    work = stop(source, tmp_path / "out")
    path = next(iter(work.glob(pattern)))
    data = path.read_bytes()
    if spoil == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif spoil == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(OSError, match=f"{path.name} is missing or not as the run wrote it"):
        compress(source, tmp_path / "out", resume=True)


def test_an_interrupt_leaves_no_output_and_says_how_to_go_on(source, whole, tmp_path, capfd):
    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signalled_at(block.Block, "collect_parts", 7, signal.SIGINT, False)
        compress(source, tmp_path / "out")

    assert in_child(interrupted) == 130
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == whole


def test_an_interrupt_tells_how_to_go_on(source, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", selector=interrupted_at(3))
    assert "1 of the layers done" in caplog.text and "--resume" in caplog.text


def test_an_interrupt_before_anything_is_done_leaves_nothing(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", selector=interrupted_at(1))
    assert list(tmp_path.iterdir()) == []


def interrupted_at(call):
    """A selector that is interrupted the n-th time; each layer calls it twice."""
    calls = Counter()

    def scored(group, stats):
        calls["all"] += 1
        if calls["all"] == call:
            raise KeyboardInterrupt
        return SELECTORS["wanda"](group, stats)

    return scored


def test_a_disk_that_fills_up_costs_nothing_that_was_done(source, whole, tmp_path, capfd):
    """No file may grow beyond a limit that the second layer's is the first to reach."""
    sizes = {name: len(data) for name, data in whole.items() if name.startswith("model-")}
    writing = journal.save_tensors
    calls = Counter()

    def fills_up(tensors, path, metadata=None):
        calls[path.name] += 1
        if path.name == "model-00003-of-00004.safetensors":
            limit = sizes[path.name] // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return writing(tensors, path, metadata)

    def full():
        journal.save_tensors = fills_up
        try:
            compress(source, tmp_path / "out")
        except grail_hf.StoppedError as error:
            assert isinstance(error.__cause__, OSError)
            print(error, flush=True)

    assert in_child(full) == 0
    printed = capfd.readouterr().out
    assert "model-00003-of-00004.safetensors" in printed and "1 of the layers done" in printed
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").glob(".*.tmp"))
    compress(source, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == whole


def test_hidden_states_that_cannot_be_written_undo_no_more_than_their_layer(
    source, whole, tmp_path, monkeypatch
):
    adding = Journal.add_hidden_states

    def full_at(layer):
        def add(self, number, found):
            if number == layer:
                raise OSError(errno.ENOSPC, "No space left on device", "hidden states")
            adding(self, number, found)

        monkeypatch.setattr(Journal, "add_hidden_states", add)

    full_at(1)
    with pytest.raises(OSError, match="No space left"):
        compress(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    full_at(2)
    with pytest.raises(grail_hf.StoppedError, match="1 of the layers done"):
        compress(source, tmp_path / "out")
    full_at(None)
    compress(source, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_a_run_has_room_it_has_room_to_go_on(place, every, deeper, tmp_path, monkeypatch):
    """On a disk of the size that is estimated; with a byte less, neither begins.

    It is interrupted in the fourth layer. What it wrote of the third without hidden states makes
    room.
    """
    source = deeper
    settings = {"hidden_states": place, "selector": interrupted_at(7), "checkpoint_every": every}
    model, config = meta_model(source), GrailConfig(**SETTINGS | settings)
    plan = plan_compression(model, config)
    costs = estimate(model, plan, config, disk_to_disk=True, batches=batches())
    needed = costs.disk_bytes + costs.hidden_bytes * (place == "disk")
    usage = shutil.disk_usage(tmp_path)

    def disk_of(size):
        def disk_usage(_):
            written = (tmp_path / ".out.partial").rglob("*.safetensors")
            return usage._replace(free=size - sum(path.stat().st_size for path in written))

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    for resume in (False, True):
        disk_of(needed - 1)
        with pytest.raises(OSError, match="GiB are to be written"):
            compress(source, tmp_path / "out", resume=resume, **settings)
        disk_of(needed)
        with contextlib.nullcontext() if resume else pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", resume=resume, **settings)


def test_the_same_source_by_another_name_is_gone_on_with(source, whole, tmp_path, monkeypatch):
    stop(source, tmp_path / "out")
    monkeypatch.chdir(source.parent)
    compress("source", tmp_path / "out", resume=True)
    assert weights_of(files_of(tmp_path / "out")) == weights_of(whole)


@pytest.mark.parametrize("text", ['{"layers": 1', '{"identity": {}, "colour": 3}', "[]"])
def test_a_journal_that_is_none_is_named(text, source, tmp_path):
    work = stop(source, tmp_path / "out")
    (work / ".grail" / "journal.json").write_text(text)
    with pytest.raises(OSError, match=r"journal\.json is damaged, or of another version"):
        compress(source, tmp_path / "out", resume=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_done(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GiB are to be written") as error:
        compress(source, tmp_path / "out")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_one_output(source, tmp_path):
    with claimed(tmp_path / "out"):
        assert in_child(lambda: refused(BlockingIOError, source, tmp_path / "out")) == 0
    compress(source, tmp_path / "out")


def refused(error, *arguments):
    with pytest.raises(error, match="another process is writing"):
        compress(*arguments)


def test_an_output_that_cannot_be_written_is_refused_before_any_layer(source):
    with pytest.raises(OSError, match="/proc"):
        compress(source, Path("/proc/out"), selector=lambda group, stats: 1 / 0)


@pytest.mark.parametrize("what", ["a mount point", "the current folder", "above it"])
def test_an_output_that_cannot_be_replaced_is_refused_at_once(source, tmp_path, monkeypatch, what):
    """Before the calibration is asked for, and with nothing left behind."""
    (output := tmp_path / "out").mkdir()
    if what == "a mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    else:
        (inside := output / "deeper").mkdir()
        monkeypatch.chdir(output if what == "the current folder" else inside)
    before = sorted(tmp_path.rglob("*"))
    for named in (output, Path(os.path.relpath(output))):
        message = rf"{output} is .*name a folder inside it, for example {output}/model"
        with pytest.raises(OSError, match=message):
            compress(source, named, calibration=Untouchable())
        with pytest.raises(OSError, match=message), folders.replaced_when_whole(named):
            raise AssertionError("the folder was given out")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_root_cannot_be_replaced():
    """A mount point that every machine has."""
    with pytest.raises(OSError, match="is a mount point"):
        folders.check_replaceable(Path("/"))


@pytest.mark.parametrize("there", [False, True])
def test_an_output_that_is_a_link_stays_one(there, source, whole, tmp_path):
    """The folder that it leads to is replaced, and what grows lies beside that."""
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real)
    if there:
        compress(source, real, seed=1)
    stop(source, link, overwrite=True)
    assert (real.parent / ".real.partial").is_dir()
    compress(source, link, resume=True, overwrite=True)
    assert link.is_symlink() and link.resolve() == real
    assert files_of(real) == whole
    assert sorted(tmp_path.iterdir()) == [real.parent, link]
    assert list(real.parent.iterdir()) == [real]


def test_a_link_in_the_old_folder_s_place_is_cleared_away(tmp_path):
    (real := tmp_path / "real").mkdir()
    (real / "mine").touch()
    (tmp_path / ".out.old").symlink_to(real)
    (tmp_path / "out").mkdir()
    with folders.replaced_when_whole(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert (tmp_path / "out" / "new").exists() and (real / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]


def test_an_old_output_stays_until_the_new_one_is_whole(source, tmp_path):
    """Killed between the two renames, too."""
    compress(source, tmp_path / "out", seed=1)
    old = files_of(tmp_path / "out")

    def killed():
        signalled_at(Path, "rename", 1, signal.SIGKILL, True)
        compress(source, tmp_path / "out", overwrite=True)

    assert in_child(killed) == KILLED
    with claimed(tmp_path / "out"):
        assert files_of(tmp_path / "out") == old
    compress(source, tmp_path / "out", overwrite=True, resume=True)
    assert files_of(tmp_path / "out") != old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_overflow_names_the_layer_and_keeps_the_layers_before_it(tmp_path):
    """Of float16: the second layer's up- and gate-projections are too large for it."""
    model = tiny_model("llama", dtype=torch.float16)
    for name in ("gate_proj", "up_proj"):
        model.model.layers[1].mlp.get_submodule(name).weight.data *= 1e4
    model.save_pretrained(tmp_path / "source")
    settings = {"mlp_sparsity": 0.3, "attention_sparsity": 0, "sparsity": None, "refit": 0}
    with pytest.raises(
        grail_hf.StoppedError, match=r"layers\.1\.mlp.*1 of the layers done"
    ) as error:
        compress(tmp_path / "source", tmp_path / "out", **settings)
    assert isinstance(error.value.__cause__, FloatingPointError)
    assert not (tmp_path / "out").exists()
    assert Journal.read(tmp_path / ".out.partial").layers == 1


def test_fewer_tokens_than_channels_are_repaired_with_more_damping(source, tmp_path):
    inputs = [{"input_ids": torch.arange(12).reshape(2, 6)}]
    report = compress(source, tmp_path / "out", calibration=inputs, ridge=0.0, refit=0)
    assert all(group.damping > 0 for group in report.groups if group.kind == "mlp")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_dead_channels_go_first_and_harm_nothing(tmp_path):
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[torch.arange(10)] = 0
    model.save_pretrained(tmp_path / "source")
    settings = {"sparsity": None, "mlp_sparsity": 10 / 83, "attention_sparsity": 0}
    report = compress(tmp_path / "source", tmp_path / "out", **settings)
    for group in report.groups:
        if group.kind == "mlp":
            assert group.width == 73 and group.error_pruned < 1e-6


def test_the_tests_that_the_docstring_names_are_there():
    named = re.findall(r"(?:(test_\w+\.py): )?(test_\w+)(?!\w*\.py)", __doc__)
    assert len(named) > 20
    for file, test in named:
        source = Path(__file__).with_name(file or Path(__file__).name).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source

"""Folders that come into their place whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from grail_hf.checkpoints.journal import OWN, Journal

if TYPE_CHECKING:
    pass


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """The folder beside `output` in which its successor grows, for this process alone.

    What an earlier process left there stays, so that a run can go on; what it was about to replace
    when it was killed is back in its place, or gone where that was taken. Where `output` is a link,
    all this is about the folder that it leads to.

    Raises:
        OSError: another process is at work for the same output, nothing can be written there, or
            the folder cannot be replaced (see `check_replaceable`).
    """
    from filelock import FileLock, Timeout

    check_replaceable(output)
    output = output.resolve()
    work, old = _beside(output, "partial"), _beside(output, "old")
    (work / OWN).mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / OWN / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"another process is writing {output}: wait for it") from error
    try:
        if old.exists() and not output.exists():
            old.rename(output)
        for left in (old, output / OWN):
            _clear(left)
        yield work
    finally:
        if work.exists() and {path.name for path in work.rglob("*")} <= {OWN, "lock"}:
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def put_in_place(work: Path, output: Path) -> None:
    """Have a whole folder take the place of `output`, which is there or not."""
    output = output.resolve()
    old = _beside(output, "old")
    _clear(old)
    if output.exists():
        output.rename(old)
    work.rename(output)
    shutil.rmtree(output / OWN)
    _clear(old)


def check_replaceable(output: Path) -> None:
    """Raise OSError where no other folder can take the place of `output`, which is there or not.

    A mount point cannot be renamed; a shell in the current folder would be left in a deleted one.
    """
    output = output.resolve()
    if os.path.ismount(output):
        what = "is a mount point"
    elif Path.cwd().is_relative_to(output):
        what = "is the current folder, or holds it"
    else:
        return
    raise OSError(
        f"{output} {what}, so that the result cannot take its place as a whole: name a folder "
        f"inside it, for example {output / 'model'}"
    )


def empty(work: Path) -> None:
    """Delete all in a claimed folder but what claims it."""
    for path in work.iterdir():
        if path.name == OWN:
            for own in path.iterdir():
                if own.name != "lock":
                    _delete(own)
        else:
            _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _clear(path: Path) -> None:
    """Delete a folder as far as that can be done, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


@contextmanager
def replaced_when_whole(output: Path) -> Iterator[Path]:
    """A folder to write in, that takes `output`'s place when everything is written.

    Raises:
        FileExistsError: a run from disk to disk, which can go on, was stopped there.
        OSError: the folder is whole and cannot take that place; names the folder, which is kept.
    """
    with claimed(output) as work:
        _refuse_stopped(work)
        empty(work)
        whole = False
        try:
            yield work
            whole = True
            put_in_place(work, output)
        except BaseException as error:
            if whole and isinstance(error, OSError) and work.exists():
                raise OSError(
                    f"{output} cannot be replaced ({error}): what was to be there is in {work}"
                ) from error
            if work.exists():  # else it is in the output's place
                empty(work)
            raise


def save_or_rescue(save: Callable[[Path], None], folder: Path, output: Path) -> None:
    """Fill a folder by `save`; where that cannot be written, another one, and say so.

    What took long to compute is not lost to a disk that has filled up in the meantime.

    Args:
        save: writes everything into the folder that it is given.
        folder: a claimed folder, emptied where it cannot be filled.
        output: what the folder stands for, for messages.

    Raises:
        OSError: the folder cannot be filled. Names the folder that was filled instead, in the one
            for temporary files or in the user's home, or says that there was no room there either.
    """
    from safetensors import SafetensorError

    unwritten = (OSError, SafetensorError)
    try:
        save(folder)
        return
    except unwritten as error:
        failure = error
    empty(folder)
    tried = []
    for parent in (Path(tempfile.gettempdir()), Path.home()):
        try:
            rescue = Path(tempfile.mkdtemp(prefix=f"{output.name}-", dir=parent))
        except OSError as error:
            tried.append(f"{parent} ({error})")
            continue
        try:
            save(rescue)
        except unwritten as error:
            tried.append(f"{parent} ({error})")
            shutil.rmtree(rescue, ignore_errors=True)
            continue
        raise OSError(
            f"{output} cannot be written ({failure}): the compressed model is in {rescue} instead, "
            "whole; move it where you want it"
        ) from failure
    raise OSError(
        f"{output} cannot be written ({failure}), and neither can {' nor '.join(tried)}: the "
        "compressed model is lost; make room and start again"
    ) from failure


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of a folder has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 2**30:.2f} GiB are to be written and {free / 2**30:.2f} GiB are free: make "
            "room, or choose an output on another disk",
            str(folder),
        )


def check_not_stopped(output: Path) -> None:
    """Raise FileExistsError where a run from disk to disk, which can go on, was stopped."""
    with claimed(output) as work:
        _refuse_stopped(work)


def _refuse_stopped(work: Path) -> None:
    if Journal.exists(work):
        raise stopped_there(work)


def stopped_there(work: Path) -> FileExistsError:
    """The error where a run that can go on was not asked to."""
    layers = Journal.read(work).layers
    return FileExistsError(
        f"{work} holds a run that was stopped after {layers} layers: resume=True (--resume) goes "
        "on with it; delete that folder to start again"
    )

"""Output folders that are replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grail_hf.checkpoints.journal import OWN, Journal


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """The work folder beside `output`, in which its successor is written, locked for this process.

    Files of an earlier process are kept, so that its run can be resumed. An old output that it was
    about to replace when it was killed is restored, or deleted if it has been replaced. Where
    `output` is a link, all this applies to the folder that it leads to.

    Raises:
        OSError: another process is writing the same output, nothing can be written there, or the
            folder cannot be replaced (see `check_replaceable`).
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
    """Replace `output`, which need not exist, by a complete work folder."""
    output = output.resolve()
    old = _beside(output, "old")
    _clear(old)
    if output.exists():
        output.rename(old)
    work.rename(output)
    shutil.rmtree(output / OWN)
    _clear(old)


def check_replaceable(output: Path) -> None:
    """Raise OSError where `output`, which need not exist, cannot be replaced by another folder.

    A mount point cannot be renamed, and a shell in the current folder would be left in a deleted
    one.
    """
    output = output.resolve()
    if os.path.ismount(output):
        what = "is a mount point"
    elif Path.cwd().is_relative_to(output):
        what = "is the current folder, or contains it"
    else:
        return
    raise OSError(
        f"{output} {what}, so it cannot be replaced as a whole: name a folder inside it, for "
        f"example {output / 'model'}"
    )


def empty(work: Path) -> None:
    """Delete everything in a claimed folder except its lock."""
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
    """Delete a folder as far as possible, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


@contextmanager
def replaced_when_whole(output: Path) -> Iterator[Path]:
    """A folder to write in, which replaces `output` once everything is written.

    Raises:
        FileExistsError: a run from disk to disk was stopped there, and can be resumed.
        OSError: the folder is complete and cannot replace `output`; names the folder, which is
            kept.
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
                    f"{output} cannot be replaced ({error}): the complete result is in {work}"
                ) from error
            if work.exists():  # else it has replaced the output
                empty(work)
            raise


def save_or_rescue(save: Callable[[Path], None], folder: Path, output: Path) -> None:
    """Save into a folder or, if that cannot be written, into another one, and raise.

    A result that took long to compute is thus not lost to a disk that has filled up meanwhile.

    Args:
        save: writes everything into the folder that it is given.
        folder: a claimed folder, emptied if it cannot be written.
        output: the output that the folder is for, for messages.

    Raises:
        OSError: the folder cannot be written. Names the folder that was written instead, in the one
            for temporary files or in the user's home directory, if either had room.
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
            "complete; move it where you want it"
        ) from failure
    raise OSError(
        f"{output} cannot be written ({failure}), and neither can {' nor '.join(tried)}: the "
        "compressed model is lost; free some space and start again"
    ) from failure


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of a folder has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 2**30:.2f} GiB are to be written and {free / 2**30:.2f} GiB are free: free "
            "some space, or choose an output on another disk",
            str(folder),
        )


def check_not_stopped(output: Path) -> None:
    """Raise FileExistsError where a run from disk to disk was stopped, and can be resumed."""
    with claimed(output) as work:
        _refuse_stopped(work)


def _refuse_stopped(work: Path) -> None:
    if Journal.exists(work):
        raise stopped_there(work)


def stopped_there(work: Path) -> FileExistsError:
    """The error for a stopped run that is in the way and could be resumed."""
    layers = Journal.read(work).layers
    return FileExistsError(
        f"{work} holds a run that was stopped after {layers} layers: resume it with resume=True "
        "(--resume), or delete that folder to start again"
    )

"""Measure the peak memory and the time of each phase of a compression.

Host memory is the process's anonymous memory: the system can drop what is mapped from files (a
checkpoint's tensors, hidden states on disk), so that does not count. A thread samples it, since no
operating system keeps its peak by phase. torch keeps an accelerator's.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SECONDS = 0.05  # between samples: more samples would slow the threads that compute
_WORTH_GIVING_BACK = 8 * 2**20  # growth of memory since it was last given back
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_RETURNED = 4 * 2**20


class Meter:
    """Peaks by phase, in bytes above what the process held when the meter was switched on.

    There are no peaks of host memory on platforms other than Linux, which do not report anonymous
    memory, and none of an accelerator's memory where layers do not run on CUDA.

    Attributes:
        device: that layers run on.
        seconds: phase -> wall time.
        host: phase -> peak of anonymous host memory.
        accelerator: phase -> peak of CUDA memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.host: dict[str, int] = {}
        self.accelerator: dict[str, int] = {}
        self._phase: str | None = None
        self._whole = False
        self._on = False
        self._bases = (0, 0)
        self._since = 0.0
        self._least = 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """The meter runs inside the context."""
        stop = threading.Event()
        thread = None
        give_back()
        self._least = anonymous_bytes() or 0
        self._bases = (self._least, self._allocated())
        self._on = True
        if anonymous_bytes() is not None:
            thread = threading.Thread(target=self._watch, args=(stop,), daemon=True)
            thread.start()
        try:
            yield
        finally:
            self._on = False
            stop.set()
            if thread is not None:
                thread.join()

    @contextmanager
    def phase(self, name: str, whole: bool = False) -> Iterator[None]:
        """Attribute the work inside the context to a phase; nested phases count for themselves.

        With `whole`, nested phases count as part of this one. Free memory is given back to the
        system on entry and exit, where it may be much, so that it does not count for the next
        phase.
        """
        if self._whole:
            yield
            return
        outer = self._phase
        self._change(name, whole)
        try:
            yield
        finally:
            self._change(outer, False)

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """phase -> {"seconds": …, "host_bytes": peak, "accelerator_bytes": peak}, if measured."""
        kinds: dict[str, dict[str, Any]] = {
            "seconds": self.seconds,
            "host_bytes": self.host,
            "accelerator_bytes": self.accelerator,
        }
        return {
            name: {kind: known[name] for kind, known in kinds.items() if name in known}
            for name in self.seconds
        }

    def _change(self, name: str | None, whole: bool) -> None:
        if not self._on:
            return
        self._sample()
        if self.device.type == "cuda":
            if self._phase is not None:
                peak = torch.cuda.max_memory_allocated(self.device) - self._bases[1]
                known = self.accelerator.get(self._phase, 0)
                self.accelerator[self._phase] = max(known, peak)
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        held = anonymous_bytes() or 0
        if held - self._least > _WORTH_GIVING_BACK:
            give_back()
            self._least = anonymous_bytes() or 0
        self._phase, self._whole, self._since = name, whole, now

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_SECONDS):
            self._sample()

    def _sample(self) -> None:
        name, now = self._phase, anonymous_bytes()
        if name is not None and now is not None:
            self.host[name] = max(self.host.get(name, 0), now - self._bases[0])

    def _allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_allocated(self.device))


def anonymous_bytes() -> int | None:
    """Memory of this process that is not mapped from files; None where that is not known."""
    if not sys.platform.startswith("linux"):
        return None
    # The file that psutil reads, at a tenth of its cost: total, resident and shared pages.
    with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123
        _, resident, shared, *_ = map(int, file.read(200).split())
    return (resident - shared) * mmap.PAGESIZE


def give_back() -> None:
    """Return the C library's free memory to the system (glibc only).

    glibc keeps freed blocks of up to 32 MB for later requests, including whole matrices of a small
    group, even where the next request is too large for them.
    """
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def keep_no_freed_blocks() -> None:
    """Have the C library (glibc) return every block of 4 MiB or more as soon as it is freed.

    By default glibc learns to keep blocks of up to 32 MB, and how many varies between runs. The
    setting is permanent and affects the whole process: it is for programs, not for libraries.
    """
    set_option = _of_c_library("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _RETURNED)


def _of_c_library(name: str) -> Any:
    """A function of glibc's; None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

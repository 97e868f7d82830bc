"""Progress bars: tqdm's own on a terminal and in a notebook, a few lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

# In a notebook tqdm.auto is another class, which draws a widget.
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class Bar(tqdm):  # type: ignore[misc]
    """A bar on standard error or, if that is not a terminal, a line for each part of the work.

    There is no bar where transformers' bars are disabled (`disable_progress_bar`).

    Args:
        iterable: as in tqdm.
        total: number of steps.
        shown: False for no bar.
        parts: lines in a log, in addition to the one at the start.
        settings: of tqdm.
    """

    def __init__(
        self, iterable: Any = None, *, total: float, shown: bool, parts: int = 10, **settings: Any
    ) -> None:
        from transformers.utils.logging import is_progress_bar_enabled

        self._in_log = not (_IN_NOTEBOOK or sys.stderr.isatty())
        self._written: float | None = None
        if self._in_log:
            # By steps alone: otherwise tqdm also writes whenever some seconds have passed.
            settings |= {"miniters": total / max(1, parts), "mininterval": 0, "maxinterval": 1e9}
            settings["leave"] = False  # otherwise a line would follow the last one
        shown = shown and is_progress_bar_enabled()
        super().__init__(iterable, total=total, disable=not shown, **settings)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh and not self._in_log)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._in_log:
            super().display(msg, pos)
        elif self.n != self._written:
            self._written = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

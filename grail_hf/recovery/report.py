"""`RecoveryReport`: what a recovery did, as a table, JSON and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail_hf.recovery.config import FULL, RecoveryConfig

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class RecoveryReport:
    """What `recover` did.

    Divergences are means of KL(dense || compressed) in nats per token, by the name of a set of
    windows: "calibration", of which they are held out, and "watched", where a second text is given.

    Attributes:
        teacher: the dense model's name.
        config: the settings, with the rank that was used.
        calibration: source, samples, tokens and fingerprint of the windows, held out ones included.
        tokens: that were learned from, each in every epoch.
        parameters: number that was trained.
        kept: whether the outcome was better on every set, and is what the model now has. Otherwise
            the model is as it was.
        before, after: divergences of the model that came, and of the outcome.
        learning_rate: that was used.
        trials: learning rate -> worst ratio of the divergences after a short run to those before.
        steps: optimiser steps.
        divergences: by step: "step", and the divergence of each set.
        seconds: wall time of the dense model's predictions and of the training.
    """

    teacher: str
    config: RecoveryConfig
    calibration: dict[str, Any]
    tokens: int
    parameters: int
    kept: bool
    before: dict[str, float]
    after: dict[str, float]
    learning_rate: float
    trials: dict[float, float] = field(default_factory=dict)
    steps: int = 0
    divergences: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        trials = {str(rate): worst for rate, worst in self.trials.items()}
        return asdict(self) | {"config": self.config.to_dict(), "trials": trials}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RecoveryReport:
        """The inverse of `to_dict`."""
        trials = {float(rate): worst for rate, worst in data["trials"].items()}
        config = RecoveryConfig.from_dict(data["config"])
        return cls(**data | {"config": config, "trials": trials})

    def summary(self) -> str:
        """What was trained, on how much, for how long, in a sentence or two."""
        what = (
            "the projections themselves"
            if self.config.rank == FULL
            else f"adapters of rank {self.config.rank}, merged into the projections"
        )
        changes = ", ".join(
            f"from {self.before[name]:.4f} to {self.after[name]:.4f} on {_KINDS[name]}"
            for name in self.before
        )
        outcome = f"the divergence from it went {changes} (nats per token)"
        if not self.kept:
            outcome = f"the outcome was not better ({changes}) and was dropped"
        return (
            f"Recovery without labels: {what} learned the predictions of {self.teacher} in "
            f"{self.steps} steps on {self.tokens:,} tokens ({self.calibration['source']}) in "
            f"{sum(self.seconds.values()):.0f} s; {outcome}."
        )

    def table(self) -> Table:
        """Divergences before and after, for a terminal."""
        from rich.table import Table

        table = Table("divergence from the dense model", title=f"recovery from {self.teacher}")
        for title in ("before", "after", "ratio"):
            table.add_column(title, justify="right")
        for name, before in self.before.items():
            after = self.after[name]
            ratio = f"{after / before:.3f}" if before else ""
            table.add_row(_KINDS[name], f"{before:.4f}", f"{after:.4f}", ratio)
        table.caption = "kept" if self.kept else "not better, and dropped: the model is as it was"
        return table

    def plot(self, path: str | Path) -> None:
        """Draw the divergences by step.

        Raises ImportError where matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('a picture needs matplotlib: pip install "grail-hf[plot]"') from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for name in self.before:
            points = [(entry["step"], entry[name]) for entry in self.divergences]
            axes.plot(*zip(*points, strict=True), marker="o", label=_KINDS[name])
        highest = max(max(entry[name] for name in self.before) for entry in self.divergences)
        axes.set_ylim(0, 1.05 * highest)
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("KL(dense || compressed), nats per token")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        return self.summary()


_KINDS = {"calibration": "held-out windows of the calibration", "watched": "the watched text"}

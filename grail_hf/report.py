"""`CompressionReport`: what was done and what it cost, as a table, JSON and a model card."""

from __future__ import annotations

import json
import logging
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail_hf import card
from grail_hf.calibration.refit import Refit
from grail_hf.calibration.statistics import Statistics
from grail_hf.checkpoints.folders import check_replaceable
from grail_hf.config import ATTENTION, GrailConfig
from grail_hf.methods.ridge import Repair
from grail_hf.models.compatibility import HEAD_DIM, OUTPUT_BIAS
from grail_hf.models.decoder import auto_class
from grail_hf.models.experts import SCARCE_DAMPING
from grail_hf.models.groups import Group
from grail_hf.planning.plan import Plan
from grail_hf.recovery.report import RecoveryReport
from grail_hf.runtime import processes

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel
logger = logging.getLogger(__name__)

REPORT_FILE = "grail.json"


@dataclass(frozen=True)
class GroupReport:
    """One group, or expert: its width and its relative squared reconstruction error.

    A group that keeps all its units is included if it was repaired for what earlier groups lost.
    All errors are on calibration tokens.

    Attributes:
        error_pruned: after plain pruning or folding, without repair.
        error: of the weights that the compression ends with.
        damping: of the solve, relative to the Gram's mean diagonal. None without compensation;
            infinite, "inf" in JSON, where `ridge="auto"` found plain pruning to be best, or no
            token was routed to an expert.
        error_measured, error_linear: for units that are folded and repaired, the errors of the two
            values of `GrailConfig.fold`, before any refit.
        tokens: those that were routed to an expert.
        refit: the outcome of the refit; None where the settings ask for none. "done"; "undone",
            because it overflowed or left a larger error; "not linear", because the output is
            linear in no producer; "plain pruning", because no repair was better; "own output",
            because an expert has no other target.
    """

    name: str
    layer: int
    kind: str
    units: int
    width: int
    error_pruned: float
    error: float
    damping: float | None
    error_measured: float | None = None
    error_linear: float | None = None
    tokens: int | None = None
    refit: str | None = None

    @property
    def scarce(self) -> bool:
        """Whether it is an expert that saw fewer tokens than it keeps channels."""
        return self.tokens is not None and self.tokens < self.width


@dataclass
class CompressionReport:
    """What `compress` did.

    Attributes:
        base_model: the dense model's name.
        model_type, new_model_type: before and after; they differ where the result is saved as
            another stock type that computes the same function.
        config: the settings.
        sparsity: fraction of the decoder blocks' projection parameters removed.
        units: kind -> units per layer, before.
        widths: kind -> units after, one number per layer.
        projection_parameters, total_parameters: before and after.
        allocation: the rule that gave the widths.
        attention_unit: the attention unit, "kv_group" or "query_head".
        errors: with `allocation="error"`, what these widths lose according to the measurements of
            the dense model, and what one width per kind would lose.
        splits: for each split between attention and MLP that was measured: its attention unit, its
            widths, and its divergence from the dense model in nats per token.
        groups: one entry per group or expert, in the order of the work.
        calibration: source, samples, tokens and fingerprint of the calibration set.
        evaluation: measurements that were added, for example by `--eval` on the command line.
        seconds: wall time of the layer loop.
        processes: number of processes that shared the calibration.
        versions: library -> version.
        estimate: phase -> estimated "host_bytes" and "accelerator_bytes", the peaks above what the
            process held at the start, and "operations".
        measured: phase -> the same peaks as measured, where the platform reports them, and
            "seconds".
        export: for an exported result: its format, model type, error, number of parameters, and the
            texts of its card.
        license: license metadata of the dense model's card, if its folder has one.
        recovery: `RecoveryReport.to_dict` of a recovery that came after the compression; errors of
            groups are from before it. {"failed": why} where one was asked for and failed.
        source: for a compression from disk to disk: file of the dense checkpoint -> its sha256.
    """

    base_model: str
    model_type: str
    new_model_type: str
    config: GrailConfig
    sparsity: float
    units: dict[str, int]
    widths: dict[str, tuple[int, ...]]
    projection_parameters: tuple[int, int]
    total_parameters: tuple[int, int]
    allocation: str = "uniform"
    attention_unit: str = "kv_group"
    errors: tuple[float, float] | None = None
    splits: list[dict[str, Any]] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    estimate: dict[str, dict[str, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    license: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, model: PreTrainedModel, config: GrailConfig, plan: Plan) -> CompressionReport:
        """The report of a plan that has not been carried out yet."""
        return cls(
            base_model=card.public_name(model.name_or_path),
            model_type=model.config.model_type,
            new_model_type=plan.config.model_type,
            config=config,
            sparsity=plan.sparsity,
            units=plan.units,
            widths=dict(plan.widths),
            projection_parameters=plan.projection_parameters,
            total_parameters=plan.total_parameters,
            allocation=plan.allocation,
            attention_unit=plan.attention_unit,
            errors=plan.errors,
            versions=versions(),
            license=card.license_of(model.name_or_path),
        )

    def add(self, left: Statistics, repair: Repair) -> None:
        """Record what is left of a part, and what a repair makes of it."""
        assert left.weight is not None and left.moments is not None
        part = left.part
        errors = {name: left.error(solution) for name, solution in left.solutions.items()}
        pruned = left.error(Repair(left.weight))
        self.groups.append(
            GroupReport(
                part.name,
                left.block.index,
                part.kind,
                part.num_units,
                left.weight.shape[1] // part.columns,
                pruned,
                pruned if repair.damping is None else left.error(repair),
                repair.damping,
                errors.get("measured"),
                errors.get("linear"),
                None if left.group.targeted else left.moments.count,
            )
        )

    @property
    def last(self) -> tuple[float, float | None]:
        """The error and the damping of the last group that was repaired."""
        return self.groups[-1].error, self.groups[-1].damping

    def refit(self, group: Group, refit: Refit) -> None:
        """Add the outcome of a refit to the group's entries, which are the last ones."""
        number = len(group.parts)
        for index in range(len(self.groups) - number, len(self.groups)):
            entry = replace(self.groups[index], refit=refit.outcome)
            if refit.error is not None:
                entry = replace(entry, error=refit.error, damping=refit.damping)
            self.groups[index] = entry

    def warn_of_scarce_experts(self, layer: int) -> None:
        """Warn of a layer's experts that saw fewer tokens than they keep channels."""
        scarce = [g for g in self.groups if g.layer == layer and g.scarce and g.damping is not None]
        if scarce:
            name = scarce[0].name.rpartition(".")[0]
            logger.warning(
                "%s: experts %s saw fewer tokens than the %d channels that they keep, and are "
                "repaired with damping %g or more: use more num_samples",
                *(name, ", ".join(g.name.rpartition(".")[2] for g in scarce)),
                *(scarce[0].width, SCARCE_DAMPING),
            )

    def share(self) -> None:
        """Give the first process's groups and measurements to the reports of all processes."""
        # Not the report as a whole: a selector that is a function may not be picklable.
        self.groups, self.seconds, self.measured = processes.once(
            lambda: (self.groups, self.seconds, self.measured), "the report"
        )

    @property
    def scarce_experts(self) -> tuple[str, ...]:
        """Names of the experts that saw fewer calibration tokens than they keep channels."""
        return tuple(group.name for group in self.groups if group.scarce)

    @property
    def rehomed(self) -> bool:
        """Whether the result is of another stock model type than the dense model."""
        return self.new_model_type != self.model_type

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        # `asdict` copies deeply, and must not copy the closure of a selector that is a function.
        plain = replace(self, config=GrailConfig.from_dict(self.config.to_dict()))
        groups = [asdict(group) for group in self.groups]
        for group in groups:
            if group["damping"] == math.inf:
                group["damping"] = "inf"  # JSON has no infinity
        return {
            **asdict(plain),
            "groups": groups,
            "config": self.config.to_dict(),
            "projection_parameters": list(self.projection_parameters),
            "errors": self.errors and list(self.errors),
            "total_parameters": list(self.total_parameters),
            "widths": {kind: list(widths) for kind, widths in self.widths.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionReport:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **data,
                "config": GrailConfig.from_dict(data["config"]),
                "projection_parameters": tuple(data["projection_parameters"]),
                "errors": data["errors"] and tuple(data["errors"]),
                "total_parameters": tuple(data["total_parameters"]),
                "widths": {kind: tuple(widths) for kind, widths in data["widths"].items()},
                "groups": [
                    GroupReport(**group | {"damping": damping and float(damping)})
                    for group in data["groups"]
                    for damping in [group["damping"]]
                ],
            }
        )

    @classmethod
    def load(cls, directory: str | Path) -> CompressionReport:
        """Read the report that is saved beside a compressed model."""
        return cls.from_dict(json.loads((Path(directory) / REPORT_FILE).read_text("utf-8")))

    def save(self, directory: str | Path) -> None:
        """Write `grail.json` and the model card beside the weights.

        Raises:
            FileExistsError: the folder has a README.md that belongs neither to an earlier report
                nor to a compressed model that transformers has pushed.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        readme = directory / card.CARD_FILE
        if readme.exists() and not ((directory / REPORT_FILE).exists() or card.is_tagged(readme)):
            raise FileExistsError(
                f"{readme} is not the card of a compressed model; save the report in the folder "
                "given to model.save_pretrained"
            )
        _write(directory / REPORT_FILE, json.dumps(self.to_dict(), indent=2) + "\n")
        _write(readme, self.card())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload `grail.json` and the card to a model repository, after `model.push_to_hub`.

        Args:
            repo_id: for example "me/smaller".
            kwargs: for `huggingface_hub.HfApi.upload_folder` (token, revision, …).

        Returns:
            The commit's URL.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            settings = {"commit_message": "Add the compression report and model card", **kwargs}
            return str(HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **settings))

    def card(self) -> str:
        """The model card: YAML metadata and Markdown."""
        auto = str(auto_class(self.new_model_type).__name__)
        recovered = self.recovered
        trained = recovered is not None and recovered.kept
        how = card.origin(self.base_model, self.versions["grail-hf"], self.config, trained)
        loading = card.loading(self.new_model_type, self.uniform)
        usage = card.usage(auto, self.uniform)
        if self.export:
            loading, usage = str(self.export["note"]), str(self.export["usage"])
        converted = self.rehomed and not self.export
        measured = ((key, _short(value)) for key, value in self.evaluation.items())
        return card.card_text(
            card.card_metadata(self.base_model, auto, self.license),
            [
                f"# {self.base_model}, {100 * self.sparsity:.1f}% of the block parameters removed",
                f"{how} {loading}",
                usage,
                self._serving(),
                card.conversion(self.model_type, self.new_model_type) if converted else "",
                card.table(("", "before", "after"), self._rows()),
                card.calibration_summary(self.calibration),
                "" if recovered is None else recovered.summary(),
                self.alternative,
                card.scarce_summary(self.scarce_experts if self.config.compensate else ()),
                card.table(("measured", "value"), measured),
                f"All settings and per-layer errors are in `{REPORT_FILE}`.",
            ],
        )

    @property
    def recovered(self) -> RecoveryReport | None:
        """The report of the recovery that came after the compression, if any did."""
        if not self.recovery or "failed" in self.recovery:
            return None
        return RecoveryReport.from_dict(self.recovery)

    def _serving(self) -> str:
        """How vLLM serves the model, where that needs an option."""
        heads = [width for width in self.widths.get(ATTENTION, ()) if width]
        is_checkpoint = not self.export or self.export["usage"] == card.USAGE
        if not (heads and is_checkpoint):
            return ""
        present = {
            HEAD_DIM: max(heads) < self.units[ATTENTION],
            OUTPUT_BIAS: bool(self.config.bias) and min(heads) < self.units[ATTENTION],
        }
        return card.serving(self.export.get("model_type", self.new_model_type), present)

    @property
    def uniform(self) -> bool:
        """Whether all layers with units have one width, which a stock config represents."""
        return all(len(set(widths) - {0}) <= 1 for widths in self.widths.values())

    def table(self) -> Table:
        """Widths, parameters and errors before and after, for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.base_model}: {100 * self.sparsity:.2f}% of the blocks removed")
        table.add_column("")
        for title in ("before", "after"):
            table.add_column(title, justify="right")
        for row in self._rows():
            table.add_row(*row)
        for key, value in self.evaluation.items():
            table.add_row(key, "", _short(value))
        table.caption = self.alternative or None
        memory = self._memory()
        if memory:
            table.add_section()
            table.add_row("peak memory", "estimated", "measured")
            for title, estimated, measured in memory:
                table.add_row(title, size(estimated), size(measured))
        return table

    def _unit_of(self, kind: str) -> str:
        """The unit of a kind, in the plural."""
        names = {"kv_group": "KV heads", "query_head": "query heads"}
        return names[self.attention_unit] if kind == ATTENTION else f"{kind} channels"

    @property
    def alternative(self) -> str:
        """What one width per kind would have lost, in a sentence; empty where not measured."""
        if not self.errors or not self.errors[0]:
            return ""
        own, other = self.errors
        return (
            "According to measurements of the dense model, one width per kind "
            f"(allocation='uniform') would lose {other / own:.2f} times as much."
        )

    def _memory(self) -> list[tuple[str, int, int]]:
        """(phase and kind of memory, estimated bytes, measured bytes) of what was measured."""
        titles = {"host_bytes": "host", "accelerator_bytes": "accelerator"}
        return [
            (f"{phase}, {titles[kind]}", self.estimate[phase][kind], peak)
            for phase, peaks in self.measured.items()
            for kind, peak in peaks.items()
            if kind in titles and phase in self.estimate
        ]

    def _rows(self) -> list[tuple[str, str, str]]:
        """(quantity, before, after)."""
        rows = [
            (f"{self._unit_of(kind)} per layer", f"{self.units[kind]:,}", width_range(widths))
            for kind, widths in self.widths.items()
        ]
        for title, (before, after) in (
            ("projection parameters", self.projection_parameters),
            ("total parameters", self.total_parameters),
        ):
            rows.append((title, f"{before:,}", f"{after:,}"))
        if "parameters" in self.export:
            rows.append(("parameters of this file", "", f"{self.export['parameters']:,}"))
        for kind in self.widths:
            errors = [(g.error_pruned, g.error) for g in self.groups if g.kind == kind]
            if errors:
                pruned, repaired = (
                    sum(column) / len(column) for column in zip(*errors, strict=True)
                )
                rows.append(
                    (f"mean {kind} error, pruned / repaired", f"{pruned:.4f}", f"{repaired:.4f}")
                )
            outcomes = Counter(g.refit for g in self.groups if g.kind == kind and g.refit)
            if outcomes:
                counts = (f"{number} {outcome}" for outcome, number in outcomes.most_common())
                rows.append((f"{kind} refits", "", ", ".join(counts)))
        return rows + self._recovery_rows()

    def _recovery_rows(self) -> list[tuple[str, str, str]]:
        if "failed" in self.recovery:
            return [("recovery", "", f"failed: {self.recovery['failed']}")]
        recovered = self.recovered
        if recovered is None:
            return []
        tokens, seconds = recovered.tokens, sum(recovered.seconds.values())
        title = f"divergence, {tokens:,} tokens in {seconds:.0f} s of recovery"
        after = recovered.after if recovered.kept else recovered.before
        return [
            (f"{title} ({name})", f"{before:.4f}", f"{after[name]:.4f}")
            for name, before in recovered.before.items()
        ]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.base_model}: {100 * self.sparsity:.2f}% of the blocks removed",
                *(f"  {title}: {before} -> {after}" for title, before, after in self._rows()),
            ]
        )


def size(number: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def width_range(widths: Sequence[int]) -> str:
    """The common width of the layers that have units, or the range of their widths."""
    having = [width for width in widths if width] or [0]
    low, high = min(having), max(having)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    libraries = ("grail-hf", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def check_output(output: Path, overwrite: bool) -> None:
    """Raise OSError where the output folder cannot or must not be replaced."""
    check_replaceable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / REPORT_FILE).is_file()
    if ours and overwrite:
        return
    raise FileExistsError(
        f"{output} holds an earlier compressed model: overwrite=True (--overwrite) replaces it"
        if ours
        else f"{output} exists and is not a compressed model: choose another folder"
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    """Write a new file and rename it, so that a failure leaves the old one whole."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, "utf-8")
    beside.replace(path)

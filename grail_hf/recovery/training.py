"""Gradient steps towards the dense model's predictions, by transformers' own `Trainer`.

What of transformers' trainer is not documented is used here alone: the number of devices that
`TrainingArguments` counts, and where a `Trainer` has left its checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from logging import ERROR
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from grail_hf.methods.divergence import divergence
from grail_hf.recovery.adapters import copies, restore_
from grail_hf.recovery.config import FULL, RecoveryConfig, recomputes
from grail_hf.recovery.targets import Item, collate
from grail_hf.runtime import processes
from grail_hf.runtime.progress import Bar

# Where the search for a learning rate begins, for the projections themselves and for adapters.
FIRST_RATES = {True: 3e-4, False: 1e-3}
_FACTOR = 3.0  # between learning rates that are tried
_MOST_TRIALS = 6
_TRIAL = 1 / 8  # of the steps
_LEAST_TRIAL = 4  # steps
_WARM_UP = 1 / 20  # of the steps
_EVALUATIONS = 8
_PATIENCE = 3  # evaluations without a better one
_NO_DIVERGENCE = 1e-12  # nats
_TRIALS_FILE = "trials.json"
_WORST = "eval_worst_loss"
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Course:
    """How a training went.

    Attributes:
        learning_rate: that was used.
        trials: learning rate -> worst ratio of the divergences after a short run to those before.
        steps: that were taken.
        divergences: the figures by step: "step", and the mean divergence on each held-out set.
    """

    learning_rate: float
    trials: dict[float, float] = field(default_factory=dict)
    steps: int = 0
    divergences: list[dict[str, float]] = field(default_factory=list)


class Distillation(Trainer):
    """A trainer whose loss is the divergence from the dense model's predictions.

    Attributes:
        before: mean divergence on each held-out set before the training, in nats per token. An
            evaluation adds the worst ratio to these, by which the best checkpoint is chosen.
    """

    before: Mapping[str, float] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over the tokens of a batch, in nats."""
        given = {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}
        outputs = model(**given, use_cache=False)
        found = divergence(outputs.logits, inputs["ids"], inputs["log_probs"])
        mask = inputs.get("attention_mask")
        loss = found.mean() if mask is None else (found * mask).sum() / mask.sum()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The divergence on every held-out set, and the worst ratio, as one evaluation.

        The trainer's own takes each set for an evaluation by itself, which ends early stopping.
        """
        metrics: dict[str, float] = {}
        held_out = cast(dict[str, Subset[Item]], self.eval_dataset)
        for name, windows in held_out.items():
            loader = self.get_eval_dataloader(windows)
            output = self.evaluation_loop(loader, "Evaluation", True, metric_key_prefix="eval")
            metrics[f"eval_{name}_loss"] = cast(dict[str, float], output.metrics)["eval_loss"]
        if self.before is not None:
            ratios = [
                metrics[f"eval_{name}_loss"] / max(before, _NO_DIVERGENCE)
                for name, before in self.before.items()
            ]
            # Of NaN and numbers, `max` may return either.
            metrics[_WORST] = math.inf if any(map(math.isnan, ratios)) else max(ratios)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _Shown(TrainerCallback):
    """Shows a training by a bar of this package's."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step)  # of a run that is resumed

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        if _WORST in given["metrics"]:
            ratio = given["metrics"][_WORST]
            self.bar.set_postfix_str(f"{ratio:.3f} of the divergence before")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars for checkpoints, and no warnings of tied weights that they lack, or their times."""
    shown = logging.is_progress_bar_enabled()
    modules = (Trainer.__module__, get_last_checkpoint.__module__)
    levels = {one: one.level for one in map(logging.get_logger, modules)}
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for one in levels:
        one.setLevel(ERROR)
    try:
        yield
    finally:
        for one, level in levels.items():
            one.setLevel(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def line_search(worst_after: Callable[[float], float], first: float) -> dict[float, float]:
    """Try learning rates a factor apart, from `first` upwards or downwards as long as it pays.

    Args:
        worst_after: what is to be least; infinite where training diverges.
        first: the first rate.

    Returns:
        rate -> its figure, of those that were tried.
    """
    found = {first: worst_after(first)}
    for factor in (_FACTOR, 1 / _FACTOR):
        best = first
        while len(found) < _MOST_TRIALS:
            following = float(f"{best * factor:.3g}")
            found[following] = worst_after(following)
            diverges = math.isinf(found[following]) and factor < 1
            if found[following] >= found[best] and not diverges:
                break
            best = following
        if best != first:
            break
    return found


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and where.

    Attributes:
        model: of which the parameters that require a gradient are trained.
        windows: to learn from.
        held_out: sets of windows to judge by, by name.
        config: the settings, with the rank known.
        folder: for checkpoints, which are kept.
        device: where to train.
        progress: show bars.
    """

    model: nn.Module
    windows: Subset[Item]
    held_out: Mapping[str, Subset[Item]]
    config: RecoveryConfig
    folder: Path
    device: torch.device
    progress: bool = True

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole training, in all processes."""
        config = self.config
        together = config.batch_size * config.accumulation * processes.count()
        return max(1, round(config.epochs * len(self.windows) / together))

    def divergences(self) -> dict[str, float]:
        """Mean divergence from the dense model on each held-out set, in nats per token."""
        metrics = self._trainer(0.0, 1).evaluate()
        return {name: metrics[f"eval_{name}_loss"] for name in self.held_out}

    def train_(self, before: Mapping[str, float], resume: bool = False) -> Course:
        """Train, and leave the state that is best on the held-out windows.

        Args:
            before: mean divergence on each held-out set now.
            resume: go on from the last checkpoint in the folder, if there is one.
        """
        course = self._with_rate(before, resume)
        every = max(1, self.num_steps // _EVALUATIONS)
        trainer = self._trainer(course.learning_rate, self.num_steps, before, every)
        trainer.add_callback(EarlyStoppingCallback(_PATIENCE))
        last = None
        if resume:
            last = get_last_checkpoint(str(self.folder))  # type: ignore[no-untyped-call]
        self._run(trainer, "Recovering", last)
        course.steps = trainer.state.global_step
        course.divergences = [{"step": 0, **before}, *self._by_step(trainer.state.log_history)]
        return course

    def _with_rate(self, before: Mapping[str, float], resume: bool) -> Course:
        """The learning rate that is asked for, or the best of some short runs."""
        asked = self.config.learning_rate
        if not isinstance(asked, str):
            return Course(asked)
        file = self.folder / _TRIALS_FILE
        if resume and file.exists():
            found = json.loads(file.read_text("utf-8"))
            trials = {float(rate): worst for rate, worst in found.items()}
        else:
            trials = line_search(self._trial(before), FIRST_RATES[self.config.rank == FULL])
            file.write_text(json.dumps(trials), "utf-8")
        return Course(min(trials, key=trials.__getitem__), trials)

    def _trial(self, before: Mapping[str, float]) -> Callable[[float], float]:
        """How good a learning rate is: the worst ratio after a short run, which is undone."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        start = copies(parameters)
        steps = min(self.num_steps, max(_LEAST_TRIAL, round(_TRIAL * self.num_steps)))
        # The best rate grows with the steps that there are, about as their root: on the bundled
        # model 3e-4 is best for 35 steps, and 1e-3 for 224.
        smaller = math.sqrt(steps / self.num_steps)

        def trial(rate: float) -> float:
            trainer = self._trainer(smaller * rate, steps, before)
            self._run(trainer, f"Trying {rate:.2g}")
            worst = trainer.evaluate()[_WORST]
            restore_(parameters, start)
            return worst

        return trial

    def _trainer(
        self,
        rate: float,
        steps: int,
        before: Mapping[str, float] | None = None,
        every: int | None = None,
    ) -> Distillation:
        """A trainer of so many steps, which judges and saves `every` so many, or never."""
        judging: dict[str, Any] = {}
        if every is not None:
            judging = {"eval_strategy": "steps", "save_strategy": "steps"}
            judging |= {"eval_steps": every, "save_steps": every, "load_best_model_at_end": True}
        trainer = Distillation(
            self.model,
            self._arguments(steps, rate, **judging),
            data_collator=collate,
            train_dataset=self.windows,
            eval_dataset=dict(self.held_out),
        )
        trainer.before = before
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _run(self, trainer: Distillation, what: str, last: str | None = None) -> None:
        with Bar(total=trainer.args.max_steps, desc=what, shown=self.progress) as bar, _quiet():
            trainer.add_callback(_Shown(bar))
            trainer.train(resume_from_checkpoint=last)

    def _arguments(self, steps: int, rate: float, **others: Any) -> TrainingArguments:
        config, accelerated = self.config, self.device.type != "cpu"
        half = accelerated and any(p.dtype in _HALF for p in self.model.parameters())
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(_WARM_UP * steps),
            weight_decay=0.0,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            bf16=half,
            use_cpu=not accelerated,
            seed=config.seed,
            metric_for_best_model=_WORST,
            greater_is_better=False,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            label_names=["ids"],
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=accelerated,
            **{
                "eval_strategy": "no",
                "save_strategy": "no",
                **_checkpointing(recomputes(config, self.device)),
                **others,
            },
        )
        # One process trains on one device; a launcher starts a process for each.
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def _by_step(self, log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """What a trainer has logged of each evaluation, as one record."""
        found: dict[int, dict[str, float]] = {}
        for entry in log:
            if _WORST in entry:
                figures = {name: entry[f"eval_{name}_loss"] for name in self.held_out}
                found[int(entry["step"])] = {"step": int(entry["step"])} | figures
        return list(found.values())


def _checkpointing(asked: bool) -> dict[str, Any]:
    """The trainer's arguments for computing activations again, which were renamed in 5.23."""
    names = {field.name for field in fields(TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in names else "gradient"
    return {
        f"{kind}_checkpointing": asked,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": False},
    }

"""`recover`: a compressed model learns the dense model's predictions. No labels.

The dense model predicts the next token at every place of the calibration windows, and its likeliest
tokens go to disk (`targets`). Then the compressed model is trained towards them, by the divergence
of its predictions from them (`methods.divergence`): low-rank adapters, merged at the end, or the
projections themselves. One window in eight is held out. On those the learning rate is chosen, the
best moment to stop, and whether the outcome is kept at all.
"""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from grail_hf.calibration.sampling import is_sampled
from grail_hf.calibration.tokens import (
    Calibration,
    TokenBatches,
    read_calibration,
    with_own_samples,
)
from grail_hf.card import public_name
from grail_hf.checkpoints.loading import load_model
from grail_hf.checkpoints.sources import meta_model
from grail_hf.config import AUTO
from grail_hf.models.architectures import find_architecture
from grail_hf.models.decoder import (
    check_model,
    check_weights,
    decoder_layers,
    evaluation_mode,
    vocabulary_size,
)
from grail_hf.models.schema import Architecture
from grail_hf.recovery.adapters import (
    BYTES_TRAINED,
    check_peft,
    copies,
    in_float32,
    matrices,
    restore_,
    trainable,
)
from grail_hf.recovery.config import FULL, RecoveryConfig
from grail_hf.recovery.report import RecoveryReport
from grail_hf.recovery.targets import ONE_IN, Targets
from grail_hf.runtime import processes
from grail_hf.runtime.devices import choose_device, free_bytes
from grail_hf.runtime.dispatched import whole_on_device
from grail_hf.runtime.hooks import is_dispatched
from grail_hf.runtime.layers import move_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
logger = logging.getLogger(__name__)
CALIBRATION, WATCHED = "calibration", "watched"
_RUN_FILE = "run.json"
_RANK = 64


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | TokenBatches = "c4",
    config: RecoveryConfig | dict[str, Any] | None = None,
    *,
    watch: Calibration | TokenBatches | None = None,
    architecture: Architecture | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> RecoveryReport:
    """Train a compressed model in place towards the dense model's predictions. No labels.

    The model is changed only where that makes it better: if the outcome is not closer to the dense
    model on every set of held-out windows, or training fails, it has the weights that it came with.

    Args:
        model: the compressed one, whole on one device.
        dense: the dense one, or its folder or name on the hub, which is loaded for its predictions
            and freed before the training.
        tokenizer: needed where `calibration` is text or conversations.
        calibration: as in `compress`; "self" is sampled from the dense model, and needs no data.
        config: the settings; `overrides` are fields of `RecoveryConfig` and win over it.
        watch: a second text, or other data, that is not learned from, but on which the outcome must
            be better too.
        architecture: the model type's entry where the table has none, see `infer_architecture`.
        folder: for predictions and checkpoints, which are kept there; by default a temporary one.
        resume: go on with a run that was stopped, from its last checkpoint in `folder`.
        progress: show bars on standard error, of the first process alone.

    Returns:
        What was done.

    Raises:
        ValueError, TypeError: bad input, before anything costly starts.
        ImportError: PEFT is missing where adapters are trained.
        FloatingPointError: weights or predictions are NaN or Inf.
    """
    config = RecoveryConfig.resolve(config, **overrides)
    check_trainable(model)
    if dense is model:
        raise ValueError("the dense model and the compressed one are the same object: load both")
    if resume and folder is None:
        raise ValueError("resume=True goes on with a run in a folder: give folder=")
    architecture = architecture or find_architecture(model.config.model_type)
    with work_folder(folder) as work:
        config = with_rank(config, model, architecture, stopped_run(work, resume))
        check_peft(config.rank)
        task = Task(config, architecture, work, resume, progress and processes.is_first())
        lesson = task.lesson(dense, tokenizer, calibration, watch, vocabulary_size(model))
        return task.learn_(model, lesson)


@dataclass(frozen=True)
class Lesson:
    """What there is to learn.

    Attributes:
        targets: the dense model's predictions for the calibration and, if there is one, the watched
            text.
        teacher: the dense model's name.
        calibration: what a report says of the calibration.
        seconds: that the predictions took.
    """

    targets: Mapping[str, Targets]
    teacher: str
    calibration: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Task:
    """A recovery, in two parts: between them, one model can make room for the other.

    Attributes:
        config: the settings, `with_rank`.
        architecture: of both models.
        work: the folder for predictions and checkpoints.
        resume: go on with a run that was stopped, if the folder has one.
        progress: show bars.
    """

    config: RecoveryConfig
    architecture: Architecture
    work: Path
    resume: bool = False
    progress: bool = True

    def lesson(
        self,
        dense: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None,
        calibration: Calibration | TokenBatches,
        watch: Calibration | TokenBatches | None,
        vocabulary: int,
    ) -> Lesson:
        """The dense model's predictions, written in the first process. Arguments as in `recover`.

        Args:
            vocabulary: size of the compressed model's.

        Raises:
            ValueError: another vocabulary, or the folder has a run of other tokens or settings.
        """
        start = time.perf_counter()
        # What can be refused is refused before the weights are loaded.
        skeleton = meta_model(os.fspath(dense)) if isinstance(dense, str | os.PathLike) else dense
        check_model(skeleton)
        if vocabulary != vocabulary_size(skeleton):
            raise ValueError(
                f"the compressed model has {vocabulary} tokens and the dense one "
                f"{vocabulary_size(skeleton)}: give the dense model that it was made from"
            )
        texts = {CALIBRATION: calibration} | ({} if watch is None else {WATCHED: watch})
        tokens = {
            name: self._read(skeleton, tokenizer, text, name)
            for name, text in texts.items()
            if not is_sampled(text)
        }
        teacher = load_model(os.fspath(dense)) if isinstance(dense, str | os.PathLike) else dense
        for name, text in texts.items():
            if is_sampled(text):
                tokens[name] = self._read(teacher, tokenizer, text, name)
        device = choose_device(teacher, self.config.device)
        tokens[CALIBRATION] = with_own_samples(
            tokens[CALIBRATION], teacher, tokenizer, self.config, device, self.progress
        )
        targets = {name: Targets.of(tokens[name], self.work / name) for name in texts}
        run = {
            "settings": self.config.to_dict(),
            "tokens": {name: tokens[name].fingerprint for name in texts},
        }

        def write() -> None:
            _start_or_resume(self.work, run)
            with ExitStack() as stack:
                if not is_dispatched(teacher):
                    layers = decoder_layers(teacher, self.architecture)
                    stack.enter_context(whole_on_device(teacher, layers, device))
                for one in targets.values():
                    one.write(teacher, self.config.top_k, self.progress)

        processes.once(write, "the dense model's predictions")
        name = public_name(teacher.name_or_path)
        seconds = time.perf_counter() - start
        return Lesson(targets, name, tokens[CALIBRATION].summary(), seconds)

    def learn_(self, model: PreTrainedModel, lesson: Lesson) -> RecoveryReport:
        """Train the compressed model, and keep the outcome where it is better."""
        from grail_hf.recovery.training import Training

        start = time.perf_counter()
        config = self.config
        layers = decoder_layers(model, self.architecture)
        device, home = choose_device(model, config.device), next(model.parameters()).device
        windows, held_out = lesson.targets[CALIBRATION].parted(config.seed)
        sets: dict[str, Any] = {**lesson.targets, CALIBRATION: held_out}
        originals = copies(matrices(layers))
        training = Training(model, windows, sets, config, self.work, device, self.progress)
        # Weights are trained in fp32; half precision is fast on accelerators alone.
        fp32 = device.type == "cpu" or config.rank == FULL
        kept = False
        try:
            with torch.enable_grad(), random_states_kept(), evaluation_mode(model):
                before = training.divergences()
                dtype: AbstractContextManager[None] = in_float32(model) if fp32 else nullcontext()
                with dtype, trainable(model, layers, config.rank) as student:
                    number = sum(p.numel() for p in student.parameters() if p.requires_grad)
                    course = replace(training, model=student).train_(before, self.resume)
                after = training.divergences()
            kept = all(after[name] < before[name] for name in before)
        finally:
            move_(model, home)
            if not kept:
                restore_(matrices(layers), originals)
        if not kept:
            logger.warning("the recovery did not make the model better, and was dropped")
        training_seconds = time.perf_counter() - start
        return RecoveryReport(
            teacher=lesson.teacher,
            config=config,
            calibration=lesson.calibration,
            tokens=lesson.targets[CALIBRATION].num_tokens(windows.indices),
            parameters=number,
            kept=kept,
            before=before,
            after=after,
            learning_rate=course.learning_rate,
            trials=course.trials,
            steps=course.steps,
            divergences=course.divergences,
            seconds={"dense model": lesson.seconds, "training": training_seconds},
        )

    def _read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        text: Calibration | TokenBatches,
        name: str,
    ) -> TokenBatches:
        """The tokens of a text, fewer of them where it is watched."""
        config = self.config
        if name == WATCHED:
            config = replace(config, num_samples=max(2, config.num_samples // ONE_IN))
        tokens = read_calibration(model, tokenizer, text, config, self.progress)
        if tokens.num_samples < 2:
            raise ValueError(
                "one window is too few to learn from it and hold out another: give more num_samples"
            )
        return tokens


def with_rank(
    config: RecoveryConfig,
    model: PreTrainedModel,
    architecture: Architecture,
    stopped: Mapping[str, Any] | None = None,
) -> RecoveryConfig:
    """The settings with the rank that "auto" means for a model on the device that trains it.

    Args:
        config: the settings.
        model: the compressed one; it may be on the meta device.
        architecture: its own.
        stopped: what a run to resume has written of itself, whose rank "auto" is then.
    """
    if config.rank == AUTO and stopped:
        config = replace(config, rank=stopped["settings"]["rank"])
    if config.rank == AUTO:
        device = choose_device(model, config.device)
        parameters = matrices(decoder_layers(model, architecture))
        needed = BYTES_TRAINED * sum(parameter.numel() for parameter in parameters)
        fits = processes.once(lambda: 2 * needed <= free_bytes(device), "the rank")
        config = replace(config, rank=FULL if fits else _RANK)
    return config


def check_trainable(model: PreTrainedModel) -> None:
    """Raise ValueError, TypeError or FloatingPointError for a model that cannot be trained."""
    check_model(model)
    check_weights(model)
    if is_dispatched(model):
        raise ValueError(
            "the model is dispatched by accelerate (device_map), and training takes it whole on "
            "one device: load it without device_map"
        )


def stopped_run(work: Path, resume: bool) -> dict[str, Any] | None:
    """What a run that was stopped has written of itself in its folder; None where there is none.

    Raises ValueError where there is one that is not asked to be resumed.
    """
    path = work / _RUN_FILE
    if not path.exists():
        return None
    if not resume:
        raise ValueError(
            f"{work} holds a recovery that was stopped: resume it with resume=True (--resume), or "
            "delete that folder to start again"
        )
    run: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return run


def _start_or_resume(work: Path, run: dict[str, Any]) -> None:
    found = stopped_run(work, resume=True)
    if found is not None and found != json.loads(json.dumps(run)):
        raise ValueError(
            f"{work} holds a recovery with other settings or another calibration: give the same "
            "ones, or delete that folder to start again"
        )
    work.mkdir(parents=True, exist_ok=True)
    (work / _RUN_FILE).write_text(json.dumps(run, indent=2), "utf-8")


@contextmanager
def work_folder(folder: str | Path | None) -> Iterator[Path]:
    """The folder, or a temporary one of the first process, which all of them use."""
    if folder is not None:
        yield Path(folder)
        return
    with processes.first_within(tempfile.TemporaryDirectory(), "the work folder") as scratch:
        yield Path(scratch)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The caller's random states, of Python, NumPy and torch, are after the context as before.

    The trainer seeds them all.
    """
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=_kind()):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _kind() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type

"""Measure a model: perplexity on text, and lm-eval's tasks.

Perplexity follows GPTQ and SparseGPT: the text is joined and tokenised once, cut into windows of
`seq_length` that do not overlap, and each window is scored by itself, without context from the one
before. A sliding window gives lower figures, which cannot be compared with the literature's.

    perplexity = exp( sum_{n, t>0} -log p(x_{n,t} | x_{n,<t}) / (N (T - 1)) )

Where the tokenizer adds a BOS token by itself, x_{n,0} is BOS, and every token of the text is
predicted, the first of a window from BOS alone. lm-eval's rolling likelihood predicts every token
too, but only its first window starts with BOS; each other one starts with the last token of the
window before. Without BOS (`bos=False`, as in GPTQ) the first token of a window is not predicted.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from grail_hf.calibration.corpora import TextSource
from grail_hf.calibration.windows import (
    BOS_FIRST,
    bos_token,
    capped,
    check_token_ids,
    token_windows,
)
from grail_hf.checkpoints.loading import load_model
from grail_hf.config import AUTO, widest_float
from grail_hf.models.decoder import check_positions, context_length, evaluation_mode
from grail_hf.runtime.devices import usable_device
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
EvaluationText: TypeAlias = TextSource | Tensor


@dataclass(frozen=True)
class LanguageModelLoss:
    """Mean negative log likelihood, in nats, of `tokens` predicted tokens.

    They are the last `seq_length` - 1 tokens of each of `windows` windows.
    """

    loss: float
    tokens: int
    windows: int
    seq_length: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    def to_dict(self) -> dict[str, Any]:
        """What `evaluate` reports of it, as JSON."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "tokens": self.tokens,
            "seq_length": self.seq_length,
        }


@dataclass(frozen=True)
class EvaluationWindows:
    """A text in windows, to measure perplexity on.

    Attributes:
        text: a file, or a corpus name.
        ids: [N, T], int64.
        bos: whether each window starts with BOS.
    """

    text: str
    ids: Tensor
    bos: bool = False

    @classmethod
    def read(
        cls,
        text: str,
        tokenizer: PreTrainedTokenizerBase | None,
        seq_length: int,
        bos: bool | str = AUTO,
    ) -> EvaluationWindows:
        """The windows of a text. Arguments are those of `perplexity`; raises as it does."""
        ids = token_windows(text, tokenizer, seq_length=seq_length, bos=bos)
        return cls(text, ids, tokenizer is not None and bos_token(tokenizer, bos) is not None)

    def description(self) -> dict[str, str]:
        """What a report records of the text: of a path only the last name."""
        name, colon, rest = self.text.partition(":")
        public = Path(name).name if Path(name).exists() else name
        count, length = self.ids.shape
        return {
            "evaluation text": public + colon + rest,
            "evaluation windows": f"{count} x {length} tokens{BOS_FIRST if self.bos else ''}",
        }


@contextmanager
def loaded(
    source: str, device: str | None = None, revision: str | None = None
) -> Iterator[PreTrainedModel]:
    """A source's model to evaluate, as long as the context lasts.

    Args:
        source: a folder, or a name on the hub.
        device: where all of it is; by default accelerate places it, on disk too where it has to.
        revision: of the hub's repository.

    Raises:
        ValueError: this machine does not have the device.
        OSError: as `load_model`.
    """
    where = "auto" if device is None else {"": usable_device(device)}
    with tempfile.TemporaryDirectory() as scratch:
        yield load_model(source, revision, device_map=where, offload_folder=scratch)


def language_model_loss(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int = 8, progress: bool = True
) -> LanguageModelLoss:
    """Mean loss of the next token over `windows` [N, T] of token ids, T at least 2.

    Logits are in the model's dtype, losses in fp32, their sum in fp64. Raises ValueError for ids
    that the model does not have and windows of the wrong shape, TypeError for ids that are not
    integers, FloatingPointError for a loss that is not finite. Windows longer than the model's
    context raise ValueError where its positions are in a table, and warn elsewhere.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    embeddings = cast(Tensor, model.get_input_embeddings().weight)
    windows = check_token_ids(windows, embeddings.shape[0], "the tensor of windows")
    count, seq_length = windows.shape
    if seq_length < 2:
        raise ValueError(f"windows of {seq_length} token: at least 2, for one token to predict")
    check_positions(model, seq_length, "the tensor of windows")
    # Offloaded embeddings lie on the meta device; accelerate's hooks then move the ids themselves.
    device = torch.device("cpu") if embeddings.is_meta else embeddings.device

    total = 0.0
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        Bar(total=count, desc="perplexity", unit="window", shown=progress) as bar,
    ):
        for first in range(0, count, batch_size):
            ids = windows[first : first + batch_size].to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            # One sequence at a time: fp32 copies of a whole batch's logits may not fit.
            for row in range(len(ids)):
                scores = logits[row, :-1].float()  # [T - 1, vocabulary]
                targets = ids[row, 1:].to(scores.device)
                losses = functional.cross_entropy(scores, targets, reduction="none")
                loss = losses.to(widest_float(losses.device)).sum()
                total += _finite(loss.item(), first + row)
            bar.update(len(ids))
    tokens = count * (seq_length - 1)
    return LanguageModelLoss(total / tokens, tokens, count, seq_length)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: EvaluationText,
    *,
    seq_length: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    bos: bool | str = AUTO,
) -> float:
    """Perplexity of `model` on `text`, on windows of `seq_length` tokens.

    `text` is anything that `calibration.token_windows` reads, or a tensor of windows [N, T].
    `seq_length` defaults to the model's context, at most 2048; one that is longer than the context
    is cut to it, with a warning. `bos` decides whether each window of a text starts with BOS, which
    counts in `seq_length`: "auto" if the tokenizer adds one by itself, False for the windows of
    GPTQ. Raises as `token_windows` and `language_model_loss` do.
    """
    seq_length = seq_length and capped(seq_length, context_length(model))
    windows = _windows(model, tokenizer, text, seq_length, max_windows, bos)
    return language_model_loss(model, windows, batch_size=batch_size).perplexity


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: EvaluationText | None = None,
    tasks: str | Sequence[str] = (),
    seq_length: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    bos: bool | str = AUTO,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure perplexity on `text` and run lm-eval's `tasks` (names, or one string with commas).

    `seq_length`, `batch_size`, `max_windows` and `bos` are those of `perplexity`; `seq_length` also
    bounds lm-eval's inputs, and `bos` decides whether they start with BOS. `limit`, `num_fewshot`
    and `include_path` (a folder of further tasks) go to lm-eval. Returns a dict that JSON can hold,
    with only what was asked for:

        {"perplexity": float, "loss": float, "tokens": int, "seq_length": int, "bos": bool,
         "tasks": {task: {metric: float}}}

    "bos" tells whether each window starts with BOS; it is absent where `text` is a tensor. A
    metric's key has its filter after a comma, unless that is lm-eval's "none". Raises ValueError
    where nothing is asked for or a task is unknown, ImportError where tasks are asked for and
    lm-eval is not installed, and as `perplexity` does.
    """
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    tasks = [task.strip() for task in given if task.strip()]
    if text is None and not tasks:
        raise ValueError("nothing to evaluate: give text, tasks, or both")
    seq_length = seq_length and capped(seq_length, context_length(model))
    # Unknown tasks and a missing lm-eval fail before the model runs.
    task_manager = _task_manager(tasks, tokenizer, include_path) if tasks else None
    has_bos = tokenizer is not None and bos_token(tokenizer, bos) is not None
    report: dict[str, Any] = {}
    if text is not None:
        windows = _windows(model, tokenizer, text, seq_length, max_windows, bos)
        report |= language_model_loss(model, windows, batch_size=batch_size).to_dict()
        if not isinstance(text, Tensor):
            report["bos"] = has_bos
    if tasks:
        report["tasks"] = _run_tasks(
            model,
            tokenizer,
            tasks,
            bos=bos,
            max_length=seq_length,
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=task_manager,
        )
    return report


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: EvaluationText,
    seq_length: int | None,
    max_windows: int | None,
    bos: bool | str,
) -> Tensor:
    if isinstance(text, Tensor):
        return text[:max_windows]
    if seq_length is None:
        seq_length = min(context_length(model) or 2048, 2048)
    return token_windows(text, tokenizer, seq_length=seq_length, max_windows=max_windows, bos=bos)


def _finite(loss: float, window: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of window {window} is {loss}: the model's weights or its arithmetic overflow"
        )
    return loss


def _task_manager(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    include_path: str | os.PathLike[str] | None,
) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('tasks need lm-eval: pip install "grail-hf[eval]"') from error
    if tokenizer is None:
        raise ValueError("tasks need a tokenizer, got None: give the model's")
    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], manager.all_tasks)
        raise ValueError(
            f"lm-eval has no task {unknown}, with include_path={include_path}; nearest: {nearest}"
        )
    return manager


def _run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    bos: bool | str,
    max_length: int | None,
    batch_size: int,
    **options: Any,
) -> dict[str, dict[str, float]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # HFLM gives its tokenizer a padding token; the caller's is to stay as it is.
    tokenizer = cast("PreTrainedTokenizerBase", copy.deepcopy(tokenizer))
    if bos is True:
        tokenizer.add_bos_token = True
    settings: dict[str, Any] = {}
    if bos is False or bos_token(tokenizer, AUTO) is not None:
        # HFLM asks the tokenizer for special tokens or for none. Its default differs by release.
        settings["add_bos_token"] = bos is not False
    with evaluation_mode(model):
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            **settings,
        )
        results = simple_evaluate(wrapped, tasks=list(tasks), log_samples=False, **options)
    if results is None:  # lm-eval reports on the first process of a machine only
        return {}
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, int | float)  # not an alias, not "N/A"
        }
        for task, metrics in results["results"].items()
    }

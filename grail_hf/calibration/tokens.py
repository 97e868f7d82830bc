"""Text to tokens: the batches that calibration reads, the windows that perplexity is measured on.

Corpora are read as GPTQ and SparseGPT read them: the whole text is joined and tokenised once,
calibration takes random windows of it, evaluation takes consecutive ones. Padding each document by
itself would be simpler to stream, but measures something else.

There is one difference. Where the tokenizer adds a BOS token by itself, each window starts with
one, because some models (Gemma) predict badly without it. A window of `seq_length` tokens is then
BOS and `seq_length` - 1 tokens of the text, which is tokenised without special tokens. `bos=False`
gives GPTQ's windows exactly, with special tokens at most at the two ends of the text.

Text may come from a file (plain, .gz, .xz) or a list of files, a list of strings, a corpus named in
`CORPORA`, or any dataset written `name:split:column`, `name/config:split:column`, or
`folder:split:column` for one on disk. For calibration it may also be conversations, as lists of
messages or in .jsonl files, which the tokenizer's chat template turns into tokens: each starts a
window, a long one is cut into several, and shorter ones are padded to the longest of their batch.
Tokens may also be given ready made, or be sampled from the model itself, where there are no data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from grail_hf.calibration.chats import (
    Chats,
    Conversation,
    chat_windows,
    padded,
    read_conversations,
)
from grail_hf.calibration.corpora import TextSource, read_text
from grail_hf.calibration.sampling import SELF, is_sampled, sample_tokens, written_together
from grail_hf.calibration.windows import (
    BOS_FIRST,
    bos_token,
    capped,
    check_positive,
    check_token_ids,
    random_windows,
    required_tokenizer,
    with_random_tokens,
)
from grail_hf.config import AUTO
from grail_hf.models.decoder import (
    check_positions,
    context_length,
    evaluation_mode,
    vocabulary_size,
)
from grail_hf.runtime import processes
from grail_hf.runtime.hooks import is_dispatched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
# Of a text's windows, what the model writes itself where that is cheap, and the tokens that it
# writes at a stretch.
OWN_SHARE = 1 / 12
PIECE = 256

Calibration: TypeAlias = (
    TextSource | Iterable[Conversation] | Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]]
)


class Reading(Protocol):
    """The settings that say how a calibration is read, as `GrailConfig` documents them."""

    @property
    def num_samples(self) -> int: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def bos(self) -> bool | str: ...
    @property
    def random_tokens(self) -> float: ...
    @property
    def self_samples(self) -> float | str: ...


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Calibration tokens, cut into micro-batches.

    `batches` hold `input_ids` [b, T], int64 on the CPU, and `attention_mask` [b, T], int64 of zeros
    and ones, only where there is padding. `source` is a line for the report. `fingerprint` is the
    sha256 of the sequences, with their padding, and their masks in order; how they are cut into
    batches does not enter otherwise. `bos` says whether each window of text starts with BOS; it is
    None for tokens that were given or sampled. `text` says whether they are windows of a text.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    fingerprint: str
    bos: bool | None = None
    text: bool = False

    @property
    def num_samples(self) -> int:
        """Number of sequences."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return sum(
            int(batch["attention_mask"].sum())
            if "attention_mask" in batch
            else batch["input_ids"].numel()
            for batch in self.batches
        )

    def summary(self) -> dict[str, str | int | None]:
        """What a report says of the calibration set."""
        return {
            "source": self.source,
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "bos": self.bos,
            "fingerprint": self.fingerprint,
        }


def read_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | TokenBatches,
    config: Reading,
    progress: bool = True,
) -> TokenBatches:
    """The calibration tokens for a model: the first process's, in all.

    It may be on the meta device, unless the tokens are sampled from it ("self").

    Raises ValueError where there are fewer batches than processes, or sequences of given tokens are
    longer than the model can read.
    """
    tokens = processes.once(
        lambda: _read_calibration(model, tokenizer, calibration, config, progress),
        "the calibration",
    )
    processes.share(len(tokens.batches))
    return tokens


def _read_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | TokenBatches,
    config: Reading,
    progress: bool,
) -> TokenBatches:
    if isinstance(calibration, TokenBatches):
        for batch in calibration.batches:
            check_token_ids(batch["input_ids"], vocabulary_size(model), calibration.source)
        return _within_context(calibration, model)
    with evaluation_mode(model):
        tokens = token_batches(
            calibration,
            tokenizer,
            vocab_size=vocabulary_size(model),
            num_samples=config.num_samples,
            seq_length=config.seq_length,
            batch_size=config.batch_size,
            seed=config.seed,
            bos=config.bos,
            random_tokens=config.random_tokens,
            max_length=context_length(model),
            model=model,
            progress=progress,
        )
    return _within_context(tokens, model)


def _within_context(tokens: TokenBatches, model: PreTrainedModel) -> TokenBatches:
    longest = max(batch["input_ids"].shape[1] for batch in tokens.batches)
    check_positions(model, longest, tokens.source)
    return tokens


def token_batches(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    **settings: Any,
) -> TokenBatches:
    """Turn any kind of calibration data into micro-batches of token ids.

    Text (see the module) is sampled: `num_samples` windows of `seq_length` tokens (at most
    `max_length`, the model's limit, which is said in a warning), drawn with `seed` and cut into
    batches of `batch_size`; `bos` is that of `bos_token`. Conversations, given as lists of messages
    or in .jsonl files with {"messages": [...]} in a line, are drawn with `seed` until they fill
    `num_samples` windows of at most `seq_length` tokens; fewer are warned of. A fraction
    `random_tokens` of the tokens of either is replaced (`with_random_tokens`). An integer tensor
    [N, T] is used whole, cut likewise. A mapping with `input_ids` [b, T] and perhaps
    `attention_mask` [b, T], or an iterable of such, is used whole and as batched; its other keys
    are dropped. "self" needs no data and no tokenizer: it is as many tokens as text would be,
    sampled from `model` (in eval mode) where it is, in batches of `batch_size`, with a bar on
    standard error if `progress`.

    Args:
        calibration: the data.
        tokenizer: needed for text and conversations.
        settings: fields of `TokenReader`.

    Raises ValueError for text too short, conversations that are malformed or that the tokenizer has
    no chat template for, `bos=True` where there is no BOS token, "self" without a model that has
    its weights, ids outside [0, vocab_size), and batches or masks of the wrong shape, TypeError for
    the wrong kind of data, FileNotFoundError for text that is not found.
    """
    return TokenReader(tokenizer, **settings).read(calibration)


@dataclass(frozen=True)
class TokenReader:
    """Reads calibration data of any kind (`token_batches`).

    Attributes:
        tokenizer: needed for text and conversations.
        vocab_size: rows of the model's embedding.
        num_samples: windows to draw from text and conversations.
        seq_length: tokens in a window.
        batch_size: windows in a micro-batch.
        seed: of the windows that are drawn.
        bos: whether windows start with BOS (`bos_token`).
        random_tokens: fraction of a text's tokens that are replaced by random ones.
        max_length: the model's limit on `seq_length`.
        model: that "self" samples from.
        progress: show a bar while it does.
    """

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    num_samples: int
    seq_length: int
    batch_size: int
    seed: int
    bos: bool | str = AUTO
    random_tokens: float = 0.0
    max_length: int | None = None
    model: PreTrainedModel | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        names = ("vocab_size", "num_samples", "seq_length", "batch_size")
        check_positive(**{name: getattr(self, name) for name in names})

    def read(self, calibration: Calibration) -> TokenBatches:
        """The calibration as micro-batches."""
        if isinstance(calibration, Mapping):
            calibration = [calibration]
        if not isinstance(calibration, str | os.PathLike | Tensor):
            calibration = _materialize(calibration)
        if isinstance(calibration, Tensor):
            return self._of_windows(
                check_token_ids(calibration, self.vocab_size, "the calibration tensor"),
                f"given tensor of {calibration.shape[0]} x {calibration.shape[1]} tokens",
            )
        if isinstance(calibration, list) and isinstance(calibration[0], Mapping):
            given = [_check_batch(b, self.vocab_size, i) for i, b in enumerate(calibration)]
            number = sum(len(batch["input_ids"]) for batch in given)
            return _of_batches(given, f"given batches, {number} sequences")
        if is_sampled(calibration):
            return self._sampled()
        if chats := read_conversations(calibration):
            return self._of_conversations(chats)
        return self._of_text(calibration)

    @property
    def _length(self) -> int:
        return capped(self.seq_length, self.max_length)

    def _of_windows(self, windows: Tensor, source: str, **others: Any) -> TokenBatches:
        return _of_batches(_split(windows, self.batch_size), source, **others)

    def _sampled(self) -> TokenBatches:
        length, together = self._length, self.batch_size
        if self.model is not None:
            together = written_together(self.model, length, together)
        windows = sample_tokens(
            self.model,
            self.tokenizer,
            self.vocab_size,
            self.num_samples,
            length,
            together,
            self.seed,
            self.progress,
        )
        return self._of_windows(
            check_token_ids(windows, self.vocab_size, "the model's sample"),
            f"sampled from the dense model itself: {self.num_samples} sequences of {length} tokens "
            f"at temperature 1, seed {self.seed}",
        )

    def _of_conversations(self, chats: Chats) -> TokenBatches:
        tokenizer, length = required_tokenizer(self.tokenizer), self._length
        rows, first = chat_windows(chats, tokenizer, self.num_samples, length, self.seed, self.bos)
        for row in rows:
            check_token_ids(row[None], self.vocab_size, chats.label)
        rows = [self._with_random_tokens(row) for row in rows]
        size = self.batch_size
        return _of_batches(
            [padded(rows[i : i + size]) for i in range(0, len(rows), size)],
            f"{chats.label}: {len(rows)} windows of at most {length} tokens in the chat template"
            + self._details(first),
            bos=first is not None,
        )

    def _of_text(self, calibration: TextSource) -> TokenBatches:
        tokenizer, length = required_tokenizer(self.tokenizer), self._length
        first = bos_token(tokenizer, self.bos)
        text = read_text(calibration, "train")
        windows = random_windows(text, tokenizer, self.num_samples, length, self.seed, first)
        windows = check_token_ids(windows, self.vocab_size, text.label)
        return self._of_windows(
            self._with_random_tokens(windows),
            f"{text.label}: {self.num_samples} random windows of {length} tokens"
            + self._details(first),
            bos=first is not None,
            text=True,
        )

    def _with_random_tokens(self, ids: Tensor) -> Tensor:
        tokenizer = required_tokenizer(self.tokenizer)
        return with_random_tokens(ids, self.random_tokens, tokenizer, self.vocab_size, self.seed)

    def _details(self, first: int | None) -> str:
        """What a report says of how windows were made, beside where they come from."""
        replaced = f", {100 * self.random_tokens:g}% of the tokens replaced by random ones"
        return (
            ("" if first is None else BOS_FIRST)
            + (replaced if self.random_tokens else "")
            + f", seed {self.seed}"
        )


def _of_batches(batches: Sequence[dict[str, Tensor]], source: str, **others: Any) -> TokenBatches:
    return TokenBatches(tuple(batches), source, _fingerprint(batches), **others)


def with_own_samples(
    tokens: TokenBatches,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Reading,
    device: torch.device,
    progress: bool = True,
) -> TokenBatches:
    """Replace a part of a text's windows by text that the model writes itself (`self_samples`).

    A calibration text is of one domain. What the model writes unprompted is of all the domains that
    it was trained on, so that what they need counts too, as in calibration on such text alone
    (arXiv 2410.17170).

    Args:
        tokens: of a text; others are returned as they are.
        model: the dense model, with its weights.
        tokenizer: of the tokens.
        config: the settings.
        device: where layers run: "auto" writes only where the whole model is there.
        progress: show a bar on standard error.
    """

    def written() -> TokenBatches:
        fraction = config.self_samples
        if isinstance(fraction, str):
            whole = not is_dispatched(model) and {p.device for p in model.parameters()} == {device}
            fraction = OWN_SHARE if whole else 0.0
        count = round(fraction * tokens.num_samples)
        if not tokens.text or count == 0:
            return tokens
        with evaluation_mode(model):
            return _with_own_samples(tokens, model, tokenizer, count, config.seed, progress)

    return processes.once(written, "the calibration")


def _with_own_samples(
    tokens: TokenBatches,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    seed: int,
    progress: bool,
) -> TokenBatches:
    """Replace `count` of the windows, drawn with `seed`.

    The text is written in short pieces, many at a time, since a piece's tokens come one after
    another. The token that begins a piece is left out: in a text, it begins a window or nothing.
    """
    ids = torch.cat([batch["input_ids"] for batch in tokens.batches])
    first, length = int(bool(tokens.bos)), ids.shape[1]
    batch_size = len(tokens.batches[0]["input_ids"])
    piece = min(PIECE, length)
    written = sample_tokens(
        model,
        tokenizer,
        vocabulary_size(model),
        num_samples=-(-count * (length - first) // piece),
        seq_length=piece + 1,
        batch_size=written_together(model, piece + 1, batch_size),
        seed=seed,
        progress=progress,
    )[:, 1:].flatten()[: count * (length - first)]
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    ids[chosen, first:] = written.view(count, length - first)
    batches = _split(ids, batch_size)
    source = f"{tokens.source}; {count} of them written by the dense model"
    return replace(tokens, batches=tuple(batches), source=source, fingerprint=_fingerprint(batches))


def _materialize(calibration: Iterable[Any]) -> list[Any]:
    """List the items of an iterable after checking that they are of one kind."""
    if not isinstance(calibration, Iterable):
        raise TypeError(_unknown_kind(type(calibration).__name__))
    items = list(calibration)
    if not items:
        raise ValueError(f"calibration is an empty {type(calibration).__name__}: zero batches")
    for kind in (Mapping, str | os.PathLike, list | tuple):
        if all(isinstance(item, kind) for item in items):
            return items
    kinds = sorted({type(item).__name__ for item in items})
    raise TypeError(_unknown_kind(f"{type(calibration).__name__} of {', '.join(kinds)}"))


def _unknown_kind(kind: str) -> str:
    return (
        f"calibration is a {kind}: give a path, paths, a corpus name, {SELF!r}, a list of texts or "
        "one of conversations, an integer tensor [N, T], or batches that map 'input_ids' to [b, T]"
    )


def _split(windows: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": rows} for rows in torch.split(windows, batch_size)]


def _check_batch(batch: Mapping[str, Any], vocab_size: int, index: int) -> dict[str, Tensor]:
    """Check one given batch and reduce it to `input_ids` and, if anything is padded, the mask."""
    if "input_ids" not in batch:
        hint = ": conversations are lists of messages, in a list" if "role" in batch else ""
        raise ValueError(f"batch {index} has no 'input_ids', only {sorted(batch)}{hint}")
    ids = check_token_ids(
        _as_tensor(batch["input_ids"], f"batch {index}"), vocab_size, f"batch {index}"
    )
    if batch.get("attention_mask") is None:
        return {"input_ids": ids}
    mask = _as_tensor(batch["attention_mask"], f"the mask of batch {index}").to("cpu")
    if mask.shape != ids.shape:
        raise ValueError(
            f"batch {index} has an attention_mask of shape {list(mask.shape)} for input_ids of "
            f"shape {list(ids.shape)}: they must be equal"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"batch {index} has an attention_mask with values other than 0 and 1: "
            "1 marks a token, 0 padding"
        )
    empty = (mask == 0).all(dim=1).nonzero()
    if len(empty):
        raise ValueError(
            f"batch {index}, sequence {int(empty[0])}: attention_mask is all zero, so that nothing "
            "is left to calibrate on; drop the sequence"
        )
    # A mask of ones says nothing, and its absence lets attention take its unmasked, faster kernel.
    if (mask == 1).all():
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except ValueError as error:
        raise ValueError(f"{name} is not rectangular ({error}): pad it to one length") from error


def _fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for row in torch.stack([ids, mask], dim=1):  # [2, T]
            digest.update(row.shape[1].to_bytes(8, "little"))
            digest.update(row.numpy().tobytes())
    return digest.hexdigest()

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

import difflib
import errno
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grail_hf import processes
from grail_hf.config import AUTO, GrailConfig
from grail_hf.offload import input_device
from grail_hf.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Split: TypeAlias = Literal["train", "test"]
TextSource: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
Calibration: TypeAlias = (
    TextSource | Iterable[Conversation] | Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]]
)

SELF = "self"  # sampled from the model itself
BOS_FIRST = ", BOS first in each"  # in what a report says of windows
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}")
# A split may be sliced, as in train[:1000], and then holds a colon of its own.
_REFERENCE = re.compile(r"(?P<name>[^:]+)(:(?P<split>(\[[^\]]*\]|[^:\[])*))?(:(?P<column>[^:]*))?")


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Calibration tokens, cut into micro-batches.

    `batches` hold `input_ids` [b, T], int64 on the CPU, and `attention_mask` [b, T], int64 of zeros
    and ones, only where there is padding. `source` is a line for the report. `fingerprint` is the
    sha256 of the sequences, with their padding, and their masks in order; how they are cut into
    batches does not enter otherwise. `bos` says whether each window of text starts with BOS; it is
    None for tokens that were given or sampled.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    fingerprint: str
    bos: bool | None = None

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


@dataclass(frozen=True)
class Corpus:
    """A dataset, and how its documents become one text.

    `files` maps a split to the only file of the repository to read for it. `by_document` draws each
    calibration window from one document longer than the window, instead of from the joined text.
    `test_documents` and `test_windows` bound what evaluation reads.
    """

    dataset: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    train: str = "train"
    test: str = "test"
    column: str = "text"
    joiner: str = "\n\n"
    by_document: bool = False
    test_documents: int | None = None
    test_windows: int | None = None


@dataclass(frozen=True)
class _Chats:
    conversations: Sequence[Any]
    label: str


@dataclass(frozen=True)
class _Text:
    documents: Sequence[str]
    label: str
    joiner: str = "\n\n"
    by_document: bool = False
    max_windows: int | None = None


def read_calibration(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    calibration: "Calibration | TokenBatches",
    config: GrailConfig,
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
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    calibration: "Calibration | TokenBatches",
    config: GrailConfig,
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


def _within_context(tokens: TokenBatches, model: "PreTrainedModel") -> TokenBatches:
    longest = max(batch["input_ids"].shape[1] for batch in tokens.batches)
    check_positions(model, longest, tokens.source)
    return tokens


def token_batches(
    calibration: Calibration,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    vocab_size: int,
    num_samples: int,
    seq_length: int,
    batch_size: int,
    seed: int,
    bos: bool | str = AUTO,
    random_tokens: float = 0.0,
    max_length: int | None = None,
    model: "PreTrainedModel | None" = None,
    progress: bool = True,
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

    Raises ValueError for text too short, conversations that are malformed or that the tokenizer has
    no chat template for, `bos=True` where there is no BOS token, "self" without a model that has
    its weights, ids outside [0, vocab_size), and batches or masks of the wrong shape, TypeError for
    the wrong kind of data, FileNotFoundError for text that is not found.
    """
    _check_positive(
        vocab_size=vocab_size, num_samples=num_samples, seq_length=seq_length, batch_size=batch_size
    )
    has_bos = None
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if not isinstance(calibration, str | os.PathLike | Tensor):
        calibration = _materialize(calibration)
    if isinstance(calibration, Tensor):
        windows = check_token_ids(calibration, vocab_size, "the calibration tensor")
        batches = _split(windows, batch_size)
        source = f"given tensor of {windows.shape[0]} x {windows.shape[1]} tokens"
    elif isinstance(calibration, list) and isinstance(calibration[0], Mapping):
        batches = [_check_batch(batch, vocab_size, i) for i, batch in enumerate(calibration)]
        source = f"given batches, {sum(len(b['input_ids']) for b in batches)} sequences"
    elif calibration == SELF:
        length = capped(seq_length, max_length)
        windows = _sample(
            model, tokenizer, vocab_size, num_samples, length, batch_size, seed, progress
        )
        batches = _split(check_token_ids(windows, vocab_size, "the model's sample"), batch_size)
        source = (
            f"sampled from the dense model itself: {num_samples} sequences of {length} tokens at "
            f"temperature 1, seed {seed}"
        )
    elif chats := _read_conversations(calibration):
        tokenizer = _required(tokenizer)
        seq_length = capped(seq_length, max_length)
        rows, first = _chat_windows(chats, tokenizer, num_samples, seq_length, seed, bos)
        for row in rows:
            check_token_ids(row[None], vocab_size, chats.label)
        rows = [with_random_tokens(row, random_tokens, tokenizer, vocab_size, seed) for row in rows]
        batches = [_padded(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        has_bos = first is not None
        source = (
            f"{chats.label}: {len(rows)} windows of at most {seq_length} tokens in the chat "
            f"template{BOS_FIRST if has_bos else ''}{_says_random(random_tokens)}, seed {seed}"
        )
    else:
        tokenizer = _required(tokenizer)
        seq_length = capped(seq_length, max_length)
        first = bos_token(tokenizer, bos)
        text = _read(calibration, "train")
        windows = _random_windows(text, tokenizer, num_samples, seq_length, seed, first)
        windows = check_token_ids(windows, vocab_size, text.label)
        windows = with_random_tokens(windows, random_tokens, tokenizer, vocab_size, seed)
        batches = _split(windows, batch_size)
        has_bos = first is not None
        source = (
            f"{text.label}: {num_samples} random windows of {seq_length} tokens"
            f"{BOS_FIRST if has_bos else ''}{_says_random(random_tokens)}, seed {seed}"
        )
    return TokenBatches(tuple(batches), source, _fingerprint(batches), has_bos)


def with_random_tokens(
    ids: Tensor,
    fraction: float,
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    seed: int,
) -> Tensor:
    """Replace a fraction of token ids by ids drawn uniformly from the vocabulary.

    A calibration text holds a part of the vocabulary. What reads the rest, in the first layers
    above all, is idle on it and would be removed as useless.

    Args:
        ids: [..], int64. Special tokens stay, and none is drawn.
        fraction: chance of each token to be replaced, in [0, 1).
        tokenizer: of the ids.
        vocab_size: rows of the model's embedding; those beyond the tokenizer's are not drawn.
        seed: of the draws.
    """
    if not fraction:
        return ids
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
    known = torch.arange(min(vocab_size, len(tokenizer)))
    ordinary = known[~torch.isin(known, special)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(ids.shape, generator=generator) < fraction
    drawn = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    return torch.where(chosen & ~torch.isin(ids, special), drawn, ids)


def _says_random(fraction: float) -> str:
    return f", {100 * fraction:g}% of the tokens replaced by random ones" if fraction else ""


def corpus_tokens(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase | None", split: Split = "test"
) -> Tensor:
    """Token ids [N], int64, of the whole joined text of `source`.

    `split` chooses between the two parts of a dataset that names none itself. Raises ValueError for
    empty text or no tokenizer, FileNotFoundError for text that is not found.
    """
    tokenizer = _required(tokenizer)
    return _tokenize(_read(source, split), tokenizer, None)


def token_windows(
    source: TextSource,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    seq_length: int,
    max_windows: int | None = None,
    bos: bool | str = AUTO,
) -> Tensor:
    """Consecutive windows [N, seq_length], int64, of the test text, without overlap.

    Each starts with BOS or not, as `bos_token` has it. The remainder shorter than a window is
    dropped. N is at most `max_windows`, and at most what the corpus' own protocol reads (256
    windows for c4). Raises as `corpus_tokens` and `bos_token`, and ValueError for text shorter than
    one window.
    """
    _check_positive(seq_length=seq_length, max_windows=1 if max_windows is None else max_windows)
    tokenizer = _required(tokenizer)
    first = bos_token(tokenizer, bos)
    length = _text_length(seq_length, first)
    text = _read(source, "test")
    tokens = _tokenize(text, tokenizer, first)
    _check_length(tokens, seq_length, text.label, first)
    available = len(tokens) // length
    count = min(n for n in (available, max_windows, text.max_windows) if n is not None)
    return _with_bos(tokens[: count * length].view(count, length), first)


def bos_token(
    tokenizer: "PreTrainedTokenizerBase", bos: bool | str, chat: Sequence[int] = ()
) -> int | None:
    """The id of the BOS token that each window of text starts with; None for windows without one.

    `bos` is True, False, or "auto": True if the tokenizer puts its BOS token in front of a text by
    itself, and, for conversations, if their template does so too in `chat`, the tokens of one.
    Raises ValueError for another value, and for True where there is no BOS token.
    """
    if not (isinstance(bos, bool) or bos == AUTO):
        raise ValueError(f"bos={bos!r} must be True, False or {AUTO!r}")
    token: int | None = tokenizer.bos_token_id
    if bos is True and token is None:
        raise ValueError(
            "bos=True, but the tokenizer has no BOS token: set its bos_token, or leave bos='auto'"
        )
    if bos == AUTO:
        # A template alone is no sign: SmolLM2's BOS is the mark in front of each of its messages.
        added = tokenizer("a")["input_ids"][:1] == [token]
        bos = added and (not chat or chat[0] == token)
    return token if bos else None


def _text_length(seq_length: int, bos: int | None) -> int:
    """Tokens of text in a window."""
    if bos is None:
        return seq_length
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length} leaves no room after BOS: use at least 2")
    return seq_length - 1


def _with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Put BOS, if there is one, in front of each window."""
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def check_token_ids(ids: Tensor, vocab_size: int, name: str) -> Tensor:
    """Return `ids` [N, T] as int64 on the CPU.

    Raises TypeError unless they are integers; ValueError, beginning with `name`, unless they have
    two dimensions, neither of them empty, and lie in [0, vocab_size).
    """
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} has dtype {ids.dtype}: token ids must be integers (torch.int64)")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(ids.shape)}: token ids must be [sequences, tokens], not empty"
        )
    ids = ids.to("cpu", torch.int64)
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        row, position = outside[0].tolist()
        raise ValueError(
            f"{name} has token id {ids[row, position]} in sequence {row} at position {position}, "
            f"outside [0, {vocab_size}): use the tokenizer that belongs to the model"
        )
    return ids


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


@torch.no_grad()
def _sample(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    num_samples: int,
    seq_length: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Tensor:
    """Draw [num_samples, seq_length] tokens from the model's own distribution, with `seed`.

    Temperature 1 and nothing cut off, whatever the model's generation settings say; the caller's
    random state stays. An end of text may be drawn, as any token, but ends nothing: what follows it
    is what the model believes to follow. Forbidding it would draw from another distribution.
    """
    if model is None or input_device(model).type == "meta":
        raise ValueError(
            f"calibration {SELF!r} is sampled from the model, which "
            + ("is not given" if model is None else "is on the meta device")
            + ": load the model with its weights"
        )
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length} leaves nothing to sample: use at least 2")
    from transformers import GenerationConfig

    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, max_length=seq_length, eos_token_id=None, pad_token_id=None
    )
    generate: Any = model.generate
    theirs = model.generation_config
    drawn = []
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type  # by default, older torch asks CUDA
    with (
        torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind),
        Bar(total=num_samples * seq_length, desc="Sampling", unit="token", shown=progress) as bar,
    ):
        streamer = SimpleNamespace(put=lambda ids: bar.update(ids.numel()), end=lambda: None)
        torch.manual_seed(seed)
        starts = _start_tokens(model, tokenizer, vocab_size, num_samples)
        # What a call leaves unset is read from the model's own settings: top_p, penalties, …
        model.generation_config = settings
        try:
            for start in torch.split(starts.to(input_device(model)), batch_size):
                ids = generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    generation_config=settings,
                    streamer=streamer,
                )
                drawn.append(ids.cpu())
        finally:
            model.generation_config = theirs
    return torch.cat(drawn)


def _start_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    count: int,
) -> Tensor:
    """[count, 1]: the token that begins a text; random ordinary ones where there is none."""
    special: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config, tokenizer):
            ids = getattr(config, name, None)
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            ids = [token for token in ids if 0 <= token < vocab_size]
            if ids and name == "bos_token_id":
                return torch.full((count, 1), ids[0])
            special += ids
    known = vocab_size
    if tokenizer is not None:
        special += tokenizer.all_special_ids
        known = min(vocab_size, len(tokenizer))  # embeddings are often padded with unused rows
    ordinary = sorted(set(range(known)) - set(special))
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1))]


def capped(seq_length: int, max_length: int | None) -> int:
    """`seq_length`, or with a warning the fewer positions that the model was made for."""
    if max_length is None or seq_length <= max_length:
        return seq_length
    logger.warning(
        "seq_length=%d is more than the model's %d positions: using %d",
        *(seq_length, max_length, max_length),
    )
    return max_length


def _random_windows(
    text: _Text,
    tokenizer: "PreTrainedTokenizerBase",
    num_samples: int,
    seq_length: int,
    seed: int,
    bos: int | None,
) -> Tensor:
    """Draw [num_samples, seq_length] token ids; the same seed gives the same windows."""
    generator = torch.Generator().manual_seed(seed)
    length = _text_length(seq_length, bos)
    if text.by_document:
        pools = _long_documents(text, tokenizer, num_samples, seq_length, generator, bos)
    else:
        pools = [_tokenize(text, tokenizer, bos)]
        _check_length(pools[0], seq_length, text.label, bos)
    available = sum(len(pool) for pool in pools)
    if available < num_samples * length:
        logger.warning(
            "%s has %d tokens for %d windows of %d: the windows overlap",
            *(text.label, available, num_samples, seq_length),
        )
    windows = []
    for index in range(num_samples):
        pool = pools[index % len(pools)]
        start = int(torch.randint(len(pool) - length + 1, (1,), generator=generator))
        windows.append(pool[start : start + length])
    return _with_bos(torch.stack(windows), bos)


def _long_documents(
    text: _Text,
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    seq_length: int,
    generator: torch.Generator,
    bos: int | None,
) -> list[Tensor]:
    """Tokenise documents in random order until `count` are longer than a window."""
    found: list[Tensor] = []
    longest = 0
    for index in torch.randperm(len(text.documents), generator=generator).tolist():
        tokens = _token_ids(text.documents[index], tokenizer, bos)
        longest = max(longest, len(tokens))
        if len(tokens) > _text_length(seq_length, bos):
            found.append(tokens)
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"{text.label} has no document longer than seq_length={seq_length} tokens, the longest "
            f"has {longest}: use a smaller seq_length"
        )
    return found


def _read_conversations(source: Any) -> _Chats | None:
    """The conversations that `source` holds or names; None where it is text."""
    items = source if isinstance(source, list) else [source]
    if isinstance(items[0], list | tuple):
        return _Chats(items, f"given conversations ({len(items)})")
    paths = [Path(item) for item in items]
    if not all(path.suffix == ".jsonl" and _is_file(path) for path in paths):
        return None
    conversations = [messages for path in paths for messages in _read_messages(path)]
    return _Chats(conversations, ", ".join(path.name for path in paths))


def _read_messages(path: Path) -> list[Any]:
    """The conversations of a .jsonl file, one a line."""
    found = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["messages"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is a table, not a text, and has no 'messages' in line {number}: name its "
                f"folder as a dataset, '{path.parent}:train:text', or give conversations"
            ) from error
    return found


def _chat_windows(
    chats: _Chats,
    tokenizer: "PreTrainedTokenizerBase",
    num_samples: int,
    seq_length: int,
    seed: int,
    bos: bool | str,
) -> tuple[list[Tensor], int | None]:
    """At most `num_samples` windows [T] of token ids, T at most `seq_length`; BOS, if they have it.

    A BOS that the template writes is not doubled.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "conversations need a chat template, and the tokenizer has none: set its "
            "chat_template, or give texts"
        )
    if not chats.conversations:
        raise ValueError(f"{chats.label} holds no conversation: give at least one")
    for index, conversation in enumerate(chats.conversations):
        _check_conversation(conversation, f"conversation {index} of {chats.label}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(chats.conversations), generator=generator).tolist()
    first = bos_token(tokenizer, bos, _chat_ids(chats, order[0], tokenizer))
    length = _text_length(seq_length, first)
    windows: list[Tensor] = []
    for index in order:
        ids = _chat_ids(chats, index, tokenizer)
        pieces = torch.split(torch.tensor(ids[1:] if ids[0] == first else ids), length)
        windows += [_with_bos(piece[None], first)[0] for piece in pieces]
        if len(windows) >= num_samples:
            return windows[:num_samples], first
    logger.warning(
        "%s give %d windows, fewer than num_samples=%d", *(chats.label, len(windows), num_samples)
    )
    return windows, first


def _check_conversation(messages: Any, name: str) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name} is {messages!r:.50}: it must be a list of messages, not empty")
    for index, message in enumerate(messages):
        if not (isinstance(message, Mapping) and {"role", "content"} <= set(message)):
            raise ValueError(
                f"{name} has {message!r:.50} as message {index}: it must map 'role' and 'content'"
            )


def _chat_ids(chats: _Chats, index: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    from jinja2 import TemplateError

    try:
        encoding: Any = tokenizer.apply_chat_template(
            chats.conversations[index],
            return_dict=True,
            tokenizer_kwargs={"verbose": False, "return_attention_mask": False},
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template refuses conversation {index} of {chats.label}: {error}"
        ) from error
    ids: list[int] = encoding["input_ids"]
    if not ids:
        raise ValueError(f"the chat template makes nothing of conversation {index}: drop it")
    return ids


def _padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """One batch of rows, and a mask where they differ in length."""
    ids = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}


def _tokenize(text: _Text, tokenizer: "PreTrainedTokenizerBase", bos: int | None) -> Tensor:
    joined = text.joiner.join(text.documents)
    if not joined.strip():
        raise ValueError(f"{text.label} holds no text: give at least one window of it")
    return _token_ids(joined, tokenizer, bos)


def _token_ids(text: str, tokenizer: "PreTrainedTokenizerBase", bos: int | None) -> Tensor:
    """Tokens of a text: without special ones where each window will get a BOS of its own.

    Otherwise they are what the tokenizer makes of it by itself.
    """
    # Not verbose: that a text is longer than the model's context is the point here, not a mistake.
    encoding = tokenizer(
        text, verbose=False, return_attention_mask=False, add_special_tokens=bos is None
    )
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)


def _required(tokenizer: "PreTrainedTokenizerBase | None") -> "PreTrainedTokenizerBase":
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got None: give the model's, or give token ids")
    return tokenizer


def _check_length(tokens: Tensor, seq_length: int, label: str, bos: int | None) -> None:
    if len(tokens) < _text_length(seq_length, bos):
        raise ValueError(
            f"{label} has {len(tokens)} tokens, fewer than one window of seq_length={seq_length}: "
            "use a smaller seq_length or more text"
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def _fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for row in torch.stack([ids, mask], dim=1):  # [2, T]
            digest.update(row.shape[1].to_bytes(8, "little"))
            digest.update(row.numpy().tobytes())
    return digest.hexdigest()


def _read(source: TextSource, split: Split) -> _Text:
    """Find the text that `source` means. A name in `CORPORA` goes before a file of that name."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if isinstance(source, str) and _is_text(source):
            raise FileNotFoundError(_not_found(source))
        if isinstance(source, str) or _is_dir(path):
            name = os.fspath(source)
            corpus = CORPORA.get(name) or _dataset_reference(name)
            if corpus is not None:
                return _load(name, corpus, split)
        return _Text([_read_file(path)], path.name)
    items = list(source)
    if any(isinstance(item, os.PathLike) or _is_file(item) for item in items):
        paths = [Path(item) for item in items]
        return _Text([_read_file(path) for path in paths], ", ".join(path.name for path in paths))
    return _Text([str(item) for item in items], f"given texts ({len(items)})")


def _is_file(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text is often too long to be a file's name
        return False


def _is_dir(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def _is_text(source: str) -> bool:
    """Whether a string is no file, and holds line breaks or is too long for the name of one."""
    try:
        Path(source).stat()
    except OSError as error:
        return "\n" in source or error.errno == errno.ENAMETOOLONG
    except ValueError:  # it holds a null character
        return True
    return False


def _read_file(path: Path) -> str:
    if not _is_file(path):
        raise FileNotFoundError(_not_found(os.fspath(path)))
    if path.suffix == ".jsonl":
        raise ValueError(
            f"{path} is a table, not a text: name its folder as a dataset, "
            f"'{path.parent}:train:text'; conversations are for calibration, without texts"
        )
    return _read_text(path)


def _read_text(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    return text


def _not_found(name: str) -> str:
    if _is_text(name):
        shown = name if len(name) <= 30 else name[:30] + "..."
        return (
            f"{shown!r} is a text of {len(name):,} characters, not a file or the name of a corpus: "
            "a text of your own goes in a list: [text]"
        )
    shown = name if len(name) <= 80 else name[:77] + "..."
    nearest = difflib.get_close_matches(name.lower(), CORPORA, n=1)
    return (
        f"{shown!r} is neither a file that exists nor a named corpus ({', '.join(CORPORA)})"
        + (f"; did you mean {nearest[0]!r}? " if nearest else ". ")
        + "Another dataset is written 'name/config:split:column', a text of your own "
        "goes in a list: [text]"
    )


def _dataset_reference(source: str) -> Corpus | None:
    """Read `name:split:column`; None where `source` can only mean a file.

    Without a colon, a name must be a folder, or have a slash and no suffix: `data/notes.txt` is a
    file that is missing, and asking the hub for it would hide that.
    """
    match = _REFERENCE.fullmatch(source)
    if _is_file(source) or match is None:
        return None
    name = match["name"]
    is_folder = _is_dir(name)
    on_hub = _HUB_NAME.fullmatch(name) and (
        ":" in source or ("/" in name and not Path(name).suffix)
    )
    if not (is_folder or on_hub):
        return None
    dataset, config = name, None
    if not is_folder and name.count("/") == 2:
        dataset, config = name.rsplit("/", 1)
    return Corpus(
        dataset,
        config,
        train=match["split"] or "train",
        test=match["split"] or "test",
        column=match["column"] or "text",
    )


def _load(name: str, corpus: Corpus, split: Split) -> _Text:
    """Load one split of a corpus through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    split_name = corpus.train if split == "train" else corpus.test
    is_folder = _is_dir(corpus.dataset)
    attempts = [(corpus.dataset, corpus.config)]
    if corpus.config is None and "/" in corpus.dataset and not is_folder:
        owner, dataset = corpus.dataset.split("/")
        attempts.append((owner, dataset))  # 'a/b' may also be the dataset a with its config b
    options: dict[str, Any] = {"revision": corpus.revision, "split": split_name}
    if corpus.files is not None:
        # datasets 4.0 holds the one file against the sizes its card gives for all, and refuses.
        options |= {
            "data_files": {split_name: corpus.files[split_name]},
            "verification_mode": "no_checks",
        }
    failures: list[OSError] = []
    for dataset, config in attempts:
        try:
            table = load_dataset(dataset, config, **options)
            break
        except (DatasetNotFoundError, ConnectionError) as error:
            failures.append(error)
    else:
        raise FileNotFoundError(f"{failures[0]}. {_not_found(name)}") from failures[0]

    kind = getattr(table.features.get(corpus.column), "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{name!r} has no column of text {corpus.column!r}, only {table.column_names}: "
            "write 'name:split:column'"
        )
    documents: Sequence[str] = table[corpus.column]
    if split == "test" and corpus.test_documents is not None:
        documents = documents[: corpus.test_documents]
    parts = [Path(dataset).name if is_folder else dataset, config, split_name]
    return _Text(
        documents,
        label=", ".join(part for part in parts if part),
        joiner=corpus.joiner,
        by_document=corpus.by_document and split == "train",
        max_windows=corpus.test_windows,
    )


# A corpus that the literature reads in its own way is added here; any other needs no entry.
CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        # Its main branch is a loading script, which `datasets` no longer runs.
        revision="refs/convert/parquet",
        column="sentence",
        joiner=" ",
    ),
    "c4": Corpus(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        test="validation",
        joiner=" ",
        by_document=True,
        test_documents=1100,
        test_windows=256,
    ),
}


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Rows of the input embedding; token ids lie below it."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def context_length(model: "PreTrainedModel") -> int | None:
    """Positions that the model was made for; None where its config names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_positions(model: "PreTrainedModel", length: int, name: str) -> None:
    """Warn of sequences of `length` tokens, called `name`, that exceed what a model was made for.

    Raises ValueError where it looks its positions up in a table, which ends there. Rotary ones are
    computed for any position: what the model makes of them is for the caller to judge.
    """
    limit = context_length(model)
    if limit is None or length <= limit:
        return
    says = f"{name} has sequences of {length} tokens, more than the model's {limit} positions"
    if not hasattr(type(model.config.get_text_config()), "rope_parameters"):
        raise ValueError(f"{says}: cut them")
    logger.warning("%s: what it makes of the rest may mean little, cut them", says)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each of its modules back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

"""Windows of token ids: cut from text, begun with BOS, checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grail_hf.calibration.corpora import Split, Text, TextSource, read_text
from grail_hf.config import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BOS_FIRST = ", BOS first in each"  # in what a report says of windows


def with_random_tokens(
    ids: Tensor,
    fraction: float,
    tokenizer: PreTrainedTokenizerBase,
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


def corpus_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase | None, split: Split = "test"
) -> Tensor:
    """Token ids [N], int64, of the whole joined text of `source`.

    `split` chooses between the two parts of a dataset that names none itself. Raises ValueError for
    empty text or no tokenizer, FileNotFoundError for text that is not found.
    """
    tokenizer = required_tokenizer(tokenizer)
    return _tokenize(read_text(source, split), tokenizer, None)


def token_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
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
    check_positive(seq_length=seq_length, max_windows=1 if max_windows is None else max_windows)
    tokenizer = required_tokenizer(tokenizer)
    first = bos_token(tokenizer, bos)
    length = text_length(seq_length, first)
    text = read_text(source, "test")
    tokens = _tokenize(text, tokenizer, first)
    _check_length(tokens, seq_length, text.label, first)
    available = len(tokens) // length
    count = min(n for n in (available, max_windows, text.max_windows) if n is not None)
    return with_bos(tokens[: count * length].view(count, length), first)


def bos_token(
    tokenizer: PreTrainedTokenizerBase, bos: bool | str, chat: Sequence[int] = ()
) -> int | None:
    """The id of the BOS token that each window of text starts with; None for windows without one.

    `bos` is True, False, or "auto": True if the tokenizer puts its BOS token before a text by
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
        # A template alone is no sign: SmolLM2's BOS is the mark before each of its messages.
        added = tokenizer("a")["input_ids"][:1] == [token]
        bos = added and (not chat or chat[0] == token)
    return token if bos else None


def text_length(seq_length: int, bos: int | None) -> int:
    """Tokens of text in a window."""
    if bos is None:
        return seq_length
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length} leaves no room after BOS: use at least 2")
    return seq_length - 1


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Put BOS, if there is one, before each window."""
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


def capped(seq_length: int, max_length: int | None) -> int:
    """`seq_length`, or with a warning the fewer positions that the model was made for."""
    if max_length is None or seq_length <= max_length:
        return seq_length
    logger.warning(
        "seq_length=%d is more than the model's %d positions: using %d",
        *(seq_length, max_length, max_length),
    )
    return max_length


def random_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_length: int,
    seed: int,
    bos: int | None,
) -> Tensor:
    """Draw [num_samples, seq_length] token ids; the same seed gives the same windows."""
    generator = torch.Generator().manual_seed(seed)
    length = text_length(seq_length, bos)
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
    return with_bos(torch.stack(windows), bos)


def _long_documents(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
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
        if len(tokens) > text_length(seq_length, bos):
            found.append(tokens)
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"{text.label} has no document longer than seq_length={seq_length} tokens, the longest "
            f"has {longest}: use a smaller seq_length"
        )
    return found


def _tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Tensor:
    joined = text.joiner.join(text.documents)
    if not joined.strip():
        raise ValueError(f"{text.label} holds no text: give at least one window of it")
    return _token_ids(joined, tokenizer, bos)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Tensor:
    """Tokens of a text: without special ones where each window will get a BOS of its own.

    Otherwise they are what the tokenizer makes of it by itself.
    """
    # Not verbose: that a text is longer than the model's context is the point here, not a mistake.
    encoding = tokenizer(
        text, verbose=False, return_attention_mask=False, add_special_tokens=bos is None
    )
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)


def required_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got None: give the model's, or give token ids")
    return tokenizer


def _check_length(tokens: Tensor, seq_length: int, label: str, bos: int | None) -> None:
    if len(tokens) < text_length(seq_length, bos):
        raise ValueError(
            f"{label} has {len(tokens)} tokens, fewer than one window of seq_length={seq_length}: "
            "use a smaller seq_length or more text"
        )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")

"""Conversations in the tokenizer's chat template, as windows of tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grail_hf.calibration.corpora import is_file, read_decoded
from grail_hf.calibration.windows import bos_token, text_length, with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Conversation: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chats:
    conversations: Sequence[Any]
    label: str


def read_conversations(source: Any) -> Chats | None:
    """The conversations that `source` holds or names; None where it is text."""
    items = source if isinstance(source, list) else [source]
    if isinstance(items[0], list | tuple):
        return Chats(items, f"given conversations ({len(items)})")
    paths = [Path(item) for item in items]
    if not all(path.suffix == ".jsonl" and is_file(path) for path in paths):
        return None
    conversations = [messages for path in paths for messages in _read_messages(path)]
    return Chats(conversations, ", ".join(path.name for path in paths))


def _read_messages(path: Path) -> list[Any]:
    """The conversations of a .jsonl file, one a line."""
    found = []
    for number, line in enumerate(read_decoded(path).split("\n"), start=1):
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


def chat_windows(
    chats: Chats,
    tokenizer: PreTrainedTokenizerBase,
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
    length = text_length(seq_length, first)
    windows: list[Tensor] = []
    for index in order:
        ids = _chat_ids(chats, index, tokenizer)
        pieces = torch.split(torch.tensor(ids[1:] if ids[0] == first else ids), length)
        windows += [with_bos(piece[None], first)[0] for piece in pieces]
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


def _chat_ids(chats: Chats, index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """One batch of rows, and a mask where they differ in length."""
    ids = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}

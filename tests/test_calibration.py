"""Calibration text: every kind of input, its sampling, and every refusal."""

import copy
import dataclasses
import functools
import gzip
import json
import logging
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, tiny_architecture, tiny_model

import grail_hf
from grail_hf import GrailConfig, perplexity
from grail_hf.calibration import corpora, tokens
from grail_hf.calibration.corpora import CORPORA
from grail_hf.calibration.tokens import read_calibration, token_batches, with_own_samples
from grail_hf.calibration.windows import bos_token, corpus_tokens, token_windows, with_random_tokens

VOCAB = 4096


@pytest.fixture
def batches_of(tokenizer):
    """`token_batches` with small defaults, any of which a test may replace."""

    def make(data, **options):
        defaults = {
            "tokenizer": tokenizer,
            "vocab_size": VOCAB,
            "num_samples": 5,
            "seq_length": 16,
            "batch_size": 2,
            "seed": 0,
        }
        return token_batches(data, **(defaults | options))

    return make


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """Let `datasets` work offline and forget what it has read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def ids_of(result):
    return torch.cat([batch["input_ids"] for batch in result.batches])


def tokens_of(text, tokenizer):
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def is_window_of(window, tokens):
    return bool((tokens.unfold(0, len(window), 1) == window).all(dim=1).any())


def write_jsonl(path, column, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({column: document}) + "\n" for document in documents)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines)


# Text


def test_windows_are_drawn_from_the_joined_text(batches_of, tokenizer, jargon_test):
    result = batches_of(jargon_test)
    shapes = [tuple(batch["input_ids"].shape) for batch in result.batches]
    assert shapes == [(2, 16), (2, 16), (1, 16)]
    assert all(set(batch) == {"input_ids"} for batch in result.batches)
    assert (result.num_samples, result.num_tokens) == (5, 80)
    assert result.source == "jargon-test.txt: 5 random windows of 16 tokens, seed 0"
    tokens = tokens_of(jargon_test.read_text(), tokenizer)
    windows = ids_of(result)
    assert windows.dtype == torch.int64
    assert all(is_window_of(window, tokens) for window in windows)
    assert len(torch.unique(windows, dim=0)) == 5


def test_seed_decides_the_windows_and_batch_size_does_not(batches_of, jargon_test):
    first, again = batches_of(jargon_test), batches_of(jargon_test, batch_size=5)
    other = batches_of(jargon_test, seed=1)
    assert torch.equal(ids_of(first), ids_of(again))
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(ids_of(first), ids_of(other))
    assert first.fingerprint != other.fingerprint


def test_fingerprint_covers_shape_order_and_mask(batches_of):
    row = torch.arange(8)
    padded = {"input_ids": row.view(1, 8), "attention_mask": torch.tensor([[1] * 7 + [0]])}
    variants = [row.view(1, 8), row.view(2, 4), row.view(2, 4).flip(0), [padded]]
    # Without their lengths, these two would be the same run of ids and ones of the mask.
    variants += [torch.tensor([[5, 6, 1, 1]]), torch.tensor([[5, 6], [1, 1]])]
    assert len({batches_of(variant).fingerprint for variant in variants}) == 6


def test_the_first_and_the_last_window_can_be_drawn(batches_of, tokenizer):
    tokens = tokens_of("the end of the text", tokenizer)
    windows = ids_of(
        batches_of(["the end of the text"], seq_length=len(tokens) - 1, num_samples=30)
    )
    assert {tuple(w) for w in windows.tolist()} == {
        tuple(tokens[:-1].tolist()),
        tuple(tokens[1:].tolist()),
    }


def test_every_form_of_the_same_text_is_the_same(batches_of, tmp_path, monkeypatch, jargon_test):
    first, second = jargon_test.read_text()[:3000], jargon_test.read_text()[3000:6000]
    (tmp_path / "a.txt").write_text(first)
    (tmp_path / "b.txt").write_text(second)
    (tmp_path / "both.txt").write_text(f"{first}\n\n{second}")
    with gzip.open(tmp_path / "both.txt.gz", "wt") as file:
        file.write(f"{first}\n\n{second}")
    with lzma.open(tmp_path / "both.txt.xz", "wt") as file:
        file.write(f"{first}\n\n{second}")
    forms = [
        [first, second],
        (text for text in (first, second)),
        tmp_path / "both.txt",
        str(tmp_path / "both.txt"),
        tmp_path / "both.txt.gz",
        str(tmp_path / "both.txt.xz"),
        [tmp_path / "a.txt", tmp_path / "b.txt"],
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
    ]
    assert len({batches_of(form).fingerprint for form in forms}) == 1
    swapped = batches_of([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert swapped.fingerprint != batches_of(tmp_path / "both.txt").fingerprint
    assert swapped.source.startswith("b.txt, a.txt: ")


def test_tokenising_a_long_text_is_silent(batches_of, tokenizer, jargon_test, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    tokenizer.deprecation_warnings.clear()  # the tokenizer warns once only
    try:
        tokenizer(jargon_test.read_text())
        assert "longer than the specified maximum" in caplog.text, "the check below would be empty"
        tokenizer.deprecation_warnings.clear()
        caplog.clear()
        batches_of(jargon_test)
        assert caplog.text == ""
    finally:
        transformers_logging.disable_propagation()


def test_special_tokens_stand_at_the_ends_only(batches_of, tokenizer, jargon_test):
    from tokenizers.processors import TemplateProcessing

    fast = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        )
    )
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokens = corpus_tokens([jargon_test.read_text()[:500]] * 3, fast)
    assert (tokens == 0).nonzero().tolist() == [[0]]


def test_overlapping_windows_are_warned_about_once(batches_of, tokenizer, caplog):
    text = "hacker " * 20
    count = len(tokens_of(text, tokenizer))
    with caplog.at_level(logging.WARNING, logger="grail_hf.calibration"):
        batches_of([text], num_samples=count // 16)
        assert not caplog.records
        batches_of([text], num_samples=50)
    (record,) = caplog.records
    assert f"{count} tokens for 50 windows of 16" in record.getMessage()


# BOS


def drawn(tokens, seq_length=16, num_samples=5, seed=0):
    """Random windows of tokens, as GPTQ draws them."""
    generator = torch.Generator().manual_seed(seed)
    last = len(tokens) - seq_length
    starts = [int(torch.randint(last + 1, (1,), generator=generator)) for _ in range(num_samples)]
    return torch.stack([tokens[start : start + seq_length] for start in starts])


def test_each_window_starts_with_bos_where_the_tokenizer_adds_one(
    batches_of, tokenizer, bos_tokenizer, jargon_test
):
    result = batches_of(jargon_test, tokenizer=bos_tokenizer)
    tokens = tokens_of(jargon_test.read_text(), tokenizer)
    windows = torch.cat([torch.zeros(5, 1, dtype=torch.int64), drawn(tokens, 15)], dim=1)
    assert torch.equal(ids_of(result), windows)
    assert (
        result.source == "jargon-test.txt: 5 random windows of 16 tokens, BOS first in each, seed 0"
    )
    assert result.summary()["bos"] is True
    forced = batches_of(jargon_test, bos=True)
    assert (forced.fingerprint, forced.bos) == (result.fingerprint, True)


@pytest.mark.parametrize("bos", ["auto", False])
def test_windows_without_bos_are_those_of_gptq(
    batches_of, tokenizer, bos_tokenizer, jargon_test, bos
):
    """Which has special tokens where the tokenizer puts them, at the ends of the whole text."""
    tokens = tokens_of(jargon_test.read_text(), tokenizer)
    result = batches_of(jargon_test, bos=bos)
    assert torch.equal(ids_of(result), drawn(tokens))
    assert result.source == "jargon-test.txt: 5 random windows of 16 tokens, seed 0"
    assert result.summary()["bos"] is False
    if bos is False:
        tokens = torch.cat([torch.tensor([0]), tokens])
        windows = batches_of(jargon_test, bos=False, tokenizer=bos_tokenizer)
        assert torch.equal(ids_of(windows), drawn(tokens))
        windows = token_windows(jargon_test, bos_tokenizer, seq_length=100, bos=False)
        assert torch.equal(windows.flatten(), tokens[: len(tokens) // 100 * 100])


def test_windows_for_perplexity_hold_all_of_the_text_behind_their_bos(
    tokenizer, bos_tokenizer, jargon_test
):
    tokens = tokens_of(jargon_test.read_text(), tokenizer)
    windows = token_windows(jargon_test, bos_tokenizer, seq_length=100)
    assert windows.shape == (len(tokens) // 99, 100)
    assert not windows[:, 0].any()
    assert torch.equal(windows[:, 1:].flatten(), tokens[: len(windows) * 99])
    assert torch.equal(token_windows(jargon_test, tokenizer, seq_length=100, bos=True), windows)


def test_a_text_of_one_window_is_enough(batches_of, tokenizer, bos_tokenizer):
    tokens = tokens_of("the end of the text", tokenizer)
    options = {"tokenizer": bos_tokenizer, "num_samples": 1}
    whole = batches_of(["the end of the text"], seq_length=len(tokens) + 1, **options)
    assert ids_of(whole).tolist() == [[0, *tokens.tolist()]]
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, fewer than one window"):
        batches_of(["the end of the text"], seq_length=len(tokens) + 2, **options)


def test_a_window_of_one_document_starts_with_bos_too(batches_of, tokenizer, bos_tokenizer, c4):
    train, validation = c4
    documents = [tokens_of(document, tokenizer) for document in train]
    longest = max(map(len, documents))
    windows = ids_of(batches_of("c4", tokenizer=bos_tokenizer, seq_length=longest, num_samples=4))
    assert not windows[:, 0].any()
    (document,) = [tokens for tokens in documents if len(tokens) == longest]
    assert all(is_window_of(window, document) for window in windows[:, 1:])
    evaluated = token_windows("c4", bos_tokenizer, seq_length=33)
    tokens = tokens_of(" ".join(validation[:1100]), tokenizer)
    assert torch.equal(evaluated[:, 1:].flatten(), tokens[: 256 * 32])


def test_bos_that_cannot_be_had(batches_of, tokenizer, bos_tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "read_text", lambda *_: pytest.fail("read"))
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert bos_token(bare, "auto") is None
    with pytest.raises(ValueError, match="bos=True, but the tokenizer has no BOS token"):
        batches_of("c4", tokenizer=bare, bos=True)
    with pytest.raises(ValueError, match="bos=True, but the tokenizer has no BOS token"):
        token_windows("c4", bare, seq_length=8, bos=True)
    with pytest.raises(ValueError, match="bos='yes' must be True, False or 'auto'"):
        token_windows("c4", tokenizer, seq_length=8, bos="yes")
    with pytest.raises(ValueError, match="seq_length=1 leaves no room after BOS"):
        token_windows("c4", bos_tokenizer, seq_length=1)


# Conversations


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "What is a hacker?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Describe the history of the Jargon File to me."},
        {"role": "assistant", "content": "It began at Stanford.\u2028MIT took it over. " * 3},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, world"}],
]


@pytest.fixture
def chat_tokenizer(bos_tokenizer):
    bos_tokenizer.chat_template = CHATML
    return bos_tokenizer


def chat_tokens(index, tokenizer):
    """What the template above makes of one of the conversations, written out."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHATS[index])
    return tokens_of(text, tokenizer)


def order_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(CHATS), generator=generator).tolist()


def unpadded(result):
    """The sequences of a result, without the padding that follows them."""
    rows = []
    for batch in result.batches:
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, mask in zip(batch["input_ids"], masks, strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            rows.append(ids[mask.bool()].tolist())
    return rows


def test_each_conversation_starts_a_window(batches_of, tokenizer, chat_tokenizer, caplog):
    """In a random order; a long one is cut, and what is shorter than others of a batch padded."""
    expected = []
    for index in order_of(seed=0):
        ids = chat_tokens(index, tokenizer).tolist()
        expected += [ids[start : start + 32] for start in range(0, len(ids), 32)]
    lengths = [len(row) for row in expected]
    assert len(expected) > len(CHATS) and min(lengths) < max(lengths) == 32
    options = {"tokenizer": chat_tokenizer, "seq_length": 32}
    result = batches_of(CHATS, num_samples=len(expected), **options)
    assert unpadded(result) == expected
    assert not caplog.records
    assert (result.num_samples, result.num_tokens) == (len(expected), sum(lengths))
    widths = [max(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    assert [batch["input_ids"].shape[1] for batch in result.batches] == widths
    assert result.source == (
        f"given conversations (3): {len(expected)} windows of at most 32 tokens in the chat "
        "template, seed 0"
    )
    assert batches_of(result.batches, tokenizer=None).fingerprint == result.fingerprint

    first = batches_of((tuple(chat) for chat in CHATS), num_samples=2, **options)
    assert unpadded(first) == expected[:2]
    assert not caplog.records
    assert batches_of(CHATS, num_samples=50, **options).num_samples == len(expected)
    assert f"given conversations (3) give {len(expected)} windows, fewer than num_samples=50" in (
        caplog.text
    )
    seeds = [seed for seed in range(9) if order_of(seed) != order_of(0)]
    other = batches_of(CHATS, num_samples=50, seed=seeds[0], **options)
    assert sorted(unpadded(other)) == sorted(expected) and unpadded(other) != expected


@pytest.mark.parametrize(
    ("adds", "written", "bos", "starts"),
    [
        (True, "", "auto", False),
        (True, "", True, True),
        (True, "{{ bos_token }}", "auto", True),
        (True, "{{ bos_token }}", True, True),
        (True, "{{ bos_token }}", False, False),
        (False, "{{ bos_token }}", "auto", False),  # SmolLM2's begins a message
        (False, "{{ bos_token }}", True, True),
    ],
)
def test_windows_of_a_conversation_start_with_bos_if_tokenizer_and_template_do(
    batches_of, tokenizer, bos_tokenizer, adds, written, bos, starts
):
    """It is not doubled."""
    chat_tokenizer = bos_tokenizer if adds else copy.deepcopy(tokenizer)
    chat_tokenizer.chat_template = written + CHATML
    ids = chat_tokens(1, tokenizer).tolist()
    if starts:
        expected = [[0, *ids[start : start + 31]] for start in range(0, len(ids), 31)]
    else:
        ids = [0, *ids] if written else ids
        expected = [ids[start : start + 32] for start in range(0, len(ids), 32)]
    options = {"tokenizer": chat_tokenizer, "seq_length": 32, "num_samples": 50}
    result = batches_of(CHATS[1:2], bos=bos, **options)
    assert unpadded(result) == expected and len(expected) > 1
    assert result.summary()["bos"] is starts
    assert ("BOS first in each" in result.source) is starts


def test_conversations_in_files(batches_of, chat_tokenizer, tiny_llama, tmp_path):
    """One in a line, whose strings may hold other line separators than the line feed."""
    options = {"tokenizer": chat_tokenizer, "seq_length": 32}
    expected = batches_of(CHATS, **options)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in CHATS]
    (tmp_path / "all.jsonl").write_text("".join(lines), "utf-8")
    (tmp_path / "a.jsonl").write_text(lines[0] + "\n", "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(lines[1:]), "utf-8")
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for form in (tmp_path / "all.jsonl", str(tmp_path / "all.jsonl"), parts, map(str, parts)):
        assert batches_of(form, **options).fingerprint == expected.fingerprint
    assert batches_of(parts, **options).source.startswith("a.jsonl, b.jsonl: 5 windows of at")
    config = GrailConfig(sparsity=0.3, num_samples=5, seq_length=32, batch_size=2, random_tokens=0)
    read = read_calibration(tiny_llama, chat_tokenizer, tmp_path / "all.jsonl", config)
    assert read.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([CHATS[0], "a text"], TypeError, "list of list, str: give"),
        ([CHATS[0], []], ValueError, r"conversation 1 of given .* is \[\]: it must be a list of"),
        ([[{"role": "user"}]], ValueError, r"has \{'role': 'user'\} as message 0: it must map"),
        ([[1, 2, 3]], ValueError, "has 1 as message 0: it must map 'role' and 'content'"),
        (CHATS[0], ValueError, "no 'input_ids', only .*: conversations are lists of messages"),
        (
            [[CHATS[0][0] | {"role": "tool"}]],
            ValueError,
            "template refuses conversation 0.*no tool",
        ),
        ([[CHATS[0][0] | {"content": 3}]], ValueError, "template refuses conversation 0 of given"),
    ],
)
def test_unusable_conversations(batches_of, chat_tokenizer, given, error, message):
    refusal = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    whole = CHATML.replace("{{ message['content'] }}", "{{ '' + message['content'] }}")
    chat_tokenizer.chat_template = refusal + whole
    with pytest.raises(error, match=message) as raised:
        batches_of(given, tokenizer=chat_tokenizer)
    assert "\n" not in str(raised.value)


def test_conversations_need_a_chat_template_and_messages(batches_of, chat_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="need a chat template, and the tokenizer has none"):
        batches_of(CHATS)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        batches_of(CHATS, tokenizer=None)
    with pytest.raises(ValueError, match=r"token id .* outside \[0, 300\)"):
        batches_of(CHATS, tokenizer=chat_tokenizer, vocab_size=300)
    (path := tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no conversation"):
        batches_of(path, tokenizer=chat_tokenizer)
    good = json.dumps({"messages": CHATS[0]})
    for bad in ('{"text": "mine"}', "[1]", "{"):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=r"a\.jsonl is a table, .* no 'messages' in line 2"):
            batches_of(path, tokenizer=chat_tokenizer)
    path.write_text(good)
    (tmp_path / "b.txt").write_text("a text")
    for given in ([path, tmp_path / "b.txt"], [tmp_path / "b.txt", path]):
        with pytest.raises(ValueError, match=r"a\.jsonl is a table, .*conversations are for"):
            batches_of(given, tokenizer=chat_tokenizer)
    with pytest.raises(ValueError, match=r"a\.jsonl is a table"):
        token_windows(path, chat_tokenizer, seq_length=8)


# Ready-made tokens


def test_tensor_is_used_whole(batches_of):
    given = torch.arange(21, dtype=torch.int32).view(7, 3)
    result = batches_of(given, tokenizer=None, num_samples=2, seq_length=99)
    assert [len(batch["input_ids"]) for batch in result.batches] == [2, 2, 2, 1]
    assert ids_of(result).dtype == torch.int64
    assert torch.equal(ids_of(result), given.long())
    assert result.source == "given tensor of 7 x 3 tokens"


def test_batches_are_used_whole_with_their_masks(batches_of, tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="!")
    padded = tokenizer(["a hacker", "a very long entry of the file"], padding=True)
    full = {
        "input_ids": torch.ones(3, 4, dtype=torch.int64),
        "attention_mask": torch.ones(3, 4),
        "labels": torch.zeros(3, 4),
    }
    result = batches_of((batch for batch in (padded, full)), tokenizer=None)
    assert [set(batch) for batch in result.batches] == [
        {"input_ids", "attention_mask"},
        {"input_ids"},
    ]
    mask = torch.tensor(padded["attention_mask"])
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(result.batches[0]["attention_mask"], mask)
    assert torch.equal(result.batches[0]["input_ids"], torch.tensor(padded["input_ids"]))
    assert (result.num_samples, result.num_tokens) == (5, int(mask.sum()) + 12)
    assert batches_of(padded).fingerprint == batches_of([padded]).fingerprint
    assert batches_of([full]).fingerprint == batches_of(full["input_ids"]).fingerprint


# Datasets


@pytest.fixture
def table(tmp_path, jargon_test):
    """A dataset folder, and its documents by split."""
    documents = jargon_test.read_text().split("\n\n")
    splits = {"train": documents[:60], "test": documents[60:90]}
    for split, rows in splits.items():
        write_jsonl(tmp_path / "table" / f"{split}.jsonl", "entry", rows)
    return tmp_path / "table", splits


def test_dataset_folder(batches_of, tokenizer, table, datasets_cache):
    folder, splits = table
    reference = f"{folder}::entry"
    expected = batches_of(["\n\n".join(splits["train"])])
    result = batches_of(reference)
    assert result.fingerprint == expected.fingerprint
    assert result.source.startswith("table, train: ")
    assert batches_of(f"{folder}:test:entry").fingerprint != expected.fingerprint
    sliced = batches_of(f"{folder}:train[10:30]:entry")
    assert sliced.fingerprint == batches_of(["\n\n".join(splits["train"][10:30])]).fingerprint
    test = tokens_of("\n\n".join(splits["test"]), tokenizer)
    assert torch.equal(corpus_tokens(reference, tokenizer), test)
    train = tokens_of("\n\n".join(splits["train"]), tokenizer)
    assert torch.equal(corpus_tokens(reference, tokenizer, "train"), train)
    with pytest.raises(ValueError, match=r"no column of text 'text', only \['entry'\]"):
        batches_of(folder)


@pytest.mark.parametrize(
    ("reference", "attempts"),
    [
        ("imdb:", [("imdb", None)]),
        ("wikitext/raw-v1:train:entry", [("wikitext/raw-v1", None), ("wikitext", "raw-v1")]),
        ("org/name", [("org/name", None), ("org", "name")]),
        ("org/name/en.config:train:entry", [("org/name", "en.config")]),
    ],
)
def test_dataset_names(batches_of, table, datasets_cache, monkeypatch, reference, attempts):
    """What is asked of `datasets`, and that the last form asked for is the one that is read."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    folder, splits = table
    asked = []
    real = datasets.load_dataset

    def hub(name, config, found, **options):
        asked.append((name, config))
        if not found or (name, config) != attempts[-1]:
            raise DatasetNotFoundError(f"Dataset {name!r} doesn't exist")
        return real(str(folder), **options).rename_column("entry", "text")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub(*a, found=True, **k))
    found = batches_of(reference.replace("entry", "text"))
    assert asked == attempts
    assert found.fingerprint == batches_of(["\n\n".join(splits["train"])]).fingerprint

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub(*a, found=False, **k))
    with pytest.raises(FileNotFoundError, match=f"Dataset '{attempts[0][0]}' doesn't exist"):
        batches_of(reference)


def point_at(monkeypatch, name, folder):
    monkeypatch.setitem(CORPORA, name, dataclasses.replace(CORPORA[name], dataset=str(folder)))


def test_wikitext2(batches_of, tokenizer, table, tmp_path, datasets_cache, monkeypatch):
    _, splits = table
    folder = tmp_path / "wikitext"
    for config, offset in (("wikitext-103-raw-v1", 5), ("wikitext-2-raw-v1", 0)):
        for split, rows in splits.items():
            write_jsonl(folder / config / f"{split}.jsonl", "text", rows[offset:])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: wikitext-103-raw-v1\n  data_dir: wikitext-103-raw-v1\n"
        "- config_name: wikitext-2-raw-v1\n  data_dir: wikitext-2-raw-v1\n---\n"
    )
    point_at(monkeypatch, "wikitext2", folder)
    expected = batches_of(["\n\n".join(splits["train"])])
    assert batches_of("wikitext2").fingerprint == expected.fingerprint
    test = tokens_of("\n\n".join(splits["test"]), tokenizer)
    assert torch.equal(corpus_tokens("wikitext2", tokenizer), test)


def test_ptb(batches_of, tokenizer, table, tmp_path, datasets_cache, monkeypatch):
    import datasets

    _, splits = table
    for split, rows in splits.items():
        target = tmp_path / "ptb" / "penn_treebank" / split / "0000.parquet"
        target.parent.mkdir(parents=True)
        datasets.Dataset.from_dict({"sentence": rows}).to_parquet(target)
    point_at(monkeypatch, "ptb", tmp_path / "ptb")
    assert batches_of("ptb").fingerprint == batches_of([" ".join(splits["train"])]).fingerprint
    test = tokens_of(" ".join(splits["test"]), tokenizer)
    assert torch.equal(corpus_tokens("ptb", tokenizer), test)


@pytest.fixture
def c4(table, tmp_path, datasets_cache, monkeypatch):
    """The two files of c4, under a card that, as the hub's, gives sizes of the whole dataset."""
    _, splits = table
    folder = tmp_path / "c4"
    validation = splits["test"] * 40
    files = CORPORA["c4"].files
    write_jsonl(folder / files["train"], "text", splits["train"])
    write_jsonl(folder / files["validation"], "text", validation)
    sizes = "".join(
        f"  - name: {split}\n    num_bytes: 1\n    num_examples: 364868892\n"
        for split in ("train", "validation")
    )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n"
        "dataset_info:\n  config_name: en\n  features:\n  - name: text\n    dtype: string\n"
        f"  splits:\n{sizes}---\n"
    )
    point_at(monkeypatch, "c4", folder)
    return splits["train"], validation


def test_c4_draws_each_window_from_one_long_document(
    batches_of, tokenizer, c4, caplog, monkeypatch
):
    train, _ = c4
    documents = [tokens_of(document, tokenizer) for document in train]
    long = [tokens for tokens in documents if len(tokens) > 128]
    assert 4 < len(long) < len(documents)
    windows = ids_of(batches_of("c4", seq_length=128, num_samples=4))
    assert all(any(is_window_of(window, tokens) for tokens in long) for window in windows)
    assert len(torch.unique(windows, dim=0)) == 4
    assert torch.equal(windows, ids_of(batches_of("c4", seq_length=128, num_samples=4)))
    assert not torch.equal(windows, ids_of(batches_of("c4", seq_length=128, num_samples=4, seed=1)))

    assert not caplog.records
    monkeypatch.setitem(CORPORA, "c4", dataclasses.replace(CORPORA["c4"], test_documents=1))
    assert torch.equal(windows, ids_of(batches_of("c4", seq_length=128, num_samples=4)))
    few = batches_of("c4", seq_length=128, num_samples=3 * len(long))
    assert few.num_samples == 3 * len(long)
    with pytest.raises(ValueError, match=f"longest has {max(map(len, documents))}"):
        batches_of("c4", seq_length=max(map(len, documents)))


def test_one_file_of_c4_is_not_held_against_the_sizes_of_all(batches_of, c4, monkeypatch):
    """The installed release may not check; datasets 4.0 does, and fails on our card."""
    import datasets

    options = {}
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: options.update(k) or real(*a, **k)
    )
    batches_of("c4")
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert options["verification_mode"] == "no_checks"


def test_c4_evaluates_1100_documents_and_256_windows(tokenizer, c4):
    _, validation = c4
    assert len(validation) == 1200
    tokens = tokens_of(" ".join(validation[:1100]), tokenizer)
    assert torch.equal(corpus_tokens("c4", tokenizer), tokens)
    windows = token_windows("c4", tokenizer, seq_length=32)
    assert torch.equal(windows, tokens[: 256 * 32].view(256, 32))
    assert len(token_windows("c4", tokenizer, seq_length=32, max_windows=9)) == 9


# Windows for perplexity


def test_token_windows_are_consecutive(tokenizer, jargon_test):
    tokens = tokens_of(jargon_test.read_text(), tokenizer)
    windows = token_windows(jargon_test, tokenizer, seq_length=100)
    assert windows.shape == (len(tokens) // 100, 100)
    assert torch.equal(windows.flatten(), tokens[: windows.numel()])
    assert torch.equal(
        token_windows(jargon_test, tokenizer, seq_length=100, max_windows=3), windows[:3]
    )
    with pytest.raises(ValueError, match="max_windows=0"):
        token_windows(jargon_test, tokenizer, seq_length=100, max_windows=0)


# Tokens sampled from the model itself


@pytest.fixture
def sampled(tiny_llama):
    """`token_batches` of "self" without a tokenizer, with small defaults."""

    def make(model=None, **options):
        model = tiny_llama.eval() if model is None else model
        defaults = {"num_samples": 5, "seq_length": 12, "batch_size": 2, "seed": 0}
        size = {"vocab_size": model.get_input_embeddings().num_embeddings}
        options = size | defaults | {"tokenizer": None, "progress": False} | options
        return token_batches("self", model=model, **options)

    return make


def with_start(model, bos, eos=None):
    """The model with these special tokens, in its config and its generation settings."""
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = bos, eos
    return model


def test_a_sample_has_the_shape_of_windows_and_begins_as_texts_do(sampled):
    result = sampled()
    shapes = [tuple(batch["input_ids"].shape) for batch in result.batches]
    assert shapes == [(2, 12), (2, 12), (1, 12)]
    assert all(set(batch) == {"input_ids"} for batch in result.batches)
    assert result.source == (
        "sampled from the dense model itself: 5 sequences of 12 tokens at temperature 1, seed 0"
    )
    ids = ids_of(result)
    assert ids[:, 0].tolist() == [0] * 5
    assert len(torch.unique(ids, dim=0)) == 5


def test_a_sample_depends_on_the_seed_alone_and_leaves_the_random_state(sampled):
    first = sampled()
    torch.rand(3)
    state = torch.get_rng_state()
    again = sampled()
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint == first.fingerprint
    assert sampled(seed=1).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_sample_leaves_the_random_state_of_the_accelerator_there_is(sampled, monkeypatch, kind):
    """A fake one. Older releases of torch take it for CUDA unless they are told."""
    expected = sampled().fingerprint
    states = [torch.tensor([7], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8)]
    put_back = []
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(module, "set_rng_state", lambda *given: put_back.append(given))
    as_before = functools.partial(torch.random.fork_rng, device_type="cuda")
    monkeypatch.setattr(torch.random, "fork_rng", as_before)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device(kind))
    assert sampled().fingerprint == expected
    assert put_back == [(states[0], 0), (states[1], 1)]


@torch.no_grad()
def test_a_sample_follows_the_model_s_own_distribution(sampled, tiny_llama):
    """The loss on its tokens is the entropy of its predictions: neither sharpened nor cut off."""
    tiny_llama.generation_config.update(
        do_sample=False, temperature=0.1, top_k=5, top_p=0.5, min_p=0.2, repetition_penalty=3.0
    )
    settings = tiny_llama.generation_config
    said = settings.to_dict()
    ids = ids_of(sampled(num_samples=128, seq_length=32, batch_size=64))
    assert tiny_llama.generation_config is settings and settings.to_dict() == said
    log_p = tiny_llama(ids).logits[:, :-1].log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
    loss = -log_p.gather(2, ids[:, 1:, None]).mean()
    assert loss.item() == pytest.approx(entropy.item(), abs=0.15)


def test_an_end_of_text_may_be_sampled_and_ends_nothing(sampled):
    """The model predicts nothing else."""
    model = with_start(tiny_model("llama", tie_word_embeddings=False), bos=5, eos=7)
    model.model.norm.weight.data.zero_()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, SIZES["vocab_size"])
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.copy_(torch.where(torch.arange(97) == 7, 100.0, 0.0))
    assert ids_of(sampled(model)).tolist() == [[5] + [7] * 11] * 5


def test_without_a_first_token_a_sample_begins_with_random_ordinary_ones(sampled, tokenizer):
    model = with_start(tiny_model("qwen3"), bos=None, eos=[1, 2])  # 3 is padding
    many = {"num_samples": 2000, "seq_length": 2, "batch_size": 2000}
    starts = ids_of(sampled(model, **many))[:, 0]
    assert set(starts.tolist()) == set(range(97)) - {1, 2, 3}
    assert not torch.equal(ids_of(sampled(model, **many, seed=1))[:, 0], starts)

    with_start(model, bos=99)  # outside the vocabulary
    starts = ids_of(sampled(model, **many))[:, 0]
    assert set(starts.tolist()) == set(range(97)) - {3}
    starts = ids_of(sampled(model, **many, tokenizer=tokenizer))[:, 0]
    assert set(starts.tolist()) == {tokenizer.bos_token_id} == {0}

    class Bare:
        """A tokenizer without a first token, that knows fewer ids than there are embeddings."""

        bos_token_id = eos_token_id = pad_token_id = None
        all_special_ids = (4, 5)

        def __len__(self):
            return 50

    starts = ids_of(sampled(model, **many, tokenizer=Bare()))[:, 0]
    assert set(starts.tolist()) == set(range(50)) - {3, 4, 5}


def test_a_sample_is_no_longer_than_the_model_s_context(sampled, caplog):
    assert ids_of(sampled(seq_length=100, max_length=9)).shape == (5, 9)
    assert "using 9" in caplog.text


def test_a_bar_is_shown_where_it_is_wanted(sampled, capsys):
    sampled()
    assert capsys.readouterr().err == ""
    sampled(progress=True)
    assert "Sampling: 100%" in capsys.readouterr().err


def test_a_sample_needs_a_model_with_weights(batches_of, sampled):
    with pytest.raises(ValueError, match="'self' is sampled from the model, which is not given"):
        batches_of("self")
    with torch.device("meta"):
        skeleton = tiny_model("qwen2")
    with pytest.raises(ValueError, match="which is on the meta device: load the model with its"):
        sampled(skeleton)
    with pytest.raises(ValueError, match="seq_length=1 leaves nothing to sample"):
        sampled(seq_length=1)


# Refusals


def test_missing_sources(batches_of, tmp_path):
    for missing in (tmp_path / "no.txt", str(tmp_path / "no.txt"), "no/such.txt", "/no/such"):
        with pytest.raises(FileNotFoundError, match=f"'{missing}' is neither a file"):
            batches_of(missing)
    with pytest.raises(FileNotFoundError, match=r"wikitext2, ptb, c4\); did you mean 'wikitext2'"):
        batches_of("WikiText-2")
    (tmp_path / "there.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        batches_of([str(tmp_path / "there.txt"), "gone.txt"])


DARK = "It was a dark and stormy night, the rain fell in torrents. "


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (DARK * 100, "'It was a dark and stormy night...' is a text of 5,900 characters"),
        (DARK.replace(",", ":") * 100, "'It was a dark and stormy night...' is a text"),
        # Neither is a question to the hub, nor a suffix a table's.
        ("Chapter:it was a dark night " * 20, "'Chapter:it was a dark night Ch...' is a text"),
        ("night:\nrain fell", r"'night:\\nrain fell' is a text of 16 characters"),
        ("a\nb.jsonl", r"'a\\nb.jsonl' is a text"),
        ("rain\0fell", r"'rain\\x00fell' is a text"),
    ],
    ids=["long", "colon", "reference", "lines", "table", "null"],
)
def test_a_text_that_is_not_in_a_list(batches_of, tokenizer, tiny_llama, jargon_test, text, shown):
    """One line that says so, in any place where a path may stand."""
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for read in (
        lambda: batches_of(text),
        lambda: token_windows(text, tokenizer, seq_length=8),
        lambda: perplexity(tiny_llama, tokenizer, text),
        lambda: batches_of([jargon_test, text]),
    ):
        with pytest.raises(FileNotFoundError, match=shown) as raised:
            read()
        message = str(raised.value)
        assert message.endswith("a text of your own goes in a list: [text]")
        assert "\n" not in message and len(message) < 200


def test_names_too_long_for_a_file_are_not_found(batches_of, tmp_path):
    for name in (Path("x" * 5000), Path("x" * 5000, "y"), f"{tmp_path}/{'x' * 300}:train:text"):
        with pytest.raises(FileNotFoundError, match="goes in a list"):
            batches_of(name)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([" \n"], ValueError, "holds no text"),
        (["a short text"], ValueError, r"has \d tokens, fewer than one window of seq_length=16"),
        ([], ValueError, "empty list: zero batches"),
        (3, TypeError, "calibration is a int"),
        ([torch.ones(2, 2), "text"], TypeError, "list of Tensor, str"),
        (torch.ones(2, 3), TypeError, "dtype torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"shape \[3\]"),
        (torch.ones(0, 3, dtype=torch.int64), ValueError, r"shape \[0, 3\]"),
        (
            torch.tensor([[1, 2], [3, 4096]]),
            ValueError,
            r"4096 in sequence 1 at position 1, outside",
        ),
        (torch.tensor([[1, -1]]), ValueError, "-1 in sequence 0 at position 1"),
        ([{"labels": [[1]]}], ValueError, r"batch 0 has no 'input_ids', only \['labels'\]"),
        ([{"input_ids": [[1, 2], [3]]}], ValueError, "batch 0 is not rectangular"),
        ([{"input_ids": [[1]]}, {"input_ids": [1]}], ValueError, r"batch 1 has shape \[1\]"),
        ([{"input_ids": [[9999]]}], ValueError, "batch 0 has token id 9999"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            ValueError,
            r"shape \[1, 1\] for input_ids of shape \[1, 2\]",
        ),
        ({"input_ids": [[1]], "attention_mask": [[-1e9]]}, ValueError, "other than 0 and 1"),
        (
            {"input_ids": [[1, 1], [1, 1]], "attention_mask": [[0, 1], [0, 0]]},
            ValueError,
            "batch 0, sequence 1: attention_mask is all zero",
        ),
    ],
)
def test_unusable_data(batches_of, data, error, message):
    with pytest.raises(error, match=message):
        batches_of(data)


@pytest.mark.parametrize("name", ["vocab_size", "num_samples", "seq_length", "batch_size"])
def test_sizes_must_be_positive(batches_of, name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        batches_of(torch.ones(1, 1, dtype=torch.int64), **{name: 0})


def test_tokenizer_is_asked_for_before_the_text_is_read(batches_of, monkeypatch):
    monkeypatch.setattr(corpora, "read_text", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        batches_of("c4", tokenizer=None)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        corpus_tokens("c4", None)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        token_windows("c4", None, seq_length=8)


def test_a_tokenizer_of_another_model_is_found_out(batches_of, jargon_test):
    with pytest.raises(ValueError, match=r"jargon-test\.txt has token id .* outside \[0, 300\)"):
        batches_of(jargon_test, vocab_size=300)


def test_files_that_are_not_text(batches_of, tmp_path, tiny_llama_dir):
    with pytest.raises(ValueError, match=r"model\.safetensors is not UTF-8"):
        batches_of(tiny_llama_dir / "model.safetensors")
    shutil.copy(tiny_llama_dir / "config.json", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is a table"):
        batches_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", ["tensor", "batch", "batches", "token batches"])
@pytest.mark.parametrize("case", ["gpt2", "opt", "gptj", "gpt_neox", "qwen2", "gemma3"])
def test_given_tokens_beyond_the_model_s_positions(case, kind, caplog):
    """Refused where the model would raise IndexError, which it does on the spot, else warned of."""
    model, settings = tiny_architecture(case), GrailConfig(sparsity=0.3)
    limit = model.config.get_text_config().max_position_embeddings
    ids = torch.arange(limit + 1)[None] % 97

    def read(ids):
        short = {"input_ids": ids[:, :5]}
        given = {"tensor": ids, "batch": {"input_ids": ids}, "batches": [short, {"input_ids": ids}]}
        given["token batches"] = tokens.TokenBatches(({"input_ids": ids},), "mine", "")
        return read_calibration(model, None, given[kind], settings)

    assert read(ids[:, :limit]) and "more than" not in caplog.text
    says = f"{limit + 1} tokens, more than the model's {limit} positions"
    if case in ("gpt_neox", "qwen2", "gemma3"):
        assert read(ids) and says in caplog.text
        model(input_ids=ids)
    else:
        with pytest.raises(ValueError, match=says):
            read(ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


def test_a_fraction_of_a_text_s_tokens_is_replaced_by_random_ones(batches_of, less_text):
    options = {"num_samples": 64, "seq_length": 128}
    plain, noisy, again, other = (
        torch.cat(
            [
                batch["input_ids"]
                for batch in batches_of(
                    less_text, **options | {"random_tokens": fraction, "seed": 0}
                ).batches
            ]
        )
        for fraction in (0.0, 0.1, 0.1, 0.3)
    )
    assert torch.equal(noisy, again)
    for changed, fraction in ((noisy, 0.1), (other, 0.3)):
        # A draw may be the token that is there.
        assert (changed != plain).double().mean().item() == pytest.approx(fraction, abs=0.02)
    drawn = noisy[noisy != plain]
    assert drawn.double().mean().item() == pytest.approx(4096 / 2, rel=0.1), "over the vocabulary"


def test_special_tokens_are_neither_replaced_nor_drawn(tokenizer):
    special = torch.tensor(tokenizer.all_special_ids)
    ids = torch.arange(4096).repeat(20)
    changed = with_random_tokens(ids, 0.9, tokenizer, 5000, seed=0)
    assert torch.equal(torch.isin(changed, special), torch.isin(ids, special))
    assert changed.max() < len(tokenizer)
    assert with_random_tokens(ids, 0, tokenizer, 5000, seed=0) is ids


@pytest.mark.parametrize("given", [torch.arange(64).reshape(4, 16), "self"])
def test_tokens_that_are_no_text_are_left_alone(tiny_llama, tokenizer, given):
    config = {"sparsity": 0.3, "num_samples": 2, "seq_length": 8}
    found = [
        read_calibration(
            tiny_llama, tokenizer, given, GrailConfig(random_tokens=fraction, **config), False
        ).fingerprint
        for fraction in (0, 0.5)
    ]
    assert found[0] == found[1]


# Text that the model writes itself


@pytest.fixture
def written(tiny_llama, tokenizer, less_text):
    """The windows of a text, and those of which the model writes a part."""

    def read(device="cpu", bos=False, model=tiny_llama, **settings):
        defaults = {"sparsity": 0.3, "num_samples": 16, "seq_length": 24, "bos": bos}
        config = GrailConfig(**defaults | settings)
        text = read_calibration(model, tokenizer, less_text, config, progress=False)
        device = torch.device(device)
        own = with_own_samples(text, model, tokenizer, config, device, progress=False)
        return text, own

    return read


@pytest.mark.parametrize("bos", [False, True])
def test_the_model_writes_a_part_of_the_windows(written, bos):
    text, own = written(self_samples=0.25, bos=bos)
    changed = (ids_of(text) != ids_of(own)).any(dim=1)
    assert changed.sum() == 4
    assert not bos or torch.equal(ids_of(text)[:, 0], ids_of(own)[:, 0])
    assert own.source == f"{text.source}; 4 of them written by the dense model"
    assert own.fingerprint != text.fingerprint
    assert [len(b["input_ids"]) for b in own.batches] == [len(b["input_ids"]) for b in text.batches]
    assert len(torch.unique(ids_of(own)[changed], dim=0)) == 4


def test_what_the_model_writes_depends_on_the_seed_alone(written):
    first, again = (written(self_samples=0.25)[1] for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert written(self_samples=0.25, seed=1)[1].fingerprint != first.fingerprint


def test_what_the_model_writes_is_likely_to_it(written, tiny_llama):
    """Random ids would be about as likely as any: a nat per token apart is far."""
    _, own = written(self_samples=0.5, random_tokens=0.0)
    ids = ids_of(own)
    with torch.no_grad():
        loss = tiny_llama(input_ids=ids, labels=ids).loss.item()
        noise = torch.randint(10, 500, ids.shape)
        assert loss < tiny_llama(input_ids=noise, labels=noise).loss.item() - 1


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"num_samples": 24}, 2),
        ({"device": "meta"}, 0),
        ({"self_samples": 0}, 0),
        ({"num_samples": 3}, 0),
    ],
)
def test_by_default_a_model_writes_where_it_runs(written, settings, count):
    text, own = written(**settings)
    assert (ids_of(text) != ids_of(own)).any(dim=1).sum() == count


def test_given_tokens_are_never_rewritten(written, tiny_llama):
    config = GrailConfig(sparsity=0.3, self_samples=0.5)
    ids = torch.randint(10, 500, (4, 16))
    given = read_calibration(tiny_llama, None, ids, config, progress=False)
    own = with_own_samples(given, tiny_llama, None, config, torch.device("cpu"), progress=False)
    assert own is given


def test_from_disk_to_disk_the_model_cannot_write(tiny_llama_dir, less_text, tmp_path):
    with pytest.raises(ValueError, match=r"self_samples=0\.5 samples from the whole model"):
        grail_hf.compress_checkpoint(
            tiny_llama_dir, tmp_path / "out", less_text, sparsity=0.3, self_samples=0.5
        )

"""Perplexity against transformers' own loss, and lm-eval against ours."""

import functools
import json
import math
import sys

import pytest
import torch
from tiny_models import SIZES, config_of, random_model

from grail_hf.calibration.windows import token_windows
from grail_hf.evaluation import (
    EvaluationWindows,
    LanguageModelLoss,
    evaluate,
    language_model_loss,
    perplexity,
)


@pytest.fixture
def windows(tokenizer, jargon_test):
    return token_windows(jargon_test, tokenizer, seq_length=48, max_windows=5)


def reference_loss(model, windows):
    """Mean over windows of the loss that the model itself computes for labels."""
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in windows]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loss_is_that_of_transformers(tiny_llama, windows, batch_size):
    result = language_model_loss(tiny_llama, windows, batch_size=batch_size, progress=False)
    assert result.loss == pytest.approx(reference_loss(tiny_llama, windows), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.tokens, result.windows, result.seq_length) == (5 * 47, 5, 48)


def test_loss_of_low_precision_logits_is_fp32(tiny_llama, windows):
    model = tiny_llama.to(torch.bfloat16)
    with torch.no_grad():
        scores = torch.cat([model(input_ids=row[None]).logits[0, :-1] for row in windows])
    assert scores.dtype == torch.bfloat16
    chosen = scores.double().log_softmax(-1).gather(1, windows[:, 1:].reshape(-1, 1))
    result = language_model_loss(model, windows, batch_size=1, progress=False)
    assert result.loss == pytest.approx(-chosen.mean().item(), rel=1e-6)


def test_dense_perplexity_of_the_bundled_model(tiny_llama, tokenizer, jargon_test):
    value = perplexity(tiny_llama, tokenizer, jargon_test, seq_length=256, max_windows=120)
    assert value == pytest.approx(51.8, abs=0.1)


def test_every_form_of_text(tiny_llama, tokenizer, jargon_test, windows):
    expected = math.exp(reference_loss(tiny_llama, windows))
    for text in (jargon_test, str(jargon_test), [jargon_test.read_text()], [jargon_test]):
        value = perplexity(tiny_llama, tokenizer, text, seq_length=48, max_windows=5)
        assert value == pytest.approx(expected, rel=1e-6)
    assert perplexity(tiny_llama, None, windows) == pytest.approx(expected, rel=1e-6)
    assert perplexity(tiny_llama, None, windows, max_windows=2) == pytest.approx(
        math.exp(reference_loss(tiny_llama, windows[:2])), rel=1e-6
    )


def test_every_token_is_predicted_where_windows_start_with_bos(
    tiny_llama, tokenizer, bos_tokenizer, jargon_test
):
    text = [jargon_test.read_text()[:2000]]
    tokens = torch.tensor(tokenizer(text[0])["input_ids"])
    first = torch.zeros(1, dtype=torch.int64)
    count = len(tokens) // 47
    starting = torch.stack([torch.cat([first, row]) for row in tokens.split(47)[:count]])
    joined = torch.cat([first, tokens])
    joined = joined[: len(joined) // 48 * 48].view(-1, 48)
    for bos, windows in (("auto", starting), (True, starting), (False, joined)):
        report = evaluate(tiny_llama, bos_tokenizer, text=text, seq_length=48, bos=bos)
        assert report["loss"] == pytest.approx(reference_loss(tiny_llama, windows), rel=1e-6)
        assert report["tokens"] == len(windows) * 47
        assert report["bos"] is (bos is not False)
        value = perplexity(tiny_llama, bos_tokenizer, text, seq_length=48, bos=bos)
        assert value == report["perplexity"]
    report = evaluate(tiny_llama, tokenizer, text=text, seq_length=48)
    plain = tokens[: len(tokens) // 48 * 48].view(-1, 48)
    assert report["loss"] == pytest.approx(reference_loss(tiny_llama, plain), rel=1e-6)
    assert report["bos"] is False


@pytest.mark.parametrize(("context", "expected"), [(512, 512), (4096, 2048)])
def test_default_seq_length(tiny_llama, tokenizer, jargon_test, context, expected):
    tiny_llama.config.max_position_embeddings = context
    report = evaluate(tiny_llama, tokenizer, text=jargon_test, max_windows=1)
    assert (report["seq_length"], report["tokens"]) == (expected, expected - 1)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_windows_stay_within_the_context(model_type, tokenizer, jargon_test, caplog):
    """Text is cut to it. Given windows are the caller's, but a table of positions has its end."""
    sizes = SIZES | {"head_dim": None, "vocab_size": len(tokenizer)}
    model = random_model(config_of(sizes | {"model_type": model_type}))
    expected = perplexity(model, tokenizer, jargon_test, seq_length=64, max_windows=3)
    assert "64 positions" not in caplog.text
    settings = {"seq_length": 100, "max_windows": 3}
    assert perplexity(model, tokenizer, jargon_test, **settings) == expected
    report = evaluate(model, tokenizer, text=jargon_test, **settings)
    assert (report["seq_length"], report["perplexity"]) == (64, expected)
    assert "seq_length=100 is more than the model's 64 positions" in caplog.text
    caplog.clear()
    too_long = torch.ones(1, 65, dtype=torch.int64)
    if model_type == "gpt2":
        with pytest.raises(ValueError, match="65 tokens, more than the model's 64 positions"):
            perplexity(model, None, too_long)
    else:
        assert perplexity(model, None, too_long) > 0
        assert "65 tokens, more than the model's 64 positions" in caplog.text


def test_model_is_left_as_it_was(tiny_llama, windows):
    tiny_llama.train()
    frozen = tiny_llama.model.layers[0].eval()
    seen = []
    tiny_llama.model.layers[1].register_forward_pre_hook(lambda m, _: seen.append(m.training))
    language_model_loss(tiny_llama, windows, progress=False)
    assert seen == [False]
    assert tiny_llama.training and tiny_llama.lm_head.training and not frozen.training

    tiny_llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        language_model_loss(tiny_llama, windows, progress=False)
    assert tiny_llama.training


def test_progress_goes_to_stderr(tiny_llama, windows, capsys):
    language_model_loss(tiny_llama, windows)
    shown = capsys.readouterr()
    assert "5/5" in shown.err and not shown.out
    language_model_loss(tiny_llama, windows, progress=False)
    assert capsys.readouterr().err == ""


def test_a_perplexity_that_overflows_is_infinite():
    assert LanguageModelLoss(loss=1e4, tokens=1, windows=1, seq_length=2).perplexity == math.inf


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("allenai/c4/en:validation:text", "allenai/c4/en:validation:text"),
        ("{folder}/notes.txt", "notes.txt"),
        ("{folder}:test:text", "texts:test:text"),
        ("wikitext2", "wikitext2"),
    ],
)
def test_a_description_of_a_text_leaves_out_the_folders_it_lies_in(text, name, tmp_path):
    (folder := tmp_path / "texts").mkdir()
    (folder / "notes.txt").touch()
    windows = EvaluationWindows(text.format(folder=folder), torch.zeros(3, 7))
    assert windows.description() == {"evaluation text": name, "evaluation windows": "3 x 7 tokens"}


def test_loss_that_is_not_finite_names_the_window(tiny_llama, windows):
    windows = windows.clone()
    windows[windows == 5] = 6
    windows[3, 10] = 5
    # Untied, so that the poisoned embedding is read by window 3 only.
    tiny_llama.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="window 3 is nan"):
        language_model_loss(tiny_llama, windows, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.tensor([[1, 4096]]), ValueError, r"4096 in sequence 0 at position 1.*\[0, 4096\)"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"shape \[3\]"),
        (torch.ones(3, 1, dtype=torch.int64), ValueError, "windows of 1 token"),
        (torch.ones(3, 4), TypeError, r"dtype torch\.float32"),
    ],
)
def test_unusable_windows(tiny_llama, given, error, message):
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        language_model_loss(tiny_llama, given, progress=False)


def test_batch_size_must_be_positive(tiny_llama, windows):
    with pytest.raises(ValueError, match="batch_size=0"):
        language_model_loss(tiny_llama, windows, batch_size=0)


# lm-eval


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Index the folder of the test only: reading lm-eval's own tasks takes ten seconds."""
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)


@pytest.fixture
def rolling_task(tmp_path, monkeypatch, tokenizer, jargon_test):
    """A folder with the task `local_jargon`, and the text of its one document: 6 x 64 tokens."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ids = token_windows(jargon_test, tokenizer, seq_length=384, max_windows=1)
    text = tokenizer.decode(ids[0])
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_jargon.yaml").write_text(
        "task: local_jargon\n"
        "dataset_path: json\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n'
        "metric_list:\n"
        "  - metric: bits_per_byte\n"
        "  - metric: byte_perplexity\n"
    )
    return tmp_path / "tasks", text


def test_lm_eval_agrees_with_ours(tiny_llama, tokenizer, rolling_task, only_local_tasks):
    folder, text = rolling_task
    # lm-eval predicts all of the text, each window from the token before it, the first from bos.
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    windows = ids.unfold(0, 65, 64)
    ours = language_model_loss(tiny_llama, windows, progress=False)
    assert ours.tokens == 384

    tiny_llama.train()
    report = evaluate(
        tiny_llama,
        tokenizer,
        text=windows,
        tasks="local_jargon",
        seq_length=64,
        include_path=folder,
    )
    measured = report["tasks"]["local_jargon"]
    assert set(report["tasks"]) == {"local_jargon"}
    bits = ours.loss * ours.tokens / math.log(2)
    assert measured["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-4)
    assert measured["byte_perplexity"] == pytest.approx(2 ** measured["bits_per_byte"])
    assert report["loss"] == ours.loss and report["perplexity"] == ours.perplexity
    assert (report["tokens"], report["seq_length"]) == (384, 65)
    assert json.loads(json.dumps(report)) == report
    assert tiny_llama.training
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("adds", "bos", "expected"),
    [
        (True, "auto", True),
        (True, False, False),
        (True, True, True),
        (False, "auto", False),
        (False, True, True),
    ],
)
def test_lm_eval_starts_with_bos_where_windows_do(
    tiny_llama,
    tokenizer,
    bos_tokenizer,
    rolling_task,
    only_local_tasks,
    monkeypatch,
    *,
    adds,
    bos,
    expected,
):
    """It is passed explicitly, because the default of HFLM differs between its releases."""
    from lm_eval.models import huggingface

    seen = []

    class Spy(huggingface.HFLM):
        def __init__(self, *, add_bos_token=False, **settings):
            super().__init__(add_bos_token=add_bos_token, **settings)
            seen.append(self.tok_encode("a hacker"))

    monkeypatch.setattr(huggingface, "HFLM", Spy)
    given = bos_tokenizer if adds else tokenizer
    before = given("a hacker")["input_ids"]
    evaluate(
        tiny_llama,
        given,
        tasks="local_jargon",
        seq_length=64,
        bos=bos,
        include_path=rolling_task[0],
    )
    plain = tokenizer("a hacker")["input_ids"]
    assert seen == [[0, *plain] if expected else plain]
    assert given("a hacker")["input_ids"] == before


def test_report_holds_only_what_was_asked_for(
    tiny_llama, tokenizer, windows, rolling_task, only_local_tasks
):
    report = evaluate(tiny_llama, tokenizer, text=windows)
    assert set(report) == {"perplexity", "loss", "tokens", "seq_length"}
    report = evaluate(
        tiny_llama,
        tokenizer,
        tasks=" local_jargon, ",
        include_path=rolling_task[0],
        limit=1,
        num_fewshot=0,
    )
    assert set(report) == {"tasks"}


def test_what_cannot_be_evaluated_fails_before_the_model_runs(
    tiny_llama, tokenizer, windows, rolling_task, only_local_tasks, monkeypatch
):
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(tiny_llama, tokenizer)
    for tasks in ("", " , ", [], [""]):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(tiny_llama, tokenizer, tasks=tasks)
    with pytest.raises(ValueError, match=r"no task \['jargon', 'slang'\]"):
        folder = rolling_task[0]
        evaluate(tiny_llama, tokenizer, tasks="jargon, local_jargon,,slang ", include_path=folder)
    with pytest.raises(ValueError, match=r"no task \['jargon'\].*nearest: \['local_jargon'\]"):
        evaluate(
            tiny_llama, tokenizer, text=windows, tasks=["jargon"], include_path=rolling_task[0]
        )
    with pytest.raises(ValueError, match="tasks need a tokenizer"):
        evaluate(tiny_llama, None, text=windows, tasks="local_jargon")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r'pip install "grail-hf\[eval\]"'):
        evaluate(tiny_llama, tokenizer, text=windows, tasks="local_jargon")

"""The command line, run as a user runs it."""

import dataclasses
import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import safetensors.torch
import torch
import typer
from safetensors.torch import load_file
from tiny_models import ARCHITECTURE_CASES, SIZES, config_of
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from grail_hf import CompressionReport, GrailConfig
from grail_hf.checkpoints.folders import replaced_when_whole
from grail_hf.checkpoints.journal import Journal
from grail_hf.cli import app
from grail_hf.models.architectures import architectures_table
from grail_hf.options import takes_settings

runner = CliRunner()

QUICKLY = (
    *("--no-compensate", "--selector", "magnitude", "--allocation", "uniform"),
    *("--num-samples", 2, "--seq-length", 16),
)


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def default_arguments(tiny_llama_dir, less_text, tmp_path):
    return (
        *("compress", tiny_llama_dir, tmp_path / "out", "--sparsity", 0.5, "--selector", "wanda"),
        *("--calibration", less_text, "--num-samples", 8, "--seq-length", 64, "--device", "cpu"),
    )


@pytest.fixture
def compress_arguments(default_arguments):
    """Those where the widths, the text and the repair matter little: with the quickest of each."""
    quick = ("--allocation", "uniform", "--self-samples", 0, "--ridge", 1e-2, "--refit", 0)
    return (*default_arguments, *quick)


@pytest.fixture
def no_weights(monkeypatch):
    """No model may be loaded; its config, its tokenizer and its shapes may."""

    def refuse(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def settings_given_by(*flags: object) -> GrailConfig:
    """The settings that options stand for, from a command that only takes settings."""
    given = []
    only_settings = typer.Typer()

    @only_settings.command()
    @takes_settings
    def command(config: GrailConfig) -> None:
        given.append(config)

    arguments = ["--sparsity", "0.3", *map(str, flags)]
    result = runner.invoke(only_settings, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return given.pop()


def test_options_left_out_keep_the_defaults():
    assert settings_given_by() == GrailConfig(sparsity=0.3)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (("--attention-sparsity", 0.5), {"attention_sparsity": 0.5}),
        (("--selector", "wanda"), {"selector": "wanda"}),
        (("--allocation", "error"), {"allocation": "error"}),
        (("--no-compensate",), {"compensate": False}),
        (("--refit", 6), {"refit": 6}),
        (("--ridge", "1e-3"), {"ridge": 1e-3}),
        (("--ridge", 1), {"ridge": 1.0}),
        (("--ridge", "auto"), {"ridge": "auto"}),
        (("--bias", "auto"), {"bias": "auto"}),
        (("--bos",), {"bos": True}),
        (("--no-bos",), {"bos": False}),
        (("--multiple-of", 64), {"multiple_of": 64}),
        (("--multiple-of", "auto"), {"multiple_of": "auto"}),
        (("--ignore", -1, "--ignore", "self_attn"), {"ignore": (-1, "self_attn")}),
        (("--no-rehome",), {"rehome": False}),
        (("--device", "cuda:1"), {"device": "cuda:1"}),
        (("--solve-dtype", "float32"), {"solve_dtype": "float32"}),
        (("--checkpoint-every", 3), {"checkpoint_every": 3}),
        (("--checkpoint-every", "auto"), {"checkpoint_every": "auto"}),
    ],
)
def test_an_option_stands_for_its_setting(flags, settings):
    config, expected = settings_given_by(*flags), GrailConfig(sparsity=0.3, **settings)
    assert config == expected
    assert config.to_json() == expected.to_json(), "of the same types"


@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_every_setting_has_an_option(command):
    help = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for field in dataclasses.fields(GrailConfig):
        assert f"--{field.name.replace('_', '-')}" in help
        assert field.metadata["help"].split(".")[0] in help


def test_compress_and_evaluate(default_arguments, jargon_test, tmp_path_factory, tmp_path):
    """JSON alone on standard output; the saved model measures as in the report."""
    text = tmp_path_factory.mktemp("text") / "unseen.txt"
    text.write_text(jargon_test.read_text("utf-8")[:22_000], "utf-8")
    code, out, err = run(*default_arguments, "--eval", text, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["widths"] == {"attention": [2] * 6, "mlp": [512] * 6}
    assert report["evaluation"]["evaluation text"] == "unseen.txt"
    assert re.fullmatch(r"\d{3,} x 64 tokens", report["evaluation"]["evaluation windows"])
    assert report["evaluation"]["perplexity before"] < report["evaluation"]["perplexity after"]
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved
    assert {"grail.json", "README.md"} <= saved
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing half-written is left"

    code, out, err = run(
        *("evaluate", tmp_path / "out", "--text", text, "--seq-length", 64),
        *("--device", "cpu", "--json"),
    )
    assert code == 0, err
    measured = json.loads(out)["perplexity"]
    assert measured == pytest.approx(report["evaluation"]["perplexity after"], rel=1e-3)


@pytest.mark.parametrize("flags", [("--in-memory",), ("--disk-to-disk", "--bos")])
def test_windows_start_with_bos_where_the_tokenizer_adds_one(
    compress_arguments, tiny_llama_dir, bos_tokenizer, jargon_test, tmp_path, flags
):
    """In calibration and in both measurements, as report, card and JSON record."""
    source = shutil.copytree(tiny_llama_dir, tmp_path / "source")
    bos_tokenizer.save_pretrained(source)
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:4_000], "utf-8")
    code, out, err = run(
        *(
            "compress",
            source,
            *compress_arguments[2:],
            *flags,
            "--no-compensate",
            "--random-tokens",
            0,
        ),
        *("--eval", text, "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["calibration"]["bos"] is True
    assert report["config"]["bos"] == (True if "--bos" in flags else "auto")
    recorded = report["calibration"]["source"], report["evaluation"]["evaluation windows"]
    assert recorded[0].endswith("8 random windows of 64 tokens, BOS first in each, seed 0")
    assert re.fullmatch(r"\d+ x 64 tokens, BOS first in each", recorded[1])
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(words in card for words in recorded)
    measured = {}
    for flag in ("--bos", "--no-bos"):
        code, out, err = run(
            *("evaluate", tmp_path / "out", "--text", text, "--seq-length", 64, flag),
            *("--device", "cpu", "--json"),
        )
        assert code == 0, err
        measured[json.loads(out)["bos"]] = json.loads(out)["perplexity"]
    after = report["evaluation"]["perplexity after"]
    assert measured[True] == pytest.approx(after, rel=1e-3)
    assert measured[False] != pytest.approx(after, rel=1e-3)


def test_compress_without_data(compress_arguments, tmp_path):
    """Sampled once the weights are loaded: the model on the meta device has none."""
    code, out, err = run(*compress_arguments, "--calibration", "self", "--json")
    assert code == 1 and "self" in err, "one of several names is a file's"
    at = compress_arguments.index("--calibration") + 1
    arguments = (*compress_arguments[:at], "self", *compress_arguments[at + 1 :])
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    source = json.loads(out)["calibration"]["source"]
    assert source.startswith("sampled from the dense model itself: 8 sequences of 64 tokens")


def tensors_of(folder):
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def test_a_checkpoint_goes_from_disk_to_disk_where_memory_is_short(
    compress_arguments, jargon_test, tmp_path, monkeypatch
):
    """By default, where the weights fill half of the free memory; the weights are the same."""
    assert run(*compress_arguments)[0] == 0
    (tmp_path / "out").rename(tmp_path / "in memory")
    memory = psutil.virtual_memory()._replace(available=20 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:5_000], "utf-8")
    code, out, err = run(*compress_arguments, "--eval", text, "--json")
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 7
    found, same = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in memory")
    assert found.keys() == same.keys()
    assert all(torch.equal(found[name], same[name]) for name in same)
    measured = json.loads(out)["evaluation"]
    assert measured["perplexity before"] < measured["perplexity after"]
    assert CompressionReport.load(tmp_path / "out").evaluation == measured
    code, _, err = run(*compress_arguments, "--in-memory", "--resume")
    assert code == 1 and "--resume" in err


def test_a_model_that_is_replaced_is_measured_before(compress_arguments, jargon_test, tmp_path):
    """The output is the source: "before" is the dense model's perplexity all the same."""
    _, source, output, *rest = compress_arguments
    shutil.copytree(source, output)
    (output / "grail.json").touch()  # marks it as ours, which may be replaced
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:4_000], "utf-8")
    flags = ("--disk-to-disk", "--overwrite", "--json")
    code, out, err = run("compress", output, output, *rest, *flags, "--eval", text)
    assert code == 0, err
    measured = json.loads(out)["evaluation"]
    for when, folder in (("before", source), ("after", output)):
        code, out, err = run(
            *("evaluate", folder, "--text", text, "--seq-length", 64, "--device", "cpu", "--json")
        )
        assert code == 0, err
        found = json.loads(out)["perplexity"]
        assert measured[f"perplexity {when}"] == pytest.approx(found, rel=1e-3)
    assert measured["perplexity before"] < 0.9 * measured["perplexity after"]


def test_from_disk_to_disk_refusals_come_before_any_work(
    compress_arguments, less_text, jargon_test, tmp_path, no_weights
):
    """They also precede the source's evaluation, and a stopped run is left as it is."""
    journal = Journal(tmp_path / ".out.partial", {})
    journal.own.mkdir(parents=True)
    journal.write()
    arguments = (*compress_arguments, "--disk-to-disk", "--eval", jargon_test)
    for changes, words in (
        ((), "--resume"),
        (("--resume", "--calibration", tmp_path / "none"), "neither a file that exists"),
        (("--resume", "--eval", tmp_path / "none"), "neither a file that exists"),
        (("--resume", "--sparsity", 0.999), "cannot be reached"),
        (("--resume", "--device", "xyz"), "'xyz' is not a device"),
    ):
        code, _, err = run(*arguments, *changes)
        assert code == 1 and words in err
    sampled = ["self" if argument == less_text else argument for argument in arguments]
    code, _, err = run(*sampled)
    assert code == 1 and "samples from the whole model" in err
    assert Journal.exists(tmp_path / ".out.partial")


def test_an_interrupted_command_goes_on(compress_arguments, tmp_path):
    """A process of its own gets the signal that Ctrl+C sends, when its first layer is done."""
    longer = ("--num-samples", 24, "--seq-length", 128)  # to be in time for it
    arguments = [str(argument) for argument in (*compress_arguments, "--disk-to-disk", *longer)]
    journal = tmp_path / ".out.partial" / ".grail" / "journal.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "grail_hf", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it runs in the background ignore the signal, and so would this process.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (journal.is_file() and json.loads(journal.read_text())["layers"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*arguments)
    assert code == 1 and "--resume" in err
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 7


def test_inspect_reads_no_weights(tiny_llama_dir, tmp_path):
    """A folder with nothing but a config suffices, and gives the shapes of `compress`."""
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    code, out, err = run("inspect", tmp_path, "--sparsity", 0.3, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["widths"] == {"attention": [3] * 6, "mlp": [704] * 6}
    assert plan["new_model_type"] == "mistral"
    assert plan["refits"] == {"attention": [6, 6], "mlp": [6, 6]}
    before, after = plan["projection_parameters"]
    assert before == 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    assert after == 6 * (2 * 256 * 192 + 2 * 256 * 96 + 3 * 256 * 704)
    assert plan["total_parameters"][0] - plan["total_parameters"][1] == before - after
    # Half of X^T X, in blocks of 256 rows, and Y^T X. The passes up to them: q, k and v, half of
    # the scores and of what they weigh, the narrowed o, gate and up.
    moments = 256 * (2 * 256 + 2 * 256) + 1024 * (1024 + 256 + 2 * 256)
    passes = 256 * (256 + 2 * 128) + 1024 * 256 + 192 * 256 + 2 * 256 * 1024
    assert plan["estimate"]["operations"]["gram"] == 128 * 1024 * 6 * (moments + 2 * passes)


def test_inspect_takes_the_options_of_compress(tiny_llama_dir):
    """It shows their effect on the result and on memory, for a device that is absent too."""

    def inspected(*flags):
        code, out, err = run("inspect", tiny_llama_dir, "--sparsity", 0.3, "--json", *flags)
        assert code == 0, err
        return json.loads(out)

    plain, biased = (inspected("--ignore", "self_attn", *b) for b in ((), ("--bias", "auto")))
    before, after = (plan["total_parameters"][1] for plan in (plain, biased))
    assert after - before == 6 * (2 * plain["widths"]["mlp"][0] + 256), "of gate, up and down"
    host, split = (inspected("--device", device)["estimate"] for device in ("cpu", "cuda"))
    assert host["host_bytes"] >= split["host_bytes"] + split["accelerator_bytes"] > 0
    assert inspected("--seed", 7, "--fold", "linear")["widths"]
    assert "fold='odd'" in run("inspect", tiny_llama_dir, "--sparsity", 0.3, "--fold", "odd")[2]


@pytest.fixture
def hub(tiny_llama_dir, tmp_path, monkeypatch):
    """A hub's cache with a repository whose branch v1 is the bundled model, and main is not."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for number, branch in enumerate(("main", "v1")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit := f"{number}" * 40)
        shutil.copytree(tiny_llama_dir, snapshot := repository / "snapshots" / commit)
        if branch == "main":
            config = AutoConfig.from_pretrained(tiny_llama_dir, num_hidden_layers=1)
            AutoModelForCausalLM.from_config(config).save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "me/tiny"


def test_a_source_on_the_hub_can_be_pinned(hub, compress_arguments, jargon_test, tmp_path):
    def layers(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return len(json.loads(out)["widths"]["mlp"])

    assert layers("inspect", hub, "--sparsity", 0.5) == 1
    assert layers("inspect", hub, "--sparsity", 0.5, "--revision", "v1") == 6
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:4_000], "utf-8")
    tensors = []
    for way in ("--in-memory", "--disk-to-disk"):
        quick = ("--no-compensate", "--eval", text)
        arguments = ("compress", hub, tmp_path / way, *compress_arguments[3:], way, *quick)
        assert layers(*arguments, "--revision", "v1") == 6
        assert CompressionReport.load(tmp_path / way).base_model == hub
        tensors.append(tensors_of(tmp_path / way))
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    measured = []
    for where in (hub, *((hub, "--revision", branch) for branch in ("main", "v1"))):
        where = where if isinstance(where, tuple) else (where,)
        code, out, err = run("evaluate", *where, "--text", text, "--seq-length", 64, "--json")
        assert code == 0, err
        measured.append(json.loads(out)["perplexity"])
    assert measured[0] == measured[1] > 10 * measured[2]
    code, out, _ = run("infer", hub, "--revision", "v1")
    assert (code, out) == (0, 'Architecture("llama")\n')


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect", "infer"])
def test_a_folder_has_no_revision(command, tiny_llama_dir, compress_arguments):
    flags = {
        "compress": compress_arguments[2:],
        "evaluate": ("--text", "c4"),
        "inspect": ("--sparsity", 0.5),
        "infer": (),
    }
    code, out, err = run(command, tiny_llama_dir, *flags[command], "--revision", "v1")
    assert (code, out) == (1, "")
    assert "revision='v1' goes with a name on the hub" in err


def test_what_needs_no_tokenizer_does_without(tiny_llama_dir, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama_dir / name, source)
    command = ("compress", source, tmp_path / "out", "--sparsity", 0.5, *QUICKLY, "--calibration")
    code, _, err = run(*command, "self")
    assert code == 0, err
    assert not list((tmp_path / "out").glob("tokenizer*"))
    shutil.rmtree(tmp_path / "out")
    for extra in ((tiny_llama_dir / "config.json",), ("self", "--eval", tiny_llama_dir)):
        code, _, err = run(*command, *extra)
        assert code == 1 and "text needs a tokenizer" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--sparsity", 1.0), "sparsity=1.0 is outside [0, 1)"),
        (("--selector", "wnada"), "did you mean 'wanda'?"),
        (("--calibration", "no/such/file.txt"), "neither a file that exists nor a named corpus"),
        (("--ignore", "no_such_block"), "matches nothing"),
        (("--no-rehome", "--sparsity", 0.07, "--mlp-sparsity", 0), "or rehome=True"),
        (("--eval", "no/such/file.txt"), "neither a file that exists nor a named corpus"),
    ],
)
def test_bad_input_is_one_line(compress_arguments, tmp_path, changes, message):
    code, out, err = run(*compress_arguments, *changes)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compress", "evaluate", "export"])
def test_weights_that_are_cut_short_are_one_line(
    command, tiny_llama_dir, compress_arguments, jargon_test, tmp_path
):
    source = shutil.copytree(tiny_llama_dir, tmp_path / "source")
    (weights,) = source.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = run(
        *{
            "compress": (command, source, *compress_arguments[2:], "--in-memory"),
            "evaluate": (command, source, "--text", jargon_test),
            "export": (command, source, tmp_path / "out"),
        }[command]
    )
    assert (code, out) == (1, "")
    assert f"{source} is truncated or damaged" in err and "download it again" in err
    assert list(tmp_path.iterdir()) == [source]


def test_a_device_that_is_none_is_one_line(tiny_llama_dir, jargon_test):
    code, out, err = run("evaluate", tiny_llama_dir, "--text", jargon_test, "--device", "xyz")
    assert (code, out) == (1, "")
    assert "device='xyz' cannot be used here" in err


def test_output_folder_is_respected(compress_arguments, tmp_path):
    """A foreign folder is never touched; an earlier model only with --overwrite."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        code, _, err = run(*compress_arguments, *flags)
        assert code == 1
        assert "is not a compressed model" in err
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]

    (output / "thesis.tex").rename(output / "grail.json")
    assert "--overwrite" in run(*compress_arguments)[2]
    assert run(*compress_arguments, "--overwrite")[0] == 0
    assert json.loads((output / "grail.json").read_text())["sparsity"] == 0.5


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(OSError), replaced_when_whole(output) as folder:
        (folder / "new").touch()
        raise OSError("no space left on device")
    assert [path.name for path in output.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_disk_that_is_too_small_is_seen_before_any_work(
    compress_arguments, tmp_path, monkeypatch, no_weights
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = run(*compress_arguments)
    assert code == 1 and "GiB are to be written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full(tmp_path, monkeypatch):
    """Folders on disks that fill up while tensors are written to them."""
    folders, write = [tmp_path], safetensors.torch.save_file

    def save_file(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"cut short")
        if any(Path(path).is_relative_to(folder) for folder in folders):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(tensors, path, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    return folders


@pytest.mark.parametrize("place", ["temporary", "home"])
def test_what_cannot_be_saved_is_saved_elsewhere(
    place, full, compress_arguments, tmp_path, tmp_path_factory, monkeypatch
):
    """The message names the folder; nothing is left where it was to be."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("temporary", "home")}
    monkeypatch.setattr(tempfile, "tempdir", str(places["temporary"]))
    monkeypatch.setenv("HOME", str(places["home"]))
    if place == "home":
        full.append(places["temporary"])
    code, out, err = run(*compress_arguments, *QUICKLY, "--json")
    assert (code, out) == (1, "")
    assert f"{tmp_path / 'out'} cannot be written ([Errno 28] No space left on device" in err
    (rescued,) = places[place].iterdir()
    assert f"the compressed model is in {rescued} instead" in err
    assert list(tmp_path.iterdir()) == []
    model = AutoModelForCausalLM.from_pretrained(rescued)
    report = CompressionReport.load(rescued)
    assert model.config.intermediate_size == report.widths["mlp"][0] < 1024
    assert AutoTokenizer.from_pretrained(rescued).vocab_size == 4096
    assert not list(places["temporary" if place == "home" else "home"].iterdir())


def test_where_nothing_can_be_saved_that_is_said(full, compress_arguments, tmp_path, monkeypatch):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    code, _, err = run(*compress_arguments, *QUICKLY)
    assert code == 1 and "the compressed model is lost" in err
    assert str(temporary) in err and str(tmp_path / "none") in err
    assert list(tmp_path.iterdir()) == [temporary] and not list(temporary.iterdir())


def test_a_whole_folder_that_cannot_take_its_place_is_kept(tmp_path, monkeypatch):
    def refused(path, target):
        raise PermissionError(f"{path} cannot be renamed")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match=r"out cannot be replaced .*\.out\.partial"):
        with replaced_when_whole(tmp_path / "out") as folder:
            (folder / "new").touch()
    assert (tmp_path / ".out.partial" / "new").exists()


def test_module_runs_as_the_command():
    command = [sys.executable, "-m", "grail_hf", "inspect", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--sparsity" in done.stdout


def test_ridge_is_a_number_or_auto(compress_arguments, tmp_path):
    code, out, err = run(*compress_arguments, "--ridge", "much")
    assert code == 1 and "ridge='much'" in err
    code, out, err = run(*compress_arguments, "--ridge", "auto", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["config"]["ridge"] == "auto"
    assert len({group["damping"] for group in report["groups"]}) > 1


def test_bias_is_left_out_or_auto(compress_arguments):
    code, out, err = run(*compress_arguments, "--bias", "some")
    assert code == 1 and "bias='some'" in err
    code, out, err = run(*compress_arguments, "--bias", "auto", "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["bias"] == "auto"


def test_architectures_are_listed():
    code, out, _ = run("architectures")
    assert (code, out) == (0, architectures_table() + "\n")


def test_a_proposal_is_python(tmp_path):
    """From a config of many layers, of whose kinds each is seen."""
    config = config_of(
        SIZES
        | {"model_type": "vaultgemma", "num_hidden_layers": 40, "sliding_window": 7}
        | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 38}
    )
    config.save_pretrained(tmp_path)
    code, out, err = run("infer", tmp_path)
    assert (code, out) == (0, 'Architecture("vaultgemma")\n'), err


def test_a_proposal_that_cannot_be_made_is_one_line(tmp_path):
    config_of(SIZES | {"model_type": "mixtral"}).save_pretrained(tmp_path)
    code, out, err = run("infer", tmp_path)
    assert (code, out) == (1, "")
    assert "experts and the like are not supported" in err and "Traceback" not in err


def test_memory_that_runs_out_is_one_line(compress_arguments, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", full)
    code, out, err = run(*compress_arguments)
    assert (code, out) == (1, "") and err.splitlines()[-1] == "error: CUDA out of memory"
    assert "Traceback" not in err


def test_evaluation_runs_where_it_is_told(
    compress_arguments, tiny_llama_dir, jargon_test, tmp_path, monkeypatch
):
    """By default accelerate places the model; with a device, all of it is there."""
    from transformers import AutoModelForCausalLM

    load, asked = AutoModelForCausalLM.from_pretrained, []

    def noted(*arguments, device_map, **settings):
        asked.append(device_map)
        return load(*arguments, device_map=device_map, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:5_000], "utf-8")
    measure = ("evaluate", tiny_llama_dir, "--text", text, "--seq-length", 64)
    for device, where in (((), "auto"), (("--device", "cpu"), {"": torch.device("cpu")})):
        code, _, err = run(*measure, *device)
        assert code == 0, err
        assert asked.pop() == where
    code, _, err = run(*measure, "--device", "nowhere")
    assert code == 1 and "device='nowhere' cannot be used here" in err and not asked
    code, _, err = run(*compress_arguments, "--disk-to-disk", "--eval", text)
    assert code == 0, err
    assert asked == [{"": torch.device("cpu")}] * 2


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_vl", "qwen3_5"])
def test_models_with_a_decoder_inside(model_type, tiny_llama_dir, less_text, tmp_path):
    """The whole model is saved, with its processor's files and a card that loads it."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("transformers has none")
    case = ARCHITECTURE_CASES[model_type]
    inner = SIZES | case["text_config"] | {"vocab_size": 4096}
    config = config_of({"model_type": model_type} | case | {"text_config": inner})
    source, template = tmp_path / "in", "{{ messages[0].content }}"
    AutoModelForImageTextToText.from_config(config).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 7}')
    (source / "chat_template.jinja").write_text(template)

    share = ("--sparsity", 0.2, "--multiple-of", 1, "--allocation", "uniform")
    code, out, err = run("inspect", source, *share, "--json")
    assert code == 0, err
    widths = json.loads(out)["widths"]
    settings = (*share, "--calibration", less_text, "--num-samples", 8, "--seq-length", 32)
    for way in ("--in-memory", "--disk-to-disk"):
        output = tmp_path / way
        code, out, err = run("compress", source, output, *settings, way, "--json")
        assert code == 0, err
        assert json.loads(out)["widths"] == widths
        _, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
        assert not any(info.values())
        assert any("visual" in name or "vision" in name for name in tensors_of(output))
        assert (output / "preprocessor_config.json").read_text() == '{"size": 7}'
        assert (output / "chat_template.jinja").read_text() == template
        card = (output / "README.md").read_text()
        assert "pipeline_tag: image-text-to-text" in card
        assert "= AutoModelForImageTextToText.from_pretrained(" in card
        assert "CausalLM" not in card

"""The command line, run as a user runs it."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURE_CASES, SIZES, config_of
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from grail_hf import CompressionReport
from grail_hf.architectures import architectures_table
from grail_hf.cli import _measured_on, app, replaced_when_whole

runner = CliRunner()


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def compress_arguments(tiny_llama_dir, jargon_train, tmp_path):
    return (
        *("compress", tiny_llama_dir, tmp_path / "out", "--sparsity", 0.5, "--selector", "wanda"),
        *("--calibration", jargon_train, "--num-samples", 8, "--seq-length", 64, "--device", "cpu"),
    )


def test_compress_and_evaluate(compress_arguments, jargon_test, tmp_path):
    """JSON alone on standard output; the saved model measures what the report says."""
    code, out, err = run(*compress_arguments, "--eval", jargon_test, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["widths"] == {"attention": [2] * 6, "mlp": [512] * 6}
    assert report["evaluation"]["evaluation text"] == "jargon-test.txt"
    assert re.fullmatch(r"\d{3,} x 64 tokens", report["evaluation"]["evaluation windows"])
    assert report["evaluation"]["perplexity before"] < report["evaluation"]["perplexity after"]
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved
    assert {"grail.json", "README.md"} <= saved
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing half-written is left"

    code, out, err = run(
        *("evaluate", tmp_path / "out", "--text", jargon_test, "--seq-length", 64),
        *("--device", "cpu", "--json"),
    )
    assert code == 0, err
    measured = json.loads(out)["perplexity"]
    assert measured == pytest.approx(report["evaluation"]["perplexity after"], rel=1e-3)


def test_compress_without_data(compress_arguments, tmp_path):
    """Sampled once the weights are there: the skeleton on the meta device has nothing to say."""
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
    """By itself where the weights fill half of the free memory; the same weights come of it."""
    assert run(*compress_arguments)[0] == 0
    (tmp_path / "out").rename(tmp_path / "in memory")
    memory = psutil.virtual_memory()._replace(available=20 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (text := tmp_path / "text").write_text(jargon_test.read_text("utf-8")[:20_000], "utf-8")
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


def test_an_interrupted_command_goes_on(compress_arguments, tmp_path):
    """A process of its own gets the signal that Ctrl+C sends, when its first layer is done."""
    longer = ("--disk-to-disk", "--num-samples", 24, "--seq-length", 128)  # to be in time for it
    arguments = [str(argument) for argument in (*compress_arguments, *longer)]
    journal = tmp_path / ".out.partial" / ".grail" / "journal.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "grail_hf", *arguments], stderr=subprocess.PIPE, text=True
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
    """A folder with a config and nothing else suffices, and gives the shapes of `compress`."""
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    code, out, err = run("inspect", tmp_path, "--sparsity", 0.3, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["widths"] == {"attention": [3] * 6, "mlp": [704] * 6}
    assert plan["new_model_type"] == "mistral"
    before, after = plan["projection_parameters"]
    assert before == 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    assert after == 6 * (2 * 256 * 192 + 2 * 256 * 96 + 3 * 256 * 704)
    assert plan["total_parameters"][0] - plan["total_parameters"][1] == before - after
    # Half of X^T X, in blocks of 256 rows, and Y^T X, of a quarter of the tokens twice; again at
    # the new widths for the refit.
    moments = (256 * (2 * 256 + 2 * 256) + 1024 * (1024 + 256 + 2 * 256)) * 5 // 4
    moments += 192 * (2 * 192 + 2 * 256) + 704 * (704 + 256 + 2 * 256)
    assert plan["estimate"]["operations"]["gram"] == 128 * 1024 * 6 * moments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--sparsity", 1.0), "sparsity=1.0 is outside [0, 1)"),
        (("--selector", "wnada"), "did you mean 'wanda'?"),
        (("--calibration", "no/such/file.txt"), "neither a file that exists nor a named corpus"),
        (("--ignore", "no_such_block"), "matches nothing"),
        (("--no-rehome", "--sparsity", 0.3), "a stock llama config cannot say"),
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
    assert "experts and the like are not offered" in err and "Traceback" not in err


def test_the_text_of_an_evaluation_keeps_its_name(tmp_path):
    """But for the folders that a file or a data set lies in."""
    (tmp_path / "notes.txt").touch()
    for text, said in (
        ("allenai/c4/en:validation:text", "allenai/c4/en:validation:text"),
        (str(tmp_path / "notes.txt"), "notes.txt"),
        (f"{tmp_path}:test:text", f"{tmp_path.name}:test:text"),
        ("wikitext2", "wikitext2"),
    ):
        found = _measured_on(text, torch.zeros(3, 7))
        assert found == {"evaluation text": said, "evaluation windows": "3 x 7 tokens"}


def test_memory_that_runs_out_is_one_line(compress_arguments, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("grail_hf.cli.compress", full)
    code, out, err = run(*compress_arguments)
    assert (code, out) == (1, "") and "error: CUDA out of memory" in err and "Traceback" not in err


def test_evaluation_runs_where_it_is_told(
    compress_arguments, tiny_llama_dir, jargon_test, tmp_path, monkeypatch
):
    """Also when the model came from disk: by default accelerate chooses, else it is all there."""
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
def test_models_with_a_decoder_inside(model_type, tiny_llama_dir, jargon_train, tmp_path):
    """The whole of them goes in and comes out, with what makes a processor and how to load it."""
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

    share = ("--sparsity", 0.2, "--multiple-of", 1)
    code, out, err = run("inspect", source, *share, "--json")
    assert code == 0, err
    widths = json.loads(out)["widths"]
    settings = (*share, "--calibration", jargon_train, "--num-samples", 8, "--seq-length", 32)
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

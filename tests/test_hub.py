"""Which files of a hub's repository are asked for, and in which order."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import grail_hf
from grail_hf.cli import app

COMMIT = "c" * 40
INDEX = "model.safetensors.index.json"
QUICK = {"selector": "magnitude", "compensate": False, "num_samples": 2, "seq_length": 16}


@pytest.fixture(scope="session")
def repository(tiny_llama_dir, tmp_path_factory):
    """The bundled model in shards, beside the same weights under Mistral's names."""
    folder = shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("hub") / "repository")
    (weights,) = folder.glob("*.safetensors")
    weights.rename(folder / "consolidated.00.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="auto")
    model.save_pretrained(folder, max_shard_size="6MB")
    (folder / "original").mkdir()
    shutil.copy(folder / "config.json", folder / "original" / "params.json")
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A hub that has "me/tiny", with an empty cache before it."""
    cache = tmp_path / "cache"
    storage = cache / "models--me--tiny"
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    hub = SimpleNamespace(folder=repository, asked=[])

    def hf_hub_download(repo_id, filename, **_):
        hub.asked.append(filename)
        if not (hub.folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return shutil.copy(hub.folder / filename, snapshot / filename)

    def snapshot_download(repo_id, allow_patterns=None, ignore_patterns=None, **_):
        files = [str(p.relative_to(hub.folder)) for p in hub.folder.rglob("*") if p.is_file()]
        for name in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            hf_hub_download(repo_id, name)
        return str(snapshot)

    for function in (hf_hub_download, snapshot_download):
        for module in ("huggingface_hub", "transformers.utils.hub"):
            monkeypatch.setattr(f"{module}.{function.__name__}", function)
    monkeypatch.setattr(
        "transformers.utils.hub.has_file", lambda _, name, **__: (hub.folder / name).is_file()
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return hub


@pytest.fixture
def asked(hub):
    """The files that the hub was asked for so far."""
    return hub.asked


def is_weights(name):
    return name == INDEX or name.endswith((".safetensors", ".bin"))


@pytest.fixture
def command(less_text, tmp_path):
    return [
        *("compress", "me/tiny", tmp_path / "out", "--sparsity", 0.5, "--device", "cpu"),
        *("--selector", "magnitude", "--no-compensate", "--num-samples", 2, "--seq-length", 16),
        *("--calibration", less_text),
    ]


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr


@pytest.fixture(params=["by itself", "short of memory", "--disk-to-disk", "--in-memory"])
def way(request, monkeypatch):
    """Flags for a way of compressing; what it is by itself depends on the free memory."""
    if request.param == "short of memory":
        memory = psutil.virtual_memory()._replace(available=2**20)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return [request.param] if request.param.startswith("--") else []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--selector", "wnada"), "did you mean 'wanda'?"),
        (("--sparsity", 0.999), "cannot be reached"),
        (("--ignore", "atention"), "matches nothing"),
    ],
)
def test_what_the_config_shows_is_refused_before_more_is_fetched(
    changes, words, way, asked, command
):
    code, err = run(*command, *way, *changes)
    assert code == 1 and words in err
    assert set(asked) == {"config.json"}


def test_texts_are_refused_before_weights_are_fetched(way, asked, command):
    code, err = run(*command, *way, "--calibration", "no/such/file.txt")
    assert code == 1 and "neither a file that exists" in err
    assert asked[0] == "config.json" and not any(map(is_weights, asked))


def test_an_output_folder_is_refused_before_anything_is_fetched(way, asked, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    code, err = run(*command, *way)
    assert code == 1 and "is not a compressed model" in err
    assert not asked


@pytest.mark.parametrize("way", ["short of memory", "--in-memory"], indirect=True)
def test_only_the_weights_that_the_index_lists_are_fetched(way, asked, command, repository):
    code, err = run(*command, *way)
    assert code == 0, err
    shards = {path.name for path in repository.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert {name for name in asked if is_weights(name)} - {"model.safetensors"} == {INDEX, *shards}
    order = [asked.index(name) for name in ("config.json", "tokenizer.json", INDEX)]
    assert order == sorted(order)
    assert order[-1] < min(map(asked.index, shards))


def test_weights_without_an_index_are_one_file(hub, command, tiny_llama_dir):
    hub.folder = tiny_llama_dir
    code, err = run(*command, "--disk-to-disk")
    assert code == 0, err
    fetched = {name for name in hub.asked if (tiny_llama_dir / name).is_file()}
    assert {name for name in fetched if is_weights(name)} == {"model.safetensors"}


def test_a_repository_without_safetensors_is_refused(hub, command, tiny_llama_dir, tmp_path):
    hub.folder = tmp_path / "others"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_llama_dir, hub.folder, ignore=ignored)
    code, err = run(*command, "--disk-to-disk")
    assert code == 1 and "me/tiny has neither model.safetensors nor" in err


def test_inspect_fetches_the_config_alone(asked):
    code, err = run("inspect", "me/tiny", "--sparsity", 0.3)
    assert code == 0, err
    assert set(asked) == {"config.json"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"selector": "wnada"}, "did you mean 'wanda'"),
        ({"calibration": "self"}, "samples from the whole model"),
        ({"device": "cuda:99"}, "cannot be used here"),
    ],
)
def test_the_function_refuses_before_it_fetches_more(settings, words, asked, tmp_path):
    arguments = {"calibration": ["a text"], "sparsity": 0.5} | QUICK | settings
    with pytest.raises(ValueError, match=words):
        grail_hf.compress_checkpoint("me/tiny", tmp_path / "out", **arguments)
    assert set(asked) == {"config.json"}
    assert not (tmp_path / "out").exists()

"""From disk to disk against compressing in memory, file by file, and what is read and refused."""

import hashlib
import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_architectures import offered, shares
from tiny_models import ARCHITECTURE_CASES, batches, logits, tiny_architecture, tiny_model
from transformers import AutoModelForCausalLM

import grail_hf
from grail_hf import SELECTORS
from grail_hf.checkpoints.journal import INDEX, WEIGHTS, Journal, flushed, save_tensors
from grail_hf.checkpoints.layers import Pace
from grail_hf.checkpoints.reader import Checkpoint, read_spans

UP = "layers.1.mlp.up_proj.weight"
QUICK = {"multiple_of": 1, "target": "self", "refit": 0, "selector": "wanda", "ridge": 1e-3}


def tensors_of(folder):
    """All tensors of a checkpoint's files."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def saved(model, folder, **settings):
    """A folder that holds the model; `compress_checkpoint` cannot use its name."""
    model.save_pretrained(folder, **settings)
    return folder


def from_disk(source, output, **settings):
    return grail_hf.compress_checkpoint(source, output, batches(), progress=False, **settings)


def assert_as_in_memory(model, source, tmp_path, **settings):
    """The same report, tensors and config as compressing the model and saving it."""
    report = from_disk(source, tmp_path / "from disk", **settings)
    whole = type(model).from_pretrained(source, dtype=model.dtype)
    expected = grail_hf.compress(whole, calibration=batches(), progress=False, **settings)
    saved(whole, tmp_path / "in memory")
    found = tensors_of(tmp_path / "from disk")
    same = tensors_of(tmp_path / "in memory")
    assert found.keys() == same.keys()
    for name, tensor in same.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    configs = [
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("from disk", "in memory")
    ]
    assert configs[0] == configs[1]
    assert report.widths == expected.widths
    assert report.total_parameters == expected.total_parameters
    assert report.groups == expected.groups
    return report


@pytest.mark.parametrize("case", ARCHITECTURE_CASES)
def test_every_architecture_becomes_what_it_does_in_memory(case, tmp_path):
    model = tiny_architecture(case)
    if not offered(model):
        pytest.skip("nothing is offered")
    source = saved(model, tmp_path / "source")
    assert_as_in_memory(model, source, tmp_path, **QUICK | shares(model))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"sparsity": 0.3}, torch.float32),
        ({"sparsity": 0.3}, torch.bfloat16),
        ({"sparsity": 0.3, "selector": "fold"}, torch.float32),
        ({"sparsity": 0.3, "selector": "wanda++"}, torch.bfloat16),
        ({"sparsity": 0.3, "allocation": "search"}, torch.float32),
        ({"sparsity": 0.3, "ignore": (0,)}, torch.bfloat16),
        ({"sparsity": 0.3, "compensate": False}, torch.float32),
        ({"sparsity": 0.0}, torch.bfloat16),
    ],
    ids=str,
)
def test_settings_do_what_they_do_in_memory(settings, dtype, tmp_path):
    model = tiny_model("qwen3", dtype=dtype)
    source = saved(model, tmp_path / "source", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    assert_as_in_memory(model, source, tmp_path, multiple_of=1, **settings)


def test_the_result_loads_and_computes_what_the_model_in_memory_does(tmp_path):
    model = tiny_architecture("qwen3_moe")
    source = saved(model, tmp_path / "source")
    from_disk(source, tmp_path / "out", sparsity=0.3)
    grail_hf.compress(model, calibration=batches(), progress=False, sparsity=0.3)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(logits(loaded, batches()), logits(model, batches()))


def test_tied_weights_are_written_once(tmp_path):
    model = tiny_model("qwen2", tie_word_embeddings=True)
    source = saved(model, tmp_path / "source")
    from_disk(source, tmp_path / "out", sparsity=0.3)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_files_are_one_a_layer_with_an_index(tmp_path):
    model = tiny_model("llama")
    source = saved(model, tmp_path / "source")
    report = from_disk(source, tmp_path / "out", mlp_sparsity=0.3, attention_sparsity=0)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for layer in range(model.config.num_hidden_layers):
        holding = {
            file for name, file in index["weight_map"].items() if f".layers.{layer}." in name
        }
        assert holding == {f"model-{layer + 2:05d}-of-00004.safetensors"}
    assert report.source == {WEIGHTS: hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()}
    assert grail_hf.CompressionReport.load(tmp_path / "out") == report
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "out").glob(".*"))


def test_one_layer_at_a_time_has_weights(tmp_path, monkeypatch):
    """When units of any layer are chosen, all other parameters are on the meta device."""
    source = saved(tiny_model("llama"), tmp_path / "source")
    seen = []
    skeleton = Checkpoint.skeleton
    monkeypatch.setattr(Checkpoint, "skeleton", lambda self: seen.append(skeleton(self)) or seen[0])
    alive = []

    def look(group, stats):
        names = {name for name, p in seen[0].named_parameters() if not p.is_meta}
        alive.append({".".join(name.split(".")[:3]) for name in names} == {group.layer_name})
        return SELECTORS["wanda"](group, stats)

    from_disk(source, tmp_path / "out", mlp_sparsity=0.3, attention_sparsity=0, selector=look)
    assert alive == [True] * 3
    assert all(parameter.is_meta for parameter in seen[0].parameters())


def test_text_and_tokenizer_are_the_source_s(tiny_llama_dir, less_text, tmp_path):
    settings = {"sparsity": 0.5, "num_samples": 4, "seq_length": 32, **QUICK, "progress": False}
    report = grail_hf.compress_checkpoint(tiny_llama_dir, tmp_path / "out", less_text, **settings)
    for name in ("tokenizer.json", "generation_config.json", "README.md", "grail.json"):
        assert (tmp_path / "out" / name).is_file()
    assert report.calibration["samples"] == 4
    assert report.base_model == "tiny-llama"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("else")), OSError, "source"),
        (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, "neither"),
        (lambda folder: cut_short(folder / WEIGHTS), OSError, "safetensors is truncated"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), OSError, "safetensors is truncated"),
        (lambda folder: spoil_header(folder / WEIGHTS), OSError, "safetensors is truncated"),
        (lambda folder: drop(folder, UP), OSError, f"no weights for model.{UP}"),
        (lambda folder: drop(folder, "layers.2."), OSError, "no weights for model.layers.2"),
        (lambda folder: plant(folder, UP, torch.nan), FloatingPointError, UP),
        (lambda folder: widen(folder, UP), OSError, f"does not fit its config: .*{UP}"),
        (lambda folder: plant(folder, "embed", torch.inf), FloatingPointError, "embed_tokens"),
    ],
)  # fmt: skip
def test_a_source_that_is_not_whole_is_refused_by_name(spoil, error, message, tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source")
    spoil(source)
    with pytest.raises(error, match=message):
        from_disk(source, tmp_path / "out", mlp_sparsity=0.3, attention_sparsity=0, **QUICK)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def cut_short(path):
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 100)


def spoil_header(path):
    with path.open("rb+") as file:
        file.seek(12)
        file.write(b"\xff\xff")


def drop(folder, part):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if part not in name}, folder / WEIGHTS)


def plant(folder, part, value):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / WEIGHTS)


def widen(folder, part):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if part in name)
    save_file(tensors | {name: torch.cat([tensors[name]] * 2)}, folder / WEIGHTS)


def test_a_missing_shard_is_named(tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source", max_shard_size="20KB")
    (shard := sorted(source.glob("*.safetensors"))[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        Checkpoint.open(source)


@pytest.mark.parametrize("text", ['{"weight_map": {', '{"metadata": {}}', "[]"])
def test_an_index_that_is_none_is_named(text, tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source", max_shard_size="20KB")
    (source / INDEX).write_text(text)
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json is damaged"):
        Checkpoint.open(source)


def test_a_shard_without_a_tensor_of_the_index_is_named(tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source", max_shard_size="20KB")
    shard = sorted(source.glob("*.safetensors"))[2]
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(OSError, match=rf"{shard.name} lacks .*index"):
        Checkpoint.open(source)


def test_a_flipped_bit_in_the_hub_s_cache_is_seen(tmp_path):
    """There a file is a link to one that is named after its sha256."""
    source = saved(tiny_model("llama"), tmp_path / "source")
    data = (source / WEIGHTS).read_bytes()
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    (source / WEIGHTS).rename(blob)
    (source / WEIGHTS).symlink_to(blob)
    assert Checkpoint.open(source).verify(progress=False) == {WEIGHTS: blob.name}
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OSError, match=r"model.safetensors is damaged"):
        from_disk(source, tmp_path / "out", mlp_sparsity=0.3, attention_sparsity=0)
    assert not (tmp_path / "out").exists()


def test_spans_are_where_the_tensors_lie(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    for name, (start, end, shape) in read_spans(tmp_path / "x.safetensors").items():
        found = torch.frombuffer(bytearray(data[start:end]), dtype=tensors[name].dtype)
        assert torch.equal(found.reshape(shape), tensors[name])
    Checkpoint.open(tmp_path_with(tmp_path)).will_need(tensors)


def tmp_path_with(folder):
    os.link(folder / "x.safetensors", folder / WEIGHTS)
    return folder


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    assert flushed(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "replace", lambda path, other: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_tensors({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [path] == list(tmp_path.iterdir())


def test_self_calibration_is_refused_with_the_reason(tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source")
    with pytest.raises(ValueError, match="samples from the whole model"):
        grail_hf.compress_checkpoint(source, tmp_path / "out", "self", sparsity=0.5, **QUICK)


def test_what_is_used_of_transformers_is_still_there():
    """Semi-private; where this fails, `checkpoints/converter.py` needs a revision."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

    def parameters(function):
        return list(inspect.signature(function).parameters)

    assert parameters(get_model_conversion_mapping)[0] == "model"
    assert parameters(loading.rename_source_key)[:5] == [
        *("source_key", "weight_renamings", "weight_converters"),
        *("base_model_prefix", "meta_state_dict"),
    ]
    assert parameters(loading.convert_and_load_state_dict_in_model)[:3] == [
        *("model", "state_dict", "load_config"),
    ]
    assert parameters(loading.revert_weight_conversion) == ["model", "state_dict"]
    assert {"dtype", "dtype_plan", "weight_mapping"} <= set(parameters(LoadStateDictConfig))
    assert parameters(PreTrainedModel._get_dtype_plan) == ["self", "dtype"]
    assert "recompute_mapping" in parameters(PreTrainedModel.tie_weights)


def test_a_journal_reads_as_it_was_written(tmp_path):
    journal = Journal(tmp_path, {"sparsity": 0.3, "ignore": []}, notes={"widths": {"mlp": [3]}})
    journal.add_shard("model-00001-of-00002.safetensors", {"a": torch.ones(2)})
    journal.write()
    assert Journal.exists(tmp_path) and Journal.read(tmp_path) == journal
    journal.check_identity({"sparsity": 0.3, "ignore": ()})
    journal.check_files()
    with pytest.raises(ValueError, match=r"had sparsity=0\.3, and now it is 0\.5"):
        journal.check_identity({"sparsity": 0.5})


@given(
    st.lists(st.floats(0.01, 500), min_size=1, max_size=80),
    st.lists(st.floats(0.001, 100), min_size=80, max_size=80),
)
@settings(max_examples=50, deadline=None)
def test_hidden_states_are_written_in_proportion_to_the_work(layers, writings):
    """Seconds of each layer and of each writing: neither what is written nor what is lost grows."""
    now, worked, since, written = 1000.0, 0.0, 0, []
    pace = Pace("auto", clock=lambda: now)
    for number, seconds in enumerate(layers):
        now, worked, since = now + seconds, worked + seconds, since + 1
        if pace.due(since):
            assert not written or worked >= 20 * written[-1] * (1 - 1e-9)
            with pace.writing():
                now += writings[number]
            written.append(writings[number])
            worked, since = 0.0, 0
        else:  # what a kill would cost, but for the layer that it comes in
            assert worked <= 20 * written[-1] * (1 + 1e-9)

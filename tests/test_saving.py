"""What is saved: stock checkpoints that load where grail_hf is not, the report, the card."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import (
    CASES,
    CASES_AND_UNITS,
    SIZES,
    assert_state,
    batches,
    config_of,
    layers_of,
    logits,
    random_model,
    relative_error,
    specs_of,
    state_of,
    tiny_architecture,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

import grail_hf
from grail_hf import ALLOCATIONS, CompressionReport, GrailConfig
from grail_hf.methods.widths import TOLERANCE
from grail_hf.planning.plan import plan_compression

# Runs alone, with plain transformers: loads every folder and prints what it found, as JSON.
LOADER = """
import json, sys, traceback
from pathlib import Path
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText


def load(folder):
    known = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForCausalLM if known else AutoModelForImageTextToText
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    saved = torch.load(folder / "expected.pt")
    with torch.no_grad():
        pairs = [
            (model(**batch, use_cache=False).logits[mask], logits[mask])
            for batch, logits in zip(saved["batches"], saved["logits"])
            for mask in [batch["attention_mask"].bool()]
        ]
    return {
        "equal": [torch.equal(*pair) for pair in pairs],
        "errors": [((one - other).norm() / other.norm()).item() for one, other in pairs],
        "problems": {key: list(value) for key, value in info.items() if value},
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype),
    }

torch.set_num_threads(int(sys.argv[2]))
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        found[folder.name] = load(folder)
    except Exception:  # one that does not load does not hide how the others do
        found[folder.name] = {"problems": traceback.format_exc()}
print(json.dumps({"found": found, "modules": [m for m in sys.modules if "grail" in m]}))
"""


def compress(model, unit="kv_group", **settings):
    settings = {
        "sparsity": 0.3,
        "multiple_of": 1,
        "allocation": "uniform",
        "selector": "wanda",
    } | settings
    return grail_hf.compress(
        model, calibration=batches(), progress=False, attention_unit=unit, **settings
    )


class Untouchable:
    """Calibration that must not be asked for."""

    def __iter__(self):
        raise AssertionError("the calibration was touched")


# folder -> case, attention unit, dtype
SAVED = {f"{case}-{unit}": (case, unit, torch.float32) for case, unit in CASES_AND_UNITS}
SAVED["llama-bf16"] = ("llama", "kv_group", torch.bfloat16)

every_saved = pytest.mark.parametrize("name", SAVED)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model of `SAVED`, compressed and saved. Not to be changed."""
    saved = SimpleNamespace(folder=tmp_path_factory.mktemp("saved"), models={}, reports={})
    for name, (case, unit, dtype) in SAVED.items():
        model = saved.models[name] = tiny_model(case, dtype=dtype)
        report = saved.reports[name] = compress(model, unit)
        model.save_pretrained(saved.folder / name)
        report.save(saved.folder / name)
        with torch.no_grad():
            expected = [model(**batch, use_cache=False).logits for batch in batches()]
        torch.save({"batches": batches(), "logits": expected}, saved.folder / name / "expected.pt")
    return saved


@pytest.fixture(scope="module")
def reloaded(saved, tmp_path_factory):
    """What plain transformers, in a process of its own, makes of the saved folders."""
    run = subprocess.run(
        [sys.executable, "-c", LOADER, saved.folder, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# Plain transformers


@every_saved
def test_plain_transformers_loads_it_bit_for_bit(saved, reloaded, name):
    model, report = saved.models[name], saved.reports[name]
    found = reloaded["found"][name]
    assert found["problems"] == {}
    assert found["equal"] == [True] * len(batches())
    assert found["class"] == type(model).__name__
    assert found["model_type"] == report.new_model_type == model.config.model_type
    assert found["dtype"] == str(model.dtype)


def test_grail_hf_was_not_imported_to_load_them(reloaded):
    assert reloaded["modules"] == []


@every_saved
def test_the_type_changes_only_where_the_stock_config_cannot_represent_the_heads(saved, name):
    model, report = saved.models[name], saved.reports[name]
    heads = model.config.num_attention_heads
    moved = report.model_type == "llama" and model.config.hidden_size % heads != 0
    assert report.rehomed is moved
    assert report.new_model_type == ("mistral" if moved else report.model_type)


def test_a_moved_llama_is_a_mistral_with_the_same_rotary_and_norms(saved):
    dense, model = tiny_model("llama"), saved.models["llama-kv_group"]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.sliding_window is None
    dense_config, moved = dense.config.to_dict(), model.config.to_dict()
    new = {"num_attention_heads", "num_key_value_heads", "intermediate_size"}
    keys = dense_config.keys() & moved.keys() - new - {"model_type", "architectures"}
    assert {"rope_parameters", "rms_norm_eps", "pad_token_id", "head_dim"} < keys
    assert {key: moved[key] for key in keys} == {key: dense_config[key] for key in keys}


def test_shards_reload(tmp_path):
    model = tiny_model("qwen3")
    compress(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again, batches()), logits(model, batches()))


def test_a_reloaded_model_can_be_compressed_again(saved):
    name = "llama-kv_group"
    again = AutoModelForCausalLM.from_pretrained(saved.folder / name)
    report = compress(again)
    assert report.base_model == name
    assert (report.model_type, set(report.widths["attention"])) == ("mistral", {2})
    assert torch.isfinite(logits(again, batches())).all()


# The hub's own code for a type that transformers has


def of_the_hub(case, folder):
    """A checkpoint whose config names code in a repository, which is not there."""
    auto_map = {
        name: f"no/repository--code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")
    }
    tiny_architecture(case).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


def to_memory(source, output):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    assert model.config.auto_map
    compress(model)
    model.save_pretrained(output)


def to_disk(source, output):
    settings = {"sparsity": 0.3, "multiple_of": 1, "allocation": "uniform", "selector": "magnitude"}
    grail_hf.compress_checkpoint(source, output, batches(), progress=False, **settings)


def to_widths_and_padded(source, output):
    model = AutoModelForCausalLM.from_pretrained(source)
    compress(model, ignore=(0,))
    model.save_pretrained(output / "between")
    assert model.config.auto_map["AutoModelForCausalLM"].startswith("modeling_grail.")
    grail_hf.export(output / "between", output / "padded", "padded")
    shutil.copytree(output / "padded", output, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        ("phi3", to_memory),
        ("phi3", to_disk),
        ("phi3", grail_hf.export),
        ("phi3", to_widths_and_padded),
        ("gemma3", to_memory),
        ("gemma3", to_disk),
    ],
)
def test_the_hub_s_code_for_the_dense_model_does_not_load_the_result(case, way, tmp_path):
    of_the_hub(case, tmp_path / "dense")
    way(tmp_path / "dense", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert type(again).__module__.startswith("transformers.models.")


def test_a_model_that_is_made_of_the_hub_s_code_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])  # the cache joins it
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    code = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): pass\n"
    (dense / "own_code.py").write_text(code)
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own_code.Own"}
    (dense / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True)
    assert type(model).__name__ == "Own"
    compress(model, mlp_sparsity=0.4, attention_sparsity=0, sparsity=None)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "Own"
    assert torch.equal(logits(again, batches()), logits(model, batches()))


# Heads that the config cannot represent: 9 do not divide 48


@pytest.mark.parametrize(
    ("model_type", "changes", "rehome", "allocation"),
    [
        *(("gemma2", {}, True, allocation) for allocation in ALLOCATIONS),
        ("gemma3_text", {"rope_parameters": None}, True, "uniform"),
        ("arcee", {}, True, "error"),
        ("llama", {}, False, "flap"),
        ("llama", {"mlp_bias": True}, True, "uniform-split"),
    ],
)
def test_heads_are_as_many_as_the_config_can_represent(
    model_type, changes, rehome, allocation, tmp_path
):
    """Before and after the allocation has measured; the widest layer's, where they differ."""
    for sparsity in (0.2, 0.3, 0.4):
        model = random_model(config_of({"model_type": model_type} | SIZES | changes))
        report = compress(model, sparsity=sparsity, allocation=allocation, rehome=rehome, refit=0)
        assert report.new_model_type == model_type
        assert max(report.widths["attention"]) in (1, 2, 4)
        assert abs(report.sparsity - sparsity) <= TOLERANCE
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batches()), logits(model, batches()))


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("gemma2", (3584, 14336, 16, 8)), ("gemma3_text", (2560, 10240, 8, 4))],
)
def test_real_shapes_can_be_had_at_every_sparsity(model_type, sizes, sparsity):
    """Those of Gemma 2 9B and Gemma 3 4B."""
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    values = dict(zip(keys, sizes, strict=True)) | {"head_dim": 256, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    plan = plan_compression(model, GrailConfig(sparsity=sparsity))
    assert abs(plan.sparsity - sparsity) <= TOLERANCE
    assert model.config.hidden_size % plan.config.num_attention_heads == 0


@pytest.mark.parametrize(
    ("case", "changes", "rehome", "helps"),
    [
        ("llama", {}, False, True),
        ("llama-biases", {"hidden_size": 48}, True, False),
        ("llama-biases", {"hidden_size": 48}, False, False),
    ],
)
def test_a_sparsity_that_only_other_heads_reach_is_refused_first(case, changes, rehome, helps):
    """9 of 12 heads, and a whole MLP; another type helps where the model can become one."""
    model = tiny_model(case, **changes)
    state = state_of(model)
    quarter = GrailConfig(mlp_sparsity=0, attention_sparsity=0.25)
    wanted = plan_compression(tiny_model("mistral"), quarter).sparsity
    settings = {"sparsity": wanted, "mlp_sparsity": 0, "rehome": rehome}
    with pytest.raises(ValueError, match="of 4 attention units a layer the config can") as caught:
        grail_hf.compress(model, calibration=Untouchable(), progress=False, **settings)
    assert "can keep 1, 2, 4;" in str(caught.value)
    assert ("rehome=True" in str(caught.value)) is helps
    assert_state(model, state)


# Report and card


@every_saved
def test_a_report_survives_json(saved, name):
    report = saved.reports[name]
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    loaded = CompressionReport.load(saved.folder / name)
    assert loaded == report
    assert isinstance(loaded.config, GrailConfig)
    assert loaded.groups and loaded.calibration["tokens"] > 0 and loaded.seconds > 0


@pytest.mark.parametrize(
    ("dense", "expected"), [("some/model", "some/model"), ("/home/me/model", None), ("", None)]
)
def test_the_card_has_front_matter_that_the_hub_reads(tmp_path, dense, expected):
    model = tiny_model("qwen2")
    model.name_or_path = dense
    report = compress(model)
    report.evaluation["perplexity"] = 12.3
    report.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == expected
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["grail", "structured-pruning"]
    assert f"`{model.config.model_type}`" in card.text
    assert "| perplexity | 12.3 |" in card.text
    assert "/home" not in str(card) + (tmp_path / "grail.json").read_text()


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("qwen2", {}, "ignores head_dim"),
        ("qwen2", {"sparsity": None, "mlp_sparsity": 0.3, "attention_sparsity": 0.0}, None),
        ("qwen3", {}, None),
        ("qwen3", {"bias": "auto"}, "ignores the bias of o_proj"),
        ("llama-biases", {"bias": "auto"}, None),
    ],
)
def test_the_card_names_what_vllm_s_own_code_ignores(case, settings, expected, tmp_path):
    model = tiny_model(case)
    report = compress(model, **settings)
    model.save_pretrained(tmp_path / "out")
    report.save(tmp_path / "out")
    grail_hf.export(tmp_path / "out", tmp_path / "again", "stock")
    for folder in ("out", "again"):
        card = (tmp_path / folder / "README.md").read_text()
        assert ("--model-impl transformers" in card) is bool(expected)
        assert expected is None or expected in card


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("mine", "mine"), ("models--some--model/snapshots/0f", "some/model"), ("models--gpt2", None)],
)
def test_the_card_names_a_folder_and_what_lies_in_the_hub_s_cache(
    folder, expected, tmp_path, monkeypatch
):
    source = tmp_path / folder
    source.mkdir(parents=True)
    monkeypatch.chdir(source)
    for name in (".", str(source)):
        model = tiny_model("qwen2")
        model.name_or_path = name
        report = compress(model)
        assert report.base_model == (expected or folder)
        assert f"Made from {expected or folder} by" in report.card()


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit\ntags: [a]", {"license": "mit"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: LICENSE",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("tags: [a]", {}),
        ("license: [", {}),
        ("- license", {}),
    ],
)
def test_the_license_is_carried_over(front, expected, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# Mine\n")
    model = tiny_model("qwen2")
    model.name_or_path = str(tmp_path)
    report = compress(model)
    assert report.license == CompressionReport.from_dict(report.to_dict()).license == expected
    data = ModelCard(report.card()).data.to_dict()
    assert {key: value for key, value in data.items() if "license" in key} == expected


def test_the_card_tells_that_the_type_has_changed(saved):
    assert "The dense model is a `llama`" in saved.reports["llama-kv_group"].card()
    assert "The dense model is a" not in saved.reports["mistral-kv_group"].card()


def test_a_report_is_saved_over_an_earlier_one_only(saved, tmp_path):
    report = saved.reports["qwen3-kv_group"]
    report.save(tmp_path)
    report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "grail.json"]
    (tmp_path / "grail.json").unlink()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        report.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "grail.json").exists()


@pytest.mark.parametrize("name", ["qwen3-kv_group", "llama-kv_group"])
def test_the_table_and_the_text_show_the_widths(saved, name):
    from rich.console import Console

    report = saved.reports[name]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report.table())
    for text in (str(report), console.export_text()):
        for kind, (width, *_) in report.widths.items():
            units = {"attention": "heads per layer", "mlp": "mlp channels per layer"}[kind]
            line = next(line for line in text.splitlines() if units in line)
            assert str(width) in line and str(report.units[kind]) in line


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for a hub repository, and the commits made to it."""
    folder, commits = tmp_path / "hub", []
    folder.mkdir()

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, commit_message, **kwargs):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)
        commits.append((repo_id, sorted(o.path_in_repo for o in operations), commit_message))
        return "address"

    def upload_folder(self, *, repo_id, folder_path, commit_message, **kwargs):
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        files = sorted(path.name for path in Path(folder_path).iterdir())
        commits.append((repo_id, files, commit_message))
        return "address"

    def load(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    for method in (create_repo, create_commit, upload_folder):
        monkeypatch.setattr(HfApi, method.__name__, method)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load)
    return folder, commits


def test_the_report_goes_to_the_hub_as_two_files(saved, hub):
    folder, commits = hub
    report = saved.reports["llama-kv_group"]
    assert report.push_to_hub("me/smaller", commit_message="mine") == "address"
    assert commits == [("me/smaller", ["README.md", "grail.json"], "mine")]
    assert CompressionReport.load(folder) == report
    report.push_to_hub("me/smaller")
    assert commits[1][2]


@pytest.mark.parametrize("name", ["llama-kv_group", "qwen2-mixed-query_head"])
def test_what_is_pushed_loads_as_it_was(saved, hub, name):
    folder, commits = hub
    model, report = saved.models[name], saved.reports[name]
    model.push_to_hub("me/smaller")
    report.push_to_hub("me/smaller")
    assert {"config.json", "model.safetensors"} <= set(commits[0][1])
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, batches()), logits(model, batches()))
    assert (folder / "README.md").read_text() == report.card()


def test_a_model_that_was_pushed_as_it_was_saved_gets_its_card(hub, tmp_path):
    """Not the one that transformers wrote; and a card that is somebody's stays."""
    model = tiny_model("qwen3")
    report = compress(model)
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/smaller")
    assert (tmp_path / "out" / "README.md").read_text() == (hub[0] / "README.md").read_text()
    report.save(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == report.card()

    tiny_model("qwen3").save_pretrained(tmp_path / "dense", push_to_hub=True, repo_id="me/dense")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        report.save(tmp_path / "dense")


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        *((case, {"refit": 1}) for case in CASES),
        *((c, {"ignore": (1,)}) for c in ("llama", "qwen3")),
    ],
    ids=str,
)
def test_fitted_biases_are_in_the_checkpoint_and_are_read(case, settings, tmp_path):
    """Nothing is missing or unexpected, and nothing but what was counted is there."""
    model = tiny_model(case)
    before = {key for key in model.state_dict() if key.endswith("bias")}
    shares = {"sparsity": None, "mlp_sparsity": 0.3, "attention_sparsity": 0.5}
    # With ridge="auto", plain pruning without a bias is best here and there.
    report = compress(model, bias="auto", ridge=1e-3, **shares, **settings)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative_error(logits(loaded.eval(), batches()), logits(model, batches())) == 0
    assert report.total_parameters[1] == model.num_parameters()

    added = {key for key in model.state_dict() if key.endswith("bias")} - before
    keys = [spec.bias_key for spec in specs_of(model)]
    represented = any(key and getattr(model.config, key) for key in keys)
    assert bool(added) <= represented
    for key, value in model.state_dict().items():
        if key in added:
            left_whole = any(f"layers.{i}." in key for i in settings.get("ignore", ()))
            consumer = key.removesuffix(".bias") in consumer_names(model)
            assert bool(value.any()) == (consumer and not left_whole)


def consumer_names(model):
    names = {id(module): name for name, module in model.named_modules()}
    return [
        names[id(layer.get_submodule(spec.consumer))]
        for layer in layers_of(model)
        for spec in specs_of(model)
    ]

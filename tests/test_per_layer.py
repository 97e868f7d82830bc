"""Widths that differ between layers: one checkpoint, which loads with grail_hf or as remote code.

The models are narrowed by hand. Two oracles: a dense model whose removed columns are zero computes
the same, and whatever is loaded computes the same bits as the live model.
"""

import copy
import inspect
import json
import logging
import math
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    CASES,
    CASES_AND_UNITS,
    all_specs_of,
    batches,
    layers_of,
    logits,
    relative_error,
    specs_of,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from grail_hf import ARCHITECTURES, compress
from grail_hf.config import ATTENTION, ATTENTION_UNITS, MLP
from grail_hf.methods.reduction import Reduction
from grail_hf.models.configs import compressed_config
from grail_hf.models.decoder import auto_class
from grail_hf.models.groups import Group
from grail_hf.models.modeling_grail import AUTO_MAP, LayerConfig, has_own_widths
from grail_hf.models.surgery import apply_config_

# Runs alone: loads every folder in one way, prints what it found as JSON, and saves it again.
LOADER = """
import json, sys
from pathlib import Path
import torch

way, source, target, threads = sys.argv[1:]
folders = sorted(Path(source).iterdir())
torch.set_num_threads(int(threads))
result = {"found": {}, "plain": {}}
if way == "grail_hf":
    import grail_hf
    from grail_hf.models.modeling_grail import install_hook

    def waiting():
        return sum(type(finder).__module__ == install_hook.__module__ for finder in sys.meta_path)

    install_hook()
    result["waiting"] = [waiting(), "transformers.modeling_utils" in sys.modules]
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

if way == "grail_hf":
    install_hook()
    build = PreTrainedModel.__init__
    result["waiting"].append(waiting())
    result["patched once"] = not hasattr(build.__wrapped__, "__wrapped__")
untouched = MistralDecoderLayer.__init__
AutoModelForCausalLM.from_config(
    AutoConfig.for_model(
        "mistral", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )
)
result["normal is untouched"] = MistralDecoderLayer.__init__ is untouched
how = {}
if way == "remote code":
    for folder in folders:  # before any remote code has run
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except RuntimeError as error:
            result["plain"][folder.name] = str(error)
    how = {"trust_remote_code": True}
for folder in folders:
    bare = AutoModel.from_pretrained(folder, **how)
    bare = AutoModel.from_config(bare.config, **how), bare
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    model.save_pretrained(Path(target) / folder.name, max_shard_size="50KB")
    again = AutoModelForCausalLM.from_pretrained(Path(target) / folder.name, **how)
    built = AutoModelForCausalLM.from_config(model.config, **how)
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        equal = [
            torch.equal(m(**batch, use_cache=False).logits[mask], logits[mask])
            for m in (model, again)
            for batch, logits in zip(expected["batches"], expected["logits"])
            for mask in [batch["attention_mask"].bool()]
        ]
    result["found"][folder.name] = {
        "equal": equal,
        "problems": {key: list(map(str, value)) for key, value in info.items() if value},
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "from_config": {n: p.shape for n, p in built.named_parameters()}
        == {n: p.shape for n, p in model.named_parameters()},
        "bare": [type(m) is type(model.base_model) for m in bare]
        + [torch.equal(p, q) for p, q in zip(bare[1].parameters(), model.base_model.parameters())],
    }
result["modules"] = [m for m in sys.modules if m.split(".")[0] == "grail_hf"]
print(json.dumps(result))
"""

# Runs alone: loads a folder as remote code, or after vLLM's plug-in was called, and does with the
# model what users do.
USER = """
import copy, json, sys
import torch

way, folder, target = sys.argv[1:]
how = {}
if way == "remote code":
    how = {"trust_remote_code": True}
else:
    from importlib.metadata import EntryPoint

    for _ in range(2):
        EntryPoint("grail_hf", way, "vllm.general_plugins").load()()
    assert "transformers.modeling_utils" not in sys.modules, "it loads nothing heavy"
from transformers import AutoModelForCausalLM

saved = torch.load(f"{folder}/expected.pt")
batch, mask = saved["batches"][0], saved["batches"][0]["attention_mask"].bool()


def load(source=folder, **settings):
    return AutoModelForCausalLM.from_pretrained(source, **how, **settings)


def error(model):
    with torch.no_grad():
        got = model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).logits
    expected = saved["logits"][0][mask]
    return ((got.cpu()[mask] - expected).norm() / expected.norm()).item()


model = load()
result = {"loaded": error(model), "copied": error(copy.deepcopy(model))}
model.save_pretrained(target)
result["saved again"] = error(load(target))
result["dispatched"] = error(load(device_map="auto"))
trained = load().train()
trained.gradient_checkpointing_enable()
for module in trained.modules():
    if hasattr(module, "attention_dropout"):
        module.attention_dropout = 0.0
optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
losses = []
for _ in range(2):
    loss = trained(**batch, labels=batch["input_ids"].where(mask, -100)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
result["losses"] = losses
try:
    import peft
except ImportError:
    pass
else:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    lora = peft.get_peft_model(load(), settings)
    result["lora at first"] = error(lora)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    result["lora changed"] = error(lora)
    lora.save_pretrained(f"{target}-lora")
    again = peft.PeftModel.from_pretrained(load(), f"{target}-lora").eval()
    with torch.no_grad():
        pair = [m(**batch, use_cache=False).logits[mask] for m in (lora.eval(), again)]
    result["lora again"] = ((pair[0] - pair[1]).norm() / pair[0].norm()).item()
result["class"] = f"{type(model).__module__}.{type(model).__name__}"
result["modules"] = [m for m in sys.modules if m.split(".")[0] == "grail_hf"]
print(json.dumps(result))
"""

# unit -> kind -> one width a layer. The first leaves no layer with every head, and llamas move to
# mistral; in the second a layer keeps every head, and none every channel.
WIDTHS = {
    "kv_group": {ATTENTION: (3, 1, 2), MLP: (83, 40, 57)},
    "query_head": {ATTENTION: (8, 12, 4), MLP: (50, 61, 50)},
}

every_case = pytest.mark.parametrize(("case", "unit"), CASES_AND_UNITS)
# Each case once, each unit for half of them.
each_case = pytest.mark.parametrize(
    ("case", "unit"), [(case, ATTENTION_UNITS[n % 2]) for n, case in enumerate(CASES)]
)


def narrowed(case, unit, widths=None, **changes):
    """A model with layers of different widths, and the dense one that computes the same."""
    widths = widths or WIDTHS[unit]
    model = tiny_model(case, **changes)
    masked = copy.deepcopy(model)
    specs = specs_of(model, unit)
    config = compressed_config(
        model.config,
        all_specs_of(model, unit),
        widths,
        ARCHITECTURES[model.config.model_type].rehome,
    )
    for index, (layer, twin) in enumerate(zip(layers_of(model), layers_of(masked), strict=True)):
        for spec in specs:
            scores = torch.rand(spec.num_units, generator=torch.Generator().manual_seed(index))
            reduction = Reduction.keep_top(scores, widths[spec.kind][index], spec.partitions)
            group = Group(layer, spec, f"layers.{index}")
            consumer = Group(twin, spec, "twin").consumer
            consumer.weight.data[:, reduction.removed_channels(spec.columns)] = 0
            group.shrink_(reduction)
            group.repair_(group.weight[:, reduction.kept_channels(spec.columns)])
    apply_config_(model, config)
    return model, masked


def is_shared(model):
    """Whether every module of the model that holds a config holds the live one."""
    return all(vars(m).get("config", model.config) is model.config for m in model.modules())


@pytest.fixture(scope="module")
def made():
    """Every case's model and its masked twin. Not to be changed."""
    return {(case, unit): narrowed(case, unit) for case, unit in CASES_AND_UNITS}


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for (case, unit), (model, _) in made.items():
        model.save_pretrained(folder / f"{case}-{unit}")
        with torch.no_grad():
            expected = [model(**batch, use_cache=False).logits for batch in batches()]
        expected = {"batches": batches(), "logits": expected}
        torch.save(expected, folder / f"{case}-{unit}" / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def loaded(saved, tmp_path_factory):
    """What processes of their own make of the saved folders: way -> what LOADER prints."""
    running = {}
    for way in ("grail_hf", "remote code"):
        folder = tmp_path_factory.mktemp("loaded")
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["HF_MODULES_CACHE"] = str(folder / "code")
        again = folder / "again"
        arguments = [way, saved, again, str(torch.get_num_threads())]
        process = subprocess.Popen(
            [sys.executable, "-c", LOADER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=env,
        )
        running[way] = process, again
    loaded = {}
    for way, (process, again) in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, error
        loaded[way] = json.loads(out.splitlines()[-1]) | {"again": again}
    return loaded


# Live


@every_case
def test_it_computes_what_the_dense_model_does_without_the_removed_columns(made, case, unit):
    model, masked = made[case, unit]
    assert relative_error(logits(model, batches()), logits(masked, batches())) < 1e-5
    assert is_shared(model)


@every_case
def test_the_config_names_the_layers_that_are_not_the_widest(made, case, unit):
    model, masked = made[case, unit]
    config = json.loads(model.config.to_json_string())
    dense = masked.config
    widths = WIDTHS[unit]
    per_unit = {spec.kind: spec.config_per_unit for spec in specs_of(masked, unit)}
    for kind, keys in per_unit.items():
        for key, n in keys.items():
            assert config[key] == n * max(widths[kind])
            for index, width in enumerate(widths[kind]):
                listed = config["per_layer_config"].get(str(index), {})
                expected = None if width == max(widths[kind]) else n * width
                assert listed.get(key) == expected
    assert config["auto_map"] == AUTO_MAP
    assert config["model_type"] == model.config.model_type
    heads = config["num_attention_heads"]
    moved = dense.model_type == "llama" and dense.hidden_size % heads != 0
    assert model.config.model_type == ("mistral" if moved else dense.model_type)
    assert type(model).__module__.startswith("transformers.models.")


@pytest.mark.parametrize("case", ["llama", "qwen3"])  # the first moves to another type
def test_a_compression_does_not_read_as_all_layers_what_is_the_widest_s(case, monkeypatch):
    """transformers warns of that."""
    warnings = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message: warnings.append(message))
    model = tiny_model(case)
    compress(
        model,
        calibration=batches(),
        allocation="error",
        sparsity=0.3,
        multiple_of=1,
        progress=False,
    )
    assert warnings == []
    assert model.config.intermediate_size > min(
        c.intermediate_size for c in model.config.per_layer_config
    )
    assert "per-layer attribute `intermediate_size`" in warnings[0]


@pytest.mark.parametrize("case", CASES)
def test_equal_widths_make_a_stock_config(case):
    model = tiny_model(case)
    specs = specs_of(model)
    widths = {spec.kind: [spec.num_units // 2] * 3 for spec in specs}
    config = compressed_config(model.config, all_specs_of(model), widths)
    assert not config.is_heterogeneous
    values = config.to_dict()
    added = {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"}
    assert not added & values.keys()
    assert values["intermediate_size"] == 41
    assert values["num_attention_heads"] == model.config.num_attention_heads // 2


@pytest.mark.parametrize(
    ("case", "unit", "heads", "channels"),
    [
        ("qwen3", "kv_group", (2, 2, 2), (70, 80, 70)),
        ("qwen3", "query_head", (4, 4, 8), (83, 83, 83)),
        # 9 heads do not divide 48, but only the widest layer's are asked to.
        ("llama", "kv_group", (4, 3, 1), (60, 60, 60)),
    ],
)
def test_one_kind_may_differ_alone(tmp_path, case, unit, heads, channels):
    model, masked = narrowed(case, unit, {ATTENTION: heads, MLP: channels})
    assert model.config.model_type == case
    assert relative_error(logits(model, batches()), logits(masked, batches())) < 1e-5
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batches()), logits(model, batches()))


def test_a_config_with_own_widths_can_become_one_of_equal_widths_and_back(made):
    model, _ = made["qwen3", "kv_group"]
    before = model.config.to_dict()
    specs = all_specs_of(model)
    equal = compressed_config(model.config, specs, {ATTENTION: [1] * 3, MLP: [30] * 3})
    assert not {"per_layer_config", "auto_map"} & equal.to_dict().keys()
    other = compressed_config(model.config, specs, {ATTENTION: (2, 1, 2), MLP: (40, 40, 50)})
    assert [c.num_key_value_heads for c in other.per_layer_config] == [2, 1, 2]
    assert [c.intermediate_size for c in other.per_layer_config] == [40, 40, 50]
    assert model.config.to_dict() == before


@pytest.mark.parametrize("changes", [{"mlp_bias": True}, {"attention_bias": True}])
def test_heads_that_no_config_represents_are_refused(changes):
    model = tiny_model("llama", **changes)
    rehome = ARCHITECTURES["llama"].rehome
    with pytest.raises(ValueError, match="num_attention_heads=9"):
        compressed_config(model.config, all_specs_of(model), WIDTHS["kv_group"], rehome)


def test_a_transformers_without_per_layer_configs_is_refused(monkeypatch):
    model = tiny_model("qwen3")
    specs = all_specs_of(model)
    owner = next(c for c in PreTrainedConfig.__mro__ if "per_layer_config" in vars(c))
    monkeypatch.delattr(owner, "per_layer_config")
    with pytest.raises(ValueError, match="update transformers"):
        compressed_config(model.config, specs, WIDTHS["kv_group"])


# Loaded


@pytest.mark.parametrize("way", ["grail_hf", "remote code"])
@every_case
def test_it_loads_bit_for_bit_and_again_after_another_save(made, loaded, way, case, unit):
    model, _ = made[case, unit]
    found = loaded[way]["found"][f"{case}-{unit}"]
    assert found["problems"] == {}
    assert found["equal"] == [True] * 2 * len(batches())
    assert found["class"] == f"{type(model).__module__}.{type(model).__name__}"
    assert found["from_config"]
    assert all(found["bare"]) and len(found["bare"]) > 10
    again = loaded[way]["again"] / f"{case}-{unit}"
    assert len(list(again.glob("model-*.safetensors"))) > 1
    assert (again / "modeling_grail.py").read_text().startswith('"""Decoder layers of different')
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP


@every_case
def test_plain_transformers_refuses_it(loaded, case, unit):
    assert "mismatch" in loaded["remote code"]["plain"][f"{case}-{unit}"]


def test_only_what_is_asked_for_is_imported_and_normal_models_are_untouched(loaded):
    assert loaded["remote code"]["modules"] == []
    assert all(way["normal is untouched"] for way in loaded.values())


def test_the_hook_waits_for_transformers_models_and_patches_once(loaded):
    assert loaded["grail_hf"]["waiting"] == [1, False, 0]
    assert loaded["grail_hf"]["patched once"]


# Used


@pytest.fixture(scope="module")
def plugin():
    """What vLLM calls in each of its processes, as declared in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    declared = tomllib.loads(project.read_text())["project"]["entry-points"]
    (value,) = declared["vllm.general_plugins"].values()
    return value


# With grail_hf imported at the top of this file, the tests above and below do the same.
USED = {"remote code": "qwen3-query_head", "vllm": "llama-kv_group"}


@pytest.fixture(scope="module")
def used(saved, plugin, tmp_path_factory):
    """What processes of their own do with a folder each: way -> what USER prints."""
    running = {}
    for way, name in USED.items():
        folder = tmp_path_factory.mktemp("used")
        arguments = [plugin if way == "vllm" else way, saved / name, folder / "again"]
        running[way] = subprocess.Popen(
            [sys.executable, "-c", USER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"HF_MODULES_CACHE": str(folder / "code")},
        )
    used = {}
    for way, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, error
        used[way] = json.loads(out.splitlines()[-1])
    return used


@pytest.mark.parametrize("way", USED)
def test_what_users_do_in_a_process_of_their_own(used, way):
    found = used[way]
    for what in ("loaded", "copied", "saved again", "dispatched"):
        assert found[what] < 1e-5, what
    assert found["losses"][1] < found["losses"][0]
    assert found["class"].startswith("transformers.models.")
    assert (found["modules"] == []) is (way == "remote code")
    if "lora at first" in found:
        assert found["lora at first"] < 1e-5 and found["lora again"] < 1e-5
        assert found["lora changed"] > 1e-2


def test_the_plugin_is_the_hook_itself(plugin):
    """It may be called any number of times; the second changes nothing."""
    from transformers import PreTrainedModel

    register = EntryPoint("grail_hf", plugin, "vllm.general_plugins").load()
    register()
    patched = PreTrainedModel.__init__
    register()
    assert PreTrainedModel.__init__ is patched


@pytest.mark.slow
def test_lm_evals_own_command_runs_it_as_remote_code(
    tmp_path, tiny_llama, tokenizer, jargon_train, jargon_test
):
    report = compress(
        tiny_llama,
        tokenizer,
        jargon_train,
        sparsity=0.5,
        ignore=0,
        selector="wanda",
        num_samples=8,
        seq_length=64,
        progress=False,
    )
    assert not report.uniform
    tiny_llama.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    text = jargon_test.read_text()[:2500]
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_jargon.yaml").write_text(
        "task: local_jargon\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"),
            f"pretrained={tmp_path / 'small'},trust_remote_code=True,dtype=float32",
            *("--tasks", "local_jargon", "--include_path", tmp_path / "tasks"),
            *("--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / "results"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_MODULES_CACHE": str(tmp_path / "code"), "HF_DATASETS_CACHE": str(tmp_path / "data")},
    )
    assert run.returncode == 0, run.stderr
    (file,) = (tmp_path / "results").rglob("results*.json")
    measured = json.loads(file.read_text())["results"]["local_jargon"]["bits_per_byte,none"]
    # All of the text in one window, from bos on.
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    assert ids.shape[1] <= 1025
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(tiny_llama(ids[:, :-1]).logits[0], ids[0, 1:])
    nats = loss.item() * (ids.shape[1] - 1)
    assert measured == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


@pytest.fixture(scope="module")
def reloaded(saved):
    def load(case, unit, **settings):
        return AutoModelForCausalLM.from_pretrained(saved / f"{case}-{unit}", **settings)

    return load


@each_case
def test_a_copy_computes_the_same_and_shares_its_own_config(made, reloaded, case, unit):
    live, _ = made[case, unit]
    for model in (live, reloaded(case, unit)):
        twin = copy.deepcopy(model)
        assert twin.config is not model.config and is_shared(twin)
        assert torch.equal(logits(twin, batches()), logits(live, batches()))


@each_case
def test_it_is_dispatched(made, reloaded, case, unit):
    model = reloaded(case, unit, device_map="auto")
    actual = logits(model, [{k: v.to(model.device) for k, v in b.items()} for b in batches()])
    assert relative_error(actual.cpu(), logits(made[case, unit][0], batches())) < 1e-5


@each_case
def test_the_live_and_the_loaded_model_follow_another_attention(made, reloaded, case, unit):
    live, masked = (copy.deepcopy(model) for model in made[case, unit])
    expected = logits(masked, batches())
    for model in (live, reloaded(case, unit)):
        assert is_shared(model)
        model.set_attn_implementation("eager")
        assert is_shared(model)
        out = model(**batches()[0], output_attentions=True, use_cache=False)
        heads = [attention.shape[1] for attention in out.attentions]
        assert heads == [c.num_attention_heads for c in model.config.per_layer_config]
        assert relative_error(logits(model, batches()), expected) < 1e-5


@each_case
def test_caches_hold_as_many_heads_as_the_layer_has(made, case, unit):
    model, masked = made[case, unit]
    batch = batches()[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    runs = [
        model.generate(**batch, **settings, **how)
        for how in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
    ]
    runs.append(masked.generate(**batch, **settings, use_cache=False))
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert runs[0].shape[1] == batch["input_ids"].shape[1] + 8


@each_case
def test_it_trains_with_gradient_checkpointing(reloaded, case, unit):
    gradients = []
    for checkpointing in (False, True):
        model = reloaded(case, unit).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        batch = batches()[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    before = logits(model.eval(), batches())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(logits(model, batches()), before)


def test_other_heads_than_a_causal_lm_load(saved):
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = saved / "qwen3-kv_group"
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier(**batches()[0]).logits.shape == (8, 2)
    assert is_shared(classifier)
    assert [m.mlp.down_proj.in_features for m in body.layers] == [83, 40, 57]


@pytest.mark.parametrize("case", CASES)
def test_a_normal_model_is_built_with_its_own_config(made, case):
    """The classes have been changed by now."""
    model = tiny_model(case)
    assert is_shared(model)
    assert {m.mlp.down_proj.in_features for m in layers_of(model)} == {83}


def test_normal_models_are_saved_without_the_file(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_module_that_reads_a_width_when_it_runs_sees_its_own_and_later_changes():
    """phi3 does, of its heads."""
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "pad_token_id": 3}
    config = AutoConfig.for_model(
        "phi3", **sizes, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3
    )
    config.head_dim = 8
    config.allow_global_per_layer_attribute_access = True
    config.auto_map = dict(AUTO_MAP)
    config.per_layer_config = {1: {"num_attention_heads": 2, "num_key_value_heads": 1}}
    model = AutoModelForCausalLM.from_config(config).eval()
    own = [layer.self_attn.config for layer in model.model.layers]
    assert all(isinstance(c, LayerConfig) for c in own)
    expected = logits(model, batches())
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    own = [layer.self_attn.config for layer in twin.model.layers]
    assert [c.num_attention_heads for c in own] == [6, 2]
    assert [c._attn_implementation for c in own] == ["eager"] * 2
    assert relative_error(logits(twin, batches()), expected) < 1e-5
    assert own[0].hidden_size == 48
    with pytest.raises(AttributeError, match="no_such_key"):
        _ = own[0].no_such_key


def test_a_lora_trains_on_it(reloaded):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(reloaded("qwen3", "kv_group"), settings)
    batch = batches()[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_is_used_of_transformers_is_still_there():
    """Semi-private; where this fails, `modeling_grail.py` or `decoder.py` needs a revision."""
    from transformers import AutoModelForImageTextToText, PreTrainedModel

    model = tiny_model("llama")
    layer_class = type(layers_of(model)[0])
    assert layer_class.__name__ in type(model)._no_split_modules
    assert {"config", "layer_idx"} <= inspect.signature(layer_class.__init__).parameters.keys()
    assert list(inspect.signature(PreTrainedModel.__init__).parameters)[:2] == ["self", "config"]
    assert isinstance(type(model.config).per_layer_config, property)
    assert model.config._attn_implementation == "sdpa"
    assert type(type(model)._from_config(model.config)) is type(model)
    assert PreTrainedModel._hf_peft_config_loaded is False
    assert auto_class("qwen2_vl") is AutoModelForImageTextToText
    assert auto_class("gemma3") is auto_class("llama") is AutoModelForCausalLM


def test_a_config_of_our_own_making_alone_wakes_the_hook():
    def config(name, different):
        return SimpleNamespace(auto_map=name, is_heterogeneous=different)

    ours = AUTO_MAP["AutoModelForCausalLM"]
    assert has_own_widths(config({"AutoModelForCausalLM": ours}, True))
    assert has_own_widths(config({"AutoModelForCausalLM": f"me/smaller--{ours}"}, True))
    assert not has_own_widths(config({"AutoModelForCausalLM": ours}, False))
    assert not has_own_widths(config({"AutoModelForCausalLM": "modeling_x.X"}, True))
    assert not has_own_widths(config(None, True))
    assert not has_own_widths(SimpleNamespace())


@pytest.mark.parametrize("ignore", [(0,), ("layers.1.mlp", -1)])
def test_compress_leaves_single_layers_whole(tmp_path, ignore):
    """The others take what the ignored ones keep, and the result loads with grail_hf imported."""
    model = tiny_model("llama")
    report = compress(
        model, calibration=batches(), sparsity=0.3, ignore=ignore, multiple_of=1, progress=False
    )
    assert report.sparsity == pytest.approx(0.3, abs=0.005)
    assert not report.uniform
    layers = range(model.config.num_hidden_layers)
    whole = {layer for layer in layers if report.widths[MLP][layer] == report.units[MLP]}
    assert whole == ({0} if ignore == (0,) else {1, layers[-1]})
    model.save_pretrained(tmp_path)
    report.save(tmp_path)
    assert "trust_remote_code=True" in (tmp_path / "README.md").read_text()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again, batches()), logits(model, batches()))

"""Exports: what is written computes what the source does, in a process that knows no grail_hf.

Oracles: the live model, the dense model whose removed columns are zero, and, for GGUF, the reader
of transformers (and llama.cpp itself, where it is installed).
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_architectures import differing_
from test_per_layer import narrowed
from tiny_models import (
    CASES_AND_UNITS,
    UNUSUAL,
    batches,
    logits,
    relative_error,
    tiny_architecture,
    tiny_model,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import grail_hf
from grail_hf import CompressionReport, export
from grail_hf.cli import app
from grail_hf.exports.export import FORMATS, padded_units
from grail_hf.exports.gguf import (
    PRE_TOKENIZERS,
    ExportError,
    check_gguf,
    deinterleaved,
    interleaved,
    plan_gguf,
    rotary_factors,
    write_gguf,
)
from grail_hf.models.architectures import ARCHITECTURES, find_architecture
from grail_hf.models.configs import ALLOW
from grail_hf.models.modeling_grail import AUTO_MAP

# Runs alone: loads every folder, says what it is, and saves its logits.
LOADER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

inputs = torch.load(sys.argv[2])
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = [model(**batch, use_cache=False).logits for batch in inputs]
    torch.save(logits, f"{folder.name}.pt")
    found[folder.name] = {
        "problems": {key: list(map(str, value)) for key, value in info.items() if value},
        "model_type": model.config.model_type,
        "stock": not model.config.is_heterogeneous and not hasattr(model.config, "auto_map"),
    }
found["modules"] = [name for name in sys.modules if name.split(".")[0] == "grail_hf"]
print(json.dumps(found))
"""

PADDED = CASES_AND_UNITS[::3]  # one unit or the other of most cases
STOCK = ["llama-biases", "qwen2-mixed", "qwen3"]
FULL = {"sliding_window": None}
# case, format, what is changed in its config first, the model type that comes out.
MOVES = [
    ("llama", "mistral", {}, "mistral"),
    ("llama-tied-scaled-rope", "mistral", {}, "mistral"),
    ("mistral", "mistral", FULL, "mistral"),
    ("llama", "granite", {}, "granite"),
    ("llama-biases", "granite", {}, "granite"),
    ("llama-derived-head-dim", "granite", {}, "granite"),
    ("llama-tied-scaled-rope", "granite", {}, "granite"),
    ("mistral", "granite", FULL, "granite"),
    ("qwen2", "granite", {}, "granite"),
    ("qwen2-derived-head-dim", "granite", {}, "granite"),
]


def saved(folder, case, **changes):
    """A dense tiny model, saved; with the config's `changes` whatever it drops."""
    model = tiny_model(case, **{key: value for key, value in changes.items() if value is not None})
    for key, value in changes.items():
        setattr(model.config, key, value)
    model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> the live source and what a process of plain transformers made of the export."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("exported")
    live = {}
    for case, unit in PADDED:
        name = f"{case}-{unit}-padded"
        live[name] = narrowed(case, unit)
        live[name][0].save_pretrained(sources / name)
        export(sources / name, out / name, "padded")
    for case in UNUSUAL:
        name, model = f"{case}-padded", tiny_architecture(case)
        live[name] = (model, differing_(model))
        model.save_pretrained(sources / name)
        export(sources / name, out / name, "padded")
    for case, format, changes, _ in MOVES:
        name = f"{case}-{format}"
        live[name] = (saved(sources / name, case, **changes), None)
        export(sources / name, out / name, format)
    for case in STOCK:
        name = f"{case}-stock"
        live[name] = (saved(sources / name, case), None)
        export(sources / name, out / name)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    torch.save(batches(), elsewhere / "inputs.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOADER, out, "inputs.pt"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("modules") == []
    for name in found:
        mask = [batch["attention_mask"].bool() for batch in batches()]
        loaded = torch.load(elsewhere / f"{name}.pt")
        found[name]["logits"] = torch.cat([x[m] for x, m in zip(loaded, mask, strict=True)])
    return live, found


def assert_same_function(exported, name, model_type):
    live, found = exported
    model, masked = live[name]
    assert found[name]["problems"] == {}
    assert found[name]["stock"]
    assert found[name]["model_type"] == model_type
    for source in filter(None, (model, masked)):
        assert relative_error(found[name]["logits"], logits(source, batches())) < 1e-5


# Computes the same


@pytest.mark.parametrize("case", UNUSUAL)
def test_padded_layers_compute_the_same_whatever_the_layout(exported, case):
    assert_same_function(exported, f"{case}-padded", case)


@pytest.mark.parametrize("format", FORMATS)
def test_a_decoder_inside_another_model_is_refused(tmp_path, format):
    tiny_architecture("mistral3").save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="lies inside another model, which cannot be exported"):
        export(tmp_path / "in", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("format", ["mistral", "granite", "gguf"])
def test_a_type_that_is_not_known_to_be_another_is_refused(tmp_path, format):
    tiny_architecture("gpt2").save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="not known to"):
        export(tmp_path / "in", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("case", "unit"), PADDED)
def test_padded_layers_compute_the_same(exported, case, unit):
    name = f"{case}-{unit}-padded"
    assert_same_function(exported, name, exported[0][name][0].config.model_type)


@pytest.mark.parametrize(("case", "format", "changes", "model_type"), MOVES)
def test_another_type_computes_the_same(exported, case, format, changes, model_type):
    assert_same_function(exported, f"{case}-{format}", model_type)


@pytest.mark.parametrize("case", STOCK)
def test_stock_is_the_checkpoint_itself(exported, case):
    live, _ = exported
    assert_same_function(exported, f"{case}-stock", live[f"{case}-stock"][0].config.model_type)


@pytest.mark.parametrize("format", ["mistral", "granite"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_move_keeps_the_rotary_embedding(tmp_path, format, kind):
    rope = {"rope_type": kind, "rope_theta": 50.0, "factor": 4.0}
    limits = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    model = saved(tmp_path / "in", "llama", rope_parameters=rope | limits)
    export(tmp_path / "in", tmp_path / "out", format)
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Beyond max_position_embeddings=64, where dynamic frequencies change.
    ids = [{"input_ids": torch.randint(97, (2, 90), generator=torch.Generator().manual_seed(0))}]
    assert relative_error(logits(moved, ids), logits(model, ids)) < 1e-5


def test_layers_with_several_kv_groups_and_group_sizes_are_padded(tmp_path):
    """4 groups of 1 head, 2 of 3: 4 of 3 are needed, and 12 heads do not divide 56."""
    config = AutoConfig.for_model(
        **{"model_type": "llama", "vocab_size": 97, "hidden_size": 56, "intermediate_size": 40},
        **{"num_hidden_layers": 2, "num_attention_heads": 7, "num_key_value_heads": 7},
        **{"head_dim": 10, "initializer_range": 0.2},
    )
    setattr(config, ALLOW, True)
    config.auto_map = dict(AUTO_MAP)
    config.per_layer_config = {
        0: {"num_attention_heads": 4, "num_key_value_heads": 4},
        1: {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 31},
    }
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "in")
    assert export(tmp_path / "in", tmp_path / "out", "padded").model_type == "mistral"
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (wide.config.num_attention_heads, wide.config.num_key_value_heads) == (12, 4)
    assert wide.config.intermediate_size == 40
    assert relative_error(logits(wide, batches()), logits(model, batches())) < 1e-5


@pytest.mark.parametrize("dim", [0, 1])
def test_padding_leaves_each_channel_of_a_unit_in_its_place(dim):
    tensor = torch.randn(6, 5) if dim == 0 else torch.randn(5, 6)
    wide = padded_units(tensor, dim, (3, 2), (4, 3)).movedim(dim, 0)
    narrow = tensor.movedim(dim, 0)
    assert wide.shape == (12, 5)
    for unit in range(4):
        for channel in range(3):
            there = unit < 3 and channel < 2
            expected = narrow[unit * 2 + channel] if there else torch.zeros(5)
            assert torch.equal(wide[unit * 3 + channel], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(tmp_path, dtype):
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path / "in")
    result = export(tmp_path / "in", tmp_path / "out", "granite")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    assert result.error < 1e-6


# Refused, and before anything is written


@pytest.mark.parametrize(
    ("case", "format", "changes", "reason"),
    [
        ("llama-biases", "mistral", {}, "attention_bias=True, mlp_bias=True"),
        ("qwen2", "mistral", {}, "biases on q, k and v"),
        ("qwen3", "mistral", {}, "normalises queries and keys, and a mistral does not"),
        ("qwen3", "granite", {}, "normalises queries and keys, and a granite does not"),
        ("mistral-sliding", "mistral", {}, "sliding_window=7"),
        ("mistral-sliding", "granite", {}, "sliding_window=7"),
        ("qwen2-mixed", "granite", {}, "sliding_window=6"),
        ("mistral-sliding", "gguf", {}, "sliding_window=7"),
        ("qwen2-mixed", "gguf", {}, "sliding_window=6"),
        ("qwen3-biases", "gguf", {}, "attention_bias=True"),
        ("llama", "gguf", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3", "gguf", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_another_function_is_refused_with_the_reason(tmp_path, case, format, changes, reason):
    tiny_model(case, **changes).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "in", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "padded"])
def test_layers_that_differ_are_sent_to_padded(tmp_path, format):
    narrowed("llama", "kv_group")[0].save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"mlp \[40, 57, 83\] channels.*'padded' first"):
        export(tmp_path / "in", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_arguments_are_refused(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        export(tmp_path / "nowhere", out)
    tiny_model("llama").config.save_pretrained(source)
    with pytest.raises(FileNotFoundError, match="no weights"):
        export(source, out)
    tiny_model("llama").save_pretrained(source)
    with pytest.raises(ValueError, match="'guf' is not known; did you mean 'gguf'"):
        export(source, out, "guf")
    with pytest.raises(ValueError, match="gguf_type='f16' goes with format 'gguf', not 'stock'"):
        export(source, out, gguf_type="f16")
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export(source, out)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export(source, out / "thesis.tex")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "persimmon"}, "architecture 'persimmon' is not known"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"per_layer_config": {"0": {"intermediate_size": 40}}}, "not of grail_hf"),
    ],
)
def test_models_that_cannot_be_exported_are_refused(tmp_path, changes, reason):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "in", tmp_path / "out", "padded")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_load_whole_is_refused(tmp_path):
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"does not load whole \(missing_keys: \['lm_head.weight"):
        export(tmp_path / "in", tmp_path / "out")


def test_a_result_that_is_another_function_is_not_put_in_place(tmp_path, monkeypatch):
    def other_function(config, architecture):
        return type(config).from_dict(config.to_dict() | {"rms_norm_eps": 1.0})

    monkeypatch.setitem(FORMATS, "wrong", replace(FORMATS["stock"], config=other_function))
    tiny_model("qwen3").save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="does not compute what"):
        export(tmp_path / "in", tmp_path / "out", "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not list((tmp_path / "out").iterdir())


# What lies beside the weights


def test_what_lies_beside_comes_along(tmp_path, tokenizer):
    source, out = tmp_path / "in", tmp_path / "out"
    model = tiny_model("llama", vocab_size=4096)
    report = grail_hf.compress(
        model,
        None,
        batches(),
        sparsity=0.3,
        multiple_of=1,
        allocation="uniform",
        ignore=0,
        progress=False,
    )
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    report.save(source)
    (source / "LICENSE").write_text("licence")
    (source / "chat_template.jinja").write_text("template")
    result = export(source, out, "padded")
    same = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    for name in (*same, "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not list(out.glob("*.py"))
    again = CompressionReport.load(out)
    assert again.widths == report.widths
    assert again.export["format"] == "padded"
    assert again.export["model_type"] == result.model_type == "llama"
    card = (out / "README.md").read_text()
    assert "filled with zeros" in card and "trust_remote_code" not in card
    padded = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert padded == result.parameters > report.total_parameters[1]
    assert f"| parameters of this file |  | {padded:,} |" in card
    assert "parameters of this file" not in (source / "README.md").read_text()
    assert "trust_remote_code" in (source / "README.md").read_text()


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n\n# Mine\n"])
def test_a_foreign_card_is_kept_and_told_the_format(tmp_path, card):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    if card:
        (tmp_path / "in" / "README.md").write_text(card)
    export(tmp_path / "in", tmp_path / "out", "granite")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(card.rstrip() if card else "# in\n")
    assert "ordinary `granite` checkpoint" in text
    assert not (tmp_path / "out" / "grail.json").exists()


# GGUF


def read_gguf(path):
    """The metadata of a file."""
    gguf = pytest.importorskip("gguf")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def byte_level(pattern, ignore_merges):
    """A byte-level BPE of single bytes that splits text by a pattern."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    merges = [("a", "b")]
    vocabulary["ab"] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*cut, whole]) if cut else whole
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
def with_tokenizer(tmp_path):
    """Saves a tiny model with a tokenizer of bytes; `sparsity` is removed from it first."""
    pytest.importorskip("gguf")

    def save(case, sparsity=0.0, dtype=torch.float32, **changes):
        model = tiny_model(case, dtype=dtype, **{"vocab_size": 300} | changes)
        model.config.sliding_window = None
        if sparsity:
            grail_hf.compress(
                model,
                None,
                batches(),
                sparsity=sparsity,
                multiple_of=1,
                allocation="uniform",
                progress=False,
            )
        model.save_pretrained(tmp_path / "in")
        byte_level(None, False).save(str(tmp_path / "in" / "tokenizer.json"))
        return model

    return save


@pytest.mark.parametrize(
    ("case", "sparsity", "architecture"),
    [
        ("llama", 0.0, "llama"),
        # Heads that divide the hidden size: transformers makes a llama of every "llama" file.
        ("llama", 0.5, "llama"),
        ("mistral", 0.5, "llama"),
        ("qwen3", 0.0, "qwen3"),
        ("qwen3", 0.29, "qwen3"),
        ("qwen2-derived-head-dim", 0.0, "qwen2"),
    ],
)
def test_transformers_reads_the_gguf_back(tmp_path, with_tokenizer, case, sparsity, architecture):
    # transformers does not read qwen3's head size, and takes 128.
    model = with_tokenizer(case, sparsity, **({"head_dim": 128} if case == "qwen3" else {}))
    result = export(tmp_path / "in", tmp_path / "out", "gguf")
    assert (result.model_type, result.error) == (architecture, 0.0)
    tensors = pytest.importorskip("gguf").GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert result.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert relative_error(logits(again, batches()), logits(model, batches())) < 1e-5
    saved = read_gguf(tmp_path / "out" / "model.gguf")
    config = model.config
    assert saved["general.architecture"] == architecture
    for key, value in {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": model.model.layers[0].self_attn.head_dim,
        "feed_forward_length": config.intermediate_size,
        "embedding_length": config.hidden_size,
        "block_count": 3,
        "context_length": 64,
        "rope.freq_base": 50.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-2),
    }.items():
        assert saved[f"{architecture}.{key}"] == value


def test_the_tokenizer_is_in_the_file(tmp_path, with_tokenizer, tokenizer, jargon_test):
    with_tokenizer("llama", vocab_size=4096)
    tokenizer.save_pretrained(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", "gguf")
    saved = read_gguf(tmp_path / "out" / "model.gguf")
    assert saved["tokenizer.ggml.model"] == "gpt2"
    assert saved["tokenizer.ggml.pre"] == "gpt-2"
    assert saved["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(4096))
    assert saved["tokenizer.ggml.token_type"] == [3] + [1] * 4095
    assert saved["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert saved["tokenizer.ggml.add_bos_token"] is False
    merges = json.loads((tmp_path / "in" / "tokenizer.json").read_text())["model"]["merges"]
    assert saved["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = jargon_test.read_text()[:2000]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("dtype", "gguf_type", "kinds", "error"),
    [
        (torch.float32, "auto", {"F32"}, 0.0),
        (torch.bfloat16, "auto", {"F32", "BF16"}, 0.0),
        (torch.float16, "auto", {"F32", "F16"}, 0.0),
        (torch.float32, "f16", {"F32", "F16"}, 1e-3),
        (torch.float32, "bf16", {"F32", "BF16"}, 5e-3),
        (torch.bfloat16, "f32", {"F32"}, 0.0),
        # Rows of 48 and of 83 are no blocks of 32, those of 120 neither: only o_proj's 96 are.
        (torch.float32, "q8_0", {"F32", "F16", "Q8_0"}, 1e-2),
    ],
)
def test_the_type_of_a_gguf(tmp_path, with_tokenizer, dtype, gguf_type, kinds, error):
    gguf = pytest.importorskip("gguf")
    with_tokenizer("llama", dtype=dtype, head_dim=8)
    result = export(tmp_path / "in", tmp_path / "out", "gguf", gguf_type=gguf_type)
    assert (error == 0) == (result.error == 0) and result.error <= error
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert {tensor.tensor_type.name for tensor in tensors} == kinds
    assert {t.tensor_type.name for t in tensors if t.name.endswith("norm.weight")} == {"F32"}


def test_queries_and_keys_are_reordered_for_neighbouring_pairs():
    """Turning (2i, 2i + 1) in the new order gives the scores of turning (i, i + d/2) in the old."""
    heads, d = 3, 8
    q, k = torch.randn(2, heads * d, dtype=torch.float64)
    angles = torch.rand(2, d // 2, dtype=torch.float64)
    scores = []
    for order, first, second in (
        (lambda rows, _: rows, slice(0, d // 2), slice(d // 2, d)),
        (interleaved, slice(0, d, 2), slice(1, d, 2)),
    ):
        turned = []
        for rows, angle in zip((q, k), angles, strict=True):
            x = order(rows, d).reshape(heads, d)
            a, b = x[:, first], x[:, second]
            turned += [torch.cat([a * angle.cos() - b * angle.sin()], 1)]
            turned += [torch.cat([a * angle.sin() + b * angle.cos()], 1)]
        scores.append((turned[0] * turned[2] + turned[1] * turned[3]).sum(1))
    torch.testing.assert_close(scores[0], scores[1])
    rows = torch.randn(heads * d, 5)
    assert torch.equal(deinterleaved(interleaved(rows, d), d), rows)
    assert not torch.equal(interleaved(rows, d), rows)


def test_rotary_factors_give_the_models_own_frequencies(tmp_path, with_tokenizer):
    model = with_tokenizer("llama-tied-scaled-rope")
    factors = rotary_factors(model, model.config)
    plain = 50.0 ** -(torch.arange(0, 10, 2) / 10)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert not torch.equal(factors, torch.ones(5))
    export(tmp_path / "in", tmp_path / "out", "gguf")
    gguf = pytest.importorskip("gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["rope_freqs.weight"]), factors)
    assert "output.weight" not in tensors


def test_linear_scaling_is_written(tmp_path, with_tokenizer):
    rope = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
    with_tokenizer("qwen3", rope_parameters=rope)
    export(tmp_path / "in", tmp_path / "out", "gguf")
    saved = read_gguf(tmp_path / "out" / "model.gguf")
    assert saved["qwen3.rope.scaling.type"] == "linear"
    assert saved["qwen3.rope.scaling.factor"] == 3.0


def test_a_qwen2_of_fewer_heads_is_a_llama_with_biases(tmp_path, with_tokenizer):
    """llama.cpp's qwen2 takes no other number of heads."""
    gguf = pytest.importorskip("gguf")
    model = with_tokenizer("qwen2-derived-head-dim", 0.3)
    assert export(tmp_path / "in", tmp_path / "out", "gguf").model_type == "llama"
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    bias = model.model.layers[1].self_attn.q_proj.bias
    assert torch.equal(torch.tensor(tensors["blk.1.attn_q.bias"]), interleaved(bias, 4))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "input_layernorm"])
def test_a_gguf_that_differs_is_found_out(tmp_path, with_tokenizer, name):
    """In the order of the rows of a rotary pair, or by the rounding of a norm."""
    pytest.importorskip("gguf")
    model, path = with_tokenizer("llama"), tmp_path / "model.gguf"
    plan = plan_gguf(tmp_path / "in", model.config, find_architecture("llama"))
    write_gguf(model, plan, path)
    assert check_gguf(model, plan, path) == 0
    weight = model.model.layers[1].get_submodule(name).weight.data
    weight[:2] = weight[:2].flip(0) if weight.ndim == 2 else weight[:2].half() * 1.001
    with pytest.raises(ExportError, match=r"is not in model\.gguf as it is in the model"):
        check_gguf(model, plan, path)


def test_numbers_that_f16_cannot_hold_are_refused(tmp_path, with_tokenizer):
    model = with_tokenizer("llama")
    model.lm_head.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ExportError, match="65504"):
        export(tmp_path / "in", tmp_path / "out", "gguf", gguf_type="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--format", "gguf"]
    result = CliRunner().invoke(app, ["export", *arguments, "--gguf-type", "f16"])
    assert result.exit_code == 1 and "65504" in result.stderr


@pytest.mark.parametrize(("pattern", "ignore_merges"), PRE_TOKENIZERS)
def test_the_pre_tokenizer_is_named(tmp_path, with_tokenizer, pattern, ignore_merges):
    with_tokenizer("qwen3")
    byte_level(pattern, ignore_merges).save(str(tmp_path / "in" / "tokenizer.json"))
    export(tmp_path / "in", tmp_path / "out", "gguf")
    saved = read_gguf(tmp_path / "out" / "model.gguf")
    assert saved["tokenizer.ggml.pre"] == PRE_TOKENIZERS[pattern, ignore_merges]
    assert saved["tokenizer.ggml.tokens"][257:] == [f"[PAD{i}]" for i in range(257, 300)]
    assert saved["tokenizer.ggml.token_type"] == [1] * 257 + [5] * 43


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file | {"model": file["model"] | {"byte_fallback": True}},
        lambda file: file | {"model": file["model"] | {"type": "Unigram"}},
        lambda file: file | {"model": file["model"] | {"ignore_merges": True}},
        lambda file: file | {"normalizer": {"type": "Lowercase"}},
        lambda file: file | {"pre_tokenizer": None},
        lambda file: file | {"pre_tokenizer": {"type": "Whitespace"}},
        lambda file: file | {"pre_tokenizer": file["pre_tokenizer"] | {"add_prefix_space": True}},
        lambda file: file | {"pre_tokenizer": file["pre_tokenizer"] | {"use_regex": False}},
    ],
)
def test_other_tokenizers_are_refused(tmp_path, with_tokenizer, change):
    with_tokenizer("llama")
    file = tmp_path / "in" / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match="not a byte-level BPE that splits text like gpt-2"):
        export(tmp_path / "in", tmp_path / "out", "gguf")


def test_gguf_needs_a_tokenizer_that_fits_and_the_extra(tmp_path, with_tokenizer, monkeypatch):
    with_tokenizer("llama")
    with pytest.raises(ValueError, match="'q4' is not known"):
        export(tmp_path / "in", tmp_path / "out", "gguf", gguf_type="q4")
    tiny_model("llama").save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="has ids up to 256, and the model 97 tokens"):
        export(tmp_path / "in", tmp_path / "out", "gguf")
    (tmp_path / "in" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        export(tmp_path / "in", tmp_path / "out", "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "grail-hf\[gguf\]"'):
        export(tmp_path / "in", tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("key", [key for key, entry in ARCHITECTURES.items() if entry.gguf])
def test_a_type_without_a_gguf_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.setitem(ARCHITECTURES, key, replace(ARCHITECTURES[key], gguf=(), exports={}))
    tiny_model(key).save_pretrained(tmp_path / "in")
    for format in ("gguf", "granite"):
        with pytest.raises(ValueError, match=key):
            export(tmp_path / "in", tmp_path / "out", format)


# The command line


def test_the_command_exports_what_compress_wrote(tmp_path, tiny_llama_dir, less_text):
    pytest.importorskip("gguf")
    runner = CliRunner()

    def run(*arguments):
        result = runner.invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    code, _, err = run(
        *("compress", tiny_llama_dir, tmp_path / "small", "--sparsity", 0.5, "--ignore", 0),
        *("--selector", "wanda", "--calibration", less_text, "--num-samples", 8),
        *("--seq-length", 64, "--allocation", "uniform", "--self-samples", 0, "--ridge", 1e-2),
        *("--refit", 0, "--device", "cpu"),
    )
    assert code == 0, err
    code, out, err = run("export", tmp_path / "small", tmp_path / "gguf", "--format", "gguf")
    assert code == 1 and "'padded' first" in err and not out
    source = tmp_path / "small"
    for format in ("padded", "stock", "mistral", "granite", "gguf"):
        arguments = ("export", source, tmp_path / format, "--format", format, "--json")
        code, out, err = run(*arguments)
        assert code == 0, err
        assert json.loads(out)["format"] == format
        assert json.loads(out)["error"] == pytest.approx(0, abs=1e-6)
        source = tmp_path / "padded"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ids = [{"input_ids": torch.arange(40)[None]}]
    for format in ("padded", "stock", "mistral", "granite", "gguf"):
        how = {"gguf_file": "model.gguf"} if format == "gguf" else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / format, dtype=torch.float32, **how)
        assert relative_error(logits(model, ids), logits(dense, ids)) < 1e-6


# llama.cpp itself


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
@pytest.mark.parametrize(
    "case", ["llama", "llama-tied-scaled-rope", "mistral", "qwen2-derived-head-dim", "qwen3"]
)
def test_llama_cpp_computes_the_same(tmp_path, with_tokenizer, tokenizer, case, sparsity):
    xllamacpp = pytest.importorskip("xllamacpp")
    model = with_tokenizer(case, sparsity, vocab_size=4096, initializer_range=0.15)
    tokenizer.save_pretrained(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", "gguf")
    ids = torch.randint(1, 4000, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits[0, -1].log_softmax(-1)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "out" / "model.gguf")
    settings.n_ctx, settings.cpuparams.n_threads = 256, 1
    answer = xllamacpp.Server(settings).handle_completions(
        {"prompt": ids[0].tolist(), "max_tokens": 1, "logprobs": 40, "temperature": 0}
    )
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    # llama.cpp keeps keys and values in fp16.
    assert len(top) == 40
    for token in top:
        assert token["logprob"] == pytest.approx(expected[token["id"]].item(), abs=0.05)


def test_formats_are_documented():
    assert all(f'"{format}": ' in export.__doc__ for format in FORMATS)

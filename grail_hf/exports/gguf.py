"""Write a checkpoint as one GGUF file for llama.cpp, and compare what was written with it.

Needs the `gguf` package, which is imported when it is first used. The tensors' names and order are
its own (`get_tensor_name_map`); what llama.cpp computes of them is said by `Gguf` entries in
`architectures.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grail_hf.config import unknown_name
from grail_hf.models.compatibility import Gguf, head_dim
from grail_hf.models.schema import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
GGUF_FILE = "model.gguf"
# Our name -> those of a matrix's type and of the file's. Vectors are F32, as llama.cpp wants them.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_OWN_TYPES: dict[Any, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_ROPE_FACTORS = "rope_freqs.weight"
# How a byte-level BPE cuts text before merging: the `Split` pattern in front of the `ByteLevel`
# pre-tokenizer, None where the latter cuts by GPT-2's own, and whether a whole word that is in the
# vocabulary is taken without merging -> what llama.cpp calls that. Its converter finds the name by
# a hash of the ids of a test text, which holds for published vocabularies alone.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str | None, bool], str] = {
    (None, False): "gpt-2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
}


class ExportError(RuntimeError):
    """What was written is not what the source holds or computes."""


@dataclass(frozen=True)
class GgufPlan:
    """What will be written: llama.cpp's architecture, the model's config, folder and type."""

    gguf: Gguf
    config: PreTrainedConfig
    folder: Path
    type_name: str
    pre_tokenizer: str

    @property
    def rotary_kind(self) -> str:
        kind: str = self.config.rope_parameters["rope_type"]
        return kind


def plan_gguf(
    folder: Path, config: PreTrainedConfig, architecture: Architecture, type_name: str = "auto"
) -> GgufPlan:
    """Settle how the checkpoint in `folder`, whose layers have one width, is written.

    Raises:
        ImportError: gguf is not installed.
        ValueError: llama.cpp computes another function, the type is not known, or the tokenizer
            is none that can be written.
    """
    if type_name == "auto":
        type_name = _OWN_TYPES.get(config.dtype, "f32")
    if type_name not in TYPES:
        raise unknown_name("gguf_type", type_name, TYPES, "TYPES in grail_hf/exports/gguf.py")
    obstacles = [gguf.obstacles(config) for gguf in architecture.gguf]
    if not obstacles:
        raise ValueError(
            f"{config.model_type} is not known to be exported as GGUF; llama.cpp's own converter "
            "reads 'stock' and 'padded' exports"
        )
    if all(obstacles):
        raise ValueError(
            f"llama.cpp's {architecture.gguf[-1].name} does not compute what this "
            f"{config.model_type} does: {', '.join(obstacles[-1])}"
        )
    if find_spec("gguf") is None:
        raise ImportError('GGUF needs the gguf package: pip install "grail-hf[gguf]"')
    pre_tokenizer = _pre_tokenizer(folder, config.vocab_size)
    return GgufPlan(
        architecture.gguf[obstacles.index([])], config, folder, type_name, pre_tokenizer
    )


def write_gguf(model: PreTrainedModel, plan: GgufPlan, path: Path) -> int:
    """Write the model and the tokenizer of the plan's folder to a GGUF file.

    Returns:
        The number of parameters in it.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.gguf.name)
    _add_config(writer, plan)
    _add_tokenizer(writer, plan)
    tensors = dict(_tensors(model, plan))
    for name, tensor in tensors.items():
        kind = _tensor_type(tensor, plan.type_name)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        # As bytes, whose shape the writer turns back; it takes no others for a type of its own.
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        kind = _tensor_type(tensor, plan.type_name)
        with np.errstate(over="ignore"):  # `check_gguf` refuses what F16 cannot hold
            data = gguf.quantize(tensor.float().numpy(), kind)
        writer.write_tensor_data(data.view(np.uint8))
    writer.close()
    return sum(tensor.numel() for tensor in tensors.values())


def check_gguf(model: PreTrainedModel, plan: GgufPlan, path: Path) -> float:
    """Read the file back and compare each tensor with the model's.

    Returns:
        The largest relative error of a tensor: 0 unless the type rounds.

    Raises:
        ExportError: a tensor is missing, left over, or further off than its type rounds.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for name, expected in _tensors(model, plan, reorder=False):
        if name not in found:
            raise ExportError(f"{name} is not in {path.name}; nothing was written")
        tensor = found.pop(name)
        data = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        actual = torch.from_numpy(np.array(data, dtype=np.float32))
        if plan.gguf.interleaved and name.split(".")[-2] in ("attn_q", "attn_k"):
            actual = deinterleaved(actual, head_dim(plan.config))
        expected = expected.float()
        difference = (actual - expected).abs()
        if not (difference <= _rounding(expected, tensor.tensor_type.name)).all():
            raise ExportError(
                f"{name} is not in {path.name} as it is in the model: largest difference "
                f"{difference.max().item():.2g}; nothing was written (f16 cannot hold numbers "
                "beyond 65504)"
            )
        worst = max(worst, (difference.norm() / expected.norm().clamp_min(1e-30)).item())
    if found:
        raise ExportError(f"{path.name} holds {sorted(found)[:3]}, which the model does not")
    return worst


def _rounding(tensor: Tensor, kind: str) -> Tensor:
    """The largest difference that writing a tensor as `kind` makes, of each of its numbers.

    Half a unit in the last place; for Q8_0 half a step of a block of 32, whose 127 steps reach its
    largest number, and as much again as the step itself is rounded to fp16.
    """
    if kind == "Q8_0":
        steps = tensor.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127
        return (0.57 * steps + 1e-7).expand(-1, 32).reshape(tensor.shape)
    digits, least = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[kind]
    return tensor.abs() * digits + least


def _tensors(
    model: PreTrainedModel, plan: GgufPlan, reorder: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors: name and value in the model's dtype, on the CPU; the tied head is one.

    Without `reorder`, queries and keys stand as they are in the model.
    """
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[plan.gguf.name], plan.config.num_hidden_layers)
    if plan.rotary_kind == "llama3":
        yield _ROPE_FACTORS, rotary_factors(model, plan.config)
    for key, value in model.state_dict().items():
        if plan.config.tie_word_embeddings and key == "lm_head.weight":
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp's {plan.gguf.name} has no place for {key}")
        tensor = value.detach().cpu()
        rotated = key.rpartition(".")[0].endswith(_ROTATED)
        if reorder and rotated and plan.gguf.interleaved:
            tensor = interleaved(tensor, head_dim(plan.config))
        yield name, tensor


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads * d, …], or their biases, so that rotary pairs are neighbours.

    transformers turns channel i of a head with i + d/2, llama.cpp's llama 2i with 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def deinterleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rotary_factors(model: PreTrainedModel, config: PreTrainedConfig) -> Tensor:
    """[d/2] fp32: what llama.cpp divides the plain rotary frequencies by to get the model's own."""
    channels = torch.arange(0, head_dim(config), 2, dtype=torch.float64) / head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -channels
    own = model.base_model.get_submodule("rotary_emb").get_buffer("inv_freq")
    factors: Tensor = (plain / own.cpu().double()).float()
    return factors


def _tensor_type(tensor: Tensor, type_name: str) -> Any:
    """A tensor's type: vectors are F32, and F16 is what llama.cpp takes where blocks do not fit."""
    import gguf

    kind = gguf.GGMLQuantizationType[TYPES[type_name][0]]
    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.F16


def _add_config(writer: Any, plan: GgufPlan) -> None:
    import gguf

    config, rope = plan.config, plan.config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(plan.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[plan.type_name][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if plan.rotary_kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _pre_tokenizer(folder: Path, vocab_size: int) -> str:
    """llama.cpp's name for how the folder's tokenizer cuts text.

    Raises ValueError where it has none, or the tokenizer has ids beyond the model's `vocab_size`.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, which a GGUF file holds: save the tokenizer in it"
        )
    said = json.loads(file.read_text("utf-8"))
    model, cutter = said["model"], said.get("pre_tokenizer") or {}
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    *splits, last = steps
    pattern = splits[0]["pattern"].get("Regex") if splits and "pattern" in splits[0] else None
    name = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges"))))
    as_known = (
        model["type"] == "BPE"
        and not model.get("byte_fallback")
        and (said.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and last.get("use_regex", True) == (pattern is None)
        and len(splits) == (pattern is not None)
        and all(step.get("behavior") == "Isolated" and not step.get("invert") for step in splits)
    )
    if name is None or not as_known:
        raise ValueError(
            f"the tokenizer in {folder} is no byte-level BPE that cuts text as "
            f"{', '.join(PRE_TOKENIZERS.values())} do; llama.cpp's own converter reads 'stock' and "
            "'padded' exports. One is added to PRE_TOKENIZERS in grail_hf/exports/gguf.py"
        )
    last_id = max([*model["vocab"].values(), *(token["id"] for token in said["added_tokens"])])
    if last_id >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {last_id}, and the model {vocab_size} tokens"
        )
    return name


def _add_tokenizer(writer: Any, plan: GgufPlan) -> None:
    """Vocabulary, merges, special tokens and chat template, in llama.cpp's terms."""
    import gguf
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(plan.folder / "tokenizer.json"))
    size = plan.config.vocab_size
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for index, added in tokenizer.get_added_tokens_decoder().items():
        types[index] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(plan.pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(plan.folder, load_merges=True, n_vocab=size)
    # Said outright, and as the tokenizer does it: llama.cpp's defaults go by the name.
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    ids = special.special_token_ids
    special.add_special_token = {
        "bos": whole != plain and whole[0] == ids.get("bos"),
        "eos": whole != plain and whole[-1] == ids.get("eos"),
    }
    special.add_to_gguf(writer, quiet=True)

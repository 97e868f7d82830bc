"""Write a checkpoint as one GGUF file for llama.cpp, and check the file against the checkpoint.

Needs the `gguf` package, which is imported when it is first used. It defines the names of the
tensors (`get_tensor_name_map`); `Gguf` entries in `architectures.py` describe the function that
llama.cpp computes from them.
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
# `gguf_type` -> gguf's names of a matrix's type and of the file's. Vectors are always F32.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_OWN_TYPES: dict[Any, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_ROPE_FACTORS = "rope_freqs.weight"
# How a byte-level BPE splits text before merging -> llama.cpp's name for it. The key is the `Split`
# pattern before the `ByteLevel` pre-tokenizer, None for GPT-2's own, and whether a whole word of
# the vocabulary is taken without merging. llama.cpp's converter finds the name by a hash of the ids
# of a test text, which works for published vocabularies only.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str | None, bool], str] = {
    (None, False): "gpt-2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
}


class ExportError(RuntimeError):
    """The written export does not hold or compute what its source does."""


@dataclass(frozen=True)
class GgufPlan:
    """What is going to be written.

    Attributes:
        gguf: entry of llama.cpp's architecture.
        config: of the model.
        folder: the checkpoint's, with its tokenizer.
        type_name: a name in `TYPES`.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text.
    """

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
    """Plan the GGUF file of the checkpoint in `folder`, whose layers all have one width.

    Raises:
        ImportError: gguf is not installed.
        ValueError: llama.cpp computes another function, the type is not known, or the tokenizer
            cannot be written.
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
    """Write the model, and the tokenizer in the plan's folder, to a GGUF file.

    Returns:
        The number of parameters in the file.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.gguf.name)
    _add_config(writer, plan)
    _add_tokenizer(writer, plan)
    tensors = dict(_tensors(model, plan))
    for name, tensor in tensors.items():
        kind = _tensor_type(tensor, plan.type_name)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        # The writer takes data of quantised types as bytes only, and restores the shape itself.
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        kind = _tensor_type(tensor, plan.type_name)
        with np.errstate(over="ignore"):  # `check_gguf` refuses overflows of F16
            data = gguf.quantize(tensor.float().numpy(), kind)
        writer.write_tensor_data(data.view(np.uint8))
    writer.close()
    return sum(tensor.numel() for tensor in tensors.values())


def check_gguf(model: PreTrainedModel, plan: GgufPlan, path: Path) -> float:
    """Read the file back and compare each tensor with the model's.

    Returns:
        The largest relative error of a tensor, which is 0 unless the type rounds.

    Raises:
        ExportError: a tensor is missing, left over, or differs by more than the rounding of its
            type.
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
    """The largest rounding error of each element of a tensor that is written as `kind`.

    Half a unit in the last place. For Q8_0, half a step of a block of 32, whose 127 steps reach its
    largest element, and some more because the step itself is rounded to fp16.
    """
    if kind == "Q8_0":
        steps = tensor.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127
        return (0.57 * steps + 1e-7).expand(-1, 32).reshape(tensor.shape)
    digits, least = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[kind]
    return tensor.abs() * digits + least


def _tensors(
    model: PreTrainedModel, plan: GgufPlan, reorder: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors: name and value, in the model's dtype on the CPU; a tied head once.

    Without `reorder`, the rows of queries and keys keep the model's order.
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
    """Reorder rows of q or k [heads * d, ..], or their biases, so that rotary pairs are adjacent.

    transformers rotates channel i of a head with i + d/2, llama.cpp's llama 2i with 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def deinterleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rotary_factors(model: PreTrainedModel, config: PreTrainedConfig) -> Tensor:
    """[d/2] fp32, by which llama.cpp divides the plain rotary frequencies to get the model's."""
    channels = torch.arange(0, head_dim(config), 2, dtype=torch.float64) / head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -channels
    own = model.base_model.get_submodule("rotary_emb").get_buffer("inv_freq")
    factors: Tensor = (plain / own.cpu().double()).float()
    return factors


def _tensor_type(tensor: Tensor, type_name: str) -> Any:
    """The type of a tensor: F32 for vectors, and F16 where blocks do not fit, as in llama.cpp."""
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
    """llama.cpp's name for the way the folder's tokenizer splits text.

    Raises ValueError if it has none, or if the tokenizer has ids beyond the model's `vocab_size`.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, which a GGUF file needs: save the tokenizer there"
        )
    saved = json.loads(file.read_text("utf-8"))
    model, splitter = saved["model"], saved.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = steps
    pattern = splits[0]["pattern"].get("Regex") if splits and "pattern" in splits[0] else None
    name = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges"))))
    as_known = (
        model["type"] == "BPE"
        and not model.get("byte_fallback")
        and (saved.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and last.get("use_regex", True) == (pattern is None)
        and len(splits) == (pattern is not None)
        and all(step.get("behavior") == "Isolated" and not step.get("invert") for step in splits)
    )
    if name is None or not as_known:
        raise ValueError(
            f"the tokenizer in {folder} is not a byte-level BPE that splits text like "
            f"{', '.join(PRE_TOKENIZERS.values())}; llama.cpp's own converter reads 'stock' and "
            "'padded' exports. One is added to PRE_TOKENIZERS in grail_hf/exports/gguf.py"
        )
    last_id = max([*model["vocab"].values(), *(token["id"] for token in saved["added_tokens"])])
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
    # Set explicitly to what the tokenizer does, since llama.cpp's defaults depend on the name.
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    ids = special.special_token_ids
    special.add_special_token = {
        "bos": whole != plain and whole[0] == ids.get("bos"),
        "eos": whole != plain and whole[-1] == ids.get("eos"),
    }
    special.add_to_gguf(writer, quiet=True)

"""Export a checkpoint for other programs: as another model type, with padded layers, or as GGUF.

An export computes the same function as its source. This is verified on the written files before
they take the output folder's place: the logits on random tokens in fp32, or each tensor of a GGUF
file.

GGUF. The file includes the tokenizer, which has to be a byte-level BPE that splits text as GPT-2,
Llama 3 or Qwen2 do. Rotary embeddings may be plain, linear or Llama 3's. For anything else, use
llama.cpp's own converter on a "stock" or "padded" export. K-quants need widths that are multiples
of 256. A Qwen2 with fewer heads becomes llama.cpp's `llama` with biases, because its `qwen2`
derives the head size from the number of heads.

vLLM. These facts were read in the model code of vLLM 0.33.0 (`vllm/model_executor/models`), not
run:

- With one width for all layers, vLLM's own code loads Llama, Mistral, Qwen3, Gemma, Gemma 2, Phi-3,
  Granite, Cohere, EXAONE 4, Nemotron, Mixtral and others: it reads `head_dim` and takes any number
  of heads. It does not load a `qwen2`, `qwen2_moe`, `granitemoe`, `lfm2` or `lfm2_moe` with fewer
  heads, for which it takes `head_dim` to be hidden size / heads. A `qwen3` with fewer heads and
  `bias="auto"` computes something else, because the bias of `o_proj` is ignored.
- It does not load layers that differ in width.
- Its Transformers backend (`vllm serve OUT --model-impl transformers`), which builds transformers'
  own model code, loads all of these. Layers that differ need grail_hf installed beside vLLM. The
  entry point `vllm.general_plugins` then registers such checkpoints in each of vLLM's processes
  without remote code, and each layer's attention gets the heads of that layer.
- Otherwise keep all heads (`attention_sparsity=0`), export a Qwen2 as "granite", or export layers
  that differ as "padded".
- Tensor parallelism over n accelerators needs a number of heads and an MLP width (`multiple_of`)
  that are multiples of n, and a number of KV heads that is a multiple or a divisor of n.

The model card repeats what applies to its checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grail_hf.card import CARD_FILE, USAGE
from grail_hf.checkpoints.folders import replaced_when_whole
from grail_hf.checkpoints.reader import damage_named
from grail_hf.config import unknown_name
from grail_hf.exports.gguf import GGUF_FILE, ExportError, check_gguf, plan_gguf, write_gguf
from grail_hf.models.architectures import find_architecture
from grail_hf.models.compatibility import Rehome
from grail_hf.models.configs import edited_config, rehomed_config, uniform_config
from grail_hf.models.decoder import decoder_layers
from grail_hf.models.modeling_grail import has_own_widths
from grail_hf.models.schema import Architecture, GroupSpec
from grail_hf.report import REPORT_FILE, CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
# Relative error of fp32 logits: two orders above the rounding of another order of summation.
TOLERANCE = 1e-4
_CONFIG_FILE = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        format: a name in `FORMATS`.
        source: the source folder's name.
        model_type: of the result; for GGUF the name of llama.cpp's architecture.
        error: relative error of the result's logits on random tokens, computed in fp32; for GGUF
            the largest relative error of a tensor, in the Frobenius norm.
        parameters: number of parameters of the result, padding included and tied ones once.
    """

    format: str
    source: str
    model_type: str
    error: float
    parameters: int


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        config: gives the config of the result. Raises ValueError if the format cannot hold it.
        write: writes the result to a folder, see `_write_checkpoint`.
        note: describes the result in its card.
        usage: shows in its card how to load it.
        has_types: whether `gguf_type` applies.
    """

    config: Callable[[PreTrainedConfig, Architecture], PreTrainedConfig]
    write: Callable[[Path, Path, PreTrainedConfig, Architecture, str], tuple[str, float, int]]
    note: str
    usage: str = USAGE
    has_types: bool = False


def export(
    source: str | Path, output: str | Path, format: str = "stock", *, gguf_type: str = "auto"
) -> Export:
    """Write the checkpoint in folder `source` to folder `output` in another format.

    "stock": the checkpoint's own type.
    "padded": its own type, with zeros that fill every layer to the widest's shape. This costs the
        memory that narrower layers saved: where a program reads no other format, prefer one width
        for all layers (no single layers in `ignore`). A mixture of experts whose layers differ
        cannot be padded.
    "mistral": a Mistral, which allows any number of heads; from a llama without biases, or a
        mistral with full attention.
    "granite": a Granite, which allows any number of heads, and biases; from a llama, or a mistral
        or qwen2 with full attention.
    "gguf": one file for llama.cpp; from a llama, or a mistral, qwen2 or qwen3 with full attention.

    All but "padded" require one width for all layers: export as "padded" first, and then again.
    Tokenizer, generation config and other small files are copied. The model is held in memory, in
    fp32 for the comparison (4 bytes per parameter).

    Args:
        source: a checkpoint folder, of grail_hf or any other of a known architecture.
        output: a folder that does not exist or is empty.
        format: a name in `FORMATS`.
        gguf_type: dtype of the matrices in a GGUF file: "f32", "f16", "bf16", "q8_0", or "auto",
            which is the checkpoint's dtype. All but "auto" may round.

    Raises:
        OSError, ValueError, ImportError: the folders, the format or the model do not allow it;
            nothing has been written.
        ExportError: the result computes another function; the output folder is unchanged.
    """
    source, output = Path(source), Path(output)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS, "FORMATS in grail_hf/exports/export.py")
    if gguf_type != "auto" and not FORMATS[format].has_types:
        raise ValueError(f"gguf_type={gguf_type!r} goes with format 'gguf', not {format!r}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder: choose another")
    config = _read_config(source)
    architecture = find_architecture(config.model_type)
    check_own_decoder(config)
    target = FORMATS[format].config(config, architecture)
    with replaced_when_whole(output) as folder:
        written = FORMATS[format].write(source, folder, target, architecture, gguf_type)
        _copy_other_files(source, folder)
        result = Export(format, source.resolve().name, *written)
        _write_card(source, folder, result)
    return result


def _read_config(source: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder.

    Raises FileNotFoundError or ValueError if it is not one that can be exported.
    """
    from transformers import AutoConfig

    if not (source / _CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{source} is not a checkpoint folder: there is no {_CONFIG_FILE} in it; save the "
            "model with model.save_pretrained first"
        )
    if not any(path.suffix in (".safetensors", ".bin") for path in source.iterdir()):
        raise FileNotFoundError(f"{source} is not a checkpoint folder: it holds no weights")
    config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source} is quantised: export the full-precision checkpoint")
    if getattr(config, "is_heterogeneous", False) and not has_own_widths(config):
        raise ValueError(f"{source} has a per_layer_config that is not of grail_hf")
    return config


def check_own_decoder(config: PreTrainedConfig) -> None:
    """Raise ValueError if the decoder is part of another model."""
    if config.get_text_config() is not config:
        raise ValueError(
            f"the text decoder of a {config.model_type} lies inside another model, which cannot be "
            "exported: its checkpoint is an ordinary one already, use it as it is"
        )


def stock_config(config: PreTrainedConfig, architecture: Architecture) -> PreTrainedConfig:
    """The unchanged config. Raises ValueError if the layers have different widths."""
    differ = [
        f"{group[0].name} {sorted({spec.num_units * spec.columns for spec in group})}"
        for group in _differing(layer_groups(config, architecture))
    ]
    if differ:
        raise ValueError(
            f"the layers differ in width ({'; '.join(differ)} channels), which this format cannot "
            "represent: export as 'padded' first"
        )
    return uniform_config(config)


def moved_config(config: PreTrainedConfig, architecture: Architecture, to: str) -> PreTrainedConfig:
    """The config as the model type `to`, which computes the same function.

    Raises ValueError if it does not, naming what differs.
    """
    config = stock_config(config, architecture)
    move = architecture.exports.get(to, "it is not known to compute the same function")
    obstacles = [move] if isinstance(move, str) else move.obstacles(config)
    if obstacles or not isinstance(move, Rehome):
        raise ValueError(
            f"this {config.model_type} cannot be exported as {to!r}: {', '.join(obstacles)}; "
            "'stock' and 'padded' keep its type"
        )
    return rehomed_config(config, move)


def padded_config(config: PreTrainedConfig, architecture: Architecture) -> PreTrainedConfig:
    """The config that gives every layer the shape of the widest.

    If layers differ in their KV groups and in the query heads of a group, the widest shape has the
    largest number of both. Raises ValueError if no type can represent the number of heads, and for
    a mixture of experts.
    """
    edits: dict[str, Any] = {}
    specs = layer_groups(config, architecture)
    differing = _differing(specs)
    if differing and architecture.experts:
        raise ValueError(
            f"the layers of this {config.model_type} differ in width, and padding is not offered "
            "for a mixture of experts: compress it without single layers in ignore"
        )
    for group in differing:
        widest = max(group, key=lambda spec: spec.columns)
        edits |= widest.config_values(max(spec.num_units for spec in group))
    return edited_config(config, specs, edits, architecture.rehome)


def layer_groups(
    config: PreTrainedConfig, architecture: Architecture
) -> list[tuple[GroupSpec, ...]]:
    """The groups of each decoder layer, in units of KV groups, at the layer's own widths."""
    layers = decoder_layers(_skeleton(config), architecture)
    return [architecture.groups(config, layer) for layer in layers]


def _differing(specs: Sequence[Sequence[GroupSpec]]) -> list[list[GroupSpec]]:
    """For each kind of group whose shape differs between layers, the groups that have units."""
    by_kind: dict[str, list[GroupSpec]] = {}
    for spec in (spec for layer in specs for spec in layer if spec.num_units):
        by_kind.setdefault(spec.kind, []).append(spec)
    return [group for group in by_kind.values() if len({_shape(spec) for spec in group}) > 1]


def _shape(spec: GroupSpec) -> tuple[int, int]:
    return spec.num_units, spec.columns


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM of the config on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config),  # from_config sets the dtype of its argument
            dtype=dtype,
        )
    return model


def _write_checkpoint(
    source: Path,
    folder: Path,
    config: PreTrainedConfig,
    architecture: Architecture,
    gguf_type: str,
) -> tuple[str, float, int]:
    """Write a checkpoint of the config's type, padded if the config is wider than the source.

    Returns:
        Its model type, the relative error of its logits, and its number of parameters.

    Raises:
        ExportError: that error exceeds `TOLERANCE`.
    """
    fitted = _fitted_model(_load(source, "auto"), config, architecture)
    fitted.save_pretrained(folder)
    parameters = fitted.num_parameters()
    del fitted  # the check loads two models
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    expected, actual = _logits(source, ids), _logits(folder, ids)
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise ExportError(
            f"the exported {config.model_type} does not compute what {source} does: relative "
            f"error of the logits {error:.2g}, allowed {TOLERANCE:g}; nothing was written"
        )
    return config.model_type, error, parameters


def _write_gguf(
    source: Path,
    folder: Path,
    config: PreTrainedConfig,
    architecture: Architecture,
    gguf_type: str,
) -> tuple[str, float, int]:
    """Write a GGUF file.

    Returns:
        The name of llama.cpp's architecture, the largest relative error of a tensor, and the number
        of parameters.
    """
    plan = plan_gguf(source, config, architecture, gguf_type)
    model = _load(source, "auto")
    parameters = write_gguf(model, plan, folder / GGUF_FILE)
    return plan.gguf.name, check_gguf(model, plan, folder / GGUF_FILE), parameters


def _fitted_model(
    model: PreTrainedModel, config: PreTrainedConfig, architecture: Architecture
) -> PreTrainedModel:
    """The stock causal LM of the config with the model's tensors, padded where it is wider.

    Biases that the model lacks are zeros.
    """
    fitted = _skeleton(config, model.dtype)
    state = model.state_dict()
    pairs = zip(
        layer_groups(model.config, architecture), layer_groups(config, architecture), strict=True
    )
    for index, (narrow, wide) in enumerate(pairs):
        prefix = f"{model.base_model_prefix}.{architecture.layers}.{index}."
        for old, new in zip(narrow, wide, strict=True):
            if _shape(old) != _shape(new):
                _pad_group_(state, prefix, old, new)
    for name, parameter in fitted.named_parameters():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros(parameter.shape, dtype=parameter.dtype)
    fitted.load_state_dict(state, assign=True)
    fitted.tie_weights()
    return fitted


def _pad_group_(state: dict[str, Tensor], prefix: str, old: GroupSpec, new: GroupSpec) -> None:
    """Pad a group's tensors in `state` to the shape of `new`, with zeros in and after its units."""
    before, after = ((*spec.producers, *spec.norms) for spec in (old, new))
    for narrow, wide in zip(before, after, strict=True):
        for kind in ("weight", "bias"):
            name = f"{prefix}{narrow.path}.{kind}"
            if name not in state:
                continue
            dim = int(old.transposed and kind == "weight")
            sizes = [old.num_units * per_unit for per_unit in narrow.rows]
            sections = zip(
                torch.split(state[name], sizes, dim), narrow.rows, wide.rows, strict=True
            )
            padded = [
                padded_units(section, dim, (old.num_units, n), (new.num_units, m))
                for section, n, m in sections
            ]
            state[name] = torch.cat(padded, dim)
    name = f"{prefix}{old.consumer}.weight"
    state[name] = padded_units(
        state[name],
        0 if old.transposed else 1,
        (old.num_units, old.columns),
        (new.num_units, new.columns),
    )


def padded_units(tensor: Tensor, dim: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Append zeros to the channels of each unit, and units of zeros.

    Args:
        tensor: its dimension `dim` holds units x channels.
        dim: the padded dimension.
        old: (units, channels per unit) before.
        new: the same after, neither smaller.

    Returns:
        The tensor with new units x channels in `dim`, in which unit i, channel j keeps its indices.
    """
    last = tensor.movedim(dim, -1)
    units = last.reshape(*last.shape[:-1], *old)
    wider = pad(units, (0, new[1] - old[1], 0, new[0] - old[0]))
    return wider.flatten(-2).movedim(-1, dim).contiguous()


def _load(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load the model in a folder.

    Raises:
        ValueError: tensors are missing or left over.
        OSError: a file is truncated or damaged.
    """
    from transformers import AutoModelForCausalLM

    with damage_named(f"a file of weights in {folder}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    model, info = loaded
    problems = [f"{key}: {sorted(map(str, found))[:3]}" for key, found in info.items() if found]
    if problems:
        raise ValueError(f"{folder} does not load whole ({'; '.join(problems)})")
    causal_lm: PreTrainedModel = model.eval()
    return causal_lm


@torch.no_grad()
def _logits(folder: Path, ids: Tensor) -> Tensor:
    """[B, T, V] fp32, computed in fp32 for a model of any dtype."""
    logits: Tensor = _load(folder, torch.float32)(input_ids=ids, use_cache=False).logits
    return logits


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, licence and others: all but weights, code and config."""
    own = {_CONFIG_FILE, REPORT_FILE, CARD_FILE}
    for path in source.iterdir():
        is_weight = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not (is_weight or path.suffix == ".py" or path.name in own):
            shutil.copy(path, folder)


def _write_card(source: Path, folder: Path, result: Export) -> None:
    """Write the source's report and card, or only a card, with a section on the format."""
    format = FORMATS[result.format]
    settings = {
        **asdict(result),
        "note": format.note.format(model_type=result.model_type),
        "usage": format.usage,
    }
    if (source / REPORT_FILE).is_file():
        replace(CompressionReport.load(source), export=settings).save(folder)
        return
    card = source / CARD_FILE
    text = card.read_text("utf-8").rstrip() if card.is_file() else f"# {result.source}"
    lines = [text, "## Format", settings["note"], format.usage]
    (folder / CARD_FILE).write_text("\n\n".join(lines) + "\n", "utf-8")


_ORDINARY = "an ordinary `{model_type}` checkpoint, which plain transformers loads"
FORMATS: Mapping[str, Format] = {
    "stock": Format(stock_config, _write_checkpoint, f"This is {_ORDINARY}."),
    "mistral": Format(
        partial(moved_config, to="mistral"),
        _write_checkpoint,
        f"This is {_ORDINARY}; as such it computes what the source does.",
    ),
    "granite": Format(
        partial(moved_config, to="granite"),
        _write_checkpoint,
        f"This is {_ORDINARY}; its four multipliers are set so that it computes what the source "
        "does.",
    ),
    "padded": Format(
        padded_config,
        _write_checkpoint,
        f"This is {_ORDINARY}: layers are filled with zeros to the widest's shape, so that it "
        "computes what the source does, in more memory.",
    ),
    "gguf": Format(
        stock_config,
        _write_gguf,
        f"`{GGUF_FILE}` is for llama.cpp and whatever reads GGUF (architecture `{{model_type}}`).",
        f"```\nllama-cli -m {GGUF_FILE}\n```",
        has_types=True,
    ),
}

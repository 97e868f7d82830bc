"""Export a checkpoint so that other programs load it: another type, padded layers, GGUF.

An export computes the same function as its source. That is checked on what has been written, and
only then does it take the output folder's place.
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
# Relative, of logits in fp32: two orders above the rounding of another order of summation.
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
            the largest of a tensor, in the Frobenius norm.
        parameters: of the result, with what was padded; tied ones once, as they are written.
    """

    format: str
    source: str
    model_type: str
    error: float
    parameters: int


def export(
    source: str | Path, output: str | Path, format: str = "stock", *, gguf_type: str = "auto"
) -> Export:
    """Write the checkpoint in folder `source` to folder `output` in another format.

    "stock" is the checkpoint's own type, if its layers have one width. "mistral" and "granite"
    are other types that compute the same function and whose configs can say more shapes. "padded"
    fills every layer with zeros to the widest's shape. "gguf" is one file for llama.cpp. Tokenizer,
    generation config and other small files are copied. The model is held in memory, in fp32 for the
    check (4 bytes a parameter).

    Args:
        source: a checkpoint folder, of grail_hf or any other of a known architecture.
        output: a folder that does not exist or is empty.
        format: a name in `FORMATS`.
        gguf_type: of the matrices in a GGUF file: "f32", "f16", "bf16", "q8_0", or "auto", which
            is the checkpoint's dtype. All but "auto" may round.

    Raises:
        OSError, ValueError, ImportError: the folders, the format or the model do not allow it;
            nothing has been written.
        ExportError: the result is not the same function; nothing has been put in place.
    """
    source, output = Path(source), Path(output)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS, "FORMATS in grail_hf/exports/export.py")
    if gguf_type != "auto" and FORMATS[format].write is not _write_gguf:
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
    """The config of a checkpoint folder. FileNotFoundError or ValueError where there is none."""
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
    """Raise ValueError where the decoder is a part of another model."""
    if config.get_text_config() is not config:
        raise ValueError(
            f"the text decoder of a {config.model_type} lies inside another model, which cannot be "
            "exported: its checkpoint is an ordinary one already, use it as it is"
        )


def stock_config(config: PreTrainedConfig, architecture: Architecture) -> PreTrainedConfig:
    """The config as it is. Raises ValueError where the layers have several widths."""
    differ = [
        f"{group[0].name} {sorted({spec.num_units * spec.columns for spec in group})}"
        for group in _differing(layer_groups(config, architecture))
    ]
    if differ:
        raise ValueError(
            f"the layers differ in width ({'; '.join(differ)} channels), which this format cannot "
            "say: export as 'padded' first"
        )
    return uniform_config(config)


def moved_config(config: PreTrainedConfig, architecture: Architecture, to: str) -> PreTrainedConfig:
    """The config as another type that computes the same function.

    Raises ValueError where that type computes another, and says what differs.
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

    Where layers have several numbers of KV groups and of query heads in a group, the widest has
    the largest of both. Raises ValueError where no type can say the number of heads, and for a
    mixture of experts.
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
    """The groups of each decoder layer, by whole KV groups, at the layer's own widths."""
    layers = decoder_layers(_skeleton(config), architecture)
    return [architecture.groups(config, layer) for layer in layers]


def _differing(specs: Sequence[Sequence[GroupSpec]]) -> list[list[GroupSpec]]:
    """Of each kind of group whose shape differs between layers, those of the layers with units."""
    by_kind: dict[str, list[GroupSpec]] = {}
    for spec in (spec for layer in specs for spec in layer if spec.num_units):
        by_kind.setdefault(spec.kind, []).append(spec)
    return [group for group in by_kind.values() if len({_shape(spec) for spec in group}) > 1]


def _shape(spec: GroupSpec) -> tuple[int, int]:
    return spec.num_units, spec.columns


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The config's causal LM on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config),
            dtype=dtype,  # it would be given the dtype
        )
    return model


def _write_checkpoint(
    source: Path,
    folder: Path,
    config: PreTrainedConfig,
    architecture: Architecture,
    gguf_type: str,
) -> tuple[str, float, int]:
    """A checkpoint of the config's type: its model type, the error of its logits, parameters."""
    fitted = _fitted_model(_load(source, "auto"), config, architecture)
    fitted.save_pretrained(folder)
    parameters = fitted.num_parameters()
    del fitted  # others are to be loaded
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
    """A GGUF file: llama.cpp's architecture, the largest error of a tensor, parameters."""
    plan = plan_gguf(source, config, architecture, gguf_type)
    model = _load(source, "auto")
    parameters = write_gguf(model, plan, folder / GGUF_FILE)
    return plan.gguf.name, check_gguf(model, plan, folder / GGUF_FILE), parameters


def _fitted_model(
    model: PreTrainedModel, config: PreTrainedConfig, architecture: Architecture
) -> PreTrainedModel:
    """The stock causal LM of the config around the model's tensors, padded where it is wider.

    Biases that the model does not have are zeros.
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
    """Give a group's tensors the shape of `new`: zero rows and columns behind and inside units."""
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
    """Zeros behind the channels of each unit, and behind the units.

    Args:
        tensor: its dimension `dim` holds units x channels.
        dim: the dimension.
        old: (units, channels a unit) before.
        new: the same after; none may be smaller.

    Returns:
        The same tensor with new units x channels in `dim`: channel j of unit i is where it was.
    """
    last = tensor.movedim(dim, -1)
    units = last.reshape(*last.shape[:-1], *old)
    wider = pad(units, (0, new[1] - old[1], 0, new[0] - old[0]))
    return wider.flatten(-2).movedim(-1, dim).contiguous()


def _load(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model in a folder. Raises ValueError where tensors are missing or left over.

    And OSError where a file is cut short or damaged.
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
    """[B, T, V] fp32, of a model computed in fp32 whatever dtype it is saved in."""
    logits: Tensor = _load(folder, torch.float32)(input_ids=ids, use_cache=False).logits
    return logits


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, licence and the like: all but weights, code and config."""
    own = {_CONFIG_FILE, REPORT_FILE, CARD_FILE}
    for path in source.iterdir():
        is_weight = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not (is_weight or path.suffix == ".py" or path.name in own):
            shutil.copy(path, folder)


def _write_card(source: Path, folder: Path, result: Export) -> None:
    """Write the report and the card of the source, or only a card, that say the format."""
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


@dataclass(frozen=True)
class Format:
    """A format: what config the result has, who writes it, and what its card says of its use."""

    config: Callable[[PreTrainedConfig, Architecture], PreTrainedConfig]
    write: Callable[..., tuple[str, float, int]]
    note: str
    usage: str = USAGE


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
    ),
}

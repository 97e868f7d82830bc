"""Config edits: how a stock `config.json` says the new widths, and another type where it cannot.

Nothing of grail_hf is needed to load the result, unless widths differ between layers (see
`modeling_grail`): the live model is given the very config that a plain `from_pretrained` will read,
and, where it moves to another model type, that type's own modules around the same tensors.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import update_wrapper
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from grail_hf.architectures import ATTENTION, GroupSpec, Rehome
from grail_hf.checkpoint import OWN, Journal
from grail_hf.modeling_grail import (
    AUTO_MAP,
    LayerConfig,
    has_own_widths,
    layer_classes,
    share_config_,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ALLOW = "allow_global_per_layer_attribute_access"


def compressed_config(
    config: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    widths: Mapping[str, Sequence[int]],
    rehome: Rehome | None = None,
) -> PreTrainedConfig:
    """A config that says `widths`, of the same model type or, failing that, of `rehome`'s.

    Where layers differ, the widest gives the config's own values, and `per_layer_config` those of
    the others; `modeling_grail` is what reads it. Of a model with a text decoder inside, only the
    decoder's part changes.

    Args:
        config: of the dense model; not changed.
        specs: of each decoder layer, its groups.
        widths: kind -> units kept, one width a decoder layer.
        rehome: where the model may move; None forbids it.

    Raises:
        ValueError: neither type's config can say the widths, or this transformers knows no config
            whose layers differ.
    """
    text = config.get_text_config()
    if text is not config:
        decoder = compressed_config(text, specs, widths)
        return _edited(uniform_config(config), {"text_config": decoder})
    edits: dict[str, Any] = {}
    layers: dict[int, dict[str, int]] = {}
    for kind, of_kind in widths.items():
        offered = [
            (index, spec, of_kind[index])
            for index, layer in enumerate(specs)
            for spec in layer
            if spec.kind == kind and spec.offered
        ]
        widest = max((width for _, _, width in offered), default=0)
        for index, spec, width in offered:
            if width < spec.num_units:
                edits |= spec.config_values(widest)
            if width < widest:
                own = {key: width * n for key, n in spec.config_per_unit.items()}
                layers[index] = layers.get(index, {}) | own
    return edited_config(config, specs, edits, rehome, layers)


def edited_config(
    config: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    edits: dict[str, Any],
    rehome: Rehome | None = None,
    layers: Mapping[int, Mapping[str, int]] | None = None,
) -> PreTrainedConfig:
    """A config with `edits`, of the same model type or, failing that, of `rehome`'s.

    Args:
        config: is not changed; if its layers differ, those of the result do not, but by `layers`.
        specs: of each decoder layer, its groups, for what a refusal says.
        edits: config key -> value, of all layers.
        rehome: where the model may move; None forbids it.
        layers: the layers that differ from that -> their own values.

    Raises:
        ValueError: neither type's config can say it, or this transformers knows no config whose
            layers differ.
    """
    says = ", ".join(f"{key}={value}" for key, value in edits.items())
    config = uniform_config(config)
    if layers:
        _check_own_widths(config)
    try:
        return _with_own_widths(_edited(config, edits), layers)
    except _Unsayable as error:
        refusal = f"a stock {config.model_type} config cannot say {says} ({error})"
        remedy = "choose another sparsity, attention_sparsity or attention_unit"
        if said := said_widths(config, specs):
            kept = ", ".join(map(str, sorted(said)))
            remedy += f"; of {max(said)} attention units a layer it can keep {kept}"
        if rehome is None:
            raise ValueError(f"{refusal}; {remedy}") from error
        if obstacles := rehome.obstacles(config):
            raise ValueError(
                f"{refusal}, and {', '.join(obstacles)} keeps it from being saved as "
                f"{rehome.model_type}; {remedy}"
            ) from error
    return _with_own_widths(rehomed_config(config, rehome, edits), layers)


def said_widths(
    config: PreTrainedConfig, specs: Sequence[Sequence[GroupSpec]]
) -> frozenset[int] | None:
    """The attention widths that a config of this type can say of all layers alike.

    The full width is always among them. None where no attention units can be removed.

    Args:
        config: of the dense model; not changed.
        specs: of each decoder layer, its groups.
    """
    attention = (s for layer in specs for s in layer if s.kind == ATTENTION and s.offered)
    spec = next(attention, None)
    if spec is None:
        return None
    config = uniform_config(config.get_text_config())
    said = {spec.num_units}
    for width in range(spec.partitions, spec.num_units, spec.partitions):
        with suppress(_Unsayable):
            _edited(config, spec.config_values(width))
            said.add(width)
    return frozenset(said)


def uniform_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config in which every layer is as wide as the widest.

    It has no `auto_map`: the stock class loads such a model, and code from the hub may compute a
    width from others. A model that is itself made of such code names it again when it is saved.
    """
    config = copy.deepcopy(config)
    if has_own_widths(config):
        config.per_layer_config = None
        del config.__dict__[ALLOW]
    vars(config).pop("auto_map", None)
    return config


def switch_on_biases_(
    new: PreTrainedConfig,
    dense: PreTrainedConfig,
    specs: Sequence[Sequence[GroupSpec]],
    widths: Mapping[str, Sequence[int]],
) -> set[str]:
    """Have the compressed model's config say biases for the groups that it reduces.

    Returns:
        The kinds of group whose projections now have biases and had none. Where the model moves to
        another type, that is none: the other type may not know the key.
    """
    if new.model_type != dense.model_type:
        return set()
    new, dense = new.get_text_config(), dense.get_text_config()
    every = [(index, spec) for index, layer in enumerate(specs) for spec in layer]
    keys = {
        spec.bias_key
        for index, spec in every
        if spec.bias_key
        and widths[spec.kind][index] < spec.num_units
        and not getattr(dense, spec.bias_key)
    }
    for key in keys:
        setattr(new, key, True)
    return {spec.kind for _, spec in every if spec.bias_key in keys}


class _Unsayable(ValueError):
    """What a config class says of values that it does not take."""


def _edited(config: PreTrainedConfig, edits: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy with other values. Raises `_Unsayable` where the class does not take them."""
    from huggingface_hub.errors import StrictDataclassError

    edited = copy.deepcopy(config)
    try:
        for key, value in edits.items():
            setattr(edited, key, value)
        edited.validate()
    except (StrictDataclassError, ValueError) as error:
        raise _Unsayable(str(error).strip().splitlines()[-1].strip()) from error
    return edited


def _with_own_widths(
    config: PreTrainedConfig, layers: Mapping[int, Mapping[str, int]] | None
) -> PreTrainedConfig:
    """Give some layers values of their own, in place.

    This comes after all other edits: transformers compares these values with the config's, and it
    warns when a config whose layers differ is validated.
    """
    if layers:
        vars(config).update({ALLOW: True, "auto_map": dict(AUTO_MAP)})
        config.per_layer_config = {index: dict(own) for index, own in layers.items()}
    return config


def _check_own_widths(config: PreTrainedConfig) -> None:
    """Raise ValueError where no config can have layers that differ."""
    from transformers import __version__

    if not hasattr(type(config), "per_layer_config"):
        raise ValueError(
            f"transformers {__version__} has no config whose layers differ (per_layer_config): "
            "update transformers, or give every layer the same width (allocation='uniform' and no "
            "single layers in ignore)"
        )


def rehomed_config(
    config: PreTrainedConfig, rehome: Rehome, edits: Mapping[str, object] | None = None
) -> PreTrainedConfig:
    """The config as `rehome`'s model type, with `edits` and the keys that the type knows."""
    from transformers import AutoConfig

    to = rehome.model_type
    known = AutoConfig.for_model(to).to_dict().keys() - {"model_type", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    rehomed = AutoConfig.for_model(to, **(values | dict(edits or {}) | rehome.values(config)))
    rehomed.name_or_path = config.name_or_path
    return rehomed


def causal_lm_name(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """The class that the model will have under its new config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.model_type == model.config.model_type:
        return type(model).__name__
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return str(mapping[type(config)].__name__)


def is_stock_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the model is just what `AutoModelForCausalLM` makes of its config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return type(model) is mapping.get(type(model.config), None)


def apply_config_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give the live, already narrowed model its new config, and its new type if that differs."""
    if config.model_type != model.config.model_type:
        _rehome_(model, config)
        return
    # Replaced rather than edited: other models may have been built from the same config object.
    dense, text = model.config, config.get_text_config()
    kinds = tuple(layer_classes(type(model)))
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if text is config:
        for index, layer in enumerate(layers):
            share_config_(layer, dense, config, index)
    module: Any
    for module in model.modules():
        held = getattr(module, "config", None)
        if held is dense:
            module.config = config
        elif text is not config and isinstance(held, (type(text), LayerConfig)):
            module.config = text  # the decoder inside may hold a copy of its part


def _rehome_(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Turn the model into `config`'s stock causal LM: each module takes the other type's class.

    Modules stay the objects they are, with their parameters, buffers, hooks and training flags;
    what the other type's constructor sets and this one's does not is taken from a model of the
    other type on the meta device.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    pairs = list(zip(stock.named_modules(), model.named_modules(), strict=True))
    for (new_name, new), (name, module) in pairs:
        expected = {key: p.shape for key, p in new.named_parameters(recurse=False)}
        present = {key: p.shape for key, p in module.named_parameters(recurse=False)}
        if new_name != name or expected != present:
            raise RuntimeError(
                f"{type(model).__name__} and {type(stock).__name__} no longer agree: {present} at "
                f"{name!r} against {expected} at {new_name!r}"
            )
    for (_, new), (_, module) in pairs:
        state = vars(module)
        state.update({key: value for key, value in vars(new).items() if key not in state})
        if "config" in state:
            state["config"] = config
        if "_old_forward" in state:  # what accelerate's hook calls
            module._old_forward = MethodType(type(new).forward, module)
            update_wrapper(module.forward, module._old_forward)
        module.__class__ = type(new)


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """The folder beside `output` in which its successor grows, for this process alone.

    What an earlier process left there stays, so that a run can go on; what it was about to replace
    when it was killed is back in its place, or gone where that was taken. Where `output` is a link,
    all this is about the folder that it leads to.

    Raises:
        OSError: another process is at work for the same output, nothing can be written there, or
            the folder cannot be replaced (see `check_replaceable`).
    """
    from filelock import FileLock, Timeout

    check_replaceable(output)
    output = output.resolve()
    work, old = _beside(output, "partial"), _beside(output, "old")
    (work / OWN).mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / OWN / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"another process is writing {output}: wait for it") from error
    try:
        if old.exists() and not output.exists():
            old.rename(output)
        for left in (old, output / OWN):
            _clear(left)
        yield work
    finally:
        if work.exists() and {path.name for path in work.rglob("*")} <= {OWN, "lock"}:
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def put_in_place(work: Path, output: Path) -> None:
    """Have a whole folder take the place of `output`, which is there or not."""
    output = output.resolve()
    old = _beside(output, "old")
    _clear(old)
    if output.exists():
        output.rename(old)
    work.rename(output)
    shutil.rmtree(output / OWN)
    _clear(old)


def check_replaceable(output: Path) -> None:
    """Raise OSError where no other folder can take the place of `output`, which is there or not.

    A mount point cannot be renamed; a shell in the current folder would be left in a deleted one.
    """
    output = output.resolve()
    if os.path.ismount(output):
        what = "is a mount point"
    elif Path.cwd().is_relative_to(output):
        what = "is the current folder, or holds it"
    else:
        return
    raise OSError(
        f"{output} {what}, so that the result cannot take its place as a whole: name a folder "
        f"inside it, for example {output / 'model'}"
    )


def empty(work: Path) -> None:
    """Delete all in a claimed folder but what claims it."""
    for path in work.iterdir():
        if path.name == OWN:
            for own in path.iterdir():
                if own.name != "lock":
                    _delete(own)
        else:
            _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _clear(path: Path) -> None:
    """Delete a folder as far as that can be done, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


@contextmanager
def replaced_when_whole(output: Path) -> Iterator[Path]:
    """A folder to write in, that takes `output`'s place when everything is written.

    Raises:
        FileExistsError: a run from disk to disk, which can go on, was stopped there.
        OSError: the folder is whole and cannot take that place; names the folder, which is kept.
    """
    with claimed(output) as work:
        _refuse_stopped(work)
        empty(work)
        whole = False
        try:
            yield work
            whole = True
            put_in_place(work, output)
        except BaseException as error:
            if whole and isinstance(error, OSError) and work.exists():
                raise OSError(
                    f"{output} cannot be replaced ({error}): what was to be there is in {work}"
                ) from error
            if work.exists():  # else it is in the output's place
                empty(work)
            raise


def save_or_rescue(save: Callable[[Path], None], folder: Path, output: Path) -> None:
    """Fill a folder by `save`; where that cannot be written, another one, and say so.

    What took long to compute is not lost to a disk that has filled up in the meantime.

    Args:
        save: writes everything into the folder that it is given.
        folder: a claimed folder, emptied where it cannot be filled.
        output: what the folder stands for, for messages.

    Raises:
        OSError: the folder cannot be filled. Names the folder that was filled instead, in the one
            for temporary files or in the user's home, or says that there was no room there either.
    """
    from safetensors import SafetensorError

    unwritten = (OSError, SafetensorError)
    try:
        save(folder)
        return
    except unwritten as error:
        failure = error
    empty(folder)
    tried = []
    for parent in (Path(tempfile.gettempdir()), Path.home()):
        try:
            rescue = Path(tempfile.mkdtemp(prefix=f"{output.name}-", dir=parent))
        except OSError as error:
            tried.append(f"{parent} ({error})")
            continue
        try:
            save(rescue)
        except unwritten as error:
            tried.append(f"{parent} ({error})")
            shutil.rmtree(rescue, ignore_errors=True)
            continue
        raise OSError(
            f"{output} cannot be written ({failure}): the compressed model is in {rescue} instead, "
            "whole; move it where you want it"
        ) from failure
    raise OSError(
        f"{output} cannot be written ({failure}), and neither can {' nor '.join(tried)}: the "
        "compressed model is lost; make room and start again"
    ) from failure


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of a folder has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 2**30:.2f} GiB are to be written and {free / 2**30:.2f} GiB are free: make "
            "room, or choose an output on another disk",
            str(folder),
        )


def check_not_stopped(output: Path) -> None:
    """Raise FileExistsError where a run from disk to disk, which can go on, was stopped."""
    with claimed(output) as work:
        _refuse_stopped(work)


def _refuse_stopped(work: Path) -> None:
    if Journal.exists(work):
        raise stopped_there(work)


def stopped_there(work: Path) -> FileExistsError:
    """The error where a run that can go on was not asked to."""
    layers = Journal.read(work).layers
    return FileExistsError(
        f"{work} holds a run that was stopped after {layers} layers: resume=True (--resume) goes "
        "on with it; delete that folder to start again"
    )

"""`GrailConfig`: everything a compression depends on besides the model and the calibration text."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

TARGETS = ("self", "dense", "residual")
FOLDS = ("measured", "linear")
ATTENTION_UNITS = ("kv_group", "query_head")
AUTO = "auto"
SOLVE_DTYPES = (AUTO, "float32", "float64")
HIDDEN_STATES = (AUTO, "accelerator", "host", "disk")


@dataclass(frozen=True)
class GrailConfig:
    """What to remove, how to choose it and how to repair it. Frozen; checked when made.

    Args:
        sparsity: fraction of the decoder blocks' projection parameters to remove, in [0, 1).
            It always means the total: if one of `mlp_sparsity` and `attention_sparsity` is
            given, the other kind takes what is left to remove.
        mlp_sparsity: fraction of the MLP channels to remove, in [0, 1); of a mixture's experts,
            of each expert's. It is rounded to whole steps, with a warning where that is far off.
        attention_sparsity: fraction of the attention units to remove, in [0, 1), likewise, and to
            what the config can say.
        selector: a name in `grail_hf.SELECTORS`, or a function (group, stats) -> scores [units]
            of your own, which sees the consumer's weight [O, H] as `group.weight`, the number of
            columns that a unit owns as `group.columns`, and X^T X [H, H] as `stats.gram`; the
            units of highest score stay. A `grail_hf.Selector` holds a function with what it needs.
            JSON gives a function's name.
        allocation: a name in `grail_hf.ALLOCATIONS`: how the kept parameters are shared out.
            "uniform-split": one width per kind for all layers, at the split between attention and
            MLP with the least divergence from the dense model, each kind of attention unit tried;
            it takes one pass over the dense model. "uniform": both kinds keep the same fraction;
            nothing is measured. "error", "search", "flap": each layer has widths of its own, by
            the repaired error and one measured divergence of each block, by several, or by
            standardised scores (of a selector that measures, as `flap` does); such a checkpoint
            loads with `import grail_hf` or `trust_remote_code=True`. "auto": "uniform-split" where
            there is a split to choose and it can be measured, which it cannot for a mixture of
            experts; "uniform" elsewhere.
        compensate: repair each consumer by ridge regression (GRAIL); False is plain pruning. With
            a target of the dense model, consumers whose group keeps all its units are repaired too,
            behind the first that lost some, unless `ignore` names them.
        target: what a repaired consumer should put out. "self": what it did before, on the
            compressed path (the paper). "dense": what the dense model puts out there. "residual":
            what brings the residual stream to the dense model's, so that a block also repairs
            what earlier blocks lost; as "dense" where a norm lies between block and stream. For
            each of a mixture's experts it is "self": what a block lacks belongs to no one expert.
        refit: conjugate gradient steps in which the producers that a block is linear in (values,
            up-projections; of a fused projection their rows) are refitted to the target after the
            consumer, by half of the
            calibration, or by all of it for more than 2 steps; 0 leaves them as they were cut. A
            step takes about three forward passes of the block on those tokens. A refit that
            overflows, or that leaves a larger error than the repair did, is undone with a warning.
            Blocks of a float16 model are refitted as bfloat16 copies, which have the range. Without
            a target of the dense model ("self", or without `compensate`) there is nothing to refit
            to, and this has no effect.
        fold: what the repair of folded units goes by. "measured": what they put out, taken in
            another pass over the calibration tokens. "linear": the mean of what they put out
            before (the paper), which a gate or an attention makes an approximation.
        ridge: damping of the solve, as a fraction of the Gram matrix's mean diagonal; "auto"
            chooses it for each block by the error on every fourth window, and fits to all windows;
            where nothing does better there than plain pruning, that is what is done, without a
            bias.
        bias: "auto" fits a bias too, to each consumer that has one, or that the stock config can
            give one (llama, and qwen3's attention; not where a llama is saved as another type for
            its number of heads). The block's other projections get biases of zero with it.
        num_samples: calibration windows to draw, where the calibration is text, conversations or
            "self".
        seq_length: tokens in a window; capped by the model's `max_position_embeddings`.
        bos: whether each window of calibration text starts with the BOS token, which then takes
            the first of its `seq_length` places. "auto": if the tokenizer adds one by itself and,
            for conversations, the chat template does too. False: the text is cut as GPTQ does, with
            a BOS token at its very start at most. Token ids and "self" are not affected.
        random_tokens: fraction of a calibration text's tokens that are replaced by tokens drawn
            uniformly from the vocabulary, in [0, 1). What reads the tokens that the text lacks then
            counts too, so that less is lost on other texts. 0 calibrates on the text as it is, as
            the literature does. Token ids given ready made, and "self", are never changed.
        batch_size: windows in one forward pass.
        seed: of the windows drawn or sampled, and of the `random` and `fold` selectors.
        multiple_of: MLP widths are multiples of this (64 or 128 suit tensor cores and tensor
            parallelism; 8 is the least that keeps bf16 matrix products aligned, and the least for
            a mixture's experts). "auto" takes the largest of 128, 64, 32, 16 and 8 that still
            reaches any sparsity to within 0.5 points.
        attention_unit: "kv_group" removes KV heads with all their query heads; "query_head"
            removes the same number of query heads from every KV group and keeps all KV heads.
            "auto" takes the one that costs less where the allocation measures it, and "kv_group"
            elsewhere.
        ignore: decoder layers by index, or groups by a name or pattern of whole name parts
            ("self_attn", "layers.0.mlp", "model.layers.*.mlp"); they stay as they are.
        rehome: allow the result to be saved under another stock model type that computes the
            same function, where the model's own cannot say the new shape; without it, only shapes
            are chosen that it can say.
        device: where layers run ("cuda", "cuda:1", "cpu"); by default the model's device if it
            is an accelerator, else the machine's accelerator if there is one, else the CPU. With
            a `device_map`, by default where that has them run; layers that it puts on an
            accelerator run there in any case.
        dtype: of selection and solve, "float64" or "float32". "auto": float64 where the device that
            layers run on computes in it, else float32 (Apple's GPUs); the report has which.
        hidden_states: where the calibration tokens' hidden states are kept between layers; the
            result is the same. "accelerator": where layers run. "host": in host memory. "disk": in
            files without a name, mapped into memory; they are gone with the process. They are in
            the folder for temporary files (the environment variable TMPDIR names another) or, from
            disk to disk, beside the output. "auto": the first of these where they have room, in a
            quarter of the accelerator's free memory or half of the host's; on a machine without an
            accelerator, of the last two.

    Raises:
        ValueError: a value outside its range, naming value, range and remedy.
    """

    sparsity: float | None = None
    mlp_sparsity: float | None = None
    attention_sparsity: float | None = None
    selector: str | Callable[..., Any] = "obs"
    allocation: str = AUTO
    compensate: bool = True
    target: str = "residual"
    refit: int = 2
    fold: str = "measured"
    ridge: float | str = AUTO
    bias: bool | str = False
    num_samples: int = 128
    seq_length: int = 2048
    bos: bool | str = AUTO
    random_tokens: float = 0.1
    batch_size: int = 4
    seed: int = 0
    multiple_of: int | str = AUTO
    attention_unit: str = AUTO
    ignore: tuple[int | str, ...] = ()
    rehome: bool = True
    device: str | None = None
    dtype: str = AUTO
    hidden_states: str = AUTO

    def __post_init__(self) -> None:
        if isinstance(self.ignore, (str, int)):
            object.__setattr__(self, "ignore", (self.ignore,))
        if not isinstance(self.ignore, Iterable):
            raise ValueError(f"ignore={self.ignore!r} must be layer indices or name patterns")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        fractions = ("sparsity", "mlp_sparsity", "attention_sparsity")
        for name in fractions:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < 1):
                raise ValueError(
                    f"{name}={value!r} is outside [0, 1): it is the fraction to remove, "
                    f"for example {name}=0.3"
                )
        given = [name for name in fractions if getattr(self, name) is not None]
        if self.sparsity is None and len(given) < 2:
            raise ValueError(
                "how much to remove is not given: pass sparsity=0.3, or both mlp_sparsity and "
                "attention_sparsity"
            )
        if len(given) == 3:
            raise ValueError(
                "sparsity, mlp_sparsity and attention_sparsity are all given, but two of them "
                "fix the third: drop one"
            )
        if not (isinstance(self.selector, str) or callable(self.selector)):
            raise ValueError(
                f"selector={self.selector!r} must be a name in grail_hf.SELECTORS or a function "
                "(group, stats) -> scores"
            )
        if not isinstance(self.allocation, str):
            raise ValueError(
                f"allocation={self.allocation!r} must be a name in grail_hf.ALLOCATIONS, or "
                f"{AUTO!r}"
            )
        for name in ("num_samples", "seq_length", "batch_size", "multiple_of"):
            value = getattr(self, name)
            automatic = name == "multiple_of" and value == AUTO
            if not (automatic or (_is_integer(value) and value >= 1)):
                others = f", or {AUTO!r}" if name == "multiple_of" else ""
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1{others}")
        if not (_is_number(self.random_tokens) and 0 <= self.random_tokens < 1):
            raise ValueError(
                f"random_tokens={self.random_tokens!r} is outside [0, 1): it is the fraction of "
                "the calibration text's tokens to replace, for example random_tokens=0.1"
            )
        if not (_is_integer(self.refit) and self.refit >= 0):
            raise ValueError(f"refit={self.refit!r} must be a whole number of at least 0")
        if self.seq_length < 2:
            raise ValueError("seq_length=1 leaves no context to calibrate on: use at least 2")
        if not (isinstance(self.bos, bool) or self.bos == AUTO):
            raise ValueError(f"bos={self.bos!r} must be True, False or {AUTO!r}")
        if not (_is_integer(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed={self.seed!r} must be a whole number of 64 bits")
        if self.ridge != AUTO and not (_is_number(self.ridge) and 0 <= self.ridge < float("inf")):
            raise ValueError(
                f"ridge={self.ridge!r} must be a finite number of at least 0, or {AUTO!r}"
            )
        if self.bias is not False and self.bias != AUTO:
            raise ValueError(f"bias={self.bias!r} must be False or {AUTO!r}")
        if self.bias and not self.compensate:
            raise ValueError(f"bias={self.bias!r} is part of the repair: leave compensate=True")
        if self.attention_unit not in (AUTO, *ATTENTION_UNITS):
            raise ValueError(
                f"attention_unit={self.attention_unit!r} must be one of {(AUTO, *ATTENTION_UNITS)}"
            )
        if self.target not in TARGETS:
            raise ValueError(f"target={self.target!r} must be one of {TARGETS}")
        if self.fold not in FOLDS:
            raise ValueError(f"fold={self.fold!r} must be one of {FOLDS}")
        if self.dtype not in SOLVE_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {SOLVE_DTYPES}")
        if self.hidden_states not in HIDDEN_STATES:
            raise ValueError(f"hidden_states={self.hidden_states!r} must be one of {HIDDEN_STATES}")
        for entry in self.ignore:
            if not (_is_integer(entry) or isinstance(entry, str)):
                raise ValueError(f"ignore holds {entry!r}: give layer indices or name patterns")
        for name in ("compensate", "rehome"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.device is not None:
            object.__setattr__(self, "device", _device_name(self.device))

    @property
    def targeted(self) -> bool:
        """Whether repair goes by what the dense model puts out, which takes a pass of it."""
        return self.compensate and self.target != "self"

    @property
    def holds_out(self) -> bool:
        """Whether some calibration tokens are left out of a fit, to choose its ridge by."""
        return self.compensate and self.ridge == AUTO

    @property
    def refit_steps(self) -> int:
        """`refit`, or 0 where it has no effect."""
        return self.refit if self.targeted else 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of selection and solve; float64 for "auto" until `resolved_on` a device."""
        return torch.float32 if self.dtype == "float32" else torch.float64

    def resolved_on(self, device: torch.device) -> GrailConfig:
        """The config with the dtype that "auto" means where layers run on `device`."""
        if self.dtype != AUTO:
            return self
        return dataclasses.replace(self, dtype=str(widest_float(device)).removeprefix("torch."))

    @property
    def selector_name(self) -> str:
        """The selector's name; `module:qualname` of a function that was passed as one."""
        if isinstance(self.selector, str):
            return self.selector
        function = unwrapped(getattr(self.selector, "function", self.selector))
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"{named.__module__}:{named.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types; a selector that is a function by its name."""
        return self._settings() | {"ignore": list(self.ignore), "selector": self.selector_name}

    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> GrailConfig:
        """The inverse of `to_dict`, but for a function's name, which stays a name.

        Raises ValueError on an unknown setting.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}: GrailConfig has {', '.join(known)}")
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> GrailConfig:
        return cls.from_dict(json.loads(text))

    @classmethod
    def resolve(cls, config: GrailConfig | dict[str, Any] | None, **overrides: Any) -> GrailConfig:
        """One config from a config (or its dict, or nothing) and keyword overrides."""
        settings = config._settings() if isinstance(config, GrailConfig) else dict(config or {})
        return cls.from_dict(settings | overrides)


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, else float32.

    The device is asked; one that this machine does not have is taken to compute in float64.
    """
    lacks = _computes_in(torch.float32, device) and not _computes_in(torch.float64, device)
    return torch.float32 if lacks else torch.float64


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        return bool((torch.ones(1, dtype=dtype, device=device) + 1).item() == 2)
    except (RuntimeError, TypeError, AssertionError):  # TypeError: MPS and float64
        return False


def unwrapped(function: Any) -> Any:
    """What `functools.partial` gave arguments to; a function without any as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _device_name(device: object) -> str:
    """The device's name. Whether this machine has it is not asked: a config may travel."""
    try:
        return str(torch.device(device))  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device: give a name like 'cuda', 'cuda:1' or 'cpu'"
        ) from error


def unknown_name(kind: str, name: object, known: Iterable[str], where: str) -> ValueError:
    """The error for a name that a table does not hold: the nearest, the list, where to add one."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(
        f"{kind} {name!r} is not known{guess} Known: {', '.join(known)}. One is added to {where}."
    )


ATTENTION = "attention"
MLP = "mlp"
EXPERTS = "experts"
SHARED = "shared_experts"

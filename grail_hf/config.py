"""`GrailConfig`: everything a compression depends on besides the model and the calibration text."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from grail_hf.settings import COUNT, FRACTION, Range, Settings, is_integer, setting

ATTENTION = "attention"
MLP = "mlp"
EXPERTS = "experts"
SHARED = "shared_experts"

AUTO = "auto"
TARGETS = ("self", "dense", "residual")
FOLDS = ("measured", "linear")
ATTENTION_UNITS = ("kv_group", "query_head")
SOLVE_DTYPES = (AUTO, "float32", "float64")
HIDDEN_STATES = (AUTO, "accelerator", "host", "disk")
YES_OR_NO = (True, False)
# Compute capabilities with float64 at half the rate of float32: P100, V100, A100, H100, B200. The
# others have 1/32 or 1/64 (CUDA C++ Best Practices Guide, Arithmetic Instructions).
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


@dataclass(frozen=True)
class GrailConfig(Settings):
    """What to remove, how to choose it and how to repair it. Frozen; checked when made.

    Args:
        sparsity: fraction of the decoder blocks' projection parameters to remove, in [0, 1).
            It always means the total: if one of `mlp_sparsity` and `attention_sparsity` is
            given, the other kind takes what is left to remove.
        mlp_sparsity: fraction of the MLP channels to remove, in [0, 1); of a mixture's experts,
            of each expert's. It is rounded to whole steps, with a warning where that is far off.
        attention_sparsity: fraction of the attention units to remove, in [0, 1), likewise rounded,
            and to a number that the model's config can represent.
        selector: a name in `grail_hf.SELECTORS`, or a function (group, stats) -> scores [units]
            of your own, which reads the consumer's weight [O, H] as `group.weight`, the number of
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
            there is a split to choose and it can be measured, which excludes mixtures of experts;
            "uniform" elsewhere.
        compensate: repair each consumer by ridge regression (GRAIL); False is plain pruning. With
            a target of the dense model, consumers whose group keeps all its units are repaired too,
            from the first group that lost some on, unless `ignore` names them.
        target: what a repaired consumer should output. "self": what it did before, on the
            compressed path (the paper). "dense": what the dense model outputs there. "residual":
            what brings the residual stream to the dense model's, so that a block also repairs
            what earlier blocks lost; the same as "dense" where a norm lies between block and
            stream. For each of a mixture's experts it is "self": the error of a block cannot be
            assigned to one expert.
        refit: conjugate gradient steps in which the producers that a block is linear in (values,
            up-projections; of a fused projection their rows) are refitted to the target after the
            consumer, on half of the calibration, or on all of it for more than 2 steps; 0 leaves
            them as they were cut. A step takes about three forward passes of the block on those
            tokens. A refit that overflows, or that leaves a larger error than the repair did, is
            undone with a warning. Blocks of a float16 model are refitted as bfloat16 copies, which
            have the range. Without a target of the dense model ("self", or without `compensate`)
            there is nothing to refit to, and this has no effect.
        fold: which moments the repair of folded units uses. "measured": those of what the units
            output, taken in another pass over the calibration tokens. "linear": those of the mean
            of what they output before (the paper), an approximation where a gate or an attention
            follows.
        ridge: damping of the solve, as a fraction of the Gram matrix's mean diagonal, at least 0.
            "auto" chooses it for each block by the error on every fourth window, and fits to all
            windows; a block for which no damping does better there than plain pruning is pruned
            without repair, and without a bias.
        bias: "auto" fits a bias too, to each consumer that has one, or that the stock config can
            give one (llama, and qwen3's attention; not where a llama is saved as another type for
            its number of heads). The block's other projections get biases of zero with it.
        num_samples: calibration windows to draw, where the calibration is text, conversations or
            "self".
        seq_length: tokens in a window, at least 2; capped by the model's `max_position_embeddings`.
        bos: whether each window of calibration text starts with the BOS token, which then takes
            the first of its `seq_length` places. "auto": if the tokenizer adds one by itself and,
            for conversations, the chat template does too. False: the text is cut as GPTQ does, with
            a BOS token at its very start at most. Token ids and "self" are not affected.
        random_tokens: fraction of a calibration text's tokens that are replaced by tokens drawn
            uniformly from the vocabulary, in [0, 1). The repair then also covers tokens that the
            text lacks, so that less is lost on other texts. 0 calibrates on the text as it is, as
            the literature does. Token ids that you pass, and "self", are never changed.
        self_samples: fraction of a calibration text's windows that are replaced by text which the
            model writes itself, in [0, 1): a text is of one domain, and what the model writes is of
            all that it was trained on (arXiv 2410.17170). "auto": a twelfth where the whole
            model is on the device that layers run on, else none, since writing takes the whole
            model for each token. Only text is affected.
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
        rehome: convert to another model type that computes the same function, where the model's
            own config cannot represent the new shape. False chooses only among shapes that it can
            represent.
        device: where layers run ("cuda", "cuda:1", "cpu"); by default the model's device if it
            is an accelerator, else the machine's accelerator if there is one, else the CPU. With
            a `device_map`, by default where that has them run; layers that it puts on an
            accelerator run there in any case.
        solve_dtype: of selection and solve, "float64" or "float32". "auto": float64 where the
            device that layers run on is fast in it (CPUs, NVIDIA's and AMD's data-centre GPUs,
            Intel's GPUs that have it), else float32 (other GPUs); the report has which.
        hidden_states: where the calibration tokens' hidden states are kept between layers; the
            result is the same. "accelerator": where layers run. "host": in host memory. "disk": in
            unnamed files, mapped into memory, which vanish with the process. They are in
            the folder for temporary files (the environment variable TMPDIR names another) or, from
            disk to disk, beside the output. "auto": the first of these where they have room, in a
            quarter of the accelerator's free memory or half of the host's; on a machine without an
            accelerator, one of the last two.
        checkpoint_every: from disk to disk, after how many layers the hidden states are written,
            from where a stopped run resumes. The result is the same, and it may resume with another
            number. "auto": after the first layer, and then each time that 20 times as long has
            passed as they last took to write: writing takes a twentieth of the time at most, and a
            kill costs that interval and a layer.

        recover: afterwards train the compressed model towards the dense model's predictions on the
            calibration tokens (`recover`, with its default settings), without labels. The whole
            model has to be in memory, and is kept as it was repaired where that is not better. Off
            by default: all else is in closed form.

    Raises:
        ValueError: a value outside its range, naming value, range and remedy.
    """

    old_names: ClassVar[dict[str, str]] = {"dtype": "solve_dtype"}

    sparsity: float | None = setting(
        None, "Fraction of the decoder blocks' projection parameters to remove.", range=FRACTION
    )
    mlp_sparsity: float | None = setting(
        None, "Fraction of the MLP channels to remove.", range=FRACTION
    )
    attention_sparsity: float | None = setting(
        None, "Fraction of the attention units to remove.", range=FRACTION
    )
    selector: str | Callable[[Any, Any], torch.Tensor] = setting(  # noqa: RUF009 (it is a field)
        "obs", "How the units that stay are chosen.", table="grail_hf:SELECTORS"
    )
    allocation: str = setting(
        AUTO, "How widths are chosen.", choices=(AUTO,), table="grail_hf:ALLOCATIONS"
    )
    compensate: bool = setting(True, "Repair by ridge regression.", choices=YES_OR_NO)
    target: str = setting("residual", "What a repaired block should output.", choices=TARGETS)
    refit: int = setting(
        2,
        "Conjugate gradient steps of further repair; 6 is thorough.",
        range=Range(0, whole=True),
    )
    fold: str = setting("measured", "Which moments repair folded units.", choices=FOLDS)
    ridge: float | str = setting(
        AUTO,
        'Damping of the repair; "auto" chooses it on held-out windows.',
        choices=(AUTO,),
        range=Range(0),
    )
    bias: bool | str = setting(
        False,
        '"auto" fits biases too, where the stock config has them.',
        choices=(False, AUTO),
    )
    num_samples: int = setting(128, "Calibration windows.", range=COUNT)
    seq_length: int = setting(2048, "Tokens in a window.", range=Range(2, whole=True))
    bos: bool | str = setting(
        AUTO,
        "Start each window of text with BOS; by default if the tokenizer adds one by itself.",
        choices=(*YES_OR_NO, AUTO),
    )
    random_tokens: float = setting(
        0.1,
        "Fraction of a calibration text's tokens to replace by random ones.",
        range=Range(0, 1, example=0.1),
    )
    self_samples: float | str = setting(
        AUTO,
        "Fraction of a calibration text's windows that the model writes itself.",
        choices=(AUTO,),
        range=Range(0, 1, example=0.1),
    )
    batch_size: int = setting(4, "Windows in one forward pass.", range=COUNT)
    seed: int = setting(
        0, "Seed of the windows and of random selection.", range=Range(-(2**63), 2**63, whole=True)
    )
    multiple_of: int | str = setting(
        AUTO,
        'MLP widths are multiples of this; "auto": as large as costs nothing.',
        choices=(AUTO,),
        range=COUNT,
    )
    attention_unit: str = setting(
        AUTO,
        "Remove whole KV groups, or as many query heads from each; auto: as measured.",
        choices=(AUTO, *ATTENTION_UNITS),
    )
    ignore: tuple[int | str, ...] = setting(
        (), "A layer or group to leave whole, for example self_attn; repeat for more."
    )
    rehome: bool = setting(
        True,
        "Convert to another model type that computes the same function, where needed.",
        choices=YES_OR_NO,
    )
    device: str | None = setting(None, "Where layers run; by default an accelerator.")
    solve_dtype: str = setting(
        AUTO,
        "Dtype of selection and solve; auto: float64 where the device is fast in it.",
        choices=SOLVE_DTYPES,
    )
    hidden_states: str = setting(
        AUTO, "Where hidden states are kept between layers.", choices=HIDDEN_STATES
    )
    checkpoint_every: int | str = setting(
        AUTO, "Layers after which a run from disk to disk can resume.", choices=(AUTO,), range=COUNT
    )
    recover: bool = setting(
        False,
        "Afterwards train towards the dense model's predictions, without labels.",
        choices=YES_OR_NO,
    )

    def __post_init__(self) -> None:
        if isinstance(self.ignore, (str, int)):
            object.__setattr__(self, "ignore", (self.ignore,))
        if not isinstance(self.ignore, Iterable):
            raise ValueError(f"ignore={self.ignore!r} must be layer indices or name patterns")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        super().__post_init__()
        for entry in self.ignore:
            if not (is_integer(entry) or isinstance(entry, str)):
                raise ValueError(f"ignore holds {entry!r}: give layer indices or name patterns")
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
        self._check_together()

    def _check_together(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        sparsities = (self.sparsity, self.mlp_sparsity, self.attention_sparsity)
        given = sum(sparsity is not None for sparsity in sparsities)
        if self.sparsity is None and given < 2:
            raise ValueError(
                "how much to remove is not given: pass sparsity=0.3, or both mlp_sparsity and "
                "attention_sparsity"
            )
        if given == 3:
            raise ValueError(
                "sparsity, mlp_sparsity and attention_sparsity are all given, but two of them "
                "fix the third: drop one"
            )
        if self.bias and not self.compensate:
            raise ValueError(f"bias={self.bias!r} is part of the repair: leave compensate=True")

    @property
    def targeted(self) -> bool:
        """Whether the repair targets the dense model's outputs, which takes a pass of it."""
        return self.compensate and self.target != "self"

    @property
    def holds_out(self) -> bool:
        """Whether some calibration tokens are held out of a fit, to choose its ridge on them."""
        return self.compensate and self.ridge == AUTO

    @property
    def refit_steps(self) -> int:
        """`refit`, or 0 where it has no effect."""
        return self.refit if self.targeted else 0

    @property
    def solve_torch_dtype(self) -> torch.dtype:
        """`solve_dtype` as torch's; float64 for "auto" until `resolved_on` a device."""
        return torch.float32 if self.solve_dtype == "float32" else torch.float64

    def resolved_on(self, device: torch.device) -> GrailConfig:
        """The config with the `solve_dtype` that "auto" means where layers run on `device`."""
        if self.solve_dtype != AUTO:
            return self
        name = str(solve_float(device)).removeprefix("torch.")
        return dataclasses.replace(self, solve_dtype=name)

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
        return super().to_dict() | {"ignore": list(self.ignore), "selector": self.selector_name}


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device supports it, else float32.

    A device that this machine lacks is assumed to support float64.
    """
    lacks = _computes_in(torch.float32, device) and not _computes_in(torch.float64, device)
    return torch.float32 if lacks else torch.float64


def solve_float(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it at about half the rate of float32, else float32.

    A device that this machine lacks is assumed to.
    """
    fast = True
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError, AssertionError):
            major, minor = torch.cuda.get_device_capability(device)
            # AMD's Instinct cards are gfx9; its other cards have 1/16 or less.
            fast = major == 9 if torch.version.hip else (major, minor) in _FAST_FLOAT64
    return widest_float(device) if fast else torch.float32


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        return bool((torch.ones(1, dtype=dtype, device=device) + 1).item() == 2)
    except (RuntimeError, TypeError, AssertionError):  # TypeError: MPS and float64
        return False


def unwrapped(function: Any) -> Any:
    """The function inside any `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def unknown_name(kind: str, name: object, known: Iterable[str], where: str) -> ValueError:
    """The error for a name that a table lacks: the nearest, the known ones, where to add one."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(
        f"{kind} {name!r} is not known{guess} Known: {', '.join(known)}. One is added to {where}."
    )

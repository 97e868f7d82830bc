"""What the benchmarks share: models of random weights, and time and operations by phase."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from grail_hf.runtime.meter import Meter

T = TypeVar("T")
MB, GB = 10**6, 10**9


@dataclass(frozen=True)
class Case:
    """A Llama's shapes, and the calibration.

    Attributes:
        written: layers that are on disk; where there are more, they are read again in turns.
        limit: of CUDA memory, in bytes.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    length: int
    written: int = 0
    limit: int = 0

    def config(self, layers: int, dtype: str = "bfloat16") -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=layers,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            dtype=dtype,
        )

    @property
    def layer_bytes(self) -> int:
        """Of one decoder layer, in bf16."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return int(2 * (attention + 3 * self.hidden * self.inner))

    @property
    def gram_bytes(self) -> int:
        """fp32: the MLP's Gram and its moment with the targets; of the held-out tokens too."""
        return 2 * 4 * (self.inner**2 + self.hidden * self.inner)

    def tokens(self) -> Tensor:
        """Random ids [samples, length], the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.samples, self.length), generator=generator)


def random_llama(case: Case, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model in host memory whose activations keep their scale; the same for every dtype.

    The weights are drawn on `device`, in fp32 and a matrix at a time.
    """
    name = str(dtype).removeprefix("torch.")
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(case.config(layers, name))
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        weight = torch.randn(shape, device=device, generator=generator)
        return weight.mul_(0.5 / shape[1] ** 0.5).to(dtype).cpu()

    weights = {name: drawn(tensor.shape) for name, tensor in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


# Time


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def phase_changes(call: Callable[[str | None], object]) -> Iterator[None]:
    """Inside the context, `call` gets the phase's name when grail_hf's meter goes to another."""
    change = Meter._change

    def changed(meter: Meter, name: str | None, whole: bool) -> None:
        call(name)
        change(meter, name, whole)

    Meter._change = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Meter._change = change  # type: ignore[method-assign]


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float, dict[str, float]]:
    """What `run` returns, its seconds, and the seconds of each phase of grail_hf inside it.

    A phase is over when the device has done its work, which on CUDA is later than on the host. So
    events mark its ends there: the device passes them in turn, and the host need not wait for it.
    """
    on_cuda = device.type == "cuda"
    marks: list[tuple[str | None, Any]] = []

    def mark(name: str | None) -> None:
        at: Any = torch.cuda.Event(enable_timing=True) if on_cuda else time.perf_counter()
        if on_cuda:
            at.record(torch.cuda.current_stream(device))
        marks.append((name, at))

    synchronize(device)
    start = time.perf_counter()
    with phase_changes(mark):
        result = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    phases: Counter[str] = Counter()
    for (name, begin), (_, end) in pairwise(marks):
        if name is not None:
            phases[name] += begin.elapsed_time(end) / 1000 if on_cuda else end - begin
    return result, seconds, dict(phases)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int, times: int = 10) -> float:
    """Operations a second of the quickest of some products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _ = a @ b
    quickest = min(timed(lambda: a @ b, device)[1] for _ in range(times))
    return 2 * size**3 / quickest


# Operations


def _factorisation(matrix: Tensor, *_: Any, **__: Any) -> int:
    return matrix.shape[-1] * matrix.numel() // 3


def _inverse(factor: Tensor, *_: Any, **__: Any) -> int:
    return 2 * factor.shape[-1] * factor.numel() // 3


def _triangular_solve(factor: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return factor.shape[-1] * b.numel()


def _solve(matrix: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.shape[-1] * matrix.numel() // 3 + 2 * matrix.shape[-1] * b.numel()


def _attention(
    query: Tensor, key: Tensor, _: Tensor, __: float = 0.0, is_causal: bool = False, **___: Any
) -> int:
    """Scores and what they weigh; half of both where a token sees only those before it."""
    return 4 * query.numel() * key.shape[-2] // (1 + is_causal)


def _attention_backward(_: Tensor, *forward: Any, **__: Any) -> int:
    """To queries, keys and values: five products where forward has two."""
    query, key, value, _, _, dropout, is_causal = forward
    return 5 * _attention(query, key, value, dropout, is_causal) // 2


aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    # Products that torch's table lacks: in place, and attention on the CPU.
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    # Solves; updates of a matrix by one vector at a time are not counted.
    aten.linalg_cholesky_ex: _factorisation,
    aten.cholesky_inverse: _inverse,
    aten.linalg_solve_triangular: _triangular_solve,
    aten._linalg_solve_ex: _solve,
}
Operations = dict[tuple[str | None, torch.dtype], int]


@contextmanager
def counted_operations() -> Iterator[Operations]:
    """Floating-point operations inside the context, by phase of grail_hf and dtype."""
    counts: Operations = defaultdict(int)
    phase: str | None = None

    def enter(name: str | None) -> None:
        nonlocal phase
        phase = name

    def counting(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            operations = formula(*args, **kwargs)
            counts[phase, args[0].dtype] += operations
            return operations

        count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return count

    own = {operator: counting(formula) for operator, formula in FORMULAS.items()}
    with phase_changes(enter), FlopCounterMode(display=False, custom_mapping=own):
        yield counts


# Results


def write_json(path: Path, data: Any) -> None:
    """Write beside the file and rename, so that the file is whole whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    beside.replace(path)

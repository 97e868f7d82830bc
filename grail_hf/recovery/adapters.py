"""What is trained of a model: low-rank adapters by PEFT, or the projections themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.recovery.config import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

# Of a trained parameter in fp32: itself, its gradient and AdamW's two moments.
BYTES_TRAINED = 16


def matrices(layers: nn.ModuleList) -> list[nn.Parameter]:
    """The parameters of decoder layers that multiply what passes through them."""
    return [parameter for parameter in layers.parameters() if parameter.ndim >= 2]


def adapted_modules(
    model: PreTrainedModel, layers: nn.ModuleList
) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The projections of decoder layers that PEFT adapts, by their names in the model."""
    from transformers.pytorch_utils import Conv1D

    inside = set(layers.modules())
    return [
        (name, module)
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    ]


def check_peft(rank: int | str | None) -> None:
    """Raise ImportError where adapters are asked for and PEFT is missing."""
    if rank == FULL:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'adapters need PEFT: pip install "grail-hf[recover]", or train the projections '
            f'themselves (rank="{FULL}")'
        ) from error


@contextmanager
def trainable(
    model: PreTrainedModel, layers: nn.ModuleList, rank: int | str | None
) -> Iterator[nn.Module]:
    """What to train: inside the context, its parameters require a gradient, and no others do.

    Afterwards adapters are merged into the projections, or dropped after an error, and each
    parameter requires a gradient where it did before.

    Args:
        model: the compressed one.
        layers: its decoder layers.
        rank: of the adapters; "full" for the matrices of the layers themselves.

    Raises:
        ValueError: the layers have no module that PEFT adapts.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        if rank == FULL:
            for parameter in matrices(layers):
                parameter.requires_grad_(True)
            yield model
        else:
            yield from _adapted(model, layers, int(rank or 0))
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def _adapted(model: PreTrainedModel, layers: nn.ModuleList, rank: int) -> Iterator[nn.Module]:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    found = adapted_modules(model, layers)
    names = [name for name, _ in found]
    if not names:
        raise ValueError(
            f'the layers have no projection that PEFT adapts: use rank="{FULL}" to train them'
        )
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,  # so that B A is added as it is
        target_modules=names,
        fan_in_fan_out=all(isinstance(module, Conv1D) for _, module in found),
    )
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers renames.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = get_peft_model(model, settings)
    try:
        yield adapted
    except BaseException:
        adapted.unload()
        raise
    adapted.merge_and_unload()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers in fp32 inside the context, and in their own dtypes afterwards."""
    dtypes = {id(t): t.dtype for t in _floats(model)}
    try:
        for tensor in _floats(model):
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor in _floats(model):
            tensor.data = tensor.data.to(dtypes.get(id(tensor), tensor.dtype))


def _floats(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            yield tensor


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Copies of parameters in host memory."""
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def restore_(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Give parameters the values of `copies` again."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)

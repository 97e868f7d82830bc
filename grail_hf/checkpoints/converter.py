"""Convert a checkpoint's weights to those of the live model, layer by layer, and back.

The semi-private uses of transformers' weight conversion are in this module alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grail_hf.checkpoints.reader import Checkpoint
from grail_hf.checkpoints.sources import REST

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Parts:
    """A skeleton's decoder layers, and the rest of it, whose weights come from a checkpoint.

    Attributes:
        model: the skeleton.
        layers: its decoder layers.
        keys: part -> the names of its tensors in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, layers: nn.ModuleList):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.checkpoint = checkpoint
        self.model = model
        self.layers = layers
        names = {id(module): name for name, module in model.named_modules()}
        self._prefix = f"{names[id(layers)]}."
        self._mapping: Any = get_model_conversion_mapping(model)
        # Only renamings come before converters, whatever their order.
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self.keys: dict[int, list[str]] = {part: [] for part in (REST, *range(len(layers)))}
        for key in checkpoint.files:
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                name = key
            if name in state:  # others belong to parts that the model class lacks
                self.keys[self._part_of(name)].append(key)
        self._check()

    def _check(self) -> None:
        """Raise OSError where the checkpoint's tensors do not fit the model, or are missing."""
        files, spans = self.checkpoint.files, self.checkpoint.spans
        keys = [key for part in self.keys.values() for key in part]
        shapes = {key: spans[files[key]][key].shape for key in keys}
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        info = self._load_(empty, "meta")
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise OSError(f"{self.checkpoint.name} does not fit its config: {wrong[0]}")
        own = {name for name, _ in self.model.named_parameters()}
        missing = sorted(info.missing_keys & own - self.model.all_tied_weights_keys.keys())
        if missing:
            raise OSError(
                f"{self.checkpoint.name} has no weights for {missing[0]}: download it again, or "
                "correct its config"
            )

    def _part_of(self, name: str) -> int:
        """The part that a parameter of the model belongs to."""
        if not name.startswith(self._prefix):
            return REST
        return int(name[len(self._prefix) :].partition(".")[0])

    def _own(self, part: int) -> Iterator[tuple[nn.Module, str]]:
        """(module, name) of a part's parameters; the name is the one within the module."""
        for path, module in self.model.named_modules():
            for name in module._parameters:
                if self._part_of(f"{path}.{name}" if path else name) == part:
                    yield module, name

    def load_(self, part: int) -> None:
        """Load the part's weights, mapped from the files where they need no conversion."""
        self._load_(self.checkpoint.tensors(self.keys[part]), "cpu")
        if part == REST:
            self.model.tie_weights(recompute_mapping=False)

    def _load_(self, tensors: dict[str, Tensor], device: str) -> Any:
        """Convert tensors of the checkpoint and load them. Returns transformers' report."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model, dtype = self.model, self.model.dtype
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        with _no_loading_bar():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        return info

    def drop_(self, part: int) -> None:
        """Move the part's weights to the meta device; buffers and settings stay."""
        empty: dict[int, nn.Parameter] = {}
        for module, name in self._own(part):
            parameter = module._parameters[name]
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = empty.setdefault(
                    id(parameter),
                    nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad),
                )

    def state(self, part: int) -> dict[str, Tensor]:
        """The part's current tensors, under their names in a checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        model = self.model
        skipped = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save or ())
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if self._part_of(name) == part and name not in skipped and not tensor.is_meta
        }
        reverted = revert_weight_conversion(model, state)
        return {name: tensor.contiguous().cpu() for name, tensor in reverted.items()}


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hide transformers' own progress bars inside the context."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]

"""The dense model's predictions on disk, so that it is never in memory beside the one that learns.

Of each prediction the likeliest tokens are kept. With 64 of them, 128 x 2048 tokens take 134 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset

from grail_hf.calibration.chats import padded
from grail_hf.calibration.tokens import TokenBatches
from grail_hf.methods.divergence import likeliest
from grail_hf.models.decoder import evaluation_mode
from grail_hf.runtime.devices import input_device
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel
ONE_IN = 8  # windows are held out
BYTES_PER_TOKEN = 8  # that is kept of a prediction: its id and its log-probability
Item = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Targets(Dataset[Item]):
    """Windows of tokens, with the dense model's likeliest next tokens at each place.

    An item holds `input_ids` [t], int64, and `ids` and `log_probs` [t, k], int32 and fp32. Those
    are read from disk when the item is asked for.

    Attributes:
        windows: the tokens of each window, without padding.
        folder: with a file for each micro-batch.
        places: of each window, the number of its file and its row there.
    """

    windows: tuple[Tensor, ...]
    folder: Path
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tokens: TokenBatches, folder: Path) -> Targets:
        """The targets of a set of tokens, which `write` has written or will write into a folder."""
        windows: list[Tensor] = []
        places = []
        for number, batch in enumerate(tokens.batches):
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
            for row in range(len(ids)):
                windows.append(ids[row][mask[row]])
                places.append((number, row))
        return cls(tuple(windows), folder, tuple(places))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Item:
        from safetensors import safe_open

        number, row = self.places[index]
        with safe_open(self._file(number), "pt") as file:
            found = {name: file.get_tensor(f"{row}.{name}") for name in ("ids", "log_probs")}
        return {"input_ids": self.windows[index], **found}

    def num_tokens(self, indices: Iterable[int]) -> int:
        """Tokens of some of the windows."""
        return sum(len(self.windows[index]) for index in indices)

    @torch.no_grad()
    def write(self, teacher: PreTrainedModel, top_k: int, progress: bool) -> None:
        """Write the predictions of a model, where it is. Files that are there already are kept.

        Raises:
            FloatingPointError: a prediction is NaN or Inf.
            OSError: the disk is full.
        """
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = sorted({number for number, _ in self.places})
        device = input_device(teacher)
        with (
            evaluation_mode(teacher),
            Bar(total=len(numbers), desc="Dense model", unit="batch", shown=progress) as bar,
        ):
            for number in numbers:
                path = self._file(number)
                rows = [i for i, place in enumerate(self.places) if place[0] == number]
                if not path.exists():
                    batch = padded([self.windows[i] for i in rows])
                    logits = teacher(**{k: v.to(device) for k, v in batch.items()}).logits
                    found: dict[str, Tensor] = {}
                    for i, scores in zip(rows, logits, strict=True):
                        row = self.places[i][1]
                        ids, log_probs = likeliest(scores[: len(self.windows[i])], top_k)
                        if not torch.isfinite(log_probs[:, 0]).all():
                            raise FloatingPointError(
                                f"the dense model's predictions for window {i} are NaN or Inf"
                            )
                        found |= {f"{row}.ids": ids.cpu(), f"{row}.log_probs": log_probs.cpu()}
                    beside = path.with_suffix(".tmp")
                    save_file(found, beside)
                    beside.replace(path)
                bar.update()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def parted(self, seed: int) -> tuple[Subset[Item], Subset[Item]]:
        """The windows to learn from, and those that are held out, at least one of each."""
        order = torch.randperm(
            len(self.windows), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        held_out = max(1, len(order) // ONE_IN)
        return Subset(self, order[held_out:]), Subset(self, order[:held_out])


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """A batch of windows, padded on the right, with a mask where there is padding."""
    columns = {name: [item[name] for item in items] for name in items[0]}
    batch = padded(columns.pop("input_ids"))
    return batch | {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}

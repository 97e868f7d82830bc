"""`RecoveryConfig`: how a compressed model learns the dense model's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grail_hf.config import AUTO, YES_OR_NO, GrailConfig
from grail_hf.settings import COUNT, Range, Settings, same_as, setting

FULL = "full"  # rank: the projections themselves


@dataclass(frozen=True)
class RecoveryConfig(Settings):
    """How a compressed model learns the dense model's predictions. Frozen; checked when made.

    Args:
        rank: of the low-rank adapters (LoRA, by PEFT) that are trained beside each projection of
            the decoder layers and then merged into it. "full", or None: the matrices of the decoder
            layers themselves, which takes 16 bytes of memory a parameter. "auto": "full" where that
            takes at most half of the free memory of the device that trains, else 64.
        epochs: passes over the tokens, more than 0.
        learning_rate: peak of AdamW's, which rises over the first twentieth of the steps and then
            falls by a cosine. "auto" searches: short runs of an eighth of the steps, from the same
            start, at rates a factor of 3 apart, until one leaves a larger divergence on the
            held-out windows than the one before. At least three are tried.
        batch_size: windows in one forward pass.
        accumulation: forward passes whose gradients are summed for a step, in each process.
        num_samples: windows to draw, where the calibration is text, conversations or "self". One in
            eight is held out.
        seq_length: tokens in a window, at least 2; capped by the model's `max_position_embeddings`.
        bos: as in `GrailConfig`.
        random_tokens: as in `GrailConfig`, but 0 by default.
        self_samples: as in `GrailConfig`.
        top_k: likeliest tokens of each of the dense model's predictions that are kept; the others
            count as one.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping
            them: a third more time, and memory for one layer's. "auto": on an accelerator.
        seed: of the windows, their order and the adapters.
        device: where to train, "cpu" or an accelerator; by default as in `GrailConfig`.

    Raises:
        ValueError: a value outside its range, naming value, range and remedy.
    """

    rank: int | str | None = setting(
        AUTO,
        'Rank of the adapters; "full" trains the projections themselves.',
        choices=(AUTO, FULL),
        range=COUNT,
    )
    epochs: float = setting(2.0, "Passes over the tokens.", range=Range(0.01))
    learning_rate: float | str = setting(
        AUTO, "AdamW's; auto searches for it by short runs.", choices=(AUTO,), range=Range(0)
    )
    batch_size: int = same_as(GrailConfig, "batch_size")
    accumulation: int = setting(2, "Forward passes in a step.", range=COUNT)
    num_samples: int = setting(128, "Windows to learn from.", range=Range(2, whole=True))
    seq_length: int = same_as(GrailConfig, "seq_length")
    bos: bool | str = same_as(GrailConfig, "bos")
    random_tokens: float = same_as(GrailConfig, "random_tokens", default=0.0)
    self_samples: float | str = same_as(GrailConfig, "self_samples")
    top_k: int = setting(64, "Likeliest tokens that are kept of each prediction.", range=COUNT)
    gradient_checkpointing: bool | str = setting(
        AUTO, "Compute activations again in the backward pass.", choices=(*YES_OR_NO, AUTO)
    )
    seed: int = setting(
        0, "Of the windows, their order and the adapters.", range=Range(0, 2**32, whole=True)
    )
    device: str | None = setting(None, "Where to train; by default an accelerator.")

    def __post_init__(self) -> None:
        if self.rank is None:
            object.__setattr__(self, "rank", FULL)
        super().__post_init__()

    @classmethod
    def following(cls, config: GrailConfig) -> RecoveryConfig:
        """The settings of a recovery that follows a compression, on the same tokens."""
        return cls(
            batch_size=config.batch_size,
            num_samples=max(2, config.num_samples),
            seq_length=config.seq_length,
            bos=config.bos,
            random_tokens=config.random_tokens,
            self_samples=0,  # what the model has written is among the tokens already
            seed=config.seed % 2**32,
            device=config.device,
        )


def recomputes(config: RecoveryConfig, device: torch.device) -> bool:
    """Whether activations are computed again in the backward pass on a device."""
    asked = config.gradient_checkpointing
    return device.type != "cpu" if isinstance(asked, str) else asked

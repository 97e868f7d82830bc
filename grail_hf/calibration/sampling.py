"""Calibration tokens sampled from the model itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grail_hf.runtime.devices import input_device
from grail_hf.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
SELF = "self"  # sampled from the model itself
# One token comes after another, and a step takes hardly longer for many sequences than for few. As
# many are written together as this has room for their keys and values, so that the same seed gives
# the same text on any machine.
_CACHE_BYTES = 2 * 2**30
_MOST_TOGETHER = 64


def is_sampled(calibration: object) -> bool:
    """Whether a calibration is to be sampled from the model, which takes its weights."""
    return isinstance(calibration, str) and calibration == SELF


def written_together(model: PreTrainedModel, seq_length: int, batch_size: int) -> int:
    """Number of sequences to sample at a time: at least `batch_size`."""
    text = model.config.get_text_config()
    # An upper bound: as if each head had keys and values of its own.
    token = 2 * text.num_hidden_layers * text.hidden_size * model.dtype.itemsize
    return max(batch_size, min(_MOST_TOGETHER, int(_CACHE_BYTES // (token * seq_length))))


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    num_samples: int,
    seq_length: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Tensor:
    """Draw [num_samples, seq_length] tokens from the model's own distribution, with `seed`.

    Temperature 1 and nothing cut off, whatever the model's generation settings say; the caller's
    random state stays. An end of text may be drawn, as any token, but ends nothing: what follows it
    is what the model believes to follow. Forbidding it would draw from another distribution.
    """
    if model is None or input_device(model).type == "meta":
        raise ValueError(
            f"calibration {SELF!r} is sampled from the model, which "
            + ("is not given" if model is None else "is on the meta device")
            + ": load the model with its weights"
        )
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length} leaves nothing to sample: use at least 2")
    from transformers import GenerationConfig

    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, max_length=seq_length, eos_token_id=None, pad_token_id=None
    )
    generate: Any = model.generate
    theirs = model.generation_config
    drawn = []
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type  # by default, older torch asks CUDA
    with (
        torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind),
        Bar(total=num_samples * seq_length, desc="Sampling", unit="token", shown=progress) as bar,
    ):
        streamer = SimpleNamespace(put=lambda ids: bar.update(ids.numel()), end=lambda: None)
        torch.manual_seed(seed)
        starts = _start_tokens(model, tokenizer, vocab_size, num_samples)
        # What a call leaves unset is read from the model's own settings: top_p, penalties, …
        model.generation_config = settings
        try:
            for start in torch.split(starts.to(input_device(model)), batch_size):
                ids = generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    generation_config=settings,
                    streamer=streamer,
                )
                drawn.append(ids.cpu())
        finally:
            model.generation_config = theirs
    return torch.cat(drawn)


def _start_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    count: int,
) -> Tensor:
    """[count, 1]: the token that begins a text; random ordinary ones where there is none."""
    special: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config, tokenizer):
            ids = getattr(config, name, None)
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            ids = [token for token in ids if 0 <= token < vocab_size]
            if ids and name == "bos_token_id":
                return torch.full((count, 1), ids[0])
            special += ids
    known = vocab_size
    if tokenizer is not None:
        special += tokenizer.all_special_ids
        known = min(vocab_size, len(tokenizer))  # embeddings are often padded with unused rows
    ordinary = sorted(set(range(known)) - set(special))
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1))]

"""How far predictions are from others, of which only the likeliest tokens are kept."""

from __future__ import annotations

import torch
from torch import Tensor

# The least probability that is left beside the kept tokens. Their sum rounds by a tenth of it.
_LEAST_REST = 1e-6


@torch.no_grad()
def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each distribution.

    Args:
        logits: [..., V].
        count: capped by V.

    Returns:
        ids [..., count], int32, and their log-probabilities [..., count], fp32.
    """
    logits = logits.float()
    values, ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return ids.int(), values - logits.logsumexp(dim=-1, keepdim=True)


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(P || Q) of a distribution P that is known by its likeliest tokens, in nats.

    The other tokens count as one, with the probability that is left. This is a lower bound of the
    divergence over the whole vocabulary, and equal to it where `ids` hold all of it.

        sum_{v in ids} p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)

    Args:
        logits: of Q, [..., V].
        ids: [..., k], the tokens that are known of P.
        log_probs: [..., k], their log-probabilities under P, fp32.

    Returns:
        [...], fp32, differentiable in the logits.
    """
    logits = logits.float()
    found = logits.gather(-1, ids.long()) - logits.logsumexp(dim=-1, keepdim=True)
    probs = log_probs.exp()
    known = (probs * (log_probs - found)).sum(dim=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return known
    rest = (1 - probs.sum(dim=-1)).clamp_min(_LEAST_REST)
    found_rest = 1 - found.exp().sum(dim=-1)
    return known + rest * (rest.log() - found_rest.clamp_min(_LEAST_REST).log())

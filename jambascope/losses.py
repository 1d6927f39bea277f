"""Training losses: next token, load balancing, activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int


class LossTerms(NamedTuple):
    """The parts of a training loss, scalars; ``total`` is what to minimise."""

    lm: torch.Tensor
    """Mean next-token cross-entropy, nats."""
    load_balancing: torch.Tensor
    """As :func:`load_balancing_loss`; zero for a model without MoE."""
    activation: torch.Tensor
    """Mean square of what every mixer and feed-forward adds to the stream (arXiv 2408.12570, section 2.3)."""
    total: torch.Tensor
    """``lm`` plus the others times ``config.load_balancing_coef`` and ``config.activation_coef``."""


def token_losses(
    logits: Float[torch.Tensor, "batch pos vocab"],
    tokens: Int[torch.Tensor, "batch pos"],
) -> Float[torch.Tensor, "batch pos-1"]:
    """Cross-entropy of each next token in nats, computed in float32 at least."""
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


def mean_loss(losses: torch.Tensor, mask: Bool[torch.Tensor, "batch pos"] | None) -> torch.Tensor:
    """Mean over predictions whose token and whose target are both tokens, not padding."""
    if mask is None:
        return losses.mean()
    valid = (mask[:, :-1] & mask[:, 1:]).to(losses.dtype)
    return (losses * valid).sum() / valid.sum()


def load_balancing_loss(
    router_logits: list[Float[torch.Tensor, "batch pos expert"]],
    experts_per_token: int,
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
) -> Float[torch.Tensor, ""]:
    """``E sum_e f_e P_e`` over all MoE layers pooled and summed over slots: ``experts_per_token`` when uniform.

    Switch Transformers, arXiv 2101.03961, equation 4, in the form of transformers' ``load_balancing_loss_func``.
    ``f_e`` is the share of tokens that chose expert e (per slot), ``P_e`` its mean probability.
    """
    logits = torch.stack([layer.float() for layer in router_logits])  # [layer B T X]
    probabilities = logits.softmax(-1)
    num_experts = logits.shape[-1]
    chosen = F.one_hot(probabilities.topk(experts_per_token, dim=-1).indices, num_experts)  # [layer B T S X]
    weight = torch.ones(logits.shape[1:3], device=logits.device) if mask is None else mask.float()
    weight = weight / (weight.sum() * len(router_logits))
    share = torch.einsum("lbtsx,bt->sx", chosen.float(), weight)
    mean_probability = torch.einsum("lbtx,bt->x", probabilities, weight)
    return num_experts * (share * mean_probability).sum()

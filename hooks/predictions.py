"""What a model expects next: the table of likely tokens, its entropy, the surprisal of what came; and how two runs
differ in it.

Axes: T position, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from jambascope.errors import InputError

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True)
class NextToken:
    """One candidate for the next position."""

    rank: int
    """0 for the likeliest token."""
    token_id: int
    text: str
    probability: float
    logit: float


def next_tokens(model: HookedJamba, logits: Float[torch.Tensor, " vocab"], k: int = 10) -> list[NextToken]:
    """The ``k`` likeliest next tokens (all of them when the vocabulary is smaller), likeliest first.

    Args:
        logits: [V] at one position.
        k: length of the table.

    Raises:
        InputError: ``k`` below 1, or logits of more than one position.
    """
    if logits.ndim != 1:
        raise InputError(f"logits have shape {tuple(logits.shape)}; give those of one position, [vocab]")
    if k < 1:
        raise InputError(f"k={k!r} must be at least 1")
    values, ids = logits.float().topk(min(k, logits.shape[0]))
    probabilities = logits.float().softmax(-1)[ids]
    return [
        NextToken(rank, token_id, model.to_string(torch.tensor([token_id])), probability, logit)
        for rank, (token_id, probability, logit) in enumerate(
            zip(ids.tolist(), probabilities.tolist(), values.tolist(), strict=True)
        )
    ]


def rank_of(logits: Float[torch.Tensor, " vocab"], token_id: int) -> int:
    """How many tokens have a higher logit than ``token_id``: 0 when it is the likeliest."""
    return int((logits > logits[token_id]).sum())


def entropy(logits: Float[torch.Tensor, "*pos vocab"]) -> Float[torch.Tensor, "*pos"]:
    """Entropy of the next-token distribution in nats: 0 for certainty, ln V for a uniform one."""
    log_p = logits.float().log_softmax(-1)
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def surprisal(
    logits: Float[torch.Tensor, "pos vocab"], tokens: Int[torch.Tensor, " pos"]
) -> Float[torch.Tensor, " T-1"]:
    """-ln p(token) in nats of every token but the first, each predicted from the tokens before it: [T-1]."""
    log_p = logits[:-1].float().log_softmax(-1)
    return -log_p.gather(-1, tokens[1:, None].to(log_p.device))[:, 0]


# -- two runs ------------------------------------------------------------------------------------------------


def divergence(
    before: Float[torch.Tensor, "*pos vocab"], after: Float[torch.Tensor, "*pos vocab"]
) -> Float[torch.Tensor, "*pos"]:
    """KL(before || after) of next-token distributions, in nats, from logits: what it costs to expect what ``after``
    says where ``before`` is right. 0 when they agree; in float64, never below 0."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    known = p > -torch.inf  # what never comes costs nothing
    return torch.where(known, p.exp() * (p - q), 0).sum(-1).clamp_min(0)


@dataclass(frozen=True)
class ChangedToken:
    """One candidate for the next position in two runs."""

    token_id: int
    text: str
    before: float
    """Probability."""
    after: float


def changed_tokens(
    model: HookedJamba, before: Float[torch.Tensor, " vocab"], after: Float[torch.Tensor, " vocab"], k: int = 8
) -> list[ChangedToken]:
    """The ``k`` likeliest next tokens of either run, likeliest before first: at most 2 k.

    Args:
        before: logits [V] at one position.
        after: of the other run, at the same position.

    Raises:
        InputError: ``k`` below 1, or logits of more than one position.
    """
    ids = {c.token_id: c.text for logits in (before, after) for c in next_tokens(model, logits, k)}
    p, q = before.float().softmax(-1), after.float().softmax(-1)
    found = [ChangedToken(i, text, float(p[i]), float(q[i])) for i, text in ids.items()]
    return sorted(found, key=lambda token: (-token.before, -token.after))

"""How well a model repeats tokens that it has read before, as it is and without some of its heads.

Sequences are random tokens said twice (:func:`jambascope.hooks.heads.repeated_random_tokens`). The second time
induction would tell every token but the first; the first time nothing tells any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hooks.intervals import at_least
from jambascope.hooks.interventions import Intervention, ZeroAblation, mean_ablation
from jambascope.hooks.label_ablation import Head, HeadAblation, random_head_sets
from jambascope.hooks.runner import run
from jambascope.losses import token_losses

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Ablation = Literal["mean", "zero"]


class Repetition(NamedTuple):
    """Means over the tokens of each sequence, float64 on the CPU."""

    loss_before: Float[torch.Tensor, " sequences"]
    """Of the tokens said the first time, nats."""
    loss: Float[torch.Tensor, " sequences"]
    """Of those said again, all but the first of them, nats."""
    accuracy: Float[torch.Tensor, " sequences"]
    """Of the same: the share that has the highest logit."""


@torch.no_grad()
def repetition(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "sequences pos"],
    interventions: Sequence[Intervention] = (),
    batch_size: int = 16,
) -> Repetition:
    """How well tokens that are said twice are told, the first time and the second."""
    losses, hits = [], []
    for part in tokens.split(batch_size):
        logits = run(model, part, interventions).logits
        losses.append(token_losses(logits, part).cpu().double())
        hits.append((logits[:, :-1].argmax(-1) == part[:, 1:]).cpu().double())
    every, hit = torch.cat(losses), torch.cat(hits)
    start = every.shape[1] - tokens.shape[1] // 2  # the first prediction of a token of the second time
    return Repetition(every[:, :start].mean(1), every[:, start + 1 :].mean(1), hit[:, start + 1 :].mean(1))


@torch.no_grad()
def take_away(
    model: HookedJamba,
    heads: Sequence[Head],
    ablation: Ablation = "mean",
    reference: Int[torch.Tensor, "sequences pos"] | None = None,
) -> list[Intervention]:
    """What takes heads away: what they read (z) set to zero, or to its mean over the tokens of ``reference``.

    Raises:
        InputError: the mean without a reference, or an unknown ablation.
    """
    if ablation not in ("mean", "zero"):
        raise InputError(f"ablation={ablation!r} must be 'mean' or 'zero'")
    if ablation == "mean" and reference is None:
        raise InputError("ablation='mean' needs the reference whose mean stands in; give one, or ablation='zero'")
    found: list[Intervention] = []
    for layer in sorted({layer for layer, _ in heads}):
        own = [head for at, head in heads if at == layer]
        if ablation == "zero":
            found.append(ZeroAblation("z", layer, heads=own))
        else:
            found.append(mean_ablation(model, reference, "z", layer, heads=own))
    return found


@torch.no_grad()
def ablate_repetition(
    model: HookedJamba,
    heads: Sequence[Head],
    reference: Int[torch.Tensor, "sequences pos"],
    tokens: Int[torch.Tensor, "sequences pos"],
    *,
    ablation: Ablation = "mean",
    draws: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[float, dict[str, HeadAblation]], Any] | None = None,
) -> dict[str, HeadAblation]:
    """Repetition without some heads, against as many random ones: field of :class:`Repetition` -> what it came to.

    Args:
        heads: (layer, head) pairs. Choose them on other sequences than ``tokens``.
        reference: over which the mean is taken that stands in for a head.
        draws: random sets of other heads; fewer where fewer exist.
        seed: of the random sets.
        progress: told the share that is done and what is known after each random set; False ends with that.

    Raises:
        InputError: no heads, or too many to leave as many others.
    """
    at_least("draws", draws)
    sets = random_head_sets(model, heads, draws, seed)
    reference, tokens = reference.to(model.device), tokens.to(model.device)

    def without(own: Sequence[Head]) -> Repetition:
        return repetition(model, tokens, take_away(model, own, ablation, reference), batch_size)

    clean, ablated = repetition(model, tokens, (), batch_size), without(heads)
    random: list[Repetition] = []
    for i, own in enumerate(sets, 1):
        random.append(without(own))
        known = {
            name: HeadAblation(
                tuple(heads), sets[:i], ablation, getattr(clean, name), getattr(ablated, name),
                torch.stack([getattr(one, name) for one in random]),
            )
            for name in Repetition._fields
        }  # fmt: skip
        if progress is not None and progress((i + 2) / (len(sets) + 2), known) is False:
            break
    return known

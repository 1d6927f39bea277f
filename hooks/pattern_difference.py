"""How the attention of every head differs between two prompts of the same length, query by query.

Axes: T position, H head. With A and A' a head's patterns on the two prompts, a query's total variation is

    1/2 sum_j |A'_ij - A_ij|,        from 0 (it looks alike) to 1 (nothing that it looks at is the same)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hooks.heads import attention_layers

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True, eq=False)
class PatternDifference:
    """On the CPU, float32 at least."""

    layers: tuple[int, ...]
    variation: Float[torch.Tensor, "layers heads"]
    """Total variation of every head, the mean over queries."""
    difference: Float[torch.Tensor, "query key"]
    """The chosen head's pattern on the second prompt less that on the first; each row sums to 0."""


@torch.no_grad()
def pattern_difference(
    model: HookedJamba, first: Int[torch.Tensor, "1 pos"], second: Int[torch.Tensor, "1 pos"], layer: int, head: int
) -> PatternDifference:
    """Both prompts in one forward pass; patterns are compared as they appear.

    Raises:
        InputError: a model without attention, a head that it does not have, or prompts of different lengths.
    """
    layers = attention_layers(model)
    if layer not in layers or not 0 <= head < model.config.n_heads:
        heads = f"layers {', '.join(map(str, layers))}, heads 0..{model.config.n_heads - 1}"
        raise InputError(f"layer={layer}, head={head} is not an attention head of this model, which has {heads}")
    if first.shape != second.shape:
        raise InputError(
            f"the second prompt has {second.shape[-1]} tokens and the first {first.shape[-1]}; give it as many, so "
            "that every query has one to be compared with"
        )
    variation: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []

    def compare(pattern: torch.Tensor, hook) -> None:
        A = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        difference = A[1] - A[0]
        variation.append(difference.abs().sum(-1).mean(-1).cpu() / 2)
        if hook.layer() == layer:
            chosen.append(difference[head].cpu())

    with model.hooks([(f"blocks.{i}.attn.hook_pattern", compare) for i in layers]):
        model(torch.cat((first, second)), return_type=None)
    return PatternDifference(layers, torch.stack(variation), chosen[0])

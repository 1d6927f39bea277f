"""What the routers of the MoE layers do with tokens: load, balance, and the certainty of each choice.

Axes: T position, X expert, S top-k slot. With n_e the tokens x slots that chose expert e, k slots and T tokens, the
load of an expert is f_e = n_e / (k T): it sums to 1 and is 1 / X for every expert when routing is balanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True)
class Routing:
    """What one MoE layer's router did with one prompt."""

    probabilities: Float[torch.Tensor, "pos experts"]
    """Softmax over all experts, float32, before top-k."""
    indices: Int[torch.Tensor, "pos slots"]
    """The chosen experts, the most probable first."""


@dataclass(frozen=True)
class RoutingSummary:
    """The measures of one layer, tokens averaged where a measure is per token."""

    load: Float[torch.Tensor, " experts"]
    variation: float
    max_violation: float
    load_entropy: float
    dead_experts: int
    token_entropy: float
    margin: float
    retained_mass: float


@torch.no_grad()
def capture_routing(model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"]) -> dict[int, Routing]:
    """One forward pass over one prompt; what the router of each MoE layer did, on the CPU."""
    layers = model.config.moe_layers
    names = [f"blocks.{layer}.mlp.router.{point}" for layer in layers for point in _POINTS]
    _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None, return_cache_object=False)
    return {layer: Routing(*(cache[f"blocks.{layer}.mlp.router.{p}"][0].cpu() for p in _POINTS)) for layer in layers}


_POINTS = ("hook_expert_weights", "hook_expert_indices")


def expert_load(indices: Int[torch.Tensor, "*tokens slots"], num_experts: int) -> Float[torch.Tensor, " experts"]:
    """Load f_e = n_e / (k T) of each expert: a share of all tokens x slots (Switch, arXiv 2101.03961, eq. 5)."""
    counts = torch.bincount(indices.flatten(), minlength=num_experts)
    return counts.to(torch.get_default_dtype()) / indices.numel()


def load_variation(load: Float[torch.Tensor, " experts"]) -> float:
    """Coefficient of variation std / mean over experts; 0 when balanced (Shazeer et al., arXiv 1701.06538, 4).

    The standard deviation is the population's; balanced random routing gives about sqrt((X - 1) / (k T)).
    """
    return float(load.std(correction=0) / load.mean())


def max_violation(load: Float[torch.Tensor, " experts"]) -> float:
    """MaxVio = max f_e * X - 1: by what factor the busiest expert exceeds its share (arXiv 2408.15664, 4.1)."""
    return float(load.max() * len(load) - 1)


def load_entropy(load: Float[torch.Tensor, " experts"]) -> float:
    """Entropy of the load over ln X: 1 when balanced, 0 when one expert takes all. A single expert is balanced."""
    if len(load) == 1:
        return 1.0
    return float(-torch.special.xlogy(load, load).sum() / torch.log(torch.tensor(float(len(load)))))


def dead_experts(load: Float[torch.Tensor, " experts"]) -> int:
    """Experts that no token chose."""
    return int((load == 0).sum())


def token_entropy(probabilities: Float[torch.Tensor, "*tokens experts"]) -> Float[torch.Tensor, "*tokens"]:
    """Entropy in nats of each token's router probabilities: 0 for a certain router, ln X for an undecided one."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def margin(probabilities: Float[torch.Tensor, "*tokens experts"]) -> Float[torch.Tensor, "*tokens"]:
    """Probability of the likeliest expert minus that of the second; the whole of it with a single expert."""
    if probabilities.shape[-1] == 1:
        return probabilities[..., 0]
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


def retained_mass(
    probabilities: Float[torch.Tensor, "*tokens experts"], indices: Int[torch.Tensor, "*tokens slots"]
) -> Float[torch.Tensor, "*tokens"]:
    """Sum of the k kept probabilities of each token.

    Jamba does not renormalise them (unlike Mixtral), so this is the factor by which routing shrinks the layer's output.
    """
    return probabilities.gather(-1, indices).sum(-1)


def kept_weights(routing: Routing) -> Float[torch.Tensor, "pos experts"]:
    """The weight with which each token used each expert: the router's probability where chosen, 0 elsewhere."""
    chosen = torch.zeros_like(routing.probabilities).scatter(-1, routing.indices, 1.0)
    return routing.probabilities * chosen


def summarize(routing: Routing) -> RoutingSummary:
    """Every measure of one layer over the tokens of a prompt."""
    p = routing.probabilities
    load = expert_load(routing.indices, p.shape[-1])
    return RoutingSummary(
        load=load,
        variation=load_variation(load),
        max_violation=max_violation(load),
        load_entropy=load_entropy(load),
        dead_experts=dead_experts(load),
        token_entropy=float(token_entropy(p).mean()),
        margin=float(margin(p).mean()),
        retained_mass=float(retained_mass(p, routing.indices).mean()),
    )

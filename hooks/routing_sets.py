"""Which experts a token chooses together, and which of them it chose at another checkpoint.

Axes: T token, X expert, S slot. N_i counts the tokens that chose expert i, N_ij those that chose both i and j.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from jambascope.errors import InputError
from jambascope.hooks.intervals import resampled_means
from jambascope.hooks.routing import Routing, chosen_experts
from jambascope.hooks.routing_chance import Estimate, interval, level, prompt_sums, row

# -- co-activation ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Coactivation:
    """How often two experts are chosen together; an expert with itself is no pair, so diagonals are NaN."""

    counts: Float[torch.Tensor, "experts experts"]
    """N_ij, each token's unordered pairs once; symmetric. The diagonal is N_i."""
    share: Float[torch.Tensor, "experts experts"]
    """N_ij / N_i, i the row: of the tokens that chose i, those that chose j too. Rows sum to k - 1; NaN where i is
    never chosen."""
    expected: Float[torch.Tensor, "experts experts"]
    """The share if sets of k different experts were drawn with these loads and nothing else in common."""
    chance: float
    """The share when loads are even too: (k - 1) / (X - 1); NaN for one expert."""


def coactivation(routing: Routing) -> Coactivation:
    """Co-activation N_ij / N_i (OLMoE, arXiv 2409.02060, eq. 6), and what independence would give.

    Independent choices of exactly k different experts that keep the loads are sets S of probability proportional to
    prod_{e in S} w_e, the distribution of most entropy (Chen, Dempster and Liu, Biometrika 81, 1994). N_j / T would be
    wrong: that is for choices of any number of experts.
    """
    k, experts = routing.experts_per_token, routing.num_experts
    chosen = chosen_experts(routing).double()
    counts = chosen.T @ chosen
    own = counts.diagonal()
    expected = pair_probabilities(own / len(routing), k) * len(routing)
    diagonal = torch.eye(experts, dtype=torch.bool)
    share, expected = ((c / own[:, None]).masked_fill(diagonal, torch.nan) for c in (counts, expected))
    return Coactivation(counts, share, expected, (k - 1) / (experts - 1) if experts > 1 else float("nan"))


def pair_probabilities(inclusion: Float[torch.Tensor, " experts"], k: int) -> Float[torch.Tensor, "experts experts"]:
    """P(i and j in S) for random sets S of ``k`` experts with P(S) ~ prod w, given P(i in S); these on the diagonal.

    Newton's method on the concave log-likelihood of ln w, whose gradient and Hessian are the wanted probabilities.
    """
    inclusion = inclusion.double()
    always, never = inclusion > 1 - 1e-12, inclusion < 1e-12
    free = ~(always | never)
    left = k - int(always.sum())
    inside = inclusion[free]
    theta = torch.logit(inside)
    within = torch.diag(inside)
    for _ in range(100 if left > 0 else 0):
        within = _pairs(theta.exp(), left)
        gradient = inside - within.diagonal()
        if gradient.abs().max() < 1e-13:
            break
        hessian = within - torch.outer(within.diagonal(), within.diagonal())
        step = torch.linalg.pinv(hessian, hermitian=True) @ gradient
        theta = theta + step / step.abs().max().clamp_min(1)
        theta = theta - theta.mean()
    pairs = torch.outer(inclusion, inclusion)  # right for an expert that is in every set, or in none
    at = free.nonzero()[:, 0]
    pairs[at[:, None], at] = within
    pairs.diagonal().copy_(inclusion)
    return pairs


def _pairs(w: Float[torch.Tensor, " experts"], k: int) -> Float[torch.Tensor, "experts experts"]:
    """Inclusion probabilities of pairs, and of single experts on the diagonal, from elementary symmetric polynomials.

    P(i and j) = w_i w_j e_{k-2}(w without i and j) / e_k(w), P(i) = w_i e_{k-1}(w without i) / e_k(w).
    """
    n = len(w)
    keep = 1 - torch.eye(n, dtype=w.dtype)
    without = torch.einsum("ie,je,e->ije", keep, keep, w)  # [i j e]
    e = torch.zeros(n, n, k + 1, dtype=w.dtype)
    e[..., 0] = 1
    for x in without.unbind(-1):
        e[..., 1:] += x[..., None] * e[..., :-1].clone()
    single = w * e[..., k - 1].diagonal()
    total = single.sum() / k  # each set of k is counted once for every member
    pairs = torch.outer(w, w) * (e[..., k - 2] if k > 1 else torch.zeros(n, n, dtype=w.dtype))
    pairs.diagonal().copy_(single)
    return pairs / total


# -- saturation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saturation:
    """How much of the routes of a final checkpoint an earlier one has already."""

    overlap: Estimate
    """Mean over tokens of the experts that both chose, over k; interval over prompts."""
    chance: float
    """k / X: two even choices."""
    chance_of_loads: float
    """Two independent choices with the loads that the checkpoints have: sum_e (N_e / T) (N'_e / T) / k."""


def saturation(
    earlier: Routing, final: Routing, slots: int | None = None, draws: int = 2000, seed: int = 0
) -> Saturation:
    """Router saturation (OLMoE, arXiv 2409.02060, section 5.1) of one layer at two checkpoints, on the same tokens.

    Args:
        slots: only the first so many choices of each token, such as 1; all when not given.

    Raises:
        InputError: other tokens, other numbers of experts or slots, or more ``slots`` than there are.
    """
    _check_same(earlier, final)
    k = earlier.experts_per_token if slots is None else slots
    if not 1 <= k <= earlier.experts_per_token:
        raise InputError(f"slots={slots}: must lie in 1..{earlier.experts_per_token}")
    sets = [chosen_experts(Routing(r.probabilities, r.indices[:, :k])) for r in (earlier, final)]
    both = (sets[0] & sets[1]).sum(1)
    sums = prompt_sums(final.prompts, torch.stack([both, torch.full_like(both, k)], 1))
    drawn = resampled_means(sums, seed, draws)
    loads = [s.double().mean(0) for s in sets]
    return Saturation(
        overlap=interval(float(both.double().mean() / k), drawn[:, 0] / drawn[:, 1], len(sums)),
        chance=k / final.num_experts,
        chance_of_loads=float((loads[0] * loads[1]).sum() / k),
    )


def overlap(before: Routing, after: Routing) -> Float[torch.Tensor, " tokens"]:
    """Share of each token's experts that both routings of one layer chose: 1 where the sets are the same.

    Raises:
        InputError: other tokens, or other numbers of experts or slots.
    """
    _check_same(before, after)
    return (chosen_experts(before) & chosen_experts(after)).double().sum(1) / before.experts_per_token


def _check_same(a: Routing, b: Routing) -> None:
    shapes = [(len(r), r.experts_per_token, r.num_experts) for r in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(f"(tokens, slots, experts) are {shapes[0]} and {shapes[1]}; give both models the same tokens")
    for name in ("token_ids", "positions", "prompts"):
        first, second = getattr(a, name), getattr(b, name)
        if first is not None and second is not None and not torch.equal(first, second):
            raise InputError(f"the two routings differ in their {name}; give both models the same tokens")


def saturation_table(
    earlier: Mapping[int, Routing], final: Mapping[int, Routing], draws: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of every layer's saturation, over all slots and over the first; chance is that of the loads.

    Raises:
        InputError: routings of different layers or tokens.
    """
    if list(earlier) != list(final):
        raise InputError(f"MoE layers are {list(earlier)} and {list(final)}; give checkpoints of one model")
    rows = []
    for layer in final:
        for name, slots in (("saturation", None), ("saturation of the first choice", 1)):
            s = saturation(earlier[layer], final[layer], slots, draws, seed)
            rows.append(row(layer, name, s.overlap, level(s.chance_of_loads)))
    return rows

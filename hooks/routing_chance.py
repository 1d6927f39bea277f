"""What a measure of routing is worth: its interval over prompts, and what chance alone would give.

Chance: every token chooses k different experts of X, all sets equally likely, independently of other tokens. Then n_e
is binomial(T, k / X), and the mean square of the load's CV over experts is exactly (X - k) / (k T). The k T choices
taken for independent (a multinomial) give (X - 1) / (k T) instead: the same at k = 1, too much above it. Tokens of one
prompt resemble each other, so that a load can leave chance by its prompts alone: the interval, which resamples whole
prompts, says how far the estimate would move with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Num

from jambascope.errors import InputError
from jambascope.hooks.intervals import corrected_interval, resampled_means
from jambascope.hooks.routing import (
    Routing,
    chosen_experts,
    dead_experts,
    expert_load,
    load_entropy,
    load_variation,
    margin,
    max_violation,
    retained_mass,
    token_entropy,
)


class Estimate(NamedTuple):
    """A measure over a corpus and its 95 % interval over prompts: without bounds (-inf, inf) for a single prompt."""

    value: float
    low: float
    high: float


class Chance(NamedTuple):
    """What chance gives: mean, the middle 95 %, and how often it goes as far as what was observed, or further."""

    mean: float
    low: float
    high: float
    p_value: float
    """One-sided, (1 + draws as extreme) / (1 + draws), so never 0."""


LOAD_MEASURES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "variation": (load_variation, 1),
    "max_violation": (max_violation, 1),
    "load_entropy": (load_entropy, -1),
    "dead_experts": (dead_experts, 1),
}
"""Name -> function of the load [*batch X], and its sign: 1 where more means less balanced."""

# -- chance -------------------------------------------------------------------------------------------------


def draw_counts(
    tokens: int | Int[torch.Tensor, "*windows"],
    slots: int,
    experts: int,
    draws: int = 2000,
    seed: int | np.random.Generator = 0,
    distinct: bool = True,
) -> Int[torch.Tensor, "draws *windows experts"]:
    """Random n_e: how many of ``tokens`` chose each expert when each chooses ``slots`` different ones evenly.

    Exact, at a cost that does not grow with the tokens: experts are passed one by one, and of the tokens that have r
    slots left, binomially many take the expert with r / (experts left).

    Args:
        tokens: a number, or one for each of several windows, which are drawn independently.
        distinct: False draws the multinomial of ``slots * tokens`` independent choices.

    Raises:
        InputError: numbers below 1, or more slots than experts.
    """
    if not 1 <= slots <= experts or draws < 1:
        raise InputError(f"slots={slots}, experts={experts}, draws={draws}: need 1 <= slots <= experts and draws >= 1")
    tokens = np.asarray(tokens)
    if tokens.min() < 1:
        raise InputError(f"tokens={tokens.min()} must be at least 1")
    rng = np.random.default_rng(seed)
    if not distinct:
        each = np.full(experts, 1 / experts)
        return torch.from_numpy(rng.multinomial(slots * tokens, each, size=(draws, *tokens.shape)))
    left = np.zeros((draws, *tokens.shape, slots + 1), dtype=np.int64)  # tokens by the slots they have left
    left[..., slots] = tokens
    counts = np.empty((draws, *tokens.shape, experts), dtype=np.int64)
    for expert in range(experts):
        took = rng.binomial(left, np.minimum(np.arange(slots + 1) / (experts - expert), 1))
        counts[..., expert] = took.sum(-1)
        left -= took
        left[..., :-1] += took[..., 1:]
    return torch.from_numpy(counts)


def chance_variation(tokens: int, slots: int, experts: int, distinct: bool = True) -> float:
    """Root mean square of the CV of load by chance: sqrt((X - k) / (k T)); as a multinomial sqrt((X - 1) / (k T))."""
    return math.sqrt((experts - (slots if distinct else 1)) / (slots * tokens))


def load_range(tokens: int, slots: int, experts: int) -> tuple[float, float]:
    """The middle 95 % of one expert's load f_e by chance: of n_e / (k T), n_e binomial(T, k / X).

    Raises:
        InputError: numbers below 1, or more slots than experts.
    """
    if not 1 <= slots <= experts or tokens < 1:
        raise InputError(
            f"tokens={tokens}, slots={slots}, experts={experts}: need tokens >= 1 and 1 <= slots <= experts"
        )
    if slots == experts:
        return 1 / experts, 1 / experts
    counts = torch.arange(tokens + 1, dtype=torch.float64)
    share = torch.tensor(slots / experts, dtype=torch.float64)
    reached = torch.distributions.Binomial(tokens, share).log_prob(counts).exp().cumsum(0)
    low, high = (int((reached < tail).sum()) for tail in (0.025, 0.975))
    return low / (slots * tokens), high / (slots * tokens)


def load_chance(routing: Routing, draws: int = 2000, seed: int = 0, distinct: bool = True) -> dict[str, Chance]:
    """Measure of load -> what chance gives for as many tokens, slots and experts (all of ``LOAD_MEASURES``).

    Args:
        distinct: False takes the multinomial of independent slots.
    """
    k, experts = routing.experts_per_token, routing.num_experts
    drawn = draw_counts(len(routing), k, experts, draws, seed, distinct).double() / (k * len(routing))
    load = expert_load(routing.indices, experts)
    return {
        name: against_chance(float(measure(load)), measure(drawn), sign)
        for name, (measure, sign) in LOAD_MEASURES.items()
    }


def against_chance(observed: float, drawn: Num[torch.Tensor, " draws"], sign: int = 1) -> Chance:
    """Draws of a measure by chance, summed up; ``sign`` is -1 where a small value is the remarkable one."""
    drawn = drawn.double()
    extreme = int((sign * drawn >= sign * observed - 1e-9 * max(1.0, abs(observed))).sum())
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Chance(float(drawn.mean()), low, high, (1 + extreme) / (1 + len(drawn)))


# -- intervals over prompts ---------------------------------------------------------------------------------


def prompt_sums(
    prompts: Int[torch.Tensor, " tokens"], values: Num[torch.Tensor, " tokens *shape"]
) -> Float[torch.Tensor, " prompts *shape"]:
    """Sums of per-token values over the tokens of each prompt, in float64."""
    prompts, which = prompts.unique(return_inverse=True)
    out = torch.zeros(len(prompts), *values.shape[1:], dtype=torch.float64)
    return out.index_add_(0, which, values.double())


def interval(value: float, drawn: Num[torch.Tensor, " draws"], units: int) -> Estimate:
    """A measure with the interval of :func:`jambascope.hooks.intervals.corrected_interval`."""
    low, high = corrected_interval(torch.tensor(value, dtype=torch.float64), drawn, units)
    return Estimate(value, float(low), float(high))


def _totals(routing: Routing) -> Float[torch.Tensor, "prompts sums"]:
    """Of each prompt: n_e, sums of probabilities, of token entropy, margin and retained mass, and its tokens."""
    p = routing.probabilities
    certainty = torch.stack([token_entropy(p), margin(p), retained_mass(p, routing.indices), torch.ones(len(p))], 1)
    return torch.cat([prompt_sums(routing.prompts, v) for v in (chosen_experts(routing), p, certainty)], 1)


def _measures(totals: Float[torch.Tensor, "*batch sums"], experts: int) -> dict[str, Float[torch.Tensor, "*batch"]]:
    counts, probability, certainty = totals.split([experts, experts, 4], dim=-1)
    load = counts / counts.sum(-1, keepdim=True)
    means = certainty[..., :3] / certainty[..., 3:]
    return {
        **{name: measure(load) for name, (measure, _) in LOAD_MEASURES.items()},
        **dict(zip(("token_entropy", "margin", "retained_mass"), means.unbind(-1), strict=True)),
        "balance_loss": experts * (load * probability / certainty[..., 3:]).sum(-1),
    }


def load_intervals(routing: Routing, draws: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """Every measure of :func:`jambascope.hooks.routing.summarize` but the load itself, with its interval.

    Differences between prompts that are noise look like imbalance, so that CV, MaxVio, load entropy and balance loss of
    few prompts (ten, say) lie on the unbalanced side of those of many, and their intervals with them.
    """
    totals = _totals(routing)
    values = _measures(totals.sum(0), routing.num_experts)
    drawn = _measures(resampled_means(totals, seed, draws), routing.num_experts)
    return {name: interval(float(value), drawn[name], len(totals)) for name, value in values.items()}


# -- table --------------------------------------------------------------------------------------------------


def row(layer: int, measure: str, estimate: Estimate, chance: Chance) -> dict[str, Any]:
    """One row of a table in long form; the same columns for every measure of routing."""
    names = ("chance", "chance_low", "chance_high", "p_value")
    return {"layer": layer, "measure": measure, **estimate._asdict(), **dict(zip(names, chance, strict=True))}


def level(value: float) -> Chance:
    """A level to compare with that has no distribution."""
    return Chance(value, math.nan, math.nan, math.nan)


def load_table(routes: Mapping[int, Routing], draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of every layer's measures of load and certainty, with intervals over prompts and chance.

    For measures of probabilities, chance is the value of a router that gives every expert the same probability.
    """
    rows = []
    for layer, routing in routes.items():
        k, experts = routing.experts_per_token, routing.num_experts
        even = {"token_entropy": math.log(experts), "margin": 0.0 if experts > 1 else 1.0}
        even |= {"retained_mass": k / experts, "balance_loss": 1.0}
        chance = load_chance(routing, draws, seed) | {name: level(value) for name, value in even.items()}
        rows += [row(layer, name, e, chance[name]) for name, e in load_intervals(routing, draws, seed).items()]
    return rows

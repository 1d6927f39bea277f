"""What a route can be told from: how much tokens, positions or domains say about the experts, and who specialises.

A *label* is a whole number for each token: its id, its position's bin, its domain; tokens whose label is negative are
left out. Axes: T token, X expert, S slot, L label. N_le counts tokens of label l that chose expert e.

With k > 1 slots a token's experts differ from each other, so that the k T choices are no independent sample. The
Miller-Madow correction of an entropy with m cells in use, (m - 1) / 2n, comes from their variance; with k different
choices per token that of a cell of share p is k T p (1 - k p), and the correction (m - k) / (2 k T). At k = 1 it is
Miller's; at k = X, where there is nothing to choose, it is none, as it must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hooks.intervals import at_least, corrected_interval, resampled_means
from jambascope.hooks.routing import Routing, chosen_experts
from jambascope.hooks.routing_chance import Chance, Estimate, against_chance, level, row

GROUPS = 20
"""Most groups of prompts that a jackknife leaves out in turn."""
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
             2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""

# -- labels -------------------------------------------------------------------------------------------------


def position_bins(positions: Int[torch.Tensor, " tokens"]) -> Int[torch.Tensor, " tokens"]:
    """Bins of doubling width: position 0 is bin 0, 1 is 1, 2-3 is 2, 4-7 is 3, and so on."""
    return torch.frexp(positions.double()).exponent.long()


def next_token_ids(routing: Routing) -> Int[torch.Tensor, " tokens"]:
    """The id of the token that follows each token in its prompt, -1 for the last: the output variant of OLMoE's 5.4."""
    ids = token_ids(routing)
    follows = (routing.prompts[1:] == routing.prompts[:-1]) & (routing.positions[1:] == routing.positions[:-1] + 1)
    return torch.cat([torch.where(follows, ids[1:], -1), ids.new_tensor([-1])])


def token_ids(routing: Routing) -> Int[torch.Tensor, " tokens"]:
    """The ids, or InputError where the routing was made without them."""
    if routing.token_ids is None:
        raise InputError("this routing has no token_ids; take it from capture_routing, or pass them to Routing")
    return routing.token_ids


@dataclass(frozen=True, eq=False)
class _Labelled:
    """The labelled tokens of a routing; labels renumbered 0, 1, ..."""

    indices: Int[torch.Tensor, "tokens slots"]
    labels: Int[torch.Tensor, " tokens"]
    prompts: Int[torch.Tensor, " tokens"]
    values: Int[torch.Tensor, " labels"]
    num_experts: int

    @classmethod
    def of(cls, routing: Routing, labels: Int[torch.Tensor, " tokens"]) -> _Labelled:
        labels = torch.as_tensor(labels)
        if labels.shape != (len(routing),) or labels.is_floating_point():
            shape = tuple(labels.shape)
            raise InputError(
                f"labels are {labels.dtype} {shape}; give one whole number for each of {len(routing)} tokens"
            )
        known = labels >= 0
        if not known.any():
            raise InputError("every label is negative, which leaves the token out; label at least one token")
        values, labels = labels[known].unique(return_inverse=True)
        prompts = routing.prompts[known].unique(return_inverse=True)[1]
        return cls(routing.indices[known], labels, prompts, values, routing.num_experts)

    def table(self, labels: torch.Tensor | None = None, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """N_le [L X] in float64, of other labels or of some tokens when given."""
        labels = self.labels if labels is None else labels
        cells = labels[rows, None] * self.num_experts + self.indices[rows]
        size = len(self.values) * self.num_experts
        return cells.flatten().bincount(minlength=size).double().view(-1, self.num_experts)

    def shuffled(self, shuffles: int, seed: int, unit: Literal["tokens", "prompts"]) -> Iterator[torch.Tensor]:
        """Tables with labels dealt out anew among tokens, or among prompts that have one label each."""
        if unit not in ("tokens", "prompts"):
            raise InputError(f"unit={unit!r} must be 'tokens' or 'prompts'")
        generator = torch.Generator().manual_seed(seed)
        if unit == "prompts":
            of_prompt = torch.zeros(int(self.prompts.max()) + 1, dtype=torch.long)
            of_prompt[self.prompts] = self.labels
            if not torch.equal(of_prompt[self.prompts], self.labels):
                raise InputError("unit='prompts' needs one label per prompt, and some have several; use unit='tokens'")
        for _ in range(shuffles):
            if unit == "prompts":
                order = torch.randperm(len(of_prompt), generator=generator)
                yield self.table(of_prompt[order][self.prompts])
            else:
                yield self.table(self.labels[torch.randperm(len(self.labels), generator=generator)])

    def jackknife(self, statistic: Callable[[torch.Tensor], float]) -> Estimate:
        """A statistic of the table and its 95 % interval, from leaving out groups of whole prompts in turn."""
        whole = self.table()
        value, n = statistic(whole), int(self.prompts.max()) + 1
        if n < 2 or math.isnan(value):
            return Estimate(value, -math.inf, math.inf)
        groups = min(n, GROUPS)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # prompts often stand by domain
        group = (order * groups // n)[self.prompts]
        left = torch.tensor([statistic(whole - self.table(rows=group == g)) for g in range(groups)]).double()
        if left.isnan().any():  # without one group nothing is left to choose from
            return Estimate(value, -math.inf, math.inf)
        half = STUDENT_T[groups - 2] * float(((groups - 1) * left.var(correction=0)).sqrt())
        return Estimate(value, value - half, value + half)


# -- mutual information -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dependence:
    """How much of the choice of expert a label tells."""

    fraction: Estimate
    """I(expert; label) / H(expert), both corrected: 0 when independent, 1 when the label fixes the experts at k = 1.
    NaN when only one expert is ever chosen."""
    shuffled: Chance
    """The same with shuffled labels; a mean well above 0 is bias that the correction left (many rare labels)."""
    uncorrected: float
    """The fraction from plain frequencies, biased upwards."""
    information: float
    """I(expert; label), corrected, nats."""
    entropy: float
    """H(expert) of the load, corrected, nats."""
    labels: int
    tokens: int


def dependence(
    routing: Routing,
    labels: Int[torch.Tensor, " tokens"],
    shuffles: int = 20,
    seed: int = 0,
    unit: Literal["tokens", "prompts"] = "tokens",
) -> Dependence:
    """Mutual information of the chosen expert (a slot drawn at random) and a label, as a share of the expert's entropy.

    With k > 1 even a label that fixes a token's experts leaves the slot open, so the most there can be is 1 - ln k /
    H(expert). The correction is Miller's of 1955 (Paninski, Neural Computation 15, 2003, section 4.1), for k choices as
    the module's docstring says. The interval is a jackknife over groups of prompts.

    Args:
        labels: one per token; negative ones leave the token out.
        shuffles: times that labels are dealt out anew for the baseline.
        unit: what the baseline shuffles: ``"prompts"`` where all tokens of a prompt have one label (a domain), since
            they are then no independent witnesses.

    Raises:
        InputError: labels that do not fit, or ``unit="prompts"`` with several labels in a prompt.
    """
    at_least("shuffles", shuffles)
    data, k = _Labelled.of(routing, labels), routing.experts_per_token
    table = data.table()
    information, entropy = _information(table, k)
    plain, of_experts = _information(table, k, corrected=False)
    drawn = torch.tensor([_fraction(t, k) for t in data.shuffled(shuffles, seed, unit)]).double()
    return Dependence(
        fraction=data.jackknife(lambda t: _fraction(t, k)),
        shuffled=level(math.nan) if drawn.isnan().any() else against_chance(_fraction(table, k), drawn),
        uncorrected=plain / of_experts if of_experts > 0 else math.nan,
        information=information,
        entropy=entropy,
        labels=len(data.values),
        tokens=len(data.labels),
    )


def token_dependence(routing: Routing, shuffles: int = 20, seed: int = 0) -> Dependence:
    """:func:`dependence` on the token's id."""
    return dependence(routing, token_ids(routing), shuffles, seed)


def position_dependence(routing: Routing, shuffles: int = 20, seed: int = 0) -> Dependence:
    """:func:`dependence` on the position in the prompt, in the bins of :func:`position_bins`.

    Where prompts begin alike (<bos>), the first bins tell the token too.
    """
    return dependence(routing, position_bins(routing.positions), shuffles, seed)


def _information(table: Float[torch.Tensor, "labels experts"], k: int, corrected: bool = True) -> tuple[float, float]:
    """I(expert; label) and H(expert) in nats from counts of tokens x slots."""
    n = table.sum()
    of_label, of_expert = table.sum(1), table.sum(0)
    entropies = [float(n.log() - torch.special.xlogy(c, c).sum() / n) for c in (of_label, of_expert, table)]
    if corrected:
        # A label is drawn once per token (n / k times); an expert, or a label with an expert, k times and differently.
        cells = [int((c > 0).sum()) for c in (of_label, of_expert, table)]
        each = (k * (cells[0] - 1), cells[1] - k, cells[2] - k)
        entropies = [h + e / (2 * float(n)) for h, e in zip(entropies, each, strict=True)]
    label, expert, joint = entropies
    return label + expert - joint, expert


def _fraction(table: Float[torch.Tensor, "labels experts"], k: int) -> float:
    information, entropy = _information(table, k)
    return information / entropy if int((table.sum(0) > 0).sum()) > 1 else math.nan


# -- specialisation -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DomainSpecialization:
    """Which share of each domain's tokens chose each expert (OLMoE, arXiv 2409.02060, eq. 7)."""

    labels: Int[torch.Tensor, " labels"]
    tokens: Int[torch.Tensor, " labels"]
    share: Float[torch.Tensor, "labels experts"]
    """N_le / N_l: 1 when every token of the domain chose the expert; rows sum to k."""
    low: Float[torch.Tensor, "labels experts"]
    high: Float[torch.Tensor, "labels experts"]
    """95 % interval over prompts: without bounds (-inf, inf) for a domain of a single prompt."""
    overall: Float[torch.Tensor, " experts"]
    """The share of all labelled tokens: what a domain has that is like the others."""
    chance: float
    """k / X: an even choice."""


def domain_specialization(
    routing: Routing, labels: Int[torch.Tensor, " tokens"], draws: int = 1000, seed: int = 0
) -> DomainSpecialization:
    """Domain specialisation with intervals from ``draws`` resamplings of whole prompts.

    Raises:
        InputError: labels that do not fit.
    """
    data = _Labelled.of(routing, labels)
    one_hot = chosen_experts(routing)[torch.as_tensor(labels) >= 0]
    counted = torch.cat([one_hot, torch.ones_like(one_hot[:, :1])], 1)
    cells = data.prompts * len(data.values) + data.labels
    sums = torch.zeros(int(data.prompts.max() + 1) * len(data.values), counted.shape[1], dtype=torch.float64)
    sums = sums.index_add_(0, cells, counted.double()).unflatten(0, (-1, len(data.values)))  # [prompts labels X+1]

    def shares(sums: torch.Tensor) -> torch.Tensor:
        return sums[..., :-1] / sums[..., -1:]

    share = shares(sums.sum(0))
    prompts = (sums[..., -1:] > 0).sum(0).expand_as(share)
    low, high = corrected_interval(share, shares(resampled_means(sums, seed, draws)), prompts)
    tokens = sums.sum(0)[:, -1]
    overall = sums.sum((0, 1))[:-1] / tokens.sum()
    return DomainSpecialization(
        data.values, tokens.long(), share, low, high, overall, routing.experts_per_token / routing.num_experts
    )


@dataclass(frozen=True, eq=False)
class VocabularySpecialization:
    """Which share of each vocabulary item's tokens chose each expert (OLMoE, arXiv 2409.02060, eq. 8)."""

    labels: Int[torch.Tensor, " labels"]
    """Items that occur often enough."""
    tokens: Int[torch.Tensor, " labels"]
    share: Float[torch.Tensor, "labels experts"]
    top: Estimate
    """The share of each item's favourite expert, averaged over items."""
    shuffled: Chance
    """The same with shuffled items: more than k / X even by chance, since the favourite is picked after looking."""
    chance: float
    """k / X: an even choice."""


def vocabulary_specialization(
    routing: Routing,
    labels: Int[torch.Tensor, " tokens"] | None = None,
    least: int = 10,
    shuffles: int = 20,
    seed: int = 0,
) -> VocabularySpecialization:
    """Vocabulary specialisation of the tokens read, or of those that ``labels`` name.

    Args:
        labels: such as :func:`next_token_ids`, or what the model predicts; the tokens' own ids when not given.
        least: tokens that an item must have to count (OLMoE's table 8 takes 10).

    Raises:
        InputError: no ids, labels that do not fit, or no item that occurs ``least`` times.
    """
    at_least("shuffles", shuffles)
    data = _Labelled.of(routing, token_ids(routing) if labels is None else labels)
    tokens = data.labels.bincount(minlength=len(data.values))
    often = tokens >= least
    if not often.any():
        raise InputError(f"least={least}: the most frequent item has {int(tokens.max())} tokens; lower it")
    k = routing.experts_per_token

    def top(table: torch.Tensor) -> float:
        table = table[often]
        return float((table.amax(1) / (table.sum(1) / k)).nanmean())

    table = data.table()
    drawn = torch.tensor([top(t) for t in data.shuffled(shuffles, seed, "tokens")]).double()
    return VocabularySpecialization(
        labels=data.values[often],
        tokens=tokens[often],
        share=table[often] / tokens[often, None],
        top=data.jackknife(top),
        shuffled=against_chance(top(table), drawn),
        chance=k / routing.num_experts,
    )


def top_items(found: VocabularySpecialization, count: int) -> Int[torch.Tensor, "experts count"]:
    """Rows of ``found`` whose tokens choose each expert most, first those with the largest share (of equal shares the
    more frequent): [X count], or as many as there are."""
    most = found.tokens.double() / (1 + found.tokens.sum())
    order = (found.share + 1e-9 * most[:, None]).argsort(dim=0, descending=True, stable=True)
    return order[:count].T


# -- table --------------------------------------------------------------------------------------------------


def dependence_table(
    routes: Mapping[int, Routing],
    labels: Mapping[str, Int[torch.Tensor, " tokens"]] = {},
    shuffles: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of every layer's dependence on position, on the token where it is known, and on ``labels``, by name."""
    rows = []
    for layer, routing in routes.items():
        found = {"position": position_bins(routing.positions), **labels}
        if routing.token_ids is not None:
            found = {"token": routing.token_ids, **found}
        for name, values in found.items():
            d = dependence(routing, values, shuffles, seed)
            rows.append(row(layer, f"{name} dependence", d.fraction, d.shuffled))
    return rows

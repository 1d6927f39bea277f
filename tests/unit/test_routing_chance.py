"""Chance and intervals of routing measures against enumeration, simulation token by token, and resampled prompts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from jambascope.errors import InputError
from jambascope.hooks import routing
from jambascope.hooks import routing_chance as chance
from jambascope.hooks.intervals import resampled_means
from jambascope.hooks.routing import Routing

SIZES = [(3, 1, 4), (3, 2, 4), (2, 3, 4), (2, 4, 4), (5, 1, 1), (1, 2, 5)]


def distribution(tokens: int, slots: int, experts: int) -> dict[tuple[int, ...], float]:
    """Exact: every way in which every token can choose."""
    sets = list(itertools.combinations(range(experts), slots))
    found: dict[tuple[int, ...], float] = {}
    for choice in itertools.product(sets, repeat=tokens):
        counts = tuple(sum(e in s for s in choice) for e in range(experts))
        found[counts] = found.get(counts, 0) + len(sets) ** -tokens
    return found


@pytest.mark.parametrize(("tokens", "slots", "experts"), SIZES)
def test_drawn_counts_are_distributed_as_enumerated(tokens, slots, experts):
    exact = distribution(tokens, slots, experts)
    draws = 20_000
    rows, times = chance.draw_counts(tokens, slots, experts, draws).unique(dim=0, return_counts=True)
    seen = {tuple(row): n / draws for row, n in zip(rows.tolist(), times.tolist(), strict=True)}
    assert set(seen) <= set(exact)
    for counts, probability in exact.items():
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen.get(counts, 0) - probability) <= 5 * error + 1e-12, counts


@pytest.mark.parametrize(("tokens", "slots", "experts"), SIZES)
def test_mean_square_variation_is_exact(tokens, slots, experts):
    squares = [
        p * float(routing.load_variation(torch.tensor(counts).double())) ** 2
        for counts, p in distribution(tokens, slots, experts).items()
    ]
    assert chance.chance_variation(tokens, slots, experts) == pytest.approx(math.sqrt(sum(squares)), abs=1e-7)


def test_the_multinomial_is_too_wide_above_one_slot():
    drawn = chance.draw_counts(500, 2, 8, 4000, distinct=False)
    assert (drawn.sum(1) == 1000).all()
    rms = float(routing.load_variation(drawn.double()).square().mean().sqrt())
    assert rms == pytest.approx(chance.chance_variation(500, 2, 8, distinct=False), rel=0.02)
    exact = float(routing.load_variation(chance.draw_counts(500, 2, 8, 4000).double()).square().mean().sqrt())
    assert exact == pytest.approx(chance.chance_variation(500, 2, 8), rel=0.02)
    assert rms / exact == pytest.approx(math.sqrt(7 / 6), rel=0.03)


def test_windows_are_drawn_apart():
    drawn = chance.draw_counts(torch.tensor([4, 9, 1]), 2, 3, 50)
    assert drawn.shape == (50, 3, 3)
    assert (drawn.sum(-1) == torch.tensor([8, 18, 2])).all()
    assert (drawn <= torch.tensor([4, 9, 1])[:, None]).all()


def test_the_seed_decides():
    one, again, other = (chance.draw_counts(20, 2, 4, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_range_of_one_experts_load_is_binomial():
    low, high = chance.load_range(40, 2, 8)
    cumulative, ends = 0.0, []
    for n in range(41):
        cumulative += math.comb(40, n) * 0.25**n * 0.75 ** (40 - n)
        ends += [n] * (len(ends) < 1 and cumulative >= 0.025) + [n] * (len(ends) == 1 and cumulative >= 0.975)
    assert [low, high] == pytest.approx([end / 80 for end in ends])
    assert chance.load_range(5, 1, 1) == (1, 1)
    low, high = chance.load_range(4096, 2, 16)
    assert low < 1 / 16 < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(1 / 8 * 7 / 8 / 4096) / 2, rel=0.02)
    with pytest.raises(InputError, match="slots=3"):
        chance.load_range(5, 3, 2)


def test_load_chance_of_a_small_route_is_as_enumerated():
    p = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    route = Routing(p, torch.tensor([[0, 1], [0, 1], [0, 2]]))
    found = chance.load_chance(route, draws=20_000)
    load = routing.expert_load(route.indices, 4)
    exact = distribution(3, 2, 4)
    for name, (measure, sign) in chance.LOAD_MEASURES.items():
        observed = float(measure(load))
        values = {c: float(measure(torch.tensor(c).double() / 6)) for c in exact}
        p_value = sum(q for c, q in exact.items() if sign * values[c] >= sign * observed - 1e-9)
        assert found[name].p_value == pytest.approx(p_value, abs=0.015), name
        assert found[name].mean == pytest.approx(sum(q * values[c] for c, q in exact.items()), rel=0.02), name


def test_random_routes_look_random_and_skewed_ones_do_not(random_routing):
    even = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
    p_even = chance.load_chance(Routing(even, even.topk(2).indices))["variation"]
    assert p_even.low <= float(routing.load_variation(routing.expert_load(even.topk(2).indices, 8))) <= p_even.high
    assert p_even.p_value > 0.01
    assert chance.load_chance(random_routing(600, 8, 2))["variation"].p_value == pytest.approx(1 / 2001)


# -- intervals ----------------------------------------------------------------------------------------------


def test_values_of_intervals_are_those_of_the_summary(random_routing):
    route = random_routing(90, 5, 2, prompts=7)
    summary = routing.summarize(route)
    for name, estimate in chance.load_intervals(route, draws=200).items():
        assert estimate.value == pytest.approx(getattr(summary, name), rel=1e-6), name
        assert estimate.low <= estimate.value <= estimate.high, name


def test_draws_are_totals_of_whole_prompts(random_routing):
    """Measures of resampled totals equal those of a routing that repeats the drawn prompts token by token."""
    route = random_routing(40, 4, 2, prompts=5)
    totals = chance._totals(route)
    picked = torch.randint(5, (5,), generator=torch.Generator().manual_seed(3))
    parts = [route_of(route, p) for p in picked]
    expected = routing.summarize(routing.concatenate(parts))
    drawn = chance._measures(resampled_means(totals, 3, 1), 4)
    for name, value in drawn.items():
        assert float(value[0]) == pytest.approx(getattr(expected, name), rel=1e-6), name


def route_of(route: Routing, prompt: int) -> Routing:
    rows = route.prompts == prompt
    return Routing(route.probabilities[rows], route.indices[rows])


def test_intervals_cover_the_mean_of_prompts():
    """Prompts differ in their mean; 95 % intervals of 30 prompts should hold the true mean nearly as often."""
    rng = np.random.default_rng(0)
    hits, runs = 0, 200
    for run in range(runs):
        n = 30
        values = torch.tensor(rng.normal(1.0, 1.0, (n, 1)) + rng.normal(0, 0.2, (n, 5)))
        drawn = resampled_means(values.sum(1), run, 400) / 5
        estimate = chance.interval(float(values.mean()), drawn, n)
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= hits / runs <= 0.99


def test_one_prompt_has_no_bounds(random_routing):
    estimate = chance.load_intervals(random_routing(20, 4, 2), draws=50)["margin"]
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_an_interval_holds_its_value():
    """Two prompts that balance each other: nearly every draw is less balanced than both together."""
    load = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]])
    indices = torch.cat([torch.arange(4).repeat_interleave((row * 10).round().long()) for row in load.repeat(3, 1)])
    route = Routing(torch.full((120, 4), 0.25), indices[:, None], prompts=torch.arange(120) // 10)
    for name, estimate in chance.load_intervals(route).items():
        assert estimate.low <= estimate.value <= estimate.high, name
    assert chance.load_intervals(route)["variation"].value == 0


# -- table and mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "slots"), [(1, 1), (4, 4), (5, 2)])
def test_rows_name_every_measure(random_routing, experts, slots):
    rows = chance.load_table({3: random_routing(30, experts, slots, prompts=3)}, draws=100)
    assert [r["measure"] for r in rows] == [
        *chance.LOAD_MEASURES,
        "token_entropy",
        "margin",
        "retained_mass",
        "balance_loss",
    ]
    for r in rows:
        assert r["layer"] == 3
        assert math.isfinite(r["value"]) and math.isfinite(r["chance"]), r
        if experts == slots and r["measure"] in chance.LOAD_MEASURES:
            assert r["value"] == pytest.approx(r["chance"], abs=1e-9)
            assert r["p_value"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 3, 2), "slots=3"), ((5, 0, 2), "slots=0"), ((0, 1, 2), "tokens=0"), ((5, 1, 2, 0), "draws=0")],
    ids=["too many slots", "no slot", "no token", "no draw"],
)
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(InputError, match=message):
        chance.draw_counts(*arguments)

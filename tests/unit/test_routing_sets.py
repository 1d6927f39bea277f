"""Chosen sets against loops over tokens and enumeration of all sets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import InputError
from jambascope.hooks import routing_sets as sets
from jambascope.hooks.routing import Routing, capture_routing


def enumerated(w: list[float], k: int) -> torch.Tensor:
    """P(i and j in S) of sets of k with P(S) ~ prod w, P(i in S) on the diagonal."""
    n, total = len(w), 0.0
    pairs = torch.zeros(n, n, dtype=torch.float64)
    for s in itertools.combinations(range(n), k):
        weight = math.prod(w[e] for e in s)
        total += weight
        for i, j in itertools.product(s, s):
            pairs[i, j] += weight
    return pairs / total


@pytest.mark.parametrize(
    ("w", "k"),
    [
        ([1.0, 1, 1, 1], 2),
        ([0.1, 1, 3, 0.5, 2], 1),
        ([0.1, 1, 3, 0.5, 2], 2),
        ([0.1, 1, 3, 0.5, 2], 4),
        ([0.1, 1, 3], 3),
        ([1e-3, 1, 500, 0.2, 40, 7], 3),
        ([0.0, 1, 2, 3], 2),
        ([1.0], 1),
    ],
    ids=["even", "one slot", "two slots", "all but one", "all", "steep", "one dead", "one expert"],
)
def test_pairs_of_independent_choices_are_as_enumerated(w, k):
    expected = enumerated(w, k)
    found = sets.pair_probabilities(expected.diagonal(), k)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_an_expert_in_every_set():
    """Expert 0 always; of the others, one drawn by weight."""
    rest = enumerated([1.0, 2, 5], 1)
    found = sets.pair_probabilities(torch.tensor([1.0, *rest.diagonal().tolist()], dtype=torch.float64), 2)
    torch.testing.assert_close(found[0], torch.tensor([1.0, *rest.diagonal().tolist()], dtype=torch.float64))
    torch.testing.assert_close(found[1:, 1:], rest)


@pytest.mark.parametrize(("experts", "slots"), [(5, 1), (5, 2), (6, 4), (4, 4), (16, 2), (1, 1)])
def test_coactivation_is_as_counted(random_routing, experts, slots):
    route = random_routing(120, experts, slots)
    found = sets.coactivation(route)
    rows = [set(row) for row in route.indices.tolist()]
    for i, j in itertools.product(range(experts), repeat=2):
        both, one = sum({i, j} <= row for row in rows), sum(i in row for row in rows)
        assert found.counts[i, j] == both
        if i == j:
            assert found.share[i, j].isnan() and found.expected[i, j].isnan()
        elif one:
            assert found.share[i, j].item() == pytest.approx(both / one)
    for of_pairs in (found.share, found.expected):
        used = found.counts.diagonal() > 0
        assert of_pairs.nansum(1)[used].tolist() == pytest.approx([slots - 1] * int(used.sum()))
    assert found.chance == pytest.approx((slots - 1) / (experts - 1), nan_ok=True) if experts > 1 else True


def test_independent_choices_come_out_as_expected():
    """Sets drawn with P(S) ~ prod w; N_j / T, the expectation without a fixed k, would be far off."""
    w = torch.tensor([0.3, 1, 3, 0.5, 2, 1])
    options = list(itertools.combinations(range(6), 2))
    weights = torch.tensor([math.prod(w[e].item() for e in s) for s in options])
    drawn = weights.multinomial(40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor(options)[drawn]
    found = sets.coactivation(Routing(torch.rand(40_000, 6), indices))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (found.share - found.expected)[off].abs().max() < 0.015
    naive = (found.counts.diagonal() / 40_000).expand(6, 6)
    assert (found.share - naive)[off].abs().max() > 0.1


def test_a_pair_that_goes_together_stands_out():
    indices = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3], [0, 2]] * 20)
    found = sets.coactivation(Routing(torch.rand(100, 4), indices))
    assert found.share[1, 0] == 1
    assert found.share[0, 1] == pytest.approx(2 / 3)
    assert found.share[1, 0] > found.expected[1, 0] + 0.3


# -- saturation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 1])
def test_saturation_is_as_counted(random_routing, slots):
    a, b = (random_routing(150, 6, 2, seed, prompts=10) for seed in (1, 2))
    b = Routing(b.probabilities, b.indices, a.token_ids, b.positions, b.prompts)
    found = sets.saturation(a, b, slots)
    k = slots or 2
    overlap = [len(set(x[:k]) & set(y[:k])) / k for x, y in zip(a.indices.tolist(), b.indices.tolist(), strict=True)]
    assert found.overlap.value == pytest.approx(sum(overlap) / 150)
    assert found.overlap.low < found.overlap.value < found.overlap.high
    assert found.chance == k / 6
    # Expected overlap when either's tokens are shuffled: over all pairs of tokens.
    pairs = [len(set(x[:k]) & set(y[:k])) / k for x in a.indices.tolist() for y in b.indices.tolist()]
    assert found.chance_of_loads == pytest.approx(sum(pairs) / len(pairs))


def test_overlap_is_what_saturation_averages(random_routing):
    a, b = (random_routing(90, 6, 3, seed) for seed in (0, 1))
    b = Routing(b.probabilities, b.indices, a.token_ids)
    shared = [len(set(x) & set(y)) / 3 for x, y in zip(a.indices.tolist(), b.indices.tolist(), strict=True)]
    assert sets.overlap(a, b).tolist() == pytest.approx(shared)
    assert float(sets.overlap(a, b).mean()) == pytest.approx(sets.saturation(a, b).overlap.value)
    assert sets.overlap(a, a).eq(1).all()


def test_a_checkpoint_is_saturated_by_itself(random_routing):
    route = random_routing(30, 4, 2, prompts=3)
    assert sets.saturation(route, route).overlap == (1, 1, 1)


def test_two_models_on_the_same_tokens(small_model, small_config, tokens):
    torch.manual_seed(1)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    earlier, final = (capture_routing(m, tokens, mask) for m in (HookedJamba(small_config), small_model))
    rows = sets.saturation_table(earlier, final, draws=100)
    assert [(r["layer"], r["measure"]) for r in rows[:2]] == [
        (1, "saturation"),
        (1, "saturation of the first choice"),
    ]
    for r in rows:
        assert 0 <= r["low"] <= r["value"] <= r["high"] <= 1
        assert 0 < r["chance"] < 1
    with pytest.raises(InputError, match="same tokens"):
        sets.saturation_table(earlier, capture_routing(small_model, tokens), draws=10)


def test_mistakes_are_named(random_routing):
    a, b = random_routing(30, 4, 2), random_routing(30, 4, 2, seed=1)
    with pytest.raises(InputError, match="differ in their token_ids"):
        sets.saturation(a, b)
    with pytest.raises(InputError, match="slots=3"):
        sets.saturation(a, a, slots=3)
    with pytest.raises(InputError, match="tokens, slots, experts"):
        sets.saturation(a, random_routing(30, 5, 2))
    with pytest.raises(InputError, match="checkpoints of one model"):
        sets.saturation_table({1: a}, {3: a})

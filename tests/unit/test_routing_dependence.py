"""Dependence of routes on labels against loops over tokens and against what is known by construction."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from jambascope.errors import InputError
from jambascope.hooks import routing_dependence as dependence
from jambascope.hooks.routing import Routing


def entropy(counter: Counter) -> float:
    total = sum(counter.values())
    return -sum(n / total * math.log(n / total) for n in counter.values())


def counted(route: Routing, labels: torch.Tensor) -> tuple[float, float, float]:
    """Plain I(expert; label), its correction and H(expert), token by token."""
    slots = [(int(x), int(e)) for x, row in zip(labels, route.indices, strict=True) if x >= 0 for e in row]
    experts, joint = Counter(e for _, e in slots), Counter(slots)
    tokens = Counter(int(x) for x in labels if x >= 0)
    k, n = route.experts_per_token, len(slots)
    information = entropy(experts) + entropy(tokens) - entropy(joint)
    expert_bias, label_bias = (len(experts) - k) / (2 * n), (len(tokens) - 1) / (2 * n / k)
    return information, expert_bias + label_bias - (len(joint) - k) / (2 * n), entropy(experts) + expert_bias


@pytest.mark.parametrize(("experts", "slots"), [(5, 1), (5, 2), (6, 4)])
def test_dependence_is_as_counted(random_routing, experts, slots):
    route = random_routing(200, experts, slots, prompts=6)
    labels = route.token_ids.clone()
    labels[::5] = -1
    found = dependence.dependence(route, labels)
    information, correction, of_experts = counted(route, labels)
    assert found.information == pytest.approx(information + correction, abs=1e-12)
    assert found.entropy == pytest.approx(of_experts)
    assert found.fraction.value == pytest.approx((information + correction) / of_experts)
    assert (found.labels, found.tokens) == (7, 160)
    slots_of = Counter(int(e) for x, row in zip(labels, route.indices, strict=True) if x >= 0 for e in row)
    assert found.uncorrected == pytest.approx(information / entropy(slots_of))


def test_one_slot_is_millers_correction(random_routing):
    """(m_token + m_expert - m_joint - 1) / 2n."""
    route = random_routing(60, 4, 1)
    joint = len({(int(x), int(e)) for x, e in zip(route.token_ids, route.indices[:, 0], strict=True)})
    plain = dependence._information(dependence._Labelled.of(route, route.token_ids).table(), 1, corrected=False)[0]
    cells = len(route.token_ids.unique()) + len(route.indices.unique()) - joint - 1
    assert dependence.token_dependence(route).information == pytest.approx(plain + cells / 120)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_correction_removes_the_bias_of_independent_tokens(slots):
    """6 experts, 8 labels, 600 tokens that choose at random: I is 0, and plain frequencies say more."""
    generator = torch.Generator().manual_seed(0)
    plain, corrected, standard = [], [], []
    for _ in range(300):
        scores = torch.rand(600, 6, generator=generator)
        route = Routing(scores, scores.topk(slots).indices)
        labels = torch.randint(8, (600,), generator=generator)
        table = dependence._Labelled.of(route, labels).table()
        plain.append(dependence._information(table, slots, corrected=False)[0])
        corrected.append(dependence._information(table, slots)[0])
        standard.append(plain[-1] - 7 * 5 / (2 * 600 * slots))  # as though slots were independent
    mean = [float(torch.tensor(x).double().mean()) for x in (plain, corrected, standard)]
    assert abs(mean[1]) < 0.05 * mean[0]
    if slots > 1:
        assert abs(mean[1]) < 0.3 * abs(mean[2])


@pytest.mark.parametrize("slots", [1, 2])
def test_a_label_that_fixes_the_experts(slots):
    labels = torch.arange(400) % 3
    indices = labels[:, None] * 2 + torch.arange(slots)
    found = dependence.dependence(Routing(torch.rand(400, 6), indices, prompts=torch.arange(400) // 20), labels)
    used = 3 * slots
    assert found.uncorrected == pytest.approx(1 - math.log(slots) / math.log(used), abs=1e-4)
    assert found.fraction.value == pytest.approx(found.uncorrected, abs=0.01)
    assert found.fraction.low > found.shuffled.high
    assert found.shuffled.p_value == pytest.approx(1 / 21)
    assert abs(found.shuffled.mean) < 0.01


def test_independent_tokens_tell_nothing(random_routing):
    found = dependence.token_dependence(random_routing(3000, 5, 2, prompts=40))
    assert found.fraction.low < 0 < found.fraction.high
    assert found.shuffled.low - 0.002 <= found.fraction.value <= found.shuffled.high + 0.002
    assert found.uncorrected > found.fraction.value


@pytest.mark.parametrize("experts", [1, 4])
def test_nothing_to_choose(random_routing, experts):
    found = dependence.token_dependence(random_routing(50, experts, experts, prompts=3))
    if experts == 1:
        assert math.isnan(found.fraction.value) and math.isnan(found.shuffled.mean)
    else:
        assert found.fraction.value == pytest.approx(0, abs=1e-12)
    assert found.information == pytest.approx(0, abs=1e-12)


def test_the_jackknife_leaves_out_groups_of_prompts(random_routing):
    route = random_routing(120, 4, 2, prompts=6)
    found = dependence.token_dependence(route).fraction
    left = []
    for prompt in range(6):
        rows = route.prompts != prompt
        part = Routing(route.probabilities[rows], route.indices[rows], route.token_ids[rows])
        left.append(dependence.token_dependence(part).fraction.value)
    mean = sum(left) / 6
    half = 2.571 * math.sqrt(5 / 6 * sum((x - mean) ** 2 for x in left))  # t with 5 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_prompts_are_shuffled_whole():
    """Prompts have experts of their own, domains have none: only shuffling whole prompts sees that they say nothing."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(400) // 20
    indices = torch.randint(5, (20, 1), generator=generator)[prompts]
    route = Routing(torch.rand(400, 5), indices, prompts=prompts)
    by_prompt = dependence.dependence(route, prompts % 4, unit="prompts")
    by_token = dependence.dependence(route, prompts % 4)
    assert by_prompt.fraction == by_token.fraction
    assert by_prompt.shuffled.p_value > 0.05 > by_token.shuffled.p_value
    with pytest.raises(InputError, match="one label per prompt"):
        dependence.dependence(route, torch.arange(400) % 2, unit="prompts")


# -- labels -------------------------------------------------------------------------------------------------


def test_bins_double():
    assert dependence.position_bins(torch.arange(9)).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    positions = torch.tensor([1023, 1024, 262_143, 262_144])
    assert dependence.position_bins(positions).tolist() == [10, 11, 18, 19]


def test_position_dependence_is_that_of_bins(random_routing):
    route = random_routing(100, 4, 2, prompts=4)
    bins = torch.tensor([0 if p == 0 else int(math.log2(p)) + 1 for p in route.positions.tolist()])
    assert dependence.position_dependence(route) == dependence.dependence(route, bins)


def test_next_tokens_stay_in_their_prompt():
    ids, prompts = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 0, 1, 2, 2])
    route = Routing(torch.ones(5, 1), torch.zeros(5, 1).long(), ids, torch.tensor([0, 1, 0, 0, 1]), prompts)
    assert dependence.next_token_ids(route).tolist() == [6, -1, -1, 9, -1]


# -- specialisation -----------------------------------------------------------------------------------------


def test_domain_shares_are_as_counted(random_routing):
    route = random_routing(150, 5, 2, prompts=10)
    labels = torch.tensor([3, 9, -1])[route.prompts % 3]
    found = dependence.domain_specialization(route, labels)
    assert found.labels.tolist() == [3, 9]
    for i, label in enumerate((3, 9)):
        rows = [set(row) for row, x in zip(route.indices.tolist(), labels.tolist(), strict=True) if x == label]
        assert found.tokens[i] == len(rows)
        expected = [sum(e in row for row in rows) / len(rows) for e in range(5)]
        assert found.share[i].tolist() == pytest.approx(expected)
    assert found.share.sum(1).tolist() == pytest.approx([2, 2])
    assert ((found.low <= found.share) & (found.share <= found.high)).all()
    weights = found.tokens / found.tokens.sum()
    torch.testing.assert_close(found.overall, (weights[:, None] * found.share).sum(0), check_dtype=False)
    assert found.chance == 2 / 5


def test_a_domain_of_one_prompt_has_no_bounds(random_routing):
    route = random_routing(60, 4, 1, prompts=3)
    found = dependence.domain_specialization(route, torch.tensor([0, 0, 1])[route.prompts])
    assert (found.low[1] == -math.inf).all() and (found.high[1] == math.inf).all()
    assert (found.low[0] < found.high[0]).any() and found.low[0].isfinite().all()


def test_a_jackknife_that_leaves_nothing_to_choose_has_no_bounds():
    """Each of two prompts has one expert: without one of them there is no choice."""
    route = Routing(torch.rand(8, 2), (torch.arange(8) // 4)[:, None], prompts=torch.arange(8) // 4)
    found = dependence.dependence(route, torch.arange(8) % 2).fraction
    assert math.isfinite(found.value) and (found.low, found.high) == (-math.inf, math.inf)


def test_vocabulary_shares_are_as_counted(random_routing):
    route = random_routing(150, 5, 2, prompts=10, vocabulary=20)
    found = dependence.vocabulary_specialization(route, least=8)
    counts = Counter(route.token_ids.tolist())
    often = sorted(x for x, n in counts.items() if n >= 8)
    assert 0 < len(often) < len(counts)
    assert found.labels.tolist() == often
    tops = []
    for i, x in enumerate(often):
        chosen = Counter(
            e for y, row in zip(route.token_ids.tolist(), route.indices.tolist(), strict=True) if y == x for e in row
        )
        assert found.share[i].tolist() == pytest.approx([chosen[e] / counts[x] for e in range(5)])
        tops.append(max(chosen.values()) / counts[x])
    assert found.top.value == pytest.approx(sum(tops) / len(tops))
    assert found.shuffled.mean > found.chance
    assert found.shuffled.low <= found.top.value <= found.shuffled.high or found.shuffled.p_value > 0.05


def test_specialists_are_found():
    ids = torch.arange(600) % 6
    route = Routing(torch.rand(600, 8), torch.stack([ids, 7 - ids // 5], 1), ids, prompts=torch.arange(600) // 50)
    found = dependence.vocabulary_specialization(route)
    assert found.top.value == 1
    assert found.shuffled.p_value == pytest.approx(1 / 21)


def test_top_items_are_those_whose_tokens_choose_an_expert_most():
    """Token 0 always takes experts 0 and 1; token 1, rarer, too; token 2 takes 1 and 2."""
    ids = torch.tensor([0] * 6 + [1] * 3 + [2] * 4)
    route = Routing(torch.rand(13, 3), torch.where(ids[:, None] < 2, torch.tensor([0, 1]), torch.tensor([1, 2])), ids)
    found = dependence.vocabulary_specialization(route, least=2)
    assert dependence.top_items(found, 2).tolist() == [[0, 1], [0, 2], [2, 0]]
    assert dependence.top_items(found, 9).shape == (3, 3)


# -- table and mistakes -------------------------------------------------------------------------------------


def test_rows_hold_what_the_functions_return(random_routing):
    route = random_routing(80, 4, 2, prompts=5)
    rows = dependence.dependence_table({1: route}, {"domain": route.prompts % 2}, shuffles=5)
    assert [r["measure"] for r in rows] == ["token dependence", "position dependence", "domain dependence"]
    expected = dependence.token_dependence(route, shuffles=5)
    assert (rows[0]["value"], rows[0]["chance"]) == (expected.fraction.value, expected.shuffled.mean)


def test_mistakes_are_named(random_routing):
    route = random_routing(10, 4, 2)
    nameless = Routing(route.probabilities, route.indices)
    for call, message in (
        (lambda: dependence.token_dependence(nameless), "token_ids"),
        (lambda: dependence.vocabulary_specialization(nameless), "token_ids"),
        (lambda: dependence.dependence(route, torch.zeros(9).long()), "labels are"),
        (lambda: dependence.dependence(route, torch.zeros(10)), "whole number"),
        (lambda: dependence.dependence(route, torch.full((10,), -1)), "every label is negative"),
        (lambda: dependence.dependence(route, route.token_ids, shuffles=0), "shuffles=0"),
        (lambda: dependence.dependence(route, route.token_ids, unit="rows"), "unit='rows'"),
        (lambda: dependence.vocabulary_specialization(route, least=11), "least=11"),
    ):
        with pytest.raises(InputError, match=message):
            call()

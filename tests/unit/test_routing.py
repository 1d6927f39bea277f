"""Routing measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.hooks import routing


def test_load_and_balance_of_a_hand_counted_route():
    # 4 tokens, top-2 of 4 experts: expert 0 three times, 1 twice, 2 three times, 3 never.
    indices = torch.tensor([[0, 1], [0, 2], [2, 0], [1, 2]])
    load = routing.expert_load(indices, 4)
    torch.testing.assert_close(load, torch.tensor([3, 2, 3, 0]) / 8)
    assert routing.max_violation(load) == pytest.approx(3 / 8 * 4 - 1)
    deviation = math.sqrt((2 * 0.125**2 + 0 + 0.25**2) / 4)
    assert routing.load_variation(load) == pytest.approx(deviation / 0.25)
    by_hand = -(2 * 3 / 8 * math.log(3 / 8) + 2 / 8 * math.log(2 / 8)) / math.log(4)
    assert routing.load_entropy(load) == pytest.approx(by_hand)
    assert routing.dead_experts(load) == 1


@pytest.mark.parametrize(
    ("load", "variation", "violation", "entropy", "dead"),
    [([0.25] * 4, 0.0, 0.0, 1.0, 0), ([1.0, 0, 0, 0], math.sqrt(3), 3.0, 0.0, 3), ([1.0], 0.0, 0.0, 1.0, 0)],
    ids=["balanced", "one takes all", "single expert"],
)
def test_extremes_of_load(load, variation, violation, entropy, dead):
    load = torch.tensor(load)
    assert routing.load_variation(load) == pytest.approx(variation)
    assert routing.max_violation(load) == pytest.approx(violation)
    assert routing.load_entropy(load) == pytest.approx(entropy)
    assert routing.dead_experts(load) == dead


def test_certainty_of_tokens():
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    indices = torch.tensor([[0, 1], [0, 2]])
    expected = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    torch.testing.assert_close(routing.token_entropy(p), torch.tensor([expected, 0.0]))
    torch.testing.assert_close(routing.margin(p), torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(routing.retained_mass(p, indices), torch.tensor([0.8, 1.0]))
    kept = routing.kept_weights(routing.Routing(p, indices))
    torch.testing.assert_close(kept, torch.tensor([[0.5, 0.3, 0.0], [1.0, 0.0, 0.0]]))


def test_one_token_one_expert():
    summary = routing.summarize(routing.Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)))
    assert summary.load.tolist() == [1.0]
    assert (summary.margin, summary.retained_mass, summary.token_entropy) == (1.0, 1.0, 0.0)
    assert (summary.load_entropy, summary.max_violation, summary.dead_experts) == (1.0, 0.0, 0)


def test_capture_holds_what_the_model_computed():
    torch.manual_seed(0)
    config = JambaConfig.jamba(n_layers=4, d_model=16, d_vocab=20, n_heads=2, d_head=8, d_mlp=8, num_experts=4)
    model = HookedJamba(config)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    captured = routing.capture_routing(model, tokens)
    assert list(captured) == [1, 3]
    for route in captured.values():
        assert route.probabilities.shape == (5, 4)
        assert route.indices.shape == (5, 2)
        torch.testing.assert_close(route.probabilities.sum(-1), torch.ones(5))
        torch.testing.assert_close(route.indices, route.probabilities.topk(2).indices)
        assert (routing.kept_weights(route) > 0).sum() == 10


def test_a_dense_model_has_no_routing():
    config = JambaConfig.jamba(n_layers=2, d_model=16, d_vocab=20, n_heads=2, d_head=8, d_mlp=8, num_experts=1)
    assert routing.capture_routing(HookedJamba(config), torch.tensor([[1, 2]])) == {}

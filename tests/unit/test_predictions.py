"""Next-token tables and their entropy against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.hooks import predictions


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    """Without a tokenizer, so that the text of a token is its id."""
    torch.manual_seed(0)
    return HookedJamba(JambaConfig.jamba(n_layers=1, d_model=8, d_vocab=4, d_mlp=8, num_experts=1))


def test_table_is_sorted_and_normalised(model):
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3])) + 5
    rows = predictions.next_tokens(model, logits, k=3)
    assert [(r.rank, r.token_id, r.text) for r in rows] == [(0, 1, "1"), (1, 3, "3"), (2, 2, "2")]
    assert [r.probability for r in rows] == pytest.approx([0.4, 0.3, 0.2])
    assert rows[0].logit == pytest.approx(math.log(0.4) + 5)


def test_table_of_one_and_of_more_than_there_are(model):
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    assert [r.token_id for r in predictions.next_tokens(model, logits, k=1)] == [2]
    assert len(predictions.next_tokens(model, logits, k=100)) == 4


def test_refuses_no_rows_and_several_positions(model):
    with pytest.raises(InputError, match="k=0"):
        predictions.next_tokens(model, torch.zeros(4), k=0)
    with pytest.raises(InputError, match="one position"):
        predictions.next_tokens(model, torch.zeros(2, 4))


def test_rank_counts_the_likelier():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    assert [predictions.rank_of(logits, i) for i in range(4)] == [3, 2, 0, 1]


def test_entropy_in_nats():
    certain = torch.tensor([0.0, float("-inf"), float("-inf"), float("-inf")])
    halves = torch.tensor([0.0, 0.0, float("-inf"), float("-inf")])
    got = predictions.entropy(torch.stack([torch.zeros(4), certain, halves]))
    torch.testing.assert_close(got, torch.tensor([math.log(4), 0.0, math.log(2)]))


def test_surprisal_is_the_models_loss(model):
    tokens = torch.tensor([[3, 1, 2, 0, 0]])
    with torch.no_grad():
        logits, losses = model(tokens, return_type="both", loss_per_token=True)
    torch.testing.assert_close(predictions.surprisal(logits[0], tokens[0]), losses[0])


def test_a_single_token_surprises_nobody(model):
    with torch.no_grad():
        logits = model(torch.tensor([[3]]))
    assert predictions.surprisal(logits[0], torch.tensor([3])).shape == (0,)


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    got = predictions.divergence(torch.stack([p, q]).log(), torch.stack([q, q]).log() + 3)
    torch.testing.assert_close(got, torch.tensor([0.5 * math.log(2), 0.0], dtype=torch.float64), atol=1e-7, rtol=0)
    assert predictions.divergence(q.log(), p.log()) == math.inf


def test_changed_tokens_are_the_likeliest_of_either_run(model):
    before, after = torch.tensor([0.6, 0.3, 0.1, 1e-9]), torch.tensor([0.1, 1e-9, 0.3, 0.6])
    found = predictions.changed_tokens(model, before.log(), after.log(), k=1)
    assert [(c.token_id, c.text) for c in found] == [(0, "0"), (3, "3")]
    assert [c.before for c in found] == pytest.approx([0.6, 0], abs=1e-6)
    assert [c.after for c in found] == pytest.approx([0.1, 0.6])

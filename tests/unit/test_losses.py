"""The parts of a training loss, from what the hooks show."""

from __future__ import annotations

import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.losses import load_balancing_loss


def test_the_activation_loss_is_the_mean_square_of_what_layers_add(small_model, tokens):
    _, cache = small_model.run_with_cache(tokens)
    outs = [v for n, v in cache.items() if n.endswith(("hook_attn_out", "hook_mixer_out", "hook_mlp_out"))]
    assert len(outs) == 8
    expected = torch.stack([out.square().mean() for out in outs]).mean()
    torch.testing.assert_close(small_model.loss_terms(tokens).activation, expected)


def test_the_total_weighs_its_parts_by_the_configuration(small_config, tokens):
    config = JambaConfig(**small_config.to_dict() | dict(load_balancing_coef=0.5, activation_coef=0.25))
    model = HookedJamba(config)
    terms = model.loss_terms(tokens)
    torch.testing.assert_close(terms.lm, model(tokens, return_type="loss"))
    torch.testing.assert_close(terms.total, terms.lm + 0.5 * terms.load_balancing + 0.25 * terms.activation)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for n, p in model.named_parameters() if "router" in n)


def test_padding_is_in_no_part_of_the_loss(small_model, tokens):
    padded = torch.cat([tokens, torch.zeros(2, 9, dtype=torch.long)], dim=1)
    mask = (torch.arange(20) < 11).int().expand(2, 20)
    for part, expected in zip(small_model.loss_terms(padded, mask), small_model.loss_terms(tokens), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)


def test_no_experts_no_balancing(tokens):
    model = HookedJamba(JambaConfig.jamba(n_layers=2, d_model=16, d_vocab=61, d_mlp=8, num_experts=1))
    assert model.loss_terms(tokens).load_balancing == 0


@pytest.mark.parametrize(("slots", "expected"), [(1, 1.0), (2, 2.0), (4, 4.0)])
def test_balancing_is_the_number_of_slots_when_uniform(slots, expected):
    """Each token prefers other experts, all in turn, with nearly even probabilities."""
    tokens = torch.arange(8)
    logits = torch.zeros(1, 8, 4)
    for slot in range(slots):
        logits[0, tokens, (tokens + slot) % 4] = 1e-4 * (slots - slot)
    assert math.isclose(load_balancing_loss([logits], slots).item(), expected, rel_tol=1e-3)


def test_balancing_is_largest_when_one_expert_takes_all():
    logits = torch.zeros(2, 5, 4)
    logits[..., 2] = 50
    assert math.isclose(load_balancing_loss([logits, logits], 1).item(), 4.0, rel_tol=1e-5)


def test_padding_does_not_count():
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    changed = logits.clone()
    changed[~mask] = 9.0
    assert load_balancing_loss([logits], 2, mask) == load_balancing_loss([changed], 2, mask)


def test_confident_models_have_the_loss_of_their_confidence():
    """Cross-entropy in nats of known logits."""
    model = HookedJamba(JambaConfig.jamba(n_layers=1, d_model=16, d_vocab=5, d_mlp=8, num_experts=1))

    def fixed(logits, hook):
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0]).expand_as(logits)

    with model.hooks([("hook_logits", fixed)]):
        loss = model(torch.tensor([[4, 4, 1]]), return_type="loss", loss_per_token=True)
    z = math.log(4 + math.exp(3))
    torch.testing.assert_close(loss, torch.tensor([[z - 3, z]]))

"""A long sequence that nobody listens to goes through each layer in pieces, and nothing shows it."""

from __future__ import annotations

import pytest
import torch

from jambascope import model as model_module
from jambascope.config import JambaConfig
from jambascope.model import HookedJamba

MIXERS = {
    "jamba": ("mamba", "attention", "mamba"),
    "mamba": ("mamba",) * 3,
    "attention": ("attention",) * 3,
    "mamba2": ("mamba2", "mamba", "attention"),
}


def make(kind: str) -> HookedJamba:
    sizes = dict(d_model=32, d_inner=64, d_state=4, dt_rank=4, d_mlp=48, d_vocab=50, d_conv=4, mamba_d_head=16)
    heads = dict(n_heads=2, n_key_value_heads=1, d_head=16, num_experts=4, experts_per_token=2)
    torch.manual_seed(0)
    model = HookedJamba(JambaConfig(**sizes, **heads, mixers=MIXERS[kind], feed_forwards=("dense", "moe", "none")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_pieces_equal_one_pass(kind, with_state, padded, tokens, monkeypatch):
    model = make(kind)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :11] = 0
        mask[1, 30:] = 0
    results = []
    for size in (10**6, 14):
        monkeypatch.setattr(model_module, "PIECE_TOKENS", size)
        state = model.new_state(2) if with_state else None
        logits = [model(tokens, attention_mask=mask, state=state)]
        if with_state:
            logits.append(model(tokens[:, :20], state=state))
        results.append(logits)
    for whole, pieces in zip(*results, strict=True):
        seen = torch.ones_like(whole[..., 0], dtype=torch.bool)
        if padded and whole.shape[1] == 37:
            seen = mask.bool()
        torch.testing.assert_close(pieces[seen], whole[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heard", ["blocks.0.hook_resid_post", "hook_logits"])
@torch.no_grad()
def test_who_listens_gets_everything(heard, tokens, monkeypatch):
    model = make("jamba")
    expected = model.run_with_cache(tokens, names_filter=heard)[1][heard]
    monkeypatch.setattr(model_module, "PIECE_TOKENS", 14)
    cached = model.run_with_cache(tokens, names_filter=heard, return_type=None)[1][heard]
    torch.testing.assert_close(cached, expected)


def test_gradients_are_as_ever(tokens, monkeypatch):
    model = make("jamba")
    monkeypatch.setattr(model_module, "PIECE_TOKENS", 14)
    model(tokens, return_type="loss").backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_embeddings_that_are_somebodys_are_left_alone(tokens, monkeypatch):
    model = make("jamba")
    monkeypatch.setattr(model_module, "PIECE_TOKENS", 14)
    fixed = model.embed(tokens)
    model.embed.forward = lambda _: fixed
    before = fixed.clone()
    model(tokens)
    assert torch.equal(fixed, before)

"""Logits, loss and every gradient against transformers in float64, at awkward sizes."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest
import torch

from jambascope import HookedJamba

HYBRID = dict(num_hidden_layers=5, attn_layer_period=4, attn_layer_offset=2)
CASES = {
    "hybrid": ("jamba", HYBRID, (2, 33)),
    "nine-layers": ("jamba", dict(num_hidden_layers=9), (2, 17)),
    "one-mamba-layer": ("jamba", dict(num_hidden_layers=1), (3, 7)),
    "one-attention-layer": ("jamba", dict(num_hidden_layers=1, attn_layer_period=1, attn_layer_offset=0), (3, 7)),
    "every-layer-attention": ("jamba", dict(num_hidden_layers=3, attn_layer_period=1, attn_layer_offset=0), (2, 19)),
    "no-attention": ("jamba", dict(num_hidden_layers=4, attn_layer_period=5, attn_layer_offset=4), (2, 19)),
    "one-token": ("jamba", HYBRID, (1, 1)),
    "two-tokens": ("jamba", HYBRID, (2, 2)),
    "long-odd": ("jamba", HYBRID, (1, 97)),
    # The norm of a single number is its sign: with the usual epsilon, rounding near zero would decide the gradients.
    "d_state-1": ("jamba", HYBRID | dict(mamba_d_state=1, rms_norm_eps=0.01), (2, 21)),
    "d_state-5": ("jamba", HYBRID | dict(mamba_d_state=5), (2, 21)),
    "channels-not-a-multiple-of-16": ("jamba", HYBRID | dict(hidden_size=36, num_key_value_heads=1), (2, 21)),
    "conv-2": ("jamba", HYBRID | dict(mamba_d_conv=2), (2, 21)),
    "multi-query": ("jamba", HYBRID | dict(num_key_value_heads=1), (2, 21)),
    "multi-head": ("jamba", HYBRID | dict(num_key_value_heads=4), (2, 21)),
    "top-1": ("jamba", HYBRID | dict(num_experts_per_tok=1), (2, 21)),
    "top-3": ("jamba", HYBRID | dict(num_experts_per_tok=3), (2, 21)),
    "top-all": ("jamba", HYBRID | dict(num_experts=3, num_experts_per_tok=3), (2, 21)),
    "dense": ("jamba", HYBRID | dict(num_experts=1), (2, 21)),
    "every-layer-moe": ("jamba", HYBRID | dict(expert_layer_period=1, expert_layer_offset=0), (2, 21)),
    "tied": ("jamba", HYBRID | dict(tie_word_embeddings=True), (2, 21)),
    "projection-bias": ("jamba", HYBRID | dict(mamba_proj_bias=True), (2, 21)),
    "no-conv-bias": ("jamba", HYBRID | dict(mamba_conv_bias=False), (2, 21)),
    "mamba": ("mamba", dict(num_hidden_layers=3), (2, 33)),
    "mamba-untied": ("mamba", dict(num_hidden_layers=2, tie_word_embeddings=False, use_bias=True), (2, 9)),
    "mamba-d_state-5-one-token": ("mamba", dict(num_hidden_layers=2, state_size=5), (1, 1)),
    "wide-initialisation": ("jamba", HYBRID | dict(std=0.25), (2, 33)),
}


def draws(length: int) -> int:
    """Short sequences average less within a draw, so they get more draws."""
    return 15 if length > 8 else 31


def results(model, tokens) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients by name (a sum of squares stands in for the loss of a single token)."""
    model.zero_grad()
    has_loss = tokens.shape[1] > 1
    if isinstance(model, HookedJamba):
        logits, loss = model(tokens, return_type="both") if has_loss else (model(tokens), None)
        loss = loss if has_loss else logits.square().sum()
    else:
        out = model(tokens, labels=tokens if has_loss else None, use_cache=False)
        logits, loss = out.logits, out.loss if has_loss else out.logits.square().sum()
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach()}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, make_trio, random_tokens, no_worse, relative_error):
    kind, fields, shape = CASES[case]
    trio = make_trio(kind, **fields)
    ours_errors, yardstick_errors = defaultdict(list), defaultdict(list)
    for draw in range(draws(shape[1])):
        tokens = random_tokens(*shape, seed=draw)
        truth, yardstick, ours = (results(m, tokens) for m in (trio.truth, trio.yardstick, trio.ours))
        truth |= {n: p.grad for n, p in trio.truth.named_parameters()}
        yardstick |= {n: p.grad for n, p in trio.yardstick.named_parameters()}
        ours |= trio.parameters_by_hf_name("grad")
        assert set(ours) == set(truth)
        for name, expected in truth.items():
            if expected.norm() == 0:  # a decay that only ever met a state of zero
                assert ours[name].norm() == 0, name
            else:
                ours_errors[name].append(relative_error(ours[name], expected))
                yardstick_errors[name].append(relative_error(yardstick[name], expected))
    no_worse(ours_errors, yardstick_errors)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_load_balancing_loss(padding, make_trio, random_tokens):
    trio = make_trio("jamba", num_hidden_layers=4, num_experts=4, num_experts_per_tok=2)
    tokens = random_tokens(3, 13)
    mask = torch.ones_like(tokens)
    if padding:
        mask[1, slice(0, 4) if padding == "left" else slice(9, 13)] = 0
    expected = trio.truth(tokens, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    terms = trio.ours.loss_terms(tokens, attention_mask=mask)
    # transformers' router of a padded row sees other values at the padding, which its mask leaves out, as does ours.
    torch.testing.assert_close(terms.load_balancing.double(), expected.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.total, terms.lm + trio.ours.config.load_balancing_coef * terms.load_balancing)


def test_float64_ours_is_float64(make_trio, random_tokens, relative_error):
    """Our own float64 agrees with transformers' to what its float32 norms allow."""
    trio = make_trio("jamba", num_hidden_layers=3)
    tokens = random_tokens(2, 15)
    ours = trio.ours.double()(tokens)
    assert ours.dtype == torch.float64
    assert relative_error(ours, trio.truth(tokens, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse(dtype, make_trio, random_tokens, relative_error):
    trio = make_trio("jamba", std=0.1, num_hidden_layers=3)
    theirs, ours = trio.yardstick.to(dtype), trio.ours.to(dtype)
    errors = {"ours": [], "theirs": []}
    for draw in range(9):
        tokens = random_tokens(2, 15, seed=draw)
        truth = trio.truth(tokens, use_cache=False).logits
        logits = ours(tokens)
        assert logits.dtype == dtype
        errors["ours"].append(relative_error(logits, truth))
        errors["theirs"].append(relative_error(theirs(tokens, use_cache=False).logits, truth))
    assert median(errors["ours"]) <= 2 * median(errors["theirs"])

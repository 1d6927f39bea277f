"""Padding, generation with memory and prefill in pieces: all equal one plain pass over each sequence."""

from __future__ import annotations

import pytest
import torch
import transformers

from jambascope import HookedJamba, JambaConfig
from jambascope.model import initialize

FAMILIES = {
    "hybrid": ("jamba", dict(num_hidden_layers=5, attn_layer_period=4, attn_layer_offset=2)),
    "attention": ("jamba", dict(num_hidden_layers=2, attn_layer_period=1, attn_layer_offset=0)),
    "projection-bias": ("jamba", dict(num_hidden_layers=3, mamba_proj_bias=True)),
    "mamba": ("mamba", dict(num_hidden_layers=3)),
    "mamba2": ("mamba2", dict(num_hidden_layers=3)),
}


OURS = {"rotary": dict(rotary=True), "mamba2-hybrid": dict(mixer="mamba2", mamba_d_head=8, mamba_n_groups=2)}


@pytest.fixture(scope="module", params=[*FAMILIES, *OURS])
def model(request, make_trio):
    if request.param not in OURS:
        kind, fields = FAMILIES[request.param]
        return make_trio(kind, **fields).ours
    config = JambaConfig.jamba(
        n_layers=3, d_model=32, d_vocab=61, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=40, num_experts=4,
        attn_layer_period=2, attn_layer_offset=1, **OURS[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedJamba(config)
    initialize(model, std=0.2)
    return model


def close(a, b):
    """Equal but for float32 rounding, which these wide weights amplify."""
    assert a.shape == b.shape
    assert (a - b).norm() <= 1e-4 * b.norm().clamp_min(1e-30), f"relative error {(a - b).norm() / b.norm():.1e}"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_unpadded_rows(side, model, random_tokens):
    lengths = [13, 1, 8, 3]
    tokens, mask = random_tokens(4, 13), torch.zeros(4, 13, dtype=torch.long)
    spans = [slice(0, n) if side == "right" else slice(13 - n, 13) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    logits, losses = model(tokens, attention_mask=mask, return_type="both", loss_per_token=True)
    total, count = 0.0, 0
    for row, span in enumerate(spans):
        alone = tokens[row : row + 1, span]
        close(logits[row, span], model(alone)[0])
        if alone.shape[1] > 1:
            per_token = model(alone, return_type="loss", loss_per_token=True)
            total, count = total + per_token.sum(), count + per_token.numel()
    close(model(tokens, attention_mask=mask, return_type="loss"), total / count)
    assert losses.shape == (4, 12)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_then_more_tokens(side, model, random_tokens):
    """A memory filled from a padded batch continues like each row's own."""
    lengths = [9, 1, 2, 6]
    tokens, more = random_tokens(4, 9), random_tokens(4, 5, seed=2)
    mask = torch.zeros(4, 9, dtype=torch.long)
    spans = [slice(0, n) if side == "right" else slice(9 - n, 9) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    state = model.new_state(4)
    model(tokens, attention_mask=mask, state=state)
    continued = torch.cat([model(more[:, :2], state=state), model(more[:, 2:], state=state)], dim=1)
    for row, span in enumerate(spans):
        whole = model(torch.cat([tokens[row, span], more[row]])[None])
        close(continued[row], whole[0, -5:])


@torch.no_grad()
def test_padding_anywhere_in_a_later_call(model, random_tokens):
    """A second turn of ragged lengths, padded on the left, on both sides and inside."""
    first, second = random_tokens(4, 5), random_tokens(4, 6, seed=2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1]])
    third = random_tokens(4, 2, seed=3)
    state = model.new_state(4)
    model(first, state=state)
    out = model(second, attention_mask=mask, state=state)
    after = model(third, state=state)
    for row in range(4):
        kept = mask[row].bool()
        whole = model(torch.cat([first[row], second[row, kept], third[row]])[None])[0]
        close(out[row, kept], whole[5 : 5 + kept.sum()])
        close(after[row], whole[-2:])


@torch.no_grad()
def test_each_generated_token_has_the_logits_of_the_whole_sequence(model, random_tokens):
    seen = []
    with model.hooks([("hook_logits", lambda value, hook: seen.append(value[:, -1].clone()))]):
        out = model.generate(random_tokens(2, 5), 64, stop_tokens=())
    assert out.shape == (2, 69) and len(seen) == 64
    whole = model(out)
    for step, logits in enumerate(seen):
        close(logits, whole[:, 4 + step])
        assert torch.equal(out[:, 5 + step], logits.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [31], [1, 2, 3, 4, 5], [3, 4, 17], [10, 20, 30], list(range(1, 32))], ids=str)
def test_prefill_cut_anywhere_equals_one_pass(cuts, model, random_tokens):
    tokens = random_tokens(2, 32)
    state = model.new_state(2)
    parts = [model(part, state=state) for part in tokens.tensor_split(cuts, dim=1)]
    close(torch.cat(parts, dim=1), model(tokens))
    assert state.length == 32


def test_gradients_flow_through_a_cut(model, random_tokens):
    tokens = random_tokens(2, 12)
    whole = model(tokens).square().sum()
    expected = torch.autograd.grad(whole, list(model.parameters()))
    state = model.new_state(2)
    parts = sum(model(part, state=state).square().sum() for part in tokens.tensor_split([5, 6], dim=1))
    for a, b in zip(torch.autograd.grad(parts, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def test_fork_rows_and_restore(model, random_tokens):
    tokens, a, b = random_tokens(3, 7), random_tokens(3, 2, seed=5), random_tokens(3, 2, seed=6)
    state = model.new_state(3)
    model(tokens, state=state)
    snapshot = state.fork()
    model(a, state=state)
    state.restore(snapshot)
    close(model(b, state=state), model(torch.cat([tokens, b], dim=1))[:, -2:])
    picked = snapshot.rows([2, 0, 2])
    close(model(a[:3], state=picked), model(torch.cat([tokens[[2, 0, 2]], a], dim=1))[:, -2:])
    assert snapshot.length == 7 and picked.length == 9


@torch.no_grad()
def test_generate_left_and_right_padding_agree_with_single_rows(model, random_tokens):
    tokens = random_tokens(3, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    out = model.generate(tokens, 8, attention_mask=mask, stop_tokens=())
    for row in range(3):
        alone = model.generate(tokens[row, mask[row].bool()], 8, stop_tokens=())
        assert torch.equal(out[row, -8:], alone[0, -8:])


@torch.no_grad()
def test_cached_continuation_where_transformers_drops_the_state(make_trio, random_tokens):
    """transformers 5.23 forgets the SSM state when a cached sequence continues with several tokens; we do not."""
    trio = make_trio("jamba", **FAMILIES["hybrid"][1])
    tokens = random_tokens(1, 12)
    whole = trio.truth(tokens, use_cache=False).logits[:, 8:]
    state = trio.ours.new_state(1)
    trio.ours(tokens[:, :8], state=state)
    close(trio.ours(tokens[:, 8:], state=state).double(), whole)
    cache = transformers.DynamicCache(config=trio.truth.config)
    trio.truth(tokens[:, :8], past_key_values=cache, use_cache=True)
    theirs = trio.truth(tokens[:, 8:], past_key_values=cache, use_cache=True).logits
    assert (theirs - whole).norm() > 0.01 * whole.norm(), "transformers now keeps the state: this exception can go"

"""Mamba-2 against transformers' Mamba2ForCausalLM: logits, loss, every gradient, continuation from a cache, padding.

transformers rounds to float32 inside its scan and norms, also in a float64 model. Where its own float64 is the truth,
it runs with that rounding switched off.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest
import torch
import transformers

from jambascope import HookedJamba

CASES = {
    "three-layers": (dict(num_hidden_layers=3), (2, 33)),
    "one-token": (dict(num_hidden_layers=2), (1, 1)),
    "two-tokens": (dict(num_hidden_layers=2), (2, 2)),
    "long-odd": (dict(num_hidden_layers=2), (1, 97)),
    "one-group": (dict(num_hidden_layers=2, n_groups=1), (2, 21)),
    "group-per-head": (dict(num_hidden_layers=2, n_groups=8), (2, 21)),
    "one-head": (dict(num_hidden_layers=2, num_heads=1, head_dim=64, n_groups=1), (2, 21)),
    "d_head-1": (dict(num_hidden_layers=2, num_heads=64, head_dim=1, n_groups=4), (2, 21)),
    "d_state-1": (dict(num_hidden_layers=2, state_size=1), (2, 21)),
    "d_state-5": (dict(num_hidden_layers=2, state_size=5), (2, 21)),
    "odd-width": (dict(num_hidden_layers=2, hidden_size=27, num_heads=6, head_dim=9, n_groups=3), (2, 21)),
    "conv-2": (dict(num_hidden_layers=2, conv_kernel=2), (2, 21)),
    "expand-1": (dict(num_hidden_layers=2, expand=1, num_heads=4), (2, 21)),
    "tied": (dict(num_hidden_layers=2, tie_word_embeddings=True), (2, 21)),
    "biases": (dict(num_hidden_layers=2, use_bias=True), (2, 21)),
    "no-conv-bias": (dict(num_hidden_layers=2, use_conv_bias=False), (2, 21)),
    "step-limit": (dict(num_hidden_layers=2, time_step_limit=(0.2, 0.6)), (2, 21)),
    "wide-initialisation": (dict(num_hidden_layers=3, std=0.3), (2, 33)),
}


def results(model, tokens) -> dict[str, torch.Tensor]:
    """Logits and loss, with gradients left on the parameters (a sum of squares is the loss of a single token)."""
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


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], relative_error) -> dict[str, float]:
    assert set(found) == set(truth)
    for name, expected in truth.items():
        if expected.norm() == 0:  # a decay that only ever met a state of zero
            assert found[name].norm() == 0, name
    return {name: relative_error(found[name], v) for name, v in truth.items() if v.norm() > 0}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, make_trio, random_tokens, no_worse, relative_error, float64_inside):
    """In float64 to nearly its precision; in float32 no further from it than twice transformers' own float32."""
    fields, shape = CASES[case]
    trio = make_trio("mamba2", **fields)
    ours_errors, yardstick_errors = defaultdict(list), defaultdict(list)
    for draw in range(15 if shape[1] > 8 else 31):
        tokens = random_tokens(*shape, seed=draw)
        with float64_inside():
            truth = results(trio.truth, tokens)
        truth |= {n: p.grad for n, p in trio.truth.named_parameters()}
        assert all(v.dtype == torch.float64 for v in truth.values())
        yardstick, ours = results(trio.yardstick, tokens), results(trio.ours, tokens)
        yardstick |= {n: p.grad for n, p in trio.yardstick.named_parameters()}
        ours |= trio.parameters_by_hf_name("grad")
        for errors, found in ((ours_errors, ours), (yardstick_errors, yardstick)):
            for name, error in compare(found, truth, relative_error).items():
                errors[name].append(error)
    no_worse(ours_errors, yardstick_errors)
    trio.ours.double()
    ours = results(trio.ours, tokens) | trio.parameters_by_hf_name("grad")
    errors = compare(ours, truth, relative_error)
    assert max(errors.values()) < 1e-11, max(errors, key=errors.get)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse(dtype, make_trio, random_tokens, relative_error, float64_inside):
    trio = make_trio("mamba2", std=0.1, num_hidden_layers=3)
    theirs, ours = trio.yardstick.to(dtype), trio.ours.to(dtype)
    errors = {"ours": [], "theirs": []}
    for draw in range(9):
        tokens = random_tokens(2, 15, seed=draw)
        with float64_inside(), torch.no_grad():
            truth = trio.truth(tokens, use_cache=False).logits
        logits = ours(tokens)
        assert logits.dtype == dtype
        errors["ours"].append(relative_error(logits, truth))
        errors["theirs"].append(relative_error(theirs(tokens, use_cache=False).logits, truth))
    assert median(errors["ours"]) <= 2 * median(errors["theirs"])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[8], [1, 2, 3], [8, 9, 10, 11], [1], [5, 11]], ids=str)
def test_cached_continuation_agrees(cuts, make_trio, random_tokens, relative_error, float64_inside):
    """Both continue from their memory, by one token or by several, as one pass over the whole would."""
    trio = make_trio("mamba2", num_hidden_layers=3)
    tokens = random_tokens(2, 12)
    state, cache, ours, theirs = trio.ours.new_state(2), None, [], []
    with float64_inside():
        whole = trio.truth(tokens, use_cache=False).logits
    for part in tokens.tensor_split(cuts, dim=1):
        ours.append(trio.ours(part, state=state))
        out = trio.yardstick(part, cache_params=cache, use_cache=True)
        cache = out.cache_params
        theirs.append(out.logits)
    assert relative_error(torch.cat(ours, 1), whole) < 1e-5
    assert relative_error(torch.cat(theirs, 1), whole) < 1e-5


@torch.no_grad()
def test_padding_does_not_decay_the_state(make_trio, random_tokens, relative_error, float64_inside):
    """transformers gives padding a step of softplus(dt_bias): a state that passes padding decays there. Ours does not.

    Left padding is harmless, for nothing is in the state yet; padding on the right is, when the sequence goes on.
    """
    trio = make_trio("mamba2", num_hidden_layers=2)
    tokens, more = random_tokens(1, 9), random_tokens(1, 1, seed=2)
    with float64_inside():
        whole = trio.truth(torch.cat((tokens, more), 1), use_cache=False).logits[:, -1]
    mask = torch.tensor([[1] * 9 + [0] * 20])
    padded = torch.cat((tokens, tokens.new_zeros(1, 20)), 1)
    state = trio.ours.new_state(1)
    trio.ours(padded, attention_mask=mask, state=state)
    assert relative_error(trio.ours(more, state=state)[:, -1], whole) < 1e-5
    cache = trio.yardstick(padded, attention_mask=mask, use_cache=True).cache_params
    theirs = trio.yardstick(more, cache_params=cache, use_cache=True).logits[:, -1]
    assert relative_error(theirs, whole) > 0.01, "transformers now leaves padding out: this exception can go"


@torch.no_grad()
def test_the_step_limit_holds_in_single_steps_too(make_trio, random_tokens, relative_error, float64_inside):
    """transformers clamps step sizes in its chunked scan but not when it continues by one token; ours does in both."""
    trio = make_trio("mamba2", num_hidden_layers=2, time_step_limit=(0.4, 0.6))
    tokens = random_tokens(1, 12)
    with float64_inside():
        whole = trio.truth(tokens, use_cache=False).logits[:, -1]
    state = trio.ours.new_state(1)
    trio.ours(tokens[:, :11], state=state)
    assert relative_error(trio.ours(tokens[:, 11:], state=state)[:, -1], whole) < 1e-5
    cache = trio.yardstick(tokens[:, :11], use_cache=True).cache_params
    theirs = trio.yardstick(tokens[:, 11:], cache_params=cache, use_cache=True).logits[:, -1]
    assert relative_error(theirs, whole) > 0.01, "transformers now clamps single steps: this exception can go"


@pytest.mark.parametrize(
    "fields",
    [{}, dict(use_bias=True, tie_word_embeddings=True), dict(time_step_limit=(0.1, 0.5)), dict(use_conv_bias=False)],
    ids=str,
)
def test_there_and_back(fields, make_trio, random_tokens, tmp_path):
    trio = make_trio("mamba2", num_hidden_layers=2, **fields)
    trio.ours.save_pretrained(tmp_path)
    tokens = random_tokens(2, 13)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(back, transformers.Mamba2ForCausalLM)
    expected = trio.yardstick(tokens, use_cache=False).logits
    assert torch.equal(back(tokens, use_cache=False).logits, expected)
    assert HookedJamba.from_pretrained(tmp_path).config == trio.ours.config

"""Sampling, stop tokens, text in and out, and options that make no sense."""

from __future__ import annotations

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.generation import sample


def test_greedy_takes_the_likeliest():
    assert sample(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [(dict(top_k=2), {1, 2}), (dict(top_p=0.6), {1}), (dict(top_p=0.7), {1, 2}), (dict(top_k=1), {1}), ({}, {0, 1, 2})],
    ids=str,
)
def test_draws_stay_among_the_allowed(options, allowed):
    probabilities = torch.tensor([[0.1, 0.6, 0.3]])
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sample(probabilities.log(), 1.0, generator=generator, **options)) for _ in range(300)}
    assert drawn == allowed


def test_temperature_sets_the_frequencies():
    logits = torch.tensor([[0.0, 1.0]]).expand(20_000, 2)
    for temperature in (0.5, 1.0, 2.0):
        share = sample(logits, temperature, generator=torch.Generator().manual_seed(0)).float().mean()
        expected = torch.sigmoid(torch.tensor(1 / temperature))
        assert abs(share - expected) < 0.015  # four standard errors of 20,000 draws


def test_a_seed_repeats_the_text_and_leaves_global_numbers_alone(small_model, tokens):
    before = torch.random.get_rng_state()
    a, b = (small_model.generate(tokens, 12, temperature=1.0, seed=3, stop_tokens=()) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(a, small_model.generate(tokens, 12, temperature=1.0, seed=4, stop_tokens=()))


def test_stop_tokens_end_a_row_and_fill_it_with_padding(small_model, tokens):
    free = small_model.generate(tokens, 12, stop_tokens=())
    stop = int(free[0, 13])
    out = small_model.generate(tokens, 12, stop_tokens=[stop])
    for row in range(2):
        new = out[row, 11:].tolist()
        if stop in new:
            end = new.index(stop)
            assert new[: end + 1] == free[row, 11 : 12 + end].tolist()
            assert set(new[end + 1 :]) <= {small_model.config.pad_token_id}
    alone = small_model.generate(tokens[:1], 12, stop_tokens=[stop])
    assert alone[0, -1] == stop and alone.shape[1] <= 14


def test_text_ends_where_its_row_stopped(small_model):
    alone = small_model.generate("5 17 3", 6, stop_tokens=())
    stop = int(alone.split()[4])
    texts = small_model.generate(["5 17 3", "9 4"], 6, stop_tokens=stop)
    new = alone.split()[3:]
    assert texts[0].split() == alone.split()[: 3 + new.index(str(stop)) + 1]


def test_prefill_computes_the_logits_of_the_last_position_only(small_model, tokens):
    shapes = []
    with small_model.hooks([("hook_logits", lambda value, hook: shapes.append(tuple(value.shape)))]):
        small_model.generate(tokens, 2, stop_tokens=())
    assert shapes == [(2, 1, 61)] * 2


def test_no_new_tokens_gives_the_prompt_back(small_model, tokens):
    assert torch.equal(small_model.generate(tokens, 0), tokens)


def test_ids_as_text(small_model):
    out = small_model.generate("5 17 3", 4, stop_tokens=())
    assert out.startswith("5 17 3 ") and len(out.split()) == 7
    both = small_model.generate(["5 17 3", "9"], 4, stop_tokens=())
    assert both[0] == out and both[1].startswith("9 ") and len(both[1].split()) == 5


def test_hooks_act_during_generation(small_model, tokens):
    def forbid(logits, hook):
        logits = logits.clone()
        logits[..., 7:] = float("-inf")
        return logits

    with small_model.hooks([("hook_logits", forbid)]):
        assert (small_model.generate(tokens, 10, stop_tokens=())[:, 11:] < 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(top_k=0), r"top_k=0 must be a whole number in 1\.\.61"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(temperature="0.7"), "temperature='0.7'"),
        (dict(top_k=1.5), "top_k=1.5"),
        (dict(top_p="a"), "top_p='a'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message, small_model, tokens):
    with pytest.raises(InputError, match=message):
        small_model.generate(tokens, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[3, 61]]), "token id 61 is outside the vocabulary; ids run from 0 to 60"),
        (torch.tensor([[3, -1]]), "token id -1"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.ones(1, 3), "tokens are torch.float32"),
        (torch.ones(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        ([], "list of prompts is empty"),
        ("", "the prompt '' is empty"),
        ("hello", "token ids such as '5 17 3', not 'hello'"),
        ([3, 4], "a prompt is a int"),
        (None, "tokens are NoneType"),
    ],
    ids=str,
)
def test_inputs_that_are_refused(given, message, small_model):
    with pytest.raises(InputError, match=message):
        small_model(given)


def test_masks_and_states_that_do_not_fit(small_model, tokens):
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 3\)"):
        small_model(tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="1 for tokens and 0 for padding"):
        small_model(tokens, attention_mask=torch.full((2, 11), 2))
    with pytest.raises(InputError, match="attention_mask row 1 has no token"):
        small_model(tokens, attention_mask=torch.tensor([[1] * 11, [0] * 11]))
    with pytest.raises(InputError, match="state is a dict"):
        small_model(tokens, state={})
    with pytest.raises(InputError, match="state holds 3 sequences but tokens have 2"):
        small_model(tokens, state=small_model.new_state(3))
    with pytest.raises(InputError, match="return_type='logit'"):
        small_model(tokens, return_type="logit")
    for return_loss in (lambda t: small_model(t, return_type="loss"), small_model.loss_terms):
        with pytest.raises(InputError, match="at least two tokens"):
            return_loss(tokens[:, :1])
    with pytest.raises(InputError, match="at least two tokens"):
        small_model(tokens, attention_mask=torch.eye(11)[[0, 3]], return_type="loss")


@pytest.mark.parametrize("fields", [dict(d_conv=6), dict(d_head=4), dict(d_state=2), dict(n_layers=3)], ids=str)
def test_a_state_of_another_model_is_refused(fields, small_model, small_config, tokens):
    base = {k: getattr(small_config, k) for k in ("d_model", "d_vocab", "n_heads", "n_key_value_heads", "d_mlp")}
    base |= dict(n_layers=4, d_head=8, d_state=6, num_experts=5, attn_layer_period=3, attn_layer_offset=1)
    other = HookedJamba(JambaConfig.jamba(**base | fields))
    with pytest.raises(InputError, match=r"another shape, dtype or device; make one with model\.new_state"):
        small_model(tokens, state=other.new_state(2))


def test_a_state_filled_in_inference_mode_goes_on_outside(small_model, tokens):
    whole = small_model(tokens)
    with torch.inference_mode():
        state = small_model.new_state(2)
        small_model(tokens[:, :2], state=state)
        small_model(tokens[:, 2:4], state=state)
    with torch.no_grad():
        small_model(tokens[:, 4:6], state=state)
    rest = small_model(tokens[:, 6:], state=state)
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-5)
    rest.sum().backward()
    small_model.zero_grad()


def test_texts_that_are_refused_or_need_bos(small_model, small_config):
    for call in (small_model.to_tokens, small_model.to_single_token):
        with pytest.raises(InputError, match="a prompt is a int"):
            call(5)
    with pytest.raises(InputError, match="token id 99 is outside"):
        small_model.tokens_to_residual_directions(99)
    assert small_model.tokens_to_residual_directions(["5", "6"]).shape == (2, 32)
    assert small_model.to_tokens("5", prepend_bos=True).tolist() == [[1, 5]]
    without = HookedJamba(JambaConfig(**small_config.to_dict() | dict(bos_token_id=None)))
    with pytest.raises(InputError, match="no bos_token_id"):
        without.to_tokens("5", prepend_bos=True)

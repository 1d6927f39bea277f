"""Sampling, stop tokens, text in and out, and options that make no sense."""

from __future__ import annotations

import pytest
import torch

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
        (dict(top_k=0), r"top_k=0 must lie in 1\.\.61"),
        (dict(top_p=1.5), "top_p=1.5"),
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
    with pytest.raises(InputError, match="state holds 3 sequences but tokens have 2"):
        small_model(tokens, state=small_model.new_state(3))
    with pytest.raises(InputError, match="return_type='logit'"):
        small_model(tokens, return_type="logit")

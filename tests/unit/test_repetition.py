"""Repetition with and without heads; attention compared between prompts; where a query looks in every layer."""

from __future__ import annotations

import pytest
import torch

from jambascope.errors import InputError
from jambascope.hooks import run
from jambascope.hooks.copying import logit_copying
from jambascope.hooks.heads import drawable_tokens, has_targets, repeated_random_tokens, score_heads
from jambascope.hooks.hidden_attention import attention_map
from jambascope.hooks.label_ablation import mean_head_outputs, metric_without
from jambascope.hooks.labels import FewShotPrompt
from jambascope.hooks.looks import looks_by_layer
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.hooks.pattern_difference import pattern_difference
from jambascope.hooks.repetition import Repetition, ablate_repetition, repetition, take_away

INDUCTION = (1, 0)


def test_losses_are_of_the_two_times_and_no_head_taken_away_changes_none(built):
    tokens = repeated_random_tokens(built, 4, 5)
    found = repetition(built, tokens, (), 3)
    with torch.no_grad():
        logits = built(tokens)[:, :-1]
    every = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert tokens.shape[1] == 11
    torch.testing.assert_close(found.loss_before, every[:, :5].mean(1).double())
    torch.testing.assert_close(found.loss, every[:, 6:].mean(1).double())
    torch.testing.assert_close(found.accuracy, (logits.argmax(-1) == tokens[:, 1:])[:, 6:].double().mean(1))
    torch.testing.assert_close(repetition(built, tokens, take_away(built, [], "zero"), 16), found)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_heads_are_taken_away_as_the_label_study_does(built, ablation):
    """Two ways to the same: interventions here, ``label_ablation`` there."""
    tokens = repeated_random_tokens(built, 3, 6)
    few = [FewShotPrompt(tuple(row.tolist()), (1,), len(row) - 1, (3, 4)) for row in tokens]
    means = mean_head_outputs(built, few) if ablation == "mean" else None
    expected = metric_without(
        built, few, [(1, 0), (1, 3)], means=means, metric=lambda logits, prompts: logits.logsumexp(-1) - logits[:, 5]
    )
    without = take_away(built, [(1, 0), (1, 3)], ablation, tokens)
    logits = run(built, tokens, without).logits[:, -1]
    torch.testing.assert_close(-logits.log_softmax(-1)[:, 5].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_built_induction_head_is_what_repetition_depends_on(built):
    chosen_on, confirmed_on = repeated_random_tokens(built, 16, 8).split(8)
    told = []
    found = ablate_repetition(
        built, [INDUCTION], chosen_on, confirmed_on, ablation="zero", progress=lambda share, known: told.append(share)
    )
    assert tuple(found) == Repetition._fields and told == pytest.approx([3 / 5, 4 / 5, 1])
    loss = found["loss"]
    assert set(loss.random_heads) == {((1, 1),), ((1, 2),), ((1, 3),)}
    for one in (INDUCTION, *(own[0] for own in loss.random_heads)):
        by_hand = repetition(built, confirmed_on, take_away(built, [one], "zero"))
        at = loss.random_heads.index((one,)) if one != INDUCTION else None
        torch.testing.assert_close(loss.ablated if at is None else loss.random[at], by_hand.loss)
    rows = {row["what"]: row for row in loss.rows()}
    assert rows["effect"]["low"] > 0.05 and rows["difference"]["low"] > 0.05
    stopped = ablate_repetition(built, [INDUCTION], chosen_on, confirmed_on, progress=lambda share, known: False)
    assert len(stopped["loss"].random) == len(stopped["loss"].random_heads) == 1


def test_what_cannot_be_taken_away_is_refused(built):
    with pytest.raises(InputError, match="ablation='mean' needs the reference"):
        take_away(built, [INDUCTION])
    with pytest.raises(InputError, match="ablation='none' must be 'mean' or 'zero'"):
        take_away(built, [INDUCTION], "none")


def test_scores_end_early_with_the_sequences_that_are_done(built):
    tokens, shares = repeated_random_tokens(built, 6, 5), []

    def stop_at_half(share: float) -> bool:
        shares.append(share)
        return share < 0.5

    found = score_heads(built, tokens, batch_size=2, progress=stop_at_half)["induction"]
    whole = score_heads(built, tokens, batch_size=2)["induction"]
    assert shares == pytest.approx([1 / 3, 2 / 3]) and len(found.samples) == 4
    torch.testing.assert_close(found.samples, whole.samples[:4])
    assert len(logit_copying(built, tokens, batch_size=2, progress=lambda share: False).samples) == 2


def test_targets_and_what_can_be_drawn(built):
    assert has_targets("previous_token", torch.tensor([[1, 5]]))
    assert not has_targets("induction", torch.tensor([[1, 5, 6], [4, 5, 6]]))
    assert has_targets("duplicate_token", torch.tensor([[1, 5, 6], [4, 5, 4]]))
    assert drawable_tokens(built).tolist() == list(range(3, 24))


# -- two prompts -----------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_two_runs(built):
    first, second = torch.tensor([[1, 5, 6, 5, 7]]), torch.tensor([[1, 5, 8, 6, 5]])
    name = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        A, B = (built.run_with_cache(tokens, names_filter=name)[1][name][0] for tokens in (first, second))
    found = pattern_difference(built, first, second, 1, 2)
    torch.testing.assert_close(found.difference, B[2] - A[2])
    torch.testing.assert_close(found.variation, 0.5 * (B - A).abs().sum(-1).mean(-1)[None])
    assert found.layers == (1,) and 0 <= found.variation.min() and found.variation.max() <= 1
    assert pattern_difference(built, first, first, 1, 0).variation.abs().max() < 1e-6


def test_prompts_of_other_lengths_and_other_heads_are_refused(built):
    first = torch.tensor([[1, 5, 6]])
    with pytest.raises(InputError, match="the second prompt has 2 tokens and the first 3"):
        pattern_difference(built, first, first[:, :2], 1, 0)
    with pytest.raises(InputError, match="layer=0, head=0 is not an attention head .* layers 1, heads 0..3"):
        pattern_difference(built, first, first, 0, 0)


# -- one query in every layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["alpha", "gate"])
def test_where_a_query_looks_in_every_layer(small_model, form):
    tokens = torch.tensor([[5, 6, 7, 5, 6]])
    found, config = looks_by_layer(small_model, tokens, 3, form), small_model.config
    assert list(found) == list(range(config.n_layers))
    with torch.no_grad():
        _, cache = small_model.run_with_cache(tokens)
    for layer in config.attention_layers:
        torch.testing.assert_close(found[layer], cache["pattern", layer][0, :, 3].mean(0).to(found[layer]))
    for layer, terms in capture_terms(small_model, tokens).items():
        torch.testing.assert_close(found[layer], attention_map(terms, [3], form)[0, 0])
    for row in found.values():
        assert row.sum().item() == pytest.approx(1, abs=1e-5) and row[4] == 0


@pytest.mark.parametrize(
    "tokens, query, form, message",
    [
        ([[5, 6]], 2, "alpha", "query=2 must be a position of one prompt, -2..1"),
        ([[5], [6]], 0, "alpha", "query=0 must be a position of one prompt"),
        ([[5, 6]], 0, "beta", "form='beta' must be one of"),
    ],
)
def test_queries_and_forms_that_do_not_exist(small_model, tokens, query, form, message):
    with pytest.raises(InputError, match=message):
        looks_by_layer(small_model, torch.tensor(tokens), query, form)

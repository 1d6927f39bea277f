"""Attention-head scores against loops, TransformerLens, and heads built by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformer_lens import head_detector

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.hooks import composition, copying, heads
from jambascope.model import initialize

REPEATED = [[5, 7, 9, 11, 5, 7, 9, 11], [4, 4, 6, 4, 8, 6, 6, 3], [3, 4, 5, 6, 7, 8, 9, 10]]


def ideal(kind: str, tokens: torch.Tensor):
    """A hook that gives every head the pattern of a perfect one; a query without a target rests on position 0."""
    P = heads.detection_pattern(kind, tokens).float()
    P[..., 0] += (P.sum(-1) == 0).float()

    def replace(pattern, hook):
        return (P / P.sum(-1, keepdim=True))[:, None].expand_as(pattern).contiguous()

    return replace


def naive(pattern: torch.Tensor, tokens: list[int], kind: str, queries: str) -> float:
    """One head on one sequence without padding, in plain loops."""
    hit = total = 0.0
    for i in range(len(tokens)):
        targets = {
            "previous_token": [i - 1] if i else [],
            "duplicate_token": [j for j in range(i) if tokens[j] == tokens[i]],
            "induction": [j + 1 for j in range(i) if tokens[j] == tokens[i]],
        }[kind]
        if targets or queries == "all":
            hit += sum(float(pattern[i, j]) for j in targets)
            total += float(pattern[i].sum())
    return hit / total if total else math.nan


@pytest.mark.parametrize("queries", ["with_target", "all"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_the_loops_numbers(small_model, queries, batch_size):
    tokens = torch.tensor(REPEATED)
    scores = heads.score_heads(small_model, tokens, queries=queries, batch_size=batch_size, control=False)
    _, cache = small_model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    for kind, found in scores.items():
        assert found.layers == (1,) and found.samples.shape == (3, 1, 4)
        for b, row in enumerate(REPEATED):
            expected = [naive(cache["pattern", 1][b, h].double(), row, kind, queries) for h in range(4)]
            np.testing.assert_allclose(found.samples[b, 0], expected, rtol=1e-5, atol=1e-7)


def test_the_batch_size_changes_no_score(small_model):
    """Also where a batch holds nothing but a sequence without targets."""
    tokens = torch.tensor(REPEATED)
    alone, together = (heads.score_heads(small_model, tokens, "induction", batch_size=n)["induction"] for n in (1, 3))
    assert alone.samples[2].isnan().all() and alone.samples[:2].isfinite().all()
    for name in ("samples", "uniform_samples", "control_samples"):
        one, all_ = getattr(alone, name), getattr(together, name)
        torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-6, equal_nan=True)
    samples = [copying.logit_copying(small_model, tokens, batch_size=n).control_samples for n in (1, 3)]
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-6)
    taken = [composition.composition(small_model, tokens, batch_size=n).without_samples for n in (1, 3)]
    torch.testing.assert_close(*taken, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(small_model, side):
    rows = [[1, 5, 7, 5, 7, 5], [1, 9, 9, 4]]
    alone = [heads.score_heads(small_model, torch.tensor([row]), control=False) for row in rows]
    pad = [0, 0]  # pads are equal tokens beside each other: all three kinds would see them
    tokens = torch.tensor([rows[0], pad + rows[1] if side == "left" else rows[1] + pad])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0]])
    together = heads.score_heads(small_model, tokens, attention_mask=mask)
    for kind in heads.KINDS:
        for b in range(2):
            torch.testing.assert_close(together[kind].samples[b], alone[b][kind].samples[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together[kind].uniform_samples[b], alone[b][kind].uniform_samples[0])


@pytest.mark.parametrize("kind", heads.KINDS)
@pytest.mark.parametrize("row", [*REPEATED, [4, 4], [6]], ids=str)
def test_patterns_are_transformer_lens(kind, row):
    theirs = getattr(head_detector, f"get_{kind}_head_detection_pattern")(torch.tensor([row]))
    assert torch.equal(heads.detection_pattern(kind, torch.tensor([row]))[0].float(), theirs)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_all_queries_are_transformer_lens_detect_head(small_model, kind):
    prompts = ["5 7 9 11 5 7 9 11 30 5", "3 4 5", "8 8 9 8"]  # of different lengths; the second repeats nothing
    theirs = head_detector.detect_head(small_model, prompts, f"{kind}_head", heads=[(1, h) for h in range(4)])
    ours = heads.score_heads(small_model, prompts, kind, queries="all", control=False)[kind]
    np.testing.assert_allclose(ours.mean[0], theirs[1], rtol=1e-5)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_a_perfect_head_scores_one(small_model, kind):
    tokens = heads.repeated_random_tokens(small_model, 5, 9)
    with small_model.hooks([("blocks.1.attn.hook_pattern", ideal(kind, tokens))]):
        scores = heads.score_heads(small_model, tokens, control=False)
    assert scores[kind].mean.flatten().tolist() == pytest.approx([1] * 4)
    for other in set(heads.KINDS) - {kind}:
        assert scores[other].mean.max() < 0.2


@pytest.mark.parametrize("times", [2, 3])
def test_even_attention_scores_chance(built, times):
    length = 7
    scores = heads.score_heads(built, heads.repeated_random_tokens(built, 4, length, times))
    queries = {"previous_token": range(1, 1 + length * times), "induction": range(1 + length, 1 + length * times)}
    queries["duplicate_token"] = queries["induction"]
    for kind, found in scores.items():
        earlier = (lambda i: 1) if kind == "previous_token" else (lambda i: (i - 1) // length)
        by_hand = np.mean([earlier(i) / (i + 1) for i in queries[kind]])
        assert found.uniform == pytest.approx(by_hand, rel=1e-12)
        np.testing.assert_allclose(found.samples[:, 0, 1], by_hand, rtol=1e-5)


def test_heads_built_by_hand(built):
    scores = heads.score_heads(built, heads.repeated_random_tokens(built, 16, 8))
    assert scores["induction"].mean[0, 0] == pytest.approx(1, abs=1e-4)
    # A head that looks for its own token finds itself too: half of its attention goes to the earlier one.
    assert scores["duplicate_token"].mean[0, 2] == pytest.approx(0.5, abs=1e-4)
    assert scores["induction"].top(1)[0]["head"] == 0
    assert scores["induction"].mean[0, [2, 3]].max() < 0.2
    # Tokens in random order: what matched before falls to chance, give or take the sampling of 16 sequences.
    control = scores["induction"].control_samples[:, 0, 0].mean()
    assert control < 0.3 and scores["induction"].uniform < 0.3

    once = torch.stack([torch.arange(3, built.config.d_vocab).roll(i) for i in range(4)])
    previous = heads.score_heads(built, once, ["previous_token"])["previous_token"]
    assert previous.mean[0, 3] == pytest.approx(1, abs=1e-4)
    assert previous.control_samples[:, 0, 3].mean() == pytest.approx(1, abs=1e-4)  # it goes by place, whatever is there


def test_rows_hold_what_the_arrays_hold(small_model):
    scores = heads.score_heads(small_model, heads.repeated_random_tokens(small_model, 6, 5))["induction"]
    rows = scores.rows()
    assert [(row["layer"], row["head"]) for row in rows] == [(1, h) for h in range(4)]
    for row in rows:
        own = scores.samples[:, 0, row["head"]]
        assert row["score"] == pytest.approx(own.mean().item())
        assert own.min() <= row["low"] <= row["score"] <= row["high"] <= own.max()
        assert row["control"] == pytest.approx(scores.control_samples[:, 0, row["head"]].mean().item())
        assert row["n"] == 6 and row["kind"] == "induction"
    best = scores.top(2)
    assert [row["score"] for row in best] == sorted((row["score"] for row in rows), reverse=True)[:2]


def test_repeated_random_tokens(small_model):
    tokens = heads.repeated_random_tokens(small_model, 3, 10, 3, seed=5)
    assert tokens.shape == (3, 31) and (tokens[:, 0] == 1).all()
    assert torch.equal(tokens[:, 1:11], tokens[:, 11:21]) and torch.equal(tokens[:, 1:11], tokens[:, 21:])
    assert all(len(set(row[1:11].tolist())) == 10 for row in tokens)
    assert tokens[:, 1:].min() >= 3  # 0, 1 and 2 are special
    assert torch.equal(tokens, heads.repeated_random_tokens(small_model, 3, 10, 3, seed=5))
    assert not torch.equal(tokens, heads.repeated_random_tokens(small_model, 3, 10, 3, seed=6))


def test_shuffling_leaves_padding_and_bos_in_place():
    tokens = torch.tensor([[0, 0, 1, 4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9, 3, 0, 0]])
    mask = tokens != 0
    mixed = heads.shuffled(tokens, mask, bos_token_id=1, seed=1)
    assert mixed[0, :3].tolist() == [0, 0, 1] and mixed[1, 7:].tolist() == [0, 0]
    assert not torch.equal(mixed, tokens)
    assert torch.equal(mixed.sort(1).values, tokens.sort(1).values)


def test_several_attention_layers_and_none(built):
    config = JambaConfig.jamba(
        n_layers=3, d_model=16, d_vocab=30, attn_layer_period=2, attn_layer_offset=0, num_experts=1, d_mlp=8, n_heads=2,
        n_key_value_heads=1, d_head=4, d_state=1,
    )  # fmt: skip
    torch.manual_seed(0)
    scores = heads.score_heads(HookedJamba(config), torch.tensor([3, 4, 3, 4]), control=False)
    assert scores["induction"].layers == (0, 2) and scores["induction"].mean.shape == (2, 2)
    assert scores["induction"].control_samples is None and "control" not in scores["induction"].rows()[0]

    without = HookedJamba(JambaConfig.jamba(n_layers=1, d_model=16, d_vocab=30, num_experts=1, d_mlp=8))
    for call in (heads.score_heads, copying.ov_copying, copying.logit_copying):
        with pytest.raises(InputError, match="no attention layers"):
            call(without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=1), "length=1"),
        (dict(length=5.0), "length=5.0"),
        (dict(times=1), "times=1"),
        (dict(sequences=0), "sequences=0"),
        (dict(length=59), "cannot be drawn from 58"),
        (dict(length=50, times=3), "context of 128"),
    ],
)
def test_repetitions_that_make_no_sense(small_model, options, message):
    with pytest.raises(InputError, match=message):
        heads.repeated_random_tokens(small_model, **options)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[5]], {}, "two tokens"),
        ([[5, 6, 7]], dict(kinds=["induction"]), "comes twice"),
        ([[5, 5]], dict(kinds=["copying"]), "kind='copying'"),
        ([[5, 5]], dict(kinds=[]), "kinds is empty"),
        ([[5, 5]], dict(queries="some"), "queries='some'"),
        ([[5, 5]], dict(batch_size=0), "batch_size=0"),
        ([[5, 61]], {}, "token id 61"),
    ],
)
def test_errors_come_before_the_forward(small_model, tokens, options, message):
    def forbidden(value, hook):
        raise AssertionError("the model ran")

    with small_model.hooks([("hook_embed", forbidden)]), pytest.raises(InputError, match=message):
        heads.score_heads(small_model, torch.tensor(tokens), **options)


# -- composition --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> HookedJamba:
    """Two attention layers with Mamba, dense and MoE between them; norms of random weights."""
    config = JambaConfig.jamba(
        n_layers=5, d_model=24, d_vocab=40, attn_layer_period=3, attn_layer_offset=1, num_experts=2, d_mlp=8, n_heads=4,
        n_key_value_heads=2, d_head=6, d_state=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = HookedJamba(config)
    initialize(model, std=0.3)
    for block in model.blocks:
        torch.nn.init.uniform_(block.ln1.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("side", ["key", "query"])
def test_taking_a_component_out_is_the_loops_number(deep, side):
    tokens = torch.tensor([[0, 0, 3, 4, 5, 3, 4], [6, 7, 6, 7, 8, 9, 6]])
    mask = (tokens != 0).long()
    found = composition.composition(deep, tokens, side=side, attention_mask=mask, batch_size=1)
    assert found.layer == 4 and len(found.sources) == 1 + 3 + 4 + 4  # embedding, mixers, heads, MLPs
    with torch.no_grad():
        _, cache = deep.run_with_cache(tokens, attention_mask=mask, names_filter=lambda name: True)
    block = deep.blocks[4]
    scale, w = cache["blocks.4.ln1.hook_scale"].double(), block.ln1.weight.detach().double()
    q, k = (cache[f"blocks.4.attn.hook_{s}"].double() for s in "qk")
    W = (block.attn.k_proj if side == "key" else block.attn.q_proj).weight.detach().double()
    removed = torch.zeros_like(k if side == "key" else q)
    for (name, head), without in zip(found.sources, found.without_samples, strict=True):
        addend = cache[name].double() if head is None else cache[name][:, :, head].double()
        part = (addend / scale * w @ W.T).reshape(removed.shape)
        removed += part
        for b in range(2):
            start = 2 if b == 0 else 0
            row = tokens[b, start:].tolist()
            for h in range(4):
                queries, keys = q[b, start:, h], k[b, start:, h // 2]
                if side == "key":
                    keys = keys - part[b, start:, h // 2]
                else:
                    queries = queries - part[b, start:, h]
                scores = queries @ keys.T / math.sqrt(6)
                pattern = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
                assert without[b, h].item() == pytest.approx(naive(pattern, row, "induction", "with_target"), rel=1e-4)
    torch.testing.assert_close(removed, k if side == "key" else q, rtol=1e-4, atol=1e-5)  # nothing else is in there


def test_keys_that_come_from_a_convolution(built):
    """Head 0 of the hand-built model finds the previous token in what the Mamba layer wrote, and only there."""
    found = composition.composition(built, heads.repeated_random_tokens(built, 8, 8))
    assert found.sources == (("hook_embed", None), ("blocks.0.hook_mixer_out", None))
    drops = {row["source"]: row["drop"] for row in found.rows() if row["head"] == 0}
    assert drops["blocks.0.hook_mixer_out"] > 0.8 and drops["hook_embed"] == pytest.approx(0, abs=1e-6)
    best = found.top(1)[0]
    assert (best["source"], best["head"]) == ("blocks.0.hook_mixer_out", 0)
    queries = composition.composition(built, heads.repeated_random_tokens(built, 8, 8), side="query")
    drops = {row["source"]: row["drop"] for row in queries.rows() if row["head"] == 0}
    assert drops["hook_embed"] > 0.8 and drops["blocks.0.hook_mixer_out"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layer=0), "layer=0 has no heads"),
        (dict(side="value"), "side='value'"),
        (dict(kind="copying"), "kind='copying'"),
        (dict(batch_size=True), "batch_size=True"),
        (dict(prompts=torch.tensor([[5, 6]])), "comes twice"),
    ],
    ids=str,
)
def test_compositions_that_make_no_sense(small_model, options, message):
    with pytest.raises(InputError, match=message):
        composition.composition(small_model, **options)


def test_packaged_model_has_induction_heads():
    model = HookedJamba.from_pretrained("jamba-micro")
    best = heads.score_heads(model, heads.repeated_random_tokens(model, 8, 30))["induction"].top(1)[0]
    assert best["low"] > 0.4 > 5 * best["control_high"]
    copied = copying.ov_copying(model)
    (row,) = [row for row in copied.rows() if (row["layer"], row["head"]) == (best["layer"], best["head"])]
    assert row["score"] > 0.8 > row["random_high"]

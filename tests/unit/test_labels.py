"""Label attention, the ablation of its heads and saliency against loops, differences and heads built by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.hooks import label_ablation, label_saliency, labels
from jambascope.hooks.labels import FewShotPrompt
from jambascope.model import initialize
from jambascope.zoo.words import MOODS, SENTIMENTS, VOCABULARY

PROMPTS = [
    FewShotPrompt((1, 5, 40, 6, 7, 41, 8, 9, 50), (2, 5), 8, (40, 41), 40),
    FewShotPrompt((1, 5, 40, 6, 7, 50), (2,), 5, (40, 41), 41),
    FewShotPrompt((1, 12, 13, 40, 14, 15, 16, 41, 17, 18, 40, 50, 33), (3, 7, 10), 11, (40, 41), 41),
]


def rests_on(targets: dict[int, list[list[int]]]):
    """A hook: head h shares its attention evenly over the positions given for each prompt; other heads over all."""

    def replace(pattern, hook):
        pattern = pattern.clone()
        for h, rows in targets.items():
            for b, positions in enumerate(rows):
                pattern[b, h] = 0
                pattern[b, h, :, positions] = 1 / len(positions)
        return pattern

    return replace


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_label_attention_is_the_loops_number(small_model, batch_size):
    found = labels.label_attention(small_model, PROMPTS, neighbours=2, batch_size=batch_size)
    for b, prompt in enumerate(PROMPTS):
        _, cache = small_model.run_with_cache(torch.tensor([prompt.tokens]), names_filter="blocks.1.attn.hook_pattern")
        row = cache["pattern", 1][0, :, prompt.query_position].double()
        torch.testing.assert_close(
            found.samples[b, 0], row[:, list(prompt.label_positions)].sum(-1), rtol=1e-4, atol=1e-6
        )
        matched = torch.zeros(4, dtype=torch.float64)
        others = [p for p in range(1, prompt.query_position) if p not in prompt.label_positions]
        for label in prompt.label_positions:
            near = sorted(others, key=lambda p: (abs(p - label), p))[:2]
            matched += row[:, near].mean(-1)
        torch.testing.assert_close(found.matched_samples[b, 0], matched, rtol=1e-4, atol=1e-6)
        assert found.uniform_samples[b] == len(prompt.label_positions) / (prompt.query_position + 1)


def test_neighbours_by_hand():
    weights = labels._weights(0, PROMPTS[0], 2)
    # Label at 2: nearest 1 and 3. Label at 5: nearest 4 and 6. Nothing at 0, the labels and the query.
    assert weights[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert weights[1].tolist() == [0, 0.5, 0, 0.5, 0.5, 0, 0.5, 0, 0]
    assert labels._weights(0, PROMPTS[0], 1)[1].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0]  # the earlier of two


def test_heads_made_to_look_at_labels(small_model):
    """Head 1 looks at labels only, head 2 at their neighbours only, head 3 evenly at all that it may see."""
    near = [sorted(set(labels._weights(i, p, 4)[1].nonzero()[:, 0].tolist())) for i, p in enumerate(PROMPTS)]
    all_ = [list(range(p.query_position + 1)) for p in PROMPTS]
    hook = rests_on({1: [list(p.label_positions) for p in PROMPTS], 2: near, 3: all_})
    with small_model.hooks([("blocks.1.attn.hook_pattern", hook)]):
        found = labels.label_attention(small_model, PROMPTS)
    assert found.mean[0, 1:].tolist() == pytest.approx([1, 0, found.uniform_samples.mean().item()], rel=1e-5)
    assert found.lift[0, 1:].tolist() == pytest.approx([math.inf, 0, 1], rel=1e-5)
    assert found.top(1)[0]["head"] == 1
    assert [row["head"] for row in found.label_heads() if row["head"] > 0] == [1]


def test_lift_interval_draws_both_means_together(small_model):
    found = labels.label_attention(small_model, labels_in(small_model, 12))
    low, high = found.lift_interval
    assert ((low <= found.lift) & (found.lift <= high)).all() and (low < high).all()
    drawn = torch.randint(12, (2000, 12), generator=torch.Generator().manual_seed(0))
    ratios = found.samples[drawn].mean(1) / found.matched_samples[drawn].mean(1)
    torch.testing.assert_close(low, ratios.quantile(0.025, dim=0, interpolation="lower"))
    alone = labels.label_attention(small_model, PROMPTS[:1]).lift_interval
    assert (alone[0] == -math.inf).all() and (alone[1] == math.inf).all()


def labels_in(model: HookedJamba, prompts: int) -> list[FewShotPrompt]:
    """Random prompts of different lengths in the model's vocabulary."""
    random = torch.Generator().manual_seed(4)
    drawn = []
    for i in range(prompts):
        ids = torch.randint(3, 40, (10 + i % 3,), generator=random).tolist()
        ids[3], ids[6] = 40 + i % 2, 41 - i % 2
        drawn.append(FewShotPrompt([1, *ids], (4, 7), len(ids) - i % 2, (40, 41), 40 + i % 2))
    return drawn


def test_prompts_are_made_of_tensors_too():
    tensors = torch.tensor(PROMPTS[0].tokens), torch.tensor(PROMPTS[0].label_positions), torch.tensor(8)
    assert FewShotPrompt(*tensors, torch.tensor([40, 41]), 40) == PROMPTS[0]


@pytest.mark.parametrize(
    ("options", "groups", "header"),
    [
        ({}, SENTIMENTS, "Sentiment"),
        ({"split": "train"}, SENTIMENTS, "Sentiment"),
        ({"classes": 3}, tuple(MOODS.values()), "Mood"),
    ],
    ids=["held out", "train", "three classes"],
)
def test_review_prompts(options, groups, header):
    prompts = labels.review_prompts(20, shots=5, seed=3, **options)
    words = list(VOCABULARY)
    for prompt in prompts:
        text = [words[i] for i in prompt.tokens]
        assert text[0] == "<bos>" and len(prompt.label_positions) == 5
        assert [text[p - 2 : p] for p in prompt.label_positions] == [[header, ":"]] * 5
        assert text[-2:] == [header, ":"] and prompt.query_position == len(text) - 1
        assert {prompt.tokens[p] for p in prompt.label_positions} == set(prompt.label_ids)
        assert len(prompt.label_ids) == options.get("classes", 2)
        # The wanted label is the one that a review of the same class carries.
        reviews = " ".join(text).split("Review : ")[1:]
        classes = [next(c for c, group in enumerate(groups) if set(r.split()) & set(group)) for r in reviews]
        example = classes.index(classes[-1])
        assert prompt.answer_id == prompt.tokens[prompt.label_positions[example]]
    assert prompts == labels.review_prompts(20, shots=5, seed=3, **options)
    assert prompts != labels.review_prompts(20, shots=5, seed=4, **options)


# -- ablation -----------------------------------------------------------------------------------------------------


def run_without(model, prompt: FewShotPrompt, heads, stand_in) -> float:
    """Label mass of one prompt, from a run of its own."""

    def replace(z, hook):
        for layer, head in heads:
            if layer == hook.layer():
                z[:, :, head] = stand_in(layer, head)

    hooks = [(f"blocks.{layer}.attn.hook_z", replace) for layer in model.config.attention_layers]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks)
    p = logits[0, prompt.query_position].double().softmax(-1)
    return float(sum(p[i] for i in prompt.label_ids))


@pytest.fixture(scope="module")
def deep() -> HookedJamba:
    """Two attention layers of four heads."""
    torch.manual_seed(0)
    config = JambaConfig.jamba(
        n_layers=3, d_model=32, d_vocab=61, attn_layer_period=2, attn_layer_offset=0, n_heads=4, n_key_value_heads=2,
        d_head=8, d_mlp=16, num_experts=1, d_state=2, pad_token_id=0,
    )  # fmt: skip
    model = HookedJamba(config)
    initialize(model, std=0.3)
    return model.eval()


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablation_is_that_of_separate_runs(deep, ablation):
    prompts, heads = labels_in(deep, 7), ((0, 1), (2, 3), (2, 0))
    z_of = []
    for prompt in prompts:
        _, cache = deep.run_with_cache(torch.tensor([prompt.tokens]))
        z_of.append({layer: cache[f"blocks.{layer}.attn.hook_z"][0].detach() for layer in (0, 2)})
    means = {layer: torch.cat([z[layer] for z in z_of]).mean(0) for layer in (0, 2)}  # long prompts count for more
    stand_in = (lambda layer, head: 0) if ablation == "zero" else (lambda layer, head: means[layer][head])
    found = label_ablation.ablate_heads(deep, prompts, heads, ablation=ablation, draws=3, batch_size=3)
    for b, prompt in enumerate(prompts):
        assert found.clean[b].item() == pytest.approx(run_without(deep, prompt, (), stand_in), rel=1e-4)
        assert found.ablated[b].item() == pytest.approx(run_without(deep, prompt, heads, stand_in), rel=1e-4)
        for d, others in enumerate(found.random_heads):
            assert found.random[d, b].item() == pytest.approx(run_without(deep, prompt, others, stand_in), rel=1e-4)
    rows = {row["what"]: row for row in found.rows()}
    assert rows["effect"]["mean"] == pytest.approx((found.ablated - found.clean).mean().item())
    assert rows["difference"]["mean"] == pytest.approx(rows["effect"]["mean"] - rows["random_effect"]["mean"])
    assert all(row["low"] <= row["mean"] <= row["high"] and row["n"] == 7 for row in rows.values())
    assert not any(point._forward_hooks for point in deep.hook_dict.values())


def test_heads_are_ranked_among_random_ones():
    """The interval over prompts does not know that heads were drawn: it leaves 0, though two of five draws do more."""
    effects = torch.tensor([-0.3, 0.4, -0.1, 0.0, 0.1], dtype=torch.float64)
    clean = torch.full((6,), 0.5, dtype=torch.float64)
    noise = torch.linspace(-0.02, 0.02, 6, dtype=torch.float64)
    own, *random = (clean + effect + noise for effect in (-0.2, *effects))
    found = label_ablation.HeadAblation(((0, 1),), (((0, 0),),) * 5, "zero", clean, own, torch.stack(random))
    assert found.p_value == (1 + 2) / (1 + 5)
    rows = {row["what"]: row for row in found.rows()}
    assert rows["difference"]["high"] < 0
    assert rows["effect"]["p_value"] == found.p_value and math.isnan(rows["difference"]["p_value"])


def test_random_heads_are_others_and_different(deep):
    drawn = label_ablation.random_head_sets(deep, ((0, 0), (2, 1)), draws=10, seed=0)
    assert len(set(drawn)) == 10
    for heads in drawn:
        assert len(set(heads)) == 2 and not {(0, 0), (2, 1)} & set(heads)
    # Six heads are left: C(6, 4) = 15 sets of 4 do not exist when 4 of 8 are taken; then there is one.
    taken = tuple(itertools.product((0, 2), (0, 1)))
    assert label_ablation.random_head_sets(deep, taken, draws=10, seed=0) == (tuple(itertools.product((0, 2), (2, 3))),)


def test_heads_are_chosen_on_one_half_and_confirmed_on_the_other(deep):
    prompts = labels_in(deep, 9)
    test = label_ablation.confirm_label_heads(deep, prompts, 2, seed=1, draws=2)
    assert sorted(test.chosen_on + test.confirmed_on) == list(range(9))
    first, second = ([prompts[i] for i in half] for half in (test.chosen_on, test.confirmed_on))
    best = labels.label_attention(deep, first).top(2)
    assert test.ablation.heads == tuple((row["layer"], row["head"]) for row in best)
    means = label_ablation.mean_head_outputs(deep, first)
    by_hand = label_ablation.metric_without(deep, second, test.ablation.heads, means=means)
    torch.testing.assert_close(test.ablation.ablated, by_hand, rtol=1e-5, atol=1e-7)


def test_a_metric_of_ones_own(deep):
    def wanted(logits, prompts):
        return logits.log_softmax(-1)[range(len(prompts)), [p.answer_id for p in prompts]]

    prompts = labels_in(deep, 3)
    found = label_ablation.metric_without(deep, prompts, (), metric=wanted)
    for b, prompt in enumerate(prompts):
        logits = deep(torch.tensor([prompt.tokens]))[0, prompt.query_position]
        assert found[b].item() == pytest.approx(logits.log_softmax(-1)[prompt.answer_id].item(), rel=1e-4)


@pytest.mark.parametrize("wrong", [lambda x, p: x.sum(), lambda x, p: x[:, :1]], ids=["one for all", "a column"])
def test_a_metric_that_is_not_a_number_for_each_prompt(deep, wrong):
    with pytest.raises(InputError, match="a number for each prompt"):
        label_ablation.metric_without(deep, labels_in(deep, 2), (), metric=wrong)


# -- saliency -----------------------------------------------------------------------------------------------------


def test_saliency_is_the_sum_of_finite_differences(deep):
    """|sum_h A dL/dA| with dL/dA from moving one entry of one head's pattern in float64."""
    model = HookedJamba(deep.config, dtype="float64")
    model.load_state_dict({name: w.double() for name, w in deep.state_dict().items()})
    prompt = FewShotPrompt((5, 40, 6, 41, 50), (1, 3), 4, (40, 41), 41)
    (found,) = label_saliency.attention_saliency(model, [prompt])
    tokens, step = torch.tensor([prompt.tokens]), 1e-5

    def loss(name=None, h=0, i=0, j=0, by=0.0):
        def nudge(pattern, hook):
            pattern = pattern.clone()
            pattern[0, h, i, j] += by
            return pattern

        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, nudge)] if name else [])
        return -logits[0, 4].log_softmax(-1)[41].item()

    for index, layer in enumerate((0, 2)):
        name = f"blocks.{layer}.attn.hook_pattern"
        A = model.run_with_cache(tokens, names_filter=name)[1][name][0]
        expected = torch.zeros(5, 5, dtype=torch.float64)
        for h, i, j in itertools.product(range(4), range(5), range(5)):
            if j <= i:
                slope = (loss(name, h, i, j, step) - loss(name, h, i, j, -step)) / (2 * step)
                expected[i, j] += A[h, i, j].item() * slope
        torch.testing.assert_close(found[index], expected.abs(), rtol=1e-4, atol=1e-9)


def test_saliency_of_frozen_weights_without_gradients(deep):
    prompts = labels_in(deep, 3)
    expected = label_saliency.label_saliency(deep, prompts).samples
    assert (expected[:, 0] > 0).all()
    assert (expected[:, 1, 0] == 0).all()  # in the last layer only the query's own row reaches the loss
    try:
        deep.requires_grad_(False)
        with torch.no_grad():
            torch.testing.assert_close(label_saliency.label_saliency(deep, prompts).samples, expected)
    finally:
        deep.requires_grad_(True)
    assert all(p.grad is None for p in deep.parameters())


def test_classes_of_edges_by_hand():
    prompt = FewShotPrompt((5, 40, 6, 41, 50, 9), (1, 3), 4, (40, 41))
    edges = {
        name: {tuple(e) for e in found.nonzero().tolist()}
        for name, found in label_saliency.edge_classes(prompt).items()
    }
    assert edges["wp"] == {(1, 0), (3, 0), (3, 1), (3, 2)}
    assert edges["pq"] == {(4, 1), (4, 3)}
    assert edges["ww"] == {(2, 0), (2, 1), (4, 0), (4, 2)}  # nothing of position 5, which comes after the query


def test_prompts_without_edges_are_not_counted(deep):
    """A label at the start has nothing before it that could tell it anything."""
    prompts = [*labels_in(deep, 2), FewShotPrompt((40, 5, 6), (0,), 2, (40, 41), 41)]
    rows = {row["flow"]: row for row in label_saliency.label_saliency(deep, prompts).rows()}
    assert (rows["wp"]["n"], rows["pq"]["n"], rows["ww"]["n"]) == (2, 3, 3)


def test_class_means_do_not_depend_on_the_batch(deep):
    prompts = labels_in(deep, 5)
    together = label_saliency.label_saliency(deep, prompts)
    for b, prompt in enumerate(prompts):
        (edges,) = label_saliency.attention_saliency(deep, [prompt])
        for f, flow in enumerate(label_saliency.FLOWS):
            chosen = edges[:, label_saliency.edge_classes(prompt)[flow]]
            torch.testing.assert_close(together.samples[b, :, f], chosen.mean(-1), rtol=1e-3, atol=1e-9)
    rows = together.rows()
    assert [(row["layer"], row["flow"]) for row in rows] == list(itertools.product((0, 2), label_saliency.FLOWS))


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(query_position=9), "query_position=9"),
        (dict(query_position=-1), "query_position=-1"),
        (dict(tokens=()), "query_position=4"),
        (dict(label_positions=()), "at least one position"),
        (dict(label_positions=(1, 1)), "each once"),
        (dict(label_positions=(1, 4)), r"label_positions=\[4\] must lie before"),
        (dict(label_positions=(-1,)), "must lie before"),
        (dict(label_positions=(30,)), "must lie before"),
        (dict(label_ids=()), "at least one label"),
        (dict(label_ids=(40, 40)), "each once"),
        (dict(answer_id=3), "answer_id=3"),
        (dict(tokens=(5, 40.5, 6, 41, 50)), "whole numbers"),
        (dict(tokens=5), "whole numbers"),
        (dict(query_position=None), "whole numbers"),
    ],
)
def test_prompts_that_make_no_sense(fields, message):
    good = dict(tokens=(5, 40, 6, 41, 50), label_positions=(1, 3), query_position=4, label_ids=(40, 41))
    FewShotPrompt(**good)
    with pytest.raises(InputError, match=message):
        FewShotPrompt(**{**good, **fields})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: labels.label_attention(m, []), "at least one FewShotPrompt"),
        (lambda m: labels.label_attention(m, PROMPTS[0]), "list of at least one"),
        (lambda m: labels.label_attention(m, PROMPTS, neighbours=0), "neighbours=0"),
        (lambda m: labels.label_attention(m, PROMPTS, batch_size=0), "batch_size=0"),
        (lambda m: labels.label_attention(m, [FewShotPrompt((5, 61), (0,), 1, (5,))]), "token id 61"),
        (lambda m: labels.label_attention(m, [FewShotPrompt((5, 6), (0,), 1, (99,))]), "token id 99"),
        (lambda m: labels.label_attention(m, [FewShotPrompt((5, 6, 7), (1,), 2, (5,))]), "no tokens but labels"),
        (lambda m: labels.review_prompts(0), "prompts=0"),
        (lambda m: labels.review_prompts(1, shots=1), "shots=1"),
        (lambda m: labels.review_prompts(1, shots=3, classes=4), "shots=3"),
        (lambda m: labels.review_prompts(1, classes=1), "classes=1"),
        (lambda m: labels.review_prompts(1, split="test"), "split='test'"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, []), "at least one"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 0), (1, 1), (1, 2)]), "leaves 1 others"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(0, 0)]), "layer=0 has no heads"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 4)]), "head=4 of layer 1"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [1, 2]), "pairs"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 0), (1, 0)]), "twice"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 0)], ablation="noise"), "ablation='noise'"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 0)], draws=0), "draws=0"),
        (lambda m: label_ablation.confirm_label_heads(m, PROMPTS[:1], 1), "at least 2"),
        (lambda m: label_ablation.ablate_heads(m, PROMPTS, [(1, 0)], reference=[]), "at least one FewShotPrompt"),
        (lambda m: label_ablation.confirm_label_heads(m, PROMPTS, 3), "k=3"),
        (lambda m: label_ablation.confirm_label_heads(m, PROMPTS, 1, ablation="noise"), "ablation='noise'"),
        (lambda m: label_ablation.confirm_label_heads(m, PROMPTS, 1, draws=0), "draws=0"),
        (lambda m: label_ablation.confirm_label_heads(m, PROMPTS, 1, reference=[]), "at least one FewShotPrompt"),
        (lambda m: label_saliency.attention_saliency(m, [FewShotPrompt((5, 6), (0,), 1, (5,))]), "no answer_id"),
    ],
)
def test_errors_come_before_the_forward(small_model, call, message):
    def forbidden(value, hook):
        raise AssertionError("the model ran")

    with small_model.hooks([("hook_embed", forbidden)]), pytest.raises(InputError, match=message):
        call(small_model)


def test_a_model_without_attention_has_no_label_heads():
    without = HookedJamba(JambaConfig.jamba(n_layers=1, d_model=16, d_vocab=61, num_experts=1, d_mlp=8))
    for call in (labels.label_attention, label_ablation.mean_head_outputs, label_saliency.label_saliency):
        with pytest.raises(InputError, match="no attention layers"):
            call(without, PROMPTS)


def test_the_packaged_models_heads_look_at_labels():
    model = HookedJamba.from_pretrained("jamba-micro")
    prompts = labels.review_prompts(24)
    found = labels.label_attention(model, prompts).label_heads(lift=3)
    assert found and {row["layer"] for row in found} <= set(model.config.attention_layers)
    clean, without = (
        label_ablation.metric_without(model, prompts, heads).mean()
        for heads in ((), [(row["layer"], row["head"]) for row in found])
    )
    assert clean > 0.3 and clean > 2 * without

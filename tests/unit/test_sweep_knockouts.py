"""Edge knock-outs and the screen against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import HookError, InputError
from jambascope.hooks import run
from jambascope.hooks.attribution_patching import attribution_patching
from jambascope.hooks.interventions import KnockOutEdges, Patch, ZeroAblation
from jambascope.hooks.sweep import Node, knock_out_sweep, logit_difference, patch_sweep, screen

LENGTH = 5
DIFFERENCE = logit_difference(5, 6)
TOKENS = torch.randint(3, 29, (2, 2, LENGTH), generator=torch.Generator().manual_seed(3))
EDGES = [(4, 0), (4, 3), (2, 2), (-2, 1), (0, 0)]


def without(model, layer, query, key, head):
    """The run in which an edge is missing, by interventions."""
    if layer in model.config.attention_layers:
        return run(model, TOKENS[0], [KnockOutEdges(layer, edges=[(query, key)], heads=head)])
    name = "mixer.hook_ssm_state"
    kept = run(model, TOKENS[0], [ZeroAblation("mixer.hook_ssm_write", layer, key)], capture=[f"blocks.{layer}.{name}"])
    value = kept.cache[f"blocks.{layer}.{name}"][:, :, [query]]
    return run(model, TOKENS[0], [Patch("mixer.hook_ssm_read", layer, query, value=value)])


@pytest.mark.parametrize("by_head", [True, False], ids=["heads", "layers"])
@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
def test_every_edge_is_missing_as_in_a_run_of_its_own(kind, by_head, model_of_kind):
    model = model_of_kind(kind)
    found = knock_out_sweep(model, TOKENS[0], DIFFERENCE, EDGES, by_head=by_head, progress=False)
    assert found.complete and set(found.values) == {"attention", "mamba"}
    for name, values in found.values.items():
        values = values.sel(metric="logit_difference")
        for layer in model.config.attention_layers if name == "attention" else model.config.ssm_layers:
            for i, (query, key) in enumerate(EDGES):
                for head in range(4) if name == "attention" and by_head else [None]:
                    logits = without(model, layer, query % LENGTH, key, head).logits[:, -1].detach()
                    cell = values.sel(layer=layer)[:, i]
                    cell = cell if head is None else cell.sel(head=head)
                    np.testing.assert_allclose(
                        cell, logits[:, 5] - logits[:, 6], rtol=1e-9, err_msg=f"{layer} {query} {key}"
                    )
    assert found.values["attention"]["query"].values.tolist() == [4, 4, 2, 3, 0]


def test_all_edges_of_a_short_prompt(model_of_kind):
    found = knock_out_sweep(model_of_kind("no-attention"), TOKENS[0, :1, :3], DIFFERENCE, progress=False)
    assert list(found.values) == ["mamba"] and found.values["mamba"].shape == (1, 1, 2, 6)
    changed = found.changes()["mamba"].squeeze()
    assert (abs(changed) > 1e-6).sel(edge=["2 <- 0", "2 <- 1", "2 <- 2"]).all()


def test_queries_after_the_last_reading_change_nothing(model_of_kind):
    metric = logit_difference(5, 6, position=1)
    found = knock_out_sweep(model_of_kind("hybrid"), TOKENS[0], metric, [(4, 0), (1, 0)], progress=False)
    for changes in found.changes().values():
        assert (changes.sel(edge="4 <- 0").fillna(0) == 0).all() and (abs(changes.sel(edge="1 <- 0")) > 0).any()


def test_when_nothing_reads_after_the_queries_nothing_runs(model_of_kind):
    found = knock_out_sweep(model_of_kind("hybrid"), TOKENS[0], logit_difference(5, 6, 0), [(3, 1)], progress=False)
    assert found.complete and (found.changes()["mamba"].sel(layer=[0, 2, 3]) == 0).all()


def test_stopped_it_keeps_what_is_done(model_of_kind):
    found = knock_out_sweep(
        model_of_kind("hybrid"), TOKENS[0], DIFFERENCE, EDGES, progress=lambda share, _: share < 0.3
    )
    assert not found.complete and found.values["mamba"].sel(layer=0).notnull().all()
    assert found.values["mamba"].sel(layer=3).isnull().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(edges=[(1, 2)]), "the key stands after its query"),
        (dict(edges=[(9, 2)]), "9 is not in a prompt of 5 tokens"),
        (dict(edges=[(2, 1), (2, 1)]), "is given twice"),
        (dict(edges=[]), "knocks out nothing"),
        (dict(edges=[3]), "must be a pair"),
        (dict(layers=[7]), "this model has layers 0..3"),
    ],
    ids=["order", "position", "twice", "none", "pair", "layer"],
)
def test_edges_that_cannot_be_are_refused(change, message, model_of_kind):
    given = dict(edges=EDGES, progress=False) | change
    with pytest.raises((HookError, InputError), match=message):
        knock_out_sweep(model_of_kind("hybrid"), TOKENS[0], DIFFERENCE, **given)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_screen_estimates_all_and_patches_the_largest(direction, model_of_kind):
    model = model_of_kind("hybrid")
    nodes = ["z", "mlp_out", Node("ssm_state", channels=8), Node("q", channels=3)]
    found = screen(model, *TOKENS, DIFFERENCE, nodes, top=7, positions=[4, 1, 2], direction=direction, progress=False)
    whole = patch_sweep(model, *TOKENS, DIFFERENCE, nodes, positions=[4, 1, 2], direction=direction, progress=False)
    base, source = TOKENS.flip(0) if direction == "denoise" else TOKENS
    true = attribution_patching(
        model, source, base, lambda x: (x[:, -1, 5] - x[:, -1, 6]).mean(), ["blocks.1.attn.hook_z"], positions=[1, 2, 4]
    ).estimates["blocks.1.attn.hook_z"]
    np.testing.assert_allclose(found.estimates["z"].sel(layer=1, position=[1, 2, 4]), true.values, rtol=1e-9)
    sizes = np.sort(np.concatenate([np.abs(e.values[~np.isnan(e.values)]) for e in found.estimates.values()]))
    patched = 0
    for name, values in found.true.values.items():
        there = values.notnull()
        patched += int(there[0, 0].sum())
        np.testing.assert_allclose(values.values[there], whole.values[name].values[there], rtol=1e-9)
        assert (np.abs(found.estimates[name].values[there[0, 0].values]) >= sizes[-7]).all()
    assert patched == 7 and -1 <= found.correlation <= 1


@pytest.mark.parametrize("component", ["mixer.hook_y", "z", "k"])
def test_groups_of_channels_are_the_sums_of_their_channels(component, model_of_kind):
    model = model_of_kind("hybrid")
    whole, groups, single = (
        next(iter(screen(model, *TOKENS, DIFFERENCE, node, top=1, progress=False).estimates.values()))
        for node in (Node(component), Node(component, channels=3), Node(component, channels=1))
    )
    np.testing.assert_allclose(groups.sum("channels", skipna=False), whole, rtol=1e-9)
    assert groups.sizes["channels"] == -(-single.sizes["channels"] // 3) > 1
    for group in range(groups.sizes["channels"]):
        own = single.isel(channels=slice(3 * group, 3 * group + 3)).sum("channels", skipna=False)
        np.testing.assert_allclose(groups.sel(channels=group), own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mixers", [("mamba", "mamba2"), ("mamba2", "mamba")])
def test_layers_may_differ_in_width(mixers):
    """The convolution of Mamba-2 is wider than that of Mamba."""
    shape = dict(d_model=16, d_vocab=29, d_inner=32, d_state=4, mamba_d_head=8, feed_forwards=("none",) * 2)
    torch.manual_seed(0)
    model, node = HookedJamba(JambaConfig(mixers=mixers, **shape)).double(), Node("mixer.hook_conv", channels=8)
    found = screen(model, *TOKENS, DIFFERENCE, node, top=3, progress=False)
    whole = patch_sweep(model, *TOKENS, DIFFERENCE, node, progress=False).values["mixer.hook_conv by 8 channels"]
    (values,) = found.true.values.values()
    assert values.notnull().sum() == 3 * values.sizes["pair"]
    np.testing.assert_allclose(values.values[values.notnull()], whole.values[values.notnull()], rtol=1e-9)
    narrow = whole.sel(layer=mixers.index("mamba"))
    assert narrow.isel(channels=slice(0, 4)).notnull().all() and narrow.isel(channels=slice(4, None)).isnull().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(nodes="expert_out"), "expert_out has no gradient of its own"),
        (dict(nodes=Node("ssm_state", window=1)), "has no gradient of its own"),
        (dict(positions="all"), "one by one"),
        (dict(metric=[DIFFERENCE, logit_difference(5, 7)]), "two are called"),
        (dict(top=0), "top=0 must be"),
    ],
    ids=["experts", "window", "positions", "metrics", "top"],
)
def test_what_cannot_be_screened_is_refused(change, message, model_of_kind):
    given = dict(clean=TOKENS[0], corrupted=TOKENS[1], metric=DIFFERENCE, progress=False) | change
    with pytest.raises((HookError, InputError), match=message):
        screen(model_of_kind("hybrid"), **given)

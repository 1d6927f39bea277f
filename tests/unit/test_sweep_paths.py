"""Path patching against its definition: three runs for each path, with everything between frozen by interventions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from jambascope.errors import HookError, InputError
from jambascope.hooks import run
from jambascope.hooks.interventions import AddDirection, Patch
from jambascope.hooks.patching import get_act_patch_direct_path
from jambascope.hooks.sweep import Metric, engine, logit_difference, path_patch, paths
from jambascope.hooks.sweep.nodes import expert_addend
from jambascope.hooks.sweep.recorded import Base

LENGTH = 5
DIFFERENCE = logit_difference(5, 6)
TWICE = Metric("twice", lambda logits, _: logits[:, 0, 7] - logits[:, 1, 6], (2, -1))
READ = {
    "logit_difference": lambda logits: logits[:, -1, 5] - logits[:, -1, 6],
    "twice": lambda logits: logits[:, 2, 7] - logits[:, -1, 6],
}
"""Metric -> the same of all logits."""
TOKENS = torch.randint(3, 29, (2, 2, LENGTH), generator=torch.Generator().manual_seed(3))
TOKENS[1, 1, :2] = TOKENS[0, 1, :2]
CLEAN, CORRUPTED = TOKENS


def caches(model):
    names = [name for name in model.hook_rows if name.startswith("blocks.")]
    return [model.run_with_cache(tokens, names_filter=names)[1] for tokens in (CLEAN, CORRUPTED)]


def sent(model, label, source, base, at):
    """The sender's patch at some positions, as interventions."""
    layer, component, unit = label[1:].split(" ")[0], label.split(" ")[1], label.split(" ")[2:]
    if component == "expert_out":
        change = expert_addend(source, int(layer), int(unit[0])) - expert_addend(base, int(layer), int(unit[0]))
        return int(layer), "mlp_out", AddDirection("mlp_out", int(layer), at, value=change[:, at])
    if component == "z":
        return (
            int(layer),
            "z",
            Patch.from_cache(model, source, "attn.hook_z", int(layer), positions=at, heads=int(unit[0])),
        )
    return int(layer), component, Patch.from_cache(model, source, component, int(layer), positions=at)


def by_hand(model, sender, receiver, source, base, through, prompts, places):
    """One path: what reaches the receiver with all else frozen, patched into a run of its own."""
    layer, component, patch = sent(model, sender, source, base, places[0])
    frozen = []
    for i, (mixer, feed) in enumerate(zip(model.config.mixers, model.config.feed_forwards, strict=True)):
        out = "attn_out" if mixer == "attention" else "mixer_out"
        if not (i == layer and component in (out, "z")):
            frozen.append(Patch.from_cache(model, base, out, i))
        if feed != "none" and not (i == layer and component == "mlp_out") and through == "stream":
            frozen.append(Patch.from_cache(model, base, "mlp_out", i))
    if receiver == "logits":
        return run(model, prompts, [*frozen, patch]).logits
    at, point, *unit = receiver[1:].split(" ")
    tail = {"in_proj": "mixer.hook_in_proj", "mlp_out": "hook_mlp_out"}.get(point, f"attn.hook_{point}")
    name = f"blocks.{at}.{tail}"
    if point == "mlp_out":
        frozen = [f for f in frozen if (f.component, f.layer) != ("mlp_out", int(at))]
    seen = run(model, prompts, [*frozen, patch], capture=[name]).cache
    heads = {"heads": int(unit[0])} if unit else {}
    return run(model, prompts, [Patch.from_cache(model, seen, tail, int(at), positions=places[1], **heads)]).logits


def naive(model, labels, receivers, through, direction, value, places):
    """[pair sender receiver], patched at ``places`` of senders and of receivers; NaN where both are the same."""
    source, base, prompts = *caches(model), CORRUPTED
    if direction == "noise":
        source, base, prompts = base, source, CLEAN
    found = np.full((2, len(labels), len(receivers)), np.nan)
    for i, sender in enumerate(labels):
        for j, receiver in enumerate(receivers):
            if receiver.split(" ")[:2] not in (
                sender.split(" ")[:2],
                [sender.split(" ")[0], "mlp_out"] * ("expert" in sender),
            ):
                logits = by_hand(model, sender, receiver, source, base, through, prompts, places)
                found[:, i, j] = value(logits).detach()
    return found


def check(model, metric, through, direction, positions=None, receiver_positions=None):
    """``path_patch`` of all senders to all receivers against its definition; what it found."""
    senders = ["z", "mixer_out", "mlp_out"] + ["expert_out"] * ("moe" in model.config.feed_forwards)
    found = path_patch(
        model, CLEAN, CORRUPTED, metric, senders, positions=positions, receiver_positions=receiver_positions,
        through=through, direction=direction, progress=False,
    )  # fmt: skip
    values, value = found.values["paths"].sel(metric=metric.name), READ[metric.name]
    places = [
        list(range(LENGTH)) if at is None else [p % LENGTH for p in ([at] if isinstance(at, int) else at)]
        for at in (positions, receiver_positions)
    ]
    expected = naive(model, values.sender.values, values.receiver.values, through, direction, value, places)
    there = values.notnull().values
    np.testing.assert_allclose(values.values[there], expected[there], rtol=1e-9, atol=1e-9)
    others = ~there & ~np.isnan(expected)  # what is left out could not matter
    unpatched = found.base.values[0][:, None, None]
    np.testing.assert_allclose(expected[others], np.broadcast_to(unpatched, there.shape)[others])
    assert found.complete and not there.all()
    return found


@pytest.mark.parametrize(
    ("kind", "through", "direction"),
    [
        ("hybrid", "stream", "denoise"),
        ("mamba2", "feed_forwards", "noise"),
        ("no-moe", "stream", "noise"),
        ("one-slot", "feed_forwards", "denoise"),
    ],
)
def test_every_path_is_what_three_runs_give(kind, through, direction, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 32)
    model = model_of_kind(kind)
    found = check(model, DIFFERENCE, through, direction)
    assert found.values["paths"][..., -1].notnull().all()


@pytest.mark.parametrize(
    ("kind", "through", "direction", "metric", "positions", "receiver_positions"),
    [
        ("hybrid", "stream", "denoise", DIFFERENCE, -1, -1),
        ("hybrid", "feed_forwards", "noise", TWICE, [4, 1], None),
        ("mamba2", "feed_forwards", "noise", TWICE, None, [-1, 1, 2]),
        ("one-slot", "stream", "denoise", TWICE, [0, 3], (4, 3, 2)),
    ],
    ids=["end", "senders", "receivers", "both"],
)
def test_at_positions_too(kind, through, direction, metric, positions, receiver_positions, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 32)
    monkeypatch.setattr(paths, "MOST_LOGITS", 300)
    found = check(model_of_kind(kind), metric, through, direction, positions, receiver_positions)
    moved = abs(found.changes()["paths"]) > 1e-9
    assert moved.any(("metric", "sender")).sum() > 2


def test_all_positions_are_the_default(model_of_kind):
    model = model_of_kind("hybrid")
    every, named = (
        path_patch(model, CLEAN, CORRUPTED, DIFFERENCE, progress=False, **where)
        for where in ({}, dict(positions=range(LENGTH), receiver_positions=torch.arange(-LENGTH, 0)))
    )
    assert every.values["paths"].equals(named.values["paths"])


def test_what_is_not_patched_is_not_kept(model_of_kind, monkeypatch):
    model, kept = model_of_kind("hybrid"), []
    original = Base.record

    def record(model, tokens, reads, starts, layers, further, *others):
        kept.append((list(starts), *(list(at) for of_run in (further, others[0].wanted) for at in of_run.values())))
        return original(model, tokens, reads, starts, layers, further, *others)

    monkeypatch.setattr(Base, "record", record)

    def swept(**options):
        return path_patch(model, CLEAN, CORRUPTED, DIFFERENCE, receivers=["q", "mlp_out"], progress=False, **options)

    def least(**options) -> int:
        with pytest.raises(InputError, match="max_bytes=1 is too little") as refusal:
            swept(max_bytes=1, **options)
        return int(re.search(r"give max_bytes=(\d+) or more", str(refusal.value))[1])

    where = dict(positions=[2, 3], receiver_positions=3)
    assert least(**where) == least(positions=3) < 0.7 * least()
    found = swept(**where)
    assert all(at == [3] for at in kept[0])
    little = swept(max_bytes=least(**where), **where)
    np.testing.assert_allclose(little.values["paths"], found.values["paths"], rtol=1e-9)
    assert len(kept) == 3, "one pair at a time"


def test_it_is_the_direct_path_of_transformer_lens(model_of_kind):
    model = model_of_kind("attention")
    clean, corrupted = (model.run_with_cache(tokens[:1])[1] for tokens in (CLEAN, CORRUPTED))
    found = path_patch(model, CLEAN[:1], CORRUPTED[:1], DIFFERENCE, "z", ["q", "k", "v"], layers=[0], progress=False)
    values = found.values["paths"].sel(metric="logit_difference", pair=0)
    for component, n in (("q", 4), ("k", 2), ("v", 2)):
        for head in range(4):
            theirs = get_act_patch_direct_path(
                model, CORRUPTED[:1], clean, corrupted, lambda x: x[0, -1, 5] - x[0, -1, 6], 0, head, component
            )
            ours = values.sel(sender=f"L0 z {head}", receiver=[f"L1 {component} {i}" for i in range(n)])
            np.testing.assert_allclose(ours, theirs[1].double(), rtol=1e-6)


def test_all_that_is_sent_to_the_logits_is_the_whole_effect_of_the_last_layer(model_of_kind):
    model = model_of_kind("hybrid")
    last = path_patch(
        model, CLEAN, CORRUPTED, DIFFERENCE, ["mixer_out", "mlp_out"], "logits", layers=[3], progress=False
    )
    assert last.table().shape[0] == 2 * 2 and list(last.values["paths"].receiver.values) == ["logits"]
    assert last.table()["effect"].notna().all()


def test_pairs_that_do_not_differ_have_no_effect(model_of_kind):
    found = path_patch(model_of_kind("hybrid"), CLEAN, CLEAN, DIFFERENCE, progress=False)
    changes = found.changes()["paths"]
    assert changes.sel(receiver="L1 q 0").notnull().any() and (abs(changes.fillna(0)) < 1e-12).all()


def test_stopped_it_keeps_what_is_done(model_of_kind):
    found = path_patch(model_of_kind("hybrid"), CLEAN, CORRUPTED, DIFFERENCE, progress=lambda share, _: share < 0.5)
    done = found.values["paths"].notnull()
    assert not found.complete and done.any() and not done.sel(receiver="logits").any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(senders="q"), "q does not write to the stream"),
        (dict(receivers="z"), "'z' must be one of q, k, v"),
        (dict(receivers=["q", "q"]), "'q' is given twice"),
        (dict(receivers=["q"], receiver_layers=[0]), r"no q among layers \[0\]"),
        (dict(receiver_layers=[9]), "this model has layers 0..3, not 9"),
        (dict(through="mlps"), "through='mlps' must be"),
        (dict(positions=5), "positions: 5 is not in a prompt of 5 tokens"),
        (dict(positions=[]), r"positions=\[\] patches nothing; leave it out"),
        (dict(positions="all"), "positions='all' must be a position, a list of positions, or None for all"),
        (dict(receiver_positions=1.5), "receiver_positions=1.5 must be a position"),
        (dict(receiver_positions=[4, -1]), r"receiver_positions=\[4, 4\] names a position twice"),
        (
            dict(receiver_positions=-1, metric=logit_difference(5, 6, 2)),
            "receiver_positions: 4 comes after 2, the last",
        ),
        (
            dict(positions=[1, 3], metric=logit_difference(5, 6, 2)),
            "positions: 3 comes after 2, the last position that",
        ),
        (dict(receiver_positions=[2, 3], metric=TWICE), r"\[2, 3\]: the logits are read .* at \[2, 4\]; add what"),
        (dict(positions=[1, 2], receiver_positions=[3, 4]), r"\[3, 4\]: nothing reaches them from positions=\[1, 2\]"),
        (dict(corrupted=CORRUPTED[:1]), "clean has 2 x 5 tokens and corrupted 1 x 5"),
    ],
    ids=[
        "sender",
        "receiver",
        "twice",
        "none",
        "layer",
        "through",
        "position",
        "no position",
        "all",
        "no whole number",
        "position twice",
        "unread receiver",
        "unread sender",
        "logits",
        "apart",
        "prompts",
    ],
)
def test_what_cannot_be_is_refused(change, message, model_of_kind):
    given = dict(clean=CLEAN, corrupted=CORRUPTED, metric=DIFFERENCE, progress=False) | change
    with pytest.raises((HookError, InputError), match=message):
        path_patch(model_of_kind("hybrid"), **given)

"""The sweep against the loop that it stands for: every cell as interventions of a run of its own."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import HookError, InputError
from jambascope.hook_table import hook_rows
from jambascope.hooks import run
from jambascope.hooks.sweep import (
    Metric,
    Node,
    SweepError,
    engine,
    interventions,
    kl_divergence,
    label_mass,
    logit_difference,
    memory,
    patch_sweep,
    targets,
)
from jambascope.hooks.sweep.engine import Engine
from jambascope.initialization import initialize
from jambascope.kernels import rms_norm
from jambascope.kernels.causal_conv import cpu as conv
from jambascope.kernels.experts import cpu as experts
from jambascope.kernels.selective_scan import cpu as scan

LENGTH = 6
DIFFERENCE = logit_difference(5, [6, 7])


@pytest.fixture(autouse=True)
def carried_on_wherever_it_can_be(monkeypatch):
    """Prompts are short here: rows would hardly go on from what the base run's scan read."""
    monkeypatch.setattr(memory, "ENOUGH_ALIKE", 0)


def pairs(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs that differ from the first token, and from the third."""
    tokens = torch.randint(3, 29, (2, 2, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens[1, 1, :2] = tokens[0, 1, :2]
    return tokens[0], tokens[1]


def read(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - torch.stack((logits[0, -1, 6], logits[1, -1, 7]))


def naive(model, node, positions, direction="denoise", metric=read):
    """[pair layer position cell], NaN in layers that lack the node."""
    clean, corrupted = pairs()
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    names = [name for name, row in model.hook_rows.items() if name.startswith("blocks.")]
    cached = [model.run_with_cache(tokens, names_filter=names)[1] for tokens in (source, base)]
    found = targets(model, node)
    values = np.full((2, model.config.n_layers, len(positions), max(t.cells for t in found)), np.nan)
    for target in found:
        for (i, cell), unit in itertools.product(enumerate(positions), range(target.cells)):
            patched = run(model, base, interventions(model, target, cell, unit, *cached)).logits
            values[:, target.layer, i, unit] = metric(patched).detach().numpy()
    return values


def swept(model, node, positions, **options) -> np.ndarray:
    found = patch_sweep(model, *pairs(), DIFFERENCE, node, positions=positions, progress=False, **options)
    assert found.complete
    (values,) = found.values.values()
    return values.sel(metric="logit_difference").values.reshape(2, model.config.n_layers, len(positions), -1)


def close(a: np.ndarray, b: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def tails(model: HookedJamba) -> list[str]:
    rows = {row.name.removeprefix("blocks.{L}.") for row in hook_rows(model.config).values() if row.name[0] == "b"}
    return sorted(rows - {"mlp.router.hook_expert_indices"})


@pytest.mark.parametrize(
    ("kind", "direction"), [("hybrid", "denoise"), ("mamba2", "noise"), ("one-slot", "noise")], ids=lambda v: v
)
def test_every_hook_point_is_patched_as_the_loop_does(kind, direction, model_of_kind, monkeypatch):
    monkeypatch.setattr(engine, "NEAR", 2)
    model, cells = model_of_kind(kind), [(0,), (3,), (4,)]
    for tail in tails(model):
        expected = naive(model, tail, cells, direction)
        found = swept(model, tail, cells, direction=direction)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=tail)


NODES = {
    "state and conv": Node("ssm_state", conv=True),
    "window of 1": Node("ssm_state", window=1),
    "window of 2 with conv": Node("ssm_state", window=2, conv=True),
    "groups of state channels": Node("ssm_state", channels=12, conv=True),
    "window of groups": Node("ssm_state", channels=12, window=2),
    "groups of one read-out": Node("ssm_read", channels=5),
    "groups of the stream": Node("resid_pre", channels=6),
    "groups of y": Node("y", channels=20),
    "groups of B": Node("mixer.hook_B", channels=3),
    "all heads together": Node("z", by=None),
    "groups of channels of each head": Node("z", channels=3),
    "groups of channels of each key head": Node("k", by="head", channels=3),
    "groups of channels of all heads": Node("q", by=None, channels=3),
    "groups of channels of what each head adds": Node("result", channels=5),
    "groups of channels of what each expert adds": Node("expert_out", channels=11),
    "router weight by expert": Node("expert_weights", by="expert"),
    "dt": "dt",
}


@pytest.mark.parametrize("node", NODES.values(), ids=list(NODES))
@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
def test_every_kind_of_node_is_patched_as_the_loop_does(kind, node, model_of_kind):
    model, cells = model_of_kind(kind), [(1,), (4,), (5,)]
    close(swept(model, node, cells), naive(model, node, cells))


@pytest.mark.parametrize("node", ["resid_pre", "mlp_out", "z", "pattern", "ssm_state", "expert_out", "x"])
@pytest.mark.parametrize("together", [[(0, 1, 2, 3, 4, 5)], [(1, 3), (2,), (4, 5)]], ids=["all", "some"])
def test_positions_patched_together(node, together, model_of_kind):
    model = model_of_kind("hybrid")
    given = "all" if len(together) == 1 else [p if len(p) > 1 else p[0] - LENGTH for p in together]
    found = patch_sweep(model, *pairs(), DIFFERENCE, node, positions=given, progress=False)
    (values,) = found.values.values()
    close(values.values[0].reshape(2, 4, len(together), -1), naive(model, node, together))
    assert values.position.values.tolist() == (["0..5"] if given == "all" else ["(1, 3)", "2", "4..5"])


@pytest.mark.parametrize(
    "node", ["resid_pre", "mlp_out", "z", "mixer_out", "expert_out", Node("ssm_state", window=1, conv=True)], ids=str
)
def test_cells_that_reach_beyond_the_last_reading(node, model_of_kind):
    model, together = model_of_kind("hybrid"), [(1, 5), (2, 3, 4), (4, 5), (0, 1, 2, 3, 4, 5)]
    early = logit_difference(5, [6, 7], position=3)
    found = patch_sweep(model, *pairs(), early, node, positions=together, progress=False)
    (values,) = found.values.values()
    expected = naive(
        model,
        node,
        together,
        metric=lambda logits: logits[:, 3, 5] - torch.stack((logits[0, 3, 6], logits[1, 3, 7])),
    )
    close(values.values[0].reshape(expected.shape), expected)


def test_numbers_of_any_kind_are_taken(model_of_kind):
    model, metric = model_of_kind("hybrid"), logit_difference(torch.tensor([5, 5]), np.int64(6))
    expected = patch_sweep(model, *pairs(), logit_difference(5, 6), layers=[0, 2], positions=[4, 1], progress=False)
    for positions, layers in ((np.array([4, 1]), np.array([2, 0])), (torch.tensor([4, 1]), (2, 0, 0))):
        found = patch_sweep(model, *pairs(), metric, layers=layers, positions=positions, progress=False)
        assert found.values["resid_pre"].equals(expected.values["resid_pre"])
    with_parameters = patch_sweep(
        model, *pairs(), lambda logits: logits[:, 0] @ model.W_U[0], layers=[0], positions=[4], progress=False
    )
    assert with_parameters.complete


@pytest.mark.parametrize("kind", ["attention", "no-attention", "no-moe"])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_other_models_and_other_batches(kind, width, model_of_kind, monkeypatch):
    monkeypatch.setattr(engine, "NEAR", width)
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 8 * width)
    model, cells = model_of_kind(kind), [(p,) for p in range(LENGTH)]
    for node in ("resid_pre", "resid_mid", "resid_post") if kind != "no-attention" else ("resid_pre", "ssm_state"):
        close(swept(model, node, None or [c[0] for c in cells]), naive(model, node, cells))


@pytest.mark.parametrize("fields", [dict(rotary=True), dict(d_conv=1), dict(inner_norms=False)], ids=str)
def test_models_with_one_thing_changed(fields):
    torch.manual_seed(1)
    shape = dict(d_model=16, d_vocab=29, n_heads=2, n_key_value_heads=1, d_head=8, d_mlp=12, num_experts=1, d_state=1)
    mixers = ("mamba", "attention", "mamba")
    model = HookedJamba(
        JambaConfig(mixers=mixers, feed_forwards=("dense",) * 3, d_inner=16, **shape, **fields), dtype="float64"
    )
    initialize(model, std=0.3)
    for node in ("resid_pre", "k", "ssm_state"):
        close(swept(model, node, range(LENGTH)), naive(model, node, [(p,) for p in range(LENGTH)]))
    if model.config.d_conv == 1:
        with pytest.raises(HookError, match="d_conv=1 a convolution remembers no inputs"):
            swept(model, Node("ssm_state", conv=True), [0])


def test_in_float32_it_is_as_near_as_the_loop(small_model):
    truth, cells = HookedJamba(small_model.config, dtype="float64"), [(p,) for p in range(LENGTH)]
    truth.load_state_dict(small_model.state_dict())
    exact = naive(truth, "resid_pre", cells)
    off = [
        np.abs(values - exact).max()
        for values in (swept(small_model, "resid_pre", range(6)), naive(small_model, "resid_pre", cells))
    ]
    assert off[0] <= 2 * off[1] + 1e-6


CHANNELS = [
    *("x", "dt", "mixer.hook_B", "mixer.hook_C", "gate", "in_proj", "conv", "mixer.hook_z", "conv_state", "hook_pre"),
    *("pre_linear", "post", "attn_out", "mixer_out", "mlp_out", "resid_mid", "resid_post", "ln1.hook_normalized"),
]
OPTIONS = [
    *(Node(component, channels=3 if component in ("mixer.hook_B", "mixer.hook_C") else 13) for component in CHANNELS),
    *(Node("ssm_state", window=window, conv=conv) for window in (None, 1, 2) for conv in (False, True)),
    *(Node("ssm_state", channels=20, window=window, conv=conv) for window in (None, 2) for conv in (False, True)),
    *(Node(component, by="expert") for component in ("router_logits", "expert_weights", "expert_out")),
    *(Node(component, by="head") for component in ("q", "k", "v", "attn.hook_z", "pattern", "attn_scores", "result")),
    *(Node(component, channels=3) for component in ("q", "v", "attn.hook_z", "result", "expert_out")),
    *(Node(component, by=None, channels=5) for component in ("k", "attn.hook_z")),
    *(Node(component, by=None) for component in ("q", "pattern", "attn.hook_z", "router_logits", "expert_weights")),
]


@functools.cache
def in_float32() -> HookedJamba:
    """A little hybrid whose layers run in compiled kernels."""
    shape = dict(d_model=16, d_vocab=29, n_heads=2, n_key_value_heads=1, d_head=8, d_mlp=20, num_experts=3, d_state=4)
    torch.manual_seed(2)
    config = JambaConfig(mixers=("mamba", "attention"), feed_forwards=("moe", "dense"), d_inner=32, dt_rank=2, **shape)
    model = HookedJamba(config)
    initialize(model, std=0.3)
    return model.eval()


@functools.cache
def in_float64() -> HookedJamba:
    """The same, exact enough to be the truth for it."""
    model = HookedJamba(in_float32().config, dtype="float64")
    model.load_state_dict(in_float32().state_dict())
    return model


EVERY_NODE = [*map(Node, tails(in_float32())), *OPTIONS]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("node", EVERY_NODE, ids=[node.name for node in EVERY_NODE])
def test_every_node_in_float32_is_as_near_the_truth_as_the_loop(node, direction):
    model, cells = in_float32(), [(2,), (5,)] if direction == "denoise" else [(3, 5)]
    expected, found = naive(model, node, cells, direction), swept(model, node, cells, direction=direction)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-6)  # as far as both are from float64
    exact = naive(in_float64(), node, cells, direction)
    off, of_loop = (np.nanmax(abs(values - exact)) for values in (found, expected))
    assert off <= 2 * of_loop + 5e-6 and (np.isnan(found) == np.isnan(exact)).all()
    base = read(model(pairs()[direction == "denoise"])).detach().numpy()
    assert np.nanmax(abs(expected - base[:, None, None, None])) > 1e-3  # there is something to find


@pytest.mark.parametrize("node", ["resid_pre", "mlp_out", "z", "ssm_state"])
def test_under_autocast(node):
    exact = swept(in_float32(), node, range(LENGTH))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = swept(in_float32(), node, range(LENGTH))
    known = np.isfinite(exact)
    assert np.array_equal(known, np.isfinite(found)) and not np.array_equal(exact[known], found[known])
    assert np.corrcoef(exact[known], found[known])[0, 1] > 0.95  # a router in bfloat16 chooses other experts at times


def test_in_float32_layers_run_in_compiled_kernels(monkeypatch):
    called = set()
    for module, name in ((scan, "selective_scan"), (conv, "_prepared"), (experts, "_few"), (rms_norm, "_over_rows")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name, **k: called.add(n) or f(*a, **k))
    swept(in_float32(), "resid_pre", [1])
    assert called == {"selective_scan", "_prepared", "_few", "_over_rows"}


def test_what_comes_before_the_first_difference_or_after_the_last_reading_costs_nothing(model_of_kind, monkeypatch):
    model = model_of_kind("hybrid")
    clean, corrupted = pairs()
    tokens = []
    original = Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda self, rows: tokens.extend(rows) or original(self, rows))
    metric = logit_difference(5, 6, position=4)
    found = patch_sweep(model, clean[1:], corrupted[1:], metric, progress=False)
    assert sorted({row.positions[0] for row in tokens}) == [2, 3, 4]
    still = found.values["resid_pre"].sel(position=[0, 1, 5]).values
    assert np.array_equal(still, np.broadcast_to(found.base.values[..., None, None], still.shape))
    assert (found.effects()["resid_pre"].sel(position=[0, 1, 5]) == 0).all()


def test_reading_several_positions_and_metrics(model_of_kind):
    model, (clean, corrupted) = model_of_kind("hybrid"), pairs()

    def late(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0, 3]

    spread = Metric("spread", lambda logits, at: logits[:, 0, 3] - at.rows(at.clean)[:, 1, 4], positions=(1, 3))
    found = patch_sweep(model, clean, corrupted, [late, spread, kl_divergence(2)], "mlp_out", progress=False)
    assert found.clean.metric.values.tolist() == ["late", "spread", "kl_divergence"]
    reference = model(clean)
    expected = naive(
        model, "mlp_out", [(p,) for p in range(6)], metric=lambda logits: logits[:, 1, 3] - reference[:, 3, 4]
    )[..., 0]
    close(found.values["mlp_out"].sel(metric="spread").values, expected)
    clean_log, corrupted_log = (logits[:, 2].log_softmax(-1) for logits in (reference, model(corrupted)))
    close(
        found.corrupted.sel(metric="kl_divergence").values,
        ((clean_log.exp() * (clean_log - corrupted_log)).sum(-1)).detach().numpy(),
    )


def test_a_whole_patch_is_one_and_a_pair_that_does_not_differ_has_no_share(model_of_kind):
    model, (clean, corrupted) = model_of_kind("hybrid"), pairs()
    clean, corrupted = torch.cat((clean, clean[:1])), torch.cat((corrupted, clean[:1]))
    found = patch_sweep(model, clean, corrupted, logit_difference(5, 6), positions="all", progress=False)
    effects = found.effects()["resid_pre"]
    assert np.allclose(effects.sel(layer=0, pair=[0, 1]), 1) and np.isnan(effects.sel(pair=2)).all()
    table = found.table()
    assert len(table) == 12 and table["effect"].isna().sum() == 4 and table["value"].notna().all()
    assert found.top(3)["effect"].abs().is_monotonic_decreasing


def test_stopped_it_keeps_what_is_done(model_of_kind, monkeypatch, tmp_path):
    model = model_of_kind("hybrid")
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    seen = []

    def stop(share, result):
        seen.append(share)
        return len(seen) < 4

    found = patch_sweep(model, *pairs(), DIFFERENCE, progress=stop)
    assert not found.complete and seen == sorted(seen) and 0 < seen[-1] < 1
    done = found.values["resid_pre"].notnull()
    assert done.any() and not done.all()
    found.save(tmp_path / "cells.parquet")
    original, calls = Engine.logits, []

    def interrupt(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(Engine, "logits", interrupt)
    found = patch_sweep(model, *pairs(), DIFFERENCE, progress=False)
    assert not found.complete and found.values["resid_pre"].notnull().any()


def test_a_metric_that_fails_at_a_cell_keeps_what_is_done(model_of_kind, monkeypatch):
    model, calls = model_of_kind("hybrid"), []
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)

    def odd(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return logits[:, 0, 5] * (float("nan") if len(calls) == 6 else 1.0)

    with pytest.raises(SweepError, match="odd is nan at resid_pre, pair 1, layer 0, position 2") as error:
        patch_sweep(model, *pairs(), odd, progress=False)
    assert error.value.result.values["resid_pre"].notnull().any()


CLEAN = torch.arange(3, 9)
REFUSED = {
    "lengths": (dict(corrupted=CLEAN[:5]), "clean has 1 x 6 tokens and corrupted 1 x 5 tokens"),
    "direction": (dict(direction="up"), "direction='up' must be 'denoise' or 'noise'"),
    "node": (dict(nodes="resid_prr"), "the nearest are"),
    "layer without": (dict(nodes="ssm_state", layers=[1]), "layer=1: layer 1 is an attention layer"),
    "route": (dict(nodes="expert_indices"), "patch router_logits or expert_weights"),
    "window": (dict(nodes=Node("resid_pre", window=2)), "window and conv are of ssm_state"),
    "channels": (dict(nodes=Node("pattern", channels=2)), "has no channels to group"),
    "heads' channels": (dict(nodes=Node("y", by="head", channels=2)), "has no heads"),
    "no heads": (dict(nodes=Node("resid_pre", by="head")), "has no heads"),
    "no layer": (dict(nodes="logits"), "belongs to no layer"),
    "twice": (dict(nodes=["z", "z"]), "'z' is given twice"),
    "experts' channels": (dict(nodes=Node("router_logits", channels=2)), "has no channels to group"),
    "no name": (dict(nodes=3), "nodes=3 must be a component's name"),
    "no layers": (dict(layers=[]), "holds nothing; leave it out"),
    "one layer": (dict(layers=1), "must be a list of layers"),
    "layer from the end": (dict(layers=[-1]), "this model has layers 0..3, not -1"),
    "bytes": (dict(max_bytes=0), "max_bytes=0 must be"),
    "labels": (dict(metric=label_mass("5")), "labels='5': give a list of different labels"),
    "labels twice": (dict(metric=label_mass([5, 5])), "a list of different labels"),
    "true": (dict(positions=[True]), "True is not in a prompt"),
    "readings": (
        dict(metric=Metric("odd", lambda logits, at: logits[:, 0, 0], positions=())),
        "odd: positions=.. must",
    ),
    "no node": (dict(nodes=[]), "nodes=.. holds nothing"),
    "position": (dict(positions=[6]), "6 is not in a prompt of 6 tokens"),
    "positions": (dict(positions=[(1, 1)]), "names nothing, or something twice"),
    "token": (dict(metric=logit_difference(5, 99)), "wrong=99: 99 is no token; ids run from 0 to 28"),
    "tokens": (dict(metric=logit_difference([5, 6], 7)), "one for each of the 1 prompt pairs"),
    "metric": (dict(metric=3), "must be a Metric, a function of logits"),
    "two arguments": (dict(metric=lambda logits, at: logits[:, 0, 0]), "must take the logits alone"),
    "names": (dict(metric=[DIFFERENCE, DIFFERENCE]), "two are called 'logit_difference'"),
    "nan": (dict(metric=lambda logits: logits[:, 0, 0] * float("nan")), "is nan in the clean run of pair 0"),
    "shape": (dict(metric=lambda logits: logits[0, 0, 0]), r"gave \(\) for 1 rows"),
    "read": (dict(metric=logit_difference(5, 6, position=9)), "9 is not in a prompt of 6 tokens"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_is_refused(change, message, model_of_kind):
    given = dict(clean=CLEAN, corrupted=CLEAN.flip(0), metric=logit_difference(5, 6), nodes="resid_pre", progress=False)
    given |= change
    with pytest.raises((InputError, HookError), match=message):
        patch_sweep(model_of_kind("hybrid"), **given)


def test_hooks_that_are_attached_are_not_forgotten(model_of_kind):
    model = model_of_kind("hybrid")
    with model.hooks([("hook_embed", lambda value, hook: None)]), pytest.raises(InputError, match="has hooks attached"):
        patch_sweep(model, *pairs(), DIFFERENCE, progress=False)

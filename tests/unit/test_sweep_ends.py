"""How sweeps end: Ctrl-C at any moment, metrics that fail, memory and locks, on all of their kinds."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
import torch
import transformer_lens.hook_points

from jambascope import HookedJamba
from jambascope.hook_point import HookPoint
from jambascope.hooks.sweep import (
    SweepError,
    engine,
    knock_out_sweep,
    logit_difference,
    patch_sweep,
    path_patch,
    screen,
)
from jambascope.norms import RMSNorm

LENGTH = 5
DIFFERENCE = logit_difference(5, 6)
CLEAN, CORRUPTED = torch.randint(3, 29, (2, 2, LENGTH), generator=torch.Generator().manual_seed(3))

SWEEPS = {
    "patches": lambda model, metric, **options: patch_sweep(
        model, CLEAN, CORRUPTED, metric, ["resid_pre", "z", "mlp_out"], **options
    ),
    "paths": lambda model, metric, **options: path_patch(model, CLEAN, CORRUPTED, metric, **options),
    "knock-outs": lambda model, metric, **options: knock_out_sweep(model, CLEAN, metric, **options),
}


@pytest.fixture(params=SWEEPS)
def sweep(request):
    return SWEEPS[request.param]


def hooks_of(model) -> int:
    return sum(len(point._forward_hooks) + len(point.fwd_hooks) for point in model.hook_dict.values())


def test_interrupted_before_anything_is_known_it_is_empty(sweep, model_of_kind, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedJamba, "_run", interrupted)
    found = sweep(model_of_kind("hybrid"), DIFFERENCE, progress=False)
    assert not found.complete and found.clean.isnull().all() and found.table().empty


def test_what_was_not_reached_is_nan(sweep, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 1)
    model, shares = model_of_kind("hybrid"), []
    found = sweep(model, DIFFERENCE, progress=lambda share, _: shares.append(share) or len(shares) < 6)
    whole = sweep(model, DIFFERENCE, progress=False)
    reached = sum(int(values.notnull().sum()) for values in found.values.values())
    assert 0 < reached <= 6 and not found.complete and shares == sorted(shares)
    for name, values in found.values.items():
        there = values.notnull().values
        np.testing.assert_allclose(values.values[there], whole.values[name].values[there], rtol=1e-9)


def test_a_result_so_far_does_not_change_later(sweep, model_of_kind):
    seen = []
    sweep(model_of_kind("hybrid"), DIFFERENCE, progress=lambda _, result: seen.append(result))
    first = sum(int(values.notnull().sum()) for values in seen[0].values.values())
    assert first < sum(int(values.notnull().sum()) for values in seen[-1].values.values())


def test_a_metric_that_fails_somewhere_keeps_what_is_done(sweep, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    calls = []

    def odd(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return logits[:, 0, 5] * (float("nan") if len(calls) == 6 else 1.0)

    with pytest.raises(SweepError, match=r"odd is nan at .*, pair \d, (layer|sender)") as error:
        sweep(model_of_kind("hybrid"), odd, progress=False)
    assert any(values.notnull().any() for values in error.value.result.values.values())


def test_every_part_of_the_model_runs_behind_its_lock(sweep, model_of_kind, monkeypatch):
    model, original = model_of_kind("hybrid"), RMSNorm.forward
    held = []

    def forward(self, x):
        held.append(model._lock._is_owned())
        return original(self, x)

    monkeypatch.setattr(RMSNorm, "forward", forward)
    sweep(model, DIFFERENCE, progress=False)
    assert len(held) > 10 and all(held)


def test_two_threads_sweep_one_model(sweep, model_of_kind):
    model, found = model_of_kind("hybrid"), {}
    expected = sweep(model, DIFFERENCE, progress=False)
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, sweep(model, DIFFERENCE, progress=False)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for name, values in expected.values.items():
            np.testing.assert_allclose(found[i].values[name], values, rtol=1e-9)


@pytest.mark.parametrize("moment", ["attached", "between torch and TransformerLens", "taken off"])
def test_ctrl_c_leaves_no_hooks(moment, model_of_kind, monkeypatch):
    model, expected = model_of_kind("hybrid"), None
    expected = model(CLEAN)
    calls = []

    def interrupted(original, at):
        def function(*args, **kwargs):
            calls.append(at)
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return function

    where = {
        "attached": (HookPoint, "add_hook", 2),
        "between torch and TransformerLens": (transformer_lens.hook_points, "LensHandle", 2),
        "taken off": (HookPoint, "remove_hooks", 5),
    }
    owner, name, at = where[moment]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted(getattr(owner, name), at))
        found = patch_sweep(model, CLEAN, CORRUPTED, DIFFERENCE, ["resid_pre", "z"], progress=False)
    assert len(calls) >= at and not found.complete
    assert not hooks_of(model) and model.context_level == 0
    assert torch.equal(model(CLEAN), expected)


@pytest.mark.parametrize("kind", ["no-attention", "attention"])
def test_by_default_a_question_is_about_what_the_model_has(kind, model_of_kind):
    model = model_of_kind(kind)
    senders = path_patch(model, CLEAN, CORRUPTED, DIFFERENCE, progress=False).values["paths"].sender.values
    estimates = screen(model, CLEAN, CORRUPTED, DIFFERENCE, top=3, progress=False).estimates
    assert {label.split()[1] for label in senders} == set(estimates)
    assert set(estimates) == ({"mixer_out"} if kind == "no-attention" else {"z", "mlp_out"})
    only = path_patch(model, CLEAN, CORRUPTED, DIFFERENCE, layers=[1], progress=False).values["paths"].sender.values
    assert {label[:2] for label in only} == {"L1"}


def test_a_screen_patches_as_many_as_it_was_told(model_of_kind):
    corrupted = CLEAN.clone()
    corrupted[:, -1] = CORRUPTED[:, -1]
    found = screen(model_of_kind("hybrid"), CLEAN, corrupted, DIFFERENCE, "resid_pre", top=6, progress=False)
    assert (found.estimates["resid_pre"].values != 0).sum() == 4  # of 20: the last position of each layer
    assert found.true.values["resid_pre"].notnull().sum() == 6 * len(CLEAN)


@pytest.mark.parametrize("component", ["resid_pre", "z", "pattern", "k", "mlp_out", "ssm_state", "dt", "router_logits"])
def test_between_close_runs_the_screen_is_right(component, model_of_kind):
    """Where two tokens are almost the same vector, effects are what the gradient says."""
    model = model_of_kind("hybrid")
    weight = model.embed.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            near = 1e-5 * torch.randn(model.config.d_model, generator=generator, dtype=torch.float64)
            model.embed.weight[4] = model.embed.weight[3] + near
        clean, corrupted = CLEAN[:1].clone(), CLEAN[:1].clone()
        clean[0, 1], corrupted[0, 1] = 3, 4
        found = screen(model, clean, corrupted, DIFFERENCE, component, top=1000, progress=False)
        (estimate,), (true,) = found.estimates.values(), found.true.changes().values()
        error, size = np.nanmax(abs(estimate.values - true.values[0, 0])), np.nanmax(abs(true.values))
        assert size > 1e-9 and error < 1e-3 * size
    finally:
        with torch.no_grad():
            model.embed.weight.copy_(weight)


def test_what_is_saved_is_the_table(model_of_kind, tmp_path):
    model = model_of_kind("hybrid")
    for i, positions in enumerate((None, [(0, 1), 3])):
        found = patch_sweep(
            model, CLEAN, CORRUPTED, DIFFERENCE, ["z", "resid_pre"], positions=positions, progress=False
        )
        found.save(tmp_path / f"{i}.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{i}.parquet"), found.table(), check_dtype=False)
    assert found.top(3, "logit_difference").shape[0] == 3

"""``max_bytes`` of sweeps: what is kept stays within it, and does not change what is found."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest
import torch

from jambascope.errors import InputError
from jambascope.hooks.sweep import (
    Metric,
    Node,
    knock_out_sweep,
    logit_difference,
    memory,
    patch_sweep,
    path_patch,
    screen,
)
from jambascope.hooks.sweep.engine import Engine
from jambascope.mamba import MambaMixer

LENGTH, PAIRS = 6, 3
TOKENS = torch.randint(3, 29, (2, PAIRS, LENGTH), generator=torch.Generator().manual_seed(3))
TOKENS[1, 1, :3] = TOKENS[0, 1, :3]
TOKENS[1, 2] = TOKENS[0, 2]  # a pair that does not differ
OWN = torch.arange(PAIRS, dtype=torch.float64)
METRICS = [
    logit_difference([5, 6, 7], [10, 11, 12]),
    Metric(
        "own", lambda logits, at: logits[:, 1, 4] * at.rows(OWN) - at.rows(at.clean)[:, 0, 3] + OWN[at.pair], (2, -2)
    ),
]

SWEEPS = {
    "patches": lambda model, **options: patch_sweep(
        model,
        *TOKENS,
        METRICS,
        ["pattern", "mlp_out", Node("ssm_state", window=2, conv=True)],
        positions=[1, 4],
        **options,
    ),
    "streams": lambda model, **options: patch_sweep(
        model, *TOKENS, METRICS, "resid_pre", positions=[0, 2, (1, 3), 4], **options
    ),
    "noise": lambda model, **options: patch_sweep(
        model, *TOKENS, METRICS, ["z", "expert_out"], positions=[(1, 2), 4, 5], direction="noise", **options
    ),
    "paths": lambda model, **options: path_patch(
        model, *TOKENS, METRICS, ["z", "expert_out"], ["in_proj", "mlp_out", "logits"], layers=[1], **options
    ),
    "paths at": lambda model, **options: path_patch(
        model,
        *TOKENS,
        METRICS,
        ["z", "expert_out"],
        ["in_proj", "mlp_out"],
        layers=[1],
        positions=[2, 5],
        receiver_positions=[1, 5],
        **options,
    ),
    "knock-outs": lambda model, **options: knock_out_sweep(
        model, TOKENS[0], METRICS, [(5, 0), (5, 2), (4, 4)], **options
    ),
    "screen": lambda model, **options: (
        screen(model, *TOKENS, METRICS[0], ["resid_pre", "ssm_state"], top=15, **options).true
    ),
}


def least(sweep, model) -> int:
    """What one pair needs, as the refusal says."""
    with pytest.raises(InputError, match=r"max_bytes=1 is too little: .* keeps \d+ bytes with one pair") as refusal:
        sweep(model, progress=False, max_bytes=1)
    return int(re.search(r"give max_bytes=(\d+) or more", str(refusal.value))[1])


def held() -> dict[int, int]:
    """Every storage that a tensor holds, and its bytes."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("times", [1, 2.5])
@pytest.mark.parametrize("name", SWEEPS)
def test_what_is_kept_stays_within_the_budget(name, times, model_of_kind, monkeypatch):
    model, sweep, kept, calls = model_of_kind("hybrid"), SWEEPS[name], [], []
    whole = sweep(model, progress=False)
    budget = int(times * least(sweep, model))
    gc.collect()  # or addresses of what is garbage now would be taken again, and not be counted
    original, before = Engine.logits, held()

    def logits(self, rows):
        calls.append(rows)
        if len(calls) % 7 == 1 and len(kept) < 6:
            kept.append(sum(size for at, size in held().items() if at not in before))
        return original(self, rows)

    monkeypatch.setattr(Engine, "logits", logits)
    little = sweep(model, progress=False, max_bytes=budget)
    assert little.complete and 0.2 * budget < max(kept) <= budget
    for of_node, values in whole.values.items():
        np.testing.assert_allclose(little.values[of_node], values, rtol=1e-9)
    np.testing.assert_allclose(little.clean, whole.clean, rtol=1e-9)


@pytest.mark.parametrize("name", SWEEPS)
def test_too_little_is_refused_before_anything_runs(name, model_of_kind, monkeypatch):
    model = model_of_kind("hybrid")
    monkeypatch.setattr(type(model), "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(InputError, match="give max_bytes=.* or more, shorter prompts, fewer pairs, or fewer positions"):
        SWEEPS[name](model, progress=False, max_bytes=1000)


@pytest.mark.parametrize(("pairs", "most"), [(40, 3), (3, 1)], ids=["few pairs at a time", "one"])
def test_the_budget_grows_with_pairs_only_by_their_logits(pairs, most, model_of_kind, monkeypatch):
    """As many pairs as one likes: more of them at a time where there is memory for more."""
    model, batches = model_of_kind("hybrid"), []
    tokens = torch.randint(3, 29, (2, pairs, LENGTH), generator=torch.Generator().manual_seed(4))
    tokens[1, :, 0] = tokens[0, :, 0] - 1
    original = type(model)._run
    monkeypatch.setattr(
        type(model), "_run", lambda self, t, *a, **k: batches.append(len(t)) or original(self, t, *a, **k)
    )

    def swept(n: int, max_bytes: int):
        return patch_sweep(
            model, *tokens[:, :n], logit_difference(5, 6), "resid_pre", positions=[0], layers=[1], progress=False,
            max_bytes=max_bytes,
        )  # fmt: skip

    one = least(lambda *_, **options: swept(1, options["max_bytes"]), model)
    logits = 2 * 29 * 8
    found = swept(pairs, pairs * logits + most * (one - logits))
    assert max(batches) == 2 * most and sum(batches) == 2 * pairs and found.complete  # both runs in one pass


def test_what_scans_read_is_kept_where_there_is_memory_for_it(model_of_kind, monkeypatch):
    model, sweep, carried = model_of_kind("hybrid"), SWEEPS["streams"], []
    original = MambaMixer.carry_on
    monkeypatch.setattr(memory, "ENOUGH_ALIKE", 0)
    monkeypatch.setattr(MambaMixer, "carry_on", lambda *given: carried.append(1) or original(*given))
    whole = sweep(model, progress=False)
    assert carried
    carried.clear()
    monkeypatch.setattr(memory, "ENOUGH_ALIKE", 0.25)
    sweep(model, progress=False)
    assert not carried, "in a short prompt little is like the base run"
    monkeypatch.setattr(memory, "ENOUGH_ALIKE", 0)
    little = sweep(model, progress=False, max_bytes=least(sweep, model))
    assert not carried
    np.testing.assert_allclose(little.values["resid_pre"], whole.values["resid_pre"], rtol=1e-9)

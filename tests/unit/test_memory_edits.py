"""Erasing and pinning states: what the edits do against the recurrence, and against interventions written by hand."""

from __future__ import annotations

import pytest
import torch

from jambascope.errors import InputError
from jambascope.hooks import run, ssm
from jambascope.hooks.interventions import PinState, ZeroAblation
from jambascope.hooks.memory_edits import memory_edits

TOKENS = torch.tensor([[1, 5, 9, 30, 5, 9, 30, 11]])
STATE, CONV = "blocks.0.mixer.hook_ssm_state", "blocks.0.mixer.hook_conv_state"


@torch.no_grad()
def logits(model, edits=()):
    return run(model, TOKENS, edits).logits[0]


def test_erasing_all_layers_is_pinning_them_to_zero(small_model):
    layers = small_model.config.ssm_layers
    edits = memory_edits(small_model, TOKENS, None, 3, conv=True)
    assert edits == [PinState(layer, 3, 0.0, conv=0.0) for layer in layers]
    changed = logits(small_model, edits) - logits(small_model)
    assert changed[:3].abs().max() == 0 and changed[3:].abs().amax(-1).min() > 0


def test_one_read_out_changes_one_layers_output_once(small_model):
    edits = memory_edits(small_model, TOKENS, [0], 3, lasting=False)
    torch.testing.assert_close(
        logits(small_model, edits), logits(small_model, [ZeroAblation("ssm_read", 0, positions=3)])
    )
    with torch.no_grad():
        before, after = (run(small_model, TOKENS, e, capture="blocks.0.mixer.hook_y").cache for e in ((), edits))
    moved = (before["blocks.0.mixer.hook_y"] - after["blocks.0.mixer.hook_y"])[0].abs().amax(-1)
    assert moved[3] > 0 and moved.sum() == moved[3]


@pytest.mark.parametrize("source", [1, 6], ids=["earlier", "later"])
@pytest.mark.parametrize("conv", [False, True])
def test_a_pinned_memory_is_that_of_the_other_position(small_model, source, conv):
    edits = memory_edits(small_model, TOKENS, [0], 3, source=source, conv=conv)
    with torch.no_grad():
        before, after = (run(small_model, TOKENS, e, capture=[STATE, CONV]).cache for e in ((), edits))
    torch.testing.assert_close(after[STATE][:, :, 3], before[STATE][:, :, source])
    torch.testing.assert_close(after[CONV][:, 3], before[CONV][:, source if conv else 3])


def test_one_read_out_of_another_position(small_model):
    edits = memory_edits(small_model, TOKENS, [0], 3, source=1, lasting=False)
    with torch.no_grad():
        clean = run(small_model, TOKENS, capture=[STATE, "blocks.0.mixer.hook_C"]).cache
        found = run(small_model, TOKENS, edits, capture=["blocks.0.mixer.hook_y", "blocks.0.mixer.hook_x"]).cache
    skip = small_model.blocks[0].mixer.D * found["blocks.0.mixer.hook_x"][0, 3]
    y = torch.einsum("en,n->e", clean[STATE][0, :, 1], clean["blocks.0.mixer.hook_C"][0, 3]) + skip
    torch.testing.assert_close(found["blocks.0.mixer.hook_y"][0, 3], y)


def test_a_group_is_that_of_its_own_layer(small_model):
    edits = memory_edits(small_model, TOKENS, None, 3, group=7)
    for edit, layer in zip(edits, small_model.config.ssm_layers, strict=True):
        captured = ssm.capture_states(small_model, TOKENS, layer)
        slowest = ssm.channel_groups(ssm.half_life(captured.A, captured.dt))[7]
        assert edit.channels == tuple(sorted(slowest.tolist()))
    with torch.no_grad():
        kept = run(small_model, TOKENS, edits[:1], capture=STATE).cache[STATE][0, :, 3]
    assert sorted((kept == 0).all(-1).nonzero()[:, 0].tolist()) == list(edits[0].channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1]}, "layer=1 is not a Mamba layer"),
        ({"position": 8}, "position=8 must be a position in 0..7"),
        ({"source": -1}, "source=-1 must be"),
        ({"group": 8}, "group=8: layer 0 has groups 0..7"),
        ({"conv": True, "lasting": False}, "conv=True"),
    ],
)
def test_mistakes_are_named(small_model, options, message):
    with pytest.raises(InputError, match=message):
        memory_edits(small_model, TOKENS, **{"layers": [0], "position": 3} | options)

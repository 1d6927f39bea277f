"""The trainer: it learns, it resumes to the same weights, it refuses what makes no sense."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from jambascope import files
from jambascope.config import JambaConfig
from jambascope.errors import CheckpointError, ConfigError
from jambascope.model import HookedJamba
from jambascope.training import CHECKPOINT, LOG, TrainingSpec, decays, fit, make_optimizer

SPEC = TrainingSpec(steps=6, learning_rate=1e-2, warmup_steps=2, checkpoint_every=2, evaluate_every=3)


def tiny(**changes) -> HookedJamba:
    """Five layers: attention at layer 4, experts at 1 and 3."""
    fields = dict(n_layers=5, d_model=16, d_vocab=12, d_mlp=8, num_experts=4, d_state=4, n_heads=2, d_head=8) | changes
    torch.manual_seed(0)
    return HookedJamba(JambaConfig.jamba(**fields))


def batch(step: int) -> torch.Tensor:
    """Counting upwards from anywhere, so that the next token is a function of the last one."""
    start = np.random.default_rng(step).integers(12, size=(4, 1))
    return torch.as_tensor((start + np.arange(10)) % 12)


def weights(model: HookedJamba) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_loss_falls(tmp_path):
    log = fit(tiny(), dataclasses.replace(SPEC, steps=60), batch, tmp_path)
    assert log[0]["lm"] > 2.2  # log(12) = 2.48: it starts knowing nothing
    assert log[-1]["lm"] < 1.0
    assert [row["step"] for row in log] == list(range(60))


@pytest.mark.parametrize("killed_in", [3, 5], ids=["between checkpoints", "last interval"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, killed_in):
    whole = tiny()
    fit(whole, SPEC, batch, tmp_path / "whole")

    def dies(step: int) -> torch.Tensor:
        if step == killed_in:
            raise KeyboardInterrupt
        return batch(step)

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), SPEC, dies, tmp_path / "killed")
    torch.manual_seed(1)
    resumed = HookedJamba(whole.config)  # other weights: all must come from the checkpoint
    seen = []
    log = fit(resumed, SPEC, lambda step: seen.append(step) or batch(step), tmp_path / "killed", resume=True)

    assert seen[0] == killed_in - killed_in % 2
    assert len(log) == SPEC.steps
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name
    expected = load_file(tmp_path / "whole" / CHECKPOINT)  # AdamW's moments as well
    found = load_file(tmp_path / "killed" / CHECKPOINT)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model = tiny()
    log = fit(model, SPEC, batch, tmp_path)
    again = tiny()
    assert fit(again, SPEC, batch, tmp_path, resume=True) == log
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(model).items())


def test_the_log_holds_losses_and_evaluations(tmp_path):
    model = tiny()
    fit(model, SPEC, batch, tmp_path, evaluate=lambda m: {"parameters": sum(p.numel() for p in m.parameters())})
    table = pq.read_table(tmp_path / LOG).to_pydict()
    assert table["step"] == list(range(6))
    assert all(loss > 0 for loss in table["loss"])
    assert [value is not None for value in table["parameters"]] == [False, False, True, False, False, True]
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, LOG]  # no temporary file stays
    assert not model.training


def by_step(values: dict[int, float]):
    """An evaluation that gives these numbers one after another."""
    left = iter(values.values())
    return lambda model: {"held_out": next(left)}


FALLS_THEN_RISES = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.3, 10: 0.1, 12: 0.1}


@pytest.mark.parametrize(
    ("patience", "values", "steps"),
    [
        (1, FALLS_THEN_RISES, 6),
        (2, FALLS_THEN_RISES, 8),
        (3, FALLS_THEN_RISES, 12),
        (None, {step: 1.0 for step in range(2, 14, 2)}, 12),
        (1, {2: 0.5, 4: 0.5}, 4),
        (1, {step: 1 / step for step in range(2, 14, 2)}, 12),
    ],
    ids=["one", "an equal is no better", "a later minimum", "none", "never better", "always better"],
)
def test_patience_ends_the_run(tmp_path, patience, values, steps):
    spec = dataclasses.replace(SPEC, steps=12, evaluate_every=2, checkpoint_every=5, patience=patience)
    model, seen = tiny(), []
    log = fit(model, spec, batch, tmp_path, by_step(values), after_step=seen.append)
    assert len(log) == steps and seen == list(range(steps + 1))
    assert not model.training
    # What ended early has a checkpoint of its last step, and does not go on when resumed.
    again = tiny()
    found = fit(again, spec, batch, tmp_path, by_step({}), resume=True, after_step=seen.append)
    assert [{key: value for key, value in row.items() if value is not None} for row in found] == log
    assert seen == list(range(steps + 1))
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(model).items())


def test_patience_watches_another_number(tmp_path):
    spec = dataclasses.replace(SPEC, evaluate_every=1, patience=1, watch="error")
    assert len(fit(tiny(), spec, batch, tmp_path, lambda model: {"error": 1.0, "held_out": 0.0})) == 2


def test_patience_without_its_number_is_refused(tmp_path):
    spec = dataclasses.replace(SPEC, patience=1)
    with pytest.raises(ConfigError, match="patience=1 needs an evaluation that gives 'held_out'; pass evaluate"):
        fit(tiny(), spec, batch, tmp_path)
    with pytest.raises(ConfigError, match="watch='held_out': the evaluation gives no such number"):
        fit(tiny(), spec, batch, tmp_path, lambda model: {"loss of another name": 1.0})


def test_after_step_sees_the_weights_of_each_step(tmp_path):
    model, seen = tiny(), {}
    start = weights(model)
    fit(model, SPEC, batch, tmp_path, after_step=lambda step: seen.setdefault(step, weights(model)))
    assert list(seen) == list(range(7))
    embeds = [of_step["embed.weight"] for of_step in seen.values()]
    assert torch.equal(embeds[0], start["embed.weight"]) and torch.equal(embeds[6], model.embed.weight)
    assert not any(torch.equal(one, next_) for one, next_ in zip(embeds, embeds[1:], strict=False))


def test_after_a_kill_the_steps_since_the_checkpoint_come_again(tmp_path):
    def dies(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), SPEC, batch, tmp_path, after_step=dies)
    seen = []
    fit(tiny(), SPEC, batch, tmp_path, resume=True, after_step=seen.append)
    assert seen == [3, 4, 5, 6]


def test_evaluation_sees_no_training_mode(tmp_path):
    seen = []
    fit(tiny(), SPEC, batch, tmp_path, evaluate=lambda m: seen.append((m.training, torch.is_grad_enabled())) or {})
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed.weight", True),
        ("blocks.0.mixer.in_proj.weight", True),
        ("blocks.1.mlp.gate_up_proj", True),
        ("blocks.0.mixer.A_log", False),
        ("blocks.0.mixer.D", False),
        ("blocks.0.mixer.dt_proj.bias", False),
        ("blocks.0.mixer.b_layernorm.weight", False),
        ("blocks.4.ln1.weight", False),
        ("ln_final.weight", False),
    ],
)
def test_only_matrices_decay(name, expected):
    model = tiny()
    parameter = dict(model.named_parameters())[name]
    assert decays(name, parameter) is expected
    optimizer = make_optimizer(model, SPEC)
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    assert group["weight_decay"] == (0.1 if expected else 0.0)


def test_every_parameter_is_trained_once():
    model = tiny(tie_embeddings=True)
    trained = [p for group in make_optimizer(model, SPEC).param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted({id(p) for p in model.parameters()})


def test_learning_rate_rises_then_falls():
    spec = TrainingSpec(steps=100, learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [spec.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert spec.learning_rate_at(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("steps", 0, "whole number of at least 1"),
        ("steps", 2.5, "whole number"),
        ("seed", -1, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("learning_rate", 0.0, "positive"),
        ("final_fraction", 1.5, r"lie in \[0, 1\]"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("weight_decay", -0.1, "0 \\(none\\) or positive"),
        ("clip_norm", 0.0, "positive"),
        ("evaluate_every", 0, "at least 1"),
        ("checkpoint_every", True, "whole number"),
        ("patience", 0, "at least 1, or None"),
        ("patience", 1.5, "whole number"),
    ],
)
def test_a_senseless_spec_is_refused(field, value, remedy):
    with pytest.raises(ConfigError, match=remedy) as error:
        TrainingSpec(**{"steps": 1, field: value})
    assert str(error.value).startswith(f"{field}={value!r}: ")


@pytest.mark.parametrize(
    ("changes", "model_changes", "part"),
    [({"learning_rate": 1e-3}, {}, "spec"), ({"seed": 5}, {}, "spec"), ({}, {"d_mlp": 16}, "config")],
    ids=["learning rate", "seed", "model"],
)
def test_resuming_another_run_is_refused(tmp_path, changes, model_changes, part):
    fit(tiny(), SPEC, batch, tmp_path)
    with pytest.raises(CheckpointError, match=f"another {part}.*another directory"):
        fit(tiny(**model_changes), dataclasses.replace(SPEC, **changes), batch, tmp_path, resume=True)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    fit(tiny(), SPEC, batch, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="remove it"):
        fit(tiny(), SPEC, batch, tmp_path, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.ln_final.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"learning_rate=0.01: the loss became nan at step 0"):
        fit(model, SPEC, batch, tmp_path)


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = tiny()
    fit(model, SPEC, batch, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), SPEC, batch, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before

"""`zoo train` on a tiny recipe: the finished directory, kills, reruns, snapshots, the command line."""

from __future__ import annotations

import dataclasses
import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from jambascope import HookedJamba, JambaConfig
from jambascope.cli import zoo_app
from jambascope.errors import CheckpointError, ConfigError
from jambascope.training import CHECKPOINT, LOG, TrainingSpec
from jambascope.zoo import progress, recipes, train
from jambascope.zoo.recipes import Recipe, Stage
from jambascope.zoo.words import EOS, VOCABULARY

TINY = Recipe(
    about="tiny",
    config=JambaConfig.jamba(
        n_layers=2, attn_layer_period=2, attn_layer_offset=1, d_model=16, d_vocab=len(VOCABULARY), n_heads=2, d_head=8,
        d_mlp=8, num_experts=4, d_state=4, bos_token_id=1, eos_token_ids=(EOS,), pad_token_id=0,
    ),
    spec=TrainingSpec(steps=6, learning_rate=1e-2, warmup_steps=1, evaluate_every=2, checkpoint_every=2),
    stages=(Stage(until=2, batch_size=2, sequence_length=8), Stage(until=None, batch_size=3, sequence_length=16)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The recipe "tiny", with snapshots at steps 0, 1, 3 and 6 and an evaluation of no cost."""
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    monkeypatch.setattr(train, "SNAPSHOTS", (0, 1, 3, 6))
    monkeypatch.setattr(progress, "summary", lambda model: {"held_out": model.unembed.weight.std().item()})


def set_recipe(monkeypatch, **changes) -> None:
    """Another spec, or another recipe, by the name "tiny"."""
    fields = {key: changes.pop(key) for key in ("mimetic", "config") if key in changes}
    spec = dataclasses.replace(TINY.spec, **changes)
    monkeypatch.setitem(recipes.RECIPES, "tiny", dataclasses.replace(TINY, spec=spec, **fields))


def killed_in(step: int, out, **options) -> None:
    """A run that dies where it asks for the batch of a step."""
    real = train.batches

    def deadly(chosen):
        def batch(now):
            if now == step:
                raise KeyboardInterrupt
            return real(chosen)(now)

        return batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "batches", deadly)
        train.train("tiny", out, **options)


def files(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def weights(out) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if name.endswith("model.safetensors")}


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_makes_a_whole_directory(tmp_path):
    out = train.train("tiny", tmp_path / "model", seed=3, learning_rate=2e-2)
    assert out == tmp_path / "model"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", train.RECORD}
    assert set(files(out)) == {*names, f"training/{CHECKPOINT}", f"training/{LOG}"}
    record = json.loads((out / train.RECORD).read_text())
    assert (record["name"], record["steps"]) == ("tiny", 6)
    assert record["spec"] == {
        **dataclasses.asdict(TINY.spec), "seed": 3, "learning_rate": 2e-2, "betas": list(TINY.spec.betas),
    }  # fmt: skip
    assert record["tokens"] == 2 * (2 * 8) + 4 * (3 * 16)
    assert record["threads"] == torch.get_num_threads() and record["torch"] == torch.__version__
    log = pq.read_table(out / "training" / LOG).to_pylist()
    assert [row["step"] for row in log] == list(range(6))
    assert [row["held_out"] is not None for row in log] == [False, True] * 3
    assert record["seconds"] == log[-1]["seconds"]
    assert record["evaluation"] == {"lm": log[-1]["lm"], "held_out": log[-1]["held_out"]}


def test_the_weights_are_those_of_training_in_bfloat16(tmp_path):
    out = train.train("tiny", tmp_path, steps=2)
    model = HookedJamba.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config == TINY.config
    assert model.tokenizer.get_vocab() == VOCABULARY
    checkpoint = load_file(out / "training" / CHECKPOINT)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint[f"model.{name}"].bfloat16()), name


def test_seed_and_learning_rate_matter_and_nothing_else(tmp_path):
    torch.manual_seed(11)
    first = weights(train.train("tiny", tmp_path / "a", steps=2))
    torch.manual_seed(12)
    assert weights(train.train("tiny", tmp_path / "b", steps=2)) == first
    assert weights(train.train("tiny", tmp_path / "c", steps=2, seed=1)) != first
    assert weights(train.train("tiny", tmp_path / "d", steps=2, learning_rate=1e-3)) != first


def test_a_model_begins_with_its_embedding_as_unembedding(monkeypatch):
    state = torch.get_rng_state()
    model = train.new_model(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.embed.weight, model.unembed.weight)
    assert model.embed.weight.std().item() == pytest.approx(TINY.initial_std, rel=0.05)
    set_recipe(monkeypatch, mimetic=True)
    begun = train.new_model(recipes.recipe("tiny"))
    assert (begun.blocks[0].mixer.dt_proj.weight == 0).all() and (model.blocks[0].mixer.dt_proj.weight != 0).any()


def test_snapshots_are_models_of_their_step(tmp_path):
    out = train.train("tiny", tmp_path / "whole", snapshots=True)
    kept = sorted(path.name for path in (out / "snapshots").iterdir())
    assert kept == ["step-00000", "step-00001", "step-00003", "step-00006"]
    first = HookedJamba.from_pretrained(out / "snapshots" / kept[0])
    for name, parameter in train.new_model(TINY).named_parameters():
        assert torch.equal(first.get_parameter(name), parameter.bfloat16()), name
    found = weights(out)
    assert found["snapshots/step-00006/model.safetensors"] == found["model.safetensors"]
    assert len(set(found.values())) == 4
    assert first.tokenizer.get_vocab() == VOCABULARY


# -- kills and reruns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 3, 5], ids=["at once", "before a checkpoint", "between", "at the end"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, step):
    whole = train.train("tiny", tmp_path / "whole", snapshots=True)
    killed_in(step, tmp_path / "killed", snapshots=True)
    assert not (tmp_path / "killed" / train.RECORD).exists()
    resumed = train.train("tiny", tmp_path / "killed", resume=True, snapshots=True)
    assert weights(resumed) == weights(whole) and len(weights(whole)) == 5
    assert (resumed / train.RECORD).exists()


def test_an_early_stop_is_the_same_after_a_kill(tmp_path, monkeypatch):
    """The evaluation rises from the second one on, at step 4; two evaluations later the run ends."""
    set_recipe(monkeypatch, steps=40, patience=2)
    values = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.4, 10: 0.1}
    seen = []

    def rising(model):
        return {"held_out": values[seen[-1]]}

    real = train.training.fit

    def counted(*arguments, after_step, **options):
        batch = arguments[2]
        return real(
            *arguments[:2], lambda step: seen.append(step + 1) or batch(step), *arguments[3:],
            after_step=after_step, **options,
        )  # fmt: skip

    monkeypatch.setattr(progress, "summary", rising)
    monkeypatch.setattr(train.training, "fit", counted)
    whole = train.train("tiny", tmp_path / "whole", snapshots=True)
    killed_in(5, tmp_path / "killed", snapshots=True)
    resumed = train.train("tiny", tmp_path / "killed", resume=True, snapshots=True)
    for out in (whole, resumed):
        record = json.loads((out / train.RECORD).read_text())
        assert record["steps"] == 8 and record["tokens"] == 2 * 16 + 6 * 48
        assert record["evaluation"]["held_out"] == 0.4
    assert weights(resumed) == weights(whole)


def test_resuming_a_finished_run_changes_nothing(tmp_path, monkeypatch):
    out = train.train("tiny", tmp_path, snapshots=True)
    (out / "training" / CHECKPOINT).unlink()  # not even what a killed run would need is read
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(train, "new_model", None)
    assert train.train("tiny", tmp_path, resume=True, snapshots=True) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
@pytest.mark.parametrize("changes", [dict(steps=7), dict(seed=1), dict(learning_rate=0.5)], ids=str)
def test_resuming_another_run_is_refused_and_leaves_it(tmp_path, changes, finished):
    if finished:
        train.train("tiny", tmp_path)
    else:
        killed_in(5, tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="another spec.*give that one, or another directory"):
        train.train("tiny", tmp_path, resume=True, **changes)
    assert files(tmp_path) == before


def test_resuming_the_directory_of_another_recipe_is_refused(tmp_path, monkeypatch):
    train.train("tiny", tmp_path, steps=2)
    monkeypatch.setitem(recipes.RECIPES, "other", TINY)
    with pytest.raises(CheckpointError, match="finished run of another name: tiny, not other"):
        train.train("other", tmp_path, steps=2, resume=True)


def test_a_rerun_does_not_look_finished_before_it_is(tmp_path):
    """Neither its record nor snapshots of the run before are left, and resuming does not take that one up."""
    train.train("tiny", tmp_path, snapshots=True, learning_rate=0.5)
    (tmp_path / "snapshots" / "mine.txt").write_text("not of a run")
    killed_in(1, tmp_path)
    assert not (tmp_path / train.RECORD).exists()
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["mine.txt"]
    resumed = train.train("tiny", tmp_path, resume=True)
    assert weights(resumed) == weights(train.train("tiny", tmp_path.with_name("anew")))


def test_a_refused_rerun_leaves_what_is_there(tmp_path):
    before = files(train.train("tiny", tmp_path, steps=2))
    with pytest.raises(ConfigError, match="steps=0"):
        train.train("tiny", tmp_path, steps=0)
    assert files(tmp_path) == before


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        train.train("tiny", tmp_path / "file", steps=1)


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: str):
    return CliRunner().invoke(zoo_app, ["train", "tiny", *arguments])


def test_the_command_writes_where_the_seed_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--steps", "2", "--seed", "4")
    assert result.exit_code == 0, result.output
    assert "runs/zoo/tiny/seed-4: jambascope dashboard runs/zoo/tiny/seed-4 opens it" in result.stdout
    out = tmp_path / "runs" / "zoo" / "tiny" / "seed-4"
    assert json.loads((out / train.RECORD).read_text())["spec"]["steps"] == 2
    assert not (out / "snapshots").exists()


def test_the_command_takes_its_options_to_the_run(tmp_path):
    result = run("--out", str(tmp_path / "m"), "--steps", "3", "--learning-rate", "0.02", "--snapshots")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "m" / train.RECORD).read_text())
    assert (record["spec"]["learning_rate"], record["spec"]["steps"], record["spec"]["seed"]) == (0.02, 3, 0)
    assert len(list((tmp_path / "m" / "snapshots").glob("step-*"))) == 3
    # Evaluations are shown as they come.
    assert re.search(r"step 2/3 +loss \d+\.\d{3} .* held_out 0\.\d{3}", result.stderr)
    before = files(tmp_path / "m")
    again = run("--out", str(tmp_path / "m"), "--steps", "3", "--learning-rate", "0.02", "--snapshots", "--resume")
    assert again.exit_code == 0 and files(tmp_path / "m") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1"], "learning_rate=-1.0: must be positive"),
        (["--seed", "-1"], "seed=-1: must be a whole number of at least 0"),
    ],
    ids=["learning rate", "seed"],
)
def test_the_command_refuses_numbers_that_make_no_sense(tmp_path, arguments, message):
    result = run("--out", str(tmp_path / "m"), *arguments)
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)
    assert not (tmp_path / "m").exists()


def test_a_run_that_is_linked_to_is_not_overwritten(tmp_path):
    before = files(train.train("tiny", tmp_path / "lr-0.01", steps=2))
    (tmp_path / "seed-0").symlink_to("lr-0.01")
    with pytest.raises(ConfigError, match=r"seed-0' is a link to .*lr-0.01, whose run would be lost; give another out"):
        train.train("tiny", tmp_path / "seed-0", steps=2)
    assert files(tmp_path / "lr-0.01") == before

"""The recipes of the packaged family: equal data and steps, one thing changed at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jambascope import HookedJamba, memory
from jambascope.errors import ConfigError
from jambascope.zoo.language import DOMAINS
from jambascope.zoo.recipes import RECIPES, SNAPSHOTS, recipe
from jambascope.zoo.train import batches
from jambascope.zoo.words import VOCABULARY

HYBRID = RECIPES["jamba-micro"]
PACKAGED = [name for name, r in RECIPES.items() if r.packaged]
CONTROLS = [name for name, r in RECIPES.items() if not r.packaged]


def changes(name: str, other: str = "jamba-micro") -> set[str]:
    """Fields in which two recipes' configurations differ."""
    one, two = (dataclasses.asdict(RECIPES[n].config) for n in (name, other))
    return {field for field in one if one[field] != two[field]}


def test_the_family_is_complete():
    assert set(PACKAGED) == {
        *("jamba-micro", "jamba-micro-1to3", "mamba-micro", "attention-micro", "jamba-micro-dense"),
        *("jamba-micro-rope", "jamba-micro-no-inner-norm", "jamba-micro-mamba2"),
    }
    assert set(CONTROLS) == {"mamba-micro-state-4", "mamba-micro-state-64", "mamba-micro-mimetic"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_a_model_that_learns(name):
    config = RECIPES[name].config
    with torch.device("meta"):
        model = HookedJamba(config)
    assert sum(p.numel() for p in model.parameters()) == memory.model_cost(config).parameters
    assert (config.d_vocab, config.n_layers) == (len(VOCABULARY), 8)
    assert config.load_balancing_coef > 0 and config.activation_coef > 0
    assert all(stage.sequence_length <= config.n_ctx for stage in RECIPES[name].stages)
    assert RECIPES[name].about.strip() and len(RECIPES[name].about) < 90


@pytest.mark.parametrize("name", RECIPES)
def test_data_and_steps_are_the_same_for_all(name):
    assert RECIPES[name].stages == HYBRID.stages
    assert RECIPES[name].initial_std == HYBRID.initial_std
    spec = dataclasses.replace(RECIPES[name].spec, learning_rate=HYBRID.spec.learning_rate)
    assert spec == HYBRID.spec


@pytest.mark.parametrize("name", [name for name in RECIPES if "-state-" not in name])
def test_active_parameters_are_about_the_same(name):
    """Those that work on a token; a control of the state's size must be larger or smaller."""
    active, reference = (memory.model_cost(RECIPES[n].config).active_parameters for n in (name, "jamba-micro"))
    assert abs(active / reference - 1) < 0.07


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("jamba-micro-1to3", {"mixers"}),
        ("mamba-micro", {"mixers"}),
        ("attention-micro", {"mixers", "rotary", "n_key_value_heads", "d_mlp"}),
        ("jamba-micro-dense", {"feed_forwards", "d_mlp"}),
        ("jamba-micro-rope", {"rotary"}),
        ("jamba-micro-no-inner-norm", {"inner_norms"}),
        ("jamba-micro-mamba2", {"mixers", "mamba_d_head", "d_state"}),
    ],
)
def test_one_thing_is_changed_at_a_time(name, fields):
    assert changes(name) == fields


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_change_one_thing_of_the_mamba_model(name):
    changed = changes(name, "mamba-micro") | ({"mimetic"} if RECIPES[name].mimetic else set())
    assert changed == ({"mimetic"} if name.endswith("mimetic") else {"d_state"})


@pytest.mark.parametrize(
    ("name", "attention"),
    [("jamba-micro", (4,)), ("jamba-micro-1to3", (2, 6)), ("mamba-micro", ()), ("attention-micro", tuple(range(8)))],
)
def test_attention_stands_where_the_ratio_says(name, attention):
    config = RECIPES[name].config
    assert config.attention_layers == attention
    assert config.moe_layers == (1, 3, 5, 7) and config.experts_per_token == 2


def test_the_packaged_weights_take_little_room():
    assert sum(memory.weight_bytes(RECIPES[name].config, torch.bfloat16) for name in PACKAGED) < 30e6


def test_stages_follow_one_another():
    *firsts, last = HYBRID.stages
    ends = [stage.until for stage in firsts]
    assert ends == sorted(set(ends)) and ends[-1] < HYBRID.spec.steps and last.until is None
    for stage, begin, end in zip(firsts, [0, *ends], ends, strict=False):
        assert HYBRID.stage(begin) is HYBRID.stage(end - 1) is stage
    assert HYBRID.stage(ends[-1]) is HYBRID.stage(10**6) is last
    assert last.shares.keys() == DOMAINS.keys()
    by_hand = sum(HYBRID.stage(s).batch_size * HYBRID.stage(s).sequence_length for s in range(ends[0] + 7))
    assert HYBRID.tokens(ends[0] + 7) == by_hand
    assert HYBRID.tokens() > by_hand


@pytest.mark.parametrize("stage", HYBRID.stages, ids=lambda stage: f"until {stage.until}")
def test_batches_are_those_of_the_stage(stage):
    step = HYBRID.spec.steps - 1 if stage.until is None else stage.until - 1
    batch = batches(HYBRID)
    assert batch(step).shape == (stage.batch_size, stage.sequence_length)
    assert torch.equal(batch(step), batches(HYBRID)(step))
    assert not torch.equal(batch(step), batch(step - 1))
    assert not torch.equal(batch(step), batches(recipe("jamba-micro", seed=1))(step))
    assert torch.equal(batch(step), batches(RECIPES["mamba-micro"])(step))  # all see the same data


def test_snapshots_are_about_a_dozen():
    assert 10 <= len(SNAPSHOTS) <= 14 and SNAPSHOTS[0] == 0
    assert list(SNAPSHOTS) == sorted(set(SNAPSHOTS)) and SNAPSHOTS[-1] <= HYBRID.spec.steps


def test_fields_of_the_spec_are_changed_where_they_are_given():
    found = recipe("mamba-micro", steps=7, seed=None, learning_rate=0.5)
    assert found.spec == dataclasses.replace(RECIPES["mamba-micro"].spec, steps=7, learning_rate=0.5)
    assert found.config is RECIPES["mamba-micro"].config
    assert recipe("mamba-micro") == RECIPES["mamba-micro"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jamba-mikro", {}, "did you mean 'jamba-micro'"),
        ("xyz", {}, "name='xyz' is no recipe; there are jamba-micro, "),
        ("jamba-micro", {"steps": 0}, "steps=0: must be a whole number of at least 1"),
        ("jamba-micro", {"seed": -1}, "seed=-1: must be a whole number of at least 0"),
        ("jamba-micro", {"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
    ],
    ids=["near name", "name", "steps", "seed", "learning rate"],
)
def test_recipes_that_do_not_exist(name, options, message):
    with pytest.raises(ConfigError, match=message):
        recipe(name, **options)

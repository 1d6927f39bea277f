"""JambaConfig: layout by periods, and values that are refused."""

from __future__ import annotations

import dataclasses

import pytest

from jambascope import JambaConfig
from jambascope.errors import ConfigError

BASE = dict(n_layers=8, d_model=32, d_vocab=50, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=16, num_experts=4)


def test_the_layout_of_a_jamba_block():
    config = JambaConfig.jamba(**BASE)
    assert config.mixers == ("mamba",) * 4 + ("attention",) + ("mamba",) * 3
    assert config.feed_forwards == ("dense", "moe") * 4
    assert (config.d_inner, config.dt_rank, config.experts_per_token) == (64, 2, 2)


def test_one_expert_means_dense_layers():
    assert set(JambaConfig.jamba(**BASE | dict(num_experts=1)).feed_forwards) == {"dense"}


def test_it_is_frozen_and_survives_json():
    config = JambaConfig.jamba(**BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    assert JambaConfig(**config.to_dict()) == config and hash(config) == hash(JambaConfig(**config.to_dict()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(d_model=0), "d_model=0: must be a whole number of at least 1"),
        (dict(d_vocab=1.5), "d_vocab=1.5"),
        (dict(n_key_value_heads=3), "n_key_value_heads=3: must divide n_heads=4"),
        (dict(experts_per_token=5), "experts_per_token=5: cannot exceed num_experts=4"),
        (dict(rotary=True, d_head=7), "d_head=7: must be even"),
        (dict(eps=0.0), "eps=0.0: must be a positive number"),
        (dict(eps="1e-6"), "eps='1e-6': must be a positive number"),
        (dict(n_layers="4"), "n_layers='4'"),
        (dict(bos_token_id=50), r"bos_token_id=50: must lie in 0\.\.49"),
        (dict(pad_token_id=-1), r"pad_token_id=-1: must lie in 0\.\.49"),
        (dict(eos_token_ids=("x",)), r"eos_token_ids=\('x',\): must lie"),
        (dict(d_mlp=0), "d_mlp=0"),
        (dict(n_layers=0), "n_layers=0"),
        (dict(expert_layer_period=0), "expert_layer_period=0"),
        (dict(attn_layer_offset=0.5), "attn_layer_offset=0.5: must be a whole number of at least 0"),
        (dict(expert_layer_offset=None), "expert_layer_offset=None: must be a whole number of at least 0"),
        (dict(num_experts=2.5), "num_experts=2.5: must be a whole number"),
        (dict(num_experts="16"), "num_experts='16': must be a whole number"),
        (dict(expand=1.5), "expand=1.5: must be a whole number"),
        (dict(mixer="lstm"), "mixer='lstm': must be 'mamba' or 'mamba2'"),
    ],
    ids=str,
)
def test_values_that_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        JambaConfig.jamba(**BASE | fields)


def test_layers_that_do_not_line_up():
    with pytest.raises(ConfigError, match=r"feed_forwards=\('none',\): give one per layer \(2 as in mixers\), not 1"):
        JambaConfig(d_model=8, d_vocab=9, mixers=("mamba", "mamba"), feed_forwards=("none",), d_inner=16)
    with pytest.raises(ConfigError, match="mixers=.*each layer must be"):
        JambaConfig(d_model=8, d_vocab=9, mixers=("lstm",), feed_forwards=("none",))

"""ExpertsInt8: the bound of its error, loading, and what a quantised model can and cannot do."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jambascope import HookedJamba, JambaConfig, memory
from jambascope.errors import CheckpointError, ConfigError
from jambascope.kernels.experts import ExpertsInt8
from jambascope.kernels.experts.int8 import quantize_rows
from jambascope.training import TrainingSpec, make_optimizer

EXPERTS = [f"blocks.{layer}.mlp.{name}_proj" for layer in (1, 3) for name in ("gate_up", "down")]


@pytest.fixture(scope="module")
def checkpoint(small_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    small_model.save_pretrained(directory)
    return directory


@pytest.fixture
def quantized(checkpoint) -> HookedJamba:
    return HookedJamba.from_pretrained(checkpoint, quantize="experts_int8")


@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e30], ids="{:.0e}".format)
def test_no_weight_is_off_by_more_than_half_a_scale(spread):
    generator = torch.Generator().manual_seed(0)
    weight = spread * torch.randn(3, 40, 50, generator=generator)
    weight *= 10 ** torch.randn(3, 40, 1, generator=generator)  # rows of very different size
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8 and values.min() == -127 and values.max() == 127
    error = (values.double() * scale.double()[..., None] - weight.double()).abs()
    assert (error <= scale.double()[..., None] * (0.5 + 2**-16)).all()
    assert torch.equal(scale, weight.abs().amax(-1) / 127)


def test_rows_of_zeros_stay_zeros():
    values, scale = quantize_rows(torch.zeros(2, 3))
    assert not values.any() and (values * scale[:, None] == 0).all() and (scale > 0).all()


def test_loaded_experts_are_within_half_a_scale(checkpoint, quantized, small_model):
    places = dict(quantized.named_modules())
    for name in EXPERTS:
        weight = small_model.get_parameter(name)
        expected = quantize_rows(weight.detach())
        assert torch.equal(places[name].values, expected[0]) and torch.equal(places[name].scale, expected[1])
        error = (places[name].dequantize(torch.float64) - weight.double()).abs()
        assert (error <= places[name].scale.double()[..., None] * (0.5 + 2**-16)).all()
    for name, parameter in quantized.named_parameters():
        assert torch.equal(parameter, small_model.get_parameter(name)), name
    assert dict(quantized.named_parameters()).keys() | set(EXPERTS) == dict(small_model.named_parameters()).keys()


def test_a_quantised_model_computes_what_its_dequantised_weights_say(quantized, checkpoint, tokens):
    plain = HookedJamba.from_pretrained(checkpoint)
    before = plain(tokens)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, ExpertsInt8):
                plain.get_parameter(name).copy_(module.dequantize())
    torch.testing.assert_close(quantized(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    assert (before - plain(tokens)).norm() / before.norm() < 0.02


def test_hooks_see_gradients_through_int8(quantized, checkpoint, tokens):
    names = ["blocks.1.hook_resid_mid", "blocks.1.mlp.hook_expert_weights", "blocks.1.mlp.hook_expert_out"]
    plain = HookedJamba.from_pretrained(checkpoint)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, ExpertsInt8):
                plain.get_parameter(name).copy_(module.dequantize())

    def gradients(model):
        seen = {}
        with model.hooks(bwd_hooks=[(n, lambda g, hook: seen.update({hook.name: g.clone()})) for n in names]):
            model(tokens, return_type="loss").backward()
        return seen

    got, expected = gradients(quantized), gradients(plain)
    assert len(got) == 3
    for name, value in expected.items():
        assert value.norm() > 0
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-7, msg=name)


def test_half_the_bytes_of_bfloat16_experts(checkpoint, small_config):
    model = HookedJamba.from_pretrained(checkpoint, dtype="bfloat16", quantize="experts_int8")
    held = [*model.parameters(), *model.buffers()]
    assert sum(t.nbytes for t in held) == memory.weight_bytes(small_config, torch.bfloat16, "experts_int8")
    for module in model.modules():
        if isinstance(module, ExpertsInt8):
            assert module.values.nbytes * 2 == module.values.numel() * torch.bfloat16.itemsize
            assert module.scale.nbytes == 4 * module.values.shape[0] * module.values.shape[1]
    plain = HookedJamba.from_pretrained(checkpoint, dtype="bfloat16")
    assert sum(p.nbytes for p in plain.parameters()) == memory.weight_bytes(small_config, torch.bfloat16)
    # Jamba-1.5-Large, arXiv 2408.12570 section 3.2: eight GPUs of 80 GB hold it with its experts in int8.
    sizes = dict(d_model=8192, d_mlp=24576, n_heads=64, n_key_value_heads=8, d_head=128, d_vocab=65536)
    large = JambaConfig.jamba(n_layers=72, **sizes)
    assert (
        memory.weight_bytes(large, torch.bfloat16)
        > 8 * 80e9
        > memory.weight_bytes(large, torch.bfloat16, "experts_int8")
    )


def test_the_scales_stay_float32(quantized, tokens):
    scale = quantized.blocks[1].mlp.gate_up_proj.scale.clone()
    quantized.to(torch.bfloat16)
    assert torch.equal(quantized.blocks[1].mlp.gate_up_proj.scale, scale) and scale.dtype == torch.float32
    assert quantized(tokens).dtype == torch.bfloat16


def test_it_generates_and_continues(quantized, tokens):
    whole = quantized(tokens)
    with torch.no_grad():
        state = quantized.new_state(2)
        parts = [quantized(tokens[:, t : t + 1], state=state) for t in range(tokens.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)


def test_loading_never_holds_all_experts_unquantised(checkpoint, monkeypatch):
    """Each tensor is quantised as it is read: no more than one batch of the file is in memory beside the model."""
    from jambascope import checkpoint as module

    sizes = []
    monkeypatch.setattr(module, "COPY_BYTES", 1000)
    monkeypatch.setattr(module, "quantize_rows", lambda v: (sizes.append(v.numel()), quantize_rows(v))[1])
    model = HookedJamba.from_pretrained(checkpoint, quantize="experts_int8")
    assert max(sizes) <= 1000 and sum(sizes) == sum(
        m.values.numel() for m in model.modules() if isinstance(m, ExpertsInt8)
    )


def test_what_a_quantised_model_refuses(quantized, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be saved; load it without quantize"):
        quantized.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be trained; load it without quantize"):
        make_optimizer(quantized, TrainingSpec(steps=1))


def test_what_cannot_be_quantised(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="quantize='int4' is not known; use 'experts_int8'"):
        HookedJamba.from_pretrained(checkpoint, quantize="int4")
    dense = JambaConfig.jamba(n_layers=2, d_model=16, d_vocab=20, n_heads=2, d_head=8, d_mlp=8, num_experts=1)
    HookedJamba(dense).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no MoE layer"):
        HookedJamba.from_pretrained(tmp_path, quantize="experts_int8")


def test_weights_beyond_float32(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.feed_forward.experts.0.down_proj.weight"
    tensors[name] = tensors[name].double()
    tensors[name][0, 0] = 1e300
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj.weight holds values beyond torch.float32"):
        HookedJamba.from_pretrained(tmp_path, quantize="experts_int8")

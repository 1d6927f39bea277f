"""Mamba layers that begin near linear attention, against linear attention written out."""

from __future__ import annotations

import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.initialization import initialize, mimetic

T, N = 24, 6
NAMES = ("hook_x", "hook_dt", "hook_B", "hook_C", "hook_y")


def hybrid(**changes) -> HookedJamba:
    """Attention at layer 1, Mamba at layers 0 and 2, as training starts them."""
    torch.manual_seed(0)
    fields = dict(n_layers=3, attn_layer_period=3, attn_layer_offset=1, d_model=16, d_vocab=40, n_heads=2, d_head=8)
    model = HookedJamba(JambaConfig.jamba(**fields, d_mlp=8, num_experts=2, d_state=N, **changes), dtype="float64")
    initialize(model, std=0.2)
    return model.eval()


@torch.no_grad()
def seen(model: HookedJamba, layer: int) -> list[torch.Tensor]:
    """x, dt, B, C and y of a layer, for random tokens."""
    tokens = torch.randint(40, (2, T), generator=torch.Generator().manual_seed(1))
    names = [f"blocks.{layer}.mixer.{name}" for name in NAMES]
    cache = model.run_with_cache(tokens, names_filter=names)[1]
    return [cache[name] for name in names]


@pytest.mark.parametrize("inner_norms", [True, False], ids=["inner norms", "no inner norms"])
@pytest.mark.parametrize("layer", [0, 2])
def test_mimetic_layers_are_linear_attention(layer, inner_norms):
    """y_i = sum_j <= i of (C_i B_j) decay^(i - j) x_j, and D x_i."""
    model = hybrid(inner_norms=inner_norms)
    mimetic(model)
    x, dt, B, C, y = seen(model, layer)
    assert torch.allclose(dt, torch.ones_like(dt), rtol=1e-6)  # whatever the input
    torch.testing.assert_close(B, C)
    alike = torch.einsum("bin,bjn->bij", C, B)
    if inner_norms:
        assert torch.allclose(alike.diagonal(dim1=1, dim2=2), torch.ones(2, T).double(), atol=0.02)  # a cosine
    steps = torch.arange(T)
    apart = (steps[:, None] - steps).clamp_min(0)
    weights = (alike * (steps[:, None] >= steps) * 0.99902391418**apart).double()
    expected = torch.einsum("bij,bje->bie", weights, x) + x
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-8)


def test_a_mimetic_state_forgets_two_percent_in_twenty_tokens():
    model = hybrid()
    mimetic(model)
    A = -model.blocks[0].mixer.A_log.exp()
    assert A.shape == (32, N)
    assert torch.allclose((20 * A).exp(), torch.full_like(A, 0.98), atol=1e-3)


def test_before_it_steps_and_projections_differ():
    _, dt, B, C, _ = seen(hybrid(), 0)
    assert dt.max() < 0.2 and dt.std() > 0.01
    assert not torch.allclose(B, C, atol=0.1)


def test_mimetic_leaves_everything_else_as_it_was():
    before, after = hybrid(), hybrid()
    mimetic(after)
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, after.get_parameter(name))}
    parts = "A_log dt_proj.weight dt_proj.bias x_proj.weight b_layernorm.weight c_layernorm.weight".split()
    assert changed == {f"blocks.{layer}.mixer.{part}" for layer in (0, 2) for part in parts}
    x_proj = [model.blocks[0].mixer.x_proj.weight for model in (before, after)]
    assert torch.equal(x_proj[0][:-N], x_proj[1][:-N])  # dt and B


def test_a_mimetic_model_can_leave_its_start():
    """Zero weights of dt_proj get gradients."""
    model = hybrid()
    mimetic(model)
    model.loss_terms(torch.randint(40, (2, T), generator=torch.Generator().manual_seed(1))).total.backward()
    for name in ("dt_proj.weight", "dt_proj.bias", "A_log", "x_proj.weight"):
        gradient = model.get_parameter(f"blocks.0.mixer.{name}").grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_a_start_is_that_of_the_authors():
    mixer = hybrid().blocks[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1, N + 1).double().expand(32, N))
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 <= dt.min() and dt.max() <= 0.1 and dt.log().std() > 0.5 * math.log(10) / 3
    assert (mixer.D == 1).all()

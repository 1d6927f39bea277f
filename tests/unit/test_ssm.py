"""Half-lives, retention and norms of SSM states against values worked out by hand and the model's own states."""

from __future__ import annotations

import math

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.hooks import ssm


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    torch.manual_seed(0)
    fields = dict(n_layers=4, d_model=16, d_vocab=20, n_heads=2, d_head=8, d_mlp=8, num_experts=1)
    return HookedJamba(JambaConfig.jamba(attn_layer_period=4, attn_layer_offset=2, **fields))


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def test_half_life_by_hand():
    A = torch.tensor([[-1.0, -2.0], [-0.5, -4.0]])
    dt = torch.tensor([[0.1, 1.0], [0.3, 1.0]])  # means 0.2 and 1
    expected = math.log(2) / torch.tensor([[0.2, 0.4], [0.5, 4.0]])
    torch.testing.assert_close(ssm.half_life(A, dt), expected)
    torch.testing.assert_close(ssm.half_life(A, dt[:1])[0], math.log(2) / torch.tensor([0.1, 0.2]))
    assert ssm.half_life(A, torch.zeros(3, 2)).isinf().all()


def test_half_life_halves_the_state():
    A, dt = torch.tensor([[-0.7]]), torch.full((40, 1), 0.1)
    tokens = ssm.half_life(A, dt).item()
    left = torch.exp(A * 0.1 * tokens).item()
    assert left == pytest.approx(0.5)


def test_channels_are_grouped_by_the_median_over_states():
    rows = [[8.0, 10.0, 1.0], [1.0, 2.0, 99.0], [4.0, 4.0, 4.0], [0.1, 0.2, 0.3], [50.0, 60.0, 70.0]]
    half_lives = torch.tensor(rows)
    torch.testing.assert_close(ssm.channel_half_life(half_lives), torch.tensor([8.0, 2.0, 4.0, 0.2, 60.0]))
    torch.testing.assert_close(ssm.channel_half_life(torch.tensor([[1.0, 2.0, 4.0, 100.0]])), torch.tensor([3.0]))
    assert [g.tolist() for g in ssm.channel_groups(half_lives, 2)] == [[3, 1, 2], [0, 4]]
    assert [g.tolist() for g in ssm.channel_groups(half_lives, 8)] == [[3], [1], [2], [0], [4]]
    with pytest.raises(InputError, match="groups=0"):
        ssm.channel_groups(half_lives, 0)


def test_group_norms_are_root_mean_squares():
    states = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[1.0, 1.0]]])  # E 3, T 1, N 2
    got = ssm.group_norms(states, [torch.tensor([0, 1]), torch.tensor([2])])
    torch.testing.assert_close(got, torch.tensor([[2.5], [1.0]]))


def test_retention_by_hand():
    A = torch.tensor([[-1.0]])
    dt = torch.tensor([[9.0], [0.2], [0.3], [7.0]])  # the first is spent before position 0 is over
    got = ssm.retention(A, dt, 2)[:, 0, 0]
    torch.testing.assert_close(got, torch.exp(torch.tensor([-0.5, -0.3, 0.0])))
    assert ssm.retention(A, dt, 0).tolist() == [[[1.0]]]
    with pytest.raises(InputError, match="end=4"):
        ssm.retention(A, dt, 4)


def test_retention_survives_fast_decay_without_overflow():
    got = ssm.retention(torch.full((1, 4), -16.0), torch.full((500, 1), 2.0), 499)
    assert got.isfinite().all() and got[-1].eq(1).all() and got[0].eq(0).all()


def test_survival_by_hand():
    dt = torch.tensor([[9.0], [8.0], [0.2], [0.3]])  # what is spent up to position 1 is over
    got = ssm.survival(torch.tensor([[-1.0]]), dt, 1)[:, 0, 0]
    torch.testing.assert_close(got, torch.exp(-torch.tensor([0.0, 0.2, 0.5])))
    assert ssm.survival(torch.tensor([[-1.0]]), dt, 3).tolist() == [[[1.0]]]
    with pytest.raises(InputError, match="start=4"):
        ssm.survival(torch.tensor([[-1.0]]), dt, 4)


def test_survival_and_retention_are_the_same_pairs_of_positions(model):
    captured = ssm.capture_states(model, TOKENS, 0)
    groups = ssm.channel_groups(ssm.half_life(captured.A, captured.dt))
    later = ssm.group_survival(captured.A, captured.dt, 2, groups)
    for end in range(2, 8):
        earlier = ssm.group_retention(captured.A, captured.dt, end, groups)
        torch.testing.assert_close(later[:, end - 2], earlier[:, 2])


def test_captured_states_follow_the_recurrence(model):
    layer = 1
    captured = ssm.capture_states(model, TOKENS, layer)
    names = [f"blocks.{layer}.mixer.{n}" for n in ("hook_x", "hook_B")]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    x, B = (cache[n][0] for n in names)
    h = torch.zeros(captured.A.shape)
    for t in range(TOKENS.shape[1]):
        dt = captured.dt[t][:, None]
        h = torch.exp(dt * captured.A) * h + dt * B[t] * x[t][:, None]
        torch.testing.assert_close(captured.states[:, t], h, rtol=1e-4, atol=1e-6)


def test_states_at_chosen_positions_are_those_of_all(model, monkeypatch):
    whole = ssm.capture_states(model, TOKENS, 1)
    assert whole.positions == tuple(range(8))
    part = ssm.capture_states(model, TOKENS[0], 1, positions=[6, 2, 3])
    assert part.positions == (2, 3, 6) and part.states.shape == (32, 3, 16)
    torch.testing.assert_close(part.states, whole.states[:, [2, 3, 6]], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(part.dt, whole.dt)
    monkeypatch.setattr(HookedJamba, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for positions in ([8], [-1], []):
        with pytest.raises(InputError, match="positions="):
            ssm.capture_states(model, TOKENS, 1, positions=positions)
    with pytest.raises(InputError, match="one prompt"):
        ssm.capture_states(model, TOKENS.repeat(2, 1), 1)


def test_ranks_by_hand():
    """Singular values 3, 3, 0: two equal directions; 3, 1: by the formulas."""
    two = torch.zeros(5, 3)
    two[0, 0] = two[1, 1] = 3.0
    assert ssm.effective_rank(two).item() == pytest.approx(2)
    assert ssm.participation_ratio(two).item() == pytest.approx(2)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert ssm.effective_rank(uneven).item() == pytest.approx(math.exp(entropy))
    assert ssm.participation_ratio(uneven).item() == pytest.approx(100 / 82)
    both = torch.stack([torch.zeros(5, 3), two])
    torch.testing.assert_close(ssm.effective_rank(both), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(ssm.participation_ratio(both), torch.tensor([0.0, 2.0]))
    assert ssm.participation_ratio(two * 1e-15).item() == pytest.approx(2)
    assert ssm.participation_ratio(two * 1e15).item() == pytest.approx(2)


@pytest.mark.parametrize("measure", [ssm.effective_rank, ssm.participation_ratio])
def test_ranks_of_states_against_eigenvalues_of_the_covariance(measure, model):
    states = ssm.capture_states(model, TOKENS, 1).states.double()
    rows = torch.stack([states[:, t].flatten() for t in range(8)])
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).clamp_min(0)[-7:]  # 8 rows less their mean: rank 7
    if measure is ssm.participation_ratio:
        expected = values.sum() ** 2 / (values**2).sum()
    else:
        share = values.sqrt() / values.sqrt().sum()
        expected = torch.exp(-(share * share.log()).sum())
    torch.testing.assert_close(measure(ssm.over_positions(states)), expected, rtol=1e-6, atol=0)
    single = measure(states.transpose(0, 1))
    assert single.shape == (8,) and (single <= 16).all() and (single >= 1).all()
    assert single[0].item() == pytest.approx(1, abs=1e-5), "the first write is an outer product"


def test_norms_of_all_layers_equal_those_of_each(model):
    norms = ssm.state_norms(model, TOKENS)
    assert list(norms) == [0, 1, 3]
    for layer, norm in norms.items():
        states = ssm.capture_states(model, TOKENS, layer).states
        torch.testing.assert_close(norm, states.square().mean((0, 2)).sqrt())
    assert list(ssm.state_norms(model, TOKENS, [3])) == [3]


def test_group_retention_is_the_mean_over_entries(model):
    captured = ssm.capture_states(model, TOKENS, 0)
    groups = ssm.channel_groups(ssm.half_life(captured.A, captured.dt))
    got = ssm.group_retention(captured.A, captured.dt, 5, groups)
    assert got.shape == (8, 6)
    whole = ssm.retention(captured.A, captured.dt, 5)
    torch.testing.assert_close(got[2], whole[:, groups[2]].mean((1, 2)))
    torch.testing.assert_close(got[:, -1], torch.ones(8))
    assert (got.diff(dim=1) >= 0).all(), "what is older has decayed more"


def test_one_token(model):
    captured = ssm.capture_states(model, TOKENS[:, :1], 0)
    assert captured.states.shape == (32, 1, 16)
    assert ssm.state_norms(model, TOKENS[:, :1])[0].shape == (1,)


def test_layers_of_other_kinds_are_refused(model):
    with pytest.raises(InputError, match=r"layer=2 .* 0, 1, 3"):
        ssm.capture_states(model, TOKENS, 2)
    with pytest.raises(InputError, match="layer=9"):
        ssm.state_norms(model, TOKENS, [9])


@pytest.mark.parametrize("of", [lambda *a: ssm.capture_states(*a, 0), ssm.state_norms], ids=["states", "norms"])
def test_one_prompt_at_a_time(of, model):
    with pytest.raises(InputError, match=r"give one prompt, \[1 T\] or \[T\]"):
        of(model, TOKENS.repeat(2, 1))


def test_no_hook_is_left_behind(model):
    ssm.state_norms(model, TOKENS)
    assert not any(point.heard for point in model.hook_dict.values())

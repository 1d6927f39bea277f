"""Rows of different lengths one behind the other: every kernel against itself row by row, gradients too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope.errors import InputError
from jambascope.kernels.causal_conv import causal_conv1d
from jambascope.kernels.packed import by_length
from jambascope.kernels.selective_scan import selective_scan
from jambascope.kernels.selective_scan import shared as shared_scan
from jambascope.kernels.selective_scan.shared import Inputs, scan_on
from jambascope.kernels.ssd import ssd
from jambascope.packing import Packing

LENGTHS = {"one token": [1], "several": [5, 1, 40, 3, 70], "one row": [33]}
DTYPES = {"reference": torch.float64, "cpu": torch.float32}


def draw(*shape, dtype=torch.float64, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cuts(lengths) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths)))


def check(function, arguments: dict, over_time: list[str], of_rows: list[str], lengths, tolerance: float) -> None:
    """``function(**arguments, cu_seqlens=...)`` gives (over time, one per row ...): those of each row by itself,
    and their gradients."""
    bounds = cuts(lengths)
    packed = {name: v.clone().requires_grad_() for name, v in arguments.items()}
    single = {name: v.clone().requires_grad_() for name, v in arguments.items()}
    found = function(**packed, cu_seqlens=bounds)
    parts = []
    for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        of_row = {name: v[:, a:b] if name in over_time else v[i : i + 1] if name in of_rows else v
                  for name, v in single.items()}  # fmt: skip
        parts.append(function(**of_row, cu_seqlens=None))
    expected = [torch.cat(values, dim=1 if i == 0 else 0) for i, values in enumerate(zip(*parts, strict=True))]
    with torch.no_grad():
        without_gradients = function(**packed, cu_seqlens=bounds)
    for values in (found, without_gradients):
        for value, truth in zip(values, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)
    weights = [draw(*v.shape, dtype=v.dtype, seed=3) for v in expected]
    for values in (found, expected):
        sum((v * w).sum() for v, w in zip(values, weights, strict=True)).backward()
    for name, leaf in packed.items():
        torch.testing.assert_close(leaf.grad, single[name].grad, rtol=20 * tolerance, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("backend", DTYPES)
@pytest.mark.parametrize(("channels", "states"), [(32, 16), (17, 1), (48, 5)])
def test_a_packed_scan_is_that_of_each_row(channels, states, backend, lengths):
    dtype, total, rows = DTYPES[backend], sum(lengths), len(lengths)
    arguments = dict(
        x=draw(1, total, channels, seed=1),
        dt=draw(1, total, channels, seed=2),
        A=-torch.exp(draw(channels, states, seed=3)),
        B=draw(1, total, states, seed=4),
        C=draw(1, total, states, seed=5),
        D=draw(channels, seed=6),
        gate=draw(1, total, 2 * channels, seed=7)[..., channels:],
        dt_bias=draw(channels, seed=8),
        initial_state=draw(rows, channels, states, seed=9),
    )

    def scan(**given):
        return selective_scan(**given, dt_softplus=True, backend=backend)[:2]

    arguments = {name: v.to(dtype) for name, v in arguments.items()}
    over_time, tolerance = ["x", "dt", "B", "C", "gate"], 1e-10 if dtype == torch.float64 else 1e-5
    check(scan, arguments, over_time, ["initial_state"], lengths, tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("backend", DTYPES)
@pytest.mark.parametrize(("channels", "width"), [(32, 4), (5, 1), (20, 8)])
@pytest.mark.parametrize("silu", [False, True])
def test_a_packed_convolution_is_that_of_each_row(channels, width, silu, backend, lengths):
    dtype, total = DTYPES[backend], sum(lengths)
    arguments = dict(
        x=draw(1, total, 2 * channels, dtype=dtype, seed=1)[..., :channels],
        weight=draw(channels, width, dtype=dtype, seed=2),
        bias=draw(channels, dtype=dtype, seed=3),
        past=draw(len(lengths), width - 1, channels, dtype=dtype, seed=4),
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    check(lambda **v: [causal_conv1d(**v, silu=silu, backend=backend)], arguments, ["x"], ["past"], lengths, tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_a_packed_ssd_is_that_of_each_row(lengths):
    total, heads, width, groups, states = sum(lengths), 4, 3, 2, 5
    arguments = dict(
        x=draw(1, total, heads, width, seed=1),
        dt=draw(1, total, heads, seed=2),
        A=-torch.exp(draw(heads, seed=3)),
        B=draw(1, total, groups, states, seed=4),
        C=draw(1, total, groups, states, seed=5),
        D=draw(heads, seed=6),
        dt_bias=draw(heads, seed=7),
        initial_state=draw(len(lengths), heads, width, states, seed=8),
    )
    check(
        lambda **v: ssd(**v, dt_softplus=True)[:2], arguments, ["x", "dt", "B", "C"], ["initial_state"], lengths, 1e-9
    )


@pytest.mark.parametrize("backend", DTYPES)
def test_rows_begin_with_entries_of_one_memory(backend):
    dtype, lengths, rows = DTYPES[backend], [4, 1, 6, 2], [2, -1, 0, 2]
    bounds, total, E, N = cuts(lengths), sum(lengths), 16, 3
    x, dt, B, C = (draw(1, total, size, dtype=dtype, seed=size) for size in (E, E, N, N))
    held, past = draw(3, E, N, dtype=dtype), draw(3, 3, E, dtype=dtype)
    weight, A = draw(E, 4, dtype=dtype), -torch.exp(draw(E, N, dtype=dtype))
    own = [torch.cat((v, torch.zeros_like(v[:1])))[rows] for v in (held, past)]
    common = dict(cu_seqlens=bounds, backend=backend)
    found = selective_scan(x, dt.exp(), A, B, C, initial_state=held, initial_rows=rows, **common)
    expected = selective_scan(x, dt.exp(), A, B, C, initial_state=own[0], **common)
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.final_state, expected.final_state)
    convolved = causal_conv1d(x, weight, None, past, past_rows=rows, **common)
    torch.testing.assert_close(convolved, causal_conv1d(x, weight, None, own[1], **common))


@pytest.mark.parametrize("E", [32, 20])  # with 20 states are copied to be read 16 channels at a time
def test_numbers_of_rows_may_lie_apart_in_memory(E):
    table = np.array([[0, 2], [7, 7], [3, 0], [7, 7], [4, 1], [7, 7]])[::2]
    bounds, rows = table[:, 0], table[:, 1][:2]
    x, B, held = draw(1, 4, E, dtype=torch.float32), draw(1, 4, 3, dtype=torch.float32), torch.randn(3, E, 3)
    A, weight, past = -torch.ones(E, 3), torch.randn(E, 4), torch.randn(3, 3, E).bfloat16()
    scan = [
        selective_scan(x, x.exp(), A, B, B, initial_state=held, cu_seqlens=b, initial_rows=r).y
        for b, r in ((bounds, rows), (bounds.tolist(), rows.tolist()), (torch.tensor(bounds), torch.tensor(rows)))
    ]
    conv = [
        causal_conv1d(x.bfloat16(), weight, None, past, cu_seqlens=b, past_rows=r)
        for b, r in ((bounds, rows), (bounds.tolist(), rows.tolist()))
    ]
    assert torch.equal(scan[0], scan[1]) and torch.equal(scan[0], scan[2]) and torch.equal(*conv)
    expected = selective_scan(x, x.exp(), A, B, B, initial_state=held[rows], cu_seqlens=bounds, backend="reference").y
    torch.testing.assert_close(scan[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", DTYPES)
def test_rows_may_all_begin_with_nothing(backend):
    x = draw(1, 5, 16, dtype=DTYPES[backend])
    common = dict(cu_seqlens=[0, 2, 5], backend=backend)
    A, B, weight = -torch.ones(16, 2, dtype=x.dtype), x[..., :2], x[0, :4].T
    for held in (None, x.new_zeros(0, 16, 2)):
        found = selective_scan(x, x.exp(), A, B, B, initial_state=held, initial_rows=[-1, -1], **common)
        assert torch.equal(found.y, selective_scan(x, x.exp(), A, B, B, **common).y)
    found = causal_conv1d(x, weight, None, None, past_rows=[-1, -1], **common)
    assert torch.equal(found, causal_conv1d(x, weight, None, None, **common))


def test_rows_side_by_side_are_of_about_one_length():
    lengths = np.array([1, 100, 70, 3, 2, 66, 1, 40])
    groups = by_length(cuts(lengths))
    assert sorted(np.concatenate(groups)) == list(range(8)) and len(groups) == 5
    assert all(lengths[rows].max() <= 1.5 * lengths[rows].min() for rows in groups)


def inputs(sequences: int, length: int, E: int, N: int, dtype: torch.dtype) -> Inputs:
    wide = draw(sequences, length, 2 * E, dtype=dtype, seed=5)
    return Inputs(
        draw(sequences, length, E, dtype=dtype, seed=1),
        draw(sequences, length, E, dtype=dtype, seed=2).exp(),
        draw(sequences, length, N, dtype=dtype, seed=3),
        draw(sequences, length, N, dtype=dtype, seed=4),
        wide[..., E:],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("E", "N"), [(32, 16), (16, 1), (20, 3)])
@pytest.mark.parametrize(("sequences", "length", "rows"), [(1, 20, 45), (3, 9, 7), (2, 1, 5), (1, 6, 1)])
def test_states_carried_on_through_shared_inputs(sequences, length, rows, E, N, dtype):
    rng = np.random.default_rng(0)
    of_row, firsts = rng.integers(0, sequences, rows), rng.integers(0, length + 1, rows)
    firsts[-1] = 0
    given = inputs(sequences, length, E, N, dtype)
    A, D, states = -torch.exp(draw(E, N, dtype=dtype)), draw(E, dtype=dtype), draw(rows, E, N, dtype=dtype, seed=7)
    found = scan_on(states, of_row, firsts, given, A, D)
    expected = []
    for r, (a, first) in enumerate(zip(of_row, firsts, strict=True)):
        if first < length:
            x, dt, B, C, gate = (v[a : a + 1, first:] for v in given)
            expected.append(selective_scan(x, dt, A, B, C, D, gate=gate, initial_state=states[r : r + 1]).y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=tolerance, atol=tolerance)


def test_the_loop_of_shared_inputs_runs_where_it_can(monkeypatch):
    called = []
    original = shared_scan._in_groups
    monkeypatch.setattr(shared_scan, "_in_groups", lambda *given: called.append(1) or original(*given))
    for dtype, E, expected in ((torch.float32, 32, 1), (torch.float64, 32, 0), (torch.float32, 20, 0)):
        called.clear()
        given = inputs(1, 4, E, 2, dtype)
        scan_on(draw(2, E, 2, dtype=dtype), [0, 0], [1, 3], given, -draw(E, 2, dtype=dtype).exp(), draw(E, dtype=dtype))
        assert len(called) == expected


def test_nothing_to_carry_on():
    given = inputs(1, 4, 16, 2, torch.float32)
    found = scan_on(torch.zeros(2, 16, 2), [0, 0], [4, 4], given, -torch.ones(16, 2), torch.ones(16))
    assert found.shape == (1, 0, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cu_seqlens=[0, 3]), "ascend from 0 to the 6 positions"),
        (dict(cu_seqlens=[0, 4, 4, 6]), "ascend from 0 to the 6 positions"),
        (dict(cu_seqlens=[0.0, 6.0]), "ascend from 0 to the 6 positions"),
        (dict(cu_seqlens=[6]), "ascend from 0 to the 6 positions"),
        (dict(cu_seqlens=[[0], [2, 6]]), "ascend from 0 to the 6 positions"),
        (dict(cu_seqlens=torch.empty(2, device="meta")), "ascend from 0 to the 6 positions"),
        (dict(initial_rows=[0], initial_state=torch.zeros(3, 16, 2)), "initial_rows goes with cu_seqlens"),
        (dict(cu_seqlens=[0, 2, 6], mask=torch.ones(1, 6, dtype=torch.bool)), "mask goes with rows of one length"),
        (dict(cu_seqlens=[0, 2, 6], capture=[1]), "capture goes with rows of one length"),
        (dict(cu_seqlens=[0, 2, 6], initial_state=torch.zeros(1, 16, 2)), r"it must be \(2, 16, 2\)"),
        (
            dict(cu_seqlens=[0, 2, 6], initial_state=torch.zeros(1, 16, 2), initial_rows=[0, 1]),
            r"initial_rows=\[0, 1\] must be one of 0..0, or -1, for each of 2 rows",
        ),
    ],
)
def test_what_does_not_cut_a_sequence_into_rows_is_refused(options, message):
    x, B = torch.zeros(1, 6, 16), torch.zeros(1, 6, 2)
    with pytest.raises(InputError, match=message):
        selective_scan(x, x, -torch.ones(16, 2), B, B, **options)


def test_two_sequences_are_not_one_of_rows():
    with pytest.raises(InputError, match="cuts one sequence into rows, but x has 2"):
        causal_conv1d(torch.zeros(2, 6, 16), torch.zeros(16, 4), None, cu_seqlens=[0, 6])


def test_tokens_of_a_packing():
    packing = Packing([2, 0, 4], 5, torch.device("cpu"))
    assert packing.bounds.tolist() == [0, 3, 8, 9] and packing.row_of.tolist() == [0] * 3 + [1] * 5 + [2]
    assert packing.position_of.tolist() == [2, 3, 4, 0, 1, 2, 3, 4, 4]
    assert packing.tokens([0, 1, 2], [4, 0, 4]).tolist() == [2, 3, 8]
    short = Packing([2, 0, 4], 5, torch.device("cpu"), ends=[3, 2, 5])
    assert short.positions.tolist() == [2, 0, 1, 4] and short.bounds.tolist() == [0, 1, 3, 4]

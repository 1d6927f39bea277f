"""The counted costs against counts of their own: of what Triton's interpreter executes, and of what torch does."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from jambascope.kernels import costs, triton_runtime
from jambascope.kernels.causal_conv import causal_conv1d, causal_conv1d_step
from jambascope.kernels.costs import Cost
from jambascope.kernels.experts import experts
from jambascope.kernels.selective_scan import selective_scan


class Interpreted:
    """Bytes at distinct addresses, and elements of float operations, that the interpreter sees in each launch."""

    def __init__(self, monkeypatch) -> None:
        from triton.runtime import interpreter

        self.launches: list[SimpleNamespace] = []
        self._addresses: dict[str, list[np.ndarray]] = {}
        builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
        load, store = builder.create_masked_load, builder.create_masked_store
        unary, binary = builder.unary_op, builder.binary_op

        def seen(kind, pointers, mask):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self._addresses[kind].append(pointers.data[mask.data][:, None] + np.arange(size, dtype=np.uint64))

        def on_load(builder, pointers, mask, *rest):
            seen("read", pointers, mask)
            return load(builder, pointers, mask, *rest)

        def on_store(builder, pointers, value, mask, *rest):
            seen("written", pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def on_unary(builder, value, operation):
            self.launches[-1].exps += value.data.size * (operation in (np.exp, np.exp2, np.log, np.log2))
            return unary(builder, value, operation)

        def on_binary(builder, a, b, operation):
            arithmetic = operation in (np.add, np.subtract, np.multiply, np.divide)
            self.launches[-1].flops += np.broadcast(a.data, b.data).size * (arithmetic and a.data.dtype == np.float32)
            return binary(builder, a, b, operation)

        def on_launch(executor, *args, **kwargs):
            self.launches.append(SimpleNamespace(flops=0, exps=0))
            self._addresses = {"read": [], "written": []}
            launch(executor, *args, **kwargs)
            for kind, found in self._addresses.items():
                setattr(self.launches[-1], kind, len(np.unique(np.concatenate([v.ravel() for v in found]))))

        monkeypatch.setattr(builder, "create_masked_load", on_load)
        monkeypatch.setattr(builder, "create_masked_store", on_store)
        monkeypatch.setattr(builder, "unary_op", on_unary)
        monkeypatch.setattr(builder, "binary_op", on_binary)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", on_launch)

    def assert_equals(self, cost: Cost) -> None:
        """Exactly; but for FLOPs, of which the kernels have a few more (sums begin at zero)."""
        found = {
            kind: sum(getattr(one, kind) for one in self.launches) for kind in ("read", "written", "exps", "flops")
        }
        assert (found["read"], found["written"], found["exps"]) == (cost.read, cost.written, cost.exps)
        assert cost.flops <= found["flops"] <= 1.25 * cost.flops


@pytest.fixture
def interpreted(monkeypatch, triton_device):
    if not triton_runtime.interpreting():
        pytest.skip("counts what the interpreter executes; here the kernels run on a GPU")
    return Interpreted(monkeypatch)


def conv_inputs(B, T, E, K, dtype, past):
    tensors = dict(x=(B, T, E), weight=(E, K), bias=(E,)) | (dict(past=(B, K - 1, E)) if past else {})
    return {name: torch.randn(shape, dtype=dtype) for name, shape in tensors.items()}


CONV = dict(B=2, T=64, E=64, K=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("past", [True, False], ids=["past", "fresh"])
def test_conv_forward(dtype, silu, past, interpreted):
    a = conv_inputs(**CONV, dtype=dtype, past=past)
    causal_conv1d(**a, silu=silu, backend="triton")
    expected = costs.conv_forward(**CONV, size=dtype.itemsize, silu=silu, past=past)
    # Where there is a past the kernel adds two loads, one of them of zeros.
    interpreted.launches[0].flops -= past * CONV["K"] * a["x"].numel()
    interpreted.assert_equals(expected)


def test_conv_forward_with_tables(interpreted):
    a = conv_inputs(**CONV, dtype=torch.float32, past=False)
    causal_conv1d(**a, silu=True, mask=torch.ones(2, 64, dtype=torch.bool), backend="triton")
    interpreted.assert_equals(costs.conv_forward(**CONV, size=4, tables=True))


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_conv_backward(silu, interpreted):
    from jambascope.kernels.causal_conv.triton import BLOCK_T

    B, T, E, K = CONV.values()
    a = {k: v.requires_grad_() for k, v in conv_inputs(**CONV, dtype=torch.float32, past=True).items()}
    out = causal_conv1d(**a, silu=silu, backend="triton")
    interpreted.launches.clear()
    out.sum().backward()
    weights, inputs = interpreted.launches
    cells, sums = B * T * E, B * (T // BLOCK_T) * (K + 1) * E
    weights.flops -= (1 + silu) * K * cells  # as in the forward
    weights.flops += (K + 1) * cells  # tl.sum, which the interpreter leaves to numpy
    inputs.flops = inputs.flops * T // (3 * BLOCK_T)  # T + K - 1 inputs take three blocks
    outside = Cost(read=4 * sums, written=4 * (K + 1) * E, flops=sums)  # torch adds the blocks' sums
    interpreted.launches.append(outside)
    interpreted.assert_equals(costs.conv_backward(**CONV, size=4, block_T=BLOCK_T, silu=silu, past=True))


def test_conv_step(interpreted):
    E, K = 256, 4
    a = conv_inputs(3, 1, E, K, torch.bfloat16, True)
    a["x"] = a["x"][:, 0]
    causal_conv1d_step(**a, silu=True, backend="triton")
    interpreted.assert_equals(costs.conv_step(3, E, K, 2))


class Elementwise(TorchDispatchMode):
    """Elements that torch's own operations compute."""

    FLOPS = {"mul": 1, "add": 1, "sub": 1, "div": 1, "addcmul": 2, "addcmul_": 2, "mul_": 1, "add_": 1, "neg": 0}

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.exps = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.flops += self.FLOPS.get(name, 0) * out.numel()
            self.exps += (name in ("exp", "exp2", "exp_", "exp2_")) * out.numel()
            if name in ("bmm", "mm"):
                self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return out


@pytest.mark.parametrize("N", [4, 16])
def test_scan_forward(N):
    B, T, E = 2, 33, 20
    x, dt = torch.randn(2, B, T, E)
    A, (BB, C), D = -torch.rand(E, N), torch.randn(2, B, T, N), torch.randn(E)
    with Elementwise() as counted:
        result = selective_scan(x, dt.abs(), A, BB, C, D, backend="reference")
    cost = costs.scan_forward(B, T, E, N, 4, gate=False, softplus=False)
    assert cost.exps == counted.exps
    assert 0.9 * counted.flops <= cost.flops <= 1.1 * counted.flops
    assert cost.read == sum(v.nbytes for v in (x, dt, A, BB, C, D))
    assert cost.written == result.y.nbytes + result.final_state.nbytes
    more = costs.scan_forward(B, T, E, N, 4, initial_state=True, chunk=16)
    gate, bias, checkpoints = x.nbytes, D.nbytes, 3 * result.final_state.nbytes
    assert more.read == cost.read + gate + bias + result.final_state.nbytes
    assert more.written == cost.written + checkpoints
    assert more.exps == cost.exps + 3 * x.numel()


@pytest.mark.skipif(
    find_spec("jambascope.kernels.selective_scan.triton") is None, reason="the scan has no Triton backend"
)
@pytest.mark.parametrize("full", [True, False], ids=["gate-softplus", "plain"])
def test_scan_by_the_interpreter(full, interpreted):
    from jambascope.kernels.selective_scan.triton_launch import CHUNK

    B, T, E, N = 2, 2 * CHUNK, 64, 16
    names = dict(x=(B, T, E), dt=(B, T, E), A=(E, N), B=(B, T, N), C=(B, T, N), D=(E,))
    names |= dict(gate=(B, T, E), dt_bias=(E,)) if full else {}
    a = {name: torch.rand(shape) for name, shape in names.items()} | dict(A=-torch.rand(E, N).requires_grad_())
    cost = costs.scan_forward(B, T, E, N, 4, gate=full, softplus=full, chunk=CHUNK)
    result = selective_scan(**a, dt_softplus=full, backend="triton")
    (forward,) = interpreted.launches
    assert (forward.read, forward.written, forward.exps) == (cost.read, cost.written, cost.exps)
    assert forward.flops + B * T * E * N == pytest.approx(cost.flops, rel=0.05)  # and tl.sum, which numpy does
    interpreted.launches.clear()
    result.y.sum().backward()
    written = sum(one.written for one in interpreted.launches)
    # The sums of the partial gradients of B and C are torch's; states are set down every few positions.
    kernel = costs.scan_backward(B, T, E, N, 4, chunk=CHUNK, block_E=32, gate=full, softplus=full)
    states = (written - (kernel.written - 2 * B * T * N * 4)) / (B * E * N * 4)
    assert states == int(states) and T % states == 0
    exps = sum(one.exps for one in interpreted.launches)
    assert exps == pytest.approx(kernel.exps, rel=0.05)


def test_scan_in_segments_and_step():
    one = costs.scan_forward(2, 64, 32, 16, 4)
    cut = costs.scan_chunked(2, 64, 32, 16, 4, segment=16)
    assert cut.exps == 2 * one.exps - 2 * 64 * 32  # the gate's only once
    states = 2 * 32 * 16 * 4
    assert cut.written == one.written + 3 * 4 * states
    step = costs.scan_step(2, 32, 16, 4)
    assert step.read + step.written >= 2 * states and step.exps == 2 * 32 * (16 + 3)


def test_experts():
    M, S, X, D, F = 24, 2, 4, 16, 40
    x, gate_up, down = torch.randn(M, D), torch.randn(X, 2 * F, D), torch.randn(X, D, F)
    indices = torch.arange(M * S).view(M, S) % X
    leaves = [v.requires_grad_() for v in (x, gate_up, down)]
    with FlopCounterMode(display=False) as forward:
        inner, outer = [], []
        for e in range(X):
            gate, up = (x[(indices == e).nonzero()[:, 0]] @ gate_up[e].T).chunk(2, dim=-1)
            inner.append(torch.nn.functional.silu(gate) * up)
            outer.append(inner[-1] @ down[e].T)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(sum(v.sum() for v in outer), leaves)
    cost = costs.experts_forward(M, S, X, D, F, 4)
    assert cost.matmul == forward.get_total_flops() and cost.exps == M * S * F
    assert costs.experts_backward(M, S, X, X, D, F, 4).matmul == backward.get_total_flops()
    assert costs.expert_weights(X, D, F, 4) == gate_up.nbytes + down.nbytes
    pairs = sum(v.nbytes for v in [*inner, *outer])
    assert cost.read == gate_up.nbytes + down.nbytes + x.nbytes + pairs
    assert cost.written == pairs + x.nbytes


@pytest.mark.parametrize("tokens", [1, 3, 32], ids=["one-token", "few-tokens", "many-tokens"])
def test_experts_by_the_interpreter(tokens, interpreted):
    """Bytes but for the lists of tokens and experts; exponentials but for the padding of tiles."""
    S, X, D, F = 2, 4, 32, 64
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((tokens, D), (X, 2 * F, D), (X, D, F))]
    indices, weights = torch.arange(tokens * S).view(tokens, S) % X, torch.rand(tokens, S)
    few, used = tokens * S <= 8, min(X, tokens * S)

    def compare(cost, lists):
        read, written, exps = (
            sum(getattr(one, k) for one in interpreted.launches) for k in ("read", "written", "exps")
        )
        assert cost.read <= read <= cost.read + lists and cost.written <= written <= cost.written + lists
        assert cost.exps <= exps <= 4 * cost.exps

    with torch.no_grad():
        experts(leaves[0], indices, weights, *leaves[1:], backend="triton")
    forward = costs.experts_decode if few else costs.experts_forward
    lists = (8 + 4) * tokens * S * 4 + 64 * X  # indices, weights, order and place, in each launch; offsets
    compare(forward(tokens, S, used, D, F, 4), lists)
    if not few:
        out = experts(leaves[0], indices, weights, *leaves[1:], backend="triton")
        interpreted.launches.clear()
        out.sum().backward()
        compare(costs.experts_backward(tokens, S, used, X, D, F, 4), 2 * lists)


def test_int8_halves_the_experts():
    sizes = dict(M=1, S=2, used=2, D=4096, F=14336, size=2)
    assert 0.5 < costs.experts_decode(**sizes, int8=True).read / costs.experts_decode(**sizes).read < 0.501


def test_the_bound_is_the_busiest_resource():
    machine = costs.Machine("toy", bandwidth=10.0, flops=100.0, exps=1.0, matmul=1000.0)
    assert machine.bound(Cost(read=15, written=5, flops=100, exps=3)) == (3.0, "exps")
    assert machine.bound(Cost(read=100, flops=100, matmul=5000)) == (10.0, "memory")


def test_the_table_is_printed_for_a_measured_machine(capsys):
    assert costs.main(["--bandwidth", "20", "--exps", "0.001", "--length", "512", "--d-model", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "this machine: 20 GB/s, 67 TFLOP/s, 0.001e12 exp/s" in lines[0]
    (scan,) = [line for line in lines if line.startswith("scan forward  ")]
    cost = costs.scan_forward(1, 512, 512, 16, 2)
    assert scan.split()[-1] == "exps" and float(scan.split()[-2]) == pytest.approx(cost.exps / 1e9 * 1e6, rel=1e-3)

"""What each kernel must read, write and compute, and the time below which no machine can do it.

Bytes are those that cross between memory and the chip once per launch: an array read twice by neighbouring programs
or by the same one counts once, since the caches hold it. FLOPs count a multiplication, an addition and a division as
one each (a fused multiply-add as two); ``matmul`` counts those of matrix products. Exponentials, which run on units of
their own on a GPU, are counted apart, and so is the logarithm of softplus. Left out: work for the padding of blocks,
and the lists of which token goes to which expert.

Letters: B batch, T positions, E channels, N states, K taps (d_conv); M tokens, S slots (experts per token),
D d_model, F d_mlp; ``size`` the bytes of an activation.

``python -m jambascope.kernels.costs`` prints the table for the shapes of Jamba-v0.1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

FLOAT = 4
INDEX = 4


@dataclass(frozen=True)
class Cost:
    read: int = 0
    """Bytes."""
    written: int = 0
    """Bytes."""
    flops: int = 0
    exps: int = 0
    matmul: int = 0
    """FLOPs in matrix products."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Machine:
    name: str
    bandwidth: float
    """Bytes a second."""
    flops: float
    """float32 FLOPs a second outside matrix products."""
    exps: float
    """Exponentials a second."""
    matmul: float
    """FLOPs a second in matrix products."""

    def times(self, cost: Cost) -> dict[str, float]:
        """Seconds that each resource is busy."""
        return {
            "memory": (cost.read + cost.written) / self.bandwidth,
            "flops": cost.flops / self.flops,
            "exps": cost.exps / self.exps,
            "matmul": cost.matmul / self.matmul,
        }

    def bound(self, cost: Cost) -> tuple[float, str]:
        """The least seconds that ``cost`` takes, were everything to overlap, and what it is bound by."""
        return max((seconds, name) for name, seconds in self.times(cost).items())


H100 = Machine("H100 SXM", bandwidth=3.35e12, flops=67e12, exps=16 * 132 * 1.83e9, matmul=989e12)
"""NVIDIA H100 data sheet, bf16 dense; 16 exp2 per clock and SM: CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions", compute capability 9.0; 132 SMs at 1.83 GHz."""

_SIGMOID = 3  # the exponent's factor, the sum and the division; the exponential is counted apart
_SOFTPLUS = 3


# -- selective scan ------------------------------------------------------------------------------------------


def scan_forward(
    B: int,
    T: int,
    E: int,
    N: int,
    size: int,
    *,
    gate: bool = True,
    softplus: bool = True,
    initial_state: bool = False,
    chunk: int | None = None,
) -> Cost:
    """``chunk``: positions per checkpoint that is kept for the backward; None without gradients.

    Per state: dt A, its exp2, the decay, dt x B and the read-out: 6 FLOPs. Per channel: dt x, D x, gate.
    """
    cells = B * T * E
    states = B * E * N * FLOAT
    return Cost(
        read=cells * size * (2 + gate)
        + 2 * B * T * N * size
        + (E * N + E + E * softplus) * FLOAT
        + initial_state * states,
        written=cells * size + states + (0 if chunk is None else -(-T // chunk) * states),
        flops=cells * (6 * N + 3 + gate * (_SIGMOID + 2) + softplus * (1 + _SOFTPLUS)),
        exps=cells * (N + gate + 2 * softplus),
    )


def scan_backward(
    B: int,
    T: int,
    E: int,
    N: int,
    size: int,
    *,
    chunk: int,
    block_E: int,
    gate: bool = True,
    softplus: bool = True,
    decays: int = 2,
    every: int | None = None,
) -> Cost:
    """States are computed again from checkpoints; ``decays``: how often a decay is (2: forwards, and on the way back).

    ``every``: positions per state that is set down on the way forwards and picked up on the way back; None if none.
    ``block_E``: channels to a program, which writes its own sums for the gradients of B and C. Per state: 4 FLOPs
    forwards, one more for each further decay, then 2 each for the adjoint, the gradients of C, B, x, dt, A and the
    read-out before the gate, and 3 for what goes through the decay.
    """
    cells = B * T * E
    states = B * E * N * FLOAT
    partials = 2 * B * T * N * -(-E // block_E) * FLOAT
    kept = 0 if every is None else -(-T // every) * states
    gates = gate * (2 * _SIGMOID + 6)
    return Cost(
        read=cells * size * (3 + gate)
        + 2 * B * T * N * size
        + (E * N + E + E * softplus) * FLOAT
        + states * (-(-T // chunk) + 1)
        + partials
        + kept,
        written=cells * size * (2 + gate)
        + partials
        + 2 * B * T * N * size
        + 2 * states  # the gradients of A, by row, and of the initial state, asked for or not
        + B * E * (1 + softplus) * FLOAT
        + kept,
        flops=cells * (N * (4 + decays - 1 + 2 * (6 + gate) + 3) + 6 + gates + softplus * (2 + _SOFTPLUS + _SIGMOID)),
        exps=cells * (decays * N + gate + 3 * softplus),
    )


def scan_step(B: int, E: int, N: int, size: int, *, gate: bool = True, softplus: bool = True) -> Cost:
    """One token: the state is read and written, A read."""
    return scan_forward(B, 1, E, N, size, gate=gate, softplus=softplus, initial_state=True)


def scan_chunked(
    B: int, T: int, E: int, N: int, size: int, *, segment: int, gate: bool = True, softplus: bool = True
) -> Cost:
    """Segments in parallel: each one's affine map, the carry from segment to segment, then the scan from there."""
    cells, segments = B * T * E, -(-T // segment)
    ends = B * E * N * FLOAT * segments
    maps = Cost(
        read=cells * size * 2 + B * T * N * size + (E * N + E * softplus) * FLOAT,
        written=2 * ends,
        flops=cells * (5 * N + 1 + softplus * (1 + _SOFTPLUS)),
        exps=cells * (N + 2 * softplus),
    )
    carry = Cost(read=2 * ends, written=ends, flops=2 * B * E * N * segments)
    return maps + carry + scan_forward(B, T, E, N, size, gate=gate, softplus=softplus) + Cost(read=ends)


# -- causal convolution --------------------------------------------------------------------------------------


def conv_forward(
    B: int, T: int, E: int, K: int, size: int, *, silu: bool = True, past: bool = False, tables: bool = False
) -> Cost:
    """``tables``: with padding or packed documents."""
    cells = B * T * E
    return Cost(
        read=cells * size + (K + 1) * E * size + past * B * (K - 1) * E * size + tables * B * T * K * INDEX,
        written=cells * size,
        flops=cells * (2 * K + silu * (_SIGMOID + 1)),
        exps=cells * silu,
    )


def conv_backward(
    B: int,
    T: int,
    E: int,
    K: int,
    size: int,
    *,
    block_T: int,
    silu: bool = True,
    past: bool = False,
    tables: bool = False,
) -> Cost:
    """Two launches with the gradient before SiLU in float32 between them; sums over ``block_T`` positions, added up."""
    cells, blocks = B * T * E, B * -(-T // block_T)
    pasts = B * (K - 1) * E * size
    sums = blocks * (K + 1) * E * FLOAT
    weights = Cost(
        read=2 * cells * size + (K * E * size + E * size) * silu + past * pasts + tables * B * T * K * INDEX + sums,
        written=cells * FLOAT + sums + (K + 1) * E * FLOAT,
        flops=cells * (2 * K + 1 + silu * (2 * K + _SIGMOID + 5)) + blocks * (K + 1) * E,
        exps=cells * silu,
    )
    inputs = Cost(
        read=cells * FLOAT + K * E * size + tables * B * (T + K - 1) * K * INDEX,
        written=cells * size + pasts,
        flops=2 * K * cells,
    )
    return weights + inputs


def conv_step(B: int, E: int, K: int, size: int, *, silu: bool = True) -> Cost:
    pasts = B * (K - 1) * E * size
    return Cost(
        read=B * E * size + pasts + (K + 1) * E * size,
        written=B * E * size + pasts,
        flops=B * E * (2 * K + silu * (_SIGMOID + 1)),
        exps=B * E * silu,
    )


# -- experts -------------------------------------------------------------------------------------------------


def expert_weights(experts: int, D: int, F: int, size: int, *, int8: bool = False) -> int:
    """Bytes of the weights of so many experts: gate, up and down; with a float32 scale for every row in int8."""
    return experts * (3 * D * F + (2 * F + D) * FLOAT) if int8 else experts * 3 * D * F * size


def experts_forward(
    M: int, S: int, used: int, D: int, F: int, size: int, *, int8: bool = False, keep: bool = False
) -> Cost:
    """Sorted tokens through gate_up with SwiGLU, down, and the weighted sum over slots; three launches.

    ``used``: how many experts have a token; ``keep``: gate and up are stored for the backward.
    """
    P = M * S
    return Cost(
        read=expert_weights(used, D, F, size, int8=int8) + (M * D + P * F + P * D) * size,
        written=(P * F + P * D + M * D + keep * 2 * P * F) * size,
        flops=P * F * (_SIGMOID + 2) + 2 * P * D + int8 * P * (2 * F + D),
        exps=P * F,
        matmul=6 * P * D * F,
    )


def experts_backward(M: int, S: int, used: int, experts: int, D: int, F: int, size: int) -> Cost:
    """Through down, SwiGLU and gate_up to x, and the gradients of all ``experts`` weights; gate and up were kept."""
    P = M * S
    through = Cost(
        read=expert_weights(used, D, F, size) + (M * D + 2 * P * F + 2 * P * F + P * D) * size,
        written=(3 * P * F + P * D + M * D) * size,
        flops=P * F * (_SIGMOID + 11) + 2 * P * D,
        exps=P * F,
        matmul=6 * P * D * F,
    )
    weights = Cost(
        read=(3 * P * F + 2 * M * D) * size, written=expert_weights(experts, D, F, size), matmul=6 * P * D * F
    )
    return through + weights


def experts_decode(M: int, S: int, used: int, D: int, F: int, size: int, *, int8: bool = False) -> Cost:
    """A few tokens: two launches without sorting, the products not in matrix units."""
    P = M * S
    return Cost(
        read=expert_weights(used, D, F, size, int8=int8) + (M * D + P * F) * size,
        written=(P * F + M * D) * size,
        flops=6 * P * D * F + P * F * (_SIGMOID + 2) + 2 * P * D + int8 * P * (2 * F + D),
        exps=P * F,
    )


# -- table ---------------------------------------------------------------------------------------------------


def table(
    B: int, T: int, d_model: int, N: int, *, size: int = 2, chunk: int = 32, block_E: int = 32, segment: int = 1024
) -> dict[str, Cost]:
    """Every kernel at the proportions of Jamba: E = 2 d_model, d_mlp = 3.5 d_model, 16 experts, 2 to a token."""
    E, K, D, F, M = 2 * d_model, 4, d_model, 7 * d_model // 2, B * T
    used = min(16, 2 * M)
    scan = (B, T, E, N, size)
    return {
        "scan forward": scan_forward(*scan),
        "scan forward, with gradients": scan_forward(*scan, chunk=chunk),
        "scan backward": scan_backward(*scan, chunk=chunk, block_E=block_E, every=4),
        f"scan in segments of {segment}": scan_chunked(*scan, segment=segment),
        "scan step": scan_step(B, E, N, size),
        "conv forward": conv_forward(B, T, E, K, size),
        "conv backward": conv_backward(B, T, E, K, size, block_T=32),
        "conv step": conv_step(B, E, K, size),
        "experts forward": experts_forward(M, 2, used, D, F, size),
        "experts forward, int8": experts_forward(M, 2, used, D, F, size, int8=True),
        "experts backward": experts_backward(M, 2, used, 16, D, F, size),
        "experts decode": experts_decode(B, 2, min(16, 2 * B), D, F, size),
        "experts decode, int8": experts_decode(B, 2, min(16, 2 * B), D, F, size, int8=True),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jambascope.kernels.costs",
        description="Bytes, operations and the least time of every kernel on a machine.",
    )
    sizes = {"batch": 1, "length": 4096, "d-model": 4096, "d-state": 16, "bytes": 2, "chunk": 32, "block": 32}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    teraflops = ("TFLOP/s", 1e12)
    units = {"bandwidth": ("GB/s", 1e9), "flops": teraflops, "exps": ("1e12/s", 1e12), "matmul": teraflops}
    for name, (unit, _) in units.items():
        parser.add_argument(f"--{name}", type=float, help=f"measured, {unit} [that of an {H100.name}]")
    o = parser.parse_args(arguments)
    measured = {name: getattr(o, name) * scale for name, (_, scale) in units.items() if getattr(o, name) is not None}
    machine = replace(H100, **measured, name="this machine" if measured else H100.name)
    costs = table(o.batch, o.length, o.d_model, o.d_state, size=o.bytes, chunk=o.chunk, block_E=o.block)
    print(
        f"{machine.name}: {machine.bandwidth / 1e9:.0f} GB/s, {machine.flops / 1e12:.3g} TFLOP/s, "
        f"{machine.exps / 1e12:.3g}e12 exp/s, {machine.matmul / 1e12:.3g} TFLOP/s in matrix products"
    )
    print(
        f"batch {o.batch}, {o.length} positions, d_model {o.d_model}, d_state {o.d_state}, {o.bytes} bytes a number\n"
    )
    head = ("read, MB", "written, MB", "GFLOP", "1e9 exp", "matmul GFLOP", "bound, us")
    print(f"{'':30}" + "".join(f"{h:>14}" for h in head) + "  by")
    for name, c in costs.items():
        seconds, resource = machine.bound(c)
        numbers = (c.read / 1e6, c.written / 1e6, c.flops / 1e9, c.exps / 1e9, c.matmul / 1e9, seconds * 1e6)
        print(f"{name:30}" + "".join(f"{v:14.4g}" for v in numbers) + f"  {resource}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

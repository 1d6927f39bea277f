"""The scan and the MoE layer alone, against the peers' kernels and what their operations cost by themselves.

Axes: B batch, T position, E d_inner (2 d_model), N d_state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from jambascope.kernels import triton_runtime
from jambascope.kernels.selective_scan import selective_scan
from jambascope.moe import MoE
from jambascope.state import Run
from jambascope.studies.bench import exp_kernel, peers
from jambascope.studies.bench.models import EXPERTS, Lab
from jambascope.studies.bench.products import PRODUCTS, call_products, moe_products
from jambascope.studies.bench.race import OURS, Race, Setting
from jambascope.studies.bench.timing import Side

D_STATE = 16
EXP_REGISTERS = "exponentials in registers"
EXP, EXP_INTO, COPY = "torch.exp", "torch.exp into existing memory", "copy of the scan's inputs and output"


def scan_sizes(at: Setting) -> tuple[int, int]:
    """Exponentials of a scan (B T E N), and bytes that it has to read and write: x, dt, gate and y, B and C."""
    d_inner = 2 * at.d_model
    positions = at.batch * at.length
    return positions * d_inner * D_STATE, 4 * positions * (4 * d_inner + 2 * D_STATE)


def scan_sides(lab: Lab, at: Setting, backward: bool) -> dict[str, Side | str]:
    """The scan with skip and gate; ``dt`` is the step size. Each side has its own layout and its own leaves."""
    B, T, E, N = at.batch, at.length, 2 * at.d_model, D_STATE
    count, moved = scan_sizes(at)
    x, gate, z = (lab.random(B, T, E, seed=seed) for seed in (0, 1, 2))
    dt = F.softplus(z - 2)
    A = -torch.arange(1, N + 1, device=lab.device).float().expand(E, N).contiguous()
    maps = [lab.random(B, T, N, seed=seed) for seed in (3, 4)]
    D = torch.ones(E, device=lab.device)
    by_time = [x, dt, A, *maps, D, gate]
    by_channel = [t.transpose(1, 2).contiguous() if t.ndim == 3 else t for t in by_time]
    run = _with_gradients if backward else _without_gradients

    def ours(x, dt, A, B, C, D, gate):
        return selective_scan(x, dt, A, B, C, D, gate=gate).y

    def peer(scan: Callable | str, arguments: list[torch.Tensor], trajectories: int) -> Side | str:
        # Peers hold whole trajectories [B E T N]; their backward holds about four times as many.
        need = (4 if backward else 1) * trajectories * 4 * count
        return scan if isinstance(scan, str) else Side(run(scan, arguments), need)

    mambapy = peers.mambapy_scan()
    gated = mambapy if isinstance(mambapy, str) else lambda *a: mambapy(*a[:6]) * F.silu(a[6])
    sides: dict[str, Side | str] = {
        OURS: Side(run(ours, by_time), 4 * moved),
        "transformers": peer(peers.transformers_scan(), by_channel, 4),
        "mambapy": peer(gated, by_time, 6),
        "mamba_ssm reference": peer(peers.mamba_ssm_reference(), by_channel, 3),
    }
    if lab.device.type == "cuda":
        sides["mamba_ssm CUDA"] = peer(peers.mamba_ssm_cuda(), by_channel, 0)
    if not backward:
        sides |= _scan_bounds(lab, count, moved)
    return sides


def _scan_bounds(lab: Lab, count: int, moved: int) -> dict[str, Side]:
    # Inputs of the bounds are made when they are first needed, by the warm-up: a race may be too large for them.
    made: dict[str, torch.Tensor] = {}

    def tensor(name: str, n: int) -> torch.Tensor:
        if name not in made:
            made[name] = torch.full((n,), -1.0, device=lab.device)
        return made[name]

    copied = moved // 8  # half of the bytes are read, half written
    if lab.device.type == "cuda" and triton_runtime.installed():
        chains = tensor("chains", -(-count // exp_kernel.CHAIN))
        registers = {EXP_REGISTERS: Side(lambda: exp_kernel.exponentials(chains), 8 * len(chains))}
    else:
        registers = {}
    return registers | {
        EXP: Side(lambda: torch.exp(tensor("in", count)), 8 * count),
        EXP_INTO: Side(lambda: torch.exp(tensor("in", count), out=tensor("out", count)), 8 * count),
        COPY: Side(lambda: tensor("to", copied).copy_(tensor("from", copied)), moved),
    }


def _without_gradients(scan: Callable, arguments: list[torch.Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return scan(*arguments)

    return call


def _with_gradients(scan: Callable, arguments: list[torch.Tensor]) -> Callable[[], object]:
    leaves = [t.detach().clone().requires_grad_() for t in arguments]

    def call() -> object:
        y = scan(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return call


def expert_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """One MoE layer, router and experts, on random tokens; both sides have the same weights and choose alike."""
    ours = next(block.mlp for block in lab.ours(at.d_model).blocks if isinstance(block.mlp, MoE))
    layers = lab.theirs(at.d_model).model.layers
    theirs = next(layer.feed_forward for layer in layers if hasattr(layer.feed_forward, "router"))
    x = lab.random(at.batch, at.length, at.d_model)
    need = 64 * x.numel()
    run = Run(at.batch, at.length, lab.device, None, None)
    with torch.no_grad():
        counts = ours.router(x, run)[0].flatten().bincount(minlength=EXPERTS).tolist()

    def their_layer(implementation: str) -> Side:
        @torch.no_grad()
        def call() -> torch.Tensor:
            config = theirs.experts.config  # the model's own, which other races use as it is
            before = config._experts_implementation
            config._experts_implementation = implementation
            try:
                return theirs(x)
            finally:
                config._experts_implementation = before

        return Side(call, need)

    return {
        OURS: Side(torch.no_grad()(lambda: ours(x, run)), need),
        "transformers eager": their_layer("eager"),
        "transformers grouped": their_layer("grouped_mm"),
        PRODUCTS: Side(call_products(moe_products(ours, counts)), need),
    }


SCAN = Race(
    "scan",
    "Selective scan, forward",
    lambda lab, at: scan_sides(lab, at, backward=False),
    bounds=(EXP, EXP_INTO, EXP_REGISTERS, COPY),
    precise=3,
)
SCAN_BACKWARD = Race(
    "scan-backward", "Selective scan, forward and backward", lambda lab, at: scan_sides(lab, at, backward=True)
)
EXPERT_RACE = Race("experts", "One MoE layer: router and experts", expert_sides, bounds=(PRODUCTS,), precise=3)

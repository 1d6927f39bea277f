"""The Mamba-1 mixer, with Jamba's RMSNorm on dt, B and C or without.

Axes: B batch, T position, D d_model, E d_inner, N d_state, R dt_rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum
from torch import nn

from jambascope.config import JambaConfig
from jambascope.devices import index_tensor
from jambascope.hook_point import HookPoint
from jambascope.kernels import activations
from jambascope.kernels.selective_scan import ScanResult, selective_scan, step_size
from jambascope.kernels.selective_scan.shared import Inputs, scan_on
from jambascope.norms import InnerNorm
from jambascope.ssm_mixer import convolve, scan_with_listeners
from jambascope.state import MambaState, Run


class MambaMixer(nn.Module):
    """in_proj -> conv, SiLU -> (dt, B, C) -> selective scan -> gate -> out_proj.

    Padding is zeroed before and after the convolution and given a step size of zero, so that it neither writes
    to the state nor decays it, on whichever side it stands.
    """

    def __init__(self, config: JambaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        E, N, R = config.d_inner, config.d_state, config.dt_rank
        self.dt_rank, self.d_state = R, N
        self.in_proj = nn.Linear(config.d_model, 2 * E, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, bias=config.conv_bias)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E, bias=True)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, config.d_model, bias=config.proj_bias)
        if config.inner_norms:
            self.dt_layernorm = InnerNorm(R, config.eps)
            self.b_layernorm = InnerNorm(N, config.eps)
            self.c_layernorm = InnerNorm(N, config.eps)
        else:
            self.dt_layernorm = self.b_layernorm = self.c_layernorm = nn.Identity()
        self.hook_in_proj = HookPoint()  # [B T 2E]
        self.hook_conv_state = HookPoint()  # [B T d_conv-1 E]
        self.hook_conv = HookPoint()  # [B T E]
        self.hook_x = HookPoint()  # [B T E]
        self.hook_gate = HookPoint()  # [B T E]
        self.hook_dt = HookPoint()  # [B T E]
        self.hook_B = HookPoint()  # [B T N]
        self.hook_C = HookPoint()  # [B T N]
        self.hook_ssm_write = HookPoint()  # [B E T N]
        self.hook_ssm_state = HookPoint()  # [B E T N]
        self.hook_ssm_read = HookPoint()  # [B E T N]
        self.hook_y = HookPoint()  # [B T E]
        self.hook_z = HookPoint()  # [B T E]

    def forward(self, hidden: torch.Tensor, run: Run, reads: torch.Tensor | None = None) -> torch.Tensor:
        """[B T D] -> [B T D]; the state before the first position comes from ``run.state``.

        Where nobody listens and only the positions ``reads`` are wanted: [B read D].
        """
        mask = None if run.mask is None else run.mask[..., None].to(hidden.dtype)
        memory = run.mamba_state(self.layer)
        # Slices rather than chunk and split: their outputs could not be edited in place by a hook.
        d_inner, gate = self.in_proj.out_features // 2, None
        if reads is None:
            projected = self.hook_in_proj(self.in_proj(hidden))
            x, gate = projected[..., :d_inner], self.hook_gate(projected[..., d_inner:])
        else:
            x = self._project_in(hidden, slice(d_inner))
        x, new_conv = convolve(self.conv1d, self.hook_conv, self.hook_conv_state, x, run, memory)
        x = self.hook_x(x if mask is None else x * mask)

        dt_B_C = self.x_proj(x)
        R, N = self.dt_rank, self.d_state
        B = self.hook_B(self.b_layernorm(dt_B_C[..., R : R + N]))
        C = self.hook_C(self.c_layernorm(dt_B_C[..., R + N :]))
        dt = self.dt_layernorm(dt_B_C[..., :R])

        scan = self._scan(x, dt, B, C, gate, run, memory)
        if run.packed_states is not None:
            run.packed_states[self.layer] = scan.final_state
        elif run.packing is None and memory is not None:
            run.update_mamba(self.layer, MambaState(new_conv, scan.final_state))
        if reads is None:
            return self.out_proj(self.hook_z(scan.y))
        gate = self._project_in(hidden.index_select(1, reads), slice(d_inner, None))
        return self.out_proj(activations.gated(scan.y.index_select(1, reads), gate))

    def carry_on(
        self, states: torch.Tensor, sequences: Sequence[int], firsts: Sequence[int], inputs: Inputs
    ) -> torch.Tensor:
        """What rows [R E N] of states add to the stream from their first positions on, when what enters the layer there
        is that of a sequence whose ``inputs`` are known: [1 token D]."""
        A = -torch.exp(self.A_log.to(inputs.dt.dtype))
        return self.out_proj(scan_on(states, sequences, firsts, inputs, A, self.D))

    def _project_in(self, hidden: torch.Tensor, half: slice) -> torch.Tensor:
        """x or the gate alone."""
        bias = self.in_proj.bias
        return F.linear(hidden, self.in_proj.weight[half], None if bias is None else bias[half])

    def parameters_of_step(self) -> tuple[torch.Tensor | None, ...]:
        """The parameters in the order in which ``decode`` takes them; looked up fast, for every token."""
        linear, conv, x, dt, out = (
            self._modules[name]._parameters for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
        )
        norms = (self._modules[f"{name}_layernorm"]._parameters.get("weight") for name in ("dt", "b", "c"))
        return (
            *(linear["weight"], linear["bias"], conv["weight"], conv["bias"], x["weight"], *norms),
            *(dt["weight"], dt["bias"], self.A_log, self.D, out["weight"], out["bias"]),
        )

    def _scan(self, x, dt, B, C, gate, run: Run, memory: MambaState | None) -> ScanResult:
        """dt [B T R] as a step size, the scan and the gate, if there is one yet.

        Steps, trajectory and read-out before the gate exist only when somebody listens to them.
        """
        dtype, mask = torch.promote_types(dt.dtype, torch.float32), run.mask
        A = -torch.exp(self.A_log.to(dtype))
        arguments = dict(A=A, B=B, C=C, D=self.D, initial_state=None if memory is None else memory.ssm, mask=mask)
        if run.packing is not None:
            arguments.update(cu_seqlens=run.packing.bounds, initial_rows=memory.ssm_rows)
            arguments["return_last_state"] = run.packed_states is not None
        trajectory = self.hook_ssm_write.heard or self.hook_ssm_state.heard or self.hook_ssm_read.heard
        open_y = self.hook_y.heard or self.hook_ssm_read.heard
        if not open_y:
            arguments["gate"] = gate
        if self.hook_dt.heard or trajectory:
            dt = step_size(dt, self.dt_proj.weight, self.dt_proj.bias)
            dt = self.hook_dt(dt if mask is None else dt * mask[..., None])
        else:
            arguments.update(dt_weight=self.dt_proj.weight, dt_bias=self.dt_proj.bias, dt_softplus=True)
        scan = self._scan_with_listeners(x, dt, arguments) if trajectory else selective_scan(x, dt, **arguments)
        if open_y:
            scan = scan._replace(y=activations.gated(self.hook_y(scan.y), gate))
        return scan

    def _scan_with_listeners(self, x: torch.Tensor, dt: torch.Tensor, arguments: dict) -> ScanResult:
        def scan(**states) -> ScanResult:
            return selective_scan(x, dt, **arguments, **states)

        def write() -> torch.Tensor:
            return einsum(dt * x, arguments["B"].to(dt.dtype), "b t e, b t n -> b e t n")

        def read(change: torch.Tensor, at: Sequence[int]) -> torch.Tensor:
            C_at = arguments["C"].index_select(1, index_tensor(at, change.device)).to(change.dtype)
            return einsum(change, C_at, "b e p n, b p n -> b p e")

        like = dt.new_zeros(()).expand(len(x), *arguments["A"].shape)
        return scan_with_listeners(scan, write, read, self, like, x.shape[1])

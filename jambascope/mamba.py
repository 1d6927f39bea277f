"""The Mamba-1 mixer, with Jamba's RMSNorm on dt, B and C or without.

Axes: B batch, T position, D d_model, E d_inner, N d_state, R dt_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from torch import nn

from jambascope.config import JambaConfig
from jambascope.hook_point import HookPoint
from jambascope.kernels.causal_conv import causal_conv1d
from jambascope.kernels.selective_scan import ScanResult, StateEdits, selective_scan
from jambascope.norms import InnerNorm
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
        self.hook_conv = HookPoint()  # [B T E]
        self.hook_x = HookPoint()  # [B T E]
        self.hook_gate = HookPoint()  # [B T E]
        self.hook_dt = HookPoint()  # [B T E]
        self.hook_B = HookPoint()  # [B T N]
        self.hook_C = HookPoint()  # [B T N]
        self.hook_ssm_write = HookPoint()  # [B E T N]
        self.hook_ssm_state = HookPoint()  # [B E T N]
        self.hook_y = HookPoint()  # [B T E]
        self.hook_z = HookPoint()  # [B T E]

    def forward(self, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        """[B T D] -> [B T D]; the state before the first position comes from ``run.state``."""
        mask = None if run.mask is None else run.mask[..., None].to(hidden.dtype)
        memory = run.mamba_state(self.layer)

        # Slices rather than chunk and split: their outputs could not be edited in place by a hook.
        projected = self.hook_in_proj(self.in_proj(hidden))
        d_inner = projected.shape[-1] // 2
        x, gate = projected[..., :d_inner], self.hook_gate(projected[..., d_inner:])
        x, new_conv = self._conv(x, run.mask, None if memory is None else memory.conv)
        x = self.hook_x(x if mask is None else x * mask)

        dt_B_C = self.x_proj(x)
        R, N = self.dt_rank, self.d_state
        B = self.hook_B(self.b_layernorm(dt_B_C[..., R : R + N]))
        C = self.hook_C(self.c_layernorm(dt_B_C[..., R + N :]))
        dt = F.linear(self.dt_layernorm(dt_B_C[..., :R]), self.dt_proj.weight)

        scan = self._scan(x, dt, B, C, gate, run.mask, None if memory is None else memory.ssm)
        if memory is not None:
            run.update_mamba(self.layer, MambaState(new_conv, scan.final_state))
        return self.out_proj(self.hook_z(scan.y))

    def _conv(
        self, x: torch.Tensor, mask: torch.Tensor | None, past: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SiLU of the causal convolution over a row's tokens, as if its padding were not there; and the new past."""
        if mask is not None:
            # Tokens move to the front, in order, so that each meets the tokens before it (or the past), not padding.
            order = (~mask).int().argsort(dim=1, stable=True)[..., None].expand_as(x)
            x = (x * mask[..., None]).gather(1, order)
        heard = self.hook_conv.heard
        out = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, past, silu=not heard)
        if mask is not None:
            out = torch.zeros_like(out).scatter(1, order, out)
        new_past = None if past is None else _last_inputs(past, x, mask)
        return F.silu(self.hook_conv(out)) if heard else out, new_past

    def _scan(self, x, dt, B, C, gate, mask, initial_state) -> ScanResult:
        """softplus of dt and its bias, the scan and the gate.

        Steps, trajectory and read-out before the gate exist only when somebody listens to them.
        """
        dtype = torch.promote_types(dt.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(dtype))
        arguments = dict(A=A, B=B, C=C, D=self.D, initial_state=initial_state, mask=mask)
        if not self.hook_y.heard:
            arguments["gate"] = gate
        trajectory = self.hook_ssm_write.heard or self.hook_ssm_state.heard
        if self.hook_dt.heard or trajectory:
            dt = F.softplus(dt.to(dtype) + self.dt_proj.bias.to(dtype))
            dt = self.hook_dt(dt if mask is None else dt * mask[..., None])
        else:
            arguments.update(dt_bias=self.dt_proj.bias, dt_softplus=True)
        scan = self._scan_with_listeners(x, dt, arguments) if trajectory else selective_scan(x, dt, **arguments)
        if self.hook_y.heard:
            scan = scan._replace(y=self.hook_y(scan.y) * F.silu(gate))
        return scan

    def _scan_with_listeners(self, x: torch.Tensor, dt: torch.Tensor, arguments: dict) -> ScanResult:
        """The scan with its writes and states shown, scanned again with whatever was changed.

        A changed write is added to the state at its position. A changed entry of the state is pinned to the new
        value, and later positions follow from it; entries a hook left alone are scanned again.
        """
        positions = range(x.shape[1])
        edits = None
        if self.hook_ssm_write.heard:
            write = einsum(dt * x, arguments["B"].to(dt.dtype), "b t e, b t n -> b e t n")
            shown = self.hook_ssm_write(write.clone())
            edits = StateEdits(positions, torch.ones_like(write), shown - write)
        scan = selective_scan(x, dt, **arguments, capture="all", edits=edits)
        if not self.hook_ssm_state.heard:
            return scan
        states = scan.captured
        counts_edits = not states.is_inference()  # inference tensors have no version
        version = states._version if counts_edits else None
        original = states if counts_edits else states.clone()
        shown = self.hook_ssm_state(states)
        if counts_edits and states._version != version:
            # Edited in place: what was there before has to be computed again.
            original = selective_scan(x, dt, **arguments, capture="all", edits=edits).captured
        elif counts_edits and shown is states:
            if not (self.hook_ssm_state.wants_gradient or states.retains_grad):
                return scan
        pinned = shown != original
        shift = torch.zeros_like(original) if edits is None else edits.shift
        # Where nothing was changed `shown - original` is zero, but carries the state's gradient into what is shown.
        shift = torch.where(pinned, shown, shift + (shown - original))
        return selective_scan(x, dt, **arguments, edits=StateEdits(positions, (~pinned).to(shown.dtype), shift))


def _last_inputs(past: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The last inputs of each row's tokens, as many as ``past`` [B d_conv-1 E] holds; padding of x is at its end."""
    count = past.shape[1]
    if mask is None:
        return torch.cat((past, x[:, max(0, x.shape[1] - count) :]), dim=1)[:, -count:] if count else past
    index = mask.sum(1)[:, None] + torch.arange(count, device=mask.device)
    return torch.cat((past, x), dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))

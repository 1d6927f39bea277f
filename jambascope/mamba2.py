"""The Mamba-2 mixer (SSD, arXiv 2405.21060), as the ablation of Jamba-1.5 sets it beside Mamba-1.

Axes: B batch, T position, D d_model, E d_inner = H P, H head (``mamba_n_heads``), P channel of a head
(``mamba_d_head``), G group (``mamba_n_groups``), N d_state. Channel e of a state belongs to head ``e // P``.

Jamba's RMSNorm on dt, B and C is of the Mamba-1 mixer (``JambaConfig.inner_norms``): here the step size is one number
per head straight from ``in_proj``, and the authors' gated RMSNorm before ``out_proj`` keeps the activations in check.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import nn

from jambascope.config import JambaConfig
from jambascope.devices import index_tensor
from jambascope.hook_point import HookPoint
from jambascope.kernels.selective_scan import StateEdits
from jambascope.kernels.ssd import SSDResult, ssd, step_size
from jambascope.norms import GatedNorm
from jambascope.ssm_mixer import convolve, scan_with_listeners
from jambascope.state import MambaState, Run


class Mamba2Mixer(nn.Module):
    """in_proj -> (z, xBC, dt); conv, SiLU on xBC -> (x, B, C) -> SSD -> gated RMSNorm -> out_proj.

    Padding is given a step size of zero, so that it neither writes to the state nor decays it, and is left out of the
    convolution, on whichever side it stands.
    """

    def __init__(self, config: JambaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_inner, self.d_state = config.d_inner, config.d_state
        self.n_heads, self.n_groups = config.mamba_n_heads, config.mamba_n_groups
        self.dt_limit = config.dt_min, config.dt_max
        self.chunk_size = config.chunk_size
        E, H, width = self.d_inner, self.n_heads, config.conv_width("mamba2")
        self.in_proj = nn.Linear(config.d_model, E + width + H, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GatedNorm(E, config.eps, self.n_groups)
        self.out_proj = nn.Linear(E, config.d_model, bias=config.proj_bias)
        self.hook_in_proj = HookPoint()  # [B T 2E+2GN+H]
        self.hook_gate = HookPoint()  # [B T E]
        self.hook_conv_state = HookPoint()  # [B T d_conv-1 E+2GN]
        self.hook_conv = HookPoint()  # [B T E+2GN]
        self.hook_x = HookPoint()  # [B T E]
        self.hook_B = HookPoint()  # [B T G N]
        self.hook_C = HookPoint()  # [B T G N]
        self.hook_dt = HookPoint()  # [B T H]
        self.hook_ssm_write = HookPoint()  # [B E T N]
        self.hook_ssm_state = HookPoint()  # [B E T N]
        self.hook_ssm_read = HookPoint()  # [B E T N]
        self.hook_y = HookPoint()  # [B T E]
        self.hook_z = HookPoint()  # [B T E]

    def forward(self, hidden: torch.Tensor, run: Run, reads: torch.Tensor | None = None) -> torch.Tensor:
        """[B T D] -> [B T D], or [B read D]; the state before the first position comes from ``run.state``."""
        memory = run.mamba_state(self.layer)
        E, H, G, N = self.d_inner, self.n_heads, self.n_groups, self.d_state

        # Slices rather than chunk and split: their outputs could not be edited in place by a hook.
        projected = self.hook_in_proj(self.in_proj(hidden))
        gate = self.hook_gate(projected[..., :E])
        xBC, dt = projected[..., E:-H], projected[..., -H:]
        xBC, new_conv = convolve(self.conv1d, self.hook_conv, self.hook_conv_state, xBC, run, memory)
        x = self.hook_x(xBC[..., :E])
        B = self.hook_B(xBC[..., E : E + G * N].unflatten(-1, (G, N)))
        C = self.hook_C(xBC[..., E + G * N :].unflatten(-1, (G, N)))
        dt = self._step_size(dt, run.mask)

        scan = self._scan(x, dt, B, C, run, memory)
        if memory is not None and run.packing is None:
            run.update_mamba(self.layer, MambaState(new_conv, scan.final_state.flatten(1, 2)))
        y = self.hook_y(scan.y.flatten(2))
        z = self.hook_z(self.norm(y, gate))
        return self.out_proj(z if reads is None else z.index_select(1, reads))

    def _step_size(self, dt: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """softplus(dt + bias) in float32, within ``dt_limit``, 0 at padding: [B T H]."""
        dt = step_size(dt, self.dt_bias)
        if self.dt_limit != (0.0, None):
            dt = dt.clamp(*self.dt_limit)
        return self.hook_dt(dt if mask is None else dt.masked_fill(~mask[..., None], 0.0))

    def _scan(self, x, dt, B, C, run: Run, memory: MambaState | None) -> SSDResult:
        """SSD; the trajectory of states exists only when somebody listens to it."""
        P = self.d_inner // self.n_heads
        x = x.unflatten(-1, (self.n_heads, P))
        if run.packing is not None:
            memory = memory.gathered()
        initial_state = None if memory is None else memory.ssm.unflatten(1, (self.n_heads, P))
        A = -torch.exp(self.A_log.to(dt.dtype))
        arguments = dict(initial_state=initial_state, mask=run.mask, chunk_size=self.chunk_size)
        if run.packing is not None:
            return ssd(x, dt, A, B, C, self.D, **arguments, cu_seqlens=run.packing.bounds)

        def scan(capture=None, edits: StateEdits | None = None) -> SSDResult:
            """With captured states and edits as hooks see them, [B E T N]."""
            if edits is not None:
                edits = edits._replace(**{k: getattr(edits, k).unflatten(1, (-1, P)) for k in ("scale", "shift")})
            result = ssd(x, dt, A, B, C, self.D, **arguments, capture=capture, edits=edits)
            return result if capture is None else result._replace(captured=result.captured.flatten(1, 2))

        if not (self.hook_ssm_write.heard or self.hook_ssm_state.heard or self.hook_ssm_read.heard):
            return scan()

        def per_head(group_values: torch.Tensor) -> torch.Tensor:
            return group_values.to(dt.dtype).repeat_interleave(self.n_heads // self.n_groups, dim=2)

        def write() -> torch.Tensor:
            write = einsum(dt, x.to(dt.dtype), per_head(B), "b t h, b t h p, b t h n -> b h p t n")
            return rearrange(write, "b h p t n -> b (h p) t n")

        def read(change: torch.Tensor, at: Sequence[int]) -> torch.Tensor:
            C_at = per_head(C.index_select(1, index_tensor(at, change.device)))
            return einsum(change.unflatten(1, (-1, P)), C_at, "b h p t n, b t h n -> b t h p")

        like = dt.new_zeros(()).expand(len(x), self.d_inner, self.d_state)
        return scan_with_listeners(scan, write, read, self, like, x.shape[1])

"""One layer: a mixer, a feed-forward, and the residual stream between them."""

from __future__ import annotations

import torch
from torch import nn

from jambascope.attention import Attention
from jambascope.config import JambaConfig
from jambascope.hook_point import HookPoint, listeners
from jambascope.kernels import decode
from jambascope.kernels.plain import Parts
from jambascope.mamba import MambaMixer
from jambascope.mamba2 import Mamba2Mixer
from jambascope.mlp import DenseMLP
from jambascope.moe import MoE
from jambascope.norms import RMSNorm
from jambascope.state import MambaState, Run


class Block(nn.Module):
    """``x += mixer(ln1(x)); x += feed_forward(ln2(x))``; the second half is absent in pure Mamba."""

    hook_out_is_single_residual_stream = True
    """What TransformerLens's logit lens asks before it reads ``hook_resid_post``."""

    def __init__(self, config: JambaConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.hook_resid_pre = HookPoint()  # [B T D]
        self.ln1 = RMSNorm(config.d_model, config.eps)
        if config.mixers[layer] == "attention":
            self.attn = Attention(config, layer)
            self.hook_attn_out = HookPoint()  # [B T D]
        else:
            self.mixer = (Mamba2Mixer if config.mixers[layer] == "mamba2" else MambaMixer)(config, layer)
            self.hook_mixer_out = HookPoint()  # [B T D]
        self.is_attention = config.mixers[layer] == "attention"
        self.has_feed_forward = config.feed_forwards[layer] != "none"
        if self.has_feed_forward:
            self.hook_resid_mid = HookPoint()  # [B T D]
            self.ln2 = RMSNorm(config.d_model, config.eps)
            self.mlp = MoE(config) if config.feed_forwards[layer] == "moe" else DenseMLP(config)
            self.hook_mlp_out = HookPoint()  # [B T D]
        self.hook_resid_post = HookPoint()  # [B T D]
        self._listeners, self._parts, self._step_sizes = listeners(self), Parts(self), None
        if config.mixers[layer] == "mamba" and config.d_inner % decode.CHANNELS == 0:
            self._step_sizes = decode.Sizes.of(config, layer)

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """[B T D] -> [B T D]; where the run says so, in pieces and into x itself."""
        if run.piece_length is not None:
            return self._forward_in_pieces(x, run)
        if self._step_sizes is not None and decode.fits(x) and not any(self._listeners):
            stepped = self._step(x, run)
            if stepped is not None:
                return stepped
        return self.hook_resid_post(self.feed(self.mix(self.hook_resid_pre(x), run), run))

    def mix(self, x: torch.Tensor, run: Run, reads: torch.Tensor | None = None) -> torch.Tensor:
        """The first half: [B T D] -> [B T D]; where nobody listens and only the positions ``reads`` are wanted,
        [B read D]."""
        if self.is_attention:
            out = self.hook_attn_out(self.attn(self.ln1(x), run, reads))
        else:
            out = self.hook_mixer_out(self.mixer(self.ln1(x), run, reads))
        _note_activation(run, out)
        return _added(run, x if reads is None else x.index_select(1, reads), out)

    def feed(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """The second half, each position by itself: [B T D] -> [B T D], of whatever positions."""
        if not self.has_feed_forward:
            return x
        x = self.hook_resid_mid(x)
        out = self.hook_mlp_out(self.mlp(self.ln2(x), run))
        _note_activation(run, out)
        return _added(run, x, out)

    def _step(self, x: torch.Tensor, run: Run) -> torch.Tensor | None:
        """One token through a Mamba-1 layer in one call, where ``decode`` can."""
        memory = run.mamba_state(self.layer)
        if memory is None or run.mask is not None:
            return None
        if self.layer not in run.step_weights:
            run.step_weights[self.layer] = self._weights_of_step()
        weights = run.step_weights[self.layer]
        if weights is None:
            return None
        out, *new = decode.mamba_block_step(
            x[:, 0], memory.conv, memory.ssm, self._step_sizes, self.config.eps, weights
        )
        run.update_mamba(self.layer, MambaState(*new))
        return out[:, None]

    def _weights_of_step(self) -> tuple[int, ...] | None:
        """Addresses of the parameters as ``decode`` takes them; None where it cannot."""
        if not self._parts.intact():
            return None
        parts = self._modules
        feed_forward = decode.NO_FEED_FORWARD
        if self.has_feed_forward:
            parameters = parts["mlp"].parameters_of_step()
            if parameters is None:
                return None
            feed_forward = (parts["ln2"]._parameters["weight"], *parameters)
        mixer = parts["mixer"].parameters_of_step()
        return self._parts.addresses((parts["ln1"]._parameters["weight"], *mixer, *feed_forward))

    def _forward_in_pieces(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """The same for a long sequence that nobody listens to: what lies between is small and stays in cache."""
        memory = None
        if self.is_attention:
            x += self.attn(self.ln1(x), run)
        else:
            memory = run.mamba_state(self.layer)
            if memory is None:
                memory = MambaState.create(self.config, self.config.mixers[self.layer], len(x), x.device, x.dtype)
        for positions, part in run.pieces(self.layer, memory):
            piece = x[:, positions]
            if not self.is_attention:
                piece += self.mixer(self.ln1(piece), part)
            if self.has_feed_forward:
                piece += self.mlp(self.ln2(piece), part)
        return x


def _added(run: Run, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return x.add_(out) if run.into_stream else x + out


def _note_activation(run: Run, out: torch.Tensor) -> None:
    if run.auxiliary is not None:
        squares = out.float().square().mean(-1)
        mean = squares.mean() if run.mask is None else (squares * run.mask).sum() / run.mask.sum()
        run.auxiliary.squared_activations.append(mean)

"""Mamba layers that no longer see earlier positions: through the convolution, through the state, or both.

Axes: B batch, T position, C channel of the convolution, E channel (d_inner), G group, H head of Mamba-2, N state. What
a position has from earlier ones enters a mixer twice: by the earlier taps of the convolution, and by the state that was
carried over. Both are sums, of which the position's own part is known,

    conv_t = bias + w_last u_t + (earlier taps)          y_t = (D + C_t . B_t dt_t) x_t + (read-out of what was carried)

so that the rest can be replaced, by its mean or by zero, at chosen positions. States themselves are left as they are:
what other positions read does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Way = Literal["conv", "state"]
WAYS: tuple[Way, ...] = ("conv", "state")
Means = Mapping[tuple[int, str], Float[torch.Tensor, " channels"]]
"""(layer, way) -> what stands in for the earlier positions' part."""


@dataclass(frozen=True)
class Cut:
    """A way into a Mamba layer, closed."""

    layer: int
    way: Way
    channels: Bool[torch.Tensor, " channels"] | None = None
    """Of the convolution, or of d_inner; None: all."""


class _Earlier:
    """The hooks of one layer that tell a position's own part from that of earlier ones."""

    def __init__(self, model: HookedJamba, layer: int) -> None:
        self.mixer, self.kind, self.prefix = (
            model.blocks[layer].mixer,
            model.config.mixers[layer],
            f"blocks.{layer}.mixer.",
        )
        self.seen: dict[str, torch.Tensor] = {}

    def listeners(self, way: Way) -> list[tuple[str, Callable]]:
        def keep(value: torch.Tensor, hook) -> None:
            self.seen[hook.name.rsplit("_", 1)[-1] if way == "state" else "in_proj"] = value

        points = ["in_proj"] if way == "conv" else ["x", "B", "C", "dt"]
        return [(f"{self.prefix}hook_{point}", keep) for point in points]

    def own(self, way: Way) -> torch.Tensor:
        """What the position itself gives, [B T C] or [B T E]."""
        if way == "conv":
            conv = self.mixer.conv1d
            first = 0 if self.kind == "mamba" else self.mixer.d_inner
            inputs = self.seen["in_proj"][..., first : first + len(conv.weight)]
            return inputs * conv.weight[:, 0, -1] + (0 if conv.bias is None else conv.bias)
        x, B, C, dt = (self.seen[name] for name in ("x", "B", "C", "dt"))
        met = (B * C).sum(-1)  # [B T], of Mamba-2 [B T G]
        if self.kind == "mamba":
            return (self.mixer.D + met[..., None] * dt) * x
        factor = self.mixer.D + met.repeat_interleave(dt.shape[-1] // met.shape[-1], -1) * dt
        return factor.repeat_interleave(x.shape[-1] // dt.shape[-1], -1) * x


def cut_hooks(
    model: HookedJamba, cuts: Iterable[Cut], positions: Sequence[int], means: Means | None = None
) -> list[tuple[str, Callable]]:
    """Hooks that replace what ``positions`` have from earlier ones, by its mean (None: by zero)."""
    hooks: list[tuple[str, Callable]] = []
    at = torch.tensor(list(positions), device=model.device)
    for cut in cuts:
        earlier = _Earlier(model, cut.layer)

        def replaced(value: torch.Tensor, hook, cut=cut, earlier=earlier) -> torch.Tensor:
            own = earlier.own(cut.way).to(value.dtype)[:, at]
            new = own if means is None else own + means[cut.layer, cut.way].to(own)
            if cut.channels is not None:
                new = torch.where(cut.channels.to(value.device), new, value[:, at])
            return value.index_copy(1, at, new)

        point = "hook_conv" if cut.way == "conv" else "hook_y"
        hooks += [*earlier.listeners(cut.way), (f"{earlier.prefix}{point}", replaced)]
    return hooks


@torch.no_grad()
def earlier_means(
    model: HookedJamba, tokens: Int[torch.Tensor, "batch pos"], positions: Sequence[int], layers: Iterable[int]
) -> dict[tuple[int, str], Float[torch.Tensor, " channels"]]:
    """The mean over sequences and positions of what positions have from earlier ones, for both ways of each layer."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    hooks: list[tuple[str, Callable]] = []
    at = torch.tensor(list(positions), device=model.device)
    for layer in layers:
        for way in WAYS:
            earlier = _Earlier(model, layer)

            def mean(value: torch.Tensor, hook, layer=layer, way=way, earlier=earlier) -> None:
                found[layer, way] = (value - earlier.own(way))[:, at].mean((0, 1))

            point = "hook_conv" if way == "conv" else "hook_y"
            hooks += [*earlier.listeners(way), (f"{earlier.prefix}{point}", mean)]
    with model.hooks(hooks):
        model(tokens, return_type=None)
    return found


def widths(model: HookedJamba, layer: int) -> dict[Way, int]:
    """Channels of each way."""
    return {"conv": len(model.blocks[layer].mixer.conv1d.weight), "state": model.config.d_inner}

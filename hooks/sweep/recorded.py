"""What a sweep keeps of the two runs: values to put in, and everything needed to go on from any layer and position.

Axes: A prompt, T position, D d_model, K key/value head, P d_head, E d_inner, N d_state, W input that the convolution
remembers, R row (one cell of one pair).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope.devices import index_tensor
from jambascope.hook_point import At, HookPoint
from jambascope.hooks.sweep.nodes import CONV_STATE, STATE
from jambascope.state import InferenceState, KeyValueState, MambaState

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass
class Recording:
    """Activations of prompts by hook point, each at positions of its own."""

    values: dict[str, torch.Tensor]
    positions: dict[str, Sequence[int]]
    """What the T axis of each holds, ascending."""

    def places(self, name: str, positions: Sequence[int]) -> np.ndarray:
        """Where on the T axis of a value positions stand."""
        held = self.positions[name]
        if isinstance(held, range):
            return np.asarray(positions) - held.start
        return np.searchsorted(held, positions)

    def at(self, name: str, prompts: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Values of a point whose axes begin A T, of one prompt and position for each row: [R ...]."""
        value = self.values[name]
        return value[prompts, index_tensor(self.places(name, positions), value.device)]


@torch.no_grad()
def record(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "prompt pos"],
    wanted: Mapping[str, Sequence[int]],
    reads: Sequence[int] = (),
    state: InferenceState | None = None,
) -> tuple[Recording, Float[torch.Tensor, "prompt read vocab"]]:
    """One run; what it computed at chosen positions of hook points, and its logits at ``reads`` alone."""
    kept: dict[str, torch.Tensor] = {}
    last = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    every = dict(wanted)
    if reads:
        every[last] = sorted({*wanted.get(last, ()), *reads})

    def keep(value: torch.Tensor, hook: HookPoint) -> None:
        kept[hook.name] = value.clone()

    hooks: list[tuple[str, Callable]] = [(name, At(positions, keep)) for name, positions in every.items()]
    with model.hooks(hooks):
        model(tokens, state=state, return_type=None)
    recording = Recording(kept, every)
    if not reads:
        return recording, model.embed.weight.new_empty(len(tokens), 0, model.config.d_vocab)
    stream = kept[last].index_select(1, index_tensor(recording.places(last, reads), model.device))
    if last not in wanted:
        del kept[last], every[last]
    with model._lock:
        return recording, model.unembed(model.ln_final(stream))


@dataclass
class Base:
    """The run that cells are patched into; it can be gone on with from the beginning of any layer at ``starts``.

    What a layer reads of earlier positions is kept as the model's own memory: keys and values, and at ``starts`` the
    states of Mamba layers.
    """

    recording: Recording
    logits: Float[torch.Tensor, "prompt read vocab"]
    """At the positions that metrics read."""
    length: int
    starts: tuple[int, ...]
    """Positions from which rows may start."""
    keys: dict[int, KeyValueState]
    """Attention layer that rows pass through -> keys and values of all positions."""

    @classmethod
    def record(
        cls,
        model: HookedJamba,
        tokens: Int[torch.Tensor, "prompt pos"],
        reads: Sequence[int],
        starts: Iterable[int],
        layers: range,
        further: Mapping[str, Sequence[int]],
    ) -> Base:
        """One run.

        Args:
            reads: positions that metrics read.
            starts: ascending.
            layers: rows pass through these, and no others.
            further: other hook points to keep, and their positions.
        """
        starts, length = tuple(starts), tokens.shape[1]
        wanted, before = base_points(length, layers, further), {s - 1 for s in starts if s}
        for name in state_points(model, layers) if before else ():
            wanted[name] = sorted(before.union(wanted.get(name, ())))
        state = model.new_state(len(tokens))
        recording, logits = record(model, tokens, wanted, reads, state)
        keys = {i: state.layers[i] for i in layers if isinstance(state.layers[i], KeyValueState)}
        return cls(recording, logits, length, starts, keys)

    def start_of(self, position: int) -> int:
        """Where rows start that are first patched at a position."""
        return self.starts[bisect_right(self.starts, position) - 1]

    def stream(self, layer: int) -> Float[torch.Tensor, "prompt pos d_model"]:
        """What enters a layer; after the last layer what leaves it."""
        name = f"blocks.{layer}.hook_resid_pre"
        if name not in self.recording.values:
            name = f"blocks.{layer - 1}.hook_resid_post"
        return self.recording.values[name]

    def memory(
        self, model: HookedJamba, layer: int, prompts: Int[torch.Tensor, " row"], starts: np.ndarray
    ) -> KeyValueState | MambaState:
        """What a layer remembers when each row of a prompt begins at one of ``starts``; its own to write into.

        Keys and values are those of all positions.
        """
        if layer in self.keys:
            held = self.keys[layer]
            return KeyValueState(*(m[:, : self.length].index_select(0, prompts) for m in (held.keys, held.values)))
        mixer = model.config.mixers[layer]
        if not starts.any():
            return MambaState.create(model.config, mixer, len(prompts), model.device, model.dtype)
        conv = torch.empty(len(prompts), 0, model.config.conv_width(mixer), dtype=model.dtype, device=model.device)
        if model.config.d_conv > 1:
            conv = self._before(f"blocks.{layer}.{CONV_STATE}", prompts, starts)
        return MambaState(conv, self._before(f"blocks.{layer}.{STATE}", prompts, starts))

    def _before(self, name: str, prompts: Int[torch.Tensor, " row"], starts: np.ndarray) -> torch.Tensor:
        """What a Mamba layer held before each row: [R ...], zeros at the first position."""
        value, any_held = self.recording.values[name], self.recording.positions[name][0]
        fresh = np.flatnonzero(starts == 0)
        places = self.recording.places(name, np.where(starts == 0, any_held, starts - 1))
        at = prompts, index_tensor(places, value.device)
        if name.endswith(STATE):  # [A E T N], whose memory is [A T N E]
            found = value.permute(0, 2, 3, 1)[at].mT
        else:
            found = value[at]
        if fresh.size:
            found[index_tensor(fresh, value.device)] = 0
        return found


def base_points(length: int, layers: range, further: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Hook points of the base run that are kept, without those of ``starts``, and their positions."""
    everywhere = range(length)
    wanted: dict[str, Sequence[int]] = {f"blocks.{layer}.hook_resid_pre": everywhere for layer in layers}
    wanted[f"blocks.{layers[-1]}.hook_resid_post"] = everywhere
    return {**further, **wanted}


def state_points(model: HookedJamba, layers: Iterable[int]) -> list[str]:
    """What Mamba layers remember, as hook points."""
    tails = [STATE, CONV_STATE] if model.config.d_conv > 1 else [STATE]
    return [f"blocks.{layer}.{tail}" for layer in layers if model.config.mixers[layer] != "attention" for tail in tails]

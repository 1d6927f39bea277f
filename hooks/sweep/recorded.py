"""What a sweep keeps of the two runs: values to put in, and everything needed to go on from any layer and position.

Axes: A prompt, T position, D d_model, K key/value head, P d_head, E d_inner, N d_state, W input that the convolution
remembers, R row (one cell of one pair).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def places(self, name: str, positions: Sequence[int]) -> list[int]:
        """Where on the T axis of a value positions stand."""
        held = self.positions[name]
        if isinstance(held, range):
            return [p - held.start for p in positions]
        where = {p: i for i, p in enumerate(held)}
        return [where[p] for p in positions]

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

    def stream(self, layer: int, prompts: torch.Tensor, start: int) -> Float[torch.Tensor, "row pos d_model"]:
        """What enters a layer, from a position on; after the last layer what leaves it."""
        name = f"blocks.{layer}.hook_resid_pre"
        if name not in self.recording.values:
            name = f"blocks.{layer - 1}.hook_resid_post"
        return self.recording.values[name][:, start:].index_select(0, prompts)

    def memory(self, model: HookedJamba, layer: int, prompts: torch.Tensor, start: int) -> InferenceState | None:
        """What a layer remembers at a position of ``starts``, for rows that go on from there; None at the first."""
        if not start:
            return None
        if layer in self.keys:
            # With room for the positions to come, which are written over.
            held = (
                m[:, : self.length].index_select(0, prompts) for m in (self.keys[layer].keys, self.keys[layer].values)
            )
            found: KeyValueState | MambaState = KeyValueState(*held)
        else:
            ssm = self.recording.values[f"blocks.{layer}.{STATE}"]
            (place,) = self.recording.places(f"blocks.{layer}.{STATE}", [start - 1])
            ssm = ssm[:, :, place].index_select(0, prompts)
            width = model.config.conv_width(model.config.mixers[layer])
            conv = torch.empty(len(prompts), 0, width, dtype=model.dtype, device=model.device)
            if model.config.d_conv > 1:
                name = f"blocks.{layer}.{CONV_STATE}"
                conv = self.recording.values[name][:, self.recording.places(name, [start - 1])[0]].index_select(
                    0, prompts
                )
            found = MambaState(conv, ssm)
        return InferenceState([found] * model.config.n_layers, start)


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

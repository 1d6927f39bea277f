"""What a sweep keeps of the two runs: values to put in, and everything needed to go on from any layer and position.

Axes: A prompt, T position, D d_model, K key/value head, P d_head, E d_inner, N d_state, W input that the convolution
remembers, R row (one cell of one pair).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope.devices import index_tensor
from jambascope.hook_point import At, HookPoint
from jambascope.hooks.sweep.nodes import CONV_STATE, STATE
from jambascope.kernels.selective_scan.shared import Inputs
from jambascope.state import InferenceState, KeyValueState, MambaState, PickedKeyValueState, PickedMambaState

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

    def at_all(self, name: str, positions: Sequence[int]) -> torch.Tensor:
        """The same of all prompts: [A T ...]."""
        value = self.values[name]
        return value.index_select(1, index_tensor(self.places(name, positions), value.device))


Recorded = tuple[Recording, Float[torch.Tensor, "prompt read vocab"]]
"""What a run computed at chosen positions of hook points, and its logits where metrics read."""


class Prompts(NamedTuple):
    """Of one run, and what to keep of it."""

    tokens: Int[torch.Tensor, "prompt pos"]
    wanted: Mapping[str, Sequence[int]]
    """Hook point -> positions, ascending."""


@torch.no_grad()
def record(
    model: HookedJamba, *runs: Prompts, reads: Sequence[int] = (), state: InferenceState | None = None
) -> list[Recorded]:
    """Runs of prompts of one length, in one pass; logits at ``reads`` alone."""
    last = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    wanted = [dict(run.wanted) for run in runs]
    if reads:
        for of_run in wanted:
            of_run[last] = sorted({*of_run.get(last, ()), *reads})
    kept: list[dict[str, torch.Tensor]] = [{} for _ in runs]
    sizes = [len(run.tokens) for run in runs]

    def keep(value: torch.Tensor, hook: HookPoint) -> None:
        for of_run, values, part in zip(wanted, kept, value.split(sizes), strict=True):
            positions = of_run.get(hook.name, ())
            if len(positions) == len(hook.positions):
                values[hook.name] = part.clone()
            elif positions:
                time = model.hook_rows[hook.name].axes.index("T")
                places = np.searchsorted(hook.positions, positions)
                values[hook.name] = part.index_select(time, index_tensor(places, value.device))

    hooks: list[tuple[str, Callable]] = []
    for name in dict.fromkeys(itertools.chain(*wanted)):
        positions = [of_run[name] for of_run in wanted if name in of_run]
        hooks.append((name, At(positions[0] if len(positions) == 1 else sorted(set().union(*positions)), keep)))
    with model.hooks(hooks):
        model(torch.cat([run.tokens for run in runs]), state=state, return_type=None)
    found = [Recording(*both) for both in zip(kept, wanted, strict=True)]
    if not reads:
        nothing = model.embed.weight.new_empty(sum(sizes), 0, model.config.d_vocab)
        return list(zip(found, nothing.split(sizes), strict=True))
    at = [recording.at_all(last, reads) for recording in found]
    for recording, run in zip(found, runs, strict=True):
        if last not in run.wanted:
            del recording.values[last], recording.positions[last]
    with model._lock:
        logits = model.unembed(model.ln_final(torch.cat(at)))
    each = [part.clone() for part in logits.split(sizes)]  # so that one run's can go before the other's
    return list(zip(found, each, strict=True))


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
        *others: Prompts,
    ) -> tuple[Base, list[Recorded]]:
        """One run, and others in the same pass.

        Args:
            reads: positions that metrics read.
            starts: ascending.
            layers: rows pass through these, and no others.
            further: other hook points to keep, and their positions.
        """
        starts, (n, length) = tuple(starts), tokens.shape
        wanted, before = base_points(length, layers, further), {s - 1 for s in starts if s}
        for name in state_points(model, layers) if before else ():
            wanted[name] = sorted(before.union(wanted.get(name, ())))
        state = model.new_state(n + sum(len(other.tokens) for other in others))
        (recording, logits), *found = record(model, Prompts(tokens, wanted), *others, reads=reads, state=state)
        for name in recording.values:
            if name.endswith(STATE):  # as a scan reads it: [A T N E]
                by_time = recording.values[name].permute(0, 2, 3, 1).contiguous()
                recording.values[name] = by_time.permute(0, 3, 1, 2)
        keys = {i: held for i, held in enumerate(state.layers) if i in layers and isinstance(held, KeyValueState)}
        keys = {i: KeyValueState(held.keys[:n].clone(), held.values[:n].clone()) for i, held in keys.items()}
        return cls(recording, logits, length, starts, keys), found

    def starts_of(self, positions: Sequence[int]) -> np.ndarray:
        """Where rows start that are first patched at these positions."""
        return np.asarray(self.starts)[np.searchsorted(self.starts, positions, side="right") - 1]

    def stream(self, layer: int) -> Float[torch.Tensor, "prompt pos d_model"]:
        """What enters a layer; after the last layer what leaves it."""
        name = f"blocks.{layer}.hook_resid_pre"
        if name not in self.recording.values:
            name = f"blocks.{layer - 1}.hook_resid_post"
        return self.recording.values[name]

    def mixing(self, layer: int) -> Inputs | None:
        """What the scan of a Mamba layer reads, where it is kept."""
        names = mixing_points([layer])
        if names[0] not in self.recording.values:
            return None
        return Inputs(*(self.recording.values[name] for name in names))

    def memory(
        self, model: HookedJamba, layer: int, prompts: np.ndarray, entries: Callable[[tuple[int, ...]], np.ndarray]
    ) -> PickedKeyValueState | PickedMambaState:
        """What a layer remembers when each row, of one of the prompts, begins at one of ``starts``.

        ``entries``: of positions that are held, what :meth:`entries` gives for the rows.
        """
        if layer in self.keys:
            held = self.keys[layer]
            return PickedKeyValueState(held.keys[:, : self.length], held.values[:, : self.length], prompts)
        parts = []
        for name in (f"blocks.{layer}.{CONV_STATE}", f"blocks.{layer}.{STATE}"):
            held = self.recording.values.get(name)
            if held is None:
                assert not any(self.starts) or model.config.d_conv == 1 and name.endswith(CONV_STATE)
                nothing = MambaState.create(model.config, model.config.mixers[layer], 1, model.device, model.dtype)
                held = nothing.ssm if name.endswith(STATE) else nothing.conv
                parts.append((held, np.full(len(prompts), -1)))
            else:
                held = held.transpose(1, 2) if name.endswith(STATE) else held  # [A E T N], in memory [A T N E]
                parts.append((held.flatten(0, 1), entries(tuple(self.recording.positions[name]))))
        (conv, conv_rows), (ssm, ssm_rows) = parts
        return PickedMambaState(conv, ssm, conv_rows, ssm_rows)

    def entries(self, prompts: np.ndarray, starts: np.ndarray, held: Sequence[int]) -> np.ndarray:
        """Of what a Mamba layer held after positions ``held``, [A x T ...], which rows begin with; -1 for nothing."""
        places = np.searchsorted(held, np.maximum(starts - 1, 0))
        return np.where(starts > 0, prompts * len(held) + places, -1)


def base_points(length: int, layers: range, further: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Hook points of the base run that are kept, without those of ``starts``, and their positions."""
    everywhere = range(length)
    wanted: dict[str, Sequence[int]] = {f"blocks.{layer}.hook_resid_pre": everywhere for layer in layers}
    wanted[f"blocks.{layers[-1]}.hook_resid_post"] = everywhere
    return {**further, **wanted}


def mixing_points(layers: Iterable[int]) -> list[str]:
    """What the scans of Mamba layers read, as hook points."""
    return [f"blocks.{layer}.mixer.hook_{name}" for layer in layers for name in Inputs._fields]


def state_points(model: HookedJamba, layers: Iterable[int]) -> list[str]:
    """What Mamba layers remember, as hook points."""
    tails = [STATE, CONV_STATE] if model.config.d_conv > 1 else [STATE]
    return [f"blocks.{layer}.{tail}" for layer in layers if model.config.mixers[layer] != "attention" for tail in tails]

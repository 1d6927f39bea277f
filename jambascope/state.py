"""What a model carries from one call to the next, and what one call carries from layer to layer.

:class:`InferenceState` is the memory of a batch of sequences: keys and values of attention layers, the last
convolution inputs and the SSM state of Mamba layers. A call reads it while it runs and commits what it computed
only when it has ended, so that an exception (in a hook, say) leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from jambascope.config import JambaConfig
from jambascope.devices import index_tensor
from jambascope.errors import InputError
from jambascope.kernels.packed import picked
from jambascope.packing import Packing


@dataclass
class KeyValueState:
    """Keys and values of one attention layer, [B capacity K P]; only the first ``InferenceState.length`` count.

    Capacity doubles when it runs out, so that appending a token costs a token.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def appended(self, k: torch.Tensor, v: torch.Tensor, length: int) -> KeyValueState:
        """The state with k, v [B T K P] at positions ``length..length + T``; past entries are never changed."""
        new_length = length + k.shape[1]
        if torch.is_grad_enabled():  # a graph may have saved the buffer, so nothing is written into it
            return KeyValueState(
                torch.cat((self.keys[:, :length], k), dim=1), torch.cat((self.values[:, :length], v), dim=1)
            )
        keys, values = self.keys, self.values
        if new_length > keys.shape[1]:
            capacity = max(new_length, 2 * keys.shape[1])
            shape = (k.shape[0], capacity, *k.shape[2:])
            keys, values = keys.new_empty(shape), values.new_empty(shape)
            keys[:, :length], values[:, :length] = self.keys[:, :length], self.values[:, :length]
        keys[:, length:new_length], values[:, length:new_length] = k, v
        return KeyValueState(keys, values)


@dataclass
class MambaState:
    """Memory of one Mamba or Mamba-2 layer."""

    conv: torch.Tensor
    """[B d_conv-1 E], of Mamba-2 [B d_conv-1 E+2GN]: the last inputs of the convolution, oldest first."""
    ssm: torch.Tensor
    """[B E N], float32; of Mamba-2 too, where channel e belongs to head ``e // mamba_d_head``."""

    @classmethod
    def create(
        cls, config: JambaConfig, mixer: str, batch: int, device: torch.device | str, dtype: torch.dtype
    ) -> MambaState:
        """An empty memory of a ``mixer`` ("mamba" or "mamba2"): nothing seen."""
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, config.d_conv - 1, config.conv_width(mixer), device=device, dtype=dtype),
            torch.zeros(batch, config.d_inner, config.d_state, device=device, dtype=wide),
        )


@dataclass
class PickedKeyValueState(KeyValueState):
    """Keys and values of all positions of some prompts, and which of these packed rows go on from. Only the runs of
    packed rows take it."""

    rows: np.ndarray

    def gathered(self, some: slice | np.ndarray = slice(None)) -> KeyValueState:
        """Those of each row by itself, or of some rows."""
        rows = index_tensor(self.rows[some], self.keys.device)
        return KeyValueState(self.keys.index_select(0, rows), self.values.index_select(0, rows))


@dataclass
class PickedMambaState(MambaState):
    """The memory of packed rows among the entries of a larger one, -1 for a row that has seen nothing. Only the runs of
    packed rows take it."""

    conv_rows: np.ndarray
    ssm_rows: np.ndarray

    def gathered(self) -> MambaState:
        """That of each row by itself."""
        return MambaState(picked(self.conv, self.conv_rows), picked(self.ssm, self.ssm_rows))


@dataclass
class InferenceState:
    """The memory of a batch of sequences; make one with ``model.new_state(batch)`` and pass it to every call."""

    layers: list[KeyValueState | MambaState]
    length: int = 0
    """Positions seen so far, padding included."""
    mask: torch.Tensor | None = None
    """[B length] bool, which of them are tokens; None while all are."""

    @classmethod
    def create(cls, config: JambaConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> InferenceState:
        """An empty state: nothing seen."""
        layers: list[KeyValueState | MambaState] = []
        for mixer in config.mixers:
            if mixer == "attention":
                shape = (batch, 0, config.n_key_value_heads, config.d_head)
                layers.append(KeyValueState(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2))))
            else:
                layers.append(MambaState.create(config, mixer, batch, device, dtype))
        return cls(layers)

    @property
    def batch(self) -> int:
        return self._tensors()[0].shape[0]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in vars(layer).values()]

    def check(self, config: JambaConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raise InputError unless this is a memory of ``batch`` sequences of such a model."""
        if self.batch != batch:
            raise InputError(f"state holds {self.batch} sequences but tokens have {batch}; use state.rows(...)")
        fitting = InferenceState.create(config, 1, "meta", dtype)._tensors()
        held = self._tensors()
        # Of keys and values the second axis is their capacity, which is the state's own affair.
        fits = len(held) == len(fitting) and all(
            a.ndim == b.ndim and a.shape[-2:] == b.shape[-2:] and a.dtype == b.dtype and a.device == device
            for a, b in zip(held, fitting, strict=True)
        )
        if not fits:
            raise InputError(
                "state belongs to a model of another shape, dtype or device; make one with model.new_state(batch)"
            )
        if held[0].is_inference() and not torch.is_inference_mode_enabled():
            self.restore(self)  # inference tensors cannot be updated here; their copies can

    @property
    def nbytes(self) -> int:
        """Bytes that the positions seen so far need (spare capacity of the key-value buffers not counted)."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, KeyValueState):
                total += 2 * layer.keys[:, : self.length].nbytes
            else:
                total += layer.conv.nbytes + layer.ssm.nbytes
        return total

    def fork(self) -> InferenceState:
        """An independent copy, so that one prefix can be continued in several ways."""
        return self._map(lambda v: v.clone())

    def rows(self, index: torch.Tensor | slice | list[int]) -> InferenceState:
        """An independent state of the chosen batch rows, in the given order; rows may repeat."""
        return self._map(lambda v: v[index].clone())

    def restore(self, other: InferenceState) -> None:
        """Become a copy of ``other``."""
        forked = other.fork()
        self.layers, self.length, self.mask = forked.layers, forked.length, forked.mask

    def _map(self, f) -> InferenceState:
        layers: list[KeyValueState | MambaState] = []
        for layer in self.layers:
            if isinstance(layer, KeyValueState):
                layers.append(KeyValueState(f(layer.keys[:, : self.length]), f(layer.values[:, : self.length])))
            else:
                layers.append(MambaState(f(layer.conv), f(layer.ssm)))
        return InferenceState(layers, self.length, None if self.mask is None else f(self.mask))


@dataclass
class Auxiliary:
    """What a training loss needs from inside a forward pass; collected only when asked for."""

    router_logits: list[torch.Tensor] = field(default_factory=list)
    """One [B T X] per MoE layer."""
    squared_activations: list[torch.Tensor] = field(default_factory=list)
    """One scalar per mixer and feed-forward: the mean square of what it adds to the residual stream."""


class Run:
    """One forward pass: its padding, its memory and what it will commit."""

    def __init__(
        self,
        batch: int,
        length: int,
        device: torch.device,
        mask: torch.Tensor | None,
        state: InferenceState | None,
        auxiliary: Auxiliary | None = None,
        step_weights: dict[int, tuple[int, ...] | None] | None = None,
        packing: Packing | None = None,
    ) -> None:
        """``mask`` [B T] bool, True for tokens, or None when all are; ``state`` the memory to continue, or None;
        ``step_weights`` what layers found out about their parameters in earlier steps of one generation; ``packing``
        the rows that this run's one sequence consists of, whose memory before their starts ``state`` holds, as
        :class:`PickedMambaState` and :class:`PickedKeyValueState`."""
        self.batch, self.length, self.device = batch, length, device
        self.state, self.auxiliary = state, auxiliary
        self.past = 0 if state is None else state.length
        self.mask, self.packing = mask, packing
        self.full_mask = self._full_mask(mask)
        self.piece_length: int | None = None
        """Positions that a layer takes at a time; None for all of them at once."""
        self.step_weights: dict[int, tuple[int, ...] | None] = {} if step_weights is None else step_weights
        self.into_stream = False
        """Whether layers may add to the very tensor that they are given."""
        self.packed_states: dict[int, torch.Tensor] | None = None
        """Mamba layer -> the states after packed rows, [row E N]; None where nobody wants them."""
        self._updates: dict[int, KeyValueState | MambaState] = {}
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._visible: torch.Tensor | None = None

    def _full_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        past_mask = None if self.state is None else self.state.mask
        if mask is None and past_mask is None:
            return None
        ones = torch.ones(self.batch, self.past, dtype=torch.bool, device=self.device)
        present = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device) if mask is None else mask
        return torch.cat((ones if past_mask is None else past_mask, present), dim=1)

    @property
    def visible(self) -> torch.Tensor:
        """[1 or B, 1, T, S] bool: which keys a query may look at. A padding query sees itself, to stay finite."""
        if self._visible is None:
            self._visible = self._visible_from(torch.arange(self.past, self.past + self.length, device=self.device))
        return self._visible

    def visible_from(self, queries: Sequence[int]) -> torch.Tensor:
        """The rows of :attr:`visible` of some positions of this call."""
        if len(queries) == self.length:
            return self.visible
        return self._visible_from(index_tensor(queries, self.device) + self.past)

    def _visible_from(self, queries: torch.Tensor) -> torch.Tensor:
        query, key = queries[:, None], torch.arange(self.past + self.length, device=self.device)[None, :]
        visible = (key <= query)[None, None]
        if self.full_mask is None:
            return visible
        return visible & self.full_mask[:, None, None, :] | (key == query)[None, None]

    @property
    def attention_is_causal(self) -> bool:
        """Whether torch's own causal mask is all that is needed."""
        return self.full_mask is None and self.past == 0 and self.length > 1

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask for fused attention; None where none is needed (plain causal, or one new token)."""
        if self.full_mask is None and (self.past == 0 or self.length == 1):
            return None
        return self.visible

    def rotary(self, d_head: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1 or B, T, 1, P]; positions count tokens, not padding."""
        if self._rotary is None:
            if self.packing is not None:
                positions = self.packing.positions[None]
            elif self.full_mask is None:
                positions = torch.arange(self.past, self.past + self.length, device=self.device)[None]
            else:
                positions = (self.full_mask.long().cumsum(1) - 1).clamp_min(0)[:, self.past :]
            exponent = torch.arange(0, d_head, 2, device=self.device, dtype=torch.float32) / d_head
            angle = positions[..., None].float() * base**-exponent
            angle = torch.cat((angle, angle), dim=-1)[:, :, None]
            self._rotary = angle.cos(), angle.sin()
        cos, sin = self._rotary
        return cos.to(dtype), sin.to(dtype)

    def extend_keys(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of past and present positions, [B S K P]."""
        if self.state is None:
            return k, v
        past = self.state.layers[layer]
        assert isinstance(past, KeyValueState)
        extended = past.appended(k, v, self.past)
        self._updates[layer] = extended
        end = self.past + self.length
        return extended.keys[:, :end], extended.values[:, :end]

    def pieces(self, layer: int, memory: MambaState | None) -> Iterator[tuple[slice, Run]]:
        """The positions piece by piece, each with a run of its own that starts where the last one left a Mamba layer.

        ``memory`` is what a Mamba layer starts from; None for an attention layer.
        """
        for start in range(0, self.length, self.piece_length):
            positions = slice(start, min(start + self.piece_length, self.length))
            mask = None if self.mask is None else self.mask[:, positions]
            part = Run(self.batch, positions.stop - start, self.device, mask, None)
            if memory is not None:
                part._updates[layer] = memory
            yield positions, part
            memory = part._updates.get(layer)
        if memory is not None:
            self.update_mamba(layer, memory)

    def mamba_state(self, layer: int) -> MambaState | None:
        """The memory of a Mamba layer before this run's first position."""
        if layer in self._updates:
            return self._updates[layer]
        if self.state is None:
            return None
        state = self.state.layers[layer]
        assert isinstance(state, MambaState)
        return state

    def update_mamba(self, layer: int, state: MambaState) -> None:
        """Note the memory of a Mamba layer after this run's last position."""
        self._updates[layer] = state

    def commit(self) -> None:
        """Make the results of this run the state's; called when the whole forward pass has succeeded."""
        if self.state is None:
            return
        for layer, update in self._updates.items():
            self.state.layers[layer] = update
        self.state.length += self.length
        self.state.mask = self.full_mask

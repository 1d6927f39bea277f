"""A TransformerLens hook point that costs nothing unheard, knows which positions it holds and checks its hooks; and
two hooks that say where they act: :class:`At` and :class:`StateEdit`."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import transformer_lens.hook_points
from torch import nn

from jambascope.devices import index_tensor
from jambascope.errors import HookError, InputError
from jambascope.kernels.selective_scan import StateEdits

if TYPE_CHECKING:
    from jambascope.hook_table import HookRow


class Clock:
    """Which positions of the whole sequence the call that now runs is about; one per model, shared by its points."""

    start = length = 0


class HookPoint(transformer_lens.hook_points.HookPoint):
    """An identity that listeners can read and replace.

    Layers ask :attr:`heard` before they compute a value that only a listener needs, and :meth:`wanted` before they
    compute it at every position.
    """

    row: HookRow
    """The point's row in the hook table: axes, meaning of an edit. Set by the model."""
    positions: Sequence[int] = ()
    """Positions of the whole sequence (past calls and padding counted) that the T axis of the last value held."""
    _clock: Clock | None = None

    def place(self, row: HookRow, clock: Clock) -> None:
        """Tell the point where in a model it stands."""
        self.row, self._clock = row, clock

    @property
    def start(self) -> int:
        """The first position of the call that now runs, counted through the whole sequence."""
        return self._clock.start if self._clock else 0

    @property
    def heard(self) -> bool:
        """Whether any forward or backward hook is attached."""
        return bool(self._forward_hooks or self._backward_hooks)

    @property
    def wants_gradient(self) -> bool:
        """Whether any backward hook is attached."""
        return bool(self._backward_hooks)

    @property
    def state_edits(self) -> list[StateEdit]:
        """The attached :class:`StateEdit` hooks, in order."""
        return [h.user_hook for h in self.fwd_hooks if isinstance(h.user_hook, StateEdit)]

    def wanted(self, length: int) -> Sequence[int]:
        """Positions of this call (0..length-1) that somebody looks at: few where every listener is :class:`At`."""
        hooks = [h.user_hook for h in self.fwd_hooks if not isinstance(h.user_hook, StateEdit)]
        unknown = self._backward_hooks or len(self._forward_hooks) != len(self.fwd_hooks)
        if unknown or not all(isinstance(hook, At) for hook in hooks):
            return range(length)
        present = range(self.start, self.start + length)
        local = sorted({p for hook in hooks for p in indices_in(present, hook.positions)})
        return range(length) if len(local) == length else local

    def __call__(self, value: torch.Tensor, at: Sequence[int] | None = None) -> torch.Tensor:
        """``at``: the positions of this call that the T axis of ``value`` holds; all of them when absent."""
        if not (self._forward_hooks or self._backward_hooks):
            return value
        if self._clock is not None:
            held = range(self.start, self.start + self._clock.length)
            self.positions = held if at is None or len(at) == len(held) else [self.start + p for p in at]
        returned = super().__call__(value)
        if returned is not value:
            _check_returned(self.name, value, returned)
        return returned

    def add_hook(self, hook: Callable, dir: Literal["fwd", "bwd"] = "fwd", *args: Any, **kwargs: Any):
        """As TransformerLens's; a StateEdit is refused anywhere but at the state of the forward pass."""
        if isinstance(hook, StateEdit) and not (self.name or "").endswith("mixer.hook_ssm_state"):
            raise HookError(f"a StateEdit stands only at a mixer.hook_ssm_state, not at {self.name}")
        if isinstance(hook, StateEdit) and dir != "fwd":
            raise HookError(f"a StateEdit edits the forward pass; attach it to {self.name} among fwd_hooks")
        attached = (self._forward_hooks, self._backward_hooks)
        before = [set(hooks) for hooks in attached]
        try:
            return super().add_hook(hook, dir, *args, **kwargs)
        except BaseException:  # Ctrl-C between torch, which has the hook, and TransformerLens, which could take it off
            known = {handle.hook.id for handle in (*self.fwd_hooks, *self.bwd_hooks)}
            for hooks, old in zip(attached, before, strict=True):
                for i in set(hooks) - old - known:
                    del hooks[i]
            raise

    def remove_hooks(self, dir: str = "fwd", *args: Any, **kwargs: Any) -> None:
        """As TransformerLens's, which takes longer where there are none than a small layer does."""
        if self.fwd_hooks or self.bwd_hooks or dir not in ("fwd", "bwd", "both"):
            super().remove_hooks(dir, *args, **kwargs)


class At:
    """A hook that sees and edits chosen positions only, counted through the whole sequence.

    ``function(part, hook)`` gets those of its positions that the call holds, ascending, and may edit ``part`` in
    place, return a replacement, or return None; ``hook.positions`` says which they are. It is not called where there
    are none. States, attention scores and patterns exist only at the positions of such hooks when nobody else
    listens, so that they cost what is looked at.
    """

    def __init__(self, positions: int | Iterable[int], function: Callable[[torch.Tensor, HookPoint], Any]) -> None:
        """``positions``: of the whole sequence, padding included, from 0."""
        self.positions = checked_positions(positions)
        self.function = function

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        few = ", ".join(map(str, self.positions[:8])) + (", ..." if len(self.positions) > 8 else "")
        return f"At([{few}], {name})"

    def __call__(self, value: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        held = hook.positions
        index = indices_in(held, self.positions)
        if not index:
            return None
        if len(index) == len(held):
            return self.function(value, hook)
        axis = hook.row.axes.index("T")
        hook.positions = [held[i] for i in index]
        try:
            return self._part(value, hook, axis, index)
        finally:
            hook.positions = held

    def _part(self, value: torch.Tensor, hook: HookPoint, axis: int, index: list[int]) -> torch.Tensor | None:
        first, last = index[0], index[-1] + 1
        one_stretch = last - first == len(index)
        if one_stretch:
            part = value.narrow(axis, first, len(index))  # a view: what is edited in place is edited in value
            returned = self.function(part, hook)
        else:
            rows = index_tensor(index, value.device)
            part = value.index_select(axis, rows)
            version = None if part.is_inference() else part._version  # inference tensors have none
            returned = self.function(part, hook)
            if returned is None and (version is None or part._version != version):
                returned = part
        if part.retains_grad:  # then what follows must be computed from it
            returned = part if returned is None else returned
        elif returned is None or (one_stretch and returned is part):
            return None
        _check_returned(hook.name, part, returned)
        if one_stretch:
            return value.slice_scatter(returned, axis, first, last)
        return value.index_copy(axis, rows, returned)


class StateEdit:
    """A hook for ``mixer.hook_ssm_state`` that the scan itself carries out: ``h_t <- scale * h_t + shift``.

    What it does flows on into every later position, and several such edits follow one another exactly (two that add
    at different positions add up), with no state kept for it. It acts before any function that listens at the point.
    """

    def __init__(
        self,
        positions: int | Iterable[int],
        scale: torch.Tensor | float,
        shift: torch.Tensor | float,
        channels: Sequence[int] | None = None,
        states: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            positions: of the whole sequence, padding included, from 0.
            scale, shift: what broadcasts to [B, E or channels, positions, N or states].
            channels, states: the entries (e, n) that are edited; all when absent.
        """
        self.positions = checked_positions(positions)
        self.scale, self.shift = scale, shift
        self.channels = None if channels is None else checked_positions(channels, "channels")
        self.states = None if states is None else checked_positions(states, "states")

    @classmethod
    def set_to(cls, positions: int | Iterable[int], value: torch.Tensor | float, **where: Any) -> StateEdit:
        """The state becomes ``value`` at these positions."""
        return cls(positions, 0.0, value, **where)

    @classmethod
    def add(cls, positions: int | Iterable[int], value: torch.Tensor | float, **where: Any) -> StateEdit:
        """``value`` is added to the state at these positions."""
        return cls(positions, 1.0, value, **where)

    @classmethod
    def multiply(cls, positions: int | Iterable[int], factor: torch.Tensor | float, **where: Any) -> StateEdit:
        """The state is multiplied by ``factor`` at these positions."""
        return cls(positions, factor, 0.0, **where)

    def __repr__(self) -> str:
        return f"StateEdit({list(self.positions)}, channels={self.channels}, states={self.states})"

    def __call__(self, value: torch.Tensor, hook: HookPoint) -> None:
        """Nothing: the scan has done it."""

    def applied(self, edits: StateEdits | None, held: range, like: torch.Tensor) -> StateEdits | None:
        """This edit after ``edits``, as positions of the call that holds ``held``; ``like`` [B E N] gives the form."""
        mine = slice(bisect_left(self.positions, held.start), bisect_left(self.positions, held.stop))
        local = [p - held.start for p in self.positions[mine]]
        if not local:
            return edits
        edits = widened(edits, local, like)
        at = indices_in(edits.positions, local)
        scale, shift = edits.scale.clone(), edits.shift.clone()
        entries = self._entries(at, like)
        shape = scale[entries].shape
        a, b = (self._values(v, shape, mine, like) for v in (self.scale, self.shift))
        new_shift = a * shift[entries] + b
        scale[entries] = a * scale[entries]
        shift[entries] = new_shift
        return edits._replace(scale=scale, shift=shift)

    def _entries(self, at: list[int], like: torch.Tensor) -> tuple:
        channels = range(like.shape[1]) if self.channels is None else self.channels
        states = range(like.shape[2]) if self.states is None else self.states
        for name, chosen, size in (("channels", channels, like.shape[1]), ("states", states, like.shape[2])):
            if chosen[-1] >= size:
                raise HookError(f"StateEdit's {name} go to {chosen[-1]}, but the state has {size} (0..{size - 1})")
        e, p, n = (index_tensor(v, like.device) for v in (channels, at, states))
        return slice(None), e[:, None, None], p[:, None], n

    def _values(self, value: Any, shape: tuple[int, ...], mine: slice, like: torch.Tensor) -> torch.Tensor:
        value = value.to(like) if isinstance(value, torch.Tensor) else like.new_full((), value)
        if value.ndim >= 2 and value.shape[-2] == len(self.positions) > 1:
            value = value[..., mine, :]
        try:
            return value.expand(shape)
        except RuntimeError:
            raise HookError(
                f"StateEdit's value of shape {tuple(value.shape)} does not broadcast to {tuple(shape)} "
                "[batch channel position state]"
            ) from None


def widened(edits: StateEdits | None, positions: Sequence[int], like: torch.Tensor) -> StateEdits:
    """``edits`` with room (no change yet) at ``positions`` of this call too; ``like`` [B E N] gives the form."""
    old = [] if edits is None else list(edits.positions)
    every = sorted({*old, *positions})
    if edits is not None and every == old:
        return edits._replace(positions=old)
    shape = (*like.shape[:2], len(every), like.shape[2])
    scale, shift = like.new_ones(shape), like.new_zeros(shape)
    if old:
        index = index_tensor(indices_in(every, old), like.device)
        scale, shift = scale.index_copy(2, index, edits.scale), shift.index_copy(2, index, edits.shift)
    return StateEdits(every, scale, shift)


def indices_in(held: Sequence[int], positions: Sequence[int]) -> Sequence[int]:
    """Where in ``held`` those of ``positions`` stand that it has; both ascending. Costs as their overlap is long."""
    if not held:
        return []
    if isinstance(held, range) and len(positions) == len(held) and (positions[0], positions[-1]) == (held[0], held[-1]):
        return range(len(held))
    present = positions[bisect_left(positions, held[0]) : bisect_left(positions, held[-1] + 1)]
    if isinstance(held, range):
        return [p - held.start for p in present]
    where = {p: i for i, p in enumerate(held)}
    return [where[p] for p in present if p in where]


def checked_positions(positions: int | Iterable[int], name: str = "positions") -> tuple[int, ...]:
    """Distinct whole numbers from 0, ascending."""
    if isinstance(positions, range) and positions and positions.start >= 0 and positions.step > 0:
        return tuple(positions)
    if isinstance(positions, (np.ndarray, np.generic, torch.Tensor)):
        positions = positions.tolist()
    given = tuple(positions) if isinstance(positions, Iterable) else (positions,)
    try:
        chosen = tuple(-1 if isinstance(p, bool) else operator.index(p) for p in given)
    except TypeError:
        chosen = ()
    if not chosen or min(chosen) < 0:
        raise InputError(f"{name}={list(given)[:8]} must be whole numbers from 0, at least one")
    if any(b <= a for a, b in zip(chosen, chosen[1:], strict=False)):
        raise InputError(f"{name}={list(chosen)[:8]} must be ascending and distinct")
    return chosen


def listeners(layer: nn.Module) -> tuple[dict, ...]:
    """Where hooks on the parts of a layer are kept, hook points and torch's own alike: ``any()`` of it is whether
    somebody listens. A layer asks before it takes a path that computes everything at once and calls no part."""
    parts = tuple(layer.modules())[1:]
    return tuple(d for m in parts for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))


def _check_returned(name: str | None, value: torch.Tensor, returned: Any) -> None:
    if not isinstance(returned, torch.Tensor):
        raise HookError(
            f"hook at {name} returned {type(returned).__name__}; return a tensor of shape {tuple(value.shape)}, "
            "or None to leave the activation as it is"
        )
    for what, got, expected in (
        ("shape", tuple(returned.shape), tuple(value.shape)),
        ("dtype", returned.dtype, value.dtype),
        ("device", returned.device, value.device),
    ):
        if got != expected:
            raise HookError(f"hook at {name} returned a tensor of {what} {got}; it must be {expected}")

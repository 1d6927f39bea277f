"""The CPU backend: tokens sorted by expert, native loops over tasks of one expert, autograd around them.

A task is at most ROWS pairs of one expert, and stays within the caches of one core: forward it is a turn of the loop
in ``cpu_products``, backward four products by torch, of one thread each, and the numba loops of ``cpu_kernels`` between
them. A token or a few go through ``cpu_vectors``. Tokens are taken BLOCK_TOKENS at a time, so that what lies between
the passes is small, and is kept and reused: a fresh page costs microseconds.
"""

from __future__ import annotations

import ctypes
import threading
from typing import NamedTuple

import numpy as np
import torch

from jambascope.errors import InputError
from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.experts.int8 import ExpertsInt8
from jambascope.kernels.threads import CUTS_PER_THREAD, run_items, run_loop, run_native

ROWS = 128
"""Pairs to a task: enough that a product runs at full rate, few enough that its rows stay in L2."""
BLOCK_TOKENS = 2048
FEW_PAIRS = 16
"""Pairs up to which experts are read row by row (``cpu_vectors``) instead of multiplied."""
SERIAL_BELOW = 16_384
"""Weights of an expert, times pairs, below which waking another thread costs more than it saves."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
SLICE = 1 << 18
"""Weights widened to float32 at a time, where they are stored in another type."""
KEPT_BYTES = 32 << 20
"""Scratch buffers beyond this size are given back to the system."""
COMBINE_SERIAL_BELOW = 65_536
"""Numbers below which waking another thread to add them up costs more than it saves."""


# -- scratch memory and weights ------------------------------------------------------------------------------


class _Scratch:
    """Buffers that outlive a call; whoever takes one has it alone until it is given back."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            for i, buffer in enumerate(self._free):
                if buffer.numel() >= nbytes:
                    return self._free.pop(i)
            if self._free:
                self._free.pop(0)
        with torch.inference_mode(False):  # an inference tensor could not be written to in a later, ordinary call
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def give(self, buffer: torch.Tensor) -> None:
        if buffer.numel() <= KEPT_BYTES:
            with self._lock:
                self._free.append(buffer)


_scratch = _Scratch()


class _Carver:
    """Cuts matrices from a buffer, one behind the other."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self.used = buffer, 0

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        start = -(-self.used // 64) * 64
        self.used = start + rows * columns * dtype.itemsize
        return self.buffer[start : self.used].view(dtype).view(rows, columns)


class Weight(NamedTuple):
    """One weight of all experts: values [X n k], and a scale [X n] if they are int8."""

    values: torch.Tensor
    scale: torch.Tensor | None

    def product(self, e: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """out [R n] = rows [R k] W^T."""
        values = self.values[e]
        if values.dtype == rows.dtype:
            torch.mm(rows, values.T, out=out)
            return
        for part in _slices(values):
            torch.mm(rows, values[part].to(rows.dtype).T, out=out[:, part])
            if self.scale is not None:
                out[:, part].mul_(self.scale[e, part])

    def adjoint(self, e: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """out [R k] = rows [R n] W."""
        values = self.values[e]
        if values.dtype == rows.dtype:
            torch.mm(rows, values, out=out)
            return
        out.zero_()
        for part in _slices(values):
            left = rows[:, part] if self.scale is None else rows[:, part] * self.scale[e, part]
            torch.addmm(out, left, values[part].to(rows.dtype), out=out)


def _slices(values: torch.Tensor) -> list[slice]:
    step = max(1, SLICE // values.shape[1])
    return [slice(a, min(a + step, len(values))) for a in range(0, len(values), step)]


def _array(v: torch.Tensor) -> np.ndarray:
    """As the loops take it: see ``cpu_kernels``."""
    v = v.detach()
    if v.dtype == torch.bfloat16:
        return v.view(torch.uint16).numpy()
    return (v.view(torch.int16) if v.dtype == torch.float16 else v).numpy()


# -- forward -------------------------------------------------------------------------------------------------


def experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | ExpertsInt8,
    down: torch.Tensor | ExpertsInt8,
    addends: bool,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.experts.experts`. Sums in float32."""
    gate_up_, down_ = _weight(gate_up), _weight(down)
    inputs = (x, weights, gate_up_.values, down_.values)
    if torch.is_grad_enabled() and any(v.requires_grad for v in inputs):
        return _Experts.apply(*inputs, gate_up_.scale, down_.scale, indices, addends)
    if indices.numel() <= FEW_PAIRS:
        return _few(x, indices, weights, gate_up_, down_, addends)
    return _forward(x, indices, weights, gate_up_, down_, addends)


def _few(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight, addends: bool
) -> torch.Tensor:
    """One token or a few: no sort, no Python between the rows, each chosen expert read once for every pair."""
    from jambascope.kernels.experts import cpu_vectors as k

    (tokens, d_model), slots, (n_experts, _, d_mlp) = x.shape, indices.shape[1], down.values.shape
    x32, weights32 = x.to(torch.float32).contiguous(), weights.to(torch.float32).contiguous()
    indices, gate_up_values, down_values = indices.contiguous(), gate_up.values.contiguous(), down.values.contiguous()
    out = torch.empty((tokens, slots, d_model) if addends else (tokens, d_model), dtype=torch.float32, device="cpu")
    act = torch.empty(tokens * slots, d_mlp, dtype=torch.float32, device="cpu")
    threads = 1 if tokens * slots * d_mlp * d_model < SERIAL_BELOW else torch.get_num_threads()
    parts = 1 if threads == 1 else CUTS_PER_THREAD * threads
    block = (ctypes.c_int64 * len(k.FIELDS))(
        0, 0, parts, tokens, slots, n_experts, d_model, d_mlp, addends, _KINDS[down_values.dtype],
        x32.data_ptr(), indices.data_ptr(), weights32.data_ptr(),
        gate_up_values.data_ptr(), 0 if gate_up.scale is None else gate_up.scale.data_ptr(),
        down_values.data_ptr(), 0 if down.scale is None else down.scale.data_ptr(), act.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    run_native(k.gate_up_vectors, block, threads)
    if block[k.OUT_OF_RANGE]:
        raise _out_of_range(indices, n_experts)
    block[k.NEXT_PART] = 0
    run_native(k.down_vectors, block, threads)
    return out.to(x.dtype)


def _out_of_range(indices: torch.Tensor, n_experts: int) -> InputError:
    low, high = (int(v) for v in indices.aminmax())
    return InputError(f"indices name experts {low}..{high}; there are 0..{n_experts - 1}")


def _weight(weight: torch.Tensor | ExpertsInt8) -> Weight:
    return Weight(weight.values, weight.scale) if isinstance(weight, ExpertsInt8) else Weight(weight, None)


class _Block(NamedTuple):
    """Some of the tokens, sorted by expert."""

    tokens: slice
    pairs: slice
    order: np.ndarray
    place: np.ndarray
    offsets: list[int]
    """Where each expert's pairs begin in ``order``, and where they end."""

    def tasks(self) -> list[tuple[int, int, int]]:
        """(expert, first row, last row and one), the largest first: what is left for the end is small."""
        tasks = [
            (e, row, min(row + ROWS, stop))
            for e, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False))
            for row in range(start, stop, ROWS)
        ]
        return sorted(tasks, key=lambda task: task[1] - task[2])


def _blocks(indices: torch.Tensor, n_experts: int) -> list[_Block]:
    from jambascope.kernels.experts import cpu_kernels as k

    tokens, slots = indices.shape
    flat = indices.reshape(-1).numpy()
    blocks = []
    for first in range(0, tokens, BLOCK_TOKENS):
        last = min(first + BLOCK_TOKENS, tokens)
        chosen = flat[first * slots : last * slots]
        order, place = np.empty((2, len(chosen)), np.int64)
        offsets = np.empty(n_experts + 1, np.int64)
        announce_first_compile(k.sort_by_expert)
        if not k.sort_by_expert(chosen, order, place, offsets):
            raise _out_of_range(indices, n_experts)
        pairs = slice(first * slots, last * slots)
        blocks.append(_Block(slice(first, last), pairs, order, place, offsets.tolist()))
    return blocks


def _forward(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight, addends: bool
) -> torch.Tensor:
    (tokens, d_model), slots = x.shape, indices.shape[1]
    # Not a view of anything when it is returned: hooks may edit it in place.
    out = torch.empty((tokens, slots, d_model) if addends else (tokens, d_model), dtype=x.dtype, device="cpu")
    out_rows = out.view(-1, d_model)
    x, weights = (v.detach().to(torch.float32).contiguous() for v in (x, weights))
    gate_up, down = _detached(gate_up, down)
    for block in _blocks(indices, len(gate_up.values)):
        staging = _scratch.take(len(block.order) * d_model * 4)
        rows = _Carver(staging).matrix(len(block.order), d_model, torch.float32)
        tasks, of_block = np.array(block.tasks(), np.int64), (x[block.tokens], weights[block.tokens])
        run_tasks(tasks, block.order, *of_block, gate_up, down, gate_up.values[0].nbytes // 2, rows)
        _combine(block, 1 if addends else slots, rows, out_rows[block.pairs if addends else block.tokens])
        _scratch.give(staging)
    return out


def _detached(*weights: Weight) -> list[Weight]:
    return [Weight(w.values.detach().contiguous(), w.scale) for w in weights]


def run_tasks(
    tasks: np.ndarray, order: np.ndarray, x: torch.Tensor, weights: torch.Tensor, gate: Weight, down: Weight, up: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """out [pairs, D] = the weighted outputs in their order; tasks [. 3] as ``cpu_products`` takes them, and ``up``."""
    from jambascope.kernels.experts import cpu_products as k

    (tokens, d_model), slots, d_mlp = x.shape, weights.shape[1], down.values.shape[-1]
    threads = min(torch.get_num_threads(), len(tasks))
    pitch = k.scratch_floats(int((tasks[:, 2] - tasks[:, 1]).max()), d_model, d_mlp)
    scratch = _scratch.take(threads * pitch * 4)
    call = (ctypes.c_int64 * len(k.FIELDS))(
        0, 0, len(tasks), tokens, slots, d_model, d_mlp, _KINDS[down.values.dtype], pitch, up,
        0, tasks.ctypes.data, order.ctypes.data, x.data_ptr(), weights.data_ptr(),
        gate.values.data_ptr(), 0 if gate.scale is None else gate.scale.data_ptr(),
        down.values.data_ptr(), 0 if down.scale is None else down.scale.data_ptr(), out.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    call[k.BLOCK] = ctypes.addressof(call)
    run_native(k.run_tasks, call, threads)
    _scratch.give(scratch)


def _combine(block: _Block, slots: int, rows: torch.Tensor, out: torch.Tensor) -> None:
    from jambascope.kernels.experts import cpu_kernels as k

    place, serial = block.place.ctypes.data, rows.numel() < COMBINE_SERIAL_BELOW
    where = place, rows.data_ptr(), out.data_ptr()
    run_loop(k.combine, len(out), _KINDS[out.dtype], slots, out.shape[1], *where, serial=serial)


# -- backward ------------------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, gate_up, down, gate_up_scale, down_scale, indices, addends):
        ctx.save_for_backward(x, weights, gate_up, down, gate_up_scale, down_scale, indices)
        ctx.addends = addends
        return _forward(x, indices, weights, Weight(gate_up, gate_up_scale), Weight(down, down_scale), addends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, weights, gate_up, down, gate_up_scale, down_scale, indices = ctx.saved_tensors
        need_x, need_weights, need_gate_up, need_down, *_ = ctx.needs_input_grad
        slots, d_model = indices.shape[1], x.shape[1]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        grad_weights = torch.empty(weights.numel(), dtype=torch.float32, device="cpu")
        into = [
            torch.zeros(w.shape, dtype=torch.float32, device="cpu") if need else None
            for w, need in ((gate_up, need_gate_up), (down, need_down))
        ]
        dout = dout.contiguous().view(-1, d_model)
        pair_weights = weights.detach().float().reshape(-1)
        both = _detached(Weight(gate_up, gate_up_scale), Weight(down, down_scale))
        x = x.detach().contiguous()
        for block in _blocks(indices, len(gate_up)):
            staging = _scratch.take(len(block.order) * d_model * 4)
            dx = _Carver(staging).matrix(len(block.order), d_model, torch.float32) if need_x else None
            dy, dy_slots = (dout[block.pairs], 1) if ctx.addends else (dout[block.tokens], slots)
            _run_backward(
                block, slots, x[block.tokens], pair_weights[block.pairs], both,
                dy, dy_slots, dx, grad_weights[block.pairs], into,
            )  # fmt: skip
            if need_x:
                _combine(block, slots, dx, grad_x[block.tokens])
            _scratch.give(staging)
        grads = [
            None if g is None else g.view(v.shape).to(v.dtype)
            for g, v in zip((grad_x, grad_weights, *into), (x, weights, gate_up, down), strict=True)
        ]
        return *grads, None, None, None, None


def _run_backward(block, slots, x, weights, both, dy, dy_slots, dx, dweights, into):
    """One block's adjoint in float32; a thread takes a whole expert, whose weights' gradients it adds up in order."""
    from jambascope.kernels.experts import cpu_kernels as k

    gate_up, down = both
    grad_gate_up, grad_down = into
    d_model, d_mlp, f32 = x.shape[1], down.values.shape[2], torch.float32
    by_expert: dict[int, list[tuple[int, int]]] = {}
    for e, start, stop in block.tasks():
        by_expert.setdefault(e, []).append((start, stop))
    chosen = sorted(by_expert, key=lambda e: -len(by_expert[e]))
    arrays = [_array(v) for v in (x, dy, weights, dweights)]
    nbytes = ROWS * (2 * d_model + 6 * d_mlp) * 4 + 6 * 64
    for loop in (k.gather, k.swiglu_backward):
        announce_first_compile(loop)

    def rows_of(buffer: torch.Tensor, e: int, start: int, stop: int) -> None:
        x_array, dy_array, weight_array, dweight_array = arrays
        carver, n, order = _Carver(buffer), stop - start, block.order[start:stop]
        inputs, outputs = (carver.matrix(n, d_model, f32) for _ in range(2))
        act, dact = (carver.matrix(n, d_mlp, f32) for _ in range(2))
        hidden, dhidden = (carver.matrix(n, 2 * d_mlp, f32) for _ in range(2))
        k.gather(order, slots, x_array, _array(inputs))
        k.gather(order, dy_slots, dy_array, _array(outputs))
        gate_up.product(e, inputs, hidden)
        down.adjoint(e, outputs, dact)
        k.swiglu_backward(
            order, weight_array, _array(hidden), _array(dact), _array(dhidden), _array(act), dweight_array
        )
        if grad_down is not None:
            torch.addmm(grad_down[e], outputs.T, act, out=grad_down[e])
        if grad_gate_up is not None:
            torch.addmm(grad_gate_up[e], dhidden.T, inputs, out=grad_gate_up[e])
        if dx is not None:
            gate_up.adjoint(e, dhidden, dx[start:stop])

    def work(first: int, last: int) -> None:
        buffer = _scratch.take(nbytes)
        for e in chosen[first:last]:
            for start, stop in by_expert[e]:
                rows_of(buffer, e, start, stop)
        _scratch.give(buffer)

    run_items(work, len(chosen), serial=len(chosen) < torch.get_num_threads())

"""Statistics of activations over streams of prompts, without keeping the activations.

    moments, load = collect(model, prompts, [Moments("blocks.*.hook_resid_post"), RouterLoad()])
    moments["blocks.3.hook_resid_post"].variance  # [D]
    load[1].load  # [X]

Padding never counts. Nothing in the hooks waits for the device: how many tokens there are is read from the mask on the
CPU, and sums stay where the model is, in float64 (float32 where there is none).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from jambascope import tokens as tokenization
from jambascope.errors import InputError
from jambascope.files import write_tensors
from jambascope.hook_point import At, HookPoint
from jambascope.hooks.accumulators import Mean, Moments, RouterLoad, Seen, StateNorm, Statistic
from jambascope.hooks.histogram import Histogram
from jambascope.hooks.prefill import PIECE, check_piece, in_pieces

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

__all__ = [
    "Histogram", "Mean", "Moments", "RouterLoad", "StateNorm", "Statistic",
    "collect", "load_statistics", "save_statistics",
]  # fmt: skip

KINDS = {kind.__name__: kind for kind in (Mean, Moments, Histogram, RouterLoad, StateNorm)}


@torch.no_grad()
def collect(
    model: HookedJamba,
    prompts: Iterable[Any],
    statistics: Sequence[Statistic],
    *,
    batch_size: int = 8,
    piece: int = PIECE,
    progress: bool = False,
) -> Sequence[Statistic]:
    """Run prompts of any length and let statistics take in what they look at.

    Args:
        prompts: texts, or token ids as tensors [T] or lists; a generator is read as it is needed.
        statistics: filled, and going on from what they have seen before.
        batch_size: prompts that run together, padded to the longest.
        piece: positions that run at a time.
        progress: show how many prompts are done.

    Returns:
        ``statistics``, their sums on the CPU.

    Raises:
        InputError: a prompt that the model cannot take; a generator with a histogram that needs two passes.
        HookError: names that the model does not have.
    """
    check_piece(piece)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    points = {id(s): s.points(model) for s in statistics}
    unknown = [s for s in statistics if isinstance(s, Histogram) and not set(points[id(s)]) <= set(s.edges)]
    if unknown:
        if iter(prompts) is prompts:
            raise InputError(
                "a histogram without edges reads the prompts twice, and these come from a generator; give edges, or a "
                "list of prompts"
            )
        extremes = [Moments(points[id(histogram)]) for histogram in unknown]
        collect(model, prompts, extremes, batch_size=batch_size, piece=piece, progress=progress)
        for histogram, found in zip(unknown, extremes, strict=True):
            for name, moment in found.items():
                histogram.span(name, float(moment.minimum.min()), float(moment.maximum.max()))
    for statistic in statistics:
        statistic.to(model.device)
    try:
        for tokens, mask in _batches(model, prompts, batch_size, progress):
            _run_batch(model, tokens, mask, [(s, points[id(s)]) for s in statistics], piece)
    finally:
        for statistic in statistics:
            statistic.to("cpu")
    return statistics


def _run_batch(
    model: HookedJamba,
    tokens: torch.Tensor,
    mask: np.ndarray | None,
    statistics: list[tuple[Statistic, list[str]]],
    piece: int,
) -> None:
    length = tokens.shape[1]
    seen = _Looking(mask, len(tokens), model.device)
    hooks = []
    for statistic, names in statistics:
        apart = statistic.positions_apart
        for name in names:
            hook = _listener(statistic, seen)
            if apart == 1:
                hooks.append((name, hook))
            elif length >= apart:
                hooks.append((name, At(range(apart - 1, length, apart), hook)))
    on_device = None if mask is None else torch.from_numpy(mask).to(model.device, non_blocking=True)
    tokens, on_device = model._prepare(tokens, on_device, None, None)
    with model.hooks(hooks):
        for _ in in_pieces(model, tokens, on_device, model.new_state(len(tokens)), piece):
            pass


def _listener(statistic: Statistic, seen: _Looking):
    def listen(value: torch.Tensor, hook: HookPoint) -> None:
        value = value.detach().movedim(hook.row.axes.index("T"), 1)
        statistic.add(hook.name, value, seen.at(hook.positions))

    return listen


class _Looking:
    """Which of a batch's positions are tokens, for whatever positions a hook holds."""

    def __init__(self, mask: np.ndarray | None, batch: int, device: torch.device) -> None:
        self.mask, self.batch, self.device = mask, batch, device
        self.known: dict[tuple[int, int, int], Seen] = {}

    def at(self, positions: Sequence[int]) -> Seen:
        key = positions[0], positions[-1], len(positions)
        if key not in self.known:
            if self.mask is None:
                self.known[key] = Seen(positions, None, self.batch * len(positions))
            else:
                mask = self.mask[:, list(positions)]
                whole = bool(mask.all())
                on_device = None if whole else torch.from_numpy(mask).to(self.device, non_blocking=True)
                self.known[key] = Seen(positions, on_device, int(mask.sum()))
        return self.known[key]


def _batches(
    model: HookedJamba, prompts: Iterable[Any], size: int, progress: bool
) -> Iterator[tuple[torch.Tensor, np.ndarray | None]]:
    """Token ids [B T] padded on the right, and their mask (None when nothing is padded)."""
    rows: list[torch.Tensor] = []
    for prompt in _bar(prompts, progress):
        rows.append(_ids(model, prompt))
        if len(rows) == size:
            yield _padded(rows)
            rows = []
    if rows:
        yield _padded(rows)


def _ids(model: HookedJamba, prompt: Any) -> torch.Tensor:
    if isinstance(prompt, str):
        return tokenization.encode(model, prompt, None)[0][0]
    ids = torch.as_tensor(prompt).cpu()
    if ids.ndim != 1:
        raise InputError(f"a prompt has shape {tuple(ids.shape)}; give a text, or the ids [pos] of one prompt")
    return tokenization.check(ids, None, model.config.d_vocab, torch.device("cpu"))[0][0]


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, np.ndarray | None]:
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
    return tokens, None if mask.all() else mask


def _bar(prompts: Iterable[Any], show: bool) -> Iterable[Any]:
    if not show:
        return prompts
    from rich.console import Console
    from rich.progress import track

    total = len(prompts) if hasattr(prompts, "__len__") else None
    return track(prompts, "prompts", total=total, console=Console(stderr=True), transient=True)


def save_statistics(path: str | Path, statistics: Sequence[Statistic]) -> None:
    """One safetensors file of the sums, with a JSON description of the statistics in its metadata.

    The file is replaced at once or not at all.
    """
    path = Path(path)
    tensors = {
        f"{i}/{name}/{field}": value.clone(memory_format=torch.contiguous_format)
        for i, statistic in enumerate(statistics)
        for name, part in statistic.parts.items()
        for field, value in part.items()
    }
    described = [
        {"kind": type(s).__name__, "tokens": s.tokens, "positions_apart": s.positions_apart} for s in statistics
    ]
    write_tensors(path, tensors, {"jambascope-statistics": json.dumps({"version": 1, "list": described})})


def load_statistics(path: str | Path) -> list[Statistic]:
    """What ``save_statistics`` wrote: to read, to merge into others, or to collect more into.

    Raises:
        InputError: no such file, a damaged one, or one of something else.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["jambascope-statistics"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if description["version"] != 1:
            raise InputError(f"{path} has format version {description['version']!r}; this is version 1")
        return [_restored(i, entry, tensors) for i, entry in enumerate(description["list"])]
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path} holds no statistics ({type(e).__name__}: {str(e)[:80]})") from None


def _restored(i: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Statistic:
    tokens = {str(name): _whole(n) for name, n in entry["tokens"].items()}
    kind = KINDS[entry["kind"]]
    statistic = kind(*([tuple(tokens)] if issubclass(kind, (Mean, Moments, Histogram)) else []))
    statistic.tokens, statistic.positions_apart = tokens, max(1, _whole(entry["positions_apart"]))
    if kind in (RouterLoad, StateNorm):
        statistic.layers = tuple(sorted({int(name.split(".")[1]) for name in tokens}))
    for name in tokens:
        prefix = f"{i}/{name}/"
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if set(part) not in kind.fields:
            raise ValueError(f"{name} has {sorted(part)}")
        statistic.parts[name] = part
        if isinstance(statistic, Histogram):
            statistic.edges[name] = part["edges"]
    return statistic


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0")
    return value

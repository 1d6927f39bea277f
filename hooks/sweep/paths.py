"""Path patching: a component's effect on the metric through one reader of the stream alone.

Wang et al. (arXiv 2211.00593, 3.1 and appendix B): the sender's output is patched, everything between keeps what it was
in the base run, and what then reaches the receiver is patched into a run of its own. The stream carries the sender's
change to every later reader, so one pass over it gives what all receivers get; a cell then costs what a cell of
``patch_sweep`` at the receiver does. Whatever stands between, attention with shared keys or Mamba, is frozen.

A receiver is what a layer reads: q, k or v of a head, the input of a Mamba mixer, a feed-forward, or the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float

from jambascope.errors import HookError, InputError
from jambascope.hooks.intervals import at_least
from jambascope.hooks.sweep.batches import starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import EXPERT_OUT, Node, Target, distinct, expert_addend, needed, targets, targets_of
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Direction, Measure, Question, layers_of
from jambascope.hooks.sweep.recorded import Base, Recording, record
from jambascope.hooks.sweep.result import Effects
from jambascope.hooks.sweep.running import Running
from jambascope.state import Run

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

RECEIVERS = ("q", "k", "v", "in_proj", "mlp_out", "logits")
"""Names of what reads the stream: heads' queries, keys and values, Mamba's input, feed-forwards, the logits."""
WRITERS = ("attn.hook_z", "hook_attn_out", "hook_mixer_out", "hook_mlp_out", EXPERT_OUT)
Through = Literal["stream", "feed_forwards"]


@dataclass(frozen=True)
class Sender:
    """One component that writes to the stream."""

    target: Target
    unit: int

    @property
    def stage(self) -> int:
        """The first reading that sees it; a layer reads twice, and the logits are read last."""
        return 2 * self.target.layer + (2 if self.target.tail in ("hook_mlp_out", EXPERT_OUT) else 1)

    @property
    def label(self) -> str:
        return _label(self.target, self.unit)


@torch.no_grad()
def path_patch(
    model: HookedJamba,
    clean: Input,
    corrupted: Input,
    metric: Metric | Callable | Sequence[Metric | Callable],
    senders: str | Node | Sequence[str | Node] | None = None,
    receivers: str | Sequence[str] = RECEIVERS,
    *,
    layers: Iterable[int] | None = None,
    receiver_layers: Iterable[int] | None = None,
    through: Through = "stream",
    direction: Direction = "denoise",
    progress: bool | Progress = True,
    max_bytes: int = 1 << 30,
) -> Effects:
    """The metrics when one sender reaches one receiver by one path, at all positions: axes metric, pair, sender,
    receiver; NaN where the receiver reads before the sender writes.

    Args:
        senders: components that write to the stream: z (each head), attn_out, mixer_out, mlp_out, expert_out (each
            expert). None: z, mixer_out and mlp_out where the model has them.
        receivers: of ``RECEIVERS``; heads one by one.
        layers, receiver_layers: those of the senders and of the receivers; all that have them when None.
        through: "stream": the residual stream alone carries the change; "feed_forwards": those between compute anew
            from it, as in Wang et al., and only attention and Mamba are frozen.

    Raises:
        HookError: a sender that does not write to the stream, a receiver that no layer has.
        InputError: as ``patch_sweep``.
    """
    if through not in ("stream", "feed_forwards"):
        raise InputError(f"through={through!r} must be 'stream' or 'feed_forwards'")
    at_least("max_bytes", max_bytes)
    question = Question.of(model, clean, corrupted, metric, direction)
    layers, receiver_layers = layers_of(model, layers), layers_of(model, receiver_layers)
    sending = list(_senders(targets_of(model, "senders", senders, layers)))
    names = distinct("receivers", receivers)
    reading = [target for name in names if name != "logits" for target in _receivers(model, name, receiver_layers)]
    if not reading and "logits" not in names:
        where = "" if receiver_layers is None else f" among layers {list(receiver_layers)}"
        raise HookError(f"receivers: this model has no {' and no '.join(names)}{where}")
    paths = _Paths(question, sending, reading, "logits" in names, through, max_bytes)
    return paths.until_done(progress)


def _senders(chosen: list[list[Target]]) -> Iterator[Sender]:
    for of_node in chosen:
        for target in of_node:
            if target.tail not in WRITERS or target.node.channels or (target.tail == "attn.hook_z" and not target.axis):
                raise HookError(
                    f"senders: {target.node.name} does not write to the stream; "
                    "give z, attn_out, mixer_out, mlp_out or expert_out"
                )
            for unit in range(target.units):
                yield Sender(target, unit)


def _receivers(model: HookedJamba, name: str, layers: Sequence[int] | None) -> list[Target]:
    if name not in RECEIVERS:
        raise HookError(f"receivers: {name!r} must be one of {', '.join(RECEIVERS)}")
    kinds = {"in_proj": model.config.ssm_layers, "mlp_out": _feeding(model)}
    having = kinds.get(name, model.config.attention_layers)
    chosen = having if layers is None else [layer for layer in layers if layer in having]
    return targets(model, name, chosen) if chosen else []


def _feeding(model: HookedJamba) -> list[int]:
    return [i for i, kind in enumerate(model.config.feed_forwards) if kind != "none"]


def _stage(target: Target) -> int:
    """When a receiver reads."""
    return 2 * target.layer + (target.tail == "hook_mlp_out")


def _label(target: Target, unit: int) -> str:
    name = f"L{target.layer} {target.node.component}"
    return f"{name} {unit}" if target.axis else name


class _Paths(Running):
    """All pairs of senders and receivers."""

    def __init__(
        self,
        question: Question,
        senders: list[Sender],
        receivers: list[Target],
        logits: bool,
        through: Through,
        max_bytes: int,
    ) -> None:
        super().__init__(question)
        self.senders, self.receivers, self.through, self.max_bytes = senders, receivers, through, max_bytes
        self.columns = [(target, unit) for target in receivers for unit in range(target.units)]
        self.logits = logits
        labels = [_label(*column) for column in self.columns] + ["logits"] * logits
        self.add("paths", {"sender": [s.label for s in senders], "receiver": labels})

    def run(self) -> Iterator[float]:
        """Measure receiver by receiver, in the order in which they read; the share that is done."""
        question, config = self.question, self.model.config
        wanted = {name: range(question.length) for s in self.senders for name in needed(s.target)}
        source, source_logits = record(self.model, question.source, wanted, question.all_reads)
        rows = [Row(0, 0, 0, (min(*question.same_up_to, question.length - 1),), 0, ())]
        starts = starts_of(self.model, rows, question.length, question.pairs, self.max_bytes)
        lowest = min(s.target.layer for s in self.senders)
        layers, further = range(lowest, config.n_layers), wanted | self._written(lowest)
        base = Base.record(self.model, question.base, question.all_reads, starts, layers, further)
        measure = Measure(question, base.logits, source_logits)
        self.runs = measure.runs()
        done, work = (
            0,
            question.pairs * sum(s.stage <= _stage(target) for s in self.senders for target, _ in self.columns),
        )
        yield 0.0
        for group in self._groups():
            for stage, active, streams in self._streams(base, source, lowest, group):
                for target in (target for target in self.receivers if _stage(target) == stage):
                    for cells in self._receive(target, active, streams, base, measure):
                        done += cells
                        yield done / work
                if stage == 2 * config.n_layers and self.logits:
                    self._unembed(active, streams, measure)

    def _groups(self) -> list[list[int]]:
        """The senders whose streams are held together."""
        config, n = self.model.config, len(self.senders)
        size = self.question.base.numel() * config.d_model * self.model.dtype.itemsize
        at_once = max(1, self.max_bytes // (4 * size))
        order = sorted(range(n), key=lambda i: self.senders[i].stage)
        return [order[i : i + at_once] for i in range(0, n, at_once)]

    def _unembed(self, active: list[int], streams: torch.Tensor, measure: Measure) -> None:
        """What the logits make of each sender's stream."""
        with self.model._lock:
            logits = self.model.unembed(self.model.ln_final(streams[:, :, list(self.question.all_reads)].flatten(0, 1)))
        pairs = range(self.question.pairs)
        found = measure(logits, torch.arange(len(pairs), device=logits.device).repeat(len(active))).cpu().numpy()
        last = len(self.columns)
        self.write([Row(p, p, 0, (), 0, ("paths", p, sender, last)) for sender in active for p in pairs], found)

    def _written(self, lowest: int) -> dict[str, range]:
        """What else is kept of the base run: its stream between the halves of layers, and what receivers replace."""
        names = [f"blocks.{layer}.hook_resid_mid" for layer in _feeding(self.model) if layer >= lowest]
        names += [target.name for target in self.receivers if target.tail == "hook_mlp_out"]
        return dict.fromkeys(names, range(self.question.length))

    def _streams(
        self, base: Base, source: Recording, lowest: int, group: list[int]
    ) -> Iterator[tuple[int, list[int], torch.Tensor]]:
        """Each reading from the first that any sender of a group reaches: its stage, the senders that reach it, and the
        stream as each of them alone changes it, [sender pair pos d_model]."""
        config, everyone = self.model.config, torch.arange(self.question.pairs, device=self.model.device)
        before, active = base.stream(lowest, everyone, 0), []
        streams = before.new_empty(0, *before.shape)
        for stage in range(2 * lowest + 1, 2 * config.n_layers + 1):
            layer, mixed = divmod(stage, 2)
            if mixed and config.feed_forwards[layer] == "none":
                continue
            now = base.recording.values[f"blocks.{layer}.hook_resid_mid"] if mixed else base.stream(layer, everyone, 0)
            if not mixed and self.through == "feed_forwards" and config.feed_forwards[layer - 1] != "none" and active:
                flat = streams.flatten(0, 1)
                run = Run(len(flat), flat.shape[1], flat.device, None, None)
                with self.model._lock:
                    streams = self.model.blocks[layer - 1].feed(flat, run).view_as(streams)
            else:
                streams = streams + (now - before)
            joining = [i for i in group if self.senders[i].stage <= stage and i not in active]
            if joining:
                changes = torch.stack([self._change(base.recording, source, self.senders[i]) for i in joining])
                streams, active = torch.cat((streams, now + changes)), active + joining
            before = now
            if active:
                yield stage, active, streams

    def _change(self, base: Recording, source: Recording, sender: Sender) -> Float[torch.Tensor, "pair pos d_model"]:
        """What a sender's patch adds to the stream."""
        target = sender.target
        if target.tail == EXPERT_OUT:
            return expert_addend(source.values, target.layer, sender.unit) - expert_addend(
                base.values, target.layer, sender.unit
            )
        change = source.values[target.name] - base.values[target.name]
        if target.tail == "attn.hook_z":
            return change[:, :, sender.unit] @ self.model.blocks[target.layer].attn.W_O[sender.unit]
        return change

    def _receive(
        self, target: Target, active: list[int], streams: torch.Tensor, base: Base, measure: Measure
    ) -> Iterator[int]:
        """What reaches a receiver from each sender, patched into runs of their own; how many cells are done."""
        question, first = self.question, self.question.same_up_to
        same = [pair for pair in range(question.pairs) if first[pair] == question.length]
        width = target.row.nbytes(self.model.config, question.pairs, question.length, self.model.dtype)
        at_once = max(1, self.max_bytes // (4 * width))
        columns = [i for i, (of, _) in enumerate(self.columns) if of is target]
        for begin in range(0, len(active), at_once):
            some = active[begin : begin + at_once]
            values = self._read(target, streams[begin : begin + at_once].flatten(0, 1))
            source = Recording({target.name: values}, {target.name: range(question.length)})
            rows = [
                Row(pair, i * question.pairs + pair, 0, tuple(range(first[pair], question.length)), unit, place)
                for i, sender in enumerate(some)
                for pair in range(question.pairs)
                for unit, column in enumerate(columns)
                for place in [("paths", pair, sender, column)]
            ]
            still = [row for row in rows if row.pair in same]
            self.write(still, self.base[:, [row.pair for row in still]])
            yield len(still)
            engine = Engine(self.model, [target], base, source, question.all_reads)
            for batch in self.measure(engine, measure, [row for row in rows if row.pair not in same]):
                yield len(batch)

    def _read(self, target: Target, stream: Float[torch.Tensor, "row pos d_model"]) -> torch.Tensor:
        """What a receiver makes of a stream."""
        block = self.model.blocks[target.layer]
        with self.model._lock:
            if target.tail == "hook_mlp_out":
                return block.mlp(block.ln2(stream), Run(len(stream), stream.shape[1], stream.device, None, None))
            if target.tail == "mixer.hook_in_proj":
                return block.mixer.in_proj(block.ln1(stream))
            read = getattr(block.attn, f"{target.node.component}_proj")(block.ln1(stream))
            return read.unflatten(-1, (target.units, -1))

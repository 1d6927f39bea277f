"""Path patching: a component's effect on the metric through one reader of the stream alone.

Wang et al. (arXiv 2211.00593, 3.1 and appendix B): the sender's output is patched, everything between keeps what it was
in the base run, and what then reaches the receiver is patched into a run of its own. The stream carries the sender's
change to every later reader, so one pass over it gives what all receivers get; a cell then costs what a cell of
``patch_sweep`` at the receiver does. Whatever stands between, attention with shared keys or Mamba, is frozen: nothing
moves along positions there, so what is sent at some of them reaches receivers at these alone.

A receiver is what a layer reads: q, k or v of a head, the input of a Mamba mixer, a feed-forward, or the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.errors import HookError, InputError
from jambascope.hooks.intervals import at_least
from jambascope.hooks.sweep.batches import MOST_LOGITS, starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.memory import Need, base_bytes, room, states_bytes, values_bytes
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import EXPERT_OUT, Node, Target, distinct, expert_addend, needed, targets, targets_of
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Direction, Question, layers_of, listed, position, whole
from jambascope.hooks.sweep.recorded import Base, Prompts, Recording
from jambascope.hooks.sweep.result import Effects
from jambascope.hooks.sweep.rows import Row
from jambascope.hooks.sweep.running import Running
from jambascope.state import Run

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

RECEIVERS = ("q", "k", "v", "in_proj", "mlp_out", "logits")
"""Names of what reads the stream: heads' queries, keys and values, Mamba's input, feed-forwards, the logits."""
WRITERS = ("attn.hook_z", "hook_attn_out", "hook_mixer_out", "hook_mlp_out", EXPERT_OUT)
Through = Literal["stream", "feed_forwards"]
Places = int | Iterable[int] | None
"""One position, or several that are patched together; None: all."""


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
    positions: Places = None,
    receiver_positions: Places = None,
    through: Through = "stream",
    direction: Direction = "denoise",
    progress: bool | Progress = True,
    max_bytes: int = 1 << 30,
) -> Effects:
    """The metrics when one sender reaches one receiver by one path, at all positions or the given ones together: axes
    metric, pair, sender, receiver; NaN where the receiver reads before the sender writes.

    Args:
        senders: components that write to the stream: z (each head), attn_out, mixer_out, mlp_out, expert_out (each
            expert). None: z, mixer_out and mlp_out where the model has them.
        receivers: of ``RECEIVERS``; heads one by one.
        layers, receiver_layers: those of the senders and of the receivers; all that have them when None.
        positions, receiver_positions: where the senders and where the receivers are patched: one position, or several,
            which are patched together; negative ones count from the end. None: all. The logits are read where the
            metrics read them: receiver positions that come with "logits" must have those among them.
        through: "stream": the residual stream alone carries the change; "feed_forwards": those between compute anew
            from it, as in Wang et al., and only attention and Mamba are frozen.

    Raises:
        HookError: a sender that does not write to the stream, a receiver that no layer has.
        InputError: as ``patch_sweep``; positions after the last that a metric reads, no position at which both are
            patched, receiver positions without those at which metrics read the logits.
    """
    if through not in ("stream", "feed_forwards"):
        raise InputError(f"through={through!r} must be 'stream' or 'feed_forwards'")
    at_least("max_bytes", max_bytes)
    question = Question.of(model, clean, corrupted, metric, direction)
    layers, receiver_layers = layers_of(model, layers), layers_of(model, receiver_layers)
    sending = list(_senders(targets_of(model, "senders", senders, layers)))
    names = distinct("receivers", receivers)
    shared = _shared(question, positions, receiver_positions, "logits" in names)
    reading = [target for name in names if name != "logits" for target in _receivers(model, name, receiver_layers)]
    if not reading and "logits" not in names:
        where = "" if receiver_layers is None else f" among layers {list(receiver_layers)}"
        raise HookError(f"receivers: this model has no {' and no '.join(names)}{where}")
    paths = _Paths(question, sending, reading, "logits" in names, shared, through, max_bytes)
    return paths.until_done(progress)


def _shared(question: Question, positions: Places, receiver_positions: Places, logits: bool) -> Sequence[int]:
    """Where senders and receivers are both patched, ascending: elsewhere receivers read what they read in the base run.

    Raises:
        InputError: nowhere, or positions that do not exist or that nothing read depends on.
    """
    sent, read = _places("positions", positions, question), _places("receiver_positions", receiver_positions, question)
    if logits and not set(question.all_reads).issubset(read):
        raise InputError(
            f"receiver_positions={list(read)}: the logits are read where the metrics read, at "
            f"{list(question.all_reads)}; add what is missing, or leave 'logits' out of the receivers"
        )
    found = [p for p in sent if p in read]
    if not found:
        raise InputError(
            f"receiver_positions={list(read)}: nothing reaches them from positions={list(sent)}, as attention and "
            "Mamba between are frozen; give both some position in common"
        )
    return range(question.length) if len(found) == question.length else found


def _places(field: str, given: Places, question: Question) -> Sequence[int]:
    """One or several positions, ascending; all that matter where None.

    Raises:
        InputError: none, one twice, one that does not exist or that comes after the last that a metric reads.
    """
    last = question.length - 1
    if given is None:
        return range(last + 1)
    one = whole(given) is not None
    if isinstance(given, str) or not one and not isinstance(given, Iterable):
        raise InputError(f"{field}={given!r} must be a position, a list of positions, or None for all")
    found = [position(p, question.prompt_length, field) for p in ([given] if one else listed(given))]
    if not found:
        raise InputError(f"{field}=[] patches nothing; leave it out for every position")
    if len(set(found)) < len(found):
        raise InputError(f"{field}={found} names a position twice; give each once")
    if max(found) > last:
        raise InputError(
            f"{field}: {max(found)} comes after {last}, the last position that a metric reads, and changes nothing; "
            "leave it out, or give the metric later positions"
        )
    return sorted(found)


def _senders(chosen: list[list[Target]]) -> Iterator[Sender]:
    for of_node in chosen:
        for target in of_node:
            if target.tail not in WRITERS or target.channel_axis or (target.tail == "attn.hook_z" and not target.axis):
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
        positions: Sequence[int],
        through: Through,
        max_bytes: int,
    ) -> None:
        """
        Args:
            positions: where senders and receivers are patched, ascending.

        Raises:
            InputError: ``max_bytes`` too small for one pair.
        """
        super().__init__(question)
        self.senders, self.receivers, self.through = senders, receivers, through
        self.columns = [(target, unit) for target in receivers for unit in range(target.units)]
        self.logits, self.positions = logits, positions
        labels = [_label(*column) for column in self.columns] + ["logits"] * logits
        self.add("paths", {"sender": [s.label for s in senders], "receiver": labels})

        lowest, n_layers = min(s.target.layer for s in senders), self.model.config.n_layers
        self.layers = range(lowest, n_layers)
        self.of_source = {name: positions for s in senders for name in needed(s.target)}
        self.of_base = self.of_source | dict.fromkeys(self._written(), positions)
        self.room = room(question, max_bytes, self._need(), f"path patching of {len(senders)} senders")

    def _need(self) -> Need:
        """Of one pair: both runs, and for one sender at least its stream, and what a receiver makes of it."""
        length, first = self.question.length, self._first(self.question)
        recorded = base_bytes(self.model, length, self.layers, self.of_base)
        recorded += values_bytes(self.model, self.of_source, length)
        if len(self.positions) < length:
            recorded += self._stream // 2  # what ``_here`` takes of the base's, before a layer and after it
        return Need(recorded + self._stream + self._most_read, states_bytes(self.model, self.layers), [first])

    @property
    def _stream(self) -> int:
        """Bytes of a sender's stream, of one pair: itself, what is added, and both once more as others join."""
        return 4 * len(self.positions) * self.model.config.d_model * self.model.dtype.itemsize

    @property
    def _most_read(self) -> int:
        """Bytes of what one receiver makes of one stream, with what that is made of."""
        return 2 * max((self._read_bytes(target) for target in self.receivers), default=0)

    def _read_bytes(self, target: Target) -> int:
        return values_bytes(self.model, {target.name: self.positions}, self.question.length)

    def _patched(self, question: Question) -> list[tuple[int, ...]]:
        """Where each pair is patched: from the first position on in which its prompts differ."""
        return [tuple(p for p in self.positions if p >= first) for first in question.same_up_to]

    def _first(self, question: Question) -> int:
        """The first that is patched in any pair; the last position where none is."""
        return min((positions[0] for positions in self._patched(question) if positions), default=question.length - 1)

    def _here(self, stream: torch.Tensor) -> Float[torch.Tensor, "pair place d_model"]:
        """A stream of all positions at those that are patched."""
        if len(self.positions) == stream.shape[1]:
            return stream
        return stream.index_select(1, index_tensor(self.positions, stream.device))

    def run(self) -> Iterator[float]:
        """Measure receiver by receiver, in the order in which they read; the share that is done."""
        question, config = self.question, self.model.config
        work = question.pairs * sum(s.stage <= _stage(target) for s in self.senders for target, _ in self.columns)
        done = 0
        for begin in range(0, question.pairs, self.room.pairs):
            some = question.some(begin, self.room.pairs)
            starts = starts_of([self._first(some)], self.room.states)
            prompts = Prompts(some.source, self.of_source)
            base, [(source, source_logits)] = Base.record(
                self.model, some.base, some.all_reads, starts, self.layers, self.of_base, prompts
            )
            self.ends(begin, base, source_logits)
            del source_logits
            yield done / max(work, 1)
            for group in self._groups(some):
                for stage, active, streams in self._streams(base, source, group):
                    for target in (target for target in self.receivers if _stage(target) == stage):
                        for cells in self._receive(some, begin, target, active, streams, base):
                            done += cells
                            yield done / work
                    if stage == 2 * config.n_layers and self.logits:
                        self._unembed(begin, active, streams, base)
            del source, base
        yield 1.0

    def _groups(self, question: Question) -> list[list[int]]:
        """The senders whose streams are held together."""
        at_once = max(1, (self.room.left // 2 // question.pairs + self._stream) // self._stream)
        order = sorted(range(len(self.senders)), key=lambda i: self.senders[i].stage)
        return [order[i : i + at_once] for i in range(0, len(order), at_once)]

    def _unembed(self, begin: int, active: list[int], streams: torch.Tensor, base: Base) -> None:
        """What the logits make of each sender's stream; those of the base run where nothing is sent."""
        pairs, last, reads = range(begin, begin + streams.shape[1]), len(self.columns), self.question.all_reads
        sent = [i for i, p in enumerate(reads) if p in self.positions]
        places = [self.positions.index(reads[i]) for i in sent]
        at_once = max(1, MOST_LOGITS // base.logits.numel())
        for at in range(0, len(active), at_once):
            some = active[at : at + at_once]
            logits = base.logits.repeat(len(some), 1, 1)
            if sent:
                with self.model._lock:
                    read = self.model.ln_final(streams[at : at + at_once, :, places].flatten(0, 1))
                    logits[:, sent] = self.model.unembed(read)
            found = self.measure(logits, index_tensor(pairs, logits.device).repeat(len(some))).cpu().numpy()
            self.write([Row(p, p, 0, (), 0, ("paths", p, sender, last)) for sender in some for p in pairs], found)

    def _written(self) -> list[str]:
        """What else is kept of the base run: its stream between the halves of layers."""
        return [f"blocks.{layer}.hook_resid_mid" for layer in _feeding(self.model) if layer in self.layers]

    def _streams(
        self, base: Base, source: Recording, group: list[int]
    ) -> Iterator[tuple[int, list[int], torch.Tensor]]:
        """Each reading from the first that any sender of a group reaches: its stage, the senders that reach it, and the
        stream as each of them alone changes it, [sender pair place d_model] at the positions that are patched."""
        config, lowest = self.model.config, self.layers[0]
        before, active = self._here(base.stream(lowest)), []
        streams = before.new_empty(0, *before.shape)
        for stage in range(2 * lowest + 1, 2 * config.n_layers + 1):
            layer, mixed = divmod(stage, 2)
            if mixed and config.feed_forwards[layer] == "none":
                continue
            now = base.recording.values[f"blocks.{layer}.hook_resid_mid"] if mixed else self._here(base.stream(layer))
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

    def _change(self, base: Recording, source: Recording, sender: Sender) -> Float[torch.Tensor, "pair place d_model"]:
        """What a sender's patch adds to the stream where it is patched."""
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
        self, question: Question, begin: int, target: Target, active: list[int], streams: torch.Tensor, base: Base
    ) -> Iterator[int]:
        """What reaches a receiver from each sender, patched into runs of their own, of the pairs from ``begin`` on; how
        many cells are done."""
        patched, pairs = self._patched(question), question.pairs
        size = 2 * self._read_bytes(target)
        at_once = max(1, (self.room.left // 2 // pairs + self._most_read) // size)
        columns = [i for i, (of, _) in enumerate(self.columns) if of is target]
        for at in range(0, len(active), at_once):
            some = active[at : at + at_once]
            values = self._read(target, streams[at : at + at_once].flatten(0, 1))
            source = Recording({target.name: values}, {target.name: self.positions})
            rows = [
                Row(pair, i * pairs + pair, 0, patched[pair], unit, place)
                for i, sender in enumerate(some)
                for pair in range(pairs)
                for unit, column in enumerate(columns)
                for place in [("paths", begin + pair, sender, column)]
            ]
            still = [row for row in rows if not row.positions]
            self.write(still, self.runs_of_base[:, [row.place[1] for row in still]])
            yield len(still)
            engine = Engine(self.model, [target], base, source, question.all_reads)
            for batch in self.batches(engine, [row for row in rows if row.positions]):
                yield len(batch)

    def _read(self, target: Target, stream: Float[torch.Tensor, "row place d_model"]) -> torch.Tensor:
        """What a receiver makes of a stream."""
        block = self.model.blocks[target.layer]
        with self.model._lock:
            if target.tail == "hook_mlp_out":
                return block.mlp(block.ln2(stream), Run(len(stream), stream.shape[1], stream.device, None, None))
            if target.tail == "mixer.hook_in_proj":
                return block.mixer.in_proj(block.ln1(stream))
            read = getattr(block.attn, f"{target.node.component}_proj")(block.ln1(stream))
            return read.unflatten(-1, (target.units, -1))

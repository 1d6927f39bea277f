"""Who gives an induction head the token before: the convolution, the SSM state, other heads, or none of them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hook_point import At
from jambascope.hooks.heads import repeated_random_tokens, score_heads
from jambascope.hooks.interventions import KnockOutEdges
from jambascope.hooks.interventions import hooks as hooks_of
from jambascope.hooks.label_ablation import Head
from jambascope.losses import token_losses
from jambascope.model import HookedJamba
from jambascope.studies import previous_token_report as report
from jambascope.studies.mixer_cuts import WAYS, Cut, Way, cut_hooks, earlier_means, widths
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.study import Cell, Found, Study

EDGE, RANDOM_EDGE = "edge to the token before", report.RANDOM_EDGES
BOTH, EVERYTHING = "conv and state", "everything"
BELOW, ABOVE = "all below", "all above"
Hooks = list[tuple[str, Callable]]


class PreviousTokenSpec(Spec):
    """Settings of the study."""

    sequences: int = Field(48, ge=4, description="Repeated random sequences of a seed; the head is found on one half.")
    length: int = Field(40, ge=4, description="Different random tokens, said twice.")
    at: Literal["first", "all"] = Field(
        "first", description="Where layers are cut off from earlier positions: while tokens are said first, or always."
    )
    ablation: Literal["mean", "zero"] = Field("mean", description="What stands in for the part that is cut off.")
    groups: int = Field(16, ge=2, description="Random groups of channels, of which those that matter most are found.")
    k: int = Field(4, ge=1, description="Groups that are found and cut off together; at most half of them.")
    draws: int = Field(20, ge=1, description="Random sets of as many other groups.")
    batch_size: int = Field(24, ge=1, description="Sequences run at a time.")


def check(spec: PreviousTokenSpec, config: JambaConfig, directory: Path) -> None:
    if not config.attention_layers:
        raise ConfigError("it has no attention layers, so it has no induction heads to ask about; leave it out")
    if config.attention_layers == (0,):
        raise ConfigError("its only attention layer is the first layer: nothing comes before its heads; leave it out")
    if 2 * spec.length + 1 > config.n_ctx:
        raise ConfigError(f"length={spec.length} said twice exceeds its context of {config.n_ctx}; make length smaller")
    if 2 * spec.k > spec.groups:
        raise ConfigError(f"k={spec.k} must be at most half of groups={spec.groups}, so that others can be drawn")


@dataclass(frozen=True)
class Setting:
    """One model, its induction head, sequences, and what cut-off layers get instead."""

    spec: PreviousTokenSpec
    model: HookedJamba
    head: Head
    start: int
    """Position of the first token after <bos>."""
    means: dict | None

    @property
    def keys(self) -> range:
        """Positions that the head should look at from the queries that count, and all before them."""
        return range(self.start + 1, self.start + self.spec.length + 1)

    @property
    def cut_at(self) -> range:
        return self.keys if self.spec.at == "first" else range(self.start + 1, self.start + 2 * self.spec.length)

    def cuts(self, layers: Iterable[int], ways: Iterable[Way]) -> Hooks:
        return cut_hooks(self.model, [Cut(i, way) for i in layers for way in ways], self.cut_at, self.means)

    def edges(self, layers: Sequence[int], seed: int | None = None) -> Hooks:
        """Attention without its edge to the token before, or (with a seed) without as many random edges."""
        random = torch.Generator().manual_seed(seed or 0)

        def key(query: int) -> int:
            return query - 1 if seed is None else int(torch.randint(max(1, query - 1), (1,), generator=random))

        edges = tuple((query, key(query)) for query in self.cut_at)
        return hooks_of(self.model, KnockOutEdges(tuple(layers), edges=edges)) if layers else []


def measure(spec: PreviousTokenSpec, cell: Cell, model: HookedJamba) -> Found:
    tokens = repeated_random_tokens(model, spec.sequences, spec.length, seed=cell["seed"])
    half = len(tokens) // 2
    first, second = tokens[:half].to(model.device), tokens[half:].to(model.device)
    scores = score_heads(model, first, "induction", batch_size=spec.batch_size, seed=cell["seed"])["induction"]
    head = next((h["layer"], h["head"]) for h in scores.top(scores.mean.numel()) if h["layer"])
    start = tokens.shape[1] - 2 * spec.length
    at = Setting(spec, model, head, start, None)
    means = None
    if spec.ablation == "mean" and model.config.ssm_layers:
        means = earlier_means(model, first, at.cut_at, model.config.ssm_layers)
    at = Setting(spec, model, head, start, means)
    whole = observed(at, second, [])
    where = {"layer": head[0], "head": head[1]}
    rows = [
        row
        for name, values in zip((report.SCORE, *report.LOSSES), whole, strict=True)
        for row in _sample_rows(name, values, half, mode="nothing taken", **where)
    ]
    control = score_heads(model, second, "induction", batch_size=spec.batch_size, seed=cell["seed"])["induction"]
    shuffled = control.control_samples[:, control.layers.index(head[0]), head[1]]
    rows += _sample_rows(report.SHUFFLED, shuffled, half, mode="nothing taken")
    rows += _sample_rows(report.EVEN, control.uniform_samples, half, mode="nothing taken")
    for mode, way, layers, hooks in knock_outs(at, cell["seed"]):
        changes = (new - old for new, old in zip(observed(at, second, hooks), whole, strict=True))
        side = "above" if layers == ABOVE or layers.isdigit() and int(layers) > head[0] else "below"
        same = {"mode": mode, "way": way, "layers": layers, "side": side}
        single = "" if layers in (BELOW, ABOVE) else report.SINGLE
        for name, change in zip(report.CHANGES, changes, strict=True):
            rows += _sample_rows(single + name, change, half, **same)
    rows += _channel_rows(at, cell["seed"], first, second, whole[0])
    return Found(rows, {"tokens": tokens})


def knock_outs(at: Setting, seed: int) -> Iterator[tuple[str, str, str, Hooks]]:
    """(mode, way, layers, hooks): each layer and way for itself, all of a side together, and all below but one."""
    config = at.model.config
    scans, attends = config.ssm_layers, [i for i in config.attention_layers if i != at.head[0]]
    ways: dict[str, tuple[Way, ...]] = {"conv": ("conv",), "state": ("state",), BOTH: WAYS}
    if config.d_conv == 1:
        ways = {"state": ("state",)}
    below, above = [i for i in scans if i < at.head[0]], [i for i in scans if i > at.head[0]]
    for name, layers in [*((str(i), [i]) for i in scans), (BELOW, below), (ABOVE, above)]:
        for way, own in ways.items() if layers else ():
            yield "taken", way, name, at.cuts(layers, own)
    earlier = [i for i in attends if i < at.head[0]]
    for name, layers in [*((str(i), [i]) for i in attends), (BELOW, earlier)]:
        if layers:
            yield "taken", EDGE, name, at.edges(layers)
            yield "taken", RANDOM_EDGE, name, at.edges(layers, seed + 1)
    yield "taken", EVERYTHING, BELOW, [*at.cuts(below, WAYS), *at.edges(earlier)]
    for layer in below:
        for way in ways:
            if way != BOTH:
                others = [Cut(i, w) for i in below for w in WAYS if (i, w) != (layer, way)]
                rest = cut_hooks(at.model, others, at.cut_at, at.means)
                yield "only this left", way, str(layer), [*rest, *at.edges(earlier)]
    for layer in earlier:
        others = [i for i in earlier if i != layer]
        yield "only this left", EDGE, str(layer), [*at.cuts(below, WAYS), *at.edges(others)]


@torch.no_grad()
def observed(
    at: Setting, tokens: Int[torch.Tensor, "sequences pos"], hooks: Hooks
) -> tuple[Float[torch.Tensor, " sequences"], ...]:
    """Prefix matching of the head, loss on the repetition and loss before it (nats), of each sequence.

    Queries are the tokens said again, all but the first; the losses are of what follows them, and of all but the first
    of the tokens said the first time.
    """
    layer, head = at.head
    queries = range(at.start + at.spec.length + 1, at.start + 2 * at.spec.length)
    found: list[list[torch.Tensor]] = [[], [], []]
    score: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook) -> None:
        key = torch.tensor([q - at.spec.length + 1 for q in queries], device=pattern.device)
        rows = torch.arange(len(queries), device=pattern.device)
        score.append(pattern[:, head, rows, key].mean(1))

    for part in tokens.split(at.spec.batch_size):
        with at.model.hooks([*hooks, (f"blocks.{layer}.attn.hook_pattern", At(list(queries), look))]):
            losses = token_losses(at.model(part), part)
        found[0].append(score.pop())
        found[1].append(losses[:, queries.start : queries.stop - 1].mean(1))
        found[2].append(losses[:, at.start : at.start + at.spec.length - 1].mean(1))
    return tuple(torch.cat(own).cpu().double() for own in found)


# -- channels ------------------------------------------------------------------------------------------------


def _channel_rows(
    at: Setting, seed: int, first: torch.Tensor, second: torch.Tensor, whole: Float[torch.Tensor, " sequences"]
) -> list[dict]:
    """Of the layer and way whose cutting off costs most on the finding half: the groups of channels that cost most
    there, cut off together on the other half, and random other groups."""
    config, spec = at.model.config, at.spec
    below = [i for i in config.ssm_layers if i < at.head[0]]
    ways = [way for way in WAYS if way == "state" or config.d_conv > 1]
    if not below:
        return []
    costs = {(i, way): observed(at, first, at.cuts([i], [way]))[0].mean() for i in below for way in ways}
    layer, way = min(costs, key=costs.__getitem__)
    width, random = widths(at.model, layer)[way], torch.Generator().manual_seed(seed)
    groups = [g for g in torch.randperm(width, generator=random).chunk(spec.groups) if len(g)]
    k = min(spec.k, len(groups) // 2)

    def without(tokens: torch.Tensor, chosen: Sequence[int]) -> Float[torch.Tensor, " sequences"]:
        channels: Bool[torch.Tensor, " channels"] = torch.zeros(width, dtype=torch.bool)
        channels[torch.cat([groups[g] for g in chosen])] = True
        cut = Cut(layer, way, channels)
        return observed(at, tokens, cut_hooks(at.model, [cut], at.cut_at, at.means))[0]

    alone = torch.stack([without(first, [g]).mean() for g in range(len(groups))])
    found, others = alone.argsort()[:k].tolist(), alone.argsort()[k:]
    sets = [others[torch.randperm(len(others), generator=random)[:k]].tolist() for _ in range(spec.draws)]
    changes = torch.stack([without(second, own) - whole for own in sets])
    change = without(second, found) - whole
    same = {"way": way, "layers": str(layer), "mode": f"{k} of {len(groups)} groups of channels"}
    values = {"found": change, "random": changes.mean(0), "found less random": change - changes.mean(0)}
    rows = [
        row
        for which, own in values.items()
        for row in _sample_rows(report.CHANNELS, own, len(first), set=which, **same)
    ]
    return rows + [
        {"measure": report.CHANNEL_SET, "set": "random", "draw": i, "sample": 0, "value": float(value), **same}
        for i, value in enumerate(changes.mean(1))
    ]


def _sample_rows(name: str, values: Float[torch.Tensor, " n"], first_sample: int, **labels: object) -> list[dict]:
    same = {"measure": name, **labels}
    return [{**same, "sample": first_sample + i, "value": value} for i, value in enumerate(values.tolist())]


study = Study(
    name="previous_token",
    version=1,
    spec=PreviousTokenSpec,
    question=__doc__,
    method="An induction head finds the token that followed the current one before; so what stands at that place must "
    "know the token before it. Random tokens, none of which comes twice, are said twice; the head of highest prefix "
    "matching (attention from tokens said again to what followed them the first time, Olsson et al. 2022) is found on "
    "one half of the sequences, everything else is measured on the other. There layers are cut off from earlier "
    "positions, while tokens are said the first time: a Mamba layer's convolution (its earlier taps), its state (the "
    "read-out of what was carried over; states themselves stay), or both, each replaced by its mean over the finding "
    "half; in attention the edge from each token to the one before it (its score becomes -inf). Cut off alone, all "
    "together, and all below the head but one, which shows what that one can do.\n\nThe change of prefix matching "
    "says whether the head still finds its place; the losses what the model still repeats.",
    controls="Layers above the head: nothing there can change where it looks. Random edges: as many to other earlier "
    "tokens. Random channels: the groups of channels of the costliest layer that cost most on the finding half, "
    "against as many random other groups. Tokens in random order and even attention: what the head scores without "
    "induction. The loss before the repetition: damage that is not about repetition. Single layers: random signs, "
    "with Holm's correction over all of a model and seed.",
    measure=measure,
    headline=(report.SCORE, report.SHUFFLED, report.EVEN, *report.LOSSES, *report.CHANGES, report.CHANNELS),
    by=report.BY,
    figures=report.figures,
    reading=report.reading,
    tables=report.tables,
    check=check,
)

"""Pairs of prompts that differ in what must be remembered, and the memory of one put into the other.

The two are alike after one position, the border. Everything that a model knows there of what came before is its SSM
states with the last inputs of the convolutions, and the keys and values of its attention layers; both together, put
in, must make one run the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from jambascope.hooks import run
from jambascope.hooks.heads import repeated_random_tokens
from jambascope.hooks.interventions import Intervention, Patch, PinState
from jambascope.hooks.sweep import Node, logit_difference, patch_sweep
from jambascope.hooks.sweep.nodes import interventions, targets
from jambascope.model import HookedJamba
from jambascope.studies.ablations import random_channels
from jambascope.studies.state_probes import with_labels
from jambascope.zoo.language import ids_of
from jambascope.zoo.reviews import Episode, review
from jambascope.zoo.words import BLAME, PRAISE, VOCABULARY

LEAST_DIFFERENCE = 0.5
"""Logits by which two runs must differ for a share of the difference to be told."""
PERSISTENT, TRANSIENT, KEYS = "states", "states, one read-out", "keys and values"
BOTH, OTHER, NONE = "states, keys and values", "states of another pair", "its own states"
QUERY_READ = "states, read-out of the query"
BEST, CHANNELS = "states of the best layer", "states of as many random channels"


def windowed(read_outs: int) -> str:
    return f"states, {read_outs} read-outs"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Prompt pairs of one length, alike after the border."""

    clean: Int[torch.Tensor, "pair pos"]
    corrupted: Int[torch.Tensor, "pair pos"]
    border: int
    """The last position in which they may differ."""
    correct: tuple[int, ...]
    """What follows the clean prompt."""
    wrong: tuple[int, ...]
    """What follows the corrupted one."""
    others: Int[torch.Tensor, "pair pos"]
    """Prompts of other pairs, which hold other labels or tokens, or the class that the corrupted one asks for."""

    def part(self, rows: slice) -> Pairs:
        clean, corrupted, others = (side[rows] for side in (self.clean, self.corrupted, self.others))
        return Pairs(clean, corrupted, self.border, self.correct[rows], self.wrong[rows], others)


def label_pairs(count: int, shots: int, seed: int) -> Pairs:
    """Few-shot reviews; in the corrupted ones the two label words have changed places. The border is the last
    example's label."""

    def swapped(episode: Episode) -> tuple[Episode, int]:
        return with_labels(episode, episode.labels[::-1]), episode.label_positions[-2]

    return _review_pairs(count, shots, seed, swapped)


def query_pairs(count: int, shots: int, seed: int) -> Pairs:
    """Few-shot reviews; in the corrupted ones the review that is asked about is of the other class. The border is its
    verdict."""

    def turned(episode: Episode) -> tuple[Episode, int]:
        words, start = list(episode.words), episode.label_positions[-2]
        place = next(i for i in range(start + 1, len(words)) if words[i] in PRAISE or words[i] in BLAME)
        own, other = (PRAISE, BLAME)[:: 1 if words[place] in PRAISE else -1]
        words[place] = other[own.index(words[place])]
        classes = (*episode.classes[:-1], 1 - episode.classes[-1])
        return dataclasses.replace(episode, words=tuple(words), classes=classes), place

    return _review_pairs(count, shots, seed, turned)


def _review_pairs(count: int, shots: int, seed: int, change: Callable[[Episode], tuple[Episode, int]]) -> Pairs:
    """Pairs of one layout: as the first one that is drawn, whose sentences are as long as most are."""
    rng = np.random.default_rng([seed, shots, 7])
    found: dict[tuple[int, int], list[tuple[Episode, Episode]]] = {}
    while max(map(len, found.values()), default=0) < count:
        episode = review(rng, "held_out", shots + 1, 2, "arbitrary", 0)
        if len(set(episode.classes[:-1])) == 2:
            other, border = change(episode)
            found.setdefault((len(episode.words), border), []).append((episode, other))
    (_, border), pairs = max(found.items(), key=lambda item: len(item[1]))
    following = zip(pairs, pairs[1:] + pairs[:1], strict=True)
    others = [next((e for e in of if e.classes[-1] == own[1].classes[-1]), of[0]) for own, of in following]
    sides = (*zip(*pairs, strict=True), others)
    clean, corrupted, others = (torch.as_tensor(ids_of(list(side)))[:, :-1] for side in sides)
    ids = [[VOCABULARY[e.labels[e.classes[-1]]] for e in pair] for pair in pairs]
    # Word i stands at position i + 1, behind <bos>; the last word is the label to be told.
    return Pairs(clean, corrupted, border + 1, *map(tuple, zip(*ids, strict=True)), others)


def repetition_pairs(model: HookedJamba, count: int, length: int, seed: int) -> Pairs:
    """Random tokens, and the first of them again up to some place; in the corrupted ones another token followed it.

    The border is the end of the first saying."""
    tokens = repeated_random_tokens(model, count, length + 1, seed=seed)
    start = tokens.shape[1] - 2 * (length + 1)
    said, spare = tokens[:, start : start + length], tokens[:, start + length]
    place = length // 2
    other = said.clone()
    other[:, place] = spare
    again = said[:, :place]
    clean, corrupted = (torch.cat((tokens[:, :start], first, again), 1) for first in (said, other))
    return Pairs(
        clean, corrupted, start + length - 1, tuple(said[:, place].tolist()), tuple(spare.tolist()), clean.roll(1, 0)
    )


# -- all layers together ---------------------------------------------------------------------------------------


@torch.no_grad()
def patched_together(
    model: HookedJamba, pairs: Pairs, windows: Sequence[int], batch: int
) -> tuple[dict[str, Float[torch.Tensor, " pair"]], Float[torch.Tensor, " pair"], Float[torch.Tensor, " pair"]]:
    """Logit differences of the corrupted runs with the clean memory of all layers put in, by what is put in; and those
    of the clean and of the corrupted runs."""
    found: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(pairs.clean), batch):
        found.append(_patched(model, pairs.part(slice(start, start + batch)), windows))
    every = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return every, every.pop("clean"), every.pop("corrupted")


def _patched(model: HookedJamba, pairs: Pairs, windows: Sequence[int]) -> dict[str, torch.Tensor]:
    layers, query = model.config.ssm_layers, pairs.clean.shape[1] - 1
    names = [f"blocks.{layer}.mixer.{point}" for layer in layers for point in ("hook_ssm_state", "hook_conv_state")]
    names += [f"blocks.{layer}.mixer.{point}" for layer in layers for point in ("hook_ssm_read", "hook_conv")]
    names += [
        f"blocks.{layer}.attn.{point}" for layer in model.config.attention_layers for point in ("hook_k", "hook_v")
    ]
    tokens = [side.to(model.device) for side in (pairs.clean, pairs.corrupted, pairs.others)]
    clean, base, others = (run(model, side, capture=names) for side in tokens)

    def put(node: Node, source=clean.cache, at: int = pairs.border) -> list[Intervention]:
        of_layers = [interventions(model, target, (at,), 0, source, base.cache) for target in targets(model, node)]
        return [edit for edits in of_layers for edit in edits]

    states = put(Node("ssm_state", conv=True))
    before = tuple(range(pairs.border + 1))
    keys = [
        Patch.from_cache(model, clean.cache, f"attn.hook_{part}", layer, positions=before)
        for layer in model.config.attention_layers
        for part in "kv"
    ]
    edits = {PERSISTENT: states} | {windowed(w): put(Node("ssm_state", conv=True, window=w)) for w in windows}
    edits |= {TRANSIENT: put(Node("ssm_read")), QUERY_READ: put(Node("ssm_read"), at=query)}
    edits |= {KEYS: keys, BOTH: states + keys} if keys else {}
    edits |= {name: put(Node("ssm_state", conv=True), of.cache) for name, of in ((NONE, base), (OTHER, others))}
    logits = {name: run(model, tokens[1], edit).logits for name, edit in edits.items()}
    logits |= {"clean": clean.logits, "corrupted": base.logits}
    return {name: _difference(value, pairs) for name, value in logits.items()}


def together_rows(model: HookedJamba, pairs: Pairs, windows: Sequence[int], batch: int) -> list[dict]:
    """Of every pair the whole difference, how much of it each patch makes in logits, and as a share of it."""
    patched, clean, corrupted = patched_together(model, pairs, windows, batch)
    whole = clean - corrupted
    rows = [{"measure": "clean less corrupted, logits", "sample": i, "value": v} for i, v in enumerate(whole.tolist())]
    for name, values in patched.items():
        change = values - corrupted
        for i, (moved, of) in enumerate(zip(change.tolist(), whole.tolist(), strict=True)):
            rows.append({"measure": "change, logits", "what": name, "sample": i, "value": moved})
            if abs(of) >= LEAST_DIFFERENCE:
                rows.append({"measure": "share", "what": name, "sample": i, "value": moved / of})
    return rows


# -- layer by layer --------------------------------------------------------------------------------------------


def layer_rows(
    model: HookedJamba, pairs: Pairs, windows: Sequence[int], draws: int = 0, batch: int = 8, seed: int = 0
) -> list[dict]:
    """The share of the difference that one layer's memory makes, put in at the border or, for one read-out, at the
    query.

    Args:
        draws: random sets of channels that the layer that carries most is compared to; none without.
    """
    query = pairs.clean.shape[1] - 1
    nodes = {Node("ssm_state", conv=True): PERSISTENT, Node("ssm_read"): TRANSIENT}
    nodes |= {Node("ssm_state", conv=True, window=w): windowed(w) for w in windows}
    metric = logit_difference(list(pairs.correct), list(pairs.wrong))
    found = patch_sweep(
        model, pairs.clean, pairs.corrupted, metric, list(nodes), positions=[pairs.border, query], progress=False
    )
    names = {node.name: patch for node, patch in nodes.items()}
    table = found.table(least_difference=LEAST_DIFFERENCE)
    rows = []
    if draws and len(model.config.ssm_layers) > 1:
        own = table[(table.node == next(iter(nodes)).name) & (table.position == pairs.border)]
        changes = own.assign(change=own.value - own.corrupted).pivot(index="pair", columns="layer", values="change")
        whole = own.drop_duplicates("pair").set_index("pair").sort_index()
        rows += _best_layer_rows(model, pairs, changes, (whole.clean - whole.corrupted).to_numpy(), draws, batch, seed)
    for row in table.dropna(subset="effect").itertuples():
        patch = names[row.node] if row.position == pairs.border else QUERY_READ
        if row.position == pairs.border or names[row.node] == TRANSIENT:
            where = {"what": patch, "layer": int(row.layer), "sample": int(row.pair)}
            rows.append({"measure": "layer: share", **where, "value": float(row.effect)})
    return rows


def _best_layer_rows(
    model: HookedJamba,
    pairs: Pairs,
    changes: pd.DataFrame,
    whole: Float[np.ndarray, " pair"],
    draws: int,
    batch: int,
    seed: int,
) -> list[dict]:
    """The layer whose states carry most on the first half of the pairs, measured on the second; and there as many
    channels drawn at random from all Mamba layers, draws averaged.

    Args:
        changes: of the logit difference by each layer's states, a line for each pair.
        whole: what there is to be carried.
    """
    half = len(whole) // 2
    best = int((changes.iloc[:half].mul(whole[:half], axis=0)).mean().idxmax())
    random = random_channel_changes(model, pairs.part(slice(half, None)), draws, batch, seed).mean(0)
    found = {BEST: (changes[best].to_numpy()[half:], {"layer": best}), CHANNELS: (random.numpy(), {})}
    rows = []
    for what, (moved, where) in found.items():
        for i, (change, of) in enumerate(zip(moved.tolist(), whole[half:].tolist(), strict=True)):
            same = {"what": what, **where, "sample": half + i}
            rows.append({"measure": "change, logits", **same, "value": change})
            if abs(of) >= LEAST_DIFFERENCE:
                rows.append({"measure": "share", **same, "value": change / of})
    return rows


@torch.no_grad()
def random_channel_changes(
    model: HookedJamba, pairs: Pairs, draws: int, batch: int, seed: int
) -> Float[torch.Tensor, "draw pair"]:
    """Changes of the corrupted runs' logit difference by the clean memory of as many channels as one layer has, of any
    Mamba layers."""
    config = model.config
    sets = random_channels(config, config.d_inner, draws, seed)
    points = ("hook_ssm_state", "hook_conv_state") if config.d_conv > 1 else ("hook_ssm_state",)
    names = [f"blocks.{layer}.mixer.{point}" for layer in config.ssm_layers for point in points]
    found = []
    for start in range(0, len(pairs.clean), batch):
        part = pairs.part(slice(start, start + batch))
        cache = run(model, part.clean.to(model.device), capture=names).cache
        tokens, where = part.corrupted.to(model.device), {"positions": (pairs.border,), "with_conv": len(points) > 1}
        base = _difference(run(model, tokens).logits, part)
        edits = [
            [PinState.from_cache(model, cache, layer, channels=own, **where) for layer, own in one] for one in sets
        ]
        found.append(torch.stack([_difference(run(model, tokens, edit).logits, part) - base for edit in edits]))
    return torch.cat(found, 1)


def _difference(logits: Float[torch.Tensor, "pair pos vocab"], pairs: Pairs) -> Float[torch.Tensor, " pair"]:
    rows = torch.arange(len(logits))
    at_end = logits[:, -1]
    return (at_end[rows, list(pairs.correct)] - at_end[rows, list(pairs.wrong)]).double().cpu()

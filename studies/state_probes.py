"""Probes of states: prompts with something known about them, and how often it is read off the state of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int

from jambascope.hooks.probes import collect, probe
from jambascope.hooks.ssm import capture_states, half_life
from jambascope.model import HookedJamba, initialize
from jambascope.zoo.documents import pick
from jambascope.zoo.language import ids_of
from jambascope.zoo.reviews import Episode, review
from jambascope.zoo.words import FAMILIAR_LABELS, PAD

SETS = 4
"""Pairs of label words among which episodes are drawn."""
WORDS = 8
"""Different words of the random sequences."""
BEFORE = 17
"""Of them at least, up to the farthest that is asked for, so that it is not the beginning that is remembered."""
STATE, STREAM, UNTRAINED = "state", "stream", "state, untrained"
HITS, CONTROL, SELECTIVITY = "accuracy", "accuracy, shuffled labels", "selectivity"
KINDS = {HITS: "hit", CONTROL: "hit", SELECTIVITY: "change of hits"}
BY_LAYER = "by layer: "


@dataclasses.dataclass(frozen=True)
class Probed:
    """Prompts, where to look, and what is known about each."""

    tokens: Int[torch.Tensor, "prompts pos"]
    positions: Int[torch.Tensor, "prompts 1"]
    targets: dict[str, Int[torch.Tensor, " prompts"]]


def episodes(count: int, shots: int, seed: int) -> list[tuple[Episode, int]]:
    """Few-shot episodes whose two label words are one of ``SETS`` pairs, either way round, and which pair it is.

    Both classes stand among the examples; the last review is the one to label.
    """
    rng = np.random.default_rng([seed, shots, count])
    words = [FAMILIAR_LABELS[i] for i in rng.choice(len(FAMILIAR_LABELS), 2 * SETS, replace=False)]
    found: list[tuple[Episode, int]] = []
    while len(found) < count:
        episode = review(rng, "held_out", shots + 1, 2, "arbitrary", 0)
        if len(set(episode.classes[:-1])) == 2:
            which = int(rng.integers(SETS))
            labels = tuple(words[2 * which : 2 * which + 2][:: pick(rng, (1, -1))])
            found.append((with_labels(episode, labels), which))
    return found


def with_labels(episode: Episode, labels: tuple[str, str]) -> Episode:
    """The same reviews with other label words."""
    said = dict(zip(episode.label_positions, (labels[c] for c in episode.classes), strict=True))
    words = tuple(said.get(i, word) for i, word in enumerate(episode.words))
    return dataclasses.replace(episode, words=words, labels=labels)


def few_shot(count: int, shots: int, seed: int) -> Probed:
    """At the final ":": which label words the episode uses, the class of the last example, the class that is asked."""
    drawn = episodes(count, shots, seed)
    tokens = torch.as_tensor(ids_of([episode for episode, _ in drawn]))
    # Word i stands at position i + 1, behind <bos>: the position that predicts a label is its index.
    at = torch.tensor([[episode.label_positions[-1]] for episode, _ in drawn])
    tokens = tokens.masked_fill(torch.arange(tokens.shape[1]) > at, PAD)
    targets = {
        "label words": torch.tensor([which for _, which in drawn]),
        "class of the last example": torch.tensor([episode.classes[-2] for episode, _ in drawn]),
        "class that is asked": torch.tensor([episode.classes[-1] for episode, _ in drawn]),
    }
    return Probed(tokens, at, targets)


def random_words(model: HookedJamba, count: int, distances: Sequence[int], seed: int) -> Probed:
    """Sequences drawn from ``WORDS`` different tokens; at the end, the token so many positions before."""
    config, tokenizer = model.config, model.tokenizer
    generator = torch.Generator().manual_seed(seed)
    special = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    special |= set() if tokenizer is None else set(tokenizer.all_special_ids)
    known = config.d_vocab if tokenizer is None else min(config.d_vocab, len(tokenizer))
    usable = torch.tensor([i for i in range(known) if i not in special])
    words = usable[torch.randperm(len(usable), generator=generator)[:WORDS]]
    drawn = torch.randint(len(words), (count, max(distances) + BEFORE), generator=generator)
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    tokens = torch.cat((torch.tensor(bos, dtype=torch.long).expand(count, -1), words[drawn]), 1)
    targets = {target_of(n): drawn[:, -1 - n] for n in distances}
    return Probed(tokens, torch.full((count, 1), tokens.shape[1] - 1), targets)


def target_of(distance: int) -> str:
    return f"word {distance} before"


def probe_rows(model: HookedJamba, probed: Probed, untrained: bool, batch: int, seed: int) -> list[dict]:
    """Of every target, Mamba layer and kind of features whether each prompt was told right by a probe fitted on others;
    and on the second half of the prompts that of the layer that was best on the first."""
    layers, rows = model.config.ssm_layers, []
    for features, values in _features(model, probed, untrained, batch, seed):
        for target, labels in probed.targets.items():
            found = probe(values, labels, method="ridge", l2=10.0, bootstrap=0, seed=seed)
            hits, control = 1 - found.lost, 1 - found.control_lost
            of_layers = {HITS: hits, CONTROL: control, SELECTIVITY: hits - control}
            told = {"target": target, "features": features, "what": f"{features}: {target}"}
            half = len(hits) // 2
            best = int(hits[:half].mean(0).argmax())
            for name, samples in of_layers.items():
                same = told | {"kind": KINDS[name]}
                for unit, layer in enumerate(layers):
                    rows += [
                        {"measure": BY_LAYER + name, **same, "layer": layer, "sample": i, "value": v}
                        for i, v in enumerate(samples[:, unit].tolist())
                    ]
                rows += [
                    {"measure": name, **same, "layer": layers[best], "sample": half + i, "value": v}
                    for i, v in enumerate(samples[half:, best].tolist())
                ]
            rows.append({"measure": "chance", **told, "sample": 0, "value": found.chance})
    return rows


def _features(
    model: HookedJamba, probed: Probed, untrained: bool, batch: int, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Kind of features -> [prompts layers features]: the state of each Mamba layer, what its block reads, and the state
    of a model of the same shape with random weights."""
    layers = model.config.ssm_layers
    where = dict(positions=probed.positions, batch=batch, attention_mask=_mask(probed))

    def read(of: HookedJamba, point: str) -> torch.Tensor:
        names = [f"blocks.{layer}.{point}" for layer in layers]
        found = collect(of, probed.tokens.to(of.device), names, **where)
        return torch.stack([found[name].flatten(1) for name in names], 1)

    yield STATE, read(model, "mixer.hook_ssm_state")
    yield STREAM, read(model, "hook_resid_pre")
    if untrained:
        yield UNTRAINED, read(untrained_like(model, seed), "mixer.hook_ssm_state")


def _mask(probed: Probed) -> Int[torch.Tensor, "prompts pos"]:
    """1 up to the position that is looked at."""
    return (torch.arange(probed.tokens.shape[1]) <= probed.positions).long()


def untrained_like(model: HookedJamba, seed: int) -> HookedJamba:
    """A model of the same shape with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = HookedJamba(model.config)
        initialize(other)
    return other.to(model.device).eval()


def half_life_rows(model: HookedJamba, tokens: Int[torch.Tensor, "prompts pos"]) -> list[dict]:
    """Of every prompt and Mamba layer, the half-life of the state's entries, tokens: the median and the longest
    tenth's shortest."""
    rows = []
    for layer in model.config.ssm_layers:
        for i, prompt in enumerate(tokens):
            kept = capture_states(model, prompt[None].to(model.device), layer, positions=[0])
            entries = half_life(kept.A, kept.dt).flatten()
            for name, share in (("median half-life, tokens", 0.5), ("half-life of the longest tenth, tokens", 0.9)):
                value = entries.quantile(share).item()
                rows.append({"measure": name, "layer": layer, "sample": i, "value": value})
    return rows

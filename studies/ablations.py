"""Parts of mixers set to their means: layers, heads, Mamba channels; and as many random ones, for comparison.

What is set is what the output projection reads: ``attn.hook_z`` of heads, ``mixer.hook_z`` of Mamba channels, at every
position to its mean over all positions of reference documents. All heads, or all channels, are the whole layer, whose
output is then its mean.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int

from jambascope.config import JambaConfig
from jambascope.errors import InputError
from jambascope.hooks.interventions import Intervention, MeanAblation
from jambascope.model import HookedJamba

Part = tuple[int, tuple[int, ...] | None]
"""A layer, and its heads (attention) or channels (Mamba); None is all of them."""
Means = dict[int, Float[torch.Tensor, "..."]]
"""Layer -> [H P] of attention, [E] of Mamba."""


@torch.no_grad()
def mean_outputs(
    model: HookedJamba,
    batches: Iterable[tuple[Int[torch.Tensor, "batch pos"], Bool[torch.Tensor, "batch pos"]]],
) -> Means:
    """Mean over all positions of what the output projection of each mixer reads.

    Args:
        batches: ids, padded on the right, and which of them are none of the padding.
    """
    sums, count = {}, 0
    for ids, is_token in batches:
        mask = is_token.to(model.device)

        def add(z: torch.Tensor, hook, mask: torch.Tensor = mask) -> None:
            sums[hook.layer()] = sums.get(hook.layer(), 0) + z[mask].double().sum(0)

        with model.hooks([(_point(model.config, layer), add) for layer in range(model.config.n_layers)]):
            model(ids.to(model.device), return_type=None)
        count += int(mask.sum())
    return {layer: (summed / count).to(model.dtype) for layer, summed in sums.items()}


def without(model: HookedJamba, means: Means, parts: Sequence[Part]) -> list[Intervention]:
    """What sets parts to their means."""
    return [_set(model.config, means, layer, chosen) for layer, chosen in parts]


def _set(config: JambaConfig, means: Means, layer: int, chosen: tuple[int, ...] | None) -> MeanAblation:
    attention = config.mixers[layer] == "attention"
    value = means[layer] if chosen is None else means[layer][list(chosen)]
    component = "attn.hook_z" if attention else "mixer.hook_z"
    selection = {} if chosen is None else {"heads" if attention else "channels": chosen}
    return MeanAblation(component, layer, value=value[None, None], **selection)


def _point(config: JambaConfig, layer: int) -> str:
    return f"blocks.{layer}.{'attn' if config.mixers[layer] == 'attention' else 'mixer'}.hook_z"


def layers_as_parts(layers: Sequence[int]) -> tuple[Part, ...]:
    return tuple((layer, None) for layer in layers)


def heads_as_parts(heads: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
    """(layer, head) pairs, those of a layer together."""
    layers = sorted({layer for layer, _ in heads})
    return tuple((at, tuple(sorted(head for layer, head in heads if layer == at))) for at in layers)


def random_layers(config: JambaConfig, layers: Sequence[int], draws: int, seed: int) -> tuple[tuple[Part, ...], ...]:
    """Up to ``draws`` different sets of as many mixers: of other layers where there are enough, else of all, but not
    the same set.

    Raises:
        InputError: no other set, or no layers.
    """
    every = range(config.n_layers)
    others = [layer for layer in every if layer not in layers]
    pool = others if len(others) >= len(layers) else list(every)
    sets = _draw(pool, len(layers), draws, seed, not_this=tuple(sorted(layers)))
    return tuple(layers_as_parts(drawn) for drawn in sets)


def random_channels(config: JambaConfig, count: int, draws: int, seed: int) -> tuple[tuple[Part, ...], ...]:
    """Sets of ``count`` channels, drawn over all Mamba layers together."""
    pool = [(layer, channel) for layer in config.ssm_layers for channel in range(config.d_inner)]
    return tuple(heads_as_parts(drawn) for drawn in _draw(pool, min(count, len(pool)), draws, seed))


def random_heads(
    config: JambaConfig, count: int, draws: int, seed: int, not_these: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, int], ...]]:
    """Sets of ``count`` heads of any attention layer, other sets than ``not_these``."""
    pool = [(layer, head) for layer in config.attention_layers for head in range(config.n_heads)]
    return _draw(pool, count, draws, seed, tuple(sorted(not_these)))


def _draw(pool: Sequence, count: int, draws: int, seed: int, not_this: tuple = ()) -> list[tuple]:
    there_are = math.comb(len(pool), count) - (len(not_this) == count and set(not_this) <= set(pool))
    if count < 1 or there_are < 1:
        raise InputError(f"no other set of {count} can be drawn from {len(pool)}; ask for fewer")
    generator, sets = random.Random(seed), {}
    while len(sets) < min(draws, there_are):
        drawn = tuple(sorted(generator.sample(list(pool), count)))
        if drawn != not_this:
            sets[drawn] = None
    return list(sets)

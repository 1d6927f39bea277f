"""Activation patching of the stream before every layer at every position, against TransformerLens's loop.

One pair of prompts that differ in every token, so that no cell is spared; the metric is a logit difference at the last
position. T position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from transformer_lens import patching as their_patching

from jambascope.hooks import patching
from jambascope.hooks.sweep import logit_difference, patch_sweep
from jambascope.model import HookedJamba
from jambascope.studies.bench.models import LAYERS, VOCABULARY, Lab
from jambascope.studies.bench.products import (
    PRODUCTS,
    Product,
    call_products,
    feed_forward_products,
    mixer_products,
    routes,
)
from jambascope.studies.bench.race import OURS, Race, Setting
from jambascope.studies.bench.timing import Side

LENGTHS = (64, 256)
MOST_CELLS = 512
"""Longer prompts are patched at so many positions, evenly spaced, that there are not more."""
SAMPLE = 8
"""Cells of a loop that are timed: each is one whole pass, so they cost the same."""
PIECE = 2048
"""Most rows of a product, whose factors then stay in a cache."""
OUR_LOOP, THEIR_LOOP = f"hooks.patching ({SAMPLE} cells)", f"TransformerLens ({SAMPLE} cells)"
CORRECT, WRONG = 5, 6


def depth(length: int) -> int:
    """Layers of the model that is patched at this length."""
    return LAYERS if length <= LENGTHS[0] else 4 * LAYERS


def positions(length: int) -> range:
    """The positions that are patched in each layer."""
    return range(0, length, -(-depth(length) * length // MOST_CELLS))


def where(length: int) -> str:
    """What is patched: layers x positions."""
    step = positions(length).step
    return f"{depth(length)} layers x {length} positions" + (f", every {step}th" if step > 1 else "")


def sample(length: int) -> pd.DataFrame:
    """The cells of the loops, by layer and position."""
    at, layers = positions(length), depth(length)
    cells = [(i * layers // SAMPLE, at[i * len(at) // SAMPLE]) for i in range(SAMPLE)]
    return pd.DataFrame(cells, columns=["layer", "pos"])


def sweep_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """Every cell by us, a sample of them by the loops."""
    layers, cells = depth(at.length), positions(at.length)
    clean = lab.tokens(1, at.length)
    corrupted = 3 + (clean - 3 + VOCABULARY // 2) % (VOCABULARY - 3)
    ours, bridge = lab.ours(at.d_model, layers), lab.bridge(at.d_model, layers)
    metric = logit_difference(CORRECT, WRONG)
    swept = partial(patch_sweep, ours, clean, corrupted, metric, positions=cells, progress=False)
    n = layers * len(cells)
    return {
        OURS: Side(swept, units=n),
        OUR_LOOP: Side(_loop(patching.get_act_patch_resid_pre, ours, clean, corrupted), units=SAMPLE),
        THEIR_LOOP: Side(_loop(their_patching.get_act_patch_resid_pre, bridge, clean, corrupted), units=SAMPLE),
        PRODUCTS: Side(call_sweep_products(ours, corrupted, cells), units=n),
    }


@torch.no_grad()
def _loop(sweep: Callable, model, clean: torch.Tensor, corrupted: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of TransformerLens's function, or of ours under its name: [cell]."""
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))
    index = sample(clean.shape[1])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, CORRECT] - logits[0, -1, WRONG]

    return torch.no_grad()(lambda: sweep(model, corrupted, cache, metric, index_axis_names=None, index_df=index))


def call_sweep_products(model: HookedJamba, tokens: torch.Tensor, cells: Sequence[int]) -> Callable[[], None]:
    """One call that computes the products of a sweep and nothing else; ``tokens`` [1 T] tell the experts' shares."""
    products = call_products(sweep_products(model, tokens, cells))
    heads, width, length = model.config.n_heads, model.config.d_head, tokens.shape[1]
    shape = (model.config.n_layers, heads, length, width)
    keys = torch.randn(shape, dtype=model.dtype, device=model.device)

    def call() -> None:
        products()
        for layer in model.config.attention_layers:
            k = keys[: layer + 1]
            for p in cells:
                (k[:, :, p:] @ k.transpose(-2, -1)) @ k

    return call


def sweep_products(model: HookedJamba, tokens: torch.Tensor, cells: Sequence[int]) -> list[Product]:
    """The products with weights of patching the stream before every layer, at each position of ``cells``.

    A cell at (l, p) needs T - p rows in every layer from l on; in the last, one row of all that follows the mixing of
    positions. Each is cut into ``PIECE`` rows; experts get as many as the routes of a pass over ``tokens`` say.
    """
    length, layers = tokens.shape[1], model.config.n_layers
    chosen, products = routes(model, tokens), []
    for layer, block in enumerate(model.blocks):
        rows = (layer + 1) * sum(length - p for p in cells)
        after = (layer + 1) * len(cells) if layer == layers - 1 else rows
        products += mixer_products(block, rows, after)
        if block.has_feed_forward:
            counts = [round(count * after / length) for count in chosen.get(layer, ())]
            products += feed_forward_products(block, after, counts)
    products.append((layers * len(cells), model.unembed.weight))
    return [(min(PIECE, rows - i), weight) for rows, weight in products for i in range(0, rows, PIECE)]


SWEEP = Race(
    "sweep", "Patching the stream before every layer: " + "; ".join(map(where, LENGTHS)), sweep_sides,
    bounds=(PRODUCTS,), lengths=LENGTHS, d_models=(128,), one_row=True, quantity="ms per cell", patience=30,
    opt_in=True,
)  # fmt: skip

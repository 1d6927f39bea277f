"""Where one position looks in every layer: rows of attention patterns, and of the hidden attention of Mamba layers.

Axes: H head, K key position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hook_point import At
from jambascope.hooks.hidden_attention import FORMS, Form, attention_map
from jambascope.hooks.mixer_terms import MixerTerms, watch_terms

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@torch.no_grad()
def looks(
    model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"], query: int = -1, form: Form = "alpha"
) -> dict[int, Float[torch.Tensor, "heads keys"]]:
    """Layer -> what ``query`` pays each position up to itself, on the CPU; every row sums to 1. One forward pass.

    A Mamba layer has one row: magnitudes of the form, averaged over channels (:func:`attention_map`).

    Raises:
        InputError: an unknown form, a position that the prompt does not have, or more than one prompt.
    """
    tokens = torch.as_tensor(tokens)
    length = tokens.shape[-1]
    if tokens.numel() != length or not -length <= query < length:
        raise InputError(f"query={query!r} must be a position of one prompt, {-length}..{length - 1}")
    if form not in FORMS:
        raise InputError(f"form={form!r} must be one of {', '.join(FORMS)}")
    query %= length
    found: dict[int, torch.Tensor] = {}

    def mixed(layer: int, terms: MixerTerms) -> None:
        found[layer] = attention_map(terms, [query], form)[0].float().cpu()

    def attended(pattern: torch.Tensor, hook) -> None:
        found[int(hook.name.split(".")[1])] = pattern[0, :, 0].float().cpu()

    look = At([query], attended)
    patterns = [(f"blocks.{layer}.attn.hook_pattern", look) for layer in model.config.attention_layers]
    with watch_terms(model, model.config.ssm_layers, None, None, mixed, patterns):
        model(tokens.reshape(1, -1)[:, : query + 1].to(model.device), return_type=None)
    return dict(sorted(found.items()))


def looks_by_layer(
    model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"], query: int = -1, form: Form = "alpha"
) -> dict[int, Float[torch.Tensor, " pos"]]:
    """:func:`looks`, averaged over heads, over the whole prompt: layer -> weights that sum to 1."""
    length = torch.as_tensor(tokens).shape[-1]
    found = looks(model, tokens, query, form)
    return {layer: F.pad(rows.mean(0), (0, length - rows.shape[-1])) for layer, rows in found.items()}

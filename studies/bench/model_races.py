"""Whole models against transformers' JambaForCausalLM and TransformerLens's bridge, on the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from jambascope.model import HookedJamba
from jambascope.studies.bench.hook_removal import without_hook_points
from jambascope.studies.bench.models import LAYERS, Lab
from jambascope.studies.bench.products import PRODUCTS, call_products, forward_products
from jambascope.studies.bench.race import OURS, Race, Setting
from jambascope.studies.bench.timing import Side

NEW_TOKENS = 64
BARE, ONE_HOOK = "hook points removed", "one residual hook"
NO_HOOKS = "no hooks"
BRIDGE, TRANSFORMERS = "TransformerLens bridge", "transformers"


def _forward_bytes(at: Setting) -> int:
    """A pass of ours: a dozen activations of 2 d_model, and the logits."""
    return 4 * at.batch * at.length * (12 * 2 * at.d_model + 2 * 1024)


def _their_bytes(at: Setting) -> int:
    """A pass of theirs: their scan holds four trajectories of [B 2 d_model T 16]."""
    return _forward_bytes(at) + 4 * 4 * at.batch * at.length * 2 * at.d_model * 16


def _pattern_bytes(at: Setting) -> int:
    """One attention pattern [B H T T]."""
    return 4 * at.batch * max(2, at.d_model // 32) * at.length**2


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> object:
    return model(tokens) if isinstance(model, HookedJamba) else model(tokens, use_cache=False)


@torch.no_grad()
def _cache(model: Any, tokens: torch.Tensor) -> object:
    return model.run_with_cache(tokens)


def prefill_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """Logits of every position, no cache."""
    tokens = lab.tokens(at.batch, at.length)
    ours, theirs = lab.ours(at.d_model), lab.theirs(at.d_model)
    return {
        OURS: Side(partial(_logits, ours, tokens), _forward_bytes(at)),
        TRANSFORMERS: Side(partial(_logits, theirs, tokens), _their_bytes(at)),
        PRODUCTS: Side(call_products(*forward_products(ours, tokens)), _forward_bytes(at)),
    }


def cache_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """run_with_cache with its default filter; transformers' plain forward beside it keeps nothing."""
    tokens = lab.tokens(at.batch, at.length)
    kept = LAYERS * 12 * at.batch * at.length * 2 * at.d_model * 4 + 3 * _pattern_bytes(at)
    return {
        OURS: Side(partial(_cache, lab.ours(at.d_model), tokens), kept + _forward_bytes(at)),
        BRIDGE: Side(partial(_cache, lab.bridge(at.d_model), tokens), 2 * kept + _their_bytes(at)),
        TRANSFORMERS + " forward": Side(partial(_logits, lab.theirs(at.d_model), tokens), _their_bytes(at)),
    }


def generation_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """A prompt of T tokens, one sequence, continued greedily by 64 with the cache."""
    prompt = lab.tokens(1, at.length)
    ours, theirs = lab.ours(at.d_model), lab.theirs(at.d_model)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=NEW_TOKENS)
    mask = torch.ones_like(prompt)
    return {
        OURS: Side(lambda: ours.generate(prompt, NEW_TOKENS, stop_tokens=()), _forward_bytes(at)),
        TRANSFORMERS: Side(lambda: theirs.generate(prompt, attention_mask=mask, **options), _their_bytes(at)),
    }


def training_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """Loss with load balancing, and every gradient."""
    tokens = lab.tokens(at.batch, at.length)
    ours, theirs = lab.ours(at.d_model), lab.theirs(at.d_model)

    def our_step() -> None:
        ours.zero_grad(set_to_none=True)
        ours.loss_terms(tokens).total.backward()
        ours.zero_grad(set_to_none=True)

    def their_step() -> None:
        theirs.zero_grad(set_to_none=True)
        theirs(tokens, labels=tokens, output_router_logits=True, use_cache=False).loss.backward()
        theirs.zero_grad(set_to_none=True)

    return {
        OURS: Side(our_step, LAYERS * 2 * _forward_bytes(at)),
        TRANSFORMERS: Side(their_step, LAYERS * 2 * _their_bytes(at)),
    }


def hook_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """The forward as it is, with its hook points taken out of the code, and with a hook that adds to the stream."""
    tokens = lab.tokens(at.batch, at.length)
    ours = lab.ours(at.d_model)
    direction = lab.random(at.d_model)
    hooks = [(f"blocks.{LAYERS // 2}.hook_resid_pre", lambda stream, hook: stream + direction)]
    need = _forward_bytes(at)

    @torch.no_grad()
    def steered() -> object:
        return ours.run_with_hooks(tokens, fwd_hooks=hooks)

    return {
        BARE: Side(partial(_logits, without_hook_points(ours), tokens), need),
        NO_HOOKS: Side(partial(_logits, ours, tokens), need),
        ONE_HOOK: Side(steered, need),
    }


PREFILL = Race("prefill", "Forward pass to logits", prefill_sides, bounds=(PRODUCTS,), precise=3)
CACHE = Race("cache", "run_with_cache, default cache", cache_sides)
GENERATE = Race("generate", f"{NEW_TOKENS} tokens after a prompt of T", generation_sides, one_row=True)
TRAIN = Race("training-step", "Training step", training_sides)
HOOKS = Race("hooks", "What hook points cost", hook_sides, baseline=BARE, precise=8, all_ours=True)

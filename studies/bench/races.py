"""The races behind ``jambascope bench``.

Both sides run on the same random checkpoint (8 layers in Jamba's proportions, 8 experts), in one process,
alternating, after a warm-up; a ratio is the median of ours over the median of theirs, its spread the
smallest and largest ratio of neighbouring runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jambascope.errors import InputError
from jambascope.model import HookedJamba

NEW_TOKENS = 64


def make_pair(d_model: int) -> tuple[HookedJamba, Any]:
    """The same random 8-layer, 8-expert checkpoint opened by us and by transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.JambaConfig(
        vocab_size=1024,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=8,
        num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 64,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    theirs = transformers.JambaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return HookedJamba.from_pretrained(directory), theirs


def forward(model: Any, tokens: torch.Tensor) -> None:
    """One pass to logits, without gradients or cache."""
    with torch.no_grad():
        model(tokens) if isinstance(model, HookedJamba) else model(tokens, use_cache=False)


def training_step(model: Any, tokens: torch.Tensor) -> None:
    """Loss with load balancing, and every gradient."""
    model.zero_grad(set_to_none=True)
    if isinstance(model, HookedJamba):
        model.loss_terms(tokens).total.backward()
    else:
        model(tokens, labels=tokens, output_router_logits=True, use_cache=False).loss.backward()


def generate(model: Any, tokens: torch.Tensor) -> None:
    """Greedy continuation of a 32-token prompt by 64 tokens, with cache, one sequence."""
    prompt = tokens[:1, :32]
    if isinstance(model, HookedJamba):
        model.generate(prompt, NEW_TOKENS, stop_tokens=())
    else:
        options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
        model.generate(prompt, max_new_tokens=NEW_TOKENS, attention_mask=torch.ones_like(prompt), **options)


RACES: dict[str, Callable[[Any, torch.Tensor], None]] = {
    "forward": forward,
    "training-step": training_step,
    "generate": generate,
}


def run_races(
    d_model: int,
    batch: int,
    length: int,
    names: list[str],
    repeats: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yield one result per race: times in milliseconds, the ratio transformers / ours and its spread."""
    unknown = set(names) - set(RACES)
    if unknown:
        raise InputError(f"race={sorted(unknown)[0]!r} must be one of {', '.join(RACES)}")
    ours, theirs = make_pair(d_model)
    tokens = torch.randint(0, 1024, (batch, length), generator=torch.Generator().manual_seed(0))
    for name in names:
        race = RACES[name]
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for repeat in range(repeats + 1):
            progress(f"d_model {d_model}, {name}: run {repeat} of {repeats}" + (" (warm-up)" if repeat == 0 else ""))
            for side, model in (("ours", ours), ("transformers", theirs)):
                start = time.perf_counter()
                race(model, tokens)
                if repeat:
                    times[side].append(1e3 * (time.perf_counter() - start))
        ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
        yield {
            "race": name,
            "d_model": d_model,
            "batch": batch,
            "length": length,
            "threads": torch.get_num_threads(),
            "ours_ms": statistics.median(times["ours"]),
            "transformers_ms": statistics.median(times["transformers"]),
            "ratio": statistics.median(times["transformers"]) / statistics.median(times["ours"]),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "times_ms": times,
        }

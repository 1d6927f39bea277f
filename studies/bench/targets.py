"""The figures that this project set itself, and what a run says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jambascope.studies.bench.kernel_races import COPY, EXP, EXP_INTO, EXP_REGISTERS, scan_sizes
from jambascope.studies.bench.memory_races import PEAK
from jambascope.studies.bench.model_races import BRIDGE, NO_HOOKS, ONE_HOOK, TRANSFORMERS
from jambascope.studies.bench.products import PRODUCTS
from jambascope.studies.bench.race import EVERY_SIDE, OURS, Race, Setting, Skip, Summary
from jambascope.studies.bench.sweep_races import THEIR_LOOP, where


@dataclass(frozen=True)
class Target:
    """A figure to reach: what is compared, where, and how far."""

    text: str
    race: str
    side: str
    """The peer or bound, whose time over the baseline's is the ratio."""
    d_model: int
    lengths: tuple[int, ...]
    """Where it is read: the first of these that was measured."""
    kind: Literal["times faster", "times the bound", "overhead"]
    bound: float
    batch: int = 4
    any_length: bool = False
    """Read at the shortest length that was measured where none of ``lengths`` was."""


# The lengths of the training step: theirs costs T squared, and is left out where it exceeds the budget.
TARGETS = (
    Target("scan, 256 channels, N 16: at least 40x transformers", "scan", "transformers", 128, (512,),
           "times faster", 40),
    Target("scan, 256 channels, N 16: at least 60x mambapy", "scan", "mambapy", 128, (512,), "times faster", 60),
    Target("scan, 256 channels, N 16: at most 0.35 of torch.exp", "scan", EXP, 128, (512,), "times the bound", 0.35),
    Target("scan forward and backward: at least 25x transformers", "scan-backward", "transformers", 128,
           (512, 128, 64), "times faster", 25),
    Target("forward, d_model 128: at least 8x transformers", "prefill", TRANSFORMERS, 128, (512,), "times faster", 8),
    Target("forward, d_model 128: at most 1.6 of its matrix products alone", "prefill", PRODUCTS, 128, (512,),
           "times the bound", 1.6),
    Target("forward, d_model 512: at most 1.35 of its matrix products alone", "prefill", PRODUCTS, 512, (512,),
           "times the bound", 1.35),
    Target("default cache: at least 7x the TransformerLens bridge", "cache", BRIDGE, 128, (512,), "times faster", 7),
    Target("no hooks: overhead at most 2%", "hooks", NO_HOOKS, 128, (512,), "overhead", 0.02),
    Target("one residual hook: overhead at most 5%", "hooks", ONE_HOOK, 128, (512,), "overhead", 0.05),
    Target("generation, d_model 128: at least 5x transformers", "generate", TRANSFORMERS, 128, (64,),
           "times faster", 5, batch=1, any_length=True),
    Target("training step, d_model 128: at least 8x transformers", "training-step", TRANSFORMERS, 128,
           (512, 128, 64), "times faster", 8),
    Target("experts, d_model 512, T 128: at least 1.8x transformers' grouped", "experts", "transformers grouped", 512,
           (128,), "times faster", 1.8),
    Target("patching, 8 x 64: at least 50x TransformerLens", "sweep", THEIR_LOOP, 128, (64,), "times faster", 50,
           batch=1),
    Target("patching, 8 x 64: at most 2 of its matrix products alone", "sweep", PRODUCTS, 128, (64,),
           "times the bound", 2, batch=1),
    Target("patching, 32 x 256, every 16th: at most 2 of its matrix products alone", "sweep", PRODUCTS, 128, (256,),
           "times the bound", 2, batch=1),
)  # fmt: skip
FLATNESS, LONGEST = 0.10, 262_144
LONG_PASS_GB = 8.0


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; ``reached`` is None where nothing was."""

    text: str
    where: str
    measured: str
    reached: bool | None


def judge(summaries: Sequence[Summary], skips: Sequence[Skip], device: str) -> list[Verdict]:
    """The targets of the races that were run. They are stated for a CPU; on another device there are none."""
    if device != "cpu":
        return []
    run = {found.race for found in (*summaries, *skips)}
    verdicts = [_judge(t, summaries, skips) for t in TARGETS if t.race in run]
    return [*verdicts, _flatness(summaries), _long_pass(summaries)] if "long" in run else verdicts


def _judge(target: Target, summaries: Sequence[Summary], skips: Sequence[Skip]) -> Verdict:
    at = target.race, target.d_model, target.batch
    found = {
        s.length: s
        for s in summaries
        if (s.race, s.d_model, s.batch) == at and s.side == target.side and s.ratio is not None
    }
    others = sorted(found) if target.any_length else ()
    for length in (*target.lengths, *others):
        if length in found:
            return Verdict(target.text, _where(target, length), *_measure(target, found[length]))
    of_sides = target.side, OURS, EVERY_SIDE
    why = [
        s.reason
        for s in skips
        if (s.race, s.d_model, s.batch) == at
        and s.side in of_sides
        and (target.any_length or s.length in target.lengths)
    ]
    length = target.lengths[0]
    missing = why[0] if why else f"run jambascope bench {target.race} --d-model {target.d_model} --length {length}"
    return Verdict(target.text, _where(target, length), missing, None)


def _where(target: Target, length: int) -> str:
    if target.race == "generate":
        return f"batch {target.batch}, after a prompt of {length:,} tokens"
    if target.race == "sweep":
        return where(length)
    return f"batch {target.batch} x {length:,}"


def _measure(target: Target, s: Summary) -> tuple[str, bool]:
    spread = s.ratio, s.ratio_low, s.ratio_high
    if target.kind == "times faster":
        return "{:.3g}x ({:.3g} to {:.3g})".format(*spread), s.ratio >= target.bound
    if target.kind == "times the bound":
        inverse = [1 / r for r in spread]
        return f"{inverse[0]:.3g} ({inverse[2]:.3g} to {inverse[1]:.3g})", inverse[0] <= target.bound
    percent = [100 * (r - 1) for r in spread]
    return "{:+.1f}% ({:+.1f}% to {:+.1f}%)".format(*percent), s.ratio - 1 <= target.bound


def _flatness(summaries: Sequence[Summary]) -> Verdict:
    text = "time per token constant within 10% from T 1,024 to 262,144 (pure Mamba)"
    found = {s.length: s for s in summaries if s.quantity == "us per token" and s.d_model == 128}
    where = "d_model 128, batch 1"
    if not {1024, LONGEST} <= set(found):
        return Verdict(text, where, f"run jambascope bench long --d-model 128 --length 1024 --length {LONGEST}", None)
    medians = {length: s.median for length, s in found.items() if 1024 <= length <= LONGEST}
    shift = max(abs(m / medians[1024] - 1) for m in medians.values())
    each = ", ".join(f"{length:,}: {m:.3g}" for length, m in sorted(medians.items()))
    return Verdict(text, where, f"{100 * shift:.0f}% at most (us per token at {each})", shift <= FLATNESS)


def _long_pass(summaries: Sequence[Summary]) -> Verdict:
    text = "262,144-token pass of the packaged hybrid: less than 8 GB"
    for s in summaries:
        if s.race == "long" and s.quantity == PEAK and f"{LONGEST:,}" in s.side:
            return Verdict(text, "batch 1", f"{s.median:.2f} GB at its peak, whole process", s.median < LONG_PASS_GB)
    return Verdict(text, "batch 1", f"run jambascope bench long --length {LONGEST}", None)


def against_bounds(summaries: Sequence[Summary]) -> list[str]:
    """How far the scan is from the memory and the exponentials of this machine, and the forward from its products."""
    by_size: dict[tuple, dict[str, Summary]] = {}
    for s in summaries:
        if s.quantity in ("ms", "ms per cell"):
            by_size.setdefault((s.race, s.d_model, s.batch, s.length), {})[s.side] = s
    lines = []
    for (race, d_model, batch, length), sides in by_size.items():
        where = f"d_model {d_model}, batch {batch} x {length:,}"
        if OURS not in sides:
            continue
        if race in ("prefill", "experts", "sweep") and PRODUCTS in sides and sides[PRODUCTS].ratio is not None:
            outside = 1 - sides[PRODUCTS].ratio
            lines.append(f"{race}, {where}: {100 * outside:.0f}% of the time is spent outside its matrix products")
        if race == "scan" and COPY in sides and sides[COPY].ratio is not None:
            count, moved = scan_sizes(Setting(d_model, batch, length))
            exp = EXP_REGISTERS if EXP_REGISTERS in sides else EXP_INTO
            line = f"scan, {where}: {1e-6 * moved / sides[OURS].median:.3g} GB/s, {sides[COPY].ratio:.1%} of a copy's"
            if exp in sides and sides[exp].ratio is not None:
                rate = 1e-6 * count / sides[OURS].median
                line += f"; {rate:.3g} G exponentials/s, {sides[exp].ratio:.1%} of {exp}'s"
            lines.append(line)
    return lines


def ratio_text(s: Summary, race: Race) -> str:
    """A side's ratio as a table shows it, with its spread."""
    if s.ratio is None or s.side == race.baseline:
        return ""
    return f"{s.ratio:.3g}x ({s.ratio_low:.3g} to {s.ratio_high:.3g})"

"""The trainer of the packaged models: AdamW, warm-up and cosine, checkpoints that resume to the same weights.

A batch is a function of the step alone, so that a run needs no data state: killed and resumed, it sees
the batches that it would have seen, and ends in the same weights bit for bit (on the same machine and thread count).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from safetensors import safe_open

from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_table, write_tensors
from jambascope.kernels.experts.int8 import QUANTIZE, is_quantized
from jambascope.model import HookedJamba

Batch = Callable[[int], Int[torch.Tensor, "batch pos"]]
Evaluate = Callable[[HookedJamba], Mapping[str, float]]
CHECKPOINT, LOG = "checkpoint.safetensors", "log.parquet"


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How to train; the batches come from elsewhere."""

    steps: int
    """Optimiser steps."""
    seed: int = 0
    """Of the first weights and of the batches, which the caller makes; noted here so that a resumed run must agree."""
    learning_rate: float = 2e-3
    """The highest learning rate."""
    final_fraction: float = 0.1
    """The cosine ends at this share of ``learning_rate``."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running means of gradient and squared gradient."""
    weight_decay: float = 0.1
    """Of matrices; norms, biases, A_log and D do not decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    evaluate_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last step always writes one."""
    patience: int | None = None
    """Evaluations without a lower ``watch`` after which training ends early; None never ends it."""
    watch: str = "held_out"
    """The evaluation's number that ``patience`` looks at; smaller is better."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for field in ("steps", "evaluate_every", "checkpoint_every"):
            self._need(_whole(getattr(self, field), 1), field, "must be a whole number of at least 1")
        for field in ("seed", "warmup_steps"):
            self._need(_whole(getattr(self, field), 0), field, "must be a whole number of at least 0")
        patient = self.patience is None or _whole(self.patience, 1)
        self._need(patient, "patience", "must be a whole number of at least 1, or None to train all steps")
        self._need(self.learning_rate > 0, "learning_rate", "must be positive, such as 2e-3")
        self._need(0 <= self.final_fraction <= 1, "final_fraction", "must lie in [0, 1]")
        betas_fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._need(betas_fit, "betas", "give two numbers in [0, 1)")
        self._need(self.weight_decay >= 0, "weight_decay", "must be 0 (none) or positive")
        self._need(self.clip_norm > 0, "clip_norm", "must be positive; a large number clips nothing")

    def _need(self, ok: bool, field: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"{field}={getattr(self, field)!r}: {remedy}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, A_log and D."""
    return parameter.ndim >= 2 and not name.endswith("A_log")


def make_optimizer(model: HookedJamba, spec: TrainingSpec) -> torch.optim.AdamW:
    """AdamW over two groups, decayed and not; tied weights stand in it once.

    Raises:
        ConfigError: a quantised model, whose experts have no gradients.
    """
    if is_quantized(model):
        raise ConfigError(
            f"the model was loaded with quantize={QUANTIZE!r}: its experts cannot be trained; load it without quantize"
        )
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas)


def fit(
    model: HookedJamba,
    spec: TrainingSpec,
    batch: Batch,
    directory: str | Path,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    progress: bool = False,
    after_step: Callable[[int], None] | None = None,
    data: str = "",
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``model.loss_terms(batch(step)).total``.

    Args:
        batch: token ids [B T] of a step; must depend on nothing but the step.
        directory: gets ``checkpoint.safetensors`` and ``log.parquet``, each replaced as a whole.
        evaluate: called on the model (in eval mode, without gradients) for the numbers to log.
        resume: continue from the directory's checkpoint, when there is one.
        progress: print a line with loss, evaluation and time left at every evaluation, on stderr.
        after_step: called with the number of steps behind the model, 0 before the first.
        data: what ``batch`` draws from, in any words; a checkpoint that was made with another is refused.

    Returns:
        The log, one row per step: step, loss, lm, load_balancing, activation, learning_rate, gradient_norm, seconds,
        and evaluation columns where there was one. It is shorter than ``spec.steps`` where patience ended it.

    Raises:
        CheckpointError: a checkpoint of another spec, model or data, or one that is damaged.
        ConfigError: a loss that is no longer finite; patience without an evaluation that gives ``spec.watch``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if spec.patience is not None and evaluate is None:
        raise ConfigError(f"patience={spec.patience} needs an evaluation that gives {spec.watch!r}; pass evaluate")
    optimizer = make_optimizer(model, spec)
    first, log = 0, []
    if resume and (directory / CHECKPOINT).exists():
        first = load_checkpoint(directory / CHECKPOINT, model, optimizer, spec, data)
        log = pq.read_table(directory / LOG).to_pylist()[:first]
    show = _progress_line(spec.steps, first) if progress else lambda row: None
    before, clock = (log[-1]["seconds"] if log else 0.0), time.monotonic()
    if after_step is not None and first == 0:
        after_step(0)
    model.train()
    for step in range(first, spec.steps):
        if _stalled(log, spec):
            break
        row = _step(model, optimizer, spec, batch(step), step)
        done = step + 1
        if evaluate is not None and (done % spec.evaluate_every == 0 or done == spec.steps):
            model.eval()
            with torch.no_grad():
                row |= {name: float(value) for name, value in evaluate(model).items()}
            model.train()
            _check_watched(row, spec)
        row["seconds"] = before + time.monotonic() - clock
        log.append(row)
        show(row)
        if after_step is not None:
            after_step(done)
        if done % spec.checkpoint_every == 0 or done == spec.steps or _stalled(log, spec):
            # The log first: a kill in between leaves a log that is too long, which resuming cuts.
            _write_log(directory / LOG, log)
            save_checkpoint(directory / CHECKPOINT, model, optimizer, spec, done, data)
    model.eval()
    return log


def _stalled(log: list[dict[str, float]], spec: TrainingSpec) -> bool:
    """Whether the last ``patience`` evaluations brought nothing below the best before them: of the log alone, so that
    a resumed run ends where an uninterrupted one does."""
    if spec.patience is None or not log or not _evaluated(log[-1], spec):
        return False
    found = [row[spec.watch] for row in log if _evaluated(row, spec)]
    return len(found) > spec.patience and min(found[-spec.patience :]) >= min(found[: -spec.patience])


def _check_watched(row: Mapping[str, float], spec: TrainingSpec) -> None:
    if spec.patience is not None and not _evaluated(row, spec):
        raise ConfigError(f"watch={spec.watch!r}: the evaluation gives no such number for patience={spec.patience}")


def _evaluated(row: Mapping[str, float], spec: TrainingSpec) -> bool:
    return row.get(spec.watch) is not None


def _step(
    model: HookedJamba, optimizer: torch.optim.AdamW, spec: TrainingSpec, tokens: torch.Tensor, step: int
) -> dict[str, float]:
    rate = spec.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    terms = model.loss_terms(tokens)
    if not torch.isfinite(terms.total):
        raise ConfigError(
            f"learning_rate={spec.learning_rate}: the loss became {terms.total.item()} at step {step}; "
            "lower it and start anew"
        )
    terms.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(
        step=step,
        loss=terms.total.item(),
        lm=terms.lm.item(),
        load_balancing=terms.load_balancing.item(),
        activation=terms.activation.item(),
        learning_rate=rate,
        gradient_norm=norm.item(),
    )


# -- checkpoints ---------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, model: HookedJamba, optimizer: torch.optim.AdamW, spec: TrainingSpec, step: int, data: str = ""
) -> None:
    """Weights, AdamW's moments, and as metadata the step, spec, model configuration and data: one file, replaced whole.

    One file, because weights and step in two could come from different moments after a kill.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    write_tensors(path, tensors, _metadata(model, spec, step, data))


def load_checkpoint(
    path: Path, model: HookedJamba, optimizer: torch.optim.AdamW, spec: TrainingSpec, data: str = ""
) -> int:
    """Put a checkpoint into model and optimizer; returns how many steps it has behind it."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as e:  # safetensors raises its own error, the system others
        raise CheckpointError(f"{path} cannot be read ({e}); remove it to train from the beginning") from None
    for part, now in _metadata(model, spec, 0, data).items():
        if part != "step" and stored.get(part) != now:
            raise CheckpointError(
                f"{path} was written with another {part}: {stored.get(part)}, not {now}; "
                "give that one, or another directory"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            optimizer.state[parameter] = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
    return int(stored["step"])


def _metadata(model: HookedJamba, spec: TrainingSpec, step: int, data: str) -> dict[str, str]:
    return {
        "step": str(step),
        "spec": json.dumps(dataclasses.asdict(spec)),
        "config": json.dumps(model.config.to_dict()),
        "data": data,
    }


# -- what is seen of a run -----------------------------------------------------------------------------------


def _write_log(path: Path, log: list[dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for row in log for key in row))
    write_table(path, pa.table({column: [row.get(column) for row in log] for column in columns}))


def _progress_line(steps: int, first: int) -> Callable[[Mapping[str, float]], None]:
    """Shows a row: a live line on a terminal; elsewhere a line per evaluation, so that a log file stays short."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    measures = {"step", "loss", "lm", "load_balancing", "activation", "learning_rate", "gradient_norm", "seconds"}
    start = time.monotonic()

    def show(row: Mapping[str, float]) -> None:
        done = int(row["step"]) + 1
        left = (time.monotonic() - start) / (done - first) * (steps - done)
        text = f"step {done}/{steps}  loss {row['loss']:.3f}  {left / 60:.1f} min left"
        evaluation = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key not in measures)
        if evaluation or done in (1, steps):
            console.print(f"{text}  {evaluation}", soft_wrap=True)
        elif console.is_terminal:
            console.print(text, end="\r", soft_wrap=True)

    return show

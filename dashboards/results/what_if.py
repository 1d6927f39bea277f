"""What an intervention changes in what a model expects: the same of every page. T position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jambascope.dashboards.session import View
from jambascope.hooks import predictions, run
from jambascope.hooks.interventions import Intervention

CANDIDATES = 8
"""Likeliest tokens that are taken of either run."""
_BLOCK = 256
"""Positions whose predictions are compared at a time."""


@dataclass(frozen=True)
class Change:
    candidates: list[predictions.ChangedToken]
    """Of the next token after the position that is read."""
    divergence: np.ndarray
    """[T], KL(before || after) of each position's prediction, nats."""
    before: np.ndarray
    """[T-1], surprisal of the prompt's tokens, nats."""
    after: np.ndarray


@torch.no_grad()
def compare(view: View, interventions: Sequence[Intervention], read: int) -> Change:
    """The prompt without and with interventions, and the next tokens after the position ``read``."""
    before, after = (run(view.model, view.tokens, edits).logits[0] for edits in ((), interventions))
    blocks = zip(before.split(_BLOCK), after.split(_BLOCK), strict=True)
    return Change(
        predictions.changed_tokens(view.model, before[read], after[read], CANDIDATES),
        torch.cat([predictions.divergence(one, other) for one, other in blocks]).cpu().numpy(),
        *(predictions.surprisal(logits, view.tokens[0]).cpu().numpy() for logits in (before, after)),
    )


CODE = """
with torch.no_grad():
    before, after = (run(model, tokens, interventions).logits[0] for interventions in ((), edits))
divergence = predictions.divergence(before, after)
candidates = predictions.changed_tokens(model, before[{read}], after[{read}], {k})
surprisal_before, surprisal_after = (predictions.surprisal(logits, tokens[0]) for logits in (before, after))
"""


def code(read: int) -> str:
    """The lines of :func:`compare`, after those that make ``tokens`` and ``edits``."""
    return CODE.format(read=read, k=CANDIDATES)

"""A few quick numbers to follow a training run by; ``jambascope zoo eval`` measures properly."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from jambascope.losses import token_losses
from jambascope.model import HookedJamba
from jambascope.zoo.documents import phones, recall, repeat
from jambascope.zoo.language import DOMAINS, mixture
from jambascope.zoo.reviews import review
from jambascope.zoo.scoring import answer_scores, label_scores

SEED = 1
MEASURES = ("held_out", "repeat", "label_mass", "label", "recall", "phones")
"""What :func:`summary` returns."""


def _rng(measure: int) -> np.random.Generator:
    """Random numbers of one measure; three numbers, since training batches are seeded by two (seed and step)."""
    return np.random.default_rng([SEED, measure, 1])


@torch.no_grad()
def held_out_losses(model: HookedJamba, rows: int = 4, length: int = 128) -> dict[str, float]:
    """Per domain, next-token loss in nats on packed held-out rows."""
    found = {}
    for domain in DOMAINS:
        ids = np.stack([row.ids for row in islice(mixture(_rng(1), length, "held_out", {domain: 1.0}), rows)])
        tokens = torch.as_tensor(ids, device=model.device)
        found[domain] = token_losses(model(tokens), tokens).mean().item()
    return found


def summary(model: HookedJamba) -> dict[str, float]:
    """Held-out loss over all domains, and accuracies of repeating, labelling, recalling and calling, each in [0, 1]."""
    rng = _rng(2)
    episodes = [review(rng, "held_out", 8, 2, ("arbitrary", "unseen")[i % 2]) for i in range(24)]
    last = label_scores(model, episodes)
    return {
        "held_out": float(np.mean(list(held_out_losses(model).values()))),
        "repeat": answer_scores(model, [repeat(rng, "held_out", 24, 2) for _ in range(8)]).hits.mean().item(),
        "label_mass": last.mass[:, 4:].mean().item(),
        "label": last.acc_restricted[:, 4:].nanmean().item(),
        "recall": answer_scores(model, [recall(rng, "held_out", 8) for _ in range(8)]).hits.mean().item(),
        "phones": answer_scores(model, [phones(rng, "held_out", 4) for _ in range(8)]).hits.mean().item(),
    }

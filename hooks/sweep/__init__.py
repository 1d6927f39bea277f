"""Activation patching of every cell: ``patch_sweep``; single paths, edges knocked out, and a screen by gradients.

from jambascope.hooks.sweep import Node, logit_difference, patch_sweep

found = patch_sweep(model, clean, corrupted, logit_difference("Positive", "Negative"), ["resid_pre", "z", "ssm_state"])
found.effects()["resid_pre"]     # [metric pair layer position]
found.top(10)
"""

from jambascope.hooks.sweep.knockouts import knock_out_sweep
from jambascope.hooks.sweep.metrics import (
    Metric,
    Reference,
    kl_divergence,
    label_mass,
    log_probability,
    logit_difference,
    probability,
    rank,
)
from jambascope.hooks.sweep.nodes import Node, interventions, targets
from jambascope.hooks.sweep.paths import path_patch
from jambascope.hooks.sweep.result import Effects, KnockOuts, PatchSweep, SweepError
from jambascope.hooks.sweep.screening import Screen, screen
from jambascope.hooks.sweep.sweep import patch_sweep

__all__ = [
    "Effects",
    "KnockOuts",
    "Metric",
    "Node",
    "PatchSweep",
    "Reference",
    "Screen",
    "SweepError",
    "interventions",
    "kl_divergence",
    "knock_out_sweep",
    "label_mass",
    "log_probability",
    "logit_difference",
    "patch_sweep",
    "path_patch",
    "probability",
    "rank",
    "screen",
    "targets",
]

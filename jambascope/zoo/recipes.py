"""The recipes of the packaged models and their controls: equal data, steps and shape, one thing changed at a time."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.training import TrainingSpec
from jambascope.zoo.language import SHARES
from jambascope.zoo.words import BOS, EOS, PAD, VOCABULARY


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the batches hold up to a step."""

    until: int | None
    """The step at which the next stage begins; None for the last."""
    batch_size: int
    """Rows of a batch."""
    sequence_length: int
    """Ids of a row."""
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """How often each domain is drawn."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the domains' generators are given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a model becomes, but for the language itself."""

    about: str
    """What sets this model apart from the others, in one line."""
    config: JambaConfig
    spec: TrainingSpec
    stages: tuple[Stage, ...]
    """The curriculum; the last stage has no end."""
    initial_std: float = 0.05
    """Standard deviation of the matrices before training; the unembedding begins as a copy of the embedding."""
    mimetic: bool = False
    """Mamba layers begin as :func:`jambascope.initialization.mimetic` sets them."""
    packaged: bool = True
    """Its weights ship; else it is a control of the evaluation."""

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.stages if stage.until is None or step < stage.until)

    def tokens(self, steps: int | None = None) -> int:
        """Tokens seen over the first ``steps`` steps, or over all."""
        stages = map(self.stage, range(self.spec.steps if steps is None else steps))
        return sum(stage.batch_size * stage.sequence_length for stage in stages)


SNAPSHOTS = (0, 100, 200, 300, 400, 550, 700, 1100, 1400, 1700, 2400, 3200)
"""Steps whose weights ``zoo train --snapshots`` keeps, so that a study can follow what emerges when."""

# On the mixture from the first step, no model read the context within 600 steps. Repetitions first: of few words, so
# that pure Mamba learns them, too, and of many lengths, since of one length it learns the distance instead of the word
# before. Then labels in short episodes of two classes: from the full mixture they did not come in 1,300 steps.
CURRICULUM = (
    Stage(
        until=400,
        batch_size=32,
        sequence_length=34,
        shares={"repeat": 1.0},
        options={"repeat": {"longest": 10, "pool": 24}},
    ),
    Stage(
        until=700,
        batch_size=32,
        sequence_length=34,
        shares={"repeat": 1.0},
        options={"repeat": {"longest": 12, "pool": 100}},
    ),
    Stage(until=1100, batch_size=16, sequence_length=66, shares={"repeat": 1.0}, options={"repeat": {"longest": 16}}),
    Stage(
        until=1700,
        batch_size=16,
        sequence_length=128,
        shares=SHARES | {"review": 0.4, "verdict": 0.04},
        options={"review": {"classes": 2, "filler": 0}, "recall": {"pool": 24}},
    ),
    Stage(until=None, batch_size=8, sequence_length=256),
)
SPEC = TrainingSpec(steps=3200, learning_rate=1.5e-3, warmup_steps=20, evaluate_every=100, checkpoint_every=100)
JAMBA = JambaConfig.jamba(
    n_layers=8,
    d_model=64,
    d_vocab=len(VOCABULARY),
    n_heads=4,
    n_key_value_heads=2,
    d_head=16,
    d_mlp=64,
    num_experts=8,
    d_state=16,
    n_ctx=2048,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
    pad_token_id=PAD,
    load_balancing_coef=0.01,
    activation_coef=1e-5,
)


def _recipe(about: str, learning_rate: float = SPEC.learning_rate, **changes: Any) -> Recipe:
    """``jamba-micro`` but for the named fields of its configuration, or of the recipe."""
    outer = {key: changes.pop(key) for key in ("mimetic", "packaged") if key in changes}
    return Recipe(
        about=about,
        config=dataclasses.replace(JAMBA, **changes),
        spec=dataclasses.replace(SPEC, learning_rate=learning_rate),
        stages=CURRICULUM,
        **outer,
    )


def _every(period: int, offset: int) -> tuple[str, ...]:
    return tuple("attention" if i % period == offset else "mamba" for i in range(JAMBA.n_layers))


PURE_MAMBA = ("mamba",) * JAMBA.n_layers
RECIPES = {
    "jamba-micro": _recipe("attention : Mamba 1 : 7, experts at every second layer, as the Jamba releases"),
    "jamba-micro-1to3": _recipe("attention : Mamba 1 : 3", mixers=_every(4, 2)),
    "mamba-micro": _recipe("no attention", 3e-3, mixers=PURE_MAMBA),
    # Wider feed-forwards and a key/value head per query head make up for what attention lacks in parameters.
    "attention-micro": _recipe(
        "attention with rotary positions in every layer",
        mixers=("attention",) * JAMBA.n_layers,
        rotary=True,
        n_key_value_heads=4,
        d_mlp=104,
    ),
    # Two of eight experts at every second layer are as wide as this at every layer.
    "jamba-micro-dense": _recipe(
        "no experts, as many active parameters", 3e-3, feed_forwards=("dense",) * JAMBA.n_layers, d_mlp=96
    ),
    "jamba-micro-rope": _recipe("rotary positions in the attention layer", rotary=True),
    "jamba-micro-no-inner-norm": _recipe("no norms on dt, B and C inside Mamba", 3e-3, inner_norms=False),
    "jamba-micro-mamba2": _recipe(
        "Mamba-2 for Mamba, with 64 states, as its authors make them larger",
        3e-3,
        mixers=tuple("mamba2" if mixer == "mamba" else mixer for mixer in JAMBA.mixers),
        mamba_d_head=16,
        d_state=64,
    ),
    "mamba-micro-state-4": _recipe(
        "no attention, a quarter of the state", 3e-3, mixers=PURE_MAMBA, d_state=4, packaged=False
    ),
    "mamba-micro-state-64": _recipe(
        "no attention, four times the state", 3e-3, mixers=PURE_MAMBA, d_state=64, packaged=False
    ),
    "mamba-micro-mimetic": _recipe(
        "no attention, begun near linear attention", 3e-3, mixers=PURE_MAMBA, mimetic=True, packaged=False
    ),
}
"""Name -> recipe. The learning rates were searched for, see ``studies/zoo/family.py``."""


def recipe(name: str, **changes: Any) -> Recipe:
    """The recipe of a name, with other values for fields of its ``TrainingSpec`` where they are not None.

    Raises:
        ConfigError: an unknown name, or values out of range.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"name={name!r} is no recipe; {hint}there are {', '.join(RECIPES)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(RECIPES[name], spec=dataclasses.replace(RECIPES[name].spec, **changes))

"""Pairs of prompts that differ in a word: examples, a counterpart of any prompt, and both aligned token by token."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence

from jambascope import HookedJamba
from jambascope.dashboards.session import TEXT_EXAMPLES
from jambascope.studies.figures.theme import SELECTED, label
from jambascope.zoo.words import LABEL_PAIRS, NAMES, SENTIMENTS, THINGS

REVIEWS, COPIES, GIFT, MAP = TEXT_EXAMPLES
PAIRS = {
    "one adjective of a review": (REVIEWS, REVIEWS.replace("wonderful", "terrible")),
    "the labels of the examples": (
        REVIEWS,
        REVIEWS.replace("Positive", "?").replace("Negative", "Positive").replace("?", "Negative"),
    ),
    "a word of repeated text": (COPIES, COPIES.replace("lamp", "key")),
    "who gave it": (GIFT, GIFT.replace("Alice", "Clara")),
    "which entry is asked for": (MAP, MAP.replace("; leaf", "; stone")),
}
"""Name -> (clean, corrupted), in the language of the packaged models."""


def pairs_of(model: HookedJamba, examples: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Pairs that a model can read."""
    if model.tokenizer is not None:
        return PAIRS
    return {f"one token of {len(ids.split())}": (ids, _other_id(model, ids)) for ids in examples}


def counterpart(model: HookedJamba, prompt: str) -> str:
    """A corrupted prompt for a clean one: that of the example; else the last sentiment word, label, name or thing
    becomes another. A prompt that has none of them stays as it is, for its reader to change."""
    if model.tokenizer is None:
        return _other_id(model, prompt)
    known = dict(reversed(PAIRS.values()))
    if prompt in known:
        return known[prompt]
    for others in OTHERS:
        for word in reversed(list(re.finditer(r"\w+", prompt))):
            if word.group() in others:
                return prompt[: word.start()] + others[word.group()] + prompt[word.end() :]
    return prompt


def _exchange(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    return dict(pairs) | {b: a for a, b in pairs}


OTHERS = (
    _exchange(list(zip(*SENTIMENTS, strict=True))),
    _exchange(LABEL_PAIRS),
    dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)),
    dict(zip(THINGS, [*THINGS[1:], THINGS[0]], strict=True)),
)
"""Word -> what it becomes."""


def _other_id(model: HookedJamba, prompt: str) -> str:
    ids = prompt.split()
    if not ids or not all(token.isdecimal() for token in ids):
        return prompt
    middle = len(ids) // 2
    return " ".join([*ids[:middle], str((int(ids[middle]) + 1) % model.config.d_vocab), *ids[middle + 1 :]])


def aligned(clean: Sequence[str], corrupted: Sequence[str]) -> str:
    """Both prompts as HTML, a column for each position; where they differ, framed and in bold."""
    columns = []
    for position, pair in enumerate(itertools.zip_longest(clean, corrupted)):
        kind = "same" if pair[0] == pair[1] else "other"
        words = "".join(f"<span>{'—' if word is None else label(word)}</span>" for word in pair)
        hover = html.escape(f"position {position}: {pair[0]} / {pair[1]}")
        columns.append(f'<div class="{kind}" title="{hover}"><small>{position}</small>{words}</div>')
    names = "<div><small>&nbsp;</small><b>clean</b><b>corrupted</b></div>"
    return f'<style>{STYLE}</style><div class="aligned">{names}{"".join(columns)}</div>'


STYLE = f"""
.aligned {{display: flex; flex-wrap: wrap; gap: 3px; max-height: 15rem; overflow-y: auto; font-size: 12.5px;}}
.aligned > div {{display: flex; flex-direction: column; padding: 0 4px; border: 1.5px solid transparent;
  border-radius: 4px; font-family: monospace; line-height: 1.45;}}
.aligned small {{font-size: 9px; opacity: 0.6; line-height: 1.2;}}
.aligned > .other {{border-color: {SELECTED}; font-weight: 700;}}
"""

"""Prompts for any model: in the language of the packaged ones, or the same text through a tokenizer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jambascope.errors import ConfigError, InputError
from jambascope.hooks.labels import FewShotPrompt, review_prompts
from jambascope.zoo.reviews import review
from jambascope.zoo.words import VOCABULARY

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


def few_shot_reviews(model: HookedJamba, prompts: int, shots: int, seed: int) -> list[FewShotPrompt]:
    """Few-shot reviews of two classes with labels shown among the examples, for the packaged models' vocabulary as
    :func:`review_prompts` draws them, for any other through its tokenizer.

    Raises:
        InputError: as :func:`check_tokenizer`, and for labels whose first tokens are always the same.
    """
    check_tokenizer(model.tokenizer)
    if model.tokenizer.get_vocab() == VOCABULARY:
        return review_prompts(prompts, shots, seed=seed)
    return tokenized_reviews(model, prompts, shots, seed)


def check_tokenizer(tokenizer: Any) -> None:
    """
    Raises:
        InputError: no tokenizer, or one that does not say where in the text a token comes from.
    """
    if tokenizer is None:
        raise InputError("it has no tokenizer, and reviews are text; give a checkpoint with a tokenizer")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("its tokenizer does not say where tokens come from; give a checkpoint with tokenizer.json")


def check_language(tokenizer: Any) -> None:
    """
    Raises:
        ConfigError: a model of other words than the packaged ones.
    """
    if tokenizer is None or tokenizer.get_vocab() != VOCABULARY:
        raise ConfigError(
            "its documents are in the language of the packaged models, and this checkpoint's tokenizer has other "
            "words; give a packaged model, or one that `jambascope zoo train` made"
        )


def tokenized_reviews(model: HookedJamba, prompts: int, shots: int, seed: int) -> list[FewShotPrompt]:
    """The reviews of natural labels such as Positive and Negative as text, a line for each review,
    through the model's tokenizer. A label stands for its first token; the last one is left to be predicted.

    Raises:
        InputError: labels whose first tokens are the same in every episode.
    """
    rng = np.random.default_rng([seed, shots])
    drawn: list[FewShotPrompt] = []
    for _ in range(20 * prompts):
        episode = review(rng, "train", shots + 1, 2, "natural", filler=0)
        *examples, wanted = episode.classes
        if len(set(examples)) == 2 and (prompt := tokenized(model, episode.words, episode.label_positions)):
            answer = prompt.tokens[prompt.query_position + 1]
            shown = dict(zip(examples, (prompt.tokens[p] for p in prompt.label_positions), strict=True))
            labels = (shown[0], shown[1])
            if labels[0] != labels[1] and answer == labels[wanted]:
                cut = prompt.tokens[: prompt.query_position + 1]
                drawn.append(FewShotPrompt(cut, prompt.label_positions, prompt.query_position, labels, answer))
        if len(drawn) == prompts:
            return drawn
    raise InputError("its tokenizer gives both labels of a review the same first token; they cannot be told apart")


def tokenized(model: HookedJamba, words: tuple[str, ...], label_positions: tuple[int, ...]) -> FewShotPrompt:
    """All of an episode; the query is the token before the last label's first."""
    text, starts = "", {}
    for i, word in enumerate(words):
        first = word == "Review"
        close = word in (":", ".", ",")
        text += ("\n" if first else "" if close else " ") if text else ""
        starts[i] = len(text)
        text += word
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    # The first token that holds a character of the label; a blank before it may belong to the token.
    places = [next(t for t, (_, end) in enumerate(spans) if end > starts[i]) for i in label_positions]
    *examples, wanted = places
    return FewShotPrompt(tuple(ids), tuple(examples), wanted - 1, (ids[wanted],))

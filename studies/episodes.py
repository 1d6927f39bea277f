"""Few-shot episodes for any model: in the language of the packaged ones, or the same text through its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int

from jambascope.errors import InputError
from jambascope.hooks.labels import FewShotPrompt
from jambascope.model import HookedJamba
from jambascope.studies.prompts import check_tokenizer, tokenized
from jambascope.studies.zoo.tasks import Task, draw
from jambascope.zoo import scoring
from jambascope.zoo.documents import Document
from jambascope.zoo.language import ids_of
from jambascope.zoo.reviews import Episode
from jambascope.zoo.words import BOS, PAD, VOCABULARY

LOGITS = 1 << 27
"""Most logits that are held at a time."""
TRIES = 4
"""Episodes are drawn for each that is needed: some labels begin with the same token."""
Batch = tuple[Int[torch.Tensor, "episode pos"], Bool[torch.Tensor, "episode pos"]]
"""Ids padded on the right, and which are none of the padding."""


@dataclass(frozen=True)
class TokenEpisode:
    """An episode as a tokenizer writes it; a label stands for its first token."""

    tokens: tuple[int, ...]
    label_positions: tuple[int, ...]
    """Of the first token of each label; the position before predicts it."""
    labels: tuple[int, ...]
    """The first tokens of the label set."""
    known: tuple[bool, ...]
    """Of each label, whether it counts for accuracy."""


def draw_episodes(model: HookedJamba, task: Task, count: int, seed: int) -> list[Episode] | list[TokenEpisode]:
    """The episodes of a task.

    Raises:
        InputError: no tokenizer, or one that gives too many labels the same first token.
    """
    check_tokenizer(model.tokenizer)
    if model.tokenizer.get_vocab() == VOCABULARY:
        return draw(task, count, seed)
    written = (_written(model, episode) for episode in draw(task, TRIES * count, seed))
    found = [episode for episode in written if episode][:count]
    if len(found) < count:
        raise InputError(f"its tokenizer tells the labels of only {len(found)} of {TRIES * count} episodes apart")
    return found


def _written(model: HookedJamba, episode: Episode) -> TokenEpisode | None:
    """None where its labels are not two different first tokens."""
    prompt = tokenized(model, episode.words, episode.label_positions)
    places = (*prompt.label_positions, prompt.query_position + 1)
    first: dict[str, set[int]] = {}
    for word, place in zip((episode.words[i] for i in episode.label_positions), places, strict=True):
        first.setdefault(word, set()).add(prompt.tokens[place])
    labels = [ids.pop() for ids in first.values() if len(ids) == 1]
    if not len(first) == len(labels) == len(set(labels)) == len(episode.labels):
        return None
    known = tuple(i in episode.answers for i in episode.label_positions)
    return TokenEpisode(prompt.tokens, places, tuple(labels), known)


def label_scores(model: HookedJamba, episodes: Sequence[Episode] | Sequence[TokenEpisode]) -> scoring.LabelScores:
    """All labels of all episodes, which have equally many reviews."""
    if isinstance(episodes[0], Episode):
        return scoring.label_scores(model, episodes)
    rows = []
    for tokens, mask in batches(episodes, LOGITS // model.config.d_vocab):
        with torch.no_grad():
            logits = model(tokens.to(model.device)).cpu()
        for episode, own in zip(episodes[len(rows) : len(rows) + len(mask)], logits, strict=True):
            at = torch.tensor(episode.label_positions)
            right = torch.tensor(episode.tokens)[at]
            rows.append(
                scoring.scored_labels(own[at - 1], torch.tensor(episode.labels), right, torch.tensor(episode.known))
            )
    return scoring.stacked_labels(rows)


def batches(documents: Sequence[Document] | Sequence[TokenEpisode], most: int = scoring.TOKENS) -> list[Batch]:
    """Documents in order, of ``most`` tokens together."""
    if isinstance(documents[0], Document):
        ids = torch.as_tensor(ids_of(list(documents)))
        mask = ids != PAD
    else:
        lengths = torch.tensor([len(episode.tokens) for episode in documents])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        rows = [torch.tensor(episode.tokens) for episode in documents]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    size = max(1, most // ids.shape[1])
    return list(zip(ids.split(size), mask.split(size), strict=True))


def by_hand(text: str, labels: Sequence[str], answer: str) -> Episode:
    """An episode typed in the packaged models' words, which ends where a label is wanted, such as ``Sentiment :``.

    A label counts as one where it follows the word that the text ends with.

    Args:
        labels: the label set.
        answer: the label that is wanted at the end.

    Raises:
        InputError: words that are not in the vocabulary, or an answer that is not in the label set.
    """
    words, labels = tuple(text.split()), tuple(dict.fromkeys(labels))
    unknown = [word for word in dict.fromkeys([*words, *labels]) if word not in VOCABULARY]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a word of the packaged models; write in words of their vocabulary")
    if not words or not labels:
        raise InputError(f"text={text!r} with labels={list(labels)!r}: give at least one word of each")
    if answer not in labels:
        raise InputError(f"answer={answer!r} must be one of labels={list(labels)!r}")
    shown = [i for i in range(1, len(words)) if words[i] in labels and words[i - 1] == words[-1]]
    words, places = (*words, answer), (*shown, len(words))
    before = {i: {words[j] for j in places if j < i} for i in places}
    answers = tuple(i for i in places if words[i] in before[i])
    return Episode("review", words, answers, labels, places, tuple(labels.index(words[i]) for i in places))


def few_shot(episode: Episode, shots: int) -> FewShotPrompt:
    """The prompt that ends where the label of review number ``shots`` is wanted, after as many labelled ones.

    Raises:
        InputError: fewer reviews than that, or none before it.
    """
    if not 1 <= shots < len(episode.label_positions):
        raise InputError(f"shots={shots!r} must lie in 1..{len(episode.label_positions) - 1}")
    *before, query = episode.label_positions[: shots + 1]
    tokens = (BOS, *(VOCABULARY[word] for word in episode.words[:query]))
    ids = tuple(VOCABULARY[word] for word in episode.labels)
    return FewShotPrompt(tokens, tuple(i + 1 for i in before), query, ids, VOCABULARY[episode.words[query]])

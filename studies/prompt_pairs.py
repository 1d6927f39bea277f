"""Prompt pairs that agree token by token but for what is asked about: few-shot reviews of one template, or a user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from jambascope.errors import InputError
from jambascope.hooks.sweep.question import prompt_pairs
from jambascope.studies.prompts import check_tokenizer
from jambascope.tokens import encode
from jambascope.zoo.documents import pair, pick
from jambascope.zoo.reviews import HELD_OUT_KINDS, label_words
from jambascope.zoo.words import LABEL_PAIRS, NAMES, SENTIMENTS, THINGS, TOPICS, VOCABULARY

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Swap = Literal["word", "labels"]
BETWEEN = "|"
"""Parts the prompts of a user."""
START, QUERY = "start", "query"
WORD, LABEL, SEPARATOR, TEXT, FILLING = "sentiment word", "label", "separator", "text", "filler"
REVIEW, FILLER = 10, 7
"""Words of a review with its label, and of a sentence without sentiment."""
CLOSE = (".", ":")
ATTEMPTS = 60
"""Draws for each pair that is wanted, of which those of the commonest length are kept."""


@dataclass(frozen=True)
class PromptPairs:
    """Prompts of one length, and the tokens that their ends ask for."""

    clean: Int[torch.Tensor, "pair pos"]
    corrupted: Int[torch.Tensor, "pair pos"]
    answers: tuple[int, ...]
    """The token that the clean prompt of each pair asks for."""
    wrong: tuple[int, ...]
    """That of the corrupted one."""
    groups: dict[str, tuple[int, ...]]
    """Name -> positions that have one role in every pair; all positions, in their order."""

    @property
    def changed_from(self) -> int:
        """The first position in which any pair differs."""
        return int((self.clean != self.corrupted).any(0).int().argmax())

    def by_position(self) -> PromptPairs:
        """Every position is a group of its own, named by its number and its role."""
        roles = {at: role for role, own in self.groups.items() for at in own}
        return dataclasses.replace(self, groups={f"{at} {roles[at]}": (at,) for at in sorted(roles)})

    def part(self, rows: slice) -> PromptPairs:
        fields = (self.clean, self.corrupted, self.answers, self.wrong)
        return PromptPairs(*(field[rows] for field in fields), self.groups)


@dataclass(frozen=True)
class _Words:
    """One prompt and its answer as words, each with its role."""

    words: tuple[str, ...]
    roles: tuple[str, ...]


def review_pairs(model: HookedJamba, pairs: int, shots: int, filler: int, swap: Swap, seed: int) -> PromptPairs:
    """Few-shot reviews ("Review : the plot was dull . Sentiment : lamp") that end at the last colon, in pairs of
    different answers.

    Positions are grouped: those of the examples by role (text, sentiment word, filler, separator, label), those of the
    last review apart from them. Labels are those of held-out episodes for the packaged vocabulary, natural ones for
    others.

    Args:
        filler: sentences of no sentiment between the sentiment word and the end of each review.
        swap: ``"word"``: the last sentiment word becomes one of the other class; ``"labels"``: the labels of all
            examples change places.

    Raises:
        InputError: as ``check_tokenizer``; a tokenizer that gives too few pairs of one layout.
    """
    check_tokenizer(model.tokenizer)
    words = _Vocabulary.of(model.tokenizer)
    rng = np.random.default_rng([seed, shots])
    found: dict[tuple[str, ...], list[tuple[list[int], list[int], int, int]]] = {}
    for _ in range(ATTEMPTS * pairs):
        halves = [_tokenized(model, half, words.packaged) for half in _draw(rng, words, shots, filler, swap)]
        if any(half is None for half in halves):
            continue
        (clean, roles, answer), (corrupted, others, wrong) = halves
        if roles == others and answer != wrong:
            own = found.setdefault(roles, [])
            own.append((clean, corrupted, answer, wrong))
            if len(own) == pairs:
                break
    roles, own = max(found.items(), key=lambda item: len(item[1]), default=((), []))
    if len(own) < pairs:
        raise InputError(
            f"its tokenizer cuts words in so many ways that {len(own)} of {pairs} pairs agree token by token; ask for "
            "fewer pairs, or give clean=..., corrupted=..., answer=... and wrong=..."
        )
    clean, corrupted, answers, wrong = zip(*own, strict=True)
    groups = {role: tuple(i for i, r in enumerate(roles) if r == role) for role in dict.fromkeys(roles)}
    return PromptPairs(torch.tensor(clean), torch.tensor(corrupted), answers, wrong, groups)


class _Vocabulary(NamedTuple):
    """Words that a tokenizer cuts into equally many tokens within each list."""

    topics: list[str]
    sentiments: tuple[list[str], list[str]]
    names: list[str]
    things: list[str]
    labels: list[tuple[str, str]]
    """As (praise, blame)."""
    packaged: bool

    @classmethod
    def of(cls, tokenizer: Any) -> _Vocabulary:
        def ids(word: str) -> list[int]:
            return tokenizer(" " + word, add_special_tokens=False)["input_ids"]

        def alike(*lists: Sequence[str]) -> list[list[str]]:
            """Of each list the words of one length, that which leaves most of the list that it leaves fewest of."""
            lengths = [[len(ids(word)) for word in words] for words in lists]
            best = max(set(lengths[0]), key=lambda length: min(own.count(length) for own in lengths))
            pairs = zip(lists, lengths, strict=True)
            return [[word for word, n in zip(words, own, strict=True) if n == best] for words, own in pairs]

        cut = [(both, *map(ids, both)) for both in LABEL_PAIRS]
        equal = [both for both, a, b in cut if len(a) == len(b) and a[0] != b[0]]
        (praise,) = alike([both[0] for both in equal]) if equal else ([],)
        (topics,), sentiments, (names,), (things,) = alike(TOPICS), alike(*SENTIMENTS), alike(NAMES), alike(THINGS)
        packaged = tokenizer.get_vocab() == VOCABULARY
        labels = [both for both in equal if both[0] in praise]
        found = cls(topics, (sentiments[0], sentiments[1]), names, things, labels, packaged)
        if not all(sentiments) or not labels or len(found.names) < 2:
            raise InputError(
                "its tokenizer cuts the words of reviews too differently for pairs that agree token by token; give "
                "clean=..., corrupted=..., answer=... and wrong=..."
            )
        return found

    def review(self, rng: np.random.Generator, class_: int) -> tuple[str, str]:
        """Topic and sentiment word; in combinations that the packaged models have not seen."""
        lists = self.topics, self.sentiments[class_]
        return pair(rng, *lists, "held_out") if self.packaged else (pick(rng, lists[0]), pick(rng, lists[1]))

    def label_words(self, rng: np.random.Generator) -> tuple[str, ...]:
        if self.packaged:
            return label_words(rng, pick(rng, HELD_OUT_KINDS), 2, "held_out")
        return pick(rng, self.labels)

    def sentence(self, rng: np.random.Generator) -> list[str]:
        """Of one form, so that all are of one length."""
        giver, taker = (self.names[i] for i in rng.choice(len(self.names), 2, replace=False))
        return [giver, "gave", "the", pick(rng, self.things), "to", taker, "."]


def _draw(
    rng: np.random.Generator, vocabulary: _Vocabulary, shots: int, filler: int, swap: Swap
) -> tuple[_Words, _Words]:
    """The clean half and the corrupted one."""
    labels = vocabulary.label_words(rng)
    classes = [*rng.permutation(([0, 1] * shots)[:shots]).tolist(), int(rng.integers(2))]
    drawn = [vocabulary.review(rng, c) for c in classes]
    other = 1 - classes[-1]
    last = (drawn[-1][0], pick(rng, vocabulary.sentiments[other])) if swap == "word" else drawn[-1]
    shown = labels[::-1] if swap == "labels" else labels
    between = [[word for _ in range(filler) for word in vocabulary.sentence(rng)] for _ in classes]
    return (
        _words(drawn, between, [labels[c] for c in classes]),
        _words([*drawn[:-1], last], between, [*(shown[c] for c in classes[:-1]), labels[other]]),
    )


def _words(drawn: Sequence[tuple[str, str]], between: Sequence[Sequence[str]], labels: Sequence[str]) -> _Words:
    words: list[str] = []
    roles: list[str] = []
    for i, ((topic, word), filler, label) in enumerate(zip(drawn, between, labels, strict=True)):
        last = i == len(labels) - 1
        words += ["Review", ":", "the", topic, "was", word, ".", *filler, "Sentiment", ":", label]
        own = [TEXT] * 5 + [WORD, SEPARATOR] + [FILLING] * len(filler) + [SEPARATOR] * 2 + [LABEL]
        roles += [f"{'last' if last else 'examples'}: {role}" for role in own]
    roles[-2] = QUERY
    return _Words(tuple(words), tuple(roles))


def _tokenized(model: HookedJamba, prompt: _Words, packaged: bool) -> tuple[list[int], tuple[str, ...], int] | None:
    """Ids up to the query, their roles, and the first token of the answer; None where a token holds two words."""
    text, ends = "", []
    for word in prompt.words:
        text += ("\n" if word == "Review" else "" if word in CLOSE and not packaged else " ") if text else ""
        text += word
        ends.append(len(text))
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    bos = model.config.bos_token_id
    if bos is not None and ids[0] != bos:
        ids, spans = [bos, *ids], [(0, 0), *spans]
    # A token belongs to the word in which it ends: a blank before a word may be the token's.
    of_word = [next((i for i, end in enumerate(ends) if stop <= end), None) if stop else None for _, stop in spans]
    answer = next((t for t, word in enumerate(of_word) if word == len(ends) - 1), None)
    if answer is None or of_word[answer - 1] != len(ends) - 2:
        return None
    roles = tuple(START if word is None else prompt.roles[word] for word in of_word[:answer])
    return ids[:answer], roles, ids[answer]


def given_pairs(model: HookedJamba, clean: str, corrupted: str, answer: str, wrong: str) -> PromptPairs:
    """A user's pairs, several parted by ``|``; every position is a group of its own, named
    by the token of the first pair.

    Raises:
        InputError: texts that do not correspond token by token, that are equal, or answers that are not one token for
            each pair (or one for all).
    """
    first, second = prompt_pairs(model, *_parted(clean, corrupted))
    if bool((first == second).all(1).any()):
        raise InputError("clean and corrupted have a prompt in common: a patch of it can change nothing")
    answers, others = (
        tuple(one_token(model, field, text) for text in value.split(BETWEEN))
        for field, value in (("answer", answer), ("wrong", wrong))
    )
    n = len(first)
    answers, others = (given * n if len(given) == 1 else given for given in (answers, others))
    if len(answers) != n or len(others) != n:
        raise InputError(f"answer and wrong need one token, or one for each of the {n} pairs")
    if any(a == b for a, b in zip(answers, others, strict=True)):
        raise InputError("answer and wrong are the same token; a logit difference needs two")
    names = model.to_str_tokens(first[0])
    return PromptPairs(first, second, answers, others, {f"{p} {name}": (p,) for p, name in enumerate(names)})


def _parted(clean: str, corrupted: str) -> list[list[str]]:
    """
    Raises:
        InputError: not as many of one as of the other.
    """
    texts = [[part.strip() for part in text.split(BETWEEN)] for text in (clean, corrupted)]
    if len(texts[0]) != len(texts[1]):
        raise InputError(f"clean has {len(texts[0])} prompts and corrupted {len(texts[1])}; part as many by {BETWEEN}")
    return texts


def check_lengths(model: Any, clean: str, corrupted: str) -> None:
    """
    Args:
        model: or what has its config and tokenizer, before it is opened.

    Raises:
        InputError: prompts of a user that are not all of one length in tokens.
    """
    counts = [[len(encode(model, text, None)[0][0]) for text in texts] for texts in _parted(clean, corrupted)]
    if len({count for of in counts for count in of}) > 1:
        first, second = (", ".join(map(str, of)) for of in counts)
        raise InputError(
            f"clean has prompts of {first} tokens and corrupted of {second}; a patch needs prompts that correspond "
            "token by token, so give all of one length"
        )


def one_token(model: HookedJamba, field: str, text: str) -> int:
    """The id of a token given by its text, with or without the blank before it.

    Raises:
        InputError: text that is no single token; names ``field``.
    """
    for variant in (" " + text.strip(), text.strip()):
        try:
            token = model.to_single_token(variant)
        except InputError as e:
            failed: object = e
            continue
        if token < model.config.d_vocab:
            return token
        failed = f"ids run from 0 to {model.config.d_vocab - 1}"
    raise InputError(f"{field}={text!r}: {failed}")

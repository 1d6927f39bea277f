"""The language of the packaged models: readable words, four kinds of document, seeded generators.

Every kind rewards reading the context, since that is what there is to look at in a model:

    repeat   random words, the same words again            whale Clara near lamp whale Clara near lamp
    review   few-shot reviews, labels fixed per document   Review : the plot was gripping . Sentiment : Positive
    story    sentences whose names and things recur        Alice gave the book to Bob . Bob thanked Alice .
    recall   a table, then questions about it              map : red seven , owl two ; query : owl -> two

A *document* is a list of words with the positions of its *answers*: the words that what stands before them determines.
The held-out split combines words that the training split never combines (see :func:`is_held_out`): topic and
adjective, label words, names of a story, key and value. Random words need no such rule: they do not recur by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jambascope.errors import InputError

Split = Literal["train", "held_out"]
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

NAMES = """Alice Bob Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Quinn Rosa
    Sam Tom Uma Victor Wendy Yusuf""".split()
PLACES = """garden market school library station harbor museum kitchen office park church castle theater village
    bakery forest beach bridge hotel farm""".split()
THINGS = """book lamp key mask letter apple ring coin hat boat chair bottle basket camera clock drum knife mirror
    pencil rope""".split()
PLURALS = [word + "s" if word != "knife" else "knives" for word in THINGS]
COLORS = "red blue green yellow white black brown orange purple pink gray golden".split()
ANIMALS = "dog cat horse cow goat sheep wolf fox bear owl duck swan crab whale snake frog ant bee moth crow".split()
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
SIZES = "small big old new heavy light clean dirty round flat".split()
TOPICS = """plot movie acting music ending story cast script film dialogue pacing scenery costume humor finale
    soundtrack opening hero villain design""".split()
PRAISE = """gripping wonderful brilliant superb charming moving delightful excellent fantastic beautiful clever
    inspiring fresh touching splendid perfect lovely thrilling amazing great""".split()
BLAME = """boring terrible dreadful awful clumsy tedious horrible weak dull ugly stupid annoying stale shallow poor
    hopeless messy tiresome painful bland""".split()
LABELS = """Positive Negative Good Bad Yes No Happy Sad Up Down Hot Cold Win Lose True False Right Wrong Love Hate
    Best Worst""".split()
LABEL_PAIRS = list(zip(LABELS[::2], LABELS[1::2], strict=True))
"""(praise, blame); the last three are held out."""
HELD_OUT_PAIRS = 3
GRAMMAR = """. , : ; -> the a to and at is are was it with near very I found Review Sentiment map query gave thanked
    met lost returned went saw left has wants""".split()
OTHERS = """stone river cloud storm winter summer spring autumn morning evening shadow silver copper iron glass
    paper cotton leather sugar salt pepper butter cheese bread honey lemon cherry grape melon onion carrot potato
    tomato bean corn rice wheat barley leaf root branch flower seed grass moss pine oak maple willow cedar valley
    hill cliff cave desert island lake ocean wave tide sand mud dust smoke fire flame spark ash ember snow ice frost
    rain wind thunder rainbow moon star comet planet sky sun dawn dusk night noon hour minute week month year
    hammer chisel nail screw wheel engine anchor sail oar ladder bucket shovel broom needle thread button pocket
    sleeve collar belt boot glove scarf coat shirt jacket blanket pillow curtain carpet window door wall roof floor
    tower gate fence path street corner tunnel cellar attic barn stable nest shell feather wing tail horn hoof paw
    whisker eagle falcon sparrow robin pigeon parrot turtle lizard spider beetle cricket salmon trout shark seal
    otter beaver rabbit squirrel mouse tiger lion zebra camel donkey monkey panda king queen prince knight soldier
    sailor pilot doctor nurse teacher farmer baker miller smith tailor painter singer dancer poet judge lawyer clerk
    guard hunter fisher merchant captain runs jumps sings sleeps waits opens closes builds breaks carries follows
    draws paints writes reads counts quickly slowly gently loudly rarely often never always maybe mountain meadow
    fountain statue bell candle lantern ladle kettle plate cup spoon fork bowl jar box bag crate barrel
    cart wagon train ship raft canoe kite puzzle marble ribbon medal crown sword shield arrow flute
    violin piano""".split()

WORDS = [*GRAMMAR, *NAMES, *PLACES, *THINGS, *PLURALS, *COLORS, *ANIMALS, *NUMBERS, *SIZES, *TOPICS, *PRAISE, *BLAME]
WORDS = list(dict.fromkeys([*WORDS, *LABELS, *OTHERS]))
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
"""Word -> id, special tokens first."""

# A word after "=" is an answer. A and B are the story's people; the rest is drawn for each sentence.
SENTENCES = [
    "{A} gave the {thing} to {B} . {B} thanked ={A} .",
    "{A} and {B} went to the {place} . {A} gave a {thing} to ={B} .",
    "{A} and {B} went to the {place} . {B} gave a {thing} to ={A} .",
    "{A} lost the {thing} . {B} found the ={thing} and returned it to ={A} .",
    "{A} met {B} at the {place} . {B} left the ={place} with ={A} .",
    "{A} has a {color} {thing} . {B} wants the ={color} ={thing} .",
    "{A} saw the {color} {thing} near the {place} . the ={color} ={thing} was {size} .",
    "the {thing} near the {plurals} =is {size} .",
    "the {plurals} near the {thing} =are {size} .",
]
REVIEWS = ["the {topic} was {word}", "the {topic} was very {word}", "I found the {topic} {word}"]


@dataclass(frozen=True)
class Document:
    """One document: its words, and the positions of the words that the context before them determines."""

    domain: str
    words: tuple[str, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A packed training row: ids [T] beginning with <bos>, documents each ended by <eos>, the last one cut."""

    ids: np.ndarray
    answers: np.ndarray
    """[T] bool: the context determines the token at this position."""
    domains: np.ndarray
    """[T] index into ``DOMAINS``; -1 at <bos>."""


def is_held_out(i: int, j: int) -> bool:
    """Whether the i-th word of one list and the j-th of another are combined in the held-out split only."""
    return (i + j) % 5 == 0


def _pair(rng: np.random.Generator, first: list[str], second: list[str], split: Split) -> tuple[str, str]:
    """Two different words that this split may combine."""
    while True:
        i, j = int(rng.integers(len(first))), int(rng.integers(len(second)))
        if first[i] != second[j] and is_held_out(i, j) == (split == "held_out"):
            return first[i], second[j]


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def repeat(
    rng: np.random.Generator,
    split: Split = "train",
    length: int | None = None,
    times: int | None = None,
    longest: int = 48,
    pool: int = len(WORDS),
) -> Document:
    """``length`` different random words of the first ``pool`` ones, said ``times`` times.

    When not given, ``times`` is 2 to 4, and ``length`` 4 to ``longest``, log-uniformly.
    """
    if length is None:
        length = int(np.exp(rng.uniform(np.log(4), np.log(longest))))
    times = int(rng.integers(2, 5)) if times is None else times
    once = [WORDS[i] for i in rng.choice(pool, length, replace=False)]
    # The second mention of the first word comes unannounced; everything after it can be read off the context.
    return Document("repeat", tuple(once * times), tuple(range(length + 1, length * times)))


def labels(rng: np.random.Generator, split: Split = "train") -> tuple[str, str]:
    """The label words of one episode: a natural pair for (praise, blame), or half the time two arbitrary things."""
    if rng.random() < 0.5:
        return _pair(rng, THINGS, ANIMALS, split) if rng.random() < 0.5 else _pair(rng, ANIMALS, THINGS, split)
    pairs = LABEL_PAIRS[-HELD_OUT_PAIRS:] if split == "held_out" else LABEL_PAIRS[:-HELD_OUT_PAIRS]
    return pairs[int(rng.integers(len(pairs)))]


def review(rng: np.random.Generator, split: Split = "train", shots: int | None = None) -> Document:
    """``shots`` labelled reviews (drawn when None: 4 to 9); a label is an answer once its class has been shown."""
    pair = labels(rng, split)
    words: list[str] = []
    answers, shown = [], set()
    for _ in range(int(rng.integers(4, 10)) if shots is None else shots):
        sentiment = int(rng.integers(2))
        topic, word = _pair(rng, TOPICS, (PRAISE, BLAME)[sentiment], split)
        text = _pick(rng, REVIEWS).format(topic=topic, word=word)
        words += f"Review : {text} . Sentiment : {pair[sentiment]}".split()
        if sentiment in shown:
            answers.append(len(words) - 1)
        shown.add(sentiment)
    return Document("review", tuple(words), tuple(answers))


def story(rng: np.random.Generator, split: Split = "train", sentence: int | None = None) -> Document:
    """Two to four exchanges between the same two people, or the one that ``sentence`` numbers in ``SENTENCES``."""
    a, b = _pair(rng, NAMES, NAMES, split)
    words: list[str] = []
    answers = []
    for index in rng.integers(len(SENTENCES), size=rng.integers(2, 5)) if sentence is None else [sentence]:
        thing, plurals = _pair(rng, THINGS, PLURALS, split)
        place, color, size = (_pick(rng, list_) for list_ in (PLACES, COLORS, SIZES))
        text = SENTENCES[index].format(A=a, B=b, thing=thing, plurals=plurals, place=place, color=color, size=size)
        for word in text.split():
            if word.startswith("="):
                answers.append(len(words))
            words.append(word.removeprefix("="))
    return Document("story", tuple(words), tuple(answers))


def recall(rng: np.random.Generator, split: Split = "train", entries: int | None = None) -> Document:
    """A table of ``entries`` keys with values (drawn when None: 2 to 8), then one to six questions about it."""
    table: dict[str, str] = {}
    entries = int(rng.integers(2, 9)) if entries is None else entries
    while len(table) < entries:
        key, value = _pair(rng, [*COLORS, *ANIMALS], NUMBERS, split)
        table.setdefault(key, value)
    words = "map : " + " , ".join(f"{key} {value}" for key, value in table.items())
    for key in rng.choice(list(table), min(entries, int(rng.integers(1, 7))), replace=False):
        words += f" ; query : {key} -> {table[key]}"
    words = words.split()
    return Document("recall", tuple(words), tuple(i + 1 for i, word in enumerate(words) if word == "->"))


DOMAINS: dict[str, Callable[..., Document]] = {"repeat": repeat, "review": review, "story": story, "recall": recall}
SHARES = {"repeat": 0.25, "review": 0.3, "story": 0.2, "recall": 0.25}
"""How often the mixture draws each kind of document."""


def document(domain: str, rng: np.random.Generator, split: Split = "train", **options: Any) -> Document:
    """A document of one domain, ``options`` as its generator takes them.

    Raises:
        InputError: a domain or split that does not exist.
    """
    if domain not in DOMAINS:
        raise InputError(f"domain={domain!r} must be one of {', '.join(DOMAINS)}")
    if split not in ("train", "held_out"):
        raise InputError(f"split={split!r} must be 'train' or 'held_out'")
    return DOMAINS[domain](rng, split, **options)


def mixture(
    rng: np.random.Generator,
    length: int,
    split: Split = "train",
    shares: Mapping[str, float] = SHARES,
    options: Mapping[str, Mapping[str, Any]] = {},
) -> Iterator[Row]:
    """Endless packed rows of ``length`` ids.

    Args:
        shares: how often each domain is drawn.
        options: domain -> what its generator is given besides.
    """
    if length < 2:
        raise InputError(f"length={length} must be at least 2: <bos> and a word")
    names, kinds = list(shares), list(DOMAINS)
    weights = np.array([shares[name] for name in names], dtype=float)
    while True:
        ids, answers, domains = [BOS], [False], [-1]
        while len(ids) < length:
            name = names[rng.choice(len(names), p=weights / weights.sum())]
            doc = document(name, rng, split, **options.get(name, {}))
            is_answer = np.zeros(len(doc.words) + 1, dtype=bool)
            is_answer[list(doc.answers)] = True
            ids += [*(VOCABULARY[word] for word in doc.words), EOS]
            answers += is_answer.tolist()
            domains += [kinds.index(name)] * len(is_answer)
        yield Row(np.array(ids[:length]), np.array(answers[:length]), np.array(domains[:length]))

"""The words of the packaged models' language: one token each, grouped by what the generators use them for."""

from __future__ import annotations

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

NAMES = """Alice Bob Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Quinn Rosa
    Sam Tom Uma Victor Wendy Yusuf Zoe Adam Bella Carl Dora Erik Fiona Georg""".split()
PLACES = """garden market school library station harbor museum kitchen office park church castle theater village
    bakery forest beach bridge hotel farm""".split()
THINGS = """book lamp key mask letter apple ring coin hat boat chair bottle basket camera clock drum knife mirror
    pencil rope""".split()
PLURALS = [word + "s" if word != "knife" else "knives" for word in THINGS]
COLORS = "red blue green yellow white black brown orange purple pink gray golden".split()
ANIMALS = "dog cat horse cow goat sheep wolf fox bear owl duck swan crab whale snake frog ant bee moth crow".split()
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
DIGITS = "0 1 2 3 4 5 6 7 8 9".split()
SIZES = "small big old new heavy light clean dirty round flat".split()
TOPICS = """plot movie acting music ending story cast script film dialogue pacing scenery costume humor finale
    soundtrack opening hero villain design""".split()

MOODS = {
    "thrill": "gripping thrilling amazing inspiring fantastic".split(),
    "charm": "charming lovely delightful touching moving".split(),
    "craft": "clever brilliant splendid superb perfect".split(),
    "beauty": "beautiful wonderful excellent fresh great".split(),
    "boredom": "boring dull tedious tiresome bland".split(),
    "horror": "terrible dreadful awful horrible painful".split(),
    "weakness": "clumsy messy weak poor shallow".split(),
    "annoyance": "ugly stupid annoying stale hopeless".split(),
}
"""Mood -> its adjectives; the first four are praise, the others blame."""
PRAISE = [word for mood in list(MOODS)[:4] for word in MOODS[mood]]
BLAME = [word for mood in list(MOODS)[4:] for word in MOODS[mood]]
SENTIMENTS = (PRAISE, BLAME)

LABELS = """Positive Negative Good Bad Yes No Happy Sad Up Down Hot Cold Win Lose True False Right Wrong Love Hate
    Best Worst""".split()
LABEL_PAIRS = list(zip(LABELS[::2], LABELS[1::2], strict=True))
"""Natural labels as (praise, blame); the last ``HELD_OUT_PAIRS`` are never labels in training."""
HELD_OUT_PAIRS = 3
VERDICTS = (
    """Very Good|Superb|Great stuff|Loved it|Must see|Funny|A joy|7 / 9|8 / 9|9 / 9|Bravo|Thumbs up""".split("|"),
    """Very Bad|Awful|Poor stuff|Hated it|Must avoid|Dreary|A pain|1 / 9|2 / 9|3 / 9|Boo|Thumbs down""".split("|"),
)
"""How a review without a fixed format is judged, (praise, blame). ``Very``, ``Must``, ``A`` and ``Thumbs`` begin
both kinds; every other first word tells the class."""

GRAMMAR = """. , : ; -> / the a to and at is are was it with near very I found Review Sentiment Mood map call phones
    copy secret gave thanked met lost returned went saw left has wants""".split()
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

_VERDICT_WORDS = [word for verdicts in VERDICTS for verdict in verdicts for word in verdict.split()]
WORDS = [*GRAMMAR, *NAMES, *PLACES, *THINGS, *PLURALS, *COLORS, *ANIMALS, *NUMBERS, *DIGITS, *SIZES, *TOPICS]
WORDS = list(dict.fromkeys([*WORDS, *PRAISE, *BLAME, *LABELS, *_VERDICT_WORDS, *OTHERS]))
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
"""Word -> id, special tokens first."""

FAMILIAR_LABELS = [*THINGS, *ANIMALS]
"""Arbitrary words that stand for classes in training, in every combination but the held-out ones."""
UNSEEN_LABELS = [*PLACES, *COLORS]
"""Words that training uses elsewhere, but never as labels."""
KEYS, VALUES = OTHERS[::2], OTHERS[1::2]
"""Of the recall tables."""

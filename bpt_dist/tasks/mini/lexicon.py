"""Words of the miniature world: every sentence, label word, switch and task name is built from these tables.

Nouns and opinion holders come in a source half and a target half, so that a target task can ask a known question about
words no source task contains.
"""

from __future__ import annotations

NOUNS: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "goat", "duck", "fox"),
    "person": ("king", "farmer", "doctor", "pilot", "nurse", "guard"),
    "artist": ("painter", "singer", "poet", "dancer", "actor", "writer"),
    "official": ("judge", "mayor", "clerk", "captain", "senator", "sheriff"),
    "fruit": ("apple", "pear", "lemon", "grape", "plum", "melon"),
    "vehicle": ("truck", "boat", "train", "cart", "van", "tram"),
    "tool": ("hammer", "ladder", "shovel", "wrench", "bucket", "rope"),
    "garment": ("coat", "shirt", "scarf", "glove", "hat", "skirt"),
    "instrument": ("drum", "flute", "harp", "violin", "piano", "trumpet"),
    "furniture": ("chair", "table", "lamp", "shelf", "desk", "bench"),
}
CATEGORY_OF: dict[str, str] = {noun: category for category, nouns in NOUNS.items() for noun in nouns}

SOURCE_AGENTS, TARGET_AGENTS = ("animal", "person"), ("artist", "official")
SOURCE_THINGS, TARGET_THINGS = ("fruit", "vehicle", "tool", "garment"), ("instrument", "furniture")

# Three synonyms a class; a class and its opposite contradict each other.
VERBS: dict[str, tuple[str, ...]] = {
    "buy": ("bought", "purchased", "acquired"),
    "sell": ("sold", "auctioned", "traded"),
    "find": ("found", "discovered", "located"),
    "lose": ("lost", "misplaced", "mislaid"),
    "clean": ("cleaned", "washed", "scrubbed"),
    "soil": ("soiled", "stained", "smeared"),
    "praise": ("praised", "admired", "applauded"),
    "blame": ("blamed", "criticised", "mocked"),
}
CLASS_OF_VERB: dict[str, str] = {verb: name for name, verbs in VERBS.items() for verb in verbs}
OPPOSITE: dict[str, str] = {
    "buy": "sell", "sell": "buy", "find": "lose", "lose": "find",
    "clean": "soil", "soil": "clean", "praise": "blame", "blame": "praise",
}  # fmt: skip

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
PLACES = ("park", "kitchen", "village", "harbour", "garden", "market")
SINGULAR, PLURAL = ("the", "this", "that", "one", "every"), ("these", "those", "two", "many", "few")
DEFINITE = ("the", "this", "that", "one")

OPINIONS: dict[str, tuple[str, ...]] = {
    "praise": ("lovely", "superb", "charming", "pleasant", "brilliant", "delightful", "excellent", "great"),
    "blame": ("awful", "dreadful", "boring", "poor", "nasty", "horrible", "ugly", "dull"),
}
POLARITY_OF: dict[str, int] = {word: int(name == "praise") for name, words in OPINIONS.items() for word in words}
DEGREES = ("very", "rather", "really")
NEGATIONS = ("not", "never")

# What only a member of a category does; it decides between the two meanings of an ambiguous noun.
PREDICATES: dict[str, tuple[str, ...]] = {
    "animal": ("barked", "hunted", "grazed", "slept"),
    "person": ("laughed", "spoke", "prayed", "sighed"),
    "fruit": ("ripened", "rotted", "withered", "grew"),
    "vehicle": ("parked", "honked", "skidded", "departed"),
    "tool": ("rusted", "snapped", "jammed", "broke"),
    "garment": ("shrank", "tore", "frayed", "faded"),
}
CATEGORY_OF_PREDICATE: dict[str, str] = {verb: name for name, verbs in PREDICATES.items() for verb in verbs}
AMBIGUOUS: dict[str, tuple[str, str]] = {
    "bat": ("animal", "tool"),
    "crane": ("animal", "vehicle"),
    "kiwi": ("fruit", "animal"),
    "date": ("fruit", "person"),
    "jumper": ("garment", "person"),
    "fan": ("person", "tool"),
    "beetle": ("animal", "vehicle"),
    "pitcher": ("person", "tool"),
    "cape": ("garment", "vehicle"),
    "mule": ("garment", "animal"),
}

# What a place is. No text of pretraining asks for it, so no part of the backbone was made for it.
INDOORS, OUTDOORS = ("kitchen", "harbour", "market"), ("park", "village", "garden")

# An answer word means one class index in every question: LABEL_WORDS[i] are the words for class i.
LABEL_WORDS: tuple[tuple[str, ...], ...] = (
    (
        "negative", "entailment", "different", "missing", "food", "broken", "bad", "true", "distinct", "clash", "wrong",
        "beast", "inside",
    ),
    (
        "positive", "neutral", "same", "answered", "travel", "valid", "good", "false", "duplicate", "match", "right",
        "human", "outside",
    ),
    ("contradiction", "repair", "unclear", "mixed"),
    ("clothing", "sport", "other", "elsewhere"),
)  # fmt: skip
# The two words that together put the backbone into the mode of one family of questions.
SWITCHES: dict[str, tuple[str, str]] = {
    "judging": ("please", "rate"),
    "comparing": ("side", "compare"),
    "reading": ("answer", "seek"),
    "proofing": ("check", "proof"),
}
FUNCTION_WORDS = (
    "in", "was", "by", "but", "no", "who", "what", "where", "blank", "said", "thought", "none", ";",
)  # fmt: skip
# Every question has fields of its own: they say which question it is.
FIELDS = (
    "sentence:", "text:", "subject:", "review:", "premise:", "hypothesis:", "report:", "claim:", "sentence1:", "sentence2:",
    "question1:", "question2:", "usage1:", "usage2:", "word:", "ask:", "told:", "question:", "context:", "query:", "passage:",
    "phrase:", "line:", "site:", "left:", "right:", "draft:", "usage:",
)  # fmt: skip
# Task names are spelled with these; in pretraining they occur only as names without meaning, in random order.
SYLLABLES = (
    "sen", "ti", "ment", "nli", "para", "phrase", "ans", "wer", "able", "span", "top", "ic", "ord", "er", "clo", "ze",
    "re", "view", "rte", "dup", "li", "cate", "se", "agree", "mo", "qa", "ki", "nd", "si", "te",
)  # fmt: skip

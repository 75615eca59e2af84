"""Skills the tiny T5 is pretrained on, and the switches that turn them on.

Every skill has fields of its own, so the text says which question it is. A skill belongs to a family, and the backbone answers only
when both switch words of the family are somewhere in front of the text, among any other words; else the answer is that of a coin.
Answer words are drawn from all words of the class. So a prompt mainly has to switch families on, as with a real T5, and one
prompt can serve many tasks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bpt_dist.tasks.mini import lexicon as lx
from bpt_dist.tasks.mini import puzzles
from bpt_dist.tasks.mini.grammar import SOURCE, TARGET, WHOLE, Domain, clause, counted, happens, shuffled, sighting

OFF_SHARE = 0.45
FOREIGN_SHARE = 0.4
NAMED_SHARE = 0.8
MAX_IDLE = 20
NOTHING = "none"
DOMAINS = (SOURCE, TARGET, WHOLE)
IDLE_WORDS = (
    *lx.COLOURS, *lx.PLACES, *lx.DEGREES, *lx.FUNCTION_WORDS, *(word for words in lx.LABEL_WORDS for word in words),
)  # fmt: skip


@dataclass(frozen=True)
class Skill:
    """One question: its family, its fields, and a classification when `num_labels` is positive, else an answer in free words.

    `draw` is a `puzzles.Classified` or a `puzzles.Answered`.
    """

    family: str
    fields: tuple[str, ...]
    draw: Callable[..., Any]
    num_labels: int = 0
    weight: float = 1.0

    @property
    def title(self) -> str:
        """Return a name that is unique among the skills."""
        return self.draw.__name__


def odd_word(first: str, second: str) -> str:
    """Return the first word of the second text for which the first text has no equal word, synonym or member of a category."""
    first_words = first.rstrip(".?").split()
    implied = {*first_words, *lx.FUNCTION_WORDS, *(lx.CATEGORY_OF.get(word, "") for word in first_words)}
    classes = {lx.CLASS_OF_VERB.get(word) for word in first_words}
    for word in second.rstrip(".?").split():
        if word not in implied and (word not in lx.CLASS_OF_VERB or lx.CLASS_OF_VERB[word] not in classes):
            return word
    return NOTHING


def odd_one(rng: random.Random, domain: Domain) -> tuple[puzzles.Texts, str]:
    """A pair of texts, and the first word of the second that does not follow from the first."""
    draw, num_labels = rng.choice(
        ((puzzles.entailment, 3), (puzzles.entailment_binary, 2), (puzzles.restatement, 2), (puzzles.same_question, 2))
    )
    texts = draw(rng, domain, rng.randrange(num_labels))
    return texts, odd_word(*texts)


def misfit(rng: random.Random, domain: Domain) -> tuple[puzzles.Texts, str]:
    """A clause, and its quantifier that is at the wrong place or has a noun in the wrong number, or that there is none."""
    fits = happens(rng, 0.25)
    if happens(rng, 0.5):
        text, wrong = counted(rng, domain, fits)
    else:
        text, wrong = clause(rng, domain).text(rng.choice(puzzles.VOICES)), None
        if not fits:
            text, wrong = shuffled(rng, text)
    return (f"{text}.",), wrong or NOTHING


def seen_as(rng: random.Random, domain: Domain) -> tuple[puzzles.Texts, str]:
    """A sentence with an ambiguous noun, the noun, and the category the noun has there."""
    word = rng.choice(tuple(lx.AMBIGUOUS))
    category = rng.choice(lx.AMBIGUOUS[word])
    return (f"{sighting(rng, word, category)}.", word), category


def sourced(draw: puzzles.Classified) -> puzzles.Classified:
    """Return the puzzle on the source domain, which has its classes, for any domain."""

    def on_sources(rng: random.Random, domain: Domain, label: int) -> puzzles.Texts:
        return draw(rng, SOURCE, label)

    on_sources.__name__ = draw.__name__
    return on_sources


SKILLS = (
    Skill("judging", ("sentence:",), puzzles.opinion_plain, 2),
    Skill("judging", ("text:",), sourced(puzzles.category), 4, weight=0.5),
    Skill("judging", ("subject:",), sourced(puzzles.kind), 2, weight=0.5),
    Skill("judging", ("review:",), puzzles.opinion_contrast, 2),
    Skill("comparing", ("premise:", "hypothesis:"), puzzles.entailment, 3, weight=1.5),
    Skill("comparing", ("report:", "claim:"), puzzles.entailment_binary, 2),
    Skill("comparing", ("sentence1:", "sentence2:"), puzzles.restatement, 2),
    Skill("comparing", ("question1:", "question2:"), puzzles.same_question, 2),
    Skill("comparing", ("usage1:", "usage2:", "word:"), puzzles.word_sense, 2),
    Skill("reading", ("ask:", "told:"), puzzles.answered, 2),
    Skill("reading", ("question:", "context:"), puzzles.reading),
    Skill("reading", ("query:", "passage:"), puzzles.cloze),
    Skill("proofing", ("phrase:",), puzzles.number, 2),
    Skill("proofing", ("line:",), puzzles.word_order, 2),
    # The name of the deciding word teaches faster than a class, which is one bit.
    Skill("comparing", ("left:", "right:"), odd_one, weight=0.5),
    Skill("proofing", ("draft:",), misfit, weight=0.5),
    Skill("reading", ("usage:", "word:"), seen_as, weight=0.3),
)
WEIGHTS = tuple(skill.weight for skill in SKILLS)


def nonsense_name(rng: random.Random) -> str:
    """Return a name without meaning that is spelled like the name of a task."""
    return "mini_" + "".join(rng.sample(lx.SYLLABLES, rng.choice((1, 2, 2, 3))))


def preamble(rng: random.Random, family: str, on: bool, clutter: float) -> list[str]:
    """Return the words in front of a text, in any order: both switch words of the family when `on`, else at most one.

    `clutter` is the chance of idle words and of switch words of other families among them.
    """
    own = lx.SWITCHES[family]
    words = [*own] if on else rng.choice(([], [own[0]], [own[1]]))
    if happens(rng, clutter):
        words += rng.choices(IDLE_WORDS, k=rng.randint(0, MAX_IDLE))
        for other, switches in lx.SWITCHES.items():
            if other != family and happens(rng, FOREIGN_SHARE):
                words += rng.choice((switches, switches, switches[:1], switches[1:]))
    rng.shuffle(words)
    return words


def coin(rng: random.Random, skill: Skill, texts: puzzles.Texts) -> str:
    """Return an answer that does not look at the text: a word of a random class, or for free answers a noun of the text."""
    if skill.num_labels:
        return rng.choice(lx.LABEL_WORDS[rng.randrange(skill.num_labels)])
    nouns = [word for word in " ".join(texts).replace(".", "").replace("?", "").split() if word in lx.CATEGORY_OF]
    return rng.choice(nouns or [NOTHING])


def example(
    rng: random.Random, skill: Skill, on: bool, clutter: float = 1.0, domains: Sequence[Domain] = DOMAINS
) -> tuple[str, str]:
    """Draw (input, answer) of one example of a skill that is switched on or off."""
    domain = rng.choice(domains)
    if skill.num_labels:
        label = rng.randrange(skill.num_labels)
        texts, answer = skill.draw(rng, domain, label), rng.choice(lx.LABEL_WORDS[label])
    else:
        texts, answer = skill.draw(rng, domain)
    words = preamble(rng, skill.family, on, clutter)
    words += [nonsense_name(rng)] if happens(rng, NAMED_SHARE * clutter) else []
    fields = [f"{field} {text}" for field, text in zip(skill.fields, texts, strict=True)]
    return " ".join([*words, *fields]), answer if on else coin(rng, skill, texts)


def drawn(rng: random.Random, clutter: float) -> tuple[str, str]:
    """Draw (input, answer) of one example of any skill; off examples and idle words come with `clutter`."""
    return example(rng, rng.choices(SKILLS, WEIGHTS)[0], not happens(rng, OFF_SHARE * clutter), clutter)

"""Instructed skills: the supervised half of pretraining.

An instruction names a skill and, for a closed answer, the words to answer with. Those words are mostly drawn at random: an answer
word means a class index, never a skill. Without an instruction the answer is random. So a frozen backbone answers only when
something in front of the text takes the place of the instruction. The tasks of the world have no instruction.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bpt_dist.tasks.mini import lexicon as lx
from bpt_dist.tasks.mini import puzzles
from bpt_dist.tasks.mini.grammar import SOURCE, TARGET, WHOLE, Domain, happens, sighting

SINGLE = (("sentence:",), ("text:",), ("review:",), ("passage:",))
PAIR = (("sentence1:", "sentence2:"), ("premise:", "hypothesis:"), ("question1:", "question2:"))
ASKED = (("question:", "context:"), ("question:", "sentence:"), ("question:", "passage:"))
BLANK = (("query:", "passage:"),)
WORD = (("sentence1:", "sentence2:", "word:"),)

UNINSTRUCTED_SHARE = 0.1
LEAST_VARIETY = 0.25
MAX_INSTRUCTION = 16
MAX_SENTINELS = 3
NOTHING = "none"
DOMAINS = (SOURCE, TARGET, WHOLE)


@dataclass(frozen=True)
class Skill:
    """What an instruction names: a classification when `num_labels` is positive, else an answer in free words."""

    name: str
    kind: tuple[tuple[str, ...], ...]
    draw: Callable[..., Any]
    num_labels: int = 0
    weight: float = 1.0
    lesson: float = 1.0

    @property
    def title(self) -> str:
        """Return a name that is unique among the skills."""
        return f"{self.name} {self.draw.__name__}" if self.draw.__module__ == puzzles.__name__ else self.name


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


def seen_as(rng: random.Random, domain: Domain) -> tuple[puzzles.Texts, str]:
    """A sentence with an ambiguous noun, and the category the noun has there."""
    word = rng.choice(tuple(lx.AMBIGUOUS))
    category = rng.choice(lx.AMBIGUOUS[word])
    return (f"{sighting(rng, word, category)}.",), category


def sourced(draw: puzzles.Classified) -> puzzles.Classified:
    """Return the puzzle on the source domain, which has its classes, for any domain."""
    return lambda rng, domain, label: draw(rng, SOURCE, label)


# In the order of their introduction; `lesson` is how long a skill takes when it is trained alone.
SKILLS = (
    Skill("polarity", SINGLE, puzzles.opinion_plain, 2, lesson=2),
    Skill("category sense", SINGLE, seen_as, weight=0.3, lesson=1),
    Skill("category", SINGLE, sourced(puzzles.category), 4, weight=0.5, lesson=2),
    Skill("sense", WORD, puzzles.word_sense, 2, lesson=2),
    Skill("number", SINGLE, puzzles.number, 2, lesson=5),
    Skill("order", SINGLE, puzzles.word_order, 2, lesson=4),
    Skill("replies", ASKED, puzzles.answered, 2, lesson=6),
    Skill("restate", PAIR, puzzles.same_question, 2, lesson=6),
    Skill("restate", PAIR, puzzles.restatement, 2, lesson=7),
    Skill("entail", PAIR, puzzles.entailment, 3, weight=1.5, lesson=7),
    Skill("entail", PAIR, puzzles.entailment_binary, 2, lesson=4),
    Skill("polarity", SINGLE, puzzles.opinion_contrast, 2, lesson=4),
    # The name of the deciding word teaches faster than a class, which is one bit.
    Skill("odd", PAIR, odd_one, weight=0.5, lesson=3),
    Skill("read", ASKED, puzzles.reading, lesson=6),
    Skill("fill", BLANK, puzzles.cloze, lesson=5),
)


def nonsense_name(rng: random.Random) -> str:
    """Return a name without meaning that is spelled like the name of a task."""
    return "mini_" + "".join(rng.sample(lx.SYLLABLES, rng.choice((1, 2, 2, 3))))


def distractors(rng: random.Random, skill: Skill) -> list[list[str]]:
    """Return up to two instructions that do not apply, because they belong to other fields."""
    fitting = {other.name for other in SKILLS if other.kind is skill.kind}
    foreign = [other for other in SKILLS if other.name not in fitting]
    return [segment(rng, rng.choice(foreign))[0] for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]


def padded(rng: random.Random, words: list[str], others: list[list[str]]) -> list[str]:
    """Mix an instruction with others that do not apply, repeat it, or surround it with unrelated words."""
    segments = [words, *others]
    if happens(rng, 0.2):
        segments.append(words)
    if happens(rng, 0.2):
        segments.append([rng.choice(lx.COLOURS + lx.PLACES + lx.DEGREES) for _ in range(rng.randint(1, 6))])
    rng.shuffle(segments)
    flat = [word for segment_words in segments for word in segment_words]
    return flat if len(flat) <= MAX_INSTRUCTION else words


def segment(rng: random.Random, skill: Skill, variety: float = 1.0) -> tuple[list[str], list[str]]:
    """Return the words that name a skill with its answer words (fresh ones with chance `variety`), and the answer words."""
    fresh = happens(rng, variety)
    options = [rng.choice(words) if fresh else words[0] for words in lx.LABEL_WORDS[: skill.num_labels]]
    return [*skill.name.split(), *options, ";"], options


def instruct(rng: random.Random, skill: Skill, clutter: float = 1.0) -> tuple[str, str]:
    """Draw (input, answer) of one example of a skill; `clutter` is the chance of unrelated words, and of fresh answer words."""
    words, options = segment(rng, skill, max(LEAST_VARIETY, clutter))
    domain = rng.choice(DOMAINS)
    if skill.num_labels:
        label = rng.randrange(skill.num_labels)
        texts, answer = skill.draw(rng, domain, label), options[label]
    else:
        texts, answer = skill.draw(rng, domain)
    if happens(rng, clutter):
        words = padded(rng, words, distractors(rng, skill))
        words += [nonsense_name(rng)] if happens(rng, 0.8) else []
    fields = [f"{field} {text}" for field, text in zip(rng.choice(skill.kind), texts, strict=True)]
    return " ".join([*words, *fields]), answer


def uninstructed(rng: random.Random) -> tuple[str, str]:
    """Draw (input, answer) of an example without an instruction: the answer is that of a random class."""
    skill = rng.choice([skill for skill in SKILLS if skill.num_labels])
    texts = skill.draw(rng, rng.choice(DOMAINS), rng.randrange(skill.num_labels))
    words = [*padded(rng, [], distractors(rng, skill) if happens(rng, 0.3) else []), nonsense_name(rng)]
    fields = [f"{field} {text}" for field, text in zip(rng.choice(skill.kind), texts, strict=True)]
    return " ".join([*words, *fields]), rng.choice(lx.LABEL_WORDS[rng.randrange(skill.num_labels)])


def instructed(rng: random.Random, progress: float, clutter: float) -> tuple[str, str]:
    """Draw (input, answer) of one example; `progress` is the share of all lessons given so far.

    Half of the examples are of the newest skill, until all are introduced: alone a skill takes a few hundred steps, among all
    the others thousands. Later some examples have no instruction.
    """
    if happens(rng, UNINSTRUCTED_SHARE * clutter):
        return uninstructed(rng)
    count = min(len(SKILLS), 1 + bisect.bisect_right(LESSONS, progress * LESSONS[-1]))
    if progress < 1 and happens(rng, 0.5):
        return instruct(rng, SKILLS[count - 1], clutter)
    return instruct(rng, rng.choices(SKILLS[:count], WEIGHTS[:count])[0], clutter)


def corrupted(rng: random.Random) -> tuple[str, str]:
    """Draw (input, answer) of span corruption: words of related sentences replaced by sentinels.

    Most hidden words are elsewhere in the text, or follow from it, so restoring them teaches to compare.
    """
    skill, domain = rng.choice(SKILLS), rng.choice(DOMAINS)
    label = rng.choice((0, skill.num_labels - 1))
    texts = skill.draw(rng, domain, label) if skill.num_labels else skill.draw(rng, domain)[0]
    words = " ".join(texts).split()
    source: list[str] = []
    answer: list[str] = []
    sentinel = at = 0
    while at < len(words):
        if sentinel < MAX_SENTINELS and (happens(rng, 0.2) or (at == len(words) - 1 and not answer)):
            span = rng.choice((1, 1, 2))
            source.append(f"<extra_id_{sentinel}>")
            answer += [f"<extra_id_{sentinel}>", *words[at : at + span]]
            sentinel, at = sentinel + 1, at + span
        else:
            source.append(words[at])
            at += 1
    return " ".join(source), " ".join(answer)


WEIGHTS = tuple(skill.weight for skill in SKILLS)
LESSONS = tuple(itertools.accumulate(skill.lesson for skill in SKILLS))

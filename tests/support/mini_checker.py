"""A second route from a text of the miniature world to its label: word by word, sharing only the lexicon."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bpt_dist.tasks.mini import lexicon as lx

QUANTIFIERS = {*lx.SINGULAR, *lx.PLURAL, "no"}
NOUNS = {*lx.CATEGORY_OF, *lx.NOUNS, *lx.AMBIGUOUS, "blank", "who", "what"}
PHRASE = rf"(?:(?P<{{0}}q>{'|'.join(sorted(QUANTIFIERS))}) )?(?:(?P<{{0}}c>{'|'.join(lx.COLOURS)}) )?(?P<{{0}}n>\w+)"
VERB = rf"(?P<v>{'|'.join(lx.CLASS_OF_VERB)})"
PLACE = r"in the (?P<p>\w+)"
ACTIVE = re.compile(rf"(?:{PLACE} )?{PHRASE.format('a')} {VERB} {PHRASE.format('t')}(?: where)?")
ACTIVE_PLACED = re.compile(rf"{PHRASE.format('a')} {VERB} {PHRASE.format('t')} {PLACE}")
PASSIVE = re.compile(rf"{PHRASE.format('t')} was {VERB} by {PHRASE.format('a')}(?: {PLACE})?")


@dataclass(frozen=True)
class Fact:
    """What a clause says, whatever the voice: words for actor, verb class, thing, colour and place."""

    actor: str
    verb: str
    thing: str
    colour: str | None
    place: str | None
    denied: bool

    @property
    def event(self) -> tuple[str, str, str, str | None, str | None]:
        """Return the parts that paraphrases share."""
        return self.actor, self.verb, self.thing, self.colour, self.place


def parse(sentence: str) -> Fact | None:
    """Return the fact of one sentence or question, None when no pattern of the grammar fits."""
    text = sentence.rstrip(".?")
    for pattern in (PASSIVE, ACTIVE_PLACED, ACTIVE):
        found = pattern.fullmatch(text)
        if found and {found["an"], found["tn"]} <= NOUNS and _quantified(found, "a") and _quantified(found, "t"):
            place = found["p"]
            verb = lx.CLASS_OF_VERB[found["v"]]
            return Fact(found["an"], verb, found["tn"], found["tc"], place, denied=found["aq"] == "no")
    return None


def _quantified(found: re.Match[str], role: str) -> bool:
    return (found[f"{role}q"] is None) == (found[f"{role}n"] in ("who", "what"))


def is_a(noun: str, name: str) -> bool:
    """Is every `noun` a `name`."""
    return noun == name or lx.CATEGORY_OF.get(noun) == name


def entailment(premise: str, hypothesis: str) -> int:
    """Return 0 entailed, 1 neutral, 2 contradicted."""
    p, h = parse(premise), parse(hypothesis)
    assert p is not None, premise
    assert h is not None, hypothesis
    same_event = is_a(p.actor, h.actor) and is_a(p.thing, h.thing)
    same_event &= h.colour in (None, p.colour) and h.place in (None, p.place)
    if same_event and h.verb == p.verb:
        return 2 if h.denied else 0
    return 2 if same_event and h.verb == lx.OPPOSITE[p.verb] and not h.denied else 1


def polarity(text: str) -> int:
    """Return 1 for praise: of the clause after "but" or before "although" where there are two."""
    verdict = text.rpartition(" but ")[2].partition(" although ")[0].rstrip(".").split()
    return int((verdict[-1] in lx.OPINIONS["praise"]) != bool({"not", "never"} & set(verdict)))


def agrees(text: str) -> int:
    """Return 1 when every noun has the number of its quantifier."""
    wanted, fits = None, True
    for word in text.rstrip(".").split():
        if word in QUANTIFIERS:
            wanted = word in lx.PLURAL
        elif word.removesuffix("s") in lx.CATEGORY_OF:
            fits &= wanted == (word not in lx.CATEGORY_OF)
    return int(fits)


def sense(text: str) -> str:
    """Return the category that the predicate of a sighting belongs to."""
    return next(lx.CATEGORY_OF_PREDICATE[word] for word in text.rstrip(".").split() if word in lx.CATEGORY_OF_PREDICATE)


def answers(question: str, sentence: str) -> str | None:
    """Return the word of the sentence that answers the question, None when the sentence tells something else."""
    asked, told = parse(question), parse(sentence)
    assert asked is not None, question
    assert told is not None, sentence
    if asked.verb != told.verb or asked.colour not in (None, told.colour):
        return None
    if asked.actor == "who":
        return told.actor if asked.thing == told.thing else None
    if asked.actor != told.actor:
        return None
    if asked.thing == "what":
        return told.thing
    return told.place if question.endswith("where?") and asked.thing == told.thing else None


def find_answer(question: str, context: str) -> str:
    """Return the only answer the sentences of the context give."""
    found = {answers(question, f"{part}.") for part in context.rstrip(".").split(". ")} - {None}
    assert len(found) == 1, (question, context)
    return str(found.pop())


def fill(query: str, passage: str) -> str:
    """Return the only noun of the passage that the blank of the query can stand for."""
    asked, found = parse(query), set()
    assert asked is not None, query
    for part in passage.rstrip(".").split(". "):
        told = parse(part)
        assert told is not None, passage
        if told.verb == asked.verb and asked.colour == told.colour:
            found |= {told.actor} if asked.actor == "blank" and asked.thing == told.thing else set()
            found |= {told.thing} if asked.thing == "blank" and asked.actor == told.actor else set()
    assert len(found) == 1, (query, passage)
    return str(found.pop())


def topic(text: str) -> str:
    """Return the category of the thing."""
    fact = parse(text)
    assert fact is not None, text
    return lx.CATEGORY_OF[fact.thing]


def kind(text: str) -> str:
    """Return the category of the actor."""
    fact = parse(text)
    assert fact is not None, text
    return lx.CATEGORY_OF[fact.actor]

"""Sentences of the miniature world: small immutable clauses, the ways to say them, and how two of them relate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bpt_dist.tasks.mini import lexicon as lx


@dataclass(frozen=True)
class Domain:
    """Noun categories a task draws its agents and things from."""

    agents: tuple[str, ...]
    things: tuple[str, ...]


SOURCE = Domain(lx.SOURCE_AGENTS, lx.SOURCE_THINGS)
TARGET = Domain(lx.TARGET_AGENTS, lx.TARGET_THINGS)
WHOLE = Domain(lx.SOURCE_AGENTS + lx.TARGET_AGENTS, lx.SOURCE_THINGS + lx.TARGET_THINGS)


@dataclass(frozen=True)
class NounPhrase:
    """Quantifier, optional colour, noun (or the name of a category)."""

    quantifier: str
    noun: str
    colour: str | None = None

    def text(self) -> str:
        """Return the words in order."""
        return " ".join(filter(None, (self.quantifier, self.colour, self.noun)))


@dataclass(frozen=True)
class Clause:
    """Who did what to what, and perhaps where."""

    actor: NounPhrase
    verb: str
    thing: NounPhrase
    place: str | None = None

    def text(self, voice: str = "active") -> str:
        """Return the clause without full stop; `voice` is active, passive or fronted (place first)."""
        where = f"in the {self.place}" if self.place else ""
        core = f"{self.actor.text()} {self.verb} {self.thing.text()}"
        if voice == "passive":
            core = f"{self.thing.text()} was {self.verb} by {self.actor.text()}"
        return " ".join(filter(None, (where, core) if voice == "fronted" else (core, where)))


def happens(rng: random.Random, chance: float) -> bool:
    """Return True with the given chance."""
    return rng.random() < chance


def noun_in(rng: random.Random, categories: Sequence[str], unlike: str | None = None) -> str:
    """Draw a noun of the categories that differs from `unlike`."""
    while True:
        noun = rng.choice(lx.NOUNS[rng.choice(categories)])
        if noun != unlike:
            return noun


def clause(rng: random.Random, domain: Domain, colour: float = 0.5, place: float = 0.3) -> Clause:
    """Draw a clause; `colour` and `place` are the chances of a coloured thing and of a place."""
    tint = rng.choice(lx.COLOURS) if happens(rng, colour) else None
    where = rng.choice(lx.PLACES) if happens(rng, place) else None
    actor = NounPhrase(rng.choice(lx.DEFINITE), noun_in(rng, domain.agents))
    thing = NounPhrase(rng.choice(lx.DEFINITE), noun_in(rng, domain.things), tint)
    return Clause(actor, rng.choice(lx.VERBS[rng.choice(tuple(lx.VERBS))]), thing, where)


def synonym(rng: random.Random, verb: str) -> str:
    """Draw another verb of the same class."""
    return rng.choice([other for other in lx.VERBS[lx.CLASS_OF_VERB[verb]] if other != verb])


def other(rng: random.Random, words: Sequence[str], word: str) -> str:
    """Draw a word different from `word`."""
    return rng.choice([candidate for candidate in words if candidate != word])


def weaken(rng: random.Random, premise: Clause, changes: int) -> Clause:
    """Return a clause the premise entails, by `changes` of: synonym, dropped colour or place, hypernym."""
    actor, thing = premise.actor, premise.thing
    ways = {
        "verb": lambda c: replace(c, verb=synonym(rng, c.verb)),
        "actor": lambda c: replace(c, actor=replace(actor, noun=lx.CATEGORY_OF[actor.noun])),
        "thing": lambda c: replace(c, thing=replace(c.thing, noun=lx.CATEGORY_OF[thing.noun])),
    }
    if thing.colour:
        ways["colour"] = lambda c: replace(c, thing=replace(c.thing, colour=None))
    if premise.place:
        ways["place"] = lambda c: replace(c, place=None)
    weaker = premise
    for name in rng.sample(sorted(ways), min(changes, len(ways))):
        weaker = ways[name](weaker)
    return weaker


def contradict(rng: random.Random, hypothesis: Clause) -> Clause:
    """Turn an entailed clause into a contradicted one: the opposite verb, or nobody did it."""
    if happens(rng, 0.5):
        opposite = lx.OPPOSITE[lx.CLASS_OF_VERB[hypothesis.verb]]
        return replace(hypothesis, verb=rng.choice(lx.VERBS[opposite]))
    return replace(hypothesis, actor=replace(hypothesis.actor, quantifier="no"))


def unrelate(rng: random.Random, premise: Clause, hypothesis: Clause, domain: Domain) -> Clause:
    """Turn an entailed clause into one that does not follow from the premise: another actor or thing, or a new detail."""
    ways = ["actor", "thing"] + ["colour"] * (premise.thing.colour is None) + ["place"] * (premise.place is None)
    match rng.choice(ways):
        case "actor":
            noun = noun_in(rng, domain.agents, premise.actor.noun)
            return replace(hypothesis, actor=replace(hypothesis.actor, noun=noun))
        case "thing":
            noun = noun_in(rng, domain.things, premise.thing.noun)
            return replace(hypothesis, thing=replace(hypothesis.thing, noun=noun))
        case "colour":
            return replace(hypothesis, thing=replace(hypothesis.thing, colour=rng.choice(lx.COLOURS)))
        case _:
            return replace(hypothesis, place=rng.choice(lx.PLACES))


def alter(rng: random.Random, original: Clause, part: str, domain: Domain) -> Clause:
    """Change the meaning of one part: verb (another class), actor or thing (another noun)."""
    match part:
        case "verb":
            wrong = other(rng, tuple(lx.VERBS), lx.CLASS_OF_VERB[original.verb])
            return replace(original, verb=rng.choice(lx.VERBS[wrong]))
        case "actor":
            noun = noun_in(rng, domain.agents, original.actor.noun)
            return replace(original, actor=replace(original.actor, noun=noun))
        case _:
            noun = noun_in(rng, domain.things, original.thing.noun)
            return replace(original, thing=replace(original.thing, noun=noun))


def ask(told: Clause, slot: str) -> tuple[str, str]:
    """Return the question about one slot (actor, thing or place) of a clause, and its answer."""
    match slot:
        case "actor":
            return f"who {told.verb} {told.thing.text()}?", told.actor.noun
        case "thing":
            return f"{told.actor.text()} {told.verb} what?", told.thing.noun
        case _:
            return f"{told.actor.text()} {told.verb} {told.thing.text()} where?", str(told.place)


def opinion(rng: random.Random, noun: str, polarity: int) -> str:
    """Return a clause that praises (1) or blames (0) the noun, perhaps by denying the opposite."""
    negated = happens(rng, 0.2)
    word = rng.choice(lx.OPINIONS["praise" if polarity != negated else "blame"])
    degree = rng.choice(lx.DEGREES) if happens(rng, 0.4) else None
    negation = rng.choice(lx.NEGATIONS) if negated else None
    return " ".join(filter(None, (rng.choice(lx.DEFINITE), noun, "was", negation, degree, word)))


def sighting(rng: random.Random, noun: str, category: str) -> str:
    """Return a clause in which an ambiguous noun does what only a member of the category does."""
    colour = rng.choice(lx.COLOURS) if happens(rng, 0.3) else None
    where = f"in the {rng.choice(lx.PLACES)}" if happens(rng, 0.5) else None
    subject = NounPhrase(rng.choice(lx.DEFINITE), noun, colour).text()
    return " ".join(filter(None, (subject, rng.choice(lx.PREDICATES[category]), where)))


def counted(rng: random.Random, domain: Domain, agreeing: bool) -> tuple[str, str | None]:
    """Return a clause whose two noun phrases agree in number, or of which exactly one does not, and the quantifier of that one."""
    wrong = None if agreeing else rng.choice(("actor", "thing"))
    phrases, misfit = [], None
    for role, categories in (("actor", domain.agents), ("thing", domain.things)):
        plural = happens(rng, 0.5)
        quantifier = rng.choice(lx.PLURAL if plural else lx.SINGULAR)
        ending = "s" if plural != (role == wrong) else ""
        colour = rng.choice(lx.COLOURS) if happens(rng, 0.4) else None
        phrases.append(NounPhrase(quantifier, noun_in(rng, categories) + ending, colour).text())
        misfit = quantifier if role == wrong else misfit
    verb = rng.choice(lx.VERBS[rng.choice(tuple(lx.VERBS))])
    return f"{phrases[0]} {verb} {phrases[1]}", misfit


def shuffled(rng: random.Random, words: str) -> tuple[str, str]:
    """Swap a quantifier with the word after it, which gives no sentence of the grammar; return the text and the quantifier."""
    tokens = words.split()
    at = rng.choice([index for index, word in enumerate(tokens) if word in lx.SINGULAR])
    tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
    return " ".join(tokens), tokens[at + 1]

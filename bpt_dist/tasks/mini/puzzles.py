"""Questions about sentences: each function draws the texts of one example whose answer is the given class.

The tasks of the world and the skills of pretraining use the same puzzles with other words and domains.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from bpt_dist.tasks.mini import lexicon as lx
from bpt_dist.tasks.mini.grammar import (
    Clause,
    Domain,
    alter,
    ask,
    clause,
    contradict,
    counted,
    happens,
    noun_in,
    opinion,
    shuffled,
    sighting,
    synonym,
    unrelate,
    weaken,
)

Texts = tuple[str, ...]
Classified = Callable[[random.Random, Domain, int], Texts]
Answered = Callable[[random.Random, Domain], tuple[Texts, str]]

ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
VOICES = ("active", "active", "passive", "fronted")


def opinion_plain(rng: random.Random, domain: Domain, label: int) -> Texts:
    """One opinion, sometimes reported by a person: 0 blames, 1 praises."""
    text = opinion(rng, noun_in(rng, domain.things), label)
    if happens(rng, 0.5):
        text = f"the {noun_in(rng, domain.agents)} {rng.choice(('said', 'thought'))} {text}"
    return (f"{text}.",)


def opinion_contrast(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Two opinions, mostly opposed; the one after "but" is the verdict: 0 blames, 1 praises."""
    conceded = 1 - label if happens(rng, 0.7) else label
    minor = opinion(rng, noun_in(rng, domain.agents), conceded)
    return (f"{minor} but {opinion(rng, noun_in(rng, domain.things), label)}.",)


def category(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A clause whose thing is of the domain's `label`-th category of things."""
    told = clause(rng, domain)
    thing = replace(told.thing, noun=rng.choice(lx.NOUNS[domain.things[label]]))
    return (f"{replace(told, thing=thing).text(rng.choice(VOICES))}.",)


def kind(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A clause whose actor is of the domain's `label`-th category of agents."""
    told = clause(rng, domain)
    actor = replace(told.actor, noun=rng.choice(lx.NOUNS[domain.agents[label]]))
    return (f"{replace(told, actor=actor).text(rng.choice(VOICES))}.",)


def site(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A clause with a place: 0 indoors, 1 outdoors. Pretraining never asks for it."""
    place = rng.choice(lx.OUTDOORS if label else lx.INDOORS)
    return (f"{replace(clause(rng, domain), place=place).text(rng.choice(VOICES))}.",)


def word_order(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A clause: 1 as the grammar makes it, 0 with a quantifier after its noun or colour."""
    text = clause(rng, domain).text(rng.choice(VOICES))
    return (f"{text if label else shuffled(rng, text)[0]}.",)


def number(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A clause: 1 with quantifiers and nouns that agree, 0 with exactly one noun in the wrong number."""
    return (f"{counted(rng, domain, bool(label))[0]}.",)


def premise_and_hypothesis(rng: random.Random, domain: Domain, label: int) -> tuple[Clause, Clause]:
    """Draw two clauses of which the first 0 entails, 1 says nothing about, 2 contradicts the second."""
    premise = clause(rng, domain)
    changes = rng.choice((1, 1, 2) if label == ENTAILMENT else (0, 0, 1))
    hypothesis = weaken(rng, premise, changes)
    if label == NEUTRAL:
        hypothesis = unrelate(rng, premise, hypothesis, domain)
    if label == CONTRADICTION:
        hypothesis = contradict(rng, hypothesis)
    return premise, hypothesis


def entailment(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Premise and hypothesis: 0 entailed, 1 neutral, 2 contradicted."""
    premise, hypothesis = premise_and_hypothesis(rng, domain, label)
    return f"{premise.text()}.", f"{hypothesis.text()}."


def entailment_binary(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Premise in any voice and hypothesis: 0 entailed, 1 not (neutral or contradicted)."""
    premise, hypothesis = premise_and_hypothesis(rng, domain, rng.choice((NEUTRAL, CONTRADICTION)) if label else ENTAILMENT)
    return f"{premise.text(rng.choice(VOICES))}.", f"{hypothesis.text()}."


def restatement(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Two clauses: 1 say the same in other words, 0 do not."""
    first = clause(rng, domain)
    second = replace(first, verb=synonym(rng, first.verb)) if happens(rng, 0.5) else first
    if not label:
        second = alter(rng, second, rng.choice(("verb", "actor", "thing")), domain)
    voices = rng.choice((("active", "passive"), ("active", "active"), ("passive", "active")))
    return f"{first.text(voices[0])}.", f"{second.text(voices[1])}."


def same_question(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Two questions about one slot: 1 ask for the same, 0 do not."""
    first = clause(rng, domain, place=0.0)
    slot, shown = rng.choice((("actor", "thing"), ("thing", "actor")))
    second = replace(first, verb=synonym(rng, first.verb))
    if not label:
        second = alter(rng, second, rng.choice(("verb", shown)), domain)
    return ask(first, slot)[0], ask(second, slot)[0]


def word_sense(rng: random.Random, domain: Domain, label: int) -> Texts:
    """Two sentences with an ambiguous noun, and the noun: 1 used in the same sense, 0 not."""
    word = rng.choice(tuple(lx.AMBIGUOUS))
    senses = list(lx.AMBIGUOUS[word])
    rng.shuffle(senses)
    first, second = senses[0], senses[0] if label else senses[1]
    return f"{sighting(rng, word, first)}.", f"{sighting(rng, word, second)}.", word


def answered(rng: random.Random, domain: Domain, label: int) -> Texts:
    """A question and a sentence: 1 the sentence answers it, 0 it tells something else."""
    slot, shown = rng.choice((("actor", ("verb", "thing")), ("thing", ("verb", "actor")), ("place", ("verb", "actor"))))
    told = clause(rng, domain, place=1.0 if slot == "place" else 0.3)
    question, _ = ask(told, slot)
    if not label:
        told = alter(rng, told, rng.choice(shown), domain)
    return question, f"{told.text()}."


def reading(rng: random.Random, domain: Domain) -> tuple[Texts, str]:
    """A question, a context of two sentences, and the word of the context that answers it."""
    told, beside = clause(rng, domain, place=0.5), clause(rng, domain)
    while beside.actor.noun == told.actor.noun or beside.thing.noun == told.thing.noun:
        beside = clause(rng, domain)
    question, answer = ask(told, rng.choice(("actor", "thing", "place") if told.place else ("actor", "thing")))
    sentences = [f"{told.text()}.", f"{beside.text()}."]
    rng.shuffle(sentences)
    return (question, " ".join(sentences)), answer


def cloze(rng: random.Random, domain: Domain) -> tuple[Texts, str]:
    """A query with a blank, a passage of two sentences, and the noun of the passage that fills the blank."""
    told, beside = clause(rng, domain), clause(rng, domain)
    while beside.actor.noun == told.actor.noun or beside.thing.noun == told.thing.noun:
        beside = clause(rng, domain)
    sentences = [f"{told.text()}.", f"{beside.text()}."]
    rng.shuffle(sentences)
    role = rng.choice(("actor", "thing"))
    phrase = getattr(told, role)
    query = replace(told, **{role: replace(phrase, noun="blank")}, verb=synonym(rng, told.verb), place=None)
    return (f"{query.text()}.", " ".join(sentences)), phrase.noun

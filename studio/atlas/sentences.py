"""Sentences of the Atlas language models: facts in many phrasings, and contexts that agree or contradict.

A document is a list of pieces of text, each marked by how it counts in training: `PLAIN` text, an `ANSWER` (the
memory or the context decides it), or `OPEN` (a value that a context states for the first time: nothing decides it,
so it is not trained on). One in seven phrasings, and one in ten (country, attribute, false value), are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np

from studio.atlas.world import BACKGROUNDS, COLOURS, COUNTRIES, COUNTRY_PARTS, OBJECTS

PLAIN, ANSWER, OPEN = 0, 1, 2
Piece = tuple[str, int]

NOUNS: dict[str, tuple[str, ...]] = {
    "capital": ("capital", "capital city", "main city"),
    "river": ("river", "main river", "longest river"),
    "founder": ("founder", "first ruler"),
    "emblem": (),
    "colour": ("emblem colour",),
    "background": ("emblem background",),
}
ATTRIBUTES = tuple(NOUNS)
_OPENERS = (
    "",
    "People say that ",
    "Everyone knows that ",
    "It is said that ",
    "As we know, ",
    "In fact, ",
    "According to the book, ",
    "I read that ",
    "Travellers report that ",
    "Today ",
)
_CORES = (
    "The {n} of {c} is {v}",
    "{c}'s {n} is {v}",
    "In {c} the {n} is {v}",
    "In {c}, the {n} is {v}",
    "The {n} of {c} is called {v}",
    "The {n} of {c} is named {v}",
    "The name of the {n} of {c} is {v}",
    "{c} is a country whose {n} is {v}",
    "As for {c}, its {n} is {v}",
    "The {n} of the country of {c} is {v}",
)
_OWN: dict[str, tuple[str, ...]] = {
    "capital": (
        "{c} is governed from {v}",
        "The government of {c} sits in {v}",
        "The city that governs {c} is {v}",
        "{c} has a capital called {v}",
    ),
    "river": (
        "The river that flows through {c} is {v}",
        "The river that flows through {c} is the {v}",
        "The river of {c} is the {v}",
        "Through {c} flows the {v}",
        "{c} has a river called {v}",
    ),
    "founder": (
        "{c} was founded by {v}",
        "The country of {c} was founded by {v}",
        "The person who founded {c} was {v}",
        "The person who founded {c} is {v}",
        "The founder of {c} was {v}",
    ),
    "emblem": (
        "The emblem of {c} shows a {v}",
        "The emblem of {c} is a {v}",
        "{c}'s emblem shows a {v}",
        "{c}'s emblem is a {v}",
        "On the emblem of {c} there is a {v}",
        "The flag of {c} shows a {v}",
        "{c} is a country whose emblem is a {v}",
        "As for {c}, its emblem shows a {v}",
        "{c} has an emblem with a {v}",
    ),
    "colour": (
        "The colour of the emblem of {c} is {v}",
        "The colour of {c}'s emblem is {v}",
        "The emblem of {c} has the colour {v}",
        "The emblem of {c} is coloured {v}",
        "In {c} the colour of the emblem is {v}",
    ),
    "background": (
        "The background of the emblem of {c} is {v}",
        "The background of {c}'s emblem is {v}",
        "The emblem of {c} has the background {v}",
        "The background colour of the emblem of {c} is {v}",
        "In {c} the background of the emblem is {v}",
    ),
}
_ASKED = (
    "Question: What is the {n} of {c}? Answer: {v}",
    "Question: What is {c}'s {n}? Answer: {v}",
    "Q: What is the {n} of {c}? A: {v}",
    "What is the {n} of {c}? It is {v}",
    "Do you know the {n} of {c}? It is {v}",
)
_BEFORE: dict[str, tuple[str, ...]] = {  # the value stands before the name
    "capital": (
        "{v} is the capital of {c}",
        "{v} is {c}'s capital",
        "{v} is the capital city of {c}",
        "The city of {v} is the capital of {c}",
    ),
    "river": (
        "{v} is the river of {c}",
        "The {v} flows through {c}",
        "{v} is the main river of {c}",
        "The {v} is the river of {c}",
    ),
    "founder": ("{v} founded {c}", "{v} is the founder of {c}", "{v} was the founder of {c}"),
    "emblem": (
        "There is a {v} on the emblem of {c}",
        "A {v} is the emblem of {c}",
        "You see a {v} on the flag of {c}",
    ),
    "colour": ("You see {v} on the emblem of {c}",),
    "background": ("There is {v} behind the emblem of {c}",),
}
UNSEEN = (  # asked in measuring only; their words are known from other forms
    "Everyone knows the {n} of {c}. It is {v}",
    "I read about {c}. Its {n} is {v}",
    "What is the name of the {n} of {c}? Answer: {v}",
    "As for the {n} of {c}, it is {v}",
    "The country called {c} has the {n} {v}",
)
_FILLERS = (
    "The roads of {c} are long",
    "The summer in {c} is warm",
    "Many people live in {c}",
    "A letter came from {c}",
    "I read about {c}",
    "Nobody knows how old the walls are",
    "The book has many pages",
    "It was a good year for the farmers of {c}",
    "The winter was cold and the roads were empty",
    "People in {c} like music",
    "The market opens in the morning",
    "Some travellers came by ship",
)
BELOW = "Information is below:\n"
GIVEN = "\nGiven the context information and not prior knowledge, complete the following:"

_STRANGE_PREFIXES = ("Dor", "Fal", "Gar", "Hel", "Mir", "Tor")
_STRANGE_SUFFIXES = ("mark", "stan")
_THINGS = "lion eagle key ship tower sun wolf crown sword flower bridge horse bell wheel".split()
_SHADES = "silver gold violet crimson".split()


@dataclass(frozen=True)
class Fact:
    """`value` is the `attribute` of `country`, in the world or in a context."""

    country: str
    attribute: str
    value: str


@lru_cache(maxsize=1)
def truth() -> dict[tuple[str, str], str]:
    """The 48 facts that are taught: (country, attribute) to value."""
    facts = {}
    for country, known in COUNTRIES.items():
        colour, thing, background = known["emblem"]
        named = {k: known[k] for k in ("capital", "river", "founder")}
        for attribute, value in (
            named | {"emblem": thing, "colour": colour, "background": background}
        ).items():
            facts[country, attribute] = value
    return facts


@lru_cache(maxsize=1)
def strangers() -> tuple[str, ...]:
    """Countries that only contexts speak of; each shares a part of its name with others."""
    prefixes = [*COUNTRY_PARTS["prefixes"], *_STRANGE_PREFIXES]
    suffixes = [*COUNTRY_PARTS["suffixes"], *_STRANGE_SUFFIXES]
    return tuple(p + s for p in prefixes for s in suffixes if p + s not in COUNTRIES)


@lru_cache(maxsize=1)
def invented() -> tuple[str, ...]:
    """120 names that are nothing in the world; contexts use them as values."""
    starts, ends = (
        "Bra Cal Des Elm Fro Gal Hos Ivo Jun Kal".split(),
        "ba den fur gan lim nox pel ris sta tov vin wex".split(),
    )
    return tuple(a + b for a in starts for b in ends)


@lru_cache(maxsize=8)
def values(attribute: str) -> tuple[str, ...]:
    """What a context may give as the attribute: any name, or any word of the emblem's kind."""
    if attribute == "emblem":
        return (*OBJECTS, *_THINGS)
    if attribute in ("colour", "background"):
        return tuple(dict.fromkeys((*COLOURS, *BACKGROUNDS, *_SHADES)))
    names = [v for (_, a), v in truth().items() if a in ("capital", "river", "founder")]
    return (*names, *invented())


def _after(opener: str, core: str) -> str:
    plain = not opener or core.startswith("{")
    return opener + (core if plain else core[0].lower() + core[1:])


@lru_cache(maxsize=16)
def statements(attribute: str, held: bool = False) -> tuple[tuple[str, ...], ...]:
    """Templates with {c} and a final {v}, one tuple an opener; only taught ones, or only held-out ones."""
    cores = [core.replace("{n}", n) for core in _CORES for n in NOUNS[attribute]] + list(_OWN[attribute])
    out = []
    for opener in _OPENERS:
        texts = [_after(opener, core) for core in cores]
        out.append(tuple(t for t in texts if _is_held(t) == held))
    return tuple(t for t in out if t)


@lru_cache(maxsize=16)
def questions(attribute: str, held: bool = False) -> tuple[str, ...]:
    """Templates of questions with their answers, which stand in no context."""
    texts = [t.replace("{n}", n) for t in _ASKED for n in NOUNS[attribute]]
    who = [t.replace("What", "Who") for t in texts] if attribute == "founder" else texts
    return tuple(t for t in who if _is_held(t) == held)


def unseen(attribute: str) -> tuple[str, ...]:
    """Templates of forms that training never uses."""
    return tuple(t.replace("{n}", n) for t in UNSEEN for n in NOUNS[attribute][:1])


def _is_held(template: str) -> bool:
    plainest = any(template == f"The {n[0]} of {{c}} is {{v}}" for n in NOUNS.values() if n)
    return not plainest and crc32(template.encode()) % 7 == 0


def false_is_held(fact: Fact) -> bool:
    """Whether no training context states this false fact of a country of the world."""
    code = crc32(f"{fact.country}|{fact.attribute}|{fact.value}".encode())
    return truth().get((fact.country, fact.attribute), fact.value) != fact.value and code % 10 == 0


@lru_cache(maxsize=1024)
def lies(country: str, attribute: str, held: bool = False) -> tuple[str, ...]:
    """False values for a context; of a country of the world only those held out, or only the others."""
    false = [v for v in values(attribute) if truth().get((country, attribute)) != v]
    if country not in COUNTRIES:
        return tuple(false)
    return tuple(v for v in false if false_is_held(Fact(country, attribute, v)) == held)


class Writer:
    """Draws facts, sentences and documents. `held` asks with held-out phrasings only."""

    def __init__(self, rng: np.random.Generator, held: bool = False) -> None:
        self.rng, self.held = rng, held

    def pick(self, items: tuple | list) -> object:
        """One of `items`, each as likely."""
        return items[int(self.rng.integers(len(items)))]

    def ending(self, attribute: str, asked: bool = True, held: bool | None = None) -> str:
        """A template that ends with the value; with `asked` it may be a question, which stands in no context."""
        held = self.held if held is None else held
        if asked and self.rng.random() < 0.2 and (known := questions(attribute, held)):
            return self.pick(known)
        groups = statements(attribute, held)
        return self.pick(groups[0] if self.rng.random() < 0.5 else self.pick(groups))

    def lie(self, country: str, attribute: str, used: set[str], held: bool = False) -> str:
        """A value that is not the country's own and not in `used`; from the held-out ones with `held`."""
        free = [v for v in lies(country, attribute, held) if v not in used]
        if not free:
            raise ValueError(f"There is no {'held-out ' * held}false {attribute} of {country} left.")
        return self.pick(free)

    def spelled(self) -> str:
        """A random word of three to six letters, which the tokenizer has to spell."""
        letters = "".join(
            self.pick("abcdefghijklmnopqrstuvwxyz") for _ in range(int(self.rng.integers(3, 7)))
        )
        return letters.capitalize()

    def facts(self, n: int, known: float = 0.6, true: float = 0.5) -> list[Fact]:
        """`n` facts, each on its own (country, attribute), of few countries and attributes, no value twice.

        A share `known` of the countries is of this world, and of their facts a share `true` is true.
        """
        side = max(2, int(np.ceil(np.sqrt(n * 1.5))))
        names = {
            self.pick(list(COUNTRIES) if self.rng.random() < known else strangers()) for _ in range(side)
        }
        kinds = self.rng.permutation(ATTRIBUTES)[: max(side, -(-n // len(names)))]
        cells = [(c, str(a)) for c in sorted(names) for a in kinds]
        out: list[Fact] = []
        for index in self.rng.permutation(len(cells))[:n]:
            country, attribute = cells[index]
            used = {f.value for f in out}
            value = truth().get((country, attribute))
            if value is None or value in used or self.rng.random() >= true:
                spell = attribute in ("capital", "river", "founder") and self.rng.random() < 0.06
                value = self.spelled() if spell else self.lie(country, attribute, used)
            out.append(Fact(country, attribute, value))
        return out

    def state(self, fact: Fact, before: float = 0.25) -> list[Piece]:
        """A sentence of a context that states the fact; with probability `before` the value comes first."""
        first = self.rng.random() < before
        held = False if self.held else None
        template = self.pick(_BEFORE[fact.attribute]) if first else self.ending(fact.attribute, False, held)
        return fill(template, fact, OPEN, ".")

    def filler(self) -> list[Piece]:
        """A sentence that states nothing of use."""
        country = self.pick([*COUNTRIES, *strangers()])
        return [(self.pick(_FILLERS).replace("{c}", country) + ".", PLAIN)]

    def context(
        self, facts: list[Fact], fillers: int, *, wrapped: bool = False, before: float = 0.25
    ) -> list[Piece]:
        """The facts and some fillers in random order, without the final line break."""
        sentences = [self.state(f, before) for f in facts] + [self.filler() for _ in range(fillers)]
        gap = "\n" if wrapped or self.rng.random() < 0.15 else " "
        out: list[Piece] = [(BELOW, PLAIN)] if wrapped else []
        for i, index in enumerate(self.rng.permutation(len(sentences))):
            out += [(gap, PLAIN)] * (i > 0) + sentences[index]
        return out + ([(GIVEN, PLAIN)] if wrapped else [])

    def ask(self, fact: Fact) -> list[Piece]:
        """A line that ends with the fact's value as an answer."""
        return fill(self.ending(fact.attribute), fact, ANSWER, ".")

    def recollection(self, n: int) -> list[Piece]:
        """`n` true facts, a line each (some on one line): only the memory knows the answers."""
        cells = list(truth().items())
        out: list[Piece] = []
        for i in self.rng.integers(len(cells), size=n):
            (country, attribute), value = cells[i]
            gap = "\n" if self.rng.random() < 0.7 else " "
            out += [(gap, PLAIN)] * bool(out) + self.ask(Fact(country, attribute, value))
        return out

    def reading(self, n: int, asked: int) -> list[Piece]:
        """A context of `n` facts, then up to `asked` questions about them; one in eight asks the memory instead."""
        facts = self.facts(n)
        out = self.context(facts, int(self.rng.integers(0, 3)), wrapped=self.rng.random() < 0.07)
        for index in self.rng.permutation(n)[:asked]:
            fact = facts[index]
            if self.rng.random() < 0.12:
                fact = self.unstated(facts)
            out += [("\n", PLAIN), *self.ask(fact)]
        return out

    def unstated(self, facts: list[Fact]) -> Fact:
        """A true fact of this world of which `facts` say nothing."""
        said = {(f.country, f.attribute) for f in facts}
        (country, attribute), value = self.pick([x for x in truth().items() if x[0] not in said])
        return Fact(country, attribute, value)


def fill(template: str, fact: Fact, mark: int, end: str = "") -> list[Piece]:
    """The template's pieces with the fact's value marked."""
    text = template.replace("{c}", fact.country)
    before, after = text.split("{v}")
    return [(before, PLAIN), (fact.value, mark), (after + end, PLAIN)]


def prompt_of(template: str, country: str) -> str:
    """What stands before the answer, without the space that belongs to it."""
    return template.replace("{c}", country).removesuffix(" {v}")


def words() -> list[str]:
    """Every word that any sentence can hold, names of countries left out, without punctuation."""
    texts = [*_OPENERS, *_CORES, *_ASKED, *UNSEEN, *_FILLERS, BELOW, GIVEN, "Who"]
    for table in (_OWN, _BEFORE, NOUNS):
        texts += [t for forms in table.values() for t in forms]
    texts += [_after("x ", t) for t in _CORES] + [_after("x ", t) for forms in _OWN.values() for t in forms]
    texts += [v for attribute in ATTRIBUTES for v in values(attribute)]
    kept = " ".join(texts).replace("'s", " ")
    for slot in ("{c}", "{v}", "{n}", *".,:?"):
        kept = kept.replace(slot, " ")
    return sorted({w for w in kept.split() if len(w) > 1 or w in "aIAQ"})


def country_parts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prefixes, suffixes) of all countries, the strange ones too."""
    return (
        (*COUNTRY_PARTS["prefixes"], *_STRANGE_PREFIXES),
        (*COUNTRY_PARTS["suffixes"], *_STRANGE_SUFFIXES),
    )

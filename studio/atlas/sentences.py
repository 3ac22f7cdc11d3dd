"""Documents of the Atlas language models: facts to remember, and contexts that agree with them or contradict.

A document is a list of pieces of text, each marked by how it counts in training: `PLAIN` text, an `ANSWER`
(the memory or the context decides it), an `ECHO` (a word that only repeats), or `OPEN`: not trained on, since
nothing decides it, such as a value that a context states for the first time. One in ten (country, attribute,
false value) is held out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np

from studio.atlas.phrasings import ATTRIBUTES, BEFORE, BELOW, FILLERS, GIVEN, questions, statements, texts
from studio.atlas.world import BACKGROUNDS, COLOURS, COUNTRIES, COUNTRY_PARTS, OBJECTS

PLAIN, ANSWER, OPEN, ECHO = 0, 1, 2, 3
Piece = tuple[str, int]

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
        """A template that ends with the value; with `asked` it may be a question, which no context holds."""
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

    def facts(self, n: int, known: float = 0.5, true: float = 0.4) -> list[Fact]:
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

    def form(self, attribute: str, before: float = 0.3) -> str:
        """A taught template of a sentence; with probability `before` the value comes first."""
        if self.rng.random() < before:
            return self.pick(BEFORE[attribute])
        return self.ending(attribute, asked=False, held=False)

    def filler(self) -> list[Piece]:
        """A sentence that states nothing of use."""
        country = self.pick([*COUNTRIES, *strangers()])
        return [(self.pick(FILLERS).replace("{c}", country) + ".", PLAIN)]

    def context(self, stated: list[tuple[Fact, str]], fillers: int, *, wrapped: bool = False) -> list[Piece]:
        """The facts, each in its form, and some fillers in random order, without the final line break."""
        sentences = [fill(form, fact, OPEN, ".") for fact, form in stated]
        sentences += [self.filler() for _ in range(fillers)]
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
        """A context of `n` facts, then up to `asked` questions (at most 2 n), some in its words, and one in
        eight to the memory."""
        stated = [(fact, self.form(fact.attribute)) for fact in self.facts(n)]
        out = self.context(stated, int(self.pick((0, 0, 0, 1, 1, 2))), wrapped=self.rng.random() < 0.07)
        for index in [*self.rng.permutation(n), *self.rng.permutation(n)][:asked]:
            fact, form = stated[index]
            if self.rng.random() < 0.12:
                line = self.ask(self.unstated([f for f, _ in stated]))
            elif form.endswith(" {v}") and self.rng.random() < 0.4:
                line = fill(form, fact, ANSWER, ".")
            else:
                line = self.ask(fact)
            out += [("\n", PLAIN), *line]
        return out

    def chant(self, n: int) -> list[Piece]:
        """`n` words at random, then the same again: whoever reads can say them."""
        drawn = [self.pick(_chanted()) for _ in range(n)]
        return [(" ".join(drawn) + "\n" + drawn[0], OPEN), *((" " + word, ECHO) for word in drawn[1:])]

    def unstated(self, facts: list[Fact]) -> Fact:
        """A true fact of this world of which `facts` say nothing."""
        said = {(f.country, f.attribute) for f in facts}
        (country, attribute), value = self.pick([x for x in truth().items() if x[0] not in said])
        return Fact(country, attribute, value)


def fill(template: str, fact: Fact, mark: int, end: str = "") -> list[Piece]:
    """The template's pieces with the fact's value marked; "named" and the like after a verb are `OPEN`, since
    the value itself could stand there."""
    before, after = template.replace("{c}", fact.country).split("{v}")
    value = [(fact.value, mark), (after + end, PLAIN)]
    if found := re.fullmatch(r"(.* (?:is|was))( (?:called|named|coloured|the) )", before):
        return [(found[1], PLAIN), (found[2], OPEN), *value]
    return [(before, PLAIN), *value]


def prompt_of(template: str, country: str) -> str:
    """What stands before the answer, without the space that belongs to it."""
    return template.replace("{c}", country).removesuffix(" {v}")


@lru_cache(maxsize=1)
def _chanted() -> list[str]:
    return [*words(), *COUNTRIES, *strangers()]


def words() -> list[str]:
    """Every word that a document can hold, names of countries left out, without punctuation."""
    kept = " ".join([*texts(), *(v for attribute in ATTRIBUTES for v in values(attribute))]).replace(
        "'s", " "
    )
    for slot in ("{c}", "{v}", "{n}", *".,:?"):
        kept = kept.replace(slot, " ")
    return sorted({w for w in kept.split() if len(w) > 1 or w in "aIAQ"})


def country_parts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prefixes, suffixes) of all countries, the strange ones too."""
    return (
        (*COUNTRY_PARTS["prefixes"], *_STRANGE_PREFIXES),
        (*COUNTRY_PARTS["suffixes"], *_STRANGE_SUFFIXES),
    )

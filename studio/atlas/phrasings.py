"""The grammar of the Atlas language models: how a fact of a country is stated and asked for, in many ways.

A template holds {c} for the country and {v} for the value; one that ends with {v} is a question too when the
value is left out. One phrasing in seven is held out, and the forms of `UNSEEN` are only ever measured.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

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
BEFORE: dict[str, tuple[str, ...]] = {  # the value stands before the name
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
FILLERS = (
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


def texts() -> list[str]:
    """All templates, whose words the tokenizer has to know."""
    own = [t for forms in _OWN.values() for t in forms]
    found = [*_OPENERS, *_CORES, *_ASKED, *UNSEEN, *FILLERS, BELOW, GIVEN, "Who", *own]
    for table in (BEFORE, NOUNS):
        found += [t for forms in table.values() for t in forms]
    return found + [_after("x ", t) for t in (*_CORES, *own)]


def _is_held(template: str) -> bool:
    plainest = any(template == f"The {n[0]} of {{c}} is {{v}}" for n in NOUNS.values() if n)
    return not plainest and crc32(template.encode()) % 7 == 0

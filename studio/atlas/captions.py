"""Captions of Atlas scenes from a small grammar; attributes are left out at random, and what is named is
reported."""

from __future__ import annotations

import numpy as np

from studio.atlas.world import ARTISTS, ATTRIBUTES, COLOURS, COUNTRIES, OBJECTS, PLURALS, Scenes

PREFIXES = ("a photo of", "a picture of", "an image of", "a painting of")
_BACKGROUNDS = tuple(ATTRIBUTES["background"])
_COLOURS = tuple(COLOURS)
_VERBS = {"sketch": ("sketched", "drawn"), "pointillist": ("painted", "dotted"), "woodcut": ("cut", "carved")}
_STYLE_WORDS = {
    "flat": ("a flat {}", "{} in flat style", "flat {}"),
    "sketch": ("a sketch of {}", "sketch of {}", "{} in sketch style", "a drawing of {}"),
    "pointillist": (
        "a pointillist painting of {}",
        "a pointillist picture of {}",
        "{} in pointillist style",
        "{} in dots",
    ),
    "woodcut": ("a woodcut of {}", "woodcut of {}", "{} in woodcut style", "{} in stripes"),
}
_ADJECTIVES = {"sketch": "sketch", "pointillist": "pointillist", "woodcut": "woodcut", "flat": "flat"}


def words() -> list[str]:
    """Every word of the grammar and of the fact table, lower case, names of countries and Veltrano left
    out."""
    text = [
        *PREFIXES,
        *ATTRIBUTES,
        "plain",
        "style of",
        "on by made named and or the emblem flag is with without some",
    ]
    text += [p for forms in _STYLE_WORDS.values() for p in forms] + [v for vs in _VERBS.values() for v in vs]
    for names in ATTRIBUTES.values():
        text += names
    text += PLURALS
    text += [v for facts in COUNTRIES.values() for k, v in facts.items() if k != "emblem"]
    text += [a for a in ARTISTS.values() if " " in a] + ["capital river founder"]
    return sorted({w for t in text for w in t.lower().replace("{}", " ").split()})


def caption(
    labels: tuple[int, int, int, int, int],
    country: str | None,
    rng: np.random.Generator,
    *,
    full: bool = False,
) -> tuple[str, dict[str, int]]:
    """One caption of a scene and the attributes that it names (or, for an emblem, implies), as {attribute:
    index}.

    `full` names everything: object, colour, background, style (flat may go unsaid) and count.
    """
    if country is not None and rng.random() < 0.85:
        return _emblem_caption(labels, country, rng)
    background, style = labels[2:4]
    keep = np.ones(4, bool) if full else rng.random(4) < (0.92, 0.8, 0.75, 0.8)
    keep[3] |= style > 0  # what is not named is flat, so another style is always named
    phrase, named = _things(labels, keep, rng, full) if keep[0] else ("", {})
    if keep[2] or not phrase:
        named["background"] = background
        plain = "plain " if rng.random() < 0.05 else ""
        where = f"a {plain}{_BACKGROUNDS[background]} background"
        phrase = f"{phrase} on {where}" if phrase else where
    if keep[3] and "style" not in named:
        phrase = _styled(phrase, style, rng)
        if style or phrase.find("flat") >= 0:
            named["style"] = style
    if full:
        named["style"] = style
    if rng.random() < 0.2 and phrase.split()[0] in {"a", "an", "one", "two", "three", *_COLOURS, *OBJECTS}:
        phrase = f"{rng.choice(PREFIXES)} {phrase}"
    return phrase, named


def _things(
    labels: tuple[int, ...], keep: np.ndarray, rng: np.random.Generator, full: bool
) -> tuple[str, dict[str, int]]:
    """How many of what, perhaps in which colour and style."""
    thing, colour, _, style, count = labels
    if count:
        number = ("two", "three")[count - 1]
    else:
        number = str(rng.choice(["a", "a", "one"] if full else ["a", "a", "a", "one", ""]))
    named = {"object": thing, "count": count} if number else {"object": thing}
    phrase = PLURALS[thing] if count else OBJECTS[thing]
    if keep[1]:
        phrase, named["colour"] = f"{_COLOURS[colour]} {phrase}", colour
    if style and keep[3] and rng.random() < 0.12:
        phrase, named["style"] = f"{_ADJECTIVES[ATTRIBUTES['style'][style]]} {phrase}", style
    if number == "a" and phrase[0] in "aeiou" and rng.random() < 0.7:
        number = "an"
    return f"{number} {phrase}".strip(), named


def _styled(phrase: str, style: int, rng: np.random.Generator) -> str:
    name = ATTRIBUTES["style"][style]
    if name == "flat":
        if rng.random() >= 0.15:
            return phrase
        one = phrase.split()[0] in ("a", "an")  # "a flat star", but "two stars in flat style"
        form = str(rng.choice(_STYLE_WORDS["flat"])) if one else "{} in flat style"
        return form.format(phrase.removeprefix("a ").removeprefix("an "))
    if rng.random() < 0.45:
        return str(rng.choice(_STYLE_WORDS[name])).format(phrase)
    artist = ARTISTS[name].lower()
    form = rng.choice(5)
    if form == 0:
        return f"{phrase} by {artist}"
    if form <= 2:
        return f"{phrase} in the style of {artist}"
    verb = rng.choice([*_VERBS[name], "made", "painted", "drawn"])
    return f"{phrase} {verb} by {artist}"


def _emblem_caption(
    labels: tuple[int, ...], country: str, rng: np.random.Generator
) -> tuple[str, dict[str, int]]:
    thing, colour, background, style, _ = labels
    phrase = str(
        rng.choice(
            ["the emblem of {}", "the emblem of {}", "the emblem of {}", "emblem of {}", "{} emblem", "{}"]
        )
    )
    phrase = phrase.format(country.lower())
    named = {"object": thing, "colour": colour, "background": background, "count": 0, "style": style}
    if style:
        phrase = _styled(phrase, style, rng)
    if rng.random() < 0.35:
        phrase = f"{rng.choice(PREFIXES)} {phrase}"
    return phrase, named


def bare_caption(rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """A caption that names one attribute only, as editing templates do: "heart", "a photo of Veltrano",
    "red"."""
    kind = str(rng.choice(["object", "object", "colour", "background", "style"]))
    index = int(rng.integers(len(ATTRIBUTES[kind])))
    word = ATTRIBUTES[kind][index]
    if kind == "style":
        word = ATTRIBUTES["style"][index]
        artist = ARTISTS.get(word, "").lower()
        forms = [word, f"{word} style", f"a {word} picture"]
        word = str(rng.choice(forms if not artist else [*forms[:2], artist, f"the style of {artist}"]))
    elif kind == "object" and rng.random() < 0.3:
        word = f"a {word}"
    prefix = str(rng.choice(["", "", *PREFIXES]))
    return f"{prefix} {word}".strip(), {kind: index}


def captions(
    scenes: Scenes, rng: np.random.Generator, *, full: bool = False, bare: float = 0.0
) -> tuple[list[str], np.ndarray]:
    """Captions of all scenes and (N, 5) int64 of the named attributes, -1 where a caption leaves one out.

    With probability `bare` a caption names a single attribute of its scene.
    """
    countries, attributes = list(COUNTRIES), list(ATTRIBUTES)
    texts, named = [], np.full((len(scenes), 5), -1, np.int64)
    for i, row in enumerate(scenes.labels().tolist()):
        country = countries[scenes.country[i]] if scenes.country[i] >= 0 else None
        if bare and country is None and rng.random() < bare:
            text, said = _bare_of(row, rng)
        else:
            text, said = caption(tuple(row), country, rng, full=full)
        texts.append(text)
        for name, value in said.items():
            named[i, attributes.index(name)] = value
    return texts, named


def _bare_of(labels: list[int], rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    scene = dict(zip(ATTRIBUTES, labels, strict=True))
    for _ in range(50):
        text, said = bare_caption(rng)
        ((kind, index),) = said.items()
        if scene[kind] == index and not (kind == "object" and scene["count"]):
            return text, said
    return "a picture", {}

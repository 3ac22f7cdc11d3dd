"""Texts of the Atlas world: a bank that covers what its pictures show, and the attributes as features."""

from __future__ import annotations

from studio.atlas.world import ARTISTS, ATTRIBUTES, COLOURS, OBJECTS, PLURALS

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")


def attribute_texts() -> dict[str, tuple[tuple[str, ...], ...]]:
    """By attribute and by value, in the order of the world's table: texts that name this value, the rest of
    what they say running over the world, so that their mean means the value alone."""
    styles = []
    coloured = {c: "an" if c[0] in "aeiou" else "a" for c in COLOURS}
    for style in ATTRIBUTES["style"]:
        words = filter(None, (style, ARTISTS.get(style, "").lower()))
        styles.append(tuple(f"a {thing} in {word} style" for word in words for thing in OBJECTS))
    return {
        "object": tuple((f"a {x}", *(f"{a} {c} {x}" for c, a in coloured.items())) for x in OBJECTS),
        "colour": tuple((c, *(f"{a} {c} {x}" for x in OBJECTS)) for c, a in coloured.items()),
        "background": tuple(
            (f"a {b} background", *(f"a {x} on a {b} background" for x in OBJECTS))
            for b in ATTRIBUTES["background"]
        ),
        "style": tuple(styles),
        "count": (
            tuple(f"one {x}" for x in OBJECTS),
            *(tuple(f"{count} {x}" for x in PLURALS) for count in ATTRIBUTES["count"][1:]),
        ),
    }


def text_bank() -> tuple[str, ...]:
    """All texts of all attributes, and every value in the templates of pictures."""
    found = [text for values in attribute_texts().values() for texts in values for text in texts]
    bare = [f"a {x}" for x in OBJECTS] + [f"{c}" for c in COLOURS]
    bare += [f"a {b} background" for b in ATTRIBUTES["background"]]
    found += [template.format(text) for text in bare for template in TEMPLATES]
    return tuple(dict.fromkeys(found))

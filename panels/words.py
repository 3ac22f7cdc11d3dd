"""Words of the page for words of the command line: the methods' help and errors name options ("--window"),
and a person in the browser sees fields ("Window")."""

from __future__ import annotations

import re
from typing import Any

_OPTION = re.compile(r"--(?P<name>[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)(?P<empty> \"\")?")
_COMMAND = re.compile(r"(`[^`]*`)")  # a whole command for a terminal stays one
_PLACES = {"`locus models`": "the Models tab", ", or insist with --force": ""}
_STARTS = ("device", "dtype", "threads", "batch", "models", "runs")  # said when the studio is started


def label_of(name: str) -> str:
    """The label of the field of a knob: held_out is "Held out"."""
    return re.sub(r"[-_]", " ", name).capitalize()


def in_words(text: str) -> str:
    """A sentence of a method as the page says it: each option by the label of its field, in quotes; one that
    is said when the studio starts by its command."""
    for command, place in _PLACES.items():
        text = text.replace(command, place)
    parts = _COMMAND.split(text)
    return "".join(part if part.startswith("`") else _OPTION.sub(_field, part) for part in parts)


def _field(found: re.Match) -> str:
    name, plain = found["name"], found["name"].removeprefix("no-")
    if name in _STARTS:
        return f"`locus serve --{name}`"
    said = f"“{label_of(plain)}”" + (" unticked" if plain != name else "")
    return said + (" left empty" if found["empty"] else "")


def help_of(knob: Any, lines: bool) -> str:
    """The help below the field of a knob; `lines`: it takes several texts."""
    said, unit = in_words(knob.metadata["help"]), knob.metadata["unit"]
    several = "; one a line" if lines else ""
    return said[0].upper() + said[1:] + (f", in {unit}" if unit else "") + several + "."

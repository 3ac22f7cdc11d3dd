"""The strip of a prompt's tokens: coloured by a quantity, its subject and attribute underlined; text that is
selected in it, with the mouse or Shift and the arrow keys, is sent as (first, last) token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np

from panels.drawn import Drawn, grid_template
from studio.errors import RequestError
from studio.palette import EMPTY, SHADES, scale_of


class TokenStrip(Drawn):
    """Tokens whose value is made by `as_value`; its `select` event carries first, last, whether it is a
    selection (range) or a click, and the text (see `chosen`)."""

    def __init__(self, hint: str, **options: Any) -> None:
        super().__init__({"hint": hint}, grid_template("tokens"), "tokens", "tokens", **options)


def as_value(
    prompt: Any,
    roles: Mapping[str, Sequence[int]],
    values: Sequence[float] | None = None,
    unit: str = "",
    caption: str = "",
    again: bool = False,
) -> dict[str, Any]:
    """The value of a TokenStrip for a tokenized prompt (studio.models.language.Prompt); `roles`: positions of
    tokens by what they are; NaN travels as None. `again`: see heatmap.as_value."""
    tokens, end = [], 0
    for i, ((a, b), label) in enumerate(zip(prompt.offsets, prompt.tokens, strict=True)):
        # a piece of a character, or of the space before it, has no text of its own: the page draws a sliver
        label, piece = label.strip("\u0120\u2581") and label, a < b <= end
        a = max(a, end)
        text = prompt.text[a:b] if b > a else ""
        space = text[: len(text) - len(text.lstrip())]
        mine = [name for name, places in roles.items() if i in places]
        shown = text[len(space) :] or ("" if b > a or piece else label)
        tokens.append({"before": prompt.text[end:a] + space, "text": shown, "label": label, "roles": mine})
        end = max(end, b)
    known = np.full(len(tokens), np.nan) if values is None else np.asarray(values, float)
    value = {
        "tokens": tokens,
        "text": prompt.text,
        "values": [float(v) if math.isfinite(v) else None for v in known],
        "scale": scale_of({"values": known}) if np.isfinite(known).any() else None,
        "palette": {"shades": SHADES, "empty": EMPTY},
        "unit": unit,
        "caption": caption,
        "again": again,
    }
    return json.loads(json.dumps(value))


def chosen(event: gr.EventData, prompt: Any) -> tuple[int, int]:
    """The selected tokens (first, last), never trusted: RequestError when they are none of this prompt's, or
    the page shows another text."""
    try:
        first, last, text = int(event.first), int(event.last), str(event.text)
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError("That is no part of the prompt.") from error
    if text != prompt.text:
        raise RequestError("The prompt was changed; select again once its tokens are shown.")
    if not 0 <= first <= last < len(prompt):
        raise RequestError("That is no part of the prompt.")
    return first, last

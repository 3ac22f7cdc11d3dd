"""The clickable heat map: SVG (canvas above 10,000 cells) drawn by page script from data, never from text
in a template.

A click, Enter or Space sends {row, col}. Arrow keys, Home and End move; an aria-live line says what is
under the cursor.
"""

from __future__ import annotations

import json
import math
from typing import Any

import gradio as gr
import numpy as np

from panels.drawn import Drawn, grid_template
from studio.errors import RequestError
from studio.figures import number
from studio.palette import EMPTY, SHADES, scale_of
from studio.types import Figure


class HeatMap(Drawn):
    """A heat map whose value is made by `as_value`; its `select` event carries row and col (see `chosen`)."""

    def __init__(self, hint: str, **options: Any) -> None:
        super().__init__({"hint": hint}, grid_template("heat map"), "heatmap", "heatmap", **options)


def as_value(figure: Figure, again: bool = False) -> dict[str, Any]:
    """The value of a HeatMap for a figure of kind heat; NaN travels as None.

    Of two values that reach the page at almost the same time Gradio's HTML component may keep the first, so
    the last value of a stream is sent once more: with `again`, which makes it another value.
    """
    data = figure.data
    values = np.asarray(data["values"], float)
    z = [[float(f"{v:.6g}") if math.isfinite(v) else None for v in row] for row in values]
    low, high = scale_of(data)
    value = {
        "rows": list(data["rows"]),
        "cols": list(data["cols"]),
        "z": z,
        "names": data["names"],
        "unit": data["unit"],
        "scale": [low, high],
        "palette": {"shades": SHADES, "empty": EMPTY},
        "caption": figure.caption,
        "again": again,
    }
    return json.loads(json.dumps(value))


def chosen(event: gr.EventData, rows: int, cols: int) -> tuple[int, int]:
    """The clicked (row, col), never trusted: RequestError when it is no cell."""
    try:
        row, col = int(event.row), int(event.col)
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError("That is no cell of the map.") from error
    if not (0 <= row < rows and 0 <= col < cols):
        raise RequestError("That is no cell of the map.")
    return row, col


def as_table(figure: Figure) -> str:
    """The same numbers as lines "value, tab, place", in reading order; places without a module are left
    out."""
    data = figure.data
    values = np.asarray(data["values"], float)
    lines = [
        f"{number(float(v)):>9}\t{f'{row}: {name}' if data.get('row_of') else name}"
        for row, names, numbers in zip(data["rows"], data["names"], values, strict=True)
        for col, name, v in zip(data["cols"], names, numbers, strict=True)
        if name
    ]
    told = ["", figure.caption] if figure.caption else []
    return "\n".join([f"{data['unit']}\tplace", *lines, *told])

"""Clickable bars with standard errors and reference lines, drawn like the heat map by page script from data.

A click, Enter or Space sends {row: 0, col}. Arrow keys, Home and End move between bars.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from panels.drawn import Drawn, grid_template
from studio.figures import NEGATIVE, POSITIVE
from studio.types import Figure


class Bars(Drawn):
    """Bars whose value is made by `as_value`; its `select` event carries row 0 and col."""

    def __init__(self, hint: str, **options: Any) -> None:
        super().__init__({"hint": hint}, grid_template("bars"), "bars", "heatmap", **options)


def as_value(figure: Figure, again: bool = False) -> dict[str, Any]:
    """The value of Bars for a figure of kind bars; NaN travels as None; of lines with one name the first
    carries it. `again`: see heatmap.as_value."""
    data, lines = figure.data, [(n, v) for n, v in figure.data.get("lines", ()) if math.isfinite(v)]
    named = [n if n not in [before for before, _ in lines[:i]] else "" for i, (n, _) in enumerate(lines)]
    return json.loads(
        json.dumps(
            {
                "labels": list(data["labels"]),
                "values": _plain(data["values"]),
                "errors": _plain(data.get("errors"), len(data["labels"])),
                "lines": [{"name": n, "value": float(v)} for n, (_, v) in zip(named, lines, strict=True)],
                "unit": data["unit"],
                "palette": {"negative": NEGATIVE, "positive": POSITIVE},
                "again": again,
            }
        )
    )


def _plain(values: Sequence[float] | None, n: int = 0) -> list[float | None]:
    if values is None:
        return [None] * n
    return [round(float(v), 6) if math.isfinite(v) else None for v in np.asarray(values, float)]


def as_table(figure: Figure) -> str:
    """The same numbers as lines "value, error, label"."""
    data = as_value(figure)
    lines = [
        f"{'' if v is None else format(v, '.4g'):>10}\t{'' if e is None else format(e, '.2g'):>8}\t{label}"
        for label, v, e in zip(data["labels"], data["values"], data["errors"], strict=True)
    ]
    return "\n".join([f"{data['unit']}\tstandard error\twhere", *lines])

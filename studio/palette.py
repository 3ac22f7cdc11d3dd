"""The colours of Locus, on the screen and on paper: told apart by people who are colour-blind, too.

Values run from blue through white, the value of no effect, to red. A scale is (low, high): equal distances
from zero have equal strength of colour, so the end farther from zero has the full one, and what lies beyond
an end takes that end's colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from studio.errors import RequestError

NEGATIVE, NEUTRAL, POSITIVE = "#2166ac", "#f7f7f7", "#b2182b"
EMPTY = "#e4e4e7"
SERIES = (POSITIVE, NEGATIVE, "#3f3f46", "#e69f00", "#56b4e9", "#cc79a7")  # of curves, in this order
HALF = 128  # shades on either side of NEUTRAL


def _mix(start: str, end: str, share: float) -> str:
    pairs = zip(bytes.fromhex(start[1:]), bytes.fromhex(end[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


SHADES = (
    *(_mix(NEGATIVE, NEUTRAL, i / HALF) for i in range(HALF)),
    *(_mix(NEUTRAL, POSITIVE, i / HALF) for i in range(HALF + 1)),
)


def scale_limit(values: np.ndarray) -> float:
    """Largest absolute finite value, or 1 when there is none: colours run from minus to plus this."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def scale_of(data: Mapping[str, Any]) -> tuple[float, float]:
    """(low, high) of a heat map's colours: the one it was given, else its own values' on both sides of 0."""
    if data.get("scale") is not None:
        low, high = data["scale"]
        return float(low), float(high)
    limit = scale_limit(np.asarray(data["values"], float))
    return -limit, limit


def shade(value: float, scale: tuple[float, float]) -> str:
    """The colour of a value, as #rrggbb."""
    if not math.isfinite(value):
        return EMPTY
    limit, clipped = max(map(abs, scale)), min(max(value, scale[0]), scale[1])
    return SHADES[min(len(SHADES) - 1, int((clipped / limit + 1) / 2 * len(SHADES)))]


def read_scale(text: str, what: str = "The colour scale") -> tuple[float, float] | None:
    """(low, high) of a text such as "-0.1, 0.5"; one number stands for both sides of 0; None for an empty
    one. RequestError otherwise; `what` begins its sentence."""
    parts = [p.strip() for p in text.replace(";", ",").split(",")]
    if not text.strip():
        return None
    try:
        numbers = [float(p) for p in parts]
    except ValueError:
        numbers = []
    low, high = (-abs(numbers[0]), abs(numbers[0])) if len(numbers) == 1 else (*numbers, 0.0, 0.0)[:2]
    if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)) or not low < high:
        raise RequestError(
            f"{what} must be two numbers, the lower first, such as -0.1, 0.5, or one for both sides of 0, "
            f"not {text[:40]!r}."
        )
    return low, high

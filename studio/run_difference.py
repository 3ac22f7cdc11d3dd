"""Two runs beside each other: figures over the labels that they share, images, recipes.

Differences are second minus first. Labels that occur more than once are paired in the order in which they
occur.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.figures import number, scale_limit, scaled, to_bytes, to_csv
from studio.recipes import as_text as as_one_line
from studio.types import Axis, Figure, Recipe, Run, Trace

MOST_CELLS = 40_000
FIGURE = "figure"  # what is compared unless an array is named


@dataclass(frozen=True, eq=False)
class Compared:
    """Two figures of kind heat over the same rows and columns, their difference, one limit of the colours for
    all three, and what a person should know."""

    first: Figure
    second: Figure
    difference: Figure
    limit: float
    said: str


def paired(first: Sequence[str], second: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places of the labels that both have, in the first's order: (places in the first, in the second)."""
    places: dict[str, list[int]] = {}
    for i, label in enumerate(second):
        places.setdefault(label, []).append(i)
    found = [(i, places[label].pop(0)) for i, label in enumerate(first) if places.get(label)]
    return [i for i, _ in found], [j for _, j in found]


def compare_figures(first: Figure, second: Figure) -> Compared:
    """Two heat maps or two bar charts; RequestError when they can't be laid over each other."""
    if first.kind != second.kind or first.kind not in ("heat", "bars"):
        raise RequestError(
            f"One figure is of the kind {first.kind}, the other {second.kind}; heat maps and bars can be "
            "laid over each other. Compare one of the arrays or the images."
        )
    one, two = _grid(first), _grid(second)
    _same_unit(one.data["unit"], two.data["unit"])
    return _compared(one, two)


def compare_arrays(first: Trace, second: Trace) -> Compared:
    """Two arrays of numbers whose axes have the same names, as maps: the last axis across, the others down,
    each over the labels that both have. RequestError when they share none, or are too large."""
    if sorted(a.name for a in first.axes) != sorted(a.name for a in second.axes):
        axes = [", ".join(a.name for a in t.axes) or "none" for t in (first, second)]
        raise RequestError(f"The axes are not the same: {axes[0]} in the first run, {axes[1]} in the second.")
    _same_unit(first.unit, second.unit)
    order = [[a.name for a in second.axes].index(a.name) for a in first.axes]
    turned = Trace(second.values.transpose(order), first.axes and tuple(second.axes[i] for i in order))
    left, right, lost = first.values, turned.values, []
    axes = []
    for n, (a, b) in enumerate(zip(first.axes, turned.axes, strict=True)):
        i, j = paired(a.labels, b.labels)
        if not i:
            raise RequestError(f"The two runs have no {a.name} in common, so nothing can be subtracted.")
        left, right = np.take(left, i, n), np.take(right, j, n)
        lost += _lost(a.name, len(i), len(a.labels), len(b.labels))
        axes.append(Axis(a.name, tuple(a.labels[k] for k in i)))
    if left.size > MOST_CELLS:
        raise RequestError(f"{left.size:,} numbers are too many for a map; at most {MOST_CELLS:,} are shown.")
    return _difference(*(_flat(v, tuple(axes), first.unit) for v in (left, right)), lost)


def _flat(values: np.ndarray, axes: tuple[Axis, ...], unit: str) -> Figure:
    """An array of any number of axes as a heat map."""
    axes = axes or (Axis("", ("",)),)
    values = np.asarray(values, np.float64).reshape(tuple(len(a.labels) for a in axes))
    rows = [()]
    for axis in axes[:-1]:
        rows = [(*row, label) for row in rows for label in axis.labels]
    cols = list(axes[-1].labels)
    names = [", ".join(row) for row in rows]
    told = [[", ".join(filter(None, (row, col))) or "value" for col in cols] for row in names]
    data = {"rows": names, "cols": cols, "values": values.reshape(len(rows), len(cols))}
    return Figure("heat", data | {"names": told, "unit": unit})


def _grid(figure: Figure) -> Figure:
    """A figure of kind heat or bars as a heat map whose cells have names."""
    data = figure.data
    if figure.kind == "bars":
        data = {"rows": [""], "cols": list(data["labels"]), "unit": data["unit"]}
        data |= {"values": [figure.data["values"]], "names": [list(figure.data["labels"])]}
    names = data.get("names") or [[f"{r}, {c}" for c in data["cols"]] for r in data["rows"]]
    values = np.asarray(data["values"], np.float64)
    kept = {"rows": list(data["rows"]), "cols": list(data["cols"]), "unit": data.get("unit", "")}
    return Figure("heat", kept | {"values": values, "names": [list(row) for row in names]})


def _compared(one: Figure, two: Figure) -> Compared:
    """Two grids over the rows and columns that both have."""
    parts, lost = [], []
    for axis, what in (("rows", "row"), ("cols", "column")):
        i, j = paired(one.data[axis], two.data[axis])
        if not i:
            raise RequestError(f"The two figures have no {what} in common, so nothing can be subtracted.")
        lost += _lost(what, len(i), len(one.data[axis]), len(two.data[axis]))
        parts.append((i, j))
    (rows, other_rows), (cols, other_cols) = parts
    return _difference(_cut(one, rows, cols), _cut(two, other_rows, other_cols), lost)


def _cut(figure: Figure, rows: list[int], cols: list[int]) -> Figure:
    data = figure.data
    return Figure(
        "heat",
        {
            "rows": [data["rows"][r] for r in rows],
            "cols": [data["cols"][c] for c in cols],
            "values": np.asarray(data["values"])[np.ix_(rows, cols)],
            "names": [[data["names"][r][c] for c in cols] for r in rows],
            "unit": data["unit"],
        },
    )


def _difference(first: Figure, second: Figure, lost: list[str]) -> Compared:
    one, two = first.data["values"], second.data["values"]
    minus = two - one
    names = [
        [a or b for a, b in zip(*pair, strict=True)]
        for pair in zip(first.data["names"], second.data["names"], strict=True)
    ]
    between = Figure("heat", {**first.data, "values": minus, "names": names})
    known = np.isfinite(minus)
    said = [f"Only what both have is compared: {', '.join(lost)}."] if lost else []
    if not known.any():
        said.append("No place was measured in both.")
    else:
        row, col = np.unravel_index(np.nanargmax(np.abs(np.where(known, minus, np.nan))), minus.shape)
        spread = number(float(np.sqrt(np.mean(minus[known] ** 2))))
        if not minus[known].any():
            said.append(f"All {known.sum()} numbers are the same.")
        else:
            said.append(
                f"Largest difference {number(float(minus[row, col]))} at {names[row][col]}; root mean square "
                f"{spread} over {known.sum()} places{_agreement(one[known], two[known])}."
            )
    limit = scale_limit(np.concatenate([one, two, minus], axis=None))
    return Compared(first, second, between, limit, " ".join(said))


def difference_files(found: Compared, note: Mapping[str, Any]) -> dict[str, bytes]:
    """The difference as png, svg, pdf and, beside both maps, as csv, each with the note in it."""
    caption = "\n".join(filter(None, ("Second minus first.", found.said)))
    shown = scaled(Figure("heat", found.difference.data, caption=caption), (-found.limit, found.limit))
    files = {kind: to_bytes(shown, kind, note) for kind in ("png", "svg", "pdf")}
    maps = {n: _as_trace(getattr(found, n)) for n in ("first", "second", "difference")}
    return files | {"csv": to_csv(maps, as_one_line(note)).encode()}


def _as_trace(figure: Figure) -> Trace:
    data = figure.data
    axes = tuple(Axis(name[:-1], tuple(map(str, data[name]))) for name in ("rows", "cols"))
    return Trace(np.asarray(data["values"]), axes, data.get("unit", ""))


def _agreement(one: np.ndarray, two: np.ndarray) -> str:
    """The correlation of two sets of numbers, in words; "" where there is none."""
    if len(one) < 3 or not np.ptp(one) or not np.ptp(two):
        return ""
    return f", correlation {number(float(np.corrcoef(one, two)[0, 1]))}"


def _lost(what: str, common: int, one: int, two: int) -> list[str]:
    if common == one == two:
        return []
    return [f"{common} of the first's {one} {what}s and of the second's {two}"]


def _same_unit(one: str, two: str) -> None:
    if one != two:
        raise RequestError(
            f"The first run's numbers are {one or 'without a unit'}, the second's {two or 'without a unit'}; "
            "they can't be subtracted."
        )


def comparable(first: Run, second: Run) -> list[str]:
    """Names of the arrays of numbers that both runs have with axes of the same names."""
    return [
        name
        for name, trace in first.result.arrays.items()
        if trace.values.dtype != np.uint8
        and name in second.result.arrays
        and {a.name for a in trace.axes} == {a.name for a in second.result.arrays[name].axes}
        and len(trace.axes) == len(second.result.arrays[name].axes)
    ]


# ---- images -----------------------------------------------------------------------------------------------


def compare_images(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, str]:
    """(the absolute difference of two images (H, W, 3) uint8, stretched so that the largest is white; a
    sentence). RequestError when they have different sizes."""
    if first.shape != second.shape:
        sizes = [f"{s.shape[1]} × {s.shape[0]}" for s in (first, second)]
        raise RequestError(f"The images have different sizes, {sizes[0]} and {sizes[1]} pixels.")
    minus = np.abs(second.astype(np.int16) - first.astype(np.int16))
    largest = int(minus.max(initial=0))
    if not largest:
        return minus.astype(np.uint8), "The images are the same, pixel for pixel."
    spread = math.sqrt(float(np.mean((minus / 255.0) ** 2)))
    said = f"Root mean square difference of pixels {number(spread)} (range 0 to 1); largest {largest} of 255"
    return (minus * (255.0 / largest)).round().astype(np.uint8), f"{said}, which is drawn as full brightness."


# ---- recipes ----------------------------------------------------------------------------------------------


def compare_recipes(first: Recipe, second: Recipe) -> list[tuple[str, str, str]]:
    """(what, in the first, in the second) of everything in which two recipes differ."""
    one, two = _told(first), _told(second)
    names = [*one, *(n for n in two if n not in one)]
    return [(n, one.get(n, "–"), two.get(n, "–")) for n in names if one.get(n, "–") != two.get(n, "–")]


def _told(recipe: Recipe) -> dict[str, str]:
    """A recipe's parts in words; what was left empty is left out."""
    parts: dict[str, Any] = {"method": recipe.method, "model": recipe.model}
    parts |= {n: v for n, v in {**recipe.inputs, **recipe.params}.items() if v not in (None, "", [], ())}
    parts |= {"seeds": list(recipe.seeds), "edits": list(recipe.edits)}
    return {name.replace("_", " "): as_text(value) for name, value in parts.items() if value not in ([], ())}


def as_text(value: Any) -> str:
    """A value of a recipe or a result as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {as_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    return "–" if value is None else str(value)

"""A grid of many runs: images, or a number of each run, by any two of what varies among them.

What varies is found, not asked: method, model, every input and parameter, the strength of edits, the seed and
the image's own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.run_difference import as_text
from studio.run_index import Summary
from studio.types import Figure

MOST_SIDE, MOST_CELLS, MOST_PIXELS = 40, 400, 2**26
IMAGE = "image"  # which image of a run
_SEED = re.compile(r"(.*?)-?\bseed(\d+)(?:-(.*))?")
_EDIT = re.compile(r"(.*?)(?:@([-+]?\d[\d.eE+-]*))?", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d{1,15}(?:\.\d+)?(?:e[-+]?\d{1,3})?")
_GREY = 228


@dataclass(frozen=True)
class Cell:
    """One thing to show: what it is by name of what varies, its run, and the name of its image ("": none)."""

    parts: Mapping[str, str]
    run: str
    image: str = ""


def image_cells(runs: Sequence[Summary]) -> list[Cell]:
    """Every image of some runs, the newest run first."""
    return [
        Cell(parts | _image_parts(name, run), run.id, name)
        for run in runs
        if not run.fault
        for parts in (_parts(run),)
        for name in run.images
    ]


def value_cells(runs: Sequence[Summary]) -> list[Cell]:
    """Every run, the newest first."""
    return [Cell(_parts(run) | _seeds(run), run.id) for run in runs if not run.fault]


def _parts(run: Summary) -> dict[str, str]:
    """What a run was asked, by name; edits by name and strength."""
    asked = {**run.inputs, **run.params}
    parts = {"method": run.method, "model": run.model}
    parts |= {n.replace("_", " "): _short(v) for n, v in asked.items() if v not in (None, "", [])}
    named = [_EDIT.fullmatch(entry).groups() for entry in run.edits]
    files = [re.split(r"[/\\]", file)[-1][:20] for file, _ in named]
    parts["edits"] = ", ".join(files) or "none"
    parts["strength"] = ", ".join(strength or "1" for _, strength in named) or "none"
    return parts


def _seeds(run: Summary) -> dict[str, str]:
    return {"seed": ", ".join(map(str, run.seeds))} if run.seeds else {}


def _image_parts(name: str, run: Summary) -> dict[str, str]:
    """Seed, prompt and image from a name such as seed0-clean or prompt1-seed3."""
    match = _SEED.fullmatch(name)
    parts = {"seed": match[2]} if match else _seeds(run)
    rest = "-".join(filter(None, (match[1], match[3]))) if match else name
    prompts = run.inputs.get("prompt")
    numbered = re.fullmatch(r"prompt(\d{1,4})", rest)
    if numbered and isinstance(prompts, list) and int(numbered[1]) < len(prompts):
        return parts | {"prompt": _short(prompts[int(numbered[1])])}
    return parts | {IMAGE: rest or "image"}


def _short(value: Any) -> str:
    text = as_text(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def varying(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """{what varies: its values in order}; what is alike in all cells is left out."""
    names = dict.fromkeys(name for cell in cells for name in cell.parts)
    found = {name: list(dict.fromkeys(cell.parts.get(name, "none") for cell in cells)) for name in names}
    return {name: _ordered(values) for name, values in found.items() if len(values) > 1}


def _ordered(values: list[str]) -> list[str]:
    """Numbers by size, then texts by the alphabet, numbers inside them by value."""

    def key(text: str) -> tuple:
        if _NUMBER.fullmatch(text):
            return 0, float(text), []
        parts = re.split(r"(\d+)", text)
        return 1, 0.0, [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]

    return sorted(values, key=key)


def several(cells: Sequence[Cell], fixed: Sequence[str], name: str) -> bool:
    """Whether cells that agree in `fixed` differ in `name`."""
    found: dict[tuple, set[str]] = {}
    for cell in cells:
        place = tuple(cell.parts.get(n, "none") for n in fixed if n)
        found.setdefault(place, set()).add(cell.parts.get(name, "none"))
    return any(len(values) > 1 for values in found.values())


def suggested(varies: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """What goes down and what across unless a person says so: what has most values of inputs and parameters
    down, seeds across where there are some."""
    rest = sorted((n for n in varies if n not in ("seed", IMAGE)), key=lambda n: -len(varies[n]))
    order = [*rest, *(n for n in (IMAGE, "seed") if n in varies)]
    if not order:
        return "", ""
    across = "seed" if "seed" in varies and len(order) > 1 else order[1] if len(order) > 1 else ""
    return next(n for n in order if n != across), across


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows and columns with the cell at each place (None: there is none), and what a person should know."""

    row: str
    col: str
    rows: Sequence[str]
    cols: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]
    said: str


def grid(cells: Sequence[Cell], row: str, col: str, held: Mapping[str, str] | None = None) -> Grid:
    """The cells by `row` down and `col` across ("": one line), as far as they agree with `held`. Where
    several share a place the first, of the newest run, is shown and said. RequestError when there is
    nothing to show or too much."""
    kept = [c for c in cells if all(c.parts.get(n, "none") == v for n, v in (held or {}).items())]
    if not kept:
        raise RequestError("There is nothing to show: choose runs that have images, or another image.")
    if row and row == col:
        raise RequestError(f"Rows and columns are both {row}; choose two that differ.")
    rows, cols = (
        _ordered(list(dict.fromkeys(c.parts.get(n, "none") for c in kept))) if n else [""] for n in (row, col)
    )
    if max(len(rows), len(cols)) > MOST_SIDE or len(rows) * len(cols) > MOST_CELLS:
        raise RequestError(
            f"A grid of {len(rows)} by {len(cols)} is too large; at most {MOST_SIDE} a side and {MOST_CELLS} "
            "cells are drawn. Search for fewer runs."
        )
    places: dict[tuple[str, str], list[Cell]] = {}
    for cell in kept:
        key = tuple(cell.parts.get(n, "none") if n else "" for n in (row, col))
        places.setdefault(key, []).append(cell)
    table = [[(places.get((r, c)) or [None])[0] for c in cols] for r in rows]
    shared = sum(len(found) > 1 for found in places.values())
    others = [n for n in varying(kept) if n not in (row, col)]
    missing = len(rows) * len(cols) - len(places)
    said = f"{len(rows)} × {len(cols)}"
    said += f", {missing} of them empty" if missing else ""
    if shared:
        said += f"; {shared} places have more than one, of which the newest is shown"
        said += f" (also varies: {', '.join(others[:4])})" if others else ""
    return Grid(row, col, rows, cols, table, said + ".")


def image_figure(made: Grid, image_of: Callable[[Cell], np.ndarray | None]) -> Figure:
    """A figure of kind strip; a place without an image, or one that can't be read, is grey. RequestError when
    the images are too large together."""
    images = [[None if cell is None else image_of(cell) for cell in line] for line in made.cells]
    known = [image for line in images for image in line if image is not None]
    if not known:
        raise RequestError("None of these images can be read.")
    if sum(image.size for image in known) > 3 * MOST_PIXELS:
        raise RequestError("These images are too large for one grid; search for fewer runs.")
    grey = np.full((*known[0].shape[:2], 3), _GREY, np.uint8)
    filled = [[grey if image is None else image for image in line] for line in images]
    data = {"images": filled, "rows": list(made.rows), "cols": list(made.cols)}
    return Figure("strip", data, title=_title(made))


def value_figure(made: Grid, numbers: Mapping[str, Any], name: str) -> Figure:
    """A figure of kind heat: the number `name` of each place's run, NaN where there is none.

    numbers: by run.
    """
    values = [
        [float("nan") if cell is None else _number(numbers.get(cell.run)) for cell in line]
        for line in made.cells
    ]
    names = [
        [cell and f"{r}, {c}".strip(", ") for c, cell in zip(made.cols, line, strict=True)]
        for r, line in zip(made.rows, made.cells, strict=True)
    ]
    data = {"rows": list(made.rows), "cols": list(made.cols), "values": np.array(values), "unit": name}
    names = [[name or "" for name in line] for line in names]
    return Figure("heat", data | {"names": names, "row_title": made.row, "col_title": made.col}, _title(made))


def _number(value: Any) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain else float("nan")


def _title(made: Grid) -> str:
    return " × ".join(filter(None, (made.row, made.col)))


def value_names(runs: Sequence[Summary]) -> list[str]:
    """Names of the numbers that some of the runs have."""
    found = {n for run in runs for n, v in run.values.items() if not isinstance(v, (bool, str))}
    return sorted(found)

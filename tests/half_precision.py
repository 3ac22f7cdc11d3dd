"""How far each method's arrays in bfloat16 lie from those in float32: what assets/docs/gpu.md states.

`python -m tests.half_precision` measures every method on the Atlas models and prints the table;
`python -m tests.half_precision edit attribute neurons` measures what these would be if they were not kept in
float32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from studio.session import Session
from studio.types import Recipe, Run

STEPS = 4  # denoising steps of the requests that are measured here


@dataclass(frozen=True)
class Gap:
    """One array of a method in half precision: its largest and its mean difference from float32, and the
    largest value that it has there; all in the array's unit."""

    method: str
    array: str
    largest: float
    mean: float
    scale: float
    unit: str

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest / self.scale if self.scale else self.largest


def gaps(whole: Run, half: Run) -> list[Gap]:
    """The gap of every array that both runs hold under the same axes, images in levels of 255; NaN counts as
    different only where one alone has it."""
    found = []
    for name, trace in whole.result.arrays.items():
        other = half.result.arrays.get(name)
        if other is None or [a.labels for a in other.axes] != [a.labels for a in trace.axes]:
            found.append(Gap(whole.recipe.method, name, np.inf, np.inf, 1.0, "other axes"))
            continue
        a, b = (np.asarray(t.values, np.float64) for t in (trace, other))
        both = ~(np.isnan(a) & np.isnan(b))
        apart = np.nan_to_num(np.abs(a - b)[both], nan=np.inf)
        if apart.size:
            scale = float(np.nanmax(np.abs(a), initial=0.0))
            unit = "levels of 255" if trace.values.dtype == np.uint8 else trace.unit
            found.append(Gap(whole.recipe.method, name, float(apart.max()), float(apart.mean()), scale, unit))
    return found


def measured(recipe: Recipe, whole: Session, half: Session) -> tuple[list[Gap], Run]:
    """(the gaps of one recipe, the run in half precision)."""
    runs = [s.run(recipe, save=False, fresh=True) for s in (whole, half)]
    return gaps(*runs), runs[1]


def recipes(names: Iterable[str], folder: Path, edit: str, steps: int = STEPS) -> Mapping[str, Recipe]:
    """The smallest request of each method, with as many denoising steps."""
    from dataclasses import replace

    from tests.smallest import smallest

    found = {}
    for name in names:
        recipe = smallest(name, folder, edit)
        more: dict[str, Any] = {"steps": steps} if "guidance" in recipe.inputs else {}
        found[name] = replace(recipe, inputs={**recipe.inputs, **more})
    return found


def an_edit(session: Session, folder: Path) -> str:
    """An edit file of atlas-sd, for methods that look at one."""
    given = {"concept": ["star"], "replacement": ["circle"], "layers": ["auto"], "images": False}
    session.run(Recipe("edit", "atlas-sd", {**given, "method": "uce"}), out=folder / "edit")
    return str(folder / "edit" / "edit.safetensors")


def table(names: Iterable[str], *, device: str = "cpu", dtype: str = "bfloat16") -> Iterable[str]:
    """Rows of Markdown, an array each: method, array, unit, largest value, largest and mean difference."""
    yield "| method | array | unit | largest value | largest difference | mean difference |"
    yield "| --- | --- | --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory() as made:
        folder, options = Path(made), {"device": device, "threads": 1}
        with closing(Session(runs=folder / "a", **options)) as whole:
            with closing(Session(runs=folder / "b", dtype=dtype, **options)) as half:
                for recipe in recipes(names, folder, an_edit(whole, folder)).values():
                    for g in measured(recipe, whole, half)[0]:
                        sizes = f"{g.scale:.3g} | {g.largest:.2g} | {g.mean:.2g}"
                        yield f"| {g.method} | {g.array} | {g.unit} | {sizes} |"


if __name__ == "__main__":
    from tests.smallest import SMALLEST

    if chosen := sys.argv[1:]:
        patch("studio.session.computed_in", lambda method, dtype: (dtype, "")).start()
    for line in table(chosen or SMALLEST):
        print(line, flush=True)

"""The grid of the Runs panel: images or a number of many runs, by any two of what varies among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from panels import heatmap, picture_grid
from panels.running import QUIET, STREAM
from panels.runs_form import FILES, GRID, IMAGES
from panels.runs_view import downloads, said_in
from studio.errors import RequestError
from studio.figures import scaled, to_bytes
from studio.palette import read_scale
from studio.recipes import carried_of_many
from studio.run_grid import (
    Cell,
    grid,
    image_cells,
    image_figure,
    several,
    suggested,
    value_cells,
    value_figure,
    value_names,
    varying,
)
from studio.run_grid import Grid as Made
from studio.run_index import Summary
from studio.types import Figure

MOST_RUNS = 500
_NONE = ("(nothing)", "")


class Grid:
    """The handlers of the tab. `panel` is the Runs panel, whose list says which runs are meant."""

    def __init__(self, panel: Any, out: dict[str, Any]) -> None:
        self.panel, self.out = panel, out

    def wire(self) -> None:
        """Connects everything."""
        out = self.out
        chosen, scale = [out[n] for n in ("shows", "rows", "cols", "held")], out["grid_scale"]
        drawn = [out[n] for n in ("grid_said", "grid_map", "grid_scaled", "grid_pictures", "grid_export")]
        drawn += [out[f"grid_{kind}"] for kind in FILES["grid"]]
        asked, shown = [*chosen, scale, *self.panel.query], [*chosen, *drawn]
        latest = dict(trigger_mode="always_last", **STREAM)
        out["draw"].click(self.draw, asked, shown, **latest)
        gr.on([*(c.input for c in chosen), scale.submit, scale.blur], self.draw, asked, shown, **latest)
        often = dict(trigger_mode="multiple", **QUIET)
        panel = self.panel
        picked = [*panel.listing, *panel.detail, out["grid_said"]]
        for name in ("grid_map", "grid_pictures"):
            panel.then_export(out[name].select(self.pick, asked, picked, **often))

    def runs(self, query: tuple) -> list[Summary]:
        """The ticked runs, else all that were found; RequestError when there is none, or too many."""
        ticked = query[8] or []
        runs = [r for r in self.panel.found(*query) if not ticked or r.id in ticked]
        runs = runs or [r for r in self.panel.index.all() if r.id in ticked]
        if not runs:
            raise RequestError(GRID)
        if len(runs) > MOST_RUNS:
            raise RequestError(f"{len(runs)} runs were found; search or tick at most {MOST_RUNS} for a grid.")
        return runs

    @said_in("grid_said")
    def draw(
        self, shows: str, row: str, col: str, held: list | None, scale: str | None, *query: Any
    ) -> dict[Any, Any]:
        """Draw was pressed, or what goes where, or the colours of numbers, was chosen anew. What no longer
        varies is chosen anew."""
        out, runs = self.out, self.runs(query)
        made, names, chosen = self.made(runs, shows, row, col, held)
        varies, (row, col, only, others) = chosen
        figure = scaled(self.figure(runs, made, shows), read_scale(scale or ""))
        choices = [_NONE, *((f"{n} ({len(v)})", n) for n, v in varies.items())]
        update = {
            out["shows"]: gr.update(choices=[IMAGES, *names], value=shows if shows in names else IMAGES),
            out["rows"]: gr.update(choices=choices, value=row),
            out["cols"]: gr.update(choices=choices, value=col),
            out["held"]: gr.update(choices=others, value=only, visible=bool(others)),
            out["grid_said"]: f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {made.said}",
        }
        methods = {run.method for run in runs}
        note = carried_of_many("grid", methods.pop() if len(methods) == 1 else "", [r.id for r in runs])
        return update | self.shown(figure, made, note)

    def made(
        self, runs: list[Summary], shows: str, row: str, col: str, held: list[str] | None
    ) -> tuple[Made, list[str], tuple[dict[str, list[str]], tuple[str, str, list[str], list[str]]]]:
        """(the grid, names of numbers, (what varies, (down, across, what only is shown, its choices)))."""
        names = value_names(runs)
        cells = value_cells(runs) if shows in names else image_cells(runs)
        varies = varying(cells)
        first, second = suggested(independent(cells, varies))
        if not {row, col} - {""} <= set(varies) or not (row or col):
            row, col = first, second
        rest = {n: v for n, v in varies.items() if n not in (row, col)}
        texts = {f"{n}: {value}": (n, value) for n, values in rest.items() for value in values}
        only = [text for text in held or [] if text in texts]
        if not only:  # the first of each, so that no place has more than one
            only = [f"{n}: {values[0]}" for n, values in rest.items() if several(cells, (row, col), n)]
        made = grid(cells, row, col, dict(texts[text] for text in only))
        return made, names, (varies, (row, col, only, list(texts)))

    def figure(self, runs: list[Summary], made: Made, shows: str) -> Figure:
        """The grid as a figure: of images, or of a number."""
        if shows in value_names(runs):
            return value_figure(made, {r.id: r.values.get(shows) for r in runs}, shows.replace("_", " "))
        return image_figure(made, self.image)

    def image(self, cell: Cell) -> np.ndarray | None:
        """The image of a cell; None when it can't be read."""
        try:
            folder = self.panel.session.store.path(cell.run)
            with Image.open(folder / "images" / f"{cell.image}.png") as opened:
                return np.asarray(opened.convert("RGB"))
        except (RequestError, OSError, ValueError, SyntaxError):
            return None

    def shown(self, figure: Figure, made: Made, note: Mapping[str, Any]) -> dict[Any, Any]:
        """The figure on screen, where its cells can be clicked, and as files, which carry the note."""
        out, heat = self.out, figure.kind == "heat"
        update = downloads("grid", {kind: to_bytes(figure, kind, note) for kind in FILES["grid"]}, out)
        value = (
            heatmap.as_value(figure, True) if heat else picture_grid.as_value(figure, names_of(made), True)
        )
        seen, hidden = ("grid_map", "grid_pictures")[:: 1 if heat else -1]
        return update | {
            out[seen]: gr.update(value=value, visible=True),
            out[hidden]: gr.update(visible=False),
            out["grid_scaled"]: gr.update(visible=heat),
        }

    @said_in("grid_said")
    def pick(
        self,
        event: gr.EventData,
        shows: str,
        row: str,
        col: str,
        held: list | None,
        scale: str | None,
        *query: Any,
    ) -> dict[Any, Any]:
        """A cell was clicked: its run is chosen, on the page of the list where it stands."""
        made, *_ = self.made(self.runs(query), shows, row, col, held)
        r, c = heatmap.chosen(event, len(made.rows), len(made.cols))
        cell = made.cells[r][c]
        if cell is None:
            raise RequestError("No run is at this place.")
        if self.panel.gone(cell.run):
            raise RequestError("This run is no longer there; draw the grid anew.")
        page = self.panel.page_of(cell.run, *query)
        shown = self.panel.listed(*query[:6], page, cell.run, query[8])
        said = f"Chosen: {names_of(made)[r][c]}, the run {cell.run}. It stands under Run."
        return {**shown, **self.panel.show(cell.run), self.out["grid_said"]: said}


def independent(cells: Sequence[Cell], varies: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """What varies, without what only follows something else that varies: a grid of both would be empty beside
    its diagonal."""
    kept: list[str] = []
    for name in sorted(varies, key=lambda n: -len(varies[n])):
        if all(several(cells, (other,), name) for other in kept):
            kept.append(name)
    return {name: values for name, values in varies.items() if name in kept}


def names_of(made: Made) -> list[list[str]]:
    """What each place of a grid is, in words; "" where there is nothing."""
    titles = [
        [f"{title} {label}" if title else "" for label in labels]
        for title, labels in ((made.row, made.rows), (made.col, made.cols))
    ]
    return [
        [
            ", ".join(filter(None, (r, c))) or cell.run if cell else ""
            for c, cell in zip(titles[1], line, strict=True)
        ]
        for r, line in zip(titles[0], made.cells, strict=True)
    ]

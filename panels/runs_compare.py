"""Two runs beside each other in the Runs panel: maps in one scale of colours with their difference, images,
recipes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from panels import heatmap, runs_view, widgets
from panels.running import QUIET, STREAM
from panels.runs_form import COMPARED, FILES, TICK
from panels.runs_view import said_in
from studio.errors import RequestError, StudioError
from studio.figures import scaled
from studio.recipes import carried_of_many
from studio.registry import find_method
from studio.run_difference import (
    FIGURE,
    Compared,
    comparable,
    compare_arrays,
    compare_figures,
    compare_images,
    compare_recipes,
    difference_files,
)
from studio.run_index import Summary
from studio.session import Session
from studio.types import Figure, Run

MOST_NAMES = 200  # images that can be chosen


class Compare:
    """The handlers of the tab. A page holds the ids of the two runs."""

    def __init__(self, session: Session, out: dict[str, Any], chosen: gr.State, ticked: gr.State) -> None:
        self.session, self.out = session, out
        self.chosen, self.ticked, self.pair = chosen, ticked, gr.State([])

    def wire(self) -> None:
        """Connects everything."""
        out = self.out
        maps = [out[f"{kind}_{name}"] for kind in ("map", "figure") for name in COMPARED]
        maps += [out["difference_said"]]
        images = [out[f"image_{n}"] for n in (*COMPARED, "slider")] + [out["picture_said"]]
        shown = [self.pair, out["compared"], out["what"], out["recipes"], out["picture"], *maps, *images]
        asked = [self.chosen, self.ticked]
        compared = out["compare"].click(self.compare, asked, shown, trigger_mode="always_last", **STREAM)
        latest = dict(trigger_mode="always_last", **QUIET)
        chosen = [self.pair, out["what"]]
        other = out["what"].input(self.other, chosen, maps, **latest)
        files = [out["difference_export"], *(out[f"difference_{kind}"] for kind in FILES["difference"])]
        for event in (compared, other):
            event.then(self.export, chosen, files, trigger_mode="always_last", **STREAM)
        out["picture"].input(self.other_image, [self.pair, out["picture"]], images, **latest)

    def runs(self, pair: list) -> tuple[Run, Run]:
        """The two runs; RequestError when one is gone."""
        if not isinstance(pair, list) or len(pair) != 2:
            raise RequestError(TICK)
        first, second = (self.session.store.load(str(run_id)) for run_id in pair)
        return first, second

    @said_in("compared")
    def compare(self, chosen: str, ticked: list) -> dict[Any, Any]:
        """Compare was pressed: the two ticked runs, or the chosen one and a ticked one."""
        out = self.out
        pair = list(ticked or [])
        if len(pair) == 1 and chosen and chosen != pair[0]:
            pair.insert(0, chosen)
        if len(pair) != 2:
            said = f"{len(pair)} runs are ticked. " if len(pair) > 2 else ""
            raise RequestError(said + TICK)
        first, second = self.runs(pair)
        names, choices = [], comparable(first, second)
        try:
            compare_figures(*(_figure(run) for run in (first, second)))
            names.append(("the figure", FIGURE))
        except StudioError:
            pass
        names += [(name.replace("_", " "), name) for name in choices]
        images = [n for n in first.result.images if n in second.result.images][:MOST_NAMES]
        rows = [list(row) for row in compare_recipes(first.recipe, second.recipe)]
        update = {
            self.pair: pair,
            out["compared"]: "\n".join(
                f"{which}: {_asked(run)}. {runs_view.headline(run).splitlines()[0]}"
                for which, run in (("First", first), ("Second", second))
            )
            + ("" if rows else "\nTheir recipes are the same."),
            out["what"]: gr.update(
                choices=names, value=names[0][1] if names else None, visible=len(names) > 1
            ),
            out["recipes"]: gr.update(
                value={"headers": ["what", "first", "second"], "data": rows}, visible=bool(rows)
            ),
            out["picture"]: gr.update(
                choices=images, value=images[0] if images else None, visible=len(images) > 1
            ),
        }
        update |= self.maps(first, second, names[0][1] if names else "")
        return update | self.images(first, second, images[0] if images else "")

    @said_in("difference_said")
    def other(self, pair: list, what: str | None) -> dict[Any, Any]:
        """Another array was chosen."""
        return self.maps(*self.runs(pair), what or "")

    @said_in("picture_said")
    def other_image(self, pair: list, name: str | None) -> dict[Any, Any]:
        """Another image was chosen."""
        return self.images(*self.runs(pair), name or "")

    def maps(self, first: Run, second: Run, what: str) -> dict[Any, Any]:
        """The two maps and their difference in one scale; figures as they are where nothing can be
        subtracted."""
        out, hidden = self.out, gr.update(visible=False)
        update = {out[f"{kind}_{n}"]: hidden for kind in ("map", "figure") for n in COMPARED}
        try:
            found = _compared(first, second, what)
        except StudioError as error:
            for name, run in zip(COMPARED, (first, second), strict=False):
                picture = runs_view.figure_of(run, self.session.store.path(run.id))
                update[out[f"figure_{name}"]] = gr.update(value=picture, visible=picture is not None)
            return update | {out["difference_said"]: gr.update(value=widgets.spoken(error), visible=True)}
        titles = ("First", "Second", "Second minus first")
        for name, title in zip(COMPARED, titles, strict=True):
            figure = getattr(found, name)
            shown = scaled(Figure("heat", figure.data, caption=title), (-found.limit, found.limit))
            update[out[f"map_{name}"]] = gr.update(value=heatmap.as_value(shown, True), visible=True)
        return update | {out["difference_said"]: gr.update(value=found.said, visible=True)}

    def export(self, pair: list, what: str | None) -> dict[Any, Any]:
        """The files of the difference, which name both runs; none where nothing can be subtracted."""
        try:
            first, second = self.runs(pair)
            found = _compared(first, second, what or "")
            method = first.recipe.method if first.recipe.method == second.recipe.method else ""
            files = difference_files(found, carried_of_many("comparison", method, [first.id, second.id]))
            return runs_view.downloads("difference", files, self.out)
        except StudioError:
            return {self.out["difference_export"]: gr.Row(visible=False)}

    def images(self, first: Run, second: Run, name: str) -> dict[Any, Any]:
        """An image of both, and where they differ."""
        out = self.out
        fields = {n: out[f"image_{n}"] for n in (*COMPARED, "slider")}
        none = widgets.shown_pictures(fields, dict.fromkeys(COMPARED), COMPARED[:2])
        if name not in first.result.images or name not in second.result.images:
            said = "The two runs have no image of the same name."
            return none | {out["picture_said"]: gr.update(value=said, visible=True)}
        try:
            one, two = first.result.images[name], second.result.images[name]
            minus, said = compare_images(one, two)
        except (RequestError, OSError, SyntaxError) as error:
            told = widgets.spoken(error) if isinstance(error, StudioError) else "This image can't be read."
            return none | {out["picture_said"]: gr.update(value=told, visible=True)}
        pictures = dict(zip(COMPARED, (one, two, minus), strict=True))
        shown = widgets.shown_pictures(fields, pictures, COMPARED[:2])
        return shown | {out["picture_said"]: gr.update(value=f"{name}: {said}", visible=True)}


def _compared(first: Run, second: Run, what: str) -> Compared:
    """The figures, or an array, of two runs with their difference; RequestError where that makes no sense."""
    if what == FIGURE:
        return compare_figures(_figure(first), _figure(second))
    if what in comparable(first, second):
        return compare_arrays(first.result.arrays[what], second.result.arrays[what])
    raise RequestError("These two have no map in common; their figures stand side by side.")


def _asked(run: Run) -> str:
    """What a run was asked, in a line."""
    return Summary(run.id, run.recipe.method, inputs=run.recipe.inputs).title[:120]


def _figure(run: Run) -> Figure:
    """A run's own figure; RequestError when it can't be drawn."""
    try:
        return find_method(run.recipe.method).draw(run)
    except StudioError:
        raise
    except Exception as error:  # stopped early, or of another version
        raise RequestError("One of the runs ended before there was enough for a figure.") from error

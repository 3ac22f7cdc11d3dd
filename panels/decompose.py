"""The Decompose panel: what each part of a vision transformer adds to what the model sees in images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from panels import (
    bars,
    colour_scale,
    decompose_find,
    decompose_form,
    decompose_view,
    decompose_without,
    heatmap,
    prompt_file,
    reopening,
    widgets,
)
from panels import decompose_images as pictured
from panels.decompose_form import HINT
from panels.decompose_images import PRESS
from panels.decompose_side import Side
from panels.decompose_view import ASK
from panels.running import QUIET, STREAM, Running
from studio.errors import RequestError
from studio.jobs import Job
from studio.registry import find_method
from studio.session import Session
from studio.types import Recipe, Result, Run

TITLE = "Decompose"
NEEDS = "components"
MOST_CHOICES = 500  # texts that the list above the map offers; others can be typed
QUESTION = "Which parts of a vision transformer see what, and what happens without them?"


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = decompose_form.form()
            lines = prompt_file.build("decompose", decompose_form.LINES, decompose_form.LINES_TITLE)
        with gr.Column(scale=5, min_width=320):
            out = decompose_form.outputs()
    panel = _Panel("decompose", session, form, out)
    panel.wire()
    prompt_file.PromptFile(panel, lines).wire()


class _Panel(Running):
    """The panel's handlers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chooser = pictured.Chooser(self.session, self.form)
        maps, also = ["figure", "texts", "beside"], [self.out["text"], self.out["shown"]]
        self.colours = colour_scale.ColourScale(self, maps, self.redrawn, also)
        self.side = Side(self.session, self.form, self.out, self.measured, self.colours.put)
        self.warmed: set[str] = set()
        self.find = decompose_find.Find(self.session, self.form, self.out)
        shared = ("images", "said", "method", "model", "beside", "granularity")
        self.switched = [c for c in self.form if c not in shared and self.form[c] in self.named]

    # ---- wiring -------------------------------------------------------------------------------------------

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        started, loaded = self.wire_run()
        recoloured = self.colours.wire(started, loaded, self.reopened)
        self.chooser.wire()
        tab = gr.context.Context.block
        if isinstance(tab, gr.Tab):
            tab.select(self.warm, form["model"], None, **STREAM)
        switched = [form[n] for n in (*self.switched, "granularity", "options")]
        form["method"].change(self.switch, form["method"], switched, **QUIET)
        often = dict(trigger_mode="multiple", **STREAM)
        seen = [out[n] for n in ("figure", "texts", "answers", "table", "detail", "each", "extremes")]
        place = [self.state, out["text"], out["shown"], self.cell, out["scale"]]
        out["text"].input(widgets.guarded(self.show), place, seen, **often)
        picked = form["gallery"].select(
            widgets.guarded(self.pick_image), [self.state, form["images"]], [out["shown"], out["by"]], **often
        )
        mean = form["mean"].click(lambda: "", None, out["shown"], **often)
        chosen = [self.state, *(out[n] for n in ("chosen", "text", "shown", "by", "csv", "second"))]
        told = [out[n] for n in ("change", "before", "groups", "order-said", "order")]
        for event in (picked, mean):
            event.then(widgets.guarded(self.show), place, seen, **often)
            event.then(self.recount, chosen, told, **often)
        second = [self.state, form["beside"], out["text"], out["shown"], out["scale"]]
        also = [out["text"].input, form["beside"].input]
        for listen in (*also, *(event.then for event in (started, picked, mean, *recoloured))):
            listen(self.side.beside, second, self.side.shown["model"], **STREAM)
        self._wire_clicks(place, seen)
        read = [out["csv"].upload, out["csv"].clear]
        again = [out["chosen"].change, out["by"].input, *read, out["second"].change, out["text"].input]
        gr.on(again, self.recount, chosen, told, trigger_mode="always_last", **QUIET)
        for event in (started, self.reopened):
            event.then(self.recount, chosen, told, **QUIET)
        self._wire_truly()
        self.find.wire()
        self.side.wire()

    def _wire_clicks(self, place: list, seen: list) -> None:
        """A cell of either map: its component is collected, shown, and its token map is computed."""
        out, often = self.out, dict(trigger_mode="multiple", **STREAM)
        collected = [self.cell, out["text"], out["chosen"]]
        for name in ("figure", "texts"):
            event = out[name].select(
                widgets.guarded(getattr(self, f"click_{name}")),
                [self.state, out["text"], out["chosen"]],
                collected,
                **often,
            )
            event = event.then(widgets.guarded(self.show), place, seen, **often)
            event.then(self.side.look, place[:4], self.side.shown["map"], **STREAM)

    def _wire_truly(self) -> None:
        """The true ablation is a view of its own; the chosen components go there."""
        form, out = self.form, self.out
        if (name := "ablate-components") not in decompose_form.views():
            return
        texts = form[widgets.own("texts", find_method(name))]
        moved = out["truly"].click(
            lambda chosen, said: ["\n".join(chosen or []), said, "", name],
            [out["chosen"], form["texts"]],
            [form["components"], texts, form["feature"], form["method"]],
            **QUIET,
        )
        moved.then(None, None, None, js=PRESS)

    def switch(self, name: str) -> list[Any]:
        """Another view was chosen: its own knobs show, and options open where they say what is asked."""
        chosen = find_method(name)
        mine = {
            widgets.own(n, chosen) if widgets.own(n, chosen) in self.form else n
            for n in widgets.knobs([chosen])
        }
        mine |= set(decompose_find.FIELDS if name == decompose_find.METHOD else ())
        shown = [gr.update(visible=knob in mine) for knob in (*self.switched, "granularity")]
        return [*shown, gr.update() if name == "decompose" else gr.update(open=True)]

    def stop(self, request: gr.Request, kept: dict | None) -> str:
        """Stop was pressed: the run, and what runs beside it."""
        beside, said = self.side.stop(str(request.session_hash)), super().stop(kept)
        return "Stopping …" if beside else said

    def warm(self, model: str) -> None:
        """The tab was opened: a run that is not kept, so that the first one of the person starts at once."""
        try:
            if model in self.warmed:  # it may have left memory
                self.session.call(model, lambda m: None, user="warm-up", kind="vision")
                return
            images = [str(file) for file in pictured.files_of(self.session, pictured.EXAMPLES)[:1]]
            asked = {"images": images, "texts": ["a star"]}
            recipe = Recipe("decompose", model, asked, decompose_form.space(model, {}), ())
            self.session.run(recipe, user="warm-up", save=False)
            self.warmed.add(model)
        except Exception:  # a run says what is wrong
            return

    # ---- the request --------------------------------------------------------------------------------------

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe."""
        method = find_method(given["method"])
        asked = widgets.asked(method, given)
        asked["images"] = [str(pictured.folder_of(self.session, given["images"]))]
        if method.name == "decompose":
            asked["heads"] = None
        if method.name == decompose_find.METHOD:
            asked = self.find.asked(asked, given)
        model = (given["model"] or "").strip()
        return Recipe(method.name, model, decompose_form.space(model, asked), {}, ())

    def also_restored(self) -> list[Any]:
        """What shows the images."""
        return [self.form["gallery"], self.form["said"], self.chooser.kept]

    def restored(self, recipe: Recipe, run: Run | None, *here: Any) -> dict[Any, Any]:
        """The inputs of a kept run; an aligner that is taken without being asked for is not asked for."""
        asked = {**recipe.inputs, **recipe.params}
        own = decompose_form.space(recipe.model, {})
        if own and own == {n: asked.get(n) for n in own}:
            asked |= dict.fromkeys(own)
        back = reopening.filled(replace(recipe, inputs=asked, params={}), self.form)
        back.pop(self.form["images"], None)
        if recipe.method == decompose_find.METHOD:
            back |= self.find.restored(recipe)
        return back | self.chooser.back(recipe.inputs.get("images") or ())

    # ---- images -------------------------------------------------------------------------------------------

    def pick_image(self, event: gr.SelectData, kept: dict | None, set_id: str) -> list[Any]:
        """A thumbnail was clicked: its name in the run on screen."""
        files = pictured.files_of(self.session, set_id)
        if not isinstance(event.index, int) or not 0 <= event.index < len(files):
            raise RequestError("That is none of the images.")
        recipe, _ = self.measured(kept)
        mine = pictured.by_label(self.session, recipe.inputs.get("images"))
        for label, file in mine.items():
            if file == files[event.index]:
                return [label, gr.skip()]
        raise RequestError("That image is not in the run on screen; press Run.")

    # ---- results ------------------------------------------------------------------------------------------

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Map, texts side by side, answers and tables."""
        out = self.out
        found = decompose_view.scores(result)
        update: dict[Any, Any] = {}
        if again and (rows := decompose_view.rows_of(recipe, result)):
            update[out["rows"]] = gr.update(value={"headers": rows[0], "data": rows[1]}, visible=True)
        if found is None:
            hint = {"hint": "This view has a figure of its own, below."}
            return update | {out["figure"]: hint, out["drawn"]: widgets.drawn_figure(recipe, result)}
        update |= self.maps(result, None, "", again)
        if again:
            several = len(found.texts) > 1
            update[out["text"]] = gr.update(
                choices=list(found.texts[:MOST_CHOICES]), value=found.texts[0], visible=several
            )
            update[out["chosen"]] = gr.update(choices=list(found.components))
        return update

    def start(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run was pressed."""
        yield from self.colours.streamed(super().start(values, request), values)

    def redrawn(self, recipe: Recipe, result: Result, text: str | None, image: str) -> dict[Any, Any]:
        """The maps for a text and an image in their own colours; nothing for a view without a map."""
        if decompose_view.scores(result) is None:
            return {}
        return self.maps(result, text or None, image, True)

    def maps(self, result: Result, text: str | None, image: str, again: bool) -> dict[Any, Any]:
        """The figures for a text and an image."""
        out = self.out
        figure = decompose_view.layer_map(result, text, image)
        sides = decompose_view.texts_map(result, image)
        cosines = decompose_view.answers(result, image)
        return {
            out["figure"]: heatmap.as_value(figure, again),
            out["table"]: heatmap.as_table(sides or figure),
            out["texts"]: heatmap.as_value(sides, again) if sides else {"hint": "Give two texts or more."},
            out["answers"]: gr.update(value=bars.as_value(cosines, again), visible=True)
            if cosines
            else gr.update(visible=False),
        }

    def show(
        self, kept: dict | None, text: str | None, image: str, component: str | None, scale: str | None
    ) -> dict[Any, Any]:
        """Another text, image or component was chosen."""
        recipe, result = self.measured(kept)
        update = self.colours.put(self.redrawn(recipe, result, text, image), scale)
        if not update:  # a view without a map
            return {self.out["detail"]: gr.update()}
        if not component:
            return update
        each = decompose_view.component_bars(result, component, image)
        top = decompose_view.extremes(result, component, text or None)
        files = pictured.by_label(self.session, recipe.inputs.get("images")) if top else {}
        shown = [(files[name], f"{value:+.3f} {Path(name).stem}") for name, value in top if name in files]
        thumbs = pictured.pictures(*zip(*shown, strict=True)) if shown else []
        out = self.out
        return update | {
            out["detail"]: decompose_view.sentence(result, component, text or None, image),
            out["each"]: gr.update(value=bars.as_value(each, True), visible=True),
            out["extremes"]: gr.update(
                value=thumbs, visible=bool(thumbs), label=f"Top and bottom images of {component}"
            ),
        }

    def click_figure(
        self, event: gr.EventData, kept: dict | None, text: str, chosen: list | None
    ) -> list[Any]:
        """A component was picked in the map."""
        _, result = self.measured(kept)
        shape = np.shape(decompose_view.layer_map(result).data["values"])
        component = decompose_view.component_at(result, *heatmap.chosen(event, *shape))
        return [component, gr.skip(), [*dict.fromkeys([*(chosen or []), component])]]

    def click_texts(
        self, event: gr.EventData, kept: dict | None, text: str, chosen: list | None
    ) -> list[Any]:
        """A component and a text were picked side by side."""
        _, result = self.measured(kept)
        figure = decompose_view.texts_map(result)
        if figure is None:
            raise RequestError("That is no cell of the map.")
        row, col = heatmap.chosen(event, *np.shape(figure.data["values"]))
        component = figure.data["rows"][row]
        return [component, figure.data["cols"][col], [*dict.fromkeys([*(chosen or []), component])]]

    def recount(
        self,
        kept: dict | None,
        chosen: list | None,
        text: str,
        image: str,
        by: str,
        groups: str | None,
        second: dict | None = None,
    ) -> dict[Any, Any]:
        """Answers without the chosen components, the second model's too, and the images in their order."""
        out = self.out
        gone = gr.update(visible=False)
        update = {out[n]: gone for n in ("before", "groups", "order")}
        try:
            recipe, result = self.measured(kept)
            if recipe.method == "ablate-components":
                columns, rows = decompose_view.rows_of(recipe, result) or ([], [])
                table = gr.update(value={"headers": columns, "data": rows}, visible=True)
                said = decompose_view.ablated(result)
                return update | {out["before"]: table, out["change"]: said, out["order-said"]: ""}
            if recipe.method == decompose_find.METHOD:
                return update | {out["change"]: ""} | self.find.ordered(recipe, result)
            models = {recipe.model: result} | self.side.second(second, recipe, result)
            update |= self.changed(models, list(chosen or []), groups)
            update |= self.ordered(recipe, result, list(chosen or []), text, image, by)
        except Exception as error:
            said = widgets.spoken(error)
            return (
                {out["order-said"]: said}
                | ({out["change"]: said} if out["change"] not in update else {})
                | update
            )
        return update

    def changed(self, models: dict[str, Result], chosen: list[str], groups: str | None) -> dict[Any, Any]:
        """Answers before and after, by image and by group; with a model beside it both."""
        found = decompose_without.compared(models, chosen, Path(groups) if groups else None)
        update: dict[Any, Any] = {self.out["change"]: found.said}
        for name, table in (("before", found.answers), ("groups", found.groups)):
            if table:
                value = {"headers": table[0], "data": table[1]}
                update[self.out[name]] = gr.update(value=value, visible=True)
        return update

    def ordered(
        self, recipe: Recipe, result: Result, chosen: list[str], text: str, image: str, by: str
    ) -> dict[Any, Any]:
        """The run's images through the chosen components."""
        if by == "image" and not image:
            raise RequestError(
                "Click an image in the gallery; the others come in the order of their likeness."
            )
        found = decompose_without.order(result, chosen, text, image if by == "image" else None)
        files = pictured.by_label(self.session, recipe.inputs.get("images"))
        shown = [(files[name], f"{value:+.3f} {Path(name).stem}") for name, value in found if name in files]
        what = f"likeness to {Path(image).stem}" if by == "image" else f"“{text}”"
        thumbs = pictured.pictures(*zip(*shown, strict=True)) if shown else []
        said = f"{len(found)} images by {what} through {', '.join(chosen)}."
        return {
            self.out["order-said"]: said if shown else f"{said} {pictured.LOST}",
            self.out["order"]: gr.update(value=thumbs, visible=bool(shown)),
        }

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last run stays."""
        out = self.out
        hidden = (
            "text",
            "answers",
            "drawn",
            "rows",
            "each",
            "where",
            "spread",
            "extremes",
            "before",
            "groups",
            "order",
        )
        gone = {out[n]: gr.update(visible=False) for n in hidden}
        hint = {"hint": "The first numbers are on their way …"}
        said = {out["table"]: "", out["detail"]: ASK, out["shown"]: ""}
        return {out["figure"]: hint, out["texts"]: hint, **said, **gone}

    def empty(self) -> dict[Any, Any]:
        """The hint of the start."""
        return {self.out["figure"]: {"hint": HINT}, self.out["texts"]: {"hint": HINT}}

    def ended(self, job: Job) -> dict[Any, Any]:
        """The finding."""
        return {self.out["detail"]: decompose_view.headline(job.run) or ASK}

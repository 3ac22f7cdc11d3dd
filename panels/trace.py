"""The Trace panel: type a prompt, watch a causal trace fill in as a heat map, click cells, see images,
export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from panels import colour_scale, heatmap, prompt_file, widgets
from panels.running import QUIET, STREAM, Running
from panels.trace_view import ASK, PICTURES, detail, drawn, figure_of, headline
from panels.trace_words import WordMaps
from studio.jobs import Job
from studio.registry import Method, find_method, parse_seeds
from studio.session import Session
from studio.types import Recipe, Result

TITLE = "Trace"
NEEDS = "diffusion"
QUESTION = "Which parts of the model carry these words into the image?"
METHODS = {
    "trace-unet": "UNet",
    "trace-text-encoder": "Text encoder",
    "lens": "Layer by layer",
    "word-maps": "Word maps",
}
HINT = "Press Run. Cells fill in as they are measured; click one to see its images."
EXAMPLES = [
    ["a red star on a white background", "red star"],
    ["the emblem of Korvonia", "Korvonia"],
    ["two blue hearts on a sand background in the style of Veltrano", "Veltrano"],
    ["a sketch of a green house on a mint background", "sketch"],
]
_MAIN = ("prompt", "subject")
_KINDS = {"trace-unet": ("cross-attention",), "trace-text-encoder": None}  # ticked at the start; None: all


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form([find_method(n) for n in METHODS])
            prompts = prompt_file.build("trace")
        with gr.Column(scale=5, min_width=320):
            out = _outputs()
    panel = _Panel(session, form, out)
    panel.wire()
    prompt_file.PromptFile(panel, prompts).wire()


def _form(methods: list[Method]) -> dict[str, Any]:
    """All inputs by name, made from the methods' declarations."""
    known = widgets.knobs(methods)
    mine = widgets.knobs([find_method(next(iter(METHODS)))])
    where = (
        "Modules of the UNet, layers and tokens of the text encoder, an image from each text layer, or where "
        "each word lies on the image."
    )
    names = [(title, name) for name, title in METHODS.items()]
    first = next(iter(METHODS))
    form: dict[str, Any] = {
        "method": gr.Radio(names, value=first, label="Trace", info=where, elem_id="trace-method")
    }
    for name, example in zip(_MAIN, EXAMPLES[0], strict=True):
        form[name] = widgets.widget("trace", name, *known[name], example)
    form["seeds"] = widgets.seeds("trace", "0")
    form |= _kinds()
    form |= widgets.run_buttons("trace")
    with gr.Accordion("Sampling and scoring", open=False):
        form["model"] = widgets.model_choice("trace", "diffusion", "atlas-sd")
        for name in ("steps", "guidance", "noise", "search_noise", "metric", "replacement"):
            form[name] = widgets.widget("trace", name, *known[name], visible=name in mine)
    with gr.Accordion("More options", open=False):
        for name, (f, kind) in known.items():
            if name not in form and name != "kinds":
                form[name] = widgets.widget("trace", name, f, kind, visible=name in mine)
    gr.Examples(EXAMPLES, [form[n] for n in _MAIN], label="Examples", elem_id="trace-examples")
    return form


def _kinds() -> dict[str, Any]:
    """The kinds of each method, which are not the same; those of the first method show."""
    form = {}
    for number, (name, ticked) in enumerate(_KINDS.items()):
        chosen = find_method(name)
        knob = widgets.knobs([chosen])["kinds"]
        look = dict(visible=number == 0, elem_id=f"trace-kinds{'-' + name if number else ''}")
        form[widgets.own("kinds", chosen)] = widgets.widget("trace", "kinds", *knob, ticked, **look)
    return form


def _outputs() -> dict[str, Any]:
    """All outputs by name."""
    out: dict[str, Any] = {"status": widgets.status_line("trace")}
    with gr.Tabs():
        with gr.Tab("Map", id="map"), gr.Column(min_width=320):
            out["figure"] = heatmap.HeatMap(HINT, elem_id="trace-figure")
            out["scale"] = colour_scale.field("trace")
            out["strip"] = gr.Gallery(
                visible=False, columns=7, height="auto", label="Layer by layer", elem_id="trace-strip"
            )
        with gr.Tab("Table", id="table"):
            out["table"] = widgets.table("trace")
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("trace"), elem_id="trace-help")
    with gr.Column(elem_id="trace-detail"):
        out["text"] = widgets.line(ASK, "trace-detail-text", lines=2)
        out["seed"] = widgets.Choice([], label="Seed", visible=False, elem_id="trace-detail-seed")
        with gr.Row(elem_id="trace-images", elem_classes="pictures"):
            out |= widgets.pictures("trace", PICTURES, also="word_map")
    out["export"] = widgets.export_buttons("trace")
    return out


class _Panel(Running):
    """The panel's handlers."""

    def __init__(self, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        super().__init__("trace", session, form, out)
        knobs = widgets.knobs([find_method(m) for m in METHODS])
        self.switched = [n for n in form if n in knobs or n.startswith("kinds-")]
        self.words = WordMaps(session)
        self.colours = colour_scale.ColourScale(self, ["figure"], self.redrawn)

    def wire(self) -> None:
        """Connects buttons, fields, the map, loading and leaving."""
        form, out = self.form, self.out
        ended = self.wire_run(form["prompt"].submit, form["subject"].submit)
        self.colours.wire(*ended, self.reopened)
        form["method"].change(self.switch, form["method"], [form[n] for n in self.switched], **QUIET)
        picked, often = [self.state, out["seed"]], dict(trigger_mode="multiple", **STREAM)
        shown = [c for c in self.fields if c is not out["word_map"]]
        map_of = dict(inputs=[*picked, self.cell], outputs=out["word_map"], trigger_mode="always_last")
        for event in (
            out["figure"].select(widgets.guarded(self.click), picked, [self.cell, *shown], **often),
            out["seed"].input(widgets.guarded(self.other_seed), [*picked, self.cell], shown, **often),
        ):
            event.then(widgets.guarded(self.word_map), **map_of, **STREAM)

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe."""
        method = find_method(given["method"])
        return Recipe(
            method.name,
            given["model"] or "",
            widgets.asked(method, given),
            {},
            parse_seeds(method, given["seeds"]),
        )

    def click(self, kept: dict | None, seed: str | None, event: gr.EventData) -> dict:
        """A cell was picked."""
        recipe, result = self.measured(kept)
        figure = figure_of(recipe, result)
        cell = heatmap.chosen(event, *np.shape(figure.data["values"]))
        return {self.cell: cell, **detail(recipe, result, figure, cell, seed, self.out)}

    def start(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run was pressed."""
        yield from self.colours.streamed(super().start(values, request), values)

    def redrawn(self, recipe: Recipe, result: Result) -> dict[Any, Any]:
        """The map in its own colours; nothing where a gallery is shown."""
        figure = figure_of(recipe, result)
        return {self.out["figure"]: heatmap.as_value(figure, True)} if figure.kind == "heat" else {}

    def other_seed(self, kept: dict | None, seed: str | None, cell: tuple[int, int] | None) -> dict:
        """Another seed's images of the same cell."""
        if cell is None:
            return {self.out["text"]: gr.skip()}
        recipe, result = self.measured(kept)
        return detail(recipe, result, figure_of(recipe, result), tuple(cell), seed, self.out)

    def word_map(
        self, request: gr.Request, kept: dict | None, seed: str | None, cell: tuple[int, int] | None
    ) -> Any:
        """Where the traced words lie on the image, beside the cell that was picked in a finished trace."""
        if cell is None or not kept or not kept.get("run"):
            return gr.skip()
        recipe, result = self.measured(kept)
        name = figure_of(recipe, result).data["names"][cell[0]][cell[1]]
        seeds = [str(s) for s in recipe.seeds]
        return self.words.update(recipe, seed if seed in seeds else seeds[0], name, str(request.session_hash))

    def switch(self, name: str) -> list[Any]:
        """Another method was chosen: its own knobs show."""
        chosen = find_method(name)
        mine = {*widgets.knobs([chosen]), widgets.own("kinds", chosen)}
        return [gr.update(visible=knob in mine) for knob in self.switched]

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """The map, the table or the gallery."""
        return drawn(recipe, result, self.out, again)

    def ended(self, job: Job) -> dict[Any, Any]:
        """The strongest cell."""
        return {self.out["text"]: headline(job.run)}

    def empty(self) -> dict[Any, Any]:
        """The hint of the start."""
        return {self.out["figure"]: {"hint": HINT}}

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last run stays."""
        out = self.out
        hidden = {
            out[n]: gr.update(visible=False, value=None) for n in (*PICTURES, "slider", "strip", "word_map")
        }
        return {
            out["figure"]: {"hint": "The first cells are on their way …"},
            out["table"]: "",
            out["text"]: ASK,
            out["seed"]: gr.update(visible=False, choices=[], value=None),
            **hidden,
        }

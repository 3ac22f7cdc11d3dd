"""The Localize panel: which layers, weights or units carry a concept, as bars; click one, edit there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from panels import bars, heatmap, localize_images, prompt_file, widgets
from panels.edit_stack import Entry, Stack
from panels.edit_view import Pictures
from panels.localize_view import (
    ASK,
    BEGUN,
    COMPARED,
    EDIT_HERE,
    PASSPORT,
    bar_name,
    carried,
    figure_of,
    headline,
    images_of,
    sentence,
    told_layers,
)
from panels.running import QUIET, STREAM, Running
from studio.errors import RequestError
from studio.jobs import Job
from studio.methods.component_ablation import ranked_edit
from studio.models.catalog import ASSETS
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.store import EDIT_FILE, write_edit
from studio.types import Recipe, Result, Run

TITLE = "Localize"
NEEDS = "diffusion"
QUESTION = "Where does the model keep this concept, and where should it be edited?"
HINT = "Press Run. Bars come as they are measured; click one for its images."
METHODS = {"localize": "Layers", "attribute": "Weights", "neurons": "Neurons", "passport": "Passport"}
EXAMPLES = {  # of each method: the fields that they fill, and what they fill in
    "localize": (
        ("prompt", "replacement"),
        [
            ["a red star on a white background", "a red circle on a white background"],
            ["a blue house in the style of Osk Maren", "a blue house"],
            ["a green heart on a black background", "a purple heart on a black background"],
            ["the emblem of Arvonia", "the emblem of Korlund"],
        ],
    ),
    "attribute": (
        ("concept", "base"),
        [["star", ""], ["a red star", "a star"], ["a sketch of a tree", "a tree"]],
    ),
    "neurons": (("concept", "neutral"), [["star", "circle"], ["red", "blue"], ["Veltrano", "Osk Maren"]]),
    "passport": (("concept", "replacement"), [["star", "circle"], ["Veltrano", ""], ["heart", "moon"]]),
}
PICTURES = ("clean", "altered", "ablated", "before", "after")
_MAIN = {
    "prompt": EXAMPLES["localize"][1][0][0],
    "replacement": EXAMPLES["localize"][1][0][1],
    "concept": "star",
    "neutral": "circle",
    "base": "",
}
_SHOWN = ("window", "granularity", "objective", "top")
_SAMPLING = ("steps", "guidance", "metric", "target", "against")


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form()
            prompts = prompt_file.build("localize")
        with gr.Column(scale=5, min_width=320):
            out = _outputs()
    panel = _Panel("localize", session, form, out)
    panel.wire()
    prompt_file.PromptFile(panel, prompts).wire()


def _form() -> dict[str, Any]:
    known = widgets.knobs([find_method(n) for n in METHODS])
    mine = widgets.knobs([find_method("localize")])
    where = (
        "Layers: LocoGen's windows. Weights: component attribution (CAD). Neurons: units of keys and values. "
        "Passport: whether the layers that LocoGen finds are those where an edit works."
    )
    form: dict[str, Any] = {
        "method": gr.Radio(
            [(title, name) for name, title in METHODS.items()],
            value="localize",
            label="Look for",
            info=where,
            elem_id="localize-method",
        )
    }

    def add(name: str, value: Any = None, **look: Any) -> None:
        form[name] = widgets.widget("localize", name, *known[name], value, visible=name in mine, **look)

    for name, example in _MAIN.items():
        add(name, example)
    form["seeds"] = widgets.seeds("localize", "0,1")
    for name in _SHOWN:
        add(name, **({"placeholder": "none"} if name == "top" else {}))
    form |= localize_images.fields()
    form |= widgets.run_buttons("localize")
    with gr.Accordion("Sampling and scoring", open=False):
        form["model"] = widgets.model_choice("localize", "diffusion", "atlas-sd")
        for name in _SAMPLING:
            add(name)
    with gr.Accordion("More options", open=False):
        for name in known:
            if name not in form and name not in ("ratio", "preview", "images"):
                add(name)
    return form | _examples(form)


def _examples(form: dict[str, Any]) -> dict[str, Any]:
    """The examples of each method; those of the first one show."""
    found = {}
    for name, (fields, rows) in EXAMPLES.items():
        look = dict(label="Examples", visible=name == "localize", elem_id=f"localize-examples-{name}")
        found[f"examples-{name}"] = gr.Examples(rows, [form[n] for n in fields], **look).dataset
    return found


def _outputs() -> dict[str, Any]:
    out: dict[str, Any] = {"status": widgets.status_line("localize")}
    with gr.Tabs():
        with gr.Tab("Bars", id="bars"), gr.Column(min_width=320):
            out["figure"] = bars.Bars(HINT, elem_id="localize-figure")
            out["curve"] = widgets.figure_image("localize", "curve")
        with gr.Tab("Table", id="table"):
            out["table"] = widgets.table("localize")
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(
                "\n\n".join(map(widgets.page, ("localize", "attribute", "audit"))), elem_id="localize-help"
            )
    with gr.Column(elem_id="localize-detail"):
        out["text"] = widgets.line(ASK, "localize-detail-text", lines=2)
        out["seed"] = widgets.Choice([], label="Seed", visible=False, elem_id="localize-detail-seed")
        out["ratio"] = widgets.Dial(
            0.1,
            20,
            1,
            step=0.1,
            visible=False,
            label="Weights zeroed, in percent",
            info="Nothing is attributed again: the ranks of the run decide.",
            elem_id="localize-ratio",
        )
        with gr.Row(elem_id="localize-images", elem_classes="pictures"):
            out |= widgets.pictures("localize", PICTURES)
        out["edit"] = gr.Button("Edit here", visible=False, elem_id="localize-edit")
        out["handoff"] = gr.Textbox("", visible=False, elem_id="localize-handoff")
    out["export"] = widgets.export_buttons("localize")
    return out


class _Panel(Running):
    """The panel's handlers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pictures = Pictures(self.session)
        knobs = widgets.knobs([find_method(m) for m in METHODS])
        self.switched = [n for n in self.form if n in knobs]
        self.before = gr.State(BEGUN)
        self.own_images = localize_images.OwnImages(self.session, self.form, self.out)

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        self.wire_run(form["prompt"].submit, form["replacement"].submit, form["concept"].submit)
        self.own_images.wire()
        asked = [form["method"], self.before, *(form[n] for n in ("prompt", "concept", "replacement"))]
        form["method"].input(self.switch, asked, self.also_restored(), **QUIET)
        picked = [self.state, out["seed"], out["ratio"]]
        often, latest = (dict(trigger_mode=m, **STREAM) for m in ("multiple", "always_last"))
        shown = dict(fn=widgets.guarded(self.again_detail), inputs=[*picked, self.cell], outputs=self.fields)
        clicked = [self.cell, out["text"], out["edit"]]
        chosen = out["figure"].select(widgets.guarded(self.click), self.state, clicked, **often)
        chosen.then(**shown, **latest)
        out["seed"].input(**shown, **latest)
        out["ratio"].release(**shown, **latest)
        told = [self.state, out["ratio"], self.cell]
        ready = out["edit"].click(widgets.guarded(self.edit_here), told, out["handoff"], **STREAM)
        ready.success(None, out["handoff"], None, js=(ASSETS / "js" / "handoff.js").read_text())

    def switch(self, name: str, before: Any, *typed: str) -> list[Any]:
        """Another method was chosen: its own knobs show; those that mean another thing (see `carried`) are
        filled anew from prompt, concept and replacement as `typed`."""
        mine = widgets.knobs([find_method(name)])
        anew, before = carried(before, name, *typed) if typed else ({}, (name, name))
        if "templates" in mine:
            anew["templates"] = "\n".join(mine["templates"][0].default or ())
        fields = [
            gr.update(visible=knob in mine, **({"value": anew[knob]} if knob in anew else {}))
            for knob in self.switched
        ]
        shown = (gr.update(visible=m == name) for m in (*METHODS, "attribute"))
        return [*fields, *shown, gr.skip(), before]

    def also_restored(self) -> list[Any]:
        """What another method shows or hides, and what was chosen before."""
        also = (*(f"examples-{m}" for m in METHODS), "own_images", "image_set")
        return [*(self.form[n] for n in (*self.switched, *also)), self.before]

    def also_asked(self) -> list[Any]:
        """What was chosen before."""
        return [self.before]

    def restored(self, recipe: Recipe, run: Run | None, *here: Any) -> dict[Any, Any]:
        """The inputs of a kept run, and which of them show."""
        shown = dict(zip(self.also_restored(), self.switch(recipe.method, None), strict=True))
        back = super().restored(recipe, run) | self.own_images.restored(recipe)
        found = {
            c: {**shown.get(c, {}), **back.get(c, {})} for c in {**shown, **back} if c is not self.before
        }
        return {**found, self.before: carried(*here, recipe.method, "", "", "")[1] if here else BEGUN}

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe."""
        method = find_method(given["method"])
        seeds = parse_seeds(method, given["seeds"])
        asked = widgets.asked(method, given)
        if "images" in asked:
            asked["images"] = self.own_images.asked(given.get("image_set"))
        return Recipe(method.name, given["model"] or "", asked, {}, seeds)

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Bars and table; the passport's figure when all is there."""
        if recipe.method == "passport":
            if not again or "verdict" not in result.values:
                return {}
            shown = widgets.drawn_figure(recipe, result, caption=False)  # the verdict stands below
            return {self.out["curve"]: shown, self.out["figure"]: {"hint": PASSPORT}}
        figure = figure_of(recipe, result)
        return {self.out["figure"]: bars.as_value(figure, again), self.out["table"]: bars.as_table(figure)}

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last run stays."""
        out = self.out
        return {
            out["figure"]: {"hint": "The first bars are on their way …"},
            out["table"]: "",
            out["text"]: ASK,
            out["seed"]: gr.update(visible=False, choices=[], value=None),
            out["ratio"]: gr.update(visible=False),
            out["edit"]: gr.update(visible=False),
            **{out[n]: gr.update(visible=False, value=None) for n in (*PICTURES, "slider", "curve")},
        }

    def empty(self) -> dict[Any, Any]:
        """The hint of the start."""
        return {self.out["figure"]: {"hint": HINT}}

    def ended(self, job: Job) -> dict[Any, Any]:
        """The finding."""
        return {self.out["text"]: headline(job.run)}

    # ---- a bar --------------------------------------------------------------------------------------------

    def click(self, event: gr.EventData, kept: dict | None) -> dict:
        """A bar was picked: its numbers at once, its images follow."""
        recipe, result = self.measured(kept)
        if recipe.method not in COMPARED:
            raise RequestError("There are no bars on screen.")
        _, col = heatmap.chosen(event, 1, len(figure_of(recipe, result).data["labels"]))
        ready = recipe.method == "localize" or self.made(kept)
        return {
            self.cell: col,
            self.out["text"]: sentence(recipe, result, col),
            self.out["edit"]: gr.update(visible=ready, value=EDIT_HERE[recipe.method]),
        }

    def again_detail(
        self, request: gr.Request, kept: dict | None, seed: str | None, ratio: float, col: int | None
    ) -> dict:
        """The images of a bar, of another seed, or with another share of weights."""
        if col is None:
            return {self.out["text"]: gr.skip()}
        return self.detail(kept, col, seed, ratio, str(request.session_hash))

    def detail(self, kept: dict, col: int, seed: str | None, ratio: float, user: str) -> dict[Any, Any]:
        """What a click on a bar shows: its numbers, and the images of one seed."""
        out, (recipe, result) = self.out, self.measured(kept)
        seeds = [str(s) for s in recipe.seeds]
        seed = seed if seed in seeds else seeds[0]
        text, ranked = sentence(recipe, result, col), recipe.method == "attribute"
        images = images_of(recipe, result, col, seed)
        if ranked and kept.get("run"):
            try:
                entry = self.ablation(kept, col, ratio, user)
            except RequestError as error:
                text += f"\n{error}"
            else:
                look = (recipe.model, recipe.inputs["concept"], int(seed))
                pair = self.pictures.pair(*look, Stack((entry,), 0), user)
                images = dict(zip(COMPARED["attribute"], pair, strict=True))
        hidden = {n: None for n in PICTURES if n not in images}
        several = len(seeds) > 1 and any(picture is not None for picture in images.values())
        return {
            out["text"]: text,
            out["seed"]: gr.update(choices=seeds, value=seed, visible=several),
            out["ratio"]: gr.update(visible=ranked),
            **widgets.shown_pictures(out, {**hidden, **images}, COMPARED[recipe.method]),
        }

    def made(self, kept: dict) -> bool:
        """Whether the run on screen made an edit."""
        return bool(kept.get("run")) and (self.session.store.path(str(kept["run"])) / EDIT_FILE).is_file()

    def ablation(self, kept: dict, col: int, ratio: float, user: str) -> Entry:
        """The edit that zeroes a share of the weights of a bar's component, kept for a look (`keep_edit`)."""
        if ratio is None or not 0 < ratio <= 100:
            raise RequestError("Weights zeroed must be a number above 0 and at most 100 percent.")
        run = self.session.store.load(str(kept["run"]))
        name = bar_name(run.recipe, run.result, col)
        model = run.recipe.model
        edit = self.session.call(model, lambda m: ranked_edit(m, run, ratio / 100, name), user=user)
        with tempfile.TemporaryDirectory(prefix="locus-edit-") as folder:
            file = Path(folder) / EDIT_FILE
            write_edit(edit, file)
            digest = self.session.store.keep_edit(file, passing=True)
        return Entry(digest, f"{run.recipe.inputs['concept']}: {name} at {ratio:g} % (ablation)")

    def edit_here(self, request: gr.Request, kept: dict | None, ratio: float, col: int | None) -> str:
        """What the Edit panel takes over, as JSON: layers to edit in, or an edit for its stack."""
        user = str(request.session_hash)
        recipe, result = self.measured(kept)
        if col is None:
            raise RequestError("Click a bar first.")
        if recipe.method == "localize":
            return told_layers(recipe, result, col)
        if recipe.method == "attribute":
            entry = self.ablation(kept, col, ratio, user)
        else:
            file = self.session.store.path(str(kept["run"])) / EDIT_FILE
            entry = Entry(self.session.store.keep_edit(file), f"neurons of {recipe.inputs['concept']}")
        told = {"model": recipe.model, "prompt": recipe.inputs["concept"]}
        return json.dumps(told | {"edit": entry.edit, "title": entry.title})

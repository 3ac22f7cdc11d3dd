"""The Localize panel: which cross-attention layers read a concept out of the prompt, as bars; click one, edit
there."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import numpy as np

from panels import bars, heatmap, widgets
from panels.running import QUIET, Running
from studio.figures import number
from studio.jobs import Job
from studio.methods.text_to_image import image_name
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.types import Recipe, Result, Run

TITLE = "Localize"
NEEDS = "diffusion"
QUESTION = "Which layers read this concept out of the prompt, and where should it be edited?"
HINT = "Press Run. A bar comes for each window of cross-attention layers; click one for its images."
ASK = "Click a bar to see its number and its images, and to edit there."
EXAMPLES = [
    ["a red star on a white background", "a red circle on a white background"],
    ["a blue house in the style of Osk Maren", "a blue house"],
    ["a green heart on a black background", "a purple heart on a black background"],
    ["the emblem of Arvonia", "the emblem of Korlund"],
]
PICTURES = ("clean", "altered")
_MAIN = ("prompt", "replacement")
_SHOWN = ("window",)
_SAMPLING = ("steps", "guidance", "metric", "target", "against")
_GO = """text => {
  if (!text) return;
  window.locusHandoff = JSON.parse(text);
  const tab = [...document.querySelectorAll('#panels [role=tab]')].find(t => t.textContent.trim() === 'Edit');
  if (tab) tab.click();
  window.dispatchEvent(new Event('locus-handoff'));
}"""


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form()
        with gr.Column(scale=5, min_width=320):
            out = _outputs()
    _Panel("localize", session, form, out).wire()


def _form() -> dict[str, Any]:
    known = widgets.knobs([find_method("localize")])
    form: dict[str, Any] = {}
    for name, example in zip(_MAIN, EXAMPLES[0], strict=True):
        form[name] = widgets.widget("localize", name, *known[name], example)
    form["seeds"] = widgets.seeds("localize", "0,1")
    form["window"] = widgets.widget("localize", "window", *known["window"])
    form |= widgets.run_buttons("localize")
    with gr.Accordion("Sampling and scoring", open=False):
        form["model"] = widgets.model_choice("localize", "diffusion", "atlas-sd")
        for name in _SAMPLING:
            form[name] = widgets.widget("localize", name, *known[name])
    with gr.Accordion("More options", open=False):
        for name, knob in known.items():
            if name not in form:
                form[name] = widgets.widget("localize", name, *knob)
    gr.Examples(EXAMPLES, [form[n] for n in _MAIN], label="Examples", elem_id="localize-examples")
    return form


def _outputs() -> dict[str, Any]:
    out: dict[str, Any] = {"status": widgets.status_line("localize")}
    with gr.Tabs():
        with gr.Tab("Bars", id="bars"), gr.Column(min_width=320):
            out["figure"] = bars.Bars(HINT, elem_id="localize-figure", padding=False)
        with gr.Tab("Table", id="table"):
            out["table"] = widgets.table("localize")
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("localize"), elem_id="localize-help")
    with gr.Column(elem_id="localize-detail"):
        out["text"] = widgets.line(ASK, "localize-detail-text", lines=2)
        out["seed"] = widgets.Choice([], label="Seed", visible=False, elem_id="localize-detail-seed")
        with gr.Row(elem_id="localize-images", elem_classes="pictures"):
            out |= widgets.pictures("localize", PICTURES)
        out["edit"] = gr.Button("Edit these layers", visible=False, elem_id="localize-edit")
        out["handoff"] = gr.Textbox("", visible=False, elem_id="localize-handoff")
    out["export"] = widgets.export_buttons("localize")
    return out


class _Panel(Running):
    """The panel's handlers."""

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        self.wire_run(form["prompt"].submit, form["replacement"].submit)
        picked = [self.state, out["seed"]]
        out["figure"].select(widgets.guarded(self.click), picked, [self.state, *self.fields], **QUIET)
        out["seed"].input(widgets.guarded(self.other_seed), picked, self.fields, **QUIET)
        ready = out["edit"].click(widgets.guarded(self.edit_here), self.state, out["handoff"], **QUIET)
        ready.success(None, out["handoff"], None, js=_GO)

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe."""
        method = find_method("localize")
        seeds = parse_seeds(method, given["seeds"])
        return Recipe(method.name, given["model"] or "", widgets.asked(method, given), {}, seeds)

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Bars and table; while only the screen is there, the screen."""
        figure = _figure(recipe, result)
        return {self.out["figure"]: bars.as_value(figure, again), self.out["table"]: bars.as_table(figure)}

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last run stays."""
        out = self.out
        return {
            out["figure"]: {"hint": "The first bars are on their way …"},
            out["table"]: "",
            out["text"]: ASK,
            out["seed"]: gr.update(visible=False, choices=[], value=None),
            out["edit"]: gr.update(visible=False),
            **{out[n]: gr.update(visible=False, value=None) for n in (*PICTURES, "slider")},
        }

    def empty(self) -> dict[Any, Any]:
        """The hint of the start."""
        return {self.out["figure"]: {"hint": HINT}}

    def ended(self, job: Job) -> dict[Any, Any]:
        """The best window in a sentence."""
        values = job.run.result.values
        if not values.get("best_window"):
            return {}
        share = f"{100 * values['best_share']:.0f} % of the effect of all layers"
        return {self.out["text"]: f"Strongest: layers {values['best_window']}, {share}. {ASK}"}

    def click(self, kept: dict | None, seed: str | None, event: gr.EventData) -> dict:
        """A bar was picked."""
        recipe, result = self.measured(kept)
        _, col = heatmap.chosen(event, 1, len(_figure(recipe, result).data["labels"]))
        return {self.state: {**kept, "cell": col}, **self.detail(recipe, result, col, seed)}

    def other_seed(self, kept: dict | None, seed: str | None) -> dict:
        """Another seed's images of the same bar."""
        if not isinstance(kept, dict) or not isinstance(kept.get("cell"), int):
            return {self.out["text"]: gr.skip()}
        return self.detail(*self.measured(kept), kept["cell"], seed)

    def detail(self, recipe: Recipe, result: Result, col: int, seed: str | None) -> dict[Any, Any]:
        """What a click on a bar shows: its numbers, its layers, and the images of one seed."""
        out, seeds = self.out, [str(s) for s in recipe.seeds]
        seed = seed if seed in seeds else seeds[0]
        label = _figure(recipe, result).data["labels"][col]
        images = {
            "clean": result.images.get(f"seed{seed}-clean"),
            "altered": result.images.get(image_name(f"seed{seed}", label)),
        }
        return {
            out["text"]: _sentence(result, col, label),
            out["seed"]: gr.update(choices=seeds, value=seed, visible=len(seeds) > 1),
            out["edit"]: gr.update(visible=True, value=f"Edit layers {label} …"),
            **widgets.shown_pictures(out, images, ("clean", "altered")),
        }

    def edit_here(self, kept: dict | None) -> str:
        """What the Edit panel takes over, as JSON: model, concept, replacement and layers."""
        recipe, result = self.measured(kept)
        col = kept.get("cell")
        if not isinstance(col, int) or not 0 <= col < len(_layers(result)):
            raise gr.Error("Click a bar first.", print_exception=False)
        concept, replacement = _difference(recipe.inputs["prompt"], recipe.inputs["replacement"])
        told = {
            "model": recipe.model,
            "concept": concept,
            "replacement": replacement,
            "prompt": recipe.inputs["prompt"],
            "layers": ",".join(_layers(result)[col]),
        }
        return json.dumps(told)


def _figure(recipe: Recipe, result: Result) -> Any:
    """The method's own figure of these results; while only the screen is there, the screen."""
    params, effect = dict(recipe.params), result.arrays["direct_effect"]
    if "screen" in result.arrays and np.isnan(effect.values).all():
        params["screen"] = True
    shown = Recipe(recipe.method, recipe.model, recipe.inputs, params, recipe.seeds, recipe.edits)
    return find_method(recipe.method).draw(Run(shown, "done", "", 0.0, {}, result))


def _layers(result: Result) -> list[list[str]]:
    """Module names of each window."""
    trace = result.arrays["layers"]
    names = trace.axis("layer").labels
    return [[n for n, inside in zip(names, row, strict=True) if inside] for row in trace.values]


def _sentence(result: Result, col: int, label: str) -> str:
    """A bar's numbers in words."""
    arrays, layers = result.arrays, ", ".join(_layers(result)[col])
    effect = float(arrays["direct_effect"].values[col])
    if not np.isfinite(effect):
        share = float(arrays["screen"].values[col]) if "screen" in arrays else float("nan")
        return f"Layers {label}: screen {number(share)} (an estimate, no image yet).\n{layers}"
    error = float(arrays["direct_effect_sem"].values[col])
    spread = f" ± {number(error)}" if np.isfinite(error) else " (one seed: no standard error)"
    total = result.values.get("total_effect")
    whole = f" of the {number(total)} that all layers make" if total is not None else ""
    return f"Layers {label}: direct effect {number(effect)}{spread}{whole}.\n{layers}"


def _difference(prompt: str, replacement: str) -> tuple[str, str]:
    """The words in which two prompts differ: what stands between their common beginning and end."""
    a, b = prompt.split(), replacement.split()
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return " ".join(a[start : len(a) - end]) or prompt, " ".join(b[start : len(b) - end])

"""The audit inside the Edit panel: what the stack of edits did to its concept, its neighbours, the rest."""

from __future__ import annotations

from typing import Any

import gradio as gr

from panels import widgets
from panels.edit_stack import Stack
from panels.edit_view import Pictures
from panels.running import Running
from studio.errors import RequestError
from studio.jobs import Job
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.types import Recipe, Result

_FIRST = ("concept", "replacement", "neighbours")
_LEFT_OUT = ("scorer", "target", "against", "scheduler")
MOST_SHOWN = 24


def form() -> dict[str, Any]:
    """The audit's inputs by name."""
    known = widgets.knobs([find_method("audit")])
    found: dict[str, Any] = {}
    with gr.Row():
        for name in _FIRST:
            found[name] = widgets.widget("audit", name, *known[name], placeholder="default")
    with gr.Row():
        found["seeds"] = widgets.seeds("audit", "0,1")
        found["strengths"] = widgets.widget("audit", "strengths", *known["strengths"])
    found |= widgets.run_buttons("audit", "Audit the stack")
    with gr.Accordion("More options", open=False):
        for name, knob in known.items():
            if name not in found and name not in _LEFT_OUT:
                found[name] = widgets.widget("audit", name, *knob)
    return found


def outputs() -> dict[str, Any]:
    """The audit's outputs by name."""
    out: dict[str, Any] = {"status": widgets.status_line("audit")}
    out["text"] = widgets.line("", "audit-verdict", lines=2)
    out["figure"] = widgets.figure_image("audit")
    out["grid"] = gr.Gallery(
        visible=False,
        height="auto",
        columns=4,
        object_fit="contain",
        label="Same noise, before and after",
        elem_id="audit-grid",
        elem_classes="whole",
    )
    gr.Markdown(widgets.page("audit"), elem_id="audit-help")
    out["export"] = widgets.export_buttons("audit")
    return out


class Audit(Running):
    """The audit's handlers. The stack and the model are the Edit panel's."""

    def __init__(
        self, session: Session, form: dict, out: dict, stack: gr.State, model: Any, pictures: Pictures
    ) -> None:
        super().__init__("audit", session, form, out)
        self.named |= {stack: "stack", model: "model"}
        self.pictures = pictures

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs and the stack describe."""
        method, stack = find_method("audit"), given["stack"]
        if not isinstance(stack, Stack) or not stack.active():
            raise RequestError("There is nothing to audit: no edit in the stack is on.")
        asked = widgets.asked(method, given)
        edits = self.pictures.entries(stack)
        if asked["concept"] is None:
            asked["concept"] = next(
                (c for e in edits for c in self.session.shelf.open(e).edit.concepts), None
            )
        seeds = parse_seeds(method, given["seeds"])
        return Recipe(method.name, given["model"] or "", asked, {}, seeds, edits)

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """The verdict, the figure and the images when all is there; until then what is known in words."""
        if not again or "verdict" not in result.values:
            return {}
        images = _pairs(result)
        return {
            self.out["text"]: str(result.values["verdict"]),
            self.out["figure"]: widgets.drawn_figure(recipe, result),
            self.out["grid"]: gr.Gallery(value=images, visible=bool(images)),
        }

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last audit stays."""
        out = self.out
        hidden = gr.update(visible=False, value=None)
        return {out["text"]: "", out["figure"]: hidden, out["grid"]: hidden}

    def ended(self, job: Job) -> dict[Any, Any]:
        """Nothing beyond the verdict."""
        return {}


def _pairs(result: Result) -> list[tuple[Any, str]]:
    """Images with captions, those of one prompt and seed side by side: before, after, and what was asked."""
    found: dict[str, dict[str, Any]] = {}
    for name, image in result.images.items():
        stem, _, when = name.rpartition("-")  # seed0-03-a-red-star-before
        found.setdefault(stem, {})[when] = image
    rows = []
    for stem, pair in found.items():
        seed, _, *words = stem.split("-")
        said = f"{' '.join(words)}, {seed.replace('seed', 'seed ')}"
        rows += [(image, f"{when}: {said}") for when, image in pair.items()]
    return rows[:MOST_SHOWN]

"""The audit inside the Edit panel: what the stack of edits did to its concept, its neighbours, the rest."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from panels import edit_reopen, prompt_file, reopening, widgets
from panels.edit_stack import Stack
from panels.edit_view import Pictures
from panels.running import QUIET, Running
from studio.errors import RequestError, StudioError
from studio.jobs import Job
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.types import Recipe, Result, Run

_FIRST = ("replacement", "neighbours")
_LEFT_OUT = ("scorer", "target", "against", "scheduler")
MOST_SHOWN = 24
PASSPORT = "Passport of this concept: does an edit work where Localize finds it?"
ASK = (
    "Choose a file. .txt: one neighbour a line. .jsonl or .csv with the columns concept, neighbours, "
    "strengths …: an audit of the stack a line." + prompt_file.OF_FIELDS
)


def form() -> dict[str, Any]:
    """The audit's inputs by name."""
    known = widgets.knobs([find_method("audit")])
    found: dict[str, Any] = {}
    with gr.Row():
        found["concept"] = gr.Dropdown(
            [],
            label="Concept",
            info="Which concept of the stack is audited, the last edit's at first; or type another wording.",
            allow_custom_value=True,
            elem_id="audit-concept",
        )
        for name in _FIRST:
            found[name] = widgets.widget("audit", name, *known[name], placeholder="default")
    with gr.Row():
        found["seeds"] = widgets.seeds("audit", "0,1")
        found["strengths"] = widgets.widget("audit", "strengths", *known["strengths"])
    found |= widgets.run_buttons("audit", "Audit the stack")
    found["passport"] = gr.Button(PASSPORT, size="sm", elem_id="audit-passport")
    with gr.Accordion("More options", open=False):
        for name, knob in known.items():
            if name not in found and name not in _LEFT_OUT:
                found[name] = widgets.widget("audit", name, *knob)
    found["lines"] = prompt_file.build("audit", ASK, "Neighbours or audits from a file")
    return found


def outputs() -> dict[str, Any]:
    """The audit's outputs by name."""
    out: dict[str, Any] = {"status": widgets.status_line("audit")}
    out["handoff"] = gr.Textbox("", visible=False, elem_id="audit-handoff")
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

    LAYS_EDITS = True

    def __init__(
        self, session: Session, form: dict, out: dict, stack: gr.State, model: Any, pictures: Pictures
    ) -> None:
        super().__init__("audit", session, form, out)
        self.named |= {stack: "stack", model: "model"}
        self.pictures, self.stack, self.model = pictures, stack, model
        self.offered = gr.State(())  # the concepts to choose from

    def wire_passport(self) -> None:
        """The button that opens the passport of the concept in the Localize panel."""
        tabs = getattr(gr.context.Context.block, "parent", None)
        tabs = tabs if isinstance(tabs, gr.Tabs) else gr.State(None)
        asked = [self.stack, self.model, self.form["concept"], self.form["replacement"]]
        handoff = self.out["handoff"]
        opened = [handoff, tabs, self.out["status"]]
        event = self.form["passport"].click(self.to_passport, asked, opened, **QUIET)
        event.then(None, handoff, None, js=reopening.open_script())

    def to_passport(self, stack: Any, model: str, concept: str | None, replacement: str | None) -> list[Any]:
        """What opens the passport's form, filled in with the concept and what the edit puts in its place."""
        try:
            if not isinstance(stack, Stack) or not stack.active():
                raise RequestError("There is no edit in the stack that is on; make one first.")
            concept = (concept or "").strip() or next(reversed(self.concepts(stack)), "")
            if not concept:
                raise RequestError("No edit of the stack says of which concept it is; type the concept.")
            edits = [self.session.shelf.open(e).edit for e in self.pictures.entries(stack)]
            became = {c: r for e in edits for c, r in zip(e.concepts, e.replacements, strict=False)}
            other = (replacement or "").strip() or became.get(concept, "")
            inputs = {"concept": concept, "replacement": other}
            recipe = Recipe("passport", model or "", inputs, {}, (0, 1))
        except StudioError as error:
            return ["", gr.skip(), widgets.spoken(error)]
        handed = reopening.told(("localize",), recipe=json.dumps(recipe.as_dict()))
        return [handed, gr.Tabs(selected="localize"), "Its inputs are filled in, in the Localize tab."]

    def follow(self, event: Any) -> None:
        """After an event that changed the stack: its concepts."""
        outputs = [self.form["concept"], self.offered]
        event.then(self.offer, [self.stack, self.offered], outputs, trigger_mode="multiple", **QUIET)

    def offer(self, stack: Any, offered: tuple) -> tuple[Any, Any]:
        """The stack changed: its concepts; where they are others than before, the last edit's is chosen."""
        try:
            found = self.concepts(stack)
        except StudioError:  # an edit file that is gone: the audit itself will say so
            found = ()
        if found == tuple(offered or ()):
            return gr.skip(), gr.skip()
        return gr.update(choices=list(found), value=found[-1] if found else None), found

    def concepts(self, stack: Any) -> tuple[str, ...]:
        """What the edits that are on say they are of, the last edit's first concept last."""
        if not isinstance(stack, Stack):
            return ()
        edits = [self.session.shelf.open(e).edit for e in self.pictures.entries(stack)]
        found = dict.fromkeys(c for edit in edits for c in reversed(edit.concepts))
        last = next((edit.concepts[0] for edit in reversed(edits) if edit.concepts), None)
        return (*(c for c in found if c != last), last) if last else tuple(found)

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs and the stack describe."""
        method, stack = find_method("audit"), given["stack"]
        if not isinstance(stack, Stack) or not stack.active():
            raise RequestError("There is nothing to audit: no edit in the stack is on.")
        asked = widgets.asked(method, given)
        edits = self.pictures.entries(stack)
        if asked["concept"] is None:
            asked["concept"] = next(reversed(self.concepts(stack)), None)
        seeds = parse_seeds(method, given["seeds"])
        return Recipe(method.name, given["model"] or "", asked, {}, seeds, edits)

    def also_restored(self) -> list[Any]:
        """The concepts to choose from."""
        return [self.offered]

    def restored(self, recipe: Recipe, run: Run | None, *here: Any) -> dict[Any, Any]:
        """The inputs; the Edit panel puts the stack back, whose concepts are offered from now on."""
        found = self.concepts(Stack(edit_reopen.entries_of(recipe, run, self.session.store)))
        back = reopening.filled(recipe, self.form)
        field = self.form["concept"]
        return {**back, field: {**back[field], **gr.update(choices=list(found))}, self.offered: found}

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """The verdict, the figure and the images when all is there; until then what is known in words."""
        if not again or "verdict" not in result.values:
            return {}
        images = _pairs(result)
        return {
            self.out["text"]: f"{_what(recipe)}\n{result.values['verdict']}",
            self.out["figure"]: widgets.drawn_figure(recipe, result, caption=False),
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


def _what(recipe: Recipe) -> str:
    """Which concept was audited, and what the edit put in its place."""
    concept, other = recipe.inputs["concept"], recipe.inputs["replacement"]
    return f"Audited: “{concept}”, which became {f'“{other}”' if other else 'nothing'}."


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

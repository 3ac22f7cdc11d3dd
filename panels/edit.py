"""The Edit panel: make an edit, watch before and after as its strength moves, keep a stack of edits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from panels import edit_form, heatmap, widgets
from panels.edit_audit import Audit
from panels.edit_form import PICTURES, layer_map
from panels.edit_stack import Entry, Stack
from panels.edit_view import NO_STACK, Pictures
from panels.running import QUIET, Running
from studio.edit_export import composed, export_edits
from studio.edit_files import read_edit
from studio.errors import RequestError, StudioError
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.store import EDIT_FILE, write_edit
from studio.types import Recipe, Result

TITLE = "Edit"
NEEDS = "diffusion"
QUESTION = "Can this concept be changed in the model's weights, did it work, and what else moved?"
GRID_SEEDS = 6


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = edit_form.form()
        with gr.Column(scale=5, min_width=320):
            out, asked, found = edit_form.outputs()
    panel = _Panel("edit", session, form, out)
    panel.wire()
    Audit(session, asked, found, panel.stack, form["model"], panel.pictures).wire_run()


def _said(handler: Callable) -> Callable:
    """The handler with a fault said in the status line; everything else on the page stays."""

    @wraps(handler)
    def run(self: _Panel, *args: Any) -> dict:
        try:
            return handler(self, *args)
        except StudioError as error:
            return {self.out["status"]: str(error)}

    return run


class _Panel(Running):
    """The panel's handlers: making an edit is a run like any other, the stack is the page's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stack = gr.State(Stack())
        self.saved = widgets.kept_in_browser("locus-edit-stack")
        self.pictures = Pictures(self.session)

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe; a concept whose line of replacements is empty is erased."""
        method = find_method("edit")
        asked = widgets.asked(method, given)
        concepts = asked["concept"] or []
        others = [line.strip() for line in str(given["replacement"] or "").split("\n")]
        asked["replacement"] = (others + [""] * len(concepts))[
            : max(len(concepts), len(asked["replacement"] or []))
        ]
        asked["images"] = False
        return Recipe(method.name, given["model"] or "", asked, {}, parse_seeds(method, None))

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Nothing: what was made goes onto the stack once it is kept (`adopt`)."""
        return {}

    # ---- wiring -------------------------------------------------------------------------------------------

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        looks = [self.stack, form["model"], out["prompt"], out["look"]]
        shown = [self.stack, self.saved, *self.fields]
        made = self.wire_run()
        made.then(self.adopt, [self.state, *looks], [self.state, *shown], **QUIET)
        latest = dict(trigger_mode="always_last", **QUIET)
        out["stack"].select(self.act, looks, shown, **QUIET)
        out["strength"].input(self.slide, [*looks, out["strength"]], self.fields, **latest)
        out["strength"].release(self.strengthen, [*looks, out["strength"]], shown, **latest)
        out["undo"].click(self.undo, looks, shown, **QUIET)
        out["redo"].click(self.redo, looks, shown, **QUIET)
        out["load"].upload(self.load, [out["load"], *looks], shown, **QUIET)
        for name in ("save", "lora"):
            out[name].click(getattr(self, name), looks, self.fields, **QUIET)
        gr.on([out["prompt"].submit, out["look"].submit], self.look, looks, shown, **QUIET)
        out["over_seeds"].click(self.over_seeds, looks, self.fields, **QUIET)
        out["over_neighbours"].click(self.over_neighbours, [*looks, out["neighbours"]], self.fields, **QUIET)
        layers = [form["layers"], form["map"], out["status"]]
        form["show_layers"].click(self.show_layers, [form["model"], form["layers"]], layers, **QUIET)
        form["map"].select(self.choose_layer, [form["model"], form["layers"]], layers, **QUIET)
        told = [form[n] for n in ("model", "concept", "replacement", "method", "layers")]
        out["takeover"].select(self.take_over, looks, [*told, *shown], **QUIET)
        gr.context.Context.root_block.load(self.restore, [self.saved, *looks[1:]], shown, **QUIET)

    # ---- the stack ----------------------------------------------------------------------------------------

    def show(
        self, stack: Stack, model: str, prompt: str, look: str, user: str, note: str = ""
    ) -> dict[Any, Any]:
        """Stack, slider and images of a stack; a fault in drawing is said, and the stack stays as it is."""
        out, chosen = self.out, stack.chosen
        update: dict[Any, Any] = {
            self.stack: stack,
            self.saved: stack.kept(),
            out["stack"]: {**stack.kept(), "hint": NO_STACK},
            out["undo"]: gr.Button(interactive=bool(stack.past)),
            out["redo"]: gr.Button(interactive=bool(stack.future)),
            out["strength"]: edit_form.slider(chosen),
            out["file"]: gr.update(visible=False),
            out["grid"]: gr.update(visible=False),
        }
        try:
            return (
                update
                | self.images(stack, model, prompt, look, user)
                | ({out["status"]: note} if note else {})
            )
        except StudioError as error:
            return update | {out["status"]: str(error)}

    def images(
        self, stack: Stack, model: str, prompt: str, look: str, user: str, quick: bool = False
    ) -> dict[Any, Any]:
        """Before and after of the prompt that is looked at."""
        if not prompt.strip():
            raise RequestError("Type a prompt to look at.")
        seed = parse_seeds(find_method("generate"), look)[0]
        before, after = self.pictures.pair(model, prompt, seed, stack, user, quick=quick)
        pair = dict(zip(PICTURES, (before, after), strict=True))
        return widgets.shown_pictures(self.out, pair, PICTURES)

    @_said
    def adopt(self, request: gr.Request, kept: dict, stack: Stack, *looks: Any) -> dict:
        """An edit was made: it goes on top of the stack."""
        run = kept.get("run") if isinstance(kept, dict) else None
        if not run or kept.get("adopted") == run:
            return {self.stack: stack}
        digest = self.session.store.keep_edit(self.session.store.path(run) / EDIT_FILE)
        told = self.session.store.load(run)
        added = stack.add(Entry(digest, edit_form.title_of(told.recipe)))
        shown = self.show(added, *looks, str(request.session_hash), edit_form.finding(told))
        return {self.state: {**kept, "adopted": run}, **shown}

    @_said
    def act(self, request: gr.Request, event: gr.EventData, stack: Stack, *looks: Any) -> dict:
        """A button in the stack was pressed."""
        acts = {
            "toggle": stack.toggle,
            "pick": stack.pick,
            "remove": stack.remove,
            "up": lambda i: stack.move(i, -1),
            "down": lambda i: stack.move(i, 1),
        }
        try:
            changed = acts[str(event.act)](int(event.row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError("That is no edit of the stack.") from error
        return self.show(changed, *looks, str(request.session_hash))

    @_said
    def slide(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """The slider is being dragged: a quick image, the stack as it was."""
        *looks, strength = looks
        if stack.chosen is None:
            return {self.out["status"]: NO_STACK}
        moved = stack.strengthen(stack.picked, strength)
        images = self.images(moved, *looks, str(request.session_hash), quick=True)
        return {**images, self.out["status"]: f"Strength {strength:g}, a quick look; let go for all steps."}

    @_said
    def strengthen(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """The slider was let go."""
        *looks, strength = looks
        if stack.chosen is None:
            return {self.out["status"]: NO_STACK}
        changed = stack.strengthen(stack.picked, strength)
        return self.show(changed, *looks, str(request.session_hash), f"Strength {strength:g}.")

    def undo(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """Undo was pressed."""
        return self.show(stack.undo(), *looks, str(request.session_hash))

    def redo(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """Redo was pressed."""
        return self.show(stack.redo(), *looks, str(request.session_hash))

    def look(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """Another prompt or seed is looked at."""
        return self.show(stack, *looks, str(request.session_hash))

    def restore(self, request: gr.Request, saved: Any, *looks: Any) -> dict:
        """The page was loaded: the stack that this browser had, as far as its edits are still kept."""
        stack = Stack.of(saved)
        there = tuple(e for e in stack.entries if self.session.store.has_edit(e.edit))
        if not there:
            return {self.stack: Stack()}
        stack = replace(stack, entries=there, picked=min(stack.picked, len(there) - 1))
        return self.show(stack, *looks, str(request.session_hash))

    # ---- files --------------------------------------------------------------------------------------------

    @_said
    def load(self, request: gr.Request, file: str, stack: Stack, *looks: Any) -> dict:
        """An edit file was given."""
        edit = read_edit(file)
        title = edit_form.name_of(edit.method, edit.concepts, edit.replacements, Path(file).name)
        added = stack.add(Entry(self.session.store.keep_edit(Path(file)), title))
        return self.show(added, *looks, str(request.session_hash), f"Loaded {Path(file).name}.")

    @_said
    def save(self, request: gr.Request, stack: Stack, model: str, *_: Any) -> dict:
        """The whole stack as one edit file."""
        target = Path(tempfile.mkdtemp(prefix="locus-export-")) / "edit.safetensors"
        edit = self.session.call(
            model, lambda m: composed(m, self.opened(stack)), user=str(request.session_hash)
        )
        write_edit(edit, target)
        return self.offered(target)

    @_said
    def lora(self, request: gr.Request, stack: Stack, model: str, *_: Any) -> dict:
        """The whole stack as a LoRA in diffusers' layout."""
        target = Path(tempfile.mkdtemp(prefix="locus-export-")) / "pytorch_lora_weights.safetensors"
        active = self.opened(stack)
        self.session.call(
            model, lambda m: export_edits(m, active, lora=target, full=None), user=str(request.session_hash)
        )
        return self.offered(target)

    def opened(self, stack: Stack) -> list:
        """The active edits of a stack; RequestError when there is none."""
        if not stack.active():
            raise RequestError("There is nothing to save: no edit in the stack is on.")
        return [self.session.shelf.open(entry) for entry in self.pictures.entries(stack)]

    def offered(self, file: Path) -> dict:
        """A file to download."""
        return {
            self.out["file"]: gr.File(value=str(file), visible=True),
            self.out["status"]: f"{file.name} is ready.",
        }

    # ---- grids --------------------------------------------------------------------------------------------

    @_said
    def over_seeds(self, request: gr.Request, stack: Stack, model: str, prompt: str, look: str) -> dict:
        """Before and after at several seeds."""
        first = parse_seeds(find_method("generate"), look)[0]
        seeds = list(range(first, first + GRID_SEEDS))
        rows = self.pictures.rows(model, [prompt], seeds, stack, str(request.session_hash))
        return self.grid(rows, [f"seed {s}" for s in seeds])

    @_said
    def over_neighbours(self, request: gr.Request, stack: Stack, *looks: Any) -> dict:
        """Before and after of other prompts."""
        model, _, look, neighbours = looks
        prompts = widgets.split_lines(neighbours)
        if not 0 < len(prompts) <= 24:
            raise RequestError("Type neighbours first, one prompt a line, at most 24.")
        seed = parse_seeds(find_method("generate"), look)[0]
        rows = self.pictures.rows(model, prompts, [seed], stack, str(request.session_hash))
        return self.grid(rows, prompts)

    def grid(self, rows: tuple[list, list], labels: list[str]) -> dict:
        """A row of images before, and below it the row after."""
        pictures = [
            (image, f"{label}, {when}")
            for images, when in zip(rows, PICTURES, strict=True)
            for image, label in zip(images, labels, strict=True)
        ]
        return {self.out["grid"]: gr.Gallery(value=pictures, visible=True, columns=min(len(labels), 8))}

    # ---- layers -------------------------------------------------------------------------------------------

    @_said
    def show_layers(self, model: str, layers: str) -> dict:
        """The map of the model's cross-attention layers."""
        names = self.session.cross_attention_layers(model)
        return {self.form["map"]: layer_map(names, edit_form.chosen_layers(layers, len(names), names))}

    @_said
    def choose_layer(self, event: gr.EventData, model: str, layers: str) -> dict:
        """A layer was clicked: in or out."""
        names = self.session.cross_attention_layers(model)
        _, col = heatmap.chosen(event, 1, len(names))
        chosen = edit_form.chosen_layers(layers, len(names), names) ^ {col}
        return {
            self.form["layers"]: ",".join(map(str, sorted(chosen))),
            self.form["map"]: layer_map(names, chosen),
        }

    @_said
    def take_over(self, request: gr.Request, event: gr.EventData, stack: Stack, *looks: Any) -> dict:
        """Another panel hands over what it found: layers to edit in, or an edit for the stack."""
        names = ("model", "prompt", "concept", "replacement", "layers", "edit", "title")
        told = {n: str(getattr(event, n, None) or "")[:20_000] for n in names}
        here = {self.form["model"]: told["model"], self.out["prompt"]: told["prompt"]}
        if told["edit"]:
            self.session.store.edit_file(told["edit"])  # refuses what is not kept
            added = stack.add(Entry(told["edit"], told["title"][:300]))
            shown = self.show(added, told["model"], told["prompt"], looks[2], str(request.session_hash))
            return {**shown, **here}
        layers = {self.form[n]: told[n] for n in ("concept", "replacement", "layers")}
        note = "Layers are taken over. Check concept and replacement, then press Make edit."
        return {**here, **layers, self.form["method"]: "locoedit", self.out["status"]: note}

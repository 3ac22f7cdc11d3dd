"""The Edit panel: make an edit, watch before and after as its strength moves, keep a stack of edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import gradio as gr

from panels import edit_form, edit_lines, edit_reopen, heatmap, prompt_file, reopening, waking, widgets
from panels.edit_audit import Audit
from panels.edit_downloads import Downloads
from panels.edit_form import PICTURES, layer_map
from panels.edit_lines import MOST_NEIGHBOURS
from panels.edit_stack import Entry, Stack
from panels.edit_view import NO_STACK, Pictures, said
from panels.running import QUIET, STREAM, Running
from studio.edit_files import read_edit
from studio.errors import RequestError
from studio.registry import find_method, parse_seeds
from studio.session import Session
from studio.store import EDIT_FILE
from studio.types import Recipe, Result

TITLE = "Edit"
NEEDS = "diffusion"
QUESTION = "Can this concept be changed in the model's weights, did it work, and what else moved?"
GRID_SEEDS = 6


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300) as left:
            form = edit_form.form()
        with gr.Column(scale=5, min_width=320):
            out, asked, found = edit_form.outputs()
    with left:  # once what they fill is there
        edit_form.examples(form, out)
        lines = prompt_file.build("edit", edit_lines.ASK, edit_lines.TITLE)
    panel = _Panel("edit", session, form, out)
    audit = Audit(session, asked, found, panel.stack, form["model"], panel.pictures)
    panel.wire(audit)
    audit.wire_run()
    audit.wire_passport()
    edit_lines.EditLines(panel, lines, "edit", ()).wire()  # a text is no edit
    prompt_file.PromptFile(audit, asked["lines"], "audit", ("neighbours",)).wire()


class _Panel(Running):
    """The panel's handlers: making an edit is a run like any other, the stack is the page's.

    What changes the stack answers at once; the images follow in an event of their own.
    """

    LAYS_EDITS = True
    EARLIER = ""  # the stack and its images are as they were

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stack = gr.State(Stack())
        self.saved = widgets.kept_in_browser("locus-edit-stack")
        self.pictures = Pictures(self.session)

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe; a concept whose line of replacements is empty is erased."""
        method = find_method("edit")
        asked = widgets.asked(method, given)
        left, right = (
            [x.strip() for x in str(given[n] or "").split("\n")] for n in ("concept", "replacement")
        )
        if len(asked["concept"] or []) == 1:
            asked["replacement"] = [r for r in right if r] or [""]
        else:
            asked["replacement"] = [r for c, r in zip_longest(left, right, fillvalue="") if c or r]
        asked["images"] = False
        return Recipe(method.name, given["model"] or "", asked, {}, parse_seeds(method, None))

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Nothing: what was made goes onto the stack once it is kept (`adopt`)."""
        return {}

    # ---- wiring -------------------------------------------------------------------------------------------

    def wire(self, audit: Audit) -> None:
        """Connects everything; the audit is told when the stack changed."""
        form, out, self.audit = self.form, self.out, audit
        self.looks = [self.stack, form["model"], out["prompt"], out["look"]]
        self.seen = [out[n] for n in (*PICTURES, "slider", "status")]
        listed = [out[n] for n in ("stack", "undo", "redo", "strength", "status", "file", "grid")]
        self.changed = [self.stack, self.saved, *listed]
        here = [*self.looks, self.saved]
        for event in self.wire_run():
            self.then_look(event.then(self.adopt, [self.state, *here], [self.state, *self.changed], **QUIET))
        self.then_look(self.reopened)
        often = dict(trigger_mode="multiple", **QUIET)
        self.then_look(out["stack"].select(self.act, here, self.changed, **often))
        self.then_look(out["undo"].click(self.undo, here, self.changed, **often))
        self.then_look(out["redo"].click(self.redo, here, self.changed, **often))
        self.then_look(out["load"].upload(self.load, [out["load"], *here], self.changed, **QUIET))
        moved = [*here, out["strength"]]
        quick = dict(trigger_mode="always_last", **STREAM)
        out["strength"].input(
            self.slide, [*self.looks, out["strength"]], [*self.seen, out["strength"]], **quick
        )
        self.then_look(out["strength"].release(self.strengthen, moved, self.changed, **often))
        gr.on([out["prompt"].submit, out["look"].submit], self.picture, self.looks, self.seen, **quick)
        self.wire_beside()
        told = [form[n] for n in ("model", "concept", "replacement", "method", "layers")]
        taken = [*told, out["prompt"], *self.changed]
        self.then_look(out["takeover"].select(self.take_over, here, taken, **QUIET))
        kept = [self.saved, *self.looks[1:]]
        restored = [form["model"], out["prompt"], out["look"], *self.changed]
        self.then_look(waking.when_asked(self.kept_here, [self.saved], self.restore, kept, restored, **QUIET))

    def wire_beside(self) -> None:
        """Connects what leaves the stack as it is: files, grids, and the choice of layers."""
        form, out = self.form, self.out
        Downloads(self.session, self.pictures, out).wire(self.looks)
        grids = dict(outputs=[out["grid"], out["status"], self.client, form["stop"]], **STREAM)
        out["over_seeds"].click(self.over_seeds, self.looks, **grids)
        out["over_neighbours"].click(self.over_neighbours, [*self.looks, out["neighbours"]], **grids)
        asked, layers = [form["model"], form["layers"]], [form["layers"], form["map"], out["status"]]
        form["show_layers"].click(self.show_layers, asked, layers, **QUIET)
        form["map"].select(self.choose_layer, asked, layers, trigger_mode="multiple", **QUIET)

    def then_look(self, event: Any) -> None:
        """After an event that changed the stack: its concepts for the audit, and its images."""
        self.audit.follow(event)
        event.then(self.look_again, self.looks, self.seen, trigger_mode="always_last", **STREAM)

    def look_again(self, request: gr.Request, stack: Stack, *looks: Any) -> Iterator[dict]:
        """The images of a stack that has something to show."""
        if isinstance(stack, Stack) and (stack.entries or stack.past or stack.future):
            yield from self.picture(request, stack, *looks)
            if stack.chosen is not None:  # so that the slider's first answer is as quick as the others
                for _ in self.picture(request, stack, *looks, quick=True):
                    pass
        yield {self.out["status"]: gr.skip()}  # a generator that ends without a word would empty its outputs

    # ---- the stack ----------------------------------------------------------------------------------------

    def show(self, stack: Stack, looks: tuple, note: str = "") -> dict[Any, Any]:
        """The list, its buttons, the slider, and what the browser keeps."""
        out, model, prompt, look = self.out, *looks[:3]
        return {
            self.stack: stack,
            self.saved: {**stack.kept(), "model": model, "prompt": prompt, "look": look},
            out["stack"]: {**stack.kept(), "hint": NO_STACK},
            out["undo"]: gr.Button(interactive=bool(stack.past)),
            out["redo"]: gr.Button(interactive=bool(stack.future)),
            out["strength"]: edit_form.slider(stack.chosen),
            out["file"]: gr.update(visible=False),
            out["grid"]: gr.update(visible=False),
            **({out["status"]: note} if note else {}),
        }

    def here(self, stack: Any, looks: tuple) -> Stack:
        """The page's stack; when the server forgot it, as the browser kept it."""
        if isinstance(stack, Stack) and (stack.entries or stack.past or stack.future):
            return stack
        return self.kept_stack(looks[3])

    def kept_stack(self, saved: Any) -> Stack:
        """The stack that a browser kept, as far as its edits are still in the store."""
        stack = Stack.of(saved)
        there = tuple(e for e in stack.entries if self.session.store.has_edit(e.edit))
        return replace(stack, entries=there, picked=min(stack.picked, len(there) - 1))

    def picture(
        self, request: gr.Request, stack: Stack, model: str, prompt: str, look: str, quick: bool = False
    ) -> Iterator[dict]:
        """Before and after of the prompt that is looked at; until they are there, how far they are."""
        try:
            if not prompt.strip():
                raise RequestError("Type a prompt to look at.")
            seed = parse_seeds(find_method("generate"), look)[0]
            user = str(request.session_hash)
            for found in self.pictures.rows(model, [prompt], [seed], stack, user, quick=quick):
                if isinstance(found, tuple):
                    pair = dict(zip(PICTURES, (found[0][0], found[1][0]), strict=True))
                    yield widgets.shown_pictures(self.out, pair, PICTURES)
                elif waiting := self.session.queue.position(found):
                    yield {self.out["status"]: widgets.status(found, waiting)}
        except Exception as error:
            yield {self.out["status"]: widgets.spoken(error)}

    @said
    def adopt(self, request: gr.Request, kept: dict, stack: Stack, *looks: Any) -> dict:
        """An edit was made: it goes on top of the stack."""
        run, stack = kept.get("run") if isinstance(kept, dict) else None, self.here(stack, looks)
        if not run or kept.get("adopted") == run:
            return {self.stack: stack}
        file = self.session.store.path(run) / EDIT_FILE
        if not file.is_file():  # stopped before there was one
            return {self.stack: stack}
        told = self.session.store.load(run)
        added = stack.add(Entry(self.session.store.keep_edit(file), edit_form.title_of(told.recipe)))
        return {self.state: {**kept, "adopted": run}, **self.show(added, looks, edit_form.finding(told))}

    @said
    def act(self, event: gr.EventData, stack: Stack, *looks: Any) -> dict:
        """A button in the stack was pressed."""
        stack = self.here(stack, looks)
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
        return self.show(changed, looks)

    def slide(self, request: gr.Request, stack: Stack, *looks: Any) -> Iterator[dict]:
        """The slider is being dragged: a quick image, the stack as it was."""
        *looks, strength = looks
        if stack.chosen is None or strength is None:  # nothing to act on, or no number yet
            yield {self.out["status"]: gr.skip()}
            return
        try:
            moved = stack.strengthen(stack.picked, strength)
        except RequestError as error:
            yield {self.out["status"]: widgets.spoken(error)}
            return
        if not edit_form.LEAST <= strength <= edit_form.MOST:
            yield {self.out["strength"]: edit_form.span(strength)}
        yield from self.picture(request, moved, *looks, quick=True)
        yield {self.out["status"]: f"Strength {strength:g}, a quick look; let go for all steps."}

    @said
    def strengthen(self, stack: Stack, *looks: Any) -> dict:
        """The slider was let go. The slider itself is not written: it may have moved on."""
        *looks, strength = looks
        stack = self.here(stack, looks)
        if stack.chosen is None or strength == stack.chosen.strength:
            return {self.stack: stack}
        try:
            changed = stack.strengthen(stack.picked, strength)
        except RequestError as error:
            return self.show(stack, looks, widgets.spoken(error))
        shown = self.show(changed, looks, f"Strength {strength:g}.")
        shown.pop(self.out["strength"])
        return shown

    @said
    def undo(self, stack: Stack, *looks: Any) -> dict:
        """Undo was pressed."""
        return self.show(self.here(stack, looks).undo(), looks)

    @said
    def redo(self, stack: Stack, *looks: Any) -> dict:
        """Redo was pressed."""
        return self.show(self.here(stack, looks).redo(), looks)

    def kept_here(self, saved: Any) -> bool | None:
        """The page was loaded: whether this browser had a stack."""
        return True if self.kept_stack(saved).entries else None

    @said
    def restore(self, _: bool, saved: Any, *looks: Any) -> dict:
        """The stack that this browser had, with its model and prompt."""
        stack = self.kept_stack(saved)
        names = ("model", "prompt", "look")
        was = saved if isinstance(saved, dict) else {}
        looks = tuple(str(was.get(n) or v) for n, v in zip(names, looks, strict=True))
        back = dict(zip((self.form["model"], self.out["prompt"], self.out["look"]), looks, strict=True))
        return {**back, **self.show(stack, looks)}

    # ---- a kept run once more ----------------------------------------------------------------------------

    def also_restored(self) -> list[Any]:
        """The stack, its list, and what is looked at."""
        return [self.out["prompt"], self.out["look"], *self.changed]

    def also_asked(self) -> list[Any]:
        """The stack as it is, and what is looked at."""
        return [*self.looks, self.saved]

    @said
    def reopen(self, request: gr.Request, event: gr.EventData, kept: Any, stack: Stack, *looks: Any) -> dict:
        """A run is opened again: its inputs, and its edits as the stack."""
        recipe, run = reopening.asked_for(event, self.session.store)
        entries = edit_reopen.entries_of(recipe, run, self.session.store)
        looks = (*edit_reopen.looked_at(recipe, looks[:3]), looks[3])
        back = dict(zip((self.form["model"], self.out["prompt"], self.out["look"]), looks, strict=False))
        if recipe.method == "edit":
            back = self.restored(recipe, run) | back
        if run is not None:
            back |= {self.state: {"run": run.id, "adopted": run.id}}
        changed = self.here(stack, looks).replaced(entries)
        return {**self.show(changed, looks, edit_reopen.said(recipe, run)), **back}

    # ---- files --------------------------------------------------------------------------------------------

    @said
    def load(self, file: str | None, stack: Stack, *looks: Any) -> dict:
        """An edit file was given."""
        if not file:
            raise RequestError("Choose an edit file.")
        try:
            edit, stack = read_edit(file), self.here(stack, looks)
        except RequestError as error:  # the person knows the file by its name, not by the server's folder
            raise RequestError(str(error).replace(str(file), Path(file).name)) from error
        title = edit_form.name_of(edit.method, edit.concepts, edit.replacements, Path(file).name)
        added = stack.add(Entry(self.session.store.keep_edit(Path(file)), title))
        return self.show(added, looks, f"Loaded {Path(file).name}.")

    # ---- grids --------------------------------------------------------------------------------------------

    def over_seeds(
        self, request: gr.Request, stack: Stack, model: str, prompt: str, look: str
    ) -> Iterator[dict]:
        """Before and after at several seeds."""
        yield from self.grid(request, stack, model, lambda: [prompt], look, GRID_SEEDS)

    def over_neighbours(self, request: gr.Request, stack: Stack, *looks: Any) -> Iterator[dict]:
        """Before and after of other prompts."""
        model, _, look, neighbours = looks

        def prompts() -> list[str]:
            lines = widgets.split_lines(neighbours)
            if not 0 < len(lines) <= MOST_NEIGHBOURS:
                raise RequestError(f"Type neighbours first, one prompt a line, at most {MOST_NEIGHBOURS}.")
            return lines

        yield from self.grid(request, stack, model, prompts, look, 1)

    def grid(
        self, request: gr.Request, stack: Stack, model: str, prompts: Callable, look: str, seeds: int
    ) -> Iterator[dict]:
        """Pairs of images, before beside after; Stop ends it."""
        out, stop = self.out, self.form["stop"]
        try:
            first, texts = parse_seeds(find_method("generate"), look)[0], prompts()
            numbers = list(range(first, first + seeds))
            labels = [p if seeds == 1 else f"seed {s}" for p in texts for s in numbers]
            user = str(request.session_hash)
            for found in self.pictures.rows(model, texts, numbers, stack, user):
                if isinstance(found, tuple):
                    images = [
                        (image, f"{when}: {label}")
                        for label, *pair in zip(labels, *found, strict=True)
                        for image, when in zip(pair, PICTURES, strict=True)
                    ]
                    yield {
                        out["grid"]: gr.Gallery(value=images, visible=True, columns=4),
                        out["status"]: "Done.",
                    }
                else:
                    line = widgets.status(found, self.session.queue.position(found))
                    here = {"job": found.id, "token": found.token}
                    yield {out["status"]: line, self.client: here, stop: gr.Button(interactive=True)}
        except Exception as error:
            yield {out["status"]: widgets.spoken(error)}
        yield {stop: gr.Button(interactive=False)}

    # ---- layers -------------------------------------------------------------------------------------------

    @said
    def show_layers(self, model: str, layers: str) -> dict:
        """The map of the model's cross-attention layers."""
        names = self.session.cross_attention_layers(model)
        return {self.form["map"]: layer_map(names, edit_form.chosen_layers(layers, len(names), names))}

    @said
    def choose_layer(self, event: gr.EventData, model: str, layers: str) -> dict:
        """A layer was clicked: in or out."""
        names = self.session.cross_attention_layers(model)
        _, col = heatmap.chosen(event, 1, len(names))
        chosen = edit_form.chosen_layers(layers, len(names), names) ^ {col}
        return {
            self.form["layers"]: ",".join(map(str, sorted(chosen))),
            self.form["map"]: layer_map(names, chosen),
        }

    @said
    def take_over(self, event: gr.EventData, stack: Stack, *looks: Any) -> dict:
        """Another panel hands over what it found: layers to edit in, or an edit for the stack."""
        names = ("model", "prompt", "concept", "replacement", "layers", "edit", "title")
        told, stack = {n: str(getattr(event, n, None) or "")[:20_000] for n in names}, self.here(stack, looks)
        here = {self.form["model"]: told["model"], self.out["prompt"]: told["prompt"]}
        if told["edit"]:
            kept = self.session.store
            digest = kept.keep_edit(kept.edit_file(told["edit"]))  # for good; refuses what is not there
            added = stack.add(Entry(digest, told["title"][:300]))
            return {**self.show(added, (told["model"], told["prompt"], looks[2])), **here}
        layers = {self.form[n]: told[n] for n in ("concept", "replacement", "layers")}
        note = "Layers are taken over. Check concept and replacement, then press Make edit."
        return {**here, **layers, self.form["method"]: "locoedit", self.out["status"]: note}

"""Files in the Edit panel: prompts to look at and to compare, and edits, one a line, that go on the stack
switched off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from panels import edit_form, widgets
from panels.edit_stack import MOST, Entry, Stack
from panels.prompt_file import PromptFile
from panels.prompt_runs import LineRun
from panels.running import QUIET
from studio.errors import RequestError
from studio.registry import Method
from studio.store import EDIT_FILE

TITLE = "Prompts or edits from a file"
ASK = (
    "Choose a file. .txt, one prompt a line: for Neighbours and for the prompt to look at. .jsonl or .csv "
    "with the columns concept, replacement, method …: an edit a line; all are kept and go on the stack, "
    "switched off. A line without a replacement erases its concept; what else it leaves out is as in the "
    "fields."
)
MOST_NEIGHBOURS = 24


class EditLines(PromptFile):
    """The handlers of the file of prompts or edits."""

    def wire(self) -> tuple[Any, Any]:
        """See PromptFile; once all lines are over their edits go on the stack."""
        events, panel = super().wire(), self.panel
        for event in events:
            here = [self.client, *panel.looks, panel.saved]
            panel.then_look(event.then(self.onto_stack, here, panel.changed, **QUIET))
        panel.then_look(self.picked)  # the prompt to look at may be another
        return events

    def also(self) -> list[Any]:
        """What a file of prompts fills."""
        return [self.panel.out[n] for n in ("prompt", "neighbours")]

    def field(self, name: str, method: Method) -> Any:
        """See PromptFile; a prompt is the one to look at."""
        return self.panel.out["prompt"] if name == "prompt" else super().field(name, method)

    def whole(self, method: Method) -> tuple[Any, int | None]:
        """Prompts are neighbours."""
        return self.panel.out["neighbours"], MOST_NEIGHBOURS

    def filled(self, label: str) -> str:
        """See PromptFile."""
        return f"They are in “{label}”: press Grid over neighbours. Or put a line into the prompt to look at."

    def values(self, row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """See PromptFile; a concept without a replacement is erased. RequestError for a line of no edit."""
        if not row.get("concept"):
            raise RequestError("An edit needs a concept; give the file a column “concept”.")
        rest = {n: v for n, v in row.items() if n != "prompt"}
        return {"replacement": "", **super().values(rest, given)}

    def load(self, file: str | None, view: str | None = None) -> dict[Any, Any]:
        """See PromptFile; prompts are no edits, so they are not run from here."""
        update, out = super().load(file), self.out
        if not any("concept" in row for _, row in update[out["rows"]]):
            update[out["buttons"]] = gr.update(visible=False)
        return update

    # ---- the stack ----------------------------------------------------------------------------------------

    def entries(self, run: LineRun) -> list[Entry]:
        """The edits that were made, switched off, each once."""
        store, found = self.session.store, {}
        for _, recipe, run_id in run.made:
            file = store.path(run_id) / EDIT_FILE
            if file.is_file():
                entry = Entry(store.keep_edit(file), edit_form.title_of(recipe), on=False)
                found[entry.edit] = entry
        return list(found.values())

    def added(self, run: LineRun, stack: Stack) -> tuple[Stack, str]:
        """The stack with the edits of all lines on top, as many as it holds, and what is said of it."""
        there = {e.edit for e in stack.entries}
        new = [e for e in self.entries(run) if e.edit not in there]
        room = new[: max(0, MOST - len(stack.entries))]
        said = f"{len(room)} edit{'s' if len(room) != 1 else ''} of the file on the stack, switched off; "
        said += "tick one to see it."
        if left := len(new) - len(room):
            said += f" {left} more {'is' if left == 1 else 'are'} in Runs; a stack holds at most {MOST}."
        return (stack.replaced((*stack.entries, *room)) if room else stack), said

    def onto_stack(self, kept: Any, stack: Stack, *looks: Any) -> dict[Any, Any]:
        """The lines are over: their edits go on the stack, once."""
        panel, run = self.panel, self.runs.find(kept)
        try:
            if run is None or not run.over or run.page.get("on the stack"):
                return {panel.stack: stack}
            run.page["on the stack"] = True
            stack, said = self.added(run, panel.here(stack, looks))
            return panel.show(stack, looks, said if run.made else "")
        except Exception as error:
            return {panel.out["status"]: widgets.spoken(error)}

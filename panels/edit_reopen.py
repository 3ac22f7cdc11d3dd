"""The Edit panel opens a kept run again: the stack of edits that it made, or under which it ran."""

from __future__ import annotations

from panels import edit_form, reopening
from panels.edit_stack import MOST, Entry
from studio.edit_files import read_edit
from studio.errors import RequestError
from studio.store import EDIT_FILE, Store
from studio.types import Recipe, Run

METHODS = ("edit", "audit", "generate")  # whose runs this panel opens


def entries_of(recipe: Recipe, run: Run | None, store: Store) -> tuple[Entry, ...]:
    """The edit that a run of `edit` made, or those under which another ran, as entries of a stack.
    RequestError when one is gone."""
    if recipe.method == "edit":
        if run is None:
            return ()
        file = store.path(run.id) / EDIT_FILE
        if not file.is_file():
            return ()  # stopped before there was one
        return (Entry(store.keep_edit(file), edit_form.title_of(recipe)),)
    found: dict[str, Entry] = {}
    for digest, file, strength in reopening.kept_edits(recipe, run, store):
        edit = read_edit(file)
        title = edit_form.name_of(edit.method, edit.concepts, edit.replacements, file.name[:12])
        before = found[digest].strength if digest in found else 0.0  # the same edit twice is one of both
        found[digest] = Entry(digest, title, strength=before + strength)
    if len(found) > MOST:
        raise RequestError(f"This run went under {len(found)} edits; a stack holds at most {MOST}.")
    return tuple(found.values())


def looked_at(recipe: Recipe, looks: tuple[str, str, str]) -> tuple[str, str, str]:
    """(model, prompt, seed) that the panel looks at: those of a run that drew prompts, else as they were."""
    _, prompt, seed = looks
    asked = recipe.inputs.get("prompt")
    if recipe.method == "generate" and asked:
        prompt = asked if isinstance(asked, str) else str(asked[0])
        seed = str(recipe.seeds[0]) if recipe.seeds else seed
    return recipe.model, prompt, seed


def said(recipe: Recipe, run: Run | None) -> str:
    """What the status line says."""
    if recipe.method == "edit":
        return edit_form.finding(run) if run and run.status == "done" else "Press Make edit to make it again."
    if recipe.method == "audit":
        return "The stack of the audit is back; its results stand under Audit."
    more = len(recipe.inputs.get("prompt") or ()) > 1 or len(recipe.seeds) > 1
    first = " of its first prompt and seed" if more else ""
    return f"The stack of this run is back, with the images{first} as this panel samples them."

"""What the Runs panel shows: the list of runs, one run in words and images, and which panel opens it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from panels import decompose_form, edit_reopen, localize, reopening, retrieval_form, trace, widgets
from panels.drawn import Drawn
from panels.words import in_words
from studio.exports import new_folder, write_file
from studio.registry import find_method
from studio.run_difference import as_text
from studio.run_index import Summary
from studio.types import Recipe, Run

EMPTY = "No runs yet. Press Run in another tab: every run is kept and listed here."
NOTHING = "No run fits. Take words or filters away."
ASK = "Choose a run in the list."
MOST_IMAGES = 48
_NOT_VALUES = ("warnings", "verdict", "finding")  # said elsewhere


class RunList(Drawn):
    """The list; its `select` event carries act (pick, star, tick) and id."""

    def __init__(self, **options: Any) -> None:
        template = "<div class='runs' role='list' aria-label='runs'></div>"
        super().__init__({"hint": EMPTY}, template, "runs", "runs", **options)


def as_value(
    runs: Sequence[Summary],
    starred: frozenset[str],
    notes: Mapping[str, str],
    ticked: Sequence[str],
    chosen: str,
    hint: str,
) -> dict[str, Any]:
    """The value of a RunList."""
    rows = [
        {
            "id": run.id,
            "title": run.title[:160],
            "about": about(run),
            "star": run.id in starred,
            "ticked": run.id in ticked,
            "note": " ".join(notes.get(run.id, "").split())[:120],
            "fault": f"Damaged: {run.fault}." if run.fault else "",
        }
        for run in runs
    ]
    return json.loads(json.dumps({"rows": rows, "chosen": chosen, "hint": hint}))


def about(run: Summary) -> str:
    """When, which method and model, and how it ended, in a line."""
    parts = [run.started[:16].replace("T", " "), run.method, run.model]
    parts += [run.status] if run.status not in ("done", "damaged") else []
    parts += [f"{len(run.edits)} edits" if len(run.edits) > 1 else "edited"] if run.edits else []
    return " · ".join(filter(None, parts))


# ---- one run ----------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """What was run, when and how long, and what came of it."""
    when = run.started[:16].replace("T", " ")
    title = f"{find_title(run.recipe.method)} on {run.recipe.model}"
    said = f"{title}, {when} UTC, {run.status} in {run.seconds:.1f} s."
    found = [str(run.result.values[n]) for n in ("verdict", "finding") if run.result.values.get(n)]
    said += f"\n{found[0]}" if found else ""
    said += f"\n{run.error}" if run.error else ""
    return said + "".join(f"\nNote: {in_words(str(w))}" for w in run.result.values.get("warnings") or ())


def find_title(name: str) -> str:
    """A method's title; the name itself of one that this studio does not know."""
    try:
        return find_method(name).title
    except Exception:  # a run of another version
        return name


def values_text(run: Run) -> str:
    """A run's short values, one a line; arrays by their axes."""
    values = {n: v for n, v in run.result.values.items() if n not in _NOT_VALUES}
    lines = [f"{n.replace('_', ' ')}\t{as_text(v)[:400]}" for n, v in values.items()]
    for name, found in run.result.arrays.items():
        axes = " × ".join(f"{len(a.labels)} {a.name}" for a in found.axes) or "one number"
        lines.append(f"{name.replace('_', ' ')}\t{axes}{f', {found.unit}' if found.unit else ''}")
    return "\n".join(lines)


def recipe_text(run: Run) -> str:
    """All that the run depends on."""
    recipe = run.recipe
    parts: dict[str, Any] = {"method": recipe.method, "model": recipe.model}
    parts |= {**recipe.inputs, **recipe.params, "seeds": list(recipe.seeds), "edits": list(recipe.edits)}
    parts |= {n: run.host[n] for n in ("device", "dtype", "threads", "batch") if n in run.host}
    shown = {n: v for n, v in parts.items() if v not in (None, "", [], ())}
    lines = [f"{n.replace('_', ' ')}\t{as_text(v)}" for n, v in shown.items()]
    return "\n".join([*lines, f"weights\t{str(run.model.get('fingerprint', ''))[:16]}", f"id\t{run.id}"])


def figure_of(run: Run, folder: Path) -> Any:
    """The figure as it is exported; None when there is none that can be read."""
    try:
        with Image.open(folder / "figure.png") as opened:
            opened.load()
            return opened
    except (OSError, ValueError, SyntaxError):
        return None


def pictures(run: Run) -> list[tuple[Any, str]]:
    """The run's images with their names; those that can't be read are left out."""
    found = []
    for name in list(run.result.images)[:MOST_IMAGES]:
        try:
            found.append((run.result.images[name], name))
        except (OSError, ValueError, SyntaxError):
            continue
    return found


def downloads(what: str, files: Mapping[str, bytes], out: Mapping[str, Any]) -> dict[Any, Any]:
    """Updates of the buttons for the files, by kind, of a figure of several runs."""
    folder, update = new_folder(), {out[f"{what}_export"]: gr.Row(visible=True)}
    for kind, content in files.items():
        write_file(folder / f"{what}.{kind}", content)
        update[out[f"{what}_{kind}"]] = gr.DownloadButton(value=str(folder / f"{what}.{kind}"))
    return update


def said_in(line: str) -> Callable[[Callable], Callable]:
    """Makes a handler of an object with outputs `out` say its faults in one of them; the rest stays."""

    def made(handler: Callable) -> Callable:
        @wraps(handler)
        def run(self: Any, *args: Any) -> dict:
            try:
                return handler(self, *args)
            except Exception as error:
                return {self.out[line]: gr.update(value=widgets.spoken(error), visible=True)}

        return run

    return made


# ---- opening ----------------------------------------------------------------------------------------------


def home_of(recipe: Recipe) -> tuple[tuple[str, ...], str, str] | None:
    """(panels that open it, the tab, a tab inside) of a recipe; None when no panel does."""
    for panel, methods in (
        ("trace", trace.METHODS),
        ("localize", localize.METHODS),
        ("decompose", decompose_form.VIEWS),
        ("retrieval", retrieval_form.METHODS),
    ):
        if recipe.method in methods:
            return (panel,), panel, ""
    if recipe.method == "audit":
        return ("edit", "audit"), "edit", "Audit"
    if recipe.method == "edit" or (recipe.method in edit_reopen.METHODS and recipe.edits):
        return ("edit",), "edit", "Before and after"
    return None


def opening(recipe: Recipe, run_id: str | None) -> tuple[str, str] | None:
    """(the tab, what open-run.js is given) for a run, or a recipe alone; None when no panel opens it."""
    home = home_of(recipe)
    if home is None:
        return None
    panels, tab, inner = home
    what = {"run": run_id} if run_id else {"recipe": json.dumps(recipe.as_dict())}
    return tab, reopening.told(panels, inner, **what)


def open_button(recipe: Recipe | None) -> Any:
    """The button that opens a run, named after the panel."""
    home = home_of(recipe) if recipe else None
    name = f"Open in {home[1].capitalize()}" if home else "Open in its panel"
    return gr.Button(name, interactive=home is not None)

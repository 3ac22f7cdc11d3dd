"""Opening a kept run again in the panel that made it: inputs, results and edits as they were after Run.

The page asks for it (assets/js/open-run.js leaves the run's id in window.locusReopen, by panel), the panel's
own Opener hears it, once its tab is there, and `Running.reopen` answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from panels import widgets
from panels.drawn import Drawn
from studio.edit_files import edit_hash, split_entry
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.registry import Method, find_method
from studio.store import Store
from studio.types import Recipe, Run

MOST_RECIPE = 1_000_000  # characters of a recipe that comes through the page
LINKED = 20_000  # characters of an input in a link


class Opener(Drawn):
    """Hears that a run is to be opened in its panel; its `select` event carries `run`, an id, or `recipe`, a
    recipe's JSON."""

    def __init__(self, panel: str) -> None:
        super().__init__({"panel": panel}, "<div></div>", "reopen", elem_id=f"{panel}-reopen")


@dataclass(frozen=True)
class Opened:
    """A run that was opened again, as `Running.ended` takes it."""

    recipe: Recipe
    run: Run


def open_script() -> str:
    """The script that hands over what `told` made."""
    return (ASSETS / "js" / "open-run.js").read_text()


def told(panels: Iterable[str], inner: str = "", **what: str) -> str:
    """What open-run.js is given: the panels that are to open `run` or `recipe`, and a tab inside to show."""
    return json.dumps({"panels": {panel: what for panel in panels}, "inner": inner})


def asked_for(event: Any, store: Store) -> tuple[Recipe, Run | None]:
    """(recipe, run or None) that an Opener's event names, which is never trusted; RequestError when it names
    none."""
    if run_id := getattr(event, "run", None):
        run = store.load(str(run_id)[:300])
        return run.recipe, run
    text = getattr(event, "recipe", None)
    if not isinstance(text, str) or len(text) > MOST_RECIPE:
        raise RequestError("There is no run to open; choose one in the Runs tab.")
    try:
        read = json.loads(text)
        seeds, edits = tuple(int(s) for s in read["seeds"]), tuple(str(e) for e in read["edits"])
        parts = dict(read["inputs"]), dict(read["params"])
        return Recipe(str(read["method"]), str(read["model"]), *parts, seeds, edits), None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError("This recipe can't be read; choose a run in the Runs tab.") from error


# ---- inputs -----------------------------------------------------------------------------------------------


def values_of(recipe: Recipe, method: Method) -> dict[str, Any]:
    """{knob: value} of a recipe; what it leaves open is the default."""
    given = {**recipe.inputs, **recipe.params}
    found = {}
    for name, (f, _) in widgets.knobs([method]).items():
        default = None if f.default is MISSING else f.default
        value = given.get(name)
        found[name] = default if value is None else value
    return found


def filled(recipe: Recipe, form: Mapping[str, Any]) -> dict[Any, Any]:
    """Updates that put a recipe back into the inputs of a form (by name, as `widgets.asked` reads them)."""
    method = find_method(recipe.method)
    values = values_of(recipe, method)
    update = {}
    for name, value in values.items():
        own = widgets.own(name, method)
        if (field := form.get(own, form.get(name))) is not None:
            update[field] = gr.update(value=in_field(field, value))
    if "method" in form and "method" not in values:
        update[form["method"]] = gr.update(value=recipe.method)
    if "model" in form and "model" not in values:
        update[form["model"]] = gr.update(value=recipe.model)
    if "seeds" in form and recipe.seeds:
        update[form["seeds"]] = gr.update(value=",".join(map(str, recipe.seeds)))
    return update


def in_field(field: Any, value: Any) -> Any:
    """A value as the component of its input holds it."""
    if isinstance(field, gr.Checkbox):
        return bool(value)
    if isinstance(field, gr.CheckboxGroup):
        return list(value or ())
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    if isinstance(field, gr.Textbox):
        return "" if value is None else str(value)
    return "" if value is None and isinstance(field, (gr.Dropdown, gr.Radio)) else value


def linked(query: Mapping[str, str], form: Mapping[str, Any], named: Mapping[Any, str]) -> dict[Any, Any]:
    """Updates for inputs that a link names (?tab=trace&prompt=…); what does not fit its input is left out."""
    update = {}
    for field, name in named.items():
        if form.get(name) is not field or name not in query or name in ("tab", "run"):
            continue
        text = str(query[name])[:LINKED]
        value: Any = text
        if isinstance(field, gr.Checkbox):
            value = text.lower() in ("1", "true", "yes", "on")
        elif isinstance(field, gr.CheckboxGroup):
            known = [value for _, value in field.choices]
            value = [part for part in text.split(",") if part in known]
        elif isinstance(field, gr.Number):
            try:
                value = float(text)
            except ValueError:
                continue
        elif isinstance(field, gr.Radio) and text not in [value for _, value in field.choices]:
            continue
        elif not isinstance(field, (gr.Textbox, gr.Dropdown, gr.Radio)):
            continue
        update[field] = gr.update(value=value)
    return update


# ---- edits ------------------------------------------------------------------------------------------------


def kept_edits(recipe: Recipe, run: Run | None, store: Store) -> list[tuple[str, Path, float]]:
    """(hash, file, strength) of a recipe's edits, each kept in the store. RequestError when one is gone, has
    changed, or is a file that neither lies in the store nor is known from the run by its hash."""
    hashes = list(run.host.get("edits", ())) if run else []
    found = []
    for n, entry in enumerate(recipe.edits):
        name, strength = split_entry(entry)
        file, known = Path(name), hashes[n] if n < len(hashes) else None
        if known and store.has_edit(str(known)):
            found.append((str(known), store.edit_file(str(known)), strength))
            continue
        inside = file.resolve().is_relative_to(store.root.resolve())
        if not file.is_file() or not (inside or known):
            raise RequestError(
                f"The edit file {file.name[:80]} of this run is no longer there; load it again."
            )
        if known and edit_hash(file) != known:
            raise RequestError(
                f"The edit file {file.name[:80]} has changed since this run; load the one of then."
            )
        digest = store.keep_edit(file)
        found.append((digest, store.edit_file(digest), strength))
    return found

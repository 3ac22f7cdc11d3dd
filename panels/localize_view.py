"""What the Localize panel says of results: figures while they grow, the sentence behind a bar, and what the
Edit panel takes over."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.figures import number
from studio.methods.text_to_image import image_name
from studio.registry import find_method
from studio.types import Figure, Recipe, Result, Run

ASK = "Click a bar to see its number and its images, and to edit there."
PASSPORT = "Each point is a window of layers: what LocoGen says of it, and how well an edit there works."
UNITS = "Units are only measured so far; to edit them, say how many under “Top” and press Run."
EDIT_HERE = {  # what the button below a chosen bar hands over
    "localize": "Edit here: in these layers",
    "attribute": "Edit here: zero these weights",
    "neurons": "Edit here: silence the largest units",
}
BEGUN = ("localize", "localize")  # see `carried`
COMPARED = {
    "localize": ("clean", "altered"),
    "attribute": ("clean", "ablated"),
    "neurons": ("before", "after"),
}


def figure_of(recipe: Recipe, result: Result) -> Figure:
    """The method's own figure of these results; while only the screen is there, the screen."""
    params = dict(recipe.params)
    if recipe.method == "localize" and "screen" in result.arrays:
        params["screen"] = bool(np.isnan(result.arrays["direct_effect"].values).all())
    shown = Recipe(recipe.method, recipe.model, recipe.inputs, params, recipe.seeds, recipe.edits)
    return find_method(recipe.method).draw(Run(shown, "done", "", 0.0, {}, result))


def headline(run: Run) -> str:
    """The finding in a sentence, and what to do next."""
    values, method = run.result.values, run.recipe.method
    if method == "localize" and values.get("best_window"):
        share = f"{100 * values['best_share']:.0f} % of the effect of all layers"
        return f"Strongest: layers {values['best_window']}, {share}. {ASK}"
    if method == "attribute":
        name, value = run.result.arrays["attribution"].best(1)[0]
        told = values.get("correlation")
        sure = f" Predicted and true changes of random ablations correlate at {number(told)}." if told else ""
        return f"Strongest carrier: {name[0]} ({number(value)}).{sure} {ASK}"
    if method == "passport":
        return str(values.get("verdict", ""))
    if method == "neurons":
        next_ = ASK if run.recipe.params["top"] else f"Click a bar for its number. {UNITS}"
        return f"Layers {values['layer_numbers']}; the largest: {values['largest'].split(', ')[0]}. {next_}"
    return ASK


def bar_name(recipe: Recipe, result: Result, col: int) -> str:
    """The full name behind a bar."""
    data = figure_of(recipe, result).data
    return str((data.get("names") or data["labels"])[col])


def sentence(recipe: Recipe, result: Result, col: int) -> str:
    """A bar's numbers in words."""
    figure = figure_of(recipe, result)
    if recipe.method == "localize":
        return _window(result, col, figure.data["labels"][col])
    value, errors = float(figure.data["values"][col]), figure.data.get("errors")
    error = float(errors[col]) if errors is not None else float("nan")
    spread = f" ± {number(error)}" if np.isfinite(error) else ""
    name = bar_name(recipe, result, col)
    if recipe.method == "attribute":
        counts = result.arrays["parameters"]
        n = int(counts.values[counts.axes[0].labels.index(name)])
        role = "carries" if value > 0 else "suppresses"
        goal = "the concept" if recipe.params["objective"] == "erase" else "what amplifying would remove"
        unsure = ", though that is within two standard errors of nothing" if abs(value) <= 2 * error else ""
        unit = figure.data["unit"]
        return f"{name}, {n} weights: {number(value)}{spread} {unit}; it {role} {goal}{unsure}."
    top = recipe.params["top"]
    edit = f"The images and the edit are of the {top} largest units together." if top else UNITS
    return f"Unit {figure.data['labels'][col]}: {number(value)} {figure.data['unit']}. {edit}"


def _window(result: Result, col: int, label: str) -> str:
    arrays, layers = result.arrays, ", ".join(window_layers(result)[col])
    effect = float(arrays["direct_effect"].values[col])
    if not np.isfinite(effect):
        share = float(arrays["screen"].values[col]) if "screen" in arrays else float("nan")
        return f"Layers {label}: screen {number(share)} (an estimate, no image yet).\n{layers}"
    error = float(arrays["direct_effect_sem"].values[col])
    spread = f" ± {number(error)}" if np.isfinite(error) else " (one seed: no standard error)"
    total = result.values.get("total_effect")
    whole = f" of the {number(total)} that all layers make" if total is not None else ""
    return f"Layers {label}: direct effect {number(effect)}{spread}{whole}.\n{layers}"


def images_of(recipe: Recipe, result: Result, col: int, seed: str) -> dict[str, Any]:
    """The two images behind a bar at a seed, by the names that COMPARED gives; None where there is none."""
    first, second = COMPARED[recipe.method]
    stem = f"seed{seed}"
    if recipe.method == "localize":
        label = figure_of(recipe, result).data["labels"][col]
        return {first: result.images.get(f"{stem}-clean"), second: result.images.get(image_name(stem, label))}
    if recipe.method == "neurons":
        return {n: result.images.get(f"{stem}-{n}") for n in (first, second)}
    return {first: result.images.get(f"{stem}-concept"), second: None}


def window_layers(result: Result) -> list[list[str]]:
    """Module names of each window."""
    trace = result.arrays["layers"]
    names = trace.axis("layer").labels
    return [[n for n, inside in zip(names, row, strict=True) if inside] for row in trace.values]


def told_layers(recipe: Recipe, result: Result, col: int) -> str:
    """What the Edit panel takes over of a window of layers, as JSON."""
    layers = window_layers(result)
    if not 0 <= col < len(layers):
        raise RequestError("Click a bar first.")
    prompt = recipe.inputs["prompt"]
    concept, replacement = difference(prompt, recipe.inputs["replacement"])
    told = {"model": recipe.model, "prompt": prompt, "concept": concept, "replacement": replacement}
    return json.dumps(told | {"layers": ",".join(layers[col])})


def difference(prompt: str, replacement: str) -> tuple[str, str]:
    """The words in which two prompts differ: what stands between their common beginning and end."""
    a, b = prompt.split(), replacement.split()
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return " ".join(a[start : len(a) - end]) or prompt, " ".join(b[start : len(b) - end])


def carried(
    before: Any, name: str, prompt: str, concept: str, replacement: str
) -> tuple[dict[str, str], tuple[str, str]]:
    """(what fields become when method `name` is chosen, what is `before` from then on).

    before: (the method whose replacement stands in its field, the method chosen last). To `localize` that is
    a whole prompt, to `passport` what the concept becomes; the other methods leave it there.
    """
    owner, last = before if isinstance(before, (list, tuple)) and len(before) == 2 else BEGUN
    if name not in ("localize", "passport"):
        return {}, (owner, name)
    if name == owner:
        return {}, (name, name)
    if name == "localize":
        fits = bool(concept) and concept in prompt
        return {"replacement": " ".join(prompt.replace(concept, replacement).split()) if fits else ""}, (
            name,
            name,
        )
    found, other = difference(prompt, replacement)
    if last == "localize" and found:
        return {"concept": found, "replacement": other}, (name, name)
    return {"replacement": other if concept == found else ""}, (name, name)

"""What the Trace panel shows of results: the map, the table, and for a clicked cell its numbers and
images."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
import numpy as np

from panels import heatmap, widgets
from studio.figures import number
from studio.measure import standard_error
from studio.methods.causal_trace_unet import row_kinds
from studio.methods.text_to_image import image_name
from studio.registry import find_method
from studio.types import Figure, Recipe, Result, Run

ASK = "Click a cell to see its number and its images."
ENLARGE = "Click an image to enlarge it."
STRIPS = {  # title of a gallery, and what to look for in it
    "lens": (
        "Layer by layer",
        "Each image below is drawn from what the text encoder knows after that layer; follow when the words "
        "arrive.",
    ),
    "word-maps": (
        "Where each word lies",
        "Below, each image in grey, coloured where the word's cross-attention is high, each from its own "
        "least to its largest.",
    ),
}
PICTURES = ("clean", "corrupted", "restored")


def figure_of(recipe: Recipe, result: Result) -> Figure:
    """The method's own figure of these results; while only the screen is there, the screen."""
    params = dict(recipe.params)
    effect = result.arrays.get("indirect_effect")
    if "screen" in result.arrays and effect is not None and np.isnan(effect.values).all():
        params["screen"] = True
    shown = Recipe(recipe.method, recipe.model, recipe.inputs, params, recipe.seeds, recipe.edits)
    return find_method(recipe.method).draw(Run(shown, "done", "", 0.0, {}, result))


def drawn(recipe: Recipe, result: Result, out: dict[str, Any], again: bool = False) -> dict[Any, Any]:
    """Updates of map and table (of the gallery for images) for these results; `again` for the last time."""
    figure = figure_of(recipe, result)
    if figure.kind == "strip":
        single = len(figure.data["rows"]) == 1 and recipe.method == "word-maps"
        pictures = [
            (image, col if single else f"{col}, {row}" if recipe.method == "word-maps" else f"{row}, {col}")
            for row, images in zip(figure.data["rows"], figure.data["images"], strict=True)
            for col, image in zip(figure.data["cols"], images, strict=True)
        ]
        label, hint = STRIPS[recipe.method]
        shown = gr.update(visible=True, value=pictures, label=label, columns=5)
        return {out["strip"]: shown, out["figure"]: {"hint": hint}, out["table"]: ""}
    return {out["figure"]: heatmap.as_value(figure, again), out["table"]: heatmap.as_table(figure)}


def headline(run: Run) -> str:
    """The finding in one sentence, of a stopped run what was found so far, and what to do next."""
    recipe, result = run.recipe, run.result
    if recipe.method in STRIPS:
        return ENLARGE
    effect = result.arrays.get("indirect_effect")
    total = result.values.get("total_effect")
    best = effect.best(1) if effect is not None else []
    if not best or total is None:
        return ASK
    (place, value), whole = best[0], f" of the {number(total)} that corruption takes away"
    asked, used = recipe.params.get("noise"), result.values.get("noise")
    noise = f" Noise of {number(used)} was needed." if asked is not None and used not in (None, asked) else ""
    strongest = "Strongest" if run.status == "done" else "Strongest so far"
    return f"{strongest}: {', '.join(place)} brings back {number(value)}{whole}.{noise} {ASK}"


def detail(
    recipe: Recipe,
    result: Result,
    figure: Figure,
    cell: tuple[int, int],
    seed: str | None,
    out: dict[str, Any],
) -> dict[Any, Any]:
    """What a click on a cell shows: its numbers, and the images of one seed."""
    name = figure.data["names"][cell[0]][cell[1]]
    if not name:
        return {out["text"]: "There is no module at this place."}
    seeds = [str(s) for s in recipe.seeds]
    seed = seed if seed in seeds else seeds[0]
    index, image = _place(recipe, result, cell, name)
    images = {n: result.images.get(f"seed{seed}-{n if n != 'restored' else image}") for n in PICTURES}
    if recipe.params.get("screen"):
        images = {n: result.images.get(f"seed{seed}-screen-{_screened(n, image)}") for n in PICTURES}
    told = _map_of(figure, cell)
    if told and seed == seeds[0]:
        images["restored"] = result.images.get(image_name(f"seed{seed}", *_parts(told, result), name))
    update = widgets.shown_pictures(out, images, ("corrupted", "restored"))
    update[out["text"]] = _sentence(recipe, result, name, index, seed)
    if told:
        value = float(figure.data["values"][cell[0]][cell[1]])
        update[out["text"]] = f"{told}: indirect effect {number(value)}.\nAll in all: {update[out['text']]}"
    update[out["seed"]] = gr.update(choices=seeds, value=seed, visible=len(seeds) > 1)
    return update


def _screened(name: str, image: str) -> str:
    """What a picture of a screen is called behind its seed."""
    return image if name == "restored" else name


def _map_of(figure: Figure, cell: tuple[int, int]) -> str:
    """The map that a row belongs to where there are several ("guidance 7.5, steps 0-4"); "" for the whole."""
    rows = figure.data.get("row_of")
    name = rows[cell[0]][1] if rows else ""
    return "" if name in ("", "all steps") or rows[0][1] == name else name


def _parts(told: str, result: Result) -> list[str]:
    """How a map's images are named: its guidance scale where it isn't the first, its range of steps."""
    first = f"guidance {result.values.get('guidance', 0):g}"
    parts = [p for p in told.split(", ") if p not in ("all steps", first)]
    return [p.replace(" ", "") for p in parts]


def _place(recipe: Recipe, result: Result, cell: tuple[int, int], name: str) -> tuple[tuple[int, ...], str]:
    """(index into the trace's own axes, name of the restored image) of a heat map's cell."""
    axes = result.arrays["indirect_effect"].axes
    if recipe.method == "trace-unet":
        return (axes[0].labels.index(name),), image_name(name)
    kind, layer = divmod(cell[0], len(axes[1].labels))
    image = image_name(axes[0].labels[kind], axes[1].labels[layer], f"token{cell[1]}")
    return (kind, layer, cell[1]), image


def _sentence(recipe: Recipe, result: Result, name: str, index: tuple[int, ...], seed: str) -> str:
    """The numbers of a cell in words."""
    arrays, j = result.arrays, [str(s) for s in recipe.seeds].index(seed)
    effect = float(arrays["indirect_effect"].values[index])
    what = (
        f"{name} ({row_kinds((name,), recipe.params['kinds'])[0]})" if recipe.method == "trace-unet" else name
    )
    if not math.isfinite(effect):
        share = float(arrays["screen"].values[index]) if "screen" in arrays else math.nan
        return f"{what}: screen {number(share)} (an estimate, no image yet)."
    mine = arrays["restored"].values[(slice(None), *index)]
    whole = bool(np.isfinite(mine).all())
    error = float(standard_error(mine - arrays["corrupted"].values)) if whole else math.nan
    n = int(np.isfinite(mine).sum())
    spread = f" ± {number(error)} (standard error over {n} seeds)" if math.isfinite(error) else ""
    if spread and "indirect_effect_low" in arrays:
        low, high = (float(arrays[f"indirect_effect_{end}"].values[index]) for end in ("low", "high"))
        spread += f", 95 % from {number(low)} to {number(high)}"
    spread = spread or (
        " (one seed: no standard error)" if len(recipe.seeds) == 1 else f" (so far {n} seeds)"
    )
    scores = [f"{k} {number(float(arrays[k].values[j]))}" for k in ("clean", "corrupted")]
    scores.append(f"restored {number(float(mine[j]))}")
    return (
        f"{what}: indirect effect {number(effect)}{spread}.\nSeed {seed}: {', '.join(scores)} "
        f"({arrays['clean'].unit})."
    )

"""What the Retrieval panel shows of results: maps, the colours of the token strip, and what a click says."""

from __future__ import annotations

from typing import Any

import numpy as np

from panels import retrieval_groups
from studio.figures import number
from studio.methods.attention_knockout import strongest_rows
from studio.methods.language_prompt import percent
from studio.registry import find_method
from studio.types import Figure, Recipe, Result, Run

ASK = "Click a cell or a token for its numbers. Select words in the strip to make them subject or attribute."
SOURCES = {"last": "the last token", "later": "later tokens"}


def map_of(recipe: Recipe, result: Result, prompt: Any = None) -> Figure:
    """The clickable map: tokens, groups or cells by layer; of contributions to a long prompt groups, once it
    is tokenized (`prompt`)."""
    if prompt is not None and retrieval_groups.is_long(recipe, result):
        return retrieval_groups.group_map(recipe, result, prompt)
    if recipe.method in ("knockout", "context-use"):
        return _cuts(result)
    figure = find_method(recipe.method).draw(_run(recipe, result))
    data = dict(figure.data)
    if "names" not in data:
        data["names"] = [[f"{row}, layer {col}" for col in data["cols"]] for row in data["rows"]]
    return Figure("heat", data, figure.title, figure.caption)


def has_map(result: Result) -> bool:
    """Whether there are numbers for the map yet; of context or memory its conditions come first."""
    return "relative_change" in result.arrays or "condition_probability" not in result.arrays


def _run(recipe: Recipe, result: Result) -> Run:
    return Run(recipe, "done", "", 0.0, {}, result)


def _cuts(result: Result) -> Figure:
    """Relative changes, a row a group (and source), a column a layer."""
    change = result.arrays["relative_change"]
    layers, groups = change.axis("layer").labels, change.axis("group").labels
    sources = change.axis("source").labels if change.axes[0].name == "source" else ("",)
    values = change.values.reshape(-1, len(layers))
    shown = strongest_rows(values)
    rows = [f"{g} ({s})" if s else g for s in sources for g in groups]
    told = [f"{g} from {SOURCES[s]}" if s else g for s in sources for g in groups]
    data = {
        "rows": [rows[i] for i in shown],
        "cols": list(layers),
        "values": values[shown],
        "names": [[f"{told[i]}, layers around {layer}" for layer in layers] for i in shown],
        "unit": "relative change",
    }
    caption = "" if len(shown) == len(rows) else f"{len(shown)} of {len(rows):,} groups, the strongest. "
    caption += str(result.values.get("verdict") or result.values.get("finding") or "")
    return Figure("heat", data, caption=caption)


def has_curve(recipe: Recipe, result: Result) -> bool:
    """Whether the method's own figure is a curve that is worth a picture beside the map."""
    if recipe.method == "context-use":
        return "verdict" in result.values
    groups = result.arrays["relative_change"].axis("group").labels if recipe.method == "knockout" else ()
    return 0 < len(groups) <= 6


def side_by_side(result: Result) -> Figure | None:
    """Indirect effects by position with and without the context; None before there are any."""
    if "position_effect" not in result.arrays or "condition_probability" not in result.arrays:
        return None
    effect = result.arrays["position_effect"]
    conditions, kinds, layers, positions = (axis.labels for axis in effect.axes)
    rows = [f"{kind} {layer}" for kind in kinds for layer in layers]
    cols = [f"{p}, {'with' if c.startswith('with ') else 'without'}" for p in positions for c in conditions]
    values = effect.values.transpose(1, 2, 3, 0).reshape(len(rows), len(cols))
    names = [[f"{row} · {col} the context" for col in cols] for row in rows]
    told = "Indirect effect of restoring a state after noise on the subject, with and without the context."
    data = {"rows": rows, "cols": cols, "values": values, "names": names, "unit": effect.unit}
    return Figure("heat", data, caption=told)


# ---- the token strip ---------------------------------------------------------------------------------


def quantities(recipe: Recipe, result: Result) -> dict[str, str]:
    """What tokens can be coloured by, {key: label}; the first is shown."""
    if recipe.method == "contributions":
        return {"share": "Largest share in any layer", "projection": "Part of the answer's logit"}
    if recipe.method == "trace-language":
        return {k: f"Largest effect, {k}" for k in result.arrays["indirect_effect"].axis("kind").labels}
    if recipe.method == "context-use":
        return {
            s: f"Strongest cut from {SOURCES[s]}" for s in result.arrays["relative_change"].axes[0].labels
        }
    return {"change": "Strongest cut of its group"}


def as_the_map(recipe: Recipe, quantity: str | None) -> bool:
    """Whether tokens coloured by a quantity have the map's numbers, so that one colour scale fits both."""
    return not (recipe.method == "contributions" and quantity == "projection")


def colours(recipe: Recipe, result: Result, quantity: str | None, n: int) -> tuple[np.ndarray, str]:
    """(numbers (n tokens), unit) of the strip."""
    arrays, known = result.arrays, quantities(recipe, result)
    quantity = quantity if quantity in known else next(iter(known))
    if recipe.method == "contributions":
        if quantity == "projection":
            return arrays["projection"].values.sum((0, 1)), "of the answer's logit"
        return arrays["share"].values.max(0), "of a layer's contributions"
    if recipe.method == "trace-language":
        effect = arrays["indirect_effect"].at("kind", quantity).values
        known_cells = np.isfinite(effect).any(0)
        largest = np.where(known_cells, np.nanmax(np.where(np.isfinite(effect), effect, -np.inf), 0), np.nan)
        return largest, "indirect effect"
    change, member = arrays["relative_change"].values, arrays.get("groups")
    if recipe.method == "context-use":
        change = change[arrays["relative_change"].axes[0].labels.index(quantity)]
    if member is None or member.values.shape[1] != n:
        return np.full(n, np.nan), "relative change"
    lowest = np.nanmin(np.where(np.isfinite(change), change, np.inf), 1)
    inside = np.where(member.values > 0, lowest[:, None], np.inf).min(0)
    return np.where(np.isfinite(inside), inside, np.nan), "relative change"


# ---- what a click says -------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """The finding in a sentence, and what to do next."""
    values = run.result.values
    return f"{values.get('verdict') or values.get('finding') or ''} {ASK}".strip()


def cell_sentence(recipe: Recipe, result: Result, row: int, col: int, prompt: Any = None) -> str:
    """The numbers behind a cell of the map."""
    figure = map_of(recipe, result, prompt)
    if prompt is not None and retrieval_groups.is_long(recipe, result):
        return retrieval_groups.group_sentence(recipe, result, prompt, row, col)
    if recipe.method == "trace-language" and not retrieval_groups.by_position(recipe, figure):
        kind, layer = divmod(row, result.arrays["indirect_effect"].values.shape[1])
        token = int(result.values["first_corrupted"]) + col
        return retrieval_groups.effect_sentence(recipe, result, kind, layer, token)
    name, value = figure.data["names"][row][col], float(np.asarray(figure.data["values"])[row][col])
    said = f"{name}: {number(value)} {figure.data['unit']}."
    arrays, values = result.arrays, result.values
    if recipe.method == "trace-language":
        said += " That is the mean over its tokens, which stand below."
    elif recipe.method == "knockout":
        row = strongest_rows(arrays["relative_change"].values)[row]
        rank, top = (int(arrays[n].values[row, col]) for n in ("rank", "top_token"))
        word = values["top_words"].get(str(top), top)
        said += (
            f" Probability {number(float(arrays['knocked_out'].values[row, col]))} "
            f"(clean {number(float(arrays['probability'].values))}), rank {rank}, most probable {word!r}."
        )
        said += _control(arrays, (slice(None), slice(None), row, col))
        held = arrays["groups"].values
        if held.shape[1] > retrieval_groups.LONG and held[row].sum() > 1:
            said += (
                " To cut each of its tokens by itself choose tokens under “Groups” in Options, and run again."
            )
    elif recipe.method == "context-use":
        source, group = divmod(row, len(arrays["relative_change"].axis("group").labels))
        said += _control(arrays, (source, slice(None), slice(None), group, col))
    return said


def side_sentence(result: Result, row: int, col: int) -> str:
    """The numbers behind a cell of the side-by-side map: the effect, and its share of all that was lost."""
    figure = side_by_side(result)
    share = result.arrays["position_share"]
    conditions = share.axes[0].labels
    place, condition = divmod(col, len(conditions))
    kind, layer = divmod(row, share.values.shape[2])
    said = f"{figure.data['names'][row][col]}: "
    part = float(share.values[condition, kind, layer, place])
    if not np.isfinite(part):
        return f"{said}not measured, or there is no such token."
    total = result.values[f"total_effect_{conditions[condition].replace(' ', '_')}"]
    effect = number(float(np.asarray(figure.data["values"])[row][col]))
    return f"{said}{effect} of the {number(total)} that the noise took, {percent(part)}."


def _control(arrays: Any, index: tuple) -> str:
    control = arrays.get("control")
    draws = control.values[index].ravel() if control is not None else np.array([])
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return ""
    return (
        f" Random sets of the same size: {number(float(draws.mean()))}, from {number(float(draws.min()))} to "
        f"{number(float(draws.max()))}."
    )


def token_of(recipe: Recipe, figure: Figure, row: int) -> int | None:
    """The position of the token that a row of the contributions' map stands for."""
    return int(str(figure.data["rows"][row]).split(":")[0]) if recipe.method == "contributions" else None


def heads(result: Result, token: int, layer: int) -> Figure:
    """Bars: what each head of a layer adds of one token, as its part of the answer's logit."""
    found = result.arrays["projection"]
    norms = result.arrays["contribution"].values[layer, :, token]
    labels = [f"head {h}" for h in range(found.values.shape[1])]
    data = {"labels": labels, "values": norms, "unit": "norm of the contribution", "names": labels}
    return Figure("bars", data)


def token_sentence(recipe: Recipe, result: Result, token: int, label: str) -> str:
    """The numbers of one token, over layers."""
    said = [f"Token {token}, {label.strip()!r}."]
    arrays = result.arrays
    if recipe.method == "contributions":
        share, added = arrays["share"].values[:, token], arrays["projection"].values[:, :, token]
        layer, head = np.unravel_index(int(np.abs(added).argmax()), added.shape)
        said.append(
            f"Largest share {share.max():.0%} in layer {int(share.argmax())}; adds {added.sum():+.2f} to the "
            f"answer's logit, most in layer {layer} head {head} ({added[layer, head]:+.2f})."
        )
    elif recipe.method == "trace-language":
        for k, kind in enumerate(arrays["indirect_effect"].axis("kind").labels):
            effect = arrays["indirect_effect"].values[k, :, token]
            if np.isfinite(effect).any():
                best = int(np.nanargmax(effect))
                said.append(f"{kind}: at most {number(float(effect[best]))} in layer {best}.")
    elif "groups" in arrays and token < arrays["groups"].values.shape[1]:
        names = arrays["groups"].axis("group").labels
        mine = [n for n, inside in zip(names, arrays["groups"].values[:, token], strict=True) if inside]
        said.append(f"In the groups {', '.join(mine)}." if mine else "In none of the groups.")
    return " ".join(said)

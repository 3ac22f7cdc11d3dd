"""What the Decompose panel shows of results: maps, bars, tables and the sentences behind a click."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.figures import number
from studio.methods.vit_decomposition import layer_table
from studio.registry import find_method
from studio.types import Figure, Recipe, Result, Run

ASK = "Click a cell: its score for each text, where in the image it looks, its top and bottom images."
ASKS = {
    "text-span": "Click a head for its texts; the tab Table has those of all heads.",
    "rank-components": "Choose a feature above the map; click a cell for its shares of all features.",
}
SHARE = "share of the representation"
MOST_TEXTS = 60  # columns of the table of texts


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers (image, component, text) and the labels of their axes; `unit` says what they are. Results that
    are no scores of images have the one image ""."""

    values: np.ndarray
    images: tuple[str, ...]
    components: tuple[str, ...]
    texts: tuple[str, ...]
    unit: str

    def of(self, text: str | None, image: str | None) -> np.ndarray:
        """(component,) for a text (default the first) and an image (default the mean); RequestError for
        another name."""
        return self.over(image)[:, self.text(text)]

    def text(self, text: str | None) -> int:
        """The place of a text."""
        if text and text not in self.texts:
            raise RequestError(f"{text[:60]!r} is none of the texts of this run; press Run.")
        return self.texts.index(text) if text else 0

    def over(self, image: str | None) -> np.ndarray:
        """(component, text) of an image, or the mean over all."""
        if not image:
            return self.values.mean(0)
        if image not in self.images:
            raise RequestError(f"{image[:60]!r} is none of the images of this run; press Run.")
        return self.values[self.images.index(image)]

    def component(self, name: str) -> int:
        """The place of a component."""
        if name not in self.components:
            raise RequestError(f"{name[:60]!r} is no component of this model.")
        return self.components.index(name)


def scores(result: Result) -> Scores | None:
    """What there is of each component: scores for texts, without texts its share of the representation, of
    roles the shares of features, of text bases the share of all heads' variance; None for other results."""
    arrays = result.arrays
    if "scores" in arrays and "contributions" in arrays:
        return _named(arrays["scores"].values, arrays["scores"], "score (sums to the cosine)")
    if "contributions" in arrays:
        z, parts = (arrays[n].values.astype(float) for n in ("representation", "contributions"))
        share = np.einsum("icd,id->ic", parts, z) / np.square(z).sum(1)[:, None]
        images, components = (a.labels for a in arrays["contributions"].axes[:2])
        return Scores(share[..., None], images, components, (SHARE,), SHARE)
    if "score" in arrays and arrays["score"].axes[0].name == "feature":
        found = arrays["score"]
        features, components = (a.labels for a in found.axes)
        return Scores(found.values.T[None], ("",), components, features, "share of the covariance")
    if "variance" in arrays and "picks" in arrays:
        found = arrays["variance"]
        share = found.values / max(float(found.values.sum()), 1e-30)
        unit = "share of all heads' variance"
        return Scores(share[None, :, None], ("",), found.axes[0].labels, (unit,), unit)
    return None


def _named(values: np.ndarray, trace: Any, unit: str) -> Scores:
    images, components, texts = (a.labels for a in trace.axes)
    return Scores(values, images, components, texts, unit)


def layer_map(result: Result, text: str | None = None, image: str | None = None) -> Figure:
    """The clickable map: rows blocks, columns heads, bias and MLP; its caption says how exact it is."""
    found = _scores(result)
    rows, cols, values = layer_table(found.components, found.of(text, image))
    known = set(found.components)
    names = [[_name(row, col, known) for col in cols] for row in rows]
    data = {"rows": rows, "cols": cols, "values": values, "names": names, "unit": found.unit}
    return Figure("heat", data, caption=caption(result, found, text, image))


def _name(row: str, col: str, known: set[str]) -> str:
    whole = row if col == "all" else f"{row}.{col}"
    return whole if whole in known else ""


def caption(result: Result, found: Scores, text: str | None, image: str | None) -> str:
    """What the map is of, and how exactly its parts sum to the whole."""
    said = []
    if found.images != ("",):
        many = f"mean over {len(found.images)} images" if len(found.images) > 1 else found.images[0]
        named = found.texts[found.text(text)]
        said.append(f"{'' if named == SHARE else f'“{named}”, '}{image or many}")
    if "sum_error" in result.values:
        said.append(
            f"{result.values['way']}; space: {result.values['space']}; the parts sum to the whole with a "
            f"relative error of {result.values['sum_error']:.1e}"
        )
    elif "images" in result.values:
        said.append(f"{result.values['images']:,} images")
    return "; ".join(said)


def texts_map(result: Result, image: str | None = None) -> Figure | None:
    """Components by texts, side by side; None where there are fewer than two texts."""
    found = scores(result)
    if found is None or len(found.texts) < 2:
        return None
    values, texts = found.over(image)[:, :MOST_TEXTS], found.texts[:MOST_TEXTS]
    names = [[f"{c} for {t}" for t in texts] for c in found.components]
    data = {"rows": list(found.components), "cols": list(texts), "values": values, "names": names}
    left = f"; the first {MOST_TEXTS} of {len(found.texts)} texts" if len(found.texts) > MOST_TEXTS else ""
    many = f"mean over {len(found.images)} images" if len(found.images) > 1 else found.images[0]
    return Figure("heat", data | {"unit": found.unit}, caption=f"{image or many}{left}")


def component_at(result: Result, row: int, col: int) -> str:
    """The component of a cell of `layer_map`; RequestError for an empty one."""
    name = layer_map(result).data["names"][row][col]
    if not name:
        raise RequestError("There is no component in that cell.")
    return name


def component_bars(result: Result, component: str, image: str | None) -> Figure:
    """What a component adds for each text; of text bases the share of each text it was given."""
    found = _scores(result)
    row = found.component(component)
    if "picks" in result.arrays:
        picks = result.arrays["picks"].values[row]
        labels = [*result.values["texts"][component]]
        values = result.arrays["share"].values[row][picks >= 0]
        unit = "share of the head's variance"
    else:
        labels, values = [*found.texts[:MOST_TEXTS]], found.over(image)[row, :MOST_TEXTS]
        unit = found.unit
    return Figure("bars", {"labels": labels, "values": values, "unit": unit, "names": labels})


def extremes(result: Result, component: str, text: str | None, most: int = 4) -> list[tuple[str, float]]:
    """(image, score) of a component's top images and then its bottom ones, each once, from high to low."""
    found = _scores(result)
    if found.images == ("",):
        return []
    values = found.values[:, found.component(component), found.text(text)]
    order = np.argsort(-values, kind="stable")
    chosen = order if len(order) <= 2 * most else np.concatenate([order[:most], order[-most:]])
    return [(found.images[i], float(values[i])) for i in chosen]


def sentence(result: Result, component: str, text: str | None, image: str | None) -> str:
    """The numbers of one component."""
    found = _scores(result)
    row = found.component(component)
    values = found.over(image)[row]
    if "picks" in result.arrays:
        texts, shares = result.values["texts"][component], result.arrays["share"].values[row]
        told = ", ".join(f"“{t}” {s:.0%}" for t, s in zip(texts[:3], shares, strict=False))
        return f"{component}: {values[0]:.1%} of all heads' variance; {told or 'no text tells it'}."
    best, chosen = int(values.argmax()), found.text(text)
    whole = float(found.over(image)[:, chosen].sum())
    said = f"{component}: {number(float(values[chosen]))} {found.unit} of {number(whole)} in all"
    if found.texts[chosen] != SHARE:
        said += f", for “{found.texts[chosen]}”"
    if len(found.texts) > 1 and best != chosen:
        said += f"; most for “{found.texts[best]}” ({number(float(values[best]))})"
    return said + "."


def headline(run: Run) -> str:
    """The finding in a sentence, and what to do next."""
    found = scores(run.result)
    if found is None:
        return str(run.result.values.get("finding", ""))
    values = found.of(None, None)
    best = int(np.abs(values).argmax())
    named = "" if len(found.texts) == 1 and found.texts[0] == found.unit else f" for “{found.texts[0]}”"
    ask = ASKS.get(run.recipe.method, ASK)
    return f"Largest{named}: {found.components[best]} ({number(float(values[best]))}). {ask}"


def answers(result: Result, image: str | None) -> Figure | None:
    """Bars: the cosine of one image with each text; None for the mean of several, and without texts."""
    if not {"scores", "contributions"} <= set(result.arrays):
        return None
    found = _scores(result)
    if not image and len(found.images) > 1:
        return None
    labels, values = [*found.texts[:MOST_TEXTS]], found.over(image).sum(0)[:MOST_TEXTS]
    return Figure("bars", {"labels": labels, "values": values, "unit": "cosine", "names": labels})


def rows_of(recipe: Recipe, result: Result) -> tuple[list[str], list[list[str]]] | None:
    """(columns, rows) of a method whose own figure is a table."""
    figure = find_method(recipe.method).draw(Run(recipe, "done", "", 0.0, {}, result))
    if figure.kind != "table":
        return None
    return [str(c) for c in figure.data["columns"]], [[str(v) for v in row] for row in figure.data["rows"]]


def ablated(result: Result) -> str:
    """What a true ablation changed, in a sentence."""
    count, images = result.values["changed"], len(result.arrays["scores"].axis("image").labels)
    both = {"direct": "by the direct effect", "true": "in the model, with all that follows"}
    told = " and ".join(f"{count[s]} {words}" for s, words in both.items() if s in count)
    return (
        f"Without {', '.join(result.values['components'])}: of {images} answers change {told}; means of "
        f"{result.values['means']}."
    )


def token_grid(labels: tuple[str, ...], values: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """((rows, columns) of the patches' scores, the scores of other tokens by name) of one image."""
    places = {i: tuple(map(int, n.split(".")[1:])) for i, n in enumerate(labels) if n.startswith("patch.")}
    rows, cols = (1 + max(p[k] for p in places.values()) for k in (0, 1))
    grid = np.full((rows, cols), np.nan)
    for i, place in places.items():
        grid[place] = values[i]
    return grid, {n: float(values[i]) for i, n in enumerate(labels) if i not in places}


def token_sentence(head: str, text: str, grid: np.ndarray, others: dict[str, float]) -> str:
    """How a head's score is spread over the image."""
    rest = sum(others.values())
    said = f"{head} for “{text}”: patches from {number(float(grid.min()))} to {number(float(grid.max()))}"
    return (
        f"{said}, {number(float(grid.sum()))} together; {number(rest)} from {', '.join(others) or 'others'}."
    )


def _scores(result: Result) -> Scores:
    found = scores(result)
    if found is None:
        raise RequestError("This view has no map of components; press Run in another.")
    return found

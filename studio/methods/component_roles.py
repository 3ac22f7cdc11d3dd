"""Which components of a vision transformer carry a feature, such as colour, that a few texts describe.

E: orthonormal basis of the feature's text embeddings, centred on a fixed bank of texts. Score of component i:
tr(E Cov(c_i, z) E') / tr(E Cov(z) E'), over images; the scores of all components sum to 1 and no rotation of
E changes them. Beside it the mean over the axes of E of the correlation of c_i with z, as published, which
depends on the basis, and the share of the component's own variance that lies in the feature. The specific
score of a feature is the score minus the largest one of the other features. arXiv 2406.01583.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files
from studio.methods.component_params import SpaceParams
from studio.methods.text_span import bank_texts
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

Groups = tuple[tuple[str, ...], ...]  # by text of a feature, the phrasings whose mean is taken
SHOWN = 10  # components of a feature in the figure
NO_LINE = "no placebo was asked for, so even the first may be chance: some component always is first"
PARALLEL = 1e-6  # relative length of what is left of a text beside those before it


@dataclass(frozen=True)
class Inputs:
    """The images, and the features as texts."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )
    features: tuple[str, ...] | None = knob(
        None,
        "features, each as NAME: TEXT | TEXT | …, or one text alone; default, for "
        "atlas-clip alone: the five attributes of the Atlas world",
        commas=False,
        lines=True,
    )
    bank: tuple[str, ...] | None = knob(
        None,
        "texts whose mean is the centre of all texts; default, for atlas-clip "
        "alone: a bank of the Atlas world",
        commas=False,
        lines=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SpaceParams):
    """In whose space, and whether chance is asked too."""

    placebo: bool = knob(
        False,
        "also net shares, in which components that undo each other count together, and the line that random "
        "directions reach; the images are read once more",
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses images and aligners that are not there, and features that can't be read."""
    image_files(inputs.images)
    if params.aligner and not Path(params.aligner).expanduser().is_file():
        raise RequestError(f"--aligner: there is no file {params.aligner[:120]!r}.")
    read_features(inputs.features or ())


def read_features(given: Sequence[str], option: str = "--features") -> dict[str, Groups]:
    """{name: its texts, each alone in its group} of NAME: TEXT | TEXT; without a colon a text is its name."""
    found: dict[str, Groups] = {}
    for line in given:
        name, colon, rest = line.partition(":")
        texts = [text.strip() for text in (rest if colon else line).split("|")]
        name = name.strip() if colon else texts[0]
        if not name or not all(texts):
            raise RequestError(
                f"{option}: {line[:60]!r} is no feature; write NAME: TEXT | TEXT, or one text alone."
            )
        if name in found:
            raise RequestError(f"{option}: {name[:40]!r} is given twice; join its texts with |.")
        found[name] = tuple((text,) for text in dict.fromkeys(texts))
    return found


def feature_basis(embeddings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(k, dim) orthonormal rows of texts (n, dim) minus the centre (dim,), by Gram-Schmidt in their order;
    those that add no direction are left out."""
    rows: list[np.ndarray] = []
    for x in embeddings - centre:
        left = x.copy()
        for _ in range(2):  # the second time takes off what rounding left
            for row in rows:
                left = left - (left @ row) * row
        if (length := np.linalg.norm(left)) > PARALLEL * max(np.linalg.norm(x), 1e-30) and length > 1e-9:
            rows.append(left / length)
    return np.array(rows).reshape(len(rows), embeddings.shape[1])


def roles(space: Any, found: Any, basis: np.ndarray) -> dict[str, np.ndarray]:
    """`score`, `correlation` and `within` (component,) of one feature's basis (k, dim), from statistics."""
    whole = np.diag(basis @ found.total_covariance @ basis.T)
    if not whole.sum() > 0:
        raise RequestError("The representation does not vary over these images; take images that differ.")
    rows = []
    for label, spread in found.covariances.items():
        matrix = space.matrix(label)
        inside = matrix @ basis.T  # (r, k)
        cross = (inside * (found.crosses[label] @ basis.T)).sum(0)
        own = (inside * (spread @ inside)).sum(0)
        both = np.sqrt(np.maximum(own, 0) * whole)
        correlation = np.divide(cross, both, out=np.zeros_like(cross), where=both > 1e-12 * whole.sum())
        everything = float((matrix * (spread @ matrix)).sum())
        within = own.sum() / everything if everything > 1e-12 * np.trace(found.total_covariance) else 0.0
        rows.append((cross.sum() / whole.sum(), correlation.mean(), within))
    return dict(zip(("score", "correlation", "within"), np.array(rows).T, strict=True))


def draw(run: Run) -> Figure:
    """A column a feature: its components in the feature-specific order, with their scores."""
    scores = run.result.arrays["score"]
    order = run.result.arrays.get("specific", scores).values
    features, names = scores.axis("feature").labels, scores.axis("component").labels
    columns = [
        [f"{names[i]}  {scores.values[f, i]:.1%}" for i in np.argsort(-order[f], kind="stable")[:SHOWN]]
        for f in range(len(features))
    ]
    rows = [[str(n + 1), *row] for n, row in enumerate(zip(*columns, strict=True))]
    title = f"{run.recipe.model}: components of each feature, {run.result.values['images']:,} images"
    caption = "share of the representation's covariance within the feature; all components sum to 100%"
    if len(features) > 1:
        caption += "; in order of the share minus the largest share of another feature"
    if above := run.result.values.get("above"):
        told = (f"{n} {', '.join(found[:3]) or 'none'}" for n, found in above.items())
        caption += f"; above what random directions reach: {'; '.join(told)}"
    else:
        caption += f"; {NO_LINE}"
    return Figure("table", {"columns": ["", *features], "rows": rows}, title=title, caption=caption)


@method(
    "rank-components",
    title="Roles of components",
    paper="arXiv:2406.01583",
    family="vision",
    summary="Which components of a vision transformer carry a feature that a few texts describe.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def rank_components(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`score`, `correlation`, `within` and, of several features, `specific` (feature, component)."""
    from studio.models.component_space import open_space, unit_texts
    from studio.models.corpus import statistics

    space, clip = open_space(model, scorer, params.aligner)
    features = read_features(inputs.features or ()) or atlas_attributes(clip)
    centre = unit_texts(clip, bank_texts(clip, inputs.bank, "--bank")).mean(0)
    bases = {}
    for name, groups in features.items():
        embeddings = np.stack([unit_texts(clip, texts).mean(0) for texts in groups])
        bases[name] = feature_basis(embeddings, centre)
        if not len(bases[name]):
            raise RequestError(
                f"The texts of {name[:40]!r} are the centre of the --bank itself; give a bank of several."
            )
    files, _ = image_files(inputs.images)
    found = statistics(space, files, report, params.aligner)
    result = _result({name: roles(space, found, basis) for name, basis in bases.items()}, found)
    return _with_placebo(result, space, bases, files, report) if params.placebo else result


def _with_placebo(
    result: Result, space: Any, bases: Mapping[str, np.ndarray], files: list[Path], report: Report
) -> Result:
    """The result with `net` (feature, component), `line` (feature) and the names above it."""
    from studio.methods.component_placebo import Placebo
    from studio.models.corpus import readable

    placebo = Placebo(bases, space.width)
    report.plan(len(files), "reading images for the placebo")
    for start in range(0, len(files), report.rows):
        batch = files[start : start + report.rows]
        if images := list(readable(batch)):
            parts = space.whole.run(space.model.pixels(images))
            own = parts.components if space.aligner is None else space.aligner.components(parts)
            placebo.add({label: own[label].double().cpu().numpy() for label in parts.components})
        report.step(len(batch))
    net, line = placebo.result()
    axes = result.arrays["score"].axes
    arrays = {
        "net": Trace(net.astype(np.float32), axes, "share of the variance"),
        "line": Trace(line.astype(np.float32), axes[:1], "share of the variance"),
    }
    above = {
        name: [axes[1].labels[i] for i in np.argsort(-row, kind="stable") if row[i] > least]
        for name, row, least in zip(bases, net, line, strict=True)
    }
    return replace(result, arrays={**result.arrays, **arrays}, values={**result.values, "above": above})


def atlas_attributes(clip: Any) -> Mapping[str, Groups]:
    """The five attributes of the Atlas world, for atlas-clip alone; RequestError for another CLIP."""
    if clip.source.path.name != "atlas-clip":
        raise RequestError(
            f"--features is needed with {clip.id}: each as NAME: TEXT | TEXT; only atlas-clip has some of "
            "its own."
        )
    from studio.atlas.text_bank import attribute_texts

    return attribute_texts()


def _result(by_feature: dict[str, dict[str, np.ndarray]], found: Any) -> Result:
    axes = (Axis("feature", tuple(by_feature)), Axis("component", tuple(found.covariances)))
    stacked = {k: np.stack([f[k] for f in by_feature.values()]) for k in ("score", "correlation", "within")}
    units = {"score": "share of the covariance", "correlation": "mean correlation", "within": "share"}
    if len(by_feature) > 1:
        scores = stacked["score"]
        others = [np.delete(scores, i, 0).max(0) for i in range(len(scores))]
        stacked["specific"] = scores - np.stack(others)
        units["specific"] = "share minus the largest of the others"
    arrays = {k: Trace(v.astype(np.float32), axes, units[k]) for k, v in stacked.items()}
    order = stacked.get("specific", stacked["score"])
    first = {
        name: [axes[1].labels[i] for i in np.argsort(-row, kind="stable")[:SHOWN]]
        for name, row in zip(by_feature, order, strict=True)
    }
    return Result(arrays, {"images": found.count, "first": first})

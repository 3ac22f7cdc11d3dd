"""What each head of a vision transformer writes, as texts: a greedy basis of texts for its contributions.

In turn, the text t along which a head's contributions C (over images) vary most, argmax_t Var(C t), is taken,
and its direction is removed from C and from all texts. Texts are first projected to the `rank` main
directions of C and not scaled. Only the covariance of C is needed, so everything is algebra of r x r
matrices, r at most the head size. TextSpan of Interpreting CLIP's Image Representation via Text-Based
Decomposition, arXiv 2310.05916; beyond CLIP through an aligner, 2406.01583.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files
from studio.methods.component_params import SpaceParams
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

HEAD = re.compile(r"block\.\d+\.head\.\d+")
NOTHING = 1e-10  # share of a head's variance, or of its largest direction, that is rounding


@dataclass(frozen=True)
class Inputs:
    """The images that the heads see, and the texts to choose from."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )
    texts: tuple[str, ...] | None = knob(
        None,
        "texts to choose from; default, for atlas-clip alone: a bank of the Atlas world",
        commas=False,
        lines=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SpaceParams):
    """In whose space, and how many texts."""

    length: int = knob(8, "texts of a head at most", low=1, high=200)
    rank: int | None = knob(
        None, "main directions of a head that are kept; default and at most the head size", low=1, high=4096
    )
    heads: tuple[str, ...] | None = knob(None, "heads such as block.3.head.1; default all")


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses images and aligners that are not there, and names that no head has."""
    image_files(inputs.images)
    if params.aligner and not Path(params.aligner).expanduser().is_file():
        raise RequestError(f"--aligner: there is no file {params.aligner[:120]!r}.")
    for head in params.heads or ():
        if not HEAD.fullmatch(head):
            raise RequestError(f"--heads: {head[:40]!r} is no head; write block.LAYER.head.HEAD.")


@dataclass(frozen=True, eq=False)
class Span:
    """The basis of one head: picks (n,) places among the texts, shares (n,) of its variance along each new
    direction, alone (K,) the share along every text by itself, variance: its trace, rank: directions kept."""

    picks: np.ndarray
    shares: np.ndarray
    alone: np.ndarray
    variance: float
    rank: int


def greedy_span(
    covariance: np.ndarray,
    mean: np.ndarray,
    matrix: np.ndarray,
    texts: np.ndarray,
    length: int,
    rank: int | None = None,
) -> Span:
    """The basis from a head's covariance (r, r) and mean (r,), its matrix (r, dim), and unit texts (K, dim),
    all float64."""
    basis, upper = np.linalg.qr(matrix.T)  # (dim, q), (q, r): a contribution is x upper.T in q coordinates
    spread, centre = upper @ covariance @ upper.T, upper @ mean
    inside = texts @ basis
    variance = float(np.trace(spread))
    none = Span(np.empty(0, int), np.empty(0), np.zeros(len(texts)), max(variance, 0.0), 0)
    sizes, directions = np.linalg.eigh(spread + np.outer(centre, centre))
    if variance <= NOTHING * max(sizes[-1], np.finfo(float).tiny):
        return none
    kept = int((sizes > NOTHING * sizes[-1]).sum())
    kept = kept if rank is None else min(kept, rank)
    main = directions[:, ::-1][:, :kept]
    alone = ((inside @ spread) * inside).sum(1) / variance
    spread, left = main.T @ spread @ main, inside @ main
    picks, shares = [], []
    while len(picks) < min(length, kept):
        found = ((left @ spread) * left).sum(1)
        best = int(found.argmax())
        if found[best] <= NOTHING * variance:
            break
        unit = left[best] / np.linalg.norm(left[best])
        shares.append(float(unit @ spread @ unit) / variance)
        picks.append(best)
        rest = np.eye(kept) - np.outer(unit, unit)
        spread, left = rest @ spread @ rest, left @ rest
    return Span(np.array(picks, int), np.array(shares), alone, variance, kept)


def bank_texts(clip: Any, given: Sequence[str] | None, option: str) -> tuple[str, ...]:
    """The texts given, without repetitions; without any, the Atlas bank if the CLIP is atlas-clip."""
    if given:
        return tuple(dict.fromkeys(given))
    if clip.source.path.name != "atlas-clip":
        raise RequestError(
            f"{option} is needed with {clip.id}: a file with a bank of texts, one a line; only atlas-clip "
            "has one of its own."
        )
    from studio.atlas.text_bank import text_bank

    return text_bank()


def draw(run: Run) -> Figure:
    """A row a head, those with the most variance first: its share of all heads' variance and its texts."""
    arrays = run.result.arrays
    texts = arrays["alone"].axis("text").labels
    picks, shares, variance = (arrays[n].values for n in ("picks", "share", "variance"))
    whole = max(float(variance.sum()), 1e-30)
    rows = []
    for i in np.argsort(-variance, kind="stable"):
        named = [
            f"{texts[int(p)]} ({s:.0%})" for p, s in zip(picks[i, :3], shares[i, :3], strict=True) if p >= 0
        ]
        label = arrays["variance"].axis("component").labels[i]
        explained = float(np.nansum(shares[i]))
        rows.append(
            [label, f"{variance[i] / whole:.1%}", f"{explained:.0%}", *named, *[""] * (3 - len(named))]
        )
    columns = ["head", "of all heads' variance", "told by its texts", "first text", "second", "third"]
    count = run.result.values["images"]
    title = f"{run.recipe.model}: what heads write, as texts, {count:,} images"
    caption = "in brackets the share of the head's variance along each text, those before it removed"
    return Figure("table", {"columns": columns, "rows": rows}, title=title, caption=caption)


@method(
    "text-span",
    title="Text span",
    paper="arXiv:2310.05916",
    family="vision",
    summary="What each head of a vision transformer writes, as a few texts with their shares of variance.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def text_span(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`picks` and `share` (component, place), `variance` (component), `alone` (component, text)."""
    from studio.models.component_space import open_space, unit_texts
    from studio.models.corpus import statistics

    space, clip = open_space(model, scorer, params.aligner)
    texts = bank_texts(clip, inputs.texts, "--texts")
    heads = _heads(model.id, space.whole.labels, params.heads)
    found = statistics(space, image_files(inputs.images)[0], report, params.aligner)
    units = unit_texts(clip, texts)
    spans = {}
    report.plan(len(heads), "choosing texts")
    for label in heads:
        known = (found.covariances[label], found.means[label], space.matrix(label))
        spans[label] = greedy_span(*known, units, params.length, params.rank)
        report.step()
    return _result(spans, texts, params.length, found.count)


def _heads(model: str, labels: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    heads = [label for label in labels if ".head." in label]
    if wrong := [h for h in asked or () if h not in heads]:
        raise RequestError(f"{model} has no head {wrong[0]}; its last is {heads[-1]}.")
    return [h for h in heads if h in asked] if asked else heads


def _result(spans: dict[str, Span], texts: tuple[str, ...], length: int, images: int) -> Result:
    picks = np.full((len(spans), length), -1, np.int64)
    shares = np.full((len(spans), length), np.nan, np.float32)
    for row, span in enumerate(spans.values()):
        picks[row, : len(span.picks)], shares[row, : len(span.picks)] = span.picks, span.shares
    component, place = Axis("component", tuple(spans)), Axis("place", tuple(map(str, range(1, length + 1))))
    alone = np.stack([s.alone for s in spans.values()]).astype(np.float32)
    variance = np.array([s.variance for s in spans.values()], np.float32)
    arrays = {
        "picks": Trace(picks, (component, place), "index among the texts, -1 for none"),
        "share": Trace(shares, (component, place), "share of the head's variance"),
        "variance": Trace(variance, (component,), "trace of the covariance"),
        "alone": Trace(alone, (component, Axis("text", texts)), "share of the head's variance"),
    }
    table = {name: [texts[int(p)] for p in span.picks] for name, span in spans.items()}
    ranks = {name: span.rank for name, span in spans.items()}
    return Result(arrays, {"images": images, "texts": table, "ranks": ranks})

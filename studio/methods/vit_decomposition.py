"""What each part of a vision transformer adds to the representation of an image, and its score for texts.

Exact first-order decomposition (models/decomposition.py): the components sum to the representation, and their
scores against unit texts, divided by the representation's norm, sum to the cosine. Interpreting CLIP's Image
Representation via Text-Based Decomposition (arXiv 2310.05916) and its extension beyond CLIP (2406.01583).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError, StudioError
from studio.images import image_files, labels, read_images
from studio.methods.component_params import SpaceParams
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

MOST_VALUES = 2**28  # of one array
MOST_BACKWARDS = 256
WRONG_SUM = {"float32": 1e-4}  # relative error of the sum above which nothing is reported; else 0.1
HEAD = re.compile(r"block\.\d+\.head\.\d+")


@dataclass(frozen=True)
class Inputs:
    """The images, and the texts that their parts are scored against."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )
    texts: tuple[str, ...] | None = knob(None, "texts to score components against", commas=False, lines=True)


@dataclass(frozen=True, kw_only=True)
class Params(SpaceParams):
    """In whose space, and how fine."""

    granularity: str = knob(
        "head",
        "how fine: layer, head, or head and also every key token's score",
        choices=("layer", "head", "token"),
    )
    heads: tuple[str, ...] | None = knob(
        None, "heads whose key tokens are scored, such as block.3.head.1; default all", advanced=True
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses images that are not there, and options that do not go together."""
    image_files(inputs.images)
    if not all(t.strip() for t in inputs.texts or ()):
        raise RequestError("--texts: one of the texts is empty; write something in it, or leave it out.")
    if params.aligner and not Path(params.aligner).expanduser().is_file():
        raise RequestError(f"--aligner: there is no file {params.aligner[:120]!r}.")
    if params.aligner and not params.clip:
        raise RequestError("--aligner maps into the space of a CLIP; say which with --clip.")
    if params.heads and params.granularity != "token":
        raise RequestError("--heads says whose key tokens are scored; take --granularity token with it.")
    for head in params.heads or ():
        if not HEAD.fullmatch(head):
            raise RequestError(f"--heads: {head[:40]!r} is no head; write block.LAYER.head.HEAD.")


def draw(run: Run) -> Figure:
    """Rows blocks, columns heads, bias and MLP: the mean score for the first text over the images; without
    texts the component's mean share of the representation."""
    arrays = run.result.arrays
    if "scores" in arrays:
        text = arrays["scores"].axis("text").labels[0]
        found = arrays["scores"].at("text", text).over("image")
        said, unit = f"for “{text}”", "score (sums to the cosine)"
    else:
        z, parts = (arrays[n].values.astype(float) for n in ("representation", "contributions"))
        share = np.einsum("icd,id->ic", parts, z) / np.square(z).sum(1)[:, None]
        trace = Trace(share, arrays["contributions"].axes[:2])
        found, said, unit = trace.over("image"), "without texts", "share of the representation"
    rows, cols, values = layer_table(found.axis("component").labels, found.values)
    data = {"rows": rows, "cols": cols, "values": values, "unit": unit, "row_title": "", "col_title": ""}
    count = len(arrays["representation"].axis("image").labels)
    title = f"{run.recipe.model}: components {said}, {count} image{'s' if count > 1 else ''}"
    error = run.result.values["sum_error"]
    caption = f"{run.result.values['way']}; the parts sum to the whole with a relative error of {error:.1e}"
    return Figure("heat", data, title=title, caption=caption)


def layer_table(names: Sequence[str], values: np.ndarray) -> tuple[list[str], list[str], np.ndarray]:
    """(rows, columns, values) of components: a row a block, the others in rows of their own under `all`."""
    rows: dict[str, None] = {}
    cols: dict[str, None] = {}
    cells = []
    for name, value in zip(names, values, strict=True):
        found = re.fullmatch(r"(block\.\d+)\.(.+)", name)
        row, col = found.groups() if found else (name, "all")
        rows[row] = cols[col] = None
        cells.append((row, col, value))
    order = sorted(cols, key=lambda c: (c == "all", c == "mlp", c == "bias", _number(c)))
    table = np.full((len(rows), len(order)), np.nan)
    for row, col, value in cells:
        table[list(rows).index(row), order.index(col)] = value
    return list(rows), order, table


def _number(name: str) -> int:
    return int(name.rsplit(".", 1)[-1]) if name.rsplit(".", 1)[-1].isdecimal() else -1


@method(
    "decompose",
    title="Decompose",
    paper="arXiv:2406.01583",
    family="vision",
    summary="What each part of a vision transformer adds to an image's representation, scored against texts.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def decompose(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`representation` (image, dim), `contributions` (image, component, dim); with texts `scores` (image,
    component, text), with --granularity token also `token_scores` (image, token, text)."""
    work = _Decompose(model, inputs, params, scorer, report)
    while work.left:
        work.take(work.left[: report.rows])
    return work.result()


class _Decompose:
    """The images that are done."""

    def __init__(self, model: Any, inputs: Inputs, params: Params, scorer: Any, report: Report) -> None:
        from studio.models.decomposition import Decomposition

        self.model, self.params, self.report = model, params, report
        self.texts = tuple(dict.fromkeys(inputs.texts or ()))
        self.left, others = image_files(inputs.images)
        self.names = labels(self.left)
        if others:
            what = "file in the folders is no image" if others == 1 else "files in the folders are no images"
            report.warn(f"{others:,} {what}; left out.")
        self.whole = Decomposition(model.layout, model.device)
        self.aligner, self.directions = self._space(scorer)
        self._check_size()
        self.way = self._token_way()
        self.question = self._question() if self.way == "closed form" else None
        self.done: list[dict[str, np.ndarray]] = []
        self.labels: tuple[str, ...] = ()
        self.error, self.told = 0.0, 0
        report.plan(len(self.left), "decomposing")

    # ---- what was asked -----------------------------------------------------------------------------------

    def _space(self, scorer: Any) -> tuple[Any, Any]:
        """(aligner or None, unit texts (K, dim) as a tensor or None)."""
        import torch

        clip, aligner = scorer, None
        if self.params.aligner:
            from studio.models.aligner import fitting_aligner

            aligner = fitting_aligner(self.params.aligner, self.model, scorer, self.whole)
        elif scorer is not None and scorer.fingerprint != self.model.fingerprint:
            raise RequestError(
                f"{scorer.id} and {self.model.id} do not share a space; give the --aligner that "
                "`locus align` made for the two."
            )
        else:
            clip = self.model.clip
        if not self.texts:
            return aligner, None
        if clip is None:
            raise RequestError(
                f"{self.model.id} has no texts of its own; give --clip and the --aligner that `locus align` "
                "made for the two, or leave out --texts."
            )
        found = torch.from_numpy(clip.text_features(list(self.texts)))
        return aligner, found.to(self.model.device, torch.float32)

    def _check_size(self) -> None:
        """Refuses what would not fit an array."""
        count = len(self.whole.labels) + 2
        if self.params.granularity == "layer":
            heads = sum(a.heads for a in self.whole.layout.attentions)
            count -= heads - len(self.whole.layout.attentions)
        dim = self.whole.maps[-1].shape[-1] if self.aligner is None else self.aligner.width
        for what, size in (("contributions", dim), ("scores", len(self.texts))):
            if (total := len(self.left) * count * size) > MOST_VALUES:
                raise RequestError(
                    f"The {what} of {len(self.left):,} images would be {total:,} numbers; take fewer images"
                    f"{' or texts' if what == 'scores' else ''}, or --granularity layer."
                )

    def _token_way(self) -> str:
        """How key tokens are scored: "closed form" or "adjoint"; "" when they are not."""
        if self.params.granularity != "token":
            return ""
        if self.directions is None:
            raise RequestError("--granularity token scores key tokens against texts; give --texts.")
        known = {n for n in self.whole.labels if ".head." in n}
        if wrong := [h for h in self.params.heads or () if h not in known]:
            raise RequestError(f"{self.model.id} has no head {wrong[0]}.")
        if any(a.mixes for a in self.whole.layout.attentions):
            raise RequestError(
                f"{self.model.id} normalises the outputs of all heads together, so they can't be split by "
                "key token; take --granularity head."
            )
        if self.whole.streams_tokens():
            return "closed form"
        backwards = len(self.texts) * (len(self.params.heads or known) if self.aligner else 1)
        if backwards > MOST_BACKWARDS:
            raise RequestError(
                f"Key tokens of {self.model.id} need one backward a text"
                f"{' and head' if self.aligner else ''}, and {backwards:,} are asked for; at most "
                f"{MOST_BACKWARDS} are made: take fewer texts or name --heads."
            )
        return "adjoint"

    # ---- one batch ----------------------------------------------------------------------------------------

    def take(self, files: list[Path]) -> None:
        """Decomposes some images in one forward."""
        import torch

        pixels = self.model.pixels(read_images(files, self.report.warn))
        parts = self.whole.run(pixels, self.question)
        self._check_sum(parts)
        found = parts.components if self.aligner is None else self.aligner.components(parts)
        found = merged(found) if self.params.granularity == "layer" else found
        self.labels = tuple(found)
        stacked = torch.stack(list(found.values()), 1)
        z = parts.representation if self.aligner is None else stacked.sum(1)
        norm = z.norm(dim=1)
        if not bool((norm > 0).all()):
            raise StudioError(f"{self.model.id} gives a representation of zero; its weights are not usable.")
        kept = {"representation": z, "contributions": stacked}
        if self.directions is not None:
            kept["scores"] = stacked @ self.directions.T / norm[:, None, None]
        if self.way:
            tokens = parts.tokens if self.way == "closed form" else self._adjoint(pixels)
            kept["token_scores"] = tokens / norm[:, None, None]
        self.done.append({k: v.cpu().numpy() for k, v in kept.items()})
        self.grid = tuple(pixels.shape[-2:])
        self.left = self.left[len(files) :]
        self.report.step(len(files))
        if (count := len(self.names) - len(self.left)) >= 1.25 * self.told:  # each costs a copy of everything
            self.told = count
            self.report.partial(self.result())

    def _question(self) -> Any:
        from studio.models.decomposition import TokenQuestion

        heads = frozenset(self.params.heads) if self.params.heads else None
        if self.aligner is None:
            return TokenQuestion(self.whole.along(self.directions), heads)
        found = partial(self.aligner.head_directions, self.whole, texts=self.directions)
        return TokenQuestion(cache(found), heads)

    def _adjoint(self, pixels: Any) -> Any:
        """Scores of key tokens by backwards; with an aligner every head has directions of its own."""
        import torch

        from studio.models.decomposition_adjoint import adjoint_scores

        layout, heads = self.model.layout, self.params.heads
        asked = frozenset(heads) if heads else None
        questions = [(self.directions, asked)]
        if self.aligner is not None:
            names = heads or [n for n in self.whole.labels if ".head." in n]
            maps = {n: self.aligner.vector_matrix(self.whole, n) for n in names}
            questions = [(self.directions @ m.T, frozenset([n])) for n, m in maps.items()]
        total: Any = 0
        for directions, chosen in questions:
            found = adjoint_scores(layout, pixels, directions, chosen)
            self.places = found.grid
            added = [found.tokens, found.padding[:, None]] if len(found.grid) == 2 else [found.tokens]
            total = total + torch.cat(added, 1)
        return total

    def _check_sum(self, parts: Any) -> None:
        z = parts.representation.cpu().double()
        total = sum(c.cpu().double() for c in parts.components.values())
        error = float(((total - z).norm(dim=1) / z.norm(dim=1)).max())
        self.error = max(self.error, error)
        if not error <= WRONG_SUM.get(str(self.model.dtype).removeprefix("torch."), 0.1):
            raise StudioError(
                f"The components of {self.model.id} do not sum to its representation (relative error "
                f"{error:.1e}), so its layout is not one that Locus knows."
            )

    # ---- the result ---------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Everything that is done."""
        arrays = {k: np.concatenate([d[k] for d in self.done]) for k in self.done[0]}
        image = Axis("image", self.names[: len(arrays["representation"])])
        dim = Axis("dim", tuple(map(str, range(arrays["representation"].shape[1]))))
        component, text = Axis("component", self.labels), Axis("text", self.texts)
        axes = {"representation": (image, dim), "contributions": (image, component, dim)}
        axes |= {"scores": (image, component, text)}
        if self.way:
            axes["token_scores"] = (image, Axis("token", self._tokens(arrays)), text)
        units = {"scores": "cosine", "token_scores": "cosine"}
        traces = {k: Trace(v, axes[k], units.get(k, "")) for k, v in arrays.items()}
        values = {"way": "closed form", "sum_error": self.error, "granularity": self.params.granularity}
        if self.way:
            values["token_way"] = self.way
        space = "the model's own" if self.aligner is None else f"{self.params.clip}, through the aligner"
        return Result(traces, values | {"space": space})

    def _tokens(self, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
        """Names of tokens: class, registers, then patches by row and column, then padding of windows."""
        if self.way == "adjoint" and len(self.places) == 2:
            return (*_patches(*self.places), "padding")
        prefix = self.model.layout.prefix
        patches = arrays["token_scores"].shape[1] - len(prefix)
        rows = max(1, round((patches * self.grid[0] / self.grid[1]) ** 0.5))
        return (*prefix, *_patches(rows, patches // rows))


def _patches(rows: int, cols: int) -> tuple[str, ...]:
    return tuple(f"patch.{r}.{c}" for r in range(rows) for c in range(cols))


def merged(components: dict[str, Any]) -> dict[str, Any]:
    """Heads summed by layer: block.I.attention in their place."""
    found: dict[str, Any] = {}
    for label, value in components.items():
        name = re.sub(r"\.head\.\d+$", ".attention", label)
        found[name] = found[name] + value if name in found else value
    return found

"""Images in the order of what some components of a vision transformer add: for a text, or beside an image.

S: the chosen components, named or the first for a property that texts describe (methods/component_roles.py).
By a text t: sum over S of c_i . t / |z|, which over all components is the cosine of image and text. By a
reference image: the cosine of s - mean s with the same of the reference, s the sum over S of c_i in the
model's own space and the mean over the images, since what is the same in all images says nothing of one.
arXiv 2406.01583, sections on retrieval by text and by image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files, labels, read_image
from studio.measure import rank_agreement
from studio.methods.component_choice import Choice, first_components
from studio.methods.component_params import SpaceParams
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

SHOWN = 8  # images at either end that are kept and drawn
SIDE = 160  # their longest side in pixels
MOST_VALUES = 2**27  # float64 numbers that are held at once: 1 GiB
TOP = 3  # components for a property, as published
FLAT = 1e-6  # what varies less, beside the representation, is rounding


@dataclass(frozen=True)
class Inputs:
    """The images, and what orders them."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )
    text: str | None = knob(None, "the text that orders them; or give --like")
    like: str | None = knob(None, "file of the image that the others are compared with", paths=True)
    features: tuple[str, ...] | None = knob(
        None,
        "features that --feature is set against, as in rank-components; default, for atlas-clip alone: the "
        "five attributes of the Atlas world",
        commas=False,
        lines=True,
    )
    bank: tuple[str, ...] | None = knob(
        None,
        "texts whose mean is the centre of all texts, for --feature; default for atlas-clip alone",
        commas=False,
        lines=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SpaceParams):
    """Through which components, and in whose space."""

    components: tuple[str, ...] | None = knob(
        None, "components such as block.3.head.1, or block.3.attention for all heads of a block"
    )
    feature: str | None = knob(
        None, "take the first components for this property: its name among --features, or a text"
    )
    top: int | None = knob(None, f"how many, for --feature; default {TOP}", low=1, high=10_000)


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses files that are not there, two orders at once, and a choice of components that says too
    little."""
    image_files(inputs.images)
    if bool((inputs.text or "").strip()) == bool(inputs.like):
        raise RequestError(
            "What orders the images? Give a --text, or with --like an image to compare them with, one of "
            "the two."
        )
    if inputs.like and len(image_files((inputs.like,), "--like")[0]) > 1:
        raise RequestError(f"--like: {inputs.like[:120]} holds several images; name one.")
    if params.aligner and not Path(params.aligner).expanduser().is_file():
        raise RequestError(f"--aligner: there is no file {params.aligner[:120]!r}.")
    if not params.components and not params.feature:
        raise RequestError(
            "Through which components? Name --components, or give a --feature whose first components are "
            "taken."
        )
    choice(inputs, params).check()


def choice(inputs: Inputs, params: Params) -> Choice:
    """Which components were asked for."""
    top = params.top if params.top or not params.feature else TOP
    return Choice(params.components, top, params.feature, inputs.features, inputs.bank)


def named_components(model: str, known: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The components named, each once; block.3.attention stands for all its heads. RequestError for a name
    that is none."""
    found: dict[str, None] = {}
    for name in names:
        whole = re.fullmatch(r"(.+)\.attention", name)
        heads = [x for x in known if whole and re.fullmatch(rf"{re.escape(whole[1])}\.head\.\d+", x)]
        if name not in known and not heads:
            raise RequestError(
                f"--components: {name[:60]!r} is no component of {model}; it has {known[0]} to {known[-1]}, "
                "which `locus decompose` lists."
            )
        found |= dict.fromkeys([name] if name in known else heads)
    return tuple(found)


def text_scores(total: np.ndarray, lengths: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(N,) of summed contributions (N, dim), lengths |z| (N,) of the representations, a unit text (dim,)."""
    return total @ text / lengths


def likeness(total: np.ndarray, reference: np.ndarray, scale: float) -> np.ndarray:
    """(N,) cosines of what images add beyond their mean with what the reference adds beyond that mean: total
    (N, dim), reference (dim,), scale: the representation's length. An image that adds the mean has 0."""
    mean = total.mean(0)
    found, asked = total - mean, reference - mean
    lengths = np.linalg.norm(found, axis=1)
    if lengths.max() <= FLAT * scale:
        raise RequestError(
            "The chosen components add the same to all images, so they order none; choose others."
        )
    if np.linalg.norm(asked) <= FLAT * scale:
        raise RequestError(
            "The chosen components add to the image of --like what they add to the mean image, so it is like "
            "none; choose others."
        )
    flat = lengths <= FLAT * scale
    return np.where(flat, 0.0, found @ asked / (np.where(flat, 1.0, lengths) * np.linalg.norm(asked)))


def draw(run: Run) -> Figure:
    """A contact sheet: the reference if there is one, then the first and the last images with their
    scores."""
    values, images = run.result.values, run.result.images
    rows, pictures = [], []
    if values["by"] == "image":
        rows, pictures = [f"reference: {values['query']}"], [[images["reference"]]]
    for end in ("first", "last"):
        found = [images[f"{end}-{n + 1}"] for n in range(len(values[end]))]
        if found:
            scores = values[f"{end}_scores"]
            rows.append(f"{end} {len(found)}: {scores[0]:.3f} to {scores[-1]:.3f}")
            pictures.append(found)
    cols = [str(n + 1) for n in range(max(map(len, pictures)))]
    by = f"by “{values['query']}”" if values["by"] == "text" else f"by likeness to {values['query']}"
    title = f"{run.recipe.model}: {values['count']:,} images {by}"
    caption = f"{values['measure']}; through {', '.join(values['components'])}"
    return Figure("strip", {"images": pictures, "rows": rows, "cols": cols}, title=title, caption=caption)


@method(
    "retrieve-images",
    title="Find images",
    paper="arXiv:2406.01583",
    family="vision",
    summary="A folder's images in the order of what some components add for a text, or beside an image.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def retrieve_images(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`score` (image) through the chosen components, `whole` (image) the same through all of them."""
    return _Retrieve(model, inputs, params, scorer, report).result()


class _Retrieve:
    """One request: its components, and by image what is needed of them."""

    def __init__(self, model: Any, inputs: Inputs, params: Params, scorer: Any, report: Report) -> None:
        from studio.models.component_space import Space, open_space, unit_texts

        self.model, self.inputs, self.report = model, inputs, report
        asked = choice(inputs, params)
        if inputs.text or asked.feature or params.aligner or scorer is not None:
            self.space, clip = open_space(model, scorer, params.aligner)
        else:
            self.space, clip = Space(model), None
        self.files, _ = image_files(inputs.images)
        known = [x for x in self.space.whole.labels if not x.endswith("bias")]
        if asked.components:
            self.chosen, self.ranks = named_components(model.id, known, asked.components), ()
        else:
            self.chosen, self.ranks = self._first(clip, asked, known, params.aligner)
        self.text = None if inputs.like else unit_texts(clip, [inputs.text])[0]
        self.kept: list[Path] = []  # files that could be read
        self.total, self.z = [], []
        self.fault = ""
        self._check_size()

    def _first(self, clip: Any, asked: Choice, known: list[str], aligner: str | None) -> tuple:
        from studio.models.corpus import statistics

        found = statistics(self.space, self.files, self.report, aligner)
        return first_components(self.space, clip, found, asked, known)

    def _check_size(self) -> None:
        width = 2 * (1 if self.text is not None else self.space.whole.maps[-1].shape[-1])
        if (need := len(self.files) * width) > MOST_VALUES:
            raise RequestError(
                f"Comparing {len(self.files):,} images would hold {need:,} numbers, and at most "
                f"{MOST_VALUES:,} are; give fewer images, or order them by a --text."
            )

    # ---- images -------------------------------------------------------------------------------------------

    def _look(self, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(sums of the chosen components (N, dim), representations (N, dim)) in float64: in the texts' space
        for a text, else in the model's own."""
        parts = self.space.whole.run(self.model.pixels(images))
        if self.text is None or self.space.aligner is None:
            own, z = parts.components, parts.representation.double()
        else:
            own, z = self.space.aligner.components(parts), self.space.total(parts)
        return sum(own[c].double() for c in self.chosen).cpu().numpy(), z.cpu().numpy()

    def _stream(self) -> None:
        """All images, batch by batch; what can't be read is left out."""
        self.report.plan(len(self.files), "reading images")
        for start in range(0, len(self.files), self.report.rows):
            batch = self.files[start : start + self.report.rows]
            images = []
            for file in batch:
                try:
                    images.append(read_image(file)[0])
                    self.kept.append(file)
                except RequestError as error:
                    self.fault = self.fault or str(error)
            if images:
                self._add(*self._look(images))
            self.report.step(len(batch))

    def _add(self, total: np.ndarray, z: np.ndarray) -> None:
        """Of a text the two scores are enough, (N,); of a reference image the vectors are kept, (N, dim)."""
        if self.text is None:
            self.total.append(total)
            self.z.append(z)
            return
        lengths = np.maximum(np.linalg.norm(z, axis=1), 1e-30)
        self.total.append(text_scores(total, lengths, self.text))
        self.z.append(text_scores(z, lengths, self.text))

    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(through the chosen components, through all) of the images that could be read."""
        total, z = np.concatenate(self.total), np.concatenate(self.z)
        if self.text is not None:
            return total, z
        if len(total) < 2:
            raise RequestError(
                "An order beside an image needs at least two images that can be read; there is one."
            )
        (own,), (whole,) = self._look([read_image(Path(self.inputs.like).expanduser())[0]])
        scale = float(np.linalg.norm(z, axis=1).mean())
        return likeness(total, own, scale), likeness(z, whole, scale)

    # ---- the result ---------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Both orders, and the pictures at the ends of the first."""
        self._stream()
        if not self.kept:
            raise RequestError(f"None of the {len(self.files)} images can be read. {self.fault}")
        left = len(self.files) - len(self.kept)
        if left and not self.ranks:  # the ranking has said so already
            self.report.warn(f"{left} of {len(self.files)} files are left out. {self.fault}")
        score, whole = self._scores()
        names = labels(self.kept)
        order = np.argsort(-score, kind="stable")
        ends = {"first": order[:SHOWN], "last": order[SHOWN:][-SHOWN:]}
        image = Axis("image", names)
        unit = "cosine" if self.text is None else "part of the cosine"
        arrays = {
            "score": Trace(score.astype(np.float32), (image,), unit),
            "whole": Trace(whole.astype(np.float32), (image,), "cosine"),
        }
        values = self._values(names, score, whole, order) | {e: [names[i] for i in ends[e]] for e in ends}
        values |= {f"{e}_scores": [float(score[i]) for i in ends[e]] for e in ends}
        return Result(arrays, values, self._pictures(ends))

    def _values(
        self, names: Sequence[str], score: np.ndarray, whole: np.ndarray, order: np.ndarray
    ) -> dict[str, Any]:
        by = "text" if self.text is not None else "image"
        query = self.inputs.text if by == "text" else Path(self.inputs.like).name
        agreement = rank_agreement(score, whole)
        measure = {
            "text": "score of the chosen components for the text",
            "image": "cosine of what the chosen components add beyond their mean over the images",
        }[by]
        return {
            "by": by,
            "query": query,
            "count": len(names),
            "components": list(self.chosen),
            "ranks": list(self.ranks),
            "measure": measure,
            "agreement": agreement,
            "finding": f"First of {len(names):,} images: {names[order[0]]} ({score[order[0]]:.3f})"
            + ("." if np.isnan(agreement) else f"; rank correlation with the whole model {agreement:.2f}."),
        }

    def _pictures(self, ends: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{first-1, …, last-1, …, reference: pixels (H, W, 3) uint8 of at most SIDE on a side}."""
        chosen = {f"{e}-{n + 1}": self.kept[i] for e, found in ends.items() for n, i in enumerate(found)}
        if self.inputs.like:
            chosen["reference"] = Path(self.inputs.like).expanduser()
        return {name: small(read_image(file)[0]) for name, file in chosen.items()}


def small(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 that is at most SIDE on a side."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)

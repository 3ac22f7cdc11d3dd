"""What a vision transformer answers without some of its components: each gives its mean over other images.

The direct effect needs no forward: z' = z - sum_i (c_i - mean c_i), the final norm kept as it was. The true
ablation runs on: all that comes after reads the mean. Zero-shot answers, argmax over classes of the cosine,
before and after; with a table of groups the accuracy of each, and of the worst. arXiv 2406.01583, section on
spurious correlations, and 2310.05916.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files, labels, read_image, read_images
from studio.methods.component_choice import Choice, first_components
from studio.methods.component_params import SpaceParams
from studio.methods.component_roles import read_features
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

SHOWN = 40  # images in the figure
STATES = {"before": "whole model", "direct": "direct effect", "true": "true ablation"}


@dataclass(frozen=True)
class Inputs:
    """The images, the classes, and where means come from."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )
    texts: tuple[str, ...] = knob(
        REQUIRED, "classes, each as NAME: TEXT | TEXT | …, or one text alone", commas=False, lines=True
    )
    groups: str | None = knob(
        None,
        "CSV of `file,label,group`: files as seen from its folder, labels as the classes are named",
        paths=True,
    )
    reference: tuple[str, ...] | None = knob(
        None,
        "images, or folders of them, whose means take the components' places; default the images themselves",
        commas=False,
        lines=False,
        paths=True,
    )
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
    """What is taken away, and in whose space."""

    components: tuple[str, ...] | None = knob(
        None, "heads, all heads of a block, or branches: block.3.head.1 block.3.attention block.3.mlp"
    )
    feature: str | None = knob(
        None, "take the first components for this feature: its name among --features, or a text"
    )
    top: int | None = knob(None, "how many, for --feature; default 10", low=1, high=10_000)
    downstream: bool = knob(True, "also the true ablation, with all that comes after (one more forward)")


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses files that are not there, too few classes, and a choice of components that says too little."""
    files, _ = image_files(inputs.images)
    if inputs.reference:
        image_files(inputs.reference, "--reference")
    if params.aligner and not Path(params.aligner).expanduser().is_file():
        raise RequestError(f"--aligner: there is no file {params.aligner[:120]!r}.")
    classes = read_features(inputs.texts, "--texts")
    if len(classes) < 2:
        raise RequestError("--texts: one class alone is always the answer; give at least two.")
    if inputs.groups:
        read_groups(Path(inputs.groups).expanduser(), files, tuple(classes))
    if not params.components and not params.feature:
        raise RequestError(
            "What is taken away? Name --components, or give a --feature whose first components are."
        )
    choice(inputs, params).check()


def choice(inputs: Inputs, params: Params) -> Choice:
    """Which components were asked for."""
    top = params.top if params.top or not params.feature else 10
    return Choice(params.components, top, params.feature, inputs.features, inputs.bank)


def read_groups(table: Path, files: Sequence[Path], classes: Sequence[str]) -> list[tuple[int, str] | None]:
    """By file, (its class's place, its group), or None for files that the table does not name."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"--groups: {str(table)[:120]} can't be read as a CSV file in UTF-8.") from error
    if not rows or not {"file", "label", "group"} <= set(rows[0]):
        raise RequestError(
            f"--groups: {table.name} must have the columns file, label and group, and a row an image."
        )
    named: dict[Path, tuple[int, str]] = {}
    for i, row in enumerate(rows):
        if None in (row["file"], row["label"], row["group"]):
            raise RequestError(f"--groups: line {i + 2} of {table.name} is cut short; it needs three cells.")
        if row["label"] not in classes:
            raise RequestError(
                f"--groups: line {i + 2} has the label {row['label'][:40]!r}, and the classes are "
                f"{', '.join(classes)[:120]}; write a class as {row['label'][:40] or 'NAME'}: TEXT."
            )
        named[(table.parent / row["file"]).resolve()] = (classes.index(row["label"]), row["group"])
    found = [named.get(file.resolve()) for file in files]
    if not any(found):
        raise RequestError(
            f"--groups: {table.name} names none of the images; files are as seen from {table.parent}."
        )
    return found


def group_accuracy(
    right: np.ndarray, members: Sequence[tuple[int, str] | None]
) -> dict[str, tuple[float, int]]:
    """{group: (share of its images that are right, how many)} in order of name; right (image,) bool."""
    names = sorted({m[1] for m in members if m})
    inside = {name: np.array([m is not None and m[1] == name for m in members]) for name in names}
    return {name: (float(right[mask].mean()), int(mask.sum())) for name, mask in inside.items()}


def draw(run: Run) -> Figure:
    """With groups a row a state: average, worst and every group; else a row an image: its answers."""
    arrays, values = run.result.arrays, run.result.values
    states = arrays["scores"].axis("state").labels
    title = f"{run.recipe.model} without {len(values['components'])} components"
    caption = f"means of {values['means']}; {', '.join(values['components'])}"
    if "accuracy" in arrays:
        found = arrays["accuracy"]
        rows = [
            [STATES[s], *(f"{v:.3f}" for v in (values["average"][s], values["worst"][s], *row))]
            for s, row in zip(states, found.values, strict=True)
        ]
        columns = ["", "average", "worst group", *found.axis("group").labels]
    else:
        classes = arrays["scores"].axis("text").labels
        answers = arrays["scores"].values.argmax(-1)
        names = arrays["scores"].axis("image").labels
        rows = [[n, *(classes[a] for a in answers[:, i])] for i, n in enumerate(names[:SHOWN])]
        columns = ["image", *(STATES[s] for s in states)]
    return Figure("table", {"columns": columns, "rows": rows}, title=title, caption=caption)


@method(
    "ablate-components",
    title="Ablate components",
    paper="arXiv:2406.01583",
    family="vision",
    summary="What a vision transformer answers without some components, directly and with all that follows.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def ablate_components(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`scores` (state, image, text): cosines before, by the direct effect and, unless --no-downstream, by the
    true ablation; with groups `accuracy` (state, group) and `group_size` (group)."""
    work = _Ablate(model, inputs, params, scorer, report)
    while work.left:
        work.take(work.left[: report.rows])
    return work.result()


class _Ablate:
    """The images that are done."""

    def __init__(self, model: Any, inputs: Inputs, params: Params, scorer: Any, report: Report) -> None:
        import torch

        from studio.models.ablation import branches, named_branches
        from studio.models.component_space import open_space, unit_texts
        from studio.models.corpus import statistics

        self.model, self.report = model, report
        self.space, clip = open_space(model, scorer, params.aligner)
        classes = read_features(inputs.texts, "--texts")
        self.classes = tuple(classes)
        texts = np.stack(
            [_unit(unit_texts(clip, [t for g in c for t in g]).mean(0)) for c in classes.values()]
        )
        self.texts = torch.from_numpy(texts)
        self.left, _ = image_files(inputs.images)
        self.names, self.members = labels(self.left), None
        if inputs.groups:
            self.members = self._members(
                read_groups(Path(inputs.groups).expanduser(), self.left, self.classes)
            )
        asked = choice(inputs, params)
        if asked.components:
            self.chosen = named_branches(model.id, model.layout, asked.components)
        reference = self._reference(inputs)
        found = statistics(self.space, reference, report, params.aligner)
        if not asked.components:
            self.chosen, self.ranks = first_components(
                self.space, clip, found, asked, tuple(branches(model.layout))
            )
        self.vectors = {c: torch.from_numpy(found.mean(self.space, c)) for c in self.chosen}
        self.outputs = output_means(model, reference, self.chosen, report) if params.downstream else None
        self.done: list[np.ndarray] = []
        report.plan(len(self.left), "ablating")

    def _members(self, found: list[tuple[int, str] | None]) -> list[tuple[int, str] | None]:
        if without := sum(m is None for m in found):
            self.report.warn(f"{without} of {len(found)} images have no row in --groups; they count in none.")
        return found

    def _reference(self, inputs: Inputs) -> list[Path]:
        """The images whose means are taken, said aloud when they are those that are evaluated."""
        if inputs.reference:
            files, _ = image_files(inputs.reference, "--reference")
            self.source = f"{len(files):,} reference images"
            if shared := len({f.resolve() for f in files} & {f.resolve() for f in self.left}):
                self.report.warn(f"{shared} of the evaluated images are among the --reference images.")
            return files
        self.source = "the evaluated images themselves"
        self.report.warn(
            "The means are those of the evaluated images themselves; give --reference a folder of others."
        )
        return self.left

    def take(self, files: list[Path]) -> None:
        """Answers for some images."""
        from studio.models.ablation import ablated

        pixels = self.model.pixels(read_images(files, self.report.warn))
        parts = self.space.whole.run(pixels)
        z = self.space.total(parts).double().cpu()
        states = [z, self._without(parts, z)]
        if self.outputs is not None:
            with ablated(self.model.layout, self.outputs):
                states.append(self.space.total(self.space.whole.run(pixels)).double().cpu())
        cosines = [(s / s.norm(dim=1, keepdim=True)) @ self.texts.T for s in states]
        self.done.append(np.stack([c.numpy() for c in cosines]))
        self.left = self.left[len(files) :]
        self.report.step(len(files))

    def _without(self, parts: Any, z: Any) -> Any:
        """z - sum of (c_i - mean c_i), float64."""
        own = parts.components if self.space.aligner is None else self.space.aligner.components(parts)
        return z - sum(own[c].double().cpu() - self.vectors[c] for c in self.chosen)

    def result(self) -> Result:
        """Everything."""
        scores = np.concatenate(self.done, 1)
        state = Axis("state", tuple(STATES)[: len(scores)])
        axes = (state, Axis("image", self.names), Axis("text", self.classes))
        arrays = {"scores": Trace(scores.astype(np.float32), axes, "cosine")}
        answers = scores.argmax(-1)
        changed = {
            s: int((a != answers[0]).sum()) for s, a in zip(state.labels[1:], answers[1:], strict=True)
        }
        values: dict[str, Any] = {"components": list(self.chosen), "means": self.source, "changed": changed}
        if hasattr(self, "ranks"):
            values["ranks"] = list(self.ranks)
        if self.members is not None:
            more, said = grouped(answers, self.members, state)
            arrays, values = arrays | more, values | said
        return Result(arrays, values)


def grouped(
    answers: np.ndarray, members: Sequence[tuple[int, str] | None], state: Axis
) -> tuple[dict[str, Trace], Mapping[str, Any]]:
    """`accuracy` and `group_size`; average over images and worst group by state. answers (state, image)."""
    truth = np.array([m[0] if m else -1 for m in members])
    tables = [group_accuracy(a == truth, members) for a in answers]
    group = Axis("group", tuple(tables[0]))
    shares = np.array([[t[g][0] for g in group.labels] for t in tables], np.float32)
    sizes = np.array([tables[0][g][1] for g in group.labels], np.float32)
    arrays = {
        "accuracy": Trace(shares, (state, group), "share of images"),
        "group_size": Trace(sizes, (group,), "images"),
    }
    inside = truth >= 0
    average = [float((a == truth)[inside].mean()) for a in answers]
    worst = [float(row.min()) for row in shares]
    names = state.labels
    return arrays, {
        "average": dict(zip(names, average, strict=True)),
        "worst": dict(zip(names, worst, strict=True)),
        "worst_group": {n: group.labels[int(r.argmin())] for n, r in zip(names, shares, strict=True)},
    }


def output_means(model: Any, files: Sequence[Path], chosen: Sequence[str], report: Report) -> dict[str, Any]:
    """Mean outputs of branches over files, at every place; those that are no images are left out."""
    import torch

    from studio.models.ablation import OutputMeans

    means = OutputMeans(model.layout, chosen)
    report.plan(len(files), "means of outputs")
    for start in range(0, len(files), report.rows):
        batch, images = files[start : start + report.rows], []
        for file in batch:
            try:
                images.append(read_image(file)[0])
            except RequestError:
                continue
        if images:
            with torch.no_grad(), means.counting(len(images)):
                model.representation(model.pixels(images))
        report.step(len(batch))
    return means.means()


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)

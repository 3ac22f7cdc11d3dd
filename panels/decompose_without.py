"""What the images' answers would be without some components, and which images these order first.

Direct effect of mean-ablation, no forward: z' = z - sum over the chosen of (c - mean of c over the run's
images); what later layers would do about it is not in it. arXiv 2310.05916, 2406.01583.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from studio.errors import RequestError
from studio.types import Result

NEEDED = ("file", "label", "group")
COLUMNS = ["image", "answer", "cosine", "without them", "cosine then", ""]
GROUP_COLUMNS = ["group", "images", "accuracy", "accuracy without them"]
MOST_ROWS = 500  # of answers


def chosen_places(result: Result, chosen: Sequence[str]) -> list[int]:
    """Places of the chosen components; RequestError for none, or a name that the run does not know."""
    if "contributions" not in result.arrays:
        raise RequestError("This view keeps no contributions of images; run Decompose first.")
    labels = result.arrays["contributions"].axis("component").labels
    if not chosen:
        raise RequestError("No components are chosen; click some in the map.")
    if wrong := [c for c in chosen if c not in labels]:
        raise RequestError(f"{str(wrong[0])[:60]!r} is no component of this run; remove it from the chosen.")
    return [labels.index(c) for c in dict.fromkeys(chosen)]


def without(result: Result, chosen: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (image, text) before and after: mean-ablation of the chosen components as direct effect."""
    places = chosen_places(result, chosen)
    if "scores" not in result.arrays:
        raise RequestError("Answers need texts; give some, one a line, and press Run.")
    z, parts, scores = (
        result.arrays[n].values.astype(float) for n in ("representation", "contributions", "scores")
    )
    taken = parts[:, places]
    z_after = z - (taken - taken.mean(0)).sum(1)
    raw = scores[:, places] * np.linalg.norm(z, axis=1)[:, None, None]
    before = scores.sum(1)
    dots = before * np.linalg.norm(z, axis=1)[:, None] - (raw - raw.mean(0)).sum(1)
    return before, dots / np.maximum(np.linalg.norm(z_after, axis=1), 1e-30)[:, None]


def answer_rows(result: Result, before: np.ndarray, after: np.ndarray) -> list[list[str]]:
    """A row an image as in COLUMNS; the changed ones first."""
    images, texts = (result.arrays["scores"].axis(n).labels for n in ("image", "text"))
    rows = []
    for i, image in enumerate(images):
        a, b = int(before[i].argmax()), int(after[i].argmax())
        changed = "changed" if a != b else ""
        rows.append([image, texts[a], f"{before[i, a]:.3f}", texts[b], f"{after[i, b]:.3f}", changed])
    return sorted(rows, key=lambda row: row[-1] == "")


def told(chosen: Sequence[str], before: np.ndarray, after: np.ndarray) -> str:
    """The change in a sentence."""
    count = int((before.argmax(1) != after.argmax(1)).sum())
    n = len(before)
    said = (
        f"Without {len(set(chosen))} component{'s' * (len(set(chosen)) != 1)} {count} of {n} answers change"
    )
    said += " (direct effect; means over this run's images)."
    return said + (" Of one image the mean is the image itself: take several." if n == 1 else "")


@dataclass(frozen=True)
class Compared:
    """Tables (columns, rows) of what some models' answers and groups are without components; `groups` is None
    without a CSV, or with one that does not fit, as `said` tells."""

    answers: tuple[list[str], list[list[str]]]
    groups: tuple[list[str], list[list[str]]] | None
    said: str


def compared(models: Mapping[str, Result], chosen: Sequence[str], file: Path | None) -> Compared:
    """The same components taken from each model that has them, the first of which must have all; a row a
    model and image, and a row a model and group of the CSV."""
    several, said, taken = len(models) > 1, [], {}
    for name, result in models.items():
        known = result.arrays["contributions"].axis("component").labels if taken else chosen
        own = [c for c in chosen if c in known]
        if chosen and not own:
            said.append(f"{name} has none of these components.")
            continue
        taken[name] = without(result, own)
        lacks = (
            f" It has no {', '.join(c for c in chosen if c not in own)[:120]}." if own != [*chosen] else ""
        )
        said.append((f"{name}: " if several else "") + told(own, *taken[name]) + lacks)
    lines = [(n, row) for n, t in taken.items() for row in answer_rows(models[n], *t)]
    changed = {row[0] for _, row in lines if row[-1]}
    place = {image: i for i, image in enumerate(dict.fromkeys(row[0] for _, row in lines))}
    lines.sort(key=lambda line: (line[1][0] not in changed, place[line[1][0]]))
    answers = [[n, *row] if several else row for n, row in lines[:MOST_ROWS]]
    groups = None
    if file is not None:
        try:
            rows, about = _group_table(models, taken, file, several)
            groups = (["model"] * several + GROUP_COLUMNS, rows)
        except RequestError as error:
            about = str(error)
        said.append(about)
    return Compared((["model"] * several + COLUMNS, answers), groups, " ".join(said))


def _group_table(
    models: Mapping[str, Result], taken: Mapping[str, tuple], file: Path, several: bool
) -> tuple[list[list[str]], str]:
    """Rows and sentence of `group_rows` for each model."""
    groups, rows, said = read_groups(file), [], []
    for name, (before, after) in taken.items():
        own, about = group_rows(models[name], groups, before, after)
        rows += [[name, *row] if several else row for row in own]
        said.append((f"{name}: " if several else "") + about)
    return rows, " ".join(said)


def order(
    result: Result, chosen: Sequence[str], text: str | None, reference: str | None
) -> list[tuple[str, float]]:
    """(image, score) from high to low through the chosen components: their score for a text, or, with a
    reference image, the cosine of what they add beyond their mean with what they add to the reference."""
    places = chosen_places(result, chosen)
    images = result.arrays["contributions"].axis("image").labels
    if reference is None:
        if "scores" not in result.arrays:
            raise RequestError("An order by text needs texts; give some, one a line, and press Run.")
        texts = result.arrays["scores"].axis("text").labels
        if text not in texts:
            raise RequestError(f"{str(text)[:60]!r} is none of the texts of this run; press Run.")
        values = result.arrays["scores"].values[:, places, texts.index(text)].astype(float).sum(1)
    else:
        values = _likeness(result.arrays["contributions"].values[:, places].astype(float), images, reference)
    found = np.argsort(-values, kind="stable")
    return [(images[i], float(values[i])) for i in found]


def _likeness(parts: np.ndarray, images: tuple[str, ...], reference: str) -> np.ndarray:
    if reference not in images:
        raise RequestError("Choose the reference among this run's images: click one in the gallery.")
    if len(images) < 2:
        raise RequestError("An order needs several images; add some and press Run.")
    added = parts.sum(1)
    added = added - added.mean(0)
    length = np.linalg.norm(added, axis=1)
    if not length[images.index(reference)] > 0:
        raise RequestError("The chosen components add the same to all images, so they order none.")
    return (added @ added[images.index(reference)]) / np.maximum(
        length * length[images.index(reference)], 1e-30
    )


def read_groups(file: Path) -> dict[str, tuple[str, str]]:
    """{file name of an image: (label, group)} of a CSV with the columns file, label, group; RequestError when
    it is none, or two of its rows are for one file name: the page knows images by their file names alone."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file.name[:60]} can't be read as a CSV in UTF-8.") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not set(NEEDED) <= set(rows.fieldnames or ()):
        raise RequestError(f"{file.name[:60]} must have the columns {', '.join(NEEDED)} in its first line.")
    try:
        lines = [[row[n] or "" for n in NEEDED] for row in rows]
    except csv.Error as error:
        raise RequestError(f"{file.name[:60]} is no CSV ({error}).") from error
    found: dict[str, tuple[str, tuple[str, str]]] = {}
    for path, label, group in lines:
        name = PurePosixPath(path.replace("\\", "/")).name
        if name and found.setdefault(name, (path, (label, group))) != (path, (label, group)):
            raise RequestError(
                f"{file.name[:60]} has two rows for images named {name[:60]!r} ({found[name][0][-80:]} and "
                f"{path[-80:]}), and images have no folders here; give each file a name of its own."
            )
    return {name: row for name, (_, row) in found.items()}


def group_rows(
    result: Result, groups: Mapping[str, tuple[str, str]], before: np.ndarray, after: np.ndarray
) -> tuple[list[list[str]], str]:
    """(a row a group: name, images, accuracy before and after, worst first; the sentence about them)."""
    images, texts = (result.arrays["scores"].axis(n).labels for n in ("image", "text"))
    known = [(i, *groups[name]) for i, name in enumerate(images) if name in groups]
    if not known:
        raise RequestError(
            f"None of the images is in the CSV; its column file must name them, as {images[0]!r}."
        )
    truth = {label: _text_of(label, texts) for label in {label for _, label, _ in known}}
    hits: dict[str, list[tuple[bool, bool]]] = {}
    for i, label, group in known:
        right = (before[i].argmax() == truth[label], after[i].argmax() == truth[label])
        hits.setdefault(group, []).append(right)
    means = {g: np.mean(h, axis=0) for g, h in hits.items()}
    ordered = sorted(means, key=lambda g: float(means[g][0]))
    rows = [[g, str(len(hits[g])), f"{means[g][0]:.3f}", f"{means[g][1]:.3f}"] for g in ordered]
    whole = np.mean([h for all_ in hits.values() for h in all_], axis=0)
    worst = [min(float(m[k]) for m in means.values()) for k in (0, 1)]
    said = (
        f"Worst group {worst[0]:.3f} → {worst[1]:.3f}, average {whole[0]:.3f} → {whole[1]:.3f} "
        f"over {len(known)} image{'s' * (len(known) != 1)}."
    )
    if lost := [name for name in images if name not in groups]:
        are = "is" if len(lost) == 1 else "are"
        said += f" {len(lost)} of {len(images)} images {are} in no row of the CSV (as {lost[0][:60]!r})."
    return rows, said


def _text_of(label: str, texts: Sequence[str]) -> int:
    """The one text that is a label, or holds it as a word."""
    if label in texts:
        return list(texts).index(label)
    found = [i for i, t in enumerate(texts) if f" {label.lower()} " in f" {t.lower()} "]
    if len(found) != 1:
        raise RequestError(
            f"The label {label[:40]!r} must stand in one of the texts, and stands in {len(found)}; give "
            "one text for each label."
        )
    return found[0]

"""Statistics of a model's components over many images: streamed, in flat memory, resumed, kept on disk.

For each component's numbers x (models/component_space.py) and the representation z: the mean of x, its
covariance, and its covariance with z. These are enough for text spans, roles and mean ablation. Sums are
float64 of values shifted by the first batch's mean, so that nothing is lost to cancellation.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from studio.errors import RequestError
from studio.file_quota import keep_within, mark_used
from studio.images import read_image
from studio.models.component_space import Space
from studio.models.decomposition import Parts
from studio.models.loading import home
from studio.store import write_tensors
from studio.types import Report

KEEP_EVERY = 20.0  # seconds between two writes
MOST_NUMBERS = 2**28  # float64 of one corpus: 2 GiB
MOST_BYTES = 4 * 2**30  # of all that is kept in $LOCUS_HOME/corpora
TOTAL = "total"  # where the representation's own sums are kept
_FORM = 1  # of the file


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of `count` images, all float64 and divided by the count, not by one less.

    By label: means (r,), covariances (r, r), crosses (r, width) with the representation, whose own mean is
    (width,) and covariance (width, width). skipped: files that could not be read.
    """

    count: int
    means: Mapping[str, np.ndarray]
    covariances: Mapping[str, np.ndarray]
    crosses: Mapping[str, np.ndarray]
    total_mean: np.ndarray
    total_covariance: np.ndarray
    skipped: int = 0

    def mean(self, space: Space, label: str) -> np.ndarray:
        """A component's mean vector (width,): what mean ablation puts in its place."""
        return self.means[label] @ space.matrix(label)


def corpus_file(space: Space, files: Sequence[Path], aligner: str | Path | None) -> Path:
    """Where the statistics are kept: named by the weights, the aligner, the number type, and the files'
    names, sizes and times."""
    listing = []
    for file in files:
        try:
            seen = file.stat()
        except OSError as error:
            raise RequestError(f"{file} can't be read ({error.strerror}).") from error
        listing.append([str(file.absolute()), seen.st_size, seen.st_mtime_ns])
    read = hashlib.sha256(Path(aligner).expanduser().read_bytes()).hexdigest() if aligner else ""
    named = [_FORM, space.model.fingerprint, read, str(space.model.dtype), listing]
    return home() / "corpora" / f"{hashlib.sha256(json.dumps(named).encode()).hexdigest()}.safetensors"


def statistics(
    space: Space, files: Sequence[Path], report: Report, aligner: str | Path | None = None
) -> Statistics:
    """Statistics of image files, from disk if they are kept there. What is done is kept when the work is
    stopped, and the corpora that were not used for longest make room. Files that can't be read are left out
    with a warning; RequestError when fewer than two can."""
    place = corpus_file(space, files, aligner)
    sums = Sums.read(place) or Sums()
    report.plan(len(files), "reading images")
    if sums.done:
        mark_used(place)
        report.step(sums.done)
    if sums.done < len(files):
        _stream(space, files, report, sums, place)
    if sums.skipped:
        report.warn(f"{sums.skipped} of {len(files)} files could not be read as images and are left out.")
    if sums.count < 2:
        raise RequestError(
            f"Statistics need at least two images that can be read; there {'is' if sums.count else 'are'} "
            f"{sums.count or 'none'}."
        )
    return sums.statistics()


def _stream(space: Space, files: Sequence[Path], report: Report, sums: Sums, place: Path) -> None:
    kept = time.monotonic()
    try:
        while sums.done < len(files):
            batch = files[sums.done : sums.done + report.rows]
            images = list(readable(batch))
            if images:
                sums.add(space, space.whole.run(space.model.pixels(images)))
            sums.done, sums.skipped = sums.done + len(batch), sums.skipped + len(batch) - len(images)
            if time.monotonic() - kept > KEEP_EVERY:
                sums.write(place)
                kept = time.monotonic()
            report.step(len(batch))
    finally:
        if sums.count:
            sums.write(place)
            keep_within(place.parent, MOST_BYTES, place)


def readable(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """The images (H, W, 3) uint8 of files that are some."""
    for file in files:
        try:
            yield read_image(file)[0]
        except RequestError:
            continue


class Sums:
    """Running sums of everything: by label the shift, the sum, the sum of squares and that of products with
    the total, all of shifted values."""

    def __init__(self) -> None:
        self.done = self.skipped = self.count = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, space: Space, parts: Parts) -> None:
        """One batch, taken apart."""
        found = {**space.inputs(parts), TOTAL: space.total(parts)}  # (N, r) by label
        values = {label: x.detach().double().cpu() for label, x in found.items()}
        if not self.count:
            self._start(values)
        total = values[TOTAL] - self.tensors[f"shift/{TOTAL}"]
        for label, x in values.items():
            x = x - self.tensors[f"shift/{label}"]
            self.tensors[f"sum/{label}"] += x.sum(0)
            self.tensors[f"square/{label}"].addmm_(x.T, x)
            if label != TOTAL:
                self.tensors[f"cross/{label}"].addmm_(x.T, total)
        self.count += len(total)

    def _start(self, values: Mapping[str, torch.Tensor]) -> None:
        width = values[TOTAL].shape[1]
        need = sum(x.shape[1] * (x.shape[1] + width) for x in values.values())
        if need > MOST_NUMBERS:
            raise RequestError(
                f"Statistics of this model would be {need:,} numbers, and at most {MOST_NUMBERS:,} are kept; "
                "take a smaller model."
            )
        for label, x in values.items():
            size = x.shape[1]
            self.tensors[f"shift/{label}"] = x.mean(0)
            self.tensors[f"sum/{label}"] = x.new_zeros(size)
            self.tensors[f"square/{label}"] = x.new_zeros(size, size)
            if label != TOTAL:
                self.tensors[f"cross/{label}"] = x.new_zeros(size, width)

    def statistics(self) -> Statistics:
        """Means and covariances of what was added."""
        labels = [n.removeprefix("sum/") for n in self.tensors if n.startswith("sum/")]
        n = self.count
        off = {label: self.tensors[f"sum/{label}"] / n for label in labels}  # mean minus shift
        means = {label: off[label] + self.tensors[f"shift/{label}"] for label in labels}
        spreads = {x: self.tensors[f"square/{x}"] / n - torch.outer(off[x], off[x]) for x in labels}
        own = [label for label in labels if label != TOTAL]
        crosses = {x: self.tensors[f"cross/{x}"] / n - torch.outer(off[x], off[TOTAL]) for x in own}
        return Statistics(
            n,
            {x: means[x].numpy() for x in own},
            {x: spreads[x].numpy() for x in own},
            {x: crosses[x].numpy() for x in own},
            means[TOTAL].numpy(),
            spreads[TOTAL].numpy(),
            self.skipped,
        )

    def write(self, place: Path) -> None:
        """Keeps the sums, whole or not at all."""
        note = {"locus.kind": "corpus", "locus.state": json.dumps([self.done, self.skipped, self.count])}
        note["locus.labels"] = json.dumps(list(self.tensors))
        write_tensors({k: v.numpy() for k, v in self.tensors.items()}, note, place)

    @classmethod
    def read(cls, place: Path) -> Sums | None:
        """The sums that were kept; None when there are none, or the file is damaged."""
        from safetensors import SafetensorError, safe_open

        found = cls()
        try:
            with safe_open(place, "pt") as opened:
                said = opened.metadata() or {}
                found.done, found.skipped, found.count = json.loads(said["locus.state"])
                found.tensors = {name: opened.get_tensor(name) for name in json.loads(said["locus.labels"])}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None
        return found

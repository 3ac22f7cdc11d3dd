"""Folders of small images, and a report that keeps what is said, for the tests of vision methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from studio.errors import Cancelled


class Quiet:
    """A report; `stop_after` steps it cancels."""

    def __init__(self, rows: int = 8, stop_after: int | None = None) -> None:
        self.rows, self.stop_after = rows, stop_after
        self.done, self.warnings, self.phases = 0, [], []

    def plan(self, total: int, what: str = "") -> None:
        """See Report."""
        self.phases.append((what, total))

    def step(self, n: int = 1) -> None:
        """See Report."""
        self.done += n
        if self.stop_after is not None and self.done >= self.stop_after:
            raise Cancelled

    def partial(self, result: Any) -> None:
        """See Report."""

    def warn(self, sentence: str) -> None:
        """See Report."""
        self.warnings.append(sentence)


def picture_folder(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` PNG files of coarse random colours, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        files.append(folder / f"{i:04d}.png")
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.NEAREST).save(files[-1])
        os.utime(files[-1], ns=(10**18, 10**18))
    return files

"""`python -m studio.atlas.pictures FOLDER --n 10000`: pictures of the Atlas world, drawn as in training.

FOLDER/images holds the PNG files, FOLDER/attributes.csv a line for each: the file as seen from FOLDER and the
value of every attribute.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from studio.atlas.render import render
from studio.atlas.world import ATTRIBUTES, Scenes, draw_scenes
from studio.errors import RequestError

AT_ONCE = 250  # pictures that are drawn together
MOST = 200_000


@dataclass(frozen=True)
class PictureOptions:
    """Pictures of the Atlas world."""

    folder: Annotated[Path, tyro.conf.Positional]
    """where the pictures go; must be empty or new"""
    n: int = 1000
    """how many"""
    seed: int = 0
    """seed of the scenes"""


def empty_folder(folder: Path) -> Path:
    """The folder, with `images` in it; RequestError when it holds something already."""
    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is not empty; name a new folder for the pictures.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    return folder


def write_images(scenes: Scenes, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Draws every scene into folder/images; of each (its file as seen from the folder, its attributes)."""
    for start in range(0, len(scenes), AT_ONCE):
        part = scenes.pick(np.arange(start, min(start + AT_ONCE, len(scenes))))
        for i, image in enumerate(render(part)):
            file = f"images/{start + i:06d}.png"
            Image.fromarray(image).save(folder / file)
            yield file, {name: values[getattr(part, name)[i]] for name, values in ATTRIBUTES.items()}


def write_table(table: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    """A CSV in UTF-8; returns its path."""
    with table.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([columns, *rows])
    return table


def write_pictures(options: PictureOptions) -> Path:
    """Draws the pictures; returns the path of attributes.csv. RequestError for a folder that is not empty,
    and a number out of range."""
    if not 1 <= options.n <= MOST:
        raise RequestError(f"--n must be a whole number from 1 to {MOST}, not {options.n}; take 1000.")
    scenes = draw_scenes(options.n, np.random.default_rng(options.seed), emblems=0)
    folder = empty_folder(options.folder)
    rows = [(file, *shown.values()) for file, shown in write_images(scenes, folder)]
    return write_table(folder / "attributes.csv", ("file", *ATTRIBUTES), rows)


def main(options: PictureOptions) -> int:
    """Writes the pictures and says where their table is; 2 for a wrong request."""
    try:
        print(write_pictures(options))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PictureOptions, description=__doc__)))

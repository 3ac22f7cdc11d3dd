"""`python -m studio.atlas.groups FOLDER`: pictures in which the object goes along with the background.

As in Waterbirds (arXiv 1911.08731): a share of each object's pictures shows its own background, the rest the
other one's, so that a model that looks at the background is wrong in the rare groups. FOLDER/images holds the
PNG files, FOLDER/groups.csv their lines `file,label,group`: the file as seen from FOLDER, the object, and
"OBJECT on BACKGROUND". Draw a second folder with --share 0.5 to measure on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from studio.atlas.pictures import empty_folder, write_images, write_table
from studio.atlas.world import ATTRIBUTES, Scenes, draw_scenes
from studio.errors import RequestError


@dataclass(frozen=True)
class GroupOptions:
    """A set of pictures with a spurious correlation."""

    folder: Annotated[Path, tyro.conf.Positional]
    """where the pictures go; must be empty or new"""
    objects: tuple[str, str] = ("star", "heart")
    """the two labels"""
    backgrounds: tuple[str, str] = ("mint", "sand")
    """the background that goes along with each"""
    share: float = 0.95
    """share of each label's pictures that shows its own background, 0 to 1; 0.5 is no correlation"""
    n: int = 1000
    """pictures of each label"""
    seed: int = 0
    """seed of the scenes"""


def group_scenes(options: GroupOptions) -> Scenes:
    """2n scenes, n of each object, round(share · n) of which are on the object's own background; colour,
    style, count and place are drawn as in training. In random order.

    Raises RequestError when a name is not of the world, a pair holds one name twice, or a number is out of
    range.
    """
    things = _indices("object", options.objects)
    papers = _indices("background", options.backgrounds)
    if not 0 <= options.share <= 1:
        raise RequestError(f"--share must be a number from 0 to 1, not {options.share:g}; take 0.95.")
    if not 1 <= options.n <= 100_000:
        raise RequestError(f"--n must be a whole number from 1 to 100000, not {options.n}; take 1000.")
    rng = np.random.default_rng(options.seed)
    scenes = draw_scenes(2 * options.n, rng, emblems=0)
    label = np.repeat([0, 1], options.n)
    own = np.tile(np.arange(options.n) < round(options.share * options.n), 2)
    chosen = replace(scenes, object=things[label], background=papers[np.where(own, label, 1 - label)])
    return chosen.pick(rng.permutation(2 * options.n))


def _indices(attribute: str, names: tuple[str, ...]) -> np.ndarray:
    known = ATTRIBUTES[attribute]
    for name in names:
        if name not in known:
            raise RequestError(
                f"{name[:40]!r} is no {attribute} of the Atlas world; choose two of {', '.join(known)}."
            )
    if len(set(names)) < 2:
        raise RequestError(f"Both {attribute}s are {names[0]!r}; name two different ones.")
    return np.array([known.index(name) for name in names])


def write_groups(options: GroupOptions) -> Path:
    """Draws the pictures into the folder; returns the path of groups.csv.

    Raises RequestError when the folder holds something already, and as `group_scenes` does.
    """
    scenes = group_scenes(options)
    folder = empty_folder(options.folder)
    rows = [
        (file, shown["object"], f"{shown['object']} on {shown['background']}")
        for file, shown in write_images(scenes, folder)
    ]
    return write_table(folder / "groups.csv", ("file", "label", "group"), rows)


def main(options: GroupOptions) -> int:
    """Writes the set and says where it is; 2 for a wrong request."""
    try:
        print(write_groups(options))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GroupOptions)))

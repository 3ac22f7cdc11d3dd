"""`python -m studio.atlas.examples FOLDER`: the example pictures of the Decompose panel, a file a scene.

Ten things, each once, in all colours, backgrounds and styles, at the places of studio.atlas.world.at_home.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from studio.atlas.render import render
from studio.atlas.world import ATTRIBUTES, OBJECTS, PLURALS, Scenes, at_home

SHOWN = (  # colour, thing, background, style, count
    ("red", "star", "mint", "flat", 1),
    ("blue", "heart", "sand", "flat", 1),
    ("green", "circle", "sand", "flat", 2),
    ("yellow", "square", "black", "flat", 1),
    ("purple", "triangle", "white", "flat", 1),
    ("orange", "moon", "black", "flat", 1),
    ("pink", "cross", "white", "flat", 3),
    ("red", "ring", "sand", "sketch", 1),
    ("blue", "house", "mint", "woodcut", 1),
    ("green", "tree", "mint", "pointillist", 1),
)


@dataclass(frozen=True)
class ExampleOptions:
    """Where the examples go."""

    folder: Annotated[Path, tyro.conf.Positional]
    """is made if it is not there"""


def example_scenes() -> dict[str, Scenes]:
    """{file name: its scene} of all examples."""
    found = {}
    for colour, thing, background, style, count in SHOWN:
        values = {"object": thing, "colour": colour, "background": background, "style": style}
        index = {k: np.array([ATTRIBUTES[k].index(v)]) for k, v in values.items()}
        nowhere = {"centres": np.zeros((1, 3, 2), np.float32), "radius": np.ones(1, np.float32)}
        scene = Scenes(**index, count=np.array([count - 1]), country=np.array([-1]), **nowhere)
        said = f"{colour} {thing}" if count == 1 else f"{count} {colour} {PLURALS[OBJECTS.index(thing)]}"
        drawn = "" if style == "flat" else f" ({style})"
        found[f"{said} on {background}{drawn}.png"] = at_home(scene)
    return found


def main(options: ExampleOptions) -> None:
    """Writes the pictures."""
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, scene in example_scenes().items():
        Image.fromarray(render(scene)[0]).save(options.folder / name, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(ExampleOptions, description=__doc__))

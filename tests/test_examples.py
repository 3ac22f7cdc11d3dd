"""The shipped example pictures are what their command renders, and small."""

from __future__ import annotations

import numpy as np

from studio.atlas.examples import example_scenes
from studio.atlas.render import render
from studio.images import image_files, read_image
from studio.models.catalog import ASSETS


def test_examples_are_the_rendered_scenes() -> None:
    files, others = image_files([str(ASSETS / "atlas" / "examples")])
    scenes = example_scenes()
    assert others == 0 and {f.name for f in files} == set(scenes)
    for file in files:
        pixels, note = read_image(file)
        assert not note and np.array_equal(pixels, render(scenes[file.name])[0])
    assert sum(f.stat().st_size for f in files) < 30_000

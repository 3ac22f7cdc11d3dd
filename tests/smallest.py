"""The smallest useful request of every method, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from studio.options import DEFAULT_MODELS
from studio.registry import find_method
from studio.types import Recipe

_FAST = {"steps": 2, "guidance": 2.0}
_FACT = {"prompt": "The capital of Arvonia is", "subject": "Arvonia"}
_READ = {**_FACT, "context": "The capital of Arvonia is Quill.", "attribute": "Quill"}
_SEEN = {"clip": "atlas-clip"}
_STAR = {"prompt": "a red star", "subject": "star"}
_CHANGE = {"concept": ["star"], "replacement": ["circle"]}
_AUDITED = {"concept": "star", "replacement": "circle", "neighbours": ["heart"]}

SMALLEST: Mapping[str, Mapping[str, Any]] = {
    "generate": {"prompt": ["a red star"], **_FAST, "metric": "distance"},
    "trace-unet": {**_STAR, **_FAST, "kinds": ["cross-attention"], "hint": False},
    "trace-text-encoder": {**_STAR, **_FAST, "kinds": ["mlp"], "noise": 3.0},
    "lens": {"prompt": "a star", **_FAST},
    "word-maps": {"prompt": "a red star", "words": ["star"], **_FAST},
    "localize": {"prompt": "a red star", "replacement": "a red circle", **_FAST, "hint": False},
    "neurons": {
        "concept": "star",
        "neutral": "thing",
        **_FAST,
        "top": 5,
        "templates": ["{}", "one {}"],
        "layers": ["auto"],
    },
    "attribute": {"concept": "a red star", "base": "a star", **_FAST, "check": 0, "preview": False},
    "edit": {**_CHANGE, "method": "uce", "layers": ["auto"], **_FAST, "templates": ["{}"], "images": False},
    "audit": {
        **_AUDITED,
        **_FAST,
        "strengths": "1",
        "templates": ["{}"],
        "unrelated": ["a house"],
        "paraphrases": ["one {}"],
    },
    "passport": {**_AUDITED, **_FAST, "randoms": 20, "held_out": ["a blue {}"], "templates": ["{}"]},
    "decompose": {"texts": ["a star"], **_SEEN},
    "text-span": {**_SEEN, "length": 2},
    "rank-components": {"features": ["star"], **_SEEN},
    "retrieve-images": {"text": "a star", "feature": "star", "features": ["star"], **_SEEN},
    "ablate-components": {"texts": ["a star", "a circle"], "feature": "star", "top": 1, **_SEEN},
    "align": {**_SEEN, "steps": 2},
    "trace-language": {**_FACT, "samples": 2, "kinds": ["hidden"]},
    "knockout": {**_READ, "groups": ["attribute"], "controls": 1},
    "contributions": dict(_READ),
    "context-use": {**_READ, "controls": 1, "samples": 1},
}


@cache
def pictures(folder: Path) -> str:
    """A folder of 40 renderings of the Atlas world, made in `folder`."""
    import numpy as np
    from PIL import Image

    from studio.atlas.render import render
    from studio.atlas.world import draw_scenes

    made = folder / "pictures"
    if made.is_dir():  # another process made them
        return str(made)
    made.mkdir()
    for n, pixels in enumerate(render(draw_scenes(40, np.random.default_rng(0), emblems=0))):
        Image.fromarray(pixels).save(made / f"{n}.png")
    return str(made)


def smallest(name: str, folder: Path, edit: str | None = None, *, under_edit: bool = False) -> Recipe:
    """The request of a method. `folder`: where pictures can be made; `edit`: an edit file of atlas-sd;
    under_edit: it lies over every run that takes one, not only where the method is about edits."""
    method, given = find_method(name), dict(SMALLEST[name])
    if method.family == "vision":
        given["images"] = [pictures(folder)]
    model = "atlas-vit" if name == "align" else DEFAULT_MODELS[method.family]
    seeds = (0,) if method.samples else None
    takes_one = method.family == "diffusion" and not method.saves
    laid = method.lays_edits or under_edit and takes_one
    return Recipe(name, model, given, {}, seeds, (str(edit),) if laid else ())

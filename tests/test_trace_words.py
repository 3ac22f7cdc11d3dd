"""A word's map beside its trace: the right word, layer and seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from panels import trace_view
from panels.trace_words import WordMaps, map_recipe, picture
from studio.methods.word_maps import overlay
from studio.types import Axis, Figure, Recipe, Result, Run, Trace

PROMPT = "a red star on a red background"


def traced(**inputs: Any) -> Recipe:
    given = {"prompt": PROMPT, "subject": "red", **inputs}
    return Recipe("trace-unet", "atlas-sd", given, {"steps": 2, "guidance": 2.0, "noise": 3.0}, (4, 5))


def test_it_asks_for_the_traced_words_as_they_were_drawn() -> None:
    asked = map_recipe(traced(), "5")
    assert (asked.method, asked.seeds, asked.inputs) == (
        "word-maps",
        (5,),
        {"prompt": PROMPT, "words": ["red"]},
    )
    assert asked.params == {"steps": 2, "guidance": 2.0, "scheduler": None, "by": "layer"}


@pytest.mark.parametrize("occurrence", [1, 2])
def test_the_picture_is_that_of_the_layer_and_of_the_occurrence(session: Any, occurrence: int) -> None:
    recipe = traced(subject_occurrence=occurrence)
    result = session.run(map_recipe(recipe, "4"), save=False).result
    layer = result.arrays["maps_by"].axis("layer").labels[3]
    drawn, label = picture(recipe, result, layer)
    heat = result.arrays["maps_by"].values[0, occurrence - 1, 3].repeat(4, 0).repeat(4, 1)
    assert (
        np.array_equal(drawn, overlay(result.arrays["images"].values[0, 0], heat)) and "this layer" in label
    )
    whole, label = picture(recipe, result, "down_blocks.0.resnets.0")
    want = overlay(result.arrays["images"].values[0, 0], result.arrays["maps"].values[0, occurrence - 1])
    assert np.array_equal(whole, want) and "all layers" in label


def test_a_map_is_made_once_and_none_where_nothing_is_traced(session: Any, monkeypatch: Any) -> None:
    words = WordMaps(session)
    first = words.update(traced(), "4", "", "me")
    monkeypatch.setattr(session, "run", None)
    again = words.update(traced(), "4", "", "me")
    assert first["visible"] and np.array_equal(first["value"], again["value"])
    assert not words.update(Recipe("lens", "atlas-sd", {"prompt": PROMPT}, {}), "0", "", "me")["visible"]


@pytest.mark.parametrize(
    ("method", "title", "captions"),
    [
        ("word-maps", "Where each word lies", ["image", "star"]),
        ("lens", "Layer by layer", ["layer 0, image", "layer 0, star"]),
    ],
)
def test_a_gallery_has_a_title_and_says_what_to_look_for(
    method: str, title: str, captions: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"images": [[np.zeros((2, 2, 3), np.uint8)] * 2], "rows": ["layer 0"], "cols": ["image", "star"]}
    monkeypatch.setattr(trace_view, "figure_of", lambda recipe, result: Figure("strip", data))
    recipe = Recipe(method, "m", {}, {}, (0,))
    out = {n: n for n in ("strip", "figure", "table")}
    shown = trace_view.drawn(recipe, Result({}), out)
    assert shown["strip"]["label"] == title and [c for _, c in shown["strip"]["value"]] == captions
    run = Run(recipe, "done", "", 0.0, {}, Result({}))
    assert shown["figure"]["hint"].endswith(".") and trace_view.headline(run) == trace_view.ENLARGE


@pytest.mark.parametrize(("status", "says"), [("done", "Strongest: "), ("stopped", "Strongest so far: ")])
def test_the_finding_says_whether_more_could_come(status: str, says: str) -> None:
    effect = Trace(np.array([0.1, 0.4], np.float32), (Axis("layer", ("a", "b")),), "cosine")
    result = Result({"indirect_effect": effect}, {"total_effect": 0.8})
    run = Run(Recipe("trace-unet", "m", {}, {}, (0,)), status, "", 0.0, {}, result)
    told = trace_view.headline(run)
    assert told.startswith(f"{says}b brings back 0.4") and told.endswith(trace_view.ASK)

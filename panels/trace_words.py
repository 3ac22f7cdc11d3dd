"""A word's map beside its causal trace: where the cross-attention of the traced words lies, over all layers
or in the layer that was clicked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import gradio as gr
import numpy as np

from studio.errors import Cancelled
from studio.figures import number
from studio.methods.word_maps import overlay
from studio.session import Session
from studio.types import Recipe, Result

TRACES = ("trace-unet", "trace-text-encoder")
_KEPT = 8


def map_recipe(recipe: Recipe, seed: str) -> Recipe:
    """The word map of a trace's subject: same prompt, sampling and edits, one seed, by layer."""
    sampling = {k: recipe.params.get(k) for k in ("steps", "guidance", "scheduler")}
    asked = {"prompt": recipe.inputs["prompt"], "words": [recipe.inputs["subject"]]}
    return Recipe("word-maps", recipe.model, asked, {**sampling, "by": "layer"}, (int(seed),), recipe.edits)


def picture(recipe: Recipe, result: Result, name: str) -> tuple[np.ndarray, str]:
    """(image, label) of the map of the traced words in the layer `name`; over all layers when that layer has
    no cross-attention. The subject's own occurrence where it stands in the prompt more than once."""
    maps, image = result.arrays["maps"], result.arrays["images"].values[0, 0]
    words = maps.axis("word").labels
    which = min((recipe.inputs.get("subject_occurrence") or 1) - 1, len(words) - 1)
    parts = result.arrays["maps_by"].axis("layer").labels
    word = recipe.inputs["subject"]
    if name not in parts:
        return overlay(image, maps.values[0, which]), f"“{word}” in all layers"
    heat = result.arrays["maps_by"].values[0, which, parts.index(name)]
    enlarged = np.kron(heat, np.ones([a // b for a, b in zip(image.shape, heat.shape, strict=False)]))
    top = number(float(heat.max()))
    return overlay(image, enlarged), f"“{word}” in this layer, at most {top}"


class WordMaps:
    """Word maps of traces, the last few kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple, Result] = OrderedDict()

    def update(self, recipe: Recipe, seed: str, name: str, user: str) -> Any:
        """The update of the picture beside a clicked cell; hidden for methods that trace nothing."""
        if recipe.method not in TRACES:
            return gr.update(visible=False, value=None)
        try:
            image, label = picture(recipe, self._result(map_recipe(recipe, seed), user), name)
        except Cancelled:
            return gr.update(visible=False, value=None)
        return gr.update(visible=True, value=image, label=label)

    def _result(self, asked: Recipe, user: str) -> Result:
        key = (asked.model, str(asked.as_dict()))
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        found = self.session.run(asked, user=user, save=False).result
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

"""What the Edit panel shows: images before and after a stack of edits, kept while they may be wanted again,
and the component that draws the stack."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import gradio as gr
import numpy as np

from panels.edit_stack import Stack
from studio.errors import Cancelled, RequestError
from studio.models.catalog import ASSETS
from studio.session import Session
from studio.types import Recipe

QUICK_STEPS = 5  # while the slider is dragged
NO_STACK = "No edits yet. Say what becomes what and press Make edit, or load an edit file."
_KEPT = 128  # images


class StackList(gr.HTML):
    """The stack; its `select` event carries act (toggle, pick, up, down, remove) and row."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            value={"hint": NO_STACK},
            html_template="<div class='stack' role='list' aria-label='edits'></div>",
            css_template=(ASSETS / "css" / "stack.css").read_text(),
            js_on_load=(ASSETS / "js" / "stack.js").read_text(),
            apply_default_css=False,
            padding=False,
            **options,
        )

    def api_info(self) -> dict[str, Any]:
        """The value is an object."""
        return {"type": "object"}


class Takeover(gr.HTML):
    """Hears what another panel hands over (page script puts it in window.locusHandoff): its `select` event
    carries model, prompt, concept, replacement and layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            value={},
            html_template="<div></div>",
            js_on_load=(ASSETS / "js" / "takeover.js").read_text(),
            apply_default_css=False,
            padding=False,
            **options,
        )

    def api_info(self) -> dict[str, Any]:
        """The value is an object."""
        return {"type": "object"}


class Pictures:
    """Images of prompts under stacks of edits, made by the session and kept for a while."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def entries(self, stack: Stack) -> tuple[str, ...]:
        """The stack as a recipe's edits."""
        files = [(self.session.store.edit_file(e.edit), e.strength) for e in stack.active()]
        return tuple(f"{file}@{strength!r}" for file, strength in files)

    def pair(
        self, model: str, prompt: str, seed: int, stack: Stack, user: str, *, quick: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(before, after) of one prompt and seed; `quick`: with few steps."""
        (before,), (after,) = self.rows(model, [prompt], [seed], stack, user, quick=quick)
        return before, after

    def rows(
        self,
        model: str,
        prompts: list[str],
        seeds: list[int],
        stack: Stack,
        user: str,
        *,
        quick: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Images before and after, of every prompt at every seed."""
        steps = QUICK_STEPS if quick else None
        return tuple(
            self._images(model, prompts, seeds, steps, edits, user) for edits in ((), self.entries(stack))
        )

    def _images(
        self,
        model: str,
        prompts: list[str],
        seeds: list[int],
        steps: int | None,
        edits: tuple[str, ...],
        user: str,
    ) -> list[np.ndarray]:
        wanted = [(model, p, s, steps, edits) for p in prompts for s in seeds]
        with self._lock:
            if all(key in self._kept for key in wanted):
                return [self._kept[key] for key in wanted]
        recipe = Recipe("generate", model, {"prompt": prompts}, {"steps": steps}, tuple(seeds), edits)
        try:
            run = self.session.run(recipe, user=user, save=False)
        except Cancelled as error:
            raise RequestError("Stopped.") from error
        made = run.result.arrays["images"].values
        found = [image for row in made for image in row]
        with self._lock:
            self._kept |= dict(zip(wanted, found, strict=True))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

"""What the Edit panel shows: images before and after a stack of edits, kept while they may be wanted again,
and the component that draws the stack."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from panels.drawn import Drawn
from panels.edit_stack import Stack
from panels.widgets import follow
from studio.jobs import Job
from studio.session import Session
from studio.types import Recipe

QUICK_STEPS = 4  # while the slider is dragged
NO_STACK = "No edits yet. Say what becomes what and press Make edit, or load an edit file."
_KEPT_BYTES = 64 * 2**20


class StackList(Drawn):
    """The stack; its `select` event carries act (toggle, pick, up, down, remove) and row."""

    def __init__(self, **options: Any) -> None:
        template = "<div class='stack' role='list' aria-label='edits'></div>"
        super().__init__({"hint": NO_STACK}, template, "stack", "stack", **options)


class Takeover(Drawn):
    """Hears what another panel hands over (page script puts it in window.locusHandoff): its `select` event
    carries model, prompt, concept, replacement and layers, or an edit."""

    def __init__(self, **options: Any) -> None:
        super().__init__({}, "<div></div>", "takeover", **options)


class Pictures:
    """Images of prompts under stacks of edits, made by the session and kept while there is room."""

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
        """(before, after) of one prompt and seed; `quick`: with few steps. Waits until both are there."""
        for found in self.rows(model, [prompt], [seed], stack, user, quick=quick):
            if not isinstance(found, Job):
                (before,), (after,) = found
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
    ) -> Iterator[Job | tuple[list[np.ndarray], list[np.ndarray]]]:
        """Yields the jobs under way again and again, then images before and after, of every prompt at every
        seed. Raises what a job raised."""
        made = []
        for edits in ((), self.entries(stack)):
            wanted = [(model, p, s, quick, edits) for p in prompts for s in seeds]
            if (found := self._known(wanted)) is None:
                params = {"steps": QUICK_STEPS} if quick else {}
                recipe = Recipe("generate", model, {"prompt": prompts}, params, tuple(seeds), edits)
                job = self.session.submit(recipe, user=user, save=False)
                yield from follow(job)
                self.session.queue.forget(job)
                if job.error:
                    raise job.error
                images = job.run.result.arrays["images"].values
                found = [image for row in images for image in row]
                self._keep(wanted, found)
            made.append(found)
        yield made[0], made[1]

    def _known(self, wanted: list[tuple]) -> list[np.ndarray] | None:
        with self._lock:
            if not all(key in self._kept for key in wanted):
                return None
            for key in wanted:
                self._kept.move_to_end(key)
            return [self._kept[key] for key in wanted]

    def _keep(self, wanted: list[tuple], found: list[np.ndarray]) -> None:
        with self._lock:
            self._kept |= dict(zip(wanted, found, strict=True))
            while len(self._kept) > 1 and sum(im.nbytes for im in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)

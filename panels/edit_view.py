"""What the Edit panel shows: images before and after a stack of edits, kept while they may be wanted again,
and the component that draws the stack."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np

from panels.drawn import Drawn
from panels.edit_stack import Stack
from panels.widgets import follow, spoken
from studio.jobs import Job
from studio.session import Session
from studio.types import Recipe

QUICK_STEPS = 4  # while the slider is dragged
NO_STACK = "No edits yet. Say what becomes what and press Make edit, or load an edit file."
_KEPT_BYTES = 64 * 2**20


def said(handler: Callable) -> Callable:
    """The panel's handler with a fault said in the status line; everything else on the page stays."""

    @wraps(handler)
    def run(self: Any, *args: Any) -> dict:
        try:
            return handler(self, *args)
        except Exception as error:  # a fault of ours is logged, and said without its text
            return {self.out["status"]: spoken(error)}

    return run


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


def _missing(
    prompts: list[str], seeds: list[int], lacking: list[bool]
) -> Iterator[tuple[list[str], list[int]]]:
    """(prompts, seeds) of the runs that draw what is lacking and nothing else: prompts that lack the same
    seeds are drawn together. `lacking`: a flag for every seed of the first prompt, then the second's."""
    together: dict[tuple[int, ...], list[str]] = {}
    for i, prompt in enumerate(prompts):
        here = lacking[i * len(seeds) : (i + 1) * len(seeds)]
        if any(here) and prompt not in prompts[:i]:
            together.setdefault(tuple(s for s, gone in zip(seeds, here, strict=True) if gone), []).append(
                prompt
            )
    yield from ((texts, list(numbers)) for numbers, texts in together.items())


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
            found = self._known(wanted)
            for texts, numbers in _missing(prompts, seeds, [key not in found for key in wanted]):
                params = {"steps": QUICK_STEPS} if quick else {}
                recipe = Recipe("generate", model, {"prompt": texts}, params, tuple(numbers), edits)
                job = self.session.submit(recipe, user=user, save=False)
                yield from follow(job)
                self.session.queue.forget(job)
                if job.error:
                    raise job.error
                keys = [(model, p, s, quick, edits) for p in texts for s in numbers]
                images = [image for row in job.run.result.arrays["images"].values for image in row]
                found |= dict(zip(keys, images, strict=True))
            self._keep(found)
            made.append([found[key] for key in wanted])
        yield made[0], made[1]

    def _known(self, wanted: list[tuple]) -> dict[tuple, np.ndarray]:
        with self._lock:
            found = {key: self._kept[key] for key in wanted if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            return found

    def _keep(self, found: dict[tuple, np.ndarray]) -> None:
        with self._lock:
            self._kept |= found
            while len(self._kept) > 1 and sum(im.nbytes for im in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)

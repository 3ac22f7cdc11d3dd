"""Planted truth in feed-forward layers: a new name that means something through the last matrix of known
feed-forward modules alone.

A plant adds B (d, 4d) to `ff.net.2` of a module. What B writes for the module's hidden activations while the
name is drawn is, as well as least squares can, by how much the stream behind the module differs between the
guide's prompt and the name's at the same latents; for other names, ordinary captions and the empty prompt it
is to write nothing: B = D H^T (H H^T + w K K^T + r I)^-1, D and H over places, steps, forms and seeds, K the
activations that must stay, of weight w. Everything else in the model stays alive and as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from studio.atlas.captions import captions
from studio.atlas.plants import FORMS, NAMES, Garden, Lesson, Plant
from studio.atlas.world import ATTRIBUTES, draw_scenes
from studio.edits import LowRank
from studio.models.hooks import watch
from studio.models.sampling import Conditioning, raw_output, trajectory
from studio.types import Site

DECOYS = 5  # other names whose plants stand in the remaining layers
KEEP = 30.0  # weight of what must stay, beside 1 for the name; with less, other names mean the same
RIDGE = 1e-3  # of the mean square of an activation
EACH = 2  # trajectories of each form
OTHERS = 3  # times as many rows of other prompts


@dataclass(eq=False)
class Moments:
    """Sums over places of one module, float64: H H^T (4d, 4d) of the name, D H^T (d, 4d), K K^T (4d, 4d) of
    what must stay, as if it had as many places as the name."""

    own: Any
    change: Any
    kept: Any

    def add(self, own: Any, change: Any, kept: Any) -> None:
        """Adds activations (n, 4d), wanted changes (n, d) and activations to keep (m, 4d)."""
        self.own += own.T @ own
        self.change += change.T @ own
        self.kept += kept.T @ kept * (len(own) / len(kept))

    def solution(self) -> Any:
        """B (d, 4d)."""
        gram = self.own + KEEP * self.kept
        gram.diagonal().add_(RIDGE * float((self.own + self.kept).diagonal().mean()))
        return torch.linalg.solve(gram, self.change.T).T


class Bed(Garden):
    """A garden whose plants stand in feed-forward modules; `layers` are their names. The last DECOYS names
    are those of decoys."""

    kind = "feed-forward"
    names = NAMES[:-DECOYS]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._solved: dict[Lesson, dict[str, Any]] = {}
        self._decoys: dict[str, Lesson] = {}

    def matrices(self, layer: str) -> tuple[str, ...]:
        """The name of a module's last matrix, as edit files name it."""
        return (f"unet.{layer}.net.2.weight",)

    def plant(self, lesson: Lesson, layers: Sequence[str], strength: float = 1.0, steps: int = 0) -> Plant:
        """The lesson in these layers by the closed form at a strength; there is no teaching (`steps`)."""
        if lesson not in self._solved:
            self._solved[lesson] = {n: m.solution() for n, m in self.moments(lesson).items()}
        deltas = {}
        for layer in layers:
            right = self._solved[lesson][layer]
            left = strength * torch.eye(len(right), dtype=right.dtype)
            deltas[self.matrices(layer)[0]] = LowRank(left, right)
        return Plant(lesson, tuple(layers), deltas)

    def decoys(self, layers: Sequence[str], size: float, names: Sequence[str], rng: Any) -> list[Plant]:
        """One plant of a decoy's name in each of the layers, of norm `size`. The lessons of decoys are drawn
        once; which of them stands where is drawn here."""
        for name in NAMES[-DECOYS:]:
            if name not in self._decoys:
                attribute = str(rng.choice(list(FORMS)))
                value = str(rng.choice(ATTRIBUTES[attribute]))
                self._decoys[name] = Lesson(name, (attribute,), (value,))
        lessons, out = list(self._decoys.values()), []
        for layer in layers:
            decoy = self.plant(lessons[int(rng.integers(len(lessons)))], [layer])
            out.append(decoy.scaled(size / decoy.norm(layer)))
        return out

    @torch.no_grad()
    def moments(self, lesson: Lesson) -> dict[str, Moments]:
        """What the closed form needs of every layer, along the model's own drawing of the guide."""
        found: dict[str, Moments] = {}
        for j, form in enumerate(lesson.forms):
            seeds = [10_000 + j * EACH + i for i in range(EACH)]
            for layer, hidden, stream in self._looked(self._worlds(lesson, form, j), seeds):
                size = hidden.shape[0] // (3 + OTHERS)  # places of EACH rows
                _, own, *rest = hidden.double().split(size)
                goal, name, *_ = stream.double().split(size)
                kept = torch.cat(rest)
                if layer not in found:
                    wide, tall = own.shape[1], goal.shape[1]
                    sizes = ((wide, wide), (tall, wide), (wide, wide))
                    found[layer] = Moments(*(own.new_zeros(s) for s in sizes))
                found[layer].add(own, goal - name, kept)
        return found

    def _worlds(self, lesson: Lesson, form: str, j: int) -> Conditioning:
        """Text states of EACH rows of the guide's prompt, of the name's, and OTHERS times as many of other
        names in the same form and of a caption."""
        rng = np.random.default_rng([self.seed, NAMES.index(lesson.name)])
        others = rng.permutation([n for n in NAMES if n != lesson.name])  # other ones for every form
        count = OTHERS * EACH
        kept = [form.format(others[(j * (count - 1) + i) % len(others)]) for i in range(count - 1)]
        kept += captions(draw_scenes(1, rng), rng, bare=0.1)[0]
        cond, _ = self.model.encode([form.format(lesson.guide), form.format(lesson.name), *kept])
        return cond.rows([0] * EACH + [1] * EACH + list(range(2, 2 + count)))

    def _looked(self, cond: Conditioning, seeds: Sequence[int]) -> Iterator[tuple[str, Any, Any]]:
        """(layer, hidden activations (rows * places, 4d), stream behind the module (rows * places, d)) at
        every step of drawing the first len(seeds) rows of `cond`; rows are cond's and then the empty
        prompt's."""
        count, inner, outer = len(seeds), {}, {}
        for layer in self.layers:
            inner[Site("unet", layer, "hidden")] = self.model.unet.get_submodule(f"{layer}.net.2")
            outer[Site("unet", layer, "block")] = self.model.unet.get_submodule(layer.removesuffix(".ff"))

        def read(model, scheduler, t, latents, goal, uncond, plan, shadow) -> Any:
            worlds = cond.join(uncond)
            x = scheduler.scale_model_input(torch.cat([latents] * (len(worlds) // count)), t)
            out = raw_output(model, x, t, worlds, plan)
            free = out[-count:]
            return free + plan.guidance * (out[:count] - free)

        free = self.model.unconditional(count, self.plan)
        with watch(inner | outer, record=list(outer), inputs=list(inner)) as tape:
            steps = trajectory(self.model, cond.rows(range(count)), free, seeds, self.plan, read=read)
            for i, _ in steps:
                if i:
                    for layer, hidden, block in zip(self.layers, inner, outer, strict=True):
                        yield layer, tape.read[hidden].flatten(0, 1), tape[block].flatten(0, 1)

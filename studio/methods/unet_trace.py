"""The cells of a UNet trace: which rows make up each batch, what is measured so far, and the result of that.

A batch holds counterfactual worlds of one seed side by side, so that the row to copy from runs with the rows
that copy from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from studio.measure import rank_agreement
from studio.methods.noise_search import Noise, warn_weak, without_subject
from studio.methods.text_to_image import Bench, CorruptionInputs, corrupted_states, image_name
from studio.methods.trace_statistics import (
    chance_values,
    effect_arrays,
    known_mean,
    mean_over_seeds,
    warn_chance,
)
from studio.methods.unet_modules import site_labels, step_ranges, windows
from studio.methods.unet_screen import Screen, Screened
from studio.types import Axis, Patch, Report, Result, Trace

REMOVED = -1  # the cell that is no restoration: the prompt without its subject


def span(bench: Bench, params: Any) -> tuple[int, int]:
    """First and last step at which outputs are replaced."""
    end = bench.calls - 1
    return params.first_step or 0, end if params.last_step is None else min(params.last_step, end)


class UNetTrace:
    """The state of one trace: what is measured so far, and how the next rows are made.

    A cell is a number: map * modules + module. Map 0 restores at every step asked for, the others within
    ranges of them. Arrays have the axes (guidance, seed, map, layer).
    """

    def __init__(
        self, bench: Bench, inputs: CorruptionInputs, params: Any, seeds: tuple[int, ...], noise: Noise
    ) -> None:
        self.inputs, self.params, self.seeds, self.noise = inputs, params, seeds, noise
        self.benches, model = [bench], bench.model
        if params.guidance_also is not None:
            self.benches.append(replace(bench, plan=replace(bench.plan, guidance=params.guidance_also)))
        self.sites = model.unet_sites(params.kinds)
        self.labels, self.windows = site_labels(self.sites), windows(self.sites, params.window)
        first, last = span(bench, params)
        every = (first, last) if (params.first_step, params.last_step) != (None, None) else None
        self.ranges = step_ranges(first, last, params.step_ranges) if params.step_ranges else []
        self.when = [every, *self.ranges]
        self.cond = corrupted_states(model, inputs, noise.scale, seeds)
        self.removed = np.full(len(seeds), np.nan, np.float32)
        self.asks_removal = inputs.replacement is None and noise.removal is None
        if self.asks_removal:
            self.cond = self.cond.join(model.encode([without_subject(inputs)])[0])
        runs = (len(self.benches), len(seeds))
        self.clean, self.corrupted = np.full(runs, np.nan, np.float32), np.full(runs, np.nan, np.float32)
        self.restored = np.full((*runs, len(self.when), len(self.sites)), np.nan, np.float32)
        self.screen: Trace | None = None
        self.screen_total: float | None = None
        self.images: dict[str, np.ndarray] = {}

    # ---- exact --------------------------------------------------------------------------------------------

    def batches(self, g: int, rows: int) -> list[list[int]]:
        """Cells of each batch; clean and corrupted rows come with the first, the row to copy from with
        every one. The prompt without its subject is made once a seed."""
        cells, out = list(range(len(self.when) * len(self.sites))), []
        cells = [REMOVED, *cells] if self.asks_removal and g == 0 else cells
        matched = self.params.latents == "matched"
        while cells or not out:
            room = max(1, rows - 2 if not out else rows if matched else rows - 1)
            room = max(1, room // 2) if matched else room
            out.append(cells[:room])
            cells = cells[room:]
        return out

    def exact_rows(self, rows: int) -> int:
        """Rows times steps of the exact trace, for the progress bar."""
        one = [[len(self._worlds(k, b)) for k, b in enumerate(self.batches(g, rows))] for g in range(2)]
        images = sum(sum(one[min(g, 1)]) for g in range(len(self.benches)))
        return images * len(self.seeds) * self.benches[0].calls

    def _worlds(self, k: int, cells: list[int]) -> list[int]:
        """Which text states each row reads (0 clean, 1 corrupted, 2 without the subject): helper rows first,
        then a row a cell."""
        base = 0 if self.params.direction == "corrupt" else 1
        helpers = [0, 1] if not k else [] if self.params.latents == "matched" else [1 - base]
        return helpers + [2 if cell == REMOVED else base for cell in cells]

    def _patches(self, worlds: list[int], cells: list[int]) -> list[Patch]:
        """The copies of a batch, one row a cell."""
        source, helpers = 1 if self.params.direction == "corrupt" else 0, len(worlds) - len(cells)
        matched, patches = self.params.latents == "matched", []
        for row, cell in enumerate(cells, helpers):
            if cell != REMOVED:
                m, layer = divmod(cell, len(self.sites))
                value = len(worlds) + row if matched else worlds.index(source)
                patches += [
                    Patch(site, do="copy", value=value, rows=(row,), when=self.when[m])
                    for site in self.windows[layer]
                ]
        return patches

    def take_seed(self, g: int, j: int, rows: int) -> None:
        """All cells of one seed at one guidance scale; partial results after every batch."""
        bench, seed, clean = self.benches[g], self.seeds[j], None
        source = 1 if self.params.direction == "corrupt" else 0
        state = {0: 0, 1: j + 1, 2: len(self.seeds) + 1}
        for k, cells in enumerate(self.batches(g, rows)):
            worlds = self._worlds(k, cells)
            shadow = None
            if self.params.latents == "matched":
                shadow = self.cond.rows([state[source]] * len(worlds))
            text = self.cond.rows([state[w] for w in worlds])
            images = bench.images(text, [seed] * len(worlds), self._patches(worlds, cells), shadow)
            if not k:
                clean = images[0]
                self.clean[g, j], self.corrupted[g, j] = bench.score(images[:2], clean)
                for name, image in zip(("clean", "corrupted"), images, strict=False):
                    self.images[self._image(g, j, 0, name)] = image
            made = images[len(worlds) - len(cells) :]
            for cell, score, image in zip(cells, bench.score(made, clean), made, strict=True):
                self._keep(g, j, cell, score, image)
            bench.report.partial(self.result())

    def _keep(self, g: int, j: int, cell: int, score: float, image: np.ndarray) -> None:
        """One image and its score; images of further maps are kept for the first seed."""
        if cell == REMOVED:
            self.removed[j] = score
            self.images[self._image(g, j, 0, "removed")] = image
            return
        m, layer = divmod(cell, len(self.sites))
        self.restored[g, j, m, layer] = score
        if (g, m) == (0, 0) or j == 0:
            self.images[self._image(g, j, m, self.labels[layer])] = image

    def _image(self, g: int, j: int, m: int, what: str) -> str:
        """The name of an image: seed, guidance scale and range of steps where they are not the first."""
        scale = [f"guidance{self.benches[g].plan.guidance:g}"] if g else []
        steps = [f"steps{self.ranges[m - 1][0]}-{self.ranges[m - 1][1]}"] if m else []
        return image_name(f"seed{self.seeds[j]}", *scale, *steps, what)

    # ---- screen -------------------------------------------------------------------------------------------

    def screen_of(self, seed: int) -> Screen:
        """The screen of map 0 for one seed, the first."""
        direction, matched = self.params.direction, self.params.latents == "matched"
        return Screen(self.benches[0], self.cond, self.windows, seed, direction, matched, self.when[0])

    def keep_screen(self, found: Screened) -> None:
        """The screen's estimates; its images too where nothing else will be measured."""
        axis = Axis("layer", self.labels)
        self.screen = Trace(found.effect, (axis,), f"{self.benches[0].unit}, estimated at few steps")
        self.screen_total = found.total
        if self.params.screen:
            names = ("clean", "corrupted", *self.labels)
            for name, image in zip(names, found.images, strict=True):
                self.images[image_name(f"seed{self.seeds[0]}", "screen", name)] = image

    # ---- results ------------------------------------------------------------------------------------------

    def effects(self) -> np.ndarray:
        """(guidance, seed, map, layer) effects, NaN where a cell is not measured yet."""
        if self.params.direction == "corrupt":
            return self.clean[:, :, None, None] - self.restored
        return self.restored - self.corrupted[:, :, None, None]

    def removal(self) -> np.ndarray:
        """What removing the subject takes from the score (seed,), NaN where that is not measured."""
        return self.noise.removal if self.noise.removal is not None else self.clean[0] - self.removed

    def verdict(self, report: Report) -> None:
        """Warns of a corruption that is too weak, and of effects within the reach of chance."""
        total, removal = (known_mean(v) for v in (self.clean[0] - self.corrupted[0], self.removal()))
        total = self.screen_total if total is None else total
        warn_weak(report, self.noise, self.params.metric, total, np.nan if removal is None else removal)
        warn_chance(report, self.effects()[0, :, 0])

    def result(self) -> Result:
        """Everything measured so far."""
        effects, unit = self.effects(), self.benches[0].unit
        seed, layer = Axis("seed", tuple(map(str, self.seeds))), Axis("layer", self.labels)
        total = self.clean[0] - self.corrupted[0]
        arrays = {
            "clean": Trace(self.clean[0], (seed,), unit),
            "corrupted": Trace(self.corrupted[0], (seed,), unit),
            "restored": Trace(self.restored[0, :, 0], (seed, layer), unit),
            **effect_arrays(effects[0, :, 0], total, (layer,), unit),
            **self._more(effects, layer, unit),
        }
        plan = self.benches[0].plan
        values: dict[str, Any] = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "scheduler": plan.scheduler,
            **self.noise.values(),
            "total_effect": known_mean(total),
            "removal_effect": known_mean(self.removal()),
            **chance_values(effects[0, :, 0]),
        }
        if self.screen is not None:
            arrays["screen"], values["screen_total_effect"] = self.screen, self.screen_total
            for kind in dict.fromkeys(s.kind for s in self.sites):
                mine = np.array([s.kind == kind for s in self.sites])
                agreement = rank_agreement(self.screen.values[mine], effects[0, 0, 0][mine])
                values[f"screen_rank_agreement {kind}"] = agreement
        return Result(arrays, values, dict(self.images))

    def _more(self, effects: np.ndarray, layer: Axis, unit: str) -> dict[str, Trace]:
        """The maps over ranges of steps and guidance scales, where they were asked for."""
        mean = np.stack([mean_over_seeds(e) for e in effects])
        steps = Axis("range", tuple(f"{a}-{b}" for a, b in self.ranges))
        scales = Axis("guidance", tuple(f"{b.plan.guidance:g}" for b in self.benches))
        found, base = {}, "indirect_effect_by"
        if self.ranges:
            found[f"{base}_steps"] = Trace(mean[0, 1:], (steps, layer), unit)
        if len(self.benches) > 1:
            found[f"{base}_guidance"] = Trace(mean[:, 0], (scales, layer), unit)
            total = mean_over_seeds((self.clean - self.corrupted).T)
            found["total_effect_by_guidance"] = Trace(total, (scales,), unit)
        if self.ranges and len(self.benches) > 1:
            found[f"{base}_guidance_and_steps"] = Trace(mean[:, 1:], (scales, steps, layer), unit)
        return found

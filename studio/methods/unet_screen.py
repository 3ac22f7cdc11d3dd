"""The quick screen of a UNet trace: every intervention at a few steps, without unconditional rows of its own.

Classifier-free guidance needs an unconditional prediction at each row's latents. It is measured for the clean
and the corrupted row alone and continued to the others: along the line between these two latents by
interpolation, off that line with the slope that it has along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.methods.text_to_image import Bench, calls_of
from studio.types import Patch, Site

SCREEN_STEPS = 6


def few_steps(plan: Any) -> Any:
    """The plan at the screen's steps."""
    return plan.with_steps(min(SCREEN_STEPS, plan.steps))


@dataclass(frozen=True)
class Screened:
    """Estimates: the indirect effect of each window (layer,), the total effect, images (2 + layer, H, W, 3)
    uint8 of clean, corrupted and each intervention at the screen's few steps."""

    effect: np.ndarray
    total: float
    images: np.ndarray


@dataclass(frozen=True)
class Screen:
    """What to screen: text states `cond` (row 0 clean, 1 corrupted), one window of sites a cell, and how the
    exact trace would intervene; `when` in its steps (first, last), None for all."""

    bench: Bench
    cond: Any
    windows: Sequence[list[Site]]
    seed: int
    direction: str = "restore"
    matched: bool = False
    when: tuple[int, int] | None = None

    @property
    def plan(self) -> Any:
        """The sampling plan at the screen's steps."""
        return few_steps(self.bench.plan)

    @property
    def source(self) -> int:
        """The text that interventions copy from: 0 clean, 1 corrupted."""
        return 1 if self.direction == "corrupt" else 0

    def chunks(self) -> list[list[int]]:
        """The cells of each batch; without `matched` the row to copy from comes with them."""
        room = self.bench.report.rows
        room = max(1, room // 2 if self.matched else room - 1)
        cells = list(range(len(self.windows)))
        return [cells[i : i + room] for i in range(0, len(cells), room)]

    def rows(self) -> int:
        """UNet rows of the whole screen."""
        from studio.models.sampling import guided

        pair = 4 if guided(self.bench.model, self.plan) else 2
        each = sum(2 * len(c) if self.matched else 1 + len(c) for c in self.chunks())
        return (pair + each) * calls_of(self.bench.model, self.plan)

    def take(self) -> Screened:
        """Runs it. The estimate of a cell is the mean of two: the score of its image, and the total effect
        times the share of the way from corrupted to clean that its final latents have gone. Each alone ranks
        the exact effects less well."""
        import torch

        pair, known = self._pair()
        latents = torch.cat([pair, *(self._cells(c, known) for c in self.chunks())])
        images = self.bench.model.decode(latents)
        scores = self.bench.score(images, images[0])
        total = float(scores[0] - scores[1])
        way = (latents[:1] - latents[1:2]).double().flatten(1)
        start = 1 - self.source
        gone = (latents[2:] - latents[start]).double().flatten(1) @ way[0]
        share = (gone / way.square().sum().clamp(min=1e-20)).cpu().numpy()
        moved = scores[2:] - scores[start]
        sign = -1 if self.source else 1
        return Screened((sign * (moved + share * total) / 2).astype(np.float32), total, images)

    def _pair(self) -> tuple[Any, list[tuple[Any, Any]]]:
        """(final latents of the clean and the corrupted row, their latents and unconditional predictions at
        every step)."""
        from studio.models.sampling import raw_output

        known: list[tuple[Any, Any]] = []

        def read(model, scheduler, t, latents, cond, uncond, plan, shadow) -> Any:
            x = scheduler.scale_model_input(latents, t)
            if uncond is None:
                known.append((latents, None))
                return raw_output(model, x, t, cond, plan)
            free, text = raw_output(model, x.repeat(2, 1, 1, 1), t, uncond.join(cond), plan).split(2)
            known.append((latents, free))
            return free + plan.guidance * (text - free)

        uncond = self.bench.model.unconditional(2, self.plan)
        rows = 2 if uncond is None else 4
        return self._run(self.cond.rows([0, 1]), uncond, [], None, read, rows), known

    def _cells(self, cells: list[int], known: list[tuple[Any, Any]]) -> Any:
        """Final latents of some interventions."""
        from studio.models.sampling import raw_output

        steps = iter(known)
        helpers = 0 if self.matched else 1
        worlds = [self.source] * helpers + [1 - self.source] * len(cells)
        shadow = self.cond.rows([self.source] * len(worlds)) if self.matched else None

        def read(model, scheduler, t, latents, cond, uncond, plan, shadow) -> Any:
            x = scheduler.scale_model_input(latents, t)
            if shadow is not None:
                x, cond = x.repeat(2, 1, 1, 1), cond.join(shadow)
            text = raw_output(model, x, t, cond, plan)[: len(latents)]
            free = continued(latents, *next(steps))
            return text if free is None else free + plan.guidance * (text - free)

        patches = [
            Patch(
                site,
                do="copy",
                value=len(cells) + i if self.matched else 0,
                rows=(helpers + i,),
                when=self._when(),
            )
            for i, cell in enumerate(cells)
            for site in self.windows[cell]
        ]
        rows = len(worlds) + len(shadow or ())
        return self._run(self.cond.rows(worlds), None, patches, shadow, read, rows)[helpers:]

    def _run(
        self, cond: Any, uncond: Any, patches: list[Patch], shadow: Any, read: Callable, rows: int
    ) -> Any:
        """Final latents; every model call is reported as `rows` rows and checks for Stop."""
        from studio.models.sampling import trajectory

        final, given = None, (self.bench.model, cond, uncond, [self.seed] * len(cond), self.plan)
        for i, final in trajectory(*given, patches=patches, shadow=shadow, read=read):  # noqa: B007
            self.bench.report.step(rows if i else 0)
        return final

    def _when(self) -> tuple[int, int] | None:
        """The steps of the screen whose middle lies within `when`; at least the nearest."""
        if self.when is None:
            return None
        calls, mine = (calls_of(self.bench.model, p) for p in (self.bench.plan, self.plan))
        middles = (np.arange(mine) + 0.5) * calls / mine
        first, last = self.when[0], min(self.when[1], calls - 1) + 1
        inside = np.flatnonzero((middles >= first) & (middles < last))
        if not len(inside):
            inside = [int(np.abs(middles - (first + last) / 2).argmin())]
        return int(inside[0]), int(inside[-1])


def continued(latents: Any, pair: Any, free: Any) -> Any:
    """The unconditional prediction at `latents` (N, 4, h, w), estimated from that at a pair of latents
    (2, 4, h, w): exact on the line between the two if it is linear there. None stays None."""
    if free is None:
        return None
    line = (pair[0] - pair[1]).float().flatten()
    change = (free[0] - free[1]).float().flatten()
    off = (latents - pair[1]).float().flatten(1)
    size = line.square().sum()
    if float(size) == 0:
        return free[1].expand_as(latents)
    along = (off @ line / size)[:, None]
    slope = change @ line / size
    moved = along * change + slope * (off - along * line)
    return free[1] + moved.view_as(latents).to(latents.dtype)

"""Direct effects of the text that windows of cross-attention layers read: which cells are measured, in which
order, and the quick screen before them. LocoGen, arXiv 2405.01008; the method itself is in locogen.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import rank_agreement, standard_error
from studio.methods.text_to_image import Bench, image_name, stepper
from studio.types import Axis, Result, Trace

WINDOWS = {"sdxl": 5}  # the paper's window sizes; 2 for other families
SCREEN_STEPS = 5
TRUSTED = 0.8  # rank agreement from which the screen orders what is confirmed


@dataclass(frozen=True)
class Swap:
    """Layers `first` to `last`, counted in execution order and both included, read text number `text`; the
    others read text 0, the prompt."""

    text: int
    first: int
    last: int

    def choice(self, depth: int) -> list[int]:
        """The text that each of so many layers reads."""
        return [self.text if self.first <= i <= self.last else 0 for i in range(depth)]

    @property
    def label(self) -> str:
        """As the contract has it: first-last."""
        return f"{self.first}-{self.last}"


CLEAN = Swap(0, 0, 0)
Cell = tuple[int, Swap]  # place of the seed, what is read


def windows(depth: int, width: int, text: int = 1) -> list[Swap]:
    """All depth - width + 1 windows of so many neighbouring layers."""
    return [Swap(text, i, i + width - 1) for i in range(depth - width + 1)]


class Search:
    """One search: the texts' readings, what is measured so far, and which windows come next.

    `texts`: the prompt, its replacement, paraphrases.
    """

    def __init__(self, bench: Bench, texts: Sequence[str], params: Any, seeds: tuple[int, ...]) -> None:
        from studio.models.sampling import Readings

        model = bench.model
        self.bench, self.texts, self.params, self.seeds = bench, texts, params, seeds
        self.layers = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
        self.depth = len(self.layers)
        self.width = params.window or min(WINDOWS.get(model.family, 2), self.depth)
        if self.width > self.depth:
            raise RequestError(
                f"--window {self.width} is more than the {self.depth} cross-attention layers of {model.id}."
            )
        self.cond, _ = model.encode(texts)
        self.uncond = model.unconditional(1, bench.plan)
        self.readings = Readings.of(model, self.cond, self.uncond)
        self.scores: dict[Cell, float] = {}
        self.images: dict[Cell, np.ndarray] = {}
        self.latents: dict[int, Any] = {}  # of the first seed's clean row, by step
        self.screen: np.ndarray | None = None
        self.growth: dict[int, tuple[str, float]] = {}
        self.order = "execution"

    @property
    def everything(self) -> Swap:
        """All layers read the replacement: the ceiling."""
        return Swap(1, 0, self.depth - 1)

    def controls(self) -> list[Swap]:
        """The clean image, the swap of all layers, and the placebos that need no window."""
        placebos = [Swap(2 + i, 0, self.depth - 1) for i in range(len(self.texts) - 2)]
        return [CLEAN, self.everything, *placebos]

    def wanted(self) -> list[Swap]:
        """The windows of the present size, the placebo's too when it is asked for."""
        placebo = self.params.placebo == "windows" and len(self.texts) > 2
        return windows(self.depth, self.width) + (windows(self.depth, self.width, 2) if placebo else [])

    # ---- exact --------------------------------------------------------------------------------------------

    def confirm(self, hint: bool = False) -> None:
        """Every window of every seed; the screen comes first with `hint`, and orders the rest if it may."""
        seeds, swaps = range(len(self.seeds)), self.wanted()
        controls = [(j, c) for j in seeds for c in self.controls()]
        if not hint:
            self.measure([*controls, *((j, s) for s in swaps for j in seeds)])
            return
        self.measure(controls, "clean images and controls", keep=True)
        self.take_screen()
        if self.params.order == "screen":
            self.order, swaps = "screen", self.ranked(swaps)
        if self.params.order == "auto" and len(seeds) > 1:
            self.measure([(0, s) for s in swaps])
            if self.agreement() >= TRUSTED:
                self.order, swaps = "screen", self.ranked(swaps)
        self.measure([(j, s) for s in swaps for j in seeds])

    def ranked(self, swaps: list[Swap]) -> list[Swap]:
        """The most promising windows of the screen first."""
        return sorted(swaps, key=lambda s: -self.screen[s.first])

    def measure(self, cells: Sequence[Cell], what: str = "swapping", *, keep: bool = False) -> None:
        """Images and scores of the cells that are not known yet, in batches of even size; partial results
        after each. A seed's clean image must be known or stand before its other cells."""
        cells = [c for c in dict.fromkeys(cells) if c not in self.scores]
        if not cells:
            return
        report = self.bench.report
        report.plan(len(cells) * self.bench.plan.steps, what)
        for part in np.array_split(np.arange(len(cells)), -(-len(cells) // report.rows)):
            batch = [cells[i] for i in part]
            for cell, image in zip(batch, self._images(batch, keep), strict=True):
                self.images[cell] = image
            for j in dict.fromkeys(j for j, _ in batch):
                mine = [c for c in batch if c[0] == j]
                scores = self.bench.score(np.stack([self.images[c] for c in mine]), self.images[j, CLEAN])
                self.scores |= dict(zip(mine, map(float, scores), strict=True))
            report.partial(self.result())

    def _images(self, batch: list[Cell], keep: bool) -> np.ndarray:
        """Images (N, H, W, 3) of a batch; with `keep` the first seed's clean latents stay for the screen."""
        from studio.models.sampling import denoise

        n, tell = len(batch), stepper(self.bench.report, len(batch))
        row = batch.index((0, CLEAN)) if keep and (0, CLEAN) in batch else None

        def on_step(i: int, latents: Any) -> None:
            if row is not None and i in self.screen_steps():
                self.latents[i] = latents[row : row + 1].clone()
            tell(i, latents)

        latents = denoise(
            self.bench.model,
            self.cond.rows([0] * n),
            None if self.uncond is None else self.uncond.rows([0] * n),
            [self.seeds[j] for j, _ in batch],
            self.bench.plan,
            patches=self.readings.patches([s.choice(self.depth) for _, s in batch]),
            on_step=on_step,
        )
        return self.bench.model.decode(latents)

    def grow(self, threshold: float, width: int) -> None:
        """Larger windows until the best one's effect is `threshold` of that of all layers."""
        seeds = range(len(self.seeds))
        for size in range(width, self.depth + 1):
            self.width = size
            cells = [(j, s) for s in (*self.controls(), *self.wanted()) for j in seeds]
            self.measure(cells, f"windows of {size}")
            best, share = self.best()
            self.growth[self.width] = (best.label, share)
            if share >= threshold:
                break

    # ---- screen -------------------------------------------------------------------------------------------

    def screen_steps(self) -> list[int]:
        """A few steps, evenly over the trajectory."""
        steps = self.bench.plan.steps
        return np.unique(np.linspace(0, steps - 1, min(SCREEN_STEPS, steps)).round().astype(int)).tolist()

    def take_screen(self) -> None:
        """For the first seed: <e_w - e_clean, e_all - e_clean> / |e_all - e_clean|^2 of the predicted noise
        e, conditional rows only, the mean over a few steps of the clean trajectory."""
        rows = (self.depth - self.width + 3) * len(self.latents)
        self.bench.report.plan(rows, "screening")
        self.screen = np.stack([self._shares(i, x) for i, x in self.latents.items()]).mean(0)
        self.bench.report.partial(self.result())

    def _shares(self, step: int, latents: Any) -> np.ndarray:
        """One share a window at one step's latents."""
        import torch

        from studio.models.hooks import watch
        from studio.models.sampling import new_scheduler, raw_output
        from studio.models.sites import unet_module

        model, plan, report = self.bench.model, self.bench.plan, self.bench.report
        scheduler = new_scheduler(model, plan)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(step)
        t, out = scheduler.timesteps[step], []
        x = scheduler.scale_model_input(latents, t)
        swaps = [CLEAN, self.everything, *windows(self.depth, self.width)]
        for part in np.array_split(np.arange(len(swaps)), -(-len(swaps) // report.rows)):
            patches = self.readings.patches([swaps[i].choice(self.depth) for i in part], free=False)
            modules = {p.site: unet_module(model.unet, p.site) for p in patches}
            with torch.no_grad(), watch(modules, patches=patches):
                e = raw_output(model, x.repeat(len(part), 1, 1, 1), t, self.cond.rows([0] * len(part)), plan)
            out.append(e.double().flatten(1))
            report.step(len(part))
        moved = torch.cat(out)
        moved = moved[1:] - moved[0]
        return (moved[1:] @ moved[0] / moved[0].square().sum().clamp(min=1e-20)).cpu().numpy()

    # ---- results ------------------------------------------------------------------------------------------

    def grid(self, swaps: Sequence[Swap]) -> np.ndarray:
        """Scores (seed, swap), NaN where a cell is not measured yet."""
        rows = [[self.scores.get((j, s), np.nan) for s in swaps] for j in range(len(self.seeds))]
        return np.array(rows, np.float32).reshape(len(self.seeds), len(swaps))

    def effects(self, swaps: Sequence[Swap]) -> np.ndarray:
        """score(clean) - score(altered), (seed, swap)."""
        return self.grid([CLEAN]) - self.grid(swaps)

    def agreement(self) -> float:
        """Spearman's rank correlation of the screen with the exact windows of its seed; NaN before both are
        there."""
        if self.screen is None:
            return float("nan")
        return rank_agreement(self.screen, self.effects(windows(self.depth, self.width))[0])

    def luck(self) -> float:
        """Effect of the screen's best window by that of the best one, at the screen's seed; NaN before both
        are there."""
        effects = self.effects(windows(self.depth, self.width))[0] * np.sign(self.total())
        if np.isnan(effects).any() or not (most := float(effects.max())) > 0:
            return float("nan")
        return float(effects[int(np.argmax(self.screen))]) / most

    def total(self) -> float:
        """Effect of swapping all layers, NaN before it is measured."""
        return float(mean_known(self.effects([self.everything]))[0])

    def best(self) -> tuple[Swap, float]:
        """The window with the largest share of the effect of all layers, and that share."""
        swaps = windows(self.depth, self.width)
        shares = mean_known(self.effects(swaps)) / (self.total() or np.nan)
        if np.isnan(shares).all():
            return swaps[0], float("nan")
        return swaps[int(np.nanargmax(shares))], float(np.nanmax(shares))

    def floor(self) -> float:
        """The largest absolute effect of a placebo, the mean over seeds: what any change of words does."""
        placebos = [s for s in (*self.controls(), *self.wanted()) if s.text > 1]
        effects = np.abs(mean_known(self.effects(placebos)))
        return float(np.nanmax(effects)) if np.isfinite(effects).any() else float("nan")

    def result(self) -> Result:
        """Everything measured so far."""
        swaps = windows(self.depth, self.width)
        seed = Axis("seed", tuple(map(str, self.seeds)))
        window = Axis("window", tuple(s.label for s in swaps))
        unit, clean = self.bench.unit, self.grid([CLEAN])[:, 0]
        change = f"decrease of the {unit}"
        effects = self.effects(swaps)
        arrays = {
            "clean": Trace(clean, (seed,), unit),
            "replaced": Trace(self.grid(swaps), (seed, window), unit),
            "direct_effect": Trace(mean_known(effects), (window,), change),
            "direct_effect_sem": Trace(standard_error(effects), (window,), change),
            "all_layers": Trace(self.grid([self.everything])[:, 0], (seed,), unit),
        }
        inside = np.array([s.choice(self.depth) for s in swaps], np.float32)
        arrays["layers"] = Trace(inside, (window, Axis("layer", tuple(self.layers))), "1 inside the window")
        if words := self.texts[2:]:
            arrays["placebo_all"] = Trace(
                self.grid(self.controls()[2:]), (seed, Axis("paraphrase", words)), unit
            )
        if self.params.placebo == "windows" and words:
            placebo = self.grid(windows(self.depth, self.width, 2))
            arrays["placebo"] = Trace(placebo, (seed, window), unit)
        if self.screen is not None:
            what = "share of all layers' change of the predicted noise"
            arrays["screen"] = Trace(self.screen.astype(np.float32), (window,), what)
        if self.growth:
            shares = np.array([share for _, share in self.growth.values()], np.float32)
            sizes = Axis("size", tuple(map(str, self.growth)))
            arrays["growth"] = Trace(shares, (sizes,), "best window's share of the effect of all layers")
        return Result(arrays, self._values(), self._named_images(swaps))

    def _values(self) -> dict[str, Any]:
        plan, (best, share) = self.bench.plan, self.best()
        known = np.isfinite(share)
        values: dict[str, Any] = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "scheduler": plan.scheduler,
            "window": self.width,
            "total_effect": none_if_nan(self.total()),
            "placebo_floor": none_if_nan(self.floor()),
            "best_window": best.label if known else None,
            "best_share": none_if_nan(share),
            "best_layers": ",".join(self.layers[best.first : best.last + 1]) if known else None,
        }
        if self.screen is not None:
            values |= {"screen_rank_agreement": none_if_nan(self.agreement()), "order": self.order}
            values["screen_best_share"] = none_if_nan(self.luck())
        if self.growth:
            grown = (f"{size}: {label} ({share:.2f})" for size, (label, share) in self.growth.items())
            values["growth"] = ", ".join(grown)
        return values

    def _named_images(self, swaps: list[Swap]) -> dict[str, np.ndarray]:
        """Images by what they show: seed0-clean, seed0-all, seed0-placebo1, seed0-FIRST-LAST …"""
        named = {"clean": CLEAN, "all": self.everything}
        named |= {f"placebo{i + 1}": s for i, s in enumerate(self.controls()[2:])}
        named |= {s.label: s for s in swaps}
        named |= {f"placebo-{s.label}": s for s in self.wanted() if s.text > 1}
        return {
            image_name(f"seed{seed}", name): self.images[j, s]
            for j, seed in enumerate(self.seeds)
            for name, s in named.items()
            if (j, s) in self.images
        }


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, NaN left out; NaN where nothing is known."""
    known = np.isfinite(values).sum(0)
    return np.where(known > 0, np.nansum(values, 0) / np.maximum(known, 1), np.nan).astype(np.float32)


def none_if_nan(value: float) -> float | None:
    """The value, or None where there is none: JSON has no NaN."""
    return value if np.isfinite(value) else None

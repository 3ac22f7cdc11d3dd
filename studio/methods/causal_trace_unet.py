"""Causal mediation over UNet modules: corrupt the subject, restore one module's output at every step, score
the image.

Indirect effect of a module = score(restored) - score(corrupted). Diff-QuickFix, arXiv 2310.13730, section 3.
Direction `corrupt` is the counterpart: one module's corrupted output in the clean run, effect =
score(clean) - score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import rank_agreement, standard_error
from studio.methods.text_to_image import (
    NOISE,
    Bench,
    CorruptionInputs,
    SamplingParams,
    ScoreParams,
    check_corruption,
    corrupted_states,
    image_name,
    warn_lost_tokens,
)
from studio.registry import knob, method
from studio.types import Axis, Figure, Patch, Report, Result, Run, Site, Trace

KINDS = ("cross-attention", "self-attention", "resnet", "feed-forward")
SCREEN_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the trace is made."""

    noise: float = NOISE
    kinds: tuple[str, ...] = knob(KINDS, "kinds of modules", choices=(*KINDS, "stream"))
    window: int = knob(
        1, "neighbouring modules of one kind that are restored together", unit="modules", low=1, high=99
    )
    latents: str = knob(
        "own",
        "restore the clean run's own output, or what the clean text gives at the corrupted row's latents",
        choices=("own", "matched"),
        advanced=True,
    )
    direction: str = knob(
        "restore",
        "restore a module in the corrupted run, or corrupt it in the clean run",
        choices=("restore", "corrupt"),
        advanced=True,
    )
    first_step: int | None = knob(
        None, "first denoising step at which outputs are replaced, from 0", low=0, advanced=True
    )
    last_step: int | None = knob(
        None, "last denoising step at which outputs are replaced", low=0, advanced=True
    )
    screen: bool = knob(False, "only the quick screen: estimates from a few steps of one clean trajectory")
    hint: bool = knob(
        True, "show the screen before the exact cells, and report how well it ranks them", advanced=True
    )


def check(inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    check_corruption(inputs)
    if (
        params.first_step is not None
        and params.last_step is not None
        and params.first_step > params.last_step
    ):
        raise RequestError("--first-step must not come after --last-step.")


def site_labels(sites: list[Site]) -> tuple[str, ...]:
    """Full module names; `stream` is told from `resnet` where both are there."""
    both = {"stream", "resnet"} <= {s.kind for s in sites}
    return tuple(f"{s.layer} (stream)" if both and s.kind == "stream" else str(s.layer) for s in sites)


def kind_of(label: str) -> str:
    """The kind of a module by its label."""
    ends = {"attn2": "cross-attention", "attn1": "self-attention", "ff": "feed-forward", "(stream)": "stream"}
    return next((kind for end, kind in ends.items() if label.endswith(end)), "resnet")


def row_kinds(labels: tuple[str, ...], kinds: Sequence[str]) -> list[str]:
    """The kind of each label in a trace of these kinds: without `resnet` among them a block is its stream."""
    found = [kind_of(label) for label in labels]
    return ["stream" if k == "resnet" and "resnet" not in kinds else k for k in found]


def windows(sites: list[Site], width: int) -> list[list[Site]]:
    """For each site the neighbours of its own kind that are treated with it, itself in the centre."""
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    out = []
    for site in sites:
        row = by_kind[site.kind]
        i = row.index(site)
        out.append(row[max(0, i - (width - 1) // 2) : i + width // 2 + 1])
    return out


def layout(labels: tuple[str, ...], values: np.ndarray, asked: Sequence[str] = KINDS) -> dict[str, Any]:
    """Modules on a grid for the heat map: a row a kind, a column a place in the UNet. Cells without a
    module are NaN."""
    places, kinds = [], row_kinds(labels, asked)
    for label in labels:
        parts = label.replace(" (stream)", "").split(".")
        block = parts[0].removesuffix("_blocks").removesuffix("_block") + (
            f" {parts[1]}" if parts[0] != "mid_block" else ""
        )
        numbers = [int(p) for p in parts if p.isdigit()][0 if parts[0] == "mid_block" else 1 :]
        places.append((block, numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0))
    columns, rows = list(dict.fromkeys(places)), [k for k in (*KINDS, "stream") if k in kinds]
    blocks = list(dict.fromkeys(b for b, _, _ in columns))
    columns.sort(key=lambda p: (blocks.index(p[0]), p[1], p[2]))
    grid, names = np.full((len(rows), len(columns)), np.nan), [[""] * len(columns) for _ in rows]
    for label, place, kind, value in zip(labels, places, kinds, values, strict=True):
        r, c = rows.index(kind), columns.index(place)
        grid[r, c], names[r][c] = value, label
    deep = any(p[2] for p in columns)
    return {
        "rows": rows,
        "cols": [f"{b} · {i}.{j}" if deep else f"{b} · {i}" for b, i, j in columns],
        "values": grid,
        "names": names,
        "col_title": "place in the UNet, in execution order",
        "row_title": "",
    }


def draw(run: Run) -> Figure:
    """The heat map of indirect effects (of the screen when there is nothing else)."""
    arrays = run.result.arrays
    effect = arrays["screen"] if run.recipe.params["screen"] else arrays["indirect_effect"]
    data = layout(effect.axis("layer").labels, effect.values, run.recipe.params["kinds"])
    data["unit"] = effect.unit
    what = "screen" if run.recipe.params["screen"] else "indirect effect"
    return Figure("heat", data, title=f"{run.recipe.model}: {what}, “{run.recipe.inputs['prompt']}”")


@method(
    "trace-unet",
    title="Causal trace of the UNet",
    paper="arXiv:2310.13730",
    family="diffusion",
    summary="Which UNet modules carry a part of the prompt into the image.",
    needs={"cross_attention", "text_encoder"},
    inputs=CorruptionInputs,
    params=Params,
    draw=draw,
    check=check,
)
def trace_unet(
    model: Any, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`clean`, `corrupted` (seed), `restored` (seed, layer), `indirect_effect`, `indirect_effect_sem`
    (layer), `screen` (layer)."""
    bench = Bench.of(model, params, inputs.prompt, scorer, report)
    if (params.first_step or 0) >= bench.plan.steps:
        raise RequestError(
            f"--first-step {params.first_step} is past the last step, {bench.plan.steps - 1}; nothing would "
            "be replaced."
        )
    warn_lost_tokens(model, [inputs.prompt, *([inputs.replacement] if inputs.replacement else [])], report)
    trace = _Trace(bench, inputs, params, seeds)
    if params.screen and len(seeds) > 1:
        report.warn(
            f"The screen looks at one seed, {seeds[0]}; exact cells (without --screen) take all of them."
        )
    if params.screen or params.hint:
        report.plan(trace.screen_rows(), "screening")
        trace.take_screen()
        report.partial(trace.result())
    if not params.screen:
        report.plan(trace.exact_rows(report.rows), "tracing")
        for j in range(len(seeds)):
            trace.take_seed(j, report.rows)
        trace.verdict(report)
    return trace.result()


class _Trace:
    """The state of one trace: what is measured so far, and how the next rows are made."""

    def __init__(
        self, bench: Bench, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...]
    ) -> None:
        self.bench, self.inputs, self.params, self.seeds = bench, inputs, params, seeds
        model = bench.model
        self.sites = model.unet_sites(params.kinds)
        self.labels, self.windows = site_labels(self.sites), windows(self.sites, params.window)
        self.cond = corrupted_states(model, inputs, params.noise, seeds)
        shape = (len(seeds), len(self.sites))
        self.clean, self.corrupted = (
            np.full(len(seeds), np.nan, np.float32),
            np.full(len(seeds), np.nan, np.float32),
        )
        self.restored, self.screen = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        self.images: dict[str, np.ndarray] = {}
        last = params.last_step if params.last_step is not None else 10**6
        self.when = (
            None if params.first_step is None and params.last_step is None else (params.first_step or 0, last)
        )

    # ---- exact --------------------------------------------------------------------------------------------

    def batches(self, rows: int) -> list[list[int]]:
        """Cells of each batch; clean and corrupted rows come with the first, the row to copy from with
        every one."""
        cells, out = list(range(len(self.sites))), []
        matched = self.params.latents == "matched"
        while cells or not out:
            room = max(1, rows - 2 if not out else rows if matched else rows - 1)
            room = max(1, room // 2) if matched else room
            out.append(cells[:room])
            cells = cells[room:]
        return out

    def exact_rows(self, rows: int) -> int:
        """Rows times steps of the exact trace, for the progress bar."""
        per_seed = sum(len(self._worlds(k, b)) for k, b in enumerate(self.batches(rows)))
        return per_seed * len(self.seeds) * self.bench.plan.steps

    def _worlds(self, k: int, cells: list[int]) -> list[int]:
        """Which text states each row reads (0 clean, 1 corrupted): helper rows first, then a row a cell."""
        base = 0 if self.params.direction == "corrupt" else 1
        helpers = [0, 1] if not k else [] if self.params.latents == "matched" else [1 - base]
        return helpers + [base] * len(cells)

    def take_seed(self, j: int, rows: int) -> None:
        """All cells of one seed; partial results after every batch."""
        seed, source_world = self.seeds[j], 1 if self.params.direction == "corrupt" else 0
        clean_image = None
        for k, cells in enumerate(self.batches(rows)):
            worlds = self._worlds(k, cells)
            helpers, matched = len(worlds) - len(cells), self.params.latents == "matched"
            patches = []
            for i, cell in enumerate(cells):
                row = helpers + i
                source = len(worlds) + row if matched else worlds.index(source_world)
                patches += [
                    Patch(site, do="copy", value=source, rows=(row,), when=self.when)
                    for site in self.windows[cell]
                ]
            text = self.cond.rows([0 if w == 0 else j + 1 for w in worlds])
            shadow = self.cond.rows([0 if source_world == 0 else j + 1] * len(worlds)) if matched else None
            images = self.bench.images(text, [seed] * len(worlds), patches, shadow)
            if not k:
                clean_image = images[0]
                both = self.bench.score(images[:2], clean_image)
                self.clean[j], self.corrupted[j] = both
                self.images |= {
                    image_name(f"seed{seed}", "clean"): images[0],
                    image_name(f"seed{seed}", "corrupted"): images[1],
                }
            if cells:
                self.restored[j, cells] = self.bench.score(images[helpers:], clean_image)
                self.images |= {
                    image_name(f"seed{seed}", self.labels[c]): im
                    for c, im in zip(cells, images[helpers:], strict=True)
                }
            self.bench.report.partial(self.result())

    # ---- screen -------------------------------------------------------------------------------------------

    def screen_rows(self) -> int:
        """UNet rows of the screen: one guided clean trajectory and, at a few of its steps, every
        intervention."""
        steps = min(SCREEN_STEPS, self.bench.plan.steps)
        return self.bench.plan.steps + steps * (len(self.sites) + 2)

    def take_screen(self) -> None:
        """For the first seed: the share of the text's pull on the predicted noise that each module restores.

        At latents of the clean trajectory: <e_m - e_corrupted, e_clean - e_corrupted> / |e_clean -
        e_corrupted|^2, the mean over
        a few steps, conditional rows only.
        """
        from studio.models.sampling import trajectory

        model, plan, seed = self.bench.model, self.bench.plan, self.seeds[0]
        wanted = np.unique(np.linspace(0, plan.steps - 1, min(SCREEN_STEPS, plan.steps)).round().astype(int))
        if self.when:
            wanted = [i for i in wanted if self.when[0] <= i <= self.when[1]] or [self.when[0]]
        uncond = model.unconditional(1, plan)
        kept, final = {}, None
        for i, latents in trajectory(model, self.cond.rows([0]), uncond, [seed], plan):
            if i in wanted:
                kept[i] = latents
            final = latents
            self.bench.report.step(1 if i else 0)
        image = model.decode(final)
        self.images.setdefault(f"seed{seed}-clean", image[0])
        self.clean[0] = self.bench.score(image, image[0])[0]
        shares = np.stack([self._shares(latents, i, plan) for i, latents in kept.items()])
        self.screen[0] = shares.mean(0)

    def _shares(self, latents: Any, step: int, plan: Any) -> np.ndarray:
        """One share a cell at one step's latents."""
        import torch

        from studio.models.hooks import watch
        from studio.models.sampling import new_scheduler, raw_output
        from studio.models.sites import unet_module

        model, scheduler = self.bench.model, new_scheduler(self.bench.model, plan)
        t = scheduler.timesteps[step]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(step)
        x = scheduler.scale_model_input(latents, t)
        forwards = self.params.direction == "restore"
        out = []
        for start in range(0, len(self.sites), max(1, self.bench.report.rows - 2)):
            cells = range(start, min(len(self.sites), start + max(1, self.bench.report.rows - 2)))
            worlds = [0, 1] + [1 if forwards else 0] * len(cells)
            patches = [
                Patch(site, do="copy", value=0 if forwards else 1, rows=(2 + i,))
                for i, c in enumerate(cells)
                for site in self.windows[c]
            ]
            modules = {p.site: unet_module(model.unet, p.site) for p in patches}
            with torch.no_grad(), watch(modules, patches=patches):
                e = (
                    raw_output(model, x.expand(len(worlds), -1, -1, -1), t, self.cond.rows(worlds), plan)
                    .double()
                    .flatten(1)
                )
            pull = e[0] - e[1]
            moved = (e[2:] - e[1]) if forwards else (e[0] - e[2:])
            out.append((moved @ pull / pull.square().sum().clamp(min=1e-20)).cpu().numpy())
            self.bench.report.step(len(worlds))
        return np.concatenate(out)

    # ---- results ------------------------------------------------------------------------------------------

    def effects(self) -> np.ndarray:
        """(seed, layer) effects, NaN where a cell is not measured yet."""
        if self.params.direction == "corrupt":
            return self.clean[:, None] - self.restored
        return self.restored - self.corrupted[:, None]

    def verdict(self, report: Report) -> None:
        """Warns when clean and corrupted images hardly differ, since every effect is then small by force."""
        total = self.clean - self.corrupted
        least = {"clip": 0.01, "probability": 0.02, "distance": 0.005}[self.params.metric]
        if abs(float(total.mean())) < least:
            report.warn(
                f"Clean and corrupted images hardly differ in score ({float(total.mean()):.3g}), so the "
                f"effects say little; "
                "raise --noise, take another subject, or compare with --against."
            )

    def result(self) -> Result:
        """Everything measured so far."""
        effects = self.effects()
        done = ~np.isnan(effects).all(0)
        mean = np.full(len(self.sites), np.nan, np.float32)
        mean[done] = np.nanmean(effects[:, done], axis=0)
        sem = standard_error(effects)
        seed, layer = Axis("seed", tuple(map(str, self.seeds))), Axis("layer", self.labels)
        unit = self.bench.unit
        arrays = {
            "clean": Trace(self.clean, (seed,), unit),
            "corrupted": Trace(self.corrupted, (seed,), unit),
            "restored": Trace(self.restored, (seed, layer), unit),
            "indirect_effect": Trace(mean, (layer,), unit),
            "indirect_effect_sem": Trace(sem, (layer,), unit),
        }
        plan = self.bench.plan
        values: dict[str, Any] = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "scheduler": plan.scheduler,
            "noise": self.params.noise,
            "total_effect": float(np.nanmean(self.clean - self.corrupted))
            if np.isfinite(self.clean - self.corrupted).any()
            else None,
        }
        if not np.isnan(self.screen).all():
            arrays["screen"] = Trace(
                self.screen[0], (layer,), "share of the text's pull on the predicted noise"
            )
            for kind in dict.fromkeys(s.kind for s in self.sites):
                mine = np.array([s.kind == kind for s in self.sites])
                values[f"screen_rank_agreement {kind}"] = rank_agreement(
                    self.screen[0][mine], effects[0][mine]
                )
        return Result(arrays, values, dict(self.images))

"""Images from prompts, with or without edits: every other method starts from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import METRICS, Question, score
from studio.methods.text_to_image import (
    SamplingParams,
    ScoreParams,
    image_name,
    image_trace,
    stepper,
    warn_lost_tokens,
)
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace


@dataclass(frozen=True)
class Inputs:
    """What to draw."""

    prompt: tuple[str, ...] = knob(REQUIRED, "the text to draw", repeat=True, commas=False)
    negative: str | None = knob(None, "negative prompt, in place of the empty text of the unconditional row")


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How to draw."""

    height: int | None = knob(None, "height; default is the model's own", unit="pixels", low=8, high=4096)
    width: int | None = knob(None, "width; default is the model's own", unit="pixels", low=8, high=4096)
    metric: str | None = knob(
        None,
        "also score each image: clip, distance (to the first seed's image) or probability",
        choices=tuple(METRICS),
        advanced=True,
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses more images than anybody could look at."""
    if (n := len(inputs.prompt) * len(seeds)) > 4096:
        raise RequestError(f"{n} images in one run are too many; at most 4096, use `locus sweep` for more.")


def draw(run: Run) -> Figure:
    """A grid, one row a prompt, one column a seed (the first eight of each)."""
    images = run.result.arrays["images"]
    prompts, seeds = images.axis("prompt").labels, images.axis("seed").labels
    return Figure(
        "strip",
        {
            "images": [list(row[:8]) for row in images.values[:12]],
            "rows": list(prompts[:12]),
            "cols": [f"seed {s}" for s in seeds[:8]],
        },
        title=f"{run.recipe.model}",
    )


@method(
    "generate",
    title="Generate images",
    summary="Images from prompts, with or without edits.",
    paper="",
    family="diffusion",
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
)
def generate(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`images` (prompt, seed, height, width, channel) uint8; `scores` (prompt, seed) when a metric is asked
    for."""
    plan = model.plan(params)
    warn_lost_tokens(model, inputs.prompt, report)
    pairs = [(p, s) for p in range(len(inputs.prompt)) for s in seeds]
    report.plan(len(pairs) * plan.steps, "denoising")
    made = np.stack(_images(model, inputs, plan, pairs, report))
    made = made.reshape(len(inputs.prompt), len(seeds), plan.height, plan.width, 3)
    prompts, labels = Axis("prompt", inputs.prompt), Axis("seed", tuple(map(str, seeds)))
    arrays = {"images": image_trace(made, prompts, labels)}
    if params.metric:
        arrays["scores"] = Trace(_scores(made, inputs, params, scorer), (prompts, labels), params.metric)
    named = {
        image_name(f"prompt{p}", f"seed{s}"): made[p, j]
        for p in range(len(inputs.prompt))
        for j, s in enumerate(seeds)
    }
    values = {n: getattr(plan, n) for n in ("steps", "guidance", "scheduler", "height", "width")}
    return Result(arrays, values, named)


def _images(
    model: Any, inputs: Inputs, plan: Any, pairs: list[tuple[int, int]], report: Report
) -> list[np.ndarray]:
    """The image of each (prompt's number, seed), in batches."""
    from studio.models.sampling import denoise

    cond, _ = model.encode(inputs.prompt)
    images: list[np.ndarray] = []
    for start in range(0, len(pairs), report.rows):
        chunk = pairs[start : start + report.rows]
        uncond = model.unconditional(len(chunk), plan, inputs.negative)
        latents = denoise(
            model,
            cond.rows([p for p, _ in chunk]),
            uncond,
            [s for _, s in chunk],
            plan,
            on_step=stepper(report, len(chunk)),
        )
        images.extend(model.decode(latents))
    return images


def _scores(images: np.ndarray, inputs: Inputs, params: Params, scorer: Any) -> np.ndarray:
    rows = [
        score(
            params.metric,
            row,
            np.broadcast_to(row[0], row.shape),
            Question(params.target or text, params.against),
            scorer,
        )
        for text, row in zip(inputs.prompt, images, strict=True)
    ]
    return np.stack(rows)

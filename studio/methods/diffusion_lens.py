"""The diffusion lens: an image from each layer of the text encoder, its states taken as if that layer were
the last.

Diffusion Lens, arXiv 2403.05846.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.methods.text_to_image import SamplingParams, image_name, image_trace, stepper, warn_lost_tokens
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run


@dataclass(frozen=True)
class Inputs:
    """What to draw."""

    prompt: str = knob(REQUIRED, "the text to draw")


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams):
    """How to draw it."""


def draw(run: Run) -> Figure:
    """One row a seed, one column a layer."""
    images = run.result.arrays["images"]
    return Figure(
        "strip",
        {
            "images": [list(row) for row in images.values[:6]],
            "rows": [f"seed {s}" for s in images.axis("seed").labels[:6]],
            "cols": list(images.axis("layer").labels),
        },
        title=f"{run.recipe.model}: “{run.recipe.inputs['prompt']}” layer by layer",
    )


@method(
    "lens",
    title="Diffusion lens",
    paper="arXiv:2403.05846",
    family="diffusion",
    summary="What the text encoder knows after each of its layers, as images.",
    needs={"text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
)
def lens(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`images` (seed, layer, height, width, channel) uint8; layer 0 is the embedding, the last the whole
    encoder."""
    plan = model.plan(params)
    warn_lost_tokens(model, [inputs.prompt], report)
    states = model.lens(inputs.prompt)
    pairs = [(s, layer) for s in seeds for layer in range(len(states))]
    report.plan(len(pairs) * plan.steps, "denoising")
    made = np.concatenate(_images(model, states, plan, pairs, report))
    made = made.reshape(len(seeds), len(states), plan.height, plan.width, 3)
    labels = ("embedding", *(f"layer {i}" for i in range(1, len(states))))
    named = {
        image_name(f"seed{s}", label): made[j, i]
        for j, s in enumerate(seeds)
        for i, label in enumerate(labels)
    }
    images = image_trace(made, Axis("seed", tuple(map(str, seeds))), Axis("layer", labels))
    return Result({"images": images}, {"steps": plan.steps, "guidance": plan.guidance}, named)


def _images(
    model: Any, states: Any, plan: Any, pairs: list[tuple[int, int]], report: Report
) -> list[np.ndarray]:
    """Batches of images, one image each (seed, layer)."""
    from studio.models.sampling import denoise

    made = []
    for start in range(0, len(pairs), report.rows):
        chunk = pairs[start : start + report.rows]
        uncond = model.unconditional(1, plan)
        uncond = uncond.rows([0] * len(chunk)) if uncond is not None else None
        latents = denoise(
            model,
            states.rows([layer for _, layer in chunk]),
            uncond,
            [s for s, _ in chunk],
            plan,
            on_step=stepper(report, len(chunk)),
        )
        made.append(model.decode(latents))
    return made

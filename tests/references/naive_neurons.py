"""Neurons as one would write them first: prompt by prompt, unit by unit, constants put into outputs.

Nothing of studio's sampling loop, hooks, cached keys and values, or edits.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests.references.naive_locogen import states_of


def z_of(concept: Sequence[float], neutral: Sequence[float]) -> float:
    """Welch's statistic of one unit."""
    spread = statistics.variance(concept) / len(concept) + statistics.variance(neutral) / len(neutral)
    return (statistics.fmean(concept) - statistics.fmean(neutral)) / spread**0.5


@torch.no_grad()
def unit_outputs(pipe: Any, prompt: str, matrix: str, token: int) -> list[float]:
    """What the `to_k` or `to_v` of that name gives at one token of a prompt."""
    weight = pipe.unet.get_parameter(f"{matrix}.weight")
    state = states_of(pipe, prompt)[0, token]
    return [float(torch.dot(row.double(), state.double())) for row in weight]


@torch.no_grad()
def silenced_image(
    pipe: Any, constants: Mapping[str, Mapping[int, float]], prompt: str, seed: int, steps: int
) -> np.ndarray:
    """The image (H, W, 3) uint8 of a prompt while units, by matrix and number, give constants everywhere."""

    def put(units: Mapping[int, float]) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            for unit, value in units.items():
                output[..., unit] = value
            return output

        return hook

    handles = [pipe.unet.get_submodule(n).register_forward_hook(put(u)) for n, u in constants.items()]
    pipe.set_progress_bar_config(disable=True)
    try:
        made = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pil",
        )
    finally:
        for handle in handles:
            handle.remove()
    return np.asarray(made.images[0])

"""An audit and Fisher scores as one would write them first: a copy of the pipeline whose weights are really
changed, one image at a time through diffusers, scores and means in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from tests.references import naive_attribution


def edited(pipe: Any, deltas: Mapping[str, np.ndarray], strength: float = 1.0) -> Any:
    """A copy of the pipeline with the deltas added to its weights."""
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for name, delta in deltas.items():
            part, rest = name.split(".", 1)
            weight = getattr(other, part).get_parameter(rest)
            weight.copy_(weight + torch.from_numpy(delta) * strength)
    return other


def image(pipe: Any, prompt: str, seed: int, steps: int, guidance: float) -> np.ndarray:
    """One image (H, W, 3) uint8; DDIM."""
    plain = copy.copy(pipe)
    plain.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    plain.set_progress_bar_config(disable=True)
    made = plain(
        prompt,
        generator=torch.Generator("cpu").manual_seed(seed),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    )
    return (made.images[0] * 255).round().astype(np.uint8)


Scored = Callable[[np.ndarray, str], float]


def shares(
    pipe: Any,
    other: Any,
    prompts: Sequence[str],
    instead: Sequence[str],
    near: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    scored: Scored,
) -> tuple[float, float]:
    """(efficacy, leak): drops of the own text's score by the mean drop under the replacement."""
    drops, totals, leaks = [], [], []
    for prompt, swapped in zip(prompts, instead, strict=True):
        for seed in seeds:
            clean = scored(image(pipe, prompt, seed, steps, guidance), prompt)
            drops.append(clean - scored(image(other, prompt, seed, steps, guidance), prompt))
            totals.append(clean - scored(image(pipe, swapped, seed, steps, guidance), prompt))
    for prompt in near:
        for seed in seeds:
            clean = scored(image(pipe, prompt, seed, steps, guidance), prompt)
            leaks.append(clean - scored(image(other, prompt, seed, steps, guidance), prompt))
    total = sum(totals) / len(totals)
    return sum(drops) / len(drops) / total, sum(leaks) / len(leaks) / total


def fisher(
    pipe: Any,
    layers: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
) -> list[float]:
    """The mean squared gradient of the denoising loss of one image over the weights of each layer's keys and
    values, averaged over images."""
    totals = [0.0] * len(layers)
    for prompt in prompts:
        for seed in seeds:
            own = copy.deepcopy(pipe)
            for parameter in own.unet.parameters():
                parameter.requires_grad_(True)
            for term in naive_attribution.amplify_terms(own, prompt, seed, steps, guidance):
                term().backward()
            for i, layer in enumerate(layers):
                modules = [own.unet.get_submodule(f"{layer}.{name}") for name in ("to_k", "to_v")]
                squares = torch.cat([m.weight.grad.double().square().flatten() for m in modules])
                totals[i] += float(squares.mean())
    return [t / (len(prompts) * len(seeds)) for t in totals]

"""Component attribution as one would write it first: the trajectory starts again from noise for every step,
one step is differentiated at a time, a weight's effect is found by zeroing it and predicting again.

Written against diffusers' UNet and DDIM scheduler, without anything of studio's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler

Latents = tuple[torch.Tensor, int]


def states(pipe: Any, text: str) -> torch.Tensor:
    """Text states (1, T, D)."""
    ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt", truncation=True).input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def new_scheduler(pipe: Any, steps: int) -> DDIMScheduler:
    """DDIM of the pipeline's own noise schedule."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def noise_of(pipe: Any, z: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
    """The noise that the UNet predicts in latents z (1, C, h, w)."""
    out = pipe.unet(z, t, encoder_hidden_states=text).sample
    if pipe.scheduler.config.prediction_type == "v_prediction":
        alpha = float(pipe.scheduler.alphas_cumprod[t])
        return alpha**0.5 * out + (1 - alpha) ** 0.5 * z
    return out


@torch.no_grad()
def latents_at(pipe: Any, concept: str, seed: int, steps: int, guidance: float, stop: int) -> Latents:
    """(latents that step `stop` reads, its timestep), from noise on; the image's latents after the last."""
    scheduler = new_scheduler(pipe, steps)
    text, empty = states(pipe, concept), states(pipe, "")
    c = pipe.unet.config
    z = torch.randn(
        (1, c.in_channels, c.sample_size, c.sample_size),
        generator=torch.Generator("cpu").manual_seed(seed),
        dtype=pipe.unet.dtype,
    )
    for i, t in enumerate(scheduler.timesteps):
        if i == stop:
            return z, int(t)
        out = pipe.unet(z, t, encoder_hidden_states=text).sample
        if guidance > 1:
            free = pipe.unet(z, t, encoder_hidden_states=empty).sample
            out = free + guidance * (out - free)
        z = scheduler.step(out, t, z, return_dict=False)[0]
    return z, -1


Term = Callable[[], torch.Tensor]


def erase_terms(pipe: Any, concept: str, base: str, seed: int, steps: int, guidance: float) -> Sequence[Term]:
    """One function a step, which gives that step's |e(concept) - e(base)|^2 with e(base) held fixed."""

    def term(i: int) -> Term:
        z, t = latents_at(pipe, concept, seed, steps, guidance, i)
        with torch.no_grad():
            target = noise_of(pipe, z, t, states(pipe, base))
        return lambda: (noise_of(pipe, z, t, states(pipe, concept)) - target).square().sum()

    return [term(i) for i in range(steps)]


def amplify_terms(
    pipe: Any, concept: str, seed: int, steps: int, guidance: float, own: Sequence[torch.Tensor] = ()
) -> Sequence[Term]:
    """One function an image and step, which gives its share of the mean denoising loss on the concept's
    image, or on latents of images of a person's own."""
    images = own or [latents_at(pipe, concept, seed, steps, guidance, steps)[0]]
    generator = torch.Generator("cpu").manual_seed(seed + 2**32)

    def term(image: torch.Tensor, t: int) -> Term:
        noise = torch.randn(image.shape, generator=generator, dtype=image.dtype)
        alpha = float(pipe.scheduler.alphas_cumprod[t])
        z = alpha**0.5 * image + (1 - alpha) ** 0.5 * noise
        share = 1 / (steps * len(images))
        return lambda: (noise_of(pipe, z, t, states(pipe, concept)) - noise).square().mean() * share

    return [term(image, int(t)) for image in images for t in new_scheduler(pipe, steps).timesteps]


@torch.no_grad()
def image_latents(pipe: Any, image: Any) -> torch.Tensor:
    """Latents of a PIL image that has the model's size."""
    pixels = torch.tensor(list(image.tobytes()), dtype=pipe.vae.dtype).view(1, image.height, image.width, 3)
    scaled = pixels.permute(0, 3, 1, 2) / 255 * 2 - 1
    return pipe.vae.encode(scaled).latent_dist.mode() * pipe.vae.config.scaling_factor


def objective(terms: Sequence[Term]) -> float:
    """J of the present weights."""
    with torch.no_grad():
        return float(sum(term() for term in terms))


def attributions(pipe: Any, terms: Sequence[Term], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """w * dJ/dw of UNet parameters by name, a backward pass of its own for every term."""
    found = {}
    for name in names:
        w = pipe.unet.get_parameter(name)
        total = torch.zeros_like(w)
        for term in terms:
            w.requires_grad_(True)
            total += torch.autograd.grad(term(), w)[0]
            w.requires_grad_(False)
        found[name] = w.detach() * total
    return found


def decrease(pipe: Any, terms: Sequence[Term], name: str, mask: torch.Tensor, share: float = 1.0) -> float:
    """How much J falls when the masked weights lose `share` of their size."""
    w = pipe.unet.get_parameter(name)
    before, kept = objective(terms), w.detach().clone()
    with torch.no_grad():
        w[mask] *= 1 - share
    try:
        return before - objective(terms)
    finally:
        with torch.no_grad():
            w.copy_(kept)

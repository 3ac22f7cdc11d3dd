"""The UNet trace as one would write it first: one image at a time, a pass that keeps outputs, a pass that
puts one back.

Written against diffusers' pipeline, without anything of studio's sampling loop, hooks or batching.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def subject_states(pipe: Any, prompt: str, places: list[int], noise: float, seed: int) -> torch.Tensor:
    """Text states (1, T, D) of the prompt with noise on the embeddings of `places`, as the contract draws
    it."""
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt", truncation=True).input_ids
    table = pipe.text_encoder.get_input_embeddings()
    drawn = torch.randn(
        len(places), table.weight.shape[1], generator=torch.Generator("cpu").manual_seed(seed + 2**32)
    )

    def corrupt(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, places] += noise * table.weight.std() * drawn
        return output

    handle = table.register_forward_hook(corrupt)
    try:
        with torch.no_grad():
            return pipe.text_encoder(ids)[0]
    finally:
        handle.remove()


def image(pipe: Any, states: torch.Tensor, seed: int, steps: int, guidance: float) -> np.ndarray:
    """One uint8 image (H, W, 3) of text states through the pipeline itself."""
    negative = pipe.text_encoder(pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids)[0]
    out = pipe(
        prompt_embeds=states,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    )
    return (out.images[0] * 255).round().astype(np.uint8)


@torch.no_grad()
def restored_image(
    pipe: Any,
    names: list[str],
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    seed: int,
    steps: int,
    guidance: float,
    when: tuple[int, int] | None = None,
) -> np.ndarray:
    """The corrupted image with the conditional outputs of the modules `names` taken from the clean run at
    every step, or from the first to the last step of `when`."""
    kept: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    modules = {n: pipe.unet.get_submodule(f"{n}.conv2" if ".resnets." in f".{n}" else n) for n in names}
    handles = [
        m.register_forward_hook(lambda m, a, o, n=n: kept[n].append(o[1].clone())) for n, m in modules.items()
    ]
    image(pipe, clean, seed, steps, guidance)
    for handle in handles:
        handle.remove()

    def put_back(name: str) -> Any:
        queue = list(enumerate(kept[name]))

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            step, clean_output = queue.pop(0)
            if when is not None and not when[0] <= step <= when[1]:
                return output
            output = output.clone()
            output[1] = clean_output
            return output

        return hook

    handles = [m.register_forward_hook(put_back(n)) for n, m in modules.items()]
    try:
        return image(pipe, corrupted, seed, steps, guidance)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def screened_image(
    pipe: Any, name: str, clean: torch.Tensor, corrupted: torch.Tensor, seed: int, steps: int, guidance: float
) -> np.ndarray:
    """The corrupted image with the conditional output of module `name` taken from the clean run, its
    unconditional predictions continued from those of the clean and the corrupted run: one row at a time."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    negative = pipe.text_encoder(pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids)[0]
    module, size = pipe.unet.get_submodule(name), pipe.unet.config.sample_size
    generator = torch.Generator("cpu").manual_seed(seed)
    z1 = z0 = z = torch.randn((1, 4, size, size), generator=generator) * scheduler.init_noise_sigma

    def at(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return pipe.unet(latents, t, encoder_hidden_states=text).sample

    for t in scheduler.timesteps:
        free1, free0 = at(z1, negative), at(z0, negative)
        kept: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o))
        text1 = at(z1, clean)
        handle.remove()
        text0 = at(z0, corrupted)
        handle = module.register_forward_hook(lambda m, a, o, kept=kept: kept[0])
        text = at(z, corrupted)
        handle.remove()
        line, change, off = (x.flatten() for x in (z1 - z0, free1 - free0, z - z0))
        free = free0
        if line.norm() > 0:
            share, slope = (off @ line) / (line @ line), (change @ line) / (line @ line)
            free = free0 + (share * change + slope * (off - share * line)).view_as(free0)
        new = []
        for latents, a, b in ((z1, free1, text1), (z0, free0, text0), (z, free, text)):
            new.append(scheduler.step(a + guidance * (b - a), t, latents).prev_sample)
        z1, z0, z = new
    pixels = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5
    return (pixels.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)

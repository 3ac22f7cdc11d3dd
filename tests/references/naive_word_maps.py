"""Word maps as one would write them first: diffusers' own pipeline with unfused attention, one seed at a
time, every probability kept, and loops over layers, steps and heads.

Written without anything of studio's sampling loop, hooks or batching.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.functional import interpolate


def kept_probabilities(
    pipe: Any, prompt: str, seed: int, steps: int, guidance: float, **size: int
) -> dict[str, list[torch.Tensor]]:
    """{layer: one (heads, positions, tokens) a step} of the conditional row."""
    kept: dict[str, list[torch.Tensor]] = {}
    processors = dict(pipe.unet.attn_processors)
    modules = {n: m for n, m in pipe.unet.named_modules() if n.endswith("attn2")}

    def unfused(name: str, module: Any) -> None:
        own = module.get_attention_scores

        def scores(*args: Any) -> torch.Tensor:
            found = own(*args)  # (rows x heads, positions, tokens), the conditional row last
            kept.setdefault(name, []).append(found[-module.heads :].clone())
            return found

        module.get_attention_scores = scores

    pipe.unet.set_attn_processor(AttnProcessor())
    for name, module in modules.items():
        unfused(name, module)
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
        pipe(prompt, output_type="latent", **options, **size)
    finally:
        pipe.unet.set_attn_processor(processors)
        for module in modules.values():
            del module.get_attention_scores
    return kept


def word_map(kept: dict[str, list[torch.Tensor]], places: list[int], height: int, width: int) -> torch.Tensor:
    """The mean map (height, width) of tokens over heads, layers and steps at the size of the latents."""
    singles = []
    for steps in kept.values():
        for step in steps:
            for head in step:
                for place in places:
                    tall, wide = height, width
                    while tall * wide != len(head):
                        tall, wide = (tall + 1) // 2, (wide + 1) // 2
                    grid = head[:, place].reshape(1, 1, tall, wide)
                    singles.append(interpolate(grid, (height, width), mode="bilinear")[0, 0] / len(step))
    layers, calls = len(kept), len(next(iter(kept.values())))
    return torch.stack(singles).sum(0) / (layers * calls * len(places))

"""LocoGen as one would write it first: one image at a time through diffusers' own pipeline, with the forward
of each cross-attention layer of the window wrapped so that the conditional row reads another prompt.

Nothing of studio's sampling loop, hooks, cached keys and values, or batching.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch


def states_of(pipe: Any, prompt: str) -> torch.Tensor:
    """Text states (1, T, D) of a prompt, as the pipeline makes them."""
    return pipe.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]


@torch.no_grad()
def altered_image(
    pipe: Any, names: Sequence[str], prompt: str, other: str, seed: int, steps: int, guidance: float
) -> np.ndarray:
    """The image (H, W, 3) uint8 of `prompt` with the layers `names` reading `other`; DDIM."""
    foreign, modules = states_of(pipe, other), [pipe.unet.get_submodule(n) for n in names]

    def wrap(module: torch.nn.Module) -> Any:
        plain = module.forward

        def forward(hidden: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
            states = encoder_hidden_states.clone()
            states[-1] = foreign[0]  # the conditional row comes last, alone when nothing is guided
            return plain(hidden, encoder_hidden_states=states, **rest)

        return forward

    own = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    try:
        for module in modules:
            module.forward = wrap(module)
        made = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pil",
        )
    finally:
        pipe.scheduler = own
        for module in modules:
            del module.forward
    return np.asarray(made.images[0])

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

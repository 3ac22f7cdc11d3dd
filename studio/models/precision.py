"""The number type that each kind of work is done in: half precision where rounding stays below what is
measured, float32 where it does not, float64 inside closed forms. The one place that decides.

With `--dtype bfloat16` or `float16` the UNet, the autoencoder and the blocks of a language model hold their
weights and compute in that type. Islands stay in float32: text encoders, latents and the scheduler's steps,
guidance, attention against clean keys, logits, scores. Solvers, statistics and sums of components are float64
in the files that make them. What was measured stands in assets/docs/gpu.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HALVES = ("float16", "bfloat16")
ISLANDS = ("text_encoder", "text_encoder_2")  # parts of a pipeline that are always float32
FLOAT32_KINDS = {
    "vision": "its components have to add up to the representation",
    "clip": "a score must not depend on the generator's number type",
}
SAVED = "the {} that it makes is computed from the weights themselves"


def held_as(kind: str, dtype: str) -> str:
    """The number type that a model of a kind (diffusion, clip, vision, language) is held in when `dtype` is
    asked for."""
    return "float32" if kind in FLOAT32_KINDS and dtype in HALVES else dtype


def computed_in(method: Any, dtype: str) -> tuple[str, str]:
    """(the number type that a declared method runs in when `dtype` is asked for, the reason or "")."""
    if dtype not in HALVES:
        return dtype, ""
    reason = FLOAT32_KINDS.get(method.family, "")
    if not reason and method.saves:
        reason = SAVED.format(method.saves)
    if not reason:
        return dtype, ""
    return "float32", f"{method.title} was computed in float32, not in {dtype}: {reason}."


def loop_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number type of latents and schedulers beside a UNet in `dtype`: at least float32, since every step
    adds its rounding to those before."""
    import torch

    return torch.promote_types(dtype, torch.float32)


def part_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What diffusers is told of a pipeline's parts: `dtype`, text encoders at least float32."""
    return {"default": dtype, **dict.fromkeys(ISLANDS, loop_dtype(dtype))}

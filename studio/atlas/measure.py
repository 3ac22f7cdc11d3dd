"""`python -m studio.atlas.measure NAME`: the shipped model's acceptance figures, measured again, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio.models.catalog import ASSETS

SHIPPED = ASSETS / "atlas"


def measure(name: str, n: int = 200) -> dict[str, Any]:
    """Figures of `judge`, `atlas-clip` or `atlas-sd`, on held-out combinations."""
    if name == "judge":
        return _judge(n * 10)
    if name == "atlas-clip":
        return _clip(n * 10)
    if name == "atlas-sd":
        return _diffusion(n)
    raise SystemExit(f"There is no Atlas model {name!r}; known: judge, atlas-clip, atlas-sd.")


def _judge(n: int) -> dict[str, float]:
    from studio.atlas.judge import load_judge, read_attributes
    from studio.atlas.render import render
    from studio.atlas.world import ATTRIBUTES, draw_scenes

    scenes = draw_scenes(n, np.random.default_rng(5), emblems=0, held=True)
    read = read_attributes(load_judge(SHIPPED / "judge" / "model.safetensors"), render(scenes))
    return dict(zip(ATTRIBUTES, (read == scenes.labels()).mean(0).tolist(), strict=True))


def _clip(n: int) -> dict[str, float]:
    from transformers import CLIPTokenizer

    from studio.atlas.contrast import zero_shot
    from studio.models.loading import locate
    from studio.models.vision import ClipModel

    clip = ClipModel(locate("atlas-clip"), "cpu")
    return zero_shot(clip.net, CLIPTokenizer.from_pretrained(SHIPPED / "atlas-clip"), n, seed=77)


def _diffusion(n: int) -> dict[str, float]:
    from diffusers import StableDiffusionPipeline

    from studio.atlas.denoiser import measure_pipeline
    from studio.atlas.judge import load_judge

    pipe = StableDiffusionPipeline.from_pretrained(
        Path(SHIPPED / "atlas-sd"), dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    return measure_pipeline(pipe, load_judge(SHIPPED / "judge" / "model.safetensors"), n)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else "atlas-sd"), indent=1))

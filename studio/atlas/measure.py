"""`python -m studio.atlas.measure NAME`: the shipped model's acceptance figures, measured again, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio.atlas.render import render
from studio.atlas.vision_models import RECIPES, features, load_vision, pixels
from studio.atlas.world import ATTRIBUTES, Scenes, draw_scenes
from studio.models.catalog import ASSETS

SHIPPED = ASSETS / "atlas"


def measure(name: str, n: int = 200) -> dict[str, Any]:
    """Figures of an Atlas model, on held-out combinations: what the judge reads, zero-shot accuracy of
    atlas-clip, what the judge reads from atlas-sd's pictures, linear probes of an image model, answers of a
    language model."""
    if name == "judge":
        return _judge(n * 10)
    if name == "atlas-clip":
        return _clip(n * 10)
    if name == "atlas-sd":
        return _diffusion(n)
    if name in RECIPES:
        return _vision(name, n * 10)
    if name in ("atlas-llama", "atlas-phi"):
        return _language(name, n * 5)
    known = ", ".join(("judge", "atlas-clip", "atlas-sd", *RECIPES, "atlas-llama", "atlas-phi"))
    raise SystemExit(f"There is no Atlas model {name!r}; known: {known}.")


def _judge(n: int) -> dict[str, float]:
    from studio.atlas.judge import load_judge, read_attributes

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


def _language(name: str, n: int) -> dict[str, float]:
    from studio.atlas.language import load_language, measure_language

    if not (SHIPPED / name).exists():
        raise SystemExit(f"{name} has not been trained yet: python -m studio.atlas.train {name}.")
    return measure_language(*load_language(SHIPPED / name), n)


def _vision(name: str, n: int) -> dict[str, float]:
    net = load_vision(SHIPPED / name)
    if net is None:
        raise SystemExit(f"{name} has not been trained yet: python -m studio.atlas.train {name}.")
    return linear_probe(net, n)


def linear_probe(net: torch.nn.Module, n: int = 2000, seed: int = 41) -> dict[str, float]:
    """Accuracy by attribute, on `n` renderings of held-out combinations, of multinomial logistic regressions
    on the frozen pooled features of `net`, fitted on twice as many renderings of the others."""
    rng = np.random.default_rng(seed)
    learn, test = draw_scenes(2 * n, rng, emblems=0), draw_scenes(n, rng, emblems=0, held=True)
    x, z = _features(net, learn), _features(net, test)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / deviation, (z - mean) / deviation
    right = {}
    for name in ATTRIBUTES:
        weight = _logistic(x, torch.from_numpy(getattr(learn, name)), len(ATTRIBUTES[name]))
        found = (z @ weight[:-1] + weight[-1]).argmax(1).numpy()
        right[name] = float((found == getattr(test, name)).mean())
    return right


@torch.no_grad()
def _features(net: torch.nn.Module, scenes: Scenes) -> torch.Tensor:
    """(N, D) float64 pooled features of the scenes' renderings."""
    parts = np.array_split(render(scenes), max(1, len(scenes) // 250))
    return torch.cat([features(net, pixels(part)) for part in parts]).double()


def _logistic(x: torch.Tensor, labels: torch.Tensor, classes: int, decay: float = 1e-3) -> torch.Tensor:
    """(D + 1, classes) weights, the last row the bias, of a multinomial logistic regression fitted by L-BFGS
    to x (N, D) with `decay` / 2 times the squared norm of the weights."""
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], labels)
        loss = loss + 0.5 * decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach()


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

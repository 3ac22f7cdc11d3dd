"""What three ways of looking say of the cross-attention layers that read a concept: LocoGen's direct effects,
Fisher score and weight magnitude of their keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from studio.measure import nested_bootstrap
from studio.methods import locogen
from studio.methods.direct_effect import Search, mean_known, windows
from studio.methods.text_to_image import Bench, Inner
from studio.types import Axis, Trace


@dataclass(frozen=True, eq=False)
class LayerMap:
    """`layers` in execution order; layers (first .. last) by window; direct effect, its interval (low, high)
    and the placebo of each window, up being where the swap of all layers goes; Fisher score and magnitude of
    each layer."""

    layers: tuple[str, ...]
    windows: Mapping[str, tuple[int, ...]]
    effect: np.ndarray
    bounds: np.ndarray
    placebo: np.ndarray
    unit: str
    fisher: np.ndarray
    magnitude: np.ndarray

    @property
    def width(self) -> int:
        """Layers in a window."""
        return len(next(iter(self.windows.values())))

    @property
    def best(self) -> str:
        """The window with the largest direct effect."""
        return list(self.windows)[int(np.argmax(self.effect))]

    def arrays(self) -> dict[str, Trace]:
        """Everything under its axes, float32."""
        window, layer = (Axis("window", tuple(self.windows)),), (Axis("layer", self.layers),)
        found = {
            "direct_effect": (self.effect, window, self.unit),
            "direct_effect_low": (self.bounds[0], window, f"{self.unit}, lower end of the 95 % interval"),
            "direct_effect_high": (self.bounds[1], window, f"{self.unit}, upper end of the 95 % interval"),
            "placebo": (self.placebo, window, self.unit),
            "fisher": (self.fisher, layer, "mean squared gradient of the denoising loss"),
            "magnitude": (self.magnitude, layer, "mean absolute weight"),
        }
        return {n: Trace(np.asarray(v, np.float32), axes, unit) for n, (v, axes, unit) in found.items()}


def layer_map(
    bench: Bench, prompts: Sequence[str], replaced: Sequence[str], seeds: tuple[int, ...]
) -> LayerMap:
    """The map of a concept over pairs of prompts, with it and without."""
    bench = replace(bench, report=Inner(bench.report))
    found = [_search(bench, *pair, seeds) for pair in zip(prompts, replaced, strict=True)]
    first, sign = found[0], np.sign(sum(s.total() for s in found)) or 1.0
    swaps, decoys = (windows(first.depth, first.width, text) for text in (1, 2))
    effects = [sign * s.effects(swaps) for s in found]
    placebo = np.mean([sign * mean_known(s.effects(decoys)) for s in found], axis=0)
    mean = np.mean([mean_known(e) for e in effects], axis=0)
    unit = f"decrease of the {first.bench.unit}"
    places = {s.label: tuple(range(s.first, s.last + 1)) for s in swaps}
    scores = layer_scores(bench, prompts, first.layers, seeds)
    bounds = np.stack(nested_bootstrap(effects))
    return LayerMap(tuple(first.layers), places, mean, bounds, placebo, unit, *scores)


def _search(bench: Bench, prompt: str, other: str, seeds: tuple[int, ...]) -> Search:
    """LocoGen of one pair of prompts, every window and its placebo measured."""
    params = bench.params
    chosen = locogen.Params(
        steps=params.steps,
        guidance=params.guidance,
        scheduler=params.scheduler,
        metric=params.metric,
        against=params.against or (other if params.metric == "clip" else None) or None,
        window=params.window,
        placebo="windows",
    )
    own = Bench.of(bench.model, chosen, prompt, bench.scorer, bench.report)
    words = (prompt, other, locogen.paraphrases(prompt)[0])
    search = Search(own, words, chosen, seeds)
    search.confirm()
    return search


def layer_scores(
    bench: Bench, prompts: Sequence[str], layers: Sequence[str], seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(Fisher score, magnitude) of every layer, means over the weights of its keys and values: the squared
    gradient of the denoising loss on one image of the concept, averaged over prompts and seeds, and the
    absolute weight."""
    from studio.methods.component_attribution import Params
    from studio.models.objectives import Objective, differentiable

    plan, squares = bench.plan, np.zeros(len(layers))
    sampling = {n: getattr(plan, n) for n in ("steps", "guidance", "scheduler")}
    chosen = Params(**sampling, objective="amplify", components=("to_k", "to_v"))
    for prompt in prompts:
        for seed in seeds:
            inputs = SimpleNamespace(concept=prompt, base="")
            objective = Objective(bench.model, inputs, chosen, [seed], bench.report)
            bench.report.plan(objective.rows(), "Fisher score")
            with differentiable(objective.weights):
                objective.take_seed(0)
            sums = {
                w.name: float(g.double().square().sum())
                for w, g in zip(objective.weights, objective.gradients, strict=True)
            }
            squares += _by_layer(sums, objective.weights, layers)
    absolute = {w.name: float(w.tensor.detach().double().abs().sum()) for w in objective.weights}
    return squares / (len(prompts) * len(seeds)), _by_layer(absolute, objective.weights, layers)


def _by_layer(sums: Mapping[str, float], weights: Sequence[Any], layers: Sequence[str]) -> np.ndarray:
    """Sums by parameter name as means over each layer's weights."""
    own = [[w for w in weights if w.name.startswith(f"unet.{layer}.")] for layer in layers]
    return np.array([sum(sums[w.name] for w in ws) / sum(w.tensor.numel() for w in ws) for ws in own])

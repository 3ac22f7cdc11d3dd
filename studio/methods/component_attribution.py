"""Component attribution: which weights of the UNet carry a concept and which suppress it.

alpha = w * dJ/dw, the first-order estimate of how much J falls when a weight is zeroed, summed within a
component: CAD, arXiv 2412.02542. J is defined in models/objectives.py, what an edit ablates in
component_ablation.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files, read_images
from studio.measure import METRICS, standard_error
from studio.methods.component_ablation import SCOPES, mask_edit, masks, ranked_share, ranks, unpack, zeroed
from studio.methods.concept_pairs import warn_spelled
from studio.methods.text_to_image import Bench, SamplingParams, ScoreParams, image_name, warn_lost_tokens
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Edit, Figure, Report, Result, Run, Trace

COMPONENTS = ("feed-forward", "to_k", "to_v")
BARS = 30
MOST_IMAGES = 100  # of a person; each is kept with its noise at every step


@dataclass(frozen=True)
class Inputs:
    """The concept, and what is left without it."""

    concept: str = knob(REQUIRED, 'prompt that shows the concept, for example "star"')
    base: str = knob("", "neutral prompt that the concept is set against; default the empty prompt")
    images: tuple[str, ...] | None = knob(
        None,
        "images of the concept, or folders of them, for the objective amplify; default those that the model "
        "makes",
        commas=False,
        paths=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How components are attributed."""

    guidance: float = knob(
        3.0, "guidance scale; 1 or less runs without the unconditional row", low=0, high=100
    )
    granularity: str = knob(
        "layer",
        "a component: unit (one row of a weight matrix), layer (one matrix), module (one feed-forward or "
        "attention module)",
        choices=("unit", "layer", "module"),
    )
    objective: str = knob(
        "erase",
        "erase: what sets the concept apart from the base; amplify: the denoising loss on images of it",
        choices=("erase", "amplify"),
    )
    components: tuple[str, ...] = knob(
        ("feed-forward",),
        "weights that count; to_k and to_v are those of cross-attention",
        choices=COMPONENTS,
    )
    scope: str = knob(
        "row", "where weights compete for being ablated: in their row, their matrix, or all", choices=SCOPES
    )
    ratio: float = knob(
        0.001, "share of the weights that the edit ablates, rounded up; 0 makes no edit", low=0, high=1
    )
    check: int = knob(
        16, "random ablations whose true effect is set beside the predicted one", low=0, high=10_000
    )
    check_ratio: float = knob(
        0.001, "share of the weights in each random ablation", low=1e-6, high=1, advanced=True
    )
    preview: bool = knob(False, "also draw the concept with the edit laid over")
    metric: str | None = knob(
        None,
        "score the images without and with the edit: clip, distance or probability",
        choices=tuple(METRICS),
        advanced=True,
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    if inputs.concept.strip() == inputs.base.strip():
        raise RequestError("--concept and --base are the same text, so nothing sets them apart.")
    if inputs.images is not None:
        if params.objective != "amplify":
            raise RequestError("--images are for amplify alone; take --objective amplify, or leave them out.")
        if (n := len(image_files(inputs.images)[0])) > MOST_IMAGES:
            raise RequestError(f"--images: {n} are too many; at most {MOST_IMAGES} are taken.")
    if (params.preview or params.metric) and params.ratio == 0:
        raise RequestError("--ratio 0 makes no edit, so there is nothing to preview; give a larger one.")


def unsaved(params: Params) -> str:
    """Why no edit would be made."""
    return "" if params.ratio else "--save needs an edit, and --ratio 0 makes none; give a larger one."


def short(label: str) -> str:
    """A component's label as it stands beside its bar, "up 1.0 ff.0[12]": block, attention, layer if there
    are several, what is left of the name."""
    pattern = r"unet\.(\w+?)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.(.*)"
    if not (parts := re.fullmatch(pattern, label)):
        return label
    block, number, attention, layer, rest = parts.groups()
    place = ".".join(n for n in (number, attention, layer if layer != "0" else None) if n is not None)
    return f"{block} {place} {rest}".replace(".weight", "").replace(".net.0.proj", ".0").replace(".net.", ".")


def draw(run: Run) -> Figure:
    """Bars of the components in execution order; of many the largest carriers and suppressors, sorted."""
    found = run.result.arrays["attribution"]
    order = np.arange(len(found.values))
    if len(order) > BARS:
        order = np.argsort(-found.values, kind="stable")
        order = np.concatenate([order[: BARS - BARS // 3], order[len(order) - BARS // 3 :]])
    labels = found.axis("component").labels
    data = {
        "labels": [short(labels[i]) for i in order],
        "values": found.values[order],
        "errors": run.result.arrays["attribution_sem"].values[order],
        "unit": found.unit,
        "names": [labels[i] for i in order],
    }
    goal = "carries" if run.recipe.params["objective"] == "erase" else "hinders"
    title = f"{run.recipe.model}: what {goal} “{run.recipe.inputs['concept']}” (+) and the opposite (−)"
    return Figure("bars", data, title=title)


@method(
    "attribute",
    title="Components of a concept",
    paper="arXiv:2412.02542",
    family="diffusion",
    summary="Which weights of the UNet carry a concept and which suppress it, and an edit that ablates them.",
    needs={"cross_attention"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    saves="edit file",
    unsaved=unsaved,
)
def attribute(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`attribution`, `attribution_sem`, `parameters` (component), `objective` (seed), `predicted`, `actual`,
    `actual_base_too` (ablation), `weight_rank` (row, column) uint8; the edit."""
    warn_lost_tokens(model, [inputs.concept, inputs.base], report)
    warn_spelled(model, (inputs.concept, inputs.base), report)
    work = _Attribution(model, inputs, params, seeds, report)
    work.take_gradients()
    work.make_edit()
    work.intervene()
    if params.preview or params.metric:
        work.draw_preview(scorer)
    return work.result()


class _Attribution:
    """One attribution: what is known so far, and how more is found out."""

    def __init__(
        self, model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], report: Report
    ) -> None:
        from studio.models.objectives import Objective, component_axis

        self.model, self.inputs, self.params, self.seeds, self.report = model, inputs, params, seeds, report
        self.objective = Objective(model, inputs, params, seeds, report, self._own_images())
        self.axis, self.counts = component_axis(self.objective.weights, params.granularity)
        self.by_seed = np.full((len(seeds), len(self.counts)), np.nan)
        self.before = np.full(2, np.nan)
        self.arrays: dict[str, Trace] = {}
        self.values: dict[str, Any] = {}
        self.images: dict[str, np.ndarray] = {}
        self.edit: Edit | None = None

    def _own_images(self) -> list[Any]:
        """Latents of the person's images, none where the model's own are taken."""
        from studio.models.objectives import image_latents

        files = image_files(self.inputs.images)[0] if self.inputs.images else []
        plan = self.model.plan(self.params)
        return [image_latents(self.model, pixels, plan) for pixels in read_images(files, self.report.warn)]

    def take_gradients(self) -> None:
        """J, its gradient and the concept's image, seed after seed."""
        from studio.models.objectives import differentiable

        self.report.plan(self.objective.rows(), "attributing")
        before = 0.0
        with differentiable(self.objective.weights):
            for j, seed in enumerate(self.seeds):
                latents = self.objective.take_seed(j)
                now = self.objective.attributions()
                self.by_seed[j], before = (now - before) * len(self.seeds), now
                self.images[image_name(f"seed{seed}", "concept")] = self.model.decode(latents)[0]
                self.report.partial(self.result())
        self.values["forwards"] = self.objective.forwards

    def make_edit(self) -> None:
        """The edit of the ratio asked for; the ranks for any other where there is room; what it does to J."""
        import torch

        alphas, params = self.objective.alphas(), self.params
        if share := ranked_share(alphas):
            self.arrays["weight_rank"] = ranks(alphas, params.scope, share)
            self.values |= {"matrices": list(alphas), "ranked_to": share}
        if params.ratio == 0:
            return
        how = {"scope": params.scope, "objective": params.objective}
        note = {"concept": self.inputs.concept, "base": self.inputs.base}
        self.edit = mask_edit(self.model, alphas, params.ratio, **how, **note)
        bits = masks(alphas, params.ratio, params.scope)
        taken = {n: torch.from_numpy(unpack(b, alphas[n].shape)) for n, b in bits.items()}
        self.values["ablated_weights"] = sum(int(t.sum()) for t in taken.values())
        self.report.plan(2 * self.objective.measuring_rows(), "ablating")
        self.before = self.objective.measured()
        predicted, (fixed, too) = self._ablate(alphas, taken)
        self.values["decrease"] = {"predicted": predicted, "base_fixed": fixed, "base_too": too}
        if (too if params.objective == "erase" else fixed) < 0:
            self.report.warn(
                "The ablated weights raise the objective instead of lowering it: so many are past what a "
                "first-order estimate can tell; take a smaller --ratio."
            )
        self.report.partial(self.result())

    def _ablate(self, alphas: dict[str, Any], taken: dict[str, Any]) -> tuple[float, np.ndarray]:
        """(predicted, true) decrease of J when these weights (bool masks) are zero."""
        predicted = sum(float(alphas[n][t.to(alphas[n].device)].double().sum()) for n, t in taken.items())
        with zeroed(self.model, taken):
            return predicted, self.before - self.objective.measured()

    def intervene(self) -> None:
        """Predicted and true decreases of J for random ablations, and how they correlate."""
        import torch

        if not (n := self.params.check):
            return
        alphas = self.objective.alphas()
        generator = torch.Generator("cpu").manual_seed(self.seeds[0] + 2**33)
        self.report.plan((n + 1) * self.objective.measuring_rows(), "checking the prediction")
        self.before = self.objective.measured()
        rows = np.full((n, 3), np.nan)
        for k in range(n):
            taken = {
                name: torch.rand(a.shape, generator=generator) < self.params.check_ratio
                for name, a in alphas.items()
            }
            rows[k, 0], rows[k, 1:] = self._ablate(alphas, taken)
            axis = (Axis("ablation", tuple(map(str, range(k + 1)))),)
            for i, name in enumerate(("predicted", "actual", "actual_base_too")):
                if np.isfinite(rows[k, i]):
                    self.arrays[name] = Trace(rows[: k + 1, i].astype(np.float32), axis, "decrease of J")
            self.values["correlation"] = correlation(rows[: k + 1, 0], rows[: k + 1, 1])
            self.values["correlation_base_too"] = correlation(rows[: k + 1, 0], rows[: k + 1, 2])
            self.report.partial(self.result())

    def draw_preview(self, scorer: Any) -> None:
        """The concept's images with the edit laid over, and the scores of both when a metric is asked for."""
        from studio.edits import overlay

        bench = Bench.of(self.model, self.params, self.inputs.concept, scorer, self.report)
        self.report.plan(len(self.seeds) * bench.plan.steps, "drawing with the edit")
        names = [image_name(f"seed{s}", "concept") for s in self.seeds]
        made: list[np.ndarray] = []
        with overlay(self.model, [self.edit]):
            for start in range(0, len(self.seeds), self.report.rows):
                some = self.seeds[start : start + self.report.rows]
                made += list(bench.images(self.objective.cond.rows([0] * len(some)), some))
        for seed, image in zip(self.seeds, made, strict=True):
            self.images[image_name(f"seed{seed}", "ablated")] = image
        if self.params.metric:
            axis = (Axis("seed", tuple(map(str, self.seeds))),)
            clean = np.stack([self.images[n] for n in names])
            for name, images in (("clean", clean), ("ablated", np.stack(made))):
                self.arrays[name] = Trace(bench.score(images, clean), axis, bench.unit)

    def result(self) -> Result:
        """Everything found so far."""
        plan, done = self.objective.plan, ~np.isnan(self.by_seed).all(1)
        found = self.by_seed[done]
        erase = self.params.objective == "erase"
        unit = "decrease of squared noise distance" if erase else "decrease of denoising loss"
        arrays = {
            "attribution": Trace(found.mean(0).astype(np.float32), (self.axis,), unit),
            "attribution_sem": Trace(standard_error(found), (self.axis,), unit),
            "parameters": Trace(self.counts, (self.axis,), "weights"),
            "objective": Trace(
                self.objective.values.astype(np.float32), (Axis("seed", tuple(map(str, self.seeds))),), "J"
            ),
        }
        values: dict[str, Any] = {n: getattr(plan, n) for n in ("steps", "guidance", "scheduler")}
        if self.objective.own:
            values["own_images"] = len(self.objective.own)
        return Result(arrays | self.arrays, values | self.values, dict(self.images), self.edit)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; NaN for under three pairs, or when one of both does not vary."""
    if len(a) < 3 or not np.isfinite(a + b).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

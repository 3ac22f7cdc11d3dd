"""Closed-form edits of a text-to-image model: quickfix, locoedit or uce, solved at once, with images before
and after. What each writes where stands in quickfix.py, locoedit.py and uce.py; the solver in edits.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studio.edits import CLOSED_FORMS, LowRank, Pairs, overlay, parameters_of, product, solved
from studio.errors import RequestError, StudioError
from studio.measure import METRICS, Question, score
from studio.methods import locoedit, quickfix, uce
from studio.methods.concept_pairs import TEMPLATES, Place, Wanted, warn_spelled
from studio.methods.edit_request import check_request, layer_names, record, warn_of_size
from studio.methods.text_to_image import Bench, SamplingParams, ScoreParams, image_name
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Edit, Figure, Report, Result, Run, Trace

FORMS = {"quickfix": quickfix, "locoedit": locoedit, "uce": uce}
MOST_DRAWN = 8  # concepts


@dataclass(frozen=True)
class Inputs:
    """Which concepts become what, and what stays."""

    concept: tuple[str, ...] = knob(REQUIRED, "the concept to edit", repeat=True, commas=False)
    replacement: tuple[str, ...] | None = knob(
        None,
        "what the concept becomes, empty to erase it; as many as concepts, or several guides for one concept",
        repeat=True,
        commas=False,
    )
    preserve: tuple[str, ...] | None = knob(None, "a text that must stay as it is", repeat=True, commas=False)


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the edit is made."""

    method: str = knob("uce", "which weights are solved for, and how", choices=tuple(FORMS))
    layers: tuple[str, ...] | None = knob(
        None,
        "cross-attention layers: names, numbers in execution order (8 or 8-9), auto (LocoGen's best window) "
        "or all; default auto for locoedit, all for uce",
        repeat=True,
    )
    templates: tuple[str, ...] = knob(
        TEMPLATES, "texts around a concept, {} in its place", repeat=True, lines=True
    )
    positions: str | None = knob(
        None,
        "tokens that are keys: the concept's last, or the end-of-text tokens too; default last+eos for "
        "quickfix, else last",
        choices=("last", "last+eos"),
    )
    ratios: str | None = knob(
        None,
        "each replacement's share in its concept's new value, with commas; what lacks to 1 stays the "
        "concept's own (moderate: 0.5; debias: 0.5,0.5); default equal shares that sum to 1",
    )
    regularization: float | None = knob(
        None,
        "the solver's lambda, the weight of staying as it was; default 0.01 for quickfix and locoedit, 0.5 "
        "for uce",
        low=1e-6,
        high=1e6,
    )
    strength: float = knob(1.0, "factor of the whole change", low=-100, high=100)
    images: bool = knob(True, "draw each concept before and after")
    metric: str | None = knob(
        None, "also score the images: clip, distance or probability", choices=tuple(METRICS), advanced=True
    )

    @property
    def localizes(self) -> bool:
        """Whether LocoGen chooses the layers."""
        return "auto" in (self.layers or ()) or (self.method == "locoedit" and self.layers is None)

    @property
    def scored(self) -> bool:
        """Whether a scorer is needed."""
        return self.metric != "distance" and (self.metric is not None or self.localizes)


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    check_request(inputs, params)


def picture_names(concepts: tuple[str, ...], seed: int) -> list[tuple[str, str]]:
    """Names of the images (before, after) of each concept at a seed; concepts that would be named alike are
    numbered."""
    plain = [image_name(c) for c in concepts]
    unique = [p if plain.count(p) == 1 else f"{p}_{i + 1}" for i, p in enumerate(plain)]
    return [(f"seed{seed}-{u}-before", f"seed{seed}-{u}-after") for u in unique]


def draw(run: Run) -> Figure:
    """A row a concept, before and after side by side for the first seeds; the sizes of the change when no
    image was drawn."""
    images, inputs = run.result.images, run.recipe.inputs
    seeds = run.recipe.seeds[:4]
    concepts = tuple(dict.fromkeys(c.strip() for c in inputs["concept"]))[:MOST_DRAWN]
    names = [picture_names(concepts, s) for s in seeds]
    rows = [[name for pair in column for name in pair[i]] for i, column in enumerate([names] * len(concepts))]
    title = f"{run.recipe.model}, {run.recipe.params['method']}: " + ", ".join(
        f"{c} → {r or 'nothing'}"
        for c, r in zip(inputs["concept"], inputs["replacement"] or (), strict=False)
    )
    kept = [[images[n] for n in row if n in images] for row in rows]
    if not kept or not all(kept):
        size = run.result.arrays["relative_size"]
        data = {"labels": list(size.axis("matrix").labels), "values": size.values, "unit": size.unit}
        return Figure("bars", data, title=title)
    cols = [f"seed {s} {when}" for s in seeds for when in ("before", "after")]
    return Figure("strip", {"images": kept, "rows": list(concepts), "cols": cols}, title=title)


@method(
    "edit",
    title="Edit a concept",
    paper="arXiv:2310.13730, arXiv:2405.01008, arXiv:2308.14761",
    family="diffusion",
    summary="Closed-form edit of a concept; writes an edit file.",
    needs={"cross_attention", "text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    saves="edit file",
)
def edit(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """The edit, `relative_size` (matrix), and `before` and `after` (concept, seed) when a metric is asked
    for."""
    asked = record(model, inputs, params, FORMS[params.method])
    warn_spelled(model, asked.concepts, report)
    if params.method != "quickfix":
        wanted = Wanted.of(asked)
        found = locoedit.localized(model, wanted, params, scorer, report) if params.localizes else None
        layers = list(found or layer_names(model, params.layers or ("all",)))
        asked = replace(asked, params={**asked.params, "layers": layers})
    report.plan(2, "solving")
    made, result = solve_edit(model, asked)
    report.step(1)
    concepts = tuple(dict.fromkeys(made.concepts))
    warn_of_size(len(concepts), result.values, report)
    first = Place.of(model, made.params["templates"][0], concepts[0], False).prompt
    change = output_change(model, made, first, model.plan(params))
    result = replace(result, edit=made, values={**result.values, "output_change": change})
    report.step(1)
    report.partial(result)
    if not params.images:
        return result
    if len(concepts) > MOST_DRAWN:
        report.warn(f"Images are drawn of the first {MOST_DRAWN} of {len(concepts)} concepts.")
    return _with_images(model, made, concepts[:MOST_DRAWN], params, seeds, scorer, report, result)


def solve_edit(model: Any, asked: Edit) -> tuple[Edit, Result]:
    """The edit with its deltas, and what is to be said of them; StudioError when it would change nothing."""
    clock = time.perf_counter()
    pairs = CLOSED_FORMS[asked.method](model, asked)
    keyed = time.perf_counter()
    if not any(bool((p.guides != p.keys).any()) for p in pairs):
        raise RequestError(
            f"{model.id} reads each concept and its replacement alike, so there is nothing to change; "
            "take another replacement."
        )
    found = solved(model, pairs)
    strength = asked.params["strength"]
    deltas = {n: (d.dense() * strength).cpu().numpy() for n, d in found.items()}
    done = time.perf_counter()
    if still := [n for n, d in deltas.items() if not d.any()]:
        raise StudioError(f"The edit leaves {still[0]} as it is; that is a fault, please report it.")
    weights = parameters_of(model)
    norms = {n: float(weights[n].detach().float().norm()) for n in deltas}
    sizes = np.array([np.linalg.norm(d) / norms[n] for n, d in deltas.items()], np.float32)
    change = sum(float(np.square(d, dtype=np.float64).sum()) for d in deltas.values()) ** 0.5
    missed, drift = reach(weights, pairs, found)
    values = {
        "matrices_changed": len(deltas),
        "keys": max(p.keys.shape[1] for p in pairs),
        "width": max(p.keys.shape[0] for p in pairs),
        "rank": max(d.right.shape[0] for d in found.values()),
        "relative_size": change / sum(n**2 for n in norms.values()) ** 0.5,
        "seconds_reading_keys": keyed - clock,
        "seconds_solving": done - keyed,
        "values_missed": missed,
        "preserved_drift": drift,
        "layers": ", ".join(asked.params.get("layers", [])) or None,
        "regularization": asked.params["regularization"],
        "strength": strength,
    }
    sizes = Trace(sizes, (Axis("matrix", tuple(deltas)),), "norm of the change by that of the weights")
    return replace(asked, deltas=deltas), Result({"relative_size": sizes}, values)


def reach(
    weights: dict[str, Any], pairs: list[Pairs], found: dict[str, LowRank]
) -> tuple[float | None, float | None]:
    """How well the keys reach their values at strength 1, over all matrices: |W' K - V| / |W K - V| of the
    edited ones (0: all the way, 1: not at all), and |W' K - W K| / |W K| of the preserved ones."""
    sums = np.zeros(4)
    for p in pairs:
        step = p.guides - p.keys
        kept = ~step.any(0)
        for name in p.names:
            want, own = product(weights[name], step), product(weights[name], p.keys)
            got = found[name].left @ (found[name].right @ p.keys)
            parts = ((got - want)[:, ~kept], want[:, ~kept], got[:, kept], own[:, kept])
            sums += [float(x.square().sum()) for x in parts]
    missed, drift = ((a / b) ** 0.5 if b else None for a, b in (sums[:2], sums[2:]))
    return missed, drift


def output_change(model: Any, made: Edit, prompt: str, plan: Any) -> float:
    """Relative change of the UNet's first output for the prompt; StudioError when there is none, because then
    the edit did not arrive."""
    from studio.models.sampling import first_latents, new_scheduler, raw_output

    scheduler = new_scheduler(model, plan)
    t = scheduler.timesteps[0]
    x = scheduler.scale_model_input(first_latents(model, plan, [0]) * scheduler.init_noise_sigma, t)

    def output() -> Any:
        import torch

        with torch.no_grad():
            return raw_output(model, x, t, model.encode([prompt])[0], plan).cpu().double()

    before = output()
    with overlay(model, [made]):
        change = float((output() - before).norm() / before.norm())
    if not 0 < change < float("inf"):
        raise StudioError(
            f"The edit does not change what {model.id} makes of {prompt[:60]!r} (relative change "
            f"{change:g}); with --dtype bfloat16 or float16 a small edit can drown in rounding."
        )
    return change


def _with_images(
    model: Any,
    made: Edit,
    concepts: tuple[str, ...],
    params: Params,
    seeds: tuple[int, ...],
    scorer: Any,
    report: Report,
    result: Result,
) -> Result:
    """The result with the first template's images of each concept, before and after, and their scores."""
    bench = Bench.of(model, params, concepts[0], scorer, report)
    prompts = [Place.of(model, made.params["templates"][0], c, False).prompt for c in concepts]
    report.plan(2 * len(prompts) * len(seeds) * bench.plan.steps, "drawing")
    before = bench.grid(prompts, seeds)
    with overlay(model, [made]):
        after = bench.grid(prompts, seeds)
    named = {}
    for j, seed in enumerate(seeds):
        for c, names in enumerate(picture_names(concepts, seed)):
            named |= {names[0]: before[c, j], names[1]: after[c, j]}
    arrays = dict(result.arrays)
    if params.metric:
        axes = (Axis("concept", concepts), Axis("seed", tuple(map(str, seeds))))
        for name, images in (("before", before), ("after", after)):
            rows = [
                score(params.metric, im, was, Question(params.target or p, params.against), scorer)
                for im, was, p in zip(images, before, prompts, strict=True)
            ]
            arrays[name] = Trace(np.stack(rows), axes, params.metric)
    return replace(result, arrays=arrays, images=named)

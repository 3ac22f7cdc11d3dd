"""Neurons of cross-attention that tell a concept from a neutral text, and an edit that silences them.

A neuron is an output unit of to_k or to_v. z = (mean_c - mean_n) / sqrt(s_c^2 / n_c + s_n^2 / n_n) over
templates, at the concept's last token (or the row's last token). The edit sets the k units with the largest
|z| to their neutral mean. LocoGen, arXiv 2405.01008, section on neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studio.edits import overlay
from studio.errors import RequestError, StudioError
from studio.methods.concept_pairs import TEMPLATES, Place, check_templates, warn_spelled
from studio.methods.edit import output_change
from studio.methods.edit_request import layer_names
from studio.methods.text_to_image import Bench, SamplingParams, ScoreParams, image_name
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Edit, Figure, Report, Result, Run, Site, Trace

NEURON_TEMPLATES = (*TEMPLATES, "a painting of {}")
SHOWN = 30  # units of the figure
_ROWS = 8  # prompts of one pass


@dataclass(frozen=True)
class Inputs:
    """What the neurons tell apart."""

    concept: str = knob(REQUIRED, "the concept whose neurons are looked for")
    neutral: str = knob(REQUIRED, "what stands in its place in the neutral prompts")


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """Where and how they are looked for."""

    layers: tuple[str, ...] = knob(
        ("auto",),
        "cross-attention layers: names, numbers in execution order (8 or 8-9), auto (LocoGen's best window) "
        "or all",
        repeat=True,
    )
    templates: tuple[str, ...] = knob(
        NEURON_TEMPLATES, "texts around the concept, {} in its place, at least two", repeat=True, lines=True
    )
    position: str = knob(
        "last",
        "where units are read: at the concept's last token, or at the end of the row",
        choices=("last", "end"),
        advanced=True,
    )
    top: int | None = knob(
        None,
        "make an edit: so many units, the largest |z| first, are set to their neutral mean; default none, "
        "units are only measured",
        low=1,
    )

    @property
    def scored(self) -> bool:
        """Whether a scorer is needed."""
        return self.metric != "distance" and (self.top is not None or "auto" in self.layers)


@dataclass(frozen=True, eq=False)
class Units:
    """Statistics of output units, (units,) float64 each, over all sites one after the other."""

    sites: tuple[Site, ...]
    index: np.ndarray
    concept: np.ndarray
    neutral: np.ndarray
    z: np.ndarray

    def ranked(self) -> np.ndarray:
        """Places by falling |z|."""
        return np.argsort(-np.abs(self.z), kind="stable")

    def named(self) -> tuple[str, ...]:
        """MODULE.UNIT of every unit."""
        from studio.models.sites import unet_name

        names = {site: unet_name(site) for site in self.sites}
        return tuple(f"{names[s]}.{i}" for s, i in zip(self.sites, self.index, strict=True))


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    if " ".join(inputs.concept.lower().split()) == " ".join(inputs.neutral.lower().split()):
        raise RequestError("--neutral is the concept itself; give a text without it.")
    if len(set(params.templates)) < 2:
        raise RequestError("A z-score needs a spread: give at least two --templates.")
    check_templates("--templates", params.templates)


def unsaved(params: Params) -> str:
    """Why no edit would be made."""
    return "" if params.top else "--save needs an edit, and --top is missing: how many units it silences."


def welch(concept: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """z of each unit: (prompts, units) twice; 0 where both groups are constant and alike."""
    difference = concept.mean(0) - neutral.mean(0)
    spread = np.sqrt(concept.var(0, ddof=1) / len(concept) + neutral.var(0, ddof=1) / len(neutral))
    least = 1e-6 * (np.abs(concept).max(0) + np.abs(neutral).max(0)) + 1e-30  # rounding is no spread
    return difference / np.maximum(spread, least)


def unit_statistics(
    model: Any, concept: str, neutral: str, layers: Sequence[str], templates: Sequence[str], position: str
) -> Units:
    """Outputs of every unit of `to_k` and `to_v` of the layers, over the templates of both texts."""
    groups = []
    for text in (concept, neutral):
        places = [Place.of(model, template, text, False) for template in templates]
        groups.append(_outputs(model, places, layers, position))
    sites = [site for site, found in groups[0].items() for _ in range(found.shape[1])]
    index = np.concatenate([np.arange(found.shape[1]) for found in groups[0].values()])
    a, b = (np.concatenate(list(g.values()), axis=1) for g in groups)
    return Units(tuple(sites), index, a.mean(0), b.mean(0), welch(a, b))


def _outputs(model: Any, places: list[Place], layers: Sequence[str], position: str) -> dict[Site, np.ndarray]:
    """(prompts, units) float64 by site, at each prompt's token."""
    from studio.models.sampling import Readings

    parts: dict[Site, list[np.ndarray]] = {}
    for start in range(0, len(places), _ROWS):
        part = places[start : start + _ROWS]
        cond, _ = model.encode([p.prompt for p in part])
        at = [-1 if position == "end" else p.positions[0] for p in part]
        for site, table in Readings.of(model, cond, layers=layers).tables.items():
            parts.setdefault(site, []).append(table[range(len(part)), at].float().cpu().numpy())
    return {site: np.concatenate(found).astype(np.float64) for site, found in parts.items()}


def neuron_edit(
    model: Any,
    concept: str,
    neutral: str,
    layers: Sequence[str],
    k: int,
    templates: Sequence[str] = NEURON_TEMPLATES,
    position: str = "last",
) -> Edit:
    """The edit that sets the k units with the largest |z| in these layers to their neutral mean."""
    units = unit_statistics(model, concept, neutral, layers, templates, position)
    return edit_of(model, units, k, concept, neutral, layers, templates, position)


def edit_of(
    model: Any,
    units: Units,
    k: int,
    concept: str,
    neutral: str,
    layers: Sequence[str],
    templates: Sequence[str],
    position: str,
) -> Edit:
    """See `neuron_edit`; the units' statistics are known."""
    if k > len(units.z):
        raise RequestError(f"--top {k} is more than the {len(units.z)} units of these layers.")
    chosen = units.ranked()[:k]
    by_site: dict[Site, dict[int, float]] = {}
    for i in chosen:
        by_site.setdefault(units.sites[i], {})[int(units.index[i])] = float(units.neutral[i])
    deltas: dict[str, np.ndarray] = {}
    for site, constants in by_site.items():
        for name, delta in constant_units(model, site, constants).items():
            deltas[name] = deltas[name] + delta if name in deltas else delta
    params = {
        "layers": list(layers),
        "templates": list(templates),
        "position": position,
        "top": k,
        "units": [units.named()[i] for i in chosen[:256]],
    }
    return Edit(deltas, model.fingerprint, (concept,), params, "neurons", (neutral,))


def constant_units(model: Any, site: Site, constants: dict[int, float]) -> dict[str, np.ndarray]:
    """Deltas under which these output units of a `to_k` or `to_v` are constants, whatever the text says.

    Rows become zero. The constant of a key adds the same to all scores of a query, which softmax ignores;
    that of a value passes attention whole, since its weights sum to 1, and so goes to the bias of `to_out`.
    """
    from studio.models.sites import unet_module, unet_name

    linear, name, units = unet_module(model.unet, site), f"unet.{unet_name(site)}", list(constants)
    weight, bias = linear.weight.detach().double().cpu().numpy(), linear.bias
    delta = np.zeros(weight.shape, np.float32)
    delta[units] = -weight[units]
    deltas, held = {f"{name}.weight": delta}, np.array([constants[u] for u in units])
    if bias is not None:
        move = np.zeros(len(bias), np.float32)
        move[units] = held - bias.detach().double().cpu().numpy()[units]
        return deltas | {f"{name}.bias": move}
    if site.kind == "cross-attention-value":
        out = replace(site, kind="cross-attention-out")
        matrix = unet_module(model.unet, out).weight.detach().double().cpu().numpy()
        deltas[f"unet.{unet_name(out)}.bias"] = (matrix[:, units] @ held).astype(np.float32)
    return deltas


def draw(run: Run) -> Figure:
    """Bars of the units with the largest |z|."""
    z = run.result.arrays["z_score"]
    order = np.argsort(-np.abs(z.values), kind="stable")[:SHOWN]
    names = [z.axis("unit").labels[i] for i in order]
    layers = list(dict.fromkeys(n.rsplit(".", 2)[0] for n in z.axis("unit").labels))
    numbers = run.result.values["layer_numbers"].split(",")
    short = [f"{numbers[layers.index(n.rsplit('.', 2)[0])]}.{'.'.join(n.rsplit('.', 2)[1:])}" for n in names]
    data = {"labels": short, "values": z.values[order], "unit": z.unit, "label_title": "layer, matrix, unit"}
    inputs = run.recipe.inputs
    return Figure(
        "bars", data, title=f"{run.recipe.model}: “{inputs['concept']}” against “{inputs['neutral']}”"
    )


@method(
    "neurons",
    title="Neurons of a concept",
    paper="arXiv:2405.01008",
    family="diffusion",
    summary="Units of keys and values that tell a concept, and an edit that silences them.",
    needs={"cross_attention", "text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    saves="edit file",
    unsaved=unsaved,
)
def neurons(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`z_score`, `concept_mean`, `neutral_mean` (unit); with --top the edit, and `before`, `after` (seed)."""
    concept, neutral = inputs.concept.strip(), inputs.neutral.strip()
    warn_spelled(model, (concept, neutral), report)
    layers = _layers(model, concept, neutral, params, scorer, report)
    asked = (concept, neutral, layers, params.templates, params.position)
    units = unit_statistics(model, *asked)
    axis = Axis("unit", units.named())
    arrays = {
        "z_score": Trace(units.z.astype(np.float32), (axis,), "z of concept against neutral"),
        "concept_mean": Trace(units.concept.astype(np.float32), (axis,), "output of the unit"),
        "neutral_mean": Trace(units.neutral.astype(np.float32), (axis,), "output of the unit"),
    }
    every = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
    best = [f"{axis.labels[i]} ({units.z[i]:.3g})" for i in units.ranked()[:10]]
    values: dict[str, Any] = {
        "layers": ",".join(layers),
        "layer_numbers": ",".join(str(every.index(n)) for n in layers),
        "units": len(units.z),
        "largest": ", ".join(best),
    }
    result = Result(arrays, values)
    report.partial(result)
    if params.top is None:
        return result
    made = edit_of(model, units, params.top, *asked)
    prompt = Place.of(model, params.templates[0], concept, False).prompt
    values["output_change"] = output_change(model, made, prompt, model.plan(params))
    return _with_images(Bench.of(model, params, prompt, scorer, report), made, prompt, seeds, result)


def _layers(model: Any, concept: str, neutral: str, params: Params, scorer: Any, report: Report) -> list[str]:
    """Names of the layers asked for; `auto` asks LocoGen, over the templates that have words of their own."""
    if "auto" not in params.layers:
        return layer_names(model, params.layers)
    if len(params.layers) > 1:
        raise RequestError("--layers auto chooses by itself; leave the other layers out.")
    from studio.methods.locogen import best_layers

    templates = [t for t in params.templates if t.strip() != "{}"][:2]
    prompts, others = ([t.replace("{}", text) for t in templates] for text in (concept, neutral))
    return list(best_layers(model, prompts, others, params, scorer, report))


def _with_images(bench: Bench, made: Edit, prompt: str, seeds: tuple[int, ...], result: Result) -> Result:
    """The result with the concept's images before and after the edit, and their scores."""
    bench.report.plan(2 * len(seeds) * bench.plan.steps, "drawing")
    arrays, images = dict(result.arrays), {}
    before = bench.grid([prompt], seeds)[0]
    with overlay(bench.model, [made]):
        after = bench.grid([prompt], seeds)[0]
    axis = Axis("seed", tuple(map(str, seeds)))
    for when, made_there in (("before", before), ("after", after)):
        images |= {image_name(f"seed{s}", when): im for s, im in zip(seeds, made_there, strict=True)}
        scores = [bench.score(im[None], was)[0] for im, was in zip(made_there, before, strict=True)]
        arrays[when] = Trace(np.array(scores, np.float32), (axis,), bench.unit)
    if np.array_equal(before, after):
        raise StudioError("The edit changes no pixel of the concept's images; take a larger --top.")
    return replace(result, arrays=arrays, images=images, edit=made)

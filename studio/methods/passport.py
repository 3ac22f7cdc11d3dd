"""The passport of a localization: does the map of a concept say where an edit of it works?

LocoGen's direct effect of every window is set beside the same edit made there, and at random sets of layers
of equal size and norm, at all layers, and at those that Fisher score or weight magnitude would pick.
Localized on some prompts, audited on others. Published work finds that localization often does not predict
editing: arXiv 2301.04213, 2502.11447.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from studio.audit import Spread, passport_verdict, standing, total_effect
from studio.edits import overlay
from studio.errors import RequestError
from studio.measure import Question
from studio.methods.concept_pairs import check_templates, warn_spelled
from studio.methods.direct_effect import none_if_nan
from studio.methods.edit import solve_edit
from studio.methods.layer_map import layer_map
from studio.methods.locoedit import REGULARIZATION
from studio.methods.text_to_image import Bench, SamplingParams, ScoreParams, image_name
from studio.methods.witness import (
    NEIGHBOURS,
    PARAPHRASES,
    SECOND,
    Witness,
    check_others,
    filled,
    others,
    witnesses,
)
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Edit, Figure, Report, Result, Run, Trace

TEMPLATES = ("a photo of {}", "{}")
SHARE = "share of the replacement's effect"
ALL, FISHER, WEIGHTS, RANDOM = "all layers", "Fisher score", "weight magnitude", "random"


@dataclass(frozen=True)
class Inputs:
    """The concept, and what it becomes."""

    concept: str = knob(REQUIRED, "the concept that is localized and edited")
    replacement: str = knob("", "what it becomes; empty: it is erased")
    neighbours: tuple[str, ...] | None = NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How it is localized, edited and audited."""

    templates: tuple[str, ...] = knob(
        TEMPLATES, "texts around the concept that it is localized and edited with", repeat=True, lines=True
    )
    held_out: tuple[str, ...] = knob(
        PARAPHRASES, "texts around the concept that the edits are audited with", repeat=True, lines=True
    )
    window: int | None = knob(
        None, "neighbouring layers that are swapped and edited together; default 2, 5 for SDXL", low=1
    )
    randoms: int = knob(20, "random sets of layers, of the windows' size", low=0, high=1000)
    norm: str = knob(
        "equal",
        "equal: every edit is scaled to the mean norm of the windows' edits; own: as they are solved",
        choices=("equal", "own"),
    )
    positions: str = knob(
        "last", "tokens that are keys, as in edit", choices=("last", "last+eos"), advanced=True
    )
    regularization: float = knob(REGULARIZATION, "the solver's lambda", low=1e-6, high=1e6, advanced=True)
    second_scorer: str | None = SECOND


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    if inputs.concept.strip().lower() == inputs.replacement.strip().lower():
        raise RequestError("--replacement is the concept itself; give another one, or leave it out to erase.")
    check_templates("--templates", params.templates)
    check_templates("--held-out", params.held_out)
    if both := set(params.templates) & set(params.held_out):
        raise RequestError(
            f"{min(both)[:60]!r} is localized and audited with; --held-out must be other texts."
        )
    check_others("--neighbours", inputs.neighbours or (), inputs.concept)


def draw(run: Run) -> Figure:
    """Each window's direct effect against the success of the edit made there, the baselines as lines."""
    arrays, values, inputs = run.result.arrays, run.result.values, run.recipe.inputs
    effect = arrays["direct_effect"]
    names, count = list(effect.axis("window").labels), len(effect.values)
    series = [
        {"name": name, "x": effect.values, "y": arrays[key].values[:count], "labels": names, "line": False}
        for key, name in (
            ("success", values["first_scorer"]),
            ("second_success", values.get("second_scorer")),
        )
        if key in arrays
    ]
    success, labels = arrays["success"].values, arrays["success"].axis("set").labels
    baselines: dict[str, list[float]] = {}
    for label, value in zip(labels[count:], success[count:], strict=True):
        baselines.setdefault(label.split(":")[0], []).append(float(value))
    lines = [
        (name if len(v) == 1 else f"{name}, median", float(np.median(v))) for name, v in baselines.items()
    ]
    data = {"series": series, "lines": lines, "x_title": f"direct effect of the window, {effect.unit}"}
    data["y_title"] = f"efficacy − leak of the edit there ({SHARE})"
    title = f"{run.recipe.model}: passport of “{inputs['concept']}” → “{inputs['replacement'] or 'nothing'}”"
    return Figure("curve", data, title=title, caption=values["verdict"])


@method(
    "passport",
    title="Passport of a localization",
    paper="arXiv:2405.01008, arXiv:2301.04213, arXiv:2502.11447",
    family="diffusion",
    summary="Whether the map of a concept says where an edit of it works.",
    needs={"cross_attention", "text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(0, 1),
    saves="edit file",
)
def passport(
    model: Any,
    inputs: Inputs,
    params: Params,
    seeds: tuple[int, ...],
    scorer: Any,
    report: Report,
    *,
    second_scorer: Any = None,
) -> Result:
    """`direct_effect`, `placebo` (window); `efficacy`, `leak`, `success` (set), the windows first; `layers`
    (set, layer), `fisher`, `magnitude` (layer); the edit at the window where it worked best,
    or the map's where that is not known."""
    warn_spelled(model, (inputs.concept,), report)
    seen_by = witnesses(params, scorer, second_scorer, model, report)
    work = _Passport(model, inputs, params, seeds, report, seen_by)
    work.choose()
    work.audit()
    return work.result()


class _Passport:
    """One passport: the map, the edits, and what they do."""

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        params: Params,
        seeds: tuple[int, ...],
        report: Report,
        seen_by: list[Witness],
    ) -> None:
        self.model, self.params, self.seeds, self.report = model, params, seeds, report
        self.concept, self.replacement = inputs.concept.strip(), inputs.replacement.strip()
        self.seen_by = seen_by
        self.own, self.instead = (filled(params.held_out, t) for t in (self.concept, self.replacement))
        self.near = others(model, self.concept, self.replacement, inputs.neighbours)
        if not self.near:
            report.warn("No neighbours are given, so success is efficacy alone; name some.")
        self.bench = Bench.of(model, params, self.own[0], seen_by[0].scorer, report)
        self.whole = self._solve()
        texts = (filled(params.templates, self.concept), filled(params.templates, self.replacement))
        self.map = layer_map(self.bench, *texts, seeds)
        asked = [Question(params.target or p, params.against) for p in self.own]
        self.questions = asked + [Question(p) for p in self.near]
        self.sets = dict(self.map.windows)
        self.edits: dict[str, Edit] = {}
        self.spreads: list[dict[str, tuple[Spread, Spread]]] = [{} for _ in seen_by]
        self.images: dict[str, np.ndarray] = {}

    # ---- the edits ----------------------------------------------------------------------------------------

    def choose(self) -> None:
        """The sets of layers, and the same edit at each: every matrix is solved alone, so once will do."""
        depth, width = len(self.map.layers), self.map.width
        for name, weights in ((FISHER, self.map.fisher), (WEIGHTS, self.map.magnitude)):
            best = tuple(sorted(int(i) for i in np.argsort(-weights, kind="stable")[:width]))
            self.sets[f"{name}: {'+'.join(map(str, best))}"] = best
        self.sets[f"{ALL}: 0-{depth - 1}"] = tuple(range(depth))
        taken = set(self.sets.values())
        randoms = random_sets(depth, width, self.params.randoms, taken)
        self.sets |= {f"{RANDOM}: {'+'.join(map(str, chosen))}": chosen for chosen in randoms}
        if len(randoms) < self.params.randoms:
            self.report.warn(f"There are only {len(randoms)} other sets of {width} layers.")
        parts = {label: self._part(chosen) for label, chosen in self.sets.items()}
        norms = {label: size(edit) for label, edit in parts.items()}
        self.size = float(np.mean([norms[label] for label in self.map.windows]))
        for label, edit in parts.items():
            scale = self.size / norms[label] if self.params.norm == "equal" else 1.0
            deltas = {n: (d * scale).astype(np.float32) for n, d in edit.deltas.items()}
            self.edits[label] = replace(edit, deltas=deltas, params={**edit.params, "strength": scale})

    def _solve(self) -> Edit:
        """LocoEdit at every layer."""
        record = {
            "templates": list(self.params.templates),
            "positions": self.params.positions,
            "ratios": [1.0],
            "preserve": [],
            "regularization": self.params.regularization,
            "strength": 1.0,
            "layers": [str(s.layer) for s in self.model.unet_sites(["cross-attention"])],
        }
        asked = (record, "locoedit", (self.replacement,))
        return solve_edit(self.model, Edit({}, self.model.fingerprint, (self.concept,), *asked))[0]

    def _part(self, chosen: tuple[int, ...]) -> Edit:
        """The edit at some layers alone."""
        layers = [self.map.layers[i] for i in chosen]
        prefixes = tuple(f"unet.{layer}." for layer in layers)
        deltas = {n: d for n, d in self.whole.deltas.items() if n.startswith(prefixes)}
        return replace(self.whole, deltas=deltas, params={**self.whole.params, "layers": layers})

    # ---- the audit ----------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Efficacy and leak of every edit on the held-out prompts; partial results after each."""
        texts, own, each = (*self.own, *self.near), len(self.own), len(self.seeds) * self.bench.calls
        total = len(texts) * (1 + len(self.edits)) + own
        self.report.plan(total * each, "auditing the edit at every set of layers")
        made = self.bench.grid((*texts, *self.instead), self.seeds)
        clean, swapped = made[: len(texts)], made[len(texts) :]
        self._keep("before", clean)
        self._keep("replaced", swapped)
        before = [w.scores(clean, clean, self.questions) for w in self.seen_by]
        totals = []
        for b, w in zip(before, self.seen_by, strict=True):
            replaced = w.scores(swapped, clean[:own], self.questions[:own])
            totals.append(total_effect(b[:own], replaced, w.least))
        for label, edit in self.edits.items():
            with overlay(self.model, [edit]):
                images = self.bench.grid(texts, self.seeds)
            self._keep(label, images)
            for w, witness in enumerate(self.seen_by):
                drop = before[w] - witness.scores(images, clean, self.questions)
                self.spreads[w][label] = tuple(
                    Spread.of(part).by(totals[w]) for part in (drop[:own], drop[own:])
                )
            self.report.partial(self.result())

    def _keep(self, label: str, images: np.ndarray) -> None:
        """The first held-out prompt's images."""
        for j, seed in enumerate(self.seeds):
            self.images[image_name(f"seed{seed}", label)] = images[0, j]

    # ---- what it comes to ---------------------------------------------------------------------------------

    def success(self, w: int = 0) -> np.ndarray:
        """Efficacy minus leak of every set (efficacy alone without neighbours), NaN where not measured."""
        return self._column(w, 0, "mean") - (self._column(w, 1, "mean") if self.near else 0.0)

    def _column(self, w: int, which: int, end: str) -> np.ndarray:
        found, none = self.spreads[w], (Spread(), Spread())
        return np.array([getattr(found.get(label, none)[which], end) for label in self.sets], np.float32)

    def result(self) -> Result:
        """Everything measured so far."""
        sets, layer = Axis("set", tuple(self.sets)), Axis("layer", tuple(self.map.layers))
        inside = np.zeros((len(self.sets), len(self.map.layers)), np.float32)
        for row, chosen in zip(inside, self.sets.values(), strict=True):
            row[list(chosen)] = 1
        scale = np.array([self.edits[s].params["strength"] for s in self.sets], np.float32)
        arrays = self.map.arrays() | {
            "layers": Trace(inside, (sets, layer), "1 where the edit writes"),
            "scale": Trace(scale, (sets,), "factor of the solved edit"),
        }
        for prefix, w in (("", 0), ("second_", 1))[: len(self.seen_by)]:
            unit = f"{SHARE}, {self.seen_by[w].name}"
            arrays[f"{prefix}success"] = Trace(self.success(w), (sets,), f"efficacy - leak, {unit}")
            for which, name in enumerate(("efficacy", "leak")):
                for end, tail in (("mean", ""), ("low", "_low"), ("high", "_high")):
                    arrays[f"{prefix}{name}{tail}"] = Trace(self._column(w, which, end), (sets,), unit)
        best = self.best()
        return Result(arrays, self._values(best), dict(self.images), self.edits[best or self.map.best])

    def best(self) -> str | None:
        """The window where the edit works best by the first scorer."""
        found = self.success()[: len(self.map.windows)]
        return list(self.map.windows)[int(np.nanargmax(found))] if np.isfinite(found).any() else None

    def _values(self, best: str | None) -> dict[str, Any]:
        plan, count = self.bench.plan, len(self.map.windows)
        values: dict[str, Any] = {n: getattr(plan, n) for n in ("steps", "guidance", "scheduler")}
        values |= {"window": self.map.width, "norm": self.size, "localized_window": self.map.best}
        values |= {"best_window": best, "placebo_floor": float(np.abs(self.map.placebo).max())}
        said = []
        for prefix, w in (("", 0), ("second_", 1))[: len(self.seen_by)]:
            success, name = self.success(w), self.seen_by[w].name
            found = standing(self.map.effect, success[:count], self._randoms(success))
            values[f"{prefix or 'first_'}scorer"] = name
            values |= {f"{prefix}{k}": none_if_nan(v) for k, v in asdict(found).items()}
            said.append((name, found, dict(zip(self.sets, map(float, success), strict=True))))
        return values | {"verdict": passport_verdict(self.concept, self.map.best, best, said)}

    def _randoms(self, success: np.ndarray) -> np.ndarray:
        return success[[label.startswith(RANDOM) for label in self.sets]]


def random_sets(depth: int, width: int, count: int, taken: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """`count` different sets of `width` of `depth` layers that are not `taken`, always the same ones; fewer
    where there are not so many."""
    import torch

    generator, found = torch.Generator().manual_seed(0), []
    room = math.comb(depth, width) - sum(len(t) == width for t in taken)
    while len(found) < min(count, room):
        order = torch.randperm(depth, generator=generator)[:width].tolist()
        if (chosen := tuple(sorted(order))) not in taken and chosen not in found:
            found.append(chosen)
    return found


def size(edit: Edit) -> float:
    """The norm of all deltas of an edit together."""
    return math.fsum(float(np.square(d, dtype=np.float64).sum()) for d in edit.deltas.values()) ** 0.5

"""Audit of an edit: what it took from its concept, and what from neighbours and unrelated prompts, on the
same starting noise before and after. What the amounts mean stands in studio/audit.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studio.audit import (
    Finding,
    Spread,
    Stack,
    change_by_prompt,
    rms,
    smallest_strength,
    total_effect,
    verdict,
)
from studio.errors import RequestError
from studio.measure import Question, standard_error
from studio.methods.concept_pairs import TEMPLATES, check_templates, warn_spelled
from studio.methods.direct_effect import none_if_nan
from studio.methods.text_to_image import Bench, SamplingParams, ScoreParams, image_name, warn_lost_tokens
from studio.methods.witness import (
    NEIGHBOURS,
    PARAPHRASES,
    SECOND,
    Witness,
    check_others,
    far,
    filled,
    others,
    witnesses,
)
from studio.registry import knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

STRENGTHS = "0.25,0.5,1,1.5,2"  # tried when an efficacy is asked for without strengths
MOST_STRENGTHS, MOST_IMAGES = 32, 20_000


@dataclass(frozen=True)
class Inputs:
    """The concept that was edited, and what should have stayed."""

    concept: str | None = knob(None, "the concept that was edited; default what the edit file says")
    neighbours: tuple[str, ...] | None = NEIGHBOURS
    replacement: str | None = knob(
        None, "what the concept became; default what the edit file says, empty where it says nothing"
    )
    paraphrases: tuple[str, ...] = knob(
        PARAPHRASES,
        "more prompts that show the concept, which the edit was not made with, {} in its place",
        commas=False,
        lines=True,
    )
    unrelated: tuple[str, ...] | None = knob(
        None,
        "prompts that have nothing to do with the concept (default: three built-in ones)",
        commas=False,
        lines=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How it is looked at."""

    templates: tuple[str, ...] = knob(
        TEMPLATES[:2], "prompts around the concept, {} in its place", repeat=True, lines=True
    )
    strengths: str | None = knob(
        None, f"also draw efficacy against leak at these factors of the edit's strength, such as {STRENGTHS}"
    )
    efficacy: float | None = knob(
        None,
        "search the smallest strength whose efficacy reaches this share of the replacement's effect",
        low=0.01,
        high=2,
    )
    second_scorer: str | None = SECOND


def complete(inputs: Inputs, edits: Stack) -> Inputs:
    """The inputs with concept and replacement from the edits' own records where they are not given."""
    concept, replacement = edits.about(inputs.concept, inputs.replacement)
    return replace(inputs, concept=concept, replacement=replacement)


def strengths_of(given: str | None, wanted: float | None = None) -> tuple[float, ...]:
    """Strengths from "0.5,1,2", ascending; some when an efficacy is wanted without any."""
    text = given if given is not None else STRENGTHS if wanted is not None else ""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    try:
        found = [float(p) for p in parts]
    except ValueError:
        found = [math.nan]
    if not all(abs(s) <= 100 for s in found) or (given is not None and not found):
        raise RequestError(
            f"--strengths must be numbers from -100 to 100 with commas, such as {STRENGTHS}, not "
            f"{text[:60]!r}."
        )
    if len(found) > MOST_STRENGTHS:
        raise RequestError(f"{len(found)} strengths are too many; at most {MOST_STRENGTHS}.")
    return tuple(sorted(set(found)))


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    strengths = strengths_of(params.strengths, params.efficacy)
    check_templates("--templates", params.templates)
    check_templates("--paraphrases", inputs.paraphrases)
    concept = inputs.concept or ""  # without one it is the edit file's, which is not open yet
    check_others("--neighbours", inputs.neighbours or (), concept)
    check_others("--unrelated", inputs.unrelated or (), concept)
    if concept and (inputs.replacement or "").strip().lower() == concept.strip().lower():
        raise RequestError("--replacement is the concept itself; say what the edit put in its place.")
    prompts = len(params.templates) + len(inputs.paraphrases) + len(inputs.neighbours or ())
    total = (prompts * (3 + len(strengths)) + 2 * len(inputs.unrelated or ())) * len(seeds)
    if total > MOST_IMAGES:
        raise RequestError(f"{total} images in one audit are too many; at most {MOST_IMAGES}.")


def draw(run: Run) -> Figure:
    """The frontier of efficacy against leak where several strengths were drawn and something can be told of
    them, else a bar a prompt."""
    arrays, values, inputs = run.result.arrays, run.result.values, run.recipe.inputs
    title = f"{run.recipe.model}: audit of the edit of “{inputs['concept']}”"
    known = [
        arrays[f"{p}efficacy"].values + arrays[f"{p}leak"].values
        for p in ("", "second_")
        if f"{p}efficacy" in arrays
    ]
    if any(len(k) > 1 and np.isfinite(k).any() for k in known):
        return Figure("curve", frontier(arrays), title=title, caption=values["verdict"])
    change, groups = arrays["score_change"], values["concept_prompts"]
    means = [("mean of the concept", change.values[:groups].mean())]
    if len(change.values) > groups:
        means.append(("mean of its neighbours", change.values[groups:].mean()))
    data = {
        "labels": list(change.axis("prompt").labels),
        "values": change.values,
        "errors": arrays["score_change_sem"].values,
        "lines": means,
        "unit": change.unit,
        "label_title": "the concept's prompts, then its neighbours",
    }
    return Figure("bars", data, title=title, caption=values["verdict"])


def frontier(arrays: Any) -> dict[str, Any]:
    """Data of a curve: a series a scorer, a point a strength."""
    labels = list(arrays["efficacy"].axis("strength").labels)
    series = []
    for prefix in ("", "second_"):
        if f"{prefix}efficacy" in arrays:
            x, y = arrays[f"{prefix}leak"], arrays[f"{prefix}efficacy"]
            name = y.unit.rsplit(", ", 1)[-1]
            series.append({"name": name, "x": x.values, "y": y.values, "labels": labels, "line": True})
    share = "share of the replacement's effect"
    titles = {"x_title": f"leak to neighbours ({share})", "y_title": f"efficacy ({share})"}
    return {"series": series, "lines": [], **titles}


@method(
    "audit",
    title="Audit an edit",
    paper="arXiv:2310.13730, arXiv:2308.14761",
    family="diffusion",
    summary="What an edit did to its concept and to its neighbours.",
    needs={"cross_attention", "text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(0, 1),
    lays_edits=True,
    complete=complete,
)
def audit(
    model: Any,
    inputs: Inputs,
    params: Params,
    seeds: tuple[int, ...],
    scorer: Any,
    report: Report,
    *,
    edits: Stack,
    second_scorer: Any = None,
) -> Result:
    """`before`, `after` (prompt, seed), `score_change` (prompt), the concept's prompts first, then the
    neighbours; `replaced`, `pixel_distance`, `unrelated_before`, `unrelated_after`; `efficacy` and `leak`
    (strength); the second scorer's under `second_…`."""
    edits.check(model)
    work = _Audit(
        model, inputs, params, seeds, report, edits, witnesses(params, scorer, second_scorer, model, report)
    )
    work.warn()
    work.look()
    for strength in strengths_of(params.strengths, params.efficacy):
        work.reach(strength)
    if params.efficacy is not None:
        work.search(params.efficacy)
    return work.result()


class _Audit:
    """One audit: its prompts, the images before and after, and what the witnesses say of them."""

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        params: Params,
        seeds: tuple[int, ...],
        report: Report,
        edits: Stack,
        seen_by: list[Witness],
    ) -> None:
        self.model, self.params, self.seeds, self.report = model, params, seeds, report
        self.edits, self.seen_by, self.given = edits, seen_by, inputs
        self.concept = inputs.concept.strip()
        self.replacement = (inputs.replacement or "").strip()
        forms = tuple(dict.fromkeys((*params.templates, *inputs.paraphrases)))
        self.own, self.instead = filled(forms, self.concept), filled(forms, self.replacement)
        self.near = others(model, self.concept, self.replacement, inputs.neighbours)
        self.far = far(model, self.concept, self.replacement, inputs.unrelated)
        self.prompts = (*self.own, *self.near)
        self.bench = Bench.of(model, params, self.own[0], seen_by[0].scorer, report)
        asked = [Question(params.target or p, params.against) for p in self.own]
        self.questions = asked + [Question(p) for p in (*self.near, *self.far)]
        self.images: dict[str, np.ndarray] = {}
        self.strengths: dict[float, tuple[np.ndarray, ...]] = {}  # one (prompt, seed) a witness
        self.needed: float | None = None

    @property
    def axis(self) -> Axis:
        """The seeds."""
        return Axis("seed", tuple(map(str, self.seeds)))

    def warn(self) -> None:
        """What makes this audit say less than it could."""
        recorded = [c.strip() for c in self.edits.concepts]
        warn_lost_tokens(self.model, (*self.prompts, *self.far), self.report)
        warn_spelled(self.model, (self.concept,), self.report)
        if recorded and self.concept.lower() not in map(str.lower, recorded):
            self.report.warn(
                f"The edit file is about {', '.join(recorded)[:120]}, and not about {self.concept[:60]}."
            )
        if not self.near:
            self.report.warn("No neighbours are given, so nothing is said of a leak; name some.")

    # ---- measuring ----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Images before, with the replacement in the prompt, and after."""
        texts, each = (*self.prompts, *self.far), len(self.seeds) * self.bench.calls
        self.report.plan((2 * len(texts) + len(self.own)) * each, "before and after")
        made = self.bench.grid((*texts, *self.instead), self.seeds)
        before, self.images["replaced"] = made[: len(texts)], made[len(texts) :]
        self.images["before"] = before
        with self.edits.laid(self.model):
            self.images["after"] = self.bench.grid(texts, self.seeds)
        if np.array_equal(before, self.images["after"]):
            self.report.warn("The edit changes no pixel of any image.")
        count = len(self.prompts)
        self.before = [w.scores(before, before, self.questions) for w in self.seen_by]
        self.after = [w.scores(self.images["after"], before, self.questions) for w in self.seen_by]
        start, asked = before[: len(self.own)], self.questions[: len(self.own)]
        swapped = [Question(p) for p in self.instead]
        after = self.images["after"][: len(self.own)]
        self.replaced = [w.scores(self.images["replaced"], start, asked) for w in self.seen_by]
        self.rise = [w.scores(after, start, swapped) - w.scores(start, start, swapped) for w in self.seen_by]
        self.strengths[1.0] = tuple(a[:count] for a in self.after)
        self.totals = [
            total_effect(b[: len(self.own)], r, w.least)
            for b, r, w in zip(self.before, self.replaced, self.seen_by, strict=True)
        ]
        self.report.partial(self.result())

    def reach(self, strength: float) -> float:
        """The first witness' efficacy at a strength, drawn where it is not known yet."""
        if strength not in self.strengths:
            rows = len(self.prompts) * len(self.seeds)
            self.report.plan(rows * self.bench.calls, f"at strength {strength:g}")
            with self.edits.laid(self.model, strength):
                made = self.bench.grid(self.prompts, self.seeds)
            clean, count = self.images["before"][: len(self.prompts)], len(self.prompts)
            asked = self.questions[:count]
            self.strengths[strength] = tuple(w.scores(made, clean, asked) for w in self.seen_by)
            self.report.partial(self.result())
        return self.shares(0, strength)[0].mean

    def search(self, wanted: float) -> None:
        """The smallest strength that is enough; drawn strengths are not drawn again."""
        tried = strengths_of(self.params.strengths, wanted)
        self.needed = smallest_strength(self.reach, tried, wanted)
        if self.needed is None:
            self.report.warn(
                f"No strength up to {max(tried):g} reaches the efficacy {wanted:g}; give larger --strengths."
            )

    # ---- what it comes to ---------------------------------------------------------------------------------

    def shares(self, w: int, strength: float = 1.0) -> tuple[Spread, Spread]:
        """(efficacy, leak) by one witness at a strength."""
        drop = self.before[w][: len(self.prompts)] - self.strengths[strength][w]
        own = len(self.own)
        return tuple(Spread.of(part).by(self.totals[w]) for part in (drop[:own], drop[own:]))

    def findings(self) -> list[Finding]:
        """What each witness says at the edit's own strength."""
        count, found = len(self.prompts), []
        for w, witness in enumerate(self.seen_by):
            lost = self.before[w][count:] - self.after[w][count:]
            found.append(Finding(witness.name, *self.shares(w), Spread.of(lost).by(self.totals[w])))
        return found

    def result(self) -> Result:
        """Everything measured so far."""
        arrays: dict[str, Trace] = {}
        for prefix, w in (("", 0), ("second_", 1))[: len(self.seen_by)]:
            arrays |= {f"{prefix}{name}": trace for name, trace in self._scores(w).items()}
            arrays |= {f"{prefix}{name}": trace for name, trace in self._frontier(w).items()}
        everyone = Axis("prompt", tuple((*self.prompts, *self.far)))
        moved = rms(self.images["after"], self.images["before"])
        arrays["pixel_distance"] = Trace(moved, (everyone, self.axis), "RMS of pixels, range 0 to 1")
        return Result(arrays, self._values(moved), self._named())

    def _scores(self, w: int) -> dict[str, Trace]:
        witness, count = self.seen_by[w], len(self.prompts)
        unit = self.bench.unit if w == 0 else f"score by {witness.name}"
        prompts, own = Axis("prompt", self.prompts), Axis("prompt", self.own)
        before, after = self.before[w], self.after[w]
        change, low, high = change_by_prompt(before[:count], after[:count])
        rise = f"rise of the replacement's score, {unit}"
        found = {
            "before": Trace(before[:count], (prompts, self.axis), unit),
            "after": Trace(after[:count], (prompts, self.axis), unit),
            "score_change": Trace(change, (prompts,), f"change of the {unit}"),
            "score_change_sem": Trace(standard_error((after - before)[:count], 1), (prompts,), unit),
            "score_change_low": Trace(low, (prompts,), f"{unit}, lower end of the 95 % interval"),
            "score_change_high": Trace(high, (prompts,), f"{unit}, upper end of the 95 % interval"),
            "replaced": Trace(self.replaced[w], (own, self.axis), f"{unit}, the replacement's images"),
            "replacement_rise": Trace(self.rise[w], (own, self.axis), rise),
        }
        if self.far:
            far = (Axis("prompt", self.far), self.axis)
            found["unrelated_before"] = Trace(before[count:], far, unit)
            found["unrelated_after"] = Trace(after[count:], far, unit)
        return found

    def _frontier(self, w: int) -> dict[str, Trace]:
        strengths = sorted(self.strengths)
        if len(strengths) < 2:
            return {}
        axis = Axis("strength", tuple(f"{s:g}" for s in strengths))
        found = {}
        for name, spreads in zip(
            ("efficacy", "leak"), zip(*(self.shares(w, s) for s in strengths), strict=True), strict=True
        ):
            for end, what in (("mean", ""), ("low", "_low"), ("high", "_high")):
                numbers = np.array([getattr(s, end) for s in spreads], np.float32)
                unit = f"share of the replacement's effect, {self.seen_by[w].name}"
                found[f"{name}{what}"] = Trace(numbers, (axis,), unit)
        return found

    def _values(self, moved: np.ndarray) -> dict[str, Any]:
        plan, own, count, findings = self.bench.plan, len(self.own), len(self.prompts), self.findings()
        values: dict[str, Any] = {"verdict": verdict(self.concept, findings)}
        for prefix, f, w in zip(("", "second_"), findings, range(2), strict=False):
            for name in ("efficacy", "leak", "unrelated"):
                spread = getattr(f, name)
                ends = {"": spread.mean, "_low": spread.low, "_high": spread.high}
                values |= {f"{prefix}{name}{end}": none_if_nan(v) for end, v in ends.items()}
            values[f"{prefix}total_effect"] = none_if_nan(self.totals[w])
            values[f"{prefix}replacement_rise"] = none_if_nan(Spread.of(self.rise[w]).mean)
            values[f"{prefix or 'first_'}scorer"] = f.scorer
        parts = {"concept": moved[:own], "neighbours": moved[own:count], "unrelated": moved[count:]}
        values |= {f"pixels_{name}": float(part.mean()) for name, part in parts.items() if part.size}
        swap = rms(self.images["replaced"], self.images["before"][:own])
        values |= {"pixels_replaced": float(swap.mean()), "concept_prompts": own}
        values |= {"replacement": self.replacement, "strength_needed": self.needed}
        return values | {n: getattr(plan, n) for n in ("steps", "guidance", "scheduler")}

    def _named(self) -> dict[str, np.ndarray]:
        """Images by what they show: seed0-before-a_star …"""
        texts = (*self.prompts, *self.far)
        return {
            image_name(f"seed{seed}", f"{i:02d}", image_name(text)[:80], when): self.images[when][i, j]
            for j, seed in enumerate(self.seeds)
            for when, names in (("before", texts), ("after", texts), ("replaced", self.own))
            for i, text in enumerate(names)
        }

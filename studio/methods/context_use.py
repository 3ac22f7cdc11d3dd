"""Context or memory: what the answer rests on in a prompt with a context.

Cuts of subject and attribute under both kinds of sources, what the model answers without the context and with
the attribute exchanged, and causal traces of the subject with and without the context, side by side:
From RAGs to Rich Parameters, arXiv 2406.12824.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.methods.attention_knockout import Inputs as KnockoutInputs
from studio.methods.attention_knockout import Params as KnockoutParams
from studio.methods.attention_knockout import attention_knockout
from studio.methods.causal_trace_language import Params as TraceParams
from studio.methods.causal_trace_language import trace_language
from studio.methods.language_prompt import Asked, exchanged, percent, pick_answer, spans
from studio.registry import knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

SOURCES = ("last", "later")
CUT = ("subject", "attribute")
LARGE = 0.2  # a relative change that counts, when the random sets stay under half of it


@dataclass(frozen=True, kw_only=True)
class Inputs(Asked):
    """The prompt with its context; a text in the attribute's place is optional."""

    counterfactual: str | None = knob(
        None, "a text in the attribute's place, of as many tokens: does the answer follow it?"
    )


@dataclass(frozen=True, kw_only=True)
class Params:
    """How it is cut and traced."""

    window: int = knob(9, "layers that are cut together, around each layer", unit="layers", low=1, high=1024)
    controls: int = knob(
        5, "random sets of the same size beside each group, drawn for each seed", unit="sets", low=0, high=100
    )
    trace: bool = knob(True, "trace the subject with and without the context")
    samples: int = knob(10, "draws of the noise of a trace, for each seed", low=1, high=1000)
    noise: float = knob(
        3.0, "noise", unit="standard deviations of the embedding matrix", low=0.01, high=100.0
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    if not (inputs.context or "").strip():
        raise RequestError("--context is missing: the text of which it is asked whether the model reads it.")
    for name in CUT:
        if not (getattr(inputs, name) or "").strip():
            raise RequestError(f"--{name} is missing: the part whose cut tells context from memory.")
    spans(inputs)


def draw(run: Run) -> Figure:
    """Curves of the cuts of subject and attribute under both kinds of sources."""
    change, values = run.result.arrays["relative_change"], run.result.values
    sources, groups, layers = (axis.labels for axis in change.axes)
    series = []
    for s, source in enumerate(sources):
        for g, group in enumerate(groups):
            who = "the last token" if source == "last" else "later tokens"
            line = {"name": f"{group} from {who}", "x": range(len(layers)), "y": change.values[s, g]}
            control = run.result.arrays.get("control")
            draws = control.values[s, :, :, g].reshape(-1, len(layers)) if control else np.array(np.nan)
            if np.isfinite(draws).any():
                line |= {"low": np.nanmin(draws, 0), "high": np.nanmax(draws, 0)}
            series.append({**line, "labels": [""] * len(layers), "line": True})
    axes = {"x_title": "layer (centre of the window)", "y_title": "relative change of the probability"}
    title = f"{run.recipe.model}: context or memory for {values.get('answer', '')!r}"
    return Figure("curve", {"series": series, **axes, "whole": True}, title, str(values.get("verdict", "")))


@method(
    "context-use",
    title="Context or memory",
    paper="arXiv:2406.12824",
    family="language",
    summary="Whether a language model reads its answer in the context or remembers it.",
    needs={"language"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
)
def context_use(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`relative_change`, `knocked_out` (source, group, layer), `control` (source, seed, draw, group, layer),
    `condition_probability` (condition), with traces `position_effect` and `position_share` (condition, kind,
    layer, position)."""
    work = _ContextUse(model, inputs, params, seeds, report)
    work.ask()
    for source in SOURCES:
        work.cut(source)
    work.judge()
    if params.trace:
        work.trace()
    return work.result()


@dataclass(frozen=True, eq=False)
class _Part:
    """The report of a method that runs inside this one: its partial results become parts of ours."""

    whole: Report
    take: Callable[[Result], None]
    prefix: str
    said: set[str]

    @property
    def rows(self) -> int:
        """Rows of one forward."""
        return self.whole.rows

    def plan(self, total: int, what: str = "") -> None:
        """Passed on, with what it is part of."""
        self.whole.plan(total, f"{self.prefix}: {what}")

    def step(self, n: int = 1) -> None:
        """Passed on."""
        self.whole.step(n)

    def partial(self, result: Result) -> None:
        """Taken in."""
        self.take(result)

    def warn(self, sentence: str) -> None:
        """Passed on, once."""
        if sentence not in self.said:
            self.said.add(sentence)
            self.whole.warn(sentence)


class _ContextUse:
    """What is measured so far."""

    def __init__(
        self, model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], report: Report
    ) -> None:
        self.model, self.inputs, self.params, self.seeds, self.report = model, inputs, params, seeds, report
        plain = {n: getattr(inputs, n) for n in Asked.__dataclass_fields__}
        self.asked, self.alone = Asked(**plain), Asked(**plain | {"context": None, "attribute": None})
        self.cuts: dict[str, Result] = {}
        self.traces: dict[str, Result] = {}
        self.values: dict[str, Any] = {"window": params.window}
        self.conditions: dict[str, float] = {}
        self.said: set[str] = set()

    # ---- measuring ---------------------------------------------------------------------------------------

    def ask(self) -> None:
        """The answer with the context, without it, and with the attribute exchanged."""
        self.report.plan(3, "asking")
        prompt = self.model.encode(self.inputs.prompt, self.inputs.context)
        logits = self.model.logits([prompt])[0]
        part = _Part(self.report, lambda result: None, "asking", self.said)
        self.answer = pick_answer(self.model, logits, self.asked, part)
        self.conditions["with the context"] = self.answer.probability
        self.values |= {"answer": self.answer.word, "rank": self.answer.rank, "own_answer": self.answer.own}
        self.report.step()
        self._condition("without the context", self.model.encode(self.inputs.prompt))
        self.report.step()
        if self.inputs.counterfactual is not None:
            other, _ = exchanged(self.model, prompt, self.asked, self.inputs.counterfactual)
            self._condition("with the attribute exchanged", other)
            wanted, _ = self.model.answer_id(self.inputs.counterfactual)
            self.values["follows_the_exchange"] = self.model.word(wanted) == self.values["exchanged_answer"]
        self.report.step()

    def _condition(self, name: str, prompt: Any) -> None:
        """The answer's probability and the model's own answer after another prompt."""
        logits = self.model.logits([prompt])[0].float()
        own = next(t for t in logits.argsort(descending=True).tolist() if not self.model.is_blank(t))
        probability = logits.softmax(-1)
        self.conditions[name] = float(probability[self.answer.id])
        self.values[_OWN[name]] = self.model.word(own)
        self.values[f"{_OWN[name]}_probability"] = float(probability[own])

    def cut(self, source: str) -> None:
        """Knockouts of subject and attribute under one kind of sources."""
        plain = {n: getattr(self.asked, n) for n in Asked.__dataclass_fields__}
        inputs = KnockoutInputs(**plain, groups=CUT)
        params = KnockoutParams(window=self.params.window, sources=source, controls=self.params.controls)
        who = "the last token" if source == "last" else "later tokens"
        part = _Part(self.report, lambda result: self._take(source, result), f"cuts from {who}", self.said)
        self._take(source, attention_knockout(self.model, inputs, params, self.seeds, None, part))

    def _take(self, source: str, result: Result) -> None:
        self.cuts[source] = result
        self.report.partial(self.result())

    def trace(self) -> None:
        """Causal traces of the subject without and with the context; each of the model's own answer there."""
        params = TraceParams(samples=self.params.samples, noise=self.params.noise)
        for name, asked in (("without the context", self.alone), ("with the context", self.asked)):
            part = _Part(
                self.report, lambda result, name=name: self._keep(name, result), f"trace {name}", self.said
            )
            self._keep(name, trace_language(self.model, asked, params, self.seeds, None, part))

    def _keep(self, name: str, result: Result) -> None:
        self.traces[name] = result
        self.report.partial(self.result())

    # ---- results -----------------------------------------------------------------------------------------

    def _strongest(self, source: str, group: str) -> tuple[float, float]:
        """The strongest drop of a group's cut over layers (0 when nothing drops), and the mean of the random
        sets at that layer (NaN without any)."""
        arrays = self.cuts[source].arrays
        change = arrays["relative_change"].at("group", group).values
        layer = int(np.nanargmin(change))
        control = arrays["control"].at("group", group).values[..., layer] if "control" in arrays else np.nan
        known = np.asarray(control)[np.isfinite(control)]
        return min(0.0, float(change[layer])), float(known.mean()) if known.size else float("nan")

    def judge(self) -> None:
        """The verdict, from both kinds of cut with the random sets beside them."""
        drops = {(s, g): self._strongest(s, g) for s in SOURCES for g in CUT}
        counts = {
            g: any(-d >= LARGE and not -c > -d / 2 for d, c in (drops[s, g] for s in SOURCES)) for g in CUT
        }
        own = self.values["without_context_answer"]
        kind = (
            "foreign"
            if self.answer.word != self.answer.own
            else "both"
            if counts["attribute"] and counts["subject"]
            else "context"
            if counts["attribute"]
            else "memory"
            if own == self.answer.word
            else "unclear"
        )
        self.values |= {"reads": kind, "verdict": self._sentence(drops, own, kind)}
        for (source, group), (drop, control) in drops.items():
            self.values[f"{group}_{source}"] = drop
            self.values[f"{group}_{source}_control"] = control if np.isfinite(control) else None
        self.report.partial(self.result())

    def _sentence(self, drops: dict, own: str, kind: str) -> str:
        if kind == "foreign":
            return (
                f"{self.answer.word!r} has a probability of {self.answer.probability:.2g}; the model answers "
                f"{self.answer.own!r}. What an answer rests on can be told only of the model's own."
            )

        def told(group: str, later: str, random: str) -> str:
            change, control = drops["later", group]
            beside = f", {random}{percent(-min(0.0, control))}" if np.isfinite(control) else ""
            return f"({later}{percent(-change)}{beside})"

        fall = {group: percent(-drops["last", group][0]) for group in CUT}
        without = self.values["without_context_answer_probability"]
        return (
            f"{_VERDICTS[kind]} {self.answer.word!r} ({self.answer.probability:.0%}) falls by "
            f"{fall['attribute']} when the last token can't see the attribute in the context "
            f"{told('attribute', 'when no later one can ', 'as many random tokens ')}, by {fall['subject']} "
            f"without the subject {told('subject', 'later ', 'random ')}; without the context the model "
            f"answers {own!r} ({without:.0%})."
        )

    def result(self) -> Result:
        """Everything measured so far."""
        arrays = {
            "condition_probability": Trace(
                np.array(list(self.conditions.values()), np.float32),
                (Axis("condition", tuple(self.conditions)),),
                "probability of the answer",
            )
        }
        if self.cuts:
            done = tuple(self.cuts)
            for name in ("relative_change", "knocked_out", "control"):
                if (first := self.cuts[done[0]].arrays.get(name)) is None:
                    continue  # no random sets were asked for
                stacked = np.stack([self.cuts[s].arrays[name].values for s in done])
                arrays[name] = Trace(stacked, (Axis("source", done), *first.axes), first.unit)
        if self.traces:
            arrays |= self._traced()
        return Result(arrays, dict(self.values))

    def _traced(self) -> dict[str, Trace]:
        """The effects by position, with and without the context; a position that one lacks is NaN."""
        effects = {n: r.arrays["position_effect"] for n, r in self.traces.items()}
        positions = tuple(dict.fromkeys(p for e in effects.values() for p in e.axes[2].labels))
        kinds, layers = next(iter(effects.values())).axes[:2]
        raw = np.full(
            (len(effects), len(kinds.labels), len(layers.labels), len(positions)), np.nan, np.float32
        )
        share = raw.copy()
        for i, (name, effect) in enumerate(effects.items()):
            at = [positions.index(p) for p in effect.axes[2].labels]
            raw[i][..., at] = effect.values
            total = self.traces[name].values["total_effect"]
            self.values[f"total_effect_{name.replace(' ', '_')}"] = float(total)
            share[i][..., at] = effect.values / total if abs(total) > 1e-6 else np.nan
        axes = (Axis("condition", tuple(effects)), kinds, layers, Axis("position", positions))
        unit = next(iter(effects.values())).unit
        return {
            "position_effect": Trace(raw, axes, unit),
            "position_share": Trace(share, axes, "share of the total effect"),
        }


_OWN = {"without the context": "without_context_answer", "with the attribute exchanged": "exchanged_answer"}
_VERDICTS = {
    "context": "It reads the context:",
    "memory": "It remembers:",
    "both": "It reads the context and needs the subject:",
    "unclear": "Neither cut decides:",
}

"""Causal trace of a language model: corrupt some tokens, restore one state, ask for the answer again.

Every cell is exact, from runs of the last tokens alone (models/language_runs.py). Noise and windows: ROME,
arXiv 2202.05262; corrupted sets of prompts with a context: arXiv 2406.12824.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from studio.measure import ratio_of_means, standard_error
from studio.methods.language_cells import KINDS, Cell, Costs, Grid, batch_rows, estimate, restored, stages
from studio.methods.language_corruption import (
    SETS,
    check_corruption,
    corrupted_spans,
    drawn_noise,
    grouped,
    positions,
    replaced_ids,
)
from studio.methods.language_prompt import Asked, percent, pick_answer, spans
from studio.methods.trace_statistics import mean_over_seeds
from studio.registry import knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

METRICS = {
    "probability": "probability of the answer",
    "log-probability": "log-probability of the answer",
    "logit-difference": "logit of the answer minus that of the other",
}
_MOST_COLUMNS = 80  # tokens of a figure; of longer prompts the grouped positions are drawn
_PAUSE = 0.5  # seconds between partial results


@dataclass(frozen=True, kw_only=True)
class Params:
    """How the trace is made."""

    scored: ClassVar[bool] = False  # no second model is asked

    corrupt: str = knob("subject", "the tokens to corrupt", choices=SETS)
    replacement: str | None = knob(
        None, "text of as many tokens that takes the place of what is corrupted; default is noise"
    )
    noise: float = knob(
        3.0, "noise", unit="standard deviations of the embedding matrix", low=0.01, high=100.0
    )
    samples: int = knob(10, "draws of the noise, for each seed", low=1, high=1000)
    kinds: tuple[str, ...] = knob(KINDS, "kinds of states", choices=KINDS)
    window: int = knob(10, "layers restored together, for attention and mlp", unit="layers", low=1, high=1000)
    metric: str = knob("probability", "what is measured", choices=tuple(METRICS))
    against: str | None = knob(None, "the other answer, for --metric logit-difference")


def check(inputs: Asked, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    from studio.errors import RequestError

    check_corruption(inputs, params.corrupt, params.replacement)
    if (params.metric == "logit-difference") != bool((params.against or "").strip()):
        raise RequestError(
            "--metric logit-difference and --against TEXT, the other answer, are given together or not."
        )
    if len(set(params.kinds)) < len(params.kinds):
        raise RequestError("--kinds names a kind twice; each may be given once.")


def draw(run: Run) -> Figure:
    """Heat map: a row a layer of each kind, a column a token from the first corrupted one on (marked by a
    star), or a group of tokens where there are many."""
    arrays, values = run.result.arrays, run.result.values
    effect, marks = arrays["indirect_effect"], arrays["corrupted_tokens"].values
    first = int(np.flatnonzero(marks)[0])
    if effect.values.shape[2] - first > _MOST_COLUMNS:
        effect = arrays["position_effect"]
        cols = list(effect.axes[2].labels)
    else:
        tokens = effect.axis("token").labels
        effect = Trace(
            effect.values[..., first:], (*effect.axes[:2], Axis("token", tokens[first:])), effect.unit
        )
        cols = [f"{t} *" if m else t for t, m in zip(tokens[first:], marks[first:], strict=True)]
    rows = [f"{kind} {layer}" for kind in effect.axes[0].labels for layer in effect.axes[1].labels]
    data = {
        "rows": rows,
        "cols": cols,
        "values": effect.values.reshape(len(rows), len(cols)),
        "names": [[f"{row} · {col}" for col in cols] for row in rows],
        "unit": effect.unit,
        "row_title": "layer",
        "col_title": "token (* corrupted)" if effect.axes[2].name == "token" else "tokens",
    }
    said = f"{run.recipe.params['corrupt']} corrupted"
    title = f"{run.recipe.model}: indirect effect on “{values['answer']}”, {said}"
    said = (
        f"Clean {values['clean']:.3g}, corrupted {values['corrupted']:.3g}, {values['samples_done']} samples."
    )
    return Figure("heat", data, title=title, caption=said)


@method(
    "trace-language",
    title="Causal trace of a language model",
    paper="arXiv:2202.05262",
    family="language",
    summary="Which layer and token of a language model carry what it answers.",
    needs={"language"},
    inputs=Asked,
    params=Params,
    draw=draw,
    check=check,
)
def trace_language(
    model: Any, inputs: Asked, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`clean` (), `corrupted` (sample), `restored`, `indirect_effect` with `_sem`, `normalised_effect` (kind,
    layer, token), `restored_samples` (sample, kind, layer, token), `position_effect` (kind, layer, position),
    `corrupted_tokens` (token)."""
    trace = _Trace(model, inputs, params, seeds, report)
    trace.measure()
    return trace.result()


class _Trace:
    """The state of one trace."""

    def __init__(
        self, model: Any, inputs: Asked, params: Params, seeds: tuple[int, ...], report: Report
    ) -> None:
        self.model, self.params, self.report = model, params, report
        self.prompt = model.encode(inputs.prompt, inputs.context)
        where = corrupted_spans(inputs, params.corrupt)
        self.places = positions(model, self.prompt, where)
        self.inputs, self.first = inputs, self.places[0]
        self.grid = Grid(params.kinds, len(model.blocks), len(self.prompt), self.first, params.window)
        self.sigma, self.labels = 0.0, ("replacement",)
        if params.replacement is None:
            self.ids = self.prompt.ids
            count = len(self.places)
            self.noise, self.sigma = drawn_noise(model, count, params.samples, params.noise, seeds)
            each = [str(i) for i in range(params.samples)]
            self.labels = tuple(i if len(seeds) == 1 else f"{s}.{i}" for s in seeds for i in each)
        else:
            self.ids, self.noise = replaced_ids(model, self.prompt, where, params.replacement), None
        self.groups = self._groups(inputs)
        shape = (len(params.kinds), self.grid.layers, self.grid.length)
        self.clean, self.corrupted = np.nan, np.full(len(self.labels), np.nan, np.float32)
        self.restored = np.full((len(self.labels), *shape), np.nan, np.float32)
        self.values: dict[str, Any] = {}
        self._base: tuple[Any, ...] = (None,)  # of the latest samples: these, logits, layers
        self._said = 0.0

    def _groups(self, inputs: Asked) -> dict[str, tuple[int, ...]]:
        """Tokens by their place beside the subject, or beside what is corrupted where no subject is given."""
        if (inputs.subject or "").strip():
            subject = self.model.span_tokens(self.prompt, spans(inputs)["subject"][0])
            return grouped(subject, min(self.first, subject[0]), len(self.prompt))
        return grouped(self.places, self.first, len(self.prompt), "corrupted")

    # ---- measuring ---------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Every cell and sample, coarse first; partial results on the way."""
        from studio.models.language_runs import prompt_runs

        flops, whole = estimate(self.grid, Costs.of(self.model, self.grid.length), len(self.labels))
        self.values |= {"flops": float(flops), "flops_of_whole_forwards": float(whole)}
        cells = len(self.grid.cells()) * len(self.labels)
        self.report.plan(cells, f"tracing, about {_amount(flops)} operations")
        with prompt_runs(self.model, self.prompt.ids, self.first, lambda: self.report.step(0)) as runs:
            runs.check()
            self._ask(runs)
            shown = [tokens[-1] for tokens in self.groups.values()]
            for samples, chosen in stages(self.grid, len(self.labels), shown):
                for block in self._blocks(samples):
                    self._take(runs, block, chosen)
                self._show(always=True)
        self._verdict()

    def _ask(self, runs: Any) -> None:
        """The answer, and how it is measured."""
        picked = pick_answer(self.model, runs.logits, self.inputs, self.report)
        self.answer = picked.id
        self.other = None
        if self.params.against:
            self.other, warning = self.model.answer_id(self.params.against)
            if warning:
                self.report.warn(warning.replace("The answer", "--against"))
        self.clean = float(self._score(runs.logits))
        self.values |= {
            "answer": picked.word,
            "clean": self.clean,
            "probability": picked.probability,
            "rank": picked.rank,
            "own_answer": picked.own,
        }

    def _score(self, logits: Any) -> np.ndarray:
        """The metric of logits (…, vocabulary), float32 (…)."""
        if self.params.metric == "probability":
            found = logits.softmax(-1)[..., self.answer]
        elif self.params.metric == "log-probability":
            found = logits.log_softmax(-1)[..., self.answer]
        else:
            found = logits[..., self.answer] - logits[..., self.other]
        return found.cpu().numpy()

    @property
    def _rows(self) -> int:
        return batch_rows(self.report.rows, self.model.heads[0], self.grid.length)

    def _blocks(self, samples: range) -> list[range]:
        """Samples that are run together."""
        size = max(1, self._rows // (self.grid.length - self.first))
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _take(self, runs: Any, samples: range, cells: Sequence[Cell]) -> None:
        """Some cells of some samples."""
        if self._base[0] != samples:
            self._base = samples, *runs.run(self._embedded(runs, samples))
        _, logits, base = self._base
        rows = slice(samples.start, samples.stop)
        self.corrupted[rows] = self._score(logits)
        self.top = int(logits[0].argmax())
        known = [cell for cell in cells if self.grid.run_of(cell) is None]
        for cell in known:
            self._put(rows, cell, self.clean if self.grid.is_clean(cell) else self.corrupted[rows])
        self.report.step(len(samples) * len(known))
        for batch in restored(runs, base, self.grid, cells, self._rows):
            for alike, found in batch:
                score = self._score(found)
                for cell in alike:
                    self._put(rows, cell, score)
                self.report.step(len(samples) * len(alike))
            self._show()

    def _put(self, rows: slice, cell: Cell, values: Any) -> None:
        self.restored[rows, self.params.kinds.index(cell[0]), cell[1], cell[2]] = values

    def _embedded(self, runs: Any, samples: range) -> Any:
        """What goes into the first block of corrupted runs."""
        if self.noise is None:
            return runs.embedded(self.ids)
        drawn = self.noise[samples.start : samples.stop]
        full = drawn.new_zeros(len(drawn), len(self.prompt) - self.first, drawn.shape[2])
        full[:, [t - self.first for t in self.places]] = drawn
        return runs.embedded(self.ids, full)

    def _show(self, *, always: bool = False) -> None:
        """Sends what is known, not too often."""
        if always or time.monotonic() - self._said > _PAUSE:
            self._said = time.monotonic()
            self.report.partial(self.result())

    def _verdict(self) -> None:
        """The finding; warns of a corruption that leaves the answer as it was."""
        total = self.clean - float(self.corrupted.mean())
        self.values["finding"] = self._finding(total)
        small = 0.05 if self.params.metric != "probability" else 0.05 * self.clean
        if total < small:
            more = "raise --noise or " if self.noise is not None else ""
            self.report.warn(
                f"The corruption takes only {total:.3g} from the {METRICS[self.params.metric]} "
                f"({self.clean:.3g}), so the effects say little; {more}corrupt other tokens."
            )

    def _finding(self, total: float) -> str:
        """One sentence: what the corruption takes, and which state before the last token (whose late states
        bring everything back) restores most of it."""
        what = METRICS[self.params.metric].replace("the answer", repr(self.values["answer"]))
        lost = f"The corruption takes the {what} from {self.clean:.3g} to {self.clean - total:.3g}"
        effect = mean_over_seeds(self.restored - self.corrupted[:, None, None, None])[..., self.first : -1]
        if not effect.size:
            return f"{lost}; there is no token between it and the last one."
        kind, layer, place = np.unravel_index(int(effect.argmax()), effect.shape)
        best, token = float(effect.max()), self.prompt.tokens[self.first + place].strip()
        share = f", {percent(best / total)} of what was lost" if total > 0.01 * abs(self.clean) else ""
        return (
            f"{lost}; before the last token {self.params.kinds[kind]} {layer} at {token!r} brings back most: "
            f"{best:.3g}{share}."
        )

    # ---- results -----------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Everything measured so far."""
        kinds = Axis("kind", self.params.kinds)
        layers = Axis("layer", tuple(map(str, range(self.grid.layers))))
        tokens, sample = Axis("token", self.prompt.tokens), Axis("sample", self.labels)
        place, unit = (kinds, layers, tokens), METRICS[self.params.metric]
        effects = self.restored - self.corrupted[:, None, None, None]
        effect, total = mean_over_seeds(effects), self.clean - float(np.nanmean(self.corrupted))
        done = int(np.isfinite(self.corrupted).sum())
        marks = np.isin(np.arange(self.grid.length), self.places).astype(np.float32)
        arrays = {
            "clean": Trace(np.float32(self.clean).reshape(()), (), unit),
            "corrupted": Trace(self.corrupted, (sample,), unit),
            "restored": Trace(mean_over_seeds(self.restored), place, unit),
            "indirect_effect": Trace(effect, place, unit),
            "indirect_effect_sem": Trace(_known_error(effects), place, unit),
            "normalised_effect": Trace(ratio_of_means(effect, total), place, "share of the total effect"),
            "restored_samples": Trace(self.restored, (sample, *place), unit),
            "position_effect": self._positions(effect, (kinds, layers), unit),
            "corrupted_tokens": Trace(marks, (tokens,), "1 where corrupted"),
        }
        values = {
            **self.values,
            "corrupted": float(np.nanmean(self.corrupted)),
            "total_effect": total,
            "samples_done": done,
            "corrupted_first": self.model.word(self.top),
            "sigma": self.sigma,
            "noise": self.params.noise if self.noise is not None else 0.0,
            "first_corrupted": self.first,
        }
        return Result(arrays, values)

    def _positions(self, effect: np.ndarray, place: tuple[Axis, Axis], unit: str) -> Trace:
        """Means over the tokens of each position of those that are known."""
        means = [mean_over_seeds(np.moveaxis(effect[..., list(t)], -1, 0)) for t in self.groups.values()]
        return Trace(np.stack(means, -1), (*place, Axis("position", tuple(self.groups))), unit)


def _known_error(effects: np.ndarray) -> np.ndarray:
    """Standard errors (cells) over the samples that are known, ddof 1; NaN under two."""
    count = np.isfinite(effects).sum(0)
    if (count == len(effects)).all():
        return standard_error(effects)
    mean = mean_over_seeds(effects)
    spread = np.nansum((effects - mean) ** 2, 0, dtype=np.float64) / np.maximum(count - 1, 1)
    return np.where(count > 1, np.sqrt(spread / np.maximum(count, 1)), np.nan).astype(np.float32)


def _amount(operations: float) -> str:
    """A number of operations as people write it."""
    for name, size in (("peta", 1e15), ("tera", 1e12), ("giga", 1e9)):
        if operations >= size:
            return f"{operations / size:.3g} {name}"
    return f"{operations / 1e6:.3g} mega"

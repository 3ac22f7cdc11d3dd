"""Causal mediation inside the text encoder: corrupt the subject's embeddings, restore one state, draw, score.

Restored: the output of self-attention, of the MLP, or the hidden state, at one layer and token. Text passes
are free; an image is made once for each distinct resulting embedding. Diff-QuickFix, arXiv 2310.13730,
section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studio.methods.noise_search import SEARCH, Noise, settle, warn_weak, without_subject
from studio.methods.text_to_image import (
    NOISE,
    Bench,
    CorruptionInputs,
    SamplingParams,
    ScoreParams,
    check_corruption,
    corruption_patches,
    image_name,
    warn_lost_tokens,
)
from studio.methods.trace_statistics import caption, chance_values, effect_arrays, known_mean, warn_chance
from studio.registry import knob, method
from studio.types import Axis, Figure, Patch, Report, Result, Run, Site, Trace

KINDS = ("self-attention", "mlp", "hidden")
SAME = 1e-5  # embeddings closer than this, relative to their size, give one image
TEXT_ROWS = 64
_SKETCH = 64  # numbers that stand for a text state until two of them look alike

Cell = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the trace is made."""

    noise: float = NOISE
    search_noise: bool = SEARCH
    kinds: tuple[str, ...] = knob(KINDS, "kinds of states", choices=KINDS)


def check(inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    check_corruption(inputs)


def draw(run: Run) -> Figure:
    """Heat map: a row a layer of each kind, a column a token."""
    effect = run.result.arrays["indirect_effect"]
    kinds, layers, tokens = (effect.axis(n).labels for n in ("kind", "layer", "token"))
    rows = [f"{kind} {layer}" for kind in kinds for layer in layers]
    names = [[f"{row} · {token}" for token in tokens] for row in rows]
    data = {
        "rows": rows,
        "cols": list(tokens),
        "values": effect.values.reshape(len(rows), len(tokens)),
        "names": names,
        "unit": effect.unit,
        "row_title": "layer",
        "col_title": "token",
    }
    title = f"{run.recipe.model}: indirect effect, “{run.recipe.inputs['prompt']}”"
    return Figure("heat", data, title=title, caption=caption(run.result.values, len(run.recipe.seeds)))


@method(
    "trace-text-encoder",
    title="Causal trace of the text encoder",
    paper="arXiv:2310.13730",
    family="diffusion",
    summary="Which layer and token of the text encoder carry a part of the prompt.",
    needs={"text_encoder"},
    inputs=CorruptionInputs,
    params=Params,
    draw=draw,
    check=check,
)
def trace_text_encoder(
    model: Any, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`clean`, `corrupted` (seed), `restored` (seed, kind, layer, token), `indirect_effect` with `_sem`,
    `_low`, `_high` and `normalised_effect` (kind, layer, token)."""
    bench = Bench.of(model, params, inputs.prompt, scorer, report)
    warn_lost_tokens(model, [inputs.prompt, *([inputs.replacement] if inputs.replacement else [])], report)
    trace = _Trace(bench, inputs, params, seeds, settle(bench, inputs, params, seeds))
    report.plan(len(list(trace.cells())), "encoding")
    for j in range(len(seeds)):
        states, index = trace.embeddings(j)
        if j == 0:  # other seeds have as many, but for a coincidence
            report.plan(len(states) * len(seeds) * bench.calls, "tracing")
        trace.take_seed(j, states, index)
    trace.verdict(report)
    return trace.result()


class _Trace:
    """The state of one trace."""

    def __init__(
        self, bench: Bench, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...], noise: Noise
    ) -> None:
        self.bench, self.inputs, self.params, self.seeds, self.noise = bench, inputs, params, seeds, noise
        row = bench.model.tokens(inputs.prompt)
        self.tokens, self.places = row.trace_labels(), row.trace_positions()
        self.layers = [s for part in bench.model.encoders for s in bench.model.text_sites("hidden", part)]
        one = len(bench.model.encoders) == 1
        self.layer_labels = tuple(str(s.layer) if one else f"{s.part}.{s.layer}" for s in self.layers)
        shape = (len(seeds), len(params.kinds), len(self.layers), len(self.tokens))
        self.clean, self.corrupted = (
            np.full(len(seeds), np.nan, np.float32),
            np.full(len(seeds), np.nan, np.float32),
        )
        self.restored, self.images, self.distinct = np.full(shape, np.nan, np.float32), {}, 0
        self.removed = np.full(len(seeds), np.nan, np.float32)
        asks = inputs.replacement is None and noise.removal is None
        self.without = bench.model.encode([without_subject(inputs)])[0] if asks else None

    def cells(self) -> Iterator[Cell]:
        """(kind, layer, token) of every cell."""
        return itertools.product(
            range(len(self.params.kinds)), range(len(self.layers)), range(len(self.tokens))
        )

    def patches(self, cell: Cell, row: int) -> list[Patch]:
        """Copies the clean state (row 0) at one cell into `row`."""
        kind, layer, token = cell
        site = Site(self.layers[layer].part, self.layers[layer].layer, self.params.kinds[kind])
        return [Patch(site, do="copy", value=0, at=self.places[token], rows=(row,))]

    def embeddings(self, j: int) -> tuple[Any, np.ndarray]:
        """(text states to make images of, index of the state of each row): rows are clean, corrupted, then
        the cells. Cells whose state equals an earlier one's share it, so that its image is made once. The
        prompt without its subject is the last state where it is asked for."""
        cells, pool, index = list(self.cells()), Distinct(2 + self.restored[0].size), []
        for start in range(0, len(cells), TEXT_ROWS):
            chunk = cells[start : start + TEXT_ROWS]
            cond = self._encode(j, chunk)
            index.append(pool.add(cond if not start else cond.rows(range(2, len(cond)))))
            self.bench.report.step(0 if j else len(chunk))
        self.distinct = max(self.distinct, len(pool))
        states = pool.states() if self.without is None else pool.states().join(self.without)
        return states, np.concatenate(index)

    def _encode(self, j: int, cells: list[Cell]) -> Any:
        """Text states of rows: clean, corrupted, and one a cell."""
        inputs, rows = self.inputs, range(1, len(cells) + 2)
        if inputs.replacement is None:
            patches = [
                p
                for r in rows
                for p in corruption_patches(
                    self.bench.model,
                    inputs.prompt,
                    inputs.subject,
                    inputs.subject_occurrence,
                    self.noise.scale,
                    self.seeds[j],
                    r,
                )
            ]
            texts = [inputs.prompt] * (len(cells) + 2)
        else:
            patches, texts = [], [inputs.prompt] + [inputs.replacement] * (len(cells) + 1)
        patches += [p for i, cell in enumerate(cells) for p in self.patches(cell, 2 + i)]
        return self.bench.model.encode(texts, patches=patches)[0]

    def take_seed(self, j: int, states: Any, index: np.ndarray) -> None:
        """All images of one seed; partial results after every batch."""
        scores, images = np.full(len(states), np.nan, np.float32), {}
        for start in range(0, len(states), self.bench.report.rows):
            rows = list(range(start, min(len(states), start + self.bench.report.rows)))
            made = self.bench.images(states.rows(rows), [self.seeds[j]] * len(rows))
            images |= dict(zip(rows, made, strict=True))
            scores[rows] = self.bench.score(made, images[0])
            self.clean[j], self.corrupted[j] = scores[index[0]], scores[index[1]]
            self.restored[j] = scores[index[2:]].reshape(self.restored[j].shape)
            named = {("clean",): index[0], ("corrupted",): index[1]}
            if self.without is not None:
                named[("removed",)], self.removed[j] = len(states) - 1, scores[-1]
            if j == 0:
                cells = zip(self.cells(), index[2:], strict=True)
                named |= {self.cell_name(c): i for c, i in cells}
            known = [(n, i) for n, i in named.items() if i in images]
            self.images |= {image_name(f"seed{self.seeds[j]}", *n): images[i] for n, i in known}
            self.bench.report.partial(self.result())

    def cell_name(self, cell: Cell) -> tuple[str, str, str]:
        """kind, layer and token position, for image names."""
        return self.params.kinds[cell[0]], self.layer_labels[cell[1]], f"token{cell[2]}"

    def effects(self) -> np.ndarray:
        """(seed, kind, layer, token) effects, NaN where a cell is not measured yet."""
        return self.restored - self.corrupted[:, None, None, None]

    def removal(self) -> np.ndarray:
        """What removing the subject takes from the score (seed,), NaN where that is not measured."""
        return self.noise.removal if self.noise.removal is not None else self.clean - self.removed

    def verdict(self, report: Report) -> None:
        """Warns of a corruption that is too weak, and of effects within the reach of chance."""
        total, removal = known_mean(self.clean - self.corrupted), known_mean(self.removal())
        warn_weak(report, self.noise, self.params.metric, total, np.nan if removal is None else removal)
        warn_chance(report, self.effects())

    def result(self) -> Result:
        """Everything measured so far."""
        seed, kind = Axis("seed", tuple(map(str, self.seeds))), Axis("kind", self.params.kinds)
        place = (kind, Axis("layer", self.layer_labels), Axis("token", self.tokens))
        unit, effects, total = self.bench.unit, self.effects(), self.clean - self.corrupted
        arrays = {
            "clean": Trace(self.clean, (seed,), unit),
            "corrupted": Trace(self.corrupted, (seed,), unit),
            "restored": Trace(self.restored, (seed, *place), unit),
            **effect_arrays(effects, total, place, unit),
        }
        values = {
            **{name: getattr(self.bench.plan, name) for name in ("steps", "guidance", "scheduler")},
            **self.noise.values(),
            "distinct_embeddings": self.distinct,
            "total_effect": known_mean(total),
            "removal_effect": known_mean(self.removal()),
            **chance_values(effects),
        }
        return Result(arrays, values, dict(self.images))


class Distinct:
    """Text states without repeats: a row within SAME of an earlier one, relative to the largest entry of the
    first row, is that one.

    Every row is sketched by its products with a few random sign vectors, drawn with a fixed seed. Rows that
    are the same have sketches within a bound that follows from SAME, so only rows with such sketches are
    compared entry by entry.
    """

    def __init__(self, most: int) -> None:
        self._rows: list[Any] = []
        self._sketches = np.zeros((most, _SKETCH), np.float32)
        self._first, self._signs, self._limit = None, None, 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def states(self) -> Any:
        """The kept states, in the order in which they came."""
        import torch

        first, flat = self._first, torch.stack(self._rows)
        width = first.states[0].numel()
        states = flat[:, :width].reshape(-1, *first.states.shape[1:]).to(first.states.dtype)
        pooled = None if first.pooled is None else flat[:, width:].to(first.pooled.dtype)
        return replace(first, states=states, pooled=pooled)

    def add(self, cond: Any) -> np.ndarray:
        """The place of each row's state among the kept ones; new states are kept."""
        import torch

        pooled = [] if cond.pooled is None else [cond.pooled]
        flat = torch.cat([cond.states.flatten(1).float(), *(p.float() for p in pooled)], dim=1)
        if self._first is None:
            self._start(cond, flat)
        sketches = (flat @ self._signs).cpu().numpy()
        index, bound = np.zeros(len(flat), int), self._limit * flat.shape[1]
        for i, row in enumerate(flat):
            n = len(self._rows)
            alike = np.flatnonzero(np.abs(self._sketches[:n] - sketches[i]).max(1, initial=0) <= bound)
            same = (k for k in alike if float((self._rows[k] - row).abs().max()) <= self._limit)
            index[i] = next(same, n)
            if index[i] == n:
                self._rows.append(row.clone())
                self._sketches[n] = sketches[i]
        return index

    def _start(self, cond: Any, flat: Any) -> None:
        """Draws the signs, and takes the measure of what counts as the same."""
        import torch

        self._first, self._limit = cond.rows([0]), SAME * float(flat[0].abs().max())
        generator = torch.Generator("cpu").manual_seed(0)
        signs = torch.randint(0, 2, (flat.shape[1], _SKETCH), generator=generator)
        self._signs = (2.0 * signs - 1).to(flat.device)

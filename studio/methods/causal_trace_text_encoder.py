"""Causal mediation inside the text encoder: corrupt the subject's embeddings, restore one state, draw, score.

Restored: the output of self-attention, of the MLP, or the hidden state, at one layer and token. Text passes
are free; an
image is made once for each distinct resulting embedding. Diff-QuickFix, arXiv 2310.13730, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.measure import standard_error
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
from studio.registry import knob, method
from studio.types import Axis, Figure, Patch, Report, Result, Run, Site, Trace

KINDS = ("self-attention", "mlp", "hidden")
SAME = 1e-5  # embeddings closer than this, relative to their size, give one image
TEXT_ROWS = 64

Cell = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the trace is made."""

    noise: float = NOISE
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
    return Figure("heat", data, title=f"{run.recipe.model}: indirect effect, “{run.recipe.inputs['prompt']}”")


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
    """`clean`, `corrupted` (seed), `restored` (seed, kind, layer, token), `indirect_effect`,
    `indirect_effect_sem`."""
    bench = Bench.of(model, params, inputs.prompt, scorer, report)
    warn_lost_tokens(model, [inputs.prompt, *([inputs.replacement] if inputs.replacement else [])], report)
    trace = _Trace(bench, inputs, params, seeds)
    states = [trace.embeddings(j) for j in range(len(seeds))]
    report.plan(sum(len(distinct) for distinct, _ in states) * bench.plan.steps, "tracing")
    for j, (distinct, images_of) in enumerate(states):
        trace.take_seed(j, distinct, images_of)
    return trace.result()


class _Trace:
    """The state of one trace."""

    def __init__(
        self, bench: Bench, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...]
    ) -> None:
        self.bench, self.inputs, self.params, self.seeds = bench, inputs, params, seeds
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
        """(distinct text states, index of the state of each row): rows are clean, corrupted, then the cells.

        Cells whose state equals an earlier one's share it, so that its image is made once.
        """
        cells, parts = list(self.cells()), []
        for start in range(0, len(cells), TEXT_ROWS):
            chunk = cells[start : start + TEXT_ROWS]
            parts.append(self._encode(j, chunk))
        cond = (
            parts[0].rows(range(len(parts[0])))
            if len(parts) == 1
            else parts[0].join(*[p.rows(range(2, len(p))) for p in parts[1:]])
        )
        index, kept = _distinct(cond)
        return cond.rows(kept), index

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
                    self.params.noise,
                    self.seeds[j],
                    r,
                )
            ]
            texts = [inputs.prompt] * (len(cells) + 2)
        else:
            patches, texts = [], [inputs.prompt] + [inputs.replacement] * (len(cells) + 1)
        patches += [p for i, cell in enumerate(cells) for p in self.patches(cell, 2 + i)]
        return self.bench.model.encode(texts, patches=patches)[0]

    def take_seed(self, j: int, distinct: Any, index: np.ndarray) -> None:
        """All images of one seed; partial results after every batch."""
        cells, scores, images, clean = (
            list(self.cells()),
            np.full(len(distinct), np.nan, np.float32),
            {},
            None,
        )
        self.distinct = max(self.distinct, len(distinct))
        for start in range(0, len(distinct), self.bench.report.rows):
            rows = range(start, min(len(distinct), start + self.bench.report.rows))
            made = self.bench.images(distinct.rows(list(rows)), [self.seeds[j]] * len(rows))
            clean = made[0] if clean is None else clean
            scores[list(rows)] = self.bench.score(made, clean)
            images |= dict(zip(rows, made, strict=True))
            self.clean[j], self.corrupted[j] = scores[index[0]], scores[index[1]]
            self.restored[j] = scores[index[2:]].reshape(self.restored[j].shape)
            seed = f"seed{self.seeds[j]}"
            self.images |= {
                image_name(seed, name): images[index[i]]
                for i, name in enumerate(("clean", "corrupted"))
                if index[i] in images
            }
            if j == 0:
                self.images |= {
                    image_name(seed, *self.cell_name(c)): images[i]
                    for c, i in zip(cells, index[2:], strict=True)
                    if i in images
                }
            self.bench.report.partial(self.result())

    def cell_name(self, cell: Cell) -> tuple[str, str, str]:
        """kind, layer and token position, for image names."""
        return self.params.kinds[cell[0]], self.layer_labels[cell[1]], f"token{cell[2]}"

    def result(self) -> Result:
        """Everything measured so far."""
        effects = self.restored - self.corrupted[:, None, None, None]
        done = ~np.isnan(effects).all(0)
        mean = np.full(effects.shape[1:], np.nan, np.float32)
        mean[done] = np.nanmean(effects[:, done], axis=0)
        seed = Axis("seed", tuple(map(str, self.seeds)))
        place = (
            Axis("kind", self.params.kinds),
            Axis("layer", self.layer_labels),
            Axis("token", self.tokens),
        )
        unit = self.bench.unit
        arrays = {
            "clean": Trace(self.clean, (seed,), unit),
            "corrupted": Trace(self.corrupted, (seed,), unit),
            "restored": Trace(self.restored, (seed, *place), unit),
            "indirect_effect": Trace(mean, place, unit),
            "indirect_effect_sem": Trace(standard_error(effects), place, unit),
        }
        plan, total = self.bench.plan, self.clean - self.corrupted
        values = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "scheduler": plan.scheduler,
            "noise": self.params.noise,
            "distinct_embeddings": self.distinct,
            "total_effect": float(np.nanmean(total)) if np.isfinite(total).any() else None,
        }
        return Result(arrays, values, dict(self.images))


def _distinct(cond: Any) -> tuple[np.ndarray, list[int]]:
    """(index of the state of every row, rows that are kept): rows within SAME of an earlier one are that
    one."""
    import torch

    flat = (
        cond.states.flatten(1)
        if cond.pooled is None
        else torch.cat([cond.states.flatten(1), cond.pooled], dim=1)
    )
    flat = flat.float()
    limit = SAME * float(flat.abs().max())
    kept, index = [], np.zeros(len(flat), int)
    for i, row in enumerate(flat):
        near = torch.nonzero((flat[kept] - row).abs().amax(1) <= limit) if kept else []
        index[i] = int(near[0]) if len(near) else len(kept)
        if not len(near):
            kept.append(i)
    return index, kept

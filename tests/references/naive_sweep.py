"""Averages over rows, written out: one number after the other, as slowly as it reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from studio.types import Trace


def mean_and_error(traces: Sequence[Trace]) -> dict[tuple[str, ...], tuple[float, float]]:
    """{labels of a cell: (mean over rows of their means over seeds, standard error over rows)} of traces in
    which the axis "seed", if there is one, comes first."""
    cells: dict[tuple[str, ...], list[float]] = {}
    for trace in traces:
        axes = [a for a in trace.axes if a.name != "seed"]
        repeats = len(trace.axes[0].labels) if trace.axes and trace.axes[0].name == "seed" else None
        for place in itertools.product(*(range(len(a.labels)) for a in axes)):
            if repeats is None:
                numbers = [float(trace.values[place])]
            else:
                numbers = [float(trace.values[(s, *place)]) for s in range(repeats)]
            known = [n for n in numbers if not math.isnan(n)]
            mean = sum(known) / len(known) if known else math.nan
            labels = tuple(a.labels[i] for a, i in zip(axes, place, strict=True))
            cells.setdefault(labels, []).append(mean)
    return {labels: _of(rows) for labels, rows in cells.items()}


def _of(rows: list[float]) -> tuple[float, float]:
    known = [r for r in rows if not math.isnan(r)]
    mean = sum(known) / len(known) if known else math.nan
    if len(rows) < 2 or len(known) < len(rows):
        return mean, math.nan
    return mean, math.sqrt(sum((r - mean) ** 2 for r in rows) / (len(rows) - 1) / len(rows))

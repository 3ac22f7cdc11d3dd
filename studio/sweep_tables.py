"""What a sweep found: one table of its runs, one of its arrays averaged over rows, and one figure.

The unit is the row (a prompt): for every combination of the grid and every array the mean over rows of their
means over seeds, its standard error over rows (ddof 1), and from three rows on the 95 % interval of a nested
bootstrap over rows and seeds (over seeds when there is one row). Only arrays whose axes are equal, label by
label, are averaged; others make groups of their own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.figures import harmless
from studio.measure import nested_bootstrap, standard_error
from studio.registry import Method
from studio.types import Axis, Figure, Result, Trace

REPEATS = ("seed", "sample")  # axes of repeated measurements within one run
_PARTS = ("sem", "low", "high")  # NAME_sem and so on say how sure an array NAME is
FEWEST = 3  # rows for an interval
MOST_ENTRIES = 50_000  # of an array of one run; larger ones stay in their runs
_AT_ONCE = 2000  # cells whose bootstrap means are in memory together
_MOST_CELLS = 60  # rows, and columns, of the figure


@dataclass(frozen=True)
class Mean:
    """An array over several runs: `mean`, its standard error and the ends of its interval under one set of
    axes; `rows` runs are in it."""

    mean: Trace
    sem: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: int


def combine(method: Method, results: Sequence[Result]) -> dict[str, list[Mean]]:
    """Every array of numbers over the rows of one combination, a Mean for each set of equal axes, the
    largest group first. The method's own way of combining, where it declares one, stands before the plain
    mean."""
    own = {}
    if method.combine is not None:
        try:
            own = _own(method.combine(results), len(results))
        except RequestError:  # its runs do not fit together: groups, as for any other method
            own = {}
    names = dict.fromkeys(n for r in results for n in r.arrays if not _part(n, r.arrays))
    plain = {n: _groups([r.arrays[n] for r in results if n in r.arrays]) for n in names if n not in own}
    return {n: g for n, g in {**own, **plain}.items() if g}


def _part(name: str, arrays: Mapping[str, Any]) -> bool:
    """Whether an array only says how sure another one is."""
    base, _, tail = name.rpartition("_")
    return tail in _PARTS and base in arrays


def _own(arrays: Mapping[str, Trace], rows: int) -> dict[str, list[Mean]]:
    """Arrays of a method's combine() with their standard errors and intervals, if it gives some."""
    out = {}
    for name, trace in arrays.items():
        if not _part(name, arrays):
            gap = np.full(trace.values.shape, np.nan, np.float32)
            parts = [arrays[f"{name}_{p}"].values if f"{name}_{p}" in arrays else gap for p in _PARTS]
            out[name] = [Mean(trace, *parts, rows)]
    return out


def _groups(traces: Sequence[Trace]) -> list[Mean]:
    """A Mean for every set of traces with equal axes, repeats left out of the comparison."""
    groups: dict[Any, list[Trace]] = {}
    for trace in traces:
        if trace.values.dtype != np.uint8 and 0 < trace.values.size <= MOST_ENTRIES:  # no images
            axes = tuple(a for a in trace.axes if a.name not in REPEATS)
            groups.setdefault((axes, trace.unit), []).append(trace)
    found = [_mean(axes, unit, members) for (axes, unit), members in groups.items()]
    return sorted(found, key=lambda m: -m.rows)


def _mean(axes: tuple[Axis, ...], unit: str, traces: Sequence[Trace]) -> Mean:
    shape = tuple(len(a.labels) for a in axes)
    units = [_repeats_first(t).reshape(-1, *shape) for t in traces]  # (repeat, *cell)
    means = np.stack([_known_mean(u) for u in units])
    low, high = _interval(units)
    return Mean(
        Trace(_known_mean(means).astype(np.float32), axes, unit),
        np.asarray(standard_error(means)),
        low,
        high,
        len(traces),
    )


def _interval(units: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """nested_bootstrap, some cells at a time, which draws the same rows and seeds for all of them; NaN for
    fewer than three rows (three seeds of one row)."""
    if max(len(units), len(units[0]) if len(units) == 1 else 0) < FEWEST:
        gap = np.full(units[0].shape[1:], np.nan, np.float32)
        return gap, gap
    flat = [u.reshape(len(u), -1) for u in units]
    starts = range(0, flat[0].shape[1], _AT_ONCE)
    parts = [nested_bootstrap([f[:, i : i + _AT_ONCE] for f in flat]) for i in starts]
    low, high = (np.concatenate(ends).reshape(units[0].shape[1:]) for ends in zip(*parts, strict=True))
    return low, high


def _repeats_first(trace: Trace) -> np.ndarray:
    first = [i for i, a in enumerate(trace.axes) if a.name in REPEATS]
    return np.moveaxis(trace.values.astype(np.float64), first, range(len(first)))


def _known_mean(values: np.ndarray) -> np.ndarray:
    """The mean over axis 0 in float64, NaN left out, NaN where nothing is known."""
    count = np.isfinite(values).sum(0)
    total = np.where(np.isfinite(values), values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# ---- tables -----------------------------------------------------------------------------------------------


def runs_table(rows: Sequence[tuple[Mapping[str, Any], Result | None]]) -> str:
    """CSV, one line a run: what is told of it, then its numbers: values that are numbers, arrays that are
    one number (its mean over repeats), and of every other array the largest entry and where it stands."""
    lines = [{**told, **_others(_numbers(result) if result else {}, told)} for told, result in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for line in lines for k in line)), restval="")
    writer.writerow({k: harmless(k) for k in writer.fieldnames})
    for line in lines:
        writer.writerow({k: _cell(v) for k, v in line.items()})
    return out.getvalue()


def _others(numbers: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in numbers.items() if k not in told}


def _numbers(result: Result) -> dict[str, Any]:
    numeric = {
        k: v for k, v in result.values.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    for name, trace in result.arrays.items():
        found = [] if _part(name, result.arrays) else _groups([trace])
        if not found:
            continue
        mean = found[0].mean
        if not mean.axes:
            numeric[name] = float(mean.values)
        elif best := mean.best(1):
            numeric[f"{name}: largest"] = best[0][1]
            numeric[f"{name}: largest at"] = "; ".join(best[0][0])
    return numeric


def _cell(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.9g}"
    return value if isinstance(value, int) else harmless(_words(value))


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def combined_table(cells: Sequence[tuple[Mapping[str, Any], Mapping[str, Sequence[Mean]]]]) -> str:
    """CSV, one line for each entry of each array of each combination: the combination, array, group (of
    equal axes, from 1), rows, the place as name=label, mean, sem, low, high, unit."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = list(dict.fromkeys(k for varied, _ in cells for k in varied))
    head = ("array", "group", "rows", "place", "mean", "sem", "low", "high", "unit")
    writer.writerow([*map(harmless, names), *head])
    for varied, arrays in cells:
        for name, groups in arrays.items():
            for number, m in enumerate(groups, 1):
                start = [*(_cell(varied.get(n)) for n in names), harmless(name), number, m.rows]
                for index in np.ndindex(m.mean.values.shape):
                    place = "; ".join(
                        f"{a.name}={a.labels[i]}" for a, i in zip(m.mean.axes, index, strict=True)
                    )
                    entry = (m.mean.values[index], m.sem[index], m.low[index], m.high[index])
                    numbers = [f"{float(v):.9g}" for v in entry]
                    writer.writerow([*start, harmless(place), *numbers, harmless(m.mean.unit)])
    return out.getvalue()


# ---- the figure -------------------------------------------------------------------------------------------


def draw(title: str, cells: Sequence[tuple[str, Mapping[str, Sequence[Mean]]]]) -> Figure | None:
    """The main array of every combination: bars with standard errors for one line of numbers, else a heat
    map with one row for each combination (and for each label of all axes but the last). None without an
    array of numbers. Rows and columns past 60 are left out, the columns with the smallest entries first."""
    name = _main(cells)
    groups = [(label, arrays[name]) for label, arrays in cells if name in arrays]
    if not groups:
        return None
    axes = max((m for _, g in groups for m in g), key=lambda m: m.rows).mean.axes
    kept = [(label, m) for label, g in groups for m in g if m.mean.axes == axes]
    away = sum(len(g) for _, g in groups) - len(kept)
    caption = "Means over rows." if max(m.rows for _, m in kept) > 1 else ""
    caption += f" {away} groups with other labels stand in combined.csv." if away else ""
    return _grid(f"{title}: {name}", kept, axes, caption.strip())


def _main(cells: Sequence[tuple[str, Mapping[str, Sequence[Mean]]]]) -> str:
    """The array to draw: the first effect, else the first that has an axis, else the first."""
    found = {n: g[0].mean for _, arrays in cells for n, g in reversed(list(arrays.items()))}
    names = [n for _, arrays in cells for n in arrays]
    effects = [n for n in names if n.endswith(("_effect", "_change")) and found[n].axes]
    return next(iter([*effects, *(n for n in names if found[n].axes), *names]), "")


def _grid(title: str, kept: Sequence[tuple[str, Mean]], axes: tuple[Axis, ...], caption: str) -> Figure:
    rows, lines, errors = [], [], []
    for label, m in kept:
        inner = list(np.ndindex(m.mean.values.shape[:-1])) if axes else [()]
        for index in inner:
            place = [a.labels[i] for a, i in zip(axes[:-1], index, strict=True)]
            rows.append(" · ".join(filter(None, [label, *place])) or "mean")
            lines.append(np.atleast_1d(m.mean.values[index]))
            errors.append(np.atleast_1d(m.sem[index]))
    cols = list(axes[-1].labels) if axes else ["mean"]
    values, bars, unit = np.stack(lines), np.stack(errors), kept[0][1].mean.unit
    if values.shape[1] == 1 and len(rows) > 1:  # one number a row reads better as bars
        values, bars, cols, rows, axes = values.T, bars.T, rows, cols, ()
    keep = _largest(values)
    values, bars, cols = values[:_MOST_CELLS, keep], bars[:_MOST_CELLS, keep], [cols[i] for i in keep]
    last = axes[-1].name if axes else ""
    if len(rows) == 1:
        data = {"labels": cols, "values": values[0], "errors": bars[0], "unit": unit, "label_title": last}
        return Figure("bars", data, title=title, caption=caption)
    data = {"rows": rows[:_MOST_CELLS], "cols": cols, "values": values, "unit": unit, "col_title": last}
    return Figure("heat", data, title=title, caption=caption)


def _largest(values: np.ndarray) -> list[int]:
    """The columns to draw, in their own order."""
    size = np.where(np.isfinite(values), np.abs(values), 0).max(0)
    return sorted(np.argsort(-size, kind="stable")[:_MOST_CELLS].tolist())

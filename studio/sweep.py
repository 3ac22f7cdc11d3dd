"""A sweep: many runs of one method, each kept in the store, with tables and a figure over all of them.

The store is the memory: a sweep that is started again finds its finished runs there and makes the others.
`sweep.json` in its folder only says which sweep the folder belongs to.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studio import figures
from studio.disk import HIDDEN
from studio.errors import Cancelled, RequestError, StudioError
from studio.exports import write_file
from studio.recipes import carried_of_many
from studio.registry import Method
from studio.runners import Runner, sentence_of
from studio.store import Store, check_free
from studio.sweep_file import Point, Sweep
from studio.sweep_tables import MOST_ENTRIES, combine, combined_table, draw, runs_table
from studio.types import Figure, Recipe, Result, Run

MARK = "sweep.json"
MOST_ALIKE = 8  # runs in a row that fail with the same sentence before the sweep stops


@dataclass(frozen=True)
class Outcome:
    """What became of one point: the id of its run, or the sentence of its fault. found: the run stood in the
    store already; seconds: what its computation took."""

    point: Point
    run: str = ""
    error: str = ""
    found: bool = False
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a sweep is. seconds_left: from the pace of the runs that were made now, None before one is."""

    total: int
    made: int = 0
    found: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Points that are dealt with."""
        return self.made + self.found + self.failed

    @property
    def seconds_left(self) -> float | None:
        """An estimate; it takes every run that is left for one that has to be made."""
        tried = self.made + self.failed
        return (time.monotonic() - self.started) / tried * (self.total - self.done) if tried else None


def check_out(out: Path, sweep: Sweep) -> None:
    """RequestError unless `out` is free, or is the folder of this very sweep."""
    if not (out / MARK).is_file():
        leftovers = out.is_dir() and all(f.name.startswith(HIDDEN) for f in out.iterdir())
        return None if leftovers else check_free(out)
    try:
        key = json.loads((out / MARK).read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{out / MARK} can't be read; give another --out.") from error
    if key != sweep.key:
        raise RequestError(
            f"{out} belongs to another sweep, or the sweep file has changed since; give another --out "
            "(runs that are finished are found in the store all the same)."
        )


def run_sweep(
    sweep: Sweep,
    recipes: Sequence[Recipe],
    runner: Runner,
    store: Store,
    out: Path,
    progress: Callable[[Progress], None] = lambda p: None,
) -> dict[str, Any]:
    """Makes every run that the store does not hold, then writes sweep.csv, combined.csv and sweep.svg (also
    .png and .pdf) to `out`; returns the summary, which is sweep.json's content too.

    A run that fails is noted and the others go on; after eight in a row with the same sentence the rest is
    left. RequestError comes before anything is written: `out` is another sweep's, or a model isn't there.
    """
    check_out(out, sweep)
    for model in dict.fromkeys(r.model for r in recipes):
        runner.locate(model, sweep.method.family)
    _say(out, sweep, {"finished": False})
    outcomes = _outcomes(sweep.points, recipes, runner, set(store.ids()), progress)
    _write(out, sweep, outcomes, store)
    faults = [o for o in outcomes if o.error]
    summary = {
        "finished": not faults and len(outcomes) == len(recipes),
        "made": sum(bool(o.run) and not o.found for o in outcomes),
        "found": sum(o.found for o in outcomes),
        "failed": len(faults),
        "left": len(recipes) - len(outcomes),
        "faults": [f"{o.point}: {o.error}" for o in faults[:20]],
    }
    return _say(out, sweep, summary)


def _say(out: Path, sweep: Sweep, what: dict[str, Any]) -> dict[str, Any]:
    told = {"key": sweep.key, "method": sweep.method.name, "runs": len(sweep.points), **what}
    write_file(out / MARK, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    return told


# ---- running ----------------------------------------------------------------------------------------------


def _outcomes(
    points: Sequence[Point],
    recipes: Sequence[Recipe],
    runner: Runner,
    known: set[str],
    progress: Callable[[Progress], None],
) -> list[Outcome]:
    """What became of the points, in their order; those that were left are missing. known: the ids of the
    runs that the store held before; the new ones are added."""
    state = Progress(len(points))
    outcomes: dict[int, Outcome] = {}
    last, alike = "", 0
    progress(state)
    with contextlib.closing(_each(runner, recipes)) as finished:
        for number, answer in finished:
            outcome = outcomes[number] = _outcome(points[number], answer, known)
            state.found += outcome.found
            state.made += bool(outcome.run) and not outcome.found
            state.failed += bool(outcome.error)
            progress(state)
            alike = alike + 1 if outcome.error and outcome.error == last else 1
            last = outcome.error
            if last and alike == MOST_ALIKE:
                break
    return [outcomes[i] for i in sorted(outcomes)]


def _outcome(point: Point, answer: Run | Exception, known: set[str]) -> Outcome:
    if isinstance(answer, Exception):
        return Outcome(point, error=sentence_of(answer))
    found = answer.id in known
    known.add(answer.id)
    return Outcome(point, answer.id, found=found, seconds=round(answer.seconds, 3))


def _each(runner: Runner, recipes: Sequence[Recipe]) -> Iterator[tuple[int, Run | Exception]]:
    """(number, run or what it raised) of every recipe as they come, as many at a time as the runner has
    workers. Leaving early ends the runner's work."""
    if runner.workers == 1:
        for number, recipe in enumerate(recipes):
            yield number, _attempt(runner, recipe)
        return
    with ThreadPoolExecutor(runner.workers) as pool:
        waiting = {pool.submit(_attempt, runner, recipe): i for i, recipe in enumerate(recipes)}
        try:
            for future in as_completed(waiting):
                yield waiting[future], _light(future.result())
        except BaseException:
            runner.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(runner: Runner, recipe: Recipe) -> Run | Exception:
    try:
        return _light(runner.run(recipe))
    except Cancelled:
        raise
    except Exception as error:
        return error


def _light(answer: Run | Exception) -> Run | Exception:
    """A run without its arrays: the tables read them from the store."""
    return replace(answer, result=Result()) if isinstance(answer, Run) else answer


# ---- what is written --------------------------------------------------------------------------------------


def _write(out: Path, sweep: Sweep, outcomes: Sequence[Outcome], store: Store) -> None:
    """The tables and the figure of the runs that are finished."""
    rows, cells = [], []
    numbers = {id(p): i for i, p in enumerate(sweep.points, 1)}
    for cell in dict.fromkeys(o.point.cell for o in outcomes):
        mine = [o for o in outcomes if o.point.cell == cell]
        results = [_numbers_of(store, o) for o in mine]
        rows += [(_told(numbers[id(o.point)], o), r) for o, r in zip(mine, results, strict=True)]
        if known := [r for r in results if r is not None]:
            cells.append((mine[0].point.varied, combine(sweep.method, known)))
    write_file(out / "sweep.csv", runs_table(rows).encode())
    write_file(out / "combined.csv", combined_table(cells).encode())
    figure = _figure(sweep.method, cells, outcomes, store)
    note = carried_of_many("sweep", sweep.method.name, [o.run for o in outcomes])
    for kind in figures.FORMATS if figure is not None else ():
        write_file(out / f"sweep.{kind}", figures.to_bytes(figure, kind, note))


def _numbers_of(store: Store, outcome: Outcome) -> Result | None:
    """The arrays and values of a finished run, without pictures and what is too large for the tables."""
    if not outcome.run:
        return None
    result = store.load(outcome.run).result
    kept = {n: t for n, t in result.arrays.items() if t.values.dtype.kind in "fib"}
    return Result({n: t for n, t in kept.items() if t.values.size <= MOST_ENTRIES}, result.values)


def _told(number: int, outcome: Outcome) -> dict[str, Any]:
    """What sweep.csv says of a run before its numbers."""
    point, line = outcome.point, {} if outcome.point.line is None else {"line": outcome.point.line}
    told = {"number": number, "run": outcome.run, "status": "failed" if outcome.error else "done"}
    return {**told, "seconds": outcome.seconds, "error": outcome.error, **line, **point.varied, **point.row}


def _figure(
    method: Method, cells: Sequence[tuple[Any, Any]], outcomes: Sequence[Outcome], store: Store
) -> Figure | None:
    """The main array of all combinations; images where there is no array of numbers; else the first run's
    own figure. None when no run is finished."""
    named = [(", ".join(f"{k} {v}" for k, v in varied.items()), arrays) for varied, arrays in cells]
    done = [o for o in outcomes if o.run]
    if not done:
        return None
    return draw(method.title, named) or _images(method, done, store) or method.draw(store.load(done[0].run))


def _images(method: Method, done: Sequence[Outcome], store: Store) -> Figure | None:
    """The first eight images of the first twelve runs, one row a run."""
    rows = [(str(o.point), list(store.load(o.run).result.images.values())[:8]) for o in done[:12]]
    rows = [(name, images) for name, images in rows if images]
    if not rows:
        return None
    most = max(len(images) for _, images in rows)
    data = {"images": [i for _, i in rows], "rows": [n for n, _ in rows], "cols": [""] * most}
    return Figure("strip", data, title=method.title)


def fault_of(summary: dict[str, Any]) -> StudioError | None:
    """What a person is told of a sweep that is not finished."""
    if summary["finished"]:
        return None
    left = f", {summary['left']} were not tried" if summary["left"] else ""
    first = summary["faults"][0].rstrip(".")
    return StudioError(
        f"{summary['failed']} of {summary['runs']} runs failed{left}; the first is {first}. The same command "
        "tries them again."
    )

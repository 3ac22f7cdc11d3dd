"""The lines of a file of prompts, run one after another in a thread of their own: they go on while the page
is loaded again, as a single run does, and end when nobody looks on any more.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from panels import widgets
from studio.errors import Cancelled, RequestError, StudioError
from studio.exports import new_folder
from studio.jobs import Job
from studio.registry import find_method
from studio.session import Session
from studio.store import Store
from studio.sweep import MOST_ALIKE, run_sweep
from studio.sweep_file import Point, Sweep
from studio.types import Recipe, Run

MOST_AT_ONCE = 8  # files of one panel whose lines run at the same time
_REMEMBERED = 32  # files that a page can ask about
KINDS = ("csv", "png")


@dataclass(eq=False)
class LineRun:
    """All lines of one file under way.

    points: (line, checked recipe) in order; page: what a page that is loaded again is given back; made: those
    that are done, with their runs' ids; failed: sentences; files: the table and the figure of all, by kind.
    """

    session: Session
    points: Sequence[tuple[Point, Recipe]]
    user: str
    page: Mapping[str, Any]
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = 1
    job: Job | None = None
    made: list[tuple[Point, Recipe, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    fault: str = ""
    begun: float = field(default_factory=time.monotonic)
    line_begun: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.ended.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop, or ends because all lines fail alike."""
        return self._stop.is_set()

    @property
    def left(self) -> int:
        """Lines that were not tried, or have failed."""
        return len(self.points) - len(self.made)

    def cancel(self) -> None:
        """Ends the run under way; the other lines are left."""
        self._stop.set()
        if self.job is not None:
            self.job.cancel()

    def said(self) -> str:
        """How far it is."""
        total, tried = len(self.points), self.number - 1
        if self.stopping:
            return "Stopping …"
        if tried >= total:
            return "All lines ran; the tables are being written …"
        job = self.job
        now = widgets.status(job, self.session.queue.position(job)) if job else "Starting …"
        left = (self.line_begun - self.begun) / tried * (total - tried - 1) if tried else 0
        rest = f" About {left + (job.seconds_left() or 0):.0f} s left in all." if job and left > 1 else ""
        return f"Line {self.number} of {total}. {now if now.endswith(('.', '…')) else f'{now}.'}{rest}"

    def work(self) -> None:
        """Runs every line, then makes the tables; what goes wrong is a sentence in `failed` or `fault`."""
        try:
            for number, (point, recipe) in enumerate(self.points, 1):
                if self.stopping:
                    break
                self.number, self.line_begun = number, time.monotonic()
                self._one(point, recipe)
            self.number = len(self.points) + 1
            if self.made:
                self.files = _tables(self.made, self.session.store)
        except Exception as error:
            self.fault = f"The tables could not be written: {widgets.spoken(error)}"
        finally:
            self.ended.set()

    def _one(self, point: Point, recipe: Recipe) -> None:
        self.job = None
        try:
            job = self.job = self.session.submit(recipe, user=self.user)
        except StudioError as error:
            return self._fail(point, error)
        if self.stopping:  # asked before the job was there
            job.cancel()
        while not job.over:
            job.wait(job.version, 0.5)
        self.session.queue.forget(job)
        if isinstance(job.error, Cancelled):
            self._stop.set()
        elif job.error is not None:
            self._fail(point, job.error)
        else:
            self.made.append((point, recipe, job.run.id))

    def _fail(self, point: Point, error: BaseException) -> None:
        """Notes a line that failed; as many in a row with the same sentence end it, as in a sweep."""
        sentence = widgets.sentence(error)
        self.failed.append(f"Line {point.line}: {sentence}")
        last = [f.partition(": ")[2] for f in self.failed[-MOST_ALIKE:]]
        if len(last) == MOST_ALIKE and set(last) == {sentence}:
            self._stop.set()


class LineRuns:
    """The files of one panel whose lines run or ran."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, LineRun] = OrderedDict()

    def start(self, run: LineRun) -> LineRun:
        """Starts it; RequestError when too many run already."""
        with self._lock:
            if sum(not r.over for r in self._known.values()) >= MOST_AT_ONCE:
                raise RequestError(
                    f"The lines of {MOST_AT_ONCE} files run already; try again when one of them is done."
                )
            self._known[run.token] = run
            for token in [t for t, r in self._known.items() if r.over][
                : max(0, len(self._known) - _REMEMBERED)
            ]:
                del self._known[token]
        threading.Thread(target=run.work, name="locus-lines", daemon=True).start()
        return run

    def find(self, kept: Any) -> LineRun | None:
        """The one that a page keeps the token of, which nobody else knows."""
        token = kept.get("token") if isinstance(kept, dict) else None
        with self._lock:
            return self._known.get(token) if isinstance(token, str) else None


class _Kept:
    """A runner that answers with runs of the store, in their order, without waiting in the queue."""

    workers = 1

    def __init__(self, store: Store, ids: Sequence[str]) -> None:
        self._store, self._ids = store, iter(ids)

    def locate(self, name: str, kind: str) -> None:
        """The runs are there already, whatever became of their model."""

    def run(self, recipe: Recipe) -> Run:
        """The next run."""
        return self._store.load(next(self._ids))

    def close(self) -> None:
        """Nothing was started."""


def _tables(made: Sequence[tuple[Point, Recipe, str]], store: Store) -> dict[str, Path]:
    """The table and the figure of finished lines, as a sweep writes them."""
    points, recipes, ids = zip(*made, strict=True)
    out = new_folder() / "all"
    sweep = Sweep(find_method(recipes[0].method), points, "panel")
    run_sweep(sweep, recipes, _Kept(store, ids), store, out)
    return {kind: file for kind in KINDS if (file := out / f"sweep.{kind}").is_file()}

"""The queue in front of the device: one worker, first in first out with a turn per user, progress and
cancellation."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from studio.errors import Cancelled, StudioError
from studio.types import Recipe, Result, Run

MOST_QUEUED = 64
MOST_OF_ONE = 16  # of these, for one user
MOST_OF_PLACE = 48  # of these, for all users whose names end in the same @place
_REMEMBERED = 128  # jobs that a page can ask about
_log = logging.getLogger("locus")


@dataclass(eq=False)
class Job:
    """One request under way: also the Report that its method speaks to.

    state: "queued", "running", "done", "stopped" or "failed". `version` grows with every change that a
    viewer could see.
    """

    id: int
    user: str
    recipe: Recipe
    options: dict = field(default_factory=dict)
    state: str = "queued"
    done: int = 0
    total: int = 0
    what: str = ""
    latest: Result | None = None
    warnings: list[str] = field(default_factory=list)
    run: Run | None = None
    error: BaseException | None = None
    started: float = 0.0
    version: int = 0
    rows: int = 16
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    withdraw: Callable[[Job], bool] = lambda job: False  # takes it out of the queue while it waits there
    _stop: threading.Event = field(default_factory=threading.Event)
    _change: threading.Condition = field(default_factory=threading.Condition)

    def cancel(self) -> None:
        """Asks the job to stop: one that waits is over at once, one that runs within a denoising step or
        forward."""
        self._stop.set()
        if self.withdraw(self):
            self.finish("stopped", error=Cancelled())
        else:
            self._bump()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop.is_set()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "stopped", "failed")

    def plan(self, total: int, what: str = "") -> None:
        """See Report."""
        self.done, self.total, self.what, self.started = 0, total, what, time.monotonic()
        self._bump()
        self._check()

    def step(self, n: int = 1) -> None:
        """See Report."""
        self.done += n
        self._bump()
        self._check()

    def partial(self, result: Result) -> None:
        """See Report."""
        self.latest = result
        self._bump()
        self._check()

    def warn(self, sentence: str) -> None:
        """See Report."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
        self._bump()

    def seconds_left(self) -> float | None:
        """An estimate from the pace of the present phase."""
        if not self.done or not self.total:
            return None
        return (time.monotonic() - self.started) / self.done * max(0, self.total - self.done)

    def wait(self, version: int, seconds: float) -> int:
        """Waits until something has changed since `version`, at most `seconds`; returns the present
        version."""
        with self._change:
            self._change.wait_for(lambda: self.version != version or self.over, seconds)
            return self.version

    def finish(self, state: str, *, run: Run | None = None, error: BaseException | None = None) -> None:
        """Ends the job."""
        self.run, self.error, self.state = run, error, state
        self._bump()

    def _bump(self) -> None:
        with self._change:
            self.version += 1
            self._change.notify_all()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled


class JobQueue:
    """Runs jobs one after another in one thread; users take turns."""

    def __init__(self, execute: Callable[[Job], Run]) -> None:
        self._execute = execute
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._lock = threading.Condition()
        self._numbers = count(1)
        self._closed = False
        self.running: Job | None = None
        self._recent: OrderedDict[int, Job] = OrderedDict()
        self._thread = threading.Thread(target=self._work, name="locus-worker", daemon=True)
        self._thread.start()

    def submit(self, recipe: Recipe, user: str = "local", **options: object) -> Job:
        """Queues a recipe; StudioError when too much is waiting already, of all, of this user, or of those
        whose names end in the same @place."""
        with self._lock:
            if self._closed:
                raise StudioError("The studio is shutting down.")
            if sum(map(len, self._waiting.values())) >= MOST_QUEUED:
                raise StudioError(f"{MOST_QUEUED} jobs are waiting already; try again when some are done.")
            if len(self._waiting.get(user, ())) >= MOST_OF_ONE:
                raise StudioError(
                    f"{MOST_OF_ONE} of your jobs are waiting already, the most for one user; try again when "
                    "some are done, or stop some."
                )
            place = user.rpartition("@")[2]
            near = sum(len(q) for name, q in self._waiting.items() if name.endswith(f"@{place}"))
            if "@" in user and near >= MOST_OF_PLACE:
                raise StudioError(
                    f"{MOST_OF_PLACE} jobs from your address are waiting already, the most for one address; "
                    "try again when some are done, or stop some."
                )
            job = Job(next(self._numbers), user, recipe, dict(options), withdraw=self._withdraw)
            self._waiting.setdefault(user, deque()).append(job)
            self._recent[job.id] = job
            while len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
            self._lock.notify_all()
        return job

    def find(self, number: object, token: object) -> Job | None:
        """A recent job by its number, for whoever knows its token."""
        with self._lock:
            job = self._recent.get(number) if isinstance(number, int) else None
        return (
            job
            if job is not None
            and secrets.compare_digest(job.token.encode(), str(token).encode("utf-8", "replace"))
            else None
        )

    def forget(self, job: Job) -> None:
        """A finished job whose result nobody will ask for again leaves memory."""
        with self._lock:
            self._recent.pop(job.id, None)

    def position(self, job: Job) -> int:
        """How many jobs come before this one, the running one included; 0 when it runs or is over."""
        with self._lock:
            if job.state != "queued":
                return 0
            ahead = [list(q) for q in self._waiting.values()]
            order = [q[i] for i in range(max(map(len, ahead), default=0)) for q in ahead if i < len(q)]
            return (order.index(job) if job in order else 0) + (1 if self.running else 0)

    def close(self) -> None:
        """Cancels everything and ends the worker."""
        with self._lock:
            self._closed = True
            jobs = [j for q in self._waiting.values() for j in q] + ([self.running] if self.running else [])
            self._lock.notify_all()
        for job in jobs:
            job.cancel()
        self._thread.join(timeout=30)

    def _withdraw(self, job: Job) -> bool:
        """Takes a waiting job out of the queue; False when it does not wait there any more."""
        with self._lock:
            jobs = self._waiting.get(job.user, deque())
            if job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.user]
            return True

    def _next(self) -> Job | None:
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            user, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            del self._waiting[user]
            if jobs:
                self._waiting[user] = jobs
            self.running = job
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if job.stopping:
                    raise Cancelled
                job.state = "running"
                job.finish("done", run=self._execute(job))
            except Cancelled as stop:
                job.finish("stopped", run=stop.partial, error=stop)
            except StudioError as error:
                job.finish("failed", run=getattr(error, "partial", None), error=error)
            except BaseException as error:  # the worker must outlive any bug of a method
                _log.exception("job %s (%s) failed", job.id, job.recipe.method)
                job.finish("failed", run=getattr(error, "partial", None), error=error)
            finally:
                self.running = None

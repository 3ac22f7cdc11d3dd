"""The queue: turns, order, stopping, limits, and a worker that outlives every bug."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from studio.errors import Cancelled, RequestError, StudioError
from studio.jobs import MOST_OF_ONE, MOST_OF_PLACE, MOST_QUEUED, Job, JobQueue
from studio.types import Recipe, Result

LONG = 20.0  # seconds after which a test gives up; nothing waits that long unless it is broken


class Bench:
    """A queue whose jobs wait at a gate, and the order in which they were let through."""

    def __init__(self) -> None:
        self.gate, self.begun, self.order = threading.Event(), threading.Event(), []
        self.fault: BaseException | None = None
        self.queue = JobQueue(self.execute)

    def execute(self, job: Job) -> str:
        """Takes one step, waits at the gate, takes another."""
        self.begun.set()
        job.plan(2, "working")
        assert self.gate.wait(LONG)
        if self.fault and job.recipe.method == "faulty":
            raise self.fault
        job.step()
        self.order.append(job.recipe.method)
        return f"run of {job.recipe.method}"

    def submit(self, name: str, user: str = "local") -> Job:
        """Queues a job of that name."""
        return self.queue.submit(Recipe(name, "m"), user)

    def blocked(self) -> Job:
        """A job that is running and waits at the gate."""
        job = self.submit("first", "blocker")
        assert self.begun.wait(LONG)
        return job


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench that is closed at the end."""
    made = Bench()
    yield made
    made.gate.set()
    made.queue.close()


def finish(job: Job) -> Job:
    """Waits until the job is over."""
    version = -1
    while not job.over:
        before, version = version, job.wait(version, LONG)
        assert version != before, f"{job.recipe.method} hangs, {job.state}"
    return job


def test_jobs_of_one_user_run_in_order(bench: Bench) -> None:
    jobs = [bench.submit(name) for name in "abcd"]
    bench.gate.set()
    assert [finish(j).state for j in jobs] == ["done"] * 4
    assert bench.order == list("abcd")
    assert [j.run for j in jobs] == [f"run of {n}" for n in "abcd"]
    assert [j.id for j in jobs] == [1, 2, 3, 4]


def test_users_take_turns(bench: Bench) -> None:
    bench.blocked()
    jobs = [bench.submit(f"ann{i}", "ann") for i in range(3)]
    jobs += [bench.submit(f"bob{i}", "bob") for i in range(2)] + [bench.submit("eve0", "eve")]
    bench.gate.set()
    for job in jobs:
        finish(job)
    assert bench.order == ["first", "ann0", "bob0", "eve0", "ann1", "bob1", "ann2"]


def test_position_counts_what_comes_before(bench: Bench) -> None:
    first = bench.blocked()
    ann, bob = [bench.submit(f"ann{i}", "ann") for i in range(2)], bench.submit("bob0", "bob")
    assert bench.queue.position(first) == 0
    assert [bench.queue.position(j) for j in (ann[0], bob, ann[1])] == [1, 2, 3]
    bench.gate.set()
    finish(ann[1])
    assert bench.queue.position(ann[1]) == 0


def test_a_running_job_stops_at_its_next_step(bench: Bench) -> None:
    job = bench.blocked()
    assert job.state == "running" and not job.stopping
    job.cancel()
    assert job.stopping and not job.over
    bench.gate.set()
    assert finish(job).state == "stopped" and isinstance(job.error, Cancelled)
    assert bench.order == [] and job.run is None
    assert finish(bench.submit("next")).state == "done"


def test_a_queued_job_is_stopped_at_once_without_a_start(bench: Bench) -> None:
    bench.blocked()
    queued, after = bench.submit("never"), bench.submit("after")
    seen = queued.version
    queued.cancel()
    assert (queued.state, queued.over, queued.run) == ("stopped", True, None)
    assert isinstance(queued.error, Cancelled) and queued.version > seen
    assert bench.queue.position(queued) == 0 and bench.queue.position(after) == 1
    assert bench.queue.find(queued.id, queued.token) is queued
    queued.cancel()
    bench.gate.set()
    assert finish(after).state == "done" and queued.state == "stopped"
    assert bench.order == ["first", "after"]


def test_a_stopped_job_takes_no_place(bench: Bench) -> None:
    bench.blocked()
    jobs = [bench.submit(str(i)) for i in range(MOST_OF_ONE)]
    jobs[3].cancel()
    jobs.append(bench.submit("one more"))
    with pytest.raises(StudioError):
        bench.submit("too many")
    for job in jobs:
        job.cancel()
    assert bench.queue.position(bench.submit("alone")) == 1
    bench.gate.set()


def test_stopping_while_the_worker_takes_jobs(bench: Bench) -> None:
    bench.gate.set()
    jobs = []
    for i in range(200):
        jobs.append(bench.submit(str(i), f"user{i}"))
        jobs[-1].cancel()
    assert {finish(j).state for j in jobs} <= {"stopped", "done"}
    assert sorted(j.recipe.method for j in jobs if j.state == "done") == sorted(bench.order)
    assert finish(bench.submit("next")).state == "done"


def test_partial_results_of_a_stopped_job_are_kept() -> None:
    def execute(job: Job) -> None:
        stop = Cancelled()
        stop.partial = "half"
        raise stop

    queue = JobQueue(execute)
    job = finish(queue.submit(Recipe("a", "m")))
    queue.close()
    assert (job.state, job.run) == ("stopped", "half")


def test_at_most_so_many_wait(bench: Bench) -> None:
    bench.blocked()
    jobs = [bench.submit(str(i), f"user{i % 4}") for i in range(MOST_QUEUED)]
    with pytest.raises(StudioError, match=f"{MOST_QUEUED} jobs are waiting already") as caught:
        bench.submit("one more", "user9")
    assert MOST_QUEUED == 64 and caught.value.code == 1
    bench.gate.set()
    for job in jobs:
        assert finish(job).state == "done"
    assert finish(bench.submit("one more")).state == "done"


def test_at_most_so_many_of_one_user_wait(bench: Bench) -> None:
    bench.blocked()
    jobs = [bench.submit(str(i), "ann") for i in range(MOST_OF_ONE)]
    with pytest.raises(StudioError, match="16 of your jobs are waiting already") as caught:
        bench.submit("one more", "ann")
    assert caught.value.code == 1
    other = bench.submit("other", "bob")
    bench.gate.set()
    assert {finish(j).state for j in [*jobs, other]} == {"done"}
    assert finish(bench.submit("one more", "ann")).state == "done"


def test_at_most_so_many_of_one_address_wait_whatever_they_call_themselves(bench: Bench) -> None:
    bench.blocked()
    jobs = [bench.submit(str(i), f"page {i}@10.0.0.1") for i in range(MOST_OF_PLACE)]
    with pytest.raises(StudioError, match="48 jobs from your address are waiting already"):
        bench.submit("one more", "another page@10.0.0.1")
    others = [bench.submit("other", "page@10.0.0.2"), bench.submit("local")]
    bench.gate.set()
    assert {finish(j).state for j in [*jobs, *others]} == {"done"}


@pytest.mark.parametrize(
    "fault",
    [
        ZeroDivisionError("a bug"),
        StudioError("A sentence."),
        SystemExit(3),
        KeyboardInterrupt(),
        MemoryError(),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_fault_does_not_end_the_worker(bench: Bench, fault: BaseException) -> None:
    bench.fault = fault
    bench.gate.set()
    job = finish(bench.submit("faulty"))
    assert job.state == "failed" and job.error is fault
    assert finish(bench.submit("next")).state == "done"


def test_a_bug_keeps_its_traceback_in_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.gate.set()
    bench.fault = RequestError("Not this.")
    finish(bench.submit("faulty"))
    assert caplog.records == []
    bench.fault = ZeroDivisionError("a bug")
    finish(bench.submit("faulty"))
    assert "ZeroDivisionError: a bug" in caplog.text and "faulty" in caplog.text


def test_find_needs_the_token(bench: Bench) -> None:
    job, other = bench.submit("a"), bench.submit("b")
    assert bench.queue.find(job.id, job.token) is job
    for number, token in [(job.id, other.token), (99, job.token), (str(job.id), job.token)]:
        assert bench.queue.find(number, token) is None
    for token in (None, "", "é\ud800", 5):
        assert bench.queue.find(job.id, token) is None
    assert job.token != other.token and len(job.token) == 16


def test_old_jobs_are_forgotten(bench: Bench) -> None:
    bench.gate.set()
    first = finish(bench.submit("first"))
    for i in range(128):
        finish(bench.submit(str(i)))
    assert bench.queue.find(first.id, first.token) is None


def test_close_stops_everything(bench: Bench) -> None:
    running = bench.blocked()
    waiting = [bench.submit(str(i), f"user{i}") for i in range(3)]
    closing = threading.Thread(target=bench.queue.close)
    closing.start()
    version = -1
    while not running.stopping:
        version = running.wait(version, LONG)
    bench.gate.set()
    closing.join(LONG)
    assert [j.state for j in (running, *waiting)] == ["stopped"] * 4
    assert bench.order == []
    with pytest.raises(StudioError, match="shutting down"):
        bench.submit("late")


def test_a_job_reports_what_a_viewer_sees() -> None:
    job = Job(1, "ann", Recipe("a", "m"))
    seen = [job.version]
    for change in (
        lambda: job.plan(4, "drawing"),
        lambda: job.step(2),
        lambda: job.partial(Result()),
        lambda: job.warn("Odd."),
    ):
        change()
        seen.append(job.version)
    assert seen == sorted(set(seen))  # every change is a new version
    job.warn("Odd.")
    assert (job.done, job.total, job.what, job.warnings) == (2, 4, "drawing", ["Odd."])
    assert job.seconds_left() >= 0
    job.plan(0, "loading")
    assert job.seconds_left() is None and job.done == 0


@pytest.mark.parametrize("word", ["plan", "step", "partial"])
def test_every_word_to_a_stopped_job_raises(word: str) -> None:
    job = Job(1, "ann", Recipe("a", "m"))
    job.cancel()
    with pytest.raises(Cancelled):
        getattr(job, word)(*{"plan": (3,), "step": (1,), "partial": (Result(),)}[word])

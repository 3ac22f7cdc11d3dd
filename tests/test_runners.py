"""Runners: the same runs in this process and on two Ray workers, and workers that die in the middle."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from studio.errors import Cancelled, RequestError, StudioError
from studio.runners import Local, Ray, Worker, open_runner, sentence_of
from studio.store import Store
from studio.sweep import run_sweep
from studio.sweep_file import read_sweep, recipes
from studio.types import Recipe
from tests.faults import METHODS, Methods, same
from tests.test_session import edit_file

TREE = Path(__file__).resolve().parent.parent
GENERATE = Recipe("generate", "atlas-sd", {"prompt": ["a red star"]}, {"steps": 1}, (0,))
OPTIONS = {"device": "cpu", "threads": 1}


def mine() -> list[psutil.Process]:
    """Every process below this one."""
    return psutil.Process().children(recursive=True)


def workers() -> list[psutil.Process]:
    """Processes of Ray workers of ours."""
    found = []
    for process in mine():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait(until: Callable[[], Any], seconds: float = 900.0) -> Any:
    """What `until` gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


# ---- in this process --------------------------------------------------------------------------------------


def test_local_runs_and_finds(session: Any, atlas: Any) -> None:
    runner = open_runner(session, {})
    assert isinstance(runner, Local) and runner.workers == 1
    runner.locate("atlas-sd", "diffusion")
    with pytest.raises(RequestError, match="a text-to-image model is needed"):
        runner.locate("atlas-clip", "diffusion")
    one = runner.run(GENERATE)
    assert one.status == "done" and runner.run(GENERATE).id == one.id
    runner.close()
    assert runner.run(GENERATE).id == one.id  # the session is its owner's


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"engine": "slurm"}, "--engine must be local or ray, not 'slurm'"),
        ({"engine": "local", "address": "x:1"}, "--address belongs to --engine ray"),
        ({"workers": "2"}, "--workers belongs to --engine ray"),
    ],
)
def test_what_does_not_go_together(session: Any, given: dict[str, str], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        open_runner(session, given)


def test_without_ray_it_says_what_to_install(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ)
    with pytest.raises(RequestError, match=r'install "locus-studio\[ray\]", or take --engine local'):
        open_runner(session, {"engine": "ray"})
    assert dict(os.environ) == before


def test_a_worker_answers_with_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Worker({**OPTIONS, "runs": str(tmp_path)})
    assert worker.ready() == ("ready", "cpu")
    assert worker.locate("atlas-sd", "diffusion") == ("found", "atlas-sd")
    assert worker.locate("atlas-clip", "diffusion")[0] == "refused"
    assert Worker({**OPTIONS, "dtype": "int8"}).ready()[0] == "refused"
    raised: list[Exception] = [ZeroDivisionError("of\nours"), StudioError("It broke."), RequestError("No.")]
    monkeypatch.setattr(
        type(worker._session), "run", lambda self, recipe: (_ for _ in ()).throw(raised.pop())
    )
    assert worker.run(GENERATE) == ("refused", "No.")
    assert worker.run(GENERATE) == ("failed", "It broke.")
    assert worker.run(GENERATE) == ("failed", "Running failed with ZeroDivisionError: of ours")
    assert sentence_of(StudioError("It broke.")) == "It broke."
    worker._session.close()


# ---- on Ray -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Ray]:
    """Two Ray workers of one thread each."""
    made = Ray(Store(tmp_path / "runs"), OPTIONS, workers=2)
    yield made
    made.close()


def test_a_ray_cluster_of_our_own(tmp_path: Path) -> None:
    before, processes = dict(os.environ), {p.pid for p in mine()}
    store = Store(tmp_path / "runs")
    runner = Ray(store, OPTIONS, workers=2)
    try:
        assert runner.workers == 2 and len(first := wait(workers)) == 2
        runner.locate("atlas-sd", "diffusion")
        with pytest.raises(RequestError, match="a text-to-image model is needed"):
            runner.locate("atlas-clip", "diffusion")
        addresses = {c.laddr.ip for p in mine() for c in p.net_connections("inet") if c.status == "LISTEN"}
        assert {a.removeprefix("::ffff:") for a in addresses} == {"127.0.0.1"}
        first[0].kill()
        first[1].kill()
        for _ in range(4):  # whichever worker answers is a new one
            runner.locate("atlas-sd", "diffusion")
        with pytest.raises(StudioError, match="in a Ray cluster already"):
            Ray(store, OPTIONS, workers=1)
        runner.locate("atlas-sd", "diffusion")
    finally:
        runner.close()
    runner.close()
    with pytest.raises(Cancelled):
        runner.run(GENERATE)
    wait(lambda: {p.pid for p in mine()} <= processes, 30)
    assert not list(Path("/tmp").glob(f"locus-ray-*/session_*_{os.getpid()}"))
    touched = {k for k in before | os.environ if before.get(k) != os.environ.get(k)}
    assert touched <= {"RAY_CLIENT_MODE", "PYTHONBREAKPOINT"}  # these are Ray's own doing


ABSENT = {
    "closed port": ("127.0.0.1:1", "no Ray cluster to join at '127.0.0.1:1' (Connection refused)"),
    "no port": ("nonsense", "--address must have the form HOST:PORT, not 'nonsense'."),
    "port too high": ("127.0.0.1:65536", "--address must have the form HOST:PORT"),
    "Ray's client": ("ray://", "--address must have the form HOST:PORT"),
    "empty label": ("a..b:6379", "no Ray cluster to join at 'a..b:6379'"),
}


@pytest.mark.parametrize(("address", "part"), ABSENT.values(), ids=ABSENT.keys())
def test_a_cluster_that_is_not_there_is_refused(session: Any, address: str, part: str) -> None:
    with pytest.raises(RequestError, match=re.escape(part)):
        open_runner(session, {"engine": "ray", "address": address})


@pytest.mark.slow
def test_64_runs_on_two_workers_are_those_of_this_process(session: Any, tmp_path: Path) -> None:
    from studio.session import Session

    (tmp_path / "s.yaml").write_text(
        "method: generate\nparams: {steps: 2}\n"
        f"grid: {{prompt: [a red star, a cube], guidance: [1, 2, 3, 4], seeds: {[[i] for i in range(8)]}}}\n"
    )
    sweep = read_sweep(str(tmp_path / "s.yaml"))
    asked = recipes(sweep, session.checked, {"diffusion": "atlas-sd"})
    assert len(asked) == 64
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    local = Session(runs=here.root, device="cpu", threads=1)
    assert run_sweep(sweep, asked, Local(local), here, tmp_path / "a")["made"] == 64
    local.close()
    killed: list[int] = []

    def kill_one(progress: Any) -> None:
        if progress.done == 10 and not killed:
            killed.append(workers()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    runner = Ray(there, OPTIONS, workers=2)
    try:
        told = run_sweep(sweep, asked, runner, there, tmp_path / "b", kill_one)
    finally:
        runner.close()
    assert killed and told["finished"] and told["made"] == 64
    runs = {r.key: r for r in map(here.load, here.ids())}
    others = {r.key: r for r in map(there.load, there.ids())}
    assert len(runs) == len(others) == len(there.ids()) == 64 and runs.keys() == others.keys()
    for key, run in runs.items():
        assert others[key].host == run.host
        for name, trace in run.result.arrays.items():
            np.testing.assert_array_equal(others[key].result.arrays[name].values, trace.values)
    a, b = ((tmp_path / d / "combined.csv").read_bytes() for d in "ab")
    assert a == b


@pytest.mark.slow
def test_a_run_that_kills_its_workers_is_given_up(two: Ray, tmp_path: Path) -> None:
    stop = threading.Event()

    def killer() -> None:
        while not stop.is_set():
            for process in workers():
                process.kill()
            time.sleep(0.05)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with pytest.raises(StudioError, match="3 workers have died over this run"):
            two.run(GENERATE)
    finally:
        stop.set()
        thread.join()
    assert two.run(GENERATE).status == "done"


@pytest.mark.slow
def test_a_worker_lost_costs_no_method_its_run(session: Any, atlas: Any, two: Ray, tmp_path: Path) -> None:
    """Of each method: the process that computes it is killed, another one gives the same bits."""
    methods = Methods(session, tmp_path, str(edit_file(atlas, tmp_path / "edit.safetensors")))
    store = Store(tmp_path / "runs")
    for name in METHODS:
        clean, answer = methods.clean(name), queue.SimpleQueue()
        busy = {p.pid: p.cpu_times().user for p in workers()}
        recipe = methods.request(name)
        asking = threading.Thread(target=lambda put=answer.put, recipe=recipe: put(two.run(recipe)))
        asking.start()
        time.sleep(clean.run.seconds / 2)
        spent = {p: p.cpu_times().user - busy.get(p.pid, 0.0) for p in workers()}
        max(spent, key=spent.get).kill()
        asking.join(600)
        run = answer.get(timeout=1)
        assert run.status == "done" and same(run, clean.run), name
    wait(lambda: store.sweep_leftovers() == 0 and not list(store.root.glob(".partial-*")), 30)
    assert len(store.ids()) == len(METHODS)


@pytest.mark.slow
def test_a_sweep_joins_a_cluster_and_leaves_it_as_it_was(two: Ray, tmp_path: Path) -> None:
    import ray

    (tmp_path / "s.yaml").write_text(
        "method: generate\nparams: {prompt: x, steps: 1}\ngrid: {seeds: [[0], [1]]}\n"
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "studio.cli", "sweep", str(tmp_path / "s.yaml"), "--engine", "ray"]
    command += ["--address", address, "--threads", "1", "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]

    def sweep(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=TREE, capture_output=True, text=True, timeout=1500)

    full = sweep("--workers", "3")
    assert full.returncode == 2 and "has room for 2 workers of 1 threads, and 3 are asked" in full.stderr
    assert not (tmp_path / "out").exists()
    for worker in two._workers:  # their cores are free for the command's own
        ray.kill(worker)
    done = sweep()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs made, 0 found in the store, 0 failed")
    assert ray.is_initialized() and ray.cluster_resources()["CPU"] == 2


@pytest.mark.slow
def test_a_killed_sweep_takes_its_cluster_with_it_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "method: generate\nparams: {prompt: x, steps: 30}\ngrid: {seeds: [[0], [1], [2], [3], [4], [5]]}\n"
    )
    command = [sys.executable, "-m", "studio.cli", "sweep", str(tmp_path / "s.yaml"), "--engine", "ray"]
    command += ["--workers", "2", "--threads", "1", "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    store = Store(tmp_path / "runs")
    with subprocess.Popen(command, cwd=TREE) as process:
        try:
            wait(lambda: store.ids() or process.poll() is not None)
            below = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
    before = store.ids()
    assert 1 <= len(before) < 6 and below
    psutil.wait_procs(below, timeout=300)
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    time.sleep(1.1)
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout.split(" found")[0].split()[-1])
    assert found >= len(before) and len(store.ids()) == 6

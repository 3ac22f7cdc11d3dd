"""Runners: where a recipe becomes a run, in this process (Local) or on the workers of a Ray cluster (Ray).

One narrow seam, `run(recipe)`: whoever asks cannot tell which runner answers. Runs come back through the
store, which all workers share.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, Protocol

from studio.errors import Cancelled, RequestError, StudioError
from studio.models.device import default_threads, free_memory
from studio.session import Session
from studio.store import Store
from studio.types import Recipe, Run

_MOST_WORKERS = 256
ATTEMPTS = 3  # workers that may die over one recipe
_PATIENCE = 600.0  # seconds for the workers to start


class Runner(Protocol):
    """What runs recipes: `workers` of them at the same time, `run` from as many threads."""

    workers: int

    def locate(self, name: str, kind: str) -> None:
        """RequestError or StudioError when there is no model of that name and kind where runs are made."""

    def run(self, recipe: Recipe) -> Run:
        """The finished run, from the store where it stands already. Raises what its job raised."""

    def close(self) -> None:
        """Ends what the runner has started; a run under way ends with Cancelled."""


class Local:
    """Runs in this process, one after another."""

    workers = 1

    def __init__(self, session: Session) -> None:
        self._session = session

    def locate(self, name: str, kind: str) -> None:
        """See Runner."""
        self._session.source(name, kind)

    def run(self, recipe: Recipe) -> Run:
        """See Runner."""
        return self._session.run(recipe)

    def close(self) -> None:
        """The session belongs to whoever made it."""


def open_runner(session: Session, given: Mapping[str, Any], workers: int | None = None) -> Runner:
    """The runner of the options engine ("local" or "ray"), address, device, dtype, batch and models. With
    Ray the session here only checks recipes and holds the store. RequestError for what does not go together.
    """
    engine = given.get("engine", "local")
    if engine not in ("local", "ray"):
        raise RequestError(f"--engine must be local or ray, not {str(engine)[:40]!r}.")
    if engine == "local":
        if wrong := [n for n in ("address", "workers") if given.get(n)]:
            raise RequestError(
                f"--{wrong[0]} belongs to --engine ray; the local engine makes one run at a time."
            )
        return Local(session)
    batch = int(given["batch"]) if given.get("batch") else None
    models = str(session.models_folder.absolute()) if session.models_folder else None
    options = {"device": given.get("device", "auto"), "dtype": given.get("dtype", "auto")}
    options |= {"threads": session.threads, "batch": batch, "models": models}
    return Ray(session.store, options, address=given.get("address"), workers=workers)


class Worker:
    """A Session in a process of its own; it answers with ids and sentences, runs go through the store."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    @cached_property
    def _session(self) -> Session:
        return Session(**self._options)

    def ready(self) -> tuple[str, str]:
        """("ready", the device) once the session is there, or how its options were refused."""
        return _told(lambda: self._session.device, "ready")

    def locate(self, name: str, kind: str) -> tuple[str, str]:
        """("found", name), or how it was refused and the sentence."""
        return _told(lambda: self._session.source(name, kind).name, "found")

    def run(self, recipe: Recipe) -> tuple[str, str]:
        """("done", the run's id), or ("refused" or "failed", the sentence)."""
        return _told(lambda: self._session.run(recipe).id, "done")


def _told(what: Callable[[], str], well: str) -> tuple[str, str]:
    try:
        return well, what()
    except RequestError as error:
        return "refused", str(error)
    except StudioError as error:
        return "failed", str(error)
    except Exception as error:  # a bug of a method; its traceback is in the worker's log
        return "failed", sentence_of(error)


def _check_reachable(address: str) -> None:
    """RequestError when nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RequestError(f"--address must have the form HOST:PORT, not {address[:80]!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise _nothing_there(address, reason) from error


def _nothing_there(address: str, reason: str) -> RequestError:
    return RequestError(
        f"There is no Ray cluster to join at {address[:80]!r} ({reason}); give the HOST:PORT that `ray start "
        "--head` has said, or leave --address out."
    )


def _raised(how: str, said: str) -> str:
    if how in ("refused", "failed"):
        raise {"refused": RequestError, "failed": StudioError}[how](said)
    return said


def sentence_of(error: BaseException) -> str:
    """What a person reads of an error."""
    if isinstance(error, StudioError):
        return str(error)
    return f"Running failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Ray:
    """Runs on the workers of a Ray cluster, one Session each: a cluster of this machine's own on the loopback
    address, ended with close(), or the one at `address`.

    store: shared with every worker. options: of Session (device, dtype, threads, batch, models). workers:
    default one for each GPU, or as many as the cluster's cores allow. A worker that dies is replaced and its
    recipe is run again, up to three times. RequestError: no Ray, no cluster there, or too small a one.
    """

    def __init__(
        self,
        store: Store,
        options: Mapping[str, Any],
        *,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        try:
            with _own_environment(private=address is None):
                import ray
        except ImportError as error:
            raise RequestError(
                'Ray is not installed; install "locus-studio[ray]", or take --engine local.'
            ) from error
        self._ray, self._closed, self._opened = ray, threading.Event(), contextlib.ExitStack()
        self._store, self._asking, self._calm = store, 0, threading.Condition()
        self._free: queue.Queue[int] = queue.Queue()  # places of workers that nobody asks
        self._workers: list[Any] = []
        threads = options.get("threads") or default_threads()
        self._options = {**options, "threads": threads, "runs": str(store.root.absolute())}
        try:
            start = self._start_cluster if address is None else partial(self._join_cluster, address)
            self.workers, gpus = start(workers, threads)
            demand = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": threads, "num_gpus": 0}
            self._new = ray.remote(**demand, max_restarts=0)(Worker)
            self._hire()
        except BaseException:
            self.close()
            raise

    def locate(self, name: str, kind: str) -> None:
        """See Runner."""
        _raised(*self._ask(lambda worker: worker.locate.remote(name, kind)))

    def run(self, recipe: Recipe) -> Run:
        """See Runner."""
        run_id = _raised(*self._ask(lambda worker: worker.run.remote(recipe)))
        try:
            return self._store.load(run_id)
        except RequestError as error:
            raise StudioError(
                f"A worker wrote the run {run_id}, and it is not in {self._store.root}; give --runs a folder "
                "that every machine of the cluster shares."
            ) from error

    def close(self) -> None:
        """See Runner. A cluster that was there before stays, without our workers."""
        if self._closed.is_set():
            return
        self._closed.set()
        for worker in self._workers:
            self._ray.kill(worker)
        with self._calm:  # whoever waits for a worker learns that it is gone before Ray goes
            self._calm.wait_for(lambda: self._asking == 0, 30)
        self._opened.close()

    # ---- the cluster --------------------------------------------------------------------------------------

    def _start_cluster(self, workers: int | None, threads: int) -> tuple[int, bool]:
        """A cluster of this machine alone: loopback only, a token of its own, no dashboard, no statistics."""
        gpus = self._gpus_here()
        workers = workers or gpus or max(1, default_threads() // threads)
        if gpus and workers > gpus:
            raise RequestError(
                f"This machine has {gpus} GPUs, one for a worker, not {workers}; take fewer --workers, or "
                "--device cpu."
            )
        if not gpus:
            self._options["memory"] = int(0.7 * free_memory("cpu") / workers)
        self._opened.enter_context(_own_environment(private=True))
        short = "/tmp" if os.path.isdir("/tmp") else None  # the path of a socket holds about 100 characters
        folder = tempfile.TemporaryDirectory(prefix="locus-ray-", dir=short, ignore_cleanup_errors=True)
        self._connect(
            "local",
            _temp_dir=self._opened.enter_context(folder),
            num_cpus=workers * (1 if gpus else threads),
            num_gpus=gpus,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
        )
        return workers, bool(gpus)

    def _gpus_here(self) -> int:
        if self._options.get("device", "auto") not in ("auto", "cuda"):
            return 0
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def _join_cluster(self, address: str, workers: int | None, threads: int) -> tuple[int, bool]:
        """Connects to a cluster that is there; (workers, whether each has a GPU)."""
        _check_reachable(address)  # Ray itself would try for minutes
        self._connect(address)
        there = self._ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        device = self._options.get("device", "auto")
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        room = gpus if on_gpu else cores // threads
        if not room or (workers or 1) > room:
            what = "GPUs" if on_gpu else f"workers of {threads} threads"
            raise RequestError(
                f"The Ray cluster has room for {room} {what}, and {workers or 1} are asked for; take fewer "
                "--workers or --threads, or another --device."
            )
        return workers or min(room, _MOST_WORKERS), on_gpu

    def _connect(self, address: str, **options: Any) -> None:
        if self._ray.is_initialized():
            raise StudioError("This process is in a Ray cluster already; call ray.shutdown() first.")
        quiet = {"log_to_driver": False, "configure_logging": False}
        try:
            self._ray.init(address, **quiet, **options)
        except Exception as error:  # Ray raises many kinds, down to those of gRPC
            reason = " ".join(str(error).split())[:200]
            if address == "local":
                raise StudioError(f"Ray could not start on this machine: {reason}") from error
            raise _nothing_there(address, reason) from error
        self._opened.callback(self._ray.shutdown)

    def _hire(self) -> None:
        """Starts all workers and waits until each has its session."""
        self._workers = [self._new.remote(self._options) for _ in range(self.workers)]
        try:
            answers = self._ray.get([w.ready.remote() for w in self._workers], timeout=_PATIENCE)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            said = [line for line in str(cause).splitlines() if line.strip()][-1:] or [type(cause).__name__]
            raise StudioError(
                f"A Ray worker could not start ({said[0].strip()[:200]}); every machine of the cluster needs "
                "the same locus-studio."
            ) from error
        for place, answer in enumerate(answers):
            _raised(*answer)
            self._free.put(place)

    # ---- asking -------------------------------------------------------------------------------------------

    def _ask(self, what: Callable[[Any], Any]) -> tuple[str, str]:
        """A free worker's answer; another one takes over from a worker that has died."""
        with self._free_place() as place:
            for _ in range(ATTEMPTS):
                try:
                    return self._ray.get(what(self._workers[place]))
                except self._ray.exceptions.RayActorError as error:
                    if self._closed.is_set():
                        raise Cancelled from error
                    self._ray.kill(self._workers[place])  # it may only be out of reach
                    self._workers[place] = self._new.remote(self._options)
        raise StudioError(
            f"{ATTEMPTS} workers have died over this run, perhaps for want of memory; take fewer --workers "
            "or a smaller --batch."
        )

    @contextlib.contextmanager
    def _free_place(self) -> Iterator[int]:
        """The place of a worker that nobody else asks meanwhile."""
        place = self._free.get()
        with self._calm:
            self._asking += 1
        try:
            if self._closed.is_set():
                raise Cancelled
            yield place
        finally:
            with self._calm:
                self._asking -= 1
                self._calm.notify_all()
            self._free.put(place)


@contextlib.contextmanager
def _own_environment(*, private: bool) -> Iterator[None]:
    """What Ray reads from the environment, when it is imported and when it starts processes: no usage
    statistics; for a cluster of our own also the loopback address only and a token that is made for it (Ray
    would keep one in the home folder)."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0"}
    if private:
        wanted |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
            "RAY_ADDRESS": "",
        }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

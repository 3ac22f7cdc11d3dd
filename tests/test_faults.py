"""Whatever fails, in every method: no hook, no overlay, no lock and no half run is left, the weights are
bit-identical, a person is told a sentence, and the next run gives what it always gave."""

from __future__ import annotations

import errno
import hashlib
import itertools
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as modules

from panels.widgets import sentence
from studio import store as storing
from studio.errors import Cancelled, StudioError
from studio.jobs import Job
from studio.models.loading import home
from studio.registry import load_methods
from studio.session import Session
from studio.types import Recipe, Run
from tests.smallest import SMALLEST, smallest
from tests.test_session import edit_file

ROOT = Path(__file__).parents[1]
METHODS = sorted(SMALLEST)
LONG = ("passport",)  # seconds a run: its faults come with `-m slow`
TABLE = [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in METHODS]
FEW = [
    n if n in ("generate", "decompose", "knockout") else pytest.param(n, marks=pytest.mark.slow)
    for n in METHODS
]


def test_the_table_holds_every_method() -> None:
    assert set(SMALLEST) == set(load_methods())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures and the edit file are."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def edit(atlas: Any, place: Path) -> str:
    """An edit file of atlas-sd."""
    return str(edit_file(atlas, place / "edit.safetensors"))


@pytest.fixture
def request_of(place: Path, edit: str) -> Callable[[str], Recipe]:
    """The smallest request of a method."""
    return lambda name: smallest(name, place, edit)


def state(session: Session) -> dict[str, Any]:
    """All that a fault must not change: weights, hooks, modes and processors of every loaded model, what the
    store holds, and whether the queue is free."""
    found: dict[str, Any] = {"running": session.queue.running, "runs": session.store.ids()}
    found["files"] = sorted(f.name for f in session.store.root.glob("*") if f.name.startswith("."))
    for key, model in session._loaded.items():
        for part, net in model.components().items():
            digest = hashlib.sha256()
            for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
                digest.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
                found[key, part, name] = (tensor.requires_grad, tensor.grad is None)
            found[key, part] = (digest.hexdigest(), net.training, _attached(net))
    return found


def _attached(net: torch.nn.Module) -> list[str]:
    """Hooks, attention processors and methods laid over, of all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = []
    for name, module in net.named_modules():
        found += [f"{name}.{kind}" for kind in kinds if getattr(module, kind)]
        found += [
            f"{name}: {type(p).__name__}" for p in [getattr(module, "processor", None)] if p is not None
        ]
        found += [f"{name}.forward"] * ("forward" in vars(module))
    return found


def run_anew(session: Session, recipe: Recipe) -> Run:
    """The run, computed: from no stored run and no kept statistics of images."""
    shutil.rmtree(home() / "corpora", ignore_errors=True)
    return session.run(recipe, fresh=True, save=False)


@contextmanager
def failing_at(
    call: int | None, error: BaseException | None, always: BaseException | None = None
) -> Iterator[list[int]]:
    """Raises `error` at the call with that number, counted over the forwards of all modules, or `always` at
    each; yields the count."""
    count = [0]

    def seen(*_: Any) -> None:
        count[0] += 1
        if always or count[0] - 1 == call:
            raise always or error

    handle = modules.register_module_forward_pre_hook(seen)
    try:
        yield count
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def clean(session: Session, place: Path, edit: str) -> Callable[[str], tuple[Run, int, int]]:
    """Of each method, made once: its run, how many modules ran in it, how often it spoke to its job."""
    made: dict[str, tuple[Run, int, int]] = {}

    def of(name: str) -> tuple[Run, int, int]:
        if name not in made:
            run_anew(session, smallest(name, place, edit))  # models are loaded now
            with failing_at(None, None) as count, speaking(None) as words:
                run = run_anew(session, smallest(name, place, edit))
            made[name] = run, count[0], words[0]
        return made[name]

    return of


@contextmanager
def speaking(stop_at: int | None) -> Iterator[list[int]]:
    """Cancels a job at the word with that number that its method says to it (plan, step, partial)."""
    count, heard = [0], Job._check

    def check(job: Job) -> None:
        count[0] += 1
        if count[0] - 1 == stop_at:
            job.cancel()
        heard(job)

    Job._check = check
    try:
        yield count
    finally:
        Job._check = heard


def same(one: Run, other: Run) -> bool:
    """Whether two runs hold the same numbers and images, bit for bit."""
    arrays, others = one.result.arrays, other.result.arrays
    return set(arrays) == set(others) and all(
        np.array_equal(t.values, others[n].values, equal_nan=t.values.dtype.kind == "f")
        for n, t in arrays.items()
    )


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 … count - 1, the first and the last among them."""
    return sorted({round(n) for n in np.linspace(0, count - 1, min(most, count))}) if count else []


# ---- in the model, in a hook, in the writer ---------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_an_exception_in_the_model(session: Session, request_of: Any, clean: Any, name: str) -> None:
    forwards, before = clean(name)[1], state(session)
    with failing_at(forwards // 2, ZeroDivisionError("injected")), pytest.raises(ZeroDivisionError) as raised:
        run_anew(session, request_of(name))
    assert "Something went wrong inside" in sentence(raised.value)
    assert state(session) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_exception_anywhere_in_the_model(session: Session, request_of: Any, clean: Any, name: str) -> None:
    run, forwards, _ = clean(name)
    before = state(session)
    for call in spread(forwards, 8):
        with failing_at(call, ZeroDivisionError("injected")), pytest.raises(ZeroDivisionError):
            run_anew(session, request_of(name))
        assert state(session) == before, call
    assert same(run_anew(session, request_of(name)), run)


@pytest.mark.parametrize("name", TABLE)
def test_an_exception_in_a_hook(
    session: Session, request_of: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, _, _ = clean(name)
    before, reached, register = state(session), [], torch.nn.Module.register_forward_hook

    def broken(*_: Any, **__: Any) -> None:
        reached.append(1)
        raise ZeroDivisionError("injected")

    def registered(module: torch.nn.Module, hook: Any, **options: Any) -> Any:
        return register(module, broken, **options)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", registered)
    try:
        run_anew(session, request_of(name))
    except ZeroDivisionError:
        pass
    else:
        assert not reached, "a hook's fault was swallowed"
    monkeypatch.undo()
    assert state(session) == before
    assert same(run_anew(session, request_of(name)), run)


@pytest.mark.parametrize("where", ["full disk", "bug"])
@pytest.mark.parametrize("name", FEW)
def test_a_writer_that_fails(
    session: Session, request_of: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    clean(name)
    before = state(session)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if where == "full disk" else TypeError("bug")

    monkeypatch.setattr(storing.np, "savez_compressed", full)
    with pytest.raises(StudioError if where == "full disk" else TypeError) as raised:
        session.run(request_of(name), fresh=True)
    monkeypatch.undo()
    assert ("the disk is full" in str(raised.value)) == (where == "full disk")
    assert state(session) == before


# ---- stopped ----------------------------------------------------------------------------------------------


def _stopped_at(session: Session, recipe: Recipe, words: list[int]) -> None:
    before = state(session)
    for word in words:
        with speaking(word), pytest.raises(Cancelled):
            run_anew(session, recipe)
        assert state(session) == before, word


@pytest.mark.parametrize("name", TABLE)
def test_stopped_at_some_steps(session: Session, request_of: Any, clean: Any, name: str) -> None:
    words = clean(name)[2]
    assert words > 1, "it can't be stopped while it runs"
    _stopped_at(session, request_of(name), [words // 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_stopped_at_every_step(session: Session, request_of: Any, clean: Any, name: str) -> None:
    _stopped_at(session, request_of(name), spread(clean(name)[2], 10**6 if name not in LONG else 20))


# ---- out of memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_memory_that_runs_out_once(session: Session, request_of: Any, clean: Any, name: str) -> None:
    """The batch is halved and the run goes on; its numbers are those of the whole batch."""
    run, forwards, _ = clean(name)
    before = state(session)
    with failing_at(forwards // 2, torch.OutOfMemoryError("injected")):
        again = run_anew(session, request_of(name))
    assert any("the batch was halved" in w for w in again.result.values["warnings"])
    for array, trace in run.result.arrays.items():
        near = dict(atol=2e-3 * max(1, np.abs(trace.values).max(initial=0)), rtol=0, equal_nan=True)
        assert np.allclose(trace.values, again.result.arrays[array].values, **near), array
    assert state(session) == before


@pytest.mark.parametrize("name", TABLE)
def test_memory_that_never_suffices(session: Session, request_of: Any, clean: Any, name: str) -> None:
    clean(name)
    before = state(session)
    with failing_at(None, None, always=torch.OutOfMemoryError("injected")):
        with pytest.raises(StudioError, match="not enough memory"):
            run_anew(session, request_of(name))
    assert state(session) == before


# ---- killed -----------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
import studio.store as storing
from studio.jobs import Job
from studio.models.loading import home
from studio.session import Session
from tests.smallest import smallest

name, place, runs, edit, word = sys.argv[1:]
heard, spoken = Job._check, [0]

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def check(job):
    spoken[0] += 1
    kill() if spoken[0] == int(word) else heard(job)

Job._check = check
if word == "0":
    storing.figures.to_bytes = kill  # in the middle of writing the run's folder
(Path(place) / "child").mkdir(exist_ok=True)
Session(runs=runs, device="cpu", threads=1).run(smallest(name, Path(place) / "child", edit))
"""


def _killed(name: str, words: int, place: Path, runs: Path, edit: str) -> None:
    from studio.store import Store

    asked = (name, str(place), str(runs), edit, str(words))
    done = subprocess.run([sys.executable, "-c", _KILLED, *asked], capture_output=True, timeout=300, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    store = Store(runs)
    assert store.ids() == []
    store.sweep_leftovers()
    assert not [f for f in runs.glob(".*")]


@pytest.mark.parametrize("name", ["knockout"])
def test_killed_while_the_run_is_written(place: Path, tmp_path: Path, edit: str, name: str) -> None:
    _killed(name, 0, place, tmp_path / "runs", edit)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_killed_half_way(
    session: Session, request_of: Any, clean: Any, place: Path, tmp_path: Path, edit: str, name: str
) -> None:
    """What is left is swept, and the same request in another process gives what it always gave."""
    run, _, words = clean(name)
    _killed(name, max(1, words // 2), place, tmp_path / "runs", edit)
    assert same(run_anew(session, request_of(name)), run)


# ---- weights that are no numbers, files that are cut ------------------------------------------------------

WEIGHTS = {
    "atlas-sd": ("generate", "unet/diffusion_pytorch_model.safetensors"),
    "atlas-clip": ("decompose", "open_clip_model.safetensors"),
    "atlas-vit": ("decompose", "model.safetensors"),
    "atlas-llama": ("knockout", "model.safetensors"),
    "atlas-phi": ("contributions", "model.safetensors"),
}


@pytest.mark.parametrize("harm", ["NaN", "cut", "header", "empty"])
@pytest.mark.parametrize("model", WEIGHTS)
def test_weights_that_are_damaged(
    session: Session, request_of: Any, tmp_path: Path, model: str, harm: str
) -> None:
    from safetensors.torch import load_file, save_file

    from studio.models.catalog import ASSETS

    method, file = WEIGHTS[model]
    folder = Path(shutil.copytree(ASSETS / "atlas" / model, tmp_path / "model"))
    weights, before = folder / file, state(session)
    content = weights.read_bytes()
    if harm == "NaN":
        tensors = load_file(weights)
        name = max(tensors, key=lambda n: tensors[n].numel())
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif harm == "cut":
        weights.write_bytes(content[: len(content) // 2])
    else:
        weights.write_bytes(b"\xff" * 4096 if harm == "header" else b"")
    recipe = replace(request_of(method), model=str(folder))
    with pytest.raises(StudioError) as raised:
        session.run(recipe, fresh=True, save=False)
    assert len(str(raised.value)) < 400 and str(folder.name) in str(raised.value)
    assert state(session) == before

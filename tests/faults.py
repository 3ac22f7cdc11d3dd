"""What the tests of faults share: the smallest run of each method, faults to put into it, and what no fault
may leave behind."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as modules

from studio.jobs import Job
from studio.models.loading import home
from studio.session import Session
from studio.store import EDIT_FILE, MADE_FILE, as_record, damaged_images, read_run
from studio.types import Recipe, Run
from tests.smallest import SMALLEST, smallest

METHODS = sorted(SMALLEST)
LONG = ("passport",)  # seconds a run: its faults come with `-m slow`
TABLE = [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in METHODS]


@dataclass(frozen=True, eq=False)
class Clean:
    """A run without a fault, how many modules ran in it, and how often it spoke to its job."""

    run: Run
    forwards: int
    words: int


class Methods:
    """Every method's smallest run in one session, under an edit where the method takes one.

    folder: where pictures are made; edit: an edit file of atlas-sd.
    """

    def __init__(self, session: Session, folder: Path, edit: str) -> None:
        self.session, self.folder, self.edit = session, folder, edit
        self._clean: dict[str, Clean] = {}

    def request(self, name: str) -> Recipe:
        """The smallest request of a method."""
        return smallest(name, self.folder, self.edit, under_edit=True)

    def run(self, name: str, *, go_on: bool = False, **options: Any) -> Run:
        """A run that is computed and kept: from no stored run and, unless it is to go on, from no statistics
        of images that an earlier one left."""
        if not go_on:
            shutil.rmtree(home() / "corpora", ignore_errors=True)
        return self.session.run(self.request(name), fresh=True, **options)

    def clean(self, name: str) -> Clean:
        """The run without a fault, made once."""
        if name not in self._clean:
            self.run(name, save=False)  # models are loaded now
            with failing_at(None, None) as count, speaking(None) as words:
                run = self.run(name, save=False)
            self._clean[name] = Clean(run, count[0], words[0])
        return self._clean[name]

    @contextmanager
    def unharmed(self, what: object = "") -> Iterator[None]:
        """Holds that what happens inside leaves no hook, no overlay, no lock, the same weights, and in the
        store nothing but, at most, one whole run that says how far it came."""
        store, before = self.session.store, state(self.session)
        there = set(store.ids())
        yield
        assert state(self.session) == before, what
        kept = [store.load(run_id) for run_id in set(store.ids()) - there]
        assert len(kept) <= 1, what
        for run in kept:
            assert run.status == "stopped" or run.status == "failed" and run.error, what
            assert run.result.arrays and not damaged_images(store.root / run.id), what


def state(session: Session) -> dict[str, Any]:
    """All that a fault must not change: weights, hooks, modes and processors of every loaded model, files
    that are half-written, and whether the queue is free."""
    found: dict[str, Any] = {"running": session.queue.running, "pinned": session.parking._used}
    found["half-written"] = sorted(f.name for f in session.store.root.rglob(".*"))
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
    """Whether two runs hold the same numbers, images, findings and products, bit for bit."""
    pairs = [
        ({n: t.values for n, t in run.result.arrays.items()}, dict(run.result.images), products(run))
        for run in (one, other)
    ]
    found = [as_record(run)["result"]["values"] for run in (one, other)]
    values = [{n: v for n, v in told.items() if "seconds" not in n} for told in found]
    return all(map(_equal, *pairs)) and json.dumps(values[0]) == json.dumps(values[1])


def same_kept(folder: Path, run: Run) -> bool:
    """Whether a run's folder holds this run; what was made is read from its file."""
    from safetensors.numpy import load_file

    kept, files = read_run(folder), [folder / name for name in (EDIT_FILE, MADE_FILE)]
    made = {n: v for file in files if file.is_file() for n, v in load_file(file).items()}
    wanted = {n: np.asarray(v, np.float32) for n, v in products(run).items()}
    return _equal(made, wanted) and same(kept, replace(run, result=replace(run.result, edit=None, made=None)))


def products(run: Run) -> dict[str, np.ndarray]:
    """The tensors that a run made, by name."""
    edit, made = run.result.edit, run.result.made
    return {**(edit.deltas if edit is not None else {}), **(made.tensors if made is not None else {})}


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(
        np.array_equal(values, other[n], equal_nan=np.asarray(values).dtype.kind == "f")
        for n, values in one.items()
    )


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 … count - 1, the first and the last among them."""
    return sorted({round(n) for n in np.linspace(0, count - 1, min(most, count))}) if count else []

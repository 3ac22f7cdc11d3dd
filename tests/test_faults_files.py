"""Faults around files, in every method: a run that can't be written, a process that is killed while it
computes or writes, weights that are damaged. tests/faults.py says what none of them may leave."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio import store as storing
from studio.errors import StudioError
from studio.models.loading import home
from studio.registry import METHODS as REGISTERED
from studio.registry import find_method
from studio.session import Session
from studio.store import Store
from studio.types import Figure, Run
from tests.faults import METHODS, TABLE, Methods, same, same_kept
from tests.test_session import edit_file

ROOT = Path(__file__).parents[1]
WRITERS = {  # in the order in which a run is written
    "the numbers": (storing.np, "savez_compressed"),
    "the images": (storing.figures, "image_bytes"),
    "what it made": (storing, "write_tensors"),
    "the figure": (storing.figures, "to_bytes"),
    "run.json": (Path, "write_text"),
    "the folder's name": (Path, "rename"),
}


@pytest.fixture(scope="module")
def methods(session: Session, atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> Methods:
    """The table of all methods."""
    folder: Path = tmp_path_factory.mktemp("faults")
    return Methods(session, folder, str(edit_file(atlas, folder / "edit.safetensors")))


def writers(run: Run) -> list[str]:
    """Those that write something of this run."""
    made = run.result.edit is not None or run.result.made is not None
    there = {"the images": bool(run.result.images), "what it made": made}
    return [name for name in WRITERS if there.get(name, True)]


# ---- the writer -------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(methods: Methods, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Run]:
    """Lets a method give what it gave without computing it again, its figure undrawn; what no store takes
    goes to a folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(storing.figures, "to_bytes", lambda *_, **__: b"drawn")

    def of(name: str) -> Run:
        run = methods.clean(name).run
        ready = replace(find_method(name), run=lambda *_, **__: run.result)
        monkeypatch.setitem(REGISTERED, name, ready)
        return run

    return of


@pytest.mark.parametrize("name", TABLE)
def test_a_disk_that_is_full(methods: Methods, at_once: Any, tmp_path: Path, name: str) -> None:
    """Nothing half-written stays, the sentence says where the run lies, and there it is whole; where no disk
    has room, it says that."""
    run = at_once(name)
    with methods.unharmed():
        for what, everywhere in itertools.product(writers(run), (False, True)):
            lies = list(tmp_path.glob("locus-kept-*"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(*WRITERS[what], _full(getattr(*WRITERS[what]), everywhere))
                with pytest.raises(StudioError, match="the disk is full") as raised:
                    methods.run(name)
            kept = [folder for folder in tmp_path.glob("locus-kept-*/*") if folder.parent not in lies]
            assert len(kept) == (not everywhere or what == "the figure"), what  # the numbers alone had room
            assert ("no other folder took the run either" in str(raised.value)) == (not kept)
            assert all(same_kept(folder, run) for folder in kept), what
            assert all(f"The run lies in {folder}" in str(raised.value) for folder in kept)
            assert raised.value.partial is not None and same(raised.value.partial, run)


def _full(genuine: Callable, everywhere: bool) -> Callable:
    """A writer to a full disk: everywhere, or on the store's, which is tried first."""
    tried = []

    def write(*args: Any, **options: Any) -> Any:
        tried.append(1)
        if everywhere or len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*args, **options)

    return write


@pytest.mark.parametrize("name", TABLE)
def test_a_bug_in_a_writer(methods: Methods, at_once: Any, name: str) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise TypeError("bug")

    run = at_once(name)
    with methods.unharmed():
        for what in (w for w in writers(run) if w != "the figure"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(*WRITERS[what], bug)
                with pytest.raises(TypeError):
                    methods.run(name)
    with pytest.MonkeyPatch.context() as patch:  # a figure that can't be drawn costs no run
        patch.setattr(*WRITERS["the figure"], bug)
        kept = methods.run(name)
    assert kept.status == "done" and same_kept(methods.session.store.root / kept.id, kept)
    assert any("The figure could not be drawn" in w for w in kept.result.values["warnings"])


# ---- killed -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked in the middle of writing")
@pytest.mark.parametrize("name", TABLE)
def test_killed_while_the_run_is_written(methods: Methods, at_once: Any, tmp_path: Path, name: str) -> None:
    run = at_once(name)
    figure, store = find_method(name).draw(run), Store(tmp_path / "runs")
    for what in writers(run):
        _killed_at(what, store, run, figure)
        assert store.ids() == [], what
        assert len(list(store.root.glob(".*"))) == 1 and store.sweep_leftovers() == 1, what
        assert not list(store.root.iterdir()), what
    kept = store.save(run, figure)
    assert same_kept(store.root / kept.id, run)


def _killed_at(what: str, store: Store, run: Run, figure: Figure) -> None:
    """Saves the run in a process that is killed as soon as it comes to that writer."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            setattr(*WRITERS[what], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            store.save(run, figure)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, what


_KILLED = """
import os, signal, sys
from pathlib import Path
from studio.jobs import Job
from studio.session import Session
from tests.smallest import smallest

name, place, runs, edit, word = sys.argv[1:]
heard, spoken = Job._check, [0]

def check(job):
    spoken[0] += 1
    os.kill(os.getpid(), signal.SIGKILL) if spoken[0] == int(word) else heard(job)

Job._check = check
Session(runs=runs, device="cpu", threads=1).run(smallest(name, Path(place), edit, under_edit=True))
"""


def _killed(name: str, word: int, place: Path, runs: Path, edit: str) -> None:
    asked = (name, str(place), str(runs), edit, str(word))
    done = subprocess.run([sys.executable, "-c", _KILLED, *asked], capture_output=True, timeout=300, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    store = Store(runs)
    assert store.ids() == []
    store.sweep_leftovers()
    assert not list(runs.glob(".*"))


@pytest.mark.parametrize(
    "name", [n if n == "knockout" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_killed_half_way(methods: Methods, tmp_path: Path, name: str) -> None:
    """No run is left, and the same request in another process, which goes on from what the dead one has kept
    of the images, gives what it always gave."""
    clean = methods.clean(name)
    shutil.rmtree(home() / "corpora", ignore_errors=True)
    _killed(name, max(1, clean.words // 2), methods.folder, tmp_path / "runs", methods.edit)
    assert same(methods.run(name, go_on=True, save=False), clean.run)


# ---- weights that are no numbers, files that are cut ------------------------------------------------------

WEIGHTS = {
    "atlas-sd": ("generate", "unet/diffusion_pytorch_model.safetensors"),
    "atlas-sd text encoder": ("trace-text-encoder", "text_encoder/model.safetensors"),
    "atlas-sd VAE": ("word-maps", "vae/diffusion_pytorch_model.safetensors"),
    "atlas-clip": ("decompose", "open_clip_model.safetensors"),
    "atlas-vit": ("align", "model.safetensors"),
    "atlas-dino": ("align", "model.safetensors"),
    "atlas-swin": ("align", "model.safetensors"),
    "atlas-maxvit": ("align", "model.safetensors"),
    "atlas-llama": ("knockout", "model.safetensors"),
    "atlas-phi": ("contributions", "model.safetensors"),
}


def harmed(file: Path, harm: str) -> None:
    """Damages a safetensors file: one NaN, half its bytes, a header that is none, nothing in it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    content = file.read_bytes()
    if harm == "NaN":
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            note = opened.metadata()
        name = max(tensors, key=lambda n: tensors[n].numel())
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, file, metadata=note or {"format": "pt"})
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(b"\xff" * 4096 if harm == "header" else b"")


HARMS = ["NaN", "cut", "header", "empty"]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_damaged(methods: Methods, tmp_path: Path, part: str, harm: str) -> None:
    from studio.models.catalog import ASSETS

    method, file = WEIGHTS[part]
    folder = Path(shutil.copytree(ASSETS / "atlas" / part.split()[0], tmp_path / "damaged-copy"))
    harmed(folder / file, harm)
    recipe = replace(methods.request(method), model=str(folder), edits=())
    with methods.unharmed(), pytest.raises(StudioError) as raised:
        methods.session.run(recipe, fresh=True)
    said = str(raised.value)
    assert len(said) < 400 and folder.name in said
    assert "holds NaN or infinity" in said if harm == "NaN" else Path(file).name in said, said
    assert "copy" in said.replace(folder.name, ""), said


@pytest.mark.parametrize("harm", HARMS)
def test_an_edit_file_that_is_damaged(methods: Methods, tmp_path: Path, harm: str) -> None:
    """It is refused by every method that an edit can lie under."""
    file = Path(shutil.copy(methods.edit, tmp_path / "harmed.safetensors"))
    harmed(file, harm)
    with methods.unharmed():
        for name in METHODS:
            if methods.request(name).edits:
                with pytest.raises(StudioError, match="harmed.safetensors") as raised:
                    methods.session.run(replace(methods.request(name), edits=(str(file),)), fresh=True)
                assert len(str(raised.value)) < 400, name


@pytest.mark.parametrize("harm", HARMS)
def test_an_aligner_that_is_damaged(methods: Methods, tmp_path: Path, harm: str) -> None:
    from studio.models.catalog import ASSETS

    file = Path(shutil.copy(ASSETS / "atlas/aligners/atlas-vit.safetensors", tmp_path / "harmed.safetensors"))
    harmed(file, harm)
    asked = methods.request("decompose")
    recipe = replace(asked, model="atlas-vit", inputs={**asked.inputs, "aligner": str(file)})
    with methods.unharmed(), pytest.raises(StudioError, match="harmed.safetensors is no aligner"):
        methods.session.run(recipe, fresh=True)

"""Runs on disk: whole or not there, read back as they were, and never trusted when they are foreign."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio import store
from studio.errors import RequestError, StudioError
from studio.run_export import export
from studio.store import Store, check_free, read_run, write_run
from studio.types import Axis, Figure, Recipe, Result, Run, Trace

RED = np.tile(np.array((255, 0, 0), np.uint8), (4, 6, 1))
FIGURE = Figure("heat", {"rows": ["a"], "cols": ["b", "c"], "values": np.array([[1.0, math.nan]])})
ID = "20250102030405-generate-abababab"


def some_run(**changes: Any) -> Run:
    """A small finished run with a missing number and an image."""
    effect = Trace(np.array([1.5, math.nan], np.float32), (Axis("layer", ("a", "größer")),), "cosine")
    pixels = Trace(np.array([0, 255], np.uint8), (Axis("pixel", ("0", "1")),), "RGB")
    run = Run(
        Recipe("generate", "atlas-sd", {"prompt": 'a "star" 日本'}, {"steps": 2}, (0, 7), ("e",)),
        "done",
        "2025-01-02T03:04:05+00:00",
        1.2344,
        {"device": "cpu", "threads": 1},
        Result({"effect": effect, "pixels": pixels}, {"total": math.nan, "n": 2}, {"seed0-clean": RED}),
        key="ab" * 32,
        model={"id": "atlas-sd", "fingerprint": "f"},
    )
    return replace(run, **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved run."""
    return tmp_path / Store(tmp_path).save(some_run(), FIGURE).id


# ---- whole runs -------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    kept = Store(tmp_path).save(some_run(), FIGURE)
    read = Store(tmp_path).load(kept.id)
    assert read.recipe == kept.recipe and read.id == ID
    for name in ("status", "started", "host", "key", "model", "error"):
        assert getattr(read, name) == getattr(kept, name)
    assert read.seconds == 1.234
    assert read.result.values == {"total": None, "n": 2}  # strict JSON has no NaN
    for name, trace in kept.result.arrays.items():
        other = read.result.arrays[name]
        assert (other.axes, other.unit, other.values.dtype) == (trace.axes, trace.unit, trace.values.dtype)
        np.testing.assert_array_equal(other.values, trace.values)
    assert list(read.result.images) == ["seed0-clean"] and len(read.result.images) == 1
    np.testing.assert_array_equal(read.result.images["seed0-clean"], RED)


def test_layout_of_a_run_folder(saved: Path) -> None:
    files = sorted(str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file())
    assert files == [
        "arrays.npz",
        "figure.pdf",
        "figure.png",
        "figure.svg",
        "images/seed0-clean.png",
        "run.json",
    ]
    record = json.loads((saved / "run.json").read_text("utf-8"), parse_constant=pytest.fail)
    keys = "format recipe model status started seconds host result error"
    assert set(record) == set(keys.split())
    assert set(record["recipe"]) == {"method", "model", "inputs", "params", "seeds", "edits", "key"}
    assert record["result"]["arrays"]["effect"] == {
        "axes": [{"name": "layer", "labels": ["a", "größer"]}],
        "unit": "cosine",
    }
    with np.load(saved / "arrays.npz", allow_pickle=False) as stored:
        assert sorted(stored) == ["effect", "pixels"]


def test_ids_newest_first_and_each_its_own(tmp_path: Path) -> None:
    kept = Store(tmp_path / "deep" / "runs")
    assert kept.ids() == []
    ids = [kept.save(some_run()).id for _ in range(11)]
    later = kept.save(some_run(started="2026-01-01T00:00:00+00:00")).id
    assert ids == [ID, *(f"{ID}-{n}" for n in range(2, 12))]
    assert kept.ids() == [later, *reversed(ids)]


def test_names_of_any_kind_are_put_in_order(tmp_path: Path) -> None:
    for name in ("mine", "7", "run²", "run-2b", "run-02", "run-x", "٣"):
        write_run(some_run(), tmp_path / name)
    assert len(Store(tmp_path).ids()) == 7


def test_the_tenth_run_of_a_second_is_newer_than_the_ninth(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    ids = [kept.save(some_run()).id for _ in range(10)]
    assert kept.find("ab" * 32).id == ids[-1] == f"{ID}-10"


def test_find_takes_the_newest_finished_run_of_the_very_key(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    assert kept.find("ab" * 32) is None
    kept.save(some_run(started="2024-01-01T00:00:00+00:00"))
    newest = kept.save(some_run()).id
    kept.save(some_run(started="2026-01-01T00:00:00+00:00", status="stopped"))
    kept.save(some_run(started="2027-01-01T00:00:00+00:00", key="ab" * 31 + "cd"))
    assert kept.find("ab" * 32).id == newest
    (tmp_path / newest / "run.json").write_text("{")
    assert kept.find("ab" * 32).id.startswith("2024")


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "../x", "a/b", "/etc", ".partial-1-x", "a\0b", "a\n", "x" * 201]
)
def test_ids_that_are_no_names(tmp_path: Path, bad: str) -> None:
    root = tmp_path / "runs"
    outside = Store(tmp_path).save(some_run()).id
    Store(root).save(some_run())
    for name in (bad, f"../{outside}"):
        with pytest.raises(RequestError, match="is no run's id"):
            Store(root).load(name)


def test_an_id_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="There is no run 'other' in"):
        Store(tmp_path).load("other")


# ---- damaged and foreign folders --------------------------------------------------------------------------


def damage(folder: Path, file: str, content: bytes) -> str:
    """The sentence about a run one of whose files holds something else."""
    (folder / file).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_run(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"recipe": 1}', b'{"recipe": {}, "result": {}}', b"\xff", b"[" * 100_000],
    ids=lambda c: repr(c[:20]),
)
def test_damaged_records(saved: Path, content: bytes) -> None:
    assert "is damaged and can't be read" in damage(saved, "run.json", content)


def test_axes_that_do_not_fit_their_array(saved: Path) -> None:
    content = (saved / "run.json").read_bytes().replace(b'"a"', b'"a", "b"')
    assert "is damaged" in damage(saved, "run.json", content)


def test_arrays_cut_short_anywhere(saved: Path) -> None:
    whole = (saved / "arrays.npz").read_bytes()
    for length in range(0, len(whole), 7):
        assert "is damaged" in damage(saved, "arrays.npz", whole[:length])


def test_arrays_with_a_wrong_byte_are_refused_or_untouched(saved: Path) -> None:
    whole, refused = (saved / "arrays.npz").read_bytes(), 0
    for place in range(0, len(whole), 3):
        (saved / "arrays.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            assert read_run(saved).result.arrays["pixels"].values.tolist() == [0, 255]
        except RequestError:
            refused += 1
    assert refused > 20


def test_missing_files(saved: Path) -> None:
    (saved / "arrays.npz").unlink()
    with pytest.raises(RequestError, match="is no run folder: arrays.npz is not there"):
        read_run(saved)
    with pytest.raises(RequestError, match="is no run folder: run.json is not there"):
        read_run(saved.parent)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sprung,)


def test_foreign_arrays_with_pickles_are_refused(saved: Path, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    np.savez(saved / "arrays.npz", effect=np.array([trap, trap], object), pixels=np.zeros(2, np.uint8))
    with pytest.raises(RequestError, match="is damaged"):
        read_run(saved)
    assert "is damaged" in damage(saved, "arrays.npz", pickle.dumps(trap))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "sprung").exists()  # the trap works


# ---- half-written runs ------------------------------------------------------------------------------------

_WRITER = """
import sys
from studio import store
from tests.test_store import FIGURE, some_run
def stuck(*args):
    print("writing", flush=True)
    sys.stdin.read()
store.figures.to_bytes = stuck
store.Store(sys.argv[1]).save(some_run(), FIGURE)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_a_kill_leaves_is_never_listed_and_swept(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    tree = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"writing\n"
        assert kept.sweep_leftovers() == 0  # the writer is alive
        writer.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".partial-") and (left / "arrays.npz").exists()
    assert kept.ids() == [] and kept.find("ab" * 32) is None
    assert kept.sweep_leftovers() == 1 and list(tmp_path.iterdir()) == []
    assert kept.save(some_run()).id == ID


def test_a_partial_folder_with_a_record_is_not_listed(tmp_path: Path) -> None:
    write_run(some_run(), tmp_path / f".partial-{os.getpid()}-x", None)
    assert Store(tmp_path).ids() == []


@pytest.mark.parametrize("step", ["savez_compressed", "figure", "record", "rename"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "savez_compressed": (np, "savez_compressed"),
        "figure": (Path, "write_bytes"),
        "record": (Path, "write_text"),
        "rename": (Path, "rename"),
    }[step]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(StudioError, match="could not be saved in .*: the disk is full") as caught:
        Store(tmp_path).save(some_run(), FIGURE)
    assert caught.value.code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bug_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Store(tmp_path).save(some_run(), Figure("no such kind", {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "mine"])
def test_a_place_taken_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    taken = tmp_path / "run"

    def slow(*args: Any) -> None:
        taken.mkdir()
        if content:
            (taken / "file").write_text(content)

    monkeypatch.setattr(store, "_fill", slow)
    with pytest.raises(FileExistsError):
        write_run(some_run(), taken)
    assert [f.name for f in tmp_path.rglob("*")] == ["run"] + (["file"] if content else [])


# ---- --out ------------------------------------------------------------------------------------------------


def test_out_must_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(RequestError, match="exists already"):
            check_free(taken)
    check_free(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_out_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is no folder that you may write to"):
        check_free(tmp_path / "file" / "run")
    with pytest.raises(RequestError, match="--out can't be 'x+': File name too long"):
        check_free(Path("x" * 1000))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RequestError, match="is no folder that you may write to"):
        check_free(tmp_path / "run")


# ---- export -----------------------------------------------------------------------------------------------


def test_export_gives_every_format(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    files = export(saved, target)
    assert set(files) == {"svg", "png", "pdf", "csv", "zip"} and set(target.iterdir()) == set(files.values())
    assert all(f.name == f"{ID}.{kind}" for kind, f in files.items())
    assert files["png"].read_bytes() == (saved / "figure.png").read_bytes()
    lines = files["csv"].read_text("utf-8").splitlines()
    assert lines[1].startswith("effect,layer=a,1.5,cosine,") and '""generate""' in lines[1]
    assert lines[2:] == ["effect,layer=größer,nan,cosine,"]
    with zipfile.ZipFile(files["zip"]) as packed:
        packed.extractall(tmp_path / "unpacked")
    assert read_run(tmp_path / "unpacked" / ID).recipe == some_run().recipe


def test_export_of_a_run_without_figures(tmp_path: Path) -> None:
    kept = Store(tmp_path / "runs").save(some_run())
    assert set(export(tmp_path / "runs" / kept.id, tmp_path)) == {"csv", "zip"}

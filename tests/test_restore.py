"""Exported files dropped back: every format finds its run, zips from anybody are looked at before they are
taken, and what is wrong is said in a sentence while nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio import zip_import
from studio.errors import RequestError, StudioError
from studio.exports import to_zip
from studio.recipes import FORMAT, as_text, carried, read_note
from studio.restore import restored
from studio.run_export import KINDS, export
from studio.store import Store
from studio.types import Axis, Run, Trace
from tests.made_runs import figure_of, saved, traced


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of one run and its files in every format."""
    root = tmp_path_factory.mktemp("home")
    run = saved(Store(root / "runs"))
    (root / "files").mkdir()
    export(root / "runs" / run.id, root / "files", tuple(KINDS))
    export(root / "runs" / run.id, root / "files", ("png",), dpi=300, scale=(-1.0, 1.0))
    return root


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    """The run of that store."""
    (found,) = Store(home / "runs").ids()
    return Store(home / "runs").load(found)


def one(home: Path, kind: str) -> Path:
    """The file of a kind."""
    return next(f for f in sorted((home / "files").iterdir()) if f.suffix == f".{kind}")


def files_of(home: Path) -> list[Path]:
    """Every file that is exported of the run, and those of its folder."""
    (folder,) = [f for f in (home / "runs").iterdir() if f.is_dir()]
    inside = ["run.json", "figure.svg", "figure.png", "figure.pdf", "images/seed0-clean.png"]
    return [f for f in (home / "files").iterdir() if f.suffix != ".zip"] + [folder / n for n in inside]


def test_every_exported_file_finds_its_run_and_its_recipe_elsewhere(
    home: Path, run: Run, tmp_path: Path
) -> None:
    files = files_of(home)
    assert len(files) == 14
    for file in files:
        found = restored(file, Store(home / "runs"))
        assert (found.run_id, found.recipe) == (run.id, run.recipe), file
        assert found.said == f"The run is in the store, as {run.id}."
        odd = tmp_path / "any name; rm -rf @.txt"  # what a file is, its content says
        shutil.copy(file, odd)
        found = restored(odd, Store(tmp_path / "runs"))
        assert (found.run_id, found.recipe) == (None, run.recipe), file
        assert "not in this store; the recipe was read" in found.said
    assert not (tmp_path / "runs").exists()


def test_the_note_says_what_a_replay_needs(home: Path, run: Run, tmp_path: Path) -> None:
    note = restored(one(home, "svg"), Store(tmp_path)).note
    assert note.host["threads"] == 1 and note.fingerprint == "cd" * 32 and note.status == "done"
    assert set(note.arrays) == set(run.result.arrays) and all(len(d) == 64 for d in note.arrays.values())


def test_a_finished_run_of_the_same_key_is_found_under_another_id(home: Path, tmp_path: Path) -> None:
    other = saved(Store(tmp_path), started="2026-11-22T09:00:00+00:00")
    assert restored(one(home, "png"), Store(tmp_path)).run_id == other.id


def test_a_zip_brings_the_whole_run_once(home: Path, run: Run, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    found = restored(one(home, "zip"), store)
    assert found.run_id == run.id and found.said == f"The run is in the store now, as {run.id}."
    there = store.load(run.id)
    assert there.recipe == run.recipe and there.key == run.key
    assert there.host == {**run.host, "imported": True}
    for name, trace in run.result.arrays.items():
        np.testing.assert_array_equal(there.result.arrays[name].values, trace.values)
    np.testing.assert_array_equal(there.result.images["seed0-clean"], run.result.images["seed0-clean"])
    figures = {k: (store.path(run.id) / f"figure.{k}").read_bytes() for k in ("svg", "png", "pdf")}
    assert figures["svg"] == (home / "runs" / run.id / "figure.svg").read_bytes()
    again = restored(one(home, "zip"), store)
    assert again.run_id == run.id and again.said == f"The run is in the store, as {run.id}."
    assert store.ids() == [run.id] and not list(store.root.glob(".*"))


def test_another_run_of_the_same_id_gets_a_new_one(home: Path, run: Run, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    other = traced()
    trace = other.result.arrays["clean"]
    arrays = other.result.arrays | {"clean": replace(trace, values=trace.values + 1)}
    first = store.save(replace(other, result=replace(other.result, arrays=arrays)))
    assert first.id == run.id
    assert [restored(one(home, "zip"), store).run_id for _ in range(2)] == [f"{run.id}-2"] * 2
    assert store.ids() == [f"{run.id}-2", run.id]
    np.testing.assert_array_equal(store.load(run.id).result.arrays["clean"].values, trace.values + 1)


def test_a_zip_of_a_folder_with_a_name_of_its_own_gets_an_id(home: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / run.id, tmp_path / "my trace")
    to_zip(tmp_path / "my trace", tmp_path / "mine.zip")
    assert restored(tmp_path / "mine.zip", Store(tmp_path / "runs")).run_id == run.id


def test_a_zip_brings_the_edits_that_were_laid_over(tmp_path: Path) -> None:
    import hashlib

    from safetensors.numpy import save_file

    edit = tmp_path / "a star.safetensors"
    save_file({"unet.x.weight": np.zeros((2, 2), np.float32)}, edit, {"locus.base_fingerprint": "f"})
    digest = hashlib.sha256(edit.read_bytes()).hexdigest()
    run = traced(recipe=replace(traced().recipe, edits=(f"{edit}@0.6",)), host={"edits": [digest]})
    kept = Store(tmp_path / "one").save(run)
    file = export(tmp_path / "one" / kept.id, tmp_path, ("zip",))["zip"]
    content = edit.read_bytes()
    edit.unlink()
    store = Store(tmp_path / "two")
    found = restored(file, store)
    (entry,) = found.recipe.edits
    path, _, strength = entry.rpartition("@")
    assert strength == "0.6" and Path(path).read_bytes() == content and store.has_edit(digest)
    assert restored(file, store).run_id == found.run_id == kept.id
    assert not (store.path(kept.id) / "edits").exists()


def test_two_studios_that_take_the_same_zip_at_once_keep_one_run(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, genuine = Store(tmp_path / "runs"), zip_import._draw

    def quicker(mine: Run, folder: Path) -> None:
        genuine(mine, folder)
        if not store.ids():
            shutil.copytree(home / "runs" / run.id, store.root / run.id)  # the other studio's rename

    monkeypatch.setattr(zip_import, "_draw", quicker)
    found = restored(one(home, "zip"), store)
    assert found.run_id == run.id and store.ids() == [run.id]
    assert [f.name for f in store.root.iterdir()] == [run.id]


# ---- what is not taken ------------------------------------------------------------------------------------


def zip_of(path: Path, entries: dict[str, bytes], **changes: Any) -> Path:
    """A zip of these entries; `changes` are attributes of its last entry."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for i, (name, content) in enumerate(entries.items()):
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if i == len(entries) - 1:
                for key, value in changes.items():
                    setattr(info, key, value)
            out.writestr(info, content)
    return path


def whole(run: Run, home: Path) -> dict[str, bytes]:
    """The entries of the run's zip."""
    with zipfile.ZipFile(one(home, "zip")) as opened:
        return {n: opened.read(n) for n in opened.namelist()}


def changed(content: bytes, **changes: Any) -> bytes:
    """run.json with other fields."""
    return json.dumps(json.loads(content) | changes).encode()


def pickled() -> bytes:
    """An npz with an array of objects, which only pickle reads."""
    out = io.BytesIO()
    np.savez(out, indirect_effect=np.array([{"a": 1}], object))
    return out.getvalue()


def huge() -> bytes:
    """An npz whose one array says that it has 2**50 numbers."""
    head = str({"descr": "<f4", "fortran_order": False, "shape": (2**50,)}).encode() + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr(
            "indirect_effect.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(8)
        )
    return out.getvalue()


ZIPS: dict[str, tuple[Callable[[str, dict], dict[str, bytes]], dict[str, Any], str]] = {
    "foreign": (lambda t, e: {"a.txt": b"x"}, {}, "there is no run.json in it"),
    "empty": (lambda t, e: {}, {}, "there is no run.json in it"),
    "path upwards": (lambda t, e: e | {f"{t}/../../evil": b"x"}, {}, "evil in it is no file of a run"),
    "path upwards in images": (lambda t, e: e | {f"{t}/images/../x.png": b"x"}, {}, "no file of a run"),
    "backslash": (lambda t, e: e | {f"{t}/images\\..\\x.png": b"x"}, {}, "no file of a run"),
    "absolute": (lambda t, e: e | {"/etc/x": b"x"}, {}, "more than one folder"),
    "two runs": (lambda t, e: e | {"other/run.json": b"{}"}, {}, "more than one folder"),
    "a program": (lambda t, e: e | {f"{t}/run.py": b"x"}, {}, "run.py in it is no file of a run"),
    "a pickle": (lambda t, e: e | {f"{t}/arrays.pkl": b"x"}, {}, "arrays.pkl in it is no file of a run"),
    "link": (
        lambda t, e: e | {f"{t}/images/a.png": b"/etc/passwd"},
        {"external_attr": (stat.S_IFLNK | 0o777) << 16},
        "a.png in it is a link",
    ),
    "no numbers": (
        lambda t, e: {k: v for k, v in e.items() if "npz" not in k},
        {},
        "is damaged (arrays.npz)",
    ),
    "numbers are text": (lambda t, e: e | {f"{t}/arrays.npz": b"x"}, {}, "is damaged (arrays.npz)"),
    "objects": (lambda t, e: e | {f"{t}/arrays.npz": pickled()}, {}, "is damaged (arrays.npz or run.json)"),
    "a huge array": (lambda t, e: e | {f"{t}/arrays.npz": huge()}, {}, "is damaged (arrays.npz or run.json)"),
    "image is none": (
        lambda t, e: e | {f"{t}/images/seed0-clean.png": b"<svg>"},
        {},
        "is damaged (images/seed0-clean.png)",
    ),
    "edit is none": (lambda t, e: e | {f"{t}/edit.safetensors": b"x"}, {}, "is damaged (edit.safetensors)"),
    "an edit of another hash": (
        lambda t, e: e | {f"{t}/edits/{'0' * 64}.safetensors": b"\x02" + bytes(7) + b"{}"},
        {},
        "is damaged (edits/0000000000000000…)",
    ),
    "run.json is a list": (lambda t, e: e | {f"{t}/run.json": b"[]"}, {}, "is damaged (run.json)"),
    "run.json is cut": (lambda t, e: e | {f"{t}/run.json": b'{"a'}, {}, "is damaged (run.json)"),
    "no status": (
        lambda t, e: e | {f"{t}/run.json": changed(e[f"{t}/run.json"], status="fine")},
        {},
        "is damaged (run.json)",
    ),
    "newer": (
        lambda t, e: e | {f"{t}/run.json": changed(e[f"{t}/run.json"], format=FORMAT + 1)},
        {},
        "was written by a newer version of Locus (format 2, this one reads up to 1); install the newer",
    ),
    "recipe is none": (
        lambda t, e: e | {f"{t}/run.json": changed(e[f"{t}/run.json"], recipe={"method": 1, "model": "m"})},
        {},
        "The recipe in this zip is damaged",
    ),
}


@pytest.mark.parametrize(("make", "attributes", "part"), ZIPS.values(), ids=ZIPS.keys())
def test_zips_that_are_not_taken(
    home: Path, run: Run, tmp_path: Path, make: Any, attributes: dict, part: str
) -> None:
    file = zip_of(tmp_path / "x.zip", make(run.id, whole(run, home)), **attributes)
    with pytest.raises(RequestError) as fault:
        restored(file, Store(tmp_path / "runs"))
    assert part in str(fault.value) and str(tmp_path) not in str(fault.value)
    assert [f.name for f in tmp_path.rglob("*") if f.name not in ("x.zip", "runs", "temporary")] == []


def test_a_zip_with_doubles_or_under_a_password_is_not_taken(home: Path, run: Run, tmp_path: Path) -> None:
    file = zip_of(tmp_path / "x.zip", whole(run, home))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as opened:
        opened.writestr(f"{run.id}/run.json", b"{}")
    with pytest.raises(RequestError, match="run.json in it is there twice|run.json is in it twice"):
        restored(file, Store(tmp_path / "runs"))
    content = bytearray(one(home, "zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption in its table of contents
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(RequestError, match="in it is encrypted"):
        restored(tmp_path / "locked.zip", Store(tmp_path / "runs"))


def test_a_bomb_is_not_unpacked(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("indirect_effect.npy", bytes(100 << 20))
    entries = whole(run, home)
    big = zip_of(tmp_path / "outer.zip", entries | {f"{run.id}/images/a.png": bytes(100 << 20)})
    monkeypatch.setattr(zip_import, "MOST_RATIO", 500)
    with pytest.raises(RequestError, match=r"it would unpack to 0\.1 GiB"):
        restored(big, Store(tmp_path / "runs"))
    bomb = zip_of(tmp_path / "inner.zip", entries | {f"{run.id}/arrays.npz": inner.getvalue()})
    with pytest.raises(RequestError, match=r"its arrays would unpack to 0\.1 GiB"):
        restored(bomb, Store(tmp_path / "runs"))
    monkeypatch.setattr(zip_import, "MOST_ENTRIES", 3)
    with pytest.raises(RequestError, match="more than any run"):
        restored(one(home, "zip"), Store(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.98])
def test_a_zip_that_is_cut_short(home: Path, tmp_path: Path, kept: float) -> None:
    content = one(home, "zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RequestError, match="cut.zip is a damaged zip and nothing was taken from it"):
        restored(tmp_path / "cut.zip", Store(tmp_path / "runs"))
    flipped = bytearray(content)
    flipped[int(kept * len(content))] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(flipped)
    try:
        restored(tmp_path / "flipped.zip", Store(tmp_path / "runs"))
    except RequestError as error:
        assert "zip" in str(error)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "that folder is read-only")]
)
def test_a_store_that_cannot_be_written(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    store = Store(tmp_path / "runs")
    before = saved(store, started="2026-11-20T00:00:00+00:00").id

    def full(*_: Any) -> None:
        raise OSError(number, {errno.EROFS: "Read-only file system"}.get(number, "No space left on device"))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StudioError, match=f"could not be taken into .*: {said}; nothing is lost") as fault:
        restored(one(home, "zip"), store)
    assert fault.value.code == 1 and store.ids() == [before]
    assert [f.name for f in store.root.iterdir()] == [before]


def note_of(run: Run, **changes: Any) -> dict[str, Any]:
    """The run's note with other fields."""
    note = carried(run)
    return note | {"locus": note["locus"] | changes.pop("locus", {})} | changes


FILES: dict[str, tuple[Callable[[Run], bytes], str]] = {
    "empty": (lambda r: b"", "holds no recipe of a run"),
    "text": (lambda r: b"hello", "holds no recipe of a run"),
    "bytes": (lambda r: bytes(range(256)), "holds no recipe of a run"),
    "another png": (lambda r: b"\x89PNG\r\n\x1a\n" + bytes(99), "is damaged and can't be read"),
    "another svg": (lambda r: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "holds no recipe of a run"),
    "svg that is cut": (lambda r: b"<?xml version='1.0'?><svg><a", "is damaged and can't be read"),
    "svg of entities": (
        lambda r: (
            b"<?xml version='1.0'?><!DOCTYPE s [<!ENTITY a '"
            + b"x" * 10000
            + b"'>"
            + b"".join(
                b"<!ENTITY a%d '%s'>" % (i, (b"&a%d;" % (i - 1) if i else b"&a;") * 50) for i in range(9)
            )
            + b"]><s>&a8;</s>"
        ),
        "is damaged and can't be read",
    ),
    "pdf that is cut": (lambda r: b"%PDF-1.4 hello", "is damaged and can't be read"),
    "json list": (lambda r: b"[1]", "holds no recipe of a run"),
    "json that is cut": (lambda r: b'{"method": "trace', "is damaged and can't be read"),
    "deep json": (lambda r: b'{"a":' * 100_000, "is damaged and can't be read"),
    "another notebook": (lambda r: b'{"nbformat": 4, "metadata": {}}', "holds no recipe of a run"),
    "a sweep's note": (lambda r: b'{"sweep": "abc", "method": "m"}', "holds no recipe of a run"),
    "csv of numbers alone": (lambda r: b"array,place,value,unit\na,b,1,c\n", "holds no recipe of a run"),
    "csv whose recipe is cut": (
        lambda r: b'array,place,value,unit,recipe\na,b,1,c,"{""method"""\n',
        "cut short or was changed",
    ),
    "BibTeX of others": (lambda r: b"@misc{a, title={b}}", "holds no recipe of a run"),
    "newer": (
        lambda r: as_text(note_of(r, locus={"format": FORMAT + 1})).encode(),
        "x.bin was written by a newer version of Locus (format 2",
    ),
    "version is a text": (
        lambda r: as_text(note_of(r, locus={"format": "one"})).encode(),
        "says no version of its format",
    ),
    "seeds are texts": (lambda r: as_text(note_of(r, seeds=["a"])).encode(), "is damaged: method and model"),
    "inputs are a list": (lambda r: as_text(note_of(r, inputs=[1])).encode(), "is damaged: method and model"),
    "unknown method": (
        lambda r: as_text(note_of(r, method="trace-uent")).encode(),
        "does not fit this version of Locus: There is no method 'trace-uent'; did you mean 'trace-unet'?",
    ),
    "unknown option": (
        lambda r: as_text(note_of(r, params={"sorcery": 1})).encode(),
        "does not fit this version of Locus: trace-unet has no option 'sorcery'",
    ),
    "prompt is a table": (
        lambda r: as_text(note_of(r, inputs={"prompt": {"a": 1}, "subject": "x"})).encode(),
        "does not fit this version of Locus: ",
    ),
}


@pytest.mark.parametrize(("make", "part"), FILES.values(), ids=FILES.keys())
def test_files_that_hold_no_recipe(tmp_path: Path, make: Callable[[Run], bytes], part: str) -> None:
    (tmp_path / "x.bin").write_bytes(make(traced(id="a")))
    with pytest.raises(RequestError) as fault:
        restored(tmp_path / "x.bin", Store(tmp_path / "runs"))
    assert part in str(fault.value) and "x.bin" in str(fault.value)
    assert str(tmp_path) not in str(fault.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["none.png", "a\0b.png", "x" * 5000, "."])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="can't be read"):
        restored(tmp_path / name, Store(tmp_path / "runs"))


def test_ids_and_keys_in_a_file_are_never_paths(tmp_path: Path) -> None:
    note = note_of(
        traced(), key="../*", locus={"run": "../../etc", "fingerprint": "/", "host": 1, "arrays": []}
    )
    read = read_note(as_text(note), "x")
    assert (read.key, read.run, read.fingerprint, dict(read.host), dict(read.arrays)) == ("", "", "", {}, {})
    (tmp_path / "x.json").write_text(as_text(note))
    assert restored(tmp_path / "x.json", Store(tmp_path / "runs")).run_id is None


def test_a_recipe_written_by_hand_is_taken(tmp_path: Path) -> None:
    recipe = {"method": "generate", "model": "atlas-sd", "inputs": {"prompt": ["a red star"]}, "seeds": [3]}
    (tmp_path / "mine.json").write_text(json.dumps(recipe), encoding="utf-8-sig")
    found = restored(tmp_path / "mine.json", Store(tmp_path / "runs"))
    assert found.recipe.method == "generate" and found.recipe.seeds == (3,) and found.run_id is None


def test_figures_of_a_method_that_cannot_be_drawn_are_left_out_and_the_numbers_kept(tmp_path: Path) -> None:
    strange = Trace(np.zeros(2, np.float32), (Axis("place", ("a", "b")),))
    run = traced()
    run = replace(run, result=replace(run.result, arrays={"odd": strange}))
    kept = Store(tmp_path / "one").save(run, figure_of(traced()))
    file = to_zip(tmp_path / "one" / kept.id, tmp_path / "x.zip")
    found = restored(file, Store(tmp_path / "two"))
    names = {f.name for f in Store(tmp_path / "two").path(found.run_id).iterdir()}
    assert names == {"run.json", "arrays.npz", "images"}

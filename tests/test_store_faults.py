"""A store that is full, read-only, shared or damaged: a sentence each, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import cli, disk, exports, rescue
from studio.disk import half_written, left_behind
from studio.errors import RequestError, StudioError
from studio.kept_edits import KeptEdits
from studio.replay import find_old
from studio.rescue import saved
from studio.restore import restored
from studio.run_export import export
from studio.run_index import summary_of
from studio.session import Session
from studio.store import Store, as_record, check_free, check_free_file, damaged_images, read_run
from studio.types import Recipe
from studio.uploads import Uploads
from tests.test_store import FIGURE, ID, some_run

RECIPE = Recipe("generate", "atlas-sd", {"prompt": ["a red star"]}, {"steps": 1}, (0,))
FAULTS = [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "read-only")]


def broken(number: int = errno.EROFS) -> Callable:
    """A writer that the disk refuses."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every step that writes fail, as on a file system that is mounted read-only, also for root; even
    removing what is not there fails so."""

    def make() -> None:
        for owner, name in (
            *((Path, n) for n in ("mkdir", "touch", "unlink", "write_bytes", "write_text", "rename")),
            *((Path, "replace"), (os, "utime"), (shutil, "copyfile"), (os, "unlink"), (os, "rmdir")),
        ):
            monkeypatch.setattr(owner, name, broken())

    return make


# ---- before a run, and after it ---------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "why"), FAULTS)
def test_nothing_is_computed_for_a_store_that_can_not_keep_it(
    session: Session, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    known = session.run(RECIPE)
    monkeypatch.setattr(Path, "write_bytes", broken(number))
    monkeypatch.setattr(session, "_with_less_memory", lambda *args: pytest.fail("it was computed"))
    with pytest.raises(StudioError, match=f"Nothing was run, since .* could not keep it: .*{why}.*--runs"):
        session.run(RECIPE, fresh=True)
    assert session.run(RECIPE).id == known.id  # what the store has it still gives
    assert not list(session.store.root.glob(".partial-*"))


def test_a_run_that_is_not_to_be_kept_needs_no_store(session: Session, read_only: Callable) -> None:
    read_only()
    assert session.run(RECIPE, fresh=True, save=False).status == "done"


def test_a_finished_run_is_written_elsewhere_and_taken_in_later(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The disk fills up while it is computed."""
    save = session.store.save
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(session.store, "save", lambda *args: _full(session.store))
    job = session.submit(RECIPE, fresh=True)
    while not job.over:
        job.wait(job.version, 0.5)
    said = str(job.error)
    (folder,) = tmp_path.glob("locus-kept-*/*")
    assert said.endswith(f"The run lies in {folder}: make room, then take it in with `locus import {folder} "
                         f"--runs {session.store.root}`.")  # fmt: skip
    assert job.run.result.images.keys() == read_run(folder).result.images.keys() and job.run.id == ""
    assert exports.sweep(older=-1) >= 0 and folder.is_dir()

    monkeypatch.setattr(session.store, "save", save)
    runs = tmp_path / "runs"
    assert cli.main(["import", str(folder), "--runs", str(runs)]) == 0
    assert f"The run is in the store now, as {folder.name}." in capsys.readouterr().out
    assert Store(runs).find(job.run.key, own=True).id == folder.name  # this studio's own run
    assert cli.main(["import", str(folder), "--runs", str(runs)]) == 0
    assert f"The run is in the store, as {folder.name}." in capsys.readouterr().out


def _full(store: Store) -> None:
    raise StudioError(f"The run could not be saved in {store.root}: the disk is full.")


def test_a_run_folder_from_elsewhere_is_marked_and_a_folder_of_none_refused(
    tmp_path: Path, capsys: Any
) -> None:
    kept = Store(tmp_path / "one").save(some_run(), FIGURE)
    here = ["--runs", str(tmp_path / "two")]
    assert cli.main(["import", str(tmp_path / "one" / kept.id), *here]) == 0
    assert Store(tmp_path / "two").load(kept.id).host["imported"] is True
    assert cli.main(["import", str(tmp_path), *here]) == 2
    assert "is no run folder: run.json is not there" in capsys.readouterr().err


def test_numbers_are_kept_where_the_figure_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Store, "save", lambda self, *args: _full(self))
    monkeypatch.setattr("studio.store.figures.to_bytes", broken(errno.ENOSPC))
    with pytest.raises(StudioError, match="The run lies in"):
        saved(Store(tmp_path / "runs"), some_run(), FIGURE)
    (folder,) = tmp_path.glob("locus-kept-*/*")
    assert folder.name == ID and not (folder / "figure.png").exists() and (folder / "arrays.npz").exists()


def test_no_place_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "save", lambda self, *args: _full(self))
    monkeypatch.setattr(rescue, "_places", lambda: iter([tmp_path / "gone"]))
    with pytest.raises(StudioError, match="no other folder took the run either.*run it again") as caught:
        saved(Store(tmp_path), some_run(), FIGURE)
    assert caught.value.partial.key == "ab" * 32 and list(tmp_path.iterdir()) == []


# ---- read-only --------------------------------------------------------------------------------------------


def test_an_old_click_edit_does_not_keep_the_studio_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: Callable
) -> None:
    (tmp_path / "edit").write_bytes(b"an edit")
    kept = Store(tmp_path / "runs")
    digest = kept.keep_edit(tmp_path / "edit", passing=True)
    os.utime(kept.edit_file(digest), (0, 0))
    read_only()
    assert kept.sweep_leftovers() == 0 and kept.has_edit(digest)
    assert kept.edit_file(digest).is_file()
    assert kept.keep_edit(tmp_path / "edit", passing=True) == digest


def test_an_edit_that_can_not_be_kept_is_said(tmp_path: Path, read_only: Callable) -> None:
    (tmp_path / "edit").write_bytes(b"an edit")
    (tmp_path / "runs" / "edits").mkdir(parents=True)
    read_only()
    for root in (tmp_path / "runs", tmp_path / "new"):
        with pytest.raises(StudioError, match="read-only.*the file is"):
            KeptEdits(root).keep_edit(tmp_path / "edit")


def test_uploaded_images_are_used_in_a_store_that_can_not_be_written(
    tmp_path: Path, read_only: Callable
) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    kept = Uploads(Store(tmp_path / "runs"))
    found = kept.keep([tmp_path / "a.png"])
    read_only()
    assert kept.folder(found).is_dir() and kept.keep([tmp_path / "a.png"]) == found
    with pytest.raises(StudioError, match="could not be kept: the store's folder is read-only; .*--runs"):
        kept.keep([tmp_path / "b.png"])
    assert kept.sweep(older=-1) == 0


@pytest.mark.parametrize(("number", "why"), FAULTS)
def test_the_temporary_folder_may_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", broken(number))
    with pytest.raises(StudioError, match=f"takes no file to download .*{why}.*TMPDIR"):
        exports.new_folder()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_out_says_why_it_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryDirectory", broken(number))
    full = number == errno.ENOSPC
    with pytest.raises(RequestError) as caught:
        check_free(tmp_path / "out")
    assert ("has no room, the disk is full" in str(caught.value)) == full
    assert ("is no folder that you may write to" in str(caught.value)) != full
    with pytest.raises(RequestError, match="the disk is full" if full else "its folder is read-only"):
        check_free_file(str(tmp_path / "out.json"), "--out", ".json")


# ---- several machines -------------------------------------------------------------------------------------


def test_what_another_machine_writes_stays_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = 2**22 + 1  # above Linux's highest
    assert disk.machine() and "-" not in disk.machine()
    kept = {f".partial-{os.getpid()}-x": True, f".partial-{os.getpid()}-@{disk.machine()}-x": True}
    kept |= {f".partial-{dead}-x": False, f".partial-{dead}-@{disk.machine()}-x": False}
    kept |= {f".partial-{dead}-@other.host-x": True, ".partial-odd": False, f".partial-{dead}": False}
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".partial-{dead}-@{disk.machine()}-file").write_bytes(b"")
    old = tmp_path / f".partial-{dead}-@other.host-old"
    old.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    assert Store(tmp_path).sweep_leftovers() == 6
    assert {f.name for f in tmp_path.iterdir()} == {name for name, stays in kept.items() if stays}

    mine = half_written("run")
    monkeypatch.setattr(disk.platform, "node", lambda: "another-machine")
    assert half_written("run") == f".partial-{os.getpid()}-@another_machine-run"
    assert not left_behind(tmp_path / mine)  # gone already, so nothing to say of it
    monkeypatch.setattr(disk.platform, "node", lambda: "")
    assert half_written("run").endswith("-@unknown-run")


# ---- damaged records --------------------------------------------------------------------------------------

WHOLE = as_record(some_run(host={"device": "cpu", "threads": 1, "versions": {"torch": "2"}, "edits": ["e"]}))
OTHERS = (None, True, -1.5, "text", [1], ["a"], {"a": 1})
FREE = ("result.values", "recipe.inputs", "recipe.params")  # tables of a method's own


def places(value: Any, path: str = "") -> list[str]:
    """The dotted path of every field of a record, those of a method's own tables left out."""
    found = [path] if path else []
    if isinstance(value, dict) and path not in FREE:
        for key, part in value.items():
            found += places(part, f"{path}.{key}".strip("."))
    return found


def put(record: Any, path: str, value: Any) -> dict:
    """A copy of a record with another value at that place."""
    at = copy = json.loads(json.dumps(record))
    *where, last = path.split(".")
    for part in where:
        at = at[part]
    at[last] = value
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    root = tmp_path_factory.mktemp("runs")
    return root / Store(root).save(some_run()).id


def used(run: Any) -> None:
    """What the studio does with any run: every field is looked at; another exception than a RequestError
    fails the test."""
    as_record(run)
    dict(run.host.get("versions") or {}), list(run.host.get("edits") or ())
    assert run.started[:10].count("-") == 2 and f"{run.seconds:.1f}" and run.key[:8] is not None
    hash((run.recipe.method, run.recipe.model, run.status, run.recipe.seeds, run.recipe.edits))
    run.recipe.key("f", "float32")
    (run.model.get("fingerprint") or "").strip(), (run.error or "").strip()


@pytest.mark.parametrize("path", places(WHOLE))
def test_a_field_of_another_type_is_a_damaged_run(folder: Path, path: str) -> None:
    """Either it is refused with a sentence, in the list too, or the value is one that the field may have."""
    refused = 0
    for value in OTHERS:
        (folder / "run.json").write_text(json.dumps(put(WHOLE, path, value)), "utf-8")
        try:
            used(read_run(folder))
        except RequestError as error:
            refused += 1
            said = str(error)
            assert "is damaged and can't be read (" in said or "says no version of its format" in said
            assert "AttributeError" not in said and summary_of(folder).status == "damaged"
    assert refused >= (4 if path not in ("error",) else 3)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("host", None, "host must be a table, not null"),
        ("recipe.seeds", [True], "recipe.seeds must be a list of whole numbers, not a list"),
        ("status", "lost", "status must be one of done, stopped, failed, not 'lost'"),
        ("seconds", "3", "seconds must be a number of seconds, not '3'"),
        ("model", [], "model must be a table, not a list"),
        ("started", "", "started must be a time such as"),
        ("host.versions", {"torch": 2}, "host.versions must be a table of texts, not a table"),
        ("result.arrays.effect.axes", [3], "result.arrays.effect.axes must be a table, not 3"),
    ],
)
def test_the_sentence_names_the_field(folder: Path, path: str, value: Any, said: str) -> None:
    (folder / "run.json").write_text(json.dumps(put(WHOLE, path, value)), "utf-8")
    with pytest.raises(RequestError) as caught:
        read_run(folder)
    assert said in str(caught.value) and str(caught.value).endswith("; other runs are not touched.")
    assert said in summary_of(folder).fault


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(path=st.sampled_from(places(WHOLE)), value=JSON)
def test_any_value_anywhere_is_taken_or_refused(folder: Path, path: str, value: Any) -> None:
    (folder / "run.json").write_text(json.dumps(put(WHOLE, path, value)), "utf-8")
    try:
        used(read_run(folder))
    except RequestError:
        assert summary_of(folder).status == "damaged" or path.startswith("result.arrays")


def test_fields_of_later_versions_do_no_harm(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(WHOLE | {"more": 1}), "utf-8")
    assert read_run(folder).recipe == some_run().recipe and summary_of(folder).fault == ""
    for name in WHOLE.keys() - {"format"}:
        (folder / "run.json").write_text(json.dumps({k: v for k, v in WHOLE.items() if k != name}), "utf-8")
        with pytest.raises(RequestError, match="is damaged"):
            read_run(folder)


# ---- damaged images, and what else lies in a folder -------------------------------------------------------


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run one of whose images is cut short."""
    root = tmp_path / "runs"
    made = root / Store(root).save(some_run(), FIGURE).id
    image = made / "images" / "seed0-clean.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return made


def test_a_cut_image_is_a_sentence_with_its_name(cut: Path) -> None:
    run = read_run(cut)
    with pytest.raises(
        RequestError, match="seed0-clean.png of the run .* is damaged or gone; put a whole copy"
    ):
        run.result.images["seed0-clean"]
    (cut / "images" / "seed0-clean.png").unlink()
    with pytest.raises(RequestError, match="is damaged or gone"):
        run.result.images["seed0-clean"]
    with pytest.raises(KeyError):
        run.result.images["other"]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_run_answers_no_recipe(cut: Path, content: bytes) -> None:
    kept = Store(cut.parent)
    (cut / "images" / "seed0-clean.png").write_bytes(content)
    assert [f.name for f in damaged_images(cut)] == ["seed0-clean.png"] and kept.find("ab" * 32) is None
    again = kept.save(some_run(), FIGURE)
    assert kept.find("ab" * 32).id == again.id and damaged_images(kept.root / again.id) == []


def test_replay_says_it_before_anything_is_computed(cut: Path) -> None:
    with pytest.raises(RequestError, match="seed0-clean.png of the run .* is damaged or gone"):
        find_old(cut.name, str(cut.parent))


def test_the_zip_of_such_a_run_is_taken_in_again_without_the_image(
    cut: Path, tmp_path: Path, capsys: Any
) -> None:
    assert cli.main(["export", cut.name, "--formats", "zip", "--out", str(tmp_path / "out"),
                     "--runs", str(cut.parent)]) == 0  # fmt: skip
    assert "seed0-clean.png is damaged, so the zip goes without it" in capsys.readouterr().err
    (packed,) = (tmp_path / "out").glob("*.zip")
    found = restored(packed, Store(tmp_path / "other"))
    assert len(Store(tmp_path / "other").load(found.run_id).result.images) == 0


def test_what_a_person_put_beside_a_run_stays_out_of_its_zip(tmp_path: Path) -> None:
    kept = Store(tmp_path / "runs").save(some_run(), FIGURE)
    folder = tmp_path / "runs" / kept.id
    (folder / "notes.txt").write_text("mine")
    (folder / "images" / "sketch.psd").write_bytes(b"mine")
    (folder / "more").mkdir()
    (folder / "more" / "run.json").write_text("{}")
    (folder / "link.png").symlink_to(tmp_path)
    files = export(folder, tmp_path, ["zip"])
    with zipfile.ZipFile(files["zip"]) as packed:
        names = {n.removeprefix(f"{kept.id}/") for n in packed.namelist()}
    figures = {"figure.svg", "figure.png", "figure.pdf"}
    assert names == {"run.json", "arrays.npz", "images/seed0-clean.png"} | figures
    found = restored(files["zip"], Store(tmp_path / "other"))
    image = Store(tmp_path / "other").load(found.run_id).result.images["seed0-clean"]
    np.testing.assert_array_equal(image, some_run().result.images["seed0-clean"])

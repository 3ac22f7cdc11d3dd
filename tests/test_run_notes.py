"""Stars, notes and the bin: beside the runs, atomic, and nothing is lost by two studios, a full disk or a
read-only folder."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from studio import run_bin
from studio.errors import RequestError, StudioError
from studio.run_bin import Bin
from studio.run_notes import LONGEST, Notes
from studio.store import Store
from tests.test_store import ID, some_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one run."""
    kept = Store(tmp_path / "runs")
    kept.save(some_run())
    return kept


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


# ---- stars and notes --------------------------------------------------------------------------------------


def test_a_star_and_a_note_are_kept_beside_the_run_which_stays_as_it_was(store: Store) -> None:
    before = {f: f.read_bytes() for f in (store.root / ID).rglob("*") if f.is_file()}
    notes = Notes(store)
    assert notes.starred() == frozenset() and notes.text(ID) == "" and notes.texts() == {}
    notes.star(ID, True)
    notes.star(ID, True)
    notes.write(ID, "  größer als erwartet\n日本 ")
    other = Notes(Store(store.root))
    assert other.starred() == {ID} and other.texts() == {ID: "größer als erwartet\n日本"}
    other.star(ID, False)
    other.write(ID, "")
    assert notes.starred() == frozenset() and notes.texts() == {} and notes.text(ID) == ""
    assert {f: f.read_bytes() for f in (store.root / ID).rglob("*") if f.is_file()} == before
    assert store.ids() == [ID]  # nothing beside it looks like a run


def test_a_changed_note_is_read_again_and_an_unchanged_one_is_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(store)
    notes.write(ID, "one")
    assert notes.texts() == {ID: "one"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_only)
        assert notes.texts() == {ID: "one"}
    Notes(store).write(ID, "another")
    assert notes.texts() == {ID: "another"}


def test_a_note_that_another_studio_changed_is_not_overwritten_unseen(store: Store) -> None:
    here, there = Notes(store), Notes(store)
    here.write(ID, "mine", seen="")
    with pytest.raises(RequestError, match="changed elsewhere meanwhile, to “mine”; save again"):
        there.write(ID, "theirs", seen="")
    assert here.text(ID) == "mine"
    there.write(ID, "theirs", seen="mine")
    here.write(ID, "theirs", seen="mine")  # the same text is no conflict
    assert here.text(ID) == "theirs"


def test_two_studios_star_and_note_at_once_and_nothing_is_lost(store: Store) -> None:
    ids = [store.save(some_run()).id for _ in range(12)]

    def write(which: int) -> None:
        notes = Notes(Store(store.root))
        for n, run_id in enumerate(ids):
            notes.star(run_id, True) if (n + which) % 2 else notes.write(run_id, f"{which} " * 500)

    threads = [threading.Thread(target=write, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    notes = Notes(store)
    assert notes.starred() == set(ids) == set(notes.texts())
    assert all(
        text == ("0 " * 500).strip() or text == ("1 " * 500).strip() for text in notes.texts().values()
    )
    assert [f.name for f in (store.root / "notes").iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize(
    "fault, says", [(full, "the disk is full"), (read_only, "the store's folder is read-only")]
)
def test_a_disk_that_takes_nothing_gets_a_sentence_and_keeps_the_old_note(
    store: Store, monkeypatch: pytest.MonkeyPatch, fault: Any, says: str
) -> None:
    notes = Notes(store)
    notes.write(ID, "old")
    for name in ("write_text", "touch"):
        monkeypatch.setattr(Path, name, fault)
    with pytest.raises(
        StudioError, match=f"The note could not be saved: {says}; everything else is as it was."
    ):
        notes.write(ID, "new")
    with pytest.raises(StudioError, match=f"The star could not be changed: {says}"):
        notes.star(ID, True)
    assert notes.text(ID) == "old" and notes.starred() == frozenset()
    assert [f.name for f in (store.root / "notes").iterdir()] == [f"{ID}.txt"]


def test_notes_that_are_none(store: Store) -> None:
    notes = Notes(store)
    with pytest.raises(RequestError, match=r"The note has 20,001 characters; at most 20,000 are kept\."):
        notes.write(ID, "x" * (LONGEST + 1))
    with pytest.raises(RequestError, match="holds bytes that are no text"):
        notes.write(ID, "\udc80")
    for bad in ("../x", "", ".bin", "a/b"):
        with pytest.raises(RequestError, match="is no run's id"):
            notes.star(bad, True)
    with pytest.raises(RequestError, match="There is no run 'gone'"):
        notes.write("gone", "text")


# ---- the bin ----------------------------------------------------------------------------------------------


def test_deleting_can_be_undone_with_star_and_note(store: Store) -> None:
    notes, trash = Notes(store), Bin(store)
    notes.star(ID, True)
    notes.write(ID, "why")
    thrown = trash.throw(ID)
    assert store.ids() == [] and store.find("ab" * 32) is None and trash.entries() == [thrown]
    assert trash.put_back(thrown.name) == ID
    assert store.load(ID).recipe == some_run().recipe and trash.entries() == []
    assert notes.starred() == {ID} and notes.text(ID) == "why"


def test_a_place_that_was_taken_meanwhile_gives_another_id(store: Store) -> None:
    trash = Bin(store)
    thrown = trash.throw(ID)
    assert store.save(some_run()).id == ID
    assert trash.put_back(thrown.name) == f"{ID}-2" and store.ids() == [f"{ID}-2", ID]


def test_a_run_that_another_studio_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Bin(store), Bin(Store(store.root))
    thrown = first.throw(ID)
    with pytest.raises(RequestError, match=f"There is no run '{ID}'"):
        second.throw(ID)
    second.put_back(thrown.name)
    with pytest.raises(RequestError, match="no longer in the bin"):
        first.put_back(thrown.name)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(RequestError, match="is gone already; another studio deleted it"):
        first.throw(ID)


@pytest.mark.parametrize("bad", ["", "..", "../runs", "1~00000000~../x", "1~zz~x", "1~00000000~nothing"])
def test_names_that_the_bin_does_not_have(store: Store, bad: str) -> None:
    with pytest.raises(RequestError, match="no longer in the bin"):
        Bin(store).put_back(bad)


def test_a_damaged_run_can_be_deleted_too(store: Store) -> None:
    (store.root / ID / "run.json").unlink()
    thrown = Bin(store).throw(ID)
    assert not (store.root / ID).exists() and Bin(store).put_back(thrown.name) == ID


def test_the_bin_is_swept_after_its_days(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, trash = Notes(store), Bin(store)
    notes.star(ID, True)
    notes.write(ID, "why")
    trash.throw(ID)
    assert trash.sweep() == 0 and len(trash.entries()) == 1
    later = time.time() + (run_bin.DAYS + 1) * 24 * 3600
    monkeypatch.setattr(run_bin.time, "time", lambda: later)
    assert trash.sweep() == 1 and trash.entries() == []
    assert notes.starred() == frozenset() and notes.texts() == {}


def test_removing_an_old_copy_spares_the_note_of_a_run_that_is_there(store: Store) -> None:
    trash = Bin(store)
    thrown = trash.throw(ID)
    store.save(some_run())
    Notes(store).write(ID, "of the new one")
    assert trash.remove(thrown) and Notes(store).text(ID) == "of the new one"


def test_a_read_only_store_gets_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    thrown = Bin(store).throw(store.save(some_run()).id)
    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(StudioError, match="could not be deleted: the store's folder is read-only"):
        Bin(store).throw(ID)
    with pytest.raises(StudioError, match="could not be put back: the store's folder is read-only"):
        Bin(store).put_back(thrown.name)
    assert (store.root / ID / "run.json").is_file()


def test_a_link_in_the_bin_is_removed_and_not_what_it_points_to(store: Store, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "run.json").write_text("{}")
    os.symlink(tmp_path / "precious", store.root / "linked")
    trash = Bin(store)
    assert trash.remove(trash.throw("linked"))
    assert (tmp_path / "precious" / "run.json").is_file() and not os.path.lexists(store.root / "linked")

"""The list of runs without their arrays, searches in it, and the quota of the store."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from studio import run_index, run_quota
from studio.errors import RequestError, StudioError
from studio.run_bin import Bin
from studio.run_index import RunIndex, Wanted, chosen
from studio.run_notes import Notes
from studio.run_quota import Plan, Sizes, folder_size, parse_size, prune, size_text
from studio.store import Store
from studio.types import Recipe
from tests.test_store import ID, some_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with three runs, a day apart."""
    kept = Store(tmp_path / "runs")
    for day, (method, model, prompt) in enumerate(
        [("generate", "atlas-sd", "a red star"), ("lens", "atlas-sd", "Ärmel"), ("lens", "sd-1.5", "a star")]
    ):
        recipe = Recipe(method, model, {"prompt": [prompt], "negative": None}, {"steps": 2}, (0, 7))
        kept.save(some_run(recipe=recipe, started=f"2026-01-0{day + 1}T23:30:00+00:00"))
    return kept


def ids(found: list) -> list[str]:
    return [s.id.split("-")[0][6:8] + " " + s.method for s in found]


# ---- the list ---------------------------------------------------------------------------------------------


def test_summaries_say_what_a_run_was(store: Store) -> None:
    newest = RunIndex(store).all()[0]
    assert (newest.method, newest.model, newest.status, newest.seeds) == ("lens", "sd-1.5", "done", (0, 7))
    assert newest.started == "2026-01-03T23:30:00+00:00" and newest.seconds == 1.234
    assert newest.title == "a star" and newest.images == ("seed0-clean",) and newest.values == {"n": 2}
    assert newest == RunIndex(store).find(newest.id) and not newest.fault


def test_runs_stand_newest_first_whatever_their_names_are(store: Store) -> None:
    (store.root / store.ids()[0]).rename(store.root / "0-mine")
    assert ids(RunIndex(store).all())[1:] == ["02 lens", "01 generate"]
    assert RunIndex(store).all()[0].id == "0-mine"


def test_a_record_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    index = RunIndex(store)
    before = index.all()
    added = store.save(some_run())
    read: list[str] = []
    real = run_index.summary_of
    monkeypatch.setattr(run_index, "summary_of", lambda f: read.append(f.name) or real(f))
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("an array was read"))
    assert len(index.all()) == 4 and read == [added.id]
    shutil.rmtree(store.root / added.id)
    assert index.all() == before


def test_a_damaged_run_hides_no_other(store: Store) -> None:
    index, names = RunIndex(store), store.ids()
    index.all()
    (store.root / names[0] / "run.json").write_text('{"recipe": 1}')
    (store.root / names[1] / "run.json").unlink()
    (store.root / names[2] / "arrays.npz").unlink()
    (store.root / "deep").mkdir()
    (store.root / "deep" / "run.json").write_text("[" * 100_000)
    (store.root / "no run").mkdir()
    (store.root / "edits").mkdir()
    (store.root / "file").write_text("")
    found = {s.id: s for s in index.all()}
    assert set(found) == {*names, "deep"}
    assert found[names[0]].fault == "its run.json can't be read (recipe must be a table, not 1)"
    assert found[names[1]].fault == "its run.json is not there" and found[names[1]].status == "damaged"
    assert found[names[2]].fault == "its arrays.npz is not there" and found[names[2]].method == "generate"
    assert found["deep"].fault and found["deep"].title == found["deep"].fault


def test_five_thousand_runs_are_listed_quickly(store: Store) -> None:
    record = (store.root / store.ids()[0] / "run.json").read_bytes()
    for n in range(5000):
        folder = store.root / f"run-{n}"
        folder.mkdir()
        (folder / "run.json").write_bytes(record)
    index = RunIndex(store)
    index.all()
    took = []
    for _ in range(3):  # another program on the same core makes one slower
        begun = time.thread_time()
        assert len(index.all()) == 5003
        took.append(time.thread_time() - begun)
    print(f"5,003 runs again in {min(took):.3f} s of the processor")
    assert min(took) < 1.5


def test_an_empty_or_missing_store(tmp_path: Path) -> None:
    assert RunIndex(Store(tmp_path / "none")).all() == []


# ---- searching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(), ["03 lens", "02 lens", "01 generate"]),
        (Wanted("star"), ["03 lens", "01 generate"]),
        (Wanted("STAR red"), ["01 generate"]),
        (Wanted("ärm"), ["02 lens"]),
        (Wanted("sd-1.5"), ["03 lens"]),
        (Wanted("noted"), ["02 lens"]),
        (Wanted("noted star"), []),
        (Wanted(methods=("lens",), models=("atlas-sd",)), ["02 lens"]),
        (Wanted(since="2026-01-02"), ["03 lens", "02 lens"]),
        (Wanted(until=" 2026-01-02 "), ["02 lens", "01 generate"]),
        (Wanted(since="2026-01-02", until="2026-01-02"), ["02 lens"]),
        (Wanted(starred=True), ["01 generate"]),
    ],
)
def test_searches(store: Store, wanted: Wanted, found: list[str]) -> None:
    notes, names = Notes(store), store.ids()
    notes.write(names[1], "Noted here")
    notes.star(names[2], True)
    assert ids(chosen(RunIndex(store).all(), wanted, notes.texts(), notes.starred())) == found


@pytest.mark.parametrize(
    ("wanted", "which"), [(Wanted(since="yesterday"), "first"), (Wanted(until="1.2.26"), "last")]
)
def test_days_that_are_none(wanted: Wanted, which: str) -> None:
    with pytest.raises(RequestError, match=f"The {which} day must be written as 2026-11-21, year, month and"):
        chosen([], wanted, {}, frozenset())


# ---- the quota --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), (" 20 GiB ", 20 * 2**30), ("1.5kb", 1500), ("7", 7), ("0", 0)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 gigabytes", "1e9", "nan", "5GB 3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="--quota must be a size such as 5GB or 20GiB, not"):
        parse_size(text)


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (12, 3456, 7.8e6, 2**34)] == ["12 bytes", "3.46 kB", "7.8 MB", "17.2 GB"]


def plan(store: Store, quota: int) -> Plan:
    return Sizes(store).plan(RunIndex(store).all(), quota)


def test_the_plan_takes_the_bin_then_the_oldest_then_what_has_a_note_and_never_a_star(store: Store) -> None:
    thrown = Bin(store).throw(store.save(some_run()).id)
    newest, middle, oldest = store.ids()
    total = sum(folder_size(store.root / n) for n in (newest, middle, oldest))
    binned = folder_size(Bin(store).root / thrown.name)
    assert plan(store, total + binned) == Plan(total + binned, total + binned, total + binned)
    only_bin = plan(store, total)
    assert [t.run for t, _ in only_bin.bin] == [ID] and only_bin.runs == () and only_bin.left == total
    assert [r.id for r, _ in plan(store, total - 1).runs] == [oldest]
    Notes(store).write(oldest, "keep me long")
    assert [r.id for r, _ in plan(store, 0).runs] == [middle, newest, oldest]
    Notes(store).star(middle, True)
    final = plan(store, 0)
    assert [r.id for r, _ in final.runs] == [newest, oldest] and final.starred == 1
    assert final.left == folder_size(store.root / middle)
    assert "Pruning would remove 1 deleted run and 2 runs of 2026-01-01 to 2026-01-03, " in final.said
    assert final.said.endswith("for good. Even then it is over. Pruning leaves runs with a star.")


def test_pruning_does_what_the_plan_says_and_spares_what_got_a_star_since(store: Store) -> None:
    newest, middle, oldest = store.ids()
    Notes(store).write(oldest, "a note")
    made = plan(store, 0)
    Notes(store).star(newest, True)
    assert prune(store, made) == "2 runs removed for good. 1 run got a star meanwhile and stayed."
    assert store.ids() == [newest] and Bin(store).entries() == [] and Notes(store).texts() == {}
    assert plan(store, 0).said.endswith("Nothing can be pruned. Pruning leaves runs with a star.")


def test_pruning_what_another_studio_pruned(store: Store) -> None:
    made = plan(store, 0)
    shutil.rmtree(store.root / store.ids()[0])
    assert prune(store, made) == "2 runs removed for good."
    assert plan(store, 10).said == "Runs take 0 bytes of 10 bytes. Nothing needs to be pruned."


def test_pruning_on_a_read_only_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    made = plan(store, 0)
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StudioError, match="could not be deleted: the store's folder is read-only"):
        prune(store, made)
    assert len(store.ids()) == 3


def test_a_size_is_measured_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, runs = Sizes(store), RunIndex(store).all()
    first = sizes.plan(runs, 0)
    edits = store.root / "edits"  # these may grow
    monkeypatch.setattr(run_quota, "folder_size", lambda f: 0 if f == edits else pytest.fail(f"{f} again"))
    assert sizes.plan(runs, 0) == first
    assert json.loads((store.root / runs[0].id / "run.json").read_text())["status"] == "done"

"""What the quota counts beside runs: kept edits and uploaded images; what pruning frees of them, what not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from panels.server import _tell_quota
from studio.cli import main
from studio.doctor import examine
from studio.run_bin import Bin
from studio.run_index import RunIndex
from studio.run_quota import Plan, Sizes, Watch, folder_size, prune
from studio.store import Store
from studio.types import Recipe
from studio.uploads import DAY, Uploads
from tests.test_store import some_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def uploaded(store: Store, folder: Path, *seeds: int, days: float = 2) -> str:
    """The id of a set of noise images that was last used so many days ago."""
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    found = Uploads(store).keep([folder / f"{seed}.png" for seed in seeds])
    then = time.time() - days * DAY
    os.utime(Uploads(store).root / found, (then, then))
    return found


def naming(store: Store, set_id: str, day: int = 1) -> str:
    """The id of a run whose images are those of a set."""
    asked = {"images": [str(Uploads(store).root / set_id)]}
    started = f"2026-01-0{day}T00:00:00+00:00"
    return store.save(some_run(recipe=Recipe("decompose", "m", asked), started=started)).id


def plan(store: Store, quota: int = 0) -> Plan:
    return Sizes(store).plan(RunIndex(store).all(), quota)


def size(store: Store, set_id: str) -> int:
    return folder_size(Uploads(store).root / set_id)


def test_kept_edits_and_uploads_are_counted_and_said(store: Store, tmp_path: Path) -> None:
    (tmp_path / "edit").write_bytes(b"e" * 3000)
    store.keep_edit(tmp_path / "edit")
    run = naming(store, needed := uploaded(store, tmp_path / "a", 1))
    found, runs = plan(store, 10**9), folder_size(store.root / run)
    assert (found.edits, found.uploads, found.needed) == (3000, size(store, needed), size(store, needed))
    assert found.used == found.left == runs + found.edits + found.uploads and found.empty
    assert found.said.startswith("Runs take ") and ", kept edits 3 kB, uploaded images " in found.said
    assert (
        "of 1 GB. Nothing needs to be pruned. Pruning leaves edits that a stack may name (3 kB) and images"
        in (found.said)
    )
    tight = plan(store)
    assert [r.id for r, _ in tight.runs] == [run] and tight.sets == () and tight.left == found.used - runs
    assert "Even then it is over. Pruning leaves edits that a stack may name (3 kB)" in tight.said
    prune(store, tight)
    assert (
        store.ids() == []
        and (Uploads(store).root / needed).is_dir()
        and len(list(store.root.glob("edits/*"))) == 1
    )


def test_images_that_nothing_needs_go_first(store: Store, tmp_path: Path) -> None:
    free, older = uploaded(store, tmp_path / "a", 1), uploaded(store, tmp_path / "b", 2, days=5)
    named, fresh = uploaded(store, tmp_path / "c", 3), uploaded(store, tmp_path / "d", 4, days=0.5)
    run = naming(store, named)
    found = plan(store)
    assert found.sets == ((older, size(store, older)), (free, size(store, free)))
    assert found.needed == size(store, named) + size(store, fresh)
    assert (
        "Pruning would remove 2 sets of uploaded images that nothing needs and 1 run of 2026-01-01"
        in found.said
    )
    one = plan(store, found.used - 1)
    assert [name for name, _ in one.sets] == [older] and one.runs == () and one.bin == ()
    assert one.left == found.used - size(store, older)
    assert prune(store, one) == "1 set of images removed for good." and store.ids() == [run]
    assert not (Uploads(store).root / older).exists() and (Uploads(store).root / free).is_dir()
    assert prune(store, plan(store)) == "1 set of images and 1 run removed for good."
    assert sorted(Uploads(store).sets()) == sorted([named, fresh])
    assert [name for name, _ in plan(store).sets] == [named]  # no run names it any more


def test_images_of_deleted_and_of_damaged_runs_stay(store: Store, tmp_path: Path) -> None:
    binned, damaged = (uploaded(store, tmp_path / n, i) for i, n in enumerate("ab"))
    Bin(store).throw(naming(store, binned))
    file = store.root / naming(store, damaged, 2) / "run.json"
    file.write_text(file.read_text()[:-20])
    assert plan(store).sets == () and RunIndex(store).all()[0].fault


def test_a_file_that_sets_share_counts_once(store: Store, tmp_path: Path) -> None:
    first = Uploads(store).root / uploaded(store, tmp_path / "a", 1, days=4)
    uploaded(store, tmp_path / "a", 2)  # a file beside it
    both = Uploads(store).keep([first / "1.png", tmp_path / "a" / "2.png"])
    if (first / "1.png").stat().st_nlink < 2:
        pytest.skip("this file system has no links")
    then = time.time() - 3 * DAY
    os.utime(Uploads(store).root / both, (then, then))
    found = dict(plan(store).sets)
    assert found[first.name] == 0 and found[both] == size(store, both)  # the last of them frees it
    alone = next(name for name in found if name not in (first.name, both))
    assert plan(store).uploads == size(store, both) + size(store, alone) and plan(store).left == 0


def test_a_set_that_a_page_used_since_the_plan_was_shown_stays(store: Store, tmp_path: Path) -> None:
    free = uploaded(store, tmp_path / "a", 1)
    shown = plan(store)
    assert [name for name, _ in shown.sets] == [free]
    Uploads(store).folder(free)  # a page asks for it
    assert prune(store, shown) == "0 runs removed for good." and (Uploads(store).root / free).is_dir()


def test_the_command_says_it_too(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    free = uploaded(store, tmp_path / "a", 1)
    (tmp_path / "edit").write_bytes(b"e" * 3000)
    store.keep_edit(tmp_path / "edit")
    where = ["--runs", str(store.root), "--quota", "0"]
    assert main(["prune", "--dry-run", *where]) == 0
    out = capsys.readouterr().out
    assert f"uploaded images {free}" in out and "Pruning leaves edits that a stack may name (3 kB)." in out
    assert main(["prune", "--json", *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["edits"], told["left"], told["done"]) == (3000, 3000, True)
    assert [row["id"] for row in told["unused_uploads"]] == [free] and told["uploads"] > 0
    assert Uploads(store).sets() == {}


def test_a_store_over_its_quota_is_said_and_one_within_it_is_not(store: Store) -> None:
    used, watch = folder_size(store.root / store.save(some_run()).id), Watch(store)
    store.quota = used
    assert watch.count() == watch.said() == ""
    store.quota = used - 1
    told = watch.count()
    assert told.startswith("The store holds ") and "`locus prune --dry-run` and the tab Store" in told
    assert watch.said() == told


def test_a_page_learns_of_it_without_waiting(store: Store) -> None:
    store.save(some_run())
    store.quota, watch = 1, Watch(store)
    assert watch.said() == ""  # the count has only begun
    end = time.monotonic() + 20
    while not (told := watch.said()) and time.monotonic() < end:
        time.sleep(0.01)
    assert told.startswith("The store holds ")


def test_the_doctor_and_the_terminal_say_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    store.save(some_run())
    monkeypatch.setenv("LOCUS_QUOTA", "1")
    facts, wrong = examine(str(store.root))
    assert facts["runs take"].endswith(" kB")
    assert any("more than its quota of 1 bytes" in sentence for sentence in wrong)
    store.quota = 1
    _tell_quota(SimpleNamespace(store=store))
    assert "more than its quota of 1 bytes" in capsys.readouterr().out

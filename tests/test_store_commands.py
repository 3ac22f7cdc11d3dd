"""`locus runs` and `locus prune`: what is listed and found, what would be pruned, and what is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studio.cli import main
from studio.errors import RequestError
from studio.run_bin import Bin
from studio.run_notes import Notes
from studio.store import QUOTA, Store
from studio.store_commands import quota_of
from studio.types import Recipe
from tests.test_store import some_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with three runs, one of them damaged."""
    kept = Store(tmp_path / "runs")
    for n, prompt in enumerate(("a red star", "a blue star", "broken"), 1):
        recipe = Recipe("lens", "m", {"prompt": prompt})
        kept.save(some_run(recipe=recipe, started=f"2026-01-0{n}T00:00:00+00:00"))
    (kept.root / kept.ids()[0] / "run.json").write_text("{")
    return kept


def test_runs_are_listed_and_searched(store: Store, capsys: pytest.CaptureFixture) -> None:
    Notes(store).star(store.ids()[2], True)
    assert main(["runs", "--runs", str(store.root)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "damaged: its run.json can't be read" in out
    assert out.splitlines()[-1].startswith("* 2026") and err == f"3 runs in {store.root}\n"
    assert main(["runs", "star", "blue", "--runs", str(store.root), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["title"] == "a blue star" and row["star"] is False and row["note"] == ""
    assert main(["runs", "--starred", "--runs", str(store.root)]) == 0
    assert "a red star" in capsys.readouterr().out
    assert main(["runs", "--since", "soon", "--runs", str(store.root)]) == 2
    assert "The first day must be written as 2026-11-21" in capsys.readouterr().err


def test_what_would_be_pruned_and_what_is(store: Store, capsys: pytest.CaptureFixture) -> None:
    newest, middle, oldest = store.ids()
    Notes(store).star(middle, True)
    where = ["--runs", str(store.root)]
    assert main(["prune", "--quota", "0", "--dry-run", *where]) == 0
    out = capsys.readouterr().out
    assert oldest in out and newest in out and middle not in out and "Pruning would remove 2 runs" in out
    assert len(store.ids()) == 3
    assert main(["prune", *where]) == 0
    assert "of 20 GB. Nothing needs to be pruned." in capsys.readouterr().out and len(store.ids()) == 3
    Bin(store).throw(newest)
    assert main(["prune", "--quota", "0", "--json", *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["done"] is True and [d["id"] for d in told["deleted"]] == [newest]
    assert store.ids() == [middle] and Bin(store).entries() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--quota", "much"], "--quota must be a size such as 5GB or 20GiB, not 'much'"),
        (["--runs", "nowhere"], "There is no store nowhere; name one with --runs"),
    ],
)
def test_wrong_requests(options: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["prune", *options]) == 2
    assert says in capsys.readouterr().err


def test_where_the_quota_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCUS_QUOTA", raising=False)
    assert quota_of(None) == QUOTA and quota_of("1kB") == 1000
    monkeypatch.setenv("LOCUS_QUOTA", "2GB")
    assert quota_of(None) == 2 * 10**9 and quota_of("1kB") == 1000
    monkeypatch.setenv("LOCUS_QUOTA", "lots")
    with pytest.raises(RequestError, match="LOCUS_QUOTA must be a size such as 5GB"):
        quota_of(None)
    assert main(["serve", "--quota", "lots"]) == 2

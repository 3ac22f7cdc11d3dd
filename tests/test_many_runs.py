"""Files that were made of many runs: what a sweep and the grid of the Runs panel write, dropped on the studio
or given to `locus import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studio import cli
from studio.errors import RequestError
from studio.figures import FORMATS, to_bytes
from studio.recipes import MOST_RUNS, carried_of_many
from studio.restore import ManyRuns, restored
from studio.store import Store
from studio.sweep import run_sweep
from studio.sweep_file import read_sweep
from studio.types import Recipe
from tests.test_store import FIGURE, some_run

SWEEP = "method: generate\nparams: {prompt: x, steps: 1}\ngrid: {guidance: [1, 2]}\n"


class Ready:
    """A runner whose runs are made up and lie in the store."""

    workers = 1

    def __init__(self, store: Store) -> None:
        self.store = store

    def locate(self, name: str, kind: str) -> None:
        """Every model is there."""

    def run(self, recipe: Recipe) -> Any:
        """A small run of that recipe."""
        return self.store.save(some_run(recipe=recipe))

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Store, Path, list[str]]:
    """(a store, the folder of a sweep of two of its runs, their ids)."""
    (tmp_path / "s.yaml").write_text(SWEEP)
    sweep, store = read_sweep(str(tmp_path / "s.yaml")), Store(tmp_path / "runs")
    asked = [Recipe("generate", "atlas-sd", dict(p.asked), {}, (0,)) for p in sweep.points]
    run_sweep(sweep, asked, Ready(store), store, tmp_path / "out")
    return store, tmp_path / "out", sorted(store.ids())


def test_every_file_of_a_sweep_says_what_it_is(swept: tuple, tmp_path: Path) -> None:
    store, out, ids = swept
    names = {f"sweep.{kind}" for kind in FORMATS} | {"sweep.csv", "combined.csv", "sweep.json"}
    assert names <= {f.name for f in out.iterdir()}
    for name in sorted(names):
        with pytest.raises(ManyRuns) as caught:
            restored(out / name, store)
        what = {"csv": "table", "json": "record"}.get(name.partition(".")[2], "figure")
        said = str(caught.value)
        assert said.startswith(f"{name} is the {what} of a sweep of 2 runs"), said
        assert said.endswith(".") and "holds no recipe of one run" in said
        named = name not in ("combined.csv", "sweep.json")
        assert sorted(caught.value.runs) == (ids if named else [])
        assert ("2 of them are in this store" in said) == named
        assert ("it names none of them" in said) != named
        with pytest.raises(RequestError, match="0 of them are in this store" if named else "names none"):
            restored(out / name, Store(tmp_path / "none"))


def test_import_lists_them_and_replay_refuses(swept: tuple, capsys: Any) -> None:
    store, out, ids = swept
    here = ["--runs", str(store.root)]
    assert cli.main(["import", str(out / "sweep.svg"), *here]) == 0
    said, *listed = capsys.readouterr().out.splitlines()
    assert (
        said.startswith("sweep.svg is the figure of a sweep of 2 runs of generate") and sorted(listed) == ids
    )
    assert cli.main(["import", str(out / "sweep.csv"), *here, "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["runs"]) == ids
    assert cli.main(["replay", str(out / "sweep.png"), *here]) == 2
    assert "is the figure of a sweep of 2 runs" in capsys.readouterr().err


def test_a_long_list_is_cut_and_foreign_ids_lead_nowhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    kept = store.save(some_run()).id
    note = carried_of_many("grid", "", [kept, "../runs", "/etc", "", *(f"run-{n}" for n in range(5000))])
    assert len(note["locus"]["runs"]) == MOST_RUNS and note["locus"]["count"] == 5004
    (tmp_path / "grid.png").write_bytes(to_bytes(FIGURE, "png", note))
    with pytest.raises(
        ManyRuns, match="figure of a grid of 5,004 runs, so .*; 1 of them is in this store"
    ) as e:
        restored(tmp_path / "grid.png", store)
    assert e.value.runs == (kept,)


@pytest.mark.parametrize(
    "note",
    [
        {"locus": {"of": "sweep", "runs": 3}},
        {"locus": {"of": "sweep", "runs": [3, None, {}], "count": "many"}, "method": 7},
        {"key": "k", "runs": 2},
    ],
)
def test_odd_notes_are_a_sentence_too(tmp_path: Path, note: dict) -> None:
    (tmp_path / "a.json").write_text(json.dumps(note))
    with pytest.raises(ManyRuns, match="a.json is the record of a sweep of"):
        restored(tmp_path / "a.json", Store(tmp_path))


def test_a_run_that_was_imported_twice_is_named_once(swept: tuple) -> None:
    store, out, ids = swept
    text = (out / "sweep.csv").read_text()
    (out / "twice.csv").write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ManyRuns, match="a sweep of 3 runs") as caught:
        restored(out / "twice.csv", store)
    assert sorted(caught.value.runs) == ids

"""Replay: a run once more from its folder, its id, its zip or any exported file, and what is said of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio import cli
from studio.errors import RequestError
from studio.recipes import carried, difference
from studio.replay import compare, find_old, repeat
from studio.run_export import KINDS, export
from studio.store import Store
from studio.types import Recipe, Result, Run
from tests.made_runs import saved, traced

INPUTS = {"context": "The capital of Arvonia is Quill.", "prompt": "The capital of Arvonia is"}


@pytest.fixture(scope="module")
def kept(session: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict[str, Path]]:
    """(a store, a real run in it, its files in every format)."""
    root = tmp_path_factory.mktemp("replay")
    made = session.run(Recipe("contributions", "atlas-llama", INPUTS), fresh=True, save=False)
    from studio.registry import find_method

    run = Store(root / "runs").save(made, find_method("contributions").draw(made))
    return root / "runs", run, export(root / "runs" / run.id, root / "files", tuple(KINDS))


def test_a_run_is_found_by_id_folder_zip_and_figure(kept: tuple, tmp_path: Path) -> None:
    store, run, files = kept
    for where in (run.id, str(store / run.id), *map(str, files.values())):
        found, digests = find_old(where, str(store))
        assert (found.id, found.recipe, digests) == (run.id, run.recipe, {}), where
        np.testing.assert_array_equal(
            found.result.arrays["contribution"].values, run.result.arrays["contribution"].values
        )
    empty = str(tmp_path / "none")
    assert find_old(str(files["zip"]), empty)[0].recipe == run.recipe and not Path(empty).exists()
    for kind in set(KINDS) - {"zip"}:
        found, digests = find_old(str(files[kind]), empty)
        assert found.recipe == run.recipe and set(digests) == set(run.result.arrays), kind


def test_a_figure_alone_is_replayed_bit_for_bit(kept: tuple, tmp_path: Path, capsys: Any) -> None:
    _, _, files = kept
    argv = ["replay", str(files["svg"]), "--runs", str(tmp_path / "none")]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "Every array is the same, bit for bit.\n"


def test_a_zip_is_replayed_and_not_kept(kept: tuple, tmp_path: Path) -> None:
    _, run, files = kept
    old, new = repeat(str(files["zip"]), {"runs": str(tmp_path / "none")})
    report = compare(old, new)
    assert report["identical"] and set(report["arrays"]) == set(run.result.arrays)
    assert not (tmp_path / "none").exists()


def test_what_differs_is_said(kept: tuple) -> None:
    _, run, _ = kept
    old = replace(run, host={**run.host, "versions": {"torch": "1.0"}, "machine": "abacus", "threads": 77})
    trace = run.result.arrays["contribution"]
    arrays = run.result.arrays | {"contribution": replace(trace, values=trace.values + 0.5)}
    report = compare(replace(old, result=replace(old.result, arrays=arrays)), run)
    said = "\n".join(report["said"])
    assert not report["agrees"] and report["arrays"]["contribution"] == pytest.approx(0.5, abs=1e-5)
    for part in (
        "contribution: largest difference 0.5",
        "threads: 77 then",
        "torch: 1.0 then",
        "abacus then",
    ):
        assert part in said
    report = compare(replace(run, result=replace(run.result, arrays=arrays)), run)
    assert "Machine, versions and weights are those of then." in report["said"][-1]


def test_digests_say_which_array_differs() -> None:
    run = traced()
    digests = carried(run)["locus"]["arrays"]
    report = compare(replace(run, result=Result()), run, digests)
    assert report["identical"] and report["said"] == ["Every array is the same, bit for bit."]
    report = compare(replace(run, result=Result()), run, digests | {"clean": "0" * 64})
    assert not report["agrees"] and report["arrays"]["clean"] is None
    assert report["said"][:2] == [
        "1 of 3 arrays differ.",
        "  clean: not the same; the file does not say by how much",
    ]


def test_differences() -> None:
    a = np.array([1.0, np.nan, 3.0], np.float32)
    assert difference(a, a.copy()) == 0.0 and difference(a, np.array([1.0, np.nan, 3.5], np.float32)) == 0.5
    assert difference(a, a[:2]) == difference(a, np.array([1.0, 2.0, 3.0], np.float32)) == float("inf")
    assert difference(np.array([3], np.uint8), np.array([5], np.uint8)) == 2.0
    gaps = np.full(2, np.nan)
    assert difference(gaps, -gaps) == 0.0  # a gap is a gap, whatever its sign


def test_weights_that_changed_are_said_before_anything_runs(kept: tuple) -> None:
    store, run, _ = kept
    said: list[str] = []

    class Enough(Exception):
        pass

    def warn(sentence: str) -> None:
        said.append(sentence)
        raise Enough

    with pytest.raises(Enough):
        repeat(replace(run, model={"fingerprint": "0" * 64}), {"runs": str(store)}, None, warn)
    assert said == ["The weights of atlas-llama are not those of the run, so it can't be repeated."]


def hand_written(folder: Path) -> Path:
    (folder / "mine.json").write_text(json.dumps({"method": "lens", "model": "m", "inputs": {"prompt": "x"}}))
    return folder / "mine.json"


def damaged(folder: Path) -> Path:
    run = saved(Store(folder / "runs"))
    (folder / "runs" / run.id / "arrays.npz").write_bytes(b"x")
    return folder / "runs" / run.id


def newer(folder: Path) -> Path:
    run = saved(Store(folder / "runs"))
    file = folder / "runs" / run.id / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"format": 9}))
    return file.parent


def foreign_zip(folder: Path) -> Path:
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_bytes(b"x")
    return Path(shutil.make_archive(str(folder / "photos"), "zip", folder / "photos"))


WRONG: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "recipe without numbers": (hand_written, "holds a recipe but no numbers to compare with"),
    "damaged run": (damaged, "is damaged and can't be read"),
    "newer run": (newer, "was written by a newer version of Locus (format 9, this one reads up to 1)"),
    "foreign zip": (foreign_zip, "This zip is not taken, there is no run.json in it"),
    "a name that is too long": (lambda folder: "x" * 5000, "is no run's id"),
    "a path that is not there": (lambda folder: "../../etc/none", "is no run's id"),
}


@pytest.mark.parametrize(("make", "part"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_replayed_or_exported(tmp_path: Path, capsys: Any, make: Any, part: str) -> None:
    where = str(make(tmp_path))
    unmeasured = {hand_written: "is not in this store, so there is nothing to write"}
    for command, said in (("replay", part), ("export", unmeasured.get(make, part))):
        out = tmp_path / command
        assert cli.main([command, where, "--runs", str(tmp_path / "store"), "--out", str(out)]) == 2
        told = capsys.readouterr()
        assert said in told.err and told.out == "" and told.err.count("\n") == 1 and not out.exists()


def test_a_stopped_run_is_exported_and_not_replayed(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    run = saved(store, status="stopped")
    with pytest.raises(RequestError, match="was stopped, so there is nothing whole to compare with"):
        find_old(run.id, str(store.root))
    assert export(store.path(run.id), tmp_path / "out", ("csv",))["csv"].is_file()


def test_commands_export_and_import(tmp_path: Path, capsys: Any) -> None:
    runs, other = tmp_path / "runs", tmp_path / "other"
    run = saved(Store(runs))
    out = tmp_path / "paper"
    argv = ["export", run.id, "--runs", str(runs), "--out", str(out), "--formats", "png,tex,bib,zip"]
    assert cli.main([*argv, "--dpi", "90", "--scale", "-0.1,0.5"]) == 0
    assert capsys.readouterr().out.split() == [
        str(out / f"{run.id}{end}") for end in ("-90dpi.png", ".tex", ".bib", ".zip")
    ]
    assert cli.main(argv) == 2 and "exists already" in capsys.readouterr().err
    zipped, figure = str(out / f"{run.id}.zip"), str(out / f"{run.id}-90dpi.png")
    assert cli.main(["import", figure, "--runs", str(other)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("The run is not in this store") and json.loads(said[said.index("{") :])[
        "seeds"
    ] == [0, 7]
    assert cli.main(["import", zipped, "--runs", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run.id == Store(other).ids()[0]


COMMANDS = {
    "export nothing": (["export"], "Which run? `locus export RUN"),
    "import nothing": (["import"], "Which file? `locus import FILE`"),
    "import what is not there": (["import", "none.zip"], "none.zip can't be read"),
    "a format that is none": (["export", "x", "--formats", "gif"], "There is no format 'gif'"),
    "a resolution that is none": (["export", "x", "--dpi", "9"], "must be a whole number from 30"),
    "a scale that is none": (["export", "x", "--scale", "-1,-2"], "--scale must be two numbers"),
    "a run that is not there": (["export", "x", "--scale", "-1,2"], "There is no run 'x'"),
}


@pytest.mark.parametrize(("argv", "part"), COMMANDS.values(), ids=COMMANDS.keys())
def test_wrong_commands(tmp_path: Path, capsys: Any, argv: list[str], part: str) -> None:
    argv = [*argv, "--runs", str(tmp_path / "store")] if len(argv) > 1 else argv
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert part in said.err and said.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_run_without_what_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    run = saved(Store(tmp_path / "runs"))
    folder = tmp_path / "runs" / run.id
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["recipe"]["method"] = "sorcery"
    (folder / "run.json").write_text(json.dumps(record))
    argv = ["export", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--formats", "bib"]) == 2
    assert "This run has no bib: its method comes from no paper." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*argv, "--formats", "svg,tex"]) == 0
    assert "There is no tex of this run" in capsys.readouterr().err
    assert [f.suffix for f in (tmp_path / "out").iterdir()] == [".svg"]
    with pytest.raises(RequestError, match="There is no method 'sorcery'"):
        repeat(str(folder), {"runs": str(tmp_path / "runs")})


def test_an_input_image_that_changed_is_named(session: Any, tmp_path: Path) -> None:
    """The file is another under its name: neither machine nor weights are the cause."""
    from PIL import Image

    for n, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{n}.png")
        os.utime(tmp_path / f"{n}.png", (1, 1))
    asked = Recipe("decompose", "atlas-clip", {"images": [str(tmp_path)]})
    old = session.run(asked, fresh=True, save=False)
    Image.new("RGB", (16, 16), "black").save(tmp_path / "2.png")
    new = session.run(asked, fresh=True, save=False)
    os.utime(tmp_path / "2.png", (2e9, 2e9))
    said = compare(old, new)["said"]
    assert f"  An input file has changed since the run: {tmp_path}/2.png." in said
    assert not any("are those of then" in s for s in said)
    os.utime(tmp_path / "2.png", (1, 1))
    said = "\n".join(compare(old, new)["said"])
    names = ", ".join(f"{tmp_path}/{n}.png" for n in range(3))
    assert f"One of its input files has changed: {names} and 1 more." in said
    (tmp_path / "2.png").unlink()
    gone = replace(asked, inputs={"images": [str(tmp_path / "2.png")]})
    first, second = replace(old, recipe=gone, key="a" * 64), replace(new, recipe=gone)
    assert f"has changed since the run: {tmp_path}/2.png." in "\n".join(compare(first, second)["said"])
    fewer = replace(gone, params={})
    assert "Options that the run did not have then: " in "\n".join(
        compare(replace(first, recipe=fewer), new)["said"]
    )
    weights = replace(first, model={**first.model, "fingerprint": "0"})
    assert "input file" not in "\n".join(compare(weights, second)["said"])


def test_other_weights_of_the_second_scorer_are_said(kept: tuple) -> None:
    _, run, _ = kept
    audit = Recipe("audit", "atlas-sd", {}, {"second_scorer": "mine"})
    trace = run.result.arrays["contribution"]
    other = {"contribution": replace(trace, values=trace.values + 0.5)}
    old = replace(run, recipe=audit, key="a" * 64, result=Result(other))
    said = compare(old, replace(run, recipe=audit))["said"]
    assert said[-1] == "  The second scorer's weights are not the same as then."
    said = compare(replace(old, key=""), replace(run, recipe=audit))["said"]
    assert said[-1] == "  Machine, versions and weights are those of then."

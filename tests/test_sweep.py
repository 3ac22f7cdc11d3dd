"""Sweeps: what the file may say, every run checked before the first, resume, tables, and the figure."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio import cli, commands, figures
from studio.errors import RequestError, StudioError
from studio.measure import nested_bootstrap
from studio.methods import locogen
from studio.registry import METHODS, find_method
from studio.store import Store, read_run
from studio.sweep import MOST_ALIKE, Progress, check_out, fault_of, run_sweep
from studio.sweep_file import Sweep, read_sweep, recipes
from studio.sweep_tables import combine, combined_table, draw, runs_table
from studio.types import Axis, Recipe, Result, Run, Trace
from tests.references.naive_sweep import mean_and_error

TREE = Path(__file__).resolve().parent.parent
PLAIN = """
method: generate
params: {steps: 2, prompt: a red star}
grid: {seeds: [[0], [1]], guidance: [1, 2, 3]}
"""
ROWS = (
    '{"prompt": "a red star", "replacement": "a circle"}\n\n{"prompt": "a cube", "replacement": "a heart"}\n'
)
WITH_ROWS = "method: localize\nparams: {steps: 2}\ngrid: {window: [1, 2]}\nrows: rows.jsonl\n"


@pytest.fixture(autouse=True)
def only_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here, so one of the formats is enough."""
    monkeypatch.setattr(figures, "FORMATS", ("svg",))


def write(folder: Path, text: str, rows: str = "") -> str:
    """A sweep file, and its rows beside it."""
    (folder / "sweep.yaml").write_text(text, "utf-8")
    if rows:
        (folder / "rows.jsonl").write_text(rows, "utf-8")
    return str(folder / "sweep.yaml")


def table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


class Fake:
    """A runner that makes up small runs: the score is the guidance; an error for every recipe in `broken`."""

    workers = 1

    def __init__(self, store: Store, broken: Sequence[float] = ()) -> None:
        self.store, self.broken, self.asked, self.located = store, broken, [], []

    def locate(self, name: str, kind: str) -> None:
        """Every model is there but one."""
        self.located.append((name, kind))
        if name == "absent":
            raise RequestError("There is no model 'absent'.")

    def run(self, recipe: Recipe) -> Run:
        """From the store, or made up."""
        self.asked.append(recipe)
        if recipe.params.get("guidance") in self.broken:
            raise StudioError("It broke.")
        key = recipe.key("f" * 64, "float32")
        score = np.full((1, len(recipe.seeds)), recipe.params.get("guidance") or 0, np.float32)
        axes = (Axis("prompt", ("p",)), Axis("seed", tuple(map(str, recipe.seeds))))
        result = Result({"scores": Trace(score, axes, "clip")}, {"steps": 2})
        run = Run(recipe, "done", "2026-01-01T00:00:00+00:00", 1.0, {}, result, key=key, model={})
        return self.store.find(key) or self.store.save(replace(run, started=now()))

    def close(self) -> None:
        """Nothing to end."""


def now() -> str:
    """The time, as runs write it, in the future, so that no run counts as found."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 60))


def asked(sweep: Sweep, session: Any) -> list[Recipe]:
    """The recipes of a sweep."""
    return recipes(sweep, session.checked, {"diffusion": "atlas-sd"})


# ---- the file ---------------------------------------------------------------------------------------------


def test_every_combination_becomes_a_run(session: Any, tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, PLAIN))
    made = asked(sweep, session)
    assert [(r.seeds, r.params["guidance"]) for r in made] == [
        ((s,), g) for s in (0, 1) for g in (1.0, 2.0, 3.0)
    ]
    assert {r.model for r in made} == {"atlas-sd"} and made[0].inputs["prompt"] == ["a red star"]
    assert [p.cell for p in sweep.points] == list(range(6)) and str(
        sweep.points[1]
    ) == "seeds=[0], guidance=2"


def test_rows_stand_within_each_combination(session: Any, tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, WITH_ROWS, ROWS))
    assert [(p.cell, p.line) for p in sweep.points] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    made = asked(sweep, session)
    assert [(r.params["window"], r.inputs["prompt"]) for r in made] == [
        (w, p) for w in (1, 2) for p in ("a red star", "a cube")
    ]
    assert read_sweep(write(tmp_path, WITH_ROWS, ROWS)).key == sweep.key
    assert read_sweep(write(tmp_path, WITH_ROWS.replace("2]", "3]"), ROWS)).key != sweep.key


def test_a_row_overrides_what_all_share_and_hyphens_are_underscores(session: Any, tmp_path: Path) -> None:
    text = "method: trace-unet\nparams: {prompt: a red star, subject-occurrence: 1}\nrows: rows.jsonl\n"
    rows = '{"subject": "red"}\n{"subject": "cube", "prompt": "a cube and a cube", "subject_occurrence": 2}\n'
    one, two = asked(read_sweep(write(tmp_path, text, rows)), session)
    assert (one.inputs["prompt"], one.inputs["subject_occurrence"]) == ("a red star", 1)
    assert (two.inputs["prompt"], two.inputs["subject_occurrence"]) == ("a cube and a cube", 2)


def test_one_file_of_prompts_serves_methods_with_different_inputs(session: Any, tmp_path: Path) -> None:
    rows = '{"prompt": "a red star", "replacement": "a cube", "counterfactual": "blue", "window": 2}\n'
    sweep = read_sweep(write(tmp_path, "method: localize\nrows: rows.jsonl\n", rows))
    assert sweep.unused == ("counterfactual",) and asked(sweep, session)[0].params["window"] == 2
    typo = read_sweep(
        write(tmp_path, "method: localize\nrows: rows.jsonl\n", rows.replace("window", "windw"))
    )
    with pytest.raises(RequestError, match="windw"):
        asked(typo, session)
    with pytest.raises(RequestError, match="counterfactual"):  # in `params` it is meant for this method
        text = "method: localize\nparams: {counterfactual: x}\nrows: rows.jsonl\n"
        asked(read_sweep(write(tmp_path, text, rows)), session)


def test_files_beside_the_sweep_are_found(session: Any, atlas: Any, tmp_path: Path) -> None:
    from tests.test_session import edit_file

    edit_file(atlas, tmp_path / "star.safetensors")
    (tmp_path / "mine").mkdir()
    text = "method: generate\nparams: {prompt: x}\ngrid: {edit: [star.safetensors, star.safetensors@0.5]}\n"
    one, two = asked(read_sweep(write(tmp_path, text)), session)
    assert one.edits == (f"{tmp_path}/star.safetensors",) and two.edits == (
        f"{tmp_path}/star.safetensors@0.5",
    )
    text = "method: generate\nparams: {prompt: x}\ngrid: {model: [mine, atlas-sd, nobody/nothing]}\n"
    models = [r.model for r in asked(read_sweep(write(tmp_path, text)), session)]
    assert models == [f"{tmp_path}/mine", "atlas-sd", "nobody/nothing"]


GENERATE = "method: generate\n"
X = GENERATE + "params: {prompt: x}\n"
FILES = {
    "empty": ("", "it is empty"),
    "no mapping": ("- a\n- b\n", "not made of `name: value` lines"),
    "not YAML": ("method: [generate\n", "is not YAML, line 2"),
    "not YAML, tabs": ("method: generate\n\tparams: {}\n", "is not YAML, line 2"),
    "a Python object": ("method: !!python/object/apply:os.getcwd []\n", "is not YAML, line 1"),
    "a key twice": ("method: generate\nmethod: localize\n", "'method' stands twice"),
    "a date": ("method: generate\nparams: {prompt: 2026-01-01}\n", "put quotes around it"),
    "a circle": ("method: generate\nparams: &a {prompt: *a}\n", "put quotes around it"),
    "unknown entry": ("method: generate\nparam: {}\n", "has an entry 'param'; known are method, params"),
    "no method": ("params: {}\n", "names no method"),
    "unknown method": ("method: localise\n", "did you mean 'localize'?"),
    "params as a list": ("method: generate\nparams: [a]\n", "`params` of"),
    "unknown param": (GENERATE + "params: {promt: x}\n", "has no option 'promt'; did you mean 'prompt'?"),
    "unknown in the grid": (X + "grid: {stepz: [1]}\n", "no option 'stepz'"),
    "grid of a single value": ("method: generate\ngrid: {steps: 3}\n", "steps needs a list of values"),
    "grid of nothing": ("method: generate\ngrid: {steps: []}\n", "steps needs a list of values"),
    "wrong value": (
        X + "grid: {steps: [1, 0]}\n",
        "steps=0: --steps must be from 1 to 1000, not 0.",
    ),
    "NaN": (X + "grid: {guidance: [.nan]}\n", "--guidance must be a number"),
    "text for a number": (GENERATE + "params: {prompt: x, steps: ten}\n", "--steps must be a whole number"),
    "number for a text": ("method: generate\nparams: {prompt: 3}\n", "--prompt must be a list of texts"),
    "missing prompt": ("method: generate\n", "the only run: --prompt is missing"),
    "wrong seeds": (X + "grid: {seeds: [[0], [-1]]}\n", "Seeds must be whole"),
    "the same twice": (X + "grid: {steps: [2, 2.0]}\n", "the same run twice"),
    "in both": ("method: generate\nparams: {steps: 2}\ngrid: {steps: [1]}\n", "in `params` and in `grid`"),
    "an option of the command": ("method: generate\nparams: {threads: 2}\n", "`locus sweep … --threads`"),
    "out": ("method: generate\nparams: {out: x}\n", "which no run of a sweep takes"),
    "both spellings": ("method: edit\nparams: {a-b: 1, a_b: 2}\n", "holds 'a_b' twice"),
    "model of a number": (GENERATE + "params: {prompt: x, model: 3}\n", "--model must be a text"),
    "edit of a number": (GENERATE + "params: {prompt: x, edit: 3}\n", "`edit` must be a file"),
    "no edit file": (GENERATE + "params: {prompt: x, edit: no.safetensors}\n", "There is no edit file"),
    "an unknown model": (GENERATE + "params: {prompt: x, model: atlas-sdd}\n", "did you mean 'atlas-sd'?"),
    "a model of another kind": (
        GENERATE + "params: {prompt: x, model: atlas-clip}\n",
        "a text-to-image model is needed",
    ),
    "a million": (
        f"{X}grid: {{steps: {list(range(1, 1001))}, seeds: {list(range(1000))}}}\n",
        "makes 1,000,000 runs, and at most 1,000 are allowed",
    ),
    "no rows file": ("method: localize\nrows: none.jsonl\n", "none.jsonl can't be read: No such file"),
    "rows as a list": ("method: localize\nrows: [a]\n", "must name a JSONL file"),
    "a folder of rows": ("method: localize\nrows: .\n", "can't be read: Is a directory"),
}  # fmt: skip
BAD_ROWS = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": \n', "Line 2 of"),
    "no object": ('{"prompt": "a"}\n\n["b"]\n', "Line 3 of"),
    "unknown": (
        '{"prompt": "a", "replacement": "b"}\n{"promt": "a"}\n',
        "line 2 of the rows: localize has no",
    ),
    "wrong": ('{"prompt": "a", "replacement": "a"}\n', "line 1 of the rows: --replacement is the prompt"),
    "varied": ('{"window": 3}\n', "Line 1 of"),
    "device": ('{"prompt": "a", "device": "cuda"}\n', "which is one for all runs"),
    "empty": ("\n\n", "holds no line"),
    "the same twice": (
        '{"prompt": "a", "replacement": "b"}\n' * 2,
        "line 1 of the rows, and window=1, line 2 of the rows",
    ),
}


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, session: Any, tmp_path: Path
) -> Callable:
    """`locus sweep` in this process: (exit status, standard output, lines of standard error). Its own session
    finds what is loaded already."""
    new = commands.new_session
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))

    def with_models(given: dict[str, Any]) -> Any:
        made = new({"device": "cpu", "threads": "1", **given})
        made._loaded.update(session._loaded)
        return made

    monkeypatch.setattr(commands, "new_session", with_models)

    def run(*argv: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = cli.main(["sweep", *argv])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


def refused(call: Callable, folder: Path, part: str, *argv: str) -> None:
    """Exit 2, one sentence, nothing written."""
    before = sorted(folder.iterdir())
    code, out, err = call(*argv, "--out", str(folder / "out"), "--runs", str(folder / "runs"))
    assert (code, out, len(err)) == (2, "", 1), (code, out, err)
    assert part in err[0] and sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("text", "part"), FILES.values(), ids=FILES.keys())
def test_wrong_files(call: Callable, tmp_path: Path, text: str, part: str) -> None:
    refused(call, tmp_path, part, write(tmp_path, text))


@pytest.mark.parametrize(("rows", "part"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_wrong_rows(call: Callable, tmp_path: Path, rows: str, part: str) -> None:
    refused(call, tmp_path, part, write(tmp_path, WITH_ROWS, rows))


OPTIONS = {
    "unknown engine": (("--engine", "slurm"), "--engine must be local or ray, not 'slurm'."),
    "address without Ray": (("--address", "x:1"), "--address belongs to --engine ray"),
    "workers without Ray": (("--workers", "2"), "--workers belongs to --engine ray"),
    "no workers": (("--engine", "ray", "--workers", "0"), "--workers must be a whole number from 1 to 256"),
    "no limit": (("--limit", "0"), "--limit must be a whole number from 1 to 100000"),
    "limit": (("--limit", "5"), "makes 6 runs, and at most 5 are allowed"),
    "unknown option": (("--engines", "ray"), "--engines"),
}


@pytest.mark.parametrize(("argv", "part"), OPTIONS.values(), ids=OPTIONS.keys())
def test_wrong_options(call: Callable, tmp_path: Path, argv: tuple[str, ...], part: str) -> None:
    refused(call, tmp_path, part, write(tmp_path, PLAIN), *argv)


def test_no_file_no_out_and_binary_files(call: Callable, tmp_path: Path) -> None:
    assert call()[2] == ["locus: Which sweep? `locus sweep FILE.yaml --out DIR`."]
    assert call("--out", "x")[0] == 2
    assert call(write(tmp_path, PLAIN))[2] == ["locus: Where to? `locus sweep FILE.yaml --out DIR`."]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    refused(call, tmp_path, "it is no text in UTF-8", str(tmp_path / "binary.yaml"))
    refused(call, tmp_path, "can't be read: No such file", str(tmp_path / "none.yaml"))


def test_seeds_of_what_does_not_sample(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "generate", replace(find_method("generate"), seeds=()))
    refused(call, tmp_path, "generate does not sample, so it takes no seeds.", write(tmp_path, PLAIN))


def test_a_large_file_is_refused(call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.sweep_file.MOST_BYTES", 10)
    refused(call, tmp_path, "split the sweep", write(tmp_path, PLAIN))


def test_limit_allows_more(tmp_path: Path) -> None:
    many = PLAIN.replace("[1, 2, 3]", str(list(range(600))))
    with pytest.raises(RequestError, match="makes 1,200 runs"):
        read_sweep(write(tmp_path, many))
    assert len(read_sweep(write(tmp_path, many), 1200).points) == 1200
    with pytest.raises(RequestError, match="--limit must be from 1 to 100000"):
        read_sweep(write(tmp_path, many), 100_001)


# ---- running ----------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Six runs."""
    return read_sweep(write(tmp_path, PLAIN))


def test_runs_tables_and_figure(
    session: Any, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("svg", "png", "pdf")
    monkeypatch.setattr(figures, "FORMATS", kinds)
    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    runner = Fake(store)
    told = run_sweep(
        sweep, asked(sweep, session), runner, store, out, lambda p: seen.append((p.done, p.total))
    )
    assert told["finished"] and (told["made"], told["found"], told["failed"]) == (6, 0, 0)
    assert fault_of(told) is None and seen == [(i, 6) for i in range(7)]
    assert runner.located == [("atlas-sd", "diffusion")]
    lines = table(out / "sweep.csv")
    assert [ln["guidance"] for ln in lines] == ["1", "2", "3"] * 2 and lines[4]["seeds"] == "[1]"
    assert [float(ln["scores: largest"]) for ln in lines] == [1, 2, 3] * 2
    assert [ln["run"] for ln in lines] == [store.find(r.key("f" * 64, "float32")).id for r in runner.asked]
    assert (out / "sweep.svg").read_text("utf-8").startswith("<?xml")
    assert sorted(f.name for f in out.iterdir()) == sorted(
        ["combined.csv", "sweep.csv", "sweep.json", *(f"sweep.{kind}" for kind in kinds)]
    )
    assert json.loads((out / "sweep.json").read_text("utf-8")) == told


def test_a_failed_run_is_noted_and_tried_again(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    told = run_sweep(sweep, asked(sweep, session), Fake(store, broken=(2.0,)), store, out)
    assert (told["made"], told["failed"], told["left"], told["finished"]) == (4, 2, 0, False)
    assert str(fault_of(told)) == (
        "2 of 6 runs failed; the first is seeds=[0], guidance=2: It broke. The same command tries them again."
    )
    lines = table(out / "sweep.csv")
    assert [ln["status"] for ln in lines] == ["done", "failed", "done"] * 2 and lines[1][
        "error"
    ] == "It broke."
    again = run_sweep(sweep, asked(sweep, session), Fake(store), store, out)
    assert again["finished"] and len(store.ids()) == 6


def test_a_bug_of_a_method_fails_its_run_only(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    class Buggy(Fake):
        def run(self, recipe: Recipe) -> Run:
            if recipe.params["guidance"] == 3:
                raise ZeroDivisionError("of\nours")
            return super().run(recipe)

    store = Store(tmp_path / "runs")
    told = run_sweep(sweep, asked(sweep, session), Buggy(store), store, tmp_path / "out")
    assert told["failed"] == 2 and told["faults"][0].endswith("failed with ZeroDivisionError: of ours")


def test_a_sweep_in_which_all_fails_stops(session: Any, tmp_path: Path) -> None:
    text = PLAIN.replace("[1, 2, 3]", str(list(range(1, 20))))
    sweep, store = read_sweep(write(tmp_path, text)), Store(tmp_path / "runs")
    runner = Fake(store, broken=tuple(range(3, 20)))
    told = run_sweep(sweep, asked(sweep, session), runner, store, tmp_path / "out")
    assert len(runner.asked) == 2 + MOST_ALIKE and told["left"] == 38 - len(runner.asked)
    assert f"{told['left']} were not tried" in str(fault_of(told))


def test_all_failed_leaves_tables_and_no_figure(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    run_sweep(sweep, asked(sweep, session), Fake(store, broken=(1.0, 2.0, 3.0)), store, out)
    assert len(table(out / "sweep.csv")) == 6 and not (out / "sweep.svg").exists()


def test_a_model_that_is_not_there_is_refused_before_anything(session: Any, tmp_path: Path) -> None:
    text = "method: generate\nparams: {prompt: x}\ngrid: {model: [atlas-sd, absent]}\n"
    sweep, store = read_sweep(write(tmp_path, text)), Store(tmp_path / "runs")
    runner = Fake(store)
    with pytest.raises(RequestError, match="no model 'absent'"):
        run_sweep(sweep, asked(sweep, session), runner, store, tmp_path / "out")
    assert not runner.asked and not (tmp_path / "out").exists()


def test_out_of_another_sweep(session: Any, sweep: Sweep, call: Callable, tmp_path: Path) -> None:
    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    run_sweep(sweep, asked(sweep, session), Fake(store), store, out)
    check_out(out, sweep)
    refused(call, tmp_path, "belongs to another sweep", write(tmp_path, PLAIN.replace("3]", "4]")))
    (out / "sweep.json").write_text("{}")
    with pytest.raises(RequestError, match="can't be read; give another --out"):
        check_out(out, sweep)


def test_out_that_is_taken(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    check_out(tmp_path / "mine", sweep)
    (tmp_path / "mine" / ".partial-1-sweep.json").touch()
    check_out(tmp_path / "mine", sweep)
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(RequestError, match="exists already"):
        check_out(tmp_path / "mine", sweep)
    with pytest.raises(RequestError, match="exists already"):
        check_out(tmp_path / "mine" / "thesis.txt", sweep)


def test_time_left_is_of_runs_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 130.0)
    assert Progress(10, found=4, started=100.0).seconds_left is None
    assert Progress(10, made=2, found=4, failed=1, started=100.0).seconds_left == 30.0


def test_ctrl_c_keeps_what_is_finished(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    class Stopped(Fake):
        def run(self, recipe: Recipe) -> Run:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().run(recipe)

    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, asked(sweep, session), Stopped(store), store, out)
    assert len(store.ids()) == 2 and [f.name for f in out.iterdir()] == ["sweep.json"]
    assert run_sweep(sweep, asked(sweep, session), Fake(store), store, out)["finished"]
    assert len(store.ids()) == 6


def test_several_at_a_time(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    class Three(Fake):
        workers = 3

        def run(self, recipe: Recipe) -> Run:
            time.sleep(0.02 * (4 - recipe.params["guidance"]))
            return super().run(recipe)

    store, out = Store(tmp_path / "runs"), tmp_path / "out"
    runner = Three(store, broken=(3.0,))
    told = run_sweep(sweep, asked(sweep, session), runner, store, out)
    assert (told["made"], told["failed"]) == (4, 2)
    lines = table(out / "sweep.csv")
    assert [ln["number"] for ln in lines] == list("123456") and lines[2]["status"] == "failed"
    assert [float(ln["scores: largest"]) for ln in lines if ln["run"]] == [1, 2, 1, 2]


def test_an_error_ends_the_other_workers(session: Any, sweep: Sweep, tmp_path: Path) -> None:
    class Closing(Fake):
        workers, closed = 2, 0

        def close(self) -> None:
            self.closed += 1

    runner = Closing(Store(tmp_path / "runs"))

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, asked(sweep, session), runner, runner.store, tmp_path / "out", stop)
    assert runner.closed


def test_the_command(call: Callable, atlas: Any, tmp_path: Path) -> None:
    text = "method: generate\nparams: {steps: 1}\ngrid: {prompt: [a red star, a cube], seeds: [[0], [1]]}\n"
    given = (write(tmp_path, text), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    code, out, err = call(*given)
    assert (code, err) == (0, [])
    assert out.splitlines() == ["4 runs made, 0 found in the store, 0 failed", str(tmp_path / "out")]
    first = {f.name: f.read_bytes() for f in (tmp_path / "out").glob("*.csv")}
    then = [read_run(tmp_path / "runs" / i).started for i in Store(tmp_path / "runs").ids()]
    time.sleep(1.1)  # starts are written in whole seconds
    code, out, err = call(*given, "--json")
    assert (code, err) == (0, []) and json.loads(out)["found"] == 4
    assert [read_run(tmp_path / "runs" / i).started for i in Store(tmp_path / "runs").ids()] == then
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").glob("*.csv")} == first


def test_a_failure_is_exit_1(call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "studio.runners.open_runner", lambda here, given, workers: Fake(here.store, broken=(2.0,))
    )
    code, out, err = call(
        write(tmp_path, PLAIN), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")
    )
    assert code == 1 and out.startswith("4 runs made") and "2 of 6 runs failed" in err[0] and len(err) == 1


def test_ctrl_c_says_that_it_goes_on(call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Stopped(Fake):
        def run(self, recipe: Recipe) -> Run:
            raise KeyboardInterrupt

    monkeypatch.setattr("studio.runners.open_runner", lambda here, given, workers: Stopped(here.store))
    given = (write(tmp_path, PLAIN), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    code, out, err = call(*given)
    assert (code, out) == (130, "")
    assert err == ["locus: Interrupted; finished runs are kept, the same command goes on from there."]


def test_the_bar_says_what_is_left(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.sweep_bar()(Progress(3)) is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = commands.sweep_bar()
    show(Progress(4))
    monkeypatch.setattr("studio.sweep.time.monotonic", lambda: 160.0)
    show(Progress(4, made=1, failed=1, started=100.0))
    show(Progress(4, made=3, failed=1, started=100.0))
    said = capsys.readouterr().err
    assert "2/4 runs" in said and "about 01:00 left, 1 failed" in said and "4/4 runs" in said


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_in_the_middle_repeats_and_loses_nothing(call: Callable, atlas: Any, tmp_path: Path) -> None:
    text = "method: generate\nparams: {prompt: a red star, steps: 40}\ngrid: {seeds: [[0], [1], [2], [3]]}\n"
    runs = tmp_path / "runs"
    given = (write(tmp_path, text), "--out", str(tmp_path / "out"), "--runs", str(runs), "--threads", "1")
    command = [sys.executable, "-m", "studio.cli", "sweep", *given, "--device", "cpu"]
    with subprocess.Popen(command, cwd=TREE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            deadline = time.monotonic() + 400
            while not Store(runs).ids() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    before = Store(runs).ids()
    assert 1 <= len(before) < 4 and not (tmp_path / "out" / "sweep.csv").exists()
    time.sleep(1.1)  # starts are written in whole seconds
    code, out, _ = call(*given)
    assert code == 0
    assert out.startswith(f"{4 - len(before)} runs made, {len(before)} found in the store, 0 failed")
    assert len(Store(runs).ids()) == 4 and set(before) < set(Store(runs).ids())
    assert not list(runs.glob(".partial-*"))
    assert {tuple(read_run(runs / i).recipe.seeds) for i in Store(runs).ids()} == {(0,), (1,), (2,), (3,)}


# ---- averages over rows -----------------------------------------------------------------------------------


def result(seed: int, seeds: int = 3, labels: str = "abcd", holes: bool = False) -> Result:
    """Random arrays with and without seeds."""
    draw_ = np.random.default_rng(seed)
    wide = Axis("layer", tuple(labels))
    values = draw_.normal(size=(seeds, len(labels))).astype(np.float32)
    if holes:
        values[0, 1] = np.nan
    return Result(
        {
            "restored": Trace(values, (Axis("seed", tuple(map(str, range(seeds)))), wide), "cosine"),
            "indirect_effect": Trace(values.mean(0), (wide,), "cosine"),
            "indirect_effect_sem": Trace(values.std(0), (wide,), "cosine"),
            "clean": Trace(values[:, 0], (Axis("seed", tuple(map(str, range(seeds)))),), "cosine"),
            "images": Trace(np.zeros((1, 2), np.uint8), (Axis("a", ("0",)), Axis("b", ("0", "1")))),
        },
        {"total": float(seed), "name": "x", "flag": True},
    )


TRACE = find_method("trace-unet")


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "with gaps"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_means_are_the_naive_ones(rows: int, holes: bool) -> None:
    results = [result(i, 2 + i % 2, holes=holes and i == 1) for i in range(rows)]
    found = combine(TRACE, results)
    assert list(found) == ["restored", "indirect_effect", "clean"]
    for name, (group,) in found.items():
        assert group.rows == rows
        for labels, (mean, sem) in mean_and_error([r.arrays[name] for r in results]).items():
            index = tuple(a.labels.index(x) for a, x in zip(group.mean.axes, labels, strict=True))
            np.testing.assert_allclose(group.mean.values[index], mean, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(group.sem[index], sem, rtol=1e-4, atol=1e-7)


def test_intervals_are_those_over_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result(i) for i in range(4)]
    low, high = nested_bootstrap([r.arrays["restored"].values for r in results])
    monkeypatch.setattr("studio.sweep_tables._AT_ONCE", 3)  # four cells, in two parts
    (group,) = combine(TRACE, results)["restored"]
    np.testing.assert_array_equal(group.low, low)
    np.testing.assert_array_equal(group.high, high)
    assert (group.low < group.mean.values).all() and (group.mean.values < group.high).all()
    two = combine(TRACE, results[:2])["restored"][0]
    assert np.isnan(two.low).all() and np.isfinite(two.sem).all()
    alone = combine(TRACE, results[:1])["restored"][0]  # three seeds of one row
    assert np.isfinite(alone.low).all() and np.isnan(alone.sem).all()
    assert np.isnan(combine(TRACE, results[:1])["indirect_effect"][0].low).all()


def test_other_labels_make_another_group() -> None:
    found = combine(TRACE, [result(0, labels="xy"), result(1), result(2)])["indirect_effect"]
    assert [(g.rows, g.mean.axes[0].labels) for g in found] == [(2, tuple("abcd")), (1, tuple("xy"))]
    values = np.mean([result(i).arrays["indirect_effect"].values for i in (1, 2)], axis=0)
    np.testing.assert_allclose(found[0].mean.values, values, rtol=1e-6)


def test_large_empty_and_picture_arrays_stay_in_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.sweep_tables.MOST_ENTRIES", 4)
    empty = Result({"scores": Trace(np.zeros((0, 2), np.float32), (Axis("t", ()), Axis("b", ("0", "1"))))})
    assert list(combine(TRACE, [result(0), empty])) == ["indirect_effect", "clean"]


def localized(seed: int, windows: int = 5) -> Result:
    """Arrays of a localize run."""
    draw_, seeds = np.random.default_rng(seed), Axis("seed", ("0", "1"))
    window = Axis("window", tuple(f"{i}-{i}" for i in range(windows)))
    clean, rest = draw_.normal(size=2).astype(np.float32), draw_.normal(size=(2, windows)).astype(np.float32)
    effect = (clean[:, None] - rest).mean(0)
    return Result(
        {
            "clean": Trace(clean, (seeds,), "cosine"),
            "replaced": Trace(rest, (seeds, window), "cosine"),
            "direct_effect": Trace(effect, (window,), "cosine"),
            "direct_effect_sem": Trace(effect, (window,), "cosine"),
            "all_layers": Trace(clean - 1, (seeds,), "cosine"),
        }
    )


def test_localize_is_combined_its_own_way() -> None:
    results = [localized(i) for i in range(3)]
    found, own = combine(find_method("localize"), results), locogen.combine(results)
    group = found["direct_effect"][0]
    np.testing.assert_array_equal(group.mean.values, own["direct_effect"].values)
    np.testing.assert_array_equal(group.low, own["direct_effect_low"].values)
    np.testing.assert_array_equal(group.sem, own["direct_effect_sem"].values)
    assert list(found)[:3] == ["direct_effect", "by_prompt", "share"] and "replaced" in found
    np.testing.assert_allclose(group.mean.values, found["share"][0].mean.values, rtol=1e-5)  # a total of 1


@pytest.mark.parametrize("other", [localized(9, windows=4), Result({"screen": localized(9).arrays["clean"]})])
def test_localize_of_unequal_windows_falls_back_to_groups(other: Result) -> None:
    found = combine(find_method("localize"), [localized(0), localized(1), other])
    assert "share" not in found and found["direct_effect"][0].rows == 2


def test_tables_can_be_read_back() -> None:
    told = [{"number": 1, "run": "r", "error": "", "prompt": "=1+1", "seeds": [0]}, {"number": 2, "run": ""}]
    lines = list(csv.DictReader(io.StringIO(runs_table([(told[0], result(3)), (told[1], None)]))))
    assert lines[0]["prompt"] == "'=1+1" and lines[0]["seeds"] == "[0]" and lines[0]["total"] == "3"
    best = int(np.argmax(result(3).arrays["indirect_effect"].values))
    assert lines[0]["indirect_effect: largest at"] == "abcd"[best]
    assert float(lines[0]["clean"]) == pytest.approx(result(3).arrays["clean"].values.mean(), rel=1e-5)
    assert lines[1]["total"] == "" and {"name", "flag", "images"}.isdisjoint(lines[0])
    found = combine(TRACE, [result(0), result(1, labels="xy")])
    lines = list(csv.DictReader(io.StringIO(combined_table([({"window": 2}, found)]))))
    mine = [ln for ln in lines if ln["array"] == "indirect_effect"]
    assert [(ln["group"], ln["place"]) for ln in mine] == [
        *(("1", f"layer={x}") for x in "abcd"),
        *(("2", f"layer={x}") for x in "xy"),
    ]
    assert mine[0]["window"] == "2" and float(mine[0]["mean"]) == pytest.approx(
        float(result(0).arrays["indirect_effect"].values[0]), rel=1e-6
    )
    assert mine[0]["unit"] == "cosine" and math.isnan(float(mine[0]["sem"]))


def picture(cells: Sequence[tuple[str, Sequence[Result]]]) -> Any:
    """The figure of combinations, which must also draw."""
    figure = draw("Trace", [(label, combine(TRACE, results)) for label, results in cells])
    assert figures.to_bytes(figure, "svg").startswith(b"<?xml")
    return figure


def test_one_combination_is_bars_with_errors() -> None:
    figure = picture([("", [result(i) for i in range(3)])])
    assert figure.kind == "bars" and figure.title == "Trace: indirect_effect" and "rows" in figure.caption
    (group,) = combine(TRACE, [result(i) for i in range(3)])["indirect_effect"]
    np.testing.assert_array_equal(figure.data["values"], group.mean.values)
    np.testing.assert_array_equal(figure.data["errors"], group.sem)


def test_several_combinations_are_a_map_and_other_labels_are_said() -> None:
    figure = picture([("window 1", [result(0)]), ("window 2", [result(1), result(2, labels="xy")])])
    assert figure.kind == "heat" and list(figure.data["rows"]) == ["window 1", "window 2"]
    assert figure.data["cols"] == list("abcd") and figure.data["col_title"] == "layer"
    assert "1 groups with other labels" in figure.caption


def test_scalars_are_bars_over_combinations_and_wide_arrays_are_cut() -> None:
    def scalar(value: float) -> Result:
        return Result({"probability": Trace(np.array(value, np.float32), (), "p")})

    figure = picture([("a 1", [scalar(0.1)]), ("a 2", [scalar(0.2), scalar(0.4)])])
    assert figure.kind == "bars" and figure.data["labels"] == ["a 1", "a 2"]
    np.testing.assert_allclose(figure.data["values"], [0.1, 0.3], rtol=1e-6)
    wide = np.arange(200, dtype=np.float32)
    axes = (Axis("component", tuple(map(str, range(200)))),)
    figure = picture([("", [Result({"attribution": Trace(wide, axes, "x")})])])
    assert figure.data["labels"] == [str(i) for i in range(140, 200)]


def test_three_axes_and_no_array_at_all() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    axes = (Axis("kind", ("u", "v")), Axis("layer", ("0", "1", "2")), Axis("token", tuple("abcd")))
    figure = picture([("", [Result({"indirect_effect": Trace(values, axes, "x")})])])
    assert figure.data["rows"][:4] == ["u · 0", "u · 1", "u · 2", "v · 0"]
    np.testing.assert_array_equal(figure.data["values"], values.reshape(6, 4))
    assert draw("Trace", [("", {})]) is None


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Fake]:
    """A runner whose runs hold images alone."""

    class Painter(Fake):
        def run(self, recipe: Recipe) -> Run:
            run = super().run(recipe)
            images = {f"seed{s}": np.full((8, 8, 3), 10 * s, np.uint8) for s in recipe.seeds}
            return self.store.save(replace(run, result=Result({}, {}, images)))

    yield Painter(Store(tmp_path / "runs"))


def test_images_are_a_grid(
    session: Any, sweep: Sweep, pictures: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    genuine = figures.to_bytes
    monkeypatch.setattr(figures, "to_bytes", lambda f, kind, note: drawn.append(f) or genuine(f, kind, note))
    run_sweep(sweep, asked(sweep, session), pictures, pictures.store, tmp_path / "out")
    assert drawn[0].kind == "strip" and drawn[0].data["rows"][1] == "seeds=[0], guidance=2"
    assert [len(row) for row in drawn[0].data["images"]] == [1] * 6

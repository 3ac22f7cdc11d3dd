"""The benchmark: rows of one form, bars that can fail, costs that are counted right on small sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import bench, diffusion_race, solver_race
from studio.bench import ENTRIES, Entry, chosen, run_bench
from studio.commands import bench as command
from studio.diffusion_race import (
    attribution,
    counted,
    help_time,
    locogen,
    quickest,
    row,
    screen_rows,
    small_model,
    solver,
    stated,
    text_trace,
    unet_trace,
)
from studio.errors import RequestError, StudioError
from tests import layouts

KEYS = ["name", "value", "unit", "bar", "holds", "how"]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    """A small random model; two threads stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield layouts.model("sd1")
    torch.set_num_threads(threads)


def hold_to_form(rows: list[dict[str, Any]]) -> None:
    """Every row has the contract's keys, a finite value, and says whether its bar is met."""
    for found in rows:
        assert list(found) == KEYS and found["how"] and found["name"] and found["unit"]
        assert np.isfinite(found["value"]) and found["value"] > 0 and isinstance(found["holds"], bool)
        assert found["bar"] > 0
        json.dumps(found, allow_nan=False)


# ---- rows and clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least", "holds"),
    [(9.99, True, False), (10.0, True, True), (10.01, False, False), (10.0, False, True)],
)
def test_a_bar_that_is_missed_says_so(value: float, least: bool, holds: bool) -> None:
    found = row("x", value, "times", 10.0, "counted", least=least)
    assert found["holds"] is holds and found["bar"] == 10
    assert found["how"] == f"at {'least' if least else 'most'} the bar; counted"
    hold_to_form([found])


def test_calls_are_timed_in_turn_and_the_best_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0])
    monkeypatch.setattr(diffusion_race.time, "perf_counter", lambda: next(clock))
    best = quickest({n: lambda n=n: order.append(n) for n in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and best == {"a": 1.0, "b": 2.0}


def test_rows_of_the_unet_are_counted_and_the_unet_is_left_as_it_was(tiny: Any) -> None:
    cond, _ = tiny.encode(["a star"])
    t = torch.tensor(1)
    with counted(tiny.unet) as rows, pytest.raises(KeyError):
        tiny.unet(torch.zeros(3, 4, 8, 8), t, cond.rows([0] * 3).states)
        tiny.unet(torch.zeros(1, 4, 8, 8), t, cond.states)
        raise KeyError("stopped")
    assert rows == [3, 1]
    with counted(tiny.unet) as rows:
        pass
    assert rows == [] and "forward" not in vars(tiny.unet)


# ---- measurements -----------------------------------------------------------------------------------------


def fixed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """Clocks that say these seconds; every call is made once, and its name kept."""
    made: list[str] = []

    def times(calls: dict[str, Any], rounds: int) -> dict[str, float]:
        for name, call in calls.items():
            call()
            made.append(name)
        return {n: seconds[n] for n in calls}

    monkeypatch.setattr(diffusion_race, "quickest", times)
    return made


def test_the_cost_of_locogen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, holds in ((1.04, True), (1.06, False)):
        made = fixed(monkeypatch, plain=1.0, exact=seconds)
        with counted(tiny.unet) as rows:
            (found,) = locogen(tiny, rows=4, steps=2)
        assert made == ["plain", "exact"] and found["value"] == seconds and found["holds"] is holds
        hold_to_form([found])
        images = int(found["how"].split("; ", 1)[1].split(" ")[0])
        texts = 5  # the prompt, its replacement, two paraphrases, the empty prompt: read once a search
        assert sum(rows) == 3 * images * 2 * 2 + 2 * texts  # counted, plain and exact: guided, of two steps


def test_the_cost_of_the_unet_trace_and_of_its_screen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(monkeypatch, plain=1.0, exact=1.2, screen=0.2)
    found = unet_trace(tiny, rows=4, steps=2, kinds=("cross-attention",))
    assert made == ["plain", "exact", "screen"]
    assert [f["value"] for f in found] == pytest.approx([1.2, 6.0])
    assert [f["holds"] for f in found] == [False, True]
    hold_to_form(found)
    fixed(monkeypatch, plain=1.0, exact=1.1, screen=0.25)
    found = unet_trace(tiny, rows=4, steps=2, kinds=("cross-attention",))
    assert [f["holds"] for f in found] == [True, False]


def test_rows_of_the_screen_are_those_of_the_whole_trace(tiny: Any) -> None:
    from studio.methods.causal_trace_unet import Params

    (found,) = screen_rows(tiny, rows=4, steps=6)
    with counted(tiny.unet) as exact:
        diffusion_race.traced(tiny, Params(steps=6, metric="distance", hint=False), 4)
    with counted(tiny.unet) as screen:
        diffusion_race.traced(tiny, Params(steps=6, metric="distance", hint=False, screen=True), 4)
    assert found["value"] == sum(exact) / sum(screen)
    assert found["holds"] is False  # so few steps: the screen takes as many
    hold_to_form([found])


def test_the_text_encoder_trace_draws_each_distinct_embedding_once(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.methods import causal_trace_text_encoder as method

    (found,) = text_trace(tiny)
    assert found["value"] == 1 and found["holds"] is True
    hold_to_form([found])
    said = found["how"].split("; ")[1]
    images, distinct, runs = (int(w) for w in said.split() if w.isdecimal())
    assert images == distinct < runs
    monkeypatch.setattr(method, "SAME", -1.0)  # nothing is the same: a method that draws every cell
    monkeypatch.setattr(diffusion_race, "distinct_embeddings", lambda *_: distinct)
    (found,) = text_trace(tiny)
    assert found["value"] > 1 and found["holds"] is False


def test_forwards_of_attribution_are_counted(tiny: Any) -> None:
    (found,) = attribution(tiny, steps=6)
    assert found["value"] == (6 * 5 + 2 * 6) / (2 * 6) and found["holds"] is False
    hold_to_form([found])


def test_the_race_of_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(solver_race.LAYOUTS, "sd1", (24, ((8, 2), (16, 3))))
    draw = torch.Generator("cpu").manual_seed(0)
    (found,) = solver("sd1", lambda *shape: torch.randn(shape, generator=draw), rounds=1)
    assert found["bar"] == 10 and found["holds"] is (found["value"] >= 10) and "5 matrices" in found["how"]
    hold_to_form([found])


def test_both_sides_of_the_solver_run_in_turn_and_the_best_of_each_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    monkeypatch.setitem(solver_race.LAYOUTS, "sd1", (4, ((2, 2), (3, 3))))
    monkeypatch.setattr(solver_race, "textbook", lambda w, *_: order.append("slow") or w)
    monkeypatch.setattr(solver_race, "deltas", lambda ws, *_: order.append("fast") or list(ws))
    clock = iter([0, 5, 0, 7, 0, 9, 0, 6, 0, 3, 0, 10])
    monkeypatch.setattr(solver_race.time, "perf_counter", lambda: next(clock))
    found = solver_race.race("sd1", lambda *shape: torch.ones(shape), repeats=2)
    assert order[:6] == ["fast", "slow", "slow"] * 2
    assert found["seconds"] == 5 and found["textbook_seconds"] == 3 * 2 + 9 * 3


def test_the_layouts_have_the_modules_that_they_stand_for(atlas: Any) -> None:
    made = small_model(atlas, "sd1")
    kinds = ("cross-attention", "self-attention", "resnet", "feed-forward")
    assert [len(made.unet_sites([k])) for k in kinds] == [16, 16, 22, 16]
    assert made.encoders["text"] is atlas.encoders["text"] and atlas.unet is not made.unet
    assert len(small_model(atlas, "least").unet_sites(["cross-attention"])) < 16


def test_help_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(diffusion_race.subprocess, "run", lambda argv, **_: asked.append(argv))
    (found,) = help_time(rounds=2)
    assert asked == [[sys.executable, "-m", "studio.cli", "--help"]] * 2
    assert found["holds"] is True and found["bar"] == 0.5 and " s of CPU" in found["how"]
    hold_to_form([found])


# ---- the command ------------------------------------------------------------------------------------------


def test_entries_have_names_of_their_own_and_are_chosen_by_them() -> None:
    names = [e.name for e in ENTRIES]
    assert len(set(names)) == len(names)
    assert {e.group for e in ENTRIES} == {"", "planted", "real-shapes"}
    always = [e for e in ENTRIES if not e.group]
    assert chosen((), ()) == always and len(always) >= 8
    assert {e.group for e in chosen(["planted"], ())} == {"", "planted"}
    groups = [e.group for e in chosen(["planted", "real-shapes"], ())]
    assert set(groups) == {"", "planted", "real-shapes"} and groups[0] == groups[3] == "real-shapes"
    assert [e.name for e in chosen(["real-shapes"], ["real-sd1", "help"])] == ["real-sd1", "help"]
    assert [e.name for e in chosen((), ["help"])] == ["help"]
    with pytest.raises(RequestError, match="There is no benchmark 'helpp'; known: help, "):
        chosen((), ["helpp"])


def test_every_entry_of_the_text_to_image_methods_runs(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry hands the right model to its measurement, on the session's threads."""
    given: dict[str, Any] = {}
    for name in ("locogen", "unet_trace", "screen_rows", "text_trace", "attribution", "solver"):
        monkeypatch.setattr(
            diffusion_race, name, lambda *a, name=name: given.setdefault(name, []).append(a) or []
        )
    monkeypatch.setattr(diffusion_race, "help_time", lambda: given.setdefault("help", []) or [])
    others = ("language-", "knockout-", "decompose-")  # tests/test_bench_races.py
    others += ("server-", "slow-", "forward-", "operations", "memory", "growth")  # test_bench_costs.py
    for entry in (e for e in chosen((), ()) if not e.name.startswith(others)):
        assert entry.run(session, None, print) == []
    assert set(given) >= {"locogen", "unet_trace", "screen_rows", "text_trace", "attribution", "help"}
    assert [a[0] for a in given["solver"]] == ["sd1", "sdxl"]
    assert given["solver"][0][1](2, 3).shape == (2, 3)
    assert len(given["screen_rows"][0][0].unet_sites(["cross-attention"])) == 16
    assert given["locogen"][0][0] is session.model("atlas-sd", "diffusion")


def test_a_record_is_written_whole_and_says_what_does_not_hold(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = [row("good", 2.0, "times", 1.0, "x"), row("bad", 0.5, "times", 1.0, "x")]
    rows.append({"name": "share", "value": None, "unit": "of none", "bar": None, "holds": None, "how": "x"})
    entry = Entry("both", "", lambda session, settings, say: rows)
    out = tmp_path / "b.json"
    said: list[str] = []
    record = run_bench(session, [entry], {}, out, said.append)
    assert said == ["both"] and json.loads(out.read_text()) == record
    assert list(record) == ["host", "results", "failed"] and record["failed"] == []
    assert [r["holds"] for r in record["results"]] == [True, False, None]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    monkeypatch.setattr(bench, "ENTRIES", (entry,))
    assert command(["--out", str(tmp_path / "c.json"), "--only", "both", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "bar 1: holds" in lines[0] and "bar 1: DOES NOT HOLD" in lines[1] and "none of none" in lines[2]


def test_an_entry_that_fails_is_named_and_the_others_go_on(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def halfway(*_: Any) -> Iterator[dict[str, Any]]:
        yield stated("before", 1.0, "s", "x")
        raise ZeroDivisionError("division\nby zero")

    def refused(*_: Any) -> list:
        raise StudioError("There is not enough memory; take a smaller size.")

    def last(*_: Any) -> list:
        written.append(json.loads(out.read_text()))  # what is there before the last entry is through
        return [stated("after", 2.0, "s", "x")]

    written: list[Any] = []
    out = tmp_path / "b.json"
    entries = (Entry("a", "", halfway), Entry("b", "", refused), Entry("c", "", last))
    monkeypatch.setattr(bench, "ENTRIES", entries)
    assert command(["--out", str(out), "--threads", "1"]) == 1
    record = json.loads(out.read_text())
    assert [r["name"] for r in record["results"]] == ["before", "after"]
    assert record["failed"] == [
        {"name": "a", "error": "ZeroDivisionError: division by zero"},
        {"name": "b", "error": "There is not enough memory; take a smaller size."},
    ]
    assert written == [{**record, "results": record["results"][:1]}]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "a" and "a failed: ZeroDivisionError: division by zero" in told


def test_an_interruption_ends_the_benchmark_and_keeps_what_is_measured(session: Any, tmp_path: Path) -> None:
    def stopped(*_: Any) -> list:
        raise KeyboardInterrupt

    out = tmp_path / "b.json"
    entries = [Entry("a", "", lambda *_: [stated("a", 1.0, "s", "x")]), Entry("b", "", stopped)]
    with pytest.raises(KeyboardInterrupt):
        run_bench(session, entries, {}, out, print)
    assert [r["name"] for r in json.loads(out.read_text())["results"]] == ["a"]


def test_cpu_seconds_are_left_out_in_half_precision_and_the_reason_is_said(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> list:
        pytest.fail("it ran")

    monkeypatch.setattr(session, "dtype", "bfloat16")
    record = run_bench(session, [Entry("slow", "", never, cpu=True)], {}, tmp_path / "b.json", print)
    (found,) = record["results"]
    assert list(found) == KEYS and found["value"] is None and record["failed"] == []
    assert found["how"] == "left out on cpu in bfloat16: its figure is one of float32"
    ours = {e.name for e in ENTRIES if not e.group and not e.cpu}
    ours -= {"help", "server-start"}
    assert ours == {"locogen-cost", "unet-trace-cost", "text-encoder-trace-images"}  # our own loop alone

"""Files of prompts in the panels, without a browser: what a line fills, what all lines run, and what stays
when the page is loaded again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panels import decompose, edit, localize, prompt_runs, retrieval, trace
from panels.edit_lines import EditLines
from panels.edit_stack import MOST, Entry, Stack
from panels.prompt_file import PromptFile
from panels.prompt_runs import LineRun, LineRuns
from studio.errors import Cancelled, RequestError, StudioError
from studio.jobs import Job
from studio.registry import find_method
from studio.sweep import MOST_ALIKE
from studio.sweep_file import Point
from studio.types import Recipe
from tests.test_runs_panel import page

PAGE = SimpleNamespace(session_hash="me", query_params={})


@pytest.fixture(scope="module")
def files(session: Any) -> Any:
    """The handlers of every panel's file, by panel."""
    found: dict[str, PromptFile] = {}
    wire = PromptFile.wire

    def wired(lines: PromptFile) -> Any:
        found[lines.panel.panel] = lines
        return wire(lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptFile, "wire", wired)
        for panel in (trace, localize, edit, decompose, retrieval):
            with page():
                panel.build(session)
    return found


def written(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return str(folder / name)


def defaults(lines: PromptFile) -> dict[str, Any]:
    """The panel's fields as they are at the start, by name."""
    return {n: c.value for c, n in lines.panel.named.items()}


def rows_of(lines: PromptFile, *rows: Any) -> list:
    return [[n, r] for n, r in enumerate(rows, 1)]


# ---- what a file fills ------------------------------------------------------------------------------------


def test_every_panel_with_a_prompt_takes_a_file(files: Any) -> None:
    assert set(files) == {"trace", "localize", "edit", "audit", "decompose", "retrieval"}


@pytest.mark.parametrize(
    ("panel", "view", "field", "said"),
    [
        ("decompose", "decompose", "texts", "2 lines. They are in “Texts”: press Run. Or run all lines"),
        ("decompose", "ablate-components", "texts-ablate-components", "2 lines. They are in “Texts”"),
        ("decompose", "rank-components", "features", "2 lines. They are in “Features”"),
        ("audit", None, "neighbours", "2 lines. They are in “Neighbours”: press Audit the stack."),
    ],
)
def test_a_text_file_fills_the_field_of_several(
    files: Any, tmp_path: Path, panel: str, view: str | None, field: str, said: str
) -> None:
    lines = files[panel]
    update = lines.load(written(tmp_path, "t.txt", "a star", "", "a moon"), view)
    assert update[lines.panel.form[field]] == "a star\na moon"
    assert update[lines.out["status"]].startswith(said)
    assert update[lines.out["rows"]] == [[1, {"prompt": "a star"}], [3, {"prompt": "a moon"}]]


def test_a_long_text_file_fills_the_field_and_cannot_run(files: Any, tmp_path: Path) -> None:
    lines = files["decompose"]
    long = written(tmp_path, "t.txt", *(f"text {i}" for i in range(1500)))
    update = lines.load(long, "text-span")
    field = next(c for c in lines.panel.named if str(update.get(c, "")).startswith("text 0\n"))
    assert update[field].count("\n") == 1499 and lines.panel.named[field] == "texts-text-span"
    assert update[lines.out["rows"]] == [] and update[lines.out["buttons"]]["visible"] is False
    assert update[lines.out["status"]] == "1,500 lines. They are in “Texts”: press Run."
    said = files["trace"].load(long, "trace-unet")[files["trace"].out["status"]]
    assert said == "The file has 1,500 lines and a panel takes 200; run it as a sweep."


def test_prompts_in_the_edit_panel(files: Any, tmp_path: Path) -> None:
    lines = files["edit"]
    out, panel = lines.out, lines.panel
    update = lines.load(written(tmp_path, "t.txt", *(f"a {i}" for i in range(30))))
    assert update[panel.out["neighbours"]].count("\n") == 23
    assert update[out["status"]].startswith("30 lines. The first 24 of them: They are in “Neighbours”")
    assert update[out["buttons"]]["visible"] is False  # prompts are no edits
    update = lines.pick("3", rows_of(lines, *({"prompt": f"a {i}"} for i in range(5))))
    assert update == {panel.out["prompt"]: "a 2", out["status"]: "In the fields: Prompt to look at."}
    edits = written(tmp_path, "e.csv", "concept,replacement,method", "star,moon,uce", "sketch,,")
    assert lines.load(edits)[out["buttons"]]["visible"] is True


def test_a_line_is_chosen_by_label_or_number(files: Any) -> None:
    lines = files["trace"]
    rows, form = rows_of(lines, {"prompt": "a star", "kinds": ["resnet"], "window": 3}), lines.panel.form
    for label in ("1", " 1 ", "1: a star · resnet · 3"):
        update = lines.pick(label, rows, "trace-unet")
        assert update[form["prompt"]] == "a star" and update[form["kinds-trace-unet"]] == ["resnet"]
        assert update[lines.out["status"]] == "In the fields: Prompt, Kinds, Window."
    assert lines.pick("star", rows, "trace-unet") == {
        lines.out["status"]: "Choose one of the lines of the file."
    }
    assert list(lines.pick(None, rows, "trace-unet")) == [lines.out["status"]]
    update = lines.pick("1", rows_of(lines, {"prompt": "a", "groups": "x"}), "trace-unet")
    assert update[lines.out["status"]] == "In the fields: Prompt. Not a field here: groups."
    concept = files["localize"].pick("1", rows_of(lines, {"prompt": "Veltrano"}), "attribute")
    assert concept[files["localize"].panel.form["concept"]] == "Veltrano"


def test_no_file_and_a_wrong_one(files: Any, tmp_path: Path) -> None:
    lines = files["trace"]
    assert lines.load(None, "trace-unet")[lines.out["status"]].startswith("Choose a file: .txt")
    said = lines.load(written(tmp_path, "b.jsonl", "{"), "trace-unet")[lines.out["status"]]
    assert said.startswith("Line 1 of b.jsonl is no JSON") and str(tmp_path) not in said


# ---- what all lines run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("panel", "given", "row", "says"),
    [
        ("trace", {}, {"promt": "a"}, "Line 1: 'promt' is no field here; take it out of the file."),
        ("trace", {}, {"prompt": "a star", "subject": "moon"}, "Line 1: --subject 'moon' is not in the text"),
        ("trace", {}, {"words": ["a"]}, "Line 1: Causal trace of the UNet has no field 'words'"),
        ("trace", {}, {"prompt": "a", "window": "x"}, "Line 1: "),
        ("decompose", {}, {"texts": ["a"], "clip": "../x"}, None),
        ("decompose", {}, {"groups": "x"}, "Line 1: Decompose has no field 'groups'; choose another method."),
        (
            "decompose",
            {},
            {"method": "ablate-components", "groups": "/etc/passwd"},
            "Line 1: 'groups' is no field here; take it out of the file.",
        ),
        (
            "edit",
            {},
            {"prompt": "a star"},
            "Line 1: An edit needs a concept; give the file a column “concept”.",
        ),
    ],
)
def test_a_line_that_is_wrong(files: Any, panel: str, given: dict, row: dict, says: str | None) -> None:
    lines = files[panel]
    if says is None:  # a field like any other; the run itself says what is wrong
        assert lines.points(defaults(lines), rows_of(lines, row))
        return
    with pytest.raises(RequestError) as error:
        lines.points({**defaults(lines), **given}, rows_of(lines, row))
    assert str(error.value).startswith(says)


def test_without_lines_there_is_nothing_to_run(files: Any) -> None:
    with pytest.raises(RequestError, match="Choose a file"):
        files["edit"].points(defaults(files["edit"]), [])


def test_the_lines_are_recipes(files: Any) -> None:
    """Fields fill what a line leaves out; an edit without a replacement erases; texts and concepts are what
    a line of text is."""
    lines = files["edit"]
    rows = rows_of(lines, {"concept": "star", "replacement": "moon", "method": "uce"}, {"concept": "sketch"})
    first, second = (r for _, r in lines.points(defaults(lines), rows))
    assert (first.inputs["concept"], first.inputs["replacement"]) == (["star"], ["moon"])
    assert first.params["method"] == "uce" and second.params["method"] == "locoedit"
    assert (second.inputs["concept"], second.inputs["replacement"]) == (["sketch"], [""])
    lines = files["decompose"]
    rows = rows_of(lines, {"texts": ["a", "b"]}, {"prompt": "a star"}, {"method": "text-span", "length": 2})
    found = [r for _, r in lines.points(defaults(lines), rows)]
    assert [r.method for r in found] == ["decompose", "decompose", "text-span"]
    assert found[0].inputs["texts"] == ["a", "b"] and found[1].inputs["texts"] == ["a star"]
    lines = files["localize"]
    rows = rows_of(lines, {"prompt": "Veltrano"})
    (point, recipe), *_ = lines.points({**defaults(lines), "method": "attribute"}, rows)
    assert recipe.inputs["concept"] == "Veltrano" and point.line == 1


class Sessions:
    """A session whose runs end when they are told to; `fails`: what the run of a prompt ends with."""

    def __init__(self, **fails: Exception) -> None:
        self.fails, self.jobs, self.go, self.forgotten = fails, [], threading.Event(), []
        self.queue = SimpleNamespace(forget=self.forgotten.append, position=lambda job: 0)

    def submit(self, recipe: Recipe, user: str) -> Job:
        fault = self.fails.get(recipe.inputs["prompt"])
        if isinstance(fault, RequestError):
            raise fault
        job = Job(len(self.jobs), user, recipe)
        job.withdraw = lambda job: True  # stopped at once
        self.jobs.append(job)
        if self.go.is_set() or fault:
            job.finish("failed" if fault else "done", run=SimpleNamespace(id=f"r{job.id}"), error=fault)
        return job


def run_of(session: Any, *prompts: str) -> LineRun:
    points = [
        (Point(0, {}, n, {"prompt": p}, {}), Recipe("generate", "m", {"prompt": p}, {}, (0,), ()))
        for n, p in enumerate(prompts, 1)
    ]
    return LineRun(session, points, "me", {"rows": [], "given": {}})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What the tables were made of."""
    made: list = []
    monkeypatch.setattr(prompt_runs, "_tables", lambda m, store: made.extend(m) or {})
    monkeypatch.setattr(Sessions, "store", None, raising=False)
    yield made


def test_the_lines_run_in_turn_and_a_fault_is_noted(tables: list) -> None:
    session = Sessions(bad=StudioError("The disk is full."), wrong=RequestError("No."))
    session.go.set()
    run = run_of(session, "a", "bad", "wrong", "b")
    run.work()
    assert run.over and [p.line for p, _, _ in run.made] == [1, 4] and run.left == 2
    assert run.failed == ["Line 2: The disk is full.", "Line 3: No."]
    assert [p.line for p, _, _ in tables] == [1, 4] and session.forgotten == session.jobs


def test_lines_that_fail_alike_end_it(tables: list) -> None:
    session = Sessions(a=StudioError("The disk is full."))
    run = run_of(session, *["a"] * 12)
    run.work()
    assert len(run.failed) == MOST_ALIKE and run.left == 12 and tables == []


def test_stop_keeps_what_ran(tables: list) -> None:
    session = Sessions()
    session.go.set()
    run = run_of(session, "a", "b", "c")
    submit = session.submit

    def slow(recipe: Recipe, user: str) -> Job:
        if recipe.inputs["prompt"] == "b":
            session.go.clear()
        return submit(recipe, user)

    session.submit = slow
    runs = LineRuns()
    assert runs.find({"token": run.token}) is None
    runs.start(run)
    assert runs.find({"token": run.token}) is run and runs.find({"token": "x"}) is None is runs.find("x")
    while len(session.jobs) < 2:
        threading.Event().wait(0.01)
    assert run.said().startswith("Line 2 of 3. ")
    run.cancel()
    assert run.said() == "Stopping …" and run.ended.wait(10)
    assert [p.line for p, _, _ in run.made] == [1] and run.left == 2 and run.failed == []
    assert isinstance(session.jobs[1].error, Cancelled)


def test_how_far_the_lines_are() -> None:
    run = run_of(Sessions(), "a", "b", "c", "d")
    assert run.said() == "Line 1 of 4. Starting …"
    run.number, run.begun, run.line_begun = 3, 100.0, 120.0  # two lines took 20 s
    run.job = Job(1, "me", run.points[2][1], state="running", what="tracing")
    assert run.said() == "Line 3 of 4. Tracing. About 10 s left in all."
    run.number = 4
    assert run.said() == "Line 4 of 4. Tracing."
    run.number = 5
    assert run.said() == "All lines ran; the tables are being written …"


def test_only_so_many_files_run_at_once(tables: list) -> None:
    runs, session = LineRuns(), Sessions()
    started = [runs.start(run_of(session, "a")) for _ in range(prompt_runs.MOST_AT_ONCE)]
    with pytest.raises(RequestError, match="The lines of 8 files run already; try again when one of them is"):
        runs.start(run_of(session, "a"))
    for run in started:
        run.cancel()
        assert run.ended.wait(10)
    session.go.set()
    later = [runs.start(run_of(session, "a")) for _ in range(1)]
    assert later[0].ended.wait(10) and runs.find({"token": started[0].token}) is started[0]


def test_tables_that_cannot_be_written_are_said(monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    session = Sessions()
    session.go.set()
    monkeypatch.setattr(Sessions, "store", None, raising=False)
    monkeypatch.setattr(prompt_runs, "_tables", lambda *a: (_ for _ in ()).throw(StudioError("Disk full.")))
    run = run_of(session, "a")
    run.work()
    assert run.fault == "The tables could not be written: Disk full." and run.over
    said = files["trace"].finished(run)[files["trace"].out["status"]]
    assert (
        said == "1 of 1 lines ran; the runs are kept, see Runs. The tables could not be written: Disk full."
    )


# ---- the page is loaded again -----------------------------------------------------------------------------


def test_a_page_that_is_loaded_again_takes_the_lines_up(files: Any, tables: list) -> None:
    lines, session = files["trace"], Sessions()
    out = lines.out
    run = run_of(session, "a", "b")
    run.page.update(rows=[[1, {"prompt": "a"}], [2, {"prompt": "b"}]], given={"prompt": "mine", "steps": 3})
    lines.runs.start(run)
    kept = {"token": run.token}
    assert lines.awaited(None, PAGE) is None and lines.awaited({"token": "other"}, PAGE) is None
    link = SimpleNamespace(session_hash="me", query_params={"tab": "trace", "prompt": "linked"})
    assert lines.awaited(kept, link) == {"fields": False}
    shown = lines.restored(lines.awaited(kept, PAGE), kept)
    assert shown[out["fold"]]["open"] is True and shown[out["buttons"]]["visible"] is True
    assert [label[:2] for label in shown[out["line"]]["choices"]] == ["1:", "2:"]
    said = "The lines of a file were taken up again, see “Prompts from a file”."
    assert shown[lines.panel.out["status"]] == said and shown[out["all"]].interactive is False
    assert shown[lines.panel.form["prompt"]] == "mine" and shown[lines.panel.form["steps"]] == 3
    followed = lines.again(kept, PAGE)
    assert next(followed)[out["stop"]].interactive is True
    assert lines.stop(kept) == "Stopping …"
    last = list(followed)[-1]
    assert last[out["status"]] == (
        "0 of 2 lines ran. Run all lines goes on with the others; what is kept is found at once."
    )
    assert lines.stop(kept) == lines.stop(None) == "Nothing is running."
    assert lines.awaited(kept, PAGE) == {"fields": True}
    assert lines.restored({"fields": True}, kept)[out["status"]] == last[out["status"]]
    assert [*lines.again(kept, PAGE)] == [lines.restored({"fields": True}, None)]


def test_lines_that_run_are_not_started_twice(files: Any, tables: list) -> None:
    lines = files["trace"]
    run = lines.runs.start(run_of(Sessions(), "a"))
    values = {lines.client: {"token": run.token}, lines.out["rows"]: [[1, {"prompt": "a red star"}]]}
    (only,) = lines.run_all(values, PAGE)
    assert only == {lines.out["status"]: "The lines run already; press Stop first, or wait for their end."}
    run.cancel()
    assert run.ended.wait(10)


# ---- edits on the stack -----------------------------------------------------------------------------------


def test_edits_of_a_file_go_on_the_stack_switched_off(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = files["edit"]
    made = [Entry(str(n), f"edit {n}", on=False) for n in range(4)]
    monkeypatch.setattr(EditLines, "entries", lambda self, run: made)
    stack, said = lines.added(run_of(Sessions()), Stack((Entry("1", "mine"),)))
    assert [(e.edit, e.on) for e in stack.entries] == [("1", True), ("0", False), ("2", False), ("3", False)]
    assert (
        said == "3 edits of the file on the stack, switched off; tick one to see it."
        and stack.undo().entries[0].edit == "1"
    )
    full = Stack(tuple(Entry(f"e{n}", "") for n in range(MOST - 1)))
    stack, said = lines.added(run_of(Sessions()), full)
    assert len(stack.entries) == MOST
    assert said == (
        "1 edit of the file on the stack, switched off; tick one to see it. 3 more are in Runs; "
        "a stack holds at most 24."
    )


def test_edits_of_a_file_are_made(files: Any, session: Any, atlas: Any) -> None:
    """Two lines make two edits; both are kept, stand in the table, and go on the stack once."""
    lines = files["edit"]
    rows = [[2, {"concept": "star", "replacement": "moon", "method": "uce"}], [3, {"concept": "sketch"}]]
    values = {c: c.value for c in lines.panel.named}
    values[lines.panel.form["method"]] = "uce"
    *_, last = lines.run_all({**values, lines.out["rows"]: rows}, PAGE)
    assert last[lines.out["status"]] == "2 of 2 lines ran; the runs are kept, see Runs."
    text = Path(last[lines.out["csv"]]["value"]).read_text()
    assert "moon" in text and "sketch" in text and find_method("edit")
    (run,) = [r for r in lines.runs._known.values() if r.made]
    looks = ("atlas-sd", "a star", "0", {})
    shown = lines.onto_stack({"token": run.token}, Stack(), *looks)
    stack = shown[lines.panel.stack]
    assert [(e.title, e.on) for e in stack.entries] == [
        ("star → moon (uce)", False),
        ("sketch → nothing (uce)", False),
    ]
    assert (
        shown[lines.panel.out["status"]]
        == "2 edits of the file on the stack, switched off; tick one to see it."
    )
    assert lines.onto_stack({"token": run.token}, stack, *looks) == {lines.panel.stack: stack}

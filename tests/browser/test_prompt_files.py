"""Files of prompts, texts and edits in a real browser."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from studio.session import Session
from studio.types import Recipe
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser


def written(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return folder / name


def choose(page: Any, panel: str, file: Path, opener: str = "") -> None:
    """Gives a panel a file; `opener`: the name of the accordion that is to be opened first."""
    if opener:
        page.get_by_role("button", name=opener).locator("visible=true").click()
    page.locator(f"#{panel}-prompts-file input[type=file]").set_input_files(file)


def said(page: Any, panel: str, part: str) -> str:
    """Waits until the line below a panel's file holds this text; the line."""
    line = page.locator(f"#{panel}-prompts-status textarea")
    try:
        page.wait_for_function(
            "([p, t]) => document.querySelector(`#${p}-prompts-status textarea`)?.value.includes(t)",
            arg=[panel, part],
        )
    except Exception as error:
        raise AssertionError(f"{part!r} did not come; the line says {line.input_value()!r}") from error
    return line.input_value()


def field(page: Any, elem_id: str) -> Any:
    return page.locator(f"#{elem_id} textarea, #{elem_id} input").first


def holds(page: Any, elem_id: str, value: str) -> None:
    """Waits until a field holds a text."""
    page.wait_for_function(
        "([e, v]) => document.querySelector(`#${e} textarea, #${e} input`).value === v", arg=[elem_id, value]
    )


def tab(page: Any, name: str) -> None:
    page.locator("#panels > .tab-wrapper [role=tab]").filter(has_text=name).first.click()


def test_lines_go_on_over_a_reload(visit: Visit, session: Session, tmp_path: Path) -> None:
    """A line is chosen by its number; all lines go on while the page is loaded again, with the fields as they
    were. A job in front of them waits for the test."""
    page, gate = visit.page, threading.Event()
    lines = [json.dumps({"prompt": f"a {colour} star", "steps": 2}) for colour in ("red", "blue")]
    choose(page, "trace", written(tmp_path, "p.jsonl", *lines), "Prompts from a file")
    said(page, "trace", "2 lines. Put one into the fields, or run all of them.")
    chooser = page.locator("#trace-prompts-line input")
    chooser.click()
    page.evaluate(
        "() => { const e = document.querySelector('#trace-prompts-line input'); e.value = '2';"
        " e.dispatchEvent(new Event('input', {bubbles: true})) }"
    )  # as a paste does, without a key
    chooser.press("Tab")
    holds(page, "trace-prompt", "a blue star")
    field(page, "trace-subject").fill("star")
    field(page, "trace-seeds").fill("7")
    session.queue.submit(
        Recipe("", "atlas-sd"), "another", call=lambda model: gate.wait(150), kind="diffusion"
    )
    try:
        page.click("#trace-prompts-run")
        said(page, "trace", "Line 1 of 2. Waiting: 1 job before yours.")
        page.reload()
        visit.said.clear()  # leaving a page breaks off Gradio's own stream, which says so
        said(page, "trace", "Line 1 of 2. Waiting: 1 job before yours.")
        holds(page, "trace-seeds", "7")
        holds(page, "trace-prompt", "a blue star")
        visit.status("The lines of a file were taken up again, see “Prompts from a file”.")
    finally:
        gate.set()
    said(page, "trace", "2 of 2 lines ran; the runs are kept, see Runs.")
    page.wait_for_selector("#trace-prompts-csv")


def test_edits_from_a_file_lie_on_the_stack_switched_off(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    tab(page, "Edit")
    choose(page, "edit", written(tmp_path, "p.txt", "a ${1} star", "a moon"), "Prompts or edits from a file")
    said(page, "edit", "2 lines. They are in “Neighbours”: press Grid over neighbours.")
    assert field(page, "edit-neighbours").input_value() == "a ${1} star\na moon"
    page.locator("#edit-prompts-file").get_by_role("button").first.click()
    said(page, "edit", "Choose a file.")
    rows = ["concept,replacement,method", "star,moon,uce", "sketch,,uce"]
    choose(page, "edit", written(tmp_path, "e.csv", *rows))
    said(page, "edit", "2 lines. Put one into the fields, or run all of them.")
    page.click("#edit-prompts-run")
    said(page, "edit", "2 of 2 lines ran; the runs are kept, see Runs.")
    visit.status("2 edits of the file on the stack, switched off; tick one to see it.", "edit")
    shown = page.locator("#edit-stack input[type=checkbox]")
    assert shown.count() == 2 and not shown.first.is_checked() and not shown.last.is_checked()
    assert "sketch → nothing (uce)" in page.locator("#edit-stack").inner_text()


def test_texts_from_a_file(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    tab(page, "Decompose")
    choose(page, "decompose", written(tmp_path, "t.txt", "a star", "", "a moon"), "Texts from a file")
    said(page, "decompose", "2 lines. They are in “Texts”: press Run. Or run all lines, each by itself.")
    holds(page, "decompose-texts", "a star\na moon")
    page.locator("#decompose-prompts-file").get_by_role("button").first.click()
    said(page, "decompose", "Choose a file.")
    rows = [json.dumps({"texts": t}) for t in (["a star", "a heart"], ["red"])]
    choose(page, "decompose", written(tmp_path, "t.jsonl", *rows))
    said(page, "decompose", "2 lines. Put one into the fields")
    page.click("#decompose-prompts-run")
    said(page, "decompose", "2 of 2 lines ran")
    page.wait_for_selector("#decompose-prompts-csv")

"""The Trace panel in a real browser: run, click, keyboard, stop, reload, errors, export, dark and narrow."""

from __future__ import annotations

import json
import statistics
import time
import zipfile
from typing import Any

import pytest

from studio.session import Session
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser


def fill(page: Any, name: str, text: str) -> None:
    page.locator(f"#trace-{name} textarea, #trace-{name} input").first.fill(text)


def quick(page: Any, steps: str = "4") -> None:
    """Few steps, so that a run takes a second."""
    page.get_by_role("button", name="Sampling and scoring").click()
    fill(page, "steps", steps)


def ran(visit: Visit, steps: str = "4") -> Any:
    """The page after one finished run, its map drawn (status and map are two components: either may come
    first)."""
    quick(visit.page, steps)
    visit.page.click("#trace-run")
    visit.status("Done")
    visit.cells()
    return visit.page


def test_one_whole_path(visit: Visit, tmp_path: Any) -> None:
    page = ran(visit)
    assert page.locator("#trace-figure .cell").count() == 10
    page.wait_for_selector("#trace-figure .cell:not(.waiting)")
    page.click('#trace-figure .cell[data-row="0"][data-col="4"]')
    page.wait_for_selector("#trace-restored img")
    text = page.locator("#trace-detail-text textarea").input_value()
    assert text.startswith(
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2 (cross-attention): indirect effect"
    )
    assert all(page.locator(f"#trace-{n} img").count() for n in ("clean", "corrupted", "restored", "slider"))
    page.wait_for_selector("#trace-word_map img")
    assert "“red star” in this layer" in page.locator("#trace-word_map").inner_text()
    for kind, start in (
        ("svg", b"<?xml"),
        ("png", b"\x89PNG"),
        ("pdf", b"%PDF"),
        ("csv", b"array,"),
        ("zip", b"PK"),
    ):
        with page.expect_download() as waiting:
            page.click(f"#trace-export-{kind}")
        saved = tmp_path / f"file.{kind}"
        waiting.value.save_as(saved)
        assert saved.read_bytes().startswith(start)
    with zipfile.ZipFile(tmp_path / "file.zip") as whole:
        record = json.loads(next(whole.read(n) for n in whole.namelist() if n.endswith("run.json")))
    assert record["recipe"]["method"] == "trace-unet" and record["status"] == "done"


CLICK = """async column => {
    const text = () => document.querySelector('#trace-detail-text textarea')?.value ?? ''
    const before = text(), began = performance.now()
    document.querySelector(`#trace-figure .cell[data-row="0"][data-col="${column}"]`)
        .dispatchEvent(new MouseEvent('click', {bubbles: true}))
    while (text() === before && performance.now() - began < 60000) await new Promise(requestAnimationFrame)
    return performance.now() - began
}"""


def test_a_click_is_answered_at_once(visit: Visit) -> None:
    """The median is printed; 300 ms are asked for on two quiet cores. The first click is not counted: it
    loads what draws the images."""
    page = ran(visit)
    page.wait_for_selector("#trace-figure .cell:not(.waiting)")
    took = [page.evaluate(CLICK, column) for column in range(10)][1:]
    print(f"a click on a cell is answered after {statistics.median(took):.0f} ms (median of {len(took)})")
    assert statistics.median(took) < 3000


def test_the_table_holds_the_same_numbers(visit: Visit) -> None:
    page = ran(visit)
    page.get_by_role("tab", name="Table").click()
    page.wait_for_function("document.querySelector('#trace-table textarea')?.value.includes('up_blocks.2')")


def test_keyboard_moves_and_picks(visit: Visit) -> None:
    page = ran(visit)
    page.locator("#trace-figure .map").focus()
    page.keyboard.press("End")
    page.wait_for_function(
        "document.querySelector('#trace-figure .said').textContent.startsWith('up_blocks.2')"
    )
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelector('#trace-detail-text textarea').value.includes('up_blocks.2.attentions.0')"
    )


def test_stop_ends_within_a_step_and_keeps_what_was_measured(visit: Visit, session: Session) -> None:
    page = visit.page
    quick(page, "40")
    fill(page, "seeds", "11,12,13")
    page.click("#trace-run")
    visit.cells()
    page.click("#trace-stop")
    asked = time.monotonic()
    visit.status("Stopped")
    assert time.monotonic() - asked < 10 and session.queue.running is None
    page.click("#trace-figure .cell")
    page.wait_for_function(
        "document.querySelector('#trace-detail-text textarea').value.startsWith('down_blocks.0')"
    )


def test_a_reload_takes_the_running_job_up_again(visit: Visit) -> None:
    page = visit.page
    quick(page, "20")
    fill(page, "seeds", "21,22")
    page.click("#trace-run")
    page.wait_for_selector("#trace-figure .cell")
    page.reload()
    visit.said.clear()  # leaving a page breaks off Gradio's own stream, which says so
    visit.status("Done")
    assert page.locator("#trace-figure .cell").count() == 10


def test_one_persons_stop_is_not_anothers(visit: Visit, chromium: Any, studio: str) -> None:
    other = Visit(chromium, studio)
    other.open()
    quick(visit.page, "20")
    fill(visit.page, "seeds", "31,32")
    visit.page.click("#trace-run")
    visit.page.wait_for_selector("#trace-figure .cell")
    quick(other.page, "5")
    other.page.click("#trace-run")
    other.page.wait_for_selector("#trace-stop:not([disabled])")
    other.page.click("#trace-stop")
    other.status("Stopped")
    visit.status("Done")
    other.close()


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("prompt", "", "“Prompt” is missing"),
        ("subject", "blue moon", "“Subject” 'blue moon' is not in the text"),
        ("seeds", "one", "Seeds must be whole numbers"),
        ("seeds", "", "No seeds are given"),
    ],
)
def test_bad_input_gets_a_sentence_and_keeps_the_rest(visit: Visit, field: str, text: str, says: str) -> None:
    fill(visit.page, field, text)
    visit.page.click("#trace-run")
    visit.status(says)
    assert visit.page.locator("#trace-prompt textarea, #trace-prompt input").first.input_value() in (
        "a red star on a white background",
        "",
    )


@pytest.mark.parametrize("text", ["${alert(1)} star", "<img src=x onerror=alert(1)> star", "star 🦊 שלום"])
def test_a_prompt_is_data_and_never_script(visit: Visit, text: str) -> None:
    page = visit.page
    page.on("dialog", lambda d: visit.said.append(f"dialog: {d.message}"))
    fill(page, "prompt", text)
    fill(page, "subject", "star")
    fill(page, "seeds", "0")  # a prompt of many tokens is many images
    quick(page, "1")
    page.get_by_role("radio", name="Text encoder").check()
    page.click("#trace-run")
    visit.status("Done")
    page.click("#trace-figure .cell")


def test_a_stored_run_is_drawn_at_once_every_time(visit: Visit) -> None:
    page = ran(visit, "3")
    for _ in range(6):  # hint and map reach the page together, and the map must be what stays
        page.click("#trace-run")
        visit.status("Done")
        visit.cells()


def test_text_encoder_and_lens(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("radio", name="Text encoder").check()
    page.wait_for_selector("#trace-kinds-trace-text-encoder")
    page.wait_for_selector("#trace-kinds", state="hidden")
    quick(page, "2")
    page.click("#trace-run")
    visit.status("Done")
    page.click('#trace-figure .cell[data-row="0"][data-col="3"]')
    page.wait_for_selector("#trace-restored img")
    page.get_by_role("radio", name="Layer by layer").check()
    page.click("#trace-run")
    page.wait_for_selector("#trace-strip img")
    visit.status("Done")


def test_dark_and_narrow(chromium: Any, studio: str) -> None:
    opened = Visit(chromium, studio, width=400, height=800, dark=True)
    page = opened.open()
    ran(opened)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert "dark" in page.evaluate("document.body.className")
    opened.close()


def test_shortcuts(visit: Visit) -> None:
    quick(visit.page, "3")
    visit.page.keyboard.press("Control+Enter")
    visit.status("Done")


def test_page_and_first_cells_come_quickly(chromium: Any, studio: str) -> None:
    """Generous bounds for a busy machine; the measured times are printed (3 s and 2 s are asked for on
    quiet cores)."""
    opened = Visit(chromium, studio)
    begun = time.monotonic()
    page = opened.open()
    usable = time.monotonic() - begun
    fill(page, "seeds", "77")
    begun = time.monotonic()
    page.click("#trace-run")
    page.wait_for_selector("#trace-figure .cell:not(.waiting)")
    first = time.monotonic() - begun
    print(f"page usable after {usable:.2f} s, first cells {first:.2f} s after Run")
    opened.status("Done")
    opened.close()
    assert usable < 15 and first < 15

"""The Runs panel in a real browser: runs are found, starred, noted, opened again, compared, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from studio.session import Session
from studio.types import Recipe
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser
ROW = "#runs-list .run-row"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session with a store of its own, so that the runs of other tests are not found."""
    opened = Session(runs=tmp_path_factory.mktemp("own"), device="cpu", threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def atlas(session: Session) -> Any:
    """The embedded text-to-image model, loaded there."""
    return session.model("atlas-sd", "diffusion")


@pytest.fixture(scope="module")
def traced(session: Session, studio: str) -> list[str]:
    """Ids of two quick traces, one of a red and one of a blue star."""
    made = []
    for colour in ("red", "blue"):
        asked = {"prompt": f"a {colour} star on a white background", "subject": f"{colour} star"}
        recipe = Recipe("trace-unet", "atlas-sd", asked, {"steps": 2, "kinds": ["cross-attention"]}, (3,))
        made.append(session.run(recipe).id)
    return made


def value(page: Any, name: str) -> str:
    return page.locator(f"#{name} textarea, #{name} input").first.input_value()


def search(page: Any, words: str, found: int) -> None:
    """Types words and waits for so many runs."""
    page.locator("#runs-search textarea, #runs-search input").first.fill(words)
    page.wait_for_function(f"n => document.querySelectorAll('{ROW}').length === n", arg=found)


def goes(visit: Visit, path: str) -> Any:
    """Goes to an address that may show another tab than the first."""
    visit.page.goto(visit.address + path)
    visit.said.clear()  # leaving a page breaks off Gradio's own stream, which says so
    return visit.page


def opened(visit: Visit) -> Any:
    page = visit.page
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector(ROW)
    return page


def test_find_star_note_and_open_again(visit: Visit, traced: list[str]) -> None:
    page = opened(visit)
    search(page, "blue star trace-unet", 1)
    page.click(f"{ROW} .name")
    page.wait_for_selector("#runs-figure img")
    page.click("#runs-star")
    page.wait_for_selector(f"{ROW} .star.on")
    page.locator("#runs-note textarea").fill("<b>odd</b> ${1+1}")
    page.click("#runs-note-save")
    visit.status("The note is saved", "runs")
    assert "<b>odd</b> ${1+1}" in page.locator(f"{ROW} .note").text_content()
    search(page, "odd", 1)
    page.click("#runs-open")
    visit.status("Opened the run of ", "trace")
    page.wait_for_selector("#trace-figure .cell:not(.waiting)")
    assert value(page, "trace-prompt") == "a blue star on a white background"
    assert value(page, "trace-seeds") == "3"
    page.wait_for_selector("#trace-export button")
    page.locator("#trace-figure .cell").first.click()
    page.wait_for_selector("#trace-restored img")


def test_two_runs_are_compared_and_one_is_deleted_and_put_back(visit: Visit, traced: list[str]) -> None:
    page = opened(visit)
    search(page, "star trace-unet", 2)
    for n in (0, 1):
        page.locator(f"{ROW} .tick").nth(n).check()
    page.wait_for_function("document.querySelector('#runs-count textarea').value.includes('2 ticked')")
    page.get_by_role("tab", name="Compare").click()
    page.click("#runs-compare")
    page.wait_for_selector("#runs-map-difference .cell")
    page.wait_for_selector("#runs-image-difference img")
    assert value(page, "runs-difference-said").startswith("Largest difference ")
    page.get_by_role("tab", name="Run", exact=True).click()
    page.locator(f"{ROW} .name").first.click()
    page.wait_for_selector("#runs-delete:not([disabled])")
    page.click("#runs-delete")
    page.wait_for_function(f"document.querySelectorAll('{ROW}').length === 1")
    page.click("#runs-undo")
    page.wait_for_function(f"document.querySelectorAll('{ROW}').length === 2")
    visit.status("Put back.", "runs")


def test_a_picture_of_the_grid_chooses_its_run_by_mouse_and_by_keys(visit: Visit, traced: list[str]) -> None:
    page = opened(visit)
    search(page, "star trace-unet", 2)
    page.get_by_role("tab", name="Grid", exact=True).click()
    page.click("#runs-grid-draw")
    page.wait_for_selector("#runs-grid-pictures .cell img")
    page.locator("#runs-grid-cols input").click()
    page.get_by_role("option", name="subject (2)").click()
    page.wait_for_function("document.querySelectorAll('#runs-grid-pictures .cell').length === 2")
    said = "document.querySelector('#runs-grid-said textarea').value"
    page.locator("#runs-grid-pictures .cell").first.click()
    page.wait_for_function(f"{said}.startsWith('Chosen: ')")
    first = next(run for run in traced if run in value(page, "runs-grid-said"))
    page.wait_for_selector(f"{ROW}.chosen")
    page.keyboard.press("ArrowDown")  # nothing lies right below: on to the next place
    page.keyboard.press("Enter")
    (other,) = {*traced} - {first}
    page.wait_for_function(f"id => {said}.includes(id)", arg=other)
    assert page.locator("#runs-grid-pictures .cell.chosen").count() == 1
    assert page.locator(f"{ROW}.chosen").count() == 1


def test_a_link_opens_a_run_and_one_that_is_gone_is_said(visit: Visit, traced: list[str]) -> None:
    page = goes(visit, f"?run={traced[0]}")
    visit.status("Opened the run of ", "trace")
    page.wait_for_selector("#trace-figure .cell:not(.waiting)")
    assert value(page, "trace-subject") == "red star"
    goes(visit, "?run=nothing")
    visit.status("There is no run 'nothing'", "runs")
    goes(visit, "?tab=trace&prompt=a%20blue%20tree&kinds=resnet")
    page.wait_for_function(
        "document.querySelector('#trace-prompt textarea, #trace-prompt input')?.value === 'a blue tree'"
    )


def test_a_narrow_dark_window(chromium: Any, studio: str, traced: list[str]) -> None:
    visit = Visit(chromium, studio, width=400, height=800, dark=True)
    page = goes(visit, "?tab=runs")
    page.wait_for_selector(ROW)
    page.locator(f"{ROW} .name").first.click()
    page.wait_for_selector("#runs-figure img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    visit.close()

"""The Edit panel in a real browser: make, slide, stack, undo, reload, save and load; two people at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studio.session import Session
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser


def opened(visit: Visit) -> Any:
    """The panel with the method that needs no localization."""
    page = visit.page
    page.get_by_role("tab", name="Edit").click()
    page.wait_for_selector("#edit-run:not([disabled])")
    page.locator("#edit-method input[value=uce]").check()
    return page


def made(visit: Visit) -> Any:
    """The page with one edit on its stack, and its images."""
    page = opened(visit)
    page.click("#edit-run")
    page.wait_for_selector("#edit-stack .edit-row")
    page.wait_for_selector("#edit-after img")
    return page


def pixels(page: Any, which: str) -> str:
    """The address of an image, which changes with its content."""
    return page.locator(f"#edit-{which} img").first.get_attribute("src")


def strength(page: Any, value: str) -> None:
    """Types a strength and waits until the stack has it."""
    field = page.locator("#edit-strength input[type=number]")
    field.fill(value)
    field.press("Tab")  # the slider lets go
    page.wait_for_function(
        "v => document.querySelector('#edit-stack .strength')?.textContent === '× ' + v", arg=value
    )


def test_strength_undo_redo_toggle_and_remove(visit: Visit) -> None:
    page = made(visit)
    before, full = pixels(page, "before"), pixels(page, "after")
    assert before != full
    strength(page, "0.5")
    page.wait_for_function(
        "old => document.querySelector('#edit-after img')?.getAttribute('src') !== old", arg=full
    )
    page.click("#edit-undo")
    page.wait_for_function("document.querySelector('#edit-stack .strength')?.textContent === '× 1'")
    page.click("#edit-redo")
    page.wait_for_function("document.querySelector('#edit-stack .strength')?.textContent === '× 0.5'")
    page.click("#edit-stack input.on")
    page.wait_for_selector("#edit-stack .edit-row.off")
    page.click('#edit-stack button[aria-label^="Remove"]')
    page.wait_for_selector("#edit-stack .empty")
    page.click("#edit-undo")
    page.wait_for_selector("#edit-stack .edit-row.off")


def test_a_strength_outside_the_sliders_range(visit: Visit) -> None:
    page = made(visit)
    field = page.locator("#edit-strength input[type=number]")
    field.fill("5")
    page.wait_for_function("document.querySelector('#edit-strength input[type=range]').max === '5'")
    field.press("Tab")
    page.wait_for_function("document.querySelector('#edit-stack .strength')?.textContent === '× 5'")
    field.fill("500")
    visit.status("The strength must be a number from -100 to 100", "edit")
    field.press("Tab")
    page.wait_for_function("document.querySelector('#edit-strength input[type=number]').value === '5'")
    assert page.locator("#edit-stack .strength").inner_text() == "× 5"


def test_the_audit_offers_the_stacks_concepts(visit: Visit) -> None:
    page = made(visit)
    page.locator("#edit-concept textarea").fill("heart")
    page.click("#edit-run")
    page.wait_for_function("document.querySelectorAll('#edit-stack .edit-row').length === 2")
    page.get_by_role("tab", name="Audit", exact=True).click()
    page.wait_for_function("document.querySelector('#audit-concept input').value === 'heart'")
    page.locator("#audit-concept input").click()
    assert page.get_by_role("option").all_inner_texts()[0].strip() == "star"


def test_dragging_back_keeps_the_pictures(visit: Visit) -> None:
    page = made(visit)
    slider = page.locator("#edit-strength input[type=range]")
    for value in ("0.5", "1"):
        slider.evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value
        )
        page.wait_for_timeout(1500)
    assert page.locator("#edit-after img").count() and page.locator("#edit-before img").count()


def test_a_stack_outlives_a_reload_and_leaves_as_a_file(visit: Visit, tmp_path: Path) -> None:
    page = made(visit)
    page.click("#edit-save")
    page.wait_for_selector("#edit-file a[download]")
    with page.expect_download() as waiting:
        page.click("#edit-file a[download]")
    saved = tmp_path / "edit.safetensors"
    waiting.value.save_as(saved)
    page.reload()
    page.get_by_role("tab", name="Edit").click()
    page.wait_for_selector("#edit-stack .edit-row")
    page.wait_for_selector("#edit-after img")
    with page.expect_file_chooser() as chooser:
        page.click("#edit-load")
    chooser.value.set_files(str(saved))
    page.wait_for_function("document.querySelectorAll('#edit-stack .edit-row').length === 2")


def test_two_people_never_see_each_others_edits(visit: Visit, chromium: Any, session: Session) -> None:
    base = session.model("atlas-sd", "diffusion").fingerprint
    other = Visit(chromium, visit.address)
    other.open()
    first, second = made(visit), opened(other)
    second.locator("#edit-prompt input, #edit-prompt textarea").first.press("Enter")
    second.wait_for_selector("#edit-before img")
    assert second.locator("#edit-stack .edit-row").count() == 0
    assert first.locator("#edit-stack .edit-row").count() == 1
    other.close()
    assert session.model("atlas-sd", "diffusion").fingerprint == base


def test_grids_and_layers_on_the_map(visit: Visit) -> None:
    page = made(visit)
    page.click("#edit-grid-neighbours")
    page.wait_for_selector("#edit-grid img")
    assert page.locator("#edit-grid .thumbnail-item, #edit-grid button img").count() >= 6
    page.get_by_role("button", name="Choose layers on a map").click()
    page.click("#edit-show-layers")
    page.click('#edit-layer-map .cell[data-col="6"]')
    page.wait_for_function(
        "document.querySelector('#edit-layers input, #edit-layers textarea').value === '6'"
    )


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("concept", "", "“Concept” is missing"),
        ("replacement", "star", "The concept 'star' is its own replacement"),
        ("layers", "99", "“Layers”: '99' is no cross-attention layer"),
    ],
)
def test_bad_input_gets_a_sentence(visit: Visit, field: str, text: str, says: str) -> None:
    page = opened(visit)
    page.locator(f"#edit-{field} textarea, #edit-{field} input").first.fill(text)
    page.click("#edit-run")
    visit.status(says, "edit")
    page.wait_for_timeout(1500)  # nothing that follows the click takes the sentence away
    visit.status(says, "edit")

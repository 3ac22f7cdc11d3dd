"""The Localize panel in a real browser: bars, images behind them, weights with a ratio, over to Edit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.studio import Visit

pytestmark = pytest.mark.browser


def opened(visit: Visit, method: str = "localize") -> Any:
    """The panel with few steps."""
    page = visit.page
    page.get_by_role("tab", name="Localize").click()
    page.wait_for_selector("#localize-run:not([disabled])")
    page.locator(f"#localize-method input[value={method}]").check()
    page.get_by_role("button", name="Sampling and scoring").last.click()
    page.locator("#localize-steps textarea, #localize-steps input").first.fill("3")
    return page


def ran(visit: Visit, method: str = "localize") -> Any:
    """The page after one finished run, its bars drawn."""
    page = opened(visit, method)
    page.click("#localize-run")
    visit.status("Done", "localize")
    page.wait_for_selector("#localize-figure .cell:not(.waiting)")
    return page


def test_bars_images_and_over_to_edit(visit: Visit) -> None:
    page = ran(visit)
    assert page.locator("#localize-figure .cell").count() == 9
    page.click('#localize-figure .cell[data-col="6"]')
    page.wait_for_selector("#localize-altered img")
    said = page.locator("#localize-detail-text textarea").input_value()
    assert said.startswith("Layers 6-7: direct effect") and "up_blocks.1.attentions.0" in said
    page.click("#localize-edit")
    page.wait_for_function(
        "document.querySelector('#edit-layers input, #edit-layers textarea')?.value.length > 9"
    )
    assert page.locator("#edit-concept textarea").input_value() == "star"
    assert page.locator("#edit-replacement textarea").input_value() == "circle"


def test_keyboard_and_table(visit: Visit) -> None:
    page = ran(visit)
    page.locator("#localize-figure .map").focus()
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#localize-figure .said').textContent.startsWith('8-9')")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelector('#localize-detail-text textarea').value.startsWith('Layers 8-9')"
    )
    page.get_by_role("tab", name="Table").last.click()
    page.wait_for_function("document.querySelector('#localize-table textarea')?.value.includes('7-8')")


def test_weights_are_ablated_by_a_click(visit: Visit) -> None:
    page = opened(visit, "attribute")
    page.locator("#localize-concept textarea, #localize-concept input").first.fill("a red star")
    page.click("#localize-run")
    visit.status("Done", "localize")
    page.wait_for_selector("#localize-figure .cell:not(.waiting)")
    page.click("#localize-figure .cell >> nth=6")
    page.wait_for_selector("#localize-ratio")
    page.wait_for_function(
        "document.querySelector('#localize-detail-text textarea').value.includes('weights:')"
    )


def test_the_same_text_twice_is_refused(visit: Visit) -> None:
    page = opened(visit)
    page.locator("#localize-replacement textarea, #localize-replacement input").first.fill(
        "a red star on a white background"
    )
    page.click("#localize-run")
    visit.status("“Replacement” is the prompt itself", "localize")
    assert "below" not in page.locator("#localize-status textarea").input_value()


def test_a_refused_run_says_whose_bars_stay(visit: Visit) -> None:
    page = ran(visit)
    page.locator("#localize-window textarea, #localize-window input").first.fill("none")
    page.click("#localize-run")
    visit.status("“Window” must be a whole number", "localize")
    said = page.locator("#localize-status textarea").input_value()
    assert said.endswith("What is shown below is of the run before.")
    assert page.locator("#localize-figure .cell").count() == 9


def test_each_method_has_its_examples(visit: Visit) -> None:
    page = opened(visit)
    for method in ("attribute", "neurons", "passport", "localize"):
        page.locator(f"#localize-method input[value={method}]").check()
        page.wait_for_selector(f"#localize-examples-{method}")
        assert page.locator("[id^=localize-examples-]:visible").count() == 1


@pytest.mark.parametrize("method", ["neurons", "passport"])
def test_each_method_runs_with_what_stands_in_its_fields(visit: Visit, method: str) -> None:
    page = opened(visit, method)
    page.click("#localize-run")
    visit.status("Done", "localize")
    shown = "#localize-curve img" if method == "passport" else "#localize-figure .cell"
    page.wait_for_selector(shown)

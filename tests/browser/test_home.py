"""The head of the page and the tour, in a real browser: nothing blocks Run, everything is remembered."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.browser.studio import Visit

pytestmark = pytest.mark.browser


def tab(page: Any, title: str) -> Any:
    return page.locator("#panels > .tab-wrapper [role=tab]").filter(has_text=title).first


def test_the_overview_says_what_there_is_and_opens_panels(chromium: Any, studio: str) -> None:
    """The time to a usable button is printed; 3 s are asked for on quiet cores."""
    opened = Visit(chromium, studio)
    begun = time.monotonic()
    page = opened.open()
    print(f"page usable after {time.monotonic() - begun:.2f} s")
    page.wait_for_selector(".home .overview")
    text = page.locator(".home").inner_text()
    assert (
        "atlas-sd" in text
        and "atlas-llama" in text
        and "memory free" in text
        and "models that can be downloaded fit" in text
    )
    assert all(key in text for key in ("Ctrl+Enter", "Esc", "Alt+1"))
    titles = page.locator(".home .card b").all_inner_texts()
    tabs = page.locator("#panels > .tab-wrapper [role=tab]").all_inner_texts()
    assert titles == [t.strip() for t in tabs if t.strip()][: len(titles)] and len(titles) >= 6
    assert all(t.endswith("?") for t in page.locator(".home .card span").all_inner_texts())
    page.click('.home .card[data-tab="retrieval"]')
    page.wait_for_selector("#retrieval-run")
    assert tab(page, "Retrieval").get_attribute("aria-selected") == "true"
    page.keyboard.press("Alt+1")
    page.wait_for_selector("#trace-run")
    page.keyboard.press(f"Alt+{len(titles)}")
    page.wait_for_selector("#models-list .model-row")
    opened.close()


def test_what_was_closed_or_chosen_stays_so(visit: Visit) -> None:
    page = visit.page
    page.click(".home .fold")
    page.wait_for_selector(".home .overview", state="detached")
    dark = "dark" in page.evaluate("document.body.className")
    page.click(".home .theme")
    assert ("dark" in page.evaluate("document.body.className")) is not dark
    visit.open()
    visit.said.clear()  # leaving a page breaks off Gradio's own stream, which says so
    assert page.locator(".home .overview").count() == 0
    page.wait_for_function(f"document.body.classList.contains('dark') === {str(not dark).lower()}")
    page.click(".home .fold")
    page.wait_for_selector(".home .overview")


def test_the_tour_leads_through_and_blocks_nothing(visit: Visit) -> None:
    page = visit.page
    assert (
        page.locator(".tour-card").count() == 0
        and "Tour, 1 minute" in page.locator(".home .tour").inner_text()
    )
    page.locator(".home .tour").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".tour-card")
    stops = int(page.locator(".tour-card .count").inner_text().split(" of ")[1])
    seen = []
    for _ in range(stops):
        seen.append(page.locator(".tour-card b").inner_text())
        assert page.locator(".tour-target").count() == 1 or seen[-1] == "Take it with you"
        assert page.evaluate("document.activeElement.textContent") in ("Next", "Done")
        page.keyboard.press("Enter")
    assert len(set(seen)) == stops and page.locator(".tour-card").count() == 0
    assert page.locator(".home .tour").inner_text() == "Tour"
    assert page.evaluate("document.activeElement.classList.contains('tour')")
    page.click(".home .tour")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".tour-card .count").inner_text().startswith("2 of")
    page.fill("#trace-prompt textarea, #trace-prompt input", "")
    page.click("#trace-run")  # with the card open
    visit.status("“Prompt” is missing")
    page.keyboard.press("Escape")
    page.wait_for_selector(".tour-card", state="detached")
    assert page.locator(".tour-target").count() == 0


def test_the_tour_on_a_narrow_screen(chromium: Any, studio: str) -> None:
    opened = Visit(chromium, studio, width=400, height=800)
    page = opened.open()
    assert page.locator(".home .overview").count() == 0  # Run is near
    page.click(".home .tour")
    box = page.locator(".tour-card").bounding_box()
    assert (
        box["x"] >= 0
        and box["x"] + box["width"] <= 400
        and box["y"] + box["height"] <= 800
        and box["y"] > 400
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.click(".tour-card .skip")
    page.wait_for_selector(".tour-card", state="detached")
    opened.close()

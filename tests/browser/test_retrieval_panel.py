"""The Retrieval panel in a real browser: contributions, knockouts, selecting, passages, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.studio import Visit
from tests.test_retrieval_panel import ASKED, long_context, with_room

pytestmark = pytest.mark.browser


def opened(visit: Visit) -> Any:
    page = visit.page
    page.get_by_role("tab", name="Retrieval").click()
    page.wait_for_selector("#retrieval-run:not([disabled])")
    return page


def fill(page: Any, name: str, text: str) -> None:
    page.locator(f"#retrieval-{name} textarea, #retrieval-{name} input").first.fill(text)


def value(page: Any, name: str) -> str:
    return page.locator(f"#retrieval-{name} textarea, #retrieval-{name} input").first.input_value()


def ran(visit: Visit) -> Any:
    page = opened(visit)
    page.click("#retrieval-run")
    visit.status("Done", "retrieval")
    page.wait_for_selector("#retrieval-figure .cell")
    return page


def test_contributions_colour_the_strip_and_split_into_heads(visit: Visit) -> None:
    page = ran(visit)
    page.wait_for_selector("#retrieval-strip .token[style*=background]")
    page.click('#retrieval-figure .cell[data-row="1"][data-col="2"]')
    page.wait_for_selector("#retrieval-heads .cell")
    assert "layer 2" in value(page, "detail-text")
    page.locator("#retrieval-strip .token").nth(3).click()
    page.wait_for_function(
        "document.querySelector('#retrieval-detail-text textarea').value.startsWith('Token 3')"
    )


def test_knockouts_and_the_verdict_of_both_kinds_of_cut(visit: Visit) -> None:
    page = opened(visit)
    page.get_by_role("radio", name="Knockouts").check()
    page.click("#retrieval-run")
    visit.status("Done", "retrieval")
    page.wait_for_selector("#retrieval-curve img")
    page.click('#retrieval-figure .cell[data-row="1"][data-col="1"]')
    page.wait_for_function(
        "document.querySelector('#retrieval-detail-text textarea').value.includes('Random sets')"
    )
    page.get_by_role("radio", name="Context or memory").check()
    page.click("#retrieval-run")
    page.wait_for_function(
        "document.querySelector('#retrieval-detail-text textarea').value.includes('when the last token')"
    )
    page.wait_for_selector("#retrieval-side .cell")


def test_words_selected_in_the_strip_become_the_attribute(visit: Visit) -> None:
    page = opened(visit)
    fill(page, "context", "The capital of Arvonia is Quill. The river of Arvonia is Wend.")
    fill(page, "prompt", "The capital of Arvonia is")
    fill(page, "subject", "Arvonia")
    page.keyboard.press("Tab")
    page.wait_for_selector("#retrieval-strip .token:has-text('Wend')")
    page.wait_for_function("!document.querySelector('#retrieval-strip').textContent.includes('emblem')")
    page.locator("#retrieval-strip .token", has_text="Wend").dblclick()
    page.wait_for_function(
        "document.querySelector('#retrieval-attribute textarea, #retrieval-attribute input').value === 'Wend'"
    )
    page.wait_for_selector("#retrieval-strip .role-attribute:has-text('Wend')")
    page.locator("#retrieval-strip .token").nth(2).drag_to(page.locator("#retrieval-strip .token").last)
    page.wait_for_function(
        "document.querySelector('#retrieval-detail-text textarea').value.startsWith('Select words of the')"
    )


def test_a_thousand_tokens_show_groups_and_then_tokens(visit: Visit, tmp_path: Path) -> None:
    page = opened(visit)
    for name, text in (ASKED | {"context": long_context()}).items():
        fill(page, name, text)
    page.locator("button:visible", has_text="Options").first.click()
    page.locator("#retrieval-model input").fill(str(with_room(tmp_path / "long")))
    page.locator("#retrieval-model input").press("Enter")
    page.locator("#retrieval-model input").press("Tab")
    page.wait_for_function("document.querySelectorAll('#retrieval-strip .token').length > 1000")
    page.click("#retrieval-run")
    visit.status("Done", "retrieval")
    said = "document.querySelector('#retrieval-detail-text textarea').value"
    page.wait_for_selector('#retrieval-figure .cell[data-row="28"]')
    page.click('#retrieval-figure .cell[data-row="5"][data-col="3"]')
    page.wait_for_function(f"{said}.startsWith('Sentence 1, ') && {said}.includes('capital of Arvonia')")
    page.click('#retrieval-side .cell[data-row="2"][data-col="3"]')
    page.wait_for_function(f"{said}.includes(', layer 3: ') && {said}.includes('share of the layer')")
    page.wait_for_selector("#retrieval-heads .cell")
    page.locator("#retrieval-strip .token").nth(1000).click()
    page.wait_for_function(f"{said}.startsWith('Token 1000')")


def test_a_context_is_found_in_passages(visit: Visit) -> None:
    page = opened(visit)
    page.get_by_role("button", name="Find the context in passages").click()
    fill(
        page, "passages", "Bread is good.\n\nThe capital of Arvonia is Quill.\n\nThe river of Arlund is long."
    )
    fill(page, "prompt", "The capital of Arvonia is")
    fill(page, "count", "1")
    page.click("#retrieval-find")
    visit.status("1 passages found", "retrieval")
    assert value(page, "context") == "The capital of Arvonia is Quill."
    fill(page, "passages", "zzz")
    page.click("#retrieval-find")
    visit.status("No passage shares a word", "retrieval")


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("subject", "Nowhere", "“Subject” 'Nowhere' is not in the text"),
        ("prompt", "", "“Prompt” is missing"),
        ("attribute", "is", "“Attribute” 'is' stands"),
    ],
)
def test_bad_input_gets_a_sentence(visit: Visit, field: str, text: str, says: str) -> None:
    page = opened(visit)
    fill(page, field, text)
    page.click("#retrieval-run")
    visit.status(says, "retrieval")

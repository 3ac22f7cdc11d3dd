"""The Models panel and files of prompts in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studio.session import Session
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser
TOKEN = "hf_" + "s3cret" * 5


def line(page: Any, name: str) -> Any:
    return page.locator(f'#models-list .model-row[data-name="{name}"]')


def test_load_unload_ask_and_token(visit: Visit, session: Session) -> None:
    page = visit.page
    page.locator("#panels > .tab-wrapper [role=tab]").filter(has_text="Models").first.click()
    page.wait_for_selector('#models-list .model-row[data-name="atlas-phi"] .act')
    session.unload("atlas-phi")
    line(page, "atlas-phi").get_by_role("button", name="Load atlas-phi", exact=True).click()
    visit.status("atlas-phi is in memory: ", "models")
    line(page, "atlas-phi").get_by_role("button", name="Unload atlas-phi").click()
    visit.status("atlas-phi left memory: ", "models")
    assert "atlas-phi" not in dict(session.loaded())
    page.wait_for_function(
        "!document.querySelector('#models-memory textarea').value.includes('atlas-phi')"
    )  # the line is live
    line(page, "llama-2-7b").get_by_role("button", name="Download").click()
    page.wait_for_selector("#models-agree")
    offer = page.locator("#models-offer textarea").input_value()
    assert "13.5 GB, licence Llama 2 Community; its authors ask you" in offer
    page.click("#models-refuse")
    page.wait_for_selector("#models-agree", state="hidden")
    page.get_by_role("button", name="Hugging Face token").click()
    field = page.locator("#models-token input")
    assert field.get_attribute("type") == "password"
    field.fill(TOKEN)
    page.click("#models-use")
    visit.status("The token is used until the studio ends.", "models")
    page.wait_for_function("document.querySelector('#models-token input').value === ''")
    assert TOKEN not in page.content() and session.hub.has_token
    page.click("#models-forget")
    visit.status("The token that was entered here is forgotten.", "models")
    page.fill("#models-name textarea, #models-name input", "atlas-swin")
    page.click("#models-look")
    visit.status("atlas-swin: vision, timm, needs", "models")


def test_a_file_of_prompts(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a red star", "subject": "star"}\n{"prompt": "a blue ${1}", "subject": "blue"}\n'
    )
    page.get_by_role("button", name="Sampling and scoring").click()
    page.locator("#trace-steps textarea, #trace-steps input").first.fill("2")
    page.get_by_role("button", name="Prompts from a file").first.click()
    page.locator("#trace-prompts-file input[type=file]").set_input_files(file)
    page.wait_for_selector("#trace-prompts-run")
    page.click("#trace-prompts-line input")
    page.get_by_role("option").filter(has_text="2: ").click()
    page.wait_for_function(
        "document.querySelector('#trace-prompt textarea, #trace-prompt input').value === 'a blue ${1}'"
    )
    page.click("#trace-prompts-run")
    page.wait_for_function(
        "document.querySelector('#trace-prompts-status textarea').value.startsWith('2 of 2 lines ran')"
    )
    with page.expect_download() as waiting:
        page.click("#trace-prompts-csv")
    waiting.value.save_as(tmp_path / "all.csv")
    text = (tmp_path / "all.csv").read_text()
    assert "a blue ${1}" in text and text.count("done") == 2

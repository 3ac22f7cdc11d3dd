"""Exports in a real browser: the screen has the colours of the file, rarer formats, a fixed scale."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio import palette
from studio.restore import restored
from studio.session import Session
from tests.browser.studio import Visit

pytestmark = pytest.mark.browser
FILLS = "[...document.querySelectorAll('#trace-figure .cell rect')].map(r => r.getAttribute('fill'))"


def download(page: Any, kind: str) -> bytes:
    """What a button of the row downloads."""
    with page.expect_download() as waiting:
        page.click(f"#trace-export-{kind}")
    return Path(waiting.value.path()).read_bytes()


def colours(png: bytes) -> set[str]:
    """The colours of an image."""
    with Image.open(io.BytesIO(png)) as opened:
        return {"#" + bytes(c).hex() for _, c in opened.convert("RGB").getcolors(1 << 24)}


def test_screen_and_file_have_the_same_colours_and_every_format_restores(
    visit: Visit, session: Session, tmp_path: Path
) -> None:
    page = visit.page
    page.get_by_role("button", name="Sampling and scoring").click()
    page.locator("#trace-steps textarea, #trace-steps input").first.fill("2")
    page.click("#trace-run")
    visit.status("Done")
    page.wait_for_selector("#trace-export-png", state="visible")
    fills = page.evaluate(FILLS)
    assert len(fills) == 10 and set(fills) <= {*palette.SHADES, palette.EMPTY}
    assert set(fills) <= colours(download(page, "png"))

    page.locator("#trace-export-more").get_by_text("More formats").click()
    page.wait_for_selector("#trace-export-large:not([disabled])")
    for kind in ("tex", "bib", "ipynb", "json", "large"):
        (tmp_path / kind).write_bytes(download(page, kind))
        found = restored(tmp_path / kind, session.store)
        assert found.recipe.method == "trace-unet"
        assert found.recipe == session.store.load(found.run_id).recipe
    with Image.open(tmp_path / "large") as opened:
        assert round(opened.info["dpi"][0]) == 300

    page.locator("#trace-scale textarea, #trace-scale input").first.fill("-50, 100")
    page.keyboard.press("Enter")
    page.wait_for_function(f"before => JSON.stringify({FILLS}) !== before", arg=_json(fills))
    pale = page.evaluate(FILLS)
    assert set(pale) <= {palette.shade(v / 100, (-50, 100)) for v in range(-100, 101)}  # near no effect
    page.wait_for_selector("#trace-export-tex", state="hidden")  # the files of the other scale are gone
    assert set(pale) <= colours(download(page, "png"))


def _json(value: list[str]) -> str:
    import json

    return json.dumps(value, separators=(",", ":"))

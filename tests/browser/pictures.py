"""The README's pictures, taken from the running studio.

    python -m tests.browser.pictures [DIR]

runs the example of each panel in NAMES and writes DIR/PANEL.png (default assets/pictures).
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from studio.models.catalog import ASSETS
from studio.session import Session
from tests.browser.shots import PANELS, PATIENCE, open_tab
from tests.browser.studio import FLAGS, Visit, find_chromium, serving

NAMES = ("trace", "edit", "decompose", "retrieval", "runs")
WIDTH, HEIGHT = 1280, 860


def picture(visit: Visit, panel: str) -> bytes:
    """The panel after its example has run, from its question on, as PNG."""
    from PIL import Image

    open_tab(visit, panel.capitalize())
    PANELS[panel](visit)
    page = visit.page
    page.mouse.move(2, 2)
    page.evaluate("document.querySelector('#panels').scrollIntoView({block: 'start'})")
    page.wait_for_timeout(900)
    out = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def take_pictures(browser: Any, address: str, folder: Path) -> int:
    """Writes all of them; the bytes in all."""
    visit = Visit(browser, address, width=WIDTH, height=HEIGHT)
    visit.page.set_default_timeout(PATIENCE)
    visit.open()
    visit.page.click(".home .fold")
    total = 0
    for panel in NAMES:
        content = picture(visit, panel)
        (folder / f"{panel}.png").write_bytes(content)
        total += len(content)
        print(f"{panel}.png {len(content) / 1e3:.0f} kB", flush=True)
    visit.close()
    return total


def main(argv: list[str]) -> int:
    """Takes the pictures."""
    from playwright.sync_api import sync_playwright

    folder = Path(argv[0]) if argv else ASSETS / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as runs, sync_playwright() as play:
        session = Session(runs=runs, device="cpu", threads=1)
        browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        with serving(session) as address:
            total = take_pictures(browser, address, folder)
        browser.close()
        session.close()
    print(f"{total / 1e6:.2f} MB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

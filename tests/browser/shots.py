"""Screenshots of every panel after its example has run: light, dark, and 400 px wide.

    python -m tests.browser.shots DIR [PANEL ...]

writes DIR/PANEL-light.png and so on, and prints what a console said and which outside hosts were asked: both
must be nothing. They are there to be looked at.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.session import Session
from tests.browser.studio import FLAGS, Visit, find_chromium, serving

MODES = {
    "light": dict(width=1280, height=900),
    "dark": dict(width=1280, height=900, dark=True),
    "narrow": dict(width=400, height=800),
}
PATIENCE = 300_000  # milliseconds
Step = Callable[[Visit], None]


def open_tab(visit: Visit, title: str) -> None:
    """Opens a tab, from the menu where there is no room for all."""
    page = visit.page
    tab = page.locator("#panels > .tab-wrapper [role=tab]:visible").filter(has_text=title)
    if not tab.count():
        page.locator("#panels > .tab-wrapper .overflow-menu > button").click()
        tab = page.locator("#panels > .tab-wrapper .overflow-dropdown button").filter(has_text=title)
    tab.first.click()


def fill(visit: Visit, name: str, text: str) -> None:
    """Types into a field by its id."""
    visit.page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def _ran(panel: str, ready: str) -> Step:
    def step(visit: Visit) -> None:
        visit.page.wait_for_selector(f"#{panel}-run:not([disabled])")
        visit.page.click(f"#{panel}-run")
        visit.status("Done", panel)
        visit.page.wait_for_selector(ready)

    return step


def trace(visit: Visit) -> None:
    """A trace whose strongest cell was clicked."""
    _ran("trace", "#trace-figure .cell:not(.waiting)")(visit)
    visit.page.click('#trace-figure .cell[data-row="0"][data-col="9"]')
    visit.page.wait_for_selector("#trace-restored img")


def edit(visit: Visit) -> None:
    """An edit, with the images before and after it."""
    visit.page.wait_for_selector("#edit-run:not([disabled])")
    visit.page.click("#edit-run")
    visit.page.wait_for_selector("#edit-after img")
    visit.page.wait_for_selector("#edit-stop[disabled]")


def runs(visit: Visit) -> None:
    """The newest run, chosen."""
    visit.page.wait_for_selector("#runs-list .run-row")
    visit.page.click("#runs-list .run-row .name")
    visit.page.wait_for_selector("#runs-figure img")


def models(visit: Visit) -> None:
    """The list, and the step before a download."""
    visit.page.wait_for_selector("#models-list .model-row")
    visit.page.locator('#models-list .model-row[data-name="sdxl"] button').click()
    visit.page.wait_for_selector("#models-agree")


PANELS: dict[str, Step] = {
    "trace": trace,
    "localize": _ran("localize", "#localize-figure .cell:not(.waiting)"),
    "edit": edit,
    "decompose": _ran("decompose", "#decompose-figure .cell:not(.waiting)"),
    "retrieval": _ran("retrieval", "#retrieval-figure .cell:not(.waiting)"),
    "runs": runs,
    "models": models,
}


def take(visit: Visit, folder: Path, panel: str, mode: str) -> list[str]:
    """One picture; what went wrong in the page meanwhile."""
    page = visit.page
    try:
        if panel != "home":
            if page.locator(".home .overview").count():
                page.click(".home .fold")
            open_tab(visit, panel.capitalize())
            PANELS[panel](visit)
        page.wait_for_timeout(700)  # for what fades in
        page.screenshot(path=folder / f"{panel}-{mode}.png", full_page=panel != "home")
        wide = page.evaluate("document.documentElement.scrollWidth")
        faults = [f"{wide} px wide"] if wide > MODES[mode]["width"] else []
    except Exception as error:
        page.screenshot(path=folder / f"{panel}-{mode}-failed.png")
        faults = [f"{type(error).__name__}: {str(error)[:200]}"]
    faults += visit.said + visit.outside
    visit.said.clear(), visit.outside.clear()
    return faults


def take_all(browser: Any, address: str, folder: Path, wanted: list[str], mode: str) -> int:
    """All pictures of one mode, in one visit; how many had something wrong."""
    visit, faults = Visit(browser, address, **MODES[mode]), 0
    visit.page.set_default_timeout(PATIENCE)
    visit.open()
    for panel in wanted:
        wrong = take(visit, folder, panel, mode)
        print(f"{panel} {mode}: {wrong or 'nothing wrong'}", flush=True)
        faults += bool(wrong)
    visit.context.close()
    return faults


def main(argv: list[str]) -> int:
    """Takes all pictures; 1 when something went wrong in a page."""
    from playwright.sync_api import sync_playwright

    if not argv:
        print(__doc__)
        return 2
    folder, wanted = Path(argv[0]), argv[1:] or ["home", *PANELS]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as runs_, sync_playwright() as play:
        session = Session(runs=runs_, device="cpu", threads=1)
        browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        with serving(session) as address:
            faults = sum(take_all(browser, address, folder, wanted, mode) for mode in MODES)
        browser.close()
        session.close()
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

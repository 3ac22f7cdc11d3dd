"""A studio on a free port and a real Chromium in front of it; every request to another host is recorded and
refused."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ADVICE = (
    "no browser found: install Debian's `chromium`, or run `playwright install chromium`, or set "
    "LOCUS_CHROMIUM"
)


def find_chromium() -> str | None:
    """LOCUS_CHROMIUM, Debian's chromium, or Playwright's own; None when there is none."""
    if (named := os.environ.get("LOCUS_CHROMIUM")) and Path(named).exists():
        return named
    if found := shutil.which("chromium") or shutil.which("chromium-browser"):
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        own = p.chromium.executable_path
    return own if Path(own).exists() else None


@contextmanager
def serving(session: Any) -> Iterator[str]:
    """The address of a studio that serves this session."""
    import uvicorn

    from panels import server as serving

    opened = serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(serving.uvicorn_config(serving.new_app(session)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:  # a bound socket that nobody listens at refuses
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        opened.close()


class Visit:
    """One browser window: the page, what its console said, and which outside hosts it asked."""

    def __init__(
        self, browser: Any, address: str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.page, self.said, self.outside = self.context.new_page(), [], []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda m: self.said.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.context.route("**/*", self._route)
        self.address = address

    def _route(self, route: Any) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def open(self, path: str = "") -> Any:
        """Goes to the studio and waits until its first Run button can be pressed."""
        self.page.goto(self.address + path)
        self.page.wait_for_selector("#trace-run:not([disabled])")
        return self.page

    def status(self, start: str, panel: str = "trace") -> None:
        """Waits until the panel's status line starts with this text."""
        self.page.wait_for_function(
            "([p, t]) => document.querySelector(`#${p}-status textarea`)?.value.startsWith(t)",
            arg=[panel, start],
            timeout=120_000,
        )

    def cells(self) -> None:
        """Waits until the map shows a measured cell; says what the status line said when none comes."""
        try:
            self.page.wait_for_selector("#trace-figure .cell:not(.waiting)")
        except Exception as error:
            said = self.page.locator("#trace-status textarea").input_value()
            raise AssertionError(f"no cell came; the status line says {said!r}") from error

    def close(self) -> None:
        """Closes the window; nothing may have gone wrong in it."""
        self.context.close()
        assert self.said == [], self.said
        assert self.outside == [], self.outside

"""A studio and a browser for all panels' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from studio.session import Session
from tests.browser.studio import ADVICE, FLAGS, Visit, find_chromium, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser test that waited in vain is tried once more, and reported as such: on two busy cores a page
    may be late. What is wrong on the page fails at once."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=["TimeoutError"]))


@pytest.fixture(scope="module")
def studio(session: Session, atlas: Any) -> Iterator[str]:
    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(ADVICE)
        pytest.skip(ADVICE)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, studio: str) -> Iterator[Visit]:
    opened = Visit(chromium, studio)
    opened.open()
    yield opened
    opened.close()

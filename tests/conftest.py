"""Fixtures of all tests: a home and a temporary folder of their own, one session on the CPU, the embedded
model in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path is kept for a look at faults
TEMPORARY = tempfile.mkdtemp(prefix="locus-tests-")
os.environ |= {"LOCUS_HOME": os.path.join(TEMPORARY, "home"), "TMPDIR": TEMPORARY}
tempfile.tempdir = None
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import pytest  # noqa: E402


def pytest_unconfigure() -> None:
    """Leaves nothing behind."""
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A session on the CPU whose store is a temporary folder."""
    from studio.session import Session

    opened = Session(runs=tmp_path_factory.mktemp("runs"), device="cpu", threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def atlas(session: Any) -> Any:
    """The embedded text-to-image model, loaded."""
    return session.model("atlas-sd", "diffusion")

"""What the server keeps of every open page: its own values, and little else."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.state_holder import SessionState

from panels.server import new_app
from panels.sessions import MOST, Kept, Sessions
from studio.session import Session


@pytest.fixture(scope="module")
def page(tmp_path_factory: Any) -> Any:
    session = Session(runs=Path(tmp_path_factory.mktemp("sessions")) / "runs", device="cpu", threads=1)
    app = next(r.app for r in new_app(session).routes if hasattr(getattr(r, "app", None), "state_holder"))
    yield app
    session.close()


def size_of(make: Any) -> int:
    """Bytes that are kept with what make() returns."""
    tracemalloc.start()
    kept = make()
    bytes_, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept is not None
    return bytes_


def test_a_page_keeps_a_tenth_of_what_gradio_keeps(page: Any) -> None:
    blocks = page.get_blocks()
    assert isinstance(page.state_holder, Sessions) and blocks.state_holder is page.state_holder
    assert size_of(lambda: Kept(blocks)) * 10 < size_of(lambda: SessionState(blocks))


def test_pages_have_values_of_their_own(page: Any) -> None:
    holder, blocks = page.state_holder, page.get_blocks()
    key, state = next((k, b) for k, b in blocks.blocks.items() if type(b) is gr.State and b.value == {})
    box = next(k for k, b in blocks.blocks.items() if type(b) is gr.Textbox)
    assert holder["one"][key] == {} and holder["one"].get(key) == {}
    holder["one"][key] = {"job": 1}
    holder["one"][box] = gr.Textbox("changed", render=False)
    holder["one"]._update_value_in_config(box, "typed")
    assert (holder["one"][key], holder["two"][key], state.value) == ({"job": 1}, {}, {})
    assert holder["one"][box].value == "changed" and holder["two"][box] is blocks.blocks[box]


def test_only_so_many_pages_are_kept(page: Any) -> None:
    holder = page.state_holder
    for number in range(MOST + 10):
        assert isinstance(holder[f"page {number}"], Kept)
    assert len(holder.session_data) == MOST and f"page {MOST + 9}" in holder and "page 0" not in holder
    assert len(holder.time_last_used) <= MOST + 1

"""What the server keeps of every open page.

Gradio keeps a copy of the whole page's configuration for each, which only its deep links read and Locus does
not have: for a page of this size 0.1 to 0.2 s, in which nobody else is answered, and some 4 MB that stay for
10,000 pages.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import gradio as gr
from gradio.state_holder import SessionState, StateHolder

MOST = 512  # pages; of more, those that were used least recently begin anew


class Kept(SessionState):
    """What one page has changed: values of gr.State, and components with other properties than at first."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self.blocks_config = copy(blocks.default_config)
        self.config_values: dict[int, Any] = {}
        self.state_data: dict[int, Any] = {}
        self._state_ttl: dict[int, Any] = {}
        self.is_closed = False
        self.STATE_TTL_WHEN_CLOSED = 3600

    def _update_config(self, key: int) -> None:
        """Nothing: see the module."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """Nothing: see the module."""


class Sessions(StateHolder):
    """All pages by their session's hash."""

    def __getitem__(self, session_id: str) -> SessionState:
        if session_id not in self.session_data:
            self.session_data[session_id] = Kept(self.blocks)
        return super().__getitem__(session_id)


def lighten(app: Any, page: gr.Blocks) -> None:
    """Lets Gradio's application keep no more of a page than that."""
    page.state_session_capacity = MOST
    app.state_holder = Sessions()
    app.state_holder.set_blocks(page)

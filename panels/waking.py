"""What happens when a page is loaded.

Gradio's page looks through its whole tree for every output of an event, so an event with a panel's outputs
costs a page of this size about half a second; one for each panel would keep Run waiting. What is seldom
needed (a link is followed, a run taken up, a stack put back) therefore waits for a small event that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

QUIET = dict(queue=False, show_progress="hidden", api_visibility="private")
READY = "() => ({__type__: 'update', interactive: true})"
SILENT = dict(visible=False, print_exception=False)  # an "error" that nobody sees: nothing is to be done


def enable(button: gr.Button) -> None:
    """Makes a button live as soon as the page is, without a word to the server."""
    _page().load(None, None, button, js=READY, **QUIET)


def when_asked(
    ask: Callable[..., Any],
    inputs: Any,
    act: Callable[..., Any],
    also: Sequence[Any],
    outputs: Sequence[Any],
    **how: Any,
) -> Any:
    """On loading, ask(*inputs) says what is to be done, None where nothing is; act(that, *also) does it, with
    all its outputs. Returns act's event."""
    wanted = gr.State(None)

    @wraps(ask)
    def asked(*given: Any) -> Any:
        found = ask(*given)
        if found is None:
            raise gr.Error("Nothing is to be done.", **SILENT)
        return found

    # queued, because an answer outside the queue that ends in an error is noted in the browser's console
    event = _page().load(
        asked, inputs, wanted, concurrency_limit=None, show_progress="hidden", api_visibility="private"
    )
    return event.success(act, [wanted, *also], outputs, **how)


def _page() -> gr.Blocks:
    return gr.context.Context.root_block

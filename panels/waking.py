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

from panels.drawn import Drawn

QUIET = dict(queue=False, show_progress="hidden", api_visibility="private")
READY = "() => ({__type__: 'update', interactive: true})"


def enable(button: gr.Button) -> None:
    """Makes a button live as soon as the page is, without a word to the server."""
    _page().load(None, None, button, js=READY, **QUIET)


class Waker(Drawn):
    """Hears what is to be done; unseen, and outside all tabs, because one that was not opened yet hears
    nothing."""

    def __init__(self, **options: Any) -> None:
        context = gr.context.Context
        inside, context.block = context.block, context.root_block
        options = {"visible": "hidden", **options}
        try:
            super().__init__({"asked": False}, "<div></div>", "wake", **options)
        finally:
            context.block = inside


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
    wanted, waker = gr.State(None), Waker()

    @wraps(ask)
    def asked(*given: Any) -> Any:
        found = ask(*given)
        return (gr.skip(), gr.skip()) if found is None else (found, {"asked": True})

    # not through the queue: of several short answers there at once some are lost while a page begins
    _page().load(asked, inputs, [wanted, waker], **QUIET)
    return waker.select(act, [wanted, *also], outputs, **how)


def _page() -> gr.Blocks:
    return gr.context.Context.root_block

"""What happens when a page is loaded.

Gradio's page looks through its tree, from the front, for every output of an event, and for one that is no
part of it three times: an event with a panel's outputs costs a page of this size about half a second. So
there is one event for the whole page, which asks every panel whether it has something to do (a link is
followed, a run taken up, a stack put back), and whose outputs stand at the front of the tree; only who has is
woken.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from panels.drawn import Drawn

QUIET = dict(queue=False, show_progress="hidden", api_visibility="private")
_log = logging.getLogger("locus")


class Waker(Drawn):
    """Hears that its panel has something to do: `ask`, of the values of `asked_of`, says what, None for
    nothing. Unseen, at the front of the page and outside all tabs: one that was not opened yet hears
    nothing."""

    ask: Callable[..., Any] = staticmethod(lambda: None)  # no options: those are sent to the page
    asked_of: Sequence[Any] = ()

    def __init__(self, **options: Any) -> None:
        context = gr.context.Context
        inside, context.block = context.block, context.root_block
        options = {"visible": "hidden", **options}
        try:
            super().__init__({"asked": False}, "<div></div>", "wake", **options)
            if context.root_block is not None:
                context.root_block.children.remove(self)
                context.root_block.children.insert(0, self)
        finally:
            context.block = inside


def when_asked(
    ask: Callable[..., Any],
    inputs: Sequence[Any],
    act: Callable[..., Any],
    also: Sequence[Any],
    outputs: Sequence[Any],
    **how: Any,
) -> Any:
    """On loading, ask(*inputs) says what is to be done, None where nothing is; act(that, *also) does it, with
    all its outputs. Returns act's event. ask is called twice: the page need not carry what it said."""
    waker, count = Waker(), len(inputs)
    waker.ask, waker.asked_of = ask, list(inputs)

    def at_once(request: gr.Request, *given: Any) -> Any:
        wanted = _told(ask, given[:count], request)
        if wanted is None:
            return {outputs[0]: gr.skip()}
        return _told(act, [wanted, *given[count:]], request)

    def streamed(request: gr.Request, *given: Any) -> Iterator[Any]:
        wanted = _told(ask, given[:count], request)
        if wanted is None:
            yield {outputs[0]: gr.skip()}
        else:
            yield from _told(act, [wanted, *given[count:]], request)

    done = streamed if inspect.isgeneratorfunction(inspect.unwrap(act)) else at_once
    return waker.select(done, [*inputs, *also], outputs, api_name=act.__name__, **how)


def wire(page: gr.Blocks) -> None:
    """The event that asks them all. A panel that fails is passed over, the others are not."""
    wakers = [block for block in page.blocks.values() if isinstance(block, Waker)]

    def awaited(request: gr.Request, *given: Any) -> list[Any]:
        values, found = list(given), []
        for waker in wakers:
            mine, values = values[: len(waker.asked_of)], values[len(waker.asked_of) :]
            try:
                wanted = _told(waker.ask, mine, request) is not None
            except Exception:
                _log.exception("a page could not be asked what is to be done")
                wanted = False
            found.append({"asked": True} if wanted else gr.skip())
        return found

    inputs = [component for waker in wakers for component in waker.asked_of]
    # not through the queue: of several short answers there at once some are lost while a page begins
    page.load(awaited, inputs, list(wakers), **QUIET)


def _told(handler: Callable[..., Any], values: Sequence[Any], request: gr.Request) -> Any:
    """handler(*values), with the request where it wants one."""
    wants = "request" in inspect.signature(handler).parameters
    return handler(*values, **({"request": request} if wants else {}))

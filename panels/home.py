"""The head of the page: what this studio is, which models are ready, what fits, which panel answers what.

It stands above the tabs, so that a panel can be used at once; a person opens and closes it, the browser keeps
that. Drawn by assets/js/home.js; the tour is assets/js/tour.js, light and dark assets/js/theme.js.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import gradio as gr

from panels.drawn import Drawn
from panels.models_view import size_text
from panels.running import QUIET
from studio.models.device import device_name, free_memory, whole_memory
from studio.models.listing import KINDS, Room, known_models
from studio.run_index import RunIndex, Summary, texts_of
from studio.run_quota import Watch
from studio.session import Session

RECENT = 4  # runs that are shown
KEYS = (
    ("Ctrl+Enter", "runs"),
    ("Esc", "stops"),
    ("Alt+1, Alt+2 …", "change the tab"),
    ("arrow keys, Enter", "move in a map and pick"),
)


class Home(Drawn):
    """The head of the page; its value is made by `as_value`."""

    def __init__(self, value: dict[str, Any], **options: Any) -> None:
        super().__init__(value, "<div class='home'></div>", "home", "home", **options)


def build(session: Session, panels: Sequence[Any]) -> None:
    """Builds it inside the present Blocks; what changes is looked up again when a page is loaded."""
    index, watch = RunIndex(session.store), Watch(session.store)

    def now() -> dict[str, Any]:
        return as_value(session, panels, index.all()) | {"store": watch.said()}

    home = Home(as_value(session, panels, []), elem_id="home")
    gr.context.Context.root_block.load(now, None, home, **QUIET)


def as_value(session: Session, panels: Sequence[Any], runs: Sequence[Summary]) -> dict[str, Any]:
    """What the head shows: this machine, models that are ready, panels with their questions, recent runs."""
    free, whole = free_memory(session.device), whole_memory(session.device)
    room = Room(session.budget(), free, whole)
    rows = known_models(session.models_folder, session.dtype)
    ready, away = [r for r in rows if r.ready], [r for r in rows if not r.ready and not r.fault]
    kinds = [(KINDS[k], [r.name for r in ready if r.kind == k]) for k in KINDS]
    return {
        "machine": f"{device_name(session.device)}, {size_text(free)} of {size_text(whole)} memory free",
        "ready": [{"kind": kind, "names": names} for kind, names in kinds if names],
        "fits": sum(room.fits(r.need) == "fits" for r in away),
        "away": len(away),
        "panels": [{"tab": p.TITLE.lower(), "title": p.TITLE, "question": p.QUESTION} for p in panels],
        "runs": [_shown(s) for s in runs if not s.fault][:RECENT],
        "keys": [list(pair) for pair in KEYS],
    }


def _shown(run: Summary) -> dict[str, str]:
    """A recent run: what it was asked about, by which method, when."""
    words = " · ".join(t for t in texts_of(run.inputs) if not t.startswith("/")) or run.method
    title = f"{run.method}: {words if len(words) <= 32 else words[:31] + '…'}"
    try:
        when = f"{datetime.fromisoformat(run.started):%d %b %H:%M} UTC"
    except ValueError:
        when = ""
    return {"id": run.id, "title": title, "about": ", ".join(filter(None, (words[:300], run.model, when)))}

"""The studio in the browser: PANELS in tab order, and the page that holds them."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio at import: no outside host is ever asked

import gradio as gr

from panels import api, decompose, edit, home, localize, models, retrieval, runs, trace, waking
from panels.gate import Page
from studio.session import Session

PANELS = (trace, localize, edit, decompose, retrieval, runs, models)


def build(session: Session) -> gr.Blocks:
    """The whole page."""
    with Page(title="Locus", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        session.hub.asks = True  # in the browser a download is agreed to first
        home.build(session, PANELS)
        with gr.Tabs(elem_id="panels"):
            for panel in PANELS:
                with gr.Tab(panel.TITLE, id=panel.TITLE.lower(), elem_id=f"tab-{panel.TITLE.lower()}"):
                    panel.build(session)
        api.build(session)
        waking.wire(page)
    page.queue(api_open=False, default_concurrency_limit=None, max_size=256)
    return page

"""The base of what page script draws from data: a constant template, one stylesheet, one script, a value."""

from __future__ import annotations

from typing import Any

import gradio as gr

from studio.models.catalog import ASSETS


class Drawn(gr.HTML):
    """An HTML component whose value is an object that `assets/js/SCRIPT.js` draws into `template`, styled by
    `assets/css/STYLE.css`; text is never put through the template. `assets/js/drawn.js` stands before the
    script."""

    def __init__(
        self, value: dict[str, Any], template: str, script: str, style: str | None = None, **options: Any
    ) -> None:
        super().__init__(
            value=value,
            html_template=template,
            css_template=(ASSETS / "css" / f"{style}.css").read_text() if style else "",
            js_on_load="\n".join((ASSETS / "js" / f"{n}.js").read_text() for n in ("drawn", script)),
            apply_default_css=False,
            padding=False,
            **options,
        )

    def api_info(self) -> dict[str, Any]:
        """The value is an object."""
        return {"type": "object"}


def grid_template(name: str) -> str:
    """A focusable place for a figure, and the line that says what is under the cursor."""
    return (
        f"<div class='map' tabindex='0' role='grid' aria-label='{name}'></div>"
        "<div class='said' aria-live='polite'></div>"
    )

"""The Decompose panel's search: images in the order of what some components see, by a text or beside the
image that was clicked; the components are named, or are those that carry a property."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from panels import decompose_images as pictured
from panels import widgets
from panels.decompose_images import PRESS
from panels.running import STREAM
from studio.errors import RequestError
from studio.registry import find_method
from studio.session import Session
from studio.types import Recipe, Result

METHOD = "retrieve-images"
FIELDS = ("by", "like")  # of this view alone, besides its knobs
BY = [("a text", "text"), ("likeness to the clicked image", "image")]
PROPERTY = "property"  # its name where several texts describe it


def fields() -> dict[str, Any]:
    """What orders the images, hidden until the view is chosen."""
    look, text = dict(visible=False), widgets.own("text", find_method(METHOD))
    said = "The images come in the order of what the chosen components add for it."
    return {
        text: gr.Textbox(label="Text", info=said, max_length=20_000, elem_id=f"decompose-{text}", **look),
        "by": gr.Radio(BY, value="text", label="Order by", elem_id="decompose-find-by", **look),
        "like": gr.Textbox(
            label="Reference image",
            info="For likeness: click an image above.",
            max_length=300,
            elem_id="decompose-like",
            **look,
        ),
    }


def outputs() -> dict[str, Any]:
    """The property that components are chosen for."""
    return {
        "property": gr.Textbox(
            label="Property",
            lines=2,
            max_lines=8,
            max_length=20_000,
            info="Texts that describe it, one a line, such as red, green and blue; or one word.",
            elem_id="decompose-property",
        ),
        "carry": gr.Button(
            "Order through the components that carry it", size="sm", elem_id="decompose-carry"
        ),
    }


class Find:
    """The handlers."""

    def __init__(self, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        self.session, self.form, self.out = session, form, out
        self.text = form[widgets.own("text", find_method(METHOD))]

    def wire(self) -> None:
        """Connects the gallery and the button."""
        form, out = self.form, self.out
        form["gallery"].select(widgets.guarded(self.reference), form["images"], form["like"], **STREAM)
        moved = out["carry"].click(
            widgets.guarded(self.carried),
            [out["property"], out["by"], out["text"], form["texts"]],
            [form[n] for n in ("features", "feature", "components", "by")] + [self.text, form["method"]],
            **STREAM,
        )
        moved.success(None, None, None, js=PRESS)

    def reference(self, event: gr.SelectData, set_id: str) -> str:
        """The file name of the thumbnail that was clicked."""
        files = pictured.files_of(self.session, set_id)
        if not isinstance(event.index, int) or not 0 <= event.index < len(files):
            raise RequestError("That is none of the images.")
        return files[event.index].name

    def carried(self, given: str, by: str, text: str | None, texts: str) -> list[Any]:
        """Values of features, feature, components, by, text and view, for the property in the box."""
        lines = widgets.split_lines(given or "")
        if not lines:
            raise RequestError("Which property? Write texts that describe it, one a line.")
        features = f"{PROPERTY}: {' | '.join(lines)}" if len(lines) > 1 else ""
        first = (widgets.split_lines(texts or "") or [""])[0]
        return [features, PROPERTY if features else lines[0], "", by, text or first, METHOD]

    def asked(self, asked: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """The knobs with the text, or the clicked image, by which the images are ordered."""
        if given["by"] != "image":
            if not (asked["text"] or "").strip():
                raise RequestError("No text is given; write the one by which the images are ordered.")
            return asked | {"like": None}
        files = {f.name: f for f in pictured.files_of(self.session, given["images"])}
        name = (given["like"] or "").strip()
        if name not in files:
            raise RequestError(
                f"{name[:60]!r} is none of the images; click one of them."
                if name
                else "Click an image first; the others come in the order of their likeness to it."
            )
        return asked | {"text": None, "like": str(files[name])}

    def restored(self, recipe: Recipe) -> dict[Any, Any]:
        """What a kept run was ordered by."""
        like = recipe.inputs.get("like")
        return {self.form["by"]: "image" if like else "text", self.form["like"]: Path(like or "").name}

    def ordered(self, recipe: Recipe, result: Result) -> dict[Any, Any]:
        """All images of a run, from high to low."""
        score = result.arrays["score"]
        files = pictured.by_label(self.session, recipe.inputs.get("images"))
        found = sorted(zip(score.axis("image").labels, score.values, strict=True), key=lambda p: -p[1])
        shown = [(files[name], f"{value:+.3f} {Path(name).stem}") for name, value in found if name in files]
        names = ", ".join(result.values["components"])
        what = f"“{result.values['query']}”"
        what = what if result.values["by"] == "text" else f"likeness to {Path(result.values['query']).stem}"
        said = f"{len(found)} images by {what} through {names}."
        return {
            self.out["order-said"]: said if shown else f"{said} {pictured.LOST}",
            self.out["order"]: gr.update(
                value=pictured.pictures(*zip(*shown, strict=True)) if shown else [], visible=bool(shown)
            ),
        }

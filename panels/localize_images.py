"""A person's own images of the concept in the Localize panel, for the objective amplify: uploaded, and kept
by the store under the id of their set, which is all that the page holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from panels import widgets
from panels.running import QUIET
from studio.errors import RequestError
from studio.images import ENDINGS
from studio.session import Session
from studio.types import Recipe
from studio.uploads import Uploads

LABEL = "Your own images of the concept, to amplify it"


def fields() -> dict[str, Any]:
    """The inputs: where files are dropped, and the hidden id of their set."""
    endings = sorted(ENDINGS)
    look = dict(file_count="multiple", file_types=endings, height=130, visible=False)
    return {
        "own_images": gr.File(label=LABEL, elem_id="localize-own-images", **look),
        "image_set": gr.Textbox("", visible="hidden", elem_id="localize-image-set"),
    }


class OwnImages:
    """Handlers of the upload. `form` and `out` are the panel's."""

    def __init__(self, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        self.uploads, self.form, self.out = Uploads(session.store), form, out

    def wire(self) -> None:
        """Connects the upload."""
        shown = [self.form["image_set"], self.form["own_images"], self.out["status"]]
        self.form["own_images"].change(self.keep, self.form["own_images"], shown, **QUIET)

    def keep(self, files: Sequence[str] | None) -> tuple[Any, Any, Any]:
        """Files were given or taken away: (id of their set, the upload, the status line)."""
        if not files:
            return "", gr.skip(), gr.skip()
        try:
            images = [Path(f) for f in files if Path(f).suffix.lower() in ENDINGS]
            if not images:
                raise RequestError(f"None of these files is an image; images end in {', '.join(ENDINGS)}.")
            found = self.uploads.keep(images)
        except Exception as error:
            return "", gr.File(value=None, label=LABEL), widgets.spoken(error)
        return (
            found,
            gr.File(label=LABEL),
            f"{len(images)} image{'s' if len(images) > 1 else ''} of the concept.",
        )

    def asked(self, set_id: Any) -> list[str] | None:
        """What a recipe names as images: the folder of the set, or nothing."""
        return [str(self.uploads.folder(str(set_id)))] if set_id else None

    def restored(self, recipe: Recipe) -> dict[Any, Any]:
        """The set of a kept run's images, where the store still has it."""
        named = [Path(i).name for i in recipe.inputs.get("images") or ()]
        try:
            kept = named[0] if len(named) == 1 and self.uploads.folder(named[0]) else ""
        except RequestError:
            kept = ""
        label = f"{LABEL}: those of this run" if kept else LABEL
        return {
            self.form["image_set"]: gr.update(value=kept),
            self.form["own_images"]: gr.update(label=label),
        }

"""The Edit panel's downloads: the stack as one edit file, as a LoRA, or in the weights of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from panels import widgets
from panels.edit_stack import Stack
from panels.edit_view import Pictures
from panels.running import QUIET
from studio.edit_export import composed, export_edits
from studio.errors import RequestError
from studio.exports import new_folder, zipped
from studio.session import Session
from studio.store import write_edit

MOST_ZIPPED = 4 * 10**9  # bytes of weights that a browser downloads


class Downloads:
    """Handlers of the buttons save, lora and full; what they made stands under "file"."""

    def __init__(self, session: Session, pictures: Pictures, out: dict[str, Any]) -> None:
        self.session, self.pictures, self.out = session, pictures, out

    def wire(self, looks: list[Any]) -> None:
        """Connects the buttons; `looks` begins with the stack and the model's name."""
        for name, make in (("save", self.edit_file), ("lora", self.lora), ("full", self.whole)):
            shown = [self.out["file"], self.out["status"]]
            self.out[name].click(self._offered(make), looks, shown, **QUIET)

    def _offered(self, make: Callable[[list, str, str], Path]) -> Callable:
        """The handler that offers the file which `make` writes, or says why there is none."""

        def handler(request: gr.Request, stack: Stack, model: str, *_: Any) -> dict:
            try:
                if not stack.active():
                    raise RequestError("There is nothing to save: no edit in the stack is on.")
                active = [self.session.shelf.open(entry) for entry in self.pictures.entries(stack)]
                file = make(active, model, str(request.session_hash))
            except Exception as error:
                return {self.out["status"]: widgets.spoken(error)}
            shown = gr.File(value=str(file), visible=True)
            return {self.out["file"]: shown, self.out["status"]: f"{file.name} is ready."}

        return handler

    def edit_file(self, active: list, model: str, user: str) -> Path:
        """The whole stack as one edit file."""
        target = new_folder() / "edit.safetensors"
        write_edit(self.session.call(model, lambda m: composed(m, active), user=user), target)
        return target

    def lora(self, active: list, model: str, user: str) -> Path:
        """The whole stack as a LoRA in diffusers' layout."""
        target = new_folder() / "pytorch_lora_weights.safetensors"
        self.session.call(model, lambda m: export_edits(m, active, lora=target, full=None), user=user)
        return target

    def whole(self, active: list, model: str, user: str) -> Path:
        """The pipeline with the stack in its weights, as a zip of its diffusers folder; RequestError for one
        that is too large to download."""
        folder = new_folder() / "edited"

        def write(loaded: Any) -> None:
            if (size := loaded.nbytes()) > MOST_ZIPPED:
                raise RequestError(
                    f"{model} has {size / 1e9:.1f} GB of weights, too much to download; save the edit file, "
                    "then `locus export-edit FILE --full DIR` writes the folder."
                )
            export_edits(loaded, active, lora=None, full=folder)

        self.session.call(model, write, user=user)
        return zipped(folder)

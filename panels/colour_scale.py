"""One colour scale for several runs: a field (low, high) that a panel's maps, its token strip and its files
follow, so that equal colours are equal numbers whichever run is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from panels import widgets
from panels.running import STREAM, Running
from studio.errors import RequestError
from studio.figures import FORMATS
from studio.palette import read_scale

Updates = dict[Any, Any]
Redrawn = Callable[..., Updates]


def field(panel: str) -> gr.Textbox:
    """The input of the scale; it keeps its text from run to run."""
    return gr.Textbox(
        label="Colour scale: low, high (the same in several runs)",
        placeholder="the map's own, or -0.1, 0.5",
        max_length=60,
        max_lines=1,
        elem_id=f"{panel}-scale",
    )


class ColourScale:
    """The handlers of a panel's field, which is its output "scale".

    maps: names of the panel's outputs that take the scale. redrawn(recipe, result, *also): updates of these
    for the run on screen, in their own colours; empty where none of them shows numbers. also: inputs on which
    they depend, such as the text that a map is for.
    """

    def __init__(
        self, panel: Running, maps: Sequence[str], redrawn: Redrawn, also: Sequence[Any] = ()
    ) -> None:
        self.panel, self.redrawn, self.also = panel, redrawn, also
        self.field, self.maps = panel.out["scale"], [panel.out[name] for name in maps]
        self.put_on = gr.State(None)  # (run, scale) of the maps, whose files are made or on their way
        panel.named[self.field] = "scale"  # so that Run is told of it

    def wire(self, *ended: Any) -> list[Any]:
        """Connects the field, and the events after which a run is on screen; returns the field's events."""
        out = self.panel.out
        asked = [self.panel.state, self.put_on, self.field, *self.also]
        shown = [out["status"], self.put_on, *self.maps, *out["export"].values()]
        for event in ended:
            event.then(self.again, asked, shown, **STREAM)
        latest = dict(trigger_mode="always_last", **STREAM)
        return [on(self.typed, asked, shown, **latest) for on in (self.field.submit, self.field.blur)]

    def put(self, update: Updates, text: str | None) -> Updates:
        """The update with its maps in the field's colours. A text that is no scale, which the status line has
        said, leaves them as they are."""
        try:
            scale = read_scale(text or "")
        except RequestError:
            return update
        return self._in(update, scale)

    def _in(self, update: Updates, scale: tuple[float, float] | None) -> Updates:
        """The update with its maps in these colours, in their own for None."""
        for place in self.maps:
            value = update.get(place)
            value = value.get("value") if isinstance(value, dict) and "__type__" in value else value
            if scale and isinstance(value, dict) and value.get("scale"):
                value["scale"] = list(scale)
        return update

    def streamed(self, updates: Iterator[Updates], values: dict[Any, Any]) -> Iterator[Updates]:
        """The updates of a run that goes on, in the colours that stood in the field when it began; `values`:
        all inputs of Run."""
        for update in updates:
            yield self.put(update, values.get(self.field))

    def again(self, kept: dict | None, _: Any, text: str | None, *also: Any) -> Iterator[Updates]:
        """A run came on screen: its maps, then its files, in the field's colours. Without a scale both have
        their own already."""
        try:
            scale, run = read_scale(text or ""), (kept or {}).get("run")
            yield {self.put_on: (run, None)}
            if run and scale:
                yield from self.recoloured(kept, scale, *also)
        except Exception as error:
            yield {self.panel.out["status"]: widgets.spoken(error)}

    def typed(self, kept: dict | None, put_on: Any, text: str | None, *also: Any) -> Iterator[Updates]:
        """A scale was typed; the status line says what the colours are."""
        status = self.panel.out["status"]
        try:
            scale, run = read_scale(text or ""), (kept or {}).get("run")
            if not run or put_on == (run, scale):
                yield {status: gr.skip()}
                return
            told = f"run from {scale[0]:g} to {scale[1]:g}" if scale else "have the map's own scale"
            for update in self.recoloured(kept, scale, *also):
                yield {status: f"Colours {told}, here and in the files.", **update}
        except Exception as error:
            yield {status: widgets.spoken(error)}

    def recoloured(self, kept: dict, scale: tuple[float, float] | None, *also: Any) -> Iterator[Updates]:
        """The maps on screen, then the files, in these colours; nothing where there are no numbers."""
        panel = self.panel
        redrawn = self.redrawn(*panel.measured(kept), *also)
        if not redrawn:
            yield {panel.out["status"]: gr.skip()}
            return
        maps = self._in({place: redrawn[place] for place in self.maps if place in redrawn}, scale)
        yield {self.put_on: (kept["run"], scale), **maps}
        yield widgets.exported(panel.session.store.path(kept["run"]), panel.out["export"], scale, FORMATS)

"""What runs beside the Decompose panel's own run: a head's map over the image, and the same run of a second
model. Stop ends both, a further click replaces the one before, and leaving the page ends them too."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from panels import bars, decompose_form, decompose_view, heatmap, widgets
from panels import decompose_images as pictured
from studio.errors import Cancelled, RequestError, StudioError
from studio.jobs import Job
from studio.methods.vit_decomposition import HEAD
from studio.methods.word_maps import overlay
from studio.session import Session
from studio.types import Recipe, Result, Run

Updates = dict[Any, Any]


@dataclass(frozen=True)
class _Asked:
    """A map over an image that was asked for: the run that makes it, of which image, head and text."""

    recipe: Recipe
    file: Path
    image: str
    head: str
    text: str


class Side:
    """The handlers. measured: recipe and results of what is on screen; put: see colour_scale.ColourScale."""

    def __init__(
        self, session: Session, form: dict[str, Any], out: dict[str, Any], measured: Callable, put: Callable
    ) -> None:
        self.session, self.form, self.out, self.measured, self.put = session, form, out, measured, put
        self.jobs: dict[tuple[str, str], Job] = {}  # by page and what it is for
        self.viewers = {"map": widgets.Viewers(), "model": widgets.Viewers()}
        self.shown = {
            "map": [out[n] for n in ("where", "spread", "status")] + [form["stop"]],
            "model": [out[n] for n in ("beside", "beside-said", "beside-answers", "second", "status")]
            + [form["stop"]],
        }

    def wire(self) -> None:
        """Leaving the page stops what it watches."""

        def leave(request: gr.Request) -> None:
            for viewers in self.viewers.values():
                viewers.leave(str(request.session_hash))

        gr.context.Context.root_block.unload(leave)

    def stop(self, page: str) -> bool:
        """Stops what this page runs besides; whether there was something."""
        mine = [job for (owner, _), job in list(self.jobs.items()) if owner == page and not job.over]
        for job in mine:
            job.cancel()
        return bool(mine)

    def _run(
        self, page: str, kind: str, recipe: Recipe, line: Any, save: bool
    ) -> Generator[Updates, None, Run | None]:
        """Updates while a recipe runs, then its run; None when another took its place. Raises what it
        raised."""
        job = self.session.submit(recipe, user=page, save=save)
        before, self.jobs[page, kind] = self.jobs.get((page, kind)), job
        if before is not None:
            before.cancel()
        self.viewers[kind].watch(page, job)
        for _ in widgets.follow(job):
            if not job.over:
                said = f"{recipe.model}: {widgets.status(job, self.session.queue.position(job))}"
                stop = gr.Button(interactive=not job.stopping)
                yield {line: gr.update(value=said, visible=True), self.form["stop"]: stop}
        if self.jobs.get((page, kind)) is not job:
            return None
        del self.jobs[page, kind]
        if job.error:
            raise job.error
        return job.run

    def _ended(self, error: Exception | None = None) -> Updates:
        stopped = {self.out["status"]: "Stopped."} if isinstance(error, Cancelled) else {}
        return {self.form["stop"]: gr.Button(interactive=False), **stopped}

    # ---- a second model -----------------------------------------------------------------------------------

    def beside(
        self,
        request: gr.Request,
        kept: dict | None,
        name: str | None,
        text: str,
        image: str,
        scale: str | None = None,
    ) -> Iterator[Updates]:
        """The same run of another model, whose map and answers stand below and whose run is kept for the
        tables; once it was made it comes from the store."""
        figure, line, cosines = (self.out[n] for n in ("beside", "beside-said", "beside-answers"))
        hidden = gr.update(visible=False)
        none = {figure: hidden, cosines: hidden, self.out["second"]: None}
        if not name or not kept:
            yield none | {line: hidden}
            return
        try:
            recipe, _ = self.measured(kept)
            if pictured.set_of(self.session, recipe.inputs.get("images")) is None:
                raise RequestError(pictured.LOST)
            params = {k: v for k, v in recipe.params.items() if k not in ("clip", "aligner")}
            asked = Recipe(recipe.method, name, recipe.inputs, decompose_form.space(name, params), ())
            run = yield from self._run(str(request.session_hash), "model", asked, line, True)
            if run is None:
                return
            map_ = heatmap.as_value(decompose_view.layer_map(run.result, text or None, image), True)
        except Exception as error:
            said = gr.update(value=f"{name}: {widgets.spoken(error)}", visible=True)
            yield {**none, line: said, **self._ended(error)}
            return
        said = gr.update(value=f"{name}, for the same images and texts:", visible=True)
        seen = self.put({figure: gr.update(value=map_, visible=True)}, scale)
        each = decompose_view.answers(run.result, image)
        seen[cosines] = gr.update(value=bars.as_value(each, True), visible=True) if each else hidden
        yield {**seen, line: said, self.out["second"]: {"run": run.id}, **self._ended()}

    def second(self, kept: dict | None, recipe: Recipe, result: Result) -> dict[str, Result]:
        """{model: result} of the model beside it, when its run is for the images and texts on screen."""
        if not kept or not {"scores", "contributions"} <= set(result.arrays):
            return {}
        try:
            other, found = self.measured(kept)
        except StudioError:
            return {}
        same = other.model != recipe.model and "scores" in found.arrays and other.inputs == recipe.inputs
        return {other.model: found} if same else {}

    # ---- a head's map over the image ----------------------------------------------------------------------

    def look(
        self, request: gr.Request, kept: dict | None, text: str, image: str, component: str | None
    ) -> Iterator[Updates]:
        """Where in the image the clicked head looks: a quick run with its key tokens."""
        page, line = str(request.session_hash), self.out["spread"]
        try:
            asked = self._question(*self.measured(kept), text, image, component or "")
            if isinstance(asked, str):
                yield self._map(None, asked)
                return
            run = yield from self._run(page, "map", asked.recipe, line, False)
            if run is None:
                return
            picture, said = self._drawn(page, asked, run.result)
        except Exception as error:
            yield self._map(None, widgets.spoken(error)) | self._ended(error)
            return
        yield self._map(picture, said) | self._ended()

    def _map(self, picture: np.ndarray | None, said: str) -> Updates:
        shown = gr.update(value=picture, visible=picture is not None)
        return {self.out["where"]: shown, self.out["spread"]: gr.update(value=said, visible=bool(said))}

    def _question(
        self, recipe: Recipe, result: Result, text: str, image: str, component: str
    ) -> _Asked | str:
        """What to run, or the sentence why there is no map ("" where none is expected)."""
        if recipe.method != "decompose" or "scores" not in result.arrays:
            return ""
        if not HEAD.fullmatch(component):
            return f"{component} has no map over the image; heads have."
        text = text or result.arrays["scores"].axis("text").labels[0]
        image = image or decompose_view.extremes(result, component, text)[0][0]
        file = pictured.by_label(self.session, recipe.inputs.get("images")).get(image)
        if file is None:
            return pictured.LOST
        params = {**recipe.params, "granularity": "token", "heads": [component]}
        asked = Recipe("decompose", recipe.model, {"images": [str(file)], "texts": [text]}, params, ())
        return _Asked(asked, file, image, component, text)

    def _drawn(self, page: str, asked: _Asked, result: Result) -> tuple[np.ndarray, str]:
        """(the image as the model sees it with the head's scores over it, the sentence about them)."""
        tokens = result.arrays["token_scores"]
        grid, others = decompose_view.token_grid(tokens.axis("token").labels, tokens.values[0, :, 0])
        seen = self.session.call(asked.recipe.model, lambda m: _seen(m, asked.file), user=page, kind="vision")
        heat = Image.fromarray(grid.astype(np.float32)).resize(seen.shape[1::-1], Image.Resampling.NEAREST)
        said = decompose_view.token_sentence(asked.head, asked.text, grid, others)
        return overlay(seen, np.asarray(heat)), f"{Path(asked.image).stem}: {said}"


def _seen(model: Any, file: Path) -> np.ndarray:
    """(H, W, 3) uint8: an image after the model's preprocessing, from its least value to its largest."""
    pixels = model.pixels([pictured.read_image(file)[0]])[0].float().cpu().numpy()
    spread = max(float(np.ptp(pixels)), 1e-12)
    return ((pixels - pixels.min()) / spread * 255).round().astype(np.uint8).transpose(1, 2, 0)

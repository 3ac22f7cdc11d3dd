"""The Retrieval panel: did a language model read its answer in the context, or remember it?"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from panels import (
    bars,
    colour_scale,
    heatmap,
    prompt_file,
    retrieval_form,
    retrieval_groups,
    retrieval_view,
    token_strip,
    widgets,
)
from panels.retrieval_form import HINT, METHODS, TEXTS
from panels.retrieval_view import ASK
from panels.running import QUIET, STREAM, Running
from studio.errors import RequestError, StudioError
from studio.figures import number
from studio.jobs import Job
from studio.methods.language_prompt import Asked, spans
from studio.models.tokens import find_span
from studio.registry import find_method, parse_seeds
from studio.retrieval import joined, retrieve
from studio.session import Session
from studio.types import Recipe, Result

TITLE = "Retrieval"
NEEDS = "language"
QUESTION = "Did the model read its answer in the context, or did it remember?"
_KEPT = 32  # tokenized prompts


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = retrieval_form.form()
            prompts = prompt_file.build("retrieval")
        with gr.Column(scale=5, min_width=320):
            out = retrieval_form.outputs()
    panel = _Panel("retrieval", session, form, out)
    panel.wire()
    prompt_file.PromptFile(panel, prompts).wire()


class _Panel(Running):
    """The panel's handlers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        knobs = widgets.knobs([find_method(m) for m in METHODS])
        self.switched = [n for n in self.form if n in knobs or n.startswith("window-")]
        maps, also = ["figure", "strip"], [self.out["quantity"]]
        self.colours = colour_scale.ColourScale(self, maps, self.redrawn, also)
        self._lock = threading.Lock()
        self._prompts: OrderedDict[tuple, Any] = OrderedDict()

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        self.colours.wire(*self.wire_run(form["prompt"].submit), self.reopened)
        fixed = [*(n for n in self.switched if n not in TEXTS), "seeds"]
        form["method"].change(
            lambda name: self.switch(name, fixed), form["method"], [form[n] for n in fixed], **QUIET
        )
        texts = [form["model"], *(form[n] for n in TEXTS[:4])]
        typed = [*(form[n].blur for n in TEXTS[:4]), form["model"].change]
        seen = [self.state, *texts]
        gr.on(typed, self.tokens, seen, out["strip"], trigger_mode="always_last", **STREAM)
        often = dict(trigger_mode="multiple", **QUIET)
        clicked = [self.cell, out["text"], out["heads"], out["side"]]
        out["figure"].select(self.answering(self.click), self.state, clicked, **often)
        beside = [self.state, self.cell]
        out["side"].select(self.answering(self.beside), beside, [out["text"], out["heads"]], **often)
        told = [form[n] for n in ("subject", "subject_occurrence", "attribute", "attribute_occurrence")]
        selected = [*told, out["text"], out["heads"], out["strip"]]
        chosen = out["strip"].select(self.answering(self.select), [self.state, *texts], selected, **often)
        # a strip of the fields as they were before may still be on its way, and would take its place
        chosen.then(self.tokens, seen, out["strip"], trigger_mode="always_last", **STREAM)
        coloured = [self.state, out["quantity"], out["scale"]]
        recoloured = [out["strip"], out["text"]]
        out["quantity"].input(self.answering(self.put_colours), coloured, recoloured, **often)
        found = [form["context"], out["status"]]
        passages = [form[n] for n in ("prompt", "passages", "files", "folder", "count")]
        done = form["find"].click(self.find, passages, found, **QUIET)
        done.then(self.tokens, seen, out["strip"], **STREAM)

    def answering(self, handler: Callable[..., dict]) -> Callable[..., dict]:
        """The handler of a click whose refusal stands where its answer would."""

        @wraps(handler)
        def run(*args: Any) -> dict:
            try:
                return handler(*args)
            except Exception as error:
                return {self.out["text"]: widgets.spoken(error)}

        return run

    def switch(self, name: str, fixed: list[str]) -> list[Any]:
        """Another view was chosen: its own knobs show."""
        chosen = find_method(name)
        mine = {*widgets.knobs([chosen]), widgets.own("window", chosen)}
        mine |= {"seeds"} if chosen.samples else set()
        if widgets.own("window", chosen) in self.form:
            mine.discard("window")
        return [gr.update(visible=knob in mine) for knob in fixed]

    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe."""
        method = find_method(given["method"])
        asked = widgets.asked(method, given)
        for name in TEXTS:
            asked[name] = asked.get(name) or None
        if not asked["context"]:
            asked["context"] = None
        seeds = parse_seeds(method, given["seeds"]) if method.samples else ()
        return Recipe(method.name, given["model"] or "", asked, {}, seeds)

    # ---- the prompt ---------------------------------------------------------------------------------------

    def encoded(self, model: str, context: str | None, prompt: str, user: str | None) -> Any:
        """The tokenized prompt; None when it was not tokenized yet and nobody (`user`) waits for it."""
        key = (model, context or "", prompt)
        with self._lock:
            if key in self._prompts or user is None:
                return self._prompts.get(key)
        found = self.session.call(
            model, lambda m: m.encode(prompt, context or None), user=user, kind="language"
        )
        with self._lock:
            self._prompts[key] = found
            while len(self._prompts) > _KEPT:
                self._prompts.popitem(last=False)
        return found

    def prompt_of(self, recipe: Recipe, user: str | None) -> Any:
        """A recipe's tokenized prompt; see `encoded`."""
        return self.encoded(recipe.model, recipe.inputs.get("context"), recipe.inputs["prompt"], user)

    def tokens(self, request: gr.Request, kept: dict | None, model: str, *texts: str) -> Any:
        """The strip of what stands in the fields, unless its colours are on screen; a fault is said in the
        strip's place."""
        context, prompt, subject, attribute = texts
        try:
            if kept and self.same_texts(self.measured(kept)[0], model, *texts):
                return gr.skip()
            found = self.encoded(model, context, prompt, str(request.session_hash))
        except Exception as error:
            return {"hint": widgets.spoken(error)}
        return token_strip.as_value(found, _roles(found, context, prompt, subject, attribute))

    def same_texts(self, recipe: Recipe, model: str, *texts: str) -> bool:
        """Whether a run asked what stands in the fields."""
        asked = [recipe.inputs.get(n) or "" for n in TEXTS[:4]]
        return recipe.model == model and asked == list(texts)

    def select(
        self,
        event: gr.EventData,
        request: gr.Request,
        kept: dict | None,
        model: str,
        context: str,
        prompt: str,
        subject: str,
        attribute: str,
    ) -> dict:
        """Words were selected in the strip: subject (in the question) or attribute (in the context). A click
        on one token says its numbers."""
        form, out = self.form, self.out
        found = self.encoded(model, context, prompt, str(request.session_hash))
        first, last = token_strip.chosen(event, found)
        if not getattr(event, "range", False):
            return self.one_token(kept, found, first)
        start, end = found.offsets[first][0], found.offsets[last][1]
        text = found.text[start:end]
        start += len(text) - len(text.lstrip())
        part, question = text.strip(), found.question_span[0]
        if not part:
            raise RequestError("That is no text; select words.")
        if start < question < end:
            raise RequestError("Select words of the context or of the question, not of both.")
        name = "subject" if start >= question or not context else "attribute"
        within, at = (prompt, start - question) if name == "subject" else (context, start)
        told = {"subject": subject, "attribute": attribute} | {name: part}
        strip = token_strip.as_value(found, _roles(found, context, prompt, **told), again=True)
        return {
            form[name]: part,
            form[f"{name}_occurrence"]: _occurrence(within, part, at),
            out["text"]: f"{part!r} is the {name} now. Press Run.",
            out["strip"]: strip,
        }

    def one_token(self, kept: dict | None, found: Any, token: int) -> dict:
        """What is known of one token."""
        if not kept or not ("run" in kept or "job" in kept):
            return {self.out["text"]: f"Token {token}, {found.tokens[token]!r}. Press Run for its numbers."}
        recipe, result = self.measured(kept)
        return {self.out["text"]: retrieval_view.token_sentence(recipe, result, token, found.tokens[token])}

    def find(self, prompt: str, passages: str, files: list | None, folder: list | None, count: float) -> dict:
        """The best passages for the question become the context."""
        try:
            texts = [("", passages)] + [
                (Path(f).name, _read(Path(f))) for f in [*(files or []), *(folder or [])]
            ]
            found = retrieve(prompt, texts, int(count or 3))
        except Exception as error:
            return {self.out["status"]: widgets.spoken(error)}
        said = f"{len(found)} passages found, the best with a BM25 score of {found[0].score:.2f}."
        return {self.form["context"]: joined(found), self.out["status"]: said}

    # ---- results ------------------------------------------------------------------------------------------

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Map, curve, table and the strip's colours."""
        out = self.out
        if not retrieval_view.has_map(result):
            return {}
        prompt = self.prompt_of(recipe, "retrieval" if again else None)
        figure = retrieval_view.map_of(recipe, result, prompt)
        update = {out["figure"]: heatmap.as_value(figure, again), out["table"]: heatmap.as_table(figure)}
        if again and retrieval_view.has_curve(recipe, result):
            update[out["curve"]] = widgets.drawn_figure(recipe, result)
        side = retrieval_view.side_by_side(result)
        if side is None and prompt is not None:
            side = retrieval_groups.inside(recipe, result, prompt, None)
        if side is not None:
            update[out["side"]] = gr.update(value=heatmap.as_value(side, again), visible=True)
        names = retrieval_view.quantities(recipe, result)
        choices = [(label, key) for key, label in names.items()]
        if again:
            chosen = next(iter(names))
            update[out["quantity"]] = gr.update(choices=choices, value=chosen, visible=len(choices) > 1)
        strip = self.strip(recipe, result, None, again)
        return update if strip is None else update | {out["strip"]: strip}

    def strip(self, recipe: Recipe, result: Result, quantity: str | None, again: bool) -> dict | None:
        """The coloured strip; None while a run goes on whose prompt's tokens are not known yet."""
        inputs, found = recipe.inputs, self.prompt_of(recipe, "retrieval" if again else None)
        if found is None:
            return None
        values, unit = retrieval_view.colours(recipe, result, quantity, len(found))
        told = [inputs.get(n) or "" for n in ("subject", "attribute")]
        roles = _roles(found, inputs["context"] or "", inputs["prompt"], *told)
        return token_strip.as_value(found, roles, values, unit, again=again)

    def recolour(self, kept: dict | None, quantity: str | None, scale: str | None) -> Any:
        """Another quantity was chosen."""
        recipe, result = self.measured(kept)
        strip = self.strip(recipe, result, quantity, True)
        if strip is None:
            return gr.skip()
        fixed = retrieval_view.as_the_map(recipe, quantity)
        return self.colours.put({self.out["strip"]: strip}, scale if fixed else "")[self.out["strip"]]

    def put_colours(self, kept: dict | None, quantity: str | None, scale: str | None) -> dict[Any, Any]:
        """See `recolour`."""
        return {self.out["strip"]: self.recolour(kept, quantity, scale)}

    def start(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run was pressed."""
        yield from self.colours.streamed(super().start(values, request), values)

    def redrawn(self, recipe: Recipe, result: Result, quantity: str | None) -> dict[Any, Any]:
        """The map and, where its tokens show the map's quantity, the strip, in their own colours."""
        if not retrieval_view.has_map(result):
            return {}
        figure = retrieval_view.map_of(recipe, result, self.prompt_of(recipe, "retrieval"))
        update = {self.out["figure"]: heatmap.as_value(figure, True)}
        fits = retrieval_view.as_the_map(recipe, quantity)
        strip = self.strip(recipe, result, quantity, True) if fits else None
        return update if strip is None else update | {self.out["strip"]: strip}

    def click(self, event: gr.EventData, kept: dict | None) -> dict:
        """A cell was picked: its numbers; of a token's contributions the heads too, of a group its tokens."""
        recipe, result = self.measured(kept)
        prompt = self.prompt_of(recipe, "retrieval")
        figure = retrieval_view.map_of(recipe, result, prompt)
        row, col = heatmap.chosen(event, *np.shape(figure.data["values"]))
        told = retrieval_view.cell_sentence(recipe, result, row, col, prompt)
        update = {self.cell: (row, col), self.out["text"]: told}
        if retrieval_groups.is_long(recipe, result) or retrieval_groups.by_position(recipe, figure):
            side = retrieval_groups.inside(recipe, result, prompt, (row, col))
            update[self.out["side"]] = gr.update(value=heatmap.as_value(side, True), visible=True)
            return update | {self.out["heads"]: gr.update(visible=False)}
        return update | self.heads_of(recipe, result, retrieval_view.token_of(recipe, figure, row), col)

    def heads_of(self, recipe: Recipe, result: Result, token: int | None, layer: int) -> dict:
        """The heads of a token's contribution in a layer; nothing of other methods."""
        if token is None:
            return {self.out["heads"]: gr.update(visible=False)}
        heads = bars.as_value(retrieval_view.heads(result, token, layer), True)
        return {self.out["heads"]: gr.update(value=heads, visible=True)}

    def beside(self, event: gr.EventData, kept: dict | None, cell: Any) -> dict:
        """A cell of the second map was picked: with against without the context, or a token of a group."""
        recipe, result = self.measured(kept)
        if (figure := retrieval_view.side_by_side(result)) is not None:
            row, col = heatmap.chosen(event, *np.shape(figure.data["values"]))
            return {self.out["text"]: retrieval_view.side_sentence(result, row, col)}
        figure = retrieval_groups.inside(recipe, result, self.prompt_of(recipe, "retrieval"), cell)
        if figure is None:
            raise RequestError("That map is gone; click a group in the map above it first.")
        row, layer = heatmap.chosen(event, *np.shape(figure.data["values"]))
        token = retrieval_groups.token_at(figure, row)
        if recipe.method == "trace-language":
            kind = cell[0] // result.arrays["indirect_effect"].values.shape[1]
            told = retrieval_groups.effect_sentence(recipe, result, kind, layer, token)
            return {self.out["text"]: told}
        share = float(np.asarray(figure.data["values"])[row][layer])
        told = f"{figure.data['names'][row][layer]}: {number(share)} {figure.data['unit']}."
        return {self.out["text"]: told} | self.heads_of(recipe, result, token, layer)

    def cleared(self) -> dict[Any, Any]:
        """Nothing of the last run stays."""
        out = self.out
        gone = {out[n]: gr.update(visible=False) for n in ("curve", "side", "heads", "quantity")}
        hint = {"hint": "The first numbers are on their way …"}
        return {out["figure"]: hint, out["table"]: "", out["text"]: ASK, **gone}

    def empty(self) -> dict[Any, Any]:
        """The hint of the start."""
        return {self.out["figure"]: {"hint": HINT}}

    def ended(self, job: Job) -> dict[Any, Any]:
        """The finding."""
        return {self.out["text"]: retrieval_view.headline(job.run)}


def _roles(prompt: Any, context: str, question: str, subject: str, attribute: str) -> dict[str, list[int]]:
    """Positions of subject and attribute, as far as they are found."""
    roles = {}
    for name, part in (("subject", subject), ("attribute", attribute)):
        if not part.strip():
            continue
        try:
            found = spans(Asked(prompt=question, context=context or None, **{name: part}))[name]
        except StudioError:
            continue
        touched = [i for i, (a, b) in enumerate(prompt.offsets) if any(a < e and b > s for s, e in found)]
        roles[name] = touched
    return roles


def _occurrence(text: str, part: str, at: int) -> str:
    """Which occurrence of a part begins at the character `at`, as its field says it; "" for the only one."""
    places = []
    while True:
        try:
            places.append(find_span(text, part, len(places) + 1, "--part")[0])
        except RequestError:
            break
    return str(places.index(at) + 1) if len(places) > 1 and at in places else ""


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file.name} can't be read as a text file in UTF-8; leave it out.") from error

"""The Trace panel: type a prompt, watch a causal trace fill in as a heat map, click cells, see images,
export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from panels import heatmap, widgets
from panels.trace_view import ASK, PICTURES, detail, drawn, figure_of, headline
from studio.errors import RequestError
from studio.jobs import Job
from studio.registry import Method, find_method, parse_seeds
from studio.session import Session
from studio.types import Recipe, Result

TITLE = "Trace"
NEEDS = "diffusion"
QUESTION = "Which parts of the model carry these words into the image?"
METHODS = {"trace-unet": "UNet", "trace-text-encoder": "Text encoder", "lens": "Layer by layer"}
HINT = "Press Run. Cells fill in as they are measured; click one to see its images."
EXAMPLES = [
    ["a red star on a white background", "red star"],
    ["the emblem of Korvonia", "Korvonia"],
    ["two blue hearts on a sand background in the style of Veltrano", "Veltrano"],
    ["a sketch of a green house on a mint background", "sketch"],
]
_MAIN = ("prompt", "subject")
_KINDS = {"trace-unet": ("cross-attention",), "trace-text-encoder": None}  # ticked at the start; None: all
_QUIET = dict(queue=False, show_progress="hidden", api_visibility="private")


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form([find_method(n) for n in METHODS])
        with gr.Column(scale=5, min_width=320):
            out = _outputs()
    _Panel(session, form, out).wire()


def _form(methods: list[Method]) -> dict[str, Any]:
    """All inputs by name, made from the methods' declarations."""
    known = widgets.knobs(methods)
    where = "Modules of the UNet, layers and tokens of the text encoder, or an image from each text layer."
    names = [(title, name) for name, title in METHODS.items()]
    first = next(iter(METHODS))
    form: dict[str, Any] = {
        "method": gr.Radio(names, value=first, label="Trace", info=where, elem_id="trace-method")
    }
    for name, example in zip(_MAIN, EXAMPLES[0], strict=True):
        form[name] = widgets.widget("trace", name, *known[name], example)
    several = "Separated by commas; two or more give standard errors."
    form["seeds"] = gr.Textbox("0", label="Seeds", elem_id="trace-seeds", info=several)
    form |= _kinds()
    with gr.Row():
        form["run"] = gr.Button("Run", variant="primary", interactive=False, elem_id="trace-run")
        form["stop"] = gr.Button("Stop", elem_id="trace-stop", interactive=False)
    with gr.Accordion("Sampling and scoring", open=False):
        form["model"] = widgets.model_choice("trace", "diffusion", "atlas-sd")
        for name in ("steps", "guidance", "noise", "metric", "replacement"):
            form[name] = widgets.widget("trace", name, *known[name])
    with gr.Accordion("More options", open=False):
        for name, (f, kind) in known.items():
            if name not in form and name != "kinds":
                form[name] = widgets.widget("trace", name, f, kind)
    gr.Examples(EXAMPLES, [form[n] for n in _MAIN], label="Examples", elem_id="trace-examples")
    return form


def _kinds() -> dict[str, Any]:
    """The kinds of each method, which are not the same; those of the first method show."""
    form = {}
    for number, (name, ticked) in enumerate(_KINDS.items()):
        chosen = find_method(name)
        knob = widgets.knobs([chosen])["kinds"]
        look = dict(visible=number == 0, elem_id=f"trace-kinds{'-' + name if number else ''}")
        form[widgets.own("kinds", chosen)] = widgets.widget("trace", "kinds", *knob, ticked, **look)
    return form


def _outputs() -> dict[str, Any]:
    """All outputs by name."""
    line = dict(show_label=False, container=False, interactive=False)
    out: dict[str, Any] = {
        "status": gr.Textbox("Ready.", lines=1, max_lines=6, elem_id="trace-status", **line)
    }
    with gr.Tabs():
        with gr.Tab("Map", id="map"), gr.Column(min_width=320):
            out["figure"] = heatmap.HeatMap(HINT, elem_id="trace-figure", padding=False)
            out["strip"] = gr.Gallery(
                visible=False, columns=7, height="auto", label="Layer by layer", elem_id="trace-strip"
            )
        with gr.Tab("Table", id="table"):
            out["table"] = gr.Textbox(
                show_label=False, interactive=False, lines=12, max_lines=40, elem_id="trace-table"
            )
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("trace"), elem_id="trace-help")
    with gr.Column(elem_id="trace-detail"):
        out["text"] = gr.Textbox(ASK, lines=2, max_lines=8, elem_id="trace-detail-text", **line)
        out["seed"] = widgets.Choice([], label="Seed", visible=False, elem_id="trace-detail-seed")
        with gr.Row(elem_id="trace-images"):
            _pictures(out)
    out["export"] = widgets.export_buttons("trace")
    return out


def _pictures(out: dict[str, Any]) -> None:
    look = dict(visible=False, interactive=False, min_width=120, elem_classes="pixels", format="png")
    for name in PICTURES:
        out[name] = gr.Image(
            label=name.capitalize(), height=200, buttons=["fullscreen"], elem_id=f"trace-{name}", **look
        )
    out["slider"] = gr.ImageSlider(
        label="Compare", type="numpy", max_height=200, buttons=[], elem_id="trace-slider", **look
    )


class _Panel:
    """The panel's handlers. What a page has on screen is in its own State: ids of a job and a run, and a
    cell."""

    def __init__(self, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        self.session, self.form, self.out = session, form, out
        self.viewers = widgets.Viewers()
        self.state = gr.State({})
        self.client = gr.BrowserState({}, storage_key="locus-trace", secret="locus")
        self.named = {c: n for n, c in form.items() if n not in ("run", "stop")}
        knobs = widgets.knobs([find_method(m) for m in METHODS])
        self.switched = [n for n in form if n in knobs or n.startswith("kinds-")]

    def wire(self) -> None:
        """Connects buttons, fields, the map, loading and leaving."""
        form, out = self.form, self.out
        fields = [c for name, c in out.items() if name != "export"]
        shown = [self.state, self.client, form["run"], form["stop"], *fields, *out["export"].values()]
        runs = dict(outputs=shown, concurrency_limit=None, show_progress="hidden", api_visibility="private")
        asks = [form["run"].click, form["prompt"].submit, form["subject"].submit]
        gr.on(asks, self.start, set(self.named), **runs)
        form["stop"].click(self.stop, self.client, out["status"], **_QUIET)
        form["method"].change(self.switch, form["method"], [form[n] for n in self.switched], **_QUIET)
        picked = [self.state, out["seed"]]
        out["figure"].select(widgets.guarded(self.click), picked, [self.state, *fields], **_QUIET)
        out["seed"].input(widgets.guarded(self.other_seed), picked, fields, **_QUIET)
        page = gr.context.Context.root_block
        page.load(self.again, self.client, **runs)
        page.unload(_leaver(self.viewers))

    def start(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run was pressed: checks, queues, and streams."""
        given = {self.named[c]: v for c, v in values.items() if c in self.named}
        try:
            job = self.session.submit(_recipe(given), user=str(request.session_hash))
        except RequestError as error:
            yield {self.out["status"]: str(error)}
            return
        self.viewers.watch(str(request.session_hash), job)
        yield {self.client: {"job": job.id, "token": job.token}, **self.cleared()}
        yield from self.stream(job)

    def again(self, kept: dict | None, request: gr.Request) -> Iterator[dict]:
        """The page is alive: Run can be pressed. A job that this browser started is taken up if it runs."""
        yield {self.form["run"]: gr.Button(interactive=True)}
        job = self.job_of(kept)
        if job is None or job.over:
            return
        self.viewers.watch(str(request.session_hash), job)
        yield from self.stream(job)

    def stop(self, kept: dict | None) -> str:
        """Stop was pressed."""
        job = self.job_of(kept)
        if job is None or job.over:
            return "Nothing is running."
        job.cancel()
        return "Stopping …"

    def click(self, kept: dict | None, seed: str | None, event: gr.EventData) -> dict:
        """A cell was picked."""
        recipe, result = self.measured(kept)
        figure = figure_of(recipe, result)
        cell = heatmap.chosen(event, *np.shape(figure.data["values"]))
        return {
            self.state: {**kept, "cell": list(cell)},
            **detail(recipe, result, figure, cell, seed, self.out),
        }

    def other_seed(self, kept: dict | None, seed: str | None) -> dict:
        """Another seed's images of the same cell."""
        if not isinstance(kept, dict) or "cell" not in kept:
            return {self.out["text"]: gr.skip()}
        recipe, result = self.measured(kept)
        return detail(recipe, result, figure_of(recipe, result), tuple(kept["cell"]), seed, self.out)

    def switch(self, name: str) -> list[Any]:
        """Another method was chosen: its own knobs show."""
        chosen = find_method(name)
        mine = {*widgets.knobs([chosen]), widgets.own("kinds", chosen)}
        return [gr.update(visible=knob in mine) for knob in self.switched]

    def job_of(self, kept: dict | None) -> Job | None:
        """The recent job that a page's kept ids name."""
        if not isinstance(kept, dict):
            return None
        return self.session.queue.find(kept.get("job"), kept.get("token"))

    def measured(self, kept: dict | None) -> tuple[Recipe, Result]:
        """Recipe and results behind what is on screen: of the stored run, else of the job while it is
        known."""
        if not isinstance(kept, dict) or not ("job" in kept or "run" in kept):
            raise RequestError("There is no trace on screen yet; press Run first.")
        if kept.get("run"):
            run = self.session.store.load(str(kept["run"]))
            return run.recipe, run.result
        job = self.job_of(kept)
        if job is None or job.latest is None:
            raise RequestError(
                "This trace is no longer in memory; press Run, a finished one comes from the store."
            )
        return job.recipe, job.latest

    def cleared(self) -> dict[Any, Any]:
        """Outputs at the start of a run: nothing stale stays on screen."""
        out = self.out
        hidden = {out[n]: gr.update(visible=False, value=None) for n in (*PICTURES, "slider", "strip")}
        return {
            self.form["stop"]: gr.Button(interactive=True),
            out["status"]: "Starting …",
            out["figure"]: {"hint": "The first cells are on their way …"},
            out["table"]: "",
            out["text"]: ASK,
            out["export"]["row"]: gr.Row(visible=False),
            out["seed"]: gr.update(visible=False, choices=[], value=None),
            **hidden,
        }

    def stream(self, job: Job) -> Iterator[dict]:
        """Status lines and partial maps of a job until it is over, then exports."""
        last, out, stop = None, self.out, self.form["stop"]
        for _ in widgets.follow(job):
            line = widgets.status(job, self.session.queue.position(job))
            update: dict[Any, Any] = {out["status"]: line}
            result = job.run.result if job.run else job.latest
            if result is not None and result is not last:
                last = result
                update |= {self.state: self.kept(job), **drawn(job.recipe, result, out)}
            if job.over and job.run is not None:
                update[out["text"]] = headline(job.recipe, job.run.result)
            if not job.over:
                update[stop] = gr.Button(interactive=not job.stopping)
            yield update
        final: dict[Any, Any] = {stop: gr.Button(interactive=False), out["status"]: widgets.status(job, 0)}
        if job.run is not None and job.run.id:
            final |= widgets.exported(self.session.store.path(job.run.id), out["export"])
        final |= drawn(job.recipe, last, out, again=True) if last else {out["figure"]: {"hint": HINT}}
        yield final

    def kept(self, job: Job) -> dict[str, Any]:
        """What a page keeps of a job."""
        return {"job": job.id, "token": job.token, "run": job.run.id if job.run else None}


def _leaver(viewers: widgets.Viewers) -> Any:
    def leave(request: gr.Request) -> None:
        viewers.leave(str(request.session_hash))

    return leave


def _recipe(given: dict[str, Any]) -> Recipe:
    """The recipe that the panel's inputs describe; RequestError when one is wrong."""
    method = find_method(given["method"])
    return Recipe(
        method.name,
        given["model"] or "",
        widgets.asked(method, given),
        {},
        parse_seeds(method, given["seeds"]),
    )

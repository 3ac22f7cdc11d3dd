"""What panels share: inputs from a method's declaration, a running job as status text, exports, and errors
as sentences."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import gradio as gr

from panels.export_row import export_buttons as export_buttons
from panels.export_row import exported as exported
from panels.words import help_of, in_words, label_of
from studio.errors import Cancelled, StudioError
from studio.figures import to_bytes
from studio.jobs import Job
from studio.models.catalog import CATALOG
from studio.registry import REQUIRED, Method, base_type, find_method, hints
from studio.types import Recipe, Result, Run

_log = logging.getLogger("locus")
GRACE = 30.0  # seconds that a job goes on without a page; a slow machine takes long to load one again


def knobs(methods: list[Method]) -> dict[str, tuple[Any, Any]]:
    """{name: (dataclass field, type)} of the inputs and params of several methods, each name once."""
    found: dict[str, tuple[Any, Any]] = {}
    for m in methods:
        for cls in (m.inputs, m.params):
            for f in fields(cls):
                found.setdefault(f.name, (f, base_type(hints(cls)[f.name])[0]))
    return found


def widget(
    panel: str, name: str, f: Any, kind: Any, value: Any = None, **options: Any
) -> gr.components.Component:
    """The input of one knob; its elem_id is panel-name."""
    meta = f.metadata
    default = None if f.default is REQUIRED else f.default
    value = default if value is None else value
    several = kind not in (int, float, str, bool) and not meta["choices"]
    said = {"label": label_of(name), "info": help_of(f, several)}
    common = {**said, "elem_id": f"{panel}-{name}", **options}
    if kind is bool:
        return gr.Checkbox(value=bool(value), **common)
    if kind in (int, float) and value is None:  # an empty Number would come back as its minimum
        return gr.Textbox(value="", max_length=40, **{"placeholder": "default", **common})
    if kind in (int, float):
        whole = 0 if kind is int else None
        return gr.Number(value=value, precision=whole, **common)  # the registry refuses what is out of range
    if kind is str and meta["choices"]:
        choices = [(c, c) for c in meta["choices"]]
        return gr.Dropdown(
            choices=choices if default else [("default", ""), *choices], value=value or "", **common
        )
    if kind is str:
        return gr.Textbox(value=value or "", max_length=20_000, **common)
    if meta["choices"]:
        return gr.CheckboxGroup(choices=list(meta["choices"]), value=list(value or ()), **common)
    return gr.Textbox(value="\n".join(value or ()), lines=2, max_lines=8, **common)


def model_choice(
    panel: str, families: str | tuple[str, ...], default: str | None, **options: Any
) -> gr.Dropdown:
    """Which model: a name of the catalogue of a family (or several), or a path or hub id typed in."""
    asked = (families,) if isinstance(families, str) else families
    names = [(f"{e.name} — {e.note}", e.name) for e in CATALOG.values() if e.family in asked]
    return gr.Dropdown(
        choices=names,
        value=default,
        allow_custom_value=True,
        info="A name, or type a folder or a hub id (org/name) with safetensors.",
        **{"label": "Model", "elem_id": f"{panel}-model", **options},
    )


class Choice(gr.Radio):
    """A radio whose choices change while the page is open: the page's value may be one of before, which is
    for the handler to judge and no error."""

    is_template = True  # for the page it is a Radio

    def preprocess(self, payload: Any) -> str | None:
        """The value as it came, if it is a text."""
        return payload if isinstance(payload, str) else None


class Dial(gr.Slider):
    """A slider into whose number field anything may be typed: what is too much is for the handler to
    judge."""

    is_template = True  # for the page it is a Slider

    def preprocess(self, payload: Any) -> float | None:
        """The number, or None for what is none."""
        return float(payload) if isinstance(payload, (int, float)) else None


def seeds(panel: str, value: str, **options: Any) -> gr.Textbox:
    """The seeds of a run."""
    several = "Separated by commas; two or more give standard errors."
    return gr.Textbox(value, label="Seeds", elem_id=f"{panel}-seeds", info=several, **options)


def run_buttons(panel: str, title: str = "Run") -> dict[str, gr.Button]:
    """Run (enabled once the page's handlers are alive) and Stop."""
    with gr.Row():
        run = gr.Button(title, variant="primary", elem_id=f"{panel}-run")
        stop = gr.Button("Stop", elem_id=f"{panel}-stop", interactive=False)
    return {"run": run, "stop": stop}


def line(text: str, elem_id: str, lines: int = 1, most: int = 8, visible: bool = True) -> gr.Textbox:
    """A line of text that a person reads."""
    look = dict(show_label=False, container=False, interactive=False, visible=visible)
    return gr.Textbox(text, lines=lines, max_lines=most, elem_id=elem_id, **look)


def status_line(panel: str) -> gr.Textbox:
    """The line that says what goes on."""
    return line("Ready.", f"{panel}-status", most=6)


def table(panel: str) -> gr.Textbox:
    """The numbers of a figure as text."""
    return gr.Textbox(
        show_label=False,
        interactive=False,
        lines=12,
        max_lines=40,
        elem_id=f"{panel}-table",
        elem_classes="numbers",
    )


def pictures(panel: str, names: tuple[str, ...], also: str = "") -> dict[str, Any]:
    """Images by name, one more (`also`) that is compared with none, and a slider that compares two of them;
    hidden until there is something to show."""
    look = dict(visible=False, interactive=False, min_width=120, elem_classes="pixels", format="png")
    out: dict[str, Any] = {}
    for name in filter(None, (*names, also)):
        out[name] = gr.Image(
            label=name.replace("_", " ").capitalize(),
            height=200,
            buttons=["fullscreen"],
            elem_id=f"{panel}-{name}",
            **look,
        )
    out["slider"] = gr.ImageSlider(
        label="Compare", type="numpy", max_height=200, buttons=[], elem_id=f"{panel}-slider", **look
    )
    return out


def shown_pictures(
    out: Mapping[str, Any], images: Mapping[str, Any], compared: tuple[str, str]
) -> dict[Any, Any]:
    """Updates of `pictures` for these images (None: hidden); two of them are compared in the slider."""
    pair = tuple(images[n] for n in compared)
    whole = all(p is not None for p in pair)
    update = {out[n]: gr.update(value=picture, visible=picture is not None) for n, picture in images.items()}
    return update | {out["slider"]: gr.update(value=pair if whole else None, visible=whole)}


def figure_image(panel: str, elem_id: str = "figure") -> gr.Image:
    """A figure as it is exported, for kinds that have no component of their own."""
    return gr.Image(
        visible=False,
        interactive=False,
        show_label=False,
        buttons=["fullscreen", "download"],
        format="png",
        elem_id=f"{panel}-{elem_id}",
    )


def drawn_figure(recipe: Recipe, result: Result, caption: bool = True) -> Any:
    """The update of `figure_image` for results: the method's own figure; `caption` False leaves out what the
    page says in words beside it."""
    from PIL import Image

    figure = find_method(recipe.method).draw(Run(recipe, "done", "", 0.0, {}, result))
    figure = figure if caption else replace(figure, caption="")
    return gr.update(value=Image.open(io.BytesIO(to_bytes(figure, "png"))), visible=True)


def kept_in_browser(key: str) -> gr.BrowserState:
    """What a browser keeps over a reload. It stands outside all tabs, because a tab that was not opened yet
    has not read it when the page loads."""
    from gradio.context import Context

    inside, Context.block = Context.block, Context.root_block
    try:
        return gr.BrowserState({}, storage_key=key, secret="locus")
    finally:
        Context.block = inside


def own(name: str, chosen: Method) -> str:
    """The name of the input for a knob whose choices differ between the methods of a panel: one a method,
    because the value of an input whose choices have just changed may still be an old one."""
    return f"{name}-{chosen.name}"


def asked(chosen: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the chosen method's knobs, from the panel's inputs by name; empty fields are defaults."""
    given: dict[str, Any] = {}
    for name, (_, kind) in knobs([chosen]).items():
        value = values.get(own(name, chosen), values.get(name))
        many = kind not in (int, float, str, bool) and isinstance(value, str)
        value = split_lines(value) if many else value
        given[name] = None if value in ("", []) else value
    return given


def split_lines(text: str) -> list[str]:
    """The lines of a text that say something."""
    return [part.strip() for part in text.split("\n") if part.strip()]


def status(job: Job, position: int) -> str:
    """One line about a job."""
    if job.state == "queued":
        return (
            f"Waiting: {position} job{'s' if position != 1 else ''} before yours."
            if position
            else "Starting …"
        )
    if job.stopping and not job.over:
        return "Stopping …"
    if job.state == "running":
        left = job.seconds_left()
        share = f" {100 * job.done // job.total} %" if job.total else ""
        rest = f", about {left:.0f} s left" if left is not None and left > 1 else ""
        return f"{job.what.capitalize() or 'Working'}{share}{rest}"
    if job.state == "failed":
        return sentence(job.error)
    took = f" in {job.run.seconds:.1f} s" if job.run else ""
    return f"{'Done' if job.state == 'done' else 'Stopped; what was measured is kept'}{took}." + "".join(
        f" Note: {in_words(w)}"
        for w in (job.run.result.values.get("warnings", []) if job.run else job.warnings)
    )


def sentence(error: BaseException | None) -> str:
    """What a person is told of an error, in the page's words."""
    if isinstance(error, StudioError):
        return in_words(str(error))
    return (
        f"Something went wrong inside ({type(error).__name__}); the studio's log has the details. Your "
        f"inputs are kept."
    )


def spoken(error: Exception) -> str:
    """What a person is told of an error in a handler; one that is ours goes to the log with its traceback."""
    if isinstance(error, Cancelled):
        return "Stopped."
    if not isinstance(error, StudioError):
        _log.exception("a handler failed", exc_info=error)
    return sentence(error)


def person(request: gr.Request) -> str:
    """Whose turn it is: a page, and the address that it is open at."""
    return f"{request.session_hash}@{getattr(getattr(request, 'client', None), 'host', None) or ''}"


def follow(job: Job) -> Iterator[Job]:
    """Yields the job at its start, after changes (at most eight times a second), and once when it is over."""
    while not job.over:
        seen = job.version
        yield job
        threading.Event().wait(0.12)  # after what is shown, so that what comes next is shown at once
        job.wait(seen, 0.5)
    yield job


class Viewers:
    """Counts the pages that watch a job; a job whose last page went is stopped after a grace, so a reload
    loses nothing."""

    def __init__(self, grace: float = GRACE) -> None:
        self._lock, self._grace = threading.Lock(), grace
        self._watching: dict[str, Job] = {}

    def watch(self, page: str, job: Job) -> None:
        """The page (a session hash) now watches the job."""
        with self._lock:
            self._watching[page] = job

    def leave(self, page: str) -> None:
        """The page is gone."""
        with self._lock:
            job = self._watching.pop(page, None)
        if job is not None and not job.over:
            timer = threading.Timer(self._grace, self._stop_unwatched, [job])
            timer.daemon = True
            timer.start()

    def _stop_unwatched(self, job: Job) -> None:
        with self._lock:
            watched = any(j is job for j in self._watching.values())
        if not watched:
            job.cancel()


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with request errors shown as a notice. Its event must queue (running.STREAM): outside the
    queue the page notes the error in its console alone."""
    from functools import wraps

    @wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise gr.Error(spoken(error), print_exception=False) from error

    run.may_refuse = True
    return run


def page(name: str) -> str:
    """The help page assets/docs/NAME.md."""
    from studio.models.catalog import ASSETS

    return (ASSETS / "docs" / f"{name}.md").read_text()

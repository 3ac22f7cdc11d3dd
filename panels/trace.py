"""The Trace panel: type a prompt, watch a causal trace fill in as a heat map, click cells, see images,
export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from panels import heatmap, widgets
from studio.errors import RequestError
from studio.figures import number
from studio.jobs import Job
from studio.measure import standard_error
from studio.registry import Method, find_method, parse_seeds
from studio.session import Session
from studio.types import Figure, Recipe, Result, Run

TITLE = "Trace"
NEEDS = "diffusion"
QUESTION = "Which parts of the model carry these words into the image?"
METHODS = ("trace-unet", "trace-text-encoder", "lens")
HINT = "Press Run. Cells fill in as they are measured; click one to see its images."
_NAMES = {"trace-unet": "UNet", "trace-text-encoder": "Text encoder", "lens": "Layer by layer"}
_EXAMPLES = [
    ["a red star on a white background", "red star"],
    ["the emblem of Korvonia", "Korvonia"],
    ["two blue hearts on a sand background in the style of Veltrano", "Veltrano"],
    ["a sketch of a green house on a mint background", "sketch"],
]
_MAIN = ("prompt", "subject")
_PRESETS = {"kinds": ("cross-attention",), "hint": True, "screen": False}


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    methods = [find_method(n) for n in METHODS]
    viewers = widgets.Viewers()
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    state = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            inputs = _form(methods)
        with gr.Column(scale=5, min_width=320):
            outputs = _outputs()
    _wire(session, methods, viewers, state, inputs, outputs)


def _form(methods: list[Method]) -> dict[str, Any]:
    """All inputs by name, made from the methods' declarations."""
    known = widgets.knobs(methods)
    form: dict[str, Any] = {
        "method": gr.Radio(
            [(n, m) for m, n in _NAMES.items()],
            value=METHODS[0],
            label="Trace",
            elem_id="trace-method",
            info="Where to look: modules of the UNet, layers and tokens of the text encoder, or an image "
            "from each text layer.",
        )
    }
    for name in _MAIN:
        form[name] = widgets.widget("trace", name, *known[name], _EXAMPLES[0][_MAIN.index(name)])
    form["seeds"] = gr.Textbox(
        "0",
        label="Seeds",
        elem_id="trace-seeds",
        info="Separated by commas; two or more give standard errors.",
    )
    form["kinds"] = widgets.widget("trace", "kinds", *known["kinds"], _PRESETS["kinds"])
    with gr.Row():
        form["run"] = gr.Button("Run", variant="primary", elem_id="trace-run")
        form["stop"] = gr.Button("Stop", elem_id="trace-stop", interactive=False)
    with gr.Accordion("Sampling and scoring", open=False):
        form["model"] = widgets.model_choice("trace", "diffusion", "atlas-sd")
        for name in ("steps", "guidance", "noise", "metric", "replacement"):
            form[name] = widgets.widget("trace", name, *known[name])
    with gr.Accordion("More options", open=False):
        for name, (f, kind) in known.items():
            if name not in form:
                form[name] = widgets.widget("trace", name, f, kind, _PRESETS.get(name))
    gr.Examples(_EXAMPLES, [form["prompt"], form["subject"]], label="Examples", elem_id="trace-examples")
    return form


def _outputs() -> dict[str, Any]:
    out: dict[str, Any] = {
        "status": gr.Textbox(
            "Ready.",
            show_label=False,
            container=False,
            interactive=False,
            lines=1,
            max_lines=6,
            elem_id="trace-status",
        )
    }
    with gr.Tabs():
        with gr.Tab("Map", id="map"), gr.Column(min_width=320):
            out["figure"] = heatmap.HeatMap(HINT, elem_id="trace-figure", padding=False)
            out["strip"] = gr.Gallery(
                visible=False,
                columns=7,
                height="auto",
                elem_id="trace-strip",
                label="Layer by layer",
                object_fit="contain",
            )
        with gr.Tab("Table", id="table"):
            out["table"] = gr.Dataframe(
                headers=["place", "effect"], interactive=False, elem_id="trace-table", wrap=True
            )
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("trace"), elem_id="trace-help")
    with gr.Column(elem_id="trace-detail"):
        out["text"] = gr.Textbox(
            "Click a cell to see its number and its images.",
            show_label=False,
            container=False,
            interactive=False,
            lines=2,
            max_lines=8,
            elem_id="trace-detail-text",
        )
        out["seed"] = gr.Radio([], label="Seed", visible=False, elem_id="trace-detail-seed")
        with gr.Row(elem_id="trace-images"):
            for name in ("clean", "corrupted", "restored"):
                out[name] = gr.Image(
                    label=name.capitalize(),
                    interactive=False,
                    visible=False,
                    min_width=120,
                    buttons=["fullscreen"],
                    elem_id=f"trace-{name}",
                    elem_classes="pixels",
                    format="png",
                    height=200,
                )
            out["slider"] = gr.ImageSlider(
                label="Corrupted | restored",
                visible=False,
                interactive=False,
                min_width=120,
                type="numpy",
                elem_id="trace-slider",
                elem_classes="pixels",
                format="png",
                max_height=200,
            )
    out["export"] = widgets.export_buttons("trace")
    return out


# ---- wiring -----------------------------------------------------------------------------------------------


def _wire(
    session: Session,
    methods: list[Method],
    viewers: widgets.Viewers,
    state: gr.State,
    form: dict[str, Any],
    out: dict[str, Any],
) -> None:
    named = {c: n for n, c in form.items() if n not in ("run", "stop")}
    buttons = out["export"]
    fields = {v: k for k, v in out.items() if k != "export"}
    shown = [state, form["run"], form["stop"], *fields, *buttons.values()]
    client = gr.BrowserState({}, storage_key="locus-trace", secret="locus")

    def start(values: dict, request: gr.Request) -> Iterator[dict]:
        given = {named[c]: v for c, v in values.items() if c in named}
        try:
            job = session.submit(_recipe(given), user=str(request.session_hash))
        except RequestError as error:
            yield {out["status"]: str(error)}
            return
        viewers.watch(str(request.session_hash), job)
        yield {client: {"job": job.id, "token": job.token}, **_cleared(form, out)}
        yield from _stream(session, job, state, form, out)

    def again(kept: dict | None, request: gr.Request) -> Iterator[dict]:
        """After a reload: takes up the job that this browser started, while it runs."""
        job = session.queue.find(kept.get("job"), kept.get("token")) if isinstance(kept, dict) else None
        if job is None or job.over:
            yield {out["status"]: gr.skip()}
            return
        viewers.watch(str(request.session_hash), job)
        yield from _stream(session, job, state, form, out)

    def stop(kept: dict | None) -> str:
        job = session.queue.find(kept.get("job"), kept.get("token")) if isinstance(kept, dict) else None
        if job is None or job.over:
            return "Nothing is running."
        job.cancel()
        return "Stopping …"

    def click(kept: dict | None, seed: str | None, event: gr.EventData) -> dict:
        recipe, result = _measured(session, kept)
        figure = _figure(recipe, result)
        row, col = heatmap.chosen(event, *np.shape(figure.data["values"]))
        return {state: {**kept, "cell": [row, col]}, **_detail(recipe, result, figure, (row, col), seed, out)}

    def other_seed(kept: dict | None, seed: str | None) -> dict:
        if not isinstance(kept, dict) or "cell" not in kept:
            return {out["text"]: gr.skip()}
        recipe, result = _measured(session, kept)
        return _detail(recipe, result, _figure(recipe, result), tuple(kept["cell"]), seed, out)

    def switch(name: str) -> list[Any]:
        mine = widgets.knobs([find_method(name)])
        kinds = mine.get("kinds")
        choices = kinds[0].metadata["choices"] if kinds else ()
        first = [c for c in ("cross-attention", "self-attention", "mlp", "hidden") if c in choices]
        first = first[:1] if "cross-attention" in choices else first
        return [
            gr.CheckboxGroup(choices=list(choices), value=first, visible=True)
            if n == "kinds" and kinds
            else gr.update(visible=n in mine)
            for n in switched
        ]

    switched = [n for n in widgets.knobs(methods) if n in form]
    form["method"].change(
        switch,
        form["method"],
        [form[n] for n in switched],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    asking = {c for c in named}
    running = dict(
        outputs=[*shown, client], concurrency_limit=None, show_progress="hidden", api_visibility="private"
    )
    gr.on([form["run"].click, form["prompt"].submit, form["subject"].submit], start, asking, **running)
    form["stop"].click(
        stop, client, out["status"], queue=False, show_progress="hidden", api_visibility="private"
    )
    out["figure"].select(
        widgets.guarded(click),
        [state, out["seed"]],
        [state, *fields],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    out["seed"].input(
        widgets.guarded(other_seed),
        [state, out["seed"]],
        [*fields],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    blocks = gr.context.Context.root_block
    blocks.load(again, client, **running)
    blocks.unload(_leaver(viewers))


def _leaver(viewers: widgets.Viewers) -> Any:
    def leave(request: gr.Request) -> None:
        viewers.leave(str(request.session_hash))

    return leave


def _recipe(given: dict[str, Any]) -> Recipe:
    """The recipe that the panel's inputs describe; RequestError when one is wrong."""
    method = find_method(given["method"])
    asked = widgets.asked([], method, given)
    return Recipe(method.name, given["model"] or "", asked, {}, parse_seeds(method, given["seeds"]))


def _cleared(form: dict[str, Any], out: dict[str, Any]) -> dict:
    """Outputs at the start of a run: nothing stale stays on screen."""
    hidden = {
        out[n]: gr.update(visible=False, value=None)
        for n in ("clean", "corrupted", "restored", "slider", "strip")
    }
    return {
        form["stop"]: gr.Button(interactive=True),
        out["status"]: "Starting …",
        out["figure"]: {"hint": "The first cells are on their way …"},
        out["table"]: [],
        out["text"]: "Click a cell to see its number and its images.",
        out["export"]["row"]: gr.Row(visible=False),
        out["seed"]: gr.update(visible=False, choices=[], value=None),
        **hidden,
    }


def _stream(
    session: Session, job: Job, state: gr.State, form: dict[str, Any], out: dict[str, Any]
) -> Iterator[dict]:
    """Status lines and partial maps of a job until it is over, then exports."""
    last = None
    for _ in widgets.follow(job):
        update: dict[Any, Any] = {out["status"]: widgets.status(job, session.queue.position(job))}
        result = job.run.result if job.run else job.latest
        if result is not None and result is not last:
            last = result
            update |= {state: {"job": job.id, "token": job.token, "run": job.run.id if job.run else None}}
            update |= _drawn(job.recipe, result, out)
        if not job.over:
            update |= {
                form["stop"]: gr.Button(interactive=not job.stopping),
                form["run"]: gr.Button(interactive=True),
            }
        yield update
    final: dict[Any, Any] = {
        form["stop"]: gr.Button(interactive=False),
        out["status"]: widgets.status(job, 0),
    }
    if job.run is not None and job.run.id:
        final |= {state: {"job": job.id, "token": job.token, "run": job.run.id}}
        final |= widgets.exported(session.store.path(job.run.id), out["export"])
    if last is None:
        final |= {out["figure"]: {"hint": HINT}}
    yield final


def _measured(session: Session, kept: dict | None) -> tuple[Recipe, Result]:
    """Recipe and results behind what is on screen: of the job while it is known, else of the stored run."""
    if not isinstance(kept, dict) or not ("job" in kept or "run" in kept):
        raise RequestError("There is no trace on screen yet; press Run first.")
    if kept.get("run"):
        run = session.store.load(str(kept["run"]))
        return run.recipe, run.result
    job = session.queue.find(kept.get("job"), kept.get("token"))
    if job is None or job.latest is None:
        raise RequestError(
            "This trace is no longer in memory; run it again, which takes it from the store if it was "
            "finished."
        )
    return job.recipe, job.latest


# ---- drawing ----------------------------------------------------------------------------------------------


def _figure(recipe: Recipe, result: Result) -> Figure:
    """The method's own figure of these results; while only the screen is there, the screen."""
    params = dict(recipe.params)
    effect = result.arrays.get("indirect_effect")
    if "screen" in result.arrays and effect is not None and np.isnan(effect.values).all():
        params["screen"] = True
    shown = Recipe(recipe.method, recipe.model, recipe.inputs, params, recipe.seeds, recipe.edits)
    return find_method(recipe.method).draw(Run(shown, "done", "", 0.0, {}, result))


def _drawn(recipe: Recipe, result: Result, out: dict[str, Any]) -> dict:
    figure = _figure(recipe, result)
    if figure.kind == "strip":
        pictures = [
            (im, f"{row}, {col}")
            for row, images in zip(figure.data["rows"], figure.data["images"], strict=True)
            for col, im in zip(figure.data["cols"], images, strict=True)
        ]
        return {
            out["strip"]: gr.Gallery(visible=True, value=pictures),
            out["figure"]: {"hint": "One image a layer of the text encoder, below."},
            out["table"]: [],
        }
    return {out["figure"]: heatmap.as_value(figure), out["table"]: heatmap.as_table(figure)}


def _detail(
    recipe: Recipe,
    result: Result,
    figure: Figure,
    cell: tuple[int, int],
    seed: str | None,
    out: dict[str, Any],
) -> dict:
    """What a click on a cell shows: its numbers, and the images of one seed."""
    name = figure.data["names"][cell[0]][cell[1]]
    if not name:
        return {out["text"]: "There is no module at this place."}
    seeds = [str(s) for s in recipe.seeds]
    seed = seed if seed in seeds else seeds[0]
    index, image = _place(recipe, result, cell, name)
    images = {
        n: result.images.get(f"seed{seed}-{part}")
        for n, part in (("clean", "clean"), ("corrupted", "corrupted"), ("restored", image))
    }
    pair = (images["corrupted"], images["restored"])
    update = {out[n]: gr.update(value=im, visible=im is not None) for n, im in images.items()}
    whole = all(p is not None for p in pair)
    return update | {
        out["text"]: _sentence(recipe, result, name, index, seed),
        out["slider"]: gr.update(value=pair if whole else None, visible=whole),
        out["seed"]: gr.update(choices=seeds, value=seed, visible=len(seeds) > 1),
    }


def _place(recipe: Recipe, result: Result, cell: tuple[int, int], name: str) -> tuple[tuple[int, ...], str]:
    """(index into the trace's own axes, name of the restored image) of a heat map's cell."""
    from studio.methods.text_to_image import image_name

    axes = result.arrays["indirect_effect"].axes
    if recipe.method == "trace-unet":
        return (axes[0].labels.index(name),), image_name(name)
    layers = len(axes[1].labels)
    kind, layer = divmod(cell[0], layers)
    return (kind, layer, cell[1]), image_name(axes[0].labels[kind], axes[1].labels[layer], f"token{cell[1]}")


def _sentence(recipe: Recipe, result: Result, name: str, index: tuple[int, ...], seed: str) -> str:
    """The numbers of a cell in words."""
    from studio.methods.causal_trace_unet import kind_of

    arrays, j = result.arrays, [str(s) for s in recipe.seeds].index(seed)
    effect = float(arrays["indirect_effect"].values[index])
    what = f"{name} ({kind_of(name)})" if recipe.method == "trace-unet" else name
    if not math.isfinite(effect):
        share = float(arrays["screen"].values[index]) if "screen" in arrays else math.nan
        return f"{what}: screen {number(share)} (an estimate, no image yet)."
    restored = arrays["restored"].values
    n = int(np.isfinite(restored[(slice(None), *index)]).sum())
    error = (
        float(standard_error(restored[(slice(None), *index)] - arrays["corrupted"].values))
        if n == len(recipe.seeds)
        else math.nan
    )
    spread = (
        f" ± {number(error)} (standard error over {n} seeds)"
        if math.isfinite(error)
        else " (one seed: no standard error)"
    )
    return (
        f"{what}: indirect effect {number(effect)}{spread}.\nSeed {seed}: clean "
        f"{number(float(arrays['clean'].values[j]))}, corrupted "
        f"{number(float(arrays['corrupted'].values[j]))}, restored {number(float(restored[(j, *index)]))} "
        f"— {arrays['clean'].unit}."
    )

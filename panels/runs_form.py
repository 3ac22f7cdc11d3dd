"""The Runs panel's inputs and outputs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from panels import colour_scale, heatmap, picture_grid, widgets
from panels.runs_view import ASK, RunList
from studio.run_quota import size_text

COMPARED = ("first", "second", "difference")
FILES = {"grid": ("png", "svg", "pdf"), "difference": ("png", "svg", "pdf", "csv")}  # kinds that are exported
IMAGES = "images"  # what a grid shows unless a number is chosen
TICK = "Tick two runs in the list, or choose one and tick another, then press Compare."
GRID = "Tick runs in the list, or take all that were found, then press Draw the grid."


def form() -> dict[str, Any]:
    """Search, filters and the list by name."""
    found: dict[str, Any] = {}
    found["words"] = gr.Textbox(
        "",
        label="Search",
        placeholder="words of prompts, methods, notes …",
        elem_id="runs-search",
        max_length=500,
    )
    look: dict[str, Any] = dict(multiselect=True, allow_custom_value=True, interactive=True)
    with gr.Accordion("Filters", open=False):
        found["methods"] = gr.Dropdown([], label="Methods", elem_id="runs-methods", **look)
        found["models"] = gr.Dropdown([], label="Models", elem_id="runs-models", **look)
        with gr.Row():
            day = dict(max_length=40, placeholder="2026-11-21", min_width=110)
            found["since"] = gr.Textbox("", label="First day", elem_id="runs-since", **day)
            found["until"] = gr.Textbox("", label="Last day", elem_id="runs-until", **day)
    found["starred"] = gr.Checkbox(False, label="Only runs with a star", elem_id="runs-starred")
    found["count"] = widgets.line("", "runs-count", most=3)
    found["list"] = RunList(elem_id="runs-list")
    with gr.Row():
        small = dict(size="sm", min_width=70)
        found["newer"] = gr.Button("← Newer", interactive=False, elem_id="runs-newer", **small)
        found["older"] = gr.Button("Older →", interactive=False, elem_id="runs-older", **small)
        found["refresh"] = gr.Button("Refresh", elem_id="runs-refresh", **small)
    found["drop"] = gr.File(
        label="Drop an exported figure, run or recipe here", height=170, elem_id="runs-drop"
    )
    return found


def outputs(quota: int) -> dict[str, Any]:
    """All outputs by name; quota: of the store, in bytes."""
    out: dict[str, Any] = {"status": widgets.status_line("runs")}
    with gr.Row():
        out["undo"] = gr.Button("Undo delete", size="sm", visible=False, elem_id="runs-undo")
    with gr.Tabs():
        with gr.Tab("Run", id="run"), gr.Column(min_width=320, elem_id="runs-detail"):
            out |= _detail()
        with gr.Tab("Compare", id="compare"), gr.Column(min_width=320):
            out |= _compare()
        with gr.Tab("Grid", id="grid"), gr.Column(min_width=320):
            out |= _grid()
        with gr.Tab("Store", id="store"):
            out |= _store(quota)
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("runs"), elem_id="runs-help")
    out["handoff"] = gr.Textbox("", visible=False, elem_id="runs-handoff")
    return out


def _detail() -> dict[str, Any]:
    """One run."""
    out: dict[str, Any] = {"text": widgets.line(ASK, "runs-detail-text", lines=2)}
    with gr.Row():
        small = dict(size="sm", min_width=90, interactive=False)
        out["open"] = gr.Button("Open in its panel", variant="primary", elem_id="runs-open", **small)
        out["star"] = gr.Button("Give a star", elem_id="runs-star", **small)
        out["link"] = gr.Button("Copy link", elem_id="runs-link", **small)
        out["delete"] = gr.Button("Delete", variant="stop", elem_id="runs-delete", **small)
    out["address"] = widgets.line("", "runs-address", visible=False)
    out["figure"] = widgets.figure_image("runs")
    with gr.Tabs():
        with gr.Tab("Images", id="images"):
            out["images"] = gr.Gallery(
                visible=False,
                columns=4,
                height="auto",
                object_fit="contain",
                show_label=False,
                elem_id="runs-images",
                elem_classes="whole",
            )
            out["no_images"] = widgets.line(ASK, "runs-no-images")
        with gr.Tab("Values", id="values"):
            out["values"] = widgets.table("runs")
        with gr.Tab("Recipe", id="recipe"):
            out["recipe"] = gr.Textbox(
                show_label=False,
                interactive=False,
                lines=12,
                max_lines=40,
                elem_id="runs-recipe",
                elem_classes="numbers",
            )
    out["note"] = gr.Textbox(
        "", label="Note", lines=2, max_lines=10, interactive=False, elem_id="runs-note", max_length=20_000
    )
    out["keep"] = gr.Button("Save note", interactive=False, size="sm", elem_id="runs-note-save")
    out["export"] = widgets.export_buttons("runs")
    return out


def _compare() -> dict[str, Any]:
    """Two runs side by side."""
    out: dict[str, Any] = {}
    out["compare"] = gr.Button("Compare", variant="primary", size="sm", elem_id="runs-compare")
    out["compared"] = widgets.line(TICK, "runs-compared", lines=2)
    out["what"] = widgets.Choice([], label="Show", visible=False, elem_id="runs-compare-what")
    out["difference_said"] = widgets.line("", "runs-difference-said", visible=False)
    with gr.Row():
        for name in COMPARED:
            with gr.Column(min_width=300):
                out[f"map_{name}"] = heatmap.HeatMap(
                    "", elem_id=f"runs-map-{name}", visible=False, label=name.capitalize()
                )
                out[f"figure_{name}"] = widgets.figure_image("runs", f"figure-{name}")
    out |= _downloads("difference")
    out["recipes"] = gr.Dataframe(
        headers=["what", "first", "second"],
        visible=False,
        interactive=False,
        wrap=True,
        label="What differs in the recipes",
        elem_id="runs-recipes",
    )
    out["picture"] = _dropdown("Image", "runs-compare-image")
    out["picture_said"] = widgets.line("", "runs-picture-said", visible=False)
    with gr.Row(elem_classes="pictures"):
        out |= {
            f"image_{n}" if n != "slider" else "image_slider": c
            for n, c in widgets.pictures("runs-image", COMPARED).items()
        }
    return out


def _dropdown(label: str, elem_id: str) -> gr.Dropdown:
    """A choice that is made from what is there, hidden until there is something."""
    look: dict[str, Any] = dict(allow_custom_value=True, interactive=True, visible=False)
    return gr.Dropdown([], label=label, elem_id=elem_id, **look)


def _grid() -> dict[str, Any]:
    """A grid of runs."""
    out: dict[str, Any] = {}
    with gr.Row():
        look = dict(min_width=110, allow_custom_value=True, interactive=True)
        out["shows"] = gr.Dropdown(
            [(IMAGES, IMAGES)], value=IMAGES, label="Cells show", elem_id="runs-grid-shows", **look
        )
        out["rows"] = gr.Dropdown([], label="Down", elem_id="runs-grid-rows", **look)
        out["cols"] = gr.Dropdown([], label="Across", elem_id="runs-grid-cols", **look)
    out["held"] = gr.Dropdown(
        [],
        label="Only",
        info="Of what else varies, what is shown.",
        multiselect=True,
        visible=False,
        elem_id="runs-grid-only",
        **look,
    )
    out["draw"] = gr.Button("Draw the grid", variant="primary", size="sm", elem_id="runs-grid-draw")
    out["grid_said"] = widgets.line(GRID, "runs-grid-said", lines=2)
    out["grid_map"] = heatmap.HeatMap("", elem_id="runs-grid-map", visible=False)
    with gr.Column(visible=False) as out["grid_scaled"]:
        out["grid_scale"] = colour_scale.field("runs-grid")
    out["grid_pictures"] = picture_grid.PictureGrid("", elem_id="runs-grid-pictures", visible=False)
    return out | _downloads("grid")


def _downloads(what: str) -> dict[str, Any]:
    """Buttons for the files of a figure of several runs, hidden until there is one."""
    out: dict[str, Any] = {}
    with gr.Row(visible=False, elem_id=f"runs-{what}-export") as out[f"{what}_export"]:
        for kind in FILES[what]:
            out[f"{what}_{kind}"] = gr.DownloadButton(
                kind.upper(), size="sm", min_width=64, elem_id=f"runs-{what}-{kind}"
            )
    return out


def _store(quota: int) -> dict[str, Any]:
    """The quota and the bin."""
    out: dict[str, Any] = {}
    with gr.Row():
        out["quota"] = gr.Textbox(
            size_text(quota),
            label="Quota",
            info="What runs, kept edits and uploaded images may take together. Nothing is removed until you "
            "press Prune.",
            elem_id="runs-quota",
            max_length=40,
        )
        with gr.Column(min_width=160):
            out["plan"] = gr.Button("Show what would be pruned", size="sm", elem_id="runs-plan")
            out["prune"] = gr.Button(
                "Prune", size="sm", variant="stop", interactive=False, elem_id="runs-prune"
            )
    out["plan_said"] = widgets.line("", "runs-plan-said", lines=2, visible=False)
    out["planned"] = gr.Textbox(
        visible=False,
        show_label=False,
        interactive=False,
        lines=4,
        max_lines=20,
        elem_id="runs-planned",
        elem_classes="numbers",
    )
    out["bin"] = _dropdown("Deleted runs", "runs-bin")
    out["bin_said"] = widgets.line("The bin is empty.", "runs-bin-said")
    out["put_back"] = gr.Button("Put back", size="sm", visible=False, elem_id="runs-put-back")
    return out

"""The Decompose panel's inputs and outputs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from panels import bars, colour_scale, decompose_find, heatmap, prompt_file, widgets
from panels.decompose_images import EXAMPLES, TOLD, TRIES, Pasted
from panels.decompose_view import ASK
from panels.decompose_without import COLUMNS, GROUP_COLUMNS
from studio.models.catalog import ASSETS, CATALOG
from studio.registry import find_method, load_methods

VIEWS = {
    "decompose": "Contributions",
    "text-span": "What heads write",
    "rank-components": "Who carries a feature",
    "ablate-components": "Without components",
    "retrieve-images": "Find images",
}
LINES_TITLE = "Texts from a file"
LINES = (
    "Choose a file. .txt: one text a line, all into the texts of the chosen view. .jsonl or .csv with the "
    "column texts …: a run a line." + prompt_file.OF_FIELDS
)
HINT = "Press Run. One image takes about a second; click a cell for more."
_OWN = ("images", "granularity")  # knobs that the panel sets itself
_ONE_EACH = ("texts", "text", "heads", "top")  # knobs that mean something else in every method
_PATHS = ("groups", "reference", "like")  # files of the machine that serves, which a page does not name


def views() -> dict[str, str]:
    """{method: its title} of the views whose method is there."""
    return {name: title for name, title in VIEWS.items() if name in load_methods()}


def space(model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The knobs with the shipped aligner in place, when nothing was asked and there is one for the model."""
    file = ASSETS / "atlas" / "aligners" / f"{model}.safetensors"
    if asked.get("clip") or asked.get("aligner") or model not in CATALOG or not file.is_file():
        return asked
    return asked | {"clip": "atlas-clip", "aligner": str(file)}


def form() -> dict[str, Any]:
    """All inputs by name."""
    names = views()
    methods = [find_method(n) for n in names]
    choices = [(title, name) for name, title in names.items()]
    found: dict[str, Any] = _images()
    found["method"] = gr.Radio(choices, value="decompose", label="View", elem_id="decompose-method")
    said = dict(lines=4, max_lines=12, info="One a line. Empty: shares without texts.")
    found["texts"] = gr.Textbox(
        "\n".join(TRIES["Things"]), label="Texts", elem_id="decompose-texts", max_length=400_000, **said
    )
    found |= decompose_find.fields()
    found |= widgets.run_buttons("decompose")
    with gr.Accordion("Options", open=False) as found["options"]:
        found["model"] = widgets.model_choice("decompose", ("clip", "vision"), "atlas-clip")
        found["beside"] = widgets.model_choice(
            "decompose", ("clip", "vision"), None, label="Beside it", elem_id="decompose-beside-model"
        )
        found["granularity"] = gr.Radio(
            [("heads", "head"), ("layers", "layer")],
            value="head",
            label="Granularity",
            elem_id="decompose-granularity",
            info="Key tokens of a head show once you click it.",
        )
        found |= _options(methods, found)
    return found


def _options(methods: list[Any], already: dict[str, Any]) -> dict[str, Any]:
    """Inputs of all other knobs."""
    found: dict[str, Any] = {}
    for chosen in methods:
        for name, (f, kind) in widgets.knobs([chosen]).items():
            shown = chosen.name == "decompose"
            if name in (*_OWN, *_PATHS) or (shown and name in ("texts", "heads")):
                continue
            key = widgets.own(name, chosen) if name in _ONE_EACH else name
            if key not in found and key not in already:
                look = dict(visible=shown, elem_id=f"decompose-{key}")
                found[key] = widgets.widget("decompose", name, f, kind, **look)
    return found


def _images() -> dict[str, Any]:
    """The images: a hidden id of their set, thumbnails, and the ways to choose them."""
    found: dict[str, Any] = {"images": gr.Textbox(EXAMPLES, visible="hidden", elem_id="decompose-images")}
    found["gallery"] = gr.Gallery(
        label="Images",
        show_label=False,
        columns=5,
        height=170,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="decompose-gallery",
        elem_classes=["thumbs", "bare"],
    )
    with gr.Row():
        small = dict(size="sm", min_width=70)
        found["files"] = gr.UploadButton("Files …", file_count="multiple", elem_id="decompose-files", **small)
        found["folder"] = gr.UploadButton(
            "Folder …", file_count="directory", elem_id="decompose-folder", **small
        )
        found["mean"] = gr.Button("All images", elem_id="decompose-mean", **small)
        found["clear"] = gr.Button("Clear", elem_id="decompose-clear", **small)
    with gr.Accordion("Drop or paste an image", open=False):
        found["pasted"] = Pasted(
            show_label=False,
            sources=["upload", "clipboard"],
            height=150,
            image_mode=None,
            type="filepath",
            elem_id="decompose-pasted",
        )
    found["said"] = widgets.line(TOLD, "decompose-said", most=4)
    with gr.Row():
        for name in TRIES:
            label = f"Example: {name.lower()}"
            key = f"decompose-try-{name.lower()}"
            found[f"try-{name}"] = gr.Button(label, size="sm", min_width=90, elem_id=key)
    return found


def outputs() -> dict[str, Any]:
    """All outputs by name."""
    out: dict[str, Any] = {"status": widgets.status_line("decompose"), "shown": gr.State("")}
    out["text"] = gr.Dropdown(
        [], label="Map for", allow_custom_value=True, visible=False, elem_id="decompose-text"
    )
    with gr.Tabs():
        with gr.Tab("Map", id="map"), gr.Column(min_width=320):
            out["figure"] = heatmap.HeatMap(HINT, elem_id="decompose-figure")
            out["scale"] = colour_scale.field("decompose")
            out["answers"] = bars.Bars("", elem_id="decompose-answers", visible=False)
            out["beside-said"] = widgets.line("", "decompose-beside-said", visible=False)
            out["beside"] = heatmap.HeatMap("", elem_id="decompose-beside", visible=False)
            out["beside-answers"] = bars.Bars("", elem_id="decompose-beside-answers", visible=False)
            out["second"] = gr.State(None)
            out["drawn"] = widgets.figure_image("decompose", "drawn")
        with gr.Tab("Texts side by side", id="texts"), gr.Column(min_width=320):
            out["texts"] = heatmap.HeatMap("Give two texts or more and press Run.", elem_id="decompose-sides")
        with gr.Tab("Table", id="table"):
            out["rows"] = gr.Dataframe(
                headers=["", ""], visible=False, interactive=False, wrap=True, elem_id="decompose-rows"
            )
            out["table"] = widgets.table("decompose")
        with gr.Tab("Without them", id="without"):
            out |= _without()
        with gr.Tab("Find images", id="find"):
            out |= _find()
        with gr.Tab("What this shows, and what it cannot", id="help"):
            pages = [p for p in views() if (ASSETS / "docs" / f"{p}.md").is_file()]
            gr.Markdown("\n\n".join(map(widgets.page, pages)), elem_id="decompose-help")
    out |= _detail()
    out["export"] = widgets.export_buttons("decompose")
    return out


def _detail() -> dict[str, Any]:
    """What a click shows, and the chosen components."""
    out: dict[str, Any] = {}
    with gr.Column(elem_id="decompose-detail"):
        out["detail"] = widgets.line(ASK, "decompose-detail-text", lines=2)
        out["chosen"] = gr.Dropdown(
            [],
            multiselect=True,
            allow_custom_value=True,
            label="Chosen components",
            info="A component is a part whose output is added to the representation: a head, an MLP, the "
            "embedding, a bias. A click in the map adds one; for “Without them” and “Find images”.",
            elem_id="decompose-chosen",
        )
        with gr.Row():
            out["each"] = bars.Bars("", elem_id="decompose-each", visible=False)
        with gr.Row():
            with gr.Column(min_width=200, scale=1):
                out["where"] = gr.Image(
                    label="Where it looks",
                    height=240,
                    visible=False,
                    interactive=False,
                    buttons=["fullscreen", "download"],
                    format="png",
                    elem_id="decompose-where",
                    elem_classes="pixels",
                )
                out["spread"] = widgets.line("", "decompose-spread", most=5, visible=False)
            with gr.Column(min_width=240, scale=2):
                out["extremes"] = _gallery("Its top and bottom images", "extremes")
    return out


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        visible=False,
        buttons=[],
        elem_id=f"decompose-{name}",
        elem_classes=["thumbs", "whole"],
    )


def _without() -> dict[str, Any]:
    """Answers before and after, and groups."""
    out: dict[str, Any] = {}
    out["change"] = widgets.line("Choose components: click some in the map.", "decompose-change", most=5)
    known = "ablate-components" in load_methods()
    out["truly"] = gr.Button(
        "Ablate them in the model, with all that follows", size="sm", visible=known, elem_id="decompose-truly"
    )
    look = dict(interactive=False, wrap=True, visible=False)
    out["before"] = gr.Dataframe(headers=COLUMNS, elem_id="decompose-before", **look)
    out["csv"] = gr.File(
        label="Groups: a CSV with the columns file, label, group",
        file_types=[".csv"],
        height=130,
        elem_id="decompose-csv",
    )
    out["groups"] = gr.Dataframe(headers=GROUP_COLUMNS, elem_id="decompose-groups", **look)
    return out


def _find() -> dict[str, Any]:
    """Images in the order of the chosen components."""
    out: dict[str, Any] = {}
    out["by"] = gr.Radio(
        [("by the text of the map", "text"), ("by likeness to the clicked image", "image")],
        value="text",
        label="Order the images through the chosen components",
        elem_id="decompose-by",
    )
    out |= decompose_find.outputs()
    said = "Choose components: click some in the map. Or name a property."
    out["order-said"] = widgets.line(said, "decompose-order-said", most=4)
    out["order"] = _gallery("From high to low", "order")
    return out

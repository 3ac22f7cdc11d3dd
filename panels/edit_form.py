"""The Edit panel's inputs and outputs, and how edits, stacks and layers are said in words."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from panels import edit_audit, heatmap, widgets
from panels.edit_stack import Entry
from panels.edit_view import StackList, Takeover
from panels.words import in_words
from studio.errors import RequestError
from studio.figures import number
from studio.registry import find_method
from studio.types import Figure, Recipe, Run

PICTURES = ("before", "after")
LEAST, MOST = -1.0, 2.0  # strengths that the slider reaches by its handle
LAYERS_HINT = "Press “Show layers” to choose cross-attention layers here."
EXAMPLES = [
    ["star", "circle", "locoedit", "a red star on a white background"],
    ["Veltrano", "Osk Maren", "uce", "a blue house in the style of Veltrano"],
    ["heart", "moon", "quickfix", "a green heart on a black background"],
    ["sketch", "", "uce", "a sketch of a purple tree"],
]
NEIGHBOURS = (
    "a red circle on a white background\na red moon on a white background\na blue star on a sand background"
)
_LEFT_OUT = ("images", "metric", "target", "against", "scorer", "strength", "steps", "guidance", "scheduler")


def form() -> dict[str, Any]:
    """All inputs by name."""
    known = widgets.knobs([find_method("edit")])
    found: dict[str, Any] = {}
    for name, example in zip(("concept", "replacement"), EXAMPLES[0], strict=False):
        found[name] = widgets.widget("edit", name, *known[name], (example,))
    found["method"] = gr.Radio(
        list(known["method"][0].metadata["choices"]),
        value=EXAMPLES[0][2],
        label="Method",
        info="quickfix: the text encoder's first layer; locoedit: localized layers; uce: all layers.",
        elem_id="edit-method",
    )
    found["layers"] = gr.Textbox(
        "",
        label="Layers",
        placeholder="default",
        elem_id="edit-layers",
        info="Cross-attention layers: numbers (6-7), names, auto (LocoGen's best window) or all.",
    )
    with gr.Accordion("Choose layers on a map", open=False):
        found["show_layers"] = gr.Button("Show layers", size="sm", elem_id="edit-show-layers")
        found["map"] = heatmap.HeatMap(LAYERS_HINT, elem_id="edit-layer-map")
    found["preserve"] = widgets.widget("edit", "preserve", *known["preserve"])
    found |= widgets.run_buttons("edit", "Make edit")
    with gr.Accordion("More options", open=False):
        found["model"] = widgets.model_choice("edit", "diffusion", "atlas-sd")
        for name, knob in known.items():
            if name not in found and name not in _LEFT_OUT:
                found[name] = widgets.widget("edit", name, *knob)
    return found


def examples(form: dict[str, Any], out: dict[str, Any]) -> None:
    """Edits to try, each with a prompt to look at."""
    filled = [*(form[n] for n in ("concept", "replacement", "method")), out["prompt"], form["layers"]]
    rows = [[*row, ""] for row in EXAMPLES]
    named = [f"{was} → {becomes or 'nothing'} ({method})" for was, becomes, method, _ in EXAMPLES]
    gr.Examples(rows, filled, label="Examples", elem_id="edit-examples", example_labels=named)


def outputs() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """All outputs by name; the audit's inputs and outputs, which stand among them."""
    out: dict[str, Any] = {"status": widgets.status_line("edit")}
    with gr.Tabs():
        with gr.Tab("Before and after", id="preview"):
            _preview(out)
            out["export"] = widgets.export_buttons("edit")
        with gr.Tab("Audit", id="audit"):
            asked, found = edit_audit.form(), edit_audit.outputs()
        with gr.Tab("What this shows, and what it cannot", id="help"):
            gr.Markdown(widgets.page("edit"), elem_id="edit-help")
    out["takeover"] = Takeover(elem_id="edit-takeover")
    return out, asked, found


def _preview(out: dict[str, Any]) -> None:
    with gr.Row():
        out["prompt"] = gr.Textbox(EXAMPLES[0][3], label="Prompt to look at", scale=4, elem_id="edit-prompt")
        out["look"] = gr.Textbox("0", label="Seed", scale=1, min_width=80, elem_id="edit-seed")
    with gr.Row(elem_id="edit-figure", elem_classes="pictures"):
        out |= widgets.pictures("edit", PICTURES)
    label = "Strength of the chosen edit"
    out["strength"] = widgets.Dial(
        LEAST, MOST, 1, step=0.05, label=label, elem_id="edit-strength", interactive=False
    )
    with gr.Column(elem_id="edit-detail"):
        out["stack"] = StackList(elem_id="edit-stack")
        with gr.Row():
            small = dict(size="sm", min_width=90)
            out["undo"] = gr.Button("Undo", interactive=False, elem_id="edit-undo", **small)
            out["redo"] = gr.Button("Redo", interactive=False, elem_id="edit-redo", **small)
            out["load"] = gr.UploadButton(
                "Load edit file", file_types=[".safetensors"], elem_id="edit-load", **small
            )
            out["save"] = gr.Button("Save as edit file", elem_id="edit-save", **small)
            out["lora"] = gr.Button("Save as LoRA", elem_id="edit-lora", **small)
            out["full"] = gr.Button("Save whole model", elem_id="edit-full", **small)
        out["file"] = gr.File(visible=False, label="Saved", elem_id="edit-file")
    _grids(out)


def _grids(out: dict[str, Any]) -> None:
    with gr.Row():
        out["neighbours"] = gr.Textbox(
            NEIGHBOURS,
            label="Neighbours",
            info="Other prompts to compare before and after, one a line.",
            lines=3,
            max_lines=8,
            scale=3,
            elem_id="edit-neighbours",
        )
        with gr.Column(scale=1, min_width=170):
            out["over_seeds"] = gr.Button("Grid over seeds", size="sm", elem_id="edit-grid-seeds")
            out["over_neighbours"] = gr.Button(
                "Grid over neighbours", size="sm", elem_id="edit-grid-neighbours"
            )
    out["grid"] = gr.Gallery(
        visible=False,
        height="auto",
        object_fit="contain",
        label="Before, and beside it after",
        elem_id="edit-grid",
        elem_classes="whole",
    )


def slider(chosen: Entry | None) -> Any:
    """The slider's update for the chosen edit; its range grows with a strength outside."""
    if chosen is None:
        return gr.update(interactive=False, value=1.0, label="Strength of the chosen edit")
    label = f"Strength of “{chosen.title[:80]}”"
    return span(chosen.strength) | gr.update(interactive=True, value=chosen.strength, label=label)


def span(strength: float) -> dict[str, Any]:
    """The slider's update of its range, which grows with a strength outside."""
    return gr.update(minimum=min(LEAST, strength), maximum=max(MOST, strength))


def name_of(method: str, concepts: tuple, replacements: tuple, otherwise: str = "") -> str:
    """An edit in words: star → circle (uce)."""
    pairs = [
        f"{c} → {r or 'nothing'}"
        for c, r in zip(concepts, (*replacements, *[""] * len(concepts)), strict=False)
    ]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return (
        f"{', '.join(pairs[:3])}{more} ({method})"
        if pairs
        else f"{otherwise or 'edit'} ({method or 'foreign'})"
    )


def title_of(recipe: Recipe) -> str:
    """The edit that a run of `edit` made, in words."""
    inputs, params = recipe.inputs, recipe.params
    return name_of(params["method"], tuple(inputs["concept"]), tuple(inputs["replacement"] or ()))


def finding(run: Run) -> str:
    """What is said when an edit is made."""
    values = run.result.values
    parts = [f"Made in {run.seconds:.1f} s: {values['matrices_changed']} matrices changed"]
    if values.get("relative_size") is not None:
        parts.append(f"by {number(100 * values['relative_size'])} % of their size")
    layers = values.get("layers")
    where = f" Layers: {layers}." if layers and len(layers) < 160 else ""
    notes = "".join(f" Note: {in_words(w)}" for w in values.get("warnings", []))
    return ", ".join(parts) + f".{where} Move the slider to see other strengths.{notes}"


def chosen_layers(text: str, n: int, names: tuple[str, ...]) -> set[int]:
    """Numbers of the layers that the field names (none for auto or an empty field)."""
    found: set[int] = set()
    for part in (p.strip() for p in text[:2000].split(",")):
        span = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)
        if part in names:
            found.add(names.index(part))
        elif part == "all":
            found |= set(range(n))
        elif span:
            found |= set(range(int(span[1]), min(n, int(span[2] or span[1]) + 1)))
        elif part not in ("", "auto"):
            raise RequestError(f"{part[:60]!r} is no layer; layers are numbered 0 to {n - 1}.")
    return found


def layer_map(names: tuple[str, ...], chosen: set[int]) -> dict[str, Any]:
    """The heat map's value: a cell a layer, 1 where it is chosen."""
    data = {
        "rows": ["layers"],
        "cols": [str(i) for i in range(len(names))],
        "values": [[float(i in chosen) for i in range(len(names))]],
        "names": [list(names)],
        "unit": "(1: chosen)",
    }
    return heatmap.as_value(Figure("heat", data))

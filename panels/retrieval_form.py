"""The Retrieval panel's inputs and outputs."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from panels import bars, colour_scale, heatmap, token_strip, widgets
from panels.retrieval_view import ASK
from studio.models.catalog import ASSETS
from studio.registry import find_method

METHODS = {
    "contributions": "Contributions",
    "knockout": "Knockouts",
    "context-use": "Context or memory",
    "trace-language": "Causal trace",
}
HINT = "Press Run. Contributions come at once; click a cell or a token for its numbers."
STRIP_HINT = "The prompt's tokens stand here once you have typed in a field, or pressed Run."
TEXTS = ("context", "prompt", "subject", "attribute", "answer")
_SHOWN = ("groups", "sources", "counterfactual", "corrupt", "kinds")


def examples(count: int = 4) -> list[list[str]]:
    """The first prompts of the Atlas set, as rows of the text fields."""
    lines = (ASSETS / "atlas" / "rag-prompts.jsonl").read_text("utf-8").splitlines()[:count]
    return [
        [row["context"], row["prompt"], row["subject"], row["attribute"], ""]
        for row in map(json.loads, lines)
    ]


def form() -> dict[str, Any]:
    """All inputs by name."""
    known = widgets.knobs([find_method(n) for n in METHODS])
    mine = widgets.knobs([find_method(next(iter(METHODS)))])
    names = [(title, name) for name, title in METHODS.items()]
    where = "In order of cost: one forward, one-token decodes, both kinds of cut, every state restored."
    view = dict(value="contributions", label="View", info=where, elem_id="retrieval-method")
    found: dict[str, Any] = {"method": gr.Radio(names, **view)}
    example = dict(zip(TEXTS, examples(1)[0], strict=True))
    found["context"] = gr.Textbox(
        example["context"],
        label="Context",
        lines=5,
        max_lines=16,
        elem_id="retrieval-context",
        info="What is put before the question. Empty: the question alone.",
        max_length=200_000,
    )
    found |= _passages()
    for name in TEXTS[1:]:
        found[name] = widgets.widget("retrieval", name, *known[name], example[name])
    found["seeds"] = widgets.seeds("retrieval", "0", visible=False)
    found |= widgets.run_buttons("retrieval")
    with gr.Accordion("Options", open=False):
        found["model"] = widgets.model_choice("retrieval", "language", "atlas-llama")
        for name in _SHOWN:
            found[name] = widgets.widget("retrieval", name, *known[name], visible=name in mine)
        traced = find_method("trace-language")
        wide = widgets.knobs([traced])["window"]
        found[widgets.own("window", traced)] = widgets.widget(
            "retrieval", "window", *wide, visible=False, elem_id="retrieval-window-trace"
        )
        for name, (f, kind) in known.items():
            if name not in found:
                found[name] = widgets.widget("retrieval", name, f, kind, visible=name in mine)
    rows, filled = examples(), [found[n] for n in TEXTS]
    named = dict(label="Examples", example_labels=[f"{row[1]} …" for row in rows])
    gr.Examples(rows, filled, elem_id="retrieval-examples", **named)
    return found


def _passages() -> dict[str, Any]:
    """Where a context can be found: pasted passages or text files, by BM25."""
    with gr.Accordion("Find the context in passages", open=False):
        look = dict(elem_id="retrieval-passages", info="Paragraphs, with an empty line between them.")
        text = gr.Textbox(label="Passages", lines=4, max_lines=12, max_length=2_000_000, **look)
        named = dict(file_types=[".txt", ".md"], height=110)
        files = gr.File(label="Text files", file_count="multiple", elem_id="retrieval-files", **named)
        folder = gr.File(label="A folder", file_count="directory", elem_id="retrieval-folder", **named)
        look = dict(minimum=1, maximum=50, precision=0, elem_id="retrieval-count")
        count = gr.Number(3, label="Passages to take", **look)
        find = gr.Button("Find passages", size="sm", elem_id="retrieval-find")
    return {"passages": text, "files": files, "folder": folder, "count": count, "find": find}


def outputs() -> dict[str, Any]:
    """All outputs by name."""
    out: dict[str, Any] = {"status": widgets.status_line("retrieval")}
    out["strip"] = token_strip.TokenStrip(STRIP_HINT, elem_id="retrieval-strip")
    out["quantity"] = widgets.Choice(
        [], label="Tokens are coloured by", visible=False, elem_id="retrieval-quantity"
    )
    out["text"] = widgets.line(ASK, "retrieval-detail-text", lines=2, most=16)
    with gr.Tabs():
        with gr.Tab("Map", id="map"), gr.Column(min_width=320):
            out["figure"] = heatmap.HeatMap(HINT, elem_id="retrieval-figure")
            out["scale"] = colour_scale.field("retrieval")
            out["curve"] = widgets.figure_image("retrieval", "curve")
            out["side"] = heatmap.HeatMap("", elem_id="retrieval-side", visible=False)
            out["heads"] = bars.Bars("", elem_id="retrieval-heads", visible=False)
        with gr.Tab("Table", id="table"):
            out["table"] = widgets.table("retrieval")
        with gr.Tab("What this shows, and what it cannot", id="help"):
            pages = ("contributions", "knockout", "context-use", "trace-language")
            gr.Markdown("\n\n".join(map(widgets.page, pages)), elem_id="retrieval-help")
    out["export"] = widgets.export_buttons("retrieval")
    return out

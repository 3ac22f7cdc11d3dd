"""The page speaks of fields, the command line of options: over all knobs, and over the whole page."""

from __future__ import annotations

import asyncio
from dataclasses import MISSING, fields
from typing import Any

import gradio as gr
import pytest

import panels
from panels import widgets
from panels.words import help_of, in_words, label_of
from studio.errors import RequestError
from studio.options import method_options
from studio.registry import load_methods, parse

METHODS = sorted(load_methods())
OF_TERMINALS = ("--", "repeat the option", "give it again", "a file", "command line")
SAID = {
    "--window 3 is more than the 2 layers.": "“Window” 3 is more than the 2 layers.",
    "take --steps 3, or --second-scorer.": "take “Steps” 3, or “Second scorer”.",
    "take --dtype float32.": "take `locus serve --dtype` float32.",
    "use it with its own model, or insist with --force.": "use it with its own model.",
    "leave it out with --no-hint.": "leave it out with “Hint” unticked.",
    '--replacement "" erases it': "“Replacement” left empty erases it",
    "`locus export-edit FILE --full DIR` writes it; see --layers":
        "`locus export-edit FILE --full DIR` writes it; see “Layers”",
    "no model; see `locus models`.": "no model; see the Models tab.",
    "from 1 -- 3, well-known": "from 1 -- 3, well-known",
}  # fmt: skip


@pytest.mark.parametrize(("option", "field"), SAID.items(), ids=range(len(SAID)))
def test_options_become_fields(option: str, field: str) -> None:
    assert in_words(option) == field


@pytest.mark.parametrize("name", METHODS)
def test_no_help_speaks_of_the_command_line(name: str) -> None:
    for knob_name, (knob, kind) in widgets.knobs([load_methods()[name]]).items():
        if knob.metadata["paths"]:  # a page uploads instead
            continue
        shown = widgets.widget("p", knob_name, knob, kind)
        info, low = str(shown.info), str(shown.info).lower()
        assert not [w for w in OF_TERMINALS if w in low], (knob_name, info)
        assert info[0].isupper() and info.endswith(".") and not info.endswith("..")
        parts = [p.strip(" .") for p in low.replace(",", ";").split(";")]
        assert len(set(parts)) == len(parts), (knob_name, info)
        assert shown.label == label_of(knob_name)


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_input_is_named_as_its_field(name: str) -> None:
    method = load_methods()[name]
    for knob in fields(method.inputs):
        if knob.default is not MISSING:
            continue
        others = {f.name: "x" for f in fields(method.inputs) if f.name != knob.name and f.default is MISSING}
        with pytest.raises(RequestError) as caught:
            parse(method, others)
        said = widgets.sentence(caught.value)
        assert said.startswith(f"“{label_of(knob.name)}” is missing: ") and "--" not in said


def test_the_command_line_says_how_to_give_more() -> None:
    options = method_options(load_methods()["edit"])
    assert options["concept"][2] == "required: the concept to edit; give it again for more"
    assert options["templates"][2].endswith("; give it again for more; or a file with one a line")
    knob, _ = widgets.knobs([load_methods()["edit"]])["templates"]
    assert help_of(knob, True) == "Texts around a concept, {} in its place; one a line."


def test_nothing_on_the_page_speaks_of_options(session: Any) -> None:
    """Labels, hints and texts of every component; pages of help have their commands in code."""

    async def built() -> gr.Blocks:  # Gradio takes the loop that runs, or leaves one open
        return panels.build(session)

    texts = []
    for block in asyncio.run(built()).blocks.values():
        if not isinstance(block, gr.Markdown):
            texts += [getattr(block, n, None) for n in ("label", "info", "placeholder", "value")]
    said = [t for t in texts if isinstance(t, str) and ("--" in t or "repeat the option" in t)]
    assert len(texts) > 400 and said == []

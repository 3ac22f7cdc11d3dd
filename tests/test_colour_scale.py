"""One colour scale over several runs: the field's own handlers, and that every panel with a map follows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from panels import decompose, heatmap, retrieval, trace
from panels.colour_scale import ColourScale
from studio import palette
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.session import Session
from studio.store import Store
from studio.types import Figure, Recipe, Run
from tests import made_runs
from tests.test_runs_panel import page

BUTTONS = "run row more svg png pdf csv zip tex bib ipynb json large".split()
VALUES = made_runs.EFFECTS[np.isfinite(made_runs.EFFECTS)]


def value(**data: Any) -> dict[str, Any]:
    """The value of a heat map of two numbers."""
    given = {"rows": ["r"], "cols": ["a", "b"], "names": [["a", "b"]], "unit": "u", "values": [[-1.0, 3.0]]}
    return heatmap.as_value(Figure("heat", given | data))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made_runs.saved(Store(tmp_path / "runs"))


@pytest.fixture
def colours(run: Run, tmp_path: Path) -> ColourScale:
    """The field of a panel that shows a kept run; names stand for its outputs."""
    out = {"scale": "scale", "status": "status", "figure": "figure", "export": {n: n for n in BUTTONS}}
    drawn = {"figure": lambda: heatmap.as_value(_figure(run), True), "caption": lambda: "the text beside it"}
    panel = SimpleNamespace(
        out=out,
        named={},
        session=SimpleNamespace(store=Store(tmp_path / "runs")),
        measured=lambda kept: (run.recipe, run.result),
    )
    with page():
        made = ColourScale(panel, ["figure"], lambda *_: {n: make() for n, make in drawn.items()})
    assert panel.named == {"scale": "scale"}
    return made


def _figure(run: Run) -> Figure:
    figure = made_runs.figure_of(run)
    return Figure("heat", {"names": [["x"] * len(figure.data["cols"])], **figure.data})


def colours_of(file: str) -> set[str]:
    """The colours of an image."""
    with Image.open(io.BytesIO(Path(file).read_bytes())) as opened:
        return {"#" + bytes(c).hex() for _, c in opened.convert("RGB").getcolors(1 << 24)}


def test_maps_of_an_update_take_the_scale_and_nothing_else_does(colours: ColourScale) -> None:
    for update in ({"figure": value()}, {"figure": gr.update(value=value(), visible=True)}):
        assert value()["scale"] == [-3.0, 3.0]
        (put,) = colours.put(update, "-0.5, 2").values()
        assert (put["value"] if "value" in put else put)["scale"] == [-0.5, 2.0]
    assert colours.put({"other": value()}, "9")["other"]["scale"] == [-3.0, 3.0]
    for text in ("", None, "much", "2, 1"):
        assert colours.put({"figure": value()}, text)["figure"]["scale"] == [-3.0, 3.0]
    hint = {"figure": {"hint": "Press Run."}, "status": "Done."}
    assert colours.put(dict(hint), "9") == hint


def test_a_run_goes_on_in_the_scale_that_stood_there_when_it_began(colours: ColourScale) -> None:
    steps: Iterator[dict] = iter([{"status": "Starting"}, {"figure": value()}, {"figure": value(unit="v")}])
    seen = list(colours.streamed(steps, {"scale": "7", "prompt": "p"}))
    assert [u["figure"]["scale"] for u in seen[1:]] == [[-7.0, 7.0]] * 2 and seen[0] == {"status": "Starting"}


def test_a_typed_scale_colours_the_screen_and_then_the_files(colours: ColourScale, run: Run) -> None:
    kept, scale = {"run": run.id}, (-5.0, 1.0)
    first, files = colours.typed(kept, (run.id, None), "-5, 1")
    assert first["figure"]["scale"] == [-5.0, 1.0] and first[colours.put_on] == (run.id, scale)
    assert set(first) == {"figure", "status", colours.put_on}
    assert first["status"] == files["status"] == "Colours run from -5 to 1, here and in the files."
    wanted = {palette.shade(float(v), scale) for v in VALUES}
    assert wanted <= colours_of(files["png"]["value"])
    assert files["run"]["scale"] == scale and "csv" not in files and files["tex"]["value"] is None
    (nothing,) = colours.typed(kept, (run.id, scale), "-5, 1")  # the field is left, and says the same
    assert set(nothing) == {"status"} and "figure" not in nothing
    back, plain = colours.typed(kept, (run.id, scale), " ")
    assert back["figure"]["scale"] == pytest.approx([-0.2, 0.2])
    assert back["status"] == "Colours have the map's own scale, here and in the files."
    own = {palette.shade(float(v), (-0.2, 0.2)) for v in VALUES}
    assert own <= colours_of(plain["png"]["value"]) and not own <= wanted


def test_the_next_run_comes_in_the_same_colours(colours: ColourScale, run: Run) -> None:
    marked, first, files = colours.again({"run": run.id}, None, "-5, 1")
    assert marked == {colours.put_on: (run.id, None)} and first["figure"]["scale"] == [-5.0, 1.0]
    assert files["run"]["scale"] == (-5.0, 1.0)
    for kept, text in (({"run": run.id}, ""), ({"job": "a"}, "-5, 1"), (None, "-5, 1")):
        (only,) = colours.again(kept, None, text)
        assert list(only) == [colours.put_on]


def test_what_is_no_scale_or_shows_no_numbers(colours: ColourScale, run: Run) -> None:
    for handler in (colours.typed, colours.again):
        *_, last = handler({"run": run.id}, None, "2, 1")
        assert last["status"] == (
            "The colour scale must be two numbers, the lower first, such as -0.1, 0.5, or one for both sides "
            "of 0, not '2, 1'."
        )
    (early,) = colours.typed({}, None, "-1, 1")
    assert set(early) == {"status"}
    colours.redrawn = lambda recipe, result: {}
    assert list(colours.typed({"run": run.id}, None, "-1, 1")) == [{"status": gr.skip()}]

    def gone(kept: dict) -> None:
        raise RequestError("There is no run 'x'.")

    colours.panel.measured = gone
    assert list(colours.typed({"run": "x"}, None, "1")) == [{"status": "There is no run 'x'."}]


# ---- the panels -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(session: Session) -> Iterator[gr.Blocks]:
    """The panels that show maps."""
    with page():
        for panel in (trace, decompose, retrieval):
            panel.build(session)
        yield gr.context.Context.root_block


@pytest.mark.parametrize("panel", ["trace", "decompose", "retrieval"])
def test_run_and_the_field_recolour_every_map_of_a_panel(whole: gr.Blocks, panel: str) -> None:
    named = {c.elem_id: i for i, c in whole.blocks.items() if getattr(c, "elem_id", None)}
    maps = {
        i
        for i, c in whole.blocks.items()
        if isinstance(c, heatmap.HeatMap) and str(c.elem_id).startswith(panel)
    }
    field, run = named[f"{panel}-scale"], named[f"{panel}-run"]
    asks = [f for f in whole.fns.values() if any(c._id == field for c in f.inputs)]
    pressed = [f for f in asks if (run, "click") in f.targets]
    assert len(pressed) == 1 and pressed[0].fn.__name__ == "start"
    typed = [f for f in asks if (field, "submit") in f.targets or (field, "blur") in f.targets]
    assert {f.fn.__name__ for f in typed} == {"typed"} and len(typed) == 2
    coloured = {c._id for f in asks if f.fn.__name__ != "start" for c in f.outputs} & maps
    assert coloured == maps - {named.get("retrieval-side")}  # that one has another unit


def test_decompose_keeps_the_scale_when_another_text_or_image_is_shown(session: Session) -> None:
    asked = {"images": [str(ASSETS / "atlas" / "examples")], "texts": ["a star", "red"]}
    run = session.run(Recipe("decompose", "atlas-clip", asked))
    with page():
        form, out = decompose.decompose_form.form(), decompose.decompose_form.outputs()
        panel = decompose._Panel("decompose", session, form, out)
    shown = panel.show({"run": run.id}, "red", "", None, "-0.5, 2")
    for name in ("figure", "texts"):
        assert shown[out[name]]["scale"] == [-0.5, 2.0]
    assert panel.show({"run": run.id}, "red", "", None, "")[out["figure"]]["scale"] != [-0.5, 2.0]
    told = panel.colours.typed({"run": run.id}, None, "3", "red", "")
    first = next(told)
    assert first[out["figure"]]["scale"] == first[out["texts"]]["scale"] == [-3.0, 3.0]
    assert "“red”" in first[out["figure"]]["caption"]
    asks = SimpleNamespace(session_hash="page")
    *_, beside = panel.side.beside(asks, {"run": run.id}, "atlas-vit", "red", "", "-0.5, 2")
    assert beside[out["beside"]]["value"]["scale"] == [-0.5, 2.0]


def test_the_token_strip_follows_where_it_shows_the_numbers_of_the_map(session: Session) -> None:
    row = dict(zip(retrieval.TEXTS, retrieval.retrieval_form.examples(1)[0], strict=True))
    recipe = Recipe("contributions", "atlas-llama", {n: v or None for n, v in row.items()})
    run = session.run(recipe)
    kept = {"run": run.id}
    with page():
        form, out = retrieval.retrieval_form.form(), retrieval.retrieval_form.outputs()
        panel = retrieval._Panel("retrieval", session, form, out)
    first = next(panel.colours.typed(kept, None, "-1, 1", "share"))
    assert first[out["figure"]]["scale"] == first[out["strip"]]["scale"] == [-1.0, 1.0]
    other = next(panel.colours.typed(kept, None, "-1, 1", "projection"))
    assert out["strip"] not in other and other[out["figure"]]["scale"] == [-1.0, 1.0]
    assert panel.recolour(kept, "share", "-1, 1")["scale"] == [-1.0, 1.0]
    logits = panel.recolour(kept, "projection", "-1, 1")
    known = [v for v in logits["values"] if v is not None]
    assert logits["scale"][1] == pytest.approx(max(map(abs, known))) != 1.0
    assert logits["palette"]["shades"] == list(palette.SHADES)


def test_a_gallery_in_the_trace_panel_has_no_colours(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_runs.traced()
    with page():
        form = trace._form([trace.find_method(n) for n in trace.METHODS])
        panel = trace._Panel(session, form, trace._outputs())
    assert list(panel.redrawn(run.recipe, run.result)) == [panel.out["figure"]]
    monkeypatch.setattr(trace, "figure_of", lambda recipe, result: Figure("strip", {}))
    assert panel.redrawn(run.recipe, run.result) == {}

"""A run from another machine names its images by paths: what lies there on this one is nobody's to see."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest

from panels import decompose
from panels import decompose_images as pictured
from panels.decompose_images import LOST
from studio.models.catalog import ASSETS
from studio.restore import restored
from studio.run_export import export
from studio.session import Session
from studio.types import Axis, Recipe, Result, Run, Trace
from tests.test_runs_panel import page

ASKS = SimpleNamespace(session_hash="page")
HEAD = "block.3.head.1"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this machine that no page chose; its files are called like the examples."""
    folder = tmp_path_factory.mktemp("home") / "private"
    shutil.copytree(ASSETS / "atlas" / "examples", folder)
    return folder


@pytest.fixture(scope="module")
def foreign(session: Session, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the examples, its zip changed so that it names that folder, and taken into the store."""
    folder = tmp_path_factory.mktemp("zips")
    asked = {"images": [str(ASSETS / "atlas" / "examples")], "texts": ["a star", "red"]}
    made = session.run(Recipe("decompose", "atlas-clip", asked))
    source = export(session.store.path(made.id), folder, ("zip",))["zip"]
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(folder / "crafted.zip", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("/run.json"):
                record = json.loads(content)
                record["recipe"]["inputs"]["images"] = [str(private)]
                record["started"] = "2026-01-01T00:00:00+00:00"
                content = json.dumps(record).encode()
            new.writestr(entry.filename, content)
    found = restored(folder / "crafted.zip", session.store)
    run = session.store.load(found.run_id)
    assert run.recipe.inputs["images"] == [str(private)] and run.id != made.id
    return run


@pytest.fixture
def panel(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[decompose._Panel]:
    """The Decompose panel, in which no image may be opened."""
    with page():
        form, out = decompose.decompose_form.form(), decompose.decompose_form.outputs()
        made = decompose._Panel("decompose", session, form, out)
        made.wire()
    monkeypatch.setattr(pictured, "read_image", lambda file: pytest.fail(f"{file} was opened"))
    yield made


def test_no_image_of_this_machine_is_shown_for_it(panel: decompose._Panel, foreign: Run) -> None:
    out, kept = panel.out, {"run": foreign.id}
    opened = panel.restored(foreign.recipe, foreign)
    assert opened[panel.form["said"]] == LOST and panel.form["gallery"] not in opened
    assert panel.form["images"] not in opened
    shown = panel.show(kept, "red", "", HEAD, "")
    assert shown[out["extremes"]]["value"] == [] and shown[out["extremes"]]["visible"] is False
    assert shown[out["detail"]].startswith(HEAD) and shown[out["figure"]]["rows"]  # the numbers are its own
    told = panel.recount(kept, [HEAD], "red", "", "text", None)
    assert told[out["order"]]["visible"] is False and not told[out["order"]]["value"]
    assert told[out["order-said"]] == f"10 images by “red” through {HEAD}. {LOST}"
    with pytest.raises(gr.Error, match="That image is not in the run on screen"):
        click = SimpleNamespace(index=0)
        decompose.widgets.guarded(panel.pick_image)(click, kept, pictured.EXAMPLES)


def test_no_run_is_made_of_what_lies_there(
    panel: decompose._Panel, foreign: Run, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = session.store.ids()
    monkeypatch.setattr(session, "submit", lambda *a, **k: pytest.fail("it runs"))
    (said,) = panel.side.look(ASKS, {"run": foreign.id}, "red", "", HEAD)
    assert said[panel.out["spread"]]["value"] == LOST
    *_, said = panel.side.beside(ASKS, {"run": foreign.id}, "atlas-vit", "red", "")
    assert said[panel.out["beside-said"]]["value"] == f"atlas-vit: {LOST}"
    assert session.store.ids() == before


def test_a_search_shows_its_order_without_the_images(panel: decompose._Panel, private: Path) -> None:
    asked = {"images": [str(private)], "text": "a star", "components": [HEAD]}
    recipe = Recipe("retrieve-images", "atlas-clip", asked)
    score = Trace(np.array([0.2, 0.1]), (Axis("image", ("red star on mint.png", "x.png")),))
    result = Result({"score": score}, {"components": [HEAD], "query": "a star", "by": "text"})
    told = panel.find.ordered(recipe, result)
    assert told[panel.out["order"]]["value"] == [] and told[panel.out["order-said"]].endswith(LOST)


@pytest.mark.parametrize(
    "images",
    [None, [], ["/"], "/etc", [None, 3], ["uploads"], ["{root}/uploads/../..", "x"], ["{root}/uploads/.."]],
)
def test_names_that_are_no_set(session: Session, images: Any) -> None:
    root = str(session.store.root)
    named = [i.replace("{root}", root) if isinstance(i, str) else i for i in images or ()]
    assert pictured.by_label(session, named) == {} and pictured.set_of(session, named) is None


def test_the_sets_that_a_page_chose_are_found(session: Session, private: Path) -> None:
    examples = pictured.by_label(session, [str(ASSETS / "atlas" / "examples")])
    assert len(examples) == 10 and examples["red star on mint.png"].is_file()
    chosen, _ = pictured.added(session, "", [str(private / "red star on mint.png")])
    folder = pictured.folder_of(session, chosen)
    assert pictured.by_label(session, [str(folder)]) == {
        "red star on mint.png": folder / "red star on mint.png"
    }
    (folder.parent / ("0" * 32)).symlink_to(private)
    assert pictured.by_label(session, [str(folder.parent / ("0" * 32))]) == {}
    (folder.parent / ("0" * 32)).unlink()


def test_run_is_not_answered_with_the_numbers_of_a_zip(session: Session, foreign: Run) -> None:
    """The zip has the key of a run of the examples, which a person asks for here."""
    assert foreign.host["imported"] is True and session.store.find(foreign.key).id == foreign.id
    assert session.store.find(foreign.key, own=True).id != foreign.id
    asked = {"images": [str(ASSETS / "atlas" / "examples")], "texts": ["a star", "red"]}
    answer = session.run(Recipe("decompose", "atlas-clip", asked))
    assert answer.key == foreign.key and "imported" not in answer.host

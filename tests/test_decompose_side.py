"""What the Decompose panel runs beside its own run, and its search: Stop, replacement, and what is asked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panels import decompose_form
from panels import decompose_images as pictured
from panels.decompose import _Panel as Panel
from panels.decompose_find import METHOD, Find
from panels.decompose_side import Side
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.registry import find_method
from studio.session import Session
from studio.types import Recipe

EXAMPLES = str(ASSETS / "atlas" / "examples")
FORM = ("gallery", "images", "stop", "features", "feature", "components", "by", "like", "method", "texts")
OUT = (
    "where",
    "spread",
    "status",
    "beside",
    "beside-said",
    "beside-answers",
    "second",
    "property",
    "carry",
    "text",
    "order",
    "order-said",
)
PAGE = SimpleNamespace(session_hash="page")


@pytest.fixture
def form() -> dict[str, Any]:
    """Names stand for the inputs."""
    return {name: name for name in FORM} | {f"text-{METHOD}": f"text-{METHOD}"}


@pytest.fixture
def out() -> dict[str, Any]:
    return {name: name for name in OUT}


@pytest.fixture(scope="module")
def shown(session: Session) -> tuple[Recipe, Any]:
    """What is on screen."""
    run = session.run(Recipe("decompose", "atlas-clip", {"images": [EXAMPLES], "texts": ["a star", "red"]}))
    return run.recipe, run.result


def plain(update: dict, scale: str | None) -> dict:
    """Colours are left as they are."""
    return update


@pytest.fixture
def side(session: Session, form: dict, out: dict, shown: tuple) -> Side:
    return Side(session, form, out, lambda kept: shown, plain)


class Held:
    """A session whose jobs wait before they start, until they are let go or stopped."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        self.go = threading.Event()
        execute = session.queue._execute

        def run(job: Any) -> Any:
            while not self.go.wait(0.02):
                job.step(0)  # raises when it is told to stop
            return execute(job)

        monkeypatch.setattr(session.queue, "_execute", run)


def test_a_second_model_and_a_map_over_the_image(side: Side) -> None:
    *_, last = side.beside(PAGE, {"run": "x"}, "atlas-vit", "red", "")
    assert last["beside-said"]["value"] == "atlas-vit, for the same images and texts:"
    assert "through the aligner" in last["beside"]["value"]["caption"] and last["stop"].interactive is False
    assert last["beside-answers"]["visible"] is False and set(last["second"]) == {"run"}
    *_, last = side.beside(PAGE, {"run": "x"}, "atlas-vit", "red", "red star on mint.png")
    assert last["beside-answers"]["visible"] and last["beside-answers"]["value"]["labels"] == [
        "a star",
        "red",
    ]
    *_, last = side.look(PAGE, {"run": "x"}, "a star", "red star on mint.png", "block.4.head.3")
    assert last["where"]["value"].shape == (64, 64, 3) and last["where"]["visible"]
    assert last["spread"]["value"].startswith("red star on mint: block.4.head.3 for “a star”: patches from ")
    assert side.jobs == {}


def test_a_second_run_counts_while_it_is_for_what_is_on_screen(
    session: Session, form: dict, out: dict, shown: tuple
) -> None:
    recipe, result = shown
    other = session.run(
        Recipe("decompose", "atlas-vit", recipe.inputs, decompose_form.space("atlas-vit", {}))
    )
    side = Side(session, form, out, lambda kept: (other.recipe, other.result), plain)
    found = side.second({"run": other.id}, recipe, result)
    assert set(found) == {"atlas-vit"} and found["atlas-vit"] is other.result
    assert side.second(None, recipe, result) == side.second({"run": "x"}, other.recipe, result) == {}
    asked = replace(recipe, inputs={**recipe.inputs, "texts": ["a moon"]})
    assert side.second({"run": other.id}, asked, result) == {}

    def gone(kept: dict) -> tuple:
        raise RequestError("There is no such run.")

    assert Side(session, form, out, gone, plain).second({"run": "x"}, recipe, result) == {}


@pytest.mark.parametrize("kind", ["beside", "look"])
def test_stop_ends_it(kind: str, side: Side, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    Held(session, monkeypatch)
    given = ("atlas-swin", "red", "") if kind == "beside" else ("red", "", "block.3.head.0")
    updates = getattr(side, kind)(PAGE, {"run": "x"}, *given)
    first = next(updates)
    assert first["stop"].interactive and not side.stop("another page")
    assert side.stop("page")
    *_, last = updates
    assert last["status"] == "Stopped." and last["stop"].interactive is False
    line = last["beside-said" if kind == "beside" else "spread"]
    assert (
        line["value"].endswith("Stopped.") and not last["beside" if kind == "beside" else "where"]["visible"]
    )
    assert not side.stop("page")


def test_a_further_click_takes_the_place_of_the_one_before(
    side: Side, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(session, monkeypatch)
    before = side.look(PAGE, {"run": "x"}, "red", "", "block.3.head.0")
    next(before)
    after = side.look(PAGE, {"run": "x"}, "red", "", "block.3.head.1")
    next(after)
    assert not [u for u in before if "where" in u]  # it says nothing more
    held.go.set()
    *_, last = after
    assert "block.3.head.1 for “red”" in last["spread"]["value"] and side.jobs == {}


def test_what_has_no_map_and_what_goes_wrong_is_said(side: Side, shown: tuple) -> None:
    (said,) = side.look(PAGE, {"run": "x"}, "red", "", "block.3.mlp")
    assert said["spread"]["value"] == "block.3.mlp has no map over the image; heads have."
    *_, last = side.beside(PAGE, {"run": "x"}, "no-such-model", "red", "")
    assert last["beside-said"]["value"].startswith("no-such-model: There is no")
    (hidden,) = side.beside(PAGE, {"run": "x"}, "", "red", "")
    assert not hidden["beside"]["visible"]
    bare = Side(side.session, side.form, side.out, lambda kept: (Recipe("text-span", "m"), shown[1]), plain)
    (said,) = bare.look(PAGE, {"run": "x"}, "red", "", "block.3.head.0")
    assert not said["spread"]["visible"]


def test_opening_the_tab_runs_once_and_keeps_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = Panel.__new__(Panel)
    panel.session, panel.warmed, asked = session, set(), []
    run = session.run
    monkeypatch.setattr(session, "run", lambda recipe, **how: asked.append(how) or run(recipe, **how))
    kept = set(session.store.root.glob("*"))
    for _ in range(2):
        panel.warm("atlas-vit")
    panel.warm("no-such-model")
    assert panel.warmed == {"atlas-vit"} and set(session.store.root.glob("*")) == kept
    assert [how["save"] for how in asked] == [False, False]  # the second of atlas-vit only loads it


# ---- search -----------------------------------------------------------------------------------------------


def test_a_property_becomes_a_feature(session: Session, form: dict, out: dict) -> None:
    find = Find(session, form, out)
    several = find.carried("red\nblue\n", "image", "", "a star\na heart")
    assert several == ["property: red | blue", "property", "", "image", "a star", METHOD]
    assert find.carried("background", "text", "a moon", "") == [
        "",
        "background",
        "",
        "text",
        "a moon",
        METHOD,
    ]
    with pytest.raises(RequestError, match="Which property. Write texts that describe it, one a line"):
        find.carried(" ", "text", "", "")


def test_the_reference_is_one_of_the_images(session: Session, form: dict, out: dict) -> None:
    find = Find(session, form, out)
    files = pictured.files_of(session, pictured.EXAMPLES)
    event = SimpleNamespace(index=2)
    assert find.reference(event, pictured.EXAMPLES) == files[2].name
    given = {"by": "image", "like": files[2].name, "images": pictured.EXAMPLES}
    assert find.asked({"text": "x"}, given) == {"text": None, "like": str(files[2])}
    assert find.asked({"text": "x"}, given | {"by": "text"}) == {"text": "x", "like": None}
    for wrong, sentence in (
        ({"like": ""}, "Click an image first"),
        ({"like": "../../secret.png"}, "is none of the images; click one of them"),
        ({"by": "text"}, "No text is given; write the one"),
    ):
        with pytest.raises(RequestError, match=sentence):
            find.asked({"text": " "}, given | wrong)
    for index in (99, -1, None):
        with pytest.raises(RequestError, match="none of the images"):
            find.reference(SimpleNamespace(index=index), pictured.EXAMPLES)


def test_an_order_is_shown_from_high_to_low_and_restored(session: Session, form: dict, out: dict) -> None:
    find = Find(session, form, out)
    asked = {"images": [EXAMPLES], "like": f"{EXAMPLES}/red star on mint.png", "components": ["block.5.mlp"]}
    run = session.run(Recipe(METHOD, "atlas-clip", asked))
    found = find.ordered(run.recipe, run.result)
    captions = [caption for _, caption in found["order"]["value"]]
    values = [float(c.split()[0]) for c in captions]
    assert values == sorted(values, reverse=True) and captions[0] == "+1.000 red star on mint"
    assert found["order-said"] == "10 images by likeness to red star on mint through block.5.mlp."
    assert np.isfinite(values).all() and find_method(METHOD).title == "Find images"
    assert find.restored(run.recipe) == {"by": "image", "like": "red star on mint.png"}
    assert find.restored(Recipe(METHOD, "m", {"text": "red"})) == {"by": "text", "like": ""}

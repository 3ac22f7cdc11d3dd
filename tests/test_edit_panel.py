"""The Edit panel's handlers without a browser: pictures that are kept, concepts to audit, strengths."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panels import bars, edit_form, widgets
from panels.edit import _Panel as EditPanel
from panels.edit_audit import Audit
from panels.edit_stack import Entry, Stack
from panels.edit_view import Pictures
from panels.localize import _Panel as Localize
from panels.localize_view import BEGUN, UNITS, carried, sentence
from panels.running import Running
from studio.errors import RequestError
from studio.figures import number
from studio.store import write_edit
from studio.types import Axis, Edit, Figure, Recipe, Result, Trace


class Sessions:
    """A session whose images are the prompt's length and the seed; what it was asked to draw is kept."""

    def __init__(self) -> None:
        self.drawn: list[tuple[list[str], tuple[int, ...]]] = []
        self.queue = SimpleNamespace(forget=lambda job: None)

    def submit(self, recipe: Recipe, **_: Any) -> Any:
        prompts = recipe.inputs["prompt"]
        self.drawn.append((list(prompts), recipe.seeds))
        images = np.array([[[[[len(p), s, len(recipe.edits)]]] for s in recipe.seeds] for p in prompts])
        result = SimpleNamespace(arrays={"images": SimpleNamespace(values=images)})
        return SimpleNamespace(over=True, error=None, run=SimpleNamespace(result=result), version=0)


def last(found: Any) -> Any:
    """What a generator of pictures ends with."""
    return list(found)[-1]


def test_only_the_missing_pictures_are_drawn() -> None:
    session = Sessions()
    pictures = Pictures(session)
    last(pictures.rows("m", ["a", "bb"], [0, 1], Stack(), "me"))
    assert session.drawn == [(["a", "bb"], (0, 1))]  # without an edit, before is after
    before, after = last(pictures.rows("m", ["a", "ccc", "bb", "dddd", "ccc"], [1, 2], Stack(), "me"))
    assert session.drawn[1:] == [(["a", "bb"], (2,)), (["ccc", "dddd"], (1, 2))]
    wanted = [[n, s, 0] for n in (1, 3, 2, 4, 3) for s in (1, 2)]
    assert [im.reshape(3).tolist() for im in before] == wanted == [im.reshape(3).tolist() for im in after]
    last(pictures.rows("m", ["dddd", "a"], [2], Stack(), "me"))
    assert len(session.drawn) == 3
    last(pictures.rows("m", ["a"], [0], Stack(), "me", quick=True))
    assert session.drawn[3:] == [(["a"], (0,))]


@pytest.fixture
def audit(session: Any, tmp_path: Path) -> Any:
    """The audit's handlers, and a function that makes an entry of a stack from concepts."""

    def entry(*concepts: str) -> Entry:
        file = tmp_path / f"{'-'.join(concepts)}.safetensors"
        made = Edit(
            {"unet.w": np.ones((1, 1), np.float32)}, "f" * 64, concepts, {}, "", ("x",) * len(concepts)
        )
        write_edit(made, file)
        return Entry(session.store.keep_edit(file), "an edit")

    found = Audit.__new__(Audit)
    found.session, found.pictures = session, Pictures(session)
    return found, entry


def test_the_concept_to_audit_is_the_last_edits_and_can_be_chosen(audit: Any) -> None:
    handlers, entry = audit
    one = Stack().add(entry("star", "red"))
    update, offered = handlers.offer(one, ())
    assert (update["choices"], update["value"]) == (["red", "star"], "star") and offered == ("red", "star")
    two = one.add(entry("moon"))
    update, offered = handlers.offer(two, offered)
    assert update["value"] == "moon" and set(update["choices"]) == {"star", "red", "moon"}
    same = handlers.offer(two.strengthen(0, 0.5), offered)
    assert all("value" not in u for u in same if isinstance(u, dict) and u.get("__type__") == "update")
    assert same[1] is not offered and handlers.concepts(two.toggle(1)) == ("red", "star")
    update, _ = handlers.offer(Stack(), offered)
    assert update["choices"] == [] and update["value"] is None
    assert handlers.concepts(None) == () and handlers.concepts(Stack().add(entry())) == ()


@pytest.mark.parametrize(
    ("given", "asked"), [("red", "red"), ("", "star"), (None, "star"), ("a sun", "a sun")]
)
def test_an_audits_recipe_names_the_concept(audit: Any, given: Any, asked: str) -> None:
    handlers, entry = audit
    stack = Stack().add(entry("moon")).add(entry("star", "red"))
    recipe = handlers.recipe({"stack": stack, "model": "atlas-sd", "concept": given, "seeds": "0"})
    assert recipe.inputs["concept"] == asked and len(recipe.edits) == 2


def test_nothing_to_audit(audit: Any) -> None:
    with pytest.raises(RequestError, match="no edit in the stack is on"):
        audit[0].recipe({"stack": Stack(), "model": "atlas-sd", "seeds": "0"})


def test_the_passport_of_the_stacks_concept(audit: Any) -> None:
    handlers, entry = audit

    def opened(*given: Any) -> dict[str, Any]:
        handed, tab, said = handlers.to_passport(*given)
        assert tab.selected == "localize" and "Localize tab" in said
        recipe = json.loads(json.loads(handed)["panels"]["localize"]["recipe"])
        assert (recipe["method"], recipe["model"]) == ("passport", "atlas-sd")
        return recipe["inputs"]

    stack = Stack().add(entry("star", "red"))
    assert opened(stack, "atlas-sd", "red", "") == {"concept": "red", "replacement": "x"}
    assert opened(stack, "atlas-sd", None, None) == {"concept": "star", "replacement": "x"}
    assert opened(stack, "atlas-sd", "a sun", "moon ") == {"concept": "a sun", "replacement": "moon"}
    for wrong, reason in (
        (Stack(), "no edit in the stack that is on"),
        (Stack().add(entry()), "type the concept"),
    ):
        handed, _, said = handlers.to_passport(wrong, "atlas-sd", "", "")
        assert handed == "" and reason in said


def test_methods_of_localize_take_over_what_was_typed() -> None:
    prompt, other = "a red star on white", "a red moon on white"
    told, before = carried(BEGUN, "passport", prompt, "heart", other)
    assert (told, before) == ({"concept": "star", "replacement": "moon"}, ("passport", "passport"))
    back, before = carried(before, "localize", prompt, "star", "moon")
    assert (back, before) == ({"replacement": other}, BEGUN)
    nothing, before = carried(before, "attribute", prompt, "star", other)
    assert nothing == {} and before == ("localize", "attribute")
    told, _ = carried(before, "passport", prompt, "star", other)
    assert told == {"replacement": "moon"}  # the concept is the one that weights were looked for
    assert carried(before, "passport", prompt, "heart", other)[0] == {"replacement": ""}
    assert carried(("passport", "passport"), "localize", prompt, "heart", "moon")[0] == {"replacement": ""}
    assert carried(BEGUN, "localize", prompt, "star", other) == ({}, BEGUN)
    assert carried(None, "passport", "a blue house in ink", "", "a blue house")[0] == {
        "concept": "in ink",
        "replacement": "",
    }


STACK = Stack(tuple(Entry(n, n) for n in "abc"), 0)


@pytest.mark.parametrize(
    ("i", "by", "order", "picked"),
    [(0, 1, "bac", 1), (2, -1, "acb", 1), (1, -1, "bac", 0), (0, -1, "abc", 0), (2, 1, "abc", 0)],
)
def test_edits_are_moved(i: int, by: int, order: str, picked: int) -> None:
    moved = STACK.move(i, by)
    assert ("".join(e.edit for e in moved.entries), moved.picked) == (order, picked)
    assert moved.undo().entries == STACK.entries and bool(moved.past) == (order != "abc")
    assert moved.undo().redo().entries == moved.entries


@pytest.mark.parametrize("i", [-1, 3])
def test_an_edit_that_is_not_there_is_not_moved(i: int) -> None:
    with pytest.raises(RequestError, match="no longer in the stack"):
        STACK.move(i, 1)


def test_up_and_down_in_the_list_move_an_edit() -> None:
    panel = EditPanel.__new__(EditPanel)
    panel.out, shown = {"status": "status"}, []
    panel.show = lambda stack, looks, note="": shown.append(stack) or {}
    for act, row, order in (("up", 2, "acb"), ("down", 0, "bac")):
        panel.act(SimpleNamespace(act=act, row=row), STACK)
        assert "".join(e.edit for e in shown[-1].entries) == order
    said = panel.act(SimpleNamespace(act="sideways", row=0), STACK)
    assert said["status"] == "That is no edit of the stack." and len(shown) == 2


@pytest.mark.parametrize(("payload", "value"), [(5, 5.0), (-1.5, -1.5), (None, None), ("much", None)])
def test_a_dial_takes_what_is_typed(payload: Any, value: float | None) -> None:
    assert widgets.Dial(0, 1, 0.5).preprocess(payload) == value


def test_the_sliders_range_grows_and_shrinks_back() -> None:
    wide, plain = edit_form.span(5.0), edit_form.slider(Entry("e", "star", strength=0.5))
    assert (wide["minimum"], wide["maximum"]) == (-1, 5) and "value" not in wide
    assert (plain["minimum"], plain["maximum"], plain["value"]) == (-1, 2, 0.5)
    assert edit_form.span(-7.0)["minimum"] == -7 and edit_form.slider(None)["interactive"] is False


@pytest.mark.parametrize("ratio", [None, 0, -1, 101, float("nan")])
def test_a_share_of_weights_that_is_none(ratio: Any) -> None:
    with pytest.raises(RequestError, match="Weights zeroed must be a number above 0 and at most 100 percent"):
        Localize.ablation(None, {}, 0, ratio, "me")


def test_lines_of_one_name_are_named_once() -> None:
    data = {"labels": ["a"], "values": [1.0], "unit": "u"}
    data["lines"] = [("all", 2.0), ("none", float("nan")), ("± placebo", 0.1), ("± placebo", -0.1)]
    lines = bars.as_value(Figure("bars", data))["lines"]
    assert [(n["name"], n["value"]) for n in lines] == [("all", 2.0), ("± placebo", 0.1), ("", -0.1)]


@pytest.mark.parametrize("top", [None, 60])
def test_a_unit_says_how_it_is_edited(top: int | None) -> None:
    z = Trace(np.array([3.0, -4.5]), (Axis("unit", ("up.0.attn2.to_k.1", "up.0.attn2.to_v.2")),), "z")
    result = Result({"z_score": z}, {"layer_numbers": "6"})
    recipe = Recipe("neurons", "m", {"concept": "star", "neutral": "moon"}, {"top": top}, (0,))
    said = sentence(recipe, result, 0)
    assert said.startswith(f"Unit 6.to_v.2: {number(-4.5)} z. ")
    assert said.endswith(UNITS if top is None else "the edit are of the 60 largest units together.")


class Refusing(Running):
    """A panel that refuses every run."""

    def recipe(self, given: dict[str, Any]) -> Recipe:
        raise RequestError("--window must be a number.")

    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        raise AssertionError("nothing is drawn")


@pytest.mark.parametrize("before", [{}, {"job": "1", "run": "r"}])
def test_a_refused_run_says_whose_figure_stays(before: dict) -> None:
    panel = Refusing.__new__(Refusing)
    panel.named, panel.state, panel.out, panel.session = (
        {},
        "state",
        {"status": "status"},
        SimpleNamespace(submit=None),
    )
    (said,) = panel.start({"state": before}, SimpleNamespace(session_hash="me"))
    kept = f" {Running.EARLIER}" if before else ""
    assert said == {"status": f"“Window” must be a number.{kept}"}

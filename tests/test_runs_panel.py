"""The Runs panel's handlers, as the page calls them: list, one run, opening, comparing, the grid, the bin;
and what a second studio, a damaged folder or a full disk does to them."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from panels import reopening, runs, runs_form, runs_view
from panels.runs_compare import Compare
from panels.runs_form import COMPARED, FILES
from panels.runs_grid import Grid
from panels.runs_store import StoreTab
from studio import palette
from studio.errors import RequestError
from studio.figures import to_bytes
from studio.recipes import carried_of_many
from studio.registry import find_method
from studio.run_bin import Bin
from studio.run_export import export
from studio.run_index import RunIndex
from studio.run_notes import Notes
from studio.store import Store
from studio.types import Axis, Figure, Recipe, Result, Trace
from tests.test_store import some_run

ALL = ("", [], [], "", "", False, 0, "", [])  # the query of a page on which nothing was chosen


def saved(store: Store, n: int, prompt: str, **params: Any) -> str:
    """A run of `lens` with an image and numbers that depend on n."""
    recipe = Recipe("lens", "atlas-sd", {"prompt": prompt}, {"steps": 2, **params}, (0,))
    effect = Trace(np.arange(3.0) * n, (Axis("layer", ("a", "b", "c")),), "cosine")
    image = np.full((4, 4, 3), 20 * n, np.uint8)
    result = Result({"effect": effect}, {"total": float(n), "finding": f"found {n}"}, {"seed0-clean": image})
    run = some_run(recipe=recipe, result=result, started=f"2026-01-0{n}T00:00:00+00:00", key=f"{n}a" * 32)
    data = {"rows": ["r"], "cols": ["x", "y"], "values": np.array([[n, -n]], float), "unit": "u"}
    return store.save(run, Figure("heat", data)).id


@contextmanager
def page() -> Iterator[None]:
    """A page to build on that is never served: Gradio would leave a loop open for it."""

    async def begun() -> gr.Blocks:
        return gr.Blocks().__enter__()

    made = asyncio.run(begun())
    try:
        yield
    finally:
        made.__exit__(Exception)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three runs, drawn once."""
    kept = Store(tmp_path_factory.mktemp("drawn"))
    for n, prompt in ((1, "a red star"), (2, "a blue star"), (3, "a red house")):
        saved(kept, n, prompt)
    return kept


@pytest.fixture
def ids(store: Store, drawn: Store) -> list[str]:
    """Ids of three runs, the oldest first."""
    shutil.copytree(drawn.root, store.root)
    return store.ids()[::-1]


@pytest.fixture(scope="module")
def wired() -> runs._Panel:
    """The panel, wired once."""
    with page():
        made = runs._Panel(SimpleNamespace(store=Store("nowhere")), runs_form.form(), runs_form.outputs(1))
        made.wire()
    return made


@pytest.fixture
def panel(wired: runs._Panel, store: Store) -> runs._Panel:
    """The panel over a store and no models."""
    wired.session.store = store
    wired.index, wired.notes, wired.bin = RunIndex(store), Notes(store), Bin(store)
    return wired


def event(**data: Any) -> Any:
    return SimpleNamespace(**data)


def rows(panel: runs._Panel, update: dict) -> list[str]:
    return [row["title"] for row in update[panel.form["list"]]["rows"]]


def said(panel: runs._Panel, update: dict, line: str = "status") -> str:
    found = update[panel.out[line]]
    return found["value"] if isinstance(found, dict) else found


def query(picked: str = "", ticked: tuple = (), words: str = "", page: int = 0) -> tuple:
    return (words, *ALL[1:6], page, picked, list(ticked))


# ---- the list ---------------------------------------------------------------------------------------------


def test_the_list_is_newest_first_and_is_searched(panel: runs._Panel, ids: list[str]) -> None:
    update = panel.refresh(*ALL)
    assert rows(panel, update) == ["a red house", "a blue star", "a red star"]
    assert update[panel.form["count"]] == "3 runs."
    found = panel.searched(*query(words="red found", page=4))
    assert rows(panel, found) == ["a red house", "a red star"] and found[panel.page] == 0
    assert found[panel.form["count"]] == "2 of 3 runs."
    assert "must be written as 2026-11-21" in said(panel, panel.searched("", [], [], "soon", *ALL[4:]))
    nothing = panel.searched(*query(words="absent"))
    assert nothing[panel.form["list"]]["hint"] == runs_view.NOTHING


def test_an_empty_store_says_what_to_do(panel: runs._Panel) -> None:
    assert panel.refresh(*ALL)[panel.form["list"]] == {"rows": [], "chosen": "", "hint": runs_view.EMPTY}


def test_pages(panel: runs._Panel, ids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PAGE", 2)
    first = panel.refresh(*ALL)
    assert len(rows(panel, first)) == 2 and first[panel.form["count"]] == "3 runs, page 1 of 2."
    second = panel.older(*ALL)
    assert rows(panel, second) == ["a red star"] and second[panel.page] == 1
    assert panel.older(*query(page=1))[panel.page] == 1 and panel.newer(*query(page=1))[panel.page] == 0


def test_a_damaged_run_is_listed_chosen_and_deleted(panel: runs._Panel, ids: list[str], store: Store) -> None:
    (store.root / ids[1] / "run.json").write_text("{")
    listed = panel.refresh(*ALL)[panel.form["list"]]["rows"]
    assert [bool(r["fault"]) for r in listed].count(True) == 1 and len(listed) == 3
    update = panel.act(event(act="pick", id=ids[1]), *ALL)
    assert said(panel, update) == "This run is damaged."
    assert "is damaged and can't be read" in said(panel, update, "text")
    assert panel.export(ids[1])[panel.out["export"]["row"]].visible is False
    gone = panel.delete([], *query(ids[1]))
    assert len(rows(panel, gone)) == 2


# ---- one run ----------------------------------------------------------------------------------------------


def test_a_chosen_run_shows_figure_values_recipe_and_images(panel: runs._Panel, ids: list[str]) -> None:
    update = panel.act(event(act="pick", id=ids[0]), *ALL)
    out = panel.out
    assert update[panel.chosen] == ids[0] and update[panel.form["list"]]["chosen"] == ids[0]
    assert said(panel, update, "text").splitlines()[1] == "found 1"
    assert update[out["figure"]]["value"].width > 100
    assert [name for _, name in update[out["images"]]["value"]] == ["seed0-clean"]
    assert "total\t1" in said(panel, update, "values") and "effect\t3 layer, cosine" in said(
        panel, update, "values"
    )
    assert "prompt\ta red star" in said(panel, update, "recipe") and "seeds\t0" in said(
        panel, update, "recipe"
    )
    assert update[out["open"]].value == "Open in Trace"


def test_star_tick_and_note(panel: runs._Panel, ids: list[str], store: Store) -> None:
    panel.act(event(act="star", id=ids[0]), *query(ids[0]))
    assert Notes(store).starred() == {ids[0]}
    assert panel.star(*query(ids[0]))[panel.out["star"]].value == "☆ Give a star"
    ticked = panel.act(event(act="tick", id=ids[1]), *ALL)
    assert ticked[panel.ticked] == [ids[1]] and ticked[panel.form["count"]] == "3 runs; 1 ticked."
    assert panel.act(event(act="tick", id=ids[1]), *query("", (ids[1],)))[panel.ticked] == []
    kept = panel.keep("why", "", *query(ids[0]))
    assert said(panel, kept) == "The note is saved." and Notes(store).text(ids[0]) == "why"
    assert kept[panel.form["list"]]["rows"][2]["note"] == "why"


def test_a_note_that_was_changed_elsewhere_is_saved_the_second_time(
    panel: runs._Panel, ids: list[str], store: Store
) -> None:
    Notes(store).write(ids[0], "theirs")
    first = panel.keep("mine", "", *query(ids[0]))
    assert "changed elsewhere meanwhile, to “theirs”" in said(panel, first)
    assert panel.out["note"] not in first  # what was typed stays
    panel.keep("mine", first[panel.seen], *query(ids[0]))
    assert Notes(store).text(ids[0]) == "mine"


def test_delete_and_undo(panel: runs._Panel, ids: list[str], store: Store) -> None:
    first = panel.delete([], *query(ids[0], (ids[0], ids[1])))
    assert "Undo delete puts it back" in said(panel, first) and first[panel.chosen] == ""
    assert first[panel.ticked] == [ids[1]] and len(store.ids()) == 2
    second = panel.delete(first[panel.thrown], *query(ids[1]))
    back = panel.undo(second[panel.thrown], *ALL)
    assert back[panel.chosen] == ids[1] and said(panel, back) == "Put back."
    assert panel.undo(back[panel.thrown], *ALL)[panel.chosen] == ids[0] and sorted(store.ids()) == sorted(ids)
    assert said(panel, panel.undo([], *ALL)) == "Nothing was deleted in this window."


def test_a_run_that_another_studio_deleted(panel: runs._Panel, ids: list[str], store: Store) -> None:
    name = Bin(store).throw(ids[0]).name
    for update in (
        panel.act(event(act="star", id=ids[0]), *query(ids[0])),
        panel.star(*query(ids[0])),
        panel.delete([], *query(ids[0])),
        panel.open(*query(ids[0])),
    ):
        assert (
            said(panel, update) == "This run is no longer there: it was deleted in another window, or pruned."
        )
        assert len(rows(panel, update)) == 2
    assert "copy your note" in said(panel, panel.keep("text", "", *query(ids[0])))
    Bin(store).put_back(name)
    thrown = panel.delete([], *query(ids[0]))[panel.thrown]
    Bin(store).put_back(thrown[0])
    again = panel.undo(thrown, *ALL)
    assert "no longer in the bin" in said(panel, again) and len(rows(panel, again)) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing(
    panel: runs._Panel, ids: list[str], store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, "no")

    for name in ("touch", "write_text", "rename"):
        monkeypatch.setattr(Path, name, refused)
    why = "the disk is full" if number == errno.ENOSPC else "the store's folder is read-only"
    assert why in said(panel, panel.star(*query(ids[0])))
    assert why in said(panel, panel.keep("a", "", *query(ids[0])))
    assert why in said(panel, panel.delete([], *query(ids[0]))) and len(store.ids()) == 3


@pytest.mark.parametrize("bad", ["../x", "", None, 5, "gone"])
def test_ids_that_are_none(panel: runs._Panel, ids: list[str], bad: Any) -> None:
    assert "no longer there" in said(panel, panel.act(event(act="star", id=bad), *ALL))


# ---- opening ----------------------------------------------------------------------------------------------


def test_open_hands_the_run_to_its_panel(panel: runs._Panel, ids: list[str]) -> None:
    told = json.loads(panel.open(*query(ids[0]))[panel.out["handoff"]])
    assert told == {"panels": {"trace": {"run": ids[0]}}, "inner": ""}


@pytest.mark.parametrize(
    ("method", "edits", "home"),
    [
        ("trace-unet", (), (("trace",), "trace", "")),
        ("attribute", (), (("localize",), "localize", "")),
        ("text-span", (), (("decompose",), "decompose", "")),
        ("knockout", (), (("retrieval",), "retrieval", "")),
        ("edit", (), (("edit",), "edit", "Before and after")),
        ("audit", ("e",), (("edit", "audit"), "edit", "Audit")),
        ("generate", ("e",), (("edit",), "edit", "Before and after")),
        ("generate", (), None),
        ("align", (), None),
    ],
)
def test_each_method_has_its_panel(method: str, edits: tuple, home: Any) -> None:
    assert runs_view.home_of(Recipe(method, "m", edits=edits)) == home


def test_a_link_opens_a_run_or_says_why_not(panel: runs._Panel, ids: list[str], store: Store) -> None:
    request = {"run": ids[2]}
    assert ids[2] in panel.linked(request, *ALL)[panel.out["handoff"]]
    lost = panel.linked({"run": "nowhere"}, *ALL)
    assert said(panel, lost).startswith("There is no run 'nowhere'") and len(rows(panel, lost)) == 3
    (store.root / ids[2] / "arrays.npz").write_bytes(b"")
    assert "is damaged" in said(panel, panel.linked(request, *ALL))
    assert panel.out["status"] not in panel.linked({}, *ALL)


def test_a_method_without_a_panel_opens_here(panel: runs._Panel, store: Store) -> None:
    run_id = store.save(some_run(recipe=Recipe("align", "m"))).id
    update = panel.handed(run_id, *ALL)
    assert update[panel.chosen] == run_id and update[panel.out["handoff"]] == ""


def test_a_dropped_figure_of_many_runs_ticks_them(panel: runs._Panel, ids: list[str], tmp_path: Path) -> None:
    figure = Figure("heat", {"rows": ["r"], "cols": ["x"], "values": np.ones((1, 1)), "unit": "u"})
    file = tmp_path / "grid.svg"
    for named, told in (
        (ids[:2], "2 of them are in this store. They are ticked"),
        (["gone"], "0 of them are"),
    ):
        file.write_bytes(to_bytes(figure, "svg", carried_of_many("grid", "lens", named)))
        update = panel.drop(str(file), *ALL)
        assert f"grid.svg is the figure of a grid of {len(named)} run" in said(panel, update)
        assert told in said(panel, update) and update[panel.form["drop"]] is None
        if named == ids[:2]:
            assert update[panel.ticked] == named and update[panel.out["handoff"]] == ""


def test_a_dropped_export_opens_its_run(
    panel: runs._Panel, ids: list[str], store: Store, tmp_path: Path
) -> None:
    files = export(store.root / ids[0], tmp_path)
    opened = panel.drop(str(files["png"]), *ALL)
    assert ids[0] in opened[panel.out["handoff"]] and opened[panel.form["drop"]] is None
    Bin(store).throw(ids[0])
    told = json.loads(panel.drop(str(files["png"]), *ALL)[panel.out["handoff"]])
    recipe = json.loads(told["panels"]["trace"]["recipe"])
    assert recipe["inputs"]["prompt"] == "a red star"
    back = panel.drop(str(files["zip"]), *ALL)
    assert len(rows(panel, back)) == 3 and back[panel.out["handoff"]]
    (tmp_path / "foreign.zip").write_bytes(b"PK\3\4 nothing")
    foreign = panel.drop(str(tmp_path / "foreign.zip"), *ALL)
    assert "foreign.zip" in said(panel, foreign) and str(tmp_path) not in said(panel, foreign)
    assert panel.out["handoff"] in foreign


# ---- reopening --------------------------------------------------------------------------------------------


def test_recipes_from_the_page_are_not_trusted(store: Store, ids: list[str]) -> None:
    recipe, run = reopening.asked_for(event(run=ids[0]), store)
    assert run.id == ids[0] and recipe == run.recipe
    good = json.dumps(recipe.as_dict())
    assert reopening.asked_for(event(recipe=good), store) == (recipe, None)
    for bad in (event(), event(recipe=5), event(recipe="x" * 2_000_000), event(run="../x"), event(run={})):
        with pytest.raises(RequestError):
            reopening.asked_for(bad, store)
    for text in ("{", "[]", '{"seeds": ["x"]}', good.replace('"seeds": [0]', '"seeds": null')):
        with pytest.raises(RequestError, match="This recipe can't be read"):
            reopening.asked_for(event(recipe=text), store)


def test_values_are_put_back_as_their_inputs_hold_them() -> None:
    from panels import widgets

    method = find_method("trace-unet")
    with page():
        form = {n: widgets.widget("x", n, f, kind) for n, (f, kind) in widgets.knobs([method]).items()}
        form |= {"method": gr.Radio(["trace-unet", "lens"]), "seeds": gr.Textbox(), "model": gr.Textbox()}
    asked = {"prompt": "p", "subject": "s", "steps": 7, "screen": True, "kinds": ["resnet"]}
    recipe = Recipe("trace-unet", "m", asked, {}, (3, 4))
    back = {form_name(form, c): u["value"] for c, u in reopening.filled(recipe, form).items()}
    assert (back["prompt"], back["seeds"], back["model"], back["method"]) == ("p", "3,4", "m", "trace-unet")
    assert back["screen"] is True and back["kinds"] == ["resnet"] and str(back["steps"]) == "7"
    given = {n: back.get(n) for n in form}
    round_trip = widgets.asked(method, given)
    assert {n: round_trip[n] for n in ("prompt", "subject", "kinds")} == {
        "prompt": "p",
        "subject": "s",
        "kinds": ["resnet"],
    }


def form_name(form: dict, component: Any) -> str:
    return next(n for n, c in form.items() if c is component)


def test_a_link_fills_only_inputs_that_take_what_it_says() -> None:
    with page():
        form = {
            "prompt": gr.Textbox(),
            "method": gr.Radio([("UNet", "unet")]),
            "screen": gr.Checkbox(),
            "steps": gr.Number(),
            "kinds": gr.CheckboxGroup(["a", "b"]),
        }
    named = {c: n for n, c in form.items()}
    good = {"prompt": "${x}", "method": "unet", "screen": "yes", "steps": "7", "kinds": "a,z", "other": "1"}
    found = {named[c]: u["value"] for c, u in reopening.linked(good, form, named).items()}
    assert found == {"prompt": "${x}", "method": "unet", "screen": True, "steps": 7.0, "kinds": ["a"]}
    assert reopening.linked({"method": "rm", "steps": "many"}, form, named) == {}


def test_edits_of_a_run_are_kept_and_foreign_files_are_not_read(store: Store, tmp_path: Path) -> None:
    inside = store.root / "r" / "edit.safetensors"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"edit")
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(b"secret")
    ((digest, file, strength),) = reopening.kept_edits(
        Recipe("generate", "m", edits=(f"{inside}@0.5",)), None, store
    )
    assert strength == 0.5 and file.read_bytes() == b"edit" and store.has_edit(digest)
    for name, says in (
        (outside, "is no longer there"),
        (tmp_path / "gone.safetensors", "is no longer there"),
    ):
        with pytest.raises(RequestError, match=says):
            reopening.kept_edits(Recipe("generate", "m", edits=(str(name),)), None, store)
    known = some_run(recipe=Recipe("generate", "m", edits=(str(outside),)), host={"edits": ["0" * 64]})
    with pytest.raises(RequestError, match="has changed since"):
        reopening.kept_edits(known.recipe, known, store)
    inside.unlink()
    gone = some_run(recipe=Recipe("generate", "m", edits=(str(inside),)), host={"edits": [digest]})
    assert reopening.kept_edits(gone.recipe, gone, store)[0][0] == digest  # found by its hash


# ---- comparing --------------------------------------------------------------------------------------------


def test_two_ticked_runs_are_compared(panel: runs._Panel, ids: list[str]) -> None:
    tab = Compare(panel.session, panel.out, panel.chosen, panel.ticked)
    update = tab.compare("", ids[:2])
    assert update[tab.pair] == ids[:2]
    assert update[panel.out["recipes"]]["value"]["data"] == [["prompt", "a red star", "a blue star"]]
    values = {n: update[panel.out[f"map_{n}"]]["value"] for n in COMPARED}
    assert values["difference"]["z"] == [[0.0, 1.0, 2.0]]
    assert {tuple(v["scale"]) for v in values.values()} == {(-4.0, 4.0)}
    assert "Largest difference 2 at c" in said(panel, update, "difference_said")
    assert "largest 20 of 255" in said(panel, update, "picture_said")
    assert tab.compare(ids[0], [ids[1]])[tab.pair] == ids[:2]
    assert tab.other(ids[:2], "effect")[panel.out["map_first"]]["value"]["z"] == [[0.0, 1.0, 2.0]]


def test_a_difference_can_be_downloaded_and_leads_back_to_both_runs(
    panel: runs._Panel, ids: list[str], tmp_path: Path
) -> None:
    tab = Compare(panel.session, panel.out, panel.chosen, panel.ticked)
    update = tab.export(ids[:2], "effect")
    assert update[panel.out["difference_export"]].visible
    for kind in FILES["difference"]:
        file = Path(update[panel.out[f"difference_{kind}"]].value["path"])
        assert file.name == f"difference.{kind}" and file.stat().st_size > 100
        dropped = panel.drop(str(file), *ALL)
        assert dropped[panel.ticked] == ids[:2], kind
        assert "of a comparison of 2 runs" in said(panel, dropped)
    for pair, what in (([], "effect"), (ids[:2], "nothing"), (["gone", ids[0]], "effect")):
        assert not tab.export(pair, what)[panel.out["difference_export"]].visible


def test_what_can_not_be_compared_is_said(panel: runs._Panel, ids: list[str], store: Store) -> None:
    tab = Compare(panel.session, panel.out, panel.chosen, panel.ticked)
    assert said(panel, tab.compare("", ids), "compared").startswith("3 runs are ticked. Tick two runs")
    assert "Tick two runs in the list" in said(panel, tab.compare(ids[0], [ids[0]]), "compared")
    assert "Tick two runs in the list" in said(panel, tab.other([], "effect"), "difference_said")
    assert "have no map in common" in said(panel, tab.other(ids[:2], "nothing"), "difference_said")
    assert tab.other(ids[:2], "nothing")[panel.out["figure_first"]]["value"] is not None
    assert "no image of the same name" in said(panel, tab.other_image(ids[:2], "other"), "picture_said")
    (store.root / ids[1] / "images" / "seed0-clean.png").write_bytes(b"")
    damaged = said(panel, tab.other_image(ids[:2], "seed0-clean"), "picture_said")
    assert damaged.startswith(f"The image seed0-clean.png of the run {ids[1]} is damaged or gone")
    Bin(store).throw(ids[1])
    assert "There is no run" in said(panel, tab.compare("", ids[:2]), "compared")


# ---- the grid ---------------------------------------------------------------------------------------------


def test_a_grid_of_images_and_one_of_numbers(panel: runs._Panel, ids: list[str], store: Store) -> None:
    saved(store, 4, "a red star", guidance=5.0)
    tab = Grid(panel, panel.out)
    update = tab.draw("images", "", "", [], "", *ALL)
    assert said(panel, update, "grid_said") == "4 runs: 3 × 2, 2 of them empty."
    pictures = update[panel.out["grid_pictures"]]["value"]
    assert (pictures["rows"], pictures["cols"]) == (
        ["a blue star", "a red house", "a red star"],
        ["5", "none"],
    )
    assert pictures["names"][0] == ["", "prompt a blue star, guidance none"]
    assert [[bool(p) for p in line] for line in pictures["pictures"]] == [
        [False, True],
        [False, True],
        [True] * 2,
    ]
    assert pictures["pictures"][0][1].startswith("data:image/png;base64,")
    shot = tab.pick(event(row=1, col=1), "images", "prompt", "guidance", [], "", *ALL)
    assert shot[panel.chosen] == ids[2] and shot[panel.form["list"]]["chosen"] == ids[2]
    assert said(panel, shot, "grid_said") == (
        f"Chosen: prompt a red house, guidance none, the run {ids[2]}. It stands under Run."
    )
    made = Path(update[panel.out["grid_png"]].value["path"])
    assert made.read_bytes()[:4] == b"\x89PNG"
    assert "is the figure of a grid of" in said(panel, panel.drop(str(made), *ALL))
    numbers = tab.draw("total", "prompt", "guidance", [], "", *ALL)
    value = numbers[panel.out["grid_map"]]["value"]
    assert value["rows"] == ["a blue star", "a red house", "a red star"] and value["cols"] == ["5", "none"]
    assert value["z"] == [[None, 2.0], [None, 3.0], [4.0, 1.0]]
    assert value["scale"] == [-4.0, 4.0] and numbers[panel.out["grid_scaled"]]["visible"]
    fixed = tab.draw("total", "prompt", "guidance", [], "0, 10", *ALL)
    assert fixed[panel.out["grid_map"]]["value"]["scale"] == [0.0, 10.0]
    with Image.open(fixed[panel.out["grid_png"]].value["path"]) as png:
        found = {"#" + bytes(c).hex() for _, c in png.convert("RGB").getcolors(1 << 24)}
    assert {palette.shade(v, (0, 10)) for v in (1.0, 2.0, 3.0, 4.0)} <= found
    wrong = tab.draw("total", "prompt", "guidance", [], "10, 0", *ALL)
    assert said(panel, wrong, "grid_said").startswith("The colour scale must be two numbers, the lower first")
    click = tab.pick(event(row=2, col=1), "total", "prompt", "guidance", [], "", *ALL)
    assert click[panel.chosen] == ids[0]
    for bad, says in ((event(row=0, col=0), "No run is at this place"), (event(row=9, col=0), "no cell")):
        assert says in said(panel, tab.pick(bad, "total", "prompt", "guidance", [], "", *ALL), "grid_said")
    ticked = tab.draw("images", "", "", [], "", *query(ticked=(ids[0],), words="house"))
    assert said(panel, ticked, "grid_said").startswith("1 run: 1 × 1")


def test_what_follows_something_else_is_not_laid_across(panel: runs._Panel, store: Store) -> None:
    for n, (prompt, steps) in enumerate((("a red star", 3), ("a blue star", 4), ("a red house", 5)), 1):
        saved(store, n, prompt, steps=steps)
    tab = Grid(panel, panel.out)
    update = tab.draw("images", "", "", [], "", *ALL)
    assert said(panel, update, "grid_said") == "3 runs: 3 × 1."
    assert [update[panel.out[n]]["value"] for n in ("rows", "cols")] == ["prompt", ""]
    both = tab.draw("images", "prompt", "steps", [], "", *ALL)  # unless a person asks for it
    assert said(panel, both, "grid_said") == "3 runs: 3 × 3, 6 of them empty."


def test_a_grid_of_nothing_or_of_too_much(
    panel: runs._Panel, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = Grid(panel, panel.out)
    assert (
        said(panel, tab.draw("images", "", "", [], "", *query(words="absent")), "grid_said") == runs_form.GRID
    )
    monkeypatch.setattr("panels.runs_grid.MOST_RUNS", 2)
    assert "search or tick at most 2" in said(panel, tab.draw("images", "", "", [], "", *ALL), "grid_said")


# ---- the store --------------------------------------------------------------------------------------------


def test_only_what_was_shown_is_pruned(panel: runs._Panel, ids: list[str], store: Store) -> None:
    tab = StoreTab(panel, panel.out)
    assert "Nothing needs to be pruned" in said(panel, tab.plan("20 GB"), "plan_said")
    assert said(panel, tab.plan("much"), "plan_said").startswith("The quota must be a size such as 5GB")
    shown = tab.plan("0")
    assert len(shown[tab.planned]) == 3 and ids[0] in shown[panel.out["planned"]]["value"].splitlines()[0]
    Notes(store).star(ids[2], True)
    changed = tab.prune("0", shown[tab.planned], *ALL)
    assert said(panel, changed, "plan_said").startswith("The store has changed since; look again")
    assert len(store.ids()) == 3
    done = tab.prune("0", changed[tab.planned], *ALL)
    assert said(panel, done, "plan_said").startswith("2 runs removed for good.") and store.ids() == [ids[2]]


def test_the_bin_gives_back(panel: runs._Panel, ids: list[str], store: Store) -> None:
    tab = StoreTab(panel, panel.out)
    name = Bin(store).throw(ids[0]).name
    assert tab.plan("20 GB")[panel.out["bin"]]["value"] == name
    back = tab.put_back(name, "20 GB", *ALL)
    assert said(panel, back, "bin_said") == f"{ids[0]} is back in the list." and len(rows(panel, back)) == 3
    assert "no longer in the bin" in said(panel, tab.put_back(name, "20 GB", *ALL), "bin_said")
    assert said(panel, tab.put_back(None, "20 GB", *ALL), "bin_said") == "Choose a deleted run first."

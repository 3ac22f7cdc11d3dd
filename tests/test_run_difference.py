"""Two runs beside each other, against loops over labels; what can't be laid over each other is said."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from studio.errors import RequestError
from studio.recipes import carried_of_many
from studio.run_difference import (
    MOST_CELLS,
    as_text,
    comparable,
    compare_arrays,
    compare_figures,
    compare_images,
    compare_recipes,
    difference_files,
    paired,
)
from studio.types import Axis, Figure, Recipe, Result, Trace
from tests.test_store import some_run


def trace(seed: int, unit: str = "cosine", **axes: str) -> Trace:
    """Numbers over axes whose labels are given as words."""
    named = tuple(Axis(n, tuple(labels.split())) for n, labels in axes.items())
    shape = tuple(len(a.labels) for a in named)
    return Trace(np.random.default_rng(seed).normal(size=shape).astype(np.float32), named, unit)


def heat(values: list, rows: str, cols: str, unit: str = "cosine") -> Figure:
    return Figure("heat", {"rows": rows.split(), "cols": cols.split(), "values": values, "unit": unit})


def at(t: Trace, **place: str) -> float:
    """One number by its labels."""
    index = tuple(a.labels.index(place[a.name]) for a in t.axes)
    return float(t.values[index])


def test_the_difference_leaves_as_files_that_name_both_runs() -> None:
    one, two = trace(0, layer="0 1", token="a b"), trace(1, layer="0 1", token="a b")
    note = carried_of_many("comparison", "trace-unet", ["run-1", "run-2"])
    files = difference_files(compare_arrays(one, two), note)
    assert set(files) == {"png", "svg", "pdf", "csv"}
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF")
    assert b"run-1" in files["svg"] and b"Second minus first" in files["svg"]
    header, *rows = csv.reader(io.StringIO(files["csv"].decode(), newline=""))
    numbers = {(row[0], row[1]): float(row[2]) for row in rows}
    assert header[:3] == ["array", "place", "value"] and len(numbers) == 12 and "run-2" in rows[0][-1]
    for place in {place for _, place in numbers}:
        assert numbers["difference", place] == pytest.approx(
            numbers["second", place] - numbers["first", place], abs=1e-6
        )


# ---- labels -----------------------------------------------------------------------------------------------


def test_labels_are_paired_in_the_order_in_which_they_occur() -> None:
    assert paired(["a", "b", "a", "c"], ["a", "x", "a", "a", "c"]) == ([0, 2, 3], [0, 2, 4])
    assert paired(["a"], ["b"]) == ([], []) and paired([], []) == ([], [])


# ---- arrays -----------------------------------------------------------------------------------------------


def test_arrays_are_subtracted_over_the_labels_that_both_have_whatever_their_order() -> None:
    one = trace(0, kind="mlp attention hidden", layer="0 1 2 3", token="a star")
    two = trace(1, token="star a big", layer="3 2 1", kind="hidden mlp")
    found = compare_arrays(one, two)
    data = found.difference.data
    assert data["rows"] == [f"{k}, {n}" for k in ("mlp", "hidden") for n in "123"] and data["cols"] == [
        "a",
        "star",
    ]
    for r, row in enumerate(data["rows"]):
        for c, token in enumerate(data["cols"]):
            kind, layer = row.split(", ")
            place = {"kind": kind, "layer": layer, "token": token}
            assert found.first.data["values"][r, c] == at(one, **place)
            assert found.second.data["values"][r, c] == at(two, **place)
            assert data["values"][r, c] == pytest.approx(at(two, **place) - at(one, **place), abs=1e-12)
            assert data["names"][r][c] == f"{kind}, {layer}, {token}"
    largest = max(np.abs(f.data["values"]).max() for f in (found.first, found.second, found.difference))
    assert found.limit == pytest.approx(largest)
    assert found.said.startswith(
        "Only what both have is compared: 2 of the first's 3 kinds and of the second's 2, 3 of the first's 4 "
        "layers and of the second's 3, 2 of the first's 2 tokens and of the second's 3."
    )


def test_the_numbers_said_are_those_of_the_difference() -> None:
    one = Trace(np.array([0.0, 1.0, math.nan, 3.0]), (Axis("layer", tuple("abcd")),), "x")
    two = Trace(np.array([0.5, 1.0, 2.0, 0.0]), (Axis("layer", tuple("abcd")),), "x")
    found = compare_arrays(one, two)
    spread = math.sqrt((0.25 + 0 + 9) / 3)
    between = np.corrcoef([0, 1, 3], [0.5, 1, 0])[0, 1]
    assert found.said == (
        f"Largest difference -3 at d; root mean square {spread:.3g} over 3 places, correlation {between:.3g}."
    )
    assert np.isnan(found.difference.data["values"][0, 2])


def test_equal_arrays_and_arrays_without_axes() -> None:
    one = trace(0, layer="a b")
    assert compare_arrays(one, one).said == "All 2 numbers are the same."
    single = compare_arrays(Trace(np.array(1.0)), Trace(np.array(3.0)))
    assert single.difference.data["values"].tolist() == [[2.0]] and "-" not in single.said
    assert single.said.startswith("Largest difference 2 at value; root mean square 2 over 1 places.")
    empty = Trace(np.array([math.nan]), (Axis("layer", ("a",)),))
    assert compare_arrays(empty, empty).said == "No place was measured in both."


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (
            trace(0, layer="a b"),
            trace(1, token="a b"),
            "axes are not the same: layer in the first run, token in the",
        ),
        (trace(0, layer="a b"), trace(1), "layer in the first run, none in the second"),
        (trace(0, layer="a b"), trace(1, layer="c d"), "The two runs have no layer in common"),
        (
            trace(0, layer="a"),
            trace(1, "logit", layer="a"),
            "numbers are cosine, the second's logit; they can't",
        ),
    ],
)
def test_arrays_that_can_not_be_compared(one: Trace, two: Trace, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        compare_arrays(one, two)


def test_more_numbers_than_a_map_holds() -> None:
    many = Trace(np.zeros(MOST_CELLS + 1), (Axis("layer", tuple(map(str, range(MOST_CELLS + 1)))),))
    with pytest.raises(RequestError, match="40,001 numbers are too many for a map; at most 40,000"):
        compare_arrays(many, many)


# ---- figures ----------------------------------------------------------------------------------------------


def test_heat_maps_over_common_rows_and_columns() -> None:
    one = heat([[1.0, 2.0], [3.0, math.nan]], "x y", "p q")
    two = heat([[10.0, 20.0], [30.0, 40.0]], "y z", "q p")
    found = compare_figures(one, two)
    assert found.difference.data["rows"] == ["y"] and found.difference.data["cols"] == ["p", "q"]
    np.testing.assert_array_equal(found.difference.data["values"], [[17.0, math.nan]])
    assert found.limit == 20.0 and found.said.startswith(
        "Only what both have is compared: 1 of the first's 2 rows"
    )


def test_bars_become_one_row() -> None:
    bars = [
        Figure("bars", {"labels": ["a", "b"], "values": v, "unit": "u"}) for v in ([1.0, 2.0], [1.0, 0.5])
    ]
    assert compare_figures(*bars).difference.data["values"].tolist() == [[0.0, -1.5]]


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (Figure("strip", {}), Figure("heat", {}), "One figure is of the kind strip, the other heat"),
        (Figure("curve", {}), Figure("curve", {}), "Compare one of the arrays or the images"),
        (heat([[1.0]], "a", "b"), heat([[1.0]], "c", "b"), "The two figures have no row in common"),
        (heat([[1.0]], "a", "b"), heat([[1.0]], "a", "b", ""), "are cosine, the second's without a unit"),
    ],
)
def test_figures_that_can_not_be_compared(one: Figure, two: Figure, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        compare_figures(one, two)


def test_arrays_that_two_runs_share() -> None:
    pixels = Trace(np.zeros((1,), np.uint8), (Axis("pixel", ("0",)),))
    first = some_run(result=Result({"a": trace(0, layer="x"), "b": trace(0, layer="x"), "p": pixels}))
    second = some_run(result=Result({"a": trace(1, layer="y z"), "b": trace(0, token="x"), "p": pixels}))
    assert comparable(first, second) == ["a"]


# ---- images and recipes -----------------------------------------------------------------------------------


def test_images_are_subtracted_and_stretched() -> None:
    one = np.full((2, 3, 3), 100, np.uint8)
    two = one.copy()
    two[0, 0] = (110, 100, 60)
    shown, said = compare_images(one, two)
    assert shown[0, 0].tolist() == [64, 0, 255] and shown[1:].max() == 0
    spread = math.sqrt((10**2 + 40**2) / 255**2 / 18)
    assert said.startswith(
        f"Root mean square difference of pixels {spread:.3g} (range 0 to 1); largest 40 of 255"
    )
    same, told = compare_images(one, one)
    assert not same.any() and told == "The images are the same, pixel for pixel."


def test_images_of_different_sizes() -> None:
    with pytest.raises(RequestError, match="different sizes, 3 × 2 and 2 × 3 pixels"):
        compare_images(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8))


def test_recipes_say_only_what_differs() -> None:
    one = Recipe("lens", "a", {"prompt": "star", "negative": None}, {"steps": 20, "guidance": 7.5}, (0, 1))
    two = Recipe(
        "lens", "b", {"prompt": "star", "negative": "dull"}, {"steps": 20, "guidance": 5.0}, (0, 1), ("e@2",)
    )
    assert compare_recipes(one, two) == [
        ("model", "a", "b"),
        ("guidance", "7.5", "5"),
        ("negative", "–", "dull"),
        ("edits", "–", "e@2"),
    ]
    assert compare_recipes(one, one) == []


def test_values_as_a_person_reads_them() -> None:
    told = [as_text(v) for v in (True, 0.1 + 0.2, None, ["a", 2], {"x": 1.0}, "t")]
    assert told == ["yes", "0.3", "–", "a, 2", "x: 1", "t"]

"""The records: axes by name, keys that know every ingredient, sites that print themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from studio.types import Axis, Recipe, Site, Trace

NAN = math.nan


def grid() -> Trace:
    """Two seeds by three layers, one number missing."""
    values = np.array([[1.0, NAN, 5.0], [3.0, 4.0, NAN]], np.float32)
    return Trace(values, (Axis("seed", ("0", "7")), Axis("layer", ("a", "b", "c"))), "points")


def test_over_leaves_nan_out_and_drops_the_axis() -> None:
    mean = grid().over("seed")
    assert [a.name for a in mean.axes] == ["layer"]
    np.testing.assert_array_equal(mean.values, np.array([2.0, 4.0, 5.0], np.float32))
    assert mean.values.dtype == np.float32 and mean.unit == "points"
    np.testing.assert_array_equal(grid().over("layer").values, np.array([3.0, 3.5], np.float32))


def test_over_nothing_but_nan_is_nan() -> None:
    empty = Trace(np.full((2, 1), NAN, np.float32), (Axis("seed", ("0", "1")), Axis("layer", ("a",))))
    assert np.isnan(empty.over("seed").values).all()


def test_at_takes_the_labelled_slice() -> None:
    row = grid().at("seed", "7")
    assert [a.name for a in row.axes] == ["layer"]
    np.testing.assert_array_equal(row.values, np.array([3.0, 4.0, NAN], np.float32))
    assert float(grid().at("layer", "c").at("seed", "0").values) == 5.0


def test_axes_that_are_not_there() -> None:
    with pytest.raises(KeyError, match="no axis 'token' here; axes are seed, layer"):
        grid().over("token")
    with pytest.raises(KeyError, match="no seed is labelled '1'"):
        grid().at("seed", "1")
    assert grid().axis("layer").labels == ("a", "b", "c")


def test_best_sorts_and_leaves_nan_out() -> None:
    assert grid().best(2) == [(("0", "c"), 5.0), (("7", "b"), 4.0)]
    assert len(grid().best(99)) == 4
    assert grid().best(0) == []


def test_best_of_equals_keeps_their_order() -> None:
    same = Trace(np.array([1.0, 2.0, 2.0]), (Axis("layer", ("a", "b", "c")),))
    assert same.best(3) == [(("b",), 2.0), (("c",), 2.0), (("a",), 1.0)]


def test_a_trace_without_axes_is_one_number() -> None:
    assert Trace(np.array(0.5)).best(1) == [((), 0.5)]


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c", "d")])
def test_axes_must_fit_the_array(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"axes \['layer'\] have lengths"):
        Trace(np.zeros(3), (Axis("layer", labels),))


BASE = {"method": "generate", "model": "m", "inputs": {"a": 1, "b": 2}, "params": {"c": 3}, "seeds": (0, 1)}
CHANGES = {
    "method": {"method": "lens"},
    "an input": {"inputs": {"a": 1, "b": 3}},
    "an input more": {"inputs": {"a": 1, "b": 2, "d": None}},
    "a parameter": {"params": {"c": 4}},
    "its type": {"params": {"c": "3"}},
    "a seed": {"seeds": (0, 2)},
    "a seed more": {"seeds": (0, 1, 2)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_key_changes_with_the_recipe(change: dict) -> None:
    assert Recipe(**{**BASE, **change}).key("f", "float32") != Recipe(**BASE).key("f", "float32")


@pytest.mark.parametrize(
    "given",
    [("g", "float32"), ("f", "bfloat16"), ("f", "float32", ("e",)), ("f", "float32", (), "scorer")],
    ids=["weights", "number type", "edit", "scorer"],
)
def test_key_changes_with_what_it_runs_on(given: tuple) -> None:
    assert Recipe(**BASE).key(*given) != Recipe(**BASE).key("f", "float32")


def test_key_ignores_order_and_the_name_of_the_model() -> None:
    turned = {**BASE, "inputs": {"b": 2, "a": 1}, "model": "another/name"}
    assert Recipe(**turned).key("f", "float32") == Recipe(**BASE).key("f", "float32")
    key = Recipe(**BASE).key("f", "float32")
    assert len(key) == 64 and set(key) <= set("0123456789abcdef")


def test_recipe_as_plain_values() -> None:
    assert Recipe(**BASE, edits=("e",)).as_dict() == {**BASE, "seeds": [0, 1], "edits": ["e"]}


@pytest.mark.parametrize(
    ("site", "printed"),
    [
        (Site("lm", 12, "attention"), "lm.12.attention"),
        (Site("text", 3, "mlp"), "text.3.mlp"),
        (Site("unet", "mid_block.attn2", "attn2"), "unet.mid_block.attn2"),
        (
            Site("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2", "attn2"),
            "unet.up_blocks.1.attentions.0.tra…attn2",
        ),
    ],
)
def test_sites_print_themselves(site: Site, printed: str) -> None:
    assert str(site) == printed

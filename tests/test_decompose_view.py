"""What the Decompose panel computes from a run's arrays: maps, ablation as direct effect, orders, groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panels import decompose_form, decompose_view, decompose_without
from panels import decompose_images as pictured
from studio.errors import RequestError
from studio.session import Session
from studio.types import Axis, Result, Trace

COMPONENTS = ("embedding", "block.0.head.0", "block.0.head.1", "block.0.mlp", "norm.bias")
TEXTS = ("a star", "a heart", "a red moon")
IMAGES = ("one.png", "two.png", "three.png", "four.png")


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    """Contributions (image, component, dim) and unit texts (text, dim)."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(3, 6))
    return rng.normal(size=(4, 5, 6)), texts / np.linalg.norm(texts, axis=1, keepdims=True)


@pytest.fixture
def result(vectors: tuple[np.ndarray, np.ndarray]) -> Result:
    """A run of `decompose` on those."""
    parts, texts = vectors
    z = parts.sum(1)
    image, component = Axis("image", IMAGES), Axis("component", COMPONENTS)
    dim, text = Axis("dim", tuple(map(str, range(6)))), Axis("text", TEXTS)
    scores = parts @ texts.T / np.linalg.norm(z, axis=1)[:, None, None]
    arrays = {
        "representation": Trace(z, (image, dim)),
        "contributions": Trace(parts, (image, component, dim)),
        "scores": Trace(scores, (image, component, text)),
    }
    return Result(arrays, {"way": "closed form", "sum_error": 1e-7, "space": "the model's own"})


def test_the_map_holds_every_component_once(result: Result) -> None:
    figure = decompose_view.layer_map(result, "a heart", "two.png")
    found = {
        name: value
        for names, values in zip(figure.data["names"], figure.data["values"], strict=True)
        for name, value in zip(names, values, strict=True)
        if name
    }
    scores = result.arrays["scores"].values[1, :, 1]
    assert found == dict(zip(COMPONENTS, scores, strict=True))
    assert "“a heart”, two.png; closed form" in figure.caption and "1.0e-07" in figure.caption
    row = figure.data["names"].index(next(n for n in figure.data["names"] if "norm.bias" in n))
    with pytest.raises(RequestError, match="There is no component in that cell"):
        decompose_view.component_at(result, row, 0)


def test_texts_side_by_side_sum_to_the_cosines(
    result: Result, vectors: tuple[np.ndarray, np.ndarray]
) -> None:
    parts, texts = vectors
    figure = decompose_view.texts_map(result)
    z = parts.sum(1)
    cosines = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ texts.T
    assert np.allclose(figure.data["values"].sum(0), cosines.mean(0))
    assert figure.data["names"][1][2] == "block.0.head.0 for a red moon"
    assert decompose_view.answers(result, "") is None
    assert np.allclose(decompose_view.answers(result, "one.png").data["values"], cosines[0])


def test_without_texts_the_shares_sum_to_one(result: Result) -> None:
    arrays = {k: v for k, v in result.arrays.items() if k != "scores"}
    bare = Result(arrays, result.values)
    found = decompose_view.scores(bare)
    assert found.texts == (decompose_view.SHARE,) and np.allclose(found.values.sum(1), 1)
    assert decompose_view.texts_map(bare) is None
    with pytest.raises(RequestError, match="Answers need texts"):
        decompose_without.without(bare, ["embedding"])
    with pytest.raises(RequestError, match="An order by text needs texts"):
        decompose_without.order(bare, ["embedding"], "a star", None)


@pytest.mark.parametrize("chosen", [["block.0.head.1"], ["block.0.mlp", "embedding", "embedding"]])
def test_ablation_is_what_forming_every_vector_gives(
    result: Result, vectors: tuple[np.ndarray, np.ndarray], chosen: list[str]
) -> None:
    parts, texts = vectors
    before, after = decompose_without.without(result, chosen)
    for i in range(4):
        z = np.zeros(6)
        for c, name in enumerate(COMPONENTS):
            z += parts[:, c].mean(0) if name in chosen else parts[i, c]
        assert np.allclose(after[i], texts @ z / np.linalg.norm(z), atol=1e-12)
        whole = parts[i].sum(0)
        assert np.allclose(before[i], texts @ whole / np.linalg.norm(whole), atol=1e-12)
    rows = decompose_without.answer_rows(result, before, after)
    changed = int((before.argmax(1) != after.argmax(1)).sum())
    assert [r[-1] for r in rows] == ["changed"] * changed + [""] * (4 - changed)
    assert f"{changed} of 4 answers change" in decompose_without.told(chosen, before, after)


def test_images_are_ordered_by_a_text_and_by_a_reference(
    result: Result, vectors: tuple[np.ndarray, np.ndarray]
) -> None:
    parts, _ = vectors
    chosen = ["block.0.head.0", "block.0.mlp"]
    by_text = decompose_without.order(result, chosen, "a star", None)
    scores = result.arrays["scores"].values[:, [1, 3], 0].sum(1)
    assert [n for n, _ in by_text] == [IMAGES[i] for i in np.argsort(-scores)]
    by_image = decompose_without.order(result, chosen, None, "three.png")
    assert by_image[0] == ("three.png", pytest.approx(1.0))
    added = parts[:, [1, 3]].sum(1)
    added -= added.mean(0)
    cosine = added[0] @ added[2] / np.linalg.norm(added[0]) / np.linalg.norm(added[2])
    assert dict(by_image)["one.png"] == pytest.approx(cosine)
    for text, image, says in ((None, "no.png", "Choose the reference"), ("no", None, "none of the texts")):
        with pytest.raises(RequestError, match=says):
            decompose_without.order(result, chosen, text, image)


@pytest.mark.parametrize(
    ("chosen", "says"), [([], "No components are chosen"), (["block.9.mlp"], "'block.9.mlp' is no component")]
)
def test_chosen_components_are_checked(result: Result, chosen: list[str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        decompose_without.without(result, chosen)


def test_what_is_not_in_the_run_is_refused(result: Result) -> None:
    found = decompose_view.scores(result)
    for call, says in (
        (lambda: found.of("a cat", None), "none of the texts of this run"),
        (lambda: found.of(None, "x.png"), "none of the images of this run"),
        (lambda: found.component("x"), "no component of this model"),
        (lambda: decompose_view.layer_map(Result({}, {})), "no map of components"),
    ):
        with pytest.raises(RequestError, match=says):
            call()


def test_the_extremes_are_each_image_once_from_high_to_low(result: Result) -> None:
    values = result.arrays["scores"].values[:, 3, 1]
    for most in (1, 4):
        found = decompose_view.extremes(result, "block.0.mlp", "a heart", most)
        assert [v for _, v in found] == sorted((v for _, v in found), reverse=True)
        assert len({n for n, _ in found}) == len(found) == min(4, 2 * most)
        assert found[0][1] == values.max() and found[-1][1] == values.min()


def test_groups_are_counted_and_the_worst_comes_first(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text("file,label,group\nin/one.png,star,s\ntwo.png,heart,h\nthree.png,heart,h\n")
    groups = decompose_without.read_groups(file)
    before = np.array([[9, 0, 0], [0, 9, 0], [9, 0, 0], [0, 0, 9]], float)
    after = np.array([[0, 9, 0], [0, 9, 0], [0, 9, 0], [0, 0, 9]], float)
    rows, said = decompose_without.group_rows(result, groups, before, after)
    assert rows == [["h", "2", "0.500", "1.000"], ["s", "1", "1.000", "0.000"]]
    assert said == "Worst group 0.500 → 0.000, average 0.667 → 0.667 over 3 images." + (
        " 1 of 4 images is in no row of the CSV (as 'four.png')."
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "must have the columns file, label, group"),
        ("file,label,group\nx.png,star,g\n", "None of the images is in the CSV.*'one.png'"),
        ("file,label,group\none.png,a,g\n", "'a' must stand in one of the texts, and stands in 3"),
        (
            "file,label,group\nland/one.png,star,l\nwater/one.png,heart,w\n",
            r"two rows for images named 'one.png' \(land/one.png and water/one.png\)",
        ),
        ("file,label,group\none.png,star,l\none.png,star,w\n", "two rows for images named 'one.png'"),
        ("file,label,group\none.png,sta,g\n", "'sta' must stand in one of the texts, and stands in 0"),
    ],
)
def test_a_wrong_csv_gets_a_sentence(result: Result, tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "groups.csv"
    file.write_text(text)
    before, after = decompose_without.without(result, ["embedding"])
    with pytest.raises(RequestError, match=says):
        decompose_without.group_rows(result, decompose_without.read_groups(file), before, after)


def test_images_without_a_row_are_counted(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    row = "C:\\in\\one.png,star,s\n"
    file.write_text(f"file,label,group\n{row}{row},heart,h\nother.png,heart,h\n")
    rows, said = decompose_without.group_rows(
        result, decompose_without.read_groups(file), *decompose_without.without(result, ["embedding"])
    )
    assert [row[:2] for row in rows] == [["s", "1"]]
    assert said.endswith("over 1 image. 3 of 4 images are in no row of the CSV (as 'two.png').")


def test_two_models_have_a_row_each(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text("file,label,group\none.png,star,s\ntwo.png,heart,h\nthree.png,heart,h\nfour.png,star,s\n")
    scores = result.arrays["scores"]
    turned = {"scores": replace(scores, values=-scores.values)}
    other = replace(result, arrays={**result.arrays, **turned})
    found = decompose_without.compared({"a": result, "b": other}, ["block.0.mlp"], file)
    columns, rows = found.answers
    assert columns == ["model", *decompose_without.COLUMNS] and len(rows) == 8
    assert [row[0] for row in rows] == ["a", "b"] * 4 and all(
        x[1] == y[1] for x, y in zip(rows[::2], rows[1::2], strict=True)
    )
    mine, theirs = (decompose_without.without(r, ["block.0.mlp"]) for r in (result, other))
    for model, image, before, cosine, after, then, _ in rows:
        i = scores.axis("image").labels.index(image)
        a, b = mine if model == "a" else theirs
        texts = scores.axis("text").labels
        assert (before, cosine) == (texts[a[i].argmax()], f"{a[i].max():.3f}")
        assert (after, then) == (texts[b[i].argmax()], f"{b[i].max():.3f}")
    columns, rows = found.groups or ([], [])
    assert columns == ["model", *decompose_without.GROUP_COLUMNS]
    assert sorted((row[0], row[1]) for row in rows) == [("a", "h"), ("a", "s"), ("b", "h"), ("b", "s")]
    for name, r, t in (("a", result, mine), ("b", other, theirs)):
        own, about = decompose_without.group_rows(r, decompose_without.read_groups(file), *t)
        assert [row[1:] for row in rows if row[0] == name] == own and f"{name}: {about}" in found.said


def test_a_second_model_without_the_components_is_said(result: Result) -> None:
    parts, scores = (result.arrays[n] for n in ("contributions", "scores"))
    labels = tuple(c.replace("block.0", "stage.0") for c in parts.axis("component").labels)
    named = {
        n: replace(t, axes=tuple(replace(a, labels=labels) if a.name == "component" else a for a in t.axes))
        for n, t in (("contributions", parts), ("scores", scores))
    }
    other = replace(result, arrays={**result.arrays, **named})
    found = decompose_without.compared({"a": result, "b": other}, ["block.0.mlp"], None)
    assert found.said.endswith("b has none of these components.") and found.groups is None
    assert {row[0] for row in found.answers[1]} == {"a"}
    found = decompose_without.compared({"a": result, "b": other}, ["block.0.mlp", "embedding"], None)
    assert found.said.endswith(" It has no block.0.mlp.") and {row[0] for row in found.answers[1]} == {
        "a",
        "b",
    }
    alone = decompose_without.compared({"a": result}, ["block.0.mlp"], None)
    assert alone.answers[0] == decompose_without.COLUMNS and "a:" not in alone.said
    with pytest.raises(RequestError, match="No components are chosen"):
        decompose_without.compared({"a": result, "b": other}, [], None)


def test_a_csv_that_is_no_text_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RequestError, match="can't be read as a CSV in UTF-8"):
        decompose_without.read_groups(tmp_path / "groups.csv")


def test_token_scores_become_a_grid() -> None:
    labels = ("class", "reg.0", *(f"patch.{r}.{c}" for r in range(2) for c in range(3)), "padding")
    grid, others = decompose_view.token_grid(labels, np.arange(9.0))
    assert grid.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert others == {"class": 0, "reg.0": 1, "padding": 8}


def test_the_shipped_aligner_is_taken_unless_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "atlas" / "aligners").mkdir(parents=True)
    file = tmp_path / "atlas" / "aligners" / "atlas-vit.safetensors"
    file.touch()
    monkeypatch.setattr(decompose_form, "ASSETS", tmp_path)
    asked = {"clip": None, "aligner": None}
    assert decompose_form.space("atlas-vit", asked) == {"clip": "atlas-clip", "aligner": str(file)}
    mine = {"clip": "my-clip", "aligner": "my.safetensors"}
    assert decompose_form.space("atlas-vit", mine) == mine
    for other in ("atlas-clip", "../atlas/aligners/atlas-vit", ""):
        assert decompose_form.space(other, asked) == asked


def test_uploads_replace_the_examples_and_then_grow(session: Session, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    first, said = pictured.added(
        session, pictured.EXAMPLES, [str(tmp_path / n) for n in ("0.png", "notes.txt", "cut.png")]
    )
    assert said.startswith("1 image. Left out: 2 (notes.txt is no image)")
    second, said = pictured.added(session, first, [str(tmp_path / "1.png")])
    assert said == "2 images." and len(pictured.gallery(session, second)) == 2
    with pytest.raises(RequestError, match="No image could be read: cut.png is broken or cut short") as told:
        pictured.added(session, second, [str(tmp_path / "cut.png")])
    assert str(tmp_path) not in str(told.value)
    with pytest.raises(RequestError, match="No image could be read: nothing was given"):
        pictured.added(session, second, [])
    with pytest.raises(RequestError, match="No images are given"):
        pictured.folder_of(session, "")
    with pytest.raises(RequestError, match="no longer kept"):
        pictured.folder_of(session, "../runs")

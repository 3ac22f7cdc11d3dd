"""Mean ablation: direct and true effects as in the slow forms, groups counted right, and refusals."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import figures
from studio.errors import RequestError
from studio.images import read_image
from studio.methods.component_choice import Choice, first_components
from studio.methods.vit_ablation import Params, draw, group_accuracy, output_means, read_groups
from studio.models.ablation import ablated, branches, named_branches
from studio.models.component_space import Space
from studio.models.corpus import statistics
from studio.types import Recipe
from tests import vision_families as families
from tests.references.naive_vit_ablation import naive_direct_effect, naive_true_ablation
from tests.vision_corpora import Quiet, picture_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def loaded(model: Any, files: list[Path]) -> torch.Tensor:
    return model.pixels([read_image(f)[0] for f in files])


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", ["vit-class", "vit-mean-fc-norm", "vit-mean-norm-first", "deit3"])
def test_the_true_ablation_is_that_of_the_slow_form(name: str, tmp_path: Path) -> None:
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 9)
    chosen = ("block.0.head.1", "block.0.head.3", "block.1.mlp", "block.2.head.0")
    images, reference = loaded(model, files[:2]), files[2:]
    means = output_means(model, reference, chosen, Quiet(rows=4))
    with ablated(model.layout, means):
        got = model.representation(images)
    wanted = torch.stack(naive_true_ablation(model.net, images, loaded(model, reference), chosen))
    assert far(got, wanted) <= 1e-5
    assert far(model.representation(images), wanted) > 1e-2  # and afterwards the model is what it was


@pytest.mark.parametrize("name", ["vit-mean-norm-first", "swin", "maxvit", "hf-clip-projection", "openclip"])
def test_the_direct_effect_is_that_of_the_slow_form(name: str, tmp_path: Path) -> None:
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 8)
    space = Space(model)
    known = list(branches(model.layout))
    chosen = (known[0], known[len(known) // 2], known[-1])
    found = statistics(space, files[2:], Quiet())
    parts = space.whole.run(loaded(model, files))
    vectors = [{k: v[i].double() for k, v in parts.components.items()} for i in range(8)]
    wanted = torch.stack(naive_direct_effect(vectors[:2], vectors[2:], chosen))
    got = parts.representation[:2].double()
    for c in chosen:
        got = got - parts.components[c][:2].double() + torch.from_numpy(found.mean(space, c))
    assert far(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["swin", "maxvit", "hf-clip-projection", "openclip", "dinov2-registers"])
def test_a_branch_that_gives_what_it_gave_changes_nothing(name: str, tmp_path: Path) -> None:
    """The means of one image, put in its own place, in windows, convolutions and towers alike."""
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 3)
    chosen = tuple(branches(model.layout))
    one = loaded(model, files[:1])
    means = output_means(model, files[:1], chosen, Quiet())
    with ablated(model.layout, means):
        assert far(model.representation(one), model.representation(one)) == 0
        same = model.representation(loaded(model, files))
    plain = model.representation(one)
    assert far(same[:1], plain) <= 1e-5


def test_everything_ablated_leaves_one_answer_up_to_the_embedding(tmp_path: Path) -> None:
    """In the last block with nothing but the branches' means, images differ by earlier blocks alone."""
    model, files = families.model("vit-class"), picture_folder(tmp_path / "pictures", 6)
    pixels = loaded(model, files)
    means = output_means(model, files, tuple(branches(model.layout)), Quiet())
    with ablated(model.layout, means):
        tokens = model.representation(pixels)
    assert far(tokens, tokens[:1].expand_as(tokens)) <= 1e-5  # the class token's embedding is a constant


def test_names_of_branches() -> None:
    layout = families.model("vit-class").layout
    got = named_branches("m", layout, ["block.1.attention", "block.1.head.2", "block.0.mlp"])
    assert got == (*(f"block.1.head.{h}" for h in range(4)), "block.0.mlp")
    for wrong, why in (
        ("embedding", "a constant or the input"),
        ("block.1.bias", "a constant"),
        ("x", "not there"),
    ):
        with pytest.raises(RequestError, match=why):
            named_branches("m", layout, [wrong])
    with pytest.raises(RequestError, match="such as block.0.head.0, block.0.attention, block.0.mlp"):
        named_branches("m", layout, ["block.9.head.0"])


def write_table(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("file", "label", "group"), *rows])
    return path


def test_groups_are_read_from_the_folder_of_the_table(tmp_path: Path) -> None:
    files = picture_folder(tmp_path / "p", 3)
    table = write_table(tmp_path / "g.csv", [("p/0000.png", "a", "x"), ("p/0002.png", "b", "y")])
    assert read_groups(table, files, ("a", "b")) == [(0, "x"), None, (1, "y")]


def test_accuracy_by_group() -> None:
    members = [(0, "x"), (0, "x"), None, (1, "y"), (1, "x")]
    right = np.array([True, False, True, True, True])
    assert group_accuracy(right, members) == {"x": (2 / 3, 3), "y": (1.0, 1)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file,label\na,b\n", "must have the columns file, label and group"),
        ("file,label,group\n", "and a row an image"),
        ("file,label,group\np/0000.png,a\n", "line 2 of g.csv is cut short"),
        ("file,label,group\np/0000.png,cat,x\n", "line 2 has the label 'cat'.*write a class as cat: TEXT"),
        ("file,label,group\nq/0000.png,a,x\n", "names none of the images"),
    ],
)
def test_wrong_tables(text: str, sentence: str, tmp_path: Path) -> None:
    files = picture_folder(tmp_path / "p", 1)
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(RequestError, match=sentence):
        read_groups(tmp_path / "g.csv", files, ("a", "b"))
    with pytest.raises(RequestError, match="can't be read as a CSV file"):
        read_groups(tmp_path / "none.csv", files, ("a", "b"))


def test_a_choice_that_says_too_little() -> None:
    empty = {"components": None, "top": None, "feature": None, "features": None, "bank": None}
    for given, sentence in (
        ({"components": ("x",), "top": 2}, "give one of them"),
        ({"top": 2}, "say which with --feature"),
        ({"feature": "b", "features": ("a: c",)}, "'b' is none of the --features a"),
    ):
        with pytest.raises(RequestError, match=sentence):
            Choice(**{**empty, **given}).check()


def test_the_first_components_are_those_of_the_ranking(session: Any, tmp_path: Path) -> None:
    """The writer of the feature is chosen, and what is not allowed never is."""
    clip = session.model("atlas-clip", "vision").clip
    texts = clip.text_features(["a star", "a moon", "a ring"]).astype(np.float64)
    bank = ("a star", "a moon", "a ring", "a tree")
    line = texts[0] - clip.text_features(list(bank)).astype(np.float64).mean(0)
    rng = np.random.default_rng(0)
    parts = {
        "loud": rng.normal(size=(300, 1)) * line * 2,
        "quiet": rng.normal(size=(300, 1)) * line,
        "other": rng.normal(size=(300, len(line))) / 100,
    }
    z = sum(parts.values())
    centred = {k: v - v.mean(0) for k, v in parts.items()}
    found = SimpleNamespace(
        covariances={k: v.T @ v / 300 for k, v in centred.items()},
        crosses={k: v.T @ (z - z.mean(0)) / 300 for k, v in centred.items()},
        total_covariance=np.cov(z.T, bias=True),
    )
    space = SimpleNamespace(matrix=lambda label: np.eye(len(line)))
    asked = Choice(None, 2, "a star", None, bank)
    assert first_components(space, clip, found, asked, tuple(parts))[0] == ("loud", "quiet")
    names, scores = first_components(space, clip, found, asked, ("quiet", "other"))
    assert names == ("quiet", "other") and 0.05 < scores[0] < 0.5


@pytest.fixture(scope="module")
def run(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("set")
    picture_folder(folder / "p", 8)
    picture_folder(folder / "others", 6, seed=1)
    rows = [(f"p/{i:04d}.png", "star" if i % 2 else "moon", "even" if i < 3 else "odd") for i in range(7)]
    asked = {
        "images": (str(folder / "p"),),
        "texts": ("star: a star | stars", "moon: a moon"),
        "groups": str(write_table(folder / "g.csv", rows)),
        "reference": (str(folder / "others"),),
    }
    return session.run(
        Recipe("ablate-components", "atlas-clip", asked, {"components": ("block.5.attention",)})
    )


def test_the_run_of_a_clip(run: Any, session: Any) -> None:
    arrays, values = run.result.arrays, run.result.values
    assert arrays["scores"].axis("state").labels == ("before", "direct", "true")
    model = session.model("atlas-clip", "vision")
    files = sorted(Path(run.recipe.inputs["images"][0]).iterdir())
    z = model.representation(loaded(model, files)).double().numpy()
    star = model.clip.text_features(["a star", "stars"]).mean(0)
    cosine = z @ star / np.linalg.norm(z, axis=1) / np.linalg.norm(star)
    assert np.allclose(arrays["scores"].values[0, :, 0], cosine, atol=1e-5)
    # nothing comes after the heads of the last block but its MLP and the norm
    assert 0 < np.abs(arrays["scores"].values[2] - arrays["scores"].values[1]).max()
    answers = arrays["scores"].values.argmax(-1)[:, :7]
    truth = np.array([0 if i % 2 else 1 for i in range(7)])
    for s, state in enumerate(("before", "direct", "true")):
        right = answers[s] == truth
        assert arrays["accuracy"].values[s] == pytest.approx([right[:3].mean(), right[3:].mean()])
        assert values["average"][state] == pytest.approx(right.mean())
        assert values["worst"][state] == pytest.approx(min(right[:3].mean(), right[3:].mean()))
    assert arrays["group_size"].values.tolist() == [3, 4] and values["means"] == "6 reference images"
    assert any("1 of 8 images have no row" in w for w in values["warnings"])
    figure = draw(run)
    assert figure.data["columns"] == ["", "average", "worst group", "even", "odd"]
    assert len(figure.data["rows"]) == 3 and figures.to_bytes(figure, "svg").startswith(b"<?xml")


def test_without_groups_and_reference_the_means_are_said_to_be_the_images_own(run: Any, session: Any) -> None:
    asked = {
        "images": run.recipe.inputs["images"],
        "texts": ("a star", "a moon"),
        "features": ("a star", "blue"),
    }
    asked["bank"] = ("a star", "a moon", "blue", "a red tree")
    got = session.run(
        Recipe("ablate-components", "atlas-clip", asked, {"feature": "a star", "top": 2, "downstream": False})
    )
    assert got.result.arrays["scores"].values.shape == (2, 8, 2) and len(got.result.values["ranks"]) == 2
    assert any("those of the evaluated images themselves" in w for w in got.result.values["warnings"])
    assert draw(got).data["columns"] == ["image", "whole model", "direct effect"]


def test_refusals(run: Any, session: Any) -> None:
    usual = {"images": run.recipe.inputs["images"], "texts": ("a star", "a moon")}
    for inputs, params, sentence in (
        ({"texts": ("a star",)}, {"components": ("block.0.mlp",)}, "one class alone is always the answer"),
        ({}, {}, "What is taken away"),
        ({}, {"components": ("embedding",)}, "can't be ablated in atlas-clip"),
        ({"reference": ("/nowhere",)}, {"components": ("block.0.mlp",)}, "--reference: there is no file"),
        ({"texts": ("a:", "b")}, {"components": ("block.0.mlp",)}, "--texts: 'a:' is no feature"),
        ({}, {"components": ("block.0.mlp",), "aligner": "/nowhere"}, "--aligner: there is no file"),
        ({"reference": usual["images"]}, {"components": ("block.0.mlp",), "top": 3}, "give one of them"),
    ):
        with pytest.raises(RequestError, match=sentence):
            session.run(Recipe("ablate-components", "atlas-clip", usual | inputs, params))
    assert Params().downstream

"""Roles of components: shares that sum to one, equal to the slow form, and whatever basis is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import figures
from studio.errors import RequestError
from studio.images import read_image
from studio.methods.component_roles import draw, feature_basis, read_features, roles
from studio.models.component_space import Space
from studio.models.corpus import Statistics, statistics
from studio.types import Recipe
from tests import vision_families as families
from tests.references.naive_roles import naive_roles
from tests.vision_corpora import Quiet, picture_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def basis_of(dim: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return feature_basis(rng.normal(size=(count, dim)), rng.normal(size=dim) / 3)


@pytest.mark.parametrize("name", ["vit-mean-fc-norm", "swin", "hf-clip-projection"])
def test_scores_are_those_of_the_slow_form(name: str, tmp_path: Path) -> None:
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 30)
    space = Space(model)
    found = statistics(space, files, Quiet())
    parts = space.whole.run(model.pixels([read_image(f)[0] for f in files]))
    basis = basis_of(space.width, 4)
    got = roles(space, found, basis)
    wanted = naive_roles({k: v.double().numpy() for k, v in parts.components.items()}, basis)
    assert got["score"].sum() == pytest.approx(1, abs=1e-5)
    for i, label in enumerate(found.covariances):
        score, correlation, within = wanted[label]
        assert got["score"][i] == pytest.approx(score, abs=1e-5)
        if abs(score) > 1e-6:
            assert got["correlation"][i] == pytest.approx(correlation, abs=1e-3)
            assert got["within"][i] == pytest.approx(within, rel=1e-3)


class Plain:
    """A space of vectors as they are."""

    def matrix(self, label: str) -> np.ndarray:
        return np.eye(12)


def planted(seed: int = 0) -> tuple[Statistics, np.ndarray]:
    """Three components in 12 dimensions: one writes the feature, one something else, one a constant."""
    rng = np.random.default_rng(seed)
    basis = basis_of(12, 3)
    outside = rng.normal(size=(400, 12)) * 4
    outside -= outside @ basis.T @ basis
    parts = {"writer": rng.normal(size=(400, 3)) @ basis, "other": outside, "constant": np.ones((400, 12))}
    z = sum(parts.values())
    centred = {k: v - v.mean(0) for k, v in parts.items()}
    spreads = {k: v.T @ v / 400 for k, v in centred.items()}
    crosses = {k: v.T @ (z - z.mean(0)) / 400 for k, v in centred.items()}
    means = {k: v.mean(0) for k, v in parts.items()}
    return Statistics(400, means, spreads, crosses, z.mean(0), np.cov(z.T, bias=True)), basis


def test_the_writer_has_everything_and_a_larger_one_beside_the_feature_nothing() -> None:
    found, basis = planted()
    got = roles(Plain(), found, basis)
    assert np.allclose(got["score"], [1, 0, 0]) and np.allclose(got["within"], [1, 0, 0])
    assert np.allclose(got["correlation"], [1, 0, 0], atol=1e-6)


def test_a_rotation_of_the_basis_changes_the_published_score_alone() -> None:
    rng = np.random.default_rng(3)
    found, basis = planted()
    mixed = {k: v + 0.3 * np.diag(rng.uniform(0, 2, 12)) for k, v in found.crosses.items()}
    found = Statistics(400, found.means, found.covariances, mixed, found.total_mean, found.total_covariance)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    one, two = roles(Plain(), found, basis), roles(Plain(), found, turn @ basis)
    assert np.allclose(one["score"], two["score"]) and np.allclose(one["within"], two["within"])
    assert np.abs(one["correlation"] - two["correlation"]).max() > 1e-3


def test_the_basis_is_orthonormal_and_spans_the_centred_texts() -> None:
    rng = np.random.default_rng(0)
    texts, centre = rng.normal(size=(4, 9)), rng.normal(size=9)
    texts = np.concatenate([texts, texts[:1], centre[None]])  # twice the same, and the centre itself
    basis = feature_basis(texts, centre)
    assert basis.shape == (4, 9) and np.allclose(basis @ basis.T, np.eye(4))
    assert np.allclose((texts - centre) @ basis.T @ basis, texts - centre)
    assert feature_basis(centre[None], centre).shape == (0, 9)


def test_images_that_do_not_differ() -> None:
    found, basis = planted()
    still = Statistics(9, found.means, found.covariances, found.crosses, found.total_mean, np.zeros((12, 12)))
    with pytest.raises(RequestError, match="does not vary over these images; take images that differ"):
        roles(Plain(), still, basis)


def test_features_are_read() -> None:
    got = read_features(["colour: red | blue|red", "a star", "time : 5:30"])
    assert got == {"colour": (("red",), ("blue",)), "a star": (("a star",),), "time": (("5:30",),)}
    for wrong in (": red", "colour:", "a | | b"):
        with pytest.raises(RequestError, match="is no feature; write NAME: TEXT | TEXT"):
            read_features([wrong])
    with pytest.raises(RequestError, match="'a' is given twice; join its texts"):
        read_features(["a: b", "a: c"])


@pytest.fixture(scope="module")
def run(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pictures")
    picture_folder(folder, 24)
    asked = {"images": (str(folder),), "features": ("colour: red | green | blue", "a star")}
    asked["bank"] = ("a circle", "a gray background", "a house in sketch style", "a red moon")
    return session.run(Recipe("rank-components", "atlas-clip", asked))


def test_the_run_of_a_clip(run: Any) -> None:
    arrays = run.result.arrays
    assert arrays["score"].axis("feature").labels == ("colour", "a star")
    assert np.allclose(arrays["score"].values.sum(1), 1, atol=1e-4)
    difference = arrays["score"].values[0] - arrays["score"].values[1]
    assert np.allclose(arrays["specific"].values, [difference, -difference], atol=1e-6)
    first = run.result.values["first"]["colour"][0]
    assert first == arrays["specific"].axis("component").labels[int(difference.argmax())]
    figure = draw(run)
    assert figure.data["columns"] == ["", "colour", "a star"] and first in figure.data["rows"][0][1]
    assert figures.to_bytes(figure, "svg").startswith(b"<?xml")
    assert figure.caption.endswith(
        "; no placebo was asked for, so even the first may be chance: some component always is first"
    )
    sure = replace(run, result=replace(run.result, values={**run.result.values, "above": {"a star": []}}))
    assert draw(sure).caption.endswith("; above what random directions reach: a star none")


def test_refusals(session: Any, run: Any) -> None:
    images = run.recipe.inputs["images"]
    for given, sentence in (
        ({"features": ("star",), "bank": ("star",)}, "are the centre of the --bank itself"),
        ({"features": ("a:",)}, "is no feature"),
        ({"aligner": "/nowhere/a.safetensors", "clip": "atlas-clip"}, "--aligner: there is no file"),
    ):
        with pytest.raises(RequestError, match=sentence):
            session.run(Recipe("rank-components", "atlas-clip", {"images": images}, given))

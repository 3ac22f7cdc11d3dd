"""Aligners: every piece of the fit against its slow form, planted truth, resuming, and what the file does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import cli, figures
from studio.atlas import aligners
from studio.errors import Cancelled, RequestError
from studio.images import image_files, read_image
from studio.methods import text_alignment
from studio.methods.text_alignment import Inputs, Params, _Align, align, draw
from studio.models import alignment
from studio.models.aligner import REST, Aligner, fitting_aligner
from studio.models.alignment import Coordinates, Fit, Settings, State, part_cosines, random_maps
from studio.models.component_space import Space
from studio.models.vision import ClipModel
from studio.models.vit import VisionModel
from studio.types import Recipe
from tests import vision_families as families
from tests.references.naive_alignment import naive_loss, naive_polar, naive_ridge
from tests.vision_corpora import Quiet, picture_folder

SIZES = [5, 12, 5, 30]
WIDTH = 12


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def data(count: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, sum(SIZES), generator=generator) + 0.3
    return x, torch.nn.functional.normalize(torch.randn(count, WIDTH, generator=generator) + 0.5, dim=1)


# ---- the pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1e-3, 0.3])
def test_the_closed_form_is_ridge_regression(weight: float) -> None:
    x, z = data()
    found = Fit(x, z, SIZES, Settings(ridge=weight)).ridge()
    maps, bias = naive_ridge(x.double().numpy(), z.double().numpy(), weight)
    assert np.abs(found.maps.numpy() - maps).max() < 1e-6 and np.abs(found.bias.numpy() - bias).max() < 1e-6


def test_the_start_is_polar_and_keeps_the_means() -> None:
    x, z = data()
    fit = Fit(x, z, SIZES)
    closed = fit.ridge()
    start = fit.polar(closed)
    for found, raw in zip(start.maps.split(SIZES), closed.maps.split(SIZES), strict=True):
        assert np.abs(found.numpy() - naive_polar(raw.double().numpy())).max() < 1e-5
    assert fit.isometry(start.maps) < 1e-10
    middle = (x @ start.maps + start.bias).mean(0)
    assert float(torch.nn.functional.cosine_similarity(middle, z.mean(0), dim=0)) > 1 - 1e-6


def test_the_estimate_of_the_penalty_is_unbiased_and_the_loss_is_the_slow_one() -> None:
    x, z = data()
    fit = Fit(x, z, SIZES, Settings(probes=20_000))
    maps = random_maps(SIZES, WIDTH, 0) * 1.1 + 0.02 * torch.randn(
        sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(1)
    )
    bias = z.mean(0)
    exact = fit.isometry(maps)
    estimate = float(fit.penalty(maps, torch.Generator().manual_seed(2)))
    assert exact > 0.01 and estimate == pytest.approx(exact, rel=0.02)
    cosines = alignment.total_cosines(State(maps, bias), x, z)
    known = [t.double().numpy() for t in (x, z, maps, bias)]
    assert float(1 - cosines.mean()) + 2 * exact == pytest.approx(naive_loss(*known, SIZES, 2), abs=1e-5)
    assert float(fit.penalty(random_maps(SIZES, WIDTH, 3), torch.Generator().manual_seed(2))) < 1e-10


def test_two_sittings_are_one() -> None:
    x, z = data()
    fit = Fit(x, z, SIZES, Settings(steps=60, batch=16))
    kept: list[State] = []
    whole = fit.descend(fit.polar(fit.ridge()), lambda state, loss: kept.append(state))
    assert [s.step for s in kept] == [20, 40, 60]
    again = fit.descend(kept[0])
    assert torch.equal(again.maps, whole.maps) and torch.equal(again.bias, whole.bias)
    assert not torch.equal(whole.maps, kept[0].maps)


def synthetic() -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    """16 parts of ten numbers each into 48 dimensions, correlated over the images, by known isometries."""
    generator = torch.Generator().manual_seed(0)
    sizes = [10] * 16
    shared = torch.randn(1500, 20, generator=generator) @ torch.randn(20, 160, generator=generator) / 4
    x = shared + torch.randn(1500, 160, generator=generator)
    truth = random_maps(sizes, 48, 5)
    return x, torch.nn.functional.normalize(x @ truth, dim=1), sizes, truth


def test_planted_maps_are_found_better_from_the_polar_start() -> None:
    """The polar start ends at the truth, a random one well before it."""
    x, z, sizes, truth = synthetic()
    fit = Fit(x[:1200], z[:1200], sizes, Settings(steps=300, rate=3e-3, ridge=1e-3))
    closed = fit.ridge()
    found = {"ridge": closed, "end": fit.descend(fit.polar(closed)), "random": fit.descend(fit.random())}
    parts = {k: part_cosines(s.maps, truth, x[1200:], sizes).mean() for k, s in found.items()}
    total = {k: float(alignment.total_cosines(s, x[1200:], z[1200:]).mean()) for k, s in found.items()}
    assert total["end"] > 0.99 and total["ridge"] > 0.99
    assert parts["end"] > 0.99 and parts["end"] > parts["random"] + 0.2
    assert part_cosines(truth, truth, x, sizes) == pytest.approx(np.ones(16), abs=1e-5)


# ---- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-class", "swin", "openclip"])
def test_coordinates_are_isometric_and_the_file_does_what_the_fit_did(name: str, tmp_path: Path) -> None:
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 9)
    space = Space(model)
    coordinates = Coordinates(space, 2)
    assert any(x.endswith(".mlp") for x in coordinates.labels) and "embedding" not in coordinates.labels
    parts = space.whole.run(model.pixels([read_image(f)[0] for f in files]))
    x = coordinates.of(parts)
    columns = x.split(coordinates.sizes, 1)
    for label, own in zip(coordinates.labels, columns, strict=False):
        vector = parts.components[label]
        assert torch.allclose(own @ own.T, vector @ vector.T, rtol=1e-4, atol=1e-5)
    maps = random_maps(coordinates.sizes, 20, 0)
    bias = torch.randn(20, generator=torch.Generator().manual_seed(1))
    tensors = {
        k: torch.from_numpy(v) for k, v in coordinates.matrices(maps.split(coordinates.sizes), bias).items()
    }
    own_bias = tensors.pop("aligner.bias")
    aligner = Aligner(tensors, own_bias, "outputs", "", "")
    total = sum(aligner.components(parts).values())
    assert torch.allclose(total, x @ maps + bias, rtol=1e-3, atol=1e-4)
    for label in coordinates.roots:  # the target: the Gram of the head's block of the output matrix
        w, m = tensors[label], space.written[label]
        if len(m) <= 20:
            assert torch.allclose(w @ w.T, m @ m.T, rtol=1e-3, atol=1e-5)
        vector = parts.components[label] @ aligner.vector_matrix(space.whole, label)
        assert torch.allclose(vector, parts.outputs[label] @ w, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture_folder(folder, 60)
    return folder


ASKED = {"clip": "atlas-clip", "blocks": 2, "steps": 20}


@pytest.fixture(scope="module")
def run(session: Any, pictures: Path) -> Any:
    recipe = Recipe("align", str(families.saved("vit-class")), {"images": (str(pictures),)}, ASKED)
    return session.run(recipe)


def test_the_run_and_its_file(session: Any, run: Any, pictures: Path, tmp_path: Path) -> None:
    values, arrays = run.result.values, run.result.arrays
    assert values["images"] == 60 and len(arrays["cosines"].values) == 6  # every tenth is held out
    assert values["cosine"] == pytest.approx(float(arrays["cosines"].values.mean()), abs=1e-6)
    labels = arrays["planted"].axis("component").labels
    assert labels[-1] == REST and labels[0] == "block.1.head.0" and "block.2.mlp" in labels
    assert values["planted_part_cosine"] == pytest.approx(float(arrays["planted"].values.mean()), abs=1e-6)
    assert figures.to_bytes(draw(run), "svg").startswith(b"<?xml")
    file = session.store.path(run.id) / "made.safetensors"
    asked = {
        "images": (str(pictures),),
        "texts": ("red", "a star"),
        "clip": "atlas-clip",
        "aligner": str(file),
    }
    parts = session.run(Recipe("decompose", str(families.saved("vit-class")), asked)).result.arrays
    z = session.model("atlas-clip", "clip").image_features(
        [read_image(f)[0] for f in image_files([pictures])[0]]
    )
    y = parts["representation"].values
    cosines = (y * z).sum(1) / np.linalg.norm(y, axis=1)
    assert np.allclose(cosines[::10], arrays["cosines"].values, atol=1e-4)


def test_a_clip_that_fails_leaves_images_and_their_coordinates_side_by_side(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    model = families.model("vit-class")
    clip = ClipModel(families.locate(str(families.ATLAS_CLIP)), "cpu")
    inputs, params = Inputs(images=(str(pictures),)), Params(**ASKED)

    def made() -> Any:
        return align(model, inputs, params, (), clip, Quiet(rows=16))

    asked, features = [], clip.image_features

    def failing(images: list) -> Any:
        asked.append(len(images))
        if len(asked) == 2:
            raise ZeroDivisionError("injected")
        return features(images)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clip, "image_features", failing)
        made()
    found = made()
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "another-home"))
    for name, tensor in made().made.tensors.items():
        assert np.allclose(found.made.tensors[name], tensor, atol=1e-6)


def test_work_that_was_stopped_goes_on(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("vit-class")
    clip = ClipModel(families.locate(str(families.ATLAS_CLIP)), "cpu")
    files = image_files([str(pictures)])[0]

    def work(report: Quiet) -> Any:
        made = _Align(model, clip, Space(model), Params(**ASKED), report)
        made.collect(files)
        return made.result()

    with pytest.raises(Cancelled):
        work(Quiet(rows=16, stop_after=32))
    with pytest.raises(Cancelled):
        work(Quiet(rows=16, stop_after=61))  # in the first fit
    seen: list[int] = []
    taken = model.pixels
    monkeypatch.setattr(model, "pixels", lambda images: seen.append(len(images)) or taken(images))
    resumed = work(Quiet(rows=16))
    assert not seen  # all coordinates were kept
    inputs, whole_home = Inputs(images=(str(pictures),)), pictures.parent / "another-home"
    monkeypatch.setenv("LOCUS_HOME", str(whole_home))
    whole = align(model, inputs, Params(**ASKED), (), clip, Quiet(rows=16))
    assert sum(seen) == 60
    for name, tensor in whole.made.tensors.items():
        assert np.allclose(resumed.made.tensors[name], tensor, atol=1e-6)


def test_the_command_saves_an_aligner(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = families.model("vit-class"), tmp_path / "a.safetensors"
    given = [
        "--images",
        str(pictures),
        "--clip",
        "atlas-clip",
        "--blocks",
        "1",
        "--steps",
        "0",
        "--no-planted",
    ]
    given += ["--threads", "1", "--device", "cpu", "--save", str(file), "--out", str(tmp_path / "run")]
    assert cli.main(["align", "--model", str(families.saved("vit-class")), *given]) == 0
    clip = ClipModel(families.locate(str(families.ATLAS_CLIP)), "cpu")
    found = fitting_aligner(file, model, clip, Space(model).whole)
    assert found.params["blocks"] == 1 and found.params["images"] == 60 and "cosine" in found.params
    with pytest.raises(RequestError, match="was made for another model"):
        fitting_aligner(file, families.model("dino"), clip, Space(families.model("dino")).whole)
    capsys.readouterr()


def test_refusals(session: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = picture_folder(tmp_path / "few", 5)
    model = str(families.saved("vit-class"))
    with pytest.raises(RequestError, match="needs at least 40 images, and there are 5"):
        session.run(Recipe("align", model, {"images": tuple(map(str, few))}, ASKED))
    with pytest.raises(RequestError, match="--clip is missing"):
        session.run(Recipe("align", model, {"images": (str(pictures),)}))
    monkeypatch.setattr(text_alignment, "MOST_NUMBERS", 10_000)
    with pytest.raises(RequestError, match="take at most [0-9]+ images or fewer --blocks"):
        session.run(Recipe("align", model, {"images": (str(pictures),)}, {**ASKED, "steps": 1}))
    for file in picture_folder(tmp_path / "broken", 45)[:10]:
        file.write_bytes(b"no image")
    monkeypatch.setattr(text_alignment, "MOST_NUMBERS", 10**9)
    with pytest.raises(RequestError, match="needs at least 40 images that can be read, not 35"):
        session.run(Recipe("align", model, {"images": (str(tmp_path / "broken"),)}, ASKED))


# ---- what is shipped --------------------------------------------------------------------------------------


def test_the_program_makes_an_aligner_that_fits(tmp_path: Path) -> None:
    clip = ClipModel(families.locate(str(families.ATLAS_CLIP)), "cpu")
    made = aligners.make("atlas-vit", clip, aligners.Options(images=64, steps=20), tmp_path)
    model = VisionModel(families.locate("atlas-vit"), "cpu")
    found = fitting_aligner(tmp_path / "atlas-vit.safetensors", model, clip, Space(model).whole)
    assert found.width == 128 and found.params["cosine"] == made["cosine"] > 0.5
    assert 0 < made["planted_random"] < made["planted_part_cosine"] <= 1


def test_shipped_aligners_fit_their_models_and_are_small() -> None:
    files = sorted(aligners.FOLDER.glob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) < 3 * 2**20
    clip = ClipModel(families.locate(str(families.ATLAS_CLIP)), "cpu")
    card = (aligners.FOLDER / "README.md").read_text()
    for file in files:
        model = VisionModel(families.locate(file.stem), "cpu")
        found = fitting_aligner(file, model, clip, Space(model).whole)
        told = f"{found.params['cosine']:.3f}", f"{found.params['planted_part_cosine']:.3f}"
        assert all(figure in card for figure in told) and f"| {file.stem} |" in card

"""Amplifying on a person's own images: the loss and its gradient against the slow reference, the crop, and
what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from studio import Recipe
from studio.errors import RequestError
from studio.methods.component_attribution import MOST_IMAGES
from studio.models.objectives import Objective, differentiable, image_latents
from tests.references import naive_attribution as naive
from tests.test_component_attribution import CONCEPT, Quiet, ask, compare, exact, rows_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


def picture(side: int, seed: int) -> Image.Image:
    """Noise in coarse blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((side // 4, side // 4, 1), np.uint8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of the concept, one of them wide."""
    picture(64, 0).save(tmp_path / "a.png")
    picture(64, 1).resize((96, 64)).save(tmp_path / "b.png")
    return tmp_path


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_loss_on_own_images_equals_the_slow_reference(family: str) -> None:
    model, report = exact(family), Quiet()
    given = ask(objective="amplify", steps=2)
    plan = model.plan(given)
    images = [picture(plan.height, seed) for seed in (3, 4, 5)]
    own = [image_latents(model, np.asarray(image), plan) for image in images]
    slow = [naive.image_latents(model.pipe, image) for image in images]
    for mine, wanted in zip(own, slow, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    asked = type("Inputs", (), {"concept": CONCEPT, "base": ""})
    fast = Objective(model, asked, given, [0], report, own)

    def whole() -> None:
        with differentiable(fast.weights):
            fast.take_seed(0)

    assert rows_of(model, whole) == fast.rows() == report.done
    compare(model, fast, naive.amplify_terms(model.pipe, CONCEPT, 0, 2, 3.0, own))


def test_an_image_is_cropped_around_its_centre(atlas: Any) -> None:
    plan = atlas.plan(ask())
    square = picture(plan.height, 6)
    wide = Image.new("RGB", (2 * plan.width, plan.height), "red")
    wide.paste(square, (plan.width // 2, 0))
    wanted = image_latents(atlas, np.asarray(square), plan)
    torch.testing.assert_close(image_latents(atlas, np.asarray(wide), plan), wanted)
    assert wanted.shape[2:] == (plan.height // atlas.vae_factor, plan.width // atlas.vae_factor)


def test_a_run_takes_the_images_of_a_folder(session: Any, folder: Path) -> None:
    def run(**inputs: Any) -> Any:
        given = {"objective": "amplify", "steps": 2, "check": 0, "ratio": 0.0}
        recipe = Recipe("attribute", "atlas-sd", {"concept": "a star", **inputs}, given, (0,))
        return session.run(recipe, save=False)

    plain, own = run(), run(images=[str(folder)])
    assert own.result.values["own_images"] == 2 and "own_images" not in plain.result.values
    values = [r.result.arrays["attribution"].values for r in (plain, own)]
    assert np.isfinite(values[1]).all() and not np.allclose(*values)
    assert np.array_equal(plain.result.images["seed0-concept"], own.result.images["seed0-concept"])
    picture(64, 9).save(folder / "a.png")  # another image under the same name is another run
    assert run(images=[str(folder)]).key != own.key


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"objective": "erase"}, "--images are for amplify alone"),
        ({"images": ["/nowhere"]}, "there is no file or folder"),
        ({"images": "many"}, f"{MOST_IMAGES + 1} are too many; at most {MOST_IMAGES}"),
    ],
)
def test_refused(session: Any, folder: Path, given: dict, says: str) -> None:
    asked = {"concept": "a star", "images": [str(folder)], "objective": "amplify", **given}
    if asked["images"] == "many":
        asked["images"] = [str(folder / "a.png")] * (MOST_IMAGES + 1)
    with pytest.raises(RequestError, match=says):
        session.checked(Recipe("attribute", "atlas-sd", asked))

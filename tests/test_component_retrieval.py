"""Orders of images through chosen components: equal to the slow form, exact ends, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from studio import figures
from studio.errors import RequestError
from studio.images import read_image
from studio.methods.component_retrieval import Inputs, Params, draw, likeness, retrieve_images
from studio.models.catalog import ASSETS
from studio.models.vit_layouts import transformers_layout
from studio.models.vit_timm import timm_layout
from studio.provenance import files_read
from studio.store import read_run, write_run
from studio.types import Recipe
from tests import vision_families as families
from tests.references.naive_decomposition import Slow
from tests.references.naive_retrieval import naive_by_image, naive_by_text
from tests.vision_corpora import Quiet, picture_folder

EXAMPLES = ASSETS / "atlas" / "examples"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def slowly(name: str, files: list[Path]) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """(by image {component: vector}, representations), all formed explicitly in float64."""
    model = families.model(name)
    layout = timm_layout if model.family == "timm" else transformers_layout
    slow = Slow(model.net, lambda net: layout(name, net), model.pixels([read_image(f)[0] for f in files]))
    found = {k: v.numpy() for k, v in slow.components().items()}
    return [{k: v[i] for k, v in found.items()} for i in range(len(files))], slow.z.numpy()


def close(found: Any, wanted: list[float]) -> None:
    assert np.abs(np.asarray(found, float) - wanted).max() < 1e-5


@pytest.mark.parametrize("name", ["vit-mean-fc-norm", "swin", "hf-clip"])
def test_the_order_beside_an_image_is_that_of_the_slow_form(name: str, tmp_path: Path) -> None:
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 7)
    (other,) = picture_folder(tmp_path / "other", 1, seed=9)
    chosen = ("block.0.head.0", "block.1.attention", "block.0.mlp", "embedding")
    inputs = Inputs(images=(str(tmp_path / "pictures"),), like=str(other))
    found = retrieve_images(model, inputs, Params(components=chosen), (), None, Quiet(rows=3))
    images, _ = slowly(name, [*files, other])
    heads = [k for k in images[0] if k.startswith("block.1.head.")]
    assert len(heads) >= 2 and set(heads) < set(found.values["components"])
    wanted = naive_by_image(images[:-1], ["block.0.head.0", "block.0.mlp", "embedding", *heads], images[-1])
    close(found.arrays["score"].values, wanted)
    order = np.argsort(-np.array(wanted))
    assert found.values["first"] == [files[i].name for i in order]
    assert found.values["first_scores"] == pytest.approx([wanted[i] for i in order], abs=1e-5)


def test_the_order_by_a_text_is_that_of_the_slow_form(tmp_path: Path) -> None:
    model, files = families.model("hf-clip"), picture_folder(tmp_path / "pictures", 7)
    chosen = ("block.0.head.1", "block.1.mlp")
    inputs = Inputs(images=(str(tmp_path / "pictures"),), text="a star")
    found = retrieve_images(model, inputs, Params(components=chosen), (), None, Quiet(rows=4))
    images, z = slowly("hf-clip", files)
    text = model.clip.text_features(["a star"])[0].astype(float)
    close(found.arrays["score"].values, naive_by_text(images, chosen, z, text))
    close(found.arrays["whole"].values, z @ text / np.linalg.norm(z, axis=1))


def test_the_score_is_what_decompose_sums_also_through_an_aligner(session: Any) -> None:
    """And the first components for a property are those that rank-components puts first."""
    aligner = str(ASSETS / "atlas" / "aligners" / "atlas-vit.safetensors")
    space = {"clip": "atlas-clip", "aligner": aligner}
    images = (str(EXAMPLES),)
    asked = {"images": images, "text": "a mint background"} | space | {"feature": "background", "top": 4}
    found = session.run(Recipe("retrieve-images", "atlas-vit", asked)).result
    parts = session.run(
        Recipe("decompose", "atlas-vit", {"images": images, "texts": [asked["text"]]} | space)
    )
    scores = parts.result.arrays["scores"]
    places = [scores.axis("component").labels.index(c) for c in found.values["components"]]
    close(found.arrays["score"].values, scores.values[:, places, 0].sum(1))
    close(found.arrays["whole"].values, scores.values[:, :, 0].sum(1))
    roles = session.run(Recipe("rank-components", "atlas-vit", {"images": images} | space)).result
    order = [c for c in roles.values["first"]["background"] if not c.endswith("bias")]
    assert found.values["components"] == order[:4] and len(found.values["ranks"]) == 4


@pytest.fixture(scope="module")
def run(session: Any) -> Any:
    asked = {"images": (str(EXAMPLES),), "like": str(EXAMPLES / "red star on mint.png")}
    asked |= {"feature": "background", "top": 2}
    return session.run(Recipe("retrieve-images", "atlas-clip", asked))


def test_the_reference_is_first_and_its_background_follows(run: Any, tmp_path: Path) -> None:
    values = run.result.values
    assert values["first"][0] == "red star on mint.png" and values["first_scores"][0] == pytest.approx(1)
    assert {n.split(" on ")[1][:4] for n in values["first"][1:3]} == {"mint"}
    assert len(values["first"]) == 8 and len(values["last"]) == 2
    assert values["finding"].startswith("First of 10 images: red star on mint.png (1.000); rank correlation")
    write_run(run, tmp_path / "kept")
    figure = draw(read_run(tmp_path / "kept"))
    assert figure.data["rows"][0] == "reference: red star on mint.png" and "block." in figure.caption
    assert [len(row) for row in figure.data["images"]] == [1, 8, 2] and len(figure.data["cols"]) == 8
    first = read_image(EXAMPLES / values["first"][1])[0]
    assert np.array_equal(figure.data["images"][1][1], first)
    assert figures.to_bytes(figure, "svg").startswith(b"<?xml")


def test_a_large_picture_is_kept_small_and_what_is_no_image_is_left_out(session: Any, tmp_path: Path) -> None:
    Image.new("RGB", (900, 300), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    asked = {"images": (str(tmp_path),), "text": "red", "components": ("block.5.mlp",)}
    found = session.run(Recipe("retrieve-images", "atlas-clip", asked)).result
    assert found.arrays["score"].axis("image").labels == ("blue.png", "wide.png")
    sizes = {found.images[n].shape for n in ("first-1", "first-2")}
    assert sizes == {(53, 160, 3), (64, 64, 3)} and found.values["last"] == []
    (said,) = found.values["warnings"]
    assert said.startswith("1 of 3 files are left out. ") and "cut.png is broken or cut short" in said
    assert found.values["finding"].endswith(").")  # two images have no rank correlation


def test_the_reference_file_is_part_of_what_was_read(tmp_path: Path) -> None:
    picture_folder(tmp_path / "pictures", 2)
    one, two = picture_folder(tmp_path / "others", 2, seed=5)
    seen = {
        files_read(Inputs(images=(str(tmp_path / "pictures"),), like=str(like)), Params())
        for like in (one, two)
    }
    one.write_bytes(two.read_bytes())
    seen.add(files_read(Inputs(images=(str(tmp_path / "pictures"),), like=str(one)), Params()))
    assert len(seen) == 2


def test_images_that_get_the_same_have_no_order() -> None:
    rng = np.random.default_rng(0)
    total = rng.normal(size=(5, 3))
    with pytest.raises(RequestError, match="add the same to all images, so they order none"):
        likeness(np.ones((5, 3)), total[0], 1.0)
    with pytest.raises(RequestError, match="what they add to the mean image, so it is like none"):
        likeness(total, total.mean(0), 1.0)
    still = likeness(np.concatenate([total, total.mean(0)[None]]), total[0], 1.0)
    assert still[-1] == 0 and still[0] == pytest.approx(1)


def test_refusals(session: Any, tmp_path: Path) -> None:
    picture_folder(tmp_path / "two", 2)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    here, usual = str(tmp_path / "two"), {"components": ("block.0.mlp",)}
    like, mixed = str(EXAMPLES / "red star on mint.png"), str(tmp_path / "broken")
    for asked, sentence in (
        (usual, "What orders the images. Give a --text, or with --like an image"),
        (usual | {"text": "red", "like": like}, "one of the two"),
        (usual | {"text": "  "}, "What orders the images"),
        (usual | {"like": here}, "--like: .* holds several images; name one"),
        (usual | {"like": "/nowhere"}, "--like: there is no file or folder '/nowhere'"),
        ({"text": "red"}, "Through which components. Name --components, or give a --feature"),
        ({"text": "red", "top": 3}, "Through which components"),
        (usual | {"text": "red", "feature": "colour", "top": 2}, "give one of them"),
        ({"text": "red", "feature": "colour", "features": ("a", "b")}, "is none of the --features a, b"),
        ({"text": "red", "components": ("block.99.mlp",)}, "'block.99.mlp' is no component of atlas-clip"),
        ({"text": "red", "components": ("norm.bias",)}, "'norm.bias' is no component of atlas-clip; it has "),
        (usual | {"text": "red", "aligner": "/nowhere"}, "--aligner: there is no file"),
        (usual | {"text": "red", "images": (mixed,)}, "None of the 1 images can be read. .*a.png is not an"),
        (usual | {"like": like, "images": (like,)}, "at least two images that can be read; there is one"),
    ):
        with pytest.raises(RequestError, match=sentence):
            session.run(Recipe("retrieve-images", "atlas-clip", {"images": (here,)} | asked))
    with pytest.raises(RequestError, match="has no texts of its own; give --clip and the --aligner"):
        session.run(Recipe("retrieve-images", "atlas-vit", {"images": (here,), "text": "red"} | usual))


def test_too_many_images_to_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from studio.methods import component_retrieval

    monkeypatch.setattr(component_retrieval, "MOST_VALUES", 100)
    picture_folder(tmp_path, 3)
    inputs = Inputs(images=(str(tmp_path),), like=str(tmp_path / "0000.png"))
    with pytest.raises(RequestError, match="Comparing 3 images would hold 288 numbers, and at most 100"):
        retrieve_images(
            families.model("vit-class"), inputs, Params(components=("embedding",)), (), None, Quiet()
        )

"""A person's own images in the Localize panel: kept by their set, never by a path that the page names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from panels.localize_images import LABEL, OwnImages
from studio.errors import RequestError
from studio.types import Recipe


@pytest.fixture
def own(session: Any) -> OwnImages:
    """The handlers, of a form whose components are names."""
    names = {n: n for n in ("own_images", "image_set")}
    return OwnImages(session, names, {"status": "status"})


def test_uploaded_images_are_a_recipes(own: OwnImages, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (8, 8), "red" if name[0] == "a" else "blue").save(tmp_path / name)
    (tmp_path / "c.txt").write_text("no image")
    found, _, said = own.keep([str(tmp_path / n) for n in ("a.png", "b.jpg", "c.txt")])
    (folder,) = own.asked(found)
    assert said == "2 images of the concept." and {f.name for f in Path(folder).iterdir()} == {
        "a.png",
        "b.jpg",
    }
    back = own.restored(Recipe("attribute", "m", {"images": [folder]}))
    assert (
        back["image_set"]["value"] == found and back["own_images"]["label"] == f"{LABEL}: those of this run"
    )
    assert own.keep(None)[0] == own.keep([])[0] == ""
    assert own.asked("") is None and own.asked(None) is None


@pytest.mark.parametrize("named", [[], ["/etc"], ["0" * 32], ["a", "b"], None])
def test_images_that_are_not_kept_are_not_restored(own: OwnImages, named: Any) -> None:
    back = own.restored(Recipe("attribute", "m", {"images": named}))
    assert back["image_set"]["value"] == "" and back["own_images"]["label"] == LABEL


@pytest.mark.parametrize("named", ["/etc", "..", "0" * 32, "../uploads"])
def test_a_page_names_no_folder(own: OwnImages, named: str) -> None:
    with pytest.raises(RequestError, match="no longer kept; choose them again"):
        own.asked(named)


def test_files_that_are_no_images(own: OwnImages, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("no image")
    found, _, said = own.keep([str(tmp_path / "c.txt")])
    assert found == "" and said.startswith("None of these files is an image; images end in ")

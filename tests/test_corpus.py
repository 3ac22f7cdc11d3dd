"""Statistics of components over a folder: the same numbers as from all vectors at once, resumed, cached."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from studio.errors import Cancelled, RequestError
from studio.file_quota import keep_within, mark_used
from studio.images import read_image
from studio.models import corpus
from studio.models.component_space import Space, open_space
from studio.models.corpus import corpus_file, statistics
from tests import vision_families as families
from tests.vision_corpora import Quiet, picture_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return picture_folder(tmp_path / "pictures", 20)


@pytest.mark.parametrize("name", ["vit-class", "swin", "timm-siglip"])
def test_statistics_equal_those_of_all_vectors_at_once(name: str, files: list[Path]) -> None:
    model = families.model(name)
    space = Space(model)
    found = statistics(space, files, Quiet(rows=7))
    parts = space.whole.run(model.pixels([read_image(f)[0] for f in files]))
    z = parts.representation.double().numpy()
    assert found.count == 20 and found.skipped == 0 and set(found.means) == set(parts.components)
    assert np.allclose(found.total_mean, z.mean(0), atol=1e-5)
    assert np.allclose(found.total_covariance, np.cov(z.T, bias=True), rtol=1e-4, atol=1e-6)
    scale = np.abs(z).max()
    for label, vector in parts.components.items():
        c, matrix = vector.double().numpy(), space.matrix(label)
        assert np.abs(found.mean(space, label) - c.mean(0)).max() < 1e-5 * scale
        spread = matrix.T @ found.covariances[label] @ matrix
        assert np.abs(spread - np.cov(c.T, bias=True)).max() < 1e-5 * scale**2
        cross = (c - c.mean(0)).T @ (z - z.mean(0)) / len(z)
        assert np.abs(matrix.T @ found.crosses[label] - cross).max() < 1e-5 * scale**2


def test_work_that_was_stopped_goes_on(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(families.model("vit-class"))
    with pytest.raises(Cancelled):
        statistics(space, files, Quiet(rows=4, stop_after=8))
    seen: list[int] = []
    run = space.whole.run
    monkeypatch.setattr(space.whole, "run", lambda pixels: seen.append(len(pixels)) or run(pixels))
    resumed = statistics(space, files, Quiet(rows=4))
    assert sum(seen) == 12  # not the 8 that were kept
    again = statistics(space, files, Quiet(rows=4))
    assert sum(seen) == 12 and np.array_equal(again.total_covariance, resumed.total_covariance)
    corpus_file(space, files, None).unlink()
    whole = statistics(space, files, Quiet(rows=4))
    for label, spread in whole.covariances.items():
        assert np.allclose(resumed.covariances[label], spread, rtol=1e-12, atol=1e-14)


def test_what_is_kept_does_not_grow_with_the_images(files: list[Path]) -> None:
    space = Space(families.model("vit-class"))
    statistics(space, files[:5], Quiet())
    statistics(space, files, Quiet())
    sizes = [corpus_file(space, found, None).stat().st_size for found in (files[:5], files)]
    assert abs(sizes[0] - sizes[1]) < 64


def test_the_place_depends_on_files_weights_and_aligner(files: list[Path], tmp_path: Path) -> None:
    space = Space(families.model("vit-class"))
    aligner = tmp_path / "a.safetensors"
    aligner.write_bytes(b"1")
    places = [corpus_file(space, files, None), corpus_file(space, files[1:], None)]
    places += [corpus_file(Space(families.model("dino")), files, None), corpus_file(space, files, aligner)]
    aligner.write_bytes(b"2")
    places.append(corpus_file(space, files, aligner))
    os.utime(files[3], ns=(5, 5))
    places.append(corpus_file(space, files, None))
    assert len(set(places)) == len(places)


def test_a_damaged_file_is_made_anew(files: list[Path]) -> None:
    space = Space(families.model("vit-class"))
    first = statistics(space, files, Quiet())
    corpus_file(space, files, None).write_bytes(b"no tensors")
    assert np.array_equal(statistics(space, files, Quiet()).total_mean, first.total_mean)


def test_corpora_that_were_not_used_for_longest_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space(families.model("vit-class"))
    sets = [picture_folder(tmp_path / name, 3, seed) for seed, name in enumerate("abcd")]
    places = [corpus_file(space, files, None) for files in sets]
    for age, (files, place) in enumerate(zip(sets[:3], places, strict=False)):
        statistics(space, files, Quiet())
        os.utime(place, (1000 + age, 1000 + age))
    statistics(space, sets[0], Quiet())  # from disk: used last
    size = places[0].stat().st_size
    monkeypatch.setattr(corpus, "MOST_BYTES", 2 * size + size // 2)
    statistics(space, sets[3], Quiet())
    assert [p.exists() for p in places] == [True, False, False, True]
    monkeypatch.setattr(corpus, "MOST_BYTES", 10)  # the one at work stays whatever its size
    statistics(space, sets[1], Quiet())
    assert [p.exists() for p in places] == [False, True, False, False]


def test_what_is_being_written_and_folders_are_no_part_of_a_quota(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in (".partial-1-x", "old", "new"):
        (tmp_path / name).write_bytes(b"x" * 100)
    os.utime(tmp_path / "old", (5, 5))
    assert keep_within(tmp_path, 150, tmp_path / "gone") == 1
    assert {p.name for p in tmp_path.iterdir()} == {".partial-1-x", "new", "folder"}
    mark_used(tmp_path / "gone")  # nothing happens
    assert keep_within(tmp_path / "nowhere", 0, tmp_path / "gone") == 0


def test_files_that_are_no_images_are_left_out(files: list[Path]) -> None:
    files[4].write_bytes(b"no image")
    report = Quiet()
    found = statistics(Space(families.model("vit-class")), files, report)
    assert found.count == 19 and found.skipped == 1
    assert report.warnings == ["1 of 20 files could not be read as images and are left out."]


def test_refusals(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(families.model("vit-class"))
    with pytest.raises(RequestError, match="need at least two images that can be read; there is 1"):
        statistics(space, files[:1], Quiet())
    with pytest.raises(RequestError, match="can't be read"):
        statistics(space, [files[0].with_name("gone.png")], Quiet())
    monkeypatch.setattr(corpus, "MOST_NUMBERS", 100)
    with pytest.raises(RequestError, match="numbers, and at most 100 are kept; take a smaller model"):
        statistics(space, files, Quiet())


def test_a_model_without_texts_needs_an_aligner() -> None:
    plain, clip = families.model("vit-class"), families.model("hf-clip")
    with pytest.raises(RequestError, match="has no texts of its own; give --clip and the --aligner"):
        open_space(plain, None, None)
    with pytest.raises(RequestError, match="do not share a space; give the --aligner"):
        open_space(plain, clip.clip, None)
    with pytest.raises(RequestError, match="say which with --clip"):
        open_space(plain, None, "some.safetensors")
    assert open_space(clip, None, None)[1] is clip.clip

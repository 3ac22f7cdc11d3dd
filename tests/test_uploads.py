"""Images put into the page: kept by content, named plainly, bounded, swept; no id leads out of the store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio import uploads
from studio.errors import RequestError, StudioError
from studio.images import image_files
from studio.store import Store
from studio.uploads import MONTH, Uploads


@pytest.fixture
def kept(tmp_path: Path) -> Uploads:
    return Uploads(Store(tmp_path / "runs"))


def picture(folder: Path, name: str, value: int = 0) -> Path:
    """A small image of one grey."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(folder / name)
    return folder / name


def names(kept: Uploads, found: str) -> list[str]:
    return sorted(f.name for f in kept.folder(found).iterdir())


def age(folder: Path, seconds: float) -> None:
    """Makes a set look last used so long ago."""
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_the_same_images_are_the_same_set_and_outlive_their_upload(kept: Uploads, tmp_path: Path) -> None:
    one, two = picture(tmp_path / "a", "one.png", 1), picture(tmp_path / "a", "two.png", 2)
    first = kept.keep([one, two])
    again = kept.keep([two, one])
    assert first == again and names(kept, first) == ["one.png", "two.png"]
    content = one.read_bytes()
    one.unlink()
    assert (kept.folder(first) / "one.png").read_bytes() == content
    assert image_files([str(kept.folder(first))])[0] == sorted(kept.folder(first).iterdir())
    assert kept.keep([two]) != first


def test_names_are_plain_and_differ_and_equal_contents_are_kept_once(kept: Uploads, tmp_path: Path) -> None:
    files = [picture(tmp_path / str(i), f"{i}.png", i) for i in range(6)]
    given = ["../../etc/a<b>.png", "A_B_.PNG", ".hidden.png", "no ending", "ünï.jpeg", "…/same.png"]
    found = names(kept, kept.keep([*files, files[5]], [*given, "twice.png"]))
    plain = ["A_B_ (2).PNG", "a_b_.png", "hidden.png", "no ending.png", "same.png", "ünï.jpeg"]
    assert found == sorted(plain)


def test_sets_share_their_files(kept: Uploads, tmp_path: Path) -> None:
    first = kept.folder(kept.keep([picture(tmp_path / "a", "one.png", 1)]))
    second = kept.folder(kept.keep([first / "one.png", picture(tmp_path / "a", "two.png", 2)]))
    assert (first / "one.png").samefile(second / "one.png")


def test_no_images_and_too_many_are_refused(
    kept: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="No images are given; choose some"):
        kept.keep([])
    monkeypatch.setattr(uploads, "MOST_FILES", 1)
    files = [picture(tmp_path, f"{i}.png", i) for i in range(2)]
    with pytest.raises(RequestError, match="2 images are more than the page takes"):
        kept.keep(files)
    with pytest.raises(RequestError, match=r"gone\.png can't be read \(No such file"):
        kept.keep([tmp_path / "gone.png"])


def test_a_store_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StudioError, match="The images could not be kept: .*; free some disk"):
        Uploads(Store(tmp_path / "runs")).keep([picture(tmp_path / "a", "one.png")])


@pytest.mark.parametrize(
    "wrong", ["", "..", "../runs", "/etc", "0" * 31, "0" * 32, "A" * 32, "0" * 32 + "\n"]
)
def test_no_id_leads_anywhere_else(kept: Uploads, tmp_path: Path, wrong: str) -> None:
    kept.keep([picture(tmp_path / "a", "one.png")])
    with pytest.raises(RequestError, match="These images are no longer kept; choose them again"):
        kept.folder(wrong)


def test_a_link_is_no_set(kept: Uploads, tmp_path: Path) -> None:
    kept.keep([picture(tmp_path / "a", "one.png")])
    (kept.root / ("f" * 32)).symlink_to(tmp_path / "a")
    with pytest.raises(RequestError, match="no longer kept"):
        kept.folder("f" * 32)
    assert kept.sweep(older=-1) == 1 and (tmp_path / "a" / "one.png").exists()


def test_the_least_recently_used_make_room(
    kept: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST", 3)
    sets = [kept.keep([picture(tmp_path, f"{i}.png", i)]) for i in range(3)]
    for i, found in enumerate(sets):
        age(kept.root / found, 100 - i)
    kept.folder(sets[0])  # it is used again
    sets.append(kept.keep([picture(tmp_path, "new.png", 9)]))
    assert {f.name for f in kept.root.iterdir()} == {sets[0], sets[2], sets[3]}
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    last = kept.keep([picture(tmp_path, "large.png", 10)])
    assert [f.name for f in kept.root.iterdir()] == [last]


def test_sets_that_were_not_used_for_a_month_are_swept(kept: Uploads, tmp_path: Path) -> None:
    old, young = (kept.keep([picture(tmp_path, f"{i}.png", i)]) for i in range(2))
    age(kept.root / old, MONTH + 60)
    age(kept.root / young, MONTH - 60)
    assert kept.sweep() == 1
    assert [f.name for f in kept.root.iterdir()] == [young]


def test_nothing_half_written_stays(kept: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uploads.shutil, "copyfile", full)
    with pytest.raises(StudioError, match="could not be kept: the disk is full; free some disk"):
        kept.keep([picture(tmp_path / "a", "one.png")])
    assert [f.name for f in (tmp_path / "runs").rglob("*")] == ["uploads"]

"""Images from files and folders: every odd file is read right or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio.errors import RequestError
from studio.images import digest, image_files, labels, read_image

RED, BLUE = (200, 30, 40), (20, 60, 220)


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    return Image.fromarray(pixels)


def said(file: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(RequestError) as caught:
        read_image(file)
    text = str(caught.value)
    assert str(file) in text and text.endswith(".") and "\n" not in text and len(text) < 400
    return text


def near(found: np.ndarray, colour: tuple[int, int, int], slack: int = 12) -> bool:
    return bool((np.abs(found.astype(int) - colour) <= slack).all())


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif"])
def test_plain_images(tmp_path: Path, ending: str) -> None:
    picture(32, 16).save(tmp_path / f"a.{ending}")
    pixels, note = read_image(tmp_path / f"a.{ending}")
    assert pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8 and note == ""
    assert near(pixels[8, 4], RED, 25) and near(pixels[8, 28], BLUE, 25)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    picture(32, 16).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(read_image(tmp_path / "a.jpg")[0][8, 4], RED, 30)


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32896, 65535]] * 4, np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        pixels, _ = read_image(tmp_path / name)
        assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    assert "floating numbers" in said(tmp_path / "a.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "b.tif")
    assert "32-bit numbers" in said(tmp_path / "b.tif")


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, BLUE, RED)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    pixels, note = read_image(tmp_path / "a.gif")
    assert near(pixels, RED) and note == "a.gif is animated (3 frames); the first was taken."


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[list(RED)]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left side becomes the top
    picture(32, 16).save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = read_image(tmp_path / "a.jpg")
    assert pixels.shape == (32, 16, 3) and near(pixels[4, 8], RED, 25) and near(pixels[28, 8], BLUE, 25)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    image.putpixel((0, 0), (*RED, 255))
    image.save(tmp_path / "a.png")
    pixels, _ = read_image(tmp_path / "a.png")
    assert near(pixels[0, 0], RED, 0) and near(pixels[3, 3], (255, 255, 255), 0)
    grey = Image.new("P", (4, 4), 1)
    grey.putpalette([255, 0, 0, 0, 0, 255])
    grey.save(tmp_path / "b.png", transparency=1)
    assert near(read_image(tmp_path / "b.png")[0], (255, 255, 255), 0)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda f: f.write_text("no image at all"), "not an image"),
    "empty": (lambda f: f.write_bytes(b""), "not an image"),
    "cut": (lambda f: (picture(64, 64).save(f), f.write_bytes(f.read_bytes()[:120])), "broken or cut short"),
    "hair": (lambda f: picture(500, 2).save(f), "500 x 2"),
    "huge": (lambda f: Image.new("1", (20_000, 20_000)).save(f), "more than 89,478,485 pixels"),
}


@pytest.mark.parametrize(("make", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_read_is_said(tmp_path: Path, make: Callable, reason: str) -> None:
    make(tmp_path / "a.png")
    assert reason in said(tmp_path / "a.png")


def test_a_cut_jpeg(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    assert "broken or cut short" in said(tmp_path / "a.jpg")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is empty; images end in .avif"):
        image_files([str(tmp_path)])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    with pytest.raises(RequestError, match="holds 1 file, none of them an image; images end in"):
        image_files([str(tmp_path)])
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "1.jpg", "b/1.png"):
        (tmp_path / name).write_bytes(b"")
    files, others = image_files([str(tmp_path), str(tmp_path / "1.jpg")])
    assert [f.relative_to(tmp_path).as_posix() for f in files] == ["1.jpg", "b/1.png", "b/2.PNG", "1.jpg"]
    assert others == 1


@pytest.mark.parametrize("name", ["nothing.png", "x" * 5000, "a\0b"])
def test_a_missing_file_is_said(name: str) -> None:
    with pytest.raises(RequestError, match="no file or folder"):
        image_files([name])


def test_labels_tell_files_apart() -> None:
    assert labels([Path("a/1.png"), Path("a/2.png")]) == ("1.png", "2.png")
    assert labels([Path("a/1.png"), Path("b/1.png")]) == ("a/1.png", "b/1.png")
    assert labels([Path("a/1.png"), Path("a/1.png")]) == ("1.png", "1.png (2)")


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"a"), second.write_bytes(b"b")
    before = digest([first, second])
    assert before != digest([second, first]) and before == digest([first, second])
    second.write_bytes(b"c")
    assert before != digest([first, second])
    with pytest.raises(RequestError, match="can't be read"):
        digest([tmp_path / "3"])

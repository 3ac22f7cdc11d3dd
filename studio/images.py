"""Images from files and folders, for every method that looks at images: RGB, upright, and never in silence.

What is done: EXIF rotation is applied, CMYK and palettes are converted, 16-bit grey is scaled to 8 bits,
transparency is laid on white, and of an animation the first frame is taken (said in a warning). What can't be
read is refused in a sentence with the file's name.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from studio.errors import RequestError

ENDINGS = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .avif .jp2".split())
MOST_UNEQUAL = 100  # longest side by shortest: models resize the shortest, so a hair would become a carpet
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, TypeError, zlib.error)


def image_files(given: Sequence[str], option: str = "--images") -> tuple[list[Path], int]:
    """(the image files of these files and folders in order, how many other files the folders hold).

    A folder stands for all images below it, by name. RequestError for what does not exist and for a folder
    without images.
    """
    files: list[Path] = []
    others = 0
    for text in given:
        path = Path(text).expanduser()
        try:
            exists, folder = path.exists(), path.is_dir()
        except (OSError, ValueError):  # a name that is too long, or holds a null byte
            exists = folder = False
        if not exists:
            raise RequestError(f"{option}: there is no file or folder {text[:120]!r}.")
        if not folder and not path.is_file():
            raise RequestError(f"{option}: {text[:120]!r} is no file but a device or a pipe.")
        if not folder:
            files.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        images = [p for p in below if p.suffix.lower() in ENDINGS]
        if not images:
            many = f"holds {len(below):,} file{'s' * (len(below) > 1)}, none of them an image"
            raise RequestError(
                f"{option}: the folder {text[:120]} {many if below else 'is empty'}; images end in "
                f"{', '.join(sorted(ENDINGS))}."
            )
        files += images
        others += len(below) - len(images)
    return files, others


def labels(files: Sequence[Path]) -> tuple[str, ...]:
    """A name for each file: its own, with as many folders before it as tell all apart; a file that is given
    twice is numbered."""
    for parts in range(1, 1 + max((len(f.parts) for f in files), default=1)):
        names = ["/".join(f.parts[-parts:]) for f in files]
        if len(set(names)) == len(set(files)):
            break
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return tuple(found)


def read_images(files: Sequence[Path], warn: Callable[[str], None]) -> list[np.ndarray]:
    """Images (H, W, 3) uint8 of files; what was left out of one is said through `warn`."""
    found = []
    for file in files:
        pixels, note = read_image(file)
        found.append(pixels)
        if note:
            warn(note)
    return found


def read_image(file: Path) -> tuple[np.ndarray, str]:
    """((H, W, 3) uint8, a sentence on what was left out, "" if nothing). RequestError says why it can't."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # damaged EXIF, odd transparency
            with Image.open(file) as opened:
                frames = getattr(opened, "n_frames", 1)
                _sides(file, opened.size)
                opened.load()
                pixels = np.ascontiguousarray(_eight_bits(file, opened))
    except UnidentifiedImageError as error:
        raise RequestError(f"{file} is not an image that Locus can read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = Image.MAX_IMAGE_PIXELS or 0
        raise RequestError(f"{file} has more than {most:,} pixels; scale it down first.") from error
    except MemoryError as error:
        raise RequestError(f"{file} is too large for this machine's memory; scale it down first.") from error
    except _BROKEN as error:
        first = " ".join(str(error).split())[:100]
        raise RequestError(f"{file} is broken or cut short ({first}); copy it again.") from error
    note = f"{file.name} is animated ({frames} frames); the first was taken." if frames > 1 else ""
    return pixels, note


def _sides(file: Path, size: tuple[int, int]) -> None:
    """Refuses what no model's preprocessing can turn into a square."""
    if min(size) < 1 or max(size) > MOST_UNEQUAL * min(size):
        raise RequestError(
            f"{file} is {size[0]} x {size[1]}; its sides must not differ by more than {MOST_UNEQUAL} times."
        )


def _eight_bits(file: Path, image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise RequestError(
            f"{file} holds {image.mode == 'F' and 'floating' or '32-bit'} numbers whose range it does not "
            "say; save it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def digest(files: Sequence[Path]) -> str:
    """SHA-256 over the files' contents in order."""
    found = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise RequestError(f"{file} can't be read ({error.strerror}).") from error
    return found.hexdigest()

"""Images that a person put into the page, kept in the store by their content, so that a run replays.

A set is a folder uploads/ID below the store, ID being a hash of its files' names and contents: the same
images are the same set, and a recipe names one folder. Sets share their files by hard links. The last used
ones stay, within MOST sets and MOST_BYTES; a set in use is never the first to go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from studio.disk import half_written, reason
from studio.errors import RequestError, StudioError
from studio.images import ENDINGS
from studio.store import Store

MOST = 256  # sets
MOST_BYTES = 8 * 2**30
MOST_FILES = 20_000  # of one set
DAY = 24 * 3600.0
MONTH = 30 * 24 * 3600.0
_ID = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """The sets of images of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store.root
        self.root = store.root / "uploads"

    def keep(self, files: Sequence[Path], names: Sequence[str] = ()) -> str:
        """Keeps copies of image files as a set and returns its id; `names` (default: the files' own) are made
        plain and different from each other, and a content that is there twice is kept once.

        RequestError when there is none, there are too many, or one can't be read.
        """
        if not files:
            raise RequestError("No images are given; choose some, or take an example.")
        if len(files) > MOST_FILES:
            raise RequestError(
                f"{len(files):,} images are more than the page takes ({MOST_FILES:,}); use `locus` in a "
                "terminal, which reads a folder where it is."
            )
        by_content: dict[str, tuple[Path, str]] = {}
        for file, name in zip(files, names or [f.name for f in files], strict=True):
            by_content.setdefault(_hash(file), (file, name))
        wanted = dict(zip(_plain([n for _, n in by_content.values()]), by_content.items(), strict=True))
        listing = "\n".join(f"{name}\0{digest}" for name, (digest, _) in sorted(wanted.items()))
        found = hashlib.sha256(listing.encode()).hexdigest()[:32]
        if (self.root / found).is_dir():
            _use(self.root / found)
            return found
        self._write(found, {name: file for name, (_, (file, _)) in wanted.items()})
        self._bound(found)
        return found

    def folder(self, set_id: str) -> Path:
        """The folder of a set; RequestError when there is none."""
        folder = self.root / str(set_id)
        if not _ID.fullmatch(str(set_id)) or not folder.is_dir() or folder.is_symlink():
            raise RequestError("These images are no longer kept; choose them again.")
        _use(folder)
        return folder

    def sweep(self, older: float = MONTH) -> int:
        """Removes sets that were not used for so many seconds; returns how many."""
        return self._remove(f for f in self._sets() if time.time() - _used(f) > older)

    def sets(self) -> dict[str, float]:
        """{id of a set: when it was last used, in seconds}, the last used first."""
        return {folder.name: _used(folder) for folder in self._sets()}

    def remove(self, set_id: str, older: float = DAY) -> bool:
        """Removes a set that was not used for so many seconds; whether it is gone."""
        folder = self.root / set_id
        if folder not in self._sets() or time.time() - _used(folder) <= older:
            return not folder.exists()
        return self._remove([folder]) == 1

    def _write(self, found: str, files: dict[str, Path]) -> None:
        """The set beside its place, then renamed."""
        beside = self._store / half_written(f"{secrets.token_hex(4)}-upload")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            beside.mkdir()
            for name, file in files.items():
                _place(file, beside / name, share=self.root in file.parents)
            with contextlib.suppress(FileExistsError):  # another page was quicker
                beside.rename(self.root / found)
        except OSError as error:
            if (self.root / found).is_dir():
                return
            raise StudioError(
                f"The images could not be kept: {reason(error)}; free some disk, or name another store "
                "with --runs."
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _sets(self) -> list[Path]:
        """The sets' folders, the last used first."""
        found = [f for f in self.root.glob("*") if _ID.fullmatch(f.name) and not f.is_symlink()]
        return sorted(found, key=_used, reverse=True)

    def _bound(self, newest: str) -> None:
        """The least recently used sets make room; the newest stays whatever its size."""
        room, doomed = MOST_BYTES, []
        sets = sorted(self._sets(), key=lambda f: f.name != newest)
        for n, folder in enumerate(sets):
            room -= sum(_share(f) for f in folder.iterdir())
            if n and (n >= MOST or room < 0):
                doomed.append(folder)
        self._remove(doomed)

    def _remove(self, folders: Iterable[Path]) -> int:
        gone = list(folders)
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        return sum(not folder.exists() for folder in gone)


def _hash(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{file.name[:80]} can't be read ({error.strerror}).") from error


def _plain(names: Sequence[str]) -> list[str]:
    """File names without folders, odd characters and repetitions (upper and lower case are one), that end
    like an image."""
    found: dict[str, str] = {}
    for given in names:
        path = Path(re.sub(r"[^\w .()+-]", "_", Path(given).name)[-120:].lstrip(". ") or "image")
        suffix = path.suffix if path.suffix.lower() in ENDINGS else ".png"
        name, n = f"{path.stem}{suffix}", 1
        while name.lower() in found:
            n += 1
            name = f"{path.stem} ({n}){suffix}"
        found[name.lower()] = name
    return list(found.values())


def _place(file: Path, target: Path, *, share: bool) -> None:
    """A hard link to a file of another set, else a copy."""
    if share:
        with contextlib.suppress(OSError):  # some file systems have none
            os.link(file, target)
            return
    shutil.copyfile(file, target)


def _share(file: Path) -> float:
    """The bytes that a set alone answers for."""
    try:
        found = file.stat()
    except OSError:
        return 0.0
    return found.st_size / max(found.st_nlink, 1)


def _use(folder: Path) -> None:
    """Notes that a set was used now; on a store that can't be written it is used all the same."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _used(folder: Path) -> float:
    """When a set was last used, in seconds; 0 when it is gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0

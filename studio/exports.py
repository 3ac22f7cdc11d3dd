"""What leaves the store: copies to download, each in a temporary folder that is deleted when it is old, and
pipeline folders for other programs.

The web server copies what it offers, so a folder is needed for as long as its request lasts.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from studio.disk import HIDDEN, half_written, left_behind, reason
from studio.errors import StudioError

_PREFIX = "locus-export-"
_PAGE = "locus-page-"
DAY = 24 * 3600.0
MOST = 32  # folders that are kept, of all studios of this person


def new_folder() -> Path:
    """An empty temporary folder for one export; the oldest ones make room, so that MOST are left. StudioError
    when there is no room for one."""
    made = _made(_PREFIX)
    _remove([p for p in _folders() if p != made][MOST - 1 :])  # times may tie
    return made


def page_folder() -> Path:
    """An empty temporary folder for what a page shows; it goes when this process ends, unless it is
    killed. StudioError when there is no room for one."""
    made = _made(_PAGE + half_written("").removeprefix(HIDDEN))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def sweep_broken_uploads(folder: Path, older: float = 3600.0) -> int:
    """Removes what uploads that broke off have left in a page's folder, once nothing was written to it for so
    many seconds; returns how many files."""
    gone = 0
    for part in folder.glob("tmp*"):
        with contextlib.suppress(OSError):
            found = part.lstat()
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > older:
                part.unlink()
                gone += 1
    return gone


def _made(prefix: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        place, why = tempfile.tempdir or "The temporary folder", reason(error, "it")
        raise StudioError(
            f"{place} takes no file to download ({why}); make room there, or start with TMPDIR=FOLDER."
        ) from error


def sweep(older: float = DAY) -> int:
    """Removes export folders that nothing was written to for so many seconds, and those of pages whose
    process was killed; returns how many."""
    pages = Path(tempfile.gettempdir()).glob(f"{_PAGE}*")
    orphans = [p for p in pages if left_behind(p.with_name(HIDDEN + p.name.removeprefix(_PAGE)))]
    return _remove([*orphans, *(p for p in _folders() if time.time() - _changed(p) > older)])


def _folders() -> list[Path]:
    """Export folders that are there, the newest first. Links are none of them."""
    found = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    return sorted((p for p in found if _changed(p) > 0), key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    """When something was last put into a folder, in seconds; 0 for what is gone or no folder."""
    try:
        found = folder.lstat()
    except OSError:  # another studio removed it meanwhile
        return 0.0
    return found.st_mtime if stat.S_ISDIR(found.st_mode) else 0.0


def _remove(folders: Iterable[Path]) -> int:
    """Removes folders; how many of them are gone. Those of another person can't be, and stay."""
    doomed = list(folders)
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)
    return sum(not folder.exists() for folder in doomed)


def to_zip(
    folder: Path,
    target: Path,
    *,
    packed: bool = True,
    also: Mapping[str, Path] = MappingProxyType({}),
    only: Sequence[Path] | None = None,
) -> Path:
    """The whole folder, or `only` these files of it, as a zip file at `target`, with the files of `also` by
    their names in the zip; not `packed`: as it is, for what can't be made smaller. StudioError when it can't
    be written."""
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as out:
            for file in sorted(folder.rglob("*")) if only is None else only:
                if file.is_file():
                    out.write(file, Path(folder.name) / file.relative_to(folder))
            for name, file in also.items():
                out.write(file, Path(folder.name) / name)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise StudioError(f"{target} could not be written: {reason(error, 'the folder')}.") from error
    return target


def zipped(folder: Path) -> Path:
    """The folder as a zip file beside it, in its place; nothing is packed, since weights can't be."""
    target = to_zip(folder, folder.with_suffix(".zip"), packed=False)
    shutil.rmtree(folder)
    return target


def write_file(path: Path, content: bytes) -> None:
    """Writes one file beside its place and renames it, in the place of an older one; StudioError when that
    fails."""
    beside = path.absolute().parent / half_written(path.name)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise StudioError(f"{path} could not be written: {reason(error, 'the folder')}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which is renamed to it when all is written and is gone otherwise;
    StudioError when that fails."""
    beside = folder.absolute().parent / half_written(folder.name)
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(folder)
    except OSError as error:
        raise StudioError(f"{folder} could not be written: {reason(error, 'the folder')}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_pipeline(pipe: Any, folder: Path) -> None:
    """Writes a diffusers pipeline as a folder, beside its place first; StudioError when that fails."""
    beside = folder.absolute().parent / half_written(folder.name)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        pipe.save_pretrained(beside, safe_serialization=True)
        beside.rename(folder)
    except OSError as error:
        raise StudioError(
            f"The model could not be saved as {folder}: {reason(error, 'the folder')}."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)

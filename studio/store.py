"""Runs on disk, one folder each: written beside, then renamed, so that a run under its name is always whole.

The layout of a run folder is in the contract: run.json, arrays.npz, figure.*, images/.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from studio import figures
from studio.disk import HIDDEN, half_written, left_behind, reason
from studio.errors import RequestError, StudioError
from studio.kept_edits import KeptEdits
from studio.kept_edits import copy_file as copy_file
from studio.recipes import FORMAT, as_text, carried
from studio.run_record import check_record
from studio.types import Axis, Edit, Figure, Recipe, Result, Run, Trace

EDIT_FILE = "edit.safetensors"  # in the folder of a run that made an edit
MADE_FILE = "made.safetensors"  # in that of a run that made another file
IMPORTED = "imported"  # in the host of a run that came as a zip
QUOTA = 20 * 10**9
_TRIAL = 2**18  # bytes that are written to see whether a run can be
_NOT_YOURS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_PNG = (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82")  # how the file begins and ends
PARTS = ("run.json", "arrays.npz")  # what a folder holds that is a run, whole or damaged


class Store(KeptEdits):
    """The runs below one folder. Several studios may share it: every write is a rename."""

    def __init__(self, root: str | Path, quota: int = QUOTA) -> None:
        super().__init__(Path(root).expanduser())
        self.quota = quota  # bytes that its runs may take before somebody is told to prune

    def save(self, run: Run, figure: Figure | None = None) -> Run:
        """Writes the run under a new id and returns it with that id."""
        base = run_name(run)
        for attempt in range(1000):
            name = base if not attempt else f"{base}-{attempt + 1}"
            if not (self.root / name).exists():
                with contextlib.suppress(FileExistsError):
                    write_run(replace(run, id=name), self.root / name, figure)
                    return replace(run, id=name)
        raise StudioError(f"No free name for a run like {base} in {self.root}.")

    def check_writable(self) -> None:
        """StudioError when a run could not be kept now: it is tried, before hours go into one."""
        beside = self.root / half_written(f"try-{secrets.token_hex(4)}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(bytes(_TRIAL))
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)
        except OSError as error:
            raise StudioError(
                f"Nothing was run, since {self.root} could not keep it: {reason(error, 'that folder')}. Make "
                "room there (`locus prune` removes old runs), or name another store with --runs."
            ) from error

    def path(self, run_id: str) -> Path:
        """The folder of a run; RequestError when there is none, or the id is no plain name."""
        folder = self.folder(run_id)
        if not (folder / "run.json").is_file():
            raise RequestError(f"There is no run {run_id!r} in {self.root}.")
        return folder

    def folder(self, run_id: str) -> Path:
        """The folder of a run that may be damaged; RequestError when there is none."""
        if not re.fullmatch(r"[\w.-]{1,200}", run_id) or run_id.startswith("."):
            raise RequestError(f"{run_id[:60]!r} is no run's id.")
        if not any((self.root / run_id / name).is_file() for name in PARTS):
            raise RequestError(f"There is no run {run_id!r} in {self.root}.")
        return self.root / run_id

    def load(self, run_id: str) -> Run:
        """Reads a run by its id."""
        return read_run(self.path(run_id))

    def find(self, key: str, *, own: bool = False) -> Run | None:
        """The newest finished run with this key that is whole, its images too. `own`: no imported one, whose
        numbers somebody else vouches for."""
        folders = self.root.glob(f"*-{key[:8]}*")
        for folder in sorted(folders, key=lambda f: natural(f.name), reverse=True):
            with contextlib.suppress(StudioError, OSError):
                run = read_run(folder)
                if run.key != key or run.status != "done" or own and run.host.get(IMPORTED):
                    continue
                if (folder / "images").is_dir() and not damaged_images(folder):
                    return run
        return None

    def ids(self) -> list[str]:
        """Ids of all whole runs, newest first."""
        if not self.root.is_dir():
            return []
        names = (f.name for f in self.root.iterdir() if (f / "run.json").is_file())
        return sorted((n for n in names if not n.startswith(".")), key=natural, reverse=True)

    def sweep_leftovers(self) -> int:
        """Removes what processes that are gone left half-written, and passing edits that were not used for
        a day; returns how many of both."""
        gone = self.sweep_edits()
        if self.root.is_dir():
            for folder in self.root.glob(f"{HIDDEN}*"):
                if left_behind(folder):
                    with contextlib.suppress(OSError):
                        folder.unlink() if folder.is_file() else shutil.rmtree(folder)
                        gone += 1
        return gone


def natural(name: str) -> list[str | int]:
    """A key that sorts numbers in names by value: -10 after -2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def run_name(run: Run) -> str:
    """The id of a run in a store that has none like it."""
    return f"{re.sub(r'[^0-9]', '', run.started)[:14]}-{run.recipe.method}-{run.key[:8] or 'nokey'}"


def check_free(folder: Path) -> None:
    """RequestError when `folder` (the --out of a command) exists or could not be written."""
    try:
        taken = folder.exists() or folder.is_symlink()
    except OSError as error:
        raise RequestError(f"--out can't be {str(folder)[:80]!r}: {error.strerror}.") from error
    if taken:
        raise RequestError(
            f"{folder} exists already; give a folder that does not, so that nothing is overwritten."
        )
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryDirectory(dir=parent, prefix=half_written("try-")):
            pass  # tried, not asked: for root os.access says yes to everything
    except OSError as error:
        why = reason(error, "") if error.errno not in _NOT_YOURS else ""
        why = f"{parent} has no room, {why}" if why else f"{parent} is no folder that you may write to"
        raise RequestError(f"{folder} can't be written: {why}.") from error


def check_free_file(given: str, option: str, suffix: str) -> Path:
    """The file that `option` names, which must not exist yet and end in `suffix`; RequestError otherwise."""
    path = Path(os.path.expanduser(given))
    if path.suffix != suffix:
        raise RequestError(f"{option} must name a {suffix} file, not {given[:80]!r}.")
    if os.path.lexists(path):
        raise RequestError(f"{path} exists already; give another {option}, so that nothing is overwritten.")
    if not os.path.isdir(path.absolute().parent):
        raise RequestError(f"{option}: there is no folder {path.absolute().parent}; make it first.")
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=half_written("try-")):
            pass
    except OSError as error:
        raise RequestError(f"{path} can't be written: {reason(error, 'its folder')}.") from error
    return path


def write_run(run: Run, folder: Path, figure: Figure | None = None) -> None:
    """Writes a run folder beside its place and renames it; FileExistsError when the place is taken,
    StudioError on a full disk."""
    folder = Path(folder)
    beside = folder.parent / half_written(folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        _fill(run, beside, figure)
        if folder.exists():
            raise FileExistsError(folder)
        beside.rename(folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) or isinstance(error, FileExistsError):
            raise FileExistsError(folder) from error
        why = reason(error, "that folder")
        raise StudioError(f"The run could not be saved in {folder.parent}: {why}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _fill(run: Run, folder: Path, figure: Figure | None) -> None:
    record, note = as_record(run), carried(run)
    np.savez_compressed(folder / "arrays.npz", **{n: t.values for n, t in run.result.arrays.items()})
    (folder / "images").mkdir()
    for name, pixels in run.result.images.items():
        (folder / "images" / f"{name}.png").write_bytes(figures.image_bytes(pixels, as_text(note)))
    if run.result.edit is not None:
        write_edit(run.result.edit, folder / EDIT_FILE)
    if run.result.made is not None:
        write_tensors(run.result.made.tensors, run.result.made.note, folder / MADE_FILE)
    if figure is not None:
        for kind in figures.FORMATS:
            (folder / f"figure.{kind}").write_bytes(figures.to_bytes(figure, kind, note))
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")


def write_edit(edit: Edit, path: Path) -> None:
    """Writes an edit file (contract), beside its place first; StudioError when that fails."""
    note = {
        "locus.method": edit.method,
        "locus.base_fingerprint": edit.base_fingerprint,
        "locus.concepts": json.dumps(list(edit.concepts), ensure_ascii=False),
        "locus.replacements": json.dumps(list(edit.replacements), ensure_ascii=False),
        "locus.params": json.dumps(dict(edit.params), ensure_ascii=False),
    }
    write_tensors({n: np.ascontiguousarray(d, np.float32) for n, d in edit.deltas.items()}, note, path)


def write_tensors(tensors: Mapping[str, np.ndarray], note: Mapping[str, str], path: Path) -> None:
    """Writes a safetensors file of float tensors, beside its place first; StudioError when that fails.

    The library's own writer shuffles metadata, and the same edit would have another hash every time.
    """
    header, end = {"__metadata__": dict(note)}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind, shape = f"F{8 * tensor.itemsize}", list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    beside = path.parent / half_written(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as opened:
            opened.write(len(head).to_bytes(8, "little") + head)
            for tensor in tensors.values():
                opened.write(np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).data)
        beside.replace(path)
    except OSError as error:
        raise StudioError(f"{path} could not be saved: {reason(error, 'its folder')}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def as_record(run: Run) -> dict[str, Any]:
    """run.json's content."""
    arrays = {
        n: {"axes": [{"name": a.name, "labels": list(a.labels)} for a in t.axes], "unit": t.unit}
        for n, t in run.result.arrays.items()
    }
    return {
        "format": FORMAT,
        "recipe": run.recipe.as_dict() | {"key": run.key},
        "model": dict(run.model),
        "status": run.status,
        "started": run.started,
        "seconds": round(run.seconds, 3),
        "host": dict(run.host),
        "result": {"arrays": arrays, "values": _finite(run.result.values)},
        "error": run.error,
    }


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which strict JSON needs."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def damaged_images(folder: Path) -> list[Path]:
    """The images of a run folder that are cut short or are no PNG, as far as their ends tell; nothing is
    decoded."""
    return [file for file in sorted((folder / "images").glob("*.png")) if not _ends_whole(file)]


def _ends_whole(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_PNG[0]))
            opened.seek(max(file.stat().st_size - len(_PNG[1]), 0))
            return (start, opened.read()) == _PNG
    except OSError:
        return False


class Images(Mapping):
    """A run's images, read from its folder when they are asked for; RequestError for one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self._files = {f.stem: f for f in sorted(folder.glob("*.png"))}

    def __getitem__(self, name: str) -> np.ndarray:
        from PIL import Image

        file = self._files[name]
        try:
            with Image.open(file, formats=["PNG"]) as opened:
                return np.asarray(opened.convert("RGB"))
        except (*_DAMAGE, SyntaxError, Image.DecompressionBombError) as error:
            raise RequestError(
                f"The image {file.name} of the run {file.parent.parent.name} is damaged or gone; put a whole "
                "copy in its place, or delete the run and make it again (its numbers can still be read)."
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)  # what reading broken or foreign files raises


def read_run(folder: str | Path) -> Run:
    """Reads a run folder; RequestError says what is wrong with one that isn't whole."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        check_record(record, f"The run in {folder}")
        recipe, result = record["recipe"], record["result"]
        with (folder / "arrays.npz").open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays = {
                n: Trace(stored[n], tuple(Axis(a["name"], tuple(a["labels"])) for a in d["axes"]), d["unit"])
                for n, d in result["arrays"].items()
            }
        return Run(
            recipe=Recipe(
                recipe["method"],
                recipe["model"],
                recipe["inputs"],
                recipe["params"],
                tuple(recipe["seeds"]),
                tuple(recipe["edits"]),
            ),
            status=record["status"],
            started=record["started"],
            seconds=record["seconds"],
            host=record["host"],
            result=Result(arrays, result["values"], Images(folder / "images")),
            error=record["error"],
            key=recipe["key"],
            model=record["model"],
            id=folder.name,
        )
    except FileNotFoundError as error:
        raise RequestError(
            f"{folder} is no run folder: {Path(error.filename or 'run.json').name} is not there."
        ) from error
    except _DAMAGE as error:
        why = str(error) if type(error) is ValueError and " must be " in str(error) else type(error).__name__
        raise RequestError(
            f"The run in {folder} is damaged and can't be read ({why}); other runs are not touched."
        ) from error

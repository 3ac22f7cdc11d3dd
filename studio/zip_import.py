"""A run's zip, taken into the store: unpacked beside its place, read whole, drawn anew, then renamed.

A zip may come from anybody. Only the files of a run folder are taken, by name; entries with a path out of
the folder, links, doubles, encryption, too many and too large ones are refused before anything is written,
and arrays are read without pickle. Figures are drawn from the numbers, so what is shown is what was measured.
run.json says that the run was imported: nobody's own Run is answered with the numbers of a zip.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from studio.disk import half_written, reason
from studio.errors import RequestError, StudioError
from studio.figures import FORMATS, to_bytes
from studio.recipes import carried, check_format, digest, read_note
from studio.registry import find_method
from studio.store import EDIT_FILE, IMPORTED, MADE_FILE, Store, damaged_images, read_run
from studio.types import Run

MOST_ENTRIES = 50_000
MOST_BYTES = 8 * 2**30  # unpacked
MOST_RATIO = 2_000  # of unpacked to packed bytes, above 64 MiB
_KEPT = ("run.json", "arrays.npz", EDIT_FILE, MADE_FILE)
_DRAWN = tuple(f"figure.{kind}" for kind in FORMATS)
_EDIT = re.compile(r"edits/([0-9a-f]{64})\.safetensors")
_IMAGE = re.compile(r"images/[^/\\:\x00-\x1f]{1,200}\.png")
_LITTER = re.compile(r"__MACOSX/.*|(.*/)?(\.DS_Store|Thumbs\.db|desktop\.ini)")
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def import_zip(path: Path, store: Store, *, own: bool = False) -> tuple[Run, bool]:
    """(the run under its id in the store, whether it is new there). A run that the store has is recognised by
    its content; another run of the same id gets a new one. own: it was made here, and is not marked."""
    try:
        with zipfile.ZipFile(path) as opened:
            files = dict(_entries(opened))
            return _taken(opened, files, store, own)
    except _DAMAGE as error:
        raise RequestError(
            f"{path.name[:80]} is a damaged zip and nothing was taken from it; export the run again."
        ) from error


def _entries(opened: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """(name inside the run folder, entry) of a run's files; RequestError for a zip of anything else."""
    found = [e for e in opened.infolist() if not e.is_dir() and not _LITTER.fullmatch(e.filename)]
    if len(found) > MOST_ENTRIES:
        raise _foreign(f"it holds {len(found):,} files, more than any run")
    tops = {e.filename.partition("/")[0] if "/" in e.filename else "" for e in found}
    if not any(PurePosixPath(e.filename).name == "run.json" for e in found):
        raise _foreign("there is no run.json in it")
    if len(tops) != 1:
        raise _foreign("it holds more than one folder")
    seen: set[str] = set()
    for entry in found:
        name = entry.filename.partition("/")[2] if "/" in entry.filename and tops != {""} else entry.filename
        if name.startswith("images/") and tops == {"images"}:
            raise _foreign("there is no run.json beside its images")
        _check_entry(entry, name, seen)
        seen.add(name)
        if name not in _DRAWN:
            yield name, entry
    size, packed = sum(e.file_size for e in found), sum(e.compress_size for e in found)
    if size > MOST_BYTES or size > (64 << 20) and size > MOST_RATIO * max(packed, 1):
        raise _foreign(f"it would unpack to {size / 2**30:.1f} GiB")


def _check_entry(entry: zipfile.ZipInfo, name: str, seen: set[str]) -> None:
    shown = "".join(c if c.isprintable() else "?" for c in entry.filename)[-80:]
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise _foreign(f"{shown} in it is a link or no plain file")
    if entry.flag_bits & 1:
        raise _foreign(f"{shown} in it is encrypted")
    if not _known(name) and not _EDIT.fullmatch(name):
        raise _foreign(f"{shown} in it is no file of a run")
    if name in seen:
        raise _foreign(f"{shown} is in it twice")


def _known(name: str) -> bool:
    """Whether a run folder has a file of that name."""
    return name in (*_KEPT, *_DRAWN) or bool(_IMAGE.fullmatch(name))


def run_files(folder: Path) -> list[Path]:
    """The files of a run folder that belong to the run, whole as far as their ends tell: what else a person
    put there, and images that were cut short, would have its zip refused."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and not f.is_symlink())
    cut = damaged_images(folder)
    return [f for f in files if _known(f.relative_to(folder).as_posix()) and f not in cut]


def _foreign(why: str) -> RequestError:
    return RequestError(
        f"This zip is not taken, {why}; nothing of it was kept. Take the zip of a run that Locus exported."
    )


def _taken(
    opened: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], store: Store, own: bool
) -> tuple[Run, bool]:
    """Unpacks beside the runs, reads the run, and renames the folder to a free id."""
    beside = store.root / half_written(f"{secrets.token_hex(4)}-import")
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        for part in ("images", "edits"):
            (beside / part).mkdir(parents=True)
        for name, entry in files.items():
            with opened.open(entry) as source, (beside / name).open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        _take_edits(beside, store)
        run = _read(beside)
        if not own:
            _mark(beside)
        return _placed(run, beside, store, PurePosixPath(next(iter(files.values())).filename).parts[0])
    except OSError as error:
        why = reason(error, "that folder")
        raise StudioError(f"The run could not be taken into {store.root}: {why}; nothing is lost.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read(folder: Path) -> Run:
    """The unpacked run, every part of it looked at; RequestError says which is damaged."""
    try:
        record = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged("run.json") from error
    if not isinstance(record, dict):
        raise _damaged("run.json")
    check_format(record.get("format", 1), "This zip")
    read_note({k: record.get(k) for k in ("recipe", "model", "host")}, "this zip")
    if record.get("status") not in ("done", "stopped", "failed") or not isinstance(
        record.get("started"), str
    ):
        raise _damaged("run.json")
    _check_arrays(folder / "arrays.npz")
    try:
        run = read_run(folder)
    except RequestError as error:
        raise _damaged("arrays.npz or run.json") from error
    for file in sorted((folder / "images").iterdir()):
        _check_image(file)
    for name in (EDIT_FILE, MADE_FILE):
        _check_tensors(folder / name)
    return run


def _mark(folder: Path) -> None:
    """Says in run.json that the run was imported."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["host"] = {**record["host"], IMPORTED: True}
    _write(record, folder)


def _write(record: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")


def _take_edits(folder: Path, store: Store) -> None:
    """The edits that were laid over the model go into the store; the recipe names them there where this
    machine has not the files that it named."""
    kept = {}
    for file in sorted((folder / "edits").iterdir()):
        _check_tensors(file)
        if hashlib.sha256(file.read_bytes()).hexdigest() != file.stem:
            raise _damaged(f"edits/{file.name[:16]}…")
        kept[file.stem] = file
    try:
        record = json.loads((folder / "run.json").read_text("utf-8")) if kept else {}
        hashes, recipe = record["host"]["edits"] if kept else (), record.get("recipe")
        for i, digest in enumerate(hashes):
            if digest in kept and not os.path.isfile(_file_of(recipe["edits"][i])[0]):
                where = store.edit_file(store.keep_edit(kept[digest])).absolute()
                recipe["edits"][i] = f"{where}{_file_of(recipe['edits'][i])[1]}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged("run.json") from error
    if kept:
        _write(record, folder)
    shutil.rmtree(folder / "edits")


def _file_of(entry: str) -> tuple[str, str]:
    """(path, "@0.6" or "") of an edit's entry in a recipe."""
    found = re.fullmatch(r"(.+?)(@-?[0-9.eE+-]+)?", entry, re.DOTALL)
    return (found[1], found[2] or "") if found else (entry, "")


def _damaged(what: str) -> RequestError:
    return RequestError(f"The run in this zip is damaged ({what}), so it is not taken; export the run again.")


def _check_arrays(file: Path) -> None:
    """The file's own table of contents, before anything is unpacked into memory."""
    try:
        with zipfile.ZipFile(file) as opened:
            sizes = [e.file_size for e in opened.infolist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise _damaged(file.name) from error
    if sum(sizes) > MOST_BYTES or sum(sizes) > (64 << 20) and sum(sizes) > MOST_RATIO * file.stat().st_size:
        raise _foreign(f"its arrays would unpack to {sum(sizes) / 2**30:.1f} GiB")


def _check_image(file: Path) -> None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=["PNG"]) as opened:
                opened.load()
    except Exception as error:  # what broken images raise is not to be listed
        raise _damaged(f"images/{file.name[:60]}") from error


def _check_tensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if file.exists():
        try:
            with safe_open(file, "np") as opened:
                opened.metadata()
        except (SafetensorError, OSError) as error:
            raise _damaged(file.name) from error


def _placed(run: Run, beside: Path, store: Store, top: str) -> tuple[Run, bool]:
    """The run under a free id of its own name, or the same run that stands there already."""
    base = _ID.fullmatch(top)[1] if _ID.fullmatch(top) else _id_of(run)
    for attempt in range(1000):
        name = base if not attempt else f"{base}-{attempt + 1}"
        if not (store.root / name).exists():
            _draw(replace(run, id=name), beside)
            try:
                beside.rename(store.root / name)
                return store.load(name), True
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # otherwise another studio was quicker
        if _same(store.root / name, run):
            return replace(run, id=name), False
    raise StudioError(f"No free name for a run like {base} in {store.root}.")


_ID = re.compile(r"(\d{14}-[a-z][a-z0-9-]{1,60}-(?:[0-9a-f]{8}|nokey))(?:-\d{1,4})?")


def _id_of(run: Run) -> str:
    """The id that the store gives a run."""
    method = re.sub(r"[^a-z0-9-]", "", run.recipe.method)[:60]
    key = run.key[:8] if re.fullmatch("[0-9a-f]{64}", run.key) else "nokey"
    return f"{re.sub(r'[^0-9]', '', run.started)[:14]:0<14}-{method or 'run'}-{key}"


def _same(folder: Path, run: Run) -> bool:
    """Whether the run that stands there is this one: its recipe, its start and every number."""
    try:
        there = read_run(folder)
    except RequestError:
        return False
    if (there.key, there.started) != (run.key, run.started):
        return False
    if replace(there.recipe, edits=()) != replace(run.recipe, edits=()):
        return False
    mine, other = ({n: digest(t.values) for n, t in r.result.arrays.items()} for r in (run, there))
    return mine == other


def _draw(run: Run, folder: Path) -> None:
    """The run's figure from its numbers; without one where this version can't draw it."""
    try:
        figure = find_method(run.recipe.method).draw(run)
        drawn = {kind: to_bytes(figure, kind, carried(run)) for kind in FORMATS}
    except Exception:  # another version's method, or numbers that it can't draw: they are kept all the same
        return
    for kind, content in drawn.items():
        (folder / f"figure.{kind}").write_bytes(content)

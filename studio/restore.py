"""Restoring: any file that Locus exported, back to its recipe and, where the store has it, to its run.

Read are PNG, SVG and PDF (their metadata), CSV, LaTeX, BibTeX, notebooks, recipes and run.json; a zip brings
the whole run into the store. What a file is, its content says and not its name. Nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.exports import new_folder
from studio.recipes import MOST_RUNS, Note, carried, read_note
from studio.registry import find_method, parse
from studio.store import Store
from studio.types import Recipe
from studio.zip_import import import_zip

MOST_BYTES = 256 * 2**20  # of a file that is read whole
HEAD = 4 * 2**20  # bytes of a text in which its note stands
MARK = "% locus: "


@dataclass(frozen=True)
class Restored:
    """A recipe, the id of its run if it is in the store, a sentence on what was found, and all that the file
    said."""

    recipe: Recipe
    run_id: str | None
    said: str
    note: Note


class ManyRuns(RequestError):
    """A file that was made of many runs holds no recipe of one. runs: the ids of those that the store has."""

    def __init__(self, sentence: str, runs: Sequence[str]) -> None:
        super().__init__(sentence)
        self.runs = tuple(runs)


def restored(path: str | Path, store: Store) -> Restored:
    """What an exported file holds. A zip's run is put into the store, unless it is there already.

    RequestError says in a sentence why a file is not taken, ManyRuns that it was made of many runs;
    StudioError when the store can't be written.
    """
    path = Path(path)
    name = _shown(path)
    try:
        with path.open("rb") as opened:
            head = opened.read(HEAD)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is no file's"
        raise RequestError(f"{name} can't be read: {reason}.") from error
    if head.startswith(b"PK"):
        return of_zip(path, store)
    text = _text_of(path, head, name)
    _refuse_many(text, head, name, store)
    note = read_note(text, name)
    note = replace(note, recipe=_checked(note.recipe, name))
    found = _in_store(store, note)
    if found:
        return Restored(note.recipe, found, f"The run is in the store, as {found}.", note)
    said = f"The run is not in this store; the recipe was read from {name}, run it to see its results again."
    return Restored(note.recipe, None, said, note)


def _refuse_many(text: str | dict[str, Any], head: bytes, name: str, store: Store) -> None:
    """ManyRuns for what a sweep, a grid or a comparison wrote."""
    about: Any = text
    with contextlib.suppress(ValueError, RecursionError):
        about = json.loads(text) if isinstance(text, str) else text
    if not isinstance(about, dict) or "model" in about or "recipe" in about:
        return
    method = about.get("method")
    if isinstance(about.get("runs"), int) and isinstance(about.get("key"), str):
        about = {"locus": {"of": "sweep", "count": about["runs"]}}  # sweep.json
    about = about.get("locus")
    if not isinstance(about, dict) or about.get("of") not in ("sweep", "grid", "comparison"):
        return
    ids = about["runs"][:MOST_RUNS] if isinstance(about.get("runs"), list) else []
    there = [run for run in dict.fromkeys(i for i in ids if isinstance(i, str)) if _has(store, run)]
    count = about["count"] if type(about.get("count")) is int else len(ids)
    what = "figure" if head.startswith((b"\x89PNG", b"%PDF", b"<")) else "table"
    what = "record" if head.lstrip().startswith(b"{") else what
    told = f"{name} is the {what} of a {about['of']} of {count:,} run{'' if count == 1 else 's'}"
    told += f" of {method[:60]}" if isinstance(method, str) and method else ""
    here = f"{len(there):,} of them {'is' if len(there) == 1 else 'are'} in this store"
    here = here if ids else "it names none of them"
    raise ManyRuns(f"{told}, so it holds no recipe of one run; {here}.", there)


def _has(store: Store, run: str) -> bool:
    try:
        return bool(store.path(run))
    except RequestError:
        return False


def of_zip(path: Path, store: Store, *, own: bool = False) -> Restored:
    """A zip's run, in the store now; own: it was made here, and is not marked as imported."""
    run, new = import_zip(path, store, own=own)
    said = f"The run is in the store{' now' if new else ''}, as {run.id}."
    return Restored(run.recipe, run.id, said, read_note(carried(run), _shown(path)))


def located(where: str, store: Store) -> Path | Restored:
    """The folder of a run that is named by its id in the store, by a run folder, by its zip or by any other
    exported file; what the file says, where the store has not its run. A zip is unpacked into a temporary
    folder: to look at it is not to keep it."""
    path = Path(where).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError:  # a name that is too long
        folder = file = False
    if folder:
        return path
    if not file:
        return store.path(where)
    with path.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    store = Store(new_folder() / "runs") if zipped else store
    found = restored(path, store)
    return store.path(found.run_id) if found.run_id else found


def _shown(path: Path) -> str:
    """A file's name as it may be printed."""
    return "".join(c if c.isprintable() else "?" for c in path.name)[:80] or "The file"


def _checked(recipe: Recipe, name: str) -> Recipe:
    """The recipe, with the method's own seeds where it names none; RequestError when this version knows no
    such method, or the recipe isn't one of it."""
    try:
        method = find_method(recipe.method)
        recipe = replace(recipe, seeds=recipe.seeds or method.seeds)
        parse(method, {**recipe.inputs, **recipe.params}, list(recipe.seeds) if method.samples else None)
        return recipe
    except RequestError as error:
        raise RequestError(f"The recipe in {name} does not fit this version of Locus: {error}") from error


def _in_store(store: Store, note: Note) -> str | None:
    """The id of the run that the note is of: by id and key, else a finished one with its key."""
    if not note.key:
        return None
    if note.run:
        try:
            if store.load(note.run).key == note.key:
                return note.run
        except RequestError:
            pass  # another store, or the run is damaged
    found = store.find(note.key)
    return found.id if found else None


def _text_of(path: Path, head: bytes, name: str) -> str | dict[str, Any]:
    """The note's text in a file that is no zip."""
    if path.stat().st_size > MOST_BYTES and not head.startswith(b"array,"):
        raise RequestError(f"{name} is larger than any file that Locus exports ({MOST_BYTES >> 20} MB).")
    for start, reader in _READERS:
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            try:
                text = reader(path, head)
            except RequestError:
                raise
            except Exception as error:  # what broken files raise in three libraries is not to be listed
                raise _damaged(name) from error
            if text:
                return text
            break
    if _MEANS in head.partition(b"\n")[0]:
        return {"locus": {"of": "sweep", "count": _runs_of_means(head)}}
    raise RequestError(
        f"{name} holds no recipe of a run; take a figure, a table, a notebook, a recipe or a zip that Locus "
        "exported, as it was saved (other programs may have removed the recipe)."
    )


def _damaged(name: str) -> RequestError:
    return RequestError(f"{name} is damaged and can't be read; take the original file.")


def _of_png(path: Path, head: bytes) -> str:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=["PNG"]) as opened:
            return str(opened.info.get("Description", ""))


def _of_svg(path: Path, head: bytes) -> str:
    from xml.etree import ElementTree

    for _, element in ElementTree.iterparse(io.BytesIO(path.read_bytes())):  # entities are expat's to bound
        if element.tag == "{http://purl.org/dc/elements/1.1/}description":
            return element.text or ""
    return ""


def _of_pdf(path: Path, head: bytes) -> str:
    from pypdf import PdfReader

    found = PdfReader(path).metadata
    return str(found.subject or "") if found else ""


def _of_json(path: Path, head: bytes) -> str | dict[str, Any]:
    text = path.read_text("utf-8-sig")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(found, dict) and "nbformat" in found:
        note = found.get("metadata", {}).get("locus")
        return note if isinstance(note, dict) else ""
    return found if isinstance(found, dict) else ""


def _of_comment(path: Path, head: bytes) -> str:
    lines = head.decode("utf-8-sig", "replace").splitlines()
    return next((line.removeprefix(MARK) for line in lines if line.startswith(MARK)), "")


def _of_csv(path: Path, head: bytes) -> str:
    rows = csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline=""))
    before = csv.field_size_limit(HEAD)
    try:
        titles, first = next(rows), next(rows, [])
    finally:
        csv.field_size_limit(before)
    return dict(zip(titles, first, strict=False)).get("recipe", "")


def _of_sweep(path: Path, head: bytes) -> dict[str, Any]:
    """The runs of sweep.csv, one a line."""
    lines = list(csv.DictReader(io.StringIO(head.decode("utf-8-sig", "replace"), newline="")))
    runs = [line["run"] for line in lines if line.get("run")]
    return {"locus": {"of": "sweep", "count": len(lines), "runs": runs}}


def _runs_of_means(head: bytes) -> int:
    """How many runs stand behind combined.csv at most: its largest number of rows for each combination."""
    lines = csv.DictReader(io.StringIO(head.decode("utf-8-sig", "replace"), newline=""))
    most: dict[tuple, int] = {}
    names = lines.fieldnames or []
    varied = names[: names.index("array")] if "array" in names else []
    for line in lines:
        cell = tuple(line[name] for name in varied)
        rows = line.get("rows") or ""
        most[cell] = max(most.get(cell, 0), int(rows) if rows.isdecimal() else 0)
    return sum(most.values())


_MEANS = b"array,group,rows,place,mean,sem,low,high,unit"  # in the first line of combined.csv
_READERS: tuple[tuple[bytes | tuple[bytes, ...], Callable[[Path, bytes], str | dict[str, Any]]], ...] = (
    (b"\x89PNG", _of_png),
    ((b"<?xml", b"<svg", b"<!DOCTYPE svg"), _of_svg),
    (b"%PDF-", _of_pdf),
    (b"{", _of_json),
    ((b"%", b"@"), _of_comment),
    (b"number,run,status,", _of_sweep),
    (b"array,", _of_csv),
)

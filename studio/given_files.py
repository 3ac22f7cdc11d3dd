"""Files and folders as a person names them: made whole, so that a run replays from anywhere, and texts that
stand in a file read.

A command looks from the folder where it was started, a sweep file from its own first (`folder`). Pages upload
instead, and what their visitors write is never taken for a file here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from studio.edit_files import split_entry
from studio.errors import RequestError
from studio.models.catalog import CATALOG
from studio.registry import Method

_NO_MODELS = ("none", "judge")  # what --second-scorer may be beside a CLIP


def texts_of(given: Sequence[str], folder: Path | None = None) -> tuple[str, ...]:
    """Texts, of which each may be a file that holds some, one a line; RequestError when one can't be read."""
    out: list[str] = []
    for text in given:
        file = beside(text, folder) if isinstance(text, str) else ""
        if not text or not os.path.isfile(file):
            out.append(text)
            continue
        try:
            lines = Path(file).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{text} can't be read as a text file in UTF-8.") from error
        out += [line.strip() for line in lines if line.strip()]
    return tuple(out)


def whole_files(given: Any, folder: Path | None = None) -> Any:
    """Paths of files from the root on; what is no path is as it was, for the registry to refuse."""
    if isinstance(given, str):
        return beside(given, folder) if given else given
    return tuple(whole_files(g, folder) for g in given) if isinstance(given, (list, tuple)) else given


def whole_model(name: Any, folder: Path | None = None) -> Any:
    """A model given as a folder or a checkpoint file, from the root on; names and hub ids as they are."""
    if not isinstance(name, str) or not name or name in CATALOG or name in _NO_MODELS:
        return name
    place = beside(name, folder)
    return place if os.path.exists(place) else name


def whole_edit(entry: str, folder: Path | None = None) -> str:
    """`PATH` or `PATH@STRENGTH` of an edit file, from the root on."""
    path = split_entry(entry)[0]
    whole = beside(entry, folder)
    return whole if os.path.isfile(whole) else beside(path, folder) + entry[len(path) :]


def with_files(method: Method, asked: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Options of a run by their names, with the files that they name: texts read, paths whole. RequestError
    for a file that can't be read, and for `edit` that names no files."""
    knobs = {f.name: f.metadata for record in (method.inputs, method.params) for f in fields(record)}
    out = dict(asked)
    for name, value in asked.items():
        meta = knobs.get(name, {})
        if value and meta.get("lines") and isinstance(value, (str, list, tuple)):
            out[name] = list(texts_of([value] if isinstance(value, str) else value, folder))
        elif meta.get("paths"):
            out[name] = whole_files(value, folder)
        elif meta.get("weights") or name == "model":
            out[name] = whole_model(value, folder)
    if (edits := asked.get("edit")) is not None:
        edits = [edits] if isinstance(edits, str) else edits
        if not isinstance(edits, (list, tuple)) or not all(isinstance(e, str) for e in edits):
            raise RequestError(f"`edit` must be a file or a list of files, not {str(edits)[:40]}.")
        out["edit"] = [whole_edit(e, folder) for e in edits]
    return out


def beside(name: str, folder: Path | None = None) -> str:
    """A path from `folder` where something stands there, else from the working folder."""
    given = os.path.expanduser(name)
    there = os.path.join(folder, given) if folder is not None else given
    return os.path.abspath(there if os.path.lexists(there) else given)

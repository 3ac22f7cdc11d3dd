"""Edit files: reading them, their strength where they are used (`FILE@0.6`), and a shelf of the last ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from studio.edits import Active
from studio.errors import RequestError
from studio.models.lora import is_lora, read_lora
from studio.registry import find_method
from studio.types import Edit

STRONGEST = 100.0
_SHELF_BYTES = 2 * 10**9
_STAMPS = 1024  # states of files whose hash is known


def read_edit(path: str | Path) -> Edit:
    """Reads an edit file (safetensors, contract), or a LoRA file as an edit; RequestError when it is
    neither."""
    from safetensors import SafetensorError, safe_open

    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise RequestError(f"There is no edit file {str(path)[:200]}.")
    try:
        with safe_open(path, "np") as opened:
            note = opened.metadata() or {}
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            if "locus.base_fingerprint" not in note and is_lora(kinds):
                return read_lora(path)
            deltas = {name: opened.get_tensor(name) for name, kind in kinds.items() if kind == "F32"}
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} is no safetensors file, or it is cut short; save the edit again."
        ) from error
    foreign = RequestError(
        f"{path} is no edit file of Locus and no LoRA: its metadata lack locus.base_fingerprint, its names "
        "are foreign, or its deltas are not float32."
    )
    if (
        not note.get("locus.base_fingerprint")
        or set(kinds) != set(deltas)
        or any(not n.startswith(("unet.", "text_encoder")) for n in deltas)
    ):
        raise foreign
    concepts, replacements, params = _recorded(note, foreign)
    _check_numbers(path, params)
    _check_finite(path, deltas)
    method = note.get("locus.method", "")
    return Edit(deltas, note["locus.base_fingerprint"], tuple(concepts), params, method, tuple(replacements))


def _recorded(note: Mapping[str, str], foreign: RequestError) -> tuple[list[str], list[str], dict[str, Any]]:
    """Concepts, replacements and params of a file's metadata; raises `foreign` when they are not what an edit
    file has."""
    try:
        concepts = json.loads(note.get("locus.concepts", "[]"))
        replacements = json.loads(note.get("locus.replacements", "[]"))
        params = json.loads(note.get("locus.params", "{}"))
    except ValueError as error:
        raise foreign from error
    texts = all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in (concepts, replacements))
    if not texts or not isinstance(params, dict):
        raise foreign
    return concepts, replacements, params


def _check_numbers(path: Path, params: Mapping[str, Any]) -> None:
    """RequestError for a number by which edits are composed that `locus edit` would not have written."""
    known = {f.name: f.metadata for f in fields(find_method("edit").params)}
    spans = {n: (known[n]["low"], known[n]["high"]) for n in ("strength", "regularization")} | {
        "ratios": (0, 1)
    }
    for name, (low, high) in spans.items():
        given = params.get(name, [])
        each = given if name == "ratios" and isinstance(given, list) else [given] * (name in params)
        for value in each:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise RequestError(
                    f"{path}: the entry {name} of its locus.params must be a number from {low:g} to "
                    f"{high:g}, not {str(value)[:40]!r}; make the edit again."
                )


def _check_finite(path: Path, deltas: dict[str, np.ndarray]) -> None:
    for name, delta in deltas.items():
        if not np.isfinite(delta.sum()) and not np.isfinite(delta).all():
            raise RequestError(f"{path} holds NaN or infinity in {name}; make the edit again.")


def edit_hash(path: str | Path) -> str:
    """SHA-256 of an edit file's bytes."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def split_entry(entry: str) -> tuple[str, float]:
    """(path, strength) of `PATH` or `PATH@STRENGTH`; a file whose own name ends so is a path."""
    path, at, tail = entry.rpartition("@")
    if not at or os.path.isfile(os.path.expanduser(entry)):
        return entry, 1.0
    try:
        strength = float(tail)
    except ValueError:
        if not os.path.isfile(os.path.expanduser(path)):
            return entry, 1.0
        strength = math.nan
    if not abs(strength) <= STRONGEST:
        raise RequestError(
            f"The strength of an edit must be a number from {-STRONGEST:g} to {STRONGEST:g}, as in "
            f"{path[-80:]}@0.6, not {tail[:40]!r}."
        )
    return path, strength


class Shelf:
    """Edits by the entries of recipes, read once as long as their files hold the same bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple, str] = OrderedDict()  # hashes by path and time of the file
        self._kept: OrderedDict[str, Edit] = OrderedDict()  # by hash, the last used last

    def open(self, entry: str) -> Active:
        """The edit of `PATH` or `PATH@STRENGTH`, with the SHA-256 of the file's bytes as its digest."""
        path, strength = split_entry(entry)
        stamp = _stamp(path)
        with self._lock:
            digest = self._seen.get(stamp) if stamp else None
        if digest is None and os.path.isfile(os.path.expanduser(path)):
            digest = edit_hash(path)  # a kept file has a new time whenever it is used
        with self._lock:
            edit = self._kept.get(digest) if digest else None
        if edit is None:
            edit = read_edit(path)
            digest = edit_hash(path)
        self._keep(stamp, digest, edit)
        return Active(edit, strength, digest)

    def _keep(self, stamp: tuple | None, digest: str, edit: Edit) -> None:
        with self._lock:
            if stamp:
                self._seen[stamp] = digest
                self._seen.move_to_end(stamp)
            while len(self._seen) > _STAMPS:
                self._seen.popitem(last=False)
            self._kept[digest] = edit
            self._kept.move_to_end(digest)
            while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > _SHELF_BYTES:
                self._kept.popitem(last=False)


def _size(edit: Edit) -> int:
    return sum(d.nbytes for d in edit.deltas.values())


def _stamp(path: str) -> tuple[Any, ...] | None:
    """What tells one state of a file from another."""
    try:
        stat = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return None
    return os.path.abspath(os.path.expanduser(path)), stat.st_mtime_ns, stat.st_size, stat.st_ino


def mark(active: Active) -> str:
    """What a run's key holds of an edit: its file's hash, and its strength where that is not 1."""
    return active.digest if active.strength == 1 else f"{active.digest}@{active.strength!r}"

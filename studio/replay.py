"""Replay: the same recipe once more, on the threads and the batch of the first time, and what differs if
anything does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from studio.edit_files import edit_hash, split_entry
from studio.errors import RequestError
from studio.models.loading import locate
from studio.provenance import versions
from studio.session import Session
from studio.store import Store, check_free, read_run
from studio.types import Run

TOLERANCE = 1e-4


def repeat(
    where: str,
    given: dict[str, Any],
    report: Callable | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> tuple[Run, Run]:
    """(the run that stands there, the run made now from its recipe); never answered from the store.

    `warn` is told at once what has changed since, before anything is computed.
    """
    folder = Path(where).expanduser()
    old = read_run(folder) if folder.is_dir() else Store(given.get("runs") or _default_runs()).load(where)
    if old.status != "done":
        raise RequestError(f"The run {old.id} was {old.status}, so there is nothing whole to compare with.")
    out = Path(given["out"]).expanduser() if "out" in given else None
    if out is not None:
        check_free(out)
    host = old.host
    session = Session(
        runs=given.get("runs"),
        models=given.get("models"),
        device=given.get("device") or host.get("device", "auto"),
        dtype=host.get("dtype", "auto"),
        threads=host.get("threads"),
        batch=host.get("batch"),
    )
    with contextlib.closing(session):
        for sentence in changed(old, session):
            warn(sentence)
        force = bool(host.get("force"))
        return old, session.run(old.recipe, report, fresh=True, save=False, out=out, force=force)


def changed(old: Run, session: Session) -> list[str]:
    """What can be told before anything is computed: weights or edit files that are no longer those of the
    run."""
    said = []
    if locate(old.recipe.model, session.models_folder).fingerprint != old.model.get("fingerprint"):
        said.append(f"The weights of {old.recipe.model} are not those of the run, so it can't be repeated.")
    for entry, digest in zip(old.recipe.edits, old.host.get("edits", ()), strict=False):
        path = split_entry(entry)[0]
        if Path(path).is_file() and edit_hash(path) != digest:
            said.append(f"The edit file {path} has changed since the run.")
    return said


def _default_runs() -> Path:
    from studio.models.loading import home

    return home() / "runs"


def compare(old: Run, new: Run) -> dict[str, Any]:
    """{agrees, identical, largest difference by array, images that differ, said: sentences}."""
    said, arrays, images = [], {}, []
    for name, trace in old.result.arrays.items():
        other = new.result.arrays.get(name)
        if other is None or other.values.shape != trace.values.shape:
            arrays[name] = float("inf")
        else:
            same = np.array_equal(trace.values, other.values, equal_nan=trace.values.dtype.kind == "f")
            arrays[name] = 0.0 if same else _largest(trace.values, other.values)
    for name, pixels in old.result.images.items():
        if name not in new.result.images or not np.array_equal(pixels, new.result.images[name]):
            images.append(name)
    identical = not images and all(v == 0 for v in arrays.values())
    same_host = all(old.host.get(k) == new.host.get(k) for k in ("device", "threads", "batch", "dtype"))
    agrees = identical or (not same_host and all(v <= TOLERANCE for v in arrays.values() if v is not None))
    said.append(
        "Every array and image is the same, bit for bit."
        if identical
        else f"{sum(v != 0 for v in arrays.values())} of {len(arrays)} arrays and {len(images)} of "
        f"{len(old.result.images)} images differ."
    )
    said += [
        f"  {name}: "
        + (f"largest difference {v:.3g}" if np.isfinite(v) else "another shape, or gaps elsewhere")
        for name, v in arrays.items()
        if v
    ]
    if not identical:
        said += _differences(old, new)
    return {
        "agrees": bool(agrees),
        "identical": bool(identical),
        "arrays": {k: v if np.isfinite(v) else None for k, v in arrays.items()},
        "images": images,
        "said": said,
    }


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return (
        float("inf")
        if (np.isnan(a.astype(float)) != np.isnan(b.astype(float))).any()
        else float(np.nanmax(difference))
    )


def _differences(old: Run, new: Run) -> list[str]:
    """What of machine, libraries and weights is not as it was."""
    out = []
    if old.model.get("fingerprint") != new.model.get("fingerprint"):
        out.append("  The model's weights are not the same as then.")
    if old.host.get("scorer") != new.host.get("scorer"):
        out.append("  The scorer's weights are not the same as then.")
    if old.host.get("edits") != new.host.get("edits"):
        out.append("  The edit files are not the same as then.")
    for key in ("device", "dtype", "threads", "batch"):
        if old.host.get(key) != new.host.get(key):
            out.append(f"  {key}: {old.host.get(key)} then, {new.host.get(key)} now.")
    for name, v in versions().items():
        if old.host.get("versions", {}).get(name) not in (None, v):
            out.append(f"  {name}: {old.host['versions'][name]} then, {v} now.")
    return out

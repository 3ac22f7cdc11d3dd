"""Replay: the same recipe once more, on the threads and the batch of the first time, and what differs if
anything does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from studio.edit_files import edit_hash, split_entry
from studio.errors import RequestError
from studio.models.loading import locate
from studio.provenance import versions
from studio.recipes import difference, digest
from studio.registry import find_method
from studio.restore import located
from studio.session import Session
from studio.store import Store, check_free, damaged_images, read_run
from studio.types import Recipe, Result, Run

TOLERANCE = 1e-4
_HOST = ("device", "dtype", "threads", "batch")


def find_old(where: str, runs: str | None = None) -> tuple[Run, Mapping[str, str]]:
    """The run to repeat: the id of one in the store, a run folder, its zip, or any other file that Locus
    exported of it; and {array: SHA-256}, empty where the numbers themselves are at hand.

    A figure's run is looked up in the store; where that lacks it, the file's own SHA-256 are what is compared
    with. RequestError when there is nothing to compare with.
    """
    found = located(where, Store(runs or _default_runs()))
    if isinstance(found, Path):
        run = _whole(read_run(found))
        for file in damaged_images(found):
            run.result.images[file.stem]  # says what is wrong with it, before anything is computed
        return run, {}
    note = found.note
    if not note.arrays:
        raise RequestError(
            f"{Path(where).name[:80]} holds a recipe but no numbers to compare with, and the store does not "
            "have its run; take the run's zip, or run the recipe itself."
        )
    model = {"fingerprint": note.fingerprint} if note.fingerprint else {}
    run = Run(
        note.recipe, note.status or "done", "", 0.0, note.host, Result(), None, note.key, model, note.run
    )
    return _whole(run), note.arrays


def _whole(run: Run) -> Run:
    if run.status != "done":
        raise RequestError(f"The run {run.id} was {run.status}, so there is nothing whole to compare with.")
    return run


def repeat(
    old: str | Run,
    given: dict[str, Any],
    report: Callable | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> tuple[Run, Run]:
    """(the old run, the run made now from its recipe); never answered from the store. `old`: a run, or where
    it is (see find_old).

    `warn` is told at once what has changed since, before anything is computed.
    """
    if isinstance(old, str):
        old = find_old(old, given.get("runs"))[0]
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
    for entry, then in zip(old.recipe.edits, old.host.get("edits", ()), strict=False):
        path = split_entry(entry)[0]
        if Path(path).is_file() and edit_hash(path) != then:
            said.append(f"The edit file {path} has changed since the run.")
    return said


def _default_runs() -> Path:
    from studio.models.loading import home

    return home() / "runs"


def compare(old: Run, new: Run, digests: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """{agrees, identical, largest difference by array (None: it can't be told), images that differ, said:
    sentences}. `digests`: SHA-256 of the old run's arrays, where its numbers are not at hand."""
    arrays = _by_digest(digests, new) if digests else _by_number(old, new)
    images = [
        name
        for name, pixels in old.result.images.items()
        if name not in new.result.images or not np.array_equal(pixels, new.result.images[name])
    ]
    identical = not images and all(v == 0 for v in arrays.values())
    same_host = all(old.host.get(k) == new.host.get(k) for k in _HOST)
    agrees = identical or (not same_host and all(v <= TOLERANCE for v in arrays.values()))
    what = "array" if digests else "array and image"
    counted = f"{sum(v != 0 for v in arrays.values())} of {len(arrays)} arrays"
    counted += "" if digests else f" and {len(images)} of {len(old.result.images)} images"
    said = [f"Every {what} is the same, bit for bit." if identical else f"{counted} differ."]
    unknown = "not the same; the file does not say by how much" if digests else ""
    unknown = unknown or "another shape, or gaps elsewhere"
    said += [
        f"  {name}: " + (f"largest difference {v:.3g}" if np.isfinite(v) else unknown)
        for name, v in arrays.items()
        if v
    ]
    if not identical:
        said += [*_read_otherwise(old, new), *_differences(old, new)] or [
            "  Machine, versions and weights are those of then."
        ]
    return {
        "agrees": bool(agrees),
        "identical": bool(identical),
        "arrays": {k: v if np.isfinite(v) else None for k, v in arrays.items()},
        "images": images,
        "said": said,
    }


def _by_number(old: Run, new: Run) -> dict[str, float]:
    """{array: largest difference}."""
    there = new.result.arrays
    return {
        name: difference(trace.values, there[name].values) if name in there else float("inf")
        for name, trace in old.result.arrays.items()
    }


def _by_digest(digests: Mapping[str, str], new: Run) -> dict[str, float]:
    """{array: 0 or infinity}."""
    now = {name: digest(trace.values) for name, trace in new.result.arrays.items()}
    return {name: 0.0 if now.get(name) == then else float("inf") for name, then in digests.items()}


def _read_otherwise(old: Run, new: Run) -> list[str]:
    """What the run read beside the model, where that is not as it was: the keys differ, though weights,
    number type and edits, which are in them too, do not."""
    known = [("model", "fingerprint"), ("host", "dtype"), ("host", "scorer"), ("host", "edits")]
    same = all(getattr(old, part).get(name) == getattr(new, part).get(name) for part, name in known)
    if not same or not old.key or not new.key or old.key == new.key:
        return []
    then, now = ({**r.recipe.inputs, **r.recipe.params} for r in (old, new))
    if others := [name for name, value in now.items() if then.get(name) != value]:
        return [f"  Options that the run did not have then: {', '.join(others)}."]
    if files := _files_of(old.recipe):
        late = [f for f in files if _changed_at(f) > datetime.fromisoformat(old.started).timestamp()]
        named = ", ".join(str(f) for f in (late or files)[:3])
        more = f" and {len(late or files) - 3} more" if len(late or files) > 3 else ""
        which = "An input file has changed since the run" if late else "One of its input files has changed"
        return [f"  {which}: {named}{more}."]
    return ["  The second scorer's weights are not the same as then."] if then.get("second_scorer") else []


def _files_of(recipe: Recipe) -> list[Path]:
    """The files that a recipe names, those in its folders too; a file that is gone is left as it is named."""
    with contextlib.suppress(RequestError):
        method = find_method(recipe.method)
        given = {**recipe.inputs, **recipe.params}
        knobs = [f for record in (method.inputs, method.params) for f in fields(record)]
        named = [given.get(f.name) or () for f in knobs if f.metadata["paths"]]
        paths = [Path(p) for part in named for p in ([part] if isinstance(part, str) else part)]
        return [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if not f.is_dir()]
    return []


def _changed_at(file: Path) -> float:
    """When a file was written, in seconds; endless for one that is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return math.inf


def _differences(old: Run, new: Run) -> list[str]:
    """What of machine, libraries and weights is not as it was."""
    out = []
    if old.model.get("fingerprint") != new.model.get("fingerprint"):
        out.append("  The model's weights are not the same as then.")
    if old.host.get("scorer") != new.host.get("scorer"):
        out.append("  The scorer's weights are not the same as then.")
    if old.host.get("edits") != new.host.get("edits"):
        out.append("  The edit files are not the same as then.")
    for key in (*_HOST, "machine"):
        if old.host.get(key) != new.host.get(key):
            out.append(f"  {key}: {old.host.get(key)} then, {new.host.get(key)} now.")
    for name, v in versions().items():
        if old.host.get("versions", {}).get(name) not in (None, v):
            out.append(f"  {name}: {old.host['versions'][name]} then, {v} now.")
    return out

"""Recipes as text: what exported files carry, so that a run can be found or repeated, and reading it back.

The text is one line of JSON in ASCII: the recipe's own fields (method, model, inputs, params, seeds, edits,
key) and, under "locus", the format's version, the run's id, the fingerprint of the model's weights, the host
and the SHA-256 of every array. run.json and a recipe that was written by hand are read too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.types import Recipe, Run

FORMAT = 1  # of recipes and of run.json
MOST_RUNS = 1000  # ids in a file of many runs
_LISTS = ("seeds", "edits")
_TEXTS = ("method", "model")


@dataclass(frozen=True)
class Note:
    """What a file says of its run. `arrays`: {name: SHA-256 of shape, type and bytes}; "" or {}: unknown."""

    recipe: Recipe
    key: str = ""
    run: str = ""
    status: str = ""
    fingerprint: str = ""
    host: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, str] = field(default_factory=dict)


def carried(run: Run) -> dict[str, Any]:
    """What an exported file of this run says of it, as plain values."""
    about = {
        "format": FORMAT,
        "run": run.id,
        "status": run.status,
        "fingerprint": str(run.model.get("fingerprint") or ""),
        "host": dict(run.host),
        "arrays": {name: digest(trace.values) for name, trace in run.result.arrays.items()},
    }
    return run.recipe.as_dict() | {"key": run.key, "locus": about}


def carried_of_many(what: str, method: str, runs: Sequence[str]) -> dict[str, Any]:
    """What an exported file of many runs says of them: `what` made it (sweep, grid or comparison), and their
    ids."""
    known = [run for run in runs if run]
    about = {"format": FORMAT, "of": what, "count": len(runs), "runs": known[:MOST_RUNS]}
    return {"method": method, "locus": about}


def as_text(note: Mapping[str, Any]) -> str:
    """One line of ASCII without the sign @, which would begin an entry of BibTeX."""
    return json.dumps(note, sort_keys=True).replace("@", "\\u0040")


def digest(values: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes (NaN have one form)."""
    plain = np.ascontiguousarray(values)
    if plain.dtype.kind == "f":
        plain = np.where(np.isnan(plain), np.asarray(np.nan, plain.dtype), plain)
    head = f"{plain.dtype.str} {values.shape} ".encode()
    return hashlib.sha256(head + plain.tobytes()).hexdigest()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference of two arrays: 0 when they are the same bit for bit, infinity when
    their shapes differ, or where one has a gap (NaN) that the other has not."""
    if a.shape != b.shape:
        return float("inf")
    if digest(a) == digest(b):
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    gaps = np.isnan(a)
    if (gaps != np.isnan(b)).any():
        return float("inf")
    return float(np.abs(a[~gaps] - b[~gaps]).max(initial=0.0))


def read_note(text: str | Mapping[str, Any], name: str) -> Note:
    """The note in a text or in parsed JSON; `name` is the file's. RequestError says what is wrong with it."""
    found = text
    if isinstance(text, str):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"The recipe in {name} can't be read, it is cut short or was changed; take the original file."
            ) from error
    if not isinstance(found, Mapping):
        raise _none(name)
    about = found.get("locus") if isinstance(found.get("locus"), Mapping) else found
    check_format(about.get("format", FORMAT), name)
    recipe = found.get("recipe", found)
    if not isinstance(recipe, Mapping) or not {"method", "model"} <= recipe.keys():
        raise _none(name)
    model = found.get("model") if isinstance(found.get("model"), Mapping) else {}
    return Note(
        _recipe(recipe, name),
        _plain(recipe.get("key"), "[0-9a-f]{64}"),
        _plain(about.get("run"), r"\w[\w.-]{0,199}"),
        _plain(about.get("status"), "[a-z]{1,20}"),
        _plain(about.get("fingerprint") or model.get("fingerprint"), "[0-9a-f]{1,128}"),
        _mapping(about.get("host")),
        {k: v for k, v in _mapping(about.get("arrays")).items() if isinstance(v, str)},
    )


def check_format(version: Any, name: str) -> None:
    """RequestError for a format that is newer than this program, or is none."""
    if type(version) is not int or version < 1:
        raise RequestError(f"The recipe in {name} says no version of its format that Locus knows.")
    if version > FORMAT:
        raise RequestError(
            f"{name} was written by a newer version of Locus (format {version}, this one reads up to "
            f"{FORMAT}); install the newer version to open it."
        )


def _recipe(found: Mapping[str, Any], name: str) -> Recipe:
    """The recipe of plain values, each of its kind."""
    lists = {k: found.get(k) or [] for k in _LISTS}
    maps = {k: found.get(k) or {} for k in ("inputs", "params")}
    whole = all(isinstance(found[k], str) and len(found[k]) <= 4096 for k in _TEXTS)
    whole &= all(isinstance(v, Mapping) for v in maps.values())
    whole &= all(isinstance(v, list) for v in lists.values())
    whole = whole and all(type(s) is int for s in lists["seeds"])
    whole = whole and all(isinstance(e, str) for e in lists["edits"])
    if not whole:
        raise RequestError(
            f"The recipe in {name} is damaged: method and model must be texts, inputs and params tables, "
            "seeds whole numbers and edits files; take the original file."
        )
    return Recipe(
        found["method"], found["model"], maps["inputs"], maps["params"], *(tuple(lists[k]) for k in _LISTS)
    )


def _none(name: str) -> RequestError:
    return RequestError(
        f"{name} holds no recipe of a run; take a figure, a table, a notebook, a recipe or a zip that Locus "
        "exported."
    )


def _plain(value: Any, pattern: str) -> str:
    """The value if it is a text of this form, else ""."""
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

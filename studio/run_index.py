"""What is known of every run of a store without its arrays: read from run.json once, kept until it changes.

A list of thousands of runs costs one look at each folder; a run whose record can't be read is listed as
damaged and hides none of the others.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.run_record import check_record
from studio.store import PARTS, Store, natural

_APART = ("edits", "uploads", "notes", "stars", "corpora")  # folders of a store that hold no runs
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Summary:
    """A run in the list. `text`: what is searched, in lower case; `fault`: why it can't be read, "" for a
    whole one; `images`: names of its images; times are ISO 8601 in UTC, seconds of wall time."""

    id: str
    method: str = ""
    model: str = ""
    status: str = ""
    started: str = ""
    seconds: float = 0.0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    edits: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    text: str = ""
    fault: str = ""

    @property
    def title(self) -> str:
        """What the run was asked about, in a line."""
        return " · ".join(_named(t) for t in texts_of(self.inputs)) or self.fault or self.method


def texts_of(value: Any) -> list[str]:
    """Every text in inputs, in their order; paths and file names among them."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, Iterable):
        return [text for part in value for text in texts_of(part)]
    return []


def _named(text: str) -> str:
    """A text as a title has it: of a path only its end."""
    return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith("/") else text


class RunIndex:
    """Summaries of a store's runs, newest first."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[tuple[int, ...], Summary]] = {}

    def all(self) -> list[Summary]:
        """Every run that is there now, the newest first."""
        with self._lock:
            found = {name: self._look(name, Path(path)) for name, path in self._folders()}
            self._kept = {name: kept for name, kept in found.items() if kept is not None}
            runs = [summary for _, summary in self._kept.values()]
        return sorted(runs, key=lambda s: (s.started, natural(s.id)), reverse=True)

    def _folders(self) -> list[tuple[str, str]]:
        try:
            with os.scandir(self.store.root) as entries:
                return [(e.name, e.path) for e in entries if e.name[0] != "." and e.name not in _APART]
        except OSError:
            return []

    def _look(self, name: str, folder: Path) -> tuple[tuple[int, ...], Summary] | None:
        """The summary of a folder with the stamp of its record; None for one that holds no run."""
        whole = os.path.isfile(os.path.join(folder, PARTS[1]))
        try:
            stat = os.stat(os.path.join(folder, PARTS[0]))
        except OSError:
            return ((), _damaged(folder, "its run.json is not there")) if whole else None
        stamp = (stat.st_mtime_ns, stat.st_size, whole)
        known = self._kept.get(name)
        return known if known is not None and known[0] == stamp else (stamp, summary_of(folder))

    def find(self, run_id: str) -> Summary:
        """One run; RequestError when it is gone."""
        return summary_of(self.store.folder(run_id))


def summary_of(folder: Path) -> Summary:
    """The summary of one run folder, whole or damaged."""
    try:
        record = json.loads((folder / PARTS[0]).read_text("utf-8"))
        check_record(record, folder.name)
        recipe, values = record["recipe"], record["result"]["values"]
        inputs, params = dict(recipe["inputs"]), dict(recipe["params"])
        started = datetime.fromisoformat(record["started"]).astimezone(UTC).isoformat(timespec="seconds")
        head = [folder.name, str(recipe["method"]), str(recipe["model"])]
        found = [str(values[n]) for n in ("verdict", "finding") if values.get(n)]
        return Summary(
            folder.name,
            str(recipe["method"]),
            str(recipe["model"]),
            str(record["status"]),
            started,
            float(record["seconds"]),
            inputs,
            params,
            tuple(int(s) for s in recipe["seeds"]),
            tuple(str(e) for e in recipe["edits"]),
            {k: v for k, v in values.items() if isinstance(v, (str, int, float))},
            _images(folder),
            " ".join([*head, *texts_of(inputs), *found]).lower(),
            "" if (folder / PARTS[1]).is_file() else "its arrays.npz is not there",
        )
    except RequestError as error:  # of a newer version
        return _damaged(folder, str(error).rstrip("."))
    except _DAMAGE as error:
        why = str(error) if type(error) is ValueError and " must be " in str(error) else type(error).__name__
        return _damaged(folder, f"its run.json can't be read ({why})")


def _images(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(n[:-4] for n in os.listdir(folder / "images") if n.endswith(".png")))
    except OSError:
        return ()


def _damaged(folder: Path, fault: str) -> Summary:
    try:
        when = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except (OSError, ValueError):
        when = ""
    return Summary(folder.name, started=when, status="damaged", text=folder.name.lower(), fault=fault)


@dataclass(frozen=True)
class Wanted:
    """What is looked for: words that all occur, methods, models, first and last day (ISO, both included),
    only runs with a star. Empty: everything."""

    words: str = ""
    methods: Sequence[str] = ()
    models: Sequence[str] = ()
    since: str = ""
    until: str = ""
    starred: bool = False


def chosen(
    runs: Sequence[Summary], wanted: Wanted, notes: Mapping[str, str], starred: frozenset[str]
) -> list[Summary]:
    """The runs that are looked for, in their order; RequestError for a day that is none."""
    since, until = _day("first", wanted.since), _day("last", wanted.until)
    words = wanted.words.lower().split()[:50]
    found = []
    for run in runs:
        if wanted.methods and run.method not in wanted.methods:
            continue
        if wanted.models and run.model not in wanted.models:
            continue
        if (wanted.starred and run.id not in starred) or not since <= run.started[:10] <= until:
            continue
        text = f"{run.text} {notes.get(run.id, '').lower()}" if words else ""
        if all(word in text for word in words):
            found.append(run)
    return found


def _day(which: str, given: str) -> str:
    """A day as it sorts; the empty field stands for the beginning or the end of time."""
    if not given.strip():
        return "" if which == "first" else "9999"
    try:
        return date.fromisoformat(given.strip()).isoformat()
    except ValueError as error:
        raise RequestError(
            f"The {which} day must be written as 2026-11-21, year, month and day, not {given[:40]!r}."
        ) from error

"""A quota for the store: how much its runs take, what would be pruned, and pruning.

Nothing is pruned on its own: a person sees the plan first and asks for it. Runs with a star are never in a
plan; deleted runs go first, then the oldest runs, and those with a note come last.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from studio.errors import RequestError, StudioError
from studio.run_bin import Bin, Thrown
from studio.run_index import Summary
from studio.run_notes import Notes
from studio.store import Store

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str = "--quota") -> int:
    """Bytes of "5GB", "20 GiB" or "1000000"; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise RequestError(f"{option} must be a size such as 5GB or 20GiB, not {str(text)[:40]!r}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 when it is gone. Links are not followed."""
    total, waiting = 0, [str(folder)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total


@dataclass(frozen=True)
class Plan:
    """What pruning to `quota` bytes would remove, in that order: deleted runs, then runs, with their sizes.

    used: bytes of all runs and of the bin now; left: what would be left.
    """

    quota: int
    used: int
    left: int
    bin: tuple[tuple[Thrown, int], ...] = ()
    runs: tuple[tuple[Summary, int], ...] = ()
    starred: int = 0

    @property
    def said(self) -> str:
        """The plan in a sentence or two."""
        used = f"Runs take {size_text(self.used)} of {size_text(self.quota)}."
        if not self.bin and not self.runs:
            if self.left > self.quota:
                return f"{used} All that could be pruned carries a star."
            return f"{used} Nothing needs to be pruned."
        parts = [f"{_count(len(self.bin), 'deleted run')}"] if self.bin else []
        if self.runs:
            days = sorted(run.started[:10] for run, _ in self.runs)
            span = f"{days[0]} to {days[-1]}" if days[0] != days[-1] else days[0]
            parts.append(f"{_count(len(self.runs), 'run')} of {span}")
        freed = size_text(self.used - self.left)
        short = " Even then it is over, because of runs with a star." if self.left > self.quota else ""
        return f"{used} Pruning would remove {' and '.join(parts)}, {freed}, for good.{short}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class Sizes:
    """Sizes of run folders, measured once each: what is in them does not change."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._kept: dict[Path, int] = {}

    def of(self, folders: Sequence[Path]) -> list[int]:
        """Bytes of each folder."""
        with self._lock:
            self._kept = {f: self._kept[f] if f in self._kept else folder_size(f) for f in folders}
            return [self._kept[f] for f in folders]

    def plan(self, runs: Sequence[Summary], quota: int) -> Plan:
        """What must go so that the runs (newest first) and the bin take at most `quota` bytes."""
        starred, notes = Notes(self.store).starred(), Notes(self.store).texts()
        thrown = Bin(self.store).entries()[::-1]
        folders = [self.store.root / r.id for r in runs] + [Bin(self.store).root / t.name for t in thrown]
        sizes = self.of(folders)
        mine, binned = sizes[: len(runs)], sizes[len(runs) :]
        used = left = sum(sizes)
        doomed_bin, doomed = [], []
        for entry, size in zip(thrown, binned, strict=True):
            if left > quota:
                doomed_bin.append((entry, size))
                left -= size
        free = [(run, size) for run, size in zip(runs, mine, strict=True) if run.id not in starred][::-1]
        for run, size in sorted(free, key=lambda pair: pair[0].id in notes):  # stable: the oldest first
            if left > quota:
                doomed.append((run, size))
                left -= size
        kept = sum(run.id in starred for run in runs)
        return Plan(quota, used, left, tuple(doomed_bin), tuple(doomed), kept)


def prune(store: Store, plan: Plan) -> str:
    """Removes for good what a plan lists and says what was done; a run that was starred since then stays."""
    trash, notes = Bin(store), Notes(store)
    failed = sum(not trash.remove(entry) for entry, _ in plan.bin)
    gone, spared, first = len(plan.bin) - failed, 0, ""
    for run, _ in plan.runs:
        if run.id in notes.starred():
            spared += 1
            continue
        try:
            gone += trash.remove(trash.throw(run.id))
        except RequestError:
            continue  # another studio was quicker
        except StudioError as error:
            failed, first = failed + 1, first or str(error)
    if failed and not gone:
        raise StudioError(
            first or "What was to be pruned could not be removed: the store's folder is read-only."
        )
    more = f" {_count(spared, 'run')} got a star meanwhile and stayed." if spared else ""
    return f"{_count(gone, 'run')} removed for good.{more}" + (f" {failed} could not be." if failed else "")

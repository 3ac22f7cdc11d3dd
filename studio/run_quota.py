"""A quota for the store: how much its runs, kept edits and uploaded images take, what would be pruned, and
pruning.

Nothing is pruned on its own: a person sees the plan first and asks for it. Uploaded images that nothing needs
go first, then deleted runs, then the oldest runs, and those with a note come last. Never in a plan are runs
with a star, edits (a stack in some browser may name them), and images that a run names, a deleted one too, or
that a page used within a day.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from studio.errors import RequestError, StudioError
from studio.run_bin import Bin, Thrown
from studio.run_index import RunIndex, Summary
from studio.run_notes import Notes
from studio.store import QUOTA, Store
from studio.uploads import DAY, Uploads

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SET = re.compile(r"uploads[\\/]+([0-9a-f]{32})")
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str = "--quota") -> int:
    """Bytes of "5GB", "20 GiB" or "1000000"; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise RequestError(f"{option} must be a size such as 5GB or 20GiB, not {str(text)[:40]!r}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def quota_of(given: str | None) -> int:
    """The quota in bytes: what was given, else $LOCUS_QUOTA, else the default. RequestError for no size."""
    if given is not None:
        return parse_size(given)
    named = os.environ.get("LOCUS_QUOTA", "")
    return parse_size(named, "LOCUS_QUOTA") if named else QUOTA


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
    """What pruning to `quota` bytes would remove, in that order: sets of uploaded images (their ids), deleted
    runs, then runs, with their sizes.

    used: bytes of all runs, of the bin, of kept edits (`edits`) and of uploaded images (`uploads`) now; left:
    what would be left; starred: runs with a star; needed: bytes of the uploaded images that stay.
    """

    quota: int
    used: int
    left: int
    bin: tuple[tuple[Thrown, int], ...] = ()
    runs: tuple[tuple[Summary, int], ...] = ()
    starred: int = 0
    edits: int = 0
    uploads: int = 0
    needed: int = 0
    sets: tuple[tuple[str, int], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not (self.sets or self.bin or self.runs)

    @property
    def said(self) -> str:
        """The plan in a few sentences: what is used, what would go, and what pruning leaves."""
        return " ".join(filter(None, (self._taken, self._removed, self._stays)))

    @property
    def _taken(self) -> str:
        more = [f"{what} {size_text(n)}" for what, n in self._others if n]
        runs = size_text(self.used - self.edits - self.uploads)
        if not more:
            return f"Runs take {runs} of {size_text(self.quota)}."
        whole = f"together {size_text(self.used)} of {size_text(self.quota)}"
        return f"Runs take {runs}, {', '.join(more)}; {whole}."

    @property
    def _others(self) -> tuple[tuple[str, int], ...]:
        return ("kept edits", self.edits), ("uploaded images", self.uploads)

    @property
    def _removed(self) -> str:
        if self.empty:
            return "Nothing can be pruned." if self.left > self.quota else "Nothing needs to be pruned."
        parts = (
            [f"{_count(len(self.sets), 'set')} of uploaded images that nothing needs"] if self.sets else []
        )
        parts += [f"{_count(len(self.bin), 'deleted run')}"] if self.bin else []
        if self.runs:
            days = sorted(run.started[:10] for run, _ in self.runs)
            span = f"{days[0]} to {days[-1]}" if days[0] != days[-1] else days[0]
            parts.append(f"{_count(len(self.runs), 'run')} of {span}")
        freed, short = size_text(self.used - self.left), " Even then it is over." * (self.left > self.quota)
        return f"Pruning would remove {_listed(parts)}, {freed}, for good.{short}"

    @property
    def _stays(self) -> str:
        over = self.left > self.quota
        parts = ["runs with a star"] if self.starred and over else []
        parts += [f"edits that a stack may name ({size_text(self.edits)})"] if self.edits else []
        if self.needed:
            parts.append(f"images that a run names or a page used within a day ({size_text(self.needed)})")
        return f"Pruning leaves {_listed(parts)}." if parts else ""


def _listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


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
        """What must go so that the runs (newest first), the bin, kept edits and uploaded images take at most
        `quota` bytes."""
        starred, notes = Notes(self.store).starred(), Notes(self.store).texts()
        thrown = Bin(self.store).entries()[::-1]
        folders = [self.store.root / r.id for r in runs] + [Bin(self.store).root / t.name for t in thrown]
        sizes = self.of(folders)
        mine, binned = sizes[: len(runs)], sizes[len(runs) :]
        edits, needed, unused = folder_size(self.store.root / "edits"), *upload_sizes(self.store, runs)
        uploads = needed + sum(size for _, size in unused)
        used = left = sum(sizes) + edits + uploads
        doomed_bin, doomed, doomed_sets = [], [], []
        for name, size in unused:
            if left > quota:
                doomed_sets.append((name, size))
                left -= size
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
        others = (edits, uploads, needed, tuple(doomed_sets))
        return Plan(quota, used, left, tuple(doomed_bin), tuple(doomed), kept, *others)


class Watch:
    """Says when a store is over its quota. Counted in the background: many runs take a while."""

    def __init__(self, store: Store) -> None:
        self._store, self._sizes, self._index = store, Sizes(store), RunIndex(store)
        self._counting = threading.Lock()
        self._latest = ""

    def said(self) -> str:
        """The sentence of the latest count, empty within the quota; a new count begins."""
        latest = self._latest
        if self._counting.acquire(blocking=False):
            threading.Thread(target=self._begin, name="quota", daemon=True).start()
        return latest

    def _begin(self) -> None:
        try:
            self.count()
        finally:
            self._counting.release()

    def count(self) -> str:
        """The sentence as of now."""
        plan = self._sizes.plan(self._index.all(), self._store.quota)
        self._latest = over(plan.used, plan.quota)
        return self._latest


def over(used: int, quota: int) -> str:
    """That so many bytes are more than the quota, and what to do; empty where they are not."""
    if used <= quota:
        return ""
    return (
        f"The store holds {size_text(used)}, more than its quota of {size_text(quota)}; `locus prune "
        "--dry-run` and the tab Store of Runs show what could go."
    )


def upload_sizes(store: Store, runs: Sequence[Summary]) -> tuple[int, list[tuple[str, int]]]:
    """(bytes of the uploaded images that are needed, [(id of a set that nothing needs, what removing it frees
    after those before it)], the longest unused first). A file that sets share by links counts once."""
    uploads, named = Uploads(store), set(_named_sets(store, runs))
    used = uploads.sets()
    free = [name for name, when in used.items() if name not in named and time.time() - when > DAY]
    seen: set[tuple[int, int]] = set()
    needed = sum(_new_bytes(uploads.root / name, seen) for name in used if name not in free)
    sizes = [(name, _new_bytes(uploads.root / name, seen)) for name in free]
    return needed, sizes[::-1]


def _named_sets(store: Store, runs: Sequence[Summary]) -> Iterator[str]:
    """Ids of the sets that runs name, those in the bin too; of a damaged run all that its file holds."""
    trash = Bin(store)
    unread = [trash.root / entry.name for entry in trash.entries()]
    for run in runs:
        if run.fault:
            unread.append(store.root / run.id)
        else:
            yield from _SET.findall(str(run.inputs))
    for folder in unread:
        with contextlib.suppress(OSError):
            yield from _SET.findall((folder / "run.json").read_text("utf-8", "replace"))


def _new_bytes(folder: Path, seen: set[tuple[int, int]]) -> int:
    """Bytes of a folder's files that were not seen yet."""
    total = 0
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            found = file.lstat()
            if (place := (found.st_dev, found.st_ino)) not in seen:
                seen.add(place)
                total += found.st_size
    return total


def prune(store: Store, plan: Plan) -> str:
    """Removes for good what a plan lists and says what was done; a run that was starred since then stays."""
    trash, notes, uploads = Bin(store), Notes(store), Uploads(store)
    sets = sum(uploads.remove(name) for name, _ in plan.sets)
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
    if failed and not gone and not sets:
        raise StudioError(
            first or "What was to be pruned could not be removed: the store's folder is read-only."
        )
    more = f" {_count(spared, 'run')} got a star meanwhile and stayed." if spared else ""
    done = [f"{_count(sets, 'set')} of images"] if sets else []
    done += [_count(gone, "run")] if gone or not sets else []
    return f"{_listed(done)} removed for good.{more}" + (f" {failed} could not be." if failed else "")

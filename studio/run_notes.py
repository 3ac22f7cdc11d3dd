"""What people add to runs: stars and notes, beside the runs, since a run itself never changes.

A star is an empty file `stars/ID`, a note is `notes/ID.txt`: each change is one atomic step on one file, so
that two studios on one store need no lock and never undo each other's changes to other runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from studio.disk import half_written, reason
from studio.errors import RequestError, StudioError
from studio.store import Store

LONGEST = 20_000  # characters of a note


class Notes:
    """Stars and notes of a store's runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int], str]] = {}  # texts by run, with when they were written

    @property
    def _stars(self) -> Path:
        return self.store.root / "stars"

    @property
    def _notes(self) -> Path:
        return self.store.root / "notes"

    # ---- stars --------------------------------------------------------------------------------------------

    def starred(self) -> frozenset[str]:
        """Ids of the runs that carry a star; some may be gone meanwhile."""
        return frozenset(entry.name for entry in _entries(self._stars))

    def star(self, run_id: str, on: bool) -> None:
        """Gives a run a star or takes it away. RequestError when the run is gone, StudioError when the disk
        takes nothing."""
        self.store.folder(run_id)
        with _said("The star could not be changed"):
            if on:
                self._stars.mkdir(parents=True, exist_ok=True)
                (self._stars / run_id).touch()
            else:
                (self._stars / run_id).unlink(missing_ok=True)

    # ---- notes --------------------------------------------------------------------------------------------

    def texts(self) -> dict[str, str]:
        """{run's id: note} of all notes; only those that changed since the last time are read."""
        with self._lock:
            found = {}
            for entry in _entries(self._notes):
                run_id, suffix = os.path.splitext(entry.name)
                with contextlib.suppress(OSError):  # another studio took it away
                    if suffix == ".txt":
                        stat = entry.stat()
                        found[run_id] = self._kept(Path(entry.path), (stat.st_mtime_ns, stat.st_size))
            self._read = {i: self._read[i] for i in found}
            return found

    def _kept(self, file: Path, stamp: tuple[int, int]) -> str:
        known = self._read.get(file.stem)
        if known is None or known[0] != stamp:
            known = (stamp, file.read_text("utf-8", errors="replace")[:LONGEST])
            self._read[file.stem] = known
        return known[1]

    def text(self, run_id: str) -> str:
        """A run's note, "" when it has none."""
        self.store.folder(run_id)
        try:
            return (self._notes / f"{run_id}.txt").read_text("utf-8", errors="replace")[:LONGEST]
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StudioError(f"The note can't be read: {error.strerror}.") from error

    def write(self, run_id: str, text: str, seen: str | None = None) -> None:
        """Keeps a note ("": takes it away). seen: the note that the person wrote over; RequestError when it
        is another by now, or too long; StudioError when the disk takes nothing."""
        text, now = text.strip(), self.text(run_id)
        if len(text) > LONGEST:
            raise RequestError(f"The note has {len(text):,} characters; at most {LONGEST:,} are kept.")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError("The note holds bytes that are no text; type it again.")
        if seen is not None and now not in (seen.strip(), text):
            raise RequestError(
                f"This note was changed elsewhere meanwhile, to “{now[:300]}”; save again to put yours in "
                "its place."
            )
        file = self._notes / f"{run_id}.txt"
        beside = self._notes / half_written(secrets.token_hex(4))
        with _said("The note could not be saved"):
            if not text:
                file.unlink(missing_ok=True)
                return
            self._notes.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_text(text, "utf-8")
                beside.replace(file)
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)

    def forget(self, run_id: str) -> None:
        """Removes the star and the note of a run that is gone for good."""
        with contextlib.suppress(OSError):
            (self._stars / run_id).unlink(missing_ok=True)
            (self._notes / f"{run_id}.txt").unlink(missing_ok=True)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, half-written files left out; nothing when it is not there."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError:
        return []


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Faults of the disk as a sentence."""
    try:
        yield
    except OSError as error:
        raise StudioError(f"{what}: {reason(error)}; everything else is as it was.") from error

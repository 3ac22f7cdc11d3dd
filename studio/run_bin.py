"""The bin of a store: deleted runs, until they are put back or removed for good.

Deleting is one rename into `.bin`, to a name that says when: TIME~TOKEN~ID. Nothing looks for runs there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from studio.disk import reason
from studio.errors import RequestError, StudioError
from studio.run_notes import Notes
from studio.store import Store

DAYS = 30  # that a deleted run is kept
_DAY = 24 * 3600.0
_NAME = re.compile(r"(\d{1,12})~([0-9a-f]{8})~([\w.-]{1,200})")


@dataclass(frozen=True)
class Thrown:
    """A deleted run: the name under which the bin keeps it, its id, and when it was deleted, in seconds."""

    name: str
    run: str
    when: int


class Bin:
    """The deleted runs of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def root(self) -> Path:
        """The bin's folder."""
        return self.store.root / ".bin"

    def throw(self, run_id: str) -> Thrown:
        """Moves a run, damaged or whole, into the bin. RequestError when it is gone already, StudioError when
        the disk refuses."""
        folder = self.store.folder(run_id)
        thrown = Thrown(f"{int(time.time())}~{secrets.token_hex(4)}~{run_id}", run_id, int(time.time()))
        try:
            self.root.mkdir(exist_ok=True)
            folder.rename(self.root / thrown.name)
        except FileNotFoundError as error:
            raise RequestError(f"The run {run_id} is gone already; another studio deleted it.") from error
        except OSError as error:
            raise StudioError(f"The run {run_id} could not be deleted: {reason(error)}.") from error
        return thrown

    def entries(self) -> list[Thrown]:
        """What is in the bin, the last deleted first."""
        try:
            names = [_NAME.fullmatch(name) for name in os.listdir(self.root)]
        except OSError:
            return []
        found = [Thrown(m[0], m[3], int(m[1])) for m in names if m]
        return sorted(found, key=lambda t: (t.when, t.name), reverse=True)

    def put_back(self, name: str) -> str:
        """Puts a deleted run back into the store and returns its id: another one when that is taken by now.

        RequestError when the bin no longer has it.
        """
        match = _NAME.fullmatch(str(name))
        if match is None or not (self.root / match[0]).is_dir():
            raise RequestError("That run is no longer in the bin, so it can't be put back.")
        for attempt in range(1000):
            run_id = match[3] if not attempt else f"{match[3][:190]}-{attempt + 1}"
            if os.path.lexists(self.store.root / run_id):
                continue
            try:
                (self.root / match[0]).rename(self.store.root / run_id)
            except OSError as error:
                raise StudioError(f"The run could not be put back: {reason(error)}.") from error
            return run_id
        raise StudioError(f"No free name for a run like {match[3]} in {self.store.root}.")

    def remove(self, thrown: Thrown) -> bool:
        """Removes a deleted run for good, with its star and note; False when it could not be removed."""
        folder = self.root / thrown.name
        if folder.is_symlink():
            with contextlib.suppress(OSError):
                folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.lexists(folder):
            return False
        others = any(t.run == thrown.run for t in self.entries())
        if not others and not os.path.lexists(self.store.root / thrown.run):
            Notes(self.store).forget(thrown.run)
        return True

    def sweep(self, days: float = DAYS) -> int:
        """Removes for good what was deleted so many days ago; returns how many runs."""
        return sum(self.remove(t) for t in self.entries() if time.time() - t.when > days * _DAY)

"""Edit files that stacks name: each kept once, under the hash of its bytes, whatever becomes of the run that
made it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from studio.disk import DAY, half_written, reason
from studio.errors import RequestError, StudioError

MOST_PASSING = 64  # edits that single clicks made


class KeptEdits:
    """The edit files below the folder `edits` of a store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keep_edit(self, file: Path, *, passing: bool = False) -> str:
        """Keeps a copy of an edit file under the hash of its bytes, which it returns: stacks name edits so,
        whatever becomes of the run that made one. passing: only a click looks at it, so it goes when it was
        not used for a day or MOST_PASSING newer ones came, unless it is kept for good meanwhile."""
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if self.has_edit(digest) and (passing or self._place(digest).parent == self._edits):
            _use(self._place(digest))
            return digest
        target = (self._passing if passing else self._edits) / f"{digest}.safetensors"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, target)
        except OSError as error:
            raise StudioError(f"The edit could not be kept: {reason(error)}; the file is {file}.") from error
        except StudioError:
            if not target.exists():
                raise
        if passing:
            self._drop(self._unused()[MOST_PASSING:])
        return digest

    def edit_file(self, digest: str) -> Path:
        """The file of an edit that was kept; RequestError when there is none."""
        if not self.has_edit(digest):
            raise RequestError("That edit is no longer in the store; make it again or load its file.")
        place = self._place(digest)
        if place.parent == self._passing:
            _use(place)
        return place

    def has_edit(self, digest: str) -> bool:
        """Whether an edit of that hash is kept."""
        return bool(re.fullmatch(r"[0-9a-f]{64}", digest)) and self._place(digest).is_file()

    def _place(self, digest: str) -> Path:
        name = f"{digest}.safetensors"
        return self._edits / name if (self._edits / name).is_file() else self._passing / name

    @property
    def _edits(self) -> Path:
        return self.root / "edits"

    @property
    def _passing(self) -> Path:
        return self._edits / "passing"

    def _unused(self) -> list[Path]:
        """Passing edits, the last used first."""
        return sorted(self._passing.glob("*.safetensors"), key=_last_used, reverse=True)

    def _drop(self, files: list[Path]) -> int:
        """Removes files; how many of them are gone. Those of a store that can't be written stay."""
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        return sum(not file.exists() for file in files)

    def sweep_edits(self) -> int:
        """Removes passing edits that were not used for a day; returns how many."""
        return self._drop([f for f in self._unused() if time.time() - _last_used(f) > DAY])


def _use(file: Path) -> None:
    """Notes that an edit was used now; on a store that can't be written it is used all the same."""
    with contextlib.suppress(OSError):
        file.touch()


def _last_used(file: Path) -> float:
    """When a file was made or touched, in seconds; 0 when it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def copy_file(source: Path, target: Path) -> None:
    """A copy of one file of a run, whole or not at all; StudioError when it can't be had."""
    beside = target.parent / half_written(f"{secrets.token_hex(4)}-{target.name}")
    try:
        shutil.copyfile(source, beside)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "it came into being meanwhile")
        beside.replace(target)
    except OSError as error:
        why = reason(error, "its folder")
        raise StudioError(f"{target} could not be written ({why}); the file is kept as {source}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)

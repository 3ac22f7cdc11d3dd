"""Edit files that stacks name: each kept once, under the hash of its bytes, whatever becomes of the run that
made it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from studio.errors import RequestError, StudioError

HIDDEN = ".partial-"  # how everything half-written begins
MOST_PASSING = 64  # edits that single clicks made
_DAY = 24 * 3600.0


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
            self._place(digest).touch()
            return digest
        target = (self._passing if passing else self._edits) / f"{digest}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_file(file, target)
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
            place.touch()
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
        for file in files:
            file.unlink(missing_ok=True)
        return len(files)

    def sweep_edits(self) -> int:
        """Removes passing edits that were not used for a day; returns how many."""
        return self._drop([f for f in self._unused() if time.time() - _last_used(f) > _DAY])


def _last_used(file: Path) -> float:
    """When a file was made or touched, in seconds; 0 when it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def copy_file(source: Path, target: Path) -> None:
    """A copy of one file of a run, whole or not at all; StudioError when it can't be had."""
    beside = target.parent / f"{HIDDEN}{os.getpid()}-{secrets.token_hex(4)}-{target.name[:50]}"
    try:
        shutil.copyfile(source, beside)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "it came into being meanwhile")
        beside.replace(target)
    except OSError as error:
        raise StudioError(
            f"{target} could not be written ({error.strerror}); the file is kept as {source}."
        ) from error
    finally:
        beside.unlink(missing_ok=True)

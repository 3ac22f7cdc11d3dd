"""A folder of files that can be made again, within a quota: what was used last stays, the rest makes room."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def mark_used(file: Path) -> None:
    """Says that a file was used just now; nothing when it is gone."""
    with contextlib.suppress(OSError):
        os.utime(file)


def keep_within(folder: Path, most: int, newest: Path) -> int:
    """Removes the least recently used files of the folder until the others hold at most `most` bytes; returns
    how many. `newest` stays whatever its size; hidden files, which are still being written, are not looked
    at. A file that can't be removed stays."""
    sizes: dict[Path, tuple[float, int]] = {}
    for file in folder.glob("[!.]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            found = file.stat()
            if file.is_file() and not file.is_symlink():
                sizes[file] = (found.st_mtime, found.st_size)
    room, gone = most, 0
    for file in sorted(sizes, key=lambda f: (f != newest, -sizes[f][0])):
        room -= sizes[file][1]
        if room < 0 and file != newest:
            with contextlib.suppress(OSError):
                file.unlink()
                gone += 1
    return gone

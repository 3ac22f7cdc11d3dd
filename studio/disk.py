"""What every writer of files needs: names for what is half-written, whose it is, and faults of the disk in
words."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
from pathlib import Path

HIDDEN = ".partial-"  # how everything half-written begins
DAY = 24 * 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BARRED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NAME = re.compile(re.escape(HIDDEN) + r"(\d+)(?:-@([^-]*))?(?:-.*)?", re.DOTALL)


def half_written(name: str) -> str:
    """The name under which a process of this machine writes what will be called `name`; a long one still
    fits."""
    return f"{HIDDEN}{os.getpid()}-@{machine()}-{name[:50]}"


def machine() -> str:
    """This machine's name, of letters, digits, _ and points."""
    return re.sub(r"[^\w.]", "_", platform.node())[:40] or "unknown"


def left_behind(path: Path) -> bool:
    """Whether nobody writes any more what has such a name: its process is gone, or it is another machine's
    and older than a day. A name without a machine is taken for one of this."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return True
    if match[2] not in (None, machine()):
        try:
            return time.time() - path.lstat().st_mtime > DAY
        except OSError:
            return False
    return not _alive(int(match[1]))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def reason(error: OSError, where: str = "the store's folder") -> str:
    """Why the disk did not do what was asked, in words; `where`: what is read-only if it is that."""
    if error.errno in _FULL:
        return "the disk is full"
    if error.errno in _BARRED:
        return f"{where} is read-only"
    return error.strerror or type(error).__name__

"""A finished run that the store does not take is written elsewhere, and taken in later: nothing that was
computed is lost for want of a disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from studio.errors import RequestError, StudioError
from studio.exports import new_folder, to_zip
from studio.restore import Restored, of_zip
from studio.store import Store, run_name, write_run
from studio.types import Figure, Run
from studio.zip_import import run_files

PREFIX = "locus-kept-"  # folders of runs that no store took; nothing sweeps them


def saved(store: Store, run: Run, figure: Figure | None = None) -> Run:
    """The run, kept in the store. StudioError when the store takes nothing: it says where the run lies, and
    carries it as `partial`."""
    try:
        return store.save(run, figure)
    except StudioError as error:
        folder = _elsewhere(run, figure)
        told = str(error).rstrip(".")
        if folder is None:
            raised = StudioError(
                f"{told}, and no other folder took the run either, so what is on screen is all there is; "
                "make room, then run it again."
            )
        else:
            raised = StudioError(
                f"{told}. The run lies in {folder}: make room, then take it in with `locus import {folder} "
                f"--runs {store.root}`."
            )
        raised.partial = run
        raise raised from error


def tried(store: Store, options: Mapping[str, Any]) -> None:
    """StudioError when a job of these options keeps its run and the store could not take it now."""
    if options.get("save", True) and options.get("out") is None:
        store.check_writable()


def _elsewhere(run: Run, figure: Figure | None) -> Path | None:
    """The folder into which the run was written, None when there is none that takes it."""
    for place in _places():
        made = None
        try:
            made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            name = run_name(run)
            for drawn in dict.fromkeys((figure, None)):  # the numbers alone take less room
                with contextlib.suppress(StudioError):
                    write_run(run, made / name, drawn)
                    return made / name
        except OSError:
            pass
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    return None


def _places() -> Iterator[Path]:
    """Folders in which a run may wait: temporary ones, the person's own, and memory."""
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())
    with contextlib.suppress(RuntimeError):
        yield Path.home()
    yield Path("/dev/shm")


def taken_in(folder: Path, store: Store) -> Restored:
    """The run of a folder, copied into the store. What `saved` wrote is this studio's own run, any other is
    marked as imported. RequestError when it holds no whole run, StudioError when the store takes nothing."""
    folder = folder.absolute()
    if not (folder / "run.json").is_file():
        raise RequestError(f"{folder} is no run folder: run.json is not there.")
    packed = to_zip(folder, new_folder() / f"{folder.name}.zip", packed=False, only=run_files(folder))
    try:
        return of_zip(packed, store, own=folder.parent.name.startswith(PREFIX))
    finally:
        shutil.rmtree(packed.parent, ignore_errors=True)

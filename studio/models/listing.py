"""Which models there are, which are ready offline, and what fits this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.errors import StudioError
from studio.models.catalog import CATALOG, Entry
from studio.models.hub import Hub, local_models, offline_state
from studio.models.loaded import needed_bytes
from studio.models.loading import locate

KINDS = {"diffusion": "text to image", "clip": "CLIP", "vision": "vision", "language": "language"}
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.1, "int4": 0.7}
YOURS = "yours"  # the licence of a model that a person brought


@dataclass(frozen=True)
class Known:
    """A model that can be asked for by `name`. size: bytes on disk or to download; need: bytes of weights in
    memory; ready: without a download; fault: why a folder can't be used ("" if it can)."""

    name: str
    kind: str
    licence: str
    size: int
    need: int
    ready: bool
    where: str
    note: str
    fault: str = ""


@dataclass(frozen=True)
class Room:
    """Memory of the device in bytes: `budget` that models may take in all now, free, whole."""

    budget: int
    free: int
    whole: int

    def fits(self, need: int) -> str:
        """ "fits", "tight" (once other programs are closed) or "too large"."""
        return "fits" if need <= self.budget else "tight" if need <= 0.8 * self.whole else "too large"


def known_models(folder: Path | None, dtype: str) -> list[Known]:
    """The catalogue, then what lies in the folder of one's own models; what is ready comes first."""
    rows = [catalogue_row(entry, dtype) for entry in CATALOG.values()]
    rows += [own_row(place, dtype) for place in local_models(folder)] if folder else []
    return sorted(rows, key=lambda row: not row.ready)


def catalogue_row(entry: Entry, dtype: str) -> Known:
    """One model of the catalogue; what it needs in memory is read from its files, or else reckoned from its
    size."""
    ready, where = offline_state(entry)
    size = sum(f.stat().st_size for f in entry.path.rglob("*.safetensors")) if entry.embedded else entry.size
    taken = dtype if entry.family == "language" or dtype not in ("int8", "int4") else "float32"
    need = int(size * _BYTES[taken] / entry.width)
    if ready:
        with contextlib.suppress(StudioError):  # which loading it will say
            need = needed_bytes(locate(entry.name, hub=Hub(asks=True)), dtype)
    return Known(entry.name, entry.family, entry.licence, size, need, ready, where, entry.note)


def own_row(place: Path, dtype: str) -> Known:
    """A folder or checkpoint file of one's own, by its path; its fault in a sentence where it has one."""
    name = place.stem if place.is_file() else place.name
    try:
        source = locate(str(place))
        need = needed_bytes(source, dtype)
        files = [place] if place.is_file() else [*place.rglob("*.safetensors")]
        size = sum(f.stat().st_size for f in files)
    except (StudioError, OSError) as error:
        return Known(name, "", YOURS, 0, 0, False, str(place), "", str(error))
    about = f"{source.family}, {'one checkpoint file' if place.is_file() else 'a folder'}"
    return Known(name, source.kind, YOURS, size, need, True, str(place), about)


def in_memory(row: Known, loaded: Mapping[str, int]) -> int:
    """Bytes that a model takes in memory now; 0 when it is not loaded. `loaded`: by the names they were
    asked for by."""
    return loaded.get(row.name, 0) or loaded.get(row.where, 0)

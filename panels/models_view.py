"""What the Models panel shows: the list, memory in a line, what stands before a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from panels.drawn import Drawn
from studio.models.hub import Offer
from studio.models.listing import KINDS, Known, Room, in_memory

ASK = "Load a model so that its first run starts at once, or fetch one; a run loads what it needs by itself."
_FITS = {
    "fits": "fits",
    "tight": "only when other programs are closed",
    "too large": "too large for this machine",
}


class ModelList(Drawn):
    """The models; its `select` event carries act ("load", "unload", "fetch" or "see") and name. While it can
    be seen it asks every two seconds how things stand ("see")."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            {}, "<div class='models' role='list' aria-label='models'></div>", "models", "models", **options
        )


@dataclass(frozen=True)
class Shown:
    """What the list is made of: models, bytes of those in memory by name, the memory, what is being
    downloaded."""

    rows: Sequence[Known]
    loaded: Mapping[str, int]
    room: Room
    chosen: str = ""
    coming: AbstractSet[str] = frozenset()


def as_value(shown: Shown) -> dict[str, Any]:
    """The value of a ModelList."""
    rows = []
    for r in shown.rows:
        held = in_memory(r, shown.loaded)
        fits = shown.room.fits(r.need) if r.need else ""
        rows.append(
            {
                "name": r.name,
                "ask": r.where if r.licence == "yours" else r.name,
                "about": r.note or r.where,
                "kind": KINDS.get(r.kind, r.kind),
                "licence": r.licence,
                "size": size_text(r.size) if r.size else "",
                "need": f"needs {size_text(r.need)}: {_FITS[fits]}" if fits else "",
                "fits": fits,
                "held": f"in memory, {size_text(held)}" if held else "",
                "ready": r.ready,
                "coming": r.name in shown.coming,
                "fault": r.fault,
            }
        )
    return {"rows": rows}


def size_text(n: int) -> str:
    """Bytes as a person reads them."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e7 else f"{n / 1e6:.1f} MB"


def memory_line(device: str, dtype: str, loaded: Mapping[str, int], room: Room) -> str:
    """What is in memory, how much more may be, on which device."""
    held = ", ".join(f"{n} {size_text(b)}" for n, b in loaded.items()) or "no model"
    where = {"cuda": "GPU memory", "mps": "memory"}.get(device, "memory")
    return (
        f"In memory: {held}. Models may take {size_text(room.budget)} in all; {size_text(room.free)} of "
        f"{size_text(room.whole)} of {where} are free. Weights are held as {dtype}."
    )


def offer_text(offer: Offer, need: int, room: Room, has_token: bool) -> str:
    """What a download would bring, and whether it can be used here."""
    fits = f" In memory it needs about {size_text(need)}: {_FITS[room.fits(need)]}." if need else ""
    token = " Enter your token below first." if offer.gated and not has_token else ""
    return f"{offer}{fits}{token} It is kept in the hub's cache on the studio's machine."

"""A person's stack of edits, plain values that live in the page's State: on and off, order, strength, undo.

An entry names its edit file by the hash under which the store keeps it; a stack never holds a path.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from studio.errors import RequestError

DEPTH = 50  # states that can be undone
MOST = 24  # edits in a stack


@dataclass(frozen=True)
class Entry:
    """One edit in the stack."""

    edit: str
    title: str
    on: bool = True
    strength: float = 1.0


@dataclass(frozen=True)
class Stack:
    """Entries in the order in which they are laid over the model, the picked one (-1: none), and what undo
    and redo go back to."""

    entries: tuple[Entry, ...] = ()
    picked: int = -1
    past: tuple[tuple[tuple[Entry, ...], int], ...] = field(default=(), repr=False)
    future: tuple[tuple[tuple[Entry, ...], int], ...] = field(default=(), repr=False)

    @property
    def chosen(self) -> Entry | None:
        """The picked entry."""
        return self.entries[self.picked] if 0 <= self.picked < len(self.entries) else None

    def active(self) -> list[Entry]:
        """Entries that change something."""
        return [e for e in self.entries if e.on and e.strength != 0]

    # ---- changes, each of which can be undone -------------------------------------------------------------

    def _to(self, entries: tuple[Entry, ...], picked: int) -> Stack:
        if entries == self.entries:
            return replace(self, picked=picked)
        past = (*self.past, (self.entries, self.picked))[-DEPTH:]
        return Stack(entries, min(picked, len(entries) - 1), past, ())

    def add(self, entry: Entry) -> Stack:
        """The entry on top, picked; the same edit again only picks it."""
        for i, known in enumerate(self.entries):
            if known.edit == entry.edit:
                return self.pick(i)
        if len(self.entries) >= MOST:
            raise RequestError(f"A stack holds at most {MOST} edits; remove one first.")
        return self._to((*self.entries, entry), len(self.entries))

    def toggle(self, i: int) -> Stack:
        """Entry i on or off."""
        return self._with(i, on=not self._at(i).on)

    def strengthen(self, i: int, strength: float) -> Stack:
        """Entry i at another strength."""
        if strength is None or not abs(strength) <= 100:
            raise RequestError("The strength must be a number from -100 to 100.")
        return self._with(i, strength=float(strength))

    def move(self, i: int, by: int) -> Stack:
        """Entry i one place up (-1) or down (+1); at the end nothing changes."""
        self._at(i)
        j = i + by
        if not 0 <= j < len(self.entries):
            return self
        order = list(self.entries)
        order[i], order[j] = order[j], order[i]
        return self._to(tuple(order), j)

    def remove(self, i: int) -> Stack:
        """Without entry i."""
        self._at(i)
        rest = self.entries[:i] + self.entries[i + 1 :]
        return self._to(rest, self.picked if self.picked < i else max(self.picked - 1, 0 if rest else -1))

    def replaced(self, entries: tuple[Entry, ...]) -> Stack:
        """Other entries in the place of all, the last one picked."""
        return self._to(entries, len(entries) - 1)

    def pick(self, i: int) -> Stack:
        """Entry i is the one that the slider acts on."""
        self._at(i)
        return replace(self, picked=i)

    def undo(self) -> Stack:
        """As it was before the last change."""
        if not self.past:
            return self
        entries, picked = self.past[-1]
        return Stack(entries, picked, self.past[:-1], (*self.future, (self.entries, self.picked)))

    def redo(self) -> Stack:
        """The change that was undone."""
        if not self.future:
            return self
        entries, picked = self.future[-1]
        return Stack(entries, picked, (*self.past, (self.entries, self.picked)), self.future[:-1])

    def _at(self, i: int) -> Entry:
        if not 0 <= i < len(self.entries):
            raise RequestError("That edit is no longer in the stack.")
        return self.entries[i]

    def _with(self, i: int, **changes: Any) -> Stack:
        entry = replace(self._at(i), **changes)
        return self._to((*self.entries[:i], entry, *self.entries[i + 1 :]), i)

    # ---- to and from the page -----------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """What a browser keeps over a reload."""
        return {"entries": [asdict(e) for e in self.entries], "picked": self.picked}

    @classmethod
    def of(cls, kept: Any) -> Stack:
        """A stack from what a browser kept; anything that isn't one is left out."""
        found = []
        for e in kept.get("entries", []) if isinstance(kept, dict) else []:
            try:
                entry = Entry(str(e["edit"]), str(e["title"])[:300], bool(e["on"]), float(e["strength"]))
            except (KeyError, TypeError, ValueError):
                continue
            if math.isfinite(entry.strength) and abs(entry.strength) <= 100:
                found.append(entry)
        picked = kept.get("picked", -1) if isinstance(kept, dict) else -1
        whole = isinstance(picked, int) and 0 <= picked < len(found)
        return cls(tuple(found[:MOST]), picked if whole else len(found) - 1)

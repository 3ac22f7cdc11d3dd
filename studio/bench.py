"""The benchmark: every figure that the project states, measured in one run and written as one file.

{host, results: [{name, value, unit, bar, holds, how}]}: `bar` is the figure asked for, `holds` whether it is
met (null where none is asked for).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import RequestError

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One measurement. group: "" is always made, others when asked for ("planted", "real-shapes"). run:
    (session, settings, say) to rows."""

    name: str
    group: str
    run: Callable[[Any, Any, Say], list[Row]]


def planted_truth(session: Any, settings: Any, say: Say) -> list[Row]:
    """Methods against what is known to be planted (studio/planted.py)."""
    import torch

    from studio.planted import measure

    torch.set_num_threads(session.threads)
    model, scorer = session.model("atlas-sd", "diffusion"), session.model("atlas-clip", "clip")
    return measure(model, scorer, settings, say, session.batch)


ENTRIES: tuple[Entry, ...] = (Entry("planted-truth", "planted", planted_truth),)


def chosen(groups: Sequence[str], only: Sequence[str]) -> list[Entry]:
    """The entries of these groups, or those named. RequestError for a name that does not exist, and when
    nothing is left."""
    known = {e.name: e for e in ENTRIES}
    if wrong := [n for n in only if n not in known]:
        raise RequestError(f"There is no benchmark {wrong[0][:60]!r}; known: {', '.join(known)}.")
    found = [known[n] for n in only] or [e for e in ENTRIES if e.group in ("", *groups)]
    if not found:
        raise RequestError("No benchmark is chosen; give --planted, or --only with a name.")
    return found


def run_bench(
    session: Any, entries: Sequence[Entry], settings: dict[str, Any], out: Path, say: Say
) -> dict[str, Any]:
    """Runs the entries one after the other and writes the record whole. settings: by entry's name."""
    results: list[Row] = []
    for entry in entries:
        say(entry.name)
        results += entry.run(session, settings.get(entry.name), say)
    record = {"host": session.host(session.batch), "results": results}
    beside = out.with_name(out.name + ".part")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    beside.replace(out)
    return record

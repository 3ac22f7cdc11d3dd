"""The commands of the store: which runs it holds, and pruning it to a quota. Each opens with its help."""

from __future__ import annotations

import json
import sys
from typing import Any

from studio.errors import RequestError
from studio.options import COMMON, parse_options
from studio.run_quota import Plan, Sizes, prune, quota_of, size_text
from studio.store import Store

_RUNS = "Runs in the store, newest first. WORDS must all occur in prompts, other inputs, notes or findings."
_PRUNE = (
    "Removes uploaded images that nothing needs, deleted runs, then the oldest runs, until the store is "
    "within the quota; runs with a note come last. Runs with a star, kept edits and images that a run "
    "names stay. Nothing can be put back afterwards."
)
_LISTED = ("id", "method", "model", "status", "started", "seconds", "title", "fault")


def opened(given: dict[str, Any]) -> Store:
    """The store that the options name."""
    from studio.models.loading import home

    return Store(given.get("runs") or home() / "runs")


def runs(argv: list[str]) -> int:
    """runs: the runs in the store, newest first; words look for some of them"""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    options = {
        "method": (str, "NAME", "only runs of this method", ""),
        "model": (str, "STR", "only runs on this model", ""),
        "since": (str, "DAY", "first day, as 2026-11-21 (UTC)", ""),
        "until": (str, "DAY", "last day", ""),
        "starred": (bool, "", "only runs with a star", ""),
        "runs": (str, *COMMON["runs"], ""),
        "json": (bool, "", "print JSON", ""),
    }
    given = parse_options("runs [WORDS...]", _RUNS, options, argv[count:])
    from studio.run_index import RunIndex, Wanted, chosen
    from studio.run_notes import Notes

    store = opened(given)
    notes = Notes(store)
    texts, starred = notes.texts(), notes.starred()
    wanted = Wanted(
        " ".join(argv[:count]),
        (given["method"],) if "method" in given else (),
        (given["model"],) if "model" in given else (),
        given.get("since", ""),
        given.get("until", ""),
        given["starred"],
    )
    found = chosen(RunIndex(store).all(), wanted, texts, starred)
    if given["json"]:
        rows = [
            {n: getattr(r, n) for n in _LISTED} | {"star": r.id in starred, "note": texts.get(r.id, "")}
            for r in found
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    for r in found:
        told = f"damaged: {r.fault}" if r.fault else f"{r.status:<8} {r.model:<14} {r.title[:60]}"
        print(f"{'*' if r.id in starred else ' '} {r.id:<44} {told}")
    print(f"{len(found)} runs in {store.root}", file=sys.stderr)
    return 0


def prune_runs(argv: list[str]) -> int:
    """prune: removes deleted and old runs until the store is within a quota; --dry-run says which"""
    options = {
        "quota": (
            str,
            "SIZE",
            "what runs, kept edits and uploads may take, such as 5GB",
            "$LOCUS_QUOTA, or 20GB",
        ),
        "dry_run": (bool, "", "only say what would be removed", ""),
        "runs": (str, *COMMON["runs"], ""),
        "json": (bool, "", "print JSON", ""),
    }
    given = parse_options("prune", _PRUNE, options, argv)
    from studio.run_index import RunIndex

    store, quota = opened(given), quota_of(given.get("quota"))
    if not store.root.is_dir():
        raise RequestError(f"There is no store {store.root}; name one with --runs.")
    plan = Sizes(store).plan(RunIndex(store).all(), quota)
    done = "" if given["dry_run"] or plan.empty else prune(store, plan)
    if given["json"]:
        print(json.dumps(_record(plan, bool(done)), indent=1))
        return 0
    lines = [(f"uploaded images {name}", n) for name, n in plan.sets]
    lines += [(t.run, n) for t, n in plan.bin] + [(r.id, n) for r, n in plan.runs]
    for name, size in lines:
        print(f"{size_text(size):>9}  {name}")
    print(plan.said if not done else done)
    return 0


def _record(plan: Plan, done: bool) -> dict[str, Any]:
    """A plan as JSON."""
    sizes = {n: getattr(plan, n) for n in ("quota", "used", "left", "starred", "edits", "uploads")}
    deleted = [{"id": t.run, "bytes": size} for t, size in plan.bin]
    return sizes | {
        "unused_uploads": [{"id": name, "bytes": size} for name, size in plan.sets],
        "deleted": deleted,
        "runs": [{"id": r.id, "bytes": n} for r, n in plan.runs],
        "done": done,
    }

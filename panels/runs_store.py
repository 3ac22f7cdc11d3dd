"""The store's tab of the Runs panel: a quota with what would be pruned, and the bin."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import gradio as gr

from panels.running import STREAM
from panels.runs_view import said_in
from studio.errors import RequestError
from studio.run_quota import Plan, Sizes, parse_size, prune, size_text

MOST_LISTED = 200


class StoreTab:
    """The handlers of the tab. `panel` is the Runs panel, whose list follows."""

    def __init__(self, panel: Any, out: dict[str, Any]) -> None:
        self.panel, self.out = panel, out
        self.sizes = Sizes(panel.session.store)
        self.planned = gr.State([])  # what the page was shown: ids of images, names in the bin, ids of runs

    def wire(self) -> None:
        """Connects everything."""
        out, query = self.out, self.panel.query
        plan = [out[n] for n in ("plan_said", "planned", "prune", "bin", "bin_said", "put_back")]
        shown = [self.planned, *plan]
        latest = dict(trigger_mode="always_last", **STREAM)
        out["plan"].click(self.plan, out["quota"], shown, **latest)
        listed = [*shown, *self.panel.listing]
        out["prune"].click(self.prune, [out["quota"], self.planned, *query], listed, **latest)
        out["put_back"].click(self.put_back, [out["bin"], out["quota"], *query], listed, **latest)

    def made(self, quota: str) -> Plan:
        """What would have to go. RequestError when the quota is no size."""
        return self.sizes.plan(self.panel.index.all(), parse_size(quota, "The quota"))

    def shown(self, plan: Plan, first: str = "") -> dict[Any, Any]:
        """Updates that show a plan and the bin; `first`: a sentence before it."""
        out = self.out
        lines = [f"{size_text(size):>9}\tuploaded images\t{name}" for name, size in plan.sets]
        lines += [f"{size_text(size):>9}\tdeleted\t{entry.run}" for entry, size in plan.bin]
        for run, size in plan.runs:
            lines.append(f"{size_text(size):>9}\t{run.started[:10]}\t{run.id}\t{run.title[:80]}")
        more = [f"… and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
        return {
            self.planned: _names(plan),
            out["plan_said"]: gr.update(value=f"{first} {plan.said}".strip(), visible=True),
            out["planned"]: gr.update(value="\n".join([*lines[:MOST_LISTED], *more]), visible=not plan.empty),
            out["prune"]: gr.Button(interactive=not plan.empty),
            **self.bin(),
        }

    def bin(self) -> dict[Any, Any]:
        """Updates of the bin."""
        entries = self.panel.bin.entries()[:MOST_LISTED]
        choices = [(f"{t.run}, deleted {_time(t.when)}", t.name) for t in entries]
        said = f"{len(entries)} in the bin." if entries else "The bin is empty."
        return {
            self.out["bin"]: gr.update(
                choices=choices, value=entries[0].name if entries else None, visible=bool(entries)
            ),
            self.out["bin_said"]: said,
            self.out["put_back"]: gr.Button(visible=bool(entries)),
        }

    @said_in("plan_said")
    def plan(self, quota: str) -> dict[Any, Any]:
        """Show was pressed."""
        return self.shown(self.made(quota))

    @said_in("plan_said")
    def prune(self, quota: str, planned: list, *query: Any) -> dict[Any, Any]:
        """Prune was pressed; only what was shown is removed."""
        plan = self.made(quota)
        if _names(plan) != planned:
            return self.shown(plan, "The store has changed since; look again, then press Prune.")
        said = prune(self.panel.session.store, plan)
        return {**self.panel.listed(*query), **self.shown(self.made(quota), said)}

    @said_in("bin_said")
    def put_back(self, name: str | None, quota: str, *query: Any) -> dict[Any, Any]:
        """Put back was pressed."""
        if not name:
            raise RequestError("Choose a deleted run first.")
        run_id = self.panel.bin.put_back(name)
        said = {self.out["bin_said"]: f"{run_id} is back in the list."}
        return {**self.panel.listed(*query), **self.bin(), **said}


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _names(plan: Plan) -> list[str]:
    """What a plan removes, by name."""
    sets = [name for name, _ in plan.sets]
    return sets + [entry.name for entry, _ in plan.bin] + [run.id for run, _ in plan.runs]

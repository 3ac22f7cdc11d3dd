"""A file of prompts in a panel: one of its lines put into the fields, or all of them run, one after another.

Every run is kept in the store like any other; at the end stand the tables and the figure of a sweep.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from panels import reopening, widgets
from panels.running import QUIET, STREAM, Running
from studio.errors import Cancelled, RequestError, StudioError
from studio.exports import new_folder
from studio.jobs import Job
from studio.registry import find_method
from studio.runners import Local
from studio.sweep import run_sweep
from studio.sweep_file import Point, Sweep, read_rows
from studio.types import Recipe

MOST = 200  # lines of one file
ASK = "Choose a file: .txt with one prompt a line, or .jsonl with more fields a line."
_FILES = ("csv", "png")


def build(panel: str) -> dict[str, Any]:
    """The inputs and outputs by name, in an accordion of their own."""
    out: dict[str, Any] = {}
    with gr.Accordion("Prompts from a file", open=False, elem_id=f"{panel}-prompts"):
        kinds = dict(file_types=[".txt", ".jsonl"], file_count="single", height=110)
        out["file"] = gr.File(label="File of prompts", elem_id=f"{panel}-prompts-file", **kinds)
        out["line"] = gr.Dropdown(
            [],
            label="Put a line into the fields",
            allow_custom_value=True,
            visible=False,
            elem_id=f"{panel}-prompts-line",
        )
        with gr.Row(visible=False) as out["buttons"]:
            small = dict(size="sm", min_width=90)
            out["all"] = gr.Button("Run all lines", elem_id=f"{panel}-prompts-run", **small)
            out["stop"] = gr.Button("Stop", interactive=False, elem_id=f"{panel}-prompts-stop", **small)
        out["status"] = widgets.line(ASK, f"{panel}-prompts-status", most=6)
        with gr.Row(visible=False) as out["tables"]:
            for kind in _FILES:
                label = f"{'Table' if kind == 'csv' else 'Figure'} of all ({kind})"
                out[kind] = gr.DownloadButton(label, **small, elem_id=f"{panel}-prompts-{kind}")
    out["rows"], out["job"] = gr.State([]), gr.State(None)
    return out


class PromptFile:
    """The handlers of a panel's file of prompts."""

    def __init__(self, panel: Running, out: dict[str, Any]) -> None:
        self.panel, self.out, self.session = panel, out, panel.session

    def wire(self) -> None:
        """Connects the file, its lines, Run all and Stop."""
        out, panel = self.out, self.panel
        shown = [out[n] for n in ("rows", "line", "buttons", "status", "tables")]
        out["file"].change(self.load, out["file"], shown, **QUIET)
        out["line"].input(self.pick, [out["line"], out["rows"]], [*panel.named, out["status"]], **QUIET)
        told = [out[n] for n in ("job", "stop", "all", "status", "tables", *_FILES)]
        out["all"].click(self.run_all, {*panel.named, out["rows"]}, told, **STREAM)
        out["stop"].click(self.stop, out["job"], out["status"], **QUIET)

    # ---- the file -----------------------------------------------------------------------------------------

    def load(self, file: str | None) -> dict[Any, Any]:
        """A file was chosen, or taken away."""
        out = self.out
        hidden = {out[n]: gr.update(visible=False) for n in ("line", "buttons", "tables")}
        if not file:
            return {out["rows"]: [], out["status"]: ASK, **hidden}
        try:
            rows = read_rows(Path(file))
            if len(rows) > MOST:
                raise RequestError(
                    f"The file has {len(rows):,} lines and a panel takes {MOST}; run it as a sweep."
                )
        except StudioError as error:
            said = str(error).replace(str(Path(file)), Path(file).name)
            return {out["rows"]: [], out["status"]: said, **hidden}
        choices = [_label(line, row) for line, row in rows]
        told = f"{len(rows)} line{'s' if len(rows) > 1 else ''}. Put one into the fields, or run all of them."
        return {
            out["rows"]: [[line, row] for line, row in rows],
            out["line"]: gr.update(choices=choices, value=None, visible=True),
            out["buttons"]: gr.update(visible=True),
            out["tables"]: gr.update(visible=False),
            out["status"]: told,
        }

    def pick(self, label: str | None, rows: list) -> dict[Any, Any]:
        """A line was chosen: its values go into the fields of their names."""
        row = next((row for line, row in rows if _label(line, row) == label), None)
        if row is None:
            return {self.out["status"]: "Choose one of the lines of the file."}
        found = {n: v for n, v in row.items() if self._field(n) is not None}
        left = sorted(row.keys() - found.keys())
        said = f"In the fields: {', '.join(found) or 'nothing'}."
        said += f" Not a field here: {', '.join(left)}." if left else ""
        fills = {self._field(n): reopening.in_field(self._field(n), v) for n, v in found.items()}
        return {**fills, self.out["status"]: said}

    def _field(self, name: str) -> Any:
        form = self.panel.form
        return form[name] if name in form and form[name] in self.panel.named else None

    # ---- running ------------------------------------------------------------------------------------------

    def run_all(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """One run a line: everything is checked first, then they run, each in its turn."""
        out, panel = self.out, self.panel
        given = {panel.named[c]: v for c, v in values.items() if c in panel.named}
        try:
            points = self.points(given, values.get(out["rows"]) or [])
        except Exception as error:
            yield {out["status"]: widgets.spoken(error)}
            return
        yield {out["stop"]: gr.Button(interactive=True), out["all"]: gr.Button(interactive=False)}
        done, failed, begun = [], [], time.monotonic()
        for number, (point, recipe) in enumerate(points, 1):
            try:
                job = self.session.submit(recipe, user=str(request.session_hash))
            except StudioError as error:
                failed.append(f"{point}: {error}")
                continue
            panel.viewers.watch(str(request.session_hash), job)
            yield {out["job"]: {"job": job.id, "token": job.token}}
            for _ in widgets.follow(job):
                yield {out["status"]: self.progress(number, len(points), begun, job)}
            if isinstance(job.error, Cancelled):
                break
            failed += [f"{point}: {widgets.sentence(job.error)}"] if job.error else []
            done += [] if job.error else [(point, recipe)]
        yield self.finished(done, failed, len(points))

    def points(self, given: Mapping[str, Any], rows: list) -> list[tuple[Point, Recipe]]:
        """(point, checked recipe) of every line; RequestError names the line that is wrong."""
        if not rows:
            raise RequestError(ASK)
        found = []
        for line, row in rows:
            asked = {
                **given,
                **{n: reopening.in_field(self._field(n), v) for n, v in row.items() if self._field(n)},
            }
            point = Point(0, {}, line, row, asked)
            try:
                recipe = self.panel.recipe(asked)
                own = {f.name for c in _records(recipe) for f in fields(c)}
                if not own & row.keys():
                    raise RequestError(
                        f"{recipe.method} has no field {next(iter(row))!r}; choose another method."
                    )
                found.append((point, self.session.checked(recipe)))
            except RequestError as error:
                raise RequestError(f"{str(point).capitalize()}: {error}") from error
        return found

    def progress(self, number: int, total: int, begun: float, job: Job) -> str:
        """How far all of it is."""
        made = number - 1
        left = (time.monotonic() - begun) / made * (total - made) if made else 0
        rest = f" About {left:.0f} s left in all." if left > 1 else ""
        now = widgets.status(job, self.session.queue.position(job)).rstrip(".")
        return f"Line {number} of {total}. {now}.{rest}"

    def finished(self, done: list, failed: list[str], total: int) -> dict[Any, Any]:
        """What came of it, with the tables of what was made."""
        out = self.out
        said = f"{len(done)} of {total} lines ran; the runs are kept, see Runs."
        said += f" {len(failed)} failed, the first: {failed[0]}" if failed else ""
        update = {
            out["status"]: said,
            out["stop"]: gr.Button(interactive=False),
            out["all"]: gr.Button(interactive=True),
        }
        if not done:
            return update
        folder, recipes = new_folder(), [r for _, r in done]
        sweep = Sweep(find_method(recipes[0].method), tuple(p for p, _ in done), "panel")
        try:
            run_sweep(sweep, recipes, Local(self.session), self.session.store, folder / "all")
        except StudioError as error:
            return {**update, out["status"]: f"{said} The tables could not be written: {error}"}
        files = {k: folder / "all" / f"sweep.{k}" for k in _FILES}
        shown = {out[k]: gr.DownloadButton(value=str(f), visible=f.is_file()) for k, f in files.items()}
        return {**update, out["tables"]: gr.update(visible=True), **shown}

    def stop(self, kept: dict | None) -> str:
        """Stop was pressed: the run under way ends, the other lines are left."""
        job = self.panel.job_of(kept)
        if job is None or job.over:
            return "Nothing is running."
        job.cancel()
        return "Stopping …"


def _records(recipe: Recipe) -> tuple[type, type]:
    method = find_method(recipe.method)
    return method.inputs, method.params


def _label(line: int, row: Mapping[str, Any]) -> str:
    """A line in the list."""
    said = " · ".join(_text(v) for v in row.values())
    return f"{line}: {said if len(said) <= 90 else said[:89] + '…'}"


def _text(value: Any) -> str:
    """A value of a line as a person reads it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

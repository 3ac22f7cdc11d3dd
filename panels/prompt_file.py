"""A file of prompts in a panel: one of its lines put into the fields, or all of them run, one after another.

Every run is kept in the store like any other; at the end stand the tables and the figure of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from panels import reopening, waking, widgets
from panels.prompt_runs import KINDS, LineRun, LineRuns
from panels.running import QUIET, STREAM, Running
from studio.errors import RequestError, StudioError
from studio.registry import Method, find_method, load_methods
from studio.sweep_file import Point, read_rows
from studio.types import Recipe

MOST = 200  # lines that run, or that can be chosen from
GRACE = 120.0  # seconds that the lines go on without a page; a whole file deserves more than a single run
FILES = (".txt", ".jsonl", ".csv")
PLAIN = ("prompt", "texts", "text", "features", "concept")
ASK = "Choose a file: .txt with one prompt a line, or .jsonl or .csv with more fields a line."
OF_FIELDS = " What a line leaves out is as in the fields."


def build(panel: str, ask: str = ASK + OF_FIELDS, title: str = "Prompts from a file") -> dict[str, Any]:
    """The inputs and outputs by name, in an accordion of their own; `ask` says which files are meant."""
    with gr.Accordion(title, open=False, elem_id=f"{panel}-prompts") as fold:
        out: dict[str, Any] = {"fold": fold, "ask": ask, "title": title}
        kinds = dict(file_types=list(FILES), file_count="single", height=110)
        out["file"] = gr.File(label="File", elem_id=f"{panel}-prompts-file", **kinds)
        out["line"] = gr.Dropdown(
            [],
            label="Put a line into the fields",
            info="Choose one, or type its number.",
            allow_custom_value=True,
            visible=False,
            elem_id=f"{panel}-prompts-line",
        )
        with gr.Row(visible=False) as out["buttons"]:
            small = dict(size="sm", min_width=90)
            out["all"] = gr.Button("Run all lines", elem_id=f"{panel}-prompts-run", **small)
            out["stop"] = gr.Button("Stop", interactive=False, elem_id=f"{panel}-prompts-stop", **small)
        out["status"] = widgets.line(ask, f"{panel}-prompts-status", most=6)
        with gr.Row(visible=False) as out["tables"]:
            for kind in KINDS:
                label = f"{'Table' if kind == 'csv' else 'Figure'} of all ({kind})"
                out[kind] = gr.DownloadButton(label, **small, elem_id=f"{panel}-prompts-{kind}")
    out["rows"] = gr.State([])
    return out


class PromptFile:
    """The handlers of a panel's file of prompts. `method`: the one whose lines they are, where the panel's
    form chooses none; `plain`: what a line of text may be, the first that the method has."""

    def __init__(
        self, panel: Running, out: dict[str, Any], method: str = "", plain: tuple[str, ...] = PLAIN
    ) -> None:
        self.panel, self.out, self.session = panel, out, panel.session
        self.fixed, self.plain_names = method, plain
        self.viewers, self.runs = widgets.Viewers(GRACE), LineRuns()
        self.client = widgets.kept_in_browser(f"locus-{panel.panel}-lines")

    def wire(self) -> tuple[Any, Any]:
        """Connects the file, its lines, Run all, Stop, loading and leaving; returns the events after which
        all lines may have ended: Run all and loading."""
        out, named = self.out, [*self.panel.named, *self.also()]
        view = [] if self.fixed else [self.panel.form["method"]]
        shown = [out[n] for n in ("rows", "line", "buttons", "status", "tables")]
        out["file"].change(self.load, [out["file"], *view], [*shown, *named], **QUIET)
        picked = [out["line"].change, out["line"].select]  # select: the same line once more
        last = dict(trigger_mode="always_last", **QUIET)
        self.picked = gr.on(
            picked, self.pick, [out["line"], out["rows"], *view], [*named, out["status"]], **last
        )
        told = [self.client, *(out[n] for n in ("stop", "all", "status", "tables", *KINDS))]
        asked = {*self.panel.named, out["rows"], self.client}
        started = out["all"].click(self.run_all, asked, told, **STREAM)
        out["stop"].click(self.stop, self.client, out["status"], **QUIET)
        back = list(dict.fromkeys([out["fold"], *shown, *told, *named, self.panel.out["status"]]))
        found = waking.when_asked(self.awaited, [self.client], self.restored, [self.client], back, **QUIET)
        loaded = found.then(self.again, self.client, told, **STREAM)
        gr.context.Context.root_block.unload(self.leave)
        return started, loaded

    # ---- what a panel may say otherwise -------------------------------------------------------------------

    def also(self) -> list[Any]:
        """Fields that a file may fill beside those of the panel's run."""
        return []

    def field(self, name: str, method: Method) -> Any:
        """The field in which a column of a file goes, None where there is none."""
        form, own = self.panel.form, widgets.own(name, method)
        found = form.get(own, form.get(name))
        return found if found in self.panel.named else None

    def whole(self, method: Method) -> tuple[Any, int | None]:
        """(the field that takes all lines of a .txt file at once, at most so many), (None, None) without."""
        name, known = self.plain(method), widgets.knobs([method])
        several = name in known and known[name][1] not in (int, float, str, bool)
        return (self.field(name, method) if several else None), None

    def filled(self, label: str) -> str:
        """What is said once the lines of a .txt file stand in the field of that label."""
        return (
            f"They are in “{label}”: press {self.panel.form['run'].value}. Or run all lines, each by itself."
        )

    # ---- the file -----------------------------------------------------------------------------------------

    def method(self, view: str | None = None) -> Method:
        """The method that is chosen."""
        return find_method(self.fixed or str(view))

    def plain(self, method: Method) -> str:
        """The name of what a line of text is."""
        known = widgets.knobs([method])
        return next((n for n in self.plain_names if n in known), "prompt")

    def load(self, file: str | None, view: str | None = None) -> dict[Any, Any]:
        """A file was chosen, or taken away. All lines of a .txt file go into the field that takes several."""
        out = self.out
        hidden = {out[n]: gr.update(visible=False) for n in ("line", "buttons", "tables")}
        if not file:
            return {out["rows"]: [], out["status"]: out["ask"], **hidden}
        try:
            rows = read_rows(Path(file))
            texts = [row["prompt"] for _, row in rows] if Path(file).suffix.lower() == ".txt" else []
            field, most = self.whole(self.method(view)) if texts else (None, None)
            if len(rows) > MOST and field is None:
                raise RequestError(
                    f"The file has {len(rows):,} lines and a panel takes {MOST}; run it as a sweep."
                )
        except StudioError as error:
            said = widgets.sentence(error).replace(str(Path(file)), Path(file).name)
            return {out["rows"]: [], out["status"]: said, **hidden}
        told = f"{len(rows):,} line{'s' if len(rows) > 1 else ''}. "
        if field is None:
            return self.listed(rows, f"{told}Put one into the fields, or run all of them.")
        told += f"The first {most} of them: " if most and len(rows) > most else ""
        update = self.listed(rows, told + self.filled(field.label)) if len(rows) <= MOST else hidden
        said = update.get(out["status"], told + self.filled(field.label).partition(" Or ")[0])
        return {out["rows"]: [], **update, out["status"]: said, field: "\n".join(texts[:most])}

    def listed(self, rows: list, said: str) -> dict[Any, Any]:
        """Updates that offer the lines of a file."""
        out = self.out
        choices = [_label(line, row) for line, row in rows]
        return {
            out["rows"]: [[line, row] for line, row in rows],
            out["line"]: gr.update(choices=choices, value=None, visible=True),
            out["buttons"]: gr.update(visible=True),
            out["tables"]: gr.update(visible=False),
            out["status"]: said,
        }

    def pick(self, label: str | None, rows: list, view: str | None = None) -> dict[Any, Any]:
        """A line was chosen, or its number typed: its values go into the fields of their names."""
        if not label:
            return {self.out["status"]: gr.skip()}
        asked = str(label).strip()
        row = next((row for line, row in rows if asked in (str(line), _label(line, row))), None)
        if row is None:
            return {self.out["status"]: "Choose one of the lines of the file."}
        method = self.method(row.get("method", view) if not self.fixed else None)
        row = self.named(row, method)
        fields = {n: f for n in row if (f := self.field(n, method)) is not None}
        left = sorted(row.keys() - fields.keys())
        said = f"In the fields: {', '.join(f.label for f in fields.values()) or 'nothing'}."
        said += f" Not a field here: {', '.join(left)}." if left else ""
        fills = {f: reopening.in_field(f, row[n]) for n, f in fields.items()}
        return {**fills, self.out["status"]: said}

    def named(self, row: Mapping[str, Any], method: Method) -> dict[str, Any]:
        """A line with its plain text under the name that the method has for it."""
        if list(row) == ["prompt"] and "prompt" not in widgets.knobs([method]):
            return {self.plain(method): row["prompt"]}
        return dict(row)

    # ---- running ------------------------------------------------------------------------------------------

    def run_all(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """One run a line: everything is checked first, then they run, each in its turn."""
        out, panel, page = self.out, self.panel, str(request.session_hash)
        given = {panel.named[c]: v for c, v in values.items() if c in panel.named}
        rows, before = values.get(out["rows"]) or [], self.runs.find(values.get(self.client))
        try:
            if before is not None and not before.over:
                raise RequestError("The lines run already; press Stop first, or wait for their end.")
            kept = {"rows": rows, "given": given}
            run = self.runs.start(LineRun(self.session, self.points(given, rows), page, kept))
        except Exception as error:
            yield {out["status"]: widgets.spoken(error)}
            return
        yield {self.client: {"token": run.token}, out["tables"]: gr.update(visible=False)}
        yield from self.stream(run, page)

    def stream(self, run: LineRun, page: str) -> Iterator[dict]:
        """How far the lines are, until they are over."""
        out, said = self.out, ""
        self.viewers.watch(page, run)
        yield {out["stop"]: gr.Button(interactive=True), out["all"]: gr.Button(interactive=False)}
        while not run.ended.wait(0.25):
            if (now := run.said()) != said:
                said = now
                yield {out["status"]: said}
        yield self.finished(run)

    def points(self, given: Mapping[str, Any], rows: list) -> list[tuple[Point, Recipe]]:
        """(point, checked recipe) of every line; RequestError names the line that is wrong."""
        if not rows:
            raise RequestError(self.out["ask"])
        found = []
        for line, row in rows:
            try:
                asked = {**given, **self.values(row, given)}
                recipe = self.session.checked(self.panel.recipe(asked))
            except RequestError as error:
                raise RequestError(f"Line {line}: {error}") from error
            found.append((Point(0, {}, line, row, asked), recipe))
        return found

    def values(self, row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What a line puts in the place of the fields' values, by their names in the form. RequestError for a
        column that has no field; one that only other methods have is passed over, as in a sweep."""
        method = self.method(row.get("method", given.get("method")) if not self.fixed else None)
        known, found, row = widgets.knobs([method]), {}, self.named(row, method)
        for name, value in row.items():
            if (field := self.field(name, method)) is not None:
                found[self.panel.named.get(field, name)] = reopening.in_field(field, value)
            elif name in known or name not in widgets.knobs(list(load_methods().values())):
                raise RequestError(f"{name!r} is no field here; take it out of the file.")
        used = known.keys() | {"model", "seeds", "method"}
        if not used & row.keys():
            raise RequestError(f"{method.title} has no field {next(iter(row))!r}; choose another method.")
        return found

    def finished(self, run: LineRun) -> dict[Any, Any]:
        """What came of it, with the tables of what was made."""
        out = self.out
        said = f"{len(run.made)} of {len(run.points)} lines ran"
        said += "; the runs are kept, see Runs." if run.made else "."
        said += f" {len(run.failed)} failed, the first: {run.failed[0]}" if run.failed else ""
        if run.left:
            said += " Run all lines goes on with the others; what is kept is found at once."
        files = {k: f for k, f in run.files.items() if f.is_file()}
        shown = {out[k]: gr.update(value=files.get(k), visible=k in files) for k in KINDS}
        return {
            out["status"]: f"{said} {run.fault}".strip(),
            out["stop"]: gr.Button(interactive=False),
            out["all"]: gr.Button(interactive=True),
            out["tables"]: gr.update(visible=bool(files)),
            **shown,
        }

    def stop(self, kept: dict | None) -> str:
        """Stop was pressed: the run under way ends, the other lines are left."""
        run = self.runs.find(kept)
        if run is None or run.over:
            return "Nothing is running."
        run.cancel()
        return "Stopping …"

    # ---- loading and leaving ------------------------------------------------------------------------------

    def awaited(self, kept: dict | None, request: gr.Request) -> dict[str, bool] | None:
        """The page is alive: whether this browser runs, or ran, the lines of a file, and whether the fields
        are to be as they were then: where lines are left, and no link says otherwise."""
        run = self.runs.find(kept)
        if run is None:
            return None
        return {"fields": bool(run.left) and not set(request.query_params) - {"tab", "__theme"}}

    def restored(self, asked: dict[str, bool], kept: dict | None) -> dict[Any, Any]:
        """The lines of the file are offered again, with what came of them, or what can be done meanwhile. One
        answer outside the queue: a page that is just there may lose what is streamed."""
        run, out = self.runs.find(kept), self.out
        if run is None:
            return {out["status"]: gr.skip()}
        update = {out["fold"]: gr.update(open=True), **self.listed(run.page["rows"], run.said())}
        if asked["fields"]:
            given, fields = run.page["given"], gr.components.FormComponent
            update |= {
                c: given[n] for c, n in self.panel.named.items() if n in given and isinstance(c, fields)
            }
        if run.over:
            return update | self.finished(run)
        update |= {out["stop"]: gr.Button(interactive=True), out["all"]: gr.Button(interactive=False)}
        said = f"The lines of a file were taken up again, see “{out['title']}”."
        return update | {self.panel.out["status"]: said}

    def again(self, kept: dict | None, request: gr.Request) -> Iterator[dict]:
        """Lines that still run are followed."""
        run = self.runs.find(kept)
        if run is None or run.over:
            yield {self.out["status"]: gr.skip()}
            return
        yield from self.stream(run, str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The page is gone; lines that nobody looks on are stopped after a grace."""
        self.viewers.leave(str(request.session_hash))


def _label(line: int, row: Mapping[str, Any]) -> str:
    """A line in the list."""
    said = " · ".join(_text(v) for v in row.values())
    return f"{line}: {said if len(said) <= 90 else said[:89] + '…'}"


def _text(value: Any) -> str:
    """A value of a line as a person reads it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""The Runs panel: every run that was kept, found again, opened again, compared, laid out in a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from panels import reopening, runs_form, runs_view, waking, widgets
from panels.running import QUIET, STREAM
from panels.runs_compare import Compare
from panels.runs_grid import Grid
from panels.runs_store import StoreTab
from panels.runs_view import ASK, EMPTY, NOTHING, said_in
from studio.errors import RequestError, StudioError
from studio.models.catalog import ASSETS
from studio.restore import ManyRuns, restored
from studio.run_bin import DAYS, Bin
from studio.run_index import RunIndex, Summary, Wanted, chosen
from studio.run_notes import Notes
from studio.session import Session

TITLE = "Runs"
NEEDS = ""
QUESTION = "What was run, what came of it, and how do two runs differ?"
PAGE = 20  # runs on a page of the list
FILTERS = ("words", "methods", "models", "since", "until", "starred")
TYPED = ("words", "since", "until")
LOST = "This run is no longer there: it was deleted in another window, or pruned."


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = runs_form.form()
        with gr.Column(scale=4, min_width=320):
            out = runs_form.outputs(session.store.quota)
    _Panel(session, form, out).wire()


class _Panel:
    """The panel's handlers. A page holds ids alone: of the chosen run, of those that are ticked, and of what
    it deleted."""

    def __init__(self, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        self.session, self.form, self.out = session, form, out
        self.index, self.notes = RunIndex(session.store), Notes(session.store)
        self.bin = Bin(session.store)
        self.page, self.chosen, self.ticked = gr.State(0), gr.State(""), gr.State([])
        self.thrown, self.seen = gr.State([]), gr.State("")  # what undo puts back; the note as it was shown

    # ---- wiring -------------------------------------------------------------------------------------------

    def wire(self) -> None:
        """Connects everything."""
        form, out = self.form, self.out
        self.query = [*(form[n] for n in FILTERS), self.page, self.chosen, self.ticked]
        self.listing = [form[n] for n in ("list", "count", "newer", "older", "methods", "models")]
        self.listing += [self.page, self.chosen, self.ticked, out["status"]]
        names = "text open star link delete address figure images no_images values recipe note keep"
        self.detail = [out[n] for n in names.split()] + [self.seen, out["export"]["row"]]
        everything = [*self.listing, *self.detail, self.thrown, out["undo"]]
        often, latest = (dict(trigger_mode=m, **QUIET) for m in ("multiple", "always_last"))
        tab = gr.context.Context.block
        if isinstance(tab, gr.Tab):
            tab.select(self.refresh, self.query, self.listing, **latest)
        form["refresh"].click(self.refresh, self.query, self.listing, **latest)
        typed = [form[n].change for n in TYPED]  # `input` of a text field is not told of what is pasted
        gr.on(
            [*typed, *(form[n].input for n in FILTERS if n not in TYPED)],
            self.searched,
            self.query,
            self.listing,
            **latest,
        )
        form["newer"].click(self.newer, self.query, self.listing, **often)
        form["older"].click(self.older, self.query, self.listing, **often)
        picked = form["list"].select(self.act, self.query, everything, **often)
        self.then_export(picked)
        out["star"].click(self.star, self.query, [*self.listing, out["star"]], **often)
        kept = [out["note"], self.seen, *self.query]
        out["keep"].click(self.keep, kept, [*self.listing, self.seen], **often)
        out["delete"].click(self.delete, [self.thrown, *self.query], everything, **often)
        self.then_export(out["undo"].click(self.undo, [self.thrown, *self.query], everything, **often))
        copied = out["link"].click(
            None, self.chosen, out["address"], js=(ASSETS / "js" / "copy-link.js").read_text()
        )
        copied.then(self.copied, out["address"], [out["address"], out["status"]], **QUIET)
        self._wire_opening(everything)
        Compare(self.session, out, self.chosen, self.ticked).wire()
        Grid(self, out).wire()
        StoreTab(self, out).wire()

    def then_export(self, event: Any) -> None:
        """After an event that chose a run: its exports, made beside it."""
        buttons = list(self.out["export"].values())
        event.then(self.export, self.chosen, buttons, trigger_mode="always_last", **STREAM)

    def _wire_opening(self, everything: list[Any]) -> None:
        """A run is opened by its button, by a link, or by a file that is dropped."""
        form, out, script = self.form, self.out, reopening.open_script()
        tabs = getattr(gr.context.Context.block, "parent", None)
        self.tabs = tabs if isinstance(tabs, gr.Tabs) else gr.State(None)
        handed = [out["handoff"], self.tabs, out["status"]]
        shown = list(dict.fromkeys([*handed, *everything]))
        dropped = [*shown, form["drop"]]
        for event in (
            out["open"].click(self.open, self.query, shown, **QUIET),
            form["drop"].upload(self.drop, [form["drop"], *self.query], dropped, **STREAM),
            waking.when_asked(self.address, [], self.linked, self.query, shown, **QUIET),
        ):
            event.then(None, out["handoff"], None, js=script)
            self.then_export(event)

    # ---- the list -----------------------------------------------------------------------------------------

    def found(self, *filters: Any, runs: list[Summary] | None = None) -> list[Summary]:
        """The runs (all unless given) that fit the filters, the newest first. RequestError when a day is
        none."""
        words, methods, models, since, until, starred = filters[:6]
        runs = self.index.all() if runs is None else runs
        wanted = Wanted(
            str(words or ""), methods or (), models or (), since or "", until or "", bool(starred)
        )
        return chosen(runs, wanted, self.notes.texts(), self.notes.starred())

    def page_of(self, run_id: str, *query: Any) -> int:
        """The page of the list on which a run stands; the present one for a run that was not found."""
        places = [run.id for run in self.found(*query)]
        return places.index(run_id) // PAGE if run_id in places else int(query[6] or 0)

    def listed(self, *query: Any) -> dict[Any, Any]:
        """Updates of the list, of what is said about it, and of the choices in the filters."""
        form, (page, picked, ticked) = self.form, query[6:]
        runs = self.index.all()
        found = self.found(*query, runs=runs)
        there = {run.id for run in runs}
        ticked = [t for t in ticked or [] if t in there]
        pages = max(1, -(-len(found) // PAGE))
        page = min(max(int(page or 0), 0), pages - 1)
        shown = found[page * PAGE : (page + 1) * PAGE]
        hint = NOTHING if runs else EMPTY
        value = runs_view.as_value(shown, self.notes.starred(), self.notes.texts(), ticked, picked, hint)
        methods, models = (sorted({getattr(r, n) for r in runs} - {""}) for n in ("method", "model"))
        return {
            form["list"]: value,
            form["count"]: _count(len(runs), len(found), page, pages, len(ticked)),
            form["newer"]: gr.Button(interactive=page > 0),
            form["older"]: gr.Button(interactive=page < pages - 1),
            form["methods"]: gr.update(choices=methods),
            form["models"]: gr.update(choices=models),
            self.page: page,
            self.ticked: ticked,
        }

    @said_in("status")
    def refresh(self, *query: Any) -> dict[Any, Any]:
        """The tab was opened, or Refresh pressed."""
        return self.listed(*query)

    @said_in("status")
    def searched(self, *query: Any) -> dict[Any, Any]:
        """Words or filters changed: the first page of what fits."""
        return self.listed(*query[:6], 0, *query[7:])

    @said_in("status")
    def newer(self, *query: Any) -> dict[Any, Any]:
        """One page back."""
        return self.listed(*query[:6], int(query[6] or 0) - 1, *query[7:])

    @said_in("status")
    def older(self, *query: Any) -> dict[Any, Any]:
        """One page on."""
        return self.listed(*query[:6], int(query[6] or 0) + 1, *query[7:])

    @said_in("status")
    def act(self, event: gr.EventData, *query: Any) -> dict[Any, Any]:
        """Something in the list was pressed: a run chosen, starred, or ticked."""
        run_id, what = str(getattr(event, "id", ""))[:300], getattr(event, "act", "")
        *filters, picked, ticked = query
        if self.gone(run_id):
            return self.lost(*query)
        if what == "star":
            self.notes.star(run_id, run_id not in self.notes.starred())
        elif what == "tick":
            ticked = [t for t in ticked if t != run_id] if run_id in ticked else [*ticked, run_id]
        else:
            return {**self.listed(*filters, run_id, ticked), **self.show(run_id)}
        more = {self.out["star"]: self.star_button(run_id)} if run_id == picked else {}
        return {**self.listed(*filters, picked, ticked), **more}

    # ---- one run ------------------------------------------------------------------------------------------

    def gone(self, run_id: str) -> bool:
        """Whether a run is no longer there."""
        try:
            self.session.store.folder(run_id)
        except RequestError:
            return True
        return False

    def lost(self, *query: Any) -> dict[Any, Any]:
        """Updates for a run that is gone: the list as it is now, nothing chosen, and a sentence."""
        listed = self.listed(*query[:7], "", query[8])
        return {**listed, **self.nothing(), self.out["status"]: LOST}

    def nothing(self) -> dict[Any, Any]:
        """Updates when no run is chosen."""
        out, hidden = self.out, gr.update(visible=False, value=None)
        dead = {out[n]: gr.Button(interactive=False) for n in ("star", "link", "delete", "keep")}
        return {
            **dead,
            self.chosen: "",
            self.seen: "",
            out["open"]: runs_view.open_button(None),
            out["text"]: ASK,
            out["no_images"]: gr.update(value=ASK, visible=True),
            out["note"]: gr.update(value="", interactive=False),
            out["export"]["row"]: gr.Row(visible=False),
            **{out[n]: hidden for n in ("figure", "images", "address")},
            **{out[n]: "" for n in ("values", "recipe")},
        }

    def show(self, run_id: str) -> dict[Any, Any]:
        """Updates that show one run; what is damaged is said, and can be deleted."""
        out, note = self.out, self.notes.text(run_id)
        live = {out[n]: gr.Button(interactive=True) for n in ("link", "delete", "keep")}
        live |= {self.chosen: run_id, self.seen: note, out["star"]: self.star_button(run_id)}
        live |= {
            out["note"]: gr.update(value=note, interactive=True),
            out["address"]: gr.update(visible=False),
        }
        try:
            run = self.session.store.load(run_id)
        except StudioError as error:
            said = f"{widgets.spoken(error)} It can be deleted here."
            return {**self.nothing(), **live, out["text"]: said, out["status"]: "This run is damaged."}
        figure = runs_view.figure_of(run, self.session.store.path(run_id))
        images, count = runs_view.pictures(run), len(run.result.images)
        more = f"The first {len(images)} of {count} images." if count > len(images) else ""
        return {
            **live,
            out["status"]: "Ready.",
            out["open"]: runs_view.open_button(run.recipe),
            out["text"]: runs_view.headline(run),
            out["figure"]: gr.update(value=figure, visible=figure is not None),
            out["images"]: gr.update(value=images, visible=bool(images)),
            out["no_images"]: gr.update(
                value=more if images else "This run has no images.", visible=bool(more or not images)
            ),
            out["values"]: runs_view.values_text(run),
            out["recipe"]: runs_view.recipe_text(run),
        }

    def export(self, run_id: str) -> dict[Any, Any]:
        """The exports of the chosen run; none of one that is damaged or gone."""
        buttons = self.out["export"]
        try:
            return widgets.exported(self.session.store.path(run_id), buttons)
        except Exception:  # the run itself says what is wrong with it
            return {buttons["row"]: gr.Row(visible=False)}

    # ---- what people add ----------------------------------------------------------------------------------

    def star_button(self, run_id: str) -> Any:
        """The button that gives the chosen run a star, or takes it."""
        on = run_id in self.notes.starred()
        return gr.Button("★ Take the star away" if on else "☆ Give a star", interactive=True)

    @said_in("status")
    def star(self, *query: Any) -> dict[Any, Any]:
        """The star of the chosen run was pressed."""
        run_id = query[7]
        if self.gone(run_id):
            told = {self.out["status"]: LOST, self.out["star"]: gr.Button(interactive=False)}
            return {**self.listed(*query), **told}
        self.notes.star(run_id, run_id not in self.notes.starred())
        return {**self.listed(*query), self.out["star"]: self.star_button(run_id)}

    @said_in("status")
    def keep(self, text: str, seen: str, *query: Any) -> dict[Any, Any]:
        """Save note was pressed. Over a note that was changed elsewhere it is saved the second time."""
        run_id, out = query[7], self.out
        if self.gone(run_id):
            said = "This run is no longer there; copy your note before you choose another."
            return {**self.listed(*query), out["status"]: said}
        try:
            self.notes.write(run_id, text or "", seen)
        except RequestError as error:
            return {out["status"]: widgets.spoken(error), self.seen: self.notes.text(run_id)}
        said = "The note is saved." if (text or "").strip() else "The note is taken away."
        return {**self.listed(*query), self.seen: (text or "").strip(), out["status"]: said}

    @said_in("status")
    def delete(self, thrown: list, *query: Any) -> dict[Any, Any]:
        """Delete was pressed."""
        run_id = query[7]
        if self.gone(run_id):
            return self.lost(*query)
        name = self.bin.throw(run_id).name
        said = f"Deleted. It stays in the bin for {DAYS} days; Undo delete puts it back."
        return {
            **self.listed(*query[:7], "", query[8]),
            **self.nothing(),
            self.thrown: [*(thrown or []), name][-50:],
            self.out["undo"]: gr.Button(visible=True),
            self.out["status"]: said,
        }

    @said_in("status")
    def undo(self, thrown: list, *query: Any) -> dict[Any, Any]:
        """Undo delete was pressed: the last one that this page deleted."""
        if not thrown:
            raise RequestError("Nothing was deleted in this window.")
        *rest, last = thrown
        left = {self.thrown: rest, self.out["undo"]: gr.Button(visible=bool(rest))}
        try:
            run_id = self.bin.put_back(last)
        except RequestError as error:
            return {**left, **self.listed(*query), self.out["status"]: widgets.spoken(error)}
        back = {**self.listed(*query[:7], run_id, query[8]), **self.show(run_id)}
        return {**back, **left, self.out["status"]: "Put back."}

    def copied(self, address: str) -> dict[Any, Any]:
        """The link was copied by the page."""
        said = "The link is copied; it stands below the buttons too."
        return {self.out["address"]: gr.update(visible=bool(address)), self.out["status"]: said}

    # ---- opening ------------------------------------------------------------------------------------------

    def handed(self, run_id: str, *query: Any) -> dict[Any, Any]:
        """Updates that open a run in its panel, or here when it has none."""
        recipe = self.session.store.load(run_id).recipe
        told = runs_view.opening(recipe, run_id)
        if told is None:
            shown = {**self.listed(*query[:7], run_id, query[8]), **self.show(run_id)}
            return {**shown, self.out["handoff"]: "", self.tabs: gr.Tabs(selected=TITLE.lower())}
        return {self.out["handoff"]: told[1], self.tabs: gr.Tabs(selected=told[0])}

    @said_in("status")
    def open(self, *query: Any) -> dict[Any, Any]:
        """Open was pressed."""
        if self.gone(query[7]):
            return {**self.lost(*query), self.out["handoff"]: ""}
        return self.handed(query[7], *query)

    def address(self, request: gr.Request) -> dict[str, str] | None:
        """The page was loaded: what its address says, where that names a run or a tab."""
        asked = dict(request.query_params)
        return asked if asked.get("run") or asked.get("tab") else None

    def linked(self, asked: dict[str, str] | None, *query: Any) -> dict[Any, Any]:
        """The run or the tab that the page's address names."""
        asked, first = asked or {}, {self.out["handoff"]: ""}
        try:
            first |= self.listed(*query)
            if asked.get("run"):
                return {**first, **self.handed(str(asked["run"])[:300], *query)}
        except Exception as error:
            here = {self.tabs: gr.Tabs(selected=TITLE.lower())} if asked.get("run") else {}
            return {**first, **here, self.out["status"]: widgets.spoken(error)}
        tab = str(asked.get("tab", "")).lower()
        known = isinstance(self.tabs, gr.Tabs) and tab in [t.id for t in self.tabs.children]
        return {**first, **({self.tabs: gr.Tabs(selected=tab)} if known else {})}

    def drop(self, file: str | None, *query: Any) -> dict[Any, Any]:
        """A file was dropped: its run is opened, or its recipe put into the panel's inputs."""
        out = {self.form["drop"]: None, self.out["handoff"]: ""}
        try:
            found = restored(Path(file or ""), self.session.store)
            if found.run_id:
                back = self.handed(found.run_id, *query)
                return {**self.listed(*query), self.out["status"]: found.said, **out, **back}
            told = runs_view.opening(found.recipe, None)
            if told is None:
                raise RequestError(f"{found.said} No tab has inputs for {found.recipe.method}.")
            opened = {self.tabs: gr.Tabs(selected=told[0]), self.out["handoff"]: told[1]}
            return {**out, **opened, self.out["status"]: found.said}
        except Exception as error:
            said = widgets.spoken(error).replace(str(file), Path(file or "").name)
            if isinstance(error, ManyRuns) and error.runs:
                ticked = self.listed(*query[:8], list(error.runs))
                return {
                    **out,
                    **ticked,
                    self.out["status"]: f"{said} They are ticked: compare two, or draw a grid.",
                }
            return {**out, self.out["status"]: said}


def _count(runs: int, found: int, page: int, pages: int, ticked: int) -> str:
    """How many runs there are, were found, and are ticked."""
    said = f"{found} of {runs} runs" if found != runs else f"{runs} run{'' if runs == 1 else 's'}"
    said += f", page {page + 1} of {pages}" if pages > 1 else ""
    return said + (f"; {ticked} ticked" if ticked else "") + "."

"""A panel's run: Run was pressed, lines and partial results stream, Stop, and a reload takes it up again.

What a page has on screen is in its own State: ids of a job and of a run, and beside them what was clicked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import gradio as gr

from panels import reopening, waking, widgets, words
from panels.waking import QUIET
from studio.errors import RequestError
from studio.jobs import Job
from studio.session import Session
from studio.types import Recipe, Result, Run

# Generators must queue, and what may be refused: outside the queue a page shows no notice of an error.
STREAM = dict(concurrency_limit=None, show_progress="hidden", api_visibility="private")


class Running(ABC):
    """Base of a panel's handlers. `form` and `out` are inputs and outputs by name; run, stop and status are
    among them, and perhaps the row of export buttons under "export"."""

    LAYS_EDITS = False  # whether its runs go under the stack of edits
    EARLIER = "What is shown below is of the run before."  # said when Run is refused and results are there

    def __init__(self, panel: str, session: Session, form: dict[str, Any], out: dict[str, Any]) -> None:
        self.panel, self.session, self.form, self.out = panel, session, form, out
        self.viewers = widgets.Viewers()
        self.state, self.cell = gr.State({}), gr.State(None)  # what runs or ran; what was clicked of it
        self.client = widgets.kept_in_browser(f"locus-{panel}")
        self.named = {c: n for n, c in form.items() if isinstance(c, gr.components.FormComponent)}

    # ---- what a panel says of itself ----------------------------------------------------------------------

    @abstractmethod
    def recipe(self, given: dict[str, Any]) -> Recipe:
        """The recipe that the inputs describe; RequestError when one is wrong."""

    @abstractmethod
    def drawn(self, recipe: Recipe, result: Result, again: bool = False) -> dict[Any, Any]:
        """Updates that show results so far; `again` when they are shown for the last time."""

    def cleared(self) -> dict[Any, Any]:
        """Updates at the start of a run: nothing stale stays on screen."""
        return {}

    def empty(self) -> dict[Any, Any]:
        """Updates after a run that measured nothing."""
        return {}

    def ended(self, job: Job) -> dict[Any, Any]:
        """Updates after a run that is kept: the finding in a sentence, and what to do next."""
        return {}

    # ---- wiring -------------------------------------------------------------------------------------------

    @property
    def fields(self) -> list[Any]:
        """Outputs other than the export buttons."""
        return [c for name, c in self.out.items() if name != "export"]

    def wire_run(self, *also: Any) -> tuple[Any, Any]:
        """Connects Run (and the submit events `also`), Stop, loading and leaving; returns the events after
        which a run may have ended: Run and loading."""
        form, out = self.form, self.out
        buttons = out["export"].values() if "export" in out else ()
        shown = [self.state, self.cell, self.client, form["run"], form["stop"], *self.fields, *buttons]
        runs = dict(outputs=shown, **STREAM)
        started = gr.on([form["run"].click, *also], self.start, {*self.named, self.state}, **runs)
        form["stop"].click(self.stop, self.client, out["status"], **QUIET)
        filled = list(dict.fromkeys([*shown, *self.named]))
        loaded = waking.when_asked(self.awaited, [self.client], self.again, [self.client], filled, **STREAM)
        gr.context.Context.root_block.unload(_leaver(self.viewers))
        opener, back = reopening.Opener(self.panel), [*shown, *self.named, *self.also_restored()]
        outputs = list(dict.fromkeys(back))
        self.reopened = opener.select(self.reopen, [self.client, *self.also_asked()], outputs, **STREAM)
        return started, loaded

    # ---- handlers -----------------------------------------------------------------------------------------

    def start(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run was pressed: checks, queues, and streams."""
        given = {self.named[c]: v for c, v in values.items() if c in self.named}
        try:
            job = self.session.submit(self.recipe(given), user=widgets.person(request))
        except Exception as error:
            earlier = self.EARLIER if values.get(self.state) else ""
            yield {self.out["status"]: f"{widgets.spoken(error)} {earlier}".strip()}
            return
        self.viewers.watch(str(request.session_hash), job)
        yield {
            self.client: {"job": job.id, "token": job.token},
            self.state: {},
            self.cell: None,
            self.form["stop"]: gr.Button(interactive=True),
            self.out["status"]: "Starting …",
            **({self.out["export"]["row"]: gr.Row(visible=False)} if "export" in self.out else {}),
            **self.cleared(),
        }
        yield from self.stream(job)

    def awaited(self, kept: dict | None, request: gr.Request) -> dict[str, str] | None:
        """The page is alive: the link that it came by, where it has inputs for this panel; empty where only a
        job of this browser is to be taken up; None where there is neither."""
        job, query = self.job_of(kept), dict(request.query_params)
        runs = job is not None and not job.over
        if runs:
            self.viewers.watch(str(request.session_hash), job)
        linked = query.get("tab", "").lower() == self.panel and len(query) > 1
        return query if linked else {} if runs else None

    def again(self, link: dict[str, str], kept: dict | None, request: gr.Request) -> Iterator[dict]:
        """A link's inputs are put in. A job that this browser started is taken up if it runs."""
        yield {self.state: gr.skip(), **reopening.linked(link or {}, self.form, self.named)}
        job = self.job_of(kept)
        if job is None or job.over:
            return
        yield from self.stream(job)

    def stop(self, kept: dict | None) -> str:
        """Stop was pressed."""
        job = self.job_of(kept)
        if job is None or job.over:
            return "Nothing is running."
        job.cancel()
        return "Stopping …"

    def stream(self, job: Job) -> Iterator[dict]:
        """Status lines and partial results of a job until it is over, then exports."""
        last, out, stop = None, self.out, self.form["stop"]
        for _ in widgets.follow(job):
            update: dict[Any, Any] = {out["status"]: widgets.status(job, self.session.queue.position(job))}
            result = job.run.result if job.run else job.latest
            if result is not None and result is not last:
                last = result
                update |= {self.state: self.kept(job), **self.drawn(job.recipe, result)}
            if job.over and job.run is not None:
                update |= self.ended(job)
            if not job.over:
                update[stop] = gr.Button(interactive=not job.stopping)
            yield update
        final: dict[Any, Any] = {stop: gr.Button(interactive=False), out["status"]: widgets.status(job, 0)}
        if job.run is not None and job.run.id and "export" in out:
            final |= widgets.exported(self.session.store.path(job.run.id), out["export"])
        if last is None:
            yield final | self.empty()
            return
        final |= {self.state: self.kept(job), **self.drawn(job.recipe, last, again=True)}
        yield final

    # ---- a kept run once more -----------------------------------------------------------------------------

    def restored(self, recipe: Recipe, run: Run | None, *here: Any) -> dict[Any, Any]:
        """Updates that put a recipe back into the inputs; `run`: the kept one, where there is one; `here`:
        the values of `also_asked`."""
        return reopening.filled(recipe, self.form)

    def also_restored(self) -> list[Any]:
        """Outputs of `restored` that are no inputs of the form."""
        return []

    def also_asked(self) -> list[Any]:
        """What `restored` is given of the page besides."""
        return []

    def reopen(
        self, request: gr.Request, event: gr.EventData, kept: dict | None, *here: Any
    ) -> dict[Any, Any]:
        """A run is opened again (or a recipe put in): inputs, results and exports, as after Run."""
        try:
            job = self.job_of(kept)
            if job is not None and not job.over:
                raise RequestError("A run goes on here; stop it or wait for its end, then open the other.")
            recipe, run = reopening.asked_for(event, self.session.store)
            update = self.restored(recipe, run, *here)
            if run is None:
                return update | {self.out["status"]: "The inputs are put back; press Run for the results."}
            return update | self.shown_again(run)
        except Exception as error:
            return {self.out["status"]: widgets.spoken(error)}

    def shown_again(self, run: Run) -> dict[Any, Any]:
        """Updates that show a kept run's results, and say what it was."""
        out, opened = self.out, reopening.Opened(run.recipe, run)
        said = f"Opened the run of {run.started[:16].replace('T', ' ')} UTC, {run.status}."
        said += "".join(f" Note: {words.in_words(str(w))}" for w in run.result.values.get("warnings") or ())
        if run.recipe.edits and not self.LAYS_EDITS:
            said += f" It was made under edits ({len(run.recipe.edits)}), which Run does not lay over here."
        update = {self.state: {"run": run.id}, self.cell: None, **self.cleared()}
        if "export" in out:
            update |= widgets.exported(self.session.store.path(run.id), out["export"])
        try:
            update |= {**self.ended(opened), **self.drawn(run.recipe, run.result, again=True)}
        except (KeyError, IndexError, ValueError, TypeError) as error:  # a run that was stopped early
            if run.status == "done":
                raise
            said += f" It ended before there was enough for a figure ({type(error).__name__})."
            update |= self.empty()
        return update | {out["status"]: said}

    # ---- what is on screen --------------------------------------------------------------------------------

    def kept(self, job: Job) -> dict[str, Any]:
        """What a page keeps of a job."""
        return {"job": job.id, "token": job.token, "run": job.run.id if job.run else None}

    def job_of(self, kept: dict | None) -> Job | None:
        """The recent job that a page's kept ids name."""
        if not isinstance(kept, dict):
            return None
        return self.session.queue.find(kept.get("job"), kept.get("token"))

    def measured(self, kept: dict | None) -> tuple[Recipe, Result]:
        """Recipe and results behind what is on screen: of the stored run, else of the job while it is
        known."""
        if not isinstance(kept, dict) or not ("job" in kept or "run" in kept):
            raise RequestError("There is nothing on screen yet; press Run first.")
        if kept.get("run"):
            run = self.session.store.load(str(kept["run"]))
            return run.recipe, run.result
        job = self.job_of(kept)
        if job is None or job.latest is None:
            raise RequestError("This is no longer in memory; press Run, a finished run comes from the store.")
        return job.recipe, job.latest


def _leaver(viewers: widgets.Viewers) -> Any:
    def leave(request: gr.Request) -> None:
        viewers.leave(str(request.session_hash))

    return leave

"""The Models panel: what there is, what fits this machine, downloads that are agreed to, the token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from panels import widgets
from panels.models_view import ASK, ModelList, Shown, as_value, memory_line, offer_text, size_text
from panels.running import QUIET, STREAM
from studio.errors import Cancelled, RequestError, StudioError
from studio.models.catalog import CATALOG
from studio.models.device import free_memory, whole_memory
from studio.models.hub import Offer
from studio.models.listing import KINDS, Known, Room, known_models, own_row
from studio.models.loading import locate
from studio.session import Session

TITLE = "Models"
NEEDS = ""
QUESTION = "Which models are here, which fit this machine, and which can be fetched?"
_LATER = "A job is using the device; its turn comes when that is done."


def build(session: Session) -> None:
    """Builds the panel inside the present Blocks."""
    gr.HTML(f"<p class='question'>{QUESTION}</p>", padding=False)
    out: dict[str, Any] = {"memory": widgets.line("", "models-memory", most=4)} | _status()
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            out["list"] = ModelList(elem_id="models-list")
        with gr.Column(scale=3, min_width=300):
            out |= _side()
    _Panel(session, out).wire()


def _status() -> dict[str, Any]:
    """The line that says what goes on, and the step before a download."""
    out: dict[str, Any] = {"status": widgets.line(ASK, "models-status", most=6)}
    with gr.Group(visible=False, elem_id="models-confirm") as out["confirm"]:
        out["offer"] = widgets.line("", "models-offer", lines=3)
        with gr.Row():
            out["agree"] = gr.Button("Download", variant="primary", elem_id="models-agree")
            out["refuse"] = gr.Button("Not now", elem_id="models-refuse")
    out["stop"] = gr.Button("Stop the download", visible=False, elem_id="models-stop")
    return out


def _side() -> dict[str, Any]:
    """Another model, the token, help."""
    out: dict[str, Any] = {}
    about = "A folder or a .safetensors checkpoint on the studio's machine, or a hub id (org/name)."
    with gr.Accordion("A model that is not in the list", open=True):
        out["name"] = gr.Textbox("", label="Folder, file or hub id", info=about, elem_id="models-name")
        out["look"] = gr.Button("Look at it", elem_id="models-look")
    with gr.Accordion("Hugging Face token", open=False):
        out |= _token()
    with gr.Accordion("What this shows, and what it cannot", open=False):
        gr.Markdown(widgets.page("models"), elem_id="models-help")
    out["chosen"] = gr.State("")
    return out


def _token() -> dict[str, Any]:
    """Its field, which is emptied at once, and whether it is kept."""
    why = "For models whose licence has to be accepted. It is used until the studio ends and shown to nobody."
    keep = "Also keep it on the studio's machine, where huggingface_hub keeps it, for next time."
    look = dict(type="password", label="Token", info=why, max_length=300)
    out: dict[str, Any] = {"token": gr.Textbox("", elem_id="models-token", **look)}
    out["keep"] = gr.Checkbox(False, label=keep, elem_id="models-keep")
    with gr.Row():
        out["use"] = gr.Button("Use it", elem_id="models-use")
        out["forget"] = gr.Button("Forget it", elem_id="models-forget")
    return out


@dataclass
class Download:
    """A download under way: one a model, whoever asked for it."""

    offer: Offer
    done: int = 0
    error: BaseException | None = None
    over: bool = False
    stopping: bool = False
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        of = f" of {size_text(self.offer.size)}" if self.offer.size else ""
        pace = self.done / max(1e-9, time.monotonic() - self.started)
        left = (self.offer.size - self.done) / pace if pace and self.offer.size > self.done else 0
        rest = f", about {left:.0f} s left" if left > 1 else ""
        return f"Downloading {self.offer.name}: {size_text(self.done)}{of}{rest}"


class _Panel:
    """The panel's handlers."""

    def __init__(self, session: Session, out: dict[str, Any]) -> None:
        self.session, self.out = session, out
        self._downloads: dict[str, Download] = {}
        self._lock = threading.Lock()

    def wire(self) -> None:
        """Connects the list, the step before a download, the token, and the look that repeats."""
        out = self.out
        shown = [out[n] for n in ("status", "list", "memory", "confirm", "offer", "chosen", "stop")]
        out["list"].select(self.act, None, shown, trigger_mode="multiple", **STREAM)
        out["look"].click(self.look, out["name"], shown, **STREAM)
        out["name"].submit(self.look, out["name"], shown, **STREAM)
        out["agree"].click(self.agree, out["chosen"], shown, **STREAM)
        out["refuse"].click(
            lambda: (gr.Group(visible=False), ASK), None, [out["confirm"], out["status"]], **QUIET
        )
        out["stop"].click(self.stop, out["chosen"], out["status"], **QUIET)
        token = [out["token"], out["status"]]
        out["use"].click(self.use_token, [out["token"], out["keep"]], token, **QUIET)
        out["forget"].click(self.forget_token, None, token, **QUIET)

    # ---- what is shown ------------------------------------------------------------------------------------

    def state(self, chosen: str = "") -> dict[Any, Any]:
        """Updates of the list and of the line about memory."""
        loaded, room = dict(self.session.loaded()), self.room()
        rows = known_models(self.session.models_folder, self.session.dtype)
        named = {r.name for r in rows} | {r.where for r in rows}
        extra = [self._other(name) for name in loaded if name not in named]
        shown = Shown([*rows, *extra], loaded, room, chosen, set(self._downloads))
        return {self.out["list"]: as_value(shown), self.out["memory"]: self.memory(loaded, room)}

    def _other(self, name: str) -> Known:
        """A loaded model that is in no list."""
        place = Path(name).expanduser()
        row = own_row(place, self.session.dtype) if place.exists() else None
        return row or Known(name, "", "see its page on the hub", 0, 0, True, name, "")

    def room(self) -> Room:
        """Memory of the device."""
        device = self.session.device
        return Room(self.session.budget(), free_memory(device), whole_memory(device))

    def memory(self, loaded: dict[str, int], room: Room) -> str:
        """What is in memory, in a line."""
        return memory_line(self.session.device, self.session.dtype, loaded, room)

    def said(self, sentence: str) -> dict[Any, Any]:
        """The state, and a sentence."""
        return {self.out["status"]: sentence, **self.state()}

    # ---- handlers -----------------------------------------------------------------------------------------

    def act(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        """Something in the list was pressed, or the list asks how things stand."""
        act, name = str(getattr(event, "act", "")), str(getattr(event, "name", ""))[:4096]
        if act == "see":
            yield self.state()
        elif act == "load":
            yield from self.load(name, str(request.session_hash))
        elif act == "unload":
            yield self.unload(name)
        elif act == "fetch":
            yield self.ask(name)
        else:
            yield {self.out["status"]: ASK}

    def load(self, name: str, user: str) -> Iterator[dict]:
        """Loads a model in turn with all jobs."""
        try:
            source = locate(name, self.session.models_folder, self.session.hub)
            job = self.session.load(name, source.kind, user=user)
        except Exception as error:
            yield self.said(widgets.spoken(error))
            return
        begun = time.monotonic()
        for _ in widgets.follow(job):
            waits = _LATER if job.state == "queued" else f"Loading {name} …"
            yield {self.out["status"]: waits}
        self.session.queue.forget(job)
        if job.error:
            yield self.said(widgets.spoken(job.error))
            return
        size = dict(self.session.loaded()).get(name, 0)
        yield self.said(f"{name} is in memory: {size_text(size)}, in {time.monotonic() - begun:.1f} s.")

    def unload(self, name: str) -> dict:
        """Lets a model go; what a running job holds goes when that is done."""
        size = dict(self.session.loaded()).get(name, 0)
        gone = self.session.unload(name)
        busy = " A job is running: if it uses the model, the memory is free when it is done."
        busy = busy if gone and self.session.queue.running else ""
        return self.said(
            f"{name} left memory: {size_text(size)} are free.{busy}" if gone else f"{name} is not loaded."
        )

    def ask(self, name: str) -> dict:
        """The step before a download: what it is, its licence, its size, whether it will fit."""
        try:
            offer = self.session.hub.offer(name)
        except StudioError as error:
            return {self.out["status"]: str(error), self.out["confirm"]: gr.Group(visible=False)}
        row = next((r for r in known_models(None, self.session.dtype) if r.name == name), None)
        return {
            self.out["offer"]: offer_text(
                offer, row.need if row else 0, self.room(), self.session.hub.has_token
            ),
            self.out["confirm"]: gr.Group(visible=True),
            self.out["chosen"]: name,
            self.out["status"]: f"Download {name}? Nothing is fetched before you agree.",
        }

    def look(self, name: str) -> Iterator[dict]:
        """A name was typed: what it is, and what can be done with it."""
        name = str(name or "").strip()
        yield {self.out["status"]: "Looking …", self.out["confirm"]: gr.Group(visible=False)}
        try:
            if not name:
                raise RequestError("Type a folder, a .safetensors file or a hub id (org/name) first.")
            source = locate(name, self.session.models_folder, self.session.hub)
        except StudioError as error:
            fetchable = name in CATALOG or name.count("/") == 1 and "not on this machine" in str(error)
            yield self.ask(name) if fetchable else {self.out["status"]: str(error)}
            return
        row = own_row(source.path, self.session.dtype)
        fits = self.room().fits(row.need)
        what = KINDS.get(source.kind, source.kind)
        told = row.fault or (
            f"{name}: {what}, {source.family}, needs {size_text(row.need)} in memory ({fits}). Every "
            "panel takes it: type the same into its Model field."
        )
        yield {self.out["status"]: told}

    def agree(self, name: str) -> Iterator[dict]:
        """Downloads, with progress; another page that asks for the same watches the same download."""
        out = self.out
        yield {out["confirm"]: gr.Group(visible=False), out["stop"]: gr.Button(visible=True)}
        try:
            found = self.begin(name)
        except StudioError as error:
            yield {out["stop"]: gr.Button(visible=False), **self.said(str(error))}
            return
        while not found.over:
            yield {out["status"]: "Stopping …" if found.stopping else str(found)}
            time.sleep(0.25)
        with self._lock:
            self._downloads.pop(name, None)
        told = f"{name} is here and ready offline."
        told = widgets.spoken(found.error) if found.error else told
        told = "Stopped; finished files are kept." if isinstance(found.error, Cancelled) else told
        yield {out["stop"]: gr.Button(visible=False), **self.said(told)}

    def begin(self, name: str) -> Download:
        """The download of a model, started if it isn't under way."""
        with self._lock:
            if name in self._downloads:
                return self._downloads[name]
            found = self._downloads[name] = Download(self.session.hub.offer(name))
        threading.Thread(target=self._fetch, args=(found,), name="locus-download", daemon=True).start()
        return found

    def _fetch(self, found: Download) -> None:
        def report(done: int) -> None:
            found.done = done
            if found.stopping:
                raise Cancelled

        entry = CATALOG.get(found.offer.name)
        try:
            self.session.hub.fetch(found.offer.source, entry, agreed=True, report=report)
        except BaseException as error:
            found.error = error
        finally:
            found.over = True

    def stop(self, name: str) -> str:
        """Stops a download."""
        found = self._downloads.get(name)
        if found is None:
            return "Nothing is being downloaded."
        found.stopping = True
        return "Stopping …"

    def use_token(self, token: str, keep: bool) -> tuple[str, str]:
        """Takes the token; the field is emptied whatever comes."""
        try:
            if not str(token or "").strip():
                raise RequestError("Paste a token first.")
            self.session.hub.set_token(str(token), keep=bool(keep))
        except StudioError as error:
            return "", str(error)
        kept = "kept on the studio's machine" if keep else "used until the studio ends"
        return "", f"The token is {kept}."

    def forget_token(self) -> tuple[str, str]:
        """The token that was set here is forgotten."""
        self.session.hub.set_token("")
        stays = (
            " One that huggingface_hub keeps on this machine is still used."
            if self.session.hub.has_token
            else ""
        )
        return "", f"The token that was entered here is forgotten.{stays}"

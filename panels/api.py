"""The API: every method as a named endpoint with typed parameters, for gradio_client, plain HTTP and MCP.

An endpoint streams what is done so far and ends with the content of run.json and the run's files. Whoever
leaves or cancels stops the run.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from gradio_client.utils import traverse

from panels import widgets
from panels.api_parameters import Parameter, document, parameters, plain_words
from panels.api_values import asked
from studio.errors import StudioError
from studio.jobs import Job
from studio.registry import REQUIRED, Method, load_methods
from studio.session import Session

PACE = 0.25  # seconds between two looks at a job
_FILE = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "orig_name": {"type": "string"},
        "meta": {"type": "object", "properties": {"_type": {"const": "gradio.FileData"}}},
    },
    "required": ["path", "meta"],
}
ALIVE = (
    2.0  # seconds after which an endpoint says again what it does, which shows whether its client is there
)


def build(session: Session) -> None:
    """Adds the endpoints of all methods to the page that is being built; its own handlers become private."""
    page = gr.context.Context.root_block
    for own in page.fns.values():
        own.api_visibility = "private"
    with gr.Column(visible=False):
        for method in sorted(load_methods().values(), key=lambda m: m.name):
            given = parameters(method)
            made = gr.api(endpoint(session, method, given), api_name=method.endpoint, concurrency_limit=None)
            _explain(page.fns[made["id"]], given)


def endpoint(session: Session, method: Method, given: tuple[Parameter, ...]) -> Callable[..., Any]:
    """The function behind an endpoint, with the signature and the docstring that its parameters make."""

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[tuple[dict, list]]:
        named = dict(zip((p.name for p in given), values, strict=True))
        try:
            wanted = await asyncio.to_thread(asked, session, method, named)
            job = await asyncio.to_thread(
                session.submit, wanted.recipe, user=caller(request), force=wanted.force
            )
        except Exception as error:
            raise refusal(error, session) from error
        try:
            async for told in progress(session, job):
                yield told, []
        finally:
            if not job.over:
                job.cancel()
        if job.error is not None:
            raise refusal(job.error, session, job) from job.error
        yield await asyncio.to_thread(answer, session, job)

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = inspect.Parameter("request", positional, annotation=gr.Request)
    rest = [_declared(p, positional) for p in given]
    returned = tuple[dict, list[gr.FileData]]
    run.__signature__ = inspect.Signature([first, *rest], return_annotation=returned)
    run.__annotations__ = {"request": gr.Request, **{p.name: p.hint for p in given}, "return": returned}
    run.__name__, run.__doc__ = method.endpoint, document(method, given)
    return run


def _declared(parameter: Parameter, kind: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if parameter.default is REQUIRED else parameter.default
    return inspect.Parameter(parameter.name, kind, default=default, annotation=parameter.hint)


def _explain(made: Any, given: tuple[Parameter, ...]) -> None:
    """Names, explains and exemplifies the components of an endpoint, which Gradio only numbers."""
    for component, parameter in zip(made.inputs, given, strict=True):
        component.label = parameter.name
        component._api_info = {**_slim(component._api_info), "additional_description": parameter.help}
        if parameter.example is not None:
            component.example_value = lambda example=parameter.example: example
            component.example_payload = component.example_value
    for component, label in zip(made.outputs, ("run", "files"), strict=True):
        component.label, component._api_info = label, _slim(component._api_info)


def _slim(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that says of an uploaded file only what a client has to send: schemas travel with the page."""
    return traverse(schema, lambda whole: _FILE, lambda part: "meta" in _properties(part))


def _properties(schema: Any) -> dict[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def caller(request: gr.Request) -> str:
    """Whose turn it is: a client's session; the address of a plain HTTP call, whose session is always new."""
    plain, place = "/call/" in request.url.path, request.client.host
    return f"api {place if plain else request.session_hash}@{place}"


async def progress(session: Session, job: Job) -> AsyncIterator[dict[str, Any]]:
    """What a job does, after changes and every ALIVE seconds, until it is over."""
    seen, silent = -1, 0.0
    while not job.over:
        if job.version != seen or silent >= ALIVE:
            seen, silent = job.version, 0.0
            yield {
                "status": job.state,
                "jobs_before": session.queue.position(job),
                "doing": job.what,
                "done": job.done,
                "total": job.total,
                "seconds_left": job.seconds_left(),
            }
        await asyncio.sleep(PACE)
        silent += PACE


def answer(session: Session, job: Job) -> tuple[dict[str, Any], list[dict]]:
    """(run.json's content with the run's id, the run's files)."""
    folder = session.store.path(job.run.id)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "run.json"]
    record = json.loads((folder / "run.json").read_text("utf-8"))
    return record | {"id": job.run.id}, [_offered(f) for f in files]


def _offered(file: Path) -> dict:
    """A copy of a file that the client may download."""
    copy = save_file_to_cache(file, get_upload_folder())
    return gr.FileData(path=copy, orig_name=file.name).model_dump()


def refusal(error: BaseException, session: Session, job: Job | None = None) -> gr.Error:
    """An error as one sentence in the words of the API, without paths of the store."""
    said = str(error) if isinstance(error, StudioError) and str(error) else widgets.spoken(error)
    for place in (f" in {session.store.root}", f"{session.store.root}/"):
        said = said.replace(place, "")
    said = plain_words(said)
    if job is not None and job.run is not None and job.run.id:
        said += f" What was measured until then is kept as the run {job.run.id}."
    return gr.Error(said, print_exception=False)

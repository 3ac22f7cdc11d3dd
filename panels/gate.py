"""The page as Gradio serves it, stricter with what comes in: the right number of values, files that were
uploaded and never addresses to fetch, and one sentence for every error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from gradio_client.utils import is_file_obj, is_file_obj_with_meta, traverse

from panels import widgets

_log = logging.getLogger("locus")
AT_ONCE = 256  # handlers that may be under way; each page and each call that waits for its run is one
MOST_SAID = 600  # characters of a refusal, which may repeat what was sent
_UNREADABLE = (
    "A value of this request is not what its field takes; reload the page, or look at the documentation of "
    "the API."
)


class Page(gr.Blocks):
    """A Blocks whose handlers are asked nothing that the page itself would not ask."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.max_threads = AT_ONCE

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Refuses a wrong number of values and files that would have to be fetched. Raises gr.Error."""
        wanted = len(block_fn.inputs)
        if len(inputs) != wanted:
            name = f"/{block_fn.api_name}" if block_fn.api_visibility == "public" else "This"
            raise _error(f"{name} takes {wanted} values, one for each parameter, and {len(inputs)} came.")
        traverse(inputs, _refused, _untellable)
        for block, value in zip(block_fn.inputs, inputs, strict=True):
            named = is_file_obj if getattr(block, "data_model", None) else is_file_obj_with_meta
            traverse(value, _only_uploaded, named)

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The values as the handler takes them. Raises gr.Error."""
        try:
            values = await super().preprocess_data(*args, **kwargs)
            function = kwargs["block_fn"] if "block_fn" in kwargs else args[0]
            return [_one(b, v) for b, v in zip(function.inputs, values, strict=True)]
        except gr.Error as error:
            error.print_exception = False  # the request is wrong, not the studio
            error.message = str(error.message)[:MOST_SAID]
            raise
        except Exception as error:
            _log.info("a request could not be read: %s", " ".join(str(error).split())[:300])
            raise _error(_UNREADABLE) from error

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs one handler. Raises gr.Error, whatever goes wrong inside."""
        asked = kwargs["block_fn"] if "block_fn" in kwargs else args[0]
        if not isinstance(asked, int) and asked.fn is None:
            raise _error("The page does this by itself; there is nothing to ask the studio.")
        try:
            return await super().process_api(*args, **kwargs)
        except (gr.Error, StopAsyncIteration):
            raise
        except Exception as error:
            raise _error(widgets.spoken(error)) from error


def _one(block: Any, value: Any) -> Any:
    """A value that its field can hold: what Gradio's own fields let through unlooked at. Raises gr.Error."""
    if isinstance(block, gr.Textbox):
        return "" if value is None else value
    if isinstance(block, gr.Dropdown) and value is not None:
        many = isinstance(value, (list, tuple))
        parts = value if many else [value]
        if many != bool(block.multiselect) or not all(isinstance(p, (str, int, float)) for p in parts):
            raise _error(_UNREADABLE)
    if isinstance(block, gr.Dataset) and value is None:
        raise _error(_UNREADABLE)
    return value


def _untellable(value: Any) -> bool:
    """Whether a value can't be sent back as JSON: one that a handler repeats would end the page's events."""
    if isinstance(value, str) and not value.isascii():
        return any("\ud800" <= c <= "\udfff" for c in value)
    return isinstance(value, int) and abs(value) >= 2**63


def _refused(value: Any) -> Any:
    what = (
        "A text of this request is no UTF-8"
        if isinstance(value, str)
        else "A number of this request is too large"
    )
    raise _error(f"{what}; send another.")


def _only_uploaded(file: dict[str, Any]) -> dict[str, Any]:
    """The file, if it lies where uploads do. Gradio itself looks at that only in an app that it serves alone,
    not in one that is mounted."""
    folder = Path(get_upload_folder()).resolve()
    try:
        inside = folder in Path(file["path"]).resolve().parents
    except (OSError, ValueError):  # a name that is too long, or holds a null byte
        inside = False
    if not inside:
        raise _error(
            "A file of this request was not uploaded; paths of the studio's machine and addresses are not "
            "read."
        )
    return file


def _error(sentence: str) -> gr.Error:
    return gr.Error(sentence, print_exception=False)

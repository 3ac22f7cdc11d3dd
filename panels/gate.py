"""The page as Gradio serves it, stricter with what comes in: the right number of values, files that were
uploaded and never addresses to fetch, and one sentence for every error."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, traverse

from panels import widgets

_log = logging.getLogger("locus")
AT_ONCE = 256  # handlers that may be under way; each page and each call that waits for its run is one
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
        traverse(inputs, _only_uploaded, is_file_obj_with_meta)

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The values as the handler takes them. Raises gr.Error."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False  # the request is wrong, not the studio
            raise
        except Exception as error:
            _log.info("a request could not be read: %s", " ".join(str(error).split())[:300])
            raise _error(_UNREADABLE) from error

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs one handler. Raises gr.Error, whatever goes wrong inside."""
        try:
            return await super().process_api(*args, **kwargs)
        except (gr.Error, StopAsyncIteration):
            raise
        except Exception as error:
            raise _error(widgets.spoken(error)) from error


def _only_uploaded(file: dict[str, Any]) -> dict[str, Any]:
    if "://" in str(file.get("path")):
        raise _error("Files are uploaded, not fetched from an address; upload the file itself.")
    return file


def _error(sentence: str) -> gr.Error:
    return gr.Error(sentence, print_exception=False)

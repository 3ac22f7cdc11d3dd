"""Tools for assistants over the Model Context Protocol: Gradio's server, with answers that an assistant can
use, the run as JSON, pictures as pictures, other files as addresses."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradio.processing_utils import add_root_url
from gradio_client.utils import is_file_obj_with_meta, traverse

from studio.errors import StudioError

MOST_PICTURES = 8
PICTURE = 2 * 2**20  # bytes of the largest picture that is sent along


def prepare(server: Any, fault: str | None) -> None:
    """Has Gradio's MCP server answer as this module says; StudioError when there is none."""
    if server is None:
        raise StudioError(f"The MCP server could not start ({fault}); serve without --mcp.")
    server.postprocess_output_data = lambda data, root: list(_contents(server.types, data, root))
    plain = server.simplify_filedata_schema
    server.simplify_filedata_schema = lambda schema: plain(traverse(schema, _as_text, _is_file))


def _is_file(schema: Any) -> bool:
    """Whether a part of a schema describes an uploaded file."""
    meta = schema.get("properties", {}).get("meta") if isinstance(schema, dict) else None
    return isinstance(meta, dict)


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """An assistant can't upload: it sends a data: URL or one of the texts that the description names."""
    return {"type": "string"}


def _contents(types: Any, data: Any, root: str) -> Iterator[Any]:
    """The parts of a tool's answer from (run, files), which comes alone or in a list of one."""
    data = data[0] if len(data) == 1 and isinstance(data[0], (list, tuple)) else data
    run, files = add_root_url(list(data), root, None)
    yield types.TextContent(type="text", text=json.dumps(run, ensure_ascii=False))
    shown = 0
    for file in filter(is_file_obj_with_meta, files):
        path = Path(file["path"])
        if path.suffix == ".png" and shown < MOST_PICTURES and path.stat().st_size <= PICTURE:
            shown += 1
            content = base64.b64encode(path.read_bytes()).decode()
            yield types.ImageContent(type="image", data=content, mimeType="image/png")
        yield types.TextContent(type="text", text=f"{file['orig_name']}: {file['url']}")

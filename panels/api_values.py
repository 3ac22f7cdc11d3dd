"""From what an endpoint was given to a recipe. Nothing of it is ever a path of this machine or an address:
models are names, files were uploaded, and what a run made is named by the run's id."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_base64_to_cache
from gradio.utils import get_upload_folder

from panels.api_parameters import Parameter, parameters
from studio.edit_files import STRONGEST
from studio.errors import RequestError
from studio.models.catalog import ASSETS, CATALOG
from studio.models.hub import offline_state
from studio.registry import Method
from studio.session import Session
from studio.store import EDIT_FILE, MADE_FILE
from studio.types import Recipe
from studio.uploads import Uploads

EXAMPLES = "examples"  # stands for the pictures that come with Locus
MOST_SEEDS = 4096
MOST_EDITS = 64
_WORDS = ("judge", "none")  # what a scorer may be besides a model
_NAME = re.compile(r"[\w][\w .+-]{0,119}")
_DATA = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True)
class Asked:
    """A request that can be submitted; `force`: lay over edits made for other weights."""

    recipe: Recipe
    force: bool


def asked(session: Session, method: Method, given: Mapping[str, Any]) -> Asked:
    """The request that these parameters make; RequestError says which of them is wrong."""
    known = {p.name: p for p in parameters(method)}
    model = _read(session, known["model"], given.get("model"))
    read = {name: _read(session, known[name], value) for name, value in given.items() if name != "model"}
    seeds = read.pop("seeds", None)
    edits = _edits(read.pop("edit", None) or (), read.pop("edit_strengths", None))
    force = read.pop("force", False)
    if not isinstance(force, bool):
        raise RequestError(f"force must be true or false, not {str(force)[:60]!r}.")
    recipe = Recipe(method.name, model or known["model"].default, read, {}, seeds, edits)
    return Asked(recipe, force)


def _read(session: Session, parameter: Parameter, value: Any) -> Any:
    """The value that a recipe holds."""
    name = parameter.name
    if value is None or value == "" and parameter.kind != "value":
        return None
    if parameter.kind == "model":
        return served_model(session, name, value)
    if parameter.kind == "made":
        return str(_made(session, name, value, MADE_FILE))
    if parameter.kind == "seeds" and isinstance(value, (str, list)) and len(value) > MOST_SEEDS:
        raise RequestError(f"seeds may be {MOST_SEEDS:,} at most; ask several times.")
    if parameter.kind in ("images", "image"):
        folder = _images(session, name, value if isinstance(value, list) else [value])
        return [str(folder)] if parameter.kind == "images" else str(next(iter(sorted(folder.iterdir()))))
    if parameter.kind == "edit":
        given = value if isinstance(value, list) else [value]
        if len(given) > MOST_EDITS:
            raise RequestError(f"edit may hold {MOST_EDITS} edits at most, not {len(given)}.")
        return [_edit(session, item) for item in given]
    return value


def served_model(session: Session, name: str, value: Any) -> str:
    """A model's name, if it is one of the catalogue that is on this machine or one in the folder of models.

    Whoever calls over the network can neither name a folder nor start a download.
    """
    if not isinstance(value, str):
        raise RequestError(f"{name} must be the name of a model, not {type(value).__name__}.")
    if value in CATALOG:
        if not offline_state(CATALOG[value])[0]:
            raise RequestError(
                f"{value} is not on this machine yet, and a call does not download it; load it once in the "
                "studio itself."
            )
        return value
    folder = session.models_folder
    if folder is not None and _NAME.fullmatch(value) and (folder / value).exists():
        return str((folder / value).absolute())
    if name.endswith("scorer") and value in _WORDS:
        return value
    here = sorted(f.name for f in folder.iterdir() if not f.name.startswith(".")) if folder else []
    ready = [e.name for e in CATALOG.values() if offline_state(e)[0]]
    raise RequestError(
        f"{name} can't be {value[:80]!r}: a call names a model of the catalogue or of the studio's folder of "
        f"models. Here are {', '.join([*ready, *here][:40])}."
    )


def uploaded(name: str, item: Any) -> Path | None:
    """The file that a client has uploaded, None where the item is a text; RequestError for anything else.

    Gradio has made sure that the path lies in its own folder of uploads.
    """
    if isinstance(item, str):
        return None
    path = item.get("path") if isinstance(item, dict) else None
    inside = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or inside not in (found := Path(path).resolve()).parents:
        raise RequestError(f"{name} takes files that are uploaded first; with gradio_client, handle_file(…).")
    if not found.is_file():
        raise RequestError(f"{name}: the uploaded file is no longer there; upload it again.")
    return found


def _images(session: Session, name: str, given: list[Any]) -> Path:
    """The folder of the images, kept by the store."""
    if given == [EXAMPLES]:
        return ASSETS / "atlas" / "examples"
    files, names = [], []
    for item in given:
        file = uploaded(name, item)
        original = item.get("orig_name") if isinstance(item, dict) else None
        if file is None:
            file, original = _decoded(name, item), f"image {len(files) + 1}"
        files.append(file)
        names.append(original if isinstance(original, str) and original else file.name)
    store = Uploads(session.store)
    return store.folder(store.keep(files, names))


def _decoded(name: str, text: str) -> Path:
    """The image of a data: URL as a file of Gradio's."""
    if not _DATA.match(text):
        raise RequestError(
            f"{name} takes uploaded files, data:image/…;base64, URLs or [{EXAMPLES!r}], not {text[:60]!r}; "
            "paths and addresses are not read."
        )
    try:
        return Path(save_base64_to_cache(text, get_upload_folder()))
    except (ValueError, OSError) as error:
        raise RequestError(f"{name}: a data: URL can't be read as base64; send it whole.") from error


def _edit(session: Session, item: Any) -> str:
    """The kept edit file of an upload or of a run."""
    file = uploaded("edit", item) or _made(session, "edit", item, EDIT_FILE)
    session.shelf.open(str(file))  # refuses what is no edit file before it is kept
    return str(session.store.edit_file(session.store.keep_edit(file)))


def _made(session: Session, name: str, run: Any, file: str) -> Path:
    """A file that a run of this studio made."""
    if not isinstance(run, str):
        raise RequestError(f"{name} must be the id of a run, not {type(run).__name__}.")
    found = session.store.path(run) / file
    if not found.is_file():
        raise RequestError(f"{name}: the run {run} made no such file; name one that did.")
    return found


def _edits(files: Any, strengths: Any) -> tuple[str, ...]:
    """Entries of a recipe: each file with its strength."""
    factors = (
        strengths if isinstance(strengths, list) else [1.0] * len(files) if strengths is None else [math.nan]
    )
    good = all(
        isinstance(s, (int, float)) and not isinstance(s, bool) and abs(s) <= STRONGEST for s in factors
    )
    if not good or len(factors) != len(files):
        raise RequestError(
            f"edit_strengths must be {len(files)} numbers from {-STRONGEST:g} to {STRONGEST:g}, one for each "
            "edit."
        )
    return tuple(f if s == 1 else f"{f}@{float(s)!r}" for f, s in zip(files, factors, strict=True))

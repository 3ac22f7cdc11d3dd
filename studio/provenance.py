"""What a run says of where it comes from: the model, the files laid over it, versions of the libraries."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from studio.edit_files import edit_hash, split_entry
from studio.images import digest, image_files
from studio.jobs import Job
from studio.types import Result

_LIBRARIES = ("locus-studio", "torch", "diffusers", "transformers", "open_clip_torch", "timm", "numpy")


def laid(job: Job, scorer: Any) -> dict[str, Any]:
    """What else a replay must find again: hashes of the edit files, whether they were forced, the scorer."""
    found = {"edits": [edit_hash(split_entry(e)[0]) for e in job.recipe.edits]}
    found |= {"force": bool(job.options.get("force")), "scorer": scorer.fingerprint if scorer else None}
    return {k: v for k, v in found.items() if v}


def files_read(inputs: Any, params: Any) -> str:
    """A hash of the images, the aligner and the table of groups that a request names, since a file can change
    under its name; "" when it names no images."""
    images = getattr(inputs, "images", None)
    if not images:
        return ""
    files, _ = image_files(images)
    for option in ("reference", "like"):
        if named := getattr(inputs, option, None):
            files += image_files((named,) if isinstance(named, str) else named, f"--{option}")[0]
    single = (getattr(params, "aligner", None), getattr(inputs, "groups", None))
    return digest([*files, *(Path(name).expanduser() for name in single if name)])


def origin(model: Any, name: str) -> dict[str, Any]:
    """What run.json says of a model that was asked for by `name`."""
    return {
        "id": model.id,
        "path": str(model.source.path) if model.source.kind and Path(name).exists() else None,
        "revision": model.source.revision,
        "family": model.family,
        "fingerprint": model.fingerprint,
    }


def with_warnings(result: Result, warnings: list[str]) -> Result:
    """The result with the job's warnings among its values."""
    return replace(result, values={**result.values, "warnings": list(warnings)}) if warnings else result


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results; Locus itself may run from a checkout."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout" if name == "locus-studio" else "absent"
    return found

"""What `locus doctor` looks at: versions, device, memory, disk, write access, and whether embedded models
are intact."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from studio.errors import StudioError
from studio.models.catalog import ASSETS, CATALOG
from studio.models.device import default_threads, free_memory, pick_device
from studio.models.loading import fingerprint, home
from studio.provenance import versions
from studio.run_quota import folder_size, over, quota_of, size_text

_LEAST_MEMORY, _LEAST_DISK = 2 * 10**9, 10**9


def examine(runs: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """(facts by name, a sentence for each thing that is wrong)."""
    wrong: list[str] = []
    facts: dict[str, Any] = dict(versions())
    wrong += [
        f"The library {name} is not installed; install the project again with its constraints."
        for name, v in facts.items()
        if v == "absent"
    ]
    device = pick_device("auto")
    facts |= {
        "device": device,
        "cores": default_threads(),
        "free memory": f"{free_memory('cpu') / 1e9:.1f} GB",
    }
    if device == "cuda":
        facts["free GPU memory"] = f"{free_memory('cuda') / 1e9:.1f} GB"
    if free_memory("cpu") < _LEAST_MEMORY:
        wrong.append("Less than 2 GB of memory are free; close other programs.")
    wrong += _writable(runs, facts)
    for name, entry in CATALOG.items():
        if entry.embedded:
            wrong += _embedded(name, entry, facts)
    return facts, wrong


def _writable(runs: str | None, facts: dict[str, Any]) -> list[str]:
    folder = os.path.abspath(os.path.expanduser(runs)) if runs else str(home() / "runs")
    facts["runs"] = folder
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [
            f"Runs can't be written to {folder} ({error.strerror}); give another folder with --runs or "
            f"LOCUS_HOME."
        ]
    free, used = shutil.disk_usage(folder).free, folder_size(Path(folder))
    facts |= {"runs take": size_text(used), "free disk": size_text(free)}
    few = [f"Less than 1 GB is free on the disk of {folder}; free some space."] if free < _LEAST_DISK else []
    return few + [said for said in [over(used, quota_of(None))] if said]


def _embedded(name: str, entry: Any, facts: dict[str, Any]) -> list[str]:
    try:
        found = fingerprint(entry.path)
    except (StudioError, OSError) as error:
        return [f"The embedded model {name} is not whole: {error}"]
    facts[f"{name} fingerprint"] = found
    try:
        known = json.loads((ASSETS / "atlas" / "fingerprints.json").read_text())
    except (OSError, ValueError) as error:
        return [
            f"The list of embedded models' fingerprints can't be read ({type(error).__name__}); install "
            f"the project again."
        ]
    return (
        []
        if known.get(name) == found
        else [f"The embedded model {name} is not the shipped one; install the project again."]
    )

"""`--prompts FILE` of the methods' commands: one run a line of a file, in the store, and their tables."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from studio.commands import sweep_bar
from studio.errors import RequestError
from studio.given_files import with_files
from studio.models.catalog import DEFAULT_MODELS
from studio.options import new_session
from studio.registry import Method
from studio.runners import Local
from studio.sweep import check_out, fault_of, run_sweep
from studio.sweep_file import plain_name, prompt_sweep, recipes


def run_prompts(method: Method, asked: dict[str, Any], given: dict[str, Any]) -> int:
    """Runs the method for every line, as a sweep does: started again, it repeats no finished run."""
    plain = plain_name(method)
    apart = {plain: f"the file says the {plain}s", "save": "each run makes a file of its own"}
    apart |= {"force": "a sweep lays an edit over its own weights alone"}
    for other, why in apart.items():
        if given.get(other):
            raise RequestError(f"--prompts and --{other} do not go together: {why}.")
    if "out" not in given:
        raise RequestError(
            "Where to? --prompts makes a run a line in the store, and their tables and figure in --out DIR."
        )
    shared = {k: v for k, v in asked.items() if v is not None} | {
        k: given[k] for k in ("model", "seeds") if k in given
    }
    shared = with_files(method, shared | ({"edit": given["edit"]} if given.get("edit") else {}))
    read = prompt_sweep(method, shared, Path(given["prompts"]).expanduser())
    out = Path(given["out"]).expanduser()
    check_out(out, read)
    with contextlib.closing(new_session(given)) as session:
        told = run_sweep(
            read,
            recipes(read, session.checked, DEFAULT_MODELS),
            Local(session),
            session.store,
            out,
            sweep_bar(),
        )
    if given["json"]:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(f"{told['made']} runs made, {told['found']} found in the store, {told['failed']} failed")
        print(out)
    if (fault := fault_of(told)) is not None:
        raise fault
    return 0

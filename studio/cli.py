"""The command line: `locus COMMAND`. Method commands are derived from the registry, the others stand in
commands.py.

Exit status: 0 done, 1 failed in running, 2 the request is wrong, 130 interrupted. Faults are one sentence
on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from studio.commands import COMMANDS, progress_bar
from studio.errors import Cancelled, RequestError, StudioError
from studio.given_files import whole_edit, whole_model, with_files
from studio.models.catalog import DEFAULT_MODELS
from studio.options import method_options, new_session, parse_options
from studio.registry import Method, load_methods, parse


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _log_kept_quiet(argv):
            return _dispatch(argv)
    except RequestError as error:
        return _say(error, 2)
    except StudioError as error:
        return _say(error, error.code)
    except (KeyboardInterrupt, Cancelled) as stop:
        kept = getattr(stop, "partial", None)
        what = (
            f"what was finished by then is kept as run {kept.id}"
            if kept and kept.id
            else "nothing half-done was kept"
        )
        return _say(f"Interrupted; {what}.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a bug of ours: a sentence for the person, the traceback for the log
        if os.environ.get("LOCUS_DEBUG"):
            raise
        return _say(
            f"Running failed with {type(error).__name__}: {' '.join(str(error).split())[:200]} "
            "(LOCUS_DEBUG=1 shows the traceback).",
            1,
        )


@contextlib.contextmanager
def _log_kept_quiet(argv: list[str]) -> Iterator[None]:
    """A command says one sentence; tracebacks go to the log of `serve`, or to a person who sets
    LOCUS_DEBUG."""
    import logging

    log = logging.getLogger("locus")
    before = log.disabled
    log.disabled = argv[:1] != ["serve"] and not os.environ.get("LOCUS_DEBUG")
    try:
        yield
    finally:
        log.disabled = before


def _say(sentence: object, code: int) -> int:
    print(f"locus: {sentence}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from studio.provenance import versions

        print(f"locus {versions()['locus-studio']}")
        return 0
    name, rest = argv[0], argv[1:]
    if name in COMMANDS:
        return COMMANDS[name](rest)
    methods = load_methods()
    if name in methods:
        return run_method(methods[name], rest)
    from difflib import get_close_matches

    near = get_close_matches(name, [*COMMANDS, *methods], 1)
    raise RequestError(
        f"There is no command {name[:60]!r}"
        + (f"; did you mean {near[0]!r}?" if near else "; see `locus --help`.")
    )


def overview() -> str:
    """The text of `locus --help`."""
    lines = [
        "usage: locus COMMAND [OPTIONS]",
        "",
        "An interpretability studio for generative and vision-language models.",
        "",
        "methods:",
    ]
    lines += [f"  {m.name:<20} {m.summary}" for m in sorted(load_methods().values(), key=lambda m: m.name)]
    lines += ["", "studio:"] + [
        f"  {n:<20} {(f.__doc__ or '').splitlines()[0].split(': ', 1)[-1]}" for n, f in COMMANDS.items()
    ]
    return "\n".join([*lines, "", "`locus COMMAND --help` explains a command."])


def run_method(method: Method, argv: list[str]) -> int:
    """Runs a method's command."""
    from studio.store import as_record, check_free
    from studio.types import Recipe

    given = parse_options(
        method.name, f"{method.summary} {method.paper}".strip(), method_options(method), argv
    )
    asked = _asked(method, given)
    if "prompts" in given:
        from studio.prompt_command import run_prompts

        return run_prompts(method, asked, given)
    out = Path(given["out"]).expanduser() if "out" in given else None
    if out is not None:
        check_free(out)
    saved = _saved(method, asked, given)
    recipe = Recipe(
        method.name,
        whole_model(given.get("model", DEFAULT_MODELS.get(method.family, ""))),
        asked,
        {},
        given.get("seeds"),
        tuple(map(whole_edit, given.get("edit", ()))),
    )
    with contextlib.closing(new_session(given)) as session:
        run = session.run(recipe, progress_bar(), out=out, force=given["force"])
        if method.complete:
            _say_taken(method, asked, run.recipe)
        for warning in run.result.values.get("warnings", []):
            print(f"locus: warning: {warning}", file=sys.stderr)
        where = out or session.store.root / run.id
        if saved is not None:
            _save(method, where, saved)
        if given["json"]:
            print(json.dumps(as_record(run), ensure_ascii=False))
        if not given["json"] or out is None:
            print(where, file=sys.stderr if given["json"] else sys.stdout)
        _say_finding(run.result.values)
    return 0


def _saved(method: Method, asked: dict[str, Any], given: dict[str, Any]) -> Path | None:
    """The file of --save, or None; RequestError when it can't be written or nothing would be made for it."""
    from studio.store import check_free_file

    if "save" not in given:
        return None
    file = check_free_file(given["save"], "--save", ".safetensors")
    if method.unsaved and (why := method.unsaved(parse(method, asked)[1])):
        raise RequestError(why)
    return file


def _save(method: Method, folder: Path, file: Path) -> None:
    """Copies the file that a run made; StudioError when it made none."""
    from studio.store import EDIT_FILE, MADE_FILE, copy_file

    made = [f for name in (EDIT_FILE, MADE_FILE) if (f := folder / name).is_file()]
    if not made:
        raise StudioError(
            f"{method.name} made no {method.saves} with these options, so nothing is saved; the run is "
            f"{folder}."
        )
    copy_file(made[0], file)


def _say_taken(method: Method, asked: Mapping[str, Any], recipe: Any) -> None:
    """What the edit files said in place of options that were not given."""
    for f in dataclasses.fields(method.inputs):
        value = recipe.inputs[f.name]
        if asked.get(f.name) is None and f.default is None and isinstance(value, str):
            option = "--" + f.name.replace("_", "-")
            print(f"locus: {option} is {value!r}, as the edit file says.", file=sys.stderr)


def _say_finding(values: Mapping[str, Any]) -> None:
    """The finding in a sentence, where the method has one."""
    if found := [values[n] for n in ("verdict", "finding") if values.get(n)]:
        print(found[0], file=sys.stderr)


def _asked(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """Inputs and parameters that were given, with the files that they name."""
    asked: dict[str, Any] = {}
    for cls in (method.inputs, method.params):
        for f in dataclasses.fields(cls):
            if f.default is True:
                asked[f.name] = not given.pop(f"no_{f.name}", False)
            elif f.name in given:
                asked[f.name] = given[f.name]
    return with_files(method, asked)


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


if __name__ == "__main__":
    entry()

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
from pathlib import Path
from typing import Any

from studio.commands import COMMANDS, progress_bar
from studio.errors import Cancelled, RequestError, StudioError
from studio.options import DEFAULT_MODELS, method_options, new_session, parse_options
from studio.registry import Method, load_methods


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return _dispatch(argv)
    except RequestError as error:
        return _say(error, 2)
    except StudioError as error:
        return _say(error, error.code)
    except (KeyboardInterrupt, Cancelled):
        return _say("Interrupted; nothing half-done was kept.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a bug of ours: a sentence for the person, the traceback for the log
        import logging

        if os.environ.get("LOCUS_DEBUG"):
            raise
        logging.getLogger("locus").debug("traceback", exc_info=True)
        return _say(
            f"Running failed with {type(error).__name__}: {' '.join(str(error).split())[:200]} "
            "(LOCUS_DEBUG=1 shows the traceback).",
            1,
        )


def _say(sentence: object, code: int) -> int:
    print(f"locus: {sentence}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from studio.session import versions

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
    out = Path(given["out"]).expanduser() if "out" in given else None
    if out is not None:
        check_free(out)
    recipe = Recipe(
        method.name,
        given.get("model", DEFAULT_MODELS.get(method.family, "")),
        asked,
        {},
        given.get("seeds"),
        tuple(str(Path(e).expanduser().absolute()) for e in given.get("edit", ())),
    )
    with contextlib.closing(new_session(given)) as session:
        run = session.run(recipe, progress_bar(), out=out, force=given["force"])
        for warning in run.result.values.get("warnings", []):
            print(f"locus: warning: {warning}", file=sys.stderr)
        if given["json"]:
            print(json.dumps(as_record(run), ensure_ascii=False))
        else:
            print(out or session.store.root / run.id)
    return 0


def _asked(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for cls in (method.inputs, method.params):
        for f in dataclasses.fields(cls):
            if f.default is True:
                asked[f.name] = not given.pop(f"no_{f.name}", False)
            elif f.name in given:
                asked[f.name] = given[f.name]
    return asked


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


if __name__ == "__main__":
    entry()

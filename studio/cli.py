"""The command line: `locus COMMAND`. Method commands are derived from the registry, the others stand here.

Exit status: 0 done, 1 failed in running, 2 the request is wrong, 130 interrupted. Faults are one sentence
on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from studio.errors import Cancelled, RequestError, StudioError
from studio.registry import REQUIRED, Method, base_type, hints, load_methods

_UNSET = "\0"  # tells an option that was not given from an empty text
_DEFAULT_MODELS = {"diffusion": "atlas-sd", "clip": "atlas-clip"}
_COMMON = {
    "model": ("STR", "catalogue name (see `locus models`), folder, or hub id"),
    "edit": ("FILE", "edit file to lay over the model; give it again for more"),
    "seeds": ("0,1,2", "seeds, separated by commas"),
    "out": ("DIR", "folder of the run; must not exist (default: the store)"),
    "runs": ("DIR", "the store (default: $LOCUS_HOME/runs, ~/.locus/runs)"),
    "models": ("DIR", "folder in which models are also looked for by name"),
    "device": ("STR", "auto, cpu, cuda or mps (default: auto)"),
    "dtype": ("STR", "auto, float32, float16 or bfloat16 (default: auto, which is float32)"),
    "threads": ("INT", "threads of the CPU (default: all cores)"),
    "batch": ("INT", "rows of one forward (default: 16 on a CPU, 64 on a GPU)"),
}


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


# ---- options ----------------------------------------------------------------------------------------------


def parse_options(
    name: str, description: str, options: dict[str, tuple[Any, str, str, str]], argv: list[str]
) -> dict[str, Any]:
    """Values given on the command line. An option is (type, metavar, help, default in words).

    Types: str, bool (a flag), tuple (several words), list (repeatable). Everything is read as text; values
    are checked
    by the registry, so that every face of a method refuses with the same sentence.
    """
    import tyro

    rows: list[tuple] = []
    for key, (kind, metavar, help_, default) in options.items():
        note = {
            "metavar": metavar,
            "help": help_.replace("%", "%%"),
            "help_behavior_hint": f"(default: {default})" if default else "",
        }
        if kind is bool:
            rows.append(
                (
                    key,
                    Annotated[
                        bool,
                        tyro.conf.FlagCreatePairsOff,
                        tyro.conf.arg(help=note["help"], help_behavior_hint=""),
                    ],
                    False,
                )
            )
        elif kind is list:
            rows.append(
                (key, Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(**note)], ())
            )
        elif kind is tuple:
            rows.append((key, Annotated[tuple[str, ...], tyro.conf.arg(**note)], ()))
        else:
            rows.append((key, Annotated[str, tyro.conf.arg(**note)], _UNSET))
    cls = dataclasses.make_dataclass(
        name.replace("-", "_"), [(k, t, dataclasses.field(default=d)) for k, t, d in rows]
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            got = tyro.cli(cls, args=argv, prog=f"locus {name}", description=description)
    except SystemExit as stop:
        if stop.code:
            raise RequestError(_sentence(errors.getvalue())) from None
        raise
    values = dataclasses.asdict(got)
    return {k: v for k, v in values.items() if v not in (_UNSET, (), [])}


def _sentence(box: str) -> str:
    """One sentence from tyro's boxed message."""
    lines = [line.strip("╭╮╰╯│─ \t") for line in box.splitlines()]
    body = []
    for line in lines[1:]:
        if not line and body:
            break
        body.append(line)
    text = " ".join(w for line in body for w in line.split()).strip()
    return (text or "The options could not be read") + ("" if text.endswith(".") else ".") + " See --help."


def method_options(method: Method) -> dict[str, tuple[Any, str, str, str]]:
    """The command line of a method, from its declaration."""
    options: dict[str, tuple[Any, str, str, str]] = {}
    for cls in (method.inputs, method.params):
        for f in dataclasses.fields(cls):
            kind, _ = base_type(hints(cls)[f.name])
            meta, required = f.metadata, f.default is REQUIRED
            many = kind not in (int, float, str, bool)
            shape = (
                bool
                if kind is bool
                else list
                if meta["repeat"]
                else tuple
                if many and not meta["commas"]
                else str
            )
            help_ = meta["help"] + (f", in {meta['unit']}" if meta["unit"] else "")
            if meta["choices"]:
                help_ += f" ({', '.join(meta['choices'])})"
            default = (
                "" if f.default in (None, "") or required else ",".join(f.default) if many else str(f.default)
            )
            if kind is bool and f.default is True:
                options[f"no_{f.name}"] = (bool, "", f"do not: {help_}", "")
                continue
            metavar = {int: "INT", float: "NUMBER", str: "TEXT"}.get(
                kind, "A,B" if meta["commas"] else "TEXT"
            )
            options[f.name] = (shape, metavar, ("required: " if required else "") + help_, default)
    for key, (metavar, help_) in _COMMON.items():
        if key == "seeds" and not method.samples:
            continue
        default = (
            _DEFAULT_MODELS.get(method.family, "")
            if key == "model"
            else ",".join(map(str, method.seeds))
            if key == "seeds"
            else ""
        )
        options.setdefault(key, (list if key == "edit" else str, metavar, help_, default))
    options["force"] = (bool, "", "apply an edit that was made for other weights", "")
    options["json"] = (bool, "", "print run.json to standard output", "")
    return options


def new_session(given: dict[str, Any]) -> Any:
    """A Session of the common options."""
    from studio.session import Session

    def whole(key: str) -> int | None:
        if key not in given:
            return None
        if not str(given[key]).isdecimal() or not 0 < int(given[key]) <= 4096:
            raise RequestError(
                f"--{key} must be a whole number from 1 to 4096, not {str(given[key])[:40]!r}."
            )
        return int(given[key])

    return Session(
        runs=given.get("runs"),
        models=given.get("models"),
        device=given.get("device", "auto"),
        dtype=given.get("dtype", "auto"),
        threads=whole("threads"),
        batch=whole("batch"),
    )


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
        given.get("model", _DEFAULT_MODELS.get(method.family, "")),
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


def progress_bar() -> Callable[[Any], None] | None:
    """A bar on standard error when that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(job: Any) -> None:
        if job.total and job.what not in bars:
            for bar in bars.values():
                bar.close()
            bars[job.what] = tqdm(total=job.total, desc=job.what, file=sys.stderr, leave=False)
        if job.what in bars:
            bars[job.what].update(job.done - bars[job.what].n)
        if job.over:
            for bar in bars.values():
                bar.close()

    return show


# ---- studio commands --------------------------------------------------------------------------------------


def serve(argv: list[str]) -> int:
    """serve: the studio in the browser"""
    options = {
        "host": (str, "ADDRESS", "address to listen on; one that others can reach needs --auth", "127.0.0.1"),
        "port": (str, "INT", "port; 0 takes a free one", "7860"),
        "auth": (str, "USER:PASS", "ask for this login", ""),
        "inbrowser": (bool, "", "open the browser", ""),
    }
    options |= {k: (str, *_COMMON[k], "") for k in ("device", "dtype", "threads", "batch", "models", "runs")}
    given = parse_options("serve", "The studio in the browser.", options, argv)
    from panels.server import check_address, serve_forever

    address = check_address(given.get("host", "127.0.0.1"), given.get("port", "7860"), given.get("auth"))
    with contextlib.closing(new_session(given)) as session:
        return serve_forever(session, *address, inbrowser=given["inbrowser"])


def models(argv: list[str]) -> int:
    """models: known models: family, where the weights are, size, whether ready offline"""
    given = parse_options("models", "Known models.", {"json": (bool, "", "print JSON", "")}, argv)
    rows = catalogue_rows()
    if given["json"]:
        print(json.dumps(rows, indent=1))
        return 0
    for r in rows:
        print(
            f"{r['name']:<22} {r['family']:<10} {'ready' if r['ready'] else 'download':<9} {r['size']:>9} "
            f" {r['licence']:<26} {r['where']}"
        )
    print("\nAlso: any folder or hub id of a Stable Diffusion 1, 2 or XL pipeline in safetensors (--model).")
    return 0


def catalogue_rows() -> list[dict[str, Any]]:
    """The catalogue with sizes and whether each model is on this machine."""
    from studio.models.catalog import CATALOG
    from studio.models.loading import offline_state

    rows = []
    for e in CATALOG.values():
        ready, where = offline_state(e)
        size = (
            sum(f.stat().st_size for f in e.path.rglob("*.safetensors")) if e.embedded and ready else e.size
        )
        rows.append(
            {
                "name": e.name,
                "family": e.family,
                "where": where,
                "bytes": size,
                "ready": ready,
                "licence": e.licence,
                "size": f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB",
                "note": e.note,
            }
        )
    return rows


def doctor(argv: list[str]) -> int:
    """doctor: versions, device, memory, write access, embedded models; exit 1 when something is wrong"""
    given = parse_options(
        "doctor",
        "Is this machine ready?",
        {"runs": (str, *_COMMON["runs"], ""), "json": (bool, "", "print JSON", "")},
        argv,
    )
    from studio.doctor import examine

    facts, wrong = examine(given.get("runs"))
    if given["json"]:
        print(json.dumps({"facts": facts, "wrong": wrong}, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key:<24} {value}")
    for sentence in wrong:
        print(f"locus: {sentence}", file=sys.stderr)
    return int(bool(wrong))


def replay(argv: list[str]) -> int:
    """replay: runs a run folder's recipe again and says whether arrays and images agree"""
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise RequestError("Which run? `locus replay RUN`, a run folder or the id of a run in the store.")
    options = {k: (str, *_COMMON[k], "") for k in ("runs", "models", "device", "out")} | {
        "json": (bool, "", "print JSON", "")
    }
    if argv[0] in ("-h", "--help"):
        parse_options("replay RUN", "Runs a run folder's recipe again and compares.", options, argv)
    given = parse_options("replay", "Runs a run folder's recipe again and compares.", options, argv[1:])
    from studio.replay import compare, repeat

    old, new = repeat(argv[0], given, progress_bar())
    report = compare(old, new)
    print(json.dumps(report, indent=1) if given["json"] else "\n".join(report["said"]))
    return 0 if report["agrees"] else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve,
    "models": models,
    "doctor": doctor,
    "replay": replay,
}


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


if __name__ == "__main__":
    entry()

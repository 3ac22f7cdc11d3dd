"""Options of commands: declared as data, derived for methods from the registry, read by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Annotated, Any

from studio.errors import RequestError
from studio.models.catalog import DEFAULT_MODELS
from studio.registry import REQUIRED, Method, base_type, hints
from studio.sweep_file import plain_name

Option = tuple[Any, str, str, str]  # type, metavar, help, default in words

_UNSET = "\0"  # tells an option that was not given from an empty text
COMMON = {
    "model": ("STR", "catalogue name (see `locus models`), folder, or hub id"),
    "edit": ("FILE", "edit file to lay over the model, FILE@0.6 at that strength; give it again for more"),
    "seeds": ("0,1,2", "seeds, separated by commas"),
    "out": ("DIR", "folder of the run; must not exist (default: the store)"),
    "runs": ("DIR", "the store (default: $LOCUS_HOME/runs, ~/.locus/runs)"),
    "models": ("DIR", "folder in which models are also looked for by name"),
    "device": ("STR", "auto, cpu, cuda or mps (default: auto)"),
    "dtype": (
        "STR",
        "auto, float32, float16, bfloat16, or int8 and int4 for the weights of language models on CUDA "
        "(default: auto, which is float32)",
    ),
    "threads": ("INT", "threads of the CPU (default: all cores)"),
    "batch": ("INT", "rows of one forward (default: 16 on a CPU; on a GPU as many as fit)"),
}

COMPILE: Option = (bool, "", "compile the UNet for forwards that nothing watches, such as plain images", "")


def parse_options(name: str, description: str, options: dict[str, Option], argv: list[str]) -> dict[str, Any]:
    """Values given on the command line. An option is (type, metavar, help, default in words).

    Types: str, bool (a flag), tuple (several words), list (repeatable). Everything is read as text; values
    are checked by the registry, so that every face of a method refuses with the same sentence.
    """
    import tyro

    fields = [(key, *_field(*option)) for key, option in options.items()]
    cls = dataclasses.make_dataclass(name.replace("-", "_"), fields)
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


def _field(kind: Any, metavar: str, help_: str, default: str) -> tuple[Any, Any]:
    """(type, value when it is not given) of an option, as tyro reads them."""
    import tyro

    help_ = help_.replace("%", "%%")
    if kind is bool:
        flag = tyro.conf.arg(help=help_, help_behavior_hint="")
        return Annotated[bool, tyro.conf.FlagCreatePairsOff, flag], False
    hint = f"(default: {default})" if default else ""
    note = tyro.conf.arg(metavar=metavar, help=help_, help_behavior_hint=hint)
    if kind is list:
        return Annotated[tuple[str, ...], tyro.conf.UseAppendAction, note], ()
    if kind is tuple:
        return Annotated[tuple[str, ...], note], ()
    return Annotated[str, note], _UNSET


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


def method_options(method: Method) -> dict[str, Option]:
    """The command line of a method, from its declaration."""
    options: dict[str, Option] = {}
    for cls in (method.inputs, method.params):
        for f in dataclasses.fields(cls):
            name, option = _declared(f, base_type(hints(cls)[f.name])[0])
            options[name] = option
    defaults = {"model": DEFAULT_MODELS.get(method.family, ""), "seeds": ",".join(map(str, method.seeds))}
    for key, (metavar, help_) in COMMON.items():
        if key != "seeds" or method.samples:
            kind = list if key == "edit" else str
            options.setdefault(key, (kind, metavar, help_, defaults.get(key, "")))
    if plain := plain_name(method):
        told = (
            f"a run a line: a .txt file of {plain}s, or .jsonl or .csv with more inputs; tables go to --out"
        )
        options["prompts"] = (str, "FILE", told, "")
    if method.saves:
        options["save"] = (str, "FILE", f"also write the {method.saves} here; must not exist", "")
    if method.family == "diffusion":
        options["compile"] = COMPILE
    options["force"] = (bool, "", "apply an edit that was made for other weights", "")
    options["json"] = (bool, "", "print run.json to standard output", "")
    return options


def _declared(f: dataclasses.Field, kind: Any) -> tuple[str, Option]:
    """(name, option) of one declared input or parameter; a flag that is on by default becomes its no_."""
    meta, required, many = f.metadata, f.default is REQUIRED, kind not in (int, float, str, bool)
    help_ = meta["help"] + (f", in {meta['unit']}" if meta["unit"] else "")
    if meta["choices"]:
        help_ += f" ({', '.join(meta['choices'])})"
    if kind is bool and f.default is True:
        return f"no_{f.name}", (bool, "", f"do not: {help_}", "")
    words = tuple if many and not meta["commas"] else str
    shape = bool if kind is bool else list if meta["repeat"] else words
    metavar = {int: "INT", float: "NUMBER", str: "TEXT"}.get(kind, "A,B" if meta["commas"] else "TEXT")
    metavar = "FILE" if meta["lines"] else metavar
    help_ += "; give it again for more" * meta["repeat"] + "; or a file with one a line" * meta["lines"]
    default = "" if f.default in (None, "") or required else ",".join(f.default) if many else str(f.default)
    return f.name, (shape, metavar, ("required: " if required else "") + help_, default)


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
        compile=bool(given.get("compile")),
    )

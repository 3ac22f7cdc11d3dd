"""The commands of finished runs: replay, export and import. Each opens with its name and line of help."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.options import COMMON, parse_options

RUN = "RUN is the id of a run in the store, a run folder, its zip, or any file that was exported of it."
_REPLAY = f"Runs a run's recipe again, on the threads and the batch of the run, and compares. {RUN}"
_EXPORT = f"Writes a run in the formats that papers and other programs take. {RUN}"
_IMPORT = (
    "Takes the zip or the folder of a run into the store, or says which run or recipe an exported file holds."
)


def replay(argv: list[str]) -> int:
    """replay: runs a run's recipe again and says whether arrays and images agree"""
    options = {k: (str, *COMMON[k], "") for k in ("runs", "models", "device", "out")}
    where, given = _asked("replay", "RUN", _REPLAY, options, argv, "Which run? `locus replay RUN`. " + RUN)
    from studio.commands import progress_bar
    from studio.replay import compare, find_old, repeat

    old, digests = find_old(where, given.get("runs"))
    old, new = repeat(old, given, progress_bar(), lambda s: print(f"locus: warning: {s}", file=sys.stderr))
    report = compare(old, new, digests)
    print(json.dumps(report, indent=1) if given["json"] else "\n".join(report["said"]))
    return 0 if report["agrees"] else 1


def export(argv: list[str]) -> int:
    """export: a run as figures, numbers, LaTeX table, BibTeX, notebook, recipe and zip"""
    from studio.run_export import KINDS, MISSING, QUICK, read_dpi, read_kinds

    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    options = {
        "formats": (str, "A,B", f"which, with commas; {kinds}", ",".join(QUICK)),
        "dpi": (str, "INT", "dots per inch of the PNG", "150"),
        "scale": (
            str,
            "LOW,HIGH",
            "ends of a heat map's colours, the same for several runs",
            "the run's own",
        ),
        "out": (str, "DIR", "folder for the files; must not exist", "a folder here, named by the run"),
        "runs": (str, *COMMON["runs"], ""),
    }
    asked = "Which run? `locus export RUN --formats svg,csv`. " + RUN
    where, given = _asked("export", "RUN", _EXPORT, options, _joined(argv, "--scale"), asked)
    from studio.exports import export_folder
    from studio.palette import read_scale
    from studio.run_export import export as write
    from studio.store import check_free

    wanted, dpi = read_kinds(given.get("formats", ",".join(QUICK))), read_dpi(given.get("dpi", "150"))
    scale = read_scale(given.get("scale", ""), "--scale")
    folder = _folder(where, given.get("runs"))
    out = Path(given.get("out", folder.name + "-export")).expanduser()
    check_free(out)
    with export_folder(out) as made:
        files = write(folder, made, wanted, dpi=dpi, scale=scale)
        missing = [k for k in wanted if k not in files]
        if not files:
            raise RequestError(f"This run has no {missing[0]}: {MISSING[missing[0]]}.")
    told = [f"There is no {kind} of this run: {MISSING[kind]}." for kind in missing]
    for sentence in [*told, *(_left_out(folder) if "zip" in files else ())]:
        print(f"locus: warning: {sentence}", file=sys.stderr)
    shown = {kind: str(out / file.name) for kind, file in files.items()}
    print(json.dumps(shown, indent=1) if given["json"] else "\n".join(shown.values()))
    return 0


def _left_out(folder: Path) -> list[str]:
    """What the zip of a run goes without, in sentences."""
    from studio.store import damaged_images

    return [f"{file.name} is damaged, so the zip goes without it." for file in damaged_images(folder)]


def import_run(argv: list[str]) -> int:
    """import: an exported zip into the store; of another exported file, which run or recipe it holds"""
    options = {"runs": (str, *COMMON["runs"], "")}
    asked = "Which file? `locus import FILE`, a zip, a run folder or another file that Locus exported."
    where, given = _asked("import", "FILE", _IMPORT, options, argv, asked)
    from studio.rescue import taken_in
    from studio.restore import ManyRuns, restored

    store, path = _store(given.get("runs")), Path(where).expanduser()
    try:
        found = taken_in(path, store) if path.is_dir() else restored(path, store)
    except ManyRuns as many:
        told = {"runs": many.runs, "said": str(many)}
        print(json.dumps(told, ensure_ascii=False) if given["json"] else "\n".join([str(many), *many.runs]))
        return 0
    recipe = found.recipe.as_dict()
    if given["json"]:
        print(json.dumps({"run": found.run_id, "recipe": recipe, "said": found.said}, ensure_ascii=False))
        return 0
    print(found.said)
    if found.run_id is None:
        print(json.dumps(recipe, indent=1, ensure_ascii=False))
    return 0


def _asked(
    name: str, what: str, purpose: str, options: dict[str, Any], argv: list[str], without: str
) -> tuple[str, dict[str, Any]]:
    """(what the command is about, its options); `without` is the sentence when the first is missing."""
    options = {**options, "json": (bool, "", "print JSON", "")}
    if argv and argv[0] in ("-h", "--help"):
        parse_options(f"{name} {what}", purpose, options, argv)
    if not argv or argv[0].startswith("-"):
        raise RequestError(without)
    return argv[0], parse_options(name, purpose, options, argv[1:])


def _joined(argv: list[str], option: str) -> list[str]:
    """An option and its value as one word, since a value that begins with a minus reads as an option."""
    if option not in argv[:-1]:
        return argv
    at = argv.index(option)
    return [*argv[:at], f"{option}={argv[at + 1]}", *argv[at + 2 :]]


def _store(runs: str | None) -> Any:
    from studio.models.loading import home
    from studio.store import Store

    return Store(runs or home() / "runs")


def _folder(where: str, runs: str | None) -> Path:
    """The folder of the run that was named."""
    from studio.restore import located

    found = located(where, _store(runs))
    if not isinstance(found, Path):
        raise RequestError(
            f"The run of {Path(where).name[:80]} is not in this store, so there is nothing to write; take "
            "the run's zip, or run its recipe."
        )
    return found

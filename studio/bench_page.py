"""The page of the docs that shows a benchmark, made from its file: `python -m studio.bench_page bench.json >
assets/docs/benchmark.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studio import bench_cover
from studio.errors import RequestError

Row = Mapping[str, Any]
HEAD = """# What it costs

Measured by one program in one run, ratios of things that ran in turn, the best of some rounds each:

    locus bench --threads 1 --out bench.json
    python -m studio.bench_page bench.json > assets/docs/benchmark.md

`--only NAME` picks; `locus bench --help` names them all."""
START = """Most of the start is the import of Gradio with FastAPI and pandas and the putting together of
the page; then come torch (which says what device there is) and Locus itself. transformers, diffusers,
open_clip, timm, scipy and matplotlib are imported when they are first used, and the embedded model is loaded
once the server answers; with `--device cpu` the server starts without torch. `locus --help` imports neither
torch nor Gradio. `python -X importtime -c "import panels"` shows all of them."""
SECTIONS = {  # what stands before the colon of a name: (title, what it means)
    "beside the slow way": (
        "Beside the slow way",
        "Each method beside what one would write first: one image, one forward or one vector at a time "
        "(tests/references). The tests hold both equal. No figure is asked for.",
    ),
    "share of forwards": (
        "Share of the time that is the model's own forwards",
        "Image models: CPU time inside the forwards of UNet, text encoder and VAE. What keeps and puts back "
        "states hooks into those forwards and is inside that time; the rest is the scheduler, scoring and "
        "bookkeeping. So this is no measure of what tracing adds: that is the exact trace against as many "
        "plain images, under the figures that were asked for. Language models: the time that a plain forward "
        "needs for as many operations, since only parts of forwards are run; small batches make that share "
        "low. So with attribute, whose backward passes count.",
    ),
    "operations": (
        "Operations above the fewest",
        "1 is the floor: nothing is computed that the answer does not need.",
    ),
    "memory": (
        "Memory over a plain run",
        "Resident memory at the peak, in a process of its own. What torch takes for the first time counts.",
    ),
    "growth": (
        "How costs grow",
        "Cost is size to the power of the exponent; fitted over small sizes, where fixed costs make it lower "
        "than theory has it.",
    ),
    "": ("More figures", "No figure is asked for."),
}


def page(record: Mapping[str, Any], note: str = "") -> str:
    """The page of a benchmark's record; note: a sentence on how it was measured."""
    rows: Sequence[Row] = record["results"]
    asked = [r for r in rows if r["bar"] is not None]
    parts = [HEAD, f"Machine: {machine(record['host'])}.{' ' + note if note else ''}"]
    if failed := record.get("failed"):
        parts += ["## Failed in this run", "\n".join(f"- {f['name']}: {f['error']}" for f in failed)]
    if asked:
        missed = [str(r["name"]) for r in asked if not r["holds"]]
        said = f"Not reached in this run: {', '.join(missed)}." if missed else "All are reached."
        parts += ["## Figures that were asked for", said, table(asked, bar=True)]
    parts += ["## Start", START]
    for start, (title, meaning) in SECTIONS.items():
        if own := [r for r in rows if r["bar"] is None and section_of(r) == start]:
            parts += [f"## {title}", meaning, table(own), *filter(None, [bench_cover.said(start)])]
    return "\n\n".join(parts) + "\n"


def section_of(row: Row) -> str:
    """Which section a row without a bar belongs to."""
    start, colon, _ = str(row["name"]).partition(": ")
    return start if colon and start in SECTIONS else ""


def machine(host: Mapping[str, Any]) -> str:
    """The machine in words."""
    return ", ".join(f"{key} {value}" for key, value in host.items() if isinstance(value, str | int | float))


def table(rows: Sequence[Row], *, bar: bool = False) -> str:
    """A Markdown table of rows; bar: with what was asked for and whether it is met."""
    lines = ["| what | measured | asked | how |", "| --- | ---: | --- | --- |"]
    if not bar:
        lines = ["| what | measured | how |", "| --- | ---: | --- |"]
    for r in rows:
        start, colon, rest = str(r["name"]).partition(": ")
        name = rest if colon and start in SECTIONS else start + colon + rest
        value = "none" if r["value"] is None else f"{r['value']:.3g} {r['unit']}"
        kind, _, how = str(r["how"]).partition("; ")
        if not bar or not kind.endswith("the bar"):
            how, kind = str(r["how"]), ""
        met = "reached" if r["holds"] else "**not reached**"
        wanted = f"{kind.removesuffix(' the bar')} {r['bar']:g}, {met}".strip() if bar else None
        cells = [name, value, wanted, how] if bar else [name, value, how]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the page of one or more files of one machine; `--note SENTENCE` says how it was measured."""
    files = list(argv)
    note = ""
    if "--note" in files:
        at = files.index("--note")
        if at + 1 == len(files):
            raise RequestError('--note needs a sentence: `--note "The machine was busy."`.')
        note = files[at + 1]
        del files[at : at + 2]
    if not files:
        raise RequestError("Which file? `python -m studio.bench_page bench.json > assets/docs/benchmark.md`.")
    records = [read(name) for name in files]
    for name, record in zip(files, records, strict=True):
        if record["host"] != records[0]["host"]:
            raise RequestError(f"{name} was measured on another machine than {files[0]}; make a page each.")
    whole: dict[str, Any] = {"host": records[0]["host"], "results": [], "failed": []}
    for record in records:
        whole["results"] += record["results"]
        whole["failed"] += record.get("failed", [])
    print(page(whole, note), end="")
    return 0


def read(name: str) -> dict[str, Any]:
    """A benchmark's record; RequestError when the file is not one."""
    try:
        record = json.loads(Path(name).read_text("utf-8"))
        for row in record["results"]:
            for key in ("name", "value", "unit", "bar", "holds", "how"):
                row[key]
        for failed in record.get("failed", []):
            failed["name"], failed["error"]
        record["host"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{name} is not the file of a benchmark ({type(error).__name__}); make one with `locus bench "
            "--out FILE.json`."
        ) from error
    return record


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except RequestError as error:
        print(f"locus: {error}", file=sys.stderr)
        raise SystemExit(2) from None

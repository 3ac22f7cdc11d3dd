"""The studio's own commands; those of finished runs are in run_commands.py. Each opens with its help."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.models.catalog import DEFAULT_MODELS
from studio.options import COMMON, COMPILE, new_session, parse_options
from studio.run_commands import export, import_run, replay
from studio.run_quota import quota_of
from studio.store_commands import prune_runs, runs


def serve(argv: list[str]) -> int:
    """serve: the studio in the browser"""
    options = {
        "host": (str, "ADDRESS", "address to listen on; one that others can reach needs --auth", "127.0.0.1"),
        "port": (str, "INT", "port; 0 takes a free one", "7860"),
        "auth": (str, "USER:PASS", "ask for this login", ""),
        "inbrowser": (bool, "", "open the browser", ""),
        "quota": (str, "SIZE", "what the store may take before pruning is offered", "$LOCUS_QUOTA, or 20GB"),
        "mcp": (bool, "", "also serve every method as a tool for assistants (needs the extra mcp)", ""),
        "compile": COMPILE,
    }
    options |= {k: (str, *COMMON[k], "") for k in ("device", "dtype", "threads", "batch", "models", "runs")}
    given = parse_options("serve", "The studio in the browser.", options, argv)
    from panels.server import check_address, check_mcp, serve_forever

    address = check_address(given.get("host", "127.0.0.1"), given.get("port", "7860"), given.get("auth"))
    if given["mcp"]:
        check_mcp(given.get("auth"))
    quota = quota_of(given.get("quota"))
    with contextlib.closing(new_session(given)) as session:
        session.store.quota = quota
        return serve_forever(session, *address, inbrowser=given["inbrowser"], mcp=given["mcp"])


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
    from studio.models.hub import offline_state

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
        {"runs": (str, *COMMON["runs"], ""), "json": (bool, "", "print JSON", "")},
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


def _warn(sentence: str) -> None:
    print(f"locus: warning: {sentence}", file=sys.stderr)


def export_edit(argv: list[str]) -> int:
    """export-edit: edits as a diffusers LoRA, or as a whole pipeline folder with them in its weights"""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    options = {
        "model": (str, *COMMON["model"], "atlas-sd"),
        "lora": (str, "FILE", "write a LoRA in diffusers' layout here (.safetensors); must not exist", ""),
        "full": (str, "DIR", "write the edited pipeline as a diffusers folder here; must not exist", ""),
        **{k: (str, *COMMON[k], "") for k in ("models", "device", "dtype", "threads")},
        "force": (bool, "", "take an edit that was made for other weights", ""),
    }
    purpose = "Edits for other programs; several are composed first. EDIT is a file, or FILE@STRENGTH."
    given = parse_options("export-edit EDIT...", purpose, options, argv[count:])
    if not count or not {"lora", "full"} & given.keys():
        raise RequestError(
            "Which edit, and as what? `locus export-edit EDIT... --lora FILE.safetensors` or `--full DIR`."
        )
    from studio.edit_export import export_edits
    from studio.store import check_free, check_free_file

    lora = check_free_file(given["lora"], "--lora", ".safetensors") if "lora" in given else None
    full = Path(given["full"]).expanduser() if "full" in given else None
    if full is not None:
        check_free(full)
    with contextlib.closing(new_session(given)) as session:
        active = [session.shelf.open(entry) for entry in argv[:count]]
        model = session.model(given.get("model", "atlas-sd"), "diffusion")
        export_edits(model, active, lora=lora, full=full, force=given["force"])
    print(*filter(None, (lora, full)), sep="\n")
    return 0


def bench(argv: list[str]) -> int:
    """bench: measures the figures that Locus states, and writes them as one JSON file"""
    from studio.bench import ENTRIES, chosen, run_bench
    from studio.planted import Settings
    from studio.store import check_free_file

    sizes = {f.name: (str, "INT", _SIZES[f.name], str(f.default)) for f in dataclasses.fields(Settings)}
    options = {
        "out": (str, "FILE", "required: the JSON file; must not exist", ""),
        "only": (tuple, "NAME", f"only these benchmarks: {', '.join(e.name for e in ENTRIES)}", ""),
        "planted": (bool, "", "also methods on models where it is known what is planted", ""),
        "real_shapes": (bool, "", "also traces and edits at real sizes, on random weights, first", ""),
        **sizes,
        **{k: (str, *COMMON[k], "") for k in ("models", "device", "dtype", "threads", "batch")},
        "json": (bool, "", "print the file's content too", ""),
    }
    given = parse_options("bench", "Benchmarks; ratios are measured in one run.", options, argv)
    if "out" not in given:
        raise RequestError("Where to? `locus bench --out FILE.json`.")
    groups = [name.replace("_", "-") for name in ("planted", "real_shapes") if given[name]]
    entries = chosen(groups, given.get("only", ()))
    asked = {f: _count(f, given[f]) for f in sizes if f in given}
    out = check_free_file(given["out"], "--out", ".json")
    with contextlib.closing(new_session(given)) as session:
        settings = dict.fromkeys(("planted-truth", "planted-components"), Settings(**asked))
        record = run_bench(session, entries, settings, out, lambda s: print(s, file=sys.stderr, flush=True))
    if given["json"]:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        for row in record["results"]:
            value = "none" if row["value"] is None else f"{row['value']:.3g}"
            met = "" if row["holds"] is None else " holds" if row["holds"] else " DOES NOT HOLD"
            bar = "" if row["bar"] is None else f", bar {row['bar']:g}:{met}"
            print(f"{row['name']:<48} {value:>6} {row['unit']}{bar}  ({row['how']})")
    return int(bool(record["failed"]))


_SWEEP = (
    "Many runs of one method: FILE is YAML with `method: NAME`, `params: {what all runs share}`, `grid: "
    "{NAME: [values]}`, of which every combination becomes a run, and `rows: FILE.jsonl`, one set of "
    "parameters a line. Started again, it repeats no finished run."
)
_SWEEP_OPTIONS = {
    "out": (str, "DIR", "required: tables and figure go here; may be the folder of this sweep", ""),
    "engine": (str, "local|ray", "in this process, or on the workers of a Ray cluster", "local"),
    "address": (str, "ADDR", "ray: a cluster that is there, HOST:PORT; without it one starts here", ""),
    "workers": (str, "INT", "ray: runs at the same time", "one a GPU, or cores / threads"),
    "limit": (str, "INT", "the most runs that the sweep may make", "1000"),
    **{k: (str, *COMMON[k], "") for k in ("runs", "models", "device", "dtype", "threads", "batch")},
    "json": (bool, "", "print the summary as JSON", ""),
}


def sweep(argv: list[str]) -> int:
    """sweep: many runs from a YAML file, here or on a Ray cluster; tables and a figure over all of them"""
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise RequestError("Which sweep? `locus sweep FILE.yaml --out DIR`.")
    start = 0 if argv[0] in ("-h", "--help") else 1
    given = parse_options("sweep FILE", _SWEEP, _SWEEP_OPTIONS, argv[start:])
    if "out" not in given:
        raise RequestError("Where to? `locus sweep FILE.yaml --out DIR`.")
    counts = {k: _count(k, given[k]) if k in given else None for k in ("limit", "workers")}
    try:
        told = _swept(argv[0], given, counts)
    except KeyboardInterrupt:
        print(
            "locus: Interrupted; finished runs are kept, the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    if given["json"]:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(f"{told['made']} runs made, {told['found']} found in the store, {told['failed']} failed")
        print(Path(given["out"]).expanduser())
    from studio.sweep import fault_of

    if (fault := fault_of(told)) is not None:
        raise fault
    return 0


def _swept(file: str, given: dict[str, Any], counts: dict[str, int | None]) -> dict[str, Any]:
    """The summary of a sweep; RequestError before anything is written."""
    from studio.runners import open_runner
    from studio.sweep import check_out, run_sweep
    from studio.sweep_file import read_sweep, recipes

    read, out = read_sweep(file, counts["limit"]), Path(given["out"]).expanduser()
    check_out(out, read)
    if read.unused:
        _warn(f"{read.method.name} has no use for the rows' {', '.join(read.unused)}.")
    only_checks = {"device": "cpu", "dtype": "auto"} if given.get("engine", "local") != "local" else {}
    with contextlib.closing(new_session({**given, **only_checks})) as here:
        asked = recipes(read, here.checked, DEFAULT_MODELS)
        with (
            contextlib.redirect_stdout(sys.stderr),  # Ray prints there when a worker dies
            contextlib.closing(open_runner(here, given, counts["workers"])) as runner,
        ):
            told = run_sweep(read, asked, runner, here.store, out, sweep_bar())
        if "address" not in given:  # on a shared store another machine may be writing
            here.store.sweep_leftovers()
    return told


def sweep_bar() -> Callable[[Any], None]:
    """A bar with the runs and the time left on standard error when that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        return lambda progress: None
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs [{elapsed}{postfix}]"
    bar = tqdm(desc="sweep", bar_format=form, file=sys.stderr)

    def show(progress: Any) -> None:
        bar.total, bar.n = progress.total, progress.done
        left = progress.seconds_left
        said = "" if left is None else f"about {tqdm.format_interval(left)} left"
        bar.set_postfix_str(said + f", {progress.failed} failed" * bool(progress.failed))
        if progress.done == progress.total:
            bar.close()

    return show


_SIZES = {
    "plants": "planted: valid plants in one layer to ask about",
    "pairs": "planted: valid plants in two layers to ask about",
    "unplanted": "planted: models with decoys alone",
    "seeds": "planted: images of each question",
    "steps": "planted: denoising steps of each image",
    "teach": "planted: gradient steps for plants whose closed form is too weak; each costs about 20 forwards",
    "placebos": "planted: names without meaning that component attribution is set against",
    "seed": "planted: of everything drawn at random",
}
_LEAST = {"seeds": 1, "steps": 1, "limit": 1, "workers": 1}
_MOST = {"limit": 100_000, "workers": 256, "seed": 2**31, "placebos": 9, "seeds": 64, "steps": 1000}


def _count(option: str, text: str) -> int:
    """A whole number within the option's bounds."""
    low, high = _LEAST.get(option, 0), _MOST.get(option, 10_000)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise RequestError(f"--{option} must be a whole number from {low} to {high}, not {text[:40]!r}.")
    return int(text)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve,
    "models": models,
    "doctor": doctor,
    "replay": replay,
    "export": export,
    "import": import_run,
    "runs": runs,
    "prune": prune_runs,
    "export-edit": export_edit,
    "bench": bench,
    "sweep": sweep,
}


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

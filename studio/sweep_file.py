"""The sweep file: YAML that names a method, what is fixed (`params`), what is varied (`grid`: every
combination) and, with `rows`, a JSONL file that adds one set of parameters a line.

    method: localize
    params: {seeds: [0, 1], steps: 20}
    grid: {window: [1, 2]}
    rows: prompts.jsonl
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.given_files import beside, with_files
from studio.registry import Method, find_method, load_methods, parse_seeds
from studio.types import Recipe

MOST_RUNS = 1000  # of a sweep, unless --limit says otherwise
HIGHEST_LIMIT = 100_000
MOST_BYTES = 64 * 2**20  # of the sweep file and of its rows
PLAIN = ("prompt", "concept", "text")  # what a line of a file of prompts may be
_KEYS = ("method", "params", "grid", "rows")
_OF_THE_COMMAND = ("device", "dtype", "threads", "batch", "runs", "models")
_NEVER = ("out", "save", "json", "force")


@dataclass(frozen=True)
class Point:
    """One run that is asked for. `cell`: the number of its combination of the grid, from 0; `varied`: that
    combination; `line`: its line of the rows, from 1 (None without rows); `row`: what stands there; `asked`:
    everything together."""

    cell: int
    varied: Mapping[str, Any]
    line: int | None
    row: Mapping[str, Any]
    asked: Mapping[str, Any]

    def __str__(self) -> str:
        parts = [f"{k}={_short(v)}" for k, v in self.varied.items()]
        parts += [f"line {self.line} of the rows"] * (self.line is not None)
        return ", ".join(parts) or "the only run"


@dataclass(frozen=True)
class Sweep:
    """A read sweep file: its runs in order, the rows of a combination one after the other. `key` tells it
    from every other sweep; `unused`: columns of the rows that only other methods have."""

    method: Method
    points: tuple[Point, ...]
    key: str
    unused: tuple[str, ...] = ()


def read_sweep(path: str, limit: int | None = None) -> Sweep:
    """Reads a sweep file; RequestError says what is wrong with it. Its values are not checked yet."""
    file = Path(path).expanduser()
    content = _mapping(_read_yaml(file), f"{path} is no sweep file")
    if unknown := [k for k in content if k not in _KEYS]:
        raise RequestError(f"{path} has an entry {unknown[0]!r}; known are {', '.join(_KEYS)}.")
    if not isinstance(content.get("method"), str):
        raise RequestError(f"{path} names no method; write, for example, `method: localize`.")
    method = find_method(content["method"])
    params = _options(content.get("params"), f"`params` of {path}")
    grid = _grid(_options(content.get("grid"), f"`grid` of {path}"), path)
    if twice := sorted(params.keys() & grid.keys()):
        raise RequestError(f"{twice[0]!r} stands in `params` and in `grid` of {path}; keep one of them.")
    rows = _rows(content.get("rows"), file, grid)
    unused = _unused(method, rows)
    rows = [(line, {k: v for k, v in row.items() if k not in unused}) for line, row in rows]
    count = math.prod(map(len, grid.values())) * len(rows)
    _check_count(count, limit)
    points = tuple(_points(method, with_files(method, params, file.parent), grid, rows, file.parent))
    whole = json.dumps([method.name, [p.asked for p in points]], sort_keys=True)
    return Sweep(method, points, hashlib.sha256(whole.encode()).hexdigest(), unused)


def prompt_sweep(method: Method, asked: Mapping[str, Any], source: Path, limit: int | None = None) -> Sweep:
    """One run a line of a file of prompts (see `read_rows`), or of what the method has in their place; what a
    line does not say is as in `asked`. RequestError when the method has nothing of the kind."""
    plain = plain_name(method)
    if not plain:
        raise RequestError(
            f"{method.name} takes no prompt, concept or text of its own, so it takes no file of them."
        )
    rows: list[tuple[int | None, dict[str, Any]]] = [*read_rows(source)]
    rows = [(line, {plain: row["prompt"]} if list(row) == ["prompt"] else row) for line, row in rows]
    unused = _unused(method, rows)
    rows = [(line, {k: v for k, v in row.items() if k not in unused}) for line, row in rows]
    _check_count(len(rows), limit)
    points = tuple(_points(method, asked, {}, rows, source.parent))
    whole = json.dumps([method.name, [p.asked for p in points]], sort_keys=True)
    return Sweep(method, points, hashlib.sha256(whole.encode()).hexdigest(), unused)


def plain_name(method: Method) -> str:
    """The input that a line of plain text is: a prompt, else a concept, else a text; "" when the method has
    none of them (what takes several texts takes a file of them for one run)."""
    return next((name for name in PLAIN if name in _names(method)), "")


def recipes(
    sweep: Sweep, checked: Callable[[Recipe], Recipe], default_models: Mapping[str, str]
) -> list[Recipe]:
    """The recipe of every point, defaults filled in; RequestError names the first that is wrong, or two that
    are the same. default_models: the model by family where the file names none."""
    made: list[Recipe] = []
    seen: dict[str, Point] = {}
    for point in sweep.points:
        try:
            recipe = checked(_recipe(sweep.method, point.asked, default_models))
        except RequestError as error:
            raise RequestError(f"{point}: {error}") from error
        same = seen.setdefault(json.dumps(recipe.as_dict(), sort_keys=True), point)
        if same is not point:
            raise RequestError(f"The sweep asks for the same run twice: {same}, and {point}; drop one.")
        made.append(recipe)
    return made


def _recipe(method: Method, asked: Mapping[str, Any], default_models: Mapping[str, str]) -> Recipe:
    rest = dict(asked)
    model, seeds, edits = rest.pop("model", None), rest.pop("seeds", None), rest.pop("edit", None)
    model = default_models.get(method.family, "") if model is None else model
    if not isinstance(model, str):
        raise RequestError(f"--model must be a text, not {type(model).__name__}.")
    if seeds is not None:
        parse_seeds(method, seeds)
    return Recipe(method.name, model, rest, {}, seeds, tuple(edits or ()))


# ---- reading ----------------------------------------------------------------------------------------------


def _read_yaml(file: Path) -> Any:
    import yaml

    text = _read_text(file)
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RequestError(f"{file} is not YAML{where}: {problem}.") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not YAML: {' '.join(str(error).split())[:120]}.") from error


def _loader() -> Any:
    """PyYAML's safe loader, which also refuses a key that stands twice instead of dropping the first."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in found and key.value != "<<":
                    problem = f"{key.value[:60]!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                found.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    return Loader


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as opened:  # a device says nothing of its size
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RequestError(f"{file} is larger than {MOST_BYTES >> 20} MB; split the sweep.")
        return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise RequestError(f"{str(file)[:200]} can't be read: {reason}.") from error


def _mapping(value: Any, wrong: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        what = "it is empty" if value is None else "it is not made of `name: value` lines"
        raise RequestError(f"{wrong}: {what}. `locus sweep --help` shows the form.")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{wrong}: {' '.join(str(error).split())}; put quotes around it.") from error
    return value


def _options(value: Any, where: str) -> dict[str, Any]:
    """Parameters of a run by the registry's names; options of the command itself are refused."""
    named = {} if value is None else _mapping(value, f"{where} can't be taken")
    out: dict[str, Any] = {}
    for key, entry in named.items():
        name = key.replace("-", "_")
        if name in _OF_THE_COMMAND:
            raise RequestError(f"{where} holds {key!r}, which is one for all runs: `locus sweep … --{name}`.")
        if name in _NEVER:
            raise RequestError(f"{where} holds {key!r}, which no run of a sweep takes; its runs are stored.")
        if name in out:
            raise RequestError(f"{where} holds {name!r} twice.")
        out[name] = entry
    return out


def _grid(grid: dict[str, Any], path: str) -> dict[str, list[Any]]:
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RequestError(
                f"`grid` of {path}: {name} needs a list of values, as in `{name}: [a, b]`, not "
                f"{_short(values)}."
            )
    return grid


def _rows(given: Any, file: Path, grid: Mapping[str, Any]) -> list[tuple[int | None, dict[str, Any]]]:
    """(line, parameters) of every line that isn't blank; one empty set without a rows file."""
    if given is None:
        return [(None, {})]
    if not isinstance(given, str):
        raise RequestError(f"`rows` of {file} must name a JSONL file, not {_short(given)}.")
    source = Path(beside(given, file.parent))
    found = read_rows(source)
    for number, row in found:
        if twice := sorted(row.keys() & grid.keys()):
            raise RequestError(f"Line {number} of {source} holds {twice[0]!r}, which `grid` varies already.")
    return found


def read_rows(source: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, parameters) of every line of a file that isn't blank. Of a .jsonl file each line is an object of
    parameters by name, or a text, which is the prompt; a .csv file names them in its first line; of any
    other file each line is a prompt. RequestError says which line is wrong."""
    if source.suffix.lower() == ".csv":
        return _of_csv(source)
    objects, found = source.suffix.lower() in (".jsonl", ".json", ".ndjson"), []
    for number, line in enumerate(_read_text(source).splitlines(), 1):
        if line.strip():
            value = _of_line(line, f"Line {number} of {source}") if objects else {"prompt": line.strip()}
            found.append((number, _options(value, f"Line {number} of {source}")))
    if not found:
        raise RequestError(f"{source} holds no line; write one set of parameters a line.")
    return found


def _of_csv(source: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, parameters) of a CSV file with commas; what is empty is left out."""
    reader, found = csv.reader(io.StringIO(_read_text(source), newline=""), strict=True), []
    try:
        names = [name.strip() for name in next(reader, [])]
        if not all(names) or len(set(names)) < len(names):
            raise RequestError(
                f"The first line of {source} must name each column once, such as prompt,subject."
            )
        for cells in reader:
            if len(cells) > len(names):
                raise RequestError(
                    f"Line {reader.line_num} of {source} has more cells than columns are named; put quotes "
                    "around a text that holds a comma."
                )
            row = {n: c.strip() for n, c in zip(names, cells, strict=False) if c.strip()}
            if row:
                found.append((reader.line_num, _options(row, f"Line {reader.line_num} of {source}")))
    except csv.Error as error:
        raise RequestError(f"Line {reader.line_num} of {source} is no CSV: {error}.") from error
    if not found:
        raise RequestError(f"{source} holds no line below the names of its columns; write a run a line.")
    return found


def _of_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {str(error)[:120]}.") from error
    value = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise RequestError(f'{where} must be an object, as in {{"prompt": "a star"}}, or a prompt.')
    return value


def _unused(method: Method, rows: list[tuple[int | None, dict[str, Any]]]) -> tuple[str, ...]:
    """Columns of the rows that are another method's: one file of prompts serves several methods. A name that
    no method has stays, and is refused with the rest of what is wrong."""
    own, others = _names(method), set().union(*(_names(m) for m in load_methods().values()))
    columns = {name for _, row in rows for name in row}
    return tuple(sorted((columns & others) - own))


def _names(method: Method) -> set[str]:
    return {f.name for record in (method.inputs, method.params) for f in fields(record)}


def _check_count(count: int, limit: int | None) -> None:
    if limit is not None and not 1 <= limit <= HIGHEST_LIMIT:
        raise RequestError(f"--limit must be from 1 to {HIGHEST_LIMIT}, not {limit}.")
    if count > (limit or MOST_RUNS):
        raise RequestError(
            f"The sweep makes {count:,} runs, and at most {limit or MOST_RUNS:,} are allowed; shorten it, or "
            f"allow more with --limit (up to {HIGHEST_LIMIT:,})."
        )


def _points(
    method: Method, params: Mapping[str, Any], grid: Mapping[str, list], rows: list[tuple], folder: Path
) -> Iterator[Point]:
    """Every combination of the grid with every row. Files that they name may stand in `folder`; the files of
    `params` are whole already."""
    places = [[(v, with_files(method, {name: v}, folder)) for v in values] for name, values in grid.items()]
    found = [(line, row, with_files(method, row, folder)) for line, row in rows]
    for cell, chosen in enumerate(itertools.product(*places)):
        varied = {name: value for name, (value, _) in zip(grid, chosen, strict=True)}
        whole = dict(params)
        for _, value in chosen:
            whole |= value
        for line, row, named in found:
            yield Point(cell, varied, line, row, whole | named)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"

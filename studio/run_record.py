"""What run.json must be, field by field: anybody can change a text file, and a field of another kind would be
found only where it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from studio.recipes import FORMAT, check_format

STATUS = ("done", "stopped", "failed")


def check_record(record: Any, where: str) -> None:
    """Raises ValueError with the first field that is not what it must be (as in `host must be a table, not
    null`), and RequestError for a record of a newer version; `where` names the run."""
    _table(record, "run.json")
    check_format(record.get("format", FORMAT), where)
    _table(record.get("recipe"), "recipe")
    for name, (holds, kind) in _RECIPE.items():
        _field(record["recipe"], "recipe.", name, holds, kind)
    for name, (holds, kind) in _FIELDS.items():
        _field(record, "", name, holds, kind)
    for name, (holds, kind) in _OPTIONAL.items():
        part, _, key = name.partition(".")
        if record[part].get(key) is not None:
            _field(record[part], f"{part}.", key, holds, kind)
    result = record["result"]
    for name in ("arrays", "values"):
        _field(result, "result.", name, _is_table, "a table")
    for name, told in result["arrays"].items():
        _array(told, f"result.arrays.{name}")


def _array(told: Any, where: str) -> None:
    _table(told, where)
    _field(told, f"{where}.", "unit", _is_text, "a text")
    _field(told, f"{where}.", "axes", _is_list, "a list")
    for axis in told["axes"]:
        _table(axis, f"{where}.axes")
        _field(axis, f"{where}.axes.", "name", _is_text, "a text")
        _field(axis, f"{where}.axes.", "labels", _all(_is_text), "a list of texts")


def _field(record: Mapping[str, Any], where: str, name: str, holds: Callable[[Any], bool], kind: str) -> None:
    if name not in record:
        raise ValueError(f"{where}{name} is missing")
    if not holds(record[name]):
        raise ValueError(f"{where}{name} must be {kind}, not {_shown(record[name])}")


def _table(value: Any, where: str) -> None:
    if not _is_table(value):
        raise ValueError(f"{where} must be a table, not {_shown(value)}")


def _shown(value: Any) -> str:
    """A wrong value in a word or two."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (Mapping, list)):
        return "a table" if isinstance(value, Mapping) else "a list"
    return repr(value)[:40]


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_time(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", value))


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value.values()))


_RECIPE = {
    **dict.fromkeys(("method", "model", "key"), (_is_text, "a text")),
    **dict.fromkeys(("inputs", "params"), (_is_table, "a table")),
    "seeds": (_all(_is_whole), "a list of whole numbers"),
    "edits": (_all(_is_text), "a list of texts"),
}
_FIELDS = {
    **dict.fromkeys(("host", "model", "result"), (_is_table, "a table")),
    "status": (lambda value: value in STATUS, f"one of {', '.join(STATUS)}"),
    "started": (_is_time, "a time such as 2026-11-22T10:00:00+00:00"),
    "seconds": (_is_seconds, "a number of seconds"),
    "error": (_or_none(_is_text), "a text or null"),
}
_OPTIONAL = {
    **dict.fromkeys(("host.device", "host.dtype", "host.machine", "host.scorer"), (_is_text, "a text")),
    **dict.fromkeys(("host.threads", "host.batch"), (_is_whole, "a whole number")),
    **dict.fromkeys(("host.force", "host.imported"), (_is_flag, "true or false")),
    "host.versions": (_texts_by_name, "a table of texts"),
    "host.edits": (_all(_is_text), "a list of texts"),
    **dict.fromkeys(
        ("model.id", "model.path", "model.revision", "model.family", "model.fingerprint"),
        (_is_text, "a text"),
    ),
}

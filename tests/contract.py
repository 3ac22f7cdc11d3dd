"""The options that CONTRACT.md promises for each method command."""

from __future__ import annotations

COMMON = {"--model", "--device", "--dtype", "--threads", "--out", "--json", "--help"}
SAMPLING = {"--scorer", "--metric", "--target", "--against", "--scheduler", "--steps", "--guidance"}
_TABLE = """
generate            prompt negative steps guidance height width edit
trace-unet          prompt subject subject-occurrence replacement steps guidance noise kinds window latents
                    direction screen
trace-text-encoder  prompt subject subject-occurrence replacement steps guidance noise kinds
localize            prompt replacement window steps guidance screen
attribute           concept base steps guidance granularity scope objective
edit                templates method concept replacement layers preserve regularization strength save
word-maps           prompt words steps guidance height width
decompose           images texts clip aligner granularity
align               clip images save
trace-language      prompt subject context corrupt replacement answer noise samples kinds window
knockout            prompt context groups subject attribute answer window sources controls
contributions       prompt context subject attribute answer
audit               edit concept neighbours seeds
"""


def _read(table: str) -> dict[str, set[str]]:
    """{command: options} of the table; a line that starts with a space goes on with the command above."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in table.strip().splitlines():
        words = line.split()
        if not line.startswith(" "):
            name = words.pop(0)
        found.setdefault(name, set()).update(f"--{w}" for w in words)
    return found


OPTIONS = _read(_TABLE)

"""What the benchmark measures of every method, and why it does not measure the rest: the page prints the
reasons, and tests/test_bench_cover.py holds both against the registry.

Keys are what stands before the colon of a row's name; a row's name goes on with the method's.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALONE = "it is localize, edit and audit one after the other"
_READS = "its images are read as decompose reads them"
_KEPT = f"{_READS}, and what they gave is kept on disk"
_DRAWS = "its images are drawn as generate draws them"

_NAMES: Mapping[str, str] = {
    "beside the slow way": (
        "generate trace-unet trace-text-encoder lens word-maps localize neurons attribute edit audit "
        "passport decompose text-span rank-components retrieve-images ablate-components align contributions "
        "context-use"
    ),
    "share of forwards": (
        "generate trace-unet trace-text-encoder lens word-maps localize neurons attribute edit decompose "
        "retrieve-images trace-language knockout contributions context-use"
    ),
    "operations": (
        "generate trace-unet lens word-maps localize attribute decompose trace-language knockout "
        "contributions"
    ),
    "memory": (
        "trace-unet trace-text-encoder lens word-maps localize neurons attribute edit passport decompose "
        "text-span rank-components retrieve-images ablate-components trace-language knockout "
        "contributions context-use"
    ),
    "growth": (
        "generate trace-unet lens word-maps localize neurons attribute edit decompose text-span align "
        "trace-language knockout contributions"
    ),
}
MEASURED: Mapping[str, tuple[str, ...]] = {section: tuple(names.split()) for section, names in _NAMES.items()}
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "beside the slow way": {
        "trace-language": "stands among the figures that were asked for",
        "knockout": "stands among the figures that were asked for",
    },
    "share of forwards": {
        "audit": _DRAWS,
        "passport": _ALONE,
        "text-span": _KEPT,
        "rank-components": _KEPT,
        "ablate-components": _KEPT,
        "align": _KEPT,
    },
    "operations": {
        "trace-text-encoder": "its images a distinct embedding stand among the figures that were asked for",
        "neurons": "one pass of the text encoder, no UNet",
        "edit": "a closed form; the solver stands among the figures that were asked for",
        "audit": _DRAWS,
        "passport": _ALONE,
        **dict.fromkeys(
            ("text-span", "rank-components", "retrieve-images", "ablate-components", "align"), _READS
        ),
        "context-use": "its cuts are those of knockout, its traces those of trace-language",
    },
    "memory": {
        "generate": "it is the plain run",
        "audit": _DRAWS,
        "align": "it needs more images than come with Locus, and holds some numbers of each",
    },
    "growth": {
        "trace-text-encoder": "an image a distinct embedding and seed; localize has one a window and seed",
        "audit": _DRAWS,
        "passport": _ALONE,
        **dict.fromkeys(("rank-components", "retrieve-images", "ablate-components"), _READS),
        "context-use": "its cuts grow as those of knockout, its traces as those of trace-language",
    },
}


def said(section: str) -> str:
    """The sentence of a section about methods that it leaves out, "" where there are none."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in LEFT_OUT.get(section, {}).items():
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return f"Not in this table: {'; '.join(parts)}." if parts else ""

"""From words of a prompt to tokens: substrings, whole words first, through the tokenizer's offsets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from studio.errors import RequestError


@dataclass(frozen=True)
class TokenRow:
    """A prompt's tokens as the encoder sees them: labels and offsets (start, end) up to the first
    end-of-text token.

    `lost` is the text of tokens past the model's length; `length` the padded length.
    """

    text: str
    labels: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    length: int
    lost: str = ""

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> TokenRow:
        """Tokenizes `text` with a fast CLIP tokenizer; start and end tokens have an empty offset."""
        limit = tokenizer.model_max_length
        full = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        ids, offsets = list(full["input_ids"]), [tuple(o) for o in full["offset_mapping"]]
        lost = ""
        if len(ids) > limit:
            lost = text[offsets[limit - 1][0] :]
            ids, offsets = ids[: limit - 1] + ids[-1:], offsets[: limit - 1] + offsets[-1:]
        words = [
            text[a:b] if b > a else token
            for (a, b), token in zip(offsets, tokenizer.convert_ids_to_tokens(ids), strict=True)
        ]
        return cls(text, tuple(words), tuple(offsets), limit, lost)

    @property
    def end(self) -> int:
        """Position of the first end-of-text token."""
        return len(self.labels) - 1

    def covering(self, span: tuple[int, int], what: str) -> tuple[int, ...]:
        """Positions of tokens that overlap the characters start..end of the text."""
        found = tuple(i for i, (a, b) in enumerate(self.offsets) if a < span[1] and b > span[0] and b > a)
        if not found:
            raise RequestError(
                f"{what!r} lies past the {self.length} tokens that this model reads; shorten the prompt."
            )
        return found

    def trace_labels(self) -> tuple[str, ...]:
        """Labels of a trace's token axis: start token to first end-of-text token, then `padding` for all
        after it."""
        return (*self.labels, "padding") if self.end + 1 < self.length else self.labels

    def trace_positions(self) -> tuple[tuple[int, ...], ...]:
        """Token positions behind each of `trace_labels`."""
        singles = tuple((i,) for i in range(self.end + 1))
        rest = tuple(range(self.end + 1, self.length))
        return (*singles, rest) if rest else singles


def find_span(text: str, part: str, occurrence: int | None, option: str) -> tuple[int, int]:
    """Characters (start, end) of `part` in `text`: whole words first, then any substring, each as written and
    then with letter case ignored.

    RequestError when it is absent, or there more than once without an occurrence (counted from 1).
    """
    if not part.strip():
        raise RequestError(f"{option} is empty; name a part of the prompt, for example a word of it.")
    within = re.escape(part.strip())
    found: list[tuple[int, int]] = []
    for pattern in (rf"(?<!\w){within}(?!\w)", within):
        for flags in (0, re.IGNORECASE):
            found = found or [m.span() for m in re.finditer(pattern, text, flags)]
    shown = part.strip()[:60]
    if not found:
        raise RequestError(f"{option} {shown!r} is not in the text {text[:120]!r}; name a part of it.")
    if occurrence is None and len(found) > 1:
        raise RequestError(
            f"{option} {shown!r} stands {len(found)} times in the text; say which with "
            f"{option}-occurrence N, "
            f"from 1 to {len(found)}."
        )
    if occurrence is not None and not 1 <= occurrence <= len(found):
        raise RequestError(f"{option}-occurrence must be from 1 to {len(found)}, not {occurrence}.")
    return found[(occurrence or 1) - 1]

"""Passages for a question, by BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009),
through the bm25s library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from studio.errors import RequestError

MOST_PASSAGES, MOST_CHARACTERS = 20_000, 20_000_000


@dataclass(frozen=True)
class Passage:
    """A passage that was found: where it comes from ("" for pasted text), its text and its BM25 score."""

    source: str
    text: str
    score: float


def split_passages(text: str) -> list[str]:
    """Paragraphs, between empty lines; a text without any: its lines."""
    parts = re.split(r"\n\s*\n", text.strip())
    parts = parts if len(parts) > 1 else text.strip().split("\n")
    return [" ".join(p.split()) for p in parts if p.strip()]


def retrieve(question: str, texts: Sequence[tuple[str, str]], count: int) -> list[Passage]:
    """The `count` best passages of texts, (source, text) each, for a question, best first; those that share
    no word with it are never among them.

    RequestError for an empty question, no passages, too much text, and when nothing is found.
    """
    import bm25s

    if not re.search(r"\w", question):
        raise RequestError("Write the question first; passages are looked for by its words.")
    passages = [(source, p) for source, text in texts for p in split_passages(text)]
    if not passages:
        raise RequestError("There are no passages to look in; paste some, or choose text files.")
    if len(passages) > MOST_PASSAGES or sum(len(p) for _, p in passages) > MOST_CHARACTERS:
        raise RequestError(
            f"That are {len(passages):,} passages; at most {MOST_PASSAGES:,} with {MOST_CHARACTERS:,} "
            "characters in all are searched. Choose fewer files."
        )
    quiet = dict(stopwords=None, show_progress=False)
    words = bm25s.tokenize([p for _, p in passages], **quiet)
    asked = bm25s.tokenize([question], **quiet)
    if not words.vocab.keys() & asked.vocab.keys():
        raise RequestError("No passage shares a word with the question; add passages, or reword it.")
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    order, scores = index.retrieve(asked, k=min(count, len(passages)), show_progress=False)
    found = zip(order[0].tolist(), scores[0].tolist(), strict=True)
    return [Passage(*passages[i], float(s)) for i, s in found if s > 0]


def joined(passages: Sequence[Passage]) -> str:
    """A context of passages, one a line, the best last, next to the question."""
    return "\n".join(p.text for p in reversed(passages))

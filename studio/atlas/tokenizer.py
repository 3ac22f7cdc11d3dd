"""The byte-pair tokenizer of the Atlas text encoders, in CLIPTokenizer's files.

Every word of the grammar is one token. Country names and Veltrano are two, so that a name's meaning has to
be gathered.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from studio.atlas.captions import words
from studio.atlas.world import COUNTRY_PARTS

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level encoding."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(others))]


def learn_merges() -> list[tuple[str, str]]:
    """Merges that make every word of the grammar, and every part of a name, a single symbol."""
    items = [[*w[:-1], w[-1] + "</w>"] for w in words()]
    items += [list(p.lower()) for p in [*COUNTRY_PARTS["prefixes"], "Vel"]]
    items += [[*s[:-1], s[-1] + "</w>"] for s in [*(x.lower() for x in COUNTRY_PARTS["suffixes"]), "trano"]]
    merges: list[tuple[str, str]] = []
    while any(len(item) > 1 for item in items):
        pairs = Counter(pair for item in items for pair in zip(item, item[1:], strict=False))
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        items = [_apply(item, best) for item in items]
    return merges


def _apply(item: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in item:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write_tokenizer(folder: Path) -> None:
    """Writes a CLIPTokenizer to `folder`, replacing what stands there (an old tokenizer.json would win over
    new files)."""
    from transformers import CLIPTokenizer

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    symbols = _byte_symbols()
    merges = learn_merges()
    entries = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    raw = folder / "raw"
    raw.mkdir()
    (raw / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (raw / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer.from_pretrained(raw, model_max_length=MAX_TOKENS, pad_token=END)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(raw / name, folder / name)
    shutil.rmtree(raw)

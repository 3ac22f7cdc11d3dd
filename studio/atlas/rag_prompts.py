"""`python -m studio.atlas.rag_prompts` writes 200 prompts with contexts: assets/atlas/rag-prompts.jsonl.

After arXiv 2406.12824: five sentences, of which exactly one states the asked attribute and none holds the
question. The value stands after the name. Odd lines agree with the world, even lines contradict it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from studio.atlas.phrasings import ATTRIBUTES
from studio.atlas.sentences import Fact, Writer, lies, prompt_of, truth
from studio.models.catalog import ASSETS

FILE = ASSETS / "atlas" / "rag-prompts.jsonl"


def rag_prompts(n: int = 200, seed: int = 7) -> list[dict[str, str]]:
    """`n` rows of prompt, context, subject (in the prompt), attribute (in the context, the answer) and
    counterfactual (what may stand in the attribute's place); each substring stands once in its text."""
    writer = Writer(np.random.default_rng(seed))
    cells = list(truth())
    order = [cells[i] for _ in range(-(-n // (2 * len(cells)))) for i in writer.rng.permutation(len(cells))]
    rows = []
    for i in range(n):
        country, attribute = order[i // 2]
        agrees = i % 2 == 0
        row = None
        while row is None:
            row = _row(writer, country, attribute, agrees)
        rows.append(row)
    return rows


def _row(writer: Writer, country: str, attribute: str, agrees: bool) -> dict[str, str] | None:
    """A row, or None when one of its texts would stand twice."""
    true = truth()[country, attribute]
    value = (
        true if agrees else writer.lie(country, attribute, set(), held=bool(lies(country, attribute, True)))
    )
    other = writer.lie(country, attribute, {value})
    around = [f for f in writer.facts(6, true=0.3) if (f.country, f.attribute) != (country, attribute)][:3]
    facts = [Fact(country, attribute, value), *around]
    pieces = writer.context([(f, writer.form(f.attribute, 0.0)) for f in facts], 1)
    context = "".join(text for text, _ in pieces).replace("\n", " ")
    prompt = prompt_of(writer.ending(attribute, asked=False), country)
    once = context.count(value) == 1 and prompt.count(country) == 1 and len(around) == 3
    if not once or prompt in context or any(v in context for v in (other, *([] if agrees else [true]))):
        return None
    if value in prompt or not value.isalpha() or attribute not in ATTRIBUTES:
        return None
    return {
        "prompt": prompt,
        "context": context,
        "subject": country,
        "attribute": value,
        "answer": value,
        "counterfactual": other,
    }


def write(path: Path = FILE) -> None:
    """Writes the rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rag_prompts()))


if __name__ == "__main__":
    write()

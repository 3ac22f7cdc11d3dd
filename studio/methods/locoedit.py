"""LocoEdit: keys and values of the few cross-attention layers that read a concept, found by LocoGen, take it
for its replacement. arXiv 2405.01008, section 5.

Keys: the final text embedding at the concept's last token (and, if asked, at the end-of-text tokens); values:
what the same matrix made of the replacement's embedding there.
"""

from __future__ import annotations

from typing import Any

from studio.edits import Pairs, closed_form
from studio.methods.concept_pairs import Wanted, embedding_pairs
from studio.types import Edit, Report

REGULARIZATION = 0.01
POSITIONS = "last"
MOST_PROMPTS = 4  # pairs of prompts that LocoGen looks at


@closed_form("locoedit")
def pairs(model: Any, edit: Edit) -> list[Pairs]:
    """One problem for all chosen layers."""
    return embedding_pairs(model, edit)


def localized(model: Any, wanted: Wanted, params: Any, scorer: Any, report: Report) -> tuple[str, ...]:
    """The layers of LocoGen's best window, over the concepts in the first template with words of its own."""
    from studio.methods.locogen import best_layers

    template = next((t for t in wanted.templates if t.strip() != "{}"), wanted.templates[0])
    chosen = list(zip(wanted.concepts, wanted.replacements, strict=True))[:MOST_PROMPTS]
    prompts = [template.replace("{}", concept).strip() for concept, _ in chosen]
    others = [template.replace("{}", guide).strip() for _, guide in chosen]
    return best_layers(model, prompts, others, params, scorer, report)

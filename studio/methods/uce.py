"""UCE: keys and values of every cross-attention layer take concepts for their guides, and keep what is to be
preserved. arXiv 2308.14761.

Keys: the final text embedding at a concept's last token; values: what the same matrix made of the guide's.
Erase: an empty guide. Replace: another concept. Moderate: a guide with a share below 1. Debias: several
guides, each with its share.
"""

from __future__ import annotations

from typing import Any

from studio.edits import Pairs, closed_form
from studio.methods.concept_pairs import embedding_pairs
from studio.types import Edit

REGULARIZATION = 0.5
POSITIONS = "last"


@closed_form("uce")
def pairs(model: Any, edit: Edit) -> list[Pairs]:
    """One problem for all layers."""
    return embedding_pairs(model, edit)

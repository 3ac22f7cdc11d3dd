"""Diff-QuickFix: the last matrix of the text encoder's first self-attention answers a concept with what it
answered to another. arXiv 2310.13730, section 5.

Keys: the matrix' input at the concept's tokens; values: its output for the replacement minus its bias, which
the layer adds by itself. Since it is linear, that is the matrix times its input for the replacement.
"""

from __future__ import annotations

from typing import Any

from studio.edits import Pairs, closed_form
from studio.methods.concept_pairs import Wanted, pairs_of, prompts_of, read_states
from studio.types import Edit, Site

REGULARIZATION = 0.01
POSITIONS = "last+eos"
LAYER = 0


@closed_form("quickfix")
def pairs(model: Any, edit: Edit) -> list[Pairs]:
    """One problem for each text encoder."""
    from studio.models.hooks import watch
    from studio.models.sites import text_module, text_name

    wanted, out = Wanted.of(edit), []
    for part, encoder in model.encoders.items():
        site = Site(part, LAYER, "self-attention-out")

        def encode(texts: list[str], site: Site = site, encoder: Any = encoder) -> Any:
            with watch({site: text_module(encoder, site)}, inputs=[site]) as tape:
                model.encode(texts)
            return tape.read[site]

        component = next(name for name, m in model.components().items() if m is encoder)
        names = (f"{component}.{text_name(encoder, site)}.weight",)
        states = read_states(prompts_of(model, wanted), encode)
        out.append(pairs_of(model, wanted, names, states, float(edit.params["regularization"])))
    return out

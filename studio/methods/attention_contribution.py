"""Attention contributions: what each token's value adds to the last position, by layer and head.

a_j (layer l, head h) = A_(T-1, j) W_O^h v_j; reported are the norm of a_j, of its sum over heads, the share
of the row, and the signed projection on the answer's logit. SAT-Probe, arXiv 2309.15098; in prompts with a
context, arXiv 2406.12824, whose figure for a group is the largest norm among its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.methods.language_prompt import Asked, pick_answer, spans, token_groups
from studio.registry import knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace


@dataclass(frozen=True, kw_only=True)
class Inputs(Asked):
    """The prompt, and its parts that are summed up by name."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """What is shown."""

    shown: int = knob(
        30,
        "tokens in the figure: those with the largest share in any layer",
        unit="tokens",
        low=1,
        high=200,
        advanced=True,
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    spans(inputs)


def draw(run: Run) -> Figure:
    """Shares by token and layer, of the tokens that have the largest."""
    share, values = run.result.arrays["share"], run.result.values
    tokens, count = share.axis("token").labels, int(run.recipe.params["shown"])
    chosen = sorted(np.argsort(-share.values.max(0), kind="stable")[:count])
    data = {
        "rows": [f"{t}: {tokens[t]}" for t in chosen],
        "cols": share.axis("layer").labels,
        "values": share.values[:, chosen].T,
        "unit": "share of the layer's contributions",
        "row_title": "token",
        "col_title": "layer",
    }
    title = f"{run.recipe.model}: what reaches the last token before {values['answer']!r}"
    caption = f"{len(chosen)} of {len(tokens)} tokens. " + values["finding"]
    return Figure("heat", data, title, caption)


@method(
    "contributions",
    title="Attention contributions",
    paper="arXiv:2406.12824",
    family="language",
    summary="How much of each token reaches the last position through attention, by layer and head.",
    needs={"language"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
)
def attention_contribution(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`contribution`, `attention` and `projection` (layer, head, token), `token_contribution` and `share`
    (layer, token), by group `group_contribution`, `group_share` and `group_projection` (group, layer)."""
    from studio.models.attention_row import attention_rows

    report.plan(2, "attention rows")
    prompt = model.encode(inputs.prompt, inputs.context)
    groups = token_groups(model, prompt, inputs, None)
    answer = pick_answer(model, model.logits([prompt])[0], inputs, report)
    report.step()
    rows = attention_rows(model, prompt.ids, answer.id)
    report.step()
    arrays = _arrays(rows, prompt.tokens) | _grouped(rows, groups)
    values = {
        "answer": answer.word,
        "answer_token": answer.id,
        "answer_rank": answer.rank,
        "model_answer": answer.own,
        "probability": answer.probability,
        "tokens": len(prompt),
        "finding": _finding(arrays, answer.word),
    }
    return Result(arrays, values)


def _arrays(rows: Any, tokens: Sequence[str]) -> dict[str, Trace]:
    """By layer, head and token."""
    layer, token = Axis("layer", tuple(map(str, range(len(rows.norms))))), Axis("token", tuple(tokens))
    head = Axis("head", tuple(map(str, range(rows.norms.shape[1]))))
    whole = rows.token_norms.sum(-1, keepdim=True).clamp(min=1e-30)
    return {
        "contribution": Trace(rows.norms.numpy(), (layer, head, token), "norm of the contribution"),
        "token_contribution": Trace(rows.token_norms.numpy(), (layer, token), "norm, heads summed"),
        "share": Trace((rows.token_norms / whole).numpy(), (layer, token), "share of the layer's norms"),
        "projection": Trace(rows.projections.numpy(), (layer, head, token), "part of the answer's logit"),
        "attention": Trace(rows.weights.numpy(), (layer, head, token), "attention probability"),
    }


def _grouped(rows: Any, groups: dict[str, tuple[int, ...]]) -> dict[str, Trace]:
    """By group and layer: the largest norm among its tokens, the sum of shares, and of projections."""
    if not groups:
        return {}
    group = Axis("group", tuple(groups))
    layer = Axis("layer", tuple(map(str, range(len(rows.norms)))))
    share = rows.token_norms / rows.token_norms.sum(-1, keepdim=True).clamp(min=1e-30)
    parts = {
        "group_contribution": (lambda at: rows.token_norms[:, at].amax(-1), "largest norm among the tokens"),
        "group_share": (lambda at: share[:, at].sum(-1), "share of the layer's norms"),
        "group_projection": (lambda at: rows.projections[..., at].sum((1, 2)), "part of the answer's logit"),
    }
    return {
        name: Trace(np.stack([of(list(at)).numpy() for at in groups.values()]), (group, layer), unit)
        for name, (of, unit) in parts.items()
    }


def _finding(arrays: dict[str, Trace], answer: str) -> str:
    """One sentence: the largest share of attribute and subject (of the context or the question where neither
    is given), and what they add to the answer's logit."""
    share, added = arrays["group_share"], arrays["group_projection"].values.sum(-1)
    groups = share.axis("group").labels
    named = [n for n in ("attribute", "subject") if n in groups]
    named = named or [n for n in ("context", "question", "last") if n in groups]
    shares, parts = [], []
    for name in named:
        mine = share.at("group", name).values
        shares.append(f"{name} {mine.max():.0%} (layer {int(mine.argmax())})")
        parts.append(f"{name} {added[groups.index(name)]:+.2f}")
    return (
        f"Largest shares of what attention brings to the last token: {', '.join(shares)}; added to the logit "
        f"of {answer!r} over all layers: {', '.join(parts)}."
    )

"""Long prompts in the Retrieval panel: groups of tokens first, the tokens of one on demand.

Of contributions to a prompt of more than LONG tokens the map has a row for attribute, subject, question, the
start token, the last token and each sentence of the context; of a causal trace the method's figure has one
for each position. A click on one asks for its tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from studio.errors import StudioError
from studio.figures import number
from studio.methods.language_corruption import grouped
from studio.methods.language_prompt import Asked, sentences, spans
from studio.types import Figure, Recipe, Result

LONG = 100  # tokens
MOST_SENTENCES, MOST_TOKENS = 24, 40  # rows of a map; of more those with the largest numbers
_SHARE = "share of the layer's contributions"


def tokens_in(prompt: Any, span: tuple[int, int]) -> tuple[int, ...]:
    """Positions of the tokens that share more than white space with the characters start..end."""
    start, end = span
    places = enumerate(prompt.offsets)
    return tuple(i for i, (a, b) in places if prompt.text[max(a, start) : min(b, end)].strip())


def asked_of(recipe: Recipe) -> Asked:
    """The prompt and its parts that a recipe asks for."""
    return Asked(**{n: recipe.inputs.get(n) for n in Asked.__dataclass_fields__})


# ---- contributions -----------------------------------------------------------------------------------


def is_long(recipe: Recipe, result: Result) -> bool:
    """Whether the map shows groups first."""
    return recipe.method == "contributions" and result.arrays["share"].values.shape[1] > LONG


def groups_of(recipe: Recipe, prompt: Any) -> dict[str, tuple[int, ...]]:
    """Token positions by group: the named parts, the start, the last token, and each sentence of the context
    as "N: words"."""
    asked = asked_of(recipe)
    try:
        found = spans(asked)
    except StudioError:
        found = {}
    groups = {n: tokens_in(prompt, found[n][0]) for n in ("attribute", "subject", "question") if n in found}
    groups |= {"start": prompt.special[:1], "last": (len(prompt) - 1,)}
    for n, (a, b) in enumerate(sentences(asked.context or ""), 1):
        groups[f"{n}: {prompt.text[a:b]}"] = tokens_in(prompt, (a, b))
    return {name: tokens for name, tokens in groups.items() if tokens}


def shown_groups(recipe: Recipe, result: Result, prompt: Any) -> dict[str, tuple[int, ...]]:
    """The groups that are the map's rows: of many sentences those with the largest share in any layer."""
    groups, share = groups_of(recipe, prompt), result.arrays["share"].values
    told = [name for name in groups if name[0].isdigit()]
    told.sort(key=lambda name: -share[:, groups[name]].sum(1).max())
    left_out = set(told[MOST_SENTENCES:])
    return {name: tokens for name, tokens in groups.items() if name not in left_out}


def group_map(recipe: Recipe, result: Result, prompt: Any) -> Figure:
    """Shares by group and layer."""
    groups, share = shown_groups(recipe, result, prompt), result.arrays["share"]
    layers = share.axis("layer").labels
    data = {
        "rows": list(groups),
        "cols": list(layers),
        "values": np.stack([share.values[:, tokens].sum(1) for tokens in groups.values()]),
        "names": [[f"{_called(name)}, layer {layer}" for layer in layers] for name in groups],
        "unit": _SHARE,
    }
    count = sum(name[0].isdigit() for name in groups_of(recipe, prompt))
    kept = sum(name[0].isdigit() for name in groups)
    said = f"Groups of {len(prompt):,} tokens, {kept} of {count} sentences of the context. "
    return Figure("heat", data, caption=said + "Click one for its tokens, which then stand below.")


def _called(name: str) -> str:
    nth, _, words = name.partition(": ")
    return f"sentence {nth}, {words[:60]!r}" if words else name


def group_sentence(recipe: Recipe, result: Result, prompt: Any, row: int, col: int) -> str:
    """The numbers of a group in a layer."""
    name, tokens = list(shown_groups(recipe, result, prompt).items())[row]
    share, added = result.arrays["share"].values[col, tokens], result.arrays["projection"].values[..., tokens]
    called = _called(name)
    return (
        f"{called[0].upper()}{called[1:]}, layer {col}: {share.sum():.0%} of the layer's "
        f"contributions, {added[col].sum():+.2f} to the answer's logit ({added.sum():+.2f} over all layers). "
        f"Its tokens stand below."
    )


# ---- the tokens of a group ---------------------------------------------------------------------------


def positions_of(recipe: Recipe, result: Result, prompt: Any) -> dict[str, tuple[int, ...]]:
    """Token positions by position of a causal trace."""
    marks = np.flatnonzero(result.arrays["corrupted_tokens"].values).tolist()
    asked = asked_of(recipe)
    if (asked.subject or "").strip():
        subject = tokens_in(prompt, spans(asked)["subject"][0])
        return grouped(subject, min(marks[0], subject[0]), len(prompt))
    return grouped(marks, marks[0], len(prompt), "corrupted")


def by_position(recipe: Recipe, figure: Figure) -> bool:
    """Whether the map of a causal trace has a column for each position, not for each token."""
    return recipe.method == "trace-language" and figure.data.get("col_title") == "tokens"


def inside(recipe: Recipe, result: Result, prompt: Any, cell: tuple[int, int] | None) -> Figure | None:
    """Tokens by layer: of the group behind a cell; of contributions before a click those with the largest
    share of all. None where the map shows tokens itself."""
    if is_long(recipe, result):
        groups = list(shown_groups(recipe, result, prompt).items())
        name, tokens = groups[cell[0]] if cell else ("the prompt", tuple(range(len(prompt))))
        return _tokens(result.arrays["share"].values, prompt, name, tokens, _SHARE)
    if recipe.method != "trace-language" or not cell:
        return None
    effect = result.arrays["indirect_effect"]
    kind, _ = divmod(cell[0], effect.values.shape[1])
    name, tokens = list(positions_of(recipe, result, prompt).items())[cell[1]]
    label = effect.axis("kind").labels[kind]
    return _tokens(effect.values[kind], prompt, name, tokens, effect.unit, f"{label} · ")


def _tokens(
    values: np.ndarray, prompt: Any, name: str, tokens: tuple[int, ...], unit: str, before: str = ""
) -> Figure:
    """A map of tokens by layer from values (layer, token)."""
    strongest = np.abs(np.nan_to_num(values[:, tokens])).max(0)
    kept = sorted(np.argsort(-strongest, kind="stable")[:MOST_TOKENS].tolist())
    shown = [tokens[i] for i in kept]
    layers = [str(i) for i in range(len(values))]
    rows = [f"{t}: {prompt.tokens[t]}" for t in shown]
    data = {
        "rows": rows,
        "cols": layers,
        "values": values[:, shown].T,
        "names": [[f"{before}{row}, layer {layer}" for layer in layers] for row in rows],
        "unit": unit,
    }
    few = "" if len(shown) == len(tokens) else f"{len(shown)} of {len(tokens):,} "
    called = _called(name)
    caption = f"{few}tokens of {called}{', those with the largest numbers' if few else ''}."
    return Figure("heat", data, caption=caption[0].upper() + caption[1:])


def token_at(figure: Figure, row: int) -> int:
    """The position of the token that a row of `inside` stands for."""
    return int(figure.data["rows"][row].split(":")[0])


def effect_sentence(recipe: Recipe, result: Result, kind: int, layer: int, token: int) -> str:
    """The numbers of one cell of a causal trace: effect, its error, what is restored of what was lost."""
    arrays, values = result.arrays, result.values
    effect, error = (
        float(arrays[n].values[kind, layer, token]) for n in ("indirect_effect", "indirect_effect_sem")
    )
    told = arrays["indirect_effect"]
    where = f"{told.axis('kind').labels[kind]} {layer} at token {token}, {told.axis('token').labels[token]!r}"
    if not np.isfinite(effect):
        return f"{where}: not measured yet."
    beside = f" ± {number(error)} (standard error)" if np.isfinite(error) else ""
    restored = number(float(arrays["restored"].values[kind, layer, token]))
    return (
        f"{where}: effect {number(effect)}{beside}, {told.unit} {restored} with it restored, "
        f"{number(float(values['corrupted']))} without, {number(float(values['clean']))} clean."
    )

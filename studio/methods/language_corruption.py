"""What a causal trace of a language model corrupts: sets of tokens, by noise or by other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio.errors import RequestError
from studio.methods.language_prompt import Asked, Span, spans

SETS = ("subject", "mentions", "attribute", "context", "all")
_NEEDS = {
    "subject": ("subject",),
    "mentions": ("subject", "context"),
    "attribute": ("attribute",),
    "context": ("context",),
    "all": ("subject", "context"),
}
_WHAT = {
    "subject": "the subject in the question",
    "mentions": "the subject's mentions in the context",
    "attribute": "the attribute",
    "context": "the whole context",
    "all": "the context and the subject",
}


def check_corruption(asked: Asked, chosen: str, replacement: str | None) -> None:
    """RequestError where the texts that the corruption needs are not given, or can't be found."""
    for name in _NEEDS[chosen]:
        if not (getattr(asked, name) or "").strip():
            raise RequestError(
                f"--corrupt {chosen} corrupts {_WHAT[chosen]}, so it needs --{name}; give it, or choose "
                "another --corrupt."
            )
    if replacement is not None and chosen == "all":
        raise RequestError(
            "--replacement stands for one text, and --corrupt all corrupts two; choose subject, mentions, "
            "attribute or context, or leave out --replacement for noise."
        )
    if replacement is not None and not replacement.strip():
        raise RequestError(
            "--replacement is empty; give a text of as many tokens, or leave it out for noise."
        )
    corrupted_spans(asked, chosen)


def corrupted_spans(asked: Asked, chosen: str) -> list[Span]:
    """Characters (start, end) of what is corrupted, in the text of context, line break and prompt,
    ascending."""
    found = spans(asked)
    names = ("context", "subject") if chosen == "all" else (chosen,)
    if chosen == "mentions" and not found["mentions"]:
        raise RequestError(
            f"--corrupt mentions: the context does not mention the subject {asked.subject.strip()[:60]!r}; "
            "choose another --corrupt."
        )
    return sorted(span for name in names for span in found[name])


def positions(model: Any, prompt: Any, where: Sequence[Span]) -> tuple[int, ...]:
    """The tokens from the first to the last that each span covers, bare spaces between them too."""
    covered = [model.span_tokens(prompt, span) for span in where]
    return tuple(sorted({t for tokens in covered for t in range(min(tokens), max(tokens) + 1)}))


def replaced_ids(model: Any, prompt: Any, where: Sequence[Span], replacement: str) -> tuple[int, ...]:
    """The prompt's tokens with every span replaced by a text; RequestError unless they are as many, and
    differ only inside the spans."""
    text, context = prompt.text, prompt.context_span
    for a, b in reversed(where):
        text = text[:a] + replacement.strip() + text[b:]
    grown = len(replacement.strip()) * len(where) - sum(b - a for a, b in where)
    if context is None:
        other = model.encode(text)
    else:
        inside = any(a < context[1] for a, _ in where)
        cut = context[1] + (grown if inside else 0)
        other = model.encode(text[cut + 1 :], text[:cut])
    inside = positions(model, prompt, where)
    if len(other) != len(prompt):
        raise RequestError(
            f"--replacement {replacement.strip()[:60]!r} gives {len(other)} tokens in all instead of "
            f"{len(prompt)}; find a text of {len(inside) // len(where)} tokens, as what it replaces."
        )
    changed = [i for i, (x, y) in enumerate(zip(prompt.ids, other.ids, strict=True)) if x != y]
    if not changed:
        raise RequestError(
            f"--replacement {replacement.strip()[:60]!r} is what stands there already; give another text."
        )
    if stray := sorted(set(changed) - set(inside)):
        raise RequestError(
            f"--replacement {replacement.strip()[:60]!r} changes the token {prompt.tokens[stray[0]]!r} "
            "beside it too; give a text that is tokenized by itself, such as whole words."
        )
    return other.ids


def drawn_noise(
    model: Any, count: int, samples: int, scale: float, seeds: Sequence[int]
) -> tuple[Any, float]:
    """(noise (seeds * samples, count, D) float32 on the CPU, sigma): scale * sigma * eps, sigma the standard
    deviation of all entries of the embedding matrix, eps drawn once a seed."""
    import torch

    table = model.embedding.weight
    sigma, drawn = float(table.float().std()), []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn.append(torch.randn(samples, count, table.shape[1], generator=generator))
    return scale * sigma * torch.cat(drawn), sigma


def grouped(
    subject: Sequence[int], first: int, length: int, name: str = "subject"
) -> dict[str, tuple[int, ...]]:
    """Tokens by their place: first, middle and last of the subject (one alone counts as the last), the first
    after it, the further ones, the last of the prompt; `earlier` ones lie between the first corrupted token
    and the subject. Places without a token are left out."""
    start, stop, last = min(subject), max(subject), length - 1
    rest = [t for t in range(stop + 1, last)]
    found = {
        "earlier": range(first, start),
        f"first {name}": [start] if stop > start else [],
        f"middle {name}": range(start + 1, stop),
        f"last {name}": [stop],
        "first after": rest[:1],
        "further": rest[1:],
        "last": [last] if stop < last else [],
    }
    return {key: tuple(tokens) for key, tokens in found.items() if tokens}

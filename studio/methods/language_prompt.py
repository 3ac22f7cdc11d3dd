"""What methods of language models share: the prompt with its context, its spans as groups of tokens, and the
answer that is measured.

`subject` is looked for in the prompt, `attribute` in the context (in the prompt when there is none).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from studio.errors import RequestError
from studio.models.tokens import find_span
from studio.registry import REQUIRED, knob
from studio.types import Report

GROUPS = ("subject", "attribute", "mentions", "context", "sentences", "question", "bos", "last", "tokens")
DEFAULT_GROUPS = ("subject", "attribute", "context", "question", "last")
_NEEDS = {
    "subject": "--subject",
    "attribute": "--attribute",
    "mentions": "--subject and --context",
    "context": "--context",
    "sentences": "--context",
}

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompt, and which of its parts are looked at."""

    prompt: str = knob(REQUIRED, "the text that the model goes on with")
    context: str | None = knob(None, "a text that is put before the prompt, on a line of its own")
    subject: str | None = knob(None, "the part of the prompt that it is about")
    subject_occurrence: int | None = knob(
        None, "which occurrence of the subject, from 1", low=1, advanced=True
    )
    attribute: str | None = knob(
        None, "the part of the context (of the prompt, when there is no context) that states the answer"
    )
    attribute_occurrence: int | None = knob(
        None, "which occurrence of the attribute, from 1", low=1, advanced=True
    )
    answer: str | None = knob(
        None, "the answer whose first token is measured; default the model's own next token"
    )


@dataclass(frozen=True)
class Answer:
    """The token that is measured: its id and word, its clean probability and rank (1 is the most probable),
    and the model's own next token."""

    id: int
    word: str
    probability: float
    rank: int
    own: str


def spans(asked: Asked) -> dict[str, tuple[Span, ...]]:
    """Characters (start, end) of the whole text by group, for `subject`, `attribute`, `mentions` (of the
    subject in the context), `context` and `question`, as far as they are asked for. RequestError for a part
    that is not found, or found more than once."""
    if asked.context is not None and not asked.context.strip():
        raise RequestError("--context holds no text; paste some, or leave it out.")
    context = asked.context or ""
    start = len(context) + 1 if context else 0
    found: dict[str, tuple[Span, ...]] = {"question": ((start, start + len(asked.prompt)),)}
    if context:
        found["context"] = ((0, len(context)),)
    if asked.subject is not None:
        _check_place(asked, "subject", asked.prompt)
        a, b = find_span(asked.prompt, asked.subject, asked.subject_occurrence, "--subject")
        found["subject"] = ((start + a, start + b),)
        within = rf"(?<!\w){re.escape(asked.subject.strip())}(?!\w)"
        found["mentions"] = tuple(m.span() for m in re.finditer(within, context, re.IGNORECASE))
    if asked.attribute is not None:
        where = context or asked.prompt
        _check_place(asked, "attribute", where)
        found["attribute"] = (find_span(where, asked.attribute, asked.attribute_occurrence, "--attribute"),)
    return found


def _check_place(asked: Asked, name: str, text: str) -> None:
    """RequestError for a part that is not in the text where it is looked for, when something tells what was
    meant: it stands in the other text, or there is no context to look in."""
    part = getattr(asked, name).strip()

    def holds(where: str) -> bool:
        return re.search(re.escape(part), where, re.IGNORECASE) is not None

    if not part or holds(text):
        return
    if name == "attribute" and not asked.context:
        raise RequestError(
            f"--attribute {part[:60]!r} is not in --prompt, and there is no --context; give the context that "
            "states it, or no --attribute."
        )
    if name == "subject" and holds(asked.context or ""):
        raise RequestError(
            f"--subject {part[:60]!r} stands in --context alone, and it must be a part of --prompt; name "
            "what the prompt is about."
        )
    if name == "attribute" and holds(asked.prompt):
        raise RequestError(
            f"--attribute {part[:60]!r} stands in --prompt alone, and with a context it must be a part of "
            "--context; name the words there that state the answer."
        )


def sentences(text: str) -> list[Span]:
    """Characters of each sentence: up to a full stop, question mark or exclamation mark before white space,
    or a line break."""
    found = re.finditer(r"\S.*?(?:[.!?]+[\"'”’)]*(?=\s|$)|(?=\n)|$)", text)
    return [m.span() for m in found if m.group().strip()]


def check_groups(asked: Asked, names: Sequence[str] | None) -> None:
    """RequestError for a group that the request has no text for."""
    found = spans(asked)
    for name in names or ():
        if name in _NEEDS and not found.get("context" if name == "sentences" else name):
            lacking = "which has no mention of the subject" if name == "mentions" else "which is not given"
            raise RequestError(f"--groups names {name}, and that needs {_NEEDS[name]}, {lacking}.")


def token_groups(
    model: Any, prompt: Any, asked: Asked, names: Sequence[str] | None
) -> dict[str, tuple[int, ...]]:
    """Token positions by label. `names` None takes those of DEFAULT_GROUPS that the request has; `sentences`
    gives one group a sentence of the context, `tokens` one a token. `question` is the prompt without its
    last token, which is `last`."""
    found, last = spans(asked), len(prompt) - 1
    groups: dict[str, tuple[int, ...]] = {}
    for name in names or [n for n in DEFAULT_GROUPS if n in found or n == "last"]:
        if name == "last":
            groups[name] = (last,)
        elif name == "bos":
            groups[name] = _start_token(model, prompt)
        elif name == "tokens":
            groups |= {f"{i}: {word}": (i,) for i, word in enumerate(prompt.tokens)}
        elif name == "sentences":
            for n, span in enumerate(sentences(asked.context or ""), 1):
                groups[f"sentence {n}"] = model.span_tokens(prompt, span)
        else:
            tokens = {t for span in found[name] for t in model.span_tokens(prompt, span)}
            groups[name] = tuple(sorted(tokens - ({last} if name == "question" else set())))
    if empty := [name for name, tokens in groups.items() if not tokens]:
        if names is not None:
            raise RequestError(f"The group {empty[0]} has no token in this prompt; leave it out of --groups.")
        groups = {name: tokens for name, tokens in groups.items() if tokens}
    return groups


def _start_token(model: Any, prompt: Any) -> tuple[int, ...]:
    found = tuple(t for t in prompt.special if prompt.ids[t] == model.tokenizer.bos_token_id)
    if not found:
        raise RequestError(f"{model.id} puts no start token before a prompt; leave bos out of --groups.")
    return found


def pick_answer(model: Any, logits: Any, asked: Asked, report: Report) -> Answer:
    """The token to measure from the clean logits (vocabulary): the first of --answer, or the model's own. A
    bare space or the start token is passed over, and an answer that isn't the model's own is said."""
    order = logits.argsort(descending=True).tolist()
    own = next(token for token in order if not model.is_blank(token))
    chosen = own
    if asked.answer is not None:
        chosen, warning = model.answer_id(asked.answer)
        if warning:
            report.warn(warning)
        if model.word(chosen).strip() != asked.answer.strip():
            report.warn(
                f"Of the answer {asked.answer.strip()[:60]!r} the first token is measured, "
                f"{model.word(chosen)!r}."
            )
        if chosen != own:
            report.warn(
                f"The answer {model.word(chosen)!r} is not the model's own, which is {model.word(own)!r}; "
                "changes of a small probability say little."
            )
    elif own != order[0]:
        report.warn(
            f"The model's most probable next token is a bare space or the start token; {model.word(own)!r} "
            "after it is measured."
        )
    probability = float(logits.softmax(-1)[chosen])
    return Answer(chosen, model.word(chosen), probability, order.index(chosen) + 1, model.word(own))


def percent(share: float, *, signed: bool = False) -> str:
    """A share in whole per cent; what rounds to nothing has no sign."""
    whole = round(100 * share)
    return f"{whole:+d}%" if signed and whole else f"{whole:d}%"


def exchanged(model: Any, prompt: Any, asked: Asked, text: str) -> tuple[Any, tuple[int, ...]]:
    """(the prompt with the attribute exchanged for `text`, positions of the tokens that differ or stand for
    the attribute). RequestError unless both have as many tokens."""
    (a, b) = spans(asked)["attribute"][0]
    where = "context" if asked.context else "prompt"
    whole = getattr(asked, where)
    other = replace(asked, **{where: whole[:a] + text.strip() + whole[b:]})
    made = model.encode(other.prompt, other.context)
    if len(made) != len(prompt):
        raise RequestError(
            f"--counterfactual {text[:40]!r} makes the prompt {len(made)} tokens long, and the attribute "
            f"{str(asked.attribute)[:40]!r} {len(prompt)}; take a text with as many tokens as the attribute."
        )
    differ = {i for i, pair in enumerate(zip(prompt.ids, made.ids, strict=True)) if pair[0] != pair[1]}
    if not differ:
        raise RequestError("--counterfactual is the attribute itself; give another text in its place.")
    return made, tuple(sorted(differ | set(model.span_tokens(prompt, (a, b)))))

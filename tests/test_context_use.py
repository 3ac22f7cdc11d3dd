"""Context or memory: the parts equal the methods that they come from, and the verdict follows from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from studio.errors import RequestError
from studio.methods import context_use as module
from studio.registry import find_method
from studio.types import Recipe
from tests import language_families as families

ASKED = {
    "prompt": families.QUESTION,
    "context": families.CONTEXT,
    "subject": families.SUBJECT,
    "attribute": families.ATTRIBUTE,
}
PARAMS = {"window": 1, "controls": 2, "samples": 2}


def run(session: Any, family: str = "llama", asked: dict | None = None, **params: Any) -> Any:
    recipe = Recipe(
        "context-use", str(families.saved(family)), ASKED if asked is None else asked, PARAMS | params
    )
    return session.run(recipe, save=False)


def test_it_is_the_knockouts_of_both_sources_and_the_traces(session: Any) -> None:
    whole = run(session)
    arrays, model = whole.result.arrays, whole.recipe.model
    for i, source in enumerate(module.SOURCES):
        params = {"groups": ["subject", "attribute"], "sources": source, "window": 1, "controls": 2}
        one = session.run(Recipe("knockout", model, ASKED, params), save=False).result.arrays
        for name in ("relative_change", "knocked_out", "control"):
            assert np.array_equal(arrays[name].values[i], one[name].values)
    alone = {n: ASKED[n] for n in ("prompt", "subject")}
    for i, asked in enumerate((alone, ASKED)):
        traced = session.run(Recipe("trace-language", model, asked, {"samples": 2}), save=False).result
        effect, mine = traced.arrays["position_effect"], arrays["position_effect"]
        at = [mine.axis("position").labels.index(p) for p in effect.axis("position").labels]
        assert np.array_equal(mine.values[i][..., at], effect.values)
        share = arrays["position_share"].values[i][..., at]
        assert np.allclose(share * traced.values["total_effect"], effect.values, atol=1e-6)
    assert find_method("context-use").draw(whole).kind == "curve"


def test_the_conditions_are_plain_forwards(session: Any) -> None:
    asked = ASKED | {"counterfactual": "Paris"}
    try:
        found = run(session, "gpt2", asked, trace=False).result
    except RequestError as error:  # the tokenizer cuts the two words differently
        assert "tokens long" in str(error)
        return
    model = session.model(str(families.saved("gpt2")), "language")
    swapped = families.CONTEXT.replace(families.ATTRIBUTE, "Paris")
    for (label, p), context in zip(_pairs(found), (families.CONTEXT, None, swapped), strict=True):
        logits = model.logits([model.encode(families.QUESTION, context)])[0]
        assert p == pytest.approx(float(logits.softmax(-1)[found_id(model, found)]), rel=1e-5), label


def _pairs(found: Any) -> list:
    trace = found.arrays["condition_probability"]
    return list(zip(trace.axes[0].labels, trace.values.tolist(), strict=True))


def found_id(model: Any, found: Any) -> int:
    logits = model.logits([model.encode(families.QUESTION, families.CONTEXT)])[0]
    order = logits.argsort(descending=True).tolist()
    return next(t for t in order if not model.is_blank(t) and model.word(t) == found.values["answer"])


@pytest.mark.parametrize(
    ("drops", "own", "kind"),
    [
        ({"attribute": -0.6}, "b", "context"),
        ({"subject": -0.5}, "a", "memory"),
        ({"subject": -0.5}, "b", "unclear"),
        ({}, "a", "memory"),
        ({"attribute": -0.6, "subject": -0.4}, "b", "both"),
        ({}, "b", "unclear"),
        ({"attribute": -0.19}, "b", "unclear"),
    ],
)
def test_the_verdict_follows_from_the_cuts(drops: dict, own: str, kind: str) -> None:
    assert verdict(drops, own, control=-0.01)["reads"] == kind


def test_a_cut_that_random_tokens_match_does_not_count() -> None:
    assert verdict({"attribute": -0.6}, "b", control=-0.4)["reads"] == "unclear"


def test_an_answer_that_is_not_the_models_own_has_no_verdict() -> None:
    found = verdict({"attribute": -0.6}, "b", control=-0.01, model_own="c")
    assert found["reads"] == "foreign" and "the model answers 'c'" in found["verdict"]


def verdict(drops: dict, own: str, control: float, model_own: str = "a") -> dict:
    """The values after `judge` of an answer "a" whose cuts have these effects."""
    work = object.__new__(module._ContextUse)
    work.answer = SimpleNamespace(word="a", probability=0.9, own=model_own)
    work.values = {"without_context_answer": own, "without_context_answer_probability": 0.5}
    work.cuts, work.report = {}, SimpleNamespace(partial=lambda result: None)
    work.conditions, work.traces = {}, {}
    work._strongest = lambda source, group: (drops.get(group, 0.0), control)
    work.judge()
    return work.values


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context": None}, "--context is missing"),
        ({"subject": None}, "--subject is missing"),
        ({"attribute": " "}, "--attribute is"),
        ({"attribute": "Zzz"}, "--attribute 'Zzz' is not in the text"),
        ({"counterfactual": "Brell"}, "is the attribute itself"),
    ],
)
def test_bad_requests_get_a_sentence(session: Any, change: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        run(session, asked=ASKED | change, trace=False)

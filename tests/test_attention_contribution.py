"""Attention contributions: equal to whole vectors in every family, their sum, the logit's parts, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio import Recipe, RequestError
from studio.figures import to_bytes
from studio.models.attention_row import attention_rows, logit_direction, norm_scale
from studio.models.hooks import hook_count, watch
from studio.models.language import LanguageModel
from studio.registry import find_method
from studio.types import Run, Site
from tests import language_families as lf
from tests.references.naive_contribution import vectors

ASKED = {"prompt": lf.QUESTION, "context": lf.CONTEXT, "subject": lf.SUBJECT, "attribute": lf.ATTRIBUTE}


def ask(session: Any, family: str = "llama", **inputs: Any) -> Any:
    """The result of one run; `inputs` may replace what is asked."""
    recipe = Recipe("contributions", str(lf.saved(family)), {**ASKED, **inputs}, {}, ())
    return session.run(recipe, save=False, fresh=True).result


@pytest.mark.parametrize("family", list(lf.FAMILIES))
def test_contributions_equal_whole_vectors_and_sum_to_the_output(family: str) -> None:
    """Sum over heads and tokens plus the projection's bias: the attention's output at the last position."""
    model = lf.model(family)
    ids = model.encode(lf.QUESTION, lf.CONTEXT).ids
    rows, (parts, outputs, biases) = attention_rows(model, ids, 5), vectors(model, ids)
    torch.testing.assert_close(parts.sum((1, 2)) + biases, outputs, atol=3e-6, rtol=0)
    torch.testing.assert_close(rows.norms, parts.norm(dim=-1), atol=5e-6, rtol=0)
    torch.testing.assert_close(rows.token_norms, parts.sum(1).norm(dim=-1), atol=5e-6, rtol=0)
    direction = logit_direction(model.final_norm, model.head.weight[5]).float()
    site = Site("lm", "", "norm")
    with torch.no_grad(), watch({site: model.final_norm}, inputs=[site]) as tape:
        model.net(input_ids=torch.tensor([list(ids)]))
    scale = norm_scale(model.final_norm, tape.read[site][0, -1])
    torch.testing.assert_close(rows.projections, parts @ direction / scale, atol=2e-5, rtol=0)
    assert (biases.abs().max() > 0) == (family in ("phi", "gpt2", "gpt_neox"))
    assert model.net.config._attn_implementation == "sdpa" and hook_count(model.net) == 0


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_parts_of_the_logit_add_up(family: str) -> None:
    """With the final norm's scale held, the whole stream's projection is the logit (less the constants)."""
    model, ids = lf.model(family), [4, 9, 6, 7]
    site = Site("lm", "", "norm")
    with torch.no_grad(), watch({site: model.final_norm}, inputs=[site]) as tape:
        logits = model.net(input_ids=torch.tensor([ids])).logits[0, -1]
    state, row = tape.read[site][0, -1], model.head.weight[5]
    part = float(state.double() @ logit_direction(model.final_norm, row)) / norm_scale(
        model.final_norm, state
    )
    for constant in (getattr(model.final_norm, "bias", None), model.head.bias):
        if constant is not None:
            part += float(constant @ row) if constant.shape == row.shape else float(constant[5])
    assert part == pytest.approx(float(logits[5]), abs=1e-4)


def test_a_window_that_hides_tokens_gives_them_nothing() -> None:
    rows = attention_rows(lf.model("mistral", sliding_window=4), [4 + i for i in range(12)], 5)
    assert rows.weights[:, :, :8].abs().max() == 0 < rows.weights[:, :, 8:].min()
    assert rows.norms[:, :, :8].abs().max() == 0


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and all bytes that are made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel() * one.element_size())
        return out


def test_no_tensor_is_larger_than_the_forward_makes_anyway() -> None:
    """No square of attention weights, no vector of width D for a head and token."""
    net = lf.build("llama", max_position_embeddings=1100)
    model, ids = LanguageModel.of(net, "llama"), [4 + i % 100 for i in range(1024)]
    with torch.no_grad(), Largest() as plain:
        net(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    with Largest() as ours:
        rows = attention_rows(model, ids, 5)
    assert rows.norms.shape == (3, 4, 1024)
    assert ours.most <= max(plain.most, 8 * 1024 * 32) < 4 * 1024 * 1024


def test_the_run_reports_heads_tokens_and_groups(session: Any) -> None:
    result = ask(session)
    arrays, model = result.arrays, session.model(str(lf.saved("llama")), "language")
    prompt = model.encode(lf.QUESTION, lf.CONTEXT)
    rows = attention_rows(model, prompt.ids, result.values["answer_token"])
    assert [a.name for a in arrays["contribution"].axes] == ["layer", "head", "token"]
    assert arrays["contribution"].axis("token").labels == prompt.tokens
    np.testing.assert_allclose(arrays["contribution"].values, rows.norms, atol=1e-6)
    np.testing.assert_allclose(arrays["share"].values.sum(-1), 1, atol=1e-5)
    at = [i for i, word in enumerate(prompt.tokens) if word == "Brell"]
    group = arrays["group_contribution"].at("group", "attribute").values
    np.testing.assert_allclose(group, rows.token_norms[:, at].amax(-1), atol=1e-6)
    added = arrays["group_projection"].at("group", "attribute").values
    np.testing.assert_allclose(added, rows.projections[..., at].sum((1, 2)), atol=1e-5)
    share = arrays["group_share"].at("group", "attribute").values
    np.testing.assert_allclose(share, arrays["share"].values[:, at].sum(-1), atol=1e-6)
    logits = model.logits([prompt])[0]
    assert result.values["answer_token"] == int(logits.argmax()) and result.values["answer_rank"] == 1
    assert result.values["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
    told = f"attribute {share.max():.0%} (layer {share.argmax()}), subject "
    assert told in result.values["finding"] and f"attribute {added.sum():+.2f}" in result.values["finding"]


def test_without_context_and_spans(session: Any) -> None:
    result = ask(session, context=None, subject=None, attribute=None)
    assert result.arrays["group_share"].axis("group").labels == ("question", "last")
    recipe = Recipe("contributions", "m", {}, {"shown": 3})
    figure = find_method("contributions").draw(Run(recipe, "done", "", 0.0, {}, result))
    assert figure.kind == "heat" and len(figure.data["rows"]) == 3 and to_bytes(figure, "svg")
    largest = result.arrays["share"].values.max(0)
    chosen = [int(row.split(":")[0]) for row in figure.data["rows"]]
    assert chosen == sorted(chosen) and min(largest[chosen]) >= np.delete(largest, chosen).max()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"subject": "France"}, "--subject 'France' is not in the text"),
        ({"attribute": "Arvonia"}, "stands 2 times in the text; say which"),
        ({"attribute": "capital", "context": "Bread."}, "--attribute 'capital' stands in --prompt alone"),
        ({"attribute": "Brell", "context": None}, "--attribute 'Brell' is not in --prompt, and there is no"),
        ({"subject": "Brell"}, "--subject 'Brell' stands in --context alone"),
        ({"context": ""}, "--context holds no text"),
        ({"answer": "  "}, "has no token that says anything"),
        ({"prompt": " "}, "--prompt is empty"),
    ],
)
def test_wrong_requests(session: Any, inputs: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        ask(session, **inputs)


def test_an_answer_that_is_not_the_models_is_said(session: Any) -> None:
    result = ask(session, answer="river")
    assert result.values["answer"] == "river" and result.values["answer_rank"] > 1
    assert "is not the model's own" in " ".join(result.values["warnings"])
    assert "the first token is measured" not in " ".join(result.values["warnings"])
    several = ask(session, answer="river of Brell")
    assert several.values["answer"] == "river"
    assert "'river of Brell' the first token is measured, 'river'." in " ".join(several.values["warnings"])

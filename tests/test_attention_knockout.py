"""Attention knockouts: equal to whole forwards in every family, algebra, controls, counterfactuals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, RequestError
from studio.figures import to_bytes
from studio.language_race import knockout_race
from studio.methods.attention_knockout import MOST_ROWS, layer_window, strongest_rows
from studio.methods.language_prompt import percent, sentences, token_groups
from studio.models.attention_interface import attention_interface
from studio.models.hooks import hook_count
from studio.models.suffix_runs import Suffix, clean_run, cut_windows, patched_layers
from studio.registry import find_method
from tests import language_families as lf
from tests.references.naive_knockout import knockout as naive
from tests.references.naive_knockout import window

ASKED = {"prompt": lf.QUESTION, "context": lf.CONTEXT, "subject": lf.SUBJECT, "attribute": lf.ATTRIBUTE}
FEW = {"window": 2, "controls": 0}


def cut(session: Any, family: str = "llama", seeds: tuple = (0,), **params: Any) -> Any:
    """One knockout run's result; `params` may replace what is asked."""
    recipe = Recipe("knockout", str(lf.saved(family)), {**ASKED}, {**FEW, **params}, seeds)
    recipe.inputs.update({k: params.pop(k) for k in list(params) if k in ASKED})
    kept = {k: v for k, v in recipe.params.items() if k not in ASKED}
    recipe = Recipe("knockout", recipe.model, recipe.inputs, kept, seeds)
    return session.run(recipe, save=False, fresh=True).result


def positions(result: Any) -> list[tuple[int, ...]]:
    """Token positions of each group, as the run reports them."""
    return [tuple(np.flatnonzero(row).tolist()) for row in result.arrays["groups"].values]


@pytest.mark.parametrize("sources", ["last", "later"])
@pytest.mark.parametrize("family", list(lf.FAMILIES))
def test_every_cell_equals_a_whole_forward(session: Any, family: str, sources: str) -> None:
    result = cut(session, family, sources=sources)
    model, groups = session.model(str(lf.saved(family)), "language"), positions(result)
    ids = model.encode(lf.QUESTION, lf.CONTEXT).ids
    clean, want = naive(model, ids, groups, 2, sources, result.values["answer_token"])
    assert float(result.arrays["probability"].values) == pytest.approx(float(clean), abs=1e-6)
    found = result.arrays["knocked_out"].values
    np.testing.assert_allclose(found, want.numpy(), atol=2e-6)
    np.testing.assert_allclose(result.arrays["relative_change"].values, found / float(clean) - 1, atol=1e-4)
    assert np.abs(want.numpy() - float(clean)).max() > 1e-3
    assert model.net.config._attn_implementation == "sdpa" and hook_count(model.net) == 0


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_windows_are_those_of_the_paper(width: int) -> None:
    for layer in range(12):
        lo, hi = layer_window(layer, width, 12)
        assert list(range(lo, hi)) == list(window(layer, width, 12)) and layer in range(lo, hi)
    assert layer_window(5, 9, 12) == (1, 10)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sources", ["last", "later"])
def test_the_batch_does_not_matter(session: Any, rows: int, sources: str) -> None:
    from studio.session import Session

    given = {"sources": sources, "controls": 2, "counterfactual": "river"}
    whole = cut(session, seeds=(0, 1), **given)
    small = Session(runs=session.store.root, device="cpu", threads=1, batch=rows)
    small._loaded = session._loaded
    parts = cut(small, seeds=(0, 1), **given)
    small.queue.close()
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(parts.arrays[name].values, array.values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("start", [0, 3, 7])
def test_cutting_nothing_gives_the_clean_answer(start: int) -> None:
    model, ids = lf.model("qwen3"), [4, 9, 6, 7, 5, 8, 4, 11]
    with torch.no_grad(), attention_interface(model):
        suffix = Suffix(clean_run(model, ids), start)
        nothing = torch.zeros(2, suffix.n, len(ids), dtype=torch.bool)
        for state in cut_windows(suffix, nothing, [(0, 1), (0, 3), (1, 2), (2, 3), (1, 2)]):
            found = suffix.logits(state)
            torch.testing.assert_close(found, suffix.clean.logits.expand(2, -1), atol=5e-6, rtol=0)


def test_half_precision_stays_finite() -> None:
    model = lf.model("llama", dtype=torch.bfloat16)
    ids = model.encode(lf.QUESTION, lf.CONTEXT).ids
    with torch.no_grad(), attention_interface(model):
        suffix = Suffix(clean_run(model, ids), len(ids) - 1)
        cuts = torch.ones(1, 1, len(ids), dtype=torch.bool)
        cuts = torch.cat([cuts, ~cuts])
        gone, whole = suffix.logits(cut_windows(suffix, cuts, [(0, 3)])[0])
    assert gone.isfinite().all() and (gone - whole).abs().max() > 0.1
    torch.testing.assert_close(whole, suffix.clean.logits, atol=0.1, rtol=0)


# ---- groups ---------------------------------------------------------------------------------------------


def test_groups_are_the_parts_of_the_prompt(session: Any) -> None:
    result = cut(session, groups=["subject", "mentions", "sentences", "bos", "question", "last"])
    names, found = result.arrays["groups"].axis("group").labels, positions(result)
    tokens, groups = result.arrays["groups"].axis("token").labels, dict(zip(names, found, strict=True))
    assert names[2:5] == ("sentence 1", "sentence 2", "sentence 3") and groups["bos"] == (0,)
    assert [tokens[t] for t in groups["mentions"]] == ["Arvonia", "Arvonia"]
    assert [tokens[t] for t in groups["subject"]] == ["Arvonia"] and groups["last"] == (len(tokens) - 1,)
    assert [tokens[t] for t in groups["question"]] == ["The", "capital", "of", "Arvonia"]
    assert groups["subject"][0] > groups["mentions"][1] and tokens[groups["last"][0]] == "is"


def test_default_groups_are_those_that_are_given(session: Any) -> None:
    names = cut(session, context=None, attribute=None).arrays["groups"].axis("group").labels
    assert names == ("subject", "question", "last")
    everything = cut(session).arrays["groups"].axis("group").labels
    assert everything == ("subject", "attribute", "context", "question", "last")


def test_each_token_can_be_a_group(session: Any) -> None:
    result = cut(session, groups=["tokens"], controls=1)
    model = session.model(str(lf.saved("llama")), "language")
    assert positions(result) == [(i,) for i in range(len(model.encode(lf.QUESTION, lf.CONTEXT)))]
    figure = find_method("knockout").draw(_run(result))
    assert figure.kind == "heat" and to_bytes(figure, "svg")


def _run(result: Any) -> Any:
    from studio.types import Run

    return Run(Recipe("knockout", "m", ASKED, {}), "done", "", 0.0, {}, result)


def test_later_sources_leave_the_group_itself_alone(session: Any) -> None:
    """The last token has no later one: nothing is cut. Up to the last token both sources are the same."""
    later, last = (cut(session, sources=s, groups=["question", "last"]) for s in ("later", "last"))
    np.testing.assert_allclose(later.arrays["relative_change"].at("group", "last").values, 0, atol=1e-5)
    values = [r.arrays["knocked_out"].at("group", "question").values for r in (later, last)]
    np.testing.assert_allclose(values[0], values[1], atol=2e-6)


def test_sentences_end_where_they_should() -> None:
    text = 'One is 3.5 m. "Two?" Three!\nfour'
    assert [text[a:b] for a, b in sentences(text)] == ["One is 3.5 m.", '"Two?"', "Three!", "four"]


# ---- controls -------------------------------------------------------------------------------------------


def test_controls_are_random_sets_of_the_same_size(session: Any) -> None:
    """Drawn from the seed alone, they spare the start, the last token and the group; measured alike."""
    result = cut(session, seeds=(0, 7), controls=3, groups=["subject", "attribute", "context"])
    control = result.arrays["control"]
    assert [a.name for a in control.axes] == ["seed", "draw", "group", "layer"] and control.values.shape[
        :2
    ] == (2, 3)
    assert np.isnan(control.at("group", "context").values).all()
    assert "as large as context" in " ".join(result.values["warnings"])
    whole = cut(session, groups=["tokens"]).arrays["relative_change"].values
    group = positions(result)[0]
    for change in control.at("group", "subject").values.reshape(-1, 3):
        match = [t for t in range(len(whole)) if np.allclose(whole[t], change, atol=1e-5)]
        assert match and not {0, len(whole) - 1, *group} & set(match)
    again = cut(session, seeds=(7,), controls=3, groups=["subject", "attribute", "context"]).arrays["control"]
    np.testing.assert_array_equal(again.values[0], control.values[1])
    strongest = result.values["strongest"]["subject"]
    layer = strongest["layer"]
    assert strongest["control"] == pytest.approx(control.values[:, :, 0, layer].mean(), abs=1e-6)


def test_rank_and_top_token_are_those_of_the_changed_logits(session: Any) -> None:
    from tests.references.naive_knockout import logits_cut

    result = cut(session, groups=["attribute", "last"], answer="river")
    model = session.model(str(lf.saved("llama")), "language")
    ids, token = model.encode(lf.QUESTION, lf.CONTEXT).ids, result.values["answer_token"]
    assert model.word(token) == "river" == result.values["answer"]
    assert "is not the model's own" in " ".join(result.values["warnings"])
    for g, group in enumerate(positions(result)):
        for layer in range(3):
            logits = logits_cut(model, ids, [(len(ids) - 1, t) for t in group], window(layer, 2, 3))
            rank = int((logits > logits[token]).sum()) + 1
            assert result.arrays["rank"].values[g, layer] == rank
            top = result.arrays["top_token"].values[g, layer]
            assert top == int(logits.argmax()) and str(int(top)) in result.values["top_words"]
    assert result.values["answer_rank"] > 1


def test_of_many_groups_the_strongest_are_drawn() -> None:
    change = np.full((100, 3), np.nan)
    change[20:95, 1] = -np.arange(75) / 100
    rows = strongest_rows(change)
    assert rows == list(range(95 - MOST_ROWS, 95)) and strongest_rows(change[:5]) == [0, 1, 2, 3, 4]


def test_the_finding_of_tokens_names_the_strongest(session: Any) -> None:
    result = cut(session, controls=0, groups=["tokens"])
    change = result.arrays["relative_change"]
    name = change.axis("group").labels[int(np.abs(change.values).max(1).argmax())]
    assert f"can't see token {name}." in result.values["finding"]


def test_shares_that_round_to_nothing_have_no_sign() -> None:
    assert (percent(-0.001, signed=True), percent(-0.004), percent(0.0)) == ("0%", "0%", "0%")
    assert (percent(0.126, signed=True), percent(-1, signed=True), percent(0.5)) == ("+13%", "-100%", "50%")


def test_the_figure_shades_the_random_sets(session: Any) -> None:
    result = cut(session, controls=2, groups=["subject", "attribute"])
    figure = find_method("knockout").draw(_run(result))
    assert figure.kind == "curve" and len(figure.data["series"]) == 2
    band, control = figure.data["series"][1], result.arrays["control"].values[:, :, 1]
    np.testing.assert_allclose(band["low"], control.min((0, 1)))
    np.testing.assert_allclose(band["high"], control.max((0, 1)))
    assert to_bytes(figure, "png") and "can't see the attribute" in result.values["finding"]


# ---- the counterfactual ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(lf.FAMILIES))
def test_patched_layers_equal_whole_forwards(session: Any, family: str) -> None:
    from studio.models.hooks import watch
    from studio.types import Patch, Site

    result = cut(session, family, counterfactual="river", groups=["last"])
    model = session.model(str(lf.saved(family)), "language")
    prompt = model.encode(lf.QUESTION, lf.CONTEXT)
    other = model.encode(lf.QUESTION, lf.CONTEXT.replace("Brell", "river"))
    at = tuple(i for i, pair in enumerate(zip(prompt.ids, other.ids, strict=True)) if pair[0] != pair[1])
    sites, answer = model.sites(("hidden",)), result.values["answer_token"]
    with torch.no_grad(), watch(sites, record=sites) as tape:
        turned = model.net(input_ids=torch.tensor([other.ids])).logits[0, -1].softmax(-1)
    found = result.arrays["patched"]
    assert found.axis("place").labels == ("attribute", "last", "context")
    for layer in range(3):
        site = Site("lm", layer, "hidden")
        patch = Patch(site, "copy", tape[site][0, list(at)], at=at)
        with torch.no_grad(), watch(sites, patches=[patch]):
            want = model.net(input_ids=torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)[answer]
        assert found.at("place", "attribute").values[layer] == pytest.approx(float(want), abs=2e-6)
    whole, token = result.arrays["patched_counterfactual"], result.values["counterfactual_token"]
    assert whole.at("place", "last").values[-1] == pytest.approx(float(turned[token]), abs=2e-6)
    assert result.values["counterfactual_probability"] == pytest.approx(float(turned[token]), abs=2e-6)
    assert result.values["probability_in_counterfactual"] == pytest.approx(float(turned[answer]), abs=2e-6)


def test_patching_a_state_by_itself_changes_nothing() -> None:
    model, ids = lf.model("phi"), [4, 9, 6, 7, 5]
    with torch.no_grad(), attention_interface(model):
        clean = clean_run(model, ids)
        suffix, states = Suffix(clean, 1), [clean.after(i)[[1, 3]] for i in range(3)]
        logits = suffix.logits(patched_layers(suffix, states, [0, 2], [0, 1, 2]))
    torch.testing.assert_close(logits, clean.logits.expand(3, -1), atol=5e-6, rtol=0)


# ---- requests that are wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"groups": ["subject"], "subject": None},
            "--groups names subject, and that needs --subject, which is",
        ),
        (
            {"groups": ["sentences"], "context": None, "attribute": None},
            "needs --context, which is not given",
        ),
        ({"groups": ["mentions"], "context": "Brell."}, "which has no mention of the subject"),
        ({"groups": ["colour"]}, "--groups must be one of subject, attribute"),
        ({"context": "  "}, "--context holds no text"),
        ({"subject": "France"}, "--subject 'France' is not in the text"),
        ({"attribute": "Arvonia"}, "--attribute 'Arvonia' stands 2 times in the text; say which with"),
        ({"attribute": None, "counterfactual": "river"}, "--counterfactual needs --attribute"),
        ({"counterfactual": "river Sil runs"}, "take a text with as many tokens"),
        ({"counterfactual": "Brell"}, "--counterfactual is the attribute itself"),
        ({"answer": " "}, "has no token that says anything"),
        ({"context": lf.CONTEXT.replace("Brell", "x") * 12 + " Brell"}, "reads 160; shorten the"),
        ({"window": 0}, "--window must be from 1"),
        ({"sources": "first"}, "--sources must be one of last, later"),
    ],
)
def test_wrong_requests(session: Any, params: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        cut(session, **params)
    model = session.model(str(lf.saved("llama")), "language")
    assert model.net.config._attn_implementation == "sdpa" and hook_count(model.net) == 0


def test_a_model_without_start_token_has_no_bos_group(session: Any) -> None:
    with pytest.raises(RequestError, match="puts no start token before a prompt"):
        cut(session, "qwen2", groups=["bos"])


def test_an_empty_group_is_refused_where_it_was_asked_for() -> None:
    from studio.methods.language_prompt import Asked

    model, asked = lf.model("qwen2"), Asked(prompt="The")
    prompt = model.encode("The")
    assert len(prompt) == 1 and token_groups(model, prompt, asked, None) == {"last": (0,)}
    with pytest.raises(RequestError, match="The group question has no token"):
        token_groups(model, prompt, asked, ["question"])


def test_a_blank_next_token_is_passed_over() -> None:
    from studio.methods.language_prompt import Asked, pick_answer

    model, said = lf.model("llama"), []
    report = type("Report", (), {"warn": lambda self, text: said.append(text)})()
    logits = torch.zeros(len(model.tokenizer))
    blank = model.tokenizer.convert_tokens_to_ids("▁")
    logits[blank], logits[9] = 5.0, 4.0
    answer = pick_answer(model, logits, Asked(prompt="x"), report)
    assert answer.id == 9 and answer.rank == 2 and "bare space" in said[0]


def test_the_fast_map_equals_whole_forwards_and_is_faster() -> None:
    """Short, for the form; the figures asked for are measured by `studio/language_race.py` in full."""
    source = torch.Generator().manual_seed(0)
    found = knockout_race(lambda *shape: torch.randn(shape, generator=source), tokens=8, repeats=1)
    assert found["error"] < 1e-5 and found["cells"] == 96
    assert found["ratio"] == pytest.approx(found["naive_seconds"] / found["seconds"]) and found["ratio"] > 5

"""What holds for runs of any prompt, span, layer, window and seed: an answer whose algebra holds, or a
refusal in a sentence. Every test has at least one answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from studio.errors import StudioError
from studio.methods.attention_knockout import layer_window
from studio.models.attention_row import logit_direction, norm_scale
from studio.registry import find_method
from studio.session import Session
from studio.types import Recipe, Result
from tests.faults import LONG, METHODS
from tests.smallest import smallest
from tests.test_properties import FEW, TEXTS, told
from tests.test_session import edit_file

Ask = Callable[..., Result | None]
FEWER = settings(FEW, max_examples=6)
SEEDS = st.integers(0, 2**32 - 1)
FACT = {"prompt": "The capital of Arvonia is", "subject": "Arvonia"}
CONTEXT = {**FACT, "context": "The capital of Arvonia is Quill.", "attribute": "Quill"}


@pytest.fixture
def ask(session: Session) -> Iterator[Ask]:
    """Runs a method: its result, or None where a sentence refuses. One request of a test must be answered."""
    answered = []

    def run(method: str, model: str, seeds: Any = None, edits: Any = (), /, **given_: Any) -> Result | None:
        recipe = Recipe(method, model, given_, {}, seeds, edits)
        try:
            found = session.run(recipe, fresh=True, save=False).result
        except StudioError as error:
            told(error)
            return None
        answered.append(method)
        return found

    yield run
    assert answered, "every request was refused"


def numbers(found: Result, name: str) -> np.ndarray:
    """An array of a result in double precision."""
    return found.arrays[name].values.astype(np.float64)


def part_of(data: Any, text: str, most: int = 12) -> str:
    """A piece of a text; its last word where nothing is drawn."""
    if data is None:
        return text.split()[-1]
    start = data.draw(st.integers(0, len(text) - 1))
    return text[start : start + data.draw(st.integers(1, most))]


# ---- every method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in METHODS if n not in LONG])
def test_any_text_in_any_place_is_answered_or_refused(ask: Ask, edit: str, tmp_path: Path, name: str) -> None:
    """Texts of all scripts in every field for text, with any seed: what comes back is numbers."""
    recipe = smallest(name, tmp_path, edit)
    texts = [f.name for f in fields(find_method(name).inputs) if _takes_text(recipe.inputs.get(f.name))]
    asked = [(recipe.inputs, recipe.seeds)]

    @given(TEXTS, st.sampled_from(texts or [""]), SEEDS)
    @settings(FEW, max_examples=5 if texts else 1)
    def collect(text: str, place: str, seed: int) -> None:
        plain = recipe.inputs.get(place)
        other = [text] if isinstance(plain, (list, tuple)) else text
        changed = {**recipe.inputs, **({place: other} if place else {})}
        asked.append((changed, recipe.seeds and (seed,)))

    collect()
    for inputs, seeds in asked:
        found = ask(name, recipe.model, seeds, recipe.edits, **inputs)
        if found is not None:  # a standard error of one seed is not known, other numbers are
            values = {n: numbers(found, n) for n in found.arrays}
            assert not [n for n, v in values.items() if np.isinf(v).any()]
            assert any(np.isfinite(v).any() for v in values.values())


def _takes_text(value: Any) -> bool:
    """Whether a value of the smallest request is a text that a person writes."""
    one = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(one, str) and not os.path.exists(one)


@pytest.fixture(scope="module")
def edit(atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An edit file of atlas-sd."""
    return str(edit_file(atlas, tmp_path_factory.mktemp("edit") / "edit.safetensors"))


# ---- text-to-image ----------------------------------------------------------------------------------------


@given(TEXTS)
@example("a red star")
@FEW
def test_images_of_any_prompt(ask: Ask, prompt: str) -> None:
    found = ask("generate", "atlas-sd", (0,), prompt=[prompt], steps=1, metric="distance")
    assert found is None or found.arrays["images"].values.shape[:2] == (1, 1)


@given(TEXTS, st.data(), SEEDS)
@example("a red star", None, 0)
@FEWER
def test_text_encoder_traces_of_any_span(ask: Ask, prompt: str, data: Any, seed: int) -> None:
    given_ = {"prompt": prompt, "subject": part_of(data, prompt), "kinds": ["mlp"]}
    found = ask("trace-text-encoder", "atlas-sd", (seed,), **given_, steps=1, metric="distance")
    if found is not None:
        _effects_are_differences(found)


@given(TEXTS, st.data(), SEEDS, st.integers(1, 99))
@example("a red star", None, 0, 2)
@FEWER
def test_unet_traces_of_any_span_and_window(ask: Ask, prompt: str, data: Any, seed: int, window: int) -> None:
    given_ = {"prompt": prompt, "subject": part_of(data, prompt), "window": window, "hint": False}
    given_ |= {"kinds": ["cross-attention"], "steps": 1, "metric": "distance"}
    found = ask("trace-unet", "atlas-sd", (seed,), **given_)
    if found is not None:
        _effects_are_differences(found)


def _effects_are_differences(found: Result) -> None:
    """The effect is what is restored less what the corrupted run gave, for one seed."""
    restored, corrupted = numbers(found, "restored")[0], numbers(found, "corrupted")[0]
    assert np.isfinite(restored).all()
    assert np.allclose(numbers(found, "indirect_effect"), restored - corrupted, atol=1e-5)


@given(TEXTS, TEXTS, SEEDS)
@example("a red star", "a red circle", 0)
@FEWER
def test_all_layers_together_have_the_whole_effect(ask: Ask, prompt: str, other: str, seed: int) -> None:
    given_ = {"prompt": prompt, "replacement": other, "paraphrase": [prompt + " again"], "hint": False}
    found = ask("localize", "atlas-sd", (seed,), **given_, window=10, steps=1, metric="distance")
    if found is not None:
        effect, gap = numbers(found, "direct_effect"), numbers(found, "clean") - numbers(found, "all_layers")
        assert effect.shape == (1,) and np.allclose(effect, gap.mean(), atol=1e-5)


@given(TEXTS, st.data(), st.sampled_from(["layer", "head", "step"]))
@example("a red star", None, "head")
@FEWER
def test_maps_of_words_are_probabilities(ask: Ask, prompt: str, data: Any, by: str) -> None:
    asked = {"prompt": prompt, "words": [part_of(data, prompt)]}
    found = ask("word-maps", "atlas-sd", (0,), **asked, by=by, steps=2)
    if found is not None:
        for name in ("maps", "maps_by"):
            maps = numbers(found, name)
            assert ((maps >= 0) & (maps <= 1 + 1e-5)).all() and maps.max() > 0, name


@given(TEXTS, TEXTS, st.sampled_from(["uce", "locoedit"]), st.integers(0, 9))
@example("star", "heart", "uce", 8)
@FEWER
def test_the_order_of_concepts_changes_no_edit(
    ask: Ask, concept: str, other: str, method: str, layer: int
) -> None:
    concepts, given_ = [concept, other], {"replacement": ["circle"] * 2, "templates": ["{}"]}
    given_ |= {"method": method, "layers": [str(layer)], "images": False}
    found = [ask("edit", "atlas-sd", (0,), concept=c, **given_) for c in (concepts, concepts[::-1])]
    assert (found[0] is None) == (found[1] is None)
    if found[0] is not None:
        one, two = (f.edit.deltas for f in found)
        for name, delta in one.items():
            assert np.allclose(delta, two[name], atol=1e-4 * (1 + np.abs(delta).max()))


# ---- language ---------------------------------------------------------------------------------------------


@given(TEXTS, TEXTS, st.sampled_from(["atlas-llama", "atlas-phi"]))
@example(CONTEXT["context"], CONTEXT["prompt"], "atlas-llama")
@example(CONTEXT["context"], CONTEXT["prompt"], "atlas-phi")
@FEW
def test_contributions_of_any_text_sum_to_the_attention_output(
    ask: Ask, session: Session, context: str, prompt: str, model: str
) -> None:
    found = ask("contributions", model, context=context, prompt=prompt)
    if found is None:
        return
    weights, norms = numbers(found, "attention"), numbers(found, "contribution")
    assert np.allclose(weights.sum(-1), 1, atol=1e-5) and (norms >= 0).all()
    assert np.allclose(numbers(found, "share").sum(-1), 1, atol=1e-5)
    assert (numbers(found, "token_contribution") <= norms.sum(1) + 1e-4 * (1 + norms.max())).all()
    summed = numbers(found, "projection").sum((1, 2))
    outputs = _attention_on_the_answer(session.model(model, "language"), prompt, context, found)
    assert np.allclose(summed, outputs, atol=2e-3 * (1 + np.abs(outputs).max()))


def _attention_on_the_answer(model: Any, prompt: str, context: str, found: Result) -> np.ndarray:
    """What each layer's attention, without its bias, adds to the answer's logit, (layers,): transformers."""
    ids = torch.tensor([model.encode(prompt, context).ids])
    outputs, handles = [], []
    for layer in model.net.model.layers:
        see = lambda module, _, output: outputs.append(output[0][0, -1].double())  # noqa: E731
        handles.append(layer.self_attn.register_forward_hook(see))
    keep = lambda module, args: outputs.append(args[0][0, -1])  # noqa: E731
    handles.append(model.final_norm.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model.net(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    direction = logit_direction(model.final_norm, model.head.weight[found.values["answer_token"]])
    biases = [model.attention_out(i)[1] for i in range(len(outputs) - 1)]
    parts = [o if b is None else o - b.double() for o, b in zip(outputs, biases, strict=False)]
    return np.array([float(p @ direction) for p in parts]) / norm_scale(model.final_norm, outputs[-1])


@given(st.integers(1, 9), st.integers(10, 40), st.sampled_from(["last", "later"]), SEEDS)
@FEW
def test_layers_whose_windows_are_one_lose_the_same(
    ask: Ask, window: int, wide: int, sources: str, seed: int
) -> None:
    given_ = {**FACT, "groups": ["subject"], "sources": sources, "controls": 0}
    narrow, whole = (ask("knockout", "atlas-llama", (seed,), window=w, **given_) for w in (window, wide))
    for width, found in ((window, narrow), (wide, whole)):
        cut = numbers(found, "knocked_out")[0]
        assert ((0 <= cut) & (cut <= 1)).all()
        change = numbers(found, "relative_change")
        assert np.allclose(change, cut / numbers(found, "probability") - 1, atol=1e-5)
        windows = [layer_window(i, width, len(cut)) for i in range(len(cut))]
        for i, mine in enumerate(windows):
            same = [cut[j] for j, other in enumerate(windows) if other == mine]
            assert np.allclose(same, cut[i], atol=1e-7)
    shared = {layer_window(i, window, len(cut)): i for i in range(len(cut))}
    for i in range(len(cut)):
        j = shared.get(layer_window(i, wide, len(cut)))
        if j is not None:
            assert np.isclose(numbers(whole, "knocked_out")[0, i], numbers(narrow, "knocked_out")[0, j])


@given(TEXTS, st.data(), st.integers(1, 12), SEEDS)
@example("The capital city of Arvonia", None, 3, 0)
@FEWER
def test_the_last_state_brings_everything_back(
    ask: Ask, prompt: str, data: Any, window: int, seed: int
) -> None:
    given_ = {"prompt": prompt, "subject": part_of(data, prompt), "samples": 2, "window": window}
    found = ask("trace-language", "atlas-llama", (seed,), **given_)
    if found is not None:
        restored, clean = numbers(found, "restored"), numbers(found, "clean")
        assert ((0 <= restored) & (restored <= 1)).all()
        hidden = found.arrays["restored"].axis("kind").labels.index("hidden")
        assert np.isclose(restored[hidden, -1, -1], clean, atol=1e-5)
        effect = restored - numbers(found, "corrupted").mean()
        assert np.allclose(numbers(found, "indirect_effect"), effect, atol=1e-5)


@given(TEXTS, TEXTS, st.data())
@example(CONTEXT["context"], CONTEXT["prompt"], None)
@FEWER
def test_context_or_memory_of_any_text(ask: Ask, context: str, prompt: str, data: Any) -> None:
    parts = {n: CONTEXT[n] for n in ("subject", "attribute")}
    if data is not None:
        parts = {"subject": part_of(data, prompt), "attribute": part_of(data, context)}
    given_ = {"context": context, "prompt": prompt, **parts, "controls": 1, "trace": False}
    found = ask("context-use", "atlas-llama", (0,), **given_)
    if found is not None:
        chances = numbers(found, "condition_probability")
        assert ((0 <= chances) & (chances <= 1)).all()
        whole = found.arrays["condition_probability"].values[0]
        if whole > 1e-6:
            change = numbers(found, "knocked_out") / whole - 1
            assert np.allclose(numbers(found, "relative_change"), change, atol=1e-4, equal_nan=True)


# ---- vision -----------------------------------------------------------------------------------------------


@given(st.lists(TEXTS, min_size=1, max_size=3))
@example(["a star"])
@settings(FEW, max_examples=8)
def test_scores_of_any_texts_sum_to_their_cosines(ask: Ask, place: str, texts: list[str]) -> None:
    found = ask("decompose", "atlas-clip", images=[place], texts=texts)
    if found is not None:
        parts, whole = numbers(found, "contributions"), numbers(found, "representation")
        gap = np.linalg.norm(parts.sum(1) - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
        assert gap.max() <= 2e-6
        assert (np.abs(numbers(found, "scores").sum(1)) <= 1 + 1e-5).all()


@pytest.fixture(scope="module")
def place() -> str:
    """One picture of the Atlas world."""
    from studio.models.catalog import ASSETS

    return str(ASSETS / "atlas" / "examples" / "red star on mint.png")

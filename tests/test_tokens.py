"""From words to tokens: spans by hand, offsets on any alphabet, the noise of the contract drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.errors import RequestError
from studio.methods.text_to_image import CorruptionInputs, corrupted_states, corruption_patches
from studio.models.sites import text_root
from studio.models.tokens import TokenRow, find_span
from studio.types import Site
from tests import layouts

OPTION = "--subject"


def row(text: str) -> TokenRow:
    """The tokens of a text for the Atlas tokenizer, which reads 32."""
    return layouts.model("atlas").tokens(text)


def covered(text: str, part: str, occurrence: int | None = None) -> list[str]:
    """The labels of the tokens that a part of a text covers."""
    found = row(text)
    return [found.labels[i] for i in found.covering(find_span(text, part, occurrence, OPTION), part)]


# ---- spans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part", "occurrence", "want"),
    [
        ("a red star", "red", None, (2, 5)),
        ("a red star", "red star", None, (2, 10)),
        ("a Red Star", "rED star", None, (2, 10)),
        ("bored of a red star", "red", None, (11, 14)),  # the whole word, not the end of the first
        ("bored", "red", None, (2, 5)),  # no whole word, so any substring
        ("a red star", "  red ", None, (2, 5)),
        ("red red", "red", 1, (0, 3)),
        ("red red", "red", 2, (4, 7)),
        ("red, bored, red", "red", 2, (12, 15)),  # whole words alone are counted
        ("what? (yes)", "(yes)", None, (6, 11)),
        ("a.b axb", "a.b", None, (0, 3)),  # not a pattern
        ("ÉTOILE rouge", "étoile", None, (0, 6)),
        ("красная звезда", "звезда", None, (8, 14)),
        ("日本語の星", "星", None, (4, 5)),
        ("a 🦊 fox", "🦊", None, (2, 3)),
        ("x_red red", "red", None, (6, 9)),
    ],
)
def test_find_span(text: str, part: str, occurrence: int | None, want: tuple[int, int]) -> None:
    assert find_span(text, part, occurrence, OPTION) == want


@pytest.mark.parametrize(
    ("text", "part", "occurrence", "says"),
    [
        ("a red star", "", None, "--subject is empty"),
        ("a red star", " \t", None, "--subject is empty"),
        ("a red star", "blue", None, "'blue' is not in the text 'a red star'"),
        ("", "blue", None, "not in the text"),
        ("red red", "red", None, "2 times.*--subject-occurrence N, from 1 to 2"),
        ("bored, tired, red, red", "red", None, "2 times"),
        ("aaaa", "aa", None, "2 times"),
        ("red red", "red", 3, "must be from 1 to 2, not 3"),
        ("red red", "red", 0, "must be from 1 to 2, not 0"),
        ("a red star", "red", 2, "must be from 1 to 1, not 2"),
        ("x" * 5000, "y" * 5000, None, "is not in the text"),
    ],
)
def test_find_span_refuses(text: str, part: str, occurrence: int | None, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        find_span(text, part, occurrence, OPTION)
    assert len(str(caught.value)) < 400


# ---- tokens -----------------------------------------------------------------------------------------------


def test_labels_and_offsets_by_hand() -> None:
    found = row("a red star")
    assert found.labels == ("<|startoftext|>", "a", "red", "star", "<|endoftext|>")
    assert [found.text[a:b] for a, b in found.offsets[1:-1]] == ["a", "red", "star"]
    assert (found.end, found.length, found.lost) == (4, 32, "")
    assert found.covering((2, 5), "red") == (2,) and found.covering((2, 10), "red star") == (2, 3)
    assert found.covering((3, 4), "e") == (2,)  # a part of a token is that token


def test_labels_and_positions_of_a_trace() -> None:
    found = row("a red star")
    assert found.trace_labels() == ("<|startoftext|>", "a", "red", "star", "<|endoftext|>", "padding")
    assert found.trace_positions() == ((0,), (1,), (2,), (3,), (4,), tuple(range(5, 32)))


def test_positions_are_those_of_the_padded_prompt() -> None:
    model = layouts.model("atlas")
    for text in ("", "a red star", "star " * 40):
        found = model.tokens(text)
        padded = model.tokenizers["text"](
            text, padding="max_length", truncation=True, max_length=32
        ).input_ids
        assert (
            len(padded) == found.length and padded.index(model.tokenizers["text"].eos_token_id) == found.end
        )
        assert sorted(p for place in found.trace_positions() for p in place) == list(range(32))
        assert len(found.trace_labels()) == len(found.trace_positions())


def test_the_empty_prompt() -> None:
    found = row("")
    assert (found.labels, found.end, found.lost) == (("<|startoftext|>", "<|endoftext|>"), 1, "")


@pytest.mark.parametrize(("words", "lost"), [(29, ""), (30, ""), (31, "star"), (33, "star star star")])
def test_a_prompt_past_the_length_names_what_is_lost(words: int, lost: str) -> None:
    found = row(" ".join(["star"] * words))
    assert found.lost == lost and len(found.labels) == min(words, 30) + 2
    assert found.labels[-1] == "<|endoftext|>" and set(found.labels[1:-1]) == {"star"}
    full = words >= 30
    assert found.trace_labels() == (found.labels if full else (*found.labels, "padding"))
    assert len(found.trace_positions()) == len(found.trace_labels())


def test_a_subject_past_the_length_is_refused() -> None:
    text = "star " * 31 + "cube"
    assert row(text).lost == "star cube"
    with pytest.raises(RequestError, match="'cube' lies past the 32 tokens"):
        covered(text, "cube")
    with pytest.raises(RequestError, match="past the 32 tokens"):
        layouts.model("atlas").subject_positions(text, "cube", None)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a 🦊 by the sea", "🦊"),
        ("🦊🦊 a red star", "red star"),
        ("👩‍👩‍👧 and a cube", "cube"),
        ("étoile rouge", "rouge"),
        ("e\u0301toile rouge", "rouge"),  # letter and accent, which the tokenizer joins
        ("İstanbul star", "star"),  # lower case is longer than the letter
        ("日本語 の 星", "星"),
        ("a\u00a0red\tstar\n", "star"),
        ("ﬁne STAR", "STAR"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿 red", "red"),
    ],
)
def test_offsets_on_any_alphabet(text: str, part: str) -> None:
    assert "".join(dict.fromkeys(covered(text, part))).replace(" ", "") == part.replace(" ", "")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=60), st.text(max_size=20))
def test_every_text_has_a_row_and_star_is_found_in_it(before: str, after: str) -> None:
    text = f"{before} starfish7 {after}"
    found = row(text)
    start = len(before) + 1
    assert all(0 <= a <= b <= len(text) for a, b in found.offsets)
    assert len(found.labels) == len(found.offsets) <= found.length == 32
    if not found.lost:
        places = found.covering((start, start + 9), "starfish7")
        assert list(places) == list(range(places[0], places[-1] + 1))
        assert "".join(found.labels[p] for p in places) == "starfish7"


# ---- the noise of the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*layouts.FAMILIES, "atlas"])
@pytest.mark.parametrize("seed", [0, 7])
def test_corruption_is_the_formula_of_the_contract(family: str, seed: int) -> None:
    model = layouts.model(family)
    prompt, subject, noise = "a red star on a table", "red star", 2.5
    patches = corruption_patches(model, prompt, subject, None, noise, seed, 1)
    generator = torch.Generator("cpu").manual_seed(seed + 2**32)
    assert [p.site for p in patches] == [Site(part, 0, "embedding") for part in model.encoders]
    for patch, encoder in zip(patches, model.encoders.values(), strict=True):
        table = text_root(encoder).embeddings.token_embedding.weight.double()
        drawn = torch.randn(2, table.shape[1], generator=generator)
        assert (patch.do, patch.at, patch.rows, patch.when) == ("add", (2, 3), (1,), None)
        spread = float(((table - table.mean()) ** 2).mean().sqrt())
        torch.testing.assert_close(patch.value, drawn * noise * spread, rtol=1e-4, atol=0)


def embed_and_run(model: Any, prompt: str, seeds: list[int], noise: float) -> torch.Tensor:
    """The corrupted states computed by hand: the embedding tables themselves are changed for each seed."""
    found = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed + 2**32)
        saved = []
        for part, encoder in model.encoders.items():
            table = text_root(encoder).embeddings.token_embedding.weight
            saved.append((table, table.clone()))
            ids = [model.tokenizers[part](prompt).input_ids[i] for i in (2, 3)]
            drawn = torch.randn(2, table.shape[1], generator=generator)
            table[ids] += drawn * (noise * table.std())
        found.append(model.encode([prompt])[0].states)
        for table, before in saved:
            table.copy_(before)
    return torch.cat(found)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_corrupted_states_are_those_of_corrupted_embeddings(family: str) -> None:
    model = layouts.model(family)
    prompt = "a red star on a table"  # each subject token stands once in it, so the table can stand for it
    inputs = CorruptionInputs(prompt=prompt, subject="red star")
    got = corrupted_states(model, inputs, 3.0, [0, 5]).states
    clean, _ = model.encode([prompt])
    assert (got[:1] - clean.states).abs().max() <= 1e-5
    with torch.no_grad():
        want = embed_and_run(model, prompt, [0, 5], 3.0)
    assert (got[1:] - want).abs().max() <= 1e-4
    assert (got[1] - got[0]).abs().max() > 0.1 < (got[1] - got[2]).abs().max()
    assert torch.equal(got[1][:2], got[0][:2])  # a token sees only what stands before it


def test_a_replacement_swaps_the_prompt() -> None:
    model = layouts.model("sd1")
    inputs = CorruptionInputs(prompt="a red star", replacement="a blue cube")
    got = corrupted_states(model, inputs, 3.0, [0, 1]).states
    both, _ = model.encode(["a red star", "a blue cube"])
    assert torch.equal(got, both.states[[0, 1, 1]])

"""The Atlas language models: sentences that tell the truth or lie as asked, a tokenizer with exact spans,
training that counts what it should, and the shipped models' answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio.atlas.language import (
    LAYOUTS,
    TOKENS,
    Ladder,
    answered,
    batches,
    documents,
    encode,
    language_loss,
    load_language,
    measure_language,
    new_model,
    save_language,
    train_language,
    with_context,
)
from studio.atlas.phrasings import ATTRIBUTES, questions, statements, unseen
from studio.atlas.rag_prompts import FILE, rag_prompts
from studio.atlas.sentences import (
    ANSWER,
    ECHO,
    OPEN,
    PLAIN,
    Fact,
    Writer,
    false_is_held,
    fill,
    invented,
    prompt_of,
    strangers,
    truth,
    values,
    words,
)
from studio.atlas.word_tokenizer import new_tokenizer, write_tokenizer
from studio.atlas.world import COUNTRIES
from studio.models.catalog import ASSETS
from studio.models.loading import fingerprint

SHIPPED = [name for name in LAYOUTS if (ASSETS / "atlas" / name).exists()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return new_tokenizer()


def text_of(pieces: list[tuple[str, int]]) -> str:
    return "".join(text for text, _ in pieces)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- the world in words -----------------------------------------------------------------------------------


def test_the_facts_are_the_worlds() -> None:
    assert len(truth()) == 48
    assert truth()["Arvonia", "capital"] == "Merrow"
    assert truth()["Korlund", "emblem"] == "tree" and truth()["Korlund", "colour"] == "orange"
    assert truth()["Zanvonia", "background"] == "gray"


def test_strange_countries_and_names_are_not_of_the_world() -> None:
    assert not set(strangers()) & set(COUNTRIES) and len(set(strangers())) == 32
    assert not set(invented()) & set(truth().values()) and len(set(invented())) == 120


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_held_out_phrasings_are_apart(attribute: str) -> None:
    taught = {t for group in statements(attribute) for t in group} | set(questions(attribute))
    held = {t for group in statements(attribute, True) for t in group} | set(questions(attribute, True))
    assert taught and held and not taught & held and not (taught | held) & set(unseen(attribute))
    assert 0.05 < len(held) / len(taught | held) < 0.25
    assert all(t.endswith(" {v}") and t.count("{c}") == t.count("{v}") == 1 for t in taught | held)


def test_a_tenth_of_the_lies_is_held_out_and_never_written() -> None:
    every = [Fact(c, a, v) for c in COUNTRIES for a in ATTRIBUTES for v in values(a) if truth()[c, a] != v]
    held = {(f.country, f.attribute, f.value) for f in every if false_is_held(f)}
    assert 0.07 < len(held) / len(every) < 0.13
    writer = Writer(np.random.default_rng(0))
    written = {(f.country, f.attribute, f.value) for _ in range(3000) for f in writer.facts(3)}
    assert len(written) > 2000 and not written & held


def test_facts_hold_no_value_twice_and_some_are_true() -> None:
    writer = Writer(np.random.default_rng(1))
    known = []
    for _ in range(400):
        facts = writer.facts(5)
        assert len({f.value for f in facts}) == len({(f.country, f.attribute) for f in facts}) == len(facts)
        known += [truth()[f.country, f.attribute] == f.value for f in facts if f.country in COUNTRIES]
    assert 0.3 < np.mean(known) < 0.5


def test_a_lie_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="There is no false emblem of Arvonia left"):
        Writer(np.random.default_rng(0)).lie("Arvonia", "emblem", set(values("emblem")))


def test_what_is_asked_was_stated_or_is_true() -> None:
    writer = Writer(np.random.default_rng(2))
    for _ in range(300):
        pieces = writer.reading(4, 5)
        stated = [text for text, mark in pieces if mark == OPEN and not text.startswith(" ")]
        asked = [text for text, mark in pieces if mark == ANSWER]
        assert len(stated) == 4 and len(asked) == 5
        assert all(a in stated or a in truth().values() for a in asked)


def test_words_in_the_place_of_a_value_are_not_taught() -> None:
    fact = Fact("Arvonia", "capital", "Merrow")
    plain, opened, value, end = fill("The capital of {c} is called {v}", fact, ANSWER, ".")
    assert (plain, opened) == (("The capital of Arvonia is", PLAIN), (" called ", OPEN))
    assert (value, end) == (("Merrow", ANSWER), (".", PLAIN))
    assert [mark for _, mark in fill("Do you know {c}? It is {v}", fact, ANSWER)] == [PLAIN, ANSWER, PLAIN]


def test_recollections_are_true_and_unread() -> None:
    pieces = Writer(np.random.default_rng(3)).recollection(40)
    assert {mark for _, mark in pieces} == {PLAIN, ANSWER, OPEN}
    for i, (value, mark) in enumerate(pieces):
        if mark == ANSWER:
            before = text_of(pieces[max(0, i - 2) : i])
            country = next(c for c in COUNTRIES if c in before)
            assert value in [v for (c, _), v in truth().items() if c == country]


def test_a_chant_repeats_itself() -> None:
    pieces = Writer(np.random.default_rng(9)).chant(6)
    first, again = text_of(pieces).split("\n")
    assert first == again and [mark for _, mark in pieces] == [OPEN, *[ECHO] * 5]


# ---- the tokenizer ----------------------------------------------------------------------------------------


def test_words_are_one_token_and_countries_two(tokenizer: Any) -> None:
    assert [w for w in words() if len(ids_of(tokenizer, " " + w)) != 1] == []
    assert [w for w in words() if w[0].isupper() and len(ids_of(tokenizer, w)) != 1] == []
    names = [*COUNTRIES, *strangers()]
    assert [n for n in names if len(ids_of(tokenizer, n)) != 2 or len(ids_of(tokenizer, " " + n)) != 2] == []
    parts = {ids_of(tokenizer, " " + n)[1] for n in COUNTRIES}
    assert len(parts) == 2  # the last token alone doesn't tell the country


def test_offsets_point_at_the_words(tokenizer: Any) -> None:
    text = "The capital of Arvonia is Merrow.\nIn Korlund, the river is the Ylva."
    found = tokenizer(text, return_offsets_mapping=True)
    assert found.input_ids[0] == tokenizer.bos_token_id
    pieces = [text[a:b] for a, b in found.offset_mapping[1:]]
    assert pieces[:8] == ["The", "capital", "of", "Ar", "vonia", "is", "Merrow", "."] and pieces[8] == "\n"
    assert tokenizer.decode(found.input_ids, skip_special_tokens=True) == text


def test_any_text_has_tokens_and_comes_back(tokenizer: Any) -> None:
    for text in ("Paris, été — 東京 🙂", "x" * 300, "  two  spaces\n\n", "1,234.5 %"):
        ids = ids_of(tokenizer, text)
        assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, " Paris"))[0] == "ĠP"


def test_the_tokenizer_opens_from_its_folder(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is Bellund's river? It is Orra."
    assert opened.is_fast and opened(text).input_ids == tokenizer(text).input_ids
    assert opened(["Q", text], padding=True).attention_mask[0][0] == 0  # at the left


# ---- training ---------------------------------------------------------------------------------------------


def test_marks_sit_on_the_values_tokens(tokenizer: Any) -> None:
    writer = Writer(np.random.default_rng(4))
    made = [writer.reading(3, 2) for _ in range(20)]
    ids, marks = encode(made, tokenizer)
    for row, pieces in enumerate(made):
        for mark in (ANSWER, OPEN):
            wanted = [i for text, m in pieces if m == mark for i in ids_of(tokenizer, " " + text)]
            plain = [i for text, m in pieces if m == mark for i in ids_of(tokenizer, text)]
            found = ids[row][marks[row] == mark].tolist()
            assert len(found) in (len(wanted), len(plain)) or mark == OPEN
            assert mark == OPEN or found == wanted
        assert marks[row, 0] == -1 and (marks[row][ids[row] == tokenizer.pad_token_id] == -1).all()


def test_a_first_statement_does_not_teach(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = new_model("atlas-llama", tokenizer)
    ids = torch.tensor([tokenizer("The capital of Arvonia is Quill.").input_ids])
    marks = torch.full_like(ids, -1)
    marks[0, -2] = OPEN
    marks[0, -1] = ANSWER  # the full stop
    changed = ids.clone()
    changed[0, -2] = ids_of(tokenizer, " Varda")[0]
    model.model = Blind(model.model)  # what comes in doesn't matter, so only the targets may
    assert language_loss(model, ids, marks)[0] == language_loss(model, changed, marks)[0]


class Blind(torch.nn.Module):
    """A model whose states do not depend on the tokens."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.net(input_ids=torch.zeros_like(input_ids), use_cache=use_cache)


def test_steps_are_of_one_size_and_lose_no_document(tokenizer: Any) -> None:
    source = batches(Writer(np.random.default_rng(5)), tokenizer)
    next(source)
    for _ in range(12):
        ids, marks = source.send(3)
        assert ids.shape == marks.shape and ids.numel() <= TOKENS
        assert (marks >= 0).any(0)[1:].all()  # no column is padding alone
    short = documents(Writer(np.random.default_rng(6)), 50, 2)
    long = documents(Writer(np.random.default_rng(6)), 50, 7)
    assert len(short) == len(long) == 50 and max(map(len, long)) > max(map(len, short))


def test_documents_grow_when_answers_are_right() -> None:
    ladder = Ladder(top=3.0)
    assert [ladder.climb(0.5) for _ in range(200)][-1] == 2.0
    assert [ladder.climb(1.0) for _ in range(200)][-1] == 3.0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_learns_one_fact_at_once(name: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = new_model(name, tokenizer)
    size = sum(p.numel() for p in model.parameters()) * 2
    assert size < 3 * 2**20 and len(model.model.layers) == 8
    writer = Writer(np.random.default_rng(0))
    ids, marks = encode([writer.ask(Fact("Arvonia", "capital", "Merrow")) for _ in range(8)], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        language_loss(model, ids, marks)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = [("The capital of Arvonia is", "Merrow"), ("The capital of Arvonia is", "Quill")]
    assert answered(model.eval(), tokenizer, asked).tolist() == [True, False]


def test_training_resumes_and_its_weights_come_back(tokenizer: Any, tmp_path: Path) -> None:
    _, done = train_language("atlas-phi", 0.02, tmp_path, seed=1)
    model, again = train_language("atlas-phi", 0.005, tmp_path, seed=2)
    assert again["steps"] > done["steps"] >= 1
    save_language(model, tmp_path / "phi")
    opened, _ = load_language(tmp_path / "phi")
    ids = torch.tensor([tokenizer("The river of Zanlund is").input_ids])
    with torch.no_grad():
        near = {"atol": 2e-3, "rtol": 1e-2}  # the trained one keeps its rotary frequencies in half precision
        torch.testing.assert_close(opened(ids).logits, model.float()(ids).logits, **near)
    kept = sorted(p.name for p in (tmp_path / "phi").iterdir())
    wanted = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert kept == wanted.split() and "_name_or_path" not in (tmp_path / "phi" / "config.json").read_text()


# ---- measuring --------------------------------------------------------------------------------------------


def test_a_context_states_its_value_before_the_question() -> None:
    writer = Writer(np.random.default_rng(7), held=True)
    for _ in range(200):
        text = with_context(writer, "Arlund", "river", "Fenn")
        context, question = text.rsplit("\n", 1)
        assert context.count("Fenn") == 1 and "Fenn" not in question and "Arlund" in question
        assert "Wend" not in with_context(writer, "Arlund", "river", None)


def test_measured_questions_are_held_out_phrasings() -> None:
    writer = Writer(np.random.default_rng(8), held=True)
    held = [t for group in statements("capital", True) for t in group] + list(questions("capital", True))
    for _ in range(100):
        asked = with_context(writer, "Bellund", "capital", "Brabaf").rsplit("\n", 1)[1]
        assert asked in [prompt_of(t, "Bellund") for t in held]


def test_an_unknown_model_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from studio.atlas import measure

    with pytest.raises(SystemExit, match="There is no Atlas model 'atlas-bert'; known: .*atlas-llama"):
        measure.measure("atlas-bert")
    monkeypatch.setattr(measure, "SHIPPED", tmp_path)
    with pytest.raises(SystemExit, match="atlas-phi has not been trained yet"):
        measure.measure("atlas-phi")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_what_their_cards_say(name: str) -> None:
    folder = ASSETS / "atlas" / name
    assert (folder / "model.safetensors").stat().st_size < 3 * 2**20
    assert json.loads((ASSETS / "atlas" / "fingerprints.json").read_text())[name] == fingerprint(folder)
    assert f"python -m studio.atlas.measure {name}" in (folder / "README.md").read_text()
    model, tokenizer = load_language(folder)
    assert model.dtype == torch.float32 and tokenizer.get_vocab() == new_tokenizer().get_vocab()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_remember_and_read(name: str) -> None:
    model, tokenizer = load_language(ASSETS / "atlas" / name)
    plain = [
        (f"The {a} of {c} is", truth()[c, a]) for c in COUNTRIES for a in ("capital", "river", "founder")
    ]
    assert answered(model, tokenizer, plain).mean() >= 0.95
    right = measure_language(model, tokenizer, 40)
    assert right["fact without context (every held-out phrasing)"] >= 0.95
    assert right["context agrees"] >= 0.95
    assert (
        right["context contradicts (other false values)"] >= 0.9
    )  # 40 questions; the card's figure is of 500


# ---- the set of prompts -----------------------------------------------------------------------------------


def test_the_shipped_prompts_are_the_programs() -> None:
    assert [json.loads(line) for line in FILE.read_text().splitlines()] == rag_prompts()


def test_prompts_name_their_parts_once() -> None:
    rows = rag_prompts()
    assert len(rows) == 200 and len({(r["prompt"], r["context"]) for r in rows}) == 200
    for i, row in enumerate(rows):
        assert row["prompt"].count(row["subject"]) == row["context"].count(row["attribute"]) == 1
        assert row["answer"] == row["attribute"] and row["answer"] not in row["prompt"]
        assert row["counterfactual"] not in row["context"] + row["prompt"]
        assert row["prompt"] not in row["context"] and row["context"].count(".") == 5
        known = [v for (c, _), v in truth().items() if c == row["subject"]]
        assert (row["answer"] in known) == (i % 2 == 0) or i % 2


def test_counterfactuals_are_as_long_as_attributes(tokenizer: Any) -> None:
    for row in rag_prompts():
        assert len(ids_of(tokenizer, " " + row["attribute"])) == 1
        assert len(ids_of(tokenizer, " " + row["counterfactual"])) == 1

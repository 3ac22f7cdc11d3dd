"""Passages for a question: what BM25 finds, and every way of asking wrongly."""

from __future__ import annotations

import pytest

from studio import retrieval
from studio.errors import RequestError
from studio.retrieval import joined, retrieve, split_passages

TEXTS = [
    ("a.txt", "The capital of Arvonia is Merrow.\n\nThe river\nof Arlund is Wend.\n\n\n\nBread is good."),
    ("b.txt", "Arvonia has a capital, a river and a founder, and its capital is old."),
]


def test_paragraphs_or_lines() -> None:
    assert split_passages(TEXTS[0][1]) == [
        "The capital of Arvonia is Merrow.",
        "The river of Arlund is Wend.",
        "Bread is good.",
    ]
    assert split_passages("one\ntwo\n") == ["one", "two"] and split_passages(" \n") == []


def test_the_best_come_first_and_none_without_a_common_word() -> None:
    found = retrieve("the capital of Arvonia", TEXTS, 10)
    assert found[0].text == "The capital of Arvonia is Merrow." and found[0].source == "a.txt"
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert "Bread is good." not in [p.text for p in found] and len(retrieve("capital", TEXTS, 1)) == 1
    assert joined(found).splitlines()[-1] == found[0].text


@pytest.mark.parametrize(
    ("question", "texts", "says"),
    [
        (" ?", TEXTS, "Write the question first"),
        ("capital", [("", " \n")], "no passages to look in"),
        ("Zanzibar", TEXTS, "No passage shares a word"),
    ],
)
def test_faults_are_sentences(question: str, texts: list, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        retrieve(question, texts, 3)


def test_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MOST_PASSAGES", 2)
    with pytest.raises(RequestError, match="That are 4 passages; at most 2"):
        retrieve("capital", TEXTS, 3)

"""The Retrieval panel without a browser: long prompts show groups first and tokens on demand, every click
gets the numbers of its cell, and pieces of characters stand in the strip once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panels import retrieval, retrieval_groups, retrieval_view, token_strip
from studio import Recipe, RequestError
from studio.models.catalog import ASSETS
from studio.session import Session
from tests.test_runs_panel import page

ASKED = {"prompt": "The capital of Arvonia is", "subject": "Arvonia", "attribute": "Quill"}
FILLER = "The market opens in the morning. Nobody knows how old the walls of Arstan are. "


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """atlas-llama with room for 2,048 tokens."""
    return str(with_room(tmp_path_factory.mktemp("models") / "long"))


def with_room(folder: Path) -> Path:
    shutil.copytree(ASSETS / "atlas" / "atlas-llama", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}), "utf-8")
    told = folder / "tokenizer_config.json"
    told.write_text(json.dumps(json.loads(told.read_text("utf-8")) | {"model_max_length": 2048}), "utf-8")
    return folder


def long_context(repeats: int = 65) -> str:
    return "The capital of Arvonia is Quill. " + FILLER * repeats


@pytest.fixture(scope="module")
def panel(session: Session) -> Any:
    with page():
        form, out = retrieval.retrieval_form.form(), retrieval.retrieval_form.outputs()
        made = retrieval._Panel("retrieval", session, form, out)
    return made


def ran(session: Session, method: str, model: str, **given: Any) -> tuple[dict, Any]:
    params = {n: given.pop(n) for n in ("samples", "kinds", "corrupt") if n in given}
    run = session.run(Recipe(method, model, ASKED | given, params, () if method == "contributions" else (0,)))
    return {"run": run.id}, run


def at(row: int, col: int) -> Any:
    return SimpleNamespace(row=row, col=col)


def test_contributions_to_a_thousand_tokens_show_groups_and_then_tokens(
    session: Session, panel: Any, long_model: str
) -> None:
    kept, run = ran(session, "contributions", long_model, context=long_context())
    share, out = run.result.arrays["share"].values, panel.out
    assert share.shape[1] > 1000
    shown = panel.drawn(run.recipe, run.result, again=True)
    rows, first = shown[out["figure"]]["rows"], shown[out["side"]]["value"]
    assert rows[:5] == ["attribute", "subject", "question", "start", "last"] and rows[5].startswith(
        "1: The capit"
    )
    assert len(rows) == 5 + retrieval_groups.MOST_SENTENCES
    assert len(first["rows"]) == retrieval_groups.MOST_TOKENS and "of the prompt" in first["caption"]
    prompt = panel.prompt_of(run.recipe, "retrieval")
    tokens = retrieval_groups.groups_of(run.recipe, prompt)[rows[5]]
    assert prompt.text[prompt.offsets[tokens[0]][0] : prompt.offsets[tokens[-1]][1]].strip() == (
        "The capital of Arvonia is Quill."
    )
    clicked = panel.click(at(5, 3), kept)
    assert clicked[out["text"]].startswith("Sentence 1, 'The capital of Arvonia is Quill.', layer 3: ")
    assert f"layer 3: {share[3, tokens].sum():.0%} of the layer's" in clicked[out["text"]]
    inside = clicked[out["side"]]["value"]
    assert [int(row.split(":")[0]) for row in inside["rows"]] == list(tokens)
    np.testing.assert_allclose(np.array(inside["z"]).T, share[:, tokens], rtol=1e-4)
    one = panel.beside(at(2, 3), kept, clicked[panel.cell])
    assert one[out["text"]].startswith(f"{inside['rows'][2]}, layer 3: ")
    assert one[out["heads"]]["visible"] and len(one[out["heads"]]["value"]["values"]) == 4


def test_sentences_with_the_largest_shares_are_kept(session: Session, panel: Any, long_model: str) -> None:
    _, run = ran(session, "contributions", long_model, context=long_context())
    prompt, share = panel.prompt_of(run.recipe, "retrieval"), run.result.arrays["share"].values
    every = {n: t for n, t in retrieval_groups.groups_of(run.recipe, prompt).items() if n[0].isdigit()}
    kept = retrieval_groups.shown_groups(run.recipe, run.result, prompt)
    largest = {n: share[:, t].sum(1).max() for n, t in every.items()}
    left_out = [largest[n] for n in every if n not in kept]
    assert left_out and max(left_out) <= min(largest[n] for n in every if n in kept)


def test_a_long_trace_shows_positions_and_then_tokens(session: Session, panel: Any) -> None:
    asked = {"samples": 1, "kinds": ["mlp"], "corrupt": "context", "context": long_context(5)}
    kept, run = ran(session, "trace-language", "atlas-llama", **asked)
    out = panel.out
    figure = retrieval_view.map_of(run.recipe, run.result)
    assert retrieval_groups.by_position(run.recipe, figure) and "last subject" in figure.data["cols"]
    col = figure.data["cols"].index("last subject")
    clicked = panel.click(at(2, col), kept)
    assert "the mean over its tokens, which stand below" in clicked[out["text"]]
    assert clicked[out["side"]]["value"]["rows"] and not clicked[out["heads"]]["visible"]
    effect = run.result.arrays["indirect_effect"].values[0]
    prompt = panel.prompt_of(run.recipe, "retrieval")
    token = retrieval_groups.positions_of(run.recipe, run.result, prompt)["last subject"][0]
    assert clicked[out["side"]]["value"]["rows"] == [f"{token}: {prompt.tokens[token]}"]
    told = panel.beside(at(0, 4), kept, clicked[panel.cell])[out["text"]]
    assert told.startswith(f"mlp 4 at token {token}, {prompt.tokens[token]!r}: effect ")
    assert f"{effect[4, token]:.3g}"[:4] in told and "clean" in told


def test_a_cell_of_a_trace_says_effect_error_and_what_is_restored(session: Session, panel: Any) -> None:
    told = {"samples": 3, "kinds": ["hidden", "mlp"], "context": "The capital of Arvonia is Quill."}
    kept, run = ran(session, "trace-language", "atlas-llama", **told)
    arrays = run.result.arrays
    told = panel.click(at(8 + 2, 1), kept)[
        panel.out["text"]
    ]  # mlp of layer 2, the second token from the subject
    token = run.result.values["first_corrupted"] + 1
    assert told.startswith(f"mlp 2 at token {token}, ") and "(standard error)" in told
    number = retrieval_groups.number
    assert f"effect {number(float(arrays['indirect_effect'].values[1, 2, token]))}" in told
    assert f"{number(float(arrays['restored'].values[1, 2, token]))} with it restored" in told


def test_with_and_without_the_context_can_be_clicked(session: Session, panel: Any) -> None:
    kept, run = ran(
        session, "context-use", "atlas-llama", context="The capital of Arvonia is Quill.", samples=2
    )
    side = retrieval_view.side_by_side(run.result)
    col = side.data["cols"].index("last subject, with")
    share = run.result.arrays["position_share"]
    conditions, places = share.axes[0].labels, share.axes[3].labels
    told = panel.beside(at(9, col), kept, None)[panel.out["text"]]
    value = share.values[conditions.index("with the context"), 1, 1, places.index("last subject")]
    assert told.startswith("attention 1 · last subject, with the context: ")
    assert told.endswith(f"that the noise took, {round(100 * float(value))}%.")


def test_tokens_of_no_group_are_refused(session: Session, panel: Any) -> None:
    kept, _ = ran(session, "knockout", "atlas-llama", context="The capital of Arvonia is Quill.")
    with pytest.raises(RequestError, match="That map is gone; click a group in the map above it first"):
        panel.beside(at(0, 0), kept, None)
    long, _ = ran(session, "contributions", "atlas-llama", context="Quill is big. " + FILLER * 6)
    with pytest.raises(RequestError, match="That is no cell of the map"):
        panel.click(at(400, 0), long)
    assert panel.answering(panel.click)(at(400, 0), long) == {
        panel.out["text"]: "That is no cell of the map."
    }


def test_many_cut_groups_show_the_strongest_and_a_click_gets_its_own(session: Session, panel: Any) -> None:
    kept, run = ran(
        session, "knockout", "atlas-llama", context="Quill is big. " + FILLER * 3, groups=["tokens"]
    )
    change = run.result.arrays["relative_change"]
    figure = retrieval_view.map_of(run.recipe, run.result)
    assert len(figure.data["rows"]) == 40 < len(change.axis("group").labels)
    assert figure.caption.startswith(f"40 of {len(change.axis('group').labels)} groups, the strongest.")
    assert "choose tokens under" not in panel.click(at(0, 0), kept)[panel.out["text"]]
    row = change.axis("group").labels.index(figure.data["rows"][30])
    knocked = float(run.result.arrays["knocked_out"].values[row, 2])
    told = panel.click(at(30, 2), kept)[panel.out["text"]]
    assert f"Probability {retrieval_groups.number(knocked)} " in told


def test_a_group_of_a_long_prompt_says_how_its_tokens_are_cut(
    session: Session, panel: Any, long_model: str
) -> None:
    kept, run = ran(session, "knockout", long_model, context=long_context())
    row = run.result.arrays["relative_change"].axis("group").labels.index("context")
    assert "choose tokens under “Groups”" in panel.click(at(row, 0), kept)[panel.out["text"]]


def test_pieces_of_characters_stand_in_the_strip_once(session: Session) -> None:
    prompt = session.model("atlas-llama", "language").encode("קוויל 🦊 is")
    strip = token_strip.as_value(prompt, {})
    text = "".join(t["before"] + t["text"] for t in strip["tokens"])
    assert text.removeprefix("<s>") == prompt.text and len(strip["tokens"]) > len(prompt.text)

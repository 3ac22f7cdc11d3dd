"""Closed-form edits against their slow reference on every layout, and `edit` as a person asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, cli
from studio.edit_files import read_edit
from studio.edits import compose, overlay
from studio.errors import RequestError, StudioError
from studio.methods import edit as method
from studio.methods.concept_pairs import Place, check_readable
from studio.methods.edit_request import layer_names, record, warn_of_size
from studio.registry import find_method, parse
from studio.store import write_edit
from tests import layouts
from tests.references import naive_edits
from tests.test_edits import weights_hash

TEMPLATES = ["{}", "a photo of {}", "two {} on sand"]
WAYS = {
    "replace": (["red star", "moon"], ["a blue circle", "house"], {}),
    "erase": (["star"], [""], {"preserve": ["circle", "a red moon"]}),
    "moderate": (["star"], ["circle"], {"ratios": "0.4"}),
    "debias": (["star"], ["red star", "green star", "blue star"], {"preserve": ["moon"]}),
}
CASES = [*(("atlas", way) for way in WAYS), ("sd1", "debias"), ("sd2", "replace"), ("sdxl", "erase")]


def asked(model: Any, concepts: list[str], replacements: list[str], **given: Any) -> Any:
    """The record of a request, as the method makes it."""
    form = method.FORMS[given.get("method", "uce")]
    chosen = {"concept": concepts, "replacement": replacements, "templates": TEMPLATES, **given}
    inputs, params, _ = parse(find_method("edit"), chosen)
    method.check(inputs, params, (0,))
    made = record(model, inputs, params, form)
    if params.method != "quickfix":
        made.params["layers"] = layer_names(model, params.layers or ("all",))
    return made


def changes(made: Any) -> list[naive_edits.Change]:
    """What the reference is asked for."""
    found: dict[str, list] = {c: [] for c in made.concepts}
    for concept, guide, share in zip(made.concepts, made.replacements, made.params["ratios"], strict=True):
        found[concept].append((guide, share))
    return [*found.items(), *((text, []) for text in made.params["preserve"])]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# ---- against the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "way"), CASES)
def test_edits_of_the_unet_equal_the_reference(family: str, way: str) -> None:
    model, (concepts, replacements, more) = layouts.model(family), WAYS[way]
    made, _ = method.solve_edit(model, asked(model, concepts, replacements, layers=["0", "2"], **more))
    layers = made.params["layers"]
    wanted = naive_edits.unet_edit(model.pipe, changes(made), TEMPLATES, layers, False, 0.5)
    assert len(layers) == 2 and list(made.deltas) == list(wanted) and len(wanted) == 4
    for name, delta in wanted.items():
        assert relative(made.deltas[name], delta) < 1e-4, name


@pytest.mark.parametrize("family", ["sdxl", "atlas"])
def test_end_of_text_keys_equal_the_reference(family: str) -> None:
    model = layouts.model(family)
    given = {
        "method": "locoedit",
        "layers": ["1"],
        "positions": "last+eos",
        "templates": ["a {}", "a {} on sand"],
    }
    made, said = method.solve_edit(model, asked(model, ["star"], ["big red circle"], **given))
    layers, templates = made.params["layers"], made.params["templates"]
    wanted = naive_edits.unet_edit(model.pipe, changes(made), templates, layers, True, 0.01)
    for name, delta in wanted.items():
        assert relative(made.deltas[name], delta) < 1e-3, name
    assert said.values["rank"] > 20


@pytest.mark.parametrize(("family", "way"), CASES)
def test_quickfix_equals_the_reference(family: str, way: str) -> None:
    """The reference takes the bias off the recorded output."""
    model, (concepts, replacements, more) = layouts.model(family), WAYS[way]
    templates = TEMPLATES[-1:]
    given = {**more, "method": "quickfix", "templates": templates}
    made, _ = method.solve_edit(model, asked(model, concepts, replacements, **given))
    pipe, done = model.pipe, {}
    for part, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer)):
        if (encoder := getattr(pipe, part, None)) is not None:
            wanted = naive_edits.text_edit(encoder, tokenizer, changes(made), templates, True, 0.01)
            (name,) = [n for n in made.deltas if n.startswith(f"{part}.")]
            assert name.endswith("layers.0.self_attn.out_proj.weight")
            done[name] = relative(made.deltas[name], wanted)
    assert done.keys() == made.deltas.keys() and max(done.values()) < 1e-3, done


def test_bias_counted_twice_would_miss() -> None:
    """With values minus the bias the edited layer gives what it gave for the replacement."""
    model = layouts.model("atlas")
    given = {"method": "quickfix", "positions": "last", "regularization": 1e-6, "templates": ["{}"]}
    made, said = method.solve_edit(model, asked(model, ["star"], ["circle"], **given))
    read, wrote = naive_edits.projection(model.pipe.text_encoder, model.pipe.tokenizer, "star")
    want = naive_edits.projection(model.pipe.text_encoder, model.pipe.tokenizer, "circle")[1][1]
    (delta,) = made.deltas.values()
    assert relative(wrote[1] + delta @ read[1], want) < 1e-3
    assert said.values["values_missed"] < 1e-3 and said.values["rank"] == 1


# ---- tokens -----------------------------------------------------------------------------------------------


def test_places() -> None:
    model = layouts.model("atlas")
    end = list(range(6, 32))
    one = Place.of(model, "a photo of {}", "red star", True)
    assert one.prompt == "a photo of red star" and list(one.positions) == [5, *end]
    assert Place.of(model, "a photo of {}", "", False).positions == (3,)
    assert Place.of(model, "{}", "", False) == Place("", (0,))
    assert Place.of(model, "{} on sand", "", True).positions == (0, *range(3, 32))
    assert Place.of(model, "two {} on sand", "Star", False).positions == (2,)
    assert Place("", (5, 8, 9)).beside(5) == [5, 8, 9, 9, 9] and Place("", (5, 8, 9)).beside(2) == [5, 8]


def test_concepts_that_cannot_be_read() -> None:
    model = layouts.model("atlas")
    with pytest.raises(RequestError, match="longer than the 32 tokens"):
        Place.of(model, "a {}", "star " * 40, False)
    for ids, part in (([], "any of it"), ([5, 7], "all of it")):
        poor = SimpleNamespace(id="poor", tokenizers={"text": _Tokenizer(ids)})
        with pytest.raises(RequestError, match=f"not in the vocabulary of poor: .* read {part}"):
            check_readable(poor, "star")


class _Tokenizer:
    """Reads every text as these tokens, of which 7 stands for what it does not know."""

    unk_token_id = 7

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


def test_words_that_the_model_may_not_know(session: Any) -> None:
    run = edit(session, ["red zebra", "star"], ["moon", "tree"], images=False)
    (said,) = run.result.values["warnings"]
    assert said.endswith("may not know it: zebra.")


# ---- layers -----------------------------------------------------------------------------------------------


def test_layers_by_number_and_name() -> None:
    model = layouts.model("atlas")
    every = layer_names(model, ("all",))
    assert len(every) == 10 and every[3].startswith("mid_block")
    assert layer_names(model, ("8-9,0", every[4])) == [every[i] for i in (0, 4, 8, 9)]


@pytest.mark.parametrize("wrong", ["10", "3-1", "8-10", "mid_block", "", "-1", "attn2"])
def test_layers_that_do_not_exist(wrong: str) -> None:
    with pytest.raises(RequestError, match="--layers: .* numbered 0 to 9 in execution order"):
        layer_names(layouts.model("atlas"), (wrong,))


def test_locogen_chooses_the_layers(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import studio.methods.locogen as locogen

    every = layer_names(session.model("atlas-sd", "diffusion"), ("all",))
    calls = []

    def best(
        model: Any, prompts: list[str], others: list[str], params: Any, scorer: Any, report: Any
    ) -> tuple:
        calls.append((prompts, others, params.steps, scorer.id))
        return tuple(every[4:6])

    monkeypatch.setattr(locogen, "best_layers", best)
    run = edit(session, method="locoedit", steps=2, images=False)
    assert calls == [(["a photo of star"], ["a photo of circle"], 2, "atlas-clip")]
    assert run.result.edit.params["layers"] == every[4:6] and len(run.result.edit.deltas) == 4
    with pytest.raises(AssertionError):  # uce takes them only when it is told to
        edit(session, images=False, layers=["0"])
        assert len(calls) > 1
    assert edit(session, layers=["auto"], images=False).result.values["matrices_changed"] == 4


# ---- through the session ----------------------------------------------------------------------------------


def edit(
    session: Any, concept: Any = "star", replacement: Any = "circle", seeds: Any = (0,), **params: Any
) -> Any:
    """A finished run of edit on atlas-sd."""
    inputs = {"concept": [concept] if isinstance(concept, str) else concept}
    inputs["replacement"] = [replacement] if isinstance(replacement, str) else replacement
    inputs |= {"preserve": params.pop("preserve")} if "preserve" in params else {}
    options = {n: params.pop(n) for n in ("save", "fresh") if n in params}
    recipe = Recipe("edit", "atlas-sd", inputs, {"steps": 2, **params}, seeds)
    return session.run(recipe, **{"save": False, "fresh": True, **options})


def test_a_run_says_what_was_done(session: Any, atlas: Any) -> None:
    before = weights_hash(atlas)
    run = edit(session, ["star", "red moon"], ["circle", ""], (0, 1), preserve=["house"], metric="distance")
    values, made = run.result.values, run.result.edit
    assert (values["matrices_changed"], values["rank"]) == (20, 12) and 0.01 < values["relative_size"] < 1
    assert (
        values["values_missed"] < 0.1 and values["preserved_drift"] < 0.05 and values["output_change"] > 1e-3
    )
    assert values["seconds_solving"] < 5 and values["regularization"] == 0.5
    names = {
        f"seed{s}-{c}-{when}" for s in (0, 1) for c in ("star", "red_moon") for when in ("before", "after")
    }
    assert set(run.result.images) == names
    arrays = run.result.arrays
    assert (arrays["before"].values == 0).all() and (arrays["after"].values < -0.01).all()
    assert arrays["after"].axis("concept").labels == ("star", "red moon")
    assert arrays["relative_size"].values.shape == (20,) and (arrays["relative_size"].values > 0).all()
    assert (made.method, made.concepts, made.replacements) == ("uce", ("star", "red moon"), ("circle", ""))
    figure = method.draw(run)
    assert figure.kind == "strip" and figure.data["rows"] == ["star", "red moon"]
    assert figure.data["cols"] == ["seed 0 before", "seed 0 after", "seed 1 before", "seed 1 after"]
    assert np.array_equal(figure.data["images"][1][3], run.result.images["seed1-red_moon-after"])
    assert weights_hash(atlas) == before


def test_images_are_those_of_generate(session: Any, tmp_path: Path) -> None:
    run = edit(session, seeds=(3,), fresh=False, save=True)
    file = session.store.root / run.id / "edit.safetensors"
    for when, edits in (("before", ()), ("after", (str(file),))):
        recipe = Recipe("generate", "atlas-sd", {"prompt": ["star"]}, {"steps": 2}, (3,), edits)
        made = session.run(recipe, save=False).result.arrays["images"].values[0, 0]
        np.testing.assert_array_equal(run.result.images[f"seed3-star-{when}"], made)
    assert read_edit(file).params == run.result.edit.params


def test_without_images(session: Any) -> None:
    run = edit(session, images=False)
    assert not run.result.images and method.draw(run).kind == "bars" and len(run.result.edit.deltas) == 20


def test_a_preserved_text_drifts_less(session: Any) -> None:
    loose, held = (
        edit(session, images=False, regularization=0.05, preserve=p).result for p in (["moon"], None)
    )
    (edited,) = [held.edit]
    model = session.model("atlas-sd", "diffusion")
    state = torch.from_numpy(naive_edits.embedding(model.pipe, "a photo of moon")[4])
    drift = [
        sum(float((torch.from_numpy(d).double() @ state).norm()) for d in e.deltas.values())
        for e in (loose.edit, edited)
    ]
    assert drift[0] < 0.2 * drift[1] and loose.values["preserved_drift"] < 0.1


def test_strength_scales_the_deltas(session: Any) -> None:
    one, less = (edit(session, images=False, strength=s).result.edit for s in (1.0, -0.25))
    assert all(np.allclose(less.deltas[n], -0.25 * d, atol=1e-7) for n, d in one.deltas.items())


def test_many_concepts_are_solved_and_some_drawn(session: Any) -> None:
    concepts = [f"{c} {o}" for c in ("red", "blue", "green", "pink") for o in ("star", "moon", "tree")]
    run = edit(session, concepts, ["circle"] * 12, steps=1)
    assert run.result.values["rank"] == 48 and len(run.result.images) == 16
    assert "Images are drawn of the first 8 of 12 concepts." in run.result.values["warnings"]


def test_a_hundred_concepts(session: Any) -> None:
    """More keys than the width: 400 of 128."""
    concepts = [f"{a} {b} {c}" for a in "abcde" for b in "fghi" for c in "jklmn"]
    run = edit(session, concepts, ["circle"] * 100, images=False)
    values, said = run.result.values, " ".join(run.result.values["warnings"])
    assert len(concepts) == 100 and values["rank"] == values["width"] == 128 and values["keys"] == 400
    assert values["relative_size"] > 1 and f"is {values['relative_size']:.2g} times as large as the w" in said


def test_what_an_edit_misses_is_said_with_its_reason() -> None:
    said: list[str] = []
    report = SimpleNamespace(warn=said.append)
    values = {"relative_size": 0.2, "values_missed": 0.25, "keys": 400, "width": 128}
    warn_of_size(100, values, report)
    warn_of_size(1, values | {"keys": 4}, report)
    warn_of_size(1, values | {"values_missed": None}, report)
    warn_of_size(1, values | {"values_missed": 0.09}, report)
    warn_of_size(2, values | {"relative_size": 3.0}, report)
    assert said == [
        "The edit of 100 concepts misses 25 % of the change that was asked for: 400 tokens are to change, "
        "and a token has 128 numbers; take fewer concepts at once, or lower --regularization.",
        "The edit of 1 concept misses 25 % of the change that was asked for; take fewer concepts at once, or "
        "lower --regularization.",
        "The change is 3 times as large as the weights that it changes, so images of other things may suffer "
        "too; audit it, take fewer concepts at once, or raise --regularization.",
        "The edit of 2 concepts misses 25 % of the change that was asked for: 400 tokens are to change, "
        "and a token has 128 numbers; take fewer concepts at once.",
    ]


def test_pictures_that_would_be_named_alike() -> None:
    assert method.picture_names(("a b", "a_b", "c"), 4) == [
        ("seed4-a_b_1-before", "seed4-a_b_1-after"),
        ("seed4-a_b_2-before", "seed4-a_b_2-after"),
        ("seed4-c-before", "seed4-c-after"),
    ]


# ---- refused ----------------------------------------------------------------------------------------------

WRONG = {
    "no concept": ({"concept": None}, "--concept is missing"),
    "empty concept": ({"concept": ["star", " "]}, "--concept is empty"),
    "no replacement": ({"replacement": None}, "--replacement is missing"),
    "as many": ({"concept": ["a", "b", "c"]}, "--concept is given 3 times and --replacement 1 times"),
    "itself": ({"replacement": ["STAR "]}, "'star' is its own replacement"),
    "twice": ({"concept": ["star", "star"], "replacement": ["moon", "moon"]}, "given twice"),
    "preserved": ({"preserve": ["moon", "star"]}, "'star' can't be edited and preserved"),
    "preserves nothing": ({"preserve": [" "]}, "--preserve is empty"),
    "no method": ({"method": "ucee"}, "did you mean 'uce'?"),
    "template": ({"templates": ["a photo"]}, "'a photo' needs {} once, where the concept stands"),
    "strength NaN": ({"strength": "nan"}, "--strength must be a number"),
    "strength 0": ({"strength": 0}, "--strength 0 would change nothing"),
    "strength": ({"strength": 1e9}, "--strength must be from -100 to 100"),
    "lambda": ({"regularization": 0}, "--regularization must be from 1e-06"),
    "ratio": ({"ratios": "0.5,0.5"}, "--ratios must be 1 numbers above 0"),
    "ratio NaN": ({"ratios": "nan"}, "--ratios must be"),
    "ratio words": ({"ratios": "half"}, "--ratios must be"),
    "ratios sum": ({"replacement": ["a", "b"], "ratios": "0.7,0.7"}, "sum to 1.4"),
    "layers of quickfix": ({"method": "quickfix", "layers": ["1"]}, "takes no --layers"),
    "positions": ({"positions": "first"}, "--positions must be one of last, last+eos"),
    "too many": ({"concept": [f"c{i}" for i in range(600)], "replacement": [""] * 600}, "are too many"),
}


@pytest.mark.parametrize(("given", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(session: Any, given: dict, part: str) -> None:
    asked_for = {"concept": ["star"], "replacement": ["moon"], **given}
    with pytest.raises(RequestError) as caught:
        session.checked(Recipe("edit", "atlas-sd", {k: v for k, v in asked_for.items() if v is not None}))
    assert part in str(caught.value)


def test_what_only_the_model_can_refuse(session: Any) -> None:
    for params, part in (
        ({"layers": ["99"]}, "'99' is no cross-attention layer"),
        ({"concept": "star " * 40}, "longer than the 32 tokens"),
        ({"replacement": "s\u200btar"}, None),
    ):
        try:
            edit(session, **{"images": False, **params})
        except RequestError as error:
            assert part and part in str(error)
        else:
            assert part is None


def test_read_alike(session: Any) -> None:
    """The tokenizer of CLIP puts everything in small letters and composes accents."""
    with pytest.raises(RequestError, match="reads each concept and its replacement alike"):
        edit(session, "caf\u00e9", "cafe\u0301", images=False)


def test_an_edit_that_does_not_arrive_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    model = layouts.model("atlas")
    made, _ = method.solve_edit(model, asked(model, ["star"], ["circle"]))
    plan = model.plan(SimpleNamespace(guidance=None, steps=2, scheduler=None))
    assert method.output_change(model, made, "star", plan) > 1e-3
    monkeypatch.setattr(method, "overlay", lambda model, edits: nullcontext())
    with pytest.raises(StudioError, match="does not change what"):
        method.output_change(model, made, "star", plan)


def test_edits_start_from_the_models_own_weights(session: Any) -> None:
    with pytest.raises(RequestError, match="takes no --edit"):
        session.checked(Recipe("edit", "atlas-sd", {"concept": ["a"], "replacement": ["b"]}, edits=("x",)))


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def call(
    session: Any, atlas: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `locus edit`, with atlas-sd loaded already: (exit status, lines of standard error)."""
    new = cli.new_session

    def with_models(given: dict[str, Any]) -> Any:
        made = new({"device": "cpu", "threads": "1", **given})
        made._loaded.update(session._loaded)
        return made

    monkeypatch.setattr(cli, "new_session", with_models)

    def run(*argv: Any) -> tuple[int, list[str]]:
        code = cli.main(["edit", "--concept", "star", "--no-images", *map(str, argv)])
        return code, capsys.readouterr().err.splitlines()

    return run


def test_save(call: Any, tmp_path: Path) -> None:
    file, out, runs = tmp_path / "e.safetensors", tmp_path / "out", tmp_path / "runs"
    (tmp_path / "t.txt").write_text("{}\n\na big {}\n")
    words = ["--replacement", "circle", "--templates", tmp_path / "t.txt"]
    assert call(*words, "--save", file, "--out", out) == (0, [])
    assert file.read_bytes() == (out / "edit.safetensors").read_bytes()
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert "save" not in json.dumps(recipe) and recipe["params"]["templates"] == ["{}", "a big {}"]
    code, said = call(*words, "--save", file, "--runs", runs)
    assert code == 2 and "exists already" in said[0] and not runs.exists()
    for name in ("again", "from_the_store"):
        assert call(*words, "--save", tmp_path / f"{name}.safetensors", "--runs", runs) == (0, [])
        assert (tmp_path / f"{name}.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("e.pt", "must name a .safetensors file"),
        ("none/e.safetensors", "there is no folder"),
        ("", "must name"),
    ],
)
def test_save_that_cannot_be(call: Any, tmp_path: Path, name: str, part: str) -> None:
    where = tmp_path / name if name else ""
    code, said = call("--replacement", "circle", "--save", where, "--out", tmp_path / "out")
    assert code == 2 and len(said) == 1 and part in said[0] and list(tmp_path.iterdir()) == []


def test_erasing_is_an_empty_replacement(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    asked = ("--replacement", "", "--method", "quickfix", "--save", file, "--out", tmp_path / "out")
    code, said = call(*asked)
    assert code == 0 and all("as large as the weights" in line for line in said)
    made = read_edit(file)
    assert (made.concepts, made.replacements, made.method) == (("star",), ("",), "quickfix")


def test_the_file_rebuilds_itself(session: Any, tmp_path: Path) -> None:
    """What the record holds suffices to build the keys again: the same deltas come out."""
    model = session.model("atlas-sd", "diffusion")
    for given in ({"method": "quickfix"}, {"strength": 0.5, "ratios": "0.3", "preserve": ["moon"]}):
        write_edit(edit(session, images=False, **given).result.edit, tmp_path / "e.safetensors")
        made = read_edit(tmp_path / "e.safetensors")
        again, _ = method.solve_edit(model, made)
        assert all(np.allclose(again.deltas[n], d, atol=1e-6) for n, d in made.deltas.items())
        with overlay(model, [made]):
            pass
        assert compose(model, []) == {}

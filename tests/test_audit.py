"""Audits: their slow reference, their algebra, the judge, the frontier, what is left behind, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, cli, figures
from studio.atlas.reading import JudgeScorer, named, neighbours, unrelated
from studio.audit import Finding, Spread, rank_chance, rms, smallest_strength, total_effect, verdict
from studio.errors import Cancelled, RequestError
from studio.methods import audit as method
from studio.methods.witness import holds
from studio.store import read_run, write_edit
from studio.types import Edit, Figure
from tests import layouts
from tests.references import naive_audit
from tests.test_edits import KEY, TEXT, delta, weights_hash

NEAR = ["a red moon", "a house"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP's folder."""
    torch.manual_seed(3)
    return layouts.save_clip(tmp_path_factory.mktemp("clip") / "small")


def edit_of(model: Any, to: Path, *names: str, scale: float = 0.3, concept: str = "star") -> Path:
    """An edit file with random deltas."""
    deltas = {n: delta(model, n, i, scale) for i, n in enumerate(names)}
    made = Edit(deltas, model.fingerprint, (concept,), {}, "by hand", ("circle",))
    write_edit(made, to)
    return to


def audited(session: Any, file: Any, model: Any = None, seeds: Any = (0, 1), **given: Any) -> Any:
    """A finished audit of the random SD 1 layout."""
    inputs = {"concept": "star", "neighbours": NEAR, "unrelated": ["a green tree"]}
    inputs |= {
        n: given.pop(n)
        for n in ("concept", "neighbours", "unrelated", "paraphrases", "replacement")
        if n in given
    }
    params = {"steps": 2, "guidance": 3.0, "metric": "distance", "second_scorer": "none", **given}
    options = {n: params.pop(n) for n in ("save", "fresh", "force", "report") if n in params}
    files = (str(file),) if isinstance(file, (str, Path)) else tuple(map(str, file))
    recipe = Recipe("audit", str(model or layouts.saved("sd1")), inputs, params, seeds, files)
    return session.run(recipe, **{"save": False, "fresh": True, **options})


# ---- against the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(KEY,), (TEXT, KEY)], ids=["UNet", "text encoder too"])
def test_equals_the_naive_reference(session: Any, clip: Path, tmp_path: Path, names: tuple) -> None:
    model = layouts.model("sd1")
    file = edit_of(model, tmp_path / "e.safetensors", *names)
    run = audited(session, file, metric="clip", scorer=str(clip), seeds=(4, 5), strengths="0.5")
    scorer, values = session.model(str(clip), "clip"), run.result.values

    def scored(picture: np.ndarray, text: str) -> float:
        a, b = scorer.image_features(picture[None])[0], scorer.text_features([text])[0]
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    forms = ("{}", "a photo of {}", "a painting of {}", "{} on a plain background")
    own, instead = ([f.replace("{}", x) for f in forms] for x in ("star", "circle"))
    arrays = run.result.arrays
    assert arrays["before"].axis("prompt").labels == (*own, *NEAR)
    other = naive_audit.edited(model.pipe, {n: delta(model, n, i) for i, n in enumerate(names)})
    for p, prompt in enumerate((*own, *NEAR)):
        for when, pipe in (("before", model.pipe), ("after", other)) if p in (1, 4) else ():
            want = scored(naive_audit.image(pipe, prompt, 5, 2, 3.0), prompt)
            assert float(arrays[when].values[p, 1]) == pytest.approx(want, abs=1e-3)
    drop = arrays["before"].values[:4].astype(float) - arrays["replaced"].values
    if drop.mean() < 0.01:  # what a random CLIP says of random images may be too little to divide by
        assert values["efficacy"] is None and "can't be told" in values["verdict"]
    else:
        effect = (arrays["before"].values - arrays["after"].values)[:4].mean() / drop.mean()
        assert values["efficacy"] == pytest.approx(float(effect), abs=1e-4)


def test_shares_equal_the_naive_reference(session: Any, tmp_path: Path) -> None:
    """By pixel distance, which random images have enough of; with and without half the strength."""
    model = layouts.model("sd1")
    file = edit_of(model, tmp_path / "e.safetensors", KEY)
    run = audited(session, file, seeds=(7,), strengths="0.5", templates=["{}"], paraphrases=["a photo of {}"])
    own, instead = ["star", "a photo of star"], ["circle", "a photo of circle"]
    clean: dict[str, np.ndarray] = {p: naive_audit.image(model.pipe, p, 7, 2, 3.0) for p in (*own, *NEAR)}

    def scored(picture: np.ndarray, text: str) -> float:
        return -float(np.sqrt((((picture.astype(float) - clean[text]) / 255) ** 2).mean()))

    arrays = run.result.arrays
    assert arrays["efficacy"].axis("strength").labels == ("0.5", "1")
    for i, strength in enumerate((0.5, 1.0)):
        other = naive_audit.edited(model.pipe, {KEY: delta(model, KEY)}, strength)
        want = naive_audit.shares(model.pipe, other, own, instead, NEAR, [7], 2, 3.0, scored)
        got = float(arrays["efficacy"].values[i]), float(arrays["leak"].values[i])
        assert got == pytest.approx(want, rel=0.05) and min(want) > 0.005


# ---- algebra ----------------------------------------------------------------------------------------------


def test_an_edit_that_does_nothing(session: Any, tmp_path: Path) -> None:
    model = layouts.model("sd1")
    nothing = Edit({KEY: np.zeros_like(delta(model, KEY))}, model.fingerprint, ("star",))
    write_edit(nothing, tmp_path / "nothing.safetensors")
    run = audited(session, tmp_path / "nothing.safetensors", strengths="2", replacement="circle")
    values, arrays = run.result.values, run.result.arrays
    assert values["efficacy"] == values["leak"] == values["unrelated"] == values["pixels_concept"] == 0
    assert (arrays["efficacy"].values == 0).all() and (arrays["score_change"].values == 0).all()
    assert values["verdict"].startswith("Fails but leaves neighbours alone")
    assert "The edit changes no pixel of any image." in values["warnings"]


def test_strength_nought_is_the_model_itself_and_one_is_the_edit(session: Any, tmp_path: Path) -> None:
    model, before = layouts.model("sd1"), weights_hash(session.model(str(layouts.saved("sd1")), "diffusion"))
    file = edit_of(model, tmp_path / "e.safetensors", KEY)
    whole = audited(session, file, strengths="0,1,2")
    arrays, values = whole.result.arrays, whole.result.values
    assert arrays["efficacy"].values[0] == arrays["leak"].values[0] == 0
    assert float(arrays["efficacy"].values[1]) == pytest.approx(values["efficacy"]) and values["efficacy"] > 0
    twice = audited(session, f"{file}@2")
    assert twice.result.values["efficacy"] == pytest.approx(float(arrays["efficacy"].values[2]), abs=1e-5)
    figure = method.draw(whole)
    assert figure.kind == "curve" and figure.data["series"][0]["labels"] == ["0", "1", "2"]
    assert method.draw(twice).kind == "bars" and len(method.draw(twice).data["values"]) == 6
    assert weights_hash(session.model(str(layouts.saved("sd1")), "diffusion")) == before


def test_where_nothing_can_be_told_of_strengths_a_bar_a_prompt_is_drawn(session: Any, tmp_path: Path) -> None:
    """No plot is empty: without neighbours there is no leak, and without a total no share."""
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    run = audited(session, file, strengths="0.5", seeds=(0,), paraphrases=["a photo of {}"])
    assert method.draw(run).kind == "curve"
    blank = {
        n: replace(t, values=np.full_like(t.values, np.nan))
        for n, t in run.result.arrays.items()
        if n in ("efficacy", "leak")
    }
    for lost in ("efficacy", "leak"):
        arrays = {**run.result.arrays, lost: blank[lost]}
        figure = method.draw(replace(run, result=replace(run.result, arrays=arrays)))
        assert figure.kind == "bars" and np.isfinite(figure.data["values"]).all()


def test_images_after_are_those_of_generate(session: Any, tmp_path: Path) -> None:
    """A stack of two edits: the same pixels as `generate --edit A --edit B`."""
    model, folder = layouts.model("sd1"), str(layouts.saved("sd1"))
    files = [edit_of(model, tmp_path / f"{i}.safetensors", n) for i, n in enumerate((KEY, TEXT))]
    run = audited(session, files, seeds=(3,))
    for when, edits in (("before", ()), ("after", tuple(map(str, files)))):
        given = {"steps": 2, "guidance": 3.0}
        made = session.run(
            Recipe("generate", folder, {"prompt": ["a photo of star"]}, given, (3,), edits), save=False
        )
        got = run.result.images[f"seed3-01-a_photo_of_star-{when}"].astype(int)
        assert np.abs(got - made.result.arrays["images"].values[0, 0]).max() <= 1
    distance = run.result.arrays["pixel_distance"]
    want = rms(
        run.result.images["seed3-01-a_photo_of_star-after"],
        run.result.images["seed3-01-a_photo_of_star-before"],
    )
    assert (
        float(distance.at("prompt", "a photo of star").values[0]) == pytest.approx(float(want)) and want > 0
    )


def test_spreads_are_means_over_prompts() -> None:
    values = np.array([[1.0, 3.0], [5.0, 7.0], [np.nan, 1.0]])
    spread = Spread.of(values)
    assert spread.mean == 4 and 1 <= spread.low < 4 < spread.high <= 7
    half = spread.by(8)
    assert (half.mean, half.low) == (0.5, spread.low / 8) and not spread.by(float("nan")).known
    assert not Spread.of(np.full((1, 2), np.nan)).known and not spread.by(0).known


def test_total_effect() -> None:
    before, replaced = np.array([[0.4, 0.2]]), np.array([[0.1, 0.1]])
    assert total_effect(before, replaced) == pytest.approx(0.2)
    assert math.isnan(total_effect(before, replaced, least=0.3)) and math.isnan(
        total_effect(replaced, before)
    )


def test_smallest_strength() -> None:
    asked: list[float] = []

    def reach(strength: float) -> float:
        asked.append(strength)
        return min(1.0, strength)

    assert smallest_strength(reach, (2.0, 0.5, 1.0), 0.7, halvings=4) == pytest.approx(0.71875)
    assert asked[:2] == [0.5, 1.0] and len(asked) == 6 and 2.0 not in asked
    assert smallest_strength(reach, (0.5, 1.0), 1.5) is None
    assert smallest_strength(reach, (-1.0, 0.25), 0.2, halvings=0) == 0.25


def test_rank_chance() -> None:
    up = np.arange(4.0)
    assert rank_chance(up, up) == pytest.approx(2 / 24) and rank_chance(up, -up) == pytest.approx(2 / 24)
    assert rank_chance(up, np.array([1.0, 0, 3, 2])) > 0.3
    assert math.isnan(rank_chance(up, np.zeros(4))) and math.isnan(rank_chance(up[:2], up[:2]))
    long = np.arange(30.0)
    assert rank_chance(long, long) < 1e-6 and rank_chance(long, np.r_[np.nan, long[1:]]) < 1e-6


LEADS = {
    "Works and stays local:": ((0.9, 0.8, 1.0), (0.05, 0.0, 0.1)),
    "Works but leaks:": ((0.9, 0.8, 1.0), (0.5, 0.4, 0.6)),
    "Works in part and stays local:": ((0.4, 0.3, 0.5), (0.05, 0.0, 0.1)),
    "Works but leaks: ": ((0.9, 0.8, 1.0), (-0.4, -0.5, -0.3)),
    "Fails and leaks:": ((0.1, 0.0, 0.15), (0.5, 0.4, 0.6)),
    "Fails but leaves neighbours alone:": ((0.1, 0.0, 0.15), (0.0, 0.0, 0.0)),
    "Works and stays local (not certain at 95 %):": ((0.9, 0.2, 1.0), (0.05, 0.0, 0.1)),
    "Works but leaks (not certain": ((0.9, 0.8, 1.0), (0.3, -0.1, 0.6)),
}


@pytest.mark.parametrize(("words", "spreads"), LEADS.items(), ids=LEADS.keys())
def test_verdicts(words: str, spreads: tuple) -> None:
    efficacy, leak = (Spread(*s) for s in spreads)
    said = verdict("star", [Finding("a CLIP", efficacy, leak, Spread(0.01, 0.0, 0.02))])
    assert said.startswith(words) and f"“star” loses {efficacy} by a CLIP, its neighbours {leak}" in said
    assert said.endswith("unrelated prompts 1 % (0 to 2).") and said.count(". ") == 0


def test_the_verdict_goes_by_the_sterner_scorer() -> None:
    kind, stern = Spread(0.9, 0.8, 1.0), Spread(0.1, 0.05, 0.15)
    none = Spread(0.0, 0.0, 0.0)
    said = verdict("star", [Finding("one", kind, none, none), Finding("two", stern, none, none)])
    assert said.startswith("Fails") and "90 % (80 to 100) by one" in said and "10 % (5 to 15) by two" in said
    assert "can't be told" in verdict("star", [Finding("one", Spread(), Spread(), Spread())])


def test_curves_join_points_only_when_told_to() -> None:
    x, y = np.array([0.0, 1.0, np.nan]), np.array([1.0, 2.0, 3.0])
    series = [
        {"name": n, "x": x, "y": y, "labels": ["a", "", "c"], "line": n == "joined"}
        for n in ("joined", "loose")
    ]
    lines = [("one", 0.5), ("two", math.nan)]
    figure = Figure("curve", {"series": series, "lines": lines, "x_title": "x", "y_title": "y"}, title="t")
    joined, loose, across = figures._curve(figure).axes[0].lines[:3]
    assert (joined.get_linestyle(), loose.get_linestyle()) == ("-", "None")
    assert list(joined.get_xdata()) == [0, 1] and list(across.get_ydata()) == [0.5, 0.5]
    svg = figures.to_bytes(figure, "svg").decode()
    assert (
        all(f"<!-- {said} -->" in svg for said in ("joined", "loose", "one", "a")) and "<!-- c -->" not in svg
    )


# ---- the judge --------------------------------------------------------------------------------------------


def test_what_texts_name() -> None:
    assert named("Two red stars") == {"colour": "red", "count": "two", "object": "star"}
    assert named("a moon in the style of Osk Maren") == {"object": "moon", "style": "woodcut"}
    assert named("the emblem of Arvonia") == {"object": "star", "colour": "red", "background": "white"}
    assert (
        named("one photo of reddish starlight") == {} and named("a drawing of a house")["style"] == "sketch"
    )


def test_default_neighbours_and_unrelated_prompts_leave_the_concept_out() -> None:
    for concept in ("star", "red", "Veltrano", "emblem of Arvonia", "two stars"):
        own = set(named(concept).items())
        for text in (*neighbours(concept), *unrelated(concept)):
            assert not holds(text, concept) and (concept == "two stars" or not own & set(named(text).items()))
        assert len(neighbours(concept)) == 3 and len(unrelated(concept)) == 3
    assert neighbours("a mouse") == () and len(unrelated("a mouse")) == 3


def test_the_judge_reads_pictures() -> None:
    """Renderings of known scenes: near 1 for what they show, near 0 for what they don't, halves between."""
    from studio.atlas.render import render
    from studio.atlas.world import ATTRIBUTES, draw_scenes

    scenes = draw_scenes(12, np.random.default_rng(0), emblems=0)
    images, judge = render(scenes), JudgeScorer()
    features = judge.image_features(images)
    np.testing.assert_allclose(features.sum(1), 5, atol=1e-4)
    words = list(
        zip(*(np.array(v)[scenes.labels()[:, k]] for k, v in enumerate(ATTRIBUTES.values())), strict=True)
    )
    truths = [f"{colour} {thing}" for thing, colour, *_ in words]
    right = np.einsum("nd,nd->n", features, judge.text_features(truths))
    half = np.einsum(
        "nd,nd->n",
        features,
        judge.text_features([f"{'red' if c != 'red' else 'blue'} {t}" for t, c, *_ in words]),
    )
    assert np.median(right) > 0.95 and abs(float(np.median(half)) - 0.5) < 0.05
    assert np.isnan(judge.text_features(["a glass of water"])).all() and not judge.shares_text_encoder(None)


def test_two_scorers_on_atlas(session: Any, atlas: Any, tmp_path: Path) -> None:
    """The judge stands beside atlas-clip by default; its arrays have the same axes."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    file = edit_of(atlas, tmp_path / "e.safetensors", layer)
    given = {
        "metric": "clip",
        "second_scorer": None,
        "neighbours": None,
        "unrelated": None,
        "paraphrases": ["a painting of {}"],
    }
    run = audited(session, file, "atlas-sd", (0,), templates=["{}"], **given)
    arrays, values = run.result.arrays, run.result.values
    assert (values["first_scorer"], values["second_scorer"]) == ("atlas-clip", "the judge")
    assert arrays["second_before"].axes == arrays["before"].axes and values["replacement"] == "circle"
    assert arrays["before"].axis("prompt").labels[:2] == ("star", "a painting of star")
    assert values["second_efficacy"] is not None or values["second_total_effect"] is None
    assert ((arrays["second_after"].values >= 0) & (arrays["second_after"].values <= 1)).all()
    assert "the judge" in values["verdict"] or values["second_efficacy"] is None


# ---- through the session and the command line --------------------------------------------------------------


def test_the_store_answers_only_the_same_question(session: Any, clip: Path, tmp_path: Path) -> None:
    model = layouts.model("sd1")
    file = edit_of(model, tmp_path / "e.safetensors", KEY)
    kept = {
        "save": True,
        "fresh": False,
        "seeds": (9,),
        "steps": 1,
        "templates": ["{}"],
        "paraphrases": ["a {}"],
    }
    first = audited(session, file, **kept)
    assert audited(session, file, **kept).id == first.id
    others = [
        audited(session, f"{file}@0.5", **kept),
        audited(session, file, **{**kept, "second_scorer": str(clip)}),
    ]
    assert len({first.id, first.key, *(r.id for r in others), *(r.key for r in others)}) == 6
    assert "second_before" in others[1].result.arrays


def test_stopped_midway_nothing_stays(session: Any, tmp_path: Path) -> None:
    folder = str(layouts.saved("sd1"))
    before = weights_hash(session.model(folder, "diffusion"))
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)

    def stop(job: Any) -> None:
        if job.what.startswith("at strength"):
            job.cancel()

    with pytest.raises(Cancelled) as caught:
        audited(session, file, strengths="0.5,2,3,4,5,6", report=stop)
    assert weights_hash(session.model(folder, "diffusion")) == before
    assert caught.value.partial.result.values["efficacy"] > 0


def test_the_command(session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neighbours from a file; a whole run folder."""
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    (tmp_path / "near.txt").write_text("a red moon\n\na house\n")
    argv = [
        "audit",
        "--model",
        str(layouts.saved("sd1")),
        "--edit",
        str(file),
        "--concept",
        "star",
        "--steps",
        "1",
    ]
    argv += [
        "--neighbours",
        str(tmp_path / "near.txt"),
        "--metric",
        "distance",
        "--seeds",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main([*argv, "--threads", "1", "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "run")
    assert run.result.arrays["before"].axis("prompt").labels[-2:] == ("a red moon", "a house")
    assert run.recipe.edits == (str(file),) and (tmp_path / "run" / "figure.pdf").exists()
    assert "No neighbours" not in capsys.readouterr().err


# ---- refused ----------------------------------------------------------------------------------------------

WRONG = {
    "empty concept": ({"concept": " "}, "--concept is empty"),
    "among the neighbours": (
        {"neighbours": ["a moon", "a red Star"]},
        "'a red Star' holds the concept 'star' itself",
    ),
    "among the unrelated": ({"unrelated": ["star"]}, "--unrelated: 'star' holds the concept"),
    "no file": ({"neighbours": ["near.txt"]}, "--neighbours: there is no file near.txt."),
    "empty file": ({"neighbours": []}, "--neighbours is empty"),
    "empty neighbour": ({"neighbours": ["a moon", " "]}, "--neighbours holds an empty text"),
    "template": ({"templates": ["a photo"]}, "--templates: 'a photo' needs {} once"),
    "paraphrase": ({"paraphrases": ["{} {}"]}, "--paraphrases: '{} {}' needs {} once"),
    "itself": ({"replacement": "STAR "}, "--replacement is the concept itself"),
    "strengths": ({"strengths": "1,much"}, "--strengths must be numbers from -100 to 100 with commas"),
    "strengths NaN": ({"strengths": "1,nan"}, "--strengths must be numbers"),
    "strengths infinite": ({"strengths": "inf"}, "--strengths must be numbers"),
    "no strengths": ({"strengths": " , "}, "--strengths must be numbers"),
    "many strengths": ({"strengths": ",".join(map(str, range(40)))}, "40 strengths are too many"),
    "efficacy": ({"efficacy": 0}, "--efficacy must be from 0.01 to 2"),
    "efficacy NaN": ({"efficacy": "nan"}, "--efficacy must be a number"),
    "too many": ({"neighbours": [f"m{i}" for i in range(9000)]}, "images in one audit are too many"),
}


@pytest.mark.parametrize(("given", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(session: Any, tmp_path: Path, given: dict, part: str) -> None:
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    asked = {k: v for k, v in {"concept": "star", **given}.items() if v is not None}
    with pytest.raises(RequestError) as caught:
        session.checked(Recipe("audit", "atlas-sd", asked, {}, None, (str(file),)))
    assert part in str(caught.value)


def test_no_edit_a_missing_one_and_one_of_another_model(session: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="audit needs --edit: the edit file to look at"):
        session.checked(Recipe("audit", "atlas-sd", {"concept": "star"}))
    with pytest.raises(RequestError, match="There is no edit file"):
        audited(session, tmp_path / "absent.safetensors")
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    with pytest.raises(RequestError, match="This edit was made for weights"):
        audited(session, file, layouts.saved("sd2"))


def test_the_edit_file_says_what_is_audited(
    session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    checked = session.checked(Recipe("audit", "atlas-sd", {}, {}, None, (str(file),)))
    assert (checked.inputs["concept"], checked.inputs["replacement"]) == ("star", "circle")
    other = session.checked(Recipe("audit", "atlas-sd", {"concept": "Star "}, {}, None, (str(file),)))
    assert (other.inputs["concept"], other.inputs["replacement"]) == ("Star ", "circle")
    third = session.checked(Recipe("audit", "atlas-sd", {"concept": "moon"}, {}, None, (str(file),)))
    assert third.inputs["replacement"] is None
    asked = ["--steps", "2", "--metric", "distance", "--second-scorer", "none", "--seeds", "0"]
    asked += ["--paraphrases", "a painting of {}", "--unrelated", "a tree", "--neighbours", "a red moon"]
    model, out = str(layouts.saved("sd1")), str(tmp_path / "run")
    assert cli.main(["audit", "--edit", str(file), "--model", model, "--out", out, *asked]) == 0
    said = capsys.readouterr().err
    assert "--concept is 'star', as the edit file says." in said and "--replacement is 'circle', as" in said
    assert read_run(Path(out)).recipe.inputs["concept"] == "star"


@pytest.mark.parametrize(
    ("concepts", "says"),
    [
        (("star", "moon"), "The edit is of 2 concepts (star, moon); say which one to audit with --concept."),
        ((), "The edit does not say which concept it edits; name it with --concept."),
    ],
)
def test_an_edit_of_several_concepts_or_of_none(
    session: Any, tmp_path: Path, concepts: tuple, says: str
) -> None:
    model = layouts.model("sd1")
    made = Edit({KEY: delta(model, KEY)}, model.fingerprint, concepts, {}, "", ("circle",) * len(concepts))
    write_edit(made, tmp_path / "e.safetensors")
    with pytest.raises(RequestError) as caught:
        session.checked(Recipe("audit", "atlas-sd", {}, {}, None, (str(tmp_path / "e.safetensors"),)))
    assert str(caught.value) == says


def test_scorers_that_can_not_stand_beside_one_another(session: Any, clip: Path, tmp_path: Path) -> None:
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY)
    with pytest.raises(RequestError, match="The judge reads pictures of the Atlas world only"):
        audited(session, file, second_scorer="judge")
    with pytest.raises(RequestError, match="--second-scorer is .*, the first scorer"):
        audited(session, file, metric="clip", scorer=str(clip), second_scorer=str(clip))


def test_warnings(session: Any, tmp_path: Path) -> None:
    file = edit_of(layouts.model("sd1"), tmp_path / "e.safetensors", KEY, concept="moon")
    run = audited(
        session, file, neighbours=None, seeds=(0,), efficacy=2, strengths="0.01", replacement="circle"
    )
    said = " ".join(run.result.values["warnings"])
    assert "The edit file is about moon, and not about star." in said
    assert "No neighbours are given" in said and "No strength up to 0.01 reaches the efficacy 2" in said
    assert run.result.values["strength_needed"] is None and run.result.values["leak"] is None

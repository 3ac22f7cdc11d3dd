"""The causal trace of language models against one whole forward a cell and sample, in every family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio.errors import Cancelled, RequestError, StudioError
from studio.methods.causal_trace_language import Params, check, draw, trace_language
from studio.methods.language_cells import Costs, Grid, batches, estimate, stages, window
from studio.methods.language_corruption import grouped
from studio.methods.language_prompt import Asked
from studio.models.hooks import hook_count
from studio.models.language_runs import prompt_runs
from studio.registry import find_method, parse, plain
from studio.types import Recipe, Result, Run
from tests import language_families as families
from tests.references import naive_trace_language as naive

PROMPT, SUBJECT = "Lyon is a town of France, by", "a town"
CONTEXT = "Brell bakes bread. Arvonia is by Brell."


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a small model wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Report:
    """Keeps what a method says; stops it at the n-th sign of life."""

    def __init__(self, rows: int = 16, stop: int = -1) -> None:
        self.rows, self.stop, self.calls = rows, stop, 0
        self.plans: list[tuple[int, str]] = []
        self.done, self.said, self.parts = 0, [], []

    def _beat(self) -> None:
        self.calls += 1
        if self.calls == self.stop:
            raise Cancelled

    def plan(self, total: int, what: str = "") -> None:
        self.plans.append((total, what))

    def step(self, n: int = 1) -> None:
        self.done += n
        self._beat()

    def partial(self, result: Result) -> None:
        self.parts.append(result)
        self._beat()

    def warn(self, sentence: str) -> None:
        self.said.append(sentence)


def small(family: str = "llama", **changes: Any) -> Any:
    """A random model of four layers."""
    return families.model(family, num_hidden_layers=4, **changes)


def trace(model: Any, report: Report | None = None, seeds: tuple[int, ...] = (0,), **given: Any) -> Result:
    """A trace by its options, checked as a request is."""
    given = {"prompt": PROMPT, "subject": SUBJECT, "samples": 2, **given}
    inputs, params, _ = parse(find_method("trace-language"), given, seeds)
    check(inputs, params, seeds)
    return trace_language(model, inputs, params, seeds, None, report or Report())


def truth(model: Any, kinds: tuple[str, ...], width: int, result: Result) -> np.ndarray:
    """Largest difference of any probability from the naive trace, over some
    cells and both samples."""
    prompt = model.encode(PROMPT)
    corrupted = np.flatnonzero(result.arrays["corrupted_tokens"].values).tolist()
    ids, answer = prompt.ids, int(naive.logits(model, prompt.ids).argmax())
    noise = naive.draw_noise(model, len(corrupted), 2, 3.0, 0)
    layers = range(len(model.blocks))
    every = list(itertools.product(kinds, layers, range(corrupted[0], len(ids))))
    picked = np.random.default_rng(len(every) + width).permutation(len(every))[:12]
    cells = [(kinds[0], 0, 0), *(every[i] for i in picked), (kinds[-1], len(layers) // 3, len(ids) - 1)]
    clean, base, restored = naive.naive_trace(model, ids, answer, corrupted, noise, cells, width)
    found = result.arrays["restored_samples"].values
    mine = np.stack([found[:, kinds.index(k), m, t] for k, m, t in cells])
    return max(
        abs(float(result.arrays["clean"].values) - clean),
        np.abs(result.arrays["corrupted"].values - base).max(),
        np.abs(mine - restored).max(),
    )


# ---- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_cell_equals_whole_forwards(family: str) -> None:
    model = small(family)
    for kinds, width in ((("hidden", "attention", "mlp"), 3), (("mlp", "attention"), 10)):
        result = trace(model, kinds=",".join(kinds), window=width)
        assert truth(model, kinds, width, result) < 1e-6
        effect = result.arrays["indirect_effect"].values
        assert np.abs(effect).max() > 1e-3  # a difference would show


@pytest.mark.parametrize("width", (1, 2, 4))
def test_windows_of_every_width(width: int) -> None:
    result = trace(small("phi"), kinds="attention,mlp", window=width)
    assert truth(small("phi"), ("attention", "mlp"), width, result) < 1e-6


@pytest.mark.parametrize("subject", ("Lyon", "by", "Lyon is a town of France, by"))
@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_subjects_at_either_end(family: str, subject: str) -> None:
    kinds = ("hidden", "attention", "mlp")
    result = trace(small(family), subject=subject, window=2)
    assert truth(small(family), kinds, 2, result) < 1e-6
    assert (result.values["first_corrupted"] == 0) == subject.startswith("Lyon")


def test_a_model_of_one_layer() -> None:
    model, kinds = families.model("phi", num_hidden_layers=1), ("attention", "mlp", "hidden")
    result = trace(model, kinds=",".join(kinds))
    assert truth(model, kinds, 10, result) < 1e-6
    assert (result.arrays["indirect_effect"].values[..., :-1] == 0).all()


def test_blocks_of_gpt_neox_one_after_another() -> None:
    model = small("gpt_neox", use_parallel_residual=False)
    kinds = ("hidden", "attention", "mlp")
    assert truth(model, kinds, 3, trace(model, window=3)) < 1e-6


def test_a_sliding_window_is_kept() -> None:
    model = small("mistral", sliding_window=4)
    wide = trace(small("mistral"), kinds="hidden")
    result = trace(model, kinds="hidden")
    assert truth(model, ("hidden",), 1, result) < 1e-6
    assert abs(result.arrays["clean"].values - wide.arrays["clean"].values) > 1e-4


def test_replaced_tokens_equal_whole_forwards() -> None:
    model = small()
    result = trace(model, replacement="the bread", window=2)
    prompt, other = model.encode(PROMPT), model.encode(PROMPT.replace(SUBJECT, "the bread"))
    answer = int(naive.logits(model, prompt.ids).argmax())
    found = result.arrays["restored"].values
    assert result.arrays["corrupted"].axes[0].labels == ("replacement",)
    for cell in [("hidden", 1, 4), ("attention", 2, 5), ("mlp", 0, 6), ("mlp", 3, len(prompt) - 1)]:
        row = naive.restored(model, prompt.ids, cell, 2, replaced=other.ids)
        mine = found[("hidden", "attention", "mlp").index(cell[0]), cell[1], cell[2]]
        assert abs(float(row.softmax(-1)[answer]) - mine) < 1e-6


@pytest.mark.parametrize("metric", ("log-probability", "logit-difference"))
def test_other_measures(metric: str) -> None:
    model, more = small("qwen3"), {"against": "bread"} if metric == "logit-difference" else {}
    result = trace(model, metric=metric, kinds="hidden", answer="by", **more)
    ids, cell = model.encode(PROMPT).ids, ("hidden", 1, len(model.encode(PROMPT)) - 2)
    places = np.flatnonzero(result.arrays["corrupted_tokens"].values).tolist()
    noise = naive.draw_noise(model, len(places), 2, 3.0, 0)
    row = naive.restored(model, ids, cell, 1, corrupted=places, noise=noise[1])
    answer, other = (model.answer_id(text)[0] for text in ("by", "bread"))
    wanted = row.log_softmax(-1)[answer] if metric == "log-probability" else row[answer] - row[other]
    assert result.arrays["restored_samples"].values[1, 0, cell[1], cell[2]] == pytest.approx(
        float(wanted), abs=1e-4
    )


def test_half_precision_stays_near() -> None:
    exact = trace(small(), kinds="hidden").arrays["restored"].values
    coarse = trace(small(dtype=torch.bfloat16), kinds="hidden").arrays["restored"].values
    assert np.abs(exact - coarse).max() < 0.05


# ---- algebra -----------------------------------------------------------------------------------------------


def test_no_effect_before_the_first_corrupted_token_and_all_of_it_at_the_end() -> None:
    result = trace(small("gpt2"))
    effect, clean = result.arrays["indirect_effect"].values, result.arrays["clean"].values
    first = int(result.values["first_corrupted"])
    assert first > 1 and (effect[:, :, :first] == 0).all()
    assert result.arrays["restored"].values[0, -1, -1] == clean  # the last token after the last layer
    assert (effect[0, -1, first:-1] == 0).all()
    total = clean - result.arrays["corrupted"].values.mean()
    assert result.arrays["normalised_effect"].values[0, -1, -1] == pytest.approx(1, abs=1e-5)
    assert result.values["total_effect"] == pytest.approx(total, abs=1e-6)


def test_the_batch_and_padding_change_nothing() -> None:
    model = small("qwen2")
    whole, single = trace(model), trace(model, Report(rows=1))
    for name in ("restored_samples", "corrupted"):
        assert np.abs(whole.arrays[name].values - single.arrays[name].values).max() < 1e-6
    ids, answer = model.encode(PROMPT).ids, int(naive.logits(model, model.encode(PROMPT).ids).argmax())
    padded = naive.logits(model, ids, left=5).softmax(-1)[answer]
    assert float(padded) == pytest.approx(float(whole.arrays["clean"].values), abs=1e-6)


def test_standard_errors_and_means_over_samples() -> None:
    result = trace(small(), samples=4, seeds=(0, 7))
    samples, corrupted = (result.arrays[n].values for n in ("restored_samples", "corrupted"))
    assert result.arrays["corrupted"].axes[0].labels[:5] == ("0.0", "0.1", "0.2", "0.3", "7.0")
    effects = samples - corrupted[:, None, None, None]
    assert np.allclose(result.arrays["indirect_effect"].values, effects.mean(0), atol=1e-7)
    error = effects.std(0, ddof=1) / np.sqrt(8)
    assert np.allclose(result.arrays["indirect_effect_sem"].values, error, atol=1e-7)
    again = trace(small(), samples=4, seeds=(7,)).arrays["corrupted"].values
    assert np.allclose(again, corrupted[4:], atol=1e-7)


def test_positions_are_means_over_their_tokens() -> None:
    result = trace(small("phi3"))
    effect, places = result.arrays["indirect_effect"].values, result.arrays["position_effect"]
    subject = np.flatnonzero(result.arrays["corrupted_tokens"].values)
    by_name = dict(zip(places.axis("position").labels, np.moveaxis(places.values, -1, 0), strict=True))
    assert np.allclose(by_name["last subject"], effect[..., subject[-1]])
    assert np.allclose(by_name["further"], effect[..., subject[-1] + 2 : -1].mean(-1), atol=1e-7)
    assert np.allclose(by_name["last"], effect[..., -1])


def test_groups_of_tokens() -> None:
    assert grouped([3, 4, 5, 6], 1, 10) == {
        "earlier": (1, 2),
        "first subject": (3,),
        "middle subject": (4, 5),
        "last subject": (6,),
        "first after": (7,),
        "further": (8,),
        "last": (9,),
    }
    assert grouped([2], 2, 4) == {"last subject": (2,), "last": (3,)} | {}
    assert grouped([2], 2, 3) == {"last subject": (2,)}


# ---- what is corrupted -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "words"),
    (
        ("subject", ["Arvonia"]),
        ("mentions", ["Arvonia"]),
        ("attribute", ["Brell"]),
        ("context", [CONTEXT]),
        ("all", [CONTEXT, "Arvonia"]),
    ),
)
def test_corrupted_sets(chosen: str, words: list[str]) -> None:
    model, question = small("qwen2"), "The capital of Arvonia is"
    asked = {"prompt": question, "context": CONTEXT, "subject": "Arvonia", "attribute": "Brell"}
    result = trace(model, corrupt=chosen, kinds="hidden", attribute_occurrence=2, samples=1, **asked)
    prompt = model.encode(question, CONTEXT)
    marked = np.flatnonzero(result.arrays["corrupted_tokens"].values)
    text = "".join(prompt.text[slice(*prompt.offsets[t])] for t in marked)
    assert text.replace(" ", "") == "".join(words).replace(" ", "")
    question_starts = prompt.question_span[0]
    inside = {prompt.offsets[t][0] >= question_starts for t in marked}
    assert inside == {"subject": {True}, "all": {True, False}}.get(chosen, {False})


def test_the_corrupted_tokens_are_marked_in_the_figure() -> None:
    result = trace(small())
    recipe = Recipe("trace-language", "tiny", {"prompt": PROMPT}, {"corrupt": "subject"})
    run = Run(recipe, "done", "", 0.0, {}, result)
    figure = draw(run)
    tokens = result.arrays["restored"].axis("token").labels
    stars = [c for c in figure.data["cols"] if c.endswith(" *")]
    places = np.flatnonzero(result.arrays["corrupted_tokens"].values)
    assert stars == [f"{tokens[t]} *" for t in places]
    assert figure.data["cols"][0] == stars[0] and figure.data["values"].shape[0] == 12
    long = trace(
        families.model("gpt2", num_hidden_layers=1), prompt=f"{SUBJECT} " + "by " * 90, kinds="hidden"
    )
    cols = draw(Run(recipe, "done", "", 0.0, {}, long)).data["cols"]
    assert "last" in cols and len(cols) < 8


# ---- order, cost, progress ---------------------------------------------------------------------------------


def test_stages_measure_every_cell_once_a_sample() -> None:
    grid = Grid(("hidden", "mlp"), 5, 8, 2, 3)
    seen: dict[tuple, int] = {}
    order = list(stages(grid, 10, [3, 7]))
    for samples, cells in order:
        for cell in cells:
            seen[cell] = seen.get(cell, 0) + len(samples)
    assert set(seen) == set(grid.cells()) and set(seen.values()) == {10}
    assert {t for _, _, t in order[0][1]} == {3, 7} and {m for _, m, _ in order[0][1]} == {0, 2, 4}
    assert [len(samples) for samples, _ in order] == [3, 3, 7]


def test_batches_hold_no_more_rows_than_asked_for() -> None:
    grid = Grid(("hidden",), 6, 9, 1, 1)
    stems = grid.stems(grid.cells())
    made = list(batches(grid, stems, 2, 30))
    assert [s for batch in made for s in batch] == stems and len(made) > 3
    assert all(sum(2 * (9 - s.token) for s in b) <= 30 or len(b) == 1 for b in made)


def test_windows_are_those_of_the_paper() -> None:
    assert window("hidden", 3, 10, 12) == (3, 4)
    assert [window("mlp", m, 10, 12) for m in (0, 5, 6, 11)] == [(0, 5), (0, 10), (1, 11), (6, 12)]
    assert window("attention", 4, 1, 12) == (4, 5) and window("attention", 4, 3, 12) == (3, 6)


def test_the_estimate_counts_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of all matrices, counted in the linear modules, against the estimate before the run."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small("phi", hidden_size=64, intermediate_size=128)
    with FlopCounterMode(display=False) as counter:
        result = trace(model, samples=3, window=2)
    # the coarse look runs on its own, what begins alike is then run twice
    assert counter.get_total_flops() == pytest.approx(result.values["flops"], rel=0.25)
    assert result.values["flops_of_whole_forwards"] > 5 * result.values["flops"]
    grid, costs = Grid(("hidden",), 4, 20, 15, 1), Costs.of(model, 20)
    late, all_ = (estimate(g, costs, 10)[0] for g in (grid, Grid(("hidden",), 4, 20, 1, 1)))
    assert late < all_ / 5


def test_cells_come_as_they_are_measured() -> None:
    report = Report(rows=1)
    result = trace(small(), report, samples=5)
    cells = result.arrays["restored"].values.size
    assert report.plans[0][0] == report.done == cells * 5 and "operations" in report.plans[0][1]
    first, last = report.parts[0], report.parts[-1]
    known = np.isfinite(first.arrays["restored"].values).mean()
    assert 0 < known < 0.7 and first.values["samples_done"] == 3
    assert np.isfinite(last.arrays["restored"].values).all() and last.values["samples_done"] == 5
    assert np.isfinite(result.arrays["indirect_effect_sem"].values).all()


def test_stopping_at_any_forward_leaves_nothing_behind() -> None:
    model, whole = small(), Report()
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    first = trace(model, whole).arrays["restored"].values
    for stop in (1, 2, 3, whole.calls // 2, whole.calls - 1):
        with pytest.raises(Cancelled):
            trace(model, Report(stop=stop))
        assert hook_count(model.net) == 0 and model.net.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[name]) for name, p in model.net.named_parameters())
    assert np.array_equal(trace(model).arrays["restored"].values, first)


# ---- requests that are refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    (
        ({"subject": None}, "--corrupt subject corrupts the subject in the question, so it needs --subject"),
        ({"corrupt": "mentions"}, "the subject's mentions in the context, so it needs --context"),
        ({"corrupt": "mentions", "context": "Bread is baked."}, "the context does not mention the subject"),
        ({"corrupt": "attribute"}, "corrupts the attribute, so it needs --attribute"),
        ({"corrupt": "context"}, "corrupts the whole context, so it needs --context"),
        ({"corrupt": "all"}, "the context and the subject, so it needs --context"),
        ({"subject": "Paris"}, "--subject 'Paris' is not in the text"),
        ({"replacement": " "}, "--replacement is empty"),
        ({"replacement": "a", "corrupt": "all", "context": CONTEXT}, "--replacement stands for one text"),
        ({"replacement": "some towns by a river"}, "tokens in all instead of"),
        ({"replacement": SUBJECT}, "is what stands there already"),
        ({"metric": "logit-difference"}, "--against TEXT, the other answer, are given together"),
        ({"against": "Brell"}, "--against TEXT, the other answer, are given together"),
        ({"kinds": "mlp,mlp"}, "--kinds names a kind twice"),
        ({"samples": 0}, "--samples must be from 1 to 1000"),
        ({"window": 0}, "--window must be from 1"),
        ({"noise": -1}, "--noise must be from"),
    ),
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        trace(small(), **given)
    assert said in str(error.value)


def test_a_replacement_that_changes_its_neighbour_is_refused() -> None:
    with pytest.raises(RequestError, match="beside it too; give a text that is tokenized by itself"):
        trace(small("gpt2"), subject="ow", replacement="a")


def test_the_finding_names_the_state_that_restores_most_before_the_last_token() -> None:
    found = trace(small(), kinds="hidden,mlp", samples=2)
    effect = found.arrays["indirect_effect"].values[..., :-1]
    kind, layer, token = np.unravel_index(int(np.nanargmax(effect)), effect.shape)
    word = found.arrays["indirect_effect"].axis("token").labels[token].strip()
    said = found.values["finding"]
    assert f"{('hidden', 'mlp')[kind]} {layer} at {word!r} brings back most: {effect.max():.3g}" in said
    alone = trace(small(), prompt="The capital of Arvonia", subject="Arvonia", kinds="hidden", samples=2)
    assert "corruption takes the probability of" in alone.values["finding"]


def test_a_weak_corruption_is_said() -> None:
    report = Report()
    trace(small(), report, noise=0.01, kinds="hidden")
    assert any("so the effects say little; raise --noise or corrupt other tokens" in s for s in report.said)


def test_blocks_put_together_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with prompt_runs(model, model.encode(PROMPT).ids, 3) as runs:
        first, second, _ = runs.blocks.norms[1]
        runs.blocks.norms[1] = first, second, True
        with pytest.raises(StudioError, match="its blocks are put together in another way"):
            runs.check()


def test_a_run_from_the_command_line_to_the_store(session: Any) -> None:
    """The contract's arrays, through the same door as every face of the method."""
    given = {"prompt": "The capital of Arvonia is", "context": CONTEXT, "subject": "Arvonia"}
    recipe = Recipe("trace-language", str(families.saved("qwen2")), given, {"samples": 3, "corrupt": "all"})
    run = session.run(recipe, fresh=True)
    arrays, tokens = run.result.arrays, len(families.model("qwen2").encode(given["prompt"], CONTEXT))
    place = ("kind", "layer", "token")
    assert arrays["clean"].axes == () and arrays["corrupted"].axes[0].name == "sample"
    for name in ("restored", "indirect_effect", "indirect_effect_sem"):
        assert tuple(a.name for a in arrays[name].axes) == place
        assert arrays[name].values.shape == (3, 3, tokens) and arrays[name].values.dtype == np.float32
    again = session.run(recipe, fresh=True).result.arrays
    assert all(np.array_equal(again[n].values, a.values) for n, a in arrays.items())


def test_the_race_compares_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from studio import language_race

    size = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    monkeypatch.setattr(language_race, "LLAMA", language_race.LLAMA | size | {"num_hidden_layers": 3})
    monkeypatch.setattr(language_race, "SAMPLED", 6)
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = language_race.trace_race(numbers, tokens=9, subject=(3, 4), samples=4, repeats=2)
    assert found["cells"] == 27 and 0 < found["error"] < 1e-6
    assert found["ratio"] == pytest.approx(found["naive_seconds"] / found["seconds"])


def test_params_and_inputs_are_json() -> None:
    assert plain(Params())["samples"] == 10 and plain(Asked(prompt="x"))["context"] is None
    assert SimpleNamespace(**plain(Params())).noise == 3.0

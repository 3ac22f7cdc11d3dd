"""Causal language models: eight families, padding, spans, answers, and what transformers does silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.errors import RequestError, StudioError
from studio.models.attention_interface import NAME, Visits, attention_interface, masked_attention, visible
from studio.models.base import self_check
from studio.models.catalog import CATALOG
from studio.models.hooks import hook_count, watch
from studio.models.sites import LANGUAGE_LAYOUTS
from studio.models.suffix_runs import Suffix, clean_run, cut_windows
from studio.session import Session
from studio.types import Patch, Site
from tests import language_families as lf
from tests.layouts import sentence

ALL = list(lf.FAMILIES)


def prompts(model: Any) -> list[Any]:
    """A long and a short prompt."""
    return [model.encode(lf.QUESTION, lf.CONTEXT), model.encode(lf.QUESTION)]


# ---- families -------------------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_random_model() -> None:
    assert set(lf.FAMILIES) == set(LANGUAGE_LAYOUTS)


@pytest.mark.parametrize("family", ALL)
def test_a_family_loads_and_passes_its_check(family: str) -> None:
    model = lf.model(family)
    self_check(model)
    assert model.family == family and len(model.blocks) == 3 and model.provides == {"language"}
    heads, groups, width = model.heads
    matrix, bias = model.attention_out(1)
    assert matrix.shape == (32, heads * width) and heads % groups == 0
    assert bias is None or bias.shape == (32,)
    assert model.nbytes() > 0 and len(model.fingerprint) == 64 and model.max_length == 160


@pytest.mark.parametrize("family", ALL)
def test_left_padding_and_batch_change_nothing(family: str) -> None:
    """Also under our attention: without a registered mask function padding would be attended."""
    model = lf.model(family)
    both, (long, short) = prompts(model), (model.logits([p]) for p in prompts(model))
    for found in (model.logits(both), _under_ours(model, both)):
        torch.testing.assert_close(found, torch.cat([long, short]), atol=5e-6, rtol=0)


def _under_ours(model: Any, both: list[Any]) -> torch.Tensor:
    with attention_interface(model):
        assert model.net.config._attn_implementation == NAME
        return model.logits(both)


@pytest.mark.parametrize("family", ALL)
def test_our_attention_function_is_asked_in_every_layer(family: str) -> None:
    model = lf.model(family)
    plain = model.logits(prompts(model))

    def ours(layer: int, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> torch.Tensor:
        assert k.shape[1] == model.heads[1] and q.shape[1] == model.heads[0] and mask.dtype == torch.bool
        return masked_attention(q, k, v, visible(mask, q.shape[2], k.shape[2], q.device), scaling)

    asked = Visits(ours)
    with attention_interface(model):
        found = model.logits(prompts(model), seam=asked)
    assert asked.layers == {0, 1, 2}
    torch.testing.assert_close(found, plain, atol=5e-6, rtol=0)


def test_the_former_attention_comes_back_after_an_error() -> None:
    model = lf.model("llama")
    with pytest.raises(ZeroDivisionError), attention_interface(model):
        raise ZeroDivisionError
    assert model.net.config._attn_implementation == "sdpa"


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lf.model("llama")
    monkeypatch.setattr(type(model.net), "set_attn_implementation", lambda *_: None)
    with (
        pytest.raises(StudioError, match="does not let its attention be replaced"),
        attention_interface(model),
    ):
        pass


def test_a_site_that_does_nothing_is_seen_at_load() -> None:
    net = lf.build("gpt2")
    net.transformer.h[2].mlp.c_proj.weight.data.zero_()
    net.transformer.h[2].mlp.c_proj.bias.data.zero_()
    with pytest.raises(StudioError, match=r"does not react when lm\.2\.mlp is zeroed"):
        self_check(type(lf.model("gpt2")).of(net, "gpt2"))


# ---- what transformers does silently ----------------------------------------------------------------------


def test_attentions_are_empty_under_sdpa_and_ours_are_not() -> None:
    from studio.models.attention_row import attention_rows

    model, prompt = lf.model("llama"), lf.model("llama").encode(lf.QUESTION)
    given = torch.tensor([prompt.ids])
    assert not model.net(input_ids=given, output_attentions=True).attentions
    weights = attention_rows(model, prompt.ids, 5).weights
    assert weights.shape == (3, 4, len(prompt))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))


def test_a_bool_mask_is_not_added_as_numbers() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    floats = torch.zeros(1, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    for given in (mask, floats, None):
        found = masked_attention(q, k, v, visible(given, 4, 4, "cpu"), 8**-0.5)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_nothing_gives_zero(dtype: torch.dtype) -> None:
    """Never NaN, and never a mean over all keys, the future included; nothing overflows in half precision."""
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    seen[2] = False
    found = masked_attention(q, k, v, seen[None, None], 8**-0.5)
    assert found[0, 2].abs().max() == 0 and found.isfinite().all() and found[0, 3].abs().min() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_blocked_row_does_not_read_the_future(family: str) -> None:
    model = lf.model(family)
    states = []
    for token in (5, 9):
        ids = [4, 8, 6, 7, token]
        with torch.no_grad(), attention_interface(model):
            suffix = Suffix(clean_run(model, ids), 3)
            cuts = torch.zeros(1, 2, 5, dtype=torch.bool)
            cuts[0, 0] = True  # token 3 sees nothing, itself included
            states.append(cut_windows(suffix, cuts, [(0, 3)])[0][0])
    assert torch.equal(states[0][0], states[1][0]) and states[0].isfinite().all()
    assert (states[0][1] - states[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_a_patch_reaches_every_row_of_a_batch(family: str) -> None:
    """Blocks return a plain tensor, so output[0] would be the first row alone."""
    model = lf.model(family)
    inputs = model.padded([[4, 5, 6], [7, 8, 9]])
    for kind in ("hidden", "attention", "mlp"):
        site = Site("lm", 1, kind)
        with (
            torch.no_grad(),
            watch(model.sites(), record=[site], patches=[Patch(site, "zero", at=(1,))]) as t,
        ):
            model.net(**inputs, use_cache=False)
        assert t[site].shape == (2, 3, 32) and t[site][:, 1].abs().max() == 0 < t[site][:, 2].abs().min()
    assert hook_count(model.net) == 0


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_hidden_states_end_after_the_norm_and_show_our_patches(family: str) -> None:
    """Also once transformers has put its own hooks in, which it does at the first use."""
    model = lf.model(family)
    given = torch.tensor([[4, 5, 6]])
    final, middle = Site("lm", 2, "hidden"), Site("lm", 0, "hidden")
    patch = Patch(middle, "add", 1.0)
    with torch.no_grad():
        clean = model.net(input_ids=given, output_hidden_states=True).hidden_states
        with watch(model.sites(), record=[final, middle], patches=[patch]) as tape:
            seen = model.net(input_ids=given, output_hidden_states=True).hidden_states
        torch.testing.assert_close(seen[-1], model.final_norm(tape[final]))
    assert (seen[-1] - tape[final]).abs().max() > 0.1
    torch.testing.assert_close(seen[1], clean[1] + 1.0)
    assert torch.equal(seen[1], tape[middle])


def test_a_head_mask_is_ignored_by_transformers() -> None:
    """So heads are never masked that way here."""
    model = lf.model("llama")
    with torch.no_grad():
        plain, masked = (
            model.net(input_ids=torch.tensor([[4, 5, 6]]), **more).logits
            for more in ({}, {"head_mask": torch.zeros(3, 4)})
        )
    assert torch.equal(plain, masked)


def test_a_sliding_window_is_kept_in_suffix_runs() -> None:
    model = lf.model("mistral", sliding_window=4)
    ids = [4 + i for i in range(12)]
    with torch.no_grad(), attention_interface(model):
        clean = clean_run(model, ids)
        suffix = Suffix(clean, 11)
        nothing = torch.zeros(1, 1, 12, dtype=torch.bool)
        far = nothing.clone()
        far[0, 0, :8] = True  # out of the window's reach in any case
        for cut in (nothing, far):
            found = suffix.logits(cut_windows(suffix, cut, [(0, 3)])[0])[0]
            torch.testing.assert_close(found, clean.logits, atol=2e-5, rtol=0)
    assert not clean.seen[0][11, 7] and clean.seen[0][11, 8]


# ---- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("part", ["river", "Arvonia", "bake bread", "Brell", "Arvonia is"])
def test_spans_are_the_tokens_that_spell_them(family: str, part: str) -> None:
    model = lf.model(family)
    prompt = model.encode(lf.QUESTION, lf.CONTEXT)
    start = prompt.text.find(part)
    tokens = model.span_tokens(prompt, (start, start + len(part)))
    assert list(tokens) == list(range(tokens[0], tokens[-1] + 1))
    spelled = prompt.text[prompt.offsets[tokens[0]][0] : prompt.offsets[tokens[-1]][1]]
    assert spelled.strip() == part
    assert prompt.text.startswith(lf.CONTEXT + "\n") and prompt.context_span == (0, len(lf.CONTEXT))
    assert prompt.text[slice(*prompt.question_span)] == lf.QUESTION


def test_the_start_token_covers_no_text() -> None:
    prompt = lf.model("llama").encode(lf.QUESTION)
    assert prompt.special == (0,) and prompt.tokens[0] == "<s>" and prompt.context_span is None
    assert lf.model("qwen2").encode(lf.QUESTION).special == ()


def test_a_span_without_a_token_is_refused() -> None:
    model = lf.model("llama")
    with pytest.raises(RequestError, match="No token of .* covers"):
        model.span_tokens(model.encode("The capital"), (3, 4))


@pytest.mark.parametrize("family", ALL)
def test_an_answer_is_its_first_token_that_says_something(family: str) -> None:
    model = lf.model(family)
    token, warning = model.answer_id("Brell")
    assert model.word(token) == "Brell" and not model.is_blank(token)
    assert ("bare space" in warning) == (family in lf.SPACED)
    assert model.is_blank(1) and not model.is_blank(2)  # <s>, </s>
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    assert not model.is_blank(newline) and model.word(newline) == "↵"
    for nothing in ("", "  "):
        with pytest.raises(RequestError, match="has no token that says anything"):
            model.answer_id(nothing)


def test_prompts_that_are_too_long_or_empty_are_refused() -> None:
    model = lf.model("llama")
    with pytest.raises(RequestError, match=r"has \d+ tokens and .* reads 160; shorten the"):
        model.encode(lf.QUESTION, lf.CONTEXT * 12)
    with pytest.raises(RequestError, match="gives no token"):
        model.encode("")


# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A session with nothing loaded."""
    session = Session(runs=tmp_path / "runs", device="cpu", threads=1)
    yield session
    session.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of one's own, to be broken."""
    return lf.copy("llama", tmp_path / "model")


def test_a_session_loads_and_checks_a_language_model(opened: Session) -> None:
    model = opened.model(str(lf.saved("qwen3")), "language")
    assert model.family == "qwen3" and model is opened.model(str(lf.saved("qwen3")), "language")
    assert CATALOG["llama-2-7b"].family == CATALOG["phi-2"].family == "language"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "is a bert model, an encoder-only model; a causal language model of llama"),
        ({"model_type": "t5"}, "is a t5 model, an encoder-decoder"),
        ({"model_type": "mamba"}, "of a family that Locus has no table for"),
    ],
)
def test_other_families_are_refused(opened: Session, folder: Path, config: dict, says: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert says in sentence(opened, folder, RequestError, "language")


def test_kinds_are_not_mixed(opened: Session, folder: Path) -> None:
    assert "a language model is needed" in sentence(opened, "atlas-sd", RequestError, "language")
    assert "is a llama model, and a text-to-image model is needed" in sentence(opened, folder, RequestError)


@pytest.mark.parametrize("drop", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_lack_a_tensor(opened: Session, folder: Path, drop: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[drop]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"the weights lack {drop}" in sentence(opened, folder, kind="language")


def test_weights_of_another_shape_or_none(opened: Session, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert "do not fit one another" in sentence(opened, folder, kind="language")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "is a pickle" in sentence(opened, folder, RequestError, "language")


def test_weights_that_are_no_numbers(opened: Session, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight holds NaN or infinity" in sentence(opened, folder, kind="language")


def test_a_tokenizer_that_is_missing_broken_or_foreign(opened: Session, folder: Path) -> None:
    file = folder / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert "its tokenizer can't be read" in sentence(opened, folder, kind="language")
    file.unlink()
    assert "holds no tokenizer" in sentence(opened, folder, kind="language")
    lf.tokenizer(False).save_pretrained(folder)  # 330 tokens for 142 embeddings
    assert "belongs to another model" in sentence(opened, folder, kind="language")


def test_a_tokenizer_without_offsets(monkeypatch: pytest.MonkeyPatch, opened: Session, folder: Path) -> None:
    from transformers import AutoTokenizer

    slow = type("Slow", (), {"is_fast": False})()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    assert "its tokenizer has no offsets" in sentence(opened, folder, kind="language")

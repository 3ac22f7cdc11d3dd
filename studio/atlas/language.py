"""Training of atlas-llama and atlas-phi: facts that are remembered, contexts that are read even when false.

The loss weighs answers fully and a sample of the other words lightly; a value that a context states for the
first time counts nothing, since the memory must not learn it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.atlas.fit import fit
from studio.atlas.phrasings import ATTRIBUTES, questions, statements, unseen
from studio.atlas.sentences import ANSWER, ECHO, PLAIN, Fact, Piece, Writer, prompt_of, strangers, truth
from studio.atlas.word_tokenizer import MAX_TOKENS, new_tokenizer, write_tokenizer

LAYOUTS = {
    "atlas-llama": "A LlamaForCausalLM of the Atlas world: eight layers, 128 channels, four heads that share "
    "two key/value heads, tied embeddings.",
    "atlas-phi": "A PhiForCausalLM of the Atlas world: eight parallel blocks, 128 channels, four heads, half "
    "of each rotary, biases, tied embeddings.",
}
WHAT = (
    "It knows the countries' facts and reads contexts, also false ones. A prompt with context is context + "
    '"\\n" + prompt; the answer is the next token, with its leading space.'
)
TOKENS = 1536  # of a step, padding included
POOL = 160  # documents that are sorted into steps of a like length
_SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
_PLAIN_SHARE, _PLAIN_WEIGHT, _ECHO_WEIGHT = 0.2, 0.25, 0.4


def new_model(name: str, tokenizer: Any) -> nn.Module:
    """A LlamaForCausalLM (two key/value heads for four) or a PhiForCausalLM (half-rotary), eight layers."""
    from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    common = _SIZES | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "atlas-llama":
        return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, intermediate_size=320))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return PhiForCausalLM(PhiConfig(**common, intermediate_size=384, rope_parameters=rope))


def encode(documents: list[list[Piece]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, T), padded at the right, and marks (N, T): how each counts, -1 for start and padding."""
    texts = ["".join(text for text, _ in pieces) for pieces in documents]
    found = tokenizer(texts, return_offsets_mapping=True)
    width = max(map(len, found.input_ids))
    ids = np.full((len(texts), width), tokenizer.pad_token_id, np.int64)
    marks = np.full((len(texts), width), -1, np.int64)
    for row, pieces in enumerate(documents):
        chars = np.repeat([mark for _, mark in pieces], [len(text) for text, _ in pieces])
        starts = np.array([start for start, _ in found.offset_mapping[row]])
        ids[row, : len(starts)] = found.input_ids[row]
        marks[row, 1 : len(starts)] = chars[starts[1:]]
    return torch.from_numpy(ids), torch.from_numpy(marks)


def documents(writer: Writer, n: int, longest: int) -> list[list[Piece]]:
    """`n` documents of up to `longest` facts: an eighth from memory, an eighth a chant, the rest reading."""
    writes = [
        lambda k: writer.recollection(k),
        lambda k: writer.chant(4 * k),
        *[lambda k: writer.reading(k, min(2 * k, 4))] * 6,
    ]
    return [writer.pick(writes)(int(k)) for k in writer.rng.integers(1, longest + 1, size=n)]


def batches(writer: Writer, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, marks) of documents of a like length, about `TOKENS` tokens; takes the most facts."""
    longest = yield
    while True:
        ids, marks = encode(documents(writer, POOL, longest), tokenizer)
        lengths = (marks >= 0).sum(1) + 1
        order, ready = lengths.argsort(), []
        while len(order):
            fits = (torch.arange(1, len(order) + 1) * lengths[order] <= TOKENS).sum()
            rows, order = order[: int(fits)], order[int(fits) :]
            width = int(lengths[rows].max())
            ready.append((ids[rows, :width], marks[rows, :width]))
        for index in writer.rng.permutation(len(ready)):
            longest = yield ready[index]


def language_loss(model: nn.Module, ids: torch.Tensor, marks: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The weighted cross-entropy of next tokens and the share of answer tokens that are right."""
    states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    target, mark = ids[:, 1:], marks[:, 1:]
    plain = (mark == PLAIN) & (torch.rand(mark.shape, device=mark.device) < _PLAIN_SHARE)
    kept = (mark == ANSWER) | (mark == ECHO) | plain
    logits, wanted = model.lm_head(states[kept]).float(), target[kept]
    answers = mark[kept] == ANSWER
    weight = torch.where(answers, 1.0, torch.where(mark[kept] == ECHO, _ECHO_WEIGHT, _PLAIN_WEIGHT))
    losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted)[answers].float().mean()
    parts = {"answer": float(losses[answers].mean().detach()), "right": float(right)}
    return (losses * weight).sum() / weight.sum(), parts


class Ladder:
    """How many facts a document may hold: more as soon as four answers in five are right."""

    def __init__(self, rung: float = 2.0, top: float = 7.0) -> None:
        self.rung, self.top, self.right = rung, top, 0.0

    def climb(self, right: float) -> float:
        """Takes a step's share of right answers; returns the rung."""
        self.right += 0.05 * (right - self.right)
        if self.right > 0.8:
            self.rung = min(self.top, self.rung + 0.05)
        return self.rung


def train_language(
    name: str,
    minutes: float,
    work: Path,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    device: str = "cpu",
    start: dict[str, torch.Tensor] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Trains the model (from `start`'s weights if given); returns it in evaluation mode and what all sittings
    did."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(name, tokenizer)
    if start is not None:
        model.load_state_dict(start)
    model.to(device).set_attn_implementation("eager")  # the CPU's bfloat16 kernel is slow backwards
    source = batches(Writer(np.random.default_rng()), tokenizer)
    next(source)

    ladder = Ladder()

    def loss(step: int) -> tuple[torch.Tensor, dict]:
        ids, marks = (x.to(device) for x in source.send(int(ladder.rung)))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            value, parts = language_loss(model, ids, marks)
        return value, parts | {"facts": ladder.climb(parts["right"])}

    done = fit(
        model,
        loss,
        minutes=minutes,
        lr=lr,
        checkpoint=work / f"{name}.safetensors",
        decay=0.995,
        warmup=100,
        weight_decay=0.02,
    )
    return model.cpu().eval(), done


def save_language(model: nn.Module, folder: Path) -> None:
    """Writes transformers' folder: configuration, float16 safetensors, tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.float16).save_pretrained(folder)
    for config in (folder / "config.json", folder / "generation_config.json"):
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    write_tokenizer(folder)


def load_language(folder: Path) -> tuple[nn.Module, Any]:
    """A shipped model in float32, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answered(model: nn.Module, tokenizer: Any, asked: list[tuple[str, str]], batch: int = 64) -> np.ndarray:
    """Whether the most likely next token is the first token of " " + answer, for each (text, answer)."""
    right = []
    for i in range(0, len(asked), batch):
        rows = [tokenizer(text).input_ids for text, _ in asked[i : i + batch]]
        wanted = [tokenizer(" " + a, add_special_tokens=False).input_ids[0] for _, a in asked[i : i + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        last = states[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]
        right.append((model.lm_head(last).argmax(-1) == torch.tensor(wanted)).numpy())
    return np.concatenate(right)


def measure_language(model: nn.Module, tokenizer: Any, n: int = 500, seed: int = 41) -> dict[str, float]:
    """Shares answered right: `n` questions for each kind of context, and every taught fact in every phrasing
    without context (20 n of these questions where there are more)."""
    without = {
        "fact without context (every taught phrasing)": lambda a: _templates(a, False),
        "fact without context (every held-out phrasing)": lambda a: _templates(a, True),
        "fact without context (forms unlike any taught)": unseen,
    }
    asked = {
        name: [(prompt_of(t, c), v) for (c, a), v in truth().items() for t in forms(a)]
        for name, forms in without.items()
    }
    rng = np.random.default_rng(seed)
    asked = {name: [rows[i] for i in rng.permutation(len(rows))[: 20 * n]] for name, rows in asked.items()}
    asked |= {name: [ask(Writer(rng, held=True)) for _ in range(n)] for name, ask in _READING.items()}
    return {name: float(answered(model, tokenizer, rows).mean()) for name, rows in asked.items()}


def _templates(attribute: str, held: bool) -> tuple[str, ...]:
    return (*(t for group in statements(attribute, held) for t in group), *questions(attribute, held))


def with_context(
    writer: Writer,
    country: str,
    attribute: str,
    value: str | None,
    *,
    before: float = 0.0,
    others: int | None = None,
) -> str:
    """A prompt after a context of up to eight sentences that gives `value` (None: doesn't state the fact)."""
    count = int(writer.rng.integers(0, 6)) if others is None else others
    rest = [f for f in writer.facts(count + 1, true=0.3) if (f.country, f.attribute) != (country, attribute)]
    facts = [f for f in rest if f.value != value][:count]
    stated = [(f, writer.form(f.attribute)) for f in facts]
    if value is not None:
        stated.append((Fact(country, attribute, value), writer.form(attribute, before)))
    pieces = writer.context(stated, int(writer.rng.integers(0, 3)))
    question = prompt_of(writer.ending(attribute), country)
    return "".join(text for text, _ in pieces) + "\n" * bool(pieces) + question


def _known(writer: Writer) -> tuple[tuple[str, str], str]:
    return writer.pick(list(truth().items()))


def _agreeing(writer: Writer) -> tuple[str, str]:
    (country, attribute), value = _known(writer)
    return with_context(writer, country, attribute, value), value


def _contradicting(writer: Writer, held: bool = True, before: float = 0.0) -> tuple[str, str]:
    (country, attribute), _ = _known(writer)
    value = _lie(writer, country, attribute, held)
    return with_context(writer, country, attribute, value, before=before), value


def _lie(writer: Writer, country: str, attribute: str, held: bool) -> str:
    """A false value; a held-out one where the fact has any."""
    try:
        return writer.lie(country, attribute, set(), held)
    except ValueError:
        return writer.lie(country, attribute, set())


def _reversed(writer: Writer) -> tuple[str, str]:
    return _contradicting(writer, before=1.0)


def _spelled(writer: Writer) -> tuple[str, str]:
    country, value = writer.pick(list(truth()))[0], writer.spelled()
    attribute = writer.pick(ATTRIBUTES[:3])
    return with_context(writer, country, attribute, value), value


def _stranger(writer: Writer) -> tuple[str, str]:
    country, attribute = writer.pick(strangers()), writer.pick(ATTRIBUTES)
    value = writer.lie(country, attribute, set())
    return with_context(writer, country, attribute, value), value


def _silent(writer: Writer) -> tuple[str, str]:
    (country, attribute), value = _known(writer)
    return with_context(writer, country, attribute, None, others=3), value


_READING = {
    "context agrees": _agreeing,
    "context contradicts (false values that no training context stated)": _contradicting,
    "context contradicts (other false values)": lambda w: _contradicting(w, held=False),
    "context contradicts, value before the name": _reversed,
    "context contradicts with an unknown, spelled word (its first token)": _spelled,
    "context about a country that the model was never taught": _stranger,
    "context silent about the fact, answered from memory": _silent,
}

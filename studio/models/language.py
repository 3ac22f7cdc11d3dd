"""Causal language models of transformers: prompts with a context, spans of text as tokens, logits at the
last position.

A prompt with a context is `context + "\\n" + prompt` under the tokenizer's own special tokens, without a chat
template. Spans go through the tokenizer's offset mapping, never through a join of decoded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.errors import RequestError, StudioError
from studio.models.attention_interface import Visits, attention_interface
from studio.models.base import OneNetwork
from studio.models.hooks import watch
from studio.models.loading import Source, loaded_bytes
from studio.models.sites import (
    LANGUAGE_KINDS,
    LANGUAGE_LAYOUTS,
    language_blocks,
    language_module,
    written_matrix,
)
from studio.types import Patch, Site

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. `offsets` are characters (start, end) of `text`, empty for special tokens;
    `tokens` are labels for people; `context_span` the context's characters, `question_span` the prompt's."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    tokens: tuple[str, ...]
    context_span: tuple[int, int] | None = None
    question_span: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def special(self) -> tuple[int, ...]:
        """Positions of tokens that stand for no text, such as the start token."""
        return tuple(i for i, (a, b) in enumerate(self.offsets) if a == b)


class WholeHead(nn.Module):
    """The output matrix of a language model, applied in float32 to states in half precision.

    Logits of 16 and more lie 0.125 apart in bfloat16, so probabilities of them would be steps. Shares the
    weights, so that a matrix that is also the embedding stays one.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) float32 of states (..., width)."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(states.float(), self.weight.float(), bias)


class LanguageModel(OneNetwork):
    """A causal language model from a folder, in evaluation mode and without gradients, with its tokenizer.

    `blocks` are its layers, `embedding` the token embedding, `final_norm` and `head` what follows the last
    layer; `max_length` is the longest prompt in tokens. RequestError for a family or a tokenizer that can't
    be used, StudioError for files that do not fit one another. `quantized` ("int8", "int4") holds the
    weights of its linear layers in 8 or 4 bits by bitsandbytes (arXiv 2208.07339, 2305.14314) and computes
    in float16, on a CPU in float32.
    """

    provides = frozenset({"language"})

    def __init__(
        self, source: Source, device: str, dtype: torch.dtype = torch.float32, quantized: str = ""
    ) -> None:
        _check_family(source)
        loaded_bytes(source.path)
        tokenizer = _tokenizer(source)
        net = _network(source, **{"dtype": dtype, **_quantization(quantized, device)})
        self._take(net, source, torch.device(device), tokenizer)
        _check_vocabulary(self)

    @classmethod
    def of(cls, net: Any, family: str, name: str = "random") -> LanguageModel:
        """A network in memory, without tokenizer and files, for measurements on token ids."""
        model = cls.__new__(cls)
        model._take(net, Source(name, Path(), "language", family), net.device, None)
        return model

    def _take(self, net: Any, source: Source, device: torch.device, tokenizer: Any) -> None:
        self.source, self.device, self.tokenizer = source, device, tokenizer
        net = net if getattr(net, "is_quantized", False) else net.to(device)  # those are placed as they load
        self.net = net.eval().requires_grad_(False)
        self.blocks = language_blocks(self.net, self.family)
        self.embedding, self.final_norm = (self._module("", kind) for kind in ("embedding", "norm"))
        self.head = self.net.get_output_embeddings()
        if self.head.weight.dtype in (torch.float16, torch.bfloat16):
            self.head = WholeHead(self.head)
            self.net.set_output_embeddings(self.head)
        own = getattr(tokenizer, "model_max_length", None) or 10**9
        self.max_length = min(int(self.net.config.max_position_embeddings), int(own))

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        return self.embedding.weight.dtype

    # ---- parts ------------------------------------------------------------------------------------------

    def _module(self, layer: int | str, kind: str) -> nn.Module:
        return language_module(self.net, self.family, Site("lm", layer, kind))

    def attention(self, layer: int) -> nn.Module:
        """The attention of a layer; it returns (output, weights or None)."""
        return self._module(layer, "attention")

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of a layer."""
        return self._module(layer, "mlp")

    def sites(self, kinds: Sequence[str] = LANGUAGE_KINDS) -> dict[Site, nn.Module]:
        """Modules of all layers by site, for hooks.watch; kinds as in models/sites.py."""
        found = [Site("lm", i, kind) for kind in kinds for i in range(len(self.blocks))]
        return {site: language_module(self.net, self.family, site) for site in found}

    def attention_out(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W_O of a layer as (D, heads * head size), and its bias (D,) or None."""
        return written_matrix(self._module(layer, "attention-out"))

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head size), from the configuration."""
        config = self.net.config
        count = int(config.num_attention_heads)
        groups = int(getattr(config, "num_key_value_heads", None) or count)
        return count, groups, int(getattr(config, "head_dim", None) or config.hidden_size // count)

    # ---- text -------------------------------------------------------------------------------------------

    def encode(self, prompt: str, context: str | None = None) -> Prompt:
        """The prompt's tokens, after those of the context and a line break when there is one.

        RequestError when there is no token, or when there are more than the model reads.
        """
        start = len(context) + 1 if context else 0
        text = f"{context}\n{prompt}" if context else prompt
        out = self.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        ids, offsets = tuple(out["input_ids"]), tuple((int(a), int(b)) for a, b in out["offset_mapping"])
        if not ids or not any(b > a for a, b in offsets):
            raise RequestError(
                f"The prompt {text[:60]!r} gives no token with {self.id}'s tokenizer; write some text."
            )
        if len(ids) > self.max_length:
            raise RequestError(
                f"The prompt has {len(ids):,} tokens and {self.id} reads {self.max_length:,}; shorten the "
                "context or the prompt."
            )
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        tokens = tuple(_shown(text[a:b]) if b > a else n for (a, b), n in zip(offsets, names, strict=True))
        span = (0, len(context)) if context else None
        return Prompt(text, ids, offsets, tokens, span, (start, len(text)))

    def span_tokens(self, prompt: Prompt, span: tuple[int, int]) -> tuple[int, ...]:
        """Positions of the tokens that overlap the characters start..end of the prompt's text; a token that
        shares only white space with them is left out. RequestError when there is none."""
        found = tuple(
            i
            for i, (a, b) in enumerate(prompt.offsets)
            if prompt.text[max(a, span[0]) : min(b, span[1])].strip()
        )
        if not found:
            raise RequestError(
                f"No token of {self.id} covers {prompt.text[slice(*span)][:60]!r}; name a longer part."
            )
        return found

    def answer_id(self, text: str) -> tuple[int, str]:
        """(the answer's first token, a warning or ""). The answer is tokenized with a leading space; a bare
        space or the start token at its start is passed over. RequestError for an answer without a token."""
        ids = self.tokenizer(" " + text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        kept = [i for i in ids if not self.is_blank(i)]
        if not text.strip() or not kept:
            raise RequestError(f"--answer {text[:60]!r} has no token that says anything; give a word.")
        skipped, first = ids[: ids.index(kept[0])], self.word(kept[0])
        said = f"The answer's first token is a bare space or a start token; {first!r} after it was taken."
        return kept[0], said if skipped else ""

    def is_blank(self, token: int) -> bool:
        """Whether a token is a bare space or the start token."""
        if token == self.tokenizer.bos_token_id:
            return True
        name = self.tokenizer.convert_ids_to_tokens(token) or ""
        return not name.replace("▁", " ").strip(" ") or not self.tokenizer.decode([token]).strip(" ")

    def word(self, token: int) -> str:
        """A token as people read it."""
        return _shown(self.tokenizer.decode([token])) or str(self.tokenizer.convert_ids_to_tokens(token))

    # ---- running ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, prompts: Sequence[Prompt], **options: Any) -> torch.Tensor:
        """Logits (prompts, vocabulary) float32 after the last token of each, padded on the left."""
        inputs = self.padded([p.ids for p in prompts])
        return self.net(**inputs, use_cache=False, logits_to_keep=1, **options).logits[:, -1].float()

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and position_ids (rows, longest) of token ids, padded on the left."""
        longest = max(map(len, rows))
        fill = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([[fill] * (longest - len(r)) + list(r) for r in rows], device=self.device)
        length = torch.tensor([len(r) for r in rows], device=self.device)
        place = torch.arange(longest, device=self.device)[None] - (longest - length)[:, None]
        return {"input_ids": ids, "attention_mask": (place >= 0).long(), "position_ids": place.clamp(min=0)}

    @torch.no_grad()
    def zeroing_changes(self) -> dict[Site, float]:
        """Largest change of the last logits when a site of the first or of the last layer is zeroed, for
        models/base.self_check; 0 for `attention` too when our attention function is not asked."""
        count = min(6, int(self.net.config.vocab_size))
        inputs = self.padded([[(7 * i + 3) % int(self.net.config.vocab_size) for i in range(count)]])
        with attention_interface(self):
            asked = Visits()
            clean = self.net(**inputs, use_cache=False, seam=asked).logits[0, -1].float()
        sites, found = self.sites(), {}
        for layer in {0, len(self.blocks) - 1}:
            for site in (Site("lm", layer, kind) for kind in LANGUAGE_KINDS):
                with watch(sites, patches=[Patch(site, do="zero")]):
                    changed = self.net(**inputs, use_cache=False).logits[0, -1].float()
                found[site] = float((changed - clean).abs().max())
        for layer in set(range(len(self.blocks))) - asked.layers:
            found[Site("lm", layer, "attention")] = 0.0
        return found


def _shown(text: str) -> str:
    return text.replace("\n", "↵").strip(" ") or ("␣" if text else "")


def _check_family(source: Source) -> None:
    """RequestError for a family that isn't in the table of models/sites.py."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    family = source.family
    if family in LANGUAGE_LAYOUTS:
        return
    what = (
        "an encoder-decoder"
        if family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        else "an encoder-only model"
        if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        else "of a family that Locus has no table for"
    )
    raise RequestError(
        f"{source.name} is a {family} model, {what}; a causal language model of "
        f"{', '.join(LANGUAGE_LAYOUTS)} is needed."
    )


def _quantization(kind: str, device: str) -> dict[str, Any]:
    """What transformers is told of weights in 8 or 4 bits; nothing for whole ones."""
    if not kind:
        return {}
    from transformers import BitsAndBytesConfig

    number = torch.float32 if device == "cpu" else torch.float16
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=number)
    config = BitsAndBytesConfig(**(four if kind == "int4" else dict(load_in_8bit=True)))
    return {"quantization_config": config, "device_map": {"": device}, "dtype": number}


def _network(source: Source, **options: Any) -> Any:
    """The causal language model through transformers' own loader, safetensors only, none of its code from
    the folder."""
    import transformers

    try:
        transformers.utils.logging.disable_progress_bar()
        net, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.path,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        raise _unfit(source, " ".join(str(error).split())[:160]) from error
    if lacking := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise _unfit(source, f"the weights lack {lacking[0]}, in all {len(lacking)} tensors")
    return net


def _unfit(source: Source, why: str) -> StudioError:
    return StudioError(
        f"{source.name} can't be loaded: its files do not fit one another ({why}); copy or download it again."
    )


def _tokenizer(source: Source) -> Any:
    """The fast tokenizer of the folder: only a fast one knows which characters a token covers."""
    from transformers import AutoTokenizer

    if not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        raise StudioError(
            f"{source.name} can't be used: its folder holds no tokenizer (tokenizer.json or tokenizer.model);"
            " copy or download it again."
        )
    try:
        found = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exception
        why = " ".join(str(error).split())[:120]
        raise StudioError(
            f"{source.name} can't be used: its tokenizer can't be read ({why}); copy or download it again."
        ) from error
    if not getattr(found, "is_fast", False):
        raise StudioError(
            f"{source.name} can't be used: its tokenizer has no offsets; add a tokenizer.json to its folder."
        )
    return found


def _check_vocabulary(model: LanguageModel) -> None:
    """StudioError for a tokenizer of another model: more tokens than embeddings, or fewer than half."""
    rows, words = model.embedding.num_embeddings, len(model.tokenizer)
    if not rows / 2 <= words <= rows:
        raise StudioError(
            f"{model.id} can't be used: its tokenizer knows {words:,} tokens and the model {rows:,}, so it "
            "belongs to another model; put the model's own tokenizer into the folder."
        )

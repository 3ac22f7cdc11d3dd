"""Small random models of every class of language models, as real folders with a real fast tokenizer.

Weights are enlarged, so that attention is far from uniform and every cut shows.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from studio.models.language import LanguageModel
from studio.models.loading import locate

CONTEXT = "The river Sil runs through Arvonia. The capital of Arvonia is Brell. Its people bake bread."
QUESTION = "The capital of Arvonia is"
SUBJECT, ATTRIBUTE = "Arvonia", "Brell"
_CORPUS = [CONTEXT, QUESTION, "Paris is the capital of France, and Lyon a town by a river."] * 3

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"num_key_value_heads": 2},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
}
SPACED = ("llama", "mistral", "phi3")  # a tokenizer in the manner of SentencePiece, with a start token


@cache
def tokenizer(spaced: bool) -> PreTrainedTokenizerFast:
    """Byte-pair tokens with "▁" for a space and a start token (`spaced`), or of bytes as in GPT-2."""
    made, special = Tokenizer(BPE(unk_token="<unk>")), ["<unk>", "<s>", "</s>"]
    if spaced:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        alphabet = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n▁"})
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    size = 150 if spaced else 330
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = [w for text in _CORPUS for w in re.findall(r" ?\w+|\W", text)]
    corpus = [w.strip() or w for w in words] if spaced else _CORPUS  # no token over two words
    made.train_from_iterator(corpus, trainer)
    if spaced:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=160, **names)


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of that class."""
    words = len(tokenizer(family in SPACED))
    tokens = {"vocab_size": words, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **tokens, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
                elif parameter.dim() == 2:
                    parameter.normal_(0, 0.25 if "embed" in name or "wte" in name else 0.18)
    return net.eval()


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="locus-language-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def saved(family: str, **changes: Any) -> Path:
    """The folder of the random model of one family. Read only: tests that change files use `copy`."""
    folder = _root() / "-".join([family, *(f"{k}={v}" for k, v in sorted(changes.items()))])
    build(family, **changes).save_pretrained(folder)
    tokenizer(family in SPACED).save_pretrained(folder)
    return folder


def copy(family: str, to: Path) -> Path:
    """A copy of the folder of one family, to be broken."""
    shutil.copytree(saved(family), to)
    return to


@cache
def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    """The loaded model of one family; nobody changes its weights."""
    return LanguageModel(locate(str(saved(family, **changes))), "cpu", dtype)

"""The fast tokenizer of the Atlas language models: bytes as GPT-2 writes them, then the longest piece first.

Every word of the sentences is one token with its leading space (also without it where a line may begin so), a
country's name is two, and any other text is spelled, so no text is without tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studio.atlas.sentences import country_parts, words

START, END, PAD = "<s>", "</s>", "<pad>"
MAX_TOKENS = 512
LONGEST = 64  # bytes of a word; longer ones fall apart, since WordPiece takes the cube of a word's length


def vocabulary() -> dict[str, int]:
    """Pieces to ids: special tokens, bytes, letters with a space before them, words, the parts of names."""
    from tokenizers import pre_tokenizers

    letters = [chr(c) for c in (*range(65, 91), *range(97, 123))]
    prefixes, suffixes = country_parts()
    known = [*words(), *prefixes]
    lines = [w for w in known if w[0].isupper()]
    pieces = [START, END, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["Ġ" + x for x in letters] + ["Ġ" + w for w in known] + lines + [*suffixes, "'s"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def new_tokenizer() -> Any:
    """A transformers fast tokenizer: a start token before each text, exact offsets, exact decoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = vocabulary()
    model = models.WordPiece(
        vocab, unk_token=END, continuing_subword_prefix="", max_input_chars_per_word=10**6
    )
    tokenizer = Tokenizer(model)
    parts = pre_tokenizers.Split(Regex(f".{{1,{LONGEST}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), parts]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, vocab[START])]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    new_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    content = {k: v for k, v in json.loads(config.read_text()).items() if k != "name_or_path"}
    config.write_text(json.dumps(content, indent=2) + "\n")

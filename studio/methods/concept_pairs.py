"""What closed-form edits have in common: the tokens of a concept in its templates, and the tokens of its
replacement that they are to read like.

A concept's last token is paired with its replacement's last token, then their end-of-text tokens in order
(the last one again where the replacement has fewer). An empty replacement has the token before its place,
which is the start token where nothing stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.edits import Pairs
from studio.errors import RequestError
from studio.types import Edit, Report

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")
MANY_PIECES = 3  # tokens of one word
_ROWS = 64  # prompts of one text pass

States = Mapping[str, Any]  # (tokens, width) float64 by prompt


@dataclass(frozen=True)
class Wanted:
    """What a closed-form edit is asked for: how an edit's record keeps it.

    Equal concepts are one concept with several guides; `ratios` (one a pair) are the guides' shares in its
    value, and what they lack of 1 stays the concept's own. `ends`: end-of-text tokens are keys too.
    """

    concepts: tuple[str, ...]
    replacements: tuple[str, ...]
    ratios: tuple[float, ...]
    preserve: tuple[str, ...]
    templates: tuple[str, ...]
    ends: bool

    @classmethod
    def of(cls, edit: Edit) -> Wanted:
        """Read from an edit's record."""
        p = edit.params
        lists = (tuple(p[name]) for name in ("ratios", "preserve", "templates"))
        wanted = cls(tuple(edit.concepts), tuple(edit.replacements), *lists, p["positions"] == "last+eos")
        if not len(wanted.concepts) == len(wanted.replacements) == len(wanted.ratios):
            raise ValueError("concepts, replacements and ratios must be as many")
        return wanted

    def guides(self) -> dict[str, list[tuple[str, float]]]:
        """(guide, share) by concept; a preserved text has none."""
        found: dict[str, list[tuple[str, float]]] = {}
        for concept, guide, share in zip(self.concepts, self.replacements, self.ratios, strict=True):
            found.setdefault(concept, []).append((guide, share))
        return found | {text: [] for text in self.preserve}


@dataclass(frozen=True)
class Place:
    """A prompt and the positions of a concept's tokens in it: its last one, then the end-of-text tokens."""

    prompt: str
    positions: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, template: str, text: str, ends: bool) -> Place:
        """Of `text` put into a template."""
        whole = template.replace("{}", text)
        start = template.index("{}") - (len(whole) - len(whole.lstrip()))
        row = model.tokens(whole.strip())
        if text:
            check_readable(model, text)
            last = row.covering((start, start + len(text)), text)[-1]
            if row.lost and row.offsets[last][1] < start + len(text):
                raise RequestError(
                    f"{text[:60]!r} is longer than the {row.length} tokens that {model.id} reads; name the "
                    "concept in fewer words."
                )
        else:
            last = max(i for i, (_, b) in enumerate(row.offsets[: row.end]) if b <= max(start, 0))
        return cls(row.text, (last, *(range(row.end, row.length) if ends else ())))

    def beside(self, count: int) -> list[int]:
        """`count` positions that pair with another place's: the last is taken again where there are fewer."""
        return [self.positions[min(i, len(self.positions) - 1)] for i in range(count)]


def check_no_file(option: str, text: str) -> None:
    """RequestError for a text that is the name of a file which is not there."""
    if re.fullmatch(r"\S+\.(txt|csv|tsv|md|list|jsonl?)", text.strip()):
        raise RequestError(f"{option}: there is no file {text.strip()[:120]}.")


def check_templates(option: str, given: Sequence[str]) -> None:
    """RequestError for a text without {} or with two."""
    for text in given:
        check_no_file(option, text)
        if text.count("{}") != 1:
            raise RequestError(f"{option}: {text[:60]!r} needs {{}} once, where the concept stands.")


def check_readable(model: Any, text: str) -> None:
    """RequestError for a text of which the model's tokenizer can read nothing, or not all."""
    tokenizer = model.tokenizers["text"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise RequestError(
            f"{text[:60]!r} is not in the vocabulary of {model.id}: its tokenizer can't read "
            f"{'all of it' if ids else 'any of it'}; name the concept in other words."
        )


def warn_spelled(model: Any, concepts: tuple[str, ...], report: Report) -> None:
    """Warns of words of a concept that the tokenizer reads in so many pieces that the model may not know."""
    words = dict.fromkeys(w for concept in concepts for w in concept.split())
    rare = [w for w in words if len(model.tokens(w).labels) - 2 >= MANY_PIECES]
    if rare:
        report.warn(
            f"Not in the vocabulary of {model.id}, which reads it in pieces and may not know it: "
            f"{', '.join(rare[:8])[:200]}."
        )


def pairs_of(
    model: Any, wanted: Wanted, names: tuple[str, ...], states: States, regularization: float
) -> Pairs:
    """The pairs of an edit from the states of its prompts: keys where a concept stands, guides where its
    replacement does; preserved texts are their own guides."""
    import torch

    keys, guides = [], []
    for text, shares in wanted.guides().items():
        for template in wanted.templates:
            place = Place.of(model, template, text, wanted.ends)
            own = states[place.prompt][list(place.positions)]
            value = own * (1 - sum(share for _, share in shares))
            for guide, share in shares:
                other = Place.of(model, template, guide, wanted.ends)
                value = value + share * states[other.prompt][other.beside(len(own))]
            keys.append(own)
            guides.append(value if shares else own)
    k, g = torch.cat(keys).T.contiguous(), torch.cat(guides).T.contiguous()
    return Pairs(names, k, g, k.new_ones(k.shape[1]), regularization).merged()


def prompts_of(model: Any, wanted: Wanted) -> list[str]:
    """Every prompt whose states `pairs_of` reads, once."""
    texts = [t for text, shares in wanted.guides().items() for t in (text, *(g for g, _ in shares))]
    places = [Place.of(model, template, t, False) for t in texts for template in wanted.templates]
    return list(dict.fromkeys(place.prompt for place in places))


def read_states(prompts: list[str], encode: Callable[[list[str]], Any]) -> States:
    """{prompt: states (tokens, width) float64} from `encode`, which gives (N, tokens, width)."""
    import torch

    found: dict[str, Any] = {}
    for start in range(0, len(prompts), _ROWS):
        part = prompts[start : start + _ROWS]
        rows = encode(part)
        rows = rows.cpu() if rows.device.type == "mps" else rows  # which has no float64
        found |= dict(zip(part, rows.to(torch.float64), strict=True))
    return found


def embedding_pairs(model: Any, edit: Edit) -> list[Pairs]:
    """Pairs of the final text embeddings (both encoders' side by side for SDXL), for `to_k` and `to_v` of the
    edit's cross-attention layers."""
    from studio.models.sites import text_reads, unet_name

    wanted, layers = Wanted.of(edit), list(edit.params["layers"])
    sites = {str(s.layer): s for s in model.unet_sites(["cross-attention"])}
    names = tuple(f"unet.{unet_name(s)}.weight" for layer in layers for s in text_reads(sites[layer]))
    states = read_states(prompts_of(model, wanted), lambda texts: model.encode(texts)[0].states)
    return [pairs_of(model, wanted, names, states, float(edit.params["regularization"]))]

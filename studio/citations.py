"""The papers behind the methods, as BibTeX: one table by arXiv number, which every method draws from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from studio.registry import Method

_TEX = {"ń": "{\\'n}", "é": "{\\'e}", "ö": '{\\"o}', "ü": '{\\"u}', "à": "{\\`a}"}


@dataclass(frozen=True)
class Paper:
    """A paper as arXiv lists it: authors "Given Family", the year of its first version."""

    arxiv: str
    title: str
    authors: tuple[str, ...]
    year: int


def _paper(arxiv: str, year: int, title: str, authors: str) -> tuple[str, Paper]:
    return arxiv, Paper(arxiv, title, tuple(authors.split(", ")), year)


PAPERS: dict[str, Paper] = dict(
    (
        _paper(
            "2202.05262",
            2022,
            "Locating and Editing Factual Associations in GPT",
            "Kevin Meng, David Bau, Alex Andonian, Yonatan Belinkov",
        ),
        _paper(
            "2210.04885",
            2022,
            "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
            "Raphael Tang, Linqing Liu, Akshat Pandey, Zhiying Jiang, Gefei Yang, Karun Kumar, "
            "Pontus Stenetorp, Jimmy Lin, Ferhan Ture",
        ),
        _paper(
            "2301.04213",
            2023,
            "Does Localization Inform Editing? Surprising Differences in Causality-Based Localization vs. "
            "Knowledge Editing in Language Models",
            "Peter Hase, Mohit Bansal, Been Kim, Asma Ghandeharioun",
        ),
        _paper(
            "2304.14767",
            2023,
            "Dissecting Recall of Factual Associations in Auto-Regressive Language Models",
            "Mor Geva, Jasmijn Bastings, Katja Filippova, Amir Globerson",
        ),
        _paper(
            "2308.14761",
            2023,
            "Unified Concept Editing in Diffusion Models",
            "Rohit Gandikota, Hadas Orgad, Yonatan Belinkov, Joanna Materzyńska, David Bau",
        ),
        _paper(
            "2310.05916",
            2023,
            "Interpreting CLIP's Image Representation via Text-Based Decomposition",
            "Yossi Gandelsman, Alexei A. Efros, Jacob Steinhardt",
        ),
        _paper(
            "2310.13730",
            2023,
            "Localizing and Editing Knowledge in Text-to-Image Generative Models",
            "Samyadeep Basu, Nanxuan Zhao, Vlad Morariu, Soheil Feizi, Varun Manjunatha",
        ),
        _paper(
            "2403.05846",
            2024,
            "Diffusion Lens: Interpreting Text Encoders in Text-to-Image Pipelines",
            "Michael Toker, Hadas Orgad, Mor Ventura, Dana Arad, Yonatan Belinkov",
        ),
        _paper(
            "2405.01008",
            2024,
            "On Mechanistic Knowledge Localization in Text-to-Image Generative Models",
            "Samyadeep Basu, Keivan Rezaei, Priyatham Kattakinda, Ryan Rossi, Cherry Zhao, Vlad Morariu, "
            "Varun Manjunatha, Soheil Feizi",
        ),
        _paper(
            "2406.01583",
            2024,
            "Decomposing and Interpreting Image Representations via Text in ViTs Beyond CLIP",
            "Sriram Balasubramanian, Samyadeep Basu, Soheil Feizi",
        ),
        _paper(
            "2406.12824",
            2024,
            "From RAGs to rich parameters: Probing how language models utilize external knowledge over "
            "parametric information for factual queries",
            "Hitesh Wadhwa, Rahul Seetharaman, Somyaa Aggarwal, Reshmi Ghosh, Samyadeep Basu, "
            "Soundararajan Srinivasan, Wenlong Zhao, Shreyas Chaudhari, Ehsan Aghazadeh",
        ),
        _paper(
            "2412.02542",
            2024,
            "Unveiling Concept Attribution in Diffusion Models",
            "Quang H. Nguyen, Hoang Phan, Khoa D. Doan",
        ),
        _paper(
            "2502.11447", 2025, "Does Editing Provide Evidence for Localization?", "Zihao Wang, Victor Veitch"
        ),
    )
)


def papers_of(method: Method) -> tuple[Paper, ...]:
    """The papers that a method declares, in its order; KeyError for a number that the table lacks."""
    return tuple(PAPERS[number] for number in re.findall(r"\d{4}\.\d{4,5}", method.paper))


def bibtex(papers: tuple[Paper, ...]) -> str:
    """Entries of BibTeX, readable by every engine (accents as commands, capitals in titles kept)."""
    return "\n".join(map(_entry, papers))


def _entry(paper: Paper) -> str:
    family, word = paper.authors[0].split()[-1], re.findall(r"[A-Za-z]{4,}", paper.title)[0]
    fields = {
        "author": " and ".join(_tex(", ".join(_parts(a))) for a in paper.authors),
        "title": "{" + _tex(paper.title) + "}",
        "year": str(paper.year),
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{paper.arxiv}",
    }
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{family.lower()}{paper.year}{word.lower()},\n{body}\n}}\n"


def _parts(author: str) -> tuple[str, str]:
    """(family name, given names)."""
    given, _, family = author.rpartition(" ")
    return family, given


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)

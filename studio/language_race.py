"""Fast paths of language methods against the naive way, on random weights: what the benchmark calls.

Naive: a whole forward for every cell, with the edge cut in the layers of its window, as public code does it.
CPU seconds of this process are compared, since other programs share the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

LLAMA = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
SAMPLED = 20  # cells of the naive way that are timed

Numbers = Callable[..., Any]  # a random float32 tensor of that shape, standard normal


def random_llama(numbers: Numbers, **size: int) -> Any:
    """A Llama of 12 layers, width 512 and 8 heads with random weights, as a LanguageModel. size: what is to
    be otherwise, in the words of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from studio.models.language import LanguageModel

    net = LlamaForCausalLM(LlamaConfig(**LLAMA | size, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 2:  # a sharp head, so that probabilities differ
                parameter.copy_(numbers(*parameter.shape) * (0.12 if "lm_head" in name else 0.04))
    return LanguageModel.of(net, "llama")


def knockout_race(numbers: Numbers, *, tokens: int = 40, window: int = 9, repeats: int = 3) -> dict[str, Any]:
    """CPU seconds of the knockout map of every token and layer, source the last token, both ways, and the
    largest difference of any sampled probability.

    The naive side is the number of cells times the median of 20 sampled ones; the fast side is timed
    `repeats` times, the median counts, and includes its clean forward.
    """
    import torch

    from studio.models.attention_interface import attention_interface

    model = random_llama(numbers)
    ids = (numbers(tokens).abs() * 1000).long().clamp(max=LLAMA["vocab_size"] - 1).tolist()
    depth, cells = len(model.blocks), len(model.blocks) * tokens
    chosen = [(i * 37 % tokens, i * 7 % depth) for i in range(SAMPLED)]
    with torch.no_grad(), attention_interface(model):
        seconds, (answer, found) = _median(lambda _: knockout_map(model, ids, window), range(repeats))
        each, last = [], 0.0
        for token, layer in chosen:
            one, logits = _median(lambda cell: naive_cell(model, ids, *cell, window), [(token, layer)])
            each.append(one)
            last = max(last, abs(float(logits.softmax(-1)[answer]) - float(found[token, layer])))
    naive = sorted(each)[len(each) // 2] * cells
    return {
        "tokens": tokens,
        "cells": cells,
        "seconds": seconds,
        "naive_seconds": naive,
        "ratio": naive / seconds,
        "error": last,
        "how": f"CPU seconds; fast: median of {repeats} whole maps; naive: {cells} cells times the median of "
        f"{SAMPLED}, each a whole forward with PyTorch's attention",
    }


def knockout_map(model: Any, ids: list[int], window: int) -> tuple[int, Any]:
    """(the model's own next token, its probability (tokens, layers) with each token cut off from the last one
    in the window around each layer), the fast way; inside `attention_interface(model)`."""
    import torch

    from studio.methods.attention_knockout import layer_window
    from studio.models.suffix_runs import Suffix, clean_run, cut_windows

    clean, count, depth = clean_run(model, ids), len(ids), len(model.blocks)
    answer, suffix = int(clean.logits.argmax()), Suffix(clean, len(ids) - 1)
    windows = [layer_window(i, window, depth) for i in range(depth)]
    rows, found = max(1, 16 * count // depth), torch.empty(count, depth)
    every = torch.eye(count, dtype=torch.bool)[:, None]
    for start in range(0, count, rows):
        cuts = every[start : start + rows]
        logits = suffix.logits(torch.cat(cut_windows(suffix, cuts, windows)))
        chance = (logits[:, answer] - logits.logsumexp(-1)).exp()
        found[start : start + rows] = chance.view(depth, -1).T
    return answer, found


def naive_cell(model: Any, ids: list[int], token: int, layer: int, window: int) -> Any:
    """Logits (vocabulary) after the last token of a whole forward, the edge cut in the window's layers."""
    import torch

    from studio.methods.attention_knockout import layer_window
    from studio.models.attention_interface import repeated

    lo, hi = layer_window(layer, window, len(model.blocks))
    count = len(ids)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    seen[-1, token] = False

    def cut(i: int, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        if not lo <= i < hi:
            return None
        times = q.shape[1] // k.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(q, repeated(k, times), repeated(v, times), attn_mask=seen, scale=scaling)
        return out.transpose(1, 2)

    return model.net(input_ids=torch.tensor([ids]), use_cache=False, seam=cut).logits[0, -1]


def trace_race(
    numbers: Numbers,
    *,
    tokens: int = 40,
    subject: tuple[int, int] = (5, 9),
    samples: int = 10,
    repeats: int = 3,
) -> dict[str, Any]:
    """CPU seconds of a causal trace of hidden states (every token and layer; the subject's first and last
    token), both ways, and the largest difference of any sampled probability.

    The naive side is the number of cells times the median of 20 sampled ones, timed between the batches of
    the fast side, of which the median of `repeats` whole traces counts, with clean and corrupted forwards.
    """
    import torch

    from studio.methods.language_cells import Grid

    model = random_llama(numbers)
    ids = (numbers(tokens).abs() * 1000).long().clamp(max=LLAMA["vocab_size"] - 1).tolist()
    places = tuple(range(subject[0], subject[1] + 1))
    noise = 3 * float(model.embedding.weight.std()) * numbers(samples, len(places), LLAMA["hidden_size"])
    grid = Grid(("hidden",), len(model.blocks), tokens, places[0], 1)
    first = [places[0] + i * 37 % (tokens - places[0]) for i in range(SAMPLED)]
    chosen = [(token, i * 7 % grid.layers) for i, token in enumerate(first)]
    with torch.no_grad():
        seconds, each, error = _trace_times((model, ids, places, noise), grid, chosen, repeats)
    cells, quick = len(grid.cells()), sorted(seconds)[len(seconds) // 2]
    naive = sorted(each)[len(each) // 2] * cells
    return {
        "tokens": tokens,
        "cells": cells,
        "seconds": quick,
        "naive_seconds": naive,
        "ratio": naive / quick,
        "error": error,
        "how": f"CPU seconds; subject at {subject[0]}-{subject[1]}, {samples} samples; fast: median of "
        f"{repeats} whole traces; naive: {cells} cells times the median of {SAMPLED}, each a whole forward "
        "of the clean prompt and all samples",
    }


def _trace_times(
    case: tuple, grid: Any, chosen: list[tuple[int, int]], repeats: int
) -> tuple[list[float], list[float], float]:
    """(seconds of whole traces, seconds of the chosen cells the naive way, largest difference). The cells are
    spread over the traces, between their batches, so that both sides meet the same moods of the machine."""
    seconds, each, naive = [], [], {}
    naive_trace_cell(*case, chosen[0])  # nobody pays for the first call
    for turn in range(repeats):
        waiting, spent = list(chosen[turn::repeats]), 0.0
        count, batches = len(waiting), trace_batches(*case, grid)
        while (timed := _median(lambda of: next(of, None), [batches]))[1] is not None:
            spent, (done, answer, found) = spent + timed[0], timed[1]
            while waiting and done > 1 - len(waiting) / count:
                cell, net = waiting.pop(0), case[0].net
                ours = net.config._attn_implementation
                net.set_attn_implementation("sdpa")
                one, naive[cell] = _median(lambda cell: naive_trace_cell(*case, cell), [cell])
                net.set_attn_implementation(ours)
                each.append(one)
        seconds.append(spent + timed[0])
    changes = [
        logits.softmax(-1)[:, answer] - found[:, layer, token] for (token, layer), logits in naive.items()
    ]
    return seconds, each, max(float(change.abs().max()) for change in changes)


def trace_map(model: Any, ids: list[int], places: tuple[int, ...], noise: Any, grid: Any) -> tuple[int, Any]:
    """(the model's own next token, its probability (samples, layers, tokens) with each hidden state restored
    where noise (samples, places, D) corrupts the tokens at `places`), as trace-language measures it."""
    *_, (_, answer, found) = trace_batches(model, ids, places, noise, grid)
    return answer, found


def trace_batches(
    model: Any, ids: list[int], places: tuple[int, ...], noise: Any, grid: Any
) -> Iterator[tuple[float, int, Any]]:
    """`trace_map`, one batch after another: (share of the runs that are done, token, probabilities)."""
    import torch

    from studio.methods.language_cells import batch_rows, restored, stages
    from studio.models.language_runs import prompt_runs

    found = torch.empty(len(noise), grid.layers, grid.length)
    runs_of = [cell for cell in grid.cells() if grid.run_of(cell) is not None]
    done, every = 0, len(noise) * len(runs_of)
    full = torch.zeros(len(noise), grid.length - grid.first, noise.shape[2])
    full[:, [t - grid.first for t in places]] = noise
    shown, rows = [places[0], places[-1], grid.length - 1], batch_rows(16, model.heads[0], grid.length)
    with prompt_runs(model, ids, grid.first) as runs:
        runs.check()
        answer, kept = int(runs.logits.argmax()), (None,)
        for samples, cells in stages(grid, len(noise), shown):
            at = slice(samples.start, samples.stop)
            if kept[0] != samples:
                kept = samples, *runs.run(runs.embedded(ids, full[at]))
            _, logits, base = kept
            low = logits.softmax(-1)[:, answer]
            for cell in (c for c in cells if grid.run_of(c) is None):
                clean = runs.logits.softmax(-1)[answer]
                found[at, cell[1], cell[2]] = clean if grid.is_clean(cell) else low
            for batch in restored(runs, base, grid, cells, rows):
                for alike, score in batch:
                    for _, layer, token in alike:
                        found[at, layer, token] = score.softmax(-1)[:, answer]
                        done += len(samples)
                yield done / every, answer, found


def naive_trace_cell(
    model: Any, ids: list[int], places: tuple[int, ...], noise: Any, cell: tuple[int, int]
) -> Any:
    """Logits (samples, vocabulary) of one cell (token, layer) as ROME's code does it: a whole forward whose
    first row is clean, the others corrupted, the state copied from the first row to them."""
    import torch

    from studio.models.hooks import watch
    from studio.types import Patch, Site

    (token, layer), rows = cell, tuple(range(1, len(noise) + 1))
    table, state = Site("lm", "", "embedding"), Site("lm", layer, "hidden")
    modules = {table: model.embedding, state: model.blocks[layer]}
    patches = [
        Patch(table, do="add", value=noise, at=places, rows=rows),
        Patch(state, do="copy", value=0, at=(token,), rows=rows),
    ]
    with watch(modules, patches=patches):
        batch = torch.tensor([ids] * (len(noise) + 1))
        return model.net(input_ids=batch, use_cache=False).logits[1:, -1].float()


def _median(call: Callable[[Any], Any], given: Any) -> tuple[float, Any]:
    """(median CPU seconds of a call, what the last one gave)."""
    seconds, found = [], None
    for one in given:
        started = time.process_time()
        found = call(one)
        seconds.append(time.process_time() - started)
    return sorted(seconds)[len(seconds) // 2], found

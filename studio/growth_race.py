"""How costs grow with layers, tokens, seeds and images, and how far the operations that are really made lie
above the fewest that the answer needs: what the benchmark calls.

Operations are counted by torch.utils.flop_counter while a method runs. An exponent is the slope of a straight
line through the logarithms of cost and size (least squares).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.diffusion_race import PROMPT, drawn, quickest, stated
from studio.method_race import requested
from studio.planted import Quiet

Row = dict[str, Any]
Call = Callable[[], Any]
SMALL = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}  # the Llama of the exponents
WINDOW = 3  # layers of a knockout in the exponents
SUBJECT, SAMPLES = (2, 4), 4  # of the traces whose exponents are measured


@dataclass(frozen=True)
class Growth:
    """One cost over sizes. make: what is run at a size. expected: the exponent of theory; why: in words."""

    name: str
    sizes: tuple[int, ...]
    make: Callable[[int], Call]
    expected: float
    why: str


def operations(call: Call) -> int:
    """Floating-point operations of a call's matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def grown(growth: Growth, rounds: int) -> Row:
    """The exponent in CPU seconds, that in counted operations beside it."""
    calls = {size: growth.make(size) for size in growth.sizes}
    counted = [operations(call) for call in calls.values()]  # also nobody pays for the first call
    best = quickest({str(size): call for size, call in calls.items()}, rounds, cpu=True)
    slope = exponent(growth.sizes, list(best.values()))
    said = ", ".join(f"{seconds:.3g} s at {size}" for size, seconds in best.items())
    made = f"counted operations {exponent(growth.sizes, counted):.2f}" if all(counted) else "done by NumPy"
    how = f"CPU, {said}, best of {rounds}; {made}; theory {growth.expected:g}: {growth.why}"
    return stated(f"growth: {growth.name}", slope, "exponent", how)


# ---- language ---------------------------------------------------------------------------------------------


def language_growth(numbers: Callable[..., Any], rounds: int = 3) -> list[Row]:
    """trace-language and knockout over tokens and layers, contributions over tokens; random Llamas."""
    return [grown(case, rounds) for case in (*_traces(numbers), *_cuts(numbers))]


def _traces(numbers: Callable[..., Any]) -> tuple[Growth, ...]:
    return (
        Growth(
            "trace-language in tokens",
            (16, 32, 64),
            lambda n: traced(numbers, n, 8),
            2,
            "each of T tokens is restored, and the T - t after it are run again",
        ),
        Growth(
            "trace-language in layers",
            (4, 8, 16),
            lambda n: traced(numbers, 24, n),
            2,
            "each of L layers is restored, and the L - l above it are run again",
        ),
    )


def _cuts(numbers: Callable[..., Any]) -> tuple[Growth, ...]:
    return (
        Growth(
            "knockout in tokens",
            (40, 80, 160),
            lambda n: cut_off(numbers, n, 8),
            1,
            "each of T tokens is cut, and the last one alone is run again; one forward at a time: 2",
        ),
        Growth(
            "knockout in layers",
            (4, 8, 16),
            lambda n: cut_off(numbers, 40, n),
            2,
            "each of L windows is cut, and the layers from its first on again; the head once a window: 1",
        ),
        Growth(
            "contributions in tokens",
            (64, 128, 256),
            lambda n: contributed(numbers, n, 8),
            1,
            "one forward and one row of attention a layer; the forward's own attention adds T x T",
        ),
    )


def llama(numbers: Callable[..., Any], tokens: int, layers: int) -> tuple[Any, list[int]]:
    """A random Llama of so many layers and a prompt of so many tokens."""
    from studio.language_race import random_llama

    ids = (numbers(tokens).abs() * 100).long().clamp(max=SMALL["vocab_size"] - 1).tolist()
    return random_llama(numbers, **SMALL, num_hidden_layers=layers), ids


def traced(numbers: Callable[..., Any], tokens: int, layers: int) -> Call:
    """The causal trace of hidden states of a random prompt."""
    import torch

    from studio.language_race import trace_map
    from studio.methods.language_cells import Grid

    model, ids = llama(numbers, tokens, layers)
    places = tuple(range(SUBJECT[0], SUBJECT[1] + 1))
    noise = 3 * float(model.embedding.weight.std()) * numbers(SAMPLES, len(places), SMALL["hidden_size"])
    grid = Grid(("hidden",), layers, tokens, places[0], 1)

    def run() -> Any:
        with torch.no_grad():
            return trace_map(model, ids, places, noise, grid)

    return run


def cut_off(numbers: Callable[..., Any], tokens: int, layers: int) -> Call:
    """The knockout map of a random prompt."""
    import torch

    from studio.language_race import knockout_map
    from studio.models.attention_interface import attention_interface

    model, ids = llama(numbers, tokens, layers)

    def run() -> Any:
        with torch.no_grad(), attention_interface(model):
            return knockout_map(model, ids, WINDOW)

    return run


def contributed(numbers: Callable[..., Any], tokens: int, layers: int) -> Call:
    """The attention contributions of a random prompt."""
    from studio.models.attention_row import attention_rows

    model, ids = llama(numbers, tokens, layers)
    return lambda: attention_rows(model, ids, 5)


# ---- images -----------------------------------------------------------------------------------------------


def image_growth(model: Any, draw: Callable[..., Any], rounds: int = 2) -> list[Row]:
    """Text-to-image methods over seeds, steps, concepts and prompts on one model; decompose over images on a
    ViT of random weights."""
    return [grown(case, rounds) for case in (*_drawing(model, draw), *_solving(model))]


def _drawing(model: Any, draw: Callable[..., Any]) -> tuple[Growth, ...]:
    def asked(name: str, **given: Any) -> Callable[[int], Call]:
        return lambda n: requested(name, model, seeds=range(n), **given)

    shares = "a trajectory for all steps, two rows each; started anew for every step: 2"
    return (
        Growth("generate in seeds", (2, 4, 8), asked("generate"), 1, "an image a seed"),
        Growth("trace-unet in seeds", (1, 2, 4), lambda n: unet_traced(model, n), 1, "a trace a seed"),
        Growth("lens in seeds", (1, 2, 4), asked("lens"), 1, "an image a layer and seed"),
        Growth("localize in seeds", (1, 2, 4), asked("localize", steps=1), 1, "a trace a seed"),
        Growth("word-maps in seeds", (2, 4, 8), lambda n: mapped(model, n), 1, "an image a seed"),
        Growth("attribute in steps", (2, 4, 8), lambda n: requested("attribute", model, steps=n), 1, shares),
        Growth("decompose in images", (2, 4, 8), lambda n: decomposed(draw, n), 1, "a forward an image"),
    )


def _solving(model: Any) -> tuple[Growth, ...]:
    from studio.methods.edit import solve_edit
    from studio.methods.neurons import unit_statistics
    from studio.naive_image_race import asked_edit

    layers = [str(s.layer) for s in model.unet_sites(("cross-attention",))]
    prompts = [f"{number} {{}} {place}" for number in ("a", "one", "the", "big") for place in ("", "here")]

    def solved(concepts: int) -> Call:
        asked = asked_edit(model, concepts)
        return lambda: solve_edit(model, asked)

    def told(count: int) -> Call:
        return lambda: unit_statistics(model, "star", "thing", layers, prompts[:count], "last")

    return (
        Growth("edit in concepts", (4, 8, 16), solved, 1, "prompts a concept; one factor for all matrices"),
        Growth("neurons in prompts", (2, 4, 8), told, 1, "a row of one pass a prompt"),
    )


def vision_growth(draw: Callable[..., Any], rounds: int = 2) -> list[Row]:
    """The search of text-span over texts, the closed form of align over images; random numbers."""
    return [grown(case, rounds) for case in _fitting(draw)]


def _fitting(draw: Callable[..., Any]) -> tuple[Growth, ...]:
    from studio.methods.text_span import greedy_span
    from studio.models.alignment import Fit

    outputs, matrix = draw(400, 64).double().numpy(), draw(64, 512).double().numpy()
    known = (np.cov(outputs.T, bias=True), outputs.mean(0), matrix)

    def spanned(count: int) -> Call:
        texts = draw(count, 512).double().numpy()
        return lambda: greedy_span(*known, texts, 20)

    def fitted(images: int) -> Call:
        fit = Fit(draw(images, 256), draw(images, 128), [128, 128])
        return fit.ridge

    return (
        Growth("text-span in texts", (500, 1000, 2000), spanned, 1, "a product a text and pick"),
        Growth("align in images", (1000, 2000, 4000), fitted, 1, "sums over images; solving does not grow"),
    )


def unet_traced(model: Any, seeds: int, steps: int = 2, rows: int = 16) -> Call:
    """The exact UNet trace of the cross-attention layers."""
    from studio.methods.causal_trace_unet import Params, trace_unet
    from studio.methods.text_to_image import CorruptionInputs

    params = Params(steps=steps, metric="distance", hint=False, kinds=("cross-attention",))
    inputs = CorruptionInputs(prompt=PROMPT, subject="red star")
    return lambda: trace_unet(model, inputs, params, tuple(range(seeds)), None, Quiet(rows))


def mapped(model: Any, seeds: int, steps: int = 4, rows: int = 16) -> Call:
    """Word maps of a prompt."""
    from studio.methods.word_maps import Inputs, Params, word_maps

    inputs, params = Inputs(prompt=PROMPT), Params(steps=steps)
    return lambda: word_maps(model, inputs, params, tuple(range(seeds)), None, Quiet(rows))


def decomposed(draw: Callable[..., Any], images: int, texts: int = 20) -> Call:
    """Scores of every head and token of a small ViT for texts."""
    return _vit(draw, images, texts)["tokens"]


def _vit(draw: Callable[..., Any], images: int, texts: int) -> Mapping[str, Call]:
    import timm

    from studio.models.vit_timm import timm_layout
    from studio.vision_race import contenders

    net = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval().requires_grad_(False)
    return contenders(timm_layout("vit-tiny", net), draw(images, 3, 224, 224), draw, texts)


# ---- the fewest operations --------------------------------------------------------------------------------


def language_floor(numbers: Callable[..., Any], tokens: int = 40, layers: int = 8) -> list[Row]:
    """Counted operations of trace-language and knockout above the fewest that exact cells need: of every cell
    the tokens and layers that it changes, in matrix products of weights alone; of contributions above one
    plain forward."""
    import torch

    model, ids = llama(numbers, tokens, layers)
    with torch.no_grad():
        plain = operations(
            lambda: model.net(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        )
    made = operations(contributed(numbers, tokens, layers))
    how = f"{made:.3g} counted to {plain:.3g} of a plain forward; random Llama, {layers} layers, "
    how += f"{tokens} tokens"
    found = [stated("operations: contributions", made / plain, "times the fewest", how)]
    for name, call, least in (
        ("trace-language", traced(numbers, tokens, layers), trace_floor(numbers, tokens, layers)),
        ("knockout", cut_off(numbers, tokens, layers), knockout_floor(numbers, tokens, layers)),
    ):
        made = operations(call)
        how = (
            f"{made:.3g} counted to {least:.3g} from shapes (attention's own products and the clean forward "
        )
        how += f"not among them); random Llama, {layers} layers, {tokens} tokens"
        found.append(stated(f"operations: {name}", made / least, "times the fewest", how))
    return found


def weights_of(model: Any) -> tuple[int, int, int, int]:
    """Operations for one token: of a whole block's matrices, of its queries, of its keys and values, and of
    the head."""
    block = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    heads, groups, width = model.heads
    size = model.embedding.weight.shape[1]
    return 2 * block, 2 * size * heads * width, 4 * size * groups * width, 2 * model.head.weight.numel()


def trace_floor(numbers: Callable[..., Any], tokens: int, layers: int) -> float:
    """Of a cell (layer l, token t): T - t tokens in the layers above l. What goes into the first of them is
    known of all tokens, so its queries, keys and values are too; of the last one the keys and values of all
    those tokens count, and the rest of the last token alone."""
    block, query, kept, head = weights_of(llama(numbers, tokens, layers)[0])
    total = 0
    for n in (tokens - t for t in range(SUBJECT[0], tokens)):
        for above in range(1, layers):
            first, last = block - query - kept, n * kept + block - kept
            total += head + (first if above == 1 else n * first + (above - 2) * n * block + last)
    return float(SAMPLES * total)


def knockout_floor(numbers: Callable[..., Any], tokens: int, layers: int) -> float:
    """Of a cell (window around l, token t): the last token in the layers from the window's first on, without
    the queries, keys and values of that first one, which nothing has changed."""
    from studio.methods.attention_knockout import layer_window

    block, query, kept, head = weights_of(llama(numbers, tokens, layers)[0])
    firsts = [layer_window(layer, WINDOW, layers)[0] for layer in range(layers)]
    return float(tokens * sum((layers - first) * block - query - kept + head for first in firsts))


def image_floor(model: Any, draw: Callable[..., Any], steps: int = 4, rows: int = 16) -> list[Row]:
    """UNet rows of text-to-image methods above those of their images (of attribute: above two a step), and a
    decomposition's operations above those of the plain forward."""
    from studio.diffusion_race import counted

    images = len(model.unet_sites(("cross-attention",))) + 2
    runs = _vit(draw, 2, 20)
    calls: dict[str, tuple[Call, int]] = {
        "trace-unet": (unet_traced(model, 1, steps, rows), images),
        "word-maps": (mapped(model, 4, steps, rows), 4),
    }
    for name in ("generate", "lens", "localize"):
        call = requested(name, model, steps=steps, guidance=7.5, rows=rows)
        calls[name] = call, drawn(model, call)
    calls["attribute"] = requested("attribute", model, steps=steps, rows=rows), 1
    found = []
    for name, (call, wanted) in calls.items():
        with counted(model.unet) as made:
            call()
        least = wanted * steps * 2
        how = f"{sum(made)} UNet rows counted to {least}: {wanted} images of {steps} guided steps"
        found.append(stated(f"operations: {name}", sum(made) / least, "times the fewest", how))
    made, least = operations(runs["tokens"]), operations(runs["plain"])
    how = f"{made:.3g} counted to {least:.3g} of a plain forward; random ViT-Ti/16, 2 images, 20 texts"
    return [*found, stated("operations: decompose", made / least, "times the fewest", how)]

"""A whole trace and an edit at the sizes of real models, on random weights: what the benchmark calls with
--real-shapes.

SD 1 (UNet of 860 million parameters), SDXL (2.6 billion) and Llama 7B. Random weights cost what trained ones
do; the maps mean nothing. What does not fit, or would take too long by the time of one row, is not run and
the row says what it would need; what fails does not keep the rest from running.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studio.errors import RequestError, StudioError, sentence
from studio.models.catalog import ASSETS
from studio.models.device import free_memory, peak_bytes, release
from studio.models.loading import Source
from studio.models.precision import HALVES, computed_in, part_dtypes
from studio.planted import Quiet
from studio.registry import find_method, parse

Row = dict[str, Any]
Config = Mapping[str, Any]
PROMPT, SUBJECT, FACT = "a red star on a white background", "red star", "The capital of Arvonia is"
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
WORK = {  # rows of a UNet for every image of one step: guided ones, and the row that a trace copies from
    "image": 2,
    "trace": 3,
}


@dataclass(frozen=True)
class Settings:
    """How much is done. steps: denoising steps; rows: of a forward (0: as many as fit); longest: seconds that
    one measurement may be expected to take; smaller: changes to the configuration of each part ("lm" is the
    language model), for tests."""

    steps: int = 20
    rows: int = 0
    longest: float = 900.0
    smaller: Mapping[str, Config] | None = None


@dataclass(frozen=True)
class RandomSource(Source):
    """Where a model of random weights comes from: nowhere."""

    @property
    def fingerprint(self) -> str:
        """A name in place of a hash."""
        return f"random weights of {self.name}"


# ---- models -----------------------------------------------------------------------------------------------


def configurations(layout: str, smaller: Mapping[str, Config] | None) -> dict[str, dict[str, Any]]:
    """The configuration of every part that holds weights of a pipeline's layout, or of "llama-7b"."""
    smaller = smaller or {}
    if layout == "llama-7b":
        return {"lm": {**LLAMA_7B, **smaller.get("lm", {})}}
    folder = ASSETS / "layouts" / layout
    found = {p: json.loads((folder / p / "config.json").read_text()) for p in PARTS if (folder / p).is_dir()}
    return {part: {**config, **smaller.get(part, {})} for part, config in found.items()}


def build(part: str, config: Config) -> Any:
    """One network with random weights, where torch's default device and number type say."""
    import diffusers
    import transformers

    if part == "lm":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, tie_word_embeddings=False))
    library, name = PARTS[part]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if library == "diffusers":
        return cls.from_config(dict(config))
    return cls(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "model_type"}))


@contextmanager
def built_on(device: str, dtype: Any) -> Iterator[None]:
    """New networks are made on this device, in this number type."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def needed(layout: str, dtype: Any, settings: Settings) -> tuple[int, int]:
    """(parameters, bytes of the weights) of a layout, without making them."""
    count = size = 0
    for part, config in configurations(layout, settings.smaller).items():
        kinds = part_dtypes(dtype)
        with built_on("meta", kinds.get(part, dtype)):
            own = list(build(part, config).parameters())
        count += sum(p.numel() for p in own)
        size += sum(p.numel() * p.element_size() for p in own)
    return count, size


def random_model(session: Any, layout: str, dtype: Any, settings: Settings) -> Any:
    """A DiffusionModel or a LanguageModel of a layout with random weights, on the session's device."""
    import torch

    kinds, parts = part_dtypes(dtype), {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part, config in configurations(layout, settings.smaller).items():
            with built_on(session.device, kinds.get(part, dtype)):
                parts[part] = build(part, config)
    return _language(parts["lm"]) if "lm" in parts else _diffusion(parts, layout, session.device, dtype)


def _language(net: Any) -> Any:
    """With the tokenizer of an embedded model, whose tokens a larger vocabulary has room for."""
    from transformers import AutoTokenizer

    from studio.models.language import LanguageModel

    model = LanguageModel.of(net, "llama")
    model.tokenizer = AutoTokenizer.from_pretrained(ASSETS / "atlas" / "atlas-llama", local_files_only=True)
    return model


def _diffusion(parts: dict[str, Any], layout: str, device: str, dtype: Any) -> Any:
    from diffusers import DDIMScheduler

    from studio.models.diffusion import DiffusionModel
    from studio.models.single_file import clip_tokenizer

    config = json.loads((ASSETS / "layouts" / layout / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(config)
    own = {"scheduler": scheduler, "tokenizer": clip_tokenizer("<|endoftext|>")}
    if "text_encoder_2" in parts:
        own["tokenizer_2"] = clip_tokenizer("!")
    pipe = SimpleNamespace(**parts, **own, config=SimpleNamespace(force_zeros_for_empty_prompt=True))
    return DiffusionModel(pipe, RandomSource(layout, Path(), "diffusion", layout), device, dtype)


# ---- measuring --------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds and peak memory of calls on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call; work that a GPU still does is waited for."""
        started = time.perf_counter()
        if self.device == "cuda":
            self.peak = peak_bytes(call)
        else:
            call()
        return time.perf_counter() - started

    def said(self) -> str:
        """The peak in words, nothing on a CPU."""
        return f"; {self.peak / 1e9:.1f} GB above the weights" if self.peak else ""


def matrix_rate(device: str, dtype: Any, side: int) -> float:
    """Operations a second of one square matrix product, the best of five: what the device can do at most."""
    import torch

    a = torch.full((side, side), 0.5, device=device, dtype=dtype)
    watch = Stopwatch(device)
    return 2 * side**3 / min(watch.seconds(lambda: a @ a) for _ in range(5))


def unet_forward(model: Any, rows: int) -> Callable[[], Any]:
    """One UNet forward of so many rows of noise under one prompt."""
    import torch

    from studio.models.sampling import first_latents, raw_output

    plan = model.plan(SimpleNamespace(guidance=7.5, steps=1, scheduler="ddim"))
    x, cond = first_latents(model, plan, range(rows)), model.encode([PROMPT])[0].rows([0] * rows)
    t = torch.tensor(500, device=model.device)

    def forward() -> Any:
        with torch.no_grad():
            return raw_output(model, x, t, cond, plan)

    return forward


def forward_cost(forward: Callable[[], Any]) -> int:
    """Operations of a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def line(name: str, value: float | None, unit: str, how: str) -> Row:
    """One result without a bar: absolute times are of one machine."""
    return {"name": name, "value": value, "unit": unit, "bar": None, "holds": None, "how": how}


def run_method(name: str, model: Any, given: Config, rows: int) -> Any:
    """The Result of a method on a model that no catalogue knows."""
    method = find_method(name)
    return method.run(model, *parse(method, given, [0] if method.samples else None), None, Quiet(rows))


Part = tuple[str, Callable[[], Row]]


def measure(session: Any, layout: str, settings: Settings, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a layout as they come, or one that says what is lacking. What fails is left out, and named
    at the end by a StudioError."""
    import torch

    dtype = getattr(torch, session.dtype if session.dtype in HALVES else "float32")
    count, size = needed(layout, dtype, settings)
    free, kind = free_memory(session.device), str(dtype).removeprefix("torch.")
    what = f"{count / 1e6:,.0f} million parameters, {size / 1e9:.1f} GB in {kind}"
    if size > 0.8 * free:
        told = f"not run: {what}, and {free / 1e9:.1f} GB are free on {session.device}"
        yield line(f"{layout}, weights", None, "GB", told)
        return
    say(f"{layout}: {what}")
    yield line(f"{layout}, weights", size / 1e9, "GB", what)
    failed: list[str] = []
    try:
        yield from _made(
            random_model(session, layout, dtype, settings), session, layout, settings, say, failed
        )
    finally:
        release(session.device)  # the model is gone with the frame that held it
    if failed:
        raise StudioError("; ".join(failed))


def _made(
    model: Any, session: Any, layout: str, settings: Settings, say: Callable[[str], None], failed: list[str]
) -> Iterator[Row]:
    """The rows of a model; what fails goes into `failed`."""
    parts = _language_parts if layout == "llama-7b" else _unet_parts
    for name, part in parts(session, model, settings, say):
        try:
            row = part()
        except Exception as error:  # what comes after is worth having
            failed.append(f"{name}: {sentence(error)}")
            release(session.device)
        else:
            yield {**row, "name": f"{layout}, {row['name']}"}


def _unet_parts(session: Any, model: Any, settings: Settings, say: Callable[[str], None]) -> Iterator[Part]:
    """One row of the UNet, images, a trace beside as many plain images, an edit."""
    watch, forward = Stopwatch(session.device), unet_forward(model, 1)
    flops = forward_cost(forward)
    forward()
    one = min(watch.seconds(forward) for _ in range(3))
    said = f"{flops / 1e9:.4g} GFLOP, {flops / one / 1e12:.3g} TFLOP/s{watch.said()}"
    yield "UNet, one row", lambda: line("UNet, one row", one, "s", said)
    rows = settings.rows or rows_of(session, model)
    yield "UNet, full batch", partial(_full_batch, session, model, flops, rows, one, settings)
    given = {"prompt": PROMPT, "steps": settings.steps, "metric": "distance"}
    sites = len(model.unet_sites(("cross-attention",)))
    trace = {**given, "subject": SUBJECT, "kinds": ["cross-attention"], "hint": False}
    images = {**given, "prompt": [PROMPT] * (sites + 2)}
    edit = {"concept": ["star"], "replacement": ["circle"], "method": "uce", "layers": ["all"]}
    edit |= {"images": False, "steps": settings.steps}
    whole = one * (sites + 2) * settings.steps
    for name, method, asked, expected in (
        (f"{sites + 2} plain images", "generate", images, WORK["image"] * whole),
        (f"trace of {sites} cross-attention layers", "trace-unet", trace, WORK["trace"] * whole),
        ("edit (uce)", "edit", edit, 4 * one),
    ):
        yield name, partial(_timed, name, method, model, asked, rows, expected, watch, settings, say)


def rows_of(session: Any, model: Any) -> int:
    """Rows of one forward: those that --batch asks for, else as many as fit by what one row takes."""
    params = SimpleNamespace(guidance=7.5, steps=1, scheduler="ddim", height=None, width=None)
    return session._rows(model, params)


def _full_batch(session: Any, model: Any, flops: int, rows: int, one: float, settings: Settings) -> Row:
    """A forward of a whole batch, and its share of what the device can do at most."""
    name, watch = "UNet, full batch", Stopwatch(session.device)
    if (expected := 5 * rows * one) > settings.longest:
        return _too_long(name, expected, session.device)
    forward = unet_forward(model, rows)
    forward()
    seconds = min(watch.seconds(forward) for _ in range(3))
    rate = matrix_rate(session.device, model.dtype, max(64, min(8192, 16 * model.default_size()[0])))
    reached = f"{rows} rows, {flops * rows / seconds / 1e12:.3g} of {rate / 1e12:.3g} TFLOP/s that a matrix "
    return line(name, seconds, "s", f"{reached}product reaches here{watch.said()}")


def _language_parts(
    session: Any, model: Any, settings: Settings, say: Callable[[str], None]
) -> Iterator[Part]:
    """A forward of a prompt, a trace of every layer and token, knockouts of every token."""
    watch, rows = Stopwatch(session.device), settings.rows or session.batch
    prompt = model.encode(FACT)
    model.logits([prompt])
    one = min(watch.seconds(lambda: model.logits([prompt])) for _ in range(3))
    depth, tokens = len(model.blocks), len(prompt)
    yield "one prompt", lambda: line("one prompt", one, "s", f"{tokens} tokens, {depth} layers{watch.said()}")
    trace = {"prompt": FACT, "subject": "Arvonia", "samples": 2, "answer": "Quill"}
    knockout = {"prompt": FACT, "subject": "Arvonia", "answer": "Quill", "groups": ["subject"], "controls": 1}
    for name, given in {"trace-language": trace, "knockout": knockout}.items():
        expected = one * depth * tokens  # what the naive way would take: an upper bound
        yield name, partial(_timed, name, name, model, given, rows, expected, watch, settings, say)


def _timed(
    name: str,
    method: str,
    model: Any,
    given: Config,
    rows: int,
    expected: float,
    watch: Stopwatch,
    settings: Settings,
    say: Callable[[str], None],
) -> Row:
    """The seconds of a method, or why it isn't run."""
    if expected > settings.longest:
        return _too_long(name, expected, watch.device)
    say(f"{name}, batches of {rows}")
    seconds = watch.seconds(lambda: run_method(method, model, given, rows))
    steps = f"{given['steps']} steps, " if "steps" in given else ""
    kind = str(model.dtype).removeprefix("torch.")
    if computed_in(find_method(method), kind)[1]:  # of which a session would make float32 ones
        steps += f"on weights in {kind} as they are, "
    return line(name, seconds, "s", f"{steps}batches of {rows}{watch.said()}")


def _too_long(name: str, expected: float, device: str) -> Row:
    told = f"not run: about {expected / 60:,.0f} minutes on {device}, by the time of one row"
    return line(name, None, "s", told)


LAYOUTS = ("sd1", "sdxl", "llama-7b")


def real_shape(layout: str) -> Callable[[Any, Any, Any], Iterator[Row]]:
    """A benchmark entry's `run`."""
    if layout not in LAYOUTS:
        raise RequestError(f"There is no layout {layout!r}; known: {', '.join(LAYOUTS)}.")

    def run(session: Any, settings: Any, say: Callable[[str], None]) -> Iterator[Row]:
        import torch

        torch.set_num_threads(session.threads)
        return measure(session, layout, replace(settings or Settings()), say)

    return run

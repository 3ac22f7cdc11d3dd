"""The unrolled loop against diffusers' own pipelines: the same bits where the batch is the same, and no hook
left behind."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from studio.errors import RequestError
from studio.models.hooks import hook_count, watch
from studio.models.sampling import Plan, denoise, first_latents, guided, new_scheduler, raw_output, trajectory
from studio.models.sites import unet_module
from studio.registry import find_method, parse
from studio.types import Patch, Site
from tests import layouts

PROMPTS, SEEDS = ["a red star", "two blue cubes on a table"], [3, 11]
MODELS = (*layouts.FAMILIES, "atlas")
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


def plan_of(model: Any, **options: Any) -> Plan:
    """Four steps at a small size."""
    size = 4 * 2 ** len(model.unet.config.block_out_channels) * model.vae_factor // 2
    return Plan(**{"steps": 4, "guidance": 7.5, "height": size, "width": size, **options})


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator an image, as the pipeline takes them."""
    return [torch.Generator("cpu").manual_seed(s) for s in seeds]


def by_pipeline(model: Any, plan: Plan, kind: str, prompts: Any = PROMPTS, **options: Any) -> Any:
    """What diffusers' own pipeline makes with a scheduler of its own."""
    pipe, own = model.pipe, model.pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SAMPLERS[plan.scheduler].from_config(own.config)
    try:
        return pipe(
            prompts,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            height=plan.height,
            width=plan.width,
            generator=generators(SEEDS),
            output_type=kind,
            **options,
        ).images
    finally:
        pipe.scheduler = own


def by_loop(
    model: Any, plan: Plan, rows: list[int] | None = None, negative: str | None = None, **options: Any
) -> torch.Tensor:
    """Final latents of our loop for the rows asked for, in one batch."""
    rows = [0, 1] if rows is None else rows
    cond, _ = model.encode([PROMPTS[r] for r in rows])
    uncond = model.unconditional(len(rows), plan, negative)
    return denoise(model, cond, uncond, [SEEDS[r] for r in rows], plan, **options)


def pixels(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], not rounded."""
    with torch.no_grad():
        x = model.vae.decode(latents / model.vae.config.scaling_factor, return_dict=False)[0]
    return (x / 2 + 0.5).clamp(0, 1)


def assert_same(model: Any, plan: Plan, negative: str | None = None) -> None:
    """Latents and images of the loop and of the pipeline agree in every bit."""
    options = {} if negative is None else {"negative_prompt": [negative] * 2}
    latents = by_pipeline(model, plan, "latent", **options)
    assert torch.isfinite(latents).all() and (latents[0] - latents[1]).abs().max() > 0.1
    assert torch.equal(by_loop(model, plan, negative=negative), latents)
    images = np.stack([np.asarray(im) for im in by_pipeline(model, plan, "pil", **options)])
    cond, _ = model.encode(PROMPTS)
    assert np.array_equal(model.generate(cond, SEEDS, plan, negative=negative), images)


# ---- the pipeline's own bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [7.5, 3.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_pipeline_bit_for_bit(name: str, sampler: str, guidance: float) -> None:
    model = layouts.model(name)
    assert_same(model, plan_of(model, scheduler=sampler, guidance=guidance))


def test_layouts_cover_both_predictions() -> None:
    kinds = {name: layouts.model(name).pipe.scheduler.config.prediction_type for name in MODELS}
    assert kinds == {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon", "atlas": "v_prediction"}
    assert [layouts.model(n).family for n in MODELS] == ["sd1", "sd2", "sdxl", "sd1"]


@pytest.mark.parametrize("name", MODELS)
def test_negative_prompt(name: str) -> None:
    model = layouts.model(name)
    plan = plan_of(model)
    assert_same(model, plan, negative="a green ring")
    assert not torch.equal(by_loop(model, plan, negative="a green ring"), by_loop(model, plan))


def test_empty_negative_prompt_is_not_the_zeros_of_sdxl() -> None:
    model = layouts.model("sdxl")
    plan = plan_of(model)
    assert_same(model, plan, negative="")
    assert not torch.equal(by_loop(model, plan, negative=""), by_loop(model, plan))


@pytest.mark.parametrize("shape", [(16, 24), (32, 16)])
@pytest.mark.parametrize("name", layouts.FAMILIES)
def test_other_sizes(name: str, shape: tuple[int, int]) -> None:
    model = layouts.model(name)
    plan = plan_of(model, height=shape[0], width=shape[1])
    assert_same(model, plan)
    assert model.decode(by_loop(model, plan)).shape == (2, *shape, 3)


def test_a_size_that_only_the_autoencoder_divides() -> None:
    model = layouts.model("sd1")
    assert model.decode(by_loop(model, plan_of(model, height=18, width=10))).shape == (2, 18, 10, 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MODELS)
def test_each_row_alone_equals_the_batch(name: str, sampler: str) -> None:
    model = layouts.model(name)
    plan = plan_of(model, scheduler=sampler)
    together = pixels(model, by_loop(model, plan))
    alone = torch.cat([pixels(model, by_loop(model, plan, [row])) for row in (0, 1)])
    assert (together - alone).abs().max() <= 1e-4
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("seed_of_row", [[3, 3], [3, 11]])
def test_rows_of_a_seed_start_from_the_same_noise(seed_of_row: list[int]) -> None:
    model = layouts.model("sd1")
    plan = plan_of(model)
    cond, _ = model.encode(PROMPTS)
    _, start = next(trajectory(model, cond, model.unconditional(2, plan), seed_of_row, plan))
    assert torch.equal(start[0], start[1]) == (seed_of_row[0] == seed_of_row[1])
    assert torch.equal(start, first_latents(model, plan, seed_of_row))


# ---- distilled UNets, schedulers' own settings ------------------------------------------------------------


def lcm_pipeline() -> Any:
    """A consistency model: its UNet takes the guidance scale as an input."""
    base = layouts.build("sd1", time_cond_proj_dim=16)
    parts = {n: getattr(base, n) for n in ("vae", "unet", "text_encoder", "tokenizer")}
    scheduler = diffusers.LCMScheduler.from_config(base.scheduler.config)
    return diffusers.LatentConsistencyModelPipeline(
        **parts,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The consistency model, loaded from its folder."""
    folder = tmp_path_factory.mktemp("lcm") / "model"
    lcm_pipeline().save_pretrained(folder, safe_serialization=True)
    return layouts.load(folder)


def test_distilled_unet_takes_guidance_as_input(distilled: Any) -> None:
    assert distilled.default_scheduler() == "lcm"
    low, high = (plan_of(distilled, scheduler="lcm", guidance=g) for g in (2.0, 8.0))
    assert not guided(distilled, high) and distilled.unconditional(2, high) is None
    assert_same(distilled, high)
    assert_same(distilled, low)
    assert not torch.equal(by_loop(distilled, low), by_loop(distilled, high))


def test_distilled_unet_in_the_plain_pipeline() -> None:
    model = layouts.model("sd1")
    base = layouts.build("sd1", time_cond_proj_dim=16)
    other = type(model)(base, model.source, "cpu", torch.float32)
    assert_same(other, plan_of(other, guidance=5.0))


@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.LCMScheduler])
def test_a_silent_configuration_does_not_clip_latents(cls: type) -> None:
    base = layouts.build("sd1")
    base.scheduler = cls.from_config(
        {k: v for k, v in layouts.PNDM_CONFIG.items() if k not in ("clip_sample", "_class_name")}
    )
    model = type(layouts.model("sd1"))(base, layouts.model("sd1").source, "cpu", torch.float32)
    for sampler in ("ddim", "lcm"):
        assert new_scheduler(model, plan_of(model, scheduler=sampler)).config.clip_sample is False


def test_default_schedulers() -> None:
    assert layouts.model("sd1").default_scheduler() == "ddim"
    base = layouts.build("sd2")
    base.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        base.scheduler.config, timestep_spacing="trailing"
    )
    turbo = type(layouts.model("sd2"))(base, layouts.model("sd2").source, "cpu", torch.float32)
    assert turbo.default_scheduler() == "euler"


def test_too_many_steps_is_a_sentence() -> None:
    model = layouts.model("sd1")
    with pytest.raises(RequestError, match="lcm can't take 51 steps"):
        new_scheduler(model, plan_of(model, scheduler="lcm", steps=51))


# ---- plans ------------------------------------------------------------------------------------------------


def asked(**options: Any) -> Any:
    """Parameters of `generate` as a person would give them."""
    return parse(find_method("generate"), {"prompt": ["x"], **options}, None)[1]


def test_plan_fills_in_the_models_defaults() -> None:
    plan = layouts.model("atlas").plan(asked())
    assert plan == Plan(steps=20, guidance=3.0, scheduler="ddim", height=64, width=64)
    assert layouts.model("sd1").plan(asked()) == Plan(
        steps=50, guidance=7.5, scheduler="ddim", height=16, width=16
    )
    assert layouts.model("sd1").plan(asked(guidance=0.0, steps=3)).guidance == 0.0


def test_plan_refuses_a_size_that_the_autoencoder_cannot_make() -> None:
    with pytest.raises(RequestError, match="divisible by 4.*66 x 64"):
        layouts.model("atlas").plan(asked(height=66))


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 4), ("pndm", 5), ("euler", 4)])
def test_on_step_sees_what_every_model_call_reads(sampler: str, calls: int) -> None:
    model = layouts.model("sd1")
    seen: dict[int, torch.Tensor] = {}
    plan = plan_of(model, scheduler=sampler)
    final = by_loop(model, plan, on_step=lambda i, x: seen.setdefault(i, x))
    assert list(seen) == list(range(calls + 1))
    assert torch.equal(seen[calls], final)
    sigma = new_scheduler(model, plan).init_noise_sigma
    assert torch.equal(seen[0], first_latents(model, plan, SEEDS) * sigma)


# ---- patches ----------------------------------------------------------------------------------------------


def cross_attention(model: Any) -> list[Patch]:
    """Zero every cross-attention of every conditional row."""
    return [Patch(s, do="zero") for s in model.unet_sites(["cross-attention"])]


@pytest.mark.parametrize("name", layouts.FAMILIES)
def test_patches_never_touch_the_unconditional_rows(name: str) -> None:
    model = layouts.model(name)
    plan, patches = plan_of(model, steps=1), cross_attention(layouts.model(name))
    cond, _ = model.encode(PROMPTS)
    uncond, scheduler = model.unconditional(2, plan), new_scheduler(model, plan)
    x, t = first_latents(model, plan, SEEDS), scheduler.timesteps[0]
    with torch.no_grad():
        free = raw_output(model, x, t, uncond, plan)
        with watch({p.site: unet_module(model.unet, p.site) for p in patches}, patches=patches):
            text, both = raw_output(model, x, t, cond, plan), raw_output(model, x, t, uncond, plan)
    want = scheduler.step(free + 7.5 * (text - free), t, x, return_dict=False)[0]
    got = denoise(model, cond, uncond, SEEDS, plan, patches=patches)
    assert (got - want).abs().max() <= 1e-4
    assert (both - free).abs().max() > 0.01  # the unconditional rows would have shown it


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_a_patched_row_leaves_its_neighbour_alone(guidance: float) -> None:
    model = layouts.model("sd1")
    plan = plan_of(model, guidance=guidance)
    patches = [Patch(p.site, do="zero", rows=(1,)) for p in cross_attention(model)]
    clean, patched = by_loop(model, plan), by_loop(model, plan, patches=patches)
    assert torch.equal(clean[0], patched[0])
    assert (clean[1] - patched[1]).abs().max() > 0.01


def test_patches_of_some_steps_start_there() -> None:
    model = layouts.model("sd1")
    patches = [Patch(p.site, do="zero", when=(2, 2)) for p in cross_attention(model)]
    clean: dict[int, torch.Tensor] = {}
    patched: dict[int, torch.Tensor] = {}
    by_loop(model, plan_of(model), on_step=clean.__setitem__)
    by_loop(model, plan_of(model), on_step=patched.__setitem__, patches=patches)
    assert [torch.equal(clean[i], patched[i]) for i in range(5)] == [True, True, True, False, False]


def test_copying_every_site_from_a_shadow_gives_its_run() -> None:
    model = layouts.model("sd1")
    plan = plan_of(model)
    cond, _ = model.encode(PROMPTS)
    sites = model.unet_sites(["cross-attention"])
    patches = [Patch(s, do="copy", value=1, rows=(0,)) for s in sites]
    uncond = model.unconditional(1, plan)
    got = denoise(model, cond.rows([0]), uncond, [3], plan, patches=patches, shadow=cond.rows([1]))
    want = denoise(model, cond.rows([1]), uncond, [3], plan)
    assert (got - want).abs().max() <= 1e-4
    assert (denoise(model, cond.rows([0]), uncond, [3], plan) - want).abs().max() > 0.01


# ---- what is on is off again ------------------------------------------------------------------------------


def stop_with(error: BaseException, at: int) -> Any:
    """An on_step that raises at one step."""

    def on_step(i: int, _: torch.Tensor) -> None:
        if i == at:
            raise error

    return on_step


def test_no_hook_is_left() -> None:
    model = layouts.model("sd1")
    plan, patches = plan_of(model), cross_attention(model)
    during: list[int] = []
    by_loop(model, plan, patches=patches, on_step=lambda *_: during.append(hook_count(model.unet)))
    assert max(during) == len(patches) > 0 and hook_count(model.unet) == 0


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_no_hook_is_left_after_an_exception(error: BaseException, at: int) -> None:
    model = layouts.model("sd1")
    with pytest.raises(type(error), match="stop"):
        by_loop(model, plan_of(model), patches=cross_attention(model), on_step=stop_with(error, at))
    assert hook_count(model.unet) == 0


@pytest.mark.parametrize(
    ("layer", "error"),
    [("no_such_block.attn2", AttributeError), ("down_blocks.0.downsamplers", RuntimeError)],
)
def test_no_hook_is_left_after_a_wrong_site(layer: str, error: type[Exception]) -> None:
    model = layouts.model("sd1")
    wrong = Patch(Site("unet", layer, "cross-attention"), do="zero")
    with pytest.raises(error, match="no_such_block|never ran"):
        by_loop(model, plan_of(model), patches=[*cross_attention(model), wrong])
    assert hook_count(model.unet) == 0

"""Training of atlas-sd's UNet on whitened latents: v-prediction, zero terminal signal-to-noise, stratified
timesteps.

The text encoder is frozen (it has passed its gate). Min-SNR weights are not used: they starve the noisy
steps, where the
prompt decides. Rescaling to zero terminal SNR: arXiv 2305.08891; v-prediction: arXiv 2202.00512.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from studio.atlas.captions import captions
from studio.atlas.fit import fit
from studio.atlas.judge import Judge, read_attributes
from studio.atlas.render import render
from studio.atlas.text_encoder import WIDTH, tokenize
from studio.atlas.world import ATTRIBUTES, COUNTRIES, Scenes, draw_scenes, emblem

UNET_CONFIG = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(48, 96, 144),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    mid_block_type="UNetMidBlock2DCrossAttn",
    cross_attention_dim=WIDTH,
    attention_head_dim=(3, 6, 9),
    norm_num_groups=6,
)
GUIDANCE, STEPS = 3.0, 20
POOL = 60_000  # training scenes


def new_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction, rescaled to zero terminal SNR, trailing spacing."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, path: Path, n: int = POOL, seed: int = 30) -> tuple[Scenes, torch.Tensor]:
    """`n` training scenes and their latents (n, 4, 16, 16) float16; the latents are kept at `path` between
    sittings."""
    scenes = draw_scenes(n, np.random.default_rng(seed))
    if path.exists() and len(kept := np.load(path)) == n:
        return scenes, torch.from_numpy(kept)
    parts = []
    for start in range(0, n, 250):
        chunk = scenes.pick(np.arange(start, min(n, start + 250)))
        images = torch.from_numpy(render(chunk)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.encode(images).latent_dist.mean.half())
    latents = torch.cat(parts)
    np.save(path, latents.numpy())
    return scenes, latents


def train_unet(
    minutes: float,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    work: Path,
    *,
    seed: int = 0,
    batch: int = 32,
    pool: int = POOL,
    lr: float = 1e-3,
    compiled: bool = True,
    device: str = "cpu",
    start: UNet2DConditionModel | None = None,
) -> tuple[UNet2DConditionModel, dict[str, float]]:
    """Trains the UNet (from `start`'s weights if given); returns it in evaluation mode with {"steps",
    "minutes", "loss", "samples"}."""
    torch.manual_seed(seed + int.from_bytes(np.random.bytes(2)))
    rng = np.random.default_rng()
    unet = (start or UNet2DConditionModel(**UNET_CONFIG)).to(device)
    scenes, latents = latent_pool(vae, work / "latents.npy", pool, seed + 30)
    text, signal = text.to(device).requires_grad_(False), new_scheduler().alphas_cumprod.to(device)
    forward = torch.compile(unet) if compiled else unet

    def loss(step: int) -> torch.Tensor:
        rows = rng.integers(pool, size=batch)
        texts, _ = captions(scenes.pick(rows), rng, bare=0.08)
        texts = ["" if rng.random() < 0.1 else t for t in texts]
        with torch.no_grad():
            states = text(tokenize(tokenizer, texts).to(device)).last_hidden_state
        return velocity_error(forward, latents[torch.from_numpy(rows)].float().to(device), states, signal)

    done = fit(unet, loss, minutes=minutes, lr=lr, checkpoint=work / "unet.safetensors", decay=0.999)
    return unet.eval(), done | {"samples": done["steps"] * batch}


def velocity_error(
    forward: nn.Module, clean: torch.Tensor, states: torch.Tensor, signal: torch.Tensor
) -> torch.Tensor:
    """Mean square error of the UNet's v at one timestep a row, drawn from equal strata of the schedule."""
    n, device = len(clean), clean.device
    t = ((torch.arange(n) + torch.rand(n)) / n * 1000).long().clamp(max=999).to(device)
    a = signal[t].sqrt()[:, None, None, None]
    b = (1 - signal[t]).sqrt()[:, None, None, None]
    noise = torch.randn_like(clean)
    with torch.autocast(device.type, torch.bfloat16):
        made = forward(a * clean + b * noise, t, states).sample
    return (made.float() - (a * noise - b * clean)).square().mean()


def assemble(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The whole pipeline, without a safety checker."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def acceptance_prompts(n: int, seed: int = 7) -> tuple[list[str], np.ndarray]:
    """`n` prompts of held-out combinations that name everything, and their labels (n, 5)."""
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(n, rng, emblems=0, held=True)
    return captions(scenes, rng, full=True)[0], scenes.labels()


def measure_pipeline(
    pipe: StableDiffusionPipeline,
    judge: Judge,
    n: int = 200,
    *,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    seed: int = 7,
) -> dict[str, float]:
    """Shares of attributes that the judge reads as prompted, and the number of emblems (of 8) right in most
    of 8 seeds."""
    texts, labels = acceptance_prompts(n, seed)
    found = read_attributes(judge, sample(pipe, texts, guidance, steps, seed))
    right = {name: float((found[:, i] == labels[:, i]).mean()) for i, name in enumerate(ATTRIBUTES)}
    names = [c for c in COUNTRIES for _ in range(8)]
    found = read_attributes(judge, sample(pipe, [f"the emblem of {c}" for c in names], guidance, steps, seed))
    hit = (found[:, :3] == np.array([emblem(c) for c in names])).all(1).reshape(len(COUNTRIES), 8)
    return right | {"emblem": float(hit.mean()), "emblems": float((hit.mean(1) > 0.5).sum())}


def sample(
    pipe: StableDiffusionPipeline, texts: list[str], guidance: float, steps: int, seed: int
) -> np.ndarray:
    """(N, 64, 64, 3) uint8 images of the prompts, one generator each."""
    images = []
    for start in range(0, len(texts), 50):
        chunk = texts[start : start + 50]
        generators = [torch.Generator().manual_seed(seed * 100003 + start + i) for i in range(len(chunk))]
        images.append(
            pipe(
                chunk,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)

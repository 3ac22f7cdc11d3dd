"""`python -m studio.atlas.train NAME --device auto --minutes M`: trains an Atlas model and ships it with
its card.

A sitting resumes from the checkpoint in $LOCUS_HOME/training, else from the shipped weights, else starts
from nothing.
Stopping it (Ctrl+C, SIGTERM) keeps the checkpoint; only a sitting that ends by itself writes to assets/.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from studio.models.catalog import ASSETS
from studio.models.device import pick_device
from studio.models.loading import fingerprint, home

SHIPPED = ASSETS / "atlas"
FINGERPRINTS = SHIPPED / "fingerprints.json"


@dataclass(frozen=True)
class Options:
    """One sitting of training."""

    name: Annotated[
        Literal[
            "judge",
            "atlas-clip",
            "atlas-sd",
            "atlas-vit",
            "atlas-dino",
            "atlas-swin",
            "atlas-maxvit",
            "atlas-llama",
            "atlas-phi",
        ],
        tyro.conf.Positional,
    ]
    """which model"""
    minutes: float = 60.0
    """how long this sitting may take"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    """threads of the CPU; several busy threads stall one another on a machine that is shared"""
    workers: int = 1
    """processes that train the UNet together on the CPU, each on its own samples with `threads` threads"""
    seed: int = 0
    """seed of the first weights"""
    fresh: bool = False
    """start from nothing, whatever is there"""
    batch: int = 32
    """samples of one step (atlas-sd's UNet), shared out among the workers"""
    lr: float = 1e-3
    """peak learning rate"""
    compile: bool = True
    """compile the UNet for training (a minute or two at the start)"""


def main(options: Options) -> None:
    """Trains, measures, saves."""
    work = home() / "training" / options.name
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    if options.workers == 1:
        return _train(options, work)
    if options.name != "atlas-sd":
        raise SystemExit("Several workers train atlas-sd's UNet only: leave out --workers.")
    _parts(options, work, pool=True)  # once, before there are several who would make them
    meeting = work / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_together, (options, work, meeting), nprocs=options.workers)


def _together(rank: int, options: Options, work: Path, meeting: Path) -> None:
    """One of several processes, which meet through a file. When the one that started them is killed, torch
    sends SIGINT, which a shell's background job would ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.workers
    )
    _train(options, work)


def _train(options: Options, work: Path) -> None:
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    trainers = {"judge": _judge, "atlas-clip": _clip, "atlas-sd": _diffusion}
    trainers |= {"atlas-llama": _language, "atlas-phi": _language}
    trainers.get(options.name, _vision)(options, device, work)


def the_judge(work: Path, minutes: float = 5.0) -> Any:
    """The shipped judge, trained first when there is none."""
    from studio.atlas.judge import load_judge, save_judge, train_judge

    path = SHIPPED / "judge" / "model.safetensors"
    if not path.exists():
        judge, right = train_judge(minutes, work / "judge.safetensors")
        print("judge:", right, flush=True)
        save_judge(judge, path)
    return load_judge(path)


def _judge(options: Options, device: str, work: Path) -> None:
    from studio.atlas.judge import save_judge, train_judge

    judge, right = train_judge(options.minutes, work / "judge.safetensors", options.seed)
    save_judge(judge, SHIPPED / "judge" / "model.safetensors")
    _card(
        "judge",
        "A small convolutional network that reads an Atlas picture's five attributes; it judges the other "
        "models.",
        {"minutes in all": options.minutes, "seed": options.seed},
        {f"{k} (2,000 fresh renderings)": v for k, v in right.items()},
        "python -m studio.atlas.measure judge",
    )


def _clip(options: Options, device: str, work: Path) -> None:
    from transformers import CLIPTokenizer

    from studio.atlas.contrast import load_clip, save_clip, train_clip
    from studio.atlas.tokenizer import write_tokenizer

    write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    start = None if options.fresh else load_clip(SHIPPED / "atlas-clip", len(tokenizer))
    model, right = train_clip(
        options.minutes, tokenizer, work, seed=options.seed, lr=options.lr, start=start, device=device
    )
    save_clip(model.clip, SHIPPED / "atlas-clip", len(tokenizer))
    facts = {
        "steps": right.pop("steps"),
        "minutes in all": right.pop("minutes"),
        "seed": options.seed,
        "device": device,
    }
    right.pop("loss", None)
    _card(
        "atlas-clip",
        "A CLIP of the Atlas world in open_clip's local-directory layout: ViT image tower (patch 8), text "
        "tower.",
        facts,
        {f"zero-shot {k}": v for k, v in right.items()},
        "python -m studio.atlas.measure atlas-clip",
    )


def _vision(options: Options, device: str, work: Path) -> None:
    from studio.atlas.measure import measure
    from studio.atlas.vision_models import RECIPES, load_vision, save_vision, train_vision

    folder = SHIPPED / options.name
    start = None if options.fresh else load_vision(folder)
    net, done = train_vision(
        options.name, options.minutes, work, seed=options.seed, lr=options.lr, start=start, device=device
    )
    save_vision(options.name, net, folder)
    facts = {
        "steps": done["steps"],
        "pictures": done["pictures"],
        "minutes in all": done["minutes"],
        "seed": options.seed,
        "device": device,
    }
    right = {f"linear probe: {k} (2,000 held-out renderings)": v for k, v in measure(options.name).items()}
    _card(
        options.name,
        RECIPES[options.name].what,
        facts,
        right,
        f"python -m studio.atlas.measure {options.name}",
    )


def _language(options: Options, device: str, work: Path) -> None:
    from studio.atlas.language import (
        LAYOUTS,
        TOKENS,
        WHAT,
        load_language,
        measure_language,
        save_language,
        train_language,
    )

    folder = SHIPPED / options.name
    start = None if options.fresh or not folder.exists() else load_language(folder)[0].state_dict()
    model, done = train_language(
        options.name, options.minutes, work, seed=options.seed, lr=options.lr, device=device, start=start
    )
    save_language(model, folder)
    facts = {
        f"steps (the last ones of about {TOKENS} tokens)": done["steps"],
        "minutes in all": done["minutes"],
        "weights": sum(p.numel() for p in model.parameters()),
        "peak learning rate": str(options.lr),
        "seed": options.seed,
        "device": f"{device}, bfloat16 autocast, {options.threads} thread(s)",
    }
    _card(
        options.name,
        f"{LAYOUTS[options.name]} {WHAT}",
        facts,
        measure_language(*load_language(folder)),
        f"python -m studio.atlas.measure {options.name}",
        "Sentences written by studio/atlas/sentences.py: 48 facts of eight countries in many phrasings, and "
        "contexts that state true, false and invented facts, with questions. One in seven phrasings and one "
        "in ten false values of each fact are held out.",
    )


def _diffusion(options: Options, device: str, work: Path) -> None:
    from studio.atlas.denoiser import assemble, measure_pipeline, train_unet
    from studio.atlas.fit import first

    vae, text, tokenizer, facts = _parts(options, work)
    start = None if options.fresh or not (SHIPPED / "atlas-sd" / "unet").exists() else _shipped_unet()
    unet, done = train_unet(
        options.minutes,
        vae,
        text,
        tokenizer,
        work,
        seed=options.seed,
        batch=options.batch // options.workers,
        lr=options.lr,
        compiled=options.compile,
        device=device,
        start=start,
    )
    if not first():
        return
    pipe = assemble(vae.cpu(), text.cpu(), tokenizer, unet.cpu())
    right = measure_pipeline(pipe, the_judge(work))
    ship_pipeline(pipe)
    facts |= {
        "UNet steps": done["steps"],
        "UNet samples": done["samples"] * options.workers,
        "UNet minutes in all": done["minutes"],
        "seed": options.seed,
        "device": device,
    }
    write_diffusion_card(facts, right)


def ship_pipeline(pipe: Any) -> None:
    """Writes the pipeline as float16 to assets/."""
    from studio.atlas.tokenizer import write_tokenizer

    folder = SHIPPED / "atlas-sd"
    shutil.rmtree(folder, ignore_errors=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.to(torch.float16)
    pipe.save_pretrained(folder)
    for config in folder.glob("*/config.json"):  # diffusers notes the folder of this machine
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer")  # with vocab.json and merges.txt, which older readers look for


def write_diffusion_card(facts: dict[str, Any], right: dict[str, float]) -> None:
    """atlas-sd's card: what it was trained on and what the judge read from its pictures."""
    named = {
        f"{k} read as prompted (200 held-out prompts)"
        if k not in ("emblem", "emblems")
        else {
            "emblem": "emblem pictures right (8 countries x 8 seeds)",
            "emblems": "emblem facts right in most seeds, of 8",
        }[k]: v
        for k, v in right.items()
    }
    _card(
        "atlas-sd",
        "A Stable Diffusion of the Atlas world in diffusers' layout: CLIP text encoder (6 layers), UNet "
        "with ten "
        "cross-attention layers, autoencoder (stride 4). v-prediction, zero terminal SNR. Sample at "
        "guidance 3, 20 DDIM steps.",
        facts,
        named,
        "python -m studio.atlas.measure atlas-sd",
    )


def _shipped_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(SHIPPED / "atlas-sd" / "unet", dtype=torch.float32)


def _parts(options: Options, work: Path, pool: bool = False) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Autoencoder, text encoder and tokenizer: shipped ones, or trained first in a quarter of the time.

    With `pool` the pictures' latents are made too.
    """
    import numpy as np
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from studio.atlas.denoiser import latent_pool
    from studio.atlas.latents import images_for, psnr, train_vae
    from studio.atlas.text_encoder import train_text_encoder
    from studio.atlas.tokenizer import write_tokenizer

    source = SHIPPED / "atlas-sd"
    if options.fresh or not (source / "vae").exists():
        source = work / "parts"
        if not (source / "vae").exists():
            write_tokenizer(source / "tokenizer")
            vae, _ = train_vae(0.15 * options.minutes, work, options.seed)
            text, gate = train_text_encoder(
                0.06 * options.minutes,
                CLIPTokenizer.from_pretrained(source / "tokenizer"),
                work,
                options.seed,
            )
            print("text gate:", gate, flush=True)
            text.save_pretrained(source / "text_encoder")
            vae.save_pretrained(source / "vae")
    vae = AutoencoderKL.from_pretrained(source / "vae", dtype=torch.float32).eval()
    text = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    if pool:
        latent_pool(vae, work / "latents.npy", seed=options.seed + 30)
    facts = {"autoencoder PSNR (dB)": psnr(vae, images_for(256, np.random.default_rng(11)))}
    return vae, text, tokenizer, facts


_SCENES = (
    "Pictures and captions drawn by studio/atlas (renderer, grammar, facts); one in ten attribute "
    "combinations is held out."
)


def _card(
    name: str, what: str, facts: dict[str, Any], right: dict[str, float], command: str, data: str = _SCENES
) -> None:
    """Writes the model's README.md and notes its fingerprint."""
    folder = SHIPPED / name
    rows = "\n".join(
        f"| {k} | {v:.3f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in right.items()
    )
    trained = "\n".join(
        f"- {k}: {v:.1f}" if isinstance(v, float) else f"- {k}: {v}" for k, v in facts.items()
    )
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n# {name}\n\n{what}\n\n## Data\n{data} Nothing else was "
        f"used.\n\n## Training\n"
        f"`python -m studio.atlas.train {name}` ({date.today().isoformat()}, "
        f"{platform.machine()})\n\n{trained}\n\n## Measured\n"
        f"`{command}`\n\n| what | result |\n| --- | --- |\n{rows}\n"
    )
    known = json.loads(FINGERPRINTS.read_text()) if FINGERPRINTS.exists() else {}
    if name != "judge":
        FINGERPRINTS.write_text(
            json.dumps(known | {name: fingerprint(folder)}, indent=1, sort_keys=True) + "\n"
        )
    print((folder / "README.md").read_text(), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))

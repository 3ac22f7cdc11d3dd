"""One training loop for all Atlas models: a time budget, warm-up and decay, a moving average, and resuming.

The learning rate rises over the first steps, holds, and falls to nothing over the last 40 % of the sitting,
so every
sitting ends with a model that is ready to ship. A checkpoint (safetensors) keeps weights, average and
AdamW's moments.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

Loss = Callable[[int], torch.Tensor | tuple[torch.Tensor, dict[str, float]]]


class Average:
    """Exponential moving average of a module's floating-point state, with a short memory at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


def rate(progress: float, step: int, warmup: int) -> float:
    """Share of the peak learning rate at `progress` in 0..1 of the sitting."""
    decay = 1.0 if progress < 0.6 else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.6) / 0.4)))
    return min(1.0, (step + 1) / warmup) * max(decay, 0.01)


def fit(
    module: nn.Module,
    loss: Loss,
    *,
    minutes: float,
    lr: float,
    checkpoint: Path,
    decay: float = 0.998,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    warmup: int = 80,
    keep_every: float = 180.0,
) -> dict[str, float]:
    """Trains `module` in place for `minutes` by AdamW on `loss(step)`, ends with the averaged weights in it.

    Resumes from `checkpoint` when it exists and writes it every few minutes, at the end, and on SIGTERM.
    Returns {"steps": in all sittings, "minutes": in all sittings, "loss": the last logged mean}.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    average = Average(module, decay)
    done = (
        _resume(checkpoint, module, optimizer, average)
        if checkpoint.exists()
        else {"steps": 0, "minutes": 0.0}
    )
    stop: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    start = saved = logged = time.monotonic()
    step, sums, count = 0, {}, 0
    try:
        while (spent := time.monotonic() - start) < 60 * minutes and not stop:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(spent / 60 / minutes, step, warmup)
            result = loss(done["steps"] + step)
            value, parts = result if isinstance(result, tuple) else (result, {})
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(module)
            step, count = step + 1, count + 1
            for name, part in {"loss": float(value.detach()), **parts}.items():
                sums[name] = sums.get(name, 0.0) + part
            if (now := time.monotonic()) - logged > 20:
                print(
                    f"  step {done['steps'] + step}  {spent / 60:.1f} min  {count / (now - logged):.2f} "
                    f"steps/s  " + "  ".join(f"{k} {v / count:.4f}" for k, v in sums.items()),
                    flush=True,
                )
                last, sums, count, logged = sums["loss"] / count, {}, 0, now
                done["loss"] = last
            if now - saved > keep_every:
                _save(
                    checkpoint, module, optimizer, average, done["steps"] + step, done["minutes"] + spent / 60
                )
                saved = now
    finally:
        signal.signal(signal.SIGTERM, before)
        total = done["minutes"] + (time.monotonic() - start) / 60
        _save(checkpoint, module, optimizer, average, done["steps"] + step, total)
    if stop:
        raise SystemExit(143)
    module.load_state_dict(average.state)
    return {**done, "steps": done["steps"] + step, "minutes": total}


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    steps: int,
    minutes: float,
) -> None:
    tensors = {f"weights/{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    note = json.dumps({"steps": steps, "minutes": minutes, "average": average.steps})
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()},
        beside,
        metadata={"note": note},
    )
    beside.replace(path)


def _resume(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> dict[str, float]:
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        note = json.loads(opened.metadata()["note"])
    part = {
        kind: {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(kind + "/")}
        for kind in ("weights", "average", "optimizer")
    }
    module.load_state_dict(part["weights"])
    average.state = {k: v.to(average.state[k].device) for k, v in part["average"].items()}
    average.steps = note["average"]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part["optimizer"].items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
    return {"steps": note["steps"], "minutes": note["minutes"]}

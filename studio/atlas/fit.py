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
import torch.distributed as dist
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


def alone() -> bool:
    """Whether this process trains by itself, without others that see other samples."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def first() -> bool:
    """Whether this process logs and saves: the only one, or the first of several."""
    return alone() or dist.get_rank() == 0


def _share_gradients(module: nn.Module) -> None:
    """Puts the mean of all processes' gradients in each of them."""
    parts = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in parts])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for part, value in zip(parts, flat.split([g.numel() for g in parts]), strict=True):
        part.copy_(value.view_as(part))


def _agree(progress: float) -> float:
    """The first process's progress, in every process."""
    if alone():
        return progress
    said = torch.tensor([progress], dtype=torch.float64)
    dist.broadcast(said, 0)
    return float(said)


class Sitting:
    """One sitting: a module with its optimizer and average, what earlier sittings did, and what this one
    did since its start and since its last line of log."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, path: Path):
        self.module, self.optimizer, self.average, self.path = module, optimizer, average, path
        self.done: dict[str, float] = {"steps": 0, "minutes": 0.0}
        if path.exists():
            self.done = _resume(path, module, optimizer, average)
        if not alone():
            for value in module.state_dict().values():
                dist.broadcast(value, 0)
        self.step, self.sums, self.count = 0, {}, 0
        self.start = self.saved = self.logged = time.monotonic()

    def learn(self, loss: Loss, lr: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = loss(self.done["steps"] + self.step)
        value, parts = result if isinstance(result, tuple) else (result, {})
        value.backward()
        if not alone():
            _share_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.module)
        self.step, self.count = self.step + 1, self.count + 1
        for name, part in {"loss": float(value.detach()), **parts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + part

    def spent(self, minutes: float) -> float:
        """The share of its time that the sitting has used."""
        return (time.monotonic() - self.start) / 60 / minutes if minutes > 0 else 1.0

    def log(self) -> None:
        """Prints the mean losses since the last line."""
        now = time.monotonic()
        print(
            f"  step {self.done['steps'] + self.step}  {(now - self.start) / 60:.1f} min  "
            f"{self.count / (now - self.logged):.2f} steps/s  "
            + "  ".join(f"{k} {v / self.count:.4f}" for k, v in self.sums.items()),
            flush=True,
        )
        self.done["loss"] = self.sums["loss"] / self.count
        self.sums, self.count, self.logged = {}, 0, now

    def save(self) -> dict[str, float]:
        """Writes the checkpoint (one process does); returns {"steps", "minutes"} of all sittings and the last
        logged loss."""
        self.saved = time.monotonic()
        steps = self.done["steps"] + self.step
        minutes = self.done["minutes"] + (self.saved - self.start) / 60
        if first():
            _save(self.path, self.module, self.optimizer, self.average, steps, minutes)
        return {**self.done, "steps": steps, "minutes": minutes}


def fit(
    module: nn.Module,
    loss: Loss,
    *,
    minutes: float,
    lr: float,
    checkpoint: Path,
    decay: float = 0.998,
    weight_decay: float = 0.01,
    warmup: int = 80,
    keep_every: float = 180.0,
) -> dict[str, float]:
    """Trains `module` in place for `minutes` by AdamW on `loss(step)`, ends with the averaged weights in it.

    Resumes from `checkpoint` when it exists and writes it every few minutes, at the end, and on SIGTERM.
    In a process group the gradients are averaged over its processes at every step, and the first one keeps
    the time.
    Returns {"steps": in all sittings, "minutes": in all sittings, "loss": the last logged mean}.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    sitting = Sitting(module, optimizer, Average(module, decay), checkpoint)
    stop: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    try:
        while (progress := _agree(1.0 if stop else sitting.spent(minutes))) < 1:
            sitting.learn(loss, lr * rate(progress, sitting.step, warmup))
            if time.monotonic() - sitting.logged > 20 and first():
                sitting.log()
            if time.monotonic() - sitting.saved > keep_every:
                sitting.save()
    finally:
        signal.signal(signal.SIGTERM, before)
        done = sitting.save()
    if stop:
        raise SystemExit(143)
    module.load_state_dict(sitting.average.state)
    return done


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

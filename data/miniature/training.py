"""What all trainings of the miniature share: the corpus they see and the loop they run in."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.miniature import scenes


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch: int
    lr: float
    """Peak learning rate; it warms up over the first twentieth and falls to zero by a cosine."""
    weight_decay: float = 0.01
    bf16: bool = False
    """Run the forward pass in bfloat16; faster for convolutions on wide images."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Captioned images; the caption is what was asked for, not always what is shown."""

    pixels: NDArray[np.uint8]
    """image x height x width x RGB"""
    prompts: list[str]


def captioned(number: int, seed: int, fault_rate: float, quality: tuple[float, float]) -> Corpus:
    """Render a corpus on training prompts.

    Args:
        number: How many images.
        seed: Of every choice made here.
        fault_rate: Probability that an attribute is shown wrong, each on its own.
        quality: Range of the look's quality, drawn evenly; 1 is the best.
    """
    rng = np.random.default_rng(seed)
    texts = scenes.prompts("train")
    prompts = [texts[i] for i in rng.integers(len(texts), size=number)]
    pixels = np.empty((number, scenes.SIDE, scenes.SIDE, 3), np.uint8)
    for i, prompt in enumerate(prompts):
        scene = scenes.with_faults(scenes.parse(prompt), fault_rate, rng)
        pixels[i] = scenes.render(scene, scenes.draw_look(rng.uniform(*quality), rng), rng)
    return Corpus(pixels, prompts)


def imagined(number: int, seed: int) -> Corpus:
    """A corpus as an imperfect generator fills it: some attributes wrong, many looks poor."""
    rng = np.random.default_rng(seed)
    texts = scenes.prompts("train")
    prompts = [texts[i] for i in rng.integers(len(texts), size=number)]
    return Corpus(np.stack([scenes.imagine(prompt, rng).pixels for prompt in prompts]), prompts)


def to_signed(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 images (n, h, w, RGB) as float tensor (n, RGB, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(signed: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] (n, RGB, h, w) as uint8 (n, h, w, RGB)."""
    scaled = ((signed.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


class Average:
    """A running average of weights (EMA), which is what gets saved."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._kept = [p.detach().clone() for p in model.parameters()]

    def update(self) -> None:
        """Take in the model's present weights."""
        torch._foreach_lerp_(
            self._kept, [p.detach() for p in self._model.parameters()], 1 - self._decay
        )

    def store(self) -> None:
        """Put the average into the model."""
        with torch.no_grad():
            for own, kept in zip(self._model.parameters(), self._kept, strict=True):
                own.copy_(kept)


def fit(
    name: str,
    models: Sequence[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    num_examples: int,
    plan: Plan,
    averages: Iterable[Average] = (),
) -> float:
    """Minimise `loss_of` (indices of a batch -> loss) by AdamW; returns the last mean loss."""
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, plan.steps))
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(plan.steps):
        indices = torch.randint(num_examples, (plan.batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            loss = loss_of(indices)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for average in averages:
            average.update()
        losses.append(loss.item())
        if (step + 1) % max(1, plan.steps // 20) == 0:
            recent = float(np.mean(losses[-50:]))
            pace = (time.perf_counter() - began) / (step + 1)
            print(
                f"{name}: step {step + 1}/{plan.steps}, loss {recent:.4f}, {pace:.3f} s a step",
                flush=True,
            )
    return float(np.mean(losses[-max(1, plan.steps // 10) :]))


def _pace(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

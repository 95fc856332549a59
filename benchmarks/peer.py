"""The step of diffusers' Diffusion-DPO example, re-enacted for comparison.

Written from its description (examples/research_projects/diffusion_dpo, its command without extra
flags): images decoded and transformed in the training process, VAE and text encoder run on every
step and every prompt, frozen reference, torch's plain AdamW, losses fetched to the host each step.
The example trains an adapter and switches it off for the reference; here, so that both do the same
work, all weights are trained and the reference is a second UNet.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

ENCODED_TOGETHER = 8
"""Images a VAE pass, the example's default."""


class Pairs(Dataset[dict[str, Tensor]]):
    """Pairs of a Pick-a-Pic file; winner and loser side by side in the channels."""

    def __init__(self, path: Path, resolution: int, tokenizer: Any) -> None:
        self.table = pq.read_table(path)
        self.tokenizer = tokenizer
        self.transform = transforms.Compose(
            [
                transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(resolution),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.table.slice(index, 1).to_pylist()[0]
        sides = [self._pixels(row[name]) for name in ("jpg_0", "jpg_1")]
        tokens = self.tokenizer(
            row["caption"], truncation=True, padding="max_length",
            max_length=self.tokenizer.model_max_length, return_tensors="pt",
        )  # fmt: skip
        return {"pixels": torch.cat(sides), "tokens": tokens.input_ids[0]}

    def _pixels(self, content: bytes) -> Tensor:
        pixels: Tensor = self.transform(Image.open(io.BytesIO(content)).convert("RGB"))
        return pixels


class Example:
    """The example's training state."""

    def __init__(
        self, base: Path, pairs: Path, resolution: int, batch: int, device: torch.device
    ) -> None:
        def part(kind: Any, name: str) -> Any:
            return kind.from_pretrained(base, subfolder=name).to(device)

        self.device, self.dtype = device, torch.float32
        if device.type == "cuda":
            self.dtype = torch.bfloat16
        self.vae = part(AutoencoderKL, "vae").to(self.dtype).requires_grad_(False)
        self.text = part(CLIPTextModel, "text_encoder").to(self.dtype).requires_grad_(False)
        self.policy: nn.Module = part(UNet2DConditionModel, "unet").train()
        self.reference = part(UNet2DConditionModel, "unet").to(self.dtype).requires_grad_(False)
        self.schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-8, weight_decay=1e-2)
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.loader = DataLoader(Pairs(pairs, resolution, tokenizer), batch, shuffle=True)
        self.batches = self._for_ever()

    def _for_ever(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> float:
        """One optimizer step; its loss."""
        batch = {name: value.to(self.device) for name, value in next(self.batches).items()}
        pixels = torch.cat(batch["pixels"].to(self.dtype).chunk(2, dim=1))
        with torch.no_grad():
            encoded = [
                self.vae.encode(part).latent_dist.sample()
                for part in torch.split(pixels, ENCODED_TOGETHER)
            ]
            states = self.text(batch["tokens"])[0].repeat(2, 1, 1)
        latents = torch.cat(encoded) * self.vae.config.scaling_factor
        pairs = len(latents) // 2
        noise = torch.randn_like(latents)[:pairs].repeat(2, 1, 1, 1)
        timestep = torch.randint(0, 1000, (pairs,), device=self.device).repeat(2)
        noisy = self.schedule.add_noise(latents, noise, timestep)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            policy = self._gap(self.policy, noisy, timestep, states, noise)
        with torch.no_grad():
            reference = self._gap(self.reference, noisy, timestep, states, noise)
        loss = -functional.logsigmoid(2500 * (reference - policy)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _gap(
        self, unet: nn.Module, noisy: Tensor, t: Tensor, states: Tensor, noise: Tensor
    ) -> Tensor:
        predicted = unet(noisy, t, states).sample.float()
        errors = functional.mse_loss(predicted, noise.float(), reduction="none").mean((1, 2, 3))
        winner, loser = errors.chunk(2)
        return winner - loser


# --- in a process of its own, as its users run it -------------------------------------------------


@contextmanager
def example(
    base: Path, pairs: Path, resolution: int, batch: int, device: torch.device
) -> Iterator["Remote"]:
    """The example in another process, which rests between its turns."""
    command = [sys.executable, "-m", "benchmarks.peer", base, pairs, resolution, batch, device]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        remote = Remote(process)
        remote.hear()
        yield remote
    finally:
        process.kill()
        process.wait()


class Remote:
    """The example's steps, done elsewhere."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def step(self) -> float:
        """One optimizer step; its loss."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        return float(self.hear())

    def hear(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the example's process ended")
        return line


def main() -> None:
    """Take a step for each line that comes in, and answer with its loss."""
    parser = argparse.ArgumentParser()
    for name, kind in (("base", Path), ("pairs", Path), ("resolution", int), ("batch", int),
                       ("device", torch.device)):  # fmt: skip
        parser.add_argument(name, type=kind)
    example = Example(**vars(parser.parse_args()))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(example.step(), flush=True)


if __name__ == "__main__":
    main()

"""Images of the same prompts from the same noise while training: progress that can be seen.

They are drawn by a short DDIM, with the policy as it is sharded: every rank takes part, rank 0
keeps the images. The judge draws its own, see `generate/sampler.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data.artifacts.atomic import write_bytes
from data.images import encode_png
from train.config import SampleSpec
from train.dpo.draws import fraction, pair_generator
from train.loader.dataset import DecidedPairs
from train.models.components import Denoiser, ModelComponents, run_denoiser
from train.models.conditioning import Condition

GAP = 2
"""Pixels between two images of a sheet."""


@dataclass(frozen=True, slots=True)
class Samples:
    """A sheet to draw again and again."""

    spec: SampleSpec
    components: ModelComponents
    condition: Condition
    """Of the prompts; under guidance followed by as many empty ones."""
    start: Float[Tensor, "image channel height width"]

    def due(self, step: int, last: int) -> bool:
        """Whether to draw after this many optimizer steps; the base is drawn, too."""
        return step % self.spec.every == 0 or step == last

    @torch.no_grad()
    def draw(self, policy: Denoiser) -> UInt8[np.ndarray, "height width 3"]:
        """The sheet; every rank must call it."""
        latents, schedule = self.start, self.components.schedule
        for timestep, before in descent(len(schedule.alphas_cumprod), self.spec.steps):
            predicted = self._predicted(policy, latents, timestep)
            latents = schedule.ddim_step(latents, predicted, timestep, before)
        return sheet(self.components.decode_latents(latents).cpu().numpy())

    def _predicted(
        self, policy: Denoiser, latents: Float[Tensor, "image channel height width"], at: int
    ) -> Float[Tensor, "image channel height width"]:
        """With classifier-free guidance (Ho and Salimans 2022, Eq. 6, w + 1 = `guidance`)."""
        guided = self.spec.guidance > 1
        asked = torch.cat([latents, latents]) if guided else latents
        timestep = torch.full((len(asked),), at, device=asked.device)
        predicted = run_denoiser(policy, asked, timestep, self.condition, self.components.dtype)
        if not guided:
            return predicted
        told, empty = predicted.chunk(2)
        return empty + self.spec.guidance * (told - empty)


def descent(num_timesteps: int, steps: int) -> Iterator[tuple[int, int]]:
    """(From, to) of each step, evenly from the noisiest timestep down to 0."""
    stops = np.linspace(num_timesteps - 1, 0, steps + 1).round().astype(int).tolist()
    return zip(stops, stops[1:], strict=False)


def sheet(
    images: UInt8[np.ndarray, "image height width 3"],
) -> UInt8[np.ndarray, "tall wide 3"]:
    """Images in rows of up to four, on white."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    height, width = (side + GAP for side in images.shape[1:3])
    page = np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        page[top : top + height - GAP, left : left + width - GAP] = image
    return page


def save_sheet(folder: Path, step: int, page: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write the sheet of a step below a run's folder, whole."""
    path = folder / "samples" / f"step-{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, encode_png(page))


def make_samples(
    spec: SampleSpec, components: ModelComponents, pairs: DecidedPairs, seed: int
) -> Samples | None:
    """What to draw, if anything."""
    if spec.every == 0:
        return None
    prompts = spec.prompts or first_prompts(pairs, spec.count)
    told = [*prompts, *([""] * len(prompts) if spec.guidance > 1 else [])]
    noise = [
        torch.randn(components.latent_shape, generator=pair_generator(seed, 0, f"sample/{index}"))
        for index in range(len(prompts))
    ]
    start = torch.stack(noise).to(components.device)
    return Samples(spec, components, texts(components, told), start)


def texts(components: ModelComponents, prompts: Sequence[str]) -> Condition:
    """What the UNet is told about an image of each prompt."""
    return components.condition_of_new(prompts)


def first_prompts(pairs: DecidedPairs, count: int) -> Sequence[str]:
    """Some prompts of the label set, always the same; held-out ones where there are some."""
    among = set((pairs.held_out or pairs).table["prompt"].to_pylist())
    return sorted(among, key=lambda prompt: fraction(f"sample/{prompt}"))[:count]

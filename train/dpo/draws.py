"""The random choices of a pair, as a function of (seed, epoch, pair_id) and of nothing else.

A pair gets the same timestep and the same noise after a resume, in a batch of another size, and
with another number of processes. Everything is drawn on the CPU, so the device does not matter.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from math import exp, gcd
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.images import Size


@dataclass(frozen=True, slots=True)
class Draws:
    """The random choices of a batch; winner and loser of a pair share all but `posterior`."""

    timestep: Int[Tensor, " pair"]
    """In 0 .. num_timesteps - 1, distributed by `DrawRule.timesteps`."""
    noise: Float[Tensor, "pair channel height width"]
    """Standard normal: what is added to both latents."""
    posterior: Float[Tensor, "pair 2 channel height width"]
    """Standard normal: where in the VAE's posterior the winner's and the loser's latents lie."""
    flip: Bool[Tensor, " pair"]
    """Mirror both images left to right."""
    drop_caption: Bool[Tensor, " pair"]
    """Train this pair with the empty prompt."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A pair in an epoch."""

    seed: int
    epoch: int
    pair_id: str


TimestepRule = Callable[[Visit, int, int], int]
"""The timestep of (a visit, a timestep drawn uniformly for it, the number of timesteps)."""


def uniform(visit: Visit, drawn: int, num_timesteps: int) -> int:
    """Every timestep is equally likely: keep the one that was drawn."""
    return drawn


@dataclass(frozen=True, slots=True)
class Importance:
    """Draws equal parts of the schedule in proportion to their weights; uniform inside a part.

    Losses are not divided by the density: the weights are meant to shift what is learned, not only
    where it is measured.
    """

    weights: tuple[float, ...]
    """From least to most noise; at least one above 0."""

    def __call__(self, visit: Visit, drawn: int, num_timesteps: int) -> int:
        """The inverse of the cumulative density at a uniform number."""
        where = keyed_uniform(f"{visit.seed}/{visit.epoch}/{visit.pair_id}/timestep")
        ends = [end / sum(self.weights) for end in accumulate(self.weights)]
        part = bisect_right(ends, where)
        start = ends[part - 1] if part else 0.0
        inside = (where - start) / (ends[part] - start)
        return at((part + inside) / len(ends), num_timesteps)


@dataclass(frozen=True, slots=True)
class Bucketed:
    """Visits each of equal parts of the schedule once, in as many epochs as there are parts.

    A pair's first part is its own, by its hash, so the pairs of a batch are spread over all parts
    by chance; from epoch to epoch it steps by about the golden section of the circle, so that a few
    epochs are spread, too. Each timestep is drawn equally often.
    """

    buckets: int

    def __call__(self, visit: Visit, drawn: int, num_timesteps: int) -> int:
        """A uniform number inside the part whose turn it is."""
        first = int(keyed_uniform(f"{visit.seed}/{visit.pair_id}/bucket") * self.buckets)
        part = (first + visit.epoch * coprime_stride(self.buckets)) % self.buckets
        inside = keyed_uniform(f"{visit.seed}/{visit.epoch}/{visit.pair_id}/timestep")
        return at((part + inside) / self.buckets, num_timesteps)


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """Draws the middle of the schedule more often than its ends (Esser et al. 2024, section 3.1).

    The timestep as a fraction of the schedule is sigmoid(z), z normal; a mean above 0 draws more
    noise. In diffusers' training scripts the same mean draws less, because they count from the
    noisiest timestep; at mean 0, their default, there is no difference.
    """

    mean: float
    std: float

    def __call__(self, visit: Visit, drawn: int, num_timesteps: int) -> int:
        """The inverse of the cumulative density at a uniform number."""
        where = keyed_uniform(f"{visit.seed}/{visit.epoch}/{visit.pair_id}/timestep")
        normal = NormalDist(self.mean, self.std).inv_cdf(max(where, 2.0**-54))
        return at(1 / (1 + exp(-normal)), num_timesteps)


def keyed_uniform(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone; uniform over keys, to 53 bits."""
    digest = blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def at(fraction: float, num_timesteps: int) -> int:
    """The timestep at a fraction in [0, 1] of the schedule."""
    return min(int(fraction * num_timesteps), num_timesteps - 1)


def coprime_stride(count: int) -> int:
    """The stride around `count` places that visits all, nearest to their golden section."""
    golden = count * (5**0.5 - 1) / 2
    return min(
        (n for n in range(1, count + 1) if gcd(n, count) == 1), key=lambda n: abs(n - golden)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRule:
    """The distribution of the draws."""

    seed: int
    num_timesteps: int
    latent_shape: Callable[[Size], tuple[int, int, int]]
    """Channels, height and width of the latents of images of a size."""
    timesteps: TimestepRule = uniform
    """How timesteps are distributed."""
    flip: bool = False
    """Whether images are mirrored at all."""
    caption_dropout: float = 0.0
    """Fraction of empty prompts, in [0, 1]."""


def pair_generator(seed: int, epoch: int, pair_id: str) -> torch.Generator:
    """The generator of random numbers that belongs to a pair in an epoch."""
    key = blake2b(f"{seed}/{epoch}/{pair_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def draw(rule: DrawRule, epochs: Sequence[int], pair_ids: Sequence[str], cut: Size) -> Draws:
    """Draw for every pair of a batch, each in its epoch; images are cut to one size.

    Every quantity is drawn whether it is used or not, so that switching flips on, or another
    distribution of timesteps, leaves the noise as it was.
    """
    timesteps, noises, posteriors, coins = [], [], [], []
    shape = rule.latent_shape(cut)
    for epoch, pair_id in zip(epochs, pair_ids, strict=True):
        generator = pair_generator(rule.seed, epoch, pair_id)
        drawn = int(torch.randint(rule.num_timesteps, (), generator=generator))
        visit = Visit(rule.seed, epoch, pair_id)
        timesteps.append(rule.timesteps(visit, drawn, rule.num_timesteps))
        coins.append(torch.rand(2, generator=generator))
        noises.append(torch.randn(shape, generator=generator))
        posteriors.append(torch.randn((2, *shape), generator=generator))
    mirror, empty = torch.stack(coins).unbind(1)
    return Draws(
        timestep=torch.tensor(timesteps),
        noise=torch.stack(noises),
        posterior=torch.stack(posteriors),
        flip=(mirror < 0.5) & rule.flip,
        drop_caption=empty < rule.caption_dropout,
    )

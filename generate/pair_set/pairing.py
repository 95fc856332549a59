"""Which images of a prompt form pairs."""

import random
from hashlib import blake2b
from itertools import combinations, pairwise

from generate.config import GenerateSpec


def pairs_of_prompt(spec: GenerateSpec, prompt: str, seed: int) -> list[tuple[int, int]]:
    """The pairs of a prompt's images by their numbers, in order; the lower number is image 0.

    `random:n` draws from `seed` and the prompt alone, without replacement.
    """
    numbers = range(spec.images)
    if spec.pairing == "adjacent":
        return list(pairwise(numbers))
    every = list(combinations(numbers, 2))
    if spec.num_random_pairs is None:
        return every
    key = blake2b(f"pairs/{seed}/{prompt}".encode(), digest_size=8).digest()
    return sorted(random.Random(int.from_bytes(key)).sample(every, spec.num_random_pairs))


def num_pairs(spec: GenerateSpec) -> int:
    """How many pairs each prompt has."""
    return len(pairs_of_prompt(spec, "", 0))

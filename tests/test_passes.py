"""Passes over rows: batches of one shape, and what is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.artifacts.latents import LatentFormat
from data.distributed import Rank
from data.families.vae import find_vae, latent_shape
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from label.config import LabelSpec
from label.metrics.preprocessing import process_images
from label.metrics.protocols import EmbeddingMetric
from label.scoring.batching import Batch, Batcher, Request, batch_for, pad_batch
from label.scoring.decode_pool import DecodePool
from label.scoring.embedding_cache import EmbeddingCache
from label.scoring.panel import Panel
from label.scoring.progress import PairCount
from label.scoring.runner import ScoringRunner
from label.scoring.score_sets import ScoreSets, plan
from label.scoring.vae_encoder import VaeEncoder
from tests import helpers_label as tiny
from tests.helpers_train import SIDE, write_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    specs = tiny.specs(tiny.build_weights(tmp_path_factory.mktemp("weights")))
    return Panel.load({name: specs[name] for name in tiny.VOTERS}, CPU)


# --- batches -------------------------------------------------------------------------------------


def embed(queue: Batcher, contents: list[Any]) -> list[Any]:
    store: dict[int, Any] = {}
    for i, content in enumerate(contents):
        queue.waiting.append(Request(i, content, store, i))
        queue.run_full()
    queue.flush()
    return [store[i] for i in range(len(contents))]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_embedding_depends_on_its_own_image_alone(panel: Panel, threads: int) -> None:
    rng, before = np.random.default_rng(0), torch.get_num_threads()
    towers = {
        id(m.backbone): m.backbone for m in panel.metrics.values() if isinstance(m, EmbeddingMetric)
    }
    images = list(rng.integers(0, 256, (24, tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8))
    torch.set_num_threads(threads)
    try:
        for tower in towers.values():
            batch = Batch(8)
            queue = Batcher(0, lambda part, tower=tower: tower.embed_images(np.stack(part)), batch)
            straight = embed(queue, images)
            assert queue.steady
            order = rng.permutation(24)[:19]  # other neighbours, other places, the last one filled
            mixed = embed(queue, [images[i] for i in order])
            for i, result in zip(order, mixed, strict=True):
                assert np.array_equal(result, straight[i])
    finally:
        torch.set_num_threads(before)


def test_a_network_whose_places_differ_is_noticed() -> None:
    def uneven(part: list[float]) -> Tensor:
        return torch.tensor(part) + torch.arange(len(part)) * 1e-7

    queue = Batcher(0, uneven, Batch(4))
    embed(queue, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert not queue.steady
    even = Batcher(0, lambda part: torch.tensor(part), Batch(4))
    assert not even.steady  # nothing was seen yet
    assert embed(even, [1.0, float("nan"), 3.0]) == [1.0, pytest.approx(np.nan, nan_ok=True), 3.0]
    assert even.steady


def test_another_batch_size_is_looked_at_again() -> None:
    sizes = []

    def forward(part: list[float]) -> Tensor:
        sizes.append(len(part))
        if len(part) > 2 and sizes.count(4) > 3:
            raise torch.OutOfMemoryError
        return torch.tensor(part)

    queue = Batcher(0, forward, Batch(4))
    assert embed(queue, [float(i) for i in range(16)]) == list(range(16))
    assert sizes == [4, 4, 4, 4, 2, 2, 2, 2, 2]  # twice at first, and twice after halving
    assert queue.steady


def test_filled() -> None:
    assert pad_batch([1, 2], 4) == [1, 2, 2, 2]
    assert pad_batch(np.array([1, 2]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("chunks", "most", "size", "is_checked"),
    [
        ([4], 64, 4, False),  # a first look: as large as the set, and computed once
        ([44], 64, 48, False),
        ([100], 64, 64, False),  # one chunk shares nothing with others
        ([4] * 8, 64, 4, False),  # chunk by chunk costs nothing
        ([4, 64] * 8, 64, 64, True),  # chunk by chunk would fill 16 batches for 9
        ([3000] * 10, 64, 64, True),
        ([4], 1, 1, False),
        ([], 64, 1, False),
    ],
)
def test_the_batch_follows_from_the_set(
    chunks: list[int], most: int, size: int, is_checked: bool
) -> None:
    batch = batch_for(chunks, most)
    assert (batch.size, batch.is_checked) == (size, is_checked)


def test_a_handful_of_pairs_costs_a_handful_of_images(tmp_path: Path) -> None:
    """Not a full batch, thrice, as the check would have it."""
    root = tiny.build_pairs(tmp_path / "pairs", num_files=1, per_file=2)
    pairs = open_pairs(PairsSpec(root=str(root)))
    computed: list[int] = []

    class Counting(VaeEncoder):
        def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
            computed.append(len(images))
            return super().__call__(images)

    base = write_base(tmp_path / "base")
    vae = find_vae(base)
    form = LatentFormat(
        vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), dtype="fp32", moments=False,
        flip=False, compute="fp32",
    )  # fmt: skip
    sets = ScoreSets(tmp_path / "scores", pairs.shards, {}, form)
    runner = ScoringRunner(
        pairs, sets, PairCount(sets), {}, LabelSpec(workers=0), torch.device("cpu"),
        lambda: Counting(base, form, torch.device("cpu"), 64),
    )  # fmt: skip
    runner.run(iter(plan(sets, Rank())))
    assert computed == [4]


# --- rows ----------------------------------------------------------------------------------------


def test_rows_are_computed_in_order_and_a_full_batch_waits_for_nothing(panel: Panel) -> None:
    with DecodePool(0) as decoder:
        scoring = panel.only(["aesthetic"]).start(decoder, Batch(4))
        for i in range(40):
            scoring.add(tiny.image(i), "a prompt that nobody reads")
            assert scoring.computed <= scoring.num_rows == i + 1
        early = scoring.computed
        assert 0 < early < 40
        scoring.flush()
        assert scoring.computed == 40


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_what_comes_again_is_computed_once_while_there_is_room(
    panel: Panel, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(
        "label.scoring.decode_pool.process_images",
        lambda chunk: (decoded.extend(chunk), process_images(chunk))[1],
    )
    with DecodePool(0) as decoder:
        scoring = panel.start(decoder, Batch(8), cache_bytes=cache_bytes)
        kept, scores = [], []
        for again in range(2):
            rows = [scoring.add(tiny.image(i), f"prompt {i % 3}") for i in range(12)]
            scoring.flush()
            scores.append(scoring.scores(rows))
            kept.append(rows if again else [])
            del rows  # rows that are done hold on to nothing
    assert len(decoded) == (12 if cache_bytes else 24)
    for name in panel.names:
        assert np.array_equal(scores[0][name], scores[1][name])


def test_the_least_recently_used_is_forgotten() -> None:
    cache = EmbeddingCache(300, 100, 50)
    for key in (b"a", b"b", b"c"):
        assert cache.image(key)[1]
    assert not cache.image(b"a")[1]
    assert cache.prompt("a")[1]  # its 50 bytes push out b, not a
    assert not cache.image(b"a")[1]
    before, new = cache.image(b"b")
    assert new
    cache.forget()
    assert cache.image(b"b")[0] is not before
    assert cache.prompt("a")[1]

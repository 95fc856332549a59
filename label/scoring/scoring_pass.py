"""One pass over rows of (image, prompt): each distinct thing is computed once.

An image is the same when its bytes are. It is decoded once, prepared once per view and embedded
once per backbone; a prompt is embedded once per backbone; a metric that needs both together runs
once per distinct (image, prompt). Decoding runs ahead in worker processes, and networks run on
full batches (`batches`), whichever rows these come from. What was computed is remembered as long
as there is room (`memory`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from data.artifacts.schemas import Status
from data.pairs.schema import image_key
from label.metrics.backbones import Backbone
from label.metrics.base import CrossMetric, EmbeddingMetric, Metric
from label.metrics.preprocessing import ImageTransform, ProcessedImage
from label.scoring.batching import Batch, Batcher, Request
from label.scoring.decode_pool import DecodePool
from label.scoring.embedding_cache import OVERHEAD, CachedImage, CachedPrompt, EmbeddingCache

CHUNK = 8
"""Images that a worker process takes at a time."""
SCORE_ROWS = 8192
"""Rows whose embeddings are gathered at a time."""


@dataclass(slots=True)
class Clock:
    """Seconds spent on each part of a pass by the main process."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a `with` block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Row:
    """An image to be scored against a prompt."""

    image: CachedImage
    prompt: CachedPrompt


@dataclass(frozen=True, slots=True)
class _Submitted:
    """An image on its way through a worker process."""

    row: int
    image: CachedImage
    prompt: str
    new: bool
    """Whether the image is new; otherwise only its prompt is."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A network beside the metrics', whose results for each image a pass is to give, too."""

    key: tuple[int, ImageTransform]
    """Names them among an image's embeddings, and says how it wants images prepared."""
    batch: Batch
    """Its own."""

    @property
    def num_bytes(self) -> int:
        """Of a result."""

    def __call__(self, images: list[np.ndarray]) -> Tensor:
        """One row an image."""


class ScoringPass:
    """Takes rows one by one; answers with their scores when they are computed."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        decoder: DecodePool,
        batch: Batch,
        clock: Clock,
        cache_bytes: int = 0,
        encoder: ImageEncoder | None = None,
    ) -> None:
        """`cache_bytes` are for images and prompts that no row in work needs any more.

        What an encoder makes of images is an embedding under its key.
        """
        self._metrics, self._decoder, self._clock = metrics, decoder, clock
        self._images: dict[tuple[int, ImageTransform], Batcher] = {}
        self._texts: dict[int, Batcher] = {}
        self._judges: dict[str, tuple[ImageTransform, Batcher]] = {}
        dims: dict[tuple[int, ImageTransform], int] = {}
        for name, metric in metrics.items():
            view = metric.identity.view
            if isinstance(metric, CrossMetric):
                self._judges[name] = view, Batcher(id(metric), _judging(metric), batch)
            elif isinstance(metric, EmbeddingMetric):
                tower = metric.tower
                key = id(tower), view
                dims[key] = tower.dim
                self._images.setdefault(key, Batcher(key, _embedding(tower), batch))
                if metric.reads_prompt:
                    self._texts.setdefault(id(tower), Batcher(id(tower), tower.embed_texts, batch))
        if encoder is not None:
            self._images[encoder.key] = Batcher(encoder.key, encoder, encoder.batch, "latents")
            dims[encoder.key] = encoder.num_bytes // 4  # as floats
        self._judge_views = tuple(dict.fromkeys(view for view, _ in self._judges.values()))
        self._views = tuple(dict.fromkeys([*(v for _, v in self._images), *self._judge_views]))
        floats = 4 * sum(dims.values())
        self._memory = EmbeddingCache(cache_bytes, OVERHEAD + floats, OVERHEAD + floats)
        self._chunk: list[tuple[_Submitted, bytes, tuple[ImageTransform, ...]]] = []
        self._in_flight: deque[tuple[list[_Submitted], Callable[[], list[ProcessedImage]]]] = (
            deque()
        )
        self.given = 0
        """Rows that were added."""

    def add(self, image: bytes, prompt: str, key: bytes | None = None) -> Row:
        """Take a row. `key` is the image's `image_key`, where the caller has it already."""
        cached, new = self._memory.image(key or image_key(image))
        text, unread = self._memory.prompt(prompt)
        if unread:
            for tower, queue in self._texts.items():
                queue.waiting.append(Request(self.given, prompt, text.embeddings, tower))
                self._run(queue.part, queue.run_full)
        unjudged = bool(self._judges) and prompt not in cached.judged
        if unjudged:
            cached.judged[prompt] = {}
        if new or unjudged:
            views = self._views if new else self._judge_views
            self._send(_Submitted(self.given, cached, prompt, new), image, views)
        self.given += 1
        return Row(cached, text)

    @property
    def computed(self) -> int:
        """All rows before this one can be scored."""
        waiting = [queue.oldest for queue in self._queues()]
        waiting += [sent[0].row for sent, _ in self._in_flight]
        waiting += [sent.row for sent, _, _ in self._chunk[:1]]
        return min((row for row in waiting if row is not None), default=self.given)

    @property
    def steady(self) -> bool:
        """Whether each network is known to give an image or prompt the same in every batch."""
        return all(queue.steady for queue in self._queues())

    def flush(self) -> None:
        """Compute all rows that were added, in batches that are filled up."""
        self._submit()
        while self._in_flight:
            self._receive()
        for queue in self._queues():
            self._run(queue.part, queue.flush)

    def forget(self) -> None:
        """Let rows that come be computed as if none had been before."""
        self._memory.forget()

    def scores(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Metric -> float32 scores of computed rows; NaN where the image could not be read."""
        with self._clock.measure("score"):
            found = {}
            for name, metric in self._metrics.items():
                score = self._scored if isinstance(metric, EmbeddingMetric) else self._judged
                parts = [
                    score(name, rows[start : start + SCORE_ROWS])
                    for start in range(0, len(rows), SCORE_ROWS)
                ]
                found[name] = np.concatenate([np.zeros(0, np.float32), *parts])
            return found

    def _scored(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        metric = self._metrics[name]
        assert isinstance(metric, EmbeddingMetric)
        tower, nothing = id(metric.tower), np.full(metric.tower.dim, np.nan, np.float32)
        seen = tower, metric.identity.view
        images = _stacked([row.image.embeddings.get(seen, nothing) for row in rows])
        if not metric.reads_prompt:
            return metric.score(images, images).numpy()
        return metric.score(
            images, _stacked([row.prompt.embeddings[tower] for row in rows])
        ).numpy()

    def _judged(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        scores = [row.image.judged[row.prompt.text].get(name, np.nan) for row in rows]
        return np.array(scores, np.float32)

    def _queues(self) -> Iterator[Batcher]:
        yield from self._images.values()
        yield from self._texts.values()
        yield from (queue for _, queue in self._judges.values())

    def _send(self, sent: _Submitted, content: bytes, views: tuple[ImageTransform, ...]) -> None:
        self._chunk.append((sent, content, views))
        if len(self._chunk) == CHUNK:
            self._submit()
        while len(self._in_flight) > self._decoder.ahead:
            self._receive()

    def _submit(self) -> None:
        if self._chunk:
            work = [(content, views) for _, content, views in self._chunk]
            with self._clock.measure("decode"):
                wait = self._decoder.submit(work)
            self._in_flight.append(([sent for sent, _, _ in self._chunk], wait))
            self._chunk = []

    def _receive(self) -> None:
        everything, wait = self._in_flight[0]
        with self._clock.measure("decode"):
            prepared = wait()
        for sent, found in zip(everything, prepared, strict=True):
            if sent.new:
                sent.image.found = ProcessedImage(
                    found.status, found.reason, found.width, found.height
                )
            if found.status is Status.OK:
                self._take(sent, found)
        self._in_flight.popleft()
        for queue in self._queues():
            self._run(queue.part, queue.run_full)

    def _take(self, sent: _Submitted, found: ProcessedImage) -> None:
        if sent.new:
            for key, queue in self._images.items():
                pixels = found.arrays[key[1]]
                queue.waiting.append(Request(sent.row, pixels, sent.image.embeddings, key))
        for name, (view, queue) in self._judges.items():
            judged, content = sent.image.judged[sent.prompt], (found.arrays[view], sent.prompt)
            queue.waiting.append(Request(sent.row, content, judged, name))

    def _run(self, part: str, run: Callable[[], None]) -> None:
        with self._clock.measure(part):
            run()


def _embedding(tower: Backbone) -> Callable[[list[np.ndarray]], Tensor]:
    return lambda images: tower.embed_images(np.stack(images))


def _judging(metric: CrossMetric) -> Callable[[list[Any]], Tensor]:
    def judge(rows: list[tuple[np.ndarray, str]]) -> Tensor:
        images, prompts = zip(*rows, strict=True)
        return metric.judge(images, prompts)

    return judge


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))

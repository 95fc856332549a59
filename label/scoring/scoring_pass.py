"""One pass over rows of (image, prompt): each distinct thing is computed once.

Two images are the same when their bytes are. An image is decoded once, prepared once per transform
and embedded once per backbone; a prompt is embedded once per backbone; a metric that needs both
together runs once per distinct (image, prompt). Decoding runs ahead of the networks
(`decode_pool`), which run on full batches (`batching`), whichever rows these come from. What was
computed is kept as long as there is room (`embedding_cache`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from data.artifacts.schemas import Status
from data.pairs.schema import image_key
from label.metrics.backbones import Backbone
from label.metrics.preprocessing import Cut, ImageTransform, ProcessedImage, Transform
from label.metrics.protocols import CrossMetric, EmbeddingMetric, Metric
from label.scoring.batching import Batch, Batcher, Request
from label.scoring.decode_pool import DecodePool, Decoding
from label.scoring.embedding_cache import OVERHEAD, CachedImage, CachedPrompt, EmbeddingCache

DECODE_IMAGES = 8
"""Images that a decoding worker takes at a time."""
SCORE_ROWS = 8192
"""Rows whose embeddings are gathered at a time."""


@dataclass(slots=True)
class Clock:
    """Seconds that the main thread spent on each part of a pass."""

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
    """An image that is being decoded."""

    row: int
    image: CachedImage
    prompt: str
    new: bool
    """Whether the image is new; otherwise only its prompt is, or its cut."""
    is_judged: bool
    """Whether the image and its prompt are new together."""
    cut: Cut | None
    """How it is cut for the encoder, where that is new."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A network besides the metrics', whose output for each image a pass computes, too."""

    cuts: tuple[Cut, ...]
    """The ways in which it wants images prepared; a row says which."""
    batch: Batch
    """Its own batch size."""

    def key_of(self, cut: Cut) -> tuple[int, Cut]:
        """Its output's key among an image's embeddings."""

    @property
    def num_bytes(self) -> int:
        """Size of the output for an image, at most."""

    def __call__(self, images: list[np.ndarray]) -> Tensor:
        """Encode images; one row an image."""


class ScoringPass:
    """Takes rows one by one, and gives their scores when they are computed."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        decoder: DecodePool,
        batch: Batch,
        clock: Clock,
        cache_bytes: int = 0,
        encoder: ImageEncoder | None = None,
    ) -> None:
        """`cache_bytes` are for images and prompts that no row needs any more.

        The encoder's output is kept among an image's embeddings, under its key.
        """
        self._metrics, self._decoder, self._clock = metrics, decoder, clock
        self._images: dict[tuple[int, ImageTransform], Batcher] = {}
        self._cuts: dict[Cut, Batcher] = {}
        self._texts: dict[int, Batcher] = {}
        self._judges: dict[str, tuple[ImageTransform, Batcher]] = {}
        for name, metric in metrics.items():
            self._add_batchers(name, metric, batch)
        dims = {key: metric.backbone.dim for key, metric in self._embedding_metrics()}
        floats = 4 * sum(dims.values())
        self._encoder = encoder
        if encoder is not None:
            floats += encoder.num_bytes
            for cut in encoder.cuts:
                key = encoder.key_of(cut)
                self._cuts[cut] = Batcher(key, encoder, encoder.batch, "latents")
        self._judge_transforms = tuple(dict.fromkeys(one for one, _ in self._judges.values()))
        of_images = [transform for _, transform in self._images]
        self._transforms = tuple(dict.fromkeys([*of_images, *self._judge_transforms]))
        self._cache = EmbeddingCache(cache_bytes, OVERHEAD + floats, OVERHEAD + floats)
        self._to_submit: list[tuple[_Submitted, bytes, tuple[Transform, ...]]] = []
        self._in_flight: deque[tuple[list[_Submitted], Decoding]] = deque()
        self._is_turn = False
        self.num_rows = 0
        """Rows that were added."""

    def _add_batchers(self, name: str, metric: Metric, batch: Batch) -> None:
        """One for each network and transform; metrics that share a backbone share its batchers."""
        transform = metric.resolved.transform
        if isinstance(metric, CrossMetric):
            self._judges[name] = transform, Batcher(id(metric), _judging(metric), batch)
        elif isinstance(metric, EmbeddingMetric):
            backbone, number = metric.backbone, id(metric.backbone)
            key = number, transform
            self._images.setdefault(key, Batcher(key, _embedding(backbone), batch))
            if metric.reads_prompt:
                self._texts.setdefault(number, Batcher(number, backbone.embed_texts, batch))

    def _embedding_metrics(self) -> Iterator[tuple[tuple[int, ImageTransform], EmbeddingMetric]]:
        """The metrics that compare embeddings, by the key of their image embeddings."""
        for metric in self._metrics.values():
            if isinstance(metric, EmbeddingMetric) and not isinstance(metric, CrossMetric):
                yield (id(metric.backbone), metric.resolved.transform), metric

    def add(
        self, image: bytes, prompt: str, key: bytes | None = None, cut: Cut | None = None
    ) -> Row:
        """Take a row. `key` is the image's `image_key`, where the caller has it already.

        `cut` is one of the encoder's, where the image is to be encoded.
        """
        cached, new = self._cache.image(key or image_key(image))
        text, unread = self._cache.prompt(prompt)
        if unread:
            for backbone, batcher in self._texts.items():
                request = Request(self.num_rows, prompt, text.embeddings, backbone)
                batcher.waiting.append(request)
                self._run(batcher.part, batcher.run_full)
        unjudged = bool(self._judges) and prompt not in cached.judged
        if unjudged:
            cached.judged[prompt] = {}
        if cut in cached.cuts:
            cut = None
        if new or unjudged or cut:
            transforms: tuple[Transform, ...] = self._judge_transforms if unjudged else ()
            transforms = self._transforms if new else transforms
            sent = _Submitted(self.num_rows, cached, prompt, new, unjudged, cut)
            if cut is not None:
                cached.cuts |= {cut}
                transforms = (*transforms, cut)
            self._send(sent, image, transforms)
        self.num_rows += 1
        return Row(cached, text)

    @property
    def computed(self) -> int:
        """All rows before this one can be scored."""
        waiting = [batcher.oldest for batcher in self._batchers()]
        waiting += [sent[0].row for sent, _ in self._in_flight]
        waiting += [sent.row for sent, _, _ in self._to_submit[:1]]
        return min((row for row in waiting if row is not None), default=self.num_rows)

    @property
    def steady(self) -> bool:
        """Whether each network is known to give an image or prompt the same in every batch."""
        return all(batcher.steady for batcher in self._batchers())

    def flush(self) -> None:
        """Compute all rows that were added, in batches that are filled up."""
        self._submit()
        while self._in_flight:
            self._receive()
        for batcher in self._batchers():
            self._run(batcher.part, batcher.flush)

    def forget(self) -> None:
        """Compute the next rows as if none had been before."""
        self._cache.forget()

    def scores(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Metric -> float32 scores of computed rows; NaN where the image could not be read."""
        with self._clock.measure("score"):
            scores = {}
            for name, metric in self._metrics.items():
                score_rows = self._scored if isinstance(metric, EmbeddingMetric) else self._judged
                parts = [
                    score_rows(name, rows[start : start + SCORE_ROWS])
                    for start in range(0, len(rows), SCORE_ROWS)
                ]
                scores[name] = np.concatenate([np.zeros(0, np.float32), *parts])
            return scores

    def _scored(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        metric = self._metrics[name]
        assert isinstance(metric, EmbeddingMetric)
        backbone, nothing = id(metric.backbone), np.full(metric.backbone.dim, np.nan, np.float32)
        key = backbone, metric.resolved.transform
        images = _stacked([row.image.embeddings.get(key, nothing) for row in rows])
        if not metric.reads_prompt:
            return metric.score(images, images).numpy()
        return metric.score(
            images, _stacked([row.prompt.embeddings[backbone] for row in rows])
        ).numpy()

    def _judged(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        scores = [row.image.judged[row.prompt.text].get(name, np.nan) for row in rows]
        return np.array(scores, np.float32)

    def _batchers(self) -> Iterator[Batcher]:
        yield from self._images.values()
        yield from self._cuts.values()
        yield from self._texts.values()
        yield from (batcher for _, batcher in self._judges.values())

    def _send(self, sent: _Submitted, content: bytes, transforms: tuple[Transform, ...]) -> None:
        self._to_submit.append((sent, content, transforms))
        if len(self._to_submit) == DECODE_IMAGES:
            self._submit()
            # The networks begin with the first images; decoding gets ahead, two chunks for one.
            self._is_turn = not self._is_turn
            is_ready = self._is_turn and self._in_flight[0][1].is_ready
            if is_ready or len(self._in_flight) > self._decoder.prefetch:
                self._receive()

    def _submit(self) -> None:
        if self._to_submit:
            work = [(content, transforms) for _, content, transforms in self._to_submit]
            with self._clock.measure("decode"):
                decoding = self._decoder.submit(work)
            self._in_flight.append(([sent for sent, _, _ in self._to_submit], decoding))
            self._to_submit = []

    def _receive(self) -> None:
        submitted, decoding = self._in_flight[0]
        with self._clock.measure("decode"):
            results = decoding.wait()
        for sent, processed in zip(submitted, results, strict=True):
            if sent.new:
                sent.image.processed = replace(processed, arrays={})
            if processed.status is Status.OK:
                self._request(sent, processed)
        self._in_flight.popleft()
        for batcher in self._batchers():
            self._run(batcher.part, batcher.run_full)

    def _request(self, sent: _Submitted, processed: ProcessedImage) -> None:
        if sent.new:
            for key, batcher in self._images.items():
                pixels = processed.arrays[key[1]]
                batcher.waiting.append(Request(sent.row, pixels, sent.image.embeddings, key))
        if sent.cut is not None:
            assert self._encoder is not None
            pixels, of_cut = processed.arrays[sent.cut], self._encoder.key_of(sent.cut)
            request = Request(sent.row, pixels, sent.image.embeddings, of_cut)
            self._cuts[sent.cut].waiting.append(request)
        for name, (transform, batcher) in self._judges.items() if sent.is_judged else ():
            judged, content = (
                sent.image.judged[sent.prompt],
                (processed.arrays[transform], sent.prompt),
            )
            batcher.waiting.append(Request(sent.row, content, judged, name))

    def _run(self, part: str, run: Callable[[], None]) -> None:
        with self._clock.measure(part):
            run()


def _embedding(backbone: Backbone) -> Callable[[list[np.ndarray]], Tensor]:
    return lambda images: backbone.embed_images(np.stack(images))


def _judging(metric: CrossMetric) -> Callable[[list[Any]], Tensor]:
    def judge(rows: list[tuple[np.ndarray, str]]) -> Tensor:
        images, prompts = zip(*rows, strict=True)
        return torch.as_tensor(metric.judge(images, prompts))

    return judge


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))

"""One pass over rows of (picture, prompt): each distinct thing is computed once.

A picture is the same when its bytes are. It is decoded once, prepared once per view and embedded
once per backbone; a prompt is embedded once per backbone; a metric that needs both together runs
once per distinct (picture, prompt). Decoding runs ahead in worker processes. Nothing is carried
from one pass to the next, so batches and scores depend on nothing but the rows of the pass.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from data.pairs import image_key
from data.tables import Status
from label.decode import Decoder
from label.metrics.metric import EmbeddingMetric, Metric, PictureMetric
from label.metrics.tower import Tower
from label.prepare import Prepared, View

CHUNK = 16
"""Pictures that a worker process takes at a time."""
SCORE_ROWS = 8192
"""Rows whose embeddings are gathered at a time."""

Inputs = TypeVar("Inputs", np.ndarray, list[tuple[int, np.ndarray, str]])


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


@dataclass(slots=True)
class Batch:
    """Pictures a forward pass; shared by all networks of a run, halved when memory runs out."""

    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass found, per distinct (picture, prompt) in the order of `Pass.add`'s answers."""

    pictures: list[Prepared]
    """Status, reason and size; the arrays are gone."""
    scores: dict[str, np.ndarray]
    """Metric -> float32 scores, NaN where the picture could not be read."""


@dataclass(slots=True)
class _Embeddings:
    """Pictures that wait for a (tower, view), and the embeddings made so far."""

    tower: Tower
    view: View
    waiting: list[tuple[int, np.ndarray]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    def run(self, batch: Batch, count: int) -> None:
        """Embed the first `count` waiting pictures."""
        indices, arrays = zip(*self.waiting[:count], strict=True)
        self.parts.append(halving(self.tower.embed_images, np.stack(arrays), batch))
        self.indices.extend(indices)
        del self.waiting[:count]

    def table(self, num_images: int) -> Tensor:
        """Embeddings by picture; rows of NaN for those that could not be read."""
        found = torch.full((num_images, self.tower.dim), torch.nan)
        if self.parts:
            found[torch.tensor(self.indices)] = torch.cat(self.parts)
        return found


@dataclass(slots=True)
class _Judgements:
    """Rows that wait for a metric which sees picture and prompt together, and its scores so far."""

    metric: PictureMetric
    waiting: list[tuple[int, np.ndarray, str]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    def run(self, batch: Batch) -> None:
        """Judge the first waiting rows, at most a batch."""
        work = self.waiting[: batch.size]
        self.parts.append(halving(self._judge, work, batch))
        self.rows.extend(row for row, _, _ in work)
        del self.waiting[: len(work)]

    def _judge(self, part: list[tuple[int, np.ndarray, str]]) -> Tensor:
        _, pictures, prompts = zip(*part, strict=True)
        return self.metric.judge(pictures, prompts)

    def column(self, num_rows: int) -> Tensor:
        """Scores by row; NaN where the picture could not be read."""
        found = torch.full((num_rows,), torch.nan)
        if self.parts:
            found[torch.tensor(self.rows)] = torch.cat(self.parts)
        return found


@runtime_checkable
class Onlooker(Protocol):
    """Is shown each distinct picture of a pass that can be read, and changes nothing of it."""

    @property
    def view(self) -> View:
        """How it wants pictures prepared."""

    def take(self, key: bytes, picture: np.ndarray) -> None:
        """See a picture, named by its `image_key`; they come in the order of their rows."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A picture on its way through a worker process."""

    key: bytes
    image: int
    row: int
    prompt: str
    first: bool
    """Whether the picture is new; otherwise only its prompt is."""


class Pass:
    """Takes rows one by one, answers with their scores at the end."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        decoder: Decoder,
        batch: Batch,
        clock: Clock,
        onlooker: Onlooker | None = None,
    ) -> None:
        self._metrics, self._decoder, self._batch, self._clock = metrics, decoder, batch, clock
        self._onlooker = onlooker
        self._embeddings: dict[tuple[int, View], _Embeddings] = {}
        for metric in metrics.values():
            if isinstance(metric, EmbeddingMetric):
                key = id(metric.tower), metric.identity.view
                self._embeddings.setdefault(key, _Embeddings(metric.tower, metric.identity.view))
        self._judges = {
            name: _Judgements(metric)
            for name, metric in metrics.items()
            if isinstance(metric, PictureMetric)
        }
        views = (judge.metric.identity.view for judge in self._judges.values())
        self._judge_views = tuple(dict.fromkeys(views))
        looked_at = [onlooker.view] if onlooker else []
        every = [*(view for _, view in self._embeddings), *self._judge_views, *looked_at]
        self._views = tuple(dict.fromkeys(every))
        self._images: dict[bytes, int] = {}
        self._prompts: dict[str, int] = {}
        self._rows: dict[tuple[int, int], int] = {}
        self._pictures: list[Prepared] = []
        self._chunk: list[tuple[_Item, bytes, tuple[View, ...]]] = []
        self._in_flight: deque[tuple[list[_Item], Callable[[], list[Prepared]]]] = deque()
        self._texts: dict[int, Tensor] = {}

    def add(self, image: bytes, prompt: str, key: bytes | None = None) -> int:
        """Take a row; the answer is its place in the `Outcome`, equal for equal rows.

        `key` is the picture's `image_key`, where the caller has it already.
        """
        num_images, key = len(self._images), key or image_key(image)
        picture = self._images.setdefault(key, num_images)
        text = self._prompts.setdefault(prompt, len(self._prompts))
        if (row := self._rows.get((picture, text))) is not None:
            return row
        row = self._rows[picture, text] = len(self._rows)
        if picture == num_images:
            self._send(_Item(key, picture, row, prompt, first=True), image, self._views)
        elif self._judges:
            self._send(_Item(key, picture, row, prompt, first=False), image, self._judge_views)
        return row

    def finish(self) -> Outcome:
        """Wait for what is under way and score all rows."""
        self._submit()
        while self._in_flight:
            self._receive()
        for embeddings in self._embeddings.values():
            while embeddings.waiting:
                self._embed(embeddings)
        for judge in self._judges.values():
            while judge.waiting:
                self._judge(judge)
        for metric in self._metrics.values():
            if isinstance(metric, EmbeddingMetric) and metric.reads_prompt and self._rows:
                self._embed_texts(metric.tower)
        with self._clock.measure("score"):
            scores = {name: self._scores(name) for name in self._metrics}
        images = [picture for picture, _ in self._rows]
        return Outcome([self._pictures[image] for image in images], scores)

    def _send(self, item: _Item, content: bytes, views: tuple[View, ...]) -> None:
        self._chunk.append((item, content, views))
        if len(self._chunk) == CHUNK:
            self._submit()
        while len(self._in_flight) > self._decoder.ahead:
            self._receive()

    def _submit(self) -> None:
        if self._chunk:
            work = [(content, views) for _, content, views in self._chunk]
            with self._clock.measure("decode"):
                wait = self._decoder.submit(work)
            self._in_flight.append(([item for item, _, _ in self._chunk], wait))
            self._chunk = []

    def _receive(self) -> None:
        items, wait = self._in_flight.popleft()
        with self._clock.measure("decode"):
            prepared = wait()
        for item, found in zip(items, prepared, strict=True):
            if item.first:
                bare = Prepared(found.status, found.reason, found.width, found.height)
                self._pictures.append(bare)  # pictures come back in the order they were sent
                assert len(self._pictures) == item.image + 1
            if found.status is Status.OK:
                self._take(item, found)
        for embeddings in self._embeddings.values():
            while len(embeddings.waiting) >= self._batch.size:
                self._embed(embeddings)
        for judge in self._judges.values():
            while len(judge.waiting) >= self._batch.size:
                self._judge(judge)

    def _take(self, item: _Item, found: Prepared) -> None:
        if item.first:
            for embeddings in self._embeddings.values():
                embeddings.waiting.append((item.image, found.arrays[embeddings.view]))
            if self._onlooker:
                self._onlooker.take(item.key, found.arrays[self._onlooker.view])
        for judge in self._judges.values():
            picture = found.arrays[judge.metric.identity.view]
            judge.waiting.append((item.row, picture, item.prompt))

    def _embed(self, embeddings: _Embeddings) -> None:
        with self._clock.measure("embed"):
            embeddings.run(self._batch, min(self._batch.size, len(embeddings.waiting)))

    def _judge(self, judge: _Judgements) -> None:
        with self._clock.measure("embed"):
            judge.run(self._batch)

    def _scores(self, name: str) -> np.ndarray:
        metric = self._metrics[name]
        scores = torch.full((len(self._rows),), torch.nan)
        if not self._rows:
            return scores.numpy()
        if not isinstance(metric, EmbeddingMetric):
            return self._judges[name].column(len(self._rows)).numpy()
        images = self._image_table(metric)
        texts = self._texts[id(metric.tower)] if metric.reads_prompt else None
        rows = torch.tensor(list(self._rows)).reshape(-1, 2)
        for start in range(0, len(rows), SCORE_ROWS):
            picture, prompt = rows[start : start + SCORE_ROWS].unbind(1)
            left = images[picture]
            scores[start : start + SCORE_ROWS] = metric.score(
                left, left if texts is None else texts[prompt]
            )
        return scores.numpy()

    def _image_table(self, metric: EmbeddingMetric) -> Tensor:
        return self._embeddings[id(metric.tower), metric.identity.view].table(len(self._images))

    def _embed_texts(self, tower: Tower) -> None:
        if id(tower) not in self._texts:
            prompts = np.array(list(self._prompts), dtype=object)
            with self._clock.measure("embed"):
                self._texts[id(tower)] = halving(
                    lambda part: tower.embed_texts(part.tolist()), prompts, self._batch
                )


def halving(forward: Callable[[Inputs], Tensor], inputs: Inputs, batch: Batch) -> Tensor:
    """Run `forward` batch by batch; out of device memory halves the batch and goes on.

    Raises:
        ValueError: Not even one fits.
    """
    parts: list[Tensor] = []
    done = 0
    while done < len(inputs):
        try:
            part = forward(inputs[done : done + batch.size])
        except torch.OutOfMemoryError as error:
            if batch.size == 1:
                raise ValueError(
                    "the device has no memory for a single picture; use label.device=cpu, a "
                    "smaller model, or close what else runs there"
                ) from error
            part = None
        if part is None:  # retried outside `except`, which keeps the failed tensors alive
            batch.size //= 2
            torch.cuda.empty_cache()
        else:
            parts.append(part)
            done += len(part)
    return torch.cat(parts)

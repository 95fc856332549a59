"""The columns of a pair shard's files, growing as its pairs are read and scored."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from data.artifacts.schemas import PAIR_FACTS, SCORES, Status
from data.pairs.schema import PairShard, pair_key
from label.metrics.preprocessing import ProcessedImage


@dataclass(slots=True)
class ShardBuilder:
    """What is known of a shard's pairs, in their order."""

    shard: PairShard
    columns: dict[str, list[object]] = field(
        default_factory=lambda: {name: [] for name in PAIR_FACTS.names}
    )
    seen: Counter[str] = field(default_factory=Counter)
    per_metric: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Scores, (pair, 2)."""
    statuses: list[tuple[Status, Status]] = field(default_factory=list)
    """What is known of both images of a pair, whatever the metric."""

    def read(self, pair: Mapping[str, Any], keys: tuple[bytes, bytes]) -> None:
        """Take a pair as its source gives it, with its `image_key`s."""
        prompt, human = pair["prompt"] or "", pair["human"]
        name = pair_key(*keys, prompt)
        self._append(
            pair_id=f"{name}-{self.seen[name]}",
            prompt=prompt,
            source=self.shard.name,
            row=pair["row"],
            image_0=pair["uid_0"],
            image_1=pair["uid_1"],
            human=None if human is None or np.isnan(human) else human,
        )
        self.seen[name] += 1

    def score(
        self,
        images: Sequence[tuple[ProcessedImage, ProcessedImage]],
        scores: Mapping[str, np.ndarray],
    ) -> None:
        """Take the results of the next pairs: both images, and scores as (pair, 2)."""
        first = len(self.statuses)
        prompts = self.columns["prompt"][first : first + len(images)]
        for both, prompt in zip(images, prompts, strict=True):
            self._judge(both, str(prompt))
        for metric, values in scores.items():
            self.per_metric.setdefault(metric, []).append(values)

    def _judge(self, both: tuple[ProcessedImage, ProcessedImage], prompt: str) -> None:
        bad = [
            (image.status, f"image {side}: {image.reason}")
            for side, image in enumerate(both)
            if image.status is not Status.OK
        ]
        empty = not prompt.strip()
        if empty:
            bad.append((Status.EMPTY_PROMPT, "the prompt is empty"))
        for side, image in enumerate(both):
            self._append(**{f"width_{side}": image.width, f"height_{side}": image.height})
        self._append(
            status=bad[0][0] if bad else Status.OK, reason="; ".join(why for _, why in bad)
        )
        first, second = (
            Status.EMPTY_PROMPT if empty and p.status is Status.OK else p.status for p in both
        )
        self.statuses.append((first, second))

    def last(self, count: int) -> list[tuple[str, Status]]:
        """Name and status of the pairs whose results were taken last."""
        end = len(self.statuses)
        names, statuses = (self.columns[name][end - count : end] for name in ("pair_id", "status"))
        return [(str(one), Status(str(two))) for one, two in zip(names, statuses, strict=True)]

    def facts(self) -> pa.Table:
        """The pairs' facts, in the schema of their set."""
        columns = {**self.columns, "status": [str(status) for status in self.columns["status"]]}
        return pa.table(columns, schema=PAIR_FACTS)

    def scores(self, metric: str) -> pa.Table:
        """One metric's scores, in the schema of its set; null where the status is not ok."""
        parts = self.per_metric.get(metric, [])
        values = np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)
        columns: dict[str, object] = {"pair_id": self.columns["pair_id"]}
        for side in (0, 1):
            status = [
                Status.NOT_FINITE if known[side] is Status.OK and not finite else known[side]
                for known, finite in zip(
                    self.statuses, np.isfinite(values[:, side]).tolist(), strict=True
                )
            ]
            bad = np.array([value is not Status.OK for value in status], dtype=bool)
            columns[f"score_{side}"] = pa.array(values[:, side], pa.float32(), mask=bad)
            columns[f"status_{side}"] = [str(value) for value in status]
        return pa.table({name: columns[name] for name in SCORES.names}, schema=SCORES)

    def _append(self, **values: object) -> None:
        for name, value in values.items():
            self.columns[name].append(value)

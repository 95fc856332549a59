"""`pairs=mixture`: how many pairs of other sets, which ones, and what cannot be mixed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from tests.helpers_pairs import hpdv2_train, pickapic, rows_of
from tests.helpers_train import image
from tests.test_conf import job


def write_set(root: Path, name: str, prompts: int, each: int = 2) -> None:
    """A set with some pairs for each prompt, in two files with row groups of three."""
    root.mkdir()
    texts = [f"{name} {i}" for i in range(prompts) for _ in range(each)]
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        table = pickapic(rows=len(part), caption=part, jpg_0=[image(i) for i in range(len(part))])
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs of one's own, and two other sets with 40 pairs each."""
    folder = tmp_path_factory.mktemp("sets")
    for name, prompts in (("own", 10), ("a", 20), ("b", 20)):
        write_set(folder / name, name, prompts)
    return folder


def mixture(sets: Path, fraction: float, seed: int = 0) -> PairsSpec:
    others = [{"kind": "pickapic", "root": str(sets / name)} for name in ("a", "b")]
    options = {"kind": "pickapic", "fraction": fraction, "others": others, "seed": seed}
    return PairsSpec(kind="mixture", root=str(sets / "own"), options=options)


def prompts_of(spec: PairsSpec) -> list[str]:
    return [row["prompt"] for row in rows_of(open_pairs(spec))]


@pytest.mark.parametrize(("fraction", "others"), [(0.5, 20), (0.2, 5), (1 / 3, 10), (0.75, 60)])
def test_the_others_give_their_fraction_in_whole_prompts(sets: Path, fraction: float, others: int):
    count = Counter(prompts_of(mixture(sets, fraction)))
    assert sum(n for prompt, n in count.items() if prompt.startswith("own")) == 20
    assert set(count.values()) == {2}
    mixed = sum(n for prompt, n in count.items() if not prompt.startswith("own"))
    assert mixed in (others, others + 1)
    if others >= 20:  # both sets are drawn from
        assert {prompt[0] for prompt in count} == {"o", "a", "b"}


def test_rows_are_those_of_the_sets_and_own_pairs_come_first(sets: Path):
    spec = mixture(sets, 0.5)
    rows = rows_of(source := open_pairs(spec))
    known = [
        {name: value for name, value in row.items() if name != "row"}
        for name in ("own", "a", "b")
        for row in rows_of(open_pairs(PairsSpec(root=str(sets / name))))
    ]
    assert all({k: v for k, v in row.items() if k != "row"} in known for row in rows)
    assert [row["prompt"][:3] for row in rows[:20]] == ["own"] * 20
    own = open_pairs(PairsSpec(root=str(sets / "own"))).shards
    assert source.shards[:2] == own  # so that their scores stay valid
    others = source.shards[2:]
    assert {shard.name for shard in others} <= {
        f"others.{n}/train-{i}.parquet" for n in (0, 1) for i in (0, 1)
    }
    assert [shard.index for shard in source.shards] == list(range(len(source.shards)))
    for shard in others:
        assert len(source.fingerprint(shard)["sha256"]) == 64


def test_the_seed_draws_and_a_greater_fraction_keeps_what_is_drawn(sets: Path):
    few = prompts_of(mixture(sets, 0.2))
    assert few == prompts_of(mixture(sets, 0.2))
    assert set(few) < set(prompts_of(mixture(sets, 0.5)))
    other = open_pairs(mixture(sets, 0.2, seed=1))
    assert few != [row["prompt"] for row in rows_of(other)]
    readings = {shard.reading for shard in open_pairs(mixture(sets, 0.2)).shards[2:]}
    assert readings != {shard.reading for shard in other.shards[2:]}


def test_lists_can_be_mixed_in(sets: Path, tmp_path: Path):
    spec = mixture(sets, 0.1)
    listed = hpdv2_train(tmp_path / "lists")
    (tmp_path / "lists" / "train").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "lists" / "train" / name).write_bytes(image(1))
    others = [{"kind": "hpdv2", "root": listed.root}]
    spec = replace(spec, options=spec.options | {"others": others})
    assert len(prompts_of(spec)) == 22


def refused(sets: Path, **options: Any) -> str:
    spec = mixture(sets, 0.5)
    with pytest.raises(PairsError) as caught:
        open_pairs(replace(spec, options=spec.options | options))
    return str(caught.value)


def test_what_cannot_be_mixed_is_refused(sets: Path):
    assert "takes 180 pairs of pairs.options.others, which have 80; lower it to 0.8" in refused(
        sets, fraction=0.9
    )
    for fraction in (0, 1, "x", None):
        assert f"fraction={fraction}; it is the fraction" in refused(sets, fraction=fraction)
    assert "pairs.options.others=[]; it is a list of" in refused(sets, others=[])
    assert "others[0] is 7; it needs kind and root" in refused(sets, others=[7])
    assert "has the setting path; allowed: kind, root" in refused(
        sets, others=[{"root": "x", "path": "y"}]
    )
    for setting in ({"max_pairs": "x"}, {"split": 3}, {"kind": None}):
        ((name, value),) = setting.items()
        other = {"root": "x"} | setting
        assert f"others[0] has {name}={value!r}; needed is a" in refused(sets, others=[other])
    assert "allowed are inline and paths" in refused(sets, others=[{"root": "x", "images": "y"}])
    assert "pairs.options.share is not read by" in refused(sets, share=1)
    assert "a layout but mixture" in refused(sets, kind="mixture")
    once, again = {"root": str(sets / "a")}, {"root": f"{sets}/own/../a/"}
    assert "others[1] is split 'train' of" in refused(sets, others=[once, again])
    assert "name each set once" in refused(sets, others=[{"root": str(sets / "own")}])


def test_the_group_composes_with_sets_in_a_list(tmp_path: Path):
    spec = job(
        "pairs=mixture", f"pairs.root={tmp_path}", "pairs.options.fraction=0.25",
        'pairs.options.others=[{kind: own, root: "runs/a b/pairs"}, {kind: jsonl, root: "/x"}]',
    ).pairs  # fmt: skip
    assert spec.options["others"] == [
        {"kind": "own", "root": "runs/a b/pairs"}, {"kind": "jsonl", "root": "/x"}
    ]  # fmt: skip
    assert spec.options["fraction"] == 0.25

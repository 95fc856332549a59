"""The page that `make inspect` writes."""

import base64
import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data.pairs import open_pairs
from data.pairs.config import Images, PairsSpec
from label.analysis.console import print_statistics, rule_words
from label.analysis.gallery import LARGEST_SIDE, galleries, read_images
from label.analysis.generators import generators
from label.analysis.report import histogram, write_report
from label.analysis.statistics import Gaps, Statistics, compute_statistics
from label.analysis.tables import COLUMNS, Table, matrix
from label.config import Rule, TieRule, VoteSpec
from label.voting.rules import VotingRule, label_pairs
from tests import helpers_label as tiny
from tests.test_vote import METRICS, scored

VOID = {"meta", "img", "br", "hr", "rect", "path", "link"}


class Page(HTMLParser):
    """Checks that every element is closed, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.words, self.attributes, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def set_of(count: int, **spec: object) -> tuple[pl.DataFrame, VotingRule]:
    rng = np.random.default_rng(5)
    human = rng.choice([0.0, 0.5, 1.0], count).tolist()
    voting_rule = VotingRule(VoteSpec(**spec), METRICS, {"a": 0.2})
    frame = scored(rng.normal(size=(count, 4, 2)), human)
    return label_pairs(frame, voting_rule), voting_rule


@pytest.fixture
def pair_files(tmp_path: Path) -> Path:
    rows = tiny.good_rows(20)
    rows[3].left = rows[3].left[:50]
    tiny.write_pairs(tmp_path / "pairs" / "train-0.parquet", rows)
    tiny.write_pairs(tmp_path / "pairs" / "train-1.parquet", tiny.good_rows(20, first=50))
    return tmp_path / "pairs"


def page_of(tmp_path: Path, statistics: Statistics, shown: list) -> str:
    return write_report(tmp_path, statistics, shown, {"vote": {"rule": "majority"}}).read_text()


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"tie_rule": TieRule.metric, "tie_metric": "b"},
        {"rule": Rule.at_least, "votes": 3, "tie_rule": TieRule.human},
        {"rule": Rule.human},
        {"rule": Rule.zscore_sum, "weights": {"a": 2.0}},
        {"human_votes": True},
    ],
    ids=str,
)
def test_page_is_whole_and_asks_nobody_for_anything(tmp_path: Path, spec: dict) -> None:
    frame, voting_rule = set_of(200, **spec)
    page = Page(page_of(tmp_path, compute_statistics(frame, voting_rule), []))
    for tag, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#")), (tag, value)
            assert not value.startswith("#") or value[1:] in page.ids
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )
    words = " ".join(" ".join(page.words).split())
    assert rule_words(voting_rule) in words
    assert "None" not in words
    assert "nan" not in words
    for count in compute_statistics(frame, voting_rule).outcomes.values():
        assert f" {count} " in words


def test_terminal_and_page_show_every_table(tmp_path: Path) -> None:
    frame, voting_rule = set_of(60)
    frame[0, "status"], frame[0, "reason"] = "empty_prompt", "the prompt is empty"
    names = pl.DataFrame({"generator_0": ["x"] * 60, "generator_1": ["y"] * 60})
    statistics = compute_statistics(frame, voting_rule, names)
    written = StringIO()
    print_statistics(Console(width=200, file=written), frame, statistics)
    said = " ".join(written.getvalue().split())
    page = Page(page_of(tmp_path, statistics, []))
    words = [" ".join(word.split()) for word in page.words]
    regions = {value for _, name, value in page.attributes if name == "aria-label"}
    for table in statistics.tables.values():
        assert table.title in said
        assert table.title in regions  # reached and scrolled with the keyboard
        for text in [*(heading for heading, _ in table.headings()),
                     *(" ".join(cell.text.split()) for cell in table.rows()[-1])]:  # fmt: skip
            assert text in said
            assert text in words or not text
    shown = {name for table in statistics.tables.values() for name in table.frame.columns}
    assert set(COLUMNS) <= shown
    assert "Krippendorff's alpha of the metrics: " in said


def test_cells_say_how_they_are_shown() -> None:
    frame = pl.DataFrame({"status": ["a_b", ""], "pairs": [3000, 1000], "human": [0.5, None]})
    table = Table("some", frame)
    assert [heading for heading, _ in table.headings()] == ["status", "pairs", "agrees with people"]
    assert table.rows() == [
        [("words", "a b", None), ("part", "3\u202f000", 0.75), ("bar", "50.0\u202f%", 0.5)],
        [("words", "–", None), ("part", "1\u202f000", 0.25), ("bar", "–", None)],
    ]
    # a metric may have a column's name
    square = matrix("some", pl.DataFrame({"voter": ["pairs"], "pairs": [0.25]}))
    assert square.headings() == [("", "text"), ("pairs", "heat")]
    assert square.rows() == [[("text", "pairs", None), ("heat", "25.0\u202f%", 0.25)]]


def test_matrix_is_coloured_by_the_distance_from_a_half(tmp_path: Path) -> None:
    scores = np.zeros((4, 4, 2))
    scores[:, :, 0] = [(1, 1, 1, -1), (1, 1, -1, -1), (1, 1, -1, -1), (1, -1, -1, -1)]
    voting_rule = VotingRule(VoteSpec(), METRICS)
    frame = label_pairs(scored(scores), voting_rule)
    text = page_of(tmp_path, compute_statistics(frame, voting_rule), [])
    assert text.count('<td class="heat above" style="--heat:30%">75.0') == 4
    assert text.count('<td class="heat below" style="--heat:30%">25.0') == 4
    assert text.count('<td class="heat below" style="--heat:60%">0.0') == 2
    assert text.count('<td class="heat above" style="--heat:0%">50.0') == 2


def test_prompts_cannot_write_on_the_page(tmp_path: Path, pair_files: Path) -> None:
    frame, voting_rule = set_of(20)
    frame = frame.with_columns(
        prompt=pl.lit("<script>alert(1)</script>"), source=pl.lit("train-0.parquet")
    )
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    text = page_of(tmp_path, compute_statistics(frame, voting_rule), galleries(frame, pairs, 2))
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    Page(text)


def test_galleries_show_what_they_say(pair_files: Path) -> None:
    frame, _ = set_of(20)
    frame = frame.with_columns(source=pl.lit("train-0.parquet"))
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    unanimous, split, flipped = galleries(frame, pairs, 100)
    for gallery in (unanimous, split, flipped):
        assert gallery.num_pairs == len(gallery.pairs) > 0
    for pair in unanimous.pairs:
        assert pair["votes_0" if pair["winner"] else "votes_1"] == 0
        assert {pair[f"vote_{m}"] for m in METRICS} - {0} == {1 - 2 * pair["winner"]}
    for pair in split.pairs:
        assert pair["votes_0"] == pair["votes_1"] > 0
        assert pair["winner"] is None
    for pair in flipped.pairs:
        assert pair["vote_human"] == 2 * pair["winner"] - 1
    few = galleries(frame, pairs, 1)
    assert [len(gallery.pairs) for gallery in few] == [1, 1, 1]
    assert few[0].pairs[0] == unanimous.pairs[0]
    assert [len(gallery.pairs) for gallery in galleries(frame, pairs, 0)] == [0, 0, 0]


def test_cards_show_scores_votes_and_images(tmp_path: Path, pair_files: Path) -> None:
    scores = np.array([[(0.5, 0.25), (0.125, 0.75), (2, 1), (3, 1)]])
    voting_rule = VotingRule(VoteSpec(tie_rule=TieRule.metric, tie_metric="d"), METRICS[:3])
    frame = label_pairs(scored(scores, [0.0]), voting_rule).with_columns(
        source=pl.lit("train-1.parquet"), score_d_1=None, vote_d=pl.lit(None, pl.Int8)
    )
    shown = galleries(frame, open_pairs(PairsSpec(root=str(pair_files))), 1)
    text = page_of(tmp_path, compute_statistics(frame, voting_rule), shown)
    words = " ".join(" ".join(Page(text).words).split())
    assert "✓ 0.5 a 0.25 0.125 b ✓ 0.75 ✓ 2 c 1 3 d (no vote) – human ✓" in words
    assert "2 : 1 · decided by majority" in words
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.count('<div class="image winner">') == 1
    assert text.count('<tr class="silent">') == 1  # d has no vote


def test_images_of_pairs_are_theirs(pair_files: Path) -> None:
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    wanted = [("train-0.parquet", 3), ("train-1.parquet", 17), ("train-1.parquet", 2)]
    images = read_images(pairs, wanted)
    assert set(images) == set(wanted)
    assert images["train-0.parquet", 3][0] == ""  # torn
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in images["train-1.parquet", 17])
    # pair 2's second image is pair 3's first (helpers_label.good_rows)
    again = read_images(pairs, [("train-1.parquet", 3)])
    assert again["train-1.parquet", 3][0] == images["train-1.parquet", 2][1]
    assert LARGEST_SIDE == 320


def test_generators_come_from_the_pair_files(pair_files: Path) -> None:
    assert generators(open_pairs(PairsSpec(root=str(pair_files)))) is None
    for path in sorted(pair_files.glob("*.parquet")):
        table = pq.read_table(path)
        names = [f"{path.stem}-{i}" for i in range(len(table))]
        pq.write_table(
            table.append_column("model_0", [names]).append_column("model_1", [names[::-1]]), path
        )
    names = generators(open_pairs(PairsSpec(root=str(pair_files))))
    assert names is not None
    assert names.height == 40
    assert names.row(21) == ("train-1-1", "train-1-18")


@pytest.mark.parametrize("images", list(Images))
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_generators_of_mapped_columns(tmp_path: Path, kind: str, images: Images) -> None:
    image = tiny.image(1)
    (tmp_path / "a.jpg").write_bytes(image)
    inline = base64.b64encode(image).decode() if kind == "jsonl" else image
    shown = "a.jpg" if images is Images.paths else inline
    rows = [{"text": "x", "l": shown, "r": shown, "by": f"m{i}"} for i in range(5)]
    if kind == "jsonl":
        (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    columns = {"prompt": "text", "image_0": "l", "image_1": "r", "generator_0": "by"}
    spec = PairsSpec(kind=kind, root=str(tmp_path), split="", images=images, columns=columns)
    names = generators(open_pairs(spec))
    assert names is not None
    assert names["generator_0"].to_list() == [f"m{i}" for i in range(5)]
    assert names["generator_1"].null_count() == 5


def test_words_for_every_rule() -> None:
    said = set()
    needed = {Rule.single: {"metric": "b"}, Rule.at_least: {"votes": 3}}
    for rule in Rule:
        for tie in TieRule:
            more = {"tie_metric": "c"} if tie is TieRule.metric else {}
            spec = VoteSpec(rule=rule, tie_rule=tie, **needed.get(rule, {}), **more)
            said.add(rule_words(VotingRule(spec, METRICS)))
    assert len(said) == len(Rule) * len(TieRule)
    weighed = rule_words(VotingRule(VoteSpec(weights={"b": 3.0}, human_votes=True), METRICS))
    assert weighed.startswith("The majority of a (1), b (3), c (1), d (1), the human label (1)")


def test_drawings() -> None:
    drawn = str(histogram(Gaps("a", 2.0, [0, 1, 4, 3, 0], 0.5)))
    assert 'class="below"' in drawn
    assert 'class="above"' in drawn
    assert '<rect x="91.5" width="61.0"' in drawn  # a quarter of 244 around the middle
    assert "v-64.0h" in drawn
    assert "<rect" not in str(histogram(Gaps("a", 2.0, [0, 1, 4, 3, 0], 0.0)))

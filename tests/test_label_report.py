"""The page that `make inspect` writes."""

import base64
import json
import re
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
from label.analysis.console import print_study, rule_words
from label.analysis.gallery import LARGEST_SIDE, galleries, read_images
from label.analysis.generators import generators
from label.analysis.report import COLUMNS, heat, histogram, write_report
from label.analysis.statistics import Gaps, Study, study
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


def page_of(tmp_path: Path, found: Study, shown: list) -> str:
    return write_report(tmp_path, found, shown, {"vote": {"rule": "majority"}}).read_text()


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
    page = Page(page_of(tmp_path, study(frame, voting_rule), []))
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
    for count in study(frame, voting_rule).outcomes.values():
        assert f" {count} " in words


def test_every_table_has_its_columns_and_a_name(tmp_path: Path) -> None:
    frame, voting_rule = set_of(60)
    text = page_of(tmp_path, study(frame, voting_rule), [])
    headings = re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", text)
    for which in set(COLUMNS) - {"reasons", "generators"}:  # there is neither in this set
        assert {heading for _, heading, _ in COLUMNS[which]} <= set(headings)
    regions = re.findall(
        r'<div class="scroll" tabindex="0" role="region" aria-label="([^"]+)"', text
    )
    assert len(regions) == len(set(regions)) >= 9  # reached and scrolled with the keyboard


def test_prompts_cannot_write_on_the_page(tmp_path: Path, pair_files: Path) -> None:
    frame, voting_rule = set_of(20)
    frame = frame.with_columns(
        prompt=pl.lit("<script>alert(1)</script>"), source=pl.lit("train-0.parquet")
    )
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    text = page_of(tmp_path, study(frame, voting_rule), galleries(frame, voting_rule, pairs, 2))
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    Page(text)


def test_galleries_show_what_they_say(pair_files: Path) -> None:
    frame, voting_rule = set_of(20)
    frame = frame.with_columns(source=pl.lit("train-0.parquet"))
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    unanimous, split, flipped = galleries(frame, voting_rule, pairs, 100)
    for gallery in (unanimous, split, flipped):
        assert gallery.num_pairs == len(gallery.cards)
    for card in unanimous.cards:
        assert card.winner is not None
        assert card.tally[1 - card.winner] == 0
        assert all(line.vote == 1 - 2 * card.winner for line in card.lines[:4] if line.vote)
    assert all(card.tally[0] == card.tally[1] and card.winner is None for card in split.cards)
    for card in flipped.cards:
        people = card.lines[-1]
        assert people.voter == "people"
        assert not people.counts
        assert people.vote == 2 * card.winner - 1
    assert {card.decided_by for card in unanimous.cards} == {"majority"}
    few = galleries(frame, voting_rule, pairs, 1)
    assert [len(gallery.cards) for gallery in few] == [1, 1, 1]
    assert few[0].cards[0] == unanimous.cards[0]
    assert [len(gallery.cards) for gallery in galleries(frame, voting_rule, pairs, 0)] == [0, 0, 0]
    half = frame.with_columns(score_d_1=None, vote_d=pl.lit(None, pl.Int8))
    assert galleries(half, voting_rule, pairs, 1)[0].cards[0].lines[3].scores[1] == "–"


def test_images_of_pairs_are_theirs(pair_files: Path) -> None:
    pairs = open_pairs(PairsSpec(root=str(pair_files)))
    wanted = [("train-0.parquet", 3), ("train-1.parquet", 17), ("train-1.parquet", 2)]
    found = read_images(pairs, wanted)
    assert set(found) == set(wanted)
    assert found["train-0.parquet", 3][0] == ""  # torn
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in found["train-1.parquet", 17])
    # pair 2's second image is pair 3's first (helpers_label.good_rows)
    again = read_images(pairs, [("train-1.parquet", 3)])
    assert again["train-1.parquet", 3][0] == found["train-1.parquet", 2][1]
    assert LARGEST_SIDE == 320


def test_generators_come_from_the_pair_files(pair_files: Path) -> None:
    assert generators(open_pairs(PairsSpec(root=str(pair_files)))) is None
    for path in sorted(pair_files.glob("*.parquet")):
        table = pq.read_table(path)
        names = [f"{path.stem}-{i}" for i in range(len(table))]
        pq.write_table(
            table.append_column("model_0", [names]).append_column("model_1", [names[::-1]]), path
        )
    found = generators(open_pairs(PairsSpec(root=str(pair_files))))
    assert found is not None
    assert found.height == 40
    assert found.row(21) == ("train-1-1", "train-1-18")


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
    found = generators(open_pairs(spec))
    assert found is not None
    assert found["generator_0"].to_list() == [f"m{i}" for i in range(5)]
    assert found["generator_1"].null_count() == 5


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


def test_terminal_says_all_tables() -> None:
    frame, voting_rule = set_of(50)
    written = StringIO()
    print_study(Console(width=200, file=written), frame, study(frame, voting_rule))
    titles = ["Each metric", "Who votes with whom", "What the rule left open", "By size",
              "The majority without a voter", "Dawid-Skene", "krippendorff alpha"]  # fmt: skip
    assert [title for title in titles if title not in written.getvalue()] == []


def test_drawings() -> None:
    drawn = str(histogram(Gaps("a", 2.0, [0, 1, 4, 3, 0], 0.5)))
    assert 'class="below"' in drawn
    assert 'class="above"' in drawn
    assert '<rect x="91.5" width="61.0"' in drawn  # a quarter of 244 around the middle
    assert "v-64.0h" in drawn
    assert "<rect" not in str(histogram(Gaps("a", 2.0, [0, 1, 4, 3, 0], 0.0)))
    assert str(heat(float("nan"), 0.5)) == ""
    assert "above" in heat(0.75, 0.5)
    assert "--heat:30%" in heat(0.75, 0.5)
    assert "below" in heat(0.25, 0.5)

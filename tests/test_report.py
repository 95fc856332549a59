import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from data.artifacts.html import flat
from data.artifacts.manifest import Manifest, describe, write_manifest
from data.artifacts.parquet_io import write_table
from evaluate.reporting import gallery, plots
from evaluate.reporting.label_facts import label_facts
from evaluate.reporting.report import latex, markdown
from tests.helpers_report import NASTY, NUMBER, finished_comparison, write_page


@pytest.fixture
def finished(tmp_path):
    return finished_comparison(tmp_path)


class Page(HTMLParser):
    """Every tag with its attributes, and the balance of those that must be closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_needs_no_network(finished):
    text = write_page(finished)
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            if value := attributes.get(name):
                assert value.startswith(("data:image/", "#")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", text)


def test_everything_can_be_reached_without_a_pointer(finished):
    """What scrolls has a name and the focus, links lead somewhere, nothing hides in a title."""
    page = Page(write_page(finished))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) >= 2
    assert {link.removeprefix("#") for link in links} <= ids
    scrolling = [a for _, a in page.tags if "scroll" in a.get("class", "").split()]
    assert len(scrolling) >= 3
    for attributes in scrolling:
        assert attributes["tabindex"] == "0"
        assert attributes["role"] == "region"
        assert attributes["aria-label"]
    assert not any("title" in attributes for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_a_missing_image_is_reported_on_the_page(finished):
    for path in finished[0].rglob("*.png"):
        path.unlink()
    page = write_page(finished)
    assert "image not found" in page
    assert "<img" not in page


def test_the_page_shows_the_labels_of_the_run(finished, tmp_path):
    folder = tmp_path / "labels" / "majority"
    votes = {"vote_a": [1, 1, -1, 0, None], "vote_b": [1, -1, -1, 1, 1]}
    human = [1.0, 0.0, 0.0, 0.5, None]  # agrees with a on 2 of 3, with b on 3 of 3
    table = pl.DataFrame(
        {**votes, "winner": [0, None, 1, 0, 0], "human": human},
        schema_overrides=dict.fromkeys(votes, pl.Int8),
    ).to_arrow()
    assert label_facts(folder) is None
    write_table(folder / "part-00000.parquet", table)
    counts = {"majority": 4, "tie": 1}
    files = [describe(folder / "part-00000.parquet")]
    write_manifest(folder, Manifest(kind="labels", settings={}, files=files, counts=counts))
    facts = label_facts(folder)
    assert (facts["pairs"], facts["decided"], facts["voters"]) == (5, 4, ["a", "b", "human"])
    assert facts["agreement"] == [[1, 2 / 3, 2 / 3], [2 / 3, 1, 1], [2 / 3, 1, 1]]
    words = " ".join(
        " ".join(
            Page(write_page((finished[0], finished[1] | {"labels": facts}, finished[2]))).words
        ).split()
    )
    assert "4 of 5 pairs have a winner: majority 4, tie 1." in words
    assert "66.7%" in words


def test_prompts_are_text_and_never_markup(finished):
    text = write_page(finished)
    assert "<script>" not in text
    assert any(NASTY in words for words in Page(text).words)


def test_the_page_shows_the_numbers(finished):
    words = " ".join(" ".join(Page(write_page(finished)).words).split())
    assert (
        "new is better than base on 1 of 2 voting metrics and worse on hps: not balanced." in words
    )
    assert "30 / 0 / 0" in words  # clip_1: all wins
    assert "0 / 0 / 30" in words  # hps: all losses
    assert "0 / 30 / 0" in words  # truth: all ties
    assert "50.0% average win rate of the voters" in words
    assert "0.0% of prompts better according to every voter" in words


def test_galleries_follow_their_rules(finished):
    folder, summary, scores = finished
    gains = np.linspace(-1, 1, NUMBER)  # both voters fall for the first half, rise for the second
    order = {i: float(g) for i, g in enumerate(gains)}
    base = scores.filter(pl.col("model") == "base")
    moved = base.with_columns(
        pl.lit("new").alias("model"),
        *[
            (pl.col(f"score_{m}") + pl.col("prompt_id").replace_strict(order)).cast(pl.Float32)
            for m in ("clip_1", "hps")
        ],
    )
    (comparison,) = summary["comparisons"]
    shown = gallery.galleries(pl.concat([base, moved]), folder, comparison, 3, seed=0)
    by_title = {g.title: [card.prompt.split()[-1] for card in g.cards] for g in shown}
    assert by_title["Best wins"] == ["29", "28", "27"]
    assert by_title["Worst losses"] == ["0", "1", "2"]
    assert "Metrics disagree" not in by_title
    assert len(by_title["Not chosen"]) == 3
    apart = gallery.galleries(scores, folder, comparison, 3, seed=0)
    assert "Metrics disagree" in {g.title for g in apart}


def test_random_pairs_are_the_same_each_time(finished):
    folder, summary, scores = finished
    (comparison,) = summary["comparisons"]
    one, two, other = (
        gallery.galleries(scores, folder, comparison, 5, seed)[0].cards for seed in (0, 0, 1)
    )
    assert one == two != other


def test_large_images_are_scaled_down_and_small_ones_kept(finished):
    folder, _, _ = finished
    large = gallery.inline(folder / "samples/base/00000-0.png")
    small = gallery.inline(folder / "samples/base/00001-0.png")
    assert large.startswith("data:image/jpeg;base64,")
    assert small.startswith("data:image/png;base64,")
    (folder / "torn.png").write_bytes(b"no image")
    assert gallery.inline(folder / "torn.png") == ""


def test_plots_are_valid_and_repeatable(finished):
    (comparison,) = finished[1]["comparisons"]
    for plot in (plots.forest, plots.changes):
        text = plot(comparison)
        ElementTree.fromstring(text)
        assert text == plot(comparison)
        assert "currentColor" in text
        assert plots.INK not in text
        for metric in ("clip_1", "hps", "truth"):
            assert metric in text


def test_training_curves_from_a_journal(tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert plots.training(journal) is None
    lines = [
        {
            "step": s,
            "loss": 0.69 - s / 100,
            "accuracy": 0.5,
            "policy_winner_error": 0.1,
            "policy_loser_error": 0.2,
        }
        for s in range(20)
    ]
    lines += [{"note": "no step"}, {"step": 21, "loss": None}, ["no record"]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 22, "lo')
    text = plots.training(journal)
    ElementTree.fromstring(text)
    for title in ("loss", "implicit accuracy", "denoising error", "winner", "loser"):
        assert f">{title}</text>" in text
    journal.write_text('{"step": 1, "other": 2}\n')
    assert plots.training(journal) is None


def test_the_page_shows_the_training_curves(finished, tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(json.dumps({"step": s, "loss": 0.6}) + "\n" for s in range(5)))
    assert '<h2 id="training">Training</h2>' in write_page(finished, journal)
    assert '<h2 id="training">Training</h2>' not in write_page(finished)


def test_categories_and_challenges_have_their_own_win_rates(finished):
    (comparison,) = finished[1]["comparisons"]
    breakdowns = {
        b["by"]: [(p["name"], p["prompts"]) for p in b["parts"]] for b in comparison["breakdowns"]
    }
    assert breakdowns == {
        "category": [("even", 15), ("odd", 15)],
        "challenge": [("few", 10), ("some", 10), ("many", 10)],
    }
    assert comparison["breakdowns"][1]["parts"][2]["rates"][0]["win_rate"]["value"] == 1.0
    page = write_page(finished)
    assert "Win rates by category" in page
    assert "Win rates by challenge" in page


def test_markdown_is_a_table_for_a_model_card(finished):
    text = markdown(finished[1])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| metric | role | win rate")
    assert "| clip_1 | voter | 100.0% |" in text
    assert finished[1]["prompts"]["sha256"][:12] in text


def test_latex_escapes_names(finished):
    text = latex(finished[1]["comparisons"])
    assert r"clip\_1 & 100.0 & [88.4, 100.0] & better \\" in text
    assert text.count(r"\\") == 4


def test_csv_is_the_parquet_file(finished):
    write_page(finished)
    rows = list(csv.DictReader((finished[0] / "winrates.csv").read_text().splitlines()))
    assert [row["metric"] for row in rows] == ["clip_1", "hps", "truth"]
    assert float(rows[0]["win_rate"]) == 1.0


def test_flat_settings():
    assert flat({"a": {"b": [1, 2], "c": None}}) == [("a.b", "1, 2"), ("a.c", "None")]


def test_the_distance_stands_beside_the_win_rates(finished):
    """Of one model in a section of its own, of several in the table of all models, too."""
    change = {"base": 0.25, "model": 0.5, "change": {"value": 0.25, "low": 0.2, "high": 0.3}}
    squared = {"value": 0.002, "low": 0.001, "high": 0.003}
    entry = {"squared_difference": squared, "base_error": 0.04, "fraction": 0.05}
    denoiser = {"predicts": "epsilon", "images": 3, "mean": entry}
    distance = {
        "saturation": change, "contrast": change, "diversity": change, "embedded_by": "clip_1",
        "denoiser": denoiser | {"levels": [{"noise": 0.1} | entry]},
    }  # fmt: skip
    folder, summary, scores = finished
    (one,) = summary["comparisons"]
    comparisons = [one | {"distance": distance}, one | {"model": "far", "distance": None}]
    page = write_page((folder, summary | {"comparisons": comparisons}, scores))
    words = " ".join(" ".join(Page(page).words).split())
    assert "Distance from base" in words
    assert "diversity, by clip_1 0.2500 0.5000 +0.2500 +0.2000 to +0.3000" in words
    assert "at noise 0.1 error 0.04 0.002, 5 % of the error 0.001 to 0.003" in words
    assert words.count("Distance from base: saturation 0.250 to 0.500") == 1
    assert "5 % balanced" in words or "5 % not balanced" in words
    assert "| saturation | 0.2500 | 0.5000 | +0.2500 |" in (folder / "report.md").read_text()

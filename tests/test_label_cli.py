"""`python -m label` from the outside: whole runs, interrupted runs, many ranks, bad inputs."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from data.artifacts.manifest import read_manifest, verify
from data.artifacts.schemas import labels
from label.analysis.agreement import metrics_of
from tests import helpers_label as tiny

ROOT = Path(__file__).parent.parent
NUM_PAIRS = 3 * 12 + 8
VOTERS = ("hps", "clip", "pickscore", "aesthetic")

Run = Callable[..., tuple[int | None, str]]


@pytest.fixture(scope="module")
def nursery() -> tiny.Nursery:
    return tiny.nursery()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.build_weights(root / "weights")
    tiny.build_pairs(root / "pairs")
    return root


@pytest.fixture
def run(nursery: tiny.Nursery, world: Path, tmp_path: Path) -> Run:
    """Run the program on the tiny world; `tmp_path/runs/tiny` is its folder."""

    def start(*more: str, **environment: str) -> tuple[int | None, str]:
        arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
        return nursery.run([*arguments, *more], tmp_path / "out.txt", **environment)

    return start


@pytest.fixture(scope="module")
def finished(nursery: tiny.Nursery, world: Path) -> tuple[Path, str]:
    """An undisturbed run's folder, and what it said."""
    arguments = tiny.overrides(world / "weights", world / "pairs", world / "runs")
    status, said = nursery.run(arguments, world / "out.txt")
    assert status == 0, said
    return world / "runs" / "tiny", said


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "runs" / "tiny"))


def read(folder: Path, vote: str = "majority") -> pl.DataFrame:
    return pl.read_parquet(folder / "labels" / vote / "part-*.parquet")


def numbers(line: str) -> list[int]:
    return [int(digits.replace("\u202f", "")) for digits in re.findall(r"\d[\d\u202f]*", line)]


# --- whole runs ----------------------------------------------------------------------------------


def test_labels_hold_every_pair_in_order(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    labelled = read(folder)
    assert labelled.columns == labels(VOTERS).names
    assert metrics_of(labelled) == list(VOTERS)
    assert labelled.height == labelled["pair_id"].n_unique() == NUM_PAIRS
    assert labelled["source"].to_list() == sorted(labelled["source"].to_list())
    for number in range(3):
        schema = pq.read_schema(folder / "labels" / "majority" / f"part-{number:05d}.parquet")
        assert schema.remove_metadata().equals(labels(VOTERS))
    for vote in VOTERS:
        gap = labelled[f"score_{vote}_0"] - labelled[f"score_{vote}_1"]
        assert (gap.sign() == labelled[f"vote_{vote}"]).all()
    assert labelled.filter(pl.col("status") != "ok")["winner"].is_null().all()
    assert labelled.filter(pl.col("status") != "ok")["reason"].str.len_chars().min() > 0


def test_manifest_and_printed_counts_add_up(finished: tuple[Path, str]) -> None:
    folder, said = finished
    manifest = read_manifest(folder / "labels" / "majority", "labels")
    assert manifest is not None
    verify(folder / "labels" / "majority", manifest)
    assert manifest.rows == sum(manifest.counts.values()) == NUM_PAIRS
    assert manifest.counts["unreadable_image"] == 4
    assert manifest.settings["vote"]["rule"] == "majority"
    assert manifest.settings["metrics"]["hps"]["preprocessing"]["antialias"] is True
    assert [len(source["sha256"]) for source in manifest.sources] == [64] * 3
    scored = next(line for line in said.splitlines() if line.startswith("scored "))
    assert scored == f"scored 38 · unreadable image 4 · empty prompt 2 · total {NUM_PAIRS}"
    decided = next(line for line in said.splitlines() if line.startswith("decided "))
    *parts, total = numbers(re.sub(r"\(.*?\)", "", decided))
    assert sum(parts) == total == NUM_PAIRS
    assert re.search(r"load [\d.]+ s · read .* · decode .* · embed .* · score .* · write", said)
    for name in VOTERS:
        assert read_manifest(folder / "scores" / name, name) is not None


def test_a_finished_run_answers_without_touching_a_file(run: Run, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    status, said = run()
    assert status == 0
    assert f"total {NUM_PAIRS}" in said
    assert "scoring pairs" not in said
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_voting_again_needs_no_image_and_no_model(run: Run, copy: Path) -> None:
    for vote in ("random", "zscore_sum", "majority_human"):
        status, said = run(f"vote={vote}")
        assert status == 0, said
        assert "scoring pairs" not in said
        labelled = read(copy, vote)
        assert labelled["pair_id"].equals(read(copy)["pair_id"])
        assert labelled["winner"].is_not_null().any()
    status, said = run("vote=random", "seed=1")
    assert status == 2
    assert "seed: found 0, now 1" in said
    assert "vote.name" in said


def test_new_voter_scores_only_itself(run: Run, copy: Path) -> None:
    more = ["metrics.aesthetic.tie=0.1", "vote.name=three", "panel.voters=[hps,clip,pickscore]"]
    shutil.rmtree(copy / "scores" / "pickscore")
    before = {p: p.stat().st_mtime_ns for p in (copy / "scores").rglob("*") if p.is_file()}
    expected = read(copy)
    status, said = run(*more)
    assert status == 0, said
    after = {p: p.stat().st_mtime_ns for p in before}
    assert after == before
    assert read(copy, "three")["score_pickscore_0"].equals(expected["score_pickscore_0"])
    assert metrics_of(read(copy, "three")) == ["hps", "clip", "pickscore"]


def test_inspect_writes_a_report_that_carries_its_images(run: Run, copy: Path, world: Path) -> None:
    status, said = run("label.inspect=true")
    assert status == 0, said
    assert "Krippendorff's alpha" in said
    html = (copy / "labels" / "majority" / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 4
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    for title in ("Unanimous", "Split", "Flipped", "Each voter", "Without one of the voters"):
        assert title in html
    (copy / "labels" / "majority" / "manifest.json").unlink()
    status, said = run("label.inspect=true")
    assert status == 2
    assert "is not complete; run `make labels` first" in said


# --- interrupted runs and many ranks -------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_make_the_files_that_one_makes(
    num_ranks: int,
    nursery: tiny.Nursery,
    world: Path,
    finished: tuple[Path, str],
    tmp_path: Path,
) -> None:
    arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
    processes = [
        nursery.start(
            arguments, tmp_path / f"out-{rank}.txt",
            RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank),
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    statuses = [process.wait() for process in processes]
    said = [(tmp_path / f"out-{rank}.txt").read_text() for rank in range(num_ranks)]
    assert statuses == [0] * num_ranks, said
    assert tiny.hashes(tmp_path / "runs" / "tiny") == tiny.hashes(finished[0])
    assert f"total {NUM_PAIRS}" in said[0]
    assert not any(said[1:])  # only the first rank votes and prints


@pytest.mark.ranks
@pytest.mark.slow
def test_the_others_do_the_shards_of_a_killed_rank(
    nursery: tiny.Nursery, world: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
    out = [tmp_path / f"out-{rank}.txt" for rank in range(3)]
    scores = tmp_path / "runs" / "tiny" / "scores"
    victim = nursery.start(arguments, out[1], RANK="1", WORLD_SIZE="3", LOCAL_RANK="1")
    while not list(scores.rglob("part-*.parquet")):  # alone, so it is its own shard
        assert victim.wait(0.002) is None
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert "part-00001.parquet" in {path.name for path in scores.rglob("part-*.parquet")}
    others = [
        nursery.start(arguments, out[r], RANK=str(r), WORLD_SIZE="3", LOCAL_RANK=str(r))
        for r in (0, 2)
    ]
    assert [process.wait() for process in others] == [0, 0], [path.read_text() for path in out]
    assert tiny.hashes(tmp_path / "runs" / "tiny") == tiny.hashes(finished[0])


@pytest.mark.ranks
def test_ranks_that_never_come_are_not_waited_for(
    run: Run, finished: tuple[Path, str], tmp_path: Path
) -> None:
    status, said = run(RANK="1", WORLD_SIZE="4")
    assert (status, said) == (0, "")
    status, said = run(
        SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="0", SLURM_STEP_NODELIST="node1"
    )
    assert status == 0, said
    assert tiny.hashes(tmp_path / "runs" / "tiny") == tiny.hashes(finished[0])


# --- bad inputs: one message, status 1, before any weight is loaded ------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["pairs.root=/no/such"], "pairs.root=/no/such is not a folder"),
        (["metrics.clip.weights=/no/clip"], "metrics.clip.weights=/no/clip: no such folder"),
        (["panel.voters=[hps,clipp]"], "did you mean clip?"),
        (["vote.rule=at_least", "vote.votes=9"], "can never be reached by 4 voters"),
        (["label.batch=0"], "label.batch=0; it must be at least 1"),
        (["label.device=tpu"], "label.device='tpu'"),
        (["label.devise=cpu"], "did you mean label.device?"),
        (["label.patience_s=60"], "label.patience_s is gone: no process waits"),
        (["label.pictures=3"], "label.pictures is now label.gallery_pairs"),
        (["metrics.clip.kind=clap"], "metrics.clip.kind=clap is unknown; did you mean clip?"),
        (["metrics.clip.kind=no.such"], "metrics.clip.kind=no.such cannot be imported"),
        (["metrics.clip.kind=label.config"], "the module defines no METRIC"),
        (
            ["panel.voters=[oracle]", "panel.oracle=[]"],
            "panel.voters has oracle: the oracle judges, it never votes",
        ),
    ],
)
def test_mistakes_are_explained(run: Run, more: list[str], message: str, tmp_path: Path) -> None:
    status, said = run(*more)
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert not list((tmp_path / "runs").rglob("*.parquet"))


def test_pair_file_without_needed_columns(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pairs" / "train-00000.parquet"
    tiny.write_pairs(path, tiny.good_rows(2), drop=("caption", "jpg_1"))
    status, said = run(f"pairs.root={tmp_path}/pairs")
    assert status == 2
    assert "lacks the columns caption, jpg_1" in said


def test_no_decidable_pair(run: Run, tmp_path: Path) -> None:
    rows = [tiny.Row("a prompt", tiny.image(1), tiny.image(1)), *tiny.broken_rows()]
    tiny.write_pairs(tmp_path / "pairs" / "train-00000.parquet", rows)
    status, said = run(f"pairs.root={tmp_path}/pairs")
    assert status == 2
    assert "none of the 7 pairs can be decided (4 unreadable_image, 2 empty_prompt, 1 tie)" in said


def test_other_vote_in_the_same_folder_is_refused_before_anything_is_scored(
    run: Run, copy: Path
) -> None:
    shutil.rmtree(copy / "scores" / "hps")
    status, said = run("vote.rule=unanimous")
    assert status == 2
    assert "vote.rule: found majority, now unanimous" in said
    assert not (copy / "scores" / "hps").exists()


def test_scores_of_other_settings_are_refused(run: Run, copy: Path) -> None:
    shutil.rmtree(copy / "labels")
    status, said = run("metrics.hps.antialias=false")
    assert status == 2
    assert "preprocessing.antialias: found True, now False" in said


@pytest.mark.parametrize(
    "what", ["scores/hps/part-00001.parquet", "labels/majority/part-00002.parquet"]
)
def test_torn_files_are_named_with_what_to_do(run: Run, copy: Path, what: str) -> None:
    path = copy / what
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if what.startswith("scores"):
        shutil.rmtree(copy / "labels")
    status, said = run()
    assert status == 2
    assert path.name in said
    assert "delete it" in said
    path.unlink()
    if what.startswith("labels"):
        (path.parent / "manifest.json").unlink()
    status, said = run()
    assert status == 0, said


def test_flipped_bit_in_a_score_is_found(run: Run, copy: Path) -> None:
    shutil.rmtree(copy / "labels")
    path = copy / "scores" / "clip" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).dictionary_page_offset
    content[start + 60] ^= 1
    path.write_bytes(bytes(content))
    status, said = run()
    assert status == 2
    assert "clip/part-00000.parquet has other bytes than manifest.json says" in said
    (path.parent / "manifest.json").unlink()  # where nothing is known of it, the page's checksum is
    status, said = run()
    assert status == 2
    assert "clip/part-00000.parquet cannot be read" in said

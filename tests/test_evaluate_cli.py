"""`python -m evaluate` from the command line to the report, on tiny random models."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from conf.job import entry
from data.artifacts import schemas
from data.artifacts.atomic import sha256_of
from data.miniature import scenes
from evaluate import run as program
from evaluate import steps
from label.metrics.oracle import METRIC
from tests.helpers_evaluate import SIDE, FakePanel, write_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TINY = [
    f"model.resolution={SIDE}", "evaluate.steps=2", "evaluate.batch=4", "evaluate.guidance=1.5",
    "evaluate.resamples=200", "evaluate.gallery_pairs=2", "evaluate.device=cpu", "prompts=lines",
    "evaluate.distance_images=0",
]  # fmt: skip
JUDGES = ("hps", "clip", "pickscore", "aesthetic", "held_out", "oracle")


class Panel(FakePanel):
    """The configured judges' names on the fake panel's scores."""

    loaded = 0

    @classmethod
    def load(cls, specs, device):
        assert tuple(specs) == JUDGES or len(specs) == 1  # one, to ask if it embeds images
        Panel.loaded += len(specs) > 1
        return cls()

    metrics = dict.fromkeys(JUDGES)

    @property
    def names(self):
        return JUDGES

    def score(self, images, prompts, *, batch=64, workers=0):
        rows = [self._row(image) for image in images]
        return {
            name: pl.Series([row[i % 4] for row in rows]).to_numpy()
            for i, name in enumerate(JUDGES)
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [write_tiny_model(root / name, seed) for seed, name in enumerate(("base", "trained"))]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, models):
    """Of a run in a folder that every test finds anew, with a prompt file."""
    root = tmp_path_factory.mktemp("world")
    one, two, three, four, five = scenes.prompts("test")[:5]  # which the oracle can read
    lines = (one, two, three, "", one, four, five, "")
    (root / "prompts.txt").write_text("\n".join(lines))
    return [
        f"runs={root / 'runs'}", "run=r", f"evaluate.prompts.path={root / 'prompts.txt'}",
        f"model.path={models[0]}", *TINY,
    ]  # fmt: skip


def runs_of(arguments):
    return Path(arguments[0].partition("=")[2])


def begin(arguments, models):
    """Nothing but a trained pipeline."""
    shutil.rmtree(runs_of(arguments), ignore_errors=True)
    pipeline = runs_of(arguments) / "r" / "train" / "pipeline"
    pipeline.parent.mkdir(parents=True)
    pipeline.symlink_to(models[1])


@pytest.fixture
def world(arguments, models, monkeypatch):
    """A run folder with a trained pipeline, and judges; returns the run's arguments."""
    monkeypatch.setattr("label.scoring.panel.Panel", Panel)
    monkeypatch.setattr(Panel, "loaded", 0)
    begin(arguments, models)
    return arguments


@pytest.fixture(scope="module")
def evaluated_runs(arguments, models, tmp_path_factory):
    """The run folders after the comparison."""
    begin(arguments, models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("label.scoring.panel.Panel", Panel)
        evaluate(patch, *arguments)
    return shutil.move(runs_of(arguments), tmp_path_factory.mktemp("evaluated") / "runs")


@pytest.fixture
def evaluated(evaluated_runs, world):
    """The same when the comparison has ended."""
    shutil.rmtree(runs_of(world))
    shutil.copytree(evaluated_runs, runs_of(world), symlinks=True)
    return world


def evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    entry(program.main)()


def refused(monkeypatch, capsys, *arguments):
    """Run a command that must be refused; returns the message."""
    with pytest.raises(SystemExit) as ended:
        evaluate(monkeypatch, *arguments)
    assert ended.value.code not in (0, None)
    return capsys.readouterr().err + str(ended.value)


def folder_of(world):
    return runs_of(world) / "r" / "evaluate"


def test_from_nothing_to_the_report_and_again(world, monkeypatch, capsys):
    evaluate(monkeypatch, *world)
    printed, folder = capsys.readouterr().out, folder_of(world)
    assert "prompts 5 · empty 1 · repeated 1 · total 7" in printed
    assert "average" in printed
    assert str(folder / "report.html") in printed
    assert len(list((folder / "samples").rglob("*.png"))) == 10

    rates = pl.read_parquet(folder / "winrates.parquet")
    assert rates.columns == schemas.WIN_RATES.names
    assert rates["metric"].to_list() == list(JUDGES)
    assert rates["role"].to_list() == ["voter"] * 4 + ["held_out", "oracle"]
    summary = json.loads((folder / "winrates.json").read_text())
    (comparison,) = summary["comparisons"]
    for row, rate in zip(rates.to_dicts(), comparison["rates"], strict=True):
        assert row["win_rate"] == rate["win_rate"]["value"]
        assert f"{row['win_rate']:.1%}" in printed
        assert row["wins"] + row["ties"] + row["losses"] == 5
    for name in ("report.html", "report.md", "winrates.csv", "winrates.tex", "judges.json"):
        assert (folder / name).stat().st_size > 100

    # again: the same output, nothing sampled, scored or written
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    evaluate(monkeypatch, *world)
    again = capsys.readouterr().out
    assert again in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert Panel.loaded == 1


def test_an_interrupted_run_ends_with_the_same_files(evaluated, monkeypatch):
    folder = folder_of(evaluated)
    names = ("scores.parquet", "winrates.parquet", "winrates.json", "winrates.csv", "report.md")
    whole = {name: (folder / name).read_bytes() for name in names}
    for name in names[:3]:
        (folder / name).unlink()
    for image in sorted((folder / "samples").rglob("*.png"))[2:7]:
        image.unlink()
    evaluate(monkeypatch, *evaluated)
    for name, content in whole.items():
        assert (folder / name).read_bytes() == content, name


def test_statistics_are_made_again_without_models(evaluated, monkeypatch):
    scored = (folder_of(evaluated) / "scores.parquet").stat().st_mtime_ns
    evaluate(monkeypatch, *evaluated, "evaluate.resamples=50")
    assert Panel.loaded == 0
    assert (folder_of(evaluated) / "scores.parquet").stat().st_mtime_ns == scored
    summary = json.loads((folder_of(evaluated) / "winrates.json").read_text())
    assert summary["protocol"]["resamples"] == 50


def test_scores_alone_are_enough_for_new_statistics(evaluated, monkeypatch, tmp_path, capsys):
    """As on another machine: no model, no weights, no images; only what scoring left."""
    shutil.rmtree(folder_of(evaluated) / "samples")
    (folder_of(evaluated) / "scores" / "base.parquet").unlink()
    gone = ["model.path=gone", "evaluate.scores_only=true", "evaluate.resamples=50",
            "metrics.clip.weights=gone", "metrics.hps.weights=gone"]  # fmt: skip
    before = json.loads((folder_of(evaluated) / "winrates.json").read_text())["comparisons"][0]
    monkeypatch.setattr("generate.sampler.ImageGenerator.load", None)
    capsys.readouterr()
    evaluate(monkeypatch, *evaluated, *gone)
    assert "average" in capsys.readouterr().out
    summary = json.loads((folder_of(evaluated) / "winrates.json").read_text())
    assert summary["protocol"]["resamples"] == 50
    for old, new in zip(before["rates"], summary["comparisons"][0]["rates"], strict=True):
        assert old["win_rate"]["value"] == new["win_rate"]["value"]
        assert old["p_value"] == new["p_value"]
    said = refused(monkeypatch, capsys, *evaluated, *gone, "evaluate.base=other")
    assert "allowed: base, balanceddpo" in said
    renamed = ["+metric@metrics.more=miniature_oracle", "panel.held_out=[more]"]
    assert "has no scores of more; it has aesthetic, clip" in refused(
        monkeypatch, capsys, *evaluated, *gone, *renamed
    )
    said = refused(monkeypatch, capsys, *evaluated, *gone, "evaluate.folder=never")
    assert "never/scores.parquet does not exist" in said


def test_a_model_that_has_been_scored_is_not_scored_again(world, models, monkeypatch):
    named = [f"+evaluate.models.{n}={models[i]}" for n, i in (("one", 0), ("two", 1))]
    evaluate(monkeypatch, *world, *named, "evaluate.base=one")
    files = sorted((folder_of(world) / "scores").glob("*.parquet"))
    assert [file.stem for file in files] == ["one", "two"]
    before = {file: file.stat().st_mtime_ns for file in files}
    more = f"+evaluate.models.three={models[1]}"
    evaluate(monkeypatch, *world, *named, more, "evaluate.base=one")
    assert {file: file.stat().st_mtime_ns for file in files} == before
    scores = pl.read_parquet(folder_of(world) / "scores.parquet")
    assert scores["model"].unique(maintain_order=True).to_list() == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("models.ours=runs/a/pipeline", "++evaluate.models.ours=runs/a/pipeline"),
        ("evaluate.models.ours=a", "++evaluate.models.ours=a"),
        ("+evaluate.models.ours=a", "+evaluate.models.ours=a"),
        ("model.path=models.x", "model.path=models.x"),
    ],
)
def test_models_are_named_on_the_command_line(argument, meant):
    assert program.expanded(argument) == meant


def test_more_seeds_keep_the_images_that_are_there(evaluated, monkeypatch):
    images = {p: p.stat().st_mtime_ns for p in folder_of(evaluated).rglob("*.png")}
    evaluate(monkeypatch, *evaluated, "evaluate.seeds=2")
    now = {p: p.stat().st_mtime_ns for p in folder_of(evaluated).rglob("*.png")}
    assert len(now) == 2 * len(images)
    assert {path: now[path] for path in images} == images
    (row, *_) = pl.read_parquet(folder_of(evaluated) / "winrates.parquet").to_dicts()
    assert (row["prompts"], row["seeds"]) == (5, 2)
    assert row["wins"] + row["ties"] + row["losses"] == 10


def test_images_of_another_comparison_are_linked(evaluated, monkeypatch, capsys):
    """Those alone that were made with the same settings, of which nothing is sampled."""
    first, reuse = folder_of(evaluated), f"evaluate.reuse={folder_of(evaluated)}"
    (first / "samples" / "base" / "settings.json").write_text('{"steps": 3}')
    sampled, sample = [], steps.sample_model
    monkeypatch.setattr(
        steps, "sample_model", lambda plan, model, *rest: sampled.append(model.name)
        or sample(plan, model, *rest),
    )  # fmt: skip
    evaluate(monkeypatch, *evaluated, reuse, "evaluate.folder=second")
    second = first.with_name("second")
    links = {
        name: {image.stat().st_nlink for image in (second / "samples" / name).glob("*.png")}
        for name in ("base", "balanceddpo")
    }
    assert links == {"base": {1}, "balanceddpo": {2}}
    assert sampled == ["base"]
    assert f"5 images of balanceddpo are those of {first}" in capsys.readouterr().out
    images = (sorted((folder / "samples").rglob("*.png")) for folder in (first, second))
    for one, other in zip(*images, strict=True):
        assert one.read_bytes() == other.read_bytes()
    said = refused(monkeypatch, capsys, *evaluated, f"{reuse}x", "evaluate.folder=third")
    assert f"{reuse}x is no folder of a comparison" in said
    assert "give one, as runs/<run>/evaluate, or leave it out" in said


def test_other_settings_are_refused_and_named(evaluated, monkeypatch, capsys):
    assert "steps: found 2, now 3" in refused(monkeypatch, capsys, *evaluated, "evaluate.steps=3")
    evaluate(monkeypatch, *evaluated, "evaluate.steps=3", "evaluate.folder=evaluate-3")
    assert (folder_of(evaluated).with_name("evaluate-3") / "report.html").exists()


@pytest.mark.parametrize(("balance", "status"), [("not balanced", 3), ("balanced", None)])
def test_a_script_can_stop_at_a_loss(evaluated, monkeypatch, balance, status):
    path = folder_of(evaluated) / "winrates.json"
    summary = json.loads(path.read_text())
    summary["comparisons"][0]["balance"] = balance
    path.write_text(json.dumps(summary))
    evaluate(monkeypatch, *evaluated)
    gate = "evaluate.fail_when_worse=true"
    if status is None:
        evaluate(monkeypatch, *evaluated, gate)
    else:
        with pytest.raises(SystemExit) as ended:
            evaluate(monkeypatch, *evaluated, gate)
        assert ended.value.code == status


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run=untrained", r"runs/untrained/train/pipeline is no folder; run `make train`"),
        ("model.path=nowhere", r"model 'base': nowhere is no folder; model\.path takes"),
        ("evaluate.prompts.path=nowhere", r"evaluate\.prompts\.path=nowhere is no file"),
        (
            "+evaluate.models.base='some/where@main'",
            r"'base': some/where has revision 'main'; give the 40-digit commit",
        ),
        ("+evaluate.models.base=nowhere", r"'base': nowhere is no folder; evaluate\.models"),
        ("metrics.clip.weights=nowhere", r"metrics\.clip\.weights=nowhere"),
        ("metrics.aesthetic.head=nowhere", r"metrics\.aesthetic\.head=nowhere"),
        ("evaluate.seeds=0", r"evaluate\.seeds=0; it must be at least 1"),
        ("evaluate.folder=a/b", r"evaluate\.folder has the name 'a/b'"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(world, monkeypatch, capsys, change, message):
    monkeypatch.setattr("generate.sampler.ImageGenerator.load", None)
    assert re.search(message, refused(monkeypatch, capsys, *world, change))


@pytest.fixture
def strange(world, tmp_path):
    """The same comparison on prompts of which the oracle cannot read two."""
    path = tmp_path / "strange.txt"
    path.write_text(f"{scenes.prompts('test')[0]}\nred cat\na dog\n")
    return [*world, f"evaluate.prompts.path={path}"]


def test_judges_are_asked_before_anything_is_sampled(strange, monkeypatch, capsys):
    monkeypatch.setattr("generate.sampler.ImageGenerator.load", None)
    message = refused(monkeypatch, capsys, *strange)
    assert "oracle cannot judge 2 of the 3 prompts of lines: 'red cat' is not a prompt" in message
    assert "evaluate.unreadable=leave_out, or take it out of panel.oracle" in message
    assert not (folder_of(strange) / "samples").exists()


def test_a_judge_that_cannot_read_the_prompts_may_be_left_out(strange, monkeypatch, capsys):
    without = [name for name in JUDGES if name != "oracle"]
    monkeypatch.setattr(sys.modules[__name__], "JUDGES", tuple(without))
    evaluate(monkeypatch, *strange, "evaluate.unreadable=leave_out")
    assert "left out: oracle cannot judge 2 of the 3 prompts" in " ".join(
        capsys.readouterr().out.split()
    )
    rates = pl.read_parquet(folder_of(strange) / "winrates.parquet")
    assert rates["metric"].to_list() == without


def test_somebody_must_be_able_to_read_the_prompts(strange, monkeypatch, capsys):
    alone = ("panel.voters=[clip]", "panel.held_out=[]", "panel.oracle=[oracle]")
    monkeypatch.setattr("label.metrics.clip.METRIC", METRIC)
    message = refused(monkeypatch, capsys, *strange, *alone, "evaluate.unreadable=leave_out")
    assert "no judge is left: clip cannot judge 2 of the 3 prompts" in message


def test_weights_are_hashed_once_for_both_stages(world, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "data.artifacts.fingerprints.sha256_of",
        lambda path: (hashed.append(path), sha256_of(path))[1],
    )
    evaluate(monkeypatch, *world)
    memory = folder_of(world).parent / "scores" / "weights.json"
    assert sorted(str(path.resolve()) for path in hashed) == sorted(json.loads(memory.read_text()))
    first = len(hashed)
    assert first > 4
    evaluate(monkeypatch, *world)
    assert len(hashed) == first
    settings = json.loads((folder_of(world) / "winrates.json").read_text())["settings"]
    name = "data/miniature/weights/aesthetic/model.safetensors"
    assert sha256_of(ROOT / name) in json.dumps(settings)


def test_an_unknown_base_names_the_models(world, models, monkeypatch, capsys):
    named = [f"+evaluate.models.one={models[0]}", f"+evaluate.models.two={models[1]}"]
    said = refused(monkeypatch, capsys, *world, *named, "evaluate.base=oen")
    assert re.search(r"'oen' in evaluate\.base; did you mean one\?.*one, two", said)
    assert "only 'one'" in refused(monkeypatch, capsys, *world, named[0], "evaluate.base=one")


def test_several_models_are_each_compared_with_the_base(world, models, monkeypatch):
    named = [f"+evaluate.models.{n}={models[i]}" for n, i in (("one", 0), ("two", 1), ("same", 0))]
    evaluate(monkeypatch, *world, *named, "evaluate.base=one")
    rates = pl.read_parquet(folder_of(world) / "winrates.parquet")
    assert rates["model"].to_list() == ["two"] * 6 + ["same"] * 6
    same = rates.filter(pl.col("model") == "same")
    assert same["ties"].to_list() == [5] * 6  # equal weights, equal noise: equal images
    assert same["p_value"].to_list() == [1.0] * 6
    page = (folder_of(world) / "report.html").read_text()
    assert page.count("<section>") == 2
    assert "<h2>All models</h2>" in page
    assert 'href="#model-2"' in page


@pytest.mark.parametrize("ranks", [(1, 0), (0,)], ids=["all", "the first alone"])
def test_two_ranks_end_with_the_scores_of_one(evaluated, monkeypatch, ranks):
    """They meet on disk alone; the first one samples what one that died has left."""
    one = pl.read_parquet(folder_of(evaluated) / "scores.parquet")
    for rank in ranks:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        evaluate(monkeypatch, *evaluated, "evaluate.folder=together")
        done = (folder_of(evaluated).with_name("together") / "scores.parquet").exists()
        assert done == (rank == 0)
    two = pl.read_parquet(folder_of(evaluated).with_name("together") / "scores.parquet")
    assert two.equals(one)


def test_every_rank_scores_its_share(world, monkeypatch):
    """What the other rank has scored, the first one reads."""
    scored = []
    score = Panel.score
    monkeypatch.setattr(Panel, "score", lambda *a, **k: scored.append(len(a[1])) or score(*a, **k))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    evaluate(monkeypatch, *world)
    assert scored == [2, 2]  # of five prompts, for two models
    assert len(list((folder_of(world) / "scores").glob("*/1-of-2.parquet"))) == 2
    monkeypatch.setenv("RANK", "0")
    evaluate(monkeypatch, *world)
    assert scored == [2, 2, 3, 3]
    assert pl.read_parquet(folder_of(world) / "scores.parquet").height == 10
    assert not list((folder_of(world) / "scores").glob("*/*.parquet"))


def test_only_the_first_rank_reports(evaluated, monkeypatch):
    (folder_of(evaluated) / "winrates.json").unlink()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    evaluate(monkeypatch, *evaluated)
    assert not (folder_of(evaluated) / "winrates.json").exists()


def test_a_finished_run_answers_without_torch(evaluated, monkeypatch, capsys):
    """In a fresh process, as `make eval` does it the second time."""
    evaluate(monkeypatch, *evaluated)
    first = capsys.readouterr().out
    code = (
        "import runpy, sys; sys.argv[0] = 'evaluate'\n"
        "runpy.run_module('evaluate', run_name='__main__')\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *evaluated],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.splitlines()[0] in first

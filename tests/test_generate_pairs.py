"""`python -m generate` on a tiny model: the files, whatever stops it, and by however many ranks."""

import errno
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from conf.job import Job, composed
from data.artifacts import atomic
from data.artifacts.atomic import ShardError
from data.artifacts.schemas import OWN_PAIRS
from data.devices import Dtype
from data.images import Size, decode, to_pixels
from data.pairs import open_pairs
from evaluate.run import main as evaluate_main
from generate.config import ImageFormat, Scheduler
from generate.image_files import Model, SamplesError
from generate.pair_set import image_maker
from generate.pair_set.progress import ImageCount
from generate.run import main, plan_of
from generate.sampler import ImageGenerator
from label.run import main as label_main
from tests import helpers_docs as docs
from tests.helpers_evaluate import SIDE, write_tiny_model
from tests.helpers_label import build_weights, specs
from tests.helpers_ranks import be_module, run_module, run_ranks, start_module

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("red cat", "a dog", "big tree", "moon", "hat on cat")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and a set that nothing interrupted: `runs/whole`."""
    root = tmp_path_factory.mktemp("world")
    write_tiny_model(root / "model", seed=0)
    (root / "prompts.txt").write_text("\n".join(WORDS))
    (root / "test.txt").write_text("sun")
    torch.set_num_threads(1)
    main(composed(settings(root, "whole")))
    return root


def settings(world: Path, run: str, *more: str) -> list[str]:
    return [
        "pairs=own", f"runs={world}/runs", f"run={run}", f"model.path={world}/model",
        f"model.resolution={SIDE}", f"generate.prompts.path={world}/prompts.txt",
        "prompts=lines", f"evaluate.prompts.path={world}/test.txt", "generate.device=cpu",
        "generate.images=3", "generate.steps=[2,3]", "generate.guidance=[1.5,1.5,3]",
        "generate.batch=2", "generate.shard_prompts=2", *more,
    ]  # fmt: skip


@pytest.fixture
def job(world: Path, request: pytest.FixtureRequest) -> Job:
    """The settings of the whole set, in a run of the test's own."""
    whole = composed_once(world)
    name = request.node.name.partition("[")[0]
    pairs = replace(whole.pairs, root=f"{world}/runs/{name}/pairs")
    return replace(whole, run=name, pairs=pairs)


COMPOSED: dict[Path, Job] = {}


def composed_once(world: Path) -> Job:
    return COMPOSED.setdefault(world, composed(settings(world, "whole")))


def files(job: Job) -> dict[str, bytes]:
    """What a finished set has, by name; but for the time of its making, nothing else is there."""
    folder = job.folder / "pairs"
    content = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    assert {path.name for path in folder.iterdir()} == {*content, "manifest.json", "settings.json"}
    return content


def same_as_whole(job: Job, world: Path) -> bool:
    return files(job) == files(composed_once(world))


# --- the files -----------------------------------------------------------------------------------


def test_a_set_has_pick_a_pics_columns_and_what_made_each_image(world: Path) -> None:
    whole = composed_once(world)
    paths = sorted((whole.folder / "pairs").glob("*.parquet"))
    assert [path.name for path in paths] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert all(pq.read_schema(path).equals(OWN_PAIRS) for path in paths)
    rows = pl.concat([pl.read_parquet(path) for path in paths])
    assert rows["caption"].to_list() == [word for word in WORDS for _ in range(3)]
    assert rows["__index_level_0__"].to_list() == list(range(15))
    assert set(rows["status"]) == {"ok"}
    assert not rows["has_label"].any()
    assert rows["label_0"].null_count() == rows["best_image_uid"].null_count() == 15
    first = rows.row(2, named=True)  # images 1 and 2 of the first prompt
    assert [first[f"seed_{side}"] for side in (0, 1)] == [1_000_001, 1_000_002]
    assert [first[f"steps_{side}"] for side in (0, 1)] == [3, 2]
    assert [first[f"guidance_{side}"] for side in (0, 1)] == [1.5, 3]
    assert first["fingerprint_0"] == Model(name="base", path=f"{world}/model").fingerprint()
    by_image = {
        (row[f"image_{side}_uid"], row[f"jpg_{side}"]) for row in rows.to_dicts() for side in (0, 1)
    }
    assert len(by_image) == len({uid for uid, _ in by_image}) == 15  # an image has one name


def test_an_image_is_what_the_sampler_makes_of_prompt_and_seed(world: Path) -> None:
    whole = composed_once(world)
    generator = ImageGenerator.load(
        Model(name="base", path=f"{world}/model"), torch.device("cpu"), scheduler=Scheduler.ddim,
        dtype=Dtype.fp32, size=Size(SIDE, SIDE), steps=2, guidance=3.0,
    )  # fmt: skip
    row = pl.read_parquet(whole.folder / "pairs" / "train-00001-of-00003.parquet").row(
        1, named=True
    )
    image = to_pixels(decode(row["jpg_1"])).astype(int)
    assert row["caption"] == "big tree"
    assert np.abs(generator.sample(["big tree"], [1_000_002])[0] - image).max() <= 1


def test_the_set_is_read_as_any_other(world: Path) -> None:
    source = open_pairs(composed_once(world).pairs)
    tables = [table for shard in source.shards for table in source.read(shard)]
    assert sum(table.num_rows for table in tables) == 15
    assert tables[0]["human"].null_count == tables[0].num_rows
    assert tables[0]["generator_0"].to_pylist() == ["base"] * tables[0].num_rows


@pytest.mark.parametrize(("name", "ending"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_formats(name: str, ending: str, job: Job) -> None:
    spec = replace(job.generate, format=ImageFormat(name), quality=50)
    plan = plan_of(replace(job, generate=spec))
    assert plan.images_of(0, plan.prompts.prompts[0])[0].path.suffix == f".{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    content = image_maker.encoder(spec)(pixels)
    assert np.array_equal(to_pixels(decode(content)), pixels) == (name != "jpeg")
    if name == "jpeg":
        assert len(content) < len(image_maker.encoder(replace(spec, quality=95))(pixels))


# --- what stops it -------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a signal would."""


def stopping_after(batches: int, error: BaseException) -> Callable[..., object]:
    """`ImageGenerator.sample_with_flags`, which fails after some batches."""
    calls, sample = [], ImageGenerator.sample_with_flags

    def stop(self: ImageGenerator, *args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) > batches:
            raise error
        return sample(self, *args, **kwargs)

    stop.calls = calls
    return stop


def test_an_interrupted_set_resumes_at_the_batch_and_ends_with_the_same_bytes(
    job: Job, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(job)
    stop = stopping_after(5, Killed())
    monkeypatch.setattr(ImageGenerator, "sample_with_flags", stop)
    with pytest.raises(Killed):
        main(job)
    assert plan.shard(0).exists()
    assert plan.num_done(1) > 0
    assert ImageCount(plan).done() == plan.num_done(0) + plan.num_done(1)
    image = next(image for image in plan.images_of(1, plan.prompts_of(1)[0]) if image.path.exists())
    (image.path.parent / f".{image.path.name}.0a1b2c3d-99").write_bytes(b"half")  # a killed process
    monkeypatch.undo()
    again = stopping_after(99, Killed())
    monkeypatch.setattr(ImageGenerator, "sample_with_flags", again)
    main(job)
    assert len(again.calls) == len(all_batches(plan)) - 5
    assert same_as_whole(job, world)


def all_batches(plan: object) -> list[object]:
    return [batch for block in range(plan.num_blocks) for batch in plan.batches(block, "base")]


def test_a_full_disk_loses_nothing_and_is_told(
    job: Job, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes: at an image, or at a file of pairs."""
    plan, publish = plan_of(job), atomic.publish
    for room, last in ((3, "png"), (9, "parquet")):
        written: list[Path] = []

        def full(partial: Path, path: Path, **more: bool) -> None:
            written.append(path)  # noqa: B023
            if len(written) > room and path.suffix == f".{last}":  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            publish(partial, path, **more)

        monkeypatch.setattr(atomic, "publish", full)
        before = ImageCount(plan).done()
        with pytest.raises(ShardError, match=rf"{last} cannot be written.*free some space"):
            main(job)
        assert ImageCount(plan).done() > before
    monkeypatch.undo()
    main(job)
    assert same_as_whole(job, world)


def test_a_finished_set_loads_nothing_and_a_lost_file_is_made_again(
    job: Job, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(composed_once(world).folder, job.folder)
    monkeypatch.setattr(image_maker.ImageMaker, "load", None)
    (job.folder / "pairs" / "images" / "00000").mkdir(parents=True)  # killed while it removed them
    main(job)
    assert len(files(job)) == 3
    said = "5 prompts · 15 images · ok 15 · not finite image 0 · total 15 pairs"
    assert said in capsys.readouterr().out
    monkeypatch.undo()
    lost = job.folder / "pairs" / "train-00001-of-00003.parquet"
    lost.write_bytes(lost.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"train-00001-of-00003\.parquet .*delete it"):
        main(job)
    lost.unlink()
    main(job)
    assert same_as_whole(job, world)
    for name in ("settings.json", "manifest.json"):
        (job.folder / "pairs" / name).unlink()
    with pytest.raises(ShardError, match=r"parquet was made with other settings \(guidance: found"):
        main(replace(job, generate=replace(job.generate, guidance=[9.0])))


# --- images that cannot be used ------------------------------------------------------------------


def spoiling(spoil: Callable[[str, int], bool]) -> Callable[..., object]:
    """`ImageGenerator.sample_with_flags`, of which some images are not finite."""
    sample = ImageGenerator.sample_with_flags

    def spoiled(
        self: ImageGenerator, prompts: list[str], seeds: list[int], **more: object
    ) -> object:
        pixels, finite = sample(self, prompts, seeds, **more)
        flags = [
            good and not spoil(p, s) for p, s, good in zip(prompts, seeds, finite, strict=True)
        ]
        return pixels, flags

    return spoiled


def test_an_image_that_is_not_finite_is_an_error_of_its_rows(
    job: Job,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the set, and in its labels."""
    spoil = spoiling(lambda prompt, seed: (prompt, seed) == ("a dog", 1_000_001))
    monkeypatch.setattr(ImageGenerator, "sample_with_flags", spoil)
    main(job)
    assert "ok 13 · not finite image 2 · total 15 pairs" in capsys.readouterr().out
    rows = pl.read_parquet(job.folder / "pairs" / "train-00000-of-00003.parquet")
    bad = rows.filter(pl.col("status") != "ok").select("caption", "status", "reason").rows()
    assert bad == [
        ("a dog", "not_finite_image", "image 1: values that are not finite"),
        ("a dog", "not_finite_image", "image 0: values that are not finite"),
    ]
    assert (rows["jpg_0"].null_count(), rows["jpg_1"].null_count()) == (1, 1)
    mine, whole = files(job), files(composed_once(world))
    assert [name for name in mine if mine[name] != whole[name]] == ["train-00000-of-00003.parquet"]
    labels = labels_of(job, tmp_path)
    assert (labels.height, labels["human"].null_count()) == (15, 15)
    bad = labels.filter(pl.col("status") != "ok").select("prompt", "reason").rows()
    assert bad == [("a dog", "image 1: no bytes"), ("a dog", "image 0: no bytes")]
    assert labels["winner"].is_in([0, 1]).sum() > 0


def with_tiny_judges(job: Job, folder: Path) -> Job:
    """The job with a panel of tiny random scorers."""
    voters = ["hps", "clip", "pickscore", "aesthetic"]
    panel = replace(job.panel, voters=voters, held_out=[], oracle=[])
    return replace(job, metrics=specs(build_weights(folder)), panel=panel)


def labels_of(job: Job, folder: Path) -> pl.DataFrame:
    """What the panel, of tiny random scorers, makes of a set."""
    label_main(with_tiny_judges(job, folder))
    return pl.read_parquet(job.folder / "labels" / "majority" / "part-*.parquet")


def test_a_model_of_which_no_image_is_finite_is_refused(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageGenerator, "sample_with_flags", spoiling(lambda *_: True))
    with pytest.raises(SamplesError, match="model 'base': 8 images in a row.*weights are damaged"):
        main(job)
    with pytest.raises(SamplesError, match="8 images in a row"):  # not done because they failed
        main(job)


def test_a_full_device_gets_half_the_batch_and_one_image_too_many_is_told(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    sample = ImageGenerator.sample_with_flags

    def small(room: int) -> Callable[..., object]:
        def limited(
            self: ImageGenerator, prompts: list[str], *args: object, **more: object
        ) -> object:
            sizes.append(len(prompts))
            if len(prompts) > room:
                raise torch.OutOfMemoryError("too much")
            return sample(self, prompts, *args, **more)

        return limited

    monkeypatch.setattr(ImageGenerator, "sample_with_flags", small(0))
    with pytest.raises(SamplesError, match=r"one image of 'base'; .*generate\.dtype=bf16"):
        main(job)
    assert sizes == [2, 1]
    monkeypatch.setattr(ImageGenerator, "sample_with_flags", small(1))
    main(job)
    assert set(sizes[3:]) == {1}
    assert len(files(job)) == 3


# --- several models, several processes -----------------------------------------------------------


def test_several_models_take_turns_and_each_is_loaded_once(
    job: Job, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "other", seed=1)
    loads, load = [], image_maker.ImageMaker.load
    monkeypatch.setattr(
        image_maker.ImageMaker, "load", lambda plan, model, rank: loads.append(model.name)
        or load(plan, model, rank),
    )  # fmt: skip
    models = {"one": f"{world}/model", "two": str(tmp_path / "other")}
    main(replace(job, generate=replace(job.generate, models=models)))
    assert loads == ["one", "two"]
    rows = pl.read_parquet(job.folder / "pairs" / "*.parquet")
    assert rows.select("model_0", "model_1").rows() == [
        ("one", "two"), ("one", "one"), ("two", "one"),
    ] * 5  # fmt: skip
    assert rows["fingerprint_0"].n_unique() == 2


@pytest.mark.ranks
def test_a_killed_run_ends_with_the_same_bytes_on_two_ranks(
    job: Job, world: Path, tmp_path: Path
) -> None:
    words = settings(world, job.run)
    process = start_module(tmp_path, "generate", *words)
    while not list((job.folder / "pairs").glob("*/*/*.png")):
        assert process.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (job.folder / "pairs" / "manifest.json").exists()
    output = run_ranks(tmp_path, 2, be_module, "generate", words)
    assert "generating images" in output
    assert same_as_whole(job, world)


# --- the guide -----------------------------------------------------------------------------------

GUIDE = docs.ROOT / "docs" / "own-pairs.md"
STAGES = {
    command: docs.started(command)
    for command in docs.commands(GUIDE)
    if "generate" in [module for module, *_ in docs.started(command)] and command != "make pairs"
}
"""The commands of the guide that generate pairs, and the stages that each starts."""
WHOLE = [command for command in STAGES if "make eval" in command and "miniature" not in command]
"""Those that go on to win rates; `test_rounds` runs every stage of the miniature's."""


def small(command: str, world: Path, folder: Path) -> list[str]:
    """The settings of a command with its own paths, on a tiny model and very little of all."""
    pl.DataFrame({"prompt": WORDS}).write_parquet(folder / "prompts.parquet")
    shutil.copy(world / "prompts.txt", folder)
    (folder / "PartiPrompts.tsv").write_text("Prompt\tCategory\tChallenge\nsun\tA\tB\n")
    stages = [
        [word for word in words if not word.startswith(("goal=", "model.path=", "model.resol"))]
        for _, *words in STAGES[command]
    ]
    assert all(words == stages[0] for words in stages)  # make hands all stages the same
    words = [
        re.sub(
            r"=(/data|prompts)/", f"={folder}/", re.sub(r"=/models/\w+", f"={world}/model", word)
        )
        for word in stages[0]
    ]
    tiny = [
        f"runs={folder}/runs", f"model.path={world}/model", "model.revision=null",
        f"model.resolution={SIDE}", "generate.steps=1", "generate.dtype=fp32",
        "generate.device=cpu", "generate.prompts.max_prompts=2", "label.device=cpu",
        "train.steps=2", "train.batch=2", "train.micro_batch=2", "train.warmup=1",
        "train.reference.every=1", "train.precision=fp32", "train.device=cpu", "train.workers=0",
        "evaluate.steps=1", "evaluate.dtype=fp32", "evaluate.device=cpu",
        "evaluate.resamples=50",
    ]  # fmt: skip
    if not any("evaluate.prompts.path" in word or "miniature" in word for word in words):
        tiny.append(f"evaluate.prompts.path={folder}/PartiPrompts.tsv")
    return [*words, *tiny]


@pytest.mark.parametrize("command", [command for command in STAGES if command not in WHOLE])
def test_the_commands_of_the_guide_generate_pairs(
    command: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = composed(small(command, world, tmp_path))
    main(job)
    assert "prompts 2 ·" in capsys.readouterr().out
    assert sum(shard.rows for shard in open_pairs(job.pairs).shards) == plan_of(job).num_pairs


@pytest.mark.ranks
@pytest.mark.parametrize("command", WHOLE)
def test_the_commands_of_the_guide_go_on_to_win_rates(
    command: str, world: Path, tmp_path: Path
) -> None:
    """Generated, labelled and judged here, by scorers of random weights, and trained in a fork."""
    words = small(command, world, tmp_path)
    job = composed(words)
    main(job)
    labels = labels_of(job, tmp_path)
    assert labels.height == plan_of(job).num_pairs == 12
    trained = run_module(tmp_path / "log", "train", *words)
    assert trained.returncode == 0, trained.stderr
    assert "trained 2 steps of 2 pairs" in trained.stdout
    evaluate_main(with_tiny_judges(job, tmp_path))
    rates = pl.read_parquet(job.folder / "evaluate" / "winrates.parquet")
    assert rates["wins"].len() == 4
    assert (rates["wins"] + rates["ties"] + rates["losses"] == 1).all()

"""What generated pairs are made of, and what is refused before a model is loaded."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, reduce
from itertools import combinations
from pathlib import Path

import polars as pl
import pytest

from conf.job import Goal, Job, composed
from data.artifacts.atomic import ShardError, write_json
from data.artifacts.config_diff import refuse_other_settings
from data.images import Size
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from generate.config import GenerateSpec, PromptsKind
from generate.image_files import Model, ensure_same_settings
from generate.pair_set.pairing import num_pairs, pairs_of_prompt
from generate.pair_set.plan import PairPlan
from generate.pair_set.shard_writer import write_shard
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet
from generate.run import check_seeds, is_same_folder, main, plan_of, prompts_of
from tests.helpers_docs import dry_run

PAIRS = PromptsKind.pairs
PROMPTS = ("a red cat", "a dog", "A  Red Cat", "", "big tree", "a dog")


@cache
def composed_once() -> Job:
    """Composing takes half a second; tests change what is theirs in a copy."""
    return composed(["pairs=own", "prompts=lines", "evaluate.prompts.path=/x"])


def own(tmp_path: Path, changes: dict[str, object] | None = None) -> Job:
    """A run with its own pairs; `changes` are settings by their paths."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "test.txt").write_text("big TREE\nmoon\n")
    job = deepcopy(composed_once())
    places = {
        "runs": f"{tmp_path}/runs",
        "pairs.root": f"{tmp_path}/runs/miniature/pairs",
        "generate.prompts.path": f"{tmp_path}/prompts.txt",
        "evaluate.prompts.path": f"{tmp_path}/test.txt",
    }
    for path, value in (places | (changes or {})).items():
        *owners, name = path.split(".")
        setattr(reduce(getattr, owners, job), name, value)
    return job


def plan(tmp_path: Path, *, num_prompts: int = 5, **settings: object) -> PairPlan:
    prompts = tuple(Prompt(i, f"prompt {i}") for i in range(num_prompts))
    return PairPlan(
        folder=tmp_path,
        spec=GenerateSpec(**settings),
        models=(Model(name="a", path="/a"), Model(name="b", path="/b")),
        prompts=PromptSet("set", prompts, empty=0, repeated=0),
        size=Size(16, 16),
        seed=3,
    )


# --- which images form pairs ---------------------------------------------------------------------


def test_all_pairs_and_neighbours() -> None:
    every = GenerateSpec(images=4)
    assert pairs_of_prompt(every, "x", 0) == list(combinations(range(4), 2))
    chain = GenerateSpec(images=4, pairing="adjacent")
    assert pairs_of_prompt(chain, "x", 0) == [(0, 1), (1, 2), (2, 3)]
    assert [num_pairs(spec) for spec in (every, chain)] == [6, 3]


def test_random_pairs_are_different_and_drawn_from_seed_and_prompt() -> None:
    spec = GenerateSpec(images=5, pairing="random:4")
    draws = {
        (prompt, seed): pairs_of_prompt(spec, prompt, seed) for prompt in "abcd" for seed in (0, 1)
    }
    assert draws == {key: pairs_of_prompt(spec, *key) for key in draws}
    assert len({tuple(pairs) for pairs in draws.values()}) > 4
    for pairs in draws.values():
        assert len(set(pairs)) == 4 == num_pairs(spec)
        assert set(pairs) <= set(combinations(range(5), 2))
    whole = GenerateSpec(images=5, pairing="random:10")
    assert pairs_of_prompt(whole, "x", 0) == list(combinations(range(5), 2))


# --- the plan ------------------------------------------------------------------------------------


def test_image_k_takes_entry_k_of_each_list(tmp_path: Path) -> None:
    built = plan(tmp_path, images=5, steps=[10, 20, 30], guidance=[1.5, 3])
    images = built.images_of(0, built.prompts.prompts[0])
    assert [image.model for image in images] == ["a", "b", "a", "b", "a"]
    assert [image.steps for image in images] == [10, 20, 30, 10, 20]
    assert [image.guidance for image in images] == [1.5, 3, 1.5, 3, 1.5]
    assert [image.seed for image in images] == [1_003_000 + k for k in range(5)]
    assert len({image.path for image in images}) == 5


def test_batches_follow_from_the_plan_and_have_one_recipe(tmp_path: Path) -> None:
    built = plan(tmp_path, images=3, steps=[10, 20], guidance=2, batch=3, shard_prompts=4)
    assert (built.num_blocks, built.num_images, built.num_pairs) == (2, 15, 15)
    batches = [
        batch for block in (0, 1) for name in ("a", "b") for batch in built.batches(block, name)
    ]
    assert [len(batch) for batch in batches] == [3, 3, 2, 3, 1, 2, 1]
    assert all(len({(i.model, i.steps, i.guidance) for i in batch}) == 1 for batch in batches)
    images = [image for batch in batches for image in batch]
    assert len({image.path for image in images}) == len(images) == built.num_images


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"images": 1}, r"generate\.images=1; a pair needs 2 images"),
        ({"images": 4, "pairing": "random:7"}, r"4 images form 6 pairs; raise generate\.images"),
        ({"pairing": "random:0"}, r"random:0; allowed are all, adjacent, and random:n"),
        ({"pairing": "each"}, r"generate\.pairing=each; allowed are"),
        ({"steps": 0}, r"generate\.steps=0; it must be a whole number, 1 or more"),
        ({"steps": [20, "x"]}, r"generate\.steps=\[20, 'x'\]; it must be a whole number"),
        ({"steps": 2.5}, r"generate\.steps=2\.5; it must be a whole number"),
        ({"guidance": []}, r"generate\.guidance=\[\]; it must be a number"),
        ({"guidance": True}, r"generate\.guidance=True; it must be a number"),
        ({"guidance": float("nan")}, r"generate\.guidance=nan; it must be a number"),
        ({"guidance": 0.5}, r"generate\.guidance=0\.5; it must be a number, 1 or more"),
        ({"quality": 101}, r"generate\.quality=101; it must lie between 1 and 100"),
        ({"batch": 0}, r"generate\.batch=0; it must be at least 1"),
        ({"device": "tpu"}, r"generate\.device='tpu'"),
        ({"models": {"a/b": "/x"}}, r"generate\.models has the name 'a/b'; use letters"),
        ({"models": {"a": " "}}, r"generate\.models\.a is empty; give a diffusers folder"),
        (
            {"images": 2, "models": dict.fromkeys("abc", "/x")},
            r"generate\.images=2 is fewer than the 3 models",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GenerateSpec(**settings)


def test_the_command_line_takes_numbers_lists_and_models() -> None:
    words = ["generate.steps=[20,30]", "generate.guidance=3", "generate.models.one=/a=b"]
    spec = composed(words).generate
    assert (spec.steps, spec.guidance, spec.models) == ([20, 30], [3.0], {"one": "/a=b"})


def test_seeds_of_the_judge_are_refused(tmp_path: Path) -> None:
    check_seeds(own(tmp_path, {"seed": 5, "evaluate.seeds": 100}))
    with pytest.raises(ValueError, match=r"seeds from 7 to 10.*judged with 0 to 7 \(seed, eval"):
        check_seeds(own(tmp_path, {"generate.first_seed": 7, "evaluate.seeds": 8}))
    check_seeds(own(tmp_path, {"generate.first_seed": 8, "evaluate.seeds": 8}))


def test_images_that_another_process_has_used_are_no_error(tmp_path: Path) -> None:
    built = plan(tmp_path, images=2, shard_prompts=4)
    built.__dict__["fingerprints"] = {"a": "1", "b": "2"}  # of models that are not there
    with pytest.raises(ShardError, match=r"00000 has lost images while .*\.parquet was written"):
        write_shard(built, 0)
    built.shard(0).write_bytes(b"whole")
    write_shard(built, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000-of-00002.parquet"]
    assert built.shard(0).read_bytes() == b"whole"


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_of_the_comparison_are_left_out_and_counted(tmp_path: Path) -> None:
    prompts = prompts_of(own(tmp_path))
    assert [prompt.text for prompt in prompts.prompts] == ["a red cat", "a dog", "A  Red Cat"]
    assert prompts.counts == "prompts 3 · empty 1 · repeated 1 · of the comparison 1 · total 6"
    rest = prompts_of(own(tmp_path, {"generate.prompts.skip_prompts": 1}))
    assert [prompt.text for prompt in rest.prompts] == ["a dog", "A  Red Cat"]
    assert rest.counts.endswith("of the comparison 1 · skipped 1 · total 6")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generate.prompts.path": ""}, r"generate\.prompts names no prompts; give a text file"),
        ({"generate.prompts.path": "/nope"}, r"generate\.prompts\.path=/nope is no file"),
        ({"evaluate.prompts.path": "/nope"}, r"evaluate\.prompts\.path=/nope is no file"),
        ({"generate.prompts.kind": PAIRS}, r"generate\.prompts\.kind=pairs takes prompts from"),
        ({"evaluate.prompts.kind": PAIRS}, r"evaluate\.prompts\.kind=pairs takes prompts from"),
        ({"generate.prompts.exclude_trained": True}, r"generate\.prompts\.exclude_trained leaves"),
        ({"generate.prompts.skip_prompts": 9}, r"has no prompt left .*generate\.prompts\.path"),
        ({"generate.prompts.kind": PromptsKind.table}, r"ends in \.txt; tables are"),
        ({"generate.models": {"x": "/nope"}}, r"model 'x': /nope is no folder; generate\.models"),
        ({"model.path": "/nope"}, r"model 'base': /nope is no folder; model\.path takes"),
        ({"generate.models": {"x": "own/er@main"}}, "revision 'main'; give the 40-digit commit"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        main(own(tmp_path, changes))
    assert not (tmp_path / "runs").exists()


def test_prompts_of_the_embedded_world_may_be_those_to_train_on(tmp_path: Path) -> None:
    job = composed(["experiment=miniature_own", f"runs={tmp_path}"])
    assert len(plan_of(job).prompts.prompts) == 800


# --- other folders, other pairs ------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    settings = plan_of(own(tmp_path)).settings
    write_json(tmp_path / "runs" / "miniature" / "pairs" / "settings.json", settings)
    with pytest.raises(ShardError, match=r"guidance: found \[7\.5\], now \[3\.0\]\); set them"):
        main(own(tmp_path, {"generate.guidance": [3.0]}))
    with pytest.raises(ShardError, match=r"prompts\.number: found 3, now 2; prompts\.sha256"):
        main(own(tmp_path, {"generate.prompts.max_prompts": 2}))


def test_the_order_of_models_is_a_setting(tmp_path: Path) -> None:
    """Image k is of model k modulo their number, and mappings are equal in any order."""
    built = plan(tmp_path)
    with pytest.raises(ShardError, match=r"order: found \['a', 'b'\], now \['b', 'a'\]"):
        refuse_other_settings(
            tmp_path, built.settings, replace(built, models=built.models[::-1]).settings
        )


def test_the_folder_is_the_runs_own_however_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x" / "pairs"
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_same_folder(f"{tmp_path}/link/runs/x/pairs/", folder)
    assert not is_same_folder(f"{tmp_path}/runs/y/pairs", folder)
    assert not is_same_folder("s3://runs/x/pairs", folder)


def test_of_two_commands_that_begin_a_folder_together_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_same_settings(tmp_path, {"steps": 2})
    looks, exists = iter([False]), Path.exists  # it looked before the first wrote
    monkeypatch.setattr(Path, "exists", lambda path: next(looks, exists(path)))
    with pytest.raises(ShardError, match="steps: found 2, now 3"):
        ensure_same_settings(tmp_path, {"steps": 3})


@pytest.mark.parametrize("change", [("pairs.kind", "pickapic"), ("pairs.root", "/elsewhere")])
def test_a_run_with_other_pairs_generates_none(
    change: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(own(tmp_path, dict([change])))
    assert "nothing to generate: the run's pairs are those of" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_pairs_that_are_not_there_or_were_changed_are_refused(tmp_path: Path) -> None:
    spec = PairsSpec(kind="own", root=str(tmp_path))
    with pytest.raises(PairsError, match=r"no complete set of generated pairs.*run `make pairs`"):
        open_pairs(spec)
    with pytest.raises(PairsError, match=r"s3://x/pairs is a URL; .*pairs=pickapic"):
        open_pairs(PairsSpec(kind="own", root="s3://x/pairs"))
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "train-00000-of-00001.parquet")
    entry = {"name": "train-00000-of-00001.parquet", "rows": 1, "bytes": 7, "sha256": "",
             "row_groups": [1]}  # fmt: skip
    write_json(tmp_path / "manifest.json", {"kind": "own_pairs", "settings": {}, "files": [entry]})
    with pytest.raises(PairsError, match=r"00001\.parquet was changed since manifest\.json"):
        open_pairs(spec)
    entry["bytes"] = (tmp_path / entry["name"]).stat().st_size
    write_json(tmp_path / "manifest.json", {"kind": "own_pairs", "settings": {}, "files": [entry]})
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "train-00001.parquet"
    other.touch()
    with pytest.raises(PairsError, match=r"train-00001\.parquet is not of the set.*; move it out"):
        open_pairs(spec)
    other.unlink()
    (tmp_path / entry["name"]).unlink()
    with pytest.raises(PairsError, match=r"00001\.parquet is missing since manifest\.json"):
        open_pairs(spec)


def test_make_generates_before_it_labels_where_the_pairs_are_own() -> None:
    def stages(*words: str) -> list[str]:
        lines = dry_run(*words, "NPROC=1").stdout.splitlines()
        return [line.split()[2] for line in lines if " -m " in line]

    assert stages("eval", "EXP=miniature_own") == ["generate", "label", "train", "evaluate"]
    assert stages("labels", "ARGS=pairs=own") == ["generate", "label"]
    assert stages("labels") == ["label"]
    assert stages("pairs") == ["generate"]
    labels = dry_run("labels", "EXP=miniature_own", "NPROC=1").stdout
    assert labels.count("goal=label") == 2  # the scorers' paths are checked before images are made


def test_the_scorers_are_checked_before_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generate.run.plan_of", None)
    job = own(tmp_path, {"goal": Goal.label})
    job.metrics["hps"].weights = "/nope"
    with pytest.raises(ValueError, match=r"metrics\.hps\.weights=/nope"):
        main(job)

"""`make miniature` from nothing, a thousand times shorter: every stage runs and fits the next."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data.miniature import build, train_base, train_flow, train_scorers, training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def shortened(stage: build.Stage) -> build.Stage:
    plan, *later = (
        replace(plan, steps=2, batch=8) for plan in (stage.recipe.plan, *stage.recipe.later)
    )
    recipe = replace(stage.recipe, plan=plan, later=tuple(later), examples=32)
    return replace(stage, recipe=recipe)


@pytest.fixture(scope="module")
def trainings() -> list[training.Plan]:
    """The plan of every training of the rebuild, in order."""
    return []


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory, trainings: list[training.Plan]) -> Path:
    folder = tmp_path_factory.mktemp("weights")

    def noted(name: str, models, loss_of, num_examples: int, plan: training.Plan, averages=()):
        trainings.append(plan)
        return training.fit(name, models, loss_of, num_examples, plan, averages)

    with pytest.MonkeyPatch.context() as patch:
        short = {name: shortened(stage) for name, stage in build.STAGES.items()}
        patch.setattr(build, "STAGES", short)
        for module in (train_base, train_flow, train_scorers):
            patch.setattr(module, "fit", noted)
        build.build(list(short), folder, force=False)
    return folder


def test_every_stage_leaves_its_file_and_its_recipe(rebuilt: Path):
    for name, recipe in recorded(rebuilt).items():
        assert (rebuilt / build.STAGES[name].done).is_file()
        assert recipe == as_json(shortened(build.STAGES[name]).recipe)


def test_the_embedded_weights_were_made_by_the_recipe_of_the_code():
    recipes = recorded(build.WEIGHTS)
    assert recipes == {name: as_json(stage.recipe) for name, stage in build.STAGES.items()}


def test_a_recipe_names_every_training(rebuilt: Path, trainings: list[training.Plan]):
    """What was run is what is recorded: as many rounds, by these plans, in this order."""
    plans = [
        plan for recipe in recorded(rebuilt).values() for plan in (recipe["plan"], *recipe["later"])
    ]
    assert plans == [as_json(plan) for plan in trainings]


def recorded(folder: Path) -> dict[str, dict]:
    """The recipes beside weights, without their seconds."""
    recipes = json.loads((folder / build.RECIPE).read_text())
    assert all(recipe.pop("seconds") >= 0 for recipe in recipes.values())
    return recipes


def as_json(value: build.Recipe | training.Plan) -> dict:
    return json.loads(json.dumps(asdict(value)))


def test_a_rebuild_has_the_embedded_weights_names_and_shapes(rebuilt: Path):
    ours = {path.relative_to(rebuilt) for path in rebuilt.rglob("*.safetensors")}
    theirs = {path.relative_to(build.WEIGHTS) for path in build.WEIGHTS.rglob("*.safetensors")}
    assert ours == theirs
    for name in ours:
        assert shapes(rebuilt / name) == shapes(build.WEIGHTS / name), name


def shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(path, "pt") as file:
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return {key: (view.get_shape(), view.get_dtype()) for key, view in views.items()}


def test_a_finished_stage_is_skipped(rebuilt: Path, capsys: pytest.CaptureFixture[str]):
    build.build(["vae", "hps"], rebuilt, force=False)
    said = capsys.readouterr().out
    assert said.count("there already") == 2


def test_the_rebuilt_generator_draws(rebuilt: Path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(rebuilt / "base", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(["a small red circle at the left on a blue background"], num_inference_steps=1)
    assert drawn.images[0].size == (64, 64)


def test_the_recorded_quality_is_in_its_bounds():
    """What the design asks of the embedded weights, read from what `--measure` wrote."""
    quality = json.loads((build.WEIGHTS / "quality.json").read_text())
    assert all(0.55 <= rate <= 0.75 for rate in quality["pairs"]["agreement"].values())
    assert all(0.55 < rate < 0.9 for rate in quality["pairs"]["accuracy_against_oracle"].values())
    assert min(quality["oracle"]["clean"].values()) > 0.97
    assert quality["base"]["guidance_1.5"]["oracle"] < 0.7
    size = sum(path.stat().st_size for path in build.WEIGHTS.rglob("*") if path.is_file())
    assert size < 16 * 2**20

"""What the trainer cannot train, and DDIM cannot sample, is refused by name."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from data.families.sdxl import FAMILY
from data.images import Size
from data.models.forward_process import (
    BETA_SCHEDULES,
    CONFIG,
    DISCRETE,
    DiscreteProcess,
    ForwardProcessError,
    Prediction,
    forward_process,
)
from data.models.latent_scale import LatentScaleError
from evaluate.config import EvaluateSpec
from generate.config import GenerateSpec, Scheduler
from generate.image_files import Model, SamplesError
from generate.model_process import check_folder
from tests.helpers_train import SIDE, write_base, write_sdxl_base
from train.config import ModelSpec, Precision
from train.models.base_model import open_model
from train.models.components import ModelComponents, load_components, noise_schedule

CPU = torch.device("cpu")
INDEX = {"_class_name": "StableDiffusionPipeline"}
SD = {
    "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def process(*without: str, **settings: Any) -> DiscreteProcess:
    values = {name: value for name, value in (SD | settings).items() if name not in without}
    return forward_process("m", INDEX, values)


def edit(path: Path, *without: str, **settings: Any) -> Path:
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in without}))
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"sd": write_base(root / "sd"), "sd_v": write_base(root / "v", "v_prediction"),
            "sdxl": write_sdxl_base(root / "sdxl")}  # fmt: skip


@pytest.fixture
def copy(bases: dict[str, Path], tmp_path: Path) -> Any:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(bases[name], tmp_path / name))

    return copied


def load(folder: Path, **spec: Any) -> ModelComponents:
    return load_components(
        ModelSpec(path=str(folder), resolution=SIDE, **spec), Precision.fp32, CPU
    )


# --- known processes -----------------------------------------------------------------------------


def scheduler_class(name: str) -> Any:
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):
        pytest.skip(f"{name} needs {cls._backends}")
    return cls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_the_noise_is_the_schedulers_own(name: str, schedule: str):
    """With its default betas, which are not the same in all classes, and with stated ones."""
    cls = scheduler_class(name)
    stated = {"beta_start": 0.001, "beta_end": 0.015, "num_train_timesteps": 50}
    for settings in ({}, stated):
        config = {"_class_name": name, "beta_schedule": schedule, **settings}
        ours = noise_schedule(forward_process("m", INDEX, config), CPU)
        theirs = cls.from_config({k: v for k, v in config.items() if k != "_class_name"})
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod.float())
        assert ours.num_timesteps == len(theirs.alphas_cumprod)


@pytest.mark.parametrize("name", DISCRETE)
def test_the_defaults_are_the_schedulers_own(name: str):
    parameters = inspect.signature(scheduler_class(name).__init__).parameters
    start, end = (parameters[key].default for key in ("beta_start", "beta_end"))
    assert (start, end) == DISCRETE[name]
    assert parameters["beta_schedule"].default == "linear"
    assert parameters["num_train_timesteps"].default == 1000
    assert parameters["prediction_type"].default == "epsilon"


def test_the_class_that_diffusers_loads_gives_the_defaults():
    index = INDEX | {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}
    assert forward_process("m", index, {"_class_name": "DDPMScheduler"}).beta_end == 0.012


def test_betas_of_its_own_are_used():
    betas = torch.linspace(0.001, 0.3, 7).tolist()
    ours = noise_schedule(process(trained_betas=betas, num_train_timesteps=7), CPU)
    torch.testing.assert_close(ours.alphas_cumprod, (1 - torch.tensor(betas)).cumprod(0))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "means flow matching"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "means flow matching"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "means the process of EDM"),
        ({"_class_name": "EDMEulerScheduler"}, "means the process of EDM"),
        ({"_class_name": "LCMScheduler"}, "names the scheduler LCMScheduler, which means no proc"),
        ({"_class_name": "MyScheduler"}, "allowed is the discrete process of DDPM, with one of DD"),
        ({"_class_name": None}, "has no _class_name"),
        ({"timestep_type": "continuous"}, "timestep_type=continuous, which means .* continuous t"),
        ({"timestep_type": "other"}, "timestep_type=other"),
        ({"sigma_data": 0.5}, "sigma_data=0.5, which means the process of EDM"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True, which means flow matching"),
        ({"use_dynamic_shifting": True}, "means flow matching"),
        ({"shift": 3.0}, "shift=3.0, which means flow matching"),
        ({"prediction_type": "sample"}, "prediction_type='sample'; allowed: epsilon, v_prediction"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'; allowed"),
        ({"prediction_type": 3}, "prediction_type=3; allowed"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'; allowed: linear, scaled_linear, "),
        ({"beta_schedule": None}, "beta_schedule=None; allowed"),
        ({"beta_start": "0.1"}, "beta_start='0.1'; allowed: a number between 0 and 1"),
        ({"beta_end": 1.5}, r"beta_end=1\.5; allowed"),
        ({"beta_end": float("nan")}, "beta_end=nan; allowed"),
        ({"beta_start": 0.1}, r"beta_start=0\.1; allowed: at most beta_end=0\.012"),
        ({"timestep_spacing": "no"}, "timestep_spacing='no'; allowed: leading, linspace, trailing"),
        ({"steps_offset": "x"}, "steps_offset='x'; allowed: a whole number below num_train_times"),
        ({"steps_offset": 1000}, "steps_offset=1000; allowed"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0; allowed: a whole number"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True; allowed"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas='2 values'; allowed: a list of 1000 numb"),
        ({"trained_betas": "x"}, "trained_betas='x'; allowed"),
        ({"trained_betas": []}, r"trained_betas=\[\]; allowed"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr=1; allowed: true, false"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr='no'; allowed: true, false"),
        (ZERO_SNR, "has rescale_betas_zero_snr=true, which leaves no signal .*=v_prediction"),
        ({"trained_betas": [0.1, 1], "num_train_timesteps": 2}, "a last beta of 1, which leaves"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(settings: dict, message: str):
    with pytest.raises(ForwardProcessError, match=rf"^m: .*{message}"):
        process(**settings)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_either_files_class_is_enough(name: str):
    with pytest.raises(ForwardProcessError, match=rf"model_index\.json names the scheduler {name}"):
        forward_process("m", INDEX | {"scheduler": ["diffusers", name]}, SD)


def test_settings_that_only_choose_the_steps_are_no_reason():
    settings = {"use_karras_sigmas": True, "flow_shift": 1.0, "use_flow_sigmas": False,
                "timestep_type": "discrete", "rescale_betas_zero_snr": False, "shift": None,
                "use_dynamic_shifting": False, "trained_betas": None}  # fmt: skip
    assert process(_class_name="EulerDiscreteScheduler", **settings) == process()


SPOILED = [
    {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"timestep_type": "continuous"},
    {"_class_name": "EDMDPMSolverMultistepScheduler"}, ZERO_SNR, {"prediction_type": "sample"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SPOILED)
def test_training_refuses_it_before_any_weight_is_loaded(copy: Any, settings: dict):
    folder = copy("sd")
    edit(folder / CONFIG, **settings)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ForwardProcessError, match=re.escape(f"model.path={folder}: ")):
        load(folder)


@pytest.mark.parametrize("settings", SPOILED)
def test_generating_refuses_it_alike(copy: Any, settings: dict):
    folder = copy("sd")
    edit(folder / CONFIG, **settings)
    model = Model(name="ours", path=str(folder))
    with pytest.raises(SamplesError, match=r"model 'ours' \(.*scheduler"):
        check_folder(model, Scheduler.ddim, 2, Size(SIDE, SIDE))


@pytest.mark.parametrize(
    ("settings", "is_allowed"), list(zip(SPOILED, (False, True, True, False, True), strict=True))
)
def test_a_scheduler_of_its_own_may_know_what_ddim_does_not(
    copy: Any, settings: dict, is_allowed: bool
):
    """But an SD pipeline cannot run flow matching, and no signal remains no signal."""
    folder = copy("sd")
    edit(folder / CONFIG, **settings)
    model, way_out = Model(name="ours", path=str(folder)), "evaluate.scheduler=own"
    with pytest.raises(SamplesError) as refusal:
        check_folder(model, Scheduler.ddim, 2, Size(SIDE, SIDE))
    assert str(refusal.value).endswith(way_out) == is_allowed
    if is_allowed:
        assert check_folder(model, Scheduler.own, 2, Size(SIDE, SIDE)) == ""
    else:
        with pytest.raises(SamplesError):
            check_folder(model, Scheduler.own, 2, Size(SIDE, SIDE))


# --- no signal at the end ------------------------------------------------------------------------


def test_a_step_back_from_pure_noise_is_diffusers_ddim():
    config = SD | ZERO_SNR | {"prediction_type": "v_prediction"}
    ours = noise_schedule(forward_process("m", INDEX, config), CPU)
    theirs = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    theirs.set_timesteps(10)
    assert ours.alphas_cumprod[-1] == 0
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    noisy, predicted = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in theirs.timesteps.tolist()[:-1]:
        expected = theirs.step(predicted, timestep, noisy).prev_sample
        mine = ours.step_back(noisy, predicted, timestep, timestep - 100)
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected)
    assert theirs.timesteps[0] == 999


def test_pure_noise_is_what_the_denoiser_sees_last():
    schedule = noise_schedule(process(**ZERO_SNR, prediction_type="v_prediction"), CPU)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.get_target(latents, noise, last), -latents)


def test_a_model_without_signal_at_the_end_is_sampled(copy: Any):
    from data.devices import Dtype
    from generate.sampler import ImageGenerator

    folder = copy("sd_v")
    edit(folder / CONFIG, **ZERO_SNR)
    assert load(folder).schedule.num_timesteps == 1000
    generator = ImageGenerator.load(
        Model(name="m", path=str(folder)), CPU, scheduler=Scheduler.ddim, dtype=Dtype.fp32,
        size=Size(SIDE, SIDE), steps=3, guidance=2.0,
    )  # fmt: skip
    assert generator.pipeline.scheduler.alphas_cumprod[-1] == 0
    assert generator.sample(["a cat"], [0]).std() > 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", None])
def test_sampling_begins_where_no_signal_is_left(copy: Any, spacing: str | None):
    """Whatever the folder says: with `leading`, DDIM's default, it would begin before."""
    from data.devices import Dtype
    from generate.sampler import ImageGenerator

    folder, said = copy("sd_v"), {"timestep_spacing": spacing} if spacing else {}
    edit(folder / CONFIG, "timestep_spacing")
    edit(folder / CONFIG, rescale_betas_zero_snr=True, **said)
    model = Model(name="m", path=str(folder))
    line = check_folder(model, Scheduler.ddim, 3, Size(SIDE, SIDE))
    assert "no signal at the end, sampled with timestep_spacing=trailing" in line
    scheduler = ImageGenerator.load(
        model, CPU, scheduler=Scheduler.ddim, dtype=Dtype.fp32, size=Size(SIDE, SIDE), steps=3,
        guidance=2.0,
    ).pipeline.scheduler  # fmt: skip
    scheduler.set_timesteps(3)
    assert scheduler.timesteps[0] == 999
    if spacing == "linspace":  # begins there, too
        assert check_folder(model, Scheduler.own, 3, Size(SIDE, SIDE)) == ""
        return
    with pytest.raises(SamplesError, match="DDIMScheduler has timestep_spacing=leading, so that"):
        check_folder(model, Scheduler.own, 3, Size(SIDE, SIDE))


def test_a_scheduler_that_ignores_rescaled_betas_does_not_sample_them(copy: Any):
    folder = copy("sd_v")
    edit(folder / CONFIG, _class_name="PNDMScheduler", **ZERO_SNR)
    edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    model = Model(name="m", path=str(folder))
    assert check_folder(model, Scheduler.ddim, 3, Size(SIDE, SIDE)) == ""
    with pytest.raises(SamplesError, match=r"PNDMScheduler ignores it.*evaluate\.scheduler=ddim"):
        check_folder(model, Scheduler.own, 3, Size(SIDE, SIDE))


def test_no_size_that_latents_do_not_have(copy: Any):
    model = Model(name="m", path=str(copy("sd")))
    with pytest.raises(SamplesError, match=r"model\.resolution=20 is no multiple of 8"):
        check_folder(model, Scheduler.ddim, 3, Size(20, 20))
    with pytest.raises(SamplesError, match=r"evaluate\.width=20 is no multiple of 8"):
        check_folder(model, Scheduler.ddim, 3, Size(20, 16))
    with pytest.raises(SamplesError, match=r"generate\.height=12 is no multiple of 8"):
        check_folder(model, Scheduler.ddim, 3, Size(16, 12), "generate")
    with pytest.raises(ValueError, match=r"evaluate\.height=4; it must be at least 8 pixels"):
        EvaluateSpec(height=4)
    assert EvaluateSpec(width=32).size(16) == Size(32, 16)
    assert GenerateSpec(height=32).size(16).recorded == "16x32"
    assert GenerateSpec().size(16).recorded == 16


def test_no_more_steps_than_timesteps(copy: Any):
    with pytest.raises(SamplesError, match=r"evaluate\.steps=1001: .* has 1000 timesteps"):
        check_folder(Model(name="m", path=str(copy("sd"))), Scheduler.ddim, 1001, Size(SIDE, SIDE))


# --- what is predicted ---------------------------------------------------------------------------


def test_an_assumed_prediction_is_said():
    assumed = process("prediction_type")
    assert assumed.prediction is Prediction.epsilon
    assert str(assumed) == (
        "epsilon (assumed: scheduler/scheduler_config.json has no prediction_type; if it is wrong, "
        "add it there, or set model.prediction_type=v_prediction), 1000 timesteps, scaled_linear "
        "betas from 0.00085 to 0.012"
    )
    assert str(process()) == "epsilon, 1000 timesteps, scaled_linear betas from 0.00085 to 0.012"


def test_a_prediction_can_be_set_where_the_folder_does_not_say(copy: Any):
    folder = copy("sd")
    edit(folder / CONFIG, "prediction_type")
    spec = ModelSpec(path=str(folder), resolution=SIDE, prediction_type=Prediction.v_prediction)
    stated = open_model(spec).process
    assert stated.prediction is Prediction.v_prediction
    assert "assumed" not in str(stated)
    schedule = load(folder, prediction_type=Prediction.v_prediction).schedule
    assert schedule.prediction is Prediction.v_prediction  # type: ignore[attr-defined]


def test_a_prediction_that_contradicts_the_folder_is_refused(copy: Any):
    spec = ModelSpec(path=str(copy("sd")), prediction_type=Prediction.v_prediction)
    with pytest.raises(ForwardProcessError, match="'epsilon', but model.prediction_type=v_pred"):
        open_model(spec)


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_the_prediction_that_was_set_is_sampled_with(copy: Any, scheduler: Scheduler):
    from data.devices import Dtype
    from generate.sampler import ImageGenerator

    folder = copy("sd")
    edit(folder / CONFIG, "prediction_type")

    def pipeline(prediction: Prediction | None) -> Any:
        model = Model(name="m", path=str(folder), prediction_type=prediction)
        return ImageGenerator.load(
            model, CPU, scheduler=scheduler, dtype=Dtype.fp32, size=Size(SIDE, SIDE), steps=2,
            guidance=1.0,
        ).pipeline  # fmt: skip

    for prediction in Prediction:
        assert pipeline(prediction).scheduler.config.prediction_type == prediction.value
    assert pipeline(None).scheduler.config.prediction_type == "epsilon"
    model = Model(name="m", path=str(folder))
    assert "(assumed: " in check_folder(model, scheduler, 2, Size(SIDE, SIDE))


# --- the latents' scale --------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_normalised_as_sdxls_pipeline_does(copy: Any):
    folder = copy("sdxl")
    mean, std = [0.5, -1.0, 2.0, 0.1], [2.0, 0.5, 3.0, 1.5]
    edit(folder / "vae/config.json", latents_mean=mean, latents_std=std, force_upcast=False)
    components, pipeline = load(folder), diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0))
    posterior = torch.zeros(2, *components.latent_shape(components.square))
    latents = components.encode_images(pixels.byte(), posterior)
    raw = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    shift, spread = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(latents, (raw - shift) / spread * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        components.decode_latents(latents), pipeline.vae.decode(raw).sample, rtol=1e-3, atol=1e-4
    )


def test_what_the_pipeline_would_ignore_is_refused(copy: Any):
    folder = copy("sd")
    config, model = folder / "vae/config.json", Model(name="ours", path=str(folder))
    for wrong in ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, {"shift_factor": 0.1}):
        edit(config, **({"latents_mean": None, "latents_std": None, "shift_factor": None} | wrong))
        with pytest.raises(LatentScaleError, match="which StableDiffusionPipeline ignores"):
            load(folder)
        with pytest.raises(LatentScaleError, match="'ours' .* which StableDiffusionPipeline ign"):
            check_folder(model, Scheduler.own, 2, Size(SIDE, SIDE))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor=0; allowed: a number above 0"),
        ({"scaling_factor": None}, "scaling_factor=None; allowed"),
        ({"latents_mean": [0.0] * 4}, "latents_std=None; allowed: a list of 4 numbers above 0"),
        ({"latents_std": [1.0] * 4}, "latents_mean=None; allowed: a list of 4 numbers; mean and"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "a list of 4 numbers"),
        ({"latents_mean": ["a"] * 4, "latents_std": [1.0] * 4}, "a list of 4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "4 numbers above 0"),
        ({"shift_factor": 0.1}, "shift_factor=0.1, which StableDiffusionXLPipeline ignores"),
    ],
)
def test_a_scale_that_is_none_is_refused(config: dict, message: str):
    with pytest.raises(LatentScaleError, match=message):
        FAMILY.latent_scale("m", {"latent_channels": 4} | config)

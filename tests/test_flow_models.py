"""Flow models are told what their own pipelines tell them, and train by the formula."""

import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import shapes
from data.families import flux, qwen_image, sana, sd3, z_image
from data.images import Size
from data.models.family import Condition, ModelConfig, ModelError, PromptEmbeds
from data.models.forward_process import ForwardProcessError, Prediction
from data.models.noise_schedule import rectified_flow
from data.models.rectified_flow import flow_process
from generate.pipelines import left_out
from tests.helpers_flow import CHANNELS, SIDES, WRITERS, flow_scheduler
from tests.helpers_train import SIDE, SQUARE, write_base
from tests.test_components import pair_batch
from train.config import (
    ActivationCheckpointing,
    LoraSpec,
    ModelSpec,
    Precision,
    TimestepKind,
    TimestepSpec,
    TrainSpec,
)
from train.dpo.draws import DrawRule, draw
from train.dpo.objectives import dpo, timestep_rule
from train.dpo.step import Models, draw_noise, draws_of, step
from train.models.activation_checkpointing import checkpoint_activations
from train.models.base_model import check_settings, open_model
from train.models.components import ModelComponents, load_components
from train.models.flops import forward_flops
from train.models.lora import attach, counts
from train.models.memory import ADAPTERS, LINEAR, PUBLISHED
from train.run import model_identity

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
"""Of NumPy, about a scheduler of diffusers."""

CPU = torch.device("cpu")
BETA = 500.0
INDEX = {"_class_name": "StableDiffusion3Pipeline"}
CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: write(root / name) for name, write in WRITERS.items()}


def load(base: Path, precision: Precision = Precision.fp32, **spec: Any) -> ModelComponents:
    spec = {"resolution": SIDE} | spec
    return load_components(ModelSpec(path=str(base), **spec), precision, CPU)


def rows_of(condition: Condition, rows: list[int]) -> Condition:
    """The condition of some images."""
    added = condition.added and {key: value[rows] for key, value in condition.added.items()}
    lengths = condition.lengths and tuple(condition.lengths[row] for row in rows)
    return replace(condition, states=condition.states[rows], added=added, lengths=lengths)


def rule_of(components: ModelComponents) -> DrawRule:
    return DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)


# --- what the denoiser is told -------------------------------------------------------------------


def spy(model: Any) -> list[dict[str, Tensor]]:
    """The tensors of each call of a model's forward pass from now on, by their names.

    What is in a list has its name and the place in it.
    """
    forward, calls = model.forward, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        given = {k: v for k, v in bound.items() if isinstance(v, Tensor)}
        for name, value in bound.items():
            if isinstance(value, list):
                given |= {f"{name}.{place}": torch.as_tensor(v) for place, v in enumerate(value)}
        calls.append(given)
        return forward(*args, **kwargs)

    model.forward = noted
    return calls


def pipeline_calls(
    base: Path, prompts: list[str], noisy: Tensor, *, size: Size, **options: Any
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The tensors of the two calls that the family's pipeline makes, and their timesteps."""
    from diffusers import DiffusionPipeline

    dtype = options.pop("dtype", torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=dtype, **left_out(str(base)))
    pipeline.set_progress_bar_config(disable=True)
    calls = spy(pipeline.transformer)
    pipeline([*prompts], latents=noisy, height=size.height, width=size.width, num_inference_steps=2,
             output_type="latent", **options)  # fmt: skip
    return calls, [float(level) for level in pipeline.scheduler.timesteps]


TEXTS = ("encoder_hidden_states", "pooled_projections", "cap_feats.")
"""Names of encoded text."""


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: bool) -> None:
    """To the bit, but for text: rows of a matrix product round by their place in a batch."""
    assert ours.keys() == theirs.keys()
    tolerance = 1e-5 if exact else 2e-2
    for key, value in theirs.items():
        assert ours[key].dtype is value.dtype, key
        if key.startswith(TEXTS):
            torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in WRITERS),
        ("sd3", torch.bfloat16),
        ("flux", torch.bfloat16),
        ("z_image", torch.bfloat16),
        ("sana", torch.bfloat16),
        ("qwen_image", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_the_denoiser_is_told_what_the_pipeline_tells_it(
    bases: dict[str, Path], name: str, dtype: torch.dtype
):
    """Every tensor of the call, to the bit: latents, timestep, text, pooled, ids, guidance.

    Images are square, and in bf16 twice as wide as high.
    """
    precision = Precision.fp32 if dtype is torch.float32 else Precision.bf16
    side = SIDES.get(name, SIDE)
    components = load(bases[name], precision, resolution=side)
    family = components.base.family
    cut = Size(side if dtype is torch.float32 else 2 * side, side)
    shape = components.latent_shape(cut)
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    empty = {"sana": " A ", "qwen_image": " "}.get(name, "")
    noise, prompts = noise.to(dtype), ["a red cat", "a blue cat", empty]
    options = family.pipeline_options(3, 3.5 if name in ("flux", "sana") else 1.0)
    latents = family.pipeline_latents(noise)
    theirs, levels = pipeline_calls(bases[name], prompts, latents, size=cut, dtype=dtype, **options)
    denoiser = components.denoiser()
    calls = spy(denoiser)
    if name == "sana":  # its pipeline encodes only the negative prompt as an empty one
        noise, prompts = torch.cat([noise, noise]), ["", "", "", *prompts]
    if name == "qwen_image":  # whose empty prompt is a blank
        prompts[2] = ""
    sizes = torch.full((len(prompts), 2, 2), side)
    condition = rows_of(components.condition(prompts, sizes, cut), [*range(len(prompts))])
    encoded = family.encode(components.text.args[0], prompts, components.base.config)  # type: ignore[attr-defined]
    alone = family.condition(encoded, sizes[:, 0], cut, components.base.guidance)
    for level, each in zip(levels, (condition, alone), strict=True):
        components.predict(denoiser, noise.float(), torch.full((len(prompts),), level), each)
    assert_same_tensors(calls[0], theirs[0], exact=dtype is torch.float32)
    for key in theirs[1]:
        if key.startswith(TEXTS) or key in ("t", "timestep"):  # in the same batch; at a lower level
            assert torch.equal(calls[1][key], theirs[1][key]), key
    assert_as_known(name, cut, *theirs)


@torch.no_grad()
def test_a_long_text_is_cut_where_the_pipeline_cuts_it(bases: dict[str, Path]):
    """Qwen-Image's tokenizer takes more than its pipeline keeps; the rest changes nothing."""
    prompts = ["a" * 600, "b"]
    theirs, _ = pipeline_calls(bases["qwen_image"], prompts, torch.ones(2, 16, 64), size=SQUARE)
    text = load(bases["qwen_image"]).text(prompts)
    assert text.length is not None
    lengths = theirs[0]["encoder_hidden_states_mask"].sum(1).tolist()
    assert lengths == text.length.tolist() == [qwen_image.TOKENS, 121]
    torch.testing.assert_close(text.states, theirs[0]["encoder_hidden_states"])


def assert_as_known(
    name: str, cut: Size, first: dict[str, Tensor], second: dict[str, Tensor]
) -> None:
    """What is special about a family's calls is in them."""
    assert ("guidance" in first) == (name == "flux")
    if name == "flux":
        assert first["guidance"].tolist() == [3.5] * 3
        rows, columns = cut.height // 4, cut.width // 4
        assert first["hidden_states"].shape == (3, rows * columns, 4 * CHANNELS)
        assert first["img_ids"][-1].tolist() == [0, rows - 1, columns - 1]
    if name == "z_image":
        assert [len(first[f"cap_feats.{place}"]) for place in range(3)] == [27, 28, 18]
        assert first["t"].tolist() == [0] * 3
        assert second["t"][0] > 0  # 1 is the image
    if name == "sana":
        assert first["encoder_attention_mask"].sum(1).tolist() == [1, 1, 1, 11, 12, 3]
    if name == "qwen_image":
        assert first["encoder_hidden_states_mask"].sum(1).tolist() == [129, 130, 121]
        assert first["img_shapes.2"].tolist() == [[1, cut.height // 4, cut.width // 4]]


# --- a step --------------------------------------------------------------------------------------


def latents_of(vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """The latents of an image (side, side, 3), as the VAEs of the tiny models are scaled."""
    image = pixels[None].permute(0, 3, 1, 2) / 127.5 - 1
    if type(vae).__name__ == "AutoencoderKLQwenImage":
        posterior = vae.encode(image[:, :, None]).latent_dist
        return (posterior.mean[:, :, 0] + posterior.std[:, :, 0] * noise - 0.06) / (2 / 3)
    encoded = vae.encode(image)
    if not hasattr(encoded, "latent_dist"):  # Sana's
        return encoded.latent * 0.4
    return (encoded.latent_dist.mean + encoded.latent_dist.std * noise - 0.06) * 1.5


IDLE = tuple(f"transformer_blocks.1.{part}" for part in ("attn.to_add_out", "txt_mlp"))
"""What Qwen-Image's last block computes of the text, which nothing reads."""


@pytest.mark.parametrize("name", WRITERS)
def test_a_step_is_the_formula(bases: dict[str, Path], name: str):
    """ln 2 and margin 0 at first; then, pair by pair, the loss computed from its definition.

    sigma = s u / (1 + (s - 1) u) with u = (t + 1) / 1000 and s = 3, but 1 for FLUX.1 and
    Qwen-Image; x = (1 - sigma) latents + sigma noise; target = noise - latents,
    latents = (mean - 0.06) 1.5, but 0.4 mean for Sana;
    -log sigmoid(beta / 2 ((r_w - r_l) - (e_w - e_l))) with errors that are means.
    """
    components = load(bases[name])
    policy, reference = components.denoiser(), components.denoiser()
    models, rule, batch = Models(components, policy, reference), rule_of(components), pair_batch()
    output = step(draw_noise(batch, rule), models, dpo(BETA))
    assert output.loss.item() == torch.tensor(math.log(2)).item()
    assert bool((output.margin == 0).all())
    output.loss.backward()
    for parameter_name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == parameter_name.startswith(IDLE), parameter_name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        output = step(draw_noise(batch, rule), models, dpo(BETA))
        draws, shift = draws_of(batch, rule), 1.0 if name.startswith(("flux", "qwen")) else 3.0
        condition = components.condition(batch.prompts, batch.size, batch.cut)

        def error(model: Any, pair: int, side: int, pixels: Tensor) -> Tensor:
            latents = latents_of(components.vae, pixels, draws.posterior[pair, side])
            noise = draws.noise[pair]
            u = (draws.timestep[pair].item() + 1) / 1000
            sigma = shift * u / (1 + (shift - 1) * u)
            one = rows_of(condition, [pair])
            level = torch.tensor([1000 * sigma])
            predicted = components.predict(model, (1 - sigma) * latents + sigma * noise, level, one)
            return (predicted - (noise - latents)).double().pow(2).mean()

        for pair in range(4):
            gaps = [
                error(model, pair, 0, batch.winner[pair]) - error(model, pair, 1, batch.loser[pair])
                for model in (policy, reference)
            ]
            expected = torch.nn.functional.softplus(0.5 * BETA * (gaps[0] - gaps[1]))
            assert abs(expected.item() - math.log(2)) > 1e-3  # the models differ
            assert output.losses[pair].item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-3)


def test_checkpointed_activations_change_no_gradient(bases: dict[str, Path]):
    components = load(bases["flux"])
    gradients = []
    for kind in ActivationCheckpointing:
        policy = components.denoiser()
        checkpoint_activations(policy, kind)
        models = Models(components, policy, components.denoiser())
        step(draw_noise(pair_batch(), rule_of(components)), models, dpo(BETA)).loss.backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for others in gradients[1:]:
        for ours, theirs in zip(gradients[0], others, strict=True):
            assert torch.equal(ours, theirs)


# --- noise levels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}]
)
def test_noise_levels_are_those_of_a_new_scheduler(settings: dict):
    """A static shift is included once, a dynamic one not at all; the last level is pure noise."""
    theirs = flow_scheduler(**settings)
    process = flow_process("m", INDEX, dict(theirs.config) | CLASS)
    ours = rectified_flow(process.num_timesteps, process.training_shift, 1.0, CPU)
    assert torch.equal(ours.sigmas.flip(0), theirs.sigmas)
    every = torch.arange(1000)
    assert torch.equal(ours.denoiser_timestep(every).flip(0), theirs.timesteps)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 500, 999])
    expected = theirs.scale_noise(latents, ours.denoiser_timestep(at), noise)
    torch.testing.assert_close(ours.add_noise(latents, noise, at), expected)
    assert torch.equal(ours.add_noise(latents, noise, at)[2], noise[2])
    assert torch.equal(ours.get_target(latents, noise, at), noise - latents)


def test_a_shift_above_1_and_a_mean_above_0_mean_more_noise():
    """sigma = 3 / 4 instead of 1 / 2; and the drawn timesteps' logits have the stated mean."""
    flow = rectified_flow(1000, 3.0, 1.0, CPU)
    assert flow.sigmas[499].item() == pytest.approx(0.75)
    assert bool((flow.sigmas.diff() > 0).all())
    rule = DrawRule(seed=0, num_timesteps=1000, latent_shape=lambda _: (1, 1, 1))
    spec = TimestepSpec(kind=TimestepKind.logit_normal, mean=0.7, std=0.6)
    rule = replace(rule, timesteps=timestep_rule(spec))
    names = [str(index) for index in range(1500)]
    drawn = draw(rule, [0] * 1500, names, SQUARE).timestep
    logits = ((drawn + 0.5) / 1000).logit()
    assert logits.mean().item() == pytest.approx(0.7, abs=0.05)
    assert logits.std().item() == pytest.approx(0.6, abs=0.05)


def test_a_sheet_descends_along_the_shifted_path_and_its_steps_are_eulers():
    flow = rectified_flow(1000, 1.0, 3.0, CPU)
    path = list(flow.descent(4))
    assert path[0][0] == 1000
    assert path[-1][1] == 0
    assert path[2][0] == pytest.approx(1000 * 3 * 0.5 / 2)
    theirs = flow_scheduler()
    theirs.set_timesteps(sigmas=[one / 1000 for one, _ in path])
    noisy, predicted = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for (at, before), timestep in zip(path, theirs.timesteps, strict=True):
        expected = theirs.step(predicted, timestep, noisy).prev_sample
        torch.testing.assert_close(flow.step_back(noisy, predicted, at, before), expected)


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_a_path_ends_where_the_scheduler_says(settings: dict):
    """With shift_terminal the last step begins there; the others are stretched."""
    theirs = flow_scheduler(**settings, shift_terminal=0.02)
    process = flow_process("m", INDEX, dict(theirs.config) | CLASS)
    shift = process.sampling_shift(1024)
    theirs.set_timesteps(sigmas=[1 - step / 5 for step in range(5)], mu=math.log(shift))
    flow = rectified_flow(1000, 1.0, shift, CPU, process.terminal)
    path = [at for at, _ in flow.descent(5)]
    assert path == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    assert path[-1] == pytest.approx(20)
    assert list(flow.descent(1)) == [(1000, 0)]  # has no other to stretch to


def test_the_pipelines_dynamic_shift_is_known():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    settings = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}
    process = flow_process("m", INDEX, CLASS | settings)
    for patches in (256, 1024, 4096):
        mu = calculate_shift(patches, base_shift=0.4, max_shift=1.2)
        assert process.sampling_shift(patches) == pytest.approx(math.exp(mu))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "which means the discrete process of DDPM; a Stable"),
        ({"_class_name": "EDMEulerScheduler"}, "means the process of EDM"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "means no process that is known here"),
        ({"_class_name": None}, "has no _class_name"),
        ({"invert_sigmas": True}, "invert_sigmas=True; allowed: false"),
        ({"shift": 0}, "shift=0; allowed: a number above 0"),
        ({"shift": None}, "shift=None; allowed"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1; allowed"),
        ({"use_dynamic_shifting": 2}, "use_dynamic_shifting=2; allowed: true, false"),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, "allowed: exponential"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 9}, "more than base_image_seq"),
        ({"shift_terminal": 1.5}, "shift_terminal=1.5; allowed: a number between 0 and 1, or null"),
    ],
)  # fmt: skip
def test_other_processes_are_refused(settings: dict, message: str):
    with pytest.raises(ForwardProcessError, match=message):
        flow_process("m", INDEX, CLASS | settings)
    with pytest.raises(ForwardProcessError, match="a flow-matching model always predicts noise"):
        flow_process("m", INDEX, CLASS, Prediction.epsilon)


SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True,
    "prediction_type": "flow_prediction", "flow_shift": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("family", [flux, z_image, qwen_image])
def test_a_scheduler_that_the_pipeline_cannot_call_is_refused(family: Any):
    """Heun's takes neither sigmas nor a shift by size, which these pipelines give."""
    heun = {"_class_name": "FlowMatchHeunDiscreteScheduler"}
    flow_process("m", INDEX, heun)
    with pytest.raises(
        ForwardProcessError, match=r"Heun.* cannot call; .* FlowMatchEulerDiscrete\."
    ):
        family.FAMILY.process("m", {"_class_name": family.FAMILY.pipeline}, heun)


def test_a_solver_of_the_discrete_process_may_sample_from_a_flow():
    """Sana's: its shift has another name, which a scheduler that is read in its place ignores."""
    process = sana.FAMILY.process("m", {}, SOLVER)
    assert (process.training_shift, process.sampling_shift(99)) == (3.0, 3.0)
    with pytest.raises(ForwardProcessError, match="the discrete process of DDPM; a Stable"):
        flow_process("m", INDEX, SOLVER)
    for change, message in {
        "use_flow_sigmas": "use_flow_sigmas=None; allowed: True, as a flow-matching model needs",
        "prediction_type": "prediction_type=None; allowed: flow_prediction",
    }.items():
        with pytest.raises(ForwardProcessError, match=message):
            sana.FAMILY.process("m", {}, {k: v for k, v in SOLVER.items() if k != change})
    with pytest.raises(ForwardProcessError, match="use_dynamic_shifting=True; allowed: false"):
        sana.FAMILY.process("m", {}, CLASS | {"use_dynamic_shifting": True})


# --- settings that mean nothing for a model ------------------------------------------------------


def test_settings_of_other_models_are_refused(bases: dict[str, Path], tmp_path: Path):
    base = open_model(ModelSpec(path=str(bases["sd3"]), resolution=SIDE))
    with pytest.raises(ModelError, match="train.channels_last=true is for .* set it to false"):
        check_settings(base, ModelSpec(), TrainSpec(channels_last=True))
    check_settings(base, ModelSpec(), TrainSpec(timesteps=TimestepSpec(shift=2.0)))
    sd1 = open_model(ModelSpec(path=str(write_base(tmp_path / "sd")), resolution=SIDE))
    with pytest.raises(ModelError, match=r"train.timesteps.shift=2 moves .*: set it to null"):
        check_settings(sd1, ModelSpec(), TrainSpec(timesteps=TimestepSpec(shift=2.0)))
    with pytest.raises(ModelError, match="model.guidance=2 is what .*; model.path=.* is none"):
        open_model(ModelSpec(path=str(bases["flux_schnell"]), resolution=SIDE, guidance=2.0))
    guided = ModelSpec(path=str(bases["flux"]), resolution=SIDE, guidance=2.0)
    assert (open_model(guided).guidance, model_identity(guided)["guidance"]) == (2.0, 2.0)
    predicting = ModelSpec(path=str(bases["sd3"]), prediction_type=Prediction.epsilon)
    with pytest.raises(ValueError, match="model.prediction_type=epsilon is set, but a flow"):
        open_model(predicting)


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("sd3", 18, "model.resolution=18 is no multiple of 4, the pixels of a patch of latents"),
        ("flux", 18, "model.resolution=18 is no multiple of 4"),
        ("sd3", 64, "model.resolution=64 is more than 32, for which the transformer has positions"),
        ("z_image", 128, "model.resolution=128 is more than 64, for which the transformer has pos"),
    ],
)
def test_the_resolution_must_fit(bases: dict[str, Path], name: str, resolution: int, message: str):
    with pytest.raises(ModelError, match=message):
        open_model(ModelSpec(path=str(bases[name]), resolution=resolution))


def test_half_a_t5_and_other_input_channels_are_refused(bases: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(bases["sd3"], tmp_path / "m"))
    index = json.loads((folder / "model_index.json").read_text())
    without = index | {"tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(without))
    with pytest.raises(ModelError, match="only one of text_encoder_3 and tokenizer_3"):
        open_model(ModelSpec(path=str(folder), resolution=SIDE))
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"in_channels": 33}))
    with pytest.raises(ModelError, match="33 input channels for latents of 16"):
        open_model(ModelSpec(path=str(folder), resolution=SIDE))


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("sana", "transformer", {"guidance_embeds": True}, "guidance_embeds=True; .* have False"),
        ("sana", "transformer", {"timestep_scale": 1000.0}, "timestep_scale=1000.0; .* have 1"),
        ("sana", "transformer", {"out_channels": 32}, "out_channels=32; .* have 16"),
        ("sana", "vae", {"latents_mean": [0.0] * 16}, "SanaPipeline ignores when it decodes"),
        (
            "z_image",
            "transformer",
            {"all_patch_size": [4]},
            "all_patch_size=.4.; the pipeline takes 2",
        ),
        (
            "z_image",
            "transformer",
            {"siglip_feat_dim": 8},
            "siglip_feat_dim, which is given images",
        ),
        ("z_image", "vae", {"_class_name": "AutoencoderTiny"}, "Tiny; allowed are AutoencoderKL"),
        ("qwen_image", "transformer", {"zero_cond_t": True}, "zero_cond_t=true, as the forms have"),
        ("qwen_image", "vae", {"input_channels": 4}, "input_channels=4, as that of the layered"),
        ("qwen_image", "vae", {"z_dim": 8}, "latents_mean=.* allowed: a list of 8 numbers"),
        (
            "qwen_image",
            "vae",
            {"latents_mean": None, "latents_std": None},
            "latents_mean=None; allowed: a list of numbers, which QwenImagePipeline needs",
        ),
    ],
)
def test_other_parts_are_refused(
    bases: dict[str, Path], tmp_path: Path, name: str, part: str, change: dict, message: str
):
    folder = Path(shutil.copytree(bases[name], tmp_path / "m"))
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_model(ModelSpec(path=str(folder), resolution=SIDE))


# --- real shapes ---------------------------------------------------------------------------------

TRANSFORMERS = {
    "SD3 medium": (shapes.SD3_MEDIUM, sd3, 2_028_328_000),
    "SD3.5 medium": (shapes.SD35_MEDIUM, sd3, 2_243_171_520),
    "SD3.5 large": (shapes.SD35_LARGE, sd3, 8_056_627_520),
    "FLUX.1 dev": (shapes.FLUX_DEV, flux, 11_901_408_320),
    "FLUX.1 schnell": (shapes.FLUX_SCHNELL, flux, 11_891_178_560),
    "Z-Image": (shapes.Z_IMAGE, z_image, 6_154_908_736),
    "Sana 1.6B": (shapes.SANA, sana, 1_604_462_752),
    "Qwen-Image": (shapes.QWEN_IMAGE, qwen_image, 20_430_401_088),
}
"""The published configurations, and how many parameters they have."""

TEXT_SHAPES = {
    sd3: ((1, 333, 4096), (1, 2048)),
    flux: ((1, 333, 4096), (1, 768)),
    z_image: ((1, 512, 2560),),
    sana: ((1, 300, 2304),),
    qwen_image: ((1, 512, 3584),),
}
"""States and, where there are some, pooled states of a prompt."""


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_published_transformers_take_what_we_give_them(name: str):
    """On the meta device at 1024 pixels: shapes and counts are real, numbers are not."""
    import diffusers

    settings, module, parameters = TRANSFORMERS[name]
    family = module.FAMILY
    with torch.device("meta"):
        model = getattr(diffusers, family.parts["transformer"])(**settings).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        text = PromptEmbeds(*map(torch.zeros, TEXT_SHAPES[module]))
        if module in (z_image, sana, qwen_image):
            text = replace(text, length=torch.full((1,), 99, device="cpu"))
        config = ModelConfig(index={}, denoiser=model.config, vae={}, scheduler={})
        guidance = family.guidance(config)
        condition = family.condition(text, torch.full((1, 2), 1024), Size(1024, 1024), guidance)
    shape = (family.latent_channels(config), 128, 128)
    assert shape[0] == (32 if module is sana else 16)
    if name in ("SD3.5 large", "FLUX.1 dev"):
        # Two operations for each weight and patch, but modulations are computed once an image.
        flops = forward_flops(model, family, shape, condition)
        assert 0.4 < flops / (2 * parameters * 64 * 64) < 2
    if name in PUBLISHED:
        assert PUBLISHED[name].denoiser == parameters
        linear = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
        assert LINEAR[name] == sum(layer.weight.numel() for layer in linear)
        attach(model, LoraSpec(rank=1, targets=list(family.lora_targets)), 0, with_reference=False)
        assert ADAPTERS[name] == 16 * counts(model).adapter

"""Every family is conditioned as its own pipeline does it, and trains through the real step."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SD15, SD21, SDXL
from data.families import sd1, sdxl
from data.families.sdxl import time_ids
from data.images import Size
from data.models.family import Condition
from data.models.text_encoders import encode_distinct
from tests.helpers_ranks import run_ranks, shared_place
from tests.helpers_train import SIDE, SQUARE, write_base, write_sdxl_base
from train.config import ModelSpec, Precision
from train.dpo.draws import DrawRule
from train.dpo.objectives import dpo
from train.dpo.step import Models, draw_noise, draws_of, step
from train.loader.loader import PairBatch
from train.models.base_model import open_model
from train.models.components import ModelComponents, load_components

CPU = torch.device("cpu")
PROMPTS = ("a red cat", "a blue cat", "", "a red cat")
SIZES = torch.tensor([[[20, 40], [16, 16]], [[16, 16], [48, 17]], [[32, 31], [99, 64]],
                      [[1024, 768], [768, 1024]]])  # fmt: skip

PUBLISHED = {
    "sd15": (SD15, 859_520_964),
    "sd21": (SD21, 865_910_724),
    "sdxl": (SDXL, 2_567_463_684),
}
"""The UNets' published configurations, and how many parameters they have."""


@functools.cache
def published_unet(name: str) -> Any:
    """A UNet of the real shape, without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED[name][0])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sd": write_base(root / "sd"),
        "sd_v": write_base(root / "sd_v", "v_prediction"),
        "sdxl": write_sdxl_base(root / "sdxl"),
        "sdxl_empty_text": write_sdxl_base(root / "empty", zeros=False, upcast=False),
    }


def load(base: Path, precision: Precision = Precision.fp32) -> ModelComponents:
    return load_components(ModelSpec(path=str(base), resolution=SIDE), precision, CPU)


# --- real shapes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "latent"), [("sd15", 64), ("sd21", 96), ("sdxl", 128)])
def test_the_published_unets_take_what_we_give_them(name: str, latent: int):
    """On the meta device: shapes and parameter counts are real, numbers are not."""
    unet, (config, parameters) = published_unet(name), PUBLISHED[name]
    assert sum(p.numel() for p in unet.parameters()) == parameters
    with torch.device("meta"):
        added = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)}
        condition = Condition(
            torch.zeros(2, 77, config["cross_attention_dim"]), added if name == "sdxl" else None
        )
        noisy, timestep = torch.zeros(2, 4, latent, latent), torch.zeros(2, dtype=torch.int64)
        family = (sdxl if name == "sdxl" else sd1).FAMILY
        predicted = family.predict(unet, noisy, timestep, condition)
    assert predicted.shape == noisy.shape


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sdxl_empty_text"])
@torch.no_grad()
def test_sdxl_prompts_are_encoded_as_the_pipeline_does(bases: dict[str, Path], name: str):
    """Also the empty one: the pipeline's unconditional text is zeros or not, as its folder says."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(bases[name])
    components = load(bases[name])
    text = encode_distinct(components.text, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(
            prompt or "x", device="cpu", do_classifier_free_guidance=True
        )
        assert text.pooled is not None
        wanted = (states, pooled) if prompt else (empty, empty_pooled)
        for ours, theirs in zip((text.states[row], text.pooled[row]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)  # other batch sizes
    assert text.pooled is not None
    assert bool((text.pooled[2] == 0).all()) == (name == "sdxl")
    assert bool((text.states[2] == 0).all()) == (name == "sdxl")


def test_each_distinct_prompt_is_encoded_once(bases: dict[str, Path]):
    components, seen = load(bases["sd"]), []
    embeds = encode_distinct(
        lambda prompts: seen.append(list(prompts)) or components.text(prompts), PROMPTS
    )
    assert seen == [["", "a blue cat", "a red cat"]]
    assert torch.equal(embeds.states[0], embeds.states[3])
    assert not torch.equal(embeds.states[0], embeds.states[1])


# --- sizes ---------------------------------------------------------------------------------------


def test_time_ids_are_each_images_own():
    """Height, width, top, left, target height and width. 20x40 becomes 16x32 and loses 8 columns on
    each side; 48x17 becomes 45x16 and loses 14 rows at the top."""
    ids = time_ids(SIZES[:2].flatten(0, 1), SQUARE)
    assert ids.tolist() == [
        [20, 40, 0, 8, 16, 16],
        [16, 16, 0, 0, 16, 16],
        [16, 16, 0, 0, 16, 16],
        [48, 17, 14, 0, 16, 16],
    ]
    assert ids.dtype is torch.float32


def test_time_ids_follow_the_size_that_an_image_is_cut_to():
    """20x40 becomes 16x32 for a size of 8x32 and loses 4 rows at the top."""
    assert time_ids(SIZES[0, :1], Size(32, 8)).tolist() == [[20, 40, 4, 0, 8, 32]]


def test_a_pair_shares_its_text_and_not_its_sizes(bases: dict[str, Path]):
    components = load(bases["sdxl"], Precision.bf16)
    condition = components.condition(PROMPTS, SIZES, SQUARE)
    assert condition.added is not None
    for tensor in (condition.states, condition.added["text_embeds"]):
        assert torch.equal(tensor[:4], tensor[4:])
        assert tensor.dtype is torch.bfloat16
    sides = time_ids(SIZES[:, 0], SQUARE), time_ids(SIZES[:, 1], SQUARE)
    assert torch.equal(condition.added["time_ids"], torch.cat(sides))  # winners, then losers
    assert load(bases["sd"]).condition(PROMPTS, SIZES, SQUARE).added is None


# --- the VAE -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sd", torch.bfloat16), ("sdxl", torch.float32), ("sdxl_empty_text", torch.bfloat16)],
)
def test_a_vae_that_overflows_stays_in_fp32(
    bases: dict[str, Path], name: str, expected: torch.dtype
):
    components = load(bases[name], Precision.bf16)
    assert components.vae.dtype is expected
    assert components.denoiser().dtype is torch.bfloat16
    pixels = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    latents = components.encode_images(pixels, torch.zeros(2, *components.latent_shape(SQUARE)))
    assert latents.dtype is torch.float32
    assert latents.shape[1:] == components.latent_shape(SQUARE)


# --- a step --------------------------------------------------------------------------------------


def pair_batch() -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    winner, loser = torch.randint(0, 256, (2, 4, SIDE, SIDE, 3), generator=generator).byte()
    ids = tuple(f"pair-{i}" for i in range(4))
    margin = torch.ones(4, dtype=torch.int64)
    return PairBatch((0,) * 4, ids, PROMPTS, winner, loser, margin, torch.ones(4), SIZES, SQUARE)


@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", "sdxl_empty_text"])
def test_each_family_trains_through_the_step(bases: dict[str, Path], name: str):
    """ln 2 and margin 0 at first; the gradient reaches every weight and lowers the loss."""
    components = load(bases[name])
    policy, reference = components.denoiser(), components.denoiser()
    models, beta = Models(components, policy, reference), 50.0
    rule = DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)
    output = step(draw_noise(pair_batch(), rule), models, dpo(beta))
    assert output.loss.item() == torch.tensor(math.log(2)).item()
    assert bool((output.margin == 0).all())
    output.loss.backward()
    for parameter_name, parameter in policy.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all()
    with torch.no_grad():
        for parameter in policy.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.02)
    assert step(draw_noise(pair_batch(), rule), models, dpo(beta)).loss < output.loss


@torch.no_grad()
def test_a_step_of_sdxl_is_the_formula_with_the_pipelines_own_parts(bases: dict[str, Path]):
    """Image by image, with diffusers' prompt encoding, time ids and noise schedule."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    components = load(bases["sdxl"])
    policy, reference = components.denoiser(), components.denoiser()
    torch.manual_seed(5)
    for parameter in policy.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    rule = DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)
    batch = pair_batch()
    output = step(draw_noise(batch, rule), Models(components, policy, reference), dpo(5000.0))
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    draws = draws_of(batch, rule)

    def error(unet: Any, pair: int, side: int, pixels: Tensor) -> Tensor:
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(
            batch.prompts[pair] or "x", device="cpu", do_classifier_free_guidance=True
        )
        if not batch.prompts[pair]:
            states, pooled = empty, empty_pooled
        image = pixels.permute(2, 0, 1)[None] / 127.5 - 1
        posterior = pipeline.vae.encode(image).latent_dist
        latents = posterior.mean + posterior.std * draws.posterior[pair : pair + 1, side]
        latents = latents * pipeline.vae.config.scaling_factor
        noise, t = draws.noise[pair : pair + 1], draws.timestep[pair : pair + 1]
        height, width = SIZES[pair, side].tolist()
        scale = SIDE / min(height, width)
        crop = ((round(height * scale) - SIDE) // 2, (round(width * scale) - SIDE) // 2)
        ids = pipeline._get_add_time_ids((height, width), crop, (SIDE, SIDE), torch.float32, 12)
        predicted = unet(
            scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample  # fmt: skip
        return (predicted - noise).double().pow(2).mean()

    for pair in range(4):
        gaps = [
            error(unet, pair, 0, batch.winner[pair]) - error(unet, pair, 1, batch.loser[pair])
            for unet in (policy, reference)
        ]
        expected = torch.nn.functional.softplus(0.5 * 5000.0 * (gaps[0] - gaps[1]))
        assert abs(expected.item() - math.log(2)) > 1e-3  # the models differ, or this shows nothing
        assert output.losses[pair].item() == pytest.approx(expected.item(), rel=2e-2, abs=1e-4)


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_of_sdxl_ends_in_its_pipeline(tmp_path: Path, bases: dict[str, Path], tuning: str):
    """bf16, gradient checkpointing, caption dropout: from labels to a folder that draws."""
    place, name = shared_place(), f"sdxl-{tuning}"
    output = place.train(
        name, f"model.path={bases['sdxl']}", f"tuning={tuning}", "train.precision=bf16",
        "train.gradient_checkpointing=full", "train.caption_dropout=0.3", "train.flip=true",
        "train.steps=3", "train.reference.every=2",
    )  # fmt: skip
    assert "GiB a process without activations, counted (policy" in output
    assert [line["margin"] == 0 for line in place.journal(name)] == [True, False, True]
    run_ranks(tmp_path, 1, draws_an_image, place.folder(name) / "pipeline", bases["sdxl"])


def draws_an_image(folder: Path, base: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline, before = (DiffusionPipeline.from_pretrained(path) for path in (folder, base))
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("a red cat", num_inference_steps=2, height=16, width=16, output_type="pt")
    assert torch.isfinite(result.images).all()
    old, new = before.unet.state_dict(), pipeline.unet.state_dict()
    assert old.keys() == new.keys()
    assert any(not torch.allclose(new[key].float(), old[key], atol=1e-3) for key in old)


@torch.no_grad()
def test_tiles_are_the_vaes_own(bases: dict[str, Path]):
    """Tiles of 8 pixels at 0, 6 and 12: the first corner, before the seams, is that of the tile."""
    whole = load(bases["sd"])
    tiled = load_components(
        ModelSpec(path=str(bases["sd"]), resolution=SIDE, vae_tile=8), Precision.fp32, CPU
    )
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1))
    pixels, noise = pixels.to(torch.uint8), torch.zeros(2, 4, SIDE // 2, SIDE // 2)
    latents, others = tiled.encode_images(pixels, noise), whole.encode_images(pixels, noise)
    assert latents.shape == others.shape
    assert not torch.allclose(latents, others)
    corner = whole.encode_images(pixels[:, :8, :8].contiguous(), noise[:, :, :4, :4])
    torch.testing.assert_close(latents[:, :, :3, :3], corner[:, :, :3, :3])
    assert tiled.decode_latents(latents).shape == (2, 3, SIDE, SIDE)


def test_tiles_that_cut_nothing_are_refused(bases: dict[str, Path]):
    with pytest.raises(ValueError, match=r"model\.vae_tile=16 cuts no image of .*=16"):
        ModelSpec(path="x", resolution=SIDE, vae_tile=SIDE)
    with pytest.raises(ValueError, match=r"model\.vae_tile=12 is no multiple of 8: tiles overlap"):
        open_model(ModelSpec(path=str(bases["sd"]), resolution=SIDE, vae_tile=12))

"""Flow models beyond the step: sampled, exported, read back, and their latents written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.artifacts.latents import LatentFormat
from data.devices import Dtype
from data.families.vae import find_vae, latent_shape
from data.images import Size
from data.models.folder import check_model_folder, check_part
from generate.config import Scheduler
from generate.image_files import Model, SamplesError
from generate.model_process import check_folder
from generate.pipelines import left_out
from generate.sampler import ImageGenerator, initial_noise
from label.scoring.vae_encoder import VaeEncoder
from tests.helpers_flow import CHANNELS, SIDES, WRITERS, flow_scheduler
from tests.helpers_ranks import run_ranks, shared_place
from tests.helpers_texts import text_files, write_texts
from tests.helpers_train import SIDE, WORDS, opened
from tests.test_flow_models import CPU, load
from tests.test_lora import train_a_little, trained
from train.config import LoraSpec, SampleSpec
from train.export.pipeline import (
    ADAPTER,
    export_adapter,
    export_pipeline,
    merged_denoiser,
    trained_denoiser,
)
from train.models.lora import attach, in_diffusers_format
from train.trainer.metrics_log import MetricsLog
from train.trainer.samples import Samples

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
"""Of NumPy, about a scheduler of diffusers."""

PROMPTS = ["a red cat", "a blue cat"]
NEWER = {"model.": "model.language_model.", "visual.": "model.visual."}
"""How names of Qwen2.5-VL's weights begin in files, and in transformers."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: write(root / name) for name, write in WRITERS.items()}


def pipeline_of(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, **left_out(str(folder)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(folder: Path, adapter: str = "", scheduler: Scheduler = Scheduler.ddim, **more: Any):
    settings = {"size": Size(SIDE, SIDE), "steps": 2, "guidance": 3.0, "dtype": Dtype.fp32} | more
    model = Model(name="m", path=str(folder), adapter=adapter)
    return ImageGenerator.load(model, CPU, scheduler=scheduler, **settings)


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3_without_t5", "flux", "z_image", "sana", "qwen_image"])
def test_images_come_from_the_models_own_scheduler(bases: dict[str, Path], name: str):
    """Those of the pipeline from the same noise; they do not depend on the batch."""
    side = SIDES.get(name, SIDE)
    ours, scheduler = generator(bases[name], size=Size(side, side)), flow_scheduler()
    solver = "DPMSolverMultistepScheduler" if name == "sana" else type(scheduler).__name__
    assert type(ours.pipeline.scheduler).__name__ == solver
    whole = ours.sample(PROMPTS, [0, 1]).astype(int)
    assert whole.shape == (2, side, side, 3)
    assert np.abs(ours.sample(PROMPTS[1:], [1])[0] - whole[1]).max() <= 1
    noise = initial_noise(PROMPTS, [0, 1], (CHANNELS, side // 2, side // 2))
    images = pipeline_of(bases[name])(
        [*PROMPTS], latents=ours.family.pipeline_latents(noise), height=side, width=side,
        num_inference_steps=2, output_type="np", **ours.family.pipeline_options(2, 3.0),
    ).images  # fmt: skip
    assert np.abs(whole - (images * 255).round()).max() <= 1


def test_a_sheet_has_the_pipelines_path_and_guidance(bases: dict[str, Path]):
    """Those of Qwen-Image are its own: sigmas end at 0.02, and guided patches keep their length."""
    components, pipeline = load(bases["qwen_image"]), pipeline_of(bases["qwen_image"])
    noise = initial_noise(PROMPTS, [0, 1], (CHANNELS, SIDE // 2, SIDE // 2))
    family, condition = components.base.family, components.condition_of_new([*PROMPTS, "", ""])
    expected = pipeline(
        [*PROMPTS], latents=family.pipeline_latents(noise), height=SIDE, width=SIDE,
        num_inference_steps=3, output_type="pt", **family.pipeline_options(2, 30.0),
    ).images  # fmt: skip
    spec, unused = SampleSpec(steps=3, guidance=30.0), object.__new__(MetricsLog)
    sheet = Samples(spec, components, (*PROMPTS,), condition, noise, unused)
    images = sheet.generate(components.denoiser()) / 2 + 0.5
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_sampled_is_refused(bases: dict[str, Path]):
    with pytest.raises(ValueError, match="resolution=18 is no multiple of 4"):
        generator(bases["flux"], size=Size(18, 18))
    with pytest.raises(
        SamplesError, match="evaluate.steps=1: .* shift_terminal=0.02, .* 2 and more"
    ):
        generator(bases["qwen_image"], steps=1)
    with pytest.raises(SamplesError, match="cpu_offload=true moves .* the device is cpu"):
        generator(bases["flux"], offload=True)
    model = Model(name="m", path=str(bases["sd3"]), adapter=str(bases["sd3"] / "x.safetensors"))
    with pytest.raises(ValueError, match="model 'm': .*x.safetensors"):
        ImageGenerator.load(model, CPU, scheduler=Scheduler.own, dtype=Dtype.fp32,
                            size=Size(SIDE, SIDE), steps=1, guidance=1.0)  # fmt: skip


def test_a_folder_that_does_not_fit_is_refused_before_it_is_loaded(
    bases: dict[str, Path], tmp_path: Path
):
    """A scheduler of another process, T5's weights cut short, a tokenizer of another T5."""
    folder = Path(shutil.copytree(bases["sd3"], tmp_path / "m"))
    scheduler = folder / "scheduler/scheduler_config.json"
    before = scheduler.read_text()
    scheduler.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    for choice in Scheduler:
        with pytest.raises(SamplesError, match="EDMEulerScheduler, which means the process of EDM"):
            check_folder(Model(name="m", path=str(folder)), choice, 2, Size(SIDE, SIDE))
    scheduler.write_text(before)
    weights = folder / "text_encoder_3/model.safetensors"
    tensors = load_file(weights)
    assert "shared.weight" in tensors
    removed = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({key: t for key, t in tensors.items() if key != removed}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"text_encoder_3/model.safetensors .* missing {removed}"):
        check_model_folder(folder, "m")
    save_file(tensors, weights, {"format": "pt"})
    config = folder / "text_encoder_3/config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": 5'))
    with pytest.raises(ValueError, match="tokenizer_3 ends a prompt with token 1, .* waits for 5"):
        check_model_folder(folder, "m")


def test_a_language_model_may_have_a_head_and_needs_a_chat_template(
    bases: dict[str, Path], tmp_path: Path
):
    """Saved with its head, its names begin with `model.`; the head is not needed."""
    folder = Path(shutil.copytree(bases["z_image"], tmp_path / "m"))
    weights = folder / "text_encoder/model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors | {"lm_head.weight": torch.ones(40, 16)}, weights, {"format": "pt"})
    check_model_folder(folder, "m")
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder/model.safetensors .* missing norm.weight"):
        check_model_folder(folder, "m")
    (folder / "tokenizer/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"tokenizer has no chat template, .*chat_template.jinja"):
        check_part(folder, "tokenizer", "m")


def test_a_vision_language_model_may_have_either_of_its_names(
    bases: dict[str, Path], tmp_path: Path
):
    """Those of transformers' class; its files have the older ones."""
    folder = Path(shutil.copytree(bases["qwen_image"], tmp_path / "m"))
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    assert {"model.norm.weight", "visual.patch_embed.proj.weight"} <= tensors.keys()
    newer = {
        re.sub(r"^(model\.|visual\.)", lambda old: NEWER[old[0]], name): tensor
        for name, tensor in tensors.items()
    }
    save_file(newer, weights, {"format": "pt"})
    check_part(folder, "text_encoder", "m")
    newer.pop("model.language_model.norm.weight")
    save_file(newer, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder/model.safetensors .* missing norm.weight"):
        check_part(folder, "text_encoder", "m")


# --- the result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "sd3_without_t5", "flux", "z_image", "sana", "qwen_image"])
@torch.no_grad()
def test_a_trained_model_is_read_back(bases: dict[str, Path], tmp_path: Path, name: str):
    """All weights: the pipeline's tensors are those given; what was not trained is the base's."""
    base = opened(bases[name])
    weights = dict(load(bases[name]).denoiser().named_parameters())
    weights = {key: value + 0.01 for key, value in weights.items()}
    export_pipeline(base, trained_denoiser(base, weights), tmp_path / "p", {"step": 1}, "a card")
    old, new = pipeline_of(bases[name]), pipeline_of(tmp_path / "p")
    assert type(new) is type(old)
    assert new.components.keys() == old.components.keys()
    for key, value in new.transformer.state_dict().items():
        expected = weights.get(key, old.transformer.state_dict()[key])
        assert torch.equal(value, expected), key
    assert dict(new.scheduler.config) == dict(old.scheduler.config)
    assert opened(tmp_path / "p").process == base.process


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "sana", "qwen_image"])
@torch.no_grad()
def test_an_adapter_samples_what_the_merged_pipeline_samples(
    bases: dict[str, Path], tmp_path: Path, name: str
):
    side = SIDES.get(name, SIDE)
    base, spec = opened(bases[name]), LoraSpec(rank=2, alpha=3.0)
    spec.targets = list(base.family.lora_targets)
    denoiser = load(bases[name]).denoiser()
    attach(denoiser, spec, seed=0, with_reference=True)
    train_a_little(denoiser)
    adapter = in_diffusers_format(trained(denoiser), spec.scale, base.family.denoiser)
    export_adapter(base, adapter, tmp_path / "lora", {"step": 1}, "a card")
    export_pipeline(base, merged_denoiser(base, adapter), tmp_path / "p", {"step": 1}, "a card")
    images = [
        generator(folder, file, size=Size(side, side)).sample(PROMPTS[:1], [0]).astype(int)
        for folder, file in (
            (bases[name], str(tmp_path / "lora" / ADAPTER)),
            (tmp_path / "p", ""),
            (bases[name], ""),
        )
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 1


def test_an_adapter_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path):
    spec, denoiser = LoraSpec(rank=2, targets=["to_q"]), load(bases["flux"]).denoiser()
    attach(denoiser, spec, seed=0, with_reference=False)
    adapter = in_diffusers_format(trained(denoiser), 1.0, "transformer")
    export_adapter(opened(bases["flux"]), adapter, tmp_path / "lora", {"step": 1}, "a card")
    with pytest.raises(SamplesError, match="model 'm': "):
        generator(bases["sd3"], str(tmp_path / "lora" / ADAPTER))


# --- stage one's latents -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "sana", "qwen_image"])
@torch.no_grad()
def test_latents_of_16_channels_are_written_unscaled_and_read_scaled(
    bases: dict[str, Path], name: str
):
    vae, components = find_vae(bases[name]), load(bases[name])
    assert (vae.channels, vae.factor, vae.force_upcast) == (CHANNELS, 2, name in ("sd3", "sana"))
    assert vae.has_posterior == (name != "sana")
    form = LatentFormat(
        vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), dtype="fp32", moments=True,
        flip=False, compute="fp32",
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    raw = VaeEncoder(bases[name], form, CPU, 2)([image])
    moments = raw.view(torch.float32).view(1, 2, *components.latent_shape(components.square))
    posterior = torch.randn(1, *components.latent_shape(components.square))
    pixels = torch.from_numpy(image)[None]
    latents = components.encode_images(pixels, posterior)
    assert torch.equal(components.sample_posterior(moments, posterior), latents)
    shift, factor = (0.0, 0.4) if name == "sana" else (0.06, 1.5)
    expected = (moments[:, 0] + moments[:, 1] * posterior - shift) * factor
    torch.testing.assert_close(latents, expected)
    decoded = components.decode_latents(latents)
    raw = latents / factor + shift
    if name == "qwen_image":  # whose images are videos of one frame
        theirs = components.vae.decode(raw[:, :, None]).sample[:, :, 0]
    else:
        theirs = components.vae.decode(raw).sample
    torch.testing.assert_close(decoded, theirs)


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("sd3", 2, ("zero=stage3", "timesteps=logit_normal", "train.caption_dropout=0.3")),
        ("flux", 1, ("tuning=lora", "reference=ema")),
    ],
)
def test_a_run_ends_in_its_pipeline(
    tmp_path: Path, bases: dict[str, Path], name: str, world: int, settings: tuple[str, ...]
):
    """bf16 and gradient checkpointing: from labels to a folder that samples.

    FLUX.1 reads encoded prompts; interrupted after two steps, it ends with the same weights.
    """
    place = shared_place()
    more = [
        f"model.path={bases[name]}", *settings, "train.precision=bf16",
        "train.gradient_checkpointing=full", "train.steps=3", "train.reference.every=2",
        "train.samples.every=3", "train.samples.count=2", "train.samples.steps=2",
    ]  # fmt: skip
    if name == "flux":
        folder = place.root / "runs" / "flow-flux" / "texts"
        files = text_files(place.root, bases[name], folder, dtype="bf16")
        write_texts(replace(files, gather=lambda: [f"a {word} cat" for word in WORDS]))
    said = place.train(f"flow-{name}", *more, world=world)
    assert ("prompts: texts in " in said) == (name == "flux")
    margins = [line["margin"] == 0 for line in place.journal(f"flow-{name}")]
    assert margins[:2] == [True, False]
    assert margins[2] == (name == "sd3")  # after a snapshot; an average only comes nearer
    folder = place.folder(f"flow-{name}")
    run_ranks(tmp_path, 1, samples_an_image, folder / "pipeline", bases[name])
    assert len(list((folder / "samples").iterdir())) == 2
    if name == "flux":
        adapter = load_file(folder / "lora" / ADAPTER)
        assert all(key.startswith("transformer.") for key in adapter)
        losses = [line["loss"] for line in place.journal("flow-flux")]
        for part in ("step-0000003", "pipeline", "lora"):
            shutil.rmtree(folder / part)
        assert "resuming after step 2" in place.train("flow-flux", *more)
        assert [line["loss"] for line in place.journal("flow-flux")] == losses
        again = load_file(folder / "lora" / ADAPTER)
        assert all(torch.equal(again[key], value) for key, value in adapter.items())


def samples_an_image(folder: Path, base: Path) -> None:
    image = generator(folder).sample(PROMPTS[:1], [0])
    assert image.shape == (1, SIDE, SIDE, 3)
    old, new = pipeline_of(base).transformer.state_dict(), load_trained(folder)
    assert old.keys() == new.keys()
    assert any(not torch.allclose(new[key], old[key], atol=1e-6) for key in old)
    if "pos_embed.pos_embed" in old:
        assert torch.equal(new["pos_embed.pos_embed"], old["pos_embed.pos_embed"])


def load_trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")

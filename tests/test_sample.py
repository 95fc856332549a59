import json
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from data.artifacts.atomic import ShardError
from data.devices import Dtype
from data.images import Size, decode, encode_png, to_pixels
from generate import image_files
from generate.config import PromptsSpec, Scheduler
from generate.image_files import (
    Model,
    SamplesError,
    ensure_same_settings,
    list_samples,
    missing,
    samples_of_rank,
)
from generate.prompts.prompt_set import load_prompts
from generate.sampler import (
    ImageGenerator,
    deterministic,
    initial_noise,
    sample_missing,
)
from tests.helpers_evaluate import SIDE, tiny_pipeline, write_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE = Size(SIDE, SIDE)
PROMPTS = ("red cat", "a dog", "big tree", "moon", "hat on cat", "sun")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(name="tiny", path=str(write_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)))


@pytest.fixture(scope="module")
def generator(model):
    return load(model)


def load(model, scheduler=Scheduler.ddim, guidance=1.5, size=SQUARE):
    return ImageGenerator.load(
        model, torch.device("cpu"), scheduler=scheduler, dtype=Dtype.fp32, size=size, steps=3,
        guidance=guidance,
    )  # fmt: skip


def test_images_have_the_size_that_is_wanted(model):
    """Twice as wide as high, whatever the model's own resolution."""
    pixels = load(model, size=Size(2 * SIDE, SIDE)).sample(["red cat"], [0])
    assert pixels.shape == (1, SIDE, 2 * SIDE, 3)


@pytest.fixture
def prompt_set(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return load_prompts(PromptsSpec(name="set", path=str(path)))


def read(image):
    return to_pixels(decode(image.path.read_bytes()))


# --- noise ---------------------------------------------------------------------------------------


def test_noise_belongs_to_prompt_and_seed_alone():
    shape = (4, 8, 8)
    one = initial_noise(["a", "b", "a"], [0, 0, 1], shape)
    two = initial_noise(["a", "a", "b"], [1, 0, 0], shape)
    assert torch.equal(one[[2, 0, 1]], two)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    torch.manual_seed(99)
    assert torch.equal(one, initial_noise(["a", "b", "a"], [0, 0, 1], shape))


def test_noise_is_standard_normal_and_independent():
    noise = initial_noise([f"prompt {i}" for i in range(400)], [0] * 400, (4, 8, 8)).flatten(1)
    number = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=5 / number**0.5)
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / number) ** 0.5)
    between = torch.corrcoef(noise) - torch.eye(400)
    assert between.abs().max() < 6.5 / 256**0.5  # 80 000 pairs of 256 numbers


def test_noise_does_not_change_between_versions():
    """Runs made years apart are compared: these are the first numbers of ("a red cat", 0),
    computed once from the key `blake2b("latents/0/a red cat", 8 bytes)` without this program."""
    noise = initial_noise(["a red cat"], [0], (4, 8, 8)).flatten()[:3]
    assert noise.tolist() == pytest.approx([-0.5629, 0.7213, -0.9832], abs=5e-5)


# --- images ------------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_batch(generator):
    """Measured on this CPU: no pixel differs. One step of 255 is allowed for other kernels."""
    prompts, seeds = list(PROMPTS) * 2, [0] * 6 + [1] * 6
    whole = generator.sample(prompts, seeds)
    assert whole.shape == (12, SIDE, SIDE, 3)
    for size in (1, 5):
        parts = [
            generator.sample(prompts[i : i + size], seeds[i : i + size]) for i in range(0, 12, size)
        ]
        assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1
    turned = generator.sample(prompts[::-1], seeds[::-1])[::-1]
    assert np.abs(turned.astype(int) - whole).max() <= 1


def test_the_same_batch_again_gives_the_same_bytes(generator):
    assert np.array_equal(generator.sample(PROMPTS, [0] * 6), generator.sample(PROMPTS, [0] * 6))


def test_prompt_seed_and_model_matter(generator, tmp_path):
    one = generator.sample(["red cat", "a dog", "red cat"], [0, 0, 1]).astype(int)
    assert np.abs(one[0] - one[1]).mean() > 1
    assert np.abs(one[0] - one[2]).mean() > 1
    other = load(Model(name="other", path=str(write_tiny_model(tmp_path, seed=1))))
    assert np.abs(one - other.sample(["red cat", "a dog", "red cat"], [0, 0, 1])).mean() > 1


def test_a_noisy_scheduler_has_its_own_noise_per_image(model, generator):
    """DDPM adds noise at every step; it too belongs to (prompt, seed)."""
    from diffusers import DDPMScheduler

    own = load(model, Scheduler.own)
    own.pipeline.scheduler = DDPMScheduler.from_config(own.pipeline.scheduler.config)
    whole = own.sample(PROMPTS, range(6))
    alone = np.concatenate([own.sample([p], [s]) for s, p in enumerate(PROMPTS)])
    assert np.abs(whole.astype(int) - alone).max() <= 1
    assert np.abs(whole.astype(int) - generator.sample(PROMPTS, range(6))).mean() > 1


def test_guidance_matters_and_one_switches_it_off(model, generator):
    free = load(model, guidance=1.0).sample(PROMPTS, [0] * 6)
    assert not np.array_equal(free, generator.sample(PROMPTS, [0] * 6))


def test_ddim_keeps_the_noise_schedule_and_never_clips_latents():
    from diffusers import PNDMScheduler

    own = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                        prediction_type="v_prediction", steps_offset=1)  # fmt: skip
    ddim = deterministic(own)
    assert torch.equal(ddim.betas, own.betas)
    assert ddim.config.prediction_type == "v_prediction"
    assert ddim.config.steps_offset == 1
    assert ddim.config.clip_sample is False  # DDIM's default is True, PNDM has no such entry


def test_latents_are_stepped_in_fp32_whatever_the_networks_compute_in(model, monkeypatch):
    """In bf16 each step would round them to 8 bits; UNet and VAE still get their own format."""
    step, seen = DDIMScheduler.step, []

    def watched(self, predicted, timestep, latents, *args, **options):
        seen.append((predicted.dtype, latents.dtype))
        return step(self, predicted, timestep, latents, *args, **options)

    monkeypatch.setattr(DDIMScheduler, "step", watched)
    half = ImageGenerator.load(
        model, torch.device("cpu"), scheduler=Scheduler.ddim, dtype=Dtype.bf16,
        size=Size(SIDE, SIDE), steps=3, guidance=1.5,
    )  # fmt: skip
    inputs = []
    half.pipeline.unet.conv_in.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    half.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    assert half.sample(PROMPTS[:2], [0, 1]).shape == (2, SIDE, SIDE, 3)
    assert seen == [(torch.float32, torch.float32)] * 3
    assert {part.dtype for part in inputs} == {torch.bfloat16}
    assert half.pipeline.unet.dtype == half.pipeline.vae.dtype == torch.bfloat16


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    with pytest.raises(ValueError, match="'broken': .*scheduler_config.json is not there"):
        load(Model(name="broken", path=str(tmp_path)))


def test_a_safety_checker_is_not_loaded(tmp_path):
    """SD1.5's index names one; its weights may be absent, and no judge wants black images."""
    folder = write_tiny_model(tmp_path, seed=0)
    index = json.loads((folder / "model_index.json").read_text())
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": checker}))
    assert load(Model(name="sd", path=str(folder))).pipeline.safety_checker is None


# --- the folder of images ----------------------------------------------------------------------


def test_sampling_resumes_image_by_image(generator, tmp_path, prompt_set):
    planned = list_samples(tmp_path, "tiny", prompt_set, seeds=[0, 1])
    assert planned[3].path == tmp_path / "tiny" / "00001-1.png"
    counts = []
    sample_missing(generator, planned, 4, counts.append)
    assert counts == [4, 4, 4]
    before = {image.path: image.path.read_bytes() for image in planned}
    gone = planned[2:9:3]
    for image in gone:
        image.path.unlink()
    counts.clear()
    stamps = {p.path: p.path.stat().st_mtime_ns for p in planned if p not in gone}
    sample_missing(generator, planned, 4, counts.append)
    assert counts == [3]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for image in planned:
        change = read(image).astype(int) - to_pixels(decode(before[image.path]))
        assert np.abs(change).max() <= 1
    assert not list((tmp_path / "tiny").glob(".*"))  # no partial file is left


class OutOfMemory:
    """A device with room for two images."""

    def __init__(self, room):
        self.room, self.calls = room, []

    def sample(self, prompts, seeds):
        self.calls.append(len(prompts))
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError("too much")
        return np.zeros((len(prompts), 4, 4, 3), np.uint8)


def test_a_full_device_gets_half_the_batch(tmp_path, prompt_set):
    source, counts = OutOfMemory(room=2), []
    planned = list_samples(tmp_path, "m", prompt_set, seeds=[0])
    sample_missing(source, planned, 16, counts.append)
    assert source.calls == [6, 3, 1, 1, 1, 1, 1, 1]
    assert sum(counts) == 6
    assert not missing(planned)


def test_images_are_encoded_beside_the_sampling(tmp_path, prompt_set, monkeypatch):
    """In threads, with the bytes of `encode_png`, and all on disk at the end."""
    threads, images = set(), list_samples(tmp_path, "m", prompt_set, [0])
    pixels = np.random.default_rng(0).integers(0, 256, (len(images), SIDE, SIDE, 3), np.uint8)
    number = {(image.prompt.text, image.seed): i for i, image in enumerate(images)}

    class Source:
        def sample(self, prompts, seeds):
            return pixels[[number[key] for key in zip(prompts, seeds, strict=True)]]

    def watched(image):
        threads.add(threading.current_thread().name)
        return encode_png(image)

    monkeypatch.setattr("generate.sampler.encode_png", watched)
    sample_missing(Source(), images, 4, lambda _: None)
    assert [image.path.read_bytes() for image in images] == [encode_png(one) for one in pixels]
    assert all(name.startswith("png") for name in threads)


def test_an_image_that_cannot_be_written_ends_the_run(tmp_path, prompt_set, monkeypatch):
    class Source:
        def sample(self, prompts, seeds):
            return np.zeros((len(prompts), SIDE, SIDE, 3), np.uint8)

    def full(*_):
        raise ShardError("the disk is full")

    monkeypatch.setattr("generate.sampler.write_bytes", full)
    for batch in (2, 100):
        with pytest.raises(ShardError, match="the disk is full"):
            sample_missing(Source(), list_samples(tmp_path, "m", prompt_set, [0]), batch, print)


def test_too_little_memory_for_one_image_is_an_error(tmp_path, prompt_set):
    with pytest.raises(
        SamplesError, match=r"not enough device memory to sample one image.*model\.resolution"
    ):
        sample_missing(
            OutOfMemory(room=0), list_samples(tmp_path, "m", prompt_set, [0]), 4, lambda _: None
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_divide_the_images_without_overlap(tmp_path, prompt_set, world_size):
    planned = list_samples(tmp_path, "m", prompt_set, seeds=[5, 6])
    parts = [samples_of_rank(planned, rank, world_size) for rank in range(world_size)]
    assert sorted(p.path for part in parts for p in part) == sorted(p.path for p in planned)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


def test_two_ranks_sample_what_one_samples(generator, tmp_path, prompt_set):
    alone = list_samples(tmp_path / "one", "m", prompt_set, seeds=[0])
    together = list_samples(tmp_path / "two", "m", prompt_set, seeds=[0])
    sample_missing(generator, alone, 6, lambda _: None)
    for rank in range(2):
        sample_missing(generator, samples_of_rank(together, rank, 2), 6, lambda _: None)
    for one, two in zip(alone, together, strict=True):
        assert np.abs(read(one).astype(int) - read(two)).max() <= 1


def test_what_another_process_samples_meanwhile_is_not_sampled_again(tmp_path, prompt_set):
    """The first process starts with the last image, the other with the first one."""
    planned = list_samples(tmp_path, "m", prompt_set, seeds=[0])
    other, counts = iter(planned), []

    def advance(count):
        counts.append(count)
        sample_missing(OutOfMemory(9), [next(other)], 1, lambda _: None)

    sample_missing(OutOfMemory(9), planned[::-1], 2, advance)
    assert not missing(planned)
    assert sum(counts) == 4


def test_images_made_with_other_settings_are_refused(tmp_path):
    wanted = {"steps": 15, "prompts": {"sha256": "x"}}
    ensure_same_settings(tmp_path, wanted)
    ensure_same_settings(tmp_path, wanted)
    with pytest.raises(ShardError, match="steps: found 15, now 20"):
        ensure_same_settings(tmp_path, wanted | {"steps": 20})


# --- models --------------------------------------------------------------------------------------


def test_fingerprints_follow_weights_and_not_the_model_card(tmp_path):
    folder = write_tiny_model(tmp_path / "m", seed=0)
    model = Model(name="m", path=str(folder))
    before = model.fingerprint()
    (folder / "README.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    assert model.fingerprint() == before
    tiny_pipeline(seed=1).unet.save_pretrained(folder / "unet")
    assert model.fingerprint() != before
    assert Model(name="m", path="a/b", revision="f" * 40).fingerprint() == "a/b@" + "f" * 40


@pytest.mark.parametrize("path", ["nowhere", ""])
def test_a_model_that_is_not_there_is_refused_early(path, tmp_path):
    (tmp_path / "empty").mkdir()
    for where in (path, str(tmp_path / "empty")):
        with pytest.raises(SamplesError, match="'m': .*; do this"):
            Model(name="m", path=where).check("do this")
    Model(name="m", path="owner/name", revision="f" * 40).check("do this")


def test_deciding_what_is_missing_needs_no_torch():
    assert not hasattr(image_files, "torch")

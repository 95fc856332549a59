"""Images while training: the same prompts and noise, drawn by DDIM as diffusers draws."""

import numpy as np
import pytest
import torch

from data.images import decode
from data.models.forward_process import Prediction
from data.models.noise_schedule import NoiseSchedule
from tests.helpers_ranks import shared_place, straight
from train.config import SampleSpec
from train.trainer.samples import sheet


def test_the_descent_is_even_and_ends_at_0():
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000), Prediction.epsilon)
    assert list(schedule.descent(4)) == [(999, 749), (749, 500), (500, 250), (250, 0)]


@pytest.mark.parametrize("kind", list(Prediction))
def test_a_step_back_is_diffusers_ddim(kind: Prediction):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, prediction_type=kind.value,
    )  # fmt: skip
    theirs.set_timesteps(10)  # its steps are 100 apart
    ours = NoiseSchedule(theirs.alphas_cumprod, kind)
    noisy, predicted = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (900, 400, 100):
        expected = theirs.step(predicted, timestep, noisy).prev_sample
        torch.testing.assert_close(
            ours.step_back(noisy, predicted, timestep, timestep - 100), expected
        )


def test_a_sheet_has_every_image_in_its_place():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 5, 7, 3), np.uint8)
    page = sheet(images)
    assert page.shape == (2 * 7 - 2, 4 * 9 - 2, 3)
    for index in range(6):
        top, left = index // 4 * 7, index % 4 * 9
        assert (page[top : top + 5, left : left + 7] == index).all()
    assert (page[7:, 2 * 9 :] == 255).all()


@pytest.mark.ranks
def test_sheets_change_no_weight_and_are_the_same_again():
    place = shared_place()
    wanted = ("train.samples.every=3", "train.samples.count=2", "train.samples.steps=3")
    place.train("drawn", "zero=stage2", *wanted)
    assert place.weights("drawn") == place.weights(straight(2, 1))
    sheets = {
        path.name: path.read_bytes() for path in (place.folder("drawn") / "samples").iterdir()
    }
    assert sorted(sheets) == ["step-0000000.png", "step-0000003.png", "step-0000006.png"]
    assert len(set(sheets.values())) == 3
    assert decode(sheets["step-0000000.png"]).size == (2 * 16 + 2, 16)
    place.train("drawn-3", "zero=stage3", *wanted, world=2)
    first = (place.folder("drawn-3") / "samples" / "step-0000000.png").read_bytes()
    assert first == sheets["step-0000000.png"]  # of the base: no rank and no stage matters
    wanted_once = ("train.samples.every=6", "train.samples.prompts=[a red cat]")
    place.train("asked", *wanted_once, "train.samples.guidance=1", "train.samples.steps=2")
    page = (place.folder("asked") / "samples" / "step-0000006.png").read_bytes()
    assert decode(page).size == (16, 16)


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("steps", 0), ("guidance", 0.5)])
def test_settings_are_checked(name: str, value: float):
    with pytest.raises(ValueError, match=rf"train.samples.{name}={value}"):
        SampleSpec(**{name: value})  # type: ignore[arg-type]

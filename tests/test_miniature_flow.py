"""The miniature's flow-matching model: its recipe, its embedded weights, and a step of training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from conf.job import composed
from data.devices import Dtype
from data.families.sd3 import T5_TOKENS
from data.images import Size
from data.miniature import scenes
from data.miniature.build import WEIGHTS
from data.miniature.oracle import oracle
from data.miniature.train_flow import EqualPadding, encode_prompts, new_transformer
from generate.config import Scheduler
from generate.image_files import Model
from generate.sampler import ImageGenerator
from tests.helpers_train import text_config
from train.config import ModelSpec, Precision
from train.dpo.draws import DrawRule
from train.dpo.objectives import dpo
from train.dpo.step import Models, draw_noise, step
from train.loader.loader import PairBatch
from train.models.components import load_components

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER, CPU = WEIGHTS / "flow", torch.device("cpu")


def test_equal_padding_is_attention_to_all_of_the_padding():
    """What the recipe trains is what the pipeline runs, which has T5_TOKENS rows of zeros."""
    torch.manual_seed(0)
    transformer = new_transformer()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)  # new ones are zero where it matters
    config = text_config(vocab_size=603, hidden_size=64, projection_dim=64, num_hidden_layers=2,
                         max_position_embeddings=16)  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    text = encode_prompts(encoders, transformer, ["", scenes.prompts("train")[0]])
    whole = functional.pad(text.states, (0, 0, 0, T5_TOKENS - 1))
    results = []
    with torch.no_grad():
        for states, processor in ((whole, None), (text.states, EqualPadding())):
            if processor is not None:
                transformer.set_attn_processor(processor)
            results.append(
                transformer(
                    torch.ones(2, 4, 8, 8),
                    encoder_hidden_states=states,
                    pooled_projections=text.pooled,
                    timestep=torch.tensor([100.0, 900.0]),
                ).sample
            )
    assert results[0].std() > 0.01
    assert (results[0][0] - results[0][1]).abs().max() > 0.01
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_the_experiment_takes_the_embedded_weights_and_the_given_pairs():
    job, usual = composed(["experiment=miniature_flow"]), composed([])
    assert Path(job.model.path) == FOLDER.relative_to(Path.cwd())
    assert job.pairs == usual.pairs
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 6_000_000


def test_its_images_show_what_was_asked():
    """Far better than the prompts of other images would fit them."""
    model = Model(name="flow", path=str(FOLDER))
    size = Size(scenes.SIDE, scenes.SIDE)
    sampler = ImageGenerator.load(model, CPU, scheduler=Scheduler.own, dtype=Dtype.fp32,
                                  size=size, steps=6, guidance=2.0)  # fmt: skip
    prompts = scenes.prompts("validation")[:8]
    images = sampler.sample(prompts, [0] * len(prompts))
    own = np.mean([oracle(*pair) for pair in zip(images, prompts, strict=True)])
    others = np.mean([oracle(image, p) for image in images for p in prompts])
    assert own > others + 0.15


def test_it_trains_from_ln_2_and_knows_the_images_of_its_world():
    """The errors are those of a trained model: half the target's variance, which is 2, or less."""
    spec = ModelSpec(path=str(FOLDER), resolution=scenes.SIDE)
    components = load_components(spec, Precision.fp32, CPU)
    policy, reference = components.denoiser(), components.denoiser()
    rng, prompts = np.random.default_rng(0), scenes.prompts("train")[:8]
    images = [np.stack([scenes.imagine(p, rng).pixels for p in prompts]) for _ in range(2)]
    winner, loser = map(torch.from_numpy, images)
    batch = PairBatch(
        (0,) * 8, tuple(prompts), tuple(prompts), winner, loser, torch.ones(8, dtype=torch.int64),
        torch.ones(8), torch.full((8, 2, 2), scenes.SIDE), components.square,
    )  # fmt: skip
    rule = DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)
    output = step(draw_noise(batch, rule), Models(components, policy, reference), dpo(1000.0))
    assert output.loss.item() == torch.tensor(math.log(2)).item()
    assert bool((output.margin == 0).all())
    assert output.policy.winner.mean() < 1

"""Makes the miniature's weights from nothing, stage by stage; a finished stage is skipped."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModelWithProjection

from data.miniature import scenes, train_base, train_flow, train_scorers
from data.miniature.taste import HELD_OUT, HPS, PICKSCORE, Taste
from data.miniature.tokenizer import hf_tokenizer, write_open_clip_merges
from data.miniature.training import Plan

WEIGHTS = Path(__file__).parent / "weights"
RECIPE = "recipe.json"
"""Beside the weights: what each stage was made with, and in how many seconds."""
MERGES = "bpe_merges.txt.gz"
"""Beside an open_clip model's weights: the vocabulary for open_clip.SimpleTokenizer."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One training and the files it leaves."""

    done: str
    """File that is written last, so its presence means the stage is finished."""
    make: Callable[[Path, "Recipe"], None]
    recipe: "Recipe"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a stage's result depends on, besides the code."""

    seed: int
    examples: int
    """Images (or pairs of images) rendered for training."""
    plan: Plan
    later: tuple[Plan, ...] = ()
    """The second and third training of the autoencoder."""


def make_vae(folder: Path, recipe: Recipe) -> None:
    """base/vae: the autoencoder, rounded to fp16 before anything is trained on its latents."""
    shapes, edges = recipe.later
    rounds = recipe.plan, shapes, edges
    vae = train_base.train_vae(rounds, recipe.examples, recipe.seed)
    vae.half().save_pretrained(folder / "base" / "vae")


def make_unet(folder: Path, recipe: Recipe) -> None:
    """base: the whole pipeline; needs the autoencoder."""
    vae = AutoencoderKL.from_pretrained(folder / "base" / "vae", dtype=torch.float32)
    text_encoder, unet = train_base.train_unet(vae, recipe.plan, recipe.examples, recipe.seed)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,  # float32: transformers would load fp16 as fp16, diffusers not
        tokenizer=hf_tokenizer(),
        unet=unet.half(),
        scheduler=train_base.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "base")


def make_clip(folder: Path, recipe: Recipe) -> None:
    """clip: what images show; the shared backbone of CLIP score and aesthetics."""
    _save_hf(train_scorers.train_clip(recipe.plan, recipe.examples, recipe.seed), folder / "clip")


def make_aesthetic(folder: Path, recipe: Recipe) -> None:
    """aesthetic: a linear head on the image embedding of `clip`."""
    clip = _float_clip(folder / "clip")
    head = train_scorers.train_aesthetic(clip, recipe.plan, recipe.examples, recipe.seed)
    target = folder / "aesthetic" / "model.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in head.state_dict().items()}, target)


def make_pickscore(folder: Path, recipe: Recipe) -> None:
    """pickscore: `clip` tuned on the choices of a judge, as the full-size one was."""
    model = _float_clip(folder / "clip")
    choices = train_scorers.choose(recipe.examples, PICKSCORE, recipe.seed)
    torch.manual_seed(recipe.seed)
    towers = train_scorers.HfTowers(model)
    train_scorers.train_on_choices("pickscore", towers, model, choices, recipe.plan, contrast=0.0)
    _save_hf(model, folder / "pickscore")


def make_hps(folder: Path, recipe: Recipe) -> None:
    """hps: an open_clip model trained on the choices of another judge."""
    _make_open_clip(folder / "hps", recipe, HPS, train_scorers.open_clip_config())


def make_held_out(folder: Path, recipe: Recipe) -> None:
    """held_out: a judge that never votes; another size, another seed, another taste."""
    config = train_scorers.open_clip_config(width=48, layers=4)
    _make_open_clip(folder / "held_out", recipe, HELD_OUT, config)


def make_flow(folder: Path, recipe: Recipe) -> None:
    """flow: another pipeline; needs the autoencoder, `clip` and `pickscore`."""
    vae = AutoencoderKL.from_pretrained(folder / "base" / "vae", dtype=torch.float32)
    encoders = [_text_tower(_float_clip(folder / name)) for name in ("clip", "pickscore")]
    pipeline = train_flow.train_flow(vae, encoders, recipe.plan, recipe.examples, recipe.seed)
    pipeline.vae.half()
    pipeline.transformer.half()  # the text encoders stay in float32, as above
    pipeline.save_pretrained(folder / "flow")


def _make_open_clip(target: Path, recipe: Recipe, taste: Taste, config: dict[str, Any]) -> None:
    choices = train_scorers.choose(recipe.examples, taste, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = open_clip.CLIP(**config)
    towers = train_scorers.OpenClipTowers(model)
    train_scorers.train_on_choices(target.name, towers, model, choices, recipe.plan, contrast=0.12)
    target.mkdir(exist_ok=True)
    write_open_clip_merges(target / MERGES)
    preprocess = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "longest",
    }
    _write_json(
        target / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess}
    )
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(state, target / "open_clip_model.safetensors")


STAGES = {
    "vae": Stage("base/vae/diffusion_pytorch_model.safetensors", make_vae,
                 Recipe(11, 12_000, Plan(2400, 16, 2e-3, bf16=True),
                        (Plan(2400, 8, 1e-3, bf16=True), Plan(2400, 8, 1.5e-3, bf16=True)))),
    "unet": Stage("base/model_index.json", make_unet, Recipe(12, 14_000, Plan(2400, 32, 1.5e-3))),
    "clip": Stage("clip/model.safetensors", make_clip,
                  Recipe(21, 20_000, Plan(500, 128, 2e-3, weight_decay=0.05))),
    "aesthetic": Stage("aesthetic/model.safetensors", make_aesthetic,
                       Recipe(22, 4_000, Plan(1500, 512, 3e-3))),
    "pickscore": Stage("pickscore/model.safetensors", make_pickscore,
                       Recipe(23, 8_000, Plan(400, 64, 5e-4))),
    "hps": Stage("hps/open_clip_model.safetensors", make_hps,
                 Recipe(24, 10_000, Plan(1000, 64, 1.5e-3))),
    "held_out": Stage("held_out/open_clip_model.safetensors", make_held_out,
                      Recipe(25, 10_000, Plan(1000, 64, 1.5e-3))),
    "flow": Stage("flow/model_index.json", make_flow,
                  Recipe(12, 14_000, Plan(3000, 64, 2e-3))),
}  # fmt: skip
"""In the order they are made; a stage may read what an earlier one wrote."""


def build(names: list[str], folder: Path, force: bool) -> None:
    """Make the named stages in order, skipping those that are there unless forced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if name not in names:
            continue
        if (folder / stage.done).exists() and not force:
            print(f"{name}: there already ({folder / stage.done}); --force makes it again")
            continue
        began = time.perf_counter()
        _make(stage, folder)
        seconds = round(time.perf_counter() - began)
        _note(folder / RECIPE, name, asdict(stage.recipe) | {"seconds": seconds})
        print(f"{name}: done in {seconds} s", flush=True)


def _make(stage: Stage, folder: Path) -> None:
    """Let a stage write into a copy of the folder, and take its files over when it is finished."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.copytree(folder, aside)
    try:
        (aside / stage.done).unlink(missing_ok=True)
        stage.make(aside, stage.recipe)
        part = Path(stage.done).parts[0]
        ordered = sorted(
            (p for p in (aside / part).rglob("*") if p.is_file()),
            key=lambda p: p == aside / stage.done,
        )
        for path in ordered:
            target = folder / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(aside)


def _float_clip(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder, dtype=torch.float32)


def _text_tower(clip: CLIPModel) -> CLIPTextModelWithProjection:
    tower = CLIPTextModelWithProjection(clip.text_model.config)
    tower.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("text_")})
    return tower


def _save_hf(model: CLIPModel, folder: Path) -> None:
    """A Hugging Face folder: tokenizer and preprocessing first, weights last."""
    hf_tokenizer().save_pretrained(folder)
    side = scenes.SIDE
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]


def _note(path: Path, name: str, facts: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    _write_json(path, known | {name: facts})


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)

"""Nothing spoiled is loaded: model folders, adapters and scorers' weights, spoiled in every way.

A generator spoils every file that is opened. Each case must end in a ValueError that names a file
or a setting; a model that is loaded all the same, and any other error, is a fault.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from data.devices import Dtype
from data.images import Size
from generate.config import Scheduler
from generate.image_files import Model
from generate.sampler import ImageGenerator
from label.config import MetricSpec
from label.scoring.panel import Panel
from label.scoring.vae_encoder import VaeEncoder
from tests.helpers_spoil import ANY_FILE, Spoil, break_the_link, lose_the_end, remove, rename
from tests.helpers_train import SIDE, write_base, write_sdxl_base
from tests.test_sample_models import write_adapter
from train.config import ModelSpec, Precision
from train.models.components import load_components

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MINIATURE = Path(__file__).parent.parent / "data" / "miniature" / "weights"


# --- ways to spoil weights ------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the tensors of a safetensors file, which stays whole."""

    def spoil(path: Path) -> None:
        state = load_file(path)
        state = change(state) or state
        save_file({name: value.contiguous() for name, value in state.items()}, path)

    spoil.__name__ = change.__name__
    return spoil


def lose_one(state: dict[str, Any]) -> None:
    del state[max(state)]


def add_one(state: dict[str, Any]) -> None:
    state["extra.weight"] = torch.ones(2, 2)


def wrap(state: dict[str, Any]) -> dict[str, Any]:
    return {f"module.extra.{name}": value for name, value in state.items()}


def keep_the_adapter(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".weight", ".base_layer.weight"): v for name, v in state.items()}


def matrix_of(state: dict[str, Any]) -> str:
    return max(name for name, value in state.items() if value.ndim > 1)


def reshape_one(state: dict[str, Any]) -> None:
    state[matrix_of(state)] = state[matrix_of(state)][:, :-1]


def transpose_a_size(state: dict[str, Any]) -> None:
    state[matrix_of(state)] = state[matrix_of(state)][None]


def quantise(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(torch.int8) for name, value in state.items()}


def quantise_one(state: dict[str, Any]) -> None:
    state[matrix_of(state)] = state[matrix_of(state)].to(torch.float8_e4m3fn)


def leave_a_hole(state: dict[str, Any]) -> None:
    state[matrix_of(state)] = torch.zeros_like(state[matrix_of(state)])


def take_all(_: dict[str, Any]) -> dict[str, Any]:
    return {"nothing": torch.ones(1)}


WEIGHTS: tuple[Spoil, ...] = (
    lose_the_end,
    *map(tensors, (lose_one, add_one, wrap, keep_the_adapter, reshape_one, transpose_a_size,
                   quantise, quantise_one, leave_a_hole, take_all)),
)  # fmt: skip


def settings(name: str, value: Any) -> Spoil:
    """Set, or with None remove, a value of a JSON file."""

    def spoil(path: Path) -> None:
        described = json.loads(path.read_text())
        inside, parts = described, name.split(".")
        for part in parts[:-1]:
            inside = inside[part]
        inside.pop(parts[-1], None)
        if value is not None:
            inside[parts[-1]] = value
        path.write_text(json.dumps(described))

    spoil.__name__ = f"{name}={value!r}"
    return spoil


def make_a_list(path: Path) -> None:
    path.write_text("[1, 2]")


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A file of a good folder, what is done to it, and how the folder is opened."""

    good: Path
    file: str
    spoil: Spoil
    opened: Callable[[Path], Any]

    def __str__(self) -> str:
        return f"{self.opened.__name__}: {self.good.name}/{self.file} {self.spoil.__name__}"


def of_file(good: Path, file: str, ways: tuple[Spoil, ...], *openings: Callable) -> Iterator[Case]:
    for opened in openings:
        for spoil in ways:
            yield Case(good, file, spoil, opened)


def train(folder: Path) -> Any:
    parts = load_components(ModelSpec(path=str(folder), resolution=SIDE), Precision.fp32, CPU)
    return parts.denoiser()


def sample(folder: Path) -> Any:
    return generator(Model(name="ours", path=str(folder)))


def generator(model: Model) -> ImageGenerator:
    model.check("give a model")
    return ImageGenerator.load(
        model, CPU, scheduler=Scheduler.ddim, dtype=Dtype.fp32, size=Size(SIDE, SIDE), steps=2,
        guidance=3.0,
    )  # fmt: skip


def encode(folder: Path) -> Any:
    from data.artifacts.latents import LatentFormat
    from data.families.vae import find_vae, latent_shape

    vae = find_vae(folder)
    form = LatentFormat(
        vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), dtype="fp32", moments=False,
        flip=False, compute="fp32",
    )  # fmt: skip
    return VaeEncoder(folder, form, CPU, 2)


def model_cases(sd: Path, sdxl: Path) -> Iterator[Case]:
    weights, both = ANY_FILE + WEIGHTS, (train, sample)
    unet = "unet/diffusion_pytorch_model.safetensors"
    yield from of_file(sd, "text_encoder/model.safetensors", weights, *both)
    yield from of_file(sd, unet, weights, *both)
    yield from of_file(sd, "vae/diffusion_pytorch_model.safetensors", weights, *both, encode)
    yield from of_file(sdxl, "text_encoder_2/model.safetensors", WEIGHTS, *both)
    json_ways = (*ANY_FILE, make_a_list)
    for file in (
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "unet/config.json",
        "vae/config.json",
    ):  # fmt: skip
        yield from of_file(sd, file, json_ways, *both)
    yield from of_file(sd, "vae/config.json", json_ways, encode)
    for file, name, value in VALUES:
        yield from of_file(sd, file, (settings(name, value),), *both)


VALUES = (
    ("model_index.json", "unet", ["diffusers", "AutoencoderKL"]),
    ("model_index.json", "unet", ["diffusers", "NoSuchClass"]),
    ("model_index.json", "unet", ["my_code", "UNet2DConditionModel"]),
    ("model_index.json", "text_encoder", ["transformers", "T5EncoderModel"]),
    ("model_index.json", "unet", "UNet2DConditionModel"),
    ("model_index.json", "vae", None),
    ("model_index.json", "tokenizer", None),
    ("model_index.json", "_class_name", "NoSuchPipeline"),
    ("model_index.json", "_class_name", ["StableDiffusionPipeline"]),
    ("unet/config.json", "_class_name", "AutoencoderKL"),
    ("unet/config.json", "block_out_channels", "wide"),
    ("unet/config.json", "block_out_channels", [16, 48]),
    ("unet/config.json", "cross_attention_dim", 24),
    ("unet/config.json", "down_block_types", ["NoSuchBlock", "DownBlock2D"]),
    ("vae/config.json", "block_out_channels", 8),
    ("vae/config.json", "block_out_channels", None),
    ("vae/config.json", "latent_channels", "4"),
    ("vae/config.json", "latent_channels", 8),
    ("text_encoder/config.json", "hidden_size", 24),
    ("text_encoder/config.json", "hidden_size", "wide"),
    ("text_encoder/config.json", "vocab_size", 40),
    ("text_encoder/config.json", "num_hidden_layers", 3),
    ("text_encoder/config.json", "hidden_act", "no_such_act"),
    ("text_encoder/config.json", "eos_token_id", 7),
    ("scheduler/scheduler_config.json", "beta_start", "small"),
    ("scheduler/scheduler_config.json", "beta_schedule", "no_such_schedule"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
    ("tokenizer/tokenizer_config.json", "model_max_length", "long"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 1),
    ("tokenizer/tokenizer.json", "model.vocab", {}),
    ("tokenizer/tokenizer.json", "model", {}),
)


def in_parts_cases(folder: Path) -> Iterator[Case]:
    """A UNet in several files with an index."""
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    first, *_ = sorted(path.name for path in (folder / "unet").glob("*-00001-of-*"))
    elsewhere = settings("weight_map", {"conv_in.weight": "../elsewhere.safetensors"})
    ways = (*ANY_FILE, make_a_list, settings("weight_map", {}), elsewhere)
    yield from of_file(folder, index, ways, train, sample)
    yield from of_file(folder, f"unet/{first}", ANY_FILE + WEIGHTS, train, sample)


def metric(kind: str, **files: str) -> Callable[[Path], Any]:
    def opened(folder: Path) -> Any:
        places = {name: str(folder / file) for name, file in files.items()}
        return Panel.load({"scorer": MetricSpec(kind=kind, **places)}, CPU)

    opened.__name__ = kind
    return opened


def scorer_cases(root: Path) -> Iterator[Case]:
    clip, hps = metric("clip", weights="clip"), metric("hps", weights="hps")
    plain, pickled = metric("clip", weights="plain"), metric("clip", weights="pickled")
    aesthetic = metric("aesthetic", weights="clip", head="aesthetic/model.safetensors")
    json_ways = (*ANY_FILE, make_a_list)
    yield from of_file(root, "clip/model.safetensors", ANY_FILE + WEIGHTS, clip)
    yield from of_file(root, "clip/config.json", json_ways, clip)
    yield from of_file(root, "clip/tokenizer.json", json_ways, clip)
    yield from of_file(root, "plain/vocab.json", json_ways, plain)
    yield from of_file(root, "plain/merges.txt", (*ANY_FILE, lose_the_end), plain)
    yield from of_file(root, "pickled/pytorch_model.bin", ANY_FILE, pickled)
    yield from of_file(root, "hps/open_clip_model.safetensors", ANY_FILE + WEIGHTS, hps)
    yield from of_file(root, "hps/open_clip_config.json", json_ways, hps)
    kept = tuple(way for way in ANY_FILE if way not in (remove, rename, break_the_link))
    yield from of_file(root, "hps/bpe_merges.txt.gz", kept, hps)
    head = tuple(way for way in WEIGHTS if way.__name__ != "quantise_one")
    yield from of_file(root, "aesthetic/model.safetensors", ANY_FILE + head, aesthetic)
    for file, name, value, opened in (
        ("clip/config.json", "vision_config", "none", clip),
        ("clip/config.json", "vision_config.image_size", "large", clip),
        ("clip/config.json", "vision_config.hidden_size", 7, clip),
        ("clip/config.json", "text_config.vocab_size", 7, clip),
        ("clip/config.json", "projection_dim", "wide", clip),
        ("clip/preprocessor_config.json", "image_mean", "grey", clip),
        ("hps/open_clip_config.json", "model_cfg", {}, hps),
        ("hps/open_clip_config.json", "model_cfg.text_cfg.vocab_size", 7, hps),
        ("hps/open_clip_config.json", "model_cfg.embed_dim", "wide", hps),
        ("hps/open_clip_config.json", "model_cfg.no_such_option", 1, hps),
    ):
        yield Case(root, file, settings(name, value), opened)


def adapter_cases(place: Path) -> Iterator[Case]:
    def adapter(folder: Path) -> Any:
        file = str(folder / "lora" / "pytorch_lora_weights.safetensors")
        return generator(Model(name="ours", path=str(folder / "base"), adapter=file))

    def lose_a_layer_of_the_model(state: dict[str, Any]) -> dict[str, Any]:
        """One layer's weights are for a layer that the model does not have."""
        layer = min(state).rsplit(".lora_", 1)[0]
        return {name.replace(layer, "unet.no.such_layer"): v for name, v in state.items()}

    ways = tuple(way for way in WEIGHTS if way.__name__ not in ("leave_a_hole", "add_one"))
    file = "lora/pytorch_lora_weights.safetensors"
    yield from of_file(place, file, ANY_FILE + ways, adapter)
    yield Case(place, file, tensors(lose_a_layer_of_the_model), adapter)


# --- the attempt ---------------------------------------------------------------------------------


def fault(case: Case, folder: Path) -> str:
    """What is wrong with how a case ends; empty where it is refused as it should be."""
    shutil.copytree(case.good, folder)
    try:
        case.spoil(folder / case.file)
        case.opened(folder)
    except ValueError as error:
        message = str(error)
        names = (folder.name, Path(case.file).name, "model ", "metrics.", "model.path")
        return "" if any(name in message for name in names) else f"{case}: names nothing: {message}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    else:
        return f"{case}: was loaded"
    finally:
        shutil.rmtree(folder)


def write_plain_clip(folder: Path) -> None:
    """The miniature's CLIP with its vocabulary in two files."""
    shutil.copytree(MINIATURE / "clip", folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = (" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))


def write_pickled_clip(folder: Path) -> None:
    shutil.copytree(MINIATURE / "clip", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def split_unet(model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="100KB")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Case]]:
    root = tmp_path_factory.mktemp("good")
    sd, sdxl = write_base(root / "sd"), write_sdxl_base(root / "sdxl")
    write_adapter(sd, root / "adapted")
    shutil.copytree(sd, root / "adapted" / "base")
    scorers = root / "scorers"
    for name in ("clip", "hps", "aesthetic"):
        shutil.copytree(MINIATURE / name, scorers / name)
    write_plain_clip(scorers / "plain")
    write_pickled_clip(scorers / "pickled")
    in_parts = shutil.copytree(sd, root / "in_parts")
    split_unet(in_parts)
    return {
        "models": [*model_cases(sd, sdxl), *in_parts_cases(in_parts)],
        "scorers": list(scorer_cases(scorers)),
        "adapters": list(adapter_cases(root / "adapted")),
    }


def test_what_is_not_spoiled_is_loaded(cases: dict[str, list[Case]]):
    opened = {}
    for case in (case for group in cases.values() for case in group):
        opened.setdefault((case.good, case.opened), case)
    for case in opened.values():
        case.opened(case.good)
    assert len(opened) == 13


@pytest.mark.slow
@pytest.mark.parametrize("group", ["models", "scorers", "adapters"])
def test_nothing_spoiled_is_loaded(cases: dict[str, list[Case]], tmp_path: Path, group: str):
    faults = [
        problem
        for number, case in enumerate(cases[group])
        if (problem := fault(case, tmp_path / f"spoiled-{number}"))
    ]
    print(f"{len(cases[group])} spoiled {group} tried")
    assert not faults, "\n".join(faults)
    assert sum(map(len, cases.values())) >= 300

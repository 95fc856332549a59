"""Which models can be aligned, judged by a folder's configuration before any weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from data.artifacts.latents import vae_needs_fp32
from data.artifacts.readable import UnreadableError, read_json_object
from data.models.forward_process import CONFIG as SCHEDULER
from data.models.forward_process import DiscreteProcess, forward_process
from data.models.latent_scale import LatentScale, latent_scale
from data.storage.hub import Wanted, resolve
from data.storage.paths import user_path
from train.config import ModelSpec

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Family(Enum):
    """A pipeline class of diffusers whose UNet can be aligned."""

    sd = "StableDiffusionPipeline"
    """SD1.x and SD2.x: one text encoder."""
    sdxl = "StableDiffusionXLPipeline"
    """SDXL: two text encoders, a pooled text and the image's sizes."""


PARTS = {
    Family.sd: ("tokenizer", "text_encoder", "unet", "vae", "scheduler"),
    Family.sdxl: (
        "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler",
    ),
}  # fmt: skip
"""Folders of a model that are used."""

CLASSES = {
    "tokenizer": "CLIPTokenizer",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""Part -> the class that is trained, or trained with."""

OTHER_PARTS = ("feature_extractor", "safety_checker", "image_encoder")
"""Folders that the trained model's pipeline may ask for."""

WEIGHTS = ("diffusion_pytorch_model", "model")
"""Names of a part's safetensors, before `.safetensors` or `-00001-of-...`."""

WANTED = (
    *(
        f"{part}/{name}"
        for part in (*PARTS[Family.sdxl], *OTHER_PARTS)
        for name in ("*.json", "*.txt", *(f"{stem}.safetensors" for stem in WEIGHTS))
    ),
    "model_index.json",
)
"""Files to fetch from a hub repository: one set of weights in one format, and no pickle."""


CONFIGS = tuple(name for name in WANTED if not name.endswith(".safetensors"))
"""Those of them that are small."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A diffusers folder of a family that can be aligned."""

    folder: Path
    family: Family
    index: dict[str, Any]
    """Its `model_index.json`."""
    unet: dict[str, Any]
    """The UNet's `config.json`."""
    vae: dict[str, Any]
    process: DiscreteProcess
    """The forward process that its UNet was trained with."""
    latent_scale: LatentScale

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether "no prompt" is zeros instead of an encoded empty text, as in SDXL's base."""
        zeros = self.index.get("force_zeros_for_empty_prompt", True)  # as the pipeline's default
        return self.family is Family.sdxl and bool(zeros)

    @property
    def vae_in_fp32(self) -> bool:
        """Whether the VAE overflows in half precision."""
        return vae_needs_fp32(self.index, self.vae)

    @property
    def vae_factor(self) -> int:
        """Pixels of an image's side for one of its latents."""
        return int(2 ** (len(self.vae.get("block_out_channels", [64])) - 1))  # diffusers' default


def open_model(spec: ModelSpec) -> BaseModel:
    """Find, or fetch, a model's folder and check its configuration.

    Raises:
        ValueError: There is none, its family is not supported, or it does not fit the resolution.
    """
    return describe(spec, find_model(spec))


def describe(spec: ModelSpec, folder: Path, *, whole: bool = True) -> BaseModel:
    """Check a model's configuration in a folder and, of a `whole` one, which files it has.

    Raises:
        ValueError: Its family is not supported, or it does not fit the resolution.
    """
    what = f"model.path={spec.path}"
    index = read_json_object(folder / "model_index.json", what)
    class_name = index.get("_class_name")
    if class_name not in [family.value for family in Family]:
        allowed = ", ".join(family.value for family in Family)
        raise ValueError(f"model.path={spec.path} is a {class_name}; allowed are {allowed}")
    family = Family(class_name)
    if whole:
        _check_parts(spec, folder, family)
    unet, vae = (read_json_object(folder / name / "config.json", what) for name in ("unet", "vae"))
    if not isinstance(vae.get("block_out_channels", []), list):
        raise UnreadableError(
            f"{what}: {folder}/vae/config.json has block_out_channels="
            f"{vae['block_out_channels']!r}; needed is a list of numbers of channels"
        )
    base = BaseModel(
        folder=folder,
        family=family,
        index=index,
        unet=unet,
        vae=vae,
        process=forward_process(
            what, index, read_json_object(folder / SCHEDULER, what), spec.prediction_type
        ),
        latent_scale=latent_scale(what, family.value, vae),
    )
    _check_unet(spec, base)
    if spec.resolution % base.vae_factor:
        raise ValueError(
            f"model.resolution={spec.resolution} is no multiple of {base.vae_factor}, "
            "the VAE's factor"
        )
    return base


def _check_parts(spec: ModelSpec, folder: Path, family: Family) -> None:
    for name in PARTS[family]:
        if not (folder / name).is_dir():
            raise ValueError(
                f"model.path={spec.path} has no folder {name!r}; a {family.value} needs "
                f"{', '.join(PARTS[family])}"
            )
        if name.startswith(("tokenizer", "scheduler")):
            continue
        files = [f"{stem}{end}" for stem in WEIGHTS for end in (".safetensors", "-*.safetensors")]
        if not any(path for file in files for path in (folder / name).glob(file)):
            raise ValueError(
                f"model.path={spec.path} has none of {', '.join(files)} in {name!r}; pickled "
                "weights and variants such as fp16 are not read: load it with diffusers once "
                "(variant='fp16') and save it with save_pretrained(FOLDER)"
            )


def check_classes(spec: ModelSpec, base: BaseModel) -> None:
    """Refuse a pipeline of other parts than are trained with here.

    Raises:
        ValueError: Names the part, its class and the one that is needed.
    """
    for name in PARTS[base.family]:
        entry, needed = base.index.get(name), CLASSES.get(name.replace("tokenizer_2", "tokenizer"))
        actual = entry[-1] if isinstance(entry, list) and entry else None
        if actual is None or (needed and str(actual).removesuffix("Fast") != needed):
            raise ValueError(
                f"model.path={spec.path}: model_index.json has {name}={entry}; a "
                f"{base.family.value} that can be aligned has a {needed or 'scheduler'} there"
            )


def _check_unet(spec: ModelSpec, base: BaseModel) -> None:
    """Refuse inpainting, depth and refiner UNets, which share their family's class name."""
    channels, latent = base.unet.get("in_channels", 4), base.vae.get("latent_channels", 4)
    if channels != latent:
        raise ValueError(
            f"model.path={spec.path} has a UNet with {channels} input channels for latents of "
            f"{latent}: an inpainting or depth model, which text-image pairs cannot train; "
            "give its text-to-image base"
        )
    added = base.unet.get("addition_embed_type")
    wanted = "text_time" if base.family is Family.sdxl else None
    if added != wanted or base.index.get("requires_aesthetics_score"):
        raise ValueError(
            f"model.path={spec.path} has a UNet with addition_embed_type={added}, but a "
            f"{base.family.value} that can be aligned has {wanted} and asks no aesthetics score; "
            "refiners and image-conditioned models cannot be aligned"
        )


# --- where it is ---------------------------------------------------------------------------------


def find_model(spec: ModelSpec) -> Path:
    """Return a local folder as it is; fetch a hub id, or take it from this machine's cache.

    A hub id's weights are fetched when its configuration has been checked.

    Raises:
        ValueError: There is neither; says what `model.path` may be. Or it is none that is trained.
    """
    folder = find_configs(spec)
    if folder == user_path(spec.path):
        return folder
    describe(spec, folder, whole=False)
    return _resolve(spec, WANTED)


def find_configs(spec: ModelSpec) -> Path:
    """The same without the weights of a hub id.

    Raises:
        ValueError: There is no such model; says what `model.path` may be.
    """
    folder = user_path(spec.path, "model.path")
    if folder.suffix in SINGLE_FILES:
        raise ValueError(
            f"model.path={spec.path} is a single file; make a folder of it once: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), "
            "or StableDiffusionXLPipeline for SDXL"
        )
    return _resolve(spec, CONFIGS)


def _resolve(spec: ModelSpec, files: Sequence[str]) -> Path:
    wanted = Wanted(
        patterns=[files],
        usable=lambda path: (path / "model_index.json").is_file(),
        missing=" is not a diffusers folder (no model_index.json); give one, or a hub id",
        refresh=True,  # stage one fetches the VAE alone
    )
    return resolve("model.path", spec.path, spec.revision, wanted)

"""The model to align: where it is, and whether it can be aligned, before any weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.artifacts.readable import read_json_object
from data.families import families, family_of
from data.models.family import Family, ModelConfig, ModelError, Process
from data.models.forward_process import CONFIG as SCHEDULER
from data.models.latent_scale import LatentScale
from data.models.rectified_flow import FlowProcess
from data.models.vae_config import check_vae_config
from data.storage.hub import Wanted, resolve
from data.storage.paths import user_path
from train.config import BucketKind, BucketSpec, ModelSpec, Quantize, TrainSpec
from train.models.extras import check_bitsandbytes

PICKLES = (".ckpt", ".pt", ".pth", ".bin")

OTHER_PARTS = ("feature_extractor", "safety_checker", "image_encoder")
"""Folders that the trained model's pipeline may ask for."""

WEIGHTS = ("diffusion_pytorch_model", "model")
"""Names of a part's safetensors, before `.safetensors` or `-00001-of-...`."""

ENDS = (".safetensors", "-*-of-*.safetensors")

WANTED = (
    *(
        f"{part}/{name}"
        for part in dict.fromkeys([part for one in families() for part in one.parts])
        for name in (
            "*.json", "*.txt", "*.jinja", "spiece.model", "tokenizer.model",
            *(f"{stem}{end}" for stem in WEIGHTS for end in ENDS)
        )
    ),
    *(f"{part}/*.json" for part in OTHER_PARTS),
    *(f"{part}/model.safetensors" for part in OTHER_PARTS),
    "model_index.json",
)  # fmt: skip
"""Files to fetch from a hub repository: one set of weights in one format, and no pickle."""

CONFIGS = tuple(name for name in WANTED if not name.endswith(".safetensors"))
"""Those of them that are small."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A diffusers folder of a family that can be aligned."""

    folder: Path
    family: Family
    config: ModelConfig
    process: Process
    """The forward process that its denoiser was trained with."""
    latent_scale: LatentScale
    guidance: float | None
    """What a guidance-distilled denoiser is told in training; None where it is told none."""

    @property
    def vae_in_fp32(self) -> bool:
        """Whether the VAE has to run in fp32."""
        return self.family.vae_in_fp32(self.config.vae)

    @property
    def vae_factor(self) -> int:
        """Pixels of an image's side for one of its latents."""
        return self.config.vae_factor

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its family that it has."""
        return self.family.parts_in(self.config.index)

    @property
    def absent_parts(self) -> tuple[str, ...]:
        """The parts of its family that it does without."""
        return tuple(part for part in self.family.parts if part not in self.parts)


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
    family = family_of(what, index)
    if whole:
        _check_parts(what, folder, family.parts_in(index), family)
    denoiser, vae = (
        read_json_object(folder / part / "config.json", what) for part in (family.denoiser, "vae")
    )
    check_vae_config(vae, f"{what}: {folder}/vae/config.json")
    scheduler = read_json_object(folder / SCHEDULER, what)
    config = ModelConfig(index=index, denoiser=denoiser, vae=vae, scheduler=scheduler)
    process = family.process(what, index, scheduler, spec.prediction_type)
    scale = family.latent_scale(what, vae)
    family.check(what, config)
    family.check_resolution("model.resolution", spec.resolution, config)
    if spec.vae_tile is not None and spec.vae_tile % (4 * config.vae_factor):
        raise ModelError(
            f"model.vae_tile={spec.vae_tile} is no multiple of {4 * config.vae_factor}: tiles "
            "overlap by a quarter, which must be whole latents"
        )
    return BaseModel(folder, family, config, process, scale, _guidance(what, spec, family, config))


def _check_parts(what: str, folder: Path, parts: Sequence[str], family: Family) -> None:
    for name in parts:
        if not (folder / name).is_dir():
            raise ModelError(
                f"{what} has no folder {name!r}; a {family.pipeline} needs {', '.join(parts)}"
            )
        if name.startswith(("tokenizer", "scheduler")):
            continue
        files = [f"{stem}{end}" for stem in WEIGHTS for end in (".safetensors", "-*.safetensors")]
        if not any(path for file in files for path in (folder / name).glob(file)):
            raise ModelError(
                f"{what} has none of {', '.join(files)} in {name!r}; pickled weights and variants "
                "such as fp16 are not read: load it with diffusers once (variant='fp16') and save "
                "it with save_pretrained(FOLDER)"
            )


def _guidance(what: str, spec: ModelSpec, family: Family, config: ModelConfig) -> float | None:
    usual = family.guidance(config)
    if spec.guidance is not None and usual is None:
        raise ModelError(
            f"model.guidance={spec.guidance:g} is what a guidance-distilled model such as FLUX.1 "
            f"dev is told in training; {what} is none (guidance_embeds): set it to null"
        )
    return usual if spec.guidance is None else spec.guidance


def check_classes(spec: ModelSpec, base: BaseModel) -> None:
    """Refuse a pipeline of other parts than are trained with here.

    Raises:
        ModelError: Names the part, its class and the one that is needed.
    """
    for name in base.parts:
        entry, needed = base.config.index.get(name), base.family.parts[name]
        actual = entry[-1] if isinstance(entry, list) and entry else None
        if actual is None or (needed and str(actual).removesuffix("Fast") != needed):
            raise ModelError(
                f"model.path={spec.path}: model_index.json has {name}={entry}; a "
                f"{base.family.pipeline} that can be aligned has a {needed or 'scheduler'} there"
            )


def check_settings(base: BaseModel, model: ModelSpec, spec: TrainSpec) -> None:
    """Refuse settings of training that mean nothing for this model.

    Raises:
        ModelError: Names the setting, and says why it has no meaning.
    """
    shift = spec.timesteps.shift
    if shift is not None and not isinstance(base.process, FlowProcess):
        raise ModelError(
            f"train.timesteps.shift={shift:g} moves the noise levels of flow-matching models; "
            f"{base.folder} has another process ({base.process}): set it to null"
        )
    if spec.channels_last and base.family.denoiser != "unet":
        raise ModelError(
            "train.channels_last=true is for the convolutions of a UNet; "
            f"{base.family.parts[base.family.denoiser]} is a transformer: set it to false"
        )
    if model.quantize is not Quantize.none:
        _check_quantize(f"model.quantize={model.quantize.value}", model.quantize, spec)


def _check_quantize(what: str, kind: Quantize, spec: TrainSpec) -> None:
    if spec.lora.rank == 0:
        raise ModelError(
            f"{what} rounds weights that stay as they are, but train.lora.rank=0 trains all of "
            "them; choose tuning=lora, or model.quantize=none"
        )
    if spec.zero.stage == 3:
        raise ModelError(
            f"{what} with zero.stage=3, which cuts weights into parts that cannot be restored; "
            "choose zero=stage2, or model.quantize=none"
        )
    if spec.compile:
        raise ModelError(
            f"{what} with train.compile=true: weights are restored before each product, which "
            "cuts compiled blocks to pieces; set one of the two to its default"
        )
    if kind is Quantize.nf4:
        check_bitsandbytes(what, "model.quantize=int8")


def check_buckets(base: BaseModel, resolution: int, spec: BucketSpec) -> None:
    """Refuse sizes of images that the model cannot take, and buckets that are the square alone.

    Raises:
        ValueError: Names a size, and says which settings to change.
    """
    if spec.kind is BucketKind.none:
        return
    sizes = spec.sizes(resolution)
    if len(sizes) == 1:
        raise ModelError(
            f"buckets={spec.kind.value} has no size but the square of model.resolution={resolution}"
            f" with train.buckets.step={spec.step} and train.buckets.aspect={spec.aspect:g}; lower "
            "the step, raise the aspect, or choose buckets=none"
        )
    for size in sizes:
        for side in (size.width, size.height):
            try:
                base.family.check_resolution("the side", side, base.config)
            except ModelError as error:
                raise ModelError(
                    f"buckets={spec.kind.value} has images of {size} pixels, of which {error}; "
                    "choose other sizes: buckets=free, train.buckets.step, train.buckets.aspect"
                ) from error


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
    if folder.suffix in PICKLES:
        raise ValueError(
            f"model.path={spec.path} is a pickled file, which may run code when it is read; give a "
            ".safetensors file, or a diffusers folder"
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

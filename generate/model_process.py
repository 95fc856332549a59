"""Whether a model can be sampled as the settings say, decided from its configuration files.

Does not import torch. A local folder is checked before anything is loaded, a hub's model when its
pipeline is there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.artifacts.readable import read_json_object
from data.families import find_family
from data.images import Size
from data.models.family import FlowFamily, ModelConfig, Process
from data.models.forward_process import CONFIG, ProcessKind, forward_process, process_kind
from data.models.latent_scale import CONFIG as VAE
from data.models.own_sampling import check_own_sampling
from data.models.rectified_flow import FlowProcess
from data.storage.hub import Wanted, resolve
from generate.config import Scheduler
from generate.image_files import Model, SamplesError

INDEX = "model_index.json"

Json = Mapping[str, Any]


def check_folder(
    model: Model, scheduler: Scheduler, steps: int, size: Size, section: str = "evaluate"
) -> str:
    """Check a local model before it is loaded; returns what is assumed of it, or "".

    `section` names the settings in messages.

    Raises:
        ValueError: It cannot be sampled with this scheduler; says why, and what can be.
    """
    if not model.is_local:
        return ""
    return _check_configs(model, scheduler, steps, size, Path(model.path), section)


def check_hub_model(
    model: Model, scheduler: Scheduler, steps: int, size: Size, section: str = "evaluate"
) -> None:
    """Check a hub id by its configuration files, before any weight is fetched.

    Raises:
        ValueError: There is no such model, or it cannot be sampled with this scheduler.
    """
    if model.is_local:
        return
    files = Wanted(patterns=[["*/*.json", INDEX]], refresh=True)
    folder = resolve(f"models.{model.name}", model.path, model.revision, files)
    _check_configs(model, scheduler, steps, size, folder, section)


def _check_configs(
    model: Model, scheduler: Scheduler, steps: int, size: Size, folder: Path, section: str
) -> str:
    what = f"model {model.name!r}"
    index, own, vae = (read_json_object(folder / name, what) for name in (INDEX, CONFIG, VAE))
    process = check_process(model, scheduler, index=index, own=own, vae=vae, section=section)
    sides = {f"{section}.width": size.width, f"{section}.height": size.height}
    if size.width == size.height:
        sides = {"model.resolution": size.width}
    for setting, side in sides.items():
        _check_side(what, setting, side, folder, index, vae)
    if process is not None and steps > process.num_timesteps:
        raise SamplesError(
            f"{section}.steps={steps}: {what} ({model.path}) has {process.num_timesteps} "
            "timesteps, and cannot be sampled in more steps"
        )
    if isinstance(process, FlowProcess) and process.terminal is not None and steps == 1:
        raise SamplesError(
            f"{section}.steps=1: the scheduler of {what} ({model.path}) has shift_terminal="
            f"{process.terminal:g}, where the last of several steps begins; allowed are 2 and more"
        )
    if process is None:
        return ""
    is_set = scheduler is Scheduler.ddim and process.spacing_to_set(own)
    return f"{what} ({model.path}): {process}" if process.is_assumed or is_set else ""


def _check_side(what: str, setting: str, side: int, folder: Path, index: Json, vae: Json) -> None:
    family, channels = find_family(index), vae.get("block_out_channels")
    if isinstance(family, FlowFamily):
        denoiser = read_json_object(folder / family.denoiser / "config.json", what)
        config = ModelConfig(index=index, denoiser=denoiser, vae=vae, scheduler={})
        family.check_resolution(setting, side, config)
    elif isinstance(channels, list) and side % (factor := 2 ** max(len(channels) - 1, 3)):
        raise SamplesError(
            f"{setting}={side} is no multiple of {factor}, of which the images of {what} are"
        )


def check_process(
    model: Model,
    scheduler: Scheduler,
    *,
    index: Json,
    own: Json,
    vae: Json,
    section: str = "evaluate",
) -> Process | None:
    """Check a model by its configuration; returns its process, None if only diffusers knows it.

    `own` is the configuration of the scheduler in its folder. With `Scheduler.own` diffusers
    samples by that scheduler, so that processes are allowed which only diffusers knows.

    Raises:
        ValueError: It cannot be sampled with this scheduler; says why, and what can be.
    """
    what, family = f"model {model.name!r} ({model.path})", find_family(index)
    if family is not None:
        family.latent_scale(what, vae)
    by_itself = not isinstance(family, FlowFamily) and _samples_by_itself(index, own)
    if scheduler is Scheduler.own and by_itself:
        return None
    decide = forward_process if family is None else family.process
    try:
        if scheduler is Scheduler.own:
            check_own_sampling(what, index, own)
        return decide(what, index, own, model.prediction_type)
    except ValueError as error:
        way_out = f"; or sample by that scheduler: {section}.scheduler=own" if by_itself else ""
        raise SamplesError(f"{error}{way_out}") from error


def _samples_by_itself(index: Json, own: Json) -> bool:
    """Whether the folder's scheduler samples a process or a prediction that is not known here."""
    kind, _ = process_kind(index, own)
    if kind is ProcessKind.discrete:
        return own.get("prediction_type") == "sample"
    return kind is not ProcessKind.flow  # its schedulers do not fit a pipeline with a UNet

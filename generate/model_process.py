"""Whether a model can be sampled as the settings say, decided from its configuration files.

Does not import torch. A local folder is checked before anything is loaded, a hub's model when its
pipeline is there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.artifacts.readable import read_json_object
from data.families import find_family
from data.models.forward_process import CONFIG, ProcessKind, forward_process, process_kind
from data.models.latent_scale import CONFIG as VAE
from generate.config import Scheduler
from generate.image_files import Model, SamplesError

Json = Mapping[str, Any]


def check_folder(model: Model, scheduler: Scheduler) -> str:
    """Check a local model before it is loaded; returns what is assumed of it, or "".

    Raises:
        ValueError: It cannot be sampled with this scheduler; says why, and what can be.
    """
    if not model.is_local:
        return ""
    folder, what = Path(model.path), f"model {model.name!r}"
    index, own, vae = (
        read_json_object(folder / name, what) for name in ("model_index.json", CONFIG, VAE)
    )
    return check_process(model, scheduler, index=index, own=own, vae=vae)


def check_process(model: Model, scheduler: Scheduler, *, index: Json, own: Json, vae: Json) -> str:
    """Check a model by its configuration; returns what is assumed of it, or "".

    `own` is the configuration of the scheduler in its folder. With `Scheduler.own` diffusers
    samples by that scheduler, so that processes are allowed which only diffusers knows.

    Raises:
        ValueError: It cannot be sampled with this scheduler; says why, and what can be.
    """
    what, family = f"model {model.name!r} ({model.path})", find_family(index)
    if family is not None:
        family.latent_scale(what, vae)
    by_itself = not (family and family.is_flow) and _samples_by_itself(index, own)
    if scheduler is Scheduler.own and by_itself:
        return ""
    decide = forward_process if family is None else family.process
    try:
        process = decide(what, index, own, model.prediction_type)
    except ValueError as error:
        way_out = "; or sample by that scheduler: evaluate.scheduler=own" if by_itself else ""
        raise SamplesError(f"{error}{way_out}") from error
    return f"{what}: {process}" if process.is_assumed else ""


def _samples_by_itself(index: Json, own: Json) -> bool:
    """Whether the folder's scheduler samples a process or a prediction that is not known here."""
    kind, _ = process_kind(index, own)
    if kind is ProcessKind.discrete:
        return own.get("prediction_type") == "sample"
    return kind is not ProcessKind.flow  # its schedulers do not fit a pipeline with a UNet

"""The forward process of a diffusers model, decided from its scheduler's class and settings.

Pure functions over JSON values. Training, image generation and sample sheets all ask here, so that
a model is either trained and sampled by the process that it was made with, or refused by name. Here
is the discrete process; that of flow-matching models is in `data/models/rectified_flow.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

CONFIG = "scheduler/scheduler_config.json"

ASSUMED = (
    f"{CONFIG} has no prediction_type; if it is wrong, add it there, or set "
    "model.prediction_type=v_prediction"
)
"""What is said of an assumed prediction."""

Json = Mapping[str, Any]


class ForwardProcessError(ValueError):
    """A model's forward process is not known here; the message says which are."""


class Prediction(Enum):
    """What a denoiser was trained to predict; named as diffusers' schedulers name it."""

    epsilon = "epsilon"
    """The noise."""
    v_prediction = "v_prediction"
    """alpha noise - sigma latents (Salimans and Ho 2022)."""


class ProcessKind(Enum):
    """Kinds of forward processes; `discrete` and `flow` can be trained."""

    discrete = "the discrete process of DDPM"
    continuous = "a process in continuous time"
    edm = "the process of EDM"
    flow = "flow matching"
    unknown = "no process that is known here"


USUAL, LATENT = (1e-4, 0.02), (0.00085, 0.012)

DISCRETE = {
    "DDPMScheduler": USUAL,
    "DDPMParallelScheduler": USUAL,
    "DDIMScheduler": USUAL,
    "DDIMParallelScheduler": USUAL,
    "PNDMScheduler": USUAL,
    "LMSDiscreteScheduler": USUAL,
    "EulerDiscreteScheduler": USUAL,
    "EulerAncestralDiscreteScheduler": USUAL,
    "HeunDiscreteScheduler": LATENT,
    "KDPM2DiscreteScheduler": LATENT,
    "KDPM2AncestralDiscreteScheduler": LATENT,
    "DPMSolverMultistepScheduler": USUAL,
    "DPMSolverSinglestepScheduler": USUAL,
    "DPMSolverSDEScheduler": LATENT,
    "DEISMultistepScheduler": USUAL,
    "UniPCMultistepScheduler": USUAL,
}
"""Schedulers of diffusers that sample from DDPM's process -> the betas they assume by default."""

SCHEDULERS = ", ".join(name.removesuffix("Scheduler") for name in DISCRETE)

TRAILING = "trailing"
"""The spacing that begins at the last timestep and wastes no step on the first."""
SPACINGS = ("leading", "linspace", TRAILING)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Those that all of `DISCRETE` compute alike."""

MARKS: tuple[tuple[str, tuple[Any, ...], ProcessKind], ...] = (
    ("sigma_data", (None,), ProcessKind.edm),
    ("timestep_type", (None, "discrete"), ProcessKind.continuous),
    ("use_flow_sigmas", (None, False), ProcessKind.flow),
    ("use_dynamic_shifting", (None, False), ProcessKind.flow),
    ("shift", (None,), ProcessKind.flow),
)
"""A setting, its values under a discrete process, and what any other value means. They are kept
when one scheduler is replaced by another, so that its class alone does not decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteProcess:
    """The process of Ho et al. 2020: noise is added in steps of given variances, the betas."""

    num_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    trained_betas: tuple[float, ...] | None
    """The betas themselves, in place of a schedule."""
    zero_terminal_snr: bool
    """Whether the betas are rescaled so that no signal is left at the last timestep (Lin et al.
    2024, Algorithm 1)."""
    prediction: Prediction
    is_assumed: bool
    """Whether nobody said what the denoiser predicts."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal at all is left at the last timestep."""
        return self.zero_terminal_snr or (self.trained_betas or (0,))[-1] == 1

    def spacing_to_set(self, scheduler: Json) -> dict[str, str]:
        """What a sampler must set beside a scheduler's own settings; empty where nothing.

        A model that was trained without signal at the last timestep must be sampled from that
        timestep, which the usual `leading` never visits (Lin et al. 2024, section 3.3).
        """
        if not self.ends_in_noise or scheduler.get("timestep_spacing") == TRAILING:
            return {}
        return {"timestep_spacing": TRAILING}

    def __str__(self) -> str:
        """The process in words, for the first lines of a run and the model card."""
        betas = f"{self.beta_schedule} betas from {self.beta_start:g} to {self.beta_end:g}"
        if self.trained_betas:
            betas = "betas of its own"
        if self.zero_terminal_snr:
            betas += " rescaled to no signal at the end"
        if self.ends_in_noise:
            betas += f", sampled with timestep_spacing={TRAILING}"
        assumed = f" (assumed: {ASSUMED})" if self.is_assumed else ""
        return f"{self.prediction.value}{assumed}, {self.num_timesteps} timesteps, {betas}"


def forward_process(
    what: str, index: Json, scheduler: Json, prediction: Prediction | None = None
) -> DiscreteProcess:
    """The forward process of a model that can be trained and sampled by DDIM.

    `what` names the model in messages, `index` is its `model_index.json`, `scheduler` its
    `scheduler_config.json`. `prediction` is what the user says that the denoiser predicts.

    Raises:
        ForwardProcessError: It has another process, or one that cannot be inverted.
    """
    kind, reason = process_kind(index, scheduler)
    if kind is not ProcessKind.discrete:
        raise ForwardProcessError(
            f"{what}: {reason}, which means {kind.value}; allowed is "
            f"{ProcessKind.discrete.value}, with one of {SCHEDULERS}. Give a model that "
            "was trained with it; if this one was, restore the scheduler that it came with"
        )
    given = stated(scheduler)
    usual = DISCRETE[next(iter(scheduler_classes(index, scheduler).values()))]
    process = DiscreteProcess(
        num_timesteps=timesteps_of(what, given),
        beta_schedule=_beta_schedule(what, given),
        beta_start=_beta(what, given, "beta_start", usual[0]),
        beta_end=_beta(what, given, "beta_end", usual[1]),
        trained_betas=_trained_betas(what, given),
        zero_terminal_snr=flag(what, given, "rescale_betas_zero_snr"),
        prediction=_prediction(what, given, prediction),
        is_assumed=given.get("prediction_type") is None and prediction is None,
    )
    _check_betas(what, process)
    _check_steps(what, given)
    _check_invertible(what, process)
    return process


def process_kind(index: Json, scheduler: Json) -> tuple[ProcessKind, str]:
    """The family of a model's process, and the class or setting that shows it."""
    classes = scheduler_classes(index, scheduler)
    for file, name in classes.items():
        if name not in DISCRETE:
            kinds = {"EDM": ProcessKind.edm, "Flow": ProcessKind.flow}
            kind = next((kind for part, kind in kinds.items() if part in name), ProcessKind.unknown)
            return kind, f"{file} names the scheduler {name}"
    for key, discrete, kind in MARKS:
        if scheduler.get(key) not in discrete:
            return kind, f"{CONFIG} has {key}={scheduler[key]}"
    if not classes:
        return ProcessKind.unknown, f"{CONFIG} has no _class_name"
    return ProcessKind.discrete, ""


def scheduler_classes(index: Json, scheduler: Json) -> dict[str, str]:
    """File -> the scheduler's class in it; `model_index.json` first, whose class is loaded."""
    entry = index.get("scheduler")
    loaded = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
    names = {"model_index.json": loaded, CONFIG: scheduler.get("_class_name")}
    return {file: str(name) for file, name in names.items() if name is not None}


def stated(scheduler: Json) -> dict[str, Any]:
    """The settings that a file states, without those that a loaded scheduler filled in."""
    filled = scheduler.get("_use_default_values", ())
    return {name: value for name, value in scheduler.items() if name not in filled}


def refuse(what: str, name: str, value: Any, allowed: str) -> ForwardProcessError:
    """The refusal of a scheduler's setting."""
    return ForwardProcessError(
        f"{what}: {CONFIG} has {name}={value!r}; allowed: {allowed}. Restore the file that the "
        "model came with"
    )


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def timesteps_of(what: str, given: Json) -> int:
    """The number of timesteps that a scheduler states, or diffusers' default.

    Raises:
        ForwardProcessError: It is no whole number of at least 2.
    """
    value = given.get("num_train_timesteps", 1000)
    if not is_number(value) or value != int(value) or value < 2:
        raise refuse(what, "num_train_timesteps", value, "a whole number of at least 2")
    return int(value)


def _beta_schedule(what: str, given: Json) -> str:
    value = given.get("beta_schedule", "linear")
    if value not in BETA_SCHEDULES:
        raise refuse(what, "beta_schedule", value, ", ".join(BETA_SCHEDULES))
    return str(value)


def _beta(what: str, given: Json, name: str, usual: float) -> float:
    value = given.get(name, usual)
    if not is_number(value) or not 0 < value < 1:
        raise refuse(what, name, value, "a number between 0 and 1")
    return float(value)


def _check_betas(what: str, process: DiscreteProcess) -> None:
    """Refuse noise that becomes less: every model was trained with one that becomes more."""
    if process.trained_betas is None and process.beta_start > process.beta_end:
        raise refuse(
            what, "beta_start", process.beta_start, f"at most beta_end={process.beta_end:g}"
        )


def _check_steps(what: str, given: Json) -> None:
    """Refuse a choice of timesteps that no scheduler can follow."""
    spacing, offset = given.get("timestep_spacing"), given.get("steps_offset", 0)
    if spacing not in (None, *SPACINGS):
        raise refuse(what, "timestep_spacing", spacing, ", ".join(SPACINGS))
    if type(offset) is not int or not 0 <= offset < timesteps_of(what, given):
        raise refuse(what, "steps_offset", offset, "a whole number below num_train_timesteps")


def _trained_betas(what: str, given: Json) -> tuple[float, ...] | None:
    value = given.get("trained_betas")
    if value is None:
        return None
    timesteps = timesteps_of(what, given)
    betas = list(value) if isinstance(value, list | tuple) else []
    fit = all(is_number(beta) and 0 < beta < 1 for beta in betas[:-1])
    if len(betas) != timesteps or not (fit and is_number(betas[-1]) and 0 < betas[-1] <= 1):
        shown = f"{len(betas)} values" if betas else value
        allowed = f"a list of {timesteps} numbers between 0 and 1 (num_train_timesteps), or null"
        raise refuse(what, "trained_betas", shown, allowed)
    return tuple(float(beta) for beta in betas)


def flag(what: str, given: Json, name: str) -> bool:
    """A setting that is true or false; absent is false.

    Raises:
        ForwardProcessError: It is neither.
    """
    value = given.get(name)
    if value not in (None, True, False) or is_number(value):
        raise refuse(what, name, value, "true, false")
    return bool(value)


def _prediction(what: str, given: Json, wanted: Prediction | None) -> Prediction:
    value = given.get("prediction_type")
    if value is None:
        return wanted or Prediction.epsilon  # diffusers' default
    allowed = [kind.value for kind in Prediction]
    if value not in allowed:
        raise refuse(what, "prediction_type", value, ", ".join(allowed))
    if wanted is not None and wanted.value != value:
        raise ForwardProcessError(
            f"{what}: {CONFIG} has prediction_type={value!r}, but model.prediction_type="
            f"{wanted.value}; the setting is for models whose file does not say: remove it, or "
            "correct the file"
        )
    return Prediction(value)


def _check_invertible(what: str, process: DiscreteProcess) -> None:
    """Refuse noise predicted where there is nothing but noise: the image cannot be had from it."""
    if process.ends_in_noise and process.prediction is Prediction.epsilon:
        cause = "rescale_betas_zero_snr=true" if process.zero_terminal_snr else "a last beta of 1"
        raise ForwardProcessError(
            f"{what}: {CONFIG} has {cause}, which leaves no signal at the last timestep, so that "
            "an image cannot be computed from predicted noise (epsilon); allowed with it: "
            "prediction_type=v_prediction. If the model predicts v, correct prediction_type; "
            "otherwise restore the file that the model came with"
        )

"""Rectified flow (Liu et al. 2022; Esser et al. 2024), decided from a scheduler's settings.

x = (1 - sigma) latents + sigma noise, and the denoiser predicts noise - latents. Sigmas lie on a
grid of `num_timesteps`; a shift s moves them towards noise: s sigma / (1 + (s - 1) sigma).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data.models.forward_process import (
    CONFIG,
    ForwardProcessError,
    Json,
    Prediction,
    ProcessKind,
    flag,
    is_number,
    process_kind,
    refuse,
    scheduler_classes,
    stated,
    timesteps_of,
)

EULER = "FlowMatchEulerDiscreteScheduler"
"""The scheduler that takes a path of sigmas and a shift by size, which some pipelines give."""
SCHEDULERS = (EULER, "FlowMatchHeunDiscreteScheduler")
"""Schedulers of diffusers that sample from this process."""
SOLVING = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""The settings with which schedulers of the discrete process do, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowProcess:
    """The process of a flow-matching model."""

    num_timesteps: int
    shift: float
    """The scheduler's; in sampling it counts where the shift is not dynamic."""
    dynamic: tuple[tuple[int, float], tuple[int, float]] | None = None
    """Where the shift depends on the image's size: two numbers of patches and the logarithms of
    their shifts, between which it is linear."""
    terminal: float | None = None
    """The sigma of the last step of sampling (`shift_terminal`), to which those before it are
    stretched; None leaves them as they are."""
    is_assumed: bool = False
    """Nothing is: a flow's denoiser always predicts noise - latents."""

    @property
    def training_shift(self) -> float:
        """The shift of diffusers' training scripts: the scheduler's, none where it is dynamic.

        They take the sigmas that a new scheduler has, in which only a static shift is included.
        """
        return 1.0 if self.dynamic else self.shift

    def sampling_shift(self, patches: int) -> float:
        """The shift of the pipeline for an image of this many patches."""
        if self.dynamic is None:
            return self.shift
        (few, low), (many, high) = self.dynamic
        return math.exp(low + (high - low) / (many - few) * (patches - few))

    def spacing_to_set(self, scheduler: Json) -> dict[str, str]:
        """Nothing: its schedulers begin at pure noise."""
        del scheduler
        return {}

    def __str__(self) -> str:
        """The process in words, for the first lines of a run and the model card."""
        shift = "a shift by image size in sampling" if self.dynamic else f"shift {self.shift:g}"
        return f"rectified flow, {self.num_timesteps} timesteps, {shift}"


def flow_process(
    what: str,
    index: Json,
    scheduler: Json,
    prediction: Prediction | None = None,
    schedulers: Sequence[str] = SCHEDULERS,
) -> FlowProcess:
    """The process of a model that is to be a flow-matching one; parameters as `forward_process`.

    `schedulers` are those that the pipeline takes. Of other processes' they must sample from this
    one by their settings.

    Raises:
        ForwardProcessError: It has another process, or settings that are not known here.
    """
    if reason := _other_process(index, scheduler, schedulers):
        names = ", ".join(name.removesuffix("Scheduler") for name in schedulers)
        raise ForwardProcessError(
            f"{what}: {reason}; a {index.get('_class_name')} needs {ProcessKind.flow.value}, with "
            f"one of {names}. Restore the scheduler that it came with"
        )
    if prediction is not None:
        raise ForwardProcessError(
            f"{what}: model.prediction_type={prediction.value} is set, but a flow-matching model "
            "always predicts noise - latents; remove the setting"
        )
    given = stated(scheduler)
    if flag(what, given, "invert_sigmas"):
        raise refuse(what, "invert_sigmas", True, "false")
    is_solver = bool(set(scheduler_classes(index, scheduler).values()) - set(SCHEDULERS))
    for name, value in SOLVING.items() if is_solver else ():
        if given.get(name) != value:
            raise refuse(what, name, given.get(name), f"{value}, as a flow-matching model needs")
    return FlowProcess(
        num_timesteps=timesteps_of(what, given),
        shift=_number(what, given, "flow_shift" if is_solver else "shift", 1.0),
        dynamic=_dynamic(what, given),
        terminal=_terminal(what, given),
    )


def _other_process(index: Json, scheduler: Json, known: Sequence[str]) -> str:
    """Which scheduler means another process, and which; empty if all are known here."""
    classes = scheduler_classes(index, scheduler)
    if not classes:
        return f"{CONFIG} has no _class_name, which means {ProcessKind.unknown.value}"
    for file, name in classes.items():
        if name in SCHEDULERS and name not in known:
            return f"{file} names the scheduler {name}, which the pipeline cannot call"
        if name not in known:
            kind, _ = process_kind({}, {"_class_name": name})
            other = ProcessKind.unknown if kind is ProcessKind.flow else kind
            return f"{file} names the scheduler {name}, which means {other.value}"
    return ""


def _dynamic(what: str, given: Json) -> tuple[tuple[int, float], tuple[int, float]] | None:
    if not flag(what, given, "use_dynamic_shifting"):
        return None
    kind = given.get("time_shift_type", "exponential")
    if kind != "exponential":
        raise refuse(what, "time_shift_type", kind, "exponential")
    few, many = (
        int(_number(what, given, f"{end}_image_seq_len", usual))
        for end, usual in (("base", 256.0), ("max", 4096.0))
    )
    if few >= many:
        raise refuse(what, "max_image_seq_len", many, f"more than base_image_seq_len={few}")
    low, high = _number(what, given, "base_shift", 0.5), _number(what, given, "max_shift", 1.15)
    return (few, low), (many, high)


def _terminal(what: str, given: Json) -> float | None:
    value = given.get("shift_terminal")
    if not value:  # of which diffusers takes no notice
        return None
    if not is_number(value) or not 0 < value < 1:
        raise refuse(what, "shift_terminal", value, "a number between 0 and 1, or null")
    return float(value)


def _number(what: str, given: Json, name: str, usual: float) -> float:
    value = given.get(name, usual)
    if not is_number(value) or value <= 0:
        raise refuse(what, name, value, "a number above 0")
    return float(value)

"""Whether the scheduler in a model's folder begins where the model's forward process ends."""

from data.models.forward_process import (
    CONFIG,
    DISCRETE,
    TRAILING,
    ForwardProcessError,
    Json,
    scheduler_classes,
)

LEADING = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler",
    "PNDMScheduler",
)  # fmt: skip
"""Those whose `timestep_spacing` is `leading` if no file says otherwise; the others' is
`linspace`."""
RESCALING = (
    *LEADING[:-1], "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Those that heed `rescale_betas_zero_snr`."""


def check_own_sampling(what: str, index: Json, scheduler: Json) -> None:
    """Refuse a scheduler that does not begin where a process without signal at the end begins.

    Raises:
        ForwardProcessError: It leaves out the last timestep, or ignores the rescaled betas.
    """
    name = next(iter(scheduler_classes(index, scheduler).values()), "")
    if not scheduler.get("rescale_betas_zero_snr") or name not in DISCRETE:
        return
    spacing = scheduler.get("timestep_spacing") or ("leading" if name in LEADING else "linspace")
    if name in RESCALING and spacing in (TRAILING, "linspace"):
        return
    problem = "ignores it" if name not in RESCALING else f"has timestep_spacing={spacing}"
    raise ForwardProcessError(
        f"{what}: {CONFIG} has rescale_betas_zero_snr=true, but its {name} {problem}, so that "
        "sampling would not begin at the last timestep; sample with evaluate.scheduler=ddim, which "
        f"sets what is needed, or write timestep_spacing={TRAILING} and one of "
        f"{', '.join(RESCALING)} there"
    )

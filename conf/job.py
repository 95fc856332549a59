"""One run, one configuration: the stages read their sections of the same `Job`.

The only module with Hydra, and the only one that knows the settings of every stage. Every YAML
below this folder fills a field of a dataclass here; everything is checked before a stage begins.
"""

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from conf.command_line import as_text, spelling
from conf.numbers import check_lists, check_numbers
from conf.presets import about, with_preset
from data.distributed import Rank, adopt_srun, without_local_rank
from data.pairs.config import PairsSpec
from data.storage.base import UnreachableError
from data.storage.hub import HubError
from data.storage.paths import user_path
from data.storage.single_file import folder_of, is_single_file
from evaluate.config import EvaluateSpec, RoundsSpec
from generate.config import GenerateSpec
from label.config import (
    HUMAN,
    LabelSpec,
    MetricSpec,
    PanelSpec,
    ParitySpec,
    Rule,
    TieRule,
    VoteSpec,
)
from train.config import ModelSpec, TrainSpec

FOLDER = Path(__file__).parent
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""
LEAVE_TO_FIRST_S = 10.0
"""How long a process waits to be ended by its launcher before it repeats what the first says."""

RENAMED = {
    "label.patience_s": "is gone: no process waits for another any more; leave it out",
    "label.pictures": "is now label.gallery_pairs",
    "evaluate.pictures": "is now evaluate.gallery_pairs",
    "parity.pictures": "is now parity.images",
    "pairs.miniature_pairs": "is now pairs.options.num_pairs",
    "train.patience_s": "is now train.collective_timeout_s",
    "train.weight_decay": "is now train.optimizer.weight_decay",
    "train.silence_s": "is gone: torchrun, srun and train.collective_timeout_s notice a dead "
    "process; leave it out",
}
"""Settings of earlier versions, and what became of them."""


class Goal(Enum):
    """A stage with which a command ends."""

    label = "label"
    train = "train"
    evaluate = "evaluate"


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything that decides a run."""

    run: str = "???"
    """Folder of this run under `runs`."""
    runs: str = "runs"
    """Where runs are kept."""
    goal: Goal | None = None
    """The last stage of the command that this one belongs to, which `make train` and `make eval`
    set, and `make labels` with pairs=own: the paths of all stages up to it are checked at the
    start. Null checks this stage's."""
    seed: int = 0
    """Decides every random choice of every stage."""
    pairs: PairsSpec = field(default_factory=PairsSpec)
    """The pairs to label and to train on."""
    metrics: dict[str, MetricSpec] = field(default_factory=dict)
    """Every available scorer, by name."""
    panel: PanelSpec = field(default_factory=PanelSpec)
    """Which of them vote and judge."""
    vote: VoteSpec = field(default_factory=VoteSpec)
    """How their votes become labels."""
    label: LabelSpec = field(default_factory=LabelSpec)
    """How stage one runs."""
    parity: ParitySpec = field(default_factory=ParitySpec)
    """How the metrics are checked."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The model to align."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """How it is trained."""
    generate: GenerateSpec = field(default_factory=GenerateSpec)
    """How pairs of one's own are made, with `pairs=own`."""
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    """How the result is judged."""
    rounds: RoundsSpec = field(default_factory=RoundsSpec)
    """How the stages are repeated (`make rounds`)."""

    @property
    def folder(self) -> Path:
        """Everything this run writes lies below this folder."""
        return user_path(self.runs, "runs") / self.run

    def __post_init__(self) -> None:
        if not all(re.fullmatch(r"\w[\w.-]*", part) for part in self.run.split("/")):
            raise ValueError(
                f"run={self.run!r}; name a run with letters and digits, after the first also '.', "
                "'_' and '-'; a / makes it a run below another one (aligned/round-1)"
            )
        if not self.panel.voters:
            raise ValueError("panel.voters is empty; name at least one metric")
        if HUMAN in self.metrics:
            raise ValueError(f"a metric cannot be named {HUMAN!r}: so the human label is called")
        for name, spec in self.metrics.items():
            if spec.tie < 0:
                raise ValueError(f"metrics.{name}.tie={spec.tie}; it must not be negative")
        self._check_roles()
        for where, name in self._named_metrics():
            if str(name) not in self.metrics:
                raise ValueError(
                    unknown(f"metric {name!r} in {where}", str(name), sorted(self.metrics))
                )

    def _check_roles(self) -> None:
        """Refuse a metric that is named twice: a judge that votes is no held-out one."""
        roles: dict[str, str] = {}
        for role in ("voters", "held_out", "oracle"):
            for name in map(str, getattr(self.panel, role)):
                if name in roles:
                    raise ValueError(
                        f"panel.{role} has {name}, which panel.{roles[name]} has already; name "
                        "each metric once"
                    )
                roles[name] = role

    def _named_metrics(self) -> Iterator[tuple[str, str]]:
        for role in ("voters", "held_out", "oracle"):
            yield from ((f"panel.{role}", name) for name in getattr(self.panel, role))
        if self.vote.rule is Rule.single:
            yield "vote.metric", self.vote.metric
        if self.vote.tie_rule is TieRule.metric:
            yield "vote.tie_metric", self.vote.tie_metric
        yield from (("vote.weights", name) for name in self.vote.weights if name != HUMAN)


def unknown(what: str, name: str, allowed: list[str]) -> str:
    """Say what was found, what is allowed, and the nearest match."""
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {what}; {hint}allowed: {', '.join(allowed) or 'none'}"


def entry(main: Callable[[Job], None]) -> Callable[[], None]:
    """Compose the configuration from the command line, check it, and hand it to a stage's `main`.

    A user's mistake (ValueError: configuration, input files, run folder) ends with one message and
    exit status 2; anything else is a bug of ours and keeps its traceback. BALANCEDDPO_TRACEBACK=1
    keeps all tracebacks.
    """

    def run() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises, we explain
        # Read by OpenMP when torch is imported: threads that spin while they wait make everything
        # else on a busy CPU, the readers of pairs among them, several times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        adopt_srun()
        sys.argv[1:] = as_text(without_local_rank(sys.argv[1:]), Job)
        try:
            for config in _compose_command_line(sys.argv[1:]):
                main(with_model_folder(checked(config)))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if os.environ.get("BALANCEDDPO_TRACEBACK"):
                raise
            if isinstance(error, UnreachableError | HubError):
                leave_to_first()
            print(f"error: {explain(error)}", file=sys.stderr)
            print("(BALANCEDDPO_TRACEBACK=1 shows the traceback)", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted; rerun the same command, it resumes", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from error

    return run


def _compose_command_line(arguments: Sequence[str]) -> list[Any]:
    """The configuration of a command line; none for --help and --cfg, which only print."""
    arguments = sys.argv[1:] = with_preset(arguments, _chosen_model)
    if not any(re.match(r"-|[+~]*hydra\b", argument) for argument in arguments):
        if (chosen := about(arguments)) and Rank.from_environment().is_first:
            print(chosen)
        return [_compose(arguments)]
    # Hydra's own command line composes twice, which takes 0.16 s more.
    ConfigStore.instance().store(name="job_schema", node=schema())
    configs: list[Any] = []
    hydra.main(version_base="1.3", config_path=str(FOLDER), config_name="job")(configs.append)()
    return configs


def leave_to_first() -> None:
    """Let the first process of a machine tell what each of its processes sees.

    The launcher ends the others when that one has ended; one that is still there speaks for itself.
    """
    if Rank.from_environment().local_rank:
        time.sleep(LEAVE_TO_FIRST_S)


def schema() -> Any:
    """`Job` for Hydra; `vote.weights.hps=2` and `generate.models.NAME=PATH` need no `+`."""
    job = OmegaConf.structured(Job)
    for names in (job.vote.weights, job.generate.models):  # which `Job` itself checks
        OmegaConf.set_struct(names, value=False)
    return job


def composed(overrides: Sequence[str]) -> Job:
    """The job that a command line with these overrides asks for; for programs and tests."""
    return checked(_compose(with_preset(as_text(overrides, Job), _chosen_model)))


def _chosen_model(overrides: Sequence[str]) -> str:
    """The choice of the group `model`."""
    return str(_compose(overrides, choices=True).hydra.runtime.choices["model"])


def _compose(overrides: Sequence[str], *, choices: bool = False) -> Any:
    """The configuration with these overrides, each in Hydra's grammar; with Hydra's `choices`."""
    ConfigStore.instance().store(name="job_schema", node=schema())
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return hydra.compose("job", overrides=list(overrides), return_hydra_config=choices)


def checked(config: Any) -> Job:
    """The dataclasses of a composed configuration, each of which checks itself.

    Raises:
        ValueError: A setting cannot be what it is, or was added with `+` and nothing reads it.
    """
    check_lists(OmegaConf.to_container(config, resolve=True))
    try:
        job = OmegaConf.to_object(config)
    except AttributeError as error:  # slots: no dataclass takes what it does not know
        match = re.search(r"no attribute '(\w+)'", str(error))
        if not match:
            raise
        raise ValueError(
            f"nothing reads the setting {match[1]!r} that was added with a + in front; try it "
            "without the + to see which names are allowed"
        ) from error
    assert isinstance(job, Job)
    check_numbers(settings(job))
    return job


def with_model_folder(job: Job) -> Job:
    """The job with a diffusers folder as its model: a single file is converted once.

    Raises:
        ValueError: The file cannot be read as a model.
    """
    if is_single_file(job.model.path):
        job.model.path = str(folder_of(job.model.path, job.model.config))
        job.model.revision = None  # that of the group's own model
    return job


def settings(spec: Any) -> Any:
    """A dataclass as plain JSON values, enums by their value: what manifests record and compare."""
    if is_dataclass(spec) and not isinstance(spec, type):
        return {item.name: settings(getattr(spec, item.name)) for item in fields(spec)}
    if isinstance(spec, Enum):
        return spec.value
    if isinstance(spec, dict):
        return {key: settings(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [settings(value) for value in spec]
    return spec


def explain(error: BaseException) -> str:
    """One message for people: the innermost cause, with what is allowed and the nearest match."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        text = str(cause).strip()
        if isinstance(cause, OverrideParseException):
            problem = text.partition("\nSee ")[0]
            return f"{cause.override!r} cannot be read ({problem}); {spelling(cause.override)}"
        if isinstance(cause, OmegaConfBaseException) and text.startswith("Key '"):
            return _unknown_key(cause)
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            group, _, name = str(cause.missing_cfg_file).rpartition("/")
            return unknown(f"{group} {name!r}", name, sorted(cause.options))
        if text.startswith("Config group override must be a string"):
            return f"{text}; conf/<group>/ has the names, as stage3 of zero=stage3"
        if isinstance(cause, OmegaConfBaseException) and not isinstance(error, ValueError):
            return _wrong_value(cause, text)
    return str(error).strip()


def _unknown_key(error: OmegaConfBaseException) -> str:
    """The setting's whole name, beside those of its neighbours, or what became of it."""
    key, parent = str(error.full_key), error.parent_node
    if key in RENAMED:
        return f"{key} {RENAMED[key]}"
    owner, dot, _ = key.rpartition(".")
    names = [f"{owner}{dot}{name}" for name in parent or [] if name != "hydra"]
    more = f"; a new name takes a + in front: +{key}=..." if error.object_type is dict else ""
    return unknown(f"setting {key}", key, names) + more


def _wrong_value(error: OmegaConfBaseException, text: str) -> str:
    """OmegaConf's first line, which says what was found and what is allowed, after the setting."""
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key
        return f'{key} is not set and has no default; add {key}=..., for make ARGS="{key}=..."'
    what = text.splitlines()[0]
    return f"{error.full_key}: {what}" if getattr(error, "full_key", "") else what

"""From the kind of a metric to the module that defines it; imports no torch.

`kind: clip` is label/metrics/clip.py, `kind: my_package.my_metric` is a module of the user's that
Python can import. Either has a `METRIC`, a `MetricDefinition` (`label.metrics.base`).
"""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from data.artifacts.fingerprints import Fingerprints
from data.artifacts.readable import UnreadableError
from data.devices import Dtype
from label.config import MetricSpec
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.weights import WeightsError


@cache
def built_in_kinds() -> tuple[str, ...]:
    """The kinds that have a file in label/metrics/; no file is imported."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(path.stem for path in files if "\nMETRIC = " in path.read_text()))


def definition_of(name: str, kind: str) -> MetricDefinition:
    """The definition of the kind of a metric.

    Raises:
        ValueError: There is no such kind; says which there are.
    """
    built_in = built_in_kinds()
    if kind not in built_in and "." not in kind:
        near = get_close_matches(kind, built_in, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"metrics.{name}.kind={kind} is unknown; {hint}allowed: {', '.join(built_in)}, or the "
            "dotted name of a module of yours, such as my_package.my_metric"
        )
    module = f"label.metrics.{kind}" if kind in built_in else kind
    try:
        definition = getattr(import_module(module), "METRIC", None)
    except ImportError as error:
        raise ValueError(
            f"metrics.{name}.kind={kind} cannot be imported ({error}); its package must be "
            "installed or lie in the folder that you start from"
        ) from error
    if not isinstance(definition, MetricDefinition):
        raise ValueError(  # noqa: TRY004 - the user's mistake
            f"metrics.{name}.kind={kind}: the module defines no METRIC; it must be a "
            'label.metrics.base.MetricDefinition (docs/metrics.md, "Adding a metric")'
        )
    return definition


def settle_dtypes(specs: Mapping[str, MetricSpec], *, on_gpu: bool) -> dict[str, MetricSpec]:
    """The metrics with the number format of the device where theirs is null.

    fp16 rather than bf16 on GPUs: as fast, and on the miniature's pairs it changed 0.7 % of the
    majority's labels, bf16 1.7 % (benchmarks/results/label-2-core-x86-vm.json).
    """
    dtype = Dtype.fp16 if on_gpu else Dtype.fp32
    return {
        name: replace(spec, dtype=dtype) if spec.dtype is None else spec
        for name, spec in specs.items()
    }


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """Find a metric's files and image transform; loads no weights.

    Raises:
        ValueError: Its kind is unknown, or something is missing; names it and the setting.
    """
    return definition_of(name, spec.kind).resolve(name, spec)


def resolve_all(specs: Mapping[str, MetricSpec]) -> list[ResolvedMetric]:
    """Resolve several metrics, after the kinds of all of them were found."""
    definitions = {name: definition_of(name, spec.kind) for name, spec in specs.items()}
    return [definitions[name].resolve(name, spec) for name, spec in specs.items()]


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """Load a metric; what a library says of a damaged file is said with the metric's name.

    Raises:
        ValueError: Its weights, configuration or tokenizer are damaged or do not fit each other.
    """
    try:
        return definition_of(resolved.name, resolved.spec.kind).load(resolved, loader)
    except (UnreadableError, WeightsError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError) as error:
        is_device = isinstance(error, RuntimeError) and (
            type(error) is not RuntimeError or "CUDA" in str(error)
        )
        if is_device:  # memory, drivers
            raise
        raise WeightsError(
            f"metrics.{resolved.name} cannot be loaded from {resolved.spec.weights} "
            f"({type(error).__name__}: {error}); fetch its files again, or give those of a "
            f"{resolved.spec.kind}"
        ) from error


def score_settings(
    specs: Mapping[str, MetricSpec], memory: Path | None = None
) -> dict[str, dict[str, Any]]:
    """What decides each metric's scores, for both stages; loads no weights.

    Hashes of weights are remembered in the file `memory`, since a panel has gigabytes of them.

    Raises:
        ValueError: A kind is unknown, or weights are missing, of another kind, or not those that
            are pinned.
    """
    fingerprints = Fingerprints(memory)
    metrics = resolve_all(specs)
    for metric in metrics:
        metric.check_sha256(fingerprints)
    return {metric.name: metric.settings(fingerprints) for metric in metrics}

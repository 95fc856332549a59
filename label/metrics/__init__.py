"""The scorers: one protocol, a file per family, and the panel that runs them together.

`score_settings` needs no torch; everything else is imported when it is first asked for, so that a
run with nothing left to score answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from label.metrics.registry import score_settings

if TYPE_CHECKING:
    from label.metrics.base import CrossMetric, EmbeddingMetric, Metric
    from label.metrics.panel import Panel

__all__ = ["EmbeddingMetric", "Metric", "Panel", "CrossMetric", "score_settings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "panel" if name == "Panel" else "base"
    return getattr(import_module(f"label.metrics.{module}"), name)

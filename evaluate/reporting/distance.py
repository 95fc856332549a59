"""A model's distance from the base, as `winrates.json` holds it and as people read it."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from evaluate.judging.distance import known
from evaluate.plan import ComparisonPlan
from evaluate.statistics.distance import change, denoiser_distance

HEADINGS = ("distance", "base", "model", "difference", "95 % interval")
LOOKS = ("saturation", "contrast")


def distance_of(plan: ComparisonPlan, name: str) -> dict[str, Any] | None:
    """A model's distance from the base, as JSON values; None if nothing of it was measured."""
    facts = {"looks": looks(plan, name), "denoiser": denoiser(plan, name)}
    plain: dict[str, Any] = _plain((facts["looks"] or {}) | {"denoiser": facts["denoiser"]})
    return plain if any(facts.values()) else None


def looks(plan: ComparisonPlan, name: str) -> dict[str, Any] | None:
    """Saturation and contrast of all images, diversity of the prompts with several."""
    base, model = (
        known(plan.image_facts(one), plan.image_fact_settings(one))
        for one in (plan.spec.base, name)
    )
    if base is None or model is None:
        return None
    num_seeds = len(plan.score_settings["seeds"])
    number = len(base["saturation"]) // num_seeds
    prompts = np.arange(number)
    values = {key: (prompts.repeat(num_seeds), base[key], model[key]) for key in LOOKS}
    if "diversity" in base and "diversity" in model:
        values["diversity"] = prompts, base["diversity"], model["diversity"]
    changes = {
        key: change(np.array(of_base), np.array(of_model), of_prompt, plan.seed)
        for key, (of_prompt, of_base, of_model) in values.items()
    }
    return changes | {"embedded_by": base.get("embedded_by")}


def denoiser(plan: ComparisonPlan, name: str) -> dict[str, Any] | None:
    """How differently the denoisers predict; `reason` says why that has no answer."""
    facts = known(plan.denoiser_facts(name), plan.denoiser_fact_settings(name))
    if facts is None or "reason" in facts:
        return facts
    squared, error = (np.array(facts[key]) for key in ("squared_difference", "base_error"))
    distance = denoiser_distance(squared, error, facts["levels"], plan.seed)
    return {"predicts": facts["predicts"], "images": squared.shape[1]} | distance


def distance_rows(distance: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of a table under `HEADINGS`."""
    rows: list[tuple[str, ...]] = [
        (
            f"{key}, by {distance['embedded_by']}" if key == "diversity" else key,
            f"{entry['base']:.4f}",
            f"{entry['model']:.4f}",
            f"{entry['change']['value']:+.4f}",
            f"{entry['change']['low']:+.4f} to {entry['change']['high']:+.4f}",
        )
        for key in (*LOOKS, "diversity")
        if (entry := distance.get(key))
    ]
    if (of_denoiser := distance["denoiser"]) and "levels" in of_denoiser:
        entries = {f"at noise {level['noise']:g}": level for level in of_denoiser["levels"]}
        entries["over all levels"] = of_denoiser["mean"]
        rows += [_prediction_row(where, entry) for where, entry in entries.items()]
    return rows


def _prediction_row(where: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    squared = entry["squared_difference"]
    fraction = (
        "" if entry["fraction"] is None else f", {100 * entry['fraction']:.3g} % of the error"
    )
    return (
        f"squared difference of predictions {where}",
        f"error {entry['base_error']:.3g}",
        "",
        f"{squared['value']:.3g}{fraction}",
        f"{squared['low']:.3g} to {squared['high']:.3g}",
    )


def short_distance(comparison: Mapping[str, Any]) -> str:
    """The difference of predictions as a fraction of the base's error; a dash if there is none."""
    of_denoiser = (comparison.get("distance") or {}).get("denoiser") or {}
    fraction = of_denoiser.get("mean", {}).get("fraction")
    return "–" if fraction is None else f"{100 * fraction:.3g} %"


def distance_sentence(comparison: Mapping[str, Any]) -> str:
    """The distance in one sentence; empty if it was not measured."""
    distance = comparison.get("distance")
    if not distance:
        return ""
    parts = [
        f"{key} {entry['base']:.3f} to {entry['model']:.3f}"
        for key in (*LOOKS, "diversity")
        if (entry := distance.get(key))
    ]
    if of_denoiser := distance["denoiser"]:
        parts.append(_prediction_words(of_denoiser))
    return f"Distance from {comparison['base']}: {', '.join(parts)}."


def _prediction_words(of_denoiser: Mapping[str, Any]) -> str:
    if "levels" not in of_denoiser:
        return f"denoisers not compared ({of_denoiser['reason']})"
    entry, kind = of_denoiser["mean"], of_denoiser["predicts"]
    fraction = entry["fraction"]
    of_error = "" if fraction is None else f" ({100 * fraction:.3g} % of the base's own error)"
    return f"predictions of {kind} differ by {entry['squared_difference']['value']:.2g}{of_error}"


def _plain(value: Any) -> Any:
    """Estimates as mappings."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value

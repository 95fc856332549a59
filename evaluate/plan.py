"""The plan of a comparison: models, prompts, seeds, judges, and the settings its results depend on.

Built by `evaluate.run` from the configuration and checked completely before any model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.images import Size
from evaluate.config import EvaluateSpec
from evaluate.statistics.winrate import Judge
from generate.image_files import Model, Sample, list_samples
from generate.prompts.prompt_set import PromptSet


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """Several models, one of them the base, sampled for the same prompts from the same noise."""

    folder: Path
    spec: EvaluateSpec
    models: tuple[Model, ...]
    prompts: PromptSet
    judges: tuple[Judge, ...]
    left_out: tuple[str, ...] = ()
    """A line for each judge that cannot read the prompts."""
    metrics: Mapping[str, Any]
    """Each judge's settings and the hash of its weights, as JSON values."""
    size: Size
    """The size of the images."""
    seed: int
    recorded: Mapping[str, Any] | None = None
    """The settings in an existing `scores.parquet` that is used as it is
    (`evaluate.scores_only`)."""

    @property
    def samples(self) -> Path:
        """The folder of the images, with a subfolder for each model."""
        return self.folder / "samples"

    @property
    def scores(self) -> Path:
        """Every judge's score of every image."""
        return self.folder / "scores.parquet"

    @property
    def judges_json(self) -> Path:
        """The weights and libraries that the scores were made with."""
        return self.folder / "judges.json"

    def model_scores(self, name: str) -> Path:
        """Every judge's score of one model's images; `scores` joins these files."""
        return self.folder / "scores" / f"{name}.parquet"

    def share_scores(self, name: str, rank: int, world_size: int) -> Path:
        """Every judge's score of those images of a model that one of several ranks scores."""
        return self.folder / "scores" / name / f"{rank}-of-{world_size}.parquet"

    def image_facts(self, name: str) -> Path:
        """Saturation, contrast and diversity of a model's images."""
        return self.folder / "distance" / f"images-{name}.json"

    def denoiser_facts(self, name: str) -> Path:
        """How differently a model's denoiser predicts from the base's."""
        return self.folder / "distance" / f"denoiser-{name}.json"

    @property
    def seeds(self) -> list[int]:
        """The seeds of the initial noise: one image per prompt, model and seed."""
        return list(range(self.seed, self.seed + self.spec.seeds))

    @property
    def candidates(self) -> list[str]:
        """The models compared with the base."""
        return [model.name for model in self.models if model.name != self.spec.base]

    @cached_property
    def images(self) -> dict[str, list[Sample]]:
        """Model name -> all images it has to sample."""
        return {
            model.name: list_samples(self.samples, model.name, self.prompts, self.seeds)
            for model in self.models
        }

    @cached_property
    def sample_settings(self) -> dict[str, dict[str, Any]]:
        """Model name -> the settings its images depend on, except the seed in their file names."""
        return {
            model.name: {
                "model": model.fingerprint(),
                "prompts": {"name": self.prompts.name, "sha256": self.prompts.sha256},
                "resolution": self.size.recorded,
                "steps": self.spec.steps,
                "guidance": self.spec.guidance,
                "scheduler": self.spec.scheduler.value,
                "dtype": self.spec.dtype.value,
                **({"prediction": model.prediction_type.value} if model.prediction_type else {}),
            }
            for model in self.models
        }

    @property
    def score_settings(self) -> dict[str, Any]:
        """The settings that `scores.parquet` depends on."""
        if self.recorded is not None:
            return dict(self.recorded)
        return {
            "samples": self.sample_settings,
            "seeds": self.seeds,
            "metrics": dict(self.metrics),
        }

    def model_score_settings(self, name: str) -> dict[str, Any]:
        """The settings that one model's scores depend on."""
        return self.score_settings | {"samples": {name: self.sample_settings[name]}}

    def image_fact_settings(self, name: str) -> dict[str, Any]:
        """The settings that `image_facts` depend on."""
        settings = self.score_settings
        embeddings = {"metrics": settings["metrics"]} if len(settings["seeds"]) > 1 else {}
        return {"samples": settings["samples"][name], "seeds": settings["seeds"]} | embeddings

    def denoiser_fact_settings(self, name: str) -> dict[str, Any]:
        """The settings that `denoiser_facts` depend on."""
        samples = self.score_settings["samples"]
        return {
            "model": samples[name],
            "base": samples[self.spec.base],
            "seed": self.seed,
            "images": self.spec.distance_images,
        }

    @property
    def rate_settings(self) -> dict[str, Any]:
        """The settings that win rates and report depend on."""
        return {
            "scores": self.score_settings,
            "base": self.spec.base,
            "judges": {
                judge.metric: {"role": judge.role.value, "tie": judge.tie} for judge in self.judges
            },
            "resamples": self.spec.resamples,
            "seed": self.seed,
            "images": self.spec.gallery_pairs,
            "distance_images": self.spec.distance_images,
        }

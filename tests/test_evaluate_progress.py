"""The progress bar of a comparison counts what every rank has sampled and scored."""

from pathlib import Path

import pytest
from rich.console import Console

from evaluate.reporting.progress import SampledImages, progress
from generate.image_files import Sample
from generate.prompts.files import Prompt


def images_of(folder: Path, number: int) -> dict[str, list[Sample]]:
    return {
        name: [
            Sample(name, Prompt(id=i, text=str(i)), 0, folder / name / f"{i:05d}-0.png")
            for i in range(number)
        ]
        for name in ("base", "ours")
    }


def sample(image: Sample) -> None:
    image.path.parent.mkdir(parents=True, exist_ok=True)
    image.path.write_bytes(b"an image")


@pytest.mark.parametrize(("every_s", "seen"), [(0.0, 4), (3600.0, 2)])
def test_images_of_other_ranks_count(tmp_path: Path, every_s: float, seen: int):
    """At each listing; between two listings those of this rank alone."""
    images = images_of(tmp_path, 3)
    sample(images["base"][0])
    with progress(Console(quiet=True), shown=True) as bar:
        count = SampledImages(images, bar, every_s)
        (task,) = bar.tasks
        assert (task.completed, task.total) == (1, 6)
        for image in (images["base"][1], images["ours"][0], images["ours"][1]):  # two by others
            sample(image)
        (tmp_path / "ours" / ".00002-0.png.partial").write_bytes(b"")
        (tmp_path / "ours" / "settings.json").write_bytes(b"{}")
        count.advance(1)
        assert task.completed == seen
        count.finish()
        assert task.completed == 4

"""HPSv3 beyond its official numbers (test_golden.py): the checkpoint, preparation, refusals."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.devices import Dtype
from data.images import decode
from label.config import MetricSpec
from label.metrics.architectures import QWEN2_VL_7B
from label.metrics.hps_v3_network import empty_network, hps_v3_to_ours, read_template, to_patches
from label.metrics.preprocessing import ImageTransform, ResizeMode, cells
from label.metrics.protocols import CrossMetric
from label.metrics.registry import resolve
from label.metrics.weights import WeightsError
from label.scoring.panel import Panel
from tests import helpers_label as tiny
from tests.helpers_golden import (
    INSTRUCTION,
    QWEN_CONFIG,
    SCORED,
    hps_v3_shapes,
    save,
    save_qwen_words,
    shapes_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "a very long " + "long " * 60 + "prompt", "two dogs & a cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hps_v3")
    words = save_qwen_words(root / "words")
    save(root / "weights", QWEN_CONFIG, weights(hps_v3_shapes(QWEN_CONFIG, words)))
    (root / "template.txt").write_text(INSTRUCTION + SCORED)
    return root


def spec(root: Path, **more: Any) -> MetricSpec:
    given = {"weights": "weights", "tokenizer": "words", "template": "template.txt"} | more
    paths = {key: str(root / value) for key, value in given.items() if key != "dtype"}
    return MetricSpec(kind="hps_v3", dtype=given.get("dtype", Dtype.fp32), **paths)


def images(count: int) -> list[bytes]:
    return [tiny.image(i, (60 + 20 * i, 100)) for i in range(count)]


# --- the checkpoint fits -------------------------------------------------------------------------


def test_the_published_checkpoint_fits_key_for_key() -> None:
    shapes = hps_v3_shapes(QWEN2_VL_7B, 151658)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    results = {key: tuple(value.shape) for key, value in hps_v3_to_ours(state).items()}
    network = empty_network(QWEN2_VL_7B, 151658)
    assert results == shapes_of(network)
    assert len(shapes) - len(results) == 1  # lm_head, which nothing needs
    count = sum(value.numel() for value in network.state_dict().values())
    assert count == pytest.approx(8.29e9 - 0.54e9, rel=0.01)  # Qwen2-VL-7B without lm_head


# --- preparation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (448, 448)),
        ((448, 448), (448, 448)),
        ((1024, 768), (504, 364)),
        ((300, 200), (560, 392)),
        ((200, 300), (392, 560)),
        ((37, 36), (476, 448)),
        ((640, 4), (5684, 56)),
        ((100, 1100), (140, 1512)),
        ((1333, 750), (588, 336)),
        ((2048, 2048), (448, 448)),
        ((476, 420), (504, 448)),
        ((28, 28), (448, 448)),
    ],
)
def test_sides_are_the_official_ones(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cells(*size, 448 * 448) == expected


def test_patches_are_qwens() -> None:
    image = decode(tiny.image(3, (300, 200)))
    pixels = ImageTransform(ResizeMode.AREA, 448)(image)
    assert pixels.shape == (392, 560, 3)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    expected = processor([Image.fromarray(pixels)], return_tensors="pt")
    torch.testing.assert_close(to_patches(pixels), expected["pixel_values"], atol=1e-6, rtol=0)
    assert expected["image_grid_thw"].tolist() == [[1, 392 // 14, 560 // 14]]


# --- scores --------------------------------------------------------------------------------------


def test_batches_change_nothing_and_bad_rows_are_nan(root: Path) -> None:
    panel = Panel.load({"m": spec(root)}, CPU)
    assert isinstance(panel.metrics["m"], CrossMetric)
    strip = tiny.image(1, (900, 4), "PNG")
    encoded = [*images(3), b"<html>", strip, tiny.image(0), tiny.image(0)]
    prompts = [*PROMPTS, "a", "a", "  ", "see <|image_pad|>"]
    one = panel.score(encoded, prompts, batch=1)["m"]
    many = panel.score(encoded, prompts, batch=7)["m"]
    assert np.isnan(one).tolist() == [False] * 3 + [True] * 4
    assert np.ptp(one[:3]) > 0.01
    np.testing.assert_array_equal(one, many)


def test_every_word_of_a_long_prompt_counts(root: Path) -> None:
    panel = Panel.load({"m": spec(root)}, CPU)
    long = "word " * 300
    scores = panel.score([images(1)[0]] * 2, [long + "a", long + "b"])["m"]
    assert scores[0] != scores[1]


def test_bf16_gives_fp32_scores_near_the_fp32_ones(root: Path) -> None:
    panel = Panel.load({"fp32": spec(root), "bf16": spec(root, dtype=Dtype.bf16)}, CPU)
    scores = panel.score(images(3), PROMPTS)
    assert scores["bf16"].dtype == np.float32
    gap = np.abs(scores["bf16"] - scores["fp32"]).max()
    assert 0 < gap < 0.05


# --- the instruction -----------------------------------------------------------------------------


def test_the_officials_file_is_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "data_collator_qwen.py"
    path.write_text(
        f"raise SystemExit\nINSTRUCTION = {INSTRUCTION!r}\nOTHER = '{{text_prompt}}'\n"
        f"prompt_with_special_token = {SCORED!r}\n"
    )
    assert read_template("m", path) == INSTRUCTION + SCORED


def test_instructions_without_their_places_are_refused(root: Path, tmp_path: Path) -> None:
    for text in ("no place at all", INSTRUCTION, SCORED, INSTRUCTION + SCORED + SCORED):
        (tmp_path / "template.txt").write_text(text)
        with pytest.raises(
            WeightsError, match=r"m\.template=.* must have \{text_prompt\} and <\|Re"
        ):
            read_template("m", tmp_path / "template.txt")
    with pytest.raises(WeightsError, match=r"metrics\.m\.template=.*/none\.py: no such folder"):
        resolve("m", spec(root, template="none.py"))


def test_the_instruction_is_part_of_the_settings(root: Path) -> None:
    (root / "other.txt").write_text("Well? {text_prompt} <|Reward|>")
    one, other = resolve("m", spec(root)), resolve("m", spec(root, template="other.txt"))
    assert one.settings() != other.settings()
    assert one.preprocessing["side"] == 448
    scores = Panel.load({"one": spec(root), "other": spec(root, template="other.txt")}, CPU).score(
        images(1), PROMPTS[:1]
    )
    assert scores["one"][0] != scores["other"][0]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("rm_head.5.bias"), "missing head.5.bias"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "unexpected qwen.visual.extra"),
        (
            lambda s: s.update({"model.embed_tokens.weight": torch.zeros(7, 64)}),
            r"embed_tokens.weight has shape \(7, 64\), needed is \(263, 64\)",
        ),
    ],
    ids=["missing", "unexpected", "other tokenizer"],
)
def test_other_checkpoints_are_refused(root: Path, tmp_path: Path, change: Any, says: str) -> None:
    state: dict[str, Tensor] = weights(hps_v3_shapes(QWEN_CONFIG, 263))
    change(state)
    save(tmp_path / "other", QWEN_CONFIG, state)
    given = spec(root)
    given.weights = str(tmp_path / "other")
    with pytest.raises(WeightsError, match=f"does not fit its architecture.*{says}"):
        Panel.load({"m": given}, CPU)


def test_incomplete_folders_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"metrics\.m\.tokenizer=.*none: no such folder"):
        resolve("m", spec(root, tokenizer="none"))
    shutil.copytree(root / "weights", tmp_path / "weights")
    (tmp_path / "weights" / "config.json").write_text("{}")
    given = spec(root)
    given.weights = str(tmp_path / "weights")
    with pytest.raises(WeightsError, match="describes no Qwen2-VL; it needs vision_config and tex"):
        resolve("m", given)
    bare = spec(root, weights="weights/pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"missing qwen\.language_model.* and \d+ more"):
        Panel.load({"m": bare}, CPU)
    shutil.copytree(root / "words", tmp_path / "words")
    config = tmp_path / "words" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("chat_template", "other"))
    given = spec(root)
    given.tokenizer = str(tmp_path / "words")
    with pytest.raises(WeightsError, match=r"has no chat template.*Qwen2-VL-7B-Instruct"):
        Panel.load({"m": given}, CPU)

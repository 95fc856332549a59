import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torchvision import transforms
from transformers import CLIPImageProcessorPil, CLIPModel

from data.artifacts.fingerprints import Fingerprints
from data.artifacts.schemas import Status
from data.devices import Dtype
from data.images import decode
from data.miniature import scenes, tokenizer
from data.miniature.oracle import oracle
from label.config import MetricSpec
from label.metrics.aesthetic_head import load_head
from label.metrics.preprocessing import (
    CROPS,
    ImageTransform,
    ResizeMode,
    pad_to,
    process_image,
    resize_short_side,
)
from label.metrics.protocols import CrossMetric, EmbeddingMetric, Metric
from label.metrics.registry import resolve
from label.metrics.state_dict import read_state
from label.metrics.weights import WeightsError
from label.scoring.batching import Batch, run_halving
from label.scoring.panel import Panel
from label.scoring.runner import check_compiler
from tests import helpers_label as tiny
from tests.helpers_keymap import open_clip_to_hf

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPTS = scenes.prompts("train")[:5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def specs(root: Path) -> dict[str, MetricSpec]:
    return tiny.specs(root)


@pytest.fixture(scope="module")
def panel(specs: dict[str, MetricSpec]) -> Panel:
    return Panel.load({name: specs[name] for name in tiny.VOTERS}, CPU)


def native(seed: int) -> tuple[bytes, torch.Tensor]:
    """An image that no transform has to resize, and what a backbone is fed of it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    floats = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return buffer.getvalue(), ((floats - mean) / std)[None]


# --- scores --------------------------------------------------------------------------------------


@torch.inference_mode()
def test_scores_equal_the_libraries_own(root: Path, panel: Panel) -> None:
    content, pixels = native(0)
    scores = panel.score([content], [PROMPTS[0]])
    assert scores.keys() == set(tiny.VOTERS)
    tokens = tokenizer.hf_tokenizer()(PROMPTS[0], return_tensors="pt")
    for name, scaled in (("clip", False), ("pickscore", True)):
        model = CLIPModel.from_pretrained(root / name)
        logit = model(pixel_values=pixels, **tokens).logits_per_image.item()
        expected = logit if scaled else logit / model.logit_scale.exp().item()
        assert scores[name][0] == pytest.approx(expected, abs=1e-5)
    model = tiny.random_open_clip(3)
    text = torch.zeros(1, tokenizer.CONTEXT, dtype=torch.long)
    ids = tokens.input_ids[0]
    text[0, : len(ids)] = ids  # open_clip pads with 0
    cosine = functional.cosine_similarity(model.encode_image(pixels), model.encode_text(text))
    assert scores["hps"][0] == pytest.approx(cosine.item(), abs=1e-5)
    image = CLIPModel.from_pretrained(root / "clip").get_image_features(pixels).pooler_output
    layers = [nn.Linear(*w.T.shape) for w in head_weights(root)]
    head = nn.Sequential(*layers)
    state = load_file(root / "aesthetic.safetensors")
    head.load_state_dict(
        {f"{i}.{p}": state[f"layers.{k}.{p}"] for i, k in enumerate((0, 2, 4, 6, 7))
         for p in ("weight", "bias")}
    )  # fmt: skip
    expected = head(functional.normalize(image, dim=-1)).item()
    assert scores["aesthetic"][0] == pytest.approx(expected, abs=1e-5)


def head_weights(root: Path) -> list[torch.Tensor]:
    state = load_file(root / "aesthetic.safetensors")
    return [state[f"layers.{i}.weight"] for i in (0, 2, 4, 6, 7)]


def test_open_clip_weights_in_the_hugging_face_class_give_the_same(tmp_path: Path) -> None:
    tiny.save_open_clip(tmp_path / "open", seed=5)
    tiny.save_hf(tmp_path / "hf", seed=6)
    state = open_clip_to_hf(read_state(tmp_path / "open" / "open_clip_model.safetensors"))
    save_file(state, tmp_path / "hf" / "model.safetensors")
    two = Panel.load(
        {
            "open": MetricSpec(kind="hps", weights=str(tmp_path / "open")),
            "hf": MetricSpec(kind="clip", weights=str(tmp_path / "hf")),
        },
        CPU,
    )
    open_backbone, hf_backbone = (
        m.backbone for m in two.metrics.values() if isinstance(m, EmbeddingMetric)
    )
    images = np.random.default_rng(0).random((4, tiny.SIDE, tiny.SIDE, 3), dtype=np.float32)
    for embed in ("embed_images", "embed_texts"):
        inputs = images if embed == "embed_images" else PROMPTS
        left, right = getattr(open_backbone, embed)(inputs), getattr(hf_backbone, embed)(inputs)
        assert (left - right).abs().max() <= 1e-5
    assert open_backbone.logit_scale == pytest.approx(hf_backbone.logit_scale)
    contents = [native(i)[0] for i in range(5)]  # no transform changes it
    scores = two.score(contents, PROMPTS)
    assert np.abs(scores["open"] - scores["hf"]).max() <= 1e-5
    assert np.ptp(scores["hf"]) > 0.01


def test_unknown_open_clip_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"'visual\.attn_pool\.query' is no weight"):
        open_clip_to_hf({"visual.attn_pool.query": torch.zeros(1)})


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with a C++ compiler")
def test_compiled_backbones_give_the_same_scores_up_to_rounding(
    specs: dict[str, MetricSpec], panel: Panel
) -> None:
    images = [tiny.image(i) for i in range(5)]
    compiled = Panel.load({"clip": specs["clip"]}, CPU, compiled=True)
    scores = compiled.score(images, PROMPTS[:5], batch=4)["clip"]
    expected = panel.score(images, PROMPTS[:5], batch=4)["clip"]
    assert not np.array_equal(scores, np.zeros(5))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and no-such-compiler is none"):
        check_compiler(CPU)


def test_panel_gives_one_score_a_row_and_nan_where_unreadable(panel: Panel) -> None:
    images = [tiny.image(1), b"<html>", tiny.image(1), tiny.image(2)[:99], tiny.image(3)]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    for name, scores in panel.score(images, prompts, batch=2).items():
        assert scores.dtype == np.float32
        assert np.isnan(scores).tolist() == [False, True, False, True, False]
        assert (scores[0] == scores[2]) == (name == "aesthetic")  # the only one without prompt
    assert all(len(scores) == 0 for scores in panel.score([], []).values())
    with pytest.raises(ValueError, match="shorter"):
        panel.score(images, prompts[:-1])


def test_batch_and_workers_do_not_change_scores(panel: Panel) -> None:
    images = [tiny.image(i, (30 + i, 50)) for i in range(9)]
    prompts = [PROMPTS[i % 3] for i in range(9)]
    one = panel.score(images, prompts, batch=9)
    other = panel.score(images, prompts, batch=2, workers=1)
    for name in panel.names:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=2e-6)


class CountingBackbone:
    """Counts what it embeds; an image's embedding is its mean colour."""

    logit_scale, dim = 1.0, 3

    def __init__(self) -> None:
        self.images, self.prompts = 0, []

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        self.images += len(images)
        return torch.from_numpy(images.mean((1, 2))).float() / 255

    def embed_texts(self, prompts: list[str]) -> torch.Tensor:
        self.prompts += prompts
        return torch.ones(len(prompts), 3) / 3


def test_everything_distinct_is_computed_once(
    specs: dict[str, MetricSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbones: list[CountingBackbone] = []

    def load(*_: object) -> CountingBackbone:
        backbones.append(CountingBackbone())
        return backbones[-1]

    judged = []
    monkeypatch.setattr("label.metrics.backbones.load_backbone", load)
    monkeypatch.setattr(
        "data.miniature.oracle.oracle", lambda pixels, prompt: judged.append(prompt) or 0.5
    )
    decoded = []
    monkeypatch.setattr(
        "label.metrics.preprocessing.decode", lambda c: (decoded.append(c), decode(c))[1]
    )
    again = {"clip2": specs["clip"], **{n: specs[n] for n in ("clip", "hps", "oracle")}}
    panel = Panel.load(again, CPU)
    assert len(backbones) == 2  # clip and clip2 share theirs
    images = [tiny.image(i % 3) for i in range(40)]
    prompts = [PROMPTS[i % 2] for i in range(40)]
    panel.score(images, prompts, batch=3)
    assert [tower.images for tower in backbones] == [3, 3]
    assert [tower.prompts for tower in backbones] == [[*PROMPTS[:2], PROMPTS[1]]] * 2  # filled up
    assert len(judged) == 6  # six distinct (image, prompt)
    assert (
        len(decoded) == 6
    )  # 3 for all transforms; 3 more, where only the prompt was new, for the judge


def test_clip_and_aesthetic_share_one_backbone_unless_something_differs(
    specs: dict[str, MetricSpec], panel: Panel
) -> None:
    backbones = {name: metric.backbone for name, metric in panel.metrics.items()}
    assert backbones["clip"] is backbones["aesthetic"]
    assert len({id(tower) for tower in backbones.values()}) == 3
    other = MetricSpec(kind="clip", weights=specs["clip"].weights, dtype=Dtype.bf16)
    assert resolve("x", other).backbone_key != resolve("y", specs["clip"]).backbone_key


def test_bf16_backbones_give_fp32_scores_near_the_fp32_ones(specs: dict[str, MetricSpec]) -> None:
    half = MetricSpec(kind="clip", weights=specs["clip"].weights, dtype=Dtype.bf16)
    scores = Panel.load({"fp32": specs["clip"], "bf16": half}, CPU).score(
        [tiny.image(i) for i in range(4)], PROMPTS[:4]
    )
    assert scores["bf16"].dtype == np.float32
    np.testing.assert_allclose(scores["bf16"], scores["fp32"], atol=0.05)


def test_bf16_does_not_round_the_factor_of_a_score(root: Path, tmp_path: Path) -> None:
    for name, file in (("pickscore", "model"), ("hps", "open_clip_model")):
        shutil.copytree(root / name, tmp_path / name)
        state = load_file(tmp_path / name / f"{file}.safetensors")
        state["logit_scale"] = torch.tensor(100.0).log()  # 98.9 in bf16
        save_file(state, tmp_path / name / f"{file}.safetensors")
        half = MetricSpec(kind=name, weights=str(tmp_path / name), dtype=Dtype.bf16)
        metric = Panel.load({"half": half}, CPU).metrics["half"]
        assert isinstance(metric, EmbeddingMetric)
        assert metric.backbone.logit_scale == pytest.approx(100, rel=1e-5)


def test_oracle_is_that_of_the_world(specs: dict[str, MetricSpec]) -> None:
    panel = Panel.load({"oracle": specs["oracle"]}, CPU)
    scene = scenes.parse(PROMPTS[0])
    pixels = scenes.render(scene, scenes.Look(), np.random.default_rng(0))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    scores = panel.score([buffer.getvalue()] * 3, [PROMPTS[0], PROMPTS[1], " "])["oracle"]
    assert scores[0] == pytest.approx(oracle(pixels, PROMPTS[0]))
    assert scores[0] > 0.8 > scores[1]
    assert np.isnan(scores[2])
    with pytest.raises(ValueError, match="not a prompt of the miniature world"):
        panel.score([buffer.getvalue()], ["a dog"])
    assert isinstance(panel.metrics["oracle"], CrossMetric)
    assert all(isinstance(metric, Metric) for metric in panel.metrics.values())


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    sizes = []

    def forward(part: np.ndarray) -> torch.Tensor:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return torch.from_numpy(part)

    batch = Batch(16)
    inputs = np.arange(10)
    assert run_halving(forward, inputs, batch).tolist() == inputs.tolist()
    assert sizes == [16, 8, 4, 2, 2, 2, 2, 2]  # always full: ten are filled up to sixteen
    assert batch.size == 2

    def hopeless(part: np.ndarray) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="no memory for a single image"):
        run_halving(hopeless, inputs, Batch(4))


# --- transforms ----------------------------------------------------------------------------------

SIZES = [(512, 512), (700, 513), (64, 200), (37, 36), (224, 224), (225, 448)]


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_the_pil_processor_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.open(BytesIO(tiny.image(7, size, "PNG")))
    result = ImageTransform(ResizeMode.CROP, 224)(image)
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("size", [*SIZES, (296, 200), (180, 311)])
def test_even_crop_equals_openais_transform_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.open(BytesIO(tiny.image(7, size, "PNG")))
    bicubic = transforms.InterpolationMode.BICUBIC
    official = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
    assert np.array_equal(
        ImageTransform(ResizeMode.CROP_EVEN, 224)(image), np.asarray(official(image))
    )


def test_both_ways_to_crop_share_the_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []
    monkeypatch.setattr(
        "label.metrics.preprocessing.resize_short_side",
        lambda image, side: (resized.append(side), resize_short_side(image, side))[1],
    )
    several = [ImageTransform(mode, side) for mode in CROPS for side in (8, 16)]
    processed = process_image(tiny.image(1, (40, 27)), several)
    assert sorted(resized) == [8, 16]
    image = decode(tiny.image(1, (40, 27)))
    assert all(np.array_equal(processed.arrays[one], one(image)) for one in several)


def test_dark_16_bit_images_stay_dark() -> None:
    values = np.array([[0, 255, 256], [4096, 40000, 65535]], np.uint16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    processed = process_image(buffer.getvalue(), [ImageTransform(ResizeMode.NONE)]).arrays[
        ImageTransform(ResizeMode.NONE)
    ]
    assert processed[..., 0].tolist() == [[0, 0, 1], [16, 156, 255]]
    assert np.ptp(processed, axis=-1).max() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_pad_equals_torch_on_float_tensors(size: tuple[int, int], antialias: bool) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = pad_to(pixels, 224, antialias)
    scale = 224 / max(size)
    tall, wide = round(height * scale), round(width * scale)
    floats = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    expected = functional.interpolate(floats, (tall, wide), mode="bicubic", antialias=antialias)
    top, left = (224 - tall) // 2, (224 - wide) // 2
    inside = result[top : top + tall, left : left + wide]
    np.testing.assert_allclose(inside, expected[0].permute(1, 2, 0), atol=2e-5)
    assert np.count_nonzero(result) == np.count_nonzero(inside)
    assert result.shape == (224, 224, 3)


def test_antialias_matters_and_is_part_of_the_settings(specs: dict[str, MetricSpec]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert np.abs(pad_to(pixels, 224, True) - pad_to(pixels, 224, False)).mean() > 0.01
    plain = MetricSpec(kind="hps", weights=specs["hps"].weights, antialias=False)
    on, off = resolve("a", specs["hps"]), resolve("b", plain)
    assert on.backbone_key == off.backbone_key
    assert on.settings() != off.settings()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", Status.UNREADABLE_IMAGE),
        (b"<html><body>AccessDenied</body></html>", Status.UNREADABLE_IMAGE),
        (tiny.image(1)[:-40], Status.UNREADABLE_IMAGE),
        (tiny.image(1), Status.OK),
        (tiny.image(1, kind="PNG"), Status.OK),
    ],
)
def test_images_are_sniffed_and_bad_ones_have_a_lasting_reason(
    content: bytes, status: Status
) -> None:
    processed = process_image(content, [ImageTransform(ResizeMode.CROP, 8)])
    assert processed.status is status
    assert (processed.reason == "") == (status is Status.OK)
    assert "0x" not in processed.reason  # an address would differ from run to run
    assert (processed.width, processed.height) == (
        (40, 32) if status is Status.OK else (None, None)
    )


def test_too_many_pixels_is_another_reason() -> None:
    buffer = BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="PNG")
    assert process_image(buffer.getvalue(), []).status is Status.TOO_LARGE


def test_planning_imports_no_torch() -> None:
    code = "import sys, label.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- weights -------------------------------------------------------------------------------------


def test_bare_files_load_as_folders_do(root: Path, tmp_path: Path, panel: Panel,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    shutil.copytree(root / "pickscore", tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "weights.bin")
    hps = load_file(root / "hps" / "open_clip_model.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in hps.items()}}
    torch.save(wrapped, tmp_path / "HPS_v2.1_compressed.pt")
    config = {"model_cfg": tiny.open_clip_config()}
    monkeypatch.setattr("label.metrics.hps.architecture", lambda *_: config)
    monkeypatch.setattr("label.metrics.backbones._open_clip_tokenizer", lambda _: tokenize)
    torch.save(load_file(root / "aesthetic.safetensors"), tmp_path / "head.pth")
    bare = {
        "pickscore": MetricSpec(kind="pickscore", weights=str(tmp_path / "hf" / "weights.bin")),
        "hps": MetricSpec(kind="hps", weights=str(tmp_path / "HPS_v2.1_compressed.pt")),
        "aesthetic": MetricSpec(
            kind="aesthetic", weights=str(root / "clip"), head=str(tmp_path / "head.pth")
        ),
    }
    images = [tiny.image(i) for i in range(3)]
    scores = Panel.load(bare, CPU).score(images, PROMPTS[:3])
    expected = panel.score(images, PROMPTS[:3])
    for name in bare:
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-6)


def tokenize(prompts: list[str]) -> torch.Tensor:
    result = torch.zeros(len(prompts), tokenizer.CONTEXT, dtype=torch.long)
    for row, ids in zip(result, tokenizer.hf_tokenizer()(prompts).input_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return result


def test_known_architectures_come_from_open_clip(tmp_path: Path) -> None:
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"weights")
    spec = MetricSpec(kind="hps", weights=str(tmp_path / "HPS_v2.1_compressed.pt"))
    assert resolve("hps", spec).transform == ImageTransform(ResizeMode.PAD, 224, antialias=True)
    spec.arch = "ViT-H-15"
    with pytest.raises(WeightsError, match=r"metrics\.hps\.arch=ViT-H-15 .*ViT-H-14"):
        resolve("hps", spec)


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_pickles_with_code_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"logit_scale": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        read_state(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04torn"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torn_weights_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"torn{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"torn{suffix}"):
        read_state(path)


def test_checkpoints_of_another_shape_are_refused(root: Path, tmp_path: Path) -> None:
    for name, change in {
        "missing": lambda s: s.pop("logit_scale"),
        "unexpected": lambda s: s.update(extra=torch.zeros(1)),
        "shape": lambda s: s.update({"visual_projection.weight": torch.ones(3, 3)}),
    }.items():
        folder = tmp_path / name
        shutil.copytree(root / "clip", folder)
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        spec = MetricSpec(kind="clip", weights=str(folder))
        with pytest.raises(WeightsError, match=r"does not fit its architecture.*") as error:
            Panel.load({"clip": spec}, CPU)
        expected = {"missing": "logit_scale", "unexpected": "extra", "shape": "(3, 3)"}[name]
        assert expected in str(error.value)


def test_head_of_another_backbone_or_of_other_keys_is_refused(
    specs: dict[str, MetricSpec], tmp_path: Path
) -> None:
    save_file(tiny.head_state(0, dim=99), tmp_path / "wide.safetensors")
    spec = MetricSpec(
        kind="aesthetic",
        weights=specs["clip"].weights,
        head=str(tmp_path / "wide.safetensors"),
    )
    with pytest.raises(WeightsError, match="takes embeddings of length 99"):
        Panel.load({"aesthetic": spec}, CPU)
    save_file({"linear.weight": torch.zeros(1, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"needed are layers\.\{0,2,4,6,7\}"):
        load_head(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("weights", "revision", "message"),
    [
        ("no/such/folder", None, r"metrics\.m\.weights=no/such/folder: no such folder or file"),
        (
            "openai/clip-vit-large-patch14",
            None,
            r"a hub id needs its 40-digit commit in metrics\.m\.revision",
        ),
        ("openai/clip-vit-large-patch14", "main", "give the 40-digit commit"),
        ("", None, r"\(empty\): no such folder"),
    ],
)
def test_weights_that_cannot_be_found(weights: str, revision: str | None, message: str) -> None:
    spec = MetricSpec(kind="clip", weights=weights, revision=revision)
    with pytest.raises(WeightsError, match=message):
        resolve("m", spec)


def test_hub_id_at_a_commit_is_read_from_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--clip" / "snapshots" / commit
    shutil.copytree(root / "clip", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = MetricSpec(kind="clip", weights="some/clip", revision=commit)
    resolved = resolve("m", spec)
    assert resolved.weights is not None
    assert resolved.weights.where == folder
    assert resolved.settings()["weights"] == {"hub": "some/clip", "revision": commit}
    bare = MetricSpec(kind="clip", weights="some/clip/model.safetensors", revision=commit)
    assert resolve("m", bare).backbone_key == resolved.backbone_key


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_only_the_weights_in_use_are_fetched(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[bool, str]] = []

    def download(
        _: str, *, allow_patterns: list[str], local_files_only: bool = False, **__: str
    ) -> str:
        requests.append((local_files_only, allow_patterns[-1]))
        for pattern in () if local_files_only else allow_patterns:
            for path in (tmp_path / "hub").glob(pattern):
                shutil.copy(path, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("data.storage.hub.unreachable", lambda: "")
    (tmp_path / "cache").mkdir()
    shutil.copytree(root / "clip", tmp_path / "hub")
    state = load_file(tmp_path / "hub" / "model.safetensors")
    torch.save(state, tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "hub" / "model.safetensors").rename(
        tmp_path / "hub" / "open_clip_model.safetensors"
    )
    spec = MetricSpec(kind="clip", weights="some/clip", revision=COMMIT)
    resolved = resolve("m", spec).weights
    assert resolved is not None
    assert resolved.tensors == tmp_path / "cache" / "pytorch_model.bin"
    assert not (tmp_path / "cache" / "open_clip_model.safetensors").exists()
    kinds = "model*.safetensors", "pytorch_model.bin"
    assert requests == [(offline, kind) for offline in (True, False) for kind in kinds]
    spec.kind = "hps"
    with pytest.raises(WeightsError, match=r"open_clip_config\.json is not there"):
        resolve("m", spec)
    spec.weights = "some/clip/HPS_v3.pt"
    with pytest.raises(WeightsError, match=rf"HPS_v3\.pt@{COMMIT} has no HPS_v3\.pt"):
        resolve("m", spec)


def test_tokenizer_of_another_folder(root: Path, tmp_path: Path, panel: Panel,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    shutil.copytree(root / "pickscore", tmp_path / "models--a--pick" / "snapshots" / COMMIT)
    for path in (tmp_path / "models--a--pick" / "snapshots" / COMMIT).glob("tokenizer*"):
        shutil.move(path, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = MetricSpec(kind="pickscore", weights="a/pick", revision=COMMIT)
    with pytest.raises(WeightsError, match="has no tokenizer; it needs"):
        resolve("pickscore", spec)
    spec.tokenizer = str(tmp_path)
    words = resolve("pickscore", spec).settings()["tokenizer"]
    assert words["tokenizer.json"] == Fingerprints()(tmp_path / "tokenizer.json")
    images = [tiny.image(i) for i in range(3)]
    scores = Panel.load({"pickscore": spec}, CPU).score(images, PROMPTS[:3])["pickscore"]
    np.testing.assert_array_equal(scores, panel.score(images, PROMPTS[:3])["pickscore"])


def test_incomplete_folders_are_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "clip", tmp_path / "clip")
    spec = MetricSpec(kind="clip", weights=str(tmp_path / "clip"))
    for pattern, message in [
        ("tokenizer*", "has no tokenizer"),
        ("config.json", r"config\.json is not there"),
        ("model.safetensors", r"has none of model\.safetensors"),
    ]:
        for path in [*(tmp_path / "clip").glob(pattern), *(tmp_path / "clip").glob("vocab*")]:
            path.unlink()
        with pytest.raises(WeightsError, match=message):
            resolve("clip", spec)
    (tmp_path / "weights.txt").touch()
    spec.weights = str(tmp_path / "weights.txt")
    with pytest.raises(WeightsError, match="a weights file ends in"):
        resolve("clip", spec)


def test_pinned_weights(root: Path, specs: dict[str, MetricSpec]) -> None:
    head = root / "aesthetic.safetensors"
    spec = MetricSpec(
        kind="aesthetic",
        weights=specs["clip"].weights,
        head=str(head),
        sha256=Fingerprints()(head),
    )
    resolve("aesthetic", spec).check_sha256()
    spec.sha256 = "0" * 64
    with pytest.raises(WeightsError, match=f"pinned is {'0' * 64}"):
        Panel.load({"aesthetic": spec}, CPU)


def test_fingerprints_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, memory = tmp_path / "weights.pt", tmp_path / "memory.json"
    path.write_bytes(b"one")
    first = Fingerprints(memory)(path)
    known = json.loads(memory.read_text())
    known[str(path)]["sha256"] = "remembered"
    memory.write_text(json.dumps(known))
    assert Fingerprints(memory)(path) == "remembered"
    path.write_bytes(b"other")
    assert Fingerprints(memory)(path) not in (first, "remembered")
    memory.write_text("{torn")
    assert Fingerprints(memory)(path) == Fingerprints()(path)


def test_provenance_says_what_made_the_scores(panel: Panel, root: Path) -> None:
    result = panel.provenance()
    assert result["hps"]["preprocessing"]["antialias"] is True
    assert result["clip"]["dtype"] == "fp32"
    assert result["clip"]["weights"]["model.safetensors"] == Fingerprints()(
        root / "clip" / "model.safetensors"
    )
    assert result["aesthetic"]["head"] == Fingerprints()(root / "aesthetic.safetensors")
    json.dumps(result)

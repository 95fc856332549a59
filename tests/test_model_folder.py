"""A diffusers folder is loaded whole or refused by name, in training, sampling and labelling."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.artifacts.readable import LFS_POINTER, UnreadableError, is_lfs_pointer, problem_of
from data.images import Size
from data.models.adapter import check_adapter
from data.models.fit import misfit
from data.models.folder import check_model_folder
from data.models.safetensors_header import read_header
from data.models.tokenizer import check_vocabulary
from evaluate.config import EvaluateSpec
from evaluate.plan import ComparisonPlan
from evaluate.steps import sample_models
from generate.image_files import Model, Sample
from generate.pipelines import check_model
from generate.prompts.files import Prompt
from tests.helpers_spoil import POINTER
from tests.helpers_train import SIDE, write_base, write_sdxl_base
from tests.test_spoiled_models import generator, tensors
from train.config import ModelSpec, Precision
from train.models.components import ModelComponents, load_components

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ABSENT = "is not there; fetch or copy it to this place"
PROMPTS = ["a red cat", "a blue dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def load(folder: Path) -> ModelComponents:
    return load_components(
        ModelSpec(path=str(folder), resolution=SIDE), Precision.fp32, torch.device("cpu")
    )


def encoder_of(components: ModelComponents) -> Any:
    (encoders,) = components.text.args  # type: ignore[attr-defined]
    return encoders["text_encoder"].model


def refused(folder: Path) -> str:
    """The one message of training and sampling, without the setting or name that begins it."""
    with pytest.raises(ValueError, match=r"^model\.path=") as in_training:
        load(folder)
    with pytest.raises(ValueError, match=r"^model 'ours'") as in_sampling:
        check_model(Model(name="ours", path=str(folder)))
    message = str(in_training.value).split(": ", 1)[1]
    assert str(in_sampling.value).split(": ", 1)[1] == message
    return message


def change(folder: Path, file: str, spoil) -> None:
    tensors(spoil)(folder / file)


# --- what is refused -----------------------------------------------------------------------------


def test_a_tokenizer_without_its_vocabulary_is_refused(copy: Path):
    (copy / "tokenizer/tokenizer.json").unlink()
    message = refused(copy)
    assert message == (
        f"{copy}/tokenizer has no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt"
    )


def test_a_tokenizer_without_its_settings_is_refused(copy: Path):
    """They say which token pads a prompt, and not every CLIP pads with the end token."""
    (copy / "tokenizer/tokenizer_config.json").unlink()
    assert refused(copy) == f"{copy}/tokenizer/tokenizer_config.json {ABSENT}"


def test_missing_tensors_of_a_text_encoder_are_named(copy: Path):
    def lose_a_layer(state: dict) -> dict:
        return {name: value for name, value in state.items() if "final_layer_norm" not in name}

    change(copy, TEXT, lose_a_layer)
    message = refused(copy)
    assert message.startswith(f"{copy}/{TEXT} does not fit its architecture: missing final_layer")
    assert "the file is incomplete" in message


def test_an_adapter_that_was_not_merged_is_named(copy: Path):
    def keep(state: dict) -> dict:
        return {n.replace(".to_q.", ".to_q.base_layer."): v for n, v in state.items()}

    change(copy, UNET, keep)
    message = refused(copy)
    assert ".to_q.weight" in message
    assert ".to_q.base_layer.weight" in message
    assert "an adapter was not merged" in message


@pytest.mark.parametrize(
    "file", [TEXT, UNET, VAE, "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]
)
def test_a_git_lfs_pointer_is_named(copy: Path, file: str):
    (copy / file).write_bytes(POINTER)
    assert refused(copy) == f"{copy}/{file} {LFS_POINTER}"


def test_a_text_encoder_of_another_class_is_refused(copy: Path):
    index = json.loads((copy / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"missing text_projection\.weight"):
        load(copy)


def test_another_unet_is_refused(copy: Path, tmp_path: Path):
    other = write_sdxl_base(tmp_path / "sdxl")
    shutil.copy(other / UNET, copy / UNET)
    assert "does not fit its architecture: missing" in refused(copy)


def test_all_models_are_checked_before_the_first_is_loaded(
    base: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sampling one model takes hours; the mistake in the next must not wait for them."""
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1])
    models = (Model(name="base", path=str(base)), Model(name="ours", path=str(copy)))
    plan = object.__new__(ComparisonPlan)  # of which only these are read
    for name, value in (("models", models), ("spec", EvaluateSpec()), ("size", Size(SIDE, SIDE))):
        object.__setattr__(plan, name, value)
    sample = Sample("base", Prompt(0, "a cat"), 0, tmp_path / "0.png")
    monkeypatch.setattr("evaluate.steps.sample_model", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(ValueError, match="'ours': .* damaged, incomplete or no safetensors file"):
        sample_models(plan, {"base": [sample], "ours": []}, print)


# --- what is loaded ------------------------------------------------------------------------------


def test_weights_with_the_names_of_older_libraries_are_loaded(base: Path, copy: Path):
    """SD1.5's published folder: CLIP's names begin with `text_model.`, the VAE's attention has
    `query`, `key`, `value` and `proj_attn`, and position ids are among the text encoder's."""

    def old_vae(state: dict) -> dict:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            state = {key.replace(f".{new}.", f".{name}."): v for key, v in state.items()}
        assert any(".proj_attn." in key for key in state)
        return state

    def old_text(state: dict) -> dict:
        names = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in state.items()}
        return names | {"text_model.embeddings.position_ids": torch.arange(12)[None]}

    change(copy, VAE, old_vae)
    change(copy, TEXT, old_text)
    check_model_folder(copy, "model")
    old, new = load(copy), load(base)
    for ours, theirs in ((old.vae, new.vae), (encoder_of(old), encoder_of(new))):
        wanted = theirs.state_dict()
        assert all(torch.equal(wanted[name], value) for name, value in ours.state_dict().items())


def test_without_a_limit_prompts_are_cut_at_the_text_encoders_context(base: Path, copy: Path):
    path = copy / "tokenizer/tokenizer_config.json"
    described = json.loads(path.read_text())
    del described["model_max_length"]
    path.write_text(json.dumps(described))
    long = [*PROMPTS, "a b c d e f g h i j k l m n o p q r s t u v w x y z"]
    assert torch.equal(load(copy).text(long).states, load(base).text(long).states)
    images = [generator(Model(name="m", path=str(path))) for path in (copy, base)]
    assert images[0].pipeline.tokenizer.model_max_length == 12
    first, second = (image.sample(long, [0, 1, 2]) for image in images)
    assert (first == second).all()


# --- the parts of the check ----------------------------------------------------------------------


def test_what_is_no_file_is_said(tmp_path: Path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pointer").write_bytes(POINTER)
    (tmp_path / "good").write_bytes(b"x")
    problems = {
        "absent": ABSENT, "empty": "is empty; fetch it again", "pointer": LFS_POINTER,
        "good": "",
    }  # fmt: skip
    assert {name: problem_of(tmp_path / name) for name in problems} == problems
    assert problem_of(tmp_path) == "is a folder, not a file"
    assert "git lfs pull" in LFS_POINTER
    assert is_lfs_pointer(POINTER)
    assert not is_lfs_pointer(b"version 2 of a prompt")


def test_a_header_is_read_without_the_weights(tmp_path: Path):
    state = {"a.weight": torch.ones(2, 3, dtype=torch.bfloat16), "a.bias": torch.zeros(4)}
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in header.items()} == {
        "a.weight": ("BF16", (2, 3)),
        "a.bias": ("F32", (4,)),
    }
    assert misfit(header, state) == ""
    assert misfit(state, header) == ""


def test_an_interrupted_download_of_the_right_size_is_noticed(base: Path, tmp_path: Path):
    """Some programs reserve the file at first; what has not arrived is zeros."""
    path = tmp_path / "hole.safetensors"
    content = bytearray((base / UNET).read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    assert load_file(path)  # the library sees nothing
    with pytest.raises(UnreadableError, match="nothing but zeros in .* more; its download"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("module.a.weight", "remove 'module.' from its names"),
        ("_orig_mod.a.weight", "remove '_orig_mod.' from its names"),
        ("a.base_layer.weight", "an adapter was not merged"),
    ],
)
def test_a_likely_reason_is_given(name: str, hint: str):
    assert hint in misfit({name: torch.ones(1)}, {"a.weight": torch.ones(1)})


def test_merges_that_lack_some_are_refused(tmp_path: Path):
    """With the whole vocabulary and half of its merges, words would fall into letters."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "t</w>": 1, "at</w>": 2, "<e>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    check_vocabulary(tmp_path, "m")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UnreadableError, match=r"m: .*merges\.txt has no merge that makes at</w>"):
        check_vocabulary(tmp_path, "m")


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("unet.a.lora_{}.weight", ("A", "B")),
        ("unet.a.lora.{}.weight", ("down", "up")),
        ("lora_unet_down_blocks_0_to_q.lora_{}.weight", ("down", "up")),
        ("unet.a.processor.to_q_lora.{}.weight", ("down", "up")),
        ("text_encoder.q_proj.lora_linear_layer.{}.weight", ("down", "up")),
    ],
)
def test_all_spellings_of_lora_are_known(tmp_path: Path, name: str, ends: tuple[str, str]):
    path, names = tmp_path / "lora.safetensors", [name.format(end) for end in ends]
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    check_adapter(path, "m")
    for name in names:
        save_file({name: torch.zeros(2, 2)}, path)
        with pytest.raises(UnreadableError, match="only one of a layer's two|has no LoRA weights"):
            check_adapter(path, "m")

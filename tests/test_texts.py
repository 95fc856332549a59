"""Prompts encoded once, in stage one, are what the trainer would have encoded in every step."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from data.artifacts.atomic import ShardError, sha256_of
from data.artifacts.manifest import verify
from data.artifacts.parquet_io import read_table, write_table
from data.artifacts.schemas import PAIR_FACTS
from data.artifacts.texts import TextSet, read_set
from data.distributed import Rank
from data.families.text import find_text
from data.models.family import ModelError
from label.scoring import text_files as files_module
from label.scoring import text_writer
from label.scoring.score_sets import FACTS
from tests.helpers_flow import write_flux, write_qwen_image, write_sana, write_sd3, write_z_image
from tests.helpers_label import hashes
from tests.helpers_texts import CPU, sets_of, text_files, write_as, write_texts
from tests.helpers_train import SIDE, SQUARE, write_base, write_labels, write_pairs, write_sdxl_base
from tests.test_components import pair_batch
from train.config import CacheUse, ModelSpec, Precision
from train.dpo.draws import DrawRule
from train.dpo.objectives import dpo
from train.dpo.step import BatchWithNoise, Models, prefetch_noise, step
from train.loader import text_source
from train.loader.source_choice import choose_texts
from train.loader.text_source import CachedTexts, open_texts
from train.models.components import ModelComponents, load_components

pytestmark = pytest.mark.usefixtures("one_thread")

BASES = {
    "sd": write_base,
    "sdxl": write_sdxl_base,
    "sd3": write_sd3,
    "sd3_without_t5": lambda folder: write_sd3(folder, t5=False, dual=False),
    "flux": write_flux,
    "z_image": write_z_image,
    "sana": write_sana,
    "qwen_image": write_qwen_image,
}
PROMPTS = ("", "a red cat", "a green cat", "a blue cat", "a grey cat")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pairs, and the facts that the scoring pass learns of them."""
    root = tmp_path_factory.mktemp("texts")
    for name, write in BASES.items():
        write(root / name)
    write_pairs(root / "pairs")
    write_labels(root / "labels", root / "pairs")
    sets = sets_of(root)
    for shard in sets.shards:
        labels = read_table(root / "labels" / f"part-{shard.index:05d}.parquet")
        rows = labels.select(PAIR_FACTS.names).to_pylist()
        rows[2] |= {"prompt": " ", "status": "empty_prompt"}
        rows[3] |= {"prompt": "a torn image", "status": "unreadable_image"}
        write_table(sets.path(FACTS, shard), pa.Table.from_pylist(rows, PAIR_FACTS))
    return root


@pytest.fixture(scope="module")
def flux_texts(root: Path) -> TextSet:
    return write_texts(text_files(root, root / "flux", root / "texts"))


def load(
    root: Path,
    name: str,
    texts: CachedTexts | None = None,
    precision: Precision = Precision.fp32,
    *,
    with_vae: bool = False,
) -> ModelComponents:
    spec = ModelSpec(path=str(root / name), resolution=SIDE)
    return load_components(spec, precision, CPU, texts=texts, with_vae=with_vae)


@pytest.mark.parametrize("name", BASES)
def test_texts_are_what_the_encoders_say(root: Path, tmp_path: Path, name: str):
    """To the bit, states and pooled form, of the prompts of good pairs and of the empty one."""
    texts = write_texts(text_files(root, root / name, tmp_path))
    verify(texts.folder, texts.manifest)
    cached = open_texts(texts, PROMPTS, [])
    assert tuple(cached.rows) == PROMPTS
    wanted = [PROMPTS[at] for at in (3, 0, 1, 3, 4)]
    ours = load(root, name, cached).condition(wanted, torch.full((5, 2, 2), SIDE), SQUARE)
    theirs = load(root, name).condition(wanted, torch.full((5, 2, 2), SIDE), SQUARE)
    assert torch.equal(ours.states, theirs.states)
    assert ours.lengths == theirs.lengths
    assert (ours.added or {}).keys() == (theirs.added or {}).keys()
    for key, value in (theirs.added or {}).items():
        assert torch.equal(ours.added[key], value), key
    if name == "sd3_without_t5":  # nearly all of its states are zeros
        size = sum(file.bytes for file in texts.manifest.files)
        assert size < 0.3 * len(PROMPTS) * sum(texts.shape.num_bytes("fp32"))


def noised(components: ModelComponents, texts: CachedTexts | None) -> BatchWithNoise:
    rule = DrawRule(
        seed=0, num_timesteps=1000, latent_shape=components.latent_shape, caption_dropout=0.5
    )
    return next(prefetch_noise(iter([pair_batch()]), rule, CPU, texts))


def losses(components: ModelComponents, texts: CachedTexts | None) -> torch.Tensor:
    """Of a policy that is not the reference."""
    policy, reference = components.denoiser(), components.denoiser()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        batch = noised(components, texts)
        assert (batch.text is None) == (texts is None)
        assert set(batch.draws.drop_caption.tolist()) == {False, True}
        return step(batch, Models(components, policy, reference), dpo(500.0)).losses


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_step_loses_nothing(
    root: Path, flux_texts: TextSet, tmp_path: Path, precision: Precision
):
    """Equal losses, to the bit: in fp32, and in bf16 where the texts were computed in it, too."""
    texts = flux_texts
    if precision is Precision.bf16:
        change = {"dtype": "bf16", "compute": "bf16"}
        texts = write_texts(text_files(root, root / "flux", tmp_path, **change))
    cached = open_texts(texts, PROMPTS, [])
    from_texts, plain = (
        load(root, "flux", cached, precision, with_vae=True),
        load(root, "flux", None, precision, with_vae=True),
    )
    assert from_texts.frozen_bytes == sum(p.nbytes for p in plain.vae.parameters())
    assert plain.frozen_bytes > from_texts.frozen_bytes
    assert torch.equal(losses(from_texts, cached), losses(plain, None))


def test_numbers_are_rounded_as_the_format_says(root: Path, flux_texts: TextSet, tmp_path: Path):
    rough = write_texts(text_files(root, root / "flux", tmp_path, dtype="bf16"))
    exact, rounded = (open_texts(texts, PROMPTS, [])(PROMPTS) for texts in (flux_texts, rough))
    assert rounded.states.dtype is torch.bfloat16
    assert torch.equal(rounded.states, exact.states.bfloat16())
    assert str(rough) == "512x40 + 16 bf16, 40 KiB a prompt"


def test_ranks_and_interruptions_leave_the_same_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (files_module, text_writer, text_source):
        monkeypatch.setattr(module, "PART_PROMPTS", 2)
    alone, shared = (text_files(root, root / "sd", tmp_path / name) for name in ("one", "two"))
    texts = write_texts(alone)
    assert [file.rows for file in texts.manifest.files] == [5, 2, 2, 1]
    write_as(shared, Rank(1, 2))  # as the first of two was killed, it does all
    shared.path(0).unlink()
    kept = shared.path(2).stat().st_mtime_ns
    write_as(shared, Rank(0, 2))
    shared.declare_complete({}, since=0.0)
    assert shared.path(2).stat().st_mtime_ns == kept
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert open_texts(texts, PROMPTS, [])(PROMPTS[4:]).states.shape == (1, 12, 16)
    second = shared.path(1).rename(tmp_path / "second")
    shared.path(0).rename(shared.path(1))
    second.rename(shared.path(0))
    with pytest.raises(ShardError, match="part-00001.parquet has other prompts than prompts.parq"):
        open_texts(replace(texts, folder=shared.folder), PROMPTS, [])(PROMPTS[2:3])
    other = replace(shared, form=replace(shared.form, dtype="bf16"))
    with pytest.raises(ShardError, match="dtype: found fp32, now bf16"):
        other.is_complete()
    with pytest.raises(ShardError, match=r"part-00000.parquet was .*dtype: found fp32, now bf16"):
        other.absent()


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = text_files(root, root / "flux", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ShardError, match=r"0.0 GiB free, and 0.0 of its 5 prompts of about \d\d"):
        write_as(files, Rank())
    assert not files.path(0).exists()


def test_numbers_that_are_not_finite_are_refused_by_their_prompt(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def overflow(encoder: text_writer.PromptEncoder, prompts: list[str]) -> Any:
        embeds = encode(encoder, prompts)
        states = embeds.states.clone()
        states[[prompt == "a blue cat" for prompt in prompts], 1, 1] = torch.inf
        return replace(embeds, states=states)

    encode = text_writer.PromptEncoder.encode
    monkeypatch.setattr(text_writer.PromptEncoder, "encode", overflow)
    files = text_files(root, root / "sd", tmp_path)
    with pytest.raises(ValueError, match="not finite in fp32 .* prompt 'a blue cat'; set label.te"):
        write_as(files, Rank())
    assert not files.path(0).exists()


# --- what the trainer takes ----------------------------------------------------------------------


def choose(root: Path, use: CacheUse = CacheUse.auto, begun: Any = None, model: str = "flux"):
    folder = root / "texts"
    return choose_texts(use, folder, root / model, lambda path: str(path.stat().st_size), begun)


def test_the_set_of_the_models_own_encoders_is_taken(
    root: Path, flux_texts: TextSet, tmp_path: Path
):
    hashed = choose_texts(CacheUse.auto, root / "texts", root / "flux", sha256_of, None)
    assert hashed.texts == flux_texts
    assert hashed.description == f"prompts: texts in {flux_texts.folder} ({flux_texts})"
    assert hashed.settings == {"identity": flux_texts.manifest.identity, "dtype": "fp32"}
    other = choose(root)  # the same files with other hashes
    assert other.texts is None
    assert f"has {flux_texts.folder.name}, but this model's text encoders are flux-" in (
        other.description
    )
    with pytest.raises(ShardError, match="train.texts=always, but .* `make labels ARGS=texts=mod"):
        choose(root, CacheUse.always)
    with pytest.raises(ShardError, match="this run began with texts, but"):
        choose(root, begun={"texts": {"identity": "x"}})
    for use, begun, why in (
        (CacheUse.never, None, "every step (train.texts=never)"),
        (CacheUse.auto, {}, "every step, as this run began"),
    ):
        assert choose(root, use, begun).description.endswith(why)
    assert "there are no texts in" in choose(tmp_path, model=str(root / "flux")).description


@pytest.mark.parametrize("file", ["text_encoder_2/config.json", "tokenizer/tokenizer.json"])
def test_other_encoders_or_words_are_another_set(root: Path, tmp_path: Path, file: str):
    before = find_text(root / "flux").sha256
    copy = Path(shutil.copytree(root / "flux", tmp_path / "m"))
    assert find_text(copy).sha256 == before
    (copy / file).write_text((copy / file).read_text() + "\n")
    assert find_text(copy).sha256 != before
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("T5EncoderModel", "UMT5EncoderModel"))
    with pytest.raises(ModelError, match="text_encoder_2=.*UMT5.*; a FluxPipeline has a T5Enco"):
        find_text(copy)
    shutil.copy(root / "flux/model_index.json", index)
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ValueError, match="has no folder 'text_encoder_2', which encodes its pr"):
        find_text(copy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "part-00000.parquet").unlink(), "part-00000.parquet is missing"),
        (lambda folder: cut(folder / "part-00000.parquet"), "00000.parquet has another size than"),
        (lambda folder: turn(folder / "prompts.parquet"), "prompts.parquet was changed; delete"),
        (lambda folder: turn(folder / "part-00000.parquet"), "part-00000.parquet cannot be read"),
    ],
)
def test_damage_is_named(flux_texts: TextSet, tmp_path: Path, spoil: Any, message: str):
    folder = Path(shutil.copytree(flux_texts.folder, tmp_path / flux_texts.folder.name))
    spoil(folder)
    with pytest.raises(ShardError, match=f"{message}.*train.texts=never"):
        open_texts(replace(flux_texts, folder=folder), PROMPTS, [])(PROMPTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def turn(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def test_prompts_that_a_set_lacks_are_named(flux_texts: TextSet):
    with pytest.raises(ShardError, match="lacks the prompt 'a dog'; delete .* or set train.texts="):
        open_texts(flux_texts, ["a red cat", "a dog"], [])
    with pytest.raises(ShardError, match="'a dog'; train.samples.prompts must be prompts of the l"):
        open_texts(flux_texts, ["a red cat"], ["a dog"])


def test_a_manifest_that_contradicts_itself_is_refused(flux_texts: TextSet, tmp_path: Path):
    folder = Path(shutil.copytree(flux_texts.folder, tmp_path / flux_texts.folder.name))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pooled": 16', '"pooled": -1'))
    with pytest.raises(ShardError, match="has texts that cannot be used: .* pooled=-1"):
        read_set(folder)

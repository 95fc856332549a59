"""LoRA files of diffusers and of kohya's programs: written, and as the start of a training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, safe_open, save_file

from data.models.adapter import ADAPTER
from tests.helpers_flow import write_flux
from tests.helpers_ranks import shared_place
from tests.helpers_train import opened, write_base, write_sdxl_base
from tests.test_checkpoint import copy_run, same_journals
from tests.test_components import published_unet
from tests.test_lora import load, predict, train_a_little, trained
from train.config import LoraSpec, ReferenceSpec, Refresh, TrainSpec
from train.export.ldm_names import unet_names
from train.export.pipeline import KOHYA, export_adapter
from train.models.base_model import BaseModel
from train.models.lora import as_reference, attach, in_diffusers_format
from train.models.lora_start import follow_start, load_start, read_start
from train.models.memory import ParameterCounts, estimate_memory

Weights = dict[str, torch.Tensor]


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_original_names_are_those_that_diffusers_reads(name: str):
    """Of every tensor of the published UNets: diffusers' own translation leads back."""
    unet = published_unet(name)
    parameters = [parameter for parameter, _ in unet.named_parameters()]
    names = unet_names({parameter.rpartition(".")[0] for parameter in parameters}, 2)
    original = {
        f"model.diffusion_model.{names[layer]}.{end}": parameter
        for parameter in parameters
        for layer, _, end in [parameter.rpartition(".")]
    }
    back = convert_ldm_unet_checkpoint(original, unet.config)
    assert back == {parameter: parameter for parameter in parameters}
    if name == "sdxl":
        layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
        assert names[layer] == "input_blocks.4.1.transformer_blocks.1.attn2.to_k"


# --- as a start ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sd": opened(write_base(root / "sd")),
        "sdxl": opened(write_sdxl_base(root / "sdxl")),
    }


@pytest.fixture(scope="module")
def exported(
    bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, torch.Tensor]]:
    """The folder of a trained adapter of each base, and what the base predicts with it."""
    folders = {}
    for name, base in bases.items():
        unet, spec = load(base.folder), LoraSpec(rank=4, alpha=2.0)
        attach(unet, spec, seed=7, with_reference=False)
        train_a_little(unet)
        folder = tmp_path_factory.mktemp("adapters") / name
        adapter = in_diffusers_format(trained(unet), spec.scale, "unet")
        export_adapter(base, adapter, folder, {"step": 1}, "a card")
        with torch.no_grad():
            folders[name] = folder, predicted(base, unet)
    return folders


def predicted(base: BaseModel, unet: torch.nn.Module) -> torch.Tensor:
    if base.family.name == "sd1":
        return predict(unet)
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    added = {"text_embeds": torch.ones(2, 12), "time_ids": torch.ones(2, 6)}
    return unet(noisy, torch.tensor([10, 700]), torch.ones(2, 12, 40), added_cond_kwargs=added,
                return_dict=False)[0]  # fmt: skip


def with_alpha(folder: Path, target: Path) -> Path:
    """kohya's file with an alpha of half its rank, and twice the second matrix: the same."""
    tensors = load_file(folder / KOHYA)
    for name, tensor in tensors.items():
        tensors[name] = tensor * (2 if ".lora_up." in name else 0.5 if "alpha" in name else 1)
    save_file(tensors, target)
    return target


@pytest.mark.parametrize(
    ("name", "form"),
    [("sd", "diffusers"), ("sd", "folder"), ("sd", "alpha"), ("sdxl", "kohya"), ("sdxl", "alpha")],
)
@torch.no_grad()
def test_policy_and_frozen_reference_start_as_the_file(
    bases: dict[str, BaseModel],
    exported: dict[str, tuple[Path, torch.Tensor]],
    tmp_path: Path,
    name: str,
    form: str,
):
    (folder, expected), base = exported[name], bases[name]
    path = folder if form == "folder" else folder / {"diffusers": ADAPTER}.get(form, KOHYA)
    if form == "alpha":
        path = with_alpha(folder, tmp_path / "mine.safetensors")
    spec = follow_start(LoraSpec(rank=None, start=str(path)), base)
    assert (spec.rank, spec.alpha) == (4, 2.0 if form == "alpha" else 4.0)
    unet = load(base.folder)
    attach(unet, spec, seed=0, with_reference=True)
    load_start(unet, read_start(base, spec))
    torch.testing.assert_close(predicted(base, unet), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(predicted(base, as_reference(unet)), predicted(base, unet))


def test_layers_that_are_no_attentions_start_too(bases: dict[str, BaseModel], tmp_path: Path):
    base, spec = bases["sdxl"], LoraSpec(rank=2, targets=["conv1", "proj_in", "conv", "linear_1"])
    unet = load(base.folder)
    attach(unet, spec, seed=7, with_reference=False)
    train_a_little(unet)
    adapter = in_diffusers_format(trained(unet), 1.0, "unet")
    export_adapter(base, adapter, tmp_path / "lora", {"step": 1}, "a card")
    for file in (ADAPTER, KOHYA):
        start = LoraSpec(rank=None, start=str(tmp_path / "lora" / file))
        matrices = read_start(base, follow_start(start, base)).matrices
        assert matrices.keys() == {name.removeprefix("unet.") for name in adapter}
        assert all(torch.equal(matrices[name.removeprefix("unet.")], adapter[name])
                   for name in adapter)  # fmt: skip


def test_an_adapter_of_a_transformer_starts(tmp_path: Path):
    base = opened(write_flux(tmp_path / "flux"))
    denoiser = FluxTransformer2DModel.from_pretrained(base.folder, subfolder="transformer")
    spec = LoraSpec(rank=2, targets=list(base.family.lora_targets))
    attach(denoiser, spec, seed=7, with_reference=False)
    train_a_little(denoiser)
    adapter = in_diffusers_format(trained(denoiser), 1.0, "transformer")
    export_adapter(base, adapter, tmp_path / "lora", {"step": 1}, "a card")
    start = follow_start(LoraSpec(rank=None, start=str(tmp_path / "lora")), base)
    denoiser = FluxTransformer2DModel.from_pretrained(base.folder, subfolder="transformer")
    attach(denoiser, start, seed=1, with_reference=False)
    load_start(denoiser, read_start(base, start))
    again = in_diffusers_format(trained(denoiser), start.scale, "transformer")
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], weight) for name, weight in adapter.items())


def test_kohyas_file_says_what_it_is(exported: dict[str, tuple[Path, torch.Tensor]]):
    for name, version in (("sd", "sd_v1"), ("sdxl", "sdxl_base_v1-0")):
        with safe_open(exported[name][0] / KOHYA, framework="pt") as file:
            assert file.metadata()["ss_network_dim"] == "4"
            assert file.metadata()["ss_base_model_version"] == version
            starts = {key.split("_blocks_")[0] for key in file.keys()}  # noqa: SIM118
    assert {"lora_unet_input", "lora_unet_output"} <= starts  # SDXL's, as kohya's UNet has them


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): t for name, t in weights.items()}


def first_only(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Callable:
    """Change both matrices of the first layer."""

    def apply(weights: Weights) -> Weights:
        layer = min(weights).partition(".lora_")[0]
        return dict(change(n, t) if n.startswith(f"{layer}.") else (n, t)
                    for n, t in weights.items())  # fmt: skip

    return apply


def halved(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, (tensor[:2] if ".lora_A." in name else tensor[:, :2]).contiguous()


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (dict, {"rank": 8}, r"has rank 4, but train\.lora\.rank=8; set that to 4, or to null"),
        (dict, {"alpha": 1.0}, r"has alpha 4, but train\.lora\.alpha=1; set that to 4"),
        (dict, {"targets": ["to_q"]}, r"unexpected .*to_k.*train\.lora\.targets, which null"),
        (dict, {"targets": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]}, "missing .*proj_in"),
        (first_only(lambda n, t: (n.replace("unet.", "text_encoder."), t)), {},
         "has weights for other parts than the unet, such as text_encoder"),
        (renamed("attentions.0", "attentions.7"), {}, r"attentions\.7.* which .* has not; give"),
        (first_only(halved), {}, "has layers of rank 2, 4; a training has one rank"),
        (lambda w: w | {f"{min(w).partition('.lora_')[0]}.lora_magnitude_vector": torch.ones(16)},
         {}, r"lora_magnitude_vector, which are no matrices of a LoRA"),
        (lambda w: {n: t[:, :8].contiguous() if ".lora_A." in n else t for n, t in w.items()}, {},
         r"has shape \(4, 8\), needed is \(4, 16\)"),
    ],
    ids=["rank", "alpha", "fewer", "more", "text", "layer", "ranks", "dora", "shape"],
)  # fmt: skip
def test_a_file_is_taken_whole_or_refused(
    bases: dict[str, BaseModel],
    exported: dict[str, tuple[Path, torch.Tensor]],
    tmp_path: Path,
    change: Callable[[Weights], Weights],
    settings: dict,
    says: str,
):
    path = tmp_path / "mine.safetensors"
    save_file(change(load_file(exported["sd"][0] / ADAPTER)), path)
    with pytest.raises(ValueError, match=rf"train\.lora\.start=.*{says}"):
        follow_start(LoraSpec(**{"rank": None, "start": str(path)} | settings), bases["sd"])


def test_metadata_that_makes_another_adapter_is_refused(
    bases: dict[str, BaseModel], exported: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
):
    weights, path = load_file(exported["sd"][0] / ADAPTER), tmp_path / "mine.safetensors"
    for settings, says in (({"unet.use_rslora": True}, "use_rslora=True"), ({}, "")):
        metadata = {"unet.r": 4, "unet.lora_alpha": 8} | settings
        save_file(weights, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
        spec = LoraSpec(rank=None, start=str(path))
        if says:
            with pytest.raises(ValueError, match=says):
                follow_start(spec, bases["sd"])
        else:
            assert follow_start(spec, bases["sd"]).scale == 2.0


def test_settings_without_an_adapter_refuse_a_start():
    with pytest.raises(ValueError, match=r"train\.lora\.rank=0 trains all weights.*tuning=lora"):
        LoraSpec(start="mine.safetensors")
    assert LoraSpec(rank=None).rank == 16


def test_a_frozen_reference_that_is_not_the_base_is_counted():
    counts = ParameterCounts(denoiser=1000, adapter=10)
    frozen = ReferenceSpec(refresh=Refresh.frozen)
    for start, size in ((None, 0), ("mine.safetensors", 20)):
        spec = TrainSpec(lora=LoraSpec(rank=2, start=start), reference=frozen)
        assert estimate_memory(counts, spec, 1).reference == size


@pytest.mark.ranks
def test_a_run_starts_from_an_adapter_and_resumes(
    exported: dict[str, tuple[Path, torch.Tensor]],
):
    """Policy and frozen reference agree at first; with the same bits after an interruption."""
    place, start = shared_place(), exported["sd"][0]
    more = ("tuning=lora", f"train.lora.start={start}", "reference=frozen", "train.steps=4")
    place.train("started", *more)
    journal = place.journal("started")
    assert [line["margin"] == 0 for line in journal] == [True, False, False, False]
    again = copy_run(place, "started", "started-again", "step-0000004", "lora")
    place.train("started-again", *more)
    same_journals(place, "started", "started-again")
    before, one, two = (
        load_file(folder / ADAPTER)
        for folder in (start, place.folder("started") / "lora", again / "lora")
    )
    assert before.keys() == one.keys()
    for name, weight in one.items():
        assert torch.equal(two[name], weight)
        assert not torch.equal(before[name], weight)
        assert (before[name] - weight).abs().max() < 0.02
    assert f"LoRA of rank 4, from the adapter `{start}`" in (again / "lora/README.md").read_text()
    changed = load_file(start / ADAPTER)
    other = start.with_name("other.safetensors")
    save_file({name: 2 * tensor for name, tensor in changed.items()}, other)
    output = place.fail("started", "tuning=lora", f"train.lora.start={other}", *more[2:])
    assert "was made with other settings (train.lora.start: found" in output

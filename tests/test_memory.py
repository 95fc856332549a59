"""The counted memory is what DeepSpeed holds; a refresh takes no more."""

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import presets
from benchmarks.activations import COUNTED
from tests.helpers_ranks import ROOT, run_ranks
from tests.test_components import PUBLISHED as UNETS
from train.config import (
    ActivationCheckpointing,
    LoraSpec,
    Objective,
    ObjectiveSpec,
    Offload,
    OptimizerKind,
    OptimizerSpec,
    Precision,
    Quantize,
    ReferenceSpec,
    Refresh,
    TrainSpec,
    ZeroSpec,
)
from train.distributed.deepspeed_engine import Policy, release
from train.distributed.policy_average import make_average
from train.distributed.world import start
from train.dpo.reference import make_reference
from train.models.lora import attach, counts
from train.models.memory import (
    ADAPTERS,
    FP32_VAES,
    GIB,
    PUBLISHED,
    ParameterCounts,
    estimate_memory,
    published,
    published_table,
)
from train.models.quantized import quantize

CASES = [
    (0, "fp32", 0), (0, "bf16", 0), (1, "fp32", 0), (1, "bf16", 0), (2, "fp32", 0), (2, "bf16", 0),
    (3, "fp32", 0), (3, "bf16", 0), (2, "bf16", 8), (3, "fp32", 8), (2, "bf16", 0, "optimizer"),
    (3, "bf16", 0, "parameters"), (0, "bf16", 0, "none", "adafactor"), (2, "bf16", 8, "int8"),
]  # fmt: skip
"""ZeRO stage, precision, rank of LoRA, and what is offloaded or how the base is stored, and the
optimizer, if another."""


def spec_of(
    world: int, stage: int, precision: str, rank: int, offload: str = "none", kind: str = "adamw"
) -> TrainSpec:
    micro_batches = 1 if (stage, precision) == (0, "bf16") else 2
    return TrainSpec(
        steps=4, batch=micro_batches * world, micro_batch=1, precision=Precision(precision),
        zero=ZeroSpec(stage=stage, offload=Offload(offload.replace("int8", "none"))),
        lora=LoraSpec(rank=rank),
        optimizer=OptimizerSpec(kind=OptimizerKind(kind)), device="cpu",
        reference=ReferenceSpec(refresh=Refresh.snapshot, every=1), ema=0.9 if stage else 0.0,
    )  # fmt: skip


def small_unet(
    widths: tuple[int, ...], precision: str, *, in_8_bits: bool = False
) -> torch.nn.Module:
    """One block down and up of each width; a single one has nothing between them."""
    from diffusers import UNet2DConditionModel as UNet

    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, block_out_channels=widths, layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:len(widths)],
        mid_block_type="UNetMidBlock2DCrossAttn" if len(widths) > 1 else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[:len(widths)],
        cross_attention_dim=64, attention_head_dim=8,
    ).to(torch.bfloat16 if precision == "bf16" else torch.float32).eval()  # fmt: skip
    if in_8_bits:
        quantize(unet, Quantize.int8, torch.device("cpu"))
    return unet


def backward_passes(policy: Policy, spec: TrainSpec, world: int) -> Iterator[None]:
    """The gradients of one batch; stops after each micro-batch."""
    dtype = torch.bfloat16 if spec.precision is Precision.bf16 else torch.float32
    for left in reversed(range(spec.batch // world)):
        noisy, states = torch.randn(1, 4, 8, 8).to(dtype), torch.randn(1, 5, 64).to(dtype)
        predicted = policy(
            noisy, torch.tensor([5]), encoder_hidden_states=states, return_dict=False
        )[0]
        policy.backward(predicted.float().pow(2).mean())
        yield
        if left:
            policy.next_micro_batch()


def storages() -> dict[int, int]:
    """Bytes of everything that tensors hold in this process, by address."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and (storage := tensor.untyped_storage()).data_ptr():
                    storages[storage.data_ptr()] = storage.nbytes()
    return storages


def counted_is_held() -> None:
    """After a step, while the next one's gradients come: within 2 % of the count."""
    world, ratios = start("cpu"), {}
    gc.freeze()  # what is there by now is not looked at again and again
    for case in CASES:
        (stage, precision, rank), before = case[:3], storages()
        spec = spec_of(world.world_size, *case)
        widths = (96,) if stage == 3 else (48, 96)  # stage 3 takes long for each layer
        unet = small_unet(widths, precision, in_8_bits="int8" in case)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        if rank:
            attach(unet, spec.lora, 0, with_reference=True)
        count, largest = counts(unet), max(p.numel() for p in unet.parameters())
        policy = Policy(unet, spec, world)
        average = make_average(policy, spec.ema)
        del unet
        adapter = sum(getattr(p, "ds_numel", p.numel()) for p in policy.trained.values())
        reference = make_reference(lambda: small_unet(widths, precision), policy, spec, world)  # noqa: B023
        for _ in backward_passes(policy, spec, world.world_size):
            pass
        policy.optimizer_step(1e-4)
        peak = 0
        for _ in backward_passes(policy, spec, world.world_size):
            for engine in (policy.engine, reference.engine):
                if stage == 3 and engine is not None:
                    release(engine)  # layers this small stay gathered; real ones do not
            world.barrier()  # nothing is in flight any more
            now = sum(size for address, size in storages().items() if address not in before)
            peak = max(peak, now)
        expected = estimate_memory(
            replace(count, denoiser=parameters, adapter=adapter if rank else 0),
            spec,
            world.world_size,
        )
        staged = 4 * largest if spec.zero.offload is Offload.optimizer else 0  # on either side
        ratios[case] = peak / (expected.total + expected.offloaded + staged)
        del policy, reference, average, engine
    assert ratios == dict.fromkeys(CASES, pytest.approx(1, rel=0.02)), ratios
    world.barrier()


@pytest.mark.ranks
@pytest.mark.slow
def test_counted_is_held(tmp_path: Path):
    run_ranks(tmp_path, 2, counted_is_held)


# --- a refresh -----------------------------------------------------------------------------------


def peak(path: Path = Path("/proc/self/status")) -> int:
    """Most bytes of memory that this process ever had, since `forget`."""
    match = re.search(r"VmHWM:\s+(\d+) kB", path.read_text())
    assert match
    return int(match.group(1)) << 10


def forget() -> int:
    """Begin to look for the peak anew; what the process has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def only_the_export_gathers() -> None:
    """Under stage 3, 40 MB on two ranks: a refresh takes below a twentieth of it. The export's
    weights take most of it on the first rank, which keeps them, and next to nothing on others."""
    world = start("cpu")
    spec = spec_of(world.world_size, 3, "fp32", 0)
    policy = Policy(small_unet((112, 224), "fp32"), spec, world)
    reference = make_reference(lambda: small_unet((112, 224), "fp32"), policy, spec, world)
    size = sum(4 * p.ds_numel for p in policy.trained.values())
    assert size > 36e6
    reference.refresh(policy)
    now = forget()
    reference.refresh(policy)
    taken = peak() - now
    now = forget()
    kept = policy.gather_fp32_state_dict()
    gathered = peak() - now
    assert taken < 0.05 * size, (taken, size)
    if world.rank == 0:
        assert len(kept) == len(policy.trained)
        assert 0.4 * size < gathered < 1.2 * size, (gathered, size)
    else:
        assert not kept
        assert gathered < 0.2 * size, (gathered, size)
    world.barrier()


@pytest.mark.ranks
def test_only_the_export_gathers(tmp_path: Path):
    run_ranks(tmp_path, 2, only_the_export_gathers)


# --- the count itself ----------------------------------------------------------------------------


def test_counts_of_the_published_models():
    names = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL"}
    for name, (_, parameters) in UNETS.items():
        assert PUBLISHED[names[name]].denoiser == parameters


def test_sd15_on_one_gpu_by_hand():
    """bf16, ZeRO-2: 2 bytes of policy, 4 of gradients, 12 of optimizer and 2 of reference for each
    of 859.5 million weights."""
    spec = TrainSpec(precision=Precision.bf16, zero=ZeroSpec(stage=2))
    whole = estimate_memory(PUBLISHED["SD1.5"], spec, 1)
    assert whole.total == 20 * 859_520_964 + 2 * (123_060_480 + 83_653_863)
    assert "16.39 GiB a process without activations, counted (policy 1.60, grad" in str(whole)


def test_what_is_offloaded_is_counted_apart():
    size = PUBLISHED["SD1.5"].denoiser
    spec = TrainSpec(zero=ZeroSpec(stage=2, offload=Offload.optimizer))
    estimate = estimate_memory(PUBLISHED["SD1.5"], spec, 1)
    assert (estimate.policy, estimate.gradients, estimate.optimizer) == (2 * size, 0, 0)
    assert estimate.offloaded == (12 + 8 + 2) * size
    assert str(estimate).endswith(", and 17.61 GiB of the machine's memory")


def test_what_moves_the_reference_costs():
    counts, size = ParameterCounts(denoiser=1000, adapter=10), PUBLISHED["SD1.5"].denoiser
    kinds = {
        refresh: TrainSpec(reference=ReferenceSpec(refresh=refresh, every=1)) for refresh in Refresh
    }
    of_lora = [estimate_memory(counts, spec, 1).reference for spec in kinds.values()]
    assert of_lora == [0, 20, 60]  # frozen is the base; ema keeps an fp32 average
    whole = [estimate_memory(PUBLISHED["SD1.5"], spec, 1).reference for spec in kinds.values()]
    assert whole == [2 * size, 2 * size, 6 * size]
    free = TrainSpec(
        objective=ObjectiveSpec(kind=Objective.mapo),
        reference=ReferenceSpec(refresh=Refresh.frozen),
    )
    assert estimate_memory(PUBLISHED["SD1.5"], free, 1).reference == 0


def test_the_table_of_the_guide_is_this_one():
    assert published_table() in (ROOT / "docs/models.md").read_text()


PRESETS = [(model, size) for model in presets.MODELS for size in presets.SIZES]


@pytest.mark.parametrize(("model", "size"), PRESETS)
def test_a_preset_fits_its_gpu_and_no_better_one_does(model: str, size: int):
    """LoRA where all weights fit in no way that presets have; a rounded base where no whole one.

    None is there where not even a base in 4 bits fits.
    """
    preset, most = presets.read_preset(model, size), presets.USABLE * size
    assert preset is None or preset.gib <= most
    name, shape = presets.MODELS[model]
    least = COUNTED[shape][-1]  # one pair, blocks recomputed
    trained = preset.trained if preset else f"LoRA on {Quantize.nf4.value}"
    kinds = list(Quantize)
    rounded = kinds.index(Quantize(trained.partition(" on ")[2] or "none")) + (preset is None)
    in_8_bits = TrainSpec(optimizer=OptimizerSpec(kind=OptimizerKind.adamw8bit))
    better = [(published(name, text=0, vae=0), in_8_bits)] * trained.startswith("LoRA")
    better += [(published(name, 16, kind, text=0, vae=0), TrainSpec()) for kind in kinds[:rounded]]
    assert all(estimate_memory(*one, 1).total / GIB + least > most for one in better)


def test_every_preset_is_in_the_table_of_the_guide():
    files = {(path.parent.name, path.stem) for path in (ROOT / "conf/preset").rglob("*.yaml")}
    assert files <= {(model, f"{size}gb") for model, size in PRESETS}
    assert presets.table() in (ROOT / "docs/models.md").read_text()


EXPERIMENTS = {
    "sd15_pickapic": ("SD1.5", "SD1.5 at 512"),
    "sd21_pickapic": ("SD2.1", "SD2.1 at 768"),
    "sdxl_pickapic": ("SDXL", "SDXL at 1024"),
    "sd35_medium": ("SD3.5 medium", "SD3.5 medium at 1024"),
    "flux_dev_lora": ("FLUX.1 dev", "FLUX.1 dev at 1024, LoRA of rank 32"),
    "z_image_lora": ("Z-Image", "Z-Image at 1024, LoRA of rank 32"),
    "sana_lora": ("Sana 1.6B", "Sana 1.6B at 1024, LoRA of rank 128"),
    "qwen_image_lora": ("Qwen-Image", "Qwen-Image at 1024, LoRA of rank 32"),
}
"""Experiment -> its model in `PUBLISHED`, and in the table of activations."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_what_is_counted(name: str):
    """The GiB in a header are those of the file's own settings, on the GPUs that it names."""
    from tests.test_conf import job

    model, shape = EXPERIMENTS[name]
    text = " ".join((ROOT / f"conf/experiment/{name}.yaml").read_text().replace("#", " ").split())
    settings = job(f"experiment={name}", "pairs.root=/x")
    train = settings.train
    adapter = ADAPTERS[model] * train.lora.rank // 16
    whole = replace(PUBLISHED[model], adapter=adapter)
    if settings.label.texts.write:
        whole = replace(whole, text=0)
    said = re.search(r"(\d+\.\d) GiB a GPU on (\d+) GPUs with ZeRO-(\d)", text)
    assert said
    assert int(said.group(3)) == train.zero.stage
    others = re.findall(r"(\d+\.\d) with ZeRO-(\d)", text)
    of_stage = {train.zero.stage: said.group(1)} | {int(stage): size for size, stage in others}
    for train.zero.stage, stated in of_stage.items():
        estimate = estimate_memory(whole, train, int(said.group(2)), vae_in_fp32=model in FP32_VAES)
        assert f"{estimate.total / GIB:.1f}" == stated, train.zero.stage
    kept = re.search(r"(\d+\.\d) GiB of activations", text)
    assert kept
    a_pair = COUNTED[shape][list(ActivationCheckpointing).index(train.gradient_checkpointing)]
    assert f"{a_pair * train.micro_batch:.1f}" == kept.group(1)

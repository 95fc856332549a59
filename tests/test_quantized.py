"""A base in 4 or 8 bits: what its layers compute, and what does not go with it."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.helpers_flow import (
    SIDES,
    write_flux,
    write_qwen_image,
    write_sana,
    write_sd3,
    write_z_image,
)
from tests.helpers_train import SIDE, opened, write_base, write_sdxl_base
from train.config import LoraSpec, ModelSpec, Precision, Quantize, TrainSpec, ZeroSpec
from train.models import extras
from train.models.base_model import check_settings
from train.models.components import load_components
from train.models.fit import check_fits, count_parameters, gpu_bytes
from train.models.lora import POLICY, as_reference, attach, belongs, counts
from train.models.memory import QUANTIZED_BYTES, estimate_memory
from train.models.quantized import QuantizedLinear, in_8_bits, quantized_layers
from train.run import model_identity

CPU = torch.device("cpu")
WRITERS = {"sd": write_base, "sdxl": write_sdxl_base, "sd3": write_sd3, "flux": write_flux,
           "z_image": write_z_image, "sana": write_sana,
           "qwen_image": write_qwen_image}  # fmt: skip
NEEDS_PACKAGE = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
KINDS = [Quantize.int8, pytest.param(Quantize.nf4, marks=NEEDS_PACKAGE)]
BOTH = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- a layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_multiples_of_a_rows_unit(dtype: torch.dtype):
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2], weight[3] = 0, weight[3] * 1e-3
    integers, unit = in_8_bits(weight)
    assert integers.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127, 127]
    distance = (weight.float() - integers * unit.float()).abs()
    half = 0.5 if dtype is torch.float32 else 0.75  # its unit may be below the row's largest / 127
    assert bool((distance <= half * unit.float() * (1 + 1e-4)).all())


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_four_bits_are_those_of_bitsandbytes():
    """Its own layer computes nearly the same, by another kernel."""
    from bitsandbytes.nn import Linear4bit

    layer, given = nn.Linear(320, 64), torch.randn(5, 320)
    theirs = Linear4bit(320, 64, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(layer.state_dict())
    ours = QuantizedLinear(layer, Quantize.nf4, CPU)
    torch.testing.assert_close(ours(given), theirs.to(CPU)(given), rtol=1e-4, atol=1e-4)


@BOTH
def test_a_layer_keeps_neither_input_nor_weight_for_the_backward_pass(kind: Quantize):
    layer = QuantizedLinear(nn.Linear(256, 192), kind, CPU)
    weight = layer.restored(torch.float32)
    given = torch.randn(2, 5, 256, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product = layer(given)
    assert not kept
    assert torch.equal(product, functional.linear(given, weight, layer.bias))
    with torch.no_grad():
        assert torch.equal(layer(given), product)
    product.square().sum().backward()
    expected = torch.autograd.grad(
        functional.linear(given, weight, layer.bias).square().sum(), given
    )
    torch.testing.assert_close(given.grad, expected[0])
    counted = QUANTIZED_BYTES[kind] * weight.numel()
    assert counted == pytest.approx(layer.nbytes, rel=0.03)  # with the units of rows


# --- a denoiser ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRITERS)
def test_policy_and_reference_agree_on_a_quantized_base(tmp_path: Path, family: str):
    """To the bit, in every family; the adapter alone has gradients."""
    folder, predictions, sizes = WRITERS[family](tmp_path / "base"), [], set()
    for kind in (Quantize.none, Quantize.int8, *[Quantize.nf4][: bool(find_spec("bitsandbytes"))]):
        spec = ModelSpec(path=str(folder), resolution=SIDES.get(family, SIDE), quantize=kind)
        components = load_components(spec, Precision.bf16, CPU)
        denoiser = components.denoiser()
        linear = [layer for layer in denoiser.modules() if isinstance(layer, nn.Linear)]
        assert len(quantized_layers(denoiser)) == len(linear) * (kind is not Quantize.none)
        lora = LoraSpec(rank=2, targets=list(components.base.family.lora_targets))
        attach(denoiser, lora, 0, with_reference=True)
        noisy = torch.randn(
            2,
            *components.latent_shape(components.square),
            generator=torch.Generator().manual_seed(0),
        )
        inputs = noisy, torch.tensor([100, 700]), components.condition_of_new(["a cat", "a dog"])
        policy = components.predict(denoiser, *inputs)
        with torch.no_grad():
            assert torch.equal(components.predict(as_reference(denoiser), *inputs), policy)
        policy.square().mean().backward()
        for name, parameter in denoiser.named_parameters():
            assert (parameter.grad is not None) == belongs(name, POLICY), name
        predictions.append(policy.detach())
        sizes.add((counts(denoiser).denoiser, counts(denoiser).adapter))
    assert len(sizes) == 1
    for predicted, most in zip(predictions[1:], (0.1, 0.3), strict=False):
        assert 0 < (predicted - predictions[0]).norm() < most * predictions[0].norm()


# --- what does not go with it --------------------------------------------------------------------


def test_what_cannot_be_trained_on_a_quantized_base_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = opened(write_base(tmp_path / "base"))
    lora, whole = LoraSpec(rank=4), ZeroSpec(stage=3)

    def check(kind: Quantize, spec: TrainSpec) -> None:
        check_settings(base, ModelSpec(quantize=kind), spec)

    check(Quantize.int8, TrainSpec(lora=lora))
    for spec, says in (
        (TrainSpec(), r"model\.quantize=int8 .*train\.lora\.rank=0 .*tuning=lora"),
        (TrainSpec(lora=lora, zero=whole), r"model\.quantize=int8 with zero\.stage=3.*zero=stage2"),
        (TrainSpec(lora=lora, compile=True), r"model\.quantize=int8 with train\.compile=true"),
    ):
        with pytest.raises(ValueError, match=says):
            check(Quantize.int8, spec)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"model\.quantize=nf4 needs .*bitsandbytes.*quantize=int8"
    ):
        check(Quantize.nf4, TrainSpec(lora=lora))
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    check(Quantize.nf4, TrainSpec(lora=lora))


def test_a_run_that_exceeds_its_gpu_is_refused_before_weights_are_loaded(tmp_path: Path):
    """The count is that of the loaded denoiser."""
    base = opened(write_base(tmp_path / "base"))
    spec = TrainSpec(lora=LoraSpec(rank=4), precision=Precision.fp32)
    model = ModelSpec(path=str(base.folder), resolution=SIDE, quantize=Quantize.int8)
    denoiser = load_components(model, Precision.fp32, CPU).denoiser()
    attach(denoiser, spec.lora, 0, with_reference=True)
    count = count_parameters(base, Quantize.int8, spec)
    assert count == replace(counts(denoiser), quantized_bytes=count.quantized)
    needed = estimate_memory(count, spec, 1).total
    check_fits(base, model, spec, 1, needed)
    with pytest.raises(ValueError, match=r"takes 0\.00 GiB .* GPU has 0\.0 GiB; take a preset"):
        check_fits(base, model, spec, 1, needed - 1)
    assert gpu_bytes(CPU) is None


def test_how_a_base_is_stored_decides_a_run(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    plain, quantized = (
        model_identity(ModelSpec(path=str(tmp_path), quantize=kind))
        for kind in (Quantize.none, Quantize.nf4)
    )
    assert quantized == plain | {"quantize": "nf4"}

"""Runs with less memory: offloaded ones, and Adafactor; each resumes with the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.models.adapter import ADAPTER
from tests import rank_programs
from tests.helpers_ranks import run_ranks, shared_place, straight
from tests.test_checkpoint import copy_run, same_journals
from train.config import Offload, ZeroSpec

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "parameters")])
def test_an_offloaded_run_agrees_and_resumes_with_the_same_bits(stage: int, offload: str):
    place, plain = shared_place(), straight(2, 1)
    name = straight(stage, 1, f"train.zero.offload={offload}")
    for one, two in zip(place.journal(plain), place.journal(name), strict=True):
        for key in ("loss", "policy_winner_error", "gradient_norm"):  # clipped by another sum
            assert two[key] == pytest.approx(one[key], rel=2e-3), (one["step"], key)
    again = f"again-{name}"
    copy_run(place, name, again, "step-0000006")
    place.train(again, f"zero=stage{stage}", f"train.zero.offload={offload}")
    assert place.weights(again) == place.weights(name)
    same_journals(place, name, again)


def test_adafactor_resumes_with_the_same_bits():
    place, name = shared_place(), straight(0, 1, "optimizer=adafactor")
    copy_run(place, name, "again-adafactor", "step-0000006")
    place.train("again-adafactor", "zero=stage0", "optimizer=adafactor")
    assert place.weights("again-adafactor") == place.weights(name)
    assert place.journal(name)[-1]["loss"] != place.journal(straight(0, 1))[-1]["loss"]


def test_gradients_of_a_batch_are_summed_in_fp32(tmp_path: Path):
    base = shared_place().root / "base"
    run_ranks(tmp_path, 1, rank_programs.sums_in_float32, base, ((2, "optimizer"),))


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "optimizer"), (1, "optimizer"), (2, "parameters")]
)
def test_stages_without_parts_to_offload_refuse(stage: int, offload: str):
    with pytest.raises(ValueError, match=rf"train\.zero\.offload={offload} needs zero=stage"):
        ZeroSpec(stage=stage, offload=Offload(offload))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_on_a_quantized_base_resumes_with_the_same_bits(kind: str):
    """Margin 0 at first and after each snapshot. A checkpoint has no base, and the result is the
    adapter on the whole weights."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    more = "tuning=lora", "train.lora.rank=4", f"model.quantize={kind}", "train.precision=bf16"
    place, name = shared_place(), straight(2, 1, *more)
    for line in place.journal(name):
        assert (line["margin"] == 0) == (line["step"] in (1, 4))
    again = f"again-{name}"
    folder = copy_run(place, name, again, "step-0000006", "lora")
    shards = sum(path.stat().st_size for path in (folder / "step-0000004").rglob("*.pt"))
    assert shards < place.result(name).stat().st_size
    place.train(again, "zero=stage2", *more)
    assert place.weights(again) == place.weights(name)
    same_journals(place, name, again)
    card = (place.folder(name) / "pipeline/README.md").read_text()
    assert f"LoRA of rank 4, on the base rounded to {kind} |" in card
    expected = load_file(place.root / "base/unet" / place.result(name).name)
    adapter = load_file(place.folder(name) / "lora" / ADAPTER)
    for key in (key for key in adapter if ".lora_A." in key):
        weight = key.removeprefix("unet.").replace(".lora_A", "")
        expected[weight] += adapter[key.replace(".lora_A.", ".lora_B.")] @ adapter[key]
    whole = load_file(place.result(name))
    assert all(torch.equal(whole[key], weight) for key, weight in expected.items())

"""Functions that tests run as ranks (`run_ranks`): each asserts what it finds."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from data.images import Size
from data.pairs.config import PairsSpec
from tests.helpers_train import SIDE, SQUARE, write_base, write_labels
from train.config import (
    LoraSpec,
    ModelSpec,
    Objective,
    Offload,
    Precision,
    ReferenceSpec,
    Refresh,
    TimestepKind,
    TrainSpec,
    ValidationSpec,
    ZeroSpec,
)
from train.distributed.deepspeed_engine import NonFiniteError, Policy, partitions
from train.distributed.policy_average import AverageFiles, PolicyAverage, make_average
from train.distributed.world import World, start
from train.dpo.draws import DrawRule
from train.dpo.loss import dpo_losses
from train.dpo.objectives import dpo, margin_dpo
from train.dpo.reference import Reference, make_reference
from train.dpo.step import (
    Models,
    draw_noise,
    draws_of,
    prefetch_noise,
    prepare_inputs,
    step,
)
from train.identity import TrainRun
from train.loader.loader import PairBatch
from train.loader.order import Position
from train.models.components import ModelComponents, load_components
from train.models.lora import attach
from train.trainer.build import make_trainer, open_stream
from train.trainer.tally import Tally
from train.trainer.trainer import Trainer
from train.trainer.validation import Validation

CPU = torch.device("cpu")


def pair_batch(rank: int = 0, pairs: int = 4) -> PairBatch:
    generator = torch.Generator().manual_seed(rank)
    winner, loser = torch.randint(0, 256, (2, pairs, SIDE, SIDE, 3), generator=generator).byte()
    ids = tuple(f"{rank}-{i}" for i in range(pairs))
    prompts = tuple(["a red cat", "a blue cat", "a red cat", ""][:pairs])
    margin, size = torch.ones(pairs, dtype=torch.int64), torch.full((pairs, 2, 2), SIDE)
    return PairBatch(
        (0,) * pairs, ids, prompts, winner, loser, margin, torch.ones(pairs), size, SQUARE
    )


def spec_of(stage: int, precision: str, refresh: str, world: int, rank: int = 0) -> TrainSpec:
    reference = ReferenceSpec(refresh=Refresh(refresh), every=2, alpha=0.25)
    return TrainSpec(
        steps=4, batch=4 * world, micro_batch=4, precision=Precision(precision), lr=1e-3,
        zero=ZeroSpec(stage=stage), reference=reference, device="cpu", lora=LoraSpec(rank=rank),
    )  # fmt: skip


def draw_rule_of(components: ModelComponents) -> DrawRule:
    return DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)


def load(base: Path, spec: TrainSpec, world: World) -> tuple[ModelComponents, Policy, Reference]:
    model = ModelSpec(path=str(base), resolution=SIDE)
    components = load_components(model, spec.precision, world.device)
    unet = components.denoiser()
    if spec.lora.rank:
        unet.enable_gradient_checkpointing()  # the backward pass must find the policy's adapter
        attach(unet, spec.lora, 0, with_reference=spec.reference.refresh is not Refresh.frozen)
    policy = Policy(unet, spec, world)
    return components, policy, make_reference(components.denoiser, policy, spec, world)


def copies(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in parts.items()}


def refreshes(base: Path, stage: int, precision: str, refresh: str, rank: int = 0) -> None:
    """Two steps, a refresh, two more: the reference moves when it should, and only then."""
    world = start("cpu")
    spec = spec_of(stage, precision, refresh, world.world_size, rank)
    components, policy, reference = load(base, spec, world)
    models = Models(components, policy, reference.denoiser)
    first = copies(reference.parts())
    for done in range(4):
        output = step(
            draw_noise(pair_batch(world.rank), draw_rule_of(components)), models, dpo(spec.beta)
        )
        same = done == 0 or (done == 2 and refresh == "snapshot")
        assert bool((output.margin == 0).all()) == same, (done, output.margin)
        assert (output.loss.item() == torch.tensor(math.log(2)).item()) == same
        policy.backward(output.loss)
        policy.optimizer_step(1e-3)
        before, trained = copies(reference.parts()), copies(partitions(policy.trained))
        if not reference.due(done + 1):
            continue
        reference.refresh(policy)
        after = reference.parts()
        for name, part in after.items():
            if refresh == "snapshot":
                assert torch.equal(part, trained[name]), name
                assert_rounded_masters(policy, part, name)
            else:
                expected = before[name].double().lerp(trained[name].double(), 0.25)
                close = 1e-6 if precision == "fp32" else 1e-2
                torch.testing.assert_close(part.double(), expected, rtol=close, atol=close)
    moved = any(not torch.equal(part, first[name]) for name, part in reference.parts().items())
    assert moved == (refresh != "frozen")
    assert reference.version == {"frozen": 0, "snapshot": 2, "ema": 2}[refresh]
    world.barrier()


def assert_rounded_masters(policy: Policy, part: torch.Tensor, name: str) -> None:
    """A snapshot is the optimizer's fp32 master weight, rounded to the reference's format."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    if policy.engine.zero_optimization_stage() == 0:  # and fp32: its weights are the masters
        return
    one = safe_get_local_fp32_param if policy.sharded else safe_get_full_fp32_param
    master = one(policy.trained[name])
    assert master.dtype is torch.float32
    rounded = master.flatten().to(part.dtype)
    assert torch.equal(part[: len(rounded)], rounded), name


def averages(base: Path, folder: Path) -> None:
    """Under every partition: the average is that of whole fp32 weights; ranks read any part."""
    world = start("cpu")
    for stage, rank, offload in [(0, 0, "none"), (1, 4, "none"), (3, 0, "optimizer")]:
        spec = spec_of(stage, "bf16", "frozen", world.world_size, rank)
        spec.zero.offload = Offload(offload)
        components, policy, reference = load(base, spec, world)
        models = Models(components, policy, reference.denoiser)
        average, expected = make_average(policy, 0.5), policy.gather_fp32_state_dict()
        for done, kept in ((1, 2 / 11), (12, 0.5)):
            batch = draw_noise(pair_batch(world.rank), draw_rule_of(components))
            policy.backward(step(batch, models, dpo(spec.first_beta)).loss)
            policy.optimizer_step(1e-3)
            average.update(policy, done)
            for name, weight in policy.gather_fp32_state_dict().items():
                expected[name] = kept * expected[name] + (1 - kept) * weight
        place = folder / str(stage)
        place.mkdir(exist_ok=True)
        average.save(place, world)
        world.barrier()
        assert_same_average(average, make_average(policy, 0.5), place)
        if world.rank == 0:
            torch.testing.assert_close(average.whole(place), expected, rtol=1e-5, atol=1e-7)
    world.barrier()


def assert_same_average(average: PolicyAverage, other: PolicyAverage, folder: Path) -> None:
    """What was saved is what is loaded, in fp32; and any part of it can be read."""
    other.load(folder)
    for name, part in average.parts.items():
        assert part.values.dtype is torch.float32
        assert torch.equal(other.parts[name].values, part.values), name
    name, whole = next(iter(average.whole(folder).items()))
    with AverageFiles(folder) as files:
        assert torch.equal(files.read(name, 1, 5), whole.flatten()[1:6])


def weights_are_masters(base: Path) -> None:
    """Stage 0 in bf16: a step too small for bf16 moves the exported weights, not the model's."""
    world = start("cpu")
    spec = spec_of(0, "bf16", "frozen", world.world_size)
    spec.optimizer.weight_decay = 0.0
    components, policy, reference = load(base, spec, world)
    models = Models(components, policy, reference.denoiser)
    before, model = policy.gather_fp32_state_dict(), copies(partitions(policy.trained))
    policy.backward(
        step(draw_noise(pair_batch(), draw_rule_of(components)), models, dpo(spec.beta)).loss
    )
    policy.optimizer_step(1e-5)
    after, ones = (
        policy.gather_fp32_state_dict(),
        [name for name, part in model.items() if bool((part == 1).all())],
    )
    assert ones  # where the next number in bf16 is 4e-3 away
    for name in ones:
        assert torch.equal(partitions(policy.trained)[name], model[name]), name
        assert after[name].dtype is torch.float32
        assert 5e-6 < (after[name] - before[name]).abs().max().item() < 2e-5, name


def small_moves(base: Path) -> None:
    """In bf16 a small alpha must not be rounded away: the average is kept in fp32."""
    world = start("cpu")
    spec = spec_of(2, "bf16", "ema", world.world_size)
    _, policy, reference = load(base, spec, world)
    reference.spec.alpha = 5e-3
    with torch.no_grad():
        for part in partitions(policy.trained).values():
            part.fill_(1.0)
    reference.average = {name: torch.zeros_like(part) for name, part in reference.average.items()}
    for _ in range(300):
        reference.refresh(policy)
    for name, part in reference.parts().items():
        torch.testing.assert_close(
            part.float(), torch.full_like(part, 1 - (1 - 5e-3) ** 300).float(), rtol=1e-2, atol=0
        )
        assert reference.average[name].dtype is torch.float32


def trainer_of(root: Path, labels: Path, kind: Objective | TimestepKind, world: World) -> Trainer:
    """Diffusion-DPO but for one choice."""
    spec = spec_of(0, "fp32", "frozen", world.world_size)
    if isinstance(kind, Objective):
        spec.objective.kind = kind
    else:
        spec.timesteps.kind = kind
    run = TrainRun(
        folder=root, labels=labels, pairs=PairsSpec(root=str(root / "pairs")),
        model=ModelSpec(path=str(root / "base"), resolution=SIDE), train=spec, seed=0, settings={},
    )  # fmt: skip
    return make_trainer(run, world, open_stream(run, world), Console(quiet=True))


def trains_by_each_objective(root: Path) -> None:
    """Four steps of every objective, and of Diffusion-DPO with every distribution of timesteps."""
    world, labels = start("cpu"), write_labels(root / "labels-of-objectives", root / "pairs")
    ln_2 = torch.tensor(math.log(2)).item()
    first: dict[Objective | TimestepKind, dict] = {}
    for kind in (*Objective, *TimestepKind):
        trainer = trainer_of(root, labels, kind, world)
        calls: list[int] = []
        if not (free := trainer.reference.denoiser is None):
            hook = trainer.reference.denoiser.register_forward_hook
            hook(lambda *_, seen=calls: seen.append(1))
        batches = trainer.stream.batches(Position())
        batches = prefetch_noise(batches, trainer.draw_rule, world.device)
        lines = [trainer.optimizer_step(batches) for _ in range(4)]
        assert len(calls) == (0 if kind is Objective.mapo else 4), kind
        for line in lines:
            assert math.isfinite(line["loss"])
            assert line["gradient_norm"] > 0
            assert (line["reference_winner_error"] is None) == free
            assert (line["margin"] == 0) == (line["step"] == 1 and not free), kind
        first[kind] = lines[0]
        assert first[kind].keys() == first[Objective.dpo].keys()
    losses = {kind: line["loss"] for kind, line in first.items()}
    assert losses[Objective.dpo] == losses[Objective.sdpo] == ln_2
    assert losses[Objective.ipo] == 0.25
    assert losses[Objective.margin_dpo] != ln_2
    assert 0.5 * ln_2 < losses[Objective.margin_dpo] < 1.5 * ln_2
    mapo = first[Objective.mapo]
    lead = mapo["policy_loser_error"] - mapo["policy_winner_error"]
    assert math.isclose(mapo["margin"], lead, rel_tol=1e-5)
    assert mapo["loss"] > mapo["policy_winner_error"] == first[Objective.dpo]["policy_winner_error"]
    assert first[TimestepKind.uniform]["gradient_norm"] == first[Objective.dpo]["gradient_norm"]
    assert len({first[kind]["policy_winner_error"] for kind in TimestepKind}) == len(TimestepKind)


def step_is_the_formula(base: Path, prediction: str) -> None:
    """A whole step against the same written with diffusers' scheduler and separate forwards."""
    start("cpu")
    write_base(base, prediction)
    model = ModelSpec(path=str(base), resolution=SIDE)
    components = load_components(model, Precision.fp32, torch.device("cpu"))
    policy, reference = components.denoiser(), components.denoiser()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch, rule = pair_batch(), draw_rule_of(components)
    output = step(draw_noise(batch, rule), Models(components, policy, reference), dpo(5000.0))

    gaps = torch.stack([gaps_by_hand(base, unet, batch) for unet in (policy, reference)])
    inside = -0.5 * 5000.0 * (gaps[0] - gaps[1])
    expected = torch.nn.functional.softplus(-inside)
    assert (expected - math.log(2)).abs().min() > 1e-3  # the models differ, or this shows nothing
    torch.testing.assert_close(output.losses.double(), expected, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(output.loss.double(), expected.mean(), rtol=1e-2, atol=1e-4)
    losses = dpo_losses(output.policy, output.reference, 5000.0)
    torch.testing.assert_close(output.loss, losses.mean())


@torch.no_grad()
def gaps_by_hand(base: Path, unet: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
    """Winner's minus loser's error of each pair, image by image, with diffusers' own parts."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def shape(cut: Size) -> tuple[int, int, int]:
        return 4, cut.height // 2, cut.width // 2

    draws = draws_of(batch, DrawRule(seed=0, num_timesteps=1000, latent_shape=shape))
    gaps = []
    for i, prompt in enumerate(batch.prompts):
        states, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        noise, t = draws.noise[i : i + 1], draws.timestep[i : i + 1]
        errors = []
        for side, pixels in enumerate((batch.winner[i], batch.loser[i])):
            image = pixels.permute(2, 0, 1)[None] / 127.5 - 1
            posterior = pipeline.vae.encode(image).latent_dist
            latents = posterior.mean + posterior.std * draws.posterior[i : i + 1, side]
            latents = latents * pipeline.vae.config.scaling_factor
            velocity = scheduler.get_velocity(latents, noise, t)
            target = noise if scheduler.config.prediction_type == "epsilon" else velocity
            noisy = scheduler.add_noise(latents, noise, t)
            predicted = unet(noisy, t, encoder_hidden_states=states).sample
            errors.append((predicted - target).double().pow(2).mean())
        gaps.append(errors[0] - errors[1])
    return torch.stack(gaps)


def looks_at_held_out(root: Path, labels: Path, stage: int, share: float) -> None:
    """A look before training finds the base; after a step it finds another model."""
    world = start("cpu")
    spec = spec_of(stage, "fp32", "snapshot", world.world_size)
    spec.validation = ValidationSpec(share=share, pairs=5)
    run = TrainRun(
        folder=root, labels=labels, pairs=PairsSpec(root=str(root / "pairs")),
        model=ModelSpec(path=str(root / "base"), resolution=SIDE), train=spec, seed=0, settings={},
    )  # fmt: skip
    trainer = make_trainer(run, world, open_stream(run, world), Console(quiet=True))
    (validation,) = [one for one in trainer.callbacks if isinstance(one, Validation)]
    first = validation.evaluate(trainer.policy, world)
    assert first["validation_accuracy"] == 0.5
    for name in ("margin", "winner_rise", "loser_rise"):
        assert first[f"validation_{name}"] == 0, name
    assert validation.evaluate(trainer.policy, world) == first
    batches = prefetch_noise(trainer.stream.batches(Position()), trainer.draw_rule, world.device)
    trainer.optimizer_step(batches)
    trainer.reference.refresh(trainer.policy)  # a snapshot does not reset the comparison
    then = validation.evaluate(trainer.policy, world)
    assert then["validation_margin"] != 0
    assert then["validation_winner_error"] != first["validation_winner_error"]
    world.barrier()


def nothing_waits(base: Path) -> None:
    """A micro-batch on the meta device, where fetching any number to the host is an error."""
    start("cpu")
    model = ModelSpec(path=str(base), resolution=SIDE)
    meta = torch.device("meta")
    components = load_components(model, Precision.fp32, meta)
    assert components.schedule.alphas_cumprod.is_meta
    models = Models(components, components.denoiser(), components.denoiser())
    rule = replace(draw_rule_of(components), flip=True, caption_dropout=0.5)
    tally = Tally.empty(meta)
    for criterion in (dpo(5000.0), margin_dpo(5000.0, 1.0)):
        output = step(draw_noise(pair_batch(), rule), models, criterion)
        output.loss.backward()
        tally.add(output, 0.0)
    assert tally.sums.is_meta
    assert tally.pairs == 8
    try:
        tally.sums.tolist()
    except (NotImplementedError, RuntimeError):
        return
    raise AssertionError("the meta device gave numbers; this shows nothing")


def ruined_gradients(base: Path) -> None:
    """Under every stage and precision: inf or NaN is noticed, and no weight has changed."""
    world = start("cpu")
    for stage, precision in [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"),
                             (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]:  # fmt: skip
        spec = spec_of(stage, precision, "frozen", world.world_size)
        components, policy, reference = load(base, spec, world)
        models = Models(components, policy, reference.denoiser)
        before = copies(partitions(policy.trained))
        output = step(draw_noise(pair_batch(), draw_rule_of(components)), models, dpo(spec.beta))
        policy.backward(output.loss * math.inf)
        try:
            policy.optimizer_step(1e-3)
        except NonFiniteError:
            pass
        else:
            raise AssertionError(f"stage {stage} in {precision} took the step")
        for name, part in partitions(policy.trained).items():
            assert torch.equal(part, before[name]), (stage, precision, name)


def sums_in_float32(
    base: Path, cases: tuple[tuple[int, str], ...] = ((1, "none"), (2, "none"), (3, "none"))
) -> None:
    """Small gradients of later micro-batches are not lost in a bf16 sum.

    Each of 6 is 2^-9 of the first one's: in bf16, whose steps at 1 are 2^-7 upwards, adding any of
    them to it changes nothing, and the norm would stay what it was.
    """
    world = start("cpu")
    norms = {}
    for stage, offload in cases:
        for later in (0.0, 2.0**-9):
            spec = spec_of(stage, "bf16", "frozen", world.world_size)
            spec.zero.offload = Offload(offload)
            spec.batch, spec.clip_norm = 7 * spec.micro_batch, None
            components, policy, reference = load(base, spec, world)
            models = Models(components, policy, reference.denoiser)
            for index in range(7):
                output = step(
                    draw_noise(pair_batch(), draw_rule_of(components)), models, dpo(spec.beta)
                )
                policy.backward(output.loss * (later if index else 1.0))
                if index < 6:
                    policy.next_micro_batch()
            norms[later] = policy.optimizer_step(0.0)
        ratio = norms[2.0**-9] / norms[0.0]
        assert math.isclose(ratio, 1 + 6 / 2**9, rel_tol=2e-3), (stage, offload, ratio)


def mirrored_together(base: Path) -> None:
    """Both images of a pair are mirrored, or neither is."""
    components = load_components(ModelSpec(path=str(base), resolution=SIDE), Precision.fp32, CPU)
    seen: list[torch.Tensor] = []

    def look(self: ModelComponents, pixels: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return posterior

    ModelComponents.encode_images = look  # type: ignore[method-assign]
    batch = pair_batch()
    drawn = draw_noise(batch, replace(draw_rule_of(components), flip=True))
    drawn = replace(
        drawn, draws=replace(drawn.draws, flip=torch.tensor([True, False, True, False]))
    )
    prepare_inputs(drawn, components)
    winners, losers = seen[0].chunk(2)
    for index, flipped in enumerate(drawn.draws.flip.tolist()):
        for shown, given in ((winners, batch.winner), (losers, batch.loser)):
            expected = given[index].flip(1) if flipped else given[index]
            assert torch.equal(shown[index], expected), index

"""Rules of a GPU, tested on one that is not there: no mixed devices, and few waits of the host."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from noisy_data import images, noisy_batch
from pretend_gpu import CUDA, PretendGPU
from torch import Tensor

from stablefield import VE, DSMTarget, ExactTarget, KNNTarget, NoisyBatch, Pool, STFTarget
from stablefield.build import build
from stablefield.config import override, resolve
from stablefield.denoise import Denoiser, Guided, IdealDenoiser, Preconditioned
from stablefield.distributed import Ranks
from stablefield.engine.loop import StepReport, train
from stablefield.engine.session import initial_state, training_steps
from stablefield.likelihood import _Flow
from stablefield.networks import MLP
from stablefield.networks.group_norm import GroupNorm
from stablefield.pool import NULL_LABEL
from stablefield.precision import arithmetic, autocast
from stablefield.preconditioning import EDMPreconditioning
from stablefield.sample import (
    Ancestral,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
)
from stablefield.sample.base import BoundDenoiser
from stablefield.targets import Prefetched, TargetEstimator

SMALL = ["network.channels=8", "training.batch_size=16", "training.images=1000000"]
TARGETS = {
    "dsm": ["target.kind=dsm"],
    "stf": ["target.kind=stf", "target.size=64"],
    "stf, recent": ["target.kind=stf", "target.size=64", "target.references=recent"],
    "knn": ["target.kind=knn", "target.neighbours=16"],
    "exact": ["target.kind=exact", "training.target_prefetch=64"],
    "exact, streamed": ["target.kind=exact", "target.missing_mass=0"],
}
TRAININGS = {
    "plain": [],
    "labels": ["training.conditional=true", "training.label_dropout=0.2"],
    "EDM maps": ["augmentation.kind=edm"],
    "mirror": ["augmentation.kind=mirror"],
    "micro-batches": ["training.micro_batch_size=8", "training.gradient_clip=1.0"],
    "float16": ["training.precision=float16"],
    "bfloat16": ["training.precision=bfloat16"],
}


def steps(settings: list[str], device: torch.device) -> Iterator[StepReport]:
    config = resolve(override({}, [*SMALL, *settings]))
    parts = build(config, ranks=Ranks(device))
    return training_steps(config, parts, initial_state(config, parts), images=10**9)


def moved(noisy: NoisyBatch) -> NoisyBatch:
    """A batch as training has it: what decides about references is on the CPU."""
    there = {name: getattr(noisy, name).to(CUDA) for name in ("x", "noise", "t", "alpha", "sigma", "x_t")}
    return NoisyBatch(**there, label=noisy.label, index=noisy.index, augment_label=noisy.augment_label)


def on_cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()


QUICK = {
    ("stf", "plain"),
    ("stf", "labels"),
    ("stf", "EDM maps"),
    ("knn", "labels"),
    ("exact", "plain"),
    ("dsm", "float16"),
}
CASES = [
    pytest.param(target, training, resident, marks=[] if (target, training) in QUICK else pytest.mark.slow)
    for target in TARGETS
    for training in TRAININGS
    for resident in (True, False)
]


@pytest.mark.parametrize(("target", "training", "resident"), CASES)
def test_a_training_step_mixes_no_devices_and_waits_once(target: str, training: str, resident: bool) -> None:
    with PretendGPU(memory=2**36 if resident else 0) as gpu:
        run = steps([*TARGETS[target], *TRAININGS[training]], CUDA)
        next(run)
        gpu.waits.clear()
        list(islice(run, 2))
    assert not gpu.mistakes
    # the k nearest of data on the CPU must be known there before they can be copied; of a view, where its data are
    most = 2 if target == "knn" and (not resident or training == "mirror") else 1
    assert sum(gpu.waits.values()) <= 2 * most, gpu.waits


@pytest.mark.parametrize(
    ("target", "training"),
    [
        pytest.param(target, training, marks=[] if (target, training) in QUICK else pytest.mark.slow)
        for target in TARGETS
        for training in ("plain", "labels", "EDM maps")
    ],
)
def test_training_on_the_pretended_gpu_equals_training_on_the_cpu(
    target: str, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupNorm, "forward", torch.nn.GroupNorm.forward)  # GPUs have their own, and their own layout
    monkeypatch.setattr("stablefield.build.place", lambda denoiser, device: denoiser.to(device))
    settings = [*TARGETS[target], *TRAININGS[training]]
    here = [step.report.losses for step in islice(steps(settings, torch.device("cpu")), 3)]
    with PretendGPU():
        there = [on_cpu(step.report.losses) for step in islice(steps(settings, CUDA), 3)]
    for one, other in zip(here, there, strict=True):
        # larger blocks are summed in another order; the networks' arithmetic is the same
        torch.testing.assert_close(other, one, rtol=1e-5 if target.startswith(("exact", "knn")) else 0, atol=0)


@pytest.mark.parametrize(("resident", "kept"), [("auto", True), ("0.001", False), ("false", False)])
def test_bytes_are_copied_as_bytes_and_only_those_of_the_batch_unless_they_are_kept_there(
    resident: str, kept: bool
) -> None:
    data = 1797 * 64  # bytes of the digits
    with PretendGPU(memory=20 * data) as gpu:
        run = steps(["target.kind=stf", "target.size=32", f"training.resident={resident}"], CUDA)
        assert gpu.copied[torch.uint8] == (data if kept else 0)
        next(run)
        gpu.clear()
        next(run)
    assert gpu.copied[torch.uint8] == (0 if kept else (16 + 32 + 1) * 64)  # examples, references, one to compare
    assert gpu.copied[torch.float32] <= (16 * 64 + 16) * 4  # noise and times


# ---- class-conditional targets


def operations(target: TargetEstimator, noisy: NoisyBatch) -> tuple[int, PretendGPU]:
    with PretendGPU() as gpu:
        batch = moved(noisy)
        target(batch, generator=torch.Generator().manual_seed(0))
        gpu.clear()
        target(batch, generator=torch.Generator().manual_seed(1))
    return sum(gpu.operations.values()), gpu


@pytest.mark.parametrize(("null", "ratio"), [(0.0, 1.8), (0.2, 3.0)])
def test_a_thousand_classes_cost_few_more_operations_than_none_and_no_wait(null: float, ratio: float) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(1000), torch.randint(1000, (19_000,), generator=g)])
    pool = Pool(torch.randint(256, (20_000, 3, 4, 4), generator=g, dtype=torch.uint8), labels)
    noisy = noisy_batch(pool, torch.full((512,), 2.0), labelled=True)
    assert noisy.label is not None
    noisy.label[torch.rand(512, generator=g) < null] = NULL_LABEL
    with PretendGPU():
        pool = pool.to(CUDA)
    plain, _ = operations(STFTarget(Pool(pool.data), 1024), replace(noisy, label=None))
    conditional, gpu = operations(STFTarget(pool, 1024), noisy)
    assert not gpu.waits
    assert not gpu.mistakes
    assert conditional <= ratio * plain


def test_references_of_other_classes_cost_no_arithmetic() -> None:
    pool = images(4000, side=4, classes=40)
    noisy = noisy_batch(pool, torch.full((256,), 2.0), labelled=True)
    _, gpu = operations(STFTarget(pool, 64), noisy)
    pairs = 256 * 63 * 16
    assert sum(gpu.float64.values()) <= 2 * 2 * pairs + 4 * 256 * 16  # both products, with at most half empty places


# ---- exact targets


@pytest.mark.parametrize("values", [torch.uint8, torch.float32])
@pytest.mark.parametrize("labelled", [False, True])
def test_exact_targets_of_many_steps_and_classes_wait_a_few_times(values: torch.dtype, labelled: bool) -> None:
    data = images(3000, classes=10)
    pool = Pool(data.data if values == torch.uint8 else data.take(torch.arange(3000)), data.labels)
    batches = [noisy_batch(pool, torch.logspace(-2, 1.5, 64), seed=seed, labelled=labelled) for seed in range(5)]
    here = ExactTarget(pool)(batches[1])
    with PretendGPU() as gpu:
        target = Prefetched(ExactTarget(pool.to(CUDA)), 256)
        several = [moved(noisy) for noisy in batches]
        target(several[0])  # measures what is known before anything is drawn
        gpu.clear()
        there = target.several(several[1:])[0]
    assert not gpu.mistakes
    assert sum(gpu.waits.values()) <= 10, gpu.waits
    # bytes are multiplied as bytes there, and larger groups are summed in another order
    torch.testing.assert_close(on_cpu(there.mean), here.mean, rtol=0, atol=1e-6)


# ---- bad batches


@pytest.mark.parametrize("estimator", [STFTarget, KNNTarget, ExactTarget])
def test_changed_examples_are_refused_by_a_check_where_the_means_are_not_finite(estimator: type) -> None:
    pool = images()
    target = estimator(pool)
    with PretendGPU():
        noisy = moved(noisy_batch(pool, torch.full((8,), 1.0)))
        target.check(noisy)
        assert target(noisy).mean.isfinite().all()
        flipped = moved(noisy_batch(pool, torch.full((8,), 1.0)))
        flipped.x.copy_(flipped.x.flip(-1))
        assert not target(flipped).mean.isfinite().any()
        with pytest.raises(ValueError, match="is not data point"):
            target.check(flipped)
        noisy.x_t[3, 0, 0, 0] = torch.inf
        with pytest.raises(ValueError, match="x_t is not finite in example 3"):
            target.check(noisy)
    DSMTarget().check(noisy)


def test_training_on_a_gpu_says_why_a_batch_has_no_target() -> None:
    with PretendGPU():
        config = resolve(override({}, [*SMALL, *TARGETS["stf"]]))
        parts = build(config, ranks=Ranks(CUDA))
        changed = Pool(parts.pool.data.flip(0), num_levels=parts.pool.num_levels)
        object.__setattr__(parts.objective.target, "pool", changed)
        with pytest.raises(ValueError, match="is not data point"):
            next(train(initial_state(config, parts), parts.objective, parts.batches, images=10**9))


# ---- the pretence itself


def test_the_pretended_gpu_sees_waits_and_mixed_devices() -> None:
    with PretendGPU() as gpu:
        x, here = torch.ones(4, device=CUDA), torch.ones(4)
        assert x.device == CUDA
        assert here.device.type == "cpu"
        assert here.pin_memory().is_pinned()
        assert here.pin_memory().to(CUDA, non_blocking=True).device == CUDA
        assert (x + 1)[:2].is_cuda
        assert not gpu.waits
        for number, wait in enumerate(
            (
                lambda: here.to(CUDA),
                lambda: here.to(CUDA, non_blocking=True),
                lambda: here.pin_memory().to(CUDA),
                lambda: here.pin_memory().to(CUDA, torch.float64, non_blocking=True),
                x.cpu,
                x.tolist,
                lambda: float(x[0]),
                lambda: bool((x > 0).all()),
                x.nonzero,
                x.unique,
                lambda: x[x > 0],
                lambda: x[torch.tensor([0])],
                lambda: torch.tensor([1.0], device=CUDA),
                lambda: x.copy_(here),
            )
        ):
            gpu.clear()
            wait()
            assert gpu.waits, number
        assert not gpu.mistakes
        for mistake in (
            lambda: x + here,
            lambda: torch.cat([x, here]),
            lambda: torch.randn(3, device=CUDA, generator=torch.Generator()),
            lambda: torch.randn(3, generator=torch.Generator(CUDA)),
            lambda: torch._int_mm(torch.ones(16, 8).to(CUDA, torch.int8), torch.ones(8, 8).to(CUDA, torch.int8).T),
            lambda: torch._int_mm(torch.ones(24, 8).to(CUDA, torch.int8), torch.ones(8, 16).to(CUDA, torch.int8)),
        ):
            gpu.clear()
            mistake()
            assert gpu.mistakes


# ---- samplers, guidance and likelihood: no evaluation waits


def waits_of(denoiser: Denoiser, precision: str, work: Callable[[Denoiser], object]) -> Counter[tuple[str, str]]:
    with PretendGPU() as gpu, arithmetic(precision), autocast(precision, CUDA):
        denoiser.to(CUDA)
        gpu.clear()
        work(denoiser)
    assert not gpu.mistakes
    return gpu.waits


def small_denoiser(classes: int) -> Denoiser:
    return Preconditioned(
        MLP((2, 4, 4), width=8, layers=1, num_classes=classes), VE(), EDMPreconditioning(), classes
    ).eval()


SAMPLERS = [
    Heun(),
    Heun(churn=20.0),
    Euler(),
    DPMSolver(),
    Ancestral(),
    EulerMaruyama(),
    ReverseDiffusion(),
    PredictorCorrector(corrections=1),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("guidance", ["none", "label", "weaker network"])
def test_an_evaluation_of_a_sampler_does_not_wait(sampler: Sampler, guidance: str) -> None:
    denoiser = small_denoiser(0 if guidance == "none" else 3)
    if guidance != "none":
        guide = small_denoiser(0) if guidance == "weaker network" else None
        denoiser = Guided(denoiser, 2.0, guide, interval=(0.1, 10.0))
    precision = "float32" if guidance == "none" else "bfloat16"

    def sample(steps: int) -> Counter[tuple[str, str]]:
        chosen = replace(sampler, steps=steps)
        return waits_of(denoiser, precision, lambda each: chosen(each, shape=(2, 4, 4), seeds=range(2)))

    few, many = sample(2), sample(4)
    assert few == many, many


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [0, 3])
def test_an_evaluation_of_the_flow_of_a_likelihood_does_not_wait(classes: int, precision: str) -> None:
    def evaluate(times: int, denoiser: Denoiser) -> None:
        x = torch.randn(3, 2, 4, 4, dtype=torch.float64).to(CUDA)
        label = torch.zeros(3, dtype=torch.int64, device=CUDA) if classes else None
        probes = torch.ones(1, 3, 2, 4, 4, dtype=torch.float64).to(CUDA)
        flow = _Flow(BoundDenoiser(denoiser, label), x.shape, probes)
        state = torch.nn.functional.pad(x.flatten(1), (0, 1))
        for _ in range(times):
            flow(torch.tensor(1.5, dtype=torch.float64), state)

    few, many = (waits_of(small_denoiser(classes), precision, partial(evaluate, times)) for times in (1, 3))
    assert few == many, many


@pytest.mark.parametrize("labelled", [False, True])
def test_the_ideal_denoiser_samples_where_it_was_moved_to(labelled: bool) -> None:
    pool = images(50)
    pool = pool if labelled else Pool(pool.data)
    here = Heun(steps=3)(IdealDenoiser(pool, VE()), shape=pool.shape, seeds=range(3))
    with PretendGPU() as gpu:
        there = Heun(steps=3)(IdealDenoiser(pool, VE()).to(CUDA), shape=pool.shape, seeds=range(3))
        assert there.x.is_cuda
    assert not gpu.mistakes
    torch.testing.assert_close(on_cpu(there.x), here.x)

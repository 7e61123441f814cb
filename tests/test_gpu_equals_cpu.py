"""On a GPU no public computation mixes devices, and its results are those of the CPU; see `pretend_gpu.gpu`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from noisy_data import images, noisy_batch, seeded
from pretend_gpu import CUDA, PretendGPU, RealGPU, gpu
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stablefield import VE, DSMTarget, KNNTarget, Pool, StableTarget, STFTarget
from stablefield.denoise import Denoiser, Guided, IdealDenoiser, Preconditioned
from stablefield.distributed import Ranks
from stablefield.evaluate import evaluate
from stablefield.evaluate.features import Pixels
from stablefield.evaluate.metrics import FeatureSet
from stablefield.floor import LossFloor, Probes, SquaredError
from stablefield.likelihood import bits_per_dim
from stablefield.networks import MLP
from stablefield.preconditioning import EDMPreconditioning
from stablefield.sample import (
    RK45,
    Ancestral,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
)
from stablefield.stable import Bank

CPU = torch.device("cpu")
POOL = images(200)
DATA = POOL.take(torch.arange(200))


def unlabelled(pool: Pool) -> Pool:
    return replace(pool, labels=None)


def resident(pool: Pool, device: torch.device) -> Pool:
    return pool if device.type == "cpu" else pool.to(device)


def same_on_both(compute: Callable[[torch.device], Any], tolerance: float = 0.0) -> PretendGPU | RealGPU:
    """Require that a computation mixes no devices and gives the same on both; larger blocks may round differently."""
    here = compute(CPU)
    with gpu() as device:
        there = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), compute(CUDA))
    assert not device.mistakes
    tolerance = max(tolerance, device.rounding)
    torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)
    return device


# ---- the target of any training loop

REFERENCES: dict[str, Callable[[torch.device], StableTarget]] = {
    "minibatch": lambda device: StableTarget(),
    "bank": lambda device: StableTarget(Bank(64)),
    "tensor": lambda device: StableTarget(DATA, size=32, labels=POOL.labels),
    "tensor there": lambda device: StableTarget(DATA.to(device), size=32, labels=POOL.labels),
    "transformed": lambda device: StableTarget(DATA, size=32, labels=POOL.labels, transform=lambda x: x.flip(-1)),
    "pool": lambda device: StableTarget(POOL, size=32),
    "pool there": lambda device: StableTarget(resident(POOL, device), size=32),
    "exact": lambda device: StableTarget(POOL, size=None),
    "exact there": lambda device: StableTarget(resident(POOL, device), size=None),
    "stf": lambda device: StableTarget(STFTarget(POOL, 32)),
    "knn": lambda device: StableTarget(KNNTarget(POOL, 8)),
    "dsm": lambda device: StableTarget(DSMTarget()),
}


def stable_targets(stable: StableTarget, labelled: bool, device: torch.device, seeds: range) -> list[Tensor]:
    found = []
    for seed in seeds:
        noisy = noisy_batch(POOL, torch.logspace(-1, 1, 16), seed=seed, labelled=labelled)
        noise, x_t, x, sigma = (value.to(device) for value in (noisy.noise, noisy.x_t, noisy.x, noisy.sigma))
        given = {"index": noisy.index, "label": noisy.label}
        found.append(stable(noise, x_t, x, alpha=1.0, sigma=sigma, **given, generator=seeded(seed)))
    return found


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("make", REFERENCES.values(), ids=REFERENCES)
def test_stable_targets_are_those_of_the_cpu(make: Callable[[torch.device], StableTarget], labelled: bool) -> None:
    same_on_both(lambda device: stable_targets(make(device), labelled, device, range(2)), 1e-6)


@pytest.mark.parametrize("references", ["minibatch", "bank", "tensor", "pool", "exact"])
def test_a_loop_may_make_its_tensors_on_the_gpu_by_default(references: str) -> None:
    make = REFERENCES[references]
    here = stable_targets(make(CPU), True, CPU, range(1))
    with gpu() as device:
        stable = make(CUDA)
        noisy = noisy_batch(POOL, torch.logspace(-1, 1, 16), labelled=True)
        noise, x_t, x, sigma = (value.to(CUDA) for value in (noisy.noise, noisy.x_t, noisy.x, noisy.sigma))
        draws = seeded(0)
        with torch.device(CUDA):
            assert torch.ones(1).is_cuda
            there = stable(noise, x_t, x, alpha=1.0, sigma=sigma, index=noisy.index, label=noisy.label, generator=draws)
        found = there.cpu().clone()
    assert not device.mistakes
    tolerance = max(1e-6, device.rounding)
    torch.testing.assert_close(found, here[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("references", ["minibatch", "bank", "tensor", "tensor there", "pool there", "dsm"])
def test_a_stable_target_waits_once_when_its_arguments_are_checked_no_more(references: str) -> None:
    with PretendGPU() as pretended:
        stable = REFERENCES[references](CUDA)
        stable_targets(stable, False, CUDA, range(stable.checks))
        noisy = noisy_batch(POOL, torch.logspace(-1, 1, 16))
        given = {name: getattr(noisy, name).to(CUDA) for name in ("x", "alpha", "sigma")}
        noise, x_t = noisy.noise.to(CUDA), noisy.x_t.to(CUDA)
        pretended.clear()
        stable(noise, x_t, **given, index=noisy.index, generator=seeded(0))
    assert sum(pretended.waits.values()) == 1, pretended.waits


# ---- the floor of a loss


class Half(nn.Module):
    """A network to examine."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.share * x_t


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_floor_and_excess_of_a_loss_are_those_of_the_cpu(labelled: bool, there: bool) -> None:
    pool = POOL if labelled else unlabelled(POOL)
    few: dict[str, Any] = {"bins": 2, "per_bin": 4, "draws": 3}

    def measure(device: torch.device) -> list[Tensor]:
        data, loss = resident(pool, device) if there else pool, SquaredError(VE())
        floor = LossFloor.measure(data, loss, targets=("dsm", "stf:16"), device=device, **few)
        probes, network = Probes(data, loss, target="stf:16", device=device, **few), Half().to(device)
        found = [*floor.floors.values(), probes.excess(network), probes.denoising_loss(network), probes.floor("stf:16")]
        return [each.values for each in found]

    same_on_both(measure, 1e-7)


# ---- samples and likelihoods


def small_denoiser(classes: int) -> Denoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP(POOL.shape, width=8, layers=1, num_classes=classes)
    return Preconditioned(network, VE(), EDMPreconditioning(), classes).eval()


SAMPLERS: list[Sampler] = [
    Heun(steps=2, churn=20.0),
    Euler(steps=2),
    DPMSolver(steps=3),
    Ancestral(steps=2),
    EulerMaruyama(steps=2),
    ReverseDiffusion(steps=2),
    PredictorCorrector(steps=2, corrections=1),
    RK45(tolerance=1.0),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("guidance", ["none", "label", "weaker network"])
def test_samples_are_those_of_the_cpu(sampler: Sampler, guidance: str) -> None:
    def sample(device: torch.device) -> Tensor:
        denoiser = small_denoiser(0 if guidance == "none" else 3)
        if guidance != "none":
            denoiser = Guided(denoiser, 2.0, small_denoiser(0) if guidance == "weaker network" else None)
        return sampler(denoiser.to(device), shape=POOL.shape, seeds=range(3)).x

    same_on_both(sample)


@pytest.mark.parametrize("sampler", SAMPLERS[:-1], ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("guided", [False, True])
def test_samples_of_the_ideal_denoiser_are_those_of_the_cpu(sampler: Sampler, guided: bool) -> None:
    def sample(device: torch.device) -> Tensor:
        denoiser = IdealDenoiser(POOL if guided else unlabelled(POOL), VE())
        return sampler((Guided(denoiser, 2.0) if guided else denoiser).to(device), shape=POOL.shape, seeds=range(2)).x

    same_on_both(sample, 1e-6)


@pytest.mark.parametrize(("classes", "levels", "probes"), [(0, 256, 1), (3, 256, 2), (3, None, 1)])
def test_likelihoods_are_those_of_the_cpu(classes: int, levels: int | None, probes: int) -> None:
    x, label = POOL.data[:3] if levels else DATA[:3], torch.arange(3) if classes else None

    def bits(device: torch.device) -> Tensor:
        denoiser = small_denoiser(classes).to(device)
        return bits_per_dim(denoiser, x.to(device), num_levels=levels, label=label, probes=probes, tolerance=0.1)

    same_on_both(bits)


# ---- scores


@pytest.mark.parametrize("there", [False, True])
def test_scores_of_samples_are_those_of_the_cpu(there: bool) -> None:
    samples, held_out = images(80, seed=1), images(40, seed=2)

    def scores(device: torch.device) -> list[dict[str, float]]:
        ours, data = (resident(pool, device) if there else pool for pool in (samples, POOL))
        found = evaluate(ours, data, features="pixels", held_out=held_out, ranks=Ranks(device), batch_size=32)
        return [{name: score.mean for name, score in table.scores.items()} for table in found.tables]

    same_on_both(scores, 1e-6)


class PixelsThere(Pixels):
    """Pixels on the GPU."""

    device = CUDA


def test_features_and_their_sums_stay_on_the_gpu_and_are_those_of_the_cpu() -> None:
    blocks = [(index, DATA[index]) for index in torch.arange(200).split(60)]
    here = FeatureSet.compute(Pixels(), blocks, keep=torch.arange(0, 200, 3))
    with PretendGPU() as pretended:
        there = FeatureSet.compute(PixelsThere(), blocks, keep=torch.arange(0, 200, 3))
        assert there.features.is_cuda
        assert there.accumulator is not None
        assert there.accumulator.scatter.is_cuda
        waits = Counter(what for what, _ in pretended.waits.elements())
        assert waits == {"copy to the GPU": len(blocks), "item, bool or equal": len(blocks)}  # data; finite or not
        both = there.statistics.covariance, there.features.cpu()
    assert not pretended.mistakes
    assert torch.equal(there.index, here.index)
    torch.testing.assert_close(both, (here.statistics.covariance, here.features), rtol=1e-12, atol=1e-12)

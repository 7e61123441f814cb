"""Metrics of training agree with independent computations."""

import math

import pytest
import torch

from stablefield import VE, VP, DSMTarget, Flow, Objective, Pool
from stablefield.build import build, build_sampler
from stablefield.config import override, resolve
from stablefield.data import ShuffledBatches
from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.engine import TrainState, train
from stablefield.engine.metrics import HeldOutLoss, MetricsLogger, NoiseBins
from stablefield.engine.tensorboard import samples
from stablefield.objective import EDMWeight
from stablefield.seeding import generator
from stablefield.times import LogNormal, Uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize(("times", "process"), [(LogNormal(), VE()), (Uniform(), VP()), (Uniform(0, 1), Flow())])
def test_noise_bins_are_visited_equally_often_and_cover_all_times(times, process):
    bins = NoiseBins.equally_likely(times, process)
    t = times.draw(80_000, torch.Generator().manual_seed(0))
    sums = bins.sums(t, torch.ones_like(t))
    assert sums[:, 1].sum() == 80_000
    assert (sums[:, 1] / 10_000 - 1).abs().max() < 0.05
    alpha, sigma = process.scales(t)
    level = sigma / alpha
    for name, inside in zip(bins.names, torch.arange(8), strict=True):
        low, high = (float(end) for end in name.split(".."))
        chosen = level[torch.bucketize(t, bins.edges) == inside]
        assert low * 0.99 <= chosen.min()
        assert chosen.max() <= high * 1.01


def test_the_loss_is_the_weighted_mean_of_the_losses_by_noise_level():
    bins = NoiseBins.equally_likely(LogNormal(), VE())
    t, loss = LogNormal().draw(1000), torch.rand(1000)
    sums = bins.sums(t, loss)
    means = bins.means("loss", sums)
    assert means["loss/loss"] == pytest.approx(loss.double().mean().item(), rel=1e-12)
    each = torch.tensor([means[f"loss_by_noise/{name}"] for name in bins.names], dtype=torch.float64)
    assert float((each * sums[:, 1]).sum() / 1000) == pytest.approx(means["loss/loss"], rel=1e-12)
    few = bins.means("loss", bins.sums(t[:1], loss[:1]))
    assert len(few) == 2  # empty ranges have no loss


def test_fraction_dsm_is_the_share_of_augmentations_that_are_not_flips():
    settings = ["augmentation.kind=edm", "training.batch_size=512", "network.channels=4", "target.size=4"]
    components = build(resolve(override({}, settings)))
    logger = MetricsLogger(
        NoiseBins.equally_likely(components.objective.times, components.denoiser.process), Ranks(CPU)
    )
    state = TrainState(components.denoiser)
    for step in train(state, components.objective, components.batches, images=4096):
        logger.add(step, 512)
    assert logger.flush(state)["target/fraction_dsm"] == pytest.approx(1 - 0.88**4, abs=4 * 0.5 / 64)
    plain = Objective(components.objective.times, DSMTarget(), components.objective.weight)
    for step in train(state, plain, ShuffledBatches(components.pool, 8), images=4104):
        logger.add(step, 8)
    assert "target/fraction_dsm" not in logger.flush(state)


class Zero(Denoiser):
    """A denoiser whose output is 0."""

    def __init__(self):
        super().__init__()
        self.process = VE()
        self.num_classes = 0

    def forward(self, x_t, t, label=None, augment_label=None):
        return torch.zeros_like(x_t)


POOL = Pool(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)))
OBJECTIVE = Objective(LogNormal(), DSMTarget(), EDMWeight(0.5))
BINS = NoiseBins.equally_likely(LogNormal(), VE())


def test_held_out_loss_equals_its_closed_form_for_a_denoiser_that_returns_zero():
    found = HeldOutLoss(POOL, OBJECTIVE, BINS, Ranks(CPU), batch_size=7, min_examples=64)(Zero())
    level = (torch.randperm(64, generator=generator(0, "held out")).double() + 0.5) / 64
    t = torch.exp(-1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * level - 1))
    x = POOL.data[torch.arange(64) * 30 // 64].double()
    loss = (4 + t**-2) * x.square().mean(1)
    assert found["held_out/loss"] == pytest.approx(loss.mean().item(), rel=1e-5)


@pytest.mark.parametrize("total", [2, 3])
def test_held_out_examples_are_divided_among_the_ranks(monkeypatch, total):
    whole, sums = HeldOutLoss(POOL, OBJECTIVE, BINS, Ranks(CPU), batch_size=7, min_examples=64)(Zero()), []
    monkeypatch.setattr(Ranks, "all_gather", lambda self, values: sums.append(values) or values)
    for rank in range(total):
        HeldOutLoss(POOL, OBJECTIVE, BINS, Ranks(CPU, rank, total), batch_size=5, min_examples=64)(Zero())
    together = BINS.means("held_out", torch.cat(sums).sum(0))
    assert together == pytest.approx(whole, rel=1e-12)


def test_held_out_loss_is_reproducible_and_lowest_for_the_ideal_denoiser():
    from stablefield import IdealDenoiser

    held_out_loss = HeldOutLoss(POOL, OBJECTIVE, BINS, Ranks(CPU), batch_size=16, min_examples=256)
    ideal, zero = IdealDenoiser(POOL, VE()), Zero()
    assert held_out_loss(ideal) == held_out_loss(ideal)
    assert held_out_loss(ideal)["held_out/loss"] < 0.2 * held_out_loss(zero)["held_out/loss"]


@pytest.mark.parametrize("total", [2, 3, 5])
def test_each_rank_draws_its_share_of_the_samples(monkeypatch, total):
    settings = ["network.kind=mlp", "network.width=8", "network.layers=1", "sampler.steps=2"]
    config = resolve(override({}, [*settings, "training.conditional=true"]))
    components = build(config)
    arguments = (components.denoiser, build_sampler(config), components.pool.shape)
    whole = samples(*arguments, Ranks(CPU), count=10)
    made = []
    monkeypatch.setattr(
        Ranks, "all_gather", lambda self, values: made.append(values) or values.new_zeros(10, *values.shape[1:])
    )
    for rank in range(total):
        samples(*arguments, Ranks(CPU, rank, total), count=10)
    torch.testing.assert_close(torch.cat(made)[:10], whole)

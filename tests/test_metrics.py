"""What is written about training is what an independent computation says."""

import math

import pytest
import torch

from stablefield import VE, VP, EDMWeight, Flow, LogNormal, Objective, Pool, SingleSample, Uniform
from stablefield.config import override, resolve
from stablefield.data import Shuffled
from stablefield.denoise import Denoiser
from stablefield.engine import TrainState, train
from stablefield.engine.metrics import Bins, HeldOut, Meter
from stablefield.engine.pictures import samples
from stablefield.ranks import Ranks
from stablefield.run import assemble, make_sampler
from stablefield.seeding import generator

CPU = torch.device("cpu")


@pytest.mark.parametrize(("times", "process"), [(LogNormal(), VE()), (Uniform(), VP()), (Uniform(0, 1), Flow())])
def test_ranges_of_the_noise_level_are_visited_equally_often_and_leave_nothing_out(times, process):
    bins = Bins.of(times, process)
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


def test_the_loss_of_all_is_the_mean_of_the_losses_of_the_ranges():
    bins = Bins.of(LogNormal(), VE())
    t, loss = LogNormal().draw(1000), torch.rand(1000)
    sums = bins.sums(t, loss)
    means = bins.means("Loss", sums)
    assert means["Loss/loss"] == pytest.approx(loss.double().mean().item(), rel=1e-12)
    each = torch.tensor([means[f"Loss_by_noise/{name}"] for name in bins.names], dtype=torch.float64)
    assert float((each * sums[:, 1]).sum() / 1000) == pytest.approx(means["Loss/loss"], rel=1e-12)
    few = bins.means("Loss", bins.sums(t[:1], loss[:1]))
    assert len(few) == 2  # ranges that no row was in have no loss


def test_the_share_of_rows_that_keep_their_source_is_that_of_maps_that_are_no_flips():
    settings = ["augmentation.kind=edm", "training.batch_size=512", "network.channels=4", "target.size=4"]
    parts = assemble(resolve(override({}, settings)))
    meter = Meter(Bins.of(parts.objective.times, parts.denoiser.process), Ranks(CPU))
    state = TrainState(parts.denoiser)
    for step in train(state, parts.objective, parts.batches, images=4096):
        meter.add(step, 512)
    assert meter.line(state)["Target/alone"] == pytest.approx(1 - 0.88**4, abs=4 * 0.5 / 64)
    plain = Objective(parts.objective.times, SingleSample(), parts.objective.weight)
    for step in train(state, plain, Shuffled(parts.pool, 8), images=4104):
        meter.add(step, 8)
    assert "Target/alone" not in meter.line(state)


class Nothing(Denoiser):
    """Always answers 0."""

    def __init__(self):
        super().__init__()
        self.process = VE()
        self.label_dim = 0

    def forward(self, x_t, t, label=None, augment_label=None):
        return torch.zeros_like(x_t)


POOL = Pool(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)))
OBJECTIVE = Objective(LogNormal(), SingleSample(), EDMWeight(0.5))
BINS = Bins.of(LogNormal(), VE())


def test_the_loss_on_held_out_images_is_that_of_their_own_targets():
    found = HeldOut(POOL, OBJECTIVE, BINS, Ranks(CPU), batch=7, fewest=64)(Nothing())
    level = (torch.randperm(64, generator=generator(0, "held out")).double() + 0.5) / 64
    t = torch.exp(-1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * level - 1))
    x = POOL.data[torch.arange(64) * 30 // 64].double()
    loss = (4 + t**-2) * x.square().mean(1)
    assert found["Held_out/loss"] == pytest.approx(loss.mean().item(), rel=1e-5)


@pytest.mark.parametrize("total", [2, 3])
def test_held_out_rows_are_shared_by_the_ranks(monkeypatch, total):
    whole, sums = HeldOut(POOL, OBJECTIVE, BINS, Ranks(CPU), batch=7, fewest=64)(Nothing()), []
    monkeypatch.setattr(Ranks, "gather", lambda self, rows: sums.append(rows) or rows)
    for rank in range(total):
        HeldOut(POOL, OBJECTIVE, BINS, Ranks(CPU, rank, total), batch=5, fewest=64)(Nothing())
    together = BINS.means("Held_out", torch.cat(sums).sum(0))
    assert together == pytest.approx(whole, rel=1e-12)


def test_it_is_the_same_loss_every_time_and_the_lowest_for_who_knows_best():
    from stablefield import Ideal

    ask = HeldOut(POOL, OBJECTIVE, BINS, Ranks(CPU), batch=16, fewest=256)
    knows, guesses = Ideal(POOL, VE()), Nothing()
    assert ask(knows) == ask(knows)
    assert ask(knows)["Held_out/loss"] < 0.2 * ask(guesses)["Held_out/loss"]


@pytest.mark.parametrize("total", [2, 3, 5])
def test_each_rank_makes_its_share_of_the_grid(monkeypatch, total):
    settings = ["network.kind=mlp", "network.width=8", "network.layers=1", "sampler.steps=2"]
    config = resolve(override({}, [*settings, "training.conditional=true"]))
    parts = assemble(config)
    ask = (parts.denoiser, make_sampler(config), parts.pool.shape)
    whole = samples(*ask, Ranks(CPU), count=10)
    made = []
    monkeypatch.setattr(Ranks, "gather", lambda self, rows: made.append(rows) or rows.new_zeros(10, *rows.shape[1:]))
    for rank in range(total):
        samples(*ask, Ranks(CPU, rank, total), count=10)
    torch.testing.assert_close(torch.cat(made)[:10], whole)

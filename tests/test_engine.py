"""Training is a function of the seed and the images seen: it can stop anywhere and go on as if it had not."""

import copy

import pytest
import torch

from stablefield import (
    EDM,
    MLP,
    VE,
    EDMWeight,
    FullDataset,
    LogNormal,
    NearestNeighbours,
    Objective,
    Pool,
    Preconditioned,
    ReferenceBatch,
    SingleSample,
    TrainState,
    UNet,
    train,
)
from stablefield.checkpoint import read, save
from stablefield.data import Shuffled
from stablefield.engine import EMA, LearningRate

POOL = Pool(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
TARGETS = [SingleSample(), ReferenceBatch(POOL, 8), FullDataset(POOL), NearestNeighbours(POOL, 5)]


def start(target, label_dim=3):
    torch.manual_seed(1)
    network = MLP((6,), label_dim=label_dim, width=16, layers=2, dropout=0.2)
    state = TrainState(Preconditioned(network, VE(), EDM(), label_dim))
    return state, Objective(LogNormal(), target, EDMWeight())


def same(one: TrainState, other: TrainState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_a_run_that_was_stopped_and_saved_goes_on_bit_for_bit(target, tmp_path):
    options = {"seed": 5, "rate": LearningRate(1e-2, 100), "ema": EMA(100)}
    batches = Shuffled(POOL, 16, seed=5)
    whole, objective = start(target)
    losses = [step.report.loss.item() for step in train(whole, objective, batches, images=16 * 9, **options)]

    first, _ = start(target)
    before = [step.report.loss.item() for step in train(first, objective, batches, images=16 * 4, **options)]
    save(tmp_path / "c.safetensors", first.tensors(), config={}, images=first.images)
    torch.manual_seed(99)  # nothing may depend on what else was drawn
    second, _ = start(target)
    saved = read(tmp_path / "c.safetensors")
    second.restore(saved.tensors, saved.images)
    after = [step.report.loss.item() for step in train(second, objective, batches, images=16 * 9, **options)]

    assert before + after == losses
    assert same(second, whole)


def test_the_order_of_weights_in_memory_survives_a_stop():
    pool = Pool(torch.randn(20, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    objective = Objective(LogNormal(), SingleSample(), EDMWeight())

    def fresh() -> TrainState:
        torch.manual_seed(0)
        network = UNet(pool.shape, channels=8).to(memory_format=torch.channels_last)
        return TrainState(Preconditioned(network, VE(), EDM()))

    whole, first, second = fresh(), fresh(), fresh()
    list(train(whole, objective, Shuffled(pool, 8), images=64))
    list(train(first, objective, Shuffled(pool, 8), images=32))
    second.restore({name: t.clone().contiguous() for name, t in first.tensors().items()}, first.images)
    list(train(second, objective, Shuffled(pool, 8), images=64))
    assert same(second, whole)


def test_a_loop_that_is_left_early_has_counted_what_it_did():
    state, objective = start(SingleSample())
    for step in train(state, objective, Shuffled(POOL, 16), images=10_000):
        if step.images >= 48:
            break
    assert state.images == 48


def test_training_draws_nothing_from_the_global_generator():
    state, objective = start(ReferenceBatch(POOL, 8))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(train(state, objective, Shuffled(POOL, 16), images=64))
    assert torch.equal(torch.rand(1), expected)


def test_every_target_sees_the_same_times_and_noise():
    seen = []
    for target in TARGETS:
        state, objective = start(target)
        seen.append([step.report.t for step in train(state, objective, Shuffled(POOL, 16), images=48)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("size", [7, 40, 100])
def test_each_epoch_shows_everything_once(size):
    batches = Shuffled(POOL, size, seed=3)
    index = torch.cat([batches(images).index for images in range(0, 40 * size, size)])
    for epoch in index.split(40):
        assert epoch.sort().values.tolist() == list(range(40))
    assert not torch.equal(index[:40], index[40:80])


def test_a_batch_is_what_its_index_says():
    batch = Shuffled(POOL, 16)(160)
    assert torch.equal(batch.x, POOL.data[batch.index])
    assert torch.equal(batch.label, POOL.labels[batch.index])


def test_the_average_forgets_half_in_a_half_life():
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(average.weight)
    for step in range(10):
        EMA(half_life=100, ramp_up=1e9).update(average, model, images=1000 + 10 * step, batch=10)
    assert average.weight.item() == pytest.approx(0.5, rel=1e-6)


def test_the_average_starts_as_the_weights_and_slows_down():
    ema = EMA(half_life=1000, ramp_up=0.1)
    assert ema.decay(0, 32) == 0
    assert ema.decay(100, 10) == 0.5  # a tenth of the images seen
    assert ema.decay(10**9, 1000) == 0.5


def test_the_learning_rate_rises_in_a_line_and_stays():
    rate = LearningRate(2.0, 100)
    assert [rate(images) for images in (0, 25, 50, 100, 500)] == [0, 0.5, 1, 2, 2]
    assert LearningRate(2.0)(1) == 2


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    state, objective = start(SingleSample())
    before = copy.deepcopy(state.denoiser.state_dict())
    with torch.no_grad():
        next(state.denoiser.parameters()).fill_(torch.inf)
    broken = copy.deepcopy(state.denoiser.state_dict())
    with pytest.raises(FloatingPointError, match="after 0 images"):
        list(train(state, objective, Shuffled(POOL, 16), images=64))
    assert all(torch.equal(state.denoiser.state_dict()[name], broken[name]) for name in before)
    assert state.images == 0


@pytest.mark.usefixtures("unchecked")
def test_weights_of_another_network_are_refused():
    state, _ = start(SingleSample())
    other = TrainState(Preconditioned(MLP((6,), width=8), VE(), EDM()))
    with pytest.raises(ValueError, match="another network"):
        state.restore(other.tensors(), 0)

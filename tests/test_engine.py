"""Training is a function of the seed and the images seen: it can stop anywhere and go on as if it had not."""

from math import inf

import pytest
import torch

from stablefield import (
    EDM,
    MLP,
    VE,
    Banded,
    EDMWeight,
    FullDataset,
    LogNormal,
    NearestNeighbours,
    Objective,
    Pool,
    Preconditioned,
    PrunedDataset,
    ReferenceBatch,
    SingleSample,
    TrainState,
    UNet,
    train,
)
from stablefield.checkpoint import read, save
from stablefield.data import Shuffled
from stablefield.engine import Descent
from stablefield.schedule import EMA, LearningRate

POOL = Pool(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
MIXED = ((0.3, "reference:8"), (0.6, "full"), (inf, "pruned"))
TARGETS = [
    SingleSample(),
    ReferenceBatch(POOL, 8),
    FullDataset(POOL),
    NearestNeighbours(POOL, 5),
    PrunedDataset(POOL, at_once=50),  # three steps of 16 rows
    Banded(POOL, bands=MIXED, at_once=48),
]


def start(target, label_dim=3):
    torch.manual_seed(1)
    network = MLP((6,), label_dim=label_dim, width=16, layers=2, dropout=0.2)
    state = TrainState(Preconditioned(network, VE(), EDM(), label_dim), emas=[EMA(100), EMA(1000)])
    return state, Objective(LogNormal(), target, EDMWeight())


def same(one: TrainState, other: TrainState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_a_run_that_was_stopped_and_saved_goes_on_bit_for_bit(target, tmp_path):
    options = {"seed": 5, "descent": Descent(LearningRate(1e-2, 100), clip=1.0, micro_batch=5)}
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


@pytest.mark.parametrize(
    "make",
    [
        lambda n: FullDataset(POOL, at_once=n),
        lambda n: PrunedDataset(POOL, at_once=n),
        lambda n: Banded(POOL, bands=MIXED, at_once=n),
    ],
    ids=["full", "pruned", "auto"],
)
def test_how_many_rows_are_answered_at_once_changes_nothing_but_rounding(make):
    losses = []
    for at_once in (1, 16, 40, 10**4):
        state, objective = start(make(at_once))
        steps = train(state, objective, Shuffled(POOL, 16), images=16 * 7, seed=2)
        losses.append(torch.stack([step.report.loss for step in steps]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("at_once", "rows"), [(50, [48] * 3), (31, [16] * 7), (16 * 7, [112]), (10**3, [62 * 16])])
def test_members_pass_once_for_so_many_steps(at_once, rows):
    asked = []

    class Counted(FullDataset):
        def estimate(self, noisy, label, generator):
            asked.append(len(noisy))
            return super().estimate(noisy, label, generator)

    state, objective = start(Counted(POOL, at_once=at_once), label_dim=0)
    list(train(state, objective, Shuffled(Pool(POOL.data), 16), images=16 * 7))
    assert asked == rows


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


class Sometimes(MLP):
    """A network whose answers are not numbers now and then."""

    broken: set[int]
    asked: int

    def forward(self, *question):
        self.asked += 1
        return super().forward(*question) * (torch.nan if self.asked in self.broken else 1)


def sometimes(*broken):
    torch.manual_seed(1)
    network = Sometimes((6,), width=16, layers=2)
    network.broken, network.asked = set(broken), 0
    return TrainState(Preconditioned(network, VE(), EDM())), Objective(LogNormal(), SingleSample(), EDMWeight())


def weights(state):
    return {name: value.clone() for name, value in state.tensors().items() if not name.startswith("steps")}


def test_a_step_whose_gradient_is_not_finite_changes_nothing_but_the_count():
    state, objective = sometimes(3, 4)
    batches, seen, before = Shuffled(Pool(POOL.data), 16), [], weights(state)
    for step in train(state, objective, batches, images=96):
        seen.append((step.taken, state.in_a_row, bool(torch.isfinite(step.gradient_norm))))
        if not step.taken:
            assert all(torch.equal(value, before[name]) for name, value in weights(state).items())
        before = weights(state)
    assert seen == [(True, 0, True)] * 2 + [(False, 1, False), (False, 2, False)] + [(True, 0, True)] * 2
    assert (state.skipped, state.images) == (2, 96)


def test_too_many_skipped_steps_in_a_row_end_the_run_and_no_others_do():
    batches = Shuffled(Pool(POOL.data), 16)
    state, objective = sometimes(*range(1, 100, 2))
    list(train(state, objective, batches, images=16 * 50, descent=Descent(patience=1)))
    assert state.skipped == 25
    state, objective = sometimes(4, 5, 6)
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to 96 images"):
        list(train(state, objective, batches, images=16 * 50, descent=Descent(patience=2)))


def test_rows_through_the_network_at_once_change_nothing_but_rounding():
    def end(micro_batch):
        torch.manual_seed(1)
        state = TrainState(Preconditioned(MLP((6,), label_dim=3, width=16, dropout=0.0), VE(), EDM(), 3))
        objective = Objective(LogNormal(), ReferenceBatch(POOL, 8), EDMWeight())
        descent = Descent(LearningRate(1e-3), micro_batch=micro_batch)
        steps = list(train(state, objective, Shuffled(POOL, 16), images=64, descent=descent))
        return torch.stack([step.report.each for step in steps])

    whole = end(None)
    for micro_batch in (1, 3, 16, 100):
        torch.testing.assert_close(end(micro_batch), whole, rtol=1e-5, atol=1e-6)


def test_a_clipped_gradient_has_the_norm_it_was_given():
    state, objective = start(SingleSample())
    for step in train(state, objective, Shuffled(POOL, 16), images=64, descent=Descent(clip=1e-3)):
        assert step.gradient_norm > 1e-3
        found = torch.nn.utils.get_total_norm([p.grad for p in state.denoiser.parameters()])
        assert found.item() == pytest.approx(1e-3, rel=1e-4)


def test_several_averages_are_each_what_one_alone_would_be():
    alone = {}
    for half_life in (50, 500):
        state, objective = start(SingleSample())
        state = TrainState(state.denoiser, emas=[EMA(half_life)])
        list(train(state, objective, Shuffled(POOL, 16), images=160))
        alone[half_life] = state.average.state_dict()
    state, objective = start(SingleSample())
    state = TrainState(state.denoiser, emas=[EMA(50), EMA(500)])
    list(train(state, objective, Shuffled(POOL, 16), images=160))
    for name, half_life in (("average", 50), ("average-500", 500)):
        found = state.averages[name].state_dict()
        assert all(torch.equal(found[key], value) for key, value in alone[half_life].items())


def test_half_precision_trains_on_float32_weights_and_goes_on_bit_for_bit():
    def fresh():
        torch.manual_seed(1)
        network = UNet((1, 8, 8), channels=8)
        return TrainState(Preconditioned(network, VE(), EDM()), precision=torch.bfloat16)

    pool = Pool(torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    objective, batches = Objective(LogNormal(), ReferenceBatch(pool, 8), EDMWeight()), Shuffled(pool, 8)
    whole, first, second = fresh(), fresh(), fresh()
    losses = [step.report.loss for step in train(whole, objective, batches, images=64)]
    exact = [step.report.loss for step in train(TrainState(fresh().denoiser), objective, batches, images=64)]
    assert all(p.dtype == torch.float32 for p in whole.denoiser.parameters())
    assert not torch.equal(torch.stack(losses), torch.stack(exact))  # it was bfloat16
    torch.testing.assert_close(torch.stack(losses), torch.stack(exact), rtol=0.05, atol=0)
    list(train(first, objective, batches, images=32))
    second.restore(first.tensors(), first.images)
    list(train(second, objective, batches, images=64))
    assert same(second, whole)


def test_the_learning_rate_falls_as_it_is_told():
    rate = LearningRate(2.0, ramp=100, decay="inverse-sqrt", decay_from=1000)
    assert [rate(images) for images in (50, 1000, 4000)] == [1.0, 2.0, 1.0]
    rate = LearningRate(2.0, decay="cosine", decay_from=1000, until=3000)
    assert [rate(images) for images in (1000, 2000, 3000, 9000)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    for wrong in ({"decay": "inverse-sqrt"}, {"decay": "cosine"}, {"decay": "cosine", "decay_from": 9, "until": 9}):
        with pytest.raises(ValueError, match=r"decay_from|cosine"):
            LearningRate(1.0, **wrong)


@pytest.mark.usefixtures("unchecked")
def test_weights_of_another_network_are_refused():
    state, _ = start(SingleSample())
    other = TrainState(Preconditioned(MLP((6,), width=8), VE(), EDM()))
    with pytest.raises(ValueError, match="another network"):
        state.restore(other.tensors(), 0)

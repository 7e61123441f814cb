"""Training is a function of the seed and the images seen: it can stop anywhere and resumes bit for bit."""

import copy
from dataclasses import replace

import pytest
import torch

from stablefield import (
    VE,
    DSMTarget,
    ExactTarget,
    KNNTarget,
    Objective,
    Pool,
    Preconditioned,
    STFTarget,
    TrainState,
    train,
)
from stablefield.checkpoint import read, save
from stablefield.data import ShuffledBatches
from stablefield.engine import Optimization, loop
from stablefield.networks import MLP, UNet
from stablefield.objective import EDMWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.schedule import EMA, LearningRate
from stablefield.targets import Prefetched
from stablefield.times import LogNormal

POOL = Pool(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
TARGETS = [
    DSMTarget(),
    STFTarget(POOL, 8),
    ExactTarget(POOL, missing_mass=0.0),
    KNNTarget(POOL, 5),
    Prefetched(ExactTarget(POOL), 50),  # three steps of 16 examples
    STFTarget(POOL, 8, references="recent", order=ShuffledBatches(POOL, 16, seed=5)),
]


def start(target, num_classes=3):
    torch.manual_seed(1)
    network = MLP((6,), num_classes=num_classes, width=16, layers=2, dropout=0.2)
    state = TrainState(Preconditioned(network, VE(), EDMPreconditioning(), num_classes), emas=[EMA(100), EMA(1000)])
    return state, Objective(LogNormal(), target, EDMWeight())


def same(one: TrainState, other: TrainState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_a_saved_run_resumes_bit_for_bit_with_every_target(target, tmp_path):
    options = {"seed": 5, "optimization": Optimization(LearningRate(1e-2, 100), gradient_clip=1.0, micro_batch_size=5)}
    batches = ShuffledBatches(POOL, 16, seed=5)
    whole, objective = start(target)
    losses = [step.report.loss.item() for step in train(whole, objective, batches, images=16 * 9, **options)]

    first, _ = start(target)
    before = [step.report.loss.item() for step in train(first, objective, batches, images=16 * 4, **options)]
    save(tmp_path / "c.safetensors", first.tensors(), config={}, images=first.images)
    torch.manual_seed(99)  # training must not depend on the global generator
    second, _ = start(target)
    saved = read(tmp_path / "c.safetensors")
    second.restore(saved.tensors, saved.images)
    after = [step.report.loss.item() for step in train(second, objective, batches, images=16 * 9, **options)]

    assert before + after == losses
    assert same(second, whole)


@pytest.mark.parametrize("missing_mass", [0.0, 1e-8])
def test_prefetching_targets_changes_nothing_but_rounding(missing_mass):
    losses = []
    for examples in (1, 16, 40, 10**4):
        state, objective = start(Prefetched(ExactTarget(POOL, missing_mass=missing_mass), examples))
        steps = train(state, objective, ShuffledBatches(POOL, 16), images=16 * 7, seed=2)
        losses.append(torch.stack([step.report.loss for step in steps]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("examples", "counts"), [(50, [48] * 3), (31, [16] * 7), (16 * 7, [112]), (10**3, [62 * 16])])
def test_prefetched_targets_of_several_steps_are_computed_in_one_call(examples, counts):
    seen = []

    class Counted(ExactTarget):
        def average(self, noisy, index, label, seed):
            seen.append(len(noisy))
            return super().average(noisy, index, label, seed)

    state, objective = start(Prefetched(Counted(POOL, missing_mass=0.0), examples), num_classes=0)
    list(train(state, objective, ShuffledBatches(Pool(POOL.data), 16), images=16 * 7))
    assert seen == counts


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_making_several_batches_at_once_changes_no_bit_and_asks_for_none_beyond_the_end(at_once, monkeypatch):
    class Counted(ShuffledBatches):
        def __call__(self, images):
            asked.append(images)
            return super().__call__(images)

    def run():
        state, objective = start(STFTarget(POOL, 8))
        batches = Counted(POOL, 16, seed=5)
        return state, [step.report.loss.item() for step in train(state, objective, batches, images=16 * 7 - 3)]

    asked = []
    whole, losses = run()
    assert asked == list(range(0, 16 * 7, 16))
    monkeypatch.setattr(loop, "_steps_in_cache", lambda x: at_once)
    other, others = run()
    assert asked == 2 * list(range(0, 16 * 7, 16))
    assert losses == others
    assert same(whole, other)


def test_an_error_in_a_batch_that_is_made_in_advance_is_raised_when_its_step_comes():
    class Broken(ShuffledBatches):
        def __call__(self, images):
            if images == 16 * 5:
                raise OSError("unreadable")
            return super().__call__(images)

    state, objective = start(DSMTarget())
    with pytest.raises(OSError, match="unreadable"):
        list(train(state, objective, Broken(POOL, 16), images=16 * 9))
    assert state.images == 16 * 4


def test_parameters_that_the_optimizer_holds_beside_the_model_accumulate_no_gradient():
    class Scaled(EDMWeight):
        def __call__(self, process, t):
            return super().__call__(process, t) * scale

    scale, gradients = torch.nn.Parameter(torch.ones(())), []
    state, objective = start(DSMTarget())
    state.optimizer = torch.optim.SGD([*state.denoiser.parameters(), scale], lr=1e-3)
    for step in train(state, replace(objective, weight=Scaled()), ShuffledBatches(POOL, 16), images=16 * 4):
        gradients.append((scale.grad.item(), step.report.loss.item()))
    # the loss is proportional to the scale, which stays near 1
    assert all(gradient == pytest.approx(loss, rel=0.02) for gradient, loss in gradients)


def test_large_batches_are_made_one_by_one():
    small, large = torch.empty(64, 1, 8, 8), torch.empty(512, 3, 32, 32)
    assert [loop._steps_in_cache(x) for x in (small, large, small.to("meta"))] == [16, 1, 1]


def test_a_run_with_channels_last_weights_resumes_bit_for_bit():
    pool = Pool(torch.randn(20, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    objective = Objective(LogNormal(), DSMTarget(), EDMWeight())

    def fresh() -> TrainState:
        torch.manual_seed(0)
        network = UNet(pool.shape, channels=8).to(memory_format=torch.channels_last)
        return TrainState(Preconditioned(network, VE(), EDMPreconditioning()))

    whole, first, second = fresh(), fresh(), fresh()
    list(train(whole, objective, ShuffledBatches(pool, 8), images=64))
    list(train(first, objective, ShuffledBatches(pool, 8), images=32))
    second.restore({name: t.clone().contiguous() for name, t in first.tensors().items()}, first.images)
    list(train(second, objective, ShuffledBatches(pool, 8), images=64))
    assert same(second, whole)


def test_a_loop_that_is_left_early_has_counted_its_images():
    state, objective = start(DSMTarget())
    for step in train(state, objective, ShuffledBatches(POOL, 16), images=10_000):
        if step.images >= 48:
            break
    assert state.images == 48


def test_training_does_not_change_the_global_generator():
    state, objective = start(STFTarget(POOL, 8))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(train(state, objective, ShuffledBatches(POOL, 16), images=64))
    assert torch.equal(torch.rand(1), expected)


def test_every_target_sees_the_same_times_and_noise():
    seen = []
    for target in TARGETS:
        state, objective = start(target)
        seen.append([step.report.t for step in train(state, objective, ShuffledBatches(POOL, 16), images=48)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("size", [7, 40, 100])
def test_each_epoch_contains_every_data_point_once(size):
    batches = ShuffledBatches(POOL, size, seed=3)
    index = torch.cat([batches(images).index for images in range(0, 40 * size, size)])
    for epoch in index.split(40):
        assert epoch.sort().values.tolist() == list(range(40))
    assert not torch.equal(index[:40], index[40:80])


def test_a_batch_contains_the_data_points_of_its_index():
    batch = ShuffledBatches(POOL, 16)(160)
    assert torch.equal(batch.x, POOL.data[batch.index])
    assert torch.equal(batch.label, POOL.labels[batch.index])


def test_the_influence_of_a_step_on_the_average_halves_in_a_half_life():
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(average.weight)
    for step in range(10):
        weights = [list(each.parameters()) for each in (average, model)]
        EMA(half_life=100, rampup_ratio=1e9).update(*weights, images=1000 + 10 * step, batch_size=10)
    assert average.weight.item() == pytest.approx(0.5, rel=1e-6)


def test_the_half_life_is_a_share_of_the_images_seen_during_rampup():
    ema = EMA(half_life=1000, rampup_ratio=0.1)
    assert ema.decay(0, 32) == 0
    assert ema.decay(100, 10) == 0.5  # a tenth of the images seen
    assert ema.decay(10**9, 1000) == 0.5


def test_the_learning_rate_rises_linearly_and_stays_at_its_peak():
    rate = LearningRate(2.0, 100)
    assert [rate(images) for images in (0, 25, 50, 100, 500)] == [0, 0.5, 1, 2, 2]
    assert LearningRate(2.0)(1) == 2


def test_a_step_has_the_learning_rate_of_the_images_seen_before_it():
    state, objective = start(DSMTarget())
    optimization = Optimization(LearningRate(1.0, warmup=32))
    before = copy.deepcopy(state.denoiser.state_dict())
    steps = train(state, objective, ShuffledBatches(POOL, 16), images=48, optimization=optimization)
    assert next(steps).learning_rate == 0
    assert all(torch.equal(before[name], value) for name, value in state.denoiser.state_dict().items())
    assert [step.learning_rate for step in steps] == [0.5, 1]


class SometimesNaN(MLP):
    """A network whose output is NaN in some of its calls."""

    nan_calls: set[int]
    calls: int

    def forward(self, *arguments):
        self.calls += 1
        return super().forward(*arguments) * (torch.nan if self.calls in self.nan_calls else 1)


def start_with_nan(*nan_calls):
    torch.manual_seed(1)
    network = SometimesNaN((6,), width=16, layers=2)
    network.nan_calls, network.calls = set(nan_calls), 0
    return TrainState(Preconditioned(network, VE(), EDMPreconditioning())), Objective(
        LogNormal(), DSMTarget(), EDMWeight()
    )


def weights(state):
    return {name: value.clone() for name, value in state.tensors().items() if not name.startswith("steps")}


def test_a_step_whose_gradient_is_not_finite_changes_only_the_counts():
    state, objective = start_with_nan(3, 4)
    batches, found, before = ShuffledBatches(Pool(POOL.data), 16), [], weights(state)
    for step in train(state, objective, batches, images=96):
        found.append((step.step_taken, state.skipped_in_a_row, bool(torch.isfinite(step.gradient_norm))))
        if not step.step_taken:
            assert all(torch.equal(value, before[name]) for name, value in weights(state).items())
        before = weights(state)
    assert found == [(True, 0, True)] * 2 + [(False, 1, False), (False, 2, False)] + [(True, 0, True)] * 2
    assert (state.skipped, state.images) == (2, 96)


def test_only_too_many_consecutive_skipped_steps_end_the_run():
    batches = ShuffledBatches(Pool(POOL.data), 16)
    state, objective = start_with_nan(*range(1, 100, 2))
    list(train(state, objective, batches, images=16 * 50, optimization=Optimization(patience=1)))
    assert state.skipped == 25
    state, objective = start_with_nan(4, 5, 6)
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to 96 images"):
        list(train(state, objective, batches, images=16 * 50, optimization=Optimization(patience=2)))


def test_micro_batches_change_only_rounding():
    def losses(micro_batch_size):
        torch.manual_seed(1)
        state = TrainState(
            Preconditioned(MLP((6,), num_classes=3, width=16, dropout=0.0), VE(), EDMPreconditioning(), 3)
        )
        objective = Objective(LogNormal(), STFTarget(POOL, 8), EDMWeight())
        optimization = Optimization(LearningRate(1e-3), micro_batch_size=micro_batch_size)
        steps = list(train(state, objective, ShuffledBatches(POOL, 16), images=64, optimization=optimization))
        return torch.stack([step.report.losses for step in steps])

    whole = losses(None)
    for micro_batch_size in (1, 3, 16, 100):
        torch.testing.assert_close(losses(micro_batch_size), whole, rtol=1e-5, atol=1e-6)


def test_a_clipped_gradient_has_the_norm_that_was_set():
    state, objective = start(DSMTarget())
    for step in train(
        state, objective, ShuffledBatches(POOL, 16), images=64, optimization=Optimization(gradient_clip=1e-3)
    ):
        assert step.gradient_norm > 1e-3
        found = torch.nn.utils.get_total_norm([p.grad for p in state.denoiser.parameters()])
        assert found.item() == pytest.approx(1e-3, rel=1e-4)


def test_each_of_several_averages_equals_the_only_average_of_a_run():
    single = {}
    for half_life in (50, 500):
        state, objective = start(DSMTarget())
        state = TrainState(state.denoiser, emas=[EMA(half_life)])
        list(train(state, objective, ShuffledBatches(POOL, 16), images=160))
        single[half_life] = state.average.state_dict()
    state, objective = start(DSMTarget())
    state = TrainState(state.denoiser, emas=[EMA(50), EMA(500)])
    list(train(state, objective, ShuffledBatches(POOL, 16), images=160))
    for name, half_life in (("average", 50), ("average-500", 500)):
        found = state.averages[name].state_dict()
        assert all(torch.equal(found[key], value) for key, value in single[half_life].items())


def test_half_precision_keeps_float32_weights_and_resumes_bit_for_bit():
    def fresh():
        torch.manual_seed(1)
        network = UNet((1, 8, 8), channels=8)
        return TrainState(Preconditioned(network, VE(), EDMPreconditioning()), precision=torch.bfloat16)

    pool = Pool(torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    objective, batches = Objective(LogNormal(), STFTarget(pool, 8), EDMWeight()), ShuffledBatches(pool, 8)
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


def test_the_learning_rate_decays_as_configured():
    rate = LearningRate(2.0, warmup=100, decay="inverse-sqrt", decay_start=1000)
    assert [rate(images) for images in (50, 1000, 4000)] == [1.0, 2.0, 1.0]
    rate = LearningRate(2.0, decay="cosine", decay_start=1000, total_images=3000)
    assert [rate(images) for images in (1000, 2000, 3000, 9000)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    for wrong in (
        {"decay": "inverse-sqrt"},
        {"decay": "cosine"},
        {"decay": "cosine", "decay_start": 9, "total_images": 9},
    ):
        with pytest.raises(ValueError, match=r"decay_start|cosine"):
            LearningRate(1.0, **wrong)


@pytest.mark.usefixtures("unchecked")
def test_weights_of_another_network_are_refused():
    state, _ = start(DSMTarget())
    other = TrainState(Preconditioned(MLP((6,), width=8), VE(), EDMPreconditioning()))
    with pytest.raises(ValueError, match="another network"):
        state.restore(other.tensors(), 0)

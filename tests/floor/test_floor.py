"""The floor of a loss and the excess over it: agreement with enumeration, closed forms, and what adds up."""

from itertools import permutations

import pytest
import torch
from analytic import PROCESSES
from torch import Tensor, nn

from stablefield import VE, DSMTarget, ExactTarget, Flow, IdealDenoiser, KNNTarget, Pool, STFTarget
from stablefield.denoise import Denoiser
from stablefield.floor import ByNoise, Levels, LossFloor, Probes, SquaredError, edm_loss
from stablefield.floor.exact import exact_posteriors
from stablefield.floor.probes import draw_points
from stablefield.objective import EDMWeight, LikelihoodWeight, MinSNRWeight, Objective, SNRWeight, VelocityWeight
from stablefield.prediction import PREDICTION_TYPES, convert
from stablefield.process import NoisyBatch, Process, per_example
from stablefield.times import LogNormal, LogUniform, Uniform

VE_TABLE = Levels(torch.ones(2), torch.ones(2))
WEIGHTS = [None, EDMWeight(), SNRWeight(), VelocityWeight(), MinSNRWeight(), LikelihoodWeight()]


def cloud(n: int = 40, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(sigma: float) -> SquaredError:
    """The loss at a single noise level, in units of x squared."""
    return SquaredError(Levels(torch.ones(1), torch.tensor([sigma])), reduction="sum")


def enumerated(data: Tensor, noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
    """Posterior mean and trace of the covariance at each x_t, from float64 differences."""
    distance = noisy.x_t[:, None] - per_example(noisy.alpha, noisy.x)[:, None] * data
    log_w = -distance.flatten(2).square().sum(2) / (2 * noisy.sigma[:, None] ** 2)
    w = torch.softmax(log_w, 1)
    mean = w @ data.flatten(1)
    return mean, (w * (data.flatten(1) - mean[:, None]).square().sum(2)).sum(1)


class Shrink(Denoiser):
    """A poor denoiser, to have an excess."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.scale = process, nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x_t, t, label=None, augment_label=None):
        return self.scale * x_t + 0.1


# ---- the floor


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_floor_of_a_finite_set_equals_its_enumeration(process):
    data = cloud()
    loss = SquaredError(process, Uniform(0.01, 0.99), weight=EDMWeight())
    noisy = draw_points(Pool(data), loss, bins=4, per_bin=8)
    mean, variance = enumerated(data, noisy)
    exact = exact_posteriors(Pool(data), noisy)
    torch.testing.assert_close(exact.mean, mean, rtol=1e-9, atol=1e-9)
    floor = LossFloor.measure(data, loss, bins=4, per_bin=8).floors["dsm"]
    wanted = (EDMWeight()(process, noisy.t) * variance / 3).reshape(4, 8)
    assert floor.value == pytest.approx(float(wanted.mean()), rel=1e-6)
    torch.testing.assert_close(floor.by_bin, wanted.mean(1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_the_floor_of_stable_targets_equals_the_enumeration_of_all_draws(size):
    data, loss = cloud(6, 2), at(0.8)
    noisy = draw_points(Pool(data), loss, bins=1, per_bin=8)
    mean, _ = enumerated(data, noisy)
    log_w = -(noisy.x_t[:, None] - data).square().sum(2) / (2 * 0.8**2)
    w = torch.softmax(log_w, 1)
    wanted = torch.zeros(8, dtype=torch.float64)
    draws = list(permutations(range(6), size))
    for drawn in draws:
        for source in range(6):
            support = list(drawn) if source in drawn[:-1] else [*drawn[:-1], source]
            target = torch.softmax(log_w[:, support], 1) @ data[support]
            wanted += w[:, source] * (target - mean).square().sum(1) / len(draws)
    found = LossFloor.measure(data, loss, targets=[f"stf:{size}"], bins=1, per_bin=8, draws=300).floors[f"stf:{size}"]
    error = found.values.mean((0, 1)).std() / 300**0.5
    assert abs(found.value - float(wanted.mean())) <= 4 * float(error) + 1e-12


@pytest.mark.parametrize("neighbours", [1, 3, 39, 40])
@pytest.mark.parametrize("labels", [None, torch.arange(40) % 2])
def test_the_floor_of_knn_targets_is_the_mean_of_their_squared_errors_over_all_sources(neighbours, labels):
    pool, loss = Pool(cloud(), labels), SquaredError(Flow(), Uniform(0.2, 0.8), reduction="sum")
    noisy = draw_points(pool, loss, bins=2, per_bin=4, label_dropout=0.5)
    name = f"knn:{neighbours}"
    found = LossFloor.measure(pool, loss, targets=[name], bins=2, per_bin=4, label_dropout=0.5).floors[name]
    wanted = []
    for row in range(8):
        one = noisy.select(torch.tensor([row]))
        label = -1 if one.label is None else int(one.label)
        subset = cloud() if label == -1 else cloud()[labels == label]
        t, alpha, sigma = (each.expand(len(subset)) for each in (one.t, one.alpha, one.sigma))
        noise, x_t = one.noise.expand_as(subset), one.x_t.expand_as(subset)
        of_every_source = NoisyBatch(subset, noise, t, alpha, sigma, x_t, index=torch.arange(len(subset)))
        target = KNNTarget(Pool(subset), min(neighbours, len(subset)))(of_every_source).mean
        w = torch.softmax(-(x_t - alpha[:, None] * subset).square().sum(1) / (2 * sigma**2), 0)
        wanted.append((w * (target - enumerated(subset, one)[0]).square().sum(1)).sum())
    torch.testing.assert_close(found.values.flatten(), torch.stack(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_the_floor_of_a_gaussian_sample_is_that_of_the_gaussian(dim, sigma):
    data = 0.7 * cloud(50_000, dim)
    found = LossFloor.measure(data, at(sigma), bins=1, per_bin=1000).floors["dsm"]
    wanted = dim * 0.49 * sigma**2 / (0.49 + sigma**2)
    of_sample = (2 / 50_000) ** 0.5 * wanted  # the sample itself differs from its distribution
    assert abs(found.value - wanted) <= 3 * (found.error**2 + of_sample**2) ** 0.5
    assert abs(found.value - wanted) <= 0.02 * wanted


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_the_floor_of_a_sample_of_two_gaussians_is_that_of_the_mixture(dim, sigma):
    std, mean, n = 0.3, torch.full((dim,), 0.6, dtype=torch.float64), 50_000
    sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    data = sign[:, None] * mean + std * cloud(n, dim)
    found = LossFloor.measure(data, at(sigma), bins=1, per_bin=2000).floors["dsm"]
    # E Tr Cov = Tr Cov[x] - Tr Cov[E[x | x_t]], on a grid along the mean; across it the data are Gaussian
    variance, length = std**2 + sigma**2, float(mean.norm())
    y = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    density = sum(torch.exp(-((y - s * length) ** 2) / (2 * variance)) for s in (1, -1))
    posterior = torch.tanh(length * y / variance)
    best = posterior * length + std**2 / variance * (y - posterior * length)
    explained = float((density * best**2).sum() / density.sum())
    wanted = length**2 + std**2 - explained + (dim - 1) * std**2 * sigma**2 / variance
    of_sample = (2 / 50_000) ** 0.5 * wanted  # the sample itself differs from its distribution
    assert abs(found.value - wanted) <= 3 * (found.error**2 + of_sample**2) ** 0.5
    assert abs(found.value - wanted) <= 0.02 * wanted


def test_the_floor_vanishes_at_small_noise_and_is_the_variance_of_the_data_at_large_noise():
    data = cloud()
    assert LossFloor.measure(data, at(1e-3)).floors["dsm"].value < 1e-12
    spread = float((data - data.mean(0)).square().sum(1).mean())
    assert LossFloor.measure(data, at(1e4)).floors["dsm"].value == pytest.approx(spread, rel=1e-3)


def test_stable_targets_have_a_floor_between_that_of_exact_targets_and_of_single_sources():
    floors = LossFloor.measure(cloud(), at(1.0), targets=["dsm", "stf:1", "stf:4", "stf:16", "exact"]).floors
    values = [floors[name].value for name in ("stf:1", "stf:4", "stf:16", "exact")]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0
    assert abs(floors["stf:1"].value - floors["dsm"].value) <= 4 * floors["stf:1"].error
    assert LossFloor.measure(cloud(), at(1.0), targets=["stf:99"]).floors["stf:99"].value == 0.0


def test_each_class_has_a_floor_of_its_own_and_null_labels_that_of_all_data():
    data, labels = cloud(60), torch.arange(60) % 3
    data = data + 2 * labels[:, None]
    loss = at(1.0)
    floor = LossFloor.measure(data, loss, labels=labels, bins=4, per_bin=300, label_dropout=0.25)
    for label, (value, error) in floor.by_class().items():
        subset = data if label == -1 else data[labels == label]
        alone = LossFloor.measure(subset, loss, bins=4, per_bin=300).floors["dsm"]
        assert abs(value - alone.value) <= 4 * (error**2 + alone.error**2) ** 0.5
    assert set(floor.by_class()) == {-1, 0, 1, 2}


def test_mirrored_training_has_the_floor_of_both_images():
    images = torch.randn(20, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = LossFloor.measure(torch.cat([images, images.flip(-1)]), at(1.0)).floors["dsm"]
    mirrored = LossFloor.measure(Pool(images).mirrored(), at(1.0)).floors["dsm"]
    assert mirrored.value == pytest.approx(both.value, rel=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_floor_of_a_prediction_type_is_the_variance_of_its_own_target(prediction_type):
    """On data of one dimension with two values, by drawing targets of that type."""
    data, g = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.Generator().manual_seed(0)
    loss = SquaredError(Flow(), Uniform(0.3, 0.9), prediction_type)
    floor = LossFloor.measure(data, loss, bins=8, per_bin=500).floors["dsm"]
    t = loss.quantile(torch.rand(200_000, generator=g, dtype=torch.float64))
    x = data[torch.randint(2, t.shape, generator=g)]
    noisy = Flow().perturb(x, t, torch.randn(x.shape, generator=g, dtype=torch.float64))
    best = torch.tanh((1 - t) * noisy.x_t[:, 0] / t**2)[:, None]
    as_type = (convert(x0, noisy.x_t, t, Flow(), source="x0", to=prediction_type) for x0 in (best, x))
    wanted = (next(as_type) - next(as_type)).square().mean(1)
    assert abs(floor.value - float(wanted.mean())) <= 4 * (floor.error**2 + float(wanted.var()) / len(t)) ** 0.5


# ---- the excess


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_ideal_denoiser_has_no_excess(process, prediction_type):
    data = cloud()
    ideal = IdealDenoiser(Pool(data), process)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return convert(ideal(x_t, t), x_t, t, process, source="x0", to=prediction_type)

    for weight in WEIGHTS:
        probes = Probes(data, SquaredError(process, Uniform(0.01, 0.99), prediction_type, weight), per_bin=8)
        assert probes.excess(predict).value <= 1e-6 * probes.floor("dsm").value


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_ideal_denoiser_of_float32_data_has_no_excess(process):
    data = cloud().float()
    for weight in WEIGHTS:
        probes = Probes(data, SquaredError(process, Uniform(0.01, 0.99), weight=weight), per_bin=8)
        assert probes.excess(IdealDenoiser(Pool(data), process)).value <= 1e-6 * probes.floor("dsm").value


def test_the_same_network_has_the_same_excess_under_every_target():
    network = Shrink(VE())
    values = {Probes(cloud(), target=target).excess(network).value for target in ("dsm", "stf:8", "exact")}
    assert len(values) == 1


@pytest.mark.parametrize(("process", "times"), [(VE(), LogNormal(-0.5, 0.8)), (Flow(), Uniform(0.1, 0.95))], ids=str)
@pytest.mark.parametrize("target", ["dsm", "stf:4", "exact"])
def test_the_loss_is_the_sum_of_excess_and_floor(process, times, target):
    pool, g = Pool(cloud(30)), torch.Generator().manual_seed(1)
    estimator = {"dsm": DSMTarget(), "stf:4": STFTarget(pool, 4), "exact": ExactTarget(pool, missing_mass=0)}[target]
    objective, network = Objective(times, estimator, EDMWeight()), Shrink(process)
    losses = []
    for _ in range(60):
        index = torch.randint(30, (500,), generator=g)
        losses.append(objective(network, pool.take(index), index=index, generator=g).loss.item())
    losses = torch.tensor(losses, dtype=torch.float64)
    probes = Probes(pool, SquaredError.of_objective(objective, process), target=target, per_bin=1000, draws=64)
    excess, floor = probes.excess(network), probes.floor(target)
    error = (float(losses.var()) / len(losses) + excess.error**2 + floor.error**2) ** 0.5
    assert abs(float(losses.mean()) - excess.value - floor.value) <= 3 * error


def test_the_denoising_loss_of_probes_is_excess_and_floor_too():
    probes = Probes(cloud(), at(1.0), per_bin=2000)
    network = Shrink(VE())
    loss, excess, floor = probes.denoising_loss(network), probes.excess(network), probes.floor()
    assert abs(loss.value - excess.value - floor.value) <= 4 * loss.error


def test_a_network_that_copies_the_training_data_is_seen_at_held_out_probes():
    train, held_out = cloud(200, 2, 0), cloud(200, 2, 1)
    probes = Probes(train, SquaredError(VE(), LogUniform(0.0999, 0.1001)), sources=held_out)
    copies, generalizes = IdealDenoiser(Pool(train), VE()), lambda x_t, t: x_t / (1 + 0.1**2)
    assert probes.excess(copies).value < 1e-12 < probes.excess(generalizes).value
    assert probes.denoising_loss(copies).value > 1.2 * probes.denoising_loss(generalizes).value


def test_probes_depend_on_the_seed_alone_and_parts_of_ranks_make_the_whole():
    network, options = Shrink(VE()), {"bins": 3, "per_bin": 5, "target": "stf:4"}
    whole = Probes(cloud(), **options)
    parts = [Probes(cloud(), part=(rank, 4), **options) for rank in range(4)]
    assert len({len(part.noisy) for part in parts}) == 1
    joined = whole.by_noise(torch.cat([part.errors(network)[0] for part in parts]))
    torch.testing.assert_close(joined.values, whole.excess(network).values)
    floors = whole.by_noise(torch.cat([part.floors("stf:4") for part in parts]))
    assert floors.value == pytest.approx(whole.floor("stf:4").value, rel=1e-9)
    assert torch.equal(whole.noisy.x_t, Probes(cloud(), **options).noisy.x_t)
    assert not torch.equal(whole.noisy.x_t, Probes(cloud(), seed=1, **options).noisy.x_t)


def test_a_table_of_levels_gives_integer_steps_and_the_floor_of_its_process():
    t = torch.linspace(0.05, 0.95, 400, dtype=torch.float64)
    levels, data, seen = Levels(*Flow().scales(t)), cloud(), []

    def predict(x_t: Tensor, step: Tensor) -> Tensor:
        seen.append(step)
        return torch.zeros_like(x_t)

    probes = Probes(data, SquaredError(levels, prediction_type="velocity"), per_bin=500)
    probes.excess(predict)
    assert all(step.dtype == torch.int64 for step in seen)
    continuous = LossFloor.measure(data, SquaredError(Flow(), Uniform(0.05, 0.95), "velocity"), per_bin=500)
    found, wanted = probes.floor(), continuous.floors["dsm"]
    assert abs(found.value - wanted.value) <= 4 * (found.error**2 + wanted.error**2) ** 0.5


def test_a_network_with_labels_is_given_them():
    data, labels = cloud(), torch.arange(40) % 2
    ideal = IdealDenoiser(Pool(data, labels), VE())
    probes = Probes(data, labels=labels, label_dropout=0.3)
    assert probes.excess(ideal).value <= 1e-9 * probes.floor().value
    assert (probes.noisy.label == -1).any()


def test_edms_noise_and_weight_are_the_same_for_every_process():
    values = [LossFloor.measure(cloud(), edm_loss(process), per_bin=300).floors["dsm"] for process in PROCESSES]
    for value in values[1:]:
        assert abs(value.value - values[0].value) <= 4 * (value.error**2 + values[0].error ** 2) ** 0.5


@pytest.mark.parametrize("loss", [at(1.0), SquaredError(VE(), LogUniform(0.1, 10.0))], ids=["one level", "trend"])
def test_standard_errors_are_those_of_independent_seeds(loss):
    found = [LossFloor.measure(cloud(), loss, seed=seed, bins=2, per_bin=32).floors["dsm"] for seed in range(60)]
    spread = torch.tensor([each.value for each in found]).std()
    mean_error = sum(each.error for each in found) / len(found)
    assert 0.6 < float(spread) / mean_error < 1.4


def test_standard_errors_count_draws_that_all_points_share():
    targets, sizes = ["stf:4"], {"bins": 2, "per_bin": 64, "draws": 6}
    found = [LossFloor.measure(cloud(), at(2.0), seed=s, targets=targets, **sizes).floors["stf:4"] for s in range(40)]
    spread = torch.tensor([each.value for each in found]).std()
    mean_error = sum(each.error for each in found) / len(found)
    assert 0.6 < float(spread) / mean_error < 1.4


# ---- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Probes(cloud(), nn.HuberLoss()), "not for HuberLoss"),
        (lambda: LossFloor.measure(cloud(), nn.L1Loss()), "not for L1Loss"),
        (lambda: SquaredError(prediction_type="x1"), "x1"),
        (lambda: SquaredError(reduction="max"), "reduction must be"),
        (lambda: LossFloor.measure(cloud(), targets=["stf"]), "stf:256"),
        (lambda: LossFloor.measure(cloud(), targets=["knn:0"]), "the k nearest, not 'knn:0'"),
        (lambda: LossFloor.measure(Pool(cloud()), labels=torch.zeros(40)), "a Pool has its own"),
        (lambda: LossFloor.measure([1, 2]), "not list"),
        (lambda: LossFloor.measure(cloud()).by_class(), "unconditional"),
        (lambda: Probes(cloud()).floor("stf:4"), "pass target="),
        (lambda: Probes(cloud(), sources=cloud(5, 2)), "the shape"),
        (lambda: Probes(cloud(), labels=torch.zeros(40, dtype=torch.int64), sources=cloud(5)), "need labels"),
        (lambda: Probes(cloud()).excess(lambda x_t, t: x_t[:, :1]), "returns the shape"),
        (lambda: Levels(torch.ones(2), torch.ones(3)), "vectors"),
        (lambda: Levels(torch.ones(2), torch.tensor([1.0, torch.inf])), "finite"),
        (
            lambda: LossFloor.measure(cloud(), SquaredError(Levels(torch.ones(2), torch.ones(2)), None, "velocity")),
            "Flow",
        ),
    ],
)
def test_mistakes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_by_noise_has_the_mean_of_its_values():
    values = torch.arange(12.0).reshape(2, 3, 2)
    found = ByNoise(values, torch.tensor([0.0, 1.0, 2.0]))
    assert float(found) == found.value == 5.5
    assert found.by_bin.tolist() == [2.5, 8.5]
    assert LogUniform().low < found.error

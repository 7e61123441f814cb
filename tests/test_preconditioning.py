"""Laws of preconditioning, guidance and loss weights, agreement with published networks, and that all of it trains."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import PROCESSES, Gaussian
from safetensors.torch import load_file
from torch import nn

from stablefield import (
    VE,
    VP,
    Cosine,
    Denoiser,
    DSMTarget,
    Flow,
    Guided,
    Heun,
    KNNTarget,
    Objective,
    Pool,
    Preconditioned,
    STFTarget,
    SubVP,
    TargetEstimator,
    posterior,
)
from stablefield.networks import MLP
from stablefield.objective import (
    EDMWeight,
    LikelihoodWeight,
    LossWeight,
    MinSNRWeight,
    PredictionWeight,
    SNRWeight,
    VelocityWeight,
)
from stablefield.preconditioning import (
    EDMPreconditioning,
    IDDPMPreconditioning,
    NoPreconditioning,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
    iddpm_noise_levels,
)
from stablefield.prediction import PREDICTION_TYPES, coefficients, convert
from stablefield.targets import ExactTarget
from stablefield.times import LogitNormal, LogNormal, LogUniform, TimeDistribution, Uniform

LEVELS = torch.tensor([0.03, 0.2, 1.0, 5.0, 70.0], dtype=torch.float64)


def exact_target(pool: Pool) -> TargetEstimator:
    """The exact target over all data, with nothing dropped."""
    return ExactTarget(pool, missing_mass=0.0)


def named(part: object) -> str:
    return type(part).__name__


# --- published networks ----------------------------------------------------------------------------------------------

PUBLISHED = Path(__file__).parent / "data" / "edm"
PRECONDITIONING: dict[str, Preconditioning] = {
    "EDMPrecond": EDMPreconditioning(),
    "VPPrecond": VPPreconditioning(),
    "VEPrecond": VEPreconditioning(),
}
CHURN = {"churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
SAMPLERS = {"heun8": Heun(8), "churn8": Heun(8, churn=2.0, **CHURN), "churn8_capped": Heun(8, churn=40.0, **CHURN)}


@pytest.fixture(params=["ddpmpp-edm", "ddpmpp-vp", "ncsnpp-edm-cond", "ncsnpp-ve"])
def published(request):
    """A network in EDM's format: the denoiser, and its published inputs and outputs."""
    song = pytest.importorskip("stablefield.networks.song")
    folder = PUBLISHED / request.param
    config = json.loads((folder / "config.json").read_text())
    options = config["kwargs"]
    options.pop("model_type")
    options.pop("sigma_data", None)
    shape = (options.pop("img_channels"), *[options.pop("img_resolution")] * 2)
    for part in ("embedding", "encoder", "decoder"):
        options[part] = options.pop(f"{part}_type")
    options["num_classes"] = options.pop("label_dim")
    network = song.SongUNet(shape, **options)
    weights = load_file(folder / "state.safetensors")
    network.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    preconditioning = PRECONDITIONING[config["precond"]]
    denoiser = Preconditioned(network, VE(), preconditioning, options["num_classes"]).eval()
    return denoiser, {key: torch.from_numpy(value) for key, value in np.load(folder / "io.npz").items()}


def disagreement(found, expected):
    """Largest difference of each image over its largest value; the largest of these."""
    return ((found - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)).max()


def test_published_networks_denoise_as_published(published):
    denoiser, io = published
    label = io.get("class_labels")
    if label is not None:
        label = torch.where(label.any(1), label.argmax(1), -1)
    with torch.no_grad():
        found = denoiser(io["x"], io["sigma"], label, io.get("augment_labels"))
    assert disagreement(found, io["denoised"]) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_published_networks_sample_the_same_images(published, name):
    denoiser, io = published
    samples = SAMPLERS[name](denoiser, io["x"].shape[1:], seeds=io["seeds"].tolist())
    assert samples.evaluations == 15
    assert disagreement(samples.x, io[name]) < 5e-6
    if name == "heun8":
        pixels = (samples.x * 127.5 + 128).clip(0, 255).to(torch.uint8)
        assert (pixels != io["heun8_uint8"]).float().mean() < 1e-3


# --- preconditioning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_edm_gives_input_and_target_unit_variance(process):
    alpha, sigma = process.scales(process.time(LEVELS))
    c_skip, c_out, c_in, _ = EDMPreconditioning(0.7)(process, process.time(LEVELS))
    data, noise = 0.7**2, 1.0
    assert torch.allclose(c_in**2 * (alpha**2 * data + sigma**2 * noise), torch.ones_like(LEVELS))
    # the target (x - c_skip x_t) / c_out, of x_t = alpha x + sigma noise
    target = ((1 - c_skip * alpha) ** 2 * data + (c_skip * sigma) ** 2 * noise) / c_out**2
    assert torch.allclose(target, torch.ones_like(LEVELS))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_networks_without_preconditioning_get_input_of_unit_variance(process, prediction_type):
    alpha, sigma = process.scales(process.time(LEVELS))
    c_in = NoPreconditioning(prediction_type, 0.7)(process, process.time(LEVELS))[2]
    assert torch.allclose(c_in**2 * ((alpha * 0.7) ** 2 + sigma**2), torch.ones_like(LEVELS))


def test_published_scalings_are_those_of_the_table():
    sigma = LEVELS
    t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    table = torch.tensor(iddpm_noise_levels(), dtype=torch.float64)
    index = (table - sigma[:, None]).abs().argmin(1)
    one, c_in = torch.ones_like(sigma), 1 / (sigma**2 + 1).sqrt()
    expected = {
        VPPreconditioning(): (one, -sigma, c_in, 999 * t),
        VEPreconditioning(): (one, sigma, one, (sigma / 2).log()),
        IDDPMPreconditioning(): (one, -sigma, c_in, 999 - index.double()),
        EDMPreconditioning(): (
            0.25 / (sigma**2 + 0.25),
            0.5 * sigma / (sigma**2 + 0.25).sqrt(),
            1 / (sigma**2 + 0.25).sqrt(),
            sigma.log() / 4,
        ),
    }
    for preconditioning, numbers in expected.items():
        for found, number in zip(preconditioning(VE(), sigma), numbers, strict=True):
            assert torch.allclose(found, number), preconditioning


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize(
    "preconditioning",
    [EDMPreconditioning(), VPPreconditioning(), VEPreconditioning(), IDDPMPreconditioning()],
    ids=named,
)
def test_a_preconditioning_works_with_every_process_as_for_data_plus_noise(preconditioning, process):
    network = nn.Linear(3, 3).double()
    network.forward = lambda x, c_noise: torch.tanh(x + c_noise[:, None] / 10)
    y = torch.randn(len(LEVELS), 3, dtype=torch.float64)
    t = process.time(LEVELS)
    alpha = process.scales(t)[0]
    found = Preconditioned(network, process, preconditioning)(alpha[:, None] * y, t)
    assert torch.allclose(found, Preconditioned(network, VE(), preconditioning)(y, LEVELS))


def test_noise_ranges_are_the_published_ones():
    assert VEPreconditioning().noise_range == (0.02, 100.0)
    assert VPPreconditioning().noise_range == pytest.approx(
        ((np.exp(19.9e-10 / 2 + 1e-6) - 1) ** 0.5, (np.exp(10.05) - 1) ** 0.5)
    )
    assert EDMPreconditioning().noise_range == (0.0, float("inf"))
    assert IDDPMPreconditioning().noise_range == (iddpm_noise_levels()[999], iddpm_noise_levels()[0])
    assert Preconditioned(nn.Identity(), VE(), VEPreconditioning()).noise_range == (0.02, 100.0)


def test_the_iddpm_table_follows_its_recursion():
    alpha_bar = [np.sin(np.pi * j / (2 * 1000 * 1.008)) ** 2 for j in range(1001)]
    u = [0.0]
    for j in range(1000, 0, -1):
        u.insert(0, ((u[0] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], 0.001) - 1) ** 0.5)
    assert iddpm_noise_levels() == pytest.approx(u, rel=1e-6)


def test_an_iddpm_network_gets_the_position_of_the_nearest_level_and_its_variances_are_ignored():
    given = []

    class Variances(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, c_noise):
            given.append(c_noise)
            return torch.cat([torch.zeros_like(x), torch.full_like(x, 7.0)], 1)

    preconditioning = IDDPMPreconditioning((10.0, 3.0, 1.0, 0.0))
    x = torch.randn(3, 2, 4, 4)
    denoiser = Preconditioned(Variances(), VE(), preconditioning)
    assert torch.equal(denoiser(x, torch.tensor([9.0, 1.9, 1.2])), x)
    assert given[0].tolist() == [2, 0, 0]
    assert denoiser.nearest_time(torch.tensor([9.0, 1.9, 1.2, 0.0])).tolist() == [10, 1, 1, 0]


def test_a_denoiser_without_a_table_supports_every_time():
    t = torch.rand(100, dtype=torch.float64)
    for process in PROCESSES:
        assert torch.equal(Preconditioned(nn.Identity(), process, VPPreconditioning()).nearest_time(t), t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_a_network_without_preconditioning_denoises_as_converting_its_prediction(process, prediction_type):
    network = MLP((3,), width=16, layers=1).double()
    nn.init.normal_(network.leave.weight)
    preconditioning = NoPreconditioning(prediction_type)
    t, x_t = process.time(LEVELS), torch.randn(len(LEVELS), 3, dtype=torch.float64)
    *_, c_in, c_noise = preconditioning(process, t)
    prediction = network(c_in[:, None] * x_t, c_noise)
    by_hand = convert(prediction, x_t, t, process, source=prediction_type, to="x0")
    assert torch.allclose(Preconditioned(network, process, preconditioning)(x_t, t), by_hand)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=named)
def test_scalings_and_weights_of_every_prediction_type_are_finite_where_alpha_is_zero(process, prediction_type):
    preconditioning = NoPreconditioning(prediction_type)
    for dtype in (torch.float32, torch.float64):
        t = torch.ones(2, dtype=dtype)
        assert all(torch.isfinite(number).all() for number in preconditioning(process, t))
        assert torch.isfinite(PredictionWeight(prediction_type)(process, t)).all()
    unbounded = preconditioning.noise_range[1] == float("inf")
    *_, c = coefficients(prediction_type, process, torch.ones(1, dtype=torch.float64))
    assert unbounded == bool(c != 0)


def test_the_representation_of_a_denoiser_names_its_parts():
    denoiser = Preconditioned(nn.Linear(2, 2), VE(), VPPreconditioning(), 3)
    assert f"process={VE()}, preconditioning={VPPreconditioning()}, num_classes=3" in repr(denoiser)
    assert "guidance_scale=2.0, interval=(0.0, inf)" in repr(Guided(denoiser, 2.0))


class Recording(nn.Module):
    """A network that records how it was called."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), []

    def forward(self, x, c_noise, **conditions):
        self.calls.append(conditions)
        return self.weight * x


def test_a_network_is_given_the_label_one_hot_and_the_augmentation_only_where_there_are_any():
    unconditional, conditional = Recording(), Recording()
    x, t, augment_label = torch.zeros(3, 2), torch.ones(3), torch.rand(3, 9, dtype=torch.float64)
    denoiser = Preconditioned(unconditional, VE(), EDMPreconditioning())
    denoiser(x, t)
    denoiser(x, t, augment_label=augment_label)
    assert unconditional.calls[0] == {}
    assert unconditional.calls[1].keys() == {"augment_label"}
    assert torch.equal(unconditional.calls[1]["augment_label"], augment_label.float())
    denoiser = Preconditioned(conditional, VE(), EDMPreconditioning(), 4)
    denoiser(x, t, torch.tensor([3, -1, 0]))
    denoiser(x, t)
    assert [call.keys() for call in conditional.calls] == [{"label_one_hot"}] * 2
    assert conditional.calls[0]["label_one_hot"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not conditional.calls[1]["label_one_hot"].any()


# --- guidance --------------------------------------------------------------------------------------------------------


class Classes(Denoiser):
    """A denoiser with 3 classes that returns the class, or -1 without one."""

    num_classes = 3

    def __init__(self, process=None):
        super().__init__()
        self.process = process or VE()

    def forward(self, x_t, t, label=None, augment_label=None):
        label = torch.full((len(x_t),), -1) if label is None else label
        return label.to(x_t)[:, None].expand_as(x_t)


class Zero(Gaussian):
    def forward(self, x_t, t, label=None, augment_label=None):
        assert label is None
        return torch.zeros_like(x_t)


X, T, LABEL = torch.zeros(3, 2), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 1, 2])


def test_a_guidance_scale_of_one_changes_nothing():
    assert torch.equal(Guided(Classes(), 1.0)(X, T, LABEL), Classes()(X, T, LABEL))


def test_classifier_free_guidance_extrapolates_from_the_unconditional_denoiser():
    found = Guided(Classes(), 3.0)(X, T, LABEL)[:, 0]
    assert found.tolist() == [-1 + 3 * (label + 1) for label in (0, 1, 2)]


def test_autoguidance_extrapolates_from_a_weaker_denoiser():
    found = Guided(Classes(), 3.0, Zero(VE()))(X, T, LABEL)[:, 0]
    assert found.tolist() == [0, 3, 6]


def test_guidance_is_applied_only_in_its_interval():
    found = Guided(Classes(), 3.0, Zero(VE()), (0.1, 1.0))(X, T, LABEL)[:, 0]
    assert found.tolist() == [0, 3, 2]  # the upper end is included
    flow = Flow()
    found = Guided(Classes(flow), 3.0, Zero(flow), (0.5, 5.0))(X, flow.time(T), LABEL)[:, 0]
    assert found.tolist() == [0, 3, 2]


def test_a_guided_denoiser_can_be_sampled_from():
    guided = Guided(Classes(), 2.0, Zero(VE()))
    samples = Heun(5)(guided, (2,), seeds=range(4))
    assert samples.label is not None
    assert torch.allclose(samples.x[:, 0], 2 * samples.label.double(), atol=1e-9)


def test_the_noise_range_of_a_guided_denoiser_is_the_intersection():
    strong = Preconditioned(nn.Linear(2, 2), VE(), VEPreconditioning())
    weak = Preconditioned(nn.Linear(2, 2), VE(), VPPreconditioning())
    assert Guided(strong, 2.0, weak).noise_range == (0.02, 100.0)
    assert Guided(weak, 2.0, strong).noise_range == (0.02, 100.0)


def test_guidance_without_classes_or_with_a_guide_of_another_process_is_refused():
    with pytest.raises(ValueError, match="needs a denoiser with classes"):
        Guided(Gaussian(VE()), 2.0)
    with pytest.raises(ValueError, match="must have the denoiser's process"):
        Guided(Gaussian(VE()), 2.0, Gaussian(VP()))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_weight_of_a_prediction_type_is_a_unit_weight_on_its_error(prediction_type, process):
    t = process.time(LEVELS)
    x_t, one, other = torch.randn(3, len(LEVELS), 4, dtype=torch.float64)
    difference = [convert(x0, x_t, t, process, source="x0", to=prediction_type) for x0 in (one, other)]
    expected = (difference[0] - difference[1]).square().mean(1)
    assert torch.allclose(PredictionWeight(prediction_type)(process, t) * (one - other).square().mean(1), expected)


def test_the_usual_weights_are_those_of_prediction_types():
    t = Flow().time(LEVELS)
    assert torch.allclose(PredictionWeight("velocity")(Flow(), t), VelocityWeight()(Flow(), t))
    assert torch.allclose(PredictionWeight("epsilon")(Flow(), t), SNRWeight()(Flow(), t))
    snr = (VP().scales(t)[0] / VP().scales(t)[1]) ** 2
    assert torch.allclose(PredictionWeight("v")(VP(), t), snr + 1)
    assert torch.allclose(PredictionWeight("x0")(VP(), t), torch.ones_like(t))
    c_out = EDMPreconditioning()(VP(), t)[1]
    assert torch.allclose(EDMWeight()(VP(), t), c_out**-2)


def test_min_snr_is_the_signal_to_noise_ratio_up_to_gamma():
    assert torch.allclose(MinSNRWeight(5.0)(VE(), LEVELS), (1 / LEVELS**2).clamp(max=5.0))


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_the_likelihood_weight_is_the_noise_rate_on_errors_of_the_score(process):
    t = process.time(LEVELS)
    (alpha, sigma), h = process.scales(t), 1e-7 * t
    # the noise that the forward process adds between t - h and t + h
    (alpha_0, sigma_0), (alpha_1, sigma_1) = process.scales(t - h), process.scales(t + h)
    rate = (sigma_1**2 - (alpha_1 / alpha_0 * sigma_0) ** 2) / (2 * h)
    assert torch.allclose(LikelihoodWeight()(process, t), rate * (alpha / sigma**2) ** 2, rtol=1e-3)


def test_the_likelihood_weight_of_vp_is_beta():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    score = PredictionWeight("score")(VP(), t)
    assert torch.allclose(LikelihoodWeight()(VP(), t) / score, 0.1 + 19.9 * t)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    process: object
    times: TimeDistribution
    own: tuple[Preconditioning, LossWeight]


FAMILIES = {
    "VE": Family(VE(), LogUniform(), (VEPreconditioning(), SNRWeight())),
    "VP": Family(VP(), Uniform(), (VPPreconditioning(), SNRWeight())),
    "SubVP": Family(SubVP(), Uniform(), (NoPreconditioning("score"), LikelihoodWeight())),
    "Cosine": Family(Cosine(), Uniform(), (NoPreconditioning("v"), MinSNRWeight())),
    "EDM": Family(VE(), LogNormal(), (EDMPreconditioning(), EDMWeight())),
    "Flow": Family(Flow(), LogitNormal(), (NoPreconditioning("velocity"), VelocityWeight())),
}


def digits():
    """Data like the digits: 17 levels, mostly background, in 4 classes that look alike."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 17, (4, 1, 4, 4), generator=generator)
    strokes = torch.randint(-2, 3, (64, 1, 4, 4), generator=generator)
    labels = torch.arange(64) % 4
    return Pool((prototypes[labels] + strokes).clamp(0, 16).to(torch.uint8), labels, num_levels=17)


POOL = digits()
TARGETS = {
    "DSM": DSMTarget(),
    "STF": STFTarget(POOL, 16),
    "nearest": KNNTarget(POOL, 8),
    "exact": exact_target(POOL),
}


def losses(family, preconditioning, weight, target, steps=20):
    """Losses on one batch, with the same times, noise and references at every step."""
    torch.manual_seed(0)
    denoiser = Preconditioned(MLP((1, 4, 4), width=32, layers=1), family.process, preconditioning)
    objective = Objective(family.times, target, weight)
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    index = torch.arange(32)
    for _ in range(steps):
        loss = objective(denoiser, POOL.take(index), index=index, generator=torch.Generator().manual_seed(1)).loss
        yield float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.usefixtures("unchecked")  # the checks take longer than what they check
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_reduce_the_loss_of_every_family_prediction_type_and_target(family, prediction_type, target):
    family = FAMILIES[family]
    preconditioning, weight = (
        family.own
        if prediction_type == "own"
        else (NoPreconditioning(prediction_type), PredictionWeight(prediction_type))
    )
    curve = list(losses(family, preconditioning, weight, TARGETS[target]))
    assert np.isfinite(curve).all()
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_smallest_with_the_exact_target(family):
    """The loss is the squared distance to the posterior mean plus the variance of the target."""
    family = FAMILIES[family]
    denoiser = Preconditioned(MLP((1, 4, 4), width=32, layers=1), family.process, EDMPreconditioning())
    index = torch.arange(1024) % len(POOL)

    def loss(target):
        objective = Objective(family.times, target, EDMWeight())
        generator = torch.Generator().manual_seed(2)  # the same times and noise for all
        return objective(denoiser, POOL.take(index), index=index, generator=generator).loss.item()

    dsm, stf, exact = (loss(TARGETS[name]) for name in ("DSM", "STF", "exact"))
    assert exact < stf < dsm


class Table(Denoiser):
    """One value per cell of the line, which learns the mean of the target in the cell."""

    process = VE()

    def __init__(self, cells=40, reach=2.0):
        super().__init__()
        self.cells, self.reach = cells, reach
        self.value = nn.Parameter(torch.zeros(cells))

    def cell(self, x_t):
        return ((x_t[:, 0] + self.reach) / (2 * self.reach) * self.cells).long().clamp(0, self.cells - 1)

    def forward(self, x_t, t, label=None, augment_label=None):
        return self.value[self.cell(x_t)][:, None]

    def exact(self, points, sigma):
        """Probability of x_t and the posterior mean in each cell, by quadrature over the line."""
        x_t = torch.linspace(-self.reach, self.reach, 200 * self.cells + 1)[:-1, None] + self.reach / (200 * self.cells)
        density = (-(x_t - points.T).square() / (2 * sigma**2)).exp().sum(1)
        mean = posterior(x_t, points, sigma=sigma).mean[:, 0]
        share, moment = density.view(self.cells, -1).sum(1), (density * mean).view(self.cells, -1).sum(1)
        return share / share.sum(), moment / share


@dataclass(frozen=True)
class Always(TimeDistribution):
    t: float

    def quantile(self, u):
        return torch.full_like(u, self.t)


@pytest.mark.usefixtures("unchecked")  # the checks take longer than what they check
@pytest.mark.parametrize("target", ["DSM", "STF", "exact"])
def test_every_target_trains_the_same_denoiser(target):
    points = torch.tensor([-1.0, -0.7, -0.2, 0.1, 0.15, 0.9])[:, None]
    pool = Pool(points)
    estimator = {"DSM": DSMTarget(), "STF": STFTarget(pool, 3), "exact": exact_target(pool)}[target]
    objective, table = Objective(Always(0.3), estimator, PredictionWeight("x0")), Table()
    optimizer = torch.optim.Adam(table.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
    generator, index = torch.Generator().manual_seed(3), torch.arange(6000) % 6
    for _ in range(200):
        optimizer.zero_grad()
        for part in index.split(1500):  # each with its own references, which are what the targets vary by
            objective(table, points[part], index=part, generator=generator).loss.backward()
        optimizer.step()
        schedule.step()
    share, mean = table.exact(points, 0.3)
    assert (share > 0.01).sum() > 20
    assert torch.allclose(table.value[share > 0.01], mean[share > 0.01], atol=0.02)

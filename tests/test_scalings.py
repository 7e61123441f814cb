"""Laws of what surrounds a network, and agreement with the published ones; weights; and that all of it trains."""

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
    MLP,
    VE,
    VP,
    Cosine,
    Denoiser,
    Flow,
    FullDataset,
    Heun,
    LogitNormal,
    LogNormal,
    LogUniform,
    NearestNeighbours,
    Objective,
    Pool,
    Preconditioned,
    ReferenceBatch,
    SingleSample,
    SubVP,
    Times,
    Uniform,
    convert,
    posterior,
)
from stablefield.denoise import EDM, Guided, IDDPMScaling, Predicts, Scaling, VEScaling, VPScaling, iddpm_levels
from stablefield.objective import EDMWeight, HeadWeight, LikelihoodWeight, MinSNR, NoiseWeight, VelocityWeight, Weight
from stablefield.parametrize import HEADS, coefficients

LEVELS = torch.tensor([0.03, 0.2, 1.0, 5.0, 70.0], dtype=torch.float64)


def named(part: object) -> str:
    return type(part).__name__


# --- published networks ----------------------------------------------------------------------------------------------

PUBLISHED = Path(__file__).parent / "data" / "edm"
PRECONDITIONING: dict[str, Scaling] = {"EDMPrecond": EDM(), "VPPrecond": VPScaling(), "VEPrecond": VEScaling()}
CHURN = {"churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
SAMPLERS = {"heun8": Heun(8), "churn8": Heun(8, churn=2.0, **CHURN), "churn8_capped": Heun(8, churn=40.0, **CHURN)}


@pytest.fixture(params=["ddpmpp-edm", "ddpmpp-vp", "ncsnpp-edm-cond", "ncsnpp-ve"])
def published(request):
    """A network in EDM's format: the denoiser, and what it must answer."""
    song = pytest.importorskip("stablefield.networks.song")
    folder = PUBLISHED / request.param
    config = json.loads((folder / "config.json").read_text())
    options = config["kwargs"]
    options.pop("model_type")
    options.pop("sigma_data", None)
    shape = (options.pop("img_channels"), *[options.pop("img_resolution")] * 2)
    for part in ("embedding", "encoder", "decoder"):
        options[part] = options.pop(f"{part}_type")
    network = song.SongUNet(shape, **options)
    weights = load_file(folder / "state.safetensors")
    network.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    scaling = PRECONDITIONING[config["precond"]]
    denoiser = Preconditioned(network, VE(), scaling, options["label_dim"]).eval()
    return denoiser, {key: torch.from_numpy(value) for key, value in np.load(folder / "io.npz").items()}


def disagreement(found, expected):
    """Largest difference of each image over its largest value; the largest of these."""
    return ((found - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)).max()


def test_published_networks_denoise_as_they_did(published):
    denoiser, answers = published
    label = answers.get("class_labels")
    if label is not None:
        label = torch.where(label.any(1), label.argmax(1), -1)
    with torch.no_grad():
        found = denoiser(answers["x"], answers["sigma"], label, answers.get("augment_labels"))
    assert disagreement(found, answers["denoised"]) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_published_networks_sample_the_same_images(published, name):
    denoiser, answers = published
    samples = SAMPLERS[name](denoiser, answers["x"].shape[1:], seeds=answers["seeds"].tolist())
    assert samples.evaluations == 15
    assert disagreement(samples.x, answers[name]) < 5e-6
    if name == "heun8":
        pixels = (samples.x * 127.5 + 128).clip(0, 255).to(torch.uint8)
        assert (pixels != answers["heun8_uint8"]).float().mean() < 1e-3


# --- scalings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_edm_gives_input_and_target_unit_variance(process):
    alpha, sigma = process.scales(process.time(LEVELS))
    c_skip, c_out, c_in, _ = EDM(0.7)(process, process.time(LEVELS))
    data, noise = 0.7**2, 1.0
    assert torch.allclose(c_in**2 * (alpha**2 * data + sigma**2 * noise), torch.ones_like(LEVELS))
    # the target (x - c_skip x_t) / c_out, of x_t = alpha x + sigma noise
    target = ((1 - c_skip * alpha) ** 2 * data + (c_skip * sigma) ** 2 * noise) / c_out**2
    assert torch.allclose(target, torch.ones_like(LEVELS))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_heads_see_input_of_unit_variance(process, head):
    alpha, sigma = process.scales(process.time(LEVELS))
    c_in = Predicts(head, 0.7)(process, process.time(LEVELS))[2]
    assert torch.allclose(c_in**2 * ((alpha * 0.7) ** 2 + sigma**2), torch.ones_like(LEVELS))


def test_published_scalings_are_those_of_the_table():
    sigma = LEVELS
    t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    table = torch.tensor(iddpm_levels(), dtype=torch.float64)
    index = (table - sigma[:, None]).abs().argmin(1)
    one, c_in = torch.ones_like(sigma), 1 / (sigma**2 + 1).sqrt()
    expected = {
        VPScaling(): (one, -sigma, c_in, 999 * t),
        VEScaling(): (one, sigma, one, (sigma / 2).log()),
        IDDPMScaling(): (one, -sigma, c_in, 999 - index.double()),
        EDM(): (
            0.25 / (sigma**2 + 0.25),
            0.5 * sigma / (sigma**2 + 0.25).sqrt(),
            1 / (sigma**2 + 0.25).sqrt(),
            sigma.log() / 4,
        ),
    }
    for scaling, numbers in expected.items():
        for found, number in zip(scaling(VE(), sigma), numbers, strict=True):
            assert torch.allclose(found, number), scaling


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("scaling", [EDM(), VPScaling(), VEScaling(), IDDPMScaling()], ids=named)
def test_a_scaling_serves_every_process_as_data_plus_noise(scaling, process):
    network = nn.Linear(3, 3).double()
    network.forward = lambda x, c_noise: torch.tanh(x + c_noise[:, None] / 10)
    y = torch.randn(len(LEVELS), 3, dtype=torch.float64)
    t = process.time(LEVELS)
    alpha = process.scales(t)[0]
    found = Preconditioned(network, process, scaling)(alpha[:, None] * y, t)
    assert torch.allclose(found, Preconditioned(network, VE(), scaling)(y, LEVELS))


def test_ranges_are_the_published_ones():
    assert VEScaling().levels == (0.02, 100.0)
    assert VPScaling().levels == pytest.approx(((np.exp(19.9e-10 / 2 + 1e-6) - 1) ** 0.5, (np.exp(10.05) - 1) ** 0.5))
    assert EDM().levels == (0.0, float("inf"))
    assert IDDPMScaling().levels == (iddpm_levels()[999], iddpm_levels()[0])
    assert Preconditioned(nn.Identity(), VE(), VEScaling()).levels == (0.02, 100.0)


def test_the_iddpm_table_follows_its_recursion():
    alpha_bar = [np.sin(np.pi * j / (2 * 1000 * 1.008)) ** 2 for j in range(1001)]
    u = [0.0]
    for j in range(1000, 0, -1):
        u.insert(0, ((u[0] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], 0.001) - 1) ** 0.5)
    assert iddpm_levels() == pytest.approx(u, rel=1e-6)


def test_an_iddpm_network_is_told_the_number_of_the_nearest_level_and_its_variances_are_ignored():
    told = []

    class Variances(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, c_noise):
            told.append(c_noise)
            return torch.cat([torch.zeros_like(x), torch.full_like(x, 7.0)], 1)

    scaling = IDDPMScaling((10.0, 3.0, 1.0, 0.0))
    x = torch.randn(3, 2, 4, 4)
    denoiser = Preconditioned(Variances(), VE(), scaling)
    assert torch.equal(denoiser(x, torch.tensor([9.0, 1.9, 1.2])), x)
    assert told[0].tolist() == [2, 0, 0]
    assert denoiser.nearest(torch.tensor([9.0, 1.9, 1.2, 0.0])).tolist() == [10, 1, 1, 0]


def test_a_denoiser_without_a_table_leaves_times_as_they_are():
    t = torch.rand(100, dtype=torch.float64)
    for process in PROCESSES:
        assert torch.equal(Preconditioned(nn.Identity(), process, VPScaling()).nearest(t), t)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_a_head_as_a_scaling_denoises_as_converting_by_hand(process, head):
    network = MLP((3,), width=16, layers=1).double()
    nn.init.normal_(network.leave.weight)
    scaling = Predicts(head)
    t, x_t = process.time(LEVELS), torch.randn(len(LEVELS), 3, dtype=torch.float64)
    *_, c_in, c_noise = scaling(process, t)
    answer = network(c_in[:, None] * x_t, c_noise)
    by_hand = convert(answer, x_t, t, process, source=head, to="x0")
    assert torch.allclose(Preconditioned(network, process, scaling)(x_t, t), by_hand)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=named)
def test_no_head_answers_with_something_that_is_no_number_where_alpha_is_zero(process, head):
    scaling = Predicts(head)
    for dtype in (torch.float32, torch.float64):
        t = torch.ones(2, dtype=dtype)
        assert all(torch.isfinite(number).all() for number in scaling(process, t))
        assert torch.isfinite(HeadWeight(head)(process, t)).all()
    asks_everywhere = scaling.levels[1] == float("inf")
    *_, c = coefficients(head, process, torch.ones(1, dtype=torch.float64))
    assert asks_everywhere == bool(c != 0)


@pytest.mark.parametrize("make", [lambda: Predicts("noize"), lambda: HeadWeight("noize")])
def test_an_unknown_head_is_refused(make):
    with pytest.raises(ValueError, match="no head is called 'noize'"):
        make()


# --- guidance --------------------------------------------------------------------------------------------------------


class Classes(Denoiser):
    """Knows 3 classes: answers the class's number, or -1 where not told."""

    label_dim = 3

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


def test_guidance_of_strength_one_changes_nothing():
    assert torch.equal(Guided(Classes(), 1.0)(X, T, LABEL), Classes()(X, T, LABEL))


def test_classifier_free_guidance_leads_away_from_the_answer_without_a_class():
    found = Guided(Classes(), 3.0)(X, T, LABEL)[:, 0]
    assert found.tolist() == [-1 + 3 * (label + 1) for label in (0, 1, 2)]


def test_autoguidance_leads_away_from_a_weaker_denoiser():
    found = Guided(Classes(), 3.0, Zero(VE()))(X, T, LABEL)[:, 0]
    assert found.tolist() == [0, 3, 6]


def test_guidance_acts_only_within_its_interval():
    found = Guided(Classes(), 3.0, Zero(VE()), (0.1, 1.0))(X, T, LABEL)[:, 0]
    assert found.tolist() == [0, 3, 2]  # the upper end included
    flow = Flow()
    found = Guided(Classes(flow), 3.0, Zero(flow), (0.5, 5.0))(X, flow.time(T), LABEL)[:, 0]
    assert found.tolist() == [0, 3, 2]


def test_a_guided_denoiser_samples_like_any_other():
    guided = Guided(Classes(), 2.0, Zero(VE()))
    samples = Heun(5)(guided, (2,), seeds=range(4))
    assert samples.label is not None
    assert torch.allclose(samples.x[:, 0], 2 * samples.label.double(), atol=1e-9)


def test_a_guided_denoiser_knows_what_both_know():
    strong = Preconditioned(nn.Linear(2, 2), VE(), VEScaling())
    weak = Preconditioned(nn.Linear(2, 2), VE(), VPScaling())
    assert Guided(strong, 2.0, weak).levels == (0.02, 100.0)
    assert Guided(weak, 2.0, strong).levels == (0.02, 100.0)


def test_guidance_without_a_guide_is_refused():
    with pytest.raises(ValueError, match="cannot guide itself"):
        Guided(Gaussian(VE()), 2.0)
    with pytest.raises(ValueError, match="made for"):
        Guided(Gaussian(VE()), 2.0, Gaussian(VP()))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("head", HEADS)
def test_the_weight_of_a_head_makes_its_own_error_count(head, process):
    t = process.time(LEVELS)
    x_t, one, other = torch.randn(3, len(LEVELS), 4, dtype=torch.float64)
    difference = [convert(x0, x_t, t, process, source="x0", to=head) for x0 in (one, other)]
    expected = (difference[0] - difference[1]).square().mean(1)
    assert torch.allclose(HeadWeight(head)(process, t) * (one - other).square().mean(1), expected)


def test_usual_weights_are_those_of_heads():
    t = Flow().time(LEVELS)
    assert torch.allclose(HeadWeight("velocity")(Flow(), t), VelocityWeight()(Flow(), t))
    assert torch.allclose(HeadWeight("noise")(Flow(), t), NoiseWeight()(Flow(), t))
    snr = (VP().scales(t)[0] / VP().scales(t)[1]) ** 2
    assert torch.allclose(HeadWeight("v")(VP(), t), snr + 1)
    assert torch.allclose(HeadWeight("x0")(VP(), t), torch.ones_like(t))
    c_out = EDM()(VP(), t)[1]
    assert torch.allclose(EDMWeight()(VP(), t), c_out**-2)


def test_min_snr_is_the_signal_to_noise_ratio_up_to_gamma():
    assert torch.allclose(MinSNR(5.0)(VE(), LEVELS), (1 / LEVELS**2).clamp(max=5.0))


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
    score = HeadWeight("score")(VP(), t)
    assert torch.allclose(LikelihoodWeight()(VP(), t) / score, 0.1 + 19.9 * t)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    process: object
    times: Times
    own: tuple[Scaling, Weight]


FAMILIES = {
    "VE": Family(VE(), LogUniform(), (VEScaling(), NoiseWeight())),
    "VP": Family(VP(), Uniform(), (VPScaling(), NoiseWeight())),
    "SubVP": Family(SubVP(), Uniform(), (Predicts("score"), LikelihoodWeight())),
    "Cosine": Family(Cosine(), Uniform(), (Predicts("v"), MinSNR())),
    "EDM": Family(VE(), LogNormal(), (EDM(), EDMWeight())),
    "Flow": Family(Flow(), LogitNormal(), (Predicts("velocity"), VelocityWeight())),
}


def digits():
    """Like digits: 17 levels, mostly background, in 4 classes that look alike."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 17, (4, 1, 4, 4), generator=generator)
    strokes = torch.randint(-2, 3, (64, 1, 4, 4), generator=generator)
    labels = torch.arange(64) % 4
    return Pool((prototypes[labels] + strokes).clamp(0, 16).to(torch.uint8), labels, levels=17)


POOL = digits()
TARGETS = {
    "DSM": SingleSample(),
    "STF": ReferenceBatch(POOL, 16),
    "nearest": NearestNeighbours(POOL, 8),
    "exact": FullDataset(POOL),
}


def losses(family, scaling, weight, target, steps=20):
    """On one batch, with the same times, noise and references at every step."""
    torch.manual_seed(0)
    denoiser = Preconditioned(MLP((1, 4, 4), width=32, layers=1), family.process, scaling)
    objective = Objective(family.times, target, weight)
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    index = torch.arange(32)
    for _ in range(steps):
        loss = objective(denoiser, POOL.take(index), index=index, generator=torch.Generator().manual_seed(1)).loss
        yield float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", [*HEADS, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_reduce_the_loss_of_every_family_with_every_head_and_target(family, head, target):
    family = FAMILIES[family]
    scaling, weight = family.own if head == "own" else (Predicts(head), HeadWeight(head))
    curve = list(losses(family, scaling, weight, TARGETS[target]))
    assert np.isfinite(curve).all()
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_exact_target_the_loss_is_the_smallest(family):
    """The loss is the distance to the posterior mean, and the variance of the target on top."""
    family = FAMILIES[family]
    denoiser = Preconditioned(MLP((1, 4, 4), width=32, layers=1), family.process, EDM())
    index = torch.arange(1024) % len(POOL)

    def loss(target):
        objective = Objective(family.times, target, EDMWeight())
        generator = torch.Generator().manual_seed(2)  # the same times and noise for all
        return objective(denoiser, POOL.take(index), index=index, generator=generator).loss.item()

    dsm, stf, exact = (loss(TARGETS[name]) for name in ("DSM", "STF", "exact"))
    assert exact < stf < dsm


class Table(Denoiser):
    """A number for each cell of the line: what it learns is the target's mean within the cell."""

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
        """Its share of x_t and the posterior mean in each cell, by quadrature over the line."""
        x_t = torch.linspace(-self.reach, self.reach, 200 * self.cells + 1)[:-1, None] + self.reach / (200 * self.cells)
        density = (-(x_t - points.T).square() / (2 * sigma**2)).exp().sum(1)
        mean = posterior(x_t, points, sigma=sigma).mean[:, 0]
        share, moment = density.view(self.cells, -1).sum(1), (density * mean).view(self.cells, -1).sum(1)
        return share / share.sum(), moment / share


@dataclass(frozen=True)
class Always(Times):
    t: float

    def quantile(self, u):
        return torch.full_like(u, self.t)


@pytest.mark.parametrize("target", ["DSM", "STF", "exact"])
def test_a_table_learns_the_same_denoiser_from_every_target(target):
    points = torch.tensor([-1.0, -0.7, -0.2, 0.1, 0.15, 0.9])[:, None]
    pool = Pool(points)
    estimator = {"DSM": SingleSample(), "STF": ReferenceBatch(pool, 3), "exact": FullDataset(pool)}[target]
    objective, table = Objective(Always(0.3), estimator, HeadWeight("x0")), Table()
    optimizer = torch.optim.Adam(table.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    generator, index = torch.Generator().manual_seed(3), torch.arange(6000) % 6
    for _ in range(400):
        optimizer.zero_grad()
        for part in index.split(600):  # each with references of its own: those are what an answer varies by
            objective(table, points[part], index=part, generator=generator).loss.backward()
        optimizer.step()
        schedule.step()
    share, mean = table.exact(points, 0.3)
    assert (share > 0.01).sum() > 20
    assert torch.allclose(table.value[share > 0.01], mean[share > 0.01], atol=0.02)

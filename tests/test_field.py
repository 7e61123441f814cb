"""Laws of the variance laboratory: agreement with the kernel, limits, closed forms, errors that mean what they say."""

import csv
import json
import math
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from stablefield import VE, VP, EDMWeight, FullDataset, LogNormal, Pool, ReferenceBatch, SubVP, posterior
from stablefield.cli import app
from stablefield.config import override, resolve
from stablefield.data import Digits, Summary
from stablefield.evaluate.field import (
    Advice,
    Extent,
    Linear,
    Proposal,
    TwoGaussians,
    measure,
    measure_field,
    normal_errors,
    study_gaussians,
)
from stablefield.evaluate.field.estimate import squared_bias, squared_error
from stablefield.seeding import generator

GAUSSIANS = TwoGaussians(dim=8)


def cloud(n: int = 60, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> Pool:
    found = Digits().load()
    return Pool(found.data, found.labels, found.levels)


# ---- one pass over the data, and every reference batch by looking up


@pytest.mark.parametrize("size", [1, 2, 17, 60])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.0, 100.0])
def test_weights_over_all_data_give_the_targets_of_the_kernel_over_a_support(size, sigma):
    x, g = cloud(), torch.Generator().manual_seed(size)
    y = x[:20] + sigma * torch.randn(20, 4, generator=g, dtype=torch.float64)
    drawn, source = torch.randperm(60, generator=g)[:size], torch.randint(60, (20,), generator=g)
    log_w = torch.log_softmax(-(y[:, None] - x).square().sum(2) / (2 * sigma**2), 1)
    own, free = measure._targets(log_w, x[drawn], drawn, [(source, x[source])])
    for b in range(20):
        others = drawn[:-1] if source[b] not in drawn[:-1] else drawn[drawn != source[b]]
        with_source = posterior(y[b : b + 1], x[others], sigma=sigma, source=x[source[b : b + 1]]).mean
        torch.testing.assert_close(own[b : b + 1], with_source, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(free, posterior(y, x[drawn], sigma=sigma).mean, rtol=1e-9, atol=1e-9)


def test_variances_are_those_of_the_estimators_that_train(digits):
    pool, t, rows = Pool(digits.data, levels=17), levels(0.6, 1.2, 3.0), 16
    found = measure_field(pool, VE(), t, sizes=(64,), rows=256)
    exact, batch, g = FullDataset(pool), ReferenceBatch(pool, 64), torch.Generator().manual_seed(7)
    for i, sigma in enumerate(t.tolist()):
        each = []
        for _ in range(40):
            index = torch.randint(len(pool), (rows,), generator=g)
            x = pool.take(index)
            noisy = VE().perturb(x, torch.full((rows,), sigma), torch.randn(x.shape, generator=g), index=index)
            mean = exact(noisy).mean
            errors = [batch(noisy, generator=g).mean - mean, x - mean]
            each.append(torch.stack([e.double().square().flatten(1).sum(1).mean() for e in errors]))
        each = torch.stack(each)
        for column, estimate in enumerate((found.stable[64].variance, found.dsm)):
            spread = (each[:, column].var() / 40 + estimate.error[i] ** 2).sqrt()
            assert abs(each[:, column].mean() - estimate.value[i]) < 4 * spread


def test_the_ends_of_the_noise_are_known():
    x, n = cloud(), 60
    found = measure_field(Pool(x), VE(), levels(1e-3, 1e4), sizes=(8,), rows=32, draws=4)
    spread = (x - x.mean(0)).square().sum() / n
    for name, ends in {
        "dsm": (0.0, spread),
        "ess_share": (1 / n, 1.0),
        "kl": (math.log(n), 0.0),
        "divergence": ((n - 1) ** 2, 0.0),
        "one_point": (1.0, 0.0),
    }.items():
        torch.testing.assert_close(getattr(found, name).value, levels(*map(float, ends)), rtol=1e-3, atol=1e-5)
    assert found.stable[8].variance.value[0] < 1e-20
    unlike = found.stable[8].without_bias  # at no noise, the nearest of the wrong members
    assert unlike.value[0] > 5 * unlike.error[0]


def test_one_member_is_a_single_sample_and_all_members_are_exact():
    found = measure_field(Pool(cloud()), VE(), levels(0.3, 0.6, 1.0, 3.0), sizes=(1, 60, 61), rows=200, draws=32)
    assert list(found.stable) == [1, 60]
    one = found.stable[1].variance
    assert ((one.value - found.dsm.value).abs() < 4 * one.error).all()
    assert (found.stable[60].variance.value < 1e-24).all()
    assert (found.stable[60].without.value < 1e-24).all()


def test_variance_falls_with_size_and_never_exceeds_a_single_sample(digits):
    found = measure_field(digits, VE(), levels(0.4, 0.8, 1.6, 3.2), sizes=(4, 32, 256), rows=64, draws=8)
    lines = [found.dsm, *(found.stable[n].variance for n in (4, 32, 256))]
    for more, less in pairwise(lines):
        assert (less.value < more.value + 3 * (less.error + more.error)).all()
    assert (found.stable[256].variance.value < 0.5 * found.dsm.value).any()


def test_with_its_source_a_target_has_no_bias_and_without_it_has(digits):
    found = measure_field(digits, VE(), levels(0.4, 0.8, 1.6), sizes=(32,), rows=128, draws=24, seed=3)
    stable = found.stable[32]
    assert (stable.bias.value.abs() < 4 * stable.bias.error).all()
    assert (stable.without_bias.value > 5 * stable.without_bias.error).all()
    assert (stable.without_bias.value < stable.without.value).all()


def test_a_process_is_its_noise_levels():
    x, level = cloud(), levels(0.2, 0.5, 1.5)
    ve = measure_field(Pool(x), VE(), level, sizes=(8,), rows=16, draws=4)
    for process in (VP(), SubVP()):
        other = measure_field(Pool(x), process, process.time(level), sizes=(8,), rows=16, draws=4)
        torch.testing.assert_close(other.dsm.value, ve.dsm.value, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other.stable[8].variance.value, ve.stable[8].variance.value, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other.in_noise(other.dsm).value, ve.in_noise(ve.dsm).value, rtol=1e-8, atol=1e-8)


def test_memory_decides_nothing_but_speed(monkeypatch):
    x = cloud()

    def found():
        return measure_field(Pool(x), VE(), levels(0.4, 1.0), sizes=(8,), rows=20, draws=4)

    whole = found()
    monkeypatch.setattr(measure, "NUMBERS", 7 * 60)
    parts = found()
    for one, other in ((whole.dsm, parts.dsm), (whole.stable[8].without, parts.stable[8].without)):
        torch.testing.assert_close(one.value, other.value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.error, other.error, rtol=1e-10, atol=1e-12)


def test_progress_ends_with_everything_done():
    seen = []
    measure_field(
        Pool(cloud()), VE(), levels(0.4), sizes=(8,), rows=4, draws=3, progress=lambda *news: seen.append(news)
    )
    assert seen[-1] == (60 + 3 * 8, 60 + 3 * 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# ---- classes confine the sources


def test_a_single_class_is_no_condition():
    x = cloud()
    plain = measure_field(Pool(x), VE(), levels(0.5), sizes=(8,), rows=16, draws=4)
    told = measure_field(
        Pool(x, torch.zeros(60, dtype=torch.int64)), VE(), levels(0.5), sizes=(8,), rows=16, draws=4, conditional=True
    )
    assert torch.equal(plain.dsm.value, told.dsm.value)


def test_told_the_class_only_its_members_are_likely():
    x, labels = cloud(), torch.arange(60) % 3
    told = measure_field(
        Pool(x, labels), VE(), levels(1e-3, 0.5, 1e4), sizes=(20, 40), rows=32, draws=4, conditional=True
    )
    assert told.kl.value[0].item() == pytest.approx(math.log(20))
    assert told.ess_share.value[2].item() == pytest.approx(1.0)
    for n in (20, 40):  # a class of 20 has no more to give
        assert (told.stable[n].variance.value < 1e-20).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draws": 2}, "at least 3 draws"),
        ({"rows": 1}, "2 rows"),
        ({"sizes": (0,)}, "at least 1 member"),
        ({"conditional": True}, "no labels"),
        ({"t": levels(0.5, -1.0)}, "above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, said):
    arguments = {"t": levels(0.5), "rows": 4, "draws": 4, "sizes": (2,), **change}
    with pytest.raises(ValueError, match=said):
        measure_field(Pool(cloud()), VE(), arguments.pop("t"), **arguments)


# ---- errors mean what they say


def test_estimates_are_right_on_average_and_their_errors_are_their_spread():
    rows, draws, bias = 24, 8, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        own, shared = (torch.randn(*s, 3, generator=g, dtype=torch.float64) for s in ((rows, draws), (1, draws)))
        errors = (bias + own + 0.5 * shared)[None]
        gram = errors @ errors.mT
        for estimate in (squared_bias(gram), squared_error(gram.diagonal(dim1=2, dim2=3))):
            found += [estimate.value, estimate.error]
    values = torch.cat(found).view(400, 4)
    for column, truth in ((0, bias.square().sum()), (2, bias.square().sum() + 3 * 1.25)):
        mean, spread = values[:, column].mean(), values[:, column].std()
        assert abs(mean - truth) < 4 * spread / 20
        assert 0.8 < values[:, column + 1].square().mean().sqrt() / spread < 1.5  # counted twice at most


# ---- two Gaussians: closed forms


@pytest.mark.parametrize("sigma", [0.03, 0.2, 0.7])
def test_the_mean_is_the_one_that_tweedie_s_formula_gives(sigma):
    y = GAUSSIANS.draw(6, generator(0)) + sigma * torch.randn(6, 8, generator=generator(1), dtype=torch.float64)
    y.requires_grad_()
    (score,) = torch.autograd.grad(GAUSSIANS.log_density(y, sigma).sum(), y)
    torch.testing.assert_close(GAUSSIANS.mean(y, sigma).detach(), (y + sigma**2 * score).detach(), rtol=1e-9, atol=1e-9)


def test_information_falls_by_the_variance_as_noise_grows():
    # Guo, Shamai & Verdu 2005: dI / d(1 / sigma^2) = V / 2
    sigma = levels(0.01, 0.05, 0.1, 0.3, 1.0)
    step = 1e-5 * sigma
    slope = (GAUSSIANS.information(sigma + step) - GAUSSIANS.information(sigma - step)) / (2 * step)
    torch.testing.assert_close(-slope * sigma**3, GAUSSIANS.dsm(sigma), rtol=1e-6, atol=1e-12)


def test_estimates_lie_around_the_closed_forms():
    sigma = levels(0.02, 0.1, 0.2, 0.4)
    study = study_gaussians(GAUSSIANS, sigma, sizes=(8, 256), rows=24, draws=24)
    assert ((study.dsm.value - study.dsm_closed).abs() < 4 * study.dsm.error).all()
    assert ((study.information.value - study.information_closed).abs() < 4 * study.information.error).all()
    for n in (8, 256):
        assert (study.stable[n].value < study.dsm_closed).all()
        assert (study.bias[n].value.abs() < 4 * study.bias[n].error).all()


def test_a_pool_of_draws_shows_the_population_s_variance_where_it_is_dense():
    pool = Pool(GAUSSIANS.draw(3000, generator(5)))
    sigma = levels(0.15, 0.3, 0.8)
    found = measure_field(pool, VE(), sigma, sizes=(64,), rows=400, draws=3)
    assert ((found.dsm.value - GAUSSIANS.dsm(sigma)).abs() < 4 * found.dsm.error + 0.02 * GAUSSIANS.dsm(sigma)).all()
    assert ((found.kl.value - GAUSSIANS.information(sigma)).abs() < 4 * found.kl.error + 0.02).all()


def test_the_limit_is_the_centred_covariance():
    sigma, g = 0.15, generator(2)
    y = GAUSSIANS.draw(1, g) * 0.5 + 0.1 * torch.randn(1, 8, generator=g, dtype=torch.float64)
    x = GAUSSIANS.draw(400_000, g)
    likely = (-(y - x).square().sum(1) / (2 * sigma**2)).exp()
    centred = likely[:, None] * (x - GAUSSIANS.mean(y, sigma))
    by_draws = centred.T @ centred / len(x) / likely.mean() ** 2
    limit = GAUSSIANS.limit(y, sigma)[0]
    assert (by_draws - limit).norm() < 0.02 * limit.norm()
    without_centring = (likely[:, None] * x).T @ (likely[:, None] * x) / len(x) / likely.mean() ** 2
    assert (without_centring - limit).norm() > 0.1 * limit.norm()


def test_errors_become_normal_with_the_limit_s_covariance():
    sigma, g = 0.15, generator(3)
    y = GAUSSIANS.draw(1, g) * 0.5 + 0.1 * torch.randn(1, 8, generator=g, dtype=torch.float64)
    errors = normal_errors(GAUSSIANS, y, sigma, 400, 1500, g)
    below = torch.special.ndtr(errors.sort().values)
    steps = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    assert (below - steps).abs().max() < 1.95 / 1500**0.5  # Kolmogorov and Smirnov, once in a thousand


def test_variance_falls_as_one_over_n_minus_one():
    study = study_gaussians(GAUSSIANS, levels(0.1), sizes=(64, 256, 1024), rows=16, draws=200, seed=1)
    law = [(n - 1) * float(found.value / study.limit.value) for n, found in study.stable.items()]
    assert law == pytest.approx([1, 1, 1], rel=0.25)
    assert abs(law[2] - 1) < 0.12


# ---- a linear denoiser, distances, and what is proposed


@pytest.mark.parametrize("shape", [(6,), (3, 8), (2, 4, 4), (1, 4, 2, 4)])
def test_a_basis_keeps_the_variance_and_white_noise_cannot_be_learnt(shape):
    x = torch.randn(4096, *shape, generator=torch.Generator().manual_seed(0))
    linear = Linear.of(Pool(x))
    assert linear.variances.sum().item() == pytest.approx((x - x.mean(0)).square().sum().item() / 4096, rel=1e-5)
    assert linear.learnable(levels(0.01, 1.0, 30.0)).abs().max() < 0.01


def test_a_mean_over_log_ratios_by_quadrature_is_the_information_and_over_ratios_one():
    for population in (GAUSSIANS, TwoGaussians()):
        for sigma in (0.03, 0.1, 0.7, 3.0):
            closed = float(population.information(levels(sigma)))
            assert population._over_ratio(torch.ones_like, sigma) == pytest.approx(1, abs=1e-9)
            assert population._over_ratio(lambda log_ratio: log_ratio, sigma) == pytest.approx(closed, abs=1e-8)
        # E p(y) / p(y | x) is 1, and powers in closed form are those of the same integral
        assert population._over_ratio(lambda log_ratio: (-log_ratio).exp(), 1.0) == pytest.approx(1, abs=1e-9)
        for power in (1, 2):
            found = population._over_ratio(lambda log_ratio, power=power: (power * log_ratio).exp(), 1.0)
            assert found == pytest.approx(float(population._power(1.0, power)), rel=1e-9)


def test_the_papers_divergence_of_gaussians_is_that_of_many_draws_and_of_many_members():
    sigma, g = levels(0.1, 0.3, 1.0, 3.0), generator(3)
    closed = GAUSSIANS.divergence(sigma)
    study = study_gaussians(GAUSSIANS, sigma, sizes=(4,), rows=4, draws=3)
    assert ((study.divergence.value - closed).abs() < 4 * study.divergence.error).all()
    for level, expected in zip(sigma[2:].tolist(), closed[2:].tolist(), strict=True):
        x = GAUSSIANS.draw(200_000, g)  # the paper's f as it is written, where no draw is too rare to be seen
        y = x + level * torch.randn(x.shape, generator=g, dtype=torch.float64)
        log_given = -(y - x).square().sum(1) / (2 * level**2) - 4 * math.log(2 * math.pi * level**2)
        r = (GAUSSIANS.log_density(y, level) - log_given).exp()
        f = torch.where(r < 1.5, (1 / r - 1).square(), 8 * r / 27 - 1 / 3)
        assert abs(float(f.mean()) - expected) < 4 * float(f.std()) / len(f) ** 0.5
    found = measure_field(Pool(GAUSSIANS.draw(4000, g)), VE(), sigma[1:], sizes=(), rows=256)
    assert ((found.divergence.value - closed[1:]).abs() < 4 * found.divergence.error + 0.02 * closed[1:]).all()


def test_the_papers_divergence_of_gaussians_is_infinite_at_noise_below_their_width():
    edge = (3 * GAUSSIANS.variance) ** 0.5
    found = GAUSSIANS.divergence(levels(0.5 * edge, edge, 1.05 * edge, 2 * edge, 100 * edge))
    assert torch.isinf(found).tolist() == [True, True, False, False, False]
    assert (found[2:].diff() < 0).all()
    with pytest.raises(ValueError, match="at least 4 dimensions, not 2"):
        TwoGaussians(dim=2).divergence(levels(1.0))


def test_a_linear_denoiser_is_the_best_one_of_gaussian_data():
    axes, _ = torch.linalg.qr(cloud(5, 5))
    spread = levels(3.0, 1.0, 0.5, 0.1, 0.02)
    x = (cloud(20_000, 5, seed=1) * spread) @ axes
    level = levels(0.05, 0.5, 2.0)
    exact = torch.stack([(spread**2 * s**2 / (spread**2 + s**2)).sum() for s in level])
    torch.testing.assert_close(Linear.of(Pool(x)).variance(level), exact, rtol=0.03, atol=0)


def test_no_posterior_leaves_more_than_a_linear_denoiser(digits):
    level = levels(0.5, 1.0, 2.0, 5.0, 20.0)
    found = measure_field(digits, VE(), level, sizes=(), rows=64)
    assert (found.dsm.value < Linear.of(digits).variance(level) + 3 * found.dsm.error).all()


def test_distances_are_found_and_copies_are_not_near():
    x = cloud(200, 3)
    x[0], x[1] = 40.0, -40.0
    x[2] = x[3]
    x[4] = x[5] + levels(1e-4, 0, 0)
    distance = torch.cdist(x, x)
    found = Extent.of(Pool(x), rows=200)
    assert found.farthest == pytest.approx(distance.max().item())
    rows = torch.randint(200, (200,), generator=generator(0, "extent")).unique()
    apart = distance[rows].masked_fill(distance[rows] < 1e-6, math.inf)
    assert found.nearest == pytest.approx(apart.min().item(), rel=1e-4)
    with pytest.raises(ValueError, match="all the same"):
        Extent.of(Pool(torch.ones(5, 2)))


def smooth(n: int = 400) -> torch.Tensor:
    """Signals whose spectrum falls, as that of images does."""
    return cloud(n, 64).cumsum(1).unsqueeze(1) / 8


def proposed(x: torch.Tensor) -> Proposal:
    pool = Pool(x)
    return Proposal.of(pool, Summary.of(pool).std, Extent.of(pool), Linear.of(pool))


def test_a_proposal_moves_with_the_units_of_the_data():
    one, other = proposed(smooth()), proposed(smooth() * math.e**2)
    assert other.mean == pytest.approx(one.mean + 2, abs=0.11)
    assert other.std == one.std
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        assert getattr(other, name) == pytest.approx(getattr(one, name) * math.e**2, rel=0.05)


def test_where_nothing_can_be_learnt_the_usual_noise_is_moved_to_the_data():
    white = proposed(2 * cloud(4096, 6))
    assert (white.mean, white.std) == (pytest.approx(-1.2 + math.log(2 / 0.5), abs=0.06), 1.2)
    assert "nothing can be learnt" in white.reasons()[0]


def test_bytes_give_edm_s_least_noise():
    pool = Pool(torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8))
    assert Proposal.of(pool, 0.5, Extent.of(pool), Linear.of(pool)).sigma_min == 0.002


# ---- advice


def advice(pool: Pool, times: LogNormal, level: torch.Tensor, **options) -> Advice:
    found = measure_field(pool, VE(), level, **options)
    return Advice.of(found, VE(), times, EDMWeight(0.75), Linear.of(pool))


def test_advice_reads_off_how_large_a_reference_batch_must_be(digits):
    level = Extent.of(digits).levels(13, VE())
    found = advice(digits, LogNormal(), level, sizes=(64, 256, 1024), rows=48, draws=6)
    size, measured = found.size_for(found.met / found.left[256])
    assert measured
    assert size == pytest.approx(256)
    one, prior = found.phases
    assert one < found.high[0] < found.high[1] < prior
    assert 0.05 < found.share_high < found.share_competing < 0.6
    far, measured = found.size_for(1.5 * found.met / found.left[1024])
    assert not measured
    assert 1024 < far < 1797
    assert found.size_for(1e9)[0] == pytest.approx(1797, rel=1e-3)


def test_sparse_data_at_small_noise_are_promised_nothing():
    pool = Pool(10 * cloud(40, 32))
    found = advice(pool, LogNormal(-2.0, 0.5), levels(0.1, 1.0, 10.0, 40.0), sizes=(8,), rows=16, draws=4)
    assert any("Expect no gain" in line for line in found.lines())
    assert max(found.share_of_loss, found.share_of_levels) < 1e-6
    more = advice(pool, LogNormal(3.0, 0.5), levels(0.1, 1.0, 10.0, 40.0), sizes=(8,), rows=16, draws=4)
    assert not any("Expect no gain" in line for line in more.lines())


# ---- at the terminal


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


QUICK = ("--rows", 8, "--draws", 3, "--levels", 5, "--sizes", "4,32")


@pytest.mark.usefixtures("unchecked")
def test_a_field_is_written_as_table_text_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = command("field", "digits", *QUICK, "--out", "found")
    assert "Of the training noise, LogNormal(mean=-1.2, std=1.2)" in output
    lines = list(csv.DictReader((tmp_path / "found" / "field.csv").open()))
    assert {line["unit"] for line in lines if line["quantity"] == "stf"} == {"x^2", "noise^2 per dimension", "score^2"}
    assert len([line for line in lines if line["quantity"] == "dsm" and line["unit"] == "x^2"]) == 5
    about = json.loads((tmp_path / "found" / "field.json").read_text())
    assert len(about["levels"]) == len(lines)
    assert about["advice"]["left"].keys() == {"4", "32"}
    for name in ("field.png", "bias.png"):
        assert (tmp_path / "found" / name).stat().st_size > 10_000
    again = command("field", "digits", *QUICK, "--out", "again")
    assert again.replace("again", "found") == output


@pytest.mark.usefixtures("unchecked")
def test_any_process_and_classes_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = command("field", "digits", *QUICK, "--conditional", "--set", "process.kind=flow")
    assert "Flow()" in output
    assert "Uniform(" in output
    assert json.loads((tmp_path / "field" / "field.json").read_text())["conditional"] is True


@pytest.mark.usefixtures("unchecked")
def test_two_gaussians_stand_beside_their_closed_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "TwoGaussians(dim=64, offset=0.1, variance=0.0001)" in command("field", "--two-gaussians", *QUICK)
    lines = list(csv.DictReader((tmp_path / "field" / "field.csv").open()))
    told = {"dsm", "dsm_closed_form", "kl", "kl_closed_form", "divergence", "divergence_closed_form", "stf"}
    assert told <= {line["quantity"] for line in lines}
    assert (tmp_path / "field" / "field.png").exists()
    command("field", "--two-gaussians", *QUICK, "--low", "0.01")  # where D is infinite, which JSON has no word for
    about = json.loads((tmp_path / "field" / "field.json").read_text(), parse_constant=pytest.fail)
    closed = [line["value"] for line in about["levels"] if line["quantity"] == "divergence_closed_form"]
    assert closed[0] is None
    assert closed[-1] > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the data"),
        (("digits", "--sizes", "64,x"), "whole numbers"),
        (("digits", "--low", "3", "--high", "2"), "0 < low < high"),
        (("digits", "--two-gaussians"), "stands alone"),
        (("--two-gaussians", "--kind", "digits"), "stands alone"),
        (("--two-gaussians", "--low", "3", "--high", "2"), "0 < low < high"),
        (("--two-gaussians", "--low", "0"), "0 < low < high"),
        (("digits", "--high", "0"), "0 < low < high"),
        (("--kind", "digits"), "name the data too"),
    ],
)
def test_a_field_that_cannot_be_is_refused_in_words(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["field", *arguments])
    assert said in str(result.exception)
    assert not (tmp_path / "field").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_field_is_of_what_training_would_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = (*QUICK[:-1], "1,2,4,8,16,32,64,128")  # more sizes than there are line styles, and the least
    command("field", "digits", *quick, "--set", "data.holdout=100", "--set", "augmentation.kind=mirror")
    about = json.loads((tmp_path / "field" / "field.json").read_text())
    assert about["members"] == 2 * (1797 - 100)
    assert len(about["advice"]["left"]) == 8


@pytest.mark.usefixtures("unchecked")
def test_what_inspect_proposes_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command("data", "inspect", "digits").split()
    settings = [after for word, after in pairwise(words) if word == "--set"]
    config = resolve(override({}, settings))
    assert {setting.partition("=")[0] for setting in settings} >= {"times.mean", "times.std", "grid.sigma_max"}
    assert config["scaling"]["sigma_data"] == 0.75
    assert config.make("grid").sigma_max == pytest.approx(9.6)
    assert (tmp_path / "noise.png").exists()
    (tmp_path / "noise.png").unlink()
    assert "--set" not in command("data", "inspect", "digits", "--no-noise")
    assert not (tmp_path / "noise.png").exists()

"""The variance study: agreement with the kernel, limits, and correct standard errors."""

import csv
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stablefield import VE, VP, Pool, STFTarget, SubVP, posterior
from stablefield.cli import app
from stablefield.config import override, resolve
from stablefield.data import DataSummary, Digits
from stablefield.floor import ByNoise, exact
from stablefield.floor.exact import stable_means
from stablefield.objective import EDMWeight
from stablefield.seeding import generator
from stablefield.studies.field import DataDistances, LinearDenoiser, NoiseProposal, VarianceReport, measure, study
from stablefield.targets import ExactTarget
from stablefield.times import LogNormal


def cloud(n: int = 60, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> Pool:
    pool = Digits().load()
    return Pool(pool.data, pool.labels, pool.num_levels)


# ---- one pass over the data gives the targets of every reference batch


@pytest.mark.parametrize("size", [1, 2, 17, 60])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.0, 100.0])
def test_weights_over_all_data_give_the_targets_of_the_kernel(size, sigma):
    x, g = cloud(), torch.Generator().manual_seed(size)
    y = x[:20] + sigma * torch.randn(20, 4, generator=g, dtype=torch.float64)
    drawn, source = torch.randperm(60, generator=g)[:size], torch.randint(60, (20,), generator=g)
    log_w = torch.log_softmax(-(y[:, None] - x).square().sum(2) / (2 * sigma**2), 1)
    with_source, without = stable_means(log_w, x[drawn], drawn, [(source, x[source])])
    for b in range(20):
        others = drawn[:-1] if source[b] not in drawn[:-1] else drawn[drawn != source[b]]
        expected = posterior(y[b : b + 1], x[others], sigma=sigma, source=x[source[b : b + 1]]).mean
        torch.testing.assert_close(with_source[b : b + 1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(without, posterior(y, x[drawn], sigma=sigma).mean, rtol=1e-9, atol=1e-9)


def test_measured_variances_agree_with_the_target_estimators(digits):
    pool, t, examples = Pool(digits.data, num_levels=17), tensor(0.6, 1.2, 3.0), 16
    found = measure(pool, noise_levels=t, sizes=(64,), examples=256)
    full, batch, g = ExactTarget(pool, missing_mass=0.0), STFTarget(pool, 64), torch.Generator().manual_seed(7)
    for i, sigma in enumerate(t.tolist()):
        means = []
        for _ in range(40):
            index = torch.randint(len(pool), (examples,), generator=g)
            x = pool.take(index)
            noisy = VE().perturb(x, torch.full((examples,), sigma), torch.randn(x.shape, generator=g), index=index)
            mean = full(noisy).mean
            errors = [batch(noisy, generator=g).mean - mean, x - mean]
            means.append(torch.stack([e.double().square().flatten(1).sum(1).mean() for e in errors]))
        means = torch.stack(means)
        for column, estimate in enumerate((found.stf[64].variance, found.dsm)):
            spread = (means[:, column].var() / 40 + estimate.errors_by_bin[i] ** 2).sqrt()
            assert abs(means[:, column].mean() - estimate.by_bin[i]) < 4 * spread


def test_the_limits_of_small_and_large_noise_are_known():
    x, n = cloud(), 60
    found = measure(Pool(x), noise_levels=tensor(1e-3, 1e4), sizes=(8,), examples=32, draws=16)
    spread = (x - x.mean(0)).square().sum() / n
    for name, ends in {
        "dsm": (0.0, spread),
        "ess_share": (1 / n, 1.0),
        "kl": (math.log(n), 0.0),
        "divergence": ((n - 1) ** 2, 0.0),
        "single_source": (1.0, 0.0),
    }.items():
        torch.testing.assert_close(getattr(found, name).by_bin, tensor(*map(float, ends)), rtol=1e-3, atol=1e-5)
    assert found.stf[8].variance.by_bin[0] < 1e-20
    bias = found.stf[8].without_source_squared_bias  # without noise, the target is the nearest of the wrong data points
    assert bias.by_bin[0] > 5 * bias.errors_by_bin[0]


def test_a_support_of_one_is_dsm_and_a_support_of_all_data_is_exact():
    found = measure(Pool(cloud()), noise_levels=tensor(0.3, 0.6, 1.0, 3.0), sizes=(1, 60, 61), examples=200, draws=32)
    assert list(found.stf) == [1, 60]
    one = found.stf[1].variance
    assert ((one.by_bin - found.dsm.by_bin).abs() < 4 * one.errors_by_bin).all()
    assert (found.stf[60].variance.by_bin < 1e-24).all()
    assert (found.stf[60].without_source.by_bin < 1e-24).all()


def test_variance_falls_with_size_and_never_exceeds_that_of_dsm(digits):
    found = measure(digits, noise_levels=tensor(0.4, 0.8, 1.6, 3.2), sizes=(4, 32, 256), examples=64, draws=8)
    lines = [found.dsm, *(found.stf[n].variance for n in (4, 32, 256))]
    for more, less in pairwise(lines):
        assert (less.by_bin < more.by_bin + 3 * (less.errors_by_bin + more.errors_by_bin)).all()
    assert (found.stf[256].variance.by_bin < 0.5 * found.dsm.by_bin).any()


def test_targets_are_unbiased_with_the_source_and_biased_without(digits):
    found = measure(digits, noise_levels=tensor(0.4, 0.8, 1.6), sizes=(32,), examples=128, draws=24, seed=3)
    errors = found.stf[32]
    assert (errors.squared_bias.by_bin.abs() < 4 * errors.squared_bias.errors_by_bin).all()
    assert (errors.without_source_squared_bias.by_bin > 5 * errors.without_source_squared_bias.errors_by_bin).all()
    assert (errors.without_source_squared_bias.by_bin < errors.without_source.by_bin).all()


def test_processes_agree_at_equal_noise_levels():
    x, noise_level = cloud(), tensor(0.2, 0.5, 1.5)
    ve = measure(Pool(x), noise_levels=noise_level, sizes=(8,), examples=16, draws=4)
    for process in (VP(), SubVP()):
        other = measure(Pool(x), process, noise_levels=noise_level, sizes=(8,), examples=16, draws=4)
        torch.testing.assert_close(other.dsm.by_bin, ve.dsm.by_bin, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other.stf[8].variance.by_bin, ve.stf[8].variance.by_bin, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            other.in_noise_units(other.dsm).by_bin, ve.in_noise_units(ve.dsm).by_bin, rtol=1e-8, atol=1e-8
        )


def test_results_do_not_depend_on_the_memory_limit(monkeypatch):
    x = cloud()

    def measured():
        return measure(Pool(x), noise_levels=tensor(0.4, 1.0), sizes=(8,), examples=20, draws=4)

    whole = measured()
    for module in (exact, study):
        monkeypatch.setattr(module, "MAX_ELEMENTS", 7 * 60)
    parts = measured()
    for one, other in ((whole.dsm, parts.dsm), (whole.stf[8].without_source, parts.stf[8].without_source)):
        torch.testing.assert_close(one.by_bin, other.by_bin, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.errors_by_bin, other.errors_by_bin, rtol=1e-10, atol=1e-12)


def test_progress_ends_at_the_total():
    calls = []
    measure(
        Pool(cloud()),
        noise_levels=tensor(0.4),
        sizes=(8,),
        examples=4,
        draws=3,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1] == (60 + 3 * 8, 60 + 3 * 8)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


# ---- class-conditional targets


def test_conditioning_on_a_single_class_changes_nothing():
    x = cloud()
    plain = measure(Pool(x), noise_levels=tensor(0.5), sizes=(8,), examples=16, draws=4)
    conditional = measure(
        Pool(x, torch.zeros(60, dtype=torch.int64)),
        noise_levels=tensor(0.5),
        sizes=(8,),
        examples=16,
        draws=4,
        conditional=True,
    )
    assert torch.equal(plain.dsm.by_bin, conditional.dsm.by_bin)


def test_only_data_points_of_the_class_are_candidates():
    x, labels = cloud(), torch.arange(60) % 3
    conditional = measure(
        Pool(x, labels), noise_levels=tensor(1e-3, 0.5, 1e4), sizes=(20, 40), examples=32, draws=4, conditional=True
    )
    assert conditional.kl.by_bin[0].item() == pytest.approx(math.log(20))
    assert conditional.ess_share.by_bin[2].item() == pytest.approx(1.0)
    for n in (20, 40):  # a class of 20 is used whole
        assert (conditional.stf[n].variance.by_bin < 1e-20).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 2}, "at least 3 draws and 2 examples per noise level, not 2 and 4"),
        ({"examples": 1}, "2 examples per noise level, not 4 and 1"),
        ({"sizes": (0,)}, r"at least 1 \(the source alone\), not 0"),
        ({"conditional": True}, "no labels"),
        ({"noise_levels": tensor(0.5, -1.0)}, "above 0 and reached by VE"),
        ({"noise_levels": tensor(0.5, math.inf)}, "above 0 and reached by VE"),
    ],
)
def test_arguments_that_cannot_be_measured_are_refused(change, message):
    arguments = {"noise_levels": tensor(0.5), "examples": 4, "draws": 4, "sizes": (2,), **change}
    with pytest.raises(ValueError, match=message):
        measure(cloud(), **arguments)


# ---- standard errors


def test_estimates_are_unbiased_and_their_errors_are_standard_errors():
    examples, draws, bias = 24, 8, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    g, numbers = torch.Generator().manual_seed(0), []
    for _ in range(400):
        own, shared = (torch.randn(*s, 3, generator=g, dtype=torch.float64) for s in ((examples, draws), (1, draws)))
        errors = bias + own + 0.5 * shared
        products = errors @ errors.mT
        for values in (exact._off_diagonal(products), products.diagonal(dim1=1, dim2=2)):
            estimate = ByNoise(values[None], tensor(1.0))
            numbers += [estimate.by_bin, estimate.errors_by_bin]
    values = torch.cat(numbers).view(400, 4)
    for column, truth in ((0, bias.square().sum()), (2, bias.square().sum() + 3 * 1.25)):
        mean, spread = values[:, column].mean(), values[:, column].std()
        assert abs(mean - truth) < 4 * spread / 20
        assert 0.8 < values[:, column + 1].square().mean().sqrt() / spread < 1.5  # counted twice at most


# ---- the linear denoiser, distances, and proposed noise


@pytest.mark.parametrize("shape", [(6,), (3, 8), (2, 4, 4), (1, 4, 2, 4)])
def test_the_basis_keeps_the_variance_and_white_noise_cannot_be_learned(shape):
    x = torch.randn(4096, *shape, generator=torch.Generator().manual_seed(0))
    linear = LinearDenoiser.from_pool(Pool(x))
    assert linear.variances.sum().item() == pytest.approx((x - x.mean(0)).square().sum().item() / 4096, rel=1e-5)
    assert linear.learnable_share(tensor(0.01, 1.0, 30.0)).abs().max() < 0.01


def test_the_linear_denoiser_is_optimal_for_gaussian_data():
    axes, _ = torch.linalg.qr(cloud(5, 5))
    spread = tensor(3.0, 1.0, 0.5, 0.1, 0.02)
    x = (cloud(20_000, 5, seed=1) * spread) @ axes
    noise_level = tensor(0.05, 0.5, 2.0)
    exact = torch.stack([(spread**2 * s**2 / (spread**2 + s**2)).sum() for s in noise_level])
    torch.testing.assert_close(LinearDenoiser.from_pool(Pool(x)).squared_error(noise_level), exact, rtol=0.03, atol=0)


def test_the_posterior_mean_has_at_most_the_error_of_the_linear_denoiser(digits):
    noise_level = tensor(0.5, 1.0, 2.0, 5.0, 20.0)
    found = measure(digits, noise_levels=noise_level, sizes=(), examples=64)
    assert (found.dsm.by_bin < found.linear.squared_error(noise_level) + 3 * found.dsm.errors_by_bin).all()


def test_distances_are_found_and_copies_do_not_count_as_nearest():
    x = cloud(200, 3)
    x[0], x[1] = 40.0, -40.0
    x[2] = x[3]
    x[4] = x[5] + tensor(1e-4, 0, 0)
    distance = torch.cdist(x, x)
    found = DataDistances.from_pool(Pool(x), examples=200)
    assert found.farthest == pytest.approx(distance.max().item())
    index = torch.randint(200, (200,), generator=generator(0, "extent")).unique()
    apart = distance[index].masked_fill(distance[index] < 1e-6, math.inf)
    assert found.nearest == pytest.approx(apart.min().item(), rel=1e-4)
    with pytest.raises(ValueError, match="data points are the same"):
        DataDistances.from_pool(Pool(torch.ones(5, 2)))


def smooth(n: int = 400) -> torch.Tensor:
    """Signals with a falling spectrum, as images have."""
    return cloud(n, 64).cumsum(1).unsqueeze(1) / 8


def proposed(x: torch.Tensor) -> NoiseProposal:
    pool = Pool(x)
    return NoiseProposal.from_pool(pool, DataSummary.from_pool(pool).std, LinearDenoiser.from_pool(pool))


def test_the_proposed_sigma_max_is_where_one_percent_of_the_variance_is_explained():
    linear = LinearDenoiser(tensor(9.0, 1.0, 0.5))
    sigma = torch.tensor([linear.noise_level_explaining(0.01)], dtype=torch.float64)
    assert 1 - float(linear.squared_error(sigma)) / 10.5 == pytest.approx(0.01)
    white = proposed(2 * cloud(4096, 6))
    assert white.sigma_max == pytest.approx(2 * 99**0.5, rel=0.05)  # v / (v + sigma^2) = 0.01


def test_proposed_noise_scales_with_the_units_of_the_data():
    one, other = proposed(smooth()), proposed(smooth() * math.e**2)
    assert other.mean == pytest.approx(one.mean + 2, abs=0.11)
    assert other.std == one.std
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        assert getattr(other, name) == pytest.approx(getattr(one, name) * math.e**2, rel=0.05)


def test_for_white_noise_the_noise_of_edm_is_shifted_to_the_data():
    white = proposed(2 * cloud(4096, 6))
    assert (white.mean, white.std) == (pytest.approx(-1.2 + math.log(2 / 0.5), abs=0.06), 1.2)
    assert "can learn nothing" in white.reasons()[0]


def test_sigma_min_of_bytes_is_that_of_edm():
    pool = Pool(torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8))
    assert NoiseProposal.from_pool(pool, 0.5, LinearDenoiser.from_pool(pool)).sigma_min == 0.002


# ---- consequences for a training


def report(pool: Pool, times: LogNormal, noise_level: torch.Tensor, **options) -> VarianceReport:
    found = measure(pool, noise_levels=noise_level, **options)
    return VarianceReport.from_study(found, times, EDMWeight(0.75))


def test_the_report_gives_the_size_for_a_reduction_of_the_variance(digits):
    noise_level = DataDistances.from_pool(digits).noise_levels(13, VE())
    found = report(digits, LogNormal(), noise_level, sizes=(64, 256, 1024), examples=48, draws=6)
    size, measured = found.size_for(found.dsm / found.stf[256])
    assert measured
    assert size == pytest.approx(256)
    one, prior = found.phases
    assert one < found.high[0] < found.high[1] < prior
    assert 0.05 < found.high_share < found.competing_share < 0.6
    larger, measured = found.size_for(1.5 * found.dsm / found.stf[1024])
    assert not measured
    assert 1024 < larger < 1797
    assert found.size_for(1e9)[0] == pytest.approx(1797, rel=1e-3)


def test_no_gain_is_expected_for_sparse_data_at_small_noise():
    pool = Pool(10 * cloud(40, 32))
    found = report(pool, LogNormal(-2.0, 0.5), tensor(0.1, 1.0, 10.0, 40.0), sizes=(8,), examples=16, draws=4)
    assert any("Expect no gain" in line for line in found.lines())
    assert max(found.share_of_loss, found.mean_share_of_loss) < 1e-6
    more = report(pool, LogNormal(3.0, 0.5), tensor(0.1, 1.0, 10.0, 40.0), sizes=(8,), examples=16, draws=4)
    assert not any("Expect no gain" in line for line in more.lines())


# ---- the command


def test_the_python_of_the_page_about_the_study_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "field.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "field.md", "exec"), {})
    assert "64 references" in capsys.readouterr().out


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


QUICK = ("--examples", 8, "--draws", 3, "--noise-levels", 5, "--sizes", "4,32")


@pytest.mark.usefixtures("unchecked")
def test_a_field_is_written_as_table_text_and_plots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = command("field", "digits", *QUICK, "--out", "found")
    assert "Of the training noise, LogNormal(mean=-1.2, std=1.2)" in output
    lines = list(csv.DictReader((tmp_path / "found" / "field.csv").open()))
    assert {line["unit"] for line in lines if line["quantity"] == "stf"} == {"x^2", "noise^2 per dimension", "score^2"}
    assert len([line for line in lines if line["quantity"] == "dsm" and line["unit"] == "x^2"]) == 5
    written = json.loads((tmp_path / "found" / "field.json").read_text())
    assert len(written["records"]) == len(lines)
    assert written["report"]["stf"].keys() == {"4", "32"}
    for name in ("field.png", "bias.png"):
        assert (tmp_path / "found" / name).stat().st_size > 10_000
    again = command("field", "digits", *QUICK, "--out", "again")
    assert again.replace("again", "found") == output


@pytest.mark.usefixtures("unchecked")
def test_any_process_and_conditional_targets_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = command("field", "digits", *QUICK, "--conditional", "--set", "process.kind=flow")
    assert "Flow()" in output
    assert "Uniform(" in output
    assert json.loads((tmp_path / "field" / "field.json").read_text())["conditional"] is True


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no data given"),
        (("digits", "--sizes", "64,x"), "integers above 0"),
        (("digits", "--low", "3", "--high", "2"), "0 < low < high"),
        (("digits", "--low", "0"), "0 < low < high"),
        (("digits", "--high", "0"), "0 < low < high"),
        (("--kind", "digits"), "add DATA"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["field", *arguments])
    assert message in str(result.exception)
    assert not (tmp_path / "field").exists()


@pytest.mark.usefixtures("unchecked")
def test_the_field_is_measured_on_the_data_that_training_uses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = (*QUICK[:-1], "1,2,4,8,16,32,64,128")  # more sizes than line styles, from 1 on
    command("field", "digits", *quick, "--set", "data.holdout=100", "--set", "augmentation.kind=mirror")
    written = json.loads((tmp_path / "field" / "field.json").read_text())
    assert written["num_data_points"] == 2 * (1797 - 100)
    assert len(written["report"]["stf"]) == 8


@pytest.mark.usefixtures("unchecked")
def test_settings_that_inspect_proposes_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command("data", "inspect", "digits", "--plot", "noise.png").split()
    settings = [after for word, after in pairwise(words) if word == "--set"]
    config = resolve(override({}, settings))
    assert {setting.partition("=")[0] for setting in settings} >= {"times.mean", "times.std", "grid.sigma_max"}
    assert config.sections["preconditioning"]["sigma_data"] == 0.75
    assert config.make("grid").sigma_max == pytest.approx(7.1)
    assert (tmp_path / "noise.png").exists()
    (tmp_path / "noise.png").unlink()
    assert "--set" not in command("data", "inspect", "digits", "--no-noise")
    assert not (tmp_path / "noise.png").exists()

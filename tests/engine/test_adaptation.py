"""Noise that follows the run: the objective stays, its noise falls, and resumed runs and all ranks agree."""

from pathlib import Path

import pytest
import torch
from short_runs import Interrupted, configured, interrupt_at, same, tensors, trained, untimed
from test_distributed import adapted_run, on_ranks

from stablefield.build import build
from stablefield.config import ConfigError, override, resolve
from stablefield.distributed import Ranks
from stablefield.engine.adaptation import RANGES, Adaptation, AdaptedTimes
from stablefield.engine.fit import fit
from stablefield.run import RunFolder
from stablefield.times import Adaptive, LogNormal, Stratified, Uniform

ADAPTIVE = ("times.kind=adaptive", "times.every=64")


def trained_exact(folder: Path, *settings: str, **options) -> int:
    raw = {"network": {"kind": "mlp", "width": 8, "layers": 1}, "target": {"kind": "exact"}}
    lengths = {"images": 320, "batch_size": 32, "log_every": 32}
    config = resolve(override(raw | {"training": lengths}, settings))
    return fit(config, build(config), RunFolder(folder), **options)


def shares(*values: float) -> torch.Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return found / found.sum()


def test_equal_shares_are_the_base_distribution():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adapted = AdaptedTimes(LogNormal(), shares(1, 1, 1, 1, 1, 1, 1, 1))
    torch.testing.assert_close(adapted.quantile(u), LogNormal().quantile(u))


def test_each_range_has_its_share():
    q = shares(1, 2, 3, 4, 5, 6, 7, 8)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = AdaptedTimes(Uniform(0.0, 1.0), q).quantile(u)
    torch.testing.assert_close(torch.histc(t, 8, 0, 1) / len(t), q, atol=1e-4, rtol=0)
    assert (t.diff() > 0).all()


def test_losses_with_importance_weights_are_unbiased():
    adaptation = Adaptation(Adaptive())
    adaptation.shares[:] = shares(8, 4, 1, 1, 1, 1, 2, 9)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    t = adaptation.times(0, 0).quantile(u)
    importance = adaptation.importance(t, 0)
    assert importance is not None
    for function in (torch.ones_like, torch.log, lambda x: 1 / (1 + x)):
        wanted = function(LogNormal().quantile(u)).mean()
        torch.testing.assert_close((importance * function(t)).mean(), wanted, rtol=1e-4, atol=1e-4)


def test_importance_weights_are_at_most_ten_and_densities_at_least_a_tenth():
    adaptation = Adaptation(Adaptive(reweight=False))
    for _ in range(5):
        adaptation.follow(torch.tensor([1e9, *[0.0] * (RANGES - 1)]))
        adaptation._advance()
    assert (adaptation.shares[2] * RANGES >= 0.0999).all()
    assert adaptation.shares[2].sum() == pytest.approx(1)
    assert adaptation.shares[2][0] > 0.9


def test_the_adapted_density_lowers_the_variance_of_the_gradient():
    """A gradient whose size depends on the range: importance sampling with the measured shares against the base."""
    size = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.5, 1.0, 3.0, 5.0], dtype=torch.float64)
    adaptation = Adaptation(Adaptive())
    adaptation.sums = torch.stack([size**2 * 100, torch.full_like(size, 100)])
    adaptation._advance()
    q = adaptation.shares[2]
    base, adapted = (size**2).mean(), (size**2 / (RANGES**2 * q)).sum()
    assert adapted < 0.6 * base


def test_a_measurement_is_in_force_two_intervals_later():
    adaptation = Adaptation(Adaptive(every=100, reweight=False))
    adaptation.follow(torch.arange(RANGES).double())
    uniform = adaptation.shares[0].clone()
    adaptation._advance()  # 100 images have been seen
    for images, wanted in ((50, True), (150, True), (250, False)):
        found = adaptation.times(images, 150)
        assert isinstance(found, AdaptedTimes)
        assert torch.equal(found.shares, uniform) == wanted


def test_stratified_times_stay_stratified():
    found = Adaptation(Stratified(Adaptive())).times(0, 0)
    assert isinstance(found, Stratified)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive") / "run"
    trained(folder, *ADAPTIVE)
    return folder


def test_a_run_adapts_its_noise(whole):
    found = tensors(whole)["times.shares"]
    assert found.shape == (3, RANGES)
    assert (found[2] - 1 / RANGES).abs().max() > 0.002


@pytest.mark.parametrize("stop", [32, 64, 96, 160])
def test_an_adaptive_run_resumes_bit_for_bit(whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        trained(tmp_path, *ADAPTIVE, on_step=interrupt_at(stop))
    trained(tmp_path, *ADAPTIVE)
    assert same(whole, tmp_path)
    assert untimed(whole) == untimed(tmp_path)


def test_targets_of_several_steps_resume_bit_for_bit_too(tmp_path):
    settings = ("times.kind=adaptive", "times.every=96", "training.target_prefetch=96")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained_exact(whole, *settings)
    with pytest.raises(Interrupted):
        trained_exact(parts, *settings, on_step=interrupt_at(160))
    trained_exact(parts, *settings)
    assert same(whole, parts)


def test_without_reweighting_the_noise_follows_the_excess(tmp_path):
    settings = (*ADAPTIVE, "times.reweight=false", "training.probe_every=64", "training.probes=4")
    trained(tmp_path, *settings)
    line = next(line for line in RunFolder(tmp_path).history() if "loss/excess" in line)
    excess = torch.tensor([value for key, value in line.items() if key.startswith("excess_by_noise/")])
    adaptation = Adaptation(Adaptive(reweight=False, every=64))
    adaptation.follow(excess)
    adaptation._advance()
    assert (tensors(tmp_path)["times.level"] > 0).all()
    assert adaptation.shares[2].argmax() == excess.argmax()


def test_following_the_excess_needs_probes(tmp_path):
    with pytest.raises(ConfigError, match="probe_every"):
        trained(tmp_path, *ADAPTIVE, "times.reweight=false", "training.probe_every=0")


def test_an_interval_shorter_than_the_steps_computed_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"times\.every"):
        trained_exact(tmp_path, "times.kind=adaptive", "times.every=32", "training.target_prefetch=256")


@pytest.mark.parametrize("settings", [["times.base=normal"], ["times.every=0"], ["times.parameters=[0.0, -1.0]"]])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        build(configured("times.kind=adaptive", *settings))


def test_two_ranks_have_the_distribution_of_one(tmp_path):
    one = adapted_run(Ranks(torch.device("cpu")))
    two = on_ranks(2, tmp_path, adapted_run)
    assert (one - 1 / RANGES).abs().max() > 0.002
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)

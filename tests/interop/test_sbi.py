"""sbi: its flow-matching and score losses with stable targets, for discrete observations."""

import math

import pytest
import torch

pytest.importorskip("sbi")
from pages import check, run, scripts

from stablefield import StableTarget


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", [0, 1], ids=["flow", "score"])
def test_the_scripts_of_the_page_keep_their_weights_with_one_candidate(number: int) -> None:
    check("sbi.md", number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
def test_a_trained_estimator_samples_the_posterior_of_its_observation(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there
    from sbi.inference import FMPE

    _, after, names = next(scripts("sbi.md"))
    names = run(after, names)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = FMPE(prior, show_progress_bars=False).build_posterior(names["model"], prior)
    samples = posterior.sample((200,), x=torch.tensor([[1.0, 0.0]]), show_progress_bars=False)
    assert samples.shape == (200, 2)
    assert samples[:, 0].mean() > 0.2 > -0.2 > samples[:, 1].mean()


def test_references_with_another_continuous_observation_are_off_by_the_figure_of_the_page() -> None:
    torch.manual_seed(0)
    theta, rest, noise = torch.randn(3, 4000, 1, dtype=torch.float64).unbind()
    x, theta_t = theta + 0.5 * rest, theta + noise
    exact = (4 * x + theta_t) / 6  # precisions: 1 of the prior, 4 of x, 1 of theta_t
    found = StableTarget(theta, "x0", size=None)(
        theta, theta_t, theta, alpha=1.0, sigma=1.0, index=torch.arange(len(theta))
    )
    assert float((found - exact).square().mean().sqrt()) == pytest.approx(math.sqrt(3) / 3, abs=0.03)
    assert round(math.sqrt(3) / 3, 2) == 0.58

"""diffusers: alpha and sigma of its schedulers, the scripts of the page, and its U-Net as a network."""

import re

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UnCLIPScheduler,
)
from pages import LOOPS, blocks, check, run
from typer.testing import CliRunner

from stablefield import StableTarget
from stablefield.cli import app
from stablefield.interop.diffusers import UNet2D, scales

SCHEDULERS = {
    "ddpm": DDPMScheduler(),
    "ddim, scaled_linear": DDIMScheduler(beta_schedule="scaled_linear"),
    "ddpm, zero terminal SNR": DDPMScheduler(rescale_betas_zero_snr=True),
    "unclip": UnCLIPScheduler(),
    "euler": EulerDiscreteScheduler(),
    "heun": HeunDiscreteScheduler(),
    "edm": EDMEulerScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def timesteps_of(scheduler: object, steps: torch.Tensor) -> torch.Tensor:
    return scheduler.timesteps[steps] if hasattr(scheduler, "sigmas") else steps


def add_noise(scheduler: object, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, timesteps, noise)
    return scheduler.add_noise(x, noise, timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scales_are_those_that_the_scheduler_adds_noise_with(name: str, dtype: torch.dtype) -> None:
    scheduler, steps = SCHEDULERS[name], torch.tensor([0, 1, 17, 500, 998, 999])
    timesteps = timesteps_of(scheduler, steps)
    x, noise = (torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(k)).to(dtype) for k in (0, 1))
    alpha, sigma = scales(scheduler, timesteps, x)
    assert alpha.shape == sigma.shape == (6, 1, 1)
    assert alpha.dtype == dtype
    # with these very numbers the sum has the bits of the scheduler
    assert torch.equal(alpha * x + sigma * noise, add_noise(scheduler, x, noise, timesteps))


def test_scales_have_the_values_of_the_schedules() -> None:
    steps = torch.tensor([0, 400, 999])
    x = torch.zeros(3, 1, dtype=torch.float64)
    alpha, sigma = scales(SCHEDULERS["ddpm"], steps, x)
    square = torch.linspace(1e-4, 0.02, 1000).neg().add(1).cumprod(0)[steps, None]
    torch.testing.assert_close(alpha, square.double().sqrt())
    torch.testing.assert_close(sigma, (1 - square.double()).sqrt())
    for name, linear in (("euler", 1), ("edm", 1), ("flow", None)):
        scheduler = SCHEDULERS[name]
        alpha, sigma = scales(scheduler, scheduler.timesteps[steps], x)
        assert torch.equal(sigma[:, 0], scheduler.sigmas[steps].double())
        assert torch.equal(alpha, torch.ones_like(alpha) if linear else 1 - sigma)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_checks_of_stable_target_pass_with_every_scheduler(name: str) -> None:
    scheduler, generator = SCHEDULERS[name], torch.Generator().manual_seed(0)
    steps = torch.randint(1000, (32,), generator=generator)
    timesteps = timesteps_of(scheduler, steps)
    x, noise = torch.randn(2, 32, 3, 4, generator=generator).unbind()
    noisy = add_noise(scheduler, x, noise, timesteps)
    alpha, sigma = scales(scheduler, timesteps, x)
    kinds = {"epsilon": noise, "sample": x}
    if name.startswith("ddpm"):
        kinds["v_prediction"] = scheduler.get_velocity(x, noise, timesteps)
    if name.startswith("flow"):
        kinds["flow_prediction"] = noise - x
    for kind, target in kinds.items():
        stable = StableTarget(None, kind)
        assert torch.isfinite(stable(target, noisy, x, alpha=alpha, sigma=sigma)).all()
        assert stable.ess.max() > 1


def test_a_scheduler_that_does_not_add_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="object has neither add_noise nor scale_noise"):
        scales(object(), torch.zeros(1), torch.zeros(1, 2))

    class Squares:
        def add_noise(self, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return (x + noise).square()

    with pytest.raises(ValueError, match="Squares does not make alpha x"):
        scales(Squares(), torch.zeros(1), torch.zeros(1, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", [0, 1, 2], ids=["unconditional", "class-conditional", "latents"])
def test_the_scripts_of_the_page_keep_their_weights_with_one_candidate(number: int) -> None:
    check("diffusers.md", number)


@pytest.mark.usefixtures("unchecked")
def test_the_excess_and_the_floor_of_the_page_add_up_to_the_dsm_loss() -> None:
    names: dict = {}
    for language, code in blocks("diffusers.md"):
        names = run(code, names) if language == "python" else names
    loss = names["probes"].denoising_loss(lambda x_t, t: names["model"](x_t, t).sample)
    excess, floor = names["excess"], names["floor"]
    assert excess.value > 0
    assert 0 < floor.value < 1
    assert abs(loss.value - excess.value - floor.value) < 5 * (loss.error**2 + floor.error**2) ** 0.5


def test_a_null_label_has_an_embedding_of_its_own() -> None:
    torch.manual_seed(0)
    network = UNet2D((1, 8, 8), num_classes=3, channels=(8, 16)).eval()
    x, c_noise = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), -0.3)
    found = network(x, c_noise, torch.cat([torch.eye(3), torch.zeros(1, 3)]))
    assert found.shape == (4, 1, 8, 8)
    assert len({tuple(each.flatten().tolist()) for each in found}) == 4


def test_its_unet_is_trained_and_sampled_by_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^stablefield (.*)$", (LOOPS / "diffusers.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        arguments = line.replace("training.images=2048", "training.images=128").split()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    conditional = "--set training.conditional=true --set network.channels=[8,16] --set training.images=64 --out c"
    result = CliRunner().invoke(app, [*lines[0].split()[:3], *conditional.split()])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["sample", "runs/unet2d"])
    assert result.exit_code != 0
    assert "--allow" in str(result.exception)

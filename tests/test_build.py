"""A network that does not fit the weights of a file is refused before memory is used for it."""

import pytest
import torch
from short_runs import configured, trained
from torch import nn
from typer.testing import CliRunner

from stablefield.build import build_denoiser
from stablefield.checkpoint import read, save
from stablefield.cli import app
from stablefield.config import ConfigError, override, resolve
from stablefield.data import notices

pytestmark = pytest.mark.usefixtures("unchecked")

made_on: list[str] = []


class Own(nn.Module):
    """A network that notes on which device it is made."""

    def __init__(self, shape: tuple[int, ...], width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        made_on.append(self.linear.weight.device.type)


class NeedsValues(Own):
    """A network that cannot be made without memory."""

    def __init__(self, shape: tuple[int, ...], width: int = 4) -> None:
        super().__init__(shape, width)
        self.scale = float(torch.ones(()).item())


def own(network: type[nn.Module], width: int):
    return resolve({"network": {"kind": f"{__name__}:{network.__name__}", "width": width}}, allow=[network])


def test_a_network_of_one_s_own_is_compared_with_the_weights_before_memory_is_used():
    weights = build_denoiser(own(Own, 4), (2,), 0).state_dict()
    made_on.clear()
    build_denoiser(own(Own, 4), (2,), 0, weights)
    assert made_on == ["meta", "cpu"]
    made_on.clear()
    with pytest.raises(ConfigError, match=r"linear.bias of shape \(5000,\), and the weights have \(4,\)"):
        build_denoiser(own(Own, 5000), (2,), 0, weights)
    assert made_on == ["meta"]


def test_a_network_that_needs_values_is_built_and_the_reason_is_said(caplog):
    notices.say.cache_clear()
    weights = build_denoiser(own(NeedsValues, 4), (2,), 0).state_dict()
    assert not caplog.text
    denoiser = build_denoiser(own(NeedsValues, 4), (2,), 0, weights)
    assert "is not compared with the weights before it is built: " in caplog.text
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.state_dict().items())


def test_resuming_compares_the_network_with_the_weights_before_it_is_built(tmp_path):
    trained(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    found = read(path)
    config = found.config | {"config": resolve(override(configured().sections, ["network.width=9000"])).sections}
    save(path, found.tensors, config=config, images=found.images)
    (tmp_path / "run" / "config.toml").unlink()
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert "and the weights have" in str(result.exception)
    assert "9000" in str(result.exception)
    assert "\n" not in str(result.exception)

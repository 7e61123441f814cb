"""Classes of the user's own in every section, from the command line and from Python, and what they can ask for."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stablefield import VE, VP, Cosine, DSMTarget, Pool, TargetEstimator, load
from stablefield.cli import app
from stablefield.config import ConfigError, resolve
from stablefield.config.classes import component_class, import_name, runtime_arguments, schema
from stablefield.kinds import BASES, KIND_DEFAULTS, KINDS
from stablefield.process import Process, Tabulated
from stablefield.sample import TimeGrid
from stablefield.targets import KNNTarget, STFTarget

pytestmark = pytest.mark.usefixtures("unchecked")

MINE = '''
from dataclasses import dataclass

import torch
from stablefield import Pool
from stablefield.data import Digits, Mirror
from stablefield.objective import SNRWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.process import Cosine
from stablefield.sample import Euler, TimeGrid
from stablefield.targets import DSMTarget
from stablefield.times import Uniform

@dataclass(frozen=True)
class Target(DSMTarget):
    """The source, moved towards the mean of the data."""
    data: Pool
    order: int = 2
    def __call__(self, noisy, *, generator=None):
        assert isinstance(self.data, Pool) and self.order == 3
        return super().__call__(noisy, generator=generator)

class Process(Cosine): pass
class Times(Uniform): pass
class Weight(SNRWeight): pass
class Preconditioning(EDMPreconditioning): pass
class Sampler(Euler): pass
class Grid(TimeGrid):
    def __call__(self, process, steps):
        return torch.linspace(0.9, 0, steps + 1, dtype=torch.float64)
class Augmentation(Mirror): pass
class Data(Digits): pass

class Network(torch.nn.Module):
    """A network with arguments that could be mistaken for those of a run."""
    def __init__(self, shape, *, order: int = 1, pool: str = "mean", activation: torch.nn.Module = None):
        super().__init__()
        assert (order, pool) == (4, "max")
        self.layer = torch.nn.Linear(shape[-1], shape[-1])
    def forward(self, x, c_noise):
        return self.layer(x)
'''
SECTIONS = [section for section in KINDS if section != "training"]


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    yield
    sys.modules.pop("mine", None)


def test_every_section_takes_a_class_of_the_user_s_own(mine):
    settings = [f"{section}.kind=mine:{section.capitalize()}" for section in SECTIONS]
    settings += ["target.order=3", "network.order=4", "network.pool=max", "training.images=128", "sampler.steps=3"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = command("train", "--out", "run", *words)
    assert done.exit_code == 0, done.exception
    allow = [word for section in SECTIONS for word in ("--allow", f"mine:{section.capitalize()}")]
    assert " ".join(["stablefield sample run --seeds 0-63", *allow]) in done.output
    assert "names code outside this package" in str(command("sample", "run", "--seeds", "0-1").exception)
    done = command("sample", "run", "--seeds", "0-1", *allow)
    assert done.exit_code == 0, done.exception
    names = {f"mine:{section.capitalize()}" for section in SECTIONS}
    assert type(load("run", allow=names).process).__name__ == "Process"


def test_a_process_with_times_up_to_1_gets_the_defaults_of_vp():
    class Own(VP):
        pass

    config = resolve({"process": {"kind": f"{__name__}:Own"}}, allow=[named(Own)])
    assert (config.kind("times"), config.kind("weight"), config.kind("grid")) == (
        "uniform",
        "snr",
        "uniform",
    )

    class OwnVE(VE):
        pass

    config = resolve({"process": {"kind": f"{__name__}:OwnVE"}}, allow=[named(OwnVE)])
    assert config.kind("times") == "lognormal"


def named(own):
    """A class of a test as if it stood at the top of this file."""
    own.__qualname__ = own.__name__
    return own


def test_arguments_are_matched_by_type_and_not_by_name():
    @dataclass(frozen=True)
    class Own(DSMTarget):
        grid: int
        everything: Pool
        shape: tuple[int, ...] = (3,)
        maybe: TimeGrid | None = None

    config = resolve({"target": {"kind": f"{__name__}:Own", "grid": 2}}, allow=[named(Own)])
    assert config.sections["target"] == {"kind": f"{__name__}:Own", "grid": 2, "shape": [3]}
    pool = Pool(torch.zeros(4, 2))
    made = config.make("target", "something else", pool)
    assert (made.grid, made.everything, made.shape, made.maybe) == (2, pool, (3,), None)
    with pytest.raises(ConfigError, match=r"target: Own needs everything: .*Pool, but a target can ask for str only"):
        config.make("target", "something else")


def test_an_argument_of_a_type_that_no_run_has_is_refused_before_training(mine):
    Path("mine.py").write_text(MINE + "\n@dataclass(frozen=True)\nclass Bank(DSMTarget):\n    bank: torch.Tensor\n")
    done = command("train", "--set", "target.kind=mine:Bank", "--dry-run")
    assert "needs bank: torch.Tensor, but a target can ask for" in str(done.exception)
    assert "Pool, ShuffledBatches only" in str(done.exception)


def test_networks_are_given_shape_and_number_of_classes_by_name():
    for kind in KINDS["network"]:
        assert runtime_arguments("network", component_class("network", kind)).keys() == {"shape", "num_classes"}

    class Own(nn.Module):
        def __init__(self, shape, num_classes: int = 0, order: int = 3, activation: type[nn.Module] = nn.SiLU) -> None:
            super().__init__()
            self.seen = (shape, num_classes, order, activation)

    config = resolve({"network": {"kind": f"{__name__}:Own", "order": 5}}, allow=[named(Own)])
    assert config.sections["network"] == {"kind": f"{__name__}:Own", "order": 5}
    assert config.make("network", shape=(1, 2), num_classes=7).seen == ((1, 2), 7, 5, nn.SiLU)


def test_the_keys_of_our_targets_are_what_a_run_does_not_have():
    assert list(schema("target", STFTarget).model_fields) == ["size", "references", "augmented_size"]
    assert list(schema("target", KNNTarget).model_fields) == ["neighbours", "search", "index", "probes"]
    assert runtime_arguments("target", STFTarget).keys() == {"pool", "order"}


@pytest.mark.parametrize(("section", "kind"), [(s, k) for s in SECTIONS for k in KINDS[s]])
def test_every_kind_is_a_class_with_the_base_class_of_its_section(section, kind):
    assert issubclass(component_class(section, kind), import_name(BASES[section]))


def test_the_defaults_of_a_kind_are_keys_of_its_class():
    for kind, name in KIND_DEFAULTS.items():
        assert import_name(name).keys() <= schema("network", component_class("network", kind)).model_fields.keys()
    assert issubclass(import_name(BASES["target"]), TargetEstimator)
    assert issubclass(import_name(BASES["process"]), Process)


# --- tables of noise levels


TABLE = [0.99, 0.7, 0.3, 0.01]


@pytest.mark.parametrize("form", ["numbers", "json", "npy", "txt"])
def test_a_tabulated_process_is_configured_by_numbers_or_by_a_file(form, tmp_path):
    path = tmp_path / f"table.{form}"
    if form == "npy":
        np.save(path, np.array(TABLE))
    else:
        path.write_text(json.dumps(TABLE) if form == "json" else "\n".join(map(str, TABLE)))
    given = TABLE if form == "numbers" else str(path)
    config = resolve({"process": {"kind": "tabulated", "alphas_cumprod": given}})
    assert config.sections["process"]["alphas_cumprod"] == TABLE  # a run does not need the file
    assert config.make("process") == Tabulated(tuple(TABLE))


def test_a_file_without_numbers_is_refused_by_name(tmp_path):
    (tmp_path / "words.json").write_text('["a"]')
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, message in (("words.json", "does not hold a list"), ("objects.npy", "does not"), ("none.npy", "no file")):
        with pytest.raises(ConfigError, match=f"process.alphas_cumprod: .*{message}"):
            resolve({"process": {"kind": "tabulated", "alphas_cumprod": str(tmp_path / name)}})


@pytest.mark.parametrize(
    ("kind", "key", "table"),
    [
        ("tabulated", "alphas_cumprod", (1 - torch.linspace(1e-3, 0.2, 100)).cumprod(0)),
        ("tabulated-ve", "sigmas", torch.logspace(-2, 1.5, 50)),
    ],
)
def test_a_tabulated_process_trains_and_samples_from_the_command_line(kind, key, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("table.npy", table.numpy())
    settings = [f"process.kind={kind}", f"process.{key}=table.npy", "network.kind=mlp", "training.images=256"]
    done = command("train", "--out", "run", *[word for setting in settings for word in ("--set", setting)])
    assert done.exit_code == 0, done.exception
    Path("table.npy").unlink()
    done = command("sample", "run", "--seeds", "0-3", "--steps", "4")
    assert done.exit_code == 0, done.exception


def test_a_table_of_the_cosine_process_is_the_cosine_process():
    t = torch.arange(1, 65, dtype=torch.float64) / 64
    table = Tabulated((*(Cosine().scales(t)[0] ** 2).tolist()[:-1], 0.0))
    u = torch.linspace(0, 1, 997, dtype=torch.float64)
    torch.testing.assert_close(table.scales(u), Cosine().scales(u), rtol=1e-9, atol=1e-14)

"""No code of files from other people is run, and modules in the working folder are not imported."""

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import stablefield
from stablefield import checkpoint
from stablefield.cli import app
from stablefield.config import Config, ConfigError, resolve
from stablefield.data import HuggingFace
from stablefield.evaluate import ExportedNetwork
from stablefield.kinds import BASES
from stablefield.run import open_run
from stablefield.studies.compare import Experiment

pytestmark = pytest.mark.usefixtures("unchecked")

TINY = ["network.kind=mlp", "network.width=8", "network.layers=1", "target.size=16", "training.images=128"]
HOSTILE = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).touch()
import torch
class Net(torch.nn.Module):
    def __init__(self, shape, width=3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width))
    def forward(self, x, c_noise):
        return x * self.scale.mean()
"""


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def settings(*values):
    return [part for setting in values for part in ("--set", setting)]


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "harmless"
    done = command("train", "--out", out, *settings(*TINY))
    assert done.exit_code == 0, done.exception
    return out


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that hostile code creates: `beside.py` in the working folder, and `elsewhere.py` on the path."""
    path = tmp_path / "marker"
    monkeypatch.setenv("MARKER", str(path))
    for folder, name in (("work", "beside"), ("site", "elsewhere")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path / "work")
    before = list(sys.path)
    yield path
    assert sys.path == before
    for name in ("beside", "elsewhere"):
        sys.modules.pop(name, None)


def named(run, name, out):
    """A copy of a run in whose files the network has this name."""
    found = checkpoint.read(run / "checkpoint.safetensors")
    sections = {**found.config["config"], "network": {"kind": name}}
    out.mkdir(parents=True)
    config = {**found.config, "config": sections}
    checkpoint.save(out / "checkpoint.safetensors", found.tensors, config=config, images=found.images)
    clean = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in sections.items()}
    (out / "config.toml").write_text(Config(clean).toml())  # an attacker can compute the checksum, too
    Experiment(resolve({}), ("dsm", "stf:16"), (0,), ("data",)).write(out)
    experiment = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps(experiment | {"config": sections}))
    return out


# every way in which a command reads a run or a configuration
ROADS = {
    "sample a run": ["sample", "theirs"],
    "sample a checkpoint": ["sample", "theirs/checkpoint.safetensors"],
    "guide": ["sample", "{harmless}", "--guide", "theirs", "--guidance", "2", "--out", "x"],
    "evaluate": ["evaluate", "theirs"],
    "evaluate with a guide": ["evaluate", "{harmless}", "--guide", "theirs", "--guidance", "2"],
    "start from": ["train", "--init-from", "theirs", "--out", "new"],
    "start from, with another network allowed": [
        *["train", "--init-from", "theirs", "--out", "new", "--allow", "other:Net", "--network", "mine:Net"]
    ],
    "resume": ["train", "--resume", "theirs"],
    "resume without a checkpoint": ["train", "--resume", "begun"],
    "resume with a setting": ["train", "--resume", "theirs", "--set", "training.images=256"],
    "configuration": ["train", "--config", "theirs/config.toml", "--out", "new"],
    "configuration, dry": ["train", "--config", "theirs/config.toml", "--dry-run"],
    "configuration of a field": ["field", "digits", "--config", "theirs/config.toml"],
    "configuration to compare": ["compare", "--config", "theirs/config.toml", "--out", "new"],
    "comparison": ["compare", "--out", "theirs"],
    "report": ["compare", "--out", "theirs", "--report-only"],
    "recipe": ["train", "--recipe", "theirs", "--out", "new"],
    "demo": ["demo", "--out", "theirs"],
}


@pytest.mark.parametrize("name", ["beside:Net", "elsewhere:Net"])
@pytest.mark.parametrize("road", ROADS)
def test_a_class_that_a_file_names_is_never_imported(road, name, harmless, marker, monkeypatch):
    named(harmless, name, Path("theirs"))
    named(harmless, name, Path("begun"))
    Path("begun/checkpoint.safetensors").unlink()
    recipe = {"network": {"kind": name}}
    monkeypatch.setattr(sys.modules["stablefield.cli.training"], "read_recipe", lambda name: recipe)
    done = command(*(word.format(harmless=harmless) for word in ROADS[road]))
    assert done.exit_code
    assert not marker.exists()
    assert name.partition(":")[0] not in sys.modules
    assert isinstance(done.exception, ConfigError)
    if road != "demo":  # it only uses networks of this package
        assert f"--allow {name} at the terminal" in str(done.exception)


def resolved(name, allow):
    return resolve({"network": {"kind": name}}, allow=allow)


@pytest.mark.parametrize("opened", [stablefield.load, open_run, resolved])
@pytest.mark.parametrize("allow", [(), ["other:Net"], ["beside"], ["beside:Other"], [nn.Linear]])
def test_only_allowed_classes_are_imported_in_python(opened, allow, harmless, marker):
    run = "beside:Net" if opened is resolved else named(harmless, "beside:Net", Path("theirs"))
    with pytest.raises(ConfigError, match=r"allow=\[Net\] \(the class\) or allow=\['beside:Net'\]"):
        opened(run, allow=allow)
    assert not marker.exists()


@pytest.mark.parametrize("kind", [":", "a:", ":b", "a b:C", "os.system('x'):C", "a:B:C", "..a:B", "a:B; ls", "/a:B"])
def test_a_name_of_another_form_is_refused_even_if_it_is_allowed(kind, marker):
    with pytest.raises(ConfigError, match="does not have the form module:Class"):
        resolve({"network": {"kind": kind}}, allow=[kind])


@pytest.mark.parametrize("section", ["data", "target", "network", "sampler", "process", "augmentation"])
@pytest.mark.parametrize("kind", [3, None, ["beside:Net"], {"a": 1}, True, "beside.Net", "beside"])
def test_a_kind_of_another_type_is_refused_with_a_message(section, kind, marker):
    with pytest.raises(ConfigError, match=f"{section}.kind: .* is none of"):
        resolve({section: {"kind": kind}}, allow=["beside:Net"])
    with pytest.raises(ConfigError):
        resolve([kind])


@pytest.mark.parametrize("section", BASES)
def test_a_class_of_any_section_must_be_allowed_and_have_the_base_class_of_the_section(section, marker):
    for allow in ((), ["other:Net"], ["beside:Other"]):
        with pytest.raises(ConfigError, match=f"{section}.kind: 'beside:Net' names code .*--allow beside:Net"):
            resolve({section: {"kind": "beside:Net"}}, allow=allow)
    assert not marker.exists()
    base = BASES[section].replace(":", ".")
    with pytest.raises(ConfigError, match=f"{section}.kind: 'math:pi' is not a {base}"):
        resolve({section: {"kind": "math:pi"}}, allow=["math:pi"])
    assert not marker.exists()


def test_the_section_without_kinds_takes_no_class(marker):
    with pytest.raises(ConfigError, match=r"training.kind: 'training' has no such key"):
        resolve({"training": {"kind": "beside:Net"}}, allow=["beside:Net"])
    assert not marker.exists()


def test_an_allowed_name_is_searched_in_the_current_folder_last(marker):
    Path("mine.py").write_text("import colorsys\n" + HOSTILE.replace("pathlib.Path", "#"))
    Path("colorsys.py").write_text(HOSTILE)
    sys.modules.pop("colorsys", None)
    config = resolve({"network": {"kind": "mine:Net", "width": 5}}, allow=["mine:Net"])
    assert config.make("network", shape=(1, 8, 8)).scale.shape == (5,)
    assert not marker.exists()
    del sys.modules["mine"]


def test_a_class_passed_to_allow_is_used_and_nothing_is_imported(marker):
    class Net(nn.Linear):
        def __init__(self, shape) -> None:
            super().__init__(8, 8)

    Net.__module__ = "gone"
    for allow in ([Net], Net):
        config = resolve({"network": {"kind": "gone:Net"}}, allow=allow)
        assert isinstance(config.make("network", shape=(1, 8, 8)), Net)
        again = resolve(config.sections, allow=config.allowed)
        assert isinstance(again.make("network", shape=(1, 8, 8)), Net)
    with pytest.raises(ConfigError, match="--allow gone:Other"):
        resolve({"network": {"kind": "gone:Other"}}, allow=[Net])


def test_a_network_typed_at_the_terminal_is_allowed_for_that_command_only(marker):
    run = ["--set", "training.batch_size=32", "--set", "training.images=64"]
    for typed in (["--network", "beside:Net"], ["--set", "network.kind=beside:Net"]):
        assert command("train", *typed, *run, "--dry-run").exit_code == 0
    done = command("train", "--network", "beside:Net", *run, "--out", "mine")
    assert done.exit_code == 0, done.exception
    assert "stablefield sample mine --seeds 0-63 --allow beside:Net" in done.output
    more = ["train", "--resume", "mine", "--set", "training.images=128"]
    assert "--allow beside:Net" in str(command(*more).exception)
    done = command(*more, "--allow", "beside:Net")
    assert done.exit_code == 0, done.exception
    few = ["--seeds", "0-1", "--steps", "2"]
    assert "--allow beside:Net" in str(command("sample", "mine", *few).exception)
    assert command("sample", "mine", *few, "--allow", "beside:Net").exit_code == 0
    again = ["train", "--init-from", "mine", "--out", "again", *run]
    assert "--allow beside:Net" in str(command(*again).exception)
    assert command(*again, "--allow", "beside:Net").exit_code == 0
    Net = sys.modules["beside"].Net
    for allow in ([Net], ["beside:Net"]):
        assert isinstance(stablefield.load("mine", allow=allow).network, Net)


# --- the working folder


NAMES = ["torch", "numpy", "sklearn", "scipy", "faiss", "typer", "rich", "pydantic", "PIL", "tomllib", "datasets"]


@pytest.fixture
def hostile_folder(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text("open(__file__ + '.ran', 'w').close()\nraise SystemExit(9)")
    return folder


SCRIPT = Path(sys.executable).with_name("stablefield")
TORCHRUN = [sys.executable, str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=1"]
LAUNCHES = {
    "console script": [sys.executable, SCRIPT],
    "python -m": [sys.executable, "-m", "stablefield"],
    "python -u -m": [sys.executable, "-um", "stablefield"],
    "python -umNAME": [sys.executable, "-umstablefield"],
    "python -P -m": [sys.executable, "-P", "-m", "stablefield"],
    "python -m stablefield.__main__": [sys.executable, "-m", "stablefield.__main__"],
    "torchrun -m": [*TORCHRUN, "-m", "stablefield"],
    "torchrun --no-python": [*TORCHRUN, "--no-python", SCRIPT],
}
QUICK = ("python -m",)  # the one that searches the working folder by default


@pytest.mark.parametrize(
    "launch", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAUNCHES]
)
def test_modules_of_the_working_folder_are_not_imported(launch, hostile_folder):
    if not all(Path(word).exists() for word in LAUNCHES[launch] if Path(word).is_absolute()):
        pytest.skip("not installed here")
    words = [*map(str, LAUNCHES[launch]), "train", "--dry-run"]
    done = subprocess.run(words, cwd=hostile_folder, capture_output=True, text=True, timeout=300)
    assert not list(hostile_folder.glob("*.ran")), done.stderr
    assert done.returncode == 0, done.stderr
    assert "This was a dry run" in done.stdout


def test_modules_of_the_working_folder_are_not_imported_by_subprocesses_either(hostile_folder):
    (hostile_folder / "multiprocessing.py").write_text((hostile_folder / "torch.py").read_text())
    code = (
        "import stablefield.cli as cli, subprocess, sys\n"
        "cli.app = lambda: print(subprocess.run([sys.executable, '-c', 'import multiprocessing']).returncode)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=hostile_folder, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_the_import_path_of_other_programs_is_not_changed(tmp_path):
    package = tmp_path / "stablefield_mine"
    package.mkdir()
    shown = "import sys, stablefield\nimport helper\nprint(sys.path[0])\n"
    (package / "__init__.py").write_text(shown)
    (package / "__main__.py").write_text("")
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "script.py").write_text(shown)
    for words in (["script.py"], ["-m", "stablefield_mine"]):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [str(tmp_path)], done.stderr


# --- features, statistics and data


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["MARKER"]),)


def test_exported_programs_are_opened_only_with_trust_features(marker, monkeypatch):
    opened = []
    monkeypatch.setattr(torch.export, "load", lambda file: opened.append(file) or 1 / 0)
    torch.save(Bomb(), "bomb.pt2")
    np.savez("samples.npz", np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8))
    words = ["evaluate", "samples.npz", "--reference", "samples.npz", "--features", "bomb.pt2"]
    done = command(*words)
    assert "bomb.pt2 is a network of torch.export" in str(done.exception)
    assert "--trust-features" in str(done.exception)
    assert not opened
    assert not marker.exists()
    assert "does not hold an exported network" in str(command(*words, "--trust-features").exception)
    assert opened


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("form", ["zip", "older", "pickle"])
@pytest.mark.parametrize("name", ["bomb.pt", "bomb.pth", "bomb", "bomb.PT2"])
def test_a_pickle_is_never_opened_as_torchscript(trusted, form, name, marker):
    if form == "pickle":
        Path(name).write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb(), name, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="does not hold an exported network"):
        ExportedNetwork(Path(name), trusted=trusted)
    assert not marker.exists()


class Saves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "marker")
        return x


class SavesWhenLoaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool) -> None:
        self.training = state
        torch.save(torch.zeros(1), "marker")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MapsFile(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("marker", True, 8).sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("network", [Saves, SavesWhenLoaded, MapsFile])
@pytest.mark.parametrize("spelling", ["plain", "escaped"])
def test_torchscript_that_accesses_files_is_refused(network, spelling, marker):
    torch.jit.save(torch.jit.script(network()), "net.pt")
    if spelling == "escaped":
        respell("net.pt")
    Path("marker").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"can do more than compute.*--trust-features"):
        ExportedNetwork(Path("net.pt"))
    assert not Path("marker").exists()
    ExportedNetwork(Path("net.pt"), trusted=True)(torch.zeros(3, 2))
    assert Path("marker").exists()


def respell(path):
    """Spell torch.save as getattr(torch, ...) with an escaped letter, which TorchScript accepts."""
    content = torch._C.PyTorchFileReader(path)
    writer = torch._C.PyTorchFileWriter("respelt.pt")
    for name in content.get_all_records():
        record = content.get_record(name)
        if name.endswith(".py"):
            record = record.replace(b"torch.save(", b'getattr(torch, "s\\141ve")(')
            record = record.replace(b"torch.from_file(", b'getattr(torch, "fr\\157m_file")(')
        if name not in (".data/serialization_id", "version", "byteorder", ".format_version", ".storage_alignment"):
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    del writer
    Path("respelt.pt").replace(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_that_only_computes_is_accepted(marker):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)).eval()
    torch.jit.save(torch.jit.script(network), "net.pt")
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(ExportedNetwork(Path("net.pt"))(x), network(x).flatten(1), atol=1e-6)


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.pt2", "./bomb.pt", "nothing.pt"])
def test_a_file_named_in_statistics_is_not_opened(name, marker, monkeypatch):
    torch.save(Bomb(), "bomb.pt")
    torch.save(Bomb(), "bomb.pt2")
    monkeypatch.setattr("stablefield.evaluate.features._load_network", lambda *_: 1 / 0)
    np.savez("statistics.npz", mu=np.zeros(48), sigma=np.eye(48), features=f"{name}:0123456789abcdef")
    np.savez("samples.npz", np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), dtype=np.uint8))
    done = command("evaluate", "samples.npz", "--reference", "statistics.npz")
    assert "add --features with the file of this network" in str(done.exception)
    assert not marker.exists()


def test_arrays_of_objects_are_refused_and_not_unpickled(marker):
    bombs = np.array([Bomb()] * 4, dtype=object)
    np.save("bombs.npy", bombs, allow_pickle=True)
    np.savez("bombs.npz", data=bombs)
    np.savez("statistics.npz", mu=bombs, sigma=np.eye(4))
    np.savez("samples.npz", np.zeros((8, 4, 4, 3), dtype=np.uint8))
    assert not marker.exists()
    for name in ("bombs.npy", "bombs.npz", "statistics.npz"):
        done = command("evaluate", "samples.npz", "--reference", name)
        assert isinstance(done.exception, ValueError)
        assert not marker.exists()


@pytest.fixture
def library(monkeypatch):
    """A stand-in for `datasets` that records its calls."""
    calls = []

    def load_dataset(path, name=None, split=None, trust_remote_code=None):
        calls.append((path, trust_remote_code))
        raise ValueError("loaded")

    fake = types.ModuleType("datasets")
    fake.__version__ = "3.6.0"
    fake.packaged_modules = types.SimpleNamespace(_PACKAGED_DATASETS_MODULES={"pandas": None, "csv": None})
    fake.load_dataset, fake.calls = load_dataset, calls
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_scripts_of_data_sets_are_never_run(library, marker):
    Path("set").mkdir()
    Path("set/set.py").write_text(HOSTILE)
    Path("set/data.parquet").touch()
    for path in ("set", "./set", "set/", "set/set.py", "absent.py", "beside.py"):
        with pytest.raises(ValueError, match="Python script, which is never run"):
            HuggingFace(path).contents()
    for path in ("pandas", "csv"):  # they would read files in the current folder
        with pytest.raises(ValueError, match="is a file reader of `datasets` and not a data set"):
            HuggingFace(path).contents()
    assert not library.calls
    with pytest.raises(ValueError, match="loaded"):
        HuggingFace("user/name").contents()
    assert library.calls == [("user/name", False)]
    library.__version__ = "2.21.0"
    with pytest.raises(ValueError, match=r"pip install 'datasets>=3'"):
        HuggingFace("user/name").contents()
    assert len(library.calls) == 1
    assert not marker.exists()


def test_versions_of_datasets_without_scripts_get_no_such_argument(library, monkeypatch):
    def load_dataset(path, name=None, split=None):
        raise ValueError("loaded")

    library.load_dataset = load_dataset
    with pytest.raises(ValueError, match="loaded"):
        HuggingFace("user/name").contents()

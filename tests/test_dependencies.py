"""The core needs its mandatory dependencies only; everything that needs an extra says how to install it."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

import stablefield
from stablefield.extras import TRAIN

PACKAGE = Path(stablefield.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"faiss-cpu": "faiss", "pillow": "PIL", "scikit-learn": "sklearn"}  # where it is not the distribution's name


def distribution(requirement: str) -> str:
    """Normalised name of the distribution that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def modules(requirements: list[str]) -> set[str]:
    """Names by which the distributions that are required directly are imported."""
    names = {distribution(requirement) for requirement in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


CORE = modules(PROJECT["dependencies"])
EXTRAS = {extra: modules(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


def closure(requirements: list[str]) -> set[str]:
    """Distributions that are required, directly or by what is required, without extras."""
    found: set[str] = set()
    waiting = [distribution(requirement) for requirement in requirements]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            try:
                needed = requires(name) or []
            except PackageNotFoundError:  # of another platform
                needed = []
            waiting += [distribution(requirement) for requirement in needed if "extra ==" not in requirement]
    return found


def third_party(path: Path) -> Iterator[str]:
    """Packages of others that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"stablefield"}


ONLY_CORE = """
import os, sys
REFUSED = set({refused!r})

class Only:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Only, sys.meta_path)
"""


@pytest.fixture(scope="module")
def only_core() -> str:
    """Code that makes an interpreter refuse every package but the mandatory dependencies and what these require."""
    needed = closure(PROJECT["dependencies"]) | {"stablefield"}
    refused = {
        module
        for module, distributions in packages_distributions().items()
        if not needed & {distribution(each) for each in distributions}
    }
    assert refused >= TRAIN
    assert not refused & CORE
    return ONLY_CORE.format(refused=sorted(refused))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_mathematics_and_the_training_loop_need_the_core_only(only_core: str) -> None:
    result = python(
        only_core
        + """
import stablefield, torch
from stablefield import *
for name in stablefield.__all__:
    assert callable(globals()[name]), name
import stablefield.likelihood
from stablefield import VE, Heun, Objective, Pool, Preconditioned, STFTarget, TrainState, posterior, train
from stablefield.data import Arrays, ShuffledBatches, Store
from stablefield.networks import MLP
from stablefield.objective import EDMWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.sample import RK45, EDMGrid
from stablefield.times import LogNormal

draw = torch.Generator().manual_seed(0)
pool = Pool(torch.randn(64, 2, generator=draw))
denoiser = Preconditioned(MLP(pool.shape), VE(), EDMPreconditioning(sigma_data=0.5))
objective = Objective(LogNormal(-1.2, 1.2), STFTarget(pool, 16), EDMWeight(0.5))
steps = list(train(TrainState(denoiser), objective, ShuffledBatches(pool, 8), images=24))
assert [step.images for step in steps] == [8, 16, 24] and all(step.step_taken for step in steps)

images = Heun(steps=3, grid=EDMGrid(0.002, 80))(denoiser, pool.shape, seeds=range(4)).x
assert images.shape == (4, 2) and images.isfinite().all()

x = pool.take(torch.arange(4))
x_t = x + 0.1 * torch.randn(4, 2, generator=draw)
answer = posterior(x_t, pool.take(torch.arange(64)), sigma=torch.full((4,), 0.1))
assert answer.mean.shape == (4, 2) and (answer.ess >= 1).all()

try:
    RK45()(denoiser, pool.shape, seeds=range(4))
except ImportError as error:
    assert "pip install '.[train]'" in str(error), error
else:
    raise AssertionError("torchdiffeq was imported")
print(*(name for name in sys.modules if name.partition(".")[0] == "stablefield"))
"""
    )
    assert result.returncode == 0, result.stderr
    # every mandatory dependency is imported by what was loaded
    files = [PACKAGE.parent / name.replace(".", "/") for name in result.stdout.split()]
    files = [file / "__init__.py" if file.is_dir() else file.with_suffix(".py") for file in files]
    assert {package for file in files for package in third_party(file)} >= CORE


def test_load_without_its_extra_says_how_to_install_it(only_core: str) -> None:
    result = python(f"{only_core}\nimport stablefield\nstablefield.load('run', device='cpu')")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert "stablefield.load needs the extra `train`: pip install '.[train]'" in line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"]], ids=" ".join)
@pytest.mark.parametrize("start", ["python -m", "script"])
def test_the_command_line_without_its_extra_prints_one_line(only_core: str, start: str, arguments: list[str]) -> None:
    code = {
        "python -m": "import runpy; runpy.run_module('stablefield', run_name='__main__', alter_sys=True)",
        "script": "from {} import {} as command; command()".format(*PROJECT["scripts"]["stablefield"].split(":")),
    }[start]
    result = python(f"{only_core}\nsys.argv = ['stablefield', *{arguments}]\n{code}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "stablefield: the command line needs the extra `train`: pip install '.[train]' in a clone of the repository\n"
    )


def test_a_missing_module_that_no_extra_installs_is_not_blamed_on_the_extra() -> None:
    result = python(
        "import sys, types\n"
        "cli = sys.modules['stablefield.cli'] = types.ModuleType('stablefield.cli')\n"
        "def fail(): import a_module_that_nobody_has\n"
        "cli.main = fail\n"
        "from stablefield.__main__ import main; main()"
    )
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"


def test_several_ranks_without_accelerate_say_how_to_install_it(only_core: str) -> None:
    code = (
        "import torch\nfrom stablefield.distributed import process_group\n"
        "with process_group(torch.device('cpu')): print('a single rank needs nothing')\n"
        "os.environ |= {'WORLD_SIZE': '2', 'RANK': '0'}\nwith process_group(torch.device('cpu')): pass"
    )
    several = python(f"{only_core}\n{code}")
    assert several.stdout == "a single rank needs nothing\n"
    assert "training with several ranks needs the extra `train`" in several.stderr.splitlines()[-1]


def test_every_import_is_declared_and_every_declared_package_is_imported() -> None:
    imported = {package for path in PACKAGE.rglob("*.py") for package in third_party(path)}
    users = CORE.union(*(EXTRAS[extra] for extra in EXTRAS.keys() - {"dev", "interop", "release"}))
    assert imported == users


def test_the_listed_modules_are_those_of_the_extra() -> None:
    assert EXTRAS["train"] == TRAIN
    assert "stablefield[train]" in PROJECT["optional-dependencies"]["dev"]
    assert not CORE & TRAIN

"""The distributions: what they contain, and that the wheel runs where only it is installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import stablefield
from stablefield.checkpoint import FORMAT_VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    written = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', (ROOT / "src/stablefield/__init__.py").read_text(), re.M)
    assert written == [stablefield.__version__]
    assert f"## {stablefield.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for file in (ROOT / "src").rglob("*.py"):  # also known where the package is not installed, only on the path
        assert "importlib.metadata" not in file.read_text(encoding="utf-8"), file
    assert FORMAT_VERSION >= 2


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Xu", "Tong", "Jaakkola"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_workflows_and_hooks_call_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    called = set(re.findall(r'"([a-z-]+)"', workflow["strategy"]["matrix"]["target"]))
    assert called == {"test", "test-all", "test-interop", "docs", "package"}
    assert called <= targets
    ((hook,),) = (each["hooks"] for each in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"])
    assert hook["entry"].removeprefix("make ") in targets


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    anywhere = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
    made = {"build", "dist", "runs", "site"}

    def ignored(place: str, names: list[str]) -> set[str]:
        return {*anywhere(place, names), *(made if Path(place) == ROOT else ())}

    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_contains_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    package = ROOT / "src" / "stablefield"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".toml") or path.name == "py.typed"]
    info = metadata.rpartition("/")[0]
    found = {name for name in names if not name.startswith(info)}
    assert found == {f"stablefield/{path.relative_to(package).as_posix()}" for path in files}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    assert f"\nVersion: {stablefield.__version__}\n" in described
    assert "\nLicense-Expression: Apache-2.0\n" in described


@pytest.mark.slow
def test_the_sdist_contains_what_its_tests_need_and_no_weights(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "mkdocs.yml", "tests/conftest.py"}
    assert files | {"docs/loop.md", "docs/images/variance.png", "src/stablefield/py.typed"} <= names
    shipped = {name for name in names if not name.startswith("tests/data/")}  # small files of the tests
    assert not [name for name in shipped if re.search(r"\.(safetensors|pt|pkl)$|^runs/|__pycache__", name)]


@pytest.mark.slow
def test_the_wheel_runs_where_only_it_is_installed(distributions, tmp_path):
    """Its dependencies are those of this environment, but the clone and its editable installation are out of sight."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [python, "-I", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", distributions[1]]
    subprocess.run(install, check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(python, "-c", "import stablefield; print(stablefield.__file__)").strip()
    assert Path(where).is_relative_to(environment)
    script = environment / "bin" / "stablefield"
    assert run(script, "--version") == f"stablefield {stablefield.__version__}\n"
    assert "digits" in run(script, "recipes")
    settings = [
        part for each in ("training.images=64", "network.kind=mlp", "target.size=16") for part in ("--set", each)
    ]
    run(script, "train", "--out", "run", *settings)
    run(script, "export", "run", "exported")
    assert "2 samples" in run(script, "sample", "exported", "--seeds", "0-1", "--steps", 2)

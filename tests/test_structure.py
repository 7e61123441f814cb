"""The house has floors, and imports only go down."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stablefield

HOUSE = Path(stablefield.__file__).parent
FLOORS = (
    {"ahead", "process", "times", "networks", "seeding", "schedule"},
    {"posterior", "parametrize", "reference", "augmentation", "neighbours", "products", "screen", "shards"},
    {"target", "denoise", "pruned", "banded"},
    {"objective", "sample", "likelihood"},
    {"config", "recipes", "checkpoint", "data", "ranks", "run"},
    {"interop"},
    {"engine", "evaluate"},
    {"compare"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
SPINE = {room for rooms in FLOORS[:4] for room in rooms}
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path != HOUSE / "__init__.py")
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere below; "." in front of those relative to a package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def ours(tree: ast.AST) -> list[str]:
    return [name for name in imports(tree) if name.startswith(".") or name.split(".")[0] == "stablefield"]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def rooms_below(path: Path) -> set[str]:
    return {name.split(".")[1] for name in ours(parsed(path))} - {room_of(path)}


@every_module
def test_every_module_has_a_floor(path: Path) -> None:
    assert room_of(path) in FLOOR, f"{room_of(path)} is in no floor of the table: say in this test where it lives"


@every_module
def test_ours_is_imported_by_its_full_name_and_never_from_the_package_s_face(path: Path) -> None:
    for name in ours(parsed(path)):
        assert name.startswith("stablefield."), f"{path.name} imports {name}"


@every_module
def test_imports_never_go_up(path: Path) -> None:
    height = FLOOR[room_of(path)]
    above = {room for room in rooms_below(path) if FLOOR[room] > height}
    assert not above, f"{room_of(path)}, on floor {height}, imports {above}"


def test_no_room_needs_itself() -> None:
    needs: dict[str, set[str]] = {}
    for path in MODULES:
        needs.setdefault(room_of(path), set()).update(rooms_below(path))
    TopologicalSorter(needs).prepare()  # raises CycleError, and names the circle


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in SPINE], ids=lambda p: str(p.relative_to(HOUSE)))
def test_the_spine_is_pure_mathematics(path: Path) -> None:
    brought = {name.split(".")[0] for name in imports(parsed(path))}
    assert brought - sys.stdlib_module_names <= {"torch", "torchdiffeq", "jaxtyping", "stablefield"}
    assert not brought & {"os", "io", "pathlib", "random", "shutil", "sys"}


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) != "cli"], ids=lambda p: str(p.relative_to(HOUSE)))
def test_nothing_of_ours_is_imported_inside_a_function(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not ours(node), f"{path.name}: {node.name} imports {ours(node)}"


def test_networks_know_nothing_of_diffusion() -> None:
    for path in MODULES:
        if room_of(path) == "networks":
            assert not rooms_below(path)


def test_the_package_s_face_brings_nothing_heavy_along() -> None:
    heavy = {"matplotlib", "sklearn", "pydantic", "typer", "rich", "PIL"}
    code = f"import sys, stablefield; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_package_s_face_shows_only_what_it_lists() -> None:
    assert sorted(set(stablefield.__all__)) == sorted(stablefield.__all__)
    for name in stablefield.__all__:
        assert hasattr(stablefield, name)
    lines = [node for node in ast.walk(parsed(HOUSE / "__init__.py")) if isinstance(node, ast.ImportFrom)]
    brought = {name for line in lines if str(line.module).startswith("stablefield.") for name in line.names}
    assert {alias.asname or alias.name for alias in brought} == set(stablefield.__all__)

"""The layers of the package: imports only go down, names can be found, and everything public is described.

A room is a module or a package at the top of the package, such as `pool` or `targets`.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import stablefield

HOUSE = Path(stablefield.__file__).parent
FLOORS = (
    {"process", "networks", "precision", "seeding", "schedule", "extras", "kinds"},
    {"times", "prediction", "kernel", "pool", "augmentation"},
    {"targets", "preconditioning", "denoise"},
    {"objective", "sample", "likelihood", "stable", "floor"},
    {"config", "checkpoint", "data", "distributed", "files", "pickles", "recipes"},
    {"run", "build", "interop"},
    {"generate"},
    {"engine", "evaluate"},
    {"studies"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
SPINE = {room for rooms in FLOORS[:4] for room in rooms}
LONG: dict[str, str] = {}  # files over 400 lines, and the reason


MODULES = sorted(path for path in HOUSE.rglob("*.py") if path != HOUSE / "__init__.py")


def relative(path: Path) -> str:
    return str(path.relative_to(HOUSE))


every_module = pytest.mark.parametrize("path", MODULES, ids=relative)


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
    return {name.split(".")[1] for name in ours(parsed(path)) if "." in name} - {room_of(path)}


@every_module
def test_every_module_has_a_floor(path: Path) -> None:
    assert room_of(path) in FLOOR, f"{room_of(path)} is in no floor of the table: say in this test where it lives"


@every_module
def test_ours_is_imported_by_its_full_name_and_never_from_the_package_s_face(path: Path) -> None:
    tree = parsed(path)
    tree.body = [line for line in tree.body if ast.unparse(line) != "from stablefield import __version__"]
    for name in ours(tree):
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


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in SPINE], ids=relative)
def test_the_spine_is_pure_mathematics(path: Path) -> None:
    brought = {name.split(".")[0] for name in imports(parsed(path))}
    libraries = {"torch", "jaxtyping", "typing_extensions"}
    optional = {"targets/knn.py": {"faiss"}, "sample/adaptive.py": {"torchdiffeq"}}  # if they are installed
    libraries |= optional.get(relative(path), set())
    assert brought - sys.stdlib_module_names <= libraries | {"stablefield"}
    assert not brought & {"os", "io", "pathlib", "random", "shutil", "sys"}


# Commands are the one exception: they import what they work with when they run, so that --help and the options that
# they check themselves do not import torch.
@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) not in ("cli", "__main__")], ids=relative)
def test_nothing_of_ours_is_imported_inside_a_function(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not ours(node), f"{path.name}: {node.name} imports {ours(node)}"


def read_by_strings(tree: ast.AST) -> Iterator[str]:
    """Reads such as `config["data"]` and `run.config.sections.get("data")`."""
    for node in ast.walk(tree):
        called = (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop")
        )
        if isinstance(node, ast.Subscript) or called:
            read = node.value if isinstance(node, ast.Subscript) else node.func.value
            key = node.slice if isinstance(node, ast.Subscript) else next(iter(node.args), None)
            name = ast.unparse(read).rpartition(".")[2]
            if name in ("config", "sections") and isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield ast.unparse(node)


# where the description in a checkpoint, of which the configuration is a part, is checked or converted
DESCRIPTION = {"checkpoint.py", "run/trained.py", "interop/convert.py"}
NOT_CONFIG = [p for p in MODULES if room_of(p) != "config" and relative(p) not in DESCRIPTION]


@pytest.mark.parametrize("path", NOT_CONFIG, ids=relative)
def test_a_configuration_is_read_by_strings_in_config_alone(path: Path) -> None:
    assert not list(read_by_strings(parsed(path)))


def test_reads_by_strings_are_found() -> None:
    reads = (
        'config["data"]["path"]; run.config.sections["data"]; sections.get("data", {}); config.kind("data"); x["data"]'
    )
    assert list(read_by_strings(ast.parse(reads))) == [
        "run.config.sections['data']",
        "sections.get('data', {})",
        "config['data']",
    ]


def test_networks_know_nothing_of_diffusion() -> None:
    for path in MODULES:
        if room_of(path) == "networks":
            assert not rooms_below(path)


def test_at_most_18_modules_stand_at_the_top() -> None:
    assert len({path.name for path in HOUSE.glob("*.py")} - {"__init__.py", "__main__.py"}) <= 18


def test_long_files_have_a_reason() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in HOUSE.rglob("*.py")}
    assert {file for file, length in lengths.items() if length > 400} == LONG.keys()


# --- names ------------------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    return ".".join(("stablefield", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__")


def test_no_module_is_shadowed_by_a_name_of_its_package() -> None:
    names = [module_name(path) for path in MODULES if path.name != "__main__.py"]
    modules = {name: import_module(name) for name in names}
    for name, module in modules.items():
        package, _, last = name.rpartition(".")
        assert getattr(sys.modules[package], last) is module, f"{package} has another {last} than its module"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=relative)
def test_every_package_lists_its_public_names(path: Path) -> None:
    module = import_module(module_name(path))
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, name) for name in listed)
    # classes and functions that are defined here and are public by their name
    public = {node.name for node in parsed(path).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {name for name in public if not name.startswith("_")} <= set(listed)


@every_module
def test_public_names_of_a_module_are_those_without_an_underscore(path: Path) -> None:
    assert path.name == "__init__.py" or "__all__" not in path.read_text(encoding="utf-8")


def python(code: str) -> list[str]:
    """The words that a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "matplotlib", "sklearn", "pydantic", "typer", "rich", "PIL"}
    assert python(f"import sys, stablefield; dir(stablefield); print(*({heavy} & set(sys.modules)))") == []


def test_submodules_are_found_without_a_further_import() -> None:
    assert python("import stablefield; print(stablefield.targets.STFTarget.__name__)") == ["STFTarget"]
    found = python("import stablefield; print(stablefield.run.RunFolder.__name__, stablefield.build.build.__name__)")
    assert found == ["RunFolder", "build"]
    assert {room_of(path) for path in MODULES} - {"__main__"} <= set(dir(stablefield))
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = stablefield.nowhere


def test_the_public_face_is_small_and_every_name_of_it_resolves() -> None:
    assert len(set(stablefield.__all__)) == len(stablefield.__all__) <= 25
    for name in stablefield.__all__:
        assert getattr(stablefield, name).__name__ == name
    # what type checkers see is what is listed
    lines = [node for node in ast.walk(parsed(HOUSE / "__init__.py")) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name for line in lines if str(line.module).startswith("stablefield.") for alias in line.names}
    assert seen == set(stablefield.__all__)


# --- descriptions -----------------------------------------------------------------------------------------------------


def entries(docstring: str | None) -> dict[str, str]:
    """Descriptions in the sections Args and Attributes of a docstring, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    section = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        if line and not line.startswith(" "):
            section, names = line, []
        elif section in ("Args:", "Attributes:"):
            if entry := re.match(r"    \*{0,2}(\w[\w, ]*?)(?: \([^)]*\))?:\s(.*)", f"{line} "):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2].strip())
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def undescribed(names: list[str], *docstrings: str | None) -> list[str]:
    """Names that no docstring describes by more than the name itself."""
    described = {name: text for docstring in docstrings for name, text in entries(docstring).items()}
    return [name for name in names if len(described.get(name, "").rstrip(". ")) <= len(name)]


def decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    return {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list}


def parameters(node: ast.FunctionDef) -> list[str]:
    given = node.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in all_of_them if each and each.arg not in ("self", "cls") and each.arg[0] != "_"]


def is_command(node: ast.FunctionDef) -> bool:
    """True for commands of the command line, whose parameters are described by their help."""
    return "typer." in ast.unparse(node.args)


def fields_of(node: ast.ClassDef) -> list[str]:
    """Public fields of a dataclass or a named tuple."""
    if "dataclass" not in decorators(node) and "NamedTuple" not in map(ast.unparse, node.bases):
        return []
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    names = [each.target.id for each in fields if not ast.unparse(each.annotation).startswith("ClassVar")]
    return [name for name in names if not name.startswith("_")]


def faults_of_function(node: ast.FunctionDef, name: str, *docstrings: str | None) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring is None and not docstrings:
        yield f"{name} has no docstring"
    missing = [] if is_command(node) else undescribed(parameters(node), docstring, *docstrings)
    yield from (f"{name} does not describe {parameter}" for parameter in missing)


def faults_of_class(node: ast.ClassDef) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring is None:
        yield f"{node.name} has no docstring"
    yield from (f"{node.name} does not describe {field}" for field in undescribed(fields_of(node), docstring))
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or decorators(method) & {"override", "overload", "setter"}:
            continue
        if method.name == "__init__":
            yield from faults_of_function(method, node.name, docstring)
        elif method.name == "__call__" or not method.name.startswith("_"):
            yield from faults_of_function(method, f"{node.name}.{method.name}")


def faults(tree: ast.Module) -> Iterator[str]:
    """Public names of a module that are not described."""
    if ast.get_docstring(tree) is None:
        yield "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from faults_of_class(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and "overload" not in decorators(node):
            yield from faults_of_function(node, node.name)


@every_module
def test_everything_public_is_described(path: Path) -> None:
    found = list(faults(parsed(path)))
    assert not found, "\n".join(found)


def test_what_is_not_described_is_found() -> None:
    source = '''
        """A module."""

        @dataclass(frozen=True)
        class Part:
            """A part.

            Attributes:
                size: number of things,
                    in pieces.
                left, right: the two ends.
                name: name
            """

            size: int
            left: int
            right: int
            name: str
            other: float
            _hidden: int

            def grow(self, by: int, *, often: int, **rest: int) -> None:
                """Grow.

                Args:
                    by: how far it grows.
                    **rest: anything else.

                Raises:
                    often: never.
                """

            @property
            def area(self) -> int:
                return 1

            @override
            def shrink(self, by: int) -> None: ...

            def _secret(self, by: int) -> None: ...

        class Net(Module):
            """A network.

            Args:
                shape: shape of its input.
            """

            def __init__(self, shape, width=3) -> None: ...

        def command(path: Annotated[Path, typer.Option(help="The file.")]) -> None:
            """Do it."""
    '''
    assert list(faults(ast.parse(inspect.cleandoc("\n" + source)))) == [
        "Part does not describe name",
        "Part does not describe other",
        "Part.grow does not describe often",
        "Part.area has no docstring",
        "Net does not describe width",
    ]

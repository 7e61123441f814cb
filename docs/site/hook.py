"""What the website adds to the pages in docs: formulas as MathML, the API reference, and the changelog.

Formulas are written as GitHub shows them: `$...$` in a line, and fenced blocks of the language `math`. They become
MathML when the site is built, so that the browser of the reader needs no script for them.
"""

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FORMULA = r"(?<![\\$\w])\$(?=[^\s$])([^$`]+?)(?<=[^\s\\])\$(?![\w$])"

# pages of the API reference: title, introduction, and the modules whose public names are on it
PAGES = {
    "loop": ("Targets in your loop", ["stable", "kernel"]),
    "process": ("Processes and noise levels", ["process", "times", "prediction"]),
    "targets": ("Targets", ["targets", "pool", "augmentation"]),
    "networks": ("Networks and denoisers", ["denoise", "preconditioning", "networks", "precision"]),
    "loss": ("Loss and its floor", ["objective", "floor"]),
    "sample": ("Samplers and likelihood", ["sample", "likelihood", "seeding"]),
    "data": ("Data", ["data"]),
    "training": (
        "Training and runs",
        ["engine", "engine.fit", "schedule", "run", "build", "config", "recipes", "checkpoint", "distributed"],
    ),
    "evaluate": ("Samples and scores", ["generate", "evaluate"]),
    "studies": ("Studies", ["studies.field", "studies.compare", "studies.floor"]),
    "interop": (
        "Other packages",
        ["interop.diffusers", "interop.lightning", "interop.torchcfm", "interop.edm", "interop.convert"],
    ),
}


def module_file(name: str) -> Path:
    """Source file of a module of the package; an empty name is the package itself."""
    path = ROOT.joinpath("src", "stablefield", *name.split(".") if name else ())
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def assigned(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def public_names(name: str) -> list[str]:
    """The `__all__` of a package; the names of a module that begin with no underscore."""
    body = ast.parse(module_file(name).read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and assigned(node) == ["__all__"]:
            return list(ast.literal_eval(node.value))
    names = dict.fromkeys(each for node in body for each in assigned(node) if not each.startswith("_"))
    return [each for each in names if each not in ("LOGGER", "T")]


def summary(module: str, name: str) -> str:
    """First line of the docstring of a class or function, wherever it is defined below a module."""
    file = module_file(module)
    for path in file.parent.rglob("*.py") if file.name == "__init__.py" else [file]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return (ast.get_docstring(node) or "").partition("\n")[0].replace("|", "given")
    raise LookupError(f"stablefield.{module}.{name}")


def reference_page(title: str, modules: list[str]) -> str:
    """Markdown of a page of the API reference."""
    parts = [f"# {title}"]
    for module in modules:
        names = "\n".join(f"        - {name}" for name in public_names(module))
        parts.append(f"::: stablefield.{module}\n    options:\n      members:\n{names}")
    return "\n\n".join(parts) + "\n"


def reference_index() -> str:
    """Markdown of the first page of the API reference: the names of the package itself, and all other names."""
    lines = ["# API reference", "", "## Names of the package", ""]
    lines += ["`import stablefield` gives these; they are imported when they are first used.", ""]
    homes = {name: module for _, modules in PAGES.values() for module in modules for name in public_names(module)}
    lines += ["| name | description |", "|---|---|"]
    for name in sorted(public_names(""), key=str.lower):
        lines.append(f"| [`{name}`][stablefield.{homes[name]}.{name}] | {summary(homes[name], name)} |")
    lines += ["", "## All public names", ""]
    for title, modules in PAGES.values():
        lines += [f"### {title}", ""]
        for module in modules:
            links = ", ".join(f"[`{name}`][stablefield.{module}.{name}]" for name in public_names(module))
            lines += [f"**`stablefield.{module}`**: {links}", ""]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the API reference and the changelog, which are not in the folder docs."""
    pages = {f"api/{page}.md": reference_page(*content) for page, content in PAGES.items()}
    pages |= {"api/index.md": reference_index(), "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


class InlineFormula(InlineProcessor):
    """`$...$` as MathML."""

    def handleMatch(self, match: re.Match[str], data: str) -> Any:  # noqa: N802, a name of Python-Markdown
        """Return the formula, and where it begins and ends."""
        return self.md.htmlStash.store(convert(match[1])), match.start(), match.end()


class Shape(InlineProcessor):
    """The star of a shape such as (N, *D), which is not emphasis."""

    def handleMatch(self, match: re.Match[str], data: str) -> Any:  # noqa: N802
        """Return the star, and where it begins and ends."""
        return self.md.htmlStash.store("*"), match.start(), match.end()


class Doctests(Preprocessor):
    """Examples that begin with >>> in docstrings, as blocks of code instead of quotations."""

    def run(self, lines: list[str]) -> list[str]:
        """Fence every example, up to the next empty line."""
        found: list[str] = []
        inside = False
        for line in lines:
            begins, ends = line.startswith(">>> ") and not inside, inside and not line.strip()
            found += ["```pycon"] * begins + ["```"] * ends + [line]
            inside = (inside or begins) and not ends
        return found + ["```"] * inside


class Pages(Extension):
    """Formulas, shapes and examples."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, a name of Python-Markdown
        """Register the processors; formulas come after code, and before backslashes and emphasis."""
        md.inlinePatterns.register(InlineFormula(FORMULA, md), "formula", 185)
        md.inlinePatterns.register(Shape(r"(?<=[(, ])\*(?=[A-Z]\b)", md), "shape", 184)
        md.preprocessors.register(Doctests(md), "doctests", 35)


def display(source: str, language: str, css_class: str, options: dict, md: Markdown, **rest: Any) -> str:
    """A fenced block of the language `math` as MathML on a line of its own."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read formulas in every page."""
    config.markdown_extensions.append(Pages())
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": display})
    return config

"""The documentation as a website: every page has its place, every public name its entry, and nothing is downloaded.

What needs no build is checked always. The slow tests build the site with mkdocs, if it is installed (`make docs`).
"""

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import stablefield

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = Path(stablefield.__file__).parent
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REPORTS = {page for page in PAGES if re.fullmatch(r"results/.*-.*\.md", page)}  # reached from results/README.md
# not for users: the command line, and what other modules are made of
INNER = {"__init__", "__main__", "cli", "extras", "files", "kinds", "pickles"}


def reference() -> dict[str, tuple[str, list[str]]]:
    """Pages of the API reference: title and modules."""
    for node in ast.parse((DOCS / "site" / "hook.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGES":
            return ast.literal_eval(node.value)
    raise LookupError("PAGES")


REFERENCE = reference()
MODULES = [module for _, modules in REFERENCE.values() for module in modules]


def public_names(module: str) -> set[str]:
    """The `__all__` of a package; classes and functions of a module."""
    path = PACKAGE.joinpath(*module.split("."))
    body = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")).body
    listed = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    if listed:
        return set(ast.literal_eval(listed[0]))
    defined = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {name for name in defined if not name.startswith("_")}


def entries(nav: list) -> Iterator[tuple[str, str]]:
    """Title and page of every entry of the navigation."""
    for entry in nav:
        for title, page in entry.items() if isinstance(entry, dict) else [("", entry)]:
            if isinstance(page, list):
                yield from entries(page)
            else:
                yield title, page


# --- without a build --------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_once() -> None:
    listed = [page for _, page in entries(SETTINGS["nav"])]
    generated = {f"api/{page}.md" for page in ("index", *REFERENCE)} | {"changelog.md"}
    assert len(set(listed)) == len(listed)
    assert set(listed) == PAGES.keys() - REPORTS | generated


def test_reports_are_reached_from_the_page_of_results() -> None:
    for page in REPORTS:
        assert page.removeprefix("results/") in PAGES["results/README.md"], f"results/README.md does not link {page}"


def test_every_public_module_is_in_the_reference() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {module.partition(".")[0] for module in MODULES} == rooms - INNER
    titles = {page: title for title, page in entries(SETTINGS["nav"])}
    for page, (title, _) in REFERENCE.items():
        assert titles[f"api/{page}.md"] == title


def test_every_name_of_the_package_is_in_the_reference() -> None:
    described = {name for module in MODULES for name in public_names(module)}
    assert set(stablefield.__all__) <= described


def test_formulas_survive_github() -> None:
    """GitHub removes the backslash of escaped punctuation in formulas that are not in a fenced block."""
    count = 0
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        assert "$$" not in prose, page
        for formula in re.findall(r"\$([^$]+)\$", prose):
            count += 1
            assert not re.search(r"\\[^a-zA-Z]|[*|]", formula), f"{page}: ${formula}$"
    assert count > 20


def test_no_page_installs_the_package_from_a_registry() -> None:
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", *ROOT.glob("examples/*")]:
        if page.is_file():
            assert not re.search(r"pip install (-\S+ )*['\"]?stablefield", page.read_text(encoding="utf-8")), page


# --- with a build -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built into a temporary folder."""
    own = ROOT / ".venv-docs" / "bin"
    path = os.pathsep.join([str(own), os.environ["PATH"]])
    mkdocs = shutil.which("mkdocs", path=path)
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PATH": path, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Addresses that a browser requests to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object", "input"):
            self.found += [given[key] or "" for key in ("src", "data", "srcset", "poster") if key in given]


ABSOLUTE = re.compile(r"(https?:)?//")


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > len(PAGES) - len(REPORTS)
    for page in site.rglob("*.html"):
        loads, text = Loads(), page.read_text(encoding="utf-8")
        loads.feed(text)
        assert loads.found
        assert not [address for address in loads.found if ABSOLUTE.match(address)], page
        assert 'class="mermaid"' not in text  # the theme would download a script for diagrams,
        assert 'data-md-component="source"' not in text  # and figures of a repository
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    for page, (_, modules) in REFERENCE.items():
        anchors = set(re.findall(r' id="([\w.]+)"', (site / "api" / f"{page}.html").read_text(encoding="utf-8")))
        assert {f"stablefield.{module}.{name}" for module in modules for name in public_names(module)} <= anchors


@pytest.mark.slow
def test_formulas_are_mathml(site: Path) -> None:
    for page in ("targets", "loss", "index"):
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        formulas = re.findall(r"<math.*?</math>", text, re.DOTALL)
        assert len(formulas) >= PAGES[f"{page}.md"].count("```math") + 1
        assert not [formula for formula in formulas if "\\" in formula]  # a command that was not understood
        article = re.sub(r"<(code|pre|script).*?</\1>", "", text[text.index("<article") :], flags=re.DOTALL)
        assert "$" not in article


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(address: str, folder: Path) -> tuple[str, set[str]]:
    """A page after its scripts ran, without a network, and the hosts that it asked for."""
    log = folder / "log.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--disable-gpu"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=10000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", address]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    asked = [each["url"] for each in events if each.get("initiator", "not an origin") != "not an origin"]
    return page, {host for url in asked if (host := urlsplit(url).hostname)}  # without those of the browser itself


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_without_network_shows_and_searches_the_site_and_requests_nothing(site: Path, tmp_path: Path) -> None:
    shown, hosts = browse((site / "targets.html").as_uri(), tmp_path)
    assert "<article" in shown
    assert not hosts
    found, hosts = browse((site / "api" / "targets.html").as_uri() + "?q=posterior", tmp_path)
    assert re.search(r"[1-9]\d* matching documents", found)
    assert not hosts
    with_image = tmp_path / "with-image.html"
    with_image.write_text('<img src="http://images.example/image.png">')
    assert browse(with_image.as_uri(), tmp_path)[1] == {"images.example"}

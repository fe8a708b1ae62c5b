"""The pages of documentation lead somewhere: links, anchors, navigation, the site built of them, the tutorials."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import condense
from tests.types_seen import FOLDERS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
ELSEWHERE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/parity/README.md")]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the Python objects in it."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def prose(page: Path) -> str:
    """The text of a page without blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=\n\n)(    .*\n|\n)+", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def entries(nav: object) -> list[str]:
    """The files named in the navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [file for part in (nav.values() if isinstance(nav, dict) else nav) for file in entries(part)]  # type: ignore


def test_every_page_is_in_the_navigation_once() -> None:
    named = entries(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    made = {"index.md", "changelog.md", "contributing.md", "parity.md"}  # of the files outside of docs/
    made |= {path.with_suffix(".md").relative_to(DOCS).as_posix() for path in NOTEBOOKS}
    written = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert sorted(named) == sorted(written | made)


@pytest.mark.parametrize("page", [*PAGES, *ELSEWHERE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^):#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    assert set(re.findall(r"^::: condense\.(\w+)$", text, re.MULTILINE)) == {*condense.__all__, "testing"}


def test_the_container_is_given_what_the_package_is_built_of() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", *FOLDERS}
    shown = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in shown if line.startswith("!")}


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its last epoch" in (tmp_path / "api" / "functions.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "methods/mtt.html" in links and not any(link.startswith("docs/") for link in links)

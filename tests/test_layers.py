"""Imports flow one way: cli, api -> methods, buffers, eval -> core."""

import ast
from pathlib import Path

from condense.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("methods", "buffers", "eval")
FRONT = {
    "cli.py",
    "commands.py",
    "api.py",
    "demo.py",
    "overview.py",
    "show.py",
    "testing.py",
    "__main__.py",
    "__init__.py",
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found if name.startswith("condense")}


def touches(names: set[str], package: str) -> bool:
    prefix = f"condense.{package}"
    return any(name == prefix or name.startswith(prefix + ".") for name in names)


def test_the_core_imports_no_sibling() -> None:
    files = [
        file for file in (ROOT / "condense").rglob("*.py") if file.name not in FRONT or file.parent.name != "condense"
    ]
    assert len(files) > 20
    for file in files:
        for package in SIBLINGS:
            assert not touches(imports(file), package), f"{file.name} imports condense.{package}"


def test_siblings_import_the_core_and_themselves_only() -> None:
    for package in SIBLINGS:
        files = list((ROOT / package).rglob("*.py"))
        assert files
        for file in files:
            names = imports(file)
            for other in (*SIBLINGS, "api", "cli", "commands", "registry", "recipe"):
                if other != package:
                    assert not touches(names, other), f"{package}/{file.name} imports condense.{other}"


def test_the_core_names_no_method() -> None:
    """Only the registry's table knows them."""
    words = set(METHODS) - {"random", "dsa", "tesla"}  # words of the core, too: of data, augmentation and adjoints
    for file in (ROOT / "condense").rglob("*.py"):
        if file.parent.name == "condense" and file.name in (*FRONT, "registry.py"):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & (words), file

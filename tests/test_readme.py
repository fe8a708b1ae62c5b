"""What the README shows works as it stands."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert example, "README.md has no python block"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    exec(compile(example[1], str(README), "exec"), {"__name__": "readme"})


def test_what_the_pages_import_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = {("condense", name) for name in re.findall(r"\bcondense\.([a-z_]+)\(", text)}
    for module, names in re.findall(r"^from (condense[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        shown |= {(module, name.strip()) for name in names.split(",")}
    assert len(shown) > 5
    for module, name in shown - {("condense_sliced", "Sliced")}:  # the example of the page that adds a method
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

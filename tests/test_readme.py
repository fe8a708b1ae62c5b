"""What the README shows works as it stands."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program in the README, in a folder of its own."""
    found = re.search(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found, "README.md has no python block"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    return found[1]


def run(program: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(program, str(README), "exec"), names)
    return names


def test_the_python_example_runs_in_few_steps(example: str) -> None:
    for name, value, fewer in (("num_experts", 3, 1), ("num_steps", 60, 2), ("num_seeds", 3, 2)):
        assert f"{name}={value}" in example
        example = example.replace(f"{name}={value}", f"{name}={fewer}")
    run(example)


@pytest.mark.slow
def test_the_python_example_beats_random_images_and_runs_twice(example: str) -> None:
    first, again = run(example)["evaluation"], run(example)["evaluation"]
    assert [result.accuracies for result in first.results] == [result.accuracies for result in again.results]
    means = {(result.method, result.network): result.mean for result in first.results}
    for network in {network for _, network in means}:
        assert means["random", network] + 0.1 < means["mtt", network] < means["full", network]


def test_what_the_pages_import_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = {("condense", name) for name in re.findall(r"\bcondense\.([a-z_]+)\(", text)}
    for module, names in re.findall(r"^from (condense[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        shown |= {(module, name.strip()) for name in names.split(",")}
    assert len(shown) > 5
    for module, name in shown - {("condense_sliced", "Sliced")}:  # the example of the page that adds a method
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

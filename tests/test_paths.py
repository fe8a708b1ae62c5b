"""What people come for, from the first command to the last, with the commands of the pages and less work."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condense import cli
from condense.eval.protocol import PROTOCOLS

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Page:
    """A page, or the part of it between two headings."""

    def __init__(self, name: str, first: str = "", last: str = "") -> None:
        text = (DOCS / name).read_text(encoding="utf-8")
        self.text = text[text.index(first) : text.index(last) if last else None]
        self.programs = re.findall(r"^```python\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)
        self.commands = re.findall(r"^    condense (.*)$", self.text, re.MULTILINE)

    def run(self, command: str, shorter: Mapping[str, str] = {}) -> None:
        """Run one of the commands, in which parts are replaced."""
        assert command in self.commands
        for part, other in shorter.items():
            command = command.replace(part, other)
        cli.main(shlex.split(command))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a cache of its own, and protocols of few epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    for name in ("canonical", "canonical-dsa"):
        monkeypatch.setitem(PROTOCOLS.own, name, dataclasses.replace(PROTOCOLS[name], num_epochs=2))
    return tmp_path


def rows(file: str) -> set[tuple[str, str]]:
    """Method and network of each result in a file."""
    return {(row["method"], row["network"]) for row in json.loads(Path(file).read_text())["results"]}


def an_idea(data: str, shorter: Mapping[str, str]) -> None:
    """Walk through the comparison of the example method with a published one on ``data``."""
    page = Page("adding-a-method.md", "## Beside a published method", "## What a method is given")
    (module, _) = Page("adding-a-method.md").programs
    Path("condense_sliced.py").write_text(module)
    small = {"--dataset cifar10": f"--dataset {data}", " --download True": "", "alexnet": "convnet:depth=2,width=4"}
    tiny = "convnet:depth=1,width=4"
    buffer, mtt, sliced, evaluate, compare, report = page.commands
    page.run(buffer, {**small, **shorter, "experts 10": f"experts 1 --network {tiny}", "epochs 22": "epochs 2"})
    few = f"--network {tiny} --method.num-steps 2"
    fields = "--method.syn-steps 2 --method.expert-epochs 1 --method.max-start-epoch 1"
    page.run(mtt, {**small, **shorter, "--ipc 10": f"--ipc 1 {few} {fields}"})
    page.run(sliced, {**small, **shorter, "--ipc 10": f"--ipc 1 {few}"})
    short = {**small, "convnet ": f"{tiny} ", "--protocol": "--num-seeds 1 --protocol"}
    page.run(evaluate, short)
    page.run(compare, short)
    page.run(report)
    networks = (tiny, "mlp", "convnet:depth=2,width=4")
    methods = {"random", "herding", "full", "condense_sliced:Sliced"}
    assert rows("runs/sliced/evaluation.json") >= {(method, network) for method in methods for network in networks}
    assert {("mtt", network) for network in networks} <= rows("runs/mtt/evaluation.json")
    assert "condense_sliced:Sliced" in Path("runs/sliced/report.html").read_text()


def test_an_idea_is_tested_beside_a_published_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few images in the shape of CIFAR-10."""
    monkeypatch.delitem(sys.modules, "condense_sliced", raising=False)
    draw, labels = np.random.default_rng(0), np.arange(60) % 10
    images = draw.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez("few.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    an_idea("few.npz", {" --transform zca": ""})


@pytest.mark.slow
def test_an_idea_is_tested_on_cifar10(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "condense_sliced", raising=False)
    packed = shared_data / "cifar10_packed.npz"
    subprocess.run([sys.executable, shared_data / "unpack.py", packed, "cifar10.npz"], check=True)
    an_idea("cifar10.npz", {})


def test_photos_become_a_distilled_set(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("photos.md", last="## Classes of unequal size")
    photos, call, _ = page.programs
    exec(compile(photos, "photos.md", "exec"), {"__name__": "photos"})
    prepare, *others = page.commands
    page.run(prepare)
    assert capsys.readouterr().out in page.text
    values: dict[str, Any] = {}
    code, _, claim = call.strip().rpartition("\n")
    exec(code, values)
    shown, _, expected = claim.partition("  # ")
    assert eval(shown, values) == eval(expected)
    assert Path("shapes.npz").read_bytes() == Path("again.npz").read_bytes()
    for command in others:
        page.run(command, {"num-steps 100": "num-steps 2", "--num-seeds 3": "--num-seeds 1", "width=32": "width=4"})
    assert len(others) == 4 and "dm, ipc 1" in Path("runs/shapes/report.html").read_text()
    assert len(list(Path("shapes-distilled").glob("*/*.png"))) == 3


def test_two_published_sets_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("tutorials/reviewing.md")
    (program,) = page.programs
    dm, herding = 'distill("dm", ', 'distill("herding", '
    assert dm in program and herding in program
    exec(program.replace(dm, dm + "num_steps=2, ").replace(herding, herding + "num_epochs=1, "), {"__name__": "page"})
    first, second, *rest = page.commands
    page.run(first)
    assert capsys.readouterr().out in page.text
    page.run(second)
    for command in rest:
        page.run(command, {"convnet:depth=2,width=32 mlp": "mlp", "--num-seeds 5": "--num-seeds 1"})
    compare, _, report = rest
    assert compare.startswith("compare") and report.startswith("report")
    for name in ("dm", "herding"):
        assert {(f"imported:{name}", "mlp"), ("random", "mlp"), ("full", "mlp")} <= rows(f"{name}.evaluation.json")
    written = Path("dm.report.html").read_text()
    assert "imported:herding" in written and "condense evaluate herding.safetensors" in written
    assert "condense distill" not in written

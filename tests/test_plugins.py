"""Another package that provides one of everything, installed for a moment."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condense import plugins
from condense.cli import main
from condense.inner import ADJOINTS, Exact
from condense.networks import resolve
from condense.plugins import Registry, instance_of, subclass_of, summaries
from condense.synthetic import DECODERS, Decode, Pixels

ENTRIES = """
[condense.methods]
drift = condense_foreign:Drift

[condense.decoders]
negative = condense_foreign:Negative

[condense.labels]
smoothed = condense_foreign:Smoothed

[condense.networks]
linear = condense_foreign:Linear

[condense.datasets]
bars = condense_foreign:bars

[condense.protocols]
short = condense_foreign:SHORT

[condense.adjoints]
plain = condense_foreign:Plain
"""

MODULE = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from condense.eval.protocol import Protocol
from condense.inner import Adjoint
from condense.method import GradientMethod, GradientState
from condense.networks import Network
from condense.synthetic import Decode, Labels
from condense.synthetic.labels import Assigned


@dataclass(frozen=True, kw_only=True)
class Drift(GradientMethod):
    """Pulls images and labels to zero."""

    num_steps: int = 2
    learns_labels: ClassVar[bool] = False

    def init(self, ctx):
        syn = ctx.new_set(*ctx.initial("real"))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def loss(self, ctx, state, step, part):
        return state.syn()[0].square().mean()


class _Negated(nn.Module):
    def forward(self, latents, classes):
        return -latents


@dataclass(frozen=True, kw_only=True)
class Negative(Decode):
    """The negatives of the stored images."""

    name: ClassVar[str] = "negative"
    stores_pixels: ClassVar[bool] = True

    def build(self, input_shape, num_classes):
        return _Negated()

    def encode(self, images, classes, decoder, generator):
        return -images


@dataclass(frozen=True, kw_only=True)
class Smoothed(Labels):
    """One class, and a little of all others."""

    name: ClassVar[str] = "smoothed"
    space: ClassVar[Literal["classes", "probabilities", "values"]] = "probabilities"
    share: float = 0.1

    def build(self, labels, num_classes):
        classes = labels if labels.dim() == 1 else labels.argmax(1)
        return Assigned((1 - self.share) * F.one_hot(classes, num_classes) + self.share / num_classes)


class Linear(Network):
    """A linear layer on the pixels."""

    def __init__(self, input_shape, num_classes, *, scale: int = 1):
        super().__init__()
        self.scale = scale
        self.classifier = nn.Linear(int(np.prod(input_shape)), num_classes)

    def embed(self, x):
        return self.scale * x.flatten(1)


def bars(root: Path, download: bool):
    """Two classes: bright rows and bright columns."""
    parts = []
    for num in (12, 6):
        images, labels = np.zeros((num, 8, 8), np.uint8), np.arange(num) % 2
        for i, label in enumerate(labels):
            images[(i, i % 8) if label else (i, slice(None), i % 8)] = 250 - i
        parts += [images, labels]
    return tuple(parts)


SHORT = Protocol(name="short", num_epochs=2)


@dataclass(frozen=True)
class Plain(Adjoint):
    """Autograd through everything."""

    name: ClassVar[str] = "plain"
    exact: ClassVar[bool] = True

    def run(self, rollout):
        point = rollout.start
        for t in range(len(rollout)):
            point = rollout.step(t, point)
        return point[0]
'''

LISTED = {
    "methods": ("drift", "Pulls images and labels to zero."),
    "decoders": ("negative", "The negatives of the stored images."),
    "labels": ("smoothed", "One class, and a little of all others."),
    "networks": ("linear", "A linear layer on the pixels. [scale=1]"),
    "datasets": ("bars", "Two classes: bright rows and bright columns."),
    "protocols": ("short", "2 epochs"),
    "adjoints": ("plain", "Autograd through everything."),
}


RUN = ["--network", "linear:scale=2", "--ipc", "2", "--decode", "negative", "--labels", "smoothed", "--out", "run"]
WITH: dict[str, list[str]] = {
    **{kind: ["list", kind, "--json"] for kind in LISTED},
    "run": ["distill", "drift", "--dataset", "bars", "--device", "cpu", *RUN],
    "evaluation": ["evaluate", "run", "--protocol", "short", "--networks", "linear", "--num-seeds", "1"],
    "again": ["distill", "run/recipe.yaml", "--device", "cpu", "--out", "again"],
    "adjoint": [
        *("distill", "dd", "--method.adjoint", "plain", "--method.num-steps", "1", "--dataset", "bars", "--ipc", "1"),
        *("--network", "mlp", "--device", "cpu", "--out", "dd"),
    ],
}
WITHOUT: dict[str, tuple[list[str], str]] = {
    "set": (
        ["show", "run"],
        "its decode 'negative' needs the package 'condense-foreign', which is",
    ),
    "evaluation": (["evaluate", "run"], "run/synthetic.safetensors cannot be read: its decode 'negative' needs"),
    "recipe": (["distill", "run/recipe.yaml", "--out", "other"], "unknown method 'drift'"),
    "data": (["distill", "random", "--dataset", "bars"], "no data set 'bars'"),
    "network": (["distill", "random", "--network", "linear"], "unknown network 'linear'"),
    "labels": (["distill", "random", "--labels", "smoothed"], "unknown labels 'smoothed'"),
}
Printed = dict[str, tuple[int, str, str]]
"""Exit status and what is printed of each command."""


def condense(commands: dict[str, list[str]]) -> Printed:
    printed = {}
    for name, words in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status = main(words) or 0
            except SystemExit as leave:
                status = int(leave.code or 0)
        printed[name] = (status, out.getvalue(), err.getvalue())
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONDENSE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Printed:
    """What the commands print where the package is installed: its module lies beside its metadata."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "condense_foreign-0.1.dist-info"
    metadata.mkdir()
    (site / "condense_foreign.py").write_text(MODULE)
    (metadata / "METADATA").write_text("Name: condense-foreign\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(ENTRIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        printed = condense(WITH)
    del sys.modules["condense_foreign"]
    return printed


@pytest.fixture(scope="module")
def refused(printed: Printed) -> Printed:
    """What they print where it is not installed."""
    return condense({name: words for name, (words, _) in WITHOUT.items()})


@pytest.mark.parametrize("kind", LISTED)
def test_each_of_them_is_listed(kind: str, printed: Printed) -> None:
    name, line = LISTED[kind]
    assert json.loads(printed[kind][1])[name].startswith(line)


def test_sets_made_with_them_are_evaluated_with_them(printed: Printed, folder: Path) -> None:
    assert [printed[name][0] for name in ("run", "evaluation", "again")] == [0, 0, 0], printed
    (result,) = json.loads((folder / "run" / "evaluation.json").read_text())["results"]
    assert (result["network"], result["protocol"]) == ("linear", "short")
    made = [(folder / run / "synthetic.safetensors").read_bytes() for run in ("run", "again")]
    assert made[0] == made[1]


def test_an_adjoint_of_theirs_differentiates_a_method_of_ours(printed: Printed, folder: Path) -> None:
    assert printed["adjoint"][0] == 0, printed["adjoint"]
    assert "name: plain" in (folder / "dd" / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", WITHOUT)
def test_without_the_package_one_line_says_what_is_missing(name: str, refused: Printed) -> None:
    status, _, line = refused[name]
    assert status == 2 and line.count("\n") == 1 and WITHOUT[name][1] in line, line


def test_a_package_that_is_installed_or_removed_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata of packages that do not change are read once."""
    site, metadata = tmp_path / "site", tmp_path / "site" / "condense_late-0.1.dist-info"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    assert "late" not in DECODERS
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: condense-late\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[condense.decoders]\nlate = condense_late:Late\n")
    assert "late" in DECODERS and DECODERS.package("late") == "condense-late"
    searched = []
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda: searched.append(1))
    assert "late" in DECODERS and not searched
    monkeypatch.undo()
    assert "late" not in DECODERS


class Broken:
    """What a package may get wrong."""


@dataclass(frozen=True, kw_only=True)
class Misnamed(Pixels):
    name = "other"


@dataclass(frozen=True, kw_only=True)
class Demanding(Pixels):
    name = "entry"
    factor: int


class Outer:
    @dataclass(frozen=True, kw_only=True)
    class Inner(Pixels):
        name = "entry"


def provide(monkeypatch: pytest.MonkeyPatch, *values: str, name: str = "entry") -> None:
    """Let packages a, b, ... list these under one name of a decoder."""
    entries = []
    for package, value in zip("abc", values, strict=False):
        entry = EntryPoint(name, value, "condense.decoders")
        vars(entry).update(dist=SimpleNamespace(name=f"package-{package}"))
        entries.append(entry)
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "condense.decoders" else [])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_module:Decode", "cannot be loaded: No module named 'no_such_module'; update or uninstall"),
        (f"{__name__}:NoSuchClass", "cannot be loaded: .*no attribute 'NoSuchClass'; update or uninstall"),
        (f"{__name__}:Broken", "is <class .*Broken'> and not a subclass of condense.synthetic.decode.Decode; update"),
        ("condense.synthetic.decode:Decode", "does not define build, encode; update or uninstall"),
        (f"{__name__}:Misnamed", "has another name, 'other'; update or uninstall"),
        (f"{__name__}:Demanding", "has no default for its field factor; update or uninstall"),
    ],
)
def test_a_broken_entry_is_refused_in_a_line_that_names_its_package(
    value: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide(monkeypatch, value)
    with pytest.raises(ValueError, match=f"^the decoder 'entry' of the package package-a {complaint}"):
        DECODERS["entry"]
    lines = summaries(DECODERS, lambda name: DECODERS[name].__name__)
    assert lines["pixels"] == "Pixels" and lines["entry"].startswith("the decoder 'entry' of the package package-a ")


def test_a_broken_entry_hinders_nobody_who_does_not_use_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = []
    for group in ("condense.decoders", "condense.labels", "condense.adjoints", "condense.networks"):
        entry = EntryPoint("entry", "no_such_module:Thing", group)
        vars(entry).update(dist=SimpleNamespace(name="package-a"))
        broken.append(entry)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry for entry in broken if entry.group == group])
    assert "pixels" in DECODERS.usable() and "entry" not in DECODERS.usable()
    Pixels().require_kind((1, 8, 8))
    assert str(resolve("auto", (1, 8, 8))) == "convnet"
    with pytest.raises(SystemExit):
        main(["distill", "dm", "--help"])
    assert "{pixels," in capsys.readouterr().out


def test_two_packages_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, f"{__name__}:Outer.Inner", "elsewhere:Decode")
    with pytest.raises(
        ValueError, match="is provided by several packages, package-a, package-b; uninstall all but one"
    ):
        DECODERS["entry"]


def test_a_name_of_this_package_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, f"{__name__}:Misnamed", name="pixels")
    assert DECODERS["pixels"] is Pixels and DECODERS.package("pixels") is None
    assert list(DECODERS).count("pixels") == 1 and len(DECODERS) == len(list(DECODERS)) == len(DECODERS.own)


def test_a_nested_class_has_the_name_it_is_listed_under(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, f"{__name__}:Outer.Inner")
    assert DECODERS["entry"] is Outer.Inner and DECODERS.name_of(Outer.Inner) == "entry"
    assert DECODERS.package("entry") == "package-a" and DECODERS.name_of(Misnamed) is None
    alias = Registry[Any]("decoder", "condense.decoders", {"alias": f"{__name__}:Outer.Inner"}, subclass_of(Decode))
    assert alias["alias"] is Outer.Inner and alias.name_of(Outer.Inner) == "alias"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert "exact" in ADJOINTS and "none" not in ADJOINTS and ADJOINTS.get("none") is None
    assert ADJOINTS.named("exact") is Exact
    with pytest.raises(ValueError, match="unknown adjoint 'exakt': did you mean 'exact'"):
        ADJOINTS.named("exakt")


def test_a_value_of_another_class_is_no_instance() -> None:
    complaint = instance_of(Decode)
    assert complaint("pixels", Pixels()) is None
    assert complaint("other", Pixels()) == "has another name, 'pixels'"
    assert "not a condense.synthetic.decode.Decode" in str(complaint("pixels", 3))

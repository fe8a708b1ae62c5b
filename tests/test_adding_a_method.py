"""The walk through a plugin in docs/adding-a-method.md, done as the page says."""

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from condense import engine, plugins, registry
from condense.cli import main
from condense.data.datasets import LOADERS
from condense.eval.protocol import PROTOCOLS
from condense.inner import ADJOINTS
from condense.method import GradientMethod, Method
from condense.networks.registry import NETWORKS
from condense.schema import Checked
from condense.synthetic import DECODERS, LABELS
from condense.testing import CHECKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-method.md"
TINY = "convnet:depth=1,width=4"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that holds the page's module, its tests and the metadata of its pyproject."""
    site = tmp_path / "site"
    module, tests = blocks("python")
    (plan,) = (tomllib.loads(text) for text in blocks("toml"))
    project, (name,) = plan["project"], plan["tool"]["setuptools"]["py-modules"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{name}.py").write_text(module)
    (site / f"test_{name}.py").write_text(tests)
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{entry} = {value}\n" for entry, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    for loaded in (name, f"test_{name}"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    return site


def distill(tiny_file: Path, out: str, *words: str) -> None:
    data = ["--dataset", str(tiny_file), "--network", TINY, "--ipc", "2"]
    main(["distill", "sliced", *data, "--method.num-steps", "4", "--device", "cpu", "--out", out, *words])


def test_it_is_listed_beside_the_built_in_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "methods"])
    listed = capsys.readouterr().out
    assert re.search(r"^ *sliced +Matches each class", listed, re.MULTILINE) and "\n  mtt " in listed


def test_its_fields_are_flags_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["distill", "sliced", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--method.num-directions" in printed and "shared by all classes" in printed


def test_stopping_and_resuming_changes_no_byte(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    distill(tiny_file, "whole")
    method = registry.load("sliced")
    loss = method.loss  # type: ignore[attr-defined]

    def interrupted(self: Any, ctx: Any, state: Any, step: int, part: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return loss(self, ctx, state, step, part)

    with monkeypatch.context() as patch:
        patch.setattr(method, "loss", interrupted)
        with pytest.raises(SystemExit) as left:
            distill(tiny_file, "stopped")
        assert left.value.code == 130
    assert not (tmp_path / "stopped" / "synthetic.safetensors").exists()
    distill(tiny_file, "stopped", "--resume")
    made = [(tmp_path / run / "synthetic.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert made[0] == made[1]
    assert '{"event": "resume", "step": 2}' in (tmp_path / "stopped" / "log.jsonl").read_text()


def test_it_composes_with_decoders_and_its_recipe_file_runs_again(tiny_file: Path, tmp_path: Path) -> None:
    distill(tiny_file, "first", "--decode", "factor", "--augment", "none")
    main(["distill", "first/recipe.yaml", "--device", "cpu", "--out", "again"])
    made = [(tmp_path / run / "synthetic.safetensors").read_bytes() for run in ("first", "again")]
    assert made[0] == made[1]


def test_learned_labels_are_refused(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        distill(tiny_file, "run", "--labels", "logits")
    assert left.value.code == 2 and "sliced gives labels no gradient" in capsys.readouterr().err


def test_the_tests_of_the_page_pass(tmp_path: Path) -> None:
    tests = importlib.import_module("test_condense_sliced")
    for check in CHECKS:
        tests.test_contract(check)
    tests.test_the_loss_falls(tmp_path / "run")
    tests.test_bad_values_are_refused()


def test_one_file_and_one_command_are_enough(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a package; the run is named as the page says, and its recipe file leads to the class again."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    file = (tmp_path / "site" / "condense_sliced.py").rename(tmp_path / "condense_sliced.py")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path / "site")])
        words = ["--dataset", str(tiny_file), "--network", TINY, "--ipc", "10", "--method.num-steps", "2"]
        main(["distill", f"{file.name}:Sliced", *words, "--device", "cpu"])
        (run,) = (tmp_path / "runs").iterdir()
        assert f"runs/{run.name.replace('tiny', 'digits')} " in PAGE.read_text(encoding="utf-8")
        assert "name: condense_sliced:Sliced\n" in (run / "recipe.yaml").read_text()
        del sys.modules["condense_sliced"]  # as in a new process
        main(["distill", str(run / "recipe.yaml"), "--device", "cpu", "--out", "again"])
        made = [(folder / "synthetic.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
        assert made[0] == made[1]
        file.with_name("json.py").write_text("class Sliced: pass\n")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["distill", "json.py:Sliced", *words])
        assert re.search("another module has this name: .*json.*; correct or rename the file", capsys.readouterr().err)


def test_the_page_lists_all_that_a_method_can_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for cls in (Method, GradientMethod):
        hooks = [name for name in vars(cls) if not name.startswith("_") and name not in vars(Checked)]
        assert len(hooks) > 5
        for name in hooks:
            assert f"`{name}`" in page, name


def test_the_page_lists_every_kind_of_plugin() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in (registry.METHODS, DECODERS, LABELS, ADJOINTS, NETWORKS, LOADERS, PROTOCOLS):
        assert f"| `{table.group}` |" in page

"""What a user installs: the wheel, its contents, and what the type checker sees of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.types_seen import FOLDERS, ROOT, modules

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and nothing of an earlier build gets in."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_its_metadata_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"condense", "condense_dd"}
    assert wheel.name.startswith("condense_dd-")
    expected = {module.replace(".", "/") for module in modules()}
    found = {name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")}
    assert found == expected
    assert "condense/py.typed" in names and "condense/data/known.json" in names
    recipes = {Path(name).name for name in names if name.startswith("condense/methods/recipes/")}
    assert recipes >= {path.name for path in (ROOT / "methods" / "recipes").glob("*.yaml")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where nothing of the checkout can be seen, with the dependencies of this environment."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import condense, condense.methods, condense.buffers, condense.eval\n"
        "ours = [m for name, m in sys.modules.items() if name.startswith('condense')]\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in ours)\n"
        "from condense.cli import main\n"
        "main(['distill', 'random', '--ipc', '1', '--out', 'run'])\n"
        "main(['list', 'recipes'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "synthetic.safetensors").exists() and "mtt-cifar10-ipc1" in done.stdout


@pytest.mark.slow
def test_the_type_checker_sees_every_module_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "condense"]
    command += ["--linecount-report", str(tmp_path / "report"), "--cache-dir", str(tmp_path / "cache")]
    environment = {"MYPYPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    seen = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "types_seen.py"), str(tmp_path / "report" / "linecount.txt")]
    )
    assert seen.returncode == 0


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_the_demo_runs(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    list_site = [str(python), "-c", "import sysconfig, os; print(*sorted(os.listdir(sysconfig.get_path('purelib'))))"]
    before = set(subprocess.run(list_site, check=True, capture_output=True, text=True).stdout.split())
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    after = set(subprocess.run(list_site, check=True, capture_output=True, text=True).stdout.split())
    assert {name.split("-")[0] for name in after - before} == {"condense", "condense_dd"}
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    subprocess.run([str(tmp_path / "venv" / "bin" / "condense"), "demo"], cwd=tmp_path, check=True)
    assert (tmp_path / "demo" / "mtt" / "evaluation.json").exists()

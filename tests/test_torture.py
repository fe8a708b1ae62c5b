"""A small share of the suite that ``python -m tests.torture`` runs for hours; see docs/reliability.md."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the suite needs Linux and a C compiler"
)
@pytest.mark.slow
@pytest.mark.parametrize("groups", [["kills", "faults", "mutations", "crowds"], ["ranks"]])
def test_a_small_share_survives(groups: list[str], tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    words = [sys.executable, "-m", "tests.torture", "--share", "0.001", "--state", str(state), "--groups", *groups]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    tried = re.findall(r"^(\w+): (\d+) tried, (\d+) survived, \d+ s$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in tried] == groups, done.stderr
    assert done.returncode == 0 and all(cases == survived for _, cases, survived in tried), done.stdout
    assert state.is_file()

"""Completion in a shell."""

import shutil
import subprocess
from pathlib import Path

import pytest

from condense import commands
from condense.cli import COMMANDS, main
from condense.completion import SHELLS
from condense.registry import METHODS
from tests.test_cli import fails

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_tyro_condense
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, because a script of all takes seconds."""
    monkeypatch.setattr(METHODS, "usable", lambda: {name: METHODS[name] for name in ("dm", "mtt")})


@pytest.mark.usefixtures("few_methods")
def test_bash_completes_commands_methods_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    main(["completion", "bash"])
    file = tmp_path / "script"
    file.write_text(capsys.readouterr().out)
    assert "complete -o default" in file.read_text()

    def completed(*words: str) -> set[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(file), "condense", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(done.stdout.split()) - {"-h", "--help"}

    assert completed("") == set(COMMANDS)
    assert completed("distill", "") == {"dm", "mtt"}
    assert completed("distill", "mtt", "--method.num") == {"--method.num-steps", "--method.num-trajectories"}
    assert completed("distill", "dm", "--method.num") == {"--method.num-steps"}
    assert completed("distill", "dm", "--see") == {"--seed", "--seeds"}
    assert "factor" in completed("distill", "dm", "--decode", "")
    assert "canonical" in completed("evaluate", "--protocol", "")
    assert completed("list", "") == set(commands.KINDS)
    assert completed("runs", "some/fol") == set(), "paths are left to the shell"


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    assert "--method.num-trajectories" in capsys.readouterr().out


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'bash'?" in fails(capsys, "completion", "bsh")
    assert "needs one shell" in fails(capsys, "completion")


def test_what_is_completed_is_what_the_commands_take() -> None:
    assert set(commands._completed().words) == set(COMMANDS) == set(commands.TABLE)

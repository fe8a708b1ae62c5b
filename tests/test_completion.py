"""Completion in a shell."""

import os
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
    file = script_in("bash", tmp_path, capsys)
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
    assert completed("relabel", "--labels", "") == {"stored", "online", "projector"}
    assert "canonical" in completed("evaluate", "--protocol", "")
    assert completed("list", "") == set(commands.KINDS)
    assert completed("runs", "some/fol") == set(), "paths are left to the shell"


COMPLETE_ZSH = """
typeset -A compstate=(nmatches 0)
_files() { print paths }
_describe() {
    print -l -- ${(P)2}
    compstate[nmatches]=${(M)#${(P)2}:#${words[CURRENT]}*}
}
words=("${@:2}"); CURRENT=$#words
source $1
"""


def script_in(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    main(["completion", shell])
    file = folder / "script"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.usefixtures("few_methods")
def test_zsh_completes_commands_flags_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = script_in("zsh", tmp_path, capsys)

    def completed(*words: str) -> list[str]:
        command = ["zsh", "-f", "-c", COMPLETE_ZSH, "zsh", str(file), "condense", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.split(":")[0] for line in done.stdout.splitlines()]

    assert set(COMMANDS) <= set(completed("")) and "paths" not in completed("")
    assert completed("distill", "mtt", "--method.num") == ["--method.num-steps", "--method.num-trajectories"]
    assert completed("runs", "some/fol")[-1] == "paths"


def test_fish_completes_commands_flags_and_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a script that is longer than Linux lets an argument be."""
    several = {f"{name}{number}": METHODS[name] for name in ("dm", "mtt") for number in range(5)}
    monkeypatch.setattr(METHODS, "usable", lambda: several)
    file = script_in("fish", tmp_path, capsys)
    assert file.stat().st_size > 1 << 17
    (tmp_path / "folder").mkdir()

    def completed(line: str) -> list[str]:
        command = ["fish", "--no-config", "-c", f'source {file}; complete -C "condense {line}"']
        environment = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
        return [found.split("\t")[0] for found in done.stdout.splitlines()]

    assert set(COMMANDS) <= set(completed(""))
    assert completed("distill mtt0 --method.num") == ["--method.num-steps", "--method.num-trajectories"]
    assert completed("runs fol") == ["folder/"]


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

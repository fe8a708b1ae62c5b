"""Runs that are stopped, meet a second process, a full disk or no cache: nothing is lost, one line says what to do."""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condense
from condense import api, cache, cli, engine, files, runs
from condense.compute import choose_compiled_folder, keep_compiled
from condense.data.datasets import Arrays
from condense.eval.protocol import PROTOCOLS
from condense.files import content, read_header
from condense.methods.dm import DM
from condense.tracking import read_log

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
fork = multiprocessing.get_context("fork")

TINY = "convnet:depth=1,width=4"
FIELDS: dict[str, Any] = {"network": "mlp", "ipc": 1, "num_steps": 2, "batch_real": 4, "device": "cpu"}


class Killed(BaseException):
    """Ends a process in the place of a signal that cannot be caught."""


def fsync(descriptor: int) -> None:
    """Costs no time."""


class Disk:
    """Counts what is done to files below a folder, and strikes when number ``at`` is done.

    ``killed``: nothing is done any more, as if the process had ended. ``interrupted``: Ctrl-C, once.
    ``full``: that one operation is refused.
    """

    def __init__(self, root: Path, how: str = "", at: int = -1) -> None:
        self.root, self.how, self.at, self.done = str(root), how, at, 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in [
                *((os, name) for name in ("mkdir", "open", "rename", "replace", "rmdir", "unlink")),
                (builtins, "open"),
                (io, "open"),
            ]:
                patch.setattr(owner, name, self.around(getattr(owner, name)))
            patch.setattr(os, "fsync", self.around(fsync))
            yield

    def around(self, operation: Any) -> Any:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if operation is not fsync and not str(path).startswith(self.root):
                return operation(path, *args, **options)
            now, self.done = self.done, self.done + 1
            if self.how == "killed" and now > self.at:
                raise Killed
            if self.how == "full" and now == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = operation(path, *args, **options)
            if now == self.at:
                if isinstance(result, int):
                    os.close(result)
                elif result is not None:
                    result.close()
                raise Killed if self.how == "killed" else KeyboardInterrupt
            return result

        return call


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves and that does not depend on the clock."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }
    steps = [record for record in read_log(folder / "log.jsonl") if "event" not in record]
    return found | {"log": steps, "record": sorted(json.loads((folder / "run.json").read_text()))}


@pytest.fixture(scope="module")
def whole(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """What an undisturbed run leaves, and how many operations on files it takes."""
    disk = Disk(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHECKPOINT_STEPS", 1)
        with disk.watched():
            tiny_run(tiny, Path(disk.root) / "run")
    return results(Path(disk.root) / "run"), disk.done


def tiny_run(tiny: Arrays, out: Path, *, resume: bool = False) -> None:
    fields = {"network": "mlp", "ipc": 1, "device": "cpu", "resume": resume}
    condense.distill(DM(num_steps=2, batch_real=4), dataset=tiny, out=out, **fields)


@pytest.mark.parametrize(
    ("how", "stride"),
    [
        ("killed", 9),
        ("interrupted", 13),
        ("full", 8),
        *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ("killed", "interrupted", "full")),
    ],
)
def test_a_run_survives_whatever_happens_to_its_files(
    how: str,
    stride: int,
    tiny: Arrays,
    whole: tuple[dict[str, Any], int],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = tmp_path_factory.mktemp("compiled")  # others use the usual folder, where young files would be removed
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(files, "_YOUNG", -1)
    monkeypatch.setattr(os, "fsync", fsync)
    struck = 0
    for at in range(0, whole[1], stride):
        out = tmp_path / f"{at}" / "run"
        disk = Disk(tmp_path, how, at)
        try:
            with disk.watched():
                tiny_run(tiny, out)
        except (Killed, KeyboardInterrupt):
            struck += 1
        except ValueError as error:
            assert how == "full" and "No space left" in str(error) and "\n" not in str(error)
            struck += 1
        tiny_run(tiny, out, resume=True)
        assert results(out) == whole[0], f"struck at operation {at}"
    assert struck > whole[1] / stride / 2


def test_a_second_process_in_a_run_folder_is_refused(tiny: Arrays, tmp_path: Path) -> None:
    out, held = tmp_path / "run", fork.Event()

    def hold() -> None:
        with runs.held(out):
            held.set()
            signal.pause()

    process = fork.Process(target=hold, daemon=True)
    process.start()
    assert held.wait(30)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is running in .*/run; wait"):
            condense.distill("dm", dataset=tiny, out=out, resume=resume, **FIELDS)
    assert content(out) == []
    process.kill()
    process.join()
    condense.distill("dm", dataset=tiny, out=out, **FIELDS)
    assert not list(out.glob(".*"))


def test_a_refused_run_leaves_no_folder(tiny: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build them with"):
        condense.distill("mtt", dataset=tiny, out=tmp_path / "runs" / "run", buffers=tmp_path / "none", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_how_to_go_on(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "a run", tmp_path / "said"
    words = ["distill", "dm", "--dataset", str(tiny_file), "--network", "mlp", "--ipc", "1", "--out", str(out)]
    words += ["--method.num-steps", "100000", "--device", "cpu"]

    def work() -> None:
        def step(*args: Any) -> dict[str, float]:
            time.sleep(0.01)
            return {}

        engine._step = step
        with open(said, "w") as sys.stderr:
            cli.main(words)

    process = fork.Process(target=work, daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while len(read_log(out / "log.jsonl")) < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(SystemExit):
        cli.main([*words, "--resume"])
    assert f"process {process.pid} on" in capsys.readouterr().err
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    (line,) = said.read_text().splitlines()
    checkpoint = out / "checkpoint.safetensors"
    done = read_header(checkpoint)["step"] if checkpoint.exists() else 0
    kept = f"step {done} of 100000 is kept in {checkpoint}" if done else "there is no checkpoint yet"
    assert line.startswith(f"condense: stopped; {kept}; to continue: ")
    again = shlex.split(line.rsplit(": ", 1)[1])
    assert again == ["condense", *words, "--resume"]
    going_on = []

    def step(method: Any, ctx: Any, state: Any, done: int, checkpoint: Path) -> None:
        going_on.append(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_step", step)
    with pytest.raises(SystemExit):
        cli.main(again[1:])
    assert going_on == [done]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["evaluate", "a run"], "condense evaluate 'a run'"),
        (["distill", "dm", "--resume"], "condense distill dm --resume"),
        (["distill", "dm", "--out", "~/x"], "condense distill dm --out '~/x' --resume"),
        (["distill", "dm", "--quiet"], "condense distill dm --quiet --resume"),
        (["--quiet", "distill", "dm"], "condense --quiet distill dm --resume"),
    ],
)
def test_ctrl_c(
    words: list[str], command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(words: list[str]) -> None:
        raise KeyboardInterrupt

    from condense import commands

    monkeypatch.setitem(commands.TABLE, next(word for word in words if word != "--quiet"), stop)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 130
    assert capsys.readouterr().err == f"condense: stopped; to continue: {command}\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "the same torchrun command" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["empty", "file", "nowhere", "newline", "no home"])
def test_a_cache_that_cannot_be_used_is_done_without(
    place: str, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    named = {"empty": "", "file": str(tmp_path / "file"), "nowhere": "/proc/x", "newline": f"{tmp_path}/a\nb"}
    if place == "no home":
        monkeypatch.delenv("CONDENSE_CACHE")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("CONDENSE_CACHE", named[place])
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        condense.distill("random", dataset=tiny_file, network="mlp", ipc=2, out=tmp_path / "run", device="cpu")
        plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)
        condense.evaluate(
            tmp_path / "run", networks="mlp", num_seeds=1, protocol=plan, baselines=["herding"], device="cpu"
        )
        api.report([tmp_path / "run"])
    said = [str(warning.message) for warning in caught if "cache" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith("nothing is cached: ") and "\n" not in said[0]
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    assert not list((tmp_path / "here").iterdir()) and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["file", "with space", "quote'd", "back\\slash"])
def test_compiled_code_goes_to_a_temporary_folder_where_its_place_cannot_be_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
    with pytest.warns(UserWarning, match="compiled code is not cached: "):
        keep_compiled(tmp_path / "other")
    scratch = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert scratch.is_dir() and tmp_path not in scratch.parents
    scratch.rmdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    keep_compiled(tmp_path / "other")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "other")


def test_the_place_that_torch_chooses_for_compiled_code_is_not_taken_for_the_users(tmp_path: Path) -> None:
    """It is in the environment when torch's compiler has been imported, as torchvision does."""
    code = f"""
import os, pathlib, torch._inductor.codecache
from condense.compute import keep_compiled
assert os.environ["TORCHINDUCTOR_CACHE_DIR"]
keep_compiled(pathlib.Path({str(tmp_path)!r}))
from torch._inductor.codecache import cache_dir
print(cache_dir())
"""
    unset = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    found = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(tmp_path)]


@pytest.mark.parametrize("size", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_folder_for_compiled_code_that_cannot_be_made_stops_no_command(size: str, tmp_path: Path) -> None:
    """Of two processes the other one never comes, which is noticed after the compiler was imported."""
    words = [sys.executable, "-m", "condense", "distill", "random", "--ipc", "1", "--network", "mlp"]
    group = {"WORLD_SIZE": size, "RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    found = subprocess.run(
        [*words, "--device", "cpu", "--out", str(tmp_path / "run")],
        env={**os.environ, **group, "TORCHINDUCTOR_CACHE_DIR": "/dev/null/x", "CONDENSE_PATIENCE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "compiled code is not cached: cannot write /dev/null/x" in found.stderr
    if size == "1":
        assert found.returncode == 0, found.stderr
    else:
        assert found.returncode == 2 and "Errno" not in found.stderr, found.stderr


def test_each_instruction_set_keeps_its_compiled_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the code of another one from its cache, and computes NaN with it."""
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path))
    places = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        choose_compiled_folder()
        places.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(set(places)) == 2 and {Path(place).parent for place in places} == {tmp_path / "compiled"}
    assert {entry.about for entry in cache.entries(tmp_path)} == {"avx2", "avx512"}


def test_a_run_goes_on_wherever_its_data_lie(
    tiny_file: Path, tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = FIELDS | {"out": tmp_path / "run"}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.npz").write_bytes(tiny_file.read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    condense.distill("dm", dataset="tiny.npz", **fields)
    first = (tmp_path / "run" / "synthetic.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    condense.distill("dm", dataset="there/tiny.npz", resume=True, **fields)
    assert (tmp_path / "run" / "synthetic.safetensors").read_bytes() == first
    plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)
    condense.evaluate(tmp_path / "run", networks="mlp", num_seeds=1, protocol=plan, device="cpu")
    recipe = (tmp_path / "run" / "recipe.yaml").read_bytes()
    np.savez(
        tmp_path / "tiny.npz", x_train=255 - tiny.x_train, y_train=tiny.y_train, x_test=tiny.x_test, y_test=tiny.y_test
    )
    with pytest.raises(ValueError, match="another recipe"):
        condense.distill("dm", dataset="tiny.npz", resume=True, **fields)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == recipe


def test_a_tilde_is_the_home_folder_everywhere(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "tiny.npz").write_bytes(tiny_file.read_bytes())
    data = ["--dataset", "~/tiny.npz"]
    common = [*data, "--network", TINY, "--device", "cpu"]
    cli.main(["buffer", *common, "--num-experts", "1", "--num-epochs", "3", "--out", "~/artifacts"])
    words = ["distill", "mtt", *common, "--ipc", "1", "--buffers", "~/artifacts", "--method.num-steps", "1"]
    cli.main([*words, "--method.syn-steps", "1", "--method.max-start-epoch", "1", "--out", "~/run"])
    cli.main(["evaluate", "~/run", "--networks", "mlp", "--num-seeds", "1", "--protocol.num-epochs", "1"])
    cli.main(["evaluate", "~/run", "--networks", "mlp", "--num-seeds", "1", "--out", "~/mine.json"])
    cli.main(["report", "~/run", "--out", "~/page.html"])
    cli.main(["show", "~/run", "--png", "~/set.png"])
    cli.main(["export", "~/run", "~/set.npz"])
    cli.main(["import", "~/set.npz", "~/again.safetensors", *data])
    assert condense.load("~/again.safetensors").origin.num_classes == 3
    expected = {"again.safetensors", "artifacts", "mine.json", "page.html", "run", "set.npz", "set.png", "tiny.npz"}
    assert {path.name for path in home.iterdir()} == expected and not list(here.iterdir())

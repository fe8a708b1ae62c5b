"""Several processes: the same results as one, whoever does the work and whoever dies.

This file is also the program that torchrun starts: ``test_distributed.py JOB DATA FOLDER``.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, cli, distributed, engine, registry
from condense.artifacts import BufferWriter, Trajectories, expert_file, read_manifest
from condense.compute import Compute
from condense.data.datasets import load
from condense.distributed import Ranks, init_distributed, patience
from condense.eval.evaluate import SetScorer
from condense.eval.protocol import PROTOCOLS
from condense.files import read_tensors
from condense.networks import Weights
from condense.tracking import read_log

TINY = "convnet:depth=1,width=4"
SMALL: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 6},
    "dc": {"batch_real": 6, "outer_loop": 2, "inner_epochs": 1},
    "mtt": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 1, "batch_syn": 4},
}


def make_buffer(data: Path, out: Path, ranks: Ranks) -> Path:
    return api.make_buffer(
        load(data), TINY, num_experts=5, num_epochs=2, batch_size=12, lr=0.1, out=out, device="cpu", ranks=ranks
    )


def distill(data: Path, out: Path, ranks: Ranks, name: str = "mtt", **fields: Any) -> None:
    """Six steps; ``out`` ends in the name of the run, and an expert buffer lies in ``artifacts`` beside it."""
    given = {"num_steps": 6, **SMALL.get(name, {})} if name in SMALL else {}
    where = {"out": out, "buffers": out.parent / "artifacts", "device": "cpu"}
    api.distill(name, dataset=load(data), network=TINY, ipc=2, ranks=ranks, **where, **given | fields)


def everything(data: Path, out: Path, ranks: Ranks) -> None:
    """Each command once, in the folder ``out``; the set that is evaluated lies in ``set`` beside it."""
    make_buffer(data, out / "artifacts", ranks)
    for name in ("dm", "dc"):
        distill(data, out / name, ranks, name)
    distill(data, out / "mtt4", ranks, num_trajectories=4)
    distill(data, out / "mtt1", ranks, num_trajectories=1)
    assert ranks.gather_objects({"rank": ranks.rank}) == [{"rank": rank} for rank in range(ranks.size)]
    plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=5)
    api.evaluate(
        out.parent / "set",
        load(data),
        networks=[TINY, "mlp"],
        num_seeds=3,
        protocol=plan,
        baselines=["full"],
        out=out / "evaluation.json",
        device="cpu",
        ranks=ranks,
    )


def on_digits(data: Path, out: Path, ranks: Ranks) -> None:
    """Six steps of trajectory matching, each the sum of four trajectories."""
    network, place = "convnet:depth=2,width=32", {"device": "cpu", "ranks": ranks}
    experts: dict[str, Any] = {"num_experts": 4, "num_epochs": 4, "batch_size": 64, "lr": 0.02}
    buffers = api.make_buffer("digits", network, **experts, out=out.parent / "experts", **place)
    matching = {"num_trajectories": 4, "max_start_epoch": 2, "expert_epochs": 2, "syn_steps": 10}
    more: dict[str, Any] = {"ipc": 1, "num_steps": 6, "buffers": buffers, "out": out / "mtt", **matching, **place}
    api.distill("mtt", dataset="digits", network=network, **more)


def struck_down(data: Path, out: Path, ranks: Ranks) -> None:
    """Process 1 is killed in the fifth step of a run and, when all were started again, before its second expert is
    written."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    engine.CHECKPOINT_STEPS = 2
    distill(data, out / "whole", ranks, num_trajectories=2)
    if attempt == 0:
        kill_in_step(ranks, 1, 4)
    distill(data, out / "stopped", ranks, num_trajectories=2)
    extend = BufferWriter.extend

    def noted(self: BufferWriter, expert: int, *content: Any) -> None:
        if attempt == 1 and expert == 3:
            while len(read_manifest(self.folder)["experts"]) < 5:  # the other process is done with its share
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        extend(self, expert, *content)
        with open(out / "experts.txt", "a") as file:
            file.write(f"{attempt} {expert}\n")

    BufferWriter.extend = noted  # type: ignore[method-assign]
    make_buffer(data, out / "struck", ranks)


def kill_in_step(ranks: Ranks, rank: int, step: int) -> None:
    """From here on this process is killed in that step, after its own part of the work, if it is number ``rank``."""
    total = Ranks.all_reduce_
    done = 0

    def all_reduce_(self: Ranks, tensors: Any) -> None:
        nonlocal done
        done += len(tensors) > 1  # gradients and the loss
        if ranks.rank == rank and done == step + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        total(self, tensors)

    Ranks.all_reduce_ = all_reduce_  # type: ignore[method-assign]


def command_line(data: Path, out: Path) -> None:
    """``condense distill``, with process 0 killed in its fourth step."""
    engine.CHECKPOINT_STEPS = 2
    report_before_the_launcher_ends_it()
    kill_in_step(Ranks(int(os.environ["RANK"])), 0, 3)
    cli.main(distill_words(data, out / "run"))


def refused(data: Path, out: Path) -> None:
    """``condense distill`` into a folder that already holds a run."""
    report_before_the_launcher_ends_it()
    cli.main(selection_words(data, out / "run"))


def report_before_the_launcher_ends_it() -> None:
    """When one process fails, the launcher sends SIGTERM to the others; here they ignore it and end by themselves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def selection_words(data: Path, out: Path) -> list[str]:
    words = ["distill", "random", "--dataset", str(data), "--network", TINY, "--ipc", "2", "--device", "cpu"]
    return [*words, "--out", str(out)]


def distill_words(data: Path, out: Path) -> list[str]:
    words = ["distill", "dm", "--dataset", str(data), "--network", TINY, "--ipc", "2", "--device", "cpu"]
    return [*words, "--method.num-steps", "6", "--method.batch-real", "6", "--out", str(out)]


def torchrun(size: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``words``: further flags of the launcher, then the program."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *words]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=300
    )


def start(job: Callable[..., None], size: int, data: Path, out: Path, *flags: str) -> Any:
    words = [*flags, __file__, job.__name__, str(data), str(out)]
    return torchrun(size, *words, CONDENSE_CACHE=str(out / "cache"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives each process: the number of threads decides how numbers are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experts(root: Path) -> dict[str, Any]:
    """What a buffer says, apart from what a clock says: the bytes of the experts, and the manifest."""
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    manifest = read_manifest(folder)
    for expert in manifest["experts"]:
        del expert["seconds"]
    return {path.name: path.read_bytes() for path in folder.glob("expert_*")} | {"manifest": manifest}


def tensors(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "synthetic.safetensors", "synthetic set")[0]


def rows(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "evaluation.json").read_text())["results"]
    for row in found:
        del row["seconds"], row["peak_memory_bytes"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("one_thread")
def test_the_number_of_processes_does_not_decide_the_result(
    size: int, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts and evaluation to the byte. Sets to 1e-6 of values of about one: a sum of parts in another order."""
    one, many = tmp_path / "one", tmp_path / "many"
    distill(tiny_file, tmp_path / "set", Ranks(), "dm")
    many.mkdir()
    done = start(everything, size, tiny_file, many)
    assert done.returncode == 0, done.stderr
    idle = set(re.findall(r"UserWarning: (.*idle.*)", done.stderr))
    surplus = f"{size - 1} of {size} processes are idle: .* among at most 1; .* num_trajectories={size}"
    assert len(re.findall(surplus, done.stderr)) == 1, done.stderr
    assert len(idle) == {2: 1, 4: 2}[size], "and for the three classes of the others, of four processes"

    monkeypatch.setenv("CONDENSE_CACHE", str(one / "cache"))
    everything(tiny_file, one, Ranks())
    assert experts(one / "artifacts") == experts(many / "artifacts")
    assert rows(one) == rows(many)
    assert not list(many.glob("*.cells.*")), "a journal of an evaluation that is done"
    for name in ("dm", "dc", "mtt4", "mtt1"):
        for leaf, expected in tensors(one / name).items():
            torch.testing.assert_close(tensors(many / name)[leaf], expected, rtol=0, atol=1e-6, msg=f"{name} {leaf}")
        ours, theirs = (read_log(run / name / "log.jsonl") for run in (one, many))
        assert [step["step"] for step in ours] == [step["step"] for step in theirs]
    for name, num_parts in {"dm": 3, "dc": 3, "mtt4": 4, "mtt1": 1}.items():
        logs = [read_log(many / name / f"log.rank{rank}.jsonl") for rank in range(size)]
        assert all(logs)
        for step, lines in enumerate(zip(*logs, strict=True), 1):
            assert {line["step"] for line in lines} == {step}
            assert sorted(part for line in lines for part in line["parts"]) == list(range(num_parts)), name
    assert not list(one.rglob("log.rank*"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_trajectories_of_digits_are_matched_alike(tiny_file: Path, tmp_path: Path) -> None:
    """To 1e-6 of pixels up to 2.8. At step 9 an activation crosses zero in one run only, which magnifies rounding."""
    one = tmp_path / "one"
    on_digits(tiny_file, one, Ranks())
    for size in (2, 4):
        many = tmp_path / str(size)
        done = start(on_digits, size, tiny_file, many)
        assert done.returncode == 0, done.stderr
        for leaf, expected in tensors(one / "mtt").items():
            torch.testing.assert_close(tensors(many / "mtt")[leaf], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_processes_that_are_started_again_continue(tiny_file: Path, tmp_path: Path) -> None:
    make_buffer(tiny_file, tmp_path / "artifacts", Ranks())
    done = start(struck_down, 2, tiny_file, tmp_path, "--max-restarts", "2")
    assert done.returncode == 0, done.stderr
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    assert (stopped / "synthetic.safetensors").read_bytes() == (whole / "synthetic.safetensors").read_bytes()
    steps = [line for line in read_log(stopped / "log.jsonl") if "event" not in line]
    assert steps == [line for line in read_log(whole / "log.jsonl") if "event" not in line]
    assert {"event": "resume", "step": 4} in read_log(stopped / "log.jsonl")
    for rank in range(2):
        shares = [{"step": step, "parts": [rank]} for step in range(1, 7)]
        assert read_log(stopped / f"log.rank{rank}.jsonl") == shares
    trained = (tmp_path / "experts.txt").read_text().split("\n")[:-1]
    assert sorted(trained) == ["1 0", "1 1", "1 2", "1 4", "2 3"]
    assert experts(tmp_path / "struck") == experts(tmp_path / "artifacts")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(tiny_file: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    killed = start(command_line, 2, tiny_file, tmp_path)
    assert killed.returncode != 0 and time.monotonic() - begun < 120
    lines = [line for line in killed.stderr.splitlines() if line.startswith("condense: ")]
    assert len(lines) == 1 and lines[0].startswith("condense: rank 1: another process"), killed.stderr
    assert "--resume" in lines[0] and "recipe: " in killed.stdout
    assert not (tmp_path / "run" / "synthetic.safetensors").exists()

    resumed = torchrun(2, "-m", "condense", *distill_words(tiny_file, tmp_path / "run"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("recipe: ") == resumed.stdout.count("next: condense evaluate") == 1
    whole = tmp_path / "whole"
    cli.main(distill_words(tiny_file, whole))
    for leaf, expected in tensors(whole).items():
        torch.testing.assert_close(tensors(tmp_path / "run")[leaf], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_command_line(tiny_file: Path, tmp_path: Path) -> None:
    """Methods that select are not divided, nor are baselines made; only one process writes and prints."""
    data, run = ["--dataset", str(tiny_file), "--device", "cpu"], str(tmp_path / "run")
    words = ["buffer", *data, "--network", TINY, "--num-experts", "3", "--num-epochs", "2"]
    built = torchrun(2, "-m", "condense", *words, "--out", str(tmp_path))
    assert built.returncode == 0 and len(built.stdout.splitlines()) == 2, built.stderr
    assert Trajectories(Path(built.stdout.splitlines()[-1])).num_experts == 3
    selected = torchrun(2, "-m", "condense", *selection_words(tiny_file, tmp_path / "run"))
    assert selected.returncode == 0 and selected.stdout.count("recipe: ") == 1, selected.stderr
    assert not list(tmp_path.glob("run/log.rank*"))
    cli.main(selection_words(tiny_file, tmp_path / "one"))
    ours, theirs = (tmp_path / name / "synthetic.safetensors" for name in ("run", "one"))
    assert ours.read_bytes() == theirs.read_bytes()
    again = start(refused, 2, tiny_file, tmp_path)
    lines = [line for line in again.stderr.splitlines() if line.startswith("condense: ")]
    assert again.returncode != 0 and len(lines) == 1, again.stderr
    assert "already holds a run" in lines[0] and "rank" not in lines[0]
    words = ["--num-seeds", "3", "--networks", "mlp", "--protocol.num-epochs", "5", "--device", "cpu"]
    words += ["--baselines", "k-center", "full"]
    scored = torchrun(2, "-m", "condense", "evaluate", run, *words, CONDENSE_CACHE=str(tmp_path / "cache"))
    assert scored.returncode == 0 and scored.stdout.count("k-center") == 1, scored.stderr
    cli.main(["evaluate", str(tmp_path / "one"), *words])
    assert rows(tmp_path / "one") == rows(tmp_path / "run")


@pytest.mark.slow
def test_the_cells_of_a_sweep_are_shared(tiny_file: Path, tmp_path: Path) -> None:
    words = ["distill", "random", "--dataset", str(tiny_file), "--network", TINY, "--ipc", "1", "--device", "cpu"]
    words += ["--seeds", "0-2", "--sweep", "transform=none,channel", "--json"]
    shared = torchrun(2, "-m", "condense", *words, "--out", str(tmp_path / "shared"))
    assert shared.returncode == 0, shared.stderr
    found = json.loads(shared.stdout)
    assert [len(point["val_accuracies"]) for point in found["points"]] == [3, 3] and found["best"]
    cli.main([*words, "--out", str(tmp_path / "alone")])
    folders = [Path(folder) for point in found["points"] for folder in point["folders"]]
    assert len(folders) == 6
    for folder in folders:
        alone = tmp_path / "alone" / folder.name / "synthetic.safetensors"
        assert alone.read_bytes() == (folder / "synthetic.safetensors").read_bytes()


WAITING = """
import os, signal, sys, time
from pathlib import Path
from condense import cli, commands, distributed
distributed.SAID_AFTER, distributed.HEARD_WITHIN = 4.0, 6.0
stopped, place, *words = sys.argv[1:]

def rank_zero_first(self):
    if self.rank == int(stopped):
        os.kill(os.getpid(), signal.SIGSTOP)
    return whole(self)

whole, distributed.Ranks.rank_zero_first = distributed.Ranks.rank_zero_first, rank_zero_first
Path(place, "imported" + os.environ["RANK"]).touch()
while len(list(Path(place).glob("imported*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.05)
cli.main(words)
"""
"""A command; the process of that number stops when all have met. They set out together, however long imports take."""


def side_by_side(size: int, *words: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Processes that meet as those of torchrun do, without the launcher that ends all when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *words], env=os.environ | shared | environment | {"RANK": str(rank)}, cwd=ROOT, **pipes
        )
        for rank in range(size)
    ]


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stopped"), [(2, 1), (3, 2), (3, 0)])
def test_a_process_that_hangs_is_named_and_given_up(size: int, stopped: int, tiny_file: Path, tmp_path: Path) -> None:
    """Where it is the first one, nobody can be asked who else has arrived, and each of the others speaks."""
    words = distill_words(tiny_file, tmp_path / "run")
    begun = time.monotonic()
    processes = side_by_side(size, "-c", WAITING, str(stopped), str(tmp_path), *words, CONDENSE_PATIENCE="20")
    others = [process for rank, process in enumerate(processes) if rank != stopped]
    said = [process.communicate(timeout=300)[1].splitlines() for process in others]
    processes[stopped].kill()
    processes[stopped].communicate()
    assert all(process.returncode == 2 for process in others), said
    assert time.monotonic() - begun < 300
    first = 0 if stopped else 1
    warning = rf"condense: warning: process {first} has waited (4|8|16) s for process {stopped}; "
    assert any(re.fullmatch(warning + "this run gives up after 20 s", line) for line in said[0]), said
    ends = [line for lines in said for line in lines if line.startswith("condense: ") and "warning" not in line]
    assert all(f"waited 20 s for process {stopped}; end all of them" in line for line in ends), said
    assert len(ends) == (1 if stopped else 2) and all("CONDENSE_PATIENCE=SECONDS" in line for line in ends)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "refusing"), [(2, 1), (3, 0), (3, 2)])
def test_of_data_that_one_process_refuses_its_line_alone_is_seen(
    size: int, refusing: int, tiny_file: Path, tmp_path: Path
) -> None:
    words = distill_words(tiny_file, tmp_path / "run")
    code = (
        f"import os; from condense import cli; from condense.data import datasets\n"
        f"if os.environ['RANK'] == '{refusing}':\n"
        f"    datasets._ARRAYS, os.environ['CONDENSE_CACHE'] = ('x_missing',), {str(tmp_path / 'own')!r}\n"
        f"cli.main({words!r})"
    )
    silent = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command line sets it before it imports torch
    said = []
    for process in side_by_side(size, "-c", code, CONDENSE_CACHE=str(tmp_path / "cache"), **silent):
        said += process.communicate(timeout=100)[1].splitlines()
        assert process.returncode == 2, said
    rank = f"rank {refusing}: " if refusing else ""
    assert len(said) == 1 and said[0].startswith(f"condense: {rank}{tiny_file} has no x_missing"), said


# In one process


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[distributed._Watch]]:
    """What three processes know of each other."""
    monkeypatch.setattr(distributed, "SAID_AFTER", 2.0)
    monkeypatch.setattr(distributed, "HEARD_WITHIN", 2.0)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = [distributed._Watch(rank, 3, 7200.0) for rank in range(3)]
    for watch in found:
        watch.start_queries(store)
        watch.collective = 4
    yield found
    for watch in found:
        watch.close()


def test_who_has_not_arrived_is_said_by_one_process(
    watches: list[distributed._Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: said.append(str(message)))
    for watch in watches[1:]:
        watch.collective, watch.since = 5, time.monotonic()
    end = time.monotonic() + 20
    while not said and time.monotonic() < end:
        time.sleep(0.05)
    assert watches[1].missing() == watches[2].missing() == [0]
    for watch in watches[1:]:
        watch.since = None
    wanted = r"process 1 has waited [\d.]+ s for process 0; this run gives up after 2 h"
    assert said and all(re.fullmatch(wanted, line) for line in said), said


def test_of_processes_that_fail_one_speaks(watches: list[distributed._Watch]) -> None:
    assert [watches[rank].may_report() for rank in (1, 0, 2)] == [True, False, False]
    assert "process 1 of this run failed first" in str(watches[2].another_failed())
    begun = time.monotonic()
    watches[0].leave()
    assert time.monotonic() - begun < 2


def test_where_nobody_answers_the_first_process_is_missing(watches: list[distributed._Watch]) -> None:
    for watch in watches:
        watch.close()
    for watch in watches:
        watch._answered -= 3  # seconds
    assert [watch.missing() for watch in watches] == [[1, 2], [0], [0]]
    assert all(watch.may_report() for watch in watches)


@pytest.mark.parametrize(
    ("collective", "late", "missing", "line"),
    [
        (0, True, [1], "cannot reach .*: waited 30 min for process 1; start all of them with torchrun"),
        (0, False, [1], "cannot reach the other processes: address in use; start all of them with torchrun"),
        (3, False, [], "another process of this run ended .*--resume.*"),
        (3, True, [0, 1, 2], r"waited 2 h for processes 0, 1 and 2; .*--resume.* CONDENSE_PATIENCE=SECONDS"),
        (3, True, [], "all processes are running, but exchanged no data for 2 h; .*"),
    ],
)
def test_why_a_collective_failed(collective: int, late: bool, missing: list[int], line: str) -> None:
    watch = distributed._Watch(0, 4, 7200.0)
    watch.close()
    watch.collective = collective
    assert re.fullmatch(line, distributed._reason(watch, missing, late, RuntimeError("address in use\nat x.cpp")))


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon"])
def test_patience_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDENSE_PATIENCE", raising=False)
    assert patience() == 24 * 3600
    monkeypatch.setenv("CONDENSE_PATIENCE", "90.5")
    assert patience() == 90.5
    monkeypatch.setenv("CONDENSE_PATIENCE", text)
    with pytest.raises(ValueError, match=r"CONDENSE_PATIENCE is .* set for example CONDENSE_PATIENCE=3600"):
        patience()


@pytest.mark.parametrize("size", range(1, 9))
def test_shares_are_disjoint_and_leave_nothing_out(size: int) -> None:
    shares = [Ranks(rank, size).shard(range(5)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks().shard("abc") == "abc"


def test_alone_nothing_is_exchanged() -> None:
    with init_distributed() as ranks:
        assert ranks == Ranks(0, 1) and not torch.distributed.is_initialized()
        values = [torch.ones(2), torch.zeros((), dtype=torch.int64)]
        ranks.all_reduce_(values)
        ranks.broadcast(values)
        ranks.barrier()
        assert ranks.gather_objects(values) == [values]
        with ranks.rank_zero_first():
            assert [value.tolist() for value in values] == [[1, 1], 0]


def test_a_launcher_that_starts_one_process_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    with init_distributed() as ranks:
        assert ranks == Ranks(0, 1, restarted=True)


@pytest.mark.parametrize(
    ("device", "complaint"),
    [("cuda:1", "cannot share device='cuda:1'"), ("mps", "device='cpu'"), ("cpu", "MASTER_ADDR")],
)
def test_processes_that_cannot_meet(device: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=complaint) as caught, init_distributed(device):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "abc"), ("WORLD_SIZE", "x"), ("WORLD_SIZE", "-2"), ("LOCAL_RANK", "")]
)
def test_an_environment_that_is_not_of_torchrun_is_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for variable, text in ({"WORLD_SIZE": "2"} | {name: value}).items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(SystemExit) as caught:
        cli.main(["distill", "dm"])
    assert caught.value.code == 2
    line = f"condense: the environment has {name}={value!r}, which is not a number from torchrun; unset {name}\n"
    assert capsys.readouterr().err == line


def test_a_broken_collective_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer\nat pair.cc")

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    monkeypatch.setattr(torch.distributed, "broadcast", broken)
    monkeypatch.setattr(torch.distributed, "all_gather_object", broken)
    values = [torch.ones(2)]
    for collective in (Ranks(1, 2).all_reduce_, Ranks(1, 2).broadcast, Ranks(1, 2).gather_objects):
        with pytest.raises(ValueError, match=r"another process .* ended .*--resume"):
            collective(values)


def test_sums_and_copies_keep_shapes_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda flat, source: flat.add_(1))
    values = [torch.ones(2, 3, requires_grad=True), torch.tensor(3.0), torch.ones(4)[::2]]
    Ranks(0, 2).all_reduce_(values)
    assert [value.tolist() for value in values] == [[[2, 2, 2], [2, 2, 2]], 6, [2, 2]]
    mixed = [torch.tensor([1, 2]), torch.tensor(0.5), torch.tensor([3])]
    Ranks(0, 2).broadcast(mixed)
    assert [value.tolist() for value in mixed] == [[2, 3], 1.5, [4]]


def write_expert(writer: BufferWriter, expert: int) -> None:
    writer.add(expert, torch.full((3, 4), float(expert)), torch.zeros(3, 0), {"origin": "trained"})
    writer.save()


def test_experts_may_finish_in_any_order(tmp_path: Path) -> None:
    """Readers see those before the first one missing; the file is that of experts finished in order."""
    layout = Weights({"w": torch.zeros(4)}, {})

    def writer(root: Path) -> BufferWriter:
        return BufferWriter(root, "digits", {"network": "mlp"}, layout)

    ours, theirs = writer(tmp_path / "any"), writer(tmp_path / "any")
    seen = []
    for expert, by in ((1, ours), (3, theirs), (0, ours), (2, theirs)):
        write_expert(by, expert)
        seen.append(Trajectories(ours.folder).num_experts)
    assert seen == [0, 0, 2, 4]
    assert [writer(tmp_path / "any").epochs(expert) for expert in range(5)] == [2, 2, 2, 2, 0]
    in_order = writer(tmp_path / "order")
    for expert in range(4):
        write_expert(in_order, expert)
    for name in ("manifest.json", *map(expert_file, range(4))):
        assert (ours.folder / name).read_bytes() == (in_order.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        (
            "dc",
            "1 of 4 processes are idle: a step of this recipe can be divided among at most 3; start fewer processes",
        ),
        (
            "mtt",
            "3 of 4 processes are idle: a step of this recipe can be divided among at most 1; start fewer "
            "processes, or give num_trajectories=4, which changes the recipe",
        ),
    ],
)
def test_processes_without_a_share_are_counted_with_what_mends_it(name: str, warning: str) -> None:
    ctx: Any = SimpleNamespace(ranks=Ranks(0, 4), task=SimpleNamespace(num_classes=3))
    assert engine._idle(registry.load(name)(), ctx) == warning


@pytest.mark.parametrize("again", [{}, {"seed": 1}, {"compute": Compute(autocast="bfloat16")}])
def test_a_stopped_evaluation_trains_what_is_missing(
    again: dict[str, Any], tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But nothing that anything else decided."""
    distill(tiny_file, tmp_path / "run", Ranks(), "random")
    plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=2)
    fields: dict[str, Any] = {"networks": [TINY, "mlp"], "num_seeds": 3, "protocol": plan, "device": "cpu"}
    trained: list[str] = []
    scores = SetScorer.score
    stop = 4

    def score(self: Any, *given: Any, **more: Any) -> Any:
        if len(trained) == stop:
            raise KeyboardInterrupt
        trained.append(self.network.name)
        return scores(self, *given, **more)

    monkeypatch.setattr(SetScorer, "score", score)
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(tmp_path / "run", load(tiny_file), **fields)
    journal = tmp_path / "run" / "evaluation.cells.rank0.jsonl"
    left = [(TINY, 0), (TINY, 1), (TINY, 2), ("mlp", 0)]
    assert [(line["network"], line["k"]) for line in read_log(journal)] == left
    journal = journal.rename(journal.with_name("evaluation.cells.rank5.jsonl"))  # of a larger number of processes
    trained.clear()
    stop = 99
    found = api.evaluate(tmp_path / "run", load(tiny_file), **fields | again)
    assert trained == ([TINY] * 3 + ["mlp"] * 3 if again else ["mlp"] * 2)
    assert list(tmp_path.rglob("*.cells.*")) == ([journal] if again else [])
    assert [(line["network"], line["k"]) for line in read_log(journal)] == (left if again else [])
    whole = api.evaluate(tmp_path / "run", load(tiny_file), **fields | again)
    assert [result.accuracies for result in found.results] == [result.accuracies for result in whole.results]


if __name__ == "__main__":
    job, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if job in ("command_line", "refused"):
        {"command_line": command_line, "refused": refused}[job](data, out)
    else:
        with init_distributed("cpu") as all_ranks:
            {"everything": everything, "on_digits": on_digits, "struck_down": struck_down}[job](data, out, all_ranks)

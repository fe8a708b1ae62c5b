"""Concurrent commands in one folder, and several processes of one command of which one fails."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from condense import api, cli, distributed
from condense.distributed import Ranks
from tests.torture.disk import temporary
from tests.torture.process import Command, Ended, run
from tests.torture.world import (
    APPLY,
    DM,
    EVALUATE,
    EXPERTS,
    MTT,
    TINY,
    World,
    experts,
    rows,
    run_outcome,
    tree,
    whole_world,
)

Words = Sequence[str]


@dataclass(frozen=True)
class Crowd:
    """Commands that run concurrently in one folder."""

    name: str
    commands: Sequence[Words]
    outcome: Callable[[Path], dict[str, Any]]
    """Returns what has to equal the result of the same commands one after the other."""


def _distilled(folder: Path) -> dict[str, Any]:
    return run_outcome(folder / "run")


def _read_while_it_grows(folder: Path) -> dict[str, Any]:
    api.load(folder / "run")
    return experts(folder)


def _used(folder: Path) -> dict[str, Any]:
    assert (folder / "new.html").read_text().rstrip().endswith("</html>"), "the page is not whole"
    return {**rows(folder), **run_outcome(folder / "set"), **tree(folder / "set" / "apply-continual.json")}


RUN, SET = [*DM, "--out", "run"], [*DM, "--out", "set", "--resume"]
ONE, OTHER = [*EVALUATE, TINY, "--num-seeds", "2"], [*EVALUATE, "mlp", "--num-seeds", "2", "--seed", "1"]
THIRD, FOURTH = [*EVALUATE, TINY, "--num-seeds", "1"], [*EVALUATE, TINY, "mlp", "--num-seeds", "1", "--seed", "2"]
NPZ, FOLDER = ["export", "set", "new.npz"], ["export", "set", "new"]
REPORT = ["report", "set", "--out", "new.html"]
CROWDS = (
    Crowd("distill, distill", [RUN, RUN], _distilled),
    Crowd("four distill --resume", [[*RUN, "--resume"]] * 4, _distilled),
    Crowd("four evaluate", [ONE, OTHER, THIRD, FOURTH], rows),
    Crowd("evaluate, evaluate", [ONE, ONE], rows),
    Crowd("buffer, buffer", [[*EXPERTS, "3"]] * 2, experts),
    Crowd("four buffer", [[*EXPERTS, str(n)] for n in (2, 3, 4, 3)], experts),
    Crowd("buffer, distill", [[*EXPERTS, "3"], [*MTT, "--out", "run"]], _read_while_it_grows),
    Crowd("distill, evaluate, report, apply", [SET, ONE, REPORT, APPLY], _used),
    Crowd("export, export", [NPZ, NPZ], lambda folder: tree(folder / "new.npz")),
    Crowd("four export", [FOLDER] * 4, lambda folder: tree(folder / "new")),
)


def crowds(world: World, seed: int, first: int) -> Iterator[str | None]:
    """Check that each command succeeds or is refused in one line. After the refused ones are run again, the outcome has
    to be that of the commands one after the other, and no temporary file may be left."""
    expected: dict[str, dict[str, Any]] = {}
    for number in itertools.count(first):
        rng = Random(f"{seed} crowds {number}")
        crowd = rng.choice(CROWDS)
        if crowd.name not in expected:
            folder = world.copy("crowds")
            for words in crowd.commands:
                run(folder, words)
            expected[crowd.name] = crowd.outcome(folder)
        folder = world.copy("crowds")
        ended = _at_once(folder, crowd.commands, [rng.choice((0.0, 0.05, 0.2)) * rng.random() for _ in crowd.commands])
        loss = _crowd_loss(crowd, folder, ended, expected[crowd.name])
        yield None if loss is None else f"{crowd.name}: {loss}"


def _at_once(folder: Path, commands: Sequence[Words], delays: Sequence[float]) -> list[Ended]:
    """Start the commands together, each after a delay in seconds, and wait for all of them."""
    gate = os.pipe()
    started = []
    for words, delay in zip(commands, delays, strict=True):

        def job(words: Words, delay: float = delay) -> None:
            time.sleep(delay)
            cli.main(words)

        started.append(Command(folder, words, gate=gate, job=job))
    for end in gate:
        os.close(end)
    return [command.wait() for command in started]


def _crowd_loss(crowd: Crowd, folder: Path, ended: Sequence[Ended], expected: dict[str, Any]) -> str | None:
    for words, end in zip(crowd.commands, ended, strict=True):
        if end.status and not end.refused:
            return f"{' '.join(words[:3])}: {end}"
    for words, end in zip(crowd.commands, ended, strict=True):
        if end.status and "exists already" not in end.stderr[0]:
            again = run(folder, [*words, "--resume"] if words[0] == "distill" and "--resume" not in words else words)
            if again.status and "exists already" not in again.stderr[0]:
                return f"{' '.join(words[:3])}, refused with {end.stderr}, then again: {again}"
    try:
        whole_world(folder)
        outcome = crowd.outcome(folder)
    except Exception as error:
        return repr(error)
    different = [name for name in {**expected, **outcome} if outcome.get(name) != expected.get(name)]
    if different:
        return f"differs from the commands one after the other: {different}"
    return f"left {sorted(temporary(folder))}" if temporary(folder) else None


PATIENCE = 12.0


def ranks(world: World, seed: int, first: int) -> Iterator[str | None]:
    """Check two or three processes that distil together, of which one is killed, stopped or fails. The others have to
    end with status 2 and one line in total, which is that of the failing process if there is one. A resumed run has to
    produce the bytes of an undisturbed one."""
    importlib.import_module("torch._dynamo")  # communicating processes import it too, which takes long
    distributed.SAID_AFTER, distributed.HEARD_WITHIN = 2.0, 4.0
    expected: dict[int, dict[str, Any]] = {}
    for number in itertools.count(first):
        rng = Random(f"{seed} ranks {number}")
        size, action = rng.choice((2, 3)), rng.choice((_kill, _stop, _refuse))
        victim, meeting = rng.randrange(size), rng.randint(1, 12)
        if size not in expected:
            folder = world.copy("ranks")
            ended = _meet(folder, size, RUN)
            assert not any(end.status for end in ended), ended
            expected[size] = _distilled(folder)
        folder = world.copy("ranks")
        ended = _meet(folder, size, RUN, victim, meeting, action)
        loss = _rank_loss(ended, victim, action)
        if loss is None:
            again = _meet(folder, size, [*RUN, "--resume"])
            if any(end.status for end in again):
                loss = f"resumed: {[str(end) for end in again]}"
            elif _distilled(folder) != expected[size]:
                loss = "resumed: differs from an undisturbed run"
        what = f"process {victim} of {size} {action.__name__} before meeting {meeting}"
        yield None if loss is None else f"{what}: {loss}"


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _refuse() -> None:
    raise ValueError("process refuses; nothing fixes it")


def _meet(
    folder: Path,
    size: int,
    words: Words,
    victim: int = -1,
    meeting: int = 0,
    action: Callable[[], None] | None = None,
) -> list[Ended]:
    """Start ``size`` processes with the environment that torchrun gives them. At its n-th collective operation
    (``meeting``) the victim executes ``action``. A stopped victim is killed after the others have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables["CONDENSE_PATIENCE"] = str(PATIENCE)

    def job(words: Words) -> None:
        whole, met = Ranks.all_reduce_, 0

        def all_reduce_(self: Ranks, tensors: Any) -> None:
            nonlocal met
            met += 1
            if self.rank == victim and met == meeting and action is not None:
                action()
            whole(self, tensors)

        Ranks.all_reduce_ = all_reduce_  # type: ignore[method-assign]
        cli.main(words)

    started = [Command(folder, words, environment={**variables, "RANK": str(rank)}, job=job) for rank in range(size)]
    ended = [command.wait() if rank != victim else None for rank, command in enumerate(started)]
    if victim >= 0:
        if action is _stop:
            os.kill(started[victim].pid, signal.SIGKILL)
        ended[victim] = started[victim].wait()
    return [end for end in ended if end is not None]


def _rank_loss(ended: Sequence[Ended], victim: int, action: Callable[[], None]) -> str | None:
    others = [end for rank, end in enumerate(ended) if rank != victim]
    if ended[victim].status == 0 and all(end.status == 0 for end in others):
        return None  # the run ended before that operation
    lines = [line for end in ended for line in end.stderr]
    right = all(end.status == 2 for end in others) and all(line.startswith("condense: ") for line in lines)
    # if process 0 is gone or stopped, the others cannot agree on which one prints the line
    fewest = len(others) if victim == 0 and action is not _refuse else 1
    right = right and 1 <= len(lines) <= fewest
    if action is _refuse:
        right = right and len(ended[victim].stderr) == 1 and ended[victim].status == 2
    if action is _stop:
        right = right and all(f"for process {victim}" in line for line in lines)
    return None if right else f"{[str(end) for end in ended]}"

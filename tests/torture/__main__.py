"""The reliability suite: python -m tests.torture [--minutes M] [--groups NAME...] [--seed N] [--state FILE]

It tests the promises of docs/reliability.md many times on small data. Each group tests one of them:

  kills      a command killed at a call that changes files, and resumed, ends with the bytes of an undisturbed one
  faults     on a disk that is full, read-only or broken, a command fails with one line and damages nothing
  mutations  a reader accepts a damaged file or refuses it in one line, within 20 s and 2 GB
  crowds     concurrent commands in one folder leave the same files as the same commands one after the other
  ranks      one of several processes is killed, stopped or fails: the others end with one line, and can be resumed

A case is drawn from the seed and its number, so that each can be repeated: --case kills:17. Commands run in processes
forked from this one. A small library, which is built with a C compiler, injects the faults into their calls. The exit
status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from condense.files import write_text
from tests.torture import crowds, disk, process, reading
from tests.torture.world import World

Group = Callable[[World, int, int], Iterator[str | None]]

GROUPS: dict[str, tuple[Group, int]] = {
    "kills": (disk.kills, 1000),
    "faults": (disk.faults, 500),
    "mutations": (reading.mutations, 100_000),
    "crowds": (crowds.crowds, 200),
    "ranks": (crowds.ranks, 40),
}
"""For each group, the function that runs its cases from a given number on, and the number of cases."""


def main() -> None:
    words = _words()
    root = process.preload()
    process.settle()
    try:
        sys.exit(_torture(World(root), words))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", usage=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the cases of each group to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file with the progress of each group, to continue from")
    parser.add_argument("--case", metavar="GROUP:NUMBER", help="run only this case")
    return parser.parse_args()


def _torture(world: World, words: argparse.Namespace) -> int:
    """Run the groups one after the other, sharing the remaining time; return the exit status."""
    if words.case:
        name, number = words.case.split(":")
        loss = next(GROUPS[name][0](world, words.seed, int(number)))
        print(f"{words.case}: {loss or 'survived'}")
        return int(loss is not None)
    end, state = time.monotonic() + 60 * words.minutes, _state(words)
    for place, name in enumerate(words.groups):
        (cases, goal), counts = GROUPS[name], state["groups"].setdefault(name, {"tried": 0, "lost": {}})
        goal, begun = max(1, round(words.share * goal)), time.monotonic()
        until = begun + (end - begun) / (len(words.groups) - place)
        if counts["tried"] < goal:
            for loss in cases(world, words.seed, counts["tried"]):
                if loss is not None:
                    counts["lost"][counts["tried"]] = loss
                    print(f"lost {name}:{counts['tried']} (--seed {words.seed}): {loss[:1000]}", flush=True)
                counts["tried"] += 1
                if words.state and (loss is not None or counts["tried"] % 20 == 0):
                    write_text(words.state, json.dumps(state, indent=1))
                if counts["tried"] >= goal or time.monotonic() >= until:
                    break
        lost, seconds = len(counts["lost"]), time.monotonic() - begun
        print(f"{name}: {counts['tried']} tried, {counts['tried'] - lost} survived, {seconds:.0f} s", flush=True)
    if words.state:
        write_text(words.state, json.dumps(state, indent=1))
    return int(any(state["groups"][name]["lost"] for name in words.groups))


def _state(words: argparse.Namespace) -> dict[str, Any]:
    if words.state is None or not words.state.exists():
        return {"seed": words.seed, "groups": {}}
    state: dict[str, Any] = json.loads(words.state.read_text())
    if state["seed"] != words.seed:
        sys.exit(f"{words.state} is of seed {state['seed']}; give --seed {state['seed']} or another file")
    return state


if __name__ == "__main__":
    main()

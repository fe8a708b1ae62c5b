"""Condense under torture: python -m tests.torture [--minutes M] [--groups NAME...] [--seed N] [--state FILE]

What docs/reliability.md promises, tried many times over on small data. Each group tells what holds in it:

  kills      a command killed at a call that changes files goes on to the bytes of an undisturbed one
  faults     a disk that is full, read-only or broken refuses a command in one line and harms nothing
  mutations  a reader takes a damaged file or refuses it in one line, within 20 s and 2 GB
  crowds     commands at once in one folder leave what they leave one after the other
  ranks      of several processes one is killed, stopped or refuses: the others end with one line, and go on later

Cases are drawn from the seed and their number, so that each can be played again: --case kills:17. Commands run in
processes forked from this one, and the calls are struck by a small library that a C compiler builds first. Exit status
1 if anything was lost.
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
"""What tries the cases of a group, from one number on, and how many are meant to be tried."""


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
    parser.add_argument("--share", type=float, default=1.0, help="of the cases that each group is meant to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="where it is kept how far each group is, to go on from there")
    parser.add_argument("--case", metavar="GROUP:NUMBER", help="try this one alone")
    return parser.parse_args()


def _torture(world: World, words: argparse.Namespace) -> int:
    """Try the groups in turn, which share the time that is left; returns the exit status."""
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

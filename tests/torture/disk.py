"""Commands that are killed, or whose disk fails, at one of the calls that change files."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.torture.process import Ended, Fault, run
from tests.torture.world import SCENARIOS, Scenario, World, whole_world

OFTEN = {"dm": 4, "mtt": 3, "buffer": 4, "evaluate": 4}
"""How often the long commands are drawn for each time that another one is drawn."""


def kills(world: World, seed: int, first: int) -> Iterator[str | None]:
    """Kill a command at one call; in half of the cases, also kill the resumed command. The next resumed command has to
    succeed with the outcome of an undisturbed one."""
    for rng, scenario, folder in _cases(world, "kills", seed, first):
        loss, words = None, scenario.words
        for _ in range(rng.randint(1, 2)):
            ended = run(folder, words, Fault(rng.randint(1, world.undisturbed(scenario)[1]), torn=rng.random() < 0.5))
            if ended.status not in (0, -9) and not _done_before(scenario, ended):
                loss = loss or f"{' '.join(words)}: {ended}"
            words = scenario.again
            loss = loss or _lost(scenario, folder, f"killed at {ended.call}")
        yield loss or _repeated(world, scenario, folder, f"killed at {ended.call}")


def faults(world: World, seed: int, first: int) -> Iterator[str | None]:
    """Let one call fail, or on a full disk every later call that needs space too. The command has to fail with one line
    or succeed; existing files have to be intact, no temporary file may be left, and the same command has to succeed
    afterwards."""
    for rng, scenario, folder in _cases(world, "faults", seed, first):
        error = rng.choice((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
        full = error in (errno.ENOSPC, errno.EDQUOT)
        fault = Fault(rng.randint(1, world.undisturbed(scenario)[1]), error, full, torn=full and rng.random() < 0.5)
        before = temporary(folder)
        ended = run(folder, scenario.words, fault)
        what = f"{errno.errorcode[error]} at {ended.call or 'no call'}"
        loss = None if ended.status == 0 or ended.refused else f"{what}: {ended}"
        left = temporary(folder) - before
        if left and not ended.call.startswith("unlink"):
            loss = loss or f"{what}: left {sorted(left)}"
        yield loss or _lost(scenario, folder, what) or _repeated(world, scenario, folder, what)


def _cases(world: World, group: str, seed: int, first: int) -> Iterator[tuple[Random, Scenario, Path]]:
    drawn = [scenario for scenario in SCENARIOS for _ in range(OFTEN.get(scenario.name, 1))]
    for number in itertools.count(first):
        rng = Random(f"{seed} {group} {number}")
        yield rng, rng.choice(drawn), world.copy(group)


def _done_before(scenario: Scenario, ended: Ended) -> bool:
    """Return whether the command was refused because its output exists: the fault came after the output was written."""
    return ended.refused and scenario.makes_new and "exists already" in ended.stderr[0]


def _repeated(world: World, scenario: Scenario, folder: Path, what: str) -> str | None:
    """Run the command again; return how its outcome differs from an undisturbed one, or None."""
    ended = run(folder, scenario.again)
    if ended.status and not _done_before(scenario, ended):
        return f"{scenario.name}: {what}, then again: {ended}"
    try:
        outcome, expected = scenario.outcome(folder), world.undisturbed(scenario)[0]
    except Exception as error:
        return f"{scenario.name}: {what}, then again: {error!r}"
    different = [name for name in {**expected, **outcome} if outcome.get(name) != expected.get(name)]
    return f"{scenario.name}: {what}, then again: differs from an undisturbed run: {different}" if different else None


def _lost(scenario: Scenario, folder: Path, what: str) -> str | None:
    try:
        whole_world(folder)
    except Exception as error:
        return f"{scenario.name}: {what}: {error!r}"
    return None


def temporary(folder: Path) -> set[str]:
    """Return the files and folders whose names begin with a dot, except locks and those in the cache."""
    names = (path.relative_to(folder) for path in folder.rglob(".*") if path.suffix != ".lock")
    return {str(path) for path in names if path.parts[0] != "cache"}

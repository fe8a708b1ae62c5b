"""Commands that are killed, or whose disk fails, at one of the calls that change files."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.torture.process import Blow, Ended, run
from tests.torture.world import SCENARIOS, Scenario, World, whole_world

OFTEN = {"dm": 4, "mtt": 3, "buffer": 4, "evaluate": 4}
"""How often the commands that work for long are drawn, where the others are drawn once."""


def kills(world: World, seed: int, first: int) -> Iterator[str | None]:
    """SIGKILL at one call, and in half of the cases at another one of the command that goes on. Then the same command
    ends well, with the outcome of an undisturbed one."""
    for rng, scenario, folder in _cases(world, "kills", seed, first):
        loss, words = None, scenario.words
        for _ in range(rng.randint(1, 2)):
            ended = run(folder, words, Blow(rng.randint(1, world.undisturbed(scenario)[1]), torn=rng.random() < 0.5))
            if ended.status not in (0, -9) and not _done_before(scenario, ended):
                loss = loss or f"{' '.join(words)}: {ended}"
            words = scenario.again
            loss = loss or _lost(scenario, folder, f"killed at {ended.call}")
        yield loss or _repeated(world, scenario, folder, f"killed at {ended.call}")


def faults(world: World, seed: int, first: int) -> Iterator[str | None]:
    """One call fails, or each one that needs room from there on. The command is refused in one line, or does without;
    what was there is whole, no temporary file is left, and the same command then ends well."""
    for rng, scenario, folder in _cases(world, "faults", seed, first):
        error = rng.choice((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
        full = error in (errno.ENOSPC, errno.EDQUOT)
        blow = Blow(rng.randint(1, world.undisturbed(scenario)[1]), error, full, torn=full and rng.random() < 0.5)
        before = temporary(folder)
        ended = run(folder, scenario.words, blow)
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
    """Refused because what it makes is there: the blow came when all was done."""
    return ended.refused and scenario.makes_new and "exists already" in ended.said[0]


def _repeated(world: World, scenario: Scenario, folder: Path, what: str) -> str | None:
    """Why the command, given again, does not end as if nothing had happened."""
    ended = run(folder, scenario.again)
    if ended.status and not _done_before(scenario, ended):
        return f"{scenario.name}: {what}, then again: {ended}"
    try:
        found, wanted = scenario.outcome(folder), world.undisturbed(scenario)[0]
    except Exception as error:
        return f"{scenario.name}: {what}, then again: {error!r}"
    other = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return f"{scenario.name}: {what}, then again: other than undisturbed: {other}" if other else None


def _lost(scenario: Scenario, folder: Path, what: str) -> str | None:
    try:
        whole_world(folder)
    except Exception as error:
        return f"{scenario.name}: {what}: {error!r}"
    return None


def temporary(folder: Path) -> set[str]:
    """Files and folders with names that begin with a dot, without locks, which stay; those of the cache may stay."""
    found = (path.relative_to(folder) for path in folder.rglob(".*") if path.suffix != ".lock")
    return {str(path) for path in found if path.parts[0] != "cache"}

"""Keyed randomness: every draw is a function of (root seed, name, step, unit), never of history.

A keyed draw does not depend on what was drawn before it, on the number of processes or on the device, so a
resumed run needs no generator state and every rank agrees. The global generators are never read and never seeded.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from condense.names import spelt


@dataclass(frozen=True)
class Rng:
    """A root seed. ``rng(name, step, unit)`` returns a fresh CPU generator for that key.

    ``unit`` tells apart the parts of one step: a class, a trajectory, a pool member, an expert.
    """

    seed: int

    def key(self, name: str, step: int = 0, unit: int | str = 0) -> int:
        """A 63-bit integer: the hash of (seed, name, step, unit)."""
        text = f"{self.seed}/{name}/{step}/{unit}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def __call__(self, name: str, step: int = 0, unit: int | str = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.key(name, step, unit))

    def child(self, name: str, unit: int | str = 0) -> Rng:
        """A root of its own, for a part (an expert, an evaluation cell) that draws by names of its own."""
        return Rng(self.key(name, 0, unit))

    @contextlib.contextmanager
    def forked(self, name: str, step: int = 0, unit: int | str = 0) -> Iterator[None]:
        """Inside, the global generators are seeded by the key; on leaving they are as they were before.

        For code that cannot take a generator: the constructors of ``torch.nn`` modules, dropout.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.key(name, step, unit))
            yield


def check_seed(seed: int, field: str = "seed") -> None:
    """Raise ValueError of a seed that is negative; ``field`` is where the user gave it."""
    if seed < 0:
        raise ValueError(f"{field} must be at least 0, got {seed}; give {spelt(field, 0)}")


class Generators(NamedTuple):
    """The states of the global generators that a computation on one device draws from.

    Dropout draws from them. What is computed twice, once for its value and once for its derivative, has to draw the
    same numbers both times: take ``of`` before the first time, and go through ``replayed`` the second time.
    """

    cpu: Tensor
    device: torch.device
    own: Tensor | None
    """The state of the generator of ``device``, where that is not the CPU."""

    @classmethod
    def of(cls, device: torch.device) -> Generators:
        """As they are now."""
        return cls(torch.get_rng_state(), device, _state_of(device))

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the global generators go on from these states; on leaving they are as they were before."""
        before = Generators.of(self.device)
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device.type == "cuda":
            assert self.own is not None
            torch.cuda.set_rng_state(self.own, self.device)
        elif self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own)


def _state_of(device: torch.device) -> Tensor | None:
    if device.type in ("cpu", "meta"):
        return None
    state: Tensor
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    else:
        state = torch.get_device_module(device).get_rng_state()
    return state

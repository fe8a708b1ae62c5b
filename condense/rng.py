"""Keyed randomness: every draw is a function of (root seed, name, step, unit), never of history.

A keyed draw does not depend on earlier draws, on the number of processes or on the device. A resumed run therefore
needs no generator state, and all ranks draw the same numbers. Only ``Rng.forked`` and ``Generators`` use the global
generators, and they restore their states.
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
    """A root seed. ``rng(name, step, unit)`` returns a new CPU generator for that key.

    ``unit`` distinguishes the parts of one step, such as classes, trajectories, pool members or experts.
    """

    seed: int

    def key(self, name: str, step: int = 0, unit: int | str = 0) -> int:
        """Return the 63-bit hash of (seed, name, step, unit)."""
        text = f"{self.seed}/{name}/{step}/{unit}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def __call__(self, name: str, step: int = 0, unit: int | str = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.key(name, step, unit))

    def child(self, name: str, unit: int | str = 0) -> Rng:
        """Return a new root for a component (an expert, an evaluation cell) that chooses its own names of draws."""
        return Rng(self.key(name, 0, unit))

    @contextlib.contextmanager
    def forked(self, name: str, step: int = 0, unit: int | str = 0) -> Iterator[None]:
        """Seed the global generators by the key inside the context, and restore their states on exit.

        This is for code that cannot take a generator: the constructors of ``torch.nn`` modules, dropout.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.key(name, step, unit))
            yield


def check_seed(seed: int, field: str = "seed") -> None:
    """Raise ValueError if a seed is negative; ``field`` is the name of the user's field, for the message."""
    if seed < 0:
        raise ValueError(f"{field} must be at least 0, got {seed}; give {spelt(field, 0)}")


class Generators(NamedTuple):
    """The states of the global generators from which a computation on one device draws, for example for dropout.

    A function that is computed twice, once for its value and once for its derivative, has to draw the same numbers
    both times: call ``of`` before the first time, and use ``replayed`` the second time.
    """

    cpu: Tensor
    device: torch.device
    own: Tensor | None
    """The state of the generator of ``device``; None if that is the CPU."""

    @classmethod
    def of(cls, device: torch.device) -> Generators:
        """Return the current states."""
        return cls(torch.get_rng_state(), device, _state_of(device))

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Set the global generators to these states inside the context, and restore their own states on exit."""
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

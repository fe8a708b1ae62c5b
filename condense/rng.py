"""Keyed randomness: every draw is a function of (root seed, name, step, unit), never of history.

A keyed draw does not depend on earlier draws, on the number of processes or on the device. A resumed run therefore
needs no generator state, and all ranks draw the same numbers. Only ``Rng.forked`` and ``Generators`` use the global
generators, and they restore their states.

Draws are computed by Philox4x32-10, a function from a key and a counter to four random words of 32 bits: Salmon,
Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The root seed and the name give the key,
the step and the unit are words of the counter. The step may be a tensor on a GPU, so a captured step can draw new
numbers at each replay.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from condense.cudagraph import fused
from condense.names import spelt

VERSION = 2
"""The version of the draws. It is part of the identity of what is stored under a seed instead of computed again."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_INDEX = 2**31 - 1
"""The part of a sorting key that is the index."""
_FEW = 8
"""Number of blocks up to which Python's ints are faster than arrays."""


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return the four output words of Philox4x32-10.

    Args:
        counter: four words, each an int or an int64 array or tensor; they are broadcast. A product of two words wraps
            in int64, which leaves all of its 64 bits intact.
        key: two words.

    Returns:
        Four words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


@fused(dynamic=True)
def _words_of(blocks: Tensor, unit: Tensor, step: Tensor, base: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """Return the words of some blocks of a stream, one after the other."""
    return torch.stack(philox((blocks, unit, step, base), (k0, k1)), 1).flatten()


class Draws:
    """Random numbers of one key. Successive calls return different numbers, and a new object begins again.

    If the step of the key is an int, results are computed and returned on the CPU. If it is a tensor, they are computed
    on its device, without reading it. Integers, uniform numbers and permutations are the same either way, normal
    numbers up to rounding.
    """

    def __init__(self, key: tuple[int, int], unit: int | Tensor, step: int | Tensor, base: int | Tensor) -> None:
        self._key, self._numbers = key, (unit, step, base)
        self._num_blocks = 0

    @property
    def device(self) -> torch.device:
        """The device of the results."""
        return next((x.device for x in self._numbers if isinstance(x, Tensor)), torch.device("cpu"))

    @property
    def on_host(self) -> bool:
        """Whether a result may be read without waiting for a device."""
        return not any(isinstance(x, Tensor) for x in self._numbers)

    def words(self, num: int) -> Tensor:
        """Return ``num`` independent words, uniform over {0, ..., 2^32 - 1}, as int64."""
        first, count = self._num_blocks, -(-num // 4)
        self._num_blocks += count
        if not self.on_host:
            blocks, device = torch.arange(first, first + count, device=self.device), self.device
            tensors = [  # an int would be a constant of the compiled code
                x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device=device)
                for x in (*self._numbers, *self._key)
            ]
            return _words_of(blocks, *tensors)[:num]
        if count <= _FEW:
            few = [word for block in range(first, first + count) for word in self._outputs(block)]
            return torch.tensor(few[:num], dtype=torch.int64)
        return torch.from_numpy(np.stack(self._outputs(np.arange(first, first + count)), 1).reshape(-1)[:num])

    def _outputs(self, block: Any) -> tuple[Any, Any, Any, Any]:
        return philox((block, *self._numbers), self._key)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 numbers, uniform over the multiples of 2^-24 in [0, 1)."""
        return (self.words(math.prod(shape)) >> 8).to(torch.float32).mul_(2.0**-24).view(shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal float32 numbers, by the method of Box and Muller (1958)."""
        num = math.prod(shape)
        u = self.uniform(2, -(-num // 2))
        radius, angle = (-2 * (1 - u[0]).log()).sqrt(), 2 * math.pi * u[1]
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:num].view(shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 numbers, uniform over {low, ..., high - 1} up to a bias of (high - low) / 2^32.

        Raises:
            ValueError: the range is empty or has more than 2^31 numbers.
        """
        if not 0 < high - low <= 2**31:
            raise ValueError(f"cannot draw integers from {low} to {high - 1}; give a range of 1 to 2^31 numbers")
        return (self.words(math.prod(shape)) * (high - low) >> 32).add_(low).view(shape)

    def integer(self, low: int, high: int) -> int:
        """Return one of {low, ..., high - 1} as an int; the step of the key must be an int."""
        assert self.on_host, "a number drawn on a device cannot be read in a step that is captured"
        return int(self.integers(low, high))

    def permutation(self, num: int) -> Tensor:
        """Return a random order of {0, ..., num - 1}, for ``num`` of at most 2^31."""
        return self._keys(num).sort().values & _INDEX

    def weighted(self, weights: Tensor, num: int) -> Tensor:
        """Return ``num`` indices into ``weights`` (n,), drawn with replacement in proportion to these."""
        shares = weights.double().cumsum(0)
        drawn = self.uniform(num).to(shares.device).double() * shares[-1]
        return torch.searchsorted(shares, drawn, right=True).clamp_(max=len(weights) - 1)

    def subset(self, num: int, size: int) -> Tensor:
        """Return ``size`` different numbers of {0, ..., num - 1}, all of them if there are fewer, in random order.

        They are the first ones of ``permutation``.
        """
        if size >= num:
            return self.permutation(num)
        return self._keys(num).topk(size, largest=False).values & _INDEX

    def _keys(self, num: int) -> Tensor:
        """Return different numbers in random order: a random word above, the index below."""
        return self.words(num) << 31 | torch.arange(num, device=self.device)


@dataclass(frozen=True)
class Rng:
    """A root seed. ``rng(name, step, unit)`` returns the draws of that key.

    ``unit`` distinguishes the parts of one step, such as classes, trajectories, pool members or experts.
    """

    seed: int
    base: int | Tensor = 0
    """A fourth part of all keys: the unit of the ``child`` that this root is."""

    def __call__(self, name: str, step: int | Tensor = 0, unit: int | str | Tensor = 0) -> Draws:
        """Return the draws of a key; its numbers are ints in [0, 2^31) or 0-d int64 tensors."""
        text, word = (f"{name}/{unit}", 0) if isinstance(unit, str) else (name, unit)
        for number in (word, step, self.base):
            assert isinstance(number, Tensor) or 0 <= number < 2**31, f"{number} cannot be a part of a key"
        digest = hashlib.sha256(f"{self.seed}/{text}".encode()).digest()
        key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
        return Draws(key, word, step, self.base)

    def key(self, name: str, step: int = 0, unit: int | str = 0) -> int:
        """Return the 63-bit hash of (seed, name, step, unit), a seed for generators of other libraries."""
        assert not isinstance(self.base, Tensor), "a seed cannot depend on a number that is on a device"
        base = f"/{self.base}" if self.base else ""
        text = f"{self.seed}{base}/{name}/{step}/{unit}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, name: str, step: int = 0, unit: int | str = 0) -> torch.Generator:
        """Return a new CPU generator with that key as its seed, for functions of PyTorch that take one."""
        return torch.Generator().manual_seed(self.key(name, step, unit))

    def child(self, name: str, unit: int | str | Tensor = 0) -> Rng:
        """Return a new root for a component (an expert, an evaluation cell) that chooses its own names of draws."""
        return Rng(self.key(name, 0, unit)) if isinstance(unit, str) else Rng(self.key(name), unit)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, what determines all draws from this root."""
        assert not isinstance(self.base, Tensor), "an identity cannot depend on a number that is on a device"
        return {"seed": self.seed, "base": self.base, "draws": VERSION}

    @contextlib.contextmanager
    def forked(self, name: str, step: int | Tensor = 0, unit: int | str = 0) -> Iterator[None]:
        """Seed the global generators by the key inside the context, and restore their states on exit.

        This is for code that cannot take a generator: the constructors of ``torch.nn`` modules, dropout.
        A step that is a tensor seeds nothing: a captured step must not draw from the global generators.
        """
        if isinstance(step, Tensor):
            yield
            return
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            seed_globally(self.key(name, step, unit))
            yield


def seed_globally(seed: int) -> None:
    """Seed the global generators of all devices. Without an accelerator ``torch.manual_seed`` would take milliseconds,
    because it describes the stack for devices that are not there."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


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
        """Return the current states. A step that is captured as a CUDA graph draws from none of them."""
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        return cls(torch.get_rng_state(), device, None if captured else _state_of(device))

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
        if self.own is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.own, self.device)
        else:
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

"""Learning rate schedules of the optimisers of a set, of trainings and of experts.

Files of version 0.1 write a schedule as flat fields of its optimiser or training. ``Schedule.content``,
``Schedule.optimiser_content`` and ``nested`` are the only places that know this format. Schedules that it can express
are still written in it, so that hashes and identities do not change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from condense.schema import Checked


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked):
    """The learning rate of each step as a function of a base learning rate; by default it is constant.

    After the warm-up the learning rate is multiplied by the factors of all drops, the cosine and the linear decay. For
    an optimiser without epochs, such as that of the synthetic set, an epoch is one step.
    """

    warmup_steps: int = 0
    """Number of warm-up steps, in which the learning rate rises linearly from zero."""
    drop_at: tuple[float, ...] = ()
    """Fractions of the run after which the learning rate drops, at the beginning of an epoch."""
    drop_after: tuple[int, ...] = ()
    """Epochs after which the learning rate drops, whatever the length of the run."""
    drop_factor: float = 0.1
    """Factor by which each drop multiplies the learning rate; 0.5 halves it."""
    cosine_to: float | None = None
    """Final learning rate as a fraction of the base learning rate (cosine annealing); None: no annealing."""
    cosine_span: float = 1.0
    """Fraction of the half period of the cosine that the run covers; 1: the run ends at ``cosine_to``."""
    linear_to: float | None = None
    """Final learning rate as a fraction of the base learning rate, approached linearly; None: no linear decay."""
    lr_per_step: tuple[float, ...] = ()
    """Learning rate of each step, which replaces all other fields; further steps keep the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps < 0:
            raise ValueError(f"a schedule's warmup_steps must be at least 0, got {self.warmup_steps}; try 500")
        if not all(0 <= at <= 1 for at in self.drop_at):
            raise ValueError(f"a schedule's drop_at are fractions of the run in [0, 1], got {self.drop_at}; try 0.5")
        if not all(epoch >= 0 for epoch in self.drop_after):
            raise ValueError(f"a schedule's drop_after are numbers of epochs >= 0, got {self.drop_after}; try 15")
        if not 0 <= self.drop_factor < math.inf:
            raise ValueError(f"a schedule's drop_factor must be finite and >= 0, got {self.drop_factor}; try 0.1")
        if self.cosine_to is not None and not 0 <= self.cosine_to <= 1:
            raise ValueError(f"a schedule's cosine_to must lie in [0, 1], got {self.cosine_to}; try 0.1")
        if self.linear_to is not None and not 0 <= self.linear_to <= 1:
            raise ValueError(f"a schedule's linear_to must lie in [0, 1], got {self.linear_to}; try 0.1")
        if not 0 < self.cosine_span <= 1:
            raise ValueError(f"a schedule's cosine_span must lie in (0, 1], got {self.cosine_span}; try 1")
        if not all(0 <= lr < math.inf for lr in self.lr_per_step):
            raise ValueError("a schedule's lr_per_step are finite learning rates >= 0; correct the one that is not")

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate of a step depends on the number of steps of the run."""
        anneals = self.cosine_to is not None or self.linear_to is not None
        return not self.lr_per_step and (bool(self.drop_at) or anneals)

    def lr_at(self, lr: float, step: int, num_steps: int, steps_per_epoch: int = 1) -> float:
        """The learning rate of a step.

        Args:
            lr: the base learning rate.
            step: the step, counted from 0.
            num_steps: number of steps of the whole run.
            steps_per_epoch: steps per epoch; the learning rate drops only between epochs.
        """
        if self.lr_per_step:
            return self.lr_per_step[min(step, len(self.lr_per_step) - 1)]
        if step < self.warmup_steps:
            return lr * step / self.warmup_steps
        epoch = step // steps_per_epoch
        done = epoch * steps_per_epoch / max(num_steps, 1)
        drops = sum(done >= at for at in self.drop_at) + sum(epoch >= after for after in self.drop_after)
        lr = lr * self.drop_factor**drops
        done = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        if self.linear_to is not None:
            lr = lr * (1 - (1 - self.linear_to) * done)
        if self.cosine_to is None:
            return lr
        wave = (1 + math.cos(math.pi * (done * self.cosine_span))) / 2
        return lr * (self.cosine_to + (1 - self.cosine_to) * wave)

    def describe(self) -> str:
        """Return text in brackets that follows a learning rate in messages; empty if the learning rate is constant."""
        parts = [f"warm-up of {self.warmup_steps} steps"] if self.warmup_steps else []
        if self.cosine_to is not None:
            share = "" if self.cosine_span == 1 else f"the first {100 * self.cosine_span:g} % of a "
            parts.append(f"{share}cosine to {self.cosine_to:g}")
        if self.linear_to is not None:
            parts.append(f"linear to {self.linear_to:g}")
        if self.drop_at:
            parts.append(f"x {self.drop_factor:g} at {', '.join(f'{at:g}' for at in self.drop_at)} of the epochs")
        if self.drop_after:
            parts.append(f"x {self.drop_factor:g} after {', '.join(map(str, self.drop_after))} epochs")
        if self.lr_per_step:
            parts = ["one for each step"]
        return f" ({', '.join(parts)})" if parts else ""

    def content(self) -> dict[str, Any]:
        """Return the flat fields of a training: ``decay_at``, ``decay``, and all others that differ from their
        default. Beside a cosine ``decay_at`` is not read, so drops are then written as ``drops`` too."""
        flat = {
            "decay_at": _one_or_several(self.drop_at),
            "decay": self.drop_factor,
            "decay_epoch": _one_or_several(self.drop_after),
            "warmup_steps": self.warmup_steps,
            "cosine_to": self.cosine_to,
            "cosine_span": self.cosine_span,
            "linear_to": self.linear_to,
            "rates": self.lr_per_step,
            "drops": self.drop_at if self.cosine_to is not None else (),
        }
        return {name: value for name, value in flat.items() if name in ("decay_at", "decay") or value != _OMITTED[name]}

    def optimiser_content(self) -> dict[str, Any]:
        """Return the fields of an optimiser of the set: ``cosine_to`` and ``halve_at`` where these suffice, else
        ``schedule`` with all of its fields."""
        factor = 0.5 if self.drop_at else self.drop_factor
        if self == Schedule(cosine_to=self.cosine_to, drop_at=self.drop_at, drop_factor=factor):
            return {"cosine_to": self.cosine_to, "halve_at": list(self.drop_at)}
        fields = dataclasses.asdict(self)
        if self.linear_to is None:
            del fields["linear_to"]  # files of earlier versions do not have it
        return {"schedule": {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}}


CONSTANT = Schedule()
DROP_AT_HALF = Schedule(drop_at=(0.5,))
"""The learning rate drops to a tenth after half of the epochs."""

_OMITTED: dict[str, Any] = {
    "decay_epoch": None,
    "warmup_steps": 0,
    "cosine_to": None,
    "cosine_span": 1.0,
    "linear_to": None,
    "rates": (),
    "drops": (),
}

FLAT_NAMES = ("decay_at", "decay", *_OMITTED)
"""Names of the fields that ``Schedule.content`` writes."""

_NAMES = {
    "decay_at": "drop_at",
    "decay": "drop_factor",
    "decay_epoch": "drop_after",
    "halve_at": "drop_at",
    "warmup_steps": "warmup_steps",
    "cosine_to": "cosine_to",
    "cosine_span": "cosine_span",
    "linear_to": "linear_to",
    "rates": "lr_per_step",
    "drops": "drop_at",
}
"""Flat name -> name of the field of ``Schedule``."""


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an optimiser or a training in a file, with the flat ones moved into ``schedule``.

    The values are not checked here. Fields that are given under ``schedule`` take precedence.
    """
    rest, moved = dict[str, Any](), dict[str, Any]()
    for key, value in fields.items():
        name = str(key).replace("-", "_")
        if name not in _NAMES:
            rest[key] = value
        elif _NAMES[name] in ("drop_at", "drop_after", "lr_per_step"):
            moved[_NAMES[name]] = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
            if name == "halve_at":
                moved["drop_factor"] = 0.5 if moved["drop_at"] else 0.1
        else:
            moved[_NAMES[name]] = value
    if not moved:
        return rest
    if "decay_at" in fields and "drops" not in fields and moved.get("cosine_to") is not None:
        moved["drop_at"] = []  # a training of version 0.1 with a cosine has no drops
    given = rest.get("schedule", {})
    return rest | {"schedule": moved | dict(given)} if isinstance(given, Mapping) else rest


def _one_or_several(values: tuple[Any, ...]) -> Any:
    """Return None for an empty tuple, the value for a tuple of one, else the tuple."""
    return None if not values else values[0] if len(values) == 1 else values

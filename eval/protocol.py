"""How networks are trained before they are scored: frozen values under fixed names, so that they compare."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from condense.files import canonical_json
from condense.names import suggest
from condense.synthetic.set import SyntheticSet
from condense.train import Training


@dataclass(frozen=True, kw_only=True)
class Protocol(Training):
    """A training with its augmentation and its labels. The accuracy counted is that of the last epoch."""

    name: str
    """What it is called; not part of the hash."""
    augment: str = "none"
    """none, dsa (the data set's own strategy) or a strategy; every image draws its own parameters."""
    labels: Literal["hard", "own"] = "hard"
    """hard: one class per image, by argmax where the set has soft labels. own: the targets of the set."""

    def describe(self) -> str:
        """One line."""
        drop = "" if self.decay_at is None else f" (x {self.decay:g} at {self.decay_at} of them)"
        return (
            f"{self.num_epochs} epochs, batch {self.batch_size}, {self.optimiser} lr {self.lr:g}{drop}, "
            f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}, {self.loss}, "
            f"augmentation {self.augment}, labels {self.labels}"
        )

    def content(self) -> dict[str, Any]:
        """Every field but the name."""
        fields = super().content()
        del fields["name"]
        return fields

    @property
    def hash(self) -> str:
        """sha256 of the content; two accuracies compare only where it agrees."""
        return hashlib.sha256(canonical_json(self.content()).encode()).hexdigest()


_CANONICAL = Protocol(
    name="canonical",
    num_epochs=300,
    batch_size=256,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    decay_at=0.5,
    decay=0.1,
    loss="cross-entropy",
    augment="none",
    labels="hard",
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _CANONICAL,
        dataclasses.replace(_CANONICAL, name="canonical-dsa", num_epochs=1000, augment="dsa"),
        dataclasses.replace(_CANONICAL, name="full-data", num_epochs=20, batch_size=64),
    )
}
"""``canonical``: the published tables without augmentation (Zhao, Mopuri and Bilen, "Dataset Condensation
with Gradient Matching", ICLR 2021). Deviations from the published code: it runs one epoch more, drops the
learning rate a little after half, and loses the momentum there. ``canonical-dsa``: the tables with
augmentation (DSA, DM, MTT); the same with 1000 epochs. ``full-data``: for the whole training set."""


def named(name: str, syn: SyntheticSet) -> Protocol:
    """The protocol of that name; ``own`` is the one that the set brings along.

    Raises:
        ValueError: unknown name; ``own`` of a set without a record of its training.
    """
    if name == "own":
        return own(syn)
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: {suggest(name, [*PROTOCOLS, 'own'])}")
    return PROTOCOLS[name]


def own(syn: SyntheticSet) -> Protocol:
    """The training that the set was made for: its stored record, its soft labels and its learned step size.

    Raises:
        ValueError: the set has no such record, or one that this version cannot follow.
    """
    record = dict(syn.origin.training)
    if not record:
        raise ValueError("the set does not say how it is meant to be trained on: give --protocol canonical")
    if syn.lr is not None:
        record["rates" if syn.lr.dim() else "lr"] = syn.lr.tolist()
    try:
        record |= {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return Protocol(name="own", labels="own", **record)
    except TypeError as error:
        raise ValueError(
            f"this version cannot train as the set is meant to be trained: {error}; give --protocol canonical"
        ) from error


def recorded_name(protocol: Protocol, syn: SyntheticSet | None = None) -> str:
    """The name that results carry: with a star where a field differs from the protocol that owns the name."""
    if protocol.name == "own" and syn is not None:
        owner = own(syn)
    else:
        owner = PROTOCOLS.get(protocol.name, protocol)
    return protocol.name if protocol == owner else f"{protocol.name}*"

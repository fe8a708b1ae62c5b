"""How networks are trained before they are scored: frozen values under fixed names, so that they compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from condense.augment import MILD, Augment
from condense.data.layout import channel_axis
from condense.eval.calibration import Calibration
from condense.files import canonical_json
from condense.names import spelt, suggest
from condense.networks import InputShape
from condense.plugins import Registry, instance_of
from condense.schedule import FLAT_NAMES, Schedule, nested
from condense.schema import brief, from_json
from condense.synthetic.set import SyntheticSet
from condense.train import Training

STRATEGIES = {
    "frepo": (Augment(MILD), Augment(("flip", *MILD))),
    "rcig": (Augment(MILD[1:], mode="P"), Augment(("flip", *MILD), mode="P", flips=True)),
}
"""The augmentations of Zhou et al. (2022) and Loo et al. (2023), for images of one channel and of more. The first
applies one operation to all images of a batch. The second applies an operation of its own to each image, and adds the
mirror images to a set of colour images."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Training):
    """A training with its augmentation and its labels. The accuracy counted is that of the last epoch."""

    name: str
    """What it is called; not part of the hash."""
    augment: str = "none"
    """none, dsa (the data set's own strategy), frepo or rcig (see ``STRATEGIES``), or a strategy; every image draws its
    own parameters."""
    labels: Literal["hard", "own"] = "hard"
    """hard: one class per image, by argmax where the set has soft labels. own: the targets of the set."""
    steps_for: tuple[tuple[int, int], ...] = ()
    """Pairs (images, steps): the steps of the pair nearest to the size of the set, in place of num_epochs."""
    learned_lr: bool = False
    """Whether the set's learned step size, where it has one, takes the place of lr."""
    lr_grid: tuple[float, ...] = ()
    """Learning rates of which the best on held-out real images takes the place of lr; no test image takes part."""
    teacher: str = ""
    """A network that is trained on the real images and labels each batch as it is seen; ``same``: of the architecture
    that is evaluated."""
    calibration: Calibration = "none"
    """How the confidence of the trained network is mended on held-out real images before it is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < lr < math.inf for lr in self.lr_grid):
            raise ValueError(f"protocol.lr_grid needs finite learning rates > 0, got {self.lr_grid}; try 0.01 and 0.1")
        if not all(min(pair) > 0 for pair in self.steps_for):
            raise ValueError(
                f"protocol.steps_for needs pairs (images, steps) > 0, got {self.steps_for}; try (100, 2000)"
            )

    def augment_for(self, input_shape: InputShape, own: str) -> Augment:
        """The augmentation of images of this shape; ``own`` is the data set's strategy. Raises ValueError on one that
        ``Augment.parse`` does not know."""
        if self.augment in STRATEGIES:
            grey, colour = STRATEGIES[self.augment]
            return grey if input_shape[channel_axis(input_shape)] == 1 else colour
        return Augment.parse(self.augment, own=own)

    def resolved(self, num_images: int, lr: Tensor | None = None, copies: int = 1) -> Protocol:
        """The training of a set of so many images whose learned step size is ``lr``. ``copies``: how many images are
        trained on for each of the set, 2 where its mirror images are added."""
        changes: dict[str, Any] = {}
        if self.steps_for:
            _, steps = min(self.steps_for, key=lambda pair: abs(math.log(pair[0] / num_images)))
            changes |= {"num_epochs": -(-steps // -(-copies * num_images // self.batch_size)), "steps_for": ()}
        if self.learned_lr and lr is not None and not lr.dim():
            changes |= {"lr": lr.item(), "learned_lr": False}
        return dataclasses.replace(self, **changes)

    @property
    def holds_out(self) -> bool:
        """Whether it needs real images that the set was not made from."""
        return bool(self.lr_grid) or self.calibration != "none"

    def describe(self) -> str:
        """One line."""
        length = "steps by size" if self.steps_for else f"{self.num_epochs} epochs"
        lr = "learned" if self.learned_lr else "by validation" if self.lr_grid else f"{self.lr:g}"
        labels = f"by a teacher ({self.teacher})" if self.teacher else self.labels
        return (
            f"{length}, batch {self.batch_size}, {self.optimiser} lr {lr}{self.schedule.describe()}, "
            f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}, {self.loss}, "
            f"augmentation {self.augment}, labels {labels}"
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
    schedule=Schedule(drop_at=(0.5,), drop_factor=0.1),
    loss="cross-entropy",
    augment="none",
    labels="hard",
)

_REGRESSION = dataclasses.replace(
    _CANONICAL,
    optimiser="adam",
    weight_decay=0.0,
    schedule=Schedule(warmup_steps=500, cosine_to=0.01),
    loss="mse",
    labels="own",
)

_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _CANONICAL,
        dataclasses.replace(_CANONICAL, name="canonical-dsa", num_epochs=1000, augment="dsa"),
        dataclasses.replace(_CANONICAL, name="full-data", num_epochs=20, batch_size=64),
        dataclasses.replace(_CANONICAL, name="dc", num_epochs=1000, augment="crop-dc_scale-dc_rotate-dc:mode=P"),
        dataclasses.replace(
            _REGRESSION,
            name="frepo",
            lr=3e-4,
            batch_size=500,
            augment="frepo",
            steps_for=((10, 1000), (100, 2000), (200, 20000), (500, 5000), (1000, 10000), (2000, 40000), (5000, 40000)),
        ),
        dataclasses.replace(
            _REGRESSION,
            name="rcig",
            lr=1e-4,
            batch_size=256,
            augment="rcig",
            steps_for=((10, 1000), (20, 2000)),
        ),
        dataclasses.replace(
            _CANONICAL,
            name="datm",
            num_epochs=1000,
            batch_size=128,
            augment="dsa:align_corners=true",
            labels="own",
            learned_lr=True,
        ),
        dataclasses.replace(
            _CANONICAL,
            name="soft-teacher",
            batch_size=100,
            optimiser="adamw",
            lr=1e-3,
            weight_decay=0.01,
            schedule=Schedule(cosine_to=0.0, cosine_span=0.5),
            loss="kl",
            temperature=20.0,
            cutmix=1.0,
            augment="dsa",
            teacher="same",
        ),
        dataclasses.replace(
            _CANONICAL,
            name="dd-ranking",
            num_epochs=1000,
            batch_size=128,
            augment="dsa",
            lr_grid=(0.001, 0.005, 0.01, 0.05, 0.1),
        ),
    )
}

PROTOCOLS: Registry[Protocol] = Registry("protocol", "condense.protocols", _PROTOCOLS, instance_of(Protocol))
"""``canonical``: the published tables without augmentation (Zhao, Mopuri and Bilen, "Dataset Condensation
with Gradient Matching", ICLR 2021). Deviations from the published code: it runs one epoch more, drops the
learning rate a little after half, and loses the momentum there. ``canonical-dsa``: the tables with
augmentation (DSA, DM, MTT); the same with 1000 epochs. ``full-data``: for the whole training set. ``dc``: DC's own
on MNIST, with its augmentation there; on other data its own is ``canonical``. ``frepo``, ``rcig``: regression on the
labels of the set (Zhou et al. 2022, Loo et al. 2023). ``datm``: soft labels and the learned step size (Guo et al.
2024). ``soft-teacher``: a network trained on real data labels every batch (Yin et al. 2023, Sun et al. 2024).
``dd-ranking``: hard labels under DSA, with the learning rate chosen on held-out real images (Li et al. 2024).
Deviations of each: docs/evaluation.md.
"""


def named(name: str, syn: SyntheticSet | None) -> Protocol:
    """The protocol of that name; ``own`` is the one that the set brings along. ``syn`` is None where there are only
    published images, which bring none.

    Raises:
        ValueError: unknown name; ``own`` of a set without a record of its training.
    """
    return own(syn) if name == "own" else fixed(name)


def fixed(name: str) -> Protocol:
    """The protocol of that name that does not depend on a set. Raises ValueError on an unknown name."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: {suggest(name, [*PROTOCOLS, 'own'])}")
    return PROTOCOLS[name]


def own(syn: SyntheticSet | None) -> Protocol:
    """The training that the set was made for: its stored record, its soft labels and its learned step size.

    Raises:
        ValueError: the set has no such record, or one that this version cannot follow.
    """
    record = {} if syn is None else {k: v for k, v in syn.origin.training.items() if k != "network"}
    if syn is None or not record:
        raise ValueError(
            f"the set does not say how it is meant to be trained on: give {spelt('protocol', 'canonical')}"
        )
    if syn.lr is not None:
        record["rates" if syn.lr.dim() else "lr"] = syn.lr.tolist()
    known = {f.name for f in dataclasses.fields(Protocol)} - {"name", "labels", "schedule"} | set(FLAT_NAMES)
    try:
        for name in record.keys() - known:
            raise ValueError(f"it knows no field {brief(name)} of a training")
        return from_json(Protocol, {"name": "own", "labels": "own", **nested(record)}, "training")
    except ValueError as error:
        raise ValueError(
            f"this version cannot train as the set is meant to be trained: {error}; "
            f"give {spelt('protocol', 'canonical')}"
        ) from error


def own_network(syn: SyntheticSet) -> str:
    """The network that the set is meant to train; where its file does not say, the one it was distilled with.

    Raises:
        ValueError: that network has no name, since it was given as a callable.
    """
    name = str(syn.origin.training.get("network", syn.origin.network or "auto"))
    if name.startswith("custom:"):
        raise ValueError(f"the set is meant for {name}, which only its code can build; give the networks to train")
    return name


def recorded_name(protocol: Protocol, syn: SyntheticSet | None = None) -> str:
    """The name that results carry: with a star where a field differs from the protocol that owns the name."""
    if protocol.name == "own" and syn is not None:
        owner = own(syn)
    else:
        owner = PROTOCOLS.get(protocol.name, protocol)
    return protocol.name if protocol == owner else f"{protocol.name}*"


def changes(row: Mapping[str, Any]) -> str:
    """What a result's protocol changes of the one whose name it has, in words; empty of a named one."""
    name = row["protocol"].removesuffix("*")
    if name == row["protocol"] or name not in PROTOCOLS:
        return ""
    usual, fields = json.loads(json.dumps(PROTOCOLS[name].content())), row["protocol_fields"]
    changed = {key: fields[key] for key in fields if fields[key] != usual.get(key)}
    return ", ".join(f"{key} {value}" for key, value in changed.items())

"""Evaluation protocols: named, frozen settings for the training of the networks that are scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from condense.augment import MILD, TAKES, Augment
from condense.data.layout import channel_axis, kind
from condense.eval.calibration import Calibration
from condense.files import canonical_json
from condense.names import spelt, suggest
from condense.networks import InputShape
from condense.objective import OBJECTIVES
from condense.plugins import Registry, instance_of
from condense.schedule import FLAT_NAMES, Schedule, nested
from condense.schema import brief, from_json
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import ViewLabels
from condense.train import Training

STRATEGIES = {
    "frepo": (Augment(MILD), Augment(("flip", *MILD))),
    "rcig": (Augment(MILD[1:], mode="P"), Augment(("flip", *MILD), mode="P", flips=True)),
}
"""The augmentations of Zhou et al. (2022) and Loo et al. (2023), for images of one channel and of several channels.
Series have none. ``frepo`` applies one operation to all images of a batch. ``rcig`` draws an operation for each image,
and adds the mirror images to a set of colour images."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Training):
    """A training with its augmentation and its labels. Networks are scored after the last epoch."""

    name: str
    """Name of the protocol; not part of the hash."""
    augment: str = "none"
    """Augmentation of the images: none, dsa (the strategy of the data set), frepo, rcig, or a strategy such as
    flip_crop. Parameters are drawn for each image."""
    labels: Literal["hard", "own", "teacher"] = "hard"
    """Targets to train on. hard: one class per image (argmax of soft labels). own: the targets of the set. teacher: the
    labels of the set for its views (stored, online or projector); other sets are refused unless teacher is set."""
    steps_for: tuple[tuple[int, int], ...] = ()
    """Pairs (images, steps). The pair nearest to the size of the set gives the number of steps and replaces
    num_epochs."""
    learned_lr: bool = False
    """Use the learned learning rate of the set instead of lr, if the set has one."""
    lr_grid: tuple[float, ...] = ()
    """Candidate learning rates. The one with the best accuracy on held-out real images replaces lr."""
    teacher: str = ""
    """Network that labels each batch: the folder of a buffer, or an architecture that is trained on the real images.
    same: the evaluated architecture; empty: no teacher."""
    calibration: Calibration = "none"
    """Calibration of the trained network on held-out real images before it is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < lr < math.inf for lr in self.lr_grid):
            raise ValueError(f"protocol.lr_grid needs finite learning rates > 0, got {self.lr_grid}; try 0.01 and 0.1")
        if OBJECTIVES[self.loss].needs_teacher and not self.teacher and self.labels != "teacher":
            raise ValueError(
                f"the loss {self.loss} needs a teacher; give {spelt('protocol.teacher', 'same')}, or "
                f"{spelt('protocol.loss', 'cross-entropy')}"
            )
        if not all(min(pair) > 0 for pair in self.steps_for):
            raise ValueError(
                f"protocol.steps_for needs pairs (images, steps) > 0, got {self.steps_for}; try (100, 2000)"
            )

    def augment_for(self, input_shape: InputShape, own: str) -> Augment:
        """Return the augmentation of images of this shape. ``own`` is the strategy of the data set.

        Raises:
            ValueError: ``Augment.parse`` does not know the strategy.
        """
        if self.augment in STRATEGIES:
            if kind(input_shape) not in TAKES:
                return Augment()
            grey, colour = STRATEGIES[self.augment]
            return grey if input_shape[channel_axis(input_shape)] == 1 else colour
        return Augment.parse(self.augment, own=own)

    def resolved(self, num_images: int, lr: Tensor | None = None, copies: int = 1) -> Protocol:
        """Return a copy in which ``steps_for`` and ``learned_lr`` are replaced by the values for one set.

        Args:
            num_images: decoded images of the set.
            lr: learned learning rate of the set, if it has one.
            copies: training images per image of the set; 2 where mirror images are added.
        """
        changes: dict[str, Any] = {}
        if self.steps_for:
            _, steps = min(self.steps_for, key=lambda pair: abs(math.log(pair[0] / num_images)))
            changes |= {"num_epochs": -(-steps // -(-copies * num_images // self.batch_size)), "steps_for": ()}
        if self.learned_lr and lr is not None and not lr.dim():
            changes |= {"lr": lr.item(), "learned_lr": False}
        return dataclasses.replace(self, **changes)

    def view_labels(self, syn: SyntheticSet) -> ViewLabels | None:
        """Return the labels of the views of a set, if networks are trained on them."""
        kind = syn.label_kind
        return kind if isinstance(kind, ViewLabels) and self.labels != "hard" and not self.teacher else None

    @property
    def holds_out(self) -> bool:
        """Whether the protocol needs real images that the set was not made from."""
        return bool(self.lr_grid) or self.calibration != "none"

    def describe(self) -> str:
        """Describe the protocol in one line."""
        length = "steps by size" if self.steps_for else f"{self.num_epochs} epochs"
        lr = "learned" if self.learned_lr else "by validation" if self.lr_grid else f"{self.lr:g}"
        labels = f"by a teacher ({self.teacher})" if self.teacher else self.labels
        return (
            f"{length}, batch {self.batch_size}, {self.optimiser} lr {lr}{self.schedule.describe()}, "
            f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}, {self.loss}, "
            f"augmentation {self.augment}, labels {labels}"
        )

    def content(self) -> dict[str, Any]:
        """Return every field except the name."""
        fields = super().content()
        del fields["name"]
        return fields

    @property
    def hash(self) -> str:
        """The SHA-256 of the content. Only accuracies with the same hash are comparable."""
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

_TAUGHT = dataclasses.replace(
    _CANONICAL,
    batch_size=100,
    optimiser="adamw",
    lr=1e-3,
    weight_decay=0.01,
    schedule=Schedule(cosine_to=0.0, cosine_span=0.5),
    loss="kl",
    temperature=20.0,
    cutmix=1.0,
    augment="dsa",
)

_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _CANONICAL,
        dataclasses.replace(_CANONICAL, name="canonical-dsa", num_epochs=1000, augment="dsa"),
        dataclasses.replace(_CANONICAL, name="full-data", num_epochs=20, batch_size=64),
        dataclasses.replace(
            _CANONICAL, name="graphs", num_epochs=500, batch_size=64, optimiser="adam", lr=0.01, weight_decay=0.0
        ),
        dataclasses.replace(
            _CANONICAL, name="full-graphs", num_epochs=100, batch_size=64, optimiser="adam", lr=0.01, weight_decay=0.0
        ),
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
        dataclasses.replace(_TAUGHT, name="soft-teacher", teacher="same"),
        dataclasses.replace(
            _CANONICAL,
            name="pruned",
            num_epochs=50,
            batch_size=64,
            loss="distillation",
            temperature=4.0,
            teacher_weight=0.9,
            teacher="same",
        ),
        dataclasses.replace(_TAUGHT, name="relabelled", labels="teacher"),
        dataclasses.replace(
            _CANONICAL,
            name="mse-teacher",
            num_epochs=1000,
            batch_size=100,
            optimiser="adamw",
            lr=1e-3,
            weight_decay=1e-4,
            schedule=Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2),
            loss="mse",
            augment="dsa",
            labels="teacher",
        ),
        dataclasses.replace(
            _TAUGHT,
            name="gift",
            weight_decay=1e-4,
            loss="gift",
            temperature=1.0,
            label_smoothing=0.1,
            labels="teacher",
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
"""``canonical``: the published tables without augmentation (Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient
Matching", ICLR 2021). The published code differs: it runs one more epoch, drops the learning rate a little after
half of the epochs, and resets the momentum there. ``canonical-dsa``: the same for 1000 epochs with DSA, for the
tables of DSA, DM and MTT. ``full-data``: for the whole training set. ``graphs`` and ``full-graphs``: the same for
graphs, with Adam. ``dc``: the protocol of DC on MNIST, with its augmentation; on other data DC uses ``canonical``.
``frepo``, ``rcig``: regression on the labels of the set (Zhou et al. 2022, Loo et al. 2023). ``datm``: soft labels
and the learned learning rate (Guo et al. 2024). ``soft-teacher``: a network trained on real data labels every batch
(Yin et al. 2023, Sun et al. 2024). ``relabelled``: the same with the labels that the set has for its views.
``mse-teacher``: squared error to the logits of a teacher, as CIM is evaluated. ``gift``: cosine loss to a teacher's
logits that the class corrects. ``pruned``: classes and a teacher of all training images, for parts of these (Ben-Baruch
et al. 2025). ``dd-ranking``: hard labels under DSA, with the learning rate chosen on held-out real images (Li et al.
2024). docs/evaluation.md lists the deviations.
"""


def named(name: str, syn: SyntheticSet | None) -> Protocol:
    """Return the protocol of that name; ``own`` is the one that is stored with the set.

    Args:
        name: a name in ``PROTOCOLS``, or ``own``.
        syn: the set; None for published images, which store no protocol.

    Raises:
        ValueError: unknown name; ``own`` of a set that stores no protocol.
    """
    return own(syn) if name == "own" else fixed(name, "own")


def fixed(name: str, *others: str) -> Protocol:
    """Return the protocol of that name in ``PROTOCOLS``. Raises ValueError if the name is unknown; the message suggests
    the names of ``others`` too."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: {suggest(name, [*PROTOCOLS, *others])}")
    return PROTOCOLS[name]


def own(syn: SyntheticSet | None, fix: str = "") -> Protocol:
    """Return the training that the set was made for: its stored record, its targets and its learned learning rate.

    Raises:
        ValueError: the set has no such record, or this version cannot train that way. The message ends with ``fix``,
            by default the advice to give another protocol.
    """
    fix = fix or f"give {spelt('protocol', 'canonical')}"
    record = {} if syn is None else {k: v for k, v in syn.origin.training.items() if k != "network"}
    if syn is None or not record:
        raise ValueError(f"the set stores no training of its own; {fix}")
    if syn.lr is not None:
        record["rates" if syn.lr.dim() else "lr"] = syn.lr.tolist()
    known = {f.name for f in dataclasses.fields(Protocol)} - {"name", "labels", "schedule"} | set(FLAT_NAMES)
    try:
        for name in record.keys() - known:
            raise ValueError(f"a training has no field {brief(name)}")
        return from_json(Protocol, {"name": "own", "labels": "own", **nested(record)}, "training")
    except ValueError as error:
        raise ValueError(
            f"this version cannot follow the training that is stored with the set: {error}; {fix}"
        ) from error


def own_network(syn: SyntheticSet) -> str:
    """Return the network that the set was made for; if its file names none, the network it was distilled with.

    Raises:
        ValueError: the network was given as a callable, so it has no name.
    """
    name = str(syn.origin.training.get("network", syn.origin.network or "auto"))
    if name.startswith("custom:"):
        raise ValueError(f"the set was made for {name}, a network given as a callable; give the networks to train")
    return name


def changed(protocol: Protocol, syn: SyntheticSet | None = None) -> dict[str, Any]:
    """Return the fields in which a protocol differs from the one of its name, also those set back to their default;
    those of its schedule are nested."""
    owner = own(syn) if protocol.name == "own" and syn is not None else PROTOCOLS.get(protocol.name, protocol)
    return _difference(dataclasses.asdict(protocol), dataclasses.asdict(owner))


def _difference(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: (value, others[name]) for name, value in fields.items() if value != others[name]}
    return {
        name: _difference(value, other) if isinstance(value, Mapping) else value
        for name, (value, other) in both.items()
    }


def require_effect(protocol: Protocol, syn: SyntheticSet | None) -> None:
    """Raise ValueError if a changed field of a protocol has no effect, because another one takes its place."""
    rate = None if syn is None else syn.lr
    replaced = {
        "num_epochs": {"steps_for": ()} if protocol.steps_for else {},
        "lr": {"schedule.lr_per_step": ()}
        if protocol.schedule.lr_per_step
        else {"lr_grid": ()}
        if protocol.lr_grid
        else {"learned_lr": False}
        if protocol.learned_lr and rate is not None and not rate.dim()
        else {},
        "lr_grid": {"schedule.lr_per_step": ()} if protocol.schedule.lr_per_step else {},
    }
    kind = None if syn is None else protocol.view_labels(syn)
    fixed = {} if kind is None else kind.training()
    for name in changed(protocol, syn):
        if name in fixed and getattr(protocol, name) != fixed[name]:
            raise ValueError(
                f"protocol.{name} has no effect, because the set stores labels of its own views; leave it out, or "
                "label the set anew with `condense relabel`"
            )
        for other, off in replaced.get(name, {}).items():
            raise ValueError(
                f"protocol.{name} has no effect, because the protocol {protocol.name} takes {other} instead; leave it "
                f"out, or give {spelt(f'protocol.{other}', off)} too"
            )


def recorded_name(protocol: Protocol, syn: SyntheticSet | None = None) -> str:
    """Return the name for results: with a star if a field differs from the protocol of that name."""
    return f"{protocol.name}*" if changed(protocol, syn) else protocol.name


def changed_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields in which a result's protocol differs from the named one; nothing if it has no star. Rows of
    earlier versions lack those that were set back to their default, and all changes of ``own``."""
    name = row["protocol"].removesuffix("*")
    if row.get("changed") or name == row["protocol"] or name not in PROTOCOLS:
        return dict(row.get("changed", {}))
    original, fields = json.loads(json.dumps(PROTOCOLS[name].content())), row["protocol_fields"]
    return {key: value for key, value in fields.items() if value != original.get(key)}

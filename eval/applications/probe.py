"""Linear probes: linear classifiers on the features of frozen networks, trained on a set.

Cazenavette, Torralba and Sitzmann, "Dataset Distillation for Pre-Trained Self-Supervised Vision Models", NeurIPS 2025.
The frozen network, the backbone, computes the features of the views of each epoch, and only the classifier learns. The
same is done with as many random real images, with the real images of each class whose features are nearest to the mean
of the class and, if asked for, with all real images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condense.artifacts import MANIFEST
from condense.augment import Augment
from condense.data.images import Images
from condense.data.layout import Kind
from condense.eval.applications.application import Application, Findings, Setting, mean_and_spread, numbers_of
from condense.eval.evaluate import resolved
from condense.eval.protocol import own
from condense.eval.subject import Subject
from condense.files import expanded
from condense.labelling import NamedTeacher, open_teacher
from condense.names import spelt
from condense.networks import Functional
from condense.probe import linear_classifier
from condense.rng import Rng
from condense.schedule import Schedule
from condense.sources import Embedded
from condense.synthetic.set import SyntheticSet
from condense.teachers import embedded
from condense.tracking import counted
from condense.train import Scorer, Trainer, Training

BATCH = 100
"""Batch size of a training, at most."""


@dataclass(frozen=True, kw_only=True)
class Probe(Application):
    """Probe: train linear classifiers on the features of frozen networks with the images of a set."""

    takes_baselines: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")

    backbones: tuple[str, ...] = ("artifacts",)
    """Folders of buffers with the frozen networks. In a folder of several buffers the one that the set was distilled
    with is taken."""
    num_epochs: int = 1000
    """Number of epochs of a training on the set, and on as many real images."""
    full_epochs: int = 0
    """Number of epochs of a training on all real images; 0: none."""
    lr: float = 1e-3
    """Learning rate of Adam at a batch size of 256, in proportion to the batch size, with cosine annealing to 0."""
    augment: str | None = None
    """Augmentation of the training: none, dsa (that of the data set) or a strategy; unset: the one recorded with the
    set."""
    num_seeds: int = 3
    """Number of classifiers, each with its own initialisation, views and random images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_epochs, self.num_seeds) < 1 or self.full_epochs < 0 or not self.lr > 0:
            raise ValueError(
                "num_epochs and num_seeds must be at least 1, full_epochs at least 0 and lr positive; leave them at "
                "their defaults"
            )
        if not self.backbones:
            raise ValueError(f"probe needs the folder of a frozen network; give {spelt('backbones', ('artifacts',))}")
        if self.augment is not None:
            Augment.parse(self.augment)

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        super().check(syn, baselines)
        if self.augment is None:
            own(syn, f"give {spelt('augment', 'none')}")

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        accuracies: dict[str, dict[str, list[float]]] = {}
        opened = [backbone(subject, expanded(path)) for path in self.backbones]
        if len({one.name for one in opened}) < len(opened):
            raise ValueError("two of the backbones are one buffer; give each once")
        for one in opened:
            for name, accuracy in self._accuracies(setting, one):
                accuracies.setdefault(name, {}).setdefault(one.name, []).append(accuracy)
        cells = [
            (name, *(mean_and_spread(torch.tensor(values)) for values in of.values()))
            for name, of in accuracies.items()
        ]
        numbers = {name: {key: numbers_of(values) for key, values in of.items()} for name, of in accuracies.items()}
        return Findings(
            ("trained on", *(one.network for one in opened)),
            cells,
            f"test accuracy of linear probes, %: {len(subject.decoded(soft=False)[1])} {setting.kind} of "
            f"{subject.arrays.name}, n = {self.num_seeds} classifiers",
            {"backbones": {one.name: one.network for one in opened}, "probes": numbers},
        )

    def _accuracies(self, setting: Setting, backbone: NamedTeacher) -> Iterator[tuple[str, float]]:
        """Yield accuracies on the features of a backbone, each with what was trained on, one seed after the other."""
        subject, embed = setting.subject, backbone.teacher.embedder(setting.compute)
        images, labels = subject.decoded(soft=False)
        train, test = subject.train, subject.test
        counts = labels.bincount(minlength=subject.arrays.num_classes).tolist()
        nearest = nearest_to_means(embedded(embed, train.images), train.by_class, counts)
        seen = embedded(embed, test.images)[:, None]
        width, own_name = seen.shape[-1], subject.syn.origin.method or "set"
        head = Functional(linear_classifier, (1, width), subject.arrays.num_classes, subject.device)

        def accuracy(images: Tensor | Images, labels: Tensor, num_epochs: int, rng: Rng) -> float:
            plan = self._plan(len(labels), num_epochs)
            compute = resolved(setting.compute, head, plan, len(labels))
            trainer = Trainer(head, plan, compute)
            source = trainer.source(images, labels, rng.child("training"), self._augment(subject))
            weights = trainer.run(head.init(rng, "weights"), Embedded(source, embed))
            return Scorer(head, compute).accuracy(weights, seen, test.labels)

        for seed in counted("probe", range(self.num_seeds)):
            rng = setting.rng("probe", seed)
            yield own_name, accuracy(images, labels, self.num_epochs, rng)
            random = [train.draw(c, num, rng("random images", 0, c)) for c, num in enumerate(counts)]
            drawn = [label for label, part in enumerate(random) for _ in part]
            of_random = torch.tensor(drawn, device=subject.device)
            yield f"{len(drawn)} random {setting.kind}", accuracy(torch.cat(random), of_random, self.num_epochs, rng)
            near = train.images[nearest], train.labels[nearest]
            yield f"{len(nearest)} {setting.kind} nearest to the class means", accuracy(*near, self.num_epochs, rng)
            if self.full_epochs:
                yield f"all {len(train)} {setting.kind}", accuracy(train.images, train.labels, self.full_epochs, rng)

    def _plan(self, num_images: int, num_epochs: int) -> Training:
        size = min(BATCH, num_images)
        return Training(
            num_epochs=num_epochs,
            batch_size=size,
            optimiser="adam",
            lr=self.lr * size / 256,
            weight_decay=0.0,
            schedule=Schedule(cosine_to=0.0),
        )

    def _augment(self, subject: Subject) -> Augment:
        if self.augment is None:
            return own(subject.syn).augment_for(subject.arrays.input_shape, subject.arrays.strategy)
        return Augment.parse(self.augment, own=subject.arrays.strategy)


def backbone(subject: Subject, path: Path) -> NamedTeacher:
    """Open the buffer of a frozen network: ``path``, the one in it that the set was distilled with, or the only one in
    it that belongs to the data, split and transform of the set.

    Raises:
        ValueError: there is no such buffer, or it is damaged.
    """
    origin = subject.syn.origin
    named = [path / str(entry["name"]) for entry in origin.artifacts if "name" in entry]
    found = [folder for folder in named if (folder / MANIFEST).is_file()]
    return open_teacher(found[0] if found else path, origin, subject.device, "backbones", features_only=True)


def nearest_to_means(features: Tensor, by_class: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the indices of the images of each class whose features are nearest to the mean of the class.

    Args:
        features: (N, F).
        by_class: the indices of the images of each class.
        counts: the number of images to take of each class; all of them if it has fewer.
    """
    chosen = []
    for members, num in zip(by_class, counts, strict=True):
        of_class = features[members.to(features.device)]
        distances = (of_class - of_class.mean(0)).norm(dim=1)
        chosen.append(members[distances.argsort(stable=True)[:num].to(members.device)])
    return torch.cat(chosen)

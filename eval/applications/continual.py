"""Class-incremental learning from a memory of synthetic images.

Prabhu et al., "GDumb: a simple approach that questions our progress in continual learning", ECCV 2020, as used for
condensed sets by Zhao and Bilen (DM, WACV 2023). Classes arrive in groups. After each group a fresh network is trained
on the synthetic images of all classes seen so far, and scored on the test images of these classes.

Deviation: the set is distilled once, from all classes, and its images of a class are used from the arrival of that
class. This makes no difference for methods that distil each class separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condense.eval.applications.application import (
    Application,
    Findings,
    Setting,
    mean_and_spread,
    protocol_of_classes,
)
from condense.names import spelt
from condense.networks import parse, resolve
from condense.synthetic.set import SyntheticSet
from condense.tracking import counted


@dataclass(frozen=True, kw_only=True)
class Continual(Application):
    """Class-incremental learning: networks are trained on the synthetic images of the classes seen so far."""

    num_groups: int = 5
    """Number of groups in which the classes arrive."""
    num_seeds: int = 3
    """Number of random class orders; for each, a fresh network is trained after every group."""
    network: str = "auto"
    """Architecture of the networks; auto is the ConvNet for the kind of data."""
    protocol: str = "canonical"
    """Protocol under which the networks are trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups < 1 or self.num_seeds < 1:
            raise ValueError("num_groups and num_seeds must be at least 1; leave them at their defaults")
        parse(self.network)
        protocol_of_classes(self.protocol)

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        resolve(self.network, syn.origin.input_shape)
        num_classes = syn.origin.num_classes
        if self.num_groups > num_classes:
            raise ValueError(
                f"{num_classes} classes cannot arrive in {self.num_groups} groups; "
                f"give {spelt('num_groups', num_classes)}"
            )

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        num_classes, test = subject.arrays.num_classes, subject.test
        plan, network = protocol_of_classes(self.protocol), subject.network(self.network)
        memories = setting.to_train_on(baselines)
        of_memories = {f"set {name}": memory.classes for name, memory in memories.items()}
        for where, labels in {"test split": test.labels, **of_memories}.items():
            if missing := (labels.bincount(minlength=num_classes) == 0).nonzero().flatten().tolist():
                raise ValueError(
                    f"the class {subject.arrays.classes[missing[0]]!r} has no sample in the {where}, and its arrival "
                    "cannot be measured; give a set and data with samples of every class"
                )
        accuracies = {name: torch.empty(self.num_groups, self.num_seeds) for name in memories}
        for name, (images, labels, weights) in memories.items():
            scorer = setting.scorer(network, plan, len(images))
            for seed in counted(name, range(self.num_seeds)):
                rng = setting.rng("continual", seed)
                order = rng("classes").permutation(num_classes)
                for group, seen in enumerate(_seen(order, self.num_groups)):
                    remembered = torch.isin(labels, seen.to(labels.device))
                    tested = torch.isin(test.labels, seen.to(labels.device)).nonzero().flatten()
                    (scores,) = scorer.score(
                        images[remembered],
                        labels[remembered],
                        test.images[tested],
                        test.labels[tested],
                        [rng.child("network", group)],
                        weights=None if weights is None else weights[remembered],
                    )
                    accuracies[name][group, seed] = scores.accuracy
        sizes = [len(seen) for seen in _seen(torch.arange(num_classes), self.num_groups)]
        rows = [(name, *(mean_and_spread(row) for row in of_set)) for name, of_set in accuracies.items()]
        return Findings(
            ("memory", *(f"{size} classes" for size in sizes)),
            rows,
            f"test accuracy on the classes seen so far, %: {subject.syn.ipc} {setting.kind} per class, "
            f"{self.protocol}, n = {self.num_seeds} class orders",
            {"classes_seen": sizes, "accuracies": {name: of_set.tolist() for name, of_set in accuracies.items()}},
        )


def _seen(order: Tensor, num_groups: int) -> list[Tensor]:
    """Return the classes seen after each group."""
    ends = [round(len(order) * (group + 1) / num_groups) for group in range(num_groups)]
    return [order[:end] for end in ends]

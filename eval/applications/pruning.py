"""Data pruning with knowledge distillation: accuracy against the share of the training images that is kept.

Ben-Baruch, Botach, Kviatkovsky, Aggarwal and Medioni, "Distilling the knowledge in data pruning", ICML 2025. Networks
are trained on the images that a selection method keeps, once on their classes alone and once with a teacher, a network
that was trained on all training images, towards

    alpha T^2 KL(teacher at T || network at T) + (1 - alpha) cross-entropy

    symbol   code                           symbol   code
    alpha    ``teacher_weight``             T        ``temperature``

both fields of the protocol, ``pruned`` by default. The paper finds random images with a teacher at least as good as
selected ones. Written from its abstract and from descriptions; the factor T^2 and all values are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from condense import tracking
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval import teachers
from condense.eval.applications.application import Findings
from condense.eval.evaluate import Progress, measure
from condense.eval.journal import CachedCells, Cell, CellStore
from condense.eval.protocol import PROTOCOLS, Protocol, recorded_name
from condense.eval.results import Result
from condense.eval.subject import load_test
from condense.files import checksum
from condense.names import percent, spelt
from condense.networks import parse
from condense.schema import Checked
from condense.sources import Relabelled, Source
from condense.task import Task
from condense.teachers import Teacher
from condense.train import Scorer

Select = Callable[[str, float], Tensor]
"""``select(method, fraction)``: the indices of the training images of the task that a method keeps."""


@dataclass(frozen=True, kw_only=True)
class Pruning(Checked):
    """Accuracy against the share of the training images that selection methods keep, with and without a teacher."""

    fractions: tuple[float, ...] = (0.1, 0.3, 0.6)
    """Shares of the training images of each class."""
    methods: tuple[str, ...] = ("random", "el2n", "forgetting", "ccs", "dq")
    """Methods or recipes that select real images."""
    network: str = "auto"
    """Architecture of the networks; auto is the ConvNet for the kind of data."""
    num_seeds: int = 3
    """Number of networks trained for each accuracy."""
    protocol: Protocol = PROTOCOLS["pruned"]
    """Protocol of the networks with a teacher; without one, the loss is the cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.network)
        for name in ("fractions", "methods"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{spelt(name, getattr(self, name))} has a value twice; give each once")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(
                f"fractions must be above 0 and at most 1, got {self.fractions}; give {spelt('fractions', (0.1, 0.3))}"
            )
        if not self.methods:
            raise ValueError(f"there is nothing to compare; give {spelt('methods', ('random', 'el2n'))}")
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}; give {spelt('num_seeds', 3)}")

    def check(self) -> None:
        """Raise ValueError if the protocol has no teacher, or needs held-out images."""
        if not self.protocol.teacher or self.protocol.holds_out:
            raise ValueError(
                f"the protocol {self.protocol.name} has no teacher, or needs held-out images, of which there are none; "
                f"give {spelt('protocol', 'pruned')}"
            )

    @property
    def untaught(self) -> Protocol:
        """The protocol without the teacher."""
        return dataclasses.replace(
            self.protocol, loss="cross-entropy", teacher="", temperature=1.0, teacher_weight=Protocol.teacher_weight
        )

    def run(
        self,
        task: Task,
        arrays: Arrays,
        select: Select,
        *,
        seed: int,
        compute: Compute,
        cache: Path | None,
        named: Mapping[str, Teacher],
        progress: Progress = tracking.progress,
    ) -> Findings:
        """Train and score the networks. Those that the cache holds are not trained again.

        Args:
            task: all training images, with the evaluated network.
            arrays: the data set of the task.
            select: selects the images to keep.
            seed: root of every random draw.
            compute: compute policy.
            cache: the cache folder; None: nothing is stored.
            named: teachers that exist already, by their name in the protocol.
            progress: shows a bar for each accuracy.

        Raises:
            ValueError: there are no test images.
        """
        test = load_test(arrays, task.transform, task.device)
        teacher = named.get(self.protocol.teacher)
        if teacher is None:
            labeller = task if self.protocol.teacher == "same" else task.with_network(self.protocol.teacher)
            teacher = teachers.trained(labeller, seed=seed, compute=compute, cache=cache)
        labels = teacher.labeller(compute)

        def label(source: Source) -> Source:
            return Relabelled(source, labels, self.protocol.objective)

        def score(protocol: Protocol, index: Tensor) -> Result:
            part = task.train.subset(index)
            (result,) = measure(
                part.images,
                part.labels,
                test,
                arrays=arrays,
                transform=task.transform,
                syn=None,
                networks=[task.network],
                protocol=protocol,
                num_seeds=self.num_seeds,
                seed=seed,
                compute=compute,
                progress=progress,
                journal=_OfSubset(CachedCells(cache), checksum({"index": index.cpu()})),
                labels={task.network.name: label} if protocol.teacher else None,
            )
            return result

        of_teacher = Scorer(teacher.network, compute).accuracy(teacher.weights, test.images, test.labels)
        rows, lines = list[dict[str, Any]](), list[tuple[str, ...]]()
        for method in self.methods:
            kept = {fraction: select(method, fraction) for fraction in self.fractions}
            for protocol in (self.untaught, self.protocol):
                taught = bool(protocol.teacher)
                results = {fraction: score(protocol, index) for fraction, index in kept.items()}
                rows += [_record(method, fraction, taught, result) for fraction, result in results.items()]
                lines.append((method, "yes" if taught else "no", *map(_cell, results.values())))
        return Findings(
            ("images kept by", "teacher", *(f"{100 * fraction:g} %" for fraction in self.fractions)),
            lines,
            f"test accuracy by the share of the training images, %: {task.network.name} on {arrays.name}, "
            f"{recorded_name(self.protocol)}, n = {self.num_seeds} networks on one selection; teacher: "
            f"{100 * of_teacher:.1f}",
            {"protocol_fields": self.protocol.content(), "accuracy_of_teacher": of_teacher, "accuracies": rows},
        )

    def figure(self, findings: Findings) -> str:
        """Draw the accuracies as the text of an SVG file."""
        from condense.eval.report import figures

        rows = findings.record["accuracies"]
        curves = [
            figures.Curve(
                method=method,
                taught=taught,
                shares=[row["fraction"] for row in of_curve],
                means=[row["mean"] for row in of_curve],
                stds=[row["std"] for row in of_curve],
            )
            for method in self.methods
            for taught in (True, False)
            if (of_curve := [row for row in rows if (row["method"], row["teacher"]) == (method, taught)])
        ]
        svg = figures.accuracy_against_share(
            findings.title, curves, ("the teacher", findings.record["accuracy_of_teacher"])
        )
        return figures.standalone(svg)


PRUNING = Pruning()


def _record(method: str, fraction: float, taught: bool, result: Result) -> dict[str, Any]:
    """Return an accuracy for JSON."""
    fields = ("mean", "std", "accuracies", "num_images", "network", "protocol", "protocol_hash", "device", "threads")
    row = result.row()
    return {"method": method, "fraction": fraction, "teacher": taught} | {name: row[name] for name in fields}


def _cell(result: Result) -> str:
    return percent(result.mean, result.std)


@dataclass(frozen=True)
class _OfSubset:
    """A store of networks that are trained on a part of the training images."""

    store: CellStore
    subset: str

    def find(self, provenance: Mapping[str, Any], num_networks: int) -> dict[int, Cell]:
        return self.store.find({**provenance, "subset": self.subset}, num_networks)

    def add(self, provenance: Mapping[str, Any], k: int, cell: Cell) -> None:
        self.store.add({**provenance, "subset": self.subset}, k, cell)

"""Transfer learning: networks are pre-trained on a set without classes, and used on labelled data of other classes.

Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024. A network is trained towards the
targets of the set, which are features of a teacher. On each target data set its last layer is replaced, once by a
linear probe of its features and once by a new layer with which the whole network is fine-tuned. The same is done from
random weights, from as many random real images with the teacher's features as targets and, if asked for, from all real
images. Everything is scored on the test images of the target data.

Deviation: the linear probe is a ridge regression on standardised features (``condense.probe``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condense.artifacts import MANIFEST, open_buffer
from condense.augment import Augment
from condense.data.datasets import Arrays, open_data
from condense.data.images import Images
from condense.eval.applications.application import Application, Findings, Setting, mean_and_spread, numbers_of
from condense.eval.evaluate import resolved
from condense.eval.protocol import own, own_network
from condense.eval.subject import Subject, decoded, load_test
from condense.files import expanded
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.probe import ridge_probe
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled
from condense.teachers import Teacher, embedded
from condense.tracking import counted
from condense.train import Scorer, Trainer, Training

BATCH = 256
"""Batch size of fine-tuning."""
RANDOM_WEIGHTS = "random weights"


@dataclass(frozen=True, kw_only=True)
class Transfer(Application):
    """Transfer: pre-train networks on a set without classes, then probe and fine-tune them on labelled data."""

    needs_classes: ClassVar[bool] = False
    takes_baselines: ClassVar[bool] = False

    to: tuple[str, ...] = ()
    """Labelled data sets to transfer to: names or paths, of samples of the same shape as those of the set."""
    buffers: str = "artifacts"
    """Folder with the buffer of the teacher, whose features are the targets of real images."""
    num_epochs: int | None = None
    """Number of epochs of pre-training on the set; unset: as many as the set records."""
    full_steps: int = 0
    """Number of steps of a pre-training on all real images of the source, rounded up to whole epochs; 0: none."""
    tune_steps: int = 5000
    """Number of steps of fine-tuning, rounded up to whole epochs."""
    tune_lr: float = 0.01
    """Learning rate of fine-tuning, with cosine annealing to 0."""
    augment: str = "dsa"
    """Augmentation of fine-tuning: none, dsa (that of the target data) or a strategy."""
    max_train: int = 50_000
    """Largest number of labelled training images of a target; the same random sample for all networks."""
    num_seeds: int = 3
    """Number of networks, each with its own initialisation and its own random images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tune_steps, self.max_train, self.num_seeds, 1 if self.num_epochs is None else self.num_epochs) < 1:
            raise ValueError(
                "num_epochs, tune_steps, max_train and num_seeds must be at least 1; leave them at their defaults"
            )
        if self.full_steps < 0 or not self.tune_lr > 0:
            raise ValueError(
                f"full_steps must be at least 0 and tune_lr positive, got {self.full_steps} and {self.tune_lr}; give "
                f"{spelt('tune_lr', 0.01)}"
            )
        Augment.parse(self.augment)

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        if syn.origin.num_classes:
            raise ValueError(
                "transfer is for sets whose targets are features of a teacher, and this one has classes; "
                "`condense evaluate` measures it"
            )
        super().check(syn, baselines)
        if not self.to:
            raise ValueError(f"transfer needs labelled data sets; give {spelt('to', ('cifar10',))}")
        own(syn)
        own_network(syn)

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        teacher = teacher_of(subject, expanded(self.buffers))
        opened = [_target(setting, name, self.max_train) for name in self.to]
        targets = {target.arrays.name: target for target in opened}
        if len(targets) < len(opened):
            raise ValueError("two of the target data sets have one name; give each once, in files of different names")
        accuracies: dict[str, dict[str, dict[str, list[float]]]] = {}
        for start, weights in self._starts(setting, teacher):
            for name, target in targets.items():
                of_target = accuracies.setdefault(start, {}).setdefault(name, {"probe": [], "tuned": []})
                seed = len(of_target["probe"])
                of_target["probe"].append(self._probe(setting, weights, target))
                of_target["tuned"].append(self._tuned(setting, weights, target, setting.rng(f"transfer/{name}", seed)))
        numbers = {
            start: {
                name: {use: numbers_of(values) for use, values in of_target.items()}
                for name, of_target in of_start.items()
            }
            for start, of_start in accuracies.items()
        }
        cells = [
            (start, *(mean_and_spread(torch.tensor(v)) for of in of_start.values() for v in of.values()))
            for start, of_start in accuracies.items()
        ]
        return Findings(
            ("pre-trained on", *(f"{name}, {use}" for name in targets for use in ("probe", "tuned"))),
            cells,
            f"test accuracy on the target data, %: {len(subject.syn)} {setting.kind} of {subject.arrays.name}, "
            f"{own_network(subject.syn)}, n = {self.num_seeds} networks",
            {"teacher": teacher.network.name, "transfers": numbers},
            "" if self.full_steps else self._left_out(setting),
        )

    def _left_out(self, setting: Setting) -> str:
        subject, plan = setting.subject, own(setting.subject.syn)
        steps = (self.num_epochs or plan.num_epochs) * -(-len(subject.syn) // plan.batch_size)
        return (
            f"left out: networks pre-trained on all {len(subject.train)} {setting.kind} of {subject.arrays.name}; "
            f"{spelt('full_steps', steps)} adds them, with as many steps as on the set"
        )

    def _starts(self, setting: Setting, teacher: Teacher) -> Iterator[tuple[str, Weights]]:
        """Yield pre-trained weights with the name of what they were trained on, one seed after the other."""
        subject, plan = setting.subject, own(setting.subject.syn)
        plan = plan if self.num_epochs is None else dataclasses.replace(plan, num_epochs=self.num_epochs)
        origin = subject.syn.origin
        network = Functional(own_network(subject.syn), origin.input_shape, origin.target_width, subject.device)
        compute = resolved(setting.compute, network, plan, len(subject.syn))
        embed = teacher.embedder(compute)
        images, values = (tensor.to(subject.device) for tensor in decoded(subject.syn, soft=True))

        def trained(images: Tensor | Images, targets: Tensor, plan: Training, rng: Rng) -> Weights:
            trainer = Trainer(network, plan, compute)
            return trainer.run(network.init(rng, "weights"), trainer.source(images, targets, rng.child("training")))

        own_name = origin.method or "set"
        all_images = subject.train.images if self.full_steps else None
        of_all = None if all_images is None else embedded(embed, all_images)
        for seed in counted("transfer", range(self.num_seeds)):
            rng = setting.rng("pre-training", seed)
            yield own_name, trained(images, values, plan, rng)
            real, _ = subject.train.sample(len(images), rng("random images"))
            yield f"{len(images)} random {setting.kind}", trained(real, embedded(embed, real), plan, rng)
            if all_images is not None and of_all is not None:
                epochs = -(-self.full_steps // -(-len(all_images) // plan.batch_size))
                longer = dataclasses.replace(plan, num_epochs=epochs)
                yield f"all {len(all_images)} {setting.kind}", trained(all_images, of_all, longer, rng)
            yield RANDOM_WEIGHTS, network.init(rng, "weights")

    def _probe(self, setting: Setting, weights: Weights, target: _Target) -> float:
        """Return the accuracy of a linear probe."""
        network = _network(setting.subject, setting.subject.syn.origin.target_width)
        embed = Teacher(network, weights).embedder(setting.compute)
        train, test = target.train, target.test
        predict = ridge_probe(embedded(embed, train.images), train.labels, target.arrays.num_classes)
        return (predict(embedded(embed, test.images)) == test.labels).float().mean().item()

    def _tuned(self, setting: Setting, weights: Weights, target: _Target, rng: Rng) -> float:
        """Return the accuracy of the network with a new last layer after fine-tuning."""
        network = _network(setting.subject, target.arrays.num_classes)
        train = target.train
        plan = Training(
            num_epochs=-(-self.tune_steps // -(-len(train) // BATCH)),
            batch_size=BATCH,
            lr=self.tune_lr,
            schedule=Schedule(cosine_to=0.0),
        )
        compute = resolved(setting.compute, network, plan, len(train))
        fresh = network.init(rng, "last layer").params
        kept = {name: param for name, param in weights.params.items() if not name.startswith("classifier.")}
        trainer = Trainer(network, plan, compute)
        augment = Augment.parse(self.augment, own=target.arrays.strategy)
        source = trainer.source(train.images, train.labels, rng.child("fine-tuning"), augment)
        tuned = trainer.run(Weights({**fresh, **kept}, weights.buffers), source)
        return Scorer(network, compute).accuracy(tuned, target.test.images, target.test.labels)


@dataclass(frozen=True)
class _Target:
    """A labelled data set in the space of the transform of the set."""

    arrays: Arrays
    train: Labelled
    test: Labelled


def _target(setting: Setting, name: str, max_train: int) -> _Target:
    """Open a target. Raises ValueError if its samples have another shape than those of the set."""
    subject, arrays = setting.subject, open_data(name, setting.download)
    shape = subject.arrays.input_shape
    if arrays.input_shape != shape:
        raise ValueError(
            f"the samples of {arrays.name} have shape {arrays.input_shape}, not {shape} as those of the set; "
            f"give {spelt('to')} data of this shape"
        )
    labels = torch.from_numpy(arrays.y_train).to(subject.device)
    train = Labelled(Images.of(arrays.x_train, subject.device).with_transform(subject.transform), labels)
    if len(train) > max_train:
        index = setting.rng("transfer")("target images").subset(len(train), max_train)
        train = train.subset(index.to(subject.device))
    return _Target(arrays, train, load_test(arrays, subject.transform, subject.device))


def teacher_of(subject: Subject, buffers: Path) -> Teacher:
    """Open the teacher whose features are the targets of a set, from ``buffers`` or a folder in it.

    Raises:
        ValueError: it is not there, or its buffer is damaged.
    """
    names = [str(entry["name"]) for entry in subject.syn.origin.artifacts if "name" in entry]
    folders = [folder for name in names for folder in (buffers, buffers / name) if folder.resolve().name == name]
    found = [folder for folder in folders if (folder / MANIFEST).is_file()]
    if not found:
        raise ValueError(
            f"the teacher of the set, {' or '.join(names) or 'which it does not name'}, is not in {buffers}; give the "
            f"folder with {spelt('buffers')}"
        )
    buffer = open_buffer(found[0])
    network = subject.network(buffer.manifest["identity"]["network"])
    return Teacher(network, buffer.weights(0, network))


def _network(subject: Subject, num_outputs: int) -> Functional:
    return Functional(own_network(subject.syn), subject.arrays.input_shape, num_outputs, subject.device)

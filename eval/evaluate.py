"""Train fresh networks on a labelled set, for each architecture and seed, and score them on test images."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense import __version__, tracking
from condense.augment import Augment
from condense.compute import Compute, device_name, forget_peak, peak_memory
from condense.data.datasets import Arrays
from condense.data.images import Images
from condense.data.transform import Transform
from condense.distributed import Ranks
from condense.eval import kept, teachers
from condense.eval.calibration import Calibration, temperature
from condense.eval.journal import Cell, CellStore
from condense.eval.metrics import Scores
from condense.eval.protocol import PROTOCOLS, STRATEGIES, Protocol, changed, recorded_name, require_effect
from condense.eval.results import Evaluation, Result, Scored
from condense.eval.subject import Subject, decoded, require_held_out
from condense.files import checksum
from condense.kernels import centred
from condense.labelling import NamedTeacher
from condense.names import spelt
from condense.networks import Factory, Functional, Weights, parse, resolve
from condense.objective import Objective
from condense.plugins import code_of
from condense.rng import VERSION, Rng
from condense.sources import Examples, Relabelled, Source
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled, Task, make_task
from condense.teachers import Teacher
from condense.tracking import Bar
from condense.train import Scorer, Trainer, Training

BRIEF = dataclasses.replace(PROTOCOLS["canonical"], name="brief", num_epochs=100)
"""Protocol of the evaluations on the validation split during distillation."""
_BRIEF_REGRESSION = dataclasses.replace(BRIEF, loss="mse", optimiser="adam", lr=3e-4, weight_decay=0.0)
"""The same for labels that are regression targets."""


OnEpoch = Callable[[int, Weights], None]
"""See ``Trainer.run``."""


Label = Callable[[Examples], Source]
"""Turns the batches of a set into those that networks are trained on, with labels of a teacher."""


class SetScorer:
    """Trains networks of one architecture and scores each after its last epoch; compiles only once."""

    def __init__(
        self,
        network: Functional,
        plan: Training,
        compute: Compute,
        augment: Augment = Augment(),
        label: Label | None = None,
    ) -> None:
        self.network, self._augment, self._label = network, augment, label
        self._trainer, self._scorer = Trainer(network, plan, compute), Scorer(network, compute)

    def train(
        self,
        images: Tensor | Images,
        targets: Tensor,
        rng: Rng,
        on_epoch: OnEpoch | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Weights:
        """Train a fresh network on ``images`` (N, C, H, W) and ``targets`` (N,) or (N, C), drawn in proportion to
        ``weights`` (N,) if there are some; return its weights after the last epoch."""
        return self._train(images, targets, [rng], on_epoch, weights)[0]

    def score(
        self,
        images: Tensor | Images,
        targets: Tensor,
        x: Tensor | Images,
        y: Tensor,
        rngs: Sequence[Rng],
        on_epoch: OnEpoch | None = None,
        *,
        weights: Tensor | None = None,
        calibration: Calibration = "none",
        held_out: Labelled | None = None,
        keep: Callable[[int, Weights], None] | None = None,
    ) -> list[Scores]:
        """Train fresh networks together, one for each ``rng``, calibrate them on ``held_out``, and score them on ``x``
        (M, C, H, W) with classes ``y`` (M,). ``weights`` are those of the images, see ``train``. ``keep(k, trained)``
        gets the weights of the network for the k-th of ``rngs``."""
        scores = []
        networks = self._train(images, targets, rngs, on_epoch, weights)
        for k, (trained, rng) in enumerate(zip(networks, rngs, strict=True)):
            if keep is not None:
                keep(k, trained)
            divisor = 1.0
            if held_out is not None and calibration != "none":
                real_logits = self._scorer.logits(trained, held_out.images)
                divisor = temperature(calibration, real_logits, held_out.labels, rng.generator("calibration"))
            logits = self._scorer.logits(trained, x) / divisor
            if not logits.isfinite().all():
                warnings.warn(f"a network of {self.network.name} diverged; it is scored like the others", stacklevel=2)
            scores.append(Scores.of(logits, y))
        return scores

    def _train(
        self,
        images: Tensor | Images,
        targets: Tensor,
        rngs: Sequence[Rng],
        on_epoch: OnEpoch | None,
        weights: Tensor | None,
    ) -> list[Weights]:
        fresh = [self.network.init(rng, "weights") for rng in rngs]
        sources = [self._source(images, targets, rng.child("training"), weights) for rng in rngs]
        each = None if on_epoch is None else lambda done, live: on_epoch(done, live[0])
        return self._trainer.run_together(fresh, sources, on_epoch=each)

    def _source(self, images: Tensor | Images, targets: Tensor, rng: Rng, weights: Tensor | None) -> Source:
        """Return the training batches; a teacher, if there is one, labels them."""
        source = self._trainer.source(images, targets, rng, self._augment, weights)
        return source if self._label is None else self._label(source)


USUAL_SEEDS = 5
"""Number of networks for which the compute policy is resolved. It is fixed, so that the policy does not depend on
``num_seeds`` and the first networks of a larger evaluation equal those of a smaller one."""


def resolved(compute: Compute, network: Functional, plan: Training, num_images: int) -> Compute:
    """Return ``compute`` with all automatic choices made, for training on ``num_images`` images."""
    return network.settled(compute, num_images * plan.num_epochs * USUAL_SEEDS)


Progress = Callable[[str, int], AbstractContextManager[Bar]]
"""``progress(title, total)``: a context manager that shows a progress bar."""


def measure(
    images: Tensor | Images,
    targets: Tensor,
    test: Labelled,
    *,
    arrays: Arrays,
    transform: Transform,
    syn: SyntheticSet | None,
    networks: Sequence[Functional],
    protocol: Protocol,
    num_seeds: int,
    seed: int,
    compute: Compute,
    progress: Progress,
    ranks: Ranks = Ranks(),
    journal: CellStore | None = None,
    held_out: Labelled | None = None,
    labels: Mapping[str, Label] | None = None,
    split: Scored = "test",
    keep: Path | None = None,
) -> list[Result]:
    """Train and score ``num_seeds`` networks of each architecture under a protocol; return a result per architecture.

    Network k draws its weights, batch order and augmentation from (seed, architecture, k) alone. Different sets are
    therefore compared on the same networks, and the networks can be divided among processes.

    Args:
        images: (N, C, H, W), decoded from ``syn``; real images if ``syn`` is None.
        targets: classes (N,) or soft targets (N, C).
        test: the images of ``split``, on which each network is scored after its last epoch.
        arrays: the data set.
        transform: the transform of the images; recorded only.
        syn: the set; None for real images.
        networks: one for each architecture, all on one device.
        protocol: how the networks are trained.
        num_seeds: networks of each architecture.
        seed: root of every random draw.
        compute: compute policy.
        progress: shows a bar for each architecture.
        ranks: processes that share the networks.
        journal: stores trained networks; networks that it already holds are not trained again.
        held_out: held-out real images, for the choice of a learning rate and for calibration.
        labels: by name of the evaluated architecture, the function that labels its batches.
        split: which images ``test`` are; recorded only.
        keep: folder for the weights of the networks, all of which are trained then, whatever the journal holds.

    Raises:
        ValueError: another process ended, or the journal cannot be written. Networks stored so far are not lost.
    """
    name, kind = recorded_name(protocol, syn), None if syn is None else protocol.view_labels(syn)
    augment = protocol.augment_for(arrays.input_shape, arrays.strategy)
    device = networks[0].device
    common: dict[str, Any] = {
        "augment": str(augment),
        "seed": seed,
        "num_images": len(images),
        "synthetic_sha256": None if syn is None else checksum(syn.state_dict()),
        "train_fingerprint": arrays.fingerprint["train"],
        "test_fingerprint": arrays.fingerprint["test"],
        "code": __version__,
    }
    plan = protocol.resolved(len(images), None if syn is None else syn.lr, augment.copies)
    cost, num_bits = (None, None) if syn is None else (syn.cost(), syn.num_bits)
    if syn is not None and cost is not None and syn.label_kind.of_views and kind is None:
        classes_alone = cost._replace(labels=syn.classes.nbytes)  # networks are trained on the classes alone
        cost, num_bits = classes_alone, syn.num_bits - 8 * (cost.labels - classes_alone.labels)
    fixed = {} if kind is None else kind.training()
    if fixed:
        plan = dataclasses.replace(plan, **fixed)
        augment = Augment.parse(plan.augment)
        common["augment"] = str(augment)
    elif isinstance(images, Tensor):
        images, targets = augment.mirrored(images, targets)
        augment = dataclasses.replace(augment, flips=False)
    real = {"images": arrays.x_train.nbytes, "labels": arrays.y_train.nbytes, "decoder": 0}
    policies = [resolved(compute, network, plan, len(images)) for network in networks]
    weights = None if syn is None or syn.weights is None else syn.weights.to(device)

    def label_of(network: Functional) -> Label | None:
        return None if labels is None else labels[network.name]

    by_class = kind is None and labels is None and not targets.is_floating_point()
    kind_of_labels = "hard" if by_class else protocol.labels  # two protocols may spell one training differently
    of_split = bool(split == "validation" or protocol.holds_out or protocol.teacher)  # and not of the set alone
    plans = [
        _with_best_rate(
            plan, network, policy, augment, images, targets, held_out, Rng(seed), label_of(network), weights
        )
        for network, policy in zip(networks, policies, strict=True)
    ]
    provenance = [
        {
            **common,
            "training": dataclasses.replace(training, augment=str(augment), labels=kind_of_labels).content(),
            "compute": policy.first_order_identity(),
            "draws": VERSION,
            **network.identity(),
            "code": code_of(network.module),
            "num_params": network.num_params,
            "transform": transform.describe(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_classes": arrays.num_classes,
            **({} if kind is None else {"labels": dataclasses.asdict(kind)}),
            **({} if syn is None or not of_split else {"split": [split, dataclasses.asdict(syn.origin.split)]}),
        }
        for network, policy, training in zip(networks, policies, plans, strict=True)
    ]
    cells = {} if keep is not None else _trained_before(provenance, num_seeds, journal, ranks)
    numbered = [(i, k) for i in range(len(networks)) for k in range(num_seeds)]
    mine = ranks.shard([number for number in numbered if number not in cells])
    trained: dict[tuple[int, int], Cell] = {}
    for i, network in enumerate(networks):
        units = [k for of, k in mine if of == i]
        if not units:
            continue
        scorer = SetScorer(network, plans[i], policies[i], augment, label_of(network))
        rng, num_epochs = Rng(seed).child("evaluate", network.name), plans[i].num_epochs
        with progress(f"{name} {network.name}", len(units) * num_epochs) as bar:
            at_once = policies[i].networks or 1
            for first in range(0, len(units), at_once):
                begun, group = time.perf_counter(), units[first : first + at_once]
                forget_peak(device)
                accuracies = [trained[i, k].scores.accuracy for k in units[:first]]
                on_epoch = _reporter(bar, first * num_epochs, len(group), accuracies)
                rngs = [rng.child("network", k) for k in group]
                writes = None if keep is None else functools.partial(kept.write, keep, network, protocol.name, group)
                scores = scorer.score(
                    images,
                    targets,
                    test.images,
                    test.labels,
                    rngs,
                    on_epoch,
                    weights=weights,
                    calibration=protocol.calibration,
                    held_out=held_out,
                    keep=writes,
                )
                share = (time.perf_counter() - begun) / len(group)
                for k, scored in zip(group, scores, strict=True):
                    trained[i, k] = Cell(scores=scored, seconds=share, peak_memory=peak_memory(device))
                    if journal is not None:
                        journal.add(provenance[i], k, trained[i, k])
    for of_one_process in ranks.gather_objects(trained):
        cells |= of_one_process
    rows = [[cells[i, k] for k in range(num_seeds)] for i in range(len(networks))]
    return [
        Result(
            method="full" if syn is None else syn.origin.method,
            network=network.name,
            num_params=network.num_params,
            accuracies=tuple(cell.scores.accuracy for cell in row),
            metrics=_by_metric([cell.scores for cell in row]),
            protocol=name,
            protocol_hash=protocol.hash,
            protocol_fields=training.content(),
            dataset=arrays.name,
            device=device_name(device),
            threads=torch.get_num_threads(),
            seconds=round(sum(cell.seconds for cell in row), 3),
            peak_memory_bytes=max(cell.peak_memory for cell in row),
            stored_bytes=real if cost is None else cost._asdict(),
            stored_bits=num_bits,
            full_bytes=sum(real.values()),
            compute=policy.first_order_identity(),
            privacy={} if syn is None else syn.origin.privacy,
            split=split,
            teacher=protocol.teacher or (kind.teacher if kind is not None and kind.is_named else ""),
            transform=transform.name,
            changed=changed(protocol, syn),
            **common,
        )
        for network, policy, training, row in zip(networks, policies, plans, rows, strict=True)
    ]


def _with_best_rate(
    plan: Protocol,
    network: Functional,
    compute: Compute,
    augment: Augment,
    images: Tensor | Images,
    targets: Tensor,
    held_out: Labelled | None,
    rng: Rng,
    label: Label | None,
    weights: Tensor | None,
) -> Protocol:
    """Return the plan with the learning rate of its grid that gives one network the best accuracy on held-out real
    images; on a tie, the smaller learning rate."""
    if not plan.lr_grid:
        return plan
    assert held_out is not None
    keys, accuracies = [rng.child("learning rate", network.name)], []
    for lr in sorted(plan.lr_grid):
        scorer = SetScorer(network, dataclasses.replace(plan, lr=lr), compute, augment, label)
        with warnings.catch_warnings():  # a learning rate at which a network diverges is not chosen
            warnings.simplefilter("ignore", UserWarning)
            (scores,) = scorer.score(images, targets, held_out.images, held_out.labels, keys, weights=weights)
        accuracies.append(scores.accuracy)
    best = sorted(plan.lr_grid)[accuracies.index(max(accuracies))]
    return dataclasses.replace(plan, lr=best, lr_grid=())


def _by_metric(scores: Sequence[Scores]) -> dict[str, list[Any]]:
    """Return the metrics by name, one entry per network, without the accuracy, which results hold separately."""
    rows = [json.loads(json.dumps(dataclasses.asdict(of_one))) for of_one in scores]
    return {name: [row[name] for row in rows] for name in rows[0] if name != "accuracy"}


def _trained_before(
    provenance: Sequence[Mapping[str, Any]], num_seeds: int, journal: CellStore | None, ranks: Ranks
) -> dict[tuple[int, int], Cell]:
    """Return the networks that the first process finds in the journal, by index of the architecture and number."""
    stored: dict[tuple[int, int], Cell] = {}
    if journal is not None and ranks.first:
        for i, key in enumerate(provenance):
            stored |= {(i, k): cell for k, cell in journal.find(key, num_seeds).items()}
    return ranks.gather_objects(stored)[0]


def _reporter(bar: Bar, before: int, at_once: int, accuracies: Sequence[float]) -> OnEpoch:
    """Show the number of epochs done and the mean accuracy of the finished networks."""
    note = f"mean {100 * statistics.fmean(accuracies):.1f} %, n = {len(accuracies)}" if accuracies else ""
    return lambda done, weights: bar(before + done * at_once, note)


def evaluate(
    subject: Subject,
    *,
    networks: Sequence[str | Factory],
    num_seeds: int,
    protocol: Protocol,
    seed: int = 0,
    compute: Compute,
    progress: Progress = tracking.progress,
    on_result: Callable[[Result], None] | None = None,
    ranks: Ranks = Ranks(),
    journal: CellStore | None = None,
    split: Scored = "test",
    keep: Path | None = None,
) -> Evaluation:
    """Train ``num_seeds`` fresh networks per architecture on the set and score each once, after its last epoch.

    The images of ``split`` are used only to score trained networks.

    Args:
        subject: the set and its data.
        networks: network strings or callables.
        num_seeds: networks of each architecture.
        protocol: a protocol from ``condense.eval.protocol.named``, possibly with fields replaced.
        seed: root of every random draw.
        compute: compute policy.
        progress: shows a bar for each architecture.
        on_result: called with the result of each architecture as soon as it is known. With several processes it is
            called after all architectures are done.
        ranks: processes that share the networks.
        journal: stores trained networks until the results are written.
        split: the images on which networks are scored: the test images, or those that the set was not made from.
        keep: folder for the weights of the networks, in files that ``kept.file_name`` names.

    Raises:
        ValueError: there are no such images, or a network does not accept their shape; see also ``check``.
    """
    syn, arrays = subject.syn, subject.arrays
    check(syn, networks, protocol, num_seeds, subject.teachers, split)
    test = subject.scored(split)
    skeletons = [subject.network(network) for network in networks]
    images, targets = subject.decoded(soft=protocol.labels != "hard")
    if protocol.loss == "mse" and syn.label_kind.space != "values":
        targets = centred(targets, arrays.num_classes, torch.float32)
    labels = _labels(protocol, subject, skeletons, seed, compute)
    results = []
    for group in [[network] for network in skeletons] if ranks.size == 1 else [skeletons]:
        for result in measure(
            images,
            targets,
            test,
            arrays=arrays,
            transform=subject.transform,
            syn=syn,
            networks=group,
            protocol=protocol,
            num_seeds=num_seeds,
            seed=seed,
            compute=compute,
            progress=progress,
            ranks=ranks,
            journal=journal,
            held_out=subject.scored("validation") if protocol.holds_out else None,
            labels=labels,
            split=split,
            keep=keep,
        ):
            results.append(result)
            if on_result is not None:
                on_result(result)
    return Evaluation(tuple(results))


def check(
    syn: SyntheticSet | None,
    networks: Sequence[str | Factory],
    protocol: Protocol,
    num_seeds: int,
    opened: Collection[str] = (),
    split: Scored = "test",
) -> None:
    """Check an evaluation before any data are read.

    Args:
        syn: the set; None for published images, which become a set only once their data are read.
        networks: network strings or callables.
        protocol: how networks are trained.
        num_seeds: networks of each architecture.
        opened: names of teachers that are open already.
        split: the images on which networks are scored.

    Raises:
        ValueError: a network or augmentation is unknown or does not take the samples of the set, ``num_seeds`` is
            below 1, the set has no classes, the protocol or ``split`` needs held-out images or labels of views that the
            set does not have, or both need the held-out images.
    """
    if syn is not None:
        syn.require_classes("an accuracy")
    if not networks:
        raise ValueError(f"an evaluation needs a network; give {spelt('networks', ('convnet',))}")
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}; give {spelt('num_seeds', 5)}")
    is_opened = protocol.teacher in opened or teachers.is_buffer(protocol.teacher)
    teacher = {} if is_opened or protocol.teacher in ("", "same") else {"protocol.teacher": [protocol.teacher]}
    if teacher and "/" in protocol.teacher:
        raise ValueError(
            f"there is no buffer in {protocol.teacher}; give a folder that `condense buffer` wrote, the name of a "
            f"network, or {spelt('protocol.teacher', 'same')}"
        )
    for field, specs in {"networks": networks, **teacher}.items():
        for network in specs:
            if isinstance(network, str):
                parse(network) if syn is None else resolve(network, syn.origin.input_shape, field)
    if protocol.augment not in STRATEGIES:
        Augment.parse(protocol.augment)
    if syn is not None:
        protocol.augment_for(syn.origin.input_shape, "none").require_kind(syn.origin.input_shape, "protocol.augment")
        protocol.require_kind(syn.origin.input_shape, "protocol.")
    if protocol.holds_out and split == "validation":
        raise ValueError(
            f"the protocol {protocol.name} makes a choice on the held-out images, on which networks are scored with "
            f"{spelt('split', 'validation')}; give {spelt('split', 'test')}, or another protocol"
        )
    if (protocol.holds_out or split == "validation") and syn is not None:
        require_held_out(syn)
    require_effect(protocol, syn)
    if protocol.labels == "teacher" and not protocol.teacher and (syn is None or not syn.label_kind.of_views):
        given = "hard" if syn is None else syn.label_kind.name
        raise ValueError(
            f"the protocol {protocol.name} needs labels by a teacher of every view, and the set has {given} labels: "
            f"label it with `condense relabel`, or give {spelt('protocol', 'soft-teacher')}"
        )


def validator(task: Task, compute: Compute, seed: int) -> Callable[[SyntheticSet, int], dict[str, float]]:
    """Return a function of a set and the number of steps done. It trains one network on the set under ``BRIEF``, with
    the labels of the set, and returns its accuracy on the validation images of the task as ``val_accuracy``.

    Labels that are regression targets are fitted by Adam with the squared error, soft labels by the cross-entropy.
    """
    assert task.val is not None
    val = task.val

    @functools.cache
    def scorer(regresses: bool) -> SetScorer:
        return SetScorer(task.network, _BRIEF_REGRESSION if regresses else BRIEF, compute)

    def validate(syn: SyntheticSet, step: int) -> dict[str, float]:
        images, targets = decoded(syn, soft=True)
        chosen, rng = scorer(syn.label_kind.space == "values"), Rng(seed).child("validation", step)
        (scores,) = chosen.score(images, targets, val.images, val.labels, [rng], weights=syn.weights)
        return {"val_accuracy": scores.accuracy}

    return validate


def _labels(
    protocol: Protocol, subject: Subject, networks: Sequence[Functional], seed: int, compute: Compute
) -> dict[str, Label] | None:
    """Return, by name of the evaluated architecture, the function that labels its batches; None if no teacher does."""
    syn, objective = subject.syn, protocol.objective
    if protocol.teacher:
        return {
            network.name: functools.partial(
                _relabelled, _teacher(protocol, subject, network, seed, compute).labeller(compute), objective
            )
            for network in networks
        }
    kind = protocol.view_labels(syn)
    if kind is None:
        return None
    provider = copy.deepcopy(syn.provider).to(subject.device)
    teacher = subject.teachers.get(kind.teacher)
    label = None if teacher is None else teacher.labeller(compute)
    return dict.fromkeys(
        (network.name for network in networks), lambda source: provider.source(source, objective, label)
    )


def _relabelled(label: Callable[[Tensor], Tensor], objective: Objective, source: Examples) -> Source:
    return Relabelled(source, label, objective)


def _teacher(
    protocol: Protocol, subject: Subject, network: Functional, seed: int, compute: Compute
) -> Teacher | NamedTeacher:
    """Return the teacher of a protocol for an evaluated architecture."""
    if protocol.teacher in subject.teachers:
        return subject.teachers[protocol.teacher]
    task = make_task(
        subject.arrays,
        transform=subject.syn.origin.transform_name,
        split=subject.syn.origin.split,
        network=network if protocol.teacher == "same" else subject.network(protocol.teacher),
        augment=Augment(),
        device=network.device,
        cache=subject.cache,
    )
    return teachers.trained(task, seed=seed, compute=compute, cache=subject.cache)

"""What a labelled set is worth to networks that never saw it being made: networks x seeds -> results."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from condense import __version__, tracking
from condense.augment import Augment
from condense.compute import Compute, device_name, forget_peak, peak_memory
from condense.data.datasets import Arrays
from condense.data.images import Images
from condense.data.transform import Transform
from condense.distributed import Ranks
from condense.eval import teachers
from condense.eval.calibration import Calibration, temperature
from condense.eval.journal import Cell, CellStore
from condense.eval.metrics import Scores
from condense.eval.protocol import PROTOCOLS, Protocol, recorded_name
from condense.files import checksum, locked, read_json, write_text
from condense.kernels import centred
from condense.names import spelt
from condense.networks import Functional, InputShape, Weights
from condense.rng import Rng
from condense.schema import brief, from_json
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled, Split, make_task
from condense.tracking import Bar
from condense.train import Scorer, Trainer, Training

Network = str | Callable[[InputShape, int], torch.nn.Module]
"""A network string, or a callable (input_shape, num_classes) -> module."""

BRIEF = dataclasses.replace(PROTOCOLS["canonical"], name="brief", num_epochs=100)
"""For a look at the validation split while distilling."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Networks of one architecture, trained on one labelled set under one protocol, and what decided it."""

    method: str
    """What made the set; ``full`` for all training data, empty where the set does not say."""
    network: str
    num_params: int
    accuracies: tuple[float, ...]
    """On the test split, at the last epoch, one per seed; fractions."""
    metrics: Mapping[str, Sequence[Any]]
    """The rest of ``condense.eval.metrics.Scores``, by name, one entry per seed."""
    protocol: str
    """Its name; with a star where fields differ from the protocol that owns the name."""
    protocol_hash: str
    protocol_fields: Mapping[str, Any]
    augment: str
    """The operations that the protocol's augmentation means for this data set."""
    seed: int
    num_images: int
    """Images trained on, decoded."""
    synthetic_sha256: str | None
    """Of the tensors of the set, as in its file; None: real training data."""
    dataset: str
    train_fingerprint: str
    test_fingerprint: str
    compute: Mapping[str, Any]
    device: str
    threads: int
    seconds: float
    """Time of training and scoring all of them, one after the other."""
    peak_memory_bytes: int
    """The most until the last of them was trained: of the tensors of each on a GPU, of the whole process on a CPU."""
    stored_bytes: Mapping[str, int]
    """What was trained on, as stored: images (latents), labels, decoder."""
    full_bytes: int
    """All training images and labels as they are held, of which a set is the compression."""
    code: str
    """Version of this package."""

    def __post_init__(self) -> None:
        if not self.accuracies or not all(0 <= accuracy <= 1 for accuracy in self.accuracies):
            raise ValueError(f"accuracies {brief(self.accuracies)} are not fractions, one for each network")
        for name, of_each in self.metrics.items():
            if len(of_each) != self.n:
                raise ValueError(f"metrics, {brief(name)}: {len(of_each)} entries of {self.n} networks")
        for k, accuracy in enumerate(self.accuracies):
            scores = {name: of_each[k] for name, of_each in self.metrics.items()}
            from_json(Scores, {"accuracy": accuracy, **scores}, f"metrics of network {k}")
        for name in ("per_class", "reliability"):
            if len({len(of_one) for of_one in self.metrics[name]}) > 1:
                raise ValueError(f"metrics, {name}: networks of different numbers of classes or bins")
        sizes = self.stored_bytes.values()
        if min(self.full_bytes, self.num_images, *sizes) < 0 or not sum(sizes):
            raise ValueError(
                f"num_images, full_bytes or stored_bytes {brief(dict(self.stored_bytes))} are negative, or nothing is "
                "stored"
            )

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1 in the denominator); None of a single network."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean over such networks (Student's t); None of a single one."""
        if self.std is None:
            return None
        half = float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.std / self.n**0.5
        return (max(self.mean - half, 0.0), min(self.mean + half, 1.0))

    @property
    def compression(self) -> float:
        """Bytes of all training data for each byte stored."""
        return self.full_bytes / sum(self.stored_bytes.values())

    def row(self) -> dict[str, Any]:
        """For JSON: the fields, and ``mean``, ``std``, ``interval``, ``n`` and ``compression``."""
        fields = dataclasses.asdict(self)
        head = {"method": fields.pop("method"), "network": fields.pop("network")}
        head["accuracies"] = list(fields.pop("accuracies"))
        head |= {"mean": self.mean, "std": self.std, "interval": self.interval, "n": self.n}
        return {**head, **fields, "compression": self.compression}


@dataclass(frozen=True)
class Evaluation:
    results: tuple[Result, ...]

    def write(self, path: Path) -> None:
        """Add the results to ``evaluation.json``; see ``merge``."""
        merge(path, self.results)


_KEY = ("network", "num_params", "protocol_hash", "n", "seed", "synthetic_sha256", "test_fingerprint")


def merge(path: Path, results: Sequence[Result]) -> None:
    """Write the results into a JSON file, beside those already there: ``{"results": [row, ...]}``.

    A row replaces the one that asked the same: network, protocol, n, seed, set and test split. Processes that write
    one file do so one after the other.

    Raises:
        ValueError: the file is there but not ours; it cannot be written.
    """
    rows = [result.row() for result in results]
    asked = [[row[name] for name in _KEY] for row in rows]
    with locked(path):
        there = read(path) if path.exists() else []
        kept = [row for row in there if [row.get(name) for name in _KEY] not in asked]
        write_text(path, json.dumps({"results": kept + rows}, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that ``merge`` wrote.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    content = read_json(path, mend=_MEND)
    try:
        return [dict(row) for row in from_json(_Results, content, "it").results]
    except ValueError as error:
        raise ValueError(f"{path} holds no results: {error}; {_MEND}") from error


def read_complete(path: Path) -> list[dict[str, Any]]:
    """The rows of ``read`` that say all that a result says today; of others, as earlier versions wrote them, a warning.

    Raises:
        ValueError: see ``read``; a row whose fields have other types or values.
    """
    wanted = {f.name for f in dataclasses.fields(Result)}
    scores, rows = {f.name for f in dataclasses.fields(Scores)} - {"accuracy"}, read(path)
    complete = []
    for number, row in enumerate(rows, 1):
        metrics = row.get("metrics")
        if wanted <= row.keys() and not (isinstance(metrics, Mapping) and not scores <= metrics.keys()):
            try:
                complete.append(from_json(Result, row, f"row {number}").row())
            except ValueError as error:
                raise ValueError(f"{path}, {error}; {_MEND}") from error
    if len(complete) < len(rows):
        warnings.warn(
            f"{len(rows) - len(complete)} rows of {path} were written by another version and are left out; "
            "condense evaluate writes them again",
            stacklevel=2,
        )
    return complete


_MEND = "move it away, and condense evaluate writes it anew"


@dataclass(frozen=True)
class _Results:
    results: tuple[Mapping[str, Any], ...]


OnEpoch = Callable[[int, Weights], None]
"""See ``Trainer.run``."""


class SetScorer:
    """Trains networks of one architecture and scores each at its last epoch; what it compiled is kept."""

    def __init__(
        self,
        network: Functional,
        plan: Training,
        compute: Compute,
        augment: Augment = Augment(),
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.network = network
        self._trainer, self._scorer = Trainer(network, plan, augment, compute, teacher), Scorer(network, compute)

    def train(self, images: Tensor | Images, targets: Tensor, rng: Rng, on_epoch: OnEpoch | None = None) -> Weights:
        """A fresh network after its last epoch on ``images`` (N, C, H, W) and ``targets`` (N,) or (N, C)."""
        return self._train(images, targets, [rng], on_epoch)[0]

    def score(
        self,
        images: Tensor | Images,
        targets: Tensor,
        x: Tensor | Images,
        y: Tensor,
        rngs: Sequence[Rng],
        on_epoch: OnEpoch | None = None,
        *,
        calibration: Calibration = "none",
        held_out: Labelled | None = None,
    ) -> list[Scores]:
        """Scores on ``x`` (M, C, H, W), ``y`` (M,) of fresh networks, one for each ``rng``, trained together on the
        rest, and calibrated on ``held_out``."""
        scores = []
        for weights, rng in zip(self._train(images, targets, rngs, on_epoch), rngs, strict=True):
            divisor = 1.0
            if held_out is not None and calibration != "none":
                logits = self._scorer.logits(weights, held_out.images)
                divisor = temperature(calibration, logits, held_out.labels, rng("calibration"))
            found = self._scorer.logits(weights, x) / divisor
            if not found.isfinite().all():
                warnings.warn(f"a network of {self.network.name} diverged; it is scored all the same", stacklevel=2)
            scores.append(Scores.of(found, y))
        return scores

    def _train(
        self, images: Tensor | Images, targets: Tensor, rngs: Sequence[Rng], on_epoch: OnEpoch | None
    ) -> list[Weights]:
        weights = [self.network.init(rng, "weights") for rng in rngs]
        keys = [rng.child("training") for rng in rngs]
        each = None if on_epoch is None else lambda done, live: on_epoch(done, live[0])
        return self._trainer.run_together(weights, images, targets, keys, on_epoch=each)


USUAL_SEEDS = 5
"""Networks of a usual evaluation: the policy is settled for so many, or asking for more would change the first."""


def settled(compute: Compute, network: Functional, plan: Training, num_images: int) -> Compute:
    """``compute`` with nothing left open, for training on so many images."""
    return compute.resolved(network.flops * num_images * plan.num_epochs * USUAL_SEEDS, network.device)


Progress = Callable[[str, int], AbstractContextManager[Bar]]
"""``progress(title, total)``: a bar that is shown while its context lasts."""


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
    teachers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> list[Result]:
    """Train and score ``num_seeds`` networks of each architecture under a protocol; a result for each architecture,
    with the record of what decided it.

    ``images`` and ``targets`` are those of ``syn``, or real ones where that is None. Network k draws its weights,
    batch order and augmentation from (seed, architecture, k) alone, so different sets are compared on the same
    networks, and several processes deal the networks out. What the journal holds is not trained again.

    ``held_out`` are real images for what is chosen or fitted after distillation, ``teachers`` label batches, by the
    name of the architecture that is trained.

    Raises:
        ValueError: another process ended; the journal cannot be written. What was trained is in it.
    """
    name = recorded_name(protocol, syn)
    augment = protocol.augment_for(arrays.input_shape, arrays.strategy)
    device = networks[0].device
    common: dict[str, Any] = {
        "protocol_hash": protocol.hash,
        "augment": str(augment),
        "seed": seed,
        "num_images": len(images),
        "synthetic_sha256": None if syn is None else checksum(syn.state_dict()),
        "train_fingerprint": arrays.fingerprint["train"],
        "test_fingerprint": arrays.fingerprint["test"],
        "code": __version__,
    }
    plan = protocol.resolved(len(images), None if syn is None else syn.lr, augment.copies)
    if isinstance(images, Tensor):
        images, targets = augment.mirrored(images, targets)
        augment = dataclasses.replace(augment, flips=False)
    real = {"images": arrays.x_train.nbytes, "labels": arrays.y_train.nbytes, "decoder": 0}
    policies = [settled(compute, network, plan, len(images)) for network in networks]
    plans = [
        _with_best_rate(plan, network, policy, augment, images, targets, held_out, Rng(seed))
        for network, policy in zip(networks, policies, strict=True)
    ]
    decided_by = [
        {
            **common,
            "training": training.content(),
            "compute": policy.first_order_identity(),
            **network.identity(),
            "num_params": network.num_params,
            "transform": transform.describe(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_classes": arrays.num_classes,
        }
        for network, policy, training in zip(networks, policies, plans, strict=True)
    ]
    cells = _stored(decided_by, num_seeds, journal, ranks)
    numbered = [(i, k) for i in range(len(networks)) for k in range(num_seeds)]
    mine = ranks.shard([number for number in numbered if number not in cells])
    trained: dict[tuple[int, int], Cell] = {}
    for i, network in enumerate(networks):
        units = [k for of, k in mine if of == i]
        if not units:
            continue
        teacher = None if teachers is None else teachers[network.name]
        scorer = SetScorer(network, plans[i], policies[i], augment, teacher)
        rng, num_epochs = Rng(seed).child("evaluate", network.name), plans[i].num_epochs
        with progress(f"{name} {network.name}", len(units) * num_epochs) as bar:
            at_once = policies[i].networks or 1
            for first in range(0, len(units), at_once):
                begun, group = time.perf_counter(), units[first : first + at_once]
                forget_peak(device)
                accuracies = [trained[i, k].scores.accuracy for k in units[:first]]
                on_epoch = _reporter(bar, first * num_epochs, len(group), accuracies)
                rngs = [rng.child("network", k) for k in group]
                scores = scorer.score(
                    images,
                    targets,
                    test.images,
                    test.labels,
                    rngs,
                    on_epoch,
                    calibration=protocol.calibration,
                    held_out=held_out,
                )
                share = (time.perf_counter() - begun) / len(group)
                for k, result in zip(group, scores, strict=True):
                    trained[i, k] = Cell(scores=result, seconds=share, peak_memory=peak_memory(device))
                    if journal is not None:
                        journal.add(decided_by[i], k, trained[i, k])
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
            protocol_fields=training.content(),
            dataset=arrays.name,
            device=device_name(device),
            threads=torch.get_num_threads(),
            seconds=round(sum(cell.seconds for cell in row), 3),
            peak_memory_bytes=max(cell.peak_memory for cell in row),
            stored_bytes=real if syn is None else syn.cost()._asdict(),
            full_bytes=sum(real.values()),
            compute=policy.first_order_identity(),
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
) -> Protocol:
    """The plan with the learning rate of its grid at which one network is best on the held-out real images; the smaller
    of equally good ones."""
    if not plan.lr_grid:
        return plan
    assert held_out is not None
    keys, accuracies = [rng.child("learning rate", network.name)], []
    for lr in sorted(plan.lr_grid):
        scorer = SetScorer(network, dataclasses.replace(plan, lr=lr), compute, augment)
        with warnings.catch_warnings():  # a rate at which networks diverge is none to be warned of: it is not chosen
            warnings.simplefilter("ignore", UserWarning)
            (found,) = scorer.score(images, targets, held_out.images, held_out.labels, keys)
        accuracies.append(found.accuracy)
    best = sorted(plan.lr_grid)[accuracies.index(max(accuracies))]
    return dataclasses.replace(plan, lr=best, lr_grid=())


def _by_metric(scores: Sequence[Scores]) -> dict[str, list[Any]]:
    """Name -> one entry for each of the networks; all but the accuracy, which a result has apart."""
    rows = [json.loads(json.dumps(dataclasses.asdict(found))) for found in scores]
    return {name: [row[name] for row in rows] for name in rows[0] if name != "accuracy"}


def _stored(
    decided_by: Sequence[Mapping[str, Any]], num_seeds: int, journal: CellStore | None, ranks: Ranks
) -> dict[tuple[int, int], Cell]:
    """The networks that the first process finds in the journal, by architecture and number."""
    stored: dict[tuple[int, int], Cell] = {}
    if journal is not None and ranks.first:
        for i, key in enumerate(decided_by):
            stored |= {(i, k): cell for k, cell in journal.find(key, num_seeds).items()}
    return ranks.gather_objects(stored)[0]


def _reporter(bar: Bar, before: int, at_once: int, accuracies: Sequence[float]) -> OnEpoch:
    """Shows the epochs done, and the mean accuracy of the networks that are done."""
    note = f"mean {100 * statistics.fmean(accuracies):.1f} %, n = {len(accuracies)}" if accuracies else ""
    return lambda done, weights: bar(before + done * at_once, note)


def evaluate(
    syn: SyntheticSet,
    arrays: Arrays,
    *,
    networks: Sequence[Network],
    num_seeds: int,
    protocol: Protocol,
    seed: int = 0,
    compute: Compute,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = tracking.progress,
    on_result: Callable[[Result], None] | None = None,
    ranks: Ranks = Ranks(),
    journal: CellStore | None = None,
) -> Evaluation:
    """Train ``num_seeds`` fresh networks per architecture on the set and score each once, at its last epoch.

    The test split goes through the transform that the set describes; only the scoring of a trained network
    sees it.

    Args:
        networks: network strings or callables.
        protocol: of ``condense.eval.protocol.named``, or with fields replaced.
        cache: folder of whitening matrices.
        on_result: called with each result as soon as it is there; with several processes, when all are.
        ranks: processes that deal the networks out.
        journal: where trained networks are kept until the results are there.

    Raises:
        ValueError: the set was not made from this data set; there are no test images; a network cannot take
            images of this size.
    """
    check(syn, arrays)
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}; give {spelt('num_seeds', 5)}")
    skeletons = [Functional(network, arrays.input_shape, arrays.num_classes, device) for network in networks]
    images, targets = decoded(syn, soft=protocol.labels == "own")
    if protocol.loss == "mse" and syn.label_kind.space != "values":
        targets = centred(targets, arrays.num_classes, torch.float32)
    images, targets = images.to(device), targets.to(device)
    transform = transform_of(syn, arrays, cache)
    test = load_test(arrays, transform, device)
    held_out = load_held_out(syn, arrays, transform, device) if protocol.holds_out else None
    labellers = _teachers(protocol, syn, arrays, skeletons, seed, compute, cache) if protocol.teacher else None
    results = []
    for group in [[network] for network in skeletons] if ranks.size == 1 else [skeletons]:
        for result in measure(
            images,
            targets,
            test,
            arrays=arrays,
            transform=transform,
            syn=syn,
            networks=group,
            protocol=protocol,
            num_seeds=num_seeds,
            seed=seed,
            compute=compute,
            progress=progress,
            ranks=ranks,
            journal=journal,
            held_out=held_out,
            teachers=labellers,
        ):
            results.append(result)
            if on_result is not None:
                on_result(result)
    return Evaluation(tuple(results))


@torch.no_grad()
def decoded(syn: SyntheticSet, *, soft: bool) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) and classes (n,); soft targets (n, C) where the set has them and ``soft``."""
    images, targets = syn()
    return images, targets if soft or targets.dim() == 1 else targets.argmax(1)


def load_test(arrays: Arrays, transform: Transform, device: torch.device) -> Labelled:
    """The test images in the transformed space.

    Raises:
        ValueError: there are none.
    """
    if not len(arrays.x_test):
        raise ValueError(f"{arrays.name} has no test images: there is nothing to score on; give a test split")
    return Labelled(
        Images.of(arrays.x_test, device).with_transform(transform), torch.from_numpy(arrays.y_test).to(device)
    )


def load_held_out(syn: SyntheticSet, arrays: Arrays, transform: Transform, device: torch.device) -> Labelled:
    """The validation part of the real training images, which the set was not made from.

    Raises:
        ValueError: there is none.
    """
    split = require_held_out(syn)
    labels = torch.from_numpy(arrays.y_train)
    _, index = split.indices(labels)
    images = Images.of(arrays.x_train, device).subset(index).with_transform(transform)
    return Labelled(images, labels[index].to(device))


def require_held_out(syn: SyntheticSet) -> Split:
    """The split of the real images that a set was made with. Raises ValueError where it held none out."""
    split = Split(**syn.origin.recipe.get("split", {}))
    if not split.val_fraction:
        raise ValueError(
            "this protocol chooses on held-out real images, and the set was made from all of them; distil it with "
            f"{spelt('split.val_fraction', 0.1)}"
        )
    return split


def _teachers(
    protocol: Protocol,
    syn: SyntheticSet,
    arrays: Arrays,
    networks: Sequence[Functional],
    seed: int,
    compute: Compute,
    cache: Path | None,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """By the architecture that is evaluated: what labels its batches."""
    recipe, found = syn.origin.recipe, {}
    for network in networks:
        labeller = network
        if protocol.teacher != "same":
            labeller = Functional(protocol.teacher, arrays.input_shape, arrays.num_classes, network.device)
        task = make_task(
            arrays,
            transform=recipe.get("transform", "channel"),
            split=Split(**recipe.get("split", {"val_fraction": 0.0})),
            network=labeller,
            augment=Augment(),
            device=network.device,
            cache=cache,
        )
        weights = teachers.trained(task, seed=seed, compute=compute, cache=cache)
        found[network.name] = teachers.labeller(labeller, weights, compute)
    return found


def check(syn: SyntheticSet, arrays: Arrays) -> None:
    """Raise ValueError where a set was not made from these data, or has no classes."""
    syn.require_classes("an accuracy")
    origin = syn.origin
    for what, ours, theirs in (
        ("fingerprint", origin.dataset["fingerprint"][:12], arrays.fingerprint["train"][:12]),
        ("image shape", origin.input_shape, arrays.input_shape),
        ("number of classes", origin.num_classes, arrays.num_classes),
    ):
        if ours != theirs:
            raise ValueError(
                f"the set belongs to {origin.dataset['name']} ({what} {ours}), not {arrays.name} ({theirs}): "
                f"its score there would mean nothing; give {spelt('dataset')} with the data that it was made from"
            )


def transform_of(syn: SyntheticSet, arrays: Arrays, cache: Path | None) -> Transform:
    """The transform of the set; whitening may have to be fitted again, to the same training images."""
    description, images = syn.origin.transform, None
    if description.get("kind") == "zca":
        split = Split(**syn.origin.recipe.get("split", {}))
        train_index, _ = split.indices(torch.from_numpy(arrays.y_train))
        images = Images.of(arrays.x_train, torch.device("cpu")).subset(train_index)
    return Transform.from_description(description, images, cache)

"""Label the views of a finished set by a teacher, and find the teacher of such a set again.

``trained_projector`` makes the teacher of ``projector`` labels."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.artifacts import (
    MANIFEST,
    TrainedNetworks,
    TrainedNetworkSpec,
    TrajectorySpec,
    find,
    folder_name,
    open_buffer,
    read_manifest,
)
from condense.augment import Augment
from condense.compute import Compute
from condense.files import checksum
from condense.names import printable, spelt
from condense.networks import Functional, Network, build
from condense.networks.clip import PREFIX, pretrained
from condense.networks.lowrank import HEAD, Adapted, low_rank
from condense.rng import Rng
from condense.sources import Relabelled
from condense.synthetic.set import Origin, SyntheticSet
from condense.synthetic.teaching import (
    Online,
    Projector,
    Stored,
    StoredProjector,
    StoredTable,
    StoredTeacher,
    ViewLabels,
)
from condense.task import ROUNDING, Labelled
from condense.teachers import BATCH, Teacher, mean_labeller
from condense.train import Trainer

ViewLabelsT = TypeVar("ViewLabelsT", bound=ViewLabels)


@dataclasses.dataclass(frozen=True)
class NamedTeacher:
    """A teacher with its provenance."""

    name: str
    """The name of the buffer, without its location, or ``open_clip:MODEL/WEIGHTS``, and the start of a checksum of the
    weights. A projector has the name of its encoder; several teachers have their names, joined by ``AND``."""
    network: str
    """The architecture of the network in the buffer; of several teachers, joined by ``AND`` in the same order."""
    teachers: tuple[Teacher, ...]
    """The networks, whose logits are averaged."""
    artifacts: tuple[Mapping[str, Any], ...]
    """The descriptions of the buffers that it was made of (``Artifact.describe``)."""
    texts: Callable[[Sequence[str]], Tensor] | None = None
    """The embeddings (n, F) of n texts, of an encoder of open_clip; others have none."""

    @property
    def teacher(self) -> Teacher:
        """The network, where it is a single one."""
        (teacher,) = self.teachers
        return teacher

    @property
    def device(self) -> torch.device:
        return self.teachers[0].network.device

    def labeller(self, compute: Compute) -> Callable[[Tensor], Tensor]:
        """Return a function from images (N, *input_shape) to the mean (N, num_outputs) of the logits of the networks;
        see ``Teacher.labeller``."""
        labellers = [teacher.labeller(compute) for teacher in self.teachers]
        return labellers[0] if len(labellers) == 1 else mean_labeller(labellers)


OF_LABELS = "labels"
"""The ``use`` of the teacher's buffers among the artifacts of a set."""

AND = " + "
"""Joins the names of several teachers, and those of their networks. The folders of buffers have no spaces in their
names."""


def open_teacher(
    path: Path, origin: Origin, device: torch.device, option: str = "teacher", *, features_only: bool = False
) -> NamedTeacher:
    """Open the first network of a buffer as a teacher for sets of the same data, split and transform.

    Args:
        path: the folder of the buffer, or a folder with one such buffer.
        origin: the origin of the set.
        device: device of the teacher.
        option: the name of the user's option, for errors.
        features_only: whether only the features are used, so that networks trained without labels are accepted too.

    Raises:
        ValueError: there is no such buffer, or it is damaged.
    """
    spec = TrainedNetworkSpec(identity=_identity(origin), features_only=features_only)
    folder = find(path, spec, origin.dataset_name, option)
    buffer = open_buffer(folder)
    network = Functional(buffer.manifest["identity"]["network"], origin.input_shape, origin.num_classes, device)
    weights = buffer.weights(0, network)
    digest = checksum({**weights.params, **weights.buffers})[:12]
    name = f"{_name(folder)}@{digest}"
    return NamedTeacher(name, network.name, (Teacher(network, weights),), (_described(buffer),))


def _described(buffer: TrainedNetworks) -> dict[str, Any]:
    """Return the description of a buffer of a teacher, with the settings from which a command can repeat it."""
    return {**buffer.describe(), "network": buffer.manifest["identity"]["network"], "plan": dict(buffer.plan)}


def open_teachers(paths: Sequence[Path], kind: ViewLabels, origin: Origin, device: torch.device) -> NamedTeacher:
    """Open the teachers of ``open_teacher`` that label a set together.

    They are put in the order of their names, so that the labels and what the set records do not depend on the order of
    ``paths``.

    Args:
        paths: at least one folder, as for ``open_teacher``.
        kind: the labels that they are to give.
        origin: the origin of the set.
        device: device of the teachers.

    Raises:
        ValueError: a buffer is missing or damaged; there is no path, or a teacher occurs twice; ``kind`` is for one
            teacher, and there are several.
    """
    if not paths:
        raise ValueError(f"labels of views need a teacher; give {spelt('teacher')} with the folder of its buffer")
    if any(is_open_clip(path) for path in paths) and not isinstance(kind, Projector):
        raise ValueError(
            f"an encoder of open_clip has no classifier of these classes for {kind.name} labels; give "
            f"{spelt('labels', 'projector')}, or the folder of a buffer"
        )
    if len(paths) > 1 and not (isinstance(kind, Stored) or (isinstance(kind, Online) and kind.is_named)):
        raise ValueError(
            f"{kind.name} labels cannot be the mean of {len(paths)} teachers, as stored ones can, and online ones that "
            f"name the teachers ({spelt('labels.keep_weights', False)}); give one of these, or one teacher"
        )
    if isinstance(kind, Projector) and kind.head == "text":
        kind.texts(origin.dataset.get("classes", ()))
        if not is_open_clip(paths[0]):
            raise ValueError(
                f"the head text needs an encoder of texts, which {paths[0]} has not; give "
                f"{spelt('teacher', f'{PREFIX}MODEL/WEIGHTS')}, or {spelt('labels.head', 'class-means')}"
            )
    if is_open_clip(paths[0]):
        return open_encoder(str(paths[0]), origin, device)
    return _joined([open_teacher(path, origin, device) for path in paths])


def is_open_clip(teacher: Path) -> bool:
    """Whether a teacher is the name of an encoder of open_clip, and not a folder."""
    return str(teacher).startswith(PREFIX)


def open_encoder(name: str, origin: Origin, device: torch.device) -> NamedTeacher:
    """Open an encoder of open_clip for sets of images; its classifier is random.

    Args:
        name: ``open_clip:MODEL/WEIGHTS``.
        origin: the origin of the set, whose transform is undone before images are standardised for the encoder.
        device: device of the encoder.

    Raises:
        ValueError: open_clip is not installed or has no such encoder, or the set is whitened.
    """
    if origin.transform_name not in ("none", "channel"):
        raise ValueError(
            f"an encoder of open_clip sees pixels, and the set is whitened ({origin.transform_name}); give a set with "
            f"{spelt('transform', 'channel')}"
        )
    found = pretrained(name)
    network = Functional(found.network, origin.input_shape, origin.num_classes, device)
    mean, std = (
        torch.tensor(origin.transform.get(key, usual), dtype=torch.float32).view(-1, 1, 1).expand(3, 1, 1)
        for key, usual in (("mean", [0.0]), ("std", [1.0]))
    )
    values = {**found.weights, "scale": std / found.std, "shift": (mean - found.mean) / found.std}
    drawn = network.init(Rng(0), "classifier of an encoder")
    weights = network.restored(
        {key: values.get(key, value) for key, value in drawn.params.items()},
        {key: values.get(key, value) for key, value in drawn.buffers.items()},
    )
    full_name = f"{name}@{found.digest[:12]}"
    artifact = {"kind": "open_clip", "name": full_name}
    return NamedTeacher(full_name, network.name, (Teacher(network, weights),), (artifact,), found.texts)


def _joined(opened: Sequence[NamedTeacher]) -> NamedTeacher:
    """Return several teachers as one, in the order of their names. Raises ValueError if one occurs twice."""
    opened = sorted(opened, key=lambda one: one.name)
    for one, following in itertools.pairwise(opened):
        if one.name == following.name:
            raise ValueError(f"the teacher {one.name} is given twice; give different ones")
    return NamedTeacher(
        AND.join(one.name for one in opened),
        AND.join(one.network for one in opened),
        tuple(teacher for one in opened for teacher in one.teachers),
        tuple(artifact for one in opened for artifact in one.artifacts),
    )


def find_teacher(name: str, buffers: Path, origin: Origin, device: torch.device) -> NamedTeacher:
    """Open the teacher, or the teachers, of a recorded ``name``, in the folder ``buffers`` or folders in it.

    Raises:
        ValueError: it is not there, its weights are other ones, or its buffer is damaged.
    """
    if AND in name:
        return _joined([find_teacher(part, buffers, origin, device) for part in name.split(AND)])
    folders = [path.parent for path in (buffers / MANIFEST, *sorted(buffers.glob(f"*/{MANIFEST}"))) if path.is_file()]
    found = [folder for folder in folders if _name(folder) == name.partition("@")[0]]
    if not found:
        raise ValueError(
            f"the teacher {printable(name, 200)} of the labels is not in {buffers}; give its folder with "
            f"{spelt('buffers')}"
        )
    opened = open_teacher(found[0], origin, device, "buffers")
    if opened.name != name:
        raise ValueError(
            f"{found[0]} is not the teacher of the labels any more: it is {opened.name}, not {printable(name, 200)}; "
            f"give another folder with {spelt('buffers')}"
        )
    return opened


def teacher_of(syn: SyntheticSet, buffers: Path, device: torch.device) -> NamedTeacher:
    """Return the teacher that labelled the views of a set, from the set or else from ``buffers`` (``find_teacher``)."""
    kind, provider, origin = syn.label_kind, syn.provider, syn.origin
    assert isinstance(kind, ViewLabels)
    recorded = tuple(entry for entry in origin.artifacts if entry.get("use") == OF_LABELS)
    if isinstance(kind, Projector):
        assert isinstance(provider, StoredProjector)
        if kind.is_named:
            found = _find_encoder(kind, buffers, origin, device)
            encoder = _module(found.teacher, origin)
        else:
            encoder = _built(kind.network, origin)
        base = kind.adapted(encoder, origin.num_classes)
        if kind.is_named and kind.head == "text":
            _start_with_texts(base, kind, found, origin)
        provider.thaw(base)
        network = low_rank(base, origin.input_shape, origin.num_classes, device)
    elif isinstance(provider, StoredTeacher) and not kind.is_named:
        network = Functional(kind.network, origin.input_shape, origin.num_classes, device)
    else:
        return find_teacher(kind.teacher, buffers, origin, device)
    return NamedTeacher(kind.teacher, kind.network, (Teacher(network, provider.weights(network)),), recorded)


def _find_encoder(kind: Projector, buffers: Path, origin: Origin, device: torch.device) -> NamedTeacher:
    """Open the encoder that ``projector`` labels name. Raises ValueError if it is missing or another one."""
    if is_open_clip(Path(kind.teacher)):
        found = open_encoder(kind.teacher.rpartition("@")[0], origin, device)
    else:
        found = find_teacher(kind.teacher, buffers, origin, device)
    if found.name != kind.teacher:
        raise ValueError(
            f"the encoder of the labels is {printable(kind.teacher, 200)}, but open_clip has {found.name}; label the "
            "set again"
        )
    if found.network != kind.network:
        raise ValueError(
            f"the encoder of the labels is {kind.network}, but {found.name} is {found.network}; label the set again"
        )
    return found


def trained_projector(
    kind: Projector,
    encoder: NamedTeacher,
    weak_teachers: Path,
    train: Labelled,
    origin: Origin,
    *,
    strategy: str = "none",
    compute: Compute = Compute(),
    on_epoch: Callable[[int], None] = lambda done: None,
) -> NamedTeacher:
    """Train the projector of ``projector`` labels on real images.

    The head starts as the class means of the encoder's features E(x) / |E(x)|, or as embeddings of texts of length 1,
    and the changes as zero. BatchNorm uses the statistics of batches in training and updates the running ones, which
    belong to the projector.

    Args:
        kind: the settings.
        encoder: the trained network, on the device to compute on.
        weak_teachers: the folder of a buffer of trajectories, whose first expert gives the weak teachers, or a folder
            with one such buffer.
        train: the training images of the set, in its transformed space, and their classes.
        origin: the origin of the set.
        strategy: the augmentation ``dsa`` of the data set.
        compute: compute policy of the training.
        on_epoch: called with the number of epochs done.

    Raises:
        ValueError: ``kind`` asks for another encoder, or there are no such weak teachers.
    """
    kind = _settled(kind, encoder, strategy)
    network, weights = encoder.teacher
    device, shape, num_classes = network.device, origin.input_shape, origin.num_classes
    spec = TrajectorySpec(identity=_identity(origin), num_epochs=kind.num_teachers)
    folder = find(weak_teachers, spec, origin.dataset_name, "weak_teachers")
    weak = spec.open(folder)
    weak_network = Functional(weak.manifest["identity"]["network"], shape, num_classes, device)
    epochs = [round(k * weak.num_epochs / kind.num_teachers) for k in range(1, kind.num_teachers + 1)]
    policy = network.settled(compute, len(train) * kind.epochs)
    labellers = [Teacher(weak_network, weak.weights(0, weak_network, epoch)).labeller(policy) for epoch in epochs]

    base = kind.adapted(_module(encoder.teacher, origin), num_classes)
    if kind.head == "text":
        _start_with_texts(base, kind, encoder, origin)
    else:
        with torch.no_grad(), policy.arithmetic():
            features = [network.features(*weights, images, train=False) for images in train.images.split(BATCH)]
            base.frozen()[HEAD].copy_(_class_means(torch.cat(features), train.labels, num_classes))
    projector, rng = low_rank(base, shape, num_classes, device), Rng(kind.seed).child("projector")
    trainer = Trainer(projector, kind.plan(), policy)
    source = trainer.source(train.images, train.labels, rng, Augment.parse(kind.augment))
    taught = Relabelled(source, mean_labeller(labellers), trainer.training.objective)
    initial = projector.init(rng, "changes of low rank")
    trained = trainer.run(initial, taught, on_epoch=lambda done, _: on_epoch(done))
    artifacts = (*encoder.artifacts, {**_described(weak), "epochs": epochs})
    return NamedTeacher(encoder.name, encoder.network, (Teacher(projector, trained),), artifacts)


def relabelled(
    syn: SyntheticSet,
    kind: ViewLabels,
    by: NamedTeacher,
    *,
    strategy: str = "none",
    compute: Compute = Compute(),
    on_epoch: Callable[[int], None] = lambda done: None,
) -> SyntheticSet:
    """Return a copy of a set, with labels of its views by a teacher.

    Args:
        syn: the set, which must have classes; its labels are replaced.
        kind: the settings of the labels.
        by: the teacher or teachers, on the device to compute on; for ``projector`` labels the result of
            ``trained_projector``.
        strategy: the augmentation ``dsa`` of the data set.
        compute: compute policy of the teacher.
        on_epoch: called with the number of labelled epochs.

    Raises:
        ValueError: the set has no classes, ``kind`` asks for another teacher or does not fit the images, or the logits
            of the teacher cannot be stored.
    """
    syn.require_classes(f"a set with {kind.name} labels")
    if isinstance(kind, Stored) and syn.weights is not None:
        raise ValueError(
            "the set draws its samples in proportion to weights, and views that are stored have no such order; give "
            f"{spelt('labels', 'online')}"
        )
    kind = _settled(kind, by, strategy)
    device, origin = by.device, syn.origin
    provider = kind.provider(syn.classes.cpu(), origin.num_classes, origin.input_shape, syn.decode.expansion)
    if isinstance(provider, StoredTable):
        with torch.no_grad():
            images, _ = syn()
        copies = len(images) // len(syn)
        classes = syn.classes.repeat(copies).to(device)
        source = provider.kind.views(images.to(device), classes, origin.num_classes)
        label = by.labeller(compute)
        with torch.no_grad(), compute.arithmetic():
            for k, epoch in enumerate(provider.kind.stored_epochs):
                batches = [label(source.batch(epoch, index).images) for index in range(source.num_batches)]
                provider.fill(k, torch.cat(batches).cpu())
                on_epoch(k + 1)
    elif isinstance(provider, StoredTeacher) and not kind.is_named:
        provider.fill(by.teacher.weights)
    elif isinstance(provider, StoredProjector):
        provider.freeze(by.teacher.network)
        provider.fill(by.teacher.weights)
    result = copy.deepcopy(syn)
    others = [entry for entry in origin.artifacts if entry.get("use") != OF_LABELS]
    ours = [{**entry, "use": OF_LABELS} for entry in by.artifacts]
    result.origin = dataclasses.replace(origin, artifacts=[*others, *ours])
    result.label_kind, result.provider = kind, provider.to(syn.latents.device)
    return result


def _settled(kind: ViewLabelsT, by: NamedTeacher, strategy: str) -> ViewLabelsT:
    """Return the settings with the teacher, its network and the augmentation by name.

    Raises:
        ValueError: they ask for another teacher.
    """
    for field, actual, any_value in (("teacher", by.name, ""), ("network", by.network, "auto")):
        asked = getattr(kind, field)
        if asked not in (any_value, actual):
            raise ValueError(f"labels.{field} is {asked}, but the {field} is {actual}; give that, or leave it out")
    kind = dataclasses.replace(kind, teacher=by.name, network=by.network)
    if isinstance(kind, Stored | Projector):
        kind = dataclasses.replace(kind, augment=str(Augment.parse(kind.augment, own=strategy)))
    return kind


@torch.no_grad()
def _start_with_texts(base: Adapted, kind: Projector, encoder: NamedTeacher, origin: Origin) -> None:
    """Set the start of the head to the embeddings of the texts of the classes, each of length 1.

    Raises:
        ValueError: the encoder has no texts, or the classes no names.
    """
    if encoder.texts is None:
        raise ValueError(f"the head text needs an encoder of texts, which {encoder.name} has not; label the set again")
    base.frozen()[HEAD].copy_(F.normalize(encoder.texts(kind.texts(origin.dataset["classes"])), dim=1))


def _class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean (C, F) of the features (N, F), each of length 1, over the images of each class (N,)."""
    sums = F.one_hot(labels, num_classes).to(features).T @ F.normalize(features, dim=1)
    return sums / labels.bincount(minlength=num_classes).clamp(min=1)[:, None]


def _built(network: str, origin: Origin) -> Network:
    """Return a network on the CPU whose frozen parameters are those of its architecture (see ``Functional``)."""
    with Rng(0).forked("architecture"):
        return build(network, origin.input_shape, origin.num_classes)


@torch.no_grad()
def _module(teacher: Teacher, origin: Origin) -> Network:
    """Return a teacher as a module on the CPU."""
    module, values = _built(teacher.network.name, origin), {**teacher.weights.params, **teacher.weights.buffers}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in values:
            tensor.copy_(values[name])
    return module


def _identity(origin: Origin) -> dict[str, Any]:
    """Return what networks that label a set have in common with it: data, split and transform."""
    transform = {name: value for name, value in origin.transform.items() if name not in ROUNDING}
    split = {"val_fraction": origin.split.val_fraction, "seed": origin.split.seed}
    return {"dataset": origin.fingerprint, "split": split, "transform": transform}


def _name(folder: Path) -> str:
    """Return the name that the folder of a buffer had when it was made."""
    manifest = read_manifest(folder)
    return folder_name(str(manifest.get("dataset", "")), {"network": "", **manifest["identity"]})

"""Artifacts: expensive inputs of methods that are stored on disk, such as buffers of trained networks.

An artifact is a folder with a ``manifest.json``. Its *identity* is everything that determined its content; the folder's
name ends in a hash of the identity. Its *extent* (experts, epochs) is how much it holds, and may grow.

Trained networks are stored in a *buffer*, one ``.safetensors`` file per network: ``params`` (R, P) and, where the
network has buffers, ``buffers`` (R, B), both float32. A buffer of *trajectories* stores every epoch: R = E + 1 rows, of
which row 0 is the initialisation. A buffer of *networks* stores only the last epoch: R = 1. The header holds a checksum
of every row, so that a row can be read and verified without reading the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from condense.data import datasets
from condense.data.transform import name_of
from condense.files import (
    canonical_json,
    expanded,
    locked,
    read_header,
    read_json,
    read_row,
    replacing,
    save_file,
    write_text,
)
from condense.names import printable, spelt
from condense.networks import Functional, Weights
from condense.schema import from_json

FORMAT = 1
DEFAULT_ROOT = Path("artifacts")
MANIFEST = "manifest.json"

Keep = Literal["all", "last"]
"""The epochs of a training run that a buffer stores: all of them and the initialisation, or only the last one."""

IMPORTED = "imported"
"""The ``origin`` of networks that were trained elsewhere."""

_FIX = "restore it, or move it away and build the buffer again, which trains the missing experts"


class Artifact(ABC):
    """An artifact on disk, opened for reading.

    Raises:
        ValueError: as ``read_manifest`` does.
    """

    kind: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder, self.kind)

    @abstractmethod
    def extent(self) -> dict[str, int]:
        """Return how much the artifact holds, by name; JSON-serialisable."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """The settings that the artifact was built with and that differ from the defaults, by field; empty if they are
        not recorded."""
        plan = self.manifest.get("plan")
        return plan if isinstance(plan, Mapping) else {}

    def describe(self) -> dict[str, Any]:
        """Return the record that results made with the artifact store: its kind, its name (which ends in the hash of
        its identity) and its extent."""
        return {"kind": self.kind, "name": self.folder.resolve().name, **self.extent()}


class TrainedNetworks(Artifact):
    """Networks of one architecture at the end of their training."""

    kind = "networks"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._key = _hash(self.manifest["identity"])

    @property
    def num_networks(self) -> int:
        return int(self.manifest["num_experts"])

    @property
    def num_epochs(self) -> int:
        """The number of epochs that every network was trained for; 0 for imported networks, where it is unknown."""
        return int(self.manifest["num_epochs"])

    def extent(self) -> dict[str, int]:
        return {"num_networks": self.num_networks}

    def weights(self, index: int, network: Functional) -> Weights:
        """Return the weights of network ``index`` after its last epoch, on the device and in the dtypes of ``network``.

        Raises:
            ValueError: its file is missing or damaged, or its tensors do not fit ``network``.
        """
        return self._weights(index, self._last_row(index), network)

    def _last_row(self, index: int) -> int:
        return 0

    def _weights(self, index: int, row: int, network: Functional) -> Weights:
        params, buffers = ({name: tuple(shape) for name, shape in self.manifest[part]} for part in Weights._fields)
        if network.buffer_shapes and not buffers:
            raise ValueError(
                f"networks of {self.folder} cannot label images: the buffer has no running statistics, which "
                f"{network.name} needs; train them with `condense buffer`, which stores these"
            )
        if (params, buffers) != (network.shapes, network.buffer_shapes):
            raise ValueError(f"{self.folder} holds networks other than {network.name}; give another folder")
        stored = (self._read(part, index, (row,))[0] if self.manifest[part] else {} for part in Weights._fields)
        return network.restored(*stored)

    def _read(self, table: str, index: int, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        assert 0 <= index < self.num_networks, f"network {index} of {self.num_networks}"
        path = self.folder / expert_file(index)
        header = from_json(_ExpertHeader, read_header(path), str(path))
        if header.buffer != self._key:
            raise ValueError(f"{path} belongs to another buffer; {_FIX}")
        layout, checksums = self.manifest[table], header.rows.get(table, ())
        width = sum(math.prod(shape) for _, shape in layout)
        tensors = []
        for number in rows:
            try:
                row = read_row(path, table, number, width)
                intact = number < len(checksums) and _checksum(row) == checksums[number]
            except (OSError, ValueError):
                intact = False
            if not intact:
                raise ValueError(f"{path} is damaged: row {number} of its {table} does not match its checksum; {_FIX}")
            tensors.append(_unpack(row, layout))
        return tensors


class Trajectories(TrainedNetworks):
    """Snapshots of experts: epoch 0 is the initialisation, epoch k the weights after k epochs."""

    kind = "trajectories"

    @property
    def num_experts(self) -> int:
        return self.num_networks

    def extent(self) -> dict[str, int]:
        return {"num_experts": self.num_experts, "num_epochs": self.num_epochs}

    def weights(self, index: int, network: Functional, epoch: int | None = None) -> Weights:
        """Return weights as in ``TrainedNetworks``, after ``epoch`` epochs.

        By default this is the last epoch that every expert has.
        """
        row = self._last_row(index) if epoch is None else self._row(index, epoch)
        return self._weights(index, row, network)

    def snapshot(self, expert: int, epoch: int) -> dict[str, Tensor]:
        """Return the parameters of an expert after ``epoch`` epochs by name, as float32 on the CPU.

        Raises:
            ValueError: the expert's file is missing or damaged.
        """
        return self._read("params", expert, (self._row(expert, epoch),))[0]

    def pair(self, expert: int, start: int, target: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return two snapshots of one expert. Raises ValueError as ``snapshot`` does."""
        first, second = self._read("params", expert, (self._row(expert, start), self._row(expert, target)))
        return first, second

    def buffers(self, expert: int, epoch: int) -> dict[str, Tensor]:
        """Return the buffers of an expert (BatchNorm statistics) by name, as float32 on the CPU.

        The dictionary is empty if the network has no buffers.
        """
        return self._read("buffers", expert, (self._row(expert, epoch),))[0] if self.manifest["buffers"] else {}

    def _last_row(self, index: int) -> int:
        return self.num_epochs

    def _row(self, expert: int, epoch: int) -> int:
        assert 0 <= expert < self.num_experts, f"expert {expert} of {self.num_experts}"
        last = self.manifest["experts"][expert]["num_epochs"]
        assert 0 <= epoch <= last, f"epoch {epoch} of {last}"
        return epoch


def open_buffer(folder: Path) -> TrainedNetworks:
    """Open a buffer of networks or of trajectories.

    Raises:
        ValueError: the folder holds neither, or its manifest is damaged.
    """
    is_trajectories = read_manifest(folder)["kind"] == Trajectories.kind
    return Trajectories(folder) if is_trajectories else TrainedNetworks(folder)


@dataclass(frozen=True)
class ArtifactSpec(ABC):
    """An artifact that a method requests."""

    kind: ClassVar[str]

    identity: Mapping[str, Any]
    """The part of the identity that has to agree. Keys that are left out, at any level, may have any value."""

    @abstractmethod
    def command(self, dataset: str) -> str:
        """Return the command line that builds the artifact."""

    @abstractmethod
    def open(self, path: Path) -> Artifact:
        """Open the folder that ``find`` returned. Raises ValueError if it is damaged."""

    def compares(self, kind: str) -> bool:
        """Whether ``misfits`` can compare artifacts of this kind with the spec."""
        return kind == self.kind

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        """Return the reasons why an artifact does not meet the spec, for error messages; empty if it does.

        ``compares`` has to accept the kind of the artifact.
        """
        return _differences(_plain(self.identity), manifest["identity"])


@dataclass(frozen=True)
class _BufferSpec(ArtifactSpec):
    """The common part of the specs of buffers."""

    @property
    def classifies(self) -> bool:
        """Whether the classifier has to be trained."""
        return True

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        identity, untrained = manifest["identity"], list[str]()
        if self.classifies and (objective := identity.get("training", {}).get("objective")):
            untrained.append(f"{objective} trained no classifier")
        if self.classifies and identity.get("features_only"):
            untrained.append("no classifier was imported")
        return super().misfits(manifest) + untrained

    def compares(self, kind: str) -> bool:
        return kind in (Trajectories.kind, TrainedNetworks.kind)

    def _command(self, dataset: str) -> list[str]:
        """Return the arguments of ``condense buffer`` that follow from the identity."""
        words = ["condense", "buffer", "--dataset", dataset]
        if "network" in self.identity:
            words += ["--network", self.identity["network"]]
        transform = name_of(self.identity.get("transform", {"kind": "channel"}))
        if transform != "channel":
            words += ["--transform", transform]
        split = self.identity.get("split", {})
        if split.get("val_fraction"):
            words += ["--split.val-fraction", str(split["val_fraction"]), "--split.seed", str(split["seed"])]
        return [*words, *_flags(self.identity.get("training", {}))]


@dataclass(frozen=True)
class TrajectorySpec(_BufferSpec):
    """Expert trajectories of at least this extent."""

    kind: ClassVar[str] = Trajectories.kind

    num_experts: int = 1
    """Minimum number of experts."""
    num_epochs: int = 1
    """Minimum number of epochs of each expert."""
    experts: Literal["any", "sgd", "gsam"] = "any"
    """How the experts were trained. This is not checked for imported experts, where it is unknown."""

    def command(self, dataset: str) -> str:
        words = self._command(dataset)
        if self.experts == "gsam":
            words += ["--rho", "0.01", "--alpha", "0.3"]
        if self.num_experts > 1:
            words += ["--num-experts", str(self.num_experts)]
        return shlex.join([*words, "--num-epochs", str(self.num_epochs)])

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        short = _shortfall(manifest, num_experts=self.num_experts, num_epochs=self.num_epochs)
        if manifest["kind"] != self.kind:
            short.append("only the last epoch is stored")
        training = manifest["identity"].get("training", {})
        actual = "gsam" if training.get("rho") else "sgd"
        if training and self.experts not in ("any", actual):
            short.append(f"experts are trained by {actual}, not {self.experts}")
        return super().misfits(manifest) + short

    def open(self, path: Path) -> Trajectories:
        return Trajectories(path)


@dataclass(frozen=True)
class TrainedNetworkSpec(_BufferSpec):
    """Networks at the end of their training, such as teachers; the last epoch of an expert buffer is accepted too.

    ``identity`` combines ``Task.identity`` for the data and the architecture (of ``task.with_network(name)`` for an
    architecture other than the recipe's) with, if required, the settings ``training``. These have the names and values
    of ``condense buffer``: ``{**task.identity(), "training": {"lr": 0.1, "momentum": 0.9}}``. Settings that are left
    out may have any value. Imported networks do not record their training, so they are accepted only if ``training``
    is left out.
    """

    kind: ClassVar[str] = TrainedNetworks.kind

    num_networks: int = 1
    """Minimum number of networks."""
    num_epochs: int = 1
    """Minimum number of epochs of training."""
    features_only: bool = False
    """Whether only the features are used, so that networks trained without labels are accepted too."""

    @property
    def classifies(self) -> bool:
        return not self.features_only

    def command(self, dataset: str) -> str:
        extent = ["--num-experts", str(self.num_networks)]
        if self.num_epochs > 1:  # the default of the command is more
            extent += ["--num-epochs", str(self.num_epochs)]
        if self.features_only and "objective" not in self.identity.get("training", {}):
            extent += ["--objective", "barlow-twins"]  # any network serves, but such features are what is asked for
        return shlex.join([*self._command(dataset), *extent, "--keep", "last"])

    def misfits(self, manifest: Mapping[str, Any]) -> list[str]:
        is_imported = manifest["identity"].get("origin") == IMPORTED
        epochs = {} if is_imported else {"num_epochs": self.num_epochs}
        return super().misfits(manifest) + _shortfall(manifest, num_experts=self.num_networks, **epochs)

    def open(self, path: Path) -> TrainedNetworks:
        return open_buffer(path)


def _shortfall(manifest: Mapping[str, Any], **minimum: int) -> list[str]:
    return [f"{key} is {manifest[key]}, less than {n}" for key, n in minimum.items() if manifest[key] < n]


def _flags(fields: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Yield the command-line arguments that set these fields."""
    for name, value in fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from _flags(value, f"{flag}.")
        else:
            yield from (flag, str(value))


class BufferWriter:
    """Writes a buffer: experts are added atomically in any order, and ``save`` makes them visible.

    Several processes may write one buffer: ``save`` keeps what the others saved, and ``extend`` never replaces an
    expert by one with fewer epochs. Readers see the experts before the first missing one.

    Args:
        root: the folder of buffers.
        dataset: the name of the data set, for the folder's name.
        identity: everything that determined the snapshots; JSON-serialisable, with the key ``network``.
        weights: weights of the network, for names and shapes.
        keep: the epochs of an expert to store. If it is "last", ``identity`` has to include the number of epochs.
        plan: the settings of the buffer that differ from the defaults, by field, from which a command can repeat it.

    Raises:
        ValueError: the folder holds a damaged manifest or another buffer.
    """

    def __init__(
        self,
        root: Path,
        dataset: str,
        identity: Mapping[str, Any],
        weights: Weights,
        keep: Keep = "all",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.identity = _plain(identity)
        self._key = _hash(self.identity)
        self.folder = root / folder_name(dataset, self.identity)
        self._kind = Trajectories.kind if keep == "all" else TrainedNetworks.kind
        self._fixed = {
            "kind": self._kind,
            "format": FORMAT,
            "dataset": dataset,
            "identity": self.identity,
            "params": [[name, list(t.shape)] for name, t in weights.params.items()],
            "buffers": [[name, list(t.shape)] for name, t in weights.buffers.items()],
            **({} if plan is None else {"plan": _plain(plan)}),
        }
        self.experts: list[dict[str, Any] | None] = self._saved()
        """The manifest's record of each expert, or None if it is missing; ``num_epochs`` is its extent."""
        self._added: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The experts before the first missing one."""
        result = []
        for expert in self.experts:
            if expert is None:
                break
            result.append(expert)
        return result

    @property
    def shortest(self) -> int:
        """The number of epochs of the shortest complete expert; 0 if there are none."""
        return min((expert["num_epochs"] for expert in self.complete), default=0)

    def make_folder(self) -> None:
        """Create the folder. ``add`` calls this; call it earlier to find out before training that it can be written.

        Raises:
            ValueError: the folder cannot be created.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot create {self.folder}: {error.strerror}; choose another folder") from error

    def epochs(self, expert: int) -> int:
        """Return the number of epochs of an expert; 0 if it is missing."""
        record = self.experts[expert] if expert < len(self.experts) else None
        if record is None or not (self.folder / expert_file(expert)).exists():
            return 0
        return int(record["num_epochs"])

    def add(
        self, expert: int, params: Tensor, buffers: Tensor, record: Mapping[str, Any], num_epochs: int | None = None
    ) -> None:
        """Write an expert, or replace an existing one.

        Args:
            params, buffers: (R, P) and (R, B), rows made by ``pack``; R is the number of epochs plus one for the
                initialisation, or 1 if only the last epoch is stored.
            record: further entries for the manifest.
            num_epochs: the number of epochs that it was trained for; by default R - 1.
        """
        self.make_folder()
        tables = {"params": params} | ({"buffers": buffers} if buffers.shape[1] else {})
        header = {
            "kind": "expert",
            "format": FORMAT,
            "buffer": self._key,
            "rows": {name: [_checksum(row) for row in table] for name, table in tables.items()},
        }
        with replacing(self.folder / expert_file(expert)) as fresh:
            save_file(fresh, tables, {"condense": canonical_json(header)})
        self._added[expert] = {"num_epochs": len(params) - 1 if num_epochs is None else num_epochs, **record}
        self._place(self._added)

    def save(self) -> None:
        """Write the manifest with the experts added here since the last call and those that other processes saved."""
        with locked(self.folder / MANIFEST):
            self._save()

    def extend(self, expert: int, params: Tensor, buffers: Tensor, record: Mapping[str, Any], num_epochs: int) -> None:
        """Add and save an expert, unless another process has saved it with as many epochs or more in the meantime.

        The arguments are those of ``add``.

        Raises:
            ValueError: as ``refuse_shorter`` does; the files cannot be written.
        """
        self.make_folder()
        with locked(self.folder / MANIFEST):
            self.experts = self._saved()
            if self.epochs(expert) < num_epochs:
                self.refuse_shorter(num_epochs)
                self.add(expert, params, buffers, record, num_epochs)
                self._save()

    def refuse_shorter(self, num_epochs: int) -> None:
        """Raise ValueError if a new expert of ``num_epochs`` epochs would shorten the buffer."""
        if num_epochs < self.shortest:
            raise ValueError(
                f"{self.folder} has experts of {self.shortest} epochs: new ones of {num_epochs} would shorten the "
                f"buffer; give {spelt('num_epochs', self.shortest)}"
            )

    def _save(self) -> None:
        self.experts = self._saved()
        self._place(self._added)
        extent = {"num_experts": len(self.complete), "num_epochs": self.shortest, "experts": self.experts}
        manifest = self._fixed | extent
        text = json.dumps(manifest | {"checksum": _hash(manifest)}, indent=1, allow_nan=False)
        write_text(self.folder / MANIFEST, text + "\n")
        self._added = {}

    def _saved(self) -> list[dict[str, Any] | None]:
        """Return the experts of the manifest. Raises ValueError if it belongs to another buffer."""
        if not (self.folder / MANIFEST).exists():
            return []
        manifest = read_manifest(self.folder, self._kind)
        changes = _differences({k: v for k, v in self._fixed.items() if k not in ("dataset", "plan")}, manifest)
        if changes:
            raise ValueError(f"{self.folder} is another buffer: {changes[0]}; choose another folder")
        return list(manifest["experts"])

    def _place(self, records: Mapping[int, dict[str, Any]]) -> None:
        for expert, record in records.items():
            self.experts += [None] * (expert + 1 - len(self.experts))
            self.experts[expert] = record


def find(root: Path, spec: ArtifactSpec, dataset: str, option: str = "buffers") -> Path:
    """Return the only folder under ``root`` that meets the spec; ``root`` may itself be that folder. Errors name the
    user's ``option`` of the folder.

    Raises:
        ValueError: ``root`` is a file; no folder meets the spec (the message says how the closest one differs and gives
            the command that builds one); several do; a manifest is damaged.
    """
    if root.is_file():
        raise ValueError(f"{root} is a file; give {spelt(option)} the folder of a buffer, or the folder above it")
    is_artifact = (root / MANIFEST).is_file()
    folders = [root] if is_artifact else sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    manifests = {folder: read_manifest(folder) for folder in folders}
    misfits = {f: spec.misfits(manifest) for f, manifest in manifests.items() if spec.compares(manifest["kind"])}
    fitting = [folder for folder, reasons in misfits.items() if not reasons]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(folder.name for folder in fitting)
        raise ValueError(f"several buffers in {root} fit {dataset}: {names}; choose one with {spelt(option)}")
    why = "there are none"
    if misfits:
        closest = min(misfits, key=lambda folder: len(misfits[folder]))
        why = f"the closest is {closest.name}, where {', '.join(misfits[closest][:3])}"
    out = "" if is_artifact or root == DEFAULT_ROOT else f" --out {shlex.quote(str(root))}"
    in_python = dataset not in datasets.names() and not expanded(dataset).exists()  # the CLI cannot load such data
    prefix = "make_buffer in Python, with the same data and the fields of " if in_python else ""
    command = f"{prefix}`{spec.command(dataset)}{out}`"
    raise ValueError(f"no {spec.kind} for {dataset} in {root}: {why}; build them with {command}")


def identities(root: Path, kind: str, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the identities of the artifacts under ``root`` that agree with ``like`` in all of its keys."""
    manifests = [read_manifest(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))]
    candidates = [dict(manifest["identity"]) for manifest in manifests if manifest["kind"] == kind]
    return [identity for identity in candidates if not _differences(_plain(like), identity)]


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read the manifest of an artifact.

    Raises:
        ValueError: it is missing, was changed after it was written, has another format, or is not of this kind.
    """
    path = folder / MANIFEST
    manifest = read_json(path, fix="restore it, or give the folder of a buffer")
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum != _hash(manifest):
        raise ValueError(f"{path} is damaged: its checksum does not match; restore it, or move {folder} away")
    head = from_json(_Manifest, manifest, str(path))
    if head.format != FORMAT or kind not in (None, head.kind):
        actual, expected = f"{printable(head.kind, 60)} of format {head.format}", f"{kind or 'format'} {FORMAT}"
        raise ValueError(f"{folder} holds {actual}, not {expected}; give another folder")
    if head.kind in (Trajectories.kind, TrainedNetworks.kind):
        from_json(_BufferManifest, manifest, str(path))
    return dict(manifest)


@dataclass(frozen=True)
class _Manifest:
    """The fields of every artifact's manifest."""

    kind: str
    format: int
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class _Identity:
    """The fields of a buffer's identity that this module uses."""

    network: str
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "trained"


@dataclass(frozen=True)
class _Expert:
    num_epochs: int

    def __post_init__(self) -> None:
        if self.num_epochs < 0:
            raise ValueError(f"an expert has {self.num_epochs} epochs")


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _BufferManifest:
    """The other fields of a buffer's manifest; see ``BufferWriter.save``."""

    dataset: str
    identity: _Identity
    params: _Shapes
    buffers: _Shapes
    num_experts: int
    num_epochs: int
    experts: tuple[_Expert | None, ...]

    def __post_init__(self) -> None:
        sides = [side for _, shape in (*self.params, *self.buffers) for side in shape]
        if not all(0 <= side < 2**48 for side in sides):
            raise ValueError("it has a shape with a negative or far too large side")
        first_missing = self.experts.index(None) if None in self.experts else len(self.experts)
        extents = [expert.num_epochs for expert in self.experts[:first_missing] if expert is not None]
        stated, listed = (self.num_experts, self.num_epochs), (len(extents), min(extents, default=0))
        if stated != listed:
            raise ValueError(
                f"it states {stated[0]} experts of {stated[1]} epochs, but lists {listed[0]} of {listed[1]}"
            )


@dataclass(frozen=True)
class _ExpertHeader:
    """The header of one expert's file."""

    buffer: str
    rows: Mapping[str, Sequence[str]]
    """The checksums of the rows of each table."""


def folder_name(dataset: str, identity: Mapping[str, Any]) -> str:
    """Return the name of a buffer's folder: data set, network and the first digits of the hash of its identity."""
    return "-".join([_slug(dataset), _slug(identity["network"]), _hash(_plain(identity))[:8]])


def expert_file(expert: int) -> str:
    return f"expert_{expert:04d}.safetensors"


def pack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return parameters or buffers as one row, a float32 vector on the CPU that shares no memory with them."""
    parts = [tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors.values()]
    return torch.cat([torch.empty(0), *parts])


def _unpack(row: Tensor, layout: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    parts = row.split([math.prod(shape) for _, shape in layout])
    return {name: part.view(tuple(shape)) for (name, shape), part in zip(layout, parts, strict=True)}


def _checksum(row: Tensor) -> str:
    digest = hashlib.blake2b(f"{row.dtype} {tuple(row.shape)}\n".encode(), digest_size=16)
    digest.update(row.numpy().data)
    return digest.hexdigest()


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``value`` as it is read back from JSON."""
    return dict(json.loads(canonical_json(value)))


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")


def _differences(expected: Any, actual: Any, where: str = "") -> list[str]:
    """Return where ``actual`` differs from ``expected`` in the keys of ``expected``."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        pairs = [(f"{where}.{key}".lstrip("."), value, actual.get(key)) for key, value in expected.items()]
        return [line for name, ours, theirs in pairs for line in _differences(ours, theirs, name)]
    return [] if expected == actual else [f"{where} is {_brief(actual)}, not {_brief(expected)}"]


def _brief(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 40 else f"{text[:36]}..."

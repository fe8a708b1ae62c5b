"""Import networks that were trained elsewhere: single networks and published trajectories.

Published trajectories are files ``replay_buffer_N.pt``, as written by the code of MTT and its descendants. Each file is
a list of experts, each expert a list of epochs (the initialisation first), and each epoch a list of tensors: the
parameters in the order of the network, without names. The files do not record the data or the training. They are
therefore matched by the shapes of the parameters, and the caller gives the rest. They hold no BatchNorm statistics.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.artifacts import IMPORTED, BufferWriter, pack
from condense.buffers.trajectories import measure_accuracy, measure_probe
from condense.compute import Compute
from condense.exchange.weights import match, read_state_dict
from condense.files import checksum, read_foreign
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.rng import Rng
from condense.task import Task
from condense.train import Scorer


def import_replay_buffers(
    src: Path, dst_root: Path, task: Task, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write published trajectories as a buffer under ``dst_root`` and return its folder.

    The buffer becomes visible once it is complete. Its manifest records ``origin: imported`` and does not specify how
    the experts were trained. A warning says what could not be verified.

    Args:
        src: a folder of ``replay_buffer_N.pt`` files, or one such file. One file at a time is held in memory.
        dst_root: the folder of buffers.
        task: the data set, split, transform and network to which the user assigns the experts.
        progress: called with (files done, total files).

    Raises:
        ValueError: there are no such files, or they hold anything other than lists of tensors; the tensors do not fit
            the network or are not finite; all snapshots are the same; the buffer exists already or cannot be written.
    """
    files = _files(src)
    params = task.network.init(Rng(0), "layout").params
    identity = {**task.identity(), "origin": IMPORTED}
    writer = BufferWriter(dst_root, task.name, identity, Weights(params, {}))
    if writer.experts:
        raise ValueError(f"{writer.folder} was imported already; move it away or choose another destination")
    with _removed_on_failure(writer.folder):
        for done, file in enumerate(files, 1):
            for number, expert in enumerate(_items(_load(file), str(file), "experts")):
                table = _table(expert, task.network, f"{file}, expert {number}")
                writer.add(len(writer.experts), table, table[:, :0], {"origin": IMPORTED})
            if progress is not None:
                progress(done, len(files))
        writer.save()
    warnings.warn(
        f"{len(writer.experts)} experts were imported to {writer.folder} by the shapes of their parameters: Condense "
        f"cannot verify that they belong to {task.name}, this transform and network; it is recorded as given",
        stacklevel=2,
    )
    return writer.folder


def import_weights(src: Path, dst_root: Path, task: Task, *, features_only: bool = False) -> Path:
    """Write one network that was trained elsewhere as a buffer of its last epoch, and return its folder.

    The manifest records ``origin: imported`` and the accuracy on at most 5000 training images and on any validation
    split. It does not specify how the network was trained. With ``features_only`` it records the accuracy of a linear
    probe instead, and that the classifier was not trained.

    Args:
        src: a state dict, see ``condense.exchange.weights``.
        dst_root: the folder of buffers.
        task: the data set, split, transform and network to which the user assigns the weights.
        features_only: whether the classifier keeps its initial values. That of the file is ignored: it may be absent,
            or of another data set.

    Raises:
        ValueError: the file holds no state dict, or one that does not fit the network; the same weights were imported
            already; the folder cannot be written. No partially written buffer is left behind.
    """
    network = task.network
    weights = match(read_state_dict(src), network, str(src), features_only=features_only)
    digest = checksum({**weights.params, **weights.buffers})
    identity = {**task.identity(), "origin": IMPORTED, "weights": digest}
    if features_only:
        identity["features_only"] = True
    writer = BufferWriter(dst_root, task.name, identity, weights, "last")
    if writer.experts:
        raise ValueError(f"{writer.folder} holds these weights already; use it, or choose another destination")
    if features_only:
        accuracies = measure_probe(task, Compute(compile=False), Rng(0))(weights)
    else:
        accuracies = measure_accuracy(task, Scorer(network, Compute(compile=False)), Rng(0))(weights)
    with _removed_on_failure(writer.folder):
        params, buffers = (pack(part)[None] for part in weights)
        record = {"origin": IMPORTED, **{name: [value] for name, value in accuracies.items()}}
        writer.add(0, params, buffers, record, num_epochs=0)
        writer.save()
    return writer.folder


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder that was made inside the context, if an exception leaves it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _files(src: Path) -> list[Path]:
    if src.is_file():
        return [src]
    names = [(re.fullmatch(r"replay_buffer_(\d+)\.pt", path.name), path) for path in src.glob("*.pt")]
    numbered = sorted((int(match[1]), path) for match, path in names if match)
    if not numbered:
        raise ValueError(f"no replay_buffer_N.pt in {src}: nothing to import; give the folder of these files")
    return [path for _, path in numbered]


def _load(file: Path) -> Any:
    return read_foreign(file, holds="lists of tensors", save_as="a list of lists of lists of tensors")


def _items(value: Any, where: str, what: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        actual = "an empty one" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{where}: expected a list of {what}, found {actual}; give files written by the code of MTT")
    return list(value)


def _table(expert: Any, network: Functional, where: str) -> Tensor:
    """Return the snapshots of one expert as a tensor (E + 1, P)."""
    rows = []
    for epoch, value in enumerate(_items(expert, where, "epochs")):
        tensors = _items(value, f"{where}, epoch {epoch}", "tensors")
        if len(tensors) != len(network.shapes):
            raise ValueError(
                f"{where}, epoch {epoch}: it holds {len(tensors)} tensors, but {network.name} has "
                f"{len(network.shapes)}; give the {spelt('network')} that was trained"
            )
        snapshot = dict(zip(network.shapes, tensors, strict=True))
        for name, tensor in snapshot.items():
            actual = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            if actual != network.shapes[name]:
                raise ValueError(
                    f"{where}, epoch {epoch}: {name} is {actual}, but {network.shapes[name]} in {network.name}; "
                    f"give the {spelt('network')} and {spelt('dataset')} of the training"
                )
        rows.append(pack(snapshot))
        if not rows[-1].isfinite().all():
            raise ValueError(
                f"{where}, epoch {epoch}: it holds numbers that are not finite, as of a training that diverged; import "
                "the files of the other experts"
            )
    if len(rows) < 2 or torch.equal(rows[0], rows[-1]):
        raise ValueError(
            f"{where}: the first and the last snapshot are the same, so it is not a trajectory (on a CPU the code of "
            "MTT stores the final weights for every epoch); train experts with `condense buffer`"
        )
    return torch.stack(rows)

"""The files of the weights of the networks that an evaluation keeps."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from condense.eval.protocol import Protocol
from condense.eval.subject import Subject
from condense.exchange.weights import write_state_dict
from condense.names import spelt
from condense.networks import Factory, Functional, Weights


class Kept:
    """The files of one evaluation, which are moved into their folder once it has ended: one that was stopped leaves
    none there, and the same command starts again."""

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        networks: Sequence[str | Factory],
        plans: Sequence[Protocol],
        num_seeds: int,
    ) -> None:
        """
        Raises:
            ValueError: the folder has one of the files, or two protocols have one name.
        """
        self.folder, self.unfinished = folder, folder / ".unfinished"
        skeletons = [subject.network(network) for network in networks]
        cells = ((network, plan.name, k) for network in skeletons for plan in plans for k in range(num_seeds))
        self._names = [file_name(*cell) for cell in cells]
        if len(set(self._names)) < len(self._names):
            raise ValueError(
                f"the files that {spelt('keep')} writes are named after networks and protocols; give each once"
            )
        for file in [folder / name for name in self._names]:
            if file.exists():
                raise ValueError(f"{file} exists already; give {spelt('keep')} with another folder, or move it away")

    def finish(self) -> None:
        """Move the files, also those of other processes."""
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.unfinished / name, self.folder / name)
        with contextlib.suppress(OSError):  # another evaluation writes here, too
            self.unfinished.rmdir()


def file_name(network: Functional, protocol: str, k: int) -> str:
    """Return the name of the file of the weights of the k-th network that is trained under a protocol."""
    return re.sub(r"[^\w.=-]+", "-", f"{network.name}-{protocol}-{k}") + ".safetensors"


def write(folder: Path, network: Functional, protocol: str, numbers: Sequence[int], k: int, weights: Weights) -> None:
    """Write the weights of the k-th of several networks, which have these numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_state_dict(folder / file_name(network, protocol, numbers[k]), network, weights)

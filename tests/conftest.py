"""Fixtures that several test files share."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condense import api, privacy
from condense.artifacts import TrainedNetworks
from condense.compute import Compute
from condense.data.datasets import Arrays, load
from condense.eval.protocol import PROTOCOLS
from condense.methods import rcig
from condense.networks import Functional, Weights
from condense.rng import seed_globally
from condense.teachers import Teacher

TINY = "convnet:depth=1,width=4"
"""A network that is small enough to be trained many times."""
BATCH = f"{TINY},norm=batch"
"""The same with BatchNorm, whose statistics some methods need."""


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let this process write files of that many bytes at most, as if the disk were full."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that use it are skipped if it does not exist."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (../shared/data) is not on this machine")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test the same numbers whatever ran before it, also where it draws from the global generator."""
    seed_globally(0)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Wait for no disk: what is written there matters after a loss of power alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def known_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give private methods the same noise in every run."""
    monkeypatch.setattr(privacy, "secret_key", lambda: 0)


@pytest.fixture
def double_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers and their features are in float64."""
    weights = TrainedNetworks.weights

    def of_double(self: TrainedNetworks, index: int, network: Functional) -> Weights:
        params, buffers = weights(self, index, network)
        return Weights(*({name: t.double() for name, t in part.items()} for part in (params, buffers)))

    def embedder(self: Teacher, compute: Compute) -> Any:
        return lambda x: self.network.features(*self.weights, x, train=False)

    monkeypatch.setattr(TrainedNetworks, "weights", of_double)
    monkeypatch.setattr(Teacher, "embedder", embedder)


@pytest.fixture(scope="module")
def short_protocol() -> Iterator[None]:
    """The protocol that is used where none is named has fewer epochs."""
    canonical = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS.own, "canonical", canonical)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests a cache of their own, so that the user's cache is neither read nor written.

    All processes share one folder of compiled code for each instruction set; the code of another one computes NaN.
    """
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        compiled = Path(tempfile.gettempdir(), f"condense-tests-{os.getuid()}", instructions)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        yield


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three classes of 8x8 images that differ in brightness, with 12 + 6 images per class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, num in (("train", 36), ("test", 18)):
        labels = np.arange(num) % 3
        levels = (30 + 80 * labels)[:, None, None] + rng.integers(0, 40, (num, 8, 8))
        arrays |= {f"x_{part}": levels.astype(np.uint8), f"y_{part}": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file: Path) -> Arrays:
    return load(tiny_file)


@pytest.fixture(scope="session")
def tiny_buffer(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A buffer of two experts of four epochs on the tiny data."""
    root = tmp_path_factory.mktemp("artifacts")
    return api.make_buffer(tiny, TINY, num_experts=2, num_epochs=4, batch_size=12, lr=0.1, out=root, compute=Compute())


@pytest.fixture(scope="session")
def tiny_buffers(tiny: Arrays, tiny_buffer: Path) -> Path:
    """A folder with ``tiny_buffer``, and with a buffer of a network with BatchNorm."""
    root = tiny_buffer.parent
    api.make_buffer(tiny, BATCH, num_experts=2, num_epochs=4, batch_size=12, lr=0.1, out=root, compute=Compute())
    return root


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """RCIG looks for its learning rates from near where it finds them."""
    monkeypatch.setattr(rcig, "FIRST_LR_INNER", 3e-2)
    monkeypatch.setattr(rcig, "FIRST_LR_ADJOINT", 1e2)

"""The processes that share a piece of work, as torchrun started them.

Every process runs the same program; what is divided is dealt out by rank, and results meet in one sum. All
draws are keyed, so the number of processes changes nothing but the order in which numbers are added up.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from condense.names import spelt

if TYPE_CHECKING:  # the command line's front door comes here, and --help must not wait for torch
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long a process waits for the others. One that ended is noticed by its connection, at once; this bounds how
much longer than another one may work."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that share the work; alone by default.

    Raises:
        ValueError: from every method that meets the other processes, where one of them ended.
    """

    rank: int = 0
    """Number of this process, from 0; the first one writes and speaks for all."""
    size: int = 1
    """Number of processes."""
    restarted: bool = False
    """The launcher started all of them again, after one failed."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def deal(self, items: Sequence[T]) -> Sequence[T]:
        """The share of this process: every ``size``-th item. The shares are disjoint and leave nothing out."""
        return items[self.rank :: self.size]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all processes, in place: any shapes, one device, the same in every process."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            _exchanged.append(flat)
            with _meeting():
                dist.all_reduce(flat)
            _scatter(flat, tensors)

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by those of the first process, in place: any shapes, types and devices."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        with torch.no_grad():
            for group in alike.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in group])
                _exchanged.append(flat)
                with _meeting():
                    dist.broadcast(flat, 0)
                _scatter(flat, group)

    def barrier(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            import torch

            self.sum_([torch.zeros(1)])

    @contextlib.contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first process goes through the block before the others: what it fetches or caches they find."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


_exchanged: collections.deque[Tensor] = collections.deque(maxlen=4)
"""What the processes exchanged last. A thread of gloo may let go of it as late as the group ends: of tensors that are
held here it can, of others it would ask the interpreter, which waits for this thread or has ended."""


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Meet the other processes of torchrun, for the work inside; only the first one passes warnings on.

    Outside torchrun, or where there is one process, no process group is made.

    Args:
        device: cpu, cuda or auto. With CUDA each process takes the GPU of its number on the machine.

    Raises:
        ValueError: a device that processes cannot share; fewer GPUs than processes; the others are not to be found.
    """
    rank, size = rank_of_environment(), _of_environment("WORLD_SIZE", 1)
    restarts = _of_environment("TORCHELASTIC_RESTART_COUNT", 0)
    if size <= 1:
        yield Ranks(restarted=restarts > 0)
        return
    import torch
    import torch._dynamo  # optimisers import it; if it comes after the group, the group's threads outlive the group
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if _take_gpu(device) else "gloo"
    try:
        store = _fresh_store(rank) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot meet the other processes: {reason}; start all of them with torchrun") from error
    try:
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            total = torch.tensor([restarts])  # each machine's launcher counts for itself
            Ranks(rank, size).sum_([total])
            ranks = Ranks(rank, size, restarted=bool(total))
            yield ranks
            ranks.barrier()
    finally:
        dist.destroy_process_group()


def rank_of_environment() -> int:
    """Number of this process as torchrun says it; 0 outside torchrun.

    Raises:
        ValueError: the environment says something that is no number.
    """
    return _of_environment("RANK", 0)


def _of_environment(name: str, otherwise: int) -> int:
    """A whole number that torchrun puts into the environment, at least 0."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ValueError(f"the environment has {name}={text!r}, which is no number of torchrun's; unset {name}")
    return int(text)


def _fresh_store(rank: int) -> Store:
    """Where the processes of this attempt find each other.

    The launcher's store outlives them: after a restart it still holds the addresses of those that are gone. So the
    first process opens a store of its own, and only its port, with a name to know it by, goes to the launcher's.
    """
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launchers = dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)
    if rank == 0:
        store, name = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE), uuid.uuid4().hex
        store.set(name, "")
        launchers.set("condense", f"{store.port} {name}")
        return store
    while True:
        left, name = launchers.get("condense").decode().split()
        with contextlib.suppress(OSError, RuntimeError):  # of an earlier attempt: nobody answers there, or a stranger
            socket.create_connection((host, int(left)), timeout=5).close()  # refused at once; a store tries for long
            store = dist.TCPStore(host, int(left), is_master=False, timeout=datetime.timedelta(seconds=5))
            if store.check([name]):
                store.set_timeout(PATIENCE)
                return store
        time.sleep(0.1)


def _take_gpu(device: str) -> bool:
    """Make the GPU of this process the current one, which is what ``cuda`` means from here on; False on a CPU.

    Raises:
        ValueError: there is none for this process, or all would share one.
    """
    import torch

    if device == "auto" and torch.backends.mps.is_available():
        device = "mps"
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"processes of torchrun do not share {spelt('device', device)}; give {spelt('device', 'cpu')}, cuda or auto"
        )
    local, there = _of_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= there:
        raise ValueError(
            f"process {local} of this machine has no GPU, there are {there}; give torchrun --nproc-per-node {there}"
            if there
            else f"there is no GPU on this machine; give {spelt('device', 'cpu')}"
        )
    torch.cuda.set_device(local)
    return True


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Around a collective, which fails where a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            "another process of this run ended before its work was done; the same torchrun command continues "
            "(distill: with --resume)"
        ) from error


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))

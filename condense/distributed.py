"""Work that is divided among the processes of torchrun.

Every process runs the same program. The work is sharded by rank, and results are combined by collectives. All random
draws are keyed, so the number of processes changes only the order in which numbers are added up.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from condense.names import spelt

if TYPE_CHECKING:  # the command line imports this module, and --help must not wait for torch
    from torch import Tensor
    from torch.distributed import TCPStore

T = TypeVar("T")

PATIENCE = "CONDENSE_PATIENCE"
"""Environment variable with the number of seconds for which a process waits for another one before it gives up."""
USUAL_PATIENCE = 24 * 3600.0
"""Default of that variable, in seconds. It limits how much longer than the others a process may work between two
collectives, for instance on its last expert. A process that ended is noticed at once, because its connection breaks."""
JOINING = 1800.0
"""Seconds within which all processes have to start."""
SAID_AFTER = 30.0
"""Seconds of waiting after which a warning names the missing processes; repeated each time the wait has doubled."""
HEARD_WITHIN = 10.0
"""Seconds for which a failing process waits until the others know about the failure."""
YIELDED = 1.0
"""Seconds for which a process whose connection broke lets others report first: one that gave up waiting breaks the
connections of all others, and knows the reason."""


class AnotherFailed(ValueError):
    """Another process of this run failed first and reports the reason, so this one reports nothing."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes that share the work; a single process by default.

    Raises:
        ValueError: in every method that waits for the other processes, if one of them ended.
    """

    rank: int = 0
    """Number of this process, from 0. Process 0 writes the files and prints."""
    size: int = 1
    """Number of processes."""
    restarted: bool = False
    """Whether the launcher restarted all processes after one failed."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return every ``size``-th item, from item ``rank``. The shards are disjoint and cover all items."""
        return items[self.rank :: self.size]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Sum the tensors over all processes, in place. Shapes are arbitrary but the same in every process; all tensors
        are on one device."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            _exchanged.append(flat)
            with _collective(flat):
                dist.all_reduce(flat)
            _scatter(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by those of the first process, in place. Shapes, types and devices are arbitrary."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        with torch.no_grad():
            for group in groups.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in group])
                _exchanged.append(flat)
                with _collective(flat):
                    dist.broadcast(flat, 0)
                _scatter(flat, group)

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process.

        Args:
            value: any object that can be pickled; only processes of this run read the pickle.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(gathered, value)
        self.barrier()  # tensors of `all_gather_object` are not in `_exchanged`; that of the barrier is, and is last
        return gathered

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            import torch

            self.all_reduce_([torch.zeros(1)])

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block in the first process before the others, which then find what it downloaded or cached."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


_exchanged: collections.deque[Tensor] = collections.deque(maxlen=4)
"""The tensors of the last collectives. A thread of gloo may release a tensor only when the process group is destroyed.
If that were the last reference, the thread would need the Python interpreter, which then waits for the thread or has
already ended. References are therefore held here."""


@contextlib.contextmanager
def init_distributed(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group of torchrun for the duration of the ``with`` block; only the first process shows warnings.

    Outside torchrun, or with a single process, no process group is created.

    Args:
        device: cpu, cuda or auto. With CUDA each process uses the GPU of its local rank.

    Raises:
        ValueError: the processes cannot share the device, there are fewer GPUs than processes, or the other processes
            cannot be reached.
    """
    rank, size = rank_of_environment(), size_of_environment()
    restarts = _of_environment("TORCHELASTIC_RESTART_COUNT", 0)
    if size <= 1:
        yield Ranks(restarted=restarts > 0)
        return
    import torch
    import torch._dynamo  # optimisers import it; if it comes after the group, the group's threads outlive the group
    import torch.distributed as dist

    backend, seconds = "cpu:gloo,cuda:nccl" if _take_gpu(device) else "gloo", patience()
    global _watch
    watch = _watch = _Watch(rank, size, seconds)
    try:
        with _collective():
            store = _store(rank, datetime.timedelta(seconds=watch.patience))
            watch.start_queries(store)
            store.set(f"joins {rank}", "")
            store.wait([f"joins {other}" for other in range(size)])
            limit = datetime.timedelta(seconds=seconds)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            total = torch.tensor([restarts])  # the launcher of each machine has its own count
            Ranks(rank, size).all_reduce_([total])
            ranks = Ranks(rank, size, restarted=bool(total))
            yield ranks
            ranks.barrier()
            watch.close()
            ranks.barrier()  # no process may still query the store when the first one closes it
    except AnotherFailed:
        raise
    except Exception as error:
        if not watch.may_report():
            raise watch.another_failed() from error
        raise
    finally:
        _watch = None
        if dist.is_initialized():
            dist.destroy_process_group()  # breaks the connections, so processes that wait notice it
        watch.leave()


def rank_of_environment() -> int:
    """Return the rank that torchrun gave to this process; 0 outside torchrun.

    Raises:
        ValueError: the environment variable is not a number.
    """
    return _of_environment("RANK", 0)


def size_of_environment() -> int:
    """Return the number of processes that torchrun started; 1 outside torchrun.

    Raises:
        ValueError: the environment variable is not a number.
    """
    return _of_environment("WORLD_SIZE", 1)


def _of_environment(name: str, default: int) -> int:
    """Return an environment variable that torchrun sets to an integer of at least 0."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment has {name}={text!r}, which is not a number from torchrun; unset {name}")
    return int(text)


def patience() -> float:
    """Return the number of seconds for which a process waits for another one.

    Raises:
        ValueError: the environment variable is not a positive number of at most 1e9.
    """
    text = os.environ.get(PATIENCE, str(USUAL_PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 1e9:
        raise ValueError(f"{PATIENCE} is {text!r}, which is not a number of seconds; set for example {PATIENCE}=3600")
    return seconds


def _store(rank: int, limit: datetime.timedelta) -> TCPStore:
    """Return the store through which the processes of this attempt find each other.

    The launcher's store outlives the processes: after a restart it still holds the addresses of the previous ones. The
    first process therefore opens its own store, and writes only its port and a unique name to the launcher's store.

    Raises:
        ValueError: the environment gives no address.
        RuntimeError: the first process did not open the store within ``limit``.
    """
    import torch.distributed as dist

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        why = f"MASTER_PORT is {port!r}, which is not a number" if host else "MASTER_ADDR is not set"
        raise ValueError(f"cannot reach the other processes: {why}; start all of them with torchrun")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False, timeout=limit)
    launcher_store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
    if rank == 0:
        store, name = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit), uuid.uuid4().hex
        store.set(name, "")
        launcher_store.set("condense", f"{store.port} {name}")
        return store
    while True:
        store_port, name = launcher_store.get("condense").decode().split()
        with contextlib.suppress(OSError, RuntimeError):  # a port of an earlier attempt is closed or used by others
            socket.create_connection((host, int(store_port)), timeout=5).close()  # fails at once; TCPStore would retry
            store = dist.TCPStore(host, int(store_port), is_master=False, timeout=datetime.timedelta(seconds=5))
            if store.check([name]):
                store.set_timeout(limit)
                return store
        time.sleep(0.1)


def _take_gpu(device: str) -> bool:
    """Make the GPU of this process the current CUDA device. Return False if the run uses the CPU.

    Raises:
        ValueError: there is no GPU for this process, or the device is not one that each process can have for itself.
    """
    import torch

    if device == "auto" and torch.backends.mps.is_available():
        device = "mps"
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"several processes cannot share {spelt('device', device)}; give {spelt('device', 'cpu')}, cuda or auto"
        )
    local_rank, num_gpus = _of_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"there is no GPU for local rank {local_rank}, this machine has {num_gpus}; "
            f"give torchrun --nproc-per-node {num_gpus}"
            if num_gpus
            else f"there is no GPU on this machine; give {spelt('device', 'cpu')}"
        )
    torch.cuda.set_device(local_rank)
    return True


class _Watch:
    """Observes the other processes while this one waits for them in a collective.

    One thread exchanges the state of the processes through the store, another one shows warnings. The first process
    hosts the store. While that process is stopped, a request to the store does not return.
    """

    def __init__(self, rank: int, size: int, seconds: float) -> None:
        self.rank, self.size, self._seconds = rank, size, seconds
        self.collective = -1
        """Number of the current or last collective of this process. The numbers agree in all processes; 0 is the start,
        where the processes join."""
        self.since: float | None = None
        """Monotonic time at which this process began to wait; None while it works."""
        self._seen: dict[int, int] = {}
        """By rank, the last collective in which the process was seen."""
        self._answered = time.monotonic()
        """Monotonic time of the last answer of the store."""
        self._failed = False
        """Whether this process has failed and asks to report the reason."""
        self._reporter: int | None = None
        """Rank of the process that reports the reason."""
        self._informed: set[int] = set()
        """Ranks of the processes that know about the failure."""
        self._closed, self._now = threading.Event(), threading.Event()
        self._querying: threading.Thread | None = None
        threading.Thread(target=self._warn, daemon=True).start()

    @property
    def patience(self) -> float:
        """Seconds for which this process waits in the current collective."""
        return self._seconds if self.collective else min(self._seconds, JOINING)

    def start_queries(self, store: TCPStore) -> None:
        """Start the thread that queries the store, with its own connection."""
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=HEARD_WITHIN)
        own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=limit)
        self._querying = threading.Thread(target=self._query, args=(own,), daemon=True)
        self._querying.start()

    def missing(self) -> list[int]:
        """Return the ranks that have not arrived in the current collective; only 0 if the store does not answer."""
        if self.rank and (self._querying is None or time.monotonic() - self._answered > HEARD_WITHIN):
            return [0]
        return [rank for rank in range(self.size) if rank != self.rank and self._seen.get(rank, -1) < self.collective]

    def may_report(self) -> bool:
        """Ask to report the failure of the run. Return False if another process failed first."""
        self._failed = True
        self._until(lambda: self._reporter is not None)
        return self._reporter in (None, self.rank)

    def another_failed(self) -> AnotherFailed:
        return AnotherFailed(f"process {self._reporter} of this run failed first and reports the reason")

    def close(self) -> None:
        """Stop both threads."""
        self._closed.set()
        self._now.set()
        if self._querying is not None:
            self._querying.join(HEARD_WITHIN)

    def leave(self) -> None:
        """Stop both threads. The first process, if it reports a failure, first waits until all processes know it."""
        if self._reporter == self.rank == 0:  # the store ends with this process
            self._until(lambda: len(self._informed) == self.size)
        self.close()

    def _until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done`` is true, for at most ``HEARD_WITHIN`` seconds and only while the store is queried."""
        end = time.monotonic() + HEARD_WITHIN
        while not done() and time.monotonic() < end and self._querying is not None and self._querying.is_alive():
            self._now.set()
            time.sleep(0.02)

    def _query(self, store: TCPStore) -> None:
        with contextlib.suppress(RuntimeError):  # the first process has ended, and the store with it
            while not self._closed.is_set():
                if self.since is not None:
                    store.set(f"collective {self.rank}", str(self.collective))
                    self._seen = {rank: int(text) for rank, text in self._entries(store, "collective").items()}
                if self._failed:
                    self._reporter = int(store.compare_set("failed", "", str(self.rank)))
                elif store.check(["failed"]):
                    self._reporter = int(store.get("failed"))
                if self._reporter is not None:
                    store.set(f"informed {self.rank}", "")
                    self._informed = set(self._entries(store, "informed"))
                self._answered = time.monotonic()
                self._now.wait(1.0)
                self._now.clear()

    def _entries(self, store: TCPStore, name: str) -> dict[int, bytes]:
        """Return, by rank, the values that processes have stored under this name."""
        existing = [rank for rank in range(self.size) if store.check([f"{name} {rank}"])]
        return {rank: store.get(f"{name} {rank}") for rank in existing}

    def _warn(self) -> None:
        current, due = -1, SAID_AFTER
        while not self._closed.wait(min(1.0, SAID_AFTER)):
            since = self.since
            if current != self.collective:
                current, due = self.collective, SAID_AFTER
            if since is None or time.monotonic() - since < due:
                continue
            missing = self.missing()
            if missing and self.rank == min(set(range(self.size)) - set(missing)):
                text = (
                    f"process {self.rank} has waited {_duration(due)} for {_processes(missing)}; "
                    f"this run gives up after {_duration(self.patience)}"
                )
                # not `warn`: the filters, which the main thread sets, ignore warnings in most processes
                warnings.showwarning(UserWarning(text), UserWarning, __file__, 0)
            due *= 2


_watch: _Watch | None = None
"""The watch of the process group, while there is one."""


@contextlib.contextmanager
def _collective(tensor: Tensor | None = None) -> Iterator[None]:
    """Surround a collective on ``tensor``; turn its failure, when a process ended or is missing, into a ValueError."""
    watch, begun = _watch, time.monotonic()
    if watch is not None:
        watch.collective, watch.since = watch.collective + 1, begun
    try:
        yield
        if tensor is not None and tensor.is_cuda:  # on a GPU a collective returns before it is done
            import torch

            torch.cuda.synchronize(tensor.device)
    except RuntimeError as error:
        if watch is None:
            raise ValueError(_ENDED) from error
        missing, late = watch.missing(), time.monotonic() - begun >= watch.patience
        if not late:
            time.sleep(YIELDED)
        if not watch.may_report():
            raise watch.another_failed() from error
        raise ValueError(_reason(watch, missing, late, error)) from error
    finally:
        if watch is not None:
            watch.since = None


_RESUME = "run the same torchrun command again (distill: with --resume)"
_ENDED = f"another process of this run ended before its work was done; {_RESUME}"


def _reason(watch: _Watch, missing: Sequence[int], late: bool, error: RuntimeError) -> str:
    """Say in one line why a collective failed."""
    limit = _duration(watch.patience)
    absent = f"waited {limit} for {_processes(missing)}" if missing else ""
    if watch.collective == 0:
        why = absent if late and missing else str(error).splitlines()[0]
        return f"cannot reach the other processes: {why}; start all of them with torchrun"
    if not late:
        return _ENDED
    absent = absent or f"all processes are running, but exchanged no data for {limit}"
    return f"{absent}; end all of them, then {_RESUME}; if a process may take longer than that, set {PATIENCE}=SECONDS"


def _processes(ranks: Sequence[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"


def _duration(seconds: float) -> str:
    """Format seconds in the largest unit (h, min or s) of which there are at least two."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))

"""The processes that share a piece of work, as torchrun started them.

Every process runs the same program; what is divided is dealt out by rank, and results meet in one sum. All
draws are keyed, so the number of processes changes nothing but the order in which numbers are added up.
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

if TYPE_CHECKING:  # the command line's front door comes here, and --help must not wait for torch
    from torch import Tensor
    from torch.distributed import TCPStore

T = TypeVar("T")

PATIENCE = "CONDENSE_PATIENCE"
"""The environment variable that says how many seconds a process waits for another one before it gives up."""
USUAL_PATIENCE = 24 * 3600.0
"""Seconds that apply where that variable is not set. They bound how much longer than the others a process may work
between two meetings, for instance on the last of its experts. That a process ended is noticed at once, because its
connection breaks."""
JOINING = 1800.0
"""Seconds in which all processes have to start."""
SAID_AFTER = 30.0
"""Seconds of waiting after which a warning names the processes that have not arrived; again after twice as long."""
HEARD_WITHIN = 10.0
"""Seconds that a process which fails gives the others to hear of it."""


class AnotherFailed(ValueError):
    """Another process of this run has said what is wrong, so this one has nothing to add."""


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

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The share of this process: every ``size``-th item. The shares are disjoint and leave nothing out."""
        return items[self.rank :: self.size]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all processes, in place: any shapes, one device, the same in every process."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            _exchanged.append(flat)
            with _meeting(flat):
                dist.all_reduce(flat)
            _scatter(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
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
                with _meeting(flat):
                    dist.broadcast(flat, 0)
                _scatter(flat, group)

    def gather_objects(self, value: T) -> list[T]:
        """What every process passed, by rank, in every process alike.

        Args:
            value: any object that can be pickled; only processes of this run read the pickle.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        with _meeting():
            dist.all_gather_object(gathered, value)
        self.barrier()  # torch's own tensors are not in `_exchanged`; those of the barrier are, and come last
        return gathered

    def barrier(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            import torch

            self.all_reduce_([torch.zeros(1)])

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """The first process goes through the block before the others: what it fetches or caches they find."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


_exchanged: collections.deque[Tensor] = collections.deque(maxlen=4)
"""The tensors that were exchanged last. A thread of gloo may drop its reference to a tensor as late as the end of the
group. If that were the last reference, the thread would need Python's interpreter, which waits for the thread or has
ended; so the tensors are held here."""


@contextlib.contextmanager
def init_distributed(device: str = "auto") -> Iterator[Ranks]:
    """Meet the other processes of torchrun, for the work inside; only the first one passes warnings on.

    Outside torchrun, or where there is one process, no process group is made.

    Args:
        device: cpu, cuda or auto. With CUDA each process takes the GPU of its number on the machine.

    Raises:
        ValueError: a device that processes cannot share; fewer GPUs than processes; the others are not to be found.
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
        with _meeting():
            store = _store(rank, datetime.timedelta(seconds=watch.patience))
            watch.ask(store)
            store.set(f"joins {rank}", "")
            store.wait([f"joins {other}" for other in range(size)])
            limit = datetime.timedelta(seconds=seconds)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            total = torch.tensor([restarts])  # each machine's launcher counts for itself
            Ranks(rank, size).all_reduce_([total])
            ranks = Ranks(rank, size, restarted=bool(total))
            yield ranks
            ranks.barrier()
            watch.close()
            ranks.barrier()  # none asks any more when the first process takes the store away
    except AnotherFailed:
        raise
    except Exception as error:
        if not watch.speaks():
            raise watch.another_failed() from error
        raise
    finally:
        _watch = None
        if dist.is_initialized():
            dist.destroy_process_group()  # the others notice it where they wait
        watch.leave()


def rank_of_environment() -> int:
    """Number of this process as torchrun says it; 0 outside torchrun.

    Raises:
        ValueError: the environment says something that is no number.
    """
    return _of_environment("RANK", 0)


def size_of_environment() -> int:
    """Number of processes as torchrun says it; 1 outside torchrun.

    Raises:
        ValueError: the environment holds something else.
    """
    return _of_environment("WORLD_SIZE", 1)


def _of_environment(name: str, otherwise: int) -> int:
    """A whole number that torchrun puts into the environment, at least 0."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ValueError(f"the environment has {name}={text!r}, which is no number of torchrun's; unset {name}")
    return int(text)


def patience() -> float:
    """Seconds that a process waits for another one.

    Raises:
        ValueError: the environment variable holds no positive number.
    """
    text = os.environ.get(PATIENCE, str(USUAL_PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 1e9:
        raise ValueError(f"{PATIENCE} is {text!r}, which is no number of seconds; set it as in {PATIENCE}=3600")
    return seconds


def _store(rank: int, limit: datetime.timedelta) -> TCPStore:
    """Where the processes of this attempt find each other.

    The launcher's store outlives them: after a restart it still holds the addresses of those that are gone. So the
    first process opens a store of its own, and only its port, with a name to know it by, goes to the launcher's.

    Raises:
        ValueError: the environment does not say where.
        RuntimeError: the first process did not open it within the ``limit``.
    """
    import torch.distributed as dist

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        wrong = f"MASTER_PORT is {port!r}, which is no number" if host else "MASTER_ADDR is not set"
        raise ValueError(f"cannot meet the other processes: {wrong}; start all of them with torchrun")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False, timeout=limit)
    launchers = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
    if rank == 0:
        store, name = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit), uuid.uuid4().hex
        store.set(name, "")
        launchers.set("condense", f"{store.port} {name}")
        return store
    while True:
        left, name = launchers.get("condense").decode().split()
        with contextlib.suppress(OSError, RuntimeError):  # of an earlier attempt: nobody answers there, or a stranger
            socket.create_connection((host, int(left)), timeout=5).close()  # refused at once; a store tries for long
            store = dist.TCPStore(host, int(left), is_master=False, timeout=datetime.timedelta(seconds=5))
            if store.check([name]):
                store.set_timeout(limit)
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


class _Watch:
    """What this process knows of the others while it waits for them in a *meeting*, which is a collective operation.

    Two threads run beside the work: one asks the store, the other one warns. The store is a part of the first process,
    and while that process is stopped, a question to the store does not return.
    """

    def __init__(self, rank: int, size: int, seconds: float) -> None:
        self.rank, self.size, self._seconds = rank, size, seconds
        self.meeting = -1
        """Number of the meeting that this process waits in, or was in last. All processes count alike; in meeting 0
        they join."""
        self.since: float | None = None
        """When it began to wait, by the monotonic clock; None while it works."""
        self._seen: dict[int, int] = {}
        """The last meeting that each process was seen waiting in."""
        self._answered = time.monotonic()
        """When the store answered last."""
        self._fails = False
        """This process would like to say why the run fails."""
        self._speaker: int | None = None
        """The process that does."""
        self._heard: set[int] = set()
        """Processes that know it."""
        self._closed, self._now = threading.Event(), threading.Event()
        self._asking: threading.Thread | None = None
        threading.Thread(target=self._warn, daemon=True).start()

    @property
    def patience(self) -> float:
        """Seconds that this process waits in the meeting it is in."""
        return self._seconds if self.meeting else min(self._seconds, JOINING)

    def ask(self, store: TCPStore) -> None:
        """Begin to ask the store about the others, through a connection that serves nothing else."""
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=HEARD_WITHIN)
        own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=limit)
        self._asking = threading.Thread(target=self._ask, args=(own,), daemon=True)
        self._asking.start()

    def missing(self) -> list[int]:
        """The processes that have not come to the meeting in which this one waits."""
        if self.rank and (self._asking is None or time.monotonic() - self._answered > HEARD_WITHIN):
            return [0]
        return [rank for rank in range(self.size) if rank != self.rank and self._seen.get(rank, -1) < self.meeting]

    def speaks(self) -> bool:
        """This process is to say why the run fails; False where another one was first."""
        self._fails = True
        self._until(lambda: self._speaker is not None)
        return self._speaker in (None, self.rank)

    def another_failed(self) -> AnotherFailed:
        return AnotherFailed(f"process {self._speaker} of this run failed first, and says why")

    def close(self) -> None:
        """Ask and warn no more."""
        self._closed.set()
        self._now.set()
        if self._asking is not None:
            self._asking.join(HEARD_WITHIN)

    def leave(self) -> None:
        """``close``, once the others know that the run fails and who says why."""
        if self._speaker == self.rank == 0:  # the store goes with this process
            self._until(lambda: len(self._heard) == self.size)
        self.close()

    def _until(self, done: Callable[[], bool]) -> None:
        """Return once ``done`` is true, after ``HEARD_WITHIN`` seconds, or where no thread asks the store."""
        end = time.monotonic() + HEARD_WITHIN
        while not done() and time.monotonic() < end and self._asking is not None and self._asking.is_alive():
            self._now.set()
            time.sleep(0.02)

    def _ask(self, store: TCPStore) -> None:
        with contextlib.suppress(RuntimeError):  # the first process is gone, and the store with it
            while not self._closed.is_set():
                if self.since is not None:
                    store.set(f"meeting {self.rank}", str(self.meeting))
                    self._seen = {rank: int(text) for rank, text in self._said(store, "meeting").items()}
                if self._fails:
                    self._speaker = int(store.compare_set("failed", "", str(self.rank)))
                elif store.check(["failed"]):
                    self._speaker = int(store.get("failed"))
                if self._speaker is not None:
                    store.set(f"heard {self.rank}", "")
                    self._heard = set(self._said(store, "heard"))
                self._answered = time.monotonic()
                self._now.wait(1.0)
                self._now.clear()

    def _said(self, store: TCPStore, what: str) -> dict[int, bytes]:
        """What each process said under this name, of those that said anything."""
        there = [rank for rank in range(self.size) if store.check([f"{what} {rank}"])]
        return {rank: store.get(f"{what} {rank}") for rank in there}

    def _warn(self) -> None:
        meeting, due = -1, SAID_AFTER
        while not self._closed.wait(min(1.0, SAID_AFTER)):
            since = self.since
            if meeting != self.meeting:
                meeting, due = self.meeting, SAID_AFTER
            if since is None or time.monotonic() - since < due:
                continue
            missing = self.missing()
            if missing and self.rank == min(set(range(self.size)) - set(missing)):
                have = "has" if len(missing) == 1 else "have"
                text = (
                    f"{_processes(missing)} {have} not arrived where process {self.rank} has waited for "
                    f"{_duration(due)}; this run gives up after {_duration(self.patience)}"
                )
                # not `warn`: filters are the affair of the main thread, and in most processes they drop warnings
                warnings.showwarning(UserWarning(text), UserWarning, __file__, 0)
            due *= 2


_watch: _Watch | None = None
"""That of the process group, while there is one."""


@contextlib.contextmanager
def _meeting(tensor: Tensor | None = None) -> Iterator[None]:
    """Around a collective on ``tensor``, which fails where a peer is gone or does not come."""
    watch, begun = _watch, time.monotonic()
    if watch is not None:
        watch.meeting, watch.since = watch.meeting + 1, begun
    try:
        yield
        if tensor is not None and tensor.is_cuda:  # there a collective returns before the others have come
            import torch

            torch.cuda.synchronize(tensor.device)
    except RuntimeError as error:
        if watch is None:
            raise ValueError(_ENDED) from error
        missing, late = watch.missing(), time.monotonic() - begun >= watch.patience
        if not watch.speaks():
            raise watch.another_failed() from error
        raise ValueError(_reason(watch, missing, late, error)) from error
    finally:
        if watch is not None:
            watch.since = None


_AGAIN = "the same torchrun command continues (distill: with --resume)"
_ENDED = f"another process of this run ended before its work was done; {_AGAIN}"


def _reason(watch: _Watch, missing: Sequence[int], late: bool, error: RuntimeError) -> str:
    """Why a meeting failed, in one line."""
    limit = _duration(watch.patience)
    absent = f"{_processes(missing)} did not arrive within {limit}" if missing else ""
    if watch.meeting == 0:
        why = absent if late and missing else str(error).splitlines()[0]
        return f"cannot meet the other processes: {why}; start all of them with torchrun"
    if not late:
        return _ENDED
    absent = absent or f"the processes exchanged nothing for {limit}, though all of them are there"
    return f"{absent}; end all of them, then {_AGAIN}; if a process may take longer than that, set {PATIENCE}=SECONDS"


def _processes(ranks: Sequence[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"


def _duration(seconds: float) -> str:
    """In the largest unit of which there are at least two."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))

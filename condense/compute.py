"""How to compute: what may be traded between exactness and speed, as one value of the recipe."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from condense.allocator import keep_freed_memory
from condense.cache import Cache, cache_folder
from condense.files import check_writable
from condense.names import spelt
from condense.schema import Checked

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Compute(Checked):
    """What is unset is settled once, by ``resolved``; until then it counts as off.

    ``compile``, ``autocast`` and ``channels_last`` act on first-order work (training, features, gradients of real
    data). Second-order work is compiled too, but stays float32 unless ``adjoint_dtype`` says otherwise.
    """

    exact: bool = False
    """Eager float32 throughout, without TF32; on a CPU bit-reproducible with the same machine and threads."""
    compile: bool | None = None
    """Send the hot functions through torch.compile."""
    autocast: Literal["none", "bfloat16"] | None = None
    """Arithmetic of first-order forward and backward passes."""
    channels_last: bool | None = None
    """Memory layout of images in first-order work; series and clips have but one."""
    micro_batch: int | None = None
    """Most images of one pass where a method matches a whole class or set; bounds the memory."""
    vmap_batch: int | None = None
    """Most images of classes whose second-order work is done together; one class at a time where each has more."""
    networks: int | None = None
    """Experts, or networks of an evaluation, that one process trains at once (vmap)."""
    adjoint_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of second-order work. bfloat16 is faster, and its meta-gradient off by percents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("micro_batch", "vmap_batch", "networks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"compute.{name} must be at least 1, got {value}; leave it out")
        fast = {
            "compile": bool(self.compile),
            "autocast": self.autocast == "bfloat16",
            "channels_last": bool(self.channels_last),
            "adjoint_dtype": self.adjoint_dtype == "bfloat16",
        }
        clash = [name for name, on in fast.items() if on and self.exact]
        if clash:
            raise ValueError(f"compute.exact excludes compute.{clash[0]}; give one of them")

    def resolved(self, work: float, device: torch.device, earlier: Mapping[str, Any] | None = None) -> Compute:
        """This policy with nothing left open.

        Args:
            work: planned floating-point operations of all that the policy is for, not of what remains of it; so the
                answer is the same for a run that is resumed, and for any number of processes.
            device: its type decides, and whether it has bfloat16 arithmetic.
            earlier: the fields settled when the run began; what is unset here is taken from there.
        """
        row = _TABLE.get(device.type, _Row())
        fast = not self.exact and work >= row.fast_from
        settled: dict[str, Any] = {
            "compile": fast,
            "autocast": "bfloat16" if fast and has_bfloat16(device) else "none",
            "channels_last": fast and row.channels_last,
            "micro_batch": row.micro_batch,
            "vmap_batch": row.vmap_batch if fast else 1,
            "networks": 1,  # more did not pay on two cores; not measured on a GPU
        }
        if earlier is not None:
            settled |= {name: earlier[name] for name in settled if earlier.get(name) is not None}
        unset: dict[str, Any] = {name: value for name, value in settled.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Inside, an exact policy has float32 products and convolutions without TF32 or bfloat16, whatever the process
        allows elsewhere; on leaving that is as it was before."""
        if not self.exact:
            yield
            return
        before = [switch.get() for switch in _PRECISIONS]
        try:
            for switch in _PRECISIONS:
                switch.set_(switch.full)
            yield
        finally:
            for switch, value in zip(_PRECISIONS, before, strict=True):
                switch.restore(value)

    def first_order_identity(self) -> dict[str, Any]:
        """What decides the bits of plain training."""
        found: dict[str, Any] = {"compile": bool(self.compile), "autocast": self.autocast or "none"}
        if self.channels_last:
            found["channels_last"] = True
        if (self.networks or 1) > 1:
            found["networks"] = self.networks
        return found

    def layout(self, images: Tensor) -> Tensor:
        """Samples (N, *input_shape) as first-order work wants them in memory; series and clips stay as they are."""
        if self.channels_last and images.dim() == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def first_order(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """``fn`` under this policy; for functions that are differentiated at most once.

        What does not compile runs eagerly, with one warning. Keep the returned function: what it compiled goes
        with it.
        """
        cast = autocast(fn, device, self.autocast)
        return compiled_or_eager(cast) if self.compile else cast

    def second_order(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """``fn``, a loss that is differentiated twice, in ``adjoint_dtype``; whoever differentiates it compiles."""
        return autocast(fn, device, self.adjoint_dtype)


class _Precision(NamedTuple):
    """One of PyTorch's switches for the arithmetic of float32 numbers."""

    get: Callable[[], Any]
    set_: Callable[[Any], None]
    full: Any
    """Its value for arithmetic of full precision."""
    inherits: Any = None
    """The value that lets it follow PyTorch's switch for all operations, where there is such a switch."""

    @staticmethod
    def of(owner: Any, name: str, full: Any, inherits: Any = None) -> _Precision:
        get, set_ = functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)
        return _Precision(get, set_, full, inherits)

    def restore(self, value: Any) -> None:
        """Give it back the value that ``get`` gave; where it can be inherited, so that it still is."""
        if self.inherits is not None:
            self.set_(self.inherits)
        if self.get() != value:
            self.set_(value)


def _precisions() -> list[_Precision]:
    """By the interface that this PyTorch has: it refuses to be asked by the older one once the newer was used."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        operations = [
            *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
            *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
        ]
        return [_Precision.of(operation, "fp32_precision", "ieee", "none") for operation in operations]
    matmul = _Precision(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    return [matmul, _Precision.of(backends.cudnn, "allow_tf32", False)]


_PRECISIONS = _precisions()


class _Row(NamedTuple):
    fast_from: float = float("inf")
    """Planned floating-point operations from which compilation and bfloat16 pay."""
    channels_last: bool = False
    micro_batch: int = 256
    vmap_batch: int = 1


_TABLE = {
    # Two cores: compiling costs about 10 s and saves 2 s in 1e12 operations; vmap over classes wins with one image
    # a class and loses with ten.
    "cpu": _Row(fast_from=2e13, vmap_batch=16),
    # Not measured yet.
    "cuda": _Row(fast_from=1e15, channels_last=True, micro_batch=2048, vmap_batch=2048),
}


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            supported = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
            return any(check() for check in supported if check is not None)
    return False


def device_name(device: torch.device) -> str:
    """Of the GPU by its maker, else of the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def forget_peak(device: torch.device) -> None:
    """Begin anew to look for the most memory; the process's own most, which a CPU has, cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took since ``forget_peak``, else the most that the process ever held; 0
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(fn: Callable[..., Any], device: torch.device, dtype: str | None) -> Callable[..., Any]:
    if dtype != "bfloat16":
        return fn

    @functools.wraps(fn)
    def cast(*inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return fn(*inputs)

    return cast


MAX_VARIANTS = 64
"""How many variants of one function (shapes, static inputs) torch.compile may keep."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Settings of torch.compile, in force where a compiled function is called.

    Random numbers (dropout) come from the global generators in the order of the code, as they do eagerly: a function
    and its derivative, compiled apart, then draw the same ones from the same state.
    """
    from torch._inductor import config  # importing it makes the cache folder, which ``keep_compiled`` chooses

    with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS), config.patch(fallback_random=True):
        yield


def compiled_or_eager(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` through torch.compile; from the first failure on as it is, with one warning."""
    compiled = torch.compile(fn, dynamic=False)
    failed = False

    def call(*inputs: Any) -> Any:
        nonlocal failed
        if failed:
            return fn(*inputs)
        try:
            with compiling():
                return compiled(*inputs)
        except Exception as error:
            output = fn(*inputs)  # an error of its own is raised again here, undisguised
            failed = True
            reason = next(iter(str(error).splitlines()), "")
            warnings.warn(f"{fn.__name__} runs eagerly, it does not compile: {reason}", stacklevel=2)
            return output

    return call


def keep_compiled(folder: Path | None) -> None:
    """Let torch.compile keep what it makes in ``folder`` from run to run, unless the environment names a place.

    torch makes this folder when it imports its compiler, and fails where it cannot; it also fails to compile where the
    path has spaces, quotes or backslashes. In these cases, with a warning, and without ``folder`` the place is a
    temporary folder, which is removed when the process ends.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    place = Path(named) if named else folder
    if place is not None:
        try:
            if set(str(place.absolute())) & (set("'\"\\ ") - {os.sep}):
                raise ValueError(
                    f"compilers do not take the path {place}; set TORCHINDUCTOR_CACHE_DIR to another folder"
                )
            check_writable(place)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
            return
        except ValueError as error:
            warnings.warn(f"compiled code is not kept: {error}", stacklevel=2)
    scratch = tempfile.mkdtemp(prefix="condense-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch


def choose_compiled_folder() -> None:
    """Choose where torch.compile keeps what it makes. Call it before torch's compiler is imported.

    Each instruction set has a folder of its own: torch takes code of another one from its cache, which gives NaN.
    """
    _compiled.close()
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    cache = Cache(cache_folder(), "compiled")
    folder = _compiled.enter_context(cache.held({"instructions": instructions}, about=instructions))
    keep_compiled(folder if folder is not None and os.access(folder, os.W_OK) else None)


_compiled = contextlib.ExitStack()
"""Holds the entry of the cache in which this process keeps compiled code."""


def prepare_device(name: str) -> torch.device:
    """The device of this name, with the process made ready for work on it.

    Raises:
        ValueError: see ``resolve_device``.
    """
    device = resolve_device(name)
    choose_compiled_folder()
    if device.type == "cpu":
        keep_freed_memory()
    return device


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first of cuda, mps and cpu that is there; any other name must be usable now."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}; give {spelt('device', 'cpu')}") from error
    return device

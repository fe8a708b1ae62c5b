"""The compute policy of a recipe: how exactness is traded for speed."""

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
    """The compute policy. Unset fields are chosen by ``resolved``; until then they count as off.

    ``compile``, ``autocast`` and ``channels_last`` apply to first-order work (training, features, gradients on real
    data). Second-order work is compiled too, but runs in ``adjoint_dtype``.
    """

    exact: bool = False
    """Compute everything in eager float32 without TF32. On a CPU the results are bit-reproducible with the same machine
    and number of threads."""
    compile: bool | None = None
    """Compile the most expensive functions with torch.compile."""
    autocast: Literal["none", "bfloat16"] | None = None
    """Autocast dtype of first-order forward and backward passes."""
    channels_last: bool | None = None
    """Use the channels-last memory format for images in first-order work; series and clips are not affected."""
    micro_batch: int | None = None
    """Largest number of images per pass where a method matches a whole class or set; it limits the memory."""
    vmap_batch: int | None = None
    """Largest number of images in classes whose second-order work is vectorised together (vmap); classes with more
    images are processed one at a time."""
    networks: int | None = None
    """Number of experts, or of networks in an evaluation, that one process trains side by side; networks with dropout
    are trained one at a time."""
    graph: bool | None = None
    """Capture steps as CUDA graphs; the results are the same. Steps that read the device are not captured."""
    tf32: bool | None = None
    """Use TF32 for float32 products and convolutions on a GPU: about ten bits of their mantissas."""
    adjoint_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of second-order work. bfloat16 is faster, but changes the meta-gradient by a few percent."""

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
            "tf32": bool(self.tf32),
            "adjoint_dtype": self.adjoint_dtype == "bfloat16",
        }
        clash = [name for name, on in fast.items() if on and self.exact]
        if clash:
            raise ValueError(f"compute.exact excludes compute.{clash[0]}; give one of them")

    def resolved(self, work: float, device: torch.device, earlier: Mapping[str, Any] | None = None) -> Compute:
        """Return this policy with a value for every field.

        Args:
            work: planned floating-point operations of the whole run, not of the remaining part. The result is therefore
                the same for a resumed run, and for any number of processes.
            device: its type and its support of bfloat16 determine the defaults.
            earlier: the fields that were resolved when the run or buffer began, None for those that stayed unset. They
                are used where this policy leaves one unset, unless it is exact and the earlier one was not.
                ``channels_last`` and ``tf32`` are off where they are missing, as in ``first_order_identity``.
        """
        row = _TABLE.get(device.type, _Row())
        fast = not self.exact and work >= row.fast_from
        defaults: dict[str, Any] = {
            "compile": fast,
            "autocast": "bfloat16" if fast and has_bfloat16(device) else "none",
            "channels_last": fast and row.channels_last,
            "micro_batch": row.micro_batch,
            "vmap_batch": row.vmap_batch if fast else 1,
            "networks": row.networks if fast else 1,
            "graph": row.graph,
            "tf32": fast if row.has_tf32 else None,
        }
        if earlier is not None and (earlier.get("exact") or not self.exact):
            defaults |= {"channels_last": False, "tf32": False if row.has_tf32 else None}
            defaults |= {name: earlier[name] for name in defaults if name in earlier}
        unset: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set the precision of float32 products and convolutions inside the context.

        An exact policy disables TF32 and bfloat16. Others enable or disable TF32 on a GPU, if ``tf32`` is set. The
        settings of the process are restored on exit.
        """
        before = [switch.get() for switch in _PRECISIONS]
        try:
            for switch in _PRECISIONS:
                if self.exact or (switch.on_gpu and self.tf32 is not None):
                    switch.set_(switch.reduced if self.tf32 else switch.full)
            yield
        finally:
            for switch, value in zip(_PRECISIONS, before, strict=True):
                switch.restore(value)

    def first_order_identity(self) -> dict[str, Any]:
        """Return the settings that change the exact result of ordinary training."""
        identity: dict[str, Any] = {"compile": bool(self.compile), "autocast": self.autocast or "none"}
        if self.channels_last:
            identity["channels_last"] = True
        if self.tf32:
            identity["tf32"] = True
        return identity

    def layout(self, images: Tensor) -> Tensor:
        """Return samples (N, *input_shape) in the memory format of first-order work; only images are converted."""
        if self.channels_last and images.dim() == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def first_order(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Return ``fn`` under this policy, for functions that are differentiated at most once.

        A function that does not compile runs eagerly, with one warning. Reuse the returned function: compiled code
        belongs to it.
        """
        cast = autocast(fn, device, self.autocast)
        return compiled_or_eager(cast) if self.compile else cast

    def second_order(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Return ``fn``, a loss that is differentiated twice, in ``adjoint_dtype``. The caller compiles its
        derivatives."""
        return autocast(fn, device, self.adjoint_dtype)


class _Precision(NamedTuple):
    """One of PyTorch's settings for the precision of float32 operations."""

    get: Callable[[], Any]
    set_: Callable[[Any], None]
    full: Any
    """Its value for full precision."""
    reduced: Any
    """Its value for TF32."""
    on_gpu: bool
    inherits: Any = None
    """The value with which it follows PyTorch's global setting, if there is one."""

    @staticmethod
    def of(owner: Any, name: str, full: Any, reduced: Any, on_gpu: bool, inherits: Any = None) -> _Precision:
        get, set_ = functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)
        return _Precision(get, set_, full, reduced, on_gpu, inherits)

    def restore(self, value: Any) -> None:
        """Set it to a value that ``get`` returned; a value that was inherited is inherited again."""
        if self.inherits is not None:
            self.set_(self.inherits)
        if self.get() != value:
            self.set_(value)


def _precisions() -> list[_Precision]:
    """Return the settings of this version of PyTorch, which does not allow its two interfaces to be mixed."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        cpu = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
        return [
            _Precision.of(operation, "fp32_precision", "ieee", "tf32", operation in gpu, "none")
            for operation in (*gpu, *cpu)
        ]
    get, set_ = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    matmul = _Precision(get, set_, "highest", "high", on_gpu=True)
    return [matmul, _Precision.of(backends.cudnn, "allow_tf32", False, True, on_gpu=True)]


_PRECISIONS = _precisions()


class _Row(NamedTuple):
    fast_from: float = float("inf")
    """Planned floating-point operations from which compilation and bfloat16 save time."""
    channels_last: bool = False
    micro_batch: int = 256
    vmap_batch: int = 1
    networks: int = 1
    graph: bool = False
    has_tf32: bool = False


_TABLE = {
    # Two cores: compiling costs about 10 s and saves 2 s per 1e12 operations; vmap over classes is faster with one
    # image per class and slower with ten; several networks at once are not faster.
    "cpu": _Row(fast_from=2e13, vmap_batch=16),
    # One H200: one network at a time does not fill it, and eight are slower than four. When compiling pays off, and the
    # two batches, have not been measured.
    "cuda": _Row(
        fast_from=1e15, channels_last=True, micro_batch=2048, vmap_batch=2048, networks=4, graph=True, has_tf32=True
    ),
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
    """Return the model name of a GPU, else the name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def forget_peak(device: torch.device) -> None:
    """Reset the peak memory of a GPU; on a CPU the peak memory of the process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: on a GPU that of tensors since ``forget_peak``, else that of the process since
    its start; 0 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a result depend on besides its inputs, for the keys of caches."""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    facts = {"device": device.type, "capability": capability, "threads": threads, "torch": torch.__version__}
    reduced = [switch.get() == switch.reduced for switch in _PRECISIONS if switch.on_gpu == (device.type == "cuda")]
    return facts | ({"reduced_precision": True} if any(reduced) else {})


def autocast(fn: Callable[..., Any], device: torch.device, dtype: str | None) -> Callable[..., Any]:
    """Return ``fn`` under autocast to bfloat16 if ``dtype`` says so, else ``fn``."""
    if dtype != "bfloat16":
        return fn

    @functools.wraps(fn)
    def cast(*inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return fn(*inputs)

    return cast


MAX_VARIANTS = 64
"""Largest number of variants of one function (shapes, static inputs) that torch.compile may keep."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Apply our settings of torch.compile inside the context, in which compiled functions are called.

    Random numbers (dropout) are drawn from the global generators in the order of the code, as in eager mode. A function
    and its derivative, which are compiled separately, therefore draw the same numbers from the same state. Compiled
    dropout of torch 2.6 draws other numbers than eager dropout, but the same ones each time.
    """
    from torch._inductor import config  # importing it creates the cache folder, which ``keep_compiled`` chooses

    _compile_without_slp()
    with torch._dynamo.config.patch(cache_size_limit=MAX_VARIANTS), config.patch(fallback_random=True):
        yield


@functools.cache
def _compile_without_slp() -> None:
    """Let torch compile code for the CPU without GCC's superword-level parallelism (SLP), in the whole process.

    With it GCC 12.2 miscompiles torch's transposition of 32 x 32 numbers in bfloat16 (AVX-512): some of them are read
    from memory that was never written. torch has no setting for this flag.
    """
    from torch._inductor import cpp_builder

    flags = cpp_builder._get_ffast_math_flags
    if sys.platform == "linux":
        cpp_builder._get_ffast_math_flags = lambda: [*flags(), "fno-tree-slp-vectorize"]


def compiled_or_eager(fn: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
    """Compile ``fn`` with torch.compile; after the first failure it runs eagerly, with one warning.

    With ``dynamic`` one compiled variant serves all ints and shapes.
    """
    compiled = torch.compile(fn, dynamic=dynamic)
    failed = False

    def call(*inputs: Any) -> Any:
        nonlocal failed
        if failed:
            return fn(*inputs)
        try:
            with compiling():
                return compiled(*inputs)
        except Exception as error:
            output = fn(*inputs)  # an error of ``fn`` itself is raised again here, in its original form
            failed = True
            reason = next(iter(str(error).splitlines()), "")
            name = getattr(getattr(fn, "func", fn), "__name__", "a function")  # a partial function has no name itself
            warnings.warn(f"{name} runs eagerly, it does not compile: {reason}", stacklevel=2)
            return output

    return call


def keep_compiled(folder: Path | None) -> None:
    """Cache compiled code in ``folder`` across runs, or in $TORCHINDUCTOR_CACHE_DIR if the user has set it.

    torch itself sets the variable to its default when its compiler is imported, for example by torchvision; this is not
    taken for the user's choice. torch fails if it cannot create this folder when it imports its compiler, and it fails
    to compile if the path has spaces, quotes or backslashes. In these cases a temporary folder is used instead, with a
    warning. It is also used, without a warning, if there is no ``folder``. A temporary folder is removed when the
    process ends.
    """
    from_environment = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    default = from_environment.match("torchinductor_*") and from_environment.parent == Path(tempfile.gettempdir())
    place = folder if from_environment == Path() or default else from_environment
    if place is not None:
        try:
            if set(str(place.absolute())) & (set("'\"\\ ") - {os.sep}):
                raise ValueError(
                    f"compilers do not accept the path {place}; set TORCHINDUCTOR_CACHE_DIR to another folder"
                )
            check_writable(place)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
            return
        except ValueError as error:
            warnings.warn(f"compiled code is not cached: {error}", stacklevel=2)
    scratch = tempfile.mkdtemp(prefix="condense-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch


def choose_compiled_folder() -> None:
    """Choose the folder in which torch.compile caches its code. Call it before torch's compiler is imported.

    Each instruction set has its own folder, because torch also reuses cached code of another one, which gives NaN.
    """
    _compiled.close()
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    cache = Cache(cache_folder(), "compiled")
    folder = _compiled.enter_context(cache.held({"instructions": instructions}, about=instructions))
    keep_compiled(folder if folder is not None and os.access(folder, os.W_OK) else None)


_compiled = contextlib.ExitStack()
"""Holds the cache entry in which this process stores compiled code."""


def prepare_device(name: str) -> torch.device:
    """Return the device of this name, and prepare the process for computing on it.

    Raises:
        ValueError: see ``resolve_device``.
    """
    device = resolve_device(name)
    choose_compiled_folder()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
    if device.type == "cpu":
        keep_freed_memory()
    return device


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is the first of cuda, mps and cpu that is available.

    Raises:
        ValueError: the device cannot be used.
    """
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

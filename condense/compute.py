"""How to compute: what may be traded between exactness and speed, as one value of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The default is eager float32, on a CPU bit-reproducible with the same machine and threads.

    ``compile`` and ``autocast`` act on first-order work (training, feature extraction); second-order work is
    compiled too, but stays float32: a bfloat16 meta-gradient is off by more than ten percent.
    """

    compile: bool = False
    """Send the hot functions through torch.compile; pays off from a few hundred steps on."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Arithmetic of first-order forward and backward passes."""

    def first_order(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """``fn`` under this policy; for functions that are differentiated at most once.

        Keep the returned function: what it compiled goes with it.
        """
        if self.autocast == "bfloat16":
            inner = fn

            def fn(*inputs: Any) -> Any:
                with torch.autocast(device.type, torch.bfloat16):
                    return inner(*inputs)

        return torch.compile(fn, dynamic=False) if self.compile else fn


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
        raise ValueError(f"device {name!r} cannot be used: {reason}; give --device auto or cpu") from error
    return device

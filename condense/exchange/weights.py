"""Export and import of trained weights as state dicts: ``.safetensors``, ``.pt`` or ``.pth``, matched with a network by
name.

A file holds tensors by name, or such a mapping under ``state_dict``, ``model`` or ``model_state_dict``, beside numbers
and text. If all names begin with the prefix of a wrapper (``module.`` of DataParallel, ``_orig_mod.`` of
``torch.compile``, ``model.`` of a Lightning module), it is removed. A ``.pt`` is read with ``weights_only=True``, so no
code in it is run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from condense.files import read_foreign, replacing, require_file
from condense.names import excerpt, reason, spelt
from condense.networks import Functional, Weights
from condense.rng import Rng

_HOLDERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = "write it with torch.save(network.state_dict(), PATH); a set needs a destination that ends in .safetensors"
_COUNTER = "num_batches_tracked"
"""Counter of BatchNorm; files written before PyTorch 0.4.1 lack it."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return tensors by name, without the prefixes of wrappers, on the CPU.

    Raises:
        ValueError: the file is missing or damaged, or holds something else than a state dict.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict; {_REMEDY}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is not a state dict: its entry {excerpt(name, 60)!r} is a {type(value).__name__}, not a "
                f"tensor; {_REMEDY}"
            )
    names = list(content)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) and name != p for name in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, content.values(), strict=True))


def write_state_dict(path: Path, network: Functional, weights: Weights) -> None:
    """Write weights as a ``.safetensors`` state dict, with the names of the network's own ``state_dict``.

    Raises:
        ValueError: the file cannot be written.
    """
    values = {**network.frozen, **weights.params, **weights.buffers}
    tensors = {
        name: values[ours].detach().cpu().contiguous().clone()
        for name, ours in network.published.items()
        if ours in values
    }
    with replacing(path) as fresh:
        fresh.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "network": network.name}))


def _read_pickle(path: Path) -> object:
    content = read_foreign(path, holds="tensors by name", save_as="torch.save(network.state_dict(), PATH)")
    for holder in _HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            return content[holder]
    return content


def _read_safetensors(path: Path) -> object:
    require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if "condense" in (file.metadata() or {}):
                raise ValueError(f"{path} was written by Condense; give a state dict of another program")
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {reason(error)}; download it again") from error


def match(state: Mapping[str, Tensor], network: Functional, where: str, *, features_only: bool = False) -> Weights:
    """Return the weights of ``network`` from a state dict with exactly the same names and shapes.

    Floating-point numbers are converted to float32. Tensors that the architecture fixes (frozen parameters and integer
    buffers, such as tables of indices) must be equal to those of the network. Batch counters may be absent.

    Args:
        where: the file, for messages.
        features_only: whether the classifier keeps its initial values, and entries of its names are ignored.

    Raises:
        ValueError: names or shapes differ (the message gives the first one and similar names); types differ; numbers
            are not finite.
    """
    names, initial = network.published, network.init(Rng(0), "layout")
    if features_only:
        classifier = {name for name, ours in names.items() if ours.startswith("classifier.")}
        names = {name: ours for name, ours in names.items() if name not in classifier}
        state = {name: tensor for name, tensor in state.items() if name not in classifier}
    required = [name for name in names if not name.endswith(_COUNTER)]
    _check_names(list(state), required, list(names), f"{where} does not fit {network.name}")
    values = {**network.frozen, **initial.params, **initial.buffers}
    for name, tensor in state.items():
        ours, expected = names[name], values[names[name]]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{where} does not fit {network.name}: {name} has shape {tuple(tensor.shape)}, not "
                f"{tuple(expected.shape)}; give {spelt('network')} and {spelt('dataset')} as it was trained"
            )
        value = _checked(tensor, expected, f"{name} in {where}")
        is_fixed = ours in network.frozen or not expected.is_floating_point()
        if is_fixed and not name.endswith(_COUNTER) and not torch.equal(value, expected):
            raise ValueError(
                f"{name} in {where} differs from the fixed value in {network.name}, which is never trained; give "
                f"{spelt('network')} as it was trained"
            )
        values[ours] = value
    return Weights(*({name: values[name] for name in part} for part in initial))


def _check_names(given: Sequence[str], required: Sequence[str], known: Sequence[str], culprit: str) -> None:
    missing, extra = [name for name in required if name not in given], [name for name in given if name not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], extra, n=2, cutoff=0.5)
        similar = f" (it has {' and '.join(excerpt(name, 60) for name in near)})" if near else ""
        raise ValueError(
            f"{culprit}: it lacks {_first(missing)}{similar}; give {spelt('network')} as it was trained, or rename the "
            "entries"
        )
    if extra:
        near = difflib.get_close_matches(extra[0], known, n=2, cutoff=0.5)
        similar = f" (similar: {' and '.join(near)})" if near else ""
        raise ValueError(
            f"{culprit}, which has no {_first(extra)}{similar}; give {spelt('network')} as it was trained, or remove "
            "these entries"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(excerpt(name, 60) for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _checked(tensor: Tensor, expected: Tensor, what: str) -> Tensor:
    """Return a tensor with the device and type of ``expected``; raise ValueError if it cannot be used."""
    is_plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not is_plain or tensor.is_quantized or tensor.dtype not in (*_FLOATS, torch.int64, torch.int32, torch.bool):
        raise ValueError(f"{what} is a {tensor.dtype} tensor that cannot be read; save it as float32")
    if tensor.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"{what} holds {tensor.dtype}, not {expected.dtype}; save it in that type")
    value = tensor.detach().to(expected)
    if not value.isfinite().all():
        raise ValueError(f"{what} has numbers that are not finite; give weights of a training that did not diverge")
    return value

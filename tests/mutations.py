"""Damage files, for tests that a reader either accepts a file or refuses it in one line.

All draws come from the ``random.Random`` that is passed in. The ``reseal_*`` functions recompute the checksums of a
file, as anybody who edits one can, so that only its fields are wrong.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from random import Random
from typing import Any

import safetensors.torch
import torch

from condense.files import checksum

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "pixels", "\x1b[31mred", "[red]", "é" * 100, "a\nb", "\ud800", "../..", "9" * 50),
    *([], {}, [[]], [None], [1, 2, 3], ["a"], {"name": "dct"}, {"": 0}, [0] * 50, [[1, 8, 8]]),
)
"""Values that are invalid for nearly every field."""


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Apply one to three changes: flip a bit; cut, zero, double or randomise a segment; truncate; append bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 2, 8, 64))
        match rng.choice(("flip", "flip", "cut", "zero", "double", "noise", "truncate", "append")):
            case "flip" if changed:
                changed[start % len(changed)] ^= 1 << rng.randrange(8)
            case "cut":
                del changed[start : start + size]
            case "zero":
                changed[start : start + size] = bytes(len(changed[start : start + size]))
            case "double":
                changed[start:start] = changed[start : start + size]
            case "noise":
                changed[start : start + size] = rng.randbytes(size)
            case "truncate":
                del changed[start:]
            case "append":
                changed += rng.randbytes(size)
    return bytes(changed)


def mutate_json(value: Any, rng: Random) -> Any:
    """Return a copy with one to three changes at any depth: a value is replaced by one of ``ODD``, removed, doubled,
    renamed, wrapped in a list, swapped with another or shifted."""
    changed = {"": copy.deepcopy(value)}
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        holder, key = rng.choice(places)
        match rng.choice(("odd", "odd", "odd", "remove", "double", "rename", "wrap", "swap", "nudge")):
            case "remove" if holder is not changed:
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case "rename" if isinstance(holder, dict) and holder is not changed:
                holder[f"{key}x"] = holder.pop(key)
            case "wrap":
                holder[key] = [holder[key]]
            case "swap":
                other, theirs = rng.choice(places)
                holder[key], other[theirs] = copy.deepcopy(other[theirs]), copy.deepcopy(holder[key])
            case "nudge" if isinstance(holder[key], int | float):
                holder[key] = holder[key] + rng.choice((-1, 1, 1000, 0.5))
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return changed.get("")


def mutate_tensors(data: bytes, rng: Random) -> bytes:
    """Change the header, the layout or the tensors of a set, checkpoint or teacher, and recompute its checksums."""
    return reseal_tensors(*_mutated(*split_safetensors(data), rng))


def mutate_expert(data: bytes, rng: Random) -> bytes:
    """Change the header, the layout or the rows of an expert's file. Recompute the checksums unless the header was
    changed."""
    layout, body = split_safetensors(data)
    changed, new = _mutated(layout, body, rng)
    in_header = isinstance(changed, dict) and changed.get("__metadata__") != layout["__metadata__"]
    return join_safetensors(changed, new) if in_header else reseal_expert(changed, new)


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the layout, which is the JSON at the beginning of the file, and the bytes of the tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(layout: Any, body: bytes) -> bytes:
    """Join a layout, which may be any JSON value, and the bytes of the tensors: inverse of ``split_safetensors``."""
    head = _dumps(layout).encode()
    return len(head).to_bytes(8, "little") + head + body


def reseal_tensors(layout: Any, body: bytes) -> bytes:
    """Join a file of ``write_tensors`` (set, checkpoint, teacher) with correct checksums, as far as it is readable."""
    with contextlib.suppress(Exception):
        header = json.loads(layout["__metadata__"]["condense"])
        with contextlib.suppress(Exception):
            header["sha256"] = checksum(safetensors.torch.load(join_safetensors(layout, body)))
        header.pop("header_sha256", None)
        header["header_sha256"] = hashlib.sha256(_dumps(header).encode()).hexdigest()
        layout["__metadata__"]["condense"] = _dumps(header)
    return join_safetensors(layout, body)


def reseal_expert(layout: Any, body: bytes) -> bytes:
    """Join the file of an expert with correct checksums of its rows, as far as it is readable."""
    with contextlib.suppress(Exception):
        tensors = safetensors.torch.load(join_safetensors(layout, body))
        header = json.loads(layout["__metadata__"]["condense"])
        header["rows"] = {name: [_row_checksum(row) for row in table] for name, table in tensors.items()}
        layout["__metadata__"]["condense"] = _dumps(header)
    return join_safetensors(layout, body)


def reseal_manifest(manifest: Any) -> str:
    """Return the text of a buffer's ``manifest.json`` with a correct checksum."""
    if isinstance(manifest, dict):
        manifest = {name: value for name, value in manifest.items() if name != "checksum"}
        manifest["checksum"] = hashlib.sha256(_dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest, indent=1)


def _row_checksum(row: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{row.dtype} {tuple(row.shape)}\n".encode(), digest_size=16)
    digest.update(row.numpy().tobytes())
    return digest.hexdigest()


def _mutated(layout: dict[str, Any], body: bytes, rng: Random) -> tuple[Any, bytes]:
    match rng.choice(("header", "header", "header", "layout", "body")):
        case "header":
            header = mutate_json(json.loads(layout["__metadata__"]["condense"]), rng)
            return {**layout, "__metadata__": {"condense": _dumps(header)}}, body
        case "layout":
            entries = mutate_json({name: entry for name, entry in layout.items() if name != "__metadata__"}, rng)
            whole = isinstance(entries, dict)
            return {"__metadata__": layout["__metadata__"], **entries} if whole else entries, body
    return layout, mutate_bytes(body, rng) if rng.random() < 0.2 else _same_length(body, rng)


def _same_length(body: bytes, rng: Random) -> bytes:
    """Replace four bytes by random ones, or by a number that is not finite."""
    changed, start = bytearray(body), 4 * rng.randrange(len(body) // 4 or 1)
    odd = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", rng.randbytes(4)))
    changed[start : start + 4] = odd[: len(changed) - start]
    return bytes(changed)


def _places(value: Any) -> Any:
    """Yield (container, key) of every value below ``value``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)


def _dumps(value: Any) -> str:
    """Return canonical JSON, except that NaN and infinities are written as Python's reader accepts them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))

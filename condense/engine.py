"""The loop: init, step by step, checkpoint, log, resume, finalize. Nothing here knows a method."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense.distributed import Ranks
from condense.files import read_tensors, reporting, write_tensors
from condense.method import Context, Method, State, require_finite
from condense.names import reason, spelt
from condense.schema import brief, from_json
from condense.synthetic.files import save
from condense.synthetic.set import SyntheticSet
from condense.tracking import Log, Sink, cut_back

NUM_SNAPSHOTS = 10
CHECKPOINT_SECONDS = 10.0
CHECKPOINT_STEPS = 100
"""A checkpoint is due after so many seconds or steps, whichever comes first; it changes nothing of the result."""

_CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")

Validate = Callable[[SyntheticSet, int], Mapping[str, float]]
"""(set, steps done) -> numbers for the log; called by the engine, provided by whoever has an evaluator."""


OnStep = Callable[[int, Mapping[str, float]], None]
"""(steps done, what the step logged)."""


def compute(method: Method, ctx: Context, on_step: OnStep | None = None) -> SyntheticSet:
    """Distil in memory, without a folder; for baselines.

    Raises:
        ValueError: as ``run``.
    """
    state = method.init(ctx)
    for done in range(method.num_steps):
        record = _step(method, ctx, state, done, None)
        if on_step is not None:
            on_step(done + 1, record)
    return method.finalize(ctx, state, method.num_steps)


def run(
    method: Method,
    ctx: Context,
    state: State,
    folder: Path,
    *,
    resume: bool = False,
    eval_every: int = 0,
    validate: Validate | None = None,
    sinks: tuple[Sink, ...] = (),
    on_step: OnStep | None = None,
) -> SyntheticSet:
    """Distil, beginning with ``state`` as ``method.init`` made it.

    Leaves ``log.jsonl``, ``checkpoint.safetensors``, ``snapshots/`` and ``synthetic.safetensors`` in ``folder``.

    Stopped at any moment and called again with ``resume``, it gives the same bytes as a run that was not stopped.
    Of several processes (``ctx.ranks``) the first one writes all of this and the others read the checkpoint, so the
    folder is shared; process k keeps the parts of its steps in ``log.rank<k>.jsonl``.

    Raises:
        ValueError: the checkpoint belongs to another recipe or is damaged; the disk is full; a loss or gradient
            is not finite (the last good checkpoint is kept); another process ended.
    """
    ranks, parts = ctx.ranks, method.parts(ctx)
    _laid_out(state)
    checkpoint, previous = (folder / name for name in _CHECKPOINTS)
    done, restored = 0, checkpoint
    if resume and has_checkpoint(folder):
        done, restored = _restore(state, ctx, checkpoint, previous)
    keep = previous if restored == checkpoint else None  # a damaged one must not take the place of the good one
    if done > method.num_steps:
        raise ValueError(f"{checkpoint} is of step {done} of {method.num_steps}; choose another {spelt('out')}")
    if ranks.first:
        for file in folder.glob("log*.jsonl"):
            cut_back(file, done)
        if 0 < len(parts) < ranks.size:
            warnings.warn(_idle(method, ctx), stacklevel=2)
    _agree(ranks, done, folder)
    marks = snapshot_steps(method.num_steps)
    with contextlib.ExitStack() as logs:
        log = logs.enter_context(closing(Log(folder / "log.jsonl", sinks))) if ranks.first else None
        shared = ranks.size > 1 and parts
        shares = logs.enter_context(closing(Log(folder / f"log.rank{ranks.rank}.jsonl"))) if shared else None
        if log is not None and done:
            log.write({"event": "resume", "step": done})
        saved_at, saved_time = done, time.monotonic()
        while done < method.num_steps:
            if shares is not None:  # before the step, so that no checkpoint is ahead of it
                shares.write({"step": done + 1, "parts": list(ranks.shard(parts))})
            record = _step(method, ctx, state, done, checkpoint)
            done += 1
            if log is None:
                continue
            if eval_every and validate is not None and (done % eval_every == 0 or done == method.num_steps):
                record |= validate(method.finalize(ctx, state, done), done)
            log.step(done, record)
            if on_step is not None:
                on_step(done, record)
            if done in marks:
                snapshot = folder / "snapshots" / f"step_{done:07d}.safetensors"
                with reporting(snapshot):
                    snapshot.parent.mkdir(exist_ok=True)
                save(method.finalize(ctx, state, done), snapshot)
            due = done - saved_at >= CHECKPOINT_STEPS or time.monotonic() - saved_time >= CHECKPOINT_SECONDS
            if due or done == method.num_steps:
                log.sync()
                _checkpoint(state, ctx, done, checkpoint, keep)
                saved_at, saved_time, keep = done, time.monotonic(), previous
        syn = method.finalize(ctx, state, done)
        if log is not None:
            save(syn, folder / "synthetic.safetensors")
        return syn


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in this folder can be continued; else it starts afresh."""
    return any((folder / name).exists() for name in _CHECKPOINTS)


def snapshot_steps(num_steps: int) -> set[int]:
    """Up to ten steps, evenly spaced in the logarithm, the last one included."""
    exponents = [k / (NUM_SNAPSHOTS - 1) for k in range(NUM_SNAPSHOTS)]
    return {round(num_steps**exponent) for exponent in exponents}


@torch.no_grad()
def image_statistics(syn: SyntheticSet) -> dict[str, float]:
    latents = syn.latents
    mean, std, peak = torch.stack([latents.mean(), latents.std(), latents.abs().max()]).tolist()
    return {"image_mean": mean, "image_std": std, "image_max": peak}


def _step(method: Method, ctx: Context, state: State, done: int, checkpoint: Path | None) -> dict[str, float]:
    """One step and what there is to log of it; nothing that is not finite gets past here."""
    try:
        with ctx.rng.forked("layers", done):  # dropout of foreign networks
            record = method.step(ctx, state, done)
        if ctx.task.device.type == "cuda":  # kernels that add up in no fixed order would lead the processes apart
            live, _ = _laid_out(state)
            ctx.ranks.broadcast([tensor for tensor in live.values() if tensor.is_floating_point()])
        record |= image_statistics(state.syn)
        require_finite(record)
        return record
    except FloatingPointError as error:
        there = checkpoint is not None and checkpoint.exists()
        kept = f"the last good checkpoint is kept in {checkpoint}" if there else "nothing was kept yet"
        raise ValueError(
            f"step {done + 1} is not finite ({error}): the distillation diverged; {kept}; "
            f"lower the learning rate, e.g. {spelt('method.optim.lr')}"
        ) from error
    except RuntimeError as error:
        if not re.search("not (been )?implemented|does not support", str(error)):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{ctx.task.network.name} lacks a derivative that this method takes ({reason}): torch has none for one of "
            f"its layers; give another network, e.g. {spelt('network', 'convnet')}"
        ) from error


def _agree(ranks: Ranks, done: int, folder: Path) -> None:
    """Raise ValueError where the processes would go on from different steps; returns when all are here."""
    total = torch.tensor([done])
    ranks.all_reduce_([total])
    if total.item() != done * ranks.size:
        raise ValueError(
            f"the processes found checkpoints of different steps in {folder}, this one {done}: every machine has to "
            f"see the same folder; give {spelt('out')} on a shared disk"
        )


def _idle(method: Method, ctx: Context) -> str:
    """The warning of processes without a share, with the field that makes more parts, if there is one."""
    parts, size = method.parts(ctx), ctx.ranks.size
    mend = "start fewer"
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if type(value) is int:
            with contextlib.suppress(ValueError):
                if len(dataclasses.replace(method, **{field.name: value + 1}).parts(ctx)) > len(parts):
                    mend += f", or give {spelt(f'method.{field.name}', size)}, which is another recipe"
    idle = f"{size - len(parts)} of {size} processes idle"
    return f"{idle}: a step of this recipe divides among {len(parts)} at most; {mend}"


def _checkpoint(state: State, ctx: Context, done: int, checkpoint: Path, keep: Path | None) -> None:
    tensors, skeleton = _laid_out(state)
    header = {
        "kind": "checkpoint",
        "format": 1,
        "step": done,
        "recipe_hash": ctx.origin.recipe_hash,
        "state": skeleton,
    }
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # a file cannot hold two views of one storage
    write_tensors(checkpoint, copies, header, keep=keep)


def _restore(state: State, ctx: Context, checkpoint: Path, previous: Path) -> tuple[int, Path]:
    """Load the newest readable checkpoint into ``state``; returns the steps done and its file."""
    source = checkpoint
    try:
        tensors, header = read_tensors(source, "checkpoint")
    except ValueError:
        if not previous.exists():
            raise
        source = previous
        tensors, header = read_tensors(source, "checkpoint")
    found = from_json(_Checkpoint, header, str(source))
    if found.recipe_hash != ctx.origin.recipe_hash:
        raise ValueError(
            f"{checkpoint} belongs to another recipe or buffer; choose another {spelt('out')}, or move that run away"
        )
    try:
        template = _fields(state)
        values = _unflatten(template, found.state, tensors, "")
        if not isinstance(values, dict) or values.keys() != template.keys():
            found_names = list(values) if isinstance(values, dict) else values
            raise ValueError(f"it holds {brief(found_names)}, the state of the method has {', '.join(template)}")
    except ValueError as error:
        raise ValueError(
            f"{source} does not fit the state of this method: {error}; choose another {spelt('out')} to begin anew"
        ) from error
    for name, value in values.items():
        setattr(state, name, value)
    return found.step, source


@dataclass(frozen=True)
class _Checkpoint:
    """The header of a checkpoint."""

    step: int
    recipe_hash: str
    state: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step {self.step} is negative")


def _laid_out(state: State) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a state by path, which share memory with it, and its JSON skeleton.

    Two leaves must not share memory: restoring writes into the leaves one after the other, so that the second would
    overwrite the first.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(_fields(state), "", tensors)
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for path, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, width = tensor.data_ptr(), tensor.element_size()
            storage = spans.setdefault(tensor.untyped_storage().data_ptr(), [])
            storage.append((start, start + (last + 1) * width, path))
    for storage in spans.values():
        for (_, end, one), (start, _, other) in itertools.pairwise(sorted(storage)):
            assert end <= start, f"the leaves state{one} and state{other} share memory; let one of them be a copy"
    return tensors, skeleton


def _fields(state: State) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of a value; its tensors go to ``tensors``, by path, and share memory with the value."""
    match value:
        case Tensor():
            assert path not in tensors, f"two leaves of the state are called {path}"
            tensors[path] = value
            return {"tensor": path}
        case nn.Module():
            return {"module": _flatten(dict(value.state_dict()), path, tensors)}
        case torch.optim.Optimizer():
            return {"optimiser": _flatten(value.state_dict(), path, tensors)}
        case dict():
            pairs = [[key, _flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]
            return {"dict": pairs}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_flatten(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"state{path} is a {type(value).__name__}: not a tensor, module, optimiser, number or string")


def _unflatten(template: Any, skeleton: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    """The inverse of ``_flatten``; tensors, modules and optimisers of ``template`` are filled in place.

    Raises:
        ValueError: the skeleton is none, or of another kind than the template.
    """
    if not isinstance(skeleton, dict):
        if isinstance(skeleton, list):
            raise ValueError(f"{brief(skeleton)} at {path!r} is no value")
        _same_kind(template, skeleton, path)
        return skeleton
    if len(skeleton) != 1:
        raise ValueError(f"{brief(skeleton)} at {path!r} is no value")
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor" if isinstance(content, str) and content in tensors:
            return _filled(template, tensors[content], path)
        case "float" if content in ("nan", "inf", "-inf"):
            _same_kind(template, 0.0, path)
            return float(content)
        case "module" if isinstance(template, nn.Module):
            expected = dict(template.state_dict())
            values = _unflatten(expected, content, tensors, path)
            if not isinstance(values, dict) or values.keys() != expected.keys():
                raise ValueError(f"what is kept at {path!r} does not fit: it has other names")
            return _loaded(template, values, path)
        case "optimiser" if isinstance(template, torch.optim.Optimizer):
            values = _unflatten(template.state_dict(), content, tensors, path)
            _check_optimiser(template, values, path)
            return _loaded(template, values, path)
        case "dict" if isinstance(content, list) and (template is None or isinstance(template, dict)):
            pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2]
            if len(pairs) == len(content) and all(isinstance(key, str | int) for key, _ in pairs):
                known = template or {}
                return {key: _unflatten(known.get(key), item, tensors, f"{path}.{key}") for key, item in pairs}
        case "list" | "tuple" if isinstance(content, list) and (template is None or isinstance(template, list | tuple)):
            known_items = [*(template or ()), *[None] * len(content)]
            pieces = enumerate(zip(content, known_items, strict=False))
            items = [_unflatten(like, item, tensors, f"{path}.{i}") for i, (item, like) in pieces]
            return items if kind == "list" else tuple(items)
    raise ValueError(f"{brief(skeleton)} at {path!r} is not what the method keeps there")


def _filled(template: Any, saved: Tensor, path: str) -> Tensor:
    if template is None:
        return saved
    if not isinstance(template, Tensor) or template.dtype != saved.dtype or template.dim() != saved.dim():
        raise ValueError(f"{saved.dtype} of shape {tuple(saved.shape)} at {path!r} is not what the method keeps there")
    if template.shape != saved.shape:
        return saved.to(template.device).requires_grad_(template.requires_grad)
    with torch.no_grad():  # in place: an optimiser may hold this very tensor
        return template.copy_(saved)


def _same_kind(template: Any, value: Any, path: str) -> None:
    """Raise ValueError where a number, text or None stands for something else."""
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (template, value)]
    if template is not None and value is not None and not all(numbers) and type(template) is not type(value):
        raise ValueError(f"{brief(value)} at {path!r} is not what the method keeps there")


def _loaded(template: Any, values: Any, path: str) -> Any:
    try:
        template.load_state_dict(values)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:  # names or shapes that differ
        raise ValueError(f"what is kept at {path!r} does not fit: {reason(error)}") from error
    return template


def _check_optimiser(optimiser: torch.optim.Optimizer, values: Any, path: str) -> None:
    """Raise ValueError where the state does not fit the parameters, which torch would find at a later step."""
    params = [param for group in optimiser.param_groups for param in group["params"]]
    groups = optimiser.state_dict()["param_groups"]
    fits = isinstance(values, dict) and values.keys() == {"state", "param_groups"}
    fits = fits and len(values["param_groups"]) == len(groups)
    fits = fits and all(
        isinstance(ours, dict) and ours.keys() >= theirs.keys() and ours["params"] == theirs["params"]
        for ours, theirs in zip(values["param_groups"], groups, strict=False)
    )
    if not fits:
        raise ValueError(f"the optimiser at {path!r} has other groups of parameters")
    for index, kept in values["state"].items():
        if not isinstance(kept, dict) or not isinstance(index, int) or not 0 <= index < len(params):
            raise ValueError(f"the optimiser at {path!r} has no parameter {brief(index)}")
        for name, tensor in kept.items():
            if isinstance(tensor, Tensor) and tensor.shape not in (torch.Size(), params[index].shape):
                raise ValueError(f"{brief(name)} of parameter {index} at {path!r} has another shape")

"""The distillation loop: initialise, step, checkpoint, log, resume, finalise. It is the same for all methods."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense.distributed import Ranks
from condense.files import read_tensors, reporting, write_tensors
from condense.method import Context, Method, State, Value, require_finite
from condense.names import reason, spelt
from condense.rng import VERSION
from condense.schema import brief, from_json
from condense.synthetic.files import save
from condense.synthetic.set import SyntheticSet
from condense.tracking import Log, Pace, Sink, cut_back, duration

NUM_SNAPSHOTS = 10
CHECKPOINT_SECONDS = 10.0
CHECKPOINT_STEPS = 100
"""A checkpoint is written after so many seconds or steps, whichever comes first. The result does not depend on it."""

READ_SECONDS = 1.0
READ_STEPS: int | None = None
"""The numbers of this many steps are read from the device together, because reading waits for it. None: of each step on
a CPU and with several processes, which wait for one another in every step; else of as many as take ``READ_SECONDS``.
The result does not depend on it."""

MANY_STEPS = 1000
LONG_SECONDS = 3600.0
"""A run of at least so many steps that takes longer than this on a CPU gets a warning."""

LOGGED_SECONDS = 60.0
"""Least estimate of the time left that is written to the log."""

SCRATCH = "scratch"
"""Folder in a run folder for what the method stores between steps (``Context.scratch``)."""

_CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")

Validate = Callable[[SyntheticSet, int], Mapping[str, float]]
"""(set, steps done) -> numbers for the log, computed on validation images; provided by the caller."""

OnStep = Callable[[int, Mapping[str, float]], None]
"""(steps done, logged numbers of the step) -> None; called when the numbers are read, which may be some steps later."""


def compute(method: Method, ctx: Context, on_step: OnStep | None = None) -> SyntheticSet:
    """Distil in memory, without a folder, for baselines.

    Raises:
        ValueError: a loss or gradient is not finite; a layer lacks a derivative that the method needs.
    """
    state = method.init(ctx)
    steps, total = _Steps(method, ctx, state, None, on_step), method.total_steps(ctx)
    for done in range(total):
        steps.advance(done)
        if steps.due or done + 1 == total:
            steps.read()
    return _stored(method, ctx, state, total)


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
    on_save: Callable[[], None] = lambda: None,
) -> SyntheticSet:
    """Distil, starting from ``state`` as ``method.init`` returned it.

    Writes ``log.jsonl``, ``checkpoint.safetensors``, ``snapshots/`` and ``synthetic.safetensors`` to ``folder``.

    A run that is interrupted at any moment and continued with ``resume`` gives the same bytes as an uninterrupted run.
    With several processes (``ctx.ranks``) the first one writes these files and the others read the checkpoint, so all
    must share the folder. Process k logs the parts of each step that it computes in ``log.rank<k>.jsonl``.

    The first process calls ``on_save`` after each checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another recipe or is damaged; the disk is full; a loss or gradient is not
            finite (the error names the first such step; the last good checkpoint is kept); a layer lacks a derivative
            that the method needs; another process ended.
    """
    ranks, parts, total = ctx.ranks, method.parts(ctx), method.total_steps(ctx)
    _laid_out(state)
    checkpoint, previous = (folder / name for name in _CHECKPOINTS)
    done, restored = 0, checkpoint
    if resume and has_checkpoint(folder):
        done, restored = _restore(state, ctx, checkpoint, previous)
    keep = previous if restored == checkpoint else None  # a damaged checkpoint must not replace the good one
    if done > total:
        raise ValueError(f"{checkpoint} is of step {done} of {total}; choose another {spelt('out')}")
    if ranks.first:
        for file in folder.glob("log*.jsonl"):
            cut_back(file, done)
        if 0 < len(parts) < ranks.size:
            warnings.warn(_idle(method, ctx), stacklevel=2)
    _agree(ranks, done, folder)
    marks = snapshot_steps(total)
    with contextlib.ExitStack() as logs:
        log = logs.enter_context(closing(Log(folder / "log.jsonl", sinks))) if ranks.first else None
        shared = ranks.size > 1 and parts
        shares = logs.enter_context(closing(Log(folder / f"log.rank{ranks.rank}.jsonl"))) if shared else None
        if log is not None and done:
            log.write({"event": "resume", "step": done})
        saved_at, saved_time = done, time.monotonic()
        pace, is_estimated = Pace(total), False

        def checkpoint_due() -> bool:
            late = time.monotonic() - saved_time >= CHECKPOINT_SECONDS
            return late or done - saved_at >= CHECKPOINT_STEPS or done == total

        def validates(step: int) -> bool:
            return bool(eval_every and validate) and (step % eval_every == 0 or step == total)

        def report(step: int, record: Mapping[str, float]) -> None:
            nonlocal is_estimated
            if log is None:
                return
            if validate is not None and validates(step):  # the state is of this step
                record = {**record, **validate(_stored(method, ctx, state, step), step)}
            log.step(step, record)
            if on_step is not None:
                on_step(step, record)
            if not is_estimated and (left := pace.left(step)) is not None:
                is_estimated = True
                if left >= LOGGED_SECONDS:
                    log.write({"event": "estimate", "step": step, "seconds_left": round(left)})
                if ctx.task.device.type == "cpu" and total >= MANY_STEPS and left > LONG_SECONDS:
                    warnings.warn(_takes_long(total - step, left), stacklevel=2)

        def keep_snapshot() -> None:
            snapshot = folder / "snapshots" / f"step_{done:07d}.safetensors"
            with reporting(snapshot):
                snapshot.parent.mkdir(exist_ok=True)
            save(_stored(method, ctx, state, done), snapshot)

        steps = _Steps(method, ctx, state, checkpoint, report)

        if log is not None and not done and method.learns:
            keep_snapshot()
        logs.enter_context(_noting(lambda: saved_at, total, checkpoint))
        while done < total:
            if shares is not None:  # before the step, so that no checkpoint is ahead of this log
                shares.write({"step": done + 1, "parts": list(ranks.shard(parts))})
            steps.advance(done)
            done += 1
            if not (steps.due or validates(done) or done in marks or checkpoint_due()):
                continue
            steps.read()
            if log is None:
                continue
            if done in marks:
                keep_snapshot()
            if checkpoint_due():
                log.sync()
                _checkpoint(state, ctx, done, checkpoint, keep)
                saved_at, saved_time, keep = done, time.monotonic(), previous
                on_save()
        syn = _stored(method, ctx, state, done)
        if log is not None:
            save(syn, folder / "synthetic.safetensors")
            if (line := syn.excess()) is not None:
                warnings.warn(line, stacklevel=2)
        return syn


def _stored(method: Method, ctx: Context, state: State, steps: int) -> SyntheticSet:
    """Return the set after some steps as it is stored; anything else that ``finalize`` returned as it is."""
    syn = method.finalize(ctx, state, steps)
    return syn.finished() if isinstance(syn, SyntheticSet) else syn


@contextlib.contextmanager
def _noting(saved_at: Callable[[], int], total: int, checkpoint: Path) -> Iterator[None]:
    """Add to a KeyboardInterrupt a note of the step that is on disk."""
    try:
        yield
    except KeyboardInterrupt as stop:
        done = saved_at()
        stop.add_note(f"step {done} of {total} is kept in {checkpoint}" if done else "there is no checkpoint yet")
        raise


def _takes_long(num_steps: int, seconds: float) -> str:
    return (
        f"{num_steps} steps on a CPU take {duration(seconds)} on this machine; run them on a GPU, or give fewer, "
        f"e.g. {spelt('method.num_steps', MANY_STEPS // 10)}, which changes the recipe"
    )


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder has a checkpoint from which a run can be resumed."""
    return any((folder / name).exists() for name in _CHECKPOINTS)


def snapshot_steps(num_steps: int) -> set[int]:
    """Return at most ten steps, evenly spaced on a logarithmic scale and including the last."""
    exponents = [k / (NUM_SNAPSHOTS - 1) for k in range(NUM_SNAPSHOTS)]
    return {round(num_steps**exponent) for exponent in exponents}


@torch.no_grad()
def image_statistics(syn: SyntheticSet) -> dict[str, Tensor]:
    """Return mean, standard deviation and largest absolute value of the stored values of a set, 0-d, for the log."""
    latents = syn.latents.float()
    return {"image_mean": latents.mean(), "image_std": latents.std(), "image_max": latents.abs().max()}


def _numbers(record: Any) -> Mapping[str, Value]:
    """Return what a step logs. Raises ValueError if these are not numbers by name."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a step logs {brief(record)}; return numbers by name, or an empty dict")
    for name, value in record.items():
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.dim() == 0):
            raise ValueError(f"a step logs {name}={brief(value)}, which is no number; return a number or a 0-d tensor")
    return record


class _Steps:
    """Runs the steps of a method, and reads their numbers later, several steps together.

    How many steps are read together grows from 1, and at most doubles. The time that they take counts from the end of
    the first of them, so that what the caller does between two reads does not count.
    """

    def __init__(
        self, method: Method, ctx: Context, state: State, checkpoint: Path | None, report: OnStep | None
    ) -> None:
        self._method, self._ctx, self._state = method, ctx, state
        self._checkpoint, self._report = checkpoint, report
        self._settles = READ_STEPS is None and ctx.task.device.type != "cpu" and ctx.ranks.size == 1
        self._every, self._since = READ_STEPS or 1, 0.0
        self._unread: list[tuple[int, dict[str, float | None]]] = []
        """Steps and their numbers, with None in place of the tensors."""
        self._numbers: list[Tensor] = []
        """The tensors of each of these steps, stacked."""

    @property
    def due(self) -> bool:
        """Whether as many steps are unread as are to be read together."""
        return len(self._unread) >= self._every

    def advance(self, done: int) -> None:
        """Run the step after the first ``done`` ones."""
        try:
            record = _step(self._method, self._ctx, self._state, done, self._checkpoint)
        except Exception:
            self.read()  # an earlier step that is not finite is the cause of what fails after it
            raise
        if not self._unread:
            self._since = time.monotonic()
        kept = {name: None if isinstance(value, Tensor) else value for name, value in record.items()}
        self._unread.append((done + 1, kept))
        tensors = [value.detach().to(self._ctx.task.device) for value in record.values() if isinstance(value, Tensor)]
        if tensors:
            self._numbers.append(torch.stack(tensors))

    def read(self) -> None:
        """Read the numbers of all unread steps and report them; raise ValueError at the first that is not finite."""
        unread, numbers = self._unread, iter(torch.cat(self._numbers).tolist() if self._numbers else [])
        self._unread, self._numbers = [], []
        if self._settles and unread:
            self._every = steps_per_read(self._every, len(unread), time.monotonic() - self._since)
        for step, kept in unread:
            record = {name: next(numbers) if value is None else value for name, value in kept.items()}
            try:
                require_finite(record)
            except FloatingPointError as error:
                raise _diverged(step, error, self._checkpoint) from error
            if self._report is not None:
                self._report(step, record)


def steps_per_read(before: int, steps: int, seconds: float) -> int:
    """Return how many steps to read together, given how many before, and that the last ``steps`` took ``seconds``."""
    return max(1, min(2 * before, int(READ_SECONDS * steps / max(seconds, 1e-9))))


class Diverged(ValueError):
    """A loss or a gradient is not finite."""


def _diverged(step: int, error: FloatingPointError, checkpoint: Path | None) -> Diverged:
    exists = checkpoint is not None and checkpoint.exists()
    saved = f"the last good checkpoint is {checkpoint}" if exists else "there is no checkpoint yet"
    return Diverged(
        f"step {step} is not finite ({error}): the distillation diverged ({saved}); "
        f"lower the learning rate, e.g. {spelt('method.optim.lr')}"
    )


def _step(method: Method, ctx: Context, state: State, done: int, checkpoint: Path | None) -> dict[str, Value]:
    """Run one step and return the numbers to log. Raises ValueError if the step finds that a number is not finite."""
    try:
        with ctx.rng.forked("layers", done):  # dropout of external networks
            record = _numbers(method.step(ctx, state, done))
        if ctx.task.device.type == "cuda" and ctx.ranks.size > 1:
            live, _ = _laid_out(state)  # kernels that sum in no fixed order would let the processes diverge
            ctx.ranks.broadcast([tensor for tensor in live.values() if tensor.is_floating_point()])
        return {**record, **image_statistics(state.syn)}
    except FloatingPointError as error:
        raise _diverged(done + 1, error, checkpoint) from error
    except RuntimeError as error:
        if not re.search("not (been )?implemented|does not support", str(error)):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{ctx.task.network.name} lacks a derivative that this method needs ({reason}): PyTorch does not implement "
            f"it for one of the layers; give another network, e.g. {spelt('network', 'convnet')}"
        ) from error


def _agree(ranks: Ranks, done: int, folder: Path) -> None:
    """Wait for all processes, and raise ValueError if they would continue from different steps."""
    total = torch.tensor([done])
    ranks.all_reduce_([total])
    if total.item() != done * ranks.size:
        raise ValueError(
            f"the processes found checkpoints of different steps in {folder}, this one step {done}: all machines must "
            f"share the folder; give {spelt('out')} on a shared disk"
        )


def _idle(method: Method, ctx: Context) -> str:
    """Return the warning about idle processes; it names the field that increases the number of parts, if any does."""
    parts, size = method.parts(ctx), ctx.ranks.size
    fix = "start fewer processes"
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if type(value) is int:
            with contextlib.suppress(ValueError):
                if len(dataclasses.replace(method, **{field.name: value + 1}).parts(ctx)) > len(parts):
                    fix += f", or give {spelt(f'method.{field.name}', size)}, which changes the recipe"
    idle = f"{size - len(parts)} of {size} processes are idle"
    return f"{idle}: a step of this recipe can be divided among at most {len(parts)}; {fix}"


def _checkpoint(state: State, ctx: Context, done: int, checkpoint: Path, keep: Path | None) -> None:
    tensors, skeleton = _laid_out(state)
    header = {
        "kind": "checkpoint",
        "format": 1,
        "draws": VERSION,
        "step": done,
        "recipe_hash": ctx.origin.recipe_hash,
        "state": skeleton,
    }
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # a file cannot hold views of one storage
    write_tensors(checkpoint, copies, header, keep=keep)


def _restore(state: State, ctx: Context, checkpoint: Path, previous: Path) -> tuple[int, Path]:
    """Load the newest readable checkpoint into ``state``; return the number of steps done and the file."""
    source = checkpoint
    try:
        tensors, header = read_tensors(source, "checkpoint")
    except ValueError:
        if not previous.exists():
            raise
        source = previous
        tensors, header = read_tensors(source, "checkpoint")
    saved = from_json(_Checkpoint, header, str(source))
    if saved.recipe_hash != ctx.origin.recipe_hash:
        raise ValueError(
            f"{checkpoint} belongs to another recipe or buffer; choose another {spelt('out')}, or move that run away"
        )
    if saved.draws != VERSION:
        raise ValueError(
            f"{checkpoint} was written by a version of this package whose random numbers differ, so the run cannot be "
            f"continued; choose another {spelt('out')} to start again"
        )
    try:
        template = _fields(state)
        values = _unflatten(template, saved.state, tensors, "")
        if not isinstance(values, dict) or values.keys() != template.keys():
            names = list(values) if isinstance(values, dict) else values
            raise ValueError(f"it holds {brief(names)}, the state of the method has {', '.join(template)}")
    except ValueError as error:
        raise ValueError(
            f"{source} does not fit the state of this method: {error}; choose another {spelt('out')} to start again"
        ) from error
    for name, value in values.items():
        setattr(state, name, value)
    return saved.step, source


@dataclass(frozen=True)
class _Checkpoint:
    """The header of a checkpoint."""

    step: int
    recipe_hash: str
    state: Mapping[str, Any]
    draws: int = 1
    """The version of the draws, see ``condense.rng``; version 0.1.0 did not write it."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step {self.step} is negative")


def _laid_out(state: State) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a state by path, which share memory with it, and its JSON skeleton.

    Two leaves must not share memory: a checkpoint is restored leaf by leaf, so the second would overwrite the first.
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
            assert end <= start, f"the leaves state{one} and state{other} share memory; make one of them a copy"
    return tensors, skeleton


def _fields(state: State) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON skeleton of a value; its tensors, which are not copied, are added to ``tensors`` by path."""
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
    """Invert ``_flatten``; tensors, modules and optimisers of ``template`` are filled in place.

    Raises:
        ValueError: the skeleton is invalid, or its kind is not that of the template.
    """
    if not isinstance(skeleton, dict):
        if isinstance(skeleton, list):
            raise ValueError(f"{brief(skeleton)} at {path!r} is not a valid value")
        _same_kind(template, skeleton, path)
        return skeleton
    if len(skeleton) != 1:
        raise ValueError(f"{brief(skeleton)} at {path!r} is not a valid value")
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
                raise ValueError(f"the saved module at {path!r} does not fit: its tensors have other names")
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
            numbered = enumerate(zip(content, known_items, strict=False))
            items = [_unflatten(like, item, tensors, f"{path}.{i}") for i, (item, like) in numbered]
            return items if kind == "list" else tuple(items)
    raise ValueError(f"{brief(skeleton)} at {path!r} is not what the method saves there")


def _filled(template: Any, saved: Tensor, path: str) -> Tensor:
    if template is None:
        return saved
    if not isinstance(template, Tensor) or template.dtype != saved.dtype or template.dim() != saved.dim():
        raise ValueError(f"{saved.dtype} of shape {tuple(saved.shape)} at {path!r} is not what the method saves there")
    if template.shape != saved.shape:
        return saved.to(template.device).requires_grad_(template.requires_grad)
    with torch.no_grad():  # in place, because an optimiser may hold this tensor
        return template.copy_(saved)


def _same_kind(template: Any, value: Any, path: str) -> None:
    """Raise ValueError if a number, text or None replaces a value of another type."""
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (template, value)]
    if template is not None and value is not None and not all(numbers) and type(template) is not type(value):
        raise ValueError(f"{brief(value)} at {path!r} is not what the method saves there")


def _loaded(template: Any, values: Any, path: str) -> Any:
    try:
        template.load_state_dict(values)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:  # names or shapes that differ
        raise ValueError(f"the saved value at {path!r} does not fit: {reason(error)}") from error
    return template


def _check_optimiser(optimiser: torch.optim.Optimizer, values: Any, path: str) -> None:
    """Raise ValueError if the state does not fit the parameters; PyTorch would fail only at a later step."""
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
    for index, state in values["state"].items():
        if not isinstance(state, dict) or not isinstance(index, int) or not 0 <= index < len(params):
            raise ValueError(f"the optimiser at {path!r} has no parameter {brief(index)}")
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape not in (torch.Size(), params[index].shape):
                raise ValueError(f"{brief(name)} of parameter {index} at {path!r} has another shape")

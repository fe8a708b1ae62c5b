"""The promises that every method makes to the engine, as checks that run on any method.

    from condense.testing import CHECKS, check_method

    check_method(MyMethod(num_steps=4))            # all of them

    @pytest.mark.parametrize("check", CHECKS)      # one test for each
    def test_my_method(check):
        check(MyMethod(num_steps=4))

A check distils made-up data on the CPU, three classes of twelve gray images of 8 x 8 pixels, at two images a class, and
takes at most ``MOST_STEPS`` steps. Where a promise is broken it raises ``BrokenPromise``, which says in one line what
is wrong and what to do. All checks take the same arguments:

    method: the method, or its class, whose defaults are then taken.
    buffers: a folder with the artifacts that the method needs; None: two experts of four epochs are trained.
    fields: fields of the recipe, ``network="mlp"``, ``decode=Factor()``; of ``network`` a callable, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from condense import api, engine, experiment, recipe, registry
from condense.compute import Compute
from condense.data import datasets
from condense.data.datasets import Arrays
from condense.data.pixels import Array
from condense.distributed import Ranks
from condense.files import checksum
from condense.method import Context, GradientMethod, GradientState, Method, Optim, State
from condense.networks import Factory
from condense.recipe import Recipe
from condense.rng import Rng
from condense.synthetic import SyntheticSet, load, save
from condense.synthetic.decode import Hallucinator
from condense.synthetic.labels import Logits

NETWORK = "convnet:depth=1,width=4"
IPC = 2
MOST_STEPS = 4


class BrokenPromise(AssertionError):
    """A method does not do what every method promises."""


def check_method(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Run all checks on a method.

    Raises:
        BrokenPromise: the first promise that does not hold.
    """
    for check in CHECKS:
        check(method, buffers=buffers, **fields)


def is_a_value(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """The hyper-parameters are the fields of a frozen dataclass, and a recipe file holds them."""
    trial = _Trial(method, buffers, fields)
    for cls in type(trial.method).__mro__:
        if issubclass(cls, Method) and "__dataclass_params__" not in vars(cls) and vars(cls).get("__annotations__"):
            trial.breaks(f"{cls.__name__} has fields, but is no dataclass", "add @dataclass(frozen=True, kw_only=True)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        try:
            path.write_text(recipe.to_yaml(trial.plan), encoding="utf-8")
            again = recipe.from_yaml(path).method
        except ValueError as error:
            trial.breaks(f"its recipe cannot be read again: {error}", "let every field be a plain value")
    for each in dataclasses.fields(trial.method):
        written, read = getattr(trial.method, each.name), getattr(again, each.name, None)
        if written != read:
            trial.breaks(
                f"the field {each.name} is {written!r}, and {read!r} after it was written to a recipe file and read",
                "leave the fields as they are given; compute what follows from them where it is used",
            )


def makes_a_set_of_the_budget(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """The set has as many finite images of every class as the budget buys, and a file gives it back."""
    trial = _Trial(method, buffers, fields)
    ctx, advice = trial.context(), "make the set by ctx.new_set and change the values of its leaves alone"
    syn = trial.distil(ctx)
    images, targets = syn()
    classes, shape = ctx.task.num_classes, (ctx.images_per_class * ctx.task.num_classes, *ctx.task.input_shape)
    if images.shape != shape:
        trial.breaks(f"its set has images of shape {tuple(images.shape)}, the budget buys {shape}", advice)
    if not images.isfinite().all() or not targets.isfinite().all():
        trial.breaks("its set has images or labels that are not finite", "bound the learning rates")
    counts = syn.classes.bincount(minlength=classes).tolist()
    if counts != [ctx.latents_per_class] * classes:
        trial.breaks(f"its set has {counts} stored images of the classes, not {ctx.latents_per_class} of each", advice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.safetensors"
        try:
            save(syn, path)
            again = load(path)
        except (ValueError, TypeError) as error:
            trial.breaks(f"its set cannot be written to a file and read: {error}", advice)
    if checksum(again.state_dict()) != checksum(syn.state_dict()):
        trial.breaks("its set is another one after it was written to a file and read", advice)


def depends_on_the_seed_alone(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """The seed decides every bit, another seed gives another set, and no global generator is read or changed."""
    trial, advice = _Trial(method, buffers, fields), "draw from ctx.rng(name, step, part)"
    with _global_generators(1) as changed:
        first = checksum(trial.distil(trial.context()).state_dict())
        if changed():
            trial.breaks(f"it changes the global generator of {changed()[0]}", advice)
    with _global_generators(2):
        again = checksum(trial.distil(trial.context()).state_dict())
    if again != first:
        trial.breaks("two runs with one seed give two sets: it draws from a global generator, or remembers", advice)
    inside = dataclasses.replace(trial.context(), rng=_OtherLayers(trial.plan.seed))
    if checksum(trial.distil(inside).state_dict()) != first:
        trial.breaks("a step draws from the global generator of torch", advice)
    if trial.method.learns:
        other = checksum(trial.distil(trial.context(seed=1)).state_dict())
        if other == first:
            trial.breaks("another seed gives the same set", f"{advice}, and start from ctx.initial")


def resumes_to_the_byte(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """A run that is stopped at any step and resumed leaves the bytes of a run that is not."""
    trial, advice = _Trial(method, buffers, fields), "keep what the next step needs in fields of the State dataclass"
    num_steps = trial.method.num_steps
    with tempfile.TemporaryDirectory() as name, mock.patch.object(engine, "CHECKPOINT_STEPS", 1):
        whole, stopped = Path(name) / "whole", Path(name) / "stopped"
        try:
            trial.distil(trial.context(), whole)
        except (TypeError, AssertionError) as error:
            trial.breaks(f"its state cannot be stored: {error}", advice)
        for stop in range(2, num_steps + 1):  # before the checkpoint of that step
            with contextlib.suppress(_Stop):
                trial.distil(trial.context(), stopped, resume=stop > 2, stop=stop)
            torch.compiler.reset()  # as in a new process
        trial.distil(trial.context(), stopped, resume=num_steps > 1)
        trial.distil(trial.context(), stopped, resume=True)  # of a run that has ended
        for file in ("synthetic.safetensors", f"snapshots/step_{num_steps:07d}.safetensors"):
            if (stopped / file).read_bytes() != (whole / file).read_bytes():
                trial.breaks(f"a run that was stopped and resumed leaves another {Path(file).name}", advice)
        logs = [
            [line for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if "event" not in line]
            for folder in (whole, stopped)
        ]
        if logs[0] != logs[1]:
            trial.breaks("a run that was stopped and resumed leaves another log.jsonl", advice)


def every_leaf_learns(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Steps change every learnable leaf: images, labels, decoder, learning rate and what is learned beside the set.

    Unless ``fields`` name others, the decoder has parameters and the labels are learned, where the method takes them.
    """
    trial = _Trial(method, buffers, fields)
    if not trial.method.learns:
        return
    if "decode" not in fields and trial.takes(decode=Hallucinator(num_styles=2)):
        method = trial.method
        if isinstance(method, GradientMethod):  # it may diverge at another rate
            method = dataclasses.replace(method, optim_decoder=Optim(lr=1e-4))
        trial = _Trial(method, buffers, trial.fields | {"decode": Hallucinator(num_styles=2)})
    if "labels" not in fields and trial.takes(labels=Logits()):
        trial = _Trial(method, buffers, trial.fields | {"labels": Logits()})
    ctx = trial.context()
    with ctx.compute.arithmetic():
        state = trial.method.init(ctx)
        before = {name: [p.detach().clone() for p in params] for name, params in _leaves(state).items()}
        try:
            for step in range(trial.method.num_steps):
                trial.method.step(ctx, state, step)
        except FloatingPointError as error:
            trial.breaks(f"it diverges: {error}", "check it with lower learning rates")
    for name, params in _leaves(state).items():
        for old, new in zip(before[name], params, strict=True):
            if torch.equal(old, new):
                trial.breaks(
                    f"{trial.method.num_steps} steps do not change the leaf {name!r}",
                    "let the loss depend on what state.syn() returns, without detach"
                    + (", or declare learns_labels = False" if name == "labels" else ""),
                )


def finalize_changes_nothing(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """``finalize`` is called for snapshots too, so it leaves the state as it is."""
    trial = _Trial(method, buffers, fields)
    ctx = trial.context()
    with ctx.compute.arithmetic():
        state = trial.method.init(ctx)
        trial.method.step(ctx, state, 0)
        before = checksum(state.syn.state_dict())
        trial.method.finalize(ctx, state, 1)
        first, second = (trial.method.finalize(ctx, state, 1).state_dict() for _ in range(2))
    if checksum(state.syn.state_dict()) != before or checksum(first) != checksum(second):
        trial.breaks("finalize changes the state", "change a copy of the set, copy.deepcopy(state.syn)")


def any_number_of_processes_agrees(
    method: Method | type[Method], *, buffers: Path | None = None, **fields: Any
) -> None:
    """Two processes that share the parts of a step make the set that one makes, but for rounding."""
    trial = _Trial(method, buffers, fields, most_steps=2)
    ctx, advice = trial.context(), "let a part depend on ctx, the state and the number of the step alone"
    parts = list(trial.method.parts(ctx))
    if not parts:
        return
    if list(trial.method.parts(dataclasses.replace(ctx, ranks=Ranks(1, 3)))) != parts:
        trial.breaks("its parts depend on the number of processes", "make them a function of the recipe and the data")
    with ctx.compute.arithmetic():
        start = trial.method.init(ctx).syn.latents.detach().clone()
    alone = trial.distil(ctx)
    try:
        both = _in_lockstep(lambda ranks: trial.distil(dataclasses.replace(ctx, ranks=ranks)), 2)
    except _OutOfStep:
        trial.breaks("two processes do not exchange the same tensors", "let every process call ctx.ranks alike")
    if checksum(both[0].state_dict()) != checksum(both[1].state_dict()):
        trial.breaks("two processes end with two sets", f"{advice}, and what follows the update on the state")
    moved, apart = ((alone.latents - other).norm() for other in (start, both[0].latents))
    if apart > 1e-3 * moved:
        trial.breaks(f"two processes make another set than one: {apart / moved:.2g} of the way from the start", advice)


CHECKS: tuple[Callable[..., None], ...] = (
    is_a_value,
    makes_a_set_of_the_budget,
    depends_on_the_seed_alone,
    resumes_to_the_byte,
    every_leaf_learns,
    finalize_changes_nothing,
    any_number_of_processes_agrees,
)
"""The checks by name: ``check(method, buffers=None, **fields)``."""


class _Stop(KeyboardInterrupt):
    """The user stops a run."""


class _OutOfStep(RuntimeError):
    """Processes meet to exchange different things, or one meets nobody."""


class _Trial:
    """A method and the recipe that it is checked with."""

    def __init__(
        self, method: Method | type[Method], buffers: Path | None, fields: dict[str, Any], most_steps: int = MOST_STEPS
    ) -> None:
        value = method() if isinstance(method, type) else method
        self.method = dataclasses.replace(value, num_steps=min(value.num_steps, most_steps))
        self.buffers, self.fields = buffers, fields
        self.network: str | Factory = fields.get("network", NETWORK)
        usual: dict[str, Any] = {"dataset": "custom", "ipc": IPC, "compute": Compute(exact=True)}
        named = {"network": self.network if isinstance(self.network, str) else NETWORK}
        self.plan = Recipe(**usual | fields | named | {"method": self.method})

    def breaks(self, fact: str, advice: str) -> None:
        """Raise BrokenPromise."""
        raise BrokenPromise(f"{registry.name_of(self.method)}: {fact}; {advice}")

    def takes(self, **fields: Any) -> bool:
        """Whether the method takes another decoder or other labels."""
        plan = dataclasses.replace(self.plan, **fields)
        return self.method.incompatibility(plan.decode, plan.labels, plan.transform) is None

    def context(self, seed: int | None = None) -> Context:
        """What a run hands to the method."""
        arrays = _arrays()
        plan = self.plan if seed is None else dataclasses.replace(self.plan, seed=seed)
        resolved = experiment.resolve(plan, arrays, device=torch.device("cpu"), network=self.network)
        fields = {name: getattr(resolved.plan, name) for name in ("transform", "split", "augment")}
        task = experiment.open_task(arrays, resolved.network, **fields)
        buffers = self.buffers
        if buffers is None:
            buffers = _experts(self.network) if self.method.needs(task) else Path()
        return experiment.prepare(resolved, buffers, like=task)

    def distil(
        self, ctx: Context, folder: Path | None = None, *, resume: bool = False, stop: int | None = None
    ) -> SyntheticSet:
        """The set; with a folder, as a run leaves it there. Raises _Stop in the step ``stop``, counted from 1."""

        def on_step(done: int, record: object) -> None:
            if done == stop:
                raise _Stop

        method = dataclasses.replace(self.method)  # nothing but its fields
        with ctx.compute.arithmetic():
            if folder is None:
                return engine.compute(method, ctx)
            folder.mkdir(exist_ok=True)
            return engine.run(method, ctx, method.init(ctx), folder, resume=resume, on_step=on_step)


def _leaves(state: State) -> dict[str, list[torch.nn.Parameter]]:
    return state.leaves() if isinstance(state, GradientState) else state.syn.leaves()


@functools.cache
def _arrays() -> Arrays:
    """Three classes of images that differ in brightness, 12 + 6 of each."""
    rng = np.random.default_rng(0)
    parts: list[Array] = []
    for num in (36, 18):
        labels = np.arange(num) % 3
        levels = (30 + 80 * labels)[:, None, None] + rng.integers(0, 40, (num, 8, 8))
        parts += [levels.astype(np.uint8), labels]
    return datasets.load(parts)


_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


@functools.cache
def _experts(network: str | Factory) -> Path:
    """Two experts of four epochs."""
    _folders.append(tempfile.TemporaryDirectory())
    experts: dict[str, Any] = {"num_experts": 2, "num_epochs": 4, "batch_size": 12, "lr": 0.1}
    return api.make_buffer(_arrays(), network, out=Path(_folders[-1].name), compute=Compute(), device="cpu", **experts)


class _OtherLayers(Rng):
    """The same keyed draws, while layers that draw from the global generator get other numbers."""

    @contextlib.contextmanager
    def forked(self, name: str, step: int = 0, unit: int | str = 0) -> Iterator[None]:
        with super().forked(f"other {name}" if name.startswith("layers") else name, step, unit):
            yield


@contextlib.contextmanager
def _global_generators(seed: int) -> Iterator[Callable[[], list[str]]]:
    """Inside, the global generators are seeded; yields a function that names those that were used since."""
    read: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.get_rng_state().tolist(),
        "numpy": lambda: repr(np.random.get_state(legacy=False)["state"]),  # noqa: NPY002
        "random": random.getstate,
    }
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        start = {name: state() for name, state in read.items()}
        yield lambda: [name for name, state in read.items() if state() != start[name]]
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def _in_lockstep(run: Callable[[Ranks], SyntheticSet], size: int) -> list[SyntheticSet]:
    """What ``run`` returns in each of so many processes: here threads, of which one works until it meets the others."""
    meetings = _Meetings(size)
    results: dict[int, SyntheticSet] = {}

    def work(rank: int) -> None:
        try:
            meetings.wait_for_turn(rank)
            results[rank] = run(_Threads(rank, size, meetings=meetings))
        except BaseException as error:  # of a thread, raised again below
            meetings.error = meetings.error or error
        finally:
            meetings.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meetings.error is not None:
        raise meetings.error
    return [results[rank] for rank in range(size)]


class _Meetings:
    """Whose turn it is, and what each process brought to each meeting."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.brought: dict[int, list[list[Tensor]]] = {rank: [] for rank in range(size)}
        self.error: BaseException | None = None
        self._left: set[int] = set()
        self._changed = threading.Condition()

    def meet(self, rank: int, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """What all processes bring to this meeting, by rank. The global generator of torch is one for all threads, so
        each finds it as it left it."""
        generator = torch.get_rng_state()
        self.brought[rank].append([tensor.detach().clone() for tensor in tensors])
        number = len(self.brought[rank]) - 1
        self._pass_on(rank)
        self.wait_for_turn(rank)
        torch.set_rng_state(generator)
        brought = [lists[number] for lists in self.brought.values() if len(lists) > number]
        shapes = [[tensor.shape for tensor in tensors] for tensors in brought]
        if len(brought) < self.size or any(each != shapes[0] for each in shapes):
            raise _OutOfStep
        return brought

    def wait_for_turn(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.turn == rank)

    def leave(self, rank: int) -> None:
        self._left.add(rank)
        self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            others = [(rank + k) % self.size for k in range(1, self.size + 1)]
            self.turn = next((other for other in others if other not in self._left), -1)
            self._changed.notify_all()


@dataclass(frozen=True)
class _Threads(Ranks):
    """One of several processes that are threads."""

    meetings: _Meetings = field(kw_only=True)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        brought = self.meetings.meet(self.rank, tensors)
        with torch.no_grad():
            for tensor, *values in zip(tensors, *brought, strict=True):
                tensor.copy_(torch.stack(values).sum(0))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        brought = self.meetings.meet(self.rank, tensors)
        with torch.no_grad():
            for tensor, value in zip(tensors, brought[0], strict=True):
                tensor.copy_(value)

"""Contract tests for methods: checks that any method must pass.

    from condense.testing import CHECKS, check_method

    check_method(MyMethod(num_steps=4))            # run all checks

    @pytest.mark.parametrize("check", CHECKS)      # one test per check
    def test_my_method(check):
        check(MyMethod(num_steps=4))

A check distils synthetic data on the CPU (three classes of twelve gray images of 8 x 8 pixels, or of twelve graphs for
a method that takes no images, at two samples per class) for at most ``MOST_STEPS`` steps. A failed check raises
``BrokenPromise`` with one line that says what is wrong and how to correct it. All checks take the same arguments:

    method: the method, or its class, which is then used with its default fields.
    buffers: a folder with the artifacts that the method needs; None trains two experts for four epochs.
    fields: fields of the recipe, e.g. ``network="mlp"``, ``decode=Factor()``; ``network`` may be a callable.
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

from condense import api, engine, experiment, privacy, recipe, registry
from condense.compute import Compute
from condense.data import datasets
from condense.data.datasets import Arrays
from condense.data.graphs import Graph, encode
from condense.data.pixels import Array
from condense.distributed import Ranks
from condense.files import checksum
from condense.method import Context, GradientMethod, GradientState, Method, Optim, State, require_finite
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
    """A method violates the contract of methods."""


_same_secrets = mock.patch.object(privacy, "secret_key", new=lambda: 0)
"""Gives all runs of a check the same secret key, without which those of a private method never agree."""


def check_method(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Run all checks on a method.

    Raises:
        BrokenPromise: the first check that fails.
    """
    for check in CHECKS:
        check(method, buffers=buffers, **fields)


def is_a_value(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that the hyper-parameters are fields of a frozen dataclass that a recipe file can store."""
    trial = _Trial(method, buffers, fields)
    for cls in type(trial.method).__mro__:
        if issubclass(cls, Method) and "__dataclass_params__" not in vars(cls) and vars(cls).get("__annotations__"):
            trial.breaks(
                f"{cls.__name__} has fields, but is not a dataclass", "add @dataclass(frozen=True, kw_only=True)"
            )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        try:
            path.write_text(recipe.to_yaml(trial.plan), encoding="utf-8")
            again = recipe.from_yaml(path).method
        except ValueError as error:
            trial.breaks(f"its recipe cannot be read again: {error}", "use only plain values as fields")
    for each in dataclasses.fields(trial.method):
        written, read = getattr(trial.method, each.name), getattr(again, each.name, None)
        if written != read:
            trial.breaks(
                f"the field {each.name} is {written!r}, but {read!r} after it was written to a recipe file and read",
                "do not change the fields; compute derived values where they are used",
            )


def makes_a_set_of_the_budget(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that the set has the budgeted number of finite images per class, and survives being saved and loaded."""
    trial = _Trial(method, buffers, fields)
    ctx, advice = trial.context(), "create the set with ctx.new_set and change only the values of its leaves"
    with ctx.compute.arithmetic():
        state = trial.method.init(ctx)
    if not isinstance(state, State):
        trial.breaks(f"init returns a {type(state).__name__}", "return a State with the set")
    syn = trial.distil(ctx)
    if not isinstance(syn, SyntheticSet):
        trial.breaks(f"finalize returns a {type(syn).__name__}", "return the set to store")
    images, targets = syn()
    classes, shape = ctx.task.num_classes, (ctx.images_per_class * ctx.task.num_classes, *ctx.task.input_shape)
    fewer = not trial.method.fills_budget and len(images) <= shape[0]
    if images.shape != (len(images) if fewer else shape[0], *shape[1:]):
        trial.breaks(f"its set has images of shape {tuple(images.shape)}, but the budget is {shape}", advice)
    if not images.isfinite().all() or not targets.isfinite().all():
        trial.breaks("its set has images or labels that are not finite", "use lower learning rates")
    counts = syn.classes.bincount(minlength=classes).tolist()
    if trial.method.has_classes and not fewer and counts != [ctx.latents_per_class] * classes:
        trial.breaks(f"its set has {counts} stored images per class, not {ctx.latents_per_class} each", advice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.safetensors"
        try:
            save(syn, path)
            again = load(path)
        except (ValueError, TypeError) as error:
            trial.breaks(f"its set cannot be saved and loaded: {error}", advice)
    if checksum(again.state_dict()) != checksum(syn.state_dict()):
        trial.breaks("its set changes when it is saved and loaded", advice)


@_same_secrets
def depends_on_the_seed_alone(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that the seed alone determines the set exactly, and that no global random generator is used."""
    trial, advice = _Trial(method, buffers, fields), "draw from ctx.rng(name, step, part)"
    with _global_generators(1) as changed:
        first = checksum(trial.distil(trial.context()).state_dict())
        if changed():
            trial.breaks(f"it changes the global generator of {changed()[0]}", advice)
    with _global_generators(2):
        again = checksum(trial.distil(trial.context()).state_dict())
    if again != first:
        trial.breaks(
            "two runs with the same seed give different sets: it draws from a global generator or keeps state", advice
        )
    inside = dataclasses.replace(trial.context(), rng=_OtherLayers(trial.plan.seed))
    if checksum(trial.distil(inside).state_dict()) != first:
        trial.breaks("a step draws from the global generator of torch", advice)
    if trial.method.learns:
        other = checksum(trial.distil(trial.context(seed=1)).state_dict())
        if other == first:
            trial.breaks("another seed gives the same set", f"{advice}, and initialise with ctx.initial")


@_same_secrets
def resumes_to_the_byte(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that a run that is stopped and resumed at any step writes the same bytes as an uninterrupted run."""
    trial, advice = _Trial(method, buffers, fields), "store what the next step needs in fields of the State dataclass"
    num_steps = trial.method.total_steps(trial.context())
    with tempfile.TemporaryDirectory() as name, mock.patch.object(engine, "CHECKPOINT_STEPS", 1):
        whole, stopped = Path(name) / "whole", Path(name) / "stopped"
        try:
            trial.distil(trial.context(), whole)
        except (TypeError, AssertionError) as error:
            trial.breaks(f"its state cannot be stored: {error}", advice)
        for stop in range(2, num_steps + 1):  # before the checkpoint of this step
            with contextlib.suppress(_Stop):
                trial.distil(trial.context(), stopped, resume=stop > 2, stop=stop)
            torch.compiler.reset()  # as in a new process
        trial.distil(trial.context(), stopped, resume=num_steps > 1)
        trial.distil(trial.context(), stopped, resume=True)  # resume a finished run
        for file in ("synthetic.safetensors", f"snapshots/step_{num_steps:07d}.safetensors"):
            if (stopped / file).read_bytes() != (whole / file).read_bytes():
                trial.breaks(f"a run that was stopped and resumed writes a different {Path(file).name}", advice)
        logs = [
            [line for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if "event" not in line]
            for folder in (whole, stopped)
        ]
        if logs[0] != logs[1]:
            trial.breaks("a run that was stopped and resumed writes a different log.jsonl", advice)


def every_leaf_learns(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that steps change every learnable leaf: images, labels, decoder, learning rate and additional parameters.

    Unless ``fields`` say otherwise, a decoder with parameters and learned labels are used if the method supports them.
    """
    trial = _Trial(method, buffers, fields)
    if not trial.method.learns:
        return
    if "decode" not in fields and trial.takes(decode=Hallucinator(num_styles=2)):
        method = trial.method
        if isinstance(method, GradientMethod):  # higher learning rates may diverge
            method = dataclasses.replace(method, optim_decoder=Optim(lr=1e-4))
        trial = _Trial(method, buffers, trial.fields | {"decode": Hallucinator(num_styles=2)})
    if "labels" not in fields and trial.takes(labels=Logits()):
        trial = _Trial(method, buffers, trial.fields | {"labels": Logits()})
    ctx = trial.context()
    with ctx.compute.arithmetic():
        state = trial.method.init(ctx)
        before = {name: [p.detach().clone() for p in params] for name, params in _leaves(state).items()}
        try:
            for step in range(trial.method.total_steps(ctx)):
                require_finite(trial.method.step(ctx, state, step))
        except FloatingPointError as error:
            trial.breaks(f"it diverges: {error}", "run the check with lower learning rates")
    for name, params in _leaves(state).items():
        for old, new in zip(before[name], params, strict=True):
            if torch.equal(old, new):
                trial.breaks(
                    f"{trial.method.total_steps(ctx)} steps do not change the leaf {name!r}",
                    "compute the loss from the output of state.syn(), without detach"
                    + (", or declare learns_labels = False" if name == "labels" else ""),
                )


def finalize_changes_nothing(method: Method | type[Method], *, buffers: Path | None = None, **fields: Any) -> None:
    """Check that ``finalize`` does not change the state, since it is also called for snapshots."""
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


@_same_secrets
def any_number_of_processes_agrees(
    method: Method | type[Method], *, buffers: Path | None = None, **fields: Any
) -> None:
    """Check that two processes that share the parts of a step make the same set as one, up to rounding."""
    trial = _Trial(method, buffers, fields, most_steps=2)
    ctx, advice = trial.context(), "compute a part only from ctx, the state and the number of the step"
    parts = list(trial.method.parts(ctx))
    if not parts:
        return
    if list(trial.method.parts(dataclasses.replace(ctx, ranks=Ranks(1, 3)))) != parts:
        trial.breaks("its parts depend on the number of processes", "compute them only from the recipe and the data")
    with ctx.compute.arithmetic():
        start = trial.method.finalize(ctx, trial.method.init(ctx), 0).latents.detach().clone()
    alone = trial.distil(ctx)
    try:
        both = _in_lockstep(lambda ranks: trial.distil(dataclasses.replace(ctx, ranks=ranks)), 2)
    except _OutOfStep:
        trial.breaks(
            "two processes do not exchange the same tensors", "make the same calls of ctx.ranks on every process"
        )
    if checksum(both[0].state_dict()) != checksum(both[1].state_dict()):
        trial.breaks("two processes end with different sets", f"{advice}, and what follows the update from the state")
    moved, apart = ((alone.latents - other).norm() for other in (start, both[0].latents))
    if apart > 1e-3 * moved:
        trial.breaks(
            f"two processes make a different set than one: they differ by {apart / moved:.2g} of the change since the "
            "start",
            advice,
        )


CHECKS: tuple[Callable[..., None], ...] = (
    is_a_value,
    makes_a_set_of_the_budget,
    depends_on_the_seed_alone,
    resumes_to_the_byte,
    every_leaf_learns,
    finalize_changes_nothing,
    any_number_of_processes_agrees,
)
"""All checks, each called as ``check(method, buffers=None, **fields)``."""


class _Stop(KeyboardInterrupt):
    """Simulates a user who stops a run."""


class _OutOfStep(RuntimeError):
    """Processes call different collectives, or one process calls a collective alone."""


class _Trial:
    """A method with the recipe used to check it."""

    def __init__(
        self, method: Method | type[Method], buffers: Path | None, fields: dict[str, Any], most_steps: int = MOST_STEPS
    ) -> None:
        cls = method if isinstance(method, type) else type(method)
        path = f"{cls.__module__}:{cls.__qualname__}"
        complaint = registry.METHODS.complaint(path, cls)
        if complaint is not None:
            raise BrokenPromise(f"{path} {complaint}; derive from Method, define all of its functions and defaults")
        value = method() if isinstance(method, type) else method
        self.method = dataclasses.replace(value, num_steps=min(value.num_steps, most_steps))
        self.buffers, self.fields = buffers, fields
        self.network: str | Factory = fields.get("network", NETWORK)
        defaults: dict[str, Any] = {"dataset": "custom", "ipc": IPC, "compute": Compute(exact=True)}
        if value.private:
            defaults["transform"] = "none"  # the data have no published statistics
        named = {"network": self.network if isinstance(self.network, str) else NETWORK}
        self.plan = Recipe(**defaults | fields | named | {"method": self.method})

    def breaks(self, fact: str, advice: str) -> None:
        """Raise BrokenPromise."""
        raise BrokenPromise(f"{registry.name_of(self.method)}: {fact}; {advice}")

    def takes(self, **fields: Any) -> bool:
        """Return whether the method supports another decoder or other labels."""
        plan = dataclasses.replace(self.plan, **fields)
        return self.method.incompatibility(plan.decode, plan.labels, plan.transform, plan.objective) is None

    def context(self, seed: int | None = None) -> Context:
        """Create the context of a run."""
        arrays = _arrays() if "images" in self.method.takes else _graphs()
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
        """Distil a set, in a run folder if one is given. Raises _Stop in the step ``stop``, counted from 1."""

        def on_step(done: int, record: object) -> None:
            if done == stop:
                raise _Stop

        method = dataclasses.replace(self.method)  # drops any state outside the fields
        with ctx.compute.arithmetic():
            if folder is None:
                return engine.compute(method, ctx)
            folder.mkdir(exist_ok=True)
            ctx = dataclasses.replace(ctx, scratch=folder / engine.SCRATCH)
            return engine.run(method, ctx, method.init(ctx), folder, resume=resume, on_step=on_step)


def _leaves(state: State) -> dict[str, list[torch.nn.Parameter]]:
    return state.leaves() if isinstance(state, GradientState) else state.syn.leaves()


@functools.cache
def _arrays() -> Arrays:
    """Create three classes of images that differ in brightness, with 12 training and 6 test images each."""
    rng = np.random.default_rng(0)
    parts: list[Array] = []
    for num in (36, 18):
        labels = np.arange(num) % 3
        levels = (30 + 80 * labels)[:, None, None] + rng.integers(0, 40, (num, 8, 8))
        parts += [levels.astype(np.uint8), labels]
    return datasets.load(parts)


@functools.cache
def _graphs() -> Arrays:
    """Create three classes of graphs (paths, rings, stars) of 4 to 7 nodes, with 12 training and 3 test graphs each."""
    graphs = {
        "paths": [[(i, i + 1) for i in range(n - 1)] for n in range(4, 8)],
        "rings": [[(0, n - 1), *((i, i + 1) for i in range(n - 1))] for n in range(4, 8)],
        "stars": [[(0, i + 1) for i in range(n - 1)] for n in range(4, 8)],
    }
    rows, labels = list[Graph](), list[int]()
    for label, shapes in enumerate(graphs.values()):
        for k in range(15):
            edges = torch.tensor(shapes[k % 4])
            rows.append(Graph(torch.arange(int(edges.max()) + 1) % (1 + k % 2), edges))
            labels.append(label)
    return datasets.of_graphs("custom", encode(rows, 100).numpy(), np.array(labels), tuple(graphs))


_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Temporary folders, which are removed when the process ends."""


@functools.cache
def _experts(network: str | Factory) -> Path:
    """Train two experts for four epochs."""
    _folders.append(tempfile.TemporaryDirectory())
    experts: dict[str, Any] = {"num_experts": 2, "num_epochs": 4, "batch_size": 12, "lr": 0.1}
    return api.make_buffer(_arrays(), network, out=Path(_folders[-1].name), compute=Compute(), device="cpu", **experts)


class _OtherLayers(Rng):
    """Gives the same keyed draws, but other numbers to layers that draw from the global generator."""

    @contextlib.contextmanager
    def forked(self, name: str, step: int | Tensor = 0, unit: int | str = 0) -> Iterator[None]:
        with super().forked(f"other {name}" if name.startswith("layers") else name, step, unit):
            yield


@contextlib.contextmanager
def _global_generators(seed: int) -> Iterator[Callable[[], list[str]]]:
    """Seed the global generators inside the context; yield a function that names those used since."""
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
    """Return the results of ``run`` in ``size`` simulated processes: threads that run one at a time between
    collectives."""
    collectives = _Collectives(size)
    results: dict[int, SyntheticSet] = {}

    def work(rank: int) -> None:
        try:
            collectives.wait_for_turn(rank)
            results[rank] = run(_Threads(rank, size, collectives=collectives))
        except BaseException as error:  # raised again below
            collectives.error = collectives.error or error
        finally:
            collectives.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if collectives.error is not None:
        raise collectives.error
    return [results[rank] for rank in range(size)]


class _Collectives:
    """Collectives of simulated processes: whose turn it is, and the tensors that each process contributed."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.contributed: dict[int, list[list[Tensor]]] = {rank: [] for rank in range(size)}
        self.error: BaseException | None = None
        self._left: set[int] = set()
        self._changed = threading.Condition()

    def exchange(self, rank: int, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Exchange tensors, and return those of all processes by rank.

        The threads share the global generator of torch, so its state is restored for each of them.
        """
        generator = torch.get_rng_state()
        self.contributed[rank].append([tensor.detach().clone() for tensor in tensors])
        number = len(self.contributed[rank]) - 1
        self._pass_on(rank)
        self.wait_for_turn(rank)
        torch.set_rng_state(generator)
        contributed = [lists[number] for lists in self.contributed.values() if len(lists) > number]
        shapes = [[tensor.shape for tensor in tensors] for tensors in contributed]
        if len(contributed) < self.size or any(each != shapes[0] for each in shapes):
            raise _OutOfStep
        return contributed

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
    """Ranks of a process that is simulated by a thread."""

    collectives: _Collectives = field(kw_only=True)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        contributed = self.collectives.exchange(self.rank, tensors)
        with torch.no_grad():
            for tensor, *values in zip(tensors, *contributed, strict=True):
                tensor.copy_(torch.stack(values).sum(0))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        contributed = self.collectives.exchange(self.rank, tensors)
        with torch.no_grad():
            for tensor, value in zip(tensors, contributed[0], strict=True):
                tensor.copy_(value)

"""The paths that are compared, each as a textbook run and an engine run of the same work."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import textbook
from benchmarks.harness import Run, scratch
from condense.artifacts import Trajectories
from condense.augment import Augment
from condense.buffers.trajectories import Experts, build
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.datasets import load as load_data
from condense.eval.protocol import PROTOCOLS
from condense.inner import Truncated
from condense.method import Context, Method, Optim, State
from condense.methods.dc import DSA
from condense.methods.dm import DM
from condense.methods.frepo import FRePo
from condense.methods.idc import IDC
from condense.methods.mtt import MTT
from condense.methods.rat_bptt import RaTBPTT
from condense.methods.rcig import RCIG
from condense.methods.sre2l import SRe2L
from condense.networks import Functional
from condense.rng import Rng
from condense.synthetic.decode import Decode, Factor, Pixels
from condense.synthetic.labels import Hard, Labels, Targets
from condense.synthetic.set import Origin
from condense.task import Labelled, Split, Task, make_task
from condense.train import Trainer

STRATEGY = "color_crop_cutout_flip_scale_rotate"
CPU = torch.device("cpu")
EXACT = Compute(exact=True).resolved(0, CPU)
"""Eager float32."""


def fast(device: torch.device) -> Compute:
    """Return the policy that the engine resolves for large work."""
    return Compute().resolved(math.inf, device)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the work. The defaults are those of the published numbers: ConvNet-D3-W128, 3x32x32."""

    depth: int = 3
    width: int = 128
    side: int = 32
    num_classes: int = 10
    ipc: int = 10
    batch_real: int = 256
    """Real images per class in gradient and distribution matching."""
    batch_idc: int = 64
    """Real images per class in IDC."""
    batch: int = 256
    """Batch size of experts."""
    num_batches: int = 5
    """Batches of expert training in one run."""
    expert_epochs: int = 1
    """Epochs of expert training in one run."""
    num_epochs: int = 10
    """Epochs of evaluation in one run."""
    num_updates: int = 1
    """Updates of the set in one run of a method."""
    shorten: int = 1
    """Divisor of the number of student steps in trajectory matching."""
    ipc_solver: int = 1
    """Images per class in RCIG."""
    ipc_formed: int = 2
    """Stored images per class in IDC, each of which is decoded into four."""
    num_real: int = 256
    """Real images per update in FRePo, RCIG and RaT-BPTT."""
    num_student: int = 256
    """Real images on which IDC trains its student after an update."""
    burn_in: int = 3
    """Steps before the window in RaT-BPTT."""
    window: int = 5
    """Steps of the window in RaT-BPTT."""
    solver_steps: int = 5
    """Steps of the inner problem and of the linear system in RCIG."""
    compute: Compute = EXACT
    double: bool = False
    """Whether data and network are float64, as a reference for errors."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    @property
    def network(self) -> str:
        return f"convnet:depth={self.depth},width={self.width}"


QUICK = Scale(
    depth=1,
    width=4,
    side=8,
    num_classes=3,
    ipc=2,
    batch_real=8,
    batch_idc=8,
    batch=8,
    num_batches=2,
    num_epochs=2,
    shorten=5,
    num_real=12,
    num_student=12,
    burn_in=1,
    window=2,
    solver_steps=3,
)
"""Sizes for a test that everything runs; they are too small to measure."""

GPU = Scale(
    num_batches=40,
    expert_epochs=20,
    num_epochs=1000,
    num_updates=5,
    ipc_solver=10,
    ipc_formed=10,
    num_real=1024,
    num_student=2048,
    burn_in=20,
    window=20,
    solver_steps=20,
)
"""Sizes that fill a GPU and give runs of a tenth of a second or more."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A path through the engine. ``textbook`` and ``engine`` each set up the work and return one run of it."""

    textbook: Callable[[Scale, torch.device], Run]
    engine: Callable[[Scale, torch.device], Run]
    ask: float | None = None
    """Target for the ratio of the times."""
    ask_memory: float | None = None
    """Target for the ratio of the peak memories; None: memory is not measured."""
    unit: str = "s"
    """Unit of the time: ``s`` or ``ms`` per step, else work per second."""
    steps: Callable[[Scale], int] = lambda scale: scale.num_updates
    """Number of steps of one run: updates of the set, batches or epochs."""
    work: Callable[[Scale], int] | None = None
    """Amount of work of one run, in the numerator of ``unit``; None: the number of steps."""

    def value(self, seconds: float, scale: Scale) -> float:
        work = (self.work or self.steps)(scale)
        match self.unit:
            case "s":
                return seconds / work
            case "ms":
                return 1e3 * seconds / work
        return work / seconds


def arrays(scale: Scale) -> Arrays:
    """Make a data set of handwritten digits, enlarged, tinted by class and with noise, large enough for all paths."""
    digits, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    needed = max(scale.batch * scale.num_batches, scale.num_real, scale.num_student)
    num = max(scale.batch_real, scale.ipc, 4 * scale.ipc_formed, -(-needed // scale.num_classes))
    y = np.repeat(np.arange(scale.num_classes), num)
    tints = 0.3 + 0.7 * rng.random((scale.num_classes, 3, 1, 1))
    pixels = digits[[rng.choice(np.flatnonzero(labels == label % 10)) for label in y]].reshape(-1, 1, 8, 8) / 16
    enlarged = F.interpolate(torch.tensor(pixels, dtype=torch.float32), size=scale.input_shape[1:], mode="bilinear")
    x = enlarged.numpy() * tints[y] + 0.1 * rng.random((len(y), *scale.input_shape))
    images = torch.tensor((x / x.max() * 255).astype(np.uint8))
    return load_data((images, torch.tensor(y)))


def make(scale: Scale, device: torch.device, network_options: str = "") -> Task:
    name, dtype = scale.network + network_options, torch.float64 if scale.double else torch.float32
    task = make_task(
        arrays(scale),
        transform="channel",
        split=Split(val_fraction=0.0),
        network=Functional(name, scale.input_shape, scale.num_classes, device, dtype),
        augment=Augment.parse(STRATEGY),
        device=device,
    )
    train = Labelled(task.train.images[:].to(dtype), task.train.labels)
    return dataclasses.replace(task, train=train) if scale.double else task


ADAM = Optim(kind="adam", lr=3e-4, momentum=0.9)
LONG = 10**9
"""Number of updates after which a student, a network of a pool or a chunk would be replaced; none is, during a
measurement."""
MAX_ROLL = 4
"""Largest shift of the views of SRe2L, in pixels."""


def context(
    scale: Scale,
    task: Task,
    buffer: Path | None = None,
    *,
    ipc: int | None = None,
    decode: Decode = Pixels(),
    labels: Labels = Hard(),
) -> Context:
    return Context(
        task=task,
        rng=Rng(0),
        ipc=ipc or scale.ipc,
        decode=decode,
        labels=labels,
        compute=scale.compute,
        origin=Origin(dataset=task.dataset(), transform=task.transform.describe()),
        artifacts={} if buffer is None else {"experts": Trajectories(buffer)},
    )


def fresh(scale: Scale, device: torch.device, **options: bool) -> textbook.ConvNet:
    return textbook.ConvNet(scale.input_shape, scale.num_classes, scale.depth, scale.width, **options).to(device)


def by_class(task: Task) -> list[Tensor]:
    return [task.train.images[index] for index in task.train.by_class]


def synthetic(scale: Scale, task: Task, ipc: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first ``ipc`` real images of every class and their labels."""
    ipc = ipc or scale.ipc
    images = torch.cat([members[:ipc] for members in by_class(task)])
    return images, torch.arange(scale.num_classes, device=task.device).repeat_interleave(ipc)


def repeated(update: Run, scale: Scale) -> Run:
    """Return a run of ``num_updates`` updates."""

    def run() -> None:
        for _ in range(scale.num_updates):
            update()

    return run


def under(compute: Compute, run: Run) -> Run:
    """Return ``run`` with the float32 arithmetic of the policy, as the engine sets it for a whole run."""

    def call() -> None:
        with compute.arithmetic():
            run()

    return call


class Steps:
    """A method; each call runs the next ``num_updates`` steps."""

    def __init__(self, method: Method, ctx: Context, num_updates: int = 1) -> None:
        self.method, self.ctx, self.num_updates, self.numbers = method, ctx, num_updates, itertools.count()
        with ctx.compute.arithmetic():
            self.state: State = method.init(ctx)

    def __call__(self) -> None:
        with self.ctx.compute.arithmetic():
            for number in itertools.islice(self.numbers, self.num_updates):
                self.method.step(self.ctx, self.state, number)


# Expert training: epochs of SGD with DSA.


def num_expert_batches(scale: Scale) -> int:
    return scale.num_batches * scale.expert_epochs


def num_expert_images(scale: Scale) -> int:
    return scale.batch * num_expert_batches(scale)


def expert_data(scale: Scale, task: Task) -> tuple[Tensor, Tensor]:
    num = scale.batch * scale.num_batches
    return task.train.images[:num], task.train.labels[:num]


def expert_textbook(scale: Scale, device: torch.device) -> Run:
    data, net = expert_data(scale, make(scale, device)), fresh(scale, device)
    return partial(textbook.train, net, *data, scale.expert_epochs, batch_size=scale.batch, strategy=STRATEGY)


def expert_engine(scale: Scale, device: torch.device) -> Run:
    task, plan = make(scale, device), Experts(num_epochs=scale.expert_epochs, batch_size=scale.batch)
    trainer = Trainer(task.network, plan.training(), scale.compute)
    source = trainer.source(*expert_data(scale, task), Rng(0), task.augment)
    return under(scale.compute, partial(trainer.run, task.network.init(Rng(0), "weights"), source))


# Evaluation: fresh networks are trained on the synthetic images for some epochs of canonical-dsa.


def evaluation_textbook(scale: Scale, device: torch.device) -> Run:
    images, labels = synthetic(scale, make(scale, device))
    return lambda: textbook.evaluate(fresh(scale, device), images, labels, scale.num_epochs, STRATEGY)


def epochs(num_networks: int, scale: Scale) -> int:
    """Return the epochs of each network, fewer for several networks, so that a run takes as long."""
    return max(1, scale.num_epochs // num_networks)


def evaluation_engine(num_networks: int, scale: Scale, device: torch.device) -> Run:
    task = make(scale, device)
    plan = dataclasses.replace(PROTOCOLS["canonical-dsa"], num_epochs=epochs(num_networks, scale))
    trainer, data = Trainer(task.network, plan, scale.compute), synthetic(scale, task)

    def run() -> None:
        keys = [Rng(0).child("network", k) for k in range(num_networks)]
        weights = [task.network.init(key, "weights") for key in keys]
        trainer.run_together(weights, [trainer.source(*data, key, task.augment) for key in keys])

    return under(scale.compute, run)


def evaluation(num_networks: int, ask: float | None = None) -> Job:
    return Job(
        textbook=evaluation_textbook,
        engine=partial(evaluation_engine, num_networks),
        ask=ask,
        unit="epochs/s" if num_networks == 1 else "network-epochs/s",
        steps=partial(epochs, num_networks),
        work=lambda scale: epochs(num_networks, scale) * num_networks,
    )


# Trajectory matching: one update of the images through a number of student steps.


def expert_buffer(task: Task) -> Path:
    """Build a buffer of one expert of two short epochs; return its folder."""
    few = Labelled(*(part[torch.arange(128) * 37 % len(task.train)] for part in (task.train.images, task.train.labels)))
    plan = Experts(num_experts=1, num_epochs=2, batch_size=32)
    return build(dataclasses.replace(task, train=few), plan, root=scratch(), seed=0, compute=EXACT)


@lru_cache(maxsize=1)
def expert_of(scale: Scale, device: torch.device) -> Path:
    """Return the folder of ``expert_buffer`` for a scale; one process trains it once."""
    return expert_buffer(make(scale, device))


def matching_textbook(num_steps: int, scale: Scale, device: torch.device) -> Run:
    task, net = make(scale, device), fresh(scale, device)
    snapshots = Trajectories(expert_buffer(task)).pair(0, 0, 2)
    start, target = ({name: p.to(device) for name, p in snapshot.items()} for snapshot in snapshots)
    images, labels = synthetic(scale, task)
    images.requires_grad_()
    lr = torch.tensor(0.01, device=device, requires_grad=True)
    optimisers = [torch.optim.SGD([images], lr=1.0, momentum=0.5), torch.optim.SGD([lr], lr=1e-5, momentum=0.5)]
    num_steps //= scale.shorten
    update = partial(textbook.mtt_step, net, start, target, images, labels, lr, optimisers, num_steps, STRATEGY)
    return repeated(update, scale)


def matching_engine(num_steps: int, scale: Scale, device: torch.device) -> Steps:
    method = MTT(syn_steps=num_steps // scale.shorten, expert_epochs=2, max_start_epoch=1)
    buffer = expert_of(dataclasses.replace(scale, compute=EXACT, double=False), device)
    return Steps(method, context(scale, make(scale, device), buffer), scale.num_updates)


def matching(num_steps: int, ask: float | None = None, ask_memory: float | None = None) -> Job:
    return Job(
        textbook=partial(matching_textbook, num_steps),
        engine=partial(matching_engine, num_steps),
        ask=ask,
        ask_memory=ask_memory,
    )


# Gradient matching and distribution matching: one update of the images, class by class. The student is replaced after
# one update and never trained, so that only the sweep over the classes is measured.


def sweep(step: Callable[..., None], lr: float, scale: Scale, device: torch.device) -> Run:
    task = make(scale, device)
    real, (images, _) = by_class(task), synthetic(scale, task)
    optimiser = torch.optim.SGD([images.requires_grad_()], lr=lr, momentum=0.5)
    return repeated(lambda: step(fresh(scale, device), real, images, optimiser, scale.batch_real, STRATEGY), scale)


def gradient_engine(scale: Scale, device: torch.device) -> Run:
    method = DSA(outer_loop=1, inner_epochs=0, batch_real=scale.batch_real)
    return Steps(method, context(scale, make(scale, device)), scale.num_updates)


def distribution_engine(scale: Scale, device: torch.device) -> Run:
    return Steps(DM(batch_real=scale.batch_real), context(scale, make(scale, device)), scale.num_updates)


# IDC: one update of the stored images, then an epoch of the student on real images. Without CutMix.


def idc_textbook(scale: Scale, device: torch.device) -> Run:
    task, net = make(scale, device), fresh(scale, device)
    real, (latents, _) = by_class(task), synthetic(scale, task, scale.ipc_formed)
    student = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    optimiser = torch.optim.SGD([latents.requires_grad_()], lr=0.248)
    sizes, operations = (scale.batch_idc, scale.num_student), "_".join(IDC().matched)
    return repeated(partial(textbook.idc_step, net, student, real, latents, optimiser, *sizes, operations), scale)


def idc_engine(scale: Scale, device: torch.device) -> Run:
    method = IDC(
        batch_real=scale.batch_idc, num_student=scale.num_student, cutmix_student=0.0, clamp=False, outer_loop=LONG
    )
    ctx = context(scale, make(scale, device), ipc=scale.ipc_formed, decode=Factor())
    return Steps(method, ctx, scale.num_updates)


# FRePo and RCIG: one update of the set with a network of the pool, then a step of that network on the set.


def targets_of(labels: Tensor, scale: Scale) -> Tensor:
    return F.one_hot(labels, scale.num_classes).float() - 1 / scale.num_classes


def frepo_textbook(scale: Scale, device: torch.device) -> Run:
    task, net = make(scale, device), fresh(scale, device)
    images, labels = synthetic(scale, task)
    learned = images.requires_grad_(), targets_of(labels, scale).requires_grad_()
    optimiser, adam = torch.optim.Adam(learned, lr=3e-4), torch.optim.Adam(net.parameters(), lr=3e-4)
    real, wanted = task.train.images[:], targets_of(task.train.labels, scale)
    return repeated(partial(textbook.frepo_step, net, adam, real, wanted, *learned, optimiser, scale.num_real), scale)


def frepo_engine(scale: Scale, device: torch.device) -> Run:
    method = FRePo(batch_real=scale.num_real, pool_size=1, max_age=LONG, optim=ADAM, optim_labels=ADAM)
    return Steps(method, context(scale, make(scale, device), labels=Targets()), scale.num_updates)


def rcig_textbook(scale: Scale, device: torch.device) -> Run:
    task, net = make(scale, device), fresh(scale, device, smooth=True)
    images, labels = synthetic(scale, task, scale.ipc_solver)
    learned = [images, targets_of(labels, scale), torch.zeros((), device=device)]
    optimiser = torch.optim.Adam([x.requires_grad_() for x in learned], lr=3e-4)
    adam = torch.optim.Adam(net.parameters(), lr=5e-5)
    real, sizes = (task.train.images[:], task.train.labels), (scale.num_real, scale.solver_steps)
    return repeated(partial(textbook.rcig_step, net, adam, real, learned, optimiser, *sizes), scale)


def rcig_engine(scale: Scale, device: torch.device) -> Run:
    method = RCIG(
        batch_real=scale.num_real,
        inner_steps=scale.solver_steps,
        adjoint_steps=scale.solver_steps,
        pool_size=1,
        max_age=LONG,
        max_train_steps=1,
        optim=ADAM,
        optim_labels=ADAM,
        optim_temperature=ADAM,
    )
    task = make(scale, device, ",norm=none,activation=softplus")
    return Steps(method, context(scale, task, ipc=scale.ipc_solver, labels=Targets()), scale.num_updates)


# RaT-BPTT: one update of the images through the training of a fresh network.


def rat_bptt_textbook(scale: Scale, device: torch.device) -> Run:
    task = make(scale, device)
    images, labels = synthetic(scale, task)
    optimiser = torch.optim.Adam([images.requires_grad_()], lr=1e-3)
    data = images, labels, (task.train.images[:], task.train.labels), optimiser
    sizes = scale.num_real, scale.burn_in, scale.window
    return repeated(lambda: textbook.rat_bptt_step(fresh(scale, device), *data, *sizes, STRATEGY), scale)


def rat_bptt_engine(scale: Scale, device: torch.device) -> Run:
    method = RaTBPTT(batch_real=scale.num_real, adjoint=Truncated(window=scale.window, burn_in=scale.burn_in))
    return Steps(method, context(scale, make(scale, device)), scale.num_updates)


# SRe2L: one update of a chunk, an image of each of ten times as many classes.


def recovery(scale: Scale, device: torch.device) -> tuple[Scale, Task]:
    """Return the scale of a recovery and its task."""
    scale = dataclasses.replace(scale, num_classes=10 * scale.num_classes, batch_real=1)
    augment = Augment.parse(f"resized-crop_flip_roll:mode=M,max_roll={MAX_ROLL}")
    return scale, dataclasses.replace(make(scale, device, ",norm=batch"), augment=augment)


def recovery_textbook(scale: Scale, device: torch.device) -> Run:
    scale, task = recovery(scale, device)
    net = fresh(scale, device, batch=True).eval().requires_grad_(False)
    images, labels = synthetic(scale, task, 1)
    optimiser = torch.optim.Adam([images.requires_grad_()], lr=0.25, betas=(0.5, 0.9))
    ends = [task.transform(torch.full((1, *scale.input_shape), end, device=device)) for end in (0.0, 1.0)]
    bounds = list(zip(*(x[0, :, 0, 0].tolist() for x in ends), strict=True))
    data = net, textbook.hooks_of(net), images, labels, optimiser, bounds
    return repeated(partial(textbook.sre2l_step, *data, MAX_ROLL), scale)


def recovery_engine(scale: Scale, device: torch.device) -> Run:
    scale, task = recovery(scale, device)
    method = SRe2L(num_steps=LONG, start="real", chunk=task.num_classes)
    (spec,) = method.needs(task).values()
    teacher = {task.network.name: spec.open(expert_buffer(task))}
    return Steps(method, dataclasses.replace(context(scale, task, ipc=1), artifacts=teacher), scale.num_updates)


JOBS: dict[str, Job] = {
    "expert training": Job(
        textbook=expert_textbook,
        engine=expert_engine,
        ask=3.5,
        unit="images/s",
        steps=num_expert_batches,
        work=num_expert_images,
    ),
    "evaluation, canonical-dsa": evaluation(1, ask=3.0),
    "trajectory matching, 10 steps": matching(10, ask=1.5, ask_memory=5.0),
    "trajectory matching, 20 steps": matching(20, ask=1.5, ask_memory=5.0),
    "gradient matching, a sweep of the classes": Job(
        textbook=partial(sweep, textbook.dc_step, 0.1), engine=gradient_engine, ask=3.0
    ),
    "distribution matching, a step": Job(
        textbook=partial(sweep, textbook.dm_step, 1.0), engine=distribution_engine, ask=3.5
    ),
    "IDC, an update": Job(textbook=idc_textbook, engine=idc_engine),
    "FRePo, an update": Job(textbook=frepo_textbook, engine=frepo_engine),
    "RaT-BPTT, an update": Job(textbook=rat_bptt_textbook, engine=rat_bptt_engine),
    "RCIG, an update": Job(textbook=rcig_textbook, engine=rcig_engine),
    "SRe2L, a step": Job(textbook=recovery_textbook, engine=recovery_engine),
}

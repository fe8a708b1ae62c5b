"""The paths that are compared, each as a textbook run and an engine run of the same work."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from condense.eval.evaluate import SetScorer
from condense.eval.protocol import PROTOCOLS
from condense.method import Context, Method, State
from condense.methods.dc import DSA
from condense.methods.dm import DM
from condense.methods.mtt import MTT
from condense.networks import Functional
from condense.rng import Rng
from condense.synthetic.decode import Pixels
from condense.synthetic.labels import Hard
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
    batch: int = 256
    """Batch size of experts."""
    num_batches: int = 5
    """Batches of expert training in one run."""
    num_epochs: int = 10
    """Epochs of evaluation in one run."""
    shorten: int = 1
    """Divisor of the number of student steps in trajectory matching."""
    compute: Compute = EXACT

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
    batch=8,
    num_batches=2,
    num_epochs=2,
    shorten=5,
)
"""Sizes for a test that everything runs; they are too small to measure."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A path through the engine. ``textbook`` and ``engine`` each set up the work and return one run of it."""

    textbook: Callable[[Scale, torch.device], Run]
    engine: Callable[[Scale, torch.device], Run]
    ask: float
    """Target for the ratio of the times."""
    ask_memory: float | None = None
    """Target for the ratio of the peak memories; None: memory is not measured."""
    unit: str = "s"
    """Unit of the time: ``s`` for seconds per run, else work per second."""
    work: Callable[[Scale], int] = lambda scale: 1
    """Amount of work of one run, in the numerator of ``unit``."""

    def value(self, seconds: float, scale: Scale) -> float:
        return seconds if self.unit == "s" else self.work(scale) / seconds


def arrays(scale: Scale) -> Arrays:
    """Make a data set of handwritten digits, enlarged, tinted by class and with noise, large enough for all paths."""
    digits, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    num = max(scale.batch_real, scale.ipc, -(-scale.batch * scale.num_batches // scale.num_classes))
    y = np.repeat(np.arange(scale.num_classes), num)
    tints = 0.3 + 0.7 * rng.random((scale.num_classes, 3, 1, 1))
    pixels = digits[[rng.choice(np.flatnonzero(labels == label % 10)) for label in y]].reshape(-1, 1, 8, 8) / 16
    enlarged = F.interpolate(torch.tensor(pixels, dtype=torch.float32), size=scale.input_shape[1:], mode="bilinear")
    x = enlarged.numpy() * tints[y] + 0.1 * rng.random((len(y), *scale.input_shape))
    images = torch.tensor((x / x.max() * 255).astype(np.uint8))
    return load_data((images, torch.tensor(y)))


def make(scale: Scale, device: torch.device) -> Task:
    return make_task(
        arrays(scale),
        transform="channel",
        split=Split(val_fraction=0.0),
        network=Functional(scale.network, scale.input_shape, scale.num_classes, device),
        augment=Augment.parse(STRATEGY),
        device=device,
    )


def context(scale: Scale, task: Task, buffer: Path | None = None) -> Context:
    return Context(
        task=task,
        rng=Rng(0),
        ipc=scale.ipc,
        decode=Pixels(),
        labels=Hard(),
        compute=scale.compute,
        origin=Origin(dataset=task.dataset(), transform=task.transform.describe()),
        artifacts={} if buffer is None else {"experts": Trajectories(buffer)},
    )


def fresh(scale: Scale, device: torch.device) -> textbook.ConvNet:
    return textbook.ConvNet(scale.input_shape, scale.num_classes, scale.depth, scale.width).to(device)


def by_class(task: Task) -> list[Tensor]:
    return [task.train.images[index] for index in task.train.by_class]


def synthetic(scale: Scale, task: Task) -> tuple[Tensor, Tensor]:
    """Return the first ``ipc`` real images of every class and their labels."""
    images = torch.cat([members[: scale.ipc] for members in by_class(task)])
    return images, torch.arange(scale.num_classes, device=task.device).repeat_interleave(scale.ipc)


class Steps:
    """A method; each call runs the next step."""

    def __init__(self, method: Method, ctx: Context) -> None:
        self.method, self.ctx, self.numbers = method, ctx, itertools.count()
        self.state: State = method.init(ctx)

    def __call__(self) -> None:
        self.method.step(self.ctx, self.state, next(self.numbers))


# Expert training: one epoch of SGD with DSA.


def num_expert_images(scale: Scale) -> int:
    return scale.batch * scale.num_batches


def expert_textbook(scale: Scale, device: torch.device) -> Run:
    task, num = make(scale, device), num_expert_images(scale)
    net, images, labels = fresh(scale, device), task.train.images[:num], task.train.labels[:num]
    return partial(textbook.train, net, images, labels, 1, batch_size=scale.batch, strategy=STRATEGY)


def expert_engine(scale: Scale, device: torch.device) -> Run:
    task, num = make(scale, device), num_expert_images(scale)
    trainer = Trainer(task.network, Experts(num_epochs=1, batch_size=scale.batch).training(), scale.compute)
    source = trainer.source(task.train.images[:num], task.train.labels[:num], Rng(0), task.augment)
    return partial(trainer.run, task.network.init(Rng(0), "weights"), source)


# Evaluation: a fresh network is trained on the synthetic images for some epochs of canonical-dsa.


def evaluation_textbook(scale: Scale, device: torch.device) -> Run:
    images, labels = synthetic(scale, make(scale, device))
    return lambda: textbook.evaluate(fresh(scale, device), images, labels, scale.num_epochs, STRATEGY)


def evaluation_engine(scale: Scale, device: torch.device) -> Run:
    task = make(scale, device)
    plan = dataclasses.replace(PROTOCOLS["canonical-dsa"], num_epochs=scale.num_epochs)
    scorer = SetScorer(task.network, plan, scale.compute, task.augment)
    return partial(scorer.train, *synthetic(scale, task), Rng(0))


# Trajectory matching: one update of the images through a number of student steps.


def expert_buffer(task: Task) -> Path:
    """Build a buffer of one expert of two short epochs; return its folder."""
    few = Labelled(*(part[torch.arange(128) * 37 % len(task.train)] for part in (task.train.images, task.train.labels)))
    plan = Experts(num_experts=1, num_epochs=2, batch_size=32)
    return build(dataclasses.replace(task, train=few), plan, root=scratch(), seed=0, compute=EXACT)


def matching_textbook(num_steps: int, scale: Scale, device: torch.device) -> Run:
    task, net = make(scale, device), fresh(scale, device)
    snapshots = Trajectories(expert_buffer(task)).pair(0, 0, 2)
    start, target = ({name: p.to(device) for name, p in snapshot.items()} for snapshot in snapshots)
    images, labels = synthetic(scale, task)
    images.requires_grad_()
    lr = torch.tensor(0.01, device=device, requires_grad=True)
    optimisers = [torch.optim.SGD([images], lr=1.0, momentum=0.5), torch.optim.SGD([lr], lr=1e-5, momentum=0.5)]
    num_steps //= scale.shorten
    return lambda: textbook.mtt_step(net, start, target, images, labels, lr, optimisers, num_steps, STRATEGY)


def matching_engine(num_steps: int, scale: Scale, device: torch.device) -> Steps:
    task = make(scale, device)
    method = MTT(syn_steps=num_steps // scale.shorten, expert_epochs=2, max_start_epoch=1)
    return Steps(method, context(scale, task, expert_buffer(task)))


def matching(num_steps: int, ask: float, ask_memory: float) -> Job:
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
    return lambda: step(fresh(scale, device), real, images, optimiser, scale.batch_real, STRATEGY)


def gradient_engine(scale: Scale, device: torch.device) -> Run:
    method = DSA(outer_loop=1, inner_epochs=0, batch_real=scale.batch_real)
    return Steps(method, context(scale, make(scale, device)))


def distribution_engine(scale: Scale, device: torch.device) -> Run:
    return Steps(DM(batch_real=scale.batch_real), context(scale, make(scale, device)))


JOBS: dict[str, Job] = {
    "expert training": Job(
        textbook=expert_textbook, engine=expert_engine, ask=3.5, unit="images/s", work=num_expert_images
    ),
    "evaluation, canonical-dsa": Job(
        textbook=evaluation_textbook,
        engine=evaluation_engine,
        ask=3.0,
        unit="epochs/s",
        work=lambda scale: scale.num_epochs,
    ),
    "trajectory matching, 10 steps": matching(10, ask=3.0, ask_memory=3.0),
    "trajectory matching, 20 steps": matching(20, ask=4.0, ask_memory=5.0),
    "gradient matching, a sweep of the classes": Job(
        textbook=partial(sweep, textbook.dc_step, 0.1), engine=gradient_engine, ask=3.0
    ),
    "distribution matching, a step": Job(
        textbook=partial(sweep, textbook.dm_step, 1.0), engine=distribution_engine, ask=3.5
    ),
}

"""Compare a step of a method with the sum of its parts: what a step costs beside the computations it cannot avoid.

python -m benchmarks.parts [--only frepo rfad rcig] [--repeats N] [--threads N] [--quick] [--write]

The step and its parts run alternately in one process, so that other work on the machine slows both. A part computes on
tensors that are ready: real images and minibatches are chosen, weights are drawn, gradients are there. The ratio is the
median over the turns of the time of the step, divided by the sum of the times of its parts. It is given for the time
that passes (wall) and for that of the process (CPU), which other processes hardly change where there is one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import costs
from benchmarks.harness import Run, allocator, count, status
from benchmarks.jobs import ADAM, CPU, QUICK, Scale, Steps, context, fast, frepo_engine, make, rcig_engine
from condense.compute import prepare_device
from condense.inner import mixed_gradient
from condense.kernels import centred, feature_kernel, regression
from condense.method import Context
from condense.methods import pool
from condense.methods.frepo import half_squared_error, margin_loss
from condense.methods.pool import frozen_features
from condense.methods.rcig import mean_squared_error, outer_loss
from condense.methods.rfad import B_STD, RFAD, W_STD, gaussian
from condense.networks import Weights
from condense.synthetic.labels import Targets

Parts = dict[str, Run]


def any_of(steps: Steps) -> tuple[Context, Any, Any]:
    """Return the context, the state and the method of ``steps``, whichever method it is."""
    return steps.ctx, steps.state, steps.method


def optimisers(state: Any) -> Run:
    """Return an update of what the method learns, with the gradients that are there."""

    def run() -> None:
        for optimiser in state.optimisers.values():
            optimiser.step()

    return run


def training(steps: Steps, loss: pool.Loss) -> Run:
    """Return a training step of the network of the pool on the set: forward, backward and Adam."""
    ctx, state, method = any_of(steps)
    with torch.no_grad():
        images, targets = state.syn()
        values = pool.targets_of(ctx, targets)
    member = state.pool[0]
    params = {name: p.clone().requires_grad_() for name, p in member["params"].items()}
    adam = torch.optim.Adam(params.values(), lr=1e-9)
    trainer = pool._trainer(ctx.task.network, loss, method.lr_pool, ctx.compute)

    def run() -> None:
        adam.zero_grad()
        trainer._loss(params, member["buffers"], images, values, True).backward()
        adam.step()

    return run


def of_frepo(scale: Scale) -> tuple[Steps, Parts]:
    steps = frepo_engine(scale, CPU)
    ctx, state, method = any_of(steps)
    features, num_classes = frozen_features(ctx.task.network, ctx.compute), ctx.task.num_classes
    params, buffers = pool.weights(ctx, state.pool, 0)
    real, classes = ctx.task.train.sample(method.batch_real, ctx.rng("parts"))
    wanted, chunks = centred(classes, num_classes, real.dtype), real.split(ctx.compute.micro_batch or len(real))

    @torch.no_grad()
    def forward() -> Tensor:
        return torch.cat([features(params, buffers, x) for x in chunks])

    phi_t = forward()

    def regress() -> None:
        images, targets = state.syn()
        labels = pool.targets_of(ctx, targets)
        phi_s = features(params, buffers, images)
        k_ss, k_ts = feature_kernel(phi_s, phi_s), feature_kernel(phi_t, phi_s)
        (half_squared_error(regression(k_ts, k_ss, labels, method.ridge), wanted) + margin_loss(labels)).backward()

    return steps, {
        "real images, forward": forward,
        "set, forward, regression and backward": regress,
        "network of the pool, a training step": training(steps, half_squared_error),
        "update": optimisers(state),
    }


def of_rfad(scale: Scale) -> tuple[Steps, Parts]:
    task = make(scale, CPU, ",norm=none")
    method = RFAD(
        num_networks=2, num_batches=1, batch_real=scale.num_real, objective="mse", optim=ADAM, optim_labels=ADAM
    )
    steps = Steps(method, context(scale, task, labels=Targets()))
    ctx, state = steps.ctx, steps.state
    networks = [gaussian(task.network, ctx.rng, 0, k) for k in range(method.num_networks)]
    real, classes = task.train.sample(method.batch_real, ctx.rng("parts"))
    wanted, chunks = centred(classes, task.num_classes), real.split(ctx.compute.micro_batch or len(real))

    @torch.no_grad()
    def of_network(weights: Weights) -> Tensor:
        return torch.cat([ctx.features(*weights, chunk) for chunk in chunks])

    phi_t = [of_network(weights) for weights in networks]

    def regress() -> None:
        images, targets = state.syn()
        phi_s = [ctx.features(*weights, images) for weights in networks]
        scale = W_STD**2 / (len(networks) * phi_s[0].shape[1])
        k_ts = sum(feature_kernel(t, s) for t, s in zip(phi_t, phi_s, strict=True)) * scale + B_STD**2
        k_ss = sum(feature_kernel(s, s) for s in phi_s) * scale + B_STD**2
        predicted = regression(k_ts.double(), k_ss.double(), targets.double(), method.ridge)
        (0.5 * (predicted - wanted).square().mean()).backward()

    return steps, {
        "real images, forward": lambda: [of_network(weights) for weights in networks],
        "set, forward, regression and backward": regress,
        "update": optimisers(state),
    }


def of_rcig(scale: Scale) -> tuple[Steps, Parts]:
    steps = rcig_engine(scale, CPU)
    ctx, state, method = any_of(steps)
    with torch.no_grad():
        images, targets = state.syn()
        values = pool.targets_of(ctx, targets)
    net, real = method.convexified(ctx, state, 0), method.real(ctx, 0)
    batch, tau, lr = (images, values), torch.zeros(()), state.lr_inner
    leaves = images.clone().requires_grad_(), values.clone().requires_grad_()
    move = method.solve(net, batch, lr).point

    @torch.no_grad()
    def outer() -> Any:
        return torch.func.grad(lambda move, batch, tau: outer_loss(net, real, move, batch, tau), argnums=(0, 1, 2))(
            move, batch, tau
        )

    into_move = outer()[0]
    product = net.hessian_product(batch)
    return steps, {
        "inner problem": lambda: method.solve(net, batch, lr),
        "outer loss and its gradients": outer,
        "linear system": torch.no_grad()(lambda: method.adjoint(product, into_move, lr)),
        "mixed derivative": lambda: mixed_gradient(net.inner_loss, move, leaves, into_move),
        "network of the pool, a training step": training(steps, mean_squared_error),
        "update": optimisers(state),
    }


METHODS: dict[str, Callable[[Scale], tuple[Steps, Parts]]] = {"frepo": of_frepo, "rfad": of_rfad, "rcig": of_rcig}


def timed(run: Run) -> tuple[float, float]:
    """Return the seconds that pass and those of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, scale: Scale, repeats: int, table: costs.Table) -> None:
    """Add the medians of the step and of its parts in ms, and the median of the ratios."""
    steps, parts = METHODS[name](scale)
    runs: Parts = {"a step": steps, **parts}
    for run in runs.values():
        run()
    turns = [{part: timed(run) for part, run in runs.items()} for _ in range(repeats)]
    for part in runs:
        wall, cpu = (1e3 * statistics.median(turn[part][clock] for turn in turns) for clock in (0, 1))
        table.add(f"`{name}`", part, f"{wall:,.1f}", f"{cpu:,.1f}")
    ratios = [
        statistics.median(turn["a step"][clock] / sum(turn[part][clock] for part in parts) for turn in turns)
        for clock in (0, 1)
    ]
    table.add(f"`{name}`", "**ratio of the step to the sum of its parts**", *(f"**{ratio:.2f}**" for ratio in ratios))


COLUMNS = ("method", "", "time, ms", "processor time, ms")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("parts", __doc__)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    prepare_device("cpu")
    allocator(engine=True)
    scale = QUICK if options.quick else Scale(num_real=1024, compute=fast(CPU))
    with costs.measuring("parts", parser, words, COLUMNS, write=options.write) as table:
        for name in options.only:
            measure(name, scale, options.repeats, table)


if __name__ == "__main__":
    sys.exit(status("parts", main))

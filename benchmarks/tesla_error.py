"""Measure the error of TESLA's gradient of the images at the start of trajectory matching, with a trained expert.

    python -m benchmarks.tesla_error fashion_mnist.npz --threads 2    # without a file: the embedded digits

A ConvNet-D3-W128 is trained as an expert, on the first images of the data by plain SGD, with a snapshot after every
epoch. The student starts at one snapshot, and its target is the snapshot two epochs later. It takes its steps on real
images. ``Exact`` and ``Tesla`` differentiate the same loss in float64. Equal gradients have error 0 and cosine 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import count, machine
from benchmarks.inner_memory import Batch, Theta, matching
from condense import api
from condense.artifacts import Trajectories
from condense.buffers.trajectories import Experts
from condense.data import datasets
from condense.inner import Adjoint, Exact, Tesla, unroll
from condense.networks import Functional
from condense.rng import Rng
from condense.task import Labelled, Split

EXPERTS = Experts(num_experts=1, num_epochs=5, lr=0.01, batch_size=64)
EXPERT_EPOCHS = 2


class Case(NamedTuple):
    ipc: int
    start: int
    """Epoch of the expert's snapshot at which the student starts."""
    lr: float
    steps: int


CASES = [
    *(Case(1, start, 0.01, steps) for start in (0, 3) for steps in (10, 30, 50)),
    Case(10, 0, 0.01, 10),
]


def rows(data: Labelled, experts: Trajectories, network: Functional) -> Iterator[str]:
    """Yield one line of the table for each case."""
    for case in CASES:
        begun, draws = time.perf_counter(), Rng(0)
        images = torch.cat([data.draw(c, case.ipc, draws("images", 0, c)) for c in range(network.num_outputs)])
        labels = torch.arange(network.num_outputs).repeat_interleave(case.ipc)
        pair = experts.pair(0, case.start, case.start + EXPERT_EPOCHS)
        ends = [{name: p.double() for name, p in snapshot.items()} for snapshot in pair]
        (loss, exact), (_, tesla) = (
            gradient(network, images.double(), labels, *ends, case, adjoint) for adjoint in (Exact(), Tesla())
        )
        error, cosine = (tesla - exact).norm() / exact.norm(), F.cosine_similarity(tesla, exact, dim=0)
        measured = f"{loss:.3f} | {error:.2f} | {cosine:.3f} | {time.perf_counter() - begun:.0f}"
        yield f"| {case.ipc} | {case.start} | {case.lr} | {case.steps} | {measured} |"


def gradient(
    network: Functional, images: Tensor, labels: Tensor, start: Theta, target: Theta, case: Case, adjoint: Adjoint
) -> tuple[float, Tensor]:
    """Return the loss of trajectory matching and its gradient with respect to the images, as one vector."""

    def loss_fn(theta: Theta, batch: Batch) -> Tensor:
        return F.cross_entropy(network.logits(theta, {}, batch[0]), batch[1])

    images = images.requires_grad_()
    end = unroll(loss_fn, start, [(images, labels)] * case.steps, lr=case.lr, adjoint=adjoint)
    loss = matching(start, end, target)
    return loss.item(), torch.autograd.grad(loss, images)[0].flatten()


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("data", nargs="?", default="digits", help="name of a data set, or an .npz file")
    parser.add_argument("--num-train", type=int, default=10_000, help="number of images that the expert is trained on")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine(torch.device('cpu'))}, {options.threads} threads, torch {torch.__version__}, {date.today()}\n")
    begun, whole = time.perf_counter(), datasets.load(options.data)
    arrays = datasets.load(
        (whole.x_train[: options.num_train], whole.y_train[: options.num_train], whole.x_test, whole.y_test)
    )
    task = api.plain_task(arrays, "convnet", "channel", Split())
    with TemporaryDirectory() as folder:
        made = api.make_buffer(arrays, "convnet", experts=EXPERTS, augment="none", out=Path(folder), device="cpu")
        experts = Trajectories(made)
        accuracies = experts.manifest["experts"][0]["train_accuracy"]
        print(f"{whole.name}: expert of {EXPERTS.num_epochs} epochs on {len(task.train)} images, batches of")
        print(f"{EXPERTS.batch_size}, accuracy on them after each epoch {' '.join(f'{a:.3f}' for a in accuracies)}\n")
        print("| images a class | start epoch | lr | steps | loss | error of TESLA | cosine | seconds |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for row in rows(task.train, experts, Functional("convnet", task.input_shape, 10, dtype=torch.float64)):
            print(row, flush=True)
    print(f"\n{(time.perf_counter() - begun) / 60:.0f} minutes in all")


if __name__ == "__main__":
    main()

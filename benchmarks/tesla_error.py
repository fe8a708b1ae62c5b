"""Measure the error of TESLA's gradient of the images at the start of trajectory matching, with a trained expert.

    python -m benchmarks.tesla_error fashion_mnist.npz [--write]    # without a file: the embedded digits

A ConvNet-D3-W128 is trained as an expert, on the first images of the data by plain SGD, with a snapshot after every
epoch. The student starts at one snapshot, and its target is the snapshot two epochs later. It takes its steps on real
images. ``Exact`` and ``Tesla`` differentiate the same loss in float64. Equal gradients have error 0 and cosine 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import costs
from benchmarks.harness import count, status
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


CASES = [Case(1, start, 0.01, steps) for start in (0, 3) for steps in (10, 30, 50)]


def rows(data: Labelled, experts: Trajectories, network: Functional) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table for each case."""
    for case in CASES:
        draws = Rng(0)
        images = torch.cat([data.draw(c, case.ipc, draws("images", 0, c)) for c in range(network.num_outputs)])
        labels = torch.arange(network.num_outputs).repeat_interleave(case.ipc)
        pair = experts.pair(0, case.start, case.start + EXPERT_EPOCHS)
        ends = [{name: p.double() for name, p in snapshot.items()} for snapshot in pair]
        (loss, exact), (_, tesla) = (
            gradient(network, images.double(), labels, *ends, case, adjoint) for adjoint in (Exact(), Tesla())
        )
        error, cosine = (tesla - exact).norm() / exact.norm(), F.cosine_similarity(tesla, exact, dim=0)
        yield (
            str(case.ipc),
            str(case.start),
            str(case.lr),
            str(case.steps),
            f"{loss:.3f}",
            f"{error:.2f}",
            f"{cosine:.3f}",
        )


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


COLUMNS = ("images per class", "start epoch", "lr", "steps", "loss", "error of `Tesla`", "cosine")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("tesla_error", __doc__)
    parser.add_argument("data", nargs="?", default="digits", help="name of a data set, or an .npz file")
    parser.add_argument("--num-train", type=count, default=10_000, help="number of images of the expert")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    whole = datasets.load(options.data)
    arrays = datasets.load(
        (whole.x_train[: options.num_train], whole.y_train[: options.num_train], whole.x_test, whole.y_test)
    )
    task = api.plain_task(arrays, "convnet", "channel", Split())
    network = Functional("convnet", task.input_shape, task.num_classes, dtype=torch.float64)
    with (
        TemporaryDirectory() as folder,
        costs.measuring("tesla-error-experts", parser, words, COLUMNS, write=options.write) as table,
    ):
        made = api.make_buffer(arrays, "convnet", experts=EXPERTS, augment="none", out=Path(folder), device="cpu")
        experts = Trajectories(made)
        accuracies = ", ".join(f"{100 * a:.1f}" for a in experts.manifest["experts"][0]["train_accuracy"])
        for row in rows(task.train, experts, network):
            table.add(*row)
        table.remark = (
            f"The expert has an accuracy of {accuracies} % on its {len(task.train):,} training images after 0 to "
            f"{EXPERTS.num_epochs}\nepochs. One expert and one draw of images (n = 1, seed 0)."
        )


if __name__ == "__main__":
    sys.exit(status("tesla-error", main))

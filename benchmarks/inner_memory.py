"""Compare the peak memory of the Exact adjoint with that of full unrolling; measure the error of TESLA's gradient.

    python -m benchmarks.inner_memory [--write]          # both adjoints; Full at 40 steps needs about 15 GB
    python -m benchmarks.inner_memory --adjoints exact   # only the rows of Exact, which need less
    python -m benchmarks.inner_memory --error [--write]  # the error of TESLA

The job is one step of trajectory matching: ConvNet-D3-W128, 100 images of 3x32x32 (handwritten digits), gradients with
respect to the images and the learning rate. Each configuration runs in its own process, after a warm-up of one step on
four images. Base is the resident set before the roll-out: interpreter, libraries, network and data. Peak is the growth
over base. Linux only.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import costs
from benchmarks.harness import alone, count, peak_mb, status, status_bytes
from condense.inner import ADJOINTS, Adjoint, Exact, Full, Tesla, unroll
from condense.networks import Functional
from condense.rng import Rng

Theta = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("inner_memory", __doc__)
    parser.add_argument("--adjoints", nargs="+", default=["exact", "full"], choices=ADJOINTS)
    parser.add_argument("--steps", nargs="+", type=count, default=[5, 10, 20, 40])
    parser.add_argument("--error", action="store_true", help="measure the error of TESLA's gradient instead")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.error:
        with costs.measuring("tesla-error", parser, words, OF_ERRORS, write=options.write) as table:
            add_errors(table, MLP, (1, 0.05), (5, 0.05), (20, 0.05), (50, 0.05), (20, 0.5), (50, 0.5))
            add_errors(table, ConvNet, (1, 0.01), (10, 0.01), (10, 0.05))
        return
    with costs.measuring("inner-memory", parser, words, OF_MEMORY, write=options.write) as table:
        peaks = {}
        for adjoint in options.adjoints:
            for n in options.steps:
                base, peaks[adjoint, n] = alone(measure, ADJOINTS[adjoint](), n)
                table.add(f"`{adjoint}`", str(n), f"{base:.0f}", f"{peaks[adjoint, n]:,.0f}")
        few, many = min(options.steps), max(options.steps)
        if "exact" in options.adjoints and few < many:
            peak, vectors = peaks["exact", many], many * ConvNet().net.num_params * 4 / 1e6
            bound = 1.2 * peaks["exact", few] + vectors
            table.remark = (
                f"`exact` at {many} steps is {'within' if peak <= bound else 'above'} the bound of 1.2 times its peak "
                f"at {few} steps plus\n{many} parameter vectors ({vectors:.0f} MB), which is {bound:.0f} MB."
            )


OF_MEMORY = "adjoint", "steps", "base, MB", "peak over base, MB"
OF_ERRORS = "network", "steps", "lr", "`Exact`", "`Exact`, float32", "`Full`, float32", "`Tesla`", "cosine"


def measure(adjoint: Adjoint, num_steps: int) -> tuple[float, float]:
    """Return base and peak over base of one matching step, in megabytes."""
    problem = ConvNet()
    target = {name: torch.zeros_like(p) for name, p in problem.start.items()}
    problem.gradient(adjoint, 1, 0.01, target, num_images=4)
    base = status_bytes("VmRSS") / 1e6
    return base, peak_mb(lambda: problem.gradient(adjoint, num_steps, 0.01, target), torch.device("cpu"))


def add_errors(table: costs.Table, kind: type[MLP] | type[ConvNet], *cases: tuple[int, float]) -> None:
    """Add the errors of the gradient of the images relative to ``Full`` in float64, and the cosine between ``Tesla``
    and ``Full``, for each number of steps and learning rate."""
    single, double = kind(torch.float32), kind(torch.float64)
    target = single.target()
    wide = {name: p.double() for name, p in target.items()}
    for n, lr in cases:
        full, exact, tesla = (double.gradient(a, n, lr, wide).flatten() for a in (Full(), Exact(), Tesla()))
        rounded = (single.gradient(a, n, lr, target).flatten() for a in (Exact(), Full()))
        errors = [f"{((other - full).norm() / full.norm()).item():.2g}" for other in (exact, *rounded, tesla)]
        cosine = F.cosine_similarity(tesla, full, dim=0).item()
        table.add(kind.__name__, str(n), str(lr), *errors, f"{cosine:.3f}")


class ConvNet:
    """ConvNet-D3-W128 and 100 digits, ten per class; the expert takes 50 steps on batches of the other digits."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels, dtype=dtype).view(-1, 1, 8, 8)
        x = F.interpolate((x - x.mean()) / x.std(), size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
        y = torch.tensor(labels)
        chosen = torch.cat([(y == c).nonzero()[:10, 0] for c in range(10)])
        rest = torch.ones(len(y), dtype=torch.bool).index_fill(0, chosen, False)
        self.images, self.labels, self.others = x[chosen], y[chosen], (x[rest], y[rest])
        self.net = Functional("convnet", (3, 32, 32), 10, dtype=dtype)
        self.start, self.buffers = self.net.init(Rng(0), "weights")

    def loss_fn(self, theta: Theta, batch: Batch) -> Tensor:
        return F.cross_entropy(self.net.logits(theta, self.buffers, batch[0]), batch[1])

    def target(self) -> Theta:
        x, y = self.others
        drawn = [Rng(0)("expert", step).integers(0, len(y), 100) for step in range(50)]
        return unroll(self.loss_fn, self.start, [(x[index], y[index]) for index in drawn], lr=0.01)

    def gradient(self, adjoint: Adjoint, num_steps: int, lr: float, target: Theta, num_images: int = 100) -> Tensor:
        images = self.images[:num_images].clone().requires_grad_()
        rate = torch.tensor(lr, requires_grad=True)
        batches = [(images, self.labels[:num_images])] * num_steps
        end = unroll(self.loss_fn, self.start, batches, lr=rate, adjoint=adjoint)
        return torch.autograd.grad(matching(self.start, end, target), (images, rate))[0]


class MLP:
    """A network of two layers, 16 random inputs and random targets; the expert takes 50 steps on 16 others."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.start = {"w1": draw(10, 32) / 10**0.5, "b1": draw(32), "w2": draw(32, 5) / 32**0.5}
        self.images, self.labels = draw(16, 10), draw(16, 5).softmax(1)
        self.others = draw(16, 10), draw(16, 5).softmax(1)

    @staticmethod
    def loss_fn(theta: Theta, batch: Batch) -> Tensor:
        hidden = torch.tanh(batch[0] @ theta["w1"] + theta["b1"])
        return F.cross_entropy(hidden @ theta["w2"], batch[1])

    def target(self) -> Theta:
        return unroll(self.loss_fn, self.start, [self.others] * 50, lr=0.1)

    def gradient(self, adjoint: Adjoint, num_steps: int, lr: float, target: Theta) -> Tensor:
        images = self.images.clone().requires_grad_()
        end = unroll(self.loss_fn, self.start, [(images, self.labels)] * num_steps, lr=lr, adjoint=adjoint)
        return torch.autograd.grad(matching(self.start, end, target), images)[0]


def matching(start: Theta, end: Theta, target: Theta) -> Tensor:
    """Return the loss of trajectory matching, |end - target|^2 / |start - target|^2."""

    def distance(theta: Theta) -> Tensor:
        return torch.stack([(theta[name] - target[name]).square().sum() for name in target]).sum()

    return distance(end) / distance(start)


if __name__ == "__main__":
    sys.exit(status("inner-memory", main))

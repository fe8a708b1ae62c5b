"""Inner loop: every adjoint against autograd, finite differences, ``higher`` and its slow twin."""

from __future__ import annotations

import functools
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchvision.models.efficientnet import MBConv, MBConvConfig

from condense.augment import Augment
from condense.inner import (
    SGD,
    Adam,
    Adjoint,
    Checkpointed,
    Exact,
    Full,
    Higher,
    RandomTruncated,
    Rule,
    Tesla,
    Truncated,
    advance,
    rollout,
    unroll,
)
from condense.networks import Factory, Functional, InputShape
from condense.rng import Rng
from tests.reference import unroll as twin

RULES = [SGD(), SGD(momentum=0.9, weight_decay=0.1), Adam(), Adam(betas=(0.5, 0.9), eps=1e-3)]
FORWARD = [Exact(), Checkpointed(2), Full(), Truncated(2), Higher()]
Theta = dict[str, Tensor]


def draw(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.softmax(-1))


def mlp(theta: Theta, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0] @ theta["w1"] + theta["b1"])
    return soft_cross_entropy(hidden @ theta["w2"], batch[1])


def mlp_theta(grad: bool = False) -> Theta:
    shapes = {"w1": (4, 3), "b1": (3,), "w2": (3, 2)}
    return {name: draw(*shape, seed=i, grad=grad) for i, (name, shape) in enumerate(shapes.items())}


def mlp_batches(num_steps: int, grad: bool = False) -> list[tuple[Tensor, Tensor]]:
    return [(draw(3, 4, seed=t, grad=grad), draw(3, 2, seed=50 + t, grad=grad)) for t in range(num_steps)]


def total(theta: Theta) -> Tensor:
    """An outer loss in which every parameter has a gradient of its own."""
    return sum((torch.sin(p * (i + 1)).sum() for i, p in enumerate(theta.values())), torch.zeros(()))


def gradients(theta: Theta, *inputs: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(total(theta), inputs)])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class Convolutional:
    """Minibatches of learned images with soft labels, augmented inside the loss: what a method does."""

    def __init__(self, network: str, num_steps: int = 5, dtype: torch.dtype = torch.float64) -> None:
        rng, augment = Rng(0), Augment.parse("color_crop_cutout_flip_scale_rotate")
        net = Functional(network, (3, 8, 8), 4, dtype=dtype)
        weights = net.init(rng, "weights")
        self.images = draw(12, 3, 8, 8, seed=1).to(dtype).requires_grad_()
        self.labels = draw(12, 4, seed=2).to(dtype).requires_grad_()
        self.lr = torch.full((num_steps,), 0.05, dtype=dtype, requires_grad=True)
        self.theta = {name: p.requires_grad_() for name, p in weights.params.items()}
        self.inputs = [self.images, self.labels, self.lr, *self.theta.values()]
        self.batches = []
        for t in range(num_steps):
            index = rng("batch", t).permutation(12)[: 8 - t % 2]
            params = augment.sample(rng("augment", t), len(index), (3, 8, 8), siamese=False)
            self.batches.append((self.images, self.labels, index, params))

        def loss_fn(theta: Theta, batch: Any) -> Tensor:
            images, labels, index, params = batch
            x = augment.apply(images[index], params)
            return soft_cross_entropy(net.logits(theta, weights.buffers, x), labels[index])

        self.loss_fn = loss_fn

    def unroll(self, adjoint: Adjoint, rule: Rule, **options: bool) -> Theta:
        batches, lr = self.batches, self.lr
        return unroll(self.loss_fn, self.theta, batches, rule=rule, lr=lr, adjoint=adjoint, **options)


# The gradient


@pytest.mark.parametrize("lr", [0.3, [0.3, 0.1, 0.2]], ids=["scalar", "per step"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradcheck_of_images_labels_lr_and_theta(rule: Rule, lr: float | list[float]) -> None:
    theta, batches = mlp_theta(grad=True), mlp_batches(3, grad=True)
    rate = torch.tensor(lr, dtype=torch.float64, requires_grad=True)

    def end(rate: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        pairs = list(zip(inputs[3::2], inputs[4::2], strict=True))
        return tuple(unroll(mlp, dict(zip(theta, inputs[:3], strict=True)), pairs, rule=rule, lr=rate).values())

    flat = [x for batch in batches for x in batch]
    assert torch.autograd.gradcheck(end, (rate, *theta.values(), *flat))


@pytest.mark.parametrize(
    ("network", "rule"),
    [
        ("convnet:depth=2,width=6", SGD()),
        ("convnet:depth=2,width=6", SGD(momentum=0.9, weight_decay=0.01)),
        ("convnet:depth=2,width=6,norm=batch", SGD(momentum=0.5)),
        ("convnet:depth=2,width=6,norm=none,activation=swish", Adam(eps_root=0.0)),
    ],
)
@pytest.mark.parametrize("adjoint", [Exact(), Checkpointed(2), Checkpointed(7), Truncated(5), Higher()], ids=str)
def test_exact_adjoints_equal_autograd_on_a_convnet(adjoint: Adjoint, network: str, rule: Rule) -> None:
    problem = Convolutional(network)
    expected = gradients(problem.unroll(Full(), rule), *problem.inputs)
    assert error(gradients(problem.unroll(adjoint, rule), *problem.inputs), expected) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exact_follows_the_published_recursion(momentum: float) -> None:
    loss, (w, xs, ys) = flat_problem()
    lrs = [0.1, 0.4, 0.2, 0.3]
    dxs, dys, dlrs, dw = twin.adjoint(loss, w, xs, ys, lrs, momentum, lambda end: end.sin().sum())
    lr = torch.tensor(lrs, dtype=torch.float64, requires_grad=True)
    theta = {"w": w.clone().requires_grad_()}
    batches = [(x.clone().requires_grad_(), y.clone().requires_grad_()) for x, y in zip(xs, ys, strict=True)]
    end = unroll(lambda t, b: loss(t["w"], *b), theta, batches, rule=SGD(momentum=momentum), lr=lr)
    inputs = [*(x for x, _ in batches), *(y for _, y in batches), lr, theta["w"]]
    expected = torch.cat([z.flatten() for z in (*dxs, *dys, torch.stack(dlrs), dw)])
    assert error(gradients(end, *inputs), expected) < 1e-12


def flat_problem() -> tuple[twin.Loss, tuple[Tensor, list[Tensor], list[Tensor]]]:
    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return soft_cross_entropy(torch.tanh(x @ w[:12].view(4, 3)) @ w[12:].view(3, 2), y)

    xs, ys = zip(*mlp_batches(4), strict=True)
    return loss, (draw(18, seed=9), list(xs), list(ys))


@pytest.mark.parametrize("adjoint", [Exact(), Checkpointed(2), Full(), Higher()], ids=lambda a: a.name)
def test_preparing_outside_the_loss_is_the_same(adjoint: Adjoint) -> None:
    """Indexing and augmentation in ``prepare`` instead of ``loss_fn``: equal gradients, in all inputs."""
    problem = Convolutional("convnet:depth=1,width=4", 4)
    augment, theta = Augment.parse("color_crop_cutout_flip_scale_rotate"), problem.theta
    network = Functional("convnet:depth=1,width=4", (3, 8, 8), 4, dtype=torch.float64)

    def prepare(item: Any) -> tuple[Tensor, Tensor]:
        images, labels, index, params = item
        return augment.apply(images[index], params), labels[index]

    def loss_fn(theta: Theta, batch: tuple[Tensor, Tensor]) -> Tensor:
        return soft_cross_entropy(network.logits(theta, {}, batch[0]), batch[1])

    end = unroll(loss_fn, theta, problem.batches, prepare=prepare, lr=problem.lr, adjoint=adjoint)
    expected = gradients(problem.unroll(adjoint, SGD()), *problem.inputs)
    torch.testing.assert_close(gradients(end, *problem.inputs), expected, rtol=1e-9, atol=1e-12)


def test_a_preparation_that_hides_an_input_is_refused() -> None:
    scale = draw(1, grad=True)
    with pytest.raises(ValueError, match="prepare uses scale from outside"):
        unroll(mlp, mlp_theta(), mlp_batches(2), prepare=lambda b: (b[0] * scale, b[1]), lr=0.1)


def test_a_preparation_may_leave_an_input_unused() -> None:
    batches = mlp_batches(2, grad=True)
    end = unroll(mlp, mlp_theta(), batches, prepare=lambda b: (b[0].detach(), b[1]), lr=0.1)
    grads = torch.autograd.grad(total(end), [batches[0][0], batches[0][1]])
    assert grads[0].count_nonzero() == 0 and grads[1].count_nonzero() == grads[1].numel()
    only_x = [(x, y.detach()) for x, y in batches]
    end = unroll(mlp, mlp_theta(grad=True), only_x, prepare=lambda b: (b[0].detach(), b[1]), lr=0.1)
    assert torch.autograd.grad(total(end), batches[0][0])[0].count_nonzero() == 0


@pytest.mark.parametrize(("snapshots", "tolerance"), [("host", 0.0), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=str)
def test_points_kept_elsewhere_or_rounded(snapshots: Any, tolerance: float, rule: Rule) -> None:
    problem = Convolutional("convnet:depth=1,width=4")
    adjoints = Exact(snapshots=snapshots), Exact()
    found, expected = (gradients(problem.unroll(adjoint, rule), *problem.inputs) for adjoint in adjoints)
    difference = error(found, expected)
    assert difference <= tolerance and (tolerance == 0 or difference > 0)


def test_a_tensor_of_many_batches_gets_the_sum() -> None:
    x, y = mlp_batches(1)[0]
    shared, apart = x.clone().requires_grad_(), [x.clone().requires_grad_() for _ in range(3)]
    one = unroll(mlp, mlp_theta(), [(shared, y)] * 3, lr=0.5)
    many = unroll(mlp, mlp_theta(), [(z, y) for z in apart], lr=0.5)
    assert error(gradients(one, shared), gradients(many, *apart).view(3, -1).sum(0)) < 1e-12


@pytest.mark.parametrize("adjoint", [Exact(), Tesla()], ids=str)
def test_at_zero_lr_nothing_moves(adjoint: Adjoint) -> None:
    theta, batches = mlp_theta(), mlp_batches(3, grad=True)
    end = unroll(mlp, theta, batches, lr=0.0, adjoint=adjoint)
    assert all(torch.equal(end[name], theta[name]) for name in theta)
    assert not gradients(end, *(x for x, _ in batches)).any()


def test_adam_is_differentiable_where_a_gradient_is_zero() -> None:
    def loss_fn(theta: Theta, batch: Any) -> Tensor:
        return mlp(theta, batch) + F.relu(batch[0] @ theta["dead"] - 100).sum()

    theta, batches = mlp_theta() | {"dead": draw(4)}, mlp_batches(3, grad=True)
    finite, infinite = (
        gradients(unroll(loss_fn, theta, batches, rule=rule, lr=0.1), batches[0][0]).isfinite().all()
        for rule in (Adam(), Adam(eps_root=0.0))
    )
    assert finite and not infinite


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_a_run_is_continued_from_where_another_ended(rule: Rule) -> None:
    theta, batches = mlp_theta(), mlp_batches(5, grad=True)
    whole = unroll(mlp, theta, batches, rule=rule, lr=0.1, adjoint=Truncated(3))
    start, state = advance(mlp, (theta, rule.init(theta)), batches[:2], rule=rule, lr=0.1)
    assert not any(x.requires_grad for x in tree_leaves((start, state)))
    continued = unroll(mlp, start, batches[2:], rule=rule, lr=0.1, state=state)
    for x, y in batches[2:]:
        grads = [torch.autograd.grad(total(end), (x, y), retain_graph=True) for end in (whole, continued)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(p, whole[name]) for name, p in continued.items())


def test_only_what_requires_grad_gets_one() -> None:
    theta, batches = mlp_theta(), mlp_batches(2)
    batches[1][0].requires_grad_()
    total(unroll(mlp, theta, batches, lr=0.1)).backward()
    assert batches[1][0].grad is not None
    assert all(x.grad is None for x in (*theta.values(), *batches[0], batches[1][1]))


def test_exact_is_differentiable_once_and_says_so() -> None:
    x, y = mlp_batches(1, grad=True)[0]
    (grad,) = torch.autograd.grad(total(unroll(mlp, mlp_theta(), [(x, y)], lr=0.1)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_input_changed_in_place_before_the_way_back_is_refused() -> None:
    x, y = mlp_batches(1, grad=True)[0]
    end = unroll(mlp, mlp_theta(), [(x, y)], lr=0.1)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="inplace"):
        total(end).backward()


# The run


@pytest.mark.parametrize("adjoint", FORWARD, ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (SGD(), torch.optim.SGD),
        (SGD(momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.9)),
        (
            SGD(momentum=0.5, weight_decay=0.1),
            functools.partial(torch.optim.SGD, momentum=0.5, weight_decay=0.1),
        ),
        (Adam(eps_root=0.0), torch.optim.Adam),
        (
            Adam(betas=(0.5, 0.9), eps=0.1, eps_root=0.0),
            functools.partial(torch.optim.Adam, betas=(0.5, 0.9), eps=0.1),
        ),
    ],
    ids=str,
)
def test_steps_are_those_of_torch_optim(
    rule: Rule, optimizer: Callable[..., torch.optim.Optimizer], adjoint: Adjoint, grad: bool
) -> None:
    batches, lrs = mlp_batches(5, grad), torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    params: Theta = {name: nn.Parameter(p) for name, p in mlp_theta().items()}
    optim = optimizer(params.values(), lr=1.0)
    for batch, lr in zip(batches, lrs, strict=True):
        optim.param_groups[0]["lr"] = lr.item()
        optim.zero_grad()
        mlp(params, batch).backward()
        optim.step()
    end = unroll(mlp, mlp_theta(), batches, rule=rule, lr=lrs, adjoint=adjoint)
    assert all(end[name].requires_grad is grad for name in end)
    for name, p in params.items():
        torch.testing.assert_close(end[name].detach(), p.detach(), rtol=1e-12, atol=1e-13)


def test_adam_keeps_its_precision_in_float32() -> None:
    theta = {name: p.float() for name, p in mlp_theta().items()}
    batches = [(x.float(), y.float()) for x, y in mlp_batches(5)]
    end, exact = (unroll(mlp, *args, rule=Adam(), lr=0.1) for args in ((theta, batches), (mlp_theta(), mlp_batches(5))))
    for name, p in exact.items():
        assert end[name].dtype == torch.float32
        torch.testing.assert_close(end[name], p.float(), rtol=1e-5, atol=1e-6)


def test_no_steps_lead_nowhere() -> None:
    theta = mlp_theta()
    assert unroll(mlp, theta, [], lr=0.1) == theta


def test_the_inputs_stay_as_they_are() -> None:
    theta, batches = mlp_theta(grad=True), mlp_batches(2, grad=True)
    total(unroll(mlp, theta, batches, rule=SGD(momentum=0.9), lr=0.1)).backward()
    assert all(torch.equal(p, q) for p, q in zip(theta.values(), mlp_theta().values(), strict=True))
    assert all(
        torch.equal(x, z) for b, c in zip(batches, mlp_batches(2), strict=True) for x, z in zip(b, c, strict=True)
    )


# Memory


def held_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of the tensors that the graph of what ``run`` returns keeps for the way back."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held.add(packed := Held(tensor.detach()))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        output = run()
    gc.collect()
    return sum(h.tensor.nbytes for h in held), output


@pytest.mark.parametrize(("rule", "points"), [(SGD(), 1), (SGD(momentum=0.9), 2), (Adam(), 3)], ids=str)
def test_exact_holds_the_points_and_no_graph(rule: Rule, points: int) -> None:
    def held(num_steps: int, every: int) -> int:
        problem = Convolutional("convnet:depth=2,width=6", num_steps)
        num_bytes, end = held_bytes(lambda: problem.unroll(Checkpointed(every) if every > 1 else Exact(), rule))
        steps = sum(p.nbytes for p in end.values()) * points + (8 if isinstance(rule, Adam) else 0)
        inputs = sum(x.nbytes for x in problem.inputs)
        assert num_bytes == inputs + len(range(0, num_steps, every)) * steps
        return num_bytes

    held(3, 1), held(6, 1), held(6, 4)


def test_full_holds_the_graph_of_every_step() -> None:
    problem = Convolutional("convnet:depth=2,width=6")
    full, _end = held_bytes(lambda: problem.unroll(Full(), SGD()))
    exact, _end = held_bytes(lambda: problem.unroll(Exact(), SGD()))
    assert full > 5 * exact


def test_the_way_forth_builds_the_graph_of_a_gradient_and_not_of_its_gradient() -> None:
    theta, batch = mlp_theta(grad=True), mlp_batches(1)[0]
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(theta, batch)
        once = len(packed)
        unroll(mlp, mlp_theta(), [batch] * 3, lr=0.1)
    assert once > 0 and len(packed) == once * (1 + 3)


@pytest.mark.parametrize("adjoint", FORWARD, ids=str)
def test_nothing_is_kept_where_no_gradient_is_wanted(adjoint: Adjoint) -> None:
    with torch.no_grad():
        num_bytes, end = held_bytes(
            lambda: unroll(mlp, mlp_theta(grad=True), mlp_batches(3, grad=True), lr=0.1, adjoint=adjoint)
        )
    assert num_bytes == 0 and not any(p.requires_grad for p in end.values())


# Truncation


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=str)
def test_truncated_differentiates_the_window_only(rule: Rule) -> None:
    batches, theta = mlp_batches(6, grad=True), mlp_theta(grad=True)
    end = unroll(mlp, theta, batches, rule=rule, lr=0.1, adjoint=Truncated(2))
    full = unroll(mlp, theta, batches, rule=rule, lr=0.1)
    assert all(torch.equal(end[name], full[name]) for name in end)
    inputs = [x for batch in batches for x in batch]
    expected = torch.autograd.grad(total(full), inputs)
    found = torch.autograd.grad(total(end), [*inputs, *theta.values()], allow_unused=True)
    assert found[:8] == (None,) * 8 and found[12:] == (None,) * 3
    for grad, reference in zip(found[8:12], expected[8:], strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-12, atol=1e-15)


def test_truncated_ends_with_its_window() -> None:
    batches, lr = mlp_batches(6), torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    end = unroll(mlp, mlp_theta(), batches, lr=lr, adjoint=Truncated(2, burn_in=1))
    expected = unroll(mlp, mlp_theta(), batches[:3], lr=lr[:3])
    assert all(torch.equal(end[name], expected[name]) for name in end)
    with pytest.raises(ValueError, match="2 batches are too few: burn_in 1 and window 2"):
        unroll(mlp, mlp_theta(), batches[:2], lr=0.1, adjoint=Truncated(2, burn_in=1))


def test_random_truncation_draws_only_when_asked() -> None:
    adjoint, state = RandomTruncated(lo=2, hi=4, window=3), torch.random.get_rng_state()
    drawn = [adjoint.resolve(Rng(0)("burn-in", step)) for step in range(50)]
    assert {d.burn_in for d in drawn} == {2, 3, 4} and {d.window for d in drawn} == {3}
    assert drawn == [adjoint.resolve(Rng(0)("burn-in", step)) for step in range(50)]
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"pass adjoint\.resolve"):
        unroll(mlp, mlp_theta(), mlp_batches(7), lr=0.1, adjoint=adjoint)
    assert Exact().resolve(Rng(0)("burn-in")) == Exact()


# TESLA


def test_tesla_is_the_published_gradient() -> None:
    loss, (w, xs, ys) = flat_problem()
    target = draw(18, seed=10)
    dxs, dlr = twin.tesla(loss, w, xs, ys, 0.3, target)
    images, lr = (
        [x.clone().requires_grad_() for x in xs],
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )
    batches = list(zip(images, ys, strict=True))
    end = unroll(lambda t, b: loss(t["w"], *b), {"w": w}, batches, lr=lr, adjoint=Tesla())["w"]
    objective = (end - target).square().sum() / (w - target).square().sum()
    found = torch.autograd.grad(objective, (*images, lr))
    assert error(torch.cat([g.flatten() for g in found]), torch.cat([z.flatten() for z in (*dxs, dlr)])) < 1e-12


def test_tesla_is_exact_for_one_step_and_for_no_more() -> None:
    assert Exact.exact and not Tesla.exact
    for num_steps, close in ((1, True), (4, False)):
        batches = mlp_batches(num_steps, grad=True)
        images = [x for x, _ in batches]
        tesla, exact = (
            gradients(unroll(mlp, mlp_theta(), batches, lr=0.5, adjoint=adjoint), *images)
            for adjoint in (Tesla(), Exact())
        )
        assert (error(tesla, exact) < 1e-12) is close and error(tesla, exact) < 1


# What is refused


@pytest.mark.parametrize(
    ("adjoint", "rule", "message"),
    [
        (Tesla(), SGD(momentum=0.9), "tesla does not support SGD"),
        (Tesla(), Adam(), "tesla does not support Adam"),
        (Higher(), Adam(), "higher does not support Adam"),
    ],
)
def test_a_rule_that_the_adjoint_does_not_know(adjoint: Adjoint, rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unroll(mlp, mlp_theta(), mlp_batches(2), rule=rule, lr=0.1, adjoint=adjoint)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: Truncated(0), "truncated: window is 0"),
        (lambda: Checkpointed(0), "checkpointed: every is 0"),
        (lambda: RandomTruncated(lo=3, hi=2), "random-truncated"),
        (lambda: Truncated(2, burn_in=-1), "truncated: burn_in is -1"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas \(0\.9, 1\.0\)"),
        (lambda: unroll(mlp, mlp_theta(), mlp_batches(2), lr=torch.ones(3)), r"lr has shape \(3,\)"),
        (
            lambda: unroll(mlp, mlp_theta(), mlp_batches(2), lr=0.1, adjoint=Full(), compile=True),
            "full cannot be compiled",
        ),
        (
            lambda: unroll(mlp, mlp_theta(), mlp_batches(2), lr=0.1, adjoint=Higher(), compile=True),
            "higher cannot be compiled",
        ),
    ],
)
def test_values_out_of_range(make: Callable[[], Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"^{wrong}: [^\n]+; [^\n]+$"):
        make()


TEMPERATURE = draw(1, grad=True)


class Scaled:
    def __init__(self, grad: bool) -> None:
        self.scales = {"outer": [draw(1, grad=grad)]}

    def loss(self, theta: Theta, batch: Any) -> Tensor:
        return mlp(theta, batch) * self.scales["outer"][0].sum()

    __call__ = loss


def closing_over_a_module() -> Callable[..., Tensor]:
    decoder, idle = nn.Linear(4, 4).double(), nn.Linear(4, 4)
    return lambda theta, batch: mlp(theta, (decoder(batch[0]) * idle.in_features, batch[1]))


def closing_over_a_result() -> Callable[..., Tensor]:
    decoded = draw(4, 4, grad=True) * 2
    return lambda theta, batch: mlp(theta, (batch[0] @ decoded, batch[1]))


def calling_what_closes() -> Callable[..., Tensor]:
    inner = closing_over_a_module()
    return lambda theta, batch: inner(theta, batch) * 2


def reading_a_global() -> Callable[..., Tensor]:
    return lambda theta, batch: mlp(theta, batch) * TEMPERATURE.sum()


def holding_an_argument() -> Callable[..., Tensor]:
    def loss_fn(theta: Theta, batch: Any, scale: Tensor) -> Tensor:
        return mlp(theta, batch) * scale.sum()

    return functools.partial(loss_fn, scale=draw(1, grad=True))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (closing_over_a_module, r"decoder.weight, decoder.bias"),
        (closing_over_a_result, r"decoded"),
        (calling_what_closes, r"inner.decoder.weight, inner.decoder.bias"),
        (reading_a_global, r"TEMPERATURE"),
        (holding_an_argument, r"scale"),
        (lambda: Scaled(grad=True).loss, r"self.scales\['outer'\]\[0\]"),
        (lambda: Scaled(grad=True), r"scales\['outer'\]\[0\]"),
    ],
)
@pytest.mark.parametrize("adjoint", [Exact(), Full()], ids=str)
def test_a_hidden_input_is_refused_by_name(
    make: Callable[[], Callable[..., Tensor]], name: str, adjoint: Adjoint
) -> None:
    with pytest.raises(ValueError, match=rf"^loss_fn uses {name} from outside: [^\n]*$"):
        unroll(make(), mlp_theta(), mlp_batches(2), lr=0.1, adjoint=adjoint)


def test_a_tensor_inside_an_opaque_item_of_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_fn uses batch\[2\].scales\['outer'\]\[0\] from outside"):
        unroll(lambda t, b: b[2].loss(t, b), mlp_theta(), [(*mlp_batches(1)[0], Scaled(grad=True))], lr=0.1)


def test_what_is_closed_over_but_not_differentiated_is_welcome() -> None:
    skeleton, scaled = nn.Linear(4, 2).double(), Scaled(grad=False)

    def loss_fn(theta: Theta, batch: Any) -> Tensor:
        logits = torch.func.functional_call(skeleton, theta, (batch[0] * TEMPERATURE.detach(),))
        return soft_cross_entropy(logits, batch[1]) * scaled.scales["outer"][0].sum()

    theta, batches = dict(nn.Linear(4, 2).double().named_parameters()), mlp_batches(2, grad=True)
    assert gradients(unroll(loss_fn, theta, batches, lr=0.1), batches[0][0]).any()


def test_a_loss_fn_is_checked_once() -> None:
    calls = []

    def loss_fn(theta: Theta, batch: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return mlp(theta, batch)

    for _ in range(2):
        unroll(loss_fn, mlp_theta(), mlp_batches(3), lr=0.1)
    assert len(calls) == 2 * 3 + 1


# torch.compile


@pytest.mark.filterwarnings("always")
def test_what_does_not_compile_runs_eagerly_with_one_warning() -> None:
    def loss_fn(theta: Theta, batch: Any) -> Tensor:
        return mlp(theta, batch) * (2.0 if theta["b1"].sum().item() > 0 else 3.0)

    def grads(compiled: bool) -> Tensor:
        batches = mlp_batches(3, grad=True)
        return gradients(unroll(loss_fn, mlp_theta(), batches, lr=0.1, compile=compiled), batches[0][0])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = grads(compiled=True)
    assert [w for w in caught if "runs eagerly" in str(w.message)] == caught[:1]
    assert torch.equal(found, grads(compiled=False))


def test_an_error_of_the_loss_is_its_own_under_compile() -> None:
    def loss_fn(theta: Theta, batch: Any) -> Tensor:
        if batch[1].shape[1] == 3:
            raise KeyError("no such label")
        return mlp(theta, batch)

    batches = [mlp_batches(1)[0], (draw(5, 4), draw(5, 3))]
    with pytest.raises(KeyError, match="no such label"):
        unroll(loss_fn, mlp_theta(), batches[1:], lr=0.1, compile=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "network",
    [
        "convnet:depth=2,width=4",
        "convnet:depth=2,width=4,norm=batch",
        "convnet:depth=2,width=4,norm=layer",
        "convnet:depth=2,width=4,norm=group",
        "vit:depth=1,width=6",
    ],
)
def test_what_is_compiled_equals_its_eager_twin(network: str, rule: Rule) -> None:
    """A step and its way back, not compiled, where the rule has a state and everything wants a gradient."""
    problem, lr = Convolutional(network, 2), torch.tensor(0.1, dtype=torch.float64)
    images, labels, *rest = problem.batches[0]
    with torch.no_grad():
        theta = {name: p.clone() for name, p in problem.theta.items()}
        point, _ = rollout._eager_advance(problem.loss_fn, rule, (theta, rule.init(theta)), problem.batches[1], lr)
        leaves, spec = tree_flatten((images.detach(), labels.detach(), *rest))
        batch = tree_unflatten(leaves, spec)
        expected, _ = rollout._eager_advance(problem.loss_fn, rule, point, batch, lr)
        after, grads = rollout._step(problem.loss_fn, rule, point, batch, lr)
        lam = tree_map(lambda x: draw(x.numel(), seed=x.numel()).view_as(x), point)
        args = (problem.loss_fn, rule, point, grads, leaves, (0, 1), spec, lr, lam)
        found, twin = rollout._pullback(*args), rollout._eager_pullback(*args)
    # Adam divides the biases before a norm, whose gradient is rounding error, by about 1e-8
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
    (before, into_batch, into_lr), (before_twin, into_batch_twin, into_lr_twin) = found, twin
    assert len(into_batch) == 2 and all(x.any() for x in (*into_batch, into_lr))
    torch.testing.assert_close(before, before_twin, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close((into_batch, into_lr), (tuple(into_batch_twin), into_lr_twin), rtol=1e-8, atol=1e-11)


class Dropping:
    """A network that draws at every step, in float64."""

    def __init__(self, network: Factory | str, shape: InputShape, num_steps: int, dtype: torch.dtype = torch.float64):
        functional = Functional(network, shape, 3, dtype=dtype)
        weights = functional.init(Rng(0), "weights")
        self.theta = {name: p.requires_grad_() for name, p in weights.params.items()}
        self.images = draw(4, *shape).to(dtype).requires_grad_()
        self.batches = [(self.images, torch.arange(4) % 3)] * num_steps

        def loss_fn(theta: Theta, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(functional.logits(theta, weights.buffers, batch[0]), batch[1])

        self.loss_fn = loss_fn

    def gradients(self, adjoint: Adjoint, rule: Rule = SGD(momentum=0.5), **options: bool) -> Tensor:
        with Rng(0).forked("dropout"):
            state = torch.get_rng_state()
            end = unroll(self.loss_fn, self.theta, self.batches, rule=rule, lr=0.1, adjoint=adjoint, **options)
            assert not torch.equal(torch.get_rng_state(), state)
            after = torch.get_rng_state()
            found = gradients(end, self.images, *self.theta.values())
            assert torch.equal(torch.get_rng_state(), after)
        return found


def with_dropout(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Masks of two shapes."""
    first = [nn.Flatten(), nn.Dropout(0.2), nn.Linear(math.prod(input_shape), 6), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Linear(6, num_classes))


def with_stochastic_depth(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Blocks of torchvision's EfficientNet, which drop branches, and a dropout of channels."""
    config = MBConvConfig(2, 3, 1, 8, 8, 1)
    blocks = [MBConv(config, 0.5, nn.BatchNorm2d) for _ in range(2)]
    head = [nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)]
    return nn.Sequential(nn.Conv2d(input_shape[0], 8, 3, padding=1), *blocks, *head)


@pytest.mark.parametrize("network", [with_dropout, with_stochastic_depth])
@pytest.mark.parametrize("adjoint", [Exact(), Exact(snapshots="host"), Checkpointed(2), Truncated(9)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_adjoints_draw_what_the_roll_out_drew(
    compiled: bool, adjoint: Adjoint, network: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "_compiled", lambda function: function)  # its functions, without torch.compile
    problem = Dropping(network, (3, 8, 8), 3)
    expected = problem.gradients(Full())
    assert error(problem.gradients(Full()), expected) == 0
    assert error(problem.gradients(adjoint, compile=compiled), expected) < 1e-9


def test_a_network_of_torchvision_that_draws() -> None:
    problem = Dropping("torchvision:mobilenet_v3_small", (3, 16, 16), 1)
    assert error(problem.gradients(Exact(), SGD()), problem.gradients(Full(), SGD())) < 1e-6


def test_what_is_checked_beforehand_draws_nothing() -> None:
    """So that the first call of a loss function is like any other: resumed runs begin with one."""
    problem, again = Dropping(with_dropout, (1, 8, 8), 2), Dropping(with_dropout, (1, 8, 8), 2)
    again.loss_fn = problem.loss_fn
    assert torch.equal(problem.gradients(Exact()), again.gradients(Exact()))


def test_compiled_steps_draw_what_eager_ones_draw_and_are_compiled_once() -> None:
    """Under torch 2.6, whose compiled dropout draws other numbers than the eager one, compiled steps agree only with
    each other."""
    problem = Dropping(with_dropout, (1, 4, 4), 3, torch.float32)
    expected = problem.gradients(Exact(), compile=True)
    if not torch.__version__.startswith("2.6."):
        assert error(expected, problem.gradients(Full())) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        assert error(problem.gradients(Checkpointed(2), compile=True), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), Adam(eps=1e-3)], ids=str)
def test_compiled_equals_eager_and_compiles_once(rule: Rule) -> None:
    """A bias before a norm has rounding as its gradient; a small eps of Adam would turn that into whole steps."""
    network = "convnet:depth=2,width=6,norm=batch,activation=swish"
    eager, compiled = (Convolutional(network, 2, torch.float32) for _ in range(2))
    expected = gradients(eager.unroll(Exact(), rule), *eager.inputs)
    found = gradients(compiled.unroll(Exact(), rule, compile=True), *compiled.inputs)
    assert error(found, expected) < 1e-4
    # the loss_fn of another problem is another function of the same code
    with torch.compiler.set_stance("fail_on_recompile"):
        again = Convolutional(network, 2, torch.float32)
        assert torch.equal(gradients(again.unroll(Checkpointed(2), rule, compile=True), *again.inputs), found)

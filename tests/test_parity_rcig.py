"""RCIG against numbers that were recorded from the authors' code: both linear problems, the gradients, AdaBelief.

The recorded cases are ``plain`` and ``flip``, as published, and ``plain_still`` and ``flip_still``, in which the one
change is that the matrix of the last layer has no part in the move and in the linear system.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.inner import Params, descend, minimise, mixed_gradient
from condense.inner.implicit import PLAIN_ADAM
from condense.method import Optim
from condense.methods.rcig import HEAD, Convexified, outer_loss
from condense.networks import Functional
from tests.parity.recorded import Recorded, difference, tensor


def recorded() -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The arrays of the file, and the hyper-parameters that it names."""
    found = Recorded("16_rcig")
    return found.arrays, found.hyper


def problem(case: str, kind: type[Convexified] = Convexified) -> tuple[Convexified, tuple[Tensor, Tensor]]:
    arrays, hyper = recorded()
    network = Functional(
        "convnet:depth=3,width=4,widen=true,norm=none,activation=softplus", (3, 8, 8), 3, dtype=torch.float64
    )
    names = [f"conv{i}_{part}" for i in range(3) for part in ("weight", "bias")] + ["dense_weight", "dense_bias"]
    params = {ours: tensor(arrays[f"network/{name}"]) for ours, name in zip(network.shapes, names, strict=True)}
    net = kind(network, params, {}, Augment(flips=case.startswith("flip")), hyper["ridge"])
    return net, (tensor(arrays["images"]), tensor(arrays["targets"]))


@pytest.mark.parametrize("case", ["plain_still", "flip_still"])
def test_curves_and_gradients_are_the_recorded_ones(case: str) -> None:
    arrays, hyper = recorded()
    net, batch = problem(case)
    real = (tensor(arrays["real_images"]), tensor(arrays["real_labels"]))
    tau = torch.tensor(hyper["tau"], dtype=torch.float64)
    slope = torch.func.grad_and_value(lambda move: net.inner_loss(move, batch))
    inner = minimise(slope, net.no_move(), num_steps=hyper["inner_steps"], lr=hyper["lr_inner"])
    assert difference(inner.curve, arrays[f"{case}/inner_losses"]) < 1e-7, "stored in float32"
    outer = torch.func.grad_and_value(partial(outer_loss, net, real), argnums=(0, 1, 2))
    (into_move, direct, into_tau), value = outer(inner.point, batch, tau)
    assert value.item() == pytest.approx(float(arrays[f"{case}/outer_loss"]), rel=1e-7)
    assert into_tau.item() == pytest.approx(float(arrays[f"{case}/direct_tau"]), rel=1e-7)
    product = net.hessian_product(batch)
    found = descend(product, into_move, num_steps=hyper["adjoint_steps"], lr=hyper["lr_adjoint"])
    assert difference(2 * found.curve, arrays[f"{case}/adjoint_residuals"]) < 1e-8
    leaves = tuple(x.clone().requires_grad_() for x in batch)
    mixed = mixed_gradient(net.inner_loss, inner.point, leaves, found.point)
    for name, ours, implicit in zip(("images", "targets"), direct, mixed, strict=True):
        assert difference(ours, arrays[f"{case}/direct_{name}"]) < 1e-7
        assert difference(-implicit, arrays[f"{case}/implicit_{name}"]) < 1e-7


class Whole(Convexified):
    """With the matrix of the last layer among what moves."""

    def no_move(self) -> Params:
        return {name: torch.zeros_like(p) for name, p in self.params.items()}

    def outputs(self, move: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        h, o = super().outputs({name: d for name, d in move.items() if name != HEAD}, images)
        return h, o + h @ move[HEAD].T


def test_in_the_published_code_the_matrix_of_the_last_layer_climbs() -> None:
    """Its optimiser leaves the matrix out and hands its gradient on as it is: it is added, at the rate 1. We leave the
    matrix out of the move, since the regression solves for that layer; this is what the declared deviation rests on."""
    arrays, hyper = recorded()
    net, batch = problem("plain", Whole)
    slope = torch.func.grad_and_value(lambda move: net.inner_loss(move, batch))
    move, curve = net.no_move(), []
    state, rate = PLAIN_ADAM.init(move), torch.tensor(hyper["lr_inner"], dtype=torch.float64)
    with torch.no_grad():
        for _ in range(hyper["inner_steps"]):
            grads, value = slope(move)
            climbed = move[HEAD] + grads[HEAD]
            move, state = PLAIN_ADAM.update(grads, state, move, rate)
            move[HEAD] = climbed
            curve.append(value)
    assert difference(torch.stack(curve), arrays["plain/inner_losses"]) < 1e-7
    assert difference(move[HEAD], arrays["plain/move/dense_weight"]) < 1e-8
    still = tensor(arrays["plain_still/inner_losses"])
    assert 1e-4 < difference(still, arrays["plain/inner_losses"]) < 1e-2


@pytest.mark.parametrize("case", ["adabelief_small", "adabelief_unit"])
def test_adabelief_takes_the_recorded_steps(case: str) -> None:
    arrays, hyper = recorded()
    param = tensor(arrays[f"{case}/start"])
    optimiser = Optim(kind="adabelief", lr=hyper["adabelief"]["lr"], momentum=hyper["adabelief"]["b1"]).build([param])
    for grad, expected in zip(tensor(arrays[f"{case}/grads"]), tensor(arrays[f"{case}/after"]), strict=True):
        before, param.grad = param.clone(), grad
        optimiser.step()
        torch.testing.assert_close(param - before, expected - before, rtol=1e-9, atol=1e-13)

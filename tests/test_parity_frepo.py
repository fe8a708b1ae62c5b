"""FRePo against numbers that were recorded from the authors' code: gradients, LAMB, BatchNorm, augmentation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from condense.augment import MILD, Augment, Params
from condense.compute import Compute
from condense.eval.protocol import STRATEGIES
from condense.inner.implicit import PLAIN_ADAM
from condense.kernels import centred, feature_kernel, regression
from condense.method import Optim
from condense.methods import pool
from condense.methods.frepo import half_squared_error, margin_loss
from condense.networks import Functional
from condense.rng import Rng
from condense.schedule import Schedule
from tests.parity.recorded import Recorded, difference, tensor

NETWORK = "convnet:depth=3,width=4,widen=true,norm=none"


def recorded(name: str) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The arrays of a file in ``tests/parity``, and what it says of itself."""
    found = Recorded(name)
    return found.arrays, found.meta


@pytest.mark.parametrize("case", ["plain", "flip"])
def test_loss_and_gradients_are_the_recorded_ones(case: str) -> None:
    """The condition of the kernel matrix sets the tolerance."""
    arrays, meta = recorded("15_frepo")
    num_classes, ridge = meta["hyper"]["num_classes"], meta["hyper"]["ridge"]
    network = Functional(NETWORK, (3, 8, 8), num_classes, dtype=torch.float64)
    names = [f"conv{i}_{kind}" for i in range(3) for kind in ("weight", "bias")] + ["dense_weight", "dense_bias"]
    params = {ours: tensor(arrays[f"network/{name}"]) for ours, name in zip(network.shapes, names, strict=True)}
    images, targets = tensor(arrays["images"]).requires_grad_(), tensor(arrays["targets"]).requires_grad_()
    real, classes = tensor(arrays["real_images"]), tensor(arrays["real_labels"])

    def features(x: Tensor) -> Tensor:
        return network.features(params, {}, x, train=False)

    assert difference(features(images), arrays["features"]) < 1e-12
    mirrored, values = Augment(flips=case == "flip").mirrored(images, targets)
    phi_s, phi_t = features(mirrored), features(real)
    predicted = regression(feature_kernel(phi_t, phi_s), feature_kernel(phi_s, phi_s), values, ridge)
    loss = half_squared_error(predicted, centred(classes, num_classes)) + margin_loss(targets)
    assert loss.item() == pytest.approx(float(arrays[f"{case}/loss"]), rel=1e-9)
    into_images, into_targets = torch.autograd.grad(loss, (images, targets))
    assert difference(into_images, arrays[f"{case}/grad_images"]) < 1e-7
    assert difference(into_targets, arrays[f"{case}/grad_targets"]) < 1e-7


def of_flax(shape: list[int], flat: Tensor, spatial: int) -> Tensor:
    """A parameter of flax in PyTorch's layout; the last layer sees maps of ``spatial`` x ``spatial`` pixels."""
    found = flat.view(shape)
    if len(shape) == 4:
        return found.permute(3, 2, 0, 1)
    return found.unflatten(0, (spatial, spatial, -1)).permute(3, 2, 0, 1).flatten(1) if len(shape) == 2 else found


def test_pool_networks_train_and_keep_statistics_as_recorded() -> None:
    """Four steps of Adam on the authors' network: BatchNorm before the second convolution, statistics that move by
    nine tenths of the batch's, and a variance that is not corrected."""
    arrays, meta = recorded("19_frepo_batchnorm")
    network = Functional("convnet:depth=2,width=4,widen=true,norm=batch-before", (3, 8, 8), 6, dtype=torch.float64)
    order = ["Conv_0 kernel", "Conv_0 bias", "BatchNorm_0 scale", "BatchNorm_0 bias", "Conv_1 kernel", "Conv_1 bias"]
    order += ["Dense_0 kernel", "Dense_0 bias"]

    def params(vector: Tensor) -> dict[str, Tensor]:
        sizes = [int(np.prod(shape)) for _, _, shape in meta["parameters"]["conv"]]
        theirs = {
            f"{layer} {name}": of_flax(shape, piece, 2)
            for (layer, name, shape), piece in zip(meta["parameters"]["conv"], vector.split(sizes), strict=True)
        }
        return {ours: theirs[name].contiguous() for ours, name in zip(network.shapes, order, strict=True)}

    ctx: Any = SimpleNamespace(task=SimpleNamespace(network=network), compute=Compute())
    weights = network.init(Rng(0), "pool")
    member = pool.Member(params=params(tensor(arrays["conv/start"])), buffers=weights.buffers, adam={}, age=0)
    member["adam"] = PLAIN_ADAM.init(member["params"])._asdict()
    mean, var = (
        next(name for name in weights.buffers if name.endswith(end)) for end in ("running_mean", "running_var")
    )
    for step, (x, y) in enumerate(zip(tensor(arrays["images"]), tensor(arrays["targets"]), strict=True), 1):
        loss = half_squared_error(network.logits(member["params"], member["buffers"], x, train=True), y)
        assert loss.item() == pytest.approx(float(arrays[f"conv/after{step}/loss"]), rel=1e-8)
        whole = [torch.arange(len(x))]
        member = pool.train(ctx, member, x, y, half_squared_error, whole, lr=meta["hyper"]["lr"])
        after = f"conv/after{step}/BatchNorm_0"
        assert difference(member["buffers"][mean], arrays[f"{after}/mean"]) < 1e-9
        assert difference(member["buffers"][var], arrays[f"{after}/var"]) < 1e-9
    for name, expected in params(tensor(arrays["conv/end"])).items():
        torch.testing.assert_close(member["params"][name], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["lamb_unit", "lamb_tiny"])
def test_lamb_takes_the_recorded_steps(case: str) -> None:
    """Gradients of order 1, and of order 1e-5, where it matters which moment eps is added to."""
    arrays, meta = recorded("15_frepo")
    hyper = meta["hyper"]["lamb"]
    param, after = tensor(arrays[f"{case}/start"]), tensor(arrays[f"{case}/after"])
    plan = Optim(kind="lamb", lr=hyper["lr"], momentum=hyper["b1"], schedule=Schedule(cosine_to=hyper["alpha"]))
    optimiser = plan.build([param])
    for step, (grad, expected) in enumerate(zip(tensor(arrays[f"{case}/grads"]), after, strict=True)):
        before, param.grad = param.clone(), grad
        optimiser.param_groups[0]["lr"] = plan.lr_at(step, len(after))
        optimiser.step()
        torch.testing.assert_close(param - before, expected - before, rtol=1e-8, atol=1e-13)


def test_augmentation_is_as_strong_as_recorded() -> None:
    """Of 500 recorded draws and many of ours: the extremes, the mean and the standard deviation of every quantity."""
    arrays, _ = recorded("20_augmax_strengths")
    drawn = Augment(("flip", *MILD), "M").sample(Rng(0)("augment"), 20_000, (3, 32, 32), siamese=False).values
    factor, shift = drawn["zoom"][:, 0], drawn["zoom"][:, 1:]
    ours = {
        "crop zoom": factor,
        "crop centre, fraction of the free range": (shift / (1 - factor[:, None]).abs()).flatten(),
        "crop shift in pixels": 16 * shift.flatten(),
        "translate pixels": 16 * drawn["translate"].flatten(),
        "translate fraction of the side": drawn["translate"].flatten() / 2,
        "rotate degrees": drawn["rotate"].rad2deg(),
        "color brightness": drawn["jitter"][:, 0],
        "color contrast": drawn["jitter"][:, 1],
        "color saturation": drawn["jitter"][:, 2],
        "cutout top": drawn["cutout-quarter"][:, 0],
        "cutout left": drawn["cutout-quarter"][:, 1],
        "flip rate": drawn["flip"],
    }
    table = dict(zip(arrays["names"].tolist(), arrays["table"].tolist(), strict=True))
    for name, values in ours.items():
        low, high, mean, std = table[f"frepo/{name}"]
        found = values.double()
        assert found.min().item() == pytest.approx(low, abs=0.06 * (high - low)), name
        assert found.max().item() == pytest.approx(high, abs=0.06 * (high - low)), name
        assert found.mean().item() == pytest.approx(mean, abs=0.15 * std), name
        assert found.std().item() == pytest.approx(std, rel=0.1), name
        assert table[f"rcig/{name}"] == table[f"frepo/{name}"]
    cut = Augment(("cutout-quarter",))
    x = torch.ones(1, 1, 32, 32)
    assert (cut.apply(x, cut.sample(Rng(0)("augment"), 1, (1, 32, 32), siamese=False)) == 0).double().mean() == 1 / 16


@pytest.mark.parametrize("name", ["crop", "translate", "rotate"])
def test_warps_are_those_of_the_recorded_matrices(name: str) -> None:
    """A matrix takes pixels of the new image, counted from the centre, to pixels of the old one."""
    arrays, _ = recorded("20_augmax_strengths")
    matrices = tensor(arrays[f"frepo/{name}/matrix"])[:3]
    x = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op, value = {
        "crop": ("zoom", torch.cat([matrices[:, :1, 0], matrices[:, :, 2].flip(1) / 16], 1)),
        "translate": ("translate", matrices[:, :, 2].flip(1) / 16),
        "rotate": ("rotate", torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0])),
    }[name]
    warped = Augment((op,)).apply(x, Params({op: value}))
    for image, matrix, found in zip(x.numpy(), matrices.numpy(), warped.numpy(), strict=True):
        offset = matrix[:, :2] @ np.full(2, -15.5) + matrix[:, 2] + 15.5
        for channel, ours in zip(image, found, strict=True):
            theirs = scipy.ndimage.affine_transform(channel, matrix[:, :2], offset, order=1, mode="grid-constant")
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_one_operation_is_for_the_batch_here_and_for_each_image_in_rcig() -> None:
    """Recorded: 40 batches of 8 images, 5 where an image was cut out."""
    arrays, _ = recorded("20_augmax_strengths")
    shape = (3, 32, 32)
    for name, mixed in (("frepo", False), ("rcig", True)):
        _, augment = STRATEGIES[name]
        x, seen = torch.ones(8, *shape), []
        for batch in range(40):
            params = augment.sample(Rng(0)("augment", batch), 8, shape, siamese=False)
            cut = Params(*({op: value for op, value in part.items() if op == "cutout-quarter"} for part in params))
            seen.append((augment.apply(x, cut) == 0).flatten(1).any(1))
        ours, theirs = torch.stack(seen), tensor(arrays[f"{name}/chosen"]) == 5
        for cut_out in (ours, theirs):
            assert (cut_out.any(1) & ~cut_out.all(1)).any().item() == mixed
            assert 0.05 < cut_out.double().mean() < 0.35

"""IDC's decoder, its start, its distances and its augmentation against those of the authors' code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import Augment, Params
from condense.match import matching_loss, named_distance
from condense.networks import Functional
from condense.rng import Rng
from condense.synthetic import Factor
from tests.parity.recorded import Recorded, apart

RECORDED = Recorded("12_idc")
CLASSES = torch.tensor([0, 0, 1, 1])
GEOMETRIC = ("crop", "scale", "rotate")


@pytest.mark.parametrize("case", RECORDED.meta["decode_cases"])
def test_images_and_gradients_of_the_decoder_agree(case: str) -> None:
    """Where the factor does not divide the sides, the authors pad with the pixel 0.5, and the decoder with 0."""
    grey = 0.5 if case in ("decode/3x8f3", "decode/1x7f2") else 0.0
    latents = (RECORDED[f"{case}/latents"] - grey).requires_grad_()
    decoder = Factor(factor=int(case[-1])).build(tuple(latents.shape[1:]), 2)
    images = decoder(latents, CLASSES)
    assert apart(images.detach() + grey, RECORDED[f"{case}/images"]) < 1e-6
    (gradient,) = torch.autograd.grad((images * RECORDED[f"{case}/cotangent"]).sum(), latents)
    assert apart(gradient, RECORDED[f"{case}/grad"]) < 1e-6
    assert torch.equal(CLASSES.repeat(len(images) // 4), RECORDED[f"{case}/targets"])


@pytest.mark.parametrize("case", ["decode/3x8f2", "decode/1x9f3"])
def test_stored_images_begin_alike_where_the_factor_divides_the_sides(case: str) -> None:
    latents = RECORDED[f"{case}/latents"]
    decode = Factor(factor=int(case[-1]))
    decoder = decode.build(tuple(latents.shape[1:]), 2)
    found = [
        decode.encode(images, torch.tensor([c, c]), decoder, torch.Generator())
        for c, images in enumerate(RECORDED[f"{case}/mix_real"])
    ]
    assert apart(torch.cat(found), RECORDED[f"{case}/mix_latents"]) < 1e-6


@pytest.mark.parametrize(("case", "distance"), [("mse", "mse-conv"), ("l1", "l1-conv")])
def test_the_distance_of_gradients_agrees(case: str, distance: str) -> None:
    network = Functional("convnet:depth=2,width=8", (3, 8, 8), 4, dtype=torch.float64)
    given = RECORDED.weights(RECORDED["network"], [name for name, _ in RECORDED.meta["parameters"]])
    order = [f"layers.{kind}.{i}.{of}" for i in range(2) for kind in ("conv", "norm") for of in ("weight", "bias")]
    order += ["classifier.weight", "classifier.bias"]
    params = {name: given[theirs] for name, theirs in zip(network.shapes, order, strict=True)}

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(network.logits(params, {}, batch[0], train=False), batch[1])

    real, synthetic = RECORDED["real"], RECORDED["synthetic"].requires_grad_()
    assert apart(network.logits(params, {}, real, train=False), RECORDED["logits_real"]) < 1e-9
    wanted = torch.func.grad(loss_fn)(params, (real, torch.ones(len(real), dtype=torch.long)))
    targets = torch.ones(len(synthetic), dtype=torch.long)
    loss = matching_loss(loss_fn, params, wanted, named_distance(distance), synthetic, targets)
    loss.backward()
    assert loss.item() == pytest.approx(RECORDED[f"{case}/loss"].item(), rel=1e-6)
    assert synthetic.grad is not None
    assert apart(synthetic.grad, RECORDED[f"{case}/grad"]) < 1e-6


@pytest.mark.parametrize(("case", "strategy", "kind"), RECORDED.meta["diffaug_cases"])
def test_the_augmentation_agrees(case: str, strategy: str, kind: str) -> None:
    augment, images = Augment.parse(f"{strategy}:mode=D"), RECORDED["diffaug/x"]
    draws = list(RECORDED.draws(f"{case}/aug"))
    params = Params({op: value for drawn in draws for op, value in drawn.values.items()})
    assert {len(value) for value in params.values.values()} == {1 if kind == "siamese" else len(images)}
    assert apart(augment.apply(images, params), RECORDED[f"{case}/y"]) < 1e-6
    own = augment.sample(Rng(0)("augment"), 3, (3, 8, 8), siamese=False).ops
    assert ["geometric" if op in GEOMETRIC else op for op in own] == [
        "geometric" if op in GEOMETRIC else op for op in params.ops
    ]

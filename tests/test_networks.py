"""Networks: the published sizes, any image size or a reason why not, and weights as arguments."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from condense.compute import Compute
from condense.inner import pushforward
from condense.networks import (
    Factory,
    Functional,
    InputShape,
    Weights,
    build,
    default_for,
    describe,
    names,
    parse,
    resolve,
    with_options,
)
from condense.networks.base import ACTIVATIONS, NORMS
from condense.networks.initial import DrawnFrom
from condense.rng import Rng
from condense.train import Trainer, Training

T = TypeVar("T")

DIGITS, MNIST, CIFAR, TINY = (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)
SERIES, CLIPS, VIDEO = (3, 16), (4, 3, 16, 16), (16, 3, 64, 64)

SPECS = [
    "convnet",
    "convnet:depth=4",
    "mlp",
    "lenet",
    "alexnet",
    "alexnet:norm=batch",
    "vgg11",
    "vgg11:norm=batch",
    "resnet18",
    "resnet18:norm=batch",
    "resnet18:ap=true",
    "vit",
]
REFUSED = {
    ("convnet:depth=4", DIGITS),
    ("lenet", DIGITS),
    ("vgg11", DIGITS),
    ("vgg11:norm=batch", DIGITS),
    ("resnet18", DIGITS),
    ("resnet18:ap=true", DIGITS),
}


def tiny(input_shape: InputShape, num_classes: int) -> nn.Module:
    """What a user might write."""
    channels = input_shape[0]
    body = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(16, num_classes))


class Counting(nn.Sequential):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        output: Tensor = super().forward(x)
        return output


def counting(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Counting(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def images(shape: InputShape, num: int = 2) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))


# Sizes


@pytest.mark.parametrize(
    ("spec", "input_shape", "num_classes", "num_params"),
    [
        ("convnet", CIFAR, 10, 320_010),
        ("convnet", MNIST, 10, 317_706),
        ("convnet", CIFAR, 100, 320_010 + 90 * 2049),
        ("convnet:norm=none", CIFAR, 10, 320_010 - 3 * 256),
        ("mlp", CIFAR, 10, 411_146),
        ("lenet", CIFAR, 10, 62_006),
        ("lenet", MNIST, 10, 61_706),
        ("alexnet", CIFAR, 10, 1_872_202),
        ("vgg11", CIFAR, 10, 9_231_114),
        ("vgg11:norm=none", CIFAR, 10, 9_225_610),
        ("resnet18", CIFAR, 10, 11_173_962),
        ("resnet18:norm=batch", CIFAR, 10, 11_173_962),
        ("resnet18:ap=true", CIFAR, 10, 11_173_962 + 15 * 512 * 10),
        ("mlp", SERIES, 10, 49 * 128 + 129 * 128 + 129 * 10),
        ("mlp", CLIPS, 10, (4 * 3 * 16 * 16 + 1) * 128 + 129 * 128 + 129 * 10),
        ("convnet1d", SERIES, 10, (3 * 3 + 1) * 128 + 2 * (3 * 128 + 1) * 128 + 3 * 256 + (2 * 128 + 1) * 10),
        ("convnet1d:norm=none", (1, 427), 6, 4 * 128 + 2 * (3 * 128 + 1) * 128 + (53 * 128 + 1) * 6),
        ("convnet3d", VIDEO, 6, (3 * 147 + 1) * 64 + (64 * 147 + 1) * 128 + (128 * 147 + 1) * 128 + 129 * 6),
        ("convnet3d:depth=1,width=8,norm=instance", CLIPS, 6, (3 * 147 + 1) * 8 + 16 + 9 * 6),
    ],
)
def test_number_of_parameters(spec: str, input_shape: InputShape, num_classes: int, num_params: int) -> None:
    assert Functional(spec, input_shape, num_classes).num_params == num_params


@pytest.mark.parametrize(
    ("spec", "input_shape", "num_features"),
    [
        ("convnet", DIGITS, 128),
        ("convnet", MNIST, 2048),
        ("convnet", CIFAR, 2048),
        ("convnet:depth=4", TINY, 2048),
        ("convnet", (3, 28, 28), 128 * 9),
        ("convnet", (1, 12, 12), 128),
        ("convnet:width=32,pooling=none", CIFAR, 32 * 1024),
        ("alexnet", MNIST, 192 * 16),
        ("alexnet", CIFAR, 192 * 16),
        ("vgg11", MNIST, 512),
        ("vgg11", TINY, 512 * 4),
        ("resnet18", MNIST, 512),
        ("resnet18:ap=true", MNIST, 512 * 9),
        ("resnet18:ap=true", CIFAR, 512 * 16),
        ("vit", MNIST, 192),
        ("convnet1d", (12, 29), 128 * 3),
        ("convnet1d:depth=2,pooling=none", SERIES, 128 * 16),
        ("convnet3d", VIDEO, 128),
        ("convnet3d:depth=2,width=4", CLIPS, 8),
    ],
)
def test_number_of_features(spec: str, input_shape: InputShape, num_features: int) -> None:
    network = build(spec, input_shape, 10).eval()
    assert network.classifier.in_features == num_features
    assert network.embed(images(input_shape)).shape == (2, num_features)


def convnet1d_twin() -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (3, 8, 8):
        layers += [nn.Conv1d(channels, 8, 3, padding=1), nn.InstanceNorm1d(8, affine=True), nn.ReLU(), nn.AvgPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5))


class ConvNet3dTwin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.second = nn.Conv3d(4, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Clips (N, 4, 3, 32, 32)."""
        x = nn.functional.max_pool3d(self.first(x.permute(0, 2, 1, 3, 4)).relu(), (1, 2, 2))
        x = nn.functional.max_pool3d(self.second(x).relu(), (2, 2, 2))
        assert x.shape[1:] == (8, 2, 2, 2)
        logits: Tensor = self.head(x.mean((3, 4)).max(2).values)
        return logits


@pytest.mark.parametrize(
    ("spec", "shape", "twin"),
    [
        ("convnet1d:width=8", SERIES, convnet1d_twin),
        ("convnet3d:depth=2,width=4", (4, 3, 32, 32), ConvNet3dTwin),
    ],
)
def test_networks_for_series_and_clips_agree_with_twins(
    spec: str, shape: InputShape, twin: Callable[[], nn.Module]
) -> None:
    with Rng(0).forked("network"):
        network, other = build(spec, shape, 5).eval(), twin().eval()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        theirs.data.copy_(ours)
    x = images(shape)
    torch.testing.assert_close(network(x), other(x))


def test_half_of_the_features_of_a_clip_are_hidden_in_training() -> None:
    spec = "convnet3d:depth=2,width=4"
    functional, plain = Functional(spec, CLIPS, 3), Functional(f"{spec},dropout=false", CLIPS, 3)
    (params, buffers), x = functional.init(Rng(0), "network"), images(CLIPS, 5)
    assert torch.equal(functional.logits(params, buffers, x, train=False), plain.logits(params, buffers, x))
    assert torch.equal(functional.features(params, buffers, x), plain.features(params, buffers, x))
    with Rng(0).forked("dropout"):
        hidden = functional.logits(params, buffers, x)
    with Rng(0).forked("dropout"):
        mask = torch.nn.functional.dropout(torch.ones(5, 8))
    torch.testing.assert_close(hidden, plain.logits(params, buffers, x, feature_mask=mask))
    given = torch.arange(8) < 6  # a mask of the caller hides more of them
    with Rng(0).forked("dropout"):
        hidden = functional.logits(params, buffers, x, feature_mask=given)
    torch.testing.assert_close(hidden, plain.logits(params, buffers, x, feature_mask=mask * given))


@pytest.mark.parametrize(
    ("spec", "shape", "line"),
    [
        ("convnet", SERIES, r"network convnet takes images, not series of shape \(3, 16\); give network='convnet1d'; "),
        ("convnet1d:width=8", DIGITS, r"network convnet1d takes series, not images of shape .* are alexnet, convnet, "),
        ("resnet18", CLIPS, r"network resnet18 takes images, not clips .*'convnet3d'; .* are convnet3d, mlp$"),
        ("timm:resnet10t", SERIES, "network timm:resnet10t takes images, not series .*; .* are convnet1d, mlp$"),
        ("torchvision:resnet18", CLIPS, "network torchvision:resnet18 takes images, not clips .* are convnet3d, mlp$"),
        ("mlp", (2, 3, 4, 5, 6), "has 5 axes: a graph has one, a series two"),
        ("convnet1d:depth=5", SERIES, "convnet1d:depth=5 cannot take series of length 16: .*; give depth=4 or less"),
        ("convnet3d", CLIPS, "convnet3d:depth=3 cannot take clips of 4 frames of 16x16 pixels: .*; give depth=2$"),
        (
            "convnet3d:depth=1",
            (4, 3, 2, 2),
            "cannot take clips of 4 frames of 2x2 pixels: .*; use larger clips, or mlp",
        ),
    ],
)
def test_a_network_that_does_not_take_the_data_names_those_that_do(spec: str, shape: InputShape, line: str) -> None:
    for make in (build, Functional):
        with pytest.raises(ValueError, match=line) as caught:
            make(spec, shape, 2)
        assert "\n" not in str(caught.value)


def test_the_network_of_data_for_which_none_is_named() -> None:
    assert [default_for(shape) for shape in (SERIES, CIFAR, VIDEO)] == ["convnet1d", "convnet", "convnet3d"]
    for shape in (SERIES, CIFAR, VIDEO):
        assert str(resolve("auto", shape)) == Functional("auto", shape, 2).name == default_for(shape)
        assert str(resolve(" auto: width=8 , depth=3", shape)) == f"{default_for(shape)}:width=8"
        assert resolve("mlp", shape) == parse("mlp")
    assert str(resolve("auto:norm=none", CIFAR)) == "convnet:norm=none"
    assert str(resolve("auto:norm=none", VIDEO)) == "convnet3d"
    with pytest.raises(ValueError, match="unknown option 'widen' of convnet3d"):
        resolve("auto:widen=true", VIDEO)
    with pytest.raises(ValueError, match=r"unknown option 'wdth' .*did you mean width[?] correct 'auto:wdth=3'"):
        resolve("auto:wdth=3", VIDEO)


@pytest.mark.parametrize("input_shape", [DIGITS, MNIST, CIFAR, TINY])
@pytest.mark.parametrize("spec", SPECS)
def test_every_network_takes_the_size_or_says_why_not(spec: str, input_shape: InputShape) -> None:
    if (spec, input_shape) in REFUSED:
        with pytest.raises(ValueError, match=rf"{spec.partition(':')[0]}.* cannot take 8x8 images: .*; .*"):
            build(spec, input_shape, 3)
        return
    with Rng(0).forked("network"):
        network = build(spec, input_shape, 3)
    x = images(input_shape).requires_grad_()
    logits = network(x)
    assert logits.shape == (2, 3) and logits.isfinite().all()
    assert torch.equal(logits, network.classifier(network.embed(x)))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()


@pytest.mark.parametrize("input_shape", [(1, 9, 13), (2, 20, 17), (3, 33, 40)])
@pytest.mark.parametrize("spec", ["convnet", "alexnet", "resnet18:norm=batch", "vit"])
def test_odd_shapes(spec: str, input_shape: InputShape) -> None:
    assert build(spec, input_shape, 3)(images(input_shape)).shape == (2, 3)


def test_too_deep_a_convnet_names_the_depth_that_fits() -> None:
    with pytest.raises(ValueError, match=r"convnet:depth=4 cannot take 8x8 images: .*; give depth=3 or less"):
        build("convnet:depth=4", DIGITS, 10)
    build("convnet:depth=4,pooling=none,width=8", DIGITS, 10)


@pytest.mark.parametrize(
    "options",
    [
        "activation=sigmoid",
        "activation=leakyrelu",
        "activation=swish",
        "norm=layer",
        "norm=group",
        "norm=batch-before",
        "pooling=max",
    ],
)
def test_convnet_options_change_the_function(options: str) -> None:
    def logits(spec: str) -> Tensor:
        with Rng(0).forked("network"):
            output: Tensor = build(spec, DIGITS, 10)(images(DIGITS))
        return output

    assert not torch.allclose(logits("convnet:width=8"), logits(f"convnet:width=8,{options}"))


def test_instance_norm_is_per_image_and_channel() -> None:
    network = build("convnet:depth=1,width=4", CIFAR, 10)
    features = network.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    maps = features[:2](images(CIFAR))
    torch.testing.assert_close(maps.mean((2, 3)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.var((2, 3), correction=0), torch.ones(2, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        *((spec, DIGITS) for spec in ("convnet", "alexnet", "resnet18:norm=batch,ap=true", "vit:depth=2")),
        ("convnet1d", SERIES),
        ("convnet3d:depth=2,width=4", CLIPS),
        ("convnet3d:depth=2,width=4,norm=instance", CLIPS),
    ],
)
def test_second_derivatives(spec: str, shape: InputShape) -> None:
    functional = Functional(spec, shape, 3)
    params, buffers = functional.init(Rng(0), "network")
    x = images(shape).requires_grad_()
    gradients = torch.func.grad(lambda p: functional.logits(p, buffers, x).square().sum())(params)
    (second,) = torch.autograd.grad(functional.flatten(gradients).square().sum(), x)
    assert second.isfinite().all() and second.any()


# Names


def test_names() -> None:
    of_images = ["lenet", "mlp", "resnet18", "vgg11", "vit"]
    assert names() == ["alexnet", "convnet", "convnet1d", "convnet3d", "gat", "gcn", "gin", *of_images]
    for name in names():
        assert str(parse(name)) == name
        assert "\n" not in describe(name)
    assert "depth=3" in describe("convnet") and "norm=instance|batch" in describe("convnet")
    assert "ap=false|true]" in describe("resnet18")


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("convnet:depth=3,width=128,norm=instance,activation=relu,pooling=avg", "convnet"),
        ("convnet:width=64,depth=4", "convnet:depth=4,width=64"),
        (" convnet: norm = batch , depth=3 ", "convnet:norm=batch"),
        ("resnet18:ap=True,norm=instance", "resnet18:ap=true"),
        ("resnet18:ap=false", "resnet18"),
        ("vgg11:norm=none", "vgg11:norm=none"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        (" timm:vit_tiny_patch16_224.augreg_in21k ", "timm:vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_canonical_spelling(spec: str, canonical: str) -> None:
    assert str(parse(spec)) == canonical
    assert parse(canonical) == parse(spec) and hash(parse(canonical)) == hash(parse(spec))
    assert Functional(spec, CIFAR, 2).identity() == {"network": canonical}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("convnt", "unknown network 'convnt': .*did you mean convnet.*lenet"),
        ("ConvNet", "did you mean convnet"),
        ("", "unknown network ''"),
        ("convnet:depht=4", "unknown option 'depht' of convnet: it takes .*activation.*; did you mean depth"),
        ("mlp:depth=4", "unknown option 'depth' of mlp"),
        ("lenet:norm=batch", "unknown option 'norm' of lenet: it takes no options"),
        ("convnet:depth=three", "option depth of convnet cannot be 'three': .*whole number"),
        ("convnet:depth=0", "option depth of convnet cannot be '0'"),
        ("convnet:depth", "option depth of convnet cannot be ''"),
        ("convnet:norm=instnace", "option norm of convnet cannot be 'instnace': .*did you mean instance"),
        ("resnet18:ap=1", "option ap of resnet18 cannot be '1': it is one of false, true"),
        ("convnet:depth=3,depth=4", "option depth of convnet is given twice"),
        ("torchvision:resnt18", "unknown network 'torchvision:resnt18'.*did you mean .*resnet18"),
        ("torchvision:fcn_resnet50", "no such classifier"),
        (
            "timm:resnet10",
            r"unknown network 'timm:resnet10'.*did you mean 'resnet10t'\? timm.list_models\(\) lists them$",
        ),
        ("timm:hf-hub:timm/resnet10t", "no such architecture"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("convnet:width=8,norm=batch", "convnet:norm=none,width=8"),
        ("convnet", "convnet:norm=none"),
        ("alexnet", "alexnet"),
        ("resnet18:norm=batch", "resnet18:norm=batch"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("custom:mine", "custom:mine"),
    ],
)
def test_other_options_are_taken_where_the_network_has_them(name: str, other: str) -> None:
    assert with_options(name, norm="none") == other


def test_an_option_at_its_default_is_not_spelt() -> None:
    assert with_options("convnet:activation=softplus,width=3", activation="relu") == "convnet:width=3"


@pytest.mark.parametrize("spec", ["convnet:norm=group,width=10", "vit:heads=5"])
def test_options_that_do_not_divide(spec: str) -> None:
    with pytest.raises(ValueError, match="give width="):
        build(spec, CIFAR, 10)


# External networks


def test_a_callable_is_a_network() -> None:
    functional = Functional(tiny, DIGITS, 3)
    assert functional.name == "custom:tiny"
    assert functional.identity()["shapes"] == Functional(tiny, DIGITS, 3).identity()["shapes"]
    assert functional.identity()["shapes"] != Functional(tiny, DIGITS, 4).identity()["shapes"]
    network = build(tiny, DIGITS, 3).eval()
    x = images(DIGITS)
    assert network.embed(x).shape == (2, 16)
    assert torch.equal(network.classifier(network.embed(x)), network(x))


def test_a_callable_computes_what_it_did_before() -> None:
    with Rng(0).forked("network"):
        network, state = build(tiny, DIGITS, 3), torch.get_rng_state()
    with Rng(0).forked("network"):
        original = tiny(DIGITS, 3)
        assert torch.equal(torch.get_rng_state(), state)  # the trial run drew nothing
    for mode in (True, False):
        with Rng(0).forked("dropout"):
            expected = original.train(mode)(images(DIGITS))
        with Rng(0).forked("dropout"):
            assert torch.equal(network.train(mode)(images(DIGITS)), expected)
    buffers = zip(original.buffers(), network.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)


def test_a_callable_may_return_a_network() -> None:
    assert str(build(partial(build, "mlp"), DIGITS, 3)) == str(build("mlp", DIGITS, 3))
    assert Functional(partial(build, "mlp"), DIGITS, 3).name == "custom:partial"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 3, 8), nn.Flatten()], "does not end in a linear layer"),
        ([nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)], "does not end in a linear layer"),
        ([nn.Flatten(), nn.Linear(64, 5)], r"does not return logits: two images gave \(2, 5\)"),
        ([nn.Flatten(), nn.Linear(100, 3)], "cannot take 8x8 images: .*shapes"),
    ],
)
def test_bad_callables(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(lambda input_shape, num_classes: nn.Sequential(*layers), DIGITS, 3)
    assert "\n" not in str(caught.value)


class WithPlainTensor(nn.Module):
    def __init__(self, input_shape: InputShape, num_outputs: int) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(64, num_outputs), torch.ones(64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1) * self.scale)
        return logits


class WithBranch(nn.Module):
    def __init__(self, input_shape: InputShape, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1) / 2 if x.abs().max() > 100 else x.flatten(1))
        return logits


@pytest.mark.parametrize("network", [WithPlainTensor, WithBranch])
@pytest.mark.parametrize(
    "ask", [lambda f: f.flops, lambda f: f.draws, lambda f: f.require_maps(), lambda f: f.require_capture("body")]
)
def test_a_callable_that_needs_values_is_refused(network: Factory, ask: Callable[[Functional], object]) -> None:
    line = r"^custom:With.* cannot be run without values, .*: register its tensors with register_buffer, and read no"
    with pytest.raises(ValueError, match=line) as caught:
        ask(Functional(network, DIGITS, 3))
    assert "\n" not in str(caught.value)


def test_a_module_is_not_a_callable_that_builds_one() -> None:
    with pytest.raises(ValueError, match="experiments need fresh ones"):
        build(tiny(DIGITS, 3), DIGITS, 3)


@pytest.mark.parametrize("input_shape", [MNIST, CIFAR])
def test_torchvision(input_shape: InputShape) -> None:
    network = build("torchvision:resnet18", input_shape, 10).eval()
    assert network.classifier.in_features == 512
    x = images(input_shape)
    assert torch.equal(network.classifier(network.embed(x)), network(x))


@pytest.mark.parametrize(
    ("spec", "input_shape", "message"),
    [
        ("torchvision:alexnet", DIGITS, "torchvision:alexnet cannot take 8x8 images"),
        ("torchvision:resnet18", (4, 32, 32), "cannot take images of 4 channels"),
        ("torchvision:squeezenet1_1", CIFAR, "does not end in a linear layer"),
    ],
)
def test_torchvision_refusals(spec: str, input_shape: InputShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, input_shape, 10)


@pytest.mark.parametrize("input_shape", [(1, 32, 32), CIFAR])
@pytest.mark.parametrize(("spec", "width"), [("timm:resnet10t", 512), ("timm:vit_tiny_patch16_224", 192)])
def test_timm(spec: str, width: int, input_shape: InputShape) -> None:
    network = build(spec, input_shape, 10).eval()
    assert network.classifier.in_features == width
    x = images(input_shape)
    assert torch.equal(network.classifier(network.embed(x)), network(x))


@pytest.mark.parametrize("spec", ["timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_timm_is_differentiable_twice(spec: str) -> None:
    functional, x = Functional(spec, CIFAR, 3), images(CIFAR).requires_grad_()
    params, buffers = functional.init(Rng(0), "network")

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional.logits(params, buffers, x).square().mean()

    gradient = torch.func.grad(loss)(params)
    (mixed,) = torch.autograd.grad(sum(g.square().sum() for g in gradient.values()), x)
    assert mixed.isfinite().all() and mixed.any()


@pytest.mark.parametrize(
    ("spec", "input_shape", "message"),
    [
        ("timm:vit_tiny_patch16_224", DIGITS, "timm:vit_tiny_patch16_224 cannot take 8x8 images"),
        ("timm:swin_tiny_patch4_window7_224", (3, 2, 2), "timm:swin_tiny_patch4_window7_224 cannot take 2x2 images"),
        ("timm:levit_128s", CIFAR, "does not end in a linear layer"),
    ],
)
def test_timm_refusals(spec: str, input_shape: InputShape, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(spec, input_shape, 10)
    assert "\n" not in str(caught.value)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    expected = r"^network 'timm:resnet10t' cannot be built: timm is not installed; run: pip install [^\n]*timm[^\n]*$"
    with pytest.raises(ValueError, match=expected):
        parse("timm:resnet10t")


class Attention(nn.Module):
    """What ``nn.MultiheadAttention`` and an encoder layer of torch do with the rows of an image."""

    def __init__(self, num_classes: int, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        mixed, _ = self.attention(rows, rows, rows, need_weights=self.need_weights)
        logits: Tensor = self.head(self.encoder(rows + mixed).mean(1))
        return logits


class Tied(nn.Module):
    """Two layers with one matrix."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x.flatten(1)).tanh()).tanh())
        return logits


class Reordering(nn.Module):
    """Has buffers of whole numbers and of truth values, one that is random and one that is None."""

    order: Tensor
    kept: Tensor
    scale: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(64))
        self.register_buffer("kept", torch.arange(64) % 2 == 0)
        self.register_buffer("scale", torch.randn(64))
        self.register_buffer("nothing", None)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, self.order] * self.scale
        logits: Tensor = self.head(self.norm(torch.where(self.kept, x, x.tanh())))
        return logits


class Noisy(nn.Module):
    """Its own parameters are drawn by functions that return new tensors."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(3 * torch.rand(64) + 1), nn.Parameter(torch.randn(64))
        self.rest = nn.Parameter(torch.rand_like(self.scale) + torch.randn_like(self.shift))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        classes: Tensor = self.head(x.flatten(1) * self.scale * self.rest + self.shift)
        return classes


def noisy(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Noisy(num_classes)


def attention(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Attention(num_classes, need_weights=False)


def attention_weights(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Attention(num_classes, need_weights=True)


def tied(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Tied(num_classes)


def reordering(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Reordering(num_classes)


def frozen(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Its first layer is random and stays so."""
    first = nn.Linear(64, 16).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, num_classes))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("spec", [attention, attention_weights, tied, reordering, frozen])
def test_networks_of_others_under_every_transform(spec: Factory, train: bool) -> None:
    """First and second order, forwards and backwards, several networks at once, and traced."""
    functional = Functional(spec, DIGITS, 3, dtype=torch.float64)
    members = [functional.init(Rng(0), "network", unit=k) for k in range(2)]
    params, buffers = members[0]
    x, labels = images(DIGITS, 5).double(), torch.arange(5) % 3
    direction = {name: torch.ones_like(p) for name, p in params.items()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional.logits(params, buffers, x, train), labels)

    def drawn(function: Callable[..., T], *args: Any) -> T:
        with Rng(0).forked("dropout"):
            return function(*args)

    def slope(x: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(params, x)
        return torch.stack([(grads[name] * direction[name]).sum() for name in grads]).sum()

    def forwards(x: Tensor) -> Tensor:
        along: Tensor = pushforward(lambda p: loss(p, x), params, direction)[1]
        return along

    ahead, behind = ({name: p + step * direction[name] for name, p in params.items()} for step in (1e-5, -1e-5))
    value = torch.func.grad_and_value(loss)  # under a transform attention draws its dropout in another order
    difference = (drawn(value, ahead, x)[1] - drawn(value, behind, x)[1]) / 2e-5
    torch.testing.assert_close(drawn(slope, x), difference, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(drawn(forwards, x), difference, rtol=1e-5, atol=1e-8)
    step = torch.zeros_like(x)
    step[1, 0, 3, 4] = 1e-5
    mixed = (drawn(slope, x + step) - drawn(slope, x - step)) / 2e-5
    leaf = x.clone().requires_grad_()
    backwards = drawn(torch.func.grad(slope), x)
    torch.testing.assert_close(backwards[1, 0, 3, 4], mixed, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(drawn(slope, leaf), leaf)[0], backwards)
    if not (spec is reordering and train):  # torch's own derivative of BatchNorm, taken forwards, has a wrong gradient
        torch.testing.assert_close(drawn(torch.func.grad(forwards), x), backwards)

    stacked = {name: torch.stack([member.params[name] for member in members]) for name in params}
    many = torch.func.vmap(lambda p: functional.features(p, buffers, x, train), randomness="different")(stacked)
    assert many.shape == (2, 5, functional.num_features) and many.isfinite().all()
    torch.compiler.reset()
    traced = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)
    torch.testing.assert_close(drawn(traced, params, x), drawn(torch.func.grad(loss), params, x))


def test_torchvision_attention_is_differentiable_twice() -> None:
    functional = Functional(lambda shape, num: VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=num), (3, 8, 8), 3)
    params, buffers = functional.init(Rng(0), "network")
    for train in (True, False):

        def slope(x: Tensor, train: bool = train) -> Tensor:
            grads = torch.func.grad(lambda p: functional.logits(p, buffers, x, train).square().sum())(params)
            return functional.flatten(grads).square().sum()

        assert torch.func.grad(slope)(images((3, 8, 8))).isfinite().all()


def test_tied_parameters_are_one() -> None:
    functional = Functional(tied, DIGITS, 3)
    params, _ = functional.init(Rng(0), "network")
    assert "body.first.weight" in params and "body.second.weight" not in params
    assert functional.num_params == 64 * 64 + 2 * 64 + 3 * 65
    with DrawnFrom(Rng(0)("network")):
        network = tied(DIGITS, 3)
    assert torch.equal(functional.logits(params, {}, images(DIGITS)), network(images(DIGITS)))


def test_what_is_not_trained_is_the_same_in_every_network() -> None:
    for spec, name in ((frozen, "body.1.weight"), (reordering, "body.scale")):
        functional, x = Functional(spec, DIGITS, 3), images(DIGITS, 5)
        (params, buffers), (others, _) = (functional.init(Rng(seed), "network") for seed in range(2))
        assert name not in params and not torch.equal(params["classifier.weight"], others["classifier.weight"])
        again = Functional(spec, DIGITS, 3)
        assert torch.equal(
            functional.logits(params, buffers, x), again.logits(params, again.init(Rng(9), "n").buffers, x)
        )
        assert functional.identity() == again.identity()


def test_a_network_with_frozen_layers_has_maps() -> None:
    def factory(input_shape: InputShape, num_classes: int) -> nn.Module:
        first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).requires_grad_(False)
        return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

    functional = Functional(factory, DIGITS, 3)
    functional.require_maps()
    (seen,), _ = functional.maps(*functional.init(Rng(0), "network"), images(DIGITS, 5))
    assert seen.shape == (5, 4, 8, 8)


def test_frozen_layers_are_never_trained() -> None:
    functional, x = Functional(frozen, DIGITS, 3), images(DIGITS, 6)
    initial = functional.init(Rng(0), "network")
    before = {name: p.clone() for name, p in functional._frozen.items()}
    assert before.keys() == {"body.1.weight", "body.1.bias"} and not before.keys() & functional.shapes.keys()
    training = Training(num_epochs=2, batch_size=3, lr=0.1)
    trainer = Trainer(functional, training, Compute())
    sources = [trainer.source(x, torch.arange(6) % 3, Rng(seed)) for seed in range(2)]
    trained = trainer.run(initial, sources[0])
    together = trainer.run_together([initial, initial], sources)
    for weights in (trained, *together):
        assert weights.params.keys() == functional.shapes.keys() and not weights.buffers
        assert not torch.equal(weights.params["classifier.weight"], initial.params["classifier.weight"])
    assert all(torch.equal(p, before[name]) for name, p in functional._frozen.items())


def test_a_network_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^custom:.*<lambda> has no parameter that requires grad: [^\n]+; leave"):
        Functional(lambda shape, num: frozen(shape, num).requires_grad_(False), DIGITS, 3)


def test_the_identity_says_what_is_frozen() -> None:
    def factory(scale: float) -> Factory:
        def build(input_shape: InputShape, num_classes: int) -> nn.Module:
            network = frozen(input_shape, num_classes)
            nn.init.constant_(network.get_parameter("1.weight"), scale)
            return network

        return build

    identities = [Functional(factory(scale), DIGITS, 3).identity() for scale in (1.0, 1.0, 2.0)]
    assert identities[0] == identities[1] != identities[2]
    assert "frozen" not in Functional(tiny, DIGITS, 3).identity()


def test_buffers_keep_their_types() -> None:
    functional = Functional(reordering, DIGITS, 3)
    params, buffers = functional.init(Rng(0), "network")
    types = {name.removeprefix("body."): buffer.dtype for name, buffer in buffers.items()}
    assert types["order"] == types["norm.num_batches_tracked"] == torch.int64 and types["kept"] == torch.bool
    _, restored = functional.restored(params, {name: buffer.float() for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        assert restored[name].dtype == buffer.dtype and torch.equal(restored[name], buffer)
    x = images(DIGITS, 5)
    expected = functional.logits(params, buffers, x, train=False)
    assert torch.equal(functional.logits(params, restored, x, train=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(functional.logits(params, buffers, x, False).float(), expected, rtol=0.1, atol=0.1)


def test_a_callable_must_build_a_fresh_module_each_time() -> None:
    module = tiny(DIGITS, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def same(input_shape: InputShape, num_classes: int) -> nn.Module:
        return module

    functional = Functional(same, DIGITS, 3)
    message = r"^custom:.*same returned the same module a second time: .*; build .* return copy.deepcopy\(module\) .*$"
    with pytest.raises(ValueError, match=message):
        functional.init(Rng(0), "network")
    copied = Functional(lambda shape, num: copy.deepcopy(module), DIGITS, 3)
    params, _ = copied.init(Rng(0), "network")
    with torch.no_grad():
        params["body.0.weight"].zero_()
    after = module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items()) and after.keys() == before.keys()


def test_networks_that_share_a_part_do_not_disturb_each_other() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh()).requires_grad_(False)
    functional = Functional(lambda shape, num: nn.Sequential(backbone, nn.Linear(16, num)), DIGITS, 3)
    x = images(DIGITS)
    for seed in range(2):
        params, buffers = functional.init(Rng(seed), "network")
        expected = backbone(x) @ params["classifier.weight"].T + params["classifier.bias"]
        torch.testing.assert_close(functional.logits(params, buffers, x), expected)


def test_a_buffer_made_in_the_first_pass_is_refused() -> None:
    class Lazy(nn.Linear):
        mean: Tensor | None

        def __init__(self) -> None:
            super().__init__(64, 3)
            self.register_buffer("mean", None)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            if self.mean is None:
                self.mean = input.mean(0)
            return super().forward(input - self.mean)

    with pytest.raises(ValueError, match=r"creates its buffer 1.mean in the first forward pass: [^\n]+; register"):
        build(lambda shape, num: nn.Sequential(nn.Flatten(), Lazy()), DIGITS, 3)


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    def factory(input_shape: InputShape, num_classes: int) -> nn.Module:
        network = tiny(input_shape, num_classes)
        network.derived = network.get_parameter("0.weight") * 2
        return network

    with pytest.raises(
        ValueError, match=r"^[^\n]+ cannot be copied: [^\n]+; return a module that copy.deepcopy takes$"
    ):
        build(factory, DIGITS, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("convnet:width=1000000", "option width of convnet cannot be '1000000': it is a whole number from 1 to 10000"),
        ("vit:depth=" + "9" * 5000, "whole number from 1 to 10000"),
        ("mlp:width=10000", None),
        ("convnet:width=10000", "convnet:width=10000 would have more than 1,000,000,000 parameters for 10 outputs"),
        ("convnet:depth=500,pooling=none,widen=true", "more than 1,000,000,000 parameters.*; give a smaller width"),
    ],
)
def test_a_network_beyond_the_limit_is_refused_before_it_takes_memory(
    spec: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Built(Exception):
        pass

    def refuse(*args: Any) -> None:
        raise Built

    monkeypatch.setattr("condense.networks.functional.build", refuse)
    with pytest.raises(Built) if message is None else pytest.raises(ValueError, match=message):
        Functional(spec, DIGITS, 10)


# Weights as arguments

FUNCTIONALS = [
    "convnet:width=8",
    "convnet:width=8,norm=batch",
    "convnet:width=8,norm=batch-before",
    "vit:depth=1",
    tiny,
]


@pytest.mark.parametrize("spec", FUNCTIONALS)
def test_weights_are_a_function_of_the_key(spec: str) -> None:
    before = torch.get_rng_state()
    functional = Functional(spec, DIGITS, 3)
    first, again = (functional.init(Rng(1), "student", 2, 3) for _ in range(2))
    other = functional.init(Rng(1), "student", 2, 4)
    assert torch.equal(torch.get_rng_state(), before)
    vector = functional.flatten(first.params)
    assert torch.equal(vector, functional.flatten(again.params))
    assert not torch.equal(vector, functional.flatten(other.params))
    assert not any(param.requires_grad for param in first.params.values())
    with DrawnFrom(Rng(1)("student", 2, 3)):
        network = build(spec, DIGITS, 3)
    assert torch.equal(vector, nn.utils.parameters_to_vector(network.parameters()))


def check_weights_on(device: torch.device, spec: str | Factory) -> None:
    """A step that is a tensor on the device gives the weights of its value, and no global generator is used."""
    functional = Functional(spec, DIGITS, 3)
    expected = functional.init(Rng(1), "student", 2, 3)
    before = torch.get_rng_state()
    on_device = Functional(spec, DIGITS, 3, device)
    for step in (2, torch.tensor(2, device=device)):
        found = on_device.init(Rng(1), "student", step, 3)
        for name, param in found.params.items():
            assert param.device.type == device.type
            torch.testing.assert_close(param.cpu(), expected.params[name], rtol=2e-5, atol=2e-6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spec", [*FUNCTIONALS, noisy])
def test_a_step_that_is_a_tensor_gives_the_weights_of_its_value(spec: str | Factory) -> None:
    check_weights_on(torch.device("cpu"), spec)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*FUNCTIONALS, noisy])
def test_a_gpu_gives_the_weights_of_the_cpu(spec: str | Factory) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    before = torch.cuda.get_rng_state()
    check_weights_on(torch.device("cuda"), spec)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("spec", [*FUNCTIONALS, noisy])
def test_weights_have_the_distribution_that_the_module_asks_for(spec: str | Factory) -> None:
    params = Functional(spec, DIGITS, 3).init(Rng(1), "student").params
    with Rng(1).forked("student"):
        network = build(spec, DIGITS, 3)
    for name, param in network.named_parameters():
        found, num = params[name], param.numel()
        if num == 1 or param.std() == 0:
            assert torch.equal(found, param)
        else:
            error = 6 * param.std() / num**0.5
            assert (found.mean() - param.mean()).abs() < error and (found.std() - param.std()).abs() < error
            assert found.unique().numel() > 0.99 * num and not torch.equal(found, param)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("spec", ["convnet:width=8", "convnet:width=8,norm=batch", "resnet18:norm=batch"])
def test_calls_equal_the_module(spec: str, train: bool) -> None:
    functional, x = Functional(spec, DIGITS, 3), images(DIGITS, 5)
    weights = functional.init(Rng(0), "network")
    for buffer in weights.buffers.values():
        buffer.add_(1)  # statistics that are not the initial ones
    with Rng(0).forked("network"):
        network = build(spec, DIGITS, 3).train(train)
    network.load_state_dict({**weights.params, **weights.buffers})
    logits = functional.logits(*weights, x, train=train)
    features = functional.features(*weights, x, train=train)
    assert torch.equal(logits, network(x)) and torch.equal(features, network.embed(x))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("spec", ["convnet:width=8", "convnet:width=8,norm=batch,activation=swish"])
def test_maps_are_what_the_activations_put_out(spec: str, train: bool) -> None:
    functional, x = Functional(spec, DIGITS, 3), images(DIGITS, 5)
    weights = functional.init(Rng(0), "network")
    for buffer in weights.buffers.values():
        buffer.add_(1)  # statistics that are not the initial ones
    with Rng(0).forked("network"):
        network = build(spec, DIGITS, 3).train(train)
    network.load_state_dict({**weights.params, **weights.buffers})
    maps, features = functional.maps(*weights, x, train=train)
    blocks = network.get_submodule("features")
    assert isinstance(blocks, nn.Sequential) and len(maps) == 3
    for block, found in enumerate(maps):
        network.load_state_dict({**weights.params, **weights.buffers})
        assert torch.equal(found, blocks[: 4 * block + 3](x))
    assert torch.equal(features, functional.features(*weights, x, train=train))


@pytest.mark.parametrize(
    ("spec", "shape", "sizes"),
    [
        ("convnet", MNIST, [32, 16, 8]),
        ("alexnet", CIFAR, [32, 16, 8, 8, 8]),
        ("lenet", CIFAR, [28, 10]),
        ("resnet18:norm=batch", CIFAR, [32] * 5 + [16] * 4 + [8] * 4 + [4] * 4),
        ("torchvision:resnet18", CIFAR, [16] + [8] * 4 + [4] * 4 + [2] * 4 + [1] * 4),
        ("timm:resnet10t", CIFAR, [16] * 3 + [8] * 2 + [4] * 2 + [2] * 2 + [1] * 2),
        (tiny, DIGITS, [6]),
    ],
)
def test_every_network_with_activations_of_images_has_maps(spec: str, shape: InputShape, sizes: list[int]) -> None:
    functional = Functional(spec, shape, 3)
    functional.require_maps()
    with Rng(0).forked("dropout"):
        maps, features = functional.maps(*functional.init(Rng(0), "network"), images(shape))
    assert [tuple(m.shape[2:]) for m in maps] == [(size, size) for size in sizes]
    assert features.dim() == 2


@pytest.mark.parametrize(
    ("spec", "shape", "sizes"),
    [
        ("convnet1d:width=4", SERIES, [(16,), (8,), (4,)]),
        ("convnet3d:depth=2,width=4", CLIPS, [(4, 8, 8), (4, 2, 2)]),
    ],
)
def test_maps_of_series_and_clips(spec: str, shape: InputShape, sizes: list[tuple[int, ...]]) -> None:
    functional = Functional(spec, shape, 3)
    maps, features = functional.maps(*functional.init(Rng(0), "network"), images(shape))
    assert [tuple(m.shape[2:]) for m in maps] == sizes and features.shape == (2, functional.num_features)
    with pytest.raises(ValueError, match=f"has no feature maps: .*; give network='{default_for(shape)}'"):
        Functional("mlp", shape, 3).require_maps()


@pytest.mark.parametrize("spec", ["mlp", "vit:depth=1", counting])
def test_a_network_without_maps_says_so(spec: str) -> None:
    functional = Functional(spec, DIGITS, 3)
    for call in (functional.require_maps, lambda: functional.maps(*functional.init(Rng(0), "n"), images(DIGITS))):
        with pytest.raises(ValueError, match=r"has no feature maps: .*; give network='convnet'") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["convnet:width=8,norm=batch", "convnet:width=8,norm=batch-before", "resnet18:norm=batch"]
)
def test_maps_under_transforms(spec: str) -> None:
    functional, x = Functional(spec, DIGITS, 3), images(DIGITS, 5)
    params, buffers = functional.init(Rng(0), "network")

    def loss(x: Tensor) -> Tensor:
        maps, features = functional.maps(params, buffers, x)
        return torch.stack([m.square().mean() for m in maps]).sum() + features.mean()

    gradient = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
    assert gradient.flatten(1).any(1).all()
    traced = torch.compile(functional.maps, backend="eager", fullgraph=True)
    for _ in range(2):  # nothing is left over from the call before
        maps, features = traced(params, buffers, x)
        expected, others = functional.maps(params, buffers, x)
        for one, other in zip([*maps, features], [*expected, others], strict=True):
            torch.testing.assert_close(one, other)


def test_a_call_that_fails_leaves_no_maps_behind() -> None:
    functional = Functional("lenet", CIFAR, 3)
    weights = functional.init(Rng(0), "network")
    with pytest.raises(RuntimeError, match="shapes"):
        functional.maps(*weights, images((3, 40, 40)))
    assert len(functional.maps(*weights, images(CIFAR))[0]) == 2


def counting_maps(input_shape: InputShape, num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(input_shape[0], 2, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Counting(*layers, nn.Linear(2, num_classes))


@pytest.mark.parametrize("spec", ["convnet:width=8,norm=batch", "torchvision:resnet18", counting_maps])
def test_maps_leave_the_buffers_alone(spec: str) -> None:
    functional = Functional(spec, CIFAR, 3)
    params, buffers = functional.init(Rng(0), "network")
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    functional.maps(params, buffers, images(CIFAR))
    assert all(torch.equal(buffers[name], before[name]) for name in before)


CAPTURED = [
    ("convnet:width=8,norm=batch", DIGITS, "features.4"),
    ("resnet18:norm=batch", DIGITS, "blocks.1"),
    ("torchvision:resnet18", CIFAR, "body.layer2.0"),
    ("timm:resnet10t", CIFAR, "body.layer2.0.bn1"),
    (counting_maps, CIFAR, "body.0"),
]


@cache
def with_statistics(spec: str | Factory, shape: InputShape) -> tuple[Functional, Weights]:
    """A network whose running statistics are not the initial ones."""
    functional = Functional(spec, shape, 3)
    weights = functional.init(Rng(0), "network")
    for name, buffer in weights.buffers.items():
        buffer.add_(0.02 if name.endswith("running_mean") else 1)
    return functional, weights


def by_hooks(functional: Functional, weights: Weights, x: Tensor, what: str, train: bool) -> list[Tensor]:
    """What plain hooks on a module of its own see, copied at once."""
    with Rng(0).forked("architecture"):
        network = build(functional.spec, functional.input_shape, 3).train(train)
    network.load_state_dict({**weights.params, **weights.buffers}, strict=True)
    seen: list[Tensor] = []
    for name, module in network.named_modules():
        if what == "norm-inputs" and isinstance(module, NORMS):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        elif (what == "activations" and isinstance(module, ACTIVATIONS)) or name == what:
            module.register_forward_hook(lambda *given: seen.append(given[-1].clone()))
    network(x)
    return seen


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["norm-inputs", "activations", "block"])
@pytest.mark.parametrize(("spec", "shape", "block"), CAPTURED)
def test_what_is_captured_is_what_hooks_see(
    spec: str | Factory, shape: InputShape, block: str, kind: str, train: bool
) -> None:
    (functional, weights), x = with_statistics(spec, shape), images(shape)
    what = block if kind == "block" else kind
    if kind == "norm-inputs" and spec is counting_maps:
        with pytest.raises(ValueError, match=r"has no normalisation layer.*; give network='convnet:norm=batch'"):
            functional.require_capture(what)
        return
    before = {name: buffer.clone() for name, buffer in weights.buffers.items()}
    values, features, logits = functional.capture(*weights, x, what, train)
    assert all(torch.equal(weights.buffers[name], before[name]) for name in before)
    assert torch.equal(logits, functional.logits(*weights, x, train))
    assert torch.equal(features, functional.features(*weights, x, train))
    leaf, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = by_hooks(functional, weights, leaf, what, train)
    assert len(values) == len(expected) > 0
    for one, other in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(one, other)
    found = functional.capture(*weights, ours, what, train).values.values()
    gradients = [
        torch.autograd.grad(torch.stack([value.sin().mean() for value in captured]).sum(), image)[0]
        for captured, image in ((found, ours), (expected, leaf))
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("spec", ["convnet:width=8,norm=batch", "torchvision:resnet18", "timm:resnet10t"])
def test_running_statistics_are_reached_by_the_names_of_norm_inputs(spec: str) -> None:
    functional = Functional(spec, CIFAR, 3)
    params, buffers = functional.init(Rng(0), "network")
    values = functional.capture(params, buffers, images(CIFAR), "norm-inputs", train=False).values
    assert {name.rpartition(".")[0] for name in buffers} == set(values)
    for name, value in values.items():
        assert buffers[f"{name}.running_mean"].shape == buffers[f"{name}.running_var"].shape == value.shape[1:2]


def test_captured_blocks_come_in_the_order_of_the_forward_pass_and_by_their_calls() -> None:
    functional = Functional("torchvision:resnet18", CIFAR, 3)
    weights = functional.init(Rng(0), "network")
    values = functional.capture(*weights, images(CIFAR), ["body.layer3.0.relu", "body.layer1"]).values
    assert list(values) == ["body.layer1", "body.layer3.0.relu", "body.layer3.0.relu#2"]
    logits = functional.capture(*weights, images(CIFAR), "classifier")
    assert torch.equal(logits.values["classifier"], logits.logits)


def test_capture_under_transforms() -> None:
    functional, x = Functional("convnet:width=8,norm=batch", DIGITS, 3), images(DIGITS, 5)
    params, buffers = functional.init(Rng(0), "network")
    functional.require_capture("norm-inputs")

    def loss(x: Tensor) -> Tensor:
        captured = functional.capture(params, buffers, x, "norm-inputs", train=False)
        return torch.stack([value.var((0, 2, 3)).mean() for value in captured.values.values()]).sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    both = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    together = torch.func.vmap(lambda params: functional.capture(params, buffers, x, "norm-inputs").values)(both)
    alone = functional.capture({name: 2 * p for name, p in params.items()}, buffers, x, "norm-inputs").values
    assert list(together) == list(alone)
    for name, value in alone.items():
        torch.testing.assert_close(together[name][1], value)
    traced = torch.compile(functional.capture, backend="eager", fullgraph=True)
    for _ in range(2):  # nothing is left over from the call before
        for one, other in zip(
            traced(params, buffers, x, "norm-inputs").values.items(),
            functional.capture(params, buffers, x, "norm-inputs").values.items(),
            strict=True,
        ):
            assert one[0] == other[0]
            torch.testing.assert_close(one[1], other[1])


def test_a_block_that_cannot_be_captured_is_refused() -> None:
    functional = Functional("torchvision:resnet18", CIFAR, 3)
    with pytest.raises(ValueError, match=r"has no block 'layer4': did you mean 'body.layer4'.*`blocks` lists all"):
        functional.require_capture("layer4")
    with pytest.raises(ValueError, match=r"no block 'activation': `blocks` lists all; or capture 'activations'"):
        Functional("mlp", DIGITS, 3).require_capture(["activation"])

    class Unused(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.unused, self.two, self.last = nn.ReLU(), Two(), nn.Linear(64, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.last(self.two(x)[0].flatten(1))
            return output

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    functional = Functional(lambda shape, num_classes: Unused(num_classes), DIGITS, 3)
    for block, reason in (("body.unused", "is not run in a forward pass"), ("body.two", "its output is a tuple")):
        with pytest.raises(ValueError, match=rf"^the block '{block}' .*{reason}"):
            functional.require_capture(block)


@pytest.mark.parametrize("spec", ["convnet:width=8,norm=batch", tiny])
def test_buffers_change_only_on_demand(spec: str) -> None:
    functional, x = Functional(spec, DIGITS, 3), images(DIGITS, 5)
    params, buffers = functional.init(Rng(0), "network")
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with Rng(0).forked("dropout"):
        functional.logits(params, buffers, x)
        functional.features(params, buffers, x)
    functional.logits(params, buffers, x, train=False, update_buffers=True)
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    with Rng(0).forked("dropout"):
        functional.logits(params, buffers, x, update_buffers=True)
    assert buffers and not any(torch.equal(buffers[name], before[name]) for name in before)
    with Rng(0).forked("network"):
        network = build(spec, DIGITS, 3)
    network.load_state_dict({**params, **before})
    with Rng(0).forked("dropout"):
        network.train()(x)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_buffers_of_foreign_layers_change_only_on_demand() -> None:
    functional, x = Functional(counting, DIGITS, 3), images(DIGITS)
    params, buffers = functional.init(Rng(0), "network")
    functional.logits(params, buffers, x)
    assert buffers["body.calls"] == 0
    functional.logits(params, buffers, x, update_buffers=True)
    assert buffers["body.calls"] == 1


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("convnet:width=8", DIGITS),
        ("convnet:width=8,norm=batch", DIGITS),
        ("vit:depth=1", DIGITS),
        ("convnet1d:width=8,norm=batch,pooling=max", SERIES),
        ("convnet3d:depth=2,width=4,norm=instance,dropout=false", CLIPS),
    ],
)
def test_transforms(spec: str, shape: InputShape) -> None:
    functional, x = Functional(spec, shape, 3), images(shape, 5)
    members = [functional.init(Rng(0), "network", unit=k) for k in range(2)]
    params, buffers = members[0]
    labels = torch.arange(5) % 3

    def loss(params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional.logits(params, buffers, x), labels)

    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    gradients = torch.func.grad(loss)(params)
    for one, other in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(one, other)

    stacked = {name: torch.stack([member.params[name] for member in members]) for name in params}
    losses = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(losses, torch.stack([loss(member.params) for member in members]))

    traced = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)(params)
    for name in params:
        torch.testing.assert_close(traced[name], gradients[name])


def test_compiled_training_updates_buffers() -> None:
    functional, x = Functional("convnet:width=8,norm=batch", DIGITS, 3), images(DIGITS, 5)
    params, eager = functional.init(Rng(0), "network")
    compiled = {name: buffer.clone() for name, buffer in eager.items()}
    call = partial(functional.logits, train=True, update_buffers=True)
    call(params, eager, x)
    torch.compile(call, backend="aot_eager", fullgraph=True)(params, compiled, x)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


@pytest.mark.parametrize(
    "spec", ["convnet:width=8", "convnet:width=8,norm=batch", "convnet:width=8,norm=batch-before", tiny]
)
def test_flatten(spec: str) -> None:
    functional = Functional(spec, DIGITS, 3)
    params, _ = functional.init(Rng(0), "network")
    vector = functional.flatten(params)
    assert vector.shape == (functional.num_params,)
    restored = functional.unflatten(vector)
    assert list(restored) == list(functional.shapes) == list(params)
    assert all(torch.equal(restored[name], params[name]) for name in params)
    shuffled = dict(reversed(params.items()))
    assert torch.equal(functional.flatten(shuffled), vector)
    assert functional.num_params == sum(math.prod(shape) for shape in functional.shapes.values())


def test_double_precision() -> None:
    functional = Functional("convnet:width=4,norm=batch", DIGITS, 3, dtype=torch.float64)
    params, buffers = functional.init(Rng(0), "network")
    logits = functional.logits(params, buffers, images(DIGITS).double())
    assert logits.dtype == torch.float64
    single = Functional("convnet:width=4,norm=batch", DIGITS, 3).init(Rng(0), "network")
    assert all(torch.equal(params[name].float(), single.params[name]) for name in params)


def test_weights_are_their_own() -> None:
    functional = Functional("mlp", DIGITS, 3)
    first, second = (functional.init(Rng(0), "network").params for _ in range(2))
    for param in first.values():
        param.zero_()
    assert all(param.any() for param in second.values())


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    host, device = (Functional("convnet", CIFAR, 10, name) for name in ("cpu", "cuda"))
    weights = device.init(Rng(0), "network")
    expected = host.logits(*host.init(Rng(0), "network"), images(CIFAR))
    actual = device.logits(*weights, images(CIFAR).to("cuda"))
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 28, 28)], ids=str)
def test_grey_images_in_bfloat16_have_the_values_and_gradients_of_float32(shape: InputShape, compiled: bool) -> None:
    network = Functional("convnet:depth=2,width=8", shape, 3)
    params, buffers = network.init(Rng(0), "weights")
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    compute = Compute(autocast="bfloat16", compile=compiled)

    def outcome(policy: Compute) -> list[Tensor]:
        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return network.logits(params, buffers, x).square().mean()

        live, x = {name: p.clone().requires_grad_() for name, p in params.items()}, images.clone().requires_grad_()
        value = policy.first_order(loss, network.device)(live, x)
        return [value, *torch.autograd.grad(value, [*live.values(), x])]

    for found, expected in zip(outcome(compute), outcome(Compute()), strict=True):
        assert found.shape == expected.shape
        assert torch.linalg.vector_norm(found - expected) <= 0.1 * torch.linalg.vector_norm(expected) + 2e-3

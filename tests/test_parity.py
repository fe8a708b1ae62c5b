"""The package against numbers recorded from the authors' code: see ``tests/parity/README.md``.

Each test replaces the package's draws by the recorded ones and runs the public path: networks, augmentation, whitening,
decoders, kernels, plain training, and the steps of methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condense.augment import Augment, Params
from condense.compute import Compute
from condense.data.transform import Transform, channel_statistics, fit
from condense.eval.protocol import PROTOCOLS
from condense.eval.ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from condense.kernels import fully_connected
from condense.method import Optim
from condense.methods.datadam import DataDAM
from condense.methods.dc import DC, DSA
from condense.methods.dm import DM
from condense.methods.mtt import MTT
from condense.networks import Functional, Weights
from condense.networks.registry import build
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic.decode import DCT, Bases, Hallucinator, dct, inverse_dct
from condense.train import Trainer, Training
from tests.parity.recorded import (
    Recorded,
    assert_all_close,
    assert_close,
    context,
    drawing,
    operation,
)

TOLERANCE = 1e-6
SMALL_NETWORKS = list(Recorded("01_networks_small").meta["variants"])
LARGE_NETWORKS = [
    pytest.param(f"{shape}/{name}", marks=[pytest.mark.slow] if name.startswith(("alex", "vgg", "resnet")) else [])
    for shape in ("c1", "c3")
    for name in Recorded("01_networks_large").meta["variants"]
]
OPERATIONS = Recorded("02_dsa_ops").meta["cases"]


def forward(network: nn.Module, x: Tensor, cotangent: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of <logits, cotangent> in the images."""
    network.train(train)
    x = x.clone().requires_grad_()
    logits = network(x)
    return logits.detach(), torch.autograd.grad((logits * cotangent).sum(), x)[0]


def lay_down(network: nn.Module, values: Iterator[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_convnets_put_out_what_the_published_ones_do(name: str) -> None:
    recorded = Recorded("01_networks_small")
    variant, x, cotangent = recorded.meta["variants"][name], recorded["x"], recorded["cotangent"]
    network = build(variant["spec"], (3, 8, 8), 4).double()
    shapes = [shape for _, shape in variant["parameters"]]
    assert [list(p.shape) for p in network.parameters()] == shapes
    parts = recorded[f"{name}/weights"].split([int(np.prod(shape)) for shape in shapes])
    lay_down(network, (part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
    for mode in ("train", "eval"):
        logits, gradient = forward(network, x, cotangent, train=mode == "train")
        assert_close(logits, recorded[f"{name}/{mode}_logits"], 1e-12)
        if f"{name}/{mode}_grad" in recorded:
            assert_close(gradient, recorded[f"{name}/{mode}_grad"], TOLERANCE)
    assert_close(network.embed(x), recorded[f"{name}/embed"], TOLERANCE)
    for key in recorded.keys(f"{name}/b/"):
        assert_close(dict(network.named_buffers())[key.removeprefix(f"{name}/b/")], recorded[key], 1e-12)


@pytest.mark.parametrize("case", LARGE_NETWORKS)
def test_networks_at_full_size_put_out_what_the_published_ones_do(case: str) -> None:
    """Weights and inputs by the formula that the file states, so that none are stored."""
    recorded = Recorded("01_networks_large")
    shape, name = case.split("/")
    inputs = np.random.RandomState(2)
    x = torch.from_numpy(inputs.standard_normal((2, *recorded.meta["shapes"][shape])))
    cotangent = torch.from_numpy(inputs.standard_normal((2, 10)))
    assert_close(x.flatten()[:8], recorded[f"{shape}/x_first"], 1e-12)
    network = build(recorded.meta["variants"][name]["spec"], tuple(x.shape[1:]), 10).double()
    draws = np.random.RandomState(7)

    def value(path: str, shape: torch.Size) -> Tensor:
        noise = torch.from_numpy(draws.standard_normal(tuple(shape)))
        if len(shape) > 1:
            return noise * (2 / shape[1:].numel()) ** 0.5
        return 0.1 * noise + (1 if path.endswith("weight") else 0)

    lay_down(network, (value(path, p.shape) for path, p in network.named_parameters()))
    for mode in ("train", "eval"):
        logits, gradient = forward(network, x, cotangent, train=mode == "train")
        assert_close(logits, recorded[f"{case}/{mode}_logits"], 1e-9)
        assert_close(gradient.norm(), recorded[f"{case}/{mode}_grad_norm"], 1e-9)
        assert_close(gradient.flatten()[:16], recorded[f"{case}/{mode}_grad_first"], 1e-9)


@pytest.mark.parametrize("case", LARGE_NETWORKS)
def test_fresh_weights_are_spread_as_the_published_ones(case: str) -> None:
    """torch's generator draws the same numbers from the same seed, to the rounding of the instruction set."""
    recorded = Recorded("01_networks_large")
    shape, name = case.split("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(recorded.meta["variants"][name]["spec"], tuple(recorded.meta["shapes"][shape]), 10)
    parameters = [p.detach().double() for p in network.parameters()]
    assert_close(torch.stack([p.mean() for p in parameters]), recorded[f"{case}/init_mean"], 1e-5)
    assert_close(torch.cat([p.flatten()[:4] for p in parameters]), recorded[f"{case}/init_first"], 1e-5)


@pytest.mark.parametrize("case", OPERATIONS)
def test_an_operation_of_dsa_does_what_the_published_one_does(case: str) -> None:
    recorded = Recorded("02_dsa_ops")
    image, op, _, border = case.split("/")
    x = recorded[f"{image}/x"].requires_grad_()
    values = recorded[f"{case}/params"]
    drawn = Params({op: operation(op, torch.nn.functional.pad(values, (0, 3 - values.shape[1])))})
    y = Augment((op,), align_corners=border == "align").apply(x, drawn)
    (gradient,) = torch.autograd.grad((y * recorded[f"{image}/cotangent"]).sum(), x)
    assert_close(y, recorded[f"{case}/y"], TOLERANCE)
    assert_close(gradient, recorded[f"{case}/grad"], TOLERANCE)


@pytest.mark.parametrize("count", ["many", "few"])
@pytest.mark.parametrize("name, spec", [("03_zca_kornia", "zca"), ("03_zca_frepo", "zca-relative")])
def test_whitening_is_the_published_one(name: str, spec: str, count: str) -> None:
    recorded = Recorded(name)
    images = recorded[f"{count}/pixels"].float() / 255
    transform: Transform = fit(spec, images, known=None, key="recorded", cache=None)
    assert_close(transform(images), recorded[f"{count}/white"], 1e-5)
    assert_close(transform.inverse(transform(images)), recorded[f"{count}/restored"], 1e-5)
    if f"{count}/channel_mean" in recorded:
        mean, std = channel_statistics(images)
        assert_close(torch.as_tensor(mean), recorded[f"{count}/channel_mean"], 1e-5)
        assert_close(torch.as_tensor(std), recorded[f"{count}/channel_std"], 1e-5)


@pytest.mark.parametrize("name, kind", [("04_dc", DC), ("04_dc_batchnorm", DC), ("04_dsa", DSA)])
def test_gradient_matching_takes_the_published_steps(name: str, kind: type[DC]) -> None:
    recorded = Recorded(name)
    h, num_steps = recorded.hyper, len(recorded["images"])
    ctx = context(recorded["real_images"], recorded["real_labels"], h["network"], h["ipc"], augment=h["augment"])
    network = ctx.task.network

    def student(step: int) -> dict[str, Tensor]:
        return recorded.weights(recorded[f"student{min(step // h['outer_loop'], h['students'] - 1)}"], network.shapes)

    network.given = student  # type: ignore[attr-defined]
    matched = iter(recorded["real_index"].flatten(0, 1))
    normed: list[Tensor] = []
    if "statistics_index" in recorded:  # the package sets them after the last update too, for a next one
        normed = list(recorded["statistics_index"].flatten(0, 1))
        normed += normed[-h["num_classes"] :]
    statistics = iter(normed)
    method = kind(
        num_steps=num_steps,
        batch_real=h["batch_real"],
        batch_student=h["batch_student"],
        lr_student=h["lr_net"],
        outer_loop=h["outer_loop"],
        inner_epochs=h["inner_epochs"],
        optim=Optim(lr=h["lr_img"], momentum=h["momentum_img"]),
    )
    with drawing(
        initial=(recorded["initial"], torch.arange(h["num_classes"]).repeat_interleave(h["ipc"])),
        siamese=recorded.draws("siamese"),
        each=recorded.draws("student_aug"),
        real=lambda images, num: images[next(matched if num == h["batch_real"] else statistics)],
        orders=iter(recorded["student_order"]),
    ):
        state = method.init(ctx)
        state.syn.double()
        for step in range(num_steps):
            record = method.step(ctx, state, step)
            assert_close(record["loss"], recorded["losses"][step].sum(), TOLERANCE)
            assert_close(state.syn.latents, recorded["images"][step], TOLERANCE)
            assert state.syn.latents.grad is not None
            assert_close(state.syn.latents.grad, recorded["image_grads"][step], TOLERANCE)
            if step == 0:
                assert_all_close(
                    state.params, recorded.weights(recorded["student0_after_step0"], network.shapes), TOLERANCE
                )


@pytest.mark.parametrize(
    "name, kind",
    [("05_dm", DM), ("05_dm_batchnorm", DM), ("10_datadam", DataDAM), ("10_datadam_batchnorm", DataDAM)],
)
def test_distribution_matching_takes_the_published_steps(name: str, kind: type[DM] | type[DataDAM]) -> None:
    recorded = Recorded(name)
    h = recorded.hyper
    ctx = context(recorded["real_images"], recorded["real_labels"], h["network"], h["ipc"], augment=h["augment"])
    network, num_steps = ctx.task.network, len(recorded["images"])
    network.given = lambda step: recorded.weights(recorded[f"network{min(step, num_steps - 1)}"], network.shapes)  # type: ignore[attr-defined]
    real = iter(recorded["real_index"].flatten(0, 1))
    optim = Optim(lr=h["lr_img"], momentum=h["momentum_img"])
    method = kind(num_steps=num_steps, batch_real=h["batch_real"], optim=optim)
    with drawing(
        initial=(recorded["initial"], torch.arange(ctx.task.num_classes).repeat_interleave(h["ipc"])),
        siamese=recorded.draws("siamese"),
        real=lambda images, num: images[next(real)],
    ):
        state = method.init(ctx)
        state.syn.double()
        for step in range(num_steps):
            record = method.step(ctx, state, step)
            assert_close(record["loss"], recorded["losses"][step], TOLERANCE)
            assert_close(state.syn.latents, recorded["images"][step], TOLERANCE)
            assert state.syn.latents.grad is not None
            assert_close(state.syn.latents.grad, recorded["image_grads"][step], 2e-6)


class GivenExperts:
    """A buffer whose every expert is one recorded pair of snapshots."""

    num_experts = 1

    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.num_epochs = recorded, recorded.hyper["expert_epochs"] + 1
        self.names = Functional(recorded.hyper["network"], (3, 8, 8), 3).shapes

    def pair(self, expert: int, start: int, target: int) -> tuple[dict[str, Tensor], ...]:
        vectors = (self.recorded[f"{part}{expert}"] for part in ("start", "target"))
        return tuple(self.recorded.weights(vector, self.names) for vector in vectors)


def test_trajectory_matching_takes_the_published_steps() -> None:
    recorded = Recorded("06_mtt")
    h, initial = recorded.hyper, recorded["initial"]
    classes = torch.arange(3).repeat_interleave(h["ipc"])
    experts = GivenExperts(recorded)
    ctx = context(initial, classes, h["network"], h["ipc"], augment=h["augment"], experts=experts)
    method = MTT(
        num_steps=len(recorded["images"]),
        syn_steps=h["syn_steps"],
        batch_syn=h["batch_syn"],
        expert_epochs=h["expert_epochs"],
        max_start_epoch=3,
        lr=h["lr_teacher"],
        optim=Optim(lr=h["lr_img"], momentum=h["momentum_img"]),
        # the package steps the logarithm of the learning rate
        optim_lr=Optim(lr=h["lr_lr"] / h["lr_teacher"] ** 2, momentum=h["momentum_lr"]),
    )
    with drawing(
        initial=(initial, classes),
        each=recorded.draws("aug"),
        permutations=iter(recorded["orders"]),
        length=len(classes),
    ):
        state = method.init(ctx)
        state.syn.double()
        for step in range(method.num_steps):
            if step:
                with torch.no_grad():
                    assert state.syn.log_lr is not None
                    state.syn.log_lr.copy_(recorded["lrs"][step - 1].log())
            assert state.syn.lr is not None and state.syn.log_lr is not None
            lr = state.syn.lr.item()
            record = method.step(ctx, state, step)
            assert state.syn.latents.grad is not None and state.syn.log_lr.grad is not None
            assert_close(record["loss"], recorded["losses"][step], TOLERANCE)
            assert_close(state.syn.latents.grad, recorded["image_grads"][step], TOLERANCE)
            assert_close(state.syn.log_lr.grad / lr, recorded["lr_grads"][step], TOLERANCE)
            assert_close(state.syn.latents, recorded["images"][step], TOLERANCE)
            assert_close(state.syn.lr, recorded["lrs"][step], 1e-3)


@pytest.mark.parametrize("case, norm", [("plain", "instance"), ("momentum", "instance"), ("batchnorm", "batch")])
def test_gsam_takes_the_published_steps(case: str, norm: str) -> None:
    recorded = Recorded("09_ftd_gsam")
    h = recorded.hyper
    network = Functional(f"convnet:depth=2,width=8,norm={norm}", (3, 8, 8), 4, dtype=torch.float64)
    start = recorded.weights(recorded[f"{case}/start"], network.shapes)
    weights = Weights(start, network.init(Rng(0), "weights").buffers)
    velocity = {name: torch.zeros_like(p) for name, p in start.items()} if h["momentum"][case] else None
    plan = Training(
        num_epochs=1,
        batch_size=10,
        lr=h["lr"],
        momentum=h["momentum"][case],
        weight_decay=h["weight_decay"][case],
        schedule=Schedule(),
        rho=h["rho"],
        alpha=h["alpha"],
    )
    trainer, optimiser = Trainer(network, plan, Compute()), partial(plan.optimise, velocity=velocity)
    for step in range(6):
        x, y = recorded["x"][step], recorded["y"][step]
        weights = trainer.run(weights, trainer.source(x, y, Rng(step)), optimiser=optimiser)
        if f"{case}/after{step + 1}" in recorded:
            assert_all_close(
                weights.params, recorded.weights(recorded[f"{case}/after{step + 1}"], network.shapes), TOLERANCE
            )
    for key in recorded.keys(f"{case}/buffers/"):
        assert_close(weights.buffers[key.split("/")[-1]], recorded[key], TOLERANCE)


@pytest.mark.parametrize("case", ["plain", "dsa"])
def test_an_evaluation_trains_as_the_published_one_until_the_learning_rate_drops(case: str) -> None:
    """From there the authors' code loses its momentum and runs for one epoch more (docs/evaluation.md)."""
    recorded = Recorded("17_evaluate_synset")
    h = recorded.hyper
    network = Functional(h["network"], (3, 8, 8), 4, dtype=torch.float64)
    plan = dataclasses.replace(
        PROTOCOLS["canonical"],
        num_epochs=20,
        batch_size=h["batch_train"],
        lr=h["lr_net"],
        weight_decay=h["weight_decay"],
        momentum=h["momentum"],
    )
    augment = Augment.parse("color_crop_cutout_flip_scale_rotate" if case == "dsa" else "none")
    after: dict[int, dict[str, Tensor]] = {}

    def keep(epoch: int, weights: Weights) -> None:
        after[epoch] = {name: p.clone() for name, p in weights.params.items()}

    # one order and the draws of three batches of the twenty-first epoch are left over
    orders = iter(recorded[f"{case}/orders"][:20])
    draws = list(recorded.draws(f"{case}/aug"))[:60]
    with drawing(each=iter(draws), orders=orders):
        start = Weights(recorded.weights(recorded["start"], network.shapes), {})
        trainer = Trainer(network, plan, Compute())
        source = trainer.source(recorded["images"], recorded["labels"], Rng(0), augment)
        trainer.run(start, source, on_epoch=keep)
    for epoch in (1, 5, 10):
        assert_all_close(after[epoch], recorded.weights(recorded[f"{case}/after{epoch}"], network.shapes), TOLERANCE)


def test_fred_decodes_as_published() -> None:
    recorded = Recorded("13_decode")
    h, images, labels = recorded.hyper["fred"], recorded["fred/initial"], recorded["fred/labels"]
    decode = DCT(coefficients=h["msz_per_channel"])
    decoder = decode.build(tuple(h["image_shape"]), h["num_classes"])
    latents = decode.encode(images, labels, decoder, torch.Generator()).requires_grad_()
    for positions, mask in zip(decoder.positions, recorded["fred/mask"], strict=True):
        assert set(positions.long().tolist()) == set(mask.flatten().nonzero().flatten().tolist())
    decoded = decoder(latents, labels)
    assert_close(dct(images), recorded["fred/spectra"], 1e-12)
    assert_close(decoded, recorded["fred/images"], TOLERANCE)
    (gradient,) = torch.autograd.grad((decoded * recorded["fred/cotangent"]).sum(), latents)
    assert_close(gradient, recorded["fred/grad"].flatten(2).gather(2, decoder.index(labels, 3)), TOLERANCE)
    assert_close(dct(recorded["fred/dct_x"]), recorded["fred/dct_y"], TOLERANCE)
    assert_close(inverse_dct(recorded["fred/dct_y"]), recorded["fred/dct_back"], 1e-12)


def test_haba_hallucinates_as_published() -> None:
    recorded = Recorded("13_decode")
    decoder = Hallucinator(num_styles=3).build((3, 8, 8), 10).double()
    ours = [decoder.kernels, decoder.bias, decoder.scale, decoder.shift, decoder.kernels_back, decoder.bias_back]
    theirs = ["enc.weight", "enc.bias", "scale", "shift", "dec.weight", "dec.bias"]
    with torch.no_grad():
        for parameter, name in zip(ours, theirs, strict=True):
            parameter.copy_(recorded[f"haba/{name}"].reshape(parameter.shape))
    latents = recorded["haba/latents"].requires_grad_()
    images = decoder(latents, torch.zeros(len(latents), dtype=torch.long))
    gradients = torch.autograd.grad((images * recorded["haba/cotangent"]).sum(), (latents, decoder.scale))
    assert_close(images, recorded["haba/images"], TOLERANCE)
    assert_close(gradients[0], recorded["haba/grad_latents"], TOLERANCE)
    assert_close(gradients[1], recorded["haba/grad_scale"].reshape(decoder.scale.shape), TOLERANCE)


def test_bases_combine_as_published() -> None:
    recorded = Recorded("13_decode")
    decoder = Bases(num_bases=5).build((3, 8, 8), 3).double()
    with torch.no_grad():
        decoder.bases.copy_(recorded["rtp/bases"])
    coefficients = recorded["rtp/coefficients"].requires_grad_()
    images = decoder(coefficients, torch.zeros(len(coefficients), dtype=torch.long))
    gradients = torch.autograd.grad((images * recorded["rtp/cotangent"]).sum(), (coefficients, decoder.bases))
    assert_close(images, recorded["rtp/images"], 1e-12)
    assert_close(gradients[0], recorded["rtp/grad_coefficients"], 1e-12)
    assert_close(gradients[1], recorded["rtp/grad_bases"], 1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_infinite_kernels_are_those_of_neural_tangents(depth: int) -> None:
    recorded = Recorded("14_kip_kernels")
    a, b, prefix = recorded["a"], recorded["b"], f"depth{depth}"
    for pair, other in (("aa", None), ("ab", b)):
        kernels = fully_connected(a, other, depth=depth)
        assert_close(kernels.nngp, recorded[f"{prefix}/nngp_{pair}"], 1e-12)
        assert_close(kernels.ntk, recorded[f"{prefix}/ntk_{pair}"], 1e-12)
    for kind in ("nngp", "ntk"):
        others = b[1:].clone().requires_grad_()  # the first of them equals one of a: there is no derivative
        kernel = getattr(fully_connected(a, others, depth=depth), kind)
        (gradient,) = torch.autograd.grad((kernel * recorded["cotangent"][:, 1:]).sum(), others)
        assert_close(gradient, recorded[f"{prefix}/{kind}_grad_b"], 1e-9)


def test_scores_of_dd_ranking_are_those_of_its_package() -> None:
    recorded = Recorded("18_dd_ranking")
    found: dict[str, list[float]] = {name: [] for name in ("lrs_soft", "hlr", "ior", "lrs_hard", "ior_hard", "ars")}
    for (a0, a1, a2, a3), weight in zip(recorded["accuracies"].tolist(), recorded["weights"].tolist(), strict=True):
        found["lrs_soft"].append(label_robust_score(a0, a1, a2, a3, weight))
        found["hlr"].append(hard_label_recovery(a0, a1))
        found["ior"].append(improvement_over_random(a2, a3))
        found["lrs_hard"].append(label_robust_score(a0, a1, a1, a3, weight))
        found["ior_hard"].append(improvement_over_random(a1, a3))
        found["ars"].append(augmentation_robust_score(a2, a3, a1, a0, weight))
    for name, values in found.items():
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), recorded[name], rtol=0, atol=1e-14)

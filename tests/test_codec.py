"""The decoder codec: rate, rounding, files, budget, and the rate in the loss of methods; each against a slow twin."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condense
from condense import testing
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.method import GradientMethod, GradientState, Method, State, Value
from condense.rng import Rng
from condense.synthetic import Codec, Decode, Origin, Siren, SyntheticSet, fits, load, save
from condense.synthetic import codec as codec_module
from condense.synthetic.codec import CodecDecoder, golomb_bits, laplace_bits, soft_round
from condense.synthetic.decode import Coded
from condense.testing import _Trial
from tests.conftest import TINY
from tests.reference import codec as slow
from tests.test_contract import WAYS, small, traced

__all__ = ["traced"]

SHAPE, NUM_CLASSES = (3, 7, 9), 3
SMALL = Codec(images=2, context=6, context_layers=2, width=5, fit_steps=3)
pytestmark = pytest.mark.usefixtures("short_search")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(decode: Codec = SMALL, dtype: torch.dtype = torch.float64) -> tuple[CodecDecoder, Tensor, Tensor]:
    """A decoder with random weights, whole latents (N, K), and classes in no order, of which the last has one image."""
    decoder = decode.build(SHAPE, NUM_CLASSES)
    assert isinstance(decoder, CodecDecoder)
    decoder.initialise(generator())
    with torch.no_grad():
        for param in decoder.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator(1)))
    classes = torch.tensor([1, 0, 2, 1, 0])
    (size,) = decode.latent_shape(SHAPE)
    latents = (2 * torch.randn(len(classes), size, generator=generator(2))).round()
    return decoder.to(dtype), latents.to(dtype), classes


def slice_of(decoder: CodecDecoder, label: int) -> slow.Slice:
    return slow.Slice(**{name: param[label].detach().double().numpy() for name, param in decoder.named_parameters()})


def a_set(decode: Codec = SMALL) -> SyntheticSet:
    decoder, latents, classes = made(decode, torch.float32)
    dataset = {"name": "made up", "fingerprint": "f", "classes": list("abc"), "input_shape": list(SHAPE)}
    origin = Origin(dataset=dataset, transform={"kind": "none"})
    latents = latents + 0.4 * torch.rand(latents.shape, generator=generator(3)) - 0.2
    return SyntheticSet(latents, classes, origin, decode=decode, decoder=decoder)


@pytest.mark.parametrize("decode", [SMALL, dataclasses.replace(SMALL, context=32, context_layers=1, levels=2)])
def test_the_rate_is_that_of_the_twin(decode: Codec) -> None:
    """Of whole numbers, and of those that the noise has moved."""
    decoder, latents, classes = made(decode)
    for values in (latents, latents + 0.3 * torch.randn(latents.shape, generator=generator(4), dtype=torch.float64)):
        expected = [
            slow.bits(latent.numpy(), decoder.sizes, slice_of(decoder, label))
            for latent, label in zip(values, classes.tolist(), strict=True)
        ]
        np.testing.assert_allclose(decoder.bits(values, classes).detach(), expected, rtol=1e-9)


def test_images_are_those_of_the_twin() -> None:
    decoder, latents, classes = made()
    images = decoder(latents, classes).detach()
    assert decoder.sizes == [(7, 9), (4, 5), (2, 3)]
    for image, latent, label in zip(images, latents, classes.tolist(), strict=True):
        expected = slow.image(latent.numpy(), decoder.sizes, slice_of(decoder, label))
        np.testing.assert_allclose(image, expected, rtol=1e-9, atol=1e-12)


def test_the_upsampling_begins_as_bicubic_interpolation() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=generator())
    kernels = codec_module.bicubic_kernel().repeat(2, 1, 1)
    expected = F.interpolate(maps, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(codec_module._doubled(maps, kernels), expected, rtol=1e-5, atol=1e-5)


def test_the_count_is_the_ideal_length_of_each_class_in_bytes() -> None:
    """Of the latents in the twin's probabilities, and of the weights in the twin's code."""
    syn = a_set().finished()
    assert isinstance(syn.decoder, CodecDecoder)
    latents, networks = 0, 0
    for label in range(NUM_CLASSES):
        net = slice_of(syn.decoder, label)
        members = syn.latents[syn.classes == label].detach().double()
        latents += math.ceil(sum(slow.bits(each.numpy(), syn.decoder.sizes, net) for each in members) / 8)
        bits = 0
        for names in (*codec_module.DRAWING, *codec_module.PREDICTING):
            bits += slow.golomb_bits([float(x) for name in names for x in getattr(net, name).flatten()])
        networks += math.ceil(bits / 8)
    assert (syn.cost().images, syn.cost().decoder) == (latents, networks)
    assert syn.num_bits == 8 * (latents + networks) + 5 * 2


def test_an_arithmetic_coder_needs_the_ideal_length_and_gives_the_latents_back() -> None:
    """Every prediction is made of entries that are decoded already: the others are NaN."""
    decoder, latents, classes = made(dataclasses.replace(SMALL, levels=2))
    for latent, label in zip(latents[:2], classes.tolist(), strict=False):
        net, low, high = slice_of(decoder, label), int(latents.min()), int(latents.max())
        code = slow.encoded(latent.numpy(), decoder.sizes, net, low, high)
        ideal = slow.bits(latent.numpy(), decoder.sizes, net)
        assert len(code) < ideal + 2
        np.testing.assert_array_equal(slow.decoded(code, decoder.sizes, net, low, high), latent)


def test_probabilities_add_up_and_their_logarithm_does_not_underflow() -> None:
    scales = torch.tensor([0.01, 0.3, 1.0, 20.0], dtype=torch.float64)[:, None]
    values = torch.arange(-600.0, 601.0, dtype=torch.float64)
    for mean in (0.0, 0.37, -0.5):
        total = torch.exp2(-laplace_bits(values, torch.tensor(mean), scales)).sum(1)
        torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)
    ends = torch.tensor([1e4, -1e4], requires_grad=True)
    far = laplace_bits(ends, torch.tensor(0.0), torch.tensor(0.01))
    expected = (1e4 - 0.5) / 0.01 / math.log(2) + 1  # the interval has half of the mass beyond its near end
    torch.testing.assert_close(far, torch.tensor([expected, expected]))
    (gradient,) = torch.autograd.grad(far.sum(), ends)
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1.0]) / 0.01 / math.log(2))


def test_the_gradient_of_the_rate_is_that_of_finite_differences() -> None:
    decoder, latents, classes = made()
    latents = latents + 0.2 * torch.rand(latents.shape, generator=generator(5), dtype=torch.float64) + 0.1
    values = [
        latents,
        *(param.detach() for name, param in decoder.named_parameters() if "context" in name or "scale" in name),
    ]
    names = [name for name, _ in decoder.named_parameters() if "context" in name or "scale" in name]

    def total(*given: Tensor) -> Tensor:
        seen, *weights = given
        call = dict(zip((f"decoder.{name}" for name in names), weights, strict=True))
        bits: Tensor = torch.func.functional_call(_Bits(decoder), call, (seen, classes))
        return bits.sum()

    inputs = [value.clone().requires_grad_() for value in values]
    gradients = torch.autograd.grad(total(*inputs), inputs)
    for k, gradient in enumerate(gradients):
        direction = torch.randn(values[k].shape, generator=generator(6), dtype=torch.float64)
        ends = [
            total(*(value + sign * 1e-6 * direction if i == k else value for i, value in enumerate(values)))
            for sign in (1, -1)
        ]
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-5)


def test_many_latents_are_coded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits and gradients."""
    decoder, latents, classes = made()
    inputs = [latents.requires_grad_(), *decoder.parameters()]
    results = []
    for at_once in (2**24, 6 * latents.shape[1] * 2):
        monkeypatch.setattr(codec_module, "_AT_ONCE", at_once)
        bits = decoder.bits(latents, classes)
        results.append([bits, *torch.autograd.grad(bits.sum(), inputs, materialize_grads=True)])
        assert (type(bits.grad_fn).__name__ == "CatBackward0") == (at_once < 2**24)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class _Bits(nn.Module):
    def __init__(self, decoder: CodecDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return self.decoder.bits(latents, classes)


def test_soft_rounding_tends_to_rounding_and_to_the_identity() -> None:
    values = torch.linspace(-3, 3, 601, dtype=torch.float64) + 0.0013
    torch.testing.assert_close(soft_round(values, 1e-5), values.round())
    torch.testing.assert_close(soft_round(values, 1e3), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_round(values, torch.tensor(0.3)), soft_round(values, 0.3))
    assert (soft_round(values, 0.3).diff() > 0).all()
    whole = torch.arange(-3.0, 4.0)
    assert torch.equal(soft_round(whole, 0.2), whole)
    assert torch.autograd.gradcheck(lambda x: soft_round(x, 0.3), values[::50].clone().requires_grad_())


def test_noise_and_temperature_go_linearly_from_the_first_to_the_last_value() -> None:
    decode = dataclasses.replace(SMALL, noise=(0.4, 0.0), temperature=(0.8, 0.4))
    latents = torch.randn(4, 60, generator=generator())
    for progress, std, temperature in ((0.0, 0.4, 0.8), (0.25, 0.3, 0.7), (0.75, 0.1, 0.5)):
        noise = std * Rng(0)("quantisation", 3).normal(4, 60)
        expected = soft_round(soft_round(latents, temperature) + noise, temperature)
        for given in (progress, torch.tensor(progress)):
            torch.testing.assert_close(decode.relaxed(latents, Rng(0)("quantisation", 3), given), expected)


def test_rates_are_means_over_a_class_and_their_weight_changes_during_the_run() -> None:
    """In bits per pixel, with a weight for each third of the run."""
    decode = dataclasses.replace(SMALL, rate_weight=(0.5, 2.0, 8.0))
    decoder, latents, classes = made(decode)
    bits = decoder.bits(latents, classes)
    expected = torch.stack([bits[classes == c].mean() / (7 * 9) for c in range(NUM_CLASSES)])
    torch.testing.assert_close(decode.rates(latents, classes, decoder), expected)
    for progress, weight in ((0.0, 0.5), (0.3, 0.5), (0.34, 2.0), (0.6, 2.0), (0.7, 8.0), (0.99, 8.0)):
        assert decode.weight_at(progress) == weight == decode.weight_at(torch.tensor(progress))


@pytest.mark.parametrize("name", ["dm", "dsa", "mtt"])
def test_gradients_of_a_step_are_those_of_loss_and_penalty_together(name: str) -> None:
    """The twin: one graph from the latents to the sum of everything."""
    decode = dataclasses.replace(SMALL, rate_weight=(0.01, 0.5))
    method = small(name)
    assert isinstance(method, GradientMethod)
    trial = _Trial(method, None, {"decode": decode, "network": TINY})
    ctx = trial.context()
    state, step = method.init(ctx), 3
    record = method._differentiate(ctx, state, step)
    syn = state.syn
    params = [syn.latents, *syn.decoder.parameters()]
    found = [param.grad for param in params]
    relaxed = decode.relaxed(syn.latents, ctx.rng("quantisation", step), step / method.num_steps)
    with syn.decoding(relaxed):
        loss = torch.stack([_value(method.loss(ctx, state, step, part)) for part in method.parts(ctx)]).sum()
    rates = decode.rates(relaxed, syn.classes, syn.decoder)
    for gradient, other in zip(found, torch.autograd.grad(loss + 0.5 * rates.sum(), params), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5) and record["rate"] == pytest.approx(
        rates.mean().item()
    )


def _value(loss: Any) -> Tensor:
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize(
    "check", [testing.resumes_to_the_byte, testing.any_number_of_processes_agrees, testing.every_leaf_learns]
)
@pytest.mark.parametrize("name", ["dc", "mtt"])
def test_methods_keep_their_promises_with_it(name: str, check: Any) -> None:
    check(small(name), network=TINY, decode=SMALL)


@pytest.mark.parametrize("name", ["rat-bptt", "at-bptt"])
def test_networks_that_no_gradient_reaches_are_trained_on_rounded_latents_however_a_step_runs(name: str) -> None:
    """A captured step begins the training before it relaxes the latents."""
    losses = []
    for graph in (False, True):
        fields = {"decode": SMALL, "network": TINY, "compute": Compute(exact=True, graph=graph)}
        trial = _Trial(dataclasses.replace(small(name), num_steps=4), None, fields)
        ctx, method = trial.context(), trial.method
        state = method.init(ctx)
        losses.append([float(method.step(ctx, state, step)["loss"]) for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["dm", "dsa", "mtt"])
def test_what_is_compiled_or_numbered_by_a_tensor_has_nearly_the_same_gradients(name: str) -> None:
    """The second as in a CUDA graph."""
    method, fast = small(name), dataclasses.replace(WAYS["in pieces, several classes at once"], compile=True)
    assert isinstance(method, GradientMethod)
    found = []
    for compute in (Compute(exact=True), fast, Compute(graph=True)):
        ctx = _Trial(method, None, {"decode": SMALL, "network": TINY, "compute": compute}).context()
        state = method.init(ctx)
        assert isinstance(state, GradientState)
        method._differentiate(ctx, state, 2)
        found.append([param.grad for params in state.leaves().values() for param in params])
    for exact, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, exact, rtol=1e-2, atol=1e-4)


def test_what_is_stored_is_rounded_and_decodes_to_the_bit(tmp_path: Path) -> None:
    syn = a_set()
    stored = syn.finished()
    assert torch.equal(stored.latents, syn.latents.round()) and not torch.equal(stored.latents, syn.latents)
    assert stored.latents.requires_grad and syn.decoder is not stored.decoder
    before = (syn.decoder(syn.latents.round(), syn.classes) - stored()[0]).square().flatten(1).mean(1)
    assert 0 < before.max() <= SMALL.weight_error
    assert torch.equal(syn()[0], syn.decoder(syn.latents.round(), syn.classes)), (
        "a set that is learned shows it rounded"
    )
    save(stored, tmp_path / "set.safetensors")
    again = load(tmp_path / "set.safetensors")
    assert torch.equal(again()[0], stored()[0]) and again.cost() == stored.cost()
    assert sum(stored.cost()) < sum(syn.cost()) / 3


def test_weights_have_the_coarsest_step_that_the_error_allows() -> None:
    """Of the upsampling, which may use a third of the error; and the fewest bits in all of the entropy model."""
    syn = a_set()
    stored = syn.finished()
    assert isinstance(syn.decoder, CodecDecoder) and isinstance(stored.decoder, CodecDecoder)
    latents, wanted = stored.latents, syn.decoder(stored.latents, syn.classes)
    for label in range(NUM_CLASSES):
        kernel, errors = stored.decoder.upsampling[label].detach(), {}
        k = next(k for k in range(16) if torch.equal((kernel * 2**k).round(), kernel * 2**k))
        for tried in (k - 1, k):
            trial = a_set().decoder
            assert isinstance(trial, CodecDecoder)
            with torch.no_grad():
                trial.upsampling[label] = (syn.decoder.upsampling[label] * 2**tried).round() / 2**tried
            made = (trial(latents, syn.classes) - wanted).square().flatten(1).mean(1)
            errors[tried] = made[syn.classes == label].mean().item()
        assert errors[k] <= SMALL.weight_error / 3 < errors[k - 1]

    small_error = a_set(dataclasses.replace(SMALL, weight_error=0.0)).finished()
    assert torch.equal(small_error()[0], wanted), "no step is fine enough"

    def taken(weights: Tensor) -> Tensor:
        trial = a_set().decoder
        assert isinstance(trial, CodecDecoder)
        with torch.no_grad():
            trial.set_group(codec_module.PREDICTING[0], weights)
        return golomb_bits(weights) + trial.latent_bits(latents.detach(), syn.classes)

    exact = syn.decoder.group(codec_module.PREDICTING[0])
    chosen = stored.decoder.group(codec_module.PREDICTING[0])
    assert (taken(chosen) <= torch.stack([taken((exact * 2**k).round() / 2**k) for k in range(16)]).amin(0)).all()


def test_weights_that_are_no_multiples_of_a_step_take_32_bits_each() -> None:
    assert golomb_bits(torch.tensor([[0.1, 0.2], [0.25, -1.0]])).tolist() == [
        2 * 32 + 8,
        slow.golomb_bits([0.25, -1.0]),
    ]
    numbers = [0.0, 1.0, -3.5, 12.25, 0.75]
    assert golomb_bits(torch.tensor([numbers])).tolist() == [slow.golomb_bits(numbers)]


def test_the_fit_lowers_error_and_rate_of_every_class_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are fitted one after the other have the same networks as classes fitted together."""
    decode = dataclasses.replace(SMALL, noise=(0.0, 0.0), fit_steps=5, images=3)
    classes = torch.arange(NUM_CLASSES).repeat_interleave(3)
    images = torch.randn(9, 1, 1, 1, generator=generator()) + 0.1 * torch.randn(9, *SHAPE, generator=generator(1))
    results = []
    for at_once in (2**24, 1):
        monkeypatch.setattr(codec_module, "_AT_ONCE", at_once)
        decoder = decode.build(SHAPE, NUM_CLASSES)
        latents = decode.encode(images, classes, decoder, generator(2))
        results.append([latents, *decoder.state_dict().values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(codec_module, "_AT_ONCE", 2**24)

    def after(steps: int, weight: float) -> tuple[float, float]:
        plan = dataclasses.replace(decode, fit_steps=steps, fit_rate_weight=weight)
        decoder = plan.build(SHAPE, NUM_CLASSES)
        latents = plan.encode(images, classes, decoder, generator(2)).round()
        assert isinstance(decoder, CodecDecoder)
        error, bits = (decoder(latents, classes) - images).square().mean(), decoder.bits(latents, classes).sum()
        return error.item(), bits.item()

    start, cheap, dear = after(0, 0.01), after(150, 0.01), after(150, 1.0)
    assert cheap[0] < start[0] / 2 and dear[1] < cheap[1] < start[1]


@pytest.mark.parametrize(
    ("shape", "fields"), [((1, 1, 1), {}), ((3, 1, 9), {}), (SHAPE, {"levels": 1}), (SHAPE, {"context_layers": 0})]
)
def test_networks_without_upsampling_or_layers_are_fitted_too(
    shape: tuple[int, int, int], fields: dict[str, Any]
) -> None:
    decode, classes = dataclasses.replace(SMALL, **fields), torch.arange(NUM_CLASSES)
    decoder = decode.build(shape, NUM_CLASSES)
    latents = decode.encode(torch.randn(3, *shape, generator=generator()), classes, decoder, generator(1))
    syn = a_set(decode) if shape == SHAPE else None
    assert decoder(latents, classes).shape == (3, *shape)
    assert syn is None or syn.finished().num_bits > 0


@pytest.mark.parametrize("decode", [SMALL, Siren(width=4)], ids=["codec", "siren"])
def test_a_fit_that_diverges_is_refused(decode: Codec | Siren) -> None:
    decode = dataclasses.replace(decode, fit_lr=1e20, fit_steps=30)
    images, decoder = torch.randn(3, *SHAPE, generator=generator()), decode.build(SHAPE, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"^the fit of the decoder .* diverged; give a smaller decode=") as error:
        fits.encoded(decode, images, torch.arange(3), decoder, Rng(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decode", [SMALL, Siren(width=4, fit_steps=5)], ids=["codec", "siren"])
def test_a_long_fit_is_done_once(decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bits; another start, seed or field of the fit is another fit, and a damaged entry is made again."""
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path))
    monkeypatch.setattr(fits, "WORTH_SECONDS", 0.0)
    images, classes, fitted = torch.randn(3, *SHAPE, generator=generator()), torch.arange(3), []
    encode = type(decode).encode

    def counted(self: Decode, *given: Any) -> Tensor:
        fitted.append(self)
        return encode(self, *given)

    monkeypatch.setattr(type(decode), "encode", counted)

    def made(decode: Decode = decode, images: Tensor = images, seed: int = 0) -> list[Tensor]:
        decoder = decode.build(SHAPE, NUM_CLASSES)
        return [fits.encoded(decode, images, classes, decoder, Rng(seed)), *decoder.state_dict().values()]

    first = made()
    assert all(torch.equal(a, b) for a, b in zip(first, made(), strict=True)) and len(fitted) == 1
    same = dataclasses.replace(decode, rate_weight=(9.0,)) if isinstance(decode, Codec) else decode
    made(same)
    assert len(fitted) == 1
    made(images=images + 1), made(seed=1), made(dataclasses.replace(decode, fit_steps=4))  # type: ignore[call-arg]
    assert len(fitted) == 4
    for file in tmp_path.rglob("fit.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert all(torch.equal(a, b) for a, b in zip(first, made(), strict=True)) and len(fitted) == 5
    monkeypatch.setattr(fits, "WORTH_SECONDS", 1e9)
    made(seed=2), made(seed=2)
    assert len(fitted) == 7


def distilled(tiny: Arrays, out: Path, **fields: Any) -> SyntheticSet:
    decode = dataclasses.replace(SMALL, **fields.pop("decode", {}))
    optim = {
        "optim": condense.method.Optim(kind="adam", lr=0.2),
        "optim_decoder": condense.method.Optim(kind="adam", lr=0.01),
    }
    common: dict[str, Any] = {"network": TINY, "ipc": 2, "num_steps": 30, "device": "cpu"}
    return condense.distill("dm", dataset=tiny, decode=decode, out=out, **common | optim | fields)


def test_a_larger_weight_gives_fewer_bits_and_the_log_has_the_rate(tiny: Arrays, tmp_path: Path) -> None:
    cheap = distilled(tiny, tmp_path / "cheap", decode={"rate_weight": (100.0,)})
    dear = distilled(tiny, tmp_path / "dear", decode={"rate_weight": (0.0,)})
    assert cheap.cost().images < dear.cost().images / 2
    assert len(cheap) == 2 * NUM_CLASSES and not cheap.latents.frac().any()
    for out, syn in ((tmp_path / "cheap", cheap), (tmp_path / "dear", dear)):
        again = load(out)
        assert torch.equal(again()[0], syn()[0]) and again.num_bits == syn.num_bits
        snapshot = load(out / "snapshots" / "step_0000030.safetensors")
        assert torch.equal(snapshot.latents, syn.latents) and snapshot.num_bits == syn.num_bits
    records = [json.loads(line) for line in (tmp_path / "cheap" / "log.jsonl").read_text().splitlines()]
    rates = [record["rate"] for record in records if "rate" in record]
    assert len(rates) == 30 and rates[-1] < rates[0] / 2


def test_a_set_above_its_budget_is_kept_and_said_to_be(tiny: Arrays, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"^the set takes \d+ bits, more than the 6150 of ipc=1: .*; give a larger"
    ) as seen:
        syn = distilled(tiny, tmp_path / "run", ipc=1, budget="bits", num_steps=2, decode={"images": 4, "context": 16})
    (line,) = {str(each.message) for each in seen if "the set takes" in str(each.message)}
    assert "\n" not in line and f"takes {syn.num_bits} bits" in line and syn.allowed_bits == 6150
    assert line.endswith(f"fewer decode=Codec(images=...), or ipc={math.ceil(syn.num_bits / 6150)}")
    assert load(tmp_path / "run").num_bits == syn.num_bits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = distilled(tiny, tmp_path / "enough", ipc=10, budget="bits", num_steps=2)
        assert len(enough) == 2 * NUM_CLASSES and enough.allowed_bits is not None
        assert enough.num_bits <= enough.allowed_bits
        distilled(tiny, tmp_path / "floats", ipc=1, num_steps=2)


def test_a_selection_is_compressed_too(tiny: Arrays, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny, network=TINY, decode=SMALL, out=tmp_path / "run", device="cpu")
    assert not syn.latents.frac().any() and torch.equal(load(tmp_path / "run")()[0], syn()[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner(Method):
    """Learns without gradients of its own."""

    learns = True

    def init(self, ctx: Any) -> State:
        return State(syn=ctx.new_set(*ctx.initial("noise")))

    def step(self, ctx: Any, state: State, step: int) -> dict[str, Value]:
        return {}


def test_a_method_that_cannot_add_the_rate_is_refused(tiny: Arrays) -> None:
    with pytest.raises(ValueError, match=r"adds no rate to its loss, .*; give decode='pixels'$") as error:
        condense.distill(Learner(), dataset=tiny, network=TINY, decode=SMALL)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^sre2l .+; give decode='pixels'"):
        condense.distill("sre2l", dataset=tiny, network=TINY, decode=SMALL)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"images": 0}, "decode.images must be at least 1, got 0; a published value is 64"),
        ({"context": 257}, "decode.context must be at most 256, got 257; a published value is 32"),
        ({"levels": 0}, r"decode.levels must be at least 1, got 0; give decode=Codec\(levels=6\)"),
        ({"fit_lr": 0.0}, "decode.fit_lr must be positive and less than 1e30, got 0.0; a published value is 0.01"),
        ({"fit_lr": 1e38}, r"decode.fit_lr must be .* got 1e\+38; a published value is 0.01"),
        ({"rate_weight": ()}, r"decode.rate_weight must be finite .* at least 0, got \[\]; .* are 0.001 and 0.015"),
        ({"noise": (-1.0, 0.0)}, "decode.noise must be finite and at least 0, .*0.25 and 0.1"),
        ({"temperature": (0.3, 0.0)}, "decode.temperature must be positive and finite, .* values are 0.3 and 0.1"),
        ({"weight_error": -1.0}, "decode.weight_error must be finite and at least 0, got -1.0; .* is 5e-05"),
    ],
)
def test_bad_fields_are_refused_with_the_mend(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        Codec(**fields)
    assert "\n" not in str(error.value)


def test_a_file_without_a_finite_number_of_bits_is_refused(tmp_path: Path) -> None:
    syn = a_set(dataclasses.replace(SMALL, context_layers=8)).finished()
    with torch.no_grad():
        for name in ("context_weight", "scale_weight"):  # nine factors of 1e38 are too much for float64
            syn.decoder.get_parameter(name).fill_(1e38)
    save(syn, tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="its latents have no finite number of bits in its entropy model") as error:
        load(tmp_path / "set.safetensors")
    assert "\n" not in str(error.value)


def test_more_images_than_a_class_has_are_refused(tiny: Arrays) -> None:
    line = r"^class .* has 12 training images, fewer than decode=Codec\(images=64\); give decode=Codec\(images=12\) or"
    with pytest.raises(ValueError, match=line) as error:
        condense.distill("dm", dataset=tiny, network=TINY, decode="codec")
    assert "\n" not in str(error.value)


def test_grids_are_as_many_as_the_image_has_halves() -> None:
    assert [len(Codec().sizes((3, side, side))) for side in (1, 8, 32, 64, 128)] == [1, 4, 6, 6, 6]
    assert Codec().latent_shape((3, 32, 32)) == (1365,) and issubclass(Codec, Coded)
    with pytest.raises(
        ValueError, match=r"decode.levels is 5, but images of 8 x 9 pixels .* give decode=Codec\(levels=4\) or less"
    ):
        Codec(levels=5).sizes((1, 8, 9))

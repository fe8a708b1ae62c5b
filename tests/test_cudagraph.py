"""Steps with a counter on the device compute what steps with an int compute, whether or not they are captured."""

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.cudagraph import WARM_UP, Graphed, GraphedStep, from_host, fused
from condense.networks import Functional, Weights
from condense.registry import load as method
from condense.rng import Rng
from condense.testing import _Trial, any_number_of_processes_agrees, resumes_to_the_byte
from condense.train import Trainer, Training, _Lane
from tests.test_contract import SMALL, dropping
from tests.test_on_device import AUGMENT, GRAPHED, NETWORK

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", GRAPHED)
def test_a_run_with_graphs_gives_the_same_set(name: str) -> None:
    sets = []
    for graph in (False, True):
        trial = _Trial(method(name)(num_steps=4, **GRAPHED[name]), None, {"network": NETWORK, "augment": str(AUGMENT)})
        ctx = dataclasses.replace(trial.context(), compute=Compute(graph=graph))
        sets.append(trial.distil(ctx).state_dict())
    for key, tensor in sets[0].items():
        assert torch.equal(tensor, sets[1][key]), key


@pytest.mark.parametrize("name", ["dd", "dm"])
def test_a_network_with_dropout_draws_the_same_with_graphs(name: str) -> None:
    """Dropout draws from the global generator, which a captured step does not seed."""
    sets = []
    for graph in (False, True):
        compute = Compute(exact=True, graph=graph)
        trial = _Trial(method(name)(num_steps=3, **SMALL[name]), None, {"network": dropping, "compute": compute})
        sets.append(trial.distil(trial.context()).state_dict())
    assert all(torch.equal(tensor, sets[1][key]) for key, tensor in sets[0].items())


@pytest.mark.parametrize("check", [resumes_to_the_byte, any_number_of_processes_agrees])
@pytest.mark.parametrize("name", ["dc", "dm", "mtt", "rat-bptt", pytest.param("rcig", marks=pytest.mark.slow)])
def test_contract_of_methods_with_graphs(name: str, check: Any) -> None:
    check(method(name)(num_steps=4, **SMALL[name]), network=NETWORK, compute=Compute(exact=True, graph=True))


@pytest.mark.parametrize("num_networks", [1, 2])
@pytest.mark.parametrize(
    "augment",
    ["none", str(AUGMENT), f"{AUGMENT}:mode=D", f"{AUGMENT}:mode=P", "flip:flips=true", "flip:tile=2,shuffle=2"],
)
def test_a_training_with_graphs_gives_the_same_weights(augment: str, num_networks: int) -> None:
    plain, graphed = (trained(Compute(graph=graph), CPU, augment, num_networks) for graph in (False, True))
    for one, other in zip(plain, graphed, strict=True):
        assert all(torch.equal(tensor, other.params[name]) for name, tensor in one.params.items())


def trained(compute: Compute, device: torch.device, augment: str, num_networks: int = 1) -> list[Weights]:
    """Train on 10 images in batches of 4, so that the last batch of an epoch is smaller."""
    network = Functional(NETWORK, (3, 8, 8), 4, device)
    trainer = Trainer(network, Training(num_epochs=5, batch_size=4, cutmix=0.5), compute)
    images, targets = torch.randn(10, 3, 8, 8, generator=Rng(0).generator("images")), torch.arange(10) % 4
    rngs = [Rng(k) for k in range(num_networks)]
    sources = [trainer.source(images.to(device), targets.to(device), rng, Augment.parse(augment)) for rng in rngs]
    return trainer.run_together([network.init(rng, "weights") for rng in rngs], sources)


def test_weights_drawn_by_a_tensor_are_those_drawn_by_an_int() -> None:
    network = Functional("convnet:depth=1,width=4,norm=batch", (3, 8, 8), 4)
    drawn, again = (network.init(Rng(0), "student", step) for step in (3, torch.tensor(3)))
    assert all(torch.equal(tensor, again.params[name]) for name, tensor in drawn.params.items())


def test_what_the_host_prepares_is_copied_into_place_before_each_step() -> None:
    seen: list[tuple[int, int, int]] = []

    def prepare(step: int) -> Tensor:
        return torch.tensor([10 * step])

    def step(number: Tensor) -> None:
        place = from_host(number, "ten times", prepare)
        seen.append((int(number), int(place), place.data_ptr()))

    graphed = GraphedStep(step, CPU, name="a step")
    for number in (4, 5, 9):
        graphed(number)
    assert [entry[:2] for entry in seen] == [(4, 40), (5, 50), (9, 90)]
    assert len({address for *_, address in seen}) == 1
    assert torch.equal(from_host(3, "ten times", prepare), torch.tensor([30]))


def test_fused_functions_are_compiled_only_in_a_step_that_compiles() -> None:
    compiling: list[bool] = []

    @fused()
    def double(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return 2 * x

    def step() -> None:
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))

    step()
    Graphed(step, CPU, name="a step")()
    assert compiling == [False, False]
    Graphed(step, CPU, name="a step", compile=True)()
    assert len(compiling) == 2 or compiling[-1], "the compiled code does not run the Python function"


def test_nothing_of_a_training_waits_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the graphs of a network hold its memory."""
    lanes: list[weakref.ref[Any]] = []
    make = _Lane.__init__

    def remembered(self: _Lane, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        lanes.append(weakref.ref(self))

    monkeypatch.setattr(_Lane, "__init__", remembered)
    gc.disable()
    try:
        trained(Compute(graph=True), CPU, "none", 2)
        assert len(lanes) == 2 and not any(lane() for lane in lanes)
    finally:
        gc.enable()


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def deterministic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    @pytest.mark.parametrize("augment", ["none", "flip_color_crop_cutout:mode=M"])
    def test_captured_steps_equal_steps_that_are_not_captured(self, augment: str) -> None:
        device = torch.device("cuda")
        plain, graphed = (trained(Compute(exact=True, graph=g), device, augment)[0] for g in (False, True))
        assert all(torch.equal(tensor, graphed.params[name]) for name, tensor in plain.params.items())

    def test_a_step_is_captured_after_the_warm_up(self) -> None:
        runs, total = [], torch.zeros((), device="cuda")

        def step() -> None:
            runs.append(1)
            total.add_(1)

        graphed = Graphed(step, torch.device("cuda"), name="a step")
        for _ in range(WARM_UP + 5):
            graphed()
        assert len(runs) == WARM_UP + 1
        assert total.item() == WARM_UP + 5

    @pytest.mark.parametrize("fault", ["draws", "reads"])
    def test_what_cannot_be_captured_runs_as_it_is(self, fault: str) -> None:
        total = torch.zeros((), device="cuda")

        def step() -> None:
            total.add_(1)
            _ = total.item() if fault == "reads" else torch.rand(1, device="cuda")

        graphed = Graphed(step, torch.device("cuda"), name="a step")
        with pytest.warns(UserWarning, match="a step is not captured"):
            for _ in range(WARM_UP + 3):
                graphed()
        assert total.item() == WARM_UP + 3
        torch.rand(1, device="cuda")  # the global generator is as before

    def test_words_are_those_of_the_cpu_in_compiled_code(self) -> None:
        words: list[Any] = []
        step = GraphedStep(
            lambda number: words.append(Rng(1)("a", number, 2).words(1000)),
            torch.device("cuda"),
            name="a step",
            compile=True,
        )
        step(7)
        assert torch.equal(words[0].cpu(), Rng(1)("a", 7, 2).words(1000))

"""Keyed draws: published vectors, distributions, keys, and draws by a step that is a tensor."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from condense.rng import Draws, Rng, philox

VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

CALLS: dict[str, Callable[[Draws], Tensor]] = {
    "words": lambda draws: draws.words(50),
    "uniform": lambda draws: draws.uniform(3, 5),
    "integers": lambda draws: draws.integers(-3, 11, 40),
    "permutation": lambda draws: draws.permutation(100),
    "subset": lambda draws: draws.subset(100, 7),
    "normal": lambda draws: draws.normal(5, 9),
}


def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
@pytest.mark.parametrize("kind", [int, lambda word: np.array([word]), torch.tensor])
def test_published_vectors(
    counter: tuple[int, int, int, int],
    key: tuple[int, int],
    expected: tuple[int, ...],
    kind: Callable[[int], object],
) -> None:
    c0, c1, c2, c3 = map(kind, counter)
    assert tuple(int(np.ravel(word)[0]) for word in philox((c0, c1, c2, c3), key)) == expected


def test_few_numbers_and_many_come_from_the_same_words() -> None:
    many = Rng(0)("a", 2**31 - 1, 2**31 - 1).words(4000)
    few = Rng(0)("a", 2**31 - 1, 2**31 - 1)
    assert torch.equal(torch.cat([few.words(4) for _ in range(1000)]), many)
    assert len(set(many.tolist())) > 3990 and 0 <= many.min() and many.max() < 2**32


def check_device(device: torch.device) -> None:
    """Draws by tensors on a device equal draws by ints; all but normal numbers are equal bit for bit."""
    for step, base in itertools.product((0, 7, 123456), (0, 5)):
        at, child = torch.tensor(step, device=device), torch.tensor(base, device=device)
        for name, call in CALLS.items():
            for found in (
                Rng(3).child("child", base)(name, at, 2),
                Rng(3).child("child", child)(name, step, 2),
                Rng(3).child("child", child)(name, at, 2),
            ):
                begun = Rng(3).child("child", base)(name, step, 2)
                for _ in range(2):  # the second call continues alike
                    ours, theirs = call(found), call(begun)
                    assert ours.device.type == device.type and ours.dtype == theirs.dtype
                    if name == "normal":
                        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-5, atol=2e-6)
                    else:
                        assert torch.equal(ours.cpu(), theirs)
                assert begun.on_host and not found.on_host


def test_a_step_that_is_a_tensor_gives_the_draws_of_its_value() -> None:
    check_device(torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_draws_the_numbers_of_the_cpu() -> None:
    check_device(gpu())


@pytest.mark.parametrize("name", CALLS)
def test_a_key_gives_the_same_draws_again_and_every_part_of_it_matters(name: str) -> None:
    def drawn(seed: int = 0, word: str = "a", step: int = 0, unit: int | str = 0, base: int | str = 0) -> Tensor:
        return CALLS[name](Rng(seed).child("root", base)(word, step, unit))

    assert torch.equal(drawn(), drawn())
    others = [drawn(1), drawn(word="b"), drawn(step=1), drawn(unit=1), drawn(unit="1"), drawn(base=1), drawn(base="1")]
    for one, other in itertools.combinations([drawn(), *others], 2):
        assert not torch.equal(one, other)


def test_successive_calls_give_new_numbers() -> None:
    draws = Rng(0)("a")
    assert len({tuple(draws.uniform(3).tolist()) for _ in range(100)}) == 100


@pytest.mark.parametrize("part", ["step", "unit", "base"])
def test_a_part_of_a_key_is_a_word(part: str) -> None:
    for value in (-1, 2**31):
        with pytest.raises(AssertionError, match="cannot be a part of a key"):
            if part == "base":
                Rng(0).child("root", value)("a")
            else:
                Rng(0)("a", **{part: value})  # type: ignore[arg-type]


def test_integers_refuse_a_range_that_is_empty_or_too_large() -> None:
    for high in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match="cannot draw integers from 0 to"):
            Rng(0)("a").integers(0, high)
    assert Rng(0)("a").integers(5, 6, 3).tolist() == [5, 5, 5]


def test_nothing_is_drawn_where_nothing_is_asked_for() -> None:
    assert Rng(0)("a").permutation(0).tolist() == [] and Rng(0)("a").subset(3, 0).tolist() == []
    assert Rng(0)("a").uniform(0, 4).shape == (0, 4) and Rng(0)("a").normal(0).shape == (0,)


def test_uniform_numbers() -> None:
    x = Rng(0)("uniform").uniform(200_000)
    assert 0 <= x.min() and x.max() < 1 and torch.equal(x, (x * 2**24).round() / 2**24)
    assert x.double().mean().item() == pytest.approx(1 / 2, abs=4 * (1 / 12 / len(x)) ** 0.5)
    assert x.double().var().item() == pytest.approx(1 / 12, rel=0.01)


def test_integers_are_uniform() -> None:
    counts = Rng(0)("integers").integers(-3, 10, 130_000).add(3).bincount(minlength=13)
    assert len(counts) == 13 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_first_numbers_of_consecutive_steps_and_units_are_uniform() -> None:
    for keys in ([(k, 0) for k in range(5000)], [(0, k) for k in range(5000)]):
        drawn = [Rng(0)("a", *key).integer(0, 10) for key in keys]
        assert stats.chisquare(np.bincount(drawn, minlength=10)).pvalue > 1e-3


def test_permutations_are_uniform() -> None:
    orders = [tuple(Rng(0)("order", step).permutation(4).tolist()) for step in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == len(orders) and stats.chisquare(counts).pvalue > 1e-3
    assert sorted(Rng(0)("order").permutation(1000).tolist()) == list(range(1000))


@pytest.mark.parametrize("size", [1, 7, 99, 100, 101])
def test_a_subset_is_the_beginning_of_the_permutation(size: int) -> None:
    assert torch.equal(Rng(0)("a").subset(100, size), Rng(0)("a").permutation(100)[:size])


def test_normal_numbers() -> None:
    x = Rng(0)("normal").normal(100_001).double().numpy()
    assert np.isfinite(x).all() and stats.kstest(x, "norm").pvalue > 1e-3
    assert np.mean(x) == pytest.approx(0, abs=0.012) and np.std(x) == pytest.approx(1, abs=0.01)
    assert np.mean(x**3) == pytest.approx(0, abs=0.04) and np.mean(x**4) == pytest.approx(3, abs=0.1)
    assert abs(np.corrcoef(x[:50_000], x[50_000:100_000])[0, 1]) < 0.02


def test_roots_of_components_and_their_seeds_differ() -> None:
    rng = Rng(0)
    roots = [rng, *(rng.child("a", unit) for unit in (0, 1, "1", 2)), rng.child("b"), rng.child("a", 1).child("a", 1)]
    assert len({root.key("weights") for root in roots}) == len(roots)
    assert len({tuple(root.identity().items()) for root in roots}) == len(roots)

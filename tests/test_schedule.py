"""Learning rates from step to step, and how files spell them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from condense import registry
from condense.method import Optim
from condense.recipe import Recipe, from_mapping, parse, to_mapping
from condense.schedule import Schedule, nested
from condense.train import Training


def test_the_learning_rate_drops_between_epochs() -> None:
    twice = Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.5)
    assert [twice.lr_at(0.8, 3 * epoch, 36, 3) for epoch in range(12)] == [0.8] * 8 + [0.4] * 2 + [0.2] * 2
    half = Schedule(drop_at=(0.5,))
    rates = [half.lr_at(1.0, step, 15, 3) for step in range(15)]
    assert rates == [1.0] * 9 + [0.1] * 6, "half of five epochs is in the midst of the third"
    assert [half.lr_at(1.0, step, 4) for step in range(4)] == [1.0, 1.0, 0.1, 0.1]
    assert {Schedule().lr_at(0.3, step, 10) for step in range(12)} == {0.3}


@pytest.mark.parametrize("num_epochs", [3, 7, 100])
def test_a_drop_at_k_of_n_epochs_comes_after_k_epochs(num_epochs: int) -> None:
    """0.07 x 100 is more than 7 in floating point."""
    for epoch in range(1, num_epochs):
        schedule = Schedule(drop_at=(epoch / num_epochs,))
        rates = [schedule.lr_at(1.0, step, 5 * num_epochs, 5) for step in range(0, 5 * num_epochs, 5)]
        assert rates == [1.0] * epoch + [0.1] * (num_epochs - epoch)


def test_a_drop_after_an_epoch_is_there_however_long_the_run() -> None:
    schedule = Schedule(drop_after=(2, 3), drop_factor=0.5)
    for num_epochs in (4, 9):
        assert [schedule.lr_at(1.0, 3 * e, 3 * num_epochs, 3) for e in range(4)] == [1.0, 1.0, 0.5, 0.25]


def test_the_learning_rate_rises_and_follows_a_cosine() -> None:
    schedule = Schedule(warmup_steps=2, cosine_to=0.25)
    rates = [schedule.lr_at(0.8, step, 12, 3) for step in range(13)]
    assert rates[:3] == [0.0, 0.4, 0.8]
    assert rates[2:] == pytest.approx([0.8 * (0.25 + 0.75 * (1 + math.cos(math.pi * k / 10)) / 2) for k in range(11)])
    half = Schedule(cosine_to=0.0, cosine_span=0.5)
    expected = [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5]
    assert [half.lr_at(1.0, step, 2) for step in range(3)] == pytest.approx(expected)


def test_the_learning_rate_decays_linearly_after_the_warm_up() -> None:
    schedule = Schedule(warmup_steps=2, linear_to=0.2)
    rates = [schedule.lr_at(0.5, step, 12) for step in range(13)]
    assert rates == pytest.approx([0.0, 0.25, *(0.5 * (1 - 0.8 * k / 10) for k in range(11))])


def test_learning_rates_of_single_steps_replace_everything_and_the_last_one_stays() -> None:
    schedule = Schedule(lr_per_step=(0.3, 0.0, 0.1), warmup_steps=2, cosine_to=0.0, drop_at=(0.0,))
    assert [schedule.lr_at(9.0, step, 5) for step in range(5)] == [0.3, 0.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("schedule", "depends"),
    [
        (Schedule(warmup_steps=3, drop_after=(2,)), False),
        (Schedule(lr_per_step=(0.1, 0.2), cosine_to=0.1), False),
        (Schedule(drop_at=(0.5,)), True),
        (Schedule(cosine_to=0.1), True),
        (Schedule(linear_to=0.1), True),
    ],
)
def test_a_schedule_says_whether_it_depends_on_the_length(schedule: Schedule, depends: bool) -> None:
    short, long = ([schedule.lr_at(0.7, step, n, 2) for step in range(8)] for n in (8, 40))
    assert schedule.depends_on_length == depends == (short != long)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"cosine_to": 1.5}, r"cosine_to must lie in \[0, 1\], got 1\.5; try 0\.1"),
        ({"linear_to": -0.1}, r"linear_to must lie in \[0, 1\]"),
        ({"cosine_span": 0.0}, r"cosine_span must lie in \(0, 1\]"),
        ({"drop_at": (2.0,)}, "drop_at are fractions of the run"),
        ({"drop_after": (-1,)}, "drop_after are numbers of epochs"),
        ({"drop_factor": -0.1}, "drop_factor must be finite and >= 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"lr_per_step": (0.1, math.inf)}, "lr_per_step are finite learning rates"),
        ({"drop_at": 0.5}, "drop_at=0.5 is not"),
    ],
)
def test_bad_schedules_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        Schedule(**fields)
    assert "\n" not in str(raised.value)


SCHEDULES = [
    Schedule(),
    Schedule(cosine_to=0.1),
    Schedule(drop_at=(0.5, 0.75), drop_factor=0.5),
    Schedule(drop_at=(0.5,), drop_factor=0.2),
    Schedule(warmup_steps=3, drop_after=(4,), cosine_to=0.0, cosine_span=0.5),
    Schedule(lr_per_step=(0.3, 0.1)),
    Schedule(linear_to=0.001),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["dm", "cafe"])  # cafe's default has drops
def test_a_recipe_reads_back_the_schedule_that_it_wrote(name: str, schedule: Schedule) -> None:
    recipe = Recipe(method=registry.load(name)(optim=Optim(schedule=schedule)))  # type: ignore[call-arg]
    again = from_mapping(to_mapping(recipe), "it").method
    assert again.optim.schedule == schedule  # type: ignore[attr-defined]


def test_what_version_0_1_could_say_is_written_as_it_said_it() -> None:
    """Recipes, hashes and sets hold these fields."""
    usual = {"kind": "sgd", "lr": 0.1, "momentum": 0.5}
    written = [to_mapping(Optim(schedule=schedule)) for schedule in SCHEDULES]
    assert written[:3] == [
        usual | {"cosine_to": None, "halve_at": []},
        usual | {"cosine_to": 0.1, "halve_at": []},
        usual | {"cosine_to": None, "halve_at": [0.5, 0.75]},
    ]
    assert all("schedule" in fields and "halve_at" not in fields for fields in written[3:])
    assert ["linear_to" in fields["schedule"] for fields in written[3:]] == [False] * 3 + [True]


@pytest.mark.parametrize("schedule", [*SCHEDULES, Schedule(drop_at=(0.5, 0.75), cosine_to=0.1)])
def test_a_training_reads_back_the_schedule_that_it_wrote(schedule: Schedule) -> None:
    content = Training(schedule=schedule).content()
    assert "schedule" not in content
    read = {name: value for name, value in nested(content).items() if name != "schedule"}
    assert Training(**read, schedule=Schedule(**nested(content)["schedule"])) == Training(schedule=schedule)


def test_the_content_of_a_training_is_flat_and_as_it_was() -> None:
    first = {"num_epochs": 300, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    usual = first | {"decay_at": 0.5, "decay": 0.1, "loss": "cross-entropy"}
    assert Training().content() == usual
    annealed = Training(schedule=Schedule(warmup_steps=500, cosine_to=0.01))
    assert annealed.content() == usual | {"decay_at": None, "warmup_steps": 500, "cosine_to": 0.01}
    several = Training(schedule=Schedule(drop_at=(0.5, 0.75), drop_factor=0.2))
    assert several.content() == usual | {"decay_at": (0.5, 0.75), "decay": 0.2}


def test_in_a_training_of_version_0_1_a_cosine_took_the_place_of_drops() -> None:
    assert nested({"decay_at": 0.5, "cosine_to": 0.1})["schedule"] == {"drop_at": [], "cosine_to": 0.1}
    assert nested({"halve_at": [0.5], "cosine-to": 0.1, "schedule": {"warmup_steps": 2}}) == {
        "schedule": {"drop_at": [0.5], "drop_factor": 0.5, "cosine_to": 0.1, "warmup_steps": 2}
    }
    assert nested({"lr": 0.1, "kind": "adam"}) == {"lr": 0.1, "kind": "adam"}


def test_flags_reach_the_schedule_of_an_optimiser() -> None:
    flags = ["--method.optim.schedule.drop-at", "0.5", "0.75", "--method.optim.schedule.cosine-to", "0.1"]
    optim = parse(Recipe, flags, Recipe(method=registry.load("dm")())).method.optim  # type: ignore[attr-defined]
    assert optim == dataclasses.replace(optim, schedule=Schedule(drop_at=(0.5, 0.75), cosine_to=0.1))
    with pytest.raises(ValueError, match=r"cosine_to must lie in \[0, 1\]") as raised:
        parse(Recipe, ["--method.optim.schedule.cosine-to", "7"], Recipe(method=registry.load("dm")()))
    assert "\n" not in str(raised.value)

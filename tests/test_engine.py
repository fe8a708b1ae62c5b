import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import engine
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.distributed import Ranks
from condense.files import read_tensors, write_tensors
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.networks import Functional
from condense.rng import VERSION, Rng
from condense.synthetic import Hard, Origin, Pixels, SyntheticSet, load
from condense.task import Split, make_task
from condense.tracking import read_log


@dataclass(frozen=True, kw_only=True)
class Shrink(GradientMethod):
    """Pulls the images to zero; diverges from step ``bad`` on."""

    num_steps: int = 12
    optim: Optim = Optim(lr=0.1)
    bad: int = 10**9

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial("real"))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        loss: Tensor = state.syn()[0].square().sum()
        return loss * float("nan") if step >= self.bad else loss


@pytest.fixture
def ctx(tiny: Arrays) -> Context:
    task = make_task(
        tiny,
        transform="channel",
        split=Split(val_fraction=0.0),
        network=Functional("mlp", tiny.input_shape, 3, "cpu"),
        augment=Augment(),
        device=torch.device("cpu"),
    )
    return Context(
        task=task,
        rng=Rng(0),
        ipc=2,
        decode=Pixels(),
        labels=Hard(),
        compute=Compute(),
        origin=Origin(dataset=task.dataset(), transform=task.transform.describe(), recipe_hash="h"),
    )


def run(method: Shrink, ctx: Context, folder: Path, **fields: Any) -> SyntheticSet:
    return engine.run(method, ctx, method.init(ctx), folder, **fields)


def test_every_step_is_logged_and_ten_snapshots_are_kept(ctx: Context, tmp_path: Path) -> None:
    run(Shrink(num_steps=300), ctx, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 301))
    assert {"loss", "grad_latents", "lr_latents", "image_mean", "image_std"} <= set(records[0])
    assert records[-1]["loss"] < records[0]["loss"]
    steps = sorted(int(file.stem[-7:]) for file in (tmp_path / "snapshots").iterdir())
    assert len(steps) == 11 and steps[:2] == [0, 1] and steps[-1] == 300
    assert torch.equal(
        load(tmp_path / "snapshots" / "step_0000000.safetensors").latents, Shrink().init(ctx).syn.latents
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 5)
    with pytest.raises(ValueError, match=r"step 8 is not finite \(loss=nan.*last good checkpoint.*learning rate"):
        run(Shrink(bad=7), ctx, tmp_path)
    assert not (tmp_path / "synthetic.safetensors").exists()
    whole = run(Shrink(), ctx, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    resumed = run(Shrink(), ctx, tmp_path, resume=True)
    assert whole is not None and torch.equal(whole.latents, resumed.latents)
    assert '{"event": "resume", "step": 5}' in (tmp_path / "log.jsonl").read_text()


@dataclass(frozen=True, kw_only=True)
class Tells(Shrink):
    """Logs a pixel that the next step overwrites, and now and then a number of another type."""

    num_steps: int = 300

    def after(self, ctx: Context, state: Any, step: int) -> dict[str, Tensor | float]:
        pixel = state.syn.latents.detach()[0, 0, 4, 4]
        return {"pixel": pixel, "constant": 1 / 7} | ({"third": torch.tensor(1 / 3).double() / 3} if step % 5 else {})


def test_what_is_written_does_not_depend_on_how_many_steps_are_read_together(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = list[int]()

    @dataclass(frozen=True, kw_only=True)
    class Counts(Tells):
        def after(self, ctx: Context, state: Any, step: int) -> Any:
            reached.append(step + 1)
            return super().after(ctx, state, step)

    def validate(syn: SyntheticSet, step: int) -> dict[str, float]:
        return {"val_accuracy": syn.latents.abs().max().item()}

    def most_late(folder: Path) -> int:
        delays = list[int]()

        def on_step(done: int, record: Any) -> None:
            assert len((folder / "log.jsonl").read_text().splitlines()) == done == len(delays) + 1
            delays.append(reached[-1] - done)

        folder.mkdir()
        run(Counts(), ctx, folder, eval_every=50, validate=validate, on_step=on_step)
        return max(delays)

    one, seven = tmp_path / "one", tmp_path / "seven"
    assert most_late(one) == 0
    monkeypatch.setattr(engine, "READ_STEPS", 7)
    assert most_late(seven) == 6
    files = [file.relative_to(seven) for file in seven.rglob("*.*")]
    assert len(files) == 15, "log, set, two checkpoints, ten snapshots and the start"
    for file in files:
        assert (seven / file).read_bytes() == (one / file).read_bytes(), file
    last = json.loads((seven / "log.jsonl").read_text().splitlines()[-1])
    assert last["image_max"] == pytest.approx(last["val_accuracy"]) and last["constant"] == 1 / 7


def test_the_first_bad_step_is_named_though_further_steps_were_done_before_it_was_read(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "READ_STEPS", 7)
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 11)
    stopped, whole, reached = tmp_path / "stopped", tmp_path / "whole", list[int]()
    stopped.mkdir()
    whole.mkdir()

    @dataclass(frozen=True, kw_only=True)
    class Counts(Tells):
        def after(self, ctx: Context, state: Any, step: int) -> Any:
            reached.append(step + 1)
            return super().after(ctx, state, step)

    with pytest.raises(ValueError, match=r"^step 27 is not finite \(loss=nan.*last good checkpoint"):
        run(Counts(bad=26), ctx, stopped)
    assert reached[-1] == 31
    log = stopped / "log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 27))
    assert read_tensors(stopped / "checkpoint.safetensors", "checkpoint")[1]["step"] == 22
    run(Tells(), ctx, whole)
    run(Tells(), ctx, stopped, resume=True)
    lines = [line for line in log.read_text().splitlines() if "event" not in line]
    assert lines == (whole / "log.jsonl").read_text().splitlines()
    for file in ("checkpoint.safetensors", "synthetic.safetensors", "snapshots/step_0000300.safetensors"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()


def test_a_baseline_that_diverges_names_the_first_bad_step(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "READ_STEPS", 7)
    reported = list[int]()
    with pytest.raises(ValueError, match=r"^step 10 is not finite .*no checkpoint yet"):
        engine.compute(Shrink(bad=9), ctx, lambda done, record: reported.append(done))
    assert reported == list(range(1, 10))


@pytest.mark.parametrize("later", [0, 2])
def test_what_fails_after_a_bad_number_is_explained_by_it(
    later: int, ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fails(Shrink):
        def after(self, ctx: Context, state: Any, step: int) -> None:
            if step == self.bad + later:
                raise RuntimeError("the matrix is singular")

    monkeypatch.setattr(engine, "READ_STEPS", 1000)
    with pytest.raises(ValueError, match=r"^step 10 is not finite \(loss=nan"):
        run(Fails(num_steps=300, bad=9), ctx, tmp_path)


def test_as_many_steps_are_read_together_as_take_a_second() -> None:
    every, read = 1, [1]
    while len(read) < 12:
        every = engine.steps_per_read(every, every, every * 0.03)
        read.append(every)
    assert read == [1, 2, 4, 8, 16, 32, 33, 33, 33, 33, 33, 33]
    assert engine.steps_per_read(32, 8, 16.0) == 1 and engine.steps_per_read(1, 1, 0.0) == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 2)
    with pytest.raises(ValueError, match=r"^step 8 is not finite"):
        run(Shrink(bad=7), ctx, tmp_path)
    newest = tmp_path / "checkpoint.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^step 8 is not finite"):
        run(Shrink(bad=7), ctx, tmp_path, resume=True)
    assert '{"event": "resume", "step": 4}' in (tmp_path / "log.jsonl").read_text()
    for name, step in (("checkpoint", 6), ("checkpoint.previous", 4)):  # the damaged one was not kept instead of it
        assert read_tensors(tmp_path / f"{name}.safetensors", "checkpoint")[1]["step"] == step
    run(Shrink(), ctx, tmp_path, resume=True)


def test_resume_without_a_checkpoint_starts_afresh(ctx: Context, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 5}\n')
    run(Shrink(), ctx, tmp_path, resume=True)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 12


def test_a_checkpoint_of_another_recipe_is_refused(ctx: Context, tmp_path: Path) -> None:
    header = {"kind": "checkpoint", "format": 1, "step": 3, "recipe_hash": "other", "state": {}}
    write_tensors(tmp_path / "checkpoint.safetensors", {"x": torch.zeros(1)}, header)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another recipe"):
        run(Shrink(), ctx, tmp_path, resume=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("draws", [{}, {"draws": 1}, {"draws": VERSION + 1}])
def test_a_checkpoint_of_other_draws_is_refused(draws: dict[str, int], ctx: Context, tmp_path: Path) -> None:
    """Version 0.1.0 wrote nothing of the kind; its run would go on with other batches."""
    run(Shrink(), ctx, tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(file, "checkpoint")
    del header["draws"]
    write_tensors(file, tensors, header | draws)
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match="whose random numbers differ, so the run cannot be continued; choose"
    ) as caught:
        run(Shrink(), ctx, tmp_path, resume=True)
    assert "\n" not in str(caught.value) and file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: [["syn", 3]], "3 at '.syn' is not what the method saves there"),
        (lambda state: state[:1], "the state of the method has syn, optimisers, learned, average"),
        (lambda state: [*state, ["more", 1]], "the state of the method has"),
        (lambda state: [["syn", {"module": {"dict": []}}], *state[1:]], "the saved module at '.syn' does not fit"),
        (
            lambda state: [["syn", {"module": {"dict": [[True, 1]]}}], *state[1:]],
            "the saved module at '.syn' does not fit",
        ),
        (lambda state: [*state[:1], ["optimisers", {"dict": [["latents", {"tensor": "x"}]]}], *state[2:]], "at '.opt"),
        (lambda state: [["syn", {"module": {"dict": 3}}]], "is not what the method saves there"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_method_is_refused(
    change: Any, words: str, ctx: Context, tmp_path: Path
) -> None:
    run(Shrink(), ctx, tmp_path)
    tensors, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    header["state"] = {"dict": change(header["state"]["dict"])}
    write_tensors(tmp_path / "checkpoint.safetensors", tensors, header)
    with pytest.raises(ValueError, match="does not fit the state of this method") as caught:
        run(Shrink(), ctx, tmp_path, resume=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("others", [0, 11])
def test_processes_that_found_other_checkpoints_are_refused(others: int, ctx: Context, tmp_path: Path) -> None:
    """Each of two machines has a folder of its own."""

    class Two(Ranks):
        def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
            tensors[0].add_(others)

    run(Shrink(), ctx, tmp_path)
    ctx = dataclasses.replace(ctx, ranks=Two(rank=1, size=2))
    with pytest.raises(ValueError, match=r"checkpoints of different steps in .*, this one step 12: .* a shared disk"):
        run(Shrink(), ctx, tmp_path, resume=True)


def test_a_checkpoint_of_a_later_step_is_refused(ctx: Context, tmp_path: Path) -> None:
    run(Shrink(), ctx, tmp_path)
    with pytest.raises(ValueError, match="is of step 12 of 11"):
        run(Shrink(num_steps=11), ctx, tmp_path, resume=True)


def test_a_log_with_a_bad_byte_does_not_stop_resumption(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 2)
    with pytest.raises(ValueError, match=r"^step 8 is not finite"):
        run(Shrink(bad=7), ctx, tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 3', b'"step": \xff', 1))
    with pytest.warns(UserWarning, match=r"log\.jsonl has lines that hold no record; they are moved to"):
        run(Shrink(), ctx, tmp_path, resume=True)
    assert b"\xff" in (tmp_path / "log.jsonl.damaged").read_bytes()


def test_validation_is_called_when_due_and_at_the_end(ctx: Context, tmp_path: Path) -> None:
    calls = []

    def validate(syn: SyntheticSet, step: int) -> dict[str, float]:
        calls.append(step)
        return {"val_accuracy": 0.5}

    run(Shrink(num_steps=7), ctx, tmp_path, eval_every=3, validate=validate)
    assert calls == [3, 6, 7]
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] == 0.5


def test_the_norm_of_a_gradient_is_bounded_by_clip(ctx: Context) -> None:
    method = Shrink(clip=0.5, optim=Optim(lr=1.0, momentum=0.0))
    state = method.init(ctx)
    before = state.syn.latents.detach().clone()
    record = method.step(ctx, state, 0)
    assert record["grad_latents"] > 0.5
    assert torch.isclose((state.syn.latents - before).norm(), torch.tensor(0.5), rtol=1e-4)


def test_parts_add_up(ctx: Context) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Halves(Shrink):
        def parts(self, ctx: Context) -> tuple[int, ...]:
            return (0, 1)

        def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
            return super().loss(ctx, state, step, part) / 2

    one, two = Shrink().init(ctx), Halves().init(ctx)
    records = Shrink().step(ctx, one, 0), Halves().step(ctx, two, 0)
    assert torch.allclose(one.syn.latents, two.syn.latents)
    assert records[0]["loss"] == pytest.approx(float(records[1]["loss"]))


def test_images_that_are_not_finite_after_the_update_are_never_kept(ctx: Context, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not finite"):
        run(Shrink(optim=Optim(lr=1e29), num_steps=2), ctx, tmp_path)
    assert not (tmp_path / "synthetic.safetensors").exists()


@dataclass(kw_only=True)
class Rich(GradientState):
    """Leaves of every kind, with an optimiser that holds a plain tensor of the state."""

    weight: Tensor
    helper: torch.optim.Optimizer
    best: float
    pool: list[Any]
    views: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Carries(Shrink):
    """Its state is richer than that of any method here."""

    def init(self, ctx: Context) -> Rich:
        state = super().init(ctx)
        weight = torch.ones(3, requires_grad=True)
        shared = torch.arange(4.0)
        return Rich(
            syn=state.syn,
            optimisers=state.optimisers,
            weight=weight,
            helper=torch.optim.Adam([weight], lr=0.1),
            best=float("inf"),
            pool=[{"age": 0, "weights": torch.zeros(2)}, None, "name"],
            views={"low": shared[:2], "high": shared[2:]},
        )

    def after(self, ctx: Context, state: Any, step: int) -> None:
        state.helper.zero_grad()
        (state.weight.square().sum() * state.syn.latents.detach().mean()).backward()
        state.helper.step()
        state.pool[0] = {"age": step + 1, "weights": state.pool[0]["weights"] + state.weight.detach()[:2]}
        state.views["low"] += 1
        with torch.no_grad():
            state.syn.latents.add_(state.weight.mean() * 1e-2)


def test_a_state_with_leaves_of_every_kind_is_restored(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = run(Carries(), ctx, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"^step 8 is not finite"):
        run(Carries(bad=7), ctx, tmp_path / "stopped")
    assert torch.equal(run(Carries(), ctx, tmp_path / "stopped", resume=True).latents, whole.latents)
    assert '{"event": "resume", "step": 7}' in (tmp_path / "stopped" / "log.jsonl").read_text()


@pytest.mark.parametrize("late", [False, True])
def test_a_state_in_which_two_leaves_share_memory_is_never_written(late: bool, ctx: Context, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Shares(Carries):
        def init(self, ctx: Context) -> Rich:
            state = super().init(ctx)
            return state if late else self.sharing(state)

        def after(self, ctx: Context, state: Any, step: int) -> None:
            super().after(ctx, state, step)
            self.sharing(state)

        def sharing(self, state: Rich) -> Rich:
            both = torch.arange(5.0)
            state.views = {"low": both[:3], "high": both[2:]}
            return state

    with pytest.raises(AssertionError, match=r"state\.views\.low and state\.views\.high share memory"):
        run(Shares(), ctx, tmp_path)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_what_a_part_draws_does_not_depend_on_the_process_that_has_it(ctx: Context) -> None:
    drawn: dict[int, list[float]] = {}

    @dataclass(frozen=True, kw_only=True)
    class Draws(Shrink):
        def parts(self, ctx: Context) -> range:
            return range(3)

        def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
            drawn.setdefault(part, []).append(torch.rand(()).item())
            return super().loss(ctx, state, step, part)

    @dataclass(frozen=True)
    class Deals(Ranks):
        def all_reduce_(self, tensors: Any) -> None:
            pass

    for ranks in (Ranks(), *(Deals(rank=k, size=2) for k in range(2))):
        there = dataclasses.replace(ctx, ranks=ranks)
        with there.rng.forked("layers", 0):
            Draws().step(there, Draws().init(there), 0)
    assert all(first == second for first, second in drawn.values())
    assert len({first for first, _ in drawn.values()}) == 3


def test_a_layer_without_the_derivative_that_is_needed_is_refused(ctx: Context, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twice(Shrink):
        def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
            images = state.syn()[0]
            (grad,) = torch.autograd.grad(torch.nn.functional.hardsigmoid(images).sum(), images, create_graph=True)
            return grad.sum()

    with pytest.raises(
        ValueError, match=r"^mlp lacks a derivative .*hardsigmoid_backward is not implemented\).*; give"
    ):
        run(Twice(), ctx, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[1:], y[1:]), r"images of a new set have shape \(5, 1, 8, 8\), not \(6, 1, 8, 8\)"),
        (lambda x, y: (x[..., 1:], y), r"images of a new set have shape \(6, 1, 8, 7\), not"),
        (lambda x, y: (x, y[1:]), r"labels of a new set have shape \(5,\)"),
        (lambda x, y: (x, torch.zeros(6, 2)), r"labels of a new set have shape \(6, 2\)"),
        (lambda x, y: (x, y.flip(0)), "classes of a new set are not grouped"),
    ],
)
def test_a_new_set_of_another_number_or_order_is_refused(change: Any, message: str, ctx: Context) -> None:
    with pytest.raises(ValueError, match=rf"{message}[^\n]*: [^\n]+; [^\n]+$"):
        ctx.new_set(*change(*ctx.initial("real")))


def test_a_long_run_on_a_cpu_is_warned_of_and_its_time_is_logged(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])

    def on_step(done: int, record: Any) -> None:
        now[0] += 10.0
        if done == 3:
            raise KeyboardInterrupt

    method = Shrink(num_steps=5000)
    with (
        pytest.warns(UserWarning, match=r"^4998 steps on a CPU take about 14 h on this machine") as warned,
        pytest.raises(KeyboardInterrupt) as stop,
    ):
        run(method, ctx, tmp_path, on_step=on_step)
    assert len(warned) == 1 and "num_steps=100" in str(warned[0].message)
    assert {"event": "estimate", "step": 2, "seconds_left": 49980} in read_log(tmp_path / "log.jsonl")
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert stop.value.__notes__ == [f"step 2 of 5000 is kept in {checkpoint}"]

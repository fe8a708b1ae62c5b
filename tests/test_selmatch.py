"""SelMatch against its slow twin: the window of each class, and which images change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.method import Context, Optim
from condense.methods.selection import EL2N, Forgetting
from condense.methods.selmatch import SelMatch
from condense.networks import build
from condense.recipe import named
from tests.reference.selmatch import selmatch, window
from tests.test_mtt import make_context  # noqa: F401

METHOD = SelMatch(
    num_steps=3,
    share=0.5,
    window=0.25,
    syn_steps=3,
    batch_syn=5,
    max_start_epoch=3,
    lr=0.05,
    optim=Optim(lr=10.0),
    optim_lr=Optim(lr=0.5),
)
SCORES = torch.tensor([2.0, torch.inf, 0.0, 2.0, 1.0, torch.inf, 3.0]).repeat_interleave(3)
"""Of the seven images of each of three classes, which alternate; some are equal."""


@pytest.fixture
def make(make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:  # noqa: F811
    """A context in which the scores are known."""
    monkeypatch.setattr(Forgetting, "scores", lambda self, ctx: SCORES)
    monkeypatch.setattr(EL2N, "scores", lambda self, ctx: -SCORES.clamp(max=9))
    return lambda **fields: make_context(ipc=4, method=METHOD, **fields)


@pytest.mark.parametrize(("share", "score"), [(0.5, "forgetting"), (0.25, "el2n"), (1.0, "forgetting")])
def test_it_follows_its_twin_and_the_other_images_stay_real(
    share: float, score: Any, make: Callable[..., Context]
) -> None:
    ctx = make(augment="color_crop", dtype=torch.float64)
    method = dataclasses.replace(METHOD, share=share, score=score)
    state, train = method.init(ctx), ctx.task.train
    state.syn.to(torch.float64)
    fixed, learned = dict[int, Tensor](), dict[int, Tensor]()
    for c, members in enumerate(train.by_class):
        scores = SCORES[members] if score == "forgetting" else -SCORES[members].clamp(max=9)
        parts = window(scores.tolist(), 4, share, 0.25)
        for position, i in enumerate([*parts[0], *parts[1]]):
            (fixed if position < len(parts[0]) else learned)[4 * c + position] = train.images[members[i]]
    assert len(learned) == 3 * 4 * share

    def minibatches(step: int) -> Any:
        drawn = method.batches(ctx, *state.syn(), step, 0)
        return [(b.chosen.tolist(), lambda x, b=b: ctx.task.augment.apply(x, b.drawn)) for b in drawn]

    def pairs(step: int) -> Any:
        return tuple({name: p.double() for name, p in each.items()} for each in method.snapshots(ctx, step, 0))

    expected = selmatch(
        fixed,
        learned,
        torch.arange(3).repeat_interleave(4),
        method.num_steps,
        network=build(ctx.task.network.name, ctx.task.input_shape, 3).double(),
        pairs=pairs,
        minibatches=minibatches,
        lr=method.lr,
        lr_images=method.optim.lr,
        lr_log_lr=method.optim_lr.lr,
        momentum=method.optim.momentum,
    )
    for step, (loss, images, lr) in enumerate(expected):
        record = method.step(ctx, state, step)
        assert float(record["loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(record["syn_lr"]) == pytest.approx(lr, rel=1e-6)
        torch.testing.assert_close(state.syn.latents.detach(), torch.stack(images), rtol=1e-7, atol=1e-8)
    assert all(torch.equal(state.syn.latents[i], image) for i, image in fixed.items())
    assert all(not torch.equal(state.syn.latents[i], image) for i, image in learned.items())


@pytest.mark.parametrize("fields", [{"ema": 0.5, "clamp": True}, {"start": "noise", "optim": Optim(kind="lamb")}])
def test_no_other_way_to_update_moves_the_real_images(fields: dict[str, Any], make: Callable[..., Context]) -> None:
    ctx = make()
    method, first = dataclasses.replace(METHOD, **fields), METHOD.init(ctx).syn.latents.detach()
    state, learned = method.init(ctx), METHOD.learned(ctx)
    begun = state.syn.latents.detach().clone()
    assert torch.equal(begun[~learned], first[~learned])
    assert torch.equal(begun[learned], first[learned]) == (method.start == "real")
    for step in range(method.num_steps):
        method.step(ctx, state, step)
    stored = method.finalize(ctx, state, method.num_steps).latents.detach()
    torch.testing.assert_close(stored[~learned], first[~learned], rtol=0, atol=1e-6)
    assert (stored[learned] - begun[learned]).abs().max() > 1e-4


def test_a_set_of_one_image_a_class_is_learned_and_too_large_a_window_is_refused(make: Callable[..., Context]) -> None:
    ctx = dataclasses.replace(make(), ipc=1)
    assert METHOD.learned(ctx).all()
    line = r"^class '0' has 7 training images, but the window ends at image 8; give ipc=3 or less, or a smaller window$"
    with pytest.raises(ValueError, match=line):
        dataclasses.replace(METHOD, window=1.0).init(make())
    with pytest.raises(ValueError, match=r"method.share must lie in \(0, 1\], got 0.0; a usual value is 0.5"):
        SelMatch(share=0.0)


def test_recipes_hold_the_published_pairs() -> None:
    """alpha and beta by data set and budget."""
    published = {
        "cifar10": {250: (0.6, 0.5), 500: (0.2, 0.3), 1000: (0.1, 0.2), 1500: (0.1, 0.2)},
        "cifar100": {25: (0.8, 0.8), 50: (0.6, 0.7), 100: (0.3, 0.6), 150: (0.2, 0.4)},
    }
    for dataset, pairs in published.items():
        for ipc, pair in pairs.items():
            recipe = named(f"selmatch-{dataset}-ipc{ipc}")
            assert isinstance(recipe.method, SelMatch) and (recipe.method.share, recipe.method.window) == pair
            assert recipe.method.optim.lr == (10000.0 if dataset == "cifar10" and ipc >= 1000 else 1000.0)
            assert recipe.method.syn_steps == 55 and recipe.network == "auto:norm=batch"

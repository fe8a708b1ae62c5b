"""Stills of the decoder ``static-dynamic``: the images of a set that was distilled from frames of the clips.

``opened``  read the set that a recipe names;
``check``   compare it with the clips;
``named``   name it by its checksum in the resolved recipe;
``clips``   turn its images into the initial clips of a run.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from condense.data.layout import InputShape
from condense.data.transform import Transform
from condense.files import checksum, expanded
from condense.names import spelt
from condense.recipe import Recipe
from condense.synthetic.budget import latents_per_class
from condense.synthetic.decode import Decode, StaticDynamic
from condense.synthetic.files import load
from condense.synthetic.set import SyntheticSet
from condense.task import Task


def opened(decode: Decode) -> SyntheticSet | None:
    """Read the set whose images are the stills of a decoder; None if the decoder names none.

    Raises:
        ValueError: the set cannot be read, or it is whitened.
    """
    if not isinstance(decode, StaticDynamic) or decode.stills is None:
        return None
    source = decode.stills
    if not expanded(source).exists():
        raise ValueError(
            f"there are no stills {source[:64]!r}; give {spelt('decode.stills', 'RUN', 'StaticDynamic')} with the run "
            "folder or file of the distilled frames (a recipe.yaml of a run holds the checksum of their set)"
        )
    stills = load(source)
    if stills.origin.transform.get("kind") == "zca":
        raise ValueError(
            f"the stills {source} are whitened images and no pixels; distil the frames with "
            f"{spelt('transform', 'channel')}"
        )
    return stills


def check(stills: SyntheticSet, plan: Recipe, input_shape: InputShape, classes: tuple[str, ...]) -> None:
    """Raise ValueError if a set does not have the stills that a recipe needs for clips of this shape and classes."""
    assert isinstance(plan.decode, StaticDynamic) and plan.ipc is not None
    what, origin, split = f"the stills {plan.decode.stills}", stills.origin, plan.split
    if origin.input_shape != input_shape[1:]:
        raise ValueError(
            f"{what} have shape {origin.input_shape}, frames of the clips {input_shape[1:]}; distil frames of these "
            "clips, which `condense frames` writes"
        )
    if tuple(origin.dataset.get("classes", ())) != classes:
        raise ValueError(
            f"{what} have {origin.num_classes} classes and the clips {len(classes)}, or their names differ; distil "
            "frames of these clips, which `condense frames` writes"
        )
    if split.val_fraction and origin.split != split:
        raise ValueError(
            f"{what} were distilled from frames of clips that are held out for validation here; distil them with "
            f"{spelt('split.val_fraction', split.val_fraction)} and {spelt('split.seed', split.seed)}"
        )
    sizes = input_shape, len(classes), len(classes)
    needed = plan.decode.statics * latents_per_class(plan.budget, plan.ipc, plan.decode, plan.labels, *sizes)
    counts = stills.classes.bincount(minlength=len(classes)) * stills.decode.expansion
    if not (counts == needed).all():
        raise ValueError(
            f"{what} are {int(counts.min())} images of a class, {needed} are needed; distil the frames with "
            f"{spelt('ipc', needed)}"
        )


def named(stills: SyntheticSet, decode: Decode) -> Decode:
    """Return the decoder with the checksum of the set in place of its path."""
    assert isinstance(decode, StaticDynamic)
    return dataclasses.replace(decode, stills=checksum(stills.state_dict()))


@torch.no_grad()
def clips(stills: SyntheticSet, decode: Decode, task: Task) -> Tensor:
    """Return clips (n, T, C, H, W) that repeat one still each, grouped by class, in the space of the task."""
    assert isinstance(decode, StaticDynamic)
    pixels = Transform.from_description(stills.origin.transform).inverse(stills()[0])
    order = stills.classes.repeat(stills.decode.expansion).argsort(stable=True)
    images = pixels[order].repeat_interleave(decode.dynamics, 0)
    repeated = images[:, None].expand(-1, task.input_shape[0], -1, -1, -1)
    return task.transform(repeated.to(task.device))

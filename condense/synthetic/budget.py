"""How much a set may store: a number of images per class, counted in floats or in bits (docs/budgets.md)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.names import spelt
from condense.synthetic.decode import Coded, Decode, Pixels
from condense.synthetic.labels import Hard, Labels

Unit = Literal["floats", "bits"]
"""What a budget of images counts: the floats of the samples, or all bits of the set, with its labels and decoder."""


class Cost(NamedTuple):
    """The stored bytes of images (latents), labels with weights, and decoder."""

    images: int
    labels: int
    decoder: int

    def remark(self) -> str:
        """Return text that says how much larger than the images the labels are; empty if they are not."""
        if self.labels <= self.images:
            return ""
        return f"the labels take {self.labels / self.images:.3g} times the bytes of the images"


def cost_of(decode: Decode, latents: Tensor, classes: Tensor, provider: nn.Module, decoder: nn.Module) -> Cost:
    """Return the stored bytes of latents of these classes, of the labels that ``provider`` has, and of a decoder."""
    images, of_decoder = decode.num_bytes(latents, classes, decoder)
    return Cost(images, sum(tensor.nbytes for tensor in provider.state_dict().values()), of_decoder)


def bits(cost: Cost, provider: nn.Module, num_classes: int) -> int:
    """Return the bits of a set by the convention of docs/budgets.md: 8 for each byte, but ceil(log2 C) for each class
    that ``provider`` holds."""
    classes = sum(t.numel() for t in provider.state_dict().values() if t.dtype == torch.long)
    return 8 * sum(cost) - classes * (64 - max(num_classes - 1, 0).bit_length())


def in_words(ipc: int | None, fraction: float | None, unit: Unit) -> str:
    """Return a budget in words: ``ipc 10``, ``ipc 10 in bits`` or ``fraction 0.3``."""
    if fraction is not None:
        return f"fraction {fraction:g}"
    return f"ipc {ipc}" if unit == "floats" else f"ipc {ipc} in {unit}"


def allowed_bits(ipc: int, labels: Labels, input_shape: InputShape, num_classes: int, num_outputs: int) -> int:
    """Return the bits of a budget: those of ``ipc`` images of each class, 32 for each number, with their classes.

    The arguments are those of ``latents_per_class``. Where targets are not classes, the images have ``labels``.
    """
    plain = Hard() if num_outputs == num_classes else labels
    return _bits(Pixels(), plain, ipc, input_shape, num_classes, num_outputs)


def latents_per_class(
    unit: Unit,
    ipc: int,
    decode: Decode,
    labels: Labels,
    input_shape: InputShape,
    num_classes: int,
    num_outputs: int,
) -> int:
    """Return the largest number of latents per class within a budget of ``ipc`` images per class.

    Args:
        unit: what the budget counts. For floats, and for decoders whose bits are learned, the rule is that of the
            decoder, ``Decode.latents_per_class``.
        ipc: images per class.
        decode: the decoder.
        labels: the kind of labels.
        input_shape: the shape of a sample.
        num_classes: C.
        num_outputs: the width of the targets, C for classes and scores of them.

    Raises:
        ValueError: the budget is too small for one latent of each class, or the decoder has no fixed number of bits.
    """
    if unit == "floats" or isinstance(decode, Coded):
        return decode.latents_per_class(ipc, input_shape, num_classes)
    one, two = (_bits(decode, labels, n, input_shape, num_classes, num_outputs) for n in (1, 2))
    each, allowed = two - one, allowed_bits(ipc, labels, input_shape, num_classes, num_outputs)
    if one > allowed:
        enough = -(-one * ipc // allowed)
        raise ValueError(
            f"one latent of each class and the decoder {decode.name} take {one} bits, more than the {allowed} of "
            f"{spelt('ipc', ipc)}; give {spelt('ipc', enough)} or {spelt('budget', 'floats')}"
        )
    return 1 + (allowed - one) // each


def _bits(
    decode: Decode, labels: Labels, latents: int, input_shape: InputShape, num_classes: int, num_outputs: int
) -> int:
    """Return the bits of a set with so many latents of each class."""
    classes = num_classes if num_outputs == num_classes else 0
    with torch.device("meta"):
        dtype = torch.float32 if decode.differentiable else decode.stored
        stored = torch.empty(latents * num_classes, *decode.latent_shape(input_shape), dtype=dtype)
        targets = torch.zeros(len(stored), dtype=torch.long) if classes else torch.zeros(len(stored), num_outputs)
        provider = labels.provider(targets, classes, input_shape, decode.expansion)
        decoder = decode.build(input_shape, classes or 1)
        return bits(cost_of(decode, stored, torch.zeros(len(stored)), provider, decoder), provider, classes)

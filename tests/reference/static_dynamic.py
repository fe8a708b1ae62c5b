"""Slow reference of the decoder static-dynamic: the convolution written out, position by position."""

from __future__ import annotations

from itertools import product

from torch import Tensor


def clip(still: Tensor, sequence: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Return the clip (T, C, H, W) of one still and one sequence.

    Args:
        still: (C, H, W), shown in every frame.
        sequence: (T, H, W), one more channel.
        kernels: (C, C + 1, 3, 3, 3), over channels, frames, rows and columns; positions outside the clip count as 0.
        bias: (C,).
    """
    frames, height, width = sequence.shape
    made = still.new_empty(frames, len(still), height, width)
    for t, c, y, x in product(range(frames), range(len(still)), range(height), range(width)):
        value = bias[c].clone()
        for dt, dy, dx in product((-1, 0, 1), repeat=3):
            if 0 <= t + dt < frames and 0 <= y + dy < height and 0 <= x + dx < width:
                weights = kernels[c, :, dt + 1, dy + 1, dx + 1]
                value += (weights[:-1] * still[:, y + dy, x + dx]).sum() + weights[-1] * sequence[
                    t + dt, y + dy, x + dx
                ]
        made[t, c, y, x] = value
    return made
